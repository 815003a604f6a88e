// Where one unit of one row stands in a step, and what it reads and writes there.
#pragma once

#include "cell_tile.cuh"

namespace fr::cuda {

// A unit of a row at one step. row and before are t * B + b of this step and of the one processed before it; before is
// -1 where that one is the initial state.
struct Place {
  int64_t row, before, state;  // state: b * H + unit
  int64_t H, unit;
  bool there, fresh;  // the row has this step; its state is zeroed before it
  // Where a tensor (T, B, count * H) has this unit's gate
  FR_DEVICE int64_t gate(int gate, int count) const { return (row * count + gate) * H + unit; }
};

struct Steps {
  int64_t T, B, H;
  const int64_t* lengths;
  const bool* reset;
  bool reverse;
  FR_DEVICE int64_t time(int64_t s) const { return reverse ? T - 1 - s : s; }
  FR_DEVICE int64_t length(int64_t b) const { return b >= B ? 0 : lengths ? lengths[b] : T; }
  FR_DEVICE Place place(int64_t s, int64_t b, int64_t unit, int64_t length) const {
    const int64_t t = time(s), earlier = time(s - 1);
    const bool exists = t < length, first = s == 0 || earlier >= length;
    return {t * B + b, first ? -1 : earlier * B + b,       b * H + unit, H, unit,
            exists,    exists && reset && reset[t * B + b]};
  }
};
template <class Call> FR_DEVICE Steps steps_of(const Call& a) { return {a.T, a.B, a.H, a.lengths, a.reset, a.reverse}; }

template <class E> FR_DEVICE E get(const void* p, int64_t i) { return static_cast<const E*>(p)[i]; }
template <class E> FR_DEVICE float at(const void* p, int64_t i) { return to_float(get<E>(p, i)); }
template <class E> FR_DEVICE void put(void* p, int64_t i, float v) { static_cast<E*>(p)[i] = rounded<E>(v); }
// v as E holds it
template <class E> FR_DEVICE float as(float v) { return to_float(rounded<E>(v)); }

// The state that a step starts from: `steps` holds every step's result.
template <class E> FR_DEVICE E state_before(const Place& p, const void* steps, const void* initial) {
  if (p.fresh) return rounded<E>(0.0f);
  return p.before < 0 ? get<E>(initial, p.state) : get<E>(steps, p.before * p.H + p.unit);
}

}  // namespace fr::cuda
