// What a .cu file includes instead of CUDA's headers: the same source is compiled by nvcc for a GPU and, where
// FR_CUDA_ON_CPU is defined, by a C++ compiler whose program runs it on the CPU (tests/native/cuda_on_cpu.h).
//
// A kernel is CUDA C++ but for this: shared memory is declared by FR_SHARED and FR_DYNAMIC_SHARED, launches go through
// FR_LAUNCH and its kin, and what has no plain C++ (tensor cores, asynchronous copies, clusters, ordered loads and
// stores) is one function here with a plain twin. A launcher returns the launch's cudaError_t.
#pragma once

#if defined(FR_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

// FR_SHARED(type, name, count): name is `count` elements, one array a block. FR_DYNAMIC_SHARED(type, name): name points
// at the bytes that the launch asked for, 128-byte aligned; the same bytes whatever the type.
// FR_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...), with the kernel in parentheses if a comma is in
// it. _COOP: all blocks run at once and may meet in fr::grid_sync. _CLUSTER has the blocks of a cluster after the
// kernel.
#define FR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  fr::launch(fr::Launch{grid, block, 1, shared_bytes, stream, false}, kernel __VA_OPT__(, ) __VA_ARGS__)
#define FR_LAUNCH_COOP(kernel, grid, block, shared_bytes, stream, ...) \
  fr::launch(fr::Launch{grid, block, 1, shared_bytes, stream, true}, kernel __VA_OPT__(, ) __VA_ARGS__)
#define FR_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  fr::launch(fr::Launch{grid, block, cluster, shared_bytes, stream, false}, kernel __VA_OPT__(, ) __VA_ARGS__)

namespace fr {

struct Launch {
  dim3 grid, block;
  unsigned cluster;  // blocks along x that share a cluster; 1: none
  size_t shared_bytes;
  cudaStream_t stream;
  bool cooperative;
};

#if defined(FR_CUDA_ON_CPU)

#define FR_SHARED(type, name, count) type* const name = cuda_on_cpu::shared_array<type, (count)>([] {})
#define FR_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared())

template <class... P, class... A> cudaError_t launch(const Launch& how, void (*kernel)(P...), A... arguments) {
  return cuda_on_cpu::launch(how.stream, {how.grid, how.block, dim3(how.cluster), how.shared_bytes, how.cooperative,
                                          [=] { kernel(static_cast<P>(arguments)...); }});
}

inline uint32_t warp_max(uint32_t v, FR_PLACE) {
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, v, step, 32, file, line);
    v = other > v ? other : v;
  }
  return v;
}
// How many clusters run at once; see below.
template <class... P> int clusters_at_once(void (*)(P...), unsigned cluster, unsigned, size_t) {
  return cuda_on_cpu::kMultiprocessors / static_cast<int>(cluster);
}

inline void front_sync(unsigned threads, FR_PLACE) { cuda_on_cpu::front_barrier(threads, {file, line}); }
inline void grid_sync(FR_PLACE) { cuda_on_cpu::grid_barrier({file, line}); }
inline void cluster_arrive(FR_PLACE) { cuda_on_cpu::cluster_arrive({file, line}); }
inline void cluster_wait(FR_PLACE) { cuda_on_cpu::cluster_wait({file, line}); }
inline void cluster_sync(FR_PLACE) { cluster_arrive(file, line), cluster_wait(file, line); }
inline unsigned cluster_rank() { return cuda_on_cpu::self().rank; }
template <class T> T* cluster_map(T* shared, unsigned rank) {
  return static_cast<T*>(cuda_on_cpu::map_shared(shared, rank));
}

template <class T> T load_acquire(const T* p, FR_PLACE) {
  cuda_on_cpu::spin({file, line});
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
template <class T> void store_release(T* p, T value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
inline void store_release_system(int32_t* p, int32_t value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }

template <int Bytes> void copy_async(void* shared, const void* global) {
  cuda_on_cpu::copy_async(shared, global, Bytes);
}
inline void copy_async_commit() { cuda_on_cpu::copy_async_commit(); }
template <int Pending> void copy_async_wait() { cuda_on_cpu::copy_async_wait(Pending); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FR_PLACE) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto value = [](uint32_t pair, unsigned k) {
    return __builtin_bit_cast(float, k % 2 ? pair & 0xffff0000u : pair << 16);
  };
  cuda_on_cpu::exchange(~0u, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, {file, line});
  const unsigned group = cuda_on_cpu::lane() / 4, pair = cuda_on_cpu::lane() % 4;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = group + e / 2 * 8, column = pair * 2 + e % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const auto left = cuda_on_cpu::lane_of<Operands>(row % 8 * 4 + k % 8 / 2);
      const auto right = cuda_on_cpu::lane_of<Operands>(column * 4 + k % 8 / 2);
      d[e] += value(left.a[row / 8 + k / 8 * 2], k) * value(right.b[k / 8], k);
    }
  }
}

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
inline void load_matrix_x4(uint32_t (&out)[4], const void* row, FR_PLACE) {
  cuda_on_cpu::exchange(~0u, row, {file, line});
  const unsigned l = cuda_on_cpu::lane();
  for (unsigned m = 0; m < 4; ++m)
    __builtin_memcpy(&out[m], static_cast<const char*>(cuda_on_cpu::lane_of<const void*>(m * 8 + l / 4)) + l % 4 * 4,
                     4);
}

#else

#define FR_SHARED(type, name, count) __shared__ type name[count]
#define FR_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char fr_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fr_dynamic_shared)

template <class... P, class... A> cudaError_t launch(const Launch& how, void (*kernel)(P...), A... arguments) {
  constexpr size_t kGranted = 48 << 10;  // more dynamic shared memory than this must be asked for
  const void* function = reinterpret_cast<const void*>(kernel);
  if (how.shared_bytes > kGranted) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  constexpr unsigned kPortableCluster = 8;
  if (how.cluster > kPortableCluster) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute[2];
  unsigned count = 0;
  if (how.cooperative) {
    attribute[count].id = cudaLaunchAttributeCooperative;
    attribute[count++].val.cooperative = 1;
  }
  if (how.cluster > 1) {
    attribute[count].id = cudaLaunchAttributeClusterDimension;
    attribute[count++].val.clusterDim = {how.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid, config.blockDim = how.block, config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream, config.attrs = attribute, config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

// How many clusters of so many CTAs the current device runs at once, each CTA with so many threads and so much dynamic
// shared memory; 0 where it has none so large. A cluster of one is a CTA: one for each multiprocessor.
template <class... P>
int clusters_at_once(void (*kernel)(P...), unsigned cluster, unsigned threads, size_t shared_bytes) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  const bool asked = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)) == cudaSuccess &&
                     cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
  if (!asked) cudaGetLastError();  // which would be taken for that of the next launch
  return asked ? clusters : 0;
}

// The largest of a warp's numbers.
__device__ __forceinline__ uint32_t warp_max(uint32_t v) { return __reduce_max_sync(~0u, v); }

// The first `threads` threads of a block, whole warps, wait for each other; the others go on.
__device__ __forceinline__ void front_sync(unsigned threads) {
  asm volatile("barrier.sync 1, %0;" ::"r"(threads) : "memory");
}
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Clusters exist from compute capability 9.0 on; a launch with one fails below that.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
// Its two halves: what a thread has written before it arrives, the threads of the cluster see after they have waited.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
// The same place of the shared memory of another block of the cluster.
template <class T> __device__ __forceinline__ T* cluster_map(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// Of 4 or 8 bytes of global memory, ordered among all threads of the GPU.
template <class T> __device__ __forceinline__ T load_acquire(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "l"(p) : "memory");
  else
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(reinterpret_cast<uint64_t&>(value)) : "l"(p) : "memory");
  return value;
}
template <class T> __device__ __forceinline__ void store_release(T* p, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4)
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(reinterpret_cast<uint32_t&>(value)) : "memory");
  else
    asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(reinterpret_cast<uint64_t&>(value)) : "memory");
}

// Ordered among all threads of the GPU and of the host.
__device__ __forceinline__ void store_release_system(int32_t* p, int32_t value) {
  asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Copies 4, 8 or 16 bytes, aligned to that, while the thread goes on; commit closes a group, wait<n> lets at most the
// last n groups be under way. What other threads have copied needs a barrier after the wait as well.
template <int Bytes> __device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8) of a warp: bf16 pairs in the lanes as the PTX ISA lays out mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8 and
// gets columns 2 (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

#endif

}  // namespace fr
