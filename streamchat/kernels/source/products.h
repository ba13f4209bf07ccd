/* Products of one tile of a matrix with the vectors of a task: the parts that operations share. */
#ifndef STREAMCHAT_PRODUCTS_H
#define STREAMCHAT_PRODUCTS_H

#include "operations.h"

/* TILE: rows that are stored together. MOST: maximum vectors of a task; they and their results are small enough for the
 * caches. A multiple of all WIDE. */
enum { TILE = 16, MOST = 48 };

/* The vectors that a task multiplies with, in the thread's own memory. */
typedef struct {
    const float *floats;   /* (count, columns) */
    const int32_t *panels; /* rounded, of WIDE vectors each, the last of fewer; for quantized weights only */
    int count;
} Vectors;

int is_quantized(const Matrix *m);
/* Number of tiles, the last of which may have fewer rows. */
long tiles(const Matrix *m);
/* Number of 32-bit words of a rounded vector. */
long rounded_size(long columns);
/* Rounds all vectors. */
void fill_panels(const Vectors *x, long columns, int32_t *panels);
/* Multiplies a tile of up to 16 rows with all vectors; to: (count, 16). */
void multiply_tile(const Matrix *m, long columns, long tile, const Vectors *x, float *to);

#endif
