/* Weights as numbers again: rows of an embedding, or a whole matrix. */
#include "tiles.h"

/* Scale and minimum of a part of a group in one row. */
typedef struct {
    float scale, minimum;
} Steps;

static float float16_at(const uint8_t *from) {
    float16 x;
    memcpy(&x, from, sizeof x);
    return from_float16(x);
}

static Steps steps_of(const Matrix *m, const uint8_t *block, const uint8_t *header, int part, int row) {
    const uint8_t *at = block + codes_bytes(m->bits);
    if (m->format == SUPER_32)
        return (Steps){float16_at(header + 2 * row) * (float)at[row],
                       -(float16_at(header + 2 * (TILE + row)) * (float)at[TILE + row])};
    if (m->format == SUPER_16)
        return (Steps){float16_at(header + 2 * row) * (float)(int8_t)at[TILE * part + row], 0.0f};
    return (Steps){float16_at(at + 2 * row), m->format == SCALE_MIN ? float16_at(at + 2 * (TILE + row)) : 0.0f};
}

static int code_at(int bits, const uint8_t *block, int row, int column) {
    if (bits == 8)
        return ((const int8_t *)block)[32 * (column / 2) + 2 * row + column % 2];
    const uint8_t *half = block + 64 * (column / 8) + 4 * row + 2 * (column % 2);
    return half[column % 8 / 4] >> (column / 2 % 2 ? 4 : 0) & 15;
}

static void dequantize_row(const Matrix *m, long columns, long row, int format, char *out) {
    const uint8_t *tile = (const uint8_t *)m->data + row / TILE * tile_bytes(m->bits, m->format, columns / GROUP);
    int lane = (int)(row % TILE), each = GROUP / parts_of(m->format);
    for (long g = 0; g < columns / GROUP; g++) {
        const uint8_t *block = block_of(m->bits, m->format, tile, g);
        for (int k = 0; k < GROUP; k++) {
            Steps steps = steps_of(m, block, header_of(m->bits, m->format, tile, g), k / each, lane);
            float weight = steps.scale * (float)code_at(m->bits, block, lane, k) + steps.minimum;
            long at = g * GROUP + k;
            if (format == FLOAT32)
                ((float *)out)[at] = weight;
            else
                ((uint16_t *)out)[at] = format == FLOAT16 ? to_float16(weight) : to_bfloat16(weight);
        }
    }
}

/* Writes rows of a matrix of 4 or 8-bit codes to out: (count, columns) in `format`. rows: their numbers, or NULL for
 * `count` rows from `first` on. */
EXPORT void dequantize(const Matrix *m, long columns, const int64_t *rows, long first, long count, int format,
                       char *out) {
    long size = columns * (format == FLOAT32 ? 4 : 2);
    for (long n = 0; n < count; n++)
        dequantize_row(m, columns, rows ? rows[n] : first + n, format, out + n * size);
}
