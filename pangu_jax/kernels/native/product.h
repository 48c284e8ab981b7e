// x @ w^T, rows of x and of w a few at a time; of many rows of x that of across.h.
//
// Every result is one chain of sums along D, in the same order whatever the number of threads. Where
// the same bits are wanted the order of few rows is that of any number: what a row gets does not depend
// on what else is computed then.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "across.h"
#include "elements.h"

namespace pangu {

// Rows of w, and of x, whose products are summed at a time: all sums stay in registers.
constexpr int kTileW = 4;
constexpr int kTileX = 3;

// Bytes of x that are multiplied with all of a piece of w before the next ones: they stay in cache.
constexpr int64_t kPanel = 128 << 10;

// Rows of x from which they are many; and from which rows of w are unpacked once for all of them, which
// makes them many too, of a kind that is not multiplied as it lies (measured).
constexpr int64_t kMany = 16;
constexpr int64_t kManyToUnpack = 25;

// Rows of w to a piece of work at most, where those of x are many: they are read again for every panel,
// from the second cache (measured). And pieces for a thread, where there are rows enough (own choice).
constexpr int64_t kStay = 64;
constexpr int64_t kPieces = 4;

// The sums of one row of w.
template <class W>
using Sums = typename W::Sum[kTileX];

// kAhead: the rows of w that come next are asked for while these are multiplied. The processor's own
// prefetching begins anew with every row, and a row is short.
template <class W, int RW, int RX, bool kAhead>
__attribute__((noinline)) void tile(const typename W::type* w, const typename W::X* x, int64_t D,
                                    Sums<W>* sums) {
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

// The same of int4, whose groups are whole vectors.
template <class W, int RW, int RX, bool kAhead>
__attribute__((noinline)) void tile(const Int4Rows& w, const typename W::X* x, int64_t D,
                                    Sums<W>* sums) {
  const int64_t width = D / 2, groups = D / w.group;
  typename W::Lanes acc[RW][RX];
  for (int i = 0; i < RW; ++i)
    for (int j = 0; j < RX; ++j) acc[i][j] = typename W::Lanes{};
  for (int64_t g = 0; g < groups; ++g) {
    typename W::Table table[RW];
    for (int i = 0; i < RW; ++i) table[i] = W::table(w.scale[i * groups + g]);
    const uint8_t* own = w.numbers + g * w.group / 2;
    if constexpr (kAhead)
      for (int i = 0; i < RW; ++i)
        for (int64_t b = 0; b < w.group / 2; b += 64)
          __builtin_prefetch(own + (RW + i) * width + b, 0, 2);
    for (int64_t d = 0; d < w.group; d += W::kStep) {
      decltype(W::factor(x)) factor[RX];
      for (int j = 0; j < RX; ++j) factor[j] = W::factor(x + j * D + g * w.group + d);
      for (int i = 0; i < RW; ++i) {
        const auto v = W::load(own + i * width + d / 2, table[i]);
        for (int j = 0; j < RX; ++j) acc[i][j] = W::add(acc[i][j], v, factor[j]);
      }
    }
  }
  for (int i = 0; i < RW; ++i)
    for (int j = 0; j < RX; ++j) sums[i][j] = W::all(acc[i][j]);
}

template <class W, int RW, bool kAhead, class Matrix>
inline void tile_of(int rx, const Matrix& w, const typename W::X* x, int64_t D,
                    Sums<W>* sums) {
  static_assert(kTileX == 3);
  if (rx == 1) return tile<W, RW, 1, kAhead>(w, x, D, sums);
  if (rx == 2) return tile<W, RW, 2, kAhead>(w, x, D, sums);
  tile<W, RW, 3, kAhead>(w, x, D, sums);
}

// `count` rows of w as the kind that they are unpacked to.
template <class W, class To>
inline void unpack(const typename W::type* w, int64_t count, int64_t D, To* to) {
  for (int64_t i = 0; i < count * D; ++i) to[i] = W::unpacked(w[i]);
}

template <class W, class To>
inline void unpack(const Int4Rows& w, int64_t count, int64_t D, To* to) {
  const bool whole = w.group % W::kStep == 0;
  for (int64_t g = 0; g < count * (D / w.group); ++g) {
    const uint8_t* from = w.numbers + g * w.group / 2;
    const auto table = W::table(w.scale[g]);
    int64_t d = 0;
    for (; whole && d < w.group; d += W::kStep)
      W::store(W::load(from + d / 2, table), to + g * w.group + d);
    for (; d < w.group; ++d) to[g * w.group + d] = W::unpacked(I4::number(from, d), w.scale[g]);
  }
}

// Whether so many rows of x meet w as it lies, and not unpacked.
template <class T>
inline bool as_it_lies(const T*, int64_t N, int) {
  return N < kManyToUnpack;
}
inline bool as_it_lies(const Int4Rows& w, int64_t N, int step) {
  return N < kManyToUnpack && w.group % step == 0;
}

using One = std::integral_constant<int, 1>;

// put(n, e + i, &sum, 1) for rows first <= n < last of x and the first rw rows of w.
template <class W, bool kAhead, class Matrix, class Put>
inline void stripe(const Matrix& w, int64_t e, int rw, const typename W::X* x, int64_t first,
                   int64_t last, int64_t D, const Put& put) {
  Sums<W> sums[kTileW];
  for (int64_t n = first; n < last; n += kTileX) {
    const int rx = int(std::min<int64_t>(kTileX, last - n));
    if (rw == kTileW && kAhead && n == 0) {
      tile_of<W, kTileW, true>(rx, w, x + n * D, D, sums);
    } else if (rw == kTileW) {
      tile_of<W, kTileW, false>(rx, w, x + n * D, D, sums);
    } else {
      for (int i = 0; i < rw; ++i)
        tile_of<W, 1, false>(rx, from_row(w, i, D), x + n * D, D, sums + i);
    }
    for (int i = 0; i < rw; ++i)
      for (int j = 0; j < rx; ++j) put(n + j, e + i, &sums[i][j], One());
  }
}

// The rows that a matrix of kind W meets, x [N, D]; where they are many, they must be filled into the
// panels before.
template <class W>
struct Rows {
  using Side = Panels<Many<W>>;
  const typename W::X* x;
  int64_t N, D;
  std::optional<Side> many;

  Rows(const typename W::X* x, int64_t N, int64_t D, bool same_bits) : x(x), N(N), D(D) {
    const bool unpacks = !std::is_same_v<W, Many<W>>;
    if (!same_bits && N >= (unpacks ? kManyToUnpack : kMany)) many.emplace(x, N, D);
  }
  int64_t panels() const { return many ? many->count() : 0; }

  // How many of `count` rows of w are a piece of work; about `few` where rows of x are few.
  int64_t piece(int64_t count, int64_t few, int64_t threads) const {
    if (!many) return std::max<int64_t>(4, few / kTileW) * kTileW;
    const int64_t rows = std::min(kStay, count / (kPieces * threads));
    return std::max<int64_t>(1, rows / kAcrossW) * kAcrossW;
  }
};

// The same of all rows of x and rows begin <= e < end of w, rows of x being few.
template <class W, class Matrix, class Put>
inline void product_of_few(const Matrix& w, int64_t begin, int64_t end, const Rows<W>& x,
                           const Put& put) {
  using U = typename W::Unpacked;
  const int64_t N = x.N, D = x.D, width = D * int64_t(sizeof(typename W::X));
  const int64_t panel = std::max<int64_t>(1, kPanel / width / kTileX) * kTileX;
  const bool in_place = std::is_same_v<W, U> || as_it_lies(w, N, W::kStep);
  std::vector<typename U::type> room(in_place ? 0 : kTileW * D);
  for (int64_t first = 0; first < N; first += panel) {
    const int64_t last = std::min(N, first + panel);
    for (int64_t e = begin; e < end; e += kTileW) {
      const int rw = int(std::min<int64_t>(kTileW, end - e));
      const auto own = from_row(w, e, D);
      if (in_place) {
        stripe<W, true>(own, e, rw, x.x, first, last, D, put);
      } else if constexpr (!std::is_same_v<W, U>) {
        unpack<W>(own, rw, D, room.data());
        const typename U::type* rows = room.data();
        stripe<U, false>(rows, e, rw, x.x, first, last, D, put);
      }
    }
  }
}

// put(n, e, sums, number) for all rows n < N of x and rows begin <= e < end of w: `number`, a constant
// of the type, says for how many rows of w from e on.
template <class W, class Matrix, class Put>
inline void product(const Matrix& w, int64_t begin, int64_t end, const Rows<W>& x, const Put& put) {
  if (!x.many) return product_of_few<W>(w, begin, end, x, put);
  const int64_t D = x.D, count = end - begin;
  if constexpr (std::is_same_v<W, Many<W>>) {
    product_across<W>(w + begin * D, begin, count, *x.many, D, put);
  } else {
    const std::unique_ptr<typename Many<W>::type[]> room(new typename Many<W>::type[count * D]);
    unpack<W>(from_row(w, begin, D), count, D, room.get());
    product_across<Many<W>>(room.get(), begin, count, *x.many, D, put);
  }
}

}  // namespace pangu
