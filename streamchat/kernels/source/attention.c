/* Attention of new tokens: rotates and stores their keys and values, then attends to all cached tokens of the layer.
 *
 * As in FlashAttention (arXiv:2205.14135), scores are never stored as a whole: a running maximum and sum replace them.
 * As in flash decoding, the keys are split into spans, so that all threads read equally much; the product that follows
 * combines the partial results.
 */
#include "codes.h"

enum { BLOCK = 64 };

#define SAME(x) (x)
#define SPAN span_bfloat16
#define STORED bfloat16
#define LOAD from_bfloat16
#include "span.h"
#define SPAN span_float16
#define STORED float16
#define LOAD from_float16
#include "span.h"
#define SPAN span_float32
#define STORED float
#define LOAD SAME
#include "span.h"

/* Sizes of common models as constants, so that accumulators stay in registers. */
#define BY_SIZE(NAME) \
    do { \
        if (cap > 0.0f) \
            NAME(k, v, count, query, queries, dim, cap, top, sum, acc); \
        else if (dim == 64 && queries == 1) \
            NAME(k, v, count, query, 1, 64, 0.0f, top, sum, acc); \
        else if (dim == 64 && queries == 3) \
            NAME(k, v, count, query, 3, 64, 0.0f, top, sum, acc); \
        else if (dim == 64) \
            NAME(k, v, count, query, queries, 64, 0.0f, top, sum, acc); \
        else if (dim == 128) \
            NAME(k, v, count, query, queries, 128, 0.0f, top, sum, acc); \
        else \
            NAME(k, v, count, query, queries, dim, 0.0f, top, sum, acc); \
    } while (0)

/* A function of its own: inlined into a loop, its inner loops lose their registers. */
NOINLINE static void span(const char *keys, const char *values, int format, long count, const float *query,
                          int queries, int dim, float cap, float *top, float *sum, float *acc) {
    if (format == BFLOAT16) {
        const bfloat16 *k = (const bfloat16 *)keys, *v = (const bfloat16 *)values;
        BY_SIZE(span_bfloat16);
    } else if (format == FLOAT16) {
        const float16 *k = (const float16 *)keys, *v = (const float16 *)values;
        BY_SIZE(span_float16);
    } else {
        const float *k = (const float *)keys, *v = (const float *)values;
        BY_SIZE(span_float32);
    }
}

/* Rotates the first `rotary_dim` elements of a head by halves, like transformers' rotate_half, and copies the rest.
 * Multiplies all of them by `scale`. */
static void rotate(const float *x, const float *cos, const float *sin, int rotary_dim, int dim, float scale,
                   float *out) {
    int half = rotary_dim / 2;
    SIMD
    for (int d = 0; d < half; d++) {
        out[d] = scale * (x[d] * cos[d] - x[d + half] * sin[d]);
        out[d + half] = scale * (x[d + half] * cos[d + half] + x[d] * sin[d + half]);
    }
    for (int d = rotary_dim; d < dim; d++)
        out[d] = scale * x[d];
}

/* Rotates in pairs of neighbors instead of halves; otherwise like `rotate`. */
static void rotate_pairs(const float *x, const float *cos, const float *sin, int rotary_dim, int dim, float scale,
                         float *out) {
    for (int d = 0; d < rotary_dim; d += 2) {
        out[d] = scale * (x[d] * cos[d] - x[d + 1] * sin[d]);
        out[d + 1] = scale * (x[d + 1] * cos[d + 1] + x[d] * sin[d + 1]);
    }
    for (int d = rotary_dim; d < dim; d++)
        out[d] = scale * x[d];
}

/* Floats of `partial`: for each token, head and span the weighted values of each query, then all maxima, all sums. */
EXPORT long attention_partial(int tokens, int heads, int queries, int dim, int spans) {
    return (long)tokens * heads * spans * queries * (dim + 2);
}

static long partials(const Attention *a) { return (long)a->tokens * a->num_kv_heads * a->spans * a->num_kv_groups; }

/* Returns `x` limited to [-clip, clip], in `out`; `x` itself without a clip. */
static const float *clipped(const Attention *a, const float *x, float *out) {
    if (a->clip <= 0.0f)
        return x;
    for (int d = 0; d < a->head_dim; d++) {
        float low = x[d] < -a->clip ? -a->clip : x[d];
        out[d] = low > a->clip ? a->clip : low;
    }
    return out;
}

/* Limits, normalizes and rotates head `index` of a token's `heads` queries or keys. */
static void prepare(const Attention *a, const Norm *norm, const float *from, int index, int heads, int token,
                    float scale, float *out) {
    float limited[MAX_DIM], normed[MAX_DIM];
    int dim = a->head_dim;
    const float *cos = a->cos + (long)token * a->rotary_dim, *sin = a->sin + (long)token * a->rotary_dim;
    const float *x = clipped(a, from, limited);
    if (norm->weight) {
        Moments found =
            a->norms_whole ? moments(norm, from - (long)index * dim, (long)heads * dim) : moments(norm, x, dim);
        normalize_part(norm, found, index * a->norm_stride, x, dim, normed);
        x = normed;
    }
    (a->is_interleaved ? rotate_pairs : rotate)(x, cos, sin, a->rotary_dim, dim, scale, out);
}

float *attention_tops(const Attention *a) { return a->partial + partials(a) * a->head_dim; }

float *attention_sums(const Attention *a) { return attention_tops(a) + partials(a); }

void prepare_query(const Attention *a, int token, int h, int i, float *out) {
    int copies = a->repeats + 1, first = h % copies * a->num_kv_groups;
    const float *query =
        a->query + token * a->token_stride + h / copies * a->query_stride + (long)(first + i) * a->head_dim;
    prepare(a, &a->query_norm, query, h * a->num_kv_groups + i, a->num_kv_heads * a->num_kv_groups, token, a->scale,
            out);
    if (has_scales(a->format))
        turn(out, a->head_dim);
}

/* Writes key and value of one head of a new token after the cached ones. */
static void store_head(const Attention *a, int token, int h) {
    float row[MAX_DIM];
    int dim = a->head_dim;
    long slot = a->cached + token, source = h / (a->repeats + 1), scale = h * a->scale_stride + slot;
    const float *key = a->key + token * a->token_stride + source * a->key_stride;
    const float *value = a->value + token * a->token_stride + source * a->value_stride;
    prepare(a, &a->key_norm, key, h, a->num_kv_heads, token, 1.0f, row);
    encode_head(row, dim, key_format(a->format), 0, key_at(a, h, slot), scale_at(a->key_scales, scale));
    const float *limited = clipped(a, value, row);
    if (limited != row)
        memcpy(row, limited, sizeof(float) * (size_t)dim);
    encode_head(row, dim, value_format(a->format), a->format == K8V4, value_at(a, h, slot),
                scale_at(a->value_scales, scale));
}

int store_tasks(const Attention *a) { return a->tokens * a->num_kv_heads; }

void store_work(const Attention *a, int task) { store_head(a, task / a->num_kv_heads, task % a->num_kv_heads); }

int attend_tasks(const Attention *a) {
    return is_many(a) ? attend_many_tasks(a) : a->tokens * a->num_kv_heads * a->spans;
}

/* Scratch memory of a thread, in floats. */
long attend_memory(const Attention *a) { return is_many(a) ? attend_many_memory() : 0; }

void attend_work(const Attention *a, int task, uint64_t tag, Member *member) {
    if (is_many(a)) {
        member->tag = tag;
        attend_many_work(a, task, member->memory);
        return;
    }
    int groups = a->num_kv_groups, dim = a->head_dim;
    int part = task % a->spans, h = task / a->spans % a->num_kv_heads, token = task / a->spans / a->num_kv_heads;
    long stop = a->cached + token + 1, start = first_slot(a, token), count = stop - start;
    long first = start + count * part / a->spans, last = start + count * (part + 1) / a->spans;
    const char *key = key_at(a, h, first), *value = value_at(a, h, first);
    long scale = h * a->scale_stride + first;
    float rotated[MAX_QUERIES * MAX_DIM];
    float *top = attention_tops(a), *sum = attention_sums(a);
    if (a->tokens == 1 && part == a->spans - 1)
        store_head(a, token, h); /* only this task reads the new slot */
    for (int done = 0; done < groups; done += MAX_QUERIES) {
        int queries = groups - done < MAX_QUERIES ? groups - done : MAX_QUERIES;
        long result = (long)task * groups + done;
        for (int i = 0; i < queries; i++)
            prepare_query(a, token, h, done + i, rotated + i * dim);
        if (has_scales(a->format)) {
            Codes keys = {key, a->key_scales + scale}, values = {value, a->value_scales + scale};
            span_codes(&keys, &values, a->format, last - first, rotated, queries, dim, a->softcap, top + result,
                       sum + result, a->partial + result * dim);
        } else
            span(key, value, a->format, last - first, rotated, queries, dim, a->softcap,
                 top + result, sum + result, a->partial + result * dim);
    }
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
        if (has_scales(a->format))
            turn(to, dim);
    }
}
