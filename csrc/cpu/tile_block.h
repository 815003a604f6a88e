// A block of up to 32 rows of activations times one panel of weights, on matrix tiles (AMX). Compiled by each_isa.h for
// the instruction set that has them.
//
// A tile of activations is 16 rows of 64 bytes, a tile of weights 16 groups of k for 16 lanes; both are read where they
// lie. An element's sum runs over k in order whatever the shape of the block, so a row's bits do not depend on it. The
// intrinsics want literal tile numbers, hence the spelled-out loops: 0-3 are sums, 4 and 5 activations, 6
// and 7 weights, as `configure_tiles` shapes them.

namespace fr {
namespace FR_ISA {

constexpr int64_t kTileBytes = 1024, kTileRows = 16, kBlockRows = 32, kLanes = 16;
constexpr int64_t kCacheBytes = 2 << 20;  // of the L2 of a core with tiles

struct Bfloat16 {
  static constexpr bool is_int8 = false;
  using Element = bf16;
  static constexpr int64_t group = 2;  // of k that one lane of a tile holds side by side
};
struct Int8 {
  static constexpr bool is_int8 = true;
  using Element = int8_t;
  static constexpr int64_t group = 4;
};

#define FR_TILE_DOT(sums, activations, weights) \
  if constexpr (T::is_int8)                     \
    _tile_dpbssd(sums, activations, weights);   \
  else                                          \
    _tile_dpbf16ps(sums, activations, weights)

// Where the sums of the vectors of a panel begin: null: at zero; stride 0: every row at the same.
struct Start {
  const float* from;
  int64_t stride;  // bytes between rows
};
#define FR_TILE_START(tile, start, row, vector)                                                       \
  if ((start).from)                                                                                   \
    _tile_loadd(tile, (start).from + (vector) * kLanes + (row) * (start).stride / 4, (start).stride); \
  else                                                                                                \
    _tile_zero(tile)

// Activations of a block and the weights they meet in one panel of NV vectors: tiles by k, then vector.
struct Operand {
  const char* a;  // of the block's row 0
  int64_t row;    // bytes between rows
  const char* w;
  int64_t blocks;  // tiles along k
  bool far;        // the network is larger than a core's cache
};

// The rows a, or null for nothing, and panel p of m.
template <class T, int NV>
static FR_INLINE Operand operand(const PackedNetwork& net, const Panels& m, const void* a, int64_t row, int64_t p) {
  if (!a) return {nullptr, 0, nullptr, 0, false};
  const int64_t blocks = m.K / (T::group * kTileRows);
  return {static_cast<const char*>(a), row, m.weights.as<char>() + p * blocks * NV * kTileBytes, blocks,
          net.weight_bytes > kCacheBytes};
}
static FR_INLINE Operand rows_from(Operand o, int64_t r) {
  o.a += r * o.row;
  return o;
}

// Adds an operand's products to sums 0 .. NV-1 of up to 16 rows; vector 2 goes to sums `third`. `between` runs after
// each k: what it computes is hidden behind the tiles.
template <class T, int NV, int third, class Between>
static FR_INLINE void add_narrow(const Operand& o, const Between& between) {
  constexpr int64_t ahead = 16 * 1024;  // few rows wait for weights that are far away: ask for them early, by the tile
  const auto ask = [&](const char* w) {
    if (!o.far) return;
    for (int64_t line = 0; line < kTileBytes; line += 64) __builtin_prefetch(w + ahead + line, 0, 2);
  };
  for (int64_t k = 0; k < o.blocks; ++k) {
    const char* w = o.w + k * NV * kTileBytes;
    _tile_loadd(4, o.a + k * 64, o.row);
    ask(w);
    _tile_loadd(6, w, 64);
    FR_TILE_DOT(0, 4, 6);
    if constexpr (NV > 1) {
      ask(w + kTileBytes);
      _tile_loadd(7, w + kTileBytes, 64);
      FR_TILE_DOT(1, 4, 7);
    }
    if constexpr (NV > 2) {
      ask(w + 2 * kTileBytes);
      _tile_loadd(6, w + 2 * kTileBytes, 64);
      if constexpr (third == 2) {
        FR_TILE_DOT(2, 4, 6);
      } else {
        FR_TILE_DOT(3, 4, 6);
      }
    }
    if constexpr (NV > 3) {
      ask(w + 3 * kTileBytes);
      _tile_loadd(7, w + 3 * kTileBytes, 64);
      FR_TILE_DOT(3, 4, 7);
    }
    between();
  }
}

// Adds an operand's products with vectors v and v + 1 to sums 0, 1 (rows 0-15) and 2, 3 (rows 16-31).
template <class T, int NV, class Between>
static FR_INLINE void add_pair(const Operand& o, int64_t v, const Between& between) {
  for (int64_t k = 0; k < o.blocks; ++k) {
    const char* w = o.w + (k * NV + v) * kTileBytes;
    _tile_loadd(4, o.a + k * 64, o.row);
    _tile_loadd(6, w, 64);
    FR_TILE_DOT(0, 4, 6);
    _tile_loadd(7, w + kTileBytes, 64);
    FR_TILE_DOT(1, 4, 7);
    _tile_loadd(5, o.a + k * 64 + kTileRows * o.row, o.row);
    FR_TILE_DOT(2, 5, 6);
    FR_TILE_DOT(3, 5, 7);
    between();
  }
}

// Adds the products of two operands with vector v, of the one to sums 0 and 2, of the other to sums 1 and 3. Either may
// have no blocks.
template <class T, int NV, class Between>
static FR_INLINE void add_apart(const Operand& one, const Operand& other, int64_t v, const Between& between) {
  for (int64_t k = 0; k < one.blocks || k < other.blocks; ++k) {
    if (k < one.blocks) {
      _tile_loadd(6, one.w + (k * NV + v) * kTileBytes, 64);
      _tile_loadd(4, one.a + k * 64, one.row);
      FR_TILE_DOT(0, 4, 6);
      _tile_loadd(5, one.a + k * 64 + kTileRows * one.row, one.row);
      FR_TILE_DOT(2, 5, 6);
    }
    if (k < other.blocks) {
      _tile_loadd(7, other.w + (k * NV + v) * kTileBytes, 64);
      _tile_loadd(4, other.a + k * 64, other.row);
      FR_TILE_DOT(1, 4, 7);
      _tile_loadd(5, other.a + k * 64 + kTileRows * other.row, other.row);
      FR_TILE_DOT(3, 5, 7);
    }
    between();
  }
}

// The sums of a block with one panel, and the block they are of.
struct Block {
  alignas(64) float sums[4][kBlockRows][kLanes];
  alignas(64) float input[4][kBlockRows][kLanes];  // int8: the sums with the input
  int64_t p, r, rows;                              // panel, first row
  int64_t done;                                    // rows whose state is computed
};

// base + what int32 sums in the place of floats are worth, of the columns from `column` on. A layer's products with its
// input are the same numbers, whether a LinearJob has made them or the layer itself.
static FR_INLINE __m512 add_worth(const float* sums, const Panels& panels, int64_t column, float row_worth,
                                  __m512 base) {
  const __m512 worth = _mm512_mul_ps(_mm512_load_ps(panels.scale.as<float>() + column), _mm512_set1_ps(row_worth));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), worth, base);
}

}  // namespace FR_ISA
}  // namespace fr
