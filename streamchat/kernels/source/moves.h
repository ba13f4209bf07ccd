/* A range of slots of a layer's keys or values, and their float32 copies without rotary positions. */
#ifndef STREAMCHAT_MOVES_H
#define STREAMCHAT_MOVES_H

#include <stdint.h>

/* originals: `tokens` heads of `dim` floats in sequence for each of `heads`, `original_stride` floats apart.
 * slots: as many in `format`, a number format or INT8 or INT4; heads are `head_stride_bytes` apart. scales: of formats
 * with scales, `scale_stride` apart, else not used. searches: see `round_head`.
 * cos, sin: (tokens, pairs), of the positions of the slots, or NULL for heads without rotary positions. The elements from
 * `first_dim` on are rotated, `2 * pairs` of them, by halves or, if `is_interleaved`, in pairs of neighbors. */
typedef struct {
    float *originals;
    char *slots;
    uint16_t *scales;
    const float *cos, *sin;
    long original_stride, head_stride_bytes, scale_stride;
    int heads, tokens, dim, first_dim, pairs, is_interleaved, format, searches;
} Move;

#endif
