/* Products of a tile of rows with one vector or a few, for each format of weights. */
#ifndef STREAMCHAT_TILES_H
#define STREAMCHAT_TILES_H

#include "operations.h"
#include "round.h"

enum { TILE = 16, BLOCK_BYTES = 320, MOST_ROWS = 4, MOST_WIDE = 8, CHAINS = 4, AHEAD = 8192 };

#if defined(__clang__)
#define KEEP_LOOP _Pragma("clang loop unroll(disable)")
#else
#define KEEP_LOOP _Pragma("GCC unroll 1") /* gcc would load too early, and run out of registers */
#endif

/* Layout of one group (32 columns) of 16 int4 rows: 256 bytes of codes, then 16 (scale, zero) pairs in bfloat16.
 * Each 32-bit word of codes belongs to one row; in the i-th 64 bytes, nibble j of the two halves of a word holds columns
 * 8 i + 2 j and 8 i + 2 j + 1. w = scale * (code - 8) + zero. */

/* Adds products of 32-bit words of codes, shifted to nibble j, with the pair i of `count` vectors. */
INLINE void add_nibbles(Sums *sums, Ints codes, int j, const int32_t *x, int count) {
    Ints nibbles = j ? shift_halves_right(codes, 4 * j) : codes;
    if (j < 3)
        nibbles = and_ints(nibbles, all_ints(0x000f000f));
    for (int n = 0; n < count; n++)
        sums[n] = dot_pairs(sums[n], nibbles, all_ints(x[j * count + n]));
}

/* Adds the share of a group: scale * (codes x - 8 sum x) + zero * sum x, with the rounded x. */
INLINE void add_group(Floats *total, const Sums *sums, const uint8_t *both, const float *scales, int count) {
    Ints pairs = load_ints(both);
    Floats scale = floats_of_bits(shift_left(pairs, 16)), zero = floats_of_bits(and_ints(pairs, all_ints(-65536)));
    zero = add_product(zero, scale, all_floats(-8.0f));
    for (int n = 0; n < count; n++) {
        Floats dot = to_floats(lane_sums(sums[n])) * all_floats(scales[n]);
        total[n] = add_product(add_product(total[n], scale, dot), zero, all_floats(scales[count + n]));
    }
}

/* Multiplies LANES rows with a panel of `count` vectors. */
INLINE void int4_part(const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    Floats total[MOST_WIDE];
    for (int n = 0; n < count; n++)
        total[n] = all_floats(0.0f);
    for (long g = 0; g < groups; g++, tile += BLOCK_BYTES, x += PANEL_WORDS * count) {
        Sums sums[MOST_WIDE];
        for (int n = 0; n < count; n++)
            sums[n] = no_sums();
        KEEP_LOOP
        for (int i = 0; i < 4; i++) {
            Ints codes = load_ints(tile + 64 * i);
            for (int j = 0; j < 4; j++)
                add_nibbles(sums, codes, j, x + 4 * i * count, count);
        }
        add_group(total, sums, tile + 256, (const float *)(x + WORDS * count), count);
    }
    for (int n = 0; n < count; n++)
        store_floats(out + n * TILE, total[n]);
}

/* The product with one vector takes the tile in the order of its memory, from which it mostly comes: several sums hide the
 * latency of adds, and prefetching that of the memory. out: (16). */
INLINE void int4_tile_of_one(const uint8_t *tile, const int32_t *x, long groups, float *out) {
    Floats total[TILE / LANES];
    for (int r = 0; r < TILE / LANES; r++)
        total[r] = all_floats(0.0f);
    for (long g = 0; g < groups; g++, tile += BLOCK_BYTES, x += PANEL_WORDS) {
        Sums sums[TILE / LANES][CHAINS];
        for (int r = 0; r < TILE / LANES; r++)
            for (int c = 0; c < CHAINS; c++)
                sums[r][c] = no_sums();
        for (int line = 0; line < BLOCK_BYTES; line += 64)
            __builtin_prefetch(tile + AHEAD + line);
        for (int i = 0; i < 4; i++)
            for (int r = 0; r < TILE / LANES; r++) {
                Ints codes = load_ints(tile + 64 * i + 4 * LANES * r);
                for (int j = 0; j < 4; j++)
                    add_nibbles(sums[r] + j % CHAINS, codes, j, x + 4 * i, 1);
            }
        for (int r = 0; r < TILE / LANES; r++) {
            for (int c = 1; c < CHAINS; c++)
                sums[r][0] = add_sums(sums[r][0], sums[r][c]);
            add_group(total + r, sums[r], tile + 256 + 4 * LANES * r, (const float *)(x + WORDS), 1);
        }
    }
    for (int r = 0; r < TILE / LANES; r++)
        store_floats(out + r * LANES, total[r]);
}

/* out: (count, 16). */
INLINE void int4_tile_of(const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    for (int r = 0; r < TILE / LANES; r++)
        int4_part(tile + 4 * LANES * r, x, count, groups, out + LANES * r);
}

/* A panel has up to WIDE vectors. */
static inline void int4_tile(const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {
    switch (count) {
    case 1:
        int4_tile_of_one(tile, x, groups, out);
        break;
    case 2:
        int4_tile_of(tile, x, 2, groups, out);
        break;
    case 3:
        int4_tile_of(tile, x, 3, groups, out);
        break;
    case 4:
        int4_tile_of(tile, x, 4, groups, out);
        break;
#if !defined(__AVX2__)
    }
#else
    case 5:
        int4_tile_of(tile, x, 5, groups, out);
        break;
    case 6:
        int4_tile_of(tile, x, 6, groups, out);
        break;
    case 7:
        int4_tile_of(tile, x, 7, groups, out);
        break;
    default:
        int4_tile_of(tile, x, 8, groups, out);
    }
#endif
}

/* Multiplies `rows` int8 rows, without their scales, with `count` vectors; out: (count, 16). */
INLINE void int8_rows(const int8_t *row, const Rounded *x, int rows, int count, long columns, float *out) {
    Floats total[MOST_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < count; n++)
            total[r][n] = all_floats(0.0f);
    for (long first = 0; first < columns; first += WIDE_GROUP) {
        long last = first + WIDE_GROUP < columns ? first + WIDE_GROUP : columns;
        Sums sums[MOST_ROWS][4];
        for (int line = 0; count == 1 && line < WIDE_GROUP; line += 64)
            __builtin_prefetch(row + first + AHEAD + line);
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < count; n++)
                sums[r][n] = no_sums();
        KEEP_LOOP
        for (long k = first; k < last; k += 2 * LANES) {
            Ints w[MOST_ROWS];
            for (int r = 0; r < rows; r++)
                w[r] = widen_bytes(row + r * columns + k);
            for (int n = 0; n < count; n++) {
                Ints codes = load_ints(x[n].codes + k);
                for (int r = 0; r < rows; r++)
                    sums[r][n] = dot_pairs(sums[r][n], w[r], codes);
            }
        }
        for (int n = 0; n < count; n++) {
            Floats scale = all_floats(x[n].scales[first / WIDE_GROUP]);
            for (int r = 0; r < rows; r++)
                total[r][n] = add_product(total[r][n], to_floats(lane_sums(sums[r][n])), scale);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < count; n++)
            out[n * TILE + r] = sum_of(total[r][n]);
}

/* Multiplies up to 16 int8 rows with all vectors. */
static inline void int8_tile(const int8_t *rows, const bfloat16 *scales, int count_rows, const Rounded *x, int count,
                             long columns, float *out) {
    int n = 0;
    for (; n + 4 <= count; n += 4) {
        int r = 0;
        for (; r + ROWS <= count_rows; r += ROWS)
            int8_rows(rows + r * columns, x + n, ROWS, 4, columns, out + n * TILE + r);
        for (; r < count_rows; r++)
            int8_rows(rows + r * columns, x + n, 1, 4, columns, out + n * TILE + r);
    }
    /* memory is read fastest in its order */
    for (; n < count; n++)
        for (int r = 0; r < count_rows; r++)
            int8_rows(rows + r * columns, x + n, 1, 1, columns, out + n * TILE + r);
    for (n = 0; n < count; n++)
        for (int r = 0; r < count_rows; r++)
            out[n * TILE + r] *= from_bfloat16(scales[r]);
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
