/* Spectra: one warm-started power step on M and the shrinking of its spike, with M read once; and its update.
 *
 * U = orth(M V) and W = M'U would read M twice, for U is known only when all of M V is. Instead Z = M'Y is summed while
 * the rows of Y = M V are made. With Cholesky's factor Y'Y = R'R then U = Y R^-1 and W = Z R^-1. That is accurate while
 * the columns of Y are far from dependent, as in a followed spike they are; what is found not to be is left to the
 * eager path.
 *
 * M is (m, n) by rows. V, Y and Z have k columns, padded with zeros to whole lanes.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define MOST_VECTORS 4 /* of columns: k up to 64 */
#define MOST_COLUMNS (MOST_VECTORS * LANES)
#define MOST_SUMS 24   /* that are kept in registers */
#define COLUMNS 256   /* of M that are worked on at once, */
#define ROWS_IN_CACHE 48 /* and rows */
#define CHUNK 192      /* rows of M in a job, each with a sum Z of its own */
#define MOST_CHUNKS 16

enum outcome { DONE, TAIL_UNKNOWN, NOT_SERVED };

struct power_step {
    const float *M;
    const lanes *V;
    lanes *Y, *Z; /* Z: one for each chunk */
    double *gram; /* Y'Y in padded rows and, behind it, the squared norm of M: one for each chunk */
    long m, n, k, vectors, chunk;
};

static long padded(long k) { return blocks_of(k, LANES) * LANES; }
static long chunk_of(long m) { return m > CHUNK * MOST_CHUNKS ? blocks_of(m, MOST_CHUNKS) : CHUNK; }
static long gram_size(long k) { return k * padded(k) + 1; } /* the squared norm of M is the last */

/* Y += M V for a few rows of M and some of its columns. */
static inline __attribute__((always_inline)) void add_product(const float *restrict M, long n, const lanes *restrict V,
                                                              lanes *restrict Y, long columns, const int rows,
                                                              const int vectors) {
    lanes sum[MOST_SUMS];
    for (int i = 0; i < rows * vectors; i++) sum[i] = Y[i];
    for (long j = 0; j < columns; j++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const lanes right = V[j * vectors + v];
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) sum[r * vectors + v] += M[r * n + j] * right;
        }
    for (int i = 0; i < rows * vectors; i++) Y[i] = sum[i];
}

/* Z += M'Y for the same. */
static inline __attribute__((always_inline)) void add_transposed(const float *restrict M, long n,
                                                                 const lanes *restrict Y, lanes *restrict Z,
                                                                 long columns, const int rows, const int vectors) {
    lanes left[MOST_SUMS];
    for (int i = 0; i < rows * vectors; i++) left[i] = Y[i];
    for (long j = 0; j < columns; j++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            lanes sum = Z[j * vectors + v];
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) sum += M[r * n + j] * left[r * vectors + v];
            Z[j * vectors + v] = sum;
        }
}

/* Both, for rows that fit the second-level cache, by blocks of columns that fit the first. */
static inline __attribute__((always_inline)) void rows_of_chunk(const struct power_step *step, long start, long end,
                                                                lanes *Z, const int rows, const int vectors) {
    const long n = step->n;
    memset(step->Y + start * vectors, 0, sizeof(lanes) * (end - start) * vectors);
    for (int transposed = 0; transposed < 2; transposed++)
        for (long j = 0; j < n; j += COLUMNS) {
            const long columns = smaller(COLUMNS, n - j);
            for (long r = start; r < end;) {
                const float *M = step->M + r * n + j;
                lanes *Y = step->Y + r * vectors;
                const int whole = r + rows <= end;
                if (transposed && whole)
                    add_transposed(M, n, Y, Z + j * vectors, columns, rows, vectors);
                else if (transposed)
                    add_transposed(M, n, Y, Z + j * vectors, columns, 1, vectors);
                else if (whole)
                    add_product(M, n, step->V + j * vectors, Y, columns, rows, vectors);
                else
                    add_product(M, n, step->V + j * vectors, Y, columns, 1, vectors);
                r += whole ? rows : 1;
            }
        }
}

/* sum += factor * row, for a padded row. */
static inline void add_multiple(double *restrict sum, double factor, const float *restrict row, long vectors) {
    for (long v = 0; v < vectors; v++)
        for (int l = 0; l < LANES; l++) sum[v * LANES + l] += factor * (double)row[v * LANES + l];
}

static double row_squares(const float *restrict row, long n) {
    double sum = 0;
    long j = 0;
    float acc[LANES * 4] = {0};
    for (; j + LANES * 4 <= n; j += LANES * 4)
        for (int i = 0; i < LANES * 4; i++) acc[i] += row[j + i] * row[j + i];
    for (int i = 0; i < LANES * 4; i++) sum += acc[i];
    for (; j < n; j++) sum += row[j] * row[j];
    return sum;
}

static void power_step_job(void *context, long index) {
    const struct power_step *step = context;
    long start = index * step->chunk, end = smaller(start + step->chunk, step->m), k = step->k;
    lanes *Z = step->Z + index * step->n * step->vectors;
    memset(Z, 0, sizeof(lanes) * step->n * step->vectors);
    for (long r = start; r < end; r += ROWS_IN_CACHE) {
        long last = smaller(r + ROWS_IN_CACHE, end);
        switch (step->vectors) { /* as many rows at once as the registers hold */
        case 1: rows_of_chunk(step, r, last, Z, 8, 1); break;
        case 2: rows_of_chunk(step, r, last, Z, 12, 2); break;
        case 3: rows_of_chunk(step, r, last, Z, 8, 3); break;
        default: rows_of_chunk(step, r, last, Z, 6, 4);
        }
    }
    double *restrict gram = step->gram + index * gram_size(k);
    memset(gram, 0, sizeof(double) * gram_size(k));
    const float *Y = (const float *)step->Y;
    for (long r = start; r < end; r++) {
        const float *y = Y + r * step->vectors * LANES;
        for (long a = 0; a < k; a++) add_multiple(gram + a * step->vectors * LANES, y[a], y, step->vectors);
        gram[gram_size(k) - 1] += row_squares(step->M + r * step->n, step->n);
    }
}

/* T with U = Y T orthonormal, from Y'Y; the norm of R^-1 for columns of unit length says how much rounding it allows.
 * Returns 0 where a column is empty or rounding would show. */
static int inverse_factor(const double *gram, long k, long width, double limit, double *T) {
    double scale[MOST_COLUMNS], R[MOST_COLUMNS * MOST_COLUMNS];
    for (long j = 0; j < k; j++) {
        if (!(gram[j * width + j] > 0)) return 0;
        scale[j] = 1 / sqrt(gram[j * width + j]);
    }
    for (long i = 0; i < k; i++) /* Cholesky's lower factor, row by row */
        for (long j = 0; j <= i; j++) {
            double sum = gram[i * width + j] * scale[i] * scale[j];
            for (long p = 0; p < j; p++) sum -= R[i * k + p] * R[j * k + p];
            if (i > j)
                R[i * k + j] = sum / R[j * k + j];
            else if (sum > 0)
                R[i * k + i] = sqrt(sum);
            else
                return 0;
        }
    double size = 0;
    memset(T, 0, sizeof(double) * k * width);
    for (long j = 0; j < k; j++) /* column j of the lower factor's inverse is row j of T */
        for (long i = j; i < k; i++) {
            double sum = i == j;
            for (long p = j; p < i; p++) sum -= R[i * k + p] * T[j * width + p];
            T[j * width + i] = sum / R[i * k + i];
            size += T[j * width + i] * T[j * width + i];
        }
    for (long j = 0; j < k; j++)
        for (long i = 0; i < k; i++) T[j * width + i] *= scale[j];
    return size <= limit * limit * k;
}

struct turn {
    const float *A; /* padded rows, of which the first k numbers go to `out` times T */
    float *out;
    const double *T;
    long rows, k, vectors;
};

#define TURNED 64

static void turn_job(void *context, long index) {
    const struct turn *turn = context;
    long k = turn->k, width = turn->vectors * LANES;
    for (long r = index * TURNED; r < smaller((index + 1) * TURNED, turn->rows); r++) {
        double sum[MOST_COLUMNS] = {0};
        for (long a = 0; a < k; a++) {
            const double factor = turn->A[r * width + a], *T = turn->T + a * width;
            for (long v = 0; v < turn->vectors; v++)
                for (int l = 0; l < LANES; l++) sum[v * LANES + l] += factor * T[v * LANES + l];
        }
        for (long b = 0; b < k; b++) turn->out[r * k + b] = (float)sum[b];
    }
}

struct gather {
    lanes *Z;
    long count, chunks;
};

static void gather_job(void *context, long index) {
    const struct gather *gather = context;
    long end = smaller((index + 1) * BLOCK / LANES, gather->count);
    for (long i = index * BLOCK / LANES; i < end; i++)
        for (long c = 1; c < gather->chunks; c++) gather->Z[i] += gather->Z[c * gather->count + i];
}

/* Numbers of float32 and of float64 that follow_spike needs for work. */
long spike_floats(long m, long n, long k) {
    return (m + n + blocks_of(m, chunk_of(m)) * n) * padded(k);
}
long spike_doubles(long m, long k) { return (blocks_of(m, chunk_of(m)) + 1) * gram_size(k); }

/* What decides that a difference of norms will do, and what counts as empty: see spike.py, whose constants they are. */
struct limits {
    double plain_tail, empty_tail, dead_direction, most_amplified;
};

/* Writes U (m, k), W (n, k), the new basis V (n, k), right' (k, n), rows `pitch`
 * apart, and the shaped matrix's norm. Returns an outcome:
 * after TAIL_UNKNOWN U, W and V are good; after NOT_SERVED nothing is, and V is as it was. */
int follow_spike(int threads, const float *M, float *V, float *U, float *W, float *right, long pitch, float *norm,
                 long m, long n, long k, float *floats, double *doubles, const struct limits *limits) {
    long width = padded(k), chunk = chunk_of(m), chunks = blocks_of(m, chunk), size = gram_size(k);
    float *padded_V = floats, *Y = padded_V + n * width, *Z = Y + m * width;
    double *T = doubles + chunks * size;
    memset(padded_V, 0, sizeof(float) * n * width);
    for (long j = 0; j < n; j++) memcpy(padded_V + j * width, V + j * k, sizeof(float) * k);
    struct power_step step = {M, (lanes *)padded_V, (lanes *)Y, (lanes *)Z, doubles, m, n, k, width / LANES, chunk};
    run_jobs(threads, chunks, power_step_job, &step);
    for (long c = 1; c < chunks; c++)
        for (long i = 0; i < size; i++) doubles[i] += doubles[c * size + i];
    double energy = doubles[size - 1];
    /* Beyond these squares or sums of them have overflowed float32, or vanished in it. */
    if (!(energy > 1e-30 && energy < 1e36) || !inverse_factor(doubles, k, width, limits->most_amplified, T)) return NOT_SERVED;
    struct gather gather = {(lanes *)Z, n * (width / LANES), chunks};
    run_jobs(threads, blocks_of(n * width, BLOCK), gather_job, &gather);
    struct turn turn = {Y, U, T, m, k, width / LANES};
    run_jobs(threads, blocks_of(m, TURNED), turn_job, &turn);
    turn = (struct turn){Z, W, T, n, k, width / LANES};
    run_jobs(threads, blocks_of(n, TURNED), turn_job, &turn);

    double length[MOST_COLUMNS] = {0}, longest = 0, spike = 0;
    for (long j = 0; j < n; j++)
        for (long a = 0; a < k; a++) length[a] += (double)W[j * k + a] * (double)W[j * k + a];
    for (long a = 0; a < k; a++) {
        spike += length[a];
        length[a] = sqrt(length[a]);
        if (length[a] > longest) longest = length[a];
    }
    for (long a = 0; a < k; a++) {
        int alive = length[a] > limits->dead_direction * longest;
        double over = alive ? 1 / length[a] : 0;
        for (long j = 0; alive && j < n; j++) V[j * k + a] = (float)(W[j * k + a] * over);
    }
    double tail = energy - spike, whole = tail + spike;
    if (!(tail > limits->plain_tail * spike)) return TAIL_UNKNOWN;
    long spare = smaller(m, n) - k;
    int shaped = spare > 0 && tail > limits->empty_tail * whole;
    double sigma = shaped ? sqrt(tail / spare) : 0, squared = shaped ? tail : whole;
    for (long a = 0; a < k; a++) {
        /* A direction without energy stays as it is: lifting it to the tail's scale would add noise of that size. */
        int alive = shaped && length[a] > limits->dead_direction * sqrt(whole);
        if (alive) squared += sigma * sigma;
        for (long j = 0; j < n; j++) right[a * pitch + j] = alive ? (float)(sigma * V[j * k + a] - W[j * k + a]) : 0;
    }
    *norm = (float)sqrt(squared);
    return DONE;
}

/* -- The update ---------------------------------------------------------------------------------------------------- */

struct low_rank {
    float *X;
    const float *M, *U, *right;
    long pitch, m, n, k;
    float keep, step;
};

#define ROWS 8   /* of X that are worked on at once: right' is read once for so many, */
#define PIECE 32 /* and their columns */
#define STRIP 16 /* rows in a job */

static inline __attribute__((always_inline)) void low_rank_piece(const struct low_rank *update, long r, long j,
                                                                 const int rows, const int vectors) {
    const long n = update->n, k = update->k;
    lanes acc[ROWS * PIECE / LANES];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) acc[i * vectors + v] = *(const lanes *)(update->M + (r + i) * n + j + v * LANES);
    for (long a = 0; a < k; a++)
        for (int v = 0; v < vectors; v++) {
            const lanes right = *(const lanes *)(update->right + a * update->pitch + j + v * LANES);
            for (int i = 0; i < rows; i++) acc[i * vectors + v] += update->U[(r + i) * k + a] * right;
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) {
            lanes *x = (lanes *)(update->X + (r + i) * n + j + v * LANES);
            *x = update->keep * *x - update->step * acc[i * vectors + v];
        }
}

static void low_rank_job(void *context, long index) {
    const struct low_rank *update = context;
    long n = update->n, k = update->k, end = smaller((index + 1) * STRIP, update->m);
    for (long r = index * STRIP; r < end; r += ROWS) {
        long rows = smaller(ROWS, end - r), j = 0;
        for (; rows == ROWS && j + PIECE <= n; j += PIECE) low_rank_piece(update, r, j, ROWS, PIECE / LANES);
        for (; rows == ROWS && j + LANES <= n; j += LANES) low_rank_piece(update, r, j, ROWS, 1);
        for (long i = r; i < r + rows; i++)
            for (long c = j; c < n; c++) {
                float sum = update->M[i * n + c];
                for (long a = 0; a < k; a++) sum += update->U[i * k + a] * update->right[a * update->pitch + c];
                update->X[i * n + c] = update->keep * update->X[i * n + c] - update->step * sum;
            }
    }
}

/* X <- keep X - step (M + U right'), for right' (k, n), rows `pitch` apart: at a multiple of a page they would push each other
 * out of the first-level cache */
void apply_low_rank(int threads, float *X, const float *M, const float *U, const float *right, long pitch, long m,
                    long n, long k, float keep, float step) {
    struct low_rank update = {X, M, U, right, pitch, m, n, k, keep, step};
    run_jobs(threads, blocks_of(m, STRIP), low_rank_job, &update);
}
