#include "row_states.h"

#include <algorithm>
#include <cstring>

namespace fr {
namespace {

// Elements of stored products in one stretch of a prompt: they and the outputs of two layers stay in a core's cache.
constexpr int64_t kStretchElements = 1 << 18;

int64_t products_of(const PackedNetwork& net) { return net.padded * gates_of(net.cell); }

LayerJob layer_job(const PackedNetwork& net, int64_t layer, int64_t rows) {
  LayerJob job{};
  job.network = &net, job.layer = &net.layers[static_cast<size_t>(layer)], job.rows = rows;
  return job;
}

// Tiles read whole blocks of rows from wherever a job's rows begin.
constexpr int64_t kBlockRows = 32;

// Elements of a layer's states for each thread below which one thread makes scaled activations of all of them: some
// 2 us, what it costs threads to meet.
constexpr int64_t kRoundedAlone = 1 << 14;

// Runs a layer, and makes the activations that wait for its last state.
void make_activations(const LayerJob& job, Part part) {
  const PackedNetwork& net = *job.network;
  for (int64_t r = part.begin(job.rows); r < part.end(job.rows); ++r)
    net.kernels->to_activations(job.states + r * net.padded, net.padded, static_cast<char*>(job.out) + r * net.row,
                                net.row);
}
void run_layer_job(const LayerJob& job, Team& team) {
  team.run(job.network->kernels->layer, job);
  if (!job.network->scaled) return;
  if (job.rows * job.network->padded < kRoundedAlone * team.size())
    make_activations(job, {0, 1});
  else
    team.run(make_activations, job);
}

// What ids read, side by side.
void gather(const PackedNetwork& net, const int32_t* ids, int64_t n, const Memory& out) {
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(out.as<char>() + i * net.input_row, net.inputs.as<char>() + ids[i] * net.input_row,
                static_cast<size_t>(net.input_row));
}

}  // namespace

RowStates::RowStates(const PackedNetwork& net, int64_t capacity)
    : net_(net),
      capacity_(capacity),
      gathered_((capacity + kBlockRows) * net.input_row),
      rounding_(net.scaled ? capacity * net.padded * 4 : 0) {
  for (int64_t l = 0; l < net.L; ++l) {
    for (auto& buffer : activations_) buffer.emplace_back((capacity + kBlockRows) * net.row);
    carry_.emplace_back(net.carried * capacity * 4);
  }
}

char* RowStates::activations(int64_t layer, int64_t row) const {
  return activations_[parity_][static_cast<size_t>(layer)].as<char>() + row * net_.row;
}

void RowStates::advance(const int32_t* ids, int64_t rows, Team& team) {
  for (int64_t l = 0; l < net_.L; ++l) {
    const auto at = static_cast<size_t>(l);
    LayerJob job = layer_job(net_, l, rows);
    job.a2 = activations_[parity_][at].get(), job.out = activations_[parity_ ^ 1][at].get();
    job.carry = carry(l), job.carry_rows = capacity_, job.states = rounding_.as<float>();
    if (l) {
      job.a1 = activations_[parity_ ^ 1][at - 1].get(), job.row1 = net_.row;
    } else if (net_.table.get()) {
      job.init = net_.table.as<float>(), job.index = ids, job.table = true;
    } else {
      gather(net_, ids, rows, gathered_);
      job.a1 = gathered_.get(), job.row1 = net_.input_row;
    }
    run_layer_job(job, team);
  }
  parity_ ^= 1;
}

void RowStates::logits(int64_t begin, int64_t rows, float* out, int64_t out_row, Team& team) {
  LinearJob job{};
  job.network = &net_, job.panels = &net_.head, job.rows = rows, job.a = activations(net_.L - 1, begin);
  job.row = net_.row, job.bias = net_.head_bias.as<float>(), job.out = out, job.out_row = out_row;
  job.backwards = turn_ = !turn_;
  team.run(net_.kernels->linear, job);
}

void RowStates::clear(int64_t row) {
  const int64_t W = net_.kernels->width;
  for (int64_t l = 0; l < net_.L; ++l) {
    std::memset(activations(l, row), 0, static_cast<size_t>(net_.row));
    for (int64_t u = 0; u < net_.carried; u += W)
      std::memset(carry(l) + (u / W * capacity_ + row) * W, 0, static_cast<size_t>(W) * 4);
  }
}

void RowStates::copy_row(const RowStates& from, int64_t from_row, int64_t row) {
  const int64_t W = net_.kernels->width;
  for (int64_t l = 0; l < net_.L; ++l) {
    std::memcpy(activations(l, row), from.activations(l, from_row), static_cast<size_t>(net_.row));
    for (int64_t u = 0; u < net_.carried; u += W)
      std::memcpy(carry(l) + (u / W * capacity_ + row) * W, from.carry(l) + (u / W * from.capacity_ + from_row) * W,
                  static_cast<size_t>(W) * 4);
  }
}

void RowStates::set_row(int64_t row, const float* h, const float* c) {
  const int64_t W = net_.kernels->width, H = net_.H;
  clear(row);
  for (int64_t l = 0; l < net_.L; ++l) {
    net_.kernels->to_activations(h + l * H, H, activations(l, row), net_.row);
    const float* state = net_.cell == Cell::lstm ? c : h;
    for (int64_t u = 0; u < H && net_.carried; ++u) carry(l)[(u / W * capacity_ + row) * W + u % W] = state[l * H + u];
  }
}

void RowStates::get_row(int64_t row, float* h, float* c) const {
  const int64_t W = net_.kernels->width, H = net_.H;
  for (int64_t l = 0; l < net_.L; ++l) {
    net_.kernels->from_activations(activations(l, row), net_.row, H, h + l * H);
    float* state = net_.cell == Cell::lstm ? c : h;
    for (int64_t u = 0; u < H && net_.carried; ++u) state[l * H + u] = carry(l)[(u / W * capacity_ + row) * W + u % W];
  }
}

PromptReader::PromptReader(const PackedNetwork& net, int64_t rows)
    : net_(net),
      rows_(rows),
      positions_(std::max(rows, kStretchElements / products_of(net))),
      states_(net, rows),
      products_((positions_ + kBlockRows) * products_of(net) * 4),
      gathered_((positions_ + kBlockRows) * net.input_row),
      ids_(static_cast<size_t>(positions_)) {
  for (auto& buffer : outputs_) buffer = Memory((positions_ + kBlockRows) * net.row);
}

// The ids of all prompts, those of one position side by side: id t of prompt i lies at start[t] + i, and the first
// count(t) prompts reach it.
struct PromptReader::Stretch {
  int64_t length, total;
  std::vector<int64_t> start;
  int64_t at(int64_t t) const { return start[static_cast<size_t>(t)]; }
  int64_t count(int64_t t) const { return at(t + 1) - at(t); }
};

void PromptReader::read(RowStates& states, const std::vector<Prompt>& prompts, Team& team) {
  const auto n = static_cast<int64_t>(prompts.size());
  for (int64_t i = 0; i < n; ++i) states_.copy_row(states, prompts[static_cast<size_t>(i)].row, i);
  Stretch s{prompts[0].length, 0, {0}};
  int64_t reach = n;
  for (int64_t t = 0; t < s.length; ++t) {
    while (prompts[static_cast<size_t>(reach - 1)].length <= t) --reach;
    for (int64_t i = 0; i < reach; ++i) ids_[static_cast<size_t>(s.total++)] = prompts[static_cast<size_t>(i)].ids[t];
    s.start.push_back(s.total);
  }
  for (int64_t l = 0; l < net_.L; ++l) run_layer(s, l, team);
  for (int64_t i = 0; i < n; ++i) states.copy_row(states_, i, prompts[static_cast<size_t>(i)].row);
}

void PromptReader::run_layer(const Stretch& s, int64_t l, Team& team) {
  const PackedLayer& layer = net_.layers[static_cast<size_t>(l)];
  const int64_t products = products_of(net_);
  const bool table = l == 0 && net_.table.get();
  char* out = outputs_[l & 1].as<char>();
  if (!table) {
    LinearJob job{};
    job.network = &net_, job.panels = &layer.input, job.rows = s.total, job.out = products_.as<float>();
    job.out_row = products, job.bias = layer.bias.as<float>();
    if (l == 0) gather(net_, ids_.data(), s.total, gathered_);
    job.a = l ? outputs_[(l - 1) & 1].get() : gathered_.get(), job.row = l ? net_.row : net_.input_row;
    team.run(net_.kernels->linear, job);
  }
  for (int64_t t = 0; t < s.length; ++t) {
    LayerJob job = layer_job(net_, l, s.count(t));
    job.init = table ? net_.table.as<float>() : products_.as<float>() + s.at(t) * products;
    job.index = table ? ids_.data() + s.at(t) : nullptr, job.table = table;
    job.a2 = t == 0 ? states_.activations(l, 0) : out + s.at(t - 1) * net_.row;
    job.out = out + s.at(t) * net_.row, job.carry = states_.carry(l), job.carry_rows = states_.capacity_;
    job.states = states_.rounding_.as<float>();
    run_layer_job(job, team);
  }
  for (int64_t t = 0; t < s.length; ++t) {  // the last output of each prompt
    const int64_t stays = t + 1 < s.length ? s.count(t + 1) : 0;
    for (int64_t i = stays; i < s.count(t); ++i)
      std::memcpy(states_.activations(l, i), out + (s.at(t) + i) * net_.row, static_cast<size_t>(net_.row));
  }
}

}  // namespace fr
