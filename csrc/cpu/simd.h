// Runtime choice among the instruction sets that the kernels are compiled for, and scratch memory. Baseline code only:
// nothing here may be used from inside a kernel's inner loops.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "../kernels.h"

// 0 leaves only the portable variant, which is what other processors have.
#ifndef FR_X86
#if defined(__x86_64__) && defined(__GNUC__)
#define FR_X86 1
#else
#define FR_X86 0
#endif
#endif
// 1 leaves only AVX-512 and above (each_isa.h).
#ifndef FR_WIDEST_ONLY
#define FR_WIDEST_ONLY 0
#endif
#if FR_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 takes the header's own undefined vectors for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
// Whether this compiler knows AVX-512's products of pairs of bfloat16 and of quads of int8.
#if FR_X86 && (defined(__clang__) || __GNUC__ >= 10)
#define FR_KNOWS_DOTS 1
#else
#define FR_KNOWS_DOTS 0
#endif
// Whether this compiler knows the matrix tiles (AMX) and this system lends them to a process that asks.
#if FR_X86 && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FR_KNOWS_AMX 1
#else
#define FR_KNOWS_AMX 0
#endif

namespace fr {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// What the next call runs; the errors of cpu_isa().
Isa current_isa();

// A thread's memory for scratch, kept for its next call: fresh pages cost more than small kernels do. Last taken is
// first given back, which objects on the stack see to.
class Arena {
 public:
  static Arena& of_thread() {
    static thread_local Arena arena;
    return arena;
  }
  // Memory of the arena, or null where it does not fit and the caller has to find its own.
  char* take(size_t bytes) {
    live_ += bytes;
    if (live_ > peak_) peak_ = live_;
    if (top_ + bytes > size_) return nullptr;
    top_ += bytes;
    return data_ + top_ - bytes;
  }
  void give_back(size_t bytes, bool taken_here) {
    live_ -= bytes;
    if (taken_here) top_ -= bytes;
    if (live_ == 0 && peak_ > size_ && size_ < limit) grow();
  }
  ~Arena() { std::free(data_); }

 private:
  static constexpr size_t limit = 16 << 20;
  char* data_ = nullptr;
  size_t size_ = 0, top_ = 0, live_ = 0, peak_ = 0;

  void grow() {
    std::free(data_);
    size_ = peak_ < limit ? peak_ : limit;
    data_ = static_cast<char*>(std::aligned_alloc(64, size_));
    if (!data_) size_ = 0;
  }
};

// A kernel's scratch: n uninitialised elements of F on cache lines of their own, until the end of the scope.
template <class F> class Scratch {
 public:
  explicit Scratch(int64_t n) {
    if (n <= 0) return;
    bytes_ = (static_cast<size_t>(n) * sizeof(F) + 63) / 64 * 64;
    data_ = reinterpret_cast<F*>(Arena::of_thread().take(bytes_));
    kept_ = data_ != nullptr;
    if (!kept_) data_ = static_cast<F*>(std::aligned_alloc(64, bytes_));
    if (!data_) {
      Arena::of_thread().give_back(bytes_, false);
      throw std::bad_alloc();
    }
  }
  ~Scratch() {
    if (!bytes_) return;
    if (!kept_) std::free(data_);
    Arena::of_thread().give_back(bytes_, kept_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  F* get() const { return data_; }

 private:
  F* data_ = nullptr;
  size_t bytes_ = 0;
  bool kept_ = false;
};

// Splits 0..n into `parts` even ranges and runs fn(begin, end, ctx) on each, on the pool's threads.
struct Split {
  int64_t n, parts;
  void (*fn)(int64_t begin, int64_t end, const void* ctx);
  const void* ctx;
};
inline void run_split_parts(int64_t begin, int64_t end, void* ctx) {
  const Split& s = *static_cast<const Split*>(ctx);
  for (int64_t part = begin; part < end; ++part) s.fn(s.n * part / s.parts, s.n * (part + 1) / s.parts, s.ctx);
}
// multiply_adds: the work of all n. A thread is worth waking for about 2 us of it.
inline void run_split(const Pool& pool, int64_t n, int64_t multiply_adds, const void* ctx,
                      void (*fn)(int64_t, int64_t, const void*)) {
  constexpr int64_t multiply_adds_per_thread = 200000;
  int64_t parts = 1 + multiply_adds / multiply_adds_per_thread;
  if (parts > pool.threads) parts = pool.threads;
  if (parts > n) parts = n;
  if (parts <= 1) {
    if (n > 0) fn(0, n, ctx);
    return;
  }
  Split split{n, parts, fn, ctx};
  pool.run(parts, run_split_parts, &split);
}

}  // namespace fr
