// What runs together in cuda_on_cpu.cpp: a gang of blocks, their warps and the fibers that are their threads, and where
// these wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cuda_on_cpu.h"
#include "cuda_on_cpu_stacks.h"

namespace cuda_on_cpu {

constexpr size_t kMostArrays = 64;
constexpr size_t kArenaBytes = kSharedBytes + kMostArrays * 256;  // with gaps between the arrays
constexpr unsigned kMostSpins = 1u << 22;

struct Fiber;

struct Barrier {
  size_t size = 0;  // how many threads it waits for
  Place place{};
  std::vector<Fiber*> waiting;
  char order = 0;  // what ThreadSanitizer knows it by
};

// A cluster's barrier: who has arrived goes on until it waits.
struct HalvedBarrier {
  size_t size = 0, arrived = 0;
  unsigned turn = 0;
  Place place{};
  std::vector<Fiber*> waiting;
  char order[2] = {};  // taking turns: who is late to wait sees nothing of what others do before the next turn
};

// A lane writes slot `exchanges % 4` of its own. It reads at the latest one turn of every lane after the last one has
// written, and until then none writes more than two values: with four slots nothing is overwritten before it is read.
struct Warp {
  unsigned lanes = 0;  // a bit for each
  Fiber* lane[32] = {};
  uint64_t slot[4][32][kExchangeWords];
  char order = 0;
};

struct Block {
  uint3 index;
  std::vector<Warp> warps;
  Barrier barrier, front;  // of all threads, and of the first ones
  unsigned char* arena = nullptr;
  size_t used = 0;
  unsigned char* dynamic = nullptr;
  struct Array {
    const void* key;
    unsigned char* data;
  };
  std::vector<Array> arrays;
};

// Blocks that run together.
struct Gang {
  bool cooperative;
  const std::function<void()>* body;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier grid_barrier;
  HalvedBarrier cluster_barrier;
  Fiber* scheduler = nullptr;
  size_t finished = 0;
};

enum class State { ready, spinning, at_barrier, at_warp, done };

struct Fiber {
  Thread self{};
  Gang* gang = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::ready;
  Place place{};
  bool arrived = false;              // at the cluster's barrier, without having waited
  unsigned turn = 0;                 // of that barrier
  unsigned exchanges = 0;            // how many it has begun
  unsigned char partner_slot[32]{};  // which slot of each lane belongs to the last exchange
  struct Copy {
    void* to;
    const void* from;
    unsigned bytes, group;
  };
  std::vector<Copy> copies;
  unsigned copy_groups = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = kStackBytes;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;
};

}  // namespace cuda_on_cpu
