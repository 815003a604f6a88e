// Launches the kernels of a cell: the plan, the precision, and a sequence as one launch or as one a step.
#pragma once

#include "cell_sequence.cuh"
#include "cell_step.cuh"

namespace fr::cuda {

// The current device, as plan.h sees it; cells.cu.
Device current_device();
const char* told(cudaError_t error);  // null for success

inline dim3 grid_of(int64_t n) { return dim3(static_cast<unsigned>(n)); }

// Where a cluster does not fit beside what else the device runs, a smaller one is tried, and then a launch a step.
template <class Kernel> bool fits(Kernel kernel, const Plan& plan) {
  constexpr int64_t on_every_device = 8;  // of those that have clusters
  if (plan.cluster > on_every_device)
    return clusters_at_once(kernel, static_cast<unsigned>(plan.cluster), static_cast<unsigned>(32 * plan.warps),
                            static_cast<size_t>(plan.shared_bytes)) > 0;
  return kernel && plan.resident;
}

// A resident sequence; the error is null and `ran` false where the device does not take the cluster.
template <class Call, class Kernel> const char* run_resident(Kernel kernel, const Call& call, const Plan& plan) {
  const dim3 grid = grid_of(plan.slices * plan.cluster), block = grid_of(32 * plan.warps);
  const auto stream = static_cast<cudaStream_t>(call.stream);
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  if (plan.cluster == 1) return told(FR_LAUNCH(kernel, grid, block, bytes, stream, call, plan));
  return told(FR_LAUNCH_CLUSTER(kernel, static_cast<unsigned>(plan.cluster), grid, block, bytes, stream, call, plan));
}

// Plans until a plan runs: large(plan) says which kernel a plan asks for.
template <class Call, class Kernel>
Plan plan_for(int gates, bool backward, const Call& call, Kernel one_tile, Kernel four_tiles) {
  Device device = current_device();
  if (call.T == 1) device.cluster = 0;  // a single step has nothing to keep
  for (;;) {
    const Plan plan = sequence_plan(gates, backward, call.precision, call.H, call.B, device);
    if (!plan.resident || fits(plan.row_tiles == 1 ? one_tile : four_tiles, plan)) return plan;
    device.cluster = plan.cluster / 2;
  }
}

template <class Cell, class M> const char* forward_in(const CellForward& call) {
  const auto one = sequence_forward_kernel<Cell, M, 1>, four = sequence_forward_kernel<Cell, M, 4>;
  const Plan plan = plan_for(Cell::gates, false, call, one, four);
  if (plan.resident) return run_resident(plan.row_tiles == 1 ? one : four, call, plan);
  constexpr int tiles = step_tiles(M::precision);
  const auto kernel = plan.row_tiles == 1 ? step_forward_kernel<Cell, M, 1> : step_forward_kernel<Cell, M, tiles>;
  const auto bytes = static_cast<size_t>(plan.row_tiles == 1 ? Bench<M, 1>::shared_bytes(Cell::gates)
                                                             : Bench<M, tiles>::shared_bytes(Cell::gates));
  const char* error = nullptr;
  for (int64_t s = 0; s < call.T && !error; ++s)
    error = told(FR_LAUNCH(kernel, grid_of(plan.slices * plan.unit_tiles), grid_of(32 * kStepWarps), bytes,
                           static_cast<cudaStream_t>(call.stream), call, s));
  return error;
}

template <class Cell, class M> const char* backward_in(const CellBackward& call) {
  const auto one = sequence_backward_kernel<Cell, M, 1>, four = sequence_backward_kernel<Cell, M, 4>;
  const Plan plan = plan_for(Cell::gates, true, call, one, four);
  if (plan.resident) return run_resident(plan.row_tiles == 1 ? one : four, call, plan);
  constexpr int tiles = step_tiles(M::precision);
  const auto kernel = plan.row_tiles == 1 ? step_backward_kernel<Cell, M, 1> : step_backward_kernel<Cell, M, tiles>;
  const auto bytes =
      static_cast<size_t>(plan.row_tiles == 1 ? Bench<M, 1>::shared_bytes(1) : Bench<M, tiles>::shared_bytes(1));
  const char* error = nullptr;
  for (int64_t s = call.T - 1; s >= -1 && !error; --s)
    error = told(FR_LAUNCH(kernel, grid_of(plan.slices * plan.unit_tiles), grid_of(32 * kStepWarps), bytes,
                           static_cast<cudaStream_t>(call.stream), call, s));
  return error;
}

// Cell<E> in the precision of the call; there is a step and a row.
template <template <class> class Cell> const char* run_forward(const CellForward& call) {
  switch (call.precision) {
    case Precision::f32: return forward_in<Cell<float>, Numbers<Precision::f32>>(call);
    case Precision::tf32: return forward_in<Cell<float>, Numbers<Precision::tf32>>(call);
    case Precision::f16: return forward_in<Cell<__half>, Numbers<Precision::f16>>(call);
    case Precision::bf16: return forward_in<Cell<__nv_bfloat16>, Numbers<Precision::bf16>>(call);
  }
  return "unknown precision";
}
template <template <class> class Cell> const char* run_backward(const CellBackward& call) {
  switch (call.precision) {
    case Precision::f32: return backward_in<Cell<float>, Numbers<Precision::f32>>(call);
    case Precision::tf32: return backward_in<Cell<float>, Numbers<Precision::tf32>>(call);
    case Precision::f16: return backward_in<Cell<__half>, Numbers<Precision::f16>>(call);
    case Precision::bf16: return backward_in<Cell<__nv_bfloat16>, Numbers<Precision::bf16>>(call);
  }
  return "unknown precision";
}

}  // namespace fr::cuda
