// What the kernels are written in: vectors of three instruction sets, each in a namespace of its own, bfloat16, and loops
// that PyTorch's threads share. Invariant: an operation gives the same bits in every namespace.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// OpenMP's runtime, whichever PyTorch has loaded, so that both use the same threads; null where it has none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace {

constexpr int64_t kWorthAThread = 1 << 17;  // multiplications; fewer take less time than waking a thread for them
constexpr int32_t kInfinity = 0x7f800000, kNan = 0x7fc00000;
constexpr int64_t kLine = 64;                 // bytes
constexpr int64_t kFar = 8192, kNear = 1024;  // bytes ahead of a stream: for the second-level cache, for the first
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even

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

inline float from_bf16(uint16_t value) { return float_of(static_cast<int32_t>(uint32_t{value} << 16)); }

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even; a NaN stays one
  const uint32_t bits = static_cast<uint32_t>(bits_of(value)), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > static_cast<uint32_t>(kInfinity);
  return static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40 : nearest);
}

// Of a stream that is read once, what comes: far ahead, since the second-level cache takes more requests at a time.
inline void prefetch(const uint8_t* at) {
  __builtin_prefetch(at + kFar, 0, 2);
  __builtin_prefetch(at + kNear, 0, 3);
}

// Rows of which all will be read soon, and not in the order in which they lie.
inline void prefetch_rows(const void* at, int64_t stride, int64_t rows, int64_t nbytes) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t line = 0; line < nbytes; line += kLine)
      __builtin_prefetch(static_cast<const char*>(at) + row * stride + line, 0, 2);
}

// Rows [heads, nbytes] of one token, one behind another, to its place among those of all, `stride` bytes from head to head.
inline const char* put_rows(const char* rows, int64_t heads, int64_t nbytes, char* to, int64_t stride) {
  for (int64_t head = 0; head < heads; head++, rows += nbytes, to += stride) std::memcpy(to, rows, nbytes);
  return rows;
}

void emit(const float* values, int64_t count, float* out) { std::copy_n(values, count, out); }
void emit(const float* values, int64_t count, uint16_t* out) { std::transform(values, values + count, out, to_bf16); }

#if defined(__x86_64__)
#define TARGET_AVX512VNNI __attribute__((target("avx512f,avx512bw,avx512vnni,avx2,fma")))
#define TARGET_AVX2 __attribute__((target("avx2,fma")))

namespace avx512vnni {
#define TARGET TARGET_AVX512VNNI
using Bytes = __m512i;
using Quad = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int kLanes = 16, kVectorsOfMany = 2;
constexpr bool kOffset8 = true;
TARGET inline Floats floats(float value) { return _mm512_set1_ps(value); }
TARGET inline Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
TARGET inline Bytes load(const uint8_t* at) { return _mm512_loadu_si512(at); }
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
using Partial = Ints;
template <int BITS>
TARGET inline Ints begin(Ints sum) {
  return sum;
}
template <int BITS>
TARGET inline Ints end(Ints, Ints partial) {
  return partial;
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
TARGET inline Floats load(const float* at) { return _mm512_loadu_ps(at); }
TARGET inline void store(float* at, Floats values) { _mm512_storeu_ps(at, values); }
#undef TARGET
}  // namespace avx512vnni

namespace avx2 {
#define TARGET TARGET_AVX2
using Bytes = __m256i;
using Quad = __m256i;
using Ints = __m256i;
using Floats = __m256;
constexpr int kLanes = 8, kVectorsOfMany = 1;
constexpr bool kOffset8 = false;
TARGET inline Floats floats(float value) { return _mm256_set1_ps(value); }
TARGET inline Ints ints(int32_t value) { return _mm256_set1_epi32(value); }
TARGET inline Bytes load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
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
// Pairs of products are added in 16 bits: at most 2 * 127 * 127 in magnitude. Those of few bits are at most 2 * 15 * 127,
// so that the eight pairs of a column of kLeastGroup columns have room there too; nothing saturates.
template <int BITS>
using Partial = __m256i;
template <int BITS>
TARGET inline Partial<BITS> begin(Ints sum) {
  return BITS == 8 ? sum : _mm256_setzero_si256();
}
TARGET inline Ints add_pairs(Ints sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int BITS>
TARGET inline Ints end(Ints sum, Partial<BITS> partial) {
  return BITS == 8 ? partial : add_pairs(sum, partial);
}
template <int BITS>
TARGET inline Partial<BITS> dot_product(Partial<BITS> sum, Bytes weights, Quad four) {
  if (BITS != 8) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, four));
  return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(four, weights)));
}
TARGET inline Floats to_floats(Ints values) { return _mm256_cvtepi32_ps(values); }
TARGET inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
TARGET inline Floats widen(const uint8_t* bf16) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
TARGET inline Floats load(const float* at) { return _mm256_loadu_ps(at); }
TARGET inline void store(float* at, Floats values) { _mm256_storeu_ps(at, values); }
#undef TARGET
}  // namespace avx2
#endif

namespace portable {
constexpr int kLanes = 16, kVectorsOfMany = 1;
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
inline Quad quad(const int8_t* at) { return {{at[0], at[1], at[2], at[3]}}; }
template <int BITS>
inline Bytes field(Bytes raw, int shift) {
  for (uint8_t& lane : raw.lane) lane = (lane >> shift) & ((1 << BITS) - 1);
  return raw;
}
template <int BITS>
using Partial = Ints;
template <int BITS>
inline Ints begin(Ints sum) {
  return sum;
}
template <int BITS>
inline Ints end(Ints, Ints partial) {
  return partial;
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
inline Floats load(const float* at) {
  return each_lane<Floats>([&](int i) { return at[i]; });
}
inline void store(float* at, Floats values) { std::memcpy(at, values.lane, sizeof values.lane); }
}  // namespace portable

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

void load_input(const void* x, bool bf16, int64_t at, int64_t count, float* values) {
  if (!bf16) {
    std::memcpy(values, static_cast<const float*>(x) + at, 4 * count);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(x) + at;
  for (int64_t i = 0; i < count; i++) values[i] = from_bf16(halves[i]);
}

}  // namespace
