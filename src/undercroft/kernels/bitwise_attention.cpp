// Attention of one token in bfloat16, with the bits of PyTorch's own where MKL multiplies for it in its plain kernel,
// mkl_blas_def_xgemv_bf16bf16f32, which AMD's processors get. Plain C ABI; sizes and types were checked by the caller.
//
// PyTorch (ATen/native/cpu/FlashAttentionKernel.cpp) takes 512 keys at a time. The orders of addition, nothing fused:
// - a score has four places, column k is added in place k % 4, and they are added up as (0 + 2) + (1 + 3);
// - values of four keys, times weights, are added up so too, and then to all before; those that fill no four are added
//   one by one, the last first;
// - weights have three vectors of eight: those of even eights, of odd ones, and one for an eight that has no partner.
// What fills no eight is exponentiated in double precision, and is added at the end.
//
// Here heads that share keys do so in the cache, too: eight keys are taken apart once, four columns of one beside four
// of another, so that a vector has the places of two scores.

#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 512;  // keys that PyTorch takes at a time
constexpr int64_t kWidest = 256;
constexpr int64_t kHeads = 8;  // that share keys in a task
constexpr int64_t kTile = 8;   // keys that are taken apart at a time
constexpr float kLowest = -INFINITY;

// As kernels/bitwise_attention.py lays it out. query and out are [heads, width]; the others [key_heads, count, width],
// each with steps between its heads and between its rows.
struct Attention {
  int64_t heads, key_heads, count, width;
  const uint16_t* query;
  uint16_t* keys;
  int64_t key_head, key_row;
  uint16_t* values;
  int64_t value_head, value_row;
  uint16_t* out;
  float* sums;       // [heads], logarithms of each head's sum of e to the power of scores; or null
  const char* last;  // the last row of all keys and then of all values, which are to be put to their places; or null
};

void put_last(const Attention& a) {
  if (a.last == nullptr) return;
  const int64_t before = a.count - 1, nbytes = 2 * a.width;
  const auto put = [&](const char* rows, uint16_t* to, int64_t head, int64_t row) {
    return put_rows(rows, a.key_heads, nbytes, reinterpret_cast<char*>(to + before * row), 2 * head);
  };
  put(put(a.last, a.keys, a.key_head, a.key_row), a.values, a.value_head, a.value_row);
}

// Of one query, while keys come by.
struct alignas(64) Head {
  float query[kWidest];
  float weights[kBlock];  // scores, at first
  float values[kWidest];  // their weighted sum
  float highest, total;   // score; of all weights
};

#if defined(__x86_64__)
#define TARGET TARGET_AVX2

TARGET inline __m128i eight(const uint16_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

TARGET inline __m256 widen(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}

// To the nearest number of bfloat16, ties to even; for no NaN.
TARGET inline __m256 nearest(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

// Eight keys as float [width / 4][4][four columns of key i, four of key i + 4].
TARGET void take_apart(const uint16_t* const* keys, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += 8, out += 64)
    for (int i = 0; i < 4; i++) {
      const __m128i one = eight(keys[i] + d), other = eight(keys[i + 4] + d);
      _mm256_storeu_ps(out + 8 * i, widen(_mm_unpacklo_epi64(one, other)));
      _mm256_storeu_ps(out + 8 * i + 32, widen(_mm_unpackhi_epi64(one, other)));
    }
}

TARGET inline __m256 add_halves(__m256 one, __m256 other) {
  return _mm256_add_ps(_mm256_unpacklo_ps(one, other), _mm256_unpackhi_ps(one, other));
}

// The eight scores of as many keys, for each of some heads.
template <int HEADS>
TARGET void score(const float* tile, int64_t width, float scale, Head* heads, int64_t key) {
  __m256 sums[HEADS][4];
#pragma GCC unroll 8
  for (int i = 0; i < HEADS * 4; i++) sums[i / 4][i % 4] = _mm256_setzero_ps();
  for (int64_t d = 0; d < width; d += 4, tile += 32)
#pragma GCC unroll 2
    for (int h = 0; h < HEADS; h++) {
      const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(heads[h].query + d));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        sums[h][i] = _mm256_add_ps(sums[h][i], _mm256_mul_ps(_mm256_loadu_ps(tile + 8 * i), four));
    }
#pragma GCC unroll 2
  for (int h = 0; h < HEADS; h++) {
    const __m256 one = add_halves(sums[h][0], sums[h][1]), other = add_halves(sums[h][2], sums[h][3]);
    const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(one, other, 0x44), _mm256_shuffle_ps(one, other, 0xee));
    _mm256_storeu_ps(heads[h].weights + key, _mm256_mul_ps(all, _mm256_set1_ps(scale)));
  }
}

// The scores of `count` keys; what lies behind them, up to a whole tile, is of no use.
TARGET void score_all(const uint16_t* keys, int64_t row, int64_t count, int64_t width, float scale, Head* heads,
                      int64_t number) {
  alignas(64) float tile[kTile * kWidest];
  for (int64_t key = 0; key < count; key += kTile) {
    const uint16_t* each[kTile];
    for (int64_t i = 0; i < kTile; i++) each[i] = keys + std::min(key + i, count - 1) * row;
    take_apart(each, width, tile);
    int64_t h = 0;
    for (; h + 2 <= number; h += 2) score<2>(tile, width, scale, heads + h, key);
    if (h < number) score<1>(tile, width, scale, heads + h, key);
  }
}

// A NaN where one is among whole eights; others are not looked at.
TARGET float highest(const float* scores, int64_t count) {
  __m256 most = _mm256_set1_ps(kLowest), nans = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 each = _mm256_loadu_ps(scores + i);
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(each, each, _CMP_UNORD_Q));
    most = _mm256_max_ps(most, each);
  }
  if (_mm256_movemask_ps(nans) != 0) return NAN;
  float eights[8];
  _mm256_storeu_ps(eights, most);
  float result = *std::max_element(eights, eights + 8);
  for (; i < count; i++) result = scores[i] > result ? scores[i] : result;
  return result;
}

// e to the power of what is at most 0, as PyTorch's Vectorized<float>::fexp_u20, which writes 2^x as the bits of a
// number, x in whole and fraction, the latter corrected by a polynomial. -0 for a NaN.
TARGET inline __m256 exponential(__m256 x) {
  constexpr float kOne = 8388608.f;  // of the exponent, in bits
  const __m256 power = _mm256_mul_ps(x, _mm256_set1_ps(float_of(0x3fb8aa3b)));  // log2(e)
  const __m256 rest = _mm256_sub_ps(power, _mm256_floor_ps(power));
  __m256 by = _mm256_fmadd_ps(rest, _mm256_set1_ps(-0.079204240219773236f), _mm256_set1_ps(-0.22433836478672356f));
  by = _mm256_fmadd_ps(rest, by, _mm256_set1_ps(0.30354260500649682f));
  by = _mm256_fmadd_ps(rest, by, _mm256_set1_ps(0.00010703434948458272f));
  const __m256 bits =
      _mm256_fmadd_ps(_mm256_set1_ps(kOne), _mm256_sub_ps(power, by), _mm256_set1_ps(127.f * kOne));
  const __m256 vanishes = _mm256_cmp_ps(x, _mm256_set1_ps(float_of(static_cast<int32_t>(0xc2aeac50))), _CMP_LT_OS);
  return _mm256_andnot_ps(vanishes, _mm256_castsi256_ps(_mm256_cvttps_epi32(bits)));
}

TARGET inline float add_up(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Makes weights of eight scores, rounded to bfloat16; returns them before they were.
TARGET inline __m256 weigh_eight(float* scores, __m256 highest) {
  const __m256 weights = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores), highest));
  _mm256_storeu_ps(scores, nearest(weights));
  return weights;
}

// The same of all scores; returns the sum.
TARGET float weigh(float* scores, int64_t count, float highest) {
  const __m256 most = _mm256_set1_ps(highest);
  __m256 even = _mm256_setzero_ps(), odd = even, single = even;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    even = _mm256_add_ps(even, weigh_eight(scores + i, most));
    odd = _mm256_add_ps(odd, weigh_eight(scores + i + 8, most));
  }
  if (i + 8 <= count) {
    single = weigh_eight(scores + i, most);
    i += 8;
  }
  float sum = add_up(_mm256_add_ps(_mm256_add_ps(single, even), odd));
  for (; i < count; i++) {
    const float weight = static_cast<float>(std::exp(static_cast<double>(scores[i] - highest)));
    sum += weight;
    scores[i] = from_bf16(to_bf16(weight));
  }
  return sum;
}

// Weights of some more keys whose scores are there; all before weigh less where one of these has a higher score.
TARGET void go_on(Head& head, int64_t count, int64_t width) {
  const float found = highest(head.weights, count), most = head.highest > found ? head.highest : found;
  if (most == kLowest) {
    std::fill_n(head.weights, count, 0.f);
    return;
  }
  const float sum = weigh(head.weights, count, most), share = std::exp(head.highest - most);
  head.total = std::fma(share, head.total, sum);
  head.highest = most;
  for (int64_t d = 0; d < width; d++) head.values[d] *= share;
}

// The values of four keys that follow each other.
TARGET void add_four(const uint16_t* values, int64_t row, int64_t width, Head* heads, int64_t number, int64_t key) {
  for (int64_t d = 0; d < width; d += 8) {
    __m256 each[4], products[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) each[i] = widen(eight(values + i * row + d));
    for (int64_t h = 0; h < number; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) products[i] = _mm256_mul_ps(each[i], _mm256_broadcast_ss(heads[h].weights + key + i));
      const __m256 even = _mm256_add_ps(products[0], products[2]), odd = _mm256_add_ps(products[1], products[3]);
      float* const at = heads[h].values + d;
      _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_add_ps(even, odd)));
    }
  }
}

TARGET void add_one(const uint16_t* values, int64_t width, Head* heads, int64_t number, int64_t key) {
  for (int64_t h = 0; h < number; h++)
    for (int64_t d = 0; d < width; d += 8) {
      const __m256 product = _mm256_mul_ps(widen(eight(values + d)), _mm256_broadcast_ss(heads[h].weights + key));
      float* const at = heads[h].values + d;
      _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), product));
    }
}

TARGET void add_all(const uint16_t* values, int64_t row, int64_t count, int64_t width, Head* heads, int64_t number) {
  const int64_t whole = count - count % 4;
  for (int64_t key = 0; key < whole; key += 4) add_four(values + key * row, row, width, heads, number, key);
  for (int64_t key = count - 1; key >= whole; key--) add_one(values + key * row, width, heads, number, key);
}

TARGET void finish(const Head& head, int64_t width, uint16_t* out) {
  const float share = 1.f / (head.total == 0.f ? 1.f : head.total);
  for (int64_t d = 0; d < width; d++) {
    const float value = head.values[d] * share;
    out[d] = value == value ? to_bf16(value) : 0xffff;
  }
}

// Of `number` heads from the first on, which share the keys of a head.
TARGET void attend(const Attention& a, float scale, int64_t key_head, int64_t first, int64_t number) {
  Head heads[kHeads];
  for (int64_t h = 0; h < number; h++) {
    load_input(a.query, true, (first + h) * a.width, a.width, heads[h].query);
    std::fill_n(heads[h].values, a.width, 0.f);
    heads[h].highest = kLowest;
    heads[h].total = 0.f;
  }
  const uint16_t* keys = a.keys + key_head * a.key_head;
  const uint16_t* values = a.values + key_head * a.value_head;
  for (int64_t at = 0; at < a.count; at += kBlock) {
    const int64_t count = std::min(kBlock, a.count - at);
    prefetch_rows(keys + at * a.key_row, 2 * a.key_row, count, 2 * a.width);
    prefetch_rows(values + at * a.value_row, 2 * a.value_row, count, 2 * a.width);
    score_all(keys + at * a.key_row, a.key_row, count, a.width, scale, heads, number);
    for (int64_t h = 0; h < number; h++) go_on(heads[h], count, a.width);
    add_all(values + at * a.value_row, a.value_row, count, a.width, heads, number);
  }
  for (int64_t h = 0; h < number; h++) {
    finish(heads[h], a.width, a.out + (first + h) * a.width);
    if (a.sums != nullptr) a.sums[first + h] = heads[h].highest + std::log(heads[h].total);
  }
}
#undef TARGET
#endif

}  // namespace

extern "C" {

// Width is a multiple of 16 and at most 256. To be called where there is AVX2.
void undercroft_bitwise_attention_attend(int threads, float scale, const Attention* attention) {
#if defined(__x86_64__)
  const Attention& a = *attention;
  put_last(a);
  const int64_t group = a.heads / a.key_heads, parts = (group + kHeads - 1) / kHeads;
  in_parallel(team(threads, 2 * a.heads * a.count * a.width), a.key_heads * parts, [&](int64_t task) {
    const int64_t key_head = task / parts, begin = task % parts * kHeads;
    attend(a, scale, key_head, key_head * group + begin, std::min(kHeads, group - begin));
  });
#endif
}
}
