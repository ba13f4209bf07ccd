/* Products of a tile of rows with one vector or a few, for each format of weights and instruction set.
 *
 * For 4 and 8-bit weights, vectors are rounded to 16-bit integers in groups of 32, each with its own scale. This is
 * finer than bfloat16 for the larger elements of a group, and AVX2 and AVX-512 multiply 16 and 32 such integers at once.
 */
#ifndef STREAMCHAT_TILES_H
#define STREAMCHAT_TILES_H

#include "operations.h"

enum { GROUP = 32, TILE = 16, BLOCK_BYTES = 320 };

/* Memory of a rounded vector, in floats: its integers, and a scale and a sum per group. */
static long rounded_floats(long columns) { return columns / 2 + 2 * (columns / GROUP); }

typedef struct {
    int16_t *codes; /* (columns) */
    float *scales;  /* (columns / 32) */
    float *sums;    /* (columns / 32): sums of the rounded elements */
} Rounded;

static void round_group(const float *from, Rounded to, long g) {
    int16_t *codes = to.codes + g * GROUP;
    uint32_t largest = 0; /* magnitude; bit patterns are ordered like magnitudes, inf and NaN above all others */
    for (int k = 0; k < GROUP; k++) {
        uint32_t size = bits_of(from[k]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    float most = float_of(largest), inverse = most > 1e-30f ? 32767.0f / most : 0.0f;
    int32_t sum = 0;
    for (int k = 0; k < GROUP; k++) {
        float code = from[k] * inverse;
        int32_t whole = (int32_t)(code + __builtin_copysignf(0.5f, code));
        codes[k] = (int16_t)whole;
        sum += whole;
    }
    to.scales[g] = most / 32767.0f;
    to.sums[g] = to.scales[g] * (float)sum;
}

/* Layout of one group (32 columns) of 16 int4 rows: 256 bytes of codes, then 16 (scale, zero) pairs in bfloat16.
 * Each 32-bit word of codes belongs to one row; in the i-th 64 bytes, nibble j of the two halves of a word holds columns
 * 8 i + 2 j and 8 i + 2 j + 1. w = scale * (code - 8) + zero. */
#if defined(__AVX512BW__)
INLINE __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

/* Adds the share of a group: scale * (codes x - 8 sum x) + zero * sum x, with the rounded x. */
INLINE __m512 add_group(__m512 total, __m512i sums, const uint8_t *both, Rounded x, long g) {
    __m512i pairs = _mm512_loadu_si512(both);
    __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
    __m512 sum = _mm512_set1_ps(x.sums[g]);
    __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(x.scales[g]));
    dot = _mm512_fnmadd_ps(_mm512_set1_ps(8.0f), sum, dot);
    return _mm512_fmadd_ps(zero, sum, _mm512_fmadd_ps(scale, dot, total));
}

INLINE void int4_tile(const uint8_t *block, Rounded x, long groups, float *out) {
    const __m512i mask = _mm512_set1_epi16(15);
    __m512 total = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++, block += BLOCK_BYTES) {
        const int32_t *pairs = (const int32_t *)(x.codes + g * GROUP);
        __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a; /* four independent sums hide the latency of the adds */
        for (int i = 0; i < 4; i++) {
            __m512i codes = _mm512_loadu_si512(block + 64 * i);
            a = add_pairs(a, _mm512_and_si512(codes, mask), _mm512_set1_epi32(pairs[4 * i]));
            b = add_pairs(b, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask), _mm512_set1_epi32(pairs[4 * i + 1]));
            c = add_pairs(c, _mm512_and_si512(_mm512_srli_epi16(codes, 8), mask), _mm512_set1_epi32(pairs[4 * i + 2]));
            d = add_pairs(d, _mm512_srli_epi16(codes, 12), _mm512_set1_epi32(pairs[4 * i + 3]));
        }
        total = add_group(total, _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)), block + 256, x, g);
    }
    _mm512_storeu_ps(out, total);
}

/* Four vectors at once, so that codes are unpacked once. */
#define FOUR_AT_ONCE
INLINE void int4_tile_four(const uint8_t *block, const Rounded *x, long groups, float *out, long out_stride) {
    const __m512i mask = _mm512_set1_epi16(15);
    __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long g = 0; g < groups; g++, block += BLOCK_BYTES) {
        __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int i = 0; i < 4; i++) {
            __m512i codes = _mm512_loadu_si512(block + 64 * i);
            for (int j = 0; j < 4; j++) {
                __m512i four_bits = _mm512_and_si512(codes, mask);
                for (int n = 0; n < 4; n++) {
                    const int32_t *pairs = (const int32_t *)(x[n].codes + g * GROUP);
                    sums[n] = add_pairs(sums[n], four_bits, _mm512_set1_epi32(pairs[4 * i + j]));
                }
                codes = _mm512_srli_epi16(codes, 4);
            }
        }
        for (int n = 0; n < 4; n++)
            total[n] = add_group(total[n], sums[n], block + 256, x[n], g);
    }
    for (int n = 0; n < 4; n++)
        _mm512_storeu_ps(out + n * out_stride, total[n]);
}
#elif defined(__AVX2__) && defined(__FMA__)
INLINE __m256i add_pairs(__m256i sum, __m256i codes, int32_t pair) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, _mm256_set1_epi32(pair)));
}

/* Adds the share of a group, as above. */
INLINE __m256 add_group(__m256 total, __m256i sums, const uint8_t *both, Rounded x, long g) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)both);
    __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    __m256 zero = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
    __m256 sum = _mm256_set1_ps(x.sums[g]);
    __m256 dot = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(x.scales[g]));
    dot = _mm256_fnmadd_ps(_mm256_set1_ps(8.0f), sum, dot);
    return _mm256_fmadd_ps(zero, sum, _mm256_fmadd_ps(scale, dot, total));
}

INLINE void int4_tile(const uint8_t *block, Rounded x, long groups, float *out) {
    const __m256i mask = _mm256_set1_epi16(15);
    __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (long g = 0; g < groups; g++, block += BLOCK_BYTES) {
        const int32_t *pairs = (const int32_t *)(x.codes + g * GROUP);
        __m256i a[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, b[2] = {a[0], a[0]};
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++) {
                __m256i codes = _mm256_loadu_si256((const __m256i *)(block + 64 * i + 32 * half));
                a[half] = add_pairs(a[half], _mm256_and_si256(codes, mask), pairs[4 * i]);
                b[half] = add_pairs(b[half], _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), pairs[4 * i + 1]);
                a[half] = add_pairs(a[half], _mm256_and_si256(_mm256_srli_epi16(codes, 8), mask), pairs[4 * i + 2]);
                b[half] = add_pairs(b[half], _mm256_srli_epi16(codes, 12), pairs[4 * i + 3]);
            }
        for (int half = 0; half < 2; half++)
            total[half] = add_group(total[half], _mm256_add_epi32(a[half], b[half]), block + 256 + 32 * half, x, g);
    }
    _mm256_storeu_ps(out, total[0]);
    _mm256_storeu_ps(out + 8, total[1]);
}

#define FOUR_AT_ONCE
INLINE void int4_tile_four(const uint8_t *block, const Rounded *x, long groups, float *out, long out_stride) {
    const __m256i mask = _mm256_set1_epi16(15);
    for (int half = 0; half < 2; half++, block += 32, out += 8) {
        __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        const uint8_t *at = block;
        for (long g = 0; g < groups; g++, at += BLOCK_BYTES) {
            __m256i zero = _mm256_setzero_si256(), sums[4] = {zero, zero, zero, zero};
            for (int i = 0; i < 4; i++) {
                __m256i codes = _mm256_loadu_si256((const __m256i *)(at + 64 * i));
                for (int j = 0; j < 4; j++) {
                    __m256i four_bits = _mm256_and_si256(codes, mask);
                    for (int n = 0; n < 4; n++)
                        sums[n] = add_pairs(sums[n], four_bits, ((const int32_t *)(x[n].codes + g * GROUP))[4 * i + j]);
                    codes = _mm256_srli_epi16(codes, 4);
                }
            }
            for (int n = 0; n < 4; n++)
                total[n] = add_group(total[n], sums[n], at + 256, x[n], g);
        }
        for (int n = 0; n < 4; n++)
            _mm256_storeu_ps(out + n * out_stride, total[n]);
    }
}
#elif defined(NEON)
/* Adds the share of four rows in a group, as above. The sums of a row's even and odd columns are neighbors. */
INLINE float32x4_t add_group(float32x4_t total, int32x4_t low, int32x4_t high, const uint8_t *both, Rounded x, long g) {
    uint32x4_t pairs = vreinterpretq_u32_u8(vld1q_u8(both));
    float32x4_t scale = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    float32x4_t zero = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    float32x4_t dot = vmulq_n_f32(vcvtq_f32_s32(vpaddq_s32(low, high)), x.scales[g]);
    dot = vfmsq_n_f32(dot, vdupq_n_f32(8.0f), x.sums[g]);
    return vfmaq_n_f32(vfmaq_f32(total, scale, dot), zero, x.sums[g]);
}

/* Four rows at a time; `count` vectors, 1 or 4, so that codes are unpacked once. */
INLINE void int4_rows(const uint8_t *block, const Rounded *x, int count, long groups, float *out, long out_stride) {
    const int16x8_t mask = vdupq_n_s16(15);
    for (int four = 0; four < 4; four++, block += 16, out += 4) {
        const uint8_t *at = block;
        float32x4_t total[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
        for (long g = 0; g < groups; g++, at += BLOCK_BYTES) {
            int32x4_t none = vdupq_n_s32(0), low[4] = {none, none, none, none}, high[4] = {none, none, none, none};
            for (int i = 0; i < 4; i++) {
                uint16x8_t codes = vreinterpretq_u16_u8(vld1q_u8(at + 64 * i));
                for (int j = 0; j < 4; j++) {
                    int16x8_t four_bits = vandq_s16(vreinterpretq_s16_u16(codes), mask);
                    for (int n = 0; n < count; n++) {
                        const int32_t *pairs = (const int32_t *)(x[n].codes + g * GROUP);
                        int16x8_t pair = vreinterpretq_s16_s32(vdupq_n_s32(pairs[4 * i + j]));
                        low[n] = vmlal_s16(low[n], vget_low_s16(four_bits), vget_low_s16(pair));
                        high[n] = vmlal_high_s16(high[n], four_bits, pair);
                    }
                    codes = vshrq_n_u16(codes, 4);
                }
            }
            for (int n = 0; n < count; n++)
                total[n] = add_group(total[n], low[n], high[n], at + 256, x[n], g);
        }
        for (int n = 0; n < count; n++)
            vst1q_f32(out + n * out_stride, total[n]);
    }
}

INLINE void int4_tile(const uint8_t *block, Rounded x, long groups, float *out) {
    int4_rows(block, &x, 1, groups, out, 0);
}

#define FOUR_AT_ONCE
INLINE void int4_tile_four(const uint8_t *block, const Rounded *x, long groups, float *out, long out_stride) {
    int4_rows(block, x, 4, groups, out, out_stride);
}
#else
INLINE void int4_tile(const uint8_t *block, Rounded x, long groups, float *out) {
    memset(out, 0, sizeof(float) * TILE);
    for (long g = 0; g < groups; g++, block += BLOCK_BYTES) {
        int32_t sum[TILE] = {0};
        uint16_t codes[2 * TILE], both[2 * TILE];
        for (int i = 0; i < 4; i++) {
            memcpy(codes, block + 64 * i, sizeof codes);
            for (int j = 0; j < 4; j++) {
                const int16_t *pair = x.codes + g * GROUP + 8 * i + 2 * j;
                for (int r = 0; r < TILE; r++)
                    sum[r] += ((codes[2 * r] >> (4 * j)) & 15) * pair[0] + ((codes[2 * r + 1] >> (4 * j)) & 15) * pair[1];
            }
        }
        memcpy(both, block + 256, sizeof both);
        for (int r = 0; r < TILE; r++) {
            float dot = x.scales[g] * (float)sum[r] - 8.0f * x.sums[g];
            out[r] += from_bfloat16(both[2 * r]) * dot + from_bfloat16(both[2 * r + 1]) * x.sums[g];
        }
    }
}
#endif

/* Product of an int8 row with a rounded vector, without the row's scale. */
#if defined(__AVX512BW__)
INLINE float int8_row(const int8_t *row, Rounded x, long groups) {
    __m512 total = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(row + g * GROUP)));
        __m512i dots = _mm512_madd_epi16(w, _mm512_loadu_si512(x.codes + g * GROUP));
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_set1_ps(x.scales[g]), total);
    }
    return _mm512_reduce_add_ps(total);
}
#elif defined(__AVX2__) && defined(__FMA__)
INLINE float int8_row(const int8_t *row, Rounded x, long groups) {
    __m256 total = _mm256_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m256i dots = _mm256_setzero_si256();
        for (int half = 0; half < 2; half++) {
            __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + g * GROUP + 16 * half)));
            __m256i codes = _mm256_loadu_si256((const __m256i *)(x.codes + g * GROUP + 16 * half));
            dots = _mm256_add_epi32(dots, _mm256_madd_epi16(w, codes));
        }
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_set1_ps(x.scales[g]), total);
    }
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#elif defined(NEON)
INLINE float int8_row(const int8_t *row, Rounded x, long groups) {
    float32x4_t total = vdupq_n_f32(0.0f);
    for (long g = 0; g < groups; g++) {
        int32x4_t low = vdupq_n_s32(0), high = low;
        for (long k = g * GROUP; k < (g + 1) * GROUP; k += 8) {
            int16x8_t w = vmovl_s8(vld1_s8(row + k)), codes = vld1q_s16(x.codes + k);
            low = vmlal_s16(low, vget_low_s16(w), vget_low_s16(codes));
            high = vmlal_high_s16(high, w, codes);
        }
        total = vfmaq_n_f32(total, vcvtq_f32_s32(vaddq_s32(low, high)), x.scales[g]);
    }
    return vaddvq_f32(total);
}
#else
INLINE float int8_row(const int8_t *row, Rounded x, long groups) {
    float total = 0.0f;
    for (long g = 0; g < groups; g++) {
        int32_t dot = 0;
        SIMD_SUM(dot)
        for (int k = 0; k < GROUP; k++)
            dot += (int32_t)row[g * GROUP + k] * x.codes[g * GROUP + k];
        total += (float)dot * x.scales[g];
    }
    return total;
}
#endif

INLINE float bfloat16_row(const bfloat16 *row, const float *x, long columns) {
    float total = 0.0f;
    SIMD_SUM(total)
    for (long k = 0; k < columns; k++)
        total += from_bfloat16(row[k]) * x[k];
    return total;
}

INLINE float float16_row(const float16 *row, const float *x, long columns) {
    float total = 0.0f;
    SIMD_SUM(total)
    for (long k = 0; k < columns; k++)
        total += from_float16(row[k]) * x[k];
    return total;
}

INLINE float float32_row(const float *row, const float *x, long columns) {
    float total = 0.0f;
    SIMD_SUM(total)
    for (long k = 0; k < columns; k++)
        total += row[k] * x[k];
    return total;
}

#endif
