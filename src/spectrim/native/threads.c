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
    long next, count, threads;
    job run;
    void *context;
};

static void work(void *argument) {
    struct queue *queue = argument;
    int outer = inside;
    inside = 1;
    for (long first = __atomic_load_n(&queue->next, __ATOMIC_RELAXED); first < queue->count;) {
        /* Many neighbours at first, whose memory is then read in one go, and fewer as they come to an end. */
        long some = 1 + (queue->count - first - 1) / (2 * queue->threads);
        if (!__atomic_compare_exchange_n(&queue->next, &first, first + some, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            continue;
        for (long index = first; index < smaller(first + some, queue->count); index++)
            queue->run(queue->context, index);
        first = __atomic_load_n(&queue->next, __ATOMIC_RELAXED);
    }
    inside = outer;
}

void run_jobs(int threads, long count, job run, void *context) {
    struct queue queue = {0, count, threads < 1 ? 1 : threads, run, context};
    if (!region || inside || threads < 2 || count < 2)
        work(&queue);
    else
        region(work, &queue, (unsigned)smaller(threads, count), 0);
}
