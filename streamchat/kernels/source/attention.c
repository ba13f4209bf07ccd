/* Attention of one new token: rotates and stores its key and value, then attends to all cached tokens of the layer.
 *
 * As in FlashAttention (arXiv:2205.14135), scores are never stored as a whole: a running maximum and sum replace them.
 * As in flash decoding, the keys are split into spans, so that all threads read equally much; partial results are
 * combined at the end.
 */
#include "operations.h"

#define LOWEST -1e30f

enum { BLOCK = 64, MAX_DIM = 256, MAX_QUERIES = 16 };

#define SAME(x) (x)
#define SPAN span_bfloat16
#define STORED bfloat16
#define LOAD from_bfloat16
#include "span.h"
#define SPAN span_float32
#define STORED float
#define LOAD SAME
#include "span.h"

/* Sizes of common models as constants, so that accumulators stay in registers. */
#define BY_SIZE(NAME) \
    do { \
        if (dim == 64 && queries == 1) \
            NAME(k, v, count, query, 1, 64, top, sum, acc); \
        else if (dim == 64 && queries == 3) \
            NAME(k, v, count, query, 3, 64, top, sum, acc); \
        else if (dim == 64) \
            NAME(k, v, count, query, queries, 64, top, sum, acc); \
        else if (dim == 128) \
            NAME(k, v, count, query, queries, 128, top, sum, acc); \
        else \
            NAME(k, v, count, query, queries, dim, top, sum, acc); \
    } while (0)

static void span(const char *keys, const char *values, int bytes, long count, const float *query, int queries, int dim,
                 float *top, float *sum, float *acc) {
    if (bytes == 2) {
        const bfloat16 *k = (const bfloat16 *)keys, *v = (const bfloat16 *)values;
        BY_SIZE(span_bfloat16);
    } else {
        const float *k = (const float *)keys, *v = (const float *)values;
        BY_SIZE(span_float32);
    }
}

/* Rotates the first `rotary_dim` elements of a head by halves, like transformers' rotate_half, and copies the rest.
 * Multiplies all of them by `scale`. */
static void rotate(const float *x, const float *cos, const float *sin, int rotary_dim, int dim, float scale, float *out) {
    int half = rotary_dim / 2;
    SIMD
    for (int d = 0; d < half; d++) {
        out[d] = scale * (x[d] * cos[d] - x[d + half] * sin[d]);
        out[d + half] = scale * (x[d + half] * cos[d + half] + x[d] * sin[d + half]);
    }
    for (int d = rotary_dim; d < dim; d++)
        out[d] = scale * x[d];
}

static void store(const float *x, int dim, int bytes, char *to) {
    if (bytes == 2)
        for (int d = 0; d < dim; d++)
            ((bfloat16 *)to)[d] = to_bfloat16(x[d]);
    else
        memcpy(to, x, sizeof(float) * (size_t)dim);
}

/* Scratch memory of an attention, in floats. */
EXPORT long attention_scratch(int heads, int queries, int dim, int threads) {
    return (long)heads * queries * dim + (long)heads * threads * queries * (dim + 2);
}

/* Called by all threads of a team, like every `team_` function. */
void team_attend(const Attention *a) {
    int heads = a->num_kv_heads, queries = a->num_kv_groups, dim = a->head_dim;
    int spans = a->spans, size = dim * a->element_bytes;
    float *rotated = a->scratch, *acc = rotated + (long)heads * queries * dim;
    float *top = acc + (long)heads * spans * queries * dim, *sum = top + (long)heads * spans * queries;
    long count = a->cached + 1;
#pragma omp single
    {
        for (int h = 0; h < heads; h++) {
            float row[MAX_DIM];
            long at = h * a->head_stride_bytes + a->cached * size;
            rotate(a->key + h * a->key_stride, a->cos, a->sin, a->rotary_dim, dim, 1.0f, row);
            store(row, dim, a->element_bytes, a->keys + at);
            store(a->value + h * a->key_stride, dim, a->element_bytes, a->values + at);
        }
        for (int i = 0; i < heads * queries; i++)
            rotate(a->query + i * a->query_stride, a->cos, a->sin, a->rotary_dim, dim, a->scale, rotated + i * dim);
    }
#pragma omp for schedule(static)
    for (int task = 0; task < heads * spans; task++) {
        int h = task / spans, part = task % spans;
        long first = count * part / spans, last = count * (part + 1) / spans, at = h * a->head_stride_bytes + first * size;
        span(a->keys + at, a->values + at, a->element_bytes, last - first, rotated + (long)h * queries * dim, queries, dim,
             top + (long)task * queries, sum + (long)task * queries, acc + (long)task * queries * dim);
    }
#pragma omp for schedule(static)
    for (int query = 0; query < heads * queries; query++) {
        int h = query / queries, i = query % queries;
        float highest = LOWEST, total = 0.0f, *to = a->out + (long)query * dim;
        for (int part = 0; part < spans; part++) {
            float each = top[((long)h * spans + part) * queries + i];
            highest = each > highest ? each : highest;
        }
        memset(to, 0, sizeof(float) * (size_t)dim);
        for (int part = 0; part < spans; part++) {
            long at = ((long)h * spans + part) * queries + i;
            float share = exp_negative(top[at] - highest);
            total += share * sum[at];
            SIMD
            for (int d = 0; d < dim; d++)
                to[d] += share * acc[at * dim + d];
        }
        SIMD
        for (int d = 0; d < dim; d++)
            to[d] /= total;
    }
}
