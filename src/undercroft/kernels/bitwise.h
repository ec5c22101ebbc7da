// What products with PyTorch's bits have in common: bfloat16 taken apart, places added up, and how a sum is rounded.

#pragma once

#include "vectors.h"

#if !defined(__x86_64__)
#define TARGET_AVX2
#endif

namespace {

constexpr uint16_t kNotANumber = 0x7fc0;

inline uint16_t rounded(float sum) { return std::isnan(sum) ? kNotANumber : to_bf16(sum); }

#if defined(__x86_64__)
// The eight even and the eight odd of sixteen numbers.
struct Pair {
  __m256 even, odd;
};

TARGET_AVX2 inline Pair apart(__m256i both) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}

// Four places, halves onto each other.
TARGET_AVX2 inline float total(__m128 four) {
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

}  // namespace
