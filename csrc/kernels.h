// The contract between the bindings, which know torch, and the kernels, which know raw pointers only.
//
// Letters: T time, B batch, I input, H hidden, P projection (P = H without one), G gates (LSTM 4, GRU 3, RNN 1).
// Every tensor is dense, row-major and time-major; F is float, double or bf16, one for all tensors of a call. Sizes may
// be 0 except H and P. Gate order is PyTorch's: LSTM i f g o, GRU r z n.
//
// Aliasing: inputs may alias each other; an output aliases nothing else of the call.
// Outputs: every element is written, whatever the memory held before. Where a row is past its length (see `lengths`)
// y, gates, cells and dx are 0.
// Scratch: each call allocates its own with malloc and throws std::bad_alloc; no value is kept between calls, but up to
// 16 MB of a thread's memory are.
// Determinism: forward, dx, dh0 and dc0 of a row depend on that row's inputs and the weights alone, bit for bit: not on
// B, on the row's place, on T being split over calls or on the thread count. Weight gradients do not depend on the
// thread count.
// bf16: sums and the cell state c are float; h is what y holds, rounded. A call returns c rounded, so an LSTM whose T
// is split has other bits there. NaN and infinity propagate as the equations (cell_math.h) say; memory safety never
// depends on values.
#pragma once

#include <cstdint>
#include <memory>

namespace fr {

// A number's upper half of a float.
struct bf16 {
  uint16_t bits;
};

// How a kernel gets threads without knowing torch. run(n, task, ctx) calls task(begin, end, ctx) on ranges that cover
// 0..n once each, on up to `threads` threads, and returns when all are done.
struct Pool {
  int64_t threads;
  void (*run)(int64_t n, void (*task)(int64_t begin, int64_t end, void* ctx), void* ctx);
};

// What every cell's forward and backward read.
template <class F> struct Sequence {
  int64_t T, B, I, H, P;
  const F* x;              // (T, B, I)
  const F* h0;             // (B, P)
  const F* w_ih;           // (G*H, I)
  const F* w_hh;           // (G*H, P)
  const F* b_ih;           // (G*H,) or null
  const F* b_hh;           // (G*H,) or null
  const int64_t* lengths;  // (B,) or null: row b is processed for t < lengths[b] only; beyond it its state stays
  const bool* reset;       // (T, B) or null: true zeroes the row's state before step t is processed
  bool reverse;            // steps run t = T-1 .. 0, a row's first step being lengths[b]-1
  Pool pool;
};

template <class F> struct LstmForward {
  Sequence<F> in;
  const F* c0;    // (B, H)
  const F* w_hr;  // (P, H), or null and then P = H
  F* y;           // out (T, B, P)
  F* hn;          // out (B, P)
  F* cn;          // out (B, H)
  F* gates;       // out (T, B, 4H) after their activations, or null: not wanted
  F* cells;       // out (T, B, H): c_t; null exactly when gates is
};

template <class F> struct LstmBackward {
  Sequence<F> in;
  const F* c0;     // (B, H)
  const F* w_hr;   // (P, H) or null
  const F* y;      // (T, B, P) of the forward call, as are gates and cells
  const F* gates;  // (T, B, 4H)
  const F* cells;  // (T, B, H)
  const F* dy;     // (T, B, P); not read beyond a row's length
  const F* dhn;    // (B, P)
  const F* dcn;    // (B, H)
  F* dx;           // out (T, B, I); may be null: not wanted
  F* dh0;          // out (B, P)
  F* dc0;          // out (B, H)
  F* dw_ih;        // out (4H, I)
  F* dw_hh;        // out (4H, P)
  F* db;           // out (4H,) or null: the gradient of b_ih and of b_hh
  F* dw_hr;        // out (P, H); null exactly when w_hr is
};

template <class F> struct GruForward {
  Sequence<F> in;
  F* y;      // out (T, B, H)
  F* hn;     // out (B, H)
  F* gates;  // out (T, B, 4H): r, z, n after their activations and q = W_hn h + b_hn, or null: not wanted
};

template <class F> struct GruBackward {
  Sequence<F> in;
  const F* y;      // (T, B, H) of the forward call, as is gates
  const F* gates;  // (T, B, 4H)
  const F* dy;     // (T, B, H); not read beyond a row's length
  const F* dhn;    // (B, H)
  F* dx;           // out (T, B, I); may be null: not wanted
  F* dh0;          // out (B, H)
  F* dw_ih;        // out (3H, I)
  F* dw_hh;        // out (3H, H)
  F* db_ih;        // out (3H,) or null
  F* db_hh;        // out (3H,) or null: differs from db_ih in its n part
};

template <class F> struct RnnForward {
  Sequence<F> in;
  bool relu;  // else tanh
  F* y;       // out (T, B, H)
  F* hn;      // out (B, H)
};

template <class F> struct RnnBackward {
  Sequence<F> in;
  bool relu;
  const F* y;    // (T, B, H) of the forward call
  const F* dy;   // (T, B, H); not read beyond a row's length
  const F* dhn;  // (B, H)
  F* dx;         // out (T, B, I); may be null: not wanted
  F* dh0;        // out (B, H)
  F* dw_ih;      // out (H, I)
  F* dw_hh;      // out (H, H)
  F* db;         // out (H,) or null: the gradient of b_ih and of b_hh
};

constexpr int64_t kMaxVocabulary = 1 << 24;

// One token a row; sampling.h holds the arithmetic, fastrnn/reference_sample.py the definition. float32 only.
// The result of a row depends on that row's elements alone. B may be 0; V is 1 .. 2^24.
struct Sample {
  int64_t B, V;
  const float* logits;    // (B, V), the elements of a row side by side
  int64_t logits_stride;  // elements between rows of logits, V or more
  const float* scale;     // (B,) log2(e) / temperature; 0: greedy
  const int64_t* top_k;   // (B,) 0: off
  const int64_t* top_p;   // (B,) in units of 2^-63; 0: off
  const float* min_p;     // (B,) -log2(min_p); +inf: off
  const bool* mask;       // (V,) when mask_stride is 0, (B, V) when it is V, true = allowed; or null
  int64_t mask_stride;
  const int64_t* seed;      // (B,) bits of a uint64, as is sequence
  const int64_t* sequence;  // (B,)
  const int64_t* step;      // (B,) the low 32 bits count
  int64_t mode_of;          // 1 or more: the most frequent token of that many draws
  bool logprobs;            // false: the three float outputs are not touched and may be null
  int64_t* token;           // out (B,); 0 where status is not 0
  float* logprob;           // out (B,) at temperature 1 over all logits; NaN where status is not 0, as are the next two
  float* tempered_logprob;  // out (B,) at the row's temperature over what mask and filters leave
  float* margin;            // out (B,)
  int32_t* status;          // out (B,) fr::draw::Status
  Pool pool;
};

constexpr int64_t kDrawTile = 256, kDrawGroup = 64;  // columns: the draw's tile, and a quarter of it
constexpr int64_t kTileGroups = kDrawTile / kDrawGroup;

// Plain draws (no mask, filter, vote or log-probability; scale not 0) from logits that are not kept. A tile that has
// been weighed is needed no more but for the group that the row's random words fall into.
struct TileDraw {
  int64_t V, rows, tiles;
  float* largest;       // (rows, tiles) of each tile
  uint64_t* sums;       // (rows, tiles, kTileGroups) of the masses of each group
  int64_t* group;       // (rows,) the group of the token, -1 where the row has a status
  uint64_t* threshold;  // (rows,) what the prefix sum of the masses within the group has to exceed
  float* top;           // (rows,) the largest logit of the group's tile
};

// Draws rows of one vocabulary again and again without allocating; but for the const members not for two threads at
// once.
class Drawer {
 public:
  virtual ~Drawer() = default;
  // Rows begin .. end of a call whose V is the drawer's, whose mode_of is at most the drawer's; its pool is not used.
  virtual void draw(const Sample& call, int64_t begin, int64_t end) = 0;
  // First: weighs tile t of all rows, whose logits are `stride` apart, with the rows' scales.
  virtual void weigh_tile(const TileDraw& d, int64_t t, const float* logits, int64_t stride,
                          const float* scale) const = 0;
  // Second, when all tiles are weighed: fills group, threshold and top, and the call's status; its logits are not read.
  virtual void find_groups(const TileDraw& d, const Sample& call) = 0;
  // Third: the token of a row that has a group, from the logits of the group.
  virtual int64_t token_in_group(const TileDraw& d, int64_t row, const float* logits, float scale) const = 0;
};
std::unique_ptr<Drawer> make_drawer(int64_t V, int64_t mode_of);

// Each is compiled once per instruction set; a call runs the variant that cpu_isa() names.
template <class F> void lstm_forward(const LstmForward<F>& call);
template <class F> void lstm_backward(const LstmBackward<F>& call);
template <class F> void gru_forward(const GruForward<F>& call);
template <class F> void gru_backward(const GruBackward<F>& call);
template <class F> void rnn_forward(const RnnForward<F>& call);
template <class F> void rnn_backward(const RnnBackward<F>& call);
void sample(const Sample& call);

// "portable", "avx2", "avx512", "avx512_bf16" or "amx": the best that this CPU has, or what FASTRNN_CPU_ISA asked for
// when it was first needed. Throws std::runtime_error when that is unknown or more than this CPU has.
const char* cpu_isa();
// Forces a variant from now on; "" returns to the choice above. Same errors. Not to be called beside a running kernel.
void set_cpu_isa(const char* name);

}  // namespace fr
