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

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                  ffi::Buffer<ffi::F32> scale, bool integers, bool same_bits,
                  ffi::Result<ffi::AnyBuffer> y) {
  const Shape s{x.dimensions()[0], w.dimensions()[0], x.dimensions()[1]};
  const Output out(*y);
  const float* worth = scale.typed_data();
  const int64_t width = int64_t(w.size_bytes()) / s.E;
  const int64_t group = s.D / std::max<int64_t>(1, scale.dimensions().back());
  if (integers) {
    std::vector<float> copy;
    const float* floats = floats_of(x, copy);
    std::vector<int16_t> numbers(s.N * s.D);
    std::vector<float> scales(s.N);
    each(pool, (s.N + kRows - 1) / kRows, [&](int64_t i) {
      for (int64_t n = i * kRows; n < std::min(s.N, (i + 1) * kRows); ++n)
        scales[n] = round_row(floats + n * s.D, s.D, numbers.data() + n * s.D);
    });
    const auto* rows = static_cast<const int8_t*>(w.untyped_data());
    const auto scaled = [&](int64_t n, int64_t e, const int32_t* sums, auto number) {
      out.put(n * s.E + e, number, [&](int i) { return float(sums[i]) * scales[n] * worth[e + i]; });
    };
    multiply<I8xI8>(pool, s, rows, width, numbers.data(), same_bits, scaled);
    return ffi::Error::Success();
  }
  const auto run = [&](auto kind, const auto& put) {
    using W = decltype(kind);
    std::vector<typename W::X> copy;
    const auto rows = rows_at<W>(w.untyped_data(), worth, group);
    multiply<W>(pool, s, rows, width, rows_of(x, copy), same_bits, put);
  };
  const auto plain = [&](int64_t n, int64_t e, const float* sums, auto number) {
    out.put(n * s.E + e, number, [&](int i) { return sums[i]; });
  };
  const auto scaled = [&](int64_t n, int64_t e, const float* sums, auto number) {
    out.put(n * s.E + e, number, [&](int i) { return sums[i] * worth[e + i]; });
  };
  const bool half = x.element_type() == ffi::BF16;
  switch (w.element_type()) {
    case ffi::F32: run(F32{}, plain); break;
    case ffi::BF16: run(BF16xBF16{}, plain); break;
    case ffi::S8: half ? run(I8xBF16{}, scaled) : run(I8{}, scaled); break;
    case ffi::U8: half ? run(I4xBF16{}, plain) : run(I4{}, plain); break;
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
                                  .Attr<bool>("integers")
                                  .Attr<bool>("same_bits")
                                  .Ret<xla::ffi::AnyBuffer>());
