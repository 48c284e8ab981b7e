// What a matrix may be made of. Each kind says how it lies in memory (`type`), what the other factor
// is (`X`), what sums are kept in while a row is multiplied (`Lanes`, `kStep` numbers at a time), and
// what comes out (`Sum`). float32, bf16, int8 and fp8 are widened, exactly, and summed in float32; int8 x
// int8 is summed exactly in int32 (D < 2^17). int4 is scaled in float32, and rounded to the other
// factor's dtype, before it is multiplied. For more than a few rows a matrix is taken to the kind
// `Unpacked` first, whose products in the same order are the same to the last bit.
//
// Where a product goes across rows of x (across.h), a `unit` is `kPack` numbers of a row in 32 bits, and
// a vector of type `Across` has those of as many rows; `everywhere` is as many numbers of w for all of
// them, and `start` what a row's sum begins with. `kAcross` says of which kinds w may be then.
#pragma once

#include <cmath>
#include <type_traits>

#include "vec.h"

namespace pangu {

// Rows of a matrix, from some row on: a pointer, but for int4 (below).
template <class T>
inline const T* from_row(const T* rows, int64_t row, int64_t D) {
  return rows + row * D;
}

struct OfFloats {
  static constexpr bool kGrouped = false;
  using X = float;
  using Sum = float;
  using Lanes = Floats;
  static constexpr int kStep = kLanes;
  static Lanes factor(const X* x) { return vector_at<Floats>(x); }
  static Lanes add(Lanes sums, Lanes w, Lanes x) { return fused(w, x, sums); }
  static Sum all(Lanes sums) { return total(sums); }
  static float one_factor(X x) { return x; }
  static Sum add_one(Sum sum, float w, float x) { return fused(w, x, sum); }

  using Across = Floats;
  static constexpr bool kAcross = false;
  static constexpr int kPack = 1;
  static uint32_t unit(const float* x) { return bits<uint32_t>(*x); }
  static Sum start(const X*, int64_t) { return 0; }
  static Across everywhere(const float* w) { return splat(*w); }
  static Across add_across(Across sums, Across w, Across x) { return fused(w, x, sums); }
};

struct F32 : OfFloats {
  static constexpr bool kAcross = true;
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
    const uint32_t nearest = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
    return type((all & 0x7fffffff) > 0x7f800000 ? all >> 16 | 0x40 : nearest);
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

// e4m3fn: a sign, four bits of exponent (less 7) and three of mantissa; the largest is no number.
struct F8 : OfFloats {
  using type = uint8_t;
  using Unpacked = F32;
  static Lanes load(const type* from) {
#if defined(__AVX512F__)
    const Ints all = bits<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    const Ints all = bits<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Ints all = __builtin_convertvector(vector_at<Bytes>(from), Ints);
#endif
    const Ints size = all & 127;
    const Floats tiny = __builtin_convertvector(size, Floats) * splat(1.0f / 512);
    const Floats normal = bits<Floats>((size << 20) + (120 << 23));
    const Ints known = bits<Ints>(size < 8 ? tiny : normal) | (size == 127);  // all bits: a NaN
    return bits<Floats>(known | (all & 128) << 24);
  }
  static float one(type x) {
    const uint32_t size = x & 127, sign = uint32_t(x & 128) << 24;
    const float normal = bits<float>((size << 20) + (120u << 23));
    const float value = size < 8 ? float(size) * (1.0f / 512) : normal;
    return bits<float>((size == 127 ? 0x7fc00000u : bits<uint32_t>(value)) | sign);
  }
  static float unpacked(type x) { return one(x); }
  // The nearest, of two as near to the even one, of numbers up to 448.
  static float rounded(float x) {
    const int32_t exponent = int32_t(bits<uint32_t>(x) >> 23 & 255) - 127;
    const int32_t last = (exponent > -6 ? exponent : -6) - 3;  // 2^last is between it and the next
    const float quantum = bits<float>(uint32_t(127 + last) << 23);
    return std::nearbyintf(x * bits<float>(uint32_t(127 - last) << 23)) * quantum;
  }
};

// Where both factors can be multiplied as bf16: two products are added to a float32 at a time (and
// the processor takes numbers below 2^-126 for 0).
#if defined(__AVX512BF16__)
struct OfBF16 {
  static constexpr bool kGrouped = false;
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
  static Sum add_one(Sum sum, float w, float x) { return fused(w, x, sum); }

  using Across = Floats;
  static constexpr bool kAcross = false;
  static constexpr int kPack = 2;
  static uint32_t unit(const uint16_t* x) { return vector_at<uint32_t>(x); }
  static Sum start(const X*, int64_t) { return 0; }
  static Across everywhere(const uint16_t* w) {
    return bits<Floats>(_mm512_set1_epi32(vector_at<int32_t>(w)));
  }
  static Across add_across(Across sums, Across w, Across x) {
    return add(sums, bits<__m512i>(w), bits<__m512i>(x));
  }
};

struct BF16xBF16 : OfBF16 {
  static constexpr bool kAcross = true;
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

struct F8xBF16 : OfBF16 {
  using type = uint8_t;
  using Unpacked = BF16xBF16;
  static __m512i load(const type* from) {
    const __m512i all = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i size = _mm512_and_si512(all, _mm512_set1_epi16(127));
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
    // What is less than that is 0 to 7 times 2^-9.
    const __m512i tiny = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __mmask32 is_tiny = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
    const __mmask32 is_none = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(127));
    __m512i known = _mm512_mask_permutexvar_epi16(normal, is_tiny, size, tiny);
    known = _mm512_mask_mov_epi16(known, is_none, _mm512_set1_epi16(0x7fc0));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(all, 8), _mm512_set1_epi16(-32768));
    return _mm512_or_si512(known, sign);
  }
  static float one(type x) { return F8::one(x); }
  static uint16_t unpacked(type x) { return uint16_t(bits<uint32_t>(F8::one(x)) >> 16); }
};
#else
using BF16xBF16 = BF16;
using I8xBF16 = I8;
using F8xBF16 = F8;
#endif

// int4: two numbers plus 8 in a byte, the first in the low half, and a scale for each `group` of them.
struct Int4Rows {
  const uint8_t* numbers;
  const float* scale;
  int64_t group;
};

inline Int4Rows from_row(const Int4Rows& rows, int64_t row, int64_t D) {
  return {rows.numbers + row * D / 2, rows.scale + row * (D / rows.group), rows.group};
}

struct I4 : OfFloats {
  static constexpr bool kGrouped = true;
  using type = uint8_t;
  using Unpacked = F32;
#if defined(__AVX512F__)
  // What the 16 numbers are worth in a group.
  using Table = __m512;
  static Table table(float scale) {
    const __m512i levels = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_cvtepi32_ps(levels) * _mm512_set1_ps(scale);
  }
  static Lanes load(const type* from, Table table) {
    const __m512i index = _mm512_cvtepu8_epi32(in_order(_mm_loadl_epi64((const __m128i*)from)));
    return bits<Floats>(_mm512_permutexvar_ps(index, table));
  }
#elif defined(__AVX2__)
  using Table = Floats;
  static Table table(float scale) { return splat(scale); }
  static Lanes load(const type* from, Table table) {
    const __m128i numbers = in_order(_mm_cvtsi32_si128(bits<int32_t>(vector_at<Four>(from))));
    const __m128i signed_ = _mm_sub_epi8(numbers, _mm_set1_epi8(8));
    return bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed_))) * table;
  }
  typedef uint8_t Four __attribute__((vector_size(4)));
#else
  using Table = Floats;
  static Table table(float scale) { return splat(scale); }
  static Lanes load(const type* from, Table table) {
    Lanes numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = float(number(from, i));
    return numbers * table;
  }
#endif
#if defined(__AVX2__)
  // Bytes of two numbers to a byte for each.
  static __m128i in_order(__m128i pairs) {
    const __m128i wide = _mm_cvtepu8_epi16(pairs);
    return _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi16(0x0f0f));
  }
#endif
  static void store(Lanes numbers, float* to) { std::memcpy(to, &numbers, sizeof numbers); }
  static int number(const type* from, int64_t i) { return (from[i / 2] >> (i % 2 * 4) & 15) - 8; }
  static float unpacked(int number, float scale) { return float(number) * scale; }
};

#if defined(__AVX512BF16__)
struct I4xBF16 : OfBF16 {
  static constexpr bool kGrouped = true;
  using type = uint8_t;
  using Unpacked = BF16xBF16;
  using Table = __m512i;
  static Table table(float scale) {
    return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(I4::table(scale)));
  }
  static __m512i load(const type* from, Table table) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
    return _mm512_permutexvar_epi16(_mm512_and_si512(both, _mm512_set1_epi32(0x000f000f)), table);
  }
  static void store(__m512i numbers, uint16_t* to) { _mm512_storeu_si512(to, numbers); }
  static uint16_t unpacked(int number, float scale) { return BF16::rounded(float(number) * scale); }
};
#else
using I4xBF16 = I4;  // no need to round
#endif

// The rows of a matrix; of int4 with a scale for each `group`.
template <class W>
inline auto rows_at(const void* numbers, const float* scale, int64_t group) {
  const auto* own = static_cast<const typename W::type*>(numbers);
  if constexpr (W::kGrouped) {
    return Int4Rows{own, scale, group};
  } else {
    return own;
  }
}

// Integers, widened to int16: the other factor once per row.
struct OfIntegers {
  static constexpr bool kGrouped = false;
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
#if defined(__AVX512BW__)
    return _mm512_reduce_add_epi32(sums);
#else
    int32_t lane[sizeof(Lanes) / 4], sum = 0;
    std::memcpy(lane, &sums, sizeof sums);
    for (int32_t part : lane) sum += part;
    return sum;
#endif
  }

#if defined(__AVX512VNNI__)
  using Across = __m512i;
  static constexpr int kPack = 4;
  static constexpr bool kAcrossBytes = true;
  static uint32_t unit(const int16_t* x) {
    uint32_t bytes = 0;
    for (int i = 0; i < kPack; ++i) bytes |= uint32_t(uint8_t(x[i])) << 8 * i;
    return bytes;
  }
  // The instruction wants one factor without a sign: it is w plus 128.
  static Sum start(const X* x, int64_t D) {
    Sum sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += x[d];
    return -128 * sum;
  }
  static Across everywhere(const int8_t* w) {
    const __m512i numbers = _mm512_set1_epi32(vector_at<int32_t>(w));
    return _mm512_xor_si512(numbers, _mm512_set1_epi8(-128));
  }
  static Across add_across(Across sums, Across w, Across x) {
    // By name, as GCC 12 keeps sums of the intrinsic in memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
    return sums;
  }
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
  using Across = Lanes;
  static constexpr bool kAcrossBytes = false;
  static constexpr int kPack = 2;
  static uint32_t unit(const int16_t* x) { return vector_at<uint32_t>(x); }
  static Sum start(const X*, int64_t) { return 0; }
#if defined(__AVX512BW__)
  static Across everywhere(const int16_t* w) { return _mm512_set1_epi32(vector_at<int32_t>(w)); }
#else
  static Across everywhere(const int16_t* w) { return _mm256_set1_epi32(vector_at<int32_t>(w)); }
#endif
  static Across add_across(Across sums, Across w, Across x) { return add(sums, w, x); }
#else
  using Across = Ints;
  static constexpr bool kAcrossBytes = true;
  static constexpr int kPack = 1;
  static uint32_t unit(const int16_t* x) { return uint32_t(int32_t(*x)); }
  static Sum start(const X*, int64_t) { return 0; }
  static Across everywhere(const int8_t* w) { return Ints{} + int32_t(*w); }
  static Across add_across(Across sums, Across w, Across x) { return sums + w * x; }
#endif
};

struct I16xI8 : OfIntegers {
  static constexpr bool kAcross = !kAcrossBytes;
  using type = int16_t;
  using Unpacked = I16xI8;
  static int32_t one(type x) { return x; }
};

struct I8xI8 : OfIntegers {
  static constexpr bool kAcross = kAcrossBytes;
  using type = int8_t;
  using Unpacked = I16xI8;
  static int32_t one(type x) { return x; }
  static int16_t unpacked(type x) { return x; }
};

// What a matrix is multiplied as by many rows.
template <class W>
using Many = std::conditional_t<W::kAcross, W, typename W::Unpacked>;

}  // namespace pangu
