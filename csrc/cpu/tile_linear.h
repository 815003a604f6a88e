// A linear map of many columns on tiles: the head. Compiled by each_isa.h for the instruction sets that have tiles.

namespace fr {
namespace FR_ISA {

// Writes the sums of a block to out, with bias and scale where they are int32.
template <class T> static FR_INLINE void write_sums(const LinearJob& job, const Block& b, int NV) {
  for (int v = 0; v < NV; ++v) {
    const int64_t column = (b.p * NV + v) * kLanes;
    for (int64_t i = 0; i < b.rows; ++i) {
      __m512 x = _mm512_load_ps(b.sums[v][i]);
      if constexpr (T::is_int8)
        x = add_worth(b.sums[v][i], *job.panels, column,
                      row_scale(static_cast<const char*>(job.a) + (b.r + i) * job.row, job.row),
                      _mm512_load_ps(job.bias + column));
      _mm512_storeu_ps(job.out + (b.r + i) * job.out_row + column, x);
    }
  }
}

static FR_INLINE void nothing() {}

// Where tiles store the sums of a block: whole ones in float go straight to out, others by way of `block`.
struct SumsAt {
  float* from;
  int64_t vector, row;  // elements from one to the next
};
template <class T> static FR_INLINE SumsAt sums_at(const LinearJob& job, Block& b, int NV) {
  const bool whole = b.rows == kBlockRows || job.rows <= kTileRows;  // few rows: tiles have no more than those
  if (T::is_int8 || !whole) return {b.sums[0][0], kBlockRows * kLanes, kLanes};
  return {job.out + b.r * job.out_row + b.p * NV * kLanes, kLanes, job.out_row};
}
#define FR_STORE_AT(tile, at, v, r) _tile_stored(tile, (at).from + (v) * (at).vector + (r) * (at).row, (at).row * 4)

// The sums of up to 16 rows with all vectors of a panel.
template <class T, int NV> static FR_INLINE void linear_narrow(const Operand& o, const Start& s, const SumsAt& at) {
  FR_TILE_START(0, s, 0, 0);
  if constexpr (NV > 1) {
    FR_TILE_START(1, s, 0, 1);
  }
  if constexpr (NV > 2) {
    FR_TILE_START(2, s, 0, 2);
  }
  if constexpr (NV > 3) {
    FR_TILE_START(3, s, 0, 3);
  }
  add_narrow<T, NV, 2>(o, nothing);
  FR_STORE_AT(0, at, 0, 0);
  if constexpr (NV > 1) FR_STORE_AT(1, at, 1, 0);
  if constexpr (NV > 2) FR_STORE_AT(2, at, 2, 0);
  if constexpr (NV > 3) FR_STORE_AT(3, at, 3, 0);
}

// The same of up to 32 rows.
template <class T, int NV> static FR_INLINE void linear_wide(const Operand& o, const Start& s, const SumsAt& at) {
  for (int v = 0; v + 1 < NV; v += 2) {
    FR_TILE_START(0, s, 0, v);
    FR_TILE_START(1, s, 0, v + 1);
    FR_TILE_START(2, s, 16, v);
    FR_TILE_START(3, s, 16, v + 1);
    add_pair<T, NV>(o, v, nothing);
    FR_STORE_AT(0, at, v, 0);
    FR_STORE_AT(1, at, v + 1, 0);
    FR_STORE_AT(2, at, v, 16);
    FR_STORE_AT(3, at, v + 1, 16);
  }
  if constexpr (NV % 2 == 1) {
    FR_TILE_START(0, s, 0, NV - 1);
    FR_TILE_START(2, s, 16, NV - 1);
    add_apart<T, NV>(o, {nullptr, 0, nullptr, 0, false}, NV - 1, nothing);
    FR_STORE_AT(0, at, NV - 1, 0);
    FR_STORE_AT(2, at, NV - 1, 16);
  }
}

// Owns:   the columns of `part` of all rows of out.
// Keeps:  the sums of a block.
// Moves:  a panel once per block of 32 rows, the activations of a block once or twice per panel, out once.
// Syncs:  nothing.
// Limits: memory of whole blocks of 32 rows behind a.
template <class T, int NV> static void linear_panels(const LinearJob& job, Part part) {
  const int64_t begin = part.begin(job.panels->count), end = part.end(job.panels->count);
  Block b;
  configure_tiles(job.rows <= kTileRows ? job.rows : kTileRows);
  for (int64_t i = begin; i < end; ++i) {
    b.p = job.backwards ? end - 1 - (i - begin) : i;
    const Operand o = operand<T, NV>(*job.network, *job.panels, job.a, job.row, b.p);
    const Start s{T::is_int8 ? nullptr : job.bias + b.p * NV * kLanes, 0};
    for (b.r = 0; b.r < job.rows; b.r += kBlockRows) {
      b.rows = job.rows - b.r < kBlockRows ? job.rows - b.r : kBlockRows;
      const SumsAt at = sums_at<T>(job, b, NV);
      if (job.rows <= kTileRows)
        linear_narrow<T, NV>(o, s, at);
      else
        linear_wide<T, NV>(rows_from(o, b.r), s, at);
      if (at.from == b.sums[0][0]) write_sums<T>(job, b, NV);
    }
  }
}
template <class T> static void linear(const LinearJob& job, Part part) {
  switch (job.panels->vectors) {
    case 1: return linear_panels<T, 1>(job, part);
    case 2: return linear_panels<T, 2>(job, part);
    case 3: return linear_panels<T, 3>(job, part);
    default: return linear_panels<T, 4>(job, part);
  }
}

}  // namespace FR_ISA
}  // namespace fr
