// x @ w^T, rows of x and of w a few at a time: the inner loops.
//
// Every result is one chain of sums along D, in the same order whatever the number of rows or
// threads: what a row gets does not depend on what else is computed.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "elements.h"

namespace pangu {

// Rows of w, and of x, whose products are summed at a time: all sums stay in registers.
constexpr int kTileW = 4;
constexpr int kTileX = 3;

// kAhead: the rows of w that come next are asked for while these are multiplied. The processor's own
// prefetching begins anew with every row, and a row is short.
template <class W, int RW, int RX, bool kAhead>
__attribute__((noinline)) void tile(const typename W::type* w, const typename W::X* x, int64_t D,
                 typename W::Sum (*sums)[kTileX]) {
  constexpr int kLine = 64 / sizeof(typename W::type);
  typename W::Lanes acc[RW][RX];
  for (int i = 0; i < RW; ++i)
    for (int j = 0; j < RX; ++j) acc[i][j] = typename W::Lanes{};
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    decltype(W::factor(x)) own[RX];
    for (int j = 0; j < RX; ++j) own[j] = W::factor(x + j * D + d);
    for (int i = 0; i < RW; ++i) {
      const auto v = W::load(w + i * D + d);
      for (int j = 0; j < RX; ++j) acc[i][j] = W::add(acc[i][j], v, own[j]);
    }
  };
  int64_t d = 0;
  for (; d + kLine <= D; d += kLine) {
    if constexpr (kAhead)
      for (int i = 0; i < RW; ++i) __builtin_prefetch(w + (RW + i) * D + d, 0, 2);
    for (int s = 0; s < kLine; s += W::kStep) step(d + s);
  }
  for (; d + W::kStep <= D; d += W::kStep) step(d);
  for (int i = 0; i < RW; ++i)
    for (int j = 0; j < RX; ++j) {
      typename W::Sum sum = W::all(acc[i][j]);
      for (int64_t e = d; e < D; ++e)
        sum = W::add_one(sum, W::one(w[i * D + e]), W::one_factor(x[j * D + e]));
      sums[i][j] = sum;
    }
}

template <class W, int RW, bool kAhead>
inline void tile_of(int rx, const typename W::type* w, const typename W::X* x, int64_t D,
                    typename W::Sum (*sums)[kTileX]) {
  static_assert(kTileX == 3);
  if (rx == 1) return tile<W, RW, 1, kAhead>(w, x, D, sums);
  if (rx == 2) return tile<W, RW, 2, kAhead>(w, x, D, sums);
  tile<W, RW, 3, kAhead>(w, x, D, sums);
}

// Bytes of x that are multiplied with all of a piece of w before the next ones: they stay in cache.
constexpr int64_t kPanel = 128 << 10;

// Rows of x from which rows of w are unpacked once for all of them.
constexpr int64_t kMany = 2 * kTileX + 1;

// Some rows of w, at most kTileW, as a product reads them: where they lie, or unpacked.
template <class W>
class Rows {
 public:
  using U = typename W::Unpacked;
  explicit Rows(int64_t D) : D_(D), room_(std::is_same_v<W, U> ? 0 : kTileW * D) {}
  const typename U::type* unpacked(const typename W::type* w, int64_t count) {
    if constexpr (std::is_same_v<W, U>) {
      return w;
    } else {
      for (int64_t i = 0; i < count * D_; ++i) room_[i] = W::unpacked(w[i]);
      return room_.data();
    }
  }

 private:
  int64_t D_;
  std::vector<typename U::type> room_;
};

// put(n, e + i, sum) for rows first <= n < last of x and the rw rows of w at `own`.
template <class W, bool kAhead, class Put>
inline void stripe(const typename W::type* own, int64_t e, int rw, const typename W::X* x,
                   int64_t first, int64_t last, int64_t D, const Put& put) {
  typename W::Sum sums[kTileW][kTileX];
  for (int64_t n = first; n < last; n += kTileX) {
    const int rx = int(std::min<int64_t>(kTileX, last - n));
    if (rw == kTileW && kAhead && n == 0) {
      tile_of<W, kTileW, true>(rx, own, x + n * D, D, sums);
    } else if (rw == kTileW) {
      tile_of<W, kTileW, false>(rx, own, x + n * D, D, sums);
    } else {
      for (int i = 0; i < rw; ++i) tile_of<W, 1, false>(rx, own + i * D, x + n * D, D, sums + i);
    }
    for (int i = 0; i < rw; ++i)
      for (int j = 0; j < rx; ++j) put(n + j, e + i, sums[i][j]);
  }
}

// put(n, e, sum) for all rows n < N of x and rows begin <= e < end of w.
template <class W, class Put>
inline void product(const typename W::type* w, int64_t begin, int64_t end, const typename W::X* x,
                    int64_t N, int64_t D, const Put& put) {
  using U = typename W::Unpacked;
  const int64_t width = D * int64_t(sizeof(typename W::X));
  const int64_t panel = std::max<int64_t>(1, kPanel / width / kTileX) * kTileX;
  const bool many = N >= kMany;
  Rows<W> rows(many ? D : 0);
  for (int64_t first = 0; first < N; first += panel) {
    const int64_t last = std::min(N, first + panel);
    for (int64_t e = begin; e < end; e += kTileW) {
      const int rw = int(std::min<int64_t>(kTileW, end - e));
      const auto* own = w + e * D;
      if (many) {
        constexpr bool in_place = std::is_same_v<W, U>;
        stripe<U, in_place>(rows.unpacked(own, rw), e, rw, x, first, last, D, put);
      } else {
        stripe<W, true>(own, e, rw, x, first, last, D, put);
      }
    }
  }
}

}  // namespace pangu
