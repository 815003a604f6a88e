// The Elman RNN on a GPU: its equations (cell_math.h) over its tensors (cells.h); the kernels are those of all cells.
#include "cell_launch.cuh"

namespace fr::cuda {

template <class E> struct Rnn {
  static constexpr int gates = 1;
  static constexpr bool has_c = false;

  static FR_DEVICE void forward(const CellForward& a, const Place& p, const float (&x)[1], const float (&q)[1],
                                float& h, float&) {
    const float next = rnn_step(x[0] + q[0], a.relu);
    if (p.there) h = as<E>(next);
  }

  struct Saved {
    E y, dy;
  };
  static FR_DEVICE Saved load(const CellBackward& a, const Place& p) {
    if (!p.there) return {};
    return {get<E>(a.y, p.gate(0, 1)), get<E>(a.dy, p.gate(0, 1))};
  }
  static FR_DEVICE void backward(const CellBackward& a, const Place& p, const Saved& s, float& dh, float&,
                                 float (&dp)[1]) {
    dp[0] = 0;
    if (p.there) dp[0] = rnn_step_grad(dh + to_float(s.dy), to_float(s.y), a.relu), dh = 0;
    put<E>(a.dgx, p.gate(0, 1), dp[0]);
  }
};

const char* rnn_forward(const CellForward& call) { return run_forward<Rnn>(call); }
const char* rnn_backward(const CellBackward& call) { return run_backward<Rnn>(call); }

}  // namespace fr::cuda
