// Linear layers whose weights are group-quantised, on the CPU. docs/kernels.md specifies the packed layout and what is
// computed. Plain C ABI; sizes and types were checked by the caller. One instruction set of three is chosen per call.
//
// Invariant: a result depends on the activations of its row and the weights of its column only, bit for bit: not on the
// number of rows, of threads, or on the instruction set.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// OpenMP's runtime, whichever PyTorch has loaded, so that both use the same threads; null where it has none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace {

constexpr int kBlockRows = 32;
constexpr int kTileRows = 8;  // rows of activations that share one pass over a block
constexpr int64_t kPanelBytes = 256 << 10;  // activation codes that stay in the second-level cache
constexpr int64_t kLargestGroup = 128;
constexpr int64_t kWorthAThread = 1 << 17;  // multiplications; fewer take less time than waking a thread for them
constexpr int32_t kInfinity = 0x7f800000, kNan = 0x7fc00000;
constexpr float kNothing = 1e-30f;     // a group of activations whose largest is smaller counts as zeros
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even

struct Group {
  float scale;    // of the activation codes
  float shift;    // scale times their sum: what the least weight of a group is multiplied with
  int32_t start;  // -128 times their sum: undoes the offset of int8 weights that are read as unsigned
};

struct Matrix {
  const uint8_t* packed;
  int bits;
  int64_t group, rows, columns, groups;
};

struct Activations {
  std::unique_ptr<int8_t[]> codes;  // [rows, columns]
  std::unique_ptr<Group[]> groups;  // [rows, groups]
  Activations(int64_t rows, const Matrix& w)
      : codes(new int8_t[rows * w.columns]), groups(new Group[rows * w.groups]) {}
};

// A gated feed-forward block, as kernels/block.py lays it out. Levels, where there are any, are how many times what
// meets a column is doubled.
struct Block {
  const uint8_t* gate_up;
  const int8_t* gate_up_levels;
  int64_t bits, group;
  const uint8_t* down;
  const int8_t* down_levels;
  int64_t down_bits, down_group;
};

constexpr int64_t header_nbytes(int bits) { return bits == 8 ? 2 * kBlockRows : 4 * kBlockRows; }
constexpr int64_t group_nbytes(int bits, int64_t group) { return header_nbytes(bits) + group * kBlockRows * bits / 8; }

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

using Tile = void(const uint8_t* block, const Matrix&, const Activations&, int64_t first, float* out);

struct Loops {
  Group (*quantise)(const float*, int64_t, int8_t*);
  std::array<Tile*, kTileRows> tiles[3];  // for 2, 4 and 8 bits
  Tile* tile(int bits, int64_t rows) const { return tiles[bits / 4][rows - 1]; }
};

#if defined(__x86_64__)
namespace avx512vnni {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,avx2,fma")))
using Bytes = __m512i;
using Quad = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int kLanes = 16, kVectors = 2, kAhead = 4096;
constexpr bool kOffset8 = true;
TARGET inline Floats floats(float value) { return _mm512_set1_ps(value); }
TARGET inline Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
TARGET inline Bytes load(const uint8_t* at) { return _mm512_loadu_si512(at); }
TARGET inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
TARGET inline Quad quad(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}
template <int BITS>
TARGET inline Bytes field(Bytes raw, int shift) {
  if (BITS == 8) return _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
  return _mm512_and_si512(_mm512_srli_epi16(raw, shift), _mm512_set1_epi8((1 << BITS) - 1));
}
template <int BITS>
TARGET inline Ints dot_product(Ints sum, Bytes weights, Quad four) {
  return _mm512_dpbusd_epi32(sum, weights, four);
}
TARGET inline Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
TARGET inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
TARGET inline Floats widen(const uint8_t* bf16) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
TARGET inline void store(float* at, Floats values) { _mm512_storeu_ps(at, values); }
#include "tile.inc"
#undef TARGET
}  // namespace avx512vnni

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
using Bytes = __m256i;
using Quad = __m256i;
using Ints = __m256i;
using Floats = __m256;
constexpr int kLanes = 8, kVectors = 2, kAhead = 4096;
constexpr bool kOffset8 = false;
TARGET inline Floats floats(float value) { return _mm256_set1_ps(value); }
TARGET inline Ints ints(int32_t value) { return _mm256_set1_epi32(value); }
TARGET inline Bytes load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
TARGET inline void prefetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
TARGET inline Quad quad(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm256_set1_epi32(four);
}
template <int BITS>
TARGET inline Bytes field(Bytes raw, int shift) {
  if (BITS == 8) return raw;
  return _mm256_and_si256(_mm256_srli_epi16(raw, shift), _mm256_set1_epi8((1 << BITS) - 1));
}
// Pairs of products are added in 16 bits: at most 2 * 128 * 127 in magnitude, so nothing saturates.
template <int BITS>
TARGET inline Ints dot_product(Ints sum, Bytes weights, Quad four) {
  const __m256i pairs = BITS == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(four, weights))
                                  : _mm256_maddubs_epi16(weights, four);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
TARGET inline Floats to_floats(Ints values) { return _mm256_cvtepi32_ps(values); }
TARGET inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
TARGET inline Floats widen(const uint8_t* bf16) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
TARGET inline void store(float* at, Floats values) { _mm256_storeu_ps(at, values); }
#include "tile.inc"
#undef TARGET
}  // namespace avx2
#endif

namespace portable {
#define TARGET
constexpr int kLanes = 16, kVectors = 1, kAhead = 0;
constexpr bool kOffset8 = false;
struct Bytes {
  uint8_t lane[4 * kLanes];
};
struct Quad {
  int8_t lane[4];
};
struct Ints {
  int32_t lane[kLanes];
};
struct Floats {
  float lane[kLanes];
};
template <class Vector, class Value>
inline Vector each_lane(Value value) {
  Vector result;
  for (int i = 0; i < kLanes; i++) result.lane[i] = value(i);
  return result;
}
inline Floats floats(float value) {
  return each_lane<Floats>([&](int) { return value; });
}
inline Ints ints(int32_t value) {
  return each_lane<Ints>([&](int) { return value; });
}
inline Bytes load(const uint8_t* at) {
  Bytes result;
  std::memcpy(result.lane, at, sizeof result.lane);
  return result;
}
inline void prefetch(const uint8_t*) {}
inline Quad quad(const int8_t* at) { return {{at[0], at[1], at[2], at[3]}}; }
template <int BITS>
inline Bytes field(Bytes raw, int shift) {
  for (uint8_t& lane : raw.lane) lane = (lane >> shift) & ((1 << BITS) - 1);
  return raw;
}
template <int BITS>
inline Ints dot_product(Ints sum, Bytes weights, Quad four) {
  for (int i = 0; i < 4 * kLanes; i++) {
    const int weight = BITS == 8 ? static_cast<int8_t>(weights.lane[i]) : weights.lane[i];
    sum.lane[i / 4] += weight * four.lane[i % 4];
  }
  return sum;
}
inline Floats to_floats(Ints values) {
  return each_lane<Floats>([&](int i) { return static_cast<float>(values.lane[i]); });
}
inline Floats operator*(Floats a, Floats b) {
  return each_lane<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return each_lane<Floats>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Floats widen(const uint8_t* bf16) {
  return each_lane<Floats>([&](int i) { return float_of((bf16[2 * i] | bf16[2 * i + 1] << 8) << 16); });
}
inline void store(float* at, Floats values) { std::memcpy(at, values.lane, sizeof values.lane); }
#include "tile.inc"
#undef TARGET
}  // namespace portable

const Loops& loops_of(int instructions) {
#if defined(__x86_64__)
  if (instructions == 2) return avx512vnni::kLoops;
  if (instructions == 1) return avx2::kLoops;
#endif
  return portable::kLoops;
}

int team(int threads, int64_t multiplications) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + multiplications / kWorthAThread));
}

// Run task(0), ..., task(tasks - 1), each once, whichever thread is free taking the next.
template <class Task>
void in_parallel(int threads, int64_t tasks, const Task& task) {
  struct Work {
    const Task& task;
    const int64_t tasks;
    std::atomic<int64_t> next;
  } work{task, tasks, {0}};
  auto body = [](void* data) {
    Work& work = *static_cast<Work*>(data);
    for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;) work.task(i);
  };
  if (threads > 1 && tasks > 1 && GOMP_parallel != nullptr)
    GOMP_parallel(body, &work, static_cast<unsigned>(std::min<int64_t>(threads, tasks)), 0);
  else
    body(&work);
}

// Of one row; fill(column, count, values) writes the activations of one group as float.
template <class Fill>
void quantise_row(const Loops& loops, Activations& x, int64_t row, const Matrix& w, const Fill& fill) {
  float values[kLargestGroup];
  for (int64_t g = 0; g < w.groups; g++) {
    fill(g * w.group, w.group, values);
    int8_t* codes = x.codes.get() + row * w.columns + g * w.group;
    x.groups[row * w.groups + g] = loops.quantise(values, w.group, codes);
  }
}

// fill(row, column, count, values) does so for each row.
template <class Fill>
Activations quantise(const Loops& loops, int threads, int64_t rows, const Matrix& w, const Fill& fill) {
  Activations x(rows, w);
  in_parallel(team(threads, rows * w.columns), rows, [&](int64_t row) {
    quantise_row(loops, x, row, w,
                 [&](int64_t column, int64_t count, float* values) { fill(row, column, count, values); });
  });
  return x;
}

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even; a NaN stays one
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  if ((bits & 0x7fffffff) > static_cast<uint32_t>(kInfinity)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void emit(const float* values, int64_t count, float* out) { std::copy_n(values, count, out); }
void emit(const float* values, int64_t count, uint16_t* out) { std::transform(values, values + count, out, to_bf16); }

int64_t blocks_of(const Matrix& w) { return (w.rows + kBlockRows - 1) / kBlockRows; }

template <class Out>
void multiply(const Loops& loops, int threads, int64_t rows, const Activations& x, const Matrix& w, Out* out) {
  const int64_t blocks = blocks_of(w), block_nbytes = group_nbytes(w.bits, w.group) * w.groups;
  const int64_t panel = std::clamp<int64_t>(kPanelBytes / w.columns, 1, 16) * kTileRows;
  const int64_t panels = (rows + panel - 1) / panel;
  const int64_t share = std::clamp<int64_t>(blocks / (threads * 4), 1, 8);  // blocks of a task
  const int64_t shares = (blocks + share - 1) / share;
  in_parallel(team(threads, rows * w.rows * w.columns), panels * shares, [&](int64_t task) {
    float sums[kTileRows * kBlockRows];
    const int64_t begin = task / shares * panel, end = std::min(begin + panel, rows);
    const int64_t first = task % shares * share, last = std::min(first + share, blocks);
    for (int64_t block = first; block < last; block++) {
      const int64_t column = block * kBlockRows, width = std::min<int64_t>(kBlockRows, w.rows - column);
      for (int64_t row = begin, next; row < end; row = next) {
        const int64_t tiles = (end - row + kTileRows - 1) / kTileRows;
        next = row + (end - row + tiles - 1) / tiles;
        loops.tile(w.bits, next - row)(w.packed + block * block_nbytes, w, x, row, sums);
        for (int64_t m = row; m < next; m++) emit(sums + (m - row) * kBlockRows, width, out + m * w.rows + column);
      }
    }
  });
}

// Blocks [first, last) of the outputs of one row of activations, which is all that x holds.
void multiply_token(const Loops& loops, const Activations& x, const Matrix& w, int64_t first, int64_t last, float* out) {
  const int64_t block_nbytes = group_nbytes(w.bits, w.group) * w.groups;
  float sums[kBlockRows];
  for (int64_t block = first; block < last; block++) {
    const int64_t column = block * kBlockRows;
    loops.tile(w.bits, 1)(w.packed + block * block_nbytes, w, x, 0, sums);
    emit(sums, std::min<int64_t>(kBlockRows, w.rows - column), out + column);
  }
}

void load_input(const void* x, bool bf16, int64_t at, int64_t count, float* values) {
  if (!bf16) {
    std::memcpy(values, static_cast<const float*>(x) + at, 4 * count);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(x) + at;
  for (int64_t i = 0; i < count; i++) values[i] = float_of(static_cast<int32_t>(uint32_t{halves[i]} << 16));
}

// silu(gate) * up, where `hidden` is gate and then up, of so many columns each.
void load_gated(const float* hidden, int64_t columns, int64_t at, int64_t count, float* values) {
  const float *gate = hidden + at, *up = gate + columns;
  for (int64_t i = 0; i < count; i++) values[i] = gate[i] / (1.f + std::exp(-gate[i])) * up[i];
}

void level(const int8_t* levels, int64_t at, int64_t count, float* values) {
  if (levels == nullptr) return;
  for (int64_t i = 0; i < count; i++) values[i] = std::ldexp(values[i], levels[at + i]);
}

Activations quantise_input(const Loops& loops, int threads, int64_t rows, const Matrix& w, const void* x, bool bf16) {
  return quantise(loops, threads, rows, w, [&](int64_t row, int64_t column, int64_t count, float* values) {
    load_input(x, bf16, row * w.columns + column, count, values);
  });
}

Activations quantise_gated(const Loops& loops, int threads, int64_t rows, const Matrix& w, const float* hidden) {
  return quantise(loops, threads, rows, w, [&](int64_t row, int64_t column, int64_t count, float* values) {
    load_gated(hidden + row * 2 * w.columns, w.columns, column, count, values);
  });
}

void multiply_into(const Loops& loops, int threads, int64_t rows, const Activations& x, const Matrix& w, void* out,
                   bool bf16) {
  if (bf16)
    multiply(loops, threads, rows, x, w, static_cast<uint16_t*>(out));
  else
    multiply(loops, threads, rows, x, w, static_cast<float*>(out));
}

Matrix matrix(const uint8_t* packed, int bits, int64_t group, int64_t rows, int64_t columns) {
  return {packed, bits, group, rows, columns, columns / group};
}

// Matrices that one token is multiplied with at once, each with activations of its own.
struct Layer {
  std::vector<Matrix> weights;
  std::vector<Activations> inputs;

  void add(const Matrix& w) {
    weights.push_back(w);
    inputs.emplace_back(1, w);
  }

  // out is [matrices, rows]; all have as many rows.
  void multiply(const Loops& loops, int threads, float* out) const {
    const int64_t count = static_cast<int64_t>(weights.size()), rows = weights[0].rows, blocks = blocks_of(weights[0]);
    const int64_t share = std::clamp<int64_t>(blocks * count / (threads * 8), 1, 16);  // blocks of a task
    const int64_t shares = (blocks + share - 1) / share;
    in_parallel(team(threads, count * rows * weights[0].columns), count * shares, [&](int64_t task) {
      const int64_t i = task / shares, first = task % shares * share;
      multiply_token(loops, inputs[i], weights[i], first, std::min(first + share, blocks), out + i * rows);
    });
  }
};

}  // namespace

extern "C" {

// The best instruction set here: 0 portable, 1 AVX2, 2 AVX-512 with VNNI. All below it work too.
int undercroft_kernels_instructions() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vnni");
  return avx2 + (avx2 && vnni);
#else
  return 0;
#endif
}

int undercroft_kernels_threaded() { return GOMP_parallel != nullptr; }

// out[rows, outputs] = x[rows, columns] times the transpose of the packed [outputs, columns]. False: no memory.
bool undercroft_kernels_linear(int instructions, int threads, bool bf16, int64_t rows, int64_t columns, const void* x,
                               const uint8_t* packed, int bits, int64_t group, int64_t outputs, void* out) try {
  const Loops& loops = loops_of(instructions);
  const Matrix w = matrix(packed, bits, group, outputs, columns);
  multiply_into(loops, threads, rows, quantise_input(loops, threads, rows, w, x, bf16), w, out, bf16);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// out[rows, width] = down(silu(gate(x)) * up(x)); gate_up is [2 * inner, width], down is [width, inner].
bool undercroft_kernels_expert(int instructions, int threads, bool bf16, int64_t rows, int64_t width, int64_t inner,
                               const void* x, const uint8_t* gate_up, int bits, int64_t group, const uint8_t* down,
                               int down_bits, int64_t down_group, void* out) try {
  const Loops& loops = loops_of(instructions);
  const Matrix first = matrix(gate_up, bits, group, 2 * inner, width);
  const Matrix second = matrix(down, down_bits, down_group, width, inner);
  const std::unique_ptr<float[]> hidden(new float[rows * 2 * inner]);
  multiply(loops, threads, rows, quantise_input(loops, threads, rows, first, x, bf16), first, hidden.get());
  multiply_into(loops, threads, rows, quantise_gated(loops, threads, rows, second, hidden.get()), second, out, bf16);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// out[i, width] = down(silu(gate(x)) * up(x)) of each block i, float32; x[width] is one token.
bool undercroft_kernels_blocks(int instructions, int threads, bool bf16, int64_t count, int64_t width, int64_t inner,
                               const void* x, const Block* blocks, float* out) try {
  const Loops& loops = loops_of(instructions);
  Layer first, second;
  for (const Block* b = blocks; b < blocks + count; b++) {
    first.add(matrix(b->gate_up, static_cast<int>(b->bits), b->group, 2 * inner, width));
    second.add(matrix(b->down, static_cast<int>(b->down_bits), b->down_group, width, inner));
  }
  const std::unique_ptr<float[]> hidden(new float[count * 2 * inner]);
  in_parallel(team(threads, count * width), count, [&](int64_t i) {
    quantise_row(loops, first.inputs[i], 0, first.weights[i], [&](int64_t column, int64_t n, float* values) {
      load_input(x, bf16, column, n, values);
      level(blocks[i].gate_up_levels, column, n, values);
    });
  });
  first.multiply(loops, threads, hidden.get());
  in_parallel(team(threads, count * 16 * inner), count, [&](int64_t i) {  // an exponential costs as much as many products
    quantise_row(loops, second.inputs[i], 0, second.weights[i], [&](int64_t column, int64_t n, float* values) {
      load_gated(hidden.get() + i * 2 * inner, inner, column, n, values);
      level(blocks[i].down_levels, column, n, values);
    });
  });
  second.multiply(loops, threads, out);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
}
