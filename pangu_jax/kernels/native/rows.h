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

// How a row is rounded, as pangu_jax/quant/rows.py does: `most` is the kind's largest number. A row with
// a NaN gets a NaN for a scale.
struct Rounding {
  float scale, inverse;
  bool numeric = true;

  Rounding(const float* x, int64_t D, float most) {
    float largest = 0;
    for (int64_t d = 0; d < D; ++d) {
      const float size = std::fabs(x[d]);
      largest = size > largest ? size : largest;
      numeric &= size == size;
    }
    scale = largest * (1.0f / most);
    inverse = 1.0f / (scale > 0 ? scale : 1.0f);
    if (!numeric) scale = std::nanf("");
  }
};

inline float clipped(float x, float most) {
  return x >= -most ? (x <= most ? x : most) : -most;
}

// A row as int8 (in int16), and its scale.
inline float round_row(const float* x, int64_t D, int16_t* numbers) {
  const Rounding rounding(x, D, 127);
  for (int64_t d = 0; d < D; ++d)
    numbers[d] = int16_t(clipped(std::nearbyintf(x[d] * rounding.inverse), 127));
  return rounding.scale;
}

// A row as fp8, in float32 or bf16, which have all of its numbers; and its scale.
template <class X>
inline float round_row_to_fp8(const float* x, int64_t D, X* numbers) {
  const Rounding rounding(x, D, 448);
  for (int64_t d = 0; d < D; ++d) {
    const float nearest = F8::rounded(clipped(x[d] * rounding.inverse, 448));
    if constexpr (std::is_same_v<X, float>) {
      numbers[d] = nearest;
    } else {
      numbers[d] = BF16::rounded(nearest);
    }
  }
  return rounding.scale;
}

}  // namespace pangu
