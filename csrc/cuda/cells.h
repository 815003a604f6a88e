// The contract between the bindings and the cells' kernels on a GPU: raw device pointers, a stream, no torch, no CUDA.
//
// Letters, gate order, lengths, reset and reverse as in kernels.h; here P = H. Every tensor is dense and time-major; E
// is the number that `precision` names: float, half or bfloat16. Sums and c are float; h is what y holds, rounded to E.
// Aliasing and outputs as in kernels.h: every element of an output is written. Lengths beyond 0 .. T act as 0 or T.
// A row's forward, dh0 and dc0 depend on that row's inputs and the weights alone, bit for bit, within one kind of plan.
// Calls are asynchronous on `stream`, and deterministic. Each returns null, or what the CUDA runtime said.
#pragma once

#include <cstdint>

namespace fr::cuda {

// How numbers are held and multiplied: tf32 holds float and rounds the factors of a product to 10 bits of fraction.
enum class Precision : int { f32, tf32, f16, bf16 };

struct CellForward {
  Precision precision;
  int64_t T, B, I, H;
  // The input's part: gx (T, B, G*H) = x W_ih^T + b_ih. Or, where T is 1, null, and one launch makes it from the rest.
  const void* gx;
  const void* x;           // (B, I)
  const void* w_ih;        // (G*H, I)
  const void* b_ih;        // (G*H,) or null
  const void* w_hh;        // (G*H, H)
  const void* b_hh;        // (G*H,) or null
  const void* h0;          // (B, H)
  const void* c0;          // (B, H), LSTM only
  const int64_t* lengths;  // (B,) or null
  const bool* reset;       // (T, B) or null
  bool reverse;
  bool relu;     // RNN only: else tanh
  void* y;       // out (T, B, H)
  void* hn;      // out (B, H)
  void* cn;      // out (B, H), LSTM only
  void* gates;   // out (T, B, 4H), LSTM and GRU, or null: not wanted
  void* cells;   // out (T, B, H), LSTM; null exactly when gates is
  float* c;      // scratch (B, H), LSTM only
  void* stream;  // cudaStream_t
};

struct CellBackward {
  Precision precision;
  int64_t T, B, H;
  const void* w_hh;  // (G*H, H)
  const void* h0;    // (B, H)
  const void* c0;    // (B, H), LSTM only
  const int64_t* lengths;
  const bool* reset;
  bool reverse;
  bool relu;
  const void* y;      // (T, B, H) of the forward call, as are gates and cells
  const void* gates;  // (T, B, 4H), LSTM and GRU
  const void* cells;  // (T, B, H), LSTM
  const void* dy;     // (T, B, H); not read beyond a row's length
  const void* dhn;    // (B, H)
  const void* dcn;    // (B, H), LSTM
  void* dgx;          // out (T, B, G*H): gradients of the pre-activations' input part; 0 beyond a row's length
  void* dgh;          // out (T, B, G*H), GRU only: those of the hidden part; elsewhere they are dgx
  void* dh0;          // out (B, H)
  void* dc0;          // out (B, H), LSTM
  float* dh;          // scratch (B, H)
  float* dc;          // scratch (B, H), LSTM
  void* stream;
};

const char* lstm_forward(const CellForward& call);
const char* lstm_backward(const CellBackward& call);
const char* gru_forward(const CellForward& call);
const char* gru_backward(const CellBackward& call);
const char* rnn_forward(const CellForward& call);
const char* rnn_backward(const CellBackward& call);

// For tests and measurements: from now on plans have that many row tiles (1 or 4; 0: as it suits) and CTAs in a cluster
// (a power of two up to 16; 0: a launch a step; -1: as it suits). See plan.h.
void want_plan(int64_t row_tiles, int64_t cluster);

// What the gradients of the weights are taken against; E by its size alone, which is 2 or 4 bytes.
struct Rows {
  int64_t T, B, width, element_bytes;
  const int64_t* lengths;
  const bool* reset;
  bool reverse;
  const void* steps;    // (T, B, width)
  const void* initial;  // (B, width), or null
  void* out;            // out (T, B, width)
  void* stream;
};
// The state that each step started from, `steps` holding every step's result; 0 after a reset and beyond a length.
const char* previous_rows(const Rows& call);
// `steps`, with 0 beyond a length; initial and reset are not used.
const char* rows_within_lengths(const Rows& call);

}  // namespace fr::cuda
