/* What every generated kernel begins with. Compiled with -fwrapv: integers wrap around, >> keeps the sign. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "random bits are read as the halves of words"
#endif
#define BLOCK 128
#define PAIRS (BLOCK / 2 + 1)
#define NOINLINE __attribute__((noinline)) /* inlined, its pointers would no longer count as restrict */
#define INLINE static inline __attribute__((always_inline))
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

typedef uint16_t half_word __attribute__((may_alias));

INLINE int32_t bits_of(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
INLINE float float_of(int32_t i) { float x; memcpy(&x, &i, 4); return x; }

/* To nearest, ties to even; a NaN stays one. */
INLINE int32_t bf16_from_float(float x) {
  int32_t i = bits_of(x);
  int32_t rounded = ((i + 0x7fff + ((i >> 16) & 1)) >> 16) & 0xffff;
  return (i & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
INLINE int32_t fp16_from_float(float x) {
  int32_t i = bits_of(x), sign = (i >> 16) & 0x8000, size = i & 0x7fffffff;
  int32_t normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  int32_t tiny = bits_of(float_of(size) + 0.5f) - 0x3f000000; /* below 2^-14: the sum rounds to a multiple of 2^-24 */
  int32_t finite = size < 0x38800000 ? tiny : normal;
  int32_t kept = finite > 0x7c00 ? 0x7c00 : finite;
  return sign | (size > 0x7f800000 ? 0x7e00 : kept);
}
INLINE float float_from_fp16(int32_t h) {
  int32_t size = (h & 0x7fff) << 13;
  int32_t normal = size + 0x38000000;
  int32_t tiny = bits_of(float_of(size + 0x38800000) - 0x1p-14f); /* no subnormal fp32 on the way */
  int32_t special = size | 0x7f800000 | (size > 0x0f800000 ? 0x400000 : 0);
  int32_t finite = size < 0x00800000 ? tiny : normal;
  return float_of((size >= 0x0f800000 ? special : finite) | (h & 0x8000) << 16);
}

/* 8- and 16-bit numbers to 32 bits, and back to their low bits: n of them, a multiple of 32. Left to gcc, which unpacks
   and masks more often than it must, AdamW's step in int8 takes 13% longer. Builtins, since immintrin.h takes
   longer to compile than all the rest. */
#if defined(__AVX2__) && !defined(__AVX512VL__) && defined(__GNUC__) && !defined(__clang__)
typedef char bytes16 __attribute__((vector_size(16)));
typedef short shorts8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef short shorts16 __attribute__((vector_size(32)));
typedef int ints8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef long long longs2 __attribute__((vector_size(16)));
typedef long long longs4 __attribute__((vector_size(32)));
INLINE bytes16 eight_bytes(const void *at) { long long x; memcpy(&x, at, 8); return (bytes16)(longs2){x, 0}; }
#define WIDEN(type, load, convert) \
  INLINE void widen_##type(int n, const type *restrict from, int32_t *restrict to) { \
    for (int c = 0; c < n; c += 8) *(ints8 *)(to + c) = (ints8)convert(load(from + c)); \
  }
#define EIGHT_SHORTS(at) (*(const shorts8 *)(at))
WIDEN(int8_t, eight_bytes, __builtin_ia32_pmovsxbd256)
WIDEN(uint8_t, eight_bytes, __builtin_ia32_pmovzxbd256)
WIDEN(int16_t, EIGHT_SHORTS, __builtin_ia32_pmovsxwd256)
WIDEN(uint16_t, EIGHT_SHORTS, __builtin_ia32_pmovzxwd256)
INLINE void narrow_8(int n, const int32_t *restrict from, void *restrict to) {
  const ints8 order = {0, 4, 1, 5, 2, 6, 3, 7}; /* packing keeps to halves of a vector */
  for (int c = 0; c < n; c += 32) {
    const ints8 *x = (const ints8 *)(from + c);
    const shorts16 low = __builtin_ia32_packusdw256(x[0] & 0xff, x[1] & 0xff);
    const shorts16 high = __builtin_ia32_packusdw256(x[2] & 0xff, x[3] & 0xff);
    const ints8 bytes = __builtin_ia32_permvarsi256((ints8)__builtin_ia32_packuswb256(low, high), order);
    memcpy((char *)to + c, &bytes, 32);
  }
}
INLINE void narrow_16(int n, const int32_t *restrict from, void *restrict to) {
  for (int c = 0; c < n; c += 16) {
    const ints8 *x = (const ints8 *)(from + c);
    const shorts16 both = __builtin_ia32_packusdw256(x[0] & 0xffff, x[1] & 0xffff);
    const longs4 shorts = __builtin_ia32_permdi256((longs4)both, 0xd8);
    memcpy((char *)to + 2 * c, &shorts, 32);
  }
}
#define NARROW(type, bits) \
  INLINE void narrow_##type(int n, const int32_t *restrict from, type *restrict to) { narrow_##bits(n, from, to); }
NARROW(int8_t, 8)
NARROW(uint8_t, 8)
NARROW(int16_t, 16)
NARROW(uint16_t, 16)
#else
#define RESIZE(type) \
  INLINE void widen_##type(int n, const type *restrict from, int32_t *restrict to) { \
    for (int c = 0; c < n; c++) to[c] = from[c]; \
  } \
  INLINE void narrow_##type(int n, const int32_t *restrict from, type *restrict to) { \
    for (int c = 0; c < n; c++) to[c] = (type)from[c]; \
  }
RESIZE(int8_t)
RESIZE(uint8_t)
RESIZE(int16_t)
RESIZE(uint16_t)
#endif
