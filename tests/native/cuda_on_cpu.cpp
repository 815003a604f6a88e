// The scheduler of cuda_on_cpu.h: fibers, their turns, and what they wait for.
//
// Its own memory is no business of ThreadSanitizer's: for that one this file is compiled without -fsanitize=thread and
// with FR_TSAN defined, and allocates nothing while threads run but what a single one of them uses.
#include "cuda_on_cpu_gang.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

namespace cuda_on_cpu {
namespace {

Fiber* running = nullptr;

[[noreturn]] void fail(const char* what, const Fiber* who) {
  std::fprintf(stderr, "cuda_on_cpu: %s", what);
  if (who) {
    const uint3 b = who->self.block, t = who->self.thread;
    std::fprintf(stderr, ": block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    if (who->place.file) std::fprintf(stderr, " at %s:%d", who->place.file, who->place.line);
  }
  std::fprintf(stderr, "\n");
  std::abort();
}

// What ThreadSanitizer takes for an order between threads.
#if defined(FR_TSAN)
void acquire(void* p) { __tsan_acquire(p); }
void release(void* p) { __tsan_release(p); }
#else
void acquire(void*) {}
void release(void*) {}
#endif
StackPool pool;
char launched, returned;  // the order between a launch and its threads

void go(Fiber* from, Fiber* to) {
  running = to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from->state == State::done ? nullptr : &from->fake_stack, to->stack_bottom,
                                 to->stack_bytes);
#endif
#if defined(FR_TSAN)
  __tsan_switch_to_fiber(to->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  cuda_on_cpu_switch(&from->stack_pointer, to->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void wait(State state, Place place) {
  Fiber* me = running;
  me->state = state, me->place = place;
  go(me, me->gang->scheduler);
}

void arrive(Barrier& barrier, Place place) {
  Fiber* me = running;
  me->place = place;
  if (barrier.waiting.empty()) barrier.place = place;
  if (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file) != 0)
    fail("threads wait at different barriers", me);
  release(&barrier.order);
  barrier.waiting.push_back(me);
  if (barrier.waiting.size() == barrier.size) {
    for (Fiber* fiber : barrier.waiting) fiber->state = State::ready;
    barrier.waiting.clear();
  } else {
    wait(State::at_barrier, place);
  }
  acquire(&barrier.order);
}

// A piece of the block's shared memory.
unsigned char* carve(Block& block, size_t bytes) {
  const size_t at = (block.used + 127) / 128 * 128;
  if (at + bytes > kArenaBytes) fail("more shared memory than a block can have", running);
  block.used = at + bytes + 128;
  ASAN_UNPOISON_MEMORY_REGION(block.arena + at, bytes);
  return block.arena + at;
}

// Where a fiber begins.
void enter() {
  Fiber* me = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &me->gang->scheduler->stack_bottom, &me->gang->scheduler->stack_bytes);
#endif
  acquire(&launched);
  (*me->gang->body)();
  release(&returned);
  me->state = State::done;
  ++me->gang->finished;
  go(me, me->gang->scheduler);
  std::abort();
}

void prepare(Fiber& fiber) {
  std::tie(fiber.stack, fiber.tsan_fiber) = pool.lend();
  fiber.stack_bottom = fiber.stack;
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void set_up(Gang& gang, dim3 grid, dim3 dim, size_t shared_bytes) {
  const unsigned threads = dim.x * dim.y * dim.z;
  gang.fibers.resize(gang.blocks.size() * threads);
  gang.grid_barrier.size = gang.cluster_barrier.size = gang.fibers.size();
  gang.grid_barrier.waiting.reserve(gang.fibers.size());
  gang.cluster_barrier.waiting.reserve(gang.fibers.size());
  for (size_t b = 0; b < gang.blocks.size(); ++b) {
    Block& block = gang.blocks[b];
    block.barrier.size = threads;
    block.barrier.waiting.reserve(threads);
    block.front.waiting.reserve(threads);
    block.arrays.reserve(kMostArrays);
    block.warps.resize((threads + 31) / 32);
    block.arena = static_cast<unsigned char*>(std::aligned_alloc(128, kArenaBytes));
    std::memset(block.arena, 0xff, kArenaBytes);  // NaN in every format of floats
    ASAN_POISON_MEMORY_REGION(block.arena, kArenaBytes);
    block.dynamic = carve(block, shared_bytes);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = gang.fibers[b * threads + i];
      fiber.self.thread = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
      fiber.self.block = block.index, fiber.self.threads = dim, fiber.self.blocks = grid;
      fiber.self.lane = i % 32, fiber.self.rank = static_cast<unsigned>(b);
      fiber.gang = &gang, fiber.block = &block, fiber.warp = &block.warps[i / 32];
      fiber.warp->lanes |= 1u << i % 32;
      fiber.warp->lane[i % 32] = &fiber;
      prepare(fiber);
    }
  }
}

template <class T> void arrange(std::vector<T>& all, std::mt19937_64& random) {
  if (options.order == Order::backward) std::sort(all.rbegin(), all.rend());
  if (options.order == Order::shuffled) std::shuffle(all.begin(), all.end(), random);
}

// Gives every fiber its turn until all have returned.
void take_turns(Gang& gang, std::mt19937_64& random) {
  std::vector<Fiber*> turn;
  for (Fiber& fiber : gang.fibers) turn.push_back(&fiber);
  for (unsigned spins = 0; gang.finished < gang.fibers.size(); ++spins) {
    arrange(turn, random);
    bool ran = false;
    for (Fiber* fiber : turn) {
      if (fiber->state != State::ready && fiber->state != State::spinning) continue;
      if (fiber->state == State::ready) spins = 0;
      ran = true;
      go(gang.scheduler, fiber);
    }
    if (ran && spins < kMostSpins) continue;
    for (const Fiber& fiber : gang.fibers)
      if (fiber.state != State::done)
        fail(ran ? "a thread waits for memory that nobody writes" : "a thread waits that others never join", &fiber);
  }
}

void run(Gang& gang, dim3 grid, dim3 block, size_t shared_bytes, std::mt19937_64& random) {
  Fiber scheduler;
  gang.scheduler = &scheduler;
#if defined(FR_TSAN)
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  set_up(gang, grid, block, shared_bytes);
  release(&launched);
  take_turns(gang, random);
  acquire(&returned);
  running = nullptr;
  for (Fiber& fiber : gang.fibers) pool.take_back(fiber.stack, fiber.tsan_fiber);
  for (Block& each : gang.blocks) {
    ASAN_UNPOISON_MEMORY_REGION(each.arena, kArenaBytes);
    std::free(each.arena);
  }
}

}  // namespace

const Thread& self() { return running->self; }

void fail(const char* what) { fail(what, running); }

namespace {

void run_grid(dim3 grid, dim3 block, size_t gang_blocks, size_t shared_bytes, bool cooperative,
              const std::function<void()>& body) {
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  std::vector<size_t> first;
  for (size_t i = 0; i < blocks; i += gang_blocks) first.push_back(i);
  std::mt19937_64 random(options.seed);
  arrange(first, random);
  for (const size_t at : first) {
    Gang gang{cooperative, &body, std::vector<Block>(gang_blocks), {}, {}, {}};
    for (size_t i = 0; i < gang_blocks; ++i) {
      const auto n = static_cast<unsigned>(at + i);
      gang.blocks[i].index = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
    }
    run(gang, grid, block, shared_bytes, random);
  }
}

std::thread beside;  // the kernel that runs beside the host
std::atomic<bool> busy;

}  // namespace

bool is_busy() { return busy.load(std::memory_order_acquire); }
void wait_for_kernel() {
  if (beside.joinable()) beside.join();
}

cudaError_t launch(cudaStream_t stream, const Kernel& kernel) {
  const auto& [grid, block, cluster, shared_bytes, cooperative, body] = kernel;
  if (recording.graph != nullptr && stream == recording.stream) {
    recording.graph->push_back(kernel);
    return cudaSuccess;
  }
  wait_for_kernel();
  const size_t blocks = size_t{grid.x} * grid.y * grid.z, threads = size_t{block.x} * block.y * block.z;
  const size_t size = cooperative ? blocks : size_t{cluster.x} * cluster.y * cluster.z;
  if (running || blocks == 0 || threads == 0 || threads > 1024 || shared_bytes > kSharedBytes || blocks % size)
    return cudaErrorInvalidConfiguration;
  if (!options.beside) {
    run_grid(grid, block, size, shared_bytes, cooperative, body);
    return cudaSuccess;
  }
  busy = true;
  beside = std::thread([=] {
    run_grid(kernel.grid, kernel.block, size, kernel.shared_bytes, kernel.cooperative, kernel.body);
    busy.store(false, std::memory_order_release);
  });
  return cudaSuccess;
}

void block_barrier(Place place) { arrive(running->block->barrier, place); }
void front_barrier(unsigned threads, Place place) {
  Block& block = *running->block;
  running->place = place;
  if (threads == 0 || threads % 32 != 0 || threads > block.barrier.size) fail("a front of no whole warps", running);
  if (running->warp - block.warps.data() >= threads / 32)
    fail("a thread waits with a front that it is not in", running);
  if (!block.front.waiting.empty() && block.front.size != threads) fail("threads wait with different fronts", running);
  block.front.size = threads;
  arrive(block.front, place);
}
void cluster_arrive(Place place) {
  Fiber* me = running;
  HalvedBarrier& barrier = me->gang->cluster_barrier;
  me->place = place;
  if (me->arrived) fail("a thread arrives again without having waited", me);
  if (barrier.arrived == 0) barrier.place = place;
  if (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file) != 0)
    fail("threads arrive at different barriers", me);
  me->arrived = true, me->turn = barrier.turn;
  release(&barrier.order[barrier.turn % 2]);
  if (++barrier.arrived < barrier.size) return;
  barrier.arrived = 0, ++barrier.turn;
  for (Fiber* fiber : barrier.waiting) fiber->state = State::ready;
  barrier.waiting.clear();
}
void cluster_wait(Place place) {
  Fiber* me = running;
  HalvedBarrier& barrier = me->gang->cluster_barrier;
  me->place = place;
  if (!me->arrived) fail("a thread waits without having arrived", me);
  if (barrier.turn == me->turn) {
    barrier.waiting.push_back(me);
    wait(State::at_barrier, place);
  }
  me->arrived = false;
  acquire(&barrier.order[me->turn % 2]);
}
void grid_barrier(Place place) {
  if (!running->gang->cooperative) fail("a grid barrier in a launch that is not cooperative", running);
  arrive(running->gang->grid_barrier, place);
}
void spin(Place place) { wait(State::spinning, place); }

void warp_barrier(unsigned mask, Place place) {
  Fiber* me = running;
  Warp& warp = *me->warp;
  me->place = place, me->self.mask = mask &= warp.lanes;
  if (!(mask >> me->self.lane & 1)) fail("a lane is not in the mask of its own warp operation", me);
  release(&warp.order);
  bool all = true;
  unsigned char slots[32] = {};
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber& other = *warp.lane[l];
    if (other.state == State::done) fail("a lane of the mask of a warp operation has returned", me);
    all = all && (&other == me || (other.state == State::at_warp && other.self.mask == mask));
    slots[l] = other.exchanges % 4;
  }
  if (all) {
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1) std::copy_n(slots, 32, warp.lane[l]->partner_slot), warp.lane[l]->state = State::ready;
  } else {
    wait(State::at_warp, place);
  }
  acquire(&warp.order);
}

void put(const uint64_t* words, int count) {
  volatile uint64_t* slot = running->warp->slot[++running->exchanges % 4][running->self.lane];
  for (int i = 0; i < count; ++i) slot[i] = words[i];
}
// Of a lane outside the mask, which CUDA leaves undefined: the lane's own.
void get(unsigned lane, uint64_t* words, int count) {
  if (!(running->self.mask >> lane & 1)) lane = running->self.lane;
  const volatile uint64_t* slot = running->warp->slot[running->partner_slot[lane]][lane];
  for (int i = 0; i < count; ++i) words[i] = slot[i];
}

void* find_shared(const void* key, size_t bytes) {
  Block& block = *running->block;
  for (const Block::Array& array : block.arrays)
    if (array.key == key) return array.data;
  if (block.arrays.size() == kMostArrays) fail("more shared arrays than cuda_on_cpu has room for", running);
  block.arrays.push_back({key, carve(block, bytes)});
  return block.arrays.back().data;
}
void* dynamic_shared() { return running->block->dynamic; }
void* map_shared(void* shared, unsigned rank) {
  const auto offset = static_cast<unsigned char*>(shared) - running->block->arena;
  return running->gang->blocks[rank].arena + offset;
}

void copy_async(void* to, const void* from, unsigned bytes) {
  running->copies.push_back({to, from, bytes, running->copy_groups});
}
void copy_async_commit() { ++running->copy_groups; }
void copy_async_wait(unsigned pending) {
  Fiber& me = *running;
  std::erase_if(me.copies, [&](const Fiber::Copy& copy) {
    const bool due = copy.group + pending < me.copy_groups;
    if (due) std::memcpy(copy.to, copy.from, copy.bytes);
    return due;
  });
}

}  // namespace cuda_on_cpu
