/* The operations of a decode step. Pointers are to float32 unless stated otherwise. */
#ifndef STREAMCHAT_OPERATIONS_H
#define STREAMCHAT_OPERATIONS_H

#include "common.h"

/* out = x W^T + bias, for `count` vectors. x: (count, columns), bias: (rows) or NULL. out: (count, rows), with
 * `out_stride` floats from row to row.
 * bits per weight 4: data is (rows / 16, columns / 32, 320) bytes. 8: (rows, columns) int8, and scales: (rows)
 * bfloat16. 16: (rows, columns) bfloat16. 32: (rows, columns) float32.
 * scratch: count x product_scratch(columns), for 4 and 8 bits; columns must then be a multiple of 32, and for 4 bits
 * rows a multiple of 16. */
typedef struct {
    const void *data;
    const bfloat16 *scales;
    const float *bias, *x;
    float *out, *scratch;
    long rows, columns, out_stride;
    int bits, count;
} Product;

/* query: `num_kv_heads` x `num_kv_groups` query heads, `query_stride` floats apart; key, value: `num_kv_heads` heads,
 * `key_stride` floats apart. cos, sin: (rotary_dim).
 * keys, values: the first cached slot of the first head; heads are `head_stride_bytes` apart, an element has
 * `element_bytes`: 2 (bfloat16) or 4 (float32). Reads `cached` slots and writes the new token behind them.
 * out: (num_kv_heads, num_kv_groups, head_dim). scratch: attention_scratch(..., spans). */
typedef struct {
    const float *query, *key, *value, *cos, *sin;
    char *keys, *values;
    float *out, *scratch;
    long query_stride, key_stride, head_stride_bytes, cached;
    int rotary_dim, num_kv_heads, num_kv_groups, head_dim, element_bytes, spans;
    float scale;
} Attention;

/* hidden += added + more (each unless NULL), then out = norm(hidden), for each of `rows`. The norm is LayerNorm if
 * `is_layer_norm`, else RMSNorm. bias: (width) or NULL. */
typedef struct {
    float *hidden;
    const float *added, *more, *weight, *bias;
    float *out;
    long width;
    int rows, is_layer_norm;
    float eps;
} Norm;

enum { SILU, GELU };

/* out = f(x) * up (without the factor if up is NULL), for each of `rows`. x and up: (rows, width), with `stride` floats
 * from row to row; out: (rows, width). GELU is exact, not the tanh approximation. */
typedef struct {
    const float *x, *up;
    float *out;
    long width, stride;
    int rows, function;
} Activation;

enum { PRODUCT, ATTENTION, NORM, ACTIVATION };

typedef struct {
    union {
        Product product;
        Attention attention;
        Norm norm;
        Activation activation;
    };
    int kind;
} Operation;

void team_multiply(const Product *p);
void team_attend(const Attention *a);
void team_norm(const Norm *n);
void team_activate(const Activation *a);

#endif
