#include "simd.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace fr {
namespace {

struct Variant {
  Isa isa;
  const char* name;
  const char* needs;
};
constexpr Variant variants[] = {
    {Isa::portable, "portable", "nothing"},
    {Isa::avx2, "avx2", "avx2 and fma"},
    {Isa::avx512, "avx512", "avx512f, avx512bw, avx512dq, avx512vl and fma"},
};

bool cpu_has(Isa isa) {
  if (isa == Isa::portable) return true;
#if FR_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (isa == Isa::avx2) return true;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa best_isa() { return cpu_has(Isa::avx512) ? Isa::avx512 : cpu_has(Isa::avx2) ? Isa::avx2 : Isa::portable; }

Isa isa_of_name(const std::string& name, const std::string& asked_by) {
  for (const Variant& v : variants) {
    if (name != v.name) continue;
    if (cpu_has(v.isa)) return v.isa;
    throw std::runtime_error(asked_by + " asks for '" + name + "', which needs " + v.needs + "; this CPU has up to '" +
                             variants[static_cast<int>(best_isa())].name + "'");
  }
  throw std::runtime_error(asked_by + " must be portable, avx2 or avx512, got '" + name + "'");
}

Isa isa_of_environment() {
  const char* name = std::getenv("FASTRNN_CPU_ISA");
  return name && *name ? isa_of_name(name, "FASTRNN_CPU_ISA") : best_isa();
}

constexpr int not_forced = -1;
std::atomic<int> forced{not_forced};

}  // namespace

Isa current_isa() {
  const int isa = forced.load(std::memory_order_relaxed);
  if (isa != not_forced) return static_cast<Isa>(isa);
  static const Isa chosen = isa_of_environment();
  return chosen;
}

const char* cpu_isa() { return variants[static_cast<int>(current_isa())].name; }

void set_cpu_isa(const char* name) {
  forced.store(*name ? static_cast<int>(isa_of_name(name, "set_isa")) : not_forced, std::memory_order_relaxed);
}

}  // namespace fr
