// The stacks of cuda_on_cpu.cpp's fibers, and how to change from one to another.
#pragma once

#if !defined(__x86_64__)
#error "stacks are switched by x86-64 instructions"
#endif

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif
#if defined(FR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 << 10, kPage = 4096;

// Saves the registers that a call must keep, and the stack pointer in *from; goes on where `to` was saved.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(.pushsection .text
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection)");

// Stacks with a page below that faults, and ThreadSanitizer's fibers, which are slow to make. A fiber that is used
// again counts as the same thread, so races between blocks that run one after another can be missed.
class StackPool {
 public:
  ~StackPool() {
    for (char* stack : stacks_) munmap(stack - kPage, kStackBytes + kPage);
  }
  // Of kStackBytes, the lowest byte; and its thread for ThreadSanitizer, or null.
  std::pair<char*, void*> lend() {
    if (stacks_.empty()) {
      void* p = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
      if (p == MAP_FAILED || mprotect(p, kPage, PROT_NONE) != 0) std::abort();
      stacks_.push_back(static_cast<char*>(p) + kPage);
    }
    if (fibers_.empty()) fibers_.push_back(tsan_fiber());
    const std::pair<char*, void*> lent(stacks_.back(), fibers_.back());
    stacks_.pop_back(), fibers_.pop_back();
    ASAN_UNPOISON_MEMORY_REGION(lent.first, kStackBytes);
    return lent;
  }
  void take_back(char* stack, void* fiber) { stacks_.push_back(stack), fibers_.push_back(fiber); }

 private:
#if defined(FR_TSAN)
  static void* tsan_fiber() { return __tsan_create_fiber(0); }
#else
  static void* tsan_fiber() { return nullptr; }
#endif
  std::vector<char*> stacks_;
  std::vector<void*> fibers_;
};

}  // namespace cuda_on_cpu
