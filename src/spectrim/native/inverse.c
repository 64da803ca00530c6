/* Inverses of symmetric positive definite matrices G + shift, weighted and summed: the poles of a rational function.
 *
 * A block sweep (Gauss and Jordan's elimination for symmetric matrices): for each block column p, with W its column
 * panel and P the inverse of its corner,
 *
 *     A_ij <- A_ij - W_i P W_j'    A_ip <- W_i P    A_pp <- -P
 *
 * leaves -A^-1 after the last. It takes n^3 operations, as Cholesky's way does, all but a few in one kind of product,
 * and touches the lower triangle alone, which is kept as one run of blocks. Rows are eliminated in their order, which
 * keeps graded matrices accurate.
 */
#include <math.h>
#include <string.h>

#include "tiles.h"

struct sweep {
    float *A;    /* the blocks of the lower triangle, row after row */
    float *W;    /* column panel by blocks, W_i' packed for the product */
    float *left; /* W P, by rows */
    float P[SIDE * SIDE];
    long blocks, p;
};

#define NUMBERS (SIDE * SIDE) /* in a block */

static inline long block_at(long i, long j) { return (i * (i + 1) / 2 + j) * NUMBERS; }

/* Numbers for one inverse: the matrix, and the panel and what becomes of it. */
long inverse_floats(long n) {
    long blocks = blocks_of(n, SIDE);
    return block_at(blocks, 0) + 2 * blocks * NUMBERS;
}

static void transpose(float *restrict to, const float *restrict from) {
    for (long i = 0; i < SIDE; i += LANES)
        for (long j = 0; j < SIDE; j++)
            for (long r = i; r < i + LANES; r++) to[j * SIDE + r] = from[r * SIDE + j];
}

static void copy(float *restrict to, const float *restrict from) { memcpy(to, from, sizeof(float) * NUMBERS); }

/* The inverse of the corner by the same sweep, one row at a time and in double. */
static void invert_corner(const float *A, float *P) {
    double D[SIDE][SIDE];
    for (long i = 0; i < SIDE; i++)
        for (long j = 0; j < SIDE; j++) D[i][j] = i >= j ? A[i * SIDE + j] : A[j * SIDE + i];
    for (long p = 0; p < SIDE; p++) {
        double row[SIDE], over = 1 / D[p][p];
        for (long j = 0; j < SIDE; j++) row[j] = D[p][j] * over;
        for (long i = 0; i < SIDE; i++) {
            double factor = D[i][p];
            for (long j = 0; j < SIDE; j++) D[i][j] -= factor * row[j];
            D[i][p] = factor * over;
        }
        memcpy(D[p], row, sizeof(row));
        D[p][p] = -over;
    }
    for (long i = 0; i < SIDE; i++)
        for (long j = 0; j < SIDE; j++) P[i * SIDE + j] = (float)-D[i][j];
}

/* Take block i of the panel, and put W_i P in its place. */
static void panel_job(void *context, long i) {
    struct sweep *sweep = context;
    long p = sweep->p;
    if (i == p) return;
    float *packed = sweep->W + i * NUMBERS, *left = sweep->left + i * NUMBERS, W[NUMBERS];
    float *A = sweep->A + (i > p ? block_at(i, p) : block_at(p, i));
    if (i > p) {
        copy(W, A);
        transpose(packed, A);
    } else {
        copy(packed, A);
        transpose(W, A);
    }
    memset(left, 0, sizeof(W));
    add_block_product(left, SIDE, W, SIDE, 1, sweep->P, SIDE, 1);
    if (i > p)
        copy(A, left);
    else
        transpose(A, left);
}

/* Column j of blocks: what is left of it once column p is eliminated. */
static void column_job(void *context, long j) {
    struct sweep *sweep = context;
    for (long i = j; j != sweep->p && i < sweep->blocks; i++)
        if (i != sweep->p)
            add_block_product(sweep->A + block_at(i, j), SIDE, sweep->left + i * NUMBERS, SIDE, 1,
                              sweep->W + j * NUMBERS, SIDE, -1);
}

static void invert(int threads, float *A, long blocks) {
    float *work = A + block_at(blocks, 0);
    struct sweep sweep = {.A = A, .W = work, .left = work + blocks * NUMBERS, .blocks = blocks};
    for (sweep.p = 0; sweep.p < blocks; sweep.p++) {
        float *corner = A + block_at(sweep.p, sweep.p);
        invert_corner(corner, sweep.P);
        run_jobs(threads, blocks, panel_job, &sweep);
        run_jobs(threads, blocks, column_job, &sweep);
        for (long i = 0; i < NUMBERS; i++) corner[i] = -sweep.P[i];
    }
}

struct resolvents {
    const float *gram;
    float *root, *work;
    const double *weights, *shifts;
    double *sizes;
    long n, first, count;
    int threads;
};

static void resolvent_job(void *context, long index) {
    struct resolvents *all = context;
    long n = all->n, blocks = blocks_of(n, SIDE);
    float *A = all->work + index * inverse_floats(n);
    for (long i = 0; i < blocks * SIDE; i++)
        for (long j = 0; j <= i / SIDE; j++) {
            float *row = A + block_at(i / SIDE, j) + i % SIDE * SIDE;
            long kept = i < n ? smaller(SIDE, n - j * SIDE) : 0;
            memcpy(row, all->gram + i * n + j * SIDE, sizeof(float) * kept);
            memset(row + kept, 0, sizeof(float) * (SIDE - kept));
            if (j == i / SIDE) row[i % SIDE] = i < n ? (float)(row[i % SIDE] + all->shifts[all->first + index]) : 1;
        }
    invert(all->threads, A, blocks);
}

/* Add a row of blocks of all resolvents of a round to the root, in order. */
static void gather_job(void *context, long block) {
    struct resolvents *all = context;
    for (long i = block * SIDE; i < smaller((block + 1) * SIDE, all->n); i++)
        for (long j = 0; j < all->count; j++) {
            float weight = (float)-all->weights[all->first + j];
            for (long column = 0; column <= block; column++) {
                const float *A = all->work + j * inverse_floats(all->n) + block_at(block, column) + i % SIDE * SIDE;
                float *root = all->root + i * all->n + column * SIDE;
                for (long c = 0; c < smaller(SIDE, i + 1 - column * SIDE); c++) root[c] += weight * A[c];
            }
        }
}

/* Squared norm of the first resolvent R, and tr G R. */
static void measure(const struct resolvents *all) {
    double squares = 0, inner = 0;
    for (long i = 0; i < all->n; i++)
        for (long column = 0; column <= i / SIDE; column++) {
            const float *A = all->work + block_at(i / SIDE, column) + i % SIDE * SIDE;
            const float *G = all->gram + i * all->n + column * SIDE;
            float square = 0, product = 0;
            for (long c = 0; c < smaller(SIDE, i - column * SIDE); c++) {
                square += A[c] * A[c];
                product -= A[c] * G[c];
            }
            squares += 2.0 * square;
            inner += 2.0 * product;
            if (column == i / SIDE) {
                squares += (double)A[i % SIDE] * A[i % SIDE];
                inner -= (double)A[i % SIDE] * G[i % SIDE];
            }
        }
    all->sizes[0] = squares;
    all->sizes[1] = inner;
}

/* root += sum_j weights[j] (gram + shifts[j])^-1 on and below the diagonal, `together` inverses at a time, each with
 * inverse_floats numbers of work. sizes: of the first one its squared norm, and the trace of its product with gram. */
void add_resolvents(int threads, const float *gram, float *root, long n, const double *weights, const double *shifts,
                    long count, long together, float *work, double *sizes) {
    struct resolvents all = {gram, root, work, weights, shifts, sizes, n, 0, 0, threads};
    for (; all.first < count; all.first += all.count) {
        all.count = smaller(together, count - all.first);
        if (all.count > 1) /* each on one thread: an inverse alone leaves threads waiting for each other */
            run_jobs(threads, all.count, resolvent_job, &all);
        else
            resolvent_job(&all, 0);
        if (all.first == 0) measure(&all);
        run_jobs(threads, blocks_of(n, SIDE), gather_job, &all);
    }
}
