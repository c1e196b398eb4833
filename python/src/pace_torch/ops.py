"""The operators, as PyTorch custom operators of the namespace `pace` (`torch.ops.pace`).

Each is differentiable once, known to `torch.compile` as one node, and runs on the CPU (float32, float64; float16 and
bfloat16 through float32, each operator rounding its result once) and on CUDA (float32, float16, bfloat16; on the current stream,
without synchronisation). Inputs that are not contiguous are copied. Call the functions at the end of this module.

Notation: `B` samples per branch, `G` branches (1 or 2), `R = G*B` leading rows, branch 0 first; `K` in-features, `N`
out-features, rank `r`. A layer's input is `[R, ..., K]`; what lies between is a sample's tokens, `T` of them.
"""

import ctypes
from typing import Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from . import _library as lib
from ._library import PaceError

# -------------------------------------------------------------------------------------------------------- shared parts


def _working_dtype(x: Tensor) -> torch.dtype:
    """The type that the library computes in for tensors like `x`."""
    if x.device.type not in ("cpu", "cuda"):
        raise PaceError(f"tensors are on `{x.device}`, expected a CPU or CUDA device")
    if x.dtype not in lib.DTYPES:
        raise PaceError(f"tensors are of {x.dtype}, expected float32, float64, float16 or bfloat16")
    if x.device.type == "cuda":
        if x.dtype == torch.float64:
            raise PaceError("tensors are of torch.float64, which the CUDA kernels do not have: use float32, or the CPU")
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _real(dtype: torch.dtype) -> torch.dtype:
    """The type of noise, masks and loss values beside tensors of type `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Inputs:
    """Brings the inputs of one operator into the form that the library takes."""

    def __init__(self, like: Tensor):
        self.like, self.device, self.dtype = like, like.device, _working_dtype(like)
        self.code = lib.DTYPES[self.dtype]

    def __call__(self, name: str, tensor: Optional[Tensor]) -> Optional[Tensor]:
        if tensor is None:
            return None
        if tensor.dtype != self.like.dtype:
            raise PaceError(f"`{name}` is of {tensor.dtype}, expected {self.like.dtype} like the other tensors")
        return self.placed(name, tensor, self.dtype)

    def placed(self, name: str, tensor: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
        if tensor is None:
            return None
        if tensor.device != self.device:
            raise PaceError(f"`{name}` is on {tensor.device}, expected {self.device} like the other tensors")
        return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def out(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.like.dtype else tensor.to(self.like.dtype)

    def noise(self, key, z, sigma: float, per_token: bool, first_sample: int) -> lib.PaceNoise:
        shape = lib.PER_TOKEN if per_token else lib.PER_SAMPLE
        if z is not None:
            return lib.PaceNoise(kind=lib.NOISE_GIVEN, shape=shape, z=self.placed("z", z, _real(self.dtype)))
        if key is None:
            return lib.PaceNoise()
        return lib.PaceNoise(
            kind=lib.NOISE_GENERATED,
            shape=shape,
            key_address=self.key_address(key),
            first_sample=_not_negative("first_sample", first_sample),
            sigma=sigma,
        )

    def key_address(self, key: Tensor):
        if key.dtype != torch.int64 or key.numel() != 1 or key.device != self.device:
            raise PaceError(f"`key` is {tuple(key.shape)} of {key.dtype} on {key.device}, "
                            f"expected one int64 on {self.device}")
        return ctypes.cast(key.data_ptr(), ctypes.POINTER(ctypes.c_uint64))


def _not_negative(name: str, number: int) -> int:
    if number < 0:
        raise PaceError(f"`{name}` is {number}, expected at least 0")
    return number


def _batch(rows: int, branches: int, name: str = "x") -> int:
    if branches not in (1, 2):
        raise PaceError(f"`branches` is {branches}, expected 1 or 2")
    if rows % branches:
        raise PaceError(f"`{name}` has {rows} rows, which {branches} branches cannot share evenly")
    return rows // branches


def _layer_shape(x: Tensor, out_features: int, branches: int, shared_input: bool) -> lib.PaceShape:
    if x.dim() < 2:
        raise PaceError(f"`x` has shape {tuple(x.shape)}, expected [rows, ..., in_features]")
    if x.numel() == 0:
        raise PaceError(f"`x` has shape {tuple(x.shape)}, which is empty")
    in_features = x.shape[-1]
    batch = x.shape[0] if shared_input else _batch(x.shape[0], branches)
    return lib.PaceShape(
        branches=branches,
        batch=batch,
        tokens=x.numel() // max(x.shape[0] * in_features, 1),
        in_features=in_features,
        out_features=out_features,
        shared_input=shared_input,
    )


def _out_shape(x: Tensor, out_features: int, branches: int, shared_input: bool) -> list:
    rows = x.shape[0] * branches if shared_input else x.shape[0]
    return [rows, *x.shape[1:-1], out_features]


def _vector(name: str, tensor: Optional[Tensor], size: int) -> None:
    if tensor is not None and tuple(tensor.shape) != (size,):
        raise PaceError(f"`{name}` has shape {tuple(tensor.shape)}, expected {(size,)}")


def _matrix(name: str, tensor: Optional[Tensor], rows: int, columns: int) -> None:
    if tensor is not None and tuple(tensor.shape) != (rows, columns):
        raise PaceError(f"`{name}` has shape {tuple(tensor.shape)}, expected {(rows, columns)}")


def _none(like: Tensor) -> Tensor:
    """What a backward operator returns for a gradient that is not wanted: operators cannot return None."""
    return like.new_empty(0)


def _keep_key(ctx, key: Optional[Tensor]) -> None:
    ctx.key = key
    # Compilation runs this on stand-ins, whose versions mean nothing.
    ctx.key_version = key._version if type(key) is Tensor else None


def _same_key(ctx, key: Optional[Tensor]) -> Optional[Tensor]:
    """The saved key, if it is the one that the forward pass used.

    Gradient checkpointing saves nothing and runs the forward pass again, which then reads the model's present keys: other
    ones, or the same tensor with other contents.
    """
    if type(key) is Tensor and type(ctx.key) is Tensor:
        if key.data_ptr() != ctx.key.data_ptr() or ctx.key._version != ctx.key_version:
            raise RuntimeError(
                "gradient checkpointing ran a layer again after the model had moved on to other noise: "
                "call backward() before the next forward pass"
            )
    return key


# ----------------------------------------------------------------------------------------------------------- operators


class _Operator:
    """A custom operator. Eager code calls its function directly, and differentiates it as a `torch.autograd.Function`:
    PyTorch's way through a custom operator takes several times as long as a call of the library.
    """

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function
        self.custom = torch.library.custom_op(f"pace::{name}", function, mutates_args=())
        self.register_fake = self.custom.register_fake
        self.eager = self.custom

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        self.custom.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *arguments):
            output = self.function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.eager = type(self.name, (torch.autograd.Function,), methods).apply

    def __call__(self, *arguments):
        if not _is_eager(arguments):
            return self.custom(*arguments)
        # A backward operator that autograd records is the custom one, which says that it has no derivative.
        return self.eager(*arguments) if torch.is_grad_enabled() else self.function(*arguments)


def _operator(name: str) -> Callable[[Callable], _Operator]:
    return lambda function: _Operator(name, function)


def _is_eager(arguments: Sequence) -> bool:
    """Whether nobody is there to see the operator rather than what it does: no compiler, no tracer, no transform, no kind
    of tensor but PyTorch's own.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(a) in _PLAIN or not isinstance(a, Tensor) for a in arguments)


_PLAIN = {Tensor, torch.nn.Parameter, float, int, bool, type(None)}


# -------------------------------------------------------------------------------------- layers with PyTorch's products


def _takes_pytorch_products(x: Tensor) -> bool:
    """Whether a layer's products are PyTorch's own, and the library's kernels do what lies between them.

    On CUDA: cuBLAS is several times as fast there as the library's own products (`docs/performance.md`).
    """
    return x.device.type == "cuda"


def _as_given(x: Tensor):
    """Products inside an operator take the types that it was called with: autocast has had its say outside."""
    return torch.autocast(x.device.type, enabled=False)


def _shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of nobody else's in another shape, and no view: what an operator returns may be changed in place."""
    return torch.ops.aten._unsafe_view(y, shape)


def _merged(
    noise: lib.PaceNoise, base_weight: Optional[Tensor], delta_weight: Optional[Tensor]
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """One weight instead of two where there is no noise and the sum loses nothing."""
    if noise.kind != lib.NOISE_OFF or base_weight is None or delta_weight is None or base_weight.itemsize < 4:
        return base_weight, delta_weight
    return base_weight + delta_weight, None


def _affine(rows: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def _epilogue(inputs: _Inputs, shape: lib.PaceShape, noise: lib.PaceNoise, a: Tensor, y: Tensor) -> Tensor:
    """`y += z ⊙ a`."""
    arguments = lib.PaceNoisyEpilogue(dtype=inputs.code, shape=shape, noise=noise, a=a, y=y)
    lib.call("noisy_epilogue_forward", arguments, a.device)
    return y


def _scaled(inputs: _Inputs, shape: lib.PaceShape, noise: lib.PaceNoise, dy: Tensor) -> Tensor:
    """`z ⊙ dy`, a tensor of its own."""
    da = torch.empty_like(dy)
    arguments = lib.PaceNoisyEpilogue(dtype=inputs.code, shape=shape, noise=noise, dy=dy, da=da)
    lib.call("noisy_epilogue_backward", arguments, dy.device)
    return da


def _under_noise(
    inputs: _Inputs, shape: lib.PaceShape, noise: lib.PaceNoise, base: Optional[Tensor], a: Optional[Tensor]
) -> Tensor:
    """`base + z ⊙ a [M, N]`, of which branches may share the rows; `a` may be one row for all. Overwrites `base`."""
    rows = shape.branches * shape.batch * shape.tokens
    base, a = (
        t.repeat(rows // len(t), 1) if t is not None and t.dim() == 2 and len(t) < rows else t for t in (base, a)
    )
    if a is None:
        return base
    if noise.kind == lib.NOISE_OFF and base is not None:
        return base.add_(a)
    if a.dim() == 1:
        a = a.repeat(rows, 1)
    if noise.kind == lib.NOISE_OFF:
        return a
    return _scaled(inputs, shape, noise, a) if base is None else _epilogue(inputs, shape, noise, a, base)


def _grads_under_noise(
    inputs: _Inputs, shape: lib.PaceShape, noise: lib.PaceNoise, dy: Tensor, shared_input: bool
) -> tuple[Tensor, Tensor]:
    """The gradients to `base` and `a` of `_under_noise`, each `[rows of x, N]`."""
    grads = dy, dy if noise.kind == lib.NOISE_OFF else _scaled(inputs, shape, noise, dy)
    if shared_input and shape.branches > 1:
        return tuple(grad.view(shape.branches, -1, dy.shape[-1]).sum(0) for grad in grads)
    return tuple(grad.flatten(0, -2) for grad in grads)


def _input_grad(parts: Sequence[tuple[Tensor, Optional[Tensor]]]) -> Tensor:
    """The sum of `grad @ weight` over the parts that have a weight."""
    (grad, weight), *others = [part for part in parts if part[1] is not None]
    dx = grad @ weight
    for grad, weight in others:
        dx.addmm_(grad, weight)
    return dx


# -------------------------------------------------------------------------------------------------------- noisy linear


@_operator("noisy_linear")
def _noisy_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    delta_weight: Optional[Tensor],
    delta_bias: Optional[Tensor],
    key: Optional[Tensor],
    z: Optional[Tensor],
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
    shared_input: bool,
) -> Tensor:
    inputs = _Inputs(x)
    n = _out_features(base_weight, delta_weight)
    _base(base_weight, base_bias)
    shape = _layer_shape(x, n, branches, shared_input)
    for name, weight in (("base_weight", base_weight), ("delta_weight", delta_weight)):
        _matrix(name, weight, n, x.shape[-1])
    for name, bias in (("base_bias", base_bias), ("delta_bias", delta_bias)):
        _vector(name, bias, n)
    noise = inputs.noise(key, z, sigma, per_token, first_sample)
    x, base_weight, base_bias = inputs("x", x), inputs("base_weight", base_weight), inputs("base_bias", base_bias)
    delta_weight, delta_bias = inputs("delta_weight", delta_weight), inputs("delta_bias", delta_bias)
    if _takes_pytorch_products(x):
        with _as_given(x):
            rows = x.flatten(0, -2)
            base_weight, delta_weight = _merged(noise, base_weight, delta_weight)
            base = None if base_weight is None else _affine(rows, base_weight, base_bias)
            a = delta_bias if delta_weight is None else _affine(rows, delta_weight, delta_bias)
            y = _under_noise(inputs, shape, noise, base, a)
        return _shaped(inputs.out(y), _out_shape(x, n, branches, shared_input))
    y = inputs.new(*_out_shape(x, n, branches, shared_input))
    arguments = lib.PaceNoisyLinear(
        dtype=inputs.code,
        shape=shape,
        noise=noise,
        base_weight=base_weight,
        base_bias=base_bias,
        delta_weight=delta_weight,
        delta_bias=delta_bias,
        x=x,
        y=y,
    )
    lib.call("noisy_linear_forward", arguments, x.device)
    return inputs.out(y)


def _out_features(base_weight: Optional[Tensor], delta_weight: Optional[Tensor]) -> int:
    weight = base_weight if base_weight is not None else delta_weight
    if weight is None:
        raise PaceError("`delta_weight` is required when there is no `base_weight`")
    return weight.shape[0]


def _base(base_weight: Optional[Tensor], base_bias: Optional[Tensor]) -> None:
    if base_weight is None and base_bias is not None:
        raise PaceError("`base_bias` is given without a `base_weight`")


@_noisy_linear.register_fake
def _(x, base_weight, base_bias, delta_weight, delta_bias, key, z, sigma, per_token, first_sample, branches,
      shared_input):
    return x.new_empty(_out_shape(x, _out_features(base_weight, delta_weight), branches, shared_input))


@_operator("noisy_linear_backward")
def _noisy_linear_backward(
    dy: Tensor,
    x: Optional[Tensor],
    base_weight: Optional[Tensor],
    delta_weight: Optional[Tensor],
    key: Optional[Tensor],
    z: Optional[Tensor],
    x_shape: Sequence[int],
    wanted: Sequence[bool],
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
    shared_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(dy)
    n, k = dy.shape[-1], x_shape[-1]
    noise = inputs.noise(key, z, sigma, per_token, first_sample)
    dy, x = inputs("dy", dy), inputs("x", x)
    base_weight, delta_weight = inputs("base_weight", base_weight), inputs("delta_weight", delta_weight)
    if _takes_pytorch_products(dy):
        with _as_given(dy):
            g, e = _grads_under_noise(inputs, _rows_shape(dy, branches), noise, dy, shared_input)
            base_weight, delta_weight = _merged(noise, base_weight, delta_weight)
            dx = _input_grad([(g, base_weight), (e, delta_weight)]).view(x_shape) if wanted[0] else None
            dw = e.t() @ x.flatten(0, -2) if wanted[1] else None
            db = e.sum(0) if wanted[2] else None
        return tuple(_none(dy) if grad is None else inputs.out(grad) for grad in (dx, dw, db))
    # Where only a bias is trained the gradient does not read x, so it was not kept; the library takes its length.
    x = inputs.new(*x_shape) if x is None else x
    dx, dw, db = (
        inputs.new(*size) if want else None for want, size in zip(wanted, (x_shape, (n, k), (n,)))
    )
    arguments = lib.PaceNoisyLinear(
        dtype=inputs.code,
        shape=_layer_shape(x, n, branches, shared_input),
        noise=noise,
        base_weight=base_weight,
        delta_weight=delta_weight,
        x=x,
        dy=dy,
        grad_input=dx,
        grad_delta_weight=dw,
        grad_delta_bias=db,
    )
    lib.call("noisy_linear_backward", arguments, dy.device)
    return tuple(_none(dy) if grad is None else inputs.out(grad) for grad in (dx, dw, db))


@_noisy_linear_backward.register_fake
def _(dy, x, base_weight, delta_weight, key, z, x_shape, wanted, sigma, per_token, first_sample, branches, shared_input):
    sizes = (x_shape, (dy.shape[-1], x_shape[-1]), (dy.shape[-1],))
    return tuple(dy.new_empty(size) if want else _none(dy) for want, size in zip(wanted, sizes))


def _noisy_linear_setup(ctx, inputs, output):
    x, base_weight, _, delta_weight, _, key, z, *ctx.settings = inputs
    needs = ctx.needs_input_grad
    if needs[1] or needs[2] or needs[6]:
        raise PaceError("`base_weight`, `base_bias` and `z` have no gradient: they must not require one")
    ctx.wanted, ctx.x_shape = [needs[0], needs[3], needs[4]], x.shape
    _keep_key(ctx, key)
    ctx.save_for_backward(x if needs[3] else None, base_weight, delta_weight, key, z)


def _noisy_linear_grads(ctx, dy):
    x, base_weight, delta_weight, key, z = ctx.saved_tensors
    grads = _noisy_linear_backward(
        dy, x, base_weight, delta_weight, _same_key(ctx, key), z, ctx.x_shape, ctx.wanted, *ctx.settings
    )
    dx, dw, db = (grad if want else None for want, grad in zip(ctx.wanted, grads))
    return dx, None, None, dw, db, *[None] * 7


_noisy_linear.register_autograd(_noisy_linear_grads, setup_context=_noisy_linear_setup)

# ----------------------------------------------------------------------------------------------------- weight builders


def _weight_arguments(inputs: _Inputs, down: Tensor, up: Tensor, base_weight: Optional[Tensor], scale: float):
    (n, r), k = down.shape, up.shape[1]
    _matrix("up", up, r, k)
    _matrix("base_weight", base_weight, n, k)
    return lib.PaceLowRankWeight(
        dtype=inputs.code,
        out_features=n,
        in_features=k,
        rank=r,
        scale=scale,
        down=inputs("down", down),
        up=inputs("up", up),
        base_weight=inputs("base_weight", base_weight),
    )


@_operator("low_rank_weight")
def _low_rank_weight(down: Tensor, up: Tensor, base_weight: Optional[Tensor], scale: float) -> Tensor:
    inputs = _Inputs(down)
    arguments = _weight_arguments(inputs, down, up, base_weight, scale)
    out = inputs.new(down.shape[0], up.shape[1])
    arguments.set(out=out)
    lib.call("low_rank_weight_forward", arguments, down.device)
    return inputs.out(out)


@_low_rank_weight.register_fake
def _(down, up, base_weight, scale):
    return down.new_empty(down.shape[0], up.shape[1])


@_operator("low_rank_weight_backward")
def _low_rank_weight_backward(
    dout: Tensor, down: Tensor, up: Tensor, base_weight: Optional[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(down)
    arguments = _weight_arguments(inputs, down, up, base_weight, scale)
    grads = inputs.new(*down.shape), inputs.new(*up.shape)
    arguments.set(dout=inputs("dout", dout), grad_down=grads[0], grad_up=grads[1])
    lib.call("low_rank_weight_backward", arguments, down.device, workspace="low_rank_weight")
    return inputs.out(grads[0]), inputs.out(grads[1])


@_low_rank_weight_backward.register_fake
def _(dout, down, up, base_weight, scale):
    return down.new_empty(down.shape), up.new_empty(up.shape)


def _low_rank_weight_setup(ctx, inputs, output):
    down, up, base_weight, ctx.scale = inputs
    if ctx.needs_input_grad[2]:
        raise PaceError("`base_weight` has no gradient: it must not require one")
    ctx.save_for_backward(down, up, base_weight)


def _low_rank_weight_grads(ctx, dout):
    return *_low_rank_weight_backward(dout, *ctx.saved_tensors, ctx.scale), None, None


_low_rank_weight.register_autograd(_low_rank_weight_grads, setup_context=_low_rank_weight_setup)


def _prompt_arguments(inputs: _Inputs, base_weight, base_bias, prompt_down, prompt_up, delta_bias):
    (n, k), r = base_weight.shape, prompt_down.shape[1]
    _matrix("prompt_down", prompt_down, k, r)
    return lib.PacePromptBias(
        dtype=inputs.code,
        out_features=n,
        in_features=k,
        rank=r,
        base_weight=inputs("base_weight", base_weight),
        base_bias=inputs("base_bias", base_bias),
        prompt_down=inputs("prompt_down", prompt_down),
        prompt_up=inputs("prompt_up", prompt_up),
        delta_bias=inputs("delta_bias", delta_bias),
    )


@_operator("prompt_bias")
def _prompt_bias(
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    prompt_down: Tensor,
    prompt_up: Tensor,
    delta_bias: Optional[Tensor],
) -> Tensor:
    inputs = _Inputs(base_weight)
    arguments = _prompt_arguments(inputs, base_weight, base_bias, prompt_down, prompt_up, delta_bias)
    out = inputs.new(base_weight.shape[0])
    arguments.set(out=out)
    lib.call("prompt_bias_forward", arguments, base_weight.device, workspace="prompt_bias")
    return inputs.out(out)


@_prompt_bias.register_fake
def _(base_weight, base_bias, prompt_down, prompt_up, delta_bias):
    return base_weight.new_empty(base_weight.shape[0])


@_operator("prompt_bias_backward")
def _prompt_bias_backward(
    dout: Tensor,
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    prompt_down: Tensor,
    prompt_up: Tensor,
    delta_bias: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(base_weight)
    arguments = _prompt_arguments(inputs, base_weight, base_bias, prompt_down, prompt_up, delta_bias)
    grads = [inputs.new(*prompt_down.shape), inputs.new(*prompt_up.shape)]
    grads.append(None if delta_bias is None else inputs.new(*delta_bias.shape))
    arguments.set(
        dout=inputs("dout", dout), grad_prompt_down=grads[0], grad_prompt_up=grads[1], grad_delta_bias=grads[2]
    )
    lib.call("prompt_bias_backward", arguments, base_weight.device, workspace="prompt_bias")
    return tuple(_none(base_weight) if grad is None else inputs.out(grad) for grad in grads)


@_prompt_bias_backward.register_fake
def _(dout, base_weight, base_bias, prompt_down, prompt_up, delta_bias):
    bias = _none(base_weight) if delta_bias is None else delta_bias.new_empty(delta_bias.shape)
    return prompt_down.new_empty(prompt_down.shape), prompt_up.new_empty(prompt_up.shape), bias


def _prompt_bias_setup(ctx, inputs, output):
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        raise PaceError("`base_weight` and `base_bias` have no gradient: they must not require one")
    ctx.has_bias = inputs[4] is not None
    ctx.save_for_backward(*inputs)


def _prompt_bias_grads(ctx, dout):
    down, up, bias = _prompt_bias_backward(dout, *ctx.saved_tensors)
    return None, None, down, up, bias if ctx.has_bias else None


_prompt_bias.register_autograd(_prompt_bias_grads, setup_context=_prompt_bias_setup)

# ------------------------------------------------------------------------------------------------------------ LoRA mul


@_operator("lora_mul_linear")
def _lora_mul_linear(
    x: Tensor,
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    down: Tensor,
    up: Tensor,
    delta_bias: Optional[Tensor],
    key: Optional[Tensor],
    z: Optional[Tensor],
    scale: float,
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
    shared_input: bool,
) -> Tensor:
    delta_weight = _low_rank_weight(down, up, base_weight, scale)
    return _noisy_linear(
        x, base_weight, base_bias, delta_weight, delta_bias, key, z, sigma, per_token, first_sample, branches,
        shared_input,
    )


@_lora_mul_linear.register_fake
def _(x, base_weight, base_bias, down, up, delta_bias, key, z, scale, sigma, per_token, first_sample, branches,
      shared_input):
    return x.new_empty(_out_shape(x, base_weight.shape[0], branches, shared_input))


@_operator("lora_mul_linear_backward")
def _lora_mul_linear_backward(
    dy: Tensor,
    x: Optional[Tensor],
    base_weight: Tensor,
    down: Tensor,
    up: Tensor,
    key: Optional[Tensor],
    z: Optional[Tensor],
    x_shape: Sequence[int],
    wanted: Sequence[bool],
    scale: float,
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
    shared_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    delta_weight = _low_rank_weight(down, up, base_weight, scale)
    dx, dw, db = _noisy_linear_backward(
        dy, x, base_weight, delta_weight, key, z, x_shape, wanted, sigma, per_token, first_sample, branches,
        shared_input,
    )
    if not wanted[1]:
        return dx, _none(dy), _none(dy), db
    return dx, *_low_rank_weight_backward(dw, down, up, base_weight, scale), db


@_lora_mul_linear_backward.register_fake
def _(dy, x, base_weight, down, up, key, z, x_shape, wanted, scale, sigma, per_token, first_sample, branches,
      shared_input):
    sizes = zip((wanted[0], wanted[1], wanted[1], wanted[2]), (x_shape, down.shape, up.shape, (dy.shape[-1],)))
    return tuple(dy.new_empty(size) if want else _none(dy) for want, size in sizes)


def _lora_mul_linear_setup(ctx, inputs, output):
    x, base_weight, _, down, up, _, key, z, *ctx.settings = inputs
    needs = ctx.needs_input_grad
    if needs[1] or needs[2] or needs[7]:
        raise PaceError("`base_weight`, `base_bias` and `z` have no gradient: they must not require one")
    ctx.wanted, ctx.x_shape = [needs[0], needs[3] or needs[4], needs[5]], x.shape
    _keep_key(ctx, key)
    # ΔW is not saved but built again: it is as large as the layer.
    ctx.save_for_backward(x if ctx.wanted[1] else None, base_weight, down, up, key, z)


def _lora_mul_linear_grads(ctx, dy):
    x, base_weight, down, up, key, z = ctx.saved_tensors
    dx, ddown, dup, db = _lora_mul_linear_backward(
        dy, x, base_weight, down, up, _same_key(ctx, key), z, ctx.x_shape, ctx.wanted, *ctx.settings
    )
    with_input, with_weight, with_bias = ctx.wanted
    factors = (ddown, dup) if with_weight else (None, None)
    return dx if with_input else None, None, None, *factors, db if with_bias else None, *[None] * 8


_lora_mul_linear.register_autograd(_lora_mul_linear_grads, setup_context=_lora_mul_linear_setup)

# ------------------------------------------------------------------------------------------------------------ LoRA add


@_operator("lora_linear")
def _lora_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    down: Tensor,
    up: Tensor,
    delta_bias: Optional[Tensor],
    key: Optional[Tensor],
    z: Optional[Tensor],
    scale: float,
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
    shared_input: bool,
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(x)
    (n, r), k = down.shape, x.shape[-1]
    _matrix("base_weight", base_weight, n, k)
    _matrix("up", up, r, k)
    _base(base_weight, base_bias)
    shape, noise = _layer_shape(x, n, branches, shared_input), inputs.noise(key, z, sigma, per_token, first_sample)
    x, base_weight, base_bias = inputs("x", x), inputs("base_weight", base_weight), inputs("base_bias", base_bias)
    down, up, delta_bias = inputs("down", down), inputs("up", up), inputs("delta_bias", delta_bias)
    for name, bias in (("base_bias", base_bias), ("delta_bias", delta_bias)):
        _vector(name, bias, n)
    if _takes_pytorch_products(x):
        with _as_given(x):
            rows = x.flatten(0, -2)
            s = (rows @ up.t()).mul_(scale)
            base = None if base_weight is None else _affine(rows, base_weight, base_bias)
            y = _under_noise(inputs, shape, noise, base, _affine(s, down, delta_bias))
        s = s.view(*x.shape[:-1], r)
        return _shaped(inputs.out(y), _out_shape(x, n, branches, shared_input)), s
    y = inputs.new(*_out_shape(x, n, branches, shared_input))
    arguments = lib.PaceLowRankLinear(
        dtype=inputs.code,
        shape=shape,
        noise=noise,
        rank=r,
        scale=scale,
        base_weight=base_weight,
        base_bias=base_bias,
        down=down,
        up=up,
        delta_bias=delta_bias,
        x=x,
        y=y,
    )
    lib.call("low_rank_linear_forward", arguments, x.device)
    return inputs.out(y), _none(x)


@_lora_linear.register_fake
def _(x, base_weight, base_bias, down, up, delta_bias, key, z, scale, sigma, per_token, first_sample, branches,
      shared_input):
    s = x.new_empty([*x.shape[:-1], down.shape[1]]) if _takes_pytorch_products(x) else _none(x)
    return x.new_empty(_out_shape(x, down.shape[0], branches, shared_input)), s


@_operator("lora_linear_backward")
def _lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    base_weight: Optional[Tensor],
    down: Tensor,
    up: Tensor,
    delta_bias: Optional[Tensor],
    key: Optional[Tensor],
    z: Optional[Tensor],
    wanted: Sequence[bool],
    scale: float,
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
    shared_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _Inputs(x)
    (n, r), k = down.shape, x.shape[-1]
    shape, noise = _layer_shape(x, n, branches, shared_input), inputs.noise(key, z, sigma, per_token, first_sample)
    x, s, dy = inputs("x", x), inputs.placed("s", s, inputs.dtype), inputs("dy", dy)
    base_weight, down, up = inputs("base_weight", base_weight), inputs("down", down), inputs("up", up)
    sizes = x.shape, (n, r), (r, k), (n,)
    if _takes_pytorch_products(x):
        with _as_given(x):
            g, e = _grads_under_noise(inputs, _rows_shape(dy, branches), noise, dy, shared_input)
            ds = (e @ down).mul_(scale) if wanted[0] or wanted[2] else None
            dx = _input_grad([(g, base_weight), (ds, up)]) if wanted[0] else None
            ddown = e.t() @ s.flatten(0, -2) if wanted[1] else None
            dup = ds.t() @ x.flatten(0, -2) if wanted[2] else None
            db = e.sum(0) if wanted[3] else None
        grads = [grad if grad is None else grad.view(size) for grad, size in zip((dx, ddown, dup, db), sizes)]
        return tuple(_none(x) if grad is None else inputs.out(grad) for grad in grads)
    grads = [inputs.new(*size) if want else None for want, size in zip(wanted, sizes)]
    arguments = lib.PaceLowRankLinear(
        dtype=inputs.code,
        shape=shape,
        noise=noise,
        rank=r,
        scale=scale,
        base_weight=base_weight,
        down=down,
        up=up,
        delta_bias=inputs("delta_bias", delta_bias),
        x=x,
        dy=dy,
        grad_input=grads[0],
        grad_down=grads[1],
        grad_up=grads[2],
        grad_delta_bias=grads[3],
    )
    lib.call("low_rank_linear_backward", arguments, x.device)
    return tuple(_none(x) if grad is None else inputs.out(grad) for grad in grads)


@_lora_linear_backward.register_fake
def _(dy, x, s, base_weight, down, up, delta_bias, key, z, wanted, scale, sigma, per_token, first_sample, branches,
      shared_input):
    sizes = x.shape, down.shape, up.shape, (dy.shape[-1],)
    return tuple(x.new_empty(size) if want else _none(x) for want, size in zip(wanted, sizes))


def _lora_linear_setup(ctx, inputs, output):
    x, base_weight, _, down, up, delta_bias, key, z, *ctx.settings = inputs
    needs = ctx.needs_input_grad
    if needs[1] or needs[2] or needs[7]:
        raise PaceError("`base_weight`, `base_bias` and `z` have no gradient: they must not require one")
    ctx.wanted = [needs[0], needs[3], needs[4], needs[5]]
    _keep_key(ctx, key)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], base_weight, down, up, delta_bias, key, z)


def _lora_linear_grads(ctx, dy, _):
    if dy is None:
        return (None,) * 14
    x, s, base_weight, down, up, delta_bias, key, z = ctx.saved_tensors
    grads = _lora_linear_backward(
        dy, x, s, base_weight, down, up, delta_bias, _same_key(ctx, key), z, ctx.wanted, *ctx.settings
    )
    dx, ddown, dup, db = (grad if want else None for want, grad in zip(ctx.wanted, grads))
    return dx, None, None, ddown, dup, db, *[None] * 8


_lora_linear.register_autograd(_lora_linear_grads, setup_context=_lora_linear_setup)

# -------------------------------------------------------------------------------------------------- epilogue and noise


def _rows_shape(x: Tensor, branches: int) -> lib.PaceShape:
    if x.dim() < 2:
        raise PaceError(f"the tensor has shape {tuple(x.shape)}, expected [rows, ..., features]")
    return lib.PaceShape(
        branches=branches,
        batch=_batch(x.shape[0], branches),
        tokens=x.numel() // max(x.shape[0] * x.shape[-1], 1),
        in_features=1,
        out_features=x.shape[-1],
    )


@_operator("noisy_epilogue")
def _noisy_epilogue(
    y: Tensor,
    a: Tensor,
    key: Optional[Tensor],
    z: Optional[Tensor],
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
) -> Tensor:
    inputs = _Inputs(a)
    if y.shape != a.shape:
        raise PaceError(f"`y` has shape {tuple(y.shape)}, expected {tuple(a.shape)} like `a`")
    out = inputs("y", y)
    out = out.clone() if out.data_ptr() == y.data_ptr() else out
    noise = inputs.noise(key, z, sigma, per_token, first_sample)
    return inputs.out(_epilogue(inputs, _rows_shape(a, branches), noise, inputs("a", a), out))


@_noisy_epilogue.register_fake
def _(y, a, key, z, sigma, per_token, first_sample, branches):
    return y.new_empty(y.shape)


@_operator("noisy_epilogue_backward")
def _noisy_epilogue_backward(
    dy: Tensor,
    key: Optional[Tensor],
    z: Optional[Tensor],
    sigma: float,
    per_token: bool,
    first_sample: int,
    branches: int,
) -> Tensor:
    inputs = _Inputs(dy)
    noise = inputs.noise(key, z, sigma, per_token, first_sample)
    return inputs.out(_scaled(inputs, _rows_shape(dy, branches), noise, inputs("dy", dy)))


@_noisy_epilogue_backward.register_fake
def _(dy, key, z, sigma, per_token, first_sample, branches):
    return dy.new_empty(dy.shape)


def _noisy_epilogue_setup(ctx, inputs, output):
    _, _, key, z, *ctx.settings = inputs
    _keep_key(ctx, key)
    ctx.save_for_backward(key, z)


def _noisy_epilogue_grads(ctx, dy):
    key, z = ctx.saved_tensors
    da = _noisy_epilogue_backward(dy, _same_key(ctx, key), z, *ctx.settings) if ctx.needs_input_grad[1] else None
    return dy if ctx.needs_input_grad[0] else None, da, *[None] * 6


_noisy_epilogue.register_autograd(_noisy_epilogue_grads, setup_context=_noisy_epilogue_setup)


@torch.library.custom_op("pace::noise", mutates_args=())
def _noise(
    key: Tensor, sigma: float, per_token: bool, first_sample: int, branches: int, batch: int, tokens: int, channels: int
) -> Tensor:
    rows = branches * batch
    z = torch.empty((rows, tokens, channels) if per_token else (rows, channels), device=key.device)
    inputs = _Inputs(z)
    arguments = lib.PaceNoiseFill(
        dtype=inputs.code,
        shape=lib.PaceShape(branches=branches, batch=batch, tokens=tokens, in_features=1, out_features=channels),
        noise=inputs.noise(key, None, sigma, per_token, first_sample),
        z=z,
    )
    lib.call("noise_fill", arguments, key.device)
    return z


@_noise.register_fake
def _(key, sigma, per_token, first_sample, branches, batch, tokens, channels):
    rows = branches * batch
    shape = (rows, tokens, channels) if per_token else (rows, channels)
    return torch.empty(shape, dtype=torch.float32, device=key.device)


# ------------------------------------------------------------------------------------------------------------ DropPath


@_operator("drop_path")
def _drop_path(
    x: Tensor,
    key: Optional[Tensor],
    mask: Optional[Tensor],
    drop_probability: float,
    first_sample: int,
    branches: int,
    global_batch: int,
) -> Tensor:
    inputs = _Inputs(x)
    batch = _batch(x.shape[0], branches)
    if (key is None) == (mask is None):
        raise PaceError("one of `key` and `mask` is required, and not both")
    if mask is not None and global_batch != batch:
        raise PaceError("`mask` is of this batch: `global_batch` goes with `key`")
    if mask is None and global_batch != batch:
        # The mean is over the whole global batch, whose mask every process can make: it is a pure function.
        if first_sample + batch > global_batch:
            raise PaceError(f"samples {first_sample} to {first_sample + batch} are not in a batch of {global_batch}")
        ones = torch.ones(global_batch, 1, dtype=_real(inputs.dtype), device=x.device)
        scale = _drop_path(ones, key, None, drop_probability, 0, 1, global_batch)
        scale = scale[first_sample : first_sample + batch].repeat(branches, 1)
        return (x * scale.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)
    y = inputs.new(*x.shape)
    arguments = lib.PaceDropPath(
        dtype=inputs.code,
        branches=branches,
        batch=batch,
        features=x.numel() // max(x.shape[0], 1),
        mask=inputs.placed("mask", mask, _real(inputs.dtype)),
        key_address=None if key is None else inputs.key_address(key),
        drop_probability=drop_probability,
        first_sample=_not_negative("first_sample", first_sample),
        x=inputs("x", x),
        y=y,
    )
    lib.call("drop_path_forward", arguments, x.device)
    return inputs.out(y)


@_drop_path.register_fake
def _(x, key, mask, drop_probability, first_sample, branches, global_batch):
    return x.new_empty(x.shape)


def _drop_path_setup(ctx, inputs, output):
    _, key, mask, *ctx.settings = inputs
    _keep_key(ctx, key)
    ctx.save_for_backward(key, mask)


def _drop_path_grads(ctx, dy):
    key, mask = ctx.saved_tensors
    # Linear in x with a diagonal matrix: the gradient is the same operator.
    return _drop_path(dy, _same_key(ctx, key), mask, *ctx.settings), *[None] * 6


_drop_path.register_autograd(_drop_path_grads, setup_context=_drop_path_setup)

# ---------------------------------------------------------------------------------------------------------------- loss


@torch.library.custom_op("pace::loss", mutates_args=("history",))
def _loss(
    logits: Tensor,
    labels: Tensor,
    history: Optional[Tensor],
    index: Optional[Tensor],
    lambda_: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(logits)
    if history is not None:
        consistency = lib.CONSISTENCY_HISTORY
    else:
        consistency = lib.CONSISTENCY_NONE if len(logits) == len(labels) else lib.CONSISTENCY_TWO_BRANCH
    gradient = inputs.new(*logits.shape)
    values = torch.empty(3, dtype=_real(inputs.dtype), device=logits.device)
    status = torch.empty(9 if logits.device.type == "cuda" else 0, dtype=torch.int64, device=logits.device)
    arguments = lib.PaceLoss(
        dtype=inputs.code,
        consistency=consistency,
        classes=logits.shape[1],
        **{"lambda": lambda_},
        label_smoothing=label_smoothing,
        has_ignore_label=1,
        ignore_label=ignore_index,
        logits=inputs("logits", logits),
        labels=inputs.placed("labels", labels, torch.int64),
        history=history,
        index=inputs.placed("index", index, torch.int64),
        gradient=gradient,
        values=values,
        status=status,
    )
    lib.call("loss", arguments, logits.device, workspace="loss", zeroed=True)
    return values, inputs.out(gradient), status


@_loss.register_fake
def _(logits, labels, history, index, lambda_, label_smoothing, ignore_index):
    status = 9 if logits.device.type == "cuda" else 0
    return (
        logits.new_empty(3, dtype=_real(logits.dtype)),
        logits.new_empty(logits.shape),
        logits.new_empty(status, dtype=torch.int64),
    )


@_operator("loss_total")
def _loss_total(logits: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
    """The total among the values of `_loss`, as the function of the logits that has this gradient.

    A separate operator because one that writes to its arguments (the history) cannot be differentiated.
    """
    return values[0].clone()


@_loss_total.register_fake
def _(logits, values, gradient):
    return values.new_empty(())


@_operator("loss_backward")
def _loss_backward(dtotal: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    # The logits make the result depend on them, so that a second derivative is an error and not a zero.
    return (dtotal * gradient).to(gradient.dtype)


@_loss_backward.register_fake
def _(dtotal, logits, gradient):
    return gradient.new_empty(gradient.shape)


def _loss_total_setup(ctx, inputs, output):
    logits, _, gradient = inputs
    ctx.save_for_backward(logits, gradient)


def _loss_total_grads(ctx, dtotal):
    return _loss_backward(dtotal, *ctx.saved_tensors), None, None


_loss_total.register_autograd(_loss_total_grads, setup_context=_loss_total_setup)

# ----------------------------------------------------------------------------------------------------------- functions


class Noise(NamedTuple):
    """Where a layer's `z = 1 + σ·n` comes from.

    `key` is an int64 tensor of one element on the layer's device, from `keys`: z is made from it, in the forward pass
    and again in the backward pass. `z` is given noise instead, `[R, N]`, or `[R, T, N]` per token. Neither is `z = 1`.
    `first_sample` is the number of the batch's first sample in the global batch.
    """

    key: Optional[Tensor] = None
    sigma: float = 0.0
    per_token: bool = False
    first_sample: int = 0
    branches: int = 1
    z: Optional[Tensor] = None


NO_NOISE = Noise()


def keys(seed: int, step: int, layers: int, device: torch.device | str = "cpu") -> Tensor:
    """The keys of a training step's layers, `int64 [layers]`; slices of one element are what `Noise` takes.

    On CUDA the copy is asynchronous.
    """
    host = torch.tensor([lib.key(seed, step, layer) for layer in range(layers)], dtype=torch.int64)
    device = torch.device(device)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def noise(source: Noise, batch: int, channels: int, tokens: int = 1) -> Tensor:
    """A layer's z written out, as it multiplies: float32 `[R, N]`, or `[R, T, N]` per token; for tests, inspection."""
    if source.key is None:
        raise PaceError("`source` has no key")
    return _noise(
        source.key, source.sigma, source.per_token, source.first_sample, source.branches, batch, tokens, channels
    )


def noisy_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    delta_weight: Optional[Tensor],
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    shared_input: bool = False,
) -> Tensor:
    """`y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` (paper equation 8): `x [R, ..., K]` to `y [R, ..., N]`.

    `base_weight [N, K]` and `base_bias [N]` are frozen; without them the base term is zero (the noisy head).
    `delta_weight [N, K]` and `delta_bias [N]` may each be None for zero. Gradients go to x, ΔW and Δb. With
    `shared_input` all branches read the same rows, `x [B, ..., K]`. On CUDA the products are PyTorch's, in the precision
    that `torch.backends.cuda.matmul` asks for.

    Raises `PaceError` for shapes, types or devices that do not fit.
    """
    return _noisy_linear(
        x, base_weight, base_bias, delta_weight, delta_bias, noise.key, noise.z, noise.sigma, noise.per_token,
        noise.first_sample, noise.branches, shared_input,
    )


def lora_mul_linear(
    x: Tensor,
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    down: Tensor,
    up: Tensor,
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    scale: float = 1.0,
    shared_input: bool = False,
) -> Tensor:
    """`noisy_linear` with `ΔW = W0 ⊙ (scale·D·U)`, which is built again for the backward pass instead of kept.

    `down [N, r]`, `up [r, K]`; the rest as in `noisy_linear`. Gradients go to x, D, U and Δb.
    """
    return _lora_mul_linear(
        x, base_weight, base_bias, down, up, delta_bias, noise.key, noise.z, scale, noise.sigma, noise.per_token,
        noise.first_sample, noise.branches, shared_input,
    )


def lora_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    down: Tensor,
    up: Tensor,
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    scale: float = 1.0,
    shared_input: bool = False,
) -> Tensor:
    """LoRA add under noise: `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Uᵀ)·Dᵀ + δb)`; arguments as in `lora_mul_linear`."""
    return _lora_linear(
        x, base_weight, base_bias, down, up, delta_bias, noise.key, noise.z, scale, noise.sigma, noise.per_token,
        noise.first_sample, noise.branches, shared_input,
    )[0]


def low_rank_weight(down: Tensor, up: Tensor, base_weight: Optional[Tensor] = None, *, scale: float = 1.0) -> Tensor:
    """`ΔW [N, K] = scale·D·U`, or `W0 ⊙ (scale·D·U)` with a `base_weight`; `down [N, r]`, `up [r, K]`."""
    return _low_rank_weight(down, up, base_weight, scale)


def prompt_bias(
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    prompt_down: Tensor,
    prompt_up: Tensor,
    delta_bias: Optional[Tensor] = None,
) -> Tensor:
    """`Δb [N] = W0·(Pd·Pu) + b0⊙δb` (VPT add): `prompt_down [K, r]`, `prompt_up [r, 1]`.

    Without a base bias δb plays no part.
    """
    return _prompt_bias(base_weight, base_bias, prompt_down, prompt_up, delta_bias)


def noisy_epilogue(y: Tensor, a: Tensor, noise: Noise) -> Tensor:
    """`y + z ⊙ a` for an adapter `a` of any other kind; both `[R, ..., N]`."""
    return _noisy_epilogue(
        y, a, noise.key, noise.z, noise.sigma, noise.per_token, noise.first_sample, noise.branches
    )


def drop_path(
    x: Tensor,
    key: Optional[Tensor],
    drop_probability: float,
    *,
    mask: Optional[Tensor] = None,
    first_sample: int = 0,
    branches: int = 1,
    global_batch: Optional[int] = None,
) -> Tensor:
    """DropPath that drops the same samples in all branches: `x ⊙ mask / (mean(mask) + 1e-12)`, `x [R, ...]`.

    The mask is drawn from `key`, or given as `mask [B]`, at any scale. The mean of a drawn one is over the `global_batch`
    samples that all processes hold together (by default the B here).
    """
    if global_batch is None:
        global_batch = x.shape[0] // branches
    return _drop_path(x, key, mask, drop_probability, first_sample, branches, global_batch)


def _same(tensors: Sequence[Tensor]) -> tuple[_Inputs, list[Tensor]]:
    inputs = _Inputs(tensors[0])
    return inputs, [inputs(f"tensors[{i}]", tensor.detach()) for i, tensor in enumerate(tensors)]


def grad_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, as a float64 scalar on their device; one type and device for all."""
    tensors = list(tensors)
    if not tensors:
        raise PaceError("`tensors` is empty")
    inputs, tensors = _same(tensors)
    table = (lib.PaceTensor * len(tensors))(*[lib.PaceTensor(t.data_ptr(), t.numel()) for t in tensors])
    norm = torch.empty(1, dtype=torch.float64, device=inputs.device)
    arguments = lib.PaceGradNorm(
        dtype=inputs.code,
        gradients=ctypes.cast(table, ctypes.POINTER(lib.PaceTensor)),
        count=len(tensors),
        norm=norm,
    )
    lib.call("grad_norm", arguments, inputs.device, workspace="grad_norm")
    return norm[0]


def fp_distance(fine_tuned: Tensor, pre_trained: Tensor) -> Tensor:
    """`mean_i ‖f(θ; x_i) − f(θ0; x_i)‖²` (paper section 3.2) of two outputs `[samples, ...]`, as a float64 scalar."""
    if fine_tuned.shape != pre_trained.shape:
        raise PaceError(f"`pre_trained` has shape {tuple(pre_trained.shape)}, expected {tuple(fine_tuned.shape)}")
    inputs, (fine_tuned, pre_trained) = _same([fine_tuned, pre_trained])
    distance = torch.empty(1, dtype=torch.float64, device=inputs.device)
    arguments = lib.PaceFpDistance(
        dtype=inputs.code,
        samples=fine_tuned.shape[0],
        features=fine_tuned.numel() // max(fine_tuned.shape[0], 1),
        fine_tuned=fine_tuned,
        pre_trained=pre_trained,
        distance=distance,
    )
    lib.call("fp_distance", arguments, inputs.device, workspace="fp_distance")
    return distance[0]
