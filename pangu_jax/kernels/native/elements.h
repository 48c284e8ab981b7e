// What a matrix may be made of. Each kind says how it lies in memory (`type`), what the other factor
// is (`X`), what sums are kept in while a row is multiplied (`Lanes`, `kStep` numbers at a time), and
// what comes out (`Sum`). float32, bf16 and int8 are widened, exactly, and summed in float32; int8 x
// int8 is summed exactly in int32 (D < 2^17). For many rows a matrix is taken to the kind `Unpacked`
// first, whose products are the same to the last bit.
#pragma once

#include <cmath>

#include "vec.h"

namespace pangu {

struct OfFloats {
  using X = float;
  using Sum = float;
  using Lanes = Floats;
  static constexpr int kStep = kLanes;
  static Lanes factor(const X* x) { return vector_at<Floats>(x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) { return sums + w * x; }
  static Sum all(Lanes sums) { return total(sums); }
  static float one_factor(X x) { return x; }
  static Sum add_one(Sum sum, float w, float x) { return std::fma(w, x, sum); }
};

struct F32 : OfFloats {
  using type = float;
  using Unpacked = F32;
  static Lanes load(const type* from) { return vector_at<Floats>(from); }
  static float one(type x) { return x; }
};

struct BF16 : OfFloats {
  using type = uint16_t;
  using Unpacked = F32;
  static Lanes load(const type* from) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return bits<Floats>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return bits<Floats>(_mm256_slli_epi32(wide, 16));
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    return bits<Floats>(__builtin_convertvector(vector_at<Halves>(from), Ints) << 16);
#endif
  }
  static float one(type x) { return bits<float>(uint32_t(x) << 16); }
  static float unpacked(type x) { return one(x); }
  // To the nearest, of two as near to the even one, as XLA rounds; NaN stays NaN.
  static type rounded(float x) {
    const auto all = bits<uint32_t>(x);
    if (x != x) return type((all >> 16) | 0x40);
    return type((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
};

struct I8 : OfFloats {
  using type = int8_t;
  using Unpacked = F32;
  static Lanes load(const type* from) {
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))));
#elif defined(__AVX2__)
    return bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))));
#else
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(__builtin_convertvector(vector_at<Bytes>(from), Ints), Floats);
#endif
  }
  static float one(type x) { return x; }
  static float unpacked(type x) { return x; }
};

// Where both factors can be multiplied as bf16: two products are added to a float32 at a time.
#if defined(__AVX512BF16__)
struct OfBF16 {
  using X = uint16_t;
  using Sum = float;
  using Lanes = Floats;
  static constexpr int kStep = 32;
  static __m512i factor(const X* x) { return _mm512_loadu_si512(x); }
  static Lanes add(Lanes sums, __m512i w, __m512i x) {
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sums), (__m512bh)w, (__m512bh)x));
  }
  static Sum all(Lanes sums) { return total(sums); }
  static float one_factor(X x) { return BF16::one(x); }
  static Sum add_one(Sum sum, float w, float x) { return std::fma(w, x, sum); }
};

struct BF16xBF16 : OfBF16 {
  using type = uint16_t;
  using Unpacked = BF16xBF16;
  static __m512i load(const type* from) { return _mm512_loadu_si512(from); }
  static float one(type x) { return BF16::one(x); }
};

struct I8xBF16 : OfBF16 {
  using type = int8_t;
  using Unpacked = BF16xBF16;
  static __m512i load(const type* from) {
    const __m512 lower = bits<__m512>(I8::load(from)), upper = bits<__m512>(I8::load(from + 16));
    return (__m512i)_mm512_cvtne2ps_pbh(upper, lower);
  }
  static float one(type x) { return x; }
  static uint16_t unpacked(type x) { return uint16_t(bits<uint32_t>(float(x)) >> 16); }
};
#else
using BF16xBF16 = BF16;
using I8xBF16 = I8;
#endif

// Integers, widened to int16: the other factor once per row.
struct OfIntegers {
  using X = int16_t;
  using Sum = int32_t;
#if defined(__AVX512BW__)
  using Lanes = __m512i;
  static constexpr int kStep = 32;
  static Lanes load(const int8_t* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
  }
  static Lanes load(const int16_t* x) { return _mm512_loadu_si512(x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sums, w, x);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(w, x));
#endif
  }
#elif defined(__AVX2__)
  using Lanes = __m256i;
  static constexpr int kStep = 16;
  static Lanes load(const int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
  }
  static Lanes load(const int16_t* x) { return _mm256_loadu_si256((const __m256i*)x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
  }
#else
  using Lanes = Ints;
  static constexpr int kStep = kLanes;
  template <class T>
  static Lanes load(const T* from) {
    typedef T Narrow __attribute__((vector_size(sizeof(T) * kLanes)));
    return __builtin_convertvector(vector_at<Narrow>(from), Ints);
  }
  static Lanes add(Lanes sums, Lanes w, Lanes x) { return sums + w * x; }
#endif
  static Lanes factor(const X* x) { return load(x); }
  static int32_t one_factor(X x) { return x; }
  static Sum add_one(Sum sum, int32_t w, int32_t x) { return sum + w * x; }
  static Sum all(Lanes sums) {
    int32_t lane[sizeof(Lanes) / 4], sum = 0;
    std::memcpy(lane, &sums, sizeof sums);
    for (int32_t part : lane) sum += part;
    return sum;
  }
};

struct I16xI8 : OfIntegers {
  using type = int16_t;
  using Unpacked = I16xI8;
  static int32_t one(type x) { return x; }
};

struct I8xI8 : OfIntegers {
  using type = int8_t;
  using Unpacked = I16xI8;
  static int32_t one(type x) { return x; }
  static int16_t unpacked(type x) { return x; }
};

}  // namespace pangu
