// The shape of the matrix tiles (AMX) in every product that uses them. Compiled by each_isa.h for the instruction set
// that has them.

namespace fr {
namespace FR_ISA {

// Tiles 0-3: sums, 4-5: left, 6-7: right; the sums and the left ones have `rows` rows.
FR_INLINE void configure_tiles(int64_t rows) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = i < 6 ? static_cast<uint8_t>(rows) : 16;
  asm volatile("" ::"r"(&config) : "memory");  // the intrinsic does not say that it reads memory
  _tile_loadconfig(&config);
}

}  // namespace FR_ISA
}  // namespace fr
