// Attention of some queries that share a head to consecutive slots, a few queries and keys at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "elements.h"

namespace pangu {

// Slots that are worked on at a time (own choice: scores and values stay in the first cache).
constexpr int64_t kSlots = 64;
constexpr float kHidden = -1e30f;

// Some consecutive slots of a page: their keys and values, and the scales of both where there are.
template <class C>
struct Span {
  const typename C::type *keys, *values;
  const float *key_scale, *value_scale;
  int64_t start, slots;  // `start` is counted from the row's first
};

// Some queries of one row that share a head, and what they have seen.
struct Queries {
  static constexpr int64_t kMost = 32;  // own choice
  int64_t count = 0, H;
  const int32_t* positions[kMost];
  std::vector<float> rows, mixed;
  float highest[kMost], sum[kMost];
  alignas(64) float scores[kMost][kSlots];

  // `rows` has one more than there may be: queries are multiplied two at a time.
  explicit Queries(int64_t width) : H(width), rows((kMost + 1) * width), mixed(kMost * width) {}

  void add(const float* query, const int32_t* position) {
    std::copy(query, query + H, rows.data() + count * H);
    std::fill_n(mixed.data() + count * H, H, 0.0f);
    positions[count] = position;
    highest[count] = kHidden;
    sum[count++] = 0;
  }

  int32_t last_position() const {
    int32_t last = -1;
    for (int64_t q = 0; q < count; ++q) last = std::max(last, *positions[q]);
    return last;
  }

  // What mixed[q] is to be multiplied with in the end.
  float share(int64_t q) const { return sum[q] > 0 ? 1.0f / sum[q] : 0.0f; }

  // Scores to weights of the slots from `start`; what was summed before is scaled to them.
  void weigh(int64_t start, int64_t slots) {
    const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
    for (int64_t q = 0; q < count; ++q) {
      float* own = scores[q];
      const int64_t seen = std::min(slots, std::max<int64_t>(0, *positions[q] + 1 - start));
      if (!seen) {
        std::fill_n(own, padded, 0.0f);
        continue;
      }
      std::fill(own + seen, own + padded, kHidden);
      Floats high = splat(highest[q]);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats score = vector_at<Floats>(own + i);
        high = score > high ? score : high;
      }
      const float higher = largest(high);
      Floats added{};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats weight = exp_of_negative(vector_at<Floats>(own + i) - splat(higher));
        std::memcpy(own + i, &weight, sizeof weight);
        added += weight;
      }
      if (higher > highest[q]) {
        const float before = std::exp(highest[q] - higher);
        sum[q] *= before;
        for (int64_t h = 0; h < H; ++h) mixed[q * H + h] *= before;
        highest[q] = higher;
      }
      sum[q] += total(added);
    }
  }
};

// Asks for memory that will be read next.
template <class T>
inline void ask_for(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// The products of all queries with `slots` keys, four keys and two queries at a time; meanwhile the
// keys at `next` are asked for.
template <class C>
void multiply(Queries& own, const typename C::type* keys, const typename C::type* next,
              int64_t slots) {
  const int64_t H = own.H;
  for (int64_t s = 0; s < slots; s += 4) {
    const typename C::type* key[4];  // the last one again behind the end
    for (int i = 0; i < 4; ++i) key[i] = keys + std::min(s + i, slots - 1) * H;
    ask_for(next + s * H, 4 * H);
    for (int64_t q = 0; q < own.count; q += 2) {
      const float* query = own.rows.data() + q * H;
      Floats acc[8] = {};
      for (int64_t h = 0; h < H; h += kLanes) {
        const Floats first = vector_at<Floats>(query + h), second = vector_at<Floats>(query + H + h);
        for (int i = 0; i < 4; ++i) {
          const Floats k = C::load(key[i] + h);
          acc[i] = fused(k, first, acc[i]);
          acc[4 + i] = fused(k, second, acc[4 + i]);
        }
      }
      float sums[8];
      totals(acc, sums);
      std::copy(sums, sums + 4, own.scores[q] + s);
      if (q + 1 < own.count) std::copy(sums + 4, sums + 8, own.scores[q + 1] + s);
    }
  }
}

// mixed[q] += scores[q] @ values for RQ queries and RH vectors of their width.
template <class C, int RQ, int RH>
inline void add_values(Queries& own, int64_t q, int64_t h, const typename C::type* values,
                       const typename C::type* next, int64_t slots) {
  Floats acc[RQ][RH];
  float* rows = own.mixed.data() + q * own.H + h;
  for (int i = 0; i < RQ; ++i)
    for (int j = 0; j < RH; ++j) acc[i][j] = vector_at<Floats>(rows + i * own.H + j * kLanes);
  for (int64_t s = 0; s < slots; ++s) {
    ask_for(next + s * own.H + h, RH * kLanes);
    for (int j = 0; j < RH; ++j) {
      const Floats v = C::load(values + s * own.H + h + j * kLanes);
      for (int i = 0; i < RQ; ++i) acc[i][j] = fused(splat(own.scores[q + i][s]), v, acc[i][j]);
    }
  }
  for (int i = 0; i < RQ; ++i)
    for (int j = 0; j < RH; ++j)
      std::memcpy(rows + i * own.H + j * kLanes, &acc[i][j], sizeof acc[i][j]);
}

template <class C, int RQ>
inline void add_values(Queries& own, int64_t q, const typename C::type* values,
                       const typename C::type* next, int64_t slots) {
  int64_t h = 0;
  for (; h + 2 * kLanes <= own.H; h += 2 * kLanes)
    add_values<C, RQ, 2>(own, q, h, values, next, slots);
  if (h < own.H) add_values<C, RQ, 1>(own, q, h, values, next, slots);
}

// What all queries see of a span; `next` is what will be seen after it.
template <class C>
void see(Queries& own, const Span<C>& span, const Span<C>& next) {
  multiply<C>(own, span.keys, next.keys, span.slots);
  const float root = 1.0f / std::sqrt(float(own.H));
  for (int64_t q = 0; q < own.count; ++q)
    for (int64_t s = 0; s < span.slots; ++s)
      own.scores[q][s] *= span.key_scale ? span.key_scale[s] * root : root;
  own.weigh(span.start, span.slots);
  if (span.value_scale)
    for (int64_t q = 0; q < own.count; ++q)
      for (int64_t s = 0; s < span.slots; ++s) own.scores[q][s] *= span.value_scale[s];
  int64_t q = 0;
  for (; q + 4 <= own.count; q += 4) add_values<C, 4>(own, q, span.values, next.values, span.slots);
  for (; q < own.count; ++q) add_values<C, 1>(own, q, span.values, next.values, span.slots);
}

}  // namespace pangu
