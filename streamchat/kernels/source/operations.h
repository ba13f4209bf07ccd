/* The operations of a decode step: each is one phase of a program. Pointers are to float32 unless stated otherwise. */
#ifndef STREAMCHAT_OPERATIONS_H
#define STREAMCHAT_OPERATIONS_H

#include "common.h"
#include "team.h"

/* A (rows, columns) matrix of weights; `columns` is that of the product.
 * bits per weight 4: data is (rows / 16, columns / 32, 320) bytes. 8: (rows, columns) int8, and scales: (rows)
 * bfloat16. 16: (rows, columns) bfloat16. 32: (rows, columns) float32. With 4 and 8 bits, columns must be a multiple of
 * 32, and with 4 bits rows a multiple of 16. bias: (rows) or NULL. */
typedef struct {
    const void *data;
    const bfloat16 *scales;
    const float *bias;
    long rows;
    int bits;
} Matrix;

/* x -> (x - mean) / sqrt(variance + eps) * weight + bias, or RMSNorm, which has no mean, unless `is_layer_norm`. There
 * is no norm if weight is NULL. bias: (width) or NULL. */
typedef struct {
    const float *weight, *bias;
    float eps;
    int is_layer_norm;
} Norm;

/* Attention of `tokens` new tokens, the last of which reads `cached` + `tokens` slots.
 * query: `num_kv_heads` x `num_kv_groups` query heads, `head_stride` floats apart; key, value: `num_kv_heads` heads,
 * `head_stride` floats apart; the next token's are `token_stride` floats after them. cos, sin: (tokens, rotary_dim). Queries
 * and keys are normalized before they are rotated.
 * keys, values: the first cached slot of the first head; heads are `head_stride_bytes` apart, an element has
 * `element_bytes`: 2 (bfloat16) or 4 (float32). The new tokens are written after the cached slots.
 * The slots are read in `spans` parts, whose results a product combines. partial: attention_partial(...). */
typedef struct {
    const float *query, *key, *value, *cos, *sin;
    char *keys, *values;
    float *partial;
    Norm query_norm, key_norm;
    long head_stride, token_stride, head_stride_bytes, cached;
    int tokens, rotary_dim, num_kv_heads, num_kv_groups, head_dim, element_bytes, spans;
    float scale;
} Attention;

enum { NO_FUNCTION, SILU, GELU };

/* out = f(y) (without a gate) or f(y of the first matrix) * y of the second (with one), where y = x W^T + bias, and x:
 * - `x`: (count, columns), if `attention` is NULL; else its combined result;
 * - plus `added` and `more` (each unless NULL), which are like x; this sum is written to `sum` unless that is NULL;
 * - then normalized.
 * The results of several matrices are concatenated: out is (count, rows of all), `out_stride` floats from row to row.
 * GELU is exact, not the tanh approximation. */
typedef struct {
    Matrix matrices[3];
    const float *x, *added, *more;
    const Attention *attention;
    float *sum, *out;
    Norm norm;
    long columns, out_stride;
    int num_matrices, count, function, gated;
} Product;

/* STORE writes the keys and values of new tokens, ATTEND reads them. ATTEND also stores if there is one new token. */
enum { PRODUCT, ATTEND, STORE };

typedef struct {
    union {
        Product product;
        const Attention *attention;
    };
    int kind;
} Operation;

int product_tasks(const Product *p, int threads);
void product_work(const Product *p, int task, int threads, uint64_t tag, Member *member);
long product_memory(const Product *p);
int attend_tasks(const Attention *a);
void attend_work(const Attention *a, int task);
int store_tasks(const Attention *a);
void store_work(const Attention *a, int task);

void normalize(const Norm *n, const float *x, long width, float *out);
void add(float *to, const float *from, long width);
void activate(int function, float *x, long count);
/* Writes the combined result of a token's attention, (heads, queries, dim), to `out`. */
void combine(const Attention *a, int token, float *out);

#endif
