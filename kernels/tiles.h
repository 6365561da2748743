// Products of small matrices, with sums in registers and inputs packed in the order of reading.
//
// As in other libraries for matrix products, the inner loop computes a tile of sums in registers.
// Matrices are packed in tiles of rows and in panels of columns. Indices: i for rows, j for columns,
// k for steps.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

typedef float vec __attribute__((vector_size(32)));

constexpr int VL = 8;        // floats in a vector
constexpr int SUMS = 12;     // vectors of sums in a tile, in 12 of the 16 registers
constexpr int NR = 2 * VL;   // columns of a panel
constexpr int MR = SUMS / 2; // rows of a tile

inline vec load(const float *from)
{
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float *to, vec value) { memcpy(to, &value, sizeof value); }

// Returns the sum of a vector's entries.
inline float total(vec of)
{
    typedef float half __attribute__((vector_size(16)));
    half low, high;
    memcpy(&low, &of, sizeof low);
    memcpy(&high, reinterpret_cast<const char *>(&of) + sizeof low, sizeof high);
    low += high;
    return (low[0] + low[2]) + (low[1] + low[3]);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t parts(int64_t of, int64_t most) { return (of + most - 1) / most; }

// Returns `rank`, rounded up to whole vectors.
inline int64_t padded(int64_t rank) { return parts(rank, VL) * VL; }

// Largest number of a factor's columns, beyond whole vectors, that are not worth another vector.
constexpr int LAST = 3;

// Returns how many of `rank` columns to compute by vectors; the others, LAST or fewer, one by one.
inline int64_t by_vectors(int64_t rank) { return rank % VL <= LAST ? rank / VL * VL : padded(rank); }

// Prefetches one cache line in each of some rows, to be read (0) or written (1) soon after.
template <int WRITTEN> inline void fetch(const float *from, int64_t rows, int64_t stride)
{
    for (int64_t i = 0; i < rows; i++)
        __builtin_prefetch(from + i * stride, WRITTEN);
}

// Destinations for the sums of a tile. `at` is 0, VL, ...

struct Set {
    float *to;
    int64_t stride;
    void operator()(int i, int at, vec sum) const { store(to + i * stride + at, sum); }
    Set down(int64_t rows) const { return {to + rows * stride, stride}; }
};

struct Add {
    float *to;
    int64_t stride;
    void operator()(int i, int at, vec sum) const
    {
        store(to + i * stride + at, load(to + i * stride + at) + sum);
    }
    Add down(int64_t rows) const { return {to + rows * stride, stride}; }
};

// The inputs of a tile. Row i and step k read a[i * AI + k * ak] and V vectors at b + k * bk. After
// `count` steps a skips `gap` floats; this repeats `times` times.
struct Steps {
    int64_t count;
    const float *a;
    int64_t ak;
    const float *b;
    int64_t bk;
    int64_t times = 1, gap = 0;
};

// Computes start + sum over k of a(i, k) b(k, :), for R rows of V vectors.
template <int R, int V, int AI, typename To>
inline void tile(const Steps &steps, float start, const To to)
{
    const float *a = steps.a, *b = steps.b;
    const int64_t ak = steps.ak, bk = steps.bk;
    vec sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            sum[i][v] = start - vec{};
    for (int64_t n = 0; n < steps.times; n++, a += steps.gap)
        for (int64_t k = 0; k < steps.count; k++, a += ak, b += bk) {
            vec row[V];
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                row[v] = load(b + v * VL);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) {
                const vec one = a[i * AI] - vec{};
#pragma GCC unroll 16
                for (int v = 0; v < V; v++)
                    sum[i][v] += one * row[v];
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            to(i, v * VL, sum[i][v]);
}

// Computes a tile of `rows` <= R rows; `tile` needs the number of rows at compile time.
template <int R, int V, int AI, typename To>
inline void tile_of(int64_t rows, const Steps &steps, float start, const To &to)
{
    if (rows == R)
        tile<R, V, AI>(steps, start, to);
    else if constexpr (R > 1)
        tile_of<R - 1, V, AI>(rows, steps, start, to);
}

// Adds to `to` the products of `rows` rows with V vectors, in tiles of nearly equal height.
template <int V, int AI> void add_rows(int64_t rows, Steps steps, Add to)
{
    const int64_t tiles = parts(rows, SUMS / V);
    const float *a = steps.a;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t i = rows * t / tiles, end = rows * (t + 1) / tiles;
        steps.a = a + i * AI;
        tile_of<SUMS / V, V, AI>(end - i, steps, 0, to.down(i));
    }
}

// Does the same with all `width` floats of b, a multiple of VL: three vectors at a time, and if
// possible no single one at the end, which would leave the processor partly idle.
template <int AI> void add_product(int64_t rows, int64_t width, Steps steps, Add to)
{
    for (int64_t left = width / VL; left > 0;) {
        const int64_t now = left == 4 || left == 2 ? 2 : left > 2 ? 3 : 1;
        if (now == 3)
            add_rows<3, AI>(rows, steps, to);
        else if (now == 2)
            add_rows<2, AI>(rows, steps, to);
        else
            add_rows<1, AI>(rows, steps, to);
        steps.b += now * VL, to.to += now * VL, left -= now;
    }
}

// Adds to `to`, row by row, the scalar products of R rows of a, in `count` panels of PANEL floats,
// with T columns b, stored one after the other.
template <int R, int T, int PANEL>
inline void dots(int64_t count, const float *a, const float *b, float *to, int64_t stride)
{
    vec sum[R][T];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++)
            sum[i][t] = vec{};
    for (int64_t p = 0; p < count; p++, a += PANEL, b += NR)
#pragma GCC unroll 16
        for (int v = 0; v < NR; v += VL) {
            vec own[T];
#pragma GCC unroll 16
            for (int t = 0; t < T; t++)
                own[t] = load(b + t * count * NR + v);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) {
                const vec row = load(a + i * NR + v);
#pragma GCC unroll 16
                for (int t = 0; t < T; t++)
                    sum[i][t] += row * own[t];
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++)
            to[i * stride + t] += total(sum[i][t]);
}

// Does the same for all rows and `columns` <= T columns, for as many rows at a time as have their
// sums in registers.
template <int T, int PANEL>
void add_dots(int64_t columns, int64_t height, int64_t count, const float *a, const float *b,
              float *to, int64_t stride)
{
    if (columns < T) {
        if constexpr (T > 1)
            add_dots<T - 1, PANEL>(columns, height, count, a, b, to, stride);
        return;
    }
    constexpr int R = T == 1 ? 8 : SUMS / T;
    for (; height >= R; height -= R, a += R * NR, to += R * stride)
        dots<R, T, PANEL>(count, a, b, to, stride);
    for (; height > 0; height--, a += NR, to += stride)
        dots<1, T, PANEL>(count, a, b, to, stride);
}

// A matrix with two strides, in elements.
struct Matrix {
    const float *at;
    int64_t down, across;
    float operator()(int64_t i, int64_t k) const { return at[i * down + k * across]; }
};

// Packs a tile of `height` rows from row i on, times a number: the first entries of all its rows,
// then the second ones, ...
inline void tiled(const Matrix &from, int64_t i, int64_t height, int64_t count, float factor,
                  float *to)
{
    for (int64_t k = 0; k < count; k++)
        for (int64_t h = 0; h < height; h++)
            *to++ = from(i + h, k) * factor;
}

// Packs all rows in tiles.
void tiled(const Matrix &from, int64_t rows, int64_t count, float factor, float *to)
{
    const int64_t tiles = parts(rows, MR);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t i = rows * t / tiles, height = rows * (t + 1) / tiles - i;
        tiled(from, i, height, count, factor, to + i * count);
    }
}

// Packs columns j to `end` (rows of `from`) in panels, with zeros beyond: the first entries of all
// columns of a panel, then the second ones, ...
void panels(const Matrix &from, int64_t j, int64_t end, int64_t count, float *to)
{
    for (; j < end; j += NR, to += NR * count) {
        const int64_t width = least(end - j, NR);
        if (width < NR)
            memset(to, 0, NR * count * sizeof(float));
        for (int64_t k = 0; k < count; k++)
            for (int64_t c = 0; c < width; c++)
                to[k * NR + c] = from(j + c, k);
    }
}

// Copies those columns of `rows` padded rows that `by_vectors` leaves out, one after the other.
void last_columns(const float *from, int64_t rows, int64_t rank, float *to)
{
    for (int64_t k = by_vectors(rank); k < rank; k++)
        for (int64_t i = 0; i < rows; i++)
            *to++ = from[i * padded(rank) + k];
}

// Copies rows, each padded with zeros up to whole vectors.
void pad(const float *from, int64_t rows, int64_t rank, float *to)
{
    for (int64_t i = 0; i < rows; i++, from += rank, to += padded(rank))
        for (int64_t r = 0; r < padded(rank); r++)
            to[r] = r < rank ? from[r] : 0;
}

// Copies padded rows without their padding, times a number.
void compact(const float *from, int64_t rows, int64_t rank, float factor, float *to)
{
    for (int64_t i = 0; i < rows; i++, from += padded(rank), to += rank)
        for (int64_t r = 0; r < rank; r++)
            to[r] = from[r] * factor;
}

// Copies rows (columns of `from`) out of panels, times a number.
void unpack(const float *from, int64_t rows, int64_t count, float factor, float *to)
{
    for (int64_t j = 0; j < rows; j += NR, from += NR * count)
        for (int64_t c = 0; c < least(rows - j, NR); c++)
            for (int64_t k = 0; k < count; k++)
                *to++ = from[k * NR + c] * factor;
}

// Memory for intermediate results, handed out in whole cache lines. Without memory (`next` null) it
// only counts.
struct Room {
    float *next;
    int64_t used;
    float *operator()(int64_t floats)
    {
        float *own = next ? next + used : nullptr;
        used += parts(floats, 16) * 16;
        return own;
    }
};

} // namespace
