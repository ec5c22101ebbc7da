// Where a token goes, with PyTorch's own bits: softmax in float32, the largest, their shares. Plain C ABI; sizes and types
// were checked by the caller.
//
// PyTorch adds up exponentials in a vector of eight places, then halves of it onto each other, and multiplies by the
// inverse of the sum (ATen/native/cpu/SoftMaxKernel.cpp). The largest it finds with the standard library's algorithms,
// which say which of equal ones comes first (ATen/native/TopKImpl.h).

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "vectors.h"

namespace {

constexpr int64_t kLanes = 8;

#if defined(__x86_64__)
using Exponential = __m256(__m256);  // PyTorch's own
using Share = std::pair<float, int64_t>;

TARGET_AVX2 inline float total(__m256 sums) {
  sums = _mm256_add_ps(sums, _mm256_permute2f128_ps(sums, sums, 1));
  sums = _mm256_add_ps(sums, _mm256_shuffle_ps(sums, sums, 0x4e));
  sums = _mm256_add_ps(sums, _mm256_shuffle_ps(sums, sums, 0xb1));
  return _mm256_cvtss_f32(sums);
}

// numbers[experts], with room for whole vectors, become their softmax.
TARGET_AVX2 void softmax(float* numbers, int64_t experts, Exponential* exponential) {
  const __m256 most = _mm256_set1_ps(*std::max_element(numbers, numbers + experts));
  const int64_t whole = experts - experts % kLanes;
  for (int64_t i = 0; i < experts; i += kLanes)
    _mm256_storeu_ps(numbers + i, exponential(_mm256_sub_ps(_mm256_loadu_ps(numbers + i), most)));
  alignas(32) float sums[kLanes];
  __m256 eight = _mm256_loadu_ps(numbers);
  for (int64_t i = kLanes; i < whole; i += kLanes) eight = _mm256_add_ps(eight, _mm256_loadu_ps(numbers + i));
  _mm256_store_ps(sums, eight);
  for (int64_t i = whole; i < experts; i++) sums[i - whole] += numbers[i];
  const float inverse = 1 / total(_mm256_load_ps(sums));
  for (int64_t i = 0; i < experts; i++) numbers[i] *= inverse;
}

// Brings the largest to the front, in order.
void choose(Share* shares, int64_t experts, int64_t used) {
  const auto comes_first = [](const Share& one, const Share& other) { return one.first > other.first; };
  if (used * 64 <= experts) {
    std::partial_sort(shares, shares + used, shares + experts, comes_first);
  } else {
    std::nth_element(shares, shares + used - 1, shares + experts, comes_first);
    std::sort(shares, shares + used - 1, comes_first);
  }
}

// One after another; fewer than eight in four places, the rest in the first of them.
float sum(const Share* shares, int64_t used) {
  const int64_t places = used < kLanes ? std::min<int64_t>(used, 4) : used;
  float sum = shares[0].first;
  for (int64_t i = places; i < used; i++) sum += shares[i].first;
  for (int64_t i = 1; i < places; i++) sum += shares[i].first;
  return sum;
}
#endif

}  // namespace

extern "C" {

// shares[used] and chosen[used] of logits[experts], the largest first. `exponential` is Sleef_expf8_u10 of the library
// that is to be equalled. False: no memory, or a logit that is not finite, and nothing is written.
bool undercroft_bitwise_router_route(void* exponential, int64_t experts, int64_t used, bool among, bool rounded,
                                     const uint16_t* logits, void* shares, int64_t* chosen) try {
#if defined(__x86_64__)
  const std::unique_ptr<float[]> numbers(new float[experts + kLanes]());
  const std::unique_ptr<Share[]> order(new Share[experts]);
  for (int64_t i = 0; i < experts; i++) {
    numbers[i] = from_bf16(logits[i]);
    if (!std::isfinite(numbers[i])) return false;
  }
  softmax(numbers.get(), experts, reinterpret_cast<Exponential*>(exponential));
  for (int64_t i = 0; i < experts; i++) order[i] = {numbers[i], i};
  choose(order.get(), experts, used);
  const float whole = among ? sum(order.get(), used) : 1;
  for (int64_t i = 0; i < used; i++) {
    const float share = order[i].first / whole;
    chosen[i] = order[i].second;
    if (rounded)
      static_cast<uint16_t*>(shares)[i] = to_bf16(share);
    else
      static_cast<float*>(shares)[i] = share;
  }
  return true;
#else
  return false;
#endif
} catch (const std::bad_alloc&) {
  return false;
}
}
