// The Elman RNN on a GPU: its equations (cell_math.h) over its tensors (cells.h); the kernels are those of all cells.
#include "cell_launch.cuh"

namespace fr::cuda {

template <class E> struct Rnn {
  static constexpr int gates = 1;
  static constexpr bool has_c = false;

  struct Step {};
  static FR_DEVICE Step forward(const CellForward& a, const Place& p, const float (&x)[1], const float (&q)[1],
                                float& h, float&) {
    const float next = rnn_step(x[0] + q[0], a.relu);
    if (p.there) h = as<E>(next);
    return {};
  }
  static FR_DEVICE void save(const CellForward&, const Place&, const Step&) {}  // backward needs y alone

  struct Saved {
    E y, dy;
  };
  static FR_DEVICE Saved load(const CellBackward& a, const Place& p) {
    if (!p.there) return {};
    return {get<E>(a.y, p.gate(0, 1)), get<E>(a.dy, p.gate(0, 1))};
  }
  struct Gradient {
    float product[1];  // what W_hh is multiplied with
  };
  static FR_DEVICE Gradient backward(const CellBackward& a, const Place& p, const Saved& s, float& dh, float&) {
    if (!p.there) return {};
    const float d = rnn_step_grad(dh + to_float(s.dy), to_float(s.y), a.relu);
    dh = 0;
    return {{d}};
  }
  static FR_DEVICE void save(const CellBackward& a, const Place& p, const Gradient& d) {
    put<E>(a.dgx, p.gate(0, 1), d.product[0]);
  }
};

const char* rnn_forward(const CellForward& call) { return run_forward<Rnn>(call); }
const char* rnn_backward(const CellBackward& call) { return run_backward<Rnn>(call); }

}  // namespace fr::cuda
