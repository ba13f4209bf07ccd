/* Products of a tile of rows with one vector or a few, for each format of weights. */
#ifndef STREAMCHAT_TILES_H
#define STREAMCHAT_TILES_H

#include "products.h"
#include "round.h"

enum { MOST_WIDE = 8, CHAINS = 4, AHEAD = 8192 };

#if defined(__clang__)
#define KEEP_LOOP _Pragma("clang loop unroll(disable)")
#else
#define KEEP_LOOP _Pragma("GCC unroll 1") /* gcc would load too early, and run out of registers */
#endif

/* Layout of one group (32 columns) of 16 rows:
 * int4: 256 bytes of codes, then 16 (scale, zero) pairs in bfloat16. Each 32-bit word of codes belongs to one row; in
 * the i-th 64 bytes, nibble j of the two halves of a word holds columns 8 i + 2 j and 8 i + 2 j + 1.
 * w = scale * (code - 8) + zero.
 * int8: 512 bytes of codes, then 16 scales in float16. The i-th 32 bytes hold columns 2 i and 2 i + 1 of each row.
 * w = scale * code. */
enum { INT4_CODES = 256, INT8_CODES = 512, INT4_BLOCK = 320, INT8_BLOCK = 544 };

INLINE long block_bytes(int bits) { return bits == 4 ? INT4_BLOCK : INT8_BLOCK; }

/* Returns codes of LANES rows from `row` on, as pairs of 16-bit integers: columns 8 i + 2 j and 8 i + 2 j + 1. */
INLINE Ints unpack(int bits, const uint8_t *block, int row, int i, int j) {
    if (bits == 8)
        return widen_bytes((const int8_t *)block + 32 * (4 * i + j) + 2 * row);
    Ints codes = load_ints(block + 64 * i + 4 * row);
    Ints nibbles = j ? shift_halves_right(codes, 4 * j) : codes;
    return j < 3 ? and_ints(nibbles, all_ints(0x000f000f)) : nibbles;
}

/* Adds products of pairs of codes with the same pairs of `count` vectors. */
INLINE void add_pairs(Sums *sums, Ints codes, const int32_t *x, int count) {
    for (int n = 0; n < count; n++)
        sums[n] = dot_pairs(sums[n], codes, all_ints(x[n]));
}

/* Adds the share of a group to the totals of LANES rows, with the rounded x: scale * codes x for int8, scale * (codes x
 * - 8 sum x) + zero * sum x for int4. scales: of the vectors, then the sums of their rounded elements. */
INLINE void add_group(Floats *total, const Sums *sums, int bits, const uint8_t *block, int row, const float *scales,
                      int count) {
    if (bits == 8) {
        Floats scale = floats_of_halves(block + INT8_CODES + 2 * row);
        for (int n = 0; n < count; n++)
            total[n] = add_product(total[n], scale, to_floats(lane_sums(sums[n])) * all_floats(scales[n]));
        return;
    }
    Ints pairs = load_ints(block + INT4_CODES + 4 * row);
    Floats scale = floats_of_bits(shift_left(pairs, 16)), zero = floats_of_bits(and_ints(pairs, all_ints(-65536)));
    zero = add_product(zero, scale, all_floats(-8.0f));
    for (int n = 0; n < count; n++) {
        Floats dot = to_floats(lane_sums(sums[n])) * all_floats(scales[n]);
        total[n] = add_product(add_product(total[n], scale, dot), zero, all_floats(scales[count + n]));
    }
}

/* Multiplies LANES rows with a panel of `count` vectors. */
INLINE void multiply_lanes(int bits, const uint8_t *tile, int row, const int32_t *x, int count, long groups,
                           float *out) {
    Floats total[MOST_WIDE];
    for (int n = 0; n < count; n++)
        total[n] = all_floats(0.0f);
    for (long g = 0; g < groups; g++, tile += block_bytes(bits), x += PANEL_WORDS * count) {
        Sums sums[MOST_WIDE];
        for (int n = 0; n < count; n++)
            sums[n] = no_sums();
        KEEP_LOOP
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                add_pairs(sums, unpack(bits, tile, row, i, j), x + (4 * i + j) * count, count);
        add_group(total, sums, bits, tile, row, (const float *)(x + WORDS * count), count);
    }
    for (int n = 0; n < count; n++)
        store_floats(out + n * TILE, total[n]);
}

/* The product with one vector mostly waits for memory, so it reads the tile in order and prefetches. Several sums hide
 * the latency of additions. out: (16). */
INLINE void multiply_one(int bits, const uint8_t *tile, const int32_t *x, long groups, float *out) {
    Floats total[TILE / LANES];
    for (int r = 0; r < TILE / LANES; r++)
        total[r] = all_floats(0.0f);
    for (long g = 0; g < groups; g++, tile += block_bytes(bits), x += PANEL_WORDS) {
        Sums sums[TILE / LANES][CHAINS];
        for (int r = 0; r < TILE / LANES; r++)
            for (int c = 0; c < CHAINS; c++)
                sums[r][c] = no_sums();
        for (int line = 0; line < block_bytes(bits); line += 64)
            __builtin_prefetch(tile + AHEAD + line);
        for (int i = 0; i < 4; i++)
            for (int r = 0; r < TILE / LANES; r++)
                for (int j = 0; j < 4; j++)
                    add_pairs(sums[r] + j % CHAINS, unpack(bits, tile, LANES * r, i, j), x + 4 * i + j, 1);
        for (int r = 0; r < TILE / LANES; r++) {
            for (int c = 1; c < CHAINS; c++)
                sums[r][0] = add_sums(sums[r][0], sums[r][c]);
            add_group(total + r, sums[r], bits, tile, LANES * r, (const float *)(x + WORDS), 1);
        }
    }
    for (int r = 0; r < TILE / LANES; r++)
        store_floats(out + r * LANES, total[r]);
}

/* out: (count, 16). */
INLINE void multiply_panel(int bits, const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    for (int r = 0; r < TILE; r += LANES)
        multiply_lanes(bits, tile, r, x, count, groups, out + r);
}

/* A panel has up to WIDE vectors. */
INLINE void quantized_tile(int bits, const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    switch (count) {
    case 1:
        multiply_one(bits, tile, x, groups, out);
        break;
    case 2:
        multiply_panel(bits, tile, x, 2, groups, out);
        break;
    case 3:
        multiply_panel(bits, tile, x, 3, groups, out);
        break;
    case 4:
        multiply_panel(bits, tile, x, 4, groups, out);
        break;
#if defined(__AVX512BW__)
    case 5:
        multiply_panel(bits, tile, x, 5, groups, out);
        break;
    case 6:
        multiply_panel(bits, tile, x, 6, groups, out);
        break;
    case 7:
        multiply_panel(bits, tile, x, 7, groups, out);
        break;
    case 8:
        multiply_panel(bits, tile, x, 8, groups, out);
        break;
#endif
    }
}

static NOINLINE void int4_tile(const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    quantized_tile(4, tile, x, count, groups, out);
}

static NOINLINE void int8_tile(const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    quantized_tile(8, tile, x, count, groups, out);
}

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
