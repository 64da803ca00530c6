/* Passes over entries: what a step does to every number of a tensor by itself, with memory read once.
 *
 * Plain loops that a compiler turns into vector instructions. Sums are kept in many partial ones, for that and for
 * accuracy; the partial sums of blocks are added up in order.
 */
#include <math.h>

#include "kernels.h"

#define PARTIAL 64 /* sums kept side by side within a block */

static double total(const double *partial, long count) {
    double sum = 0;
    for (long i = 0; i < count; i++) sum += partial[i];
    return sum;
}

/* -- Sums ---------------------------------------------------------------------------------------------------------- */

struct sums {
    const float *x;
    long count;
    double *partial; /* one for each block */
};

/* Squares in double, where none of a float overflows or vanishes. */
static void sum_squares_job(void *context, long index) {
    struct sums *sums = context;
    const float *restrict x = sums->x + index * BLOCK;
    long count = smaller(BLOCK, sums->count - index * BLOCK), i = 0;
    double acc[PARTIAL] = {0};
    for (; i + PARTIAL <= count; i += PARTIAL)
        for (int k = 0; k < PARTIAL; k++) acc[k] += (double)x[i + k] * (double)x[i + k];
    for (; i < count; i++) acc[0] += (double)x[i] * (double)x[i];
    sums->partial[index] = total(acc, PARTIAL);
}

static void sum_roots_job(void *context, long index) {
    struct sums *sums = context;
    const float *restrict x = sums->x + index * BLOCK;
    long count = smaller(BLOCK, sums->count - index * BLOCK), i = 0;
    float acc[PARTIAL] = {0};
    for (; i + PARTIAL <= count; i += PARTIAL)
        for (int k = 0; k < PARTIAL; k++) acc[k] += sqrtf(fabsf(x[i + k]));
    double sum = 0;
    for (int k = 0; k < PARTIAL; k++) sum += acc[k];
    for (; i < count; i++) sum += sqrtf(fabsf(x[i]));
    sums->partial[index] = sum;
}

/* The number of partial sums that a tensor of so many entries needs room for. */
long partial_sums(long count) { return blocks_of(count, BLOCK); }

double sum_squares(int threads, const float *x, long count, double *partial) {
    struct sums sums = {x, count, partial};
    run_jobs(threads, partial_sums(count), sum_squares_job, &sums);
    return total(partial, partial_sums(count));
}

double sum_roots(int threads, const float *x, long count, double *partial) {
    struct sums sums = {x, count, partial};
    run_jobs(threads, partial_sums(count), sum_roots_job, &sums);
    return total(partial, partial_sums(count));
}

/* -- Shrinkage ----------------------------------------------------------------------------------------------------- */

enum form { NONE, REDESCENDING, MONOTONE, HARD };

static inline float shrink(float y, float tau, float over_tau, enum form form) {
    float ratio = y * over_tau;
    switch (form) {
    case REDESCENDING: /* zero where the square overflows: below 1e-19 tau */
        return y / (1 + ratio * ratio);
    case MONOTONE: /* held at tau where the square would overflow */
        return fabsf(ratio) < 1e9f ? y / sqrtf(1 + ratio * ratio) : copysignf(tau, y);
    case HARD:
        return y > tau ? tau : y < -tau ? -tau : y;
    default:
        return y;
    }
}

/* -- Adam ---------------------------------------------------------------------------------------------------------- */

/* The numbers of a step. correction1 and correction2 are 1 - beta1^t and the square root of 1 - beta2^t, inverted. */
struct adam {
    float sign; /* -1 to maximize */
    float tau, over_tau;
    float beta1, rest1, beta2, rest2; /* rest = 1 - beta */
    float correction1, correction2, eps;
    float keep, lr; /* x <- keep x - lr u */
};

struct adam_pass {
    const struct adam *numbers;
    float *x; /* weights, or where the direction goes */
    const float *g;
    float *m, *v;
    long count;
    int form, direction;
};

static inline __attribute__((always_inline)) void adam_block(const struct adam_pass *pass, long start, long count,
                                                             enum form form, int direction) {
    const struct adam a = *pass->numbers;
    const float *restrict g = pass->g + start;
    float *restrict x = pass->x + start, *restrict m = pass->m + start, *restrict v = pass->v + start;
    /* The first moment moves by the smaller share, so that either share may be exactly zero. */
    const int towards = a.rest1 < 0.5f;
    for (long i = 0; i < count; i++) {
        float y = shrink(a.sign * g[i], a.tau, a.over_tau, form);
        float mean = towards ? m[i] + a.rest1 * (y - m[i]) : y - a.beta1 * (y - m[i]);
        float square = a.beta2 * v[i] + a.rest2 * (y * y);
        float u = mean * a.correction1 / (sqrtf(square) * a.correction2 + a.eps);
        m[i] = mean;
        v[i] = square;
        x[i] = direction ? u : a.keep * x[i] - a.lr * u;
    }
}

static void adam_job(void *context, long index) {
    const struct adam_pass *pass = context;
    long start = index * BLOCK, count = smaller(BLOCK, pass->count - start);
    if (pass->direction) {
        adam_block(pass, start, count, NONE, 1);
        return;
    }
    switch (pass->form) {
    case REDESCENDING: adam_block(pass, start, count, REDESCENDING, 0); break;
    case MONOTONE: adam_block(pass, start, count, MONOTONE, 0); break;
    case HARD: adam_block(pass, start, count, HARD, 0); break;
    default: adam_block(pass, start, count, NONE, 0);
    }
}

/* Shrink the gradient, update both moments and the weights. */
void adam_step(int threads, float *x, const float *g, float *m, float *v, long count, int form,
               const struct adam *numbers) {
    struct adam_pass pass = {numbers, x, g, m, v, count, form, 0};
    run_jobs(threads, blocks_of(count, BLOCK), adam_job, &pass);
}

/* Update both moments and write the direction. */
void adam_direction(int threads, float *out, const float *g, float *m, float *v, long count,
                    const struct adam *numbers) {
    struct adam_pass pass = {numbers, out, g, m, v, count, NONE, 1};
    run_jobs(threads, blocks_of(count, BLOCK), adam_job, &pass);
}

/* -- Momentum ------------------------------------------------------------------------------------------------------ */

struct momentum_pass {
    float *out; /* the direction, or NULL where it is the buffer */
    const float *g;
    float *buffer;
    long count;
    float decay;
    int averages, looks_ahead, takes_sign;
};

static inline float sign_of(float y) { return (float)((y > 0) - (y < 0)); }

static void momentum_job(void *context, long index) {
    const struct momentum_pass *pass = context;
    long start = index * BLOCK, count = smaller(BLOCK, pass->count - start);
    const float *restrict g = pass->g + start;
    float *restrict buffer = pass->buffer + start;
    const float decay = pass->decay, rest = 1 - decay;
    if (pass->averages)
        for (long i = 0; i < count; i++)
            buffer[i] = rest < 0.5f ? buffer[i] + rest * (g[i] - buffer[i]) : g[i] - decay * (g[i] - buffer[i]);
    else
        for (long i = 0; i < count; i++) buffer[i] = decay * buffer[i] + g[i];
    if (!pass->out) return;
    float *restrict out = pass->out + start;
    if (!pass->looks_ahead)
        for (long i = 0; i < count; i++) out[i] = buffer[i];
    else if (pass->averages)
        for (long i = 0; i < count; i++)
            out[i] = rest < 0.5f ? buffer[i] - rest * (buffer[i] - g[i]) : g[i] + decay * (buffer[i] - g[i]);
    else
        for (long i = 0; i < count; i++) out[i] = g[i] + decay * buffer[i];
    if (pass->takes_sign)
        for (long i = 0; i < count; i++) out[i] = sign_of(out[i]);
}

/* buffer <- decay buffer + g, or the average of both; the direction is the buffer, or one step ahead of it. */
void momentum_step(int threads, float *out, const float *g, float *buffer, long count, float decay, int averages,
                   int looks_ahead, int takes_sign) {
    struct momentum_pass pass = {out, g, buffer, count, decay, averages, looks_ahead, takes_sign};
    run_jobs(threads, blocks_of(count, BLOCK), momentum_job, &pass);
}

/* -- The update ---------------------------------------------------------------------------------------------------- */

struct update_pass {
    float *x;
    const float *u;
    long count;
    float keep, step;
};

static void update_job(void *context, long index) {
    const struct update_pass *pass = context;
    long start = index * BLOCK, count = smaller(BLOCK, pass->count - start);
    float *restrict x = pass->x + start;
    const float *restrict u = pass->u + start;
    const float keep = pass->keep, step = pass->step;
    for (long i = 0; i < count; i++) x[i] = keep * x[i] - step * u[i];
}

/* x <- keep x - step u */
void apply_update(int threads, float *x, const float *u, long count, float keep, float step) {
    struct update_pass pass = {x, u, count, keep, step};
    run_jobs(threads, blocks_of(count, BLOCK), update_job, &pass);
}
