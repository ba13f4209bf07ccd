/* Operations on rows: sums, norms, activations. */
#include "operations.h"

void add(float *to, const float *from, long width) {
    SIMD
    for (long i = 0; i < width; i++)
        to[i] += from[i];
}

void normalize(const Norm *n, const float *x, long width, float *out) {
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
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

void activate(int function, float *x, long count) {
    if (function == SILU) {
        SIMD
        for (long i = 0; i < count; i++)
            x[i] = silu(x[i]);
    } else if (function == GELU) {
        SIMD
        for (long i = 0; i < count; i++)
            x[i] = gelu(x[i]);
    }
}
