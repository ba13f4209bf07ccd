/* Attention of new tokens: rotates and stores their keys and values, then attends to all cached tokens of the layer.
 *
 * As in FlashAttention (arXiv:2205.14135), scores are never stored as a whole: a running maximum and sum replace them.
 * As in flash decoding, the keys are split into spans, so that all threads read equally much; the product that follows
 * combines the partial results.
 */
#include "attention.h"

enum { BLOCK = 64 };

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

/* Floats of `partial`: for each token, head and span the weighted values of each query, then all maxima, all sums. */
EXPORT long attention_partial(int tokens, int heads, int queries, int dim, int spans) {
    return (long)tokens * heads * spans * queries * (dim + 2);
}

static long partials(const Attention *a) { return (long)a->tokens * a->num_kv_heads * a->spans * a->num_kv_groups; }

static void prepare(const Attention *a, const Norm *norm, const float *from, int token, float scale, float *out) {
    float normed[MAX_DIM];
    const float *cos = a->cos + (long)token * a->rotary_dim, *sin = a->sin + (long)token * a->rotary_dim;
    if (norm->weight)
        normalize(norm, from, a->head_dim, normed);
    rotate(norm->weight ? normed : from, cos, sin, a->rotary_dim, a->head_dim, scale, out);
}

float *attention_tops(const Attention *a) { return a->partial + partials(a) * a->head_dim; }

float *attention_sums(const Attention *a) { return attention_tops(a) + partials(a); }

void prepare_query(const Attention *a, int token, int h, int i, float *out) {
    const float *query = a->query + token * a->token_stride + ((long)h * a->num_kv_groups + i) * a->head_stride;
    prepare(a, &a->query_norm, query, token, a->scale, out);
}

/* Writes key and value of one head of a new token after the cached ones. */
static void store_head(const Attention *a, int token, int h) {
    float row[MAX_DIM];
    long at = h * a->head_stride_bytes + (a->cached + token) * a->head_dim * a->element_bytes;
    long from = token * a->token_stride + h * a->head_stride;
    prepare(a, &a->key_norm, a->key + from, token, 1.0f, row);
    store(row, a->head_dim, a->element_bytes, a->keys + at);
    store(a->value + from, a->head_dim, a->element_bytes, a->values + at);
}

int store_tasks(const Attention *a) { return a->tokens * a->num_kv_heads; }

void store_work(const Attention *a, int task) { store_head(a, task / a->num_kv_heads, task % a->num_kv_heads); }

int attend_tasks(const Attention *a) {
    return is_many(a) ? attend_many_tasks(a) : a->tokens * a->num_kv_heads * a->spans;
}

void attend_work(const Attention *a, int task) {
    if (is_many(a)) {
        attend_many_work(a, task);
        return;
    }
    int queries = a->num_kv_groups, dim = a->head_dim, bytes = a->element_bytes;
    int part = task % a->spans, h = task / a->spans % a->num_kv_heads, token = task / a->spans / a->num_kv_heads;
    long count = a->cached + token + 1, first = count * part / a->spans, last = count * (part + 1) / a->spans;
    long at = h * a->head_stride_bytes + first * dim * bytes, result = (long)task * queries;
    float rotated[MAX_QUERIES * MAX_DIM];
    float *top = attention_tops(a), *sum = attention_sums(a);
    if (a->tokens == 1 && part == a->spans - 1)
        store_head(a, token, h); /* only this task reads the new slot */
    for (int i = 0; i < queries; i++)
        prepare_query(a, token, h, i, rotated + i * dim);
    span(a->keys + at, a->values + at, bytes, last - first, rotated, queries, dim, top + result, sum + result,
         a->partial + result * dim);
}

void combine(const Attention *a, int token, float *out) {
    int queries = a->num_kv_groups, dim = a->head_dim, spans = a->spans, heads = a->num_kv_heads;
    const float *top = attention_tops(a), *sum = attention_sums(a);
    for (int query = 0; query < heads * queries; query++) {
        int h = query / queries, i = query % queries;
        long start = ((long)token * heads + h) * spans;
        float highest = LOWEST, total = 0.0f, *to = out + (long)query * dim;
        for (int part = 0; part < spans; part++) {
            float each = top[(start + part) * queries + i];
            highest = each > highest ? each : highest;
        }
        memset(to, 0, sizeof(float) * (size_t)dim);
        for (int part = 0; part < spans; part++) {
            long at = (start + part) * queries + i;
            float share = exp_negative(top[at] - highest);
            total += share * sum[at];
            SIMD
            for (int d = 0; d < dim; d++)
                to[d] += share * a->partial[at * dim + d];
        }
        SIMD
        for (int d = 0; d < dim; d++)
            to[d] /= total;
    }
}
