// Runs CUDA C++ on the CPU, so that kernels can be tested and watched by sanitizers without a GPU. csrc/cuda/portable.h
// includes it where FR_CUDA_ON_CPU is defined; CUDA's own headers give the types, cuda_on_cpu.cpp is to be linked.
//
// Every CUDA thread is a fiber of the calling thread and runs until it waits at a barrier, so that threads of a warp
// diverge as far as they may. Blocks run one after another; those of a cooperative launch or of a cluster run together.
// Shared memory begins as NaN and under AddressSanitizer is surrounded by poison; under ThreadSanitizer every fiber is
// a thread of its own and barriers, shuffles and atomics are the only order among them. A barrier that some thread
// never reaches, or that threads reach at different places, aborts with the place.
//
// Not so on the CPU: memory is sequentially consistent, nothing limits registers, and a cooperative grid always fits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace cuda_on_cpu {

constexpr size_t kSharedBytes = 227 << 10;  // what a block can have on compute capability 9.0
constexpr int kMultiprocessors = 132;       // of an H100
constexpr int kExchangeWords = 8;

// In which order the threads of a gang, and the gangs of a grid, take their turns.
enum class Order { forward, backward, shuffled };
struct Options {
  Order order = Order::forward;
  uint64_t seed = 0;
  bool beside = false;     // a kernel runs beside the host, which waits for it where a stream's order asks for it
  bool no_graphs = false;  // none can be instantiated
};
inline Options options;

// Where in the source a thread waits.
struct Place {
  const char* file;
  int line;
};
#define FR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// What the running thread knows of itself.
struct Thread {
  uint3 thread, block;
  dim3 threads, blocks;
  unsigned lane, rank, mask;  // rank: of the block in its cluster; mask: of the last warp operation
};
const Thread& self();

// A kernel to run; cooperative: all blocks together, else those of a cluster.
struct Kernel {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  bool cooperative;
  std::function<void()> body;
};
// Runs it, or adds it to `graph` where what `stream` is given is recorded.
cudaError_t launch(cudaStream_t stream, const Kernel& kernel);
using Graph = std::vector<Kernel>;
struct Recording {
  cudaStream_t stream = nullptr;
  Graph* graph = nullptr;  // null: nothing is recorded
};
inline Recording recording;
[[noreturn]] void fail(const char* what);
// Whether a kernel runs beside the host, and until none does.
bool is_busy();
void wait_for_kernel();

void block_barrier(Place place);
void front_barrier(unsigned threads, Place place);
void cluster_arrive(Place place);
void cluster_wait(Place place);
void grid_barrier(Place place);
// Waits until every lane of `mask` that exists is here with the same mask.
void warp_barrier(unsigned mask, Place place);
// Lets the others run: for loops that wait for memory.
void spin(Place place);
// A lane's value for the warp operation that it is about to begin; and what a lane of the last one has given.
void put(const uint64_t* words, int count);
void get(unsigned lane, uint64_t* words, int count);

// The block's array that `key` names, and its dynamic shared memory.
void* find_shared(const void* key, size_t bytes);
void* dynamic_shared();
// The same place in another block of the cluster.
void* map_shared(void* shared, unsigned rank);
template <class T, size_t N, class Tag> T* shared_array(Tag) {
  static const char key = 0;
  return static_cast<T*>(find_shared(&key, sizeof(T) * N));
}

// Asynchronous copies happen when they are waited for, so that reading too early reads what was there before.
void copy_async(void* to, const void* from, unsigned bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending);

}  // namespace cuda_on_cpu

#include "cuda_on_cpu_device.h"
