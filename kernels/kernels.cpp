// Composing a FedPara weight, and taking its gradient back to the factors, in one pass each.
//
//     W = scale * (X1 A1ᵀ) * (X2 A2ᵀ + shift)       elementwise; X (rows, rank), A (columns, rank)
//
// What a product needs stays in the cache or in registers: X1 A1ᵀ and X2 A2ᵀ never exist as a whole,
// and the gradients compute them again, tile by tile. Everything is float32, in rows.
// Built for x86-64 with AVX2 and FMA; `fedpara_supported` says whether this machine has them.

#include "tiles.h"

extern "C" {
struct Operand {
    const float *x, *a; // (rows, rank) and (columns, rank)
    float *dx, *da;     // the same; both null if nobody wants them
    int64_t rank;
};

struct Weight {
    int64_t rows, columns;
    float scale, shift;
    float *weight; // written by fedpara_compose
    // Read by fedpara_gradients: the weight's gradient, or null if it is outputsᵀ inputs, with
    // outputs (batch, rows) and inputs (batch, columns); then it never exists as a whole.
    const float *gradient, *outputs, *inputs;
    int64_t batch;
    Operand operand[2];
};
}

namespace {

constexpr int COLUMNS = 128;  // of a block in the gradients, and
constexpr int ROWS = 22 * MR; // its rows: two such blocks stay in the second cache
constexpr int NEAREST = 6144; // floats that stay in the first cache, beside a few tiles

struct Combine { // the second operand's sums with the first's: the weight
    const float *first;
    float *to;
    int64_t stride;
    void operator()(int i, int at, vec second) const
    {
        store(to + i * stride + at, load(first + i * NR + at) * second);
    }
};

struct Pull { // the weight's gradient, taken back to both operands: panels
    const float *first, *gradient;
    float *one, *two;
    int64_t stride;
    void operator()(int i, int at, vec second) const
    {
        const vec own = load(gradient + i * stride + at);
        store(one + i * NR + at, own * second);
        store(two + i * NR + at, own * load(first + i * NR + at));
    }
};

struct Composing {
    int64_t wide; // panels of a block of columns, of which all of A stays in the first cache
    float *x[2], *a[2];

    Composing(const Weight &w, Room &room)
    {
        const int64_t ranks = w.operand[0].rank + w.operand[1].rank;
        wide = NEAREST / (NR * ranks);
        wide = wide < 1 ? 1 : least(wide, parts(w.columns, NR));
        for (int o = 0; o < 2; o++) {
            x[o] = room(w.rows * w.operand[o].rank);
            a[o] = room(wide * NR * w.operand[o].rank);
        }
    }

    void run(const Weight &w, int64_t from, int64_t end)
    {
        const int64_t tiles = parts(w.rows, MR), r1 = w.operand[0].rank, r2 = w.operand[1].rank;
        tiled({w.operand[0].x, r1, 1}, w.rows, r1, w.scale, x[0]);
        tiled({w.operand[1].x, r2, 1}, w.rows, r2, 1, x[1]);
        for (int64_t j = from; j < end; j += wide * NR) {
            const int64_t stop = least(j + wide * NR, end), count = parts(stop - j, NR);
            panels({w.operand[0].a, r1, 1}, j, stop, r1, a[0]);
            panels({w.operand[1].a, r2, 1}, j, stop, r2, a[1]);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t i = w.rows * t / tiles, height = w.rows * (t + 1) / tiles - i;
                for (int64_t p = 0; p < count; p++) {
                    float first[MR * NR], rest[MR * NR];
                    const int64_t width = least(end - j - p * NR, NR);
                    float *out = w.weight + i * w.columns + j + p * NR;
                    const Steps one{r1, x[0] + i * r1, height, a[0] + p * NR * r1, NR};
                    const Steps two{r2, x[1] + i * r2, height, a[1] + p * NR * r2, NR};
                    tile_of<MR, 2, 1>(height, one, 0, Set{first, NR});
                    if (width == NR) {
                        tile_of<MR, 2, 1>(height, two, w.shift, Combine{first, out, w.columns});
                        continue;
                    }
                    tile_of<MR, 2, 1>(height, two, w.shift, Combine{first, rest, NR});
                    for (int64_t h = 0; h < height; h++)
                        memcpy(out + h * w.columns, rest + h * NR, width * sizeof(float));
                }
            }
        }
    }
};

struct Gradients {
    float *x[2], *a[2];              // as for composing; columns in blocks of COLUMNS
    float *x_rows[2], *a_columns[2]; // padded, for the gradients by a and by x
    float *dx[2], *da[2];            // padded; da of one block
    float *pulled[2];                // the gradients by the products, panels of ROWS rows
    float *outputs, *inputs;         // in tiles, and in panels of a block

    Gradients(const Weight &w, Room &room)
    {
        for (int o = 0; o < 2; o++) {
            const int64_t rank = w.operand[o].rank;
            x[o] = room(w.rows * rank);
            a[o] = room(COLUMNS * rank);
            x_rows[o] = room(w.rows * padded(rank));
            a_columns[o] = room(COLUMNS * padded(rank));
            dx[o] = room(w.rows * padded(rank));
            da[o] = room(COLUMNS * padded(rank));
            pulled[o] = room(ROWS * COLUMNS);
        }
        outputs = room(w.gradient ? 0 : w.rows * w.batch);
        inputs = room(w.gradient ? 0 : COLUMNS * w.batch);
    }

    void run(const Weight &w, int64_t from, int64_t end)
    {
        const float factor[2] = {w.scale, 1};
        for (int o = 0; o < 2; o++) {
            const Operand &own = w.operand[o];
            tiled({own.x, own.rank, 1}, w.rows, own.rank, factor[o], x[o]);
            pad(own.x, w.rows, own.rank, factor[o], x_rows[o]);
            memset(dx[o], 0, w.rows * padded(own.rank) * sizeof(float));
        }
        if (!w.gradient)
            tiled({w.outputs, 1, w.rows}, w.rows, w.batch, 1, outputs);
        const int64_t tiles = parts(w.rows, MR), blocks = parts(tiles, ROWS / MR);
        for (int64_t j = from; j < end; j += COLUMNS) {
            const int64_t width = least(end - j, COLUMNS), count = parts(width, NR);
            for (int o = 0; o < 2; o++) {
                const Operand &own = w.operand[o];
                const int64_t wide = padded(own.rank);
                panels({own.a, own.rank, 1}, j, j + width, own.rank, a[o]);
                memset(a_columns[o] + width * wide, 0, (count * NR - width) * wide * sizeof(float));
                pad(own.a + j * own.rank, width, own.rank, factor[o], a_columns[o]);
                memset(da[o], 0, COLUMNS * wide * sizeof(float));
            }
            if (!w.gradient)
                panels({w.inputs, 1, w.columns}, j, j + width, w.batch, inputs);
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = tiles * b / blocks, last = tiles * (b + 1) / blocks;
                const int64_t top = w.rows * first / tiles, height = w.rows * last / tiles - top;
                for (int64_t t = first; t < last; t++)
                    pull(w, t, top, j, width);
                for (int o = 0; o < 2; o++)
                    if (w.operand[o].dx)
                        collect(o, padded(w.operand[o].rank), top, height, count);
            }
            for (int o = 0; o < 2; o++)
                if (const Operand &own = w.operand[o]; own.dx)
                    compact(da[o], width, own.rank, own.da + j * own.rank);
        }
        for (int o = 0; o < 2; o++)
            if (const Operand &own = w.operand[o]; own.dx)
                compact(dx[o], w.rows, own.rank, own.dx);
    }

    // Tile t of rows, of a block that begins at row `top` and column j.
    void pull(const Weight &w, int64_t t, int64_t top, int64_t j, int64_t width)
    {
        const int64_t tiles = parts(w.rows, MR), r1 = w.operand[0].rank, r2 = w.operand[1].rank;
        const int64_t i = w.rows * t / tiles, height = w.rows * (t + 1) / tiles - i;
        for (int64_t c = 0; c < width; c += NR) {
            float first[MR * NR], rest[MR * NR];
            const float *own = rest;
            int64_t stride = NR;
            const Steps one{r1, x[0] + i * r1, height, a[0] + c * r1, NR};
            const Steps two{r2, x[1] + i * r2, height, a[1] + c * r2, NR};
            tile_of<MR, 2, 1>(height, one, 0, Set{first, NR});
            if (!w.gradient) {
                const Steps steps{w.batch, outputs + i * w.batch, height, inputs + c * w.batch, NR};
                tile_of<MR, 2, 1>(height, steps, 0, Set{rest, NR});
            } else if (width - c >= NR) {
                own = w.gradient + i * w.columns + j + c, stride = w.columns;
            } else {
                memset(rest, 0, sizeof rest);
                const float *row = w.gradient + i * w.columns + j + c;
                for (int64_t h = 0; h < height; h++, row += w.columns)
                    memcpy(rest + h * NR, row, (width - c) * sizeof(float));
            }
            const int64_t at = c * ROWS + (i - top) * NR;
            const Pull to{first, own, pulled[0] + at, pulled[1] + at, stride};
            tile_of<MR, 2, 1>(height, two, w.shift, to);
        }
    }

    // The share of a block of `height` rows and `count` panels in the gradients of one operand.
    void collect(int o, int64_t wide, int64_t top, int64_t height, int64_t count)
    {
        for (int64_t p = 0; p < count; p++) {
            const Steps down{height, pulled[o] + p * ROWS * NR, NR, x_rows[o] + top * wide, wide};
            add_product<1>(NR, wide, down, Add{da[o] + p * NR * wide, wide});
        }
        const Steps across{NR, pulled[o], 1, a_columns[o], wide, count, (ROWS - 1) * NR};
        add_product<NR>(height, wide, across, Add{dx[o] + top * wide, wide});
    }
};

template <typename Work> int with_room(const Weight &w, int64_t from, int64_t end)
{
    Room room{nullptr, 0};
    Work{w, room};
    float *memory = static_cast<float *>(aligned_alloc(64, room.used * sizeof(float)));
    if (!memory)
        return 1;
    room = {memory, 0};
    Work{w, room}.run(w, from, end);
    free(memory);
    return 0;
}

} // namespace

extern "C" {

int fedpara_supported()
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Columns from `from` to `end` of the weight. 1 if there was no memory to work in, else 0.
int fedpara_compose(const Weight *w, int64_t from, int64_t end)
{
    return with_room<Composing>(*w, from, end);
}

// These columns' share of dx, and these columns' rows of da.
int fedpara_gradients(const Weight *w, int64_t from, int64_t end)
{
    return with_room<Gradients>(*w, from, end);
}
}
