/* What every generated kernel begins with. Compiled with -fwrapv: integers wrap around, >> keeps the sign. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 128
#define NOINLINE __attribute__((noinline)) /* inlined, its pointers would no longer count as restrict */
#define INLINE static inline __attribute__((always_inline))
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

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
