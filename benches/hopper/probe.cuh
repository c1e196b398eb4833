// What the probes share: PTX of Hopper (mbarrier, TMA, clusters, ldmatrix, stmatrix), tensor maps, checks and results.
//
// wgmma itself is in wgmma.cuh. Links cudart only: cuTensorMapEncodeTiled comes through cudaGetDriverEntryPointByVersion.

#pragma once

#include <cuda.h> // types and enums of tensor maps; no function of the driver is linked
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// ---------------------------------------------------------------------------------------------------------- device: PTX

// A tensor map as a kernel parameter. The C type asks for 128 bytes of alignment in CUDA 13; the hardware for 64.
struct alignas(64) Map {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ u64 nanoseconds() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
    return time;
}
// All threads of all CTAs of the cluster; works without a cluster too.
__device__ __forceinline__ void cluster_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Threads of one named barrier (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and whether all of them bring `true`.
__device__ __forceinline__ bool named_barrier_all(u32 id, u32 threads, bool mine) {
    u32 all;
    asm volatile("{\n"
                 ".reg .pred mine, all;\n"
                 "setp.ne.u32 mine, %3, 0;\n"
                 "barrier.cta.red.and.pred all, %1, %2, mine;\n"
                 "selp.u32 %0, 1, 0, all;\n"
                 "}"
                 : "=r"(all)
                 : "r"(id), "r"(threads), "r"(static_cast<u32>(mine))
                 : "memory");
    return all != 0;
}
// The address of the dynamic shared memory; swizzled tiles count on its alignment.
__device__ __forceinline__ u32 aligned_base(const u8 *shared) {
    const u32 base = shared_address(shared);
    if (base % 1024 != 0)
        __trap();
    return base;
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, by the thread that made them, before a CTA barrier or a cluster barrier.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Orders generic accesses of shared memory (st, stmatrix) before those of TMA and wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The one arrival of a full barrier, with the bytes that copies will bring.
__device__ __forceinline__ void arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Counts bytes that no copy brought.
__device__ __forceinline__ void complete_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier of the same offset in CTA `rank` of the cluster, the own one included.
__device__ __forceinline__ void arrive_remote(u32 barrier, u32 rank) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}
// Whether the phase of this parity has completed; may suspend the thread for a while.
__device__ __forceinline__ bool try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

// Who was the first to wait too long, and for what. In global memory, zeroed before the launch.
struct Stuck {
    u32 stop; // not 0: everybody leaves
    u32 block, role, barrier, stage, parity, step;
};
enum Role : u32 { PRODUCER = 1, CONSUMER = 2 };
enum Barrier : u32 { FULL = 1, EMPTY = 2 };

// Waits for a phase, but not for ever: false if this or another thread gave up.
__device__ __forceinline__ bool wait_slowly(u32 barrier, u32 parity, Stuck *stuck, u32 role, u32 kind, u32 stage, u32 step) {
    constexpr u64 LIMIT = 2'000'000'000; // ns
    const u64 begin = nanoseconds();
    while (!try_wait(barrier, parity)) {
        if (*reinterpret_cast<volatile u32 *>(&stuck->stop) != 0)
            return false;
        if (nanoseconds() - begin > LIMIT) {
            if (atomicCAS(&stuck->stop, 0u, 1u) == 0) {
                stuck->block = blockIdx.x;
                stuck->role = role;
                stuck->barrier = kind;
                stuck->stage = stage;
                stuck->parity = parity;
                stuck->step = step;
                __threadfence_system();
            }
            return false;
        }
    }
    return true;
}
__device__ __forceinline__ bool wait(u32 barrier, u32 parity, Stuck *stuck, u32 role, u32 kind, u32 stage, u32 step) {
    for (u32 i = 0; i < 16; ++i)
        if (try_wait(barrier, parity))
            return true;
    return wait_slowly(barrier, parity, stuck, role, kind, stage, step);
}

__device__ __forceinline__ void tma_load(u32 to, const Map *map, u32 barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
// The same box to the same offset of every CTA in `mask`, each one's barrier of this offset gets the bytes.
__device__ __forceinline__ void tma_multicast(u32 to, const Map *map, u32 barrier, int c0, int c1, int c2, u16 mask) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(mask)
                 : "memory");
}
__device__ __forceinline__ void tma_store(const Map *map, u32 from, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void tma_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void stmatrix_trans(u32 at, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
__device__ __forceinline__ void stmatrix_trans(u32 at, u32 r0, u32 r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(r0), "r"(r1) : "memory");
}

template <class T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<__nv_bfloat16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
template <> __device__ __forceinline__ u32 pack<__half>(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
// W0 + z dW of two bf16, in f32 with one rounding.
__device__ __forceinline__ u32 fold(u32 base, u32 adapter, float z) {
    const float low = fmaf(z, __uint_as_float(adapter << 16), __uint_as_float(base << 16));
    const float high = fmaf(z, __uint_as_float(adapter & 0xffff0000u), __uint_as_float(base & 0xffff0000u));
    return pack<__nv_bfloat16>(low, high);
}

// ------------------------------------------------------------------------------------------------------- host: results

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        const cudaError_t error_ = (call);                                                                             \
        if (error_ != cudaSuccess) {                                                                                   \
            fail_hard("line %d: %s: %s", __LINE__, #call, cudaGetErrorString(error_));                         \
        }                                                                                                              \
    } while (0)

// One probe's results: a line of text for each, and the same as JSON in the file $PROBE_JSON, both flushed at once, so that
// what was found before a crash is kept.
class Results {
    std::string probe_;
    FILE *json_ = nullptr;
    int failed_ = 0;

    void write(const char *verdict, const std::string &name, bool number, double value, const char *unit,
               const std::string &expected) {
        if (number)
            std::printf("%-4s %-11s %-52s %10.2f %-9s expected %s\n", verdict, probe_.c_str(), name.c_str(), value, unit,
                        expected.c_str());
        else
            std::printf("%-4s %-11s %-52s %s\n", verdict, probe_.c_str(), name.c_str(), expected.c_str());
        std::fflush(stdout);
        if (json_) {
            std::fprintf(json_, "{\"probe\":\"%s\",\"case\":\"%s\",\"verdict\":\"%s\"", probe_.c_str(), name.c_str(), verdict);
            if (number)
                std::fprintf(json_, ",\"value\":%.6g,\"unit\":\"%s\"", value, unit);
            std::fprintf(json_, ",\"%s\":\"%s\"}\n", number ? "expected" : "note", expected.c_str());
            std::fflush(json_);
        }
    }

  public:
    explicit Results(const char *probe) : probe_(probe) {
        if (const char *path = std::getenv("PROBE_JSON"))
            json_ = std::fopen(path, "a");
    }
    ~Results() {
        if (json_)
            std::fclose(json_);
    }
    Results(const Results &) = delete;
    Results &operator=(const Results &) = delete;

    // A fact that the design relies on.
    void check(bool holds, const std::string &name, const std::string &note) {
        failed_ += !holds;
        write(holds ? "PASS" : "FAIL", name, false, 0, "", note);
    }
    // A fact that is good to know.
    void note(const std::string &name, const std::string &note) { write("note", name, false, 0, "", note); }
    // A number, and what is expected of it.
    void number(const std::string &name, double value, const char *unit, const std::string &expected) {
        write("num", name, true, value, unit, expected);
    }
    int status() const { return failed_ == 0 ? 0 : 1; }
};

inline Results *&current_results() {
    static Results *results = nullptr;
    return results;
}

[[noreturn]] inline void fail_hard(const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c; ++c)
        if (*c == '"' || *c == '\\' || *c == '\n')
            *c = '\'';
    if (current_results())
        current_results()->check(false, "error", text);
    else
        std::fprintf(stderr, "%s\n", text);
    std::exit(2);
}

inline std::string text(const char *format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

// `--starts`: whether the program starts at all, asked where it was not compiled.
inline void answer_starts(int count, char **arguments) {
    // A probe that is stopped keeps what it has printed.
    std::setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
    if (count > 1 && std::strcmp(arguments[1], "--starts") == 0)
        std::exit(0);
}

// Opens device 0 and says what it is. Ends the process where it is not of compute capability 9.0.
inline cudaDeviceProp open_device(Results &results) {
    current_results() = &results;
    cudaDeviceProp device{};
    CHECK(cudaSetDevice(0));
    CHECK(cudaGetDeviceProperties(&device, 0));
    int driver = 0, runtime = 0;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    results.note("device", text("%s, %d.%d, %d SMs, %zu KiB shared, %d MiB L2, CUDA of the driver %d, of the runtime %d",
                                device.name, device.major, device.minor, device.multiProcessorCount,
                                device.sharedMemPerBlockOptin >> 10, device.l2CacheSize >> 20, driver, runtime));
    if (device.major != 9 || device.minor != 0)
        fail_hard("these probes are for compute capability 9.0");
    return device;
}

// ------------------------------------------------------------------------------------------------------- host: memory

// A buffer on the device.
template <class T> class Buffer {
    T *pointer_ = nullptr;
    size_t count_ = 0;

  public:
    explicit Buffer(size_t count) : count_(count) {
        CHECK(cudaMalloc(&pointer_, count * sizeof(T)));
        CHECK(cudaMemset(pointer_, 0, count * sizeof(T)));
    }
    explicit Buffer(const std::vector<T> &values) : Buffer(values.size()) { write(values); }
    ~Buffer() { cudaFree(pointer_); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    T *get() const { return pointer_; }
    void write(const std::vector<T> &values) {
        CHECK(cudaMemcpy(pointer_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    void zero() { CHECK(cudaMemset(pointer_, 0, count_ * sizeof(T))); }
    std::vector<T> read() const {
        std::vector<T> values(count_);
        CHECK(cudaMemcpy(values.data(), pointer_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
};

inline void finish() {
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
}

// Shared memory beyond 48 KiB has to be asked for.
template <class K> void allow_shared(K *kernel, u32 bytes) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// kernel<<<grid, threads, shared>>>(arguments...) in clusters of `cluster` CTAs.
template <class... P, class... A>
void launch(void (*kernel)(P...), u32 grid, u32 threads, u32 shared, u32 cluster, A &&...arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

// The byte address inside a tile of `span`-byte rows (128 or 64), as TMA writes it and wgmma reads it.
__host__ __device__ constexpr u32 swizzled(u32 span, u32 row, u32 byte) {
    return span == 128 ? row * 128 + (byte ^ ((row & 7) << 4)) : row * 64 + (byte ^ ((row >> 1 & 3) << 4));
}

// A map of a tensor [dims[2], dims[1], dims[0]] of bf16, or of f32, without gaps; `span`: of the swizzle, 0 without one.
inline Map tensor_map(void *base, const u64 (&dims)[3], const u32 (&box)[3], u32 span, bool is_f32 = false) {
    using Encode = CUresult(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                            const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode *encode = nullptr;
    if (!encode) {
        void *entry = nullptr;
        cudaDriverEntryPointQueryResult found{};
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess || !entry)
            fail_hard("the driver has no cuTensorMapEncodeTiled");
        encode = reinterpret_cast<Encode *>(entry);
    }
    const cuuint64_t sizes[3] = {dims[0], dims[1], dims[2]};
    const u64 bytes = is_f32 ? 4 : 2;
    const cuuint64_t strides[2] = {dims[0] * bytes, dims[0] * dims[1] * bytes};
    const cuuint32_t boxes[3] = {box[0], box[1], box[2]};
    const cuuint32_t steps[3] = {1, 1, 1};
    CUtensorMap encoded{};
    const CUresult result =
        encode(&encoded, is_f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, base, sizes, strides,
               boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
               : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                            : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        fail_hard("cuTensorMapEncodeTiled: error %d for box %u x %u x %u", static_cast<int>(result), box[0], box[1], box[2]);
    Map map{};
    static_assert(sizeof map == sizeof encoded);
    std::memcpy(&map, &encoded, sizeof map);
    return map;
}

// Reports a wait that was given up; true if there was none.
inline bool nobody_stuck(Results &results, const Buffer<Stuck> &stuck, const std::string &name) {
    const Stuck s = stuck.read()[0];
    if (s.stop == 0)
        return true;
    results.check(false, name,
                  text("gave up: CTA %u, %s, waited for %s[%u] parity %u at step %u", s.block,
                       s.role == PRODUCER ? "producer" : "consumer", s.barrier == FULL ? "full" : "empty", s.stage,
                       s.parity, s.step));
    return false;
}

// Numbers that look random and are always the same.
__host__ __device__ constexpr u32 scramble(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}
