/* Products of a matrix with one vector or many. Each block of vectors reads every weight once, so fewer bits take less
 * time. */
#include "products.h"

#include "tiles.h"

int is_quantized(const Matrix *m) { return m->bits < 16; }

static int needs_rounded(const Product *p) {
    int found = 0;
    for (int i = 0; i < p->num_matrices; i++)
        found |= is_quantized(p->matrices + i);
    return found;
}

/* Number of blocks of vectors: if there is more than one for each thread, all threads get as many. */
static int blocks(const Product *p, int threads) {
    int fewest = (p->count + MOST - 1) / MOST;
    return fewest > threads ? (fewest + threads - 1) / threads * threads : fewest;
}

/* First vector of a block. All blocks have about the same number of whole panels. */
static int block_start(const Product *p, int block, int threads) {
    long panels = (p->count + WIDE - 1) / WIDE, start = panels * block / blocks(p, threads) * WIDE;
    return start < p->count ? (int)start : p->count;
}

long rounded_size(long columns) { return panel_words(columns); }

/* Memory for the sums, the vectors and the rounded vectors of a block. */
long product_memory(const Product *p) {
    long count = p->count < MOST ? p->count : MOST, each = 2 * p->columns;
    each += needs_rounded(p) ? panel_words(p->columns) : 0;
    return count * each;
}

void fill_panels(const Vectors *x, long columns, int32_t *panels) {
    for (int n = 0; n < x->count; n += WIDE)
        round_panel(x->floats + n * columns, x->count - n < WIDE ? x->count - n : WIDE, columns,
                    panels + n * panel_words(columns));
}

/* Returns the vectors of a block. Each thread computes all of them, which is quicker than waiting for others, unless it
 * still has them from its last task. */
static Vectors vectors(const Product *p, int block, int threads, uint64_t tag, Member *member) {
    int first = block_start(p, block, threads), count = block_start(p, block + 1, threads) - first;
    long columns = p->columns;
    float *sums = member->memory, *floats = sums + count * columns, *panels = floats + count * columns;
    int is_plain = !p->attention && !p->added && !p->more && !p->norm.weight && !p->sum;
    int is_fresh = member->tag != tag || member->block != block + 1;
    Vectors found = {.floats = is_plain ? p->x + first * columns : floats, .first = first, .count = count};
    found.panels = (const int32_t *)panels;
    if (is_fresh && !is_plain) {
        for (int n = 0; n < count; n++) {
            float *sum = sums + n * columns, *to = floats + n * columns;
            if (p->attention)
                combine(p->attention, first + n, sum);
            else
                memcpy(sum, p->x + (first + n) * columns, sizeof(float) * (size_t)columns);
            if (p->added) {
                const float *added = p->added + (first + n) * columns;
                if (p->added_norm.weight)
                    normalize(&p->added_norm, added, columns, to);
                add_scaled(sum, p->added_norm.weight ? to : added, p->added_scale, columns);
            }
            if (p->more)
                add_scaled(sum, p->more + (first + n) * columns, p->added_scale, columns);
            if (p->norm.weight)
                normalize(&p->norm, sum, columns, to);
            else
                memcpy(to, sum, sizeof(float) * (size_t)columns);
        }
    }
    if (is_fresh && needs_rounded(p))
        fill_panels(&found, columns, (int32_t *)panels);
    member->tag = tag;
    member->block = block + 1;
    return found;
}

/* Multiplies a tile of 16 quantized rows with all vectors; to: (count, 16). */
static void multiply_quantized(const Matrix *m, long tile, long columns, const Vectors *x, float *to) {
    TileProduct multiply = tile_product(m->bits, m->format);
    const uint8_t *data = (const uint8_t *)m->data + tile * tile_bytes(m->bits, m->format, columns / GROUP);
    for (int n = 0; n < x->count; n += WIDE) {
        int count = x->count - n < WIDE ? x->count - n : WIDE;
        multiply(data, x->panels + n * panel_words(columns), count, columns / GROUP, to + n * TILE);
    }
}

/* Product of a row of 16 or 32-bit numbers with a vector. */
INLINE float plain_row(const Matrix *m, long row, long columns, const float *x) {
    if (m->bits == 32)
        return float32_row((const float *)m->data + row * columns, x, columns);
    if (m->format == FLOAT16)
        return float16_row((const float16 *)m->data + row * columns, x, columns);
    return bfloat16_row((const bfloat16 *)m->data + row * columns, x, columns);
}

void multiply_tile(const Matrix *m, long columns, long tile, const Vectors *x, float *to) {
    long first = tile * TILE, last = first + TILE < m->rows ? first + TILE : m->rows;
    if (last - first < TILE)
        memset(to, 0, sizeof(float) * TILE * (size_t)x->count);
    if (is_quantized(m))
        multiply_quantized(m, tile, columns, x, to);
    else
        for (int n = 0; n < x->count; n++)
            for (long r = first; r < last; r++)
                to[n * TILE + r - first] = plain_row(m, r, columns, x->floats + n * columns);
    for (int n = 0; m->bias && n < x->count; n++)
        add(to + n * TILE, m->bias + first, last - first);
}

long tiles(const Matrix *m) { return (m->rows + TILE - 1) / TILE; }

/* Tiles of results: with a gate, both matrices give one. */
static long all_tiles(const Product *p) {
    long found = 0;
    for (int i = 0; i < (p->gated ? 1 : p->num_matrices); i++)
        found += tiles(p->matrices + i);
    return found;
}

/* Number of ranges that the tiles are divided into for each block of vectors: few if there are many blocks, as each
 * thread prepares the vectors of its tasks again. */
static int ranges(const Product *p, int threads) {
    int n = blocks(p, threads);
    long most = threads > 1 ? (2L * threads + n - 1) / n : 1;
    return (int)(all_tiles(p) < most ? all_tiles(p) : most);
}

int product_tasks(const Product *p, int threads) {
    return p->count > 0 ? blocks(p, threads) * ranges(p, threads) : 0;
}

static void write_sums(const Product *p, const Vectors *x, const Member *member) {
    memcpy(p->sum + x->first * p->columns, member->memory, sizeof(float) * (size_t)(x->count * p->columns));
}

/* Copies the first `rows` columns of results, (count, 16), to rows of `stride` floats. */
static void write_results(const float *results, int count, long rows, float *to, long stride) {
    for (int n = 0; n < count; n++, results += TILE, to += stride)
        if (rows == TILE)
            memcpy(to, results, sizeof(float) * TILE); /* of constant size: a few instructions, not a call */
        else
            memcpy(to, results, sizeof(float) * (size_t)rows);
}

void product_work(const Product *p, int task, int threads, uint64_t tag, Member *member) {
    int parts = ranges(p, threads), block = task / parts, part = task % parts;
    long stop = all_tiles(p) * (part + 1) / parts, row = 0, passed = 0;
    const Matrix *m = p->matrices;
    Vectors x = vectors(p, block, threads, tag, member);
    float results[MOST * TILE], factors[MOST * TILE];
    if (p->sum && part == 0)
        write_sums(p, &x, member);
    for (long t = all_tiles(p) * part / parts; t < stop; t++) {
        for (; t - passed >= tiles(m); m++) {
            passed += tiles(m);
            row += m->rows;
        }
        long first = (t - passed) * TILE, rows = m->rows - first < TILE ? m->rows - first : TILE;
        multiply_tile(m, p->columns, t - passed, &x, results);
        activate(p->function, p->softcap, results, (long)x.count * TILE);
        if (p->gated) {
            multiply_tile(p->matrices + 1, p->columns, t, &x, factors);
            for (int i = 0; i < x.count * TILE; i++)
                results[i] *= factors[i];
        }
        write_results(results, x.count, rows, p->out + x.first * p->out_stride + row + first, p->out_stride);
    }
}
