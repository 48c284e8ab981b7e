// Puts the keys or values of new tokens into a cache, in place.
//
// cache [(L,) M, K, Z, ...], added [B, K, T, ...]: token t of sequence b goes to slot slots[b, t] of
// page pages[b, t]; a slot behind the last one is padding and goes nowhere.

#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace pangu {
namespace {

namespace ffi = xla::ffi;

ffi::Error write(ffi::AnyBuffer, ffi::AnyBuffer added, ffi::Buffer<ffi::S32> pages,
                 ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> layer,
                 ffi::Result<ffi::AnyBuffer> cache) {
  const auto from = added.dimensions(), to = cache->dimensions();
  const size_t lead = to.size() - from.size();
  const int64_t B = from[0], K = from[1], T = from[2], M = to[lead], Z = to[lead + 2];
  const int64_t bytes = int64_t(added.size_bytes()) / (B * K * T);
  const int64_t first = (lead ? layer.typed_data()[0] : 0) * M * K * Z;
  auto* out = static_cast<char*>(cache->untyped_data());
  const auto* in = static_cast<const char*>(added.untyped_data());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T; ++t) {
      const int64_t page = pages.typed_data()[b * T + t], slot = slots.typed_data()[b * T + t];
      if (slot < 0 || slot >= Z || page < 0 || page >= M) continue;
      for (int64_t k = 0; k < K; ++k)
        std::memcpy(out + (first + (page * K + k) * Z + slot) * bytes,
                    in + ((b * K + k) * T + t) * bytes, bytes);
    }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pangu

XLA_FFI_DEFINE_HANDLER_SYMBOL(pangu_write, pangu::write,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
