/* Products of a tile of rows with one vector or a few, for each format of weights. */
#ifndef STREAMCHAT_TILES_H
#define STREAMCHAT_TILES_H

#include "operations.h"
#include "round.h"

enum { TILE = 16, MOST_WIDE = 8, CHAINS = 4, AHEAD = 8192 };

#if defined(__clang__)
#define KEEP_LOOP _Pragma("clang loop unroll(disable)")
#else
#define KEEP_LOOP _Pragma("GCC unroll 1") /* gcc would load too early, and run out of registers */
#endif

/* A tile is 16 rows. For each group of 32 columns it has a block: the codes, then the scales.
 * 4-bit codes: 256 bytes. Each 32-bit word of codes belongs to one row; in the i-th 64 bytes, nibble j of the two
 * halves of a word holds columns 8 i + 2 j and 8 i + 2 j + 1. Codes are 0 to 15.
 * 8-bit codes: 512 bytes of signed codes. The i-th 32 bytes hold columns 2 i and 2 i + 1 of each row.
 * SCALE: 16 scales, in float16. w = scale * code.
 * SCALE_MIN: 16 scales, 16 minimums, in float16. w = scale * code + minimum.
 * SUPER_32: 16 scales, 16 minimums, in 8 bits. Before each 8 blocks, a header has 16 factors for the scales and 16 for
 * the minimums, in float16. w = factor * scale * code - factor of minimums * minimum.
 * SUPER_16: 16 scales of the first 16 columns, 16 of the others, in signed 8 bits. Of the header, the first half is
 * used. w = factor * scale * code. */
enum { SUPERBLOCK = 8, HEADER = 64 };

INLINE long codes_bytes(int bits) { return 64 * bits; }
INLINE long block_bytes(int bits, int scales) { return codes_bytes(bits) + (scales == SCALE_MIN ? 64 : 32); }
INLINE long superblock_bytes(int bits, int scales) { return HEADER + SUPERBLOCK * block_bytes(bits, scales); }

INLINE long tile_bytes(int bits, int scales, long groups) {
    if (scales >= SUPER_32)
        return groups / SUPERBLOCK * superblock_bytes(bits, scales);
    return groups * block_bytes(bits, scales);
}

INLINE const uint8_t *header_of(int bits, int scales, const uint8_t *tile, long group) {
    return tile + group / SUPERBLOCK * superblock_bytes(bits, scales);
}

INLINE const uint8_t *block_of(int bits, int scales, const uint8_t *tile, long group) {
    if (scales >= SUPER_32)
        return header_of(bits, scales, tile, group) + HEADER + group % SUPERBLOCK * block_bytes(bits, scales);
    return tile + group * block_bytes(bits, scales);
}

/* Parts of a group that have scales of their own. */
INLINE int parts_of(int scales) { return scales == SUPER_16 ? 2 : 1; }

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

/* Scales and minimums of LANES rows. */
typedef struct {
    Floats scale, minimum;
} Scales;

/* Returns those of a part of a group, without the factors of its superblock. */
INLINE Scales scales_of(int bits, int scales, const uint8_t *block, int part, int row) {
    const uint8_t *at = block + codes_bytes(bits);
    if (scales == SUPER_32)
        return (Scales){to_floats(ints_of_bytes(at + row)), to_floats(ints_of_bytes(at + TILE + row))};
    if (scales == SUPER_16)
        return (Scales){to_floats(ints_of_signed(at + TILE * part + row)), all_floats(0.0f)};
    return (Scales){floats_of_halves(at + 2 * row),
                    scales == SCALE_MIN ? floats_of_halves(at + 2 * (TILE + row)) : all_floats(0.0f)};
}

/* Returns the factors of the superblock of a group, if there is one; minimums are subtracted. */
INLINE Scales factors_of(int bits, int scales, const uint8_t *tile, long group, int row) {
    const uint8_t *header = header_of(bits, scales, tile, group);
    if (scales < SUPER_32)
        return (Scales){all_floats(1.0f), all_floats(1.0f)};
    return (Scales){floats_of_halves(header + 2 * row), -floats_of_halves(header + 2 * (TILE + row))};
}

/* Adds the share of a part of a group to the totals of LANES rows, with the rounded x: scale * codes x + minimum * sum
 * x. factors: of the superblock, if there is one. x_scales: of the vectors, then the sums of their rounded elements. */
INLINE void add_group(Floats *total, const Sums *sums, int bits, int scales, const uint8_t *block, Scales factors,
                      int part, int row, const float *x_scales, int count) {
    Scales own = scales_of(bits, scales, block, part, row);
    if (scales >= SUPER_32)
        own = (Scales){own.scale * factors.scale, own.minimum * factors.minimum};
    for (int n = 0; n < count; n++) {
        total[n] = add_product(total[n], own.scale, to_floats(lane_sums(sums[n])) * all_floats(x_scales[n]));
        if (scales == SCALE_MIN || scales == SUPER_32)
            total[n] = add_product(total[n], own.minimum, all_floats(x_scales[count + n]));
    }
}

/* Multiplies ROWS registers of rows with a panel of `count` vectors: each word of a vector is loaded once for all. */
INLINE void multiply_rows(int bits, int scales, const uint8_t *tile, int row, const int32_t *x, int count, long groups,
                          float *out) {
    Floats total[ROWS][MOST_WIDE];
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < count; n++)
            total[r][n] = all_floats(0.0f);
    for (long g = 0; g < groups; g++, x += PANEL_WORDS * count) {
        const uint8_t *block = block_of(bits, scales, tile, g);
        for (int part = 0; part < parts_of(scales); part++) {
            Sums sums[ROWS][MOST_WIDE];
            for (int r = 0; r < ROWS; r++)
                for (int n = 0; n < count; n++)
                    sums[r][n] = no_sums();
            KEEP_LOOP
            for (int i = 4 * part / parts_of(scales); i < 4 * (part + 1) / parts_of(scales); i++)
                for (int j = 0; j < 4; j++) {
                    Ints codes[ROWS];
                    for (int r = 0; r < ROWS; r++)
                        codes[r] = unpack(bits, block, row + r * LANES, i, j);
                    for (int n = 0; n < count; n++) {
                        Ints pair = all_ints(x[(4 * i + j) * count + n]);
                        for (int r = 0; r < ROWS; r++)
                            sums[r][n] = in_register(dot_pairs(sums[r][n], codes[r], pair));
                    }
                }
            for (int r = 0; r < ROWS; r++)
                add_group(total[r], sums[r], bits, scales, block, factors_of(bits, scales, tile, g, row + r * LANES),
                          part, row + r * LANES, (const float *)(x + WORDS * count), count);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < count; n++)
            store_floats(out + n * TILE + r * LANES, total[r][n]);
}

/* Adds the products of a group with one vector to the totals of 16 rows. Several sums hide the latency of additions. */
INLINE void add_block(Floats *total, int bits, int scales, const uint8_t *block, const Scales *factors,
                      const int32_t *x) {
    for (int part = 0; part < parts_of(scales); part++) {
        Sums sums[TILE / LANES][CHAINS];
        for (int r = 0; r < TILE / LANES; r++)
            for (int c = 0; c < CHAINS; c++)
                sums[r][c] = no_sums();
        for (int i = 4 * part / parts_of(scales); i < 4 * (part + 1) / parts_of(scales); i++)
            for (int r = 0; r < TILE / LANES; r++)
                for (int j = 0; j < 4; j++)
                    add_pairs(sums[r] + j % CHAINS, unpack(bits, block, LANES * r, i, j), x + 4 * i + j, 1);
        for (int r = 0; r < TILE / LANES; r++) {
            for (int c = 1; c < CHAINS; c++)
                sums[r][0] = add_sums(sums[r][0], sums[r][c]);
            add_group(total + r, sums[r], bits, scales, block, factors[r], part, LANES * r, (const float *)(x + WORDS),
                      1);
        }
    }
}

/* The product with one vector mostly waits for memory, so it reads the tile in order and prefetches. out: (16). */
INLINE void multiply_one(int bits, int scales, const uint8_t *tile, const int32_t *x, long groups, float *out) {
    long each = scales >= SUPER_32 ? SUPERBLOCK : groups;
    Floats total[TILE / LANES];
    for (int r = 0; r < TILE / LANES; r++)
        total[r] = all_floats(0.0f);
    for (long first = 0; first < groups; first += each) {
        const uint8_t *block = block_of(bits, scales, tile, first);
        Scales factors[TILE / LANES];
        for (int r = 0; r < TILE / LANES; r++)
            factors[r] = factors_of(bits, scales, tile, first, LANES * r);
        for (long g = 0; g < each; g++, block += block_bytes(bits, scales), x += PANEL_WORDS) {
            for (int line = 0; line < block_bytes(bits, scales); line += 64)
                __builtin_prefetch(block + AHEAD + line);
            add_block(total, bits, scales, block, factors, x);
        }
    }
    for (int r = 0; r < TILE / LANES; r++)
        store_floats(out + r * LANES, total[r]);
}

/* out: (count, 16). */
INLINE void multiply_panel(int bits, int scales, const uint8_t *tile, const int32_t *x, int count, long groups,
                           float *out) {
    for (int row = 0; row < TILE; row += ROWS * LANES)
        multiply_rows(bits, scales, tile, row, x, count, groups, out + row);
}

/* A panel has up to WIDE vectors. */
INLINE void quantized_tile(int bits, int scales, const uint8_t *tile, const int32_t *x, int count, long groups,
                           float *out) {
    switch (count) {
    case 1:
        multiply_one(bits, scales, tile, x, groups, out);
        break;
    case 2:
        multiply_panel(bits, scales, tile, x, 2, groups, out);
        break;
    case 3:
        multiply_panel(bits, scales, tile, x, 3, groups, out);
        break;
    case 4:
        multiply_panel(bits, scales, tile, x, 4, groups, out);
        break;
#if defined(__AVX2__)
    case 5:
        multiply_panel(bits, scales, tile, x, 5, groups, out);
        break;
    case 6:
        multiply_panel(bits, scales, tile, x, 6, groups, out);
        break;
#endif
#if defined(__AVX512BW__)
    case 7:
        multiply_panel(bits, scales, tile, x, 7, groups, out);
        break;
    case 8:
        multiply_panel(bits, scales, tile, x, 8, groups, out);
        break;
#endif
    }
}

/* One function for each kind of codes and scales that files have. */
typedef void (*TileProduct)(const uint8_t *tile, const int32_t *x, int count, long groups, float *out);

#define TILE_PRODUCT(name, bits, scales)                                                                               \
    static NOINLINE void name(const uint8_t *tile, const int32_t *x, int count, long groups, float *out) {             \
        quantized_tile(bits, scales, tile, x, count, groups, out);                                                     \
    }
TILE_PRODUCT(int4_min, 4, SCALE_MIN)
TILE_PRODUCT(int4_super, 4, SUPER_32)
TILE_PRODUCT(int8_scale, 8, SCALE)
TILE_PRODUCT(int8_min, 8, SCALE_MIN)
TILE_PRODUCT(int8_super, 8, SUPER_32)
TILE_PRODUCT(int8_super_16, 8, SUPER_16)

INLINE TileProduct tile_product(int bits, int scales) {
    static const TileProduct of_4_bits[] = {NULL, int4_min, int4_super, NULL};
    static const TileProduct of_8_bits[] = {int8_scale, int8_min, int8_super, int8_super_16};
    return (bits == 4 ? of_4_bits : of_8_bits)[scales];
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
