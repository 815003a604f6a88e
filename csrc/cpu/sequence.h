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

// Real numbers that become an output of S: the output itself, or scratch that `finish` rounds into it.
template <class S> class Accumulator {
 public:
  using F = Real<S>;
  Accumulator(S* out, int64_t n) : out_(out), n_(out ? n : 0), own_(same ? 0 : n_) {}
  F* get() const {
    if constexpr (same)
      return out_;
    else
      return own_.get();
  }
  void start(const S* from) const { convert(from, n_, get()); }
  void start() const { zero(get(), n_); }
  void finish() const {
    if constexpr (!same) convert(own_.get(), n_, out_);
  }

 private:
  static constexpr bool same = sizeof(S) == sizeof(F);
  S* out_;
  int64_t n_;
  Scratch<F> own_;
};

// ---- forward

// One step of some rows, as the tiles of a cell see it: rows m < count with their numbers in the batch, the h each
// starts from and its part of gx.
template <class S> struct Step {
  int64_t t, count;
  int64_t K;  // elements of h that are still to be multiplied: P, or 0 where gx has them all
  const int64_t* b;
  const S* const* h;
  int64_t p0, p1;        // the panels to compute
  const Real<S>* w_hh;   // of those panels
  const Real<S>* gx;     // of this step and those panels
  int64_t panel_stride;  // of gx, in elements
  const int64_t* place;  // of row m within gx
};

// Runs the steps of the rows b0 .. b1 for the panels of w: cell.step(Step) computes the rows that take part,
// cell.skip(t, b) writes what the others leave. `y` holds every step's h, which the next step reads.
template <class S, int G, class Cell>
static void forward_block(const CellWeights<S, G>& w, int64_t b0, int64_t b1, const S* y, const Cell& cell) {
  using F = Real<S>;
  constexpr int64_t cache_bytes = 512 * 1024;  // what gx may take of a core's own cache
  const Sequence<S>& q = w.q;
  const int64_t rows = b1 - b0, panels = w.p1 - w.p0, row_elements = Products<S, G>::row_elements;
  const int64_t fit = cache_bytes / (rows * panels * row_elements * static_cast<int64_t>(sizeof(F)));
  const int64_t chunk = fit < 1 ? 1 : fit < q.T ? fit : q.T;
  const Scratch<F> gx(chunk * rows * panels * row_elements);
  const Scratch<S> zeros(q.P);
  const Scratch<const S*> x(chunk * rows), h(rows), all_h(rows);
  const Scratch<int64_t> b_of(rows), place(rows);
  zero(zeros.get(), q.P);
  const Products<S, G> products{w};
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
    cell.step(Step<S>{t, count, on_tiles<S> ? 0 : q.P, b_of.get(), h.get(), w.p0, w.p1, w.w_hh.get(), gx_now,
                      panel_stride, place.get()});
  }
}

// All steps of all rows, split over the threads; the rows of a thread in blocks whose gx and state stay in a core's own
// cache.
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
  if (q.T > 1) {
    const CellWeights<S, G> w(q, 0, panels);
    split(q.pool, q.B, multiply_adds, [&](int64_t b0, int64_t b1) { blocks(w, b0, b1); });
  } else {  // each panel is packed for one use, and used while it is in cache
    split(q.pool, panels, multiply_adds, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; ++p) blocks(CellWeights<S, G>(q, p, p + 1), 0, q.B);
    });
  }
}

// ---- backward

// The rows of some steps at once, in the order of time: row (t - t0) * B + b. What the steps leave for the gradients of
// the weights; where a row does not take part dp is 0 and the addresses are null.
template <class F> struct Chunk {
  int64_t s0, s1, t0, rows;
  F* dp;        // gradients of the pre-activations, row stride ld
  int64_t ld;   // a multiple of a cache line, but of no large power of two: tiles read down the columns
  const F** x;  // the inputs of each row
  const F** h;  // the h each row started from, or null after a reset
  FR_INLINE int64_t at(int64_t t, int64_t b, int64_t B) const { return (t - t0) * B + b; }
};

FR_INLINE int64_t padded_stride(int64_t n) { return round_up(n, 32) + 16; }

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
    const Chunk<F> c{s0, s1, q.reverse ? q.T - s1 : s0, (s1 - s0) * q.B, dp.get(), ld, x.get(), h.get()};
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
  const bool narrow = s.N * 2 <= Vec<Real<F>>::width;
  split(pool, M, M * s.N * s.K, [&](int64_t m0, int64_t m1) {
    if (s.db) column_sums(s.K, m1 - m0, s.g + m0, s.ldg, s.db + m0);
#if FR_AMX
    if constexpr (on_tiles<F>)
      if (!narrow) return outer_sum_on_tiles(s, m0, m1);
#endif
    narrow ? outer_sum_narrow(s, m0, m1) : outer_sum_tiled(s, m0, m1);
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
