/* Operations on rows: sums, norms, activations. */
#include "operations.h"

void add(float *to, const float *from, long width) {
    SIMD
    for (long i = 0; i < width; i++)
        to[i] += from[i];
}

void add_scaled(float *to, const float *from, float scale, long width) {
    SIMD
    for (long i = 0; i < width; i++)
        to[i] += scale * from[i];
}

Moments moments(const Norm *n, const float *x, long width) {
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
    return (Moments){mean, 1.0f / __builtin_sqrtf(squares / (float)width + n->eps)};
}

/* Normalizes a part of a row with the weights from `at` on. */
void normalize_part(const Norm *n, Moments m, long at, const float *x, long width, float *out) {
    const float *weight = n->weight + at;
    SIMD
    for (long i = 0; i < width; i++)
        out[i] = (x[i] - m.mean) * m.scale * weight[i];
    if (n->bias)
        add(out, n->bias + at, width);
}

void normalize(const Norm *n, const float *x, long width, float *out) {
    normalize_part(n, moments(n, x, width), 0, x, width, out);
}

/* Free of branches, so that compilers vectorize them. */
INLINE float silu(float x) {
    float power = exp_negative(-__builtin_fabsf(x)), below = (float)(bits_of(x) >> 31);
    return x * (1.0f - below * (1.0f - power)) / (1.0f + power);
}

/* x * sigmoid(2 u), which is x / 2 * (1 + tanh(u)). */
INLINE float gelu_tanh(float x) {
    float u = 0.79788456f * (x + 0.044715f * x * x * x);
    float power = exp_negative(-2.0f * __builtin_fabsf(u)), below = (float)(bits_of(x) >> 31);
    return x * (1.0f - below * (1.0f - power)) / (1.0f + power);
}

INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; } /* NaN stays NaN */

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

#define EACH(VALUE) \
    do { \
        SIMD \
        for (long i = 0; i < count; i++) \
            x[i] = VALUE; \
    } while (0)

void activate(int function, float softcap, float *x, long count) {
    switch (function) {
    case SILU:
        EACH(silu(x[i]));
        break;
    case GELU:
        EACH(gelu(x[i]));
        break;
    case GELU_TANH:
        EACH(gelu_tanh(x[i]));
        break;
    case RELU:
        EACH(relu(x[i]));
        break;
    case RELU2:
        EACH(relu(x[i]) * relu(x[i]));
        break;
    case SOFTCAP:
        EACH(capped(x[i], softcap));
        break;
    default:
        break;
    }
}
