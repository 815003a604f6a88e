// What a launch of the loop tells the host, seen from the host: pinned memory that the kernel writes to and the host
// reads while the kernel goes on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "generate.h"

namespace fr::cuda {

// Tokens that a request has drawn in steps one after the other.
struct Piece {
  int32_t slot;
  int64_t step, count;
  const int32_t* tokens;
  const float* logprobs;  // of no meaning where the launch was told to leave them out
};

class LaunchLog {
 public:
  // stride: steps of a launch at most. Throws std::runtime_error where there is no memory.
  LaunchLog(int64_t rows, int64_t blocks, int64_t stride);
  // For a launch; from here on the log is that launch's.
  Log begin(bool logprobs);
  // The steps that all rows have told everything of.
  int64_t published() const;

  // Calls piece(Piece) and changed(slot, Note) for all that is new in the first `steps` steps: row by row, a row's in
  // their order. changed gets the slot that the row had.
  template <class OnPiece, class OnChange> void read(int64_t steps, const OnPiece& piece, const OnChange& changed) {
    for (size_t row = 0; row < rows_.size(); ++row) {
      Reader& r = rows_[row];
      Note* next = notes_ + static_cast<int64_t>(row) * (stride_ + 1) + r.notes;
      for (;; ++next, ++r.notes) {
        // The kernel may be writing a note of a later step, whose number says so.
        const bool noted = __atomic_load_n(&next->step, __ATOMIC_RELAXED) < steps;
        take(static_cast<int64_t>(row), noted ? next->step + 1 : steps, piece);
        if (!noted) break;
        changed(r.slot, *next);
        r.slot = next->slot;
        next->step = kNoStep;  // for the launch that writes here next
      }
    }
  }

 private:
  static constexpr int32_t kNoStep = INT32_MAX;
  struct Reader {
    int32_t slot = -1;
    int64_t steps = 0, notes = 0;  // that have been read
  };
  struct Free {
    void operator()(void* p) const;
  };

  template <class OnPiece> void take(int64_t row, int64_t end, const OnPiece& piece) {
    Reader& r = rows_[static_cast<size_t>(row)];
    const int64_t at = row * stride_;
    int64_t& step = r.steps;
    while (r.slot >= 0 && step < end) {
      const int64_t begin = step;
      while (step < end && tokens_[at + step] >= 0) ++step;
      if (step > begin) piece(Piece{r.slot, begin, step - begin, tokens_ + at + begin, logprobs_ + at + begin});
      while (step < end && tokens_[at + step] < 0) ++step;  // of a prompt
    }
    if (step < end) step = end;
  }

  int64_t blocks_, stride_;
  std::unique_ptr<void, Free> memory_;
  int32_t* tokens_;
  float* logprobs_;
  Note* notes_;
  int32_t* published_;
  std::vector<Reader> rows_;
};

}  // namespace fr::cuda
