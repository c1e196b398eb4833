/* A noisy LoRA head trained with the PACE loss, in C, on the CPU: two perturbed passes of each sample, kept consistent.
 *
 *   cc pace_step.c $(pkg-config --cflags --libs pace-kernels) -lm -o pace_step && ./pace_step
 *
 * after scripts/install_c.sh (docs/embedding.md).
 */
#include <math.h>
#include <pace_kernels.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 16, FEATURES = 24, CLASSES = 3, RANK = 4, STEPS = 150 };

static void check(PaceStatus status) {
    if (status != PACE_OK) {
        fprintf(stderr, "%s: %s\n", pace_status_name(status), pace_last_error());
        exit(1);
    }
}

/* Any numbers in [-1, 1). */
static float next(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 23) - 1.0f;
}

static PaceTensor tensor(float *data, uint64_t len) {
    PaceTensor tensor = {data, len};
    return tensor;
}

#define TENSOR(array) tensor((float *)(array), sizeof(array) / sizeof(float))

int main(void) {
    static float weight[CLASSES][FEATURES], lora_b[CLASSES][RANK], lora_a[RANK][FEATURES], x[BATCH][FEATURES];
    static float y[2 * BATCH][CLASSES], dy[2 * BATCH][CLASSES], grad_b[CLASSES][RANK], grad_a[RANK][FEATURES], losses[3];
    static int64_t labels[BATCH];
    if (pace_abi_version() != PACE_ABI_VERSION) {
        fprintf(stderr, "the library is not that of the header\n");
        return 1;
    }
    for (int c = 0; c < CLASSES; c++)
        for (int k = 0; k < FEATURES; k++) weight[c][k] = 0.1f * next();
    for (int r = 0; r < RANK; r++)
        for (int k = 0; k < FEATURES; k++) lora_a[r][k] = 0.4f * next();
    for (int i = 0; i < BATCH; i++) {
        labels[i] = i % CLASSES;
        for (int k = 0; k < FEATURES; k++) x[i][k] = next() + (k % CLASSES == labels[i]);
    }

    /* y = x W0ᵀ + z ⊙ (x Uᵀ Dᵀ), for both branches; they share their input. */
    PaceLowRankLinear layer = {0};
    layer.size = sizeof layer;
    layer.dtype = PACE_F32;
    layer.shape.branches = 2;
    layer.shape.batch = BATCH;
    layer.shape.tokens = 1;
    layer.shape.in_features = FEATURES;
    layer.shape.out_features = CLASSES;
    layer.shape.shared_input = 1;
    layer.noise.kind = PACE_NOISE_GENERATED;
    layer.noise.shape = PACE_PER_SAMPLE;
    layer.noise.sigma = 0.5f;
    layer.rank = RANK;
    layer.scale = 1.0;
    layer.base_weight = TENSOR(weight);
    layer.lora_b = TENSOR(lora_b);
    layer.lora_a = TENSOR(lora_a);
    layer.x = TENSOR(x);
    layer.y = TENSOR(y);
    layer.dy = TENSOR(dy);
    layer.grad_lora_b = TENSOR(grad_b);
    layer.grad_lora_a = TENSOR(grad_a);

    PaceLoss loss = {0};
    loss.size = sizeof loss;
    loss.dtype = PACE_F32;
    loss.consistency = PACE_CONSISTENCY_TWO_BRANCH;
    loss.classes = CLASSES;
    loss.lambda = 0.1;
    loss.logits = layer.y;
    loss.labels.data = labels;
    loss.labels.len = BATCH;
    loss.gradient = layer.dy;
    loss.values = TENSOR(losses);

    float first = 0.0f;
    for (uint64_t step = 0; step < STEPS; step++) {
        layer.noise.key = pace_key(42, step, 0); /* fresh noise; the backward pass makes it again from the key */
        check(pace_low_rank_linear_forward(NULL, NULL, &layer));
        check(pace_loss(NULL, NULL, &loss));
        check(pace_low_rank_linear_backward(NULL, NULL, &layer));
        for (int i = 0; i < CLASSES * RANK; i++) (&lora_b[0][0])[i] -= 0.3f * (&grad_b[0][0])[i];
        for (int i = 0; i < RANK * FEATURES; i++) (&lora_a[0][0])[i] -= 0.3f * (&grad_a[0][0])[i];
        if (step == 0) first = losses[0];
        if (step % 50 == 0 || step == STEPS - 1)
            printf("step %3d: loss %.4f, cross-entropy %.4f, consistency %.4f\n", (int)step, losses[0], losses[1], losses[2]);
    }

    /* Errors say which argument is wrong. */
    layer.x.len--;
    if (pace_low_rank_linear_forward(NULL, NULL, &layer) != PACE_ERROR_LENGTH) return 1;
    printf("refused: %s\n", pace_last_error());

    PaceDevice *device;
    if (pace_device_open(0, &device) == PACE_OK) {
        printf("there is a CUDA device\n");
        pace_device_close(device);
    } else {
        printf("no CUDA here: %s\n", pace_last_error());
    }
    return isfinite(losses[0]) && losses[0] < 0.5f * first ? 0 : 1;
}
