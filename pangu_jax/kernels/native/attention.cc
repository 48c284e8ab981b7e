// Attention of queries to what is cached of their row: softmax(q k^T / sqrt(H)) v over the slots at or
// before each query's position, with running sums (online softmax, arXiv 1805.02867).
//
// A cache is pages [M, K, Z, H] (a contiguous one is a page for each row); a row's table says which
// are its own. Nothing is copied; slots behind the last query's position are not read.

#include "pool.h"
#include "queries.h"
#include "queries_across.h"
#include "rows.h"

namespace pangu {
namespace {

struct Shape {
  int64_t R, T, K, g, H, M, Z, P;
};

// Keys or values of one layer; int8 has a scale for each slot, or none where they are all 1.
template <class C>
struct Pages {
  const typename C::type* numbers;
  const float* scale;
};

// All that is asked for, in any form of cache.
template <class C>
struct Attention {
  Shape s;
  Input queries;
  Pages<C> keys, values;
  const int32_t *tables, *positions;
  Output out;

  // Of query q of head k of row r, in the order [R, T, K, g].
  int64_t place(int64_t r, int64_t k, int64_t q) const {
    return (((r * s.T + q / s.g) * s.K + k) * s.g + q % s.g) * s.H;
  }

  // Slots from `start` on, which lie side by side.
  Span<C> span(int64_t r, int64_t k, int64_t start, int64_t seen) const {
    const int64_t slot = start % s.Z, slots = std::min({kSlots, s.Z - slot, seen - start});
    const int64_t page = std::clamp<int64_t>(tables[r * s.P + start / s.Z], 0, s.M - 1);
    const int64_t at = (page * s.K + k) * s.Z + slot;
    return {keys.numbers + at * s.H,
            values.numbers + at * s.H,
            keys.scale ? keys.scale + at : nullptr,
            values.scale ? values.scale + at : nullptr,
            start,
            slots};
  }

  // Some queries, by one of their forms.
  template <class Q>
  void tile(int64_t r, int64_t k, int64_t first, int64_t end) const {
    Q own(s.H);
    std::vector<float> query(s.H);
    for (int64_t q = first; q < end; ++q) {
      queries.get(place(r, k, q), s.H, query.data());
      own.add(query.data(), positions + r * s.T + q / s.g);
    }
    const int64_t seen = std::min<int64_t>(own.last_position() + 1, s.P * s.Z);
    for (int64_t start = 0; start < seen;) {
      const Span<C> now = span(r, k, start, seen);
      start += now.slots;
      see(own, now, start < seen ? span(r, k, start, seen) : now);
    }
    for (int64_t q = 0; q < own.count; ++q) {
      const float share = own.share(q);
      constexpr int kNumbers = 16;  // a head has a multiple of them
      for (int64_t h = 0; h < s.H; h += kNumbers)
        out.put(place(r, k, first + q) + h, std::integral_constant<int, kNumbers>(),
                [&](int i) { return own.mixed[q * s.H + h + i] * share; });
    }
  }

  void all(ffi::ThreadPool& pool, bool same_bits) const {
    const int64_t count = s.T * s.g;
    const bool many = count >= kManyQueries && !same_bits;
    const int64_t most = many ? QueriesAcross::kMost : Queries::kMost;
    const int64_t tiles = (count + most - 1) / most;
    each(pool, s.R * s.K * tiles, [&](int64_t i) {
      const int64_t r = i / (s.K * tiles), k = i / tiles % s.K, first = i % tiles * most;
      const int64_t end = std::min(count, first + most);
      if (many && end - first >= kManyQueries) return tile<QueriesAcross>(r, k, first, end);
      tile<Queries>(r, k, first, end);
    });
  }
};

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer queries, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::F32> key_scale,
                     ffi::Buffer<ffi::F32> value_scale, ffi::Buffer<ffi::S32> tables,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> layer,
                     bool same_bits, ffi::Result<ffi::AnyBuffer> mixed) {
  const auto q = queries.dimensions(), held = keys.dimensions();
  const size_t lead = held.size() - 4;
  const Shape s{q[0], q[1], q[2], q[3], q[4], held[lead], held[lead + 2], tables.dimensions()[1]};
  const int64_t slots = (lead ? layer.typed_data()[0] : 0) * held[lead] * s.K * s.Z;
  const auto run = [&](auto kind) {
    using C = decltype(kind);
    const auto of = [&](ffi::AnyBuffer& numbers, ffi::Buffer<ffi::F32>& scale) {
      const auto* data = static_cast<const typename C::type*>(numbers.untyped_data());
      const bool scaled = scale.element_count() > 0;
      return Pages<C>{data + slots * s.H, scaled ? scale.typed_data() + slots : nullptr};
    };
    const Attention<C> asked{s,
                             Input(queries),
                             of(keys, key_scale),
                             of(values, value_scale),
                             tables.typed_data(),
                             positions.typed_data(),
                             Output(*mixed)};
    asked.all(pool, same_bits);
  };
  switch (keys.element_type()) {
    case ffi::F32: run(F32{}); break;
    case ffi::BF16: run(BF16{}); break;
    case ffi::S8: run(I8{}); break;
    default: return ffi::Error::InvalidArgument("no such cache");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pangu

XLA_FFI_DEFINE_HANDLER_SYMBOL(pangu_attention, pangu::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<bool>("same_bits")
                                  .Ret<xla::ffi::AnyBuffer>());
