// What an exchange between the multiprocessors of a GPU costs, and how many clusters fit: the three figures on which
// the designs of persistent recurrent kernels rest. Prints lines `measure,parameter,value,unit`; every exchange checks
// the values that arrive. Status 1: a wrong value, a timeout or a CUDA error, 0 otherwise.
//
//   nvcc -O3 -std=c++20 -arch=sm_90a -o exchange bench/exchange.cu && ./exchange
//
// Sources: PTX ISA, "st.async", "mbarrier" and "mapa"; CUDA C++ Programming Guide, "Thread Block Clusters".
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

constexpr int kThreads = 256, kRounds = 2000;
[[maybe_unused]] constexpr int kLargestCluster = 16, kMostSlots = 32;
constexpr int kSharedBytes = 227 * 1024;
constexpr long long kPatience = 2'000'000'000;  // cycles that a spin may last: about a second

// What a kernel reports: cycles for all rounds, and how many values were wrong or never came.
struct Report {
  long long cycles;
  unsigned int faults;
};

#define CHECK(call)                                                                             \
  do {                                                                                          \
    const cudaError_t error = (call);                                                           \
    if (error != cudaSuccess) {                                                                 \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      exit(1);                                                                                  \
    }                                                                                           \
  } while (0)

// ---- 1. all-to-all in a cluster: every block pushes words of 8 bytes into every block's shared memory

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void push(uint32_t to, uint64_t value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to), "l"(value),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ bool has_come(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}
#endif

__device__ __forceinline__ uint64_t token_of(uint32_t round, uint32_t rank, uint32_t slot) {
  return (static_cast<uint64_t>(round) << 32) | (rank << 16) | slot;
}

// Owns:   a cluster; block `rank` sends `slots` words of 8 bytes to every block in each round.
// Keeps:  two buffers of cluster size x slots words and a barrier for each, in shared memory.
// Moves:  cluster size * slots * 8 bytes in and out of a block a round.
// Syncs:  mbarriers that count bytes. A block sends round r + 1 only after all of round r has come, so the other buffer
//         is free by then.
// Limits: slots <= kMostSlots; compute capability 9.0.
__global__ void __launch_bounds__(kThreads) cluster_all_to_all(uint32_t slots, Report* report) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ alignas(16) uint64_t buffer[2][kLargestCluster * kMostSlots];
  __shared__ alignas(8) uint64_t barrier[2];
  __shared__ int given_up;
  const cg::cluster_group cluster = cg::this_cluster();
  const uint32_t size = cluster.num_blocks(), rank = cluster.block_rank(), thread = threadIdx.x;
  const uint32_t bytes = size * slots * 8;
  if (thread == 0) {
    given_up = 0;
    for (int i = 0; i < 2; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster.sync();
  unsigned int faults = 0;
  const long long start = clock64();
  for (uint32_t round = 0; round < kRounds; ++round) {
    const uint32_t side = round & 1, parity = (round >> 1) & 1, here = shared_address(&barrier[side]);
    if (thread == 0) expect_bytes(here, bytes);
    for (uint32_t i = thread; i < size * slots; i += kThreads) {
      const uint32_t to = i / slots, slot = i % slots;
      push(in_block(shared_address(&buffer[side][rank * slots + slot]), to), token_of(round, rank, slot),
           in_block(here, to));
    }
    const long long since = clock64();
    while (!has_come(here, parity)) {
      if (clock64() - since > kPatience) {
        given_up = 1;
        break;
      }
    }
    for (uint32_t i = thread; i < size * slots; i += kThreads)
      faults += buffer[side][i] != token_of(round, i / slots, i % slots);
    __syncthreads();
    if (given_up) break;
  }
  const long long cycles = clock64() - start;
  if (faults) atomicAdd(&report->faults, faults);
  if (thread == 0 && given_up) atomicAdd(&report->faults, 1u);
  if (thread == 0 && rank == 0 && blockIdx.x < size) report->cycles = cycles;
  cluster.sync();  // no block may end while another writes into it
#endif
}

// The same number of strict cluster barriers and nothing else.
__global__ void __launch_bounds__(kThreads) cluster_barriers(Report* report) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const long long start = clock64();
  for (int round = 0; round < kRounds; ++round) cluster.sync();
  if (threadIdx.x == 0 && blockIdx.x == 0) report->cycles = clock64() - start;
#endif
}

// ---- 2. all-gather over the whole grid through L2: the data is its own flag

__device__ __forceinline__ void publish(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t look(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// Owns:   the whole grid, one block a multiprocessor; block b publishes one word a round, every block reads them all.
// Keeps:  nothing.
// Moves:  8 bytes a block a round to L2, grid * 8 bytes from it into each block.
// Syncs:  a word holds its round, so a reader knows it by itself; two buffers, and nobody is more than a round ahead,
//         for round r + 1 needs every block's word of it. Needs all blocks resident: a cooperative launch.
// Limits: gridDim.x <= kThreads.
__global__ void __launch_bounds__(kThreads) grid_all_gather(uint64_t* words, unsigned int* abort, Report* report) {
  const uint32_t blocks = gridDim.x, thread = threadIdx.x;
  __shared__ int given_up;
  if (thread == 0) given_up = 0;
  cg::this_grid().sync();
  unsigned int faults = 0;
  const long long start = clock64();
  for (uint32_t round = 1; round <= kRounds; ++round) {
    uint64_t* side = words + (round & 1) * blocks;
    if (thread == 0) publish(side + blockIdx.x, token_of(round, blockIdx.x, 0));
    if (thread < blocks) {
      const long long since = clock64();
      uint64_t word = look(side + thread);
      while (word >> 32 != round) {
        if (clock64() - since > kPatience || *static_cast<volatile unsigned int*>(abort)) {
          given_up = 1;
          *static_cast<volatile unsigned int*>(abort) = 1;
          break;
        }
        word = look(side + thread);
      }
      faults += word != token_of(round, thread, 0);
    }
    __syncthreads();
    if (given_up) break;
  }
  if (faults) atomicAdd(&report->faults, faults);
  if (thread == 0 && blockIdx.x == 0) report->cycles = clock64() - start;
}

// The same number of cooperative grid barriers and nothing else.
__global__ void __launch_bounds__(kThreads) grid_barriers(Report* report) {
  const cg::grid_group grid = cg::this_grid();
  grid.sync();
  const long long start = clock64();
  for (int round = 0; round < kRounds; ++round) grid.sync();
  if (threadIdx.x == 0 && blockIdx.x == 0) report->cycles = clock64() - start;
}

// ---- host

static int faults_seen = 0;

static void tell(const char* measure, const char* parameter, const Report& report) {
  printf("%s,%s,%.1f,cycles a round\n", measure, parameter, static_cast<double>(report.cycles) / kRounds);
  if (report.faults || report.cycles == 0) {
    fprintf(stderr, "%s %s: %u values were wrong or never came\n", measure, parameter, report.faults);
    faults_seen = 1;
  }
}

static cudaLaunchConfig_t cluster_launch(int size, int blocks, int shared_bytes, cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = size, attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = shared_bytes;
  config.attrs = attribute, config.numAttrs = 1;
  return config;
}

static void measure_clusters(Report* report) {
  for (const int size : {2, 4, 8, 16}) {
    cudaLaunchAttribute attribute;
    char parameter[64];
    if (size > 8) {
      CHECK(cudaFuncSetAttribute(cluster_all_to_all, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      CHECK(cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    for (const uint32_t slots : {4u, 32u}) {
      const cudaLaunchConfig_t config = cluster_launch(size, size, 0, &attribute);
      *report = {};
      CHECK(cudaLaunchKernelEx(&config, cluster_all_to_all, slots, report));
      CHECK(cudaDeviceSynchronize());
      snprintf(parameter, sizeof parameter, "cluster of %d x %u bytes", size, slots * 8);
      tell("all-to-all st.async", parameter, *report);
    }
    const cudaLaunchConfig_t config = cluster_launch(size, size, 0, &attribute);
    *report = {};
    CHECK(cudaLaunchKernelEx(&config, cluster_barriers, report));
    CHECK(cudaDeviceSynchronize());
    snprintf(parameter, sizeof parameter, "cluster of %d", size);
    tell("cluster.sync", parameter, *report);
  }
}

static void measure_occupancy() {
  CHECK(cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  for (const int size : {8, 16}) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_launch(size, size, kSharedBytes, &attribute);
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_barriers, &config));
    printf("active clusters,cluster of %d with %d KiB,%d,clusters\n", size, kSharedBytes / 1024, clusters);
  }
}

static void measure_grid(int multiprocessors, Report* report) {
  uint64_t* words;
  unsigned int* abort;
  CHECK(cudaMalloc(&words, 2 * sizeof(uint64_t) * multiprocessors));
  CHECK(cudaMemset(words, 0, 2 * sizeof(uint64_t) * multiprocessors));
  CHECK(cudaMalloc(&abort, sizeof *abort));
  CHECK(cudaMemset(abort, 0, sizeof *abort));
  char parameter[64];
  snprintf(parameter, sizeof parameter, "%d blocks", multiprocessors);
  *report = {};
  void* gather[] = {&words, &abort, &report};
  CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_all_gather), multiprocessors, kThreads, gather, 0,
                                    nullptr));
  CHECK(cudaDeviceSynchronize());
  tell("all-gather through L2", parameter, *report);
  *report = {};
  void* barriers[] = {&report};
  CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers), multiprocessors, kThreads, barriers, 0,
                                    nullptr));
  CHECK(cudaDeviceSynchronize());
  tell("grid.sync", parameter, *report);
  CHECK(cudaFree(words));
  CHECK(cudaFree(abort));
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  if (device.multiProcessorCount > kThreads) {
    fprintf(stderr, "the all-gather has a thread for each of at most %d multiprocessors, this GPU has %d\n", kThreads,
            device.multiProcessorCount);
    return 1;
  }
  Report* report;
  CHECK(cudaMallocManaged(&report, sizeof *report));
  printf("measure,parameter,value,unit\n");
  measure_grid(device.multiProcessorCount, report);
  if (device.major >= 9) {
    measure_clusters(report);
    measure_occupancy();
  }
  CHECK(cudaFree(report));
  return faults_seen;
}
