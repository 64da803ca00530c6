/* The Gram matrix Z Z' on and below the diagonal, for Z = (X - V S) / c: X itself where there is no V.
 *
 * V S is the few rows that a reflection takes from X (rational.py); Z is made block by block on the way, and is never
 * in memory. Both orders of X in memory are read as they lie.
 */
#include <string.h>

#include "tiles.h"

#define DEPTH 128 /* columns of X at a time: a packed block of SIDE of its rows fits the first-level cache */

struct gram {
    const float *X;
    long by_row, by_column; /* entry (i, k) of X is at X[i by_row + k by_column] */
    const float *V, *S;     /* V' (rank, padded side) and S (rank, columns), by rows */
    float *out, *packed;    /* out (padded side, padded side) */
    long n, columns, rank, side, start, depth;
    float over_c;
};

long gram_floats(long n) { return padded_side(n) * DEPTH; }

static void pack_job(void *context, long block) {
    const struct gram *gram = context;
    const long first = block * SIDE, rows = smaller(SIDE, gram->n - first), depth = gram->depth;
    float *restrict packed = gram->packed + block * SIDE * DEPTH;
    const float *restrict X = gram->X + first * gram->by_row + gram->start * gram->by_column;
    if (rows < SIDE) memset(packed, 0, sizeof(float) * SIDE * depth);
    if (gram->by_row == 1) {
        for (long k = 0; k < depth; k++) memcpy(packed + k * SIDE, X + k * gram->by_column, sizeof(float) * rows);
    } else {
        for (long k = 0; k < depth; k += LANES)
            for (long i = 0; i < rows; i++)
                for (long j = k; j < smaller(k + LANES, depth); j++)
                    packed[j * SIDE + i] = X[i * gram->by_row + j * gram->by_column];
    }
    for (long k = 0; k < depth; k++) {
        lanes sum[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) sum[v] = *(const lanes *)(packed + k * SIDE + v * LANES);
        for (long r = 0; r < gram->rank; r++) {
            const float s = gram->S[r * gram->columns + gram->start + k];
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[v] -= s * *(const lanes *)(gram->V + r * gram->side + first + v * LANES);
        }
        for (int v = 0; v < TILE_VECTORS; v++) *(lanes *)(packed + k * SIDE + v * LANES) = gram->over_c * sum[v];
    }
}

/* One block of the result, numbered along the lower triangle. */
static void block_job(void *context, long index) {
    const struct gram *gram = context;
    long i = 0;
    for (; index > i; i++) index -= i + 1;
    const float *left = gram->packed + i * SIDE * DEPTH, *right = gram->packed + index * SIDE * DEPTH;
    add_block_product(gram->out + i * SIDE * gram->side + index * SIDE, gram->side, left, 1, SIDE, right, gram->depth,
                      1);
}

/* out (padded side, padded side) is written on and below its diagonal blocks; packed holds gram_floats numbers. */
void gram_matrix(int threads, const float *X, long by_row, long by_column, long n, long columns, float over_c,
                 const float *V, const float *S, long rank, float *out, float *packed) {
    struct gram gram = {X, by_row, by_column, V, S, out, packed, n, columns, rank, padded_side(n), 0, 0, over_c};
    long blocks = gram.side / SIDE;
    memset(out, 0, sizeof(float) * gram.side * gram.side);
    for (; gram.start < columns; gram.start += DEPTH) {
        gram.depth = smaller(DEPTH, columns - gram.start);
        run_jobs(threads, blocks, pack_job, &gram);
        run_jobs(threads, blocks * (blocks + 1) / 2, block_job, &gram);
    }
}
