// K3: the kernels of a step one after the other, each with the whole GPU: one for each layer, one for the head, one for
// the draw; many steps are one CUDA graph. For networks of any size, where neither a CTA (generate.cu) nor a cluster of
// them (generate_cluster.cu) holds them.
//
// Products are those of a cluster's CTA (generate_tile.cuh) but for the weights, all of which come from the L2 cache or
// beyond. The order of a sum follows from the network: a row's numbers depend on nothing but the row.
#include "generate_steps.cuh"

namespace fr::cuda {
namespace {

// Owns:   h of a step and what is carried, of the units of a warp's tile, or of a CTA's, and of 8 or 32 rows.
// Keeps:  sums in registers.
// Moves:  the tile's weights, h of the rows twice (the layer's own and that below), Gates floats a unit and row of the
//         table in the first layer: from L2; h and 8 bytes of what is carried a unit and row.
// Syncs:  the CTA, once for each tile of rows, where its warps share a tile.
// Limits: none; rows that run nothing are left out where all of a warp's are so.
template <class M, bool whole, int row_tiles>
__global__ void __launch_bounds__(kThreads, 1) layer_kernel(StepCall c, StepGrid grid, int layer, int parity) {
  using E = typename M::E;
  FR_SHARED(float, parts, (kPartialFloats<kSumsOfUnit, whole, row_tiles>));
  const StepTile<whole, row_tiles> s(c, grid, c.split.unit_parts, parts);
  if (!s.any_runs()) return;
  const bool has_tile = s.tile < c.split.unit_tiles;
  const int64_t of_tile = s.tile * c.split.k_tiles * c.net.gates;
  sum_tile<M, kSumsOfUnit>(
      s, has_tile,
      [&](auto& sums, const Work& work) {
        sums.add(s, work, hidden_fragment(c.split, layer) + of_tile, c.h<E>(layer, parity, s.row),
                 hidden_gates(c.cell, c.net));
        if (layer > 0)
          sums.add(s, work, input_fragment(c.split, layer) + of_tile, c.h<E>(layer - 1, parity ^ 1, s.row),
                   input_gates(c.net));
      },
      [&](int n, int i, float (&all)[kSumsOfUnit]) {
        load_given(c.cell, c.net, c.floats(), layer, s.unit_of(i), c.ids()[s.row_of(n, i)], all);
      },
      [&](int n, int i, const float (&all)[kSumsOfUnit]) {
        const int unit = s.unit_of(i);
        const int64_t row = s.row_of(n, i);
        const int32_t id = c.ids()[row];
        if (unit >= c.net.H || id == kIdleRow) return;
        E* const next = c.h<E>(layer, parity ^ 1, row) + unit;
        if (id < 0) {
          *next = c.h<E>(layer, parity, row)[unit];
          return;
        }
        float* const kept = c.carry(layer, row) + unit;
        float carried = c.net.carries ? *kept : 0.0f;
        *next = M::factor(rounded<E>(state_from(c.cell, c.relu, all, carried)));
        if (c.net.carries) *kept = carried;
      });
}

// Owns:   the logits of the columns of a warp's tile, or of a CTA's, and of 8 or 32 rows; the number of the step.
// Keeps:  sums in registers.
// Moves:  the tile's weights and h of the rows, from L2; the logits.
// Syncs:  as the layer's.
// Limits: none.
template <class M, bool whole, int row_tiles>
__global__ void __launch_bounds__(kThreads, 1) head_kernel(StepCall c, StepGrid grid, int parity) {
  using E = typename M::E;
  FR_SHARED(float, parts, (kPartialFloats<1, whole, row_tiles>));
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*c.step();  // which the draw reads
  const StepTile<whole, row_tiles> s(c, grid, c.split.column_parts, parts);
  if (!s.any_runs()) return;
  const float* bias = c.floats() + head_bias_in(c.net);
  const bool has_tile = s.tile < c.split.column_tiles;
  sum_tile<M, 1>(
      s, has_tile,
      [&](auto& sums, const Work& work) {
        sums.add(s, work, c.split.head + s.tile * c.split.k_tiles,
                 c.h<E>(static_cast<int>(c.net.L) - 1, parity ^ 1, s.row), 1);
      },
      [&](int, int i, float (&all)[1]) { all[0] = bias[s.unit_of(i)]; },
      [&](int n, int i, const float (&all)[1]) {
        const int64_t row = s.row_of(n, i);
        if (s.unit_of(i) < c.net.V && row < c.plan.rows) c.logits(row)[s.unit_of(i)] = all[0];
      });
}

// Calls work(team, seat, scratch) for the row of each team: a warp, or the CTA.
template <int Warps, class F> FR_DEVICE void each_row(const StepCall& c, unsigned char* memory, const F& work) {
  constexpr int teams = kMaxWarps / Warps;
  const DrawLayout at = steps_draw(c.net);
  const int own = Warps == 1 ? static_cast<int>(threadIdx.x / 32) : 0;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * teams + own;
  const Team<Warps> team{reinterpret_cast<uint64_t*>(memory + at.slots) + own};
  if (number >= c.plan.rows) return;
  work(team, RowSeat{c.rows[number], number, c.logits(number)}, scratch_of(memory, at, c.net, own));
}

// The state of a row at a step of a parity, by a team: get(layer, unit, h, carried) gives it.
template <class E, int Warps, class Get>
FR_DEVICE void set_state(const StepCall& c, const Team<Warps>& team, int64_t row, int parity, const Get& get) {
  const int H = static_cast<int>(c.net.H);
  for (int i = team.rank(); i < c.net.L * H; i += Team<Warps>::kThreads) {
    const int layer = i / H, unit = i % H;
    float* const kept = c.carry(layer, row) + unit;
    float h, carried = 0.0f;
    get(layer, unit, h, carried);
    c.h<E>(layer, parity, row)[unit] = rounded<E>(h);
    if (c.net.carries) *kept = carried;
  }
}

// Gives a row the next request of the queue, as claim() does, and its state.
template <class E, int Warps>
FR_DEVICE void start_next(const StepCall& c, const GenerateCall& launch, const Team<Warps>& team, const RowSeat& seat,
                          int parity, int64_t step, int32_t end) {
  const int32_t at = claim(launch, team, seat, step, end);
  if (at < 0) return;
  const DeviceRequest& q = launch.queue[at];
  set_state<E>(c, team, seat.number, parity, [&](int layer, int unit, float& h, float& carried) {
    const int64_t i = layer * c.net.H + unit;
    h = q.start_h == nullptr ? 0.0f : q.start_h[i];
    carried = q.start_c == nullptr ? h : q.start_c[i];
  });
}

// Owns:   the rows of a launch as it begins, and what its steps are told.
// Keeps:  nothing.
// Moves:  the rows' h to where the first step reads it.
// Syncs:  the team of a row; teams meet in the queue's counter alone.
// Limits: none.
template <class E, int Warps>
__global__ void __launch_bounds__(kThreads) begin_kernel(StepCall c, GenerateCall launch) {
  FR_DYNAMIC_SHARED(unsigned char, memory);
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *c.launch() = launch, *c.step() = -1;
    for (int64_t i = c.plan.rows + threadIdx.x; i < c.at.rows; i += kThreads) c.ids()[i] = kIdleRow;
  }
  each_row<Warps>(c, memory, [&](const auto& team, const RowSeat& seat, const DrawScratch&) {
    if (team.rank() == 0) open_row(launch, seat.row);
    team.sync();
    if (seat.row.active) {
      set_state<E>(c, team, seat.number, 0, [&](int layer, int unit, float& h, float& carried) {
        const float* const kept = c.carry(layer, seat.number) + unit;
        h = kept[-c.net.H], carried = c.net.carries ? *kept : 0.0f;
      });
    } else {
      start_next<E>(c, launch, team, seat, 0, -1, 0);
    }
    if (team.rank() == 0) c.ids()[seat.number] = seat.row.active ? seat.row.id : kIdleRow;
  });
}

// Owns:   what a row does when the logits of a step are there, to the id that the next step reads; its entries of the
//         log.
// Keeps:  the sums of a draw in registers and shared memory.
// Moves:  the row's logits, as often as draw_row reads them; a few lines of what a row is; 4 or 8 bytes of the log a
//         row, to the host and kPublished steps at a time.
// Syncs:  the team of a row, and the CTA where it publishes; teams meet in the queue's counter alone.
// Limits: plan.fits.
template <class E, int Warps> __global__ void __launch_bounds__(kThreads) draw_kernel(StepCall c) {
  FR_DYNAMIC_SHARED(unsigned char, memory);
  const GenerateCall& launch = *c.launch();
  const int64_t step = *c.step();
  each_row<Warps>(c, memory, [&](const auto& team, const RowSeat& seat, const DrawScratch& scratch) {
    if (c.ids()[seat.number] == kIdleRow) return;
    const int32_t end = finish_row(launch, team, seat, scratch, step);
    if (end != 0) start_next<E>(c, launch, team, seat, static_cast<int>(step + 1) % 2, step, end);
    if (team.rank() == 0) c.ids()[seat.number] = seat.row.active ? seat.row.id : kIdleRow;
  });
  if (publishes(launch, step)) publish(launch, step + 1);
}

// Owns:   h of the rows as a launch ends, in the memory between two launches.
// Keeps:  nothing. Moves: h. Syncs: nothing. Limits: none.
template <class E> __global__ void __launch_bounds__(kThreads) save_kernel(StepCall c, int parity) {
  const int64_t row = blockIdx.x / c.net.L, layer = blockIdx.x % c.net.L;
  const E* const h = c.h<E>(static_cast<int>(layer), parity, row);
  float* const to = c.carry(static_cast<int>(layer), row) - c.net.H;
  for (int64_t unit = threadIdx.x; unit < c.net.H; unit += kThreads) to[unit] = to_float(h[unit]);
}

StepCall step_call(const GenerateCall& c) {
  return {c.net,
          c.plan,
          c.cell,
          c.relu,
          steps_split(c.net),
          steps_layout(c.net, c.plan),
          c.blob,
          c.rows,
          c.state,
          static_cast<unsigned char*>(c.scratch)};
}

// Calls with(M, whole, row_tiles) as constants, for a kernel that multiplies.
template <class With> cudaError_t with_numbers(const StepCall& c, bool whole, const With& with) {
  using std::integral_constant;
  constexpr int most = kMostRowTiles;
  const auto one = integral_constant<int, 1>{};
  const auto yes = std::true_type{};
  const auto no = std::false_type{};
  if (c.net.per_word == 1)
    return whole ? with(Numbers<Precision::f32>{}, yes, one) : with(Numbers<Precision::f32>{}, no, one);
  const Numbers<Precision::bf16> bf16{};
  if (whole) return with(bf16, yes, integral_constant<int, most>{});
  return c.plan.row_tiles == 1 ? with(bf16, no, one) : with(bf16, no, integral_constant<int, most>{});
}
// Calls with(E, Warps) as a number and a constant, for a kernel of rows.
template <class With> cudaError_t with_team(const StepCall& c, const With& with) {
  const auto teams = [&](auto number) {
    return drawn_by_cta(c.net) == 1 ? with(number, std::integral_constant<int, kMaxWarps>{})
                                    : with(number, std::integral_constant<int, 1>{});
  };
  return c.net.per_word == 1 ? teams(float{}) : teams(__nv_bfloat16{});
}

cudaError_t enqueue_step(const StepCall& c, int parity, cudaStream_t on) {
  const StepGrid units = layer_grid(c.net, c.plan), columns = head_grid(c.net, c.plan);
  cudaError_t code = cudaSuccess;
  for (int layer = 0; layer < c.net.L && code == cudaSuccess; ++layer)
    code = with_numbers(c, c.plan.whole_units, [&](auto m, auto whole, auto row_tiles) {
      return FR_LAUNCH((layer_kernel<decltype(m), decltype(whole)::value, decltype(row_tiles)::value>),
                       static_cast<unsigned>(units.blocks), kThreads, 0, on, c, units, layer, parity);
    });
  if (code != cudaSuccess) return code;
  code = with_numbers(c, c.plan.whole_columns, [&](auto m, auto whole, auto row_tiles) {
    return FR_LAUNCH((head_kernel<decltype(m), decltype(whole)::value, decltype(row_tiles)::value>),
                     static_cast<unsigned>(columns.blocks), kThreads, 0, on, c, columns, parity);
  });
  if (code != cudaSuccess) return code;
  return with_team(c, [&](auto number, auto warps) {
    return FR_LAUNCH((draw_kernel<decltype(number), decltype(warps)::value>), static_cast<unsigned>(c.plan.blocks),
                     kThreads, static_cast<size_t>(c.plan.shared_bytes), on, c);
  });
}
// The first of them is of parity 0.
cudaError_t enqueue_steps(const StepCall& c, int64_t count, cudaStream_t on) {
  cudaError_t code = cudaSuccess;
  for (int64_t step = 0; step < count && code == cudaSuccess; ++step)
    code = enqueue_step(c, static_cast<int>(step % 2), on);
  return code;
}

cudaError_t enqueue_begin(const StepCall& c, const GenerateCall& launch, cudaStream_t on) {
  return with_team(c, [&](auto number, auto warps) {
    return FR_LAUNCH((begin_kernel<decltype(number), decltype(warps)::value>), static_cast<unsigned>(c.plan.blocks),
                     kThreads, static_cast<size_t>(c.plan.shared_bytes), on, c, launch);
  });
}
cudaError_t enqueue_end(const StepCall& c, int parity, cudaStream_t on) {
  return with_team(c, [&](auto number, auto) {
    return FR_LAUNCH((save_kernel<decltype(number)>), static_cast<unsigned>(c.plan.rows * c.net.L), kThreads, 0, on, c,
                     parity);
  });
}

}  // namespace

void StepGraph::Free::operator()(void* graph) const { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

int StepGraph::record(const GenerateCall& call) {
  cudaStream_t own = nullptr;  // that of the call may be the default stream, which records nothing
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t recorded = nullptr;
  cudaError_t code = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
  if (code != cudaSuccess) return code;
  code = cudaStreamBeginCapture(own, cudaStreamCaptureModeThreadLocal);
  if (code == cudaSuccess) {
    code = enqueue_steps(step_call(call), kPublished, own);
    const cudaError_t ended = cudaStreamEndCapture(own, &graph);
    if (code == cudaSuccess) code = ended;
  }
  if (code == cudaSuccess) code = cudaGraphInstantiate(&recorded, graph, 0);
  if (code == cudaSuccess) recorded_.reset(recorded);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaStreamDestroy(own);
  return code;
}

int StepGraph::launch(const GenerateCall& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const StepCall c = step_call(call);
  int code = enqueue_begin(c, call, on);
  for (int64_t done = 0; done < call.steps && code == cudaSuccess; done += kPublished) {
    if (call.steps - done < kPublished || !loaded_) {
      code = enqueue_steps(c, std::min(kPublished, call.steps - done), on);
      loaded_ = true;
      continue;
    }
    if (!recorded_) code = record(call);
    if (code == cudaSuccess) code = cudaGraphLaunch(static_cast<cudaGraphExec_t>(recorded_.get()), on);
  }
  return code == cudaSuccess ? enqueue_end(c, static_cast<int>(call.steps % 2), on) : static_cast<cudaError_t>(code);
}

}  // namespace fr::cuda
