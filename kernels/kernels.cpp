// FedPara weights and the gradients of their factors, each computed in one pass.
//
//     W = scale * (X1 A1ᵀ) * (X2 A2ᵀ + shift)       elementwise; X (rows, rank), A (columns, rank)
//
// The data of a product stay in the cache or in registers: X1 A1ᵀ and X2 A2ᵀ never exist as a whole,
// and the gradients compute them again, tile by tile. A linear layer's output and its gradients need
// no whole W either. Everything is float32, in row-major order.
// Built for x86-64 with AVX2 and FMA; `fedpara_supported` returns whether this machine has them.

#include "tiles.h"

extern "C" {
struct Operand {
    const float *x, *a; // (rows, rank) and (columns, rank)
    float *dx, *da;     // the same shapes; both null if they are not needed
    int64_t rank;
};

struct Weight {
    int64_t rows, columns;
    float scale, shift;
    float *weight;         // written by fedpara_compose
    const float *gradient; // the weight's, read by fedpara_gradients; null for a linear layer
    Operand operand[2];
    // For a linear layer: output (batch, rows) = inputs (batch, columns) Wᵀ + bias.
    int64_t batch;
    const float *inputs, *bias; // bias may be null
    float *output;              // written by fedpara_linear
    const float *d_output;      // the output's gradient, read by fedpara_gradients
    float *d_inputs;            // the inputs' gradient, written by it; null if it is not needed
};
}

namespace {

constexpr int COLUMNS = 128;  // columns of a block in the gradients
constexpr int ROWS = 22 * MR; // rows of a block; two such blocks stay in the L2 cache
constexpr int NEAREST = 6144; // floats that stay in the L1 cache, beside a few tiles

// Multiplies the sums of both operands: the weight.
struct Combine {
    const float *first;
    float *to;
    int64_t stride;
    void operator()(int i, int at, vec second) const
    {
        store(to + i * stride + at, load(first + i * NR + at) * second);
    }
};

// Writes the gradients of both products, and the weight itself if it is needed, in panels.
template <bool WHOLE> struct Pull {
    const float *first, *gradient;
    float *one, *two, *whole;
    int64_t stride;
    void operator()(int i, int at, vec second) const
    {
        const vec own = load(gradient + i * stride + at), other = load(first + i * NR + at);
        store(one + i * NR + at, own * second);
        store(two + i * NR + at, own * other);
        if constexpr (WHOLE)
            store(whole + i * NR + at, other * second);
    }
};

// A matrix in tiles of rows, as `tiled` makes them.
struct Batch {
    const float *tiles;
    int64_t rows, columns;
};

// Adds to `to` the batch's columns from `top` on times a block of `height` rows in panels of ROWS
// rows.
void add_batch(const Batch &batch, int64_t top, int64_t height, const float *block, int64_t width,
               const Add to)
{
    const int64_t tiles = parts(batch.rows, MR);
    for (int64_t c = 0; c < width; c += NR)
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t i = batch.rows * t / tiles, tall = batch.rows * (t + 1) / tiles - i;
            const float *own = batch.tiles + i * batch.columns + top * tall;
            const Steps steps{height, own, tall, block + c * ROWS, NR};
            float rest[MR * NR], *out = to.to + i * to.stride + c;
            if (width - c >= NR) {
                tile_of<MR, 2, 1>(tall, steps, 0, Add{out, to.stride});
                continue;
            }
            tile_of<MR, 2, 1>(tall, steps, 0, Set{rest, NR});
            for (int64_t h = 0; h < tall; h++)
                for (int64_t k = 0; k < width - c; k++)
                    out[h * to.stride + k] += rest[h * NR + k];
        }
}

struct Composing {
    int64_t wide; // panels of a block of columns such that the block's A stays in the L1 cache
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
                    fetch<1>(out + height * w.columns, least(MR, w.rows - i - height), w.columns);
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
    float *x[2], *a[2];              // as for composing, with columns in blocks of COLUMNS
    float *a_columns[2], *a_last[2]; // for dx: A padded, and its last few columns transposed
    float *dx[2], *da[2];            // dx padded; da of one block, in panels
    float *pulled[2], *whole;        // the products' gradients, and W, in panels of ROWS rows
    float *d_output, *d_rows;        // the output's gradient in tiles of W's rows, and of the batch
    float *inputs;                   // in panels

    Gradients(const Weight &w, Room &room)
    {
        for (int o = 0; o < 2; o++) {
            const int64_t rank = w.operand[o].rank;
            x[o] = room(w.rows * rank);
            a[o] = room(COLUMNS * rank);
            a_columns[o] = room(COLUMNS * padded(rank));
            a_last[o] = room(COLUMNS * LAST);
            dx[o] = room(w.rows * padded(rank));
            da[o] = room(COLUMNS * rank);
            pulled[o] = room(ROWS * COLUMNS);
        }
        d_output = room(w.gradient ? 0 : w.rows * w.batch);
        inputs = room(w.gradient ? 0 : COLUMNS * w.batch);
        d_rows = room(w.d_inputs ? w.rows * w.batch : 0);
        whole = room(w.d_inputs ? ROWS * COLUMNS : 0);
    }

    void run(const Weight &w, int64_t from, int64_t end)
    {
        if (!w.gradient)
            tiled({w.d_output, 1, w.rows}, w.rows, w.batch, 1, d_output);
        if (w.d_inputs)
            tiled({w.d_output, w.rows, 1}, w.batch, w.rows, 1, d_rows);
        const int64_t tiles = parts(w.rows, MR), blocks = parts(tiles, ROWS / MR);
        for (int64_t j = from; j < end; j += COLUMNS) {
            const int64_t width = least(end - j, COLUMNS), count = parts(width, NR);
            for (int o = 0; o < 2; o++) {
                const Operand &own = w.operand[o];
                const int64_t wide = padded(own.rank);
                panels({own.a, own.rank, 1}, j, j + width, own.rank, a[o]);
                memset(a_columns[o] + width * wide, 0, (count * NR - width) * wide * sizeof(float));
                pad(own.a + j * own.rank, width, own.rank, a_columns[o]);
                last_columns(a_columns[o], count * NR, own.rank, a_last[o]);
                memset(da[o], 0, COLUMNS * own.rank * sizeof(float));
            }
            if (!w.gradient)
                panels({w.inputs, 1, w.columns}, j, j + width, w.batch, inputs);
            for (int64_t i = 0; w.d_inputs && i < w.batch; i++)
                memset(w.d_inputs + i * w.columns + j, 0, width * sizeof(float));
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = tiles * b / blocks, last = tiles * (b + 1) / blocks;
                const int64_t top = w.rows * first / tiles, height = w.rows * last / tiles - top;
                for (int o = 0; o < 2 && j == from; o++)
                    begin(o, w, first, last);
                for (int64_t t = first; t < last; t++)
                    pull(w, t, top, j, width);
                for (int o = 0; o < 2; o++)
                    if (w.operand[o].dx)
                        collect(o, w.operand[o], top, height, count);
                if (w.d_inputs)
                    add_batch({d_rows, w.batch, w.rows}, top, height, whole, width,
                              {w.d_inputs + j, w.columns});
            }
            for (int o = 0; o < 2; o++)
                if (const Operand &own = w.operand[o]; own.dx)
                    unpack(da[o], width, own.rank, factor(w, o), own.da + j * own.rank);
        }
        for (int o = 0; o < 2; o++)
            if (const Operand &own = w.operand[o]; own.dx)
                compact(dx[o], w.rows, own.rank, factor(w, o), own.dx);
    }

    // Prepares tiles `first` to `last` of rows just before they are used: x in tiles, dx as zeros.
    void begin(int o, const Weight &w, int64_t first, int64_t last)
    {
        const Operand &own = w.operand[o];
        const int64_t tiles = parts(w.rows, MR), wide = padded(own.rank);
        for (int64_t t = first; t < last; t++) {
            const int64_t i = w.rows * t / tiles, end = w.rows * (t + 1) / tiles;
            tiled({own.x, own.rank, 1}, i, end - i, own.rank, factor(w, o), x[o] + i * own.rank);
            memset(dx[o] + i * wide, 0, (end - i) * wide * sizeof(float));
        }
    }

    static float factor(const Weight &w, int o) { return o == 0 ? w.scale : 1; }

    // Computes tile t of rows in a block that starts at row `top` and column j.
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
                const Steps steps{w.batch, d_output + i * w.batch, height, inputs + c * w.batch, NR};
                tile_of<MR, 2, 1>(height, steps, 0, Set{rest, NR});
            } else if (width - c >= NR) {
                own = w.gradient + i * w.columns + j + c, stride = w.columns;
                fetch<0>(own + height * stride, least(MR, w.rows - i - height), stride);
            } else {
                memset(rest, 0, sizeof rest);
                const float *row = w.gradient + i * w.columns + j + c;
                for (int64_t h = 0; h < height; h++, row += w.columns)
                    memcpy(rest + h * NR, row, (width - c) * sizeof(float));
            }
            const int64_t at = c * ROWS + (i - top) * NR;
            float *p = pulled[0] + at, *q = pulled[1] + at;
            if (w.d_inputs)
                tile_of<MR, 2, 1>(height, two, w.shift,
                                  Pull<true>{first, own, p, q, whole + at, stride});
            else
                tile_of<MR, 2, 1>(height, two, w.shift, Pull<false>{first, own, p, q, p, stride});
        }
    }

    // Adds the share of a block of `height` rows and `count` panels to one operand's gradients.
    void collect(int o, const Operand &own, int64_t top, int64_t height, int64_t count)
    {
        const int64_t rank = own.rank, wide = padded(rank);
        for (int64_t p = 0; p < count; p++) {
            const Steps down{height, own.x + top * rank, rank, pulled[o] + p * ROWS * NR, NR};
            add_rows<2, 1>(rank, down, Add{da[o] + p * NR * rank, NR});
        }
        const Steps across{NR, pulled[o], 1, a_columns[o], wide, count, (ROWS - 1) * NR};
        float *to = dx[o] + top * wide;
        const int64_t most = by_vectors(rank);
        add_product<NR>(height, most, across, Add{to, wide});
        add_dots<LAST, ROWS * NR>(rank - most, height, count, pulled[o], a_last[o], to + most, wide);
    }
};

// A linear layer's output. One block of W, transposed, exists at a time.
struct Linear {
    float *a[2], *x[2];    // A in tiles of all columns of W, X in panels of a block of its rows
    float *block, *inputs; // the block of W in panels, the inputs in tiles of the batch

    Linear(const Weight &w, Room &room)
    {
        for (int o = 0; o < 2; o++) {
            a[o] = room(w.columns * w.operand[o].rank);
            x[o] = room(COLUMNS * w.operand[o].rank);
        }
        block = room(ROWS * COLUMNS);
        inputs = room(w.batch * w.columns);
    }

    void run(const Weight &w, int64_t from, int64_t end)
    {
        const int64_t r1 = w.operand[0].rank, r2 = w.operand[1].rank;
        tiled({w.operand[0].a, r1, 1}, w.columns, r1, w.scale, a[0]);
        tiled({w.operand[1].a, r2, 1}, w.columns, r2, 1, a[1]);
        tiled({w.inputs, w.columns, 1}, w.batch, w.columns, 1, inputs);
        const int64_t tiles = parts(w.columns, MR), blocks = parts(tiles, ROWS / MR);
        for (int64_t i = from; i < end; i += COLUMNS) {
            const int64_t width = least(end - i, COLUMNS);
            panels({w.operand[0].x, r1, 1}, i, i + width, r1, x[0]);
            panels({w.operand[1].x, r2, 1}, i, i + width, r2, x[1]);
            for (int64_t b = 0; b < w.batch; b++)
                if (w.bias)
                    memcpy(w.output + b * w.rows + i, w.bias + i, width * sizeof(float));
                else
                    memset(w.output + b * w.rows + i, 0, width * sizeof(float));
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = tiles * b / blocks, last = tiles * (b + 1) / blocks;
                const int64_t top = w.columns * first / tiles;
                const int64_t height = w.columns * last / tiles - top;
                for (int64_t t = first; t < last; t++)
                    compose(w, t, top, width);
                add_batch({inputs, w.batch, w.columns}, top, height, block, width,
                          {w.output + i, w.rows});
            }
        }
    }

    // Composes tile t of W's columns in a block that starts at column `top`.
    void compose(const Weight &w, int64_t t, int64_t top, int64_t width)
    {
        const int64_t tiles = parts(w.columns, MR), r1 = w.operand[0].rank, r2 = w.operand[1].rank;
        const int64_t j = w.columns * t / tiles, height = w.columns * (t + 1) / tiles - j;
        for (int64_t c = 0; c < width; c += NR) {
            float first[MR * NR];
            const Steps one{r1, a[0] + j * r1, height, x[0] + c * r1, NR};
            const Steps two{r2, a[1] + j * r2, height, x[1] + c * r2, NR};
            tile_of<MR, 2, 1>(height, one, 0, Set{first, NR});
            float *to = block + c * ROWS + (j - top) * NR;
            tile_of<MR, 2, 1>(height, two, w.shift, Combine{first, to, NR});
        }
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

// The functions below return 1 if there is no memory for intermediate results, else 0.

// Writes columns `from` to `end` of the weight.
int fedpara_compose(const Weight *w, int64_t from, int64_t end)
{
    return with_room<Composing>(*w, from, end);
}

// Writes these columns' share of dx, their rows of da, and these columns of d_inputs.
int fedpara_gradients(const Weight *w, int64_t from, int64_t end)
{
    return with_room<Gradients>(*w, from, end);
}

// Writes columns `from` to `end` of a linear layer's output, from these rows of the weight.
int fedpara_linear(const Weight *w, int64_t from, int64_t end)
{
    return with_room<Linear>(*w, from, end);
}
}
