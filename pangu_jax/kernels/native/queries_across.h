// Attention of many queries that share a head to consecutive slots: a number of a key meets a vector
// of numbers, each of another query; nothing is added up, or compared, within a vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "queries.h"

namespace pangu {

// Queries from which they are many (measured).
constexpr int64_t kManyQueries = 16;

// The queries of two vectors.
struct QueriesAcross {
  static constexpr int kVectors = 2;
  static constexpr int64_t kMost = kVectors * kLanes;
  static constexpr int kKeys = kLanes == 16 ? 8 : 6;  // at a time: all sums stay in registers

  int64_t count = 0, H;
  std::vector<float> rows, mixed, room;  // [H, kMost], [kMost, H], [kSlots, H]
  alignas(64) int32_t positions[kMost];
  alignas(64) float highest[kMost], sum[kMost], before[kMost];
  alignas(64) float scores[kSlots + kKeys][kMost];

  explicit QueriesAcross(int64_t width)
      : H(width), rows(width * kMost), mixed(kMost * width), room(kSlots * width) {
    std::fill_n(positions, kMost, -1);
    std::fill_n(highest, kMost, kHidden);
    std::fill_n(sum, kMost, 0.0f);
  }

  void add(const float* query, const int32_t* position) {
    for (int64_t h = 0; h < H; ++h) rows[h * kMost + count] = query[h];
    positions[count++] = *position;
  }

  int32_t last_position() const { return *std::max_element(positions, positions + kMost); }

  // What mixed[q] is to be multiplied with in the end.
  float share(int64_t q) const { return sum[q] > 0 ? 1.0f / sum[q] : 0.0f; }

  // Keys or values as float32, where they lie or in `room`.
  template <class C>
  const float* floats(const typename C::type* numbers, int64_t slots) {
    if constexpr (std::is_same_v<typename C::type, float>) {
      return numbers;
    } else {
      for (int64_t i = 0; i < slots * H; i += kLanes) {
        const Floats wide = C::load(numbers + i);
        std::memcpy(&room[i], &wide, sizeof wide);
      }
      return room.data();
    }
  }

  // scores[s] = rows @ key s of all queries
  void multiply(const float* keys, int64_t slots) {
    for (int64_t s = 0; s < slots; s += kKeys) {
      const float* key[kKeys];  // the last one again behind the end
      for (int i = 0; i < kKeys; ++i) key[i] = keys + std::min(s + i, slots - 1) * H;
      Floats acc[kKeys][kVectors] = {};
      for (int64_t h = 0; h < H; ++h) {
        Floats query[kVectors];
        for (int v = 0; v < kVectors; ++v)
          query[v] = vector_at<Floats>(&rows[h * kMost + v * kLanes]);
        for (int i = 0; i < kKeys; ++i) {
          const Floats number = splat(key[i][h]);
          for (int v = 0; v < kVectors; ++v) acc[i][v] = fused(number, query[v], acc[i][v]);
        }
      }
      for (int i = 0; i < kKeys; ++i)
        for (int v = 0; v < kVectors; ++v)
          std::memcpy(&scores[s + i][v * kLanes], &acc[i][v], sizeof acc[i][v]);
    }
  }

  // Scores to weights, times the scales of keys before and of values after; and what was summed
  // `before` is worth now.
  template <class C>
  void weigh(const Span<C>& span) {
    const float root = 1.0f / std::sqrt(float(H));
    for (int64_t at = 0; at < kMost; at += kLanes) {
      const Ints position = vector_at<Ints>(positions + at);
      const Floats old = vector_at<Floats>(highest + at);
      Floats high = old, added{};
      for (int64_t s = 0; s < span.slots; ++s) {
        const float worth = span.key_scale ? span.key_scale[s] * root : root;
        const Ints seen = position >= Ints{} + int32_t(span.start + s);
        const Floats score = vector_at<Floats>(scores[s] + at) * splat(worth);
        const Floats shown = seen ? score : splat(kHidden);
        high = shown > high ? shown : high;
        std::memcpy(scores[s] + at, &shown, sizeof shown);
      }
      for (int64_t s = 0; s < span.slots; ++s) {
        const Ints seen = position >= Ints{} + int32_t(span.start + s);
        Floats weight = exp_of_negative(vector_at<Floats>(scores[s] + at) - high);
        weight = seen ? weight : Floats{};
        added += weight;
        if (span.value_scale) weight *= splat(span.value_scale[s]);
        std::memcpy(scores[s] + at, &weight, sizeof weight);
      }
      const Floats worth = exp_of_negative(old - high);
      const Floats all = fused(vector_at<Floats>(sum + at), worth, added);
      std::memcpy(before + at, &worth, sizeof worth);
      std::memcpy(sum + at, &all, sizeof all);
      std::memcpy(highest + at, &high, sizeof high);
    }
  }

  // mixed[q] = mixed[q] * before[q] + scores[:, q] @ values for RQ queries and RH vectors of theirs
  template <int RQ, int RH>
  void add_values(int64_t q, int64_t h, const float* values, int64_t slots) {
    Floats acc[RQ][RH];
    float* own = mixed.data() + q * H + h;
    for (int i = 0; i < RQ; ++i)
      for (int j = 0; j < RH; ++j)
        acc[i][j] = vector_at<Floats>(own + i * H + j * kLanes) * splat(before[q + i]);
    for (int64_t s = 0; s < slots; ++s) {
      Floats value[RH];
      for (int j = 0; j < RH; ++j) {
        value[j] = vector_at<Floats>(values + s * H + h + j * kLanes);
        hold(value[j]);
      }
      for (int i = 0; i < RQ; ++i) {
        const Floats weight = splat(scores[s][q + i]);
        for (int j = 0; j < RH; ++j) acc[i][j] = fused(weight, value[j], acc[i][j]);
      }
    }
    for (int i = 0; i < RQ; ++i)
      for (int j = 0; j < RH; ++j)
        std::memcpy(own + i * H + j * kLanes, &acc[i][j], sizeof acc[i][j]);
  }

  void add_values(const float* values, int64_t slots) {
    constexpr int kQ = 4, kH = kLanes == 16 ? 4 : 2;
    static_assert(kMost % kQ == 0);
    for (int64_t q = 0; q < count; q += kQ) {
      int64_t h = 0;
      for (; h + kH * kLanes <= H; h += kH * kLanes) add_values<kQ, kH>(q, h, values, slots);
      for (; h < H; h += kLanes) add_values<kQ, 1>(q, h, values, slots);
    }
  }
};

template <class C>
void see(QueriesAcross& own, const Span<C>& span, const Span<C>&) {
  own.multiply(own.floats<C>(span.keys, span.slots), span.slots);
  own.weigh(span);
  own.add_values(own.floats<C>(span.values, span.slots), span.slots);
}

}  // namespace pangu
