// The experts of a token, out of a table of all experts of a layer in which those that are not in memory are zeros.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kAbsent = 3;  // what a function answers that did nothing, since one of them is not there

template <class Expert>
struct Chosen {
  std::vector<Expert> experts;  // ascending by number
  std::vector<int64_t> order;   // of their sum
  std::vector<float> shares;
};

// Of `used` numbers and their shares; a number beyond the last means none. Empty where one is not there, or there is none.
template <class Expert>
Chosen<Expert> those(const Expert* table, int64_t experts, int64_t used, const int64_t* numbers, bool bf16,
                     const void* shares) {
  std::vector<int64_t> places;
  for (int64_t i = 0; i < used; i++)
    if (numbers[i] < experts) places.push_back(i);
  std::sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return numbers[a] < numbers[b]; });
  Chosen<Expert> found;
  for (const int64_t place : places) {
    const Expert& expert = table[numbers[place]];
    if (expert.gate_up == nullptr) return {};
    float share;
    load_input(shares, bf16, place, 1, &share);
    found.order.push_back(static_cast<int64_t>(found.experts.size()));
    found.experts.push_back(expert);
    found.shares.push_back(share);
  }
  return found;
}

}  // namespace
