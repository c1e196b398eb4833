// Dense noisy linear layer, forward and backward, on tensor cores.
//
//   forward   y = x * W0^T + b0 + z . (x * dW^T + db)         any of the four absent
//   folded    y = x * (W0 + z . dW)^T + b0 + z . db           rows of a tile share z: BC noise and many tokens, or none
//   input     dx = g * W0 + e * dW,  e = z . g                sums over the branches that share an input
//   weight    dW = e^T * x,  db = sum over rows of e
//
//   x [M, K] or, shared by the branches, [B T, K]; W0, dW [N, K]; b0, db [N]; y, g [M, N]; z as in noise_source.cuh
//
// A product is a list of segments (left, right, inner size) that go to one accumulator or, forward, to two: the base's
// and the adapter's. So products of the low-rank layer are the same kernels: s * D^T for x * dW^T, ds * U for e * dW; they
// bring a scale.
//
// Mapping: a block makes 128 x 128 outputs (mainloop.cuh), column tiles first so that blocks that run together read
// the same rows of x. Noise of the forward pass is made once per tile, sample (or token) and channel, in shared memory;
// that of the backward pass one inner tile ahead of its use, and multiplied into the left fragments in f32.
//
// Bytes: operands once per 128 rows or columns of the output that need them, mostly from L2; y, dx, dW written once. dW is
// split over token rows into partial sums in f32 (kernels/partial_sums.cu). Operations: 2 M N K per product; f32 without
// tf32 takes three times as many.
// Determinism: run-to-run bitwise; no float atomics, every sum in a fixed order.

#include "../tile_noise.cuh"
#include "epilogue.cuh"

namespace pace {

struct Segment {
    const void *left, *right;
    u32 inner;
    u32 adapter;   // belongs under the noise
    u32 first_row; // token row of y or g that row 0 of the left operand stands for
    u32 aligned;   // rows of both operands hold whole 16-byte vectors and start at multiples of 16 bytes
};

PACE_PARAMS(Segment, 32);
PACE_PARAM(Segment, right, 8);
PACE_PARAM(Segment, inner, 16);
PACE_PARAM(Segment, adapter, 20);
PACE_PARAM(Segment, first_row, 24);
PACE_PARAM(Segment, aligned, 28);

struct NoisyLinearParams {
    NoiseSource noise;
    Segment segments[2];
    const void *base_bias, *delta_bias; // or null
    void *y;
    u32 rows;        // M
    u32 tokens;      // T
    u32 channels;    // N
    u32 wrap;        // rows of x
    u32 count;       // segments
    u32 tile_columns;
    u32 aligned;     // y
    u32 z_aligned;   // a given z
    float scale;     // factor on the adapter's product
    u32 reserved;
};

PACE_PARAMS(NoisyLinearParams, 176);
PACE_PARAM(NoisyLinearParams, segments, 48);
PACE_PARAM(NoisyLinearParams, base_bias, 112);
PACE_PARAM(NoisyLinearParams, delta_bias, 120);
PACE_PARAM(NoisyLinearParams, y, 128);
PACE_PARAM(NoisyLinearParams, rows, 136);
PACE_PARAM(NoisyLinearParams, tokens, 140);
PACE_PARAM(NoisyLinearParams, channels, 144);
PACE_PARAM(NoisyLinearParams, wrap, 148);
PACE_PARAM(NoisyLinearParams, count, 152);
PACE_PARAM(NoisyLinearParams, tile_columns, 156);
PACE_PARAM(NoisyLinearParams, aligned, 160);
PACE_PARAM(NoisyLinearParams, z_aligned, 164);
PACE_PARAM(NoisyLinearParams, scale, 168);

struct NoisyLinearInputParams {
    NoiseSource noise;
    Segment segments[4];
    void *dx;
    u32 rows;     // of dx
    u32 tokens;   // T
    u32 channels; // N
    u32 columns;  // K
    u32 count;    // segments
    u32 tile_columns;
    u32 aligned;   // dx
    u32 z_aligned; // a given z
    float scale;   // factor on the sum
    u32 reserved;
};

PACE_PARAMS(NoisyLinearInputParams, 224);
PACE_PARAM(NoisyLinearInputParams, segments, 48);
PACE_PARAM(NoisyLinearInputParams, dx, 176);
PACE_PARAM(NoisyLinearInputParams, rows, 184);
PACE_PARAM(NoisyLinearInputParams, tokens, 188);
PACE_PARAM(NoisyLinearInputParams, channels, 192);
PACE_PARAM(NoisyLinearInputParams, columns, 196);
PACE_PARAM(NoisyLinearInputParams, count, 200);
PACE_PARAM(NoisyLinearInputParams, tile_columns, 204);
PACE_PARAM(NoisyLinearInputParams, aligned, 208);
PACE_PARAM(NoisyLinearInputParams, z_aligned, 212);
PACE_PARAM(NoisyLinearInputParams, scale, 216);

struct NoisyLinearWeightParams {
    NoiseSource noise;
    const void *g, *x;
    void *weight, *bias; // dW or partial sums of it; db, or null
    u32 rows;            // M
    u32 tokens;          // T
    u32 channels;        // N
    u32 columns;         // K
    u32 wrap;            // rows of x
    u32 tile_columns;
    u32 tile_rows;
    u32 part; // token rows of a partial sum
    u32 partial; // write partial sums in f32, those of part i behind those of the parts before
    u32 left_aligned, right_aligned;
    u32 aligned;   // dW
    u32 z_aligned; // a given z
    u32 reserved;
};

PACE_PARAMS(NoisyLinearWeightParams, 136);
PACE_PARAM(NoisyLinearWeightParams, g, 48);
PACE_PARAM(NoisyLinearWeightParams, x, 56);
PACE_PARAM(NoisyLinearWeightParams, weight, 64);
PACE_PARAM(NoisyLinearWeightParams, bias, 72);
PACE_PARAM(NoisyLinearWeightParams, rows, 80);
PACE_PARAM(NoisyLinearWeightParams, tokens, 84);
PACE_PARAM(NoisyLinearWeightParams, channels, 88);
PACE_PARAM(NoisyLinearWeightParams, columns, 92);
PACE_PARAM(NoisyLinearWeightParams, wrap, 96);
PACE_PARAM(NoisyLinearWeightParams, tile_columns, 100);
PACE_PARAM(NoisyLinearWeightParams, tile_rows, 104);
PACE_PARAM(NoisyLinearWeightParams, part, 108);
PACE_PARAM(NoisyLinearWeightParams, partial, 112);
PACE_PARAM(NoisyLinearWeightParams, left_aligned, 116);
PACE_PARAM(NoisyLinearWeightParams, right_aligned, 120);
PACE_PARAM(NoisyLinearWeightParams, aligned, 124);
PACE_PARAM(NoisyLinearWeightParams, z_aligned, 128);

namespace sm80 {

// Stages of the ring; the host plans shared memory for them.
constexpr u32 FORWARD_STAGES = 4;
constexpr u32 FOLDED_STAGES = 3;
constexpr u32 BACKWARD_STAGES = 3;

// TWO: the base's and the adapter's products have accumulators of their own. Otherwise there is one of them.
template <class Numbers, bool TWO> __device__ __forceinline__ void forward(const NoisyLinearParams &p) {
    using T = typename Numbers::T;
    PACE_SHARED(unsigned char, shared);
    const u32 column = blockIdx.x % p.tile_columns * TILE, row = blockIdx.x / p.tile_columns * TILE;
    const u32 first_tiles = (p.segments[0].inner - 1) / INNER<T> + 1;
    const u32 tiles = p.count == 1 ? first_tiles : first_tiles + (p.segments[1].inner - 1) / INNER<T> + 1;
    Accumulators base = {}, adapter = {};
    pipeline<FORWARD_STAGES>(
        shared, 2 * TILE_BYTES, tiles,
        [&](unsigned char *stage, u32 tile) {
            const Segment &segment = p.segments[tile < first_tiles ? 0 : 1];
            const u32 inner = (tile < first_tiles ? tile : tile - first_tiles) * INNER<T>;
            const bool aligned = segment.aligned != 0u;
            copy_tile<T, false>(
                stage,
                Operand<T>{static_cast<const T *>(segment.left), p.rows, segment.inner, segment.inner, p.wrap, aligned},
                row, inner);
            copy_tile<T, false>(stage + TILE_BYTES,
                                Operand<T>{static_cast<const T *>(segment.right), p.channels, segment.inner,
                                           segment.inner, NO_WRAP, aligned},
                                column, inner);
        },
        [&](const unsigned char *stage, u32 tile) {
            if (TWO && tile >= first_tiles) {
                multiply_tile<Numbers, false, false>(adapter, stage, stage + TILE_BYTES, NoScale(), NoMore());
            } else {
                multiply_tile<Numbers, false, false>(base, stage, stage + TILE_BYTES, NoScale(), NoMore());
            }
        });

    const NoiseRows noise_rows(p.noise, p.tokens, row);
    const u32 last = min(row + TILE, p.rows) - 1;
    const bool noisy = p.noise.kind != NOISE_OFF;
    float *z = reinterpret_cast<float *>(shared);
    if (noisy) {
        __syncthreads();
        fill_noise<PRODUCT_THREADS, TILE / 4>(z, TILE, p.noise, key_of(p.noise), noise_rows.first, noise_rows.place(last) + 1, p.tokens,
                             column, p.channels, p.z_aligned != 0u);
        __syncthreads();
    }
    const ColumnBias<T> base_bias(p.base_bias, column, p.channels), delta_bias(p.delta_bias, column, p.channels);
    const bool only_adapter = !TWO && p.segments[0].adapter != 0u;
    each_accumulator([&](u32 part, u32 j, u32 i, u32 r, u32 k) {
        const float factor = noisy ? z[noise_rows.place(min(row + r, last)) * TILE + k] : 1.0f;
        float &out = base[part][j][i];
        const float product = TWO ? adapter[part][j][i] : only_adapter ? out : 0.0f;
        const float under = only_adapter ? 0.0f : out;
        out = fmaf(factor, fmaf(p.scale, product, delta_bias.value[j][i % 2]), under + base_bias.value[j][i % 2]);
    });
    store_tile<T>(base, shared, static_cast<T *>(p.y), row, column, p.rows, p.channels, p.aligned != 0u);
}

// Rows of a tile belong to one sample; segments are the base and the adapter. tokens = M where there is no noise.
template <class Numbers> __device__ __forceinline__ void forward_folded(const NoisyLinearParams &p) {
    using T = typename Numbers::T;
    PACE_SHARED(unsigned char, shared);
    float *z = reinterpret_cast<float *>(shared + FOLDED_STAGES * 3 * TILE_BYTES); // of the tile's columns
    const u32 column = blockIdx.x % p.tile_columns * TILE, rest = blockIdx.x / p.tile_columns;
    const u32 tile_rows = (p.tokens - 1) / TILE + 1;
    const u32 sample = rest / tile_rows, row = rest % tile_rows * TILE;
    const u32 first = sample * p.tokens, inner = p.segments[0].inner;
    const T *x = static_cast<const T *>(p.segments[0].left) +
                 static_cast<u64>(first >= p.wrap ? first - p.wrap : first) * inner;
    const Operand<T> left = {x, p.tokens, inner, inner, NO_WRAP, p.segments[0].aligned != 0u};

    fill_noise<PRODUCT_THREADS, TILE / 4>(z, TILE, p.noise, key_of(p.noise), sample, 1, p.tokens, column, p.channels, p.z_aligned != 0u);
    __syncthreads();
    float own[4]; // z of the weight rows of this thread's right fragments
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        own[i] = z[warp_column() + 8 * i + lane() / 4];
    }
    Accumulators c = {};
    pipeline<FOLDED_STAGES>(
        shared, 3 * TILE_BYTES, (inner - 1) / INNER<T> + 1,
        [&](unsigned char *stage, u32 tile) {
            copy_tile<T, false>(stage, left, row, tile * INNER<T>);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                copy_tile<T, false>(stage + (1 + i) * TILE_BYTES,
                                    Operand<T>{static_cast<const T *>(p.segments[i].right), p.channels, inner, inner,
                                               NO_WRAP, p.segments[i].aligned != 0u},
                                    column, tile * INNER<T>);
            }
        },
        [&](const unsigned char *stage, u32) {
#pragma unroll
            for (u32 step = 0; step < STEPS; ++step) {
                typename Numbers::Right b[4];
#pragma unroll
                for (u32 pair = 0; pair < 2; ++pair) {
                    u32 base[4], delta[4];
                    load_right<T, false>(base, stage + TILE_BYTES, warp_column() + 16 * pair, step);
                    load_right<T, false>(delta, stage + 2 * TILE_BYTES, warp_column() + 16 * pair, step);
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        b[2 * pair + i] =
                            Numbers::right(folded<T>(base[2 * i], delta[2 * i], own[2 * pair + i]),
                                           folded<T>(base[2 * i + 1], delta[2 * i + 1], own[2 * pair + i]));
                    }
                }
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {
                    u32 bits[4];
                    load_left<T, false>(bits, stage, warp_row() + 16 * part, step);
                    Numbers::multiply(c[part], Numbers::left(bits), b);
                }
            }
        });
    const ColumnBias<T> base_bias(p.base_bias, column, p.channels), delta_bias(p.delta_bias, column, p.channels);
    each_accumulator([&](u32 part, u32 j, u32 i, u32, u32 k) {
        c[part][j][i] += fmaf(z[k], delta_bias.value[j][i % 2], base_bias.value[j][i % 2]);
    });
    store_tile<T>(c, shared, static_cast<T *>(p.y) + static_cast<u64>(first) * p.channels, row, column, p.tokens,
                  p.channels, p.aligned != 0u);
}

// z of the token rows of this thread's left fragments; the inner dimension is the channels.
template <class T> struct ScaleRows {
    static constexpr bool POSSIBLE = true;
    static constexpr u32 STRIDE = INNER<T> + 8; // keeps the rows of a fragment in different banks
    bool on;
    const float *z;
    const u32 (&places)[4][2];
    __device__ __forceinline__ float operator()(u32 part, u32 half, u32 inner) const {
        return z[places[part][half] * STRIDE + inner];
    }
};

template <class Numbers> __device__ __forceinline__ void input_gradient(const NoisyLinearInputParams &p) {
    using T = typename Numbers::T;
    constexpr u32 STRIDE = ScaleRows<T>::STRIDE;
    PACE_SHARED(unsigned char, shared);
    float *z = reinterpret_cast<float *>(shared + BACKWARD_STAGES * 2 * TILE_BYTES);
    const u32 column = blockIdx.x % p.tile_columns * TILE, row = blockIdx.x / p.tile_columns * TILE;
    const u32 last = min(row + TILE, p.rows) - 1;
    const noise::Key key = key_of(p.noise);
    // Segment and inner index of a tile.
    struct Place {
        u32 segment, inner;
    };
    const auto place_of = [&](u32 tile) {
        u32 segment = 0;
        for (; segment + 1 < p.count; ++segment) {
            const u32 tiles = (p.segments[segment].inner - 1) / INNER<T> + 1;
            if (tile < tiles) {
                break;
            }
            tile -= tiles;
        }
        return Place{segment, tile * INNER<T>};
    };
    u32 tiles = 0;
    for (u32 i = 0; i < p.count; ++i) {
        tiles += (p.segments[i].inner - 1) / INNER<T> + 1;
    }
    const auto is_scaled = [&](const Segment &segment) { return segment.adapter != 0u && p.noise.kind != NOISE_OFF; };
    // z of a tile goes to one of two buffers: one is filled while the other is in use.
    const u32 z_size = TILE * STRIDE;
    const auto fill = [&](u32 tile) {
        const Place place = place_of(tile);
        const Segment &segment = p.segments[place.segment];
        if (is_scaled(segment)) {
            const NoiseRows rows(p.noise, p.tokens, segment.first_row + row);
            fill_noise<PRODUCT_THREADS, INNER<T> / 4>(z + tile % 2 * z_size, STRIDE, p.noise, key, rows.first,
                                     rows.place(segment.first_row + last) + 1, p.tokens, place.inner, p.channels,
                                     p.z_aligned != 0u);
        }
    };
    Accumulators c = {};
    fill(0);
    pipeline<BACKWARD_STAGES>(
        shared, 2 * TILE_BYTES, tiles,
        [&](unsigned char *stage, u32 tile) {
            const Place place = place_of(tile);
            const Segment &segment = p.segments[place.segment];
            const bool aligned = segment.aligned != 0u;
            copy_tile<T, false>(stage,
                                Operand<T>{static_cast<const T *>(segment.left), p.rows, segment.inner, segment.inner,
                                           NO_WRAP, aligned},
                                row, place.inner);
            copy_tile<T, true>(stage + TILE_BYTES,
                               Operand<T>{static_cast<const T *>(segment.right), segment.inner, p.columns, p.columns,
                                          NO_WRAP, aligned},
                               column, place.inner);
        },
        [&](const unsigned char *stage, u32 tile) {
            if (tile + 1 < tiles) {
                fill(tile + 1);
            }
            const Segment &segment = p.segments[place_of(tile).segment];
            const NoiseRows rows(p.noise, p.tokens, segment.first_row + row);
            u32 places[4][2];
#pragma unroll
            for (u32 part = 0; part < 4; ++part) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const u32 r = row + warp_row() + 16 * part + 8 * half + lane() / 4;
                    places[part][half] = rows.place(segment.first_row + min(r, last));
                }
            }
            multiply_tile<Numbers, false, true>(
                c, stage, stage + TILE_BYTES, ScaleRows<T>{is_scaled(segment), z + tile % 2 * z_size, places}, NoMore());
        });
    each_accumulator([&](u32 part, u32 j, u32 i, u32, u32) { c[part][j][i] *= p.scale; });
    store_tile<T>(c, shared, static_cast<T *>(p.dx), row, column, p.rows, p.columns, p.aligned != 0u);
}

// z of the channels of this thread's left fragments; the inner dimension is the tokens.
struct ScaleColumns {
    static constexpr bool POSSIBLE = true;
    bool on;
    const float *z;
    const u32 *places; // of the tile's tokens
    __device__ __forceinline__ float operator()(u32 part, u32 half, u32 inner) const {
        return z[places[inner] * TILE + warp_row() + 16 * part + 8 * half + lane() / 4];
    }
};

template <class Numbers> __device__ __forceinline__ void weight_gradient(const NoisyLinearWeightParams &p) {
    using T = typename Numbers::T;
    PACE_SHARED(unsigned char, shared);
    float *z = reinterpret_cast<float *>(shared + BACKWARD_STAGES * 2 * TILE_BYTES);
    constexpr u32 Z_SIZE = INNER<T> * TILE;
    u32 *places = reinterpret_cast<u32 *>(z + 2 * Z_SIZE);
    const u32 column = blockIdx.x % p.tile_columns * TILE, rest = blockIdx.x / p.tile_columns;
    const u32 channel = rest % p.tile_rows * TILE, part = rest / p.tile_rows;
    const u32 first = part * p.part, end = min(first + p.part, p.rows);
    const u32 tiles = (end - first - 1) / INNER<T> + 1;
    const bool noisy = p.noise.kind != NOISE_OFF;
    const noise::Key key = key_of(p.noise);
    const Operand<T> left = {static_cast<const T *>(p.g), end, p.channels, p.channels, NO_WRAP, p.left_aligned != 0u};
    const Operand<T> right = {static_cast<const T *>(p.x), end, p.columns, p.columns, p.wrap, p.right_aligned != 0u};
    // z of a tile goes to one of two buffers: one is filled while the other is in use.
    const auto fill = [&](u32 tile) {
        if (noisy) {
            const u32 row = first + tile * INNER<T>, last = min(row + INNER<T>, end) - 1;
            const NoiseRows rows(p.noise, p.tokens, row);
            fill_noise<PRODUCT_THREADS, TILE / 4>(z + tile % 2 * Z_SIZE, TILE, p.noise, key, rows.first, rows.place(last) + 1, p.tokens,
                                 channel, p.channels, p.z_aligned != 0u);
            if (threadIdx.x < INNER<T>) {
                places[tile % 2 * INNER<T> + threadIdx.x] = rows.place(min(row + threadIdx.x, last));
            }
        }
    };
    // db is one more column: e^T * (1, ..., 1).
    const bool sums_up = p.bias != nullptr && column == 0 && warp_column() == 0;
    float sums[4][1][4] = {};
    Accumulators c = {};
    fill(0);
    pipeline<BACKWARD_STAGES>(
        shared, 2 * TILE_BYTES, tiles,
        [&](unsigned char *stage, u32 tile) {
            copy_tile<T, true>(stage, left, channel, first + tile * INNER<T>);
            copy_tile<T, true>(stage + TILE_BYTES, right, column, first + tile * INNER<T>);
        },
        [&](const unsigned char *stage, u32 tile) {
            if (tile + 1 < tiles) {
                fill(tile + 1);
            }
            multiply_tile<Numbers, true, true>(
                c, stage, stage + TILE_BYTES,
                ScaleColumns{noisy, z + tile % 2 * Z_SIZE, places + tile % 2 * INNER<T>},
                [&](u32 i, u32, const typename Numbers::Left &a) {
                    if (sums_up) {
                        const typename Numbers::Right ones[1] = {Numbers::ones()};
                        Numbers::multiply(sums[i], a, ones);
                    }
                });
        });
    if (sums_up && lane() % 4 == 0) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 n = channel + warp_row() + 16 * i + 8 * half + lane() / 4;
                if (n < p.channels) {
                    const float sum = sums[i][0][2 * half];
                    if (p.partial != 0u) {
                        store(static_cast<float *>(p.bias) + static_cast<u64>(part) * p.channels + n, sum);
                    } else {
                        store(static_cast<T *>(p.bias) + n, from_float<T>(sum));
                    }
                }
            }
        }
    }
    if (p.partial != 0u) {
        float *out = static_cast<float *>(p.weight) + static_cast<u64>(part) * p.channels * p.columns;
        store_tile<float>(c, shared, out, channel, column, p.channels, p.columns, p.aligned != 0u);
    } else {
        store_tile<T>(c, shared, static_cast<T *>(p.weight), channel, column, p.channels, p.columns, p.aligned != 0u);
    }
}

} // namespace sm80
} // namespace pace

PACE_KERNEL(noisy_linear_one_f32, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::Float32, false>(p); }
PACE_KERNEL(noisy_linear_one_tf32, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::Tf32, false>(p); }
PACE_KERNEL(noisy_linear_one_f16, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::SixteenBit<pace::f16>, false>(p); }
PACE_KERNEL(noisy_linear_one_bf16, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::SixteenBit<pace::bf16>, false>(p); }
PACE_KERNEL(noisy_linear_two_f32, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::Float32, true>(p); }
PACE_KERNEL(noisy_linear_two_tf32, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::Tf32, true>(p); }
PACE_KERNEL(noisy_linear_two_f16, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::SixteenBit<pace::f16>, true>(p); }
PACE_KERNEL(noisy_linear_two_bf16, pace::NoisyLinearParams, 256) { pace::sm80::forward<pace::sm80::SixteenBit<pace::bf16>, true>(p); }
PACE_KERNEL(noisy_linear_folded_f32, pace::NoisyLinearParams, 256) { pace::sm80::forward_folded<pace::sm80::Float32>(p); }
PACE_KERNEL(noisy_linear_folded_tf32, pace::NoisyLinearParams, 256) { pace::sm80::forward_folded<pace::sm80::Tf32>(p); }
PACE_KERNEL(noisy_linear_folded_f16, pace::NoisyLinearParams, 256) { pace::sm80::forward_folded<pace::sm80::SixteenBit<pace::f16>>(p); }
PACE_KERNEL(noisy_linear_folded_bf16, pace::NoisyLinearParams, 256) { pace::sm80::forward_folded<pace::sm80::SixteenBit<pace::bf16>>(p); }
PACE_KERNEL(noisy_linear_input_f32, pace::NoisyLinearInputParams, 256) { pace::sm80::input_gradient<pace::sm80::Float32>(p); }
PACE_KERNEL(noisy_linear_input_tf32, pace::NoisyLinearInputParams, 256) { pace::sm80::input_gradient<pace::sm80::Tf32>(p); }
PACE_KERNEL(noisy_linear_input_f16, pace::NoisyLinearInputParams, 256) { pace::sm80::input_gradient<pace::sm80::SixteenBit<pace::f16>>(p); }
PACE_KERNEL(noisy_linear_input_bf16, pace::NoisyLinearInputParams, 256) { pace::sm80::input_gradient<pace::sm80::SixteenBit<pace::bf16>>(p); }
PACE_KERNEL(noisy_linear_weight_f32, pace::NoisyLinearWeightParams, 256) { pace::sm80::weight_gradient<pace::sm80::Float32>(p); }
PACE_KERNEL(noisy_linear_weight_tf32, pace::NoisyLinearWeightParams, 256) { pace::sm80::weight_gradient<pace::sm80::Tf32>(p); }
PACE_KERNEL(noisy_linear_weight_f16, pace::NoisyLinearWeightParams, 256) { pace::sm80::weight_gradient<pace::sm80::SixteenBit<pace::f16>>(p); }
PACE_KERNEL(noisy_linear_weight_bf16, pace::NoisyLinearWeightParams, 256) { pace::sm80::weight_gradient<pace::sm80::SixteenBit<pace::bf16>>(p); }
