// The draw as an op on a GPU: rows of logits over warps, or over blocks where a row is more than one tile.
#include "draw.cuh"
#include "sample.h"

namespace fr::cuda {
namespace {

constexpr int kSmallWarps = 4, kWideWarps = 8;
constexpr int64_t kSharedDraws = 128;  // of a vote; more are in scratch
constexpr int64_t kSharedTiles = 512;

// Bytes a row in scratch.
__host__ __device__ int64_t tiles_bytes(int64_t V) {
  const int64_t tiles = (V + kTile - 1) / kTile;
  return tiles > kSharedTiles ? (12 * tiles + 15) / 16 * 16 : 0;
}
__host__ __device__ int64_t draws_bytes(int64_t mode_of) {
  return mode_of > kSharedDraws ? (12 * mode_of + 15) / 16 * 16 : 0;
}

__device__ DrawNumbers numbers_of(const Sample& a, int64_t row) {
  return {a.scale[row],
          a.min_p[row],
          a.top_k[row],
          a.top_p[row],
          static_cast<uint64_t>(a.seed[row]),
          static_cast<uint64_t>(a.sequence[row]),
          static_cast<uint32_t>(a.step[row]),
          a.mode_of,
          a.logprobs};
}

__device__ Logits logits_of(const Sample& a, int64_t row) {
  Logits x{};
  x.x = a.logits + row * a.logits_stride, x.V = a.V;
  x.allowed = a.mask == nullptr ? nullptr : a.mask + row * a.mask_stride;
  return x;
}

__device__ void write(const Sample& a, int64_t row, const Drawn& d) {
  a.token[row] = d.status == draw::kOk ? d.token : 0;
  a.status[row] = d.status;
  if (!a.logprobs) return;
  a.logprob[row] = d.logprob, a.tempered_logprob[row] = d.tempered_logprob, a.margin[row] = d.margin;
}

// A team's scratch: what is too large for shared memory in `global`, which is the row's own.
__device__ DrawScratch scratch_of(const Sample& a, unsigned char* global, uint64_t* mass, uint32_t* largest,
                                  double* margins, int32_t* drawn) {
  DrawScratch s{largest, mass, drawn, margins};
  const int64_t tiles = (a.V + kTile - 1) / kTile;
  if (tiles_bytes(a.V) > 0) {
    s.mass = reinterpret_cast<uint64_t*>(global);
    s.largest = reinterpret_cast<uint32_t*>(global + 8 * tiles);
  }
  if (draws_bytes(a.mode_of) > 0) {
    s.margins = reinterpret_cast<double*>(global + tiles_bytes(a.V));
    s.drawn = reinterpret_cast<int32_t*>(global + tiles_bytes(a.V) + 8 * a.mode_of);
  }
  return s;
}

// Owns:   a row a team of Warps warps; a block of `Teams` teams.
// Keeps:  a row level of up to 512 tiles and a vote of up to 128 draws in shared memory; draw_row says what in
// registers. Moves:  a row of logits, from global memory once and from the nearest cache as often as draw_row reads it.
// Syncs:  the team.
// Limits: V <= 256 where Warps is 1.
template <int Warps, int Teams>
__global__ void __launch_bounds__(32 * Warps * Teams) sample_kernel(Sample a, unsigned char* scratch) {
  constexpr int kTiles = Warps == 1 ? 1 : kSharedTiles;
  FR_SHARED(uint64_t, slots, Teams* Warps);
  FR_SHARED(uint64_t, mass, Teams* kTiles);
  FR_SHARED(uint32_t, largest, Teams* kTiles);
  FR_SHARED(double, margins, Teams* kSharedDraws);
  FR_SHARED(int32_t, drawn, Teams* kSharedDraws);
  const int place = static_cast<int>(threadIdx.x) / (32 * Warps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Teams + place;
  if (row >= a.B) return;
  unsigned char* own = scratch + row * (tiles_bytes(a.V) + draws_bytes(a.mode_of));
  const DrawScratch s = scratch_of(a, own, mass + place * kTiles, largest + place * kTiles,
                                   margins + place * kSharedDraws, drawn + place * kSharedDraws);
  const Team<Warps> team{slots + place * Warps};
  const Drawn d = draw_row(team, logits_of(a, row), numbers_of(a, row), s);
  if (team.rank() == 0) write(a, row, d);
}

}  // namespace

int64_t sample_scratch_bytes(int64_t B, int64_t V, int64_t mode_of) {
  return B * (tiles_bytes(V) + draws_bytes(mode_of));
}

int sample(const Sample& call, void* scratch, void* stream) {
  if (call.B == 0) return cudaSuccess;
  auto* const bytes = static_cast<unsigned char*>(scratch);
  const auto on = static_cast<cudaStream_t>(stream);
  if (call.V <= kTile)
    return FR_LAUNCH((sample_kernel<1, kSmallWarps>), static_cast<unsigned>((call.B + kSmallWarps - 1) / kSmallWarps),
                     32 * kSmallWarps, 0, on, call, bytes);
  return FR_LAUNCH((sample_kernel<kWideWarps, 1>), static_cast<unsigned>(call.B), 32 * kWideWarps, 0, on, call, bytes);
}

}  // namespace fr::cuda
