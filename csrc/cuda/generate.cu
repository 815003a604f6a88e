// K1: a CTA owns some sequences and the whole network (generate_cluster.cu and generate_steps.cu have the larger ones),
// and runs many steps of all of them in one launch: cells, head, draw, feedback, the end of a request and the start of
// the next one of the queue.
//
// A pre-activation is the sum of two: of the table's row or the bias and the products with the layer's input, and of
// the products with its hidden state (of the GRU's n, that of bias_q and those). Each is one chain of fma in the order
// of k. The second is there to be made when the step before has its new states, and where a CTA has one sequence, whose
// draw leaves its other warps idle, they make it beside the head and the draw; eight sequences and more keep all warps
// busy, which make it in the layer. It is the same either way: a row's numbers depend on nothing but the row.
#include "generate.h"

#include "generate_rows.cuh"

namespace fr::cuda {
namespace {

// What the threads of a CTA count together.
struct Tally {
  int32_t running;    // rows
  int32_t begun;      // items of the sums that the next step begins with, as far as warps have claimed them
  int32_t restarted;  // the row has a request whose state is not loaded yet
};

// A CTA's view of its memory.
struct Chip {
  const uint32_t* weights;
  const float *floats, *table;
  float *h, *carry, *logits;
  float* begun;  // (L, gates, units) hidden_sums of the next step
  DeviceRow* rows;
  Tally* tally;
  int64_t layer_floats;  // of h: one parity of one layer

  __device__ float* h_of(int64_t layer, int parity) const { return h + (layer * 2 + parity) * layer_floats; }
};

// A cell and the weights in a word, as a type.
template <CellKind C, int PerWord> struct Kind {
  static constexpr CellKind cell = C;
  static constexpr int per_word = PerWord, gates = C == CellKind::lstm ? 4 : C == CellKind::gru ? 3 : 1;
};
// Calls work with those of the network: they are the same for all threads.
template <class Work> __device__ __forceinline__ void with_kind(const GenerateCall& c, const Work& work) {
  const bool floats = c.net.per_word == 1;
  if (c.cell == CellKind::lstm)
    floats ? work(Kind<CellKind::lstm, 1>{}) : work(Kind<CellKind::lstm, 2>{});
  else if (c.cell == CellKind::gru)
    floats ? work(Kind<CellKind::gru, 1>{}) : work(Kind<CellKind::gru, 2>{});
  else
    floats ? work(Kind<CellKind::rnn, 1>{}) : work(Kind<CellKind::rnn, 2>{});
}

__device__ __forceinline__ float low_half(uint32_t pair) { return draw::bits_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return draw::bits_float(pair & 0xffff0000u); }

// x as the network's activations hold it: the float, or the nearest one that a bf16 holds.
template <int PerWord> __device__ __forceinline__ float activation(float x) {
  if constexpr (PerWord == 1) return x;
  const uint32_t bits = draw::float_bits(x);
  if (x != x) return x;
  return draw::bits_float((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
}

// acc[g][r] += sum over k of w (k, g, u) a (k, r), in the order of k. `w` is at the first word of unit u.
template <int PerWord, int Gates, int Tile>
__device__ __forceinline__ void product(const uint32_t* w, int64_t words, int64_t units, const float* a, int64_t pitch,
                                        float (&acc)[Gates][Tile]) {
  for (int64_t k = 0; k < words; ++k, w += Gates * units) {
    uint32_t word[Gates];
#pragma unroll
    for (int g = 0; g < Gates; ++g) word[g] = w[g * units];
#pragma unroll
    for (int half = 0; half < PerWord; ++half, a += pitch) {
      float value[Tile];
      if constexpr (Tile % 4 == 0) {
#pragma unroll
        for (int r = 0; r < Tile; r += 4) {
          const float4 four = *reinterpret_cast<const float4*>(a + r);
          value[r] = four.x, value[r + 1] = four.y, value[r + 2] = four.z, value[r + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int r = 0; r < Tile; ++r) value[r] = a[r];
      }
#pragma unroll
      for (int g = 0; g < Gates; ++g) {
        const float weight = PerWord == 1 ? draw::bits_float(word[g]) : half ? high_half(word[g]) : low_half(word[g]);
#pragma unroll
        for (int r = 0; r < Tile; ++r) acc[g][r] = draw::fma_rn(value[r], weight, acc[g][r]);
      }
    }
  }
}

// sum[g][r] = the products of unit u's weights with the hidden states of a layer, for Tile rows; of the GRU's n with
// bias_q.
template <class K, int Tile>
__device__ __forceinline__ void hidden_sums(const GenerateCall& c, const Chip& chip, const SharedLayout& s,
                                            int64_t layer, int parity, int64_t u, int64_t first,
                                            float (&sum)[K::gates][Tile]) {
#pragma unroll
  for (int g = 0; g < K::gates; ++g) {
    const float start = K::cell == CellKind::gru && g == 2 ? chip.floats[bias_q_in(c.net, layer) + u] : 0.0f;
#pragma unroll
    for (int r = 0; r < Tile; ++r) sum[g][r] = start;
  }
  product<K::per_word, K::gates, Tile>(chip.weights + hidden_at(c.net, layer) + u, k_words(c.net), units_of(c.net),
                                       chip.h_of(layer, parity) + first, s.pitch, sum);
}

// A warp makes what the step of `parity` begins with, 32 units of a layer at a time, until others have claimed the
// rest.
__device__ __forceinline__ void begin_step(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity) {
  const auto units = static_cast<int32_t>(units_of(c.net)), lane = static_cast<int32_t>(threadIdx.x % 32);
  for (;;) {
    int32_t at = 0;
    if (lane == 0) at = atomicAdd(&chip.tally->begun, 1);
    at = 32 * __shfl_sync(kAllLanes, at, 0);
    if (at >= c.net.L * units) return;
    const int32_t layer = at / units, u = at % units + lane;
    with_kind(c, [&](auto kind) {
      using K = decltype(kind);
      float sum[K::gates][1];
      hidden_sums<K, 1>(c, chip, s, layer, parity, u, 0, sum);
#pragma unroll
      for (int g = 0; g < K::gates; ++g) chip.begun[(layer * K::gates + g) * units + u] = sum[g][0];
    });
  }
}
// The CTA makes it where the row has another state than that which the step before has left.
__device__ __forceinline__ void begin_anew(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity) {
  __syncthreads();  // the state is there, and that it is new has been read
  if (threadIdx.x == 0) chip.tally->restarted = 0;
  begin_step(c, chip, s, parity);
  __syncthreads();
  if (threadIdx.x == 0) chip.tally->begun = 0;
}

// One step of a layer for Tile rows and unit u of each.
template <class K, int Tile>
__device__ __forceinline__ void layer_item(const GenerateCall& c, const Chip& chip, const SharedLayout& s,
                                           int64_t layer, int parity, int64_t u, int64_t first) {
  constexpr int Gates = K::gates;
  constexpr bool is_gru = K::cell == CellKind::gru;
  const int64_t units = units_of(c.net);
  float from_h[Gates][Tile], from_x[Gates][Tile];
  if (Tile == 1 && c.plan.begins) {
#pragma unroll
    for (int g = 0; g < Gates; ++g) from_h[g][0] = chip.begun[(layer * Gates + g) * units + u];
  } else {
    hidden_sums<K, Tile>(c, chip, s, layer, parity, u, first, from_h);
  }
#pragma unroll
  for (int r = 0; r < Tile; ++r) {
    const int32_t id = chip.rows[first + r].id;
    const float* from = chip.floats + bias_in(c.net, layer);
    if (layer == 0) from = chip.table + (id < 0 ? 0 : id) * Gates * units;
#pragma unroll
    for (int g = 0; g < Gates; ++g) from_x[g][r] = from[g * units + u];
  }
  if (layer > 0)
    product<K::per_word, Gates, Tile>(chip.weights + input_at(c.net, layer) + u, k_words(c.net), units,
                                      chip.h_of(layer - 1, parity ^ 1) + first, s.pitch, from_x);
  if (u >= c.net.H) return;
  const float* before = chip.h_of(layer, parity) + first;
  float* after = chip.h_of(layer, parity ^ 1) + first;
  float* carry = chip.carry + (layer * c.plan.block_rows + first) * units + u;
#pragma unroll
  for (int r = 0; r < Tile; ++r) {
    float pre[Gates], carried = c.net.carries ? carry[r * units] : 0.0f;
#pragma unroll
    for (int g = 0; g < Gates; ++g) pre[g] = is_gru && g == 2 ? from_h[g][r] : from_x[g][r] + from_h[g][r];
    const float h = activation<K::per_word>(new_state<K::cell>(pre, from_x[is_gru ? 2 : 0][r], c.relu, carried));
    const bool runs = chip.rows[first + r].id >= 0;
    after[u * s.pitch + r] = runs ? h : before[u * s.pitch + r];
    if (c.net.carries && runs) carry[r * units] = carried;
  }
}

template <int PerWord, int Tile>
__device__ __forceinline__ void head_item(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity,
                                          int64_t column, int64_t first) {
  float acc[1][Tile];
  const float bias = chip.floats[head_bias_in(c.net) + column];
#pragma unroll
  for (int r = 0; r < Tile; ++r) acc[0][r] = bias;
  product<PerWord, 1, Tile>(chip.weights + head_at(c.net) + column, k_words(c.net), columns_of(c.net),
                            chip.h_of(c.net.L - 1, parity ^ 1) + first, s.pitch, acc);
#pragma unroll
  for (int r = 0; r < Tile; ++r) chip.logits[(first + r) * s.logits_row + column] = acc[0][r];
}

// Loads the state with which a row's request begins, for the step of `parity`; thread `i` of `threads` that do.
__device__ __forceinline__ void load_start(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity,
                                           int64_t r, int64_t i, int64_t threads) {
  const DeviceRequest& q = chip.rows[r].q;
  const int64_t units = units_of(c.net), H = c.net.H;
  for (; i < c.net.L * H; i += threads) {
    const int64_t layer = i / H, u = i % H;
    const float h = q.start_h == nullptr ? 0.0f : q.start_h[i];
    const bool rounds = c.net.per_word == 2;
    chip.h_of(layer, parity)[u * s.pitch + r] = rounds ? activation<2>(h) : h;
    if (c.net.carries)
      chip.carry[(layer * c.plan.block_rows + r) * units + u] = q.start_c == nullptr ? h : q.start_c[i];
  }
}

// A warp gives a row the next request of the queue, if there is one. Its state goes where the next step reads it; but
// where other warps read there what the step before has left, the CTA loads it when they are done.
__device__ void start_next(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity, int64_t r,
                           const Team<1>& team, const RowSeat& seat, int64_t step, int32_t end) {
  if (claim(c, team, seat, step, end) < 0) return;
  if (team.lane() == 0) atomicAdd(&chip.tally->running, 1);
  if (c.plan.begins) {
    if (team.lane() == 0) chip.tally->restarted = 1;
    return;
  }
  load_start(c, chip, s, parity, r, team.lane(), 32);
  __syncwarp();
}

// Moves the rows of a CTA between the GPU's memory and the chip.
template <bool In>
__device__ void move_rows(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * c.plan.block_rows, H = c.net.H, units = units_of(c.net);
  const int64_t left = c.plan.rows - begin, count = left < c.plan.block_rows ? left : c.plan.block_rows;
  for (int64_t r = threadIdx.x; r < c.plan.block_rows; r += blockDim.x) {
    if (In) {
      fetch_row(c, begin + r, chip.rows[r]);
    } else if (r < count) {
      c.rows[begin + r] = chip.rows[r];
    }
  }
  for (int64_t i = threadIdx.x; i < count * c.net.L * H; i += blockDim.x) {
    const int64_t r = i / (c.net.L * H), layer = i / H % c.net.L, u = i % H;
    float* state = c.state + ((begin + r) * c.net.L + layer) * 2 * H + u;
    float* h = chip.h_of(layer, parity) + u * s.pitch + r;
    float* carry = chip.carry + (layer * c.plan.block_rows + r) * units + u;
    if (In) {
      *h = state[0];
      if (c.net.carries) *carry = state[H];
    } else {
      state[0] = *h;
      if (c.net.carries) state[H] = *carry;
    }
  }
}

template <int Tile>
__device__ __forceinline__ void run_layer(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int64_t layer,
                                          int parity) {
  const int64_t units = units_of(c.net);
  for (int64_t i = threadIdx.x; i < units * (c.plan.block_rows / Tile); i += blockDim.x) {
    const int64_t u = Tile == 1 ? i : i % units, first = Tile == 1 ? 0 : i / units * Tile;
    with_kind(c, [&](auto kind) { layer_item<decltype(kind), Tile>(c, chip, s, layer, parity, u, first); });
  }
}

// The logits of all rows. Where a step is begun meanwhile, the warps that make them wait for each other alone.
template <int Tile>
__device__ __forceinline__ void run_head(const GenerateCall& c, const Chip& chip, const SharedLayout& s, int parity) {
  const int64_t columns = columns_of(c.net);
  for (int64_t i = threadIdx.x; i < columns * (c.plan.block_rows / Tile); i += blockDim.x) {
    const int64_t column = Tile == 1 ? i : i % columns, first = Tile == 1 ? 0 : i / columns * Tile;
    if (c.net.per_word == 1)
      head_item<1, Tile>(c, chip, s, parity, column, first);
    else
      head_item<2, Tile>(c, chip, s, parity, column, first);
  }
  if (Tile != 1 || !c.plan.begins) return __syncthreads();
  const unsigned front = columns < blockDim.x ? static_cast<unsigned>(columns) : blockDim.x;
  if (threadIdx.x < front) front_sync(front);
}

// A CTA's view, and its memory as a launch begins: weights, and zeros for states.
__device__ __forceinline__ Chip set_up(const GenerateCall& c, const SharedLayout& s, unsigned char* memory,
                                       Tally* tally) {
  Chip chip{};
  chip.layer_floats = k_words(c.net) * c.net.per_word * s.pitch;
  chip.weights = reinterpret_cast<const uint32_t*>(memory);
  chip.floats = reinterpret_cast<const float*>(chip.weights + floats_at(c.net));
  chip.table = reinterpret_cast<const float*>((c.plan.table_on_chip ? chip.weights : c.blob) + table_at(c.net));
  chip.h = reinterpret_cast<float*>(memory + s.h), chip.carry = reinterpret_cast<float*>(memory + s.carry);
  chip.begun = reinterpret_cast<float*>(memory + s.begun), chip.logits = reinterpret_cast<float*>(memory + s.logits);
  chip.rows = reinterpret_cast<DeviceRow*>(memory + s.rows), chip.tally = tally;
  const int64_t words = c.plan.table_on_chip ? blob_words(c.net) : table_at(c.net);
  for (int64_t i = threadIdx.x; i < words; i += blockDim.x) reinterpret_cast<uint32_t*>(memory)[i] = c.blob[i];
  for (int64_t i = threadIdx.x; i < c.net.L * 2 * chip.layer_floats; i += blockDim.x) chip.h[i] = 0.0f;
  for (int64_t i = threadIdx.x; c.net.carries && i < c.net.L * units_of(c.net) * c.plan.block_rows; i += blockDim.x)
    chip.carry[i] = 0.0f;
  if (threadIdx.x == 0) *tally = {};
  __syncthreads();
  move_rows<true>(c, chip, s, 0);
  __syncthreads();
  return chip;
}

// Owns:   plan.block_rows sequences from their state to their state, and their entries of the log.
// Keeps:  the weights, the table where it fits, h, c, the logits and, of one sequence where they fit, the sums that the
//         next step begins with in shared memory; other sums and masses in registers.
// Moves:  the weights once a launch; a step reads Gates * units floats of the table a row where that is not on the chip
//         and writes 4 or 8 bytes of the log a row, to the host and kPublished steps at a time.
// Syncs:  the CTA, L + 2 times a step, or L + 1 times and the head's warps once where a step is begun beside them;
//         twice more in such a step that begins with another request's state. CTAs meet in the queue's counter alone,
//         nobody waits for another.
// Limits: plan.fits; no window state.
template <int Tile> __global__ void __launch_bounds__(kMostThreads, 1) generate_kernel(GenerateCall c) {
  FR_DYNAMIC_SHARED(unsigned char, memory);
  FR_SHARED(Tally, tally, 1);
  const bool begins = Tile == 1 && c.plan.begins;
  const SharedLayout s = shared_layout(c.net, c.plan.block_rows, Tile, blockDim.x, c.plan.table_on_chip, begins);
  const Chip chip = set_up(c, s, memory, tally);
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const DrawScratch scratch = scratch_of(memory, s.draw, c.net, warp);
  const Team<1> team{reinterpret_cast<uint64_t*>(memory + s.draw.slots) + warp};
  const auto seat = [&](int64_t r) {
    return RowSeat{chip.rows[r], blockIdx.x * c.plan.block_rows + r, chip.logits + r * s.logits_row};
  };
  const int64_t left = c.plan.rows - blockIdx.x * c.plan.block_rows;
  const int64_t count = left < c.plan.block_rows ? left : c.plan.block_rows;
  for (int64_t r = warp; r < count; r += warps) {
    if (!chip.rows[r].active)
      start_next(c, chip, s, 0, r, team, seat(r), -1, 0);
    else if (team.lane() == 0)
      atomicAdd(&tally->running, 1);
  }
  int parity = 0;
  for (int64_t step = 0;; ++step, parity ^= 1) {
    __syncthreads();
    const bool restarted = begins && tally->restarted;
    if (restarted) load_start(c, chip, s, parity, 0, threadIdx.x, blockDim.x);
    if (step == c.steps || tally->running == 0) break;
    if (threadIdx.x == 0) tally->begun = 0;
    if (begins && (step == 0 || restarted)) begin_anew(c, chip, s, parity);
    for (int64_t layer = 0; layer < c.net.L; ++layer) {
      run_layer<Tile>(c, chip, s, layer, parity);
      __syncthreads();
    }
    run_head<Tile>(c, chip, s, parity);
    for (int64_t r = warp; r < count; r += warps) {
      if (const int32_t end = finish_row(c, team, seat(r), scratch, step)) {
        if (team.lane() == 0) atomicAdd(&tally->running, -1);
        start_next(c, chip, s, parity ^ 1, r, team, seat(r), step, end);
      }
    }
    if (begins && step + 1 < c.steps) begin_step(c, chip, s, parity ^ 1);
    if (publishes(c, step)) publish(c, step + 1);
  }
  publish(c, c.steps);
  move_rows<false>(c, chip, s, parity);
}

}  // namespace

int generate(const GenerateCall& c, StepGraph& graph, void* stream) {
  if (c.plan.way == Way::steps) return graph.launch(c, stream);
  if (c.plan.way == Way::cluster) return generate_clustered(c, stream);
  const auto run = [&](auto kernel) {
    return FR_LAUNCH(kernel, static_cast<unsigned>(c.plan.blocks), static_cast<unsigned>(c.plan.threads),
                     static_cast<size_t>(c.plan.shared_bytes), static_cast<cudaStream_t>(stream), c);
  };
  return c.plan.tile == 1 ? run(generate_kernel<1>) : run(generate_kernel<8>);
}

}  // namespace fr::cuda
