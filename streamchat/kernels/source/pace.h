/* Chooses the number of threads by measuring: all of them, a half, a quarter, ... down to one. */
#ifndef STREAMCHAT_PACE_H
#define STREAMCHAT_PACE_H

/* On a busy machine, threads that wait for each other lose more than they gain. Neighboring levels are therefore tried
 * for a few runs: a lower one if much of the time goes into waiting, a higher one now and then. */
enum { TRIAL_RUNS = 4, SHORTEST = 16, LONGEST = 256 };
#define WAITING_SHARE 0.2 /* try fewer threads above this */
#define CLEARLY 0.95      /* a trial wins below this share of the time before */

typedef struct {
    const void *program; /* the program of the last run: only runs of one program are compared */
    int threads;
    int level; /* threads >> level take part */
    double cost, waiting;    /* moving averages: ns per run, and the share of it that went into waiting */
    int trial, from;         /* runs left of a trial, and the level before it */
    double trial_ns;
    int countdown, interval; /* runs until the next trial */
    int went_up;             /* the last trial was of more threads */
} Pace;

static inline int pace_threads(Pace *p, int threads) {
    if (p->threads != threads)
        *p = (Pace){.threads = threads, .interval = SHORTEST};
    return threads >> p->level;
}

static inline void pace_end_trial(Pace *p) {
    double mean = p->trial_ns / TRIAL_RUNS;
    if (mean < CLEARLY * p->cost) {
        p->cost = mean;
        p->waiting = 0.0;
        p->interval = SHORTEST;
    } else {
        p->level = p->from;
        p->interval = p->interval < LONGEST ? 2 * p->interval : LONGEST;
    }
    p->countdown = p->interval;
}

static inline void pace_start_trial(Pace *p) {
    int up = p->level > 0, down = p->threads >> p->level > 1 && p->waiting > WAITING_SHARE;
    if (!up && !down)
        return;
    p->went_up = up && !(down && p->went_up);
    p->from = p->level;
    p->level += p->went_up ? -1 : 1;
    p->trial = TRIAL_RUNS;
    p->trial_ns = 0.0;
}

/* Records a run of `ns`, of which the caller's thread waited for `waited_ns`; may choose another level. */
static inline void pace_learn(Pace *p, const void *program, double ns, double waited_ns) {
    if (p->program != program) {
        if (p->trial)
            p->level = p->from; /* unfinished */
        p->program = program;
        p->cost = 0.0;
        p->trial = 0;
        return;
    }
    if (p->trial) {
        p->trial_ns += ns;
        if (--p->trial == 0)
            pace_end_trial(p);
        return;
    }
    p->cost = p->cost > 0.0 ? p->cost + (ns - p->cost) / 8.0 : ns;
    p->waiting += (waited_ns / ns - p->waiting) / 8.0;
    if (--p->countdown <= 0)
        pace_start_trial(p);
}

#endif
