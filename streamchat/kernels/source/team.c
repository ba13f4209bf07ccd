/* The team: the caller's thread and its helpers take tasks from one counter.
 *
 * A helper that the operating system suspends between two tasks delays no other thread: the others do its work. There
 * is no barrier; a phase ends when its last task is complete. A thread that finds no task spins for a bounded time, as
 * the next phase usually starts within microseconds, and then sleeps. After a run, helpers sleep at once: the caller
 * needs the cores for what it computes between two runs.
 *
 * Needs nothing but C11 atomics and POSIX threads, so that it is the same on Linux and on macOS.
 */
#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pace.h"

/* Tells the processor that this thread only waits. */
static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

enum { MAX_THREADS = 256, SPINS = 32, TASK_BITS = 24 };
static const int64_t SPIN_NS = 100000;

static struct {
    /* number of the current phase << TASK_BITS | its tasks that nobody has taken yet. Phases of all runs are numbered
     * consecutively: 40 bits last for a year at full speed. */
    _Alignas(CACHE_LINE) _Atomic uint64_t state;
    /* tasks of the current phase that are not complete */
    _Alignas(CACHE_LINE) _Atomic int open;
    int tasks; /* of the current phase */
    _Alignas(CACHE_LINE) _Atomic int active; /* threads of the current run */
    _Atomic int sleeping;                    /* active threads that sleep */
    _Atomic int running;                     /* whether there are more phases in the current run */
    const TeamProgram *program;
    int threads;    /* number of threads that the tasks are made for */
    uint64_t first; /* number of the program's first phase */
    int started;    /* members that exist */
    /* written by the caller's thread only */
    _Alignas(CACHE_LINE) Pace pace;
    double waited_ns; /* in this run */
    Member members[MAX_THREADS];
} team;

static pthread_mutex_t one_run = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER, wanted = PTHREAD_COND_INITIALIZER;

/* In nanoseconds; on macOS, CLOCK_MONOTONIC counts microseconds. */
#ifdef CLOCK_UPTIME_RAW
static const clockid_t CLOCK = CLOCK_UPTIME_RAW;
#else
static const clockid_t CLOCK = CLOCK_MONOTONIC;
#endif

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int is_active(int index) { return index < atomic_load(&team.active); }

/* Sleeps until a phase opens, or, if the thread is not active, until it is. */
static void sleep_while(uint64_t seen, int index) {
    pthread_mutex_lock(&lock);
    while (!is_active(index))
        pthread_cond_wait(&wanted, &lock);
    atomic_fetch_add(&team.sleeping, 1);
    while (atomic_load(&team.state) == seen && is_active(index))
        pthread_cond_wait(&opened, &lock);
    atomic_fetch_sub(&team.sleeping, 1);
    pthread_mutex_unlock(&lock);
}

static int may_spin(int index) { return is_active(index) && atomic_load(&team.running); }

/* Spins for a while; returns whether the state has changed. */
static int spin_while(uint64_t seen, int index) {
    for (int64_t until = now() + SPIN_NS; may_spin(index) && now() < until;)
        for (int i = 0; i < SPINS; i++, pause_briefly())
            if (atomic_load(&team.state) != seen)
                return 1;
    return 0;
}

static void wait_while(uint64_t seen, int index) {
    int64_t started = now();
    if (!spin_while(seen, index))
        sleep_while(seen, index);
    if (index == 0)
        team.waited_ns += (double)(now() - started);
}

static void open_phase(uint64_t number) {
    int tasks = 0;
    for (long phase; (phase = (long)(number - team.first)) < team.program->phases; number++)
        if ((tasks = team.program->tasks(team.program->data, phase, team.threads)))
            break; /* nobody would complete a phase without tasks */
    team.tasks = tasks;
    atomic_store(&team.open, tasks);
    atomic_store(&team.running, tasks > 0);
    atomic_store(&team.state, number << TASK_BITS | (uint64_t)tasks);
    if (atomic_load(&team.sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&opened);
        pthread_mutex_unlock(&lock);
    }
}

/* Takes a task and does it; returns whether the phase had one. Until a task is taken, nothing of the program may be
 * read: the run may have ended. After that, the phase cannot end before the task is complete. */
static int do_task(uint64_t state, Member *member) {
    uint64_t number = state >> TASK_BITS, left = state & ((1u << TASK_BITS) - 1);
    if (!left)
        return 0;
    if (!atomic_compare_exchange_strong(&team.state, &state, state - 1))
        return 1;
    const TeamProgram *program = team.program;
    program->work(program->data, (long)(number - team.first), team.tasks - (int)left, team.threads, number + 1,
                  member);
    if (atomic_fetch_sub(&team.open, 1) == 1)
        open_phase(number + 1);
    return 1;
}

static void *help(void *argument) {
    int index = (int)(intptr_t)argument;
    for (;;) {
        uint64_t state = atomic_load(&team.state);
        if (!is_active(index) || !do_task(state, &team.members[index]))
            wait_while(state, index);
    }
    return 0;
}

/* Threads do not survive a fork: the child process starts its own, even if another thread was inside a run. It gives up
 * the scratch memory, as that thread may just have been replacing it. */
static void after_fork(void) {
    memset(team.members, 0, sizeof team.members);
    one_run = lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    opened = wanted = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    atomic_store(&team.active, 1);
    atomic_store(&team.sleeping, 0);
    team.started = 1;
}

static void prepare(void) {
    atomic_store(&team.active, 1);
    team.started = 1;
    pthread_atfork(0, 0, after_fork);
}

/* Starts helpers up to `threads` threads, as far as the system permits. Signals stay with the caller's threads. */
static void start_helpers(int threads) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; team.started < threads; team.started++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)team.started))
            break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static int ensure_memory(int threads, long floats) {
    for (Member *member = team.members; member < team.members + threads; member++) {
        if (member->memory && member->floats >= floats)
            continue;
        free(member->memory);
        size_t bytes = ((size_t)floats * sizeof(float) / CACHE_LINE + 1) * CACHE_LINE;
        *member = (Member){.memory = aligned_alloc(CACHE_LINE, bytes), .floats = floats};
        if (!member->memory)
            return -1;
    }
    return 0;
}

static void activate(int threads) {
    if (threads == atomic_load(&team.active))
        return;
    pthread_mutex_lock(&lock);
    atomic_store(&team.active, threads);
    pthread_cond_broadcast(&wanted);
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&lock);
}

int team_run(const TeamProgram *program, int threads) {
    threads = threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
    pthread_mutex_lock(&one_run);
    pthread_once(&prepared, prepare);
    int failed = ensure_memory(threads, program->memory);
    if (!failed) {
        int64_t started = now();
        team.waited_ns = 0.0;
        int active = pace_threads(&team.pace, threads);
        start_helpers(active);
        activate(active < team.started ? active : team.started);
        team.program = program;
        team.threads = threads;
        team.first = (atomic_load(&team.state) >> TASK_BITS) + 1;
        open_phase(team.first);
        uint64_t end = team.first + (uint64_t)program->phases, state;
        while ((state = atomic_load(&team.state)) >> TASK_BITS != end)
            if (!do_task(state, &team.members[0]))
                wait_while(state, 0);
        pace_learn(&team.pace, program->data, (double)(now() - started), team.waited_ns);
    }
    pthread_mutex_unlock(&one_run);
    return failed;
}
