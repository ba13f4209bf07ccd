/* Heads of keys and values as they are cached: numbers, or codes of 8 or 4 bits with a bfloat16 scale for each head.
 *
 * A head is turned by a Hadamard matrix before it is rounded. INT8: a signed byte per number. INT4: code + 8 in 4 bits;
 * the low bits of a byte belong to the first half of the head. The scale is that of the largest number, or the best of
 * several smaller ones, with which the largest numbers are clipped.
 */
#ifndef STREAMCHAT_CODES_H
#define STREAMCHAT_CODES_H

#include "attention.h"
#include "lanes.h"

enum { ZERO = 8, SHARES = 4 };

/* Multiplies `x` by an orthogonal Hadamard matrix, in parts of the largest power of two that divides `dim`. The inverse
 * is the same. Each step adds neighbors, and puts sums before differences, so that compilers can vectorize all steps. No
 * sum is larger than the norm of the part, as `x` is multiplied by the factor of the matrix first. */
INLINE void turn(float *x, int dim) {
    float other[MAX_DIM];
    int part = dim & -dim, half = part / 2;
    float factor = 1.0f / __builtin_sqrtf((float)part);
    SIMD
    for (int d = 0; d < dim; d++)
        x[d] *= factor;
    for (int first = 0; first < dim; first += part) {
        float *from = x + first, *to = other;
        for (int size = 1; size < part; size *= 2) {
            SIMD
            for (int d = 0; d < half; d++) {
                float low = from[2 * d], high = from[2 * d + 1];
                to[d] = low + high;
                to[d + half] = low - high;
            }
            float *last = from;
            from = to;
            to = last;
        }
        if (from == other)
            memcpy(x + first, other, sizeof(float) * (size_t)part);
    }
}

/* Smallest bfloat16 that is not below `x` >= 0; inf and NaN stay. */
INLINE bfloat16 rounded_up(float x) {
    uint32_t bits = bits_of(x);
    return bits >= 0x7f800000u ? (bits > 0x7f800000u ? 0x7fc0 : 0x7f80) : (bfloat16)((bits + 0xffffu) >> 16);
}

/* Rounds a turned head to integers from -limit - 1 to limit with `scale`. */
INLINE void round_with(const float *x, int dim, bfloat16 scale, float limit, int8_t *codes) {
    float inverse = scale && scale < 0x7f80 ? 1.0f / from_bfloat16(scale) : 0.0f;
    for (int d = 0; d < dim; d++) {
        float code = inverse > 0.0f ? __builtin_rintf(x[d] * inverse) : 0.0f;
        code = code > limit ? limit : code;
        codes[d] = (int8_t)(code < -limit - 1.0f ? -limit - 1.0f : code);
    }
}

/* Turns and rounds a head, which it changes; returns the scale. A head with inf or NaN gets such a scale.
 * searches: take the scale with the least squared error. */
INLINE bfloat16 round_head(float *x, int dim, int format, int searches, char *to) {
    static const float shares[SHARES] = {1.0f, 0.9f, 0.8f, 0.7f};
    float largest = 0.0f, least = 0.0f, limit = format == INT8 ? 127.0f : 7.0f;
    uint32_t most = 0;
    bfloat16 best = 0;
    int8_t codes[MAX_DIM], found[MAX_DIM];
    turn(x, dim);
    for (int d = 0; d < dim; d++) {
        uint32_t size = bits_of(x[d]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    largest = float_of(most);
    if (!searches) {
        best = largest < 1e-30f ? 0 : rounded_up(largest / limit);
        round_with(x, dim, best, limit, codes);
    }
    for (int i = 0; searches && i < SHARES; i++) {
        bfloat16 scale = largest < 1e-30f ? 0 : rounded_up(largest * shares[i] / limit);
        float exact = from_bfloat16(scale), error = 0.0f;
        round_with(x, dim, scale, limit, found);
        SIMD_SUM(error)
        for (int d = 0; d < dim; d++) {
            float off = x[d] - exact * found[d];
            error += off * off;
        }
        if (i == 0 || error < least) { /* false for NaN */
            least = error;
            best = scale;
            memcpy(codes, found, (size_t)dim);
        }
    }
    if (format == INT8)
        memcpy(to, codes, (size_t)dim);
    else
        for (int d = 0; d < dim / 2; d++)
            to[d] = (char)((codes[d] + ZERO) | (codes[d + dim / 2] + ZERO) << 4);
    return best;
}

/* Stores a head, which it may change. searches: see `round_head`. scale: where its scale belongs. */
INLINE void encode_head(float *x, int dim, int format, int searches, char *to, uint16_t *scale) {
    if (has_scales(format))
        *scale = round_head(x, dim, format, searches, to);
    else if (format == BFLOAT16)
        for (int d = 0; d < dim; d++)
            ((bfloat16 *)to)[d] = to_bfloat16(x[d]);
    else if (format == FLOAT16)
        for (int d = 0; d < dim; d++)
            ((float16 *)to)[d] = to_float16(x[d]);
    else
        memcpy(to, x, sizeof(float) * (size_t)dim);
}

/* The numbers of `count` heads in float32, still turned. */
INLINE void widen_heads(const char *codes, const bfloat16 *scales, int format, int count, int dim, float *out) {
    for (int j = 0; j < count; j++) {
        float scale = from_bfloat16(scales[j]), *row = out + (long)j * dim;
        if (format == INT8) {
            const int8_t *from = (const int8_t *)codes + (long)j * dim;
            SIMD
            for (int d = 0; d < dim; d++)
                row[d] = scale * from[d];
        } else {
            const uint8_t *from = (const uint8_t *)codes + (long)j * dim / 2;
            SIMD
            for (int d = 0; d < dim / 2; d++) {
                row[d] = scale * (float)((from[d] & 15) - ZERO);
                row[d + dim / 2] = scale * (float)((from[d] >> 4) - ZERO);
            }
        }
    }
}

#endif
