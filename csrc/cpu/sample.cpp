// The draw as an op: rows of logits over threads. The arithmetic is in sampling.h, the draw of rows in draw.h; the
// contract is in kernels.h. This file compiles itself once per instruction set (each_isa.h).
#ifndef FR_ISA

#include "buffer.h"
#include "simd.h"
#include "../sampling.h"
namespace fr {
struct DrawerSizes {
  int64_t V, mode_of;
};
}  // namespace fr
#define FR_FILE "sample.cpp"
#include "each_isa.h"

#else

#include "vec.h"
#include "draw.h"
#include "draw_tiles.h"

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

class RowDrawer final : public Drawer {
 public:
  RowDrawer(int64_t V, int64_t mode_of) : scratch_(V, mode_of, true) {}
  void draw(const Sample& call, int64_t begin, int64_t end) override { sample_rows(call, begin, end, scratch_); }
  void weigh_tile(const TileDraw& d, int64_t t, const float* logits, int64_t stride,
                  const float* scale) const override {
    FR_ISA::weigh_tile(d, t, logits, stride, scale);
  }
  void find_groups(const TileDraw& d, const Sample& call) override { FR_ISA::find_groups(d, call, scratch_); }
  int64_t token_in_group(const TileDraw& d, int64_t row, const float* logits, float scale) const override {
    return FR_ISA::token_in_group(d, row, logits, scale);
  }

 private:
  DrawScratch scratch_;
};
static Drawer* new_drawer(DrawerSizes sizes) { return new RowDrawer(sizes.V, sizes.mode_of); }

}  // namespace FR_ISA
}  // namespace fr

#endif

#ifndef FR_ISA
namespace fr {
static_assert(kMaxVocabulary == draw::kMaxVocabulary && kDrawTile == draw::kTile);
void sample(const Sample& call) { FR_DISPATCH(sample, call) }
static Drawer* new_drawer(DrawerSizes sizes) {
  FR_DISPATCH(new_drawer, sizes)
  __builtin_unreachable();
}
std::unique_ptr<Drawer> make_drawer(int64_t V, int64_t mode_of) {
  return std::unique_ptr<Drawer>(new_drawer({V, mode_of}));
}
}  // namespace fr
#endif
