// K2: a cluster of CTAs owns some sequences and the whole network, and runs many steps of all of them in one launch.
// For networks that one CTA (generate.cu) does not hold.
//
// Products are made on tensor cores in bfloat16 and by fused multiply-adds in float32, 16 units and 8 rows at a time
// (cell_tile.cuh). The order of a sum follows from the network and the size of the cluster: a row's numbers depend on
// nothing but the row.
#include "generate_share.cuh"

namespace fr::cuda {
namespace {

// What the sums of a unit are added to: the table's row of the id that is read, or the bias.
FR_DEVICE void load_given(const Share& s, int layer, int unit, int row, float (&given)[kSumsOfUnit]) {
  load_given(s.c.cell, s.c.net, s.floats(), layer, unit, s.orders()[row].id, given);
}

// The new state of a unit of a row from its sums.
template <class M>
FR_DEVICE void set_unit(const Share& s, int layer, int turn, int unit, int row, const float (&sum)[kSumsOfUnit]) {
  using E = typename M::E;
  const auto at = static_cast<int>(row * s.at.stride) + unit;
  E* const next = s.h<E>(layer, s.after(turn)) + at;
  if (s.orders()[row].id < 0) {
    *next = s.h<E>(layer, turn)[at];
    return;
  }
  float* const kept = s.carry(layer, unit - s.first_unit(), row);
  float carried = s.c.net.carries ? *kept : 0.0f;
  *next = M::factor(rounded<E>(state_from(s.c.cell, s.c.relu, sum, carried)));
  if (s.c.net.carries) *kept = carried;
}

// Gives the CTA's units of a layer to the other CTAs of the cluster, 16 bytes at a time.
template <class E> FR_DEVICE void hand_out(const Share& s, E* h) {
  if (s.cluster == 1) return;
  __syncthreads();
  constexpr int each = 16 / sizeof(E), pieces = kUnits / each;
  const int tiles = (s.units_end() - s.first_unit() + kUnits - 1) / kUnits;  // below 1: none
  for (int job = s.warp; job < tiles * s.cluster; job += kMaxWarps) {
    const int peer = job & (s.cluster - 1), tile = job >> s.shift;
    if (peer == 0) continue;
    const auto to = static_cast<unsigned>((s.rank + peer) & (s.cluster - 1));
    for (int i = s.lane; i < pieces * s.c.plan.block_rows; i += 32) {
      E* from = h + i / pieces * s.at.stride + s.first_unit() + tile * kUnits + i % pieces * each;
      *reinterpret_cast<uint4*>(cluster_map(from, to)) = *reinterpret_cast<const uint4*>(from);
    }
  }
}

template <class M, int row_tiles> using LayerSums = TileSums<M, kSumsOfUnit, row_tiles>;

// The tile of units that a warp sums a part of in every layer.
struct UnitTile {
  Work work;
  int first_unit;
  bool there;
  int64_t fragment;
  __device__ explicit UnitTile(const Share& s) : work(s.split.unit_parts) {
    first_unit = s.first_unit() + work.group * kUnits;
    there = work.group < s.split.unit_tiles && first_unit < s.c.net.H;
    fragment = work.group * s.split.k_tiles * s.c.net.gates;
  }
};

// The first product of a layer of a step, with its own h of the step before: of the rows from tile n on.
template <class M, int row_tiles>
FR_DEVICE void begin_layer(const Share& s, const UnitTile& tile, int turn, int layer, int n,
                           LayerSums<M, row_tiles>& sums) {
  if (!tile.there) return;
  sums.start(s.existing - n * kRows);
  sums.add(s, tile.work, hidden_fragment(s.split, layer) + tile.fragment,
           s.h<typename M::E>(layer, turn) + n * kRows * s.at.stride, hidden_gates(s.c.cell, s.c.net));
}

// All layers of a step, row_tiles tiles of rows at a time, the first of which is begun: the first products of a layer
// are made while the cluster meets.
template <class M, int row_tiles>
__device__ __forceinline__ void run_layers(const Share& s, int turn, LayerSums<M, row_tiles>& sums) {
  using E = typename M::E;
  constexpr bool early = row_tiles == 1 && M::on_tensor_cores;  // what is given is loaded before the products
  const UnitTile tile(s);
  const Work& work = tile.work;
  const bool has_tile = tile.there;
  const int tiles = static_cast<int>(s.c.plan.block_rows / kRows);
  const auto unit = [&](int i) { return tile.first_unit + s.lane / 4 + i / 2 * 8; };
  const auto row = [&](int n, int i) { return n * kRows + s.lane % 4 * 2 + i % 2; };
  const auto begin = [&](int layer, int n) { begin_layer<M, row_tiles>(s, tile, turn, layer, n, sums); };
#pragma unroll 1
  for (int layer = 0; layer < s.layers; ++layer) {
#pragma unroll 1
    for (int n0 = 0; n0 < tiles; n0 += row_tiles) {
      float given[4][kSumsOfUnit];
      const bool gives = early && has_tile && work.part == 0;
      if (gives)
#pragma unroll
        for (int i = 0; i < 4; ++i) load_given(s, layer, unit(i), row(n0, i), given[i]);
      if (n0 > 0) begin(layer, n0);
      if (layer > 0 && has_tile)
        sums.add(s, work, input_fragment(s.split, layer) + tile.fragment,
                 s.h<E>(layer - 1, s.after(turn)) + n0 * kRows * s.at.stride, input_gates(s.c.net));
      if (has_tile) sums.finish();
      if (gives)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int v = 0; v < kSumsOfUnit; ++v) sums.of[0].sum[v][i] += given[i][v];
      sums.total(
          s, work, has_tile, n0,
          [&](int n, int i, float (&all)[kSumsOfUnit]) {
            if (!early) return load_given(s, layer, unit(i), row(n0 + n, i), all);
#pragma unroll
            for (int v = 0; v < kSumsOfUnit; ++v) all[v] = 0.0f;
          },
          [&](int n, int i, const float (&all)[kSumsOfUnit]) {
            if (unit(i) < s.c.net.H) set_unit<M>(s, layer, turn, unit(i), row(n0 + n, i), all);
          });
    }
    hand_out(s, s.h<E>(layer, s.after(turn)));
    s.arrive();
    if (layer + 1 < s.layers) begin(layer + 1, 0);
    s.wait();
  }
}

// The logits of all rows from the last layer's h, to where they are drawn from.
template <class M, int row_tiles> __device__ __forceinline__ void run_head(const Share& s, int turn) {
  const Work work(s.split.column_parts);
  const auto* h = s.h<typename M::E>(s.layers - 1, turn);
  const float* bias = s.floats() + head_bias_in(s.c.net);
  const int tiles = static_cast<int>(s.c.plan.block_rows / kRows), columns = static_cast<int>(s.split.column_tiles);
  for (int tile = work.group; tile - work.group < columns; tile += work.groups) {
    const int64_t first = (s.rank * columns + tile) * kUnits;
    const bool has_tile = tile < columns && first < s.c.net.V;
    const int64_t fragment = s.split.head + tile * s.split.k_tiles;
#pragma unroll 1
    for (int n0 = 0; n0 < tiles; n0 += row_tiles) {
      TileSums<M, 1, row_tiles> sums;
      if (has_tile) {
        sums.start(s.existing - n0 * kRows);
        sums.add(s, work, fragment, h + n0 * kRows * s.at.stride, 1);
        sums.finish();
      }
      const auto column = [&](int i) { return first + s.lane / 4 + i / 2 * 8; };
      sums.total(
          s, work, has_tile, n0, [&](int, int i, float (&all)[1]) { all[0] = bias[column(i)]; },
          [&](int n, int i, const float (&all)[1]) {
            const int row = (n0 + n) * kRows + s.lane % 4 * 2 + i % 2;
            if (column(i) < s.c.net.V && row < s.existing) s.logits(row)[column(i)] = all[0];
          });
    }
  }
}

// Calls work(team, seat, scratch) for the rows that this CTA draws, and tells the cluster what they do next. work
// returns the request that a row begins with, or kNoRequest.
template <int Warps, class F> FR_DEVICE void each_row(const Share& s, const F& work) {
  const Team<Warps> team{s.in<uint64_t>(s.at.draw.slots) + (Warps == 1 ? s.warp : 0)};
  const int teams = kMaxWarps / Warps, own = s.warp / Warps;
  const DrawScratch scratch = scratch_of(s.memory, s.at.draw, s.c.net, own);
  for (int place = own; place * s.cluster + s.rank < s.c.plan.block_rows; place += teams) {
    const int r = place * s.cluster + s.rank;
    Order order{kIdleRow, kNoRequest};
    if (r < s.existing) {
      const RowSeat seat{s.in<DeviceRow>(s.at.rows)[place], s.first + r, s.logits(r)};
      order.request = work(team, seat, scratch);
      if (seat.row.active) order.id = seat.row.id;
    }
    if (team.rank() < s.cluster) *cluster_map(s.orders() + r, static_cast<unsigned>(team.rank())) = order;
  }
}
// A warp draws a row of one tile; for more of them the whole CTA does.
template <class F> FR_DEVICE void each_row(const Share& s, const F& work) {
  s.c.net.V > kTile ? each_row<kMaxWarps>(s, work) : each_row<1>(s, work);
}

// The state of a row at a step: get(layer, unit, h, carried) gives it.
template <class E, class Get> FR_DEVICE void set_state(const Share& s, int r, int turn, const Get& get) {
  const int H = static_cast<int>(s.c.net.H);
  for (int i = static_cast<int>(threadIdx.x); i < s.layers * H; i += kThreads) {
    const int layer = i / H, unit = i % H;
    float h, carried;
    get(layer, unit, h, carried);
    s.h<E>(layer, turn)[r * s.at.stride + unit] = rounded<E>(h);
    const bool own = s.first_unit() <= unit && unit < s.units_end();
    if (s.c.net.carries && own) *s.carry(layer, unit - s.first_unit(), r) = carried;
  }
}

// A CTA's memory as a launch begins: resident weights, the rows' states, the rows themselves.
template <class E> __device__ void set_up(const Share& s) {
  const auto* from = reinterpret_cast<const uint4*>(s.blob());
  for (int64_t i = threadIdx.x; i < s.c.plan.resident * fragment_words(s.c.net) / 4; i += kThreads)
    s.in<uint4>(s.at.weights)[i] = from[i];
  for (int64_t i = threadIdx.x; i < s.at.partial / 4; i += kThreads) s.in<uint32_t>(s.at.h)[i] = 0;  // h and carry
  __syncthreads();
  for (int r = 0; r < s.existing; ++r)
    set_state<E>(s, r, 0, [&](int layer, int unit, float& h, float& carried) {
      const float* state = s.c.state + ((s.first + r) * s.layers + layer) * 2 * s.c.net.H + unit;
      h = state[0], carried = s.c.net.carries ? state[s.c.net.H] : 0.0f;
    });
}

// A row's state as its request `q` begins.
template <class E> __device__ void set_start(const Share& s, int r, int turn, const DeviceRequest& q) {
  set_state<E>(s, r, turn, [&](int layer, int unit, float& h, float& carried) {
    const int64_t at = layer * s.c.net.H + unit;
    h = q.start_h == nullptr ? 0.0f : q.start_h[at];
    carried = q.start_c == nullptr ? h : q.start_c[at];
  });
}

// The state of the CTA's units of all rows, and the rows that it draws, to memory.
template <class E> __device__ void save(const Share& s, int turn) {
  const int units = s.units_end() - s.first_unit();  // below 1: none
  for (int i = static_cast<int>(threadIdx.x); i < s.existing * s.layers * units; i += kThreads) {
    const int unit = i % units, layer = i / units % s.layers, r = i / (units * s.layers);
    float* state = s.c.state + ((s.first + r) * s.layers + layer) * 2 * s.c.net.H + s.first_unit() + unit;
    state[0] = to_float(s.h<E>(layer, turn)[r * s.at.stride + s.first_unit() + unit]);
    if (s.c.net.carries) state[s.c.net.H] = *s.carry(layer, unit, r);
  }
  for (int r = s.rank + s.cluster * static_cast<int>(threadIdx.x); r < s.existing; r += s.cluster * kThreads)
    s.c.rows[s.first + r] = s.in<DeviceRow>(s.at.rows)[r / s.cluster];
}

// Loads the states of the rows that begin with a request; whether any row runs. loads: whether there were such rows,
// which all of the cluster are told.
template <class E> __device__ bool take_orders(const Share& s, int turn, bool& loads) {
  const bool there = s.lane < s.c.plan.block_rows;
  const Order order = s.orders()[there ? s.lane : 0];
  unsigned begin = __ballot_sync(kAllLanes, there && order.request >= 0);
  loads = begin != 0;
  if (loads) __syncthreads();  // who is late still multiplies with the states before
  for (; begin != 0; begin &= begin - 1) {
    const int r = __ffs(static_cast<int>(begin)) - 1;
    set_start<E>(s, r, turn, s.c.queue[s.orders()[r].request]);
  }
  if (loads) __syncthreads();
  return __any_sync(kAllLanes, there && order.id != kIdleRow);
}

// Owns:   plan.block_rows sequences, a cluster, from their state to their state, and their entries of the log.
// Keeps:  the weights of a CTA's units and columns as far as they fit, c or the GRU's h of its units, h of all units,
//         the logits of the rows that it draws where they fit: in shared memory.
// Moves:  the weights that are kept once a launch, the others each step; Gates * units floats of the table a row and
//         step; h to every CTA of the cluster, logits to one, and 8 bytes a row to every one.
// Syncs:  the cluster, L + 2 times a step, and the CTA; clusters meet in the queue's counter alone. The products of
//         every layer with its own h are made while the cluster meets before it, the first layer's after the draw.
// Limits: plan.fits; no window state; above one CTA compute capability 9.0.
template <class M, int row_tiles> __device__ __forceinline__ void run(const Share& s) {
  using E = typename M::E;
  set_up<E>(s);
  s.meet();  // from here on another CTA's memory is there to be written to
  each_row(s, [&](const auto& team, const RowSeat& seat, const DrawScratch&) {
    if (team.rank() == 0) fetch_row(s.c, seat.number, seat.row);
    team.sync();
    return seat.row.active ? kNoRequest : claim(s.c, team, seat, -1, 0);
  });
  int turn = 0;
  for (int64_t step = 0;; ++step, turn = s.after(turn)) {
    LayerSums<M, row_tiles> sums;
    bool loads;
    s.arrive();
    begin_layer<M, row_tiles>(s, UnitTile(s), turn, 0, 0, sums);
    s.wait();
    if (!take_orders<E>(s, turn, loads) || step == s.c.steps) break;
    if (loads) begin_layer<M, row_tiles>(s, UnitTile(s), turn, 0, 0, sums);
    run_layers<M, row_tiles>(s, turn, sums);
    run_head<M, row_tiles>(s, s.after(turn));
    s.meet();
    each_row(s, [&](const auto& team, const RowSeat& seat, const DrawScratch& scratch) {
      const int32_t end = finish_row(s.c, team, seat, scratch, step);
      return end != 0 ? claim(s.c, team, seat, step, end) : kNoRequest;
    });
    if (publishes(s.c, step)) publish(s.c, step + 1);
  }
  publish(s.c, s.c.steps);
  save<E>(s, turn);
}

template <class M, int row_tiles>
__global__ void __launch_bounds__(kThreads, 1) generate_cluster_kernel(ClusterCall call) {
  FR_DYNAMIC_SHARED(unsigned char, memory);
  run<M, row_tiles>(Share(call, memory));
}

// Calls with(kernel). Float reads its weights anew for every tile of rows, and so has nothing to gain from several at a
// time.
template <class With> auto with_kernel(const GenerateCall& c, const With& with) {
  if (c.net.per_word == 1) return with(generate_cluster_kernel<Numbers<Precision::f32>, 1>);
  return c.plan.block_rows == kRows ? with(generate_cluster_kernel<Numbers<Precision::bf16>, 1>)
                                    : with(generate_cluster_kernel<Numbers<Precision::bf16>, kMostRowTiles>);
}

}  // namespace

int64_t generate_clusters_at_once(int64_t cluster, int64_t shared_bytes) {
  return clusters_at_once((generate_cluster_kernel<Numbers<Precision::bf16>, 1>), static_cast<unsigned>(cluster),
                          kThreads, static_cast<size_t>(shared_bytes));
}

int generate_clustered(const GenerateCall& c, void* stream) {
  const auto blocks = static_cast<unsigned>(c.plan.blocks), cluster = static_cast<unsigned>(c.plan.cluster);
  const auto bytes = static_cast<size_t>(c.plan.shared_bytes);
  const auto on = static_cast<cudaStream_t>(stream);
  const ClusterCall call{c, cluster_split(c.net, c.plan.cluster),
                         cluster_layout(c.net, c.plan.cluster, c.plan.block_rows, c.plan.logits_on_chip)};
  return with_kernel(c, [&](auto kernel) {
    if (cluster == 1) return FR_LAUNCH(kernel, blocks, kThreads, bytes, on, call);
    return FR_LAUNCH_CLUSTER(kernel, cluster, blocks, kThreads, bytes, on, call);
  });
}

}  // namespace fr::cuda
