// What a token needs of a model beside its linear layers: attention of one query, RMSNorm, and a router. Plain C ABI; sizes and
// types were checked by the caller. All sums are float32.
//
// Invariant: a result depends on the token's own numbers only, bit for bit: not on the number of tokens, of threads, or
// on the instruction set.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

constexpr int kSixteen = 16;
constexpr int kHeads = 4;           // queries that share one pass over keys and values
constexpr int64_t kChunk = 128;     // keys of a task; the sums of chunks are put together in their order
constexpr int64_t kRows = 16;      // rows of a task that normalises or multiplies them
constexpr float kLeastPower = -87.f;  // e to a lesser power counts as much, which is nothing beside one

struct Rows {
  const char* at;
  int64_t stride;  // bytes
  int64_t width;   // numbers
};

// Of one query in one chunk: its largest product, and the sum of e to the power of all less that.
struct Weight {
  float top, sum;
};

// As kernels/trunk.py lays it out; strides are bytes.
struct Attention {
  int64_t batch, heads, key_heads, tokens, key_width, value_width;
  int64_t key_batch_stride, key_head_stride, key_stride;
  int64_t value_batch_stride, value_head_stride, value_stride;
  const char* last;  // of a batch of one, the last token's keys and then values, which are to be put to their places; or null
};

using Attend = void(const float* queries, const Rows& keys, const Rows& values, int64_t count, Weight*, float* out);
using Meet = void(const float* query, const char* keys, int64_t stride, int64_t count, int64_t width, float* out);
using Normalise = void(const void* x, const void* weight, int64_t columns, float least, float* out);

struct Loops {
  std::array<Attend*, kHeads> attend[2];  // of float32, of bfloat16
  Meet* meet[2];
  Normalise* normalise[2][2];
};

#define LOOPS "trunk.inc"
#include "dispatch.inc"

void emit(const float* values, int64_t count, bool bf16, void* out, int64_t at) {
  if (bf16)
    emit(values, count, static_cast<uint16_t*>(out) + at);
  else
    emit(values, count, static_cast<float*>(out) + at);
}

void put_last(const Attention& a, int64_t size, char* keys, char* values) {
  if (a.last == nullptr) return;
  const int64_t before = a.tokens - 1;
  const char* rest = put_rows(a.last, a.key_heads, a.key_width * size, keys + before * a.key_stride, a.key_head_stride);
  put_rows(rest, a.key_heads, a.value_width * size, values + before * a.value_stride, a.value_head_stride);
}

// What one head makes of its chunks: their sums, each by its weight.
void unite(const Weight* weights, const float* sums, int64_t chunks, int64_t stride, int64_t width, float* out) {
  float top = -INFINITY, total = 0.f;
  for (int64_t c = 0; c < chunks; c++) top = top < weights[c * stride].top ? weights[c * stride].top : top;
  std::fill_n(out, width, 0.f);
  for (int64_t c = 0; c < chunks; c++) {
    const float share = std::exp(weights[c * stride].top - top);
    total += share * weights[c * stride].sum;
    for (int64_t d = 0; d < width; d++) out[d] += share * sums[c * stride * width + d];
  }
  for (int64_t d = 0; d < width; d++) out[d] /= total;
}

}  // namespace

extern "C" {

// out[batch, heads, value_width] = softmax(scale * queries . keys) . values; queries are [batch, heads, key_width], and
// so many heads in a row share keys and values as there are heads to one of theirs. False: no memory.
bool undercroft_trunk_attend(int instructions, int threads, bool bf16, const Attention* shape, float scale,
                             const void* queries, char* keys, char* values, void* out) try {
  const Attention& a = *shape;
  put_last(a, bf16 ? 2 : 4, keys, values);
  const Loops& loops = loops_of(instructions);
  const int64_t rows = a.batch * a.heads, shared = a.heads / a.key_heads, chunks = (a.tokens + kChunk - 1) / kChunk;
  const std::unique_ptr<float[]> scaled(new float[rows * a.key_width]), sums(new float[chunks * rows * a.value_width]);
  const std::unique_ptr<Weight[]> weights(new Weight[chunks * rows]);
  load_input(queries, bf16, 0, rows * a.key_width, scaled.get());
  for (int64_t i = 0; i < rows * a.key_width; i++) scaled[i] *= scale;
  const int64_t tasks = a.batch * a.key_heads * chunks, work = rows * a.tokens * (a.key_width + a.value_width);
  in_parallel(team(threads, work), tasks, [&](int64_t task) {
    const int64_t chunk = task % chunks, head = task / chunks % a.key_heads, batch = task / chunks / a.key_heads;
    const int64_t first = chunk * kChunk, count = std::min(kChunk, a.tokens - first);
    const Rows k = {keys + batch * a.key_batch_stride + head * a.key_head_stride + first * a.key_stride, a.key_stride,
                    a.key_width};
    const Rows v = {values + batch * a.value_batch_stride + head * a.value_head_stride + first * a.value_stride,
                    a.value_stride, a.value_width};
    for (int64_t h = 0; h < shared; h += kHeads) {
      const int64_t row = batch * a.heads + head * shared + h, at = chunk * rows + row;
      loops.attend[bf16][std::min<int64_t>(kHeads, shared - h) - 1](scaled.get() + row * a.key_width, k, v, count,
                                                                    weights.get() + at, sums.get() + at * a.value_width);
    }
  });
  const std::unique_ptr<float[]> whole(new float[a.value_width]);
  for (int64_t row = 0; row < rows; row++) {
    unite(weights.get() + row, sums.get() + row * a.value_width, chunks, rows, a.value_width, whole.get());
    emit(whole.get(), a.value_width, bf16, out, row * a.value_width);
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// Where a token goes: logits [experts] = weight [experts, columns] . x, and of the `used` largest, the largest first and
// the lower number first where they are equal, their numbers and their shares of the softmax, or of each other's if
// `among` them. False: no memory.
bool undercroft_trunk_route(int instructions, int threads, bool bf16, bool score_bf16, bool among, int64_t experts,
                            int64_t columns, int64_t used, const void* x, const char* weight, void* logits,
                            void* scores, int64_t* chosen) try {
  Meet* const meet = loops_of(instructions).meet[bf16];
  const int64_t stride = columns * (bf16 ? 2 : 4), tasks = (experts + kRows - 1) / kRows;
  const std::unique_ptr<float[]> values(new float[columns + experts + used]);
  const std::unique_ptr<int64_t[]> order(new int64_t[experts]);
  float *const query = values.get(), *const found = query + columns, *const shares = found + experts;
  load_input(x, bf16, 0, columns, query);
  in_parallel(team(threads, experts * columns), tasks, [&](int64_t task) {
    const int64_t first = task * kRows;
    meet(query, weight + first * stride, stride, std::min(kRows, experts - first), columns, found + first);
  });
  for (int64_t e = 0; e < experts; e++) order[e] = e;
  std::partial_sort(order.get(), order.get() + used, order.get() + experts,
                    [&](int64_t a, int64_t b) { return found[a] != found[b] ? found[a] > found[b] : a < b; });
  float total = 0.f;
  for (int64_t i = 0; i < (among ? used : experts); i++) total += std::exp(found[order[i]] - found[order[0]]);
  for (int64_t i = 0; i < used; i++) shares[i] = std::exp(found[order[i]] - found[order[0]]) / total;
  std::copy_n(order.get(), used, chosen);
  emit(found, experts, bf16, logits, 0);
  emit(shares, used, score_bf16, scores, 0);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// Heads of one token, normalised each, and turned by their place in the text; x is [heads + key_heads, width], and
// remains so. No weight: not normalised. False: no memory.
bool undercroft_trunk_turn(int instructions, bool bf16, int64_t heads, int64_t key_heads, int64_t width, float least,
                           const void* weight, const void* key_weight, const void* cosines, const void* sines,
                           void* x) try {
  Normalise* const normalise = loops_of(instructions).normalise[bf16][bf16];
  const std::unique_ptr<float[]> values(new float[4 * width]);
  float *const head = values.get(), *const cosine = head + width, *const sine = cosine + width;
  load_input(cosines, bf16, 0, width, cosine);
  load_input(sines, bf16, 0, width, sine);
  float* const turned = sine + width;
  const int64_t half = width / 2;
  for (int64_t h = 0; h < heads + key_heads; h++) {
    const void* const each = h < heads ? weight : key_weight;
    if (each == nullptr)
      load_input(x, bf16, h * width, width, head);
    else
      normalise(static_cast<const char*>(x) + h * width * (bf16 ? 2 : 4), each, width, least, head);
    for (int64_t i = 0; i < half; i++) {
      turned[i] = head[i] * cosine[i] - head[i + half] * sine[i];
      turned[i + half] = head[i + half] * cosine[i + half] + head[i] * sine[i + half];
    }
    emit(turned, width, bf16, x, h * width);
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// out[rows, columns] = x / sqrt(mean of the row's squares + least) * weight[columns], each rounded once. False: no memory.
bool undercroft_trunk_normalise(int instructions, int threads, bool bf16, bool weight_bf16, int64_t rows,
                                int64_t columns, float least, const void* x, const void* weight, void* out) try {
  Normalise* const normalise = loops_of(instructions).normalise[bf16][weight_bf16];
  const int64_t tasks = (rows + kRows - 1) / kRows;
  const std::unique_ptr<float[]> values(new float[tasks * columns]);
  in_parallel(team(threads, 4 * rows * columns), tasks, [&](int64_t task) {
    float* const row_values = values.get() + task * columns;
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); row++) {
      normalise(static_cast<const char*>(x) + row * columns * (bf16 ? 2 : 4), weight, columns, least, row_values);
      emit(row_values, columns, bf16, out, row * columns);
    }
  });
  return true;
} catch (const std::bad_alloc&) {
  return false;
}
}
