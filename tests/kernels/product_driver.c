/* Multiplies on any processor, also an emulated one: reads bits, format, rows, columns, count as int32, the weights, and the
 * vectors; writes the results. Repeats until its input ends. */
#include <stdio.h>
#include <stdlib.h>

#include "tiles.h"

extern int run(const Operation *operations, long count, int threads);

static void *read_bytes(size_t size) {
    void *found = malloc(size + 64);
    if (!found || fread(found, 1, size, stdin) != size)
        exit(2);
    return found;
}

static int multiply(const int32_t *sizes) {
    int32_t bits = sizes[0], format = sizes[1], rows = sizes[2], columns = sizes[3], count = sizes[4];
    size_t tiles = ((size_t)rows + TILE - 1) / TILE, weights = (size_t)rows * (size_t)columns;
    size_t each = bits < 16 ? (size_t)tile_bytes(bits, format, columns / GROUP) : 0;
    void *data = read_bytes(bits < 16 ? tiles * each : weights * (size_t)bits / 8);
    float *x = read_bytes((size_t)count * (size_t)columns * sizeof(float));
    float *out = malloc((size_t)count * (size_t)rows * sizeof(float));
    Matrix matrix = {.data = data, .rows = rows, .bits = bits, .format = format};
    Operation operation = {.kind = PRODUCT};
    operation.product = (Product){.matrices = {matrix}, .num_matrices = 1, .columns = columns, .count = count};
    operation.product.x = x;
    operation.product.out = out;
    operation.product.out_stride = rows;
    if (run(&operation, 1, 2))
        return 3;
    if (!fwrite(out, sizeof(float), (size_t)count * (size_t)rows, stdout))
        return 4;
    free(data);
    free(x);
    free(out);
    return 0;
}

int main(void) {
    int32_t sizes[5];
    while (fread(sizes, sizeof sizes, 1, stdin)) {
        int failed = multiply(sizes);
        if (failed)
            return failed;
    }
    return 0;
}
