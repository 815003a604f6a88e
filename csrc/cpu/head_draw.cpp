#include "head_draw.h"

#include <algorithm>
#include <cstring>

namespace fr {
namespace {

constexpr int64_t kTileRow = kDrawTile + 16;  // elements between rows of a tile: an odd number of cache lines
constexpr int64_t kBlockRows = 32;            // matrix tiles read whole blocks of rows

}  // namespace

struct HeadDraw::Job {
  HeadDraw& self;
  const RowStates& states;
  const Sample& call;
  const Drawer& drawer;
  TileDraw draw;
};

HeadDraw::HeadDraw(const PackedNetwork& net, int64_t capacity, int64_t members) : net_(net) {
  if (!suits(net)) return;
  benches_.resize(static_cast<size_t>(members));
  for (Bench& bench : benches_) {
    bench.logits = Memory(capacity * kTileRow * 4);
    bench.gathered = Memory((capacity + kBlockRows) * net.row);
    bench.rows.resize(static_cast<size_t>(capacity));
  }
  const auto rows = static_cast<size_t>(capacity);
  largest_.resize(rows * net.head_tiles.size()), sums_.resize(rows * net.head_tiles.size() * kTileGroups);
  top_.resize(rows), threshold_.resize(rows), group_.resize(rows), next_.resize(rows);
  first_.assign(net.head_groups.size(), -1);
}

// logits (rows, kTileRow) = the product of activations with panels whose first column is `column`.
void HeadDraw::multiply(const Panels& panels, int64_t column, const void* a, int64_t rows, float* logits) const {
  LinearJob job{};
  job.network = &net_, job.panels = &panels, job.rows = rows, job.a = a, job.row = net_.row;
  job.bias = net_.head_bias.as<float>() + column, job.out = logits, job.out_row = kTileRow, job.backwards = turn_;
  net_.kernels->linear(job, {0, 1});
}

// The tiles of `part`, in turn from the first and from the last: what the cache still holds of them is used first.
void HeadDraw::weigh(const Job& job, Part part) {
  const HeadDraw& self = job.self;
  float* logits = self.benches_[static_cast<size_t>(part.part)].logits.as<float>();
  const int64_t begin = part.begin(job.draw.tiles), end = part.end(job.draw.tiles);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = self.turn_ ? end - 1 - (i - begin) : i;
    self.multiply(self.net_.head_tiles[static_cast<size_t>(t)], t * kDrawTile, job.states.outputs(0), job.call.B,
                  logits);
    job.drawer.weigh_tile(job.draw, t, logits, kTileRow, job.call.scale);
  }
}

// The tokens of the rows whose groups are of `part`.
void HeadDraw::pick(const Job& job, Part part) {
  HeadDraw& self = job.self;
  Bench& bench = self.benches_[static_cast<size_t>(part.part)];
  const auto groups = static_cast<int64_t>(self.first_.size());
  for (int64_t g = part.begin(groups); g < part.end(groups); ++g) {
    int64_t n = 0;
    for (int64_t row = self.first_[static_cast<size_t>(g)]; row >= 0; row = self.next_[static_cast<size_t>(row)]) {
      bench.rows[static_cast<size_t>(n)] = row;
      std::memcpy(bench.gathered.as<char>() + n++ * self.net_.row, job.states.outputs(row),
                  static_cast<size_t>(self.net_.row));
    }
    if (n == 0) continue;
    self.first_[static_cast<size_t>(g)] = -1;
    float* logits = bench.logits.as<float>();
    self.multiply(self.net_.head_groups[static_cast<size_t>(g)], g * kDrawGroup, bench.gathered.get(), n, logits);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = bench.rows[static_cast<size_t>(i)];
      job.call.token[row] = job.drawer.token_in_group(job.draw, row, logits + i * kTileRow, job.call.scale[row]);
    }
  }
}

// Chains the rows of each group.
void HeadDraw::list_by_group(int64_t rows) {
  for (int64_t row = rows - 1; row >= 0; --row) {
    const int64_t group = group_[static_cast<size_t>(row)];
    if (group < 0) continue;
    next_[static_cast<size_t>(row)] = first_[static_cast<size_t>(group)];
    first_[static_cast<size_t>(group)] = row;
  }
}

void HeadDraw::draw(const RowStates& states, const Sample& call, Drawer& drawer, Team& team) {
  turn_ = !turn_;
  Job job{*this, states, call, drawer, {}};
  job.draw.V = net_.V, job.draw.rows = call.B, job.draw.tiles = static_cast<int64_t>(net_.head_tiles.size());
  job.draw.largest = largest_.data(), job.draw.sums = sums_.data(), job.draw.group = group_.data();
  job.draw.threshold = threshold_.data(), job.draw.top = top_.data();
  team.run(weigh, job);
  drawer.find_groups(job.draw, call);
  list_by_group(call.B);
  team.run(pick, job);
}

}  // namespace fr
