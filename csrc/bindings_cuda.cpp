// Registers the draw on a GPU as torch.ops.fastrnn_cuda.sample: checks the arguments, allocates the results, calls
// through cuda/sample.h. Without FASTRNN_WITH_CUDA there is no op.
#include "bindings.h"

#ifdef FASTRNN_WITH_CUDA

#include <tuple>
#include <type_traits>

#include "cuda/sample.h"

namespace {

using fr::MaybeTensor;
using fr::ScalarType;
using fr::Tensor;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("sample: " + what); }

void on_same_device(const char* name, const Tensor& t, const Tensor& logits) {
  if (!t.is_cuda() || t.get_device_index() != logits.get_device_index())
    fail(std::string(name) + " must be on the GPU of logits");
}

// A row's parameter: (B,) of one dtype; `t` becomes dense.
template <class D> const D* column(const char* name, Tensor& t, const Tensor& logits) {
  constexpr ScalarType dtype = std::is_same_v<D, float> ? ScalarType::Float : ScalarType::Long;
  on_same_device(name, t, logits);
  if (t.scalar_type() != dtype || t.dim() != 1 || t.size(0) != logits.size(0))
    fail(std::string(name) + " must be (B,) = (" + std::to_string(logits.size(0)) + ",) " + fr::dtype_name(dtype) +
         ", got " + fr::shape_of(t) + " " + fr::dtype_name(t.scalar_type()));
  t = torch::stable::contiguous(t);
  return static_cast<const D*>(t.data_ptr());
}

template <class D> Tensor empty(const Tensor& like, ScalarType dtype, int64_t n, D** data) {
  Tensor t = torch::stable::new_empty(like, {&n, 1}, dtype);
  *data = static_cast<D*>(t.data_ptr());
  return t;
}

Tensors5 sample(Tensor logits, Tensor scale, Tensor top_k, Tensor top_p, Tensor min_p, MaybeTensor mask, Tensor seed,
                Tensor sequence, Tensor step, int64_t mode_of, bool logprobs) {
  if (logits.scalar_type() != ScalarType::Float || logits.dim() != 2)
    fail("logits must be (B, V) float32, got " + fr::shape_of(logits) + " " + fr::dtype_name(logits.scalar_type()));
  const int64_t B = logits.size(0), V = logits.size(1);
  if (V < 1 || V > fr::kMaxVocabulary)
    fail("logits must have 1 to " + std::to_string(fr::kMaxVocabulary) + " columns (tokens), got " + std::to_string(V));
  if (mode_of < 1 || mode_of > INT32_MAX) fail("mode_of must be 1 to 2^31 - 1, got " + std::to_string(mode_of));
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const bool dense_rows = (V == 1 || logits.stride(1) == 1) && (B < 2 || logits.stride(0) >= V);
  if (!dense_rows) logits = torch::stable::contiguous(logits);
  fr::Sample a{};
  a.B = B, a.V = V, a.mode_of = mode_of, a.logprobs = logprobs;
  a.logits = static_cast<const float*>(logits.data_ptr()), a.logits_stride = B < 2 ? V : logits.stride(0);
  a.scale = column<float>("scale", scale, logits), a.min_p = column<float>("min_p", min_p, logits);
  a.top_k = column<int64_t>("top_k", top_k, logits), a.top_p = column<int64_t>("top_p", top_p, logits);
  a.seed = column<int64_t>("seed", seed, logits), a.sequence = column<int64_t>("sequence", sequence, logits);
  a.step = column<int64_t>("step", step, logits);
  if (mask) {
    on_same_device("mask", *mask, logits);
    const bool fits = mask->dim() == 2 && (mask->size(0) == 1 || mask->size(0) == B) && mask->size(1) == V;
    if (!fits || mask->scalar_type() != ScalarType::Bool)
      fail("mask must be (1, V) or (B, V) = (" + std::to_string(B) + ", " + std::to_string(V) + ") bool, got " +
           fr::shape_of(*mask) + " " + fr::dtype_name(mask->scalar_type()));
    mask = torch::stable::contiguous(*mask);
    a.mask = static_cast<const bool*>(mask->data_ptr()), a.mask_stride = mask->size(0) == 1 ? 0 : V;
  }
  const int64_t floats = logprobs ? B : 0;
  Tensor token = empty(logits, ScalarType::Long, B, &a.token), status = empty(logits, ScalarType::Int, B, &a.status);
  Tensor plain = empty(logits, ScalarType::Float, floats, &a.logprob);
  Tensor tempered = empty(logits, ScalarType::Float, floats, &a.tempered_logprob);
  Tensor margin = empty(logits, ScalarType::Float, floats, &a.margin);
  uint8_t* scratch = nullptr;  // torch's memory is kept until the stream has passed this point
  const Tensor kept = empty(logits, ScalarType::Byte, fr::cuda::sample_scratch_bytes(B, V, mode_of), &scratch);
  if (const int code = fr::cuda::sample(a, scratch, fr::current_stream(logits.get_device_index())))
    fail("CUDA refuses the launch with error " + std::to_string(code));
  return {token, plain, tempered, margin, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_cuda, m) {
  m.def(
      "sample(Tensor logits, Tensor scale, Tensor top_k, Tensor top_p, Tensor min_p, Tensor? mask, Tensor seed,"
      " Tensor sequence, Tensor step, int mode_of, bool logprobs)"
      " -> (Tensor token, Tensor logprob, Tensor tempered_logprob, Tensor margin, Tensor status)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_cuda, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }

#endif
