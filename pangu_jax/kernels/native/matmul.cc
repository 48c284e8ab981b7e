// y [N, E] = x [N, D] @ w [E, D]^T, times a scale for each row of w where there are scales; of int4
// (uint8 [E, D / 2]) the scales are of groups of its inputs.

#include "pool.h"
#include "product.h"
#include "rows.h"

namespace pangu {
namespace {

// Bytes of w to a piece of work, times rows of x; and multiplications below which one thread is
// quicker (measured).
constexpr int64_t kPiece = 128 << 10;
constexpr int64_t kAlone = 64 << 10;

// Rows of x to a piece of rounding them (own choice).
constexpr int64_t kRows = 16;

struct Shape {
  int64_t N, E, D;
};

// width: bytes of a row of w
template <class W, class Matrix, class Put>
void multiply(ffi::ThreadPool& pool, const Shape& s, const Matrix& matrix, int64_t width,
              const typename W::X* numbers, bool same_bits, const Put& put) {
  Rows<W> x(numbers, s.N, s.D, same_bits);
  if (s.N * s.E * s.D < kAlone) {
    for (int64_t panel = 0; panel < x.panels(); ++panel) x.many->fill(panel);
    return product<W>(matrix, 0, s.E, x, put);
  }
  each(pool, x.panels(), [&](int64_t panel) { x.many->fill(panel); });
  const int64_t size = x.piece(s.E, kPiece / width / s.N, pool.num_threads());
  each(pool, (s.E + size - 1) / size, [&](int64_t i) {
    product<W>(matrix, i * size, std::min(s.E, (i + 1) * size), x, put);
  });
}

// What is asked for of any kind; `worth` is a scale of each row of w.
struct Product {
  ffi::ThreadPool pool;
  ffi::AnyBuffer x, w;
  const float* worth;
  int64_t group;
  bool same_bits;
  Output out;

  Shape shape() const { return {x.dimensions()[0], w.dimensions()[0], x.dimensions()[1]}; }
  int64_t width() const { return int64_t(w.size_bytes()) / w.dimensions()[0]; }

  // Of x as it is.
  template <class W>
  void plain(bool scaled) {
    const Shape s = shape();
    std::vector<typename W::X> copy;
    const auto matrix = rows_at<W>(w.untyped_data(), worth, group);
    multiply<W>(pool, s, matrix, width(), rows_of(x, copy), same_bits,
                [&](int64_t n, int64_t e, const float* sums, auto number) {
                  out.put(n * s.E + e, number,
                          [&](int i) { return scaled ? sums[i] * worth[e + i] : sums[i]; });
                });
  }

  // Of x rounded, row by row: round(row, D, numbers) tells its scale.
  template <class W, class Round>
  void rounded(const Round& round) {
    const Shape s = shape();
    std::vector<float> copy, scales(s.N);
    const float* floats = floats_of(x, copy);
    std::vector<typename W::X> numbers(s.N * s.D);
    each(pool, (s.N + kRows - 1) / kRows, [&](int64_t i) {
      for (int64_t n = i * kRows; n < std::min(s.N, (i + 1) * kRows); ++n)
        scales[n] = round(floats + n * s.D, s.D, numbers.data() + n * s.D);
    });
    const auto* matrix = static_cast<const typename W::type*>(w.untyped_data());
    multiply<W>(pool, s, matrix, width(), numbers.data(), same_bits,
                [&](int64_t n, int64_t e, const typename W::Sum* sums, auto number) {
                  out.put(n * s.E + e, number,
                          [&](int i) { return float(sums[i]) * scales[n] * worth[e + i]; });
                });
  }
};

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                  ffi::Buffer<ffi::F32> scale, bool rounds, bool same_bits,
                  ffi::Result<ffi::AnyBuffer> y) {
  const int64_t group = x.dimensions()[1] / std::max<int64_t>(1, scale.dimensions().back());
  Product asked{pool, x, w, scale.typed_data(), group, same_bits, Output(*y)};
  const bool half = x.element_type() == ffi::BF16;
  switch (w.element_type()) {
    case ffi::F32: asked.plain<F32>(false); break;
    case ffi::BF16: asked.plain<BF16xBF16>(false); break;
    case ffi::S8:
      if (rounds) asked.rounded<I8xI8>(round_row);
      else half ? asked.plain<I8xBF16>(true) : asked.plain<I8>(true);
      break;
    case ffi::F8E4M3FN:
      if (rounds) asked.rounded<F8xBF16>(round_row_to_fp8<F8xBF16::X>);
      else half ? asked.plain<F8xBF16>(true) : asked.plain<F8>(true);
      break;
    case ffi::U8: half ? asked.plain<I4xBF16>(false) : asked.plain<I4>(false); break;
    default: return ffi::Error::InvalidArgument("no such matrix");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pangu

XLA_FFI_DEFINE_HANDLER_SYMBOL(pangu_matmul, pangu::matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("rounds")
                                  .Attr<bool>("same_bits")
                                  .Ret<xla::ffi::AnyBuffer>());
