/* Attention of several new tokens: all queries of a block read a key once.
 *
 * A lane belongs to one query of one token, so that scores, maxima and sums of a block need no sums across lanes. As in
 * FlashAttention (arXiv:2205.14135), only the scores of one block of keys exist at a time.
 */
#include "codes.h"

/* QUERIES_AT_ONCE: lanes of a task; a multiple of LANES. Products compute DOWN values x ACROSS registers at a time. */
enum { FEWEST = 4, KEYS = 64, QUERIES_AT_ONCE = 64, ACROSS = 2 };

int is_many(const Attention *a) { return a->tokens >= FEWEST && a->num_kv_groups <= QUERIES_AT_ONCE; }

/* Tokens of a task. */
static int block_tokens(const Attention *a) { return QUERIES_AT_ONCE / a->num_kv_groups; }

int attend_many_tasks(const Attention *a) {
    return (a->tokens + block_tokens(a) - 1) / block_tokens(a) * a->num_kv_heads * a->spans;
}

/* to[i] (+)= sum over k of x[i * stride_i + k * stride_k] * y[k], for i < down; to and y have rows of QUERIES_AT_ONCE
 * floats, of which `across` registers are used. */
INLINE void multiply_block(const float *x, long stride_i, long stride_k, const float *y, long length, int down,
                           int across, int adds, float *to) {
    Floats sums[DOWN][ACROSS];
    for (int i = 0; i < down; i++)
        for (int j = 0; j < across; j++)
            sums[i][j] = adds ? load_floats(to + i * QUERIES_AT_ONCE + j * LANES) : all_floats(0.0f);
    for (long k = 0; k < length; k++, x += stride_k, y += QUERIES_AT_ONCE) {
        Floats each[ACROSS];
        for (int j = 0; j < across; j++)
            each[j] = load_floats(y + j * LANES);
        for (int i = 0; i < down; i++) {
            Floats factor = all_floats(x[i * stride_i]);
            for (int j = 0; j < across; j++)
                sums[i][j] = add_product(sums[i][j], factor, each[j]);
        }
    }
    for (int i = 0; i < down; i++)
        for (int j = 0; j < across; j++)
            store_floats(to + i * QUERIES_AT_ONCE + j * LANES, sums[i][j]);
}

/* The same for rows from `i` on, `down` at a time, as long as that many are left; returns the next row. */
INLINE int multiply_down(const float *x, long stride_i, long stride_k, const float *y, long length, int i, int rows,
                         int down, int across, int adds, float *to) {
    for (; i + down <= rows; i += down)
        multiply_block(x + i * stride_i, stride_i, stride_k, y, length, down, across, adds, to + i * QUERIES_AT_ONCE);
    return i;
}

/* The same for any number of rows. The last few are also computed at once where possible: a single one would wait for
 * its own sums. */
INLINE void multiply_across(const float *x, long stride_i, long stride_k, const float *y, long length, int rows,
                            int across, int adds, float *to) {
    int i = multiply_down(x, stride_i, stride_k, y, length, 0, rows, DOWN, across, adds, to);
    i = multiply_down(x, stride_i, stride_k, y, length, i, rows, 4, across, adds, to);
    i = multiply_down(x, stride_i, stride_k, y, length, i, rows, 2, across, adds, to);
    multiply_down(x, stride_i, stride_k, y, length, i, rows, 1, across, adds, to);
}

/* The same for `lanes` lanes, a multiple of LANES. */
INLINE void multiply_all(const float *x, long stride_i, long stride_k, const float *y, long length, int rows, int lanes,
                         int adds, float *to) {
    int lane = 0;
    for (; lane + ACROSS * LANES <= lanes; lane += ACROSS * LANES)
        multiply_across(x, stride_i, stride_k, y + lane, length, rows, ACROSS, adds, to + lane);
    for (; lane < lanes; lane += LANES)
        multiply_across(x, stride_i, stride_k, y + lane, length, rows, 1, adds, to + lane);
}

/* State of a task: one lane per query. */
typedef struct {
    float queries[MAX_DIM * QUERIES_AT_ONCE], values[MAX_DIM * QUERIES_AT_ONCE]; /* (dim, lane) */
    float scores[KEYS * QUERIES_AT_ONCE];                                        /* (key, lane) */
    float top[QUERIES_AT_ONCE], sum[QUERIES_AT_ONCE];
    int32_t starts[QUERIES_AT_ONCE], ends[QUERIES_AT_ONCE]; /* slots that the lane sees, within the task */
    float widened[KEYS * MAX_DIM]; /* keys or values of a block in float32 */
    int lanes;                     /* in use, a multiple of LANES */
} Block;

/* Returns `count` rows of the cache in float32; those with scales are turned. */
static const float *rows_of(const char *from, const uint16_t *scales, int format, int count, int dim, float *widened) {
    const uint16_t *narrow = (const uint16_t *)from;
    if (has_scales(format)) {
        widen_heads(from, scales, format, count, dim, widened);
        return widened;
    }
    if (format == FLOAT32)
        return (const float *)from;
    if (format == FLOAT16) {
        SIMD
        for (int i = 0; i < count * dim; i++)
            widened[i] = from_float16(narrow[i]);
    } else {
        SIMD
        for (int i = 0; i < count * dim; i++)
            widened[i] = from_bfloat16(narrow[i]);
    }
    return widened;
}

/* Turns the scores of `count` keys, the first of which is slot `first` of the task, into shares of the sum. */
static void soften(Block *b, long first, int count, int dim) {
    float fade[QUERIES_AT_ONCE];
    for (int n = 0; n < b->lanes; n++) {
        for (int j = 0; j < count && first + j < b->starts[n]; j++)
            b->scores[j * QUERIES_AT_ONCE + n] = LOWEST;
        for (int j = b->ends[n] > first ? (int)(b->ends[n] - first) : 0; j < count; j++)
            b->scores[j * QUERIES_AT_ONCE + n] = LOWEST;
    }
    memcpy(fade, b->top, sizeof fade);
    for (int j = 0; j < count; j++) {
        const float *score = b->scores + j * QUERIES_AT_ONCE;
        SIMD
        for (int n = 0; n < b->lanes; n++)
            b->top[n] = score[n] > b->top[n] ? score[n] : b->top[n];
    }
    SIMD
    for (int n = 0; n < b->lanes; n++) {
        fade[n] = exp_negative(fade[n] - b->top[n]);
        b->sum[n] *= fade[n];
    }
    for (int j = 0; j < count; j++) {
        float *score = b->scores + j * QUERIES_AT_ONCE;
        SIMD
        for (int n = 0; n < b->lanes; n++) {
            score[n] = exp_negative(score[n] - b->top[n]);
            b->sum[n] += score[n];
        }
    }
    for (int d = 0; d < dim; d++) {
        SIMD
        for (int n = 0; n < b->lanes; n++)
            b->values[d * QUERIES_AT_ONCE + n] *= fade[n];
    }
}

/* Prepares the lanes for `tokens` tokens from `token` on, of the key head `h`; slots count from `first`. */
static void fill(const Attention *a, int token, int tokens, int h, long first, Block *b) {
    int queries = a->num_kv_groups, dim = a->head_dim, used = tokens * queries;
    float rotated[MAX_DIM];
    b->lanes = (used + LANES - 1) / LANES * LANES;
    memset(b->values, 0, sizeof(float) * (size_t)dim * QUERIES_AT_ONCE);
    for (int n = 0; n < b->lanes; n++) {
        int lane = n < used ? n : used - 1; /* lanes that are not used repeat the last one */
        prepare_query(a, token + lane / queries, h, lane % queries, rotated);
        for (int d = 0; d < dim; d++)
            b->queries[d * QUERIES_AT_ONCE + n] = rotated[d];
        b->starts[n] = (int32_t)(first_slot(a, token + lane / queries) - first);
        b->ends[n] = (int32_t)(a->cached + token + lane / queries + 1 - first);
        b->top[n] = LOWEST;
        b->sum[n] = 0.0f;
    }
}

/* In floats. A block is too large for the stacks of some threads. */
long attend_many_memory(void) { return (long)(sizeof(Block) / sizeof(float)); }

void attend_many_work(const Attention *a, int task, float *memory) {
    int queries = a->num_kv_groups, dim = a->head_dim, heads = a->num_kv_heads;
    int part = task % a->spans, h = task / a->spans % heads, token = task / a->spans / heads * block_tokens(a);
    int tokens = a->tokens - token < block_tokens(a) ? a->tokens - token : block_tokens(a);
    long start = first_slot(a, token), count = a->cached + token + tokens - start;
    long first = start + count * part / a->spans, last = start + count * (part + 1) / a->spans;
    Block *b = (Block *)memory;
    fill(a, token, tokens, h, first, b);
    for (long slot = first; slot < last; slot += KEYS) {
        int size = last - slot < KEYS ? (int)(last - slot) : KEYS;
        long scale = h * a->scale_stride + slot;
        const float *keys =
            rows_of(key_at(a, h, slot), scale_at(a->key_scales, scale), key_format(a->format), size, dim, b->widened);
        multiply_all(keys, dim, 1, b->queries, dim, size, b->lanes, 0, b->scores);
        if (a->softcap > 0.0f)
            activate(SOFTCAP, a->softcap, b->scores, (long)size * QUERIES_AT_ONCE);
        soften(b, slot - first, size, dim);
        const float *values =
            rows_of(value_at(a, h, slot), scale_at(a->value_scales, scale), value_format(a->format), size, dim,
                    b->widened);
        multiply_all(values, 1, dim, b->scores, size, dim, b->lanes, 1, b->values);
    }
    for (int n = 0; n < tokens * queries; n++) {
        long to = (((long)(token + n / queries) * heads + h) * a->spans + part) * queries + n % queries;
        for (int d = 0; d < dim; d++)
            a->partial[to * dim + d] = b->values[d * QUERIES_AT_ONCE + n];
        attention_tops(a)[to] = b->top[n];
        attention_sums(a)[to] = b->sum[n];
    }
}
