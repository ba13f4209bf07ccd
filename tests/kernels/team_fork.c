/* Forks wherever the team allocates memory, as another thread may; the children use the team too. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "team.h"

void *__real_aligned_alloc(size_t alignment, size_t bytes);

static int tasks(const void *data, long phase, int threads) {
    (void)data, (void)phase;
    return threads;
}

static void work(const void *data, long phase, int task, int threads, uint64_t tag, Member *member) {
    (void)data, (void)phase, (void)task, (void)threads, (void)tag;
    for (long i = 0; i < member->floats; i++)
        member->memory[i] = 1.0f;
}

static int run(long floats) {
    TeamProgram program = {.phases = 3, .memory = floats, .tasks = tasks, .work = work};
    return team_run(&program, 3);
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes) {
    static int is_child;
    int status = 0;
    if (is_child)
        return __real_aligned_alloc(alignment, bytes);
    if (!fork()) {
        is_child = 1;
        _exit(run(100) || run(5000) || run(20000));
    }
    wait(&status);
    if (status)
        fprintf(stderr, "status %d of a child\n", status);
    return __real_aligned_alloc(alignment, bytes);
}

int main(void) { return run(1000) || run(10000); }
