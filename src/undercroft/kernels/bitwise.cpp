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
#include "vectors.h"

namespace {

constexpr int64_t kPlaces = 64;
constexpr int kQuarters = 4;        // vectors of sixteen places
constexpr int64_t kSixteen = 16;
constexpr int64_t kPanel = 64;       // outputs of a task
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

#if defined(__x86_64__)
#define TARGET TARGET_AVX2
#else
#define TARGET
#endif

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

// out[width] = out + row * share, both rounded.
TARGET void add(const uint16_t* row, float share, int64_t width, uint16_t* out) {
  for (int64_t d = 0; d < width; d++) out[d] = to_bf16(from_bf16(out[d]) + from_bf16(to_bf16(from_bf16(row[d]) * share)));
}

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

// out[width]: rows[order[i]][width] times shares[i], rounded, one added to the other, each sum rounded.
void undercroft_bitwise_add_up(int64_t width, int64_t count, const uint16_t* rows, const int64_t* order,
                               const float* shares, uint16_t* out) {
  std::fill_n(out, width, uint16_t{0});
  for (int64_t i = 0; i < count; i++) add(rows + order[i] * width, shares[i], width, out);
}
}
