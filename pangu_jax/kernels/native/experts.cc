// Routed experts: y[n] = sum_k weight[n, k] * down_e(silu(gate_e(x[n])) * up_e(x[n])), e = expert[n, k].
//
// The (token, expert) pairs are put in order of their experts; an expert's matrices are read once, by
// all of its tokens, where they lie, and those of experts that nobody chose are not read at all.

#include "pool.h"
#include "product.h"
#include "rows.h"

namespace pangu {
namespace {

// Multiplications to a piece of work, about (measured).
constexpr int64_t kPiece = 128 << 10;

struct Shape {
  int64_t N, k, E, F, D;
  bool rounds, same_bits;  // whether activations are rounded; deterministic
};

// The pairs of each expert: `token` and `weight` from begin[e] to begin[e + 1].
struct Pairs {
  std::vector<int64_t> begin, token, used;
  std::vector<float> weight;

  Pairs(const Shape& s, const int32_t* experts, const float* weights) : begin(s.E + 1) {
    const int64_t all = s.N * s.k;
    const auto here = [&](int64_t i) { return experts[i] >= 0 && experts[i] < s.E; };
    for (int64_t i = 0; i < all; ++i)
      if (here(i)) ++begin[experts[i] + 1];
    for (int64_t e = 0; e < s.E; ++e) {
      if (begin[e + 1]) used.push_back(e);
      begin[e + 1] += begin[e];
    }
    token.resize(begin[s.E]);
    weight.resize(begin[s.E]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < all; ++i)
      if (here(i)) {
        const int64_t at = next[experts[i]]++;
        token[at] = i / s.k;
        weight[at] = weights[i];
      }
  }
  int64_t count() const { return int64_t(token.size()); }
  int64_t count(int64_t e) const { return begin[e + 1] - begin[e]; }
};

// The rows of all pairs as a kind of matrix wants its factors: float32, bf16, or rounded with a scale
// each; and those of every expert that is used, once all of them are set.
template <class W>
struct Factors {
  int64_t width;
  std::vector<typename W::X> rows;
  std::vector<float> scale;
  std::vector<Rows<W>> of;

  Factors(int64_t count, int64_t width) : width(width), rows(count * width), scale(count, 1.0f) {}
  // Rounded, if asked for, as a matrix of such numbers wants it.
  void set(int64_t at, const float* from, bool rounds) {
    auto* to = rows.data() + at * width;
    if constexpr (std::is_same_v<typename W::Sum, int32_t>) {
      scale[at] = round_row(from, width, to);
    } else if (rounds) {
      scale[at] = round_row_to_fp8(from, width, to);
    } else if constexpr (std::is_same_v<typename W::X, float>) {
      std::copy(from, from + width, to);
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = BF16::rounded(from[i]);
    }
  }
  void divide(ffi::ThreadPool& pool, const Pairs& pairs, bool same_bits) {
    of.reserve(pairs.used.size());
    std::vector<std::pair<int64_t, int64_t>> panels;
    for (const int64_t e : pairs.used) {
      of.emplace_back(rows.data() + pairs.begin[e] * width, pairs.count(e), width, same_bits);
      for (int64_t p = 0; p < of.back().panels(); ++p) panels.emplace_back(of.size() - 1, p);
    }
    each(pool, int64_t(panels.size()), [&](int64_t i) {
      const auto [used, panel] = panels[i];
      of[used].many->fill(panel);
    });
  }
};

// One matrix for each expert, with a scale for each row where `scale` is not null.
template <class W>
struct Matrices {
  decltype(rows_at<W>(nullptr, nullptr, 0)) rows;
  const float* scale;
  float worth(int64_t row) const { return scale ? scale[row] : 1.0f; }
};

Floats silu(Floats x) {
  const Ints negative = x < splat(0.0f);
  const Floats e = exp_of_negative(bits<Floats>(bits<Ints>(x) | INT32_MIN));  // e^-|x|
  const Ints top = (bits<Ints>(e) & negative) | (bits<Ints>(splat(1.0f)) & ~negative);
  return x * bits<Floats>(top) / (e + splat(1.0f));
}

// Of every number; those behind the last whole vector are computed as a vector too.
void silu(float* x, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats y = silu(vector_at<Floats>(x + i));
    std::memcpy(x + i, &y, sizeof y);
  }
  if (i == count) return;
  Floats rest{};
  std::memcpy(&rest, x + i, (count - i) * sizeof(float));
  rest = silu(rest);
  std::memcpy(x + i, &rest, (count - i) * sizeof(float));
}

// Some rows of one expert's matrix.
struct Piece {
  int64_t used, begin, end;  // `used`: the expert's place in Pairs::used
};

// Those of matrices of `outputs` rows each.
template <class W>
std::vector<Piece> pieces(const Factors<W>& x, int64_t outputs, int64_t threads) {
  std::vector<Piece> all;
  for (int64_t i = 0; i < int64_t(x.of.size()); ++i) {
    const int64_t size = x.of[i].piece(outputs, kPiece / x.width / x.of[i].N, threads);
    for (int64_t begin = 0; begin < outputs; begin += size)
      all.push_back({i, begin, std::min(outputs, begin + size)});
  }
  return all;
}

// silu(gate(x)) * up(x) of every pair, [pairs, F].
template <class W>
std::vector<float> inside(ffi::ThreadPool& pool, const Shape& s, const float* x, const Pairs& pairs, const Matrices<W>& gate_up) {
  Factors<W> in(pairs.count(), s.D);
  each(pool, pairs.count(), [&](int64_t p) { in.set(p, x + pairs.token[p] * s.D, s.rounds); });
  in.divide(pool, pairs, s.same_bits);

  std::vector<float> inner(pairs.count() * s.F);
  const auto parts = pieces(in, s.F, pool.num_threads());
  each(pool, int64_t(parts.size()), [&](int64_t i) {
    const Piece part = parts[i];
    const int64_t e = pairs.used[part.used], first = pairs.begin[e], count = pairs.count(e);
    const int64_t gate = e * 2 * s.F, up = gate + s.F;
    const auto value = [&](int64_t n, int64_t row, typename W::Sum sum) {
      return float(sum) * in.scale[first + n] * gate_up.worth(row);
    };
    product<W>(from_row(gate_up.rows, gate, s.D), part.begin, part.end, in.of[part.used],
               [&](int64_t n, int64_t f, const typename W::Sum* sums, auto number) {
                 float* own = &inner[(first + n) * s.F + f];
                 for (int i = 0; i < number; ++i) own[i] = value(n, gate + f + i, sums[i]);
               });
    for (int64_t n = first; n < first + count; ++n)
      silu(inner.data() + n * s.F + part.begin, part.end - part.begin);
    product<W>(from_row(gate_up.rows, up, s.D), part.begin, part.end, in.of[part.used],
               [&](int64_t n, int64_t f, const typename W::Sum* sums, auto number) {
                 float* own = &inner[(first + n) * s.F + f];
                 for (int i = 0; i < number; ++i) own[i] *= value(n, up + f + i, sums[i]);
               });
  });
  return inner;
}

// y [N, D] += weight * down(inner) of every pair.
template <class W>
void outside(ffi::ThreadPool& pool, const Shape& s, const float* inner, const Pairs& pairs, const Matrices<W>& down, float* y) {
  const int64_t P = pairs.count();
  Factors<W> between(P, s.F);
  each(pool, P, [&](int64_t p) { between.set(p, inner + p * s.F, s.rounds); });
  between.divide(pool, pairs, s.same_bits);

  // A piece is some outputs of all tokens: nobody else adds to them.
  int64_t size = 0;
  for (const auto& rows : between.of)
    size = std::max(size, rows.piece(s.D, kPiece / s.F / P, pool.num_threads()));
  each(pool, (s.D + size - 1) / size, [&](int64_t i) {
    const int64_t begin = i * size, end = std::min(s.D, begin + size);
    for (int64_t used = 0; used < int64_t(pairs.used.size()); ++used) {
      const int64_t e = pairs.used[used], first = pairs.begin[e], row = e * s.D;
      product<W>(from_row(down.rows, row, s.F), begin, end, between.of[used],
                 [&](int64_t n, int64_t d, const typename W::Sum* sums, auto number) {
                   const int64_t p = first + n;
                   float* own = &y[pairs.token[p] * s.D + d];
                   for (int i = 0; i < number; ++i) {
                     const float value = float(sums[i]) * between.scale[p] * down.worth(row + d + i);
                     own[i] += pairs.weight[p] * value;
                   }
                 });
    }
  });
}

ffi::Error experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> chosen,
                   ffi::Buffer<ffi::F32> weights, ffi::AnyBuffer gate_up,
                   ffi::Buffer<ffi::F32> gate_up_scale, ffi::AnyBuffer down,
                   ffi::Buffer<ffi::F32> down_scale, ffi::Buffer<ffi::S32> layer, bool rounds,
                   bool same_bits, ffi::Result<ffi::AnyBuffer> result) {
  const auto shape = gate_up.dimensions();  // [(L,) E, 2, F, D]
  const size_t lead = shape.size() - 4;
  const Shape s{chosen.dimensions()[0], chosen.dimensions()[1], shape[lead], shape[lead + 2],
                x.dimensions()[1], rounds, same_bits};
  const int64_t own = lead ? layer.typed_data()[0] : 0;
  const Pairs pairs(s, chosen.typed_data(), weights.typed_data());
  std::vector<float> copy, y(s.N * s.D);
  const float* floats = floats_of(x, copy);

  const bool half = x.element_type() == ffi::BF16;
  const auto run = [&](auto kind) {
    using W = decltype(kind);
    const auto of = [&](ffi::AnyBuffer& numbers, ffi::Buffer<ffi::F32>& scale, int64_t rows,
                        int64_t width) {
      const int64_t start = own * s.E * rows, scales = scale.dimensions().back();
      const float* worth = scale.element_count() ? scale.typed_data() : nullptr;
      const auto all = rows_at<W>(numbers.untyped_data(), worth, width / std::max<int64_t>(1, scales));
      const bool each = worth && !W::kGrouped;
      return Matrices<W>{from_row(all, start, width), each ? worth + start : nullptr};
    };
    const auto inner = inside(pool, s, floats, pairs, of(gate_up, gate_up_scale, 2 * s.F, s.D));
    outside(pool, s, inner.data(), pairs, of(down, down_scale, s.D, s.F), y.data());
  };
  if (pairs.count()) {
    switch (down.element_type()) {
      case ffi::F32: run(F32{}); break;
      case ffi::BF16: run(BF16xBF16{}); break;
      case ffi::S8:
        if (rounds) run(I8xI8{});
        else half ? run(I8xBF16{}) : run(I8{});
        break;
      case ffi::F8E4M3FN: half || rounds ? run(F8xBF16{}) : run(F8{}); break;
      case ffi::U8: half ? run(I4xBF16{}) : run(I4{}); break;
      default: return ffi::Error::InvalidArgument("no such matrix");
    }
  }
  const Output out(*result);
  for (size_t i = 0; i < y.size(); ++i) out.put(i, y[i]);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pangu

XLA_FFI_DEFINE_HANDLER_SYMBOL(pangu_experts, pangu::experts,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<bool>("rounds")
                                  .Attr<bool>("same_bits")
                                  .Ret<xla::ffi::AnyBuffer>());
