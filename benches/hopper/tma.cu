// Probe 2: what TMA does at the ragged edges of a [samples, 197, K] tensor.
//
// Loads: bytes that the barrier counts, zeros outside, the swizzle, nothing beyond the box. Stores: rows beyond 197 and
// columns beyond K are clipped.

#include "probe.cuh"

namespace {

constexpr u32 BARRIER_AT = 0, TILE_AT = 1024, GUARD = 1024;

struct Loaded {
    u32 complete; // 1: the phase completed with the bytes that were expected
    u32 missing;  // 0, or the bytes that had to be added until it did
};

// Loads one box of `bytes`; dumps it and GUARD bytes behind it.
__global__ void __launch_bounds__(128, 1)
    load_box(const __grid_constant__ Map map, int c0, int c1, int c2, u32 bytes, u8 *out, Loaded *loaded) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = aligned_base(shared), barrier = base + BARRIER_AT;
    for (u32 i = threadIdx.x; i < bytes + GUARD; i += 128)
        shared[TILE_AT + i] = 0xa5;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
    }
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrive_expect(barrier, bytes);
        tma_load(base + TILE_AT, &map, barrier, c0, c1, c2);
        u64 begin = nanoseconds();
        bool done = false;
        while (!(done = try_wait(barrier, 0)) && nanoseconds() - begin < 20'000'000) {
        }
        loaded->complete = done;
        u32 missing = 0;
        while (!done && missing < bytes) {
            complete_bytes(barrier, 16);
            missing += 16;
            begin = nanoseconds();
            while (!(done = try_wait(barrier, 0)) && nanoseconds() - begin < 10'000) {
            }
        }
        loaded->missing = missing;
    }
    __syncthreads();
    try_wait(barrier, 0); // by every thread that reads what the copy wrote
    for (u32 i = threadIdx.x; i < bytes + GUARD; i += 128)
        out[i] = shared[TILE_AT + i];
}

// Stores one box whose shared memory image is `image`.
__global__ void __launch_bounds__(128, 1)
    store_box(const __grid_constant__ Map map, int c0, int c1, int c2, u32 bytes, const u8 *image) {
    extern __shared__ __align__(1024) u8 shared[];
    for (u32 i = threadIdx.x; i < bytes; i += 128)
        shared[TILE_AT + i] = image[i];
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(&map, aligned_base(shared) + TILE_AT, c0, c1, c2);
        tma_commit();
        tma_wait_all();
    }
}

constexpr u32 T = 197, SAMPLES = 3;

u16 element(u32 sample, u32 row, u32 k) { return static_cast<u16>(scramble(sample * 1000003 + row * 1009 + k) | 1); }

void load(Results &results, u32 columns, u32 span, u32 rows, int c0, int c1) {
    std::vector<u16> x(static_cast<size_t>(SAMPLES) * T * columns);
    for (u32 s = 0; s < SAMPLES; ++s)
        for (u32 row = 0; row < T; ++row)
            for (u32 k = 0; k < columns; ++k)
                x[(static_cast<size_t>(s) * T + row) * columns + k] = element(s, row, k);
    const Buffer<u16> on_device(x);
    const u32 bytes = rows * span, shared = TILE_AT + bytes + GUARD;
    const Buffer<u8> out(bytes + GUARD);
    const Buffer<Loaded> loaded(1);
    const Map map = tensor_map(on_device.get(), {columns, T, SAMPLES}, {span / 2, rows, 1}, span);
    allow_shared(load_box, shared);
    launch(load_box, 1, 128, shared, 1, map, c0, c1, 1, bytes, out.get(), loaded.get());
    finish();

    const std::vector<u8> image = out.read();
    const Loaded result = loaded.read()[0];
    u32 wrong = 0, not_zero = 0, guard = 0;
    for (u32 row = 0; row < rows; ++row)
        for (u32 byte = 0; byte < span; byte += 2) {
            u16 value;
            std::memcpy(&value, &image[swizzled(span, row, byte)], 2);
            const int t = c1 + static_cast<int>(row);
            const u32 k = static_cast<u32>(c0) + byte / 2;
            if (t < 0 || t >= static_cast<int>(T) || k >= columns)
                not_zero += value != 0;
            else
                wrong += value != element(1, static_cast<u32>(t), k);
        }
    for (u32 i = bytes; i < bytes + GUARD; ++i)
        guard += image[i] != 0xa5;
    const std::string title = text("load box {%u, %u, 1} at {%d, %d, 1} of K %u, %u B rows", span / 2, rows, c0, c1, columns, span);
    results.check(result.complete == 1 && result.missing == 0, title + ": bytes",
                  result.complete ? text("the whole box is counted: %u", bytes)
                                  : text("not complete with %u; %u added (inside the tensor: %u)", bytes, result.missing,
                                         (T - static_cast<u32>(c1 > 0 ? c1 : 0)) * span));
    results.check(wrong == 0 && not_zero == 0 && guard == 0, title + ": data",
                  text("%u wrong, %u outside not zero, %u bytes behind the box written; expected 0, 0, 0", wrong, not_zero, guard));
}

void store(Results &results, u32 columns, u32 span, u32 rows, int c0) {
    constexpr u16 UNTOUCHED = 0x5a5a;
    const Buffer<u16> y(std::vector<u16>(static_cast<size_t>(SAMPLES) * T * columns, UNTOUCHED));
    const u32 bytes = rows * span, shared = TILE_AT + bytes;
    std::vector<u8> tile(bytes);
    for (u32 row = 0; row < rows; ++row)
        for (u32 byte = 0; byte < span; byte += 2) {
            const u16 value = element(7, row, byte / 2);
            std::memcpy(&tile[swizzled(span, row, byte)], &value, 2);
        }
    const Buffer<u8> image(tile);
    const Map map = tensor_map(y.get(), {columns, T, SAMPLES}, {span / 2, rows, 1}, span);
    allow_shared(store_box, shared);
    launch(store_box, 1, 128, shared, 1, map, c0, 0, 1, bytes, image.get());
    finish();

    const std::vector<u16> result = y.read();
    u32 wrong = 0, touched = 0;
    for (u32 s = 0; s < SAMPLES; ++s)
        for (u32 row = 0; row < T; ++row)
            for (u32 k = 0; k < columns; ++k) {
                const u16 value = result[(static_cast<size_t>(s) * T + row) * columns + k];
                const u32 column = k - static_cast<u32>(c0);
                if (s == 1 && k >= static_cast<u32>(c0) && column < span / 2)
                    wrong += value != element(7, row, column);
                else
                    touched += value != UNTOUCHED;
            }
    results.check(wrong == 0 && touched == 0,
                  text("store box {%u, %u, 1} at {%d, 0, 1} of K %u, %u B rows", span / 2, rows, c0, columns, span),
                  text("%u wrong, %u others touched (the next sample's rows too); expected 0, 0", wrong, touched));
}

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("tma");
    open_device(results);
    load(results, 768, 128, 200, 64, 0);
    load(results, 768, 64, 200, 96, 0);
    load(results, 768, 128, 208, 0, 0);
    load(results, 768, 128, 128, 0, 0);   // all inside
    load(results, 768, 128, 64, 0, 192);  // the last 5 rows of a sample
    load(results, 776, 128, 200, 768, 0); // 8 of 64 columns
    load(results, 776, 64, 200, 768, 0);
    load(results, 768, 128, 200, 0, -3);
    store(results, 768, 128, 200, 64);
    store(results, 768, 64, 200, 96);
    store(results, 776, 128, 200, 768);
    return results.status();
}
