/* Number formats and small functions that the kernels share. All arithmetic is in float32. */
#ifndef STREAMCHAT_COMMON_H
#define STREAMCHAT_COMMON_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(name) SIMD_SUM_(omp simd reduction(+ : name))
#define SIMD_SUM_(text) _Pragma(#text)

typedef uint16_t bfloat16;

INLINE float from_bfloat16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even, as PyTorch does; a NaN stays one. */
INLINE bfloat16 to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x)
        return 0x7fc0;
    return (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* exp of a number that is not positive: relative error below 1e-6, and 0 far out. Made to be vectorised. */
INLINE float exp_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float turns = clamped * 1.44269504f;
    int32_t whole = (int32_t)(turns - 0.5f); /* towards zero, so to the nearest for what is below zero */
    float rest = clamped - (float)whole * 0.693145752f - (float)whole * 1.42860677e-6f;
    float sum = 1.3981999e-3f;
    sum = sum * rest + 8.3334520e-3f;
    sum = sum * rest + 4.1665795e-2f;
    sum = sum * rest + 1.6666665e-1f;
    sum = sum * rest + 0.5f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits = (whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

#endif
