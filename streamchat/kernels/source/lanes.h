/* Vector registers of each instruction set: LANES 32-bit lanes, and the few operations that the products need.
 *
 * A lane of Ints may also hold two 16-bit integers. Floats support the operators of C.
 */
#ifndef STREAMCHAT_LANES_H
#define STREAMCHAT_LANES_H

#include "common.h"

/* How much a product computes at once, so that its sums stay in registers. ROWS:
 * registers of rows; WIDE: vectors of a panel.
 * DOWN: rows of attention's products. */
#if defined(__AVX512BW__)
enum { LANES = 16, ROWS = 1, WIDE = 8, DOWN = 8 };
typedef __m512i Ints;
typedef __m512 Floats;

INLINE Ints load_ints(const void *from) { return _mm512_loadu_si512(from); }
INLINE Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints and_ints(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE Ints shift_halves_right(Ints x, int bits) { return _mm512_srli_epi16(x, (unsigned)bits); }
INLINE Ints widen_bytes(const int8_t *from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from)); }
INLINE Ints ints_of_bytes(const uint8_t *from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE Ints ints_of_signed(const uint8_t *from) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE Floats all_floats(float x) { return _mm512_set1_ps(x); }
INLINE Floats floats_of_halves(const void *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE void store_ints(void *to, Ints x) { _mm512_storeu_si512(to, x); }
INLINE Ints interleave_low(Ints a, Ints b) { return _mm512_unpacklo_epi16(a, b); }
INLINE Ints interleave_high(Ints a, Ints b) { return _mm512_unpackhi_epi16(a, b); }
INLINE Ints add_neighbors(Ints a, Ints b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
INLINE Ints add_twos(Ints a, Ints b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
INLINE Ints add_quarters(Ints a, Ints b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
INLINE Ints sums_of_each(const Ints *x) {
    Ints four[4];
    for (int i = 0; i < 4; i++)
        four[i] = add_twos(add_neighbors(x[4 * i], x[4 * i + 1]), add_neighbors(x[4 * i + 2], x[4 * i + 3]));
    return add_quarters(add_quarters(four[0], four[1]), add_quarters(four[2], four[3]));
}

#if defined(__AVX512VNNI__)
INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
#else
INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
enum { LANES = 8, ROWS = 2, WIDE = 6, DOWN = 6 };
typedef __m256i Ints;
typedef __m256 Floats;

INLINE Ints load_ints(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE Ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints and_ints(Ints a, Ints b) { return _mm256_and_si256(a, b); }
INLINE Ints shift_halves_right(Ints x, int bits) { return _mm256_srli_epi16(x, bits); }
INLINE Ints widen_bytes(const int8_t *from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)); }
INLINE Ints ints_of_bytes(const uint8_t *from) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
INLINE Ints ints_of_signed(const uint8_t *from) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
INLINE Floats all_floats(float x) { return _mm256_set1_ps(x); }
INLINE Floats floats_of_halves(const void *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
INLINE Floats add_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store_floats(float *to, Floats x) { _mm256_storeu_ps(to, x); }
INLINE float sum_of(Floats x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
INLINE void store_ints(void *to, Ints x) { _mm256_storeu_si256((__m256i *)to, x); }
INLINE Ints interleave_low(Ints a, Ints b) { return _mm256_unpacklo_epi16(a, b); }
INLINE Ints interleave_high(Ints a, Ints b) { return _mm256_unpackhi_epi16(a, b); }
INLINE Ints sums_of_each(const Ints *x) {
    Ints low = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
    Ints high = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

#if defined(__AVXVNNI__)
INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
#else
INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#endif

#elif defined(NEON)
enum { LANES = 4, ROWS = 1, WIDE = 4, DOWN = 8 };
typedef int32x4_t Ints;
typedef float32x4_t Floats;

INLINE Ints load_ints(const void *from) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)from)); }
INLINE Ints all_ints(int32_t x) { return vdupq_n_s32(x); }
INLINE Ints and_ints(Ints a, Ints b) { return vandq_s32(a, b); }
INLINE Ints shift_halves_right(Ints x, int bits) {
    return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(x), vdupq_n_s16((int16_t)-bits)));
}
INLINE Ints widen_bytes(const int8_t *from) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(from))); }
INLINE Ints ints_of_bytes(const uint8_t *from) {
    uint32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))));
}
INLINE Ints ints_of_signed(const uint8_t *from) {
    uint32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes))));
}
INLINE Floats all_floats(float x) { return vdupq_n_f32(x); }
INLINE Floats floats_of_halves(const void *from) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)from)));
}
INLINE Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
INLINE Floats add_product(Floats sum, Floats a, Floats b) { return vfmaq_f32(sum, a, b); }
INLINE Floats load_floats(const float *from) { return vld1q_f32(from); }
INLINE void store_floats(float *to, Floats x) { vst1q_f32(to, x); }
INLINE float sum_of(Floats x) { return vaddvq_f32(x); }
INLINE void store_ints(void *to, Ints x) { vst1q_u8((uint8_t *)to, vreinterpretq_u8_s32(x)); }
INLINE Ints interleave_low(Ints a, Ints b) {
    return vreinterpretq_s32_s16(vzip1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
INLINE Ints interleave_high(Ints a, Ints b) {
    return vreinterpretq_s32_s16(vzip2q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
INLINE Ints sums_of_each(const Ints *x) { return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])); }

/* The two products of a lane are neighbors in one of the registers. */
typedef struct {
    int32x4_t low, high;
} Sums;

INLINE Sums no_sums(void) { return (Sums){vdupq_n_s32(0), vdupq_n_s32(0)}; }
INLINE Sums dot_pairs(Sums sums, Ints a, Ints b) {
    int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return (Sums){vmlal_s16(sums.low, vget_low_s16(x), vget_low_s16(y)), vmlal_high_s16(sums.high, x, y)};
}
INLINE Sums add_sums(Sums a, Sums b) { return (Sums){vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
INLINE Ints lane_sums(Sums sums) { return vpaddq_s32(sums.low, sums.high); }

#else
enum { LANES = 4, ROWS = 1, WIDE = 4, DOWN = 4 };
typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
typedef int16_t Halves __attribute__((vector_size(16)));

INLINE Ints load_ints(const void *from) {
    Ints x;
    memcpy(&x, from, sizeof x);
    return x;
}
INLINE Ints all_ints(int32_t x) { return (Ints){x, x, x, x}; }
INLINE Ints add_ints(Ints a, Ints b) { return a + b; }
INLINE Ints and_ints(Ints a, Ints b) { return a & b; }
INLINE Ints shift_halves_right(Ints x, int bits) { return (x >> bits) & all_ints((0xffff >> bits) * 0x10001); }
INLINE Ints widen_bytes(const int8_t *from) {
    Halves x;
    for (int i = 0; i < 8; i++)
        x[i] = from[i];
    return (Ints)x;
}
INLINE Ints ints_of_bytes(const uint8_t *from) { return (Ints){from[0], from[1], from[2], from[3]}; }
INLINE Ints ints_of_signed(const uint8_t *from) {
    return (Ints){(int8_t)from[0], (int8_t)from[1], (int8_t)from[2], (int8_t)from[3]};
}
INLINE Floats all_floats(float x) { return (Floats){x, x, x, x}; }
INLINE Floats floats_of_halves(const void *from) {
    float16 x[4];
    memcpy(x, from, sizeof x);
    return (Floats){from_float16(x[0]), from_float16(x[1]), from_float16(x[2]), from_float16(x[3])};
}
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }
INLINE Floats load_floats(const float *from) { return (Floats)load_ints(from); }
INLINE void store_floats(float *to, Floats x) { memcpy(to, &x, sizeof x); }
INLINE float sum_of(Floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }
INLINE void store_ints(void *to, Ints x) { memcpy(to, &x, sizeof x); }
INLINE Ints interleave_low(Ints a, Ints b) {
    Halves x = (Halves)a, y = (Halves)b;
    return (Ints)(Halves){x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]};
}
INLINE Ints interleave_high(Ints a, Ints b) {
    Halves x = (Halves)a, y = (Halves)b;
    return (Ints)(Halves){x[4], y[4], x[5], y[5], x[6], y[6], x[7], y[7]};
}
INLINE Ints sums_of_each(const Ints *x) {
    Ints sums;
    for (int i = 0; i < 4; i++)
        sums[i] = x[i][0] + x[i][1] + x[i][2] + x[i][3];
    return sums;
}
INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) {
    Halves x = (Halves)a, y = (Halves)b;
    for (int i = 0; i < 4; i++)
        sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return sum;
}
#endif

#if !defined(NEON)
typedef Ints Sums;

INLINE Sums no_sums(void) { return all_ints(0); }
INLINE Sums add_sums(Sums a, Sums b) { return add_ints(a, b); }
INLINE Ints lane_sums(Sums sums) { return sums; }
#endif

/* Returns `sums`, but compilers cannot reorder additions across it: gcc would add in trees, and run out of registers. */
INLINE Sums in_register(Sums sums) {
#if defined(__AVX2__)
    __asm__("" : "+x"(sums));
#endif
    return sums;
}

/* Where the 16-bit integer `n` of a register is after interleave_low, LANES 32-bit lanes, and interleave_high. */
INLINE int interleaved_place(int n) { return n / 4 % 2 * LANES + n / 8 * 4 + n % 4; }

/* dot_pairs(sums, a, b): adds a[0] b[0] + a[1] b[1] of the 16-bit integers of each lane; lane_sums returns the sums.
 * add_product(sum, a, b) = sum + a * b. floats_of_halves(from) reads LANES numbers in float16, ints_of_bytes and
 * ints_of_signed read LANES bytes. interleave_low and interleave_high pair the 16-bit integers of a and b: those of all
 * lower and of all upper halves of 128 bits. sums_of_each(x): lane i is the sum of the lanes of x[i], for LANES x. */

#endif
