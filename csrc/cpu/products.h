// The products of the cells with their weights, on panels or on tiles. Compiled once per instruction set, by
// each_isa.h.

namespace fr {
namespace FR_ISA {

template <class F> static void copy(const F* from, int64_t n, F* to) {
  if (n > 0) __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(F));
}
template <class From, class To> static void convert(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; i += Vec<Real<To>>::width) store(load(from + i, n - i), to + i, n - i);
}
template <class F> static void zero(F* to, int64_t n) {
  if (n > 0) __builtin_memset(to, 0, static_cast<size_t>(n) * sizeof(F));
}

// run_split for a function object.
template <class Fn> static void split(const Pool& pool, int64_t n, int64_t multiply_adds, const Fn& fn) {
  run_split(pool, n, multiply_adds, &fn,
            [](int64_t begin, int64_t end, const void* ctx) { (*static_cast<const Fn*>(ctx))(begin, end); });
}

// sums[m] (ld,) += a[m] w for MR rows and `count` links: a (MR, in_place_links) and rows w of N elements.
constexpr int64_t in_place_links = 8;
template <int MR, class S>
static void add_links(const S* const* w, int64_t count, int64_t N, const Real<S>* a, Real<S>* sums, int64_t ld) {
  using V = Vec<Real<S>>;
  for (int64_t n = 0; n < N; n += V::width) {
    V sum[MR];
    const auto add = [&](int64_t i, V wv) {
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[m] = fma(V(a[m * in_place_links + i]), wv, sum[m]);
    };
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) sum[m] = load(sums + m * ld + n);
    if (count == in_place_links && n + V::width <= N) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < in_place_links; ++i) add(i, load(w[i] + n));
    } else {
      for (int64_t i = 0; i < count; ++i) add(i, load(w[i] + n, N - n));
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) store(sum[m], sums + m * ld + n);
  }
}

// out[m] (N,) = a[m] (K,) w for rows given by their addresses and w (K, N) as it lies, whose rows are taken from
// `first` on, in a circle. Each sum is the chain of RowProduct; so many links at a time that the rows of w stay in the
// nearest cache for all rows of a.
//
// Owns:   out.
// Keeps:  a vector of sums of up to four rows over a block of k; all others in memory.
// Moves:  w once; the sums once for each block.
// Syncs:  nothing.
// Limits: none.
template <class S, class O>
static void multiply_in_place(const S* w, int64_t K, int64_t N, int64_t first, int64_t rows, const S* const* a,
                              O* const* out) {
  using F = Real<S>;
  const int64_t ld = round_up(N, Vec<F>::width);
  const Scratch<F> sums(rows * ld), links(rows * in_place_links);
  zero(sums.get(), rows * ld);
  const S* w_of[in_place_links];
  for (int64_t k = 0; k < K; k += in_place_links) {
    const int64_t count = K - k < in_place_links ? K - k : in_place_links;
    for (int64_t i = 0; i < count; ++i) w_of[i] = w + (k + i + first < K ? k + i + first : k + i + first - K) * N;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < count; ++i) links.get()[m * in_place_links + i] = widen(a[m][k + i]);
    int64_t m = 0;
    const auto add = [&](auto some) {
      constexpr int MR = decltype(some)::value;
      for (; m + MR <= rows; m += MR)
        add_links<MR>(w_of, count, N, links.get() + m * in_place_links, sums.get() + m * ld, ld);
    };
    add(std::integral_constant<int, 4>{}), add(std::integral_constant<int, 2>{}), add(std::integral_constant<int, 1>{});
  }
  for (int64_t m = 0; m < rows; ++m) convert(sums.get() + m * ld, N, out[m]);
}

// w (N, K) or its transpose, packed for `multiply`: out[m] (N,) = w a[m] for rows given by their addresses. With
// `ahead` false nothing is packed and the transpose is read as it lies, which pays for few uses; but for tiles the
// products are the same, bit for bit.
template <class S> class PackedMatrix {
  using F = Real<S>;

 public:
  PackedMatrix(int64_t K, int64_t N, bool ahead = true)
      : K_(K),
        N_(N),
        NV_(vectors_of_panel(N)),
        panels_((N + NV_ * Vec<F>::width - 1) / (NV_ * Vec<F>::width)),
        ahead_(ahead),
        data_(on_tiles<S> || !ahead ? 0 : panels_ * K * NV_ * Vec<F>::width),
        tiles_(on_tiles<S> && ahead ? round_up(N, 16) * round_up(K, 32) : 0) {}
  // One lane a row of w (N, K).
  void pack_rows(const Pool& pool, const S* w) {
#if FR_DOTS
    if constexpr (on_tiles<S>)
      return split(pool, columns(), N_ * K_, [this, w](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c)
          pack_right_rows(w, K_, [&](int64_t lane) { return c * 16 + lane < N_ ? c * 16 + lane : -1; }, tile(c));
      });
#endif
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
    w_ = w, first_ = first;
    if (!ahead_) return;
#if FR_DOTS
    if constexpr (on_tiles<S>)
      return split(pool, columns(), N_ * K_, [this, w, first](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
          const auto row_of = [&](int64_t k) {
            return w + (k + first < K_ ? k + first : k + first - K_) * N_ + c * 16;
          };
          pack_right(K_, N_ - c * 16 < 16 ? N_ - c * 16 : 16, row_of, tile(c));
        }
      });
#endif
    split(pool, panels_, N_ * K_,
          [this, w, first](int64_t p0, int64_t p1) { pack_columns(w, K_, N_, first, p0, p1, NV_, data_.get()); });
  }
  template <class O> void multiply(int64_t rows, const S* const* a, O* const* out) const {
    if (!ahead_) return multiply_in_place(w_, K_, N_, first_, rows, a, out);
#if FR_DOTS
    if constexpr (on_tiles<S>) return multiply_on_tiles(rows, a, out);
#endif
    switch (NV_) {
      case 4: return each_tile<4>(0, panels_, rows, RowProduct<S, O, 4>{data_.get(), K_, N_, panels_, a, out});
      case 3: return each_tile<3>(0, panels_, rows, RowProduct<S, O, 3>{data_.get(), K_, N_, panels_, a, out});
      case 2: return each_tile<2>(0, panels_, rows, RowProduct<S, O, 2>{data_.get(), K_, N_, panels_, a, out});
      default: return each_tile<1>(0, panels_, rows, RowProduct<S, O, 1>{data_.get(), K_, N_, panels_, a, out});
    }
  }

 private:
  // The widest panel among those that pad N least.
  static int64_t vectors_of_panel(int64_t N) {
    int64_t best = 1;
    for (const int64_t NV : {2, 3, 4})
      if (round_up(N, NV * Vec<F>::width) <= round_up(N, best * Vec<F>::width)) best = NV;
    return best;
  }
  int64_t K_, N_, NV_, panels_;
  bool ahead_;
  const S* w_ = nullptr;
  int64_t first_ = 0;
  Scratch<F> data_;
  Scratch<S> tiles_;

#if FR_DOTS
  int64_t columns() const { return (N_ + 15) / 16; }
  S* tile(int64_t column) const { return tiles_.get() + column * tiles_of_k(K_) * tile_elements; }

  template <class O> void multiply_on_tiles(int64_t rows, const S* const* a, O* const* out) const {
    constexpr int64_t at_once = 256;  // so that both factors' tiles stay in a core's own cache
    const int64_t ldc = columns() * 16, most = rows < at_once ? rows : at_once;
    const Scratch<S> left(left_elements(most, K_));
    const Scratch<float> sums(most * ldc);
    for (int64_t m = 0; m < rows; m += at_once) {
      const int64_t count = rows - m < at_once ? rows - m : at_once;
      pack_left(count, a + m, K_, left.get());
      tile_product(
          count, left.get(), tiles_.get(), tiles_of_k(K_), columns(), false,
          [&](int64_t c) { return sums.get() + c * 16; }, ldc);
      for (int64_t i = 0; i < count; ++i) convert(sums.get() + i * ldc, N_, out[m + i]);
    }
  }
#endif
};

// Which matrices of a forward pass are packed as a whole, ahead of their uses. That writes as much as it reads; a
// matrix that is not is transposed at every use. The products are the same, bit for bit.
struct PackedAhead {
  bool ih, hh;
};

// The weights of a forward pass for the panels p0 .. p1. A panel holds PV vectors: the same units of G gates, or 4
// vectors of units where there is one gate. `bias` is what the sums of a panel start from: PV vectors, for a GRU those
// of r, z, n and then of q.
template <class S, int G> struct CellWeights {
  using F = Real<S>;
  static constexpr int PV = G == 1 ? 4 : G, sums = 4;
  static constexpr int64_t W = Vec<F>::width, units = G == 1 ? 4 * W : W;
  static int64_t panels_of(const Sequence<S>& q) { return (q.H + units - 1) / units; }
  // The row of the weights that a lane of vector n of panel p stands for, or -1 beyond the last unit.
  static int64_t row(const Sequence<S>& q, int64_t p, int64_t n, int64_t lane) {
    const int64_t unit = G == 1 ? (p * PV + n) * W + lane : p * W + lane;
    return unit < q.H ? (G == 1 ? unit : n * q.H + unit) : -1;
  }
  // What the sums of panel p start from: (sums, W).
  static void starts(const Sequence<S>& q, int64_t p, F* to) {
    for (int64_t n = 0; n < sums; ++n)
      for (int64_t lane = 0; lane < W; ++lane) {
        const bool n_gate = G == 3 && n == 2, q_part = G == 3 && n == 3;
        const int64_t r = row(q, p, q_part ? 2 : n, lane);
        F sum = r >= 0 && q.b_ih && !q_part ? widen(q.b_ih[r]) : F(0);
        if (r >= 0 && q.b_hh && !n_gate) sum += widen(q.b_hh[r]);
        to[n * W + lane] = sum;
      }
  }

  const Sequence<S>& q;
  const int64_t p0, p1;
  const PackedAhead ahead;
  const Scratch<F> w_ih, w_hh, bias;
  const Scratch<S> tiles_ih, tiles_hh;

  CellWeights(const Sequence<S>& q, int64_t p0, int64_t p1, PackedAhead ahead)
      : q(q),
        p0(p0),
        p1(p1),
        ahead(ahead),
        w_ih(ahead.ih && !on_tiles<S> ? (p1 - p0) * PV * W * q.I : 0),
        w_hh(ahead.hh && !on_tiles<S> ? (p1 - p0) * PV * W * q.P : 0),
        bias((p1 - p0) * sums * W),
        tiles_ih(on_tiles<S> ? (p1 - p0) * PV * W * round_up(q.I, 32) : 0),
        tiles_hh(on_tiles<S> ? (p1 - p0) * PV * W * round_up(q.P, 32) : 0) {
    split(q.pool, p1 - p0, (p1 - p0) * PV * W * (q.I + q.P), [this](int64_t i0, int64_t i1) { pack(i0, i1); });
  }

 private:
  void pack(int64_t i0, int64_t i1) const {  // counted from p0
    const auto row_of = [this](int64_t i, int64_t n, int64_t lane) { return row(q, p0 + i, n, lane); };
#if FR_DOTS
    if constexpr (on_tiles<S>) {
      for (int64_t c = i0 * PV; c < i1 * PV; ++c) {
        const auto row = [&](int64_t lane) { return row_of(c / PV, c % PV, lane); };
        pack_right_rows(q.w_ih, q.I, row, tiles_ih.get() + c * tiles_of_k(q.I) * tile_elements);
        pack_right_rows(q.w_hh, q.P, row, tiles_hh.get() + c * tiles_of_k(q.P) * tile_elements);
      }
    }
#endif
    if constexpr (!on_tiles<S>) {
      if (ahead.ih) pack_panels(q.w_ih, q.I, i0, i1, PV, row_of, w_ih.get());
      if (ahead.hh) pack_panels(q.w_hh, q.P, i0, i1, PV, row_of, w_hh.get());
    }
    for (int64_t i = i0; i < i1; ++i) starts(q, p0 + i, bias.get() + i * sums * W);
  }
};

// One of the two matrices of CellWeights, (G*H, K), as the products of some rows read it: `packed` or in `tiles` as a
// whole or, where both are null, as it lies in w. Then few rows read it in place, and more have `room`, (K, PV, W), for
// a panel at a time.
template <class S, int G> struct CellMatrix {
  using F = Real<S>;
  using Weights = CellWeights<S, G>;
  static constexpr int PV = Weights::PV;
  const Weights& weights;
  const S* w;
  int64_t K;
  const F* packed;
  const S* tiles;
  F* room;

  // acc += a w for the rows m .. m + MR of `rows`, which come in turn, and panel i, counted from the first of
  // `weights`.
  template <int MR>
  FR_INLINE void multiply(int64_t i, int64_t m, int64_t rows, const S* const (&a)[MR], Vec<F> (&acc)[MR][PV]) const {
    const int64_t panels = weights.p1 - weights.p0, panel_elements = K * PV * Weights::W;
#if FR_DOTS
    if constexpr (on_tiles<S>) return multiply_pairs(i, m, a, acc);
#endif
    if (packed)
      return panel_product<F, MR, 1, PV>(packed + i * panel_elements, 0, a, K, acc,
                                         next_panel<F, MR, PV>(packed, panels, K, i, m));
    if (rows == MR) return multiply_in_place(i, a, acc, i + 1 < panels);
    if (m == 0)
      pack_panels(w, K, 0, 1, PV, [&](int64_t p, int64_t n, int64_t lane) { return row(i + p, n, lane); }, room);
    panel_product<F, MR, 1, PV>(room, 0, a, K, acc);
  }

 private:
#if FR_DOTS
  template <int MR>
  FR_INLINE void multiply_pairs(int64_t i, int64_t m, const S* const (&a)[MR], Vec<F> (&acc)[MR][PV]) const {
    constexpr int64_t W = Weights::W;
    const int64_t column = tiles_of_k(K) * tile_k / 2 * W, panels = weights.p1 - weights.p0, share = m / MR;
    const auto* pairs = reinterpret_cast<const Bf16Pair*>(tiles);
    const Bf16Pair *w_now = pairs + i * PV * column, *rows[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) rows[r] = reinterpret_cast<const Bf16Pair*>(a[r]);
    panel_product<F, MR, PV, 1>(w_now, column, rows, K / 2, acc,
                                share < PV ? pairs + ((i + 1 < panels ? i + 1 : 0) * PV + share) * column : nullptr);
    if (K % 2 == 0) return;
    Bf16Pair last[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) last[r] = {a[r][K - 1], {}}, rows[r] = &last[r];
    panel_product<F, MR, PV, 1>(w_now + K / 2 * W, column, rows, 1, acc);
  }
#endif
  int64_t row(int64_t i, int64_t n, int64_t lane) const { return Weights::row(weights.q, weights.p0 + i, n, lane); }
  template <int MR> void multiply_in_place(int64_t i, const S* const (&a)[MR], Vec<F> (&acc)[MR][PV], bool more) const {
    const S* rows[PV][Weights::W];
    for (int64_t n = 0; n < PV; ++n)
      for (int64_t lane = 0; lane < Weights::W; ++lane) {
        const int64_t from = row(i, n, lane);
        rows[n][lane] = w + (from < 0 ? 0 : from) * K;  // of lanes beyond the last unit nothing is kept
      }
    panel_product_in_place<MR, PV>(rows, more ? Weights::units * K : 0, a, K, acc);
  }
};

// gx = bias + W_ih x of rows given by their addresses; gx: [panel][row][vector]; panels are
// counted from the first of the weights here.
template <class S, int G> struct InputTile {
  using F = Real<S>;
  const CellMatrix<S, G>& w_ih;
  const S* const* x;
  F* gx;
  int64_t rows;
  template <int MR> void run(int64_t p, int64_t m) const {
    using V = Vec<F>;
    constexpr int PV = CellWeights<S, G>::PV, sums = CellWeights<S, G>::sums;
    const F* bias = w_ih.weights.bias.get();
    V acc[MR][PV];
    const S* a[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      a[i] = x[m + i];
#pragma GCC unroll 8
      for (int n = 0; n < PV; ++n) acc[i][n] = V::load(bias + (p * sums + n) * V::width);
    }
    w_ih.multiply(p, m, rows, a, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      F* to = gx + (p * rows + m + i) * sums * V::width;
#pragma GCC unroll 8
      for (int n = 0; n < PV; ++n) acc[i][n].store(to + n * V::width);
      if constexpr (PV < sums) V::load(bias + (p * sums + PV) * V::width).store(to + PV * V::width);
    }
  }
};

// The products of a forward pass with gx: W_ih x of a chunk of rows and, where sums are tiles, W_hh h of a step on
// top.
template <class S, int G> struct Products {
  const CellWeights<S, G>& w;
  const CellMatrix<S, G>& w_ih;
  static constexpr int64_t row_elements = CellWeights<S, G>::sums * Vec<Real<S>>::width;

  void input(int64_t rows, const S* const* x, Real<S>* gx) const {
#if FR_AMX
    if constexpr (sums_on_tiles<S>) {
      for (int64_t p = 0; p < w.p1 - w.p0; ++p)
        for (int64_t m = 0; m < rows; ++m)
          copy(w.bias.get() + p * row_elements, row_elements, gx + (p * rows + m) * row_elements);
      return add(rows, x, w.q.I, w.tiles_ih.get(), 2, gx, rows * row_elements);
    }
#endif
    each_tile<CellWeights<S, G>::PV>(0, w.p1 - w.p0, rows, InputTile<S, G>{w_ih, x, gx, rows});
  }
  // Row m of the step is row m of gx.
  void hidden(int64_t rows, const S* const* h, Real<S>* gx, int64_t panel_stride) const {
#if FR_AMX
    if constexpr (sums_on_tiles<S>) add(rows, h, w.q.P, w.tiles_hh.get(), 3, gx, panel_stride);
#endif
    (void)rows, (void)h, (void)gx, (void)panel_stride;
  }

 private:
#if FR_AMX
  // third: which of a panel's sums its third vector adds to.
  void add(int64_t rows, const S* const* a, int64_t K, const S* tiles, int64_t third, float* gx,
           int64_t panel_stride) const {
    constexpr int PV = CellWeights<S, G>::PV;
    const Scratch<S> left(left_elements(rows, K));
    pack_left(rows, a, K, left.get());
    const auto at = [=](int64_t c) {
      const int64_t n = c % PV;
      return gx + c / PV * panel_stride + (G == 3 && n == 2 ? third : n) * 16;
    };
    tile_product(rows, left.get(), tiles, tiles_of_k(K), (w.p1 - w.p0) * PV, true, at, row_elements);
  }
#endif
};

}  // namespace FR_ISA
}  // namespace fr
