// RMSNorm and rotary embedding of one token with PyTorch's own bits, in bfloat16. Plain C ABI; sizes and types were checked
// by the caller, who also found out, by comparing, how many lanes PyTorch's sums have on this CPU: 8 or 16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

// The nearest number of bfloat16, ties to even; a NaN stays one. `to_bf16` does it in 16 bits, which takes twice as long.
inline float nearest(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value)), nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  return value == value ? float_of(static_cast<int32_t>(nearest)) : value;
}

using InverseRoot = float(const float* x, int64_t columns, float least);
using Normalise = void(const uint16_t* x, const uint16_t* weight, int64_t columns, float least, float* values);
using Turn = void(float* head, const float* cosines, const float* sines, int64_t width, float* turned);
using Emit = void(uint16_t nan, const float* values, int64_t count, uint16_t* out);

struct Loops {
  InverseRoot* inverse_root[2];  // of 8 lanes, of 16
  Normalise* normalise[2];
  Turn* turn;
  Emit* emit;
};

#define LOOPS "bitwise_trunk.inc"
#include "dispatch.inc"

// How many of `count` numbers PyTorch rounds in whole vectors, `run` at a time; the others it rounds one by one.
int64_t in_runs(int64_t count, int64_t run) { return run == 0 ? 0 : count - count % run; }

// A NaN becomes one number in whole vectors, which the first `vectors` numbers lie in, and another outside.
void emit(const Loops& loops, const float* values, int64_t count, int64_t vectors, uint16_t* out) {
  const int64_t first = std::clamp<int64_t>(vectors, 0, count);
  loops.emit(0xffff, values, first, out);
  loops.emit(0x7fc0, values + first, count - first, out + first);
}

}  // namespace

extern "C" {

// 1 / sqrt(mean of x² + least): what the functions below compute with.
float undercroft_bitwise_trunk_inverse_root(int instructions, int lanes, int64_t columns, float least, const float* x) {
  return loops_of(instructions).inverse_root[lanes == 16](x, columns, least);
}

// out[rows, columns] = weight[columns] * (x / sqrt(mean of the row's squares + least)), with each rounding of eager
// PyTorch. False: no memory.
bool undercroft_bitwise_trunk_normalise(int instructions, int lanes, int64_t run, int64_t rows, int64_t columns,
                                        float least, const uint16_t* x, const uint16_t* weight, uint16_t* out) try {
  const Loops& loops = loops_of(instructions);
  const std::unique_ptr<float[]> values(new float[columns]);
  for (int64_t row = 0; row < rows; row++, x += columns, out += columns) {
    loops.normalise[lanes == 16](x, weight, columns, least, values.get());
    emit(loops, values.get(), columns, in_runs(columns, run), out);
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// out[count] = x + y. False: no memory.
bool undercroft_bitwise_trunk_add(int instructions, int64_t run, int64_t count, const uint16_t* x, const uint16_t* y,
                                  uint16_t* out) try {
  const std::unique_ptr<float[]> values(new float[count]);
  for (int64_t i = 0; i < count; i++) values[i] = from_bf16(x[i]) + from_bf16(y[i]);
  emit(loops_of(instructions), values.get(), count, in_runs(count, run), out);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// Heads of one token, normalised each, and turned by their place in the text, with each rounding of eager PyTorch; x is
// [heads + key_heads, width], and remains so. No weight: not normalised. False: no memory.
bool undercroft_bitwise_trunk_turn(int instructions, int lanes, int64_t run, int64_t heads, int64_t key_heads,
                                   int64_t width, float least, const uint16_t* weight, const uint16_t* key_weight,
                                   const uint16_t* cosines, const uint16_t* sines, uint16_t* x) try {
  const Loops& loops = loops_of(instructions);
  const std::unique_ptr<float[]> values(new float[4 * width]);
  float *const head = values.get(), *const cosine = head + width, *const sine = cosine + width;
  float* const turned = sine + width;
  load_input(cosines, true, 0, width, cosine);
  load_input(sines, true, 0, width, sine);
  const auto turn = [&](const uint16_t* norm, int64_t count) {
    for (int64_t h = 0; h < count; h++, x += width) {
      if (norm == nullptr)
        load_input(x, true, 0, width, head);
      else
        loops.normalise[lanes == 16](x, norm, width, least, head);
      loops.turn(head, cosine, sine, width, turned);
      emit(loops, turned, width, in_runs(count * width, run) - h * width, x);
    }
  };
  turn(weight, heads);
  turn(key_weight, key_heads);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
}
