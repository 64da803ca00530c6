/* Jobs on threads: those of the OpenMP runtime that torch has loaded already. A second runtime, or threads of our own,
 * would compete with torch's, which go on spinning for a while after each of its operators.
 */
#include "kernels.h"

/* GOMP_parallel of the runtime, its stable entry point: it calls run(context) on every thread of a team. */
typedef void (*parallel_region)(void (*run)(void *), void *context, unsigned threads, unsigned flags);

static parallel_region region; /* none: everything runs on the calling thread */
static _Thread_local int inside;

void use_threads_of(parallel_region found) { region = found; }

struct queue {
    long next, count;
    job run;
    void *context;
};

static void work(void *argument) {
    struct queue *queue = argument;
    int outer = inside;
    inside = 1;
    for (;;) {
        long index = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (index >= queue->count) break;
        queue->run(queue->context, index);
    }
    inside = outer;
}

void run_jobs(int threads, long count, job run, void *context) {
    struct queue queue = {0, count, run, context};
    if (!region || inside || threads < 2 || count < 2)
        work(&queue);
    else
        region(work, &queue, (unsigned)smaller(threads, count), 0);
}
