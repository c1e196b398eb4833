"""What the operators refuse, and what the error names."""

import math

import numpy
import pace_torch
import pytest
import torch
from pace_torch import Noise, PaceError, ops
from test_ops import KEY, WEIGHT, leaf, random, seed  # noqa: F401 (a fixture)


def test_wrong_shapes_are_named():
    ones = torch.ones
    for call, message in (
        (lambda: pace_torch.drop_path(ones(4, 2), None, 0.5), "key"),
        (lambda: pace_torch.drop_path(ones(4, 2), None, 0.5, mask=ones(4), global_batch=8), "global_batch"),
        (lambda: ops.noisy_epilogue(ones(4, 6), ones(2, 12), Noise(z=ones(2, 12))), "`y`"),
        (lambda: ops.noisy_linear(ones(2, 3), ones(6, 3), ones(6), None, ones(2, 3)), "delta_bias"),
        (lambda: ops.noisy_linear(ones(0, 3), ones(6, 3), None, None, None), "empty"),
        (lambda: ops.lora_mul_linear(ones(2, 3), ones(6, 3), None, ones(2, 3), None, None), "`lora_b` go together"),
        (lambda: ops.lora_mul_linear(ones(2, 3), ones(6, 3), None, ones(2, 4), ones(6, 2), None), "lora_a"),
        (
            lambda: ops.lora_mul_linear(ones(2, 3), ones(6, 3), None, None, None, None, prompt_up=ones(2, 1)),
            "`prompt_up` go together",
        ),
    ):
        with pytest.raises(PaceError, match=message):
            call()


def test_what_the_library_would_take_for_something_else_is_refused():
    """Sizes that do not fit its integers, tensors that are absent to it, and those of which it counts the elements only."""
    x, weight, z = random(4, 6), random(4, 6), random(4, 5)
    given = Noise(KEY, 0.5)
    for call, message in (
        (lambda: ops.noisy_linear(x, weight, None, None, None, given._replace(first_sample=2**64 + 5)), "first_sample"),
        (lambda: ops.drop_path(x, KEY, 0.5, first_sample=2**64), "first_sample"),
        (lambda: ops.noisy_linear(x, weight, None, None, None, given._replace(branches=2**64 + 1), shared_input=True), "branches"),
        (lambda: ops.drop_path(x, None, 0.5, mask=random(0)), "`mask`"),
        (lambda: ops.prompt_bias(weight, None, random(6, 2), random(2, 1), random(0)), "delta_bias"),
        (lambda: ops.prompt_bias(weight, random(1, 4), random(6, 2), random(2, 1)), "base_bias"),
        (lambda: ops.noisy_linear(x, random(5, 6), None, None, None, Noise(z=z.T)), "`z`"),
        (lambda: ops.noisy_epilogue(z, z, Noise(z=z.T)), "`z`"),
        (lambda: ops.noisy_epilogue(z, z, Noise(z=z.to(torch.complex64))), "`z`"),
        (lambda: ops.fp_distance(x.to_sparse(), x.to_sparse()), "`fine_tuned` is .*dense"),
        (lambda: ops.fp_distance(x, x.to_sparse()), "`pre_trained` is .*dense"),
        (lambda: ops.grad_norm([x, x.to_sparse()]), r"`tensors\[1\]` is .*dense"),
        (lambda: ops.low_rank_weight(x.to("meta"), weight), "`lora_a` is .*meta"),
        (lambda: ops.noisy_linear(x.int(), weight, None, None, None), "`x` is .*int32"),
    ):
        with pytest.raises(PaceError, match=message):
            call()


def test_a_setting_is_refused_whatever_was_called_before():
    """`5.0` equals 5, for which the struct of the call is there already."""
    y, noise = random(4, 6), Noise(KEY, 0.5, first_sample=5)
    ops.noisy_epilogue(y, y, noise)
    with pytest.raises(PaceError, match="first_sample"):
        ops.noisy_epilogue(y, y, noise._replace(first_sample=5.0))
    ops.drop_path(y, KEY, 0.5, first_sample=0)
    with pytest.raises(PaceError, match="first_sample"):
        ops.drop_path(y, KEY, 0.5, first_sample=False)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5)), torch.ones(2), "a", [0.5], None, math.nan, 10**400],
                         ids=lambda value: type(value).__name__)
def test_settings_are_numbers(value):
    """A tensor's first value would be kept for ever, and a parameter get no gradient."""
    x, weight, lora = random(4, 6), random(5, 6), (random(2, 6), random(5, 2))
    for _ in range(2):
        for call, name in (
            (lambda: ops.lora_linear(x, weight, None, *lora, None, Noise(KEY, value)), "sigma"),
            (lambda: ops.lora_linear(x, weight, None, *lora, None, scale=value), "scale"),
            (lambda: ops.lora_linear(x, weight, None, *lora, None, shared_input=value), "shared_input"),
            (lambda: ops.lora_mul_linear(x, weight, None, *lora, None, scale=value), "scale"),
            (lambda: ops.lora_mul_linear(x, weight, None, *lora, None, exact=value), "exact"),
            (lambda: ops.lora_linear(x, weight, None, *lora, None, Noise(branches=value)), "branches"),
            (lambda: ops.noisy_linear(x, weight, None, None, None, Noise(per_token=value)), "per_token"),
            (lambda: ops.noisy_epilogue(x, x, Noise(KEY, value)), "sigma"),
            (lambda: ops.noisy_epilogue(x, x, Noise(KEY, first_sample=value)), "first_sample"),
            (lambda: ops.low_rank_weight(*lora, scale=value), "scale"),
            (lambda: ops.drop_path(x, KEY, value), "drop_probability"),
            (lambda: ops.drop_path(x, KEY, 0.5, branches=value), "branches"),
            (lambda: ops.drop_path(x, KEY, 0.5, global_batch="4" if value is None else value), "global_batch"),
            (lambda: ops.noise(Noise(KEY, value), 2, 4), "sigma"),
            (lambda: ops.noise(Noise(KEY, 0.5), value, 4), "batch"),
            (lambda: ops.noise(Noise(KEY, 0.5), 2, value), "channels"),
            (lambda: ops.noise(Noise(KEY, 0.5), 2, 4, value), "tokens"),
            (lambda: pace_torch.pace_loss(x, torch.arange(4), value), "lambda_"),
            (lambda: pace_torch.pace_loss(x, torch.arange(4), both_branches=value), "both_branches"),
            (lambda: pace_torch.keys(value, 0, 1), "seed"),
            (lambda: pace_torch.keys(0, value, 1), "step"),
            (lambda: pace_torch.keys(0, 0, value), "layers"),
        ):
            with pytest.raises(PaceError, match=f"`{name}`"):
                call()


@pytest.mark.parametrize("transform", [torch.vmap, lambda call: torch.compile(call, backend="aot_eager")], ids=["vmap", "compile"])
def test_no_setting_is_a_tensor_in_a_transform(transform):
    sigma = torch.nn.Parameter(torch.tensor(0.5))
    for call in (lambda x: ops.noisy_linear(x, WEIGHT, None, WEIGHT, None, Noise(KEY, sigma)), lambda x: ops.drop_path(x, KEY, sigma)):
        with pytest.raises(PaceError, match="is Parameter"):
            transform(call)(random(1, 4, 6))


def test_numbers_of_numpy_are_numbers():
    x, weight, lora = random(4, 6), random(5, 6), (random(2, 6), leaf(5, 2))
    y = ops.lora_linear(x, weight, None, *lora, None, Noise(KEY, 0.5, branches=2), scale=0.25)
    other = ops.lora_linear(x, weight, None, *lora, None, Noise(KEY, numpy.float32(0.5), branches=numpy.int64(2)), scale=numpy.float64(0.25))
    assert torch.equal(y, other)
    assert torch.equal(*(torch.autograd.grad(output.sum(), lora[1])[0] for output in (y, other)))


def test_numbers_that_the_library_would_cut():
    for call, name in (
        (lambda: pace_torch.keys(2**64, 0, 1), "seed"),
        (lambda: pace_torch.keys(-(2**63) - 1, 0, 1), "seed"),
        (lambda: pace_torch.keys(0, 2**64, 1), "step"),
        (lambda: pace_torch.keys(0, -1, 1), "step"),
        (lambda: pace_torch.keys(0, 0, -1), "layers"),
        (lambda: pace_torch.keys(0, 0, 2**32 + 1), "layers"),
        (lambda: ops.noise(Noise(KEY, 0.5), -1, 4), "batch"),
        (lambda: ops.noise(Noise(KEY, 0.5), 2, 2**60), "channels"),
        (lambda: ops.noise(Noise(KEY, 0.5), 1, 0), "channels"),
        (lambda: pace_torch.sigma_by_block(2**62, 1.0, 0), "blocks"),
        (lambda: pace_torch.lm_loss(random(2, 6), random(5, 6), torch.tensor([1, 0]), chunk_rows=2**64 + 1), "chunk_rows"),
    ):
        with pytest.raises(PaceError, match=f"`{name}`"):
            call()
    assert torch.equal(pace_torch.keys(-1, 0, 1), pace_torch.keys(2**64 - 1, 0, 1))


def test_what_is_no_noise():
    x, weight, lora = random(4, 6), random(5, 6), (random(2, 6), random(5, 2))
    for wrong in (None, (KEY, 0.5), 0.5, KEY):
        for call, name in (
            (lambda: ops.noisy_linear(x, weight, None, None, None, wrong), "noise"),
            (lambda: ops.lora_linear(x, weight, None, *lora, None, wrong), "noise"),
            (lambda: ops.lora_mul_linear(x, weight, None, *lora, None, wrong), "noise"),
            (lambda: ops.noisy_epilogue(x, x, wrong), "noise"),
            (lambda: ops.noise(wrong, 2, 4), "source"),
        ):
            with pytest.raises(PaceError, match=f"`{name}` is {type(wrong).__name__}"):
                call()
    for key in (KEY.to("meta"), KEY.to_sparse()):
        with pytest.raises(PaceError, match="`key` is"):
            ops.noise(Noise(key, 0.5), 2, 4)
    for key in ([3], 3, "key"):
        for call in (lambda: ops.noise(Noise(key, 0.5), 2, 4), lambda: ops.drop_path(x, key, 0.5),
                     lambda: ops.noisy_linear(x, weight, None, None, None, Noise(key, 0.5))):
            with pytest.raises(PaceError, match="`key` is"):
                call()


def test_no_tensor_and_no_matrix():
    x, weight = random(4, 6), random(5, 6)
    for call, message in (
        (lambda: ops.noisy_linear(None, weight, None, None, None), "`x` is None"),
        (lambda: ops.noisy_linear(x, "weight", None, None, None), "`base_weight` is str"),
        (lambda: ops.noisy_linear(x, torch.tensor(1.0, dtype=torch.float64), None, None, None), "base_weight"),
        (lambda: ops.noisy_linear(x[0, 0], weight, None, None, None), "`x`"),
        (lambda: ops.lora_linear(x, weight, None, random(6), random(5, 2), None), "lora_a"),
        (lambda: ops.lora_mul_linear(x, None, None, random(2, 6), random(5, 2), None), "base_weight"),
        (lambda: ops.low_rank_weight(random(6), random(5, 2)), "lora_a"),
        (lambda: ops.prompt_bias(random(6), None, random(6, 2), random(2, 1)), "base_weight"),
        (lambda: ops.drop_path(None, None, 0.5, mask=random(4)), "`x`"),
        (lambda: ops.drop_path(x, None, 0.5, mask=random(4), branches=0), "branches"),
        (lambda: ops.fp_distance(x, None), "pre_trained"),
        (lambda: ops.grad_norm([x, 3]), "tensors\\[1\\]"),
    ):
        with pytest.raises(PaceError, match=message):
            call()
