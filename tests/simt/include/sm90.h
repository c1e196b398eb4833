// Host twins of the device part of kernels/sm90/ptx.cuh, function by function.
//
// What is asynchronous there is so here: copies land, stores read and wgmmas execute some time between their issue and the wait
// for them, in the order that Schedule (src/machine.rs) makes. The work is done by src/engine.rs and what it uses.

#ifndef PACE_SIMT_SM90_H
#define PACE_SIMT_SM90_H

#include "mma.h"

extern "C" {
unsigned pace_simt_cluster_rank();
bool pace_simt_elect(const char *file, unsigned line);
// The host address of bytes of the block's shared memory, which are checked; written ones have to be fenced before the async
// proxy reads them.
void *pace_simt_shared_at(const char *file, unsigned line, unsigned address, unsigned bytes, bool is_write);
void pace_simt_named_barrier(const char *file, unsigned line, unsigned id, unsigned threads);
void pace_simt_cluster_barrier(const char *file, unsigned line);
void pace_simt_barrier_init(const char *file, unsigned line, unsigned barrier, unsigned arrivals);
void pace_simt_fence_barriers();
void pace_simt_barrier_arrive(const char *file, unsigned line, unsigned barrier, unsigned bytes);
void pace_simt_barrier_arrive_at(const char *file, unsigned line, unsigned barrier, unsigned rank);
void pace_simt_barrier_wait(const char *file, unsigned line, unsigned barrier, unsigned parity);
void pace_simt_fence_async_proxy();
void pace_simt_copy_box(const char *file, unsigned line, unsigned ranks, unsigned to, const void *map, unsigned barrier,
                        const int *corner);
void pace_simt_store_box(const char *file, unsigned line, const void *map, unsigned from, const int *corner);
void pace_simt_commit_stores();
void pace_simt_wait_for_stores(unsigned pending, bool reads_only);
void pace_simt_prefetch_map(const char *file, unsigned line, const void *map);
void pace_simt_set_registers(const char *file, unsigned line, unsigned count);
void pace_simt_wgmma_fence(const char *file, unsigned line);
void pace_simt_wgmma_commit(const char *file, unsigned line);
void pace_simt_wgmma_wait(const char *file, unsigned line, unsigned pending);
void pace_simt_wgmma(const char *file, unsigned line, const void *operands);
}

#define PACE_CLUSTER_KERNEL(name, Params, CLUSTER, ...) PACE_SIMT_KERNEL(name, Params, CLUSTER)

// The place of the call.
#define PACE_SIMT_PLACE const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()

namespace pace::sm90 {

namespace simt {

// stmatrix of COUNT matrices: lane 8 i + j brings the address of row j of matrix i; lane t holds of each matrix the two
// elements 2 (t % 4) and the next of row t / 4, or with .trans of column t / 4.
template <u32 COUNT> struct StoreMatrices {
    void *row;
    u32 matrices[COUNT];

    static char *row_of(void *const *lanes, u32 matrix, u32 row) {
        return static_cast<char *>(static_cast<StoreMatrices *>(lanes[8 * matrix + row])->row);
    }

    static void together(void *const *lanes) {
        for (u32 t = 0; t < 32; ++t) {
            for (u32 matrix = 0; matrix < COUNT; ++matrix) {
                const u32 &from = static_cast<StoreMatrices *>(lanes[t])->matrices[matrix];
                std::memcpy(row_of(lanes, matrix, t / 4) + 4 * (t % 4), &from, 4);
            }
        }
    }

    static void together_transposed(void *const *lanes) {
        for (u32 t = 0; t < 32; ++t) {
            for (u32 matrix = 0; matrix < COUNT; ++matrix) {
                uint16_t pair[2];
                std::memcpy(pair, &static_cast<StoreMatrices *>(lanes[t])->matrices[matrix], 4);
                for (u32 i = 0; i < 2; ++i) {
                    std::memcpy(row_of(lanes, matrix, 2 * (t % 4) + i) + 2 * (t / 4), &pair[i], 2);
                }
            }
        }
    }
};

// `Operands` of src/wgmma.rs: what one thread brings.
struct Operands {
    float *d;
    const u32 *a; // null: in shared memory
    u64 a_tile, b_tile;
    u32 n, accumulate, is_a_transposed, is_b_transposed, is_bf16;
};

template <class T> constexpr u32 is_bf16();
template <> constexpr u32 is_bf16<f16>() { return 0; }
template <> constexpr u32 is_bf16<bf16>() { return 1; }

} // namespace simt

// ---- places

inline u32 shared_base() { return 1024; }
inline u32 cluster_rank() { return pace_simt_cluster_rank(); }
inline u32 uniform(u32 value, PACE_SIMT_PLACE) { return pace::simt::exchange(file, line, 0xffffffffu, 0, value); }
inline bool elect(PACE_SIMT_PLACE) { return pace_simt_elect(file, line); }

// ---- registers

template <u32 COUNT> void grow_registers(PACE_SIMT_PLACE) { pace_simt_set_registers(file, line, COUNT); }
template <u32 COUNT> void shrink_registers(PACE_SIMT_PLACE) { pace_simt_set_registers(file, line, COUNT); }
template <u32 COUNT> void keep(float (&)[COUNT]) {}
template <u32 COUNT> void keep(u32 (&)[COUNT]) {}

// ---- shared memory, through the generic proxy

inline float load_shared(u32 address, PACE_SIMT_PLACE) {
    return *static_cast<const float *>(pace_simt_shared_at(file, line, address, 4, false));
}

inline u32 load_shared_word(u32 address, PACE_SIMT_PLACE) {
    return *static_cast<const u32 *>(pace_simt_shared_at(file, line, address, 4, false));
}

inline Pair load_shared_pair(u32 address, PACE_SIMT_PLACE) {
    return *static_cast<const Pair *>(pace_simt_shared_at(file, line, address, 8, false));
}

inline Four load_shared_four(u32 address, PACE_SIMT_PLACE) {
    return *static_cast<const Four *>(pace_simt_shared_at(file, line, address, 16, false));
}

inline void store_shared(u32 address, float value, PACE_SIMT_PLACE) {
    *static_cast<float *>(pace_simt_shared_at(file, line, address, 4, true)) = value;
}

inline void store_shared_word(u32 address, u32 value, PACE_SIMT_PLACE) {
    *static_cast<u32 *>(pace_simt_shared_at(file, line, address, 4, true)) = value;
}

inline void store_shared_four(u32 address, const Four &value, PACE_SIMT_PLACE) {
    *static_cast<Four *>(pace_simt_shared_at(file, line, address, 16, true)) = value;
}

template <class T> void store_shared_element(u32 address, T value, PACE_SIMT_PLACE) {
    static_assert(sizeof(T) == 2, "a 16-bit type");
    *static_cast<T *>(pace_simt_shared_at(file, line, address, 2, true)) = value;
}

template <bool TRANSPOSED> void ldmatrix(u32 (&result)[4], u32 row, PACE_SIMT_PLACE) {
    using pace::simt::LoadMatrices;
    LoadMatrices operands = {pace_simt_shared_at(file, line, row, 16, false), {}};
    pace_simt_collective(file, line, TRANSPOSED ? LoadMatrices::together_transposed : LoadMatrices::together, &operands);
    std::memcpy(result, operands.result, sizeof result);
}

template <bool TRANSPOSED, u32 COUNT> void stmatrix(u32 row, const u32 (&matrices)[COUNT], PACE_SIMT_PLACE) {
    static_assert(COUNT == 2 || COUNT == 4, "stmatrix has .x2 and .x4");
    using Store = simt::StoreMatrices<COUNT>;
    Store operands = {};
    if (pace::simt::lane() < 8 * COUNT) {
        operands.row = pace_simt_shared_at(file, line, row, 16, true);
    }
    std::memcpy(operands.matrices, matrices, sizeof matrices);
    pace_simt_collective(file, line, TRANSPOSED ? Store::together_transposed : Store::together, &operands);
}

// ---- barriers

inline void named_barrier(u32 id, u32 threads, PACE_SIMT_PLACE) { pace_simt_named_barrier(file, line, id, threads); }
inline void cluster_barrier(PACE_SIMT_PLACE) { pace_simt_cluster_barrier(file, line); }
inline void barrier_init(u32 barrier, u32 arrivals, PACE_SIMT_PLACE) {
    pace_simt_barrier_init(file, line, barrier, arrivals);
}
inline void fence_barriers() { pace_simt_fence_barriers(); }
inline void barrier_arrive(u32 barrier, PACE_SIMT_PLACE) { pace_simt_barrier_arrive(file, line, barrier, 0); }
inline void barrier_arrive_and_expect(u32 barrier, u32 bytes, PACE_SIMT_PLACE) {
    pace_simt_barrier_arrive(file, line, barrier, bytes);
}
inline void barrier_arrive_at(u32 barrier, u32 rank, PACE_SIMT_PLACE) {
    pace_simt_barrier_arrive_at(file, line, barrier, rank);
}
inline void barrier_wait(u32 barrier, u32 parity, PACE_SIMT_PLACE) {
    pace_simt_barrier_wait(file, line, barrier, parity);
}

// ---- the async proxy

inline void fence_async_proxy() { pace_simt_fence_async_proxy(); }

inline void copy_box(u32 to, const TensorMap &map, u32 barrier, int x, int y, int z, PACE_SIMT_PLACE) {
    const int corner[3] = {x, y, z};
    pace_simt_copy_box(file, line, 0, to, &map, barrier, corner);
}

inline void copy_box_to(u32 ranks, u32 to, const TensorMap &map, u32 barrier, int x, int y, int z, PACE_SIMT_PLACE) {
    const int corner[3] = {x, y, z};
    // The instruction takes 16 bits; to nobody would be to its own block here.
    pace_simt_copy_box(file, line, ranks == 0 ? 0x10000u : ranks, to, &map, barrier, corner);
}

inline void store_box(const TensorMap &map, u32 from, int x, int y, int z, PACE_SIMT_PLACE) {
    const int corner[3] = {x, y, z};
    pace_simt_store_box(file, line, &map, from, corner);
}

inline void commit_stores() { pace_simt_commit_stores(); }
template <u32 PENDING> void wait_for_store_reads() { pace_simt_wait_for_stores(PENDING, true); }
inline void wait_for_stores() { pace_simt_wait_for_stores(0, false); }
inline void prefetch_map(const TensorMap &map, PACE_SIMT_PLACE) { pace_simt_prefetch_map(file, line, &map); }

// ---- wgmma

inline void wgmma_fence(PACE_SIMT_PLACE) { pace_simt_wgmma_fence(file, line); }
inline void wgmma_commit(PACE_SIMT_PLACE) { pace_simt_wgmma_commit(file, line); }
template <u32 PENDING> void wgmma_wait(PACE_SIMT_PLACE) { pace_simt_wgmma_wait(file, line, PENDING); }

template <class T, u32 N, bool TRANS_A = false, bool TRANS_B = false>
void wgmma(float (&d)[N / 2], u64 a, u64 b, bool accumulate, PACE_SIMT_PLACE) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has no such N");
    const simt::Operands operands = {d, nullptr, a, b, N, accumulate, TRANS_A, TRANS_B, simt::is_bf16<T>()};
    pace_simt_wgmma(file, line, &operands);
}

template <class T, u32 N, bool TRANS_B = false>
void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate, PACE_SIMT_PLACE) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has no such N");
    const simt::Operands operands = {d, a, 0, b, N, accumulate, false, TRANS_B, simt::is_bf16<T>()};
    pace_simt_wgmma(file, line, &operands);
}

// ---- mma.sync

template <class T> void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, PACE_SIMT_PLACE) {
    pace::simt::Fragments<1> fragments = {{a[0], a[1], a[2], a[3]}, {{b0, b1}}, {{c[0], c[1], c[2], c[3]}}};
    pace_simt_collective(file, line, pace::simt::Atom16<T>::template together<1>, &fragments);
    std::memcpy(c, fragments.c, sizeof c);
}

} // namespace pace::sm90

#undef PACE_SIMT_PLACE

#endif // PACE_SIMT_SM90_H
