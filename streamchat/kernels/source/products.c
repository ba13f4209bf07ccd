/* Products of a matrix with a few vectors. Each token reads every weight once, so fewer bits take less time. */
#include "tiles.h"

/* Most vectors of a task: they and their results are small enough for the caches. */
enum { MOST = 32 };

/* The vectors that a task multiplies with, in the thread's own memory. */
typedef struct {
    const float *floats; /* (count, columns) */
    Rounded rounded[MOST];
    int count;
} Vectors;

static int is_rounded(const Product *p) {
    int found = 0;
    for (int i = 0; i < p->num_matrices; i++)
        found |= p->matrices[i].bits <= 8;
    return found;
}

static int blocks(const Product *p) { return (p->count + MOST - 1) / MOST; }

/* Memory for the sums, the vectors and the rounded vectors of a block. */
long product_memory(const Product *p) {
    long count = p->count < MOST ? p->count : MOST;
    return count * (2 * p->columns + rounded_floats(p->columns));
}

/* Returns the vectors of a block. Each thread computes all of them, which is quicker than waiting for others, unless it
 * still has them from its last task. */
static Vectors vectors(const Product *p, int block, uint64_t tag, Member *member) {
    int first = block * MOST, count = p->count - first < MOST ? p->count - first : MOST;
    long columns = p->columns;
    float *sums = member->memory, *floats = sums + count * columns, *codes = floats + count * columns;
    int is_plain = !p->attention && !p->added && !p->more && !p->norm.weight;
    int is_fresh = member->tag != tag || member->block != block + 1;
    Vectors found = {.floats = is_plain ? p->x + first * columns : floats, .count = count};
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
    for (int n = 0; is_rounded(p) && n < count; n++) {
        float *to = codes + n * rounded_floats(columns);
        found.rounded[n] = (Rounded){(int16_t *)to, to + columns / 2, to + columns / 2 + columns / GROUP};
        for (long g = 0; is_fresh && g < columns / GROUP; g++)
            round_group(found.floats + n * columns + g * GROUP, found.rounded[n], g);
    }
    member->tag = tag;
    member->block = block + 1;
    return found;
}

/* Multiplies a tile of up to 16 rows with all vectors; to: (count, 16). */
static void multiply_tile(const Matrix *m, long columns, long tile, const Vectors *x, float *to) {
    long groups = columns / GROUP, first = tile * TILE, last = first + TILE < m->rows ? first + TILE : m->rows;
    const uint8_t *codes = (const uint8_t *)m->data + tile * groups * BLOCK_BYTES;
    int n = 0;
    if (last - first < TILE)
        memset(to, 0, sizeof(float) * TILE * (size_t)x->count);
#if defined(FOUR_AT_ONCE)
    for (; m->bits == 4 && n + 4 <= x->count; n += 4)
        int4_tile_four(codes, x->rounded + n, groups, to + n * TILE, TILE);
#endif
    for (; n < x->count; n++) {
        float *out = to + n * TILE;
        if (m->bits == 4)
            int4_tile(codes, x->rounded[n], groups, out);
        for (long r = first; r < last; r++) {
            if (m->bits == 8)
                out[r - first] = from_bfloat16(m->scales[r]) *
                                 int8_row((const int8_t *)m->data + r * columns, x->rounded[n], groups);
            else if (m->bits == 16 && m->format == FLOAT16)
                out[r - first] = float16_row((const float16 *)m->data + r * columns, x->floats + n * columns, columns);
            else if (m->bits == 16)
                out[r - first] = bfloat16_row((const bfloat16 *)m->data + r * columns, x->floats + n * columns, columns);
            else if (m->bits == 32)
                out[r - first] = float32_row((const float *)m->data + r * columns, x->floats + n * columns, columns);
        }
    }
    for (n = 0; m->bias && n < x->count; n++)
        add(to + n * TILE, m->bias + first, last - first);
}

static long tiles(const Matrix *m) { return (m->rows + TILE - 1) / TILE; }

/* Tiles of results: with a gate, both matrices give one. */
static long all_tiles(const Product *p) {
    long found = 0;
    for (int i = 0; i < (p->gated ? 1 : p->num_matrices); i++)
        found += tiles(p->matrices + i);
    return found;
}

/* Ranges of tiles that the tiles are divided into, for each block of vectors. */
static int ranges(const Product *p, int threads) {
    long most = threads > 1 ? 2L * threads : 1;
    return (int)(all_tiles(p) < most ? all_tiles(p) : most);
}

int product_tasks(const Product *p, int threads) { return blocks(p) * ranges(p, threads); }

static void write_sums(const Product *p, int block, const Vectors *x, const Member *member) {
    memcpy(p->sum + (long)block * MOST * p->columns, member->memory, sizeof(float) * (size_t)(x->count * p->columns));
}

void product_work(const Product *p, int task, int threads, uint64_t tag, Member *member) {
    int parts = ranges(p, threads), block = task / parts, part = task % parts;
    long stop = all_tiles(p) * (part + 1) / parts, row = 0, passed = 0;
    const Matrix *m = p->matrices;
    Vectors x = vectors(p, block, tag, member);
    float results[MOST * TILE], factors[MOST * TILE];
    if (p->sum && part == 0)
        write_sums(p, block, &x, member);
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
        for (int n = 0; n < x.count; n++)
            memcpy(p->out + ((long)block * MOST + n) * p->out_stride + row + first, results + n * TILE,
                   sizeof(float) * (size_t)rows);
    }
}
