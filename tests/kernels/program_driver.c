/* Runs a program of operations on any processor, also an emulated one. Reads the number of regions of memory, and for
 * each its address in the other process, its size and its contents; the number of operations, which are in the first
 * region, and of threads. All numbers are int64. Addresses within regions are replaced by those of this process. Writes
 * all regions after the run.
 * With 0 operations, it dequantizes rows: the first region has the arguments, then the matrix. With -1, the first region
 * has moves whose slots are written, with -2, moves whose originals are. */
#include <stdio.h>
#include <stdlib.h>

#include "moves.h"
#include "operations.h"

extern int run(const Operation *operations, long count, int threads);
extern void dequantize(const Matrix *m, long columns, const int64_t *rows, long first, long count, int format, char *out);
extern int write_slots(const Move *moves, int count, int threads);
extern int read_slots(const Move *moves, int count, int threads);

enum { DEQUANTIZE = 0, WRITE_SLOTS = -1, READ_SLOTS = -2 };

typedef struct {
    int64_t columns, first, count, format;
    const int64_t *rows;
    char *out;
    Matrix matrix;
} Rows;

typedef struct {
    uint64_t address, size;
    char *here;
} Region;

static void read_bytes(void *to, size_t size) {
    if (size && fread(to, 1, size, stdin) != size)
        exit(2);
}

static int64_t read_number(void) {
    int64_t number;
    read_bytes(&number, sizeof number);
    return number;
}

/* Replaces addresses in the structures of a region; sizes and strides are too small to be taken for one. */
static void relocate(const Region *in, const Region *regions, int64_t count) {
    for (uint64_t at = 0; at + 8 <= in->size; at += 8) {
        uint64_t word;
        memcpy(&word, in->here + at, 8);
        for (int64_t i = 0; i < count; i++)
            if (word - regions[i].address < regions[i].size) {
                char *moved = regions[i].here + (word - regions[i].address);
                memcpy(in->here + at, &moved, 8);
                break;
            }
    }
}

int main(void) {
    int64_t count = read_number(), structures = read_number();
    Region *regions = calloc((size_t)count, sizeof *regions);
    for (int64_t i = 0; i < count; i++) {
        regions[i].address = (uint64_t)read_number();
        regions[i].size = (uint64_t)read_number();
        regions[i].here = malloc(regions[i].size + 64);
        read_bytes(regions[i].here, regions[i].size);
    }
    int64_t operations = read_number(), threads = read_number();
    uint64_t size = operations > 0 ? (uint64_t)operations * sizeof(Operation) : sizeof(Rows);
    if (operations < 0 ? regions[0].size % sizeof(Move) : regions[0].size != size)
        return 3; /* the structures differ in size */
    for (int64_t i = 0; i < structures; i++)
        relocate(regions + i, regions, count);
    const Rows *r = (const Rows *)regions[0].here;
    const Move *moves = (const Move *)regions[0].here;
    int status = 0, number = (int)(regions[0].size / sizeof(Move));
    if (operations == WRITE_SLOTS)
        status = write_slots(moves, number, (int)threads);
    else if (operations == READ_SLOTS)
        status = read_slots(moves, number, (int)threads);
    else if (operations == DEQUANTIZE)
        dequantize(&r->matrix, r->columns, r->rows, r->first, r->count, (int)r->format, r->out);
    else
        status = run((const Operation *)regions[0].here, operations, (int)threads);
    if (status)
        return 4;
    for (int64_t i = structures; i < count; i++)
        if (regions[i].size && fwrite(regions[i].here, 1, regions[i].size, stdout) != regions[i].size)
            return 5;
    return 0;
}
