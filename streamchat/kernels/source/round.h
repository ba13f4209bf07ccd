/* Vectors rounded to 16-bit integers, in groups of 32 with a scale each. This is finer than bfloat16 for the larger
 * elements of a group, and 16-bit integers are multiplied faster than floats. (8 bits are faster still, but cost
 * quality: docs/speed.md.)
 *
 * Up to WIDE vectors form a panel. For each group, it has: 16 words of each vector, which are pairs of neighboring
 * columns, in the order (word, vector); the scales of the vectors; the sums of their rounded elements.
 */
#ifndef STREAMCHAT_ROUND_H
#define STREAMCHAT_ROUND_H

#include "lanes.h"

enum { GROUP = 32, WORDS = 16, PANEL_WORDS = 18 };

/* Words of a vector in a panel. */
static inline long panel_words(long columns) { return columns / GROUP * PANEL_WORDS; }

/* Bits of the largest magnitude of 32 elements; bits are ordered like magnitudes, inf and NaN above all others. */
INLINE uint32_t largest_bits(const float *from) {
    uint32_t largest = 0;
    for (int k = 0; k < GROUP; k++) {
        uint32_t size = bits_of(from[k]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* Factor that maps `most` to `limit`; 0 for vanishing numbers, and for inf and NaN, whose scale shows in the result. */
INLINE float inverse_of(float most, float limit) { return most > 1e-30f ? limit / most : 0.0f; }

INLINE int16_t nearest(float x) { return (int16_t)(int32_t)(x + __builtin_copysignf(0.5f, x)); }

/* Rounds 32 elements; returns their sum. */
INLINE int32_t round_group(const float *from, float inverse, int16_t *codes) {
    int32_t sum = 0;
    for (int k = 0; k < GROUP; k++) {
        codes[k] = nearest(from[k] * inverse);
        sum += codes[k];
    }
    return sum;
}

/* Stands for vanishing numbers, and for inf and NaN, which are not converted to integers. */
INLINE int32_t no_codes(int16_t *codes) {
    memset(codes, 0, sizeof *codes * GROUP);
    return 0;
}

/* Rounds `count` vectors of `columns` elements to a panel. */
INLINE void round_panel(const float *from, int count, long columns, int32_t *panel) {
    for (long g = 0; g < columns / GROUP; g++, panel += PANEL_WORDS * count)
        for (int n = 0; n < count; n++) {
            const float *group = from + n * columns + g * GROUP;
            int16_t codes[GROUP];
            int32_t words[WORDS];
            float most = float_of(largest_bits(group)), scale = most / 32767.0f, inverse = inverse_of(most, 32767.0f);
            float sum = scale * (float)(inverse > 0.0f ? round_group(group, inverse, codes) : no_codes(codes));
            memcpy(words, codes, sizeof words);
            for (int i = 0; i < WORDS; i++)
                panel[i * count + n] = words[i];
            memcpy(panel + WORDS * count + n, &scale, sizeof scale);
            memcpy(panel + (WORDS + 1) * count + n, &sum, sizeof sum);
        }
}

#endif
