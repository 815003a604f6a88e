#include "lane.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace fr {
namespace {

constexpr int64_t kHeadBytes = 2048 << 10;  // of logits at once: they are drawn from while a core's cache holds them
constexpr int64_t kTiledRows = 4;           // fewer wait for weights, whatever becomes of their logits
constexpr int64_t kLogEntries = 1 << 14;
constexpr int64_t kReaderRows = 32;
// Bytes of weights times rows between two looks at the clock, which costs as much as a step of the smallest networks:
// some 20 us of work.
constexpr int64_t kWorkBetweenClocks = 1 << 22;

int64_t rows_of_logits(const PackedNetwork& net, int64_t capacity) {
  const int64_t rows = kHeadBytes / (net.head_columns * 4) / 16 * 16;
  return std::min(capacity, std::max<int64_t>(rows, 16));
}

}  // namespace

Lane::Lane(Session& session, int64_t capacity)
    : session_(session),
      net_(session.network()),
      capacity_(capacity),
      head_rows_(rows_of_logits(net_, capacity)),
      log_steps_(std::max<int64_t>(16, kLogEntries / capacity)),
      clock_steps_(std::clamp<int64_t>(kWorkBetweenClocks / (capacity * net_.weight_bytes), 1, 64)),
      states_(net_, capacity),
      reader_(net_, std::min(capacity, kReaderRows)),
      head_draw_(net_, capacity, session.team()),
      drawer_(make_drawer(net_.V, 1)),
      logits_(head_rows_ * net_.head_columns * 4) {
  const auto n = static_cast<size_t>(capacity);
  row_.resize(n), ids_.resize(n), status_.resize(n);
  for (auto* column : {&scale_, &min_p_, &logprob_, &tempered_, &margin_}) column->resize(n);
  for (auto* column : {&top_k_, &top_p_, &seed_, &sequence_, &step_, &token_, &left_}) column->resize(n);
  log_tokens_.resize(static_cast<size_t>(log_steps_ * capacity));
  log_logprobs_.resize(log_tokens_.size());
  plain_.resize(static_cast<size_t>(net_.V));
}

void Lane::run(int64_t steps, Clock::time_point deadline, Team& team) {
  steps = std::min(steps, log_steps_);
  int64_t step = 0;
  if (newcomers_ == 0 && reading_.empty()) remove_finished(0);
  while (step < steps && admit(step, deadline, team) && rows_ > 0) {
    step_rows(step, team);
    ++step;
    remove_finished(step);
    if (step % clock_steps_ == 0 && Clock::now() >= deadline) break;
  }
  for (int64_t row = 0; row < rows_; ++row) {
    flush(row, step);
    row_[static_cast<size_t>(row)].since = 0;
  }
}

// Fills the free rows from the queue and reads what has to be read before the next step; false where that is not done
// yet, or where rows are idle and more requests may come.
bool Lane::admit(int64_t step, Clock::time_point deadline, Team& team) {
  if (session_.windowed_) {
    if (reading_.empty()) {  // else the windows of this step are being read
      while (take_newcomers()) activate(step);
      list_windows();
    }
    return read(deadline, team);
  }
  while (newcomers_ > 0 || take_newcomers()) {
    if (!read(deadline, team)) return false;
    activate(step);
  }
  return !(session_.more_ && rows_ < capacity_ - capacity_ / 8);
}

// Gives free rows to requests of the queue; whether there were any.
bool Lane::take_newcomers() {
  GenerationRequest request;
  while (occupied() < capacity_ && newcomers_ < kReaderRows && session_.next_request(request)) {
    place(std::move(request), occupied());
    ++newcomers_;
  }
  return newcomers_ > 0;
}

void Lane::place(GenerationRequest request, int64_t row) {
  const auto r = static_cast<size_t>(row);
  scale_[r] = request.scale, min_p_[r] = request.min_p, top_k_[r] = request.top_k, top_p_[r] = request.top_p;
  seed_[r] = request.seed, sequence_[r] = request.sequence, step_[r] = 0, left_[r] = request.max_new_tokens;
  if (request.mode_of > votes_) drawer_ = make_drawer(net_.V, request.mode_of), votes_ = request.mode_of;
  row_[r] = Row{};
  row_[r].request = std::move(request);
  row_[r].result.index = row_[r].request.index;
  const GenerationRequest& q = row_[r].request;
  if (q.penalty != 1.0f) {
    std::vector<uint8_t>& seen = row_[r].seen;
    seen.assign(static_cast<size_t>(net_.V), 0);
    if (q.start) seen = q.start->seen;
    for (const int32_t id : q.prompt) seen[static_cast<size_t>(id)] = 1;
  }
  if (session_.windowed_) {
    if (q.start) row_[r].ids = q.start->tail;
    row_[r].ids.insert(row_[r].ids.end(), q.prompt.begin(), q.prompt.end());
    return;
  }
  if (q.start)
    states_.set_row(row, q.start->h.data(), q.start->c.data());
  else
    states_.clear(row);
  if (q.prompt.size() > 1) reading_.push_back({row, 0, static_cast<int64_t>(q.prompt.size()) - 1, q.prompt.data()});
  if (!q.prompt.empty()) ids_[r] = q.prompt.back();
}

// The newcomers run from now on; one without a prompt draws its first token from the logits it starts with.
void Lane::activate(int64_t step) {
  for (; newcomers_ > 0; --newcomers_) {
    const int64_t row = rows_++;
    Row& now = row_[static_cast<size_t>(row)];
    now.since = step;
    if (session_.windowed_ || !now.request.prompt.empty() || now.over) continue;
    std::copy_n(now.request.start->logits.data(), net_.V, logits_.as<float>());
    draw(row, row + 1, logits_.as<float>());
    record(row, step);
    flush(row, step + 1);
    now.since = step;  // the next one takes the place of this one in the log
  }
  remove_finished(step);
}

// Every row's last ids are to be read, from a zero state.
void Lane::list_windows() {
  for (int64_t row = 0; row < rows_; ++row) {
    const Row& at = row_[static_cast<size_t>(row)];
    const int64_t length = std::min(at.request.window, static_cast<int64_t>(at.ids.size()));
    states_.clear(row);
    reading_.push_back({row, 0, length, at.ids.data() + at.ids.size() - static_cast<size_t>(length)});
  }
}

// Reads stretch by stretch what is to be read; false when the deadline comes first.
bool Lane::read(Clock::time_point deadline, Team& team) {
  std::vector<PromptReader::Prompt> prompts;
  while (!reading_.empty()) {
    std::sort(reading_.begin(), reading_.end(),
              [](const Reading& a, const Reading& b) { return a.length - a.done > b.length - b.done; });
    const int64_t n = std::min(static_cast<int64_t>(reading_.size()), reader_.rows()), most = reader_.stretch(n);
    prompts.clear();
    for (int64_t i = 0; i < n; ++i) {
      Reading& now = reading_[static_cast<size_t>(i)];
      prompts.push_back({now.row, now.ids + now.done, std::min(most, now.length - now.done)});
      now.done += prompts.back().length;
    }
    reader_.read(states_, prompts, team);
    std::erase_if(reading_, [](const Reading& r) { return r.done == r.length; });
    if (!reading_.empty() && Clock::now() >= deadline) return false;
  }
  return true;
}

void Lane::step_rows(int64_t step, Team& team) {
  if (!session_.windowed_) states_.advance(ids_.data(), rows_, team);
  if (rows_ >= kTiledRows && HeadDraw::suits(net_) && all_plain()) {
    head_draw_.draw(states_, sample_of(0, rows_), *drawer_, team);
    for (int64_t row = 0; row < rows_; ++row) record(row, step);
    return;
  }
  for (int64_t begin = 0; begin < rows_; begin += head_rows_) {
    const int64_t rows = std::min(head_rows_, rows_ - begin);
    states_.logits(begin, rows, logits_.as<float>(), net_.head_columns, team);
    draw(begin, begin + rows, logits_.as<float>());
    for (int64_t row = begin; row < begin + rows; ++row) record(row, step);
  }
}

// Whether nothing but the token of a plain draw is wanted of any row.
bool Lane::all_plain() const {
  for (int64_t row = 0; row < rows_; ++row) {
    const GenerationRequest& q = row_[static_cast<size_t>(row)].request;
    const bool filtered = q.top_k != 0 || q.top_p != 0 || q.min_p != INFINITY;
    if (q.scale == 0.0f || filtered || q.logprobs || q.mode_of > 1 || q.penalty != 1.0f) return false;
  }
  return true;
}

// Draws for the rows begin .. end from their logits, head_columns apart, in runs of rows that share the options of a
// call.
void Lane::draw(int64_t begin, int64_t end, float* logits) {
  const auto shares = [&](int64_t a, int64_t b) {
    const GenerationRequest &x = row_[static_cast<size_t>(a)].request, &y = row_[static_cast<size_t>(b)].request;
    return x.mode_of == y.mode_of && x.logprobs == y.logprobs && y.penalty == 1.0f;
  };
  for (int64_t row = begin; row < end;) {
    float* at = logits + (row - begin) * net_.head_columns;
    int64_t next = row + 1;
    if (row_[static_cast<size_t>(row)].request.penalty != 1.0f) {
      draw_penalised(row, at);
    } else {
      while (next < end && shares(row, next)) ++next;
      draw_same(row, next, at);
    }
    row = next;
  }
}

void Lane::draw_same(int64_t begin, int64_t end, const float* logits) {
  Sample s = sample_of(begin, end);
  s.logits = logits, s.logits_stride = net_.head_columns;
  drawer_->draw(s, 0, s.B);
}

// The rows begin .. end, which share the options of a call, without their logits.
Sample Lane::sample_of(int64_t begin, int64_t end) {
  const GenerationRequest& first = row_[static_cast<size_t>(begin)].request;
  Sample s{};
  s.B = end - begin, s.V = net_.V;
  s.scale = scale_.data() + begin, s.min_p = min_p_.data() + begin;
  s.top_k = top_k_.data() + begin, s.top_p = top_p_.data() + begin;
  s.seed = seed_.data() + begin, s.sequence = sequence_.data() + begin, s.step = step_.data() + begin;
  s.mode_of = first.mode_of, s.logprobs = first.logprobs;
  s.token = token_.data() + begin, s.status = status_.data() + begin, s.logprob = logprob_.data() + begin;
  s.tempered_logprob = tempered_.data() + begin, s.margin = margin_.data() + begin;
  return s;
}

// A row with a repetition penalty: ids that have occurred become less likely; the log-probability is of the logits
// as they were.
void Lane::draw_penalised(int64_t row, float* logits) {
  const Row& at = row_[static_cast<size_t>(row)];
  std::copy_n(logits, net_.V, plain_.data());
  for (int64_t v = 0; v < net_.V; ++v)
    if (at.seen[static_cast<size_t>(v)]) logits[v] *= logits[v] > 0 ? at.request.inverse_penalty : at.request.penalty;
  draw_same(row, row + 1, logits);
  if (!at.request.logprobs || status_[static_cast<size_t>(row)]) return;
  double most = -INFINITY, sum = 0;
  for (const float x : plain_) most = std::max(most, static_cast<double>(x));
  for (const float x : plain_) sum += std::exp(x - most);
  const double drawn = plain_[static_cast<size_t>(token_[static_cast<size_t>(row)])];
  logprob_[static_cast<size_t>(row)] = static_cast<float>(drawn - most - std::log(sum));
}

// What the draw of a row has given.
void Lane::record(int64_t row, int64_t step) {
  const auto r = static_cast<size_t>(row);
  Row& now = row_[r];
  if (now.over) return;
  if (status_[r]) {
    now.result.status = status_[r];
    return end_row(row, step, Finish::error);
  }
  const auto token = static_cast<int32_t>(token_[r]);
  const auto entry = static_cast<size_t>(step * capacity_ + row);
  log_tokens_[entry] = token, log_logprobs_[entry] = logprob_[r];
  ids_[r] = token;
  ++step_[r];
  --left_[r];
  if (!now.seen.empty()) now.seen[static_cast<size_t>(token)] = 1;
  if (session_.windowed_) now.ids.push_back(token);
  const std::vector<int32_t>& eos = now.request.eos;
  if (std::find(eos.begin(), eos.end(), token) != eos.end()) return end_row(row, step + 1, Finish::eos);
  if (left_[r] == 0) end_row(row, step + 1, Finish::length);
}

void Lane::end_row(int64_t row, int64_t end, Finish finish) {
  flush(row, end);
  row_[static_cast<size_t>(row)].over = true;
  row_[static_cast<size_t>(row)].result.finish = finish;
}

// Moves a row's tokens of the steps before `end` from the log to its result.
void Lane::flush(int64_t row, int64_t end) {
  Row& now = row_[static_cast<size_t>(row)];
  if (now.over) return;
  for (; now.since < end; ++now.since) {
    const auto entry = static_cast<size_t>(now.since * capacity_ + row);
    now.result.tokens.push_back(log_tokens_[entry]);
    if (now.request.logprobs) now.result.logprobs.push_back(log_logprobs_[entry]);
    if (session_.keep_events_) events.push_back({now.result.index, log_tokens_[entry]});
  }
}

// Hands out the results of rows that are over; the last rows take their places, with nothing of theirs left in the log
// before step `end`.
void Lane::remove_finished(int64_t end) {
  for (int64_t row = rows_ - 1; row >= 0; --row) {
    const auto r = static_cast<size_t>(row), last = static_cast<size_t>(rows_ - 1);
    if (!row_[r].over) continue;
    results.push_back(std::move(row_[r].result));
    if (r != last) {
      flush(rows_ - 1, end);
      states_.copy_row(states_, rows_ - 1, row);
      row_[r] = std::move(row_[last]);
      row_[r].since = end;
      ids_[r] = ids_[last];
      for (auto* column : {&scale_, &min_p_}) (*column)[r] = (*column)[last];
      for (auto* column : {&top_k_, &top_p_, &seed_, &sequence_, &step_, &left_}) (*column)[r] = (*column)[last];
    }
    --rows_;
  }
}

// Ends a request between two runs; its result comes out of the next one.
void Lane::stop(int64_t index) {
  for (int64_t row = 0; row < occupied(); ++row)
    if (row_[static_cast<size_t>(row)].result.index == index && !row_[static_cast<size_t>(row)].over)
      end_row(row, 0, Finish::stop);
}

}  // namespace fr
