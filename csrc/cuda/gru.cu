// The GRU on a GPU: its equations (cell_math.h) over its tensors (cells.h); the kernels are those of all cells.
#include "cell_launch.cuh"

namespace fr::cuda {

template <class E> struct Gru {
  static constexpr int gates = 3;
  static constexpr bool has_c = false;

  static FR_DEVICE void forward(const CellForward& a, const Place& p, const float (&x)[3], const float (&q)[3],
                                float& h, float&) {
    const GruStep<float> s = gru_step(x[0] + q[0], x[1] + q[1], x[2], q[2], p.fresh ? 0.0f : h);
    if (p.there) h = as<E>(s.h);
    if (!a.gates) return;
    const float saved[4] = {s.r, s.z, s.n, q[2]};
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) put<E>(a.gates, p.gate(gate, 4), p.there ? saved[gate] : 0.0f);
  }

  struct Saved {
    E gate[4], h_before, dy;
  };
  static FR_DEVICE Saved load(const CellBackward& a, const Place& p) {
    Saved s{};
    if (!p.there) return s;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) s.gate[gate] = get<E>(a.gates, p.gate(gate, 4));
    s.h_before = state_before<E>(p, a.y, a.h0), s.dy = get<E>(a.dy, p.gate(0, 1));
    return s;
  }
  static FR_DEVICE void backward(const CellBackward& a, const Place& p, const Saved& s, float& dh, float&,
                                 float (&dp)[3]) {
    GruStepGrad<float> d{};
    if (p.there) {
      d = gru_step_grad(dh + to_float(s.dy), to_float(s.gate[0]), to_float(s.gate[1]), to_float(s.gate[2]),
                        to_float(s.gate[3]), to_float(s.h_before));
      dh = d.h_prev;
    }
    dp[0] = d.pr, dp[1] = d.pz, dp[2] = d.q;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      put<E>(a.dgx, p.gate(gate, 3), gate == 2 ? d.pn : dp[gate]);
      put<E>(a.dgh, p.gate(gate, 3), dp[gate]);
    }
  }
};

const char* gru_forward(const CellForward& call) { return run_forward<Gru>(call); }
const char* gru_backward(const CellBackward& call) { return run_backward<Gru>(call); }

}  // namespace fr::cuda
