// How bfloat16 numbers lie whose exponents are codes of three bits. docs/kernels.md specifies the bytes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 64, kChunk = 512 * kBlock;
constexpr int kTable = 8;  // seven exponents, and one that stands for those elsewhere
constexpr int kCodes = 24;  // bytes of a block's

constexpr int64_t lines(int64_t nbytes) { return (nbytes + kLine - 1) / kLine * kLine; }

// Where the parts of some squeezed numbers are.
struct Squeezed {
  const uint8_t *table, *codes, *rests, *rare, *end;

  // Of `count` numbers with room for so many rare exponents.
  Squeezed(const uint8_t* at, int64_t count, int64_t room) : table(at) {
    const int64_t blocks = (count + kBlock - 1) / kBlock, chunks = (count + kChunk - 1) / kChunk;
    codes = at + lines(kTable + 4 * chunks);
    rests = codes + lines(kCodes * blocks);
    rare = rests + kBlock * blocks;
    end = rare + room;
  }

  // Where the rare exponents of a chunk begin; the end, if it says that they do beyond.
  const uint8_t* rare_of(int64_t chunk) const {
    uint32_t start;
    std::memcpy(&start, table + kTable + 4 * chunk, sizeof start);
    return rare + std::min<int64_t>(start, end - rare);
  }
};

// The bits of 64 codes; `rare` has a bit for each number whose exponent is elsewhere.
struct Planes {
  uint64_t bit[3];
  uint64_t rare() const { return bit[0] & bit[1] & bit[2]; }
};

inline Planes planes(const uint8_t* codes) {
  Planes found;
  for (int i = 0; i < 3; i++) std::memcpy(found.bit + i, codes + 8 * i, sizeof found.bit[i]);
  return found;
}

}  // namespace
