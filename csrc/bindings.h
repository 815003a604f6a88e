// What the files that register kernels with torch share. They alone include torch, and of torch only its stable
// interface, so that one binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef FASTRNN_WITH_CUDA
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace fr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string dtype_name(ScalarType dtype) {
  constexpr std::pair<ScalarType, const char*> names[] = {
      {ScalarType::Float, "float32"}, {ScalarType::Double, "float64"}, {ScalarType::Half, "float16"},
      {ScalarType::Long, "int64"},    {ScalarType::Int, "int32"},      {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Bool, "bool"}};
  for (const auto& [known, name] : names)
    if (known == dtype) return name;
  return torch::headeronly::toString(dtype);
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + (t.dim() == 1 ? ",)" : ")");
}

inline Pool threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, void (*task)(int64_t, int64_t, void*), void* ctx) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { task(begin, end, ctx); });
          }};
}

#ifdef FASTRNN_WITH_CUDA
// torch's current stream of a GPU, a cudaStream_t. The function is in libtorch_cuda alone, which a CPU-only torch lacks
// and which no symbol of this module may need; where it is loaded, dlopen finds it.
inline void* current_stream(int64_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (get == nullptr) throw std::runtime_error("this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(static_cast<int32_t>(device), &stream));
  return stream;
}
#endif

}  // namespace fr
