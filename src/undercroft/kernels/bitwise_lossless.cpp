// Products of one row in bfloat16 with weights as lossless.cpp restores them, with the bits of PyTorch's own: what bitwise.cpp
// computes of the restored ones, which are never written. Plain C ABI; sizes and types were checked by the caller, and
// nothing else is believed.
//
// A block of 64 numbers is one step of the 64 places of an output, since 64 divides the columns. Its exponents are looked up
// some blocks ahead, into a ring in the first-level cache where rare ones can be put in one by one, and have long been
// written when it is multiplied. There an exponent's lowest bit stands before the others: so it and its number's rest, a sign
// and a mantissa, have but to exchange their highest bits to be the two bytes of the number.
//
// Invariant: nothing is read beyond the rare exponents that there is room for, whatever the codes say.

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "bitwise.h"
#include "bitwise_experts.h"
#include "chosen.h"
#include "lossless.h"
#include "vectors.h"

namespace {

constexpr int64_t kBlocks = kChunk / kBlock;  // of a chunk
constexpr int64_t kAhead = 8, kRing = 16;     // blocks that are looked up and not yet multiplied; that there is room for
constexpr int kUsual = 3;                     // rare exponents of a block that are put in without a branch

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,bmi,popcnt")))

constexpr int kVectors = 8;  // of places: of two halves two eights each, and of these the even and the odd
constexpr int64_t kHalf = 32;

TARGET inline __m256i bytes(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// x[columns] as float [columns / 64][kVectors][8]. A vector has four places of an eight, and those 16 behind them, as
// unpacking leaves the numbers of a half.
TARGET void take_apart(const uint16_t* x, int64_t columns, float* out) {
  for (int64_t at = 0; at < columns; at += kHalf) {
    const __m256i first = bytes(x + at), second = bytes(x + at + kHalf / 2);
    const Pair low = apart(_mm256_permute2x128_si256(first, second, 0x20));
    const Pair high = apart(_mm256_permute2x128_si256(first, second, 0x31));
    for (const __m256& places : {low.even, low.odd, high.even, high.odd}) {
      _mm256_storeu_ps(out, places);
      out += 8;
    }
  }
}

inline uint8_t turned(uint8_t exponent) { return static_cast<uint8_t>(exponent >> 1 | exponent << 7); }

TARGET inline __m256i turned_table(const uint8_t* table) {
  uint8_t found[kTable];
  std::transform(table, table + kTable, found, turned);
  int64_t eight;
  std::memcpy(&eight, found, kTable);
  return _mm256_set1_epi64x(eight);
}

// A plane's bits as lowest bits of nibbles: byte t of the four-byte word q has the bits q and q + 4 of its byte t of the
// four, which are 0, 1, 4 and 5 for the first four words, and 2, 3, 6 and 7 for the others.
TARGET inline __m256i nibbles(uint64_t plane) {
  const int32_t first = 0x05040100, others = 0x07060302;
  const __m256i places = _mm256_setr_epi32(first, first, first, first, others, others, others, others);
  const __m256i each = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(plane)), places);
  return _mm256_and_si256(_mm256_srlv_epi32(each, _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3)), _mm256_set1_epi8(0x11));
}

// The exponents of a block, in order. A shuffle heeds no other bits of an index than the lowest four and the highest, which
// no code sets: so nibbles need not be parted.
TARGET inline void look_up(const Planes& p, __m256i table, uint8_t* out) {
  const __m256i turn = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i codes = nibbles(p.bit[2]);
  codes = _mm256_add_epi8(_mm256_add_epi8(codes, codes), nibbles(p.bit[1]));
  codes = _mm256_add_epi8(_mm256_add_epi8(codes, codes), nibbles(p.bit[0]));
  codes = _mm256_shuffle_epi8(codes, turn);
  const __m256i low = _mm256_shuffle_epi8(table, codes), high = _mm256_shuffle_epi8(table, _mm256_srli_epi16(codes, 4));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi32(low, high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kHalf), _mm256_unpackhi_epi32(low, high));
}

// Put in the exponents of a block that are elsewhere: from `next` on, counted from the end. Where there are fewer than usual,
// the byte behind the block is written too.
TARGET inline void patch(uint64_t places, const uint8_t* end, int64_t next, uint8_t* out) {
  if (next <= -kUsual) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsual; i++, places = _blsr_u64(places)) out[_tzcnt_u64(places)] = turned(end[next + i]);
    next += kUsual;
  }
  for (; places; places = _blsr_u64(places)) out[_tzcnt_u64(places)] = turned(end[next++]);
}

// Add a block's products to the places.
TARGET inline void multiply(const float* x, const uint8_t* exponents, const uint8_t* rests, __m256* places) {
  const __m256i highest = _mm256_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m256i exponent = bytes(exponents + kHalf * half), rest = bytes(rests + kHalf * half);
    const __m256i other = _mm256_and_si256(_mm256_xor_si256(exponent, rest), highest);
    const __m256i high = _mm256_xor_si256(exponent, other), low = _mm256_xor_si256(rest, other);
    const Pair eights[] = {apart(_mm256_unpacklo_epi8(low, high)), apart(_mm256_unpackhi_epi8(low, high))};
#pragma GCC unroll 2
    for (int eight = 0; eight < 2; eight++) {
      const int at = 4 * half + 2 * eight;
      places[at] = _mm256_fmadd_ps(eights[eight].even, _mm256_loadu_ps(x + 8 * at), places[at]);
      places[at + 1] = _mm256_fmadd_ps(eights[eight].odd, _mm256_loadu_ps(x + 8 * at + 8), places[at + 1]);
    }
  }
}

// The even places, or the odd, halves onto each other.
TARGET inline float total(const __m256* places) {
  const __m256 low = _mm256_add_ps(places[0], places[4]), high = _mm256_add_ps(places[2], places[6]);
  return total(_mm_add_ps(_mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1)),
                          _mm_add_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1))));
}

// Where the rare exponents of a block and those behind it begin, counted from the end.
TARGET int64_t rare_of(const Squeezed& weight, int64_t block) {
  int64_t next = weight.rare_of(block / kBlocks) - weight.end;
  for (int64_t i = block / kBlocks * kBlocks; i < block; i++)
    next += __builtin_popcountll(planes(weight.codes + kCodes * i).rare());
  return next;
}

// Outputs first .. first + count of a weight. False: it asks for more rare exponents than there are.
TARGET bool multiply(const Squeezed& weight, const float* x, int64_t steps, int64_t first, int64_t count, uint16_t* out) {
  alignas(32) uint8_t ring[kBlock * (kRing + 1)];  // and what is written behind a block
  const __m256i table = turned_table(weight.table);
  int64_t block = first * steps, left = count * steps, next = rare_of(weight, block);
  const uint8_t *codes = weight.codes + kCodes * block, *rests = weight.rests + kBlock * block, *const end = weight.end;
  uint64_t ahead = 0, now = 0;  // in the ring
  const auto look = [&]() TARGET {
    if (block % kBlocks == 0) next = weight.rare_of(block / kBlocks) - end;
    __builtin_prefetch(codes + kNear, 0, 3);
    const Planes p = planes(codes);
    look_up(p, table, ring + ahead);
    const int64_t then = next + __builtin_popcountll(p.rare());
    if (then > 0) return false;
    patch(p.rare(), end, next, ring + ahead);
    next = then;
    codes += kCodes;
    ahead = (ahead + kBlock) % (kBlock * kRing);
    block++;
    left--;
    return true;
  };
  for (int64_t some = std::min(kAhead, left); some; some--)
    if (!look()) return false;
  for (int64_t output = 0; output < count; output++) {
    __m256 places[kVectors];
    for (__m256& each : places) each = _mm256_setzero_ps();
    for (int64_t step = 0; step < steps; step++, rests += kBlock) {
      if (left && !look()) return false;
      prefetch(rests);
      multiply(x + kBlock * step, ring + now, rests, places);
      now = (now + kBlock) % (kBlock * kRing);
    }
    out[output] = rounded(total(places) + total(places + 1));
  }
  return true;
}
// A matrix as it lies, for `feed`.
struct Lying {
  Squeezed weight;
  int64_t columns;

  static void take_apart(const uint16_t* x, int64_t columns, float* out) { ::take_apart(x, columns, out); }

  bool multiply(const float* x, int64_t first, int64_t count, uint16_t* out) const {
    return ::multiply(weight, x, columns / kBlock, first, count, out);
  }
};
#endif

// An expert, as kernels/bitwise_experts.py lays it out: each matrix and the rare exponents that it has room for.
struct Expert {
  const uint8_t* gate_up;
  int64_t gate_up_rare;
  const uint8_t* down;
  int64_t down_rare;
};

}  // namespace

extern "C" {

bool undercroft_bitwise_lossless_works() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("popcnt");
#else
  return false;
#endif
}

// out[rows] = x[columns] times the transpose of a weight, where that works; 64 divides the columns. 0: done; 1: there is no
// memory; 2: the weight asks for more rare exponents than it has.
int undercroft_bitwise_lossless_multiply(int threads, int64_t columns, int64_t rows, int64_t rare, const uint16_t* x,
                                         const uint8_t* weight, uint16_t* out) try {
#if defined(__x86_64__)
  const std::unique_ptr<float[]> taken(new float[columns]);
  take_apart(x, columns, taken.get());
  const Lying matrix = {Squeezed(weight, rows * columns, rare), columns};
  std::atomic<bool> is_whole = true;
  in_parallel(team(threads, rows * columns), (rows + kPanel - 1) / kPanel, [&](int64_t task) {
    const int64_t first = task * kPanel, some = std::min(kPanel, rows - first);
    if (!matrix.multiply(taken.get(), first, some, out + first)) is_whole = false;
  });
  return is_whole ? 0 : 2;
#else
  return 1;
#endif
} catch (const std::bad_alloc&) {
  return 1;
}

// As `undercroft_bitwise_experts`. 2: a weight asks for more rare exponents than it has.
int undercroft_bitwise_lossless_experts(int threads, int64_t width, int64_t inner, int64_t count, const Expert* experts,
                                        const uint16_t* activation, int nan, const uint16_t* x, int64_t terms,
                                        const int64_t* order, const float* shares, uint16_t* out) try {
#if defined(__x86_64__)
  std::vector<Lying> gate_up, down;
  for (int64_t i = 0; i < count; i++) {
    gate_up.push_back({Squeezed(experts[i].gate_up, 2 * inner * width, experts[i].gate_up_rare), width});
    down.push_back({Squeezed(experts[i].down, width * inner, experts[i].down_rare), inner});
  }
  const Elementwise between = {activation, static_cast<uint16_t>(nan)};
  const bool is_whole =
      mix(threads, width, inner, count, gate_up.data(), down.data(), between, x, terms, order, shares, out);
  return is_whole ? 0 : 2;
#else
  return 1;
#endif
} catch (const std::bad_alloc&) {
  return 1;
}

// The same of the experts that a token chose, see chosen.h, ascending by number. 3: one is not there.
int undercroft_bitwise_lossless_chosen(int threads, int64_t width, int64_t inner, const Expert* table, int64_t experts,
                              const uint16_t* activation, int nan, const uint16_t* x, int64_t used,
                              const int64_t* numbers, bool bf16, const void* shares, uint16_t* out) try {
  const Chosen<Expert> chosen = those(table, experts, used, numbers, bf16, shares);
  const int64_t count = static_cast<int64_t>(chosen.experts.size());
  if (count == 0) return kAbsent;
  return undercroft_bitwise_lossless_experts(threads, width, inner, count, chosen.experts.data(), activation, nan, x, count,
                                    chosen.order.data(), chosen.shares.data(), out);
} catch (const std::bad_alloc&) {
  return 1;
}
}
