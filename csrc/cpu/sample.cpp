// The draw as an op: rows of logits over threads. The arithmetic is in sampling.h, the draw of rows in draw.h; the
// contract is in kernels.h. This file compiles itself once per instruction set (each_isa.h).
#ifndef FR_ISA

#include "simd.h"
#include "../sampling.h"
#define FR_FILE "sample.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "draw.h"

namespace fr {
namespace FR_ISA {

// Whether some row is more than a plain draw.
static bool is_general(const Sample& a) {
  bool general = a.mask != nullptr || a.logprobs || a.mode_of > 1;
  for (int64_t row = 0; row < a.B && !general; ++row) general = !is_plain(a, row);
  return general;
}

static void sample_range(int64_t begin, int64_t end, const void* ctx) {
  const Sample& a = *static_cast<const Sample*>(ctx);
  DrawScratch s(a.V, a.mode_of, is_general(a));
  sample_rows(a, begin, end, s);
}

static void sample(const Sample& call) {
  // A plain draw costs about 5 multiply-adds a logit, and 500 before the first.
  run_split(call.pool, call.B, call.B * (5 * call.V + 500 * call.mode_of), &call, sample_range);
}

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
static_assert(kMaxVocabulary == draw::kMaxVocabulary);
void sample(const Sample& call) { FR_DISPATCH(sample, call) }
}  // namespace fr
#endif
