/* Operations on rows between the products: residual sums, norms, activations. */
#include "operations.h"

static void add(float *to, const float *from, long width) {
    SIMD
    for (long i = 0; i < width; i++)
        to[i] += from[i];
}

static void norm(const Norm *n, const float *x, float *out) {
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
    long width = n->width;
    if (n->is_layer_norm) {
        SIMD_SUM(sum)
        for (long i = 0; i < width; i++)
            sum += x[i];
        mean = sum / (float)width;
    }
    SIMD_SUM(squares)
    for (long i = 0; i < width; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / __builtin_sqrtf(squares / (float)width + n->eps);
    SIMD
    for (long i = 0; i < width; i++)
        out[i] = (x[i] - mean) * scale * n->weight[i];
    if (n->bias)
        add(out, n->bias, width);
}

void team_norm(const Norm *n) {
#pragma omp for schedule(static)
    for (int row = 0; row < n->rows; row++) {
        long at = row * n->width;
        if (n->added)
            add(n->hidden + at, n->added + at, n->width);
        if (n->more)
            add(n->hidden + at, n->more + at, n->width);
        norm(n, n->hidden + at, n->out + at);
    }
}

/* Free of branches, so that compilers vectorize them. */
INLINE float silu(float x) {
    float power = exp_negative(-__builtin_fabsf(x)), below = (float)(bits_of(x) >> 31);
    return x * (1.0f - below * (1.0f - power)) / (1.0f + power);
}

/* erf by formula 7.1.26 of Abramowitz and Stegun; its error is below 1.5e-7. */
INLINE float gelu(float x) {
    float z = __builtin_fabsf(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    float sum = 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    float tail = 0.5f * sum * t * exp_negative(-z * z); /* probability of the normal distribution above |x| */
    return x * (0.5f + __builtin_copysignf(0.5f - tail, x));
}

void team_activate(const Activation *a) {
    for (int row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->stride, *up = a->up ? a->up + row * a->stride : 0;
        float *out = a->out + row * a->width;
        if (a->function == SILU) {
#pragma omp for simd schedule(static) nowait
            for (long i = 0; i < a->width; i++)
                out[i] = up ? silu(x[i]) * up[i] : silu(x[i]);
        } else {
#pragma omp for simd schedule(static) nowait
            for (long i = 0; i < a->width; i++)
                out[i] = up ? gelu(x[i]) * up[i] : gelu(x[i]);
        }
    }
#pragma omp barrier
}
