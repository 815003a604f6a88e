// Registers the draw as torch.ops.fastrnn_cpu.sample, and as draw, which takes numbers instead of columns: checks the
// arguments, allocates the results, calls through kernels.h.
#include "bindings.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using fr::dtype_name;
using fr::MaybeTensor;
using fr::ScalarType;
using fr::shape_of;
using fr::Tensor;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// A row's parameter of `sample`: (B,) of one dtype, dense for as long as `kept` lives.
template <class D> const D* column(const char* name, const Tensor& t, int64_t B, std::vector<Tensor>& kept) {
  constexpr ScalarType dtype = std::is_same_v<D, float> ? ScalarType::Float : ScalarType::Long;
  if (t.scalar_type() != dtype || !t.is_cpu() || t.dim() != 1 || t.size(0) != B)
    throw std::runtime_error(std::string("sample: ") + name + " must be (B,) = (" + std::to_string(B) + ",) " +
                             dtype_name(dtype) + " on the CPU, like logits, got " + shape_of(t) + " " +
                             dtype_name(t.scalar_type()));
  if (t.is_contiguous()) return static_cast<const D*>(t.data_ptr());
  kept.push_back(torch::stable::contiguous(t));
  return static_cast<const D*>(kept.back().data_ptr());
}

// A new (n,) on the CPU, uninitialised, and its data. torch's C interface makes it without going through the
// dispatcher, which takes longer than a small draw.
template <class D> Tensor empty(ScalarType dtype, int64_t n, D** data) {
  constexpr int32_t cpu = 0;
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &n, &stride, static_cast<int32_t>(dtype), cpu, 0, &handle));
  Tensor t(handle);
  *data = static_cast<D*>(t.data_ptr());
  return t;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("sample: " + what); }

// The call that draws from logits, whose parameters are still to be given; `kept` holds the logits where they are
// dense.
fr::Sample draw_from(const Tensor& logits, std::vector<Tensor>& kept) {
  if (logits.scalar_type() != ScalarType::Float || logits.dim() != 2)
    fail("logits must be (B, V) float32, got " + shape_of(logits) + " " + dtype_name(logits.scalar_type()));
  const int64_t B = logits.size(0), V = logits.size(1);
  if (V < 1 || V > fr::kMaxVocabulary)
    fail("logits must have 1 to " + std::to_string(fr::kMaxVocabulary) + " columns (tokens), got " + std::to_string(V));
  const bool dense_rows = (V == 1 || logits.stride(1) == 1) && (B < 2 || logits.stride(0) >= V);
  kept.push_back(dense_rows ? logits : torch::stable::contiguous(logits));
  fr::Sample a{};
  a.B = B, a.V = V, a.mode_of = 1, a.pool = fr::threads();
  a.logits = static_cast<const float*>(kept.back().data_ptr());
  a.logits_stride = B < 2 ? V : kept.back().stride(0);
  return a;
}

Tensors5 sample(Tensor logits, Tensor scale, Tensor top_k, Tensor top_p, Tensor min_p, MaybeTensor mask, Tensor seed,
                Tensor sequence, Tensor step, int64_t mode_of, bool logprobs) {
  std::vector<Tensor> kept;
  kept.reserve(10);
  fr::Sample a = draw_from(logits, kept);
  const int64_t B = a.B, V = a.V;
  if (mode_of < 1) fail("mode_of must be at least 1, got " + std::to_string(mode_of));
  a.mode_of = mode_of, a.logprobs = logprobs;
  a.scale = column<float>("scale", scale, B, kept), a.min_p = column<float>("min_p", min_p, B, kept);
  a.top_k = column<int64_t>("top_k", top_k, B, kept), a.top_p = column<int64_t>("top_p", top_p, B, kept);
  a.seed = column<int64_t>("seed", seed, B, kept), a.sequence = column<int64_t>("sequence", sequence, B, kept);
  a.step = column<int64_t>("step", step, B, kept);
  if (mask) {
    const bool fits = mask->dim() == 2 && (mask->size(0) == 1 || mask->size(0) == B) && mask->size(1) == V;
    if (!fits || mask->scalar_type() != ScalarType::Bool || !mask->is_cpu())
      fail("mask must be (1, V) or (B, V) = (" + std::to_string(B) + ", " + std::to_string(V) +
           ") bool on the CPU, like logits, got " + shape_of(*mask) + " " + dtype_name(mask->scalar_type()));
    kept.push_back(torch::stable::contiguous(*mask));
    a.mask = static_cast<const bool*>(kept.back().data_ptr());
    a.mask_stride = mask->size(0) == 1 ? 0 : V;
  }
  const int64_t floats = logprobs ? B : 0;
  Tensor token = empty(ScalarType::Long, B, &a.token), status = empty(ScalarType::Int, B, &a.status);
  Tensor plain = empty(ScalarType::Float, floats, &a.logprob);
  Tensor tempered = empty(ScalarType::Float, floats, &a.tempered_logprob);
  Tensor margin = empty(ScalarType::Float, floats, &a.margin);
  fr::sample(a);
  return {token, plain, tempered, margin, status};
}

// The tokens of rows whose parameters are the same and whose sequences are 0, 1, ..., and how many rows cannot be drawn
// from. A tensor costs a call as much as some rows' draws, so there are but two.
std::tuple<Tensor, int64_t> draw(Tensor logits, double scale, int64_t top_k, int64_t top_p, double min_p, int64_t seed,
                                 int64_t step) {
  std::vector<Tensor> kept;
  fr::Sample a = draw_from(logits, kept);
  const auto rows = static_cast<size_t>(a.B);
  const std::vector<float> scales(rows, static_cast<float>(scale)), min_ps(rows, static_cast<float>(min_p));
  const std::vector<int64_t> top_ks(rows, top_k), top_ps(rows, top_p), seeds(rows, seed), steps(rows, step);
  std::vector<int64_t> sequences(rows);
  std::iota(sequences.begin(), sequences.end(), 0);
  std::vector<int32_t> statuses(rows);
  a.scale = scales.data(), a.min_p = min_ps.data(), a.top_k = top_ks.data(), a.top_p = top_ps.data();
  a.seed = seeds.data(), a.sequence = sequences.data(), a.step = steps.data(), a.status = statuses.data();
  Tensor token = empty(ScalarType::Long, a.B, &a.token);
  fr::sample(a);
  return {token, a.B - std::count(statuses.begin(), statuses.end(), 0)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_cpu, m) {
  m.def(
      "sample(Tensor logits, Tensor scale, Tensor top_k, Tensor top_p, Tensor min_p, Tensor? mask, Tensor seed,"
      " Tensor sequence, Tensor step, int mode_of, bool logprobs)"
      " -> (Tensor token, Tensor logprob, Tensor tempered_logprob, Tensor margin, Tensor status)");
  m.def(
      "draw(Tensor logits, float scale, int top_k, int top_p, float min_p, int seed, int step)"
      " -> (Tensor token, int refused)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_cpu, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("draw", TORCH_BOX(&draw));
}
