// What the test programs share. They know the kernels alone, no torch and no Python, so that a sanitizer can watch
// them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

// What is being run, for the message of a check.
inline std::string& at() {
  static std::string text;
  return text;
}

#define CHECK(condition) ((condition) ? void() : failed(__FILE__, __LINE__, #condition))
[[noreturn]] inline void failed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: %s: not so: %s\n", file, line, at().c_str(), condition);
  std::exit(1);
}

inline bool throws(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception&) {
    return true;
  }
  return false;
}

// Calls `test` on each of the named instruction sets that this processor has, and says which.
inline void on_each(const std::vector<std::string>& names, const char* program, const std::function<void()>& test) {
  bool ran = false;
  for (const std::string& name : names) {
    if (throws([&] { fr::set_cpu_isa(name.c_str()); })) {
      CHECK(name != "portable");  // every processor has that
      std::printf("%s: this processor has no %s, left out\n", program, name.c_str());
      continue;
    }
    test();
    ran = true;
    std::printf("%s: %s holds\n", program, name.c_str());
  }
  if (!ran) std::printf("%s: nothing was run\n", program);
}

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  int64_t below(int64_t n) { return bits() % n; }
  float within(float most) { return (static_cast<float>(bits()) / 1073741824.0f - 1.0f) * most; }
  std::vector<float> floats(int64_t n, float most) {
    std::vector<float> all(static_cast<size_t>(n));
    for (float& x : all) x = within(most);
    return all;
  }

 private:
  uint64_t state_;
};
