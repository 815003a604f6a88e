// Registers the cells' CUDA kernels as torch.ops.fastrnn_cuda.*: checks the arguments, allocates the results, takes the
// products of matrices before and after the sequence with torch, calls through cuda/cells.h. The arguments are those of
// torch.ops.fastrnn_cpu, and tf32: whether products of float32 may be rounded to TF32.
//
// Compiled for a GPU, or (FR_CUDA_ON_CPU) as torch.ops.fastrnn_cuda_on_cpu for tests, where kernels and tensors are on
// the CPU.
#if defined(FASTRNN_WITH_CUDA) || defined(FR_CUDA_ON_CPU)
#include "bindings.h"

#include <array>
#include <tuple>

#ifdef FR_CUDA_ON_CPU
#define FR_CUDA_OPS fastrnn_cuda_on_cpu
#define FR_CUDA_KEY CPU
#else
#define FR_CUDA_OPS fastrnn_cuda
#define FR_CUDA_KEY CUDA
#endif

#include "cuda/cells.h"

namespace {

using fr::Dims;
using fr::MaybeTensor;
using fr::ScalarType;
using fr::shape_of;
using fr::Tensor;
using fr::cuda::CellBackward;
using fr::cuda::CellForward;
using fr::cuda::Precision;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// x W^T + b
Tensor linear(const Tensor& x, const Tensor& w, const MaybeTensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// left^T right, over all steps and rows: (T, B, M), (T, B, N) -> (M, N)
Tensor outer_sum(const Tensor& left, const Tensor& right, int64_t rows) {
  const Tensor l = torch::stable::view(left, {rows, left.size(left.dim() - 1)});
  const Tensor r = torch::stable::reshape(right, {rows, right.size(right.dim() - 1)});
  return torch::stable::matmul(torch::stable::transpose(l, 0, 1), r);
}
Tensor column_sum(const Tensor& t, int64_t rows) {
  const int64_t over[] = {0};
  return torch::stable::sum(torch::stable::view(t, {rows, t.size(t.dim() - 1)}), over);
}

#ifdef FR_CUDA_ON_CPU
void* current_stream(int32_t) { return nullptr; }
struct OnDevice {
  explicit OnDevice(int32_t) {}
};
#else
using OnDevice = torch::stable::accelerator::DeviceGuard;
using fr::current_stream;
#endif

// A call of the kernels of cuda/cells.h. The kernels read 16 bytes at once.
class Call : public fr::CellCall {
 public:
  Precision precision;
  void* stream;
  Call(const char* op, const Tensor& x, const Tensor& h0, bool tf32)
      : CellCall(op, x, h0,
                 x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Half ||
                     x.scalar_type() == ScalarType::BFloat16,
                 "float32, float16 or bfloat16", 16),
        precision(dtype == ScalarType::Half       ? Precision::f16
                  : dtype == ScalarType::BFloat16 ? Precision::bf16
                  : tf32                          ? Precision::tf32
                                                  : Precision::f32),
        stream(current_stream(device_index())) {}
  template <class N> Tensor result_if(bool there, Dims dims, N** to) const {
    return there ? result(dims, to) : none(to, dtype);
  }
  // Float memory of a kernel
  Tensor scratch(bool wanted, float** to) const {
    return wanted ? result({"B", "H"}, to, ScalarType::Float) : none(to, ScalarType::Float);
  }
  void done(const char* error) const {
    if (error) fail(error);
  }
};

void refuse_projection(const Call& c, const MaybeTensor& w_hr) {
  if (w_hr) c.fail("the CUDA kernels have no projection (w_hr); use backend triton, aten or reference");
}

// Gives a stack's state, where nothing is left to do.
void copy_state(Tensor& to, const Tensor& from) { torch::stable::copy_(to, from); }

// What the forward calls share. GH: "4H" for the LSTM, and so on.
struct Forward {
  CellForward a{};
  Tensor y, hn, gx;
  bool empty;
  Forward(Call& c, const char* GH, const Tensor& x, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
          const MaybeTensor& b_ih, const MaybeTensor& b_hh, const MaybeTensor& lengths, const MaybeTensor& reset,
          bool reverse)
      : y(c.result({"T", "B", "H"}, &a.y)), hn(c.result({"L", "B", "H"}, &a.hn)), empty(c.T == 0 || c.B == 0) {
    a.precision = c.precision, a.T = c.T, a.B = c.B, a.I = c.I, a.H = c.H;
    a.x = c.data("x", x, {"T", "B", "I"}), a.h0 = c.data("h0", h0, {"L", "B", "H"});
    a.w_ih = c.data("w_ih", w_ih, {GH, "I"}), a.w_hh = c.data("w_hh", w_hh, {GH, "H"});
    a.b_ih = c.data("b_ih", b_ih, {GH}), a.b_hh = c.data("b_hh", b_hh, {GH});
    a.lengths = c.want_lengths(lengths), a.reset = c.want_reset(reset);
    a.reverse = reverse, a.stream = c.stream;
    if (c.T > 1 && !empty) {
      gx = torch::stable::contiguous(linear(x, w_ih, b_ih));
      a.gx = gx.data_ptr();
    }
    if (empty) copy_state(hn, h0);
  }
};

// What the backward calls share: the arguments, and the products after the kernel.
struct Backward {
  CellBackward a{};
  Tensor dh0, dgx, scratch, x, w_ih;
  int64_t rows;
  bool empty;
  Backward(Call& c, const char* GH, const Tensor& input, const Tensor& h0, const Tensor& w, const Tensor& w_hh,
           const MaybeTensor& lengths, const MaybeTensor& reset, bool reverse, const Tensor& y, const Tensor& dy,
           const Tensor& dhn)
      : dh0(c.result({"L", "B", "H"}, &a.dh0)),
        dgx(c.result({"T", "B", GH}, &a.dgx)),
        scratch(c.scratch(true, &a.dh)),
        x(input),
        w_ih(w),
        rows(c.T * c.B),
        empty(rows == 0) {
    a.precision = c.precision, a.T = c.T, a.B = c.B, a.H = c.H;
    x_data_ = c.data("x", x, {"T", "B", "I"}), a.h0 = c.data("h0", h0, {"L", "B", "H"});
    c.data("w_ih", w_ih, {GH, "I"}), a.w_hh = c.data("w_hh", w_hh, {GH, "H"});
    a.y = c.data("y", y, {"T", "B", "H"}), a.dy = c.data("dy", dy, {"T", "B", "H"});
    a.dhn = c.data("dhn", dhn, {"L", "B", "H"});
    a.lengths = c.want_lengths(lengths), a.reset = c.want_reset(reset);
    a.reverse = reverse, a.stream = c.stream;
    if (empty) copy_state(dh0, dhn);
  }
  Tensor dx() const { return torch::stable::matmul(dgx, w_ih); }
  // Where there are lengths, x may hold anything beyond them.
  Tensor dw_ih(const Call& c) const {
    if (!a.lengths || empty) return outer_sum(dgx, x, rows);
    void* kept = nullptr;
    Tensor within = c.result({"T", "B", "I"}, &kept);
    c.done(fr::cuda::rows_within_lengths(
        {a.T, a.B, c.I, element_bytes(), a.lengths, a.reset, a.reverse, x_data_, nullptr, kept, a.stream}));
    return outer_sum(dgx, within, rows);
  }
  Tensor dw_hh(const Call& c, const Tensor& dgh) const {
    void* data = nullptr;
    Tensor h = c.result({"T", "B", "H"}, &data);
    if (!empty)
      c.done(fr::cuda::previous_rows(
          {a.T, a.B, a.H, element_bytes(), a.lengths, a.reset, a.reverse, a.y, a.h0, data, a.stream}));
    return outer_sum(dgh, h, rows);
  }

 private:
  const void* x_data_;
  int64_t element_bytes() const { return a.precision == Precision::f16 || a.precision == Precision::bf16 ? 2 : 4; }
};

Tensors5 lstm_forward(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                      MaybeTensor w_hr, MaybeTensor lengths, MaybeTensor reset, bool reverse, bool save, bool tf32) {
  Call c("lstm_forward", x, h0, tf32);
  refuse_projection(c, w_hr);
  const OnDevice guard(c.device_index());
  Forward f(c, "4H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  f.a.c0 = c.data("c0", c0, {"L", "B", "H"});
  Tensor cn = c.result({"L", "B", "H"}, &f.a.cn), running = c.scratch(c.T > 1, &f.a.c);
  Tensor gates = c.result_if(save, {"T", "B", "4H"}, &f.a.gates);
  Tensor cells = c.result_if(save, {"T", "B", "H"}, &f.a.cells);
  if (f.empty)
    copy_state(cn, c0);
  else
    c.done(fr::cuda::lstm_forward(f.a));
  return {f.y, f.hn, cn, gates, cells};
}

Tensors7 lstm_backward(Tensor dy, Tensor dhn, Tensor dcn, Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh,
                       MaybeTensor b_ih, MaybeTensor b_hh, MaybeTensor w_hr, MaybeTensor lengths, MaybeTensor reset,
                       bool reverse, Tensor y, Tensor gates, Tensor cells, bool tf32) {
  Call c("lstm_backward", x, h0, tf32);
  refuse_projection(c, w_hr);
  const OnDevice guard(c.device_index());
  Backward f(c, "4H", x, h0, w_ih, w_hh, lengths, reset, reverse, y, dy, dhn);
  f.a.c0 = c.data("c0", c0, {"L", "B", "H"}), f.a.dcn = c.data("dcn", dcn, {"L", "B", "H"});
  f.a.gates = c.data("gates", gates, {"T", "B", "4H"}), f.a.cells = c.data("cells", cells, {"T", "B", "H"});
  Tensor dc0 = c.result({"L", "B", "H"}, &f.a.dc0), running = c.scratch(true, &f.a.dc);
  if (f.empty)
    copy_state(dc0, dcn);
  else
    c.done(fr::cuda::lstm_backward(f.a));
  void* nothing;
  Tensor db = b_ih || b_hh ? column_sum(f.dgx, f.rows) : c.none(&nothing, c.dtype);
  return {f.dx(), f.dh0, dc0, f.dw_ih(c), f.dw_hh(c, f.dgx), db, c.none(&nothing, c.dtype)};
}

Tensors3 gru_forward(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                     MaybeTensor lengths, MaybeTensor reset, bool reverse, bool save, bool tf32) {
  Call c("gru_forward", x, h0, tf32);
  const OnDevice guard(c.device_index());
  Forward f(c, "3H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  Tensor gates = c.result_if(save, {"T", "B", "4H"}, &f.a.gates);
  if (!f.empty) c.done(fr::cuda::gru_forward(f.a));
  return {f.y, f.hn, gates};
}

Tensors6 gru_backward(Tensor dy, Tensor dhn, Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih,
                      MaybeTensor b_hh, MaybeTensor lengths, MaybeTensor reset, bool reverse, Tensor y, Tensor gates,
                      bool tf32) {
  Call c("gru_backward", x, h0, tf32);
  const OnDevice guard(c.device_index());
  Backward f(c, "3H", x, h0, w_ih, w_hh, lengths, reset, reverse, y, dy, dhn);
  f.a.gates = c.data("gates", gates, {"T", "B", "4H"});
  Tensor dgh = c.result({"T", "B", "3H"}, &f.a.dgh);
  if (!f.empty) c.done(fr::cuda::gru_backward(f.a));
  void* nothing;
  Tensor db_ih = b_ih ? column_sum(f.dgx, f.rows) : c.none(&nothing, c.dtype);
  Tensor db_hh = b_hh ? column_sum(dgh, f.rows) : c.none(&nothing, c.dtype);
  return {f.dx(), f.dh0, f.dw_ih(c), f.dw_hh(c, dgh), db_ih, db_hh};
}

Tensors2 rnn_forward(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih, MaybeTensor b_hh,
                     MaybeTensor lengths, MaybeTensor reset, bool reverse, std::string nonlinearity, bool tf32) {
  Call c("rnn_forward", x, h0, tf32);
  const OnDevice guard(c.device_index());
  Forward f(c, "H", x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse);
  f.a.relu = c.is_relu(nonlinearity);
  if (!f.empty) c.done(fr::cuda::rnn_forward(f.a));
  return {f.y, f.hn};
}

Tensors5 rnn_backward(Tensor dy, Tensor dhn, Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, MaybeTensor b_ih,
                      MaybeTensor b_hh, MaybeTensor lengths, MaybeTensor reset, bool reverse, std::string nonlinearity,
                      Tensor y, bool tf32) {
  Call c("rnn_backward", x, h0, tf32);
  const OnDevice guard(c.device_index());
  Backward f(c, "H", x, h0, w_ih, w_hh, lengths, reset, reverse, y, dy, dhn);
  f.a.relu = c.is_relu(nonlinearity);
  if (!f.empty) c.done(fr::cuda::rnn_backward(f.a));
  void* nothing;
  Tensor db = b_ih || b_hh ? column_sum(f.dgx, f.rows) : c.none(&nothing, c.dtype);
  return {f.dx(), f.dh0, f.dw_ih(c), f.dw_hh(c, f.dgx), db};
}

void want_plan(int64_t row_tiles, int64_t cluster) {
  const bool power = cluster <= 16 && (cluster < 1 ? cluster >= -1 : (cluster & (cluster - 1)) == 0);
  if ((row_tiles != 0 && row_tiles != 1 && row_tiles != 4) || !power)
    throw std::runtime_error(
        "want_plan: row_tiles must be 0, 1 or 4, and cluster -1, 0 or a power of two up to 16, got " +
        std::to_string(row_tiles) + " and " + std::to_string(cluster));
  fr::cuda::want_plan(row_tiles, cluster);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FR_CUDA_OPS, m) {
#define FR_CELL(op, arguments, results) m.def(#op "(" arguments ", bool tf32=False) -> (" results ")")
#define FR_WEIGHTS "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
#define FR_ROWS "Tensor? lengths, Tensor? reset, bool reverse"
  FR_CELL(lstm_forward, "Tensor x, Tensor h0, Tensor c0, " FR_WEIGHTS "Tensor? w_hr, " FR_ROWS ", bool save",
          "Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor cells");
  FR_CELL(lstm_backward,
          "Tensor dy, Tensor dhn, Tensor dcn, Tensor x, Tensor h0, Tensor c0, " FR_WEIGHTS "Tensor? w_hr, " FR_ROWS
          ", Tensor y, Tensor gates, Tensor cells",
          "Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_hr");
  FR_CELL(gru_forward, "Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS ", bool save", "Tensor y, Tensor hn, Tensor gates");
  FR_CELL(gru_backward, "Tensor dy, Tensor dhn, Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS ", Tensor y, Tensor gates",
          "Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh");
  FR_CELL(rnn_forward, "Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS ", str nonlinearity", "Tensor y, Tensor hn");
  FR_CELL(rnn_backward,
          "Tensor dy, Tensor dhn, Tensor x, Tensor h0, " FR_WEIGHTS FR_ROWS ", str nonlinearity, Tensor y",
          "Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db");
  m.def("want_plan(int row_tiles, int cluster) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FR_CUDA_OPS, FR_CUDA_KEY, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("gru_forward", TORCH_BOX(&gru_forward));
  m.impl("gru_backward", TORCH_BOX(&gru_backward));
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(FR_CUDA_OPS, CompositeExplicitAutograd, m) { m.impl("want_plan", TORCH_BOX(&want_plan)); }

#endif
