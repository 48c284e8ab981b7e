// Rows of activations: float32 of either dtype, and rounded to int8.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "elements.h"
#include "xla/ffi/api/ffi.h"

namespace pangu {

namespace ffi = xla::ffi;

// The numbers of a float32 or bf16 buffer as float32: its own memory, or a copy kept in `copy`.
inline const float* floats_of(const ffi::AnyBuffer& buffer, std::vector<float>& copy) {
  if (buffer.element_type() == ffi::F32) return buffer.typed_data<float>();
  const auto* from = reinterpret_cast<const uint16_t*>(buffer.untyped_data());
  copy.resize(buffer.element_count());
  for (size_t i = 0; i < copy.size(); ++i) copy[i] = BF16::one(from[i]);
  return copy.data();
}

// The rows of a buffer as a kind of matrix wants its factors.
inline const float* rows_of(const ffi::AnyBuffer& buffer, std::vector<float>& copy) {
  return floats_of(buffer, copy);
}
inline const uint16_t* rows_of(const ffi::AnyBuffer& buffer, std::vector<uint16_t>&) {
  return reinterpret_cast<const uint16_t*>(buffer.untyped_data());  // bf16
}

// Reads a float32 or bf16 buffer as float32.
class Input {
 public:
  explicit Input(ffi::AnyBuffer& buffer)
      : wide_(buffer.element_type() == ffi::F32), data_(buffer.untyped_data()) {}
  void get(int64_t at, int64_t count, float* to) const {
    if (wide_) {
      std::copy_n(static_cast<const float*>(data_) + at, count, to);
    } else {
      const auto* from = static_cast<const uint16_t*>(data_) + at;
      for (int64_t i = 0; i < count; ++i) to[i] = BF16::one(from[i]);
    }
  }

 private:
  bool wide_;
  const void* data_;
};

// Writes float32 results to a float32 or bf16 buffer.
class Output {
 public:
  explicit Output(ffi::AnyBuffer& buffer)
      : wide_(buffer.element_type() == ffi::F32), data_(buffer.untyped_data()) {}
  void put(int64_t at, float x) const {
    put(at, std::integral_constant<int, 1>(), [&](int) { return x; });
  }
  // of(i) for each i of a number of them, which is a constant.
  template <class Number, class Of>
  void put(int64_t at, Number, const Of& of) const {
    float x[Number::value];
    for (int i = 0; i < Number::value; ++i) x[i] = of(i);
    if (wide_) {
      std::memcpy(static_cast<float*>(data_) + at, x, sizeof x);
    } else {
      auto* to = static_cast<uint16_t*>(data_) + at;
      for (int i = 0; i < Number::value; ++i) to[i] = BF16::rounded(x[i]);
    }
  }

 private:
  bool wide_;
  void* data_;
};

// A row as int8 (in int16) and its scale, as pangu_jax/quant/rows.py rounds. A row with a NaN gets a
// NaN for a scale.
inline float round_row(const float* x, int64_t D, int16_t* numbers) {
  float largest = 0;
  bool numeric = true;
  for (int64_t d = 0; d < D; ++d) {
    const float size = std::fabs(x[d]);
    largest = size > largest ? size : largest;
    numeric &= size == size;
  }
  const float scale = largest * (1.0f / 127), inverse = 1.0f / (scale > 0 ? scale : 1.0f);
  for (int64_t d = 0; d < D; ++d) {
    const float nearest = std::nearbyintf(x[d] * inverse);
    numbers[d] = int16_t(nearest >= -127.0f ? (nearest <= 127.0f ? nearest : 127.0f) : -127.0f);
  }
  return numeric ? scale : std::nanf("");
}

}  // namespace pangu
