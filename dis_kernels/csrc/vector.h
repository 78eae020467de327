// What the kernels share: vectors of the width of this machine, elementary functions on them, and a parallel loop.
//
// The vectors are those of GCC and Clang, which lower them to AVX-512, AVX2, NEON or whatever there is; two
// instructions of AVX-512 are named because no vector expression reaches them. Compile without -ffast-math: inf, NaN
// and the order of every sum are part of the result.

#pragma once

#ifdef __FAST_MATH__
#error "the kernels need IEEE arithmetic: compile without -ffast-math and -Ofast"
#endif

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && !defined(ZIGFLOW_NO_INTRINSICS)
#include <immintrin.h>
#define ZIGFLOW_AVX512 1
#endif

#ifndef ZIGFLOW_VECTOR_BYTES
#if defined(__AVX512F__)
#define ZIGFLOW_VECTOR_BYTES 64
#elif defined(__AVX__)
#define ZIGFLOW_VECTOR_BYTES 32
#else
#define ZIGFLOW_VECTOR_BYTES 16
#endif
#endif

#define INLINE inline __attribute__((always_inline))

namespace zigflow {

template <class S>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int count = ZIGFLOW_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(ZIGFLOW_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(ZIGFLOW_VECTOR_BYTES)));
  static constexpr int mantissa = 23;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float least = -127.0f, most = 128.0f;
  static constexpr float log2e = 1.4426950408889634f;
  static constexpr float ln2 = 0.6931471805599453f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Lanes<double> {
  static constexpr int count = ZIGFLOW_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(ZIGFLOW_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(ZIGFLOW_VECTOR_BYTES)));
  static constexpr int mantissa = 52;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double least = -1023.0, most = 1024.0;
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2 = 0.69314718055994530942;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
};

template <class S>
using Vec = typename Lanes<S>::type;

template <class S>
INLINE Vec<S> splat(S value) {
  return value - Vec<S>{};
}

template <class To, class From>
INLINE To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  memcpy(&result, &value, sizeof value);
  return result;
}

// bfloat16 as it lies in memory.
struct bf16 {
  uint16_t bits;
};

// The type in which an activation type is computed.
template <class T>
struct StateOf {
  using type = T;
};
template <>
struct StateOf<bf16> {
  using type = float;
};
template <class T>
using State = typename StateOf<T>::type;

INLINE float to_state(float x) { return x; }
INLINE double to_state(double x) { return x; }
INLINE float to_state(bf16 x) { return as<float>(uint32_t(x.bits) << 16); }

INLINE void from_state(float x, float* out) { *out = x; }
INLINE void from_state(double x, double* out) { *out = x; }
INLINE void from_state(float x, bf16* out) {
  const uint32_t bits = as<uint32_t>(x);
  // Round to nearest even; a NaN stays one.
  out->bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class S>
INLINE Vec<S> load_full(const S* p) {
  Vec<S> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
INLINE void store_full(S* p, Vec<S> v) {
  memcpy(p, &v, sizeof v);
}

typedef uint16_t Half __attribute__((vector_size(ZIGFLOW_VECTOR_BYTES / 2)));
typedef uint32_t Word __attribute__((vector_size(ZIGFLOW_VECTOR_BYTES)));

INLINE Vec<float> load_full(const bf16* p) {
  Half half;
  memcpy(&half, p, sizeof half);
  return as<Vec<float>>(__builtin_convertvector(half, Word) << 16);
}
INLINE void store_full(bf16* p, Vec<float> v) {
  const Word bits = as<Word>(v);
  const Word rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Word kept = as<Word>(v != v) & (bits >> 16 | 0x40);
  const Half half = __builtin_convertvector((as<Word>(v == v) & rounded) | kept, Half);
  memcpy(p, &half, sizeof half);
}

// The first `count` lanes; the others are zero and are not written.
template <class T>
INLINE Vec<State<T>> load(const T* p, int count) {
  if (__builtin_expect(count == Lanes<State<T>>::count, 1)) return load_full(p);
  State<T> lanes[Lanes<State<T>>::count] = {};
  for (int i = 0; i < count; i++) lanes[i] = to_state(p[i]);
  return load_full(lanes);
}
template <class T>
INLINE void store(T* p, Vec<State<T>> v, int count) {
  if (__builtin_expect(count == Lanes<State<T>>::count, 1)) return store_full(p, v);
  State<T> lanes[Lanes<State<T>>::count];
  store_full(lanes, v);
  for (int i = 0; i < count; i++) from_state(lanes[i], p + i);
}

// 2^n for a vector that holds integers plus `magic`, as a factor on `value`.
template <class S>
INLINE Vec<S> scale(Vec<S> value, Vec<S> shifted) {
  typedef typename Lanes<S>::bits Bits;
  return as<Vec<S>>(as<Bits>(value) + (as<Bits>(shifted) << Lanes<S>::mantissa));
}

// A NaN passes.
template <class S>
INLINE Vec<S> clamp(Vec<S> x) {
  x = x < Lanes<S>::least ? splat<S>(Lanes<S>::least) : x;
  return x > Lanes<S>::most ? splat<S>(Lanes<S>::most) : x;
}

// e^r for |r| <= ln(2) / 2: a minimax polynomial, relative error 2e-8, and Taylor's series.
INLINE Vec<float> exp_near_zero(Vec<float> r) {
  Vec<float> p = r * 0.0013842862099409103f + 0.008374189957976341f;
  p = p * r + 0.041668012738227844f;
  p = p * r + 0.16666430234909058f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}
INLINE Vec<double> exp_near_zero(Vec<double> r) {
  double factorial = 6227020800.0;  // 13!
  Vec<double> p = splat<double>(1 / factorial);
#pragma GCC unroll 16
  for (int k = 13; k > 0; k--) {
    factorial /= k;
    p = p * r + 1 / factorial;
  }
  return p;
}

#ifdef ZIGFLOW_AVX512
// 2^(j/32)
alignas(64) static const float ROOTS[32] = {
    1.0f, 1.02189715f, 1.04427378f, 1.0671404f, 1.09050773f, 1.11438674f, 1.13878863f, 1.16372486f,
    1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f,
    1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.7186193f, 1.75625216f, 1.79470908f, 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f,
};
#endif

// 2^x for the decay of the states. float: relative error below 1.5e-7, 2^0 = 1 exactly, zero and infinity where they
// belong; results below 2^-126 lose precision.
INLINE Vec<float> exp2(Vec<float> x) {
#ifdef ZIGFLOW_AVX512
  // x = floor(x) + j / 32 + f: a table of 2^(j/32), a polynomial for 2^f whose constant term is 1, the exponent by
  // scalef. The sum with 1.5 * 2^18, rounded down, holds j in its last five bits, which are those the table reads.
  const __m512 shifted = _mm512_add_round_ps((__m512)x, _mm512_set1_ps(393216.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, 0x59);
  const __m512 root = _mm512_permutex2var_ps(_mm512_load_ps(ROOTS), _mm512_castps_si512(shifted), _mm512_load_ps(ROOTS + 16));
  const Vec<float> p = (Vec<float>)root * ((f * 0.24265269935131073f + 0.6931237578392029f) * f + 1.0f);
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  x = clamp<float>(x);
  const Vec<float> shifted = x + Lanes<float>::magic;
  const Vec<float> f = x - (shifted - Lanes<float>::magic);
  Vec<float> p = f * 0.0013264728477224708f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return scale<float>(p, shifted);
#endif
}
INLINE Vec<double> exp2(Vec<double> x) {
  x = clamp<double>(x);
  const Vec<double> shifted = x + Lanes<double>::magic;
  const Vec<double> f = x - (shifted - Lanes<double>::magic);
  return scale<double>(exp_near_zero(f * Lanes<double>::ln2), shifted);
}

// e^x to the last bit or two; below the least normal number the result may be 0, at the top inf.
template <class S>
INLINE Vec<S> exp(Vec<S> x) {
  constexpr S least = Lanes<S>::least * Lanes<S>::ln2, most = Lanes<S>::most * Lanes<S>::ln2;
#ifdef ZIGFLOW_AVX512
  if constexpr (sizeof(S) == 4) {
    // The operands' order lets a NaN pass.
    const __m512 above = _mm512_max_ps(_mm512_set1_ps(2 * least), (__m512)x);
    const Vec<S> kept = (Vec<S>)_mm512_min_ps(_mm512_set1_ps(2 * most), above);
    const Vec<S> n = (Vec<S>)_mm512_roundscale_ps((__m512)(kept * Lanes<S>::log2e), 0x08);
    const Vec<S> r = (kept - n * Lanes<S>::ln2_high) - n * Lanes<S>::ln2_low;
    return (Vec<S>)_mm512_scalef_ps((__m512)exp_near_zero(r), (__m512)n);
  }
#endif
  const Vec<S> shifted = clamp<S>(x * Lanes<S>::log2e) + Lanes<S>::magic;
  const Vec<S> n = shifted - Lanes<S>::magic;
  // Where the clamp acted, r is far from zero and the result 0 or inf whatever the polynomial says.
  Vec<S> r = (x - n * Lanes<S>::ln2_high) - n * Lanes<S>::ln2_low;
  r = n >= Lanes<S>::most ? Vec<S>{} : r;
  r = n <= Lanes<S>::least ? Vec<S>{} : r;
  return scale<S>(exp_near_zero(r), shifted);
}

// log(1 + w) for 0 <= w <= 1, to relative precision.
INLINE Vec<float> log1p(Vec<float> w) {
  Vec<float> p = w * -0.0033251368440687656f + 0.020236093550920486f;
  p = p * w - 0.057726915925741196f;
  p = p * w + 0.10687287151813507f;
  p = p * w - 0.1535966396331787f;
  p = p * w + 0.1969701051712036f;
  p = p * w - 0.24958933889865875f;
  p = p * w + 0.3333054780960083f;
  p = p * w - 0.49999934434890747f;
  p = p * w + 1.0f;
  return p * w;
}
INLINE Vec<double> log1p(Vec<double> w) {
  // 2 atanh(s) with s = w / (2 + w) <= 1/3.
  const Vec<double> s = w / (w + 2.0), q = s * s;
  Vec<double> p = splat<double>(1.0 / 35);
#pragma GCC unroll 16
  for (int k = 16; k >= 0; k--) p = p * q + 1.0 / (2 * k + 1);
  return 2.0 * s * p;
}

// softplus(x) = max(x, 0) + log(1 + e^-|x|), and its derivative.
template <class S>
INLINE Vec<S> softplus(Vec<S> x, Vec<S>* slope) {
  const Vec<S> positive = x < S(0) ? Vec<S>{} : x;
  const Vec<S> w = exp<S>(x < S(0) ? x : -x);
  if (slope) *slope = (x < S(0) ? w : splat<S>(1)) / (w + S(1));
  return positive + log1p(w);
}

template <class S>
INLINE Vec<S> sigmoid(Vec<S> x) {
  return S(1) / (exp<S>(-x) + S(1));
}

// Asks for the cache lines that hold `count` elements, to be read, or written.
template <bool WRITE, class T>
INLINE void fetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, WRITE, 2);
}

// The walk's token i lies at row `at(i)`.
struct Walk {
  int64_t length;
  bool reverse;
  INLINE int64_t at(int64_t i) const { return reverse ? length - 1 - i : i; }
};

// An OpenMP runtime's GOMP_parallel, found by the caller in the runtime that the process uses already, or null.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// Calls body(task, thread) for every task. Which thread takes which task is left open: no result may depend on it.
template <class Body>
void parallel_for(Parallel parallel, int64_t threads, int64_t tasks, const Body& body) {
  if (threads > tasks) threads = tasks;
  if (!parallel || threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(task, int64_t(0));
    return;
  }
  struct Shared {
    const Body* body;
    int64_t tasks;
    std::atomic<int64_t> next_task{0}, next_thread{0};
  } shared;
  shared.body = &body;
  shared.tasks = tasks;
  parallel(
      [](void* data) {
        Shared& shared = *static_cast<Shared*>(data);
        const int64_t thread = shared.next_thread++;
        for (int64_t task; (task = shared.next_task++) < shared.tasks;) (*shared.body)(task, thread);
      },
      &shared, unsigned(threads), 0);
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
INLINE T least_of(T a, T b) {
  return a < b ? a : b;
}

}  // namespace zigflow
