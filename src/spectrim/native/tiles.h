/* The inner loop of every product: a tile of a few rows and SIDE columns, whose sums stay in registers.
 *
 * Matrices are padded to whole blocks of SIDE rows and columns, so that nothing here has an edge.
 */
#ifndef SPECTRIM_TILES_H
#define SPECTRIM_TILES_H

#include "kernels.h"

#define SIDE 64
#define TILE_ROWS 4
#define TILE_VECTORS (SIDE / LANES)

static inline long padded_side(long n) { return blocks_of(n, SIDE) * SIDE; }

/* Keeps a vector in a register where the compiler would read it again for every use: loads are what limits the loop. */
#if defined(__AVX512F__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define IN_REGISTER(vector)
#endif

static inline __attribute__((always_inline)) void add_tile(float *restrict C, long pitch, const float *restrict A,
                                                           long by_row, long by_column, const float *restrict B,
                                                           long depth, float sign, const int rows) {
    lanes sum[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = (lanes){0};
    for (long k = 0; k < depth; k++) {
        lanes row[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) {
            row[v] = *(const lanes *)(B + k * SIDE + v * LANES);
            IN_REGISTER(row[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const float left = A[r * by_row + k * by_column];
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] += left * row[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++) *(lanes *)(C + r * pitch + v * LANES) += sign * sum[r][v];
}

/* C (SIDE, SIDE) += sign A B. Entry (i, k) of A is at A[i by_row + k by_column]; B (depth, SIDE) is packed. */
static inline __attribute__((always_inline)) void add_block_product(float *restrict C, long pitch,
                                                                    const float *restrict A, long by_row,
                                                                    long by_column, const float *restrict B,
                                                                    long depth, float sign) {
    long i = 0;
    for (; i + TILE_ROWS <= SIDE; i += TILE_ROWS)
        add_tile(C + i * pitch, pitch, A + i * by_row, by_row, by_column, B, depth, sign, TILE_ROWS);
    if (SIDE % TILE_ROWS)
        add_tile(C + i * pitch, pitch, A + i * by_row, by_row, by_column, B, depth, sign, SIDE % TILE_ROWS);
}

#endif
