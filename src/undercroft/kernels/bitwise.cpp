// Products of bfloat16 with the bits of PyTorch's own, on processors where it multiplies in AVX2 itself. Plain C ABI; sizes
// and types were checked by the caller.
//
// PyTorch sums each output in 64 places: column k in place k % 64, one fused multiply-add after another, and then halves
// of the places onto each other, 32 onto 32, 16 onto 16, down to one (ReducedPrecisionFloatGemvFastPathKernel.cpp). So
// nothing binds one output to another, and many can be computed at a time.
//
// Here a vector of sixteen columns is taken apart into the eight even and the eight odd ones, which costs two
// instructions and, since whole places are moved, no bit.

#include <array>
#include <cstdint>
#include <memory>
#include <new>

#include "bitwise.h"
#include "bitwise_experts.h"
#include "chosen.h"
#include "vectors.h"

namespace {

constexpr int64_t kPlaces = 64;
constexpr int kQuarters = 4;        // vectors of sixteen places
constexpr int64_t kSixteen = 16;
constexpr int kRows = 3, kOutputs = 2;  // of a tile: its sums fill twelve of sixteen registers

// One product, as kernels/bitwise.py lays it out: out[rows, outputs] = x[rows, columns] times weight[outputs, columns].
struct Product {
  const uint16_t* x;
  int64_t rows;
  const uint16_t* weight;
  const uint16_t* bias;  // or null
  int64_t outputs;
  uint16_t* out;
};

#define TARGET TARGET_AVX2

// Where a product's rows, taken apart, begin among all, and its first task; rows that two in turn share are there once.
struct Part {
  int64_t row, task;
};

#if defined(__x86_64__)
TARGET inline Pair apart(const uint16_t* at) {
  return apart(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

// x[columns] as float [quarters][columns / 64][8 even, 8 odd].
TARGET void take_apart(const uint16_t* x, int64_t columns, float* out) {
  const int64_t steps = columns / kPlaces;
  for (int64_t step = 0; step < steps; step++)
    for (int quarter = 0; quarter < kQuarters; quarter++) {
      const Pair pair = apart(x + step * kPlaces + quarter * kSixteen);
      float* const at = out + (quarter * steps + step) * kSixteen;
      _mm256_storeu_ps(at, pair.even);
      _mm256_storeu_ps(at + 8, pair.odd);
    }
}

// The eight places of a vector, halves onto each other.
TARGET inline float total(__m256 places) {
  return total(_mm_add_ps(_mm256_castps256_ps128(places), _mm256_extractf128_ps(places, 1)));
}

TARGET inline uint16_t rounded(const Pair* quarters, const uint16_t* bias, int64_t output) {
  const __m256 even = _mm256_add_ps(_mm256_add_ps(quarters[0].even, quarters[2].even),
                                    _mm256_add_ps(quarters[1].even, quarters[3].even));
  const __m256 odd = _mm256_add_ps(_mm256_add_ps(quarters[0].odd, quarters[2].odd),
                                   _mm256_add_ps(quarters[1].odd, quarters[3].odd));
  float sum = total(even) + total(odd);
  if (bias != nullptr) sum += from_bf16(bias[output]);
  return rounded(sum);
}

// One row: each weight is read once.
TARGET void multiply_one(const float* x, const uint16_t* weight, int64_t columns, Pair* quarters) {
  const int64_t steps = columns / kPlaces;
  for (int quarter = 0; quarter < kQuarters; quarter++) quarters[quarter] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  Pair sums[kQuarters] = {quarters[0], quarters[1], quarters[2], quarters[3]};
  for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 4
    for (int quarter = 0; quarter < kQuarters; quarter++) {
      const uint16_t* const at = weight + step * kPlaces + quarter * kSixteen;
      if (quarter % 2 == 0) prefetch(reinterpret_cast<const uint8_t*>(at));
      const Pair w = apart(at);
      const float* const number = x + (quarter * steps + step) * kSixteen;
      sums[quarter].even = _mm256_fmadd_ps(w.even, _mm256_loadu_ps(number), sums[quarter].even);
      sums[quarter].odd = _mm256_fmadd_ps(w.odd, _mm256_loadu_ps(number + 8), sums[quarter].odd);
    }
  for (int quarter = 0; quarter < kQuarters; quarter++) quarters[quarter] = sums[quarter];
}

// A tile, a quarter of its places after the other, since all of them would not fit into the registers.
template <int ROWS, int OUTPUTS>
TARGET void multiply_tile(const float* x, const uint16_t* weight, int64_t columns, Pair* quarters) {
  const int64_t steps = columns / kPlaces;
  for (int quarter = 0; quarter < kQuarters; quarter++) {
    Pair sums[ROWS][OUTPUTS];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int output = 0; output < OUTPUTS; output++) sums[row][output] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const float* number = x + quarter * steps * kSixteen;
    const uint16_t* at = weight + quarter * kSixteen;
    for (int64_t step = 0; step < steps; step++, number += kSixteen, at += kPlaces) {
      Pair w[OUTPUTS];
#pragma GCC unroll 4
      for (int output = 0; output < OUTPUTS; output++) {
        __builtin_prefetch(at + (OUTPUTS + output) * columns, 0, 3);  // of the next tile
        w[output] = apart(at + output * columns);
      }
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; row++) {
        const float* const mine = number + row * columns;
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; output++) {
          Pair& sum = sums[row][output];
          sum.even = _mm256_fmadd_ps(w[output].even, _mm256_loadu_ps(mine), sum.even);
          sum.odd = _mm256_fmadd_ps(w[output].odd, _mm256_loadu_ps(mine + 8), sum.odd);
        }
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int output = 0; output < OUTPUTS; output++)
        quarters[(row * OUTPUTS + output) * kQuarters + quarter] = sums[row][output];
  }
}

using Tile = void(const float* x, const uint16_t* weight, int64_t columns, Pair* quarters);
constexpr std::array<std::array<Tile*, kOutputs>, kRows> kTiles = {{{multiply_tile<1, 1>, multiply_tile<1, 2>},
                                                                    {multiply_tile<2, 1>, multiply_tile<2, 2>},
                                                                    {multiply_tile<3, 1>, multiply_tile<3, 2>}}};

// Outputs first .. first + count of a product whose rows were taken apart.
TARGET void multiply(const Product& p, const float* x, int64_t columns, int64_t first, int64_t count) {
  Pair quarters[kRows * kOutputs * kQuarters];
  for (int64_t row = 0; row < p.rows; row += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, p.rows - row), step = p.rows == 1 ? 1 : kOutputs;
    for (int64_t output = first; output < first + count; output += step) {
      const int64_t outputs = std::min(step, first + count - output);
      const uint16_t* const weight = p.weight + output * columns;
      if (p.rows == 1)
        multiply_one(x, weight, columns, quarters);
      else
        kTiles[rows - 1][outputs - 1](x + row * columns, weight, columns, quarters);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < outputs; o++)
          p.out[(row + r) * p.outputs + output + o] =
              rounded(quarters + (r * outputs + o) * kQuarters, p.bias, output + o);
    }
  }
}
#endif

#if defined(__x86_64__)
// A matrix as it lies, for `feed`.
struct Plain {
  const uint16_t* weight;
  int64_t columns;

  static void take_apart(const uint16_t* x, int64_t columns, float* out) { ::take_apart(x, columns, out); }

  TARGET bool multiply(const float* x, int64_t first, int64_t count, uint16_t* out) const {
    Pair quarters[kQuarters];
    for (int64_t i = 0; i < count; i++) {
      multiply_one(x, weight + (first + i) * columns, columns, quarters);
      out[i] = rounded(quarters, nullptr, 0);
    }
    return true;
  }
};
#endif

// An expert, as kernels/bitwise_experts.py lays it out: gate_up[2 * inner, width], down[width, inner].
struct Expert {
  const uint16_t *gate_up, *down;
};

}  // namespace

extern "C" {

// Products that have their columns, a multiple of 64, in common. False: no memory, or no such processor.
bool undercroft_bitwise_multiply(int threads, int64_t columns, int64_t count, const Product* products) try {
#if defined(__x86_64__)
  const std::unique_ptr<Part[]> parts(new Part[count]);
  const auto is_again = [&](int64_t i) { return i > 0 && products[i].x == products[i - 1].x; };
  int64_t rows = 0, tasks = 0, work = 0;
  for (int64_t i = 0; i < count; i++) {
    const Product& p = products[i];
    parts[i] = {is_again(i) ? parts[i - 1].row : rows, tasks};
    rows += is_again(i) ? 0 : p.rows;
    tasks += (p.outputs + kPanel - 1) / kPanel;
    work += p.rows * p.outputs * columns;
  }
  const std::unique_ptr<float[]> taken(new float[rows * columns]);
  for (int64_t i = 0; i < count; i++)
    for (int64_t row = 0; row < products[i].rows && !is_again(i); row++)
      take_apart(products[i].x + row * columns, columns, taken.get() + (parts[i].row + row) * columns);
  in_parallel(team(threads, work), tasks, [&](int64_t task) {
    int64_t i = count - 1;
    while (parts[i].task > task) i--;
    const int64_t first = (task - parts[i].task) * kPanel;
    const int64_t outputs = std::min(kPanel, products[i].outputs - first);
    multiply(products[i], taken.get() + parts[i].row * columns, columns, first, outputs);
  });
  return true;
#else
  return false;
#endif
} catch (const std::bad_alloc&) {
  return false;
}

// out[width] of `terms` shares of experts, or out[count, width] where there are none, of the token x[width]; width and inner
// are multiples of 64. See bitwise_experts.h. 0: done; 1: no memory, or no such processor.
int undercroft_bitwise_experts(int threads, int64_t width, int64_t inner, int64_t count, const Expert* experts,
                               const uint16_t* activation, int nan, const uint16_t* x, int64_t terms,
                               const int64_t* order, const float* shares, uint16_t* out) try {
#if defined(__x86_64__)
  const std::unique_ptr<Plain[]> matrices(new Plain[2 * count]);
  for (int64_t i = 0; i < count; i++) {
    matrices[i] = {experts[i].gate_up, width};
    matrices[count + i] = {experts[i].down, inner};
  }
  const Elementwise between = {activation, static_cast<uint16_t>(nan)};
  mix(threads, width, inner, count, matrices.get(), matrices.get() + count, between, x, terms, order, shares, out);
  return 0;
#else
  return 1;
#endif
} catch (const std::bad_alloc&) {
  return 1;
}

// The same of the experts that a token chose, see chosen.h, ascending by number. 3: one is not there.
int undercroft_bitwise_chosen(int threads, int64_t width, int64_t inner, const Expert* table, int64_t experts,
                              const uint16_t* activation, int nan, const uint16_t* x, int64_t used,
                              const int64_t* numbers, bool bf16, const void* shares, uint16_t* out) try {
  const Chosen<Expert> chosen = those(table, experts, used, numbers, bf16, shares);
  const int64_t count = static_cast<int64_t>(chosen.experts.size());
  if (count == 0) return kAbsent;
  return undercroft_bitwise_experts(threads, width, inner, count, chosen.experts.data(), activation, nan, x, count,
                                    chosen.order.data(), chosen.shares.data(), out);
} catch (const std::bad_alloc&) {
  return 1;
}

// out[width]: rows[order[i]][width] times shares[i], rounded, one added to the other, each sum rounded.
void undercroft_bitwise_add_up(int64_t width, int64_t count, const uint16_t* rows, const int64_t* order,
                               const float* shares, int nan, uint16_t* out) {
  std::fill_n(out, width, uint16_t{0});
  for (int64_t i = 0; i < count; i++) add(rows + order[i] * width, shares[i], width, static_cast<uint16_t>(nan), out);
}
}
