// Linear layers whose weights are group-quantised, on the CPU. docs/kernels.md specifies the packed layout and what is
// computed. Plain C ABI; sizes and types were checked by the caller. One instruction set of three is chosen per call.
//
// Invariant: a result depends on the activations of its row and the weights of its column only, bit for bit: not on the
// number of rows, of threads, or on the instruction set.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "chosen.h"
#include "vectors.h"

namespace {

constexpr int kBlockRows = 32;
constexpr int kLeastGroup = 32;  // columns; every group is a multiple
constexpr int kTileRows = 8;  // rows of activations that share one pass over a block
constexpr int64_t kPanelBytes = 256 << 10;  // activation codes that stay in the second-level cache
constexpr int64_t kPiece = 1024;         // activations, of whole groups, that are loaded before they are quantised
constexpr float kNothing = 1e-30f;     // a group of activations whose largest is smaller counts as zeros

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

// Rows of activations, in tiles of about as many rows each. Within a tile, what the loops take together lies together.
struct Activations {
  std::unique_ptr<int8_t[]> codes;  // of each tile: [columns / 4, its rows, 4]
  std::unique_ptr<Group[]> groups;  // of each tile: [groups, its rows]
  int64_t rows, tiles;
  Activations(int64_t rows, const Matrix& w)
      : codes(new int8_t[rows * w.columns]),
        groups(new Group[rows * w.groups]),
        rows(rows),
        tiles((rows + kTileRows - 1) / kTileRows) {}
  int64_t first_of(int64_t tile) const { return rows * tile / tiles; }
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

using Tile = void(const uint8_t* block, const Matrix&, const Activations&, int64_t first, float* out);

struct Loops {
  Group (*quantise)(const float*, int64_t, int8_t*);
  void (*emit)(const float*, int64_t, uint16_t*);
  std::array<Tile*, kTileRows> tiles[3];  // for 2, 4 and 8 bits
  Tile* tile(int bits, int64_t rows) const { return tiles[bits / 4][rows - 1]; }
};

#define LOOPS "tile.inc"
#include "dispatch.inc"

// Of row m of the M rows of a tile that begins at `first`; fill(column, count, values) writes some of its activations as
// float. Many at a time: what was only just stored cannot be loaded in larger pieces without a wait.
template <class Fill>
void quantise_row(const Loops& loops, Activations& x, int64_t first, int64_t M, int64_t m, const Matrix& w,
                  const Fill& fill) {
  float values[kPiece];
  int8_t codes[kPiece];
  Group* groups = x.groups.get() + first * w.groups + m;
  for (int64_t begin = 0; begin < w.columns; begin += kPiece) {
    const int64_t count = std::min(kPiece, w.columns - begin);
    fill(begin, count, values);
    int8_t* const to = x.codes.get() + first * w.columns + begin * M + 4 * m;
    for (int64_t at = 0; at < count; at += w.group, groups += M)
      *groups = loops.quantise(values + at, w.group, M == 1 ? to + at : codes + at);
    for (int64_t at = 0; M > 1 && at < count; at += 4) std::memcpy(to + at * M, codes + at, 4);
  }
}

// fill(row, column, count, values) does so for each row.
template <class Fill>
Activations quantise(const Loops& loops, int threads, int64_t rows, const Matrix& w, const Fill& fill) {
  Activations x(rows, w);
  in_parallel(team(threads, rows * w.columns), x.tiles, [&](int64_t tile) {
    const int64_t first = x.first_of(tile), M = x.first_of(tile + 1) - first;
    for (int64_t m = 0; m < M; m++)
      quantise_row(loops, x, first, M, m, w,
                   [&](int64_t column, int64_t count, float* values) { fill(first + m, column, count, values); });
  });
  return x;
}

int64_t blocks_of(const Matrix& w) { return (w.rows + kBlockRows - 1) / kBlockRows; }

void emit(const Loops&, const float* values, int64_t count, float* out) { std::copy_n(values, count, out); }
void emit(const Loops& loops, const float* values, int64_t count, uint16_t* out) { loops.emit(values, count, out); }

template <class Out>
void multiply(const Loops& loops, int threads, const Activations& x, const Matrix& w, Out* out) {
  const int64_t blocks = blocks_of(w), block_nbytes = group_nbytes(w.bits, w.group) * w.groups;
  const int64_t panel = std::clamp<int64_t>(kPanelBytes / w.columns / kTileRows, 1, 16);  // tiles of a task
  const int64_t panels = (x.tiles + panel - 1) / panel;
  const int64_t share = std::clamp<int64_t>(blocks / (threads * 2), 1, 16);  // blocks of a task
  const int64_t shares = (blocks + share - 1) / share;
  in_parallel(team(threads, x.rows * w.rows * w.columns), panels * shares, [&](int64_t task) {
    float sums[kTileRows * kBlockRows];
    const int64_t begin = task / shares * panel, end = std::min(begin + panel, x.tiles);
    const int64_t first = task % shares * share, last = std::min(first + share, blocks);
    for (int64_t block = first; block < last; block++) {
      const int64_t column = block * kBlockRows, width = std::min<int64_t>(kBlockRows, w.rows - column);
      for (int64_t tile = begin; tile < end; tile++) {
        const int64_t row = x.first_of(tile), next = x.first_of(tile + 1);
        loops.tile(w.bits, next - row)(w.packed + block * block_nbytes, w, x, row, sums);
        for (int64_t m = row; m < next; m++) emit(loops, sums + (m - row) * kBlockRows, width, out + m * w.rows + column);
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

void multiply_into(const Loops& loops, int threads, const Activations& x, const Matrix& w, void* out, bool bf16) {
  if (bf16)
    multiply(loops, threads, x, w, static_cast<uint16_t*>(out));
  else
    multiply(loops, threads, x, w, static_cast<float*>(out));
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

// What each block makes of one token: out[i, width] = down(silu(gate(x)) * up(x)).
void feed(const Loops& loops, int threads, bool bf16, int64_t count, int64_t width, int64_t inner, const void* x,
          const Block* blocks, float* out) {
  Layer first, second;
  for (const Block* b = blocks; b < blocks + count; b++) {
    first.add(matrix(b->gate_up, static_cast<int>(b->bits), b->group, 2 * inner, width));
    second.add(matrix(b->down, static_cast<int>(b->down_bits), b->down_group, width, inner));
  }
  const std::unique_ptr<float[]> hidden(new float[count * 2 * inner]);
  in_parallel(team(threads, count * width), count, [&](int64_t i) {
    quantise_row(loops, first.inputs[i], 0, 1, 0, first.weights[i], [&](int64_t column, int64_t n, float* values) {
      load_input(x, bf16, column, n, values);
      level(blocks[i].gate_up_levels, column, n, values);
    });
  });
  first.multiply(loops, threads, hidden.get());
  in_parallel(team(threads, count * 16 * inner), count, [&](int64_t i) {  // an exponential costs as much as many products
    quantise_row(loops, second.inputs[i], 0, 1, 0, second.weights[i], [&](int64_t column, int64_t n, float* values) {
      load_gated(hidden.get() + i * 2 * inner, inner, column, n, values);
      level(blocks[i].down_levels, column, n, values);
    });
  });
  second.multiply(loops, threads, out);
}

// out[width] = the sum of rows[order[i]] * shares[i], added up in the order given.
void add_up(bool bf16, int64_t count, int64_t width, const float* rows, const int64_t* order, const float* shares,
            void* out) {
  float sums[256];
  for (int64_t at = 0; at < width; at += 256) {
    const int64_t columns = std::min<int64_t>(256, width - at);
    std::fill_n(sums, columns, 0.f);
    for (int64_t i = 0; i < count; i++) {
      const float* row = rows + order[i] * width + at;
      for (int64_t c = 0; c < columns; c++) sums[c] += shares[i] * row[c];
    }
    if (bf16)
      emit(sums, columns, static_cast<uint16_t*>(out) + at);
    else
      emit(sums, columns, static_cast<float*>(out) + at);
  }
}

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
  multiply_into(loops, threads, quantise_input(loops, threads, rows, w, x, bf16), w, out, bf16);
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
  multiply(loops, threads, quantise_input(loops, threads, rows, first, x, bf16), first, hidden.get());
  multiply_into(loops, threads, quantise_gated(loops, threads, rows, second, hidden.get()), second, out, bf16);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// out[i, width] = what block i makes of the token x[width], float32. False: no memory.
bool undercroft_kernels_blocks(int instructions, int threads, bool bf16, int64_t count, int64_t width, int64_t inner,
                               const void* x, const Block* blocks, float* out) try {
  feed(loops_of(instructions), threads, bf16, count, width, inner, x, blocks, out);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

void undercroft_kernels_add_up(bool bf16, int64_t count, int64_t width, const float* rows, const int64_t* order,
                               const float* shares, void* out) {
  add_up(bf16, count, width, rows, order, shares, out);
}

// Both at once: out[width] of `terms` shares of blocks, in the dtype of x. False: no memory.
bool undercroft_kernels_mix(int instructions, int threads, bool bf16, int64_t count, int64_t width, int64_t inner,
                            const void* x, const Block* blocks, int64_t terms, const int64_t* order,
                            const float* shares, void* out) try {
  const std::unique_ptr<float[]> rows(new float[count * width]);
  feed(loops_of(instructions), threads, bf16, count, width, inner, x, blocks, rows.get());
  add_up(bf16, terms, width, rows.get(), order, shares, out);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// The same of the blocks that a token chose, see chosen.h, ascending by number. 0: done; 1: no memory; 3: one is not there.
int undercroft_kernels_mix_chosen(int instructions, int threads, bool bf16, int64_t width, int64_t inner, const void* x,
                                  const Block* table, int64_t experts, int64_t used, const int64_t* numbers,
                                  bool shares_bf16, const void* shares, void* out) try {
  const Chosen<Block> chosen = those(table, experts, used, numbers, shares_bf16, shares);
  const int64_t count = static_cast<int64_t>(chosen.experts.size());
  if (count == 0) return kAbsent;
  return !undercroft_kernels_mix(instructions, threads, bf16, count, width, inner, x, chosen.experts.data(), count,
                                 chosen.order.data(), chosen.shares.data(), out);
} catch (const std::bad_alloc&) {
  return 1;
}
}
