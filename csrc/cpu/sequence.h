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
template <class From, class To> static void convert(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; i += Vec<Real<To>>::width) store(load(from + i, n - i), to + i, n - i);
}
template <class F> static void zero(F* to, int64_t n) {
  if (n > 0) __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(F));
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

// run_split for a function object.
template <class Fn> static void split(const Pool& pool, int64_t n, int64_t multiply_adds, const Fn& fn) {
  run_split(pool, n, multiply_adds, &fn,
            [](int64_t begin, int64_t end, const void* ctx) { (*static_cast<const Fn*>(ctx))(begin, end); });
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

// ---- weights as panels

// w (N, K) or its transpose, packed for `multiply`: out[m] (N,) = w a[m] for rows given by their addresses.
template <class S> class PackedMatrix {
  using F = Real<S>;

 public:
  PackedMatrix(int64_t K, int64_t N)
      : K_(K),
        N_(N),
        NV_(N > 2 * Vec<F>::width ? 4
            : N > Vec<F>::width   ? 2
                                  : 1),
        panels_((N + NV_ * Vec<F>::width - 1) / (NV_ * Vec<F>::width)),
        data_(panels_ * K * NV_ * Vec<F>::width) {}
  // One lane a row of w (N, K).
  void pack_rows(const Pool& pool, const S* w) {
    split(pool, panels_, N_ * K_, [this, w](int64_t p0, int64_t p1) {
      const auto row_of = [this](int64_t p, int64_t n, int64_t lane) {
        const int64_t row = (p * NV_ + n) * Vec<F>::width + lane;
        return row < N_ ? row : -1;
      };
      pack_panels(w, K_, p0, p1, NV_, row_of, data_.get());
    });
  }
  // One lane a column of w (K, N), whose rows are taken from `first` on, in a circle.
  void pack_transposed(const Pool& pool, const S* w, int64_t first = 0) {
    split(pool, panels_, N_ * K_,
          [this, w, first](int64_t p0, int64_t p1) { pack_columns(w, K_, N_, first, p0, p1, NV_, data_.get()); });
  }
  template <class O> void multiply(int64_t rows, const S* const* a, O* const* out) const {
    switch (NV_) {
      case 4: return each_tile<4>(panels_, rows, RowProduct<S, O, 4>{data_.get(), K_, N_, panels_, a, out});
      case 2: return each_tile<2>(panels_, rows, RowProduct<S, O, 2>{data_.get(), K_, N_, panels_, a, out});
      default: return each_tile<1>(panels_, rows, RowProduct<S, O, 1>{data_.get(), K_, N_, panels_, a, out});
    }
  }

 private:
  int64_t K_, N_, NV_, panels_;
  Scratch<F> data_;
};

// The weights of a forward pass. A panel holds PV vectors: the same units of G gates, or 4 vectors of units where there
// is one gate. `bias` is what the sums start from, `bias_n` the start of W_hn h in a GRU.
template <class S, int G> struct CellWeights {
  using F = Real<S>;
  static constexpr int PV = G == 1 ? 4 : G;
  static constexpr int64_t W = Vec<F>::width, units = G == 1 ? 4 * W : W;
  const Sequence<S>& q;
  const int64_t panels;
  const Scratch<F> w_ih, w_hh, bias, bias_n;

  explicit CellWeights(const Sequence<S>& q)
      : q(q),
        panels((q.H + units - 1) / units),
        w_ih(panels * PV * W * q.I),
        w_hh(panels * PV * W * q.P),
        bias(panels * PV * W),
        bias_n(G == 3 ? panels * W : 0) {
    split(q.pool, panels, panels * PV * W * (q.I + q.P), [this](int64_t p0, int64_t p1) { pack(p0, p1); });
  }

 private:
  void pack(int64_t p0, int64_t p1) const {
    const int64_t H = q.H;
    const auto row_of = [=](int64_t p, int64_t n, int64_t lane) {
      const int64_t unit = G == 1 ? (p * PV + n) * W + lane : p * W + lane;
      return unit < H ? (G == 1 ? unit : n * H + unit) : -1;
    };
    pack_panels(q.w_ih, q.I, p0, p1, PV, row_of, w_ih.get());
    pack_panels(q.w_hh, q.P, p0, p1, PV, row_of, w_hh.get());
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t n = 0; n < PV; ++n)
        for (int64_t lane = 0; lane < W; ++lane) {
          const int64_t row = row_of(p, n, lane);
          const F b_ih = row >= 0 && q.b_ih ? widen(q.b_ih[row]) : F(0);
          const F b_hh = row >= 0 && q.b_hh ? widen(q.b_hh[row]) : F(0);
          const bool apart = G == 3 && n == 2;
          bias.get()[(p * PV + n) * W + lane] = apart ? b_ih : b_ih + b_hh;
          if (apart) bias_n.get()[p * W + lane] = b_hh;
        }
  }
};

// ---- forward

// gx = bias + W_ih x of rows given by their addresses; gx: [panel][row][vector].
template <class S, int G> struct InputTile {
  using F = Real<S>;
  const CellWeights<S, G>& w;
  const S* const* x;
  F* gx;
  int64_t rows;
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<F>;
    constexpr int PV = CellWeights<S, G>::PV;
    V acc[MR][PV];
    const S* a[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      a[i] = x[m + i];
#pragma GCC unroll 8
      for (int n = 0; n < PV; ++n) acc[i][n] = V::load(w.bias.get() + (p * PV + n) * V::width);
    }
    panel_product<F, MR, 1, PV>(w.w_ih.get() + p * w.q.I * PV * V::width, 0, a, w.q.I, acc,
                                next_panel<F, MR, PV>(w.w_ih.get(), w.panels, w.q.I, p, m));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int n = 0; n < PV; ++n) acc[i][n].store(gx + ((p * rows + m + i) * PV + n) * V::width);
  }
};

// One step of some rows, as the tiles of a cell see it: rows m < count with their numbers in the batch, the h each
// starts from and its part of gx.
template <class S> struct Step {
  int64_t t, count;
  const int64_t* b;
  const S* const* h;
  const Real<S>* gx;     // of this step
  int64_t panel_stride;  // of gx, in elements
  const int64_t* place;  // of row m within gx
};

// Runs the steps of the rows b0 .. b1: cell.step(Step) computes the rows that take part, cell.skip(t, b) writes what
// the others leave. `y` holds every step's h, which the next step reads.
template <class S, int G, class Cell>
static void forward_block(const CellWeights<S, G>& w, int64_t b0, int64_t b1, const S* y, const Cell& cell) {
  using F = Real<S>;
  constexpr int64_t cache_bytes = 512 * 1024;  // what gx may take of a core's own cache
  const Sequence<S>& q = w.q;
  const int64_t rows = b1 - b0, row_elements = CellWeights<S, G>::PV * Vec<F>::width;
  const int64_t fit = cache_bytes / (rows * w.panels * row_elements * static_cast<int64_t>(sizeof(F)));
  const int64_t chunk = fit < 1 ? 1 : fit < q.T ? fit : q.T;
  const Scratch<F> gx(chunk * rows * w.panels * row_elements);
  const Scratch<S> zeros(q.P);
  const Scratch<const S*> x(chunk * rows), h(rows);
  const Scratch<int64_t> b_of(rows), place(rows);
  zero(zeros.get(), q.P);
  int64_t chunk_rows = 0;
  for (int64_t s = 0; s < q.T; ++s) {
    if (s % chunk == 0) {
      chunk_rows = ((s + chunk < q.T ? s + chunk : q.T) - s) * rows;
      for (int64_t r = 0; r < chunk_rows; ++r)
        x.get()[r] = q.x + (time_of(q, s + r / rows) * q.B + b0 + r % rows) * q.I;
      each_tile<CellWeights<S, G>::PV>(w.panels, chunk_rows, InputTile<S, G>{w, x.get(), gx.get(), chunk_rows});
    }
    const int64_t t = time_of(q, s);
    int64_t count = 0;
    for (int64_t b = b0; b < b1; ++b) {
      if (!takes_part(q, t, b)) {
        cell.skip(t, b);
        continue;
      }
      const S* before = state_before(q, s, b, q.h0, y, q.P);
      b_of.get()[count] = b, place.get()[count] = b - b0, h.get()[count++] = before ? before : zeros.get();
    }
    cell.step(Step<S>{t, count, b_of.get(), h.get(), gx.get() + (s % chunk) * rows * row_elements,
                      chunk_rows * row_elements, place.get()});
  }
}

// The rows b0 .. b1 in blocks whose gx and state stay in a core's own cache.
template <class S, int G, class Cell>
static void forward_rows(const CellWeights<S, G>& w, int64_t b0, int64_t b1, const S* y, const Cell& cell) {
  constexpr int64_t cache_bytes = 512 * 1024, least = 64;
  const int64_t most = cache_bytes / (w.panels * CellWeights<S, G>::PV * static_cast<int64_t>(FR_VEC_BYTES));
  const int64_t blocks = (b1 - b0 + (most > least ? most : least) - 1) / (most > least ? most : least);
  for (int64_t i = 0; i < blocks; ++i)
    forward_block(w, b0 + (b1 - b0) * i / blocks, b0 + (b1 - b0) * (i + 1) / blocks, y, cell);
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
  constexpr int64_t enough_rows = 512;
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
    narrow ? outer_sum_narrow(s, m0, m1) : outer_sum_tiled(s, m0, m1);
    if (s.db) column_sums(s.K, m1 - m0, s.g + m0, s.ldg, s.db + m0);
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
