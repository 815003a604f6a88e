// The LSTM on a GPU: its equations (cell_math.h) over its tensors (cells.h); the kernels are those of all cells.
#include "cell_launch.cuh"

namespace fr::cuda {

template <class E> struct Lstm {
  static constexpr int gates = 4;
  static constexpr bool has_c = true;

  using Step = LstmStep<float>;
  static FR_DEVICE Step forward(const CellForward&, const Place& p, const float (&x)[4], const float (&q)[4], float& h,
                                float& c) {
    const Step s = lstm_step(x[0] + q[0], x[1] + q[1], x[2] + q[2], x[3] + q[3], p.fresh ? 0.0f : c);
    if (p.there) h = as<E>(s.m), c = s.c;
    return s;
  }
  static FR_DEVICE void save(const CellForward& a, const Place& p, const Step& s) {
    if (!a.gates) return;
    const float gate[4] = {s.i, s.f, s.g, s.o};
#pragma unroll
    for (int n = 0; n < 4; ++n) put<E>(a.gates, p.gate(n, 4), p.there ? gate[n] : 0.0f);
    put<E>(a.cells, p.gate(0, 1), p.there ? s.c : 0.0f);
  }

  struct Saved {
    E gate[4], c, c_before, dy;
  };
  static FR_DEVICE Saved load(const CellBackward& a, const Place& p) {
    Saved s{};
    if (!p.there) return s;
#pragma unroll
    for (int n = 0; n < 4; ++n) s.gate[n] = get<E>(a.gates, p.gate(n, 4));
    s.c = get<E>(a.cells, p.gate(0, 1)), s.dy = get<E>(a.dy, p.gate(0, 1));
    s.c_before = state_before<E>(p, a.cells, a.c0);
    return s;
  }
  struct Gradient {
    float product[4];  // what W_hh is multiplied with
  };
  static FR_DEVICE Gradient backward(const CellBackward&, const Place& p, const Saved& s, float& dh, float& dc) {
    if (!p.there) return {};
    const LstmStepGrad<float> d =
        lstm_step_grad(dh + to_float(s.dy), dc, to_float(s.gate[0]), to_float(s.gate[1]), to_float(s.gate[2]),
                       to_float(s.gate[3]), to_float(s.c), to_float(s.c_before));
    dh = 0, dc = p.fresh ? 0.0f : d.c_prev;
    return {{d.pi, d.pf, d.pg, d.po}};
  }
  static FR_DEVICE void save(const CellBackward& a, const Place& p, const Gradient& d) {
#pragma unroll
    for (int n = 0; n < 4; ++n) put<E>(a.dgx, p.gate(n, 4), d.product[n]);
  }
};

const char* lstm_forward(const CellForward& call) { return run_forward<Lstm>(call); }
const char* lstm_backward(const CellBackward& call) { return run_backward<Lstm>(call); }

}  // namespace fr::cuda
