// The GRU on a GPU: its equations (cell_math.h) over its tensors (cells.h); the kernels are those of all cells.
#include "cell_launch.cuh"

namespace fr::cuda {

template <class E> struct Gru {
  static constexpr int gates = 3;
  static constexpr bool has_c = false;

  struct Step {
    float gate[4];  // r z n q
  };
  static FR_DEVICE Step forward(const CellForward&, const Place& p, const float (&x)[3], const float (&q)[3], float& h,
                                float&) {
    const GruStep<float> s = gru_step(x[0] + q[0], x[1] + q[1], x[2], q[2], p.fresh ? 0.0f : h);
    if (p.there) h = as<E>(s.h);
    return {{s.r, s.z, s.n, q[2]}};
  }
  static FR_DEVICE void save(const CellForward& a, const Place& p, const Step& s) {
    if (!a.gates) return;
#pragma unroll
    for (int n = 0; n < 4; ++n) put<E>(a.gates, p.gate(n, 4), p.there ? s.gate[n] : 0.0f);
  }

  struct Saved {
    E gate[4], h_before, dy;
  };
  static FR_DEVICE Saved load(const CellBackward& a, const Place& p) {
    Saved s{};
    if (!p.there) return s;
#pragma unroll
    for (int n = 0; n < 4; ++n) s.gate[n] = get<E>(a.gates, p.gate(n, 4));
    s.h_before = state_before<E>(p, a.y, a.h0), s.dy = get<E>(a.dy, p.gate(0, 1));
    return s;
  }
  struct Gradient {
    float product[3];  // what W_hh is multiplied with
    float n;           // of the input's part of n
  };
  static FR_DEVICE Gradient backward(const CellBackward&, const Place& p, const Saved& s, float& dh, float&) {
    if (!p.there) return {};
    const GruStepGrad<float> d = gru_step_grad(dh + to_float(s.dy), to_float(s.gate[0]), to_float(s.gate[1]),
                                               to_float(s.gate[2]), to_float(s.gate[3]), to_float(s.h_before));
    dh = d.h_prev;
    return {{d.pr, d.pz, d.q}, d.pn};
  }
  static FR_DEVICE void save(const CellBackward& a, const Place& p, const Gradient& d) {
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      put<E>(a.dgx, p.gate(n, 3), n == 2 ? d.n : d.product[n]);
      put<E>(a.dgh, p.gate(n, 3), d.product[n]);
    }
  }
};

const char* gru_forward(const CellForward& call) { return run_forward<Gru>(call); }
const char* gru_backward(const CellBackward& call) { return run_backward<Gru>(call); }

}  // namespace fr::cuda
