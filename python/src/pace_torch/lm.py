"""The head of a language model with its loss, without the logits of all tokens in memory.

One call of the library on CPUs in float32 and float64; elsewhere PyTorch's own matmuls and the fused loss, some rows at a time. The forward
pass computes the gradients, so that no logits are kept.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library as lib
from ._errors import PaceError, check_choice, check_integer, check_number
from .loss import Losses
from .ops._arguments import check_dense, check_tensor, real
from .ops._operator import refuse_forward_mode
from .ops.ieee_matmul import ieee_matmul
from .ops.lm_head import HeadSettings, lm_head, takes
from .ops.loss import LossSettings, loss_and_gradient
from .settings import DIVERGENCES, OF_PROBABILITIES, OF_TOKENS, Denominator, LossOptions, check_denominator

# Logits of a branch that are in memory at a time, about.
_LOGITS = 1 << 26
OPTIONS = tuple(field.name for field in dataclasses.fields(LossOptions) if field.name not in (*OF_TOKENS, "lambda_"))


def lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lambda_: float = 1.0,
    *,
    bias: Optional[Tensor] = None,
    lora_a: Optional[Tensor] = None,
    lora_b: Optional[Tensor] = None,
    scale: float = 1.0,
    causal: bool = False,
    logit_scale: float = 1.0,
    soft_cap: Optional[float] = None,
    gram: Optional[Tensor] = None,
    chunk_rows: Optional[int] = None,
    denominator: Denominator = None,
    **options: Any,
) -> Losses:
    """`pace_loss` of the logits `a·(h·(W + scale·B·A)ᵀ + b)`, or `cap·tanh` of them over `cap`, of tokens that have labels: the same value, and
    gradients to `hidden`, `weight [V, H]`, `bias [V]`, `lora_a [r, H]` and `lora_b [V, r]`.

    * `hidden` `[branches·B, T, H]` for `labels` `[B, T]`, or `[branches·M, H]` for `[M]`; branch 0 first, of 1 or 2. `causal`: the label of a
      token is the next one's (of `[B, T]` only).
    * `lora_a`, `lora_b`, `scale`: a LoRA on the head, without noise; absent: none.
    * `logit_scale` is a, `soft_cap` cap.
    * `gram`: `lm_gram(weight)` of a weight that does not change, for squared differences, which then need no logits of branch 1. LoRA is no
      part of it.
    * `chunk_rows`: rows of a branch whose logits are in memory at a time.
    * `options` are those of `LossOptions` but `criterion` and `labelled_only`: tokens without a label take part in nothing.
      `denominator` is that of `pace_loss`.

    The logits in `Losses` are empty. Differentiable once. Raises `PaceError` for wrong shapes, types and options, and on the CPU for
    wrong labels and class weights; for labels on CUDA see `Losses.check`, whose positions are counted from the first row of a chunk.
    """
    for name in OF_TOKENS:
        if name in options:
            raise PaceError(f"`{name}` is not for `lm_loss`: a cross-entropy of the tokens that have labels")
    for name in options:
        if name not in OPTIONS:
            raise PaceError(f"`{name}` is no option, expected one of {', '.join(OPTIONS)}")
    checked = LossOptions(lambda_, **OF_TOKENS, **options)
    tensors = _Tensors(hidden, weight, bias, lora_a, lora_b)
    _check_scale(scale, lora_a is not None)
    labels, branches = _check(tensors, labels, check_choice("causal", causal, (True, False)), checked.ignore_index)
    if check_number("logit_scale", logit_scale) == 0:
        raise PaceError("`logit_scale` is 0")
    if soft_cap is not None and check_number("soft_cap", soft_cap, 0) == 0:
        raise PaceError("`soft_cap` is 0, expected more than 0, or None")
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows, 1, 2**63 - 1)
    by_gram = branches == 2 and takes_gram(checked, soft_cap)
    if gram is not None:
        _check_gram(gram, weight)
    head = _Head(_settings(checked), torch.is_grad_enabled(), branches, by_gram, float(logit_scale), soft_cap, float(scale), chunk_rows or 0)
    if isinstance(denominator, Tensor):
        check_dense("denominator", denominator)
    denominator = check_denominator(denominator, hidden.device, real(hidden.dtype))
    class_weights = None if checked.class_weights is None else _check_class_weights(checked.class_weights, weight)
    if denominator is None:
        # Where there are none the sums are 0.
        denominator = (labels != checked.ignore_index).sum().clamp(min=1)
        if class_weights is not None:
            class_weights = _of_mean(class_weights, labels, checked.ignore_index, denominator)
    tensors = tensors._replace(hidden=hidden.reshape(-1, hidden.shape[-1]))
    total, classification, consistency, status = _LmHead.apply(*tensors, labels, class_weights, gram, denominator, head)
    empty = hidden.new_empty(0, weight.shape[0])
    return Losses(total, classification, consistency, status, weight.shape[0], 0, empty)


@torch.no_grad()
def lm_gram(weight: Tensor) -> Tensor:
    """`G = WᵀW [H, H]` in float32 (float64 beside float64): in 16 bits it would be useless, and even negative."""
    check_tensor("weight", weight, 2)
    check_dense("weight", weight)
    refuse_forward_mode((weight,))
    if weight.numel() == 0 or weight.dtype not in lib.DTYPES:
        raise PaceError(f"`weight` is {tuple(weight.shape)} of {weight.dtype}, expected floating [V, H]")
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=real(weight.dtype), device=weight.device)
    for part in weight.detach().split(_rows_of(weight)):
        part = part.to(gram.dtype)
        gram += ieee_matmul(part.t(), part)
    return gram


def takes_gram(options: LossOptions, soft_cap: Optional[float]) -> bool:
    """Whether the divergence is one by the Gram matrix, without logits of branch 1."""
    return options.divergence not in OF_PROBABILITIES and not options.both_branches and soft_cap is None


def behind_head(logits: Tensor, scale: float, cap: Optional[float]) -> Tensor:
    """What models make of the logits of their head."""
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _Tensors(NamedTuple):
    """What the logits are made of, or the gradients to it, of the sums, not yet divided; None for what is absent or not wanted."""

    hidden: Optional[Tensor]
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    lora_a: Optional[Tensor]
    lora_b: Optional[Tensor]


class _Head(NamedTuple):
    loss: LossSettings
    # In evaluation gradients would be made for nothing: inside of `_LmHead` it looks as if there were none in training either.
    with_gradients: bool
    branches: int
    by_gram: bool
    scale: float
    cap: Optional[float]
    lora_scale: float
    rows: int


def _settings(options: LossOptions) -> LossSettings:
    """What the fused loss is told of sums over tokens that have labels."""
    return LossSettings(
        float(options.lambda_), float(options.label_smoothing), options.ignore_index, DIVERGENCES[options.divergence],
        float(options.temperature), options.detach_target, options.both_branches, True, lib.TARGETS_LABELS, 1.0,
    )


class _LmHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, labels, class_weights, gram, denominator, head):
        tensors = _Tensors(*(None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias, lora_a, lora_b)))
        wanted = tuple(head.with_gradients and needed for needed in ctx.needs_input_grad[:5])
        values, grads, status = _evaluate(tensors, labels, class_weights, gram, head, wanted)
        values = values / denominator
        ctx.denominator, ctx.grads, ctx.dtype = denominator, grads, hidden.dtype
        outputs = values[0].clone(), values[1].clone(), values[2].clone(), status
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, dtotal, *_):
        # `once_differentiable` says so only of a `dtotal` with a graph; without one the gradients would pass for constants.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise PaceError("`lm_loss` is differentiable once, and `create_graph=True` asks for more")
        factor = dtotal / ctx.denominator
        return *(None if grad is None else (factor * grad).to(ctx.dtype) for grad in ctx.grads), None, None, None, None, None


def _evaluate(
    tensors: _Tensors, labels: Tensor, class_weights: Optional[Tensor], gram: Optional[Tensor], head: _Head, wanted: tuple[bool, ...]
) -> tuple[Tensor, _Tensors, Tensor]:
    """The sums of total, criterion and divergence, `[3]`; their gradients; the status of each chunk."""
    hidden, weight = tensors.hidden, tensors.weight
    exact = real(hidden.dtype)
    rows = hidden.shape[0] // head.branches
    if takes((*tensors, labels, class_weights)):
        settings = HeadSettings(head.loss, head.branches, head.scale, float(head.cap or 0), head.lora_scale, head.rows, wanted)
        values, grads = lm_head(*tensors, labels, class_weights, gram if head.by_gram else None, settings)
        return values, _Tensors(*grads), labels.new_empty(0)
    # Chunks add to these.
    grads = _Tensors(*(
        torch.zeros_like(tensor, dtype=exact) if is_wanted else None for tensor, is_wanted in zip(tensors, wanted)
    ))
    values, statuses = torch.zeros(3, dtype=exact, device=hidden.device), []
    step = head.rows or max(_LOGITS // weight.shape[0], 1)
    for first in range(0, rows, step):
        sums, status = _chunk(tensors, labels, class_weights, head, grads, slice(first, min(first + step, rows)), rows)
        values += sums
        statuses.append(status)
    if head.by_gram:
        distance = _distance(tensors, labels, gram, head, grads)
        values[2] += distance
        values[0] += head.loss.lambda_ * distance
    if hidden.dtype != torch.float16:
        # Half of what is kept until the backward pass. In float16 sums that are not yet divided would overflow.
        grads = _Tensors(*(None if grad is None else grad.to(hidden.dtype) for grad in grads))
    return values, grads, torch.cat(statuses)


def _chunk(
    tensors: _Tensors, labels: Tensor, class_weights: Optional[Tensor], head: _Head, grads: _Tensors, at: slice, rows: int
) -> tuple[Tensor, Tensor]:
    """The sums of some rows by their logits, of branch 0 alone if the Gram matrix does the rest; adds to the gradients."""
    hidden, weight, bias, lora_a, lora_b = tensors
    scale, cap = head.scale, head.cap
    h0, h1 = hidden[:rows][at], hidden[rows:][at]
    two = head.branches == 2 and not head.by_gram

    def logits_of(h: Tensor, bias: Optional[Tensor]) -> Tensor:
        logits = F.linear(h, weight, bias)
        if lora_a is not None:
            logits = torch.addmm(logits, F.linear(h, lora_a), lora_b.t(), alpha=head.lora_scale)
        return behind_head(logits, scale, cap)

    logits = logits_of(h0, bias)
    if two:
        # As what it is where that is linear: a difference of rounded logits has lost its digits.
        other = logits_of(h1, bias) if cap is not None else logits_of((h0.to(real(h0.dtype)) - h1).to(h0.dtype), None)
        logits = torch.cat([logits, other])
    # The operator takes float16 in float32: its gradient would lose small values.
    given = logits.float() if logits.dtype == torch.float16 else logits
    settings = head.loss._replace(difference=two and cap is None, wants_gradient=any(grad is not None for grad in grads))
    values, gradient, status = loss_and_gradient(given, labels[at], class_weights, None, None, settings)
    if not settings.wants_gradient:
        return values, status
    if cap is not None:
        gradient = gradient * (1 - (given / cap) ** 2)
    gradient = gradient if scale == 1 else gradient * scale
    unit = _unit(gradient) if logits.dtype == torch.float16 else None
    gradient = (gradient if unit is None else gradient / unit).to(logits.dtype)
    for first, h, g in zip((at.start, rows + at.start), (h0, h1), gradient.split(len(h0))):
        of_hidden = None if grads.hidden is None else grads.hidden[first : first + len(h)]
        _backward(tensors, h, g, unit, head.lora_scale, grads._replace(hidden=of_hidden))
    return values, status


def _unit(gradient: Tensor) -> Tensor:
    """What a gradient of logits is counted in where it is float16: neither it nor its matmuls with numbers up to 256 then overflow, and
    what is small beside the rest of it is not lost. The loss scale, which is for that, is only known in the backward pass."""
    sums = [torch.linalg.vector_norm(gradient, 1, dim).amax() for dim in (0, 1)]
    # Of no gradient too.
    return (torch.maximum(*sums) / 255).clamp(min=torch.finfo(gradient.dtype).tiny)


def _backward(tensors: _Tensors, h: Tensor, g: Tensor, unit: Optional[Tensor], lora_scale: float, grads: _Tensors) -> None:
    """Adds what the gradient `g`, counted in `unit`, to `h·(W + s·B·A)ᵀ + b` gives; `grads.hidden` is that of `h`."""
    _, weight, _, lora_a, lora_b = tensors

    def add(total: Tensor, part: Tensor) -> None:
        total += part if unit is None else part.to(total.dtype) * unit

    if grads.hidden is not None:
        add(grads.hidden, g @ weight)
    if grads.weight is not None:
        add(grads.weight, g.t() @ h)
    if grads.bias is not None:
        add(grads.bias, g.sum(0, dtype=grads.bias.dtype))
    if lora_a is None:
        return
    # To A·h.
    between = lora_scale * (g @ lora_b)
    if grads.hidden is not None:
        add(grads.hidden, between @ lora_a)
    if grads.lora_a is not None:
        add(grads.lora_a, between.t() @ h)
    if grads.lora_b is not None:
        add(grads.lora_b, lora_scale * (g.t() @ F.linear(h, lora_a)))


def _distance(tensors: _Tensors, labels: Tensor, gram: Optional[Tensor], head: _Head, grads: _Tensors) -> Tensor:
    """`Σ a²·Δh·G·Δhᵀ` of the rows that have labels, for squared differences; adds λ times its gradients.

    Rounded to 16 bits or TF32 a Gram matrix can have negative distances: all matmuls are in IEEE float32.

    With a LoRA `Δh·(W + s·B·A)ᵀ = [Δh, s·Δh·Aᵀ]·[W, B]ᵀ`, so that G is that of `[W, B]`, of which `WᵀW` is a part.
    """
    hidden, weight, _, lora_a, lora_b = tensors
    exact, width = real(hidden.dtype), hidden.shape[1]
    h0, h1 = hidden.chunk(2)
    gram, means = _gram_of_both(weight, lora_b, gram), 0
    if head.loss.divergence == lib.DIVERGENCE_CENTERED_SQUARED_DIFFERENCE:
        means = torch.cat([part.mean(0, dtype=exact) for part in (weight, lora_b) if part is not None])
        gram = gram - weight.shape[0] * torch.outer(means, means)
    scale = head.scale**2 / (weight.shape[0] if head.loss.divergence == lib.DIVERGENCE_MEAN_SQUARED_DIFFERENCE else 1)
    total, rows = torch.zeros((), dtype=exact, device=hidden.device), len(h0)
    moment = torch.zeros_like(gram) if grads.weight is not None or grads.lora_b is not None else None
    scaled_a = None if lora_a is None else head.lora_scale * lora_a.to(exact)
    step = max(_LOGITS // width, 1)
    for first in range(0, rows, step):
        at = slice(first, first + step)
        takes_part = (labels[at] != head.loss.ignore_index).unsqueeze(1)
        delta = torch.where(takes_part, h0[at].to(exact) - h1[at].to(exact), 0)
        both = delta if lora_a is None else torch.cat([delta, ieee_matmul(delta, scaled_a.t())], 1)
        product = ieee_matmul(both, gram)
        total += scale * (product * both).sum()
        pull = (2 * head.loss.lambda_ * scale) * product
        if grads.hidden is not None:
            of_hidden = pull if lora_a is None else pull[:, :width] + ieee_matmul(pull[:, width:], scaled_a)
            grads.hidden[first : first + len(delta)] += of_hidden
            grads.hidden[rows + first : rows + first + len(delta)] -= of_hidden
        if grads.lora_a is not None:
            grads.lora_a.add_(ieee_matmul(pull[:, width:].t(), delta), alpha=head.lora_scale)
        if moment is not None:
            moment += ieee_matmul(both.t(), both)
    if moment is not None:
        # ([W, B] − 1·means)·S for centred differences.
        moment *= 2 * head.loss.lambda_ * scale
        for at, part in _parts_of_both(weight, lora_b):
            part = part - means
            if grads.weight is not None:
                grads.weight[at] += ieee_matmul(part, moment[:, :width])
            if grads.lora_b is not None:
                grads.lora_b[at] += ieee_matmul(part, moment[:, width:])
    return total


def _rows_of(weight: Tensor) -> int:
    """How many rows of a weight are taken at a time."""
    return max(_LOGITS // weight.shape[1], 1)


def _parts_of_both(weight: Tensor, lora_b: Optional[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """`[W, B]` in float32 (float64 beside float64), some rows at a time: a copy of all of it would be as large as many logits."""
    for first in range(0, weight.shape[0], _rows_of(weight)):
        at = slice(first, first + _rows_of(weight))
        yield at, torch.cat([matrix[at].to(real(weight.dtype)) for matrix in (weight, lora_b) if matrix is not None], 1)


def _gram_of_both(weight: Tensor, lora_b: Optional[Tensor], gram: Optional[Tensor]) -> Tensor:
    """The Gram matrix of `[W, B]` from that of W, if there is one."""
    gram = lm_gram(weight) if gram is None else gram
    if lora_b is None:
        return gram
    # Bᵀ·[W, B].
    low = sum(ieee_matmul(part[:, weight.shape[1] :].t(), part) for _, part in _parts_of_both(weight, lora_b))
    return torch.cat([torch.cat([gram, low[:, : weight.shape[1]].t()], 1), low])


def _check(tensors: _Tensors, labels: Any, causal: bool, ignore_index: int) -> tuple[Tensor, int]:
    """The label of each row of a branch, and how many branches there are."""
    given = {**tensors._asdict(), "labels": labels}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "lora_a", "lora_b")):
            raise PaceError(f"`{name}` is {type(tensor).__name__}, expected a tensor")
        check_dense(name, tensor)
    refuse_forward_mode(tensors)
    hidden, weight, bias, lora_a, lora_b = tensors
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise PaceError(f"`weight` is {tuple(weight.shape)}, expected [V, H]")
    if labels.dtype != torch.int64 or labels.dim() not in (1, 2) or labels.numel() == 0:
        raise PaceError(f"`labels` is {tuple(labels.shape)} of {labels.dtype}, expected int64 [B, T] or [M]")
    if causal and labels.dim() == 1:
        raise PaceError("`causal` is True, and `labels` [M] have no next token: expected [B, T]")
    rows, others = labels.shape[0], (*labels.shape[1:], weight.shape[1])
    if hidden.shape[1:] != others or hidden.shape[0] not in (rows, 2 * rows):
        raise PaceError(f"`hidden` is {tuple(hidden.shape)}, expected {rows} or {2 * rows} rows of {others}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PaceError(f"`bias` is {tuple(bias.shape)}, expected [{weight.shape[0]}]")
    if (lora_a is None) != (lora_b is None):
        here, missing = ("lora_b", "lora_a") if lora_a is None else ("lora_a", "lora_b")
        raise PaceError(f"`{here}` is given without `{missing}`")
    if lora_a is not None:
        if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != weight.shape[1]:
            raise PaceError(f"`lora_a` is {tuple(lora_a.shape)}, expected [r, {weight.shape[1]}]")
        if lora_b.shape != (weight.shape[0], lora_a.shape[0]):
            raise PaceError(f"`lora_b` is {tuple(lora_b.shape)}, expected [{weight.shape[0]}, {lora_a.shape[0]}]")
    for name, tensor in given.items():
        if tensor is not None and tensor.device != hidden.device:
            raise PaceError(f"`{name}` is on {tensor.device}, expected {hidden.device} like `hidden`")
        if tensor is not None and name != "labels" and tensor.dtype != hidden.dtype:
            raise PaceError(f"`{name}` is of {tensor.dtype}, expected {hidden.dtype} like `hidden`")
    branches = hidden.shape[0] // rows
    labels = (F.pad(labels[:, 1:], (0, 1), value=ignore_index) if causal else labels).reshape(-1)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))).nonzero()
        if len(wrong):
            at = wrong[0].item()
            raise PaceError(f"`labels[{at}]` is {labels[at].item()}, expected 0 to {weight.shape[0] - 1} or the ignored label")
    return labels, branches


def _check_scale(scale: Any, has_lora: bool) -> None:
    if check_number("scale", scale) == 0:
        raise PaceError("`scale` is 0, with which no LoRA would learn")
    if scale != 1 and not has_lora:
        raise PaceError(f"`scale` is {scale}, and there is no LoRA: it is the factor on `lora_b·lora_a`")


def _check_class_weights(class_weights: Tensor, weight: Tensor) -> Tensor:
    """The weights of the tokens beside the head."""
    if class_weights.shape != weight.shape[:1]:
        raise PaceError(f"`class_weights` is {tuple(class_weights.shape)}, expected [{weight.shape[0]}]")
    check_dense("class_weights", class_weights)
    # On a GPU nobody waits for a look at them.
    if class_weights.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = class_weights[~((class_weights >= 0) & class_weights.isfinite())]
        if len(wrong):
            raise PaceError(f"`class_weights` has {wrong[0].item()}, expected finite and not negative ones")
    return class_weights.to(weight.device, real(weight.dtype))


def _of_mean(class_weights: Tensor, labels: Tensor, ignore_index: int, count: Tensor) -> Tensor:
    """Class weights by which a sum over `count` tokens, divided by it, is the weighted mean: both terms then have one denominator."""
    # On CUDA the loss ignores wrong labels too.
    taken = (labels != ignore_index) & (labels >= 0) & (labels < len(class_weights))
    total = torch.where(taken, class_weights[torch.where(taken, labels, 0)], 0).sum()
    return torch.where(total > 0, class_weights * (count / total), 0)


def _check_gram(gram: Any, weight: Tensor) -> None:
    shape, dtype = (weight.shape[1],) * 2, real(weight.dtype)
    if not isinstance(gram, Tensor) or tuple(gram.shape) != shape or gram.dtype != dtype or gram.device != weight.device:
        what = f"{tuple(gram.shape)} of {gram.dtype} on {gram.device}" if isinstance(gram, Tensor) else type(gram).__name__
        raise PaceError(f"`gram` is {what}, expected `lm_gram(weight)`, {shape} of {dtype} on {weight.device}")
    if weight.requires_grad:
        raise PaceError("`gram` is given for a `weight` that is trained, of which it would soon be wrong")
    check_dense("gram", gram)
    if gram.requires_grad:
        raise PaceError("`gram` requires a gradient, and has none")
