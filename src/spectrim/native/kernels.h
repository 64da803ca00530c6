/* What all kernels share: how work is divided over threads, and the few types. Included by every file beside it.
 *
 * A kernel divides its work into jobs by the shape of its arguments alone and writes each job's result to a place of
 * its own, so results depend neither on the number of threads nor on who took which job.
 */
#ifndef SPECTRIM_KERNELS_H
#define SPECTRIM_KERNELS_H

/* Entries of a tensor in one job of a pass: a few such blocks fit the second-level cache of a core. */
#define BLOCK 32768

/* Sixteen numbers that are worked on at once, on any processor; not aligned beyond a number's own alignment. */
#define LANES 16
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef void (*job)(void *context, long index);

/* Call run(context, i) for every i below count, on up to so many threads; returns when all are done. Inside a job the
 * jobs of a nested call run one after the other. */
void run_jobs(int threads, long count, job run, void *context);

static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long blocks_of(long count, long size) { return (count + size - 1) / size; }

#endif
