/* Attention of one token to keys and values in 8 or 4 bits, with products of 16-bit integers.
 *
 * The queries are rounded to 16 bits, and so are the shares of a block of values; each has one scale. This is finer than
 * the codes by far, and integers are multiplied faster than floats. A head is read in pieces of 2 * LANES codes, which
 * fill a register as 16-bit integers.
 */
#include "codes.h"

enum { BLOCK = 64, PIECE = 2 * LANES, MAX_PIECES = (MAX_DIM + 2 * PIECE - 1) / PIECE + 1, TOGETHER = 4, PLACES = 32767 };

/* Pieces of the bytes of a head. INT4 has a second one of the same bytes for each. */
INLINE int byte_pieces(int format, int dim) { return ((format == INT8 ? dim : dim / 2) + PIECE - 1) / PIECE; }

INLINE int pieces_of(int format, int dim) { return byte_pieces(format, dim) * (format == INT8 ? 1 : 2); }

/* First dimension of a piece, and one after its last one. */
INLINE int piece_start(int format, int dim, int piece) {
    int bytes = byte_pieces(format, dim);
    return piece < bytes ? piece * PIECE : dim / 2 + (piece - bytes) * PIECE;
}

INLINE int piece_stop(int format, int dim, int piece) {
    int start = piece_start(format, dim, piece), end = format == INT4 && start < dim / 2 ? dim / 2 : dim;
    return start + PIECE < end ? start + PIECE : end;
}

/* Asks for the lines that start within `bytes` bytes. */
INLINE void prefetch(const int8_t *from, long bytes) {
    for (long at = 0; at < bytes; at += 64)
        __builtin_prefetch(from + at);
}

/* The codes of a piece as 16-bit integers, those of INT4 plus ZERO; 0 after the end of the head. */
INLINE Ints read_piece(const int8_t *row, int format, int dim, int piece) {
    int bytes = format == INT8 ? dim : dim / 2, all = byte_pieces(format, dim), at = piece % all * PIECE;
    Ints x;
    if (at + PIECE <= bytes) {
        x = widen_bytes(row + at);
    } else {
        int8_t padded[PIECE] = {0};
        memcpy(padded, row + at, (size_t)(bytes - at));
        x = widen_bytes(padded);
    }
    if (format == INT8)
        return x;
    return and_ints(piece < all ? x : shift_halves_right(x, 4), all_ints(0x000f000f));
}

/* Rounds numbers to 16 bits; returns the scale. If a number is not finite, the scale is not, and the codes are 0. */
INLINE float round_numbers(const float *x, int count, int16_t *codes) {
    uint32_t most = 0;
    for (int n = 0; n < count; n++) {
        uint32_t size = bits_of(x[n]) & 0x7fffffffu;
        most = size > most ? size : most;
    }
    float largest = float_of(most), inverse = largest > 1e-30f ? PLACES / largest : 0.0f;
    if (most >= 0x7f800000u) {
        memset(codes, 0, sizeof(int16_t) * (size_t)count);
        return largest;
    }
    SIMD
    for (int n = 0; n < count; n++)
        codes[n] = (int16_t)(int32_t)(x[n] * inverse + __builtin_copysignf(0.5f, x[n]));
    return largest / PLACES;
}

typedef struct {
    int16_t codes[MAX_PIECES * PIECE];
    float scale;
    int32_t offset; /* what ZERO adds to each product */
} Query;

INLINE void round_query(const float *x, int format, int dim, Query *to) {
    int16_t codes[MAX_DIM];
    int32_t sum = 0;
    to->scale = round_numbers(x, dim, codes);
    for (int p = 0; p < pieces_of(format, dim); p++) {
        int start = piece_start(format, dim, p), size = piece_stop(format, dim, p) - start;
        memset(to->codes + p * PIECE, 0, sizeof(int16_t) * PIECE);
        memcpy(to->codes + p * PIECE, codes + start, sizeof(int16_t) * (size_t)size);
    }
    for (int d = 0; d < dim; d++)
        sum += codes[d];
    to->offset = format == INT4 ? ZERO * sum : 0;
}

/* The scales of `size` slots; 0 for the rest of a block. */
INLINE void read_scales(const bfloat16 *from, int size, float *scales) {
    bfloat16 padded[BLOCK] = {0};
    memcpy(padded, from, sizeof(bfloat16) * (size_t)size);
    SIMD
    for (int j = 0; j < BLOCK; j++)
        scales[j] = from_bfloat16(padded[j]);
}

/* Scores of up to TOGETHER queries with `size` keys; LOWEST for the rest of a block. score: (query, BLOCK). next: read
 * soon, as many heads as there are keys, of `next_bytes` each. */
INLINE void score_block(const int8_t *keys, const bfloat16 *scales, int size, const Query *query, int queries,
                        int format, int dim, const int8_t *next, long next_bytes, float *score) {
    int bytes = format == INT8 ? dim : dim / 2, pieces = pieces_of(format, dim);
    int32_t dots[TOGETHER * BLOCK];
    float steps[BLOCK];
    read_scales(scales, size, steps);
    if (size < BLOCK)
        memset(dots, 0, sizeof dots);
    for (int first = 0; first < size; first += LANES) {
        Ints sums[TOGETHER][LANES];
        for (int j = 0; j < LANES; j++) {
            int slot = first + j < size ? first + j : size - 1;
            const int8_t *row = keys + (long)slot * bytes;
            prefetch(next + slot * next_bytes, next_bytes);
            Sums sum[TOGETHER];
            for (int i = 0; i < queries; i++)
                sum[i] = no_sums();
            for (int p = 0; p < pieces; p++) {
                Ints x = read_piece(row, format, dim, p);
                for (int i = 0; i < queries; i++)
                    sum[i] = dot_pairs(sum[i], load_ints(query[i].codes + p * PIECE), x);
            }
            for (int i = 0; i < queries; i++)
                sums[i][j] = lane_sums(sum[i]);
        }
        for (int i = 0; i < queries; i++)
            store_ints(dots + i * BLOCK + first, sums_of_each(sums[i]));
    }
    for (int i = 0; i < queries; i++) {
        SIMD
        for (int j = 0; j < BLOCK; j++)
            score[i * BLOCK + j] = (float)(dots[i * BLOCK + j] - query[i].offset) * (query[i].scale * steps[j]);
    }
}

/* acc = acc * fade + the values of `size` slots times their shares, for up to TOGETHER queries. share: (query, BLOCK).
 * acc: (query, pieces * PIECE), in the order of `interleave_low` and `interleave_high`. next: as in `score_block`. */
INLINE void add_values(const int8_t *values, const bfloat16 *scales, int size, const float *share, const float *fade,
                       int queries, int format, int dim, const int8_t *next, long next_bytes, float *acc) {
    int bytes = format == INT8 ? dim : dim / 2, pieces = pieces_of(format, dim), pairs = (size + 1) / 2;
    int32_t words[TOGETHER][BLOCK / 2], offset[TOGETHER];
    float scale[TOGETHER], steps[BLOCK];
    read_scales(scales, size, steps);
    for (int i = 0; i < queries; i++) {
        float weights[BLOCK];
        int16_t codes[BLOCK];
        int32_t sum = 0;
        SIMD
        for (int j = 0; j < BLOCK; j++)
            weights[j] = share[i * BLOCK + j] * steps[j];
        scale[i] = round_numbers(weights, BLOCK, codes);
        for (int j = 0; j < BLOCK; j++)
            sum += codes[j];
        memcpy(words[i], codes, sizeof codes);
        offset[i] = format == INT4 ? ZERO * sum : 0;
    }
    for (int p = 0; p < pieces; p++) {
        Sums low[TOGETHER], high[TOGETHER];
        for (int i = 0; i < queries; i++)
            low[i] = high[i] = no_sums();
        for (int pair = 0; pair < pairs; pair++) {
            const int8_t *row = values + (long)pair * 2 * bytes;
            if (p == 0)
                prefetch(next + pair * 2 * next_bytes, 2 * next_bytes);
            Ints a = read_piece(row, format, dim, p);
            Ints b = read_piece(2 * pair + 1 < size ? row + bytes : row, format, dim, p);
            Ints lows = interleave_low(a, b), highs = interleave_high(a, b);
            for (int i = 0; i < queries; i++) {
                Ints word = all_ints(words[i][pair]);
                low[i] = dot_pairs(low[i], lows, word);
                high[i] = dot_pairs(high[i], highs, word);
            }
        }
        for (int i = 0; i < queries; i++) {
            float *to = acc + ((long)i * pieces + p) * PIECE;
            int32_t sums[PIECE];
            store_ints(sums, lane_sums(low[i]));
            store_ints(sums + LANES, lane_sums(high[i]));
            SIMD
            for (int n = 0; n < PIECE; n++)
                to[n] = to[n] * fade[i] + scale[i] * (float)(sums[n] - offset[i]);
        }
    }
}

/* Turns the scores of a block, of which `size` count, into shares of the sum; returns the factor of what was summed
 * before. */
INLINE float soften(float *score, int size, float cap, float *top, float *sum) {
    float tops[16], highest = *top, total = 0.0f;
    if (cap > 0.0f)
        activate(SOFTCAP, cap, score, size);
    for (int j = size; j < BLOCK; j++)
        score[j] = LOWEST;
    memcpy(tops, score, sizeof tops);
    for (int j = 16; j < BLOCK; j += 16) {
        SIMD
        for (int n = 0; n < 16; n++)
            tops[n] = score[j + n] > tops[n] ? score[j + n] : tops[n];
    }
    for (int n = 0; n < 16; n++)
        highest = tops[n] > highest ? tops[n] : highest;
    float fade = exp_negative(*top - highest);
    SIMD_SUM(total)
    for (int j = 0; j < BLOCK; j++) {
        score[j] = exp_negative(score[j] - highest);
        total += score[j];
    }
    *top = highest;
    *sum = *sum * fade + total;
    return fade;
}

/* Like SPAN for up to TOGETHER queries, which are turned; so is the result. */
INLINE void span_some(const Codes *keys, const Codes *values, long count, const float *query, int queries, int format,
                      int dim, float cap, float *top, float *sum, float *acc) {
    int of_keys = key_format(format), of_values = value_format(format), pieces = pieces_of(of_values, dim);
    long key_bytes = head_bytes(of_keys, dim), value_bytes = head_bytes(of_values, dim);
    Query rounded[TOGETHER];
    float order[TOGETHER * MAX_PIECES * PIECE], score[TOGETHER * BLOCK], fade[TOGETHER];
    memset(order, 0, sizeof(float) * (size_t)(queries * pieces * PIECE));
    for (int i = 0; i < queries; i++) {
        round_query(query + (long)i * dim, of_keys, dim, rounded + i);
        top[i] = LOWEST;
        sum[i] = 0.0f;
    }
    for (long first = 0; first < count; first += BLOCK) {
        int size = count - first < BLOCK ? (int)(count - first) : BLOCK;
        const int8_t *key = (const int8_t *)keys->codes + first * key_bytes;
        const int8_t *value = (const int8_t *)values->codes + first * value_bytes;
        score_block(key, keys->scales + first, size, rounded, queries, of_keys, dim, value, value_bytes, score);
        for (int i = 0; i < queries; i++)
            fade[i] = soften(score + i * BLOCK, size, cap, top + i, sum + i);
        const int8_t *next = first + 2 * BLOCK <= count ? key + BLOCK * key_bytes : key; /* the last blocks are short */
        add_values(value, values->scales + first, size, score, fade, queries, of_values, dim, next, key_bytes, order);
    }
    for (int i = 0; i < queries; i++)
        for (int p = 0; p < pieces; p++) {
            int start = piece_start(of_values, dim, p), stop = piece_stop(of_values, dim, p);
            for (int n = 0; n < stop - start; n++)
                acc[(long)i * dim + start + n] = order[(i * pieces + p) * PIECE + interleaved_place(n)];
        }
}

/* Sizes of common models as constants. */
#define BY_SIZE(FORMAT) \
    do { \
        if (dim == 64 && some == 3) \
            span_some(keys, values, count, from, 3, FORMAT, 64, cap, tops, sums, to); \
        else if (dim == 64 && some == 4) \
            span_some(keys, values, count, from, 4, FORMAT, 64, cap, tops, sums, to); \
        else if (dim == 64 && some == 1) \
            span_some(keys, values, count, from, 1, FORMAT, 64, cap, tops, sums, to); \
        else if (dim == 128 && some == 4) \
            span_some(keys, values, count, from, 4, FORMAT, 128, cap, tops, sums, to); \
        else \
            span_some(keys, values, count, from, some, FORMAT, dim, cap, tops, sums, to); \
    } while (0)

NOINLINE static void span_int8(const Codes *keys, const Codes *values, long count, const float *from, int some, int dim,
                               float cap, float *tops, float *sums, float *to) {
    BY_SIZE(INT8);
}

NOINLINE static void span_int4(const Codes *keys, const Codes *values, long count, const float *from, int some, int dim,
                               float cap, float *tops, float *sums, float *to) {
    BY_SIZE(INT4);
}

NOINLINE static void span_k8v4(const Codes *keys, const Codes *values, long count, const float *from, int some, int dim,
                               float cap, float *tops, float *sums, float *to) {
    BY_SIZE(K8V4);
}

void span_codes(const Codes *keys, const Codes *values, int format, long count, const float *query, int queries, int dim,
                float cap, float *top, float *sum, float *acc) {
    for (int done = 0; done < queries; done += TOGETHER) {
        int some = queries - done < TOGETHER ? queries - done : TOGETHER;
        (format == INT8 ? span_int8 : format == INT4 ? span_int4 : span_k8v4)(
            keys, values, count, query + (long)done * dim, some, dim, cap, top + done, sum + done,
            acc + (long)done * dim);
    }
}
