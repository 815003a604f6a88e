// The LSTM on a GPU: its equations (cell_math.h) over its tensors (cells.h); the kernels are those of all cells.
#include "cell_launch.cuh"

namespace fr::cuda {

template <class E> struct Lstm {
  static constexpr int gates = 4;
  static constexpr bool has_c = true;

  static FR_DEVICE void forward(const CellForward& a, const Place& p, const float (&x)[4], const float (&q)[4],
                                float& h, float& c) {
    const LstmStep<float> s = lstm_step(x[0] + q[0], x[1] + q[1], x[2] + q[2], x[3] + q[3], p.fresh ? 0.0f : c);
    if (p.there) h = as<E>(s.m), c = s.c;
    if (!a.gates) return;
    const float saved[5] = {s.i, s.f, s.g, s.o, s.c};
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) put<E>(a.gates, p.gate(gate, 4), p.there ? saved[gate] : 0.0f);
    put<E>(a.cells, p.gate(0, 1), p.there ? saved[4] : 0.0f);
  }

  struct Saved {
    E gate[4], c, c_before, dy;
  };
  static FR_DEVICE Saved load(const CellBackward& a, const Place& p) {
    Saved s{};
    if (!p.there) return s;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) s.gate[gate] = get<E>(a.gates, p.gate(gate, 4));
    s.c = get<E>(a.cells, p.gate(0, 1)), s.dy = get<E>(a.dy, p.gate(0, 1));
    s.c_before = state_before<E>(p, a.cells, a.c0);
    return s;
  }
  static FR_DEVICE void backward(const CellBackward& a, const Place& p, const Saved& s, float& dh, float& dc,
                                 float (&dp)[4]) {
    LstmStepGrad<float> d{};
    if (p.there) {
      d = lstm_step_grad(dh + to_float(s.dy), dc, to_float(s.gate[0]), to_float(s.gate[1]), to_float(s.gate[2]),
                         to_float(s.gate[3]), to_float(s.c), to_float(s.c_before));
      dh = 0, dc = p.fresh ? 0.0f : d.c_prev;
    }
    dp[0] = d.pi, dp[1] = d.pf, dp[2] = d.pg, dp[3] = d.po;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) put<E>(a.dgx, p.gate(gate, 4), dp[gate]);
  }
};

const char* lstm_forward(const CellForward& call) { return run_forward<Lstm>(call); }
const char* lstm_backward(const CellBackward& call) { return run_backward<Lstm>(call); }

}  // namespace fr::cuda
