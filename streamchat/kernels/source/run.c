/* Runs operations one after the other, with one team of threads for all of them. */
#include "operations.h"

extern int omp_get_max_threads(void);

/* Number of threads that this library's OpenMP runtime would use; shows whether it is PyTorch's runtime. */
EXPORT int pool_threads(void) { return omp_get_max_threads(); }

EXPORT void run(const Operation *operations, long count, int threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) {
        const Operation *each = operations + i;
        switch (each->kind) {
        case PRODUCT:
            team_multiply(&each->product);
            break;
        case ATTENTION:
            team_attend(&each->attention);
            break;
        case NORM:
            team_norm(&each->norm);
            break;
        default:
            team_activate(&each->activation);
        }
    }
}
