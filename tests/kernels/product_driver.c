/* Multiplies on any processor, also an emulated one: reads bits, rows, columns, count as int32, the weights, and the
 * vectors; writes the results. */
#include <stdio.h>
#include <stdlib.h>

#include "operations.h"

extern int run(const Operation *operations, long count, int threads);

static void *read_bytes(size_t size) {
    void *found = malloc(size + 64);
    if (!found || fread(found, 1, size, stdin) != size)
        exit(2);
    return found;
}

int main(void) {
    int32_t *sizes = read_bytes(4 * sizeof(int32_t)), bits = sizes[0], rows = sizes[1], columns = sizes[2], count = sizes[3];
    size_t groups = ((size_t)rows + 15) / 16 * ((size_t)columns / 32), weights = (size_t)rows * (size_t)columns;
    Matrix matrix = {.rows = rows, .bits = bits};
    matrix.data = read_bytes(bits < 16 ? groups * (bits == 4 ? 320 : 544) : weights * (size_t)bits / 8);
    Operation operation = {.kind = PRODUCT};
    operation.product = (Product){.matrices = {matrix}, .num_matrices = 1, .columns = columns, .count = count};
    operation.product.x = read_bytes((size_t)count * (size_t)columns * sizeof(float));
    operation.product.out = malloc((size_t)count * (size_t)rows * sizeof(float));
    operation.product.out_stride = rows;
    if (run(&operation, 1, 2))
        return 3;
    return fwrite(operation.product.out, sizeof(float), (size_t)count * (size_t)rows, stdout) ? 0 : 4;
}
