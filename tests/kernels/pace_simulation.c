/* Reads, for each run, its time and waiting share at each level; prints the number of threads of each run. The second
 * argument is the number of runs of the first program; from then on, two others alternate. */
#include <stdio.h>
#include <stdlib.h>

#include "pace.h"

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1, same = argc > 2 ? atoi(argv[2]) : 1 << 30, levels = 0;
    double ns[8], share[8];
    Pace pace = {0};
    for (int n = threads; n; n >>= 1)
        levels++;
    for (int run = 0;; run++) {
        for (int i = 0; i < levels; i++)
            if (scanf("%lf %lf", ns + i, share + i) != 2)
                return 0;
        printf("%d\n", pace_threads(&pace, threads));
        double time = ns[pace.level];
        pace_learn(&pace, argv[run < same ? 0 : 1 + run % 2], time, time * share[pace.level]);
    }
}
