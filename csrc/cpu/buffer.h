// Memory of an object's own, for what outlives a call or moves between threads; a call's scratch is simd.h's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fr {

// n uninitialised elements of F on cache lines of their own.
template <class F> class Buffer {
 public:
  explicit Buffer(int64_t n) {
    if (n <= 0) return;
    data_ = static_cast<F*>(std::aligned_alloc(64, (static_cast<size_t>(n) * sizeof(F) + 63) / 64 * 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  F* get() const { return data_; }

 private:
  F* data_ = nullptr;
};

}  // namespace fr
