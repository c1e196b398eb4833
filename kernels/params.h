// Parameter structs of the kernels, and constants that kernels and plans share.
//
// Generated from src/cuda by `PACE_UPDATE_DOCS=1 cargo test -p pace-params`: change it there.

#ifndef PACE_PARAMS_H
#define PACE_PARAMS_H

#include "storage.cuh"

namespace pace {

/// Layers of a launch: as many as parameters have room for in 4 KiB.
constexpr u32 WEIGHT_LAYERS = 32;

constexpr u32 WEIGHT_GRADIENT_LAYERS = 16;

/// Threads of a block.
constexpr u32 WEIGHT_THREADS = 256;

constexpr u32 WEIGHT_GRADIENT_THREADS = 256;

constexpr u32 WEIGHT_SUM_THREADS = 256;

/// Rows of ΔW of a block, 8 per warp.
constexpr u32 WEIGHT_ROWS = 64;

/// Elements of Δb of a block, 2 per warp.
constexpr u32 BIAS_TILE_ROWS = 16;

/// Columns for which a block makes `Pd·Pu` at a time, and the bytes of `Pd` that it has room for: all columns at once up to 1632 of
/// rank 10 in 16 bits, in 40 KiB of shared memory.
constexpr u32 PROMPT_COLUMNS = 2048;

constexpr u32 PROMPT_BYTES = (32 << 10);

/// Elements of a block that adds up partial sums; 8 threads share the parts of one.
constexpr u32 WEIGHT_SUM_LENGTH = 128;

/// Threads of a block.
constexpr u32 DROP_PATH_THREADS = 256;

/// Vectors of a row that one thread has in an item of work.
constexpr u32 DROP_PATH_VECTORS = 2;

/// Threads of a warp.
constexpr u32 WARP = 32;

/// Threads of a block.
constexpr u32 LAYER_EPILOGUE_THREADS = 256;

/// Threads of a block.
constexpr u32 LM_HEAD_THREADS = 256;

/// What a thread holds of a row.
constexpr u32 LOSS_ELEMENTS = 8;

/// Threads that share a row or a slice of one, at most; then they are the block.
constexpr u32 LOSS_GROUP = 512;

/// Words of shared memory for each warp of a block; one more is for all of them.
constexpr u32 LOSS_SHARED_WORDS = 34;

/// Of a slice, where the loss is not the paper's; more than what the paper's needs.
constexpr u32 LOSS_GENERAL_SUMMARY_WORDS = 22;

/// Of a row of more slices, there.
constexpr u32 LOSS_GENERAL_KNOWN_WORDS = 35;

/// Words of the status.
constexpr u32 LOSS_STATUS_WORDS = 9;

/// What the criterion is of.
constexpr u32 LOSS_LABELS = 0;

constexpr u32 LOSS_PROBABILITIES = 1;

constexpr u32 LOSS_VALUES = 2;

/// The divergences: those of differences of logits, those among them that need their mean, and those of probabilities.
constexpr u32 LOSS_SQUARED_DIFFERENCE = 0;

constexpr u32 LOSS_CENTERED_SQUARED_DIFFERENCE = 1;

constexpr u32 LOSS_SYMMETRIC_KL = 2;

constexpr u32 LOSS_KL = 3;

constexpr u32 LOSS_JENSEN_SHANNON = 4;



constexpr u32 SM80_LOW_RANK_STAGES = 3;

/// Token rows of a tile of `factors`, and bytes of its rows.
constexpr u32 SM80_FACTORS_ROWS = 32;

constexpr u32 SM80_FACTORS_ROW_BYTES = 1024;

/// Channels of a tile: 197 tiles of 768, 2304 or 3072 channels come out even on 132 multiprocessors.
constexpr u32 SM90_LOW_RANK_CHANNELS = 192;

constexpr u32 SM90_LOW_RANK_STAGES = 4;

/// Blocks that share W0's tiles.
constexpr u32 SM90_LOW_RANK_CLUSTER = 2;

/// Buffers of a consumer for outputs; where there is no room for them, one.
constexpr u32 SM90_LOW_RANK_STAGING = 2;

/// Channels of a block up to rank 16, and up to 32: as many as a consumer has accumulators for. 768, 2304 and 3072 are multiples
/// of both.
constexpr u32 SM90_GRADIENTS_CHANNELS_16 = 384;

constexpr u32 SM90_GRADIENTS_CHANNELS_32 = 256;

constexpr u32 SM90_GRADIENTS_STAGES = 3;

/// Threads of a block.
constexpr u32 MERGE_THREADS = 256;

/// Threads of a block, at most.
constexpr u32 NOISE_FILL_THREADS = 256;

/// No noise, `z = 1`.
constexpr u32 NOISE_OFF = 0;

/// Generated, one draw per sample (BC).
constexpr u32 NOISE_PER_SAMPLE = 1;

/// Generated, one draw per token (BTC).
constexpr u32 NOISE_PER_TOKEN = 2;

/// `z [R, N]` of the caller.
constexpr u32 NOISE_GIVEN_PER_SAMPLE = 3;

/// `z [R, T, N]` of the caller.
constexpr u32 NOISE_GIVEN_PER_TOKEN = 4;

/// Threads of a block, at most.
constexpr u32 NOISY_EPILOGUE_THREADS = 256;

/// Rows and columns of a block's tile of outputs.
constexpr u32 SM80_TILE = 128;

constexpr u32 SM80_THREADS = 256;

/// Bytes of an operand's tile along the inner dimension.
constexpr u32 SM80_TILE_K_BYTES = 64;

constexpr u32 SM80_FORWARD_STAGES = 4;

constexpr u32 SM80_FOLDED_STAGES = 3;

constexpr u32 SM80_BACKWARD_STAGES = 3;

/// Channels of a tile; with those of the adapter they are the 256 columns that an instruction has at most.
constexpr u32 SM90_EXACT_CHANNELS = 128;

constexpr u32 SM90_EXACT_STAGES = 4;

/// Blocks that share the weights' tiles.
constexpr u32 SM90_EXACT_CLUSTER = 2;

/// Buffers of a consumer for outputs.
constexpr u32 SM90_EXACT_STAGING = 1;

/// Rows of a block's tile of the output transposed.
constexpr u32 SM90_FOLDED_ROWS = 128;

/// Stages of the units' tiles, and as many entries of a consumer's tiles of both matrices.
constexpr u32 SM90_FOLDED_STAGES = 3;

/// Blocks of a cluster.
constexpr u32 SM90_FOLDED_CLUSTER = 2;

/// Channels and features of a block's tile, and tokens of a stage.
constexpr u32 SM90_WEIGHT_ROWS = 128;

constexpr u32 SM90_WEIGHT_COLUMNS = 256;

constexpr u32 SM90_WEIGHT_DEPTH = 64;

constexpr u32 SM90_WEIGHT_STAGES = 4;

/// Blocks of a cluster, whose channels lie beside each other.
constexpr u32 SM90_WEIGHT_CLUSTER = 2;

/// Channels of a tile that a block adds up, and its threads.
constexpr u32 SM90_WEIGHT_SUM_ROWS = 16;

constexpr u32 SM90_WEIGHT_SUM_THREADS = 256;

/// Threads of a block.
constexpr u32 NORMS_THREADS = 256;

/// Threads of the block that adds up.
constexpr u32 NORM_TOTAL_THREADS = 1024;

/// Elements of a block.
constexpr u32 NORMS_CHUNK = 4096;

/// Tensors of a launch.
constexpr u32 NORMS_TENSORS = 128;

/// Threads of a block.
constexpr u32 PARTIAL_SUMS_THREADS = 256;

/// Threads of a block: two consumer warpgroups and the producer.
constexpr u32 SM90_THREADS = 384;

/// Token rows of a block's tile.
constexpr u32 SM90_TILE_ROWS = 128;

/// Elements of a tile along the reduction, and channels of an output chunk: rows of 128 bytes, the widest swizzle.
constexpr u32 SM90_TILE_K = 64;

/// Samples whose tokens a tile may have where they share `z`; with 49 tokens per sample there are 4.
constexpr u32 SM90_TILE_SAMPLES = 4;

/// Parameters of `adapter_weights*` for one layer.
struct WeightLayer {
  /// W0 `[N, K]`; null for LoRA add.
  Input<void> base;
  Input<void> lora_b;
  Input<void> lora_a;
  /// Pd `[K, p]`.
  Input<void> prompt_down;
  /// Pu `[p]`.
  Input<void> prompt_up;
  /// b0 `[N]`, or null.
  Input<void> base_bias;
  /// d `[N]`, or null.
  Input<void> delta_bias;
  /// Wd `[N, K]`; null without LoRA.
  Output<void> weight;
  /// bd `[N]`; null without a prompt.
  Output<void> bias;
  /// Out-features `N`.
  u32 rows;
  /// In-features `K`.
  u32 columns;
  u32 rank;
  u32 prompt_rank;
  float scale;
  /// Rows of W0, A and Wd start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Parameters of the kernels `adapter_weights*`.
struct AdapterWeightsParams {
  WeightLayer layers[WEIGHT_LAYERS];
  /// Of each layer.
  u32 first_block[WEIGHT_LAYERS];
  /// Layers that there are.
  u64 count;
};

/// Parameters of `weight_gradient*` for one layer.
struct WeightGradientLayer {
  /// `grad_Wd`; null without LoRA.
  Input<void> grad;
  /// W0; null for LoRA add.
  Input<void> base;
  Input<void> lora_b;
  Input<void> lora_a;
  /// `grad_bd`.
  Input<void> bias_grad;
  Input<void> prompt_down;
  Input<void> prompt_up;
  /// b0; null is zero.
  Input<void> base_bias;
  /// Partial sums: `[parts, r, K]`, `[strips, N, r]`, `[parts, K]` and `[parts * strips, p]`.
  Output<float> a_partial;
  Output<float> b_partial;
  Output<float> q_partial;
  Output<float> up_partial;
  /// Gradients; null are those that nobody asked for.
  Output<void> grad_lora_a;
  Output<void> grad_lora_b;
  Output<void> grad_prompt_down;
  Output<void> grad_prompt_up;
  Output<void> grad_delta_bias;
  /// Out-features `N`.
  u32 rows;
  /// In-features `K`.
  u32 columns;
  /// 0 without LoRA.
  u32 rank;
  /// 0 without a prompt.
  u32 prompt_rank;
  /// Rows of a part.
  u32 part;
  /// Rows of the gradient, W0, A and `a_partial` start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
  float scale;
  u32 reserved;
};

/// Parameters of the kernels `weight_gradients*` and `weight_gradient_sums*`.
struct WeightGradientsParams {
  WeightGradientLayer layers[WEIGHT_GRADIENT_LAYERS];
  /// Of each layer.
  u32 first_block[WEIGHT_GRADIENT_LAYERS];
  /// Layers that there are.
  u64 count;
};

/// Parameters of the kernels `drop_path*`.
struct DropPathParams {
  /// Mask of the caller; null if generated.
  Input<float> given;
  /// The key, read when the kernel runs; null: `key` is the key.
  Input<u64> key_address;
  u32 key[2];
  /// Number of the batch's sample 0 in the global batch.
  u64 first_sample;
  /// A sample is kept if its random word is below.
  u64 threshold;
  Input<void> input;
  Output<void> output;
  u32 features;
  u32 batch;
  /// Branches * batch.
  u32 rows;
  /// Threads that share a row, a power of two.
  u32 columns;
  /// Items of work of a row.
  u32 chunks;
  u32 items;
  /// Rows of both tensors start at multiples of 16 bytes and hold whole vectors.
  u64 aligned;
};

/// Where a kernel's `z` comes from.
struct NoiseSource {
  /// z of the caller; null if generated.
  Input<float> given;
  /// The key, read when the kernel runs; null: `key` is the key.
  Input<u64> key_address;
  u32 key[2];
  /// Number of the batch's sample 0 in the global batch.
  u64 first_sample;
  /// Samples per branch.
  u32 batch;
  /// One of the `NOISE_` constants.
  u32 kind;
  float sigma;
  /// Rows of a given z start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Parameters of the kernels `layer_epilogue*`.
struct LayerEpilogueParams {
  NoiseSource noise;
  /// May be null.
  Input<void> base;
  /// a, or null; g.
  Input<void> input;
  /// May be null.
  Input<void> bias;
  /// y; e, or null.
  Output<void> output;
  /// May be null.
  Output<void> sum;
  /// Partial sums, or null.
  Output<float> bias_sums;
  /// Of base, a, e.
  u32 rows;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// That share each row.
  u32 branches;
  /// Rows of a block.
  u32 part;
  /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Rows of both branches.
struct LmHeadRows {
  Input<void> first;
  Input<void> second;
  Input<i64> labels;
  i64 ignore_label;
  u32 has_ignore_label;
  u32 labelled_only;
  /// What labels are below.
  u32 classes;
  u32 count;
  u32 columns;
  /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Parameters of the kernels `lm_head_difference*` and `lm_head_parts*`.
struct LmHeadDifferenceParams {
  LmHeadRows rows;
  Output<void> high;
  /// Null: not wanted.
  Output<void> low;
};

/// Parameters of the kernels `lm_head_scale` and `lm_head_split`.
struct LmHeadSplitParams {
  Input<float> matrix;
  Output<void> high;
  /// Null: not wanted.
  Output<void> low;
  /// Another factor; null: none.
  Input<float> weight;
  float factor;
  u32 rows;
  u32 columns;
  u32 aligned;
};

/// Parameters of the kernels `lm_head_pull*`.
struct LmHeadPullParams {
  LmHeadRows rows;
  Input<float> product;
  /// Null: gradients are not wanted.
  Output<void> to_first;
  Output<void> to_second;
  Output<float> values;
  Output<u64> status;
  Output<u32> workspace;
  /// Another factor of both below; null: none.
  Input<float> weight;
  /// What a distance is multiplied by.
  float scale;
  /// And its gradient, with lambda.
  float pull;
  float lambda;
  /// Whether values and status are set, rather than added to.
  u32 is_first;
};

/// Parameters of the kernels `lm_head_bias*`.
struct LmHeadBiasParams {
  Input<void> gradient;
  Output<float> bias;
  u32 rows;
  u32 columns;
  float factor;
  u32 accumulate;
  u64 aligned;
};

/// Parameters of the kernel `lm_head_weight`.
struct LmHeadWeightParams {
  Input<i64> labels;
  Output<float> weight;
  i64 ignore_label;
  u32 has_ignore_label;
  u32 classes;
  u64 rows;
};

/// Parameters of the kernels `loss*`.
struct LossParams {
  Input<void> logits;
  /// Null: the targets are others.
  Input<i64> labels;
  /// Labels that are counted: those above, or more.
  Input<i64> counted;
  /// Probabilities or values.
  Input<float> targets;
  /// Null: all 1.
  Input<float> class_weights;
  /// Null: none.
  Output<float> history;
  Input<i64> index;
  /// Null: not wanted.
  Output<void> gradient;
  Output<float> values;
  Output<u64> status;
  Output<u32> workspace;
  u64 history_rows;
  i64 ignore_label;
  u64 first_row;
  /// Rows and slices of every tensor start at multiples of 16 bytes and hold whole vectors.
  u64 aligned;
  u32 has_ignore_label;
  u32 two_branches;
  u32 labelled_only;
  /// Whether `pull` is still to be divided by the number of labels: they alone take part, and there is no denominator.
  u32 pull_per_label;
  u32 accumulate;
  /// `LOSS_LABELS`, `LOSS_PROBABILITIES` or `LOSS_VALUES`.
  u32 criterion;
  /// `LOSS_SQUARED_DIFFERENCE` and so on; the mean of squares differs from their sum by `scale` alone.
  u32 divergence;
  /// Whether the criterion is of both branches.
  u32 both_branches;
  /// Whether the second half of the logits is their difference.
  u32 is_difference;
  u32 detach_target;
  /// Samples `B`, below 2^24: counts and positions are exact in f32.
  u32 batch;
  /// Labels that are counted; samples, where there are none.
  u32 counted_len;
  /// Classes `C`.
  u32 classes;
  /// Elements of a slice; the last may have fewer.
  u32 slice;
  /// Slices of a row.
  u32 slices;
  /// Threads of a group.
  u32 group;
  float lambda;
  /// Label smoothing `s`.
  float smoothing;
  /// `s / C`.
  float spread;
  /// What the divergence's gradient is multiplied by, such as `2 lambda / B`.
  float pull;
  /// What the divergence is multiplied by: 1, `1 / C`, 1/2, `T^2`.
  float scale;
  /// What both sums are divided by; 0: it is counted.
  float denominator;
  /// `1 / T`.
  float inverse_temperature;
  /// What logits are capped at, of `loss_general*`; 0: they are not.
  float soft_cap;
};

/// Parameters of the kernels `low_rank_linear*`.
struct LowRankLinearParams {
  NoiseSource noise;
  Input<void> x;
  Input<void> weight;
  Input<void> lora_a;
  Input<void> lora_b;
  /// May be null.
  Input<void> base_bias;
  /// May be null.
  Input<void> delta_bias;
  Output<void> s;
  Output<void> y;
  /// Rows of y start at multiples of 16 bytes and hold whole vectors.
  u64 aligned;
  /// Token rows `M`.
  u32 rows;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// In-features `K`.
  u32 inner;
  /// Rank `r`.
  u32 rank;
  /// Rows of x; those of y continue with row 0 after the last.
  u32 wrap;
  /// Tiles along the columns of y.
  u32 tile_columns;
  /// Rows of x, W0 and A start at multiples of 16 bytes and hold whole vectors.
  u32 x_aligned;
  /// Rows of B start at multiples of 16 bytes and hold whole vectors.
  u32 b_aligned;
  /// Factor on `B @ A`.
  float scale;
};

/// Parameters of the kernels `low_rank_factors*`.
struct LowRankFactorsParams {
  NoiseSource noise;
  Input<void> g;
  Input<void> s;
  Input<void> lora_b;
  /// Partial sums `[chunks, M, r]`, or null.
  Output<float> ds;
  /// Partial sums of `grad_B`, `[parts, N, r]`, or null.
  Output<float> b_sums;
  /// Partial sums of `grad_bd`, `[parts, N]`, or null.
  Output<float> delta_bias;
  /// Token rows `M`.
  u32 rows;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// Rank `r`.
  u32 rank;
  /// Rows of s; those of g continue with row 0 after the last.
  u32 wrap;
  /// Chunks of channels.
  u32 chunks;
  /// Token rows of a block, a multiple of 32.
  u32 part;
  /// Rows of g start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
  /// Rows of s and B start at multiples of 16 bytes and hold whole vectors.
  u32 rank_aligned;
  /// Factor on `B @ A`.
  float scale;
};

/// Parameters of the kernels `sm90_low_rank_factors*` and `sm90_low_rank_product*`.
struct Sm90LowRankGradientsParams {
  /// `g [samples, tokens, N]` or `x [1, rows, K]`, boxes of 64 tokens and channels.
  TensorMap tile;
  /// `s [wrap, tokens, r]` or `ds [copies, tokens, r]`.
  Input<void> low;
  /// `B [N, r]`, or null for the product.
  Input<void> factor;
  /// `z [samples, N]`, or null where it is 1.
  Input<float> z;
  /// Partial sums `[chunks, samples, tokens, r]`, or null.
  Output<float> ds;
  /// Partial sums of `grad_B`, `[groups, N, r]`, or of `grad_A`, `[groups, r, K]`, or null.
  Output<float> sums;
  /// Partial sums of `grad_bd`, `[groups, N]`, or null.
  Output<float> delta_bias;
  /// N or K.
  u32 columns;
  u32 samples;
  /// Tokens per sample.
  u32 tokens;
  /// Rank `r`.
  u32 rank;
  /// Samples of `s`; the next is the first again.
  u32 wrap;
  /// Branches that share the tile, and samples of each in `ds`.
  u32 copies;
  u32 copy_samples;
  /// Chunks of the columns, and groups of tiles.
  u32 chunks;
  u32 groups;
  /// Factor on `ds`.
  float scale;
};

/// Parameters of the kernels `merge*`.
struct MergeParams {
  Output<void> target;
  Input<void> delta;
  u64 length;
  float sign;
  /// Both start at multiples of 16 bytes.
  u32 aligned;
};

/// A tensor `[samples, tokens, channels]`, cut into units: runs of at most `chunk` tokens of one sample.
struct Units {
  /// Sample rows `R`.
  u32 samples;
  /// Tokens per sample `T`; 1 if a row per sample is all there is.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// Tokens per unit.
  u32 chunk;
  /// Units per sample.
  u32 chunks;
  /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Parameters of the kernels `noise_fill*`.
struct NoiseFillParams {
  NoiseSource noise;
  Output<float> z;
  Units units;
};

/// Parameters of the kernels `noisy_epilogue*`.
struct NoisyEpilogueParams {
  NoiseSource noise;
  /// a, dy.
  Input<void> input;
  /// y, da.
  Output<void> output;
  Units units;
};

/// One GEMM of a sum of them.
struct Segment {
  Input<void> left;
  Input<void> right;
  u32 inner;
  /// 1: under the noise.
  u32 adapter;
  /// Token row of y or g that row 0 of the left operand stands for.
  u32 first_row;
  /// Rows of both operands start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Parameters of the kernels `noisy_linear*`.
struct NoisyLinearParams {
  NoiseSource noise;
  Segment segments[2];
  /// May be null.
  Input<void> base_bias;
  /// May be null.
  Input<void> delta_bias;
  Output<void> y;
  /// Token rows `M`.
  u32 rows;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// Rows of x; those of y continue with row 0 after the last.
  u32 wrap;
  /// Number of segments.
  u32 count;
  /// Tiles along the columns of the output.
  u32 tile_columns;
  /// Rows of y start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
  /// Factor on the segments under the noise.
  float scale;
};

/// Parameters of the kernels `noisy_linear_input*`.
struct NoisyLinearInputParams {
  NoiseSource noise;
  Segment segments[4];
  Output<void> dx;
  /// Rows of dx.
  u32 rows;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// In-features `K`.
  u32 columns;
  /// Number of segments.
  u32 count;
  /// Tiles along the columns of the output.
  u32 tile_columns;
  /// Rows of dx start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
  /// Factor on the sum.
  float scale;
};

/// Parameters of the kernels `noisy_linear_weight*`.
struct NoisyLinearWeightParams {
  NoiseSource noise;
  Input<void> g;
  Input<void> x;
  /// `grad_Wd`, or its partial sums; or null.
  Output<void> weight;
  /// `grad_bd`, or its partial sums; or null.
  Output<void> bias;
  /// Token rows `M`.
  u32 rows;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Out-features `N`.
  u32 channels;
  /// In-features `K`.
  u32 columns;
  /// Rows of x; those of y continue with row 0 after the last.
  u32 wrap;
  /// Tiles along the columns of the output.
  u32 tile_columns;
  /// Tiles along its rows.
  u32 tile_rows;
  /// Token rows of a partial sum.
  u32 part;
  /// Split-K: write f32 partial sums, `[parts, N, K]`.
  u32 partial;
  /// Rows of g start at multiples of 16 bytes and hold whole vectors.
  u32 left_aligned;
  /// Rows of x start at multiples of 16 bytes and hold whole vectors.
  u32 right_aligned;
  /// Rows of the weight gradient, or of its partial sums, start at multiples of 16 bytes and hold whole vectors.
  u32 aligned;
};

/// Parameters of the kernels `sm90_folded_linear*` and `sm90_folded_input*`.
struct Sm90FoldedParams {
  /// `W0 [N, K]`.
  TensorMap weight;
  /// `Wd [N, K]`.
  TensorMap delta;
  /// `x` or `g`, `[samples, T, .]`, boxes of a unit's tokens.
  TensorMap x;
  /// `z [R, N]`, for the gradient.
  TensorMap z_map;
  /// `y` or `grad_x`, `[samples, T, .]`, boxes of a unit's tokens.
  TensorMap y;
  /// The same `z`.
  Input<float> z;
  /// May be null.
  Input<void> base_bias;
  /// May be null.
  Input<void> delta_bias;
  /// Rows of the output transposed: N or K.
  u32 rows;
  /// Length of the reduction: K or N.
  u32 inner;
  /// Samples of the output.
  u32 samples;
  /// Samples of x; the next is the first again.
  u32 wrap;
  /// Branches of g that the gradient adds up.
  u32 copies;
  /// Units of a sample.
  u32 parts;
  /// Tiles along the units.
  u32 tile_rows;
  /// Tiles along the rows, those of a cluster as one.
  u32 tile_columns;
};

/// Parameters of the kernels `sm90_weight_gradient*` and `sm90_weight_sums*`.
struct Sm90WeightParams {
  /// `g [R, T, N]`, boxes of 64 tokens and channels.
  TensorMap g;
  /// `x [samples, T, K]`, boxes of 64 tokens and features.
  TensorMap x;
  /// `z [R, N]`.
  Input<float> z;
  /// `grad_Wd [N, K]`.
  Output<void> weight;
  /// `grad_bd [N]`, or null.
  Output<void> bias;
  /// Sums of tiles that clusters share, two for each block.
  Output<float> partial;
  /// The same of `grad_bd`, or null.
  Output<float> bias_partial;
  /// Channels `N`.
  u32 rows;
  /// Features `K`.
  u32 columns;
  /// Samples `R`.
  u32 samples;
  /// Samples of x; the next is the first again.
  u32 wrap;
  /// Tokens per sample `T`.
  u32 tokens;
  /// Tiles of a cluster.
  u32 tiles;
  /// Tiles along the features.
  u32 tile_columns;
  /// Clusters that share the work.
  u32 clusters;
};

/// Parameters of the kernels `grad_norm*`.
struct GradNormParams {
  Input<void> tensors[NORMS_TENSORS];
  /// None is zero.
  u64 lengths[NORMS_TENSORS];
  /// Of the launch's first chunk.
  Output<double> partial;
  /// Of each tensor, counted from the launch's first.
  u32 first_chunk[NORMS_TENSORS];
  /// Tensors that there are.
  u64 count;
};

/// Parameters of the kernels `fp_distance*`.
struct FpDistanceParams {
  Input<void> fine_tuned;
  Input<void> pre_trained;
  Output<double> partial;
  u64 length;
  /// Both tensors start at multiples of 16 bytes.
  u64 aligned;
};

/// Parameters of the kernels `norm_total*`.
struct NormTotalParams {
  Input<double> partial;
  Output<double> out;
  double divisor;
  u32 parts;
  /// Whether the root is asked for, instead of the quotient.
  u32 root;
};

/// Parameters of the kernels `partial_sums*`.
struct PartialSumsParams {
  Input<float> partial;
  Output<void> out;
  u64 length;
  /// Rows of `partial` start at multiples of 16 bytes and hold whole vectors.
  u64 aligned;
  u32 parts;
  /// Threads that share the parts, a power of two.
  u32 groups;
};

/// Parameters of the kernels `sm90_low_rank_linear*`, `sm90_low_rank_input*` and `sm90_noisy_linear_exact*`.
struct Sm90LinearParams {
  /// `x [rows, K]` or `g [copies, rows, N]`, boxes of 128 rows.
  TensorMap x;
  /// `W0 [N, K]`, boxes of the part of a tile that a block of the cluster fetches.
  TensorMap weight;
  /// The adapter's `[r, K]` or `[N, K]`, boxes of a block's part of its rows in a tile; not for the gradient.
  TensorMap extra;
  /// `y [copies, rows, N]` or `grad_x [rows, K]`, boxes of 16 rows.
  TensorMap y;
  NoiseSource noise;
  /// May be null.
  Input<void> base_bias;
  /// May be null.
  Input<void> delta_bias;
  /// LoRA's `B [N, r]`, for the gradient its `A [r, K]`, or null.
  Input<void> factor;
  /// `s [rows, r]`, for the gradient `ds [copies, rows, r]`, or null.
  Output<void> s;
  /// Whether the adapter's rows are those of the tile's channels, or the same for all.
  u64 extra_by_column;
  /// Token rows of x.
  u32 rows;
  /// Branches that share them.
  u32 copies;
  /// Samples of a copy.
  u32 samples;
  /// Tokens per sample; all rows where they share `z`.
  u32 tokens;
  /// Columns of the output: N or K.
  u32 channels;
  /// Length of the reduction: K or N.
  u32 inner;
  /// Rank `r`.
  u32 rank;
  /// Tiles along the rows, those of a cluster as one.
  u32 tile_rows;
  /// Tiles along the columns.
  u32 tile_columns;
  /// Factor on `s`.
  float scale;
};



}  // namespace pace

#endif  // PACE_PARAMS_H
