// What CUDA C++ gives to device code, for cuda_on_cpu.h: indices, barriers, shuffles, atomics, intrinsics; and the few
// functions of the runtime that launchers call.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cuda_on_cpu.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "shared memory is declared by FR_SHARED or FR_DYNAMIC_SHARED");

#define threadIdx (cuda_on_cpu::self().thread)
#define blockIdx (cuda_on_cpu::self().block)
#define blockDim (cuda_on_cpu::self().threads)
#define gridDim (cuda_on_cpu::self().blocks)
#define warpSize 32

inline void __syncthreads(FR_PLACE) { cuda_on_cpu::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, FR_PLACE) { cuda_on_cpu::warp_barrier(mask, {file, line}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, FR_PLACE) { cuda_on_cpu::spin({file, line}); }
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("__trap"); }

namespace cuda_on_cpu {

// Every lane of the mask gives a value; what lane_of then reads is what that lane has given.
template <class T> void exchange(unsigned mask, const T& value, Place place) {
  constexpr int kWords = (sizeof(T) + 7) / 8;
  static_assert(kWords <= kExchangeWords);
  uint64_t words[kWords] = {};
  __builtin_memcpy(words, &value, sizeof(T));
  put(words, kWords);
  warp_barrier(mask, place);
}
template <class T> T lane_of(unsigned lane) {
  uint64_t words[(sizeof(T) + 7) / 8];
  T value;
  get(lane, words, sizeof words / 8);
  __builtin_memcpy(&value, words, sizeof(T));
  return value;
}
inline unsigned lane() { return self().lane; }

}  // namespace cuda_on_cpu

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32, FR_PLACE) {
  cuda_on_cpu::exchange(mask, value, {file, line});
  const unsigned w = static_cast<unsigned>(width), l = cuda_on_cpu::lane();
  return cuda_on_cpu::lane_of<T>((l & ~(w - 1)) | (static_cast<unsigned>(from) & (w - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, FR_PLACE) {
  cuda_on_cpu::exchange(mask, value, {file, line});
  const unsigned w = static_cast<unsigned>(width), l = cuda_on_cpu::lane(), from = l ^ static_cast<unsigned>(bits);
  return cuda_on_cpu::lane_of<T>((from & ~(w - 1)) > (l & ~(w - 1)) ? l : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, FR_PLACE) {
  cuda_on_cpu::exchange(mask, value, {file, line});
  const unsigned w = static_cast<unsigned>(width), l = cuda_on_cpu::lane();
  return cuda_on_cpu::lane_of<T>((l & (w - 1)) + by < w ? l + by : l);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, FR_PLACE) {
  cuda_on_cpu::exchange(mask, value, {file, line});
  const unsigned w = static_cast<unsigned>(width), l = cuda_on_cpu::lane();
  return cuda_on_cpu::lane_of<T>((l & (w - 1)) >= by ? l - by : l);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FR_PLACE) {
  cuda_on_cpu::exchange(mask, predicate, {file, line});
  unsigned bits = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (cuda_on_cpu::self().mask >> l & 1) bits |= (cuda_on_cpu::lane_of<int>(l) != 0 ? 1u : 0u) << l;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, FR_PLACE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FR_PLACE) { return !__ballot_sync(mask, !predicate, file, line); }

// As CUDA's, but ordered: they acquire and release.
template <class T, class F> T cuda_on_cpu_update(T* p, F next) {
  T old, now;
  __atomic_load(p, &old, __ATOMIC_ACQUIRE);
  do now = next(old);
  while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old;
}
template <class T> T atomicAdd(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_update(p, [&](T old) { return static_cast<T>(old + v); });
}
template <class T> T atomicMax(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_update(p, [&](T old) { return old > v ? old : v; });
}
template <class T> T atomicMin(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_update(p, [&](T old) { return old < v ? old : v; });
}
template <class T> T atomicOr(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_update(p, [&](T old) { return static_cast<T>(old | v); });
}
template <class T> T atomicExch(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_update(p, [&](T) { return v; });
}
template <class T> T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, FR_PLACE) {
  cuda_on_cpu::spin({file, line});
  __atomic_compare_exchange(p, &expected, &v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
template <class T> void __stcs(T* p, T v) { *p = v; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
#define __expf(x) expf(x)

// The runtime: device memory is memory, streams are in order with each other, a graph is the kernels that were
// recorded.
extern "C" {
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : code == cudaErrorNotSupported ? "operation not supported" : "refused";
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  cuda_on_cpu::wait_for_kernel();
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  cuda_on_cpu::wait_for_kernel();
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  cuda_on_cpu::wait_for_kernel();
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
// Poisoned, as device memory may be.
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = std::malloc(bytes);
  if (*p == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  cuda_on_cpu::wait_for_kernel();
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cuda_on_cpu::wait_for_kernel();
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
// The default stream cannot be recorded.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || cuda_on_cpu::recording.graph != nullptr) return cudaErrorStreamCaptureUnsupported;
  cuda_on_cpu::recording = {stream, new cuda_on_cpu::Graph};
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (cuda_on_cpu::recording.graph == nullptr || stream != cuda_on_cpu::recording.stream) return cudaErrorIllegalState;
  *graph = reinterpret_cast<cudaGraph_t>(cuda_on_cpu::recording.graph);
  cuda_on_cpu::recording = {};
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<cuda_on_cpu::Graph*>(graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  if (cuda_on_cpu::options.no_graphs) return cudaErrorNotSupported;
  *made = reinterpret_cast<cudaGraphExec_t>(new cuda_on_cpu::Graph(*reinterpret_cast<cuda_on_cpu::Graph*>(graph)));
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph));
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const cuda_on_cpu::Kernel& kernel : *reinterpret_cast<cuda_on_cpu::Graph*>(graph))
    if (const cudaError_t code = cuda_on_cpu::launch(stream, kernel); code != cudaSuccess) return code;
  return cudaSuccess;
}
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cuda_on_cpu::is_busy() ? cudaErrorNotReady : cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Of an H100: compute capability 9.0.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_cpu::kMultiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_cpu::kSharedBytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
}
