// Gated feed-forward blocks of one token in bfloat16 with PyTorch's bits, whatever form their matrices have.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "bitwise.h"

namespace {

constexpr int64_t kPanel = 64;  // outputs of a task

// Between the products: PyTorch's own activation of each number of bfloat16, and what it makes of a NaN.
struct Elementwise {
  const uint16_t* activation;
  uint16_t nan;
};

TARGET_AVX2 inline uint16_t nearest(float value, uint16_t nan) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value)), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return value == value ? static_cast<uint16_t>(nearest) : nan;
}

// out[width] = out + row * share, both rounded.
TARGET_AVX2 void add(const uint16_t* row, float share, int64_t width, uint16_t nan, uint16_t* out) {
  for (int64_t d = 0; d < width; d++)
    out[d] = nearest(from_bf16(out[d]) + from_bf16(nearest(from_bf16(row[d]) * share, nan)), nan);
}

// Rows of a gate become what goes into down.
TARGET_AVX2 inline void activate(const Elementwise& between, const uint16_t* ups, int64_t count, uint16_t* gates) {
  for (int64_t i = 0; i < count; i++)
    gates[i] = nearest(from_bf16(between.activation[gates[i]]) * from_bf16(ups[i]), between.nan);
}

// What `count` experts make of the token x[width], as rows[count, width]. A Matrix takes rows of x apart, and multiplies with
// one: out[some] from output `first` on. False: a matrix could not.
template <class Matrix>
bool feed(int threads, int64_t width, int64_t inner, int64_t count, const Matrix* gate_up, const Matrix* down,
          const Elementwise& between, const uint16_t* x, uint16_t* rows) {
  const std::unique_ptr<float[]> taken(new float[width + count * inner]);
  const std::unique_ptr<uint16_t[]> hidden(new uint16_t[count * inner]);
  float* const taken_hidden = taken.get() + width;
  std::atomic<bool> is_whole = true;
  Matrix::take_apart(x, width, taken.get());
  const int64_t panels = (inner + kPanel - 1) / kPanel, slices = (width + kPanel - 1) / kPanel;
  in_parallel(team(threads, 2 * count * inner * width), count * panels, [&](int64_t task) {
    const int64_t expert = task / panels, first = task % panels * kPanel, some = std::min(kPanel, inner - first);
    uint16_t* const gates = hidden.get() + expert * inner + first;
    uint16_t ups[kPanel];
    const Matrix& matrix = gate_up[expert];
    if (!matrix.multiply(taken.get(), first, some, gates) || !matrix.multiply(taken.get(), inner + first, some, ups))
      is_whole = false;
    else
      activate(between, ups, some, gates);
  });
  if (!is_whole) return false;
  for (int64_t i = 0; i < count; i++) Matrix::take_apart(hidden.get() + i * inner, inner, taken_hidden + i * inner);
  in_parallel(team(threads, count * inner * width), count * slices, [&](int64_t task) {
    const int64_t expert = task / slices, first = task % slices * kPanel, some = std::min(kPanel, width - first);
    if (!down[expert].multiply(taken_hidden + expert * inner, first, some, rows + expert * width + first))
      is_whole = false;
  });
  return is_whole;
}

// The same, and then, where there are terms, the sum out[width] of rows[order[i]] times shares[i], one after another.
template <class Matrix>
bool mix(int threads, int64_t width, int64_t inner, int64_t count, const Matrix* gate_up, const Matrix* down,
         const Elementwise& between, const uint16_t* x, int64_t terms, const int64_t* order, const float* shares,
         uint16_t* out) {
  if (terms == 0) return feed(threads, width, inner, count, gate_up, down, between, x, out);
  const std::unique_ptr<uint16_t[]> rows(new uint16_t[count * width]);
  if (!feed(threads, width, inner, count, gate_up, down, between, x, rows.get())) return false;
  std::fill_n(out, width, uint16_t{0});
  for (int64_t i = 0; i < terms; i++) add(rows.get() + order[i] * width, shares[i], width, between.nan, out);
  return true;
}

}  // namespace
