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
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(name) SIMD_SUM_(omp simd reduction(+ : name))
#define SIMD_SUM_(text) _Pragma(#text)

typedef uint16_t bfloat16;

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

/* exp(x) for x <= 0: relative error below 1e-6, about 0 for large negative x. Free of branches, so that compilers
 * vectorize it: the clamp at 2^-126 is a minimum of the bit patterns, which for negative floats grow with the
 * magnitude. NaN stays NaN. */
INLINE float exp_negative(float x) {
    const uint32_t least = 0xc2fc0000u; /* -126 */
    uint32_t bits = bits_of(x * 1.44269504f);
    float turns = float_of(bits < least ? bits : least);
    int32_t whole = (int32_t)(turns - 0.5f); /* truncates, which rounds a negative number to the nearest here */
    float rest = (turns - (float)whole) * 0.69314718f;
    float sum = 1.3981999e-3f;
    sum = sum * rest + 8.3334520e-3f;
    sum = sum * rest + 4.1665795e-2f;
    sum = sum * rest + 1.6666665e-1f;
    sum = sum * rest + 0.5f;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * float_of((uint32_t)(whole + 127) << 23) + x * 0.0f;
}

#endif
