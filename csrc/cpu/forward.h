// The forward pass that the three cells share: what a step of some rows is, the steps of a sequence on packed weights,
// and a step by itself. Compiled once per instruction set, by each_isa.h.

namespace fr {
namespace FR_ISA {

// One step of some rows, as the tiles of a cell see it: rows m < count with their numbers in the batch, the h each
// starts from and its part of gx.
template <class S, int G> struct Step {
  int64_t t, count;
  const int64_t* b;
  const S* const* h;
  int64_t p0, p1;                // the panels to compute
  const CellMatrix<S, G>* w_hh;  // of those panels, or null: gx has the products with h
  const Real<S>* gx;             // of this step and those panels
  int64_t panel_stride;          // of gx, in elements
  const int64_t* place;          // of row m within gx

  // acc += W_hh h for the rows m .. m + MR and panel p.
  template <int MR>
  FR_INLINE void multiply(int64_t p, int64_t m, const S* const (&rows)[MR],
                          Vec<Real<S>> (&acc)[MR][CellWeights<S, G>::PV]) const {
    if (w_hh) w_hh->multiply(p - p0, m, count, rows, acc);
  }
};

// Steps of so many rows whose gx may stay in a core's own cache.
template <class S, int G> static int64_t steps_at_once(const Sequence<S>& q, int64_t rows, int64_t panels) {
  constexpr int64_t cache_bytes = 512 * 1024;
  const int64_t row_bytes = panels * Products<S, G>::row_elements * static_cast<int64_t>(sizeof(Real<S>));
  const int64_t fit = cache_bytes / (rows * row_bytes);
  return fit < 1 ? 1 : fit < q.T ? fit : q.T;
}

// What is used often enough to be packed ahead, by the rows of a block; measured (bench/results/short.csv). One row's
// products wait for weights from beyond the core's own caches, and hide many transpositions.
template <class S, int G> static PackedAhead worth_packing(const Sequence<S>& q, int64_t rows) {
  constexpr int64_t cache_bytes = 2 * 1024 * 1024, uses_ih = 3, uses_hh = 4, row_uses_hh = 24;
  const int64_t blocks = (q.B + rows - 1) / rows, chunk = steps_at_once<S, G>(q, rows, CellWeights<S, G>::panels_of(q));
  const bool far = G * q.H * q.P * static_cast<int64_t>(sizeof(S)) > cache_bytes;
  return {(q.T + chunk - 1) / chunk * blocks > uses_ih, q.T * blocks > uses_hh && !(far && q.T * q.B <= row_uses_hh)};
}

// Runs the steps of the rows b0 .. b1 for the panels of w: cell.step(Step) computes the rows that take part,
// cell.skip(t, b) writes what the others leave. `y` holds every step's h, which the next step reads.
template <class S, int G, class Cell>
static void forward_block(const CellWeights<S, G>& w, int64_t b0, int64_t b1, const S* y, const Cell& cell) {
  using F = Real<S>;
  const Sequence<S>& q = w.q;
  const int64_t rows = b1 - b0, panels = w.p1 - w.p0, row_elements = Products<S, G>::row_elements;
  const int64_t chunk = steps_at_once<S, G>(q, rows, panels);
  const Scratch<F> gx(chunk * rows * panels * row_elements);
  const Scratch<S> zeros(q.P);
  const Scratch<const S*> x(chunk * rows), h(rows), all_h(rows);
  const Scratch<int64_t> b_of(rows), place(rows);
  zero(zeros.get(), q.P);
  const int64_t I = w.ahead.ih ? 0 : q.I, P = w.ahead.hh ? 0 : q.P;
  const Scratch<F> room(on_tiles<S> ? 0 : CellWeights<S, G>::PV * Vec<F>::width * (I > P ? I : P));
  const CellMatrix<S, G> w_ih{w, q.w_ih, q.I, w.w_ih.get(), w.tiles_ih.get(), room.get()};
  const CellMatrix<S, G> w_hh{w, q.w_hh, q.P, w.w_hh.get(), w.tiles_hh.get(), room.get()};
  const Products<S, G> products{w, w_ih};
  int64_t chunk_rows = 0;
  for (int64_t s = 0; s < q.T; ++s) {
    if (s % chunk == 0) {
      chunk_rows = ((s + chunk < q.T ? s + chunk : q.T) - s) * rows;
      for (int64_t r = 0; r < chunk_rows; ++r)
        x.get()[r] = q.x + (time_of(q, s + r / rows) * q.B + b0 + r % rows) * q.I;
      products.input(chunk_rows, x.get(), gx.get());
    }
    const int64_t t = time_of(q, s), panel_stride = chunk_rows * row_elements;
    F* gx_now = gx.get() + (s % chunk) * rows * row_elements;
    int64_t count = 0;
    for (int64_t b = b0; b < b1; ++b) {
      const bool there = takes_part(q, t, b);
      const S* before = there ? state_before(q, s, b, q.h0, y, q.P) : nullptr;
      all_h.get()[b - b0] = before ? before : zeros.get();
      if (there)
        b_of.get()[count] = b, place.get()[count] = b - b0, h.get()[count++] = all_h.get()[b - b0];
      else if (w.p0 == 0)
        cell.skip(t, b);
    }
    products.hidden(rows, all_h.get(), gx_now, panel_stride);
    cell.step(Step<S, G>{t, count, b_of.get(), h.get(), w.p0, w.p1, sums_on_tiles<S> ? nullptr : &w_hh, gx_now,
                         panel_stride, place.get()});
  }
}

// ---- a step by itself: packing the weights takes longer than one use, so they are read as they lie, but for matrix
// tiles. A sum runs along k in the lanes of a vector, which are added at the end; it does not depend on the number of
// rows.

// sum[m][l] += w[l][k] a[m][k], lane by lane along k.
// Owns:   MR x N sums, as vectors of partial sums.
// Keeps:  MR * N accumulators: enough chains of multiply-adds to fill the units; N addresses, which registers hold too.
// Moves:  N * K elements of w, MR * K of a.
// Syncs:  nothing.
// Limits: none.
template <int MR, int N, class S>
FR_INLINE void add_products(const S* const* w, const S* const* a, int64_t K, Vec<Real<S>> (&sum)[MR][N]) {
  const auto add = [&](int64_t k, auto... left) {
    Neighbours<S> av[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) av[m] = neighbours(a[m] + k, left...);
#pragma GCC unroll 8
    for (int l = 0; l < N; ++l) {
      const Neighbours<S> wv = neighbours(w[l] + k, left...);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[m][l] = fma(av[m], wv, sum[m][l]);
    }
  };
  int64_t k = 0;
  for (; k + neighbour_count<S> <= K; k += neighbour_count<S>) add(k);
  if (k < K) add(k, K - k);
}

// One vector of a panel's sums: W rows of w_ih (I elements) and of w_hh (P elements).
template <class S> struct StepRows {
  const S *w_ih[Vec<Real<S>>::width], *w_hh[Vec<Real<S>>::width];
  int64_t I, P;
};

// to[m * stride] += W_ih x + W_hh h for MR rows given by their addresses.
template <int MR, class S>
static void add_step_products(const StepRows<S>& w, const S* const* x, const S* const* h, Real<S>* to, int64_t stride) {
  using V = Vec<Real<S>>;
  constexpr int W = V::width, N = W < 8 ? W : 8;
  V parts[MR][W / N];
#pragma GCC unroll 2
  for (int part = 0; part < W / N; ++part) {
    V sum[MR][N];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int l = 0; l < N; ++l) sum[m][l] = V(0);
    add_products<MR, N>(w.w_ih + part * N, x, w.I, sum);
    add_products<MR, N>(w.w_hh + part * N, h, w.P, sum);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) parts[m][part] = lane_sums(sum[m]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    V total = parts[m][0];
    if constexpr (W > N) total = fold<N>(total, parts[m][W / N - 1]);
    (load(to + m * stride) + total).store(to + m * stride);
  }
}

// Vector n of the sums of panel p for all rows; the last two vectors of a GRU have one product each.
template <class S, int G>
static void add_step_products(const Sequence<S>& q, int64_t p, int64_t n, int64_t rows, const S* const* x,
                              const S* const* h, Real<S>* to, int64_t stride) {
  constexpr int MR = FR_VEC_BYTES == 64 ? 2 : 1;
  StepRows<S> w;
  w.I = G == 3 && n == 3 ? 0 : q.I, w.P = G == 3 && n == 2 ? 0 : q.P;
  for (int64_t lane = 0; lane < Vec<Real<S>>::width; ++lane) {
    const int64_t row = CellWeights<S, G>::row(q, p, G == 3 && n == 3 ? 2 : n, lane);
    w.w_ih[lane] = q.w_ih + (row < 0 ? 0 : row) * q.I, w.w_hh[lane] = q.w_hh + (row < 0 ? 0 : row) * q.P;
  }
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) add_step_products<MR>(w, x + m, h + m, to + m * stride, stride);
  if constexpr (MR > 1)
    if (m < rows) add_step_products<1>(w, x + m, h + m, to + m * stride, stride);
}

// The only step of a sequence, for the panels p0 .. p1 and all rows; `cell` as for forward_block.
template <class S, int G, class Cell>
static void forward_step(const Sequence<S>& q, int64_t p0, int64_t p1, const Cell& cell) {
  using Weights = CellWeights<S, G>;
  constexpr int64_t width = Weights::sums * Vec<Real<S>>::width;
  const Scratch<Real<S>> gx(q.B * width);
  const Scratch<S> zeros(q.P);
  const Scratch<const S*> x(q.B), h(q.B);
  const Scratch<int64_t> b_of(q.B), place(q.B);
  zero(zeros.get(), q.P);
  int64_t count = 0;
  for (int64_t b = 0; b < q.B; ++b) {
    if (!takes_part(q, 0, b)) {
      if (p0 == 0) cell.skip(0, b);
      continue;
    }
    b_of.get()[count] = b, place.get()[count] = count, x.get()[count] = q.x + b * q.I;
    h.get()[count++] = is_reset(q, 0, b) ? zeros.get() : q.h0 + b * q.P;
  }
  for (int64_t p = p0; p < p1; ++p) {
    if (count) Weights::starts(q, p, gx.get());
    for (int64_t m = 1; m < count; ++m) copy(gx.get(), width, gx.get() + m * width);
    for (int64_t n = 0; n < Weights::sums; ++n)
      add_step_products<S, G>(q, p, n, count, x.get(), h.get(), gx.get() + n * Vec<Real<S>>::width, width);
    cell.step(Step<S, G>{0, count, b_of.get(), h.get(), p, p + 1, nullptr, gx.get(), 0, place.get()});
  }
}

// ---- either

// All steps of all rows, split over the threads; the rows of a thread in blocks whose gx and state stay in a core's own
// cache. A single step splits the panels instead: it reads the weights as they lie, or packs a panel for the matrix
// tiles and uses it while it is in cache.
template <class S, int G, class Cell>
static void forward_steps(const Sequence<S>& q, int64_t multiply_adds, const S* y, const Cell& cell) {
  constexpr int64_t cache_bytes = 512 * 1024, least = 64;
  const int64_t panels = CellWeights<S, G>::panels_of(q);
  const int64_t fit = cache_bytes / (panels * CellWeights<S, G>::sums * static_cast<int64_t>(FR_VEC_BYTES));
  const int64_t most = fit > least ? fit : least;
  const auto blocks = [&](const CellWeights<S, G>& w, int64_t b0, int64_t b1) {
    const int64_t count = (b1 - b0 + most - 1) / most;
    for (int64_t i = 0; i < count; ++i)
      forward_block(w, b0 + (b1 - b0) * i / count, b0 + (b1 - b0) * (i + 1) / count, y, cell);
  };
  if (q.T != 1) {
    if (q.T * q.B == 0) return;
    const int64_t share = (q.B + q.pool.threads - 1) / q.pool.threads;  // of a thread
    const CellWeights<S, G> w(q, 0, panels, worth_packing<S, G>(q, share < most ? share : most));
    return split(q.pool, q.B, multiply_adds, [&](int64_t b0, int64_t b1) { blocks(w, b0, b1); });
  }
  split(q.pool, panels, multiply_adds, [&](int64_t p0, int64_t p1) {
    if constexpr (sums_on_tiles<S>)
      for (int64_t p = p0; p < p1; ++p) blocks(CellWeights<S, G>(q, p, p + 1, {true, true}), 0, q.B);
    else
      forward_step<S, G>(q, p0, p1, cell);
  });
}

}  // namespace FR_ISA
}  // namespace fr
