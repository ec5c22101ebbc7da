// Restores bfloat16 weights whose exponents are codes of three bits. docs/kernels.md specifies the bytes. Plain C ABI; sizes
// were checked by the caller, and nothing else is believed.
//
// Invariant: nothing is read beyond the rare exponents that there is room for, whatever the codes say.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "lossless.h"
#include "vectors.h"

namespace {

// Some blocks in a row, and where their rare exponents are.
struct Run {
  const uint8_t *table, *codes, *rests, *rare, *end;
};

inline uint16_t number(unsigned exponent, unsigned rest) {
  return static_cast<uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
}

// Put in the exponents that were elsewhere.
inline void patch(uint64_t places, const uint8_t* rare, uint16_t* out) {
  for (; places; places &= places - 1) {
    uint16_t& each = out[__builtin_ctzll(places)];
    each = static_cast<uint16_t>((each & 0x807f) | *rare++ << 7);
  }
}

// Returns where the next rare exponents are; null if there are too few.
using Restore = const uint8_t*(Run run, int64_t blocks, uint16_t* out);

namespace portable {
const uint8_t* restore(Run run, int64_t blocks, uint16_t* out) {
  for (; blocks; blocks--, run.codes += kCodes, run.rests += kBlock, out += kBlock) {
    const Planes p = planes(run.codes);
    const int count = __builtin_popcountll(p.rare());
    if (run.end - run.rare < count) return nullptr;
    for (int i = 0; i < kBlock; i++) {
      const unsigned code = (p.bit[0] >> i & 1) | (p.bit[1] >> i & 1) << 1 | (p.bit[2] >> i & 1) << 2;
      out[i] = number(run.table[code], run.rests[i]);
    }
    patch(p.rare(), run.rare, out);
    run.rare += count;
  }
  return run.rare;
}
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,popcnt")))
// A byte for each of 32 bits: `value` where it is set.
TARGET inline __m256i spread(uint32_t bits, char value) {
  const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i one = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i each = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), places);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(each, one), one), _mm256_set1_epi8(value));
}

TARGET inline void emit(__m128i exponents, __m128i rests, uint16_t* out) {
  const __m256i rest = _mm256_cvtepu8_epi16(rests);
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(rest, _mm256_set1_epi16(0x80)), 8);
  const __m256i mantissa = _mm256_and_si256(rest, _mm256_set1_epi16(0x7f));
  const __m256i exponent = _mm256_slli_epi16(_mm256_cvtepu8_epi16(exponents), 7);
  const __m256i whole = _mm256_or_si256(_mm256_or_si256(sign, mantissa), exponent);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), whole);
}

TARGET const uint8_t* restore(Run run, int64_t blocks, uint16_t* out) {
  int64_t eight;
  std::memcpy(&eight, run.table, kTable);
  const __m256i table = _mm256_set1_epi64x(eight);
  for (; blocks; blocks--, run.codes += kCodes, run.rests += kBlock, out += kBlock) {
    const Planes p = planes(run.codes);
    const int count = __builtin_popcountll(p.rare());
    if (run.end - run.rare < count) return nullptr;
    for (int half = 0; half < 2; half++) {
      __m256i codes = _mm256_setzero_si256();
      for (int bit = 0; bit < 3; bit++)
        codes = _mm256_or_si256(codes, spread(static_cast<uint32_t>(p.bit[bit] >> 32 * half), static_cast<char>(1 << bit)));
      const __m256i exponents = _mm256_shuffle_epi8(table, codes);
      const __m256i rests = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.rests + 32 * half));
      emit(_mm256_castsi256_si128(exponents), _mm256_castsi256_si128(rests), out + 32 * half);
      emit(_mm256_extracti128_si256(exponents, 1), _mm256_extracti128_si256(rests, 1), out + 32 * half + 16);
    }
    patch(p.rare(), run.rare, out);
    run.rare += count;
  }
  return run.rare;
}
#undef TARGET
}  // namespace avx2

namespace avx512vbmi2 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt,bmi2")))
TARGET inline void emit(__m256i exponents, __m256i rests, uint16_t* out) {
  const __m512i rest = _mm512_cvtepu8_epi16(rests), exponent = _mm512_slli_epi16(_mm512_cvtepu8_epi16(exponents), 7);
  const int choose = 0xca;  // bits of the second where the first has them set, else of the third
  const __m512i below = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x7f), rest, exponent, choose);
  const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
  _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(sign, _mm512_slli_epi16(rest, 8), below, choose));
}

TARGET const uint8_t* restore(Run run, int64_t blocks, uint16_t* out) {
  int64_t eight;
  std::memcpy(&eight, run.table, kTable);
  const __m512i table = _mm512_set1_epi64(eight);
  for (; blocks; blocks--, run.codes += kCodes, run.rests += kBlock, out += kBlock) {
    const Planes p = planes(run.codes);
    const int count = __builtin_popcountll(p.rare());
    if (run.end - run.rare < count) return nullptr;
    __m512i codes = _mm512_maskz_set1_epi8(p.bit[0], 1);
    codes = _mm512_mask_add_epi8(codes, p.bit[1], codes, _mm512_set1_epi8(2));
    codes = _mm512_mask_add_epi8(codes, p.bit[2], codes, _mm512_set1_epi8(4));
    const __m512i rare = _mm512_maskz_loadu_epi8(_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)), run.rare);
    const __m512i exponents = _mm512_mask_expand_epi8(_mm512_shuffle_epi8(table, codes), p.rare(), rare);
    const __m512i rests = _mm512_loadu_si512(run.rests);
    emit(_mm512_castsi512_si256(exponents), _mm512_castsi512_si256(rests), out);
    emit(_mm512_extracti64x4_epi64(exponents, 1), _mm512_extracti64x4_epi64(rests, 1), out + 32);
    run.rare += count;
  }
  return run.rare;
}
#undef TARGET
}  // namespace avx512vbmi2
#endif

Restore* restore_of(int instructions) {
#if defined(__x86_64__)
  if (instructions == 2) return avx512vbmi2::restore;
  if (instructions == 1) return avx2::restore;
#endif
  return portable::restore;
}

}  // namespace

extern "C" {

int undercroft_lossless_instructions() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
  const bool vbmi2 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
  return avx2 + (avx2 && vbmi2);
#else
  return 0;
#endif
}

// out[count]: what was squeezed, with room for so many rare exponents. False: there are more of them than that.
bool undercroft_lossless_restore(int instructions, int threads, int64_t count, int64_t rare, const uint8_t* squeezed,
                                 uint16_t* out) {
  const Squeezed numbers(squeezed, count, rare);
  Restore* const restore = restore_of(instructions);
  std::atomic<bool> is_whole = true;
  in_parallel(team(threads, count), (count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, whole = (std::min(count, first + kChunk) - first) / kBlock;
    Run run = {numbers.table, numbers.codes + kCodes * (first / kBlock), numbers.rests + first, numbers.rare_of(chunk),
               numbers.end};
    run.rare = restore(run, whole, out + first);
    uint16_t last[kBlock];
    if (const int64_t left = std::min(count - first, kChunk) - whole * kBlock; left && run.rare) {
      run.codes += kCodes * whole;
      run.rests += kBlock * whole;
      run.rare = restore(run, 1, last);
      if (run.rare) std::copy_n(last, left, out + first + whole * kBlock);
    }
    if (run.rare == nullptr) is_whole = false;
  });
  return is_whole;
}
}
