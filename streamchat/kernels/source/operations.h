/* The operations of a decode step: each is one phase of a program. Pointers are to float32 unless stated otherwise. */
#ifndef STREAMCHAT_OPERATIONS_H
#define STREAMCHAT_OPERATIONS_H

#include "common.h"
#include "team.h"

/* Number formats of 16 or 32 bits. */
enum { BFLOAT16, FLOAT16, FLOAT32 };
/* Formats of keys and values with scales, see codes.h. K8V4: keys in INT8, values in INT4
 * with the best of several scales. */
enum { INT8 = FLOAT32 + 1, INT4, K8V4 };

/* Scales of 4 or 8-bit codes: one for each group of 32 columns of a row; a scale and a minimum; 6-bit scales and
 * minimums of groups in superblocks of 256 columns; 8-bit scales of 16 columns in superblocks. */
enum { SCALE, SCALE_MIN, SUPER_32, SUPER_16 };

/* A (rows, columns) matrix of weights; `columns` is that of the product.
 * bits: per weight. 4 or 8: data is tiles of codes with scales of the kind `format`, see tiles.h; columns must be a
 * multiple of 32, or 256 with superblocks, and rows of the last tile beyond `rows` are not used. 16: (rows, columns) in
 * `format`, bfloat16 or float16. 32: (rows, columns) float32. bias: (rows) or NULL. */
typedef struct {
    const void *data;
    const float *bias;
    long rows;
    int bits, format;
} Matrix;

/* x -> (x - mean) / sqrt(variance + eps) * weight + bias, or RMSNorm, which has no mean, unless `is_layer_norm`. There
 * is no norm if weight is NULL. bias: (width) or NULL. */
typedef struct {
    const float *weight, *bias;
    float eps;
    int is_layer_norm;
} Norm;

/* Attention of `tokens` new tokens, the last of which reads `cached` + `tokens` slots, or, unless `window` is 0, the
 * last `window` of these.
 * query: `num_kv_groups` query heads for each of `num_kv_heads` key heads; those of the next key head are
 * `query_stride` floats after them. key, value: `num_kv_heads` heads, `key_stride` and `value_stride` floats apart.
 * Those of the next token are `token_stride` floats after them. If `repeats` is not 0, each key and value is cached
 * `repeats` more times, as key heads in sequence. Strides are then between such groups, and the queries of a group are
 * contiguous.
 * Queries, keys and values are limited to [-clip, clip], unless clip is 0. Queries and keys are then normalized, each
 * head by itself, with weights `norm_stride` floats after those of the previous head (0: the same weights). If
 * `norms_whole`, all heads of a token are normalized together; they must be contiguous and not clipped. Then their
 * first `rotary_dim` elements are rotated, by halves or, if `is_interleaved`, in pairs of neighbors. cos, sin: (tokens,
 * rotary_dim).
 * A score is softcap * tanh(score / softcap), unless softcap is 0.
 * keys, values: the first cached slot of the first head, in `format`; the keys of heads are `head_stride_bytes` apart,
 * and values have as many slots. The new tokens are written after the cached slots. key_scales, value_scales: their
 * scales if `format` has some; heads are `scale_stride` scales apart.
 * The slots are read in `spans` parts, whose results a product combines. partial: attention_partial(...). */
typedef struct {
    const float *query, *key, *value, *cos, *sin;
    char *keys, *values;
    uint16_t *key_scales, *value_scales;
    float *partial;
    Norm query_norm, key_norm;
    long query_stride, key_stride, value_stride, token_stride, norm_stride, head_stride_bytes, scale_stride, cached;
    int tokens, rotary_dim, num_kv_heads, num_kv_groups, head_dim, format, spans, window;
    int is_interleaved, norms_whole, repeats;
    float scale, softcap, clip;
} Attention;

enum { NO_FUNCTION, SILU, GELU, GELU_TANH, RELU, RELU2, SOFTCAP };

/* out = f(y) (without a gate) or f(y of the first matrix) * y of the second (with one), where y = x W^T + bias, and x:
 * - `x`: (count, columns), if `attention` is NULL; else its combined result;
 * - plus `added`, normalized with `added_norm`, and `more`, times `added_scale`; both have the shape of x, or are NULL.
 *   This sum is written to `sum` unless that is NULL;
 * - then normalized.
 * The results of several matrices are concatenated: out is (count, rows of all), `out_stride` floats from row to row.
 * GELU is exact, GELU_TANH its approximation; RELU2 is the square of RELU; SOFTCAP is softcap * tanh(y / softcap). */
typedef struct {
    Matrix matrices[3];
    const float *x, *added, *more;
    const Attention *attention;
    float *sum, *out;
    Norm norm, added_norm;
    long columns, out_stride;
    int num_matrices, count, function, gated;
    float added_scale, softcap;
} Product;

/* A mixture of experts. Each of `count` tokens is computed by `top_k` of `num_experts` gated MLPs, which a router chooses.
 * ROUTE normalizes x to `normed`, both (count, columns), and chooses the experts with the largest logits. logits: (count,
 * logits_stride), those of the experts first. shares: the softmax of all logits or, if `is_normalized`, of the chosen
 * ones. chosen, shares: (count, top_k). If `has_gate`, factors (count) are the sigmoid of the logit after the experts'.
 * EXPERTS_UP: activated = f(gate normed) * (up normed), (count * top_k, gate.rows), in the order of the experts.
 * EXPERTS_DOWN: out = sum of share * (down activated), plus `shared`, unless that is NULL, times the factor, if
 * `has_gate`. out, shared: (count, columns).
 * gate, up, down: the matrices of the first expert; those of the next are `up_stride` (gate too) and `down_stride` bytes
 * after them. They have no bias. function: as in Product. */
typedef struct {
    Matrix gate, up, down;
    Norm norm;
    const float *x, *logits, *shared;
    float *normed, *activated, *out, *shares, *factors;
    int32_t *chosen;
    long columns, up_stride, down_stride, logits_stride;
    int num_experts, top_k, count, function, is_normalized, has_gate;
} Experts;

/* STORE writes the keys and values of new tokens, ATTEND reads them. ATTEND also stores if there is one new token. */
enum { PRODUCT, ATTEND, STORE, ROUTE, EXPERTS_UP, EXPERTS_DOWN };

typedef struct {
    union {
        Product product;
        const Attention *attention;
        const Experts *experts;
    };
    int kind;
} Operation;

int product_tasks(const Product *p, int threads);
void product_work(const Product *p, int task, int threads, uint64_t tag, Member *member);
long product_memory(const Product *p);
int attend_tasks(const Attention *a);
void attend_work(const Attention *a, int task, uint64_t tag, Member *member);
long attend_memory(const Attention *a);
int store_tasks(const Attention *a);
void store_work(const Attention *a, int task);
int route_tasks(const Experts *e, int threads);
void route_work(const Experts *e, int task, int threads);
int up_tasks(const Experts *e, int threads);
void up_work(const Experts *e, int task, int threads, Member *member);
long up_memory(const Experts *e);
int down_tasks(const Experts *e, int threads);
void down_work(const Experts *e, int task, int threads, Member *member);
long down_memory(const Experts *e);

/* Statistics of a row for its norm: out = (x - mean) * scale * weight + bias. */
typedef struct {
    float mean, scale;
} Moments;

Moments moments(const Norm *n, const float *x, long width);
void normalize_part(const Norm *n, Moments m, long at, const float *x, long width, float *out);
void normalize(const Norm *n, const float *x, long width, float *out);
void add(float *to, const float *from, long width);
void add_scaled(float *to, const float *from, float scale, long width);
void activate(int function, float softcap, float *x, long count);
/* Writes the combined result of a token's attention, (heads, queries, dim), to `out`. */
void combine(const Attention *a, int token, float *out);

#endif
