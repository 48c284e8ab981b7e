// What a matrix may be made of. Each kind says how it lies in memory (`type`), what the other factor
// is (`X`), what sums are kept in while a row is multiplied (`Lanes`, `kStep` numbers at a time), and
// what comes out (`Sum`). float32, bf16 and int8 are widened to float32, exactly; int8 x int8 is
// summed exactly in int32 (D < 2^17).
#pragma once

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
};

struct F32 : OfFloats {
  using type = float;
  static Lanes load(const type* from) { return vector_at<Floats>(from); }
  static float one(type x) { return x; }
};

struct BF16 : OfFloats {
  using type = uint16_t;
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
  // To the nearest, of two as near to the even one, as XLA rounds; NaN stays NaN.
  static type rounded(float x) {
    const auto all = bits<uint32_t>(x);
    if (x != x) return type((all >> 16) | 0x40);
    return type((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
};

struct I8 : OfFloats {
  using type = int8_t;
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
};

struct I8xI8 {
  using type = int8_t;
  using X = int16_t;  // int8, widened once per row
  using Sum = int32_t;
#if defined(__AVX512BW__)
  using Lanes = __m512i;
  static constexpr int kStep = 32;
  static Lanes load(const type* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
  }
  static Lanes factor(const X* x) { return _mm512_loadu_si512(x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(w, x));
  }
#elif defined(__AVX2__)
  using Lanes = __m256i;
  static constexpr int kStep = 16;
  static Lanes load(const type* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
  }
  static Lanes factor(const X* x) { return _mm256_loadu_si256((const __m256i*)x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
  }
#else
  using Lanes = Ints;
  static constexpr int kStep = kLanes;
  template <class T>
  static Lanes widened(const T* from) {
    typedef T Narrow __attribute__((vector_size(sizeof(T) * kLanes)));
    return __builtin_convertvector(vector_at<Narrow>(from), Ints);
  }
  static Lanes load(const type* w) { return widened(w); }
  static Lanes factor(const X* x) { return widened(x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) { return sums + w * x; }
#endif
  static int32_t one(type x) { return x; }
  static Sum all(Lanes sums) {
    int32_t lane[sizeof(Lanes) / 4], sum = 0;
    std::memcpy(lane, &sums, sizeof sums);
    for (int32_t part : lane) sum += part;
    return sum;
  }
};

}  // namespace pangu
