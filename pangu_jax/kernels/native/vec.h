// Vectors of float32 as wide as the machine's, in the compiler's own vector types: one source for
// AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pangu {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// By name where there is one: of a sum with 0 a compiler makes a sum.
inline Floats splat(float x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (Floats)_mm256_set1_ps(x);
#elif defined(__aarch64__)
  return (Floats)vdupq_n_f32(x);
#else
  return Floats{} + x;
#endif
}

// Keeps a vector in a register, where GCC would load it again for every use.
inline void hold(Floats& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// a * b + c, rounded once where the processor can. Written out, and contracted nowhere else: what a
// compiler makes of a sum of products differs from loop to loop, and all of them must give the same.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// One vector of any type from memory, aligned or not.
template <class Vector>
inline Vector vector_at(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// The sum of all lanes, always in the same order: halves, quarters, ...
inline float total(Floats v) {
#if defined(__AVX512F__)
  const __m512 all = bits<__m512>(v);
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
#elif defined(__AVX__)
  const __m256 eight = bits<__m256>(v);
#endif
#if defined(__AVX__)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}

// The sums of all lanes of eight vectors, in order.
inline void totals(const Floats (&v)[8], float* out) {
#if defined(__AVX__)
  __m256 eight[8], pair[4], four[2];
  for (int i = 0; i < 8; ++i) {
#if defined(__AVX512F__)
    const __m512 all = bits<__m512>(v[i]);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    eight[i] = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
#else
    eight[i] = bits<__m256>(v[i]);
#endif
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 a = eight[2 * i], b = eight[2 * i + 1];
    pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 a = pair[2 * i], b = pair[2 * i + 1];
    four[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  const __m256 lower = _mm256_permute2f128_ps(four[0], four[1], 0x20);
  const __m256 upper = _mm256_permute2f128_ps(four[0], four[1], 0x31);
  _mm256_storeu_ps(out, _mm256_add_ps(lower, upper));
#else
  for (int i = 0; i < 8; ++i) out[i] = total(v[i]);
#endif
}

// The largest lane.
inline float largest(Floats v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
  return lane[0];
}

// e^x to about 2 units in the last place for x <= 0; 0 below -87.
inline Floats exp_of_negative(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Ints tiny = x < splat(-87.0f);
  x = bits<Floats>(bits<Ints>(x) & ~tiny);
  const Floats n = fused(x, splat(1.44269504f), magic) - magic;
  const Floats nearly = fused(n, splat(-0.693359375f), x);
  const Floats r = fused(n, splat(2.12194440e-4f), nearly);  // x - n ln 2
  Floats p = splat(1.9875691500e-4f);
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f})
    p = fused(p, r, splat(next));
  p = fused(p * r, r, r) + splat(1.0f);
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return bits<Floats>(bits<Ints>(p * bits<Floats>(power)) & ~tiny);
}

}  // namespace pangu
