// Evaluates kernels/noise.cuh on the records of a file, so that cpp_header.rs can compare it with the Rust code.
//
//   noise_twin INPUT OUTPUT
//
// Every number is a 32-bit word in the machine's byte order. Input: the number of word records and of address
// records, then the records. A word record is the 4 words of one Philox call; its answer is the bits of 4 normals. An
// address record has the 14 words read below; its answer is the 2 words of the key, the bits of 4 z, and the mask.

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#if defined(EMULATE_DEVICE)
// CUDA's intrinsics in plain C++: the device branches of the header run, and are compared, without a GPU.
#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __forceinline__ inline
static unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((a * 1ull * b) >> 32); }
static int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
static float __uint_as_float(unsigned a) {
    float f;
    std::memcpy(&f, &a, 4);
    return f;
}
static unsigned __float_as_uint(float f) {
    unsigned a;
    std::memcpy(&a, &f, 4);
    return a;
}
static float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fsqrt_rn(float a) { return std::sqrt(a); }
static float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
static float __int2float_rn(int a) { return static_cast<float>(a); }
#endif

#include "../../kernels/noise.cuh"

using pace::noise::u32;
using pace::noise::u64;

static u64 join(u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; }

static int fail(const char *what, const char *path) {
    std::fprintf(stderr, "noise_twin: cannot %s %s\n", what, path);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: noise_twin INPUT OUTPUT\n");
        return 2;
    }
    std::FILE *input = std::fopen(argv[1], "rb");
    if (input == nullptr) {
        return fail("open", argv[1]);
    }
    const size_t WORD_RECORD = 4, ADDRESS_RECORD = 14;
    u32 count[2];
    if (std::fread(count, sizeof(u32), 2, input) != 2) {
        return fail("read", argv[1]);
    }
    std::vector<u32> records(count[0] * WORD_RECORD + count[1] * ADDRESS_RECORD);
    if (std::fread(records.data(), sizeof(u32), records.size(), input) != records.size()) {
        return fail("read", argv[1]);
    }
    std::fclose(input);

    std::vector<u32> answers;
    answers.reserve(count[0] * 4 + count[1] * 7);
    const u32 *at = records.data();
    for (u32 i = 0; i < count[0]; ++i, at += WORD_RECORD) {
        const pace::noise::Four n = pace::noise::normals({{at[0], at[1], at[2], at[3]}});
        for (float value : n.value) {
            answers.push_back(pace::noise::detail::to_bits(value));
        }
    }
    for (u32 i = 0; i < count[1]; ++i, at += ADDRESS_RECORD) {
        const u64 seed = join(at[0], at[1]), step = join(at[2], at[3]), sample = join(at[8], at[9]);
        const u32 layer = at[4], branch = at[7], group = at[11];
        const float sigma = pace::noise::detail::from_bits(at[5]);
        const u32 token = at[6] != 0 ? at[10] : pace::noise::ALL_TOKENS;
        const u64 threshold = join(at[12], at[13]);

        const pace::noise::Key key = pace::noise::derive_key(seed, step, layer);
        answers.push_back(key.word[0]);
        answers.push_back(key.word[1]);
        const pace::noise::Four z = pace::noise::noise(key, sigma, branch, sample, token, group);
        for (float value : z.value) {
            answers.push_back(pace::noise::detail::to_bits(value));
        }
        answers.push_back(pace::noise::drop_path_keep(key, sample, threshold) ? 1u : 0u);
    }

    std::FILE *output = std::fopen(argv[2], "wb");
    if (output == nullptr) {
        return fail("open", argv[2]);
    }
    const bool written = std::fwrite(answers.data(), sizeof(u32), answers.size(), output) == answers.size();
    if (std::fclose(output) != 0 || !written) {
        return fail("write", argv[2]);
    }
    return 0;
}
