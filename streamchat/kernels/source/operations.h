/* The operations of a decode step. Pointers are to float32 where nothing else is said. */
#ifndef STREAMCHAT_OPERATIONS_H
#define STREAMCHAT_OPERATIONS_H

#include "common.h"

/* out = x W^T + bias, for `count` vectors. x: (count, columns), bias: (rows) or NULL. out: (count, rows), the rows
 * `out_step` floats apart.
 * bits of a weight 4: data is (rows / 16, columns / 32, 320) bytes. 8: (rows, columns) int8, and scales: (rows)
 * bfloat16. 16: (rows, columns) bfloat16. 32: (rows, columns) float32.
 * scratch: count x product_scratch(columns), for 4 and 8; columns are then a multiple of 32, and rows of 16 for 4. */
typedef struct {
    const void *data;
    const bfloat16 *scales;
    const float *bias, *x;
    float *out, *scratch;
    long rows, columns, out_step;
    int bits, count;
} Product;

/* query: `heads` x `queries` heads of queries, `query_step` floats apart; key, value: `heads`, `key_step` apart.
 * cos, sin: (width). keys, values: the first slot held, of the first head; heads are `head_bytes` apart, a number has
 * `bytes`: 2 (bfloat16) or 4. `held` slots are read, and the new token is written behind them.
 * out: (heads, queries, dim). scratch: attention_scratch(..., spans). */
typedef struct {
    const float *query, *key, *value, *cos, *sin;
    char *keys, *values;
    float *out, *scratch;
    long query_step, key_step, head_bytes, held;
    int width, heads, queries, dim, bytes, spans;
    float scale;
} Attention;

/* hidden += added + more (where given), then out = norm(hidden), for each of `rows`. centred: LayerNorm, else RMSNorm.
 * bias: (width) or NULL. */
typedef struct {
    float *hidden;
    const float *added, *more, *weight, *bias;
    float *out;
    long width;
    int rows, centred;
    float eps;
} Norm;

enum { SILU, GELU };

/* out = f(x) (* up, where given), for each of `rows`. x and up: (rows, width), rows `step` floats apart; out: (rows,
 * width). GELU is the exact one. */
typedef struct {
    const float *x, *up;
    float *out;
    long width, step;
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
