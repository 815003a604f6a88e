// Compiles the file FR_FILE again, once per instruction set: FR_ISA names the namespace, FR_VEC_BYTES the vector width.
//
// A kernel file includes everything it needs, then this with FR_FILE set to its own name, then defines its dispatch;
// what stands under `#ifdef FR_ISA` in it is the kernel. The target is switched on by a pragma after all includes and
// never by a compiler flag: under a flag, an inline function of a shared header would be compiled with AVX-512 in one
// file and the linker might keep that copy for the whole program, which then dies on an older CPU. For the same
// reason all code inside a variant lives in the variant's own namespace and uses no function of the standard library.
//
// A file that defines FR_WITH_DOTS gets a variant with AVX-512's products of pairs of bfloat16 and of quads of int8
// too, in which FR_DOTS is 1; one that defines FR_WITH_AMX a variant with the matrix tiles, in which FR_AMX and FR_DOTS
// are 1. For the others those instruction sets are the next lower one.
//
// FR_WIDEST_ONLY=1 leaves out the variants below AVX-512, for programs that test the others: then an older processor
// must not get here.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

#if FR_X86
#if defined(__clang__)
#define FR_PRAGMA(text) _Pragma(#text)
#define FR_TARGET(instructions) \
  FR_PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define FR_TARGET_AMX FR_TARGET("avx512bw,avx512dq,avx512vl,fma,avx512bf16,avx512vnni,amx-bf16,amx-int8")
#define FR_TARGET_DOTS FR_TARGET("avx512bw,avx512dq,avx512vl,fma,avx512bf16,avx512vnni")
#define FR_TARGET_AVX512 FR_TARGET("avx512bw,avx512dq,avx512vl,fma")
#define FR_TARGET_AVX2 FR_TARGET("avx2,fma")
#define FR_TARGET_END _Pragma("clang attribute pop")
#else
#define FR_TARGET_AVX512      \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512\")")
#define FR_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define FR_TARGET_DOTS \
  FR_TARGET_AVX512     \
  _Pragma("GCC target(\"avx512bf16,avx512vnni\")")
#define FR_TARGET_AMX \
  FR_TARGET_DOTS      \
  _Pragma("GCC target(\"amx-tile,amx-bf16,amx-int8\")")
#define FR_TARGET_END _Pragma("GCC pop_options")
#endif

#if FR_KNOWS_AMX && defined(FR_WITH_AMX)
#define FR_ISA_AMX amx
#define FR_AMX 1
#define FR_DOTS 1
FR_TARGET_AMX
#define FR_ISA amx
#define FR_VEC_BYTES 64
#include FR_FILE
#undef FR_ISA
#undef FR_VEC_BYTES
FR_TARGET_END
#undef FR_AMX
#undef FR_DOTS
#else
#define FR_ISA_AMX FR_ISA_DOTS
#endif
#define FR_AMX 0

#if FR_KNOWS_DOTS && defined(FR_WITH_DOTS)
#define FR_ISA_DOTS avx512_bf16
#define FR_DOTS 1
FR_TARGET_DOTS
#define FR_ISA avx512_bf16
#define FR_VEC_BYTES 64
#include FR_FILE
#undef FR_ISA
#undef FR_VEC_BYTES
FR_TARGET_END
#undef FR_DOTS
#else
#define FR_ISA_DOTS avx512
#endif
#define FR_DOTS 0

FR_TARGET_AVX512
#define FR_ISA avx512
#define FR_VEC_BYTES 64
#include FR_FILE
#undef FR_ISA
#undef FR_VEC_BYTES
FR_TARGET_END

#if !FR_WIDEST_ONLY
FR_TARGET_AVX2
#define FR_ISA avx2
#define FR_VEC_BYTES 32
#include FR_FILE
#undef FR_ISA
#undef FR_VEC_BYTES
FR_TARGET_END
#endif
#else
#define FR_AMX 0
#define FR_DOTS 0
#endif

#if !FR_WIDEST_ONLY
#define FR_ISA portable
#define FR_VEC_BYTES 16
#include FR_FILE
#undef FR_ISA
#undef FR_VEC_BYTES
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// The variant of a kernel that the current instruction set names. FR_DISPATCH_OF is for kernels of float, double and
// bf16: the first two have no use for more than AVX-512.
#if FR_WIDEST_ONLY
#define FR_DISPATCH_WIDE(kernel, call) return avx512::kernel(call);
#define FR_DISPATCH(kernel, call)                            \
  switch (current_isa()) {                                   \
    case Isa::amx: return FR_ISA_AMX::kernel(call);          \
    case Isa::avx512_bf16: return FR_ISA_DOTS::kernel(call); \
    default: return avx512::kernel(call);                    \
  }
#elif FR_X86
#define FR_DISPATCH_BELOW(kernel, call)          \
  case Isa::avx512: return avx512::kernel(call); \
  case Isa::avx2: return avx2::kernel(call);     \
  case Isa::portable: return portable::kernel(call);
#define FR_DISPATCH_WIDE(kernel, call)                     \
  switch (current_isa()) {                                 \
    case Isa::amx:                                         \
    case Isa::avx512_bf16: FR_DISPATCH_BELOW(kernel, call) \
  }
#define FR_DISPATCH(kernel, call)                                                            \
  switch (current_isa()) {                                                                   \
    case Isa::amx: return FR_ISA_AMX::kernel(call);                                          \
    case Isa::avx512_bf16: return FR_ISA_DOTS::kernel(call); FR_DISPATCH_BELOW(kernel, call) \
  }
#else
#define FR_DISPATCH(kernel, call) \
  current_isa();                  \
  return portable::kernel(call);
#define FR_DISPATCH_WIDE FR_DISPATCH
#endif
#define FR_DISPATCH_OF(F, kernel, call)      \
  if constexpr (sizeof(F) == sizeof(bf16)) { \
    FR_DISPATCH(kernel, call)                \
  } else {                                   \
    FR_DISPATCH_WIDE(kernel, call)           \
  }
