/* Runs programs of operations whose memory has exact ends: driver PROGRAMS RESULTS FIRST.
 *
 * PROGRAMS is what `memory.py` writes; programs before number FIRST are skipped. RESULTS receives, for each program, its
 * number, a status, a detail, and the regions that it is to return. Includes the team, to give each of its threads
 * scratch memory with exact ends as well. All numbers are int64. */
#define _GNU_SOURCE
#include <signal.h>
#include <unistd.h>

#include "arena.h"

static void *exact_scratch(size_t bytes);
static void drop_scratch(void *memory);

/* The team rounds sizes up to cache lines; here the scratch memory of a thread ends where the kernels think it does. */
#define aligned_alloc(alignment, bytes) exact_scratch((size_t)floats * sizeof(float))
#define free(memory) drop_scratch(memory)
#define activate activate_threads /* another function of operations.h has the same name */
#define sigfillset sigemptyset    /* a fault of a helper is explained too */
#include "team.c"
#undef sigfillset
#undef aligned_alloc
#undef free
#undef activate

#include "moves.h"
#include "operations.h"

extern int run(const Operation *operations, long count, int threads);
extern int write_slots(const Move *moves, int count, int threads);
extern int read_slots(const Move *moves, int count, int threads);
extern void dequantize(const Matrix *m, long columns, const int64_t *rows, long first, long count, int format, char *out);

enum { RUN, DEQUANTIZE, WRITE_SLOTS, READ_SLOTS };
enum { GIVEN = 1, RETURNED = 2, POINTERS = 4 };
enum { DONE, NO_MEMORY, INPUT_CHANGED, RED_ZONE_CHANGED, SCRATCH_ZONE_CHANGED };
enum { TIMEOUT_S = 20 };
static const int64_t MAGIC = 0x4b45524e50524f47;

typedef struct {
    int64_t magic, kind, count, threads, is_fresh, regions;
} Header;

typedef struct {
    int64_t size, flags, where, skew;
} Region;

/* The arguments of `dequantize`, in the first region. */
typedef struct {
    const Matrix *matrix;
    int64_t columns;
    const int64_t *rows;
    int64_t first, count, format;
    char *out;
} Rows;

static Slot slots[MAX_SLOTS], scratch[MAX_THREADS];
static int64_t number;

static void *exact_scratch(size_t bytes) {
    for (int i = 0; i < MAX_THREADS; i++)
        if (!scratch[i].start) {
            place(scratch + i, bytes, AT_END, 0);
            return scratch[i].start;
        }
    return 0;
}

static void drop_scratch(void *memory) {
    for (int i = 0; memory && i < MAX_THREADS; i++)
        if (scratch[i].start == memory) {
            release(scratch + i);
            scratch[i].start = 0;
        }
}

/* Takes the scratch memory away, so that the next program allocates exactly what it needs. Nobody runs now. */
static int reset_scratch(void) {
    int is_intact = 1;
    for (int i = 0; i < MAX_THREADS; i++)
        if (scratch[i].start) {
            is_intact &= release(scratch + i);
            scratch[i].start = 0;
        }
    memset(team.members, 0, sizeof team.members);
    return is_intact;
}

static const uint8_t *input, *input_end;

static const void *take(size_t size) {
    const uint8_t *found = input;
    if ((size_t)(input_end - input) < size)
        fail("the programs are cut off", number);
    input += (size + 7) / 8 * 8;
    return found;
}

/* Replaces addresses: 0x5eed, the number of a region, and an offset of 32 bits. */
static void relocate(uint8_t *from, size_t size) {
    for (size_t at = 0; at + 8 <= size; at += 8) {
        uint64_t word;
        memcpy(&word, from + at, 8);
        if (word >> 48 != 0x5eed)
            continue;
        uint8_t *here = slots[word >> 32 & 0xffff].start + (uint32_t)word;
        memcpy(from + at, &here, 8);
    }
}

static int call(const Header *h) {
    if (h->kind == RUN)
        return run((const Operation *)slots[0].start, h->count, (int)h->threads);
    if (h->kind != DEQUANTIZE)
        return (h->kind == WRITE_SLOTS ? write_slots : read_slots)((const Move *)slots[0].start, (int)h->count,
                                                                    (int)h->threads);
    const Rows *r = (const Rows *)slots[0].start;
    dequantize(r->matrix, r->columns, r->rows, r->first, r->count, (int)r->format, r->out);
    return 0;
}

/* Whether the program changed a region that is only read. Structures are compared by nobody: they hold addresses. */
static int is_changed(const Region *r, int index, const void *content) {
    return (r->flags & (GIVEN | RETURNED | POINTERS)) == GIVEN && r->size &&
           memcmp(slots[index].start, content, (size_t)r->size) != 0;
}

static void write_all(int file, const void *from, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t count = write(file, (const char *)from + done, size - done);
        if (count <= 0)
            fail("the results cannot be written", number);
        done += (size_t)count;
    }
}

static void run_program(int results, int is_skipped) {
    const Header *h = take(sizeof *h);
    if (h->magic != MAGIC || h->regions > MAX_SLOTS)
        fail("not a program", number);
    const Region *regions = take(sizeof *regions * (size_t)h->regions);
    const void *contents[MAX_SLOTS] = {0};
    for (int i = 0; i < h->regions; i++)
        if (regions[i].flags & GIVEN)
            contents[i] = take((size_t)regions[i].size);
    if (is_skipped)
        return;
    int64_t status[3] = {number, DONE, 0};
    if (h->is_fresh && !reset_scratch())
        status[1] = SCRATCH_ZONE_CHANGED;
    for (int i = 0; i < h->regions; i++) {
        place(slots + i, (size_t)regions[i].size, (int)regions[i].where, (size_t)regions[i].skew);
        if (contents[i])
            memcpy(slots[i].start, contents[i], (size_t)regions[i].size);
    }
    for (int i = 0; i < h->regions; i++)
        if (regions[i].flags & POINTERS)
            relocate(slots[i].start, (size_t)regions[i].size);
    alarm(TIMEOUT_S);
    if (call(h))
        status[1] = NO_MEMORY;
    alarm(0);
    for (int i = 0; i < h->regions; i++)
        if (is_changed(regions + i, i, contents[i]))
            status[1] = INPUT_CHANGED, status[2] = i;
    int64_t sizes = 0;
    for (int i = 0; i < h->regions; i++)
        sizes += regions[i].flags & RETURNED ? regions[i].size : 0;
    uint8_t *found = malloc(sizeof status + (size_t)sizes), *to = found + sizeof status;
    for (int i = 0; i < h->regions; i++) {
        if (regions[i].flags & RETURNED) {
            memcpy(to, slots[i].start, (size_t)regions[i].size);
            to += regions[i].size;
        }
        if (!release(slots + i))
            status[1] = RED_ZONE_CHANGED, status[2] = i;
    }
    memcpy(found, status, sizeof status);
    write_all(results, found, sizeof status + (size_t)sizes);
    free(found);
}

static void explain_fault(int signal, siginfo_t *about, void *context) {
    (void)signal, (void)context;
    explain(slots, MAX_SLOTS, "region", about->si_addr);
    explain(scratch, MAX_THREADS, "scratch memory", about->si_addr);
    fprintf(stderr, "driver: signal %d at %p in program %ld\n", signal, about->si_addr, (long)number);
    _Exit(4);
}

static const uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        fail("the programs cannot be read", 0);
    *size = (size_t)ftell(file);
    rewind(file);
    uint8_t *found = malloc(*size + 8);
    if (!found || fread(found, 1, *size, file) != *size)
        fail("the programs cannot be read", 1);
    fclose(file);
    return found;
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_sigaction = explain_fault, .sa_flags = SA_SIGINFO};
    size_t size;
    if (argc != 4)
        fail("usage: driver PROGRAMS RESULTS FIRST", argc);
#ifndef HAS_ADDRESS_SANITIZER
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGBUS, &action, 0);
#endif
    sigaction(SIGALRM, &action, 0);
    sigaction(SIGFPE, &action, 0);
    sigaction(SIGILL, &action, 0); /* the traps of a sanitizer without a library */
    input = read_file(argv[1], &size);
    input_end = input + size;
    FILE *results = fopen(argv[2], "ab");
    if (!results)
        fail("the results cannot be written", 0);
    for (long first = atol(argv[3]); input < input_end; number++)
        run_program(fileno(results), number < first);
    if (!reset_scratch()) {
        fputs("driver: a red zone of scratch memory was written to\n", stderr);
        return 5;
    }
    return 0;
}
