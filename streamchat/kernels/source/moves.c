/* Keys and values at other positions: from float32 copies without rotary positions to cached slots, and back.
 *
 * What a head becomes does not depend on how many others are moved with it, so that undo can write slots again to the
 * bit.
 */
#include "codes.h"
#include "moves.h"

enum { TO_SLOTS = 1, TO_ORIGINALS = -1 };

/* Rotates `2 * pairs` elements of a head by the angles of a token, or back. */
INLINE void rotate_part(const Move *m, int pairs, int token, float direction, float *x) {
    const float *cos = m->cos + (long)token * pairs, *sin = m->sin + (long)token * pairs;
    float turned[MAX_DIM];
    x += m->first_dim;
    if (m->is_interleaved)
        for (int d = 0; d < pairs; d++) {
            float s = direction * sin[d];
            turned[2 * d] = x[2 * d] * cos[d] - x[2 * d + 1] * s;
            turned[2 * d + 1] = x[2 * d + 1] * cos[d] + x[2 * d] * s;
        }
    else
        for (int d = 0; d < pairs; d++) {
            float s = direction * sin[d];
            turned[d] = x[d] * cos[d] - x[d + pairs] * s;
            turned[d + pairs] = x[d + pairs] * cos[d] + x[d] * s;
        }
    memcpy(x, turned, sizeof(float) * 2 * (size_t)pairs);
}

INLINE void rotate(const Move *m, int dim, int token, float direction, float *x) {
    if (2 * m->pairs == dim)
        rotate_part(m, dim / 2, token, direction, x);
    else
        rotate_part(m, m->pairs, token, direction, x);
}

INLINE void write_head(const Move *m, int dim, int token, const float *from, char *to, uint16_t *scale) {
    float x[MAX_DIM];
    memcpy(x, from, sizeof(float) * (size_t)dim);
    if (m->cos)
        rotate(m, dim, token, TO_SLOTS, x);
    encode_head(x, dim, m->format, m->searches, to, scale);
}

INLINE void read_head(const Move *m, int dim, int token, const char *from, const uint16_t *scale, float *x) {
    if (has_scales(m->format)) {
        widen_heads(from, scale, m->format, 1, dim, x);
        turn(x, dim);
    } else if (m->format == FLOAT32)
        memcpy(x, from, sizeof(float) * (size_t)dim);
    else if (m->format == BFLOAT16)
        for (int d = 0; d < dim; d++)
            x[d] = from_bfloat16(((const bfloat16 *)from)[d]);
    else
        for (int d = 0; d < dim; d++)
            x[d] = from_float16(((const float16 *)from)[d]);
    if (m->cos)
        rotate(m, dim, token, TO_ORIGINALS, x);
}

INLINE void move_heads(const Move *m, int dim, int direction) {
    long each = head_bytes(m->format, dim);
    for (int h = 0; h < m->heads; h++)
        for (int token = 0; token < m->tokens; token++) {
            float *original = m->originals + h * m->original_stride + (long)token * dim;
            char *slot = m->slots + h * m->head_stride_bytes + token * each;
            uint16_t *scale = scale_at(m->scales, h * m->scale_stride + token);
            if (direction == TO_SLOTS)
                write_head(m, dim, token, original, slot, scale);
            else
                read_head(m, dim, token, slot, scale, original);
        }
}

/* Compilers keep heads of a known size in registers. */
static void move(const Move *m, int direction) {
    if (m->dim == 64)
        move_heads(m, 64, direction);
    else if (m->dim == 128)
        move_heads(m, 128, direction);
    else
        move_heads(m, m->dim, direction);
}

typedef struct {
    const Move *moves;
    int count, direction;
} Moves;

static int tasks(const void *data, long phase, int threads) {
    (void)phase, (void)threads;
    return ((const Moves *)data)->count;
}

static void work(const void *data, long phase, int task, int threads, uint64_t tag, Member *member) {
    (void)phase, (void)threads, (void)tag, (void)member;
    const Moves *all = data;
    move(all->moves + task, all->direction);
}

static int move_all(const Move *moves, int count, int threads, int direction) {
    Moves all = {moves, count, direction};
    TeamProgram program = {.data = &all, .phases = 1, .tasks = tasks, .work = work};
    return team_run(&program, threads);
}

/* Writes slots from their originals. No two moves may have the same slots. Returns 0, or -1 if there is not enough
 * memory for the threads. */
EXPORT int write_slots(const Move *moves, int count, int threads) { return move_all(moves, count, threads, TO_SLOTS); }

/* Writes originals from their slots. */
EXPORT int read_slots(const Move *moves, int count, int threads) { return move_all(moves, count, threads, TO_ORIGINALS); }
