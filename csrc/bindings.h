// What the files that register kernels with torch share. They alone include torch, and of torch only its stable
// interface, so that one binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef FASTRNN_WITH_CUDA
#include <dlfcn.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

// Each a letter of kernels.h with an optional factor: "T", "4H". T is left out by an x (B, I), a single step; L, of
// size 1, is there where h0 is (1, B, H), a slice of a stack's states.
using Dims = std::initializer_list<const char*>;

// One call of a cell's op: its name, its sizes and the dense copies of strided arguments, alive until the kernel is
// launched. Every tensor is where x is.
class CellCall {
 public:
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0;
  const char* h_from = "h0";  // the argument that H was read from, for messages
  ScalarType dtype;

  // dtypes: those that the op takes, for the message. alignment: of every argument's address, in bytes.
  CellCall(const char* op, const Tensor& x, const Tensor& h0, bool known, const char* dtypes, int64_t alignment)
      : dtype(x.scalar_type()), op_(op), alignment_(alignment), on_cpu_(x.is_cpu()) {
    if (!known)
      fail(std::string("x must be ") + dtypes + ", like every other argument, got " + dtype_name(x.scalar_type()));
    if (!on_cpu_) index_ = x.get_device_index();
    steps_ = x.dim() == 3, slice_ = h0.dim() == 3 && h0.size(0) == 1;
    if (!steps_ && x.dim() != 2) fail("x must be (T, B, I), got " + shape_of(x));
    if (!slice_ && h0.dim() != 2) fail("h0 must be (B, H), got " + shape_of(h0));
    T = steps_ ? x.size(0) : 1, B = x.size(steps_), I = x.size(steps_ + 1), H = P = h0.size(slice_ + 1);
    if (H < 1) fail("h0 must have at least one hidden unit, got " + shape_of(h0));
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(std::string(op_) + ": " + what); }
  int32_t device_index() const { return index_; }

  // The data of an argument after checking its dtype, device and shape.
  const void* data(const char* name, const Tensor& t, Dims dims) { return data(name, t, dtype, dims); }
  const void* data(const char* name, const MaybeTensor& t, Dims dims) { return t ? data(name, *t, dims) : nullptr; }
  // Their values are checked where they can be read.
  const int64_t* want_lengths(const MaybeTensor& t) {
    if (!t) return nullptr;
    const auto* lengths = static_cast<const int64_t*>(data("lengths", *t, ScalarType::Long, {"B"}));
    for (int64_t b = 0; on_cpu_ && b < B; ++b)
      if (lengths[b] < 0 || lengths[b] > T)
        fail("lengths must be within 0 and T=" + std::to_string(T) + ", got " + std::to_string(lengths[b]) +
             " for row " + std::to_string(b));
    return lengths;
  }
  const bool* want_reset(const MaybeTensor& t) {
    return t ? static_cast<const bool*>(data("reset", *t, ScalarType::Bool, {"T", "B"})) : nullptr;
  }
  bool is_relu(const std::string& nonlinearity) const {
    if (nonlinearity != "tanh" && nonlinearity != "relu")
      fail("nonlinearity must be 'tanh' or 'relu', got '" + nonlinearity + "'");
    return nonlinearity == "relu";
  }
  // A new result, uninitialised, and its data.
  template <class Number> Tensor result(Dims dims, Number** data) const { return result(dims, data, dtype); }
  template <class Number> Tensor result(Dims dims, Number** data, ScalarType of) const {
    int64_t sizes[3];
    int64_t n = 0;
    for (const char* dim : dims)
      if (has(dim)) sizes[n++] = size_of(dim);
    Tensor t = empty(n, sizes, of);
    *data = static_cast<Number*>(t.data_ptr());
    return t;
  }
  // The empty (0,) that stands for a result that is not there.
  template <class Number> Tensor none(Number** data, ScalarType of) const {
    const int64_t size = 0;
    *data = nullptr;
    return empty(1, &size, of);
  }

 private:
  const char* op_;
  int64_t alignment_;
  bool steps_, slice_, on_cpu_;
  int32_t index_ = 0;
  std::vector<Tensor> kept_;

  // A new dense tensor, uninitialised. Not torch::stable::new_empty, which looks its op up by name: 3 us.
  Tensor empty(int64_t dims, const int64_t* sizes, ScalarType of) const {
    int64_t strides[3];
    for (int64_t d = dims, stride = 1; d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dims, sizes, strides, static_cast<int32_t>(of),
        on_cpu_ ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), index_, &made));
    return Tensor(made);
  }

  bool has(const char* dim) const { return *dim == 'T' ? steps_ : *dim != 'L' || slice_; }
  int64_t size_of(const char* dim) const {
    const int64_t factor = *dim >= '0' && *dim <= '9' ? *dim++ - '0' : 1;
    return factor * (*dim == 'T' ? T : *dim == 'B' ? B : *dim == 'I' ? I : *dim == 'H' ? H : *dim == 'L' ? 1 : P);
  }

  const void* data(const char* name, const Tensor& t, ScalarType dtype, Dims dims) {
    if (t.scalar_type() != dtype)
      fail(std::string(name) + " must be " + dtype_name(dtype) + ", got " + dtype_name(t.scalar_type()));
    if (on_cpu_ && !t.is_cpu()) fail(std::string(name) + " must be on the CPU, like x");
    if (!on_cpu_ && (!t.is_cuda() || t.get_device_index() != index_))
      fail(std::string(name) + " must be on the GPU of x, number " + std::to_string(index_));
    const int64_t n = t.dim();
    int64_t d = 0;
    for (const char* dim : dims)
      if (has(dim) && (d == n || t.size(d++) != size_of(dim))) fail_shape(name, t, dims);
    if (d != n) fail_shape(name, t, dims);
    if (!t.is_contiguous()) return kept_.emplace_back(torch::stable::contiguous(t)).data_ptr();
    if (reinterpret_cast<uintptr_t>(t.data_ptr()) % alignment_ == 0) return t.data_ptr();
    return kept_.emplace_back(torch::stable::clone(t)).data_ptr();
  }

  // "w_hh must be (4H, H) = (1024, 256) because h0 has H=256, got (1024, 128)"
  [[noreturn]] void fail_shape(const char* name, const Tensor& t, Dims dims) const {
    std::string letters, sizes, why;
    for (const char* dim : dims) {
      if (!has(dim)) continue;
      letters += (letters.empty() ? "" : ", ") + std::string(dim);
      sizes += (sizes.empty() ? "" : ", ") + std::to_string(size_of(dim));
      const char letter[] = {*dim >= '0' && *dim <= '9' ? dim[1] : dim[0], 0};
      const std::string from = *letter == 'H' ? h_from : *letter == 'P' ? "h0" : "x";
      const std::string reason = from + " has " + letter + "=" + std::to_string(size_of(letter));
      if (why.find(reason) == std::string::npos) why += (why.empty() ? "" : " and ") + reason;
    }
    const std::string end = dims.size() == 1 ? ",)" : ")";
    fail(std::string(name) + " must be (" + letters + end + " = (" + sizes + end + " because " + why + ", got " +
         shape_of(t));
  }
};

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
