// Registers the cells' kernels as torch.ops.fastrnn_cpu.*: checks the arguments, allocates the results, calls through
// kernels.h. The draw has bindings_sample.cpp. Fake kernels, autograd and the choice of a backend are Python's
// (fastrnn/library.py, fastrnn/backends.py).
#include "bindings.h"

#include <tuple>
#include <type_traits>

namespace {

using fr::Dims;
using fr::MaybeTensor;
using fr::ScalarType;
using fr::shape_of;
using fr::Tensor;
using fr::threads;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class F> constexpr ScalarType dtype_of = std::is_same_v<F, float> ? ScalarType::Float : ScalarType::BFloat16;
template <> constexpr ScalarType dtype_of<double> = ScalarType::Double;

// A call of the kernels of kernels.h.
template <class F> class Call : public fr::CellCall {
 public:
  Call(const char* op, const Tensor& x, const Tensor& h0)
      : CellCall(op, x, h0, x.scalar_type() == dtype_of<F>, "float32, float64 or bfloat16", alignof(F)) {}
  template <class T> const F* want(const char* name, const T& t, Dims dims) {
    return static_cast<const F*>(data(name, t, dims));
  }
  Tensor result_if(bool there, Dims dims, F** to) const {
    return there ? result(dims, to) : none(to, std::is_same_v<F, double> ? ScalarType::Double : ScalarType::Float);
  }
};

// The arguments that every cell has. GH: "4H" for LSTM, and so on; P: "H" where there is no projection.
template <class F>
fr::Sequence<F> sequence(Call<F>& c, const char* GH, const char* P, const Tensor& x, const Tensor& h0,
                         const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih, const MaybeTensor& b_hh,
                         const MaybeTensor& lengths, const MaybeTensor& reset, bool reverse) {
  fr::Sequence<F> q{};
  q.T = c.T, q.B = c.B, q.I = c.I, q.H = c.H, q.P = c.P;
  q.x = c.want("x", x, {"T", "B", "I"}), q.h0 = c.want("h0", h0, {"L", "B", P});
  q.w_ih = c.want("w_ih", w_ih, {GH, "I"}), q.w_hh = c.want("w_hh", w_hh, {GH, P});
  q.b_ih = c.want("b_ih", b_ih, {GH}), q.b_hh = c.want("b_hh", b_hh, {GH});
  q.lengths = c.want_lengths(lengths), q.reset = c.want_reset(reset);
  q.reverse = reverse, q.pool = threads();
  return q;
}

// Reads H from c0 where h0 has the projected size; returns the letter of h's size.
template <class F> const char* projection(Call<F>& c, const Tensor& c0, const MaybeTensor& w_hr) {
  if (!w_hr) return "H";
  if (c0.dim() < 2 || c0.size(c0.dim() - 1) < 1) c.fail("c0 must be (B, H), got " + shape_of(c0));
  c.H = c0.size(c0.dim() - 1);
  c.h_from = "c0";
  return "P";
}

template <class F>
Tensors5 lstm_forward(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                      MaybeTensor w_hr, MaybeTensor lengths, MaybeTensor reset, bool reverse, bool save) {
  Call<F> c("lstm_forward", x, h0);
  const char* P = projection(c, c0, w_hr);
  fr::LstmForward<F> a{};
  a.in = sequence(c, "4H", P, x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  a.c0 = c.want("c0", c0, {"L", "B", "H"});
  a.w_hr = c.want("w_hr", w_hr, {"P", "H"});
  Tensor y = c.result({"T", "B", P}, &a.y), hn = c.result({"L", "B", P}, &a.hn), cn = c.result({"L", "B", "H"}, &a.cn);
  Tensor gates = c.result_if(save, {"T", "B", "4H"}, &a.gates), cells = c.result_if(save, {"T", "B", "H"}, &a.cells);
  fr::lstm_forward(a);
  return {y, hn, cn, gates, cells};
}

template <class F>
Tensors7 lstm_backward(Tensor dy, Tensor dhn, Tensor dcn, Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh,
                       MaybeTensor b_ih, MaybeTensor b_hh, MaybeTensor w_hr, MaybeTensor lengths, MaybeTensor reset,
                       bool reverse, Tensor y, Tensor gates, Tensor cells, bool input_gradient) {
  Call<F> c("lstm_backward", x, h0);
  const char* P = projection(c, c0, w_hr);
  fr::LstmBackward<F> a{};
  a.in = sequence(c, "4H", P, x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  a.c0 = c.want("c0", c0, {"L", "B", "H"});
  a.w_hr = c.want("w_hr", w_hr, {"P", "H"});
  a.y = c.want("y", y, {"T", "B", P});
  a.gates = c.want("gates", gates, {"T", "B", "4H"});
  a.cells = c.want("cells", cells, {"T", "B", "H"});
  a.dy = c.want("dy", dy, {"T", "B", P});
  a.dhn = c.want("dhn", dhn, {"L", "B", P});
  a.dcn = c.want("dcn", dcn, {"L", "B", "H"});
  Tensor dx = c.result_if(input_gradient, {"T", "B", "I"}, &a.dx), dh0 = c.result({"L", "B", P}, &a.dh0),
         dc0 = c.result({"L", "B", "H"}, &a.dc0);
  Tensor dw_ih = c.result({"4H", "I"}, &a.dw_ih), dw_hh = c.result({"4H", P}, &a.dw_hh);
  Tensor db = c.result_if(b_ih || b_hh, {"4H"}, &a.db), dw_hr = c.result_if(!!w_hr, {"P", "H"}, &a.dw_hr);
  fr::lstm_backward(a);
  return {dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr};
}

template <class F>
Tensors3 gru_forward(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                     MaybeTensor lengths, MaybeTensor reset, bool reverse, bool save) {
  Call<F> c("gru_forward", x, h0);
  fr::GruForward<F> a{};
  a.in = sequence(c, "3H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  Tensor y = c.result({"T", "B", "H"}, &a.y), hn = c.result({"L", "B", "H"}, &a.hn);
  Tensor gates = c.result_if(save, {"T", "B", "4H"}, &a.gates);
  fr::gru_forward(a);
  return {y, hn, gates};
}

template <class F>
Tensors6 gru_backward(Tensor dy, Tensor dhn, Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih,
                      MaybeTensor b_hh, MaybeTensor lengths, MaybeTensor reset, bool reverse, Tensor y, Tensor gates,
                      bool input_gradient) {
  Call<F> c("gru_backward", x, h0);
  fr::GruBackward<F> a{};
  a.in = sequence(c, "3H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  a.y = c.want("y", y, {"T", "B", "H"});
  a.gates = c.want("gates", gates, {"T", "B", "4H"});
  a.dy = c.want("dy", dy, {"T", "B", "H"});
  a.dhn = c.want("dhn", dhn, {"L", "B", "H"});
  Tensor dx = c.result_if(input_gradient, {"T", "B", "I"}, &a.dx), dh0 = c.result({"L", "B", "H"}, &a.dh0);
  Tensor dw_ih = c.result({"3H", "I"}, &a.dw_ih), dw_hh = c.result({"3H", "H"}, &a.dw_hh);
  Tensor db_ih = c.result_if(!!b_ih, {"3H"}, &a.db_ih), db_hh = c.result_if(!!b_hh, {"3H"}, &a.db_hh);
  fr::gru_backward(a);
  return {dx, dh0, dw_ih, dw_hh, db_ih, db_hh};
}

template <class F>
Tensors2 rnn_forward(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                     MaybeTensor lengths, MaybeTensor reset, bool reverse, std::string nonlinearity) {
  Call<F> c("rnn_forward", x, h0);
  fr::RnnForward<F> a{};
  a.in = sequence(c, "H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  a.relu = c.is_relu(nonlinearity);
  Tensor y = c.result({"T", "B", "H"}, &a.y), hn = c.result({"L", "B", "H"}, &a.hn);
  fr::rnn_forward(a);
  return {y, hn};
}

template <class F>
Tensors5 rnn_backward(Tensor dy, Tensor dhn, Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih,
                      MaybeTensor b_hh, MaybeTensor lengths, MaybeTensor reset, bool reverse, std::string nonlinearity,
                      Tensor y, bool input_gradient) {
  Call<F> c("rnn_backward", x, h0);
  fr::RnnBackward<F> a{};
  a.in = sequence(c, "H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  a.relu = c.is_relu(nonlinearity);
  a.y = c.want("y", y, {"T", "B", "H"});
  a.dy = c.want("dy", dy, {"T", "B", "H"});
  a.dhn = c.want("dhn", dhn, {"L", "B", "H"});
  Tensor dx = c.result_if(input_gradient, {"T", "B", "I"}, &a.dx), dh0 = c.result({"L", "B", "H"}, &a.dh0);
  Tensor dw_ih = c.result({"H", "I"}, &a.dw_ih), dw_hh = c.result({"H", "H"}, &a.dw_hh);
  Tensor db = c.result_if(b_ih || b_hh, {"H"}, &a.db);
  fr::rnn_backward(a);
  return {dx, dh0, dw_ih, dw_hh, db};
}

// The new states alone, mostly of one step: x (B, I). What a call through the dispatcher costs is in its arguments and
// results, and a small cell's step is little more than that.
template <class F>
Tensors2 lstm_step(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh) {
  Call<F> c("lstm_step", x, h0);
  fr::LstmForward<F> a{};
  a.in = sequence(c, "4H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, {}, {}, false);
  a.c0 = c.want("c0", c0, {"L", "B", "H"});
  const Tensor y = c.result({"T", "B", "H"}, &a.y);
  Tensor hn = c.result({"L", "B", "H"}, &a.hn), cn = c.result({"L", "B", "H"}, &a.cn);
  fr::lstm_forward(a);
  return {hn, cn};
}
template <class F> Tensor gru_step(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh) {
  Call<F> c("gru_step", x, h0);
  fr::GruForward<F> a{};
  a.in = sequence(c, "3H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, {}, {}, false);
  const Tensor y = c.result({"T", "B", "H"}, &a.y);
  Tensor hn = c.result({"L", "B", "H"}, &a.hn);
  fr::gru_forward(a);
  return hn;
}
template <class F>
Tensor rnn_step(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh, bool relu) {
  Call<F> c("rnn_step", x, h0);
  fr::RnnForward<F> a{};
  a.in = sequence(c, "H", "H", x, h0, w_ih, w_hh, b_ih, b_hh, {}, {}, false);
  a.relu = relu;
  const Tensor y = c.result({"T", "B", "H"}, &a.y);
  Tensor hn = c.result({"L", "B", "H"}, &a.hn);
  fr::rnn_forward(a);
  return hn;
}

// An op for all dtypes: the first argument's, where float32 refuses every dtype that is not here.
template <auto F32, auto F64, auto BF16> struct ByDtype;
template <class R, class... A, R (*F32)(Tensor, A...), R (*F64)(Tensor, A...), R (*BF16)(Tensor, A...)>
struct ByDtype<F32, F64, BF16> {
  static R call(Tensor first, A... rest) {
    if (first.scalar_type() == ScalarType::Double) return F64(std::move(first), std::move(rest)...);
    return (first.scalar_type() == ScalarType::BFloat16 ? BF16 : F32)(std::move(first), std::move(rest)...);
  }
};
#define FR_OP(op) m.impl(#op, TORCH_BOX((&ByDtype<&op<float>, &op<double>, &op<fr::bf16>>::call)))

std::string isa() { return fr::cpu_isa(); }
void set_isa(std::string name) { fr::set_cpu_isa(name.c_str()); }
std::string build_info() {
  std::string text =
      "compiler " __VERSION__ ", C++ " + std::to_string(__cplusplus / 100 % 100) + ", torch interface 2.11";
#ifdef FASTRNN_WITH_CUDA
  return text + ", with CUDA";
#else
  return text + ", without CUDA";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(fastrnn_cpu, m) {
#define FR_STEP "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
#define FR_WEIGHTS FR_STEP ", "
#define FR_ROWS "Tensor? lengths, Tensor? reset, bool reverse"
  m.def("lstm_forward(Tensor x, Tensor h0, Tensor c0, " FR_WEIGHTS "Tensor? w_hr, " FR_ROWS
        ", bool save)"
        " -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor cells)");
  m.def("lstm_backward(Tensor dy, Tensor dhn, Tensor dcn, Tensor x, Tensor h0, Tensor c0, " FR_WEIGHTS
        "Tensor? w_hr, " FR_ROWS
        ", Tensor y, Tensor gates, Tensor cells, bool input_gradient=True)"
        " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_hr)");
  m.def("gru_forward(Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS ", bool save) -> (Tensor y, Tensor hn, Tensor gates)");
  m.def("gru_backward(Tensor dy, Tensor dhn, Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS
        ", Tensor y, Tensor gates, bool input_gradient=True)"
        " -> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)");
  m.def("rnn_forward(Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS ", str nonlinearity) -> (Tensor y, Tensor hn)");
  m.def("rnn_backward(Tensor dy, Tensor dhn, Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS
        ", str nonlinearity, Tensor y, bool input_gradient=True)"
        " -> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db)");
  m.def("lstm_step(Tensor x, Tensor h0, Tensor c0, " FR_STEP ") -> (Tensor hn, Tensor cn)");
  m.def("gru_step(Tensor x, Tensor h0, " FR_STEP ") -> Tensor");
  m.def("rnn_step(Tensor x, Tensor h0, " FR_STEP ", bool relu) -> Tensor");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_cpu, CPU, m) {
  FR_OP(lstm_forward);
  FR_OP(lstm_backward);
  FR_OP(gru_forward);
  FR_OP(gru_backward);
  FR_OP(rnn_forward);
  FR_OP(rnn_backward);
  FR_OP(lstm_step);
  FR_OP(gru_step);
  FR_OP(rnn_step);
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
}
