#include "simd.h"

#include <atomic>
#include <stdexcept>
#include <string>

#if FR_X86
#include <cpuid.h>
#endif
#if FR_KNOWS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
    {Isa::avx512_bf16, "avx512_bf16", "those of avx512, avx512_bf16 and avx512_vnni"},
    {Isa::amx, "amx", "those of avx512_bf16, amx_tile, amx_bf16, amx_int8 and Linux 5.16 or later"},
};

#if FR_X86
bool has_dots() {
#if FR_KNOWS_DOTS
  constexpr unsigned vnni = 1u << 11, avx512_bf16 = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ecx & vnni)) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & avx512_bf16);
#else
  return false;
#endif
}

// The matrix tiles, and the kernel's leave to use 8 KB of their state.
bool has_amx() {
#if FR_KNOWS_AMX
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
  constexpr unsigned tiles = amx_bf16 | amx_tile | amx_int8;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & tiles) != tiles) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

bool cpu_has(Isa isa) {
  if (isa == Isa::portable) return true;
#if FR_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (isa == Isa::avx2) return true;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return false;
  if (isa == Isa::avx512) return true;
  return has_dots() && (isa == Isa::avx512_bf16 || has_amx());
#else
  return false;
#endif
}

Isa best_isa() {
  for (const Isa isa : {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2})
    if (cpu_has(isa)) return isa;
  return Isa::portable;
}

Isa isa_of_name(const std::string& name, const std::string& asked_by) {
  for (const Variant& v : variants) {
    if (name != v.name) continue;
    if (cpu_has(v.isa)) return v.isa;
    throw std::runtime_error(asked_by + " asks for '" + name + "', which needs " + v.needs + "; this CPU has up to '" +
                             variants[static_cast<int>(best_isa())].name + "'");
  }
  throw std::runtime_error(asked_by + " must be portable, avx2, avx512, avx512_bf16 or amx, got '" + name + "'");
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
