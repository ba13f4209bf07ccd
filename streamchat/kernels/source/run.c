/* Runs a program of operations. */
#include "operations.h"

static int tasks(const void *data, long phase, int threads) {
    const Operation *each = (const Operation *)data + phase;
    switch (each->kind) {
    case PRODUCT:
        return product_tasks(&each->product, threads);
    case ATTEND:
        return attend_tasks(each->attention);
    case ROUTE:
        return route_tasks(each->experts, threads);
    case EXPERTS_UP:
        return up_tasks(each->experts, threads);
    case EXPERTS_DOWN:
        return down_tasks(each->experts, threads);
    default:
        return store_tasks(each->attention);
    }
}

static void work(const void *data, long phase, int task, int threads, uint64_t tag, Member *member) {
    const Operation *each = (const Operation *)data + phase;
    switch (each->kind) {
    case PRODUCT:
        product_work(&each->product, task, threads, tag, member);
        break;
    case ATTEND:
        attend_work(each->attention, task, tag, member);
        break;
    case ROUTE:
        route_work(each->experts, task, threads);
        break;
    case EXPERTS_UP:
        up_work(each->experts, task, threads, member);
        break;
    case EXPERTS_DOWN:
        down_work(each->experts, task, threads, member);
        break;
    default:
        store_work(each->attention, task);
    }
}

/* Scratch memory of a thread, in floats. */
static long memory(const Operation *each) {
    switch (each->kind) {
    case PRODUCT:
        return product_memory(&each->product);
    case ATTEND:
        return attend_memory(each->attention);
    case EXPERTS_UP:
        return up_memory(each->experts);
    case EXPERTS_DOWN:
        return down_memory(each->experts);
    default:
        return 0;
    }
}

/* Returns 0, or -1 if there is not enough memory. */
EXPORT int run(const Operation *operations, long count, int threads) {
    TeamProgram program = {.data = operations, .phases = count, .tasks = tasks, .work = work};
    for (long i = 0; i < count; i++) {
        long needed = memory(operations + i);
        program.memory = needed > program.memory ? needed : program.memory;
    }
    return team_run(&program, threads);
}
