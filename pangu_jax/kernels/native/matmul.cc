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

struct Shape {
  int64_t N, E, D;
};

// width: bytes of a row of w
template <class W, class Rows, class Put>
void multiply(ffi::ThreadPool& pool, const Shape& s, const Rows& rows, int64_t width,
              const typename W::X* x, const Put& put) {
  if (s.N * s.E * s.D < kAlone) return product<W>(rows, 0, s.E, x, s.N, s.D, put);
  const int64_t size = std::max<int64_t>(4, kPiece / width / s.N / kTileW) * kTileW;
  each(pool, (s.E + size - 1) / size, [&](int64_t i) {
    product<W>(rows, i * size, std::min(s.E, (i + 1) * size), x, s.N, s.D, put);
  });
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                  ffi::Buffer<ffi::F32> scale, bool integers, ffi::Result<ffi::AnyBuffer> y) {
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
    for (int64_t n = 0; n < s.N; ++n)
      scales[n] = round_row(floats + n * s.D, s.D, numbers.data() + n * s.D);
    const auto* rows = static_cast<const int8_t*>(w.untyped_data());
    multiply<I8xI8>(pool, s, rows, width, numbers.data(), [&](int64_t n, int64_t e, int32_t sum) {
      out.put(n * s.E + e, float(sum) * scales[n] * worth[e]);
    });
    return ffi::Error::Success();
  }
  const auto run = [&](auto kind, const auto& put) {
    using W = decltype(kind);
    std::vector<typename W::X> copy;
    const auto rows = rows_at<W>(w.untyped_data(), worth, group);
    multiply<W>(pool, s, rows, width, rows_of(x, copy), put);
  };
  const auto plain = [&](int64_t n, int64_t e, float sum) { out.put(n * s.E + e, sum); };
  const auto scaled = [&](int64_t n, int64_t e, float sum) { out.put(n * s.E + e, sum * worth[e]); };
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
                                  .Ret<xla::ffi::AnyBuffer>());
