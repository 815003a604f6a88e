// The plans of the cells' CUDA kernels (csrc/cuda/plan.h) over sizes, precisions and devices.
#include "check.h"

#include "../../csrc/cuda/plan.h"

using namespace fr::cuda;

namespace {

constexpr Precision kPrecisions[] = {Precision::f32, Precision::tf32, Precision::f16, Precision::bf16};
constexpr Device kA100{163 << 10, 108, 1}, kH100{227 << 10, 132, 16}, kConsumer{99 << 10, 84, 8};

void check_resident(const Plan& plan, int gates, bool backward, Precision p, int64_t H, const Device& device) {
  CHECK(plan.shared_bytes <= device.shared_bytes && plan.warps >= 1 && plan.warps <= kMaxWarps);
  CHECK(plan.cluster >= 1 && plan.cluster <= device.cluster && (plan.cluster & (plan.cluster - 1)) == 0);
  CHECK(plan.cluster * plan.warps * kUnits >= H);  // every unit has a warp
  CHECK(plan.stride >= plan.unit_tiles * kUnits * (backward ? gates : 1));
  const int64_t row_bytes = plan.stride * element_bytes(p);
  CHECK(row_bytes % 128 == (element_bytes(p) == 2 ? 32 : 64));
  CHECK(plan.weight_bytes % 128 == 0);
  const int64_t fragments = kept_tiles(p, gates, static_cast<int>(plan.row_tiles)) * gates;
  CHECK(fragments * (element_bytes(p) == 2 ? 4 : 8) <= 128);  // registers of a thread
  const int64_t in_shared = plan.weight_bytes / (plan.warps * kUnits * kUnits * element_bytes(p));
  CHECK(in_shared + fragments >= plan.unit_tiles * gates);  // all of W_hh is somewhere
}

void check_sizes(int gates, bool backward, Precision p, const Device& device) {
  for (int64_t H = 1; H <= 2100; H += H < 300 ? 1 : 13) {
    for (const int64_t B : {1, 7, 8, 9, 64, 500, 4096, 1 << 20}) {
      at() = "gates " + std::to_string(gates) + " H " + std::to_string(H) + " B " + std::to_string(B);
      const Plan plan = sequence_plan(gates, backward, p, H, B, device);
      CHECK(plan.row_tiles == 1 || plan.row_tiles == 4);
      CHECK(plan.slices * kRows * plan.row_tiles >= B && (plan.slices - 1) * kRows * plan.row_tiles < B);
      CHECK(plan.unit_tiles * kUnits >= H && (plan.unit_tiles - 1) * kUnits < H);
      CHECK(plan.slices * (plan.resident ? plan.cluster : plan.unit_tiles) < int64_t{1} << 31);  // CTAs of a grid
      if (plan.resident) check_resident(plan, gates, backward, p, H, device);
      Device half = device;
      half.shared_bytes /= 2;
      if (sequence_plan(gates, backward, p, H, B, half).resident) CHECK(plan.resident);
    }
  }
}

bool resident(int gates, Precision p, int64_t H, const Device& device) {
  return sequence_plan(gates, false, p, H, 8, device).resident && sequence_plan(gates, true, p, H, 8, device).resident;
}

void check_what_fits() {
  at() = "what fits";
  for (const Precision p : {Precision::f16, Precision::bf16}) {
    CHECK(resident(4, p, 128, kA100) && resident(3, p, 128, kA100) && resident(1, p, 128, kA100));
    CHECK(!resident(4, p, 256, kA100) && resident(4, p, 512, kH100) && !resident(4, p, 1024, kH100));
    CHECK(resident(3, p, 640, kH100) && resident(1, p, 1024, kH100));
  }
  for (const Precision p : {Precision::f32, Precision::tf32})
    CHECK(resident(4, p, 96, kA100) && resident(4, p, 256, kH100) && resident(1, p, 512, kH100));
  CHECK(sequence_plan(4, false, Precision::bf16, 64, 1 << 16, kH100).row_tiles == 4);
  CHECK(sequence_plan(4, false, Precision::bf16, 64, 8, kH100).cluster == 1);
}

void check_wishes() {
  at() = "wishes";
  for (const int64_t cluster : {1, 2, 4}) {
    for (const int64_t row_tiles : {1, 4}) {
      Device device = kH100;
      device.wanted_cluster = cluster, device.wanted_row_tiles = row_tiles;
      const Plan plan = sequence_plan(3, true, Precision::bf16, 64, 100, device);
      CHECK(plan.resident && plan.cluster == cluster && plan.row_tiles == row_tiles);
    }
  }
  Device device = kH100;
  device.wanted_cluster = 0;
  CHECK(!sequence_plan(3, true, Precision::bf16, 64, 100, device).resident);
}

}  // namespace

int main() {
  for (const Device& device : {kA100, kH100, kConsumer})
    for (const Precision p : kPrecisions)
      for (const int gates : {1, 3, 4})
        for (const bool backward : {false, true}) check_sizes(gates, backward, p, device);
  check_what_fits();
  check_wishes();
  std::puts("plans hold");
}
