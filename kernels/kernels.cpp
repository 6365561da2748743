// Composing a FedPara weight, and taking its gradient back to the factors, in one pass each.
//
//     W = scale * (X1 A1) * (X2 A2 + shift)         elementwise; X (rows, rank), A (rank, columns)
//
// What a product needs stays in the cache or in registers: X1 A1 and X2 A2 never exist as a whole,
// and the gradients compute them again, tile by tile, unless there is memory to keep them in.
// Everything is float32, row-major.
// Built for x86-64 with AVX2 and FMA; `fedpara_supported` says whether this machine has them.

#include <stdint.h>
#include <stdlib.h>

extern "C" {
struct Operand {
    const float *x, *a;
    float *dx, *da; // dx: (rows, padded(rank)); both null if nobody wants them
    int64_t rank;
    int64_t a_row, a_column; // strides of a, in elements
};

struct Weight {
    int64_t rows, columns;
    float scale, shift;
    float *weight;         // written by fedpara_compose
    const float *gradient; // read by fedpara_gradients
    float *kept;           // fedpara_kept floats, or null: written by the first, read by the second
    Operand operand[2];
};
}

namespace {

typedef float vec __attribute__((vector_size(32)));  // 8 floats
typedef float half __attribute__((vector_size(16))); // 4 floats

constexpr int MR = 6;        // rows of a register tile; with NV = 2: 12 sums, 2 of b, 1 of a
constexpr int NV = 2;        // vectors of a register tile
constexpr int VL = 8;        // floats of a vector
constexpr int NR = NV * VL;  // columns of a register tile
constexpr int COLUMNS = 128; // of a block in the gradients: two of 132 x 128 floats stay in the
constexpr int ROWS = 132;    // second cache

template <typename T> inline T load(const float *from)
{
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <typename T> inline void store(float *to, T value)
{
    __builtin_memcpy(to, &value, sizeof value);
}

// Where the sums of a register tile go.

struct Set {
    float *to;
    int64_t stride;
    template <typename T> void operator()(int i, int at, T sum) const
    {
        store(to + i * stride + at, sum);
    }
    Set down(int64_t rows) const { return {to + rows * stride, stride}; }
};

struct Add {
    float *to;
    int64_t stride;
    template <typename T> void operator()(int i, int at, T sum) const
    {
        store(to + i * stride + at, load<T>(to + i * stride + at) + sum);
    }
    Add down(int64_t rows) const { return {to + rows * stride, stride}; }
};

struct Combine { // the second operand's sums with the first's: the weight
    const float *first;
    float *to, *kept;
    int64_t stride;
    float scale, shift;
    template <typename T> void operator()(int i, int at, T second) const
    {
        if (kept)
            store(kept + i * NR + at, second);
        store(to + i * stride + at, load<T>(first + i * NR + at) * scale * (second + shift));
    }
};

struct Pull { // the weight's gradient, taken back to both operands
    const float *first, *gradient;
    float *one, *two; // rows COLUMNS apart
    int64_t stride;
    float scale, shift;
    template <typename T> void operator()(int i, int at, T second) const
    {
        const T pulled = load<T>(gradient + i * stride + at) * scale;
        store(one + i * COLUMNS + at, pulled * (second + shift));
        store(two + i * COLUMNS + at, pulled * load<T>(first + i * NR + at));
    }
};

inline void pull_all(int64_t rows, const float *second, const Pull &pull)
{
    for (int i = 0; i < rows; i++)
        for (int at = 0; at < NR; at += VL)
            pull(i, at, load<vec>(second + i * NR + at));
}

// Sums over k of a(i, k) b(k, :), R rows and V vectors of them, with a(i, k) = a[i * AI + k * ak].
template <int R, int V, typename T, int AI, typename To>
inline void tile(int64_t count, const float *__restrict a, int64_t ak, const float *__restrict b,
                 int64_t bk, const To &to)
{
    constexpr int width = sizeof(T) / sizeof(float);
    T sum[R][V];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++)
            sum[i][v] = T{};
    for (int64_t k = 0; k < count; k++, a += ak, b += bk) {
        T row[V];
        for (int v = 0; v < V; v++)
            row[v] = load<T>(b + v * width);
        for (int i = 0; i < R; i++) {
            const T one = a[i * AI] - T{};
            for (int v = 0; v < V; v++)
                sum[i][v] += one * row[v];
        }
    }
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++)
            to(i, v * width, sum[i][v]);
}

// A tile of `rows` <= R rows: the number must be known when this is compiled.
template <int R, int V, typename T, int AI, typename To>
inline void tile_of(int64_t rows, int64_t count, const float *a, int64_t ak, const float *b,
                    int64_t bk, const To &to)
{
    if (rows == R)
        tile<R, V, T, AI>(count, a, ak, b, bk, to);
    else if constexpr (R > 1)
        tile_of<R - 1, V, T, AI>(rows, count, a, ak, b, bk, to);
}

inline int64_t tiles_of(int64_t rows) { return (rows + MR - 1) / MR; }

// Any number of rows, in tiles of nearly equal height.
template <int V, typename T, int AI, typename To>
void multiply(int64_t rows, int64_t count, const float *a, int64_t ak, const float *b, int64_t bk,
              To to)
{
    const int64_t tiles = tiles_of(rows);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t i = rows * t / tiles, end = rows * (t + 1) / tiles;
        tile_of<MR, V, T, AI>(end - i, count, a + i * AI, ak, b, bk, to.down(i));
    }
}

// Columns j to j + NR of a, zeros beyond `end`; rows NR apart.
void panel(const Operand &own, int64_t j, int64_t end, float *to)
{
    const int64_t width = end - j < NR ? end - j : NR;
    for (int64_t r = 0; r < own.rank; r++, to += NR) {
        const float *from = own.a + r * own.a_row + j * own.a_column;
        for (int64_t c = 0; c < width; c++)
            to[c] = from[c * own.a_column];
        for (int64_t c = width; c < NR; c++)
            to[c] = 0;
    }
}

// x in tiles of rows: of each tile all rows of the first rank, then of the second, ...
void tiled(const Operand &own, int64_t rows, float *to)
{
    const int64_t tiles = tiles_of(rows);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t i = rows * t / tiles, height = rows * (t + 1) / tiles - i;
        for (int64_t r = 0; r < own.rank; r++)
            for (int64_t h = 0; h < height; h++)
                *to++ = own.x[(i + h) * own.rank + r];
    }
}

// Rows of one tile are often further apart than what the processor fetches by itself.
inline void fetch(const float *from, int64_t rows, int64_t stride)
{
    for (int64_t h = 0; h < rows; h++)
        __builtin_prefetch(from + h * stride);
}

// Kept tiles lie in the order in which they are computed, all of one size: panel by panel of NR
// columns, first those of X1 A1 and then those of X2 A2.
inline int64_t kept_tile(const Weight &w, int64_t j, int64_t t)
{
    return (j / NR * tiles_of(w.rows) + t) * MR * NR;
}

inline int64_t kept_size(const Weight &w) { return kept_tile(w, (w.columns + NR - 1) / NR * NR, 0); }

inline int64_t padded(int64_t rank) { return (rank + 3) / 4 * 4; }

int64_t room_for_composing(const Weight &w)
{
    return (w.rows + NR) * (w.operand[0].rank + w.operand[1].rank);
}

void compose(const Weight &w, int64_t from, int64_t end, float *room)
{
    float *x[2], *a[2];
    for (int o = 0; o < 2; o++) {
        const int64_t rank = w.operand[o].rank;
        x[o] = room, room += w.rows * rank;
        a[o] = room, room += NR * rank;
        tiled(w.operand[o], w.rows, x[o]);
    }
    const int64_t tiles = tiles_of(w.rows), r1 = w.operand[0].rank, r2 = w.operand[1].rank;
    for (int64_t j = from; j < end; j += NR) {
        const bool whole = end - j >= NR;
        for (int o = 0; o < 2; o++)
            panel(w.operand[o], j, end, a[o]);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t i = w.rows * t / tiles, height = w.rows * (t + 1) / tiles - i;
            float own[MR * NR] = {}, rest[MR * NR], *out = w.weight + i * w.columns + j;
            float *first = w.kept ? w.kept + kept_tile(w, j, t) : own;
            float *second = w.kept ? first + kept_size(w) : nullptr;
            fetch(out, height, w.columns);
            tile_of<MR, NV, vec, 1>(height, r1, x[0] + i * r1, height, a[0], NR, Set{first, NR});
            const Combine both{first,   whole ? out : rest, second, whole ? w.columns : NR,
                               w.scale, w.shift};
            tile_of<MR, NV, vec, 1>(height, r2, x[1] + i * r2, height, a[1], NR, both);
            if (!whole)
                for (int64_t h = 0; h < height; h++)
                    for (int64_t c = 0; c < end - j; c++)
                        out[h * w.columns + c] = rest[h * NR + c];
        }
    }
}

// Columns c to c + NR of a block: da (rank, columns) = or += Xᵀ P.
void gradient_of_a(const Operand &own, const float *x, const float *p, int64_t height, float *da,
                   int64_t stride, int64_t width, bool more)
{
    if (width >= NR) {
        if (more)
            multiply<NV, vec, 1>(own.rank, height, x, own.rank, p, COLUMNS, Add{da, stride});
        else
            multiply<NV, vec, 1>(own.rank, height, x, own.rank, p, COLUMNS, Set{da, stride});
        return;
    }
    float rest[MR * NR];
    const int64_t tiles = tiles_of(own.rank);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t r = own.rank * t / tiles, end = own.rank * (t + 1) / tiles;
        tile_of<MR, NV, vec, 1>(end - r, height, x + r, own.rank, p, COLUMNS, Set{rest, NR});
        for (int64_t s = r; s < end; s++)
            for (int64_t c = 0; c < width; c++)
                da[s * stride + c] = (more ? da[s * stride + c] : 0) + rest[(s - r) * NR + c];
    }
}

// dx (height, padded rank) += P Aᵀ, with Aᵀ (width, padded rank) in `at`.
void gradient_of_x(const float *p, const float *at, int64_t height, int64_t width, float *dx,
                   int64_t stride)
{
    int64_t r = 0;
    for (; r + NR <= stride; r += NR)
        multiply<NV, vec, COLUMNS>(height, width, p, 1, at + r, stride, Add{dx + r, stride});
    for (; r + VL <= stride; r += VL)
        multiply<1, vec, COLUMNS>(height, width, p, 1, at + r, stride, Add{dx + r, stride});
    for (; r < stride; r += VL / 2)
        multiply<1, half, COLUMNS>(height, width, p, 1, at + r, stride, Add{dx + r, stride});
}

int64_t room_for_gradients(const Weight &w)
{
    int64_t room = 2 * ROWS * COLUMNS;
    for (const Operand &own : w.operand)
        room += w.rows * own.rank + COLUMNS * (own.rank + padded(own.rank));
    return room;
}

void gradients(const Weight &w, int64_t from, int64_t end, float *room)
{
    float *x[2], *a[2], *at[2], *p[2];
    for (int o = 0; o < 2; o++) {
        const Operand &own = w.operand[o];
        x[o] = room, room += w.rows * own.rank;
        a[o] = room, room += COLUMNS * own.rank;
        at[o] = room, room += COLUMNS * padded(own.rank);
        p[o] = room, room += ROWS * COLUMNS;
        tiled(own, w.rows, x[o]);
        for (int64_t i = 0; i < COLUMNS * padded(own.rank); i++)
            at[o][i] = 0;
        if (own.dx)
            for (int64_t i = 0; i < w.rows * padded(own.rank); i++)
                own.dx[i] = 0;
    }
    const int64_t tiles = tiles_of(w.rows), r1 = w.operand[0].rank, r2 = w.operand[1].rank;
    const int64_t blocks = (tiles + ROWS / MR - 1) / (ROWS / MR);
    for (int64_t j = from; j < end; j += COLUMNS) {
        const int64_t width = end - j < COLUMNS ? end - j : COLUMNS;
        for (int o = 0; o < 2; o++) {
            const int64_t rank = w.operand[o].rank, stride = padded(rank);
            for (int64_t c = 0; c < width; c += NR)
                panel(w.operand[o], j + c, end, a[o] + c * rank);
            for (int64_t c = 0; c < width; c++)
                for (int64_t r = 0; r < rank; r++)
                    at[o][c * stride + r] = a[o][c / NR * NR * rank + r * NR + c % NR];
        }
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = tiles * b / blocks, last = tiles * (b + 1) / blocks;
            const int64_t top = w.rows * first / tiles, height = w.rows * last / tiles - top;
            for (int64_t c = 0; c < width; c += NR)
                for (int64_t t = first; t < last; t++) {
                    const int64_t i = w.rows * t / tiles, high = w.rows * (t + 1) / tiles - i;
                    float one[MR * NR] = {}, rest[MR * NR];
                    const float *g = w.gradient + i * w.columns + j + c;
                    int64_t stride = w.columns;
                    fetch(g, high, stride);
                    if (!w.kept)
                        tile_of<MR, NV, vec, 1>(high, r1, x[0] + i * r1, high, a[0] + c * r1, NR,
                                                Set{one, NR});
                    if (width - c < NR) {
                        for (int64_t h = 0; h < high; h++)
                            for (int64_t k = 0; k < NR; k++)
                                rest[h * NR + k] = k < width - c ? g[h * stride + k] : 0;
                        g = rest, stride = NR;
                    }
                    const int64_t at_p = (i - top) * COLUMNS + c;
                    const float *kept = w.kept ? w.kept + kept_tile(w, j + c, t) : one;
                    const Pull pull{kept, g, p[0] + at_p, p[1] + at_p, stride, w.scale, w.shift};
                    if (w.kept)
                        pull_all(high, kept + kept_size(w), pull);
                    else
                        tile_of<MR, NV, vec, 1>(high, r2, x[1] + i * r2, high, a[1] + c * r2, NR,
                                                pull);
                }
            for (int o = 0; o < 2; o++) {
                const Operand &own = w.operand[o];
                if (!own.dx)
                    continue;
                for (int64_t c = 0; c < width; c += NR)
                    gradient_of_a(own, own.x + top * own.rank, p[o] + c, height, own.da + j + c,
                                  w.columns, width - c, b > 0);
                gradient_of_x(p[o], at[o], height, width, own.dx + top * padded(own.rank),
                              padded(own.rank));
            }
        }
    }
}

template <typename Work>
int with_room(int64_t floats, const Weight *w, int64_t from, int64_t end, Work work)
{
    float *room = static_cast<float *>(malloc(floats * sizeof(float)));
    if (!room)
        return 1;
    work(*w, from, end, room);
    free(room);
    return 0;
}

} // namespace

extern "C" {

int fedpara_version() { return 1; }

int fedpara_supported()
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Floats to keep the two products in.
int64_t fedpara_kept(const Weight *w) { return 2 * kept_size(*w); }

// Columns from `from` to `end` of the weight. 1 if there was no memory to work in, else 0.
int fedpara_compose(const Weight *w, int64_t from, int64_t end)
{
    return with_room(room_for_composing(*w), w, from, end, compose);
}

// The same columns' share of dx, and these columns of da.
int fedpara_gradients(const Weight *w, int64_t from, int64_t end)
{
    return with_room(room_for_gradients(*w), w, from, end, gradients);
}
}
