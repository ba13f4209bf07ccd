/* Runs chains of phases on the team, from two threads at once, and compares them with what one thread computes. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "team.h"

enum { CELLS = 13, PHASES = 300, RUNS = 300 };

static int tasks(const void *data, long phase, int threads) {
    (void)data, (void)threads;
    return 1 + (int)(phase % CELLS);
}

/* Each task reads all results of the phase before, and writes one; the first also clears those that nobody writes. */
static void work(const void *data, long phase, int task, int threads, uint64_t tag, Member *member) {
    const long *from = (const long *)data + phase % 2 * CELLS;
    long *to = (long *)data + (phase + 1) % 2 * CELLS, sum = 0;
    (void)threads;
    if (member->tag == tag && member->memory[0] != (float)(phase % 100))
        abort();
    member->tag = tag;
    member->memory[0] = (float)(phase % 100);
    for (int i = 0; i < CELLS; i++)
        sum += from[i];
    to[task] = sum % 1000003 + task;
    for (int i = 1 + (int)(phase % CELLS); task == 0 && i < CELLS; i++)
        to[i] = 0;
}

static long run_chain(int threads) {
    long cells[2 * CELLS] = {1}, sum = 0;
    TeamProgram program = {cells, PHASES, 16, tasks, work};
    if (team_run(&program, threads))
        abort();
    for (int i = 0; i < 2 * CELLS; i++)
        sum += cells[i];
    return sum;
}

static long expected;

static void *run_chains(void *argument) {
    for (int i = 0; i < RUNS; i++) {
        if (run_chain(1 + ((int)(long)argument + i) % 4) != expected)
            fputs("another result\n", stderr);
        if (i % 50 == 0)
            usleep(500); /* the helpers go to sleep */
    }
    return 0;
}

int main(void) {
    pthread_t threads[2];
    expected = run_chain(1);
    for (long i = 0; i < 2; i++)
        pthread_create(threads + i, 0, run_chains, (void *)(i + 2));
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], 0);
    return 0;
}
