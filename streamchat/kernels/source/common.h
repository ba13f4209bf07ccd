/* Number formats and small functions shared by the kernels. All arithmetic is in float32. */
#ifndef STREAMCHAT_COMMON_H
#define STREAMCHAT_COMMON_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512BW__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define NEON
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(name) SIMD_SUM_(omp simd reduction(+ : name))
#define SIMD_SUM_(text) _Pragma(#text)

typedef uint16_t bfloat16;
typedef uint16_t float16; /* IEEE half precision */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float from_bfloat16(bfloat16 x) { return float_of((uint32_t)x << 16); }

/* Rounds to nearest, ties to even, like PyTorch; NaN stays NaN. */
INLINE bfloat16 to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Free of branches, so that compilers vectorize it, and of subnormal floats, which are slow. */
INLINE float from_float16(float16 x) {
    uint32_t size = (uint32_t)(x & 0x7fffu) << 13, exponent = size & 0x0f800000u;
    float value = exponent ? float_of(size + 0x38000000u) : float_of(size + 0x38800000u) - 0x1p-14f;
    uint32_t bits = exponent == 0x0f800000u ? size + 0x70000000u : bits_of(value); /* inf and NaN */
    return float_of(bits | (uint32_t)(x & 0x8000u) << 16);
}

/* Rounds to nearest, ties to even, like PyTorch. Numbers that are too large become inf; NaN stays NaN. */
INLINE float16 to_float16(float x) {
    uint32_t bits = bits_of(x), size = bits & 0x7fffffffu, code;
    if (x != x)
        code = 0x7e00u;
    else if (size >= 0x47800000u) /* 65536 */
        code = 0x7c00u;
    else if (size < 0x38800000u) /* 2^-14: subnormal, multiples of 2^-24 as floats near 0.5 are */
        code = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
    else
        code = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
    return (float16)(code | (bits >> 16 & 0x8000u));
}

/* exp(x) for x <= 0: relative error below 1e-6, about 0 for large negative x. Free of branches, so that compilers
 * vectorize it: the clamp at 2^-126 is a minimum of the bit patterns, which for negative floats grow with the
 * magnitude, NaN and -inf above all others. NaN stays NaN. */
INLINE float exp_negative(float x) {
    const uint32_t least = 0xc2fc0000u; /* -126 */
    uint32_t bits = bits_of(x * 1.44269504f) | 0x80000000u; /* no NaN is converted to an integer */
    float turns = float_of(bits < least ? bits : least);
    int32_t whole = (int32_t)(turns - 0.5f); /* truncates, which rounds a negative number to the nearest here */
    float rest = (turns - (float)whole) * 0.69314718f;
    float sum = 1.3981999e-3f;
    sum = sum * rest + 8.3334520e-3f;
    sum = sum * rest + 4.1665795e-2f;
    sum = sum * rest + 1.6666665e-1f;
    sum = sum * rest + 0.5f;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * float_of((uint32_t)(whole + 127) << 23) + (x != x ? x : 0.0f);
}

/* cap * tanh(x / cap): error below 1e-6 * cap. */
INLINE float capped(float x, float cap) {
    float power = exp_negative(-2.0f * __builtin_fabsf(x) / cap);
    return cap * __builtin_copysignf((1.0f - power) / (1.0f + power), x);
}

#endif
