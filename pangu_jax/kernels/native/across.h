// x @ w^T of many rows of x: a number of w meets a vector of numbers, each of another row.
//
// The rows stand side by side in panels, 32 bits of each at a time (one float32, two bf16 or int16,
// four int8). Nothing is added up within a vector, and w need not be packed. A result is one chain of
// sums along D, in another order than that of product.h: of floats the last bits may differ.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "elements.h"

namespace pangu {

// Rows of w, and vectors of rows of x, whose products are summed at a time: all sums stay in registers.
constexpr int kAcrossW = kLanes == 16 ? 8 : 6;
constexpr int kVectors = kLanes == 16 ? 3 : 2;

// Rows x [N, D] side by side, in panels of up to kVectors vectors; behind the last one are zeros. A
// panel holds nothing until it is filled.
template <class U>
class Panels {
 public:
  Panels(const typename U::X* x, int64_t N, int64_t D)
      : x_(x),
        N_(N),
        D_(D),
        units_(new uint32_t[vectors() * kLanes * height()]),
        start_(vectors() * kLanes) {}

  int64_t count() const { return (vectors() + kVectors - 1) / kVectors; }
  int vectors(int64_t panel) const { return int(begin(panel + 1) - begin(panel)); }
  int64_t first_row(int64_t panel) const { return begin(panel) * kLanes; }
  int64_t rows(int64_t panel) const {
    return std::min<int64_t>(vectors(panel) * kLanes, N_ - first_row(panel));
  }
  // [height, vectors(panel) * kLanes]
  const uint32_t* units(int64_t panel) const { return &units_[first_row(panel) * height()]; }
  const typename U::Sum* start(int64_t panel) const { return &start_[first_row(panel)]; }

  void fill(int64_t panel) {
    const int64_t first = first_row(panel), width = vectors(panel) * kLanes, whole = D_ / U::kPack;
    const int64_t own = rows(panel);
    uint32_t* to = &units_[first * height()];
    // Some units of every row at a time: they, and where they go to, stay in the first cache.
    constexpr int64_t kBlock = 64;
    for (int64_t d = 0; d < whole; d += kBlock)
      for (int64_t n = 0; n < own; ++n)
        for (int64_t i = d; i < std::min(whole, d + kBlock); ++i)
          to[i * width + n] = U::unit(x_ + (first + n) * D_ + i * U::kPack);
    for (int64_t d = 0; own < width && d < height(); ++d)
      std::fill(to + d * width + own, to + (d + 1) * width, 0);
    for (int64_t n = 0; n < own; ++n) {
      const auto* row = x_ + (first + n) * D_;
      start_[first + n] = U::start(row, D_);
      if (whole < height()) {
        typename U::X rest[U::kPack] = {};
        std::copy(row + whole * U::kPack, row + D_, rest);
        to[whole * width + n] = U::unit(rest);
      }
    }
  }

 private:
  int64_t vectors() const { return (N_ + kLanes - 1) / kLanes; }
  int64_t begin(int64_t panel) const { return vectors() * panel / count(); }
  int64_t height() const { return (D_ + U::kPack - 1) / U::kPack; }

  const typename U::X* x_;
  int64_t N_, D_;
  std::unique_ptr<uint32_t[]> units_;  // not zeros first, as a vector's would be
  std::vector<typename U::Sum> start_;
};

// sums [RW, NV * kLanes] of RW rows of w and a panel of NV vectors. kAhead: the rows of w that come next
// are asked for meanwhile.
template <class U, int RW, int NV, bool kAhead>
__attribute__((noinline)) void tile_across(const typename U::type* w, int64_t D,
                                           const uint32_t* units, const typename U::Sum* start,
                                           typename U::Sum* sums) {
  using Across = typename U::Across;
  static_assert(sizeof(Across) == kLanes * sizeof(typename U::Sum));
  Across acc[RW][NV];
  for (int i = 0; i < RW; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = vector_at<Across>(start + v * kLanes);
  const auto step = [&](const typename U::type* own, int64_t next) __attribute__((always_inline)) {
    Across x[NV];
    for (int v = 0; v < NV; ++v) x[v] = vector_at<Across>(units + v * kLanes);
    for (int i = 0; i < RW; ++i) {
      const Across number = U::everywhere(own + i * next);
      for (int v = 0; v < NV; ++v) acc[i][v] = U::add_across(acc[i][v], number, x[v]);
    }
    units += NV * kLanes;
  };
  constexpr int kLine = 64 / sizeof(typename U::type);
  int64_t d = 0;
  for (; d + kLine <= D; d += kLine) {
    if constexpr (kAhead)
      for (int i = 0; i < RW; ++i) __builtin_prefetch(w + (RW + i) * D + d, 0, 2);
    for (int u = 0; u < kLine; u += U::kPack) step(w + d + u, D);
  }
  for (; d + U::kPack <= D; d += U::kPack) step(w + d, D);
  if (d < D) {
    typename U::type rest[RW][U::kPack] = {};
    for (int i = 0; i < RW; ++i) std::copy(w + i * D + d, w + (i + 1) * D, rest[i]);
    step(rest[0], U::kPack);
  }
  for (int i = 0; i < RW; ++i)
    for (int v = 0; v < NV; ++v)
      std::memcpy(sums + (i * NV + v) * kLanes, &acc[i][v], sizeof acc[i][v]);
}

template <class U, int RW, bool kAhead>
inline void tile_across(int vectors, const typename U::type* w, int64_t D, const uint32_t* units,
                        const typename U::Sum* start, typename U::Sum* sums) {
  static_assert(kVectors == 2 || kVectors == 3);
  if (vectors == 1) return tile_across<U, RW, 1, kAhead>(w, D, units, start, sums);
  if (vectors == 2) return tile_across<U, RW, 2, kAhead>(w, D, units, start, sums);
  if constexpr (kVectors == 3) tile_across<U, RW, 3, kAhead>(w, D, units, start, sums);
}

// put(n, e, sums, RW) of RW rows of w, the first of which is row e, and every row n of a panel.
template <class U, int RW, bool kAhead, class Put>
inline void stripe_across(const typename U::type* w, int64_t e, const Panels<U>& x, int64_t panel,
                          int64_t D, const Put& put) {
  alignas(64) typename U::Sum sums[RW * kVectors * kLanes];
  const int vectors = x.vectors(panel);
  tile_across<U, RW, kAhead>(vectors, w, D, x.units(panel), x.start(panel), sums);
  const int64_t first = x.first_row(panel), rows = x.rows(panel);
  for (int64_t n = 0; n < rows; ++n) {
    typename U::Sum own[RW];
    for (int i = 0; i < RW; ++i) own[i] = sums[i * vectors * kLanes + n];
    put(first + n, e, own, std::integral_constant<int, RW>());
  }
}

// put(n, e, sums, number) of all rows n of x and `count` rows of w, the first of which is row e; a
// number of them at a time.
template <class U, class Put>
inline void product_across(const typename U::type* w, int64_t e, int64_t count, const Panels<U>& x,
                           int64_t D, const Put& put) {
  for (int64_t panel = 0; panel < x.count(); ++panel) {
    int64_t i = 0;
    for (; i + kAcrossW <= count; i += kAcrossW) {
      if (panel == 0) {
        stripe_across<U, kAcrossW, true>(w + i * D, e + i, x, panel, D, put);
      } else {
        stripe_across<U, kAcrossW, false>(w + i * D, e + i, x, panel, D, put);
      }
    }
    for (; i < count; ++i) stripe_across<U, 1, false>(w + i * D, e + i, x, panel, D, put);
  }
}

}  // namespace pangu
