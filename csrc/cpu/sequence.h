// What the three cells share around their equations: the order of steps, which rows take part, the products with the
// weights. Compiled once per instruction set, by each_isa.h.

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

template <class F> static void copy(const F* from, int64_t n, F* to) {
  if (n > 0) __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(F));
}
template <class F> static void zero(F* to, int64_t n) {
  if (n > 0) __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(F));
}

// The state that step s of row b started from, for the backward pass: a row of `initial` or of `steps`, the outputs of
// the forward pass (`width` elements a row), or null after a reset, when it was 0. Row b takes part in step s.
template <class F>
static const F* state_before(const Sequence<F>& q, int64_t s, int64_t b, const F* initial, const F* steps,
                             int64_t width) {
  if (is_reset(q, time_of(q, s), b)) return nullptr;
  if (s == 0 || !takes_part(q, time_of(q, s - 1), b)) return initial + b * width;
  return steps + (time_of(q, s - 1) * q.B + b) * width;
}

// Zeroes the states (width elements a row) of the rows b0 .. b1 that are reset before time t.
template <class F>
static void apply_reset(const Sequence<F>& q, int64_t t, int64_t b0, int64_t b1, F* state, int64_t width) {
  if (!q.reset) return;
  for (int64_t b = b0; b < b1; ++b)
    if (is_reset(q, t, b) && takes_part(q, t, b)) zero(state + b * width, width);
}

// How many steps' inputs one product takes: enough rows to use the weights well, few enough to stay in cache.
template <class F> static int64_t steps_per_chunk(const Sequence<F>& q, int64_t rows) {
  constexpr int64_t enough_rows = 48;
  const int64_t steps = (enough_rows + rows - 1) / rows;
  return steps < q.T ? steps : q.T;
}

// out[(s - s0) * rows + b - b0] (GH,) = x w_ih^T + bias for the steps s0 .. s1 and the rows b0 .. b1.
template <class F>
static void input_product(const Sequence<F>& q, int64_t GH, int64_t s0, int64_t s1, int64_t b0, int64_t b1,
                          const F* bias, F* out) {
  const int64_t rows = b1 - b0, step = q.B * q.I;
  const F* first = q.x + time_of(q, s0) * step + b0 * q.I;
  const Rows<const F> x{first, q.I, rows, q.reverse ? -step : step};
  dot_gemm<F>((s1 - s0) * rows, GH, q.I, x, q.w_ih, Onto::bias, bias, dense_rows(out, GH));
}

// bias = b_ih + b_hh; null where the cell has neither
template <class F> static const F* sum_of_biases(const Sequence<F>& q, int64_t n, F* out) {
  if (!q.b_ih && !q.b_hh) return nullptr;
  for (int64_t j = 0; j < n; ++j) out[j] = (q.b_ih ? q.b_ih[j] : F(0)) + (q.b_hh ? q.b_hh[j] : F(0));
  return out;
}

// d (M, N) = g (M, K) w, w (K, N) dense, over all the threads of the pool: rows are split.
template <class F> struct RowProduct {
  int64_t N, K;
  const F* g;
  int64_t ldg;
  const F* w;
  bool add;
  F* d;
};
template <class F> static void row_product_part(int64_t m0, int64_t m1, const void* ctx) {
  const RowProduct<F>& p = *static_cast<const RowProduct<F>*>(ctx);
  outer_gemm<F>(m1 - m0, p.N, p.K, {p.g + m0 * p.ldg, p.ldg, 1}, p.w, p.N, p.add, p.d + m0 * p.N, p.N);
}
template <class F> static void row_product(const Pool& pool, int64_t M, const RowProduct<F>& p) {
  run_split(pool, M, M * p.N * p.K, &p, row_product_part<F>);
}

// dw (M, N) = g^T a over K rows: g (K, M) with row stride ldg, a (K, N) dense; db (M,) = the column sums of g, or null.
// Rows of dw are split over the threads of the pool; every element sums all of K in one order.
template <class F> struct WeightGrad {
  int64_t N, K;
  const F* g;
  int64_t ldg;
  const F* a;
  F* dw;
  F* db;
};
template <class F> static void weight_grad_part(int64_t m0, int64_t m1, const void* ctx) {
  const WeightGrad<F>& p = *static_cast<const WeightGrad<F>*>(ctx);
  outer_gemm<F>(m1 - m0, p.N, p.K, {p.g + m0, 1, p.ldg}, p.a, p.N, false, p.dw + m0 * p.N, p.N);
  if (p.db) column_sums<F>(p.K, m1 - m0, p.g + m0, p.ldg, p.db + m0);
}
template <class F> static void weight_grad(const Pool& pool, int64_t M, const WeightGrad<F>& p) {
  run_split(pool, M, M * p.N * p.K, &p, weight_grad_part<F>);
}

// Backward's last part: dx = dg w_ih and dw_ih = dg^T x, db. dg (T*B, GH) with row stride ldg is 0 where a row does not
// take part; what x, w_ih and dx hold there must not matter even when it is not finite.
template <class F>
static void input_grads(const Sequence<F>& q, int64_t GH, const F* dg, int64_t ldg, F* dx, F* dw_ih, F* db) {
  const int64_t rows = q.T * q.B;
  row_product<F>(q.pool, rows, {q.I, GH, dg, ldg, q.w_ih, false, dx});
  const Scratch<F> used(q.lengths ? rows * q.I : 0);
  const F* x = q.x;
  if (q.lengths) {
    for (int64_t t = 0; t < q.T; ++t)
      for (int64_t b = 0; b < q.B; ++b) {
        const int64_t at = (t * q.B + b) * q.I;
        if (takes_part(q, t, b)) {
          copy(q.x + at, q.I, used.get() + at);
        } else {
          zero(used.get() + at, q.I);
          zero(dx + at, q.I);
        }
      }
    x = used.get();
  }
  weight_grad<F>(q.pool, GH, {q.I, rows, dg, ldg, x, dw_ih, db});
}

}  // namespace FR_ISA
}  // namespace fr
