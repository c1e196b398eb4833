// Probe 1: which numbers in a wgmma descriptor mean what.
//
// One CTA of one warpgroup multiplies one tile, D[64, N] = A[64, 128] B[N, 128]^T, with small integers, so that every order
// of the sums gives the same floats. The tiles' bytes are laid out by the host and copied to shared memory as they are; the
// kernel only makes descriptors and ldmatrix addresses. First the documented numbers; where they fail, others are tried and
// those that work are named. Each layout also has a control, a wrong number that has to give wrong results.

#include "wgmma.cuh"

namespace {

constexpr u32 M = 64, K = 128, STEPS = K / 16;
constexpr u32 B_AT = 16384, OUT_AT = B_AT + 65536, SHARED = OUT_AT + 32768;

enum Form {
    SS,          // A and B K-major in shared memory
    RS,          // A by ldmatrix from a K-major tile, one wgmma at a time
    RS_PIPELINE, // the same, two fragments in turn, one wgmma in flight
    RS_TRANS_A,  // A by ldmatrix.trans from an M-major tile
    RS_TRANS_B,  // B N-major
    SS_TRANS     // A M-major, B N-major
};

// An operand in shared memory: its descriptor without the address, and how k16 step s moves the address.
struct Operand {
    u64 fields;
    u32 per_panel, step, panel;
};

struct Problem {
    Operand a, b;
    u32 span_a; // bytes of a row of A's tile, for ldmatrix
};

__device__ __forceinline__ u64 at_step(const Operand &operand, u32 base, u32 s) {
    const u32 address = base + s / operand.per_panel * operand.panel + s % operand.per_panel * operand.step;
    return operand.fields | (address & 0x3ffff) >> 4;
}

template <class T, int N, int FORM>
__global__ void __launch_bounds__(128, 1)
    multiply(Problem problem, const u8 *a, const u8 *b, float *d, u8 *stored) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = aligned_base(shared), thread = threadIdx.x, lane = thread % 32;
    const u32 warp = __shfl_sync(~0u, thread / 32, 0);
    for (u32 i = thread * 16; i < M * K * 2; i += 128 * 16)
        *reinterpret_cast<uint4 *>(shared + i) = *reinterpret_cast<const uint4 *>(a + i);
    for (u32 i = thread * 16; i < 65536; i += 128 * 16)
        *reinterpret_cast<uint4 *>(shared + B_AT + i) = *reinterpret_cast<const uint4 *>(b + i);
    fence_async();
    __syncthreads();

    float acc[N / 2];
    if constexpr (FORM == SS || FORM == SS_TRANS) {
        constexpr int TRANS = FORM == SS_TRANS;
        wgmma_fence();
#pragma unroll
        for (u32 s = 0; s < STEPS; ++s)
            Wgmma<T, N>::template ss<TRANS, TRANS>(acc, at_step(problem.a, base, s), at_step(problem.b, base + B_AT, s), s);
        wgmma_commit();
        wgmma_wait<0>();
    } else {
        u32 fragment[2][4];
#pragma unroll
        for (u32 s = 0; s < STEPS; ++s) {
            u32(&now)[4] = fragment[FORM == RS_PIPELINE ? s % 2 : 0];
            if constexpr (FORM == RS_PIPELINE)
                wgmma_wait<1>(); // the one that reads `now` has retired
            if constexpr (FORM == RS_TRANS_A) {
                const u32 k = s * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix_trans(now, base + swizzled(128, k, (warp * 2 + lane / 8 % 2) * 16));
            } else {
                const u32 row = warp * 16 + lane % 16, byte = s * 32 + lane / 16 * 16, span = problem.span_a;
                ldmatrix(now, base + byte / span * (M * span) + swizzled(span, row, byte % span));
            }
            pin(now);
            wgmma_fence();
            Wgmma<T, N>::template rs<FORM == RS_TRANS_B>(acc, now, at_step(problem.b, base + B_AT, s), s);
            wgmma_commit();
            if constexpr (FORM != RS_PIPELINE)
                wgmma_wait<0>();
        }
        wgmma_wait<0>();
    }
    pin(acc);

    // Accumulators: d[4 j + 2 h + i] = D[16 w + g + 8 h][8 j + 2 t + i].
    const u32 row = warp * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (u32 j = 0; j < N / 2; ++j)
        d[(row + j / 2 % 2 * 8) * N + j / 4 * 8 + column + j % 2] = acc[j];

    // The epilogue of a product with channels as M: rounded, transposed to [N][64] with 128 B swizzle.
    const u32 out = base + OUT_AT, chunk = (warp * 2 + lane / 8 % 2) * 16;
#pragma unroll
    for (u32 j = 0; j + 8 <= N / 2; j += 8)
        stmatrix_trans(out + swizzled(128, j * 2 + lane % 8 + lane / 16 * 8, chunk), pack<T>(acc[j], acc[j + 1]),
                       pack<T>(acc[j + 2], acc[j + 3]), pack<T>(acc[j + 4], acc[j + 5]), pack<T>(acc[j + 6], acc[j + 7]));
    if constexpr (N / 2 % 8 != 0) {
        constexpr u32 j = N / 2 - 4;
        stmatrix_trans(out + swizzled(128, j * 2 + lane % 8, chunk), pack<T>(acc[j], acc[j + 1]),
                       pack<T>(acc[j + 2], acc[j + 3]));
    }
    __syncthreads();
    for (u32 i = thread * 16; i < N * 128; i += 128 * 16)
        *reinterpret_cast<uint4 *>(stored + i) = *reinterpret_cast<const uint4 *>(shared + OUT_AT + i);
}

template <class T> T number(float value);
template <> __nv_bfloat16 number(float value) { return __float2bfloat16(value); }
template <> __half number(float value) { return __float2half(value); }
template <class T> u16 bits(float value) {
    const T rounded = number<T>(value);
    u16 result;
    std::memcpy(&result, &rounded, 2);
    return result;
}

float a_value(u32 m, u32 k) { return static_cast<float>(static_cast<int>(scramble(m * 1009 + k) % 9) - 4); }
float b_value(u32 n, u32 k) { return static_cast<float>(static_cast<int>(scramble(n * 2003 + k + 777777) % 9) - 4); }

// A tile of `rows` x K, K-major with rows of `span` bytes, panel after panel.
template <class T> std::vector<u8> k_major_tile(u32 rows, u32 span, float (*value)(u32, u32)) {
    std::vector<u8> tile(65536);
    for (u32 row = 0; row < rows; ++row)
        for (u32 k = 0; k < K; ++k) {
            const u16 element = bits<T>(value(row, k));
            std::memcpy(&tile[k * 2 / span * rows * span + swizzled(span, row, k * 2 % span)], &element, 2);
        }
    return tile;
}
// The same matrix MN-major: rows of the tile are k, `span` bytes of m or n wide, panel after panel.
template <class T> std::vector<u8> mn_major_tile(u32 rows, u32 span, float (*value)(u32, u32)) {
    std::vector<u8> tile(65536);
    for (u32 row = 0; row < rows; ++row)
        for (u32 k = 0; k < K; ++k) {
            const u16 element = bits<T>(value(row, k));
            std::memcpy(&tile[row * 2 / span * K * span + swizzled(span, k, row * 2 % span)], &element, 2);
        }
    return tile;
}

u32 mode(u32 span) { return span == 128 ? 1 : 2; }

Operand k_major_operand(u32 rows, u32 span, u32 leading = 16) {
    return {descriptor_of(mode(span), leading / 16, span * 8 / 16), span / 32, 32, rows * span};
}
Operand mn_major_operand(u32 span) {
    return {descriptor_of(mode(span), K * span / 16, span * 8 / 16), STEPS, 16 * span, 0};
}
Operand with_stride(Operand operand, u32 stride) {
    operand.fields = (operand.fields & ~(0x3fffull << 32)) | static_cast<u64>(stride / 16) << 32;
    return operand;
}
Operand with_leading(Operand operand, u32 leading) {
    operand.fields = (operand.fields & ~(0x3fffull << 16)) | static_cast<u64>(leading / 16) << 16;
    return operand;
}

class Tiles {
    Buffer<u8> a_{65536}, b_{65536}, stored_{32768};
    Buffer<float> d_{M * 256};

  public:
    void write(const std::vector<u8> &a, const std::vector<u8> &b) {
        a_.write(a);
        b_.write(b);
    }
    // Runs one problem; counts wrong numbers among the accumulators and in what stmatrix has stored.
    template <class T, int N, int FORM> void run(const Problem &problem, u32 &wrong, u32 &wrong_stored) {
        d_.zero();
        stored_.zero();
        allow_shared(multiply<T, N, FORM>, SHARED);
        launch(multiply<T, N, FORM>, 1, 128, SHARED, 1, problem, a_.get(), b_.get(), d_.get(), stored_.get());
        finish();
        const std::vector<float> d = d_.read();
        const std::vector<u8> stored = stored_.read();
        static std::vector<float> reference; // [64][256]
        if (reference.empty()) {
            reference.resize(M * 256);
            for (u32 m = 0; m < M; ++m)
                for (u32 n = 0; n < 256; ++n)
                    for (u32 k = 0; k < K; ++k)
                        reference[m * 256 + n] += a_value(m, k) * b_value(n, k);
        }
        wrong = wrong_stored = 0;
        for (u32 m = 0; m < M; ++m)
            for (u32 n = 0; n < static_cast<u32>(N); ++n) {
                const float right = reference[m * 256 + n];
                wrong += d[m * N + n] != right;
                u16 element;
                std::memcpy(&element, &stored[swizzled(128, n, m * 2)], 2);
                wrong_stored += (element == 0x8000 ? 0 : element) != bits<T>(right);
            }
    }
};

std::string numbers(const Operand &operand) {
    return text("leading %llu, stride %llu, k16 step %u", (operand.fields >> 16 & 0x3fff) * 16,
                (operand.fields >> 32 & 0x3fff) * 16, operand.step);
}

enum class Pass { DOCUMENTED, OTHERS };

// One form, type and N: the documented numbers; in the second pass a control, or others where the documented ones fail.
template <class T, int N, int FORM>
void probe(Results &results, Tiles &tiles, Pass pass, const char *name, u32 span_a, u32 span_b) {
    constexpr bool A_MN = FORM == SS_TRANS || FORM == RS_TRANS_A, B_MN = FORM == SS_TRANS || FORM == RS_TRANS_B;
    tiles.write(A_MN ? mn_major_tile<T>(M, span_a, a_value) : k_major_tile<T>(M, span_a, a_value),
                B_MN ? mn_major_tile<T>(N, span_b, b_value) : k_major_tile<T>(N, span_b, b_value));
    Problem problem{};
    problem.a = A_MN ? mn_major_operand(span_a) : k_major_operand(M, span_a);
    problem.b = B_MN ? mn_major_operand(span_b) : k_major_operand(N, span_b);
    problem.span_a = span_a;
    const std::string title =
        text("%s n%d %s, A %u B, B %u B", name, N, sizeof(T) == 2 && bits<T>(1.0f) == 0x3f80 ? "bf16" : "f16", span_a, span_b);
    u32 wrong = 0, wrong_stored = 0;
    tiles.run<T, N, FORM>(problem, wrong, wrong_stored);
    if (pass == Pass::DOCUMENTED) {
        results.check(wrong == 0, title,
                      wrong == 0 ? "B: " + numbers(problem.b)
                                 : text("%u of %u wrong with %s", wrong, M * N, numbers(problem.b).c_str()));
        if (wrong == 0 && wrong_stored != 0)
            results.check(false, title + ", stmatrix", text("%u wrong", wrong_stored));
        return;
    }
    if (wrong == 0) {
        // The control: a stride of half the groups has to go wrong, or the test sees nothing.
        Problem other = problem;
        other.b = with_stride(problem.b, span_b * 4);
        tiles.run<T, N, FORM>(other, wrong, wrong_stored);
        if (wrong == 0)
            results.check(false, title + ", control", "right with a wrong stride: the test is blind");
        return;
    }
    // Others: everything that stays within the tile's 64 KiB.
    u32 found = 0;
    for (const u32 stride : {128u, 256u, 512u, 1024u, 2048u, K * span_b})
        for (const u32 leading : {16u, 128u, 256u, 512u, 1024u, 2048u, K * span_b, N * span_b})
            for (const u32 step : {32u, 256u, 512u, 1024u, 2048u}) {
                Problem other = problem;
                other.b = with_leading(with_stride(problem.b, stride), leading);
                other.b.step = step;
                const u32 groups = B_MN ? 2 : N / 8, panels = B_MN ? (N * 2 + span_b - 1) / span_b : 2;
                const u32 last = (other.b.per_panel - 1) * step + (STEPS / other.b.per_panel - 1) * other.b.panel;
                if (last + (groups - 1) * stride + (panels - 1) * leading + 1024 > 65536)
                    continue;
                tiles.run<T, N, FORM>(other, wrong, wrong_stored);
                if (wrong == 0 && found++ < 4)
                    results.note(title + ", works", numbers(other.b));
            }
    if (found == 0)
        results.note(title, "no other numbers work either");
}

template <class T> void all_of_type(Results &results, Tiles &tiles, Pass pass) {
    probe<T, 200, SS>(results, tiles, pass, "SS K-major", 128, 128);
    probe<T, 208, SS>(results, tiles, pass, "SS K-major", 128, 128);
    probe<T, 256, SS>(results, tiles, pass, "SS K-major", 128, 128);
    probe<T, 200, SS>(results, tiles, pass, "SS K-major", 64, 64);
    probe<T, 256, SS>(results, tiles, pass, "SS K-major", 64, 64);
    probe<T, 200, RS>(results, tiles, pass, "RS, ldmatrix", 128, 128);
    probe<T, 256, RS>(results, tiles, pass, "RS, ldmatrix", 128, 128);
    probe<T, 200, RS>(results, tiles, pass, "RS, ldmatrix", 64, 64);
    probe<T, 256, RS>(results, tiles, pass, "RS, ldmatrix", 64, 64);
    probe<T, 200, RS_PIPELINE>(results, tiles, pass, "RS, one wgmma in flight", 128, 128);
    probe<T, 200, RS_PIPELINE>(results, tiles, pass, "RS, one wgmma in flight", 64, 64);
    probe<T, 200, RS_TRANS_A>(results, tiles, pass, "RS, ldmatrix.trans (dx)", 128, 128);
    probe<T, 200, RS_TRANS_A>(results, tiles, pass, "RS, ldmatrix.trans (dx)", 128, 64);
    probe<T, 200, RS_TRANS_B>(results, tiles, pass, "RS, B N-major (grad dW)", 128, 128);
    probe<T, 256, RS_TRANS_B>(results, tiles, pass, "RS, B N-major (grad dW)", 128, 128);
    probe<T, 256, RS_TRANS_B>(results, tiles, pass, "RS, B N-major", 128, 64);
    probe<T, 256, SS_TRANS>(results, tiles, pass, "SS, A M-major, B N-major", 128, 128);
}

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("descriptors");
    open_device(results);
    Tiles tiles;
    all_of_type<__nv_bfloat16>(results, tiles, Pass::DOCUMENTED);
    all_of_type<__half>(results, tiles, Pass::DOCUMENTED);

    // K-major with a swizzle: the leading offset is said to be ignored.
    using T = __nv_bfloat16;
    for (const u32 span : {128u, 64u}) {
        tiles.write(k_major_tile<T>(M, span, a_value), k_major_tile<T>(200, span, b_value));
        bool ignored = true;
        for (const u32 leading : {0u, 16u, 128u, 1024u, 4096u}) {
            u32 wrong = 0, wrong_stored = 0;
            tiles.run<T, 200, SS>({k_major_operand(M, span, leading), k_major_operand(200, span, leading), span}, wrong,
                                  wrong_stored);
            ignored = ignored && wrong == 0;
        }
        results.check(ignored, text("K-major %u B: leading offset ignored", span), "expected: yes");
    }

    // Last, as a wrong descriptor may be an error.
    all_of_type<__nv_bfloat16>(results, tiles, Pass::OTHERS);
    all_of_type<__half>(results, tiles, Pass::OTHERS);
    return results.status();
}
