/* A team of threads that works through a program together. */
#ifndef STREAMCHAT_TEAM_H
#define STREAMCHAT_TEAM_H

#include <stdint.h>

/* In bytes. Apple silicon has lines of 128; other processors have 64, and many of them read two at once. */
enum { CACHE_LINE = 128 };

/* Data of one thread, on its own cache line. */
typedef struct {
    _Alignas(CACHE_LINE) float *memory; /* scratch memory */
    long floats;                        /* its size */
    uint64_t tag;                       /* phase that filled `memory` */
    int block;                          /* 1 + number of the block of vectors in `memory`; 0 = none */
} Member;

/* A program: phases, one after the other, each of independent tasks. */
typedef struct {
    const void *data;
    long phases;
    long memory; /* scratch memory of each thread, in floats */
    /* Returns the number of tasks of a phase, such that `threads` threads are equally busy; 0 skips the phase. */
    int (*tasks)(const void *data, long phase, int threads);
    /* Does one task of a phase. `tag` identifies this phase of this run among all phases of all runs. */
    void (*work)(const void *data, long phase, int task, int threads, uint64_t tag, Member *member);
} TeamProgram;

/* Runs a program with up to `threads` threads, including the caller's; fewer while other processes keep the cores busy.
 * Results do not depend on the number: any thread may do any task. Concurrent calls wait for each other.
 * Returns 0, or -1 if there is not enough memory. */
int team_run(const TeamProgram *program, int threads);

#endif
