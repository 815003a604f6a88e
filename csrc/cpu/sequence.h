// What the three cells share around their equations: the order of steps, which rows take part, the chunks of backward.
// Compiled once per instruction set, by each_isa.h.

namespace fr {
namespace FR_ISA {

// The time index of step s: steps count 0 .. T-1 in the order of processing.
template <class F> FR_INLINE int64_t time_of(const Sequence<F>& q, int64_t s) { return q.reverse ? q.T - 1 - s : s; }

template <class F> FR_INLINE bool takes_part(const Sequence<F>& q, int64_t t, int64_t b) {
  return !q.lengths || t < q.lengths[b];
}
template <class F> FR_INLINE bool is_reset(const Sequence<F>& q, int64_t t, int64_t b) {
  return q.reset && q.reset[t * q.B + b];
}

// The state that step s of row b starts from: a row of `initial` or of `steps`, every step's result (`width` elements a
// row), or null after a reset, when it is 0. Row b takes part in step s.
template <class F>
static const F* state_before(const Sequence<F>& q, int64_t s, int64_t b, const F* initial, const F* steps,
                             int64_t width) {
  if (is_reset(q, time_of(q, s), b)) return nullptr;
  if (s == 0 || !takes_part(q, time_of(q, s - 1), b)) return initial + b * width;
  return steps + (time_of(q, s - 1) * q.B + b) * width;
}
// The state in which row b ends.
template <class F>
static const F* last_state(const Sequence<F>& q, int64_t b, const F* initial, const F* steps, int64_t width) {
  const int64_t count = q.lengths ? q.lengths[b] : q.T;
  return count == 0 ? initial + b * width : steps + ((q.reverse ? 0 : count - 1) * q.B + b) * width;
}

// Zeroes the states (width elements a row) of the rows b0 .. b1 that are reset before time t.
template <class S, class F>
static void apply_reset(const Sequence<S>& q, int64_t t, int64_t b0, int64_t b1, F* state, int64_t width) {
  if (!q.reset) return;
  for (int64_t b = b0; b < b1; ++b)
    if (is_reset(q, t, b) && takes_part(q, t, b)) zero(state + b * width, width);
}

// Real numbers that become an output of S: the output itself, or scratch that `finish` rounds into it. With `whole`
// they are found all at once and rounded as they are written, so that nothing is kept.
template <class S> class Accumulator {
 public:
  using F = Real<S>;
  Accumulator(S* out, int64_t n, bool whole = false)
      : out_(out), n_(out ? n : 0), whole_(whole && !same), own_(same || whole_ ? 0 : n_) {}
  F* get() const {
    if constexpr (same)
      return out_;
    else
      return own_.get();
  }
  SumsAt<S> at(int64_t i) const { return whole_ ? SumsAt<S>{nullptr, out_ + i} : SumsAt<S>{get() + i, nullptr}; }
  void start(const S* from) const { convert(from, n_, get()); }
  void start() const { zero(get(), n_); }
  void finish() const {
    if constexpr (!same)
      if (!whole_) convert(own_.get(), n_, out_);
  }

 private:
  static constexpr bool same = sizeof(S) == sizeof(F);
  S* out_;
  int64_t n_;
  bool whole_;
  Scratch<F> own_;
};

// ---- backward

// The rows of some steps at once, in the order of time: row (t - t0) * B + b. What the steps leave for the gradients of
// the weights; where a row does not take part dp is 0 and the addresses are null.
template <class F> struct Chunk {
  int64_t s0, s1, t0, rows;
  bool first;   // to be summed up
  F* dp;        // gradients of the pre-activations, row stride ld
  int64_t ld;   // a multiple of a cache line, but of no large power of two: tiles read down the columns
  const F** x;  // the inputs of each row
  const F** h;  // the h each row started from, or null after a reset
  FR_INLINE int64_t at(int64_t t, int64_t b, int64_t B) const { return (t - t0) * B + b; }
};

FR_INLINE int64_t padded_stride(int64_t n) { return round_up(n, 32) + 16; }

// Whether backward has so few rows, in all their steps, that the weights are not packed for its products and that its
// outer sums fill no tile; measured (bench/results/epyc/short.csv).
template <class F> static bool few_rows(const Sequence<F>& q) { return q.T * q.B <= 16; }

// Whether vectors run along the rows of an outer sum of N columns.
template <class F> static bool narrow(int64_t N) { return N * 2 <= Vec<Real<F>>::width; }

// Whether the outer sums of N columns, of which one chunk has all, are rounded as they are written.
template <class F> static bool whole_sums(const Sequence<F>& q, int64_t N) {
  return few_rows(q) && q.T * q.B > 0 && !narrow<F>(N);
}

// How many steps a chunk has: enough rows for the sums of outer products, few enough to stay in cache.
template <class F> static int64_t chunk_steps(const Sequence<F>& q) {
  constexpr int64_t enough_rows = on_tiles<F> ? 1024 : 512;
  const int64_t steps = q.B >= enough_rows ? 1 : enough_rows / (q.B > 0 ? q.B : 1);
  return steps < q.T ? steps : q.T;
}

// Calls steps(chunk, b0, b1) for the steps s1-1 .. s0 of a chunk and all rows, split over the threads, then
// sums(chunk) for what the chunk adds up to; from the last chunk to the first.
template <class F, class Steps, class Sums>
static void backward_chunks(const Sequence<F>& q, int64_t width, int64_t multiply_adds, const Steps& steps,
                            const Sums& sums) {
  if (q.T == 0 || q.B == 0) return;
  const int64_t chunk = chunk_steps(q), ld = padded_stride(width);
  const Scratch<F> dp(chunk * q.B * ld);
  const Scratch<const F*> x(chunk * q.B), h(chunk * q.B);
  for (int64_t s1 = q.T; s1 > 0; s1 -= chunk) {
    const int64_t s0 = s1 > chunk ? s1 - chunk : 0;
    const Chunk<F> c{s0, s1, q.reverse ? q.T - s1 : s0, (s1 - s0) * q.B, s1 == q.T, dp.get(), ld, x.get(), h.get()};
    split(q.pool, q.B, multiply_adds / q.T * (s1 - s0), [&](int64_t b0, int64_t b1) { steps(c, b0, b1); });
    sums(c);
  }
}

// Enters row b at time t of step s into the chunk; false, with its dp zeroed, where it does not take part.
template <class F> static bool enter_row(const Sequence<F>& q, const Chunk<F>& c, int64_t s, int64_t b, const F* y) {
  const int64_t t = time_of(q, s), k = c.at(t, b, q.B);
  const bool there = takes_part(q, t, b);
  c.x[k] = there ? q.x + (t * q.B + b) * q.I : nullptr;
  c.h[k] = there ? state_before(q, s, b, q.h0, y, q.P) : nullptr;
  if (!there) zero(c.dp + k * c.ld, c.ld);
  return there;
}

// An outer sum over the rows of a chunk; rows of dw are split over the threads.
template <class F> static void weight_grad(const Pool& pool, int64_t M, const OuterSum<F>& s) {
  split(pool, M, M * s.N * s.K, [&](int64_t m0, int64_t m1) {
    if (s.db) column_sums(s.K, m1 - m0, s.g + m0, s.ldg, s.db + m0);
    if (s.dw.whole) return outer_sum_tiled(s, m0, m1, s.dw.whole);
    if (narrow<F>(s.N)) return outer_sum_narrow(s, m0, m1);
#if FR_DOTS
    if constexpr (on_tiles<F>)
      if (s.K >= tile_k / 2) return outer_sum_on_tiles(s, m0, m1);  // fewer rows fill no tile
#endif
    outer_sum_tiled(s, m0, m1, s.dw.real);
  });
}

// dx of a chunk: 0 where a row does not take part, whatever the weights hold.
template <class F>
static void input_grad(const Sequence<F>& q, const Chunk<F>& c, const F* dp, const PackedMatrix<F>& w, int64_t GH,
                       F* dx) {
  split(q.pool, c.rows, c.rows * GH * q.I, [&](int64_t k0, int64_t k1) {
    const Scratch<const F*> a(k1 - k0);
    const Scratch<F*> out(k1 - k0);
    int64_t count = 0;
    for (int64_t k = k0; k < k1; ++k) {
      F* to = dx + (c.t0 * q.B + k) * q.I;
      if (c.x[k])
        a.get()[count] = dp + k * c.ld, out.get()[count++] = to;
      else
        zero(to, q.I);
    }
    w.multiply(count, a.get(), out.get());
  });
}

}  // namespace FR_ISA
}  // namespace fr
