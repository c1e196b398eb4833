"""The head of a language model with its loss, without the logits of all tokens in memory.

One call of the library on CPUs in float32 and float64; elsewhere PyTorch's own matmuls and the fused loss, some rows at a time. The forward
pass computes the gradients, so that no logits are kept.
"""

import dataclasses
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library as lib
from ._errors import PaceError, check_choice, check_integer, check_number
from .loss import Losses
from .ops._arguments import real
from .ops.lm_head import HeadSettings, lm_head, takes
from .ops.loss import LossSettings, loss_and_gradient
from .settings import DIVERGENCES, OF_PROBABILITIES, Denominator, LossOptions, check_denominator

# Logits of a branch that are in memory at a time, about.
_LOGITS = 1 << 26
_NOT_HERE = ("criterion", "class_weights", "labelled_only")
OPTIONS = tuple(field.name for field in dataclasses.fields(LossOptions) if field.name not in (*_NOT_HERE, "lambda_"))


def lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lambda_: float = 1.0,
    *,
    bias: Optional[Tensor] = None,
    causal: bool = False,
    logit_scale: float = 1.0,
    soft_cap: Optional[float] = None,
    gram: Optional[Tensor] = None,
    chunk_rows: Optional[int] = None,
    denominator: Denominator = None,
    **options: Any,
) -> Losses:
    """`pace_loss` of the logits `a·(h·Wᵀ + b)`, or `cap·tanh` of them over `cap`, of tokens that have labels: the same value, and gradients to
    `hidden`, `weight [V, H]` and `bias [V]`.

    * `hidden` `[branches·B, T, H]` for `labels` `[B, T]`, or `[branches·M, H]` for `[M]`; branch 0 first, of 1 or 2. `causal`: the label of a
      token is the next one's (of `[B, T]` only).
    * `logit_scale` is a, `soft_cap` cap.
    * `gram`: `lm_gram(weight)` of a weight that does not change, for squared differences, which then need no logits of branch 1.
    * `chunk_rows`: rows of a branch whose logits are in memory at a time.
    * `options` are those of `LossOptions` but `criterion`, `class_weights` and `labelled_only`: tokens without a label take part in nothing.
      `denominator` is that of `pace_loss`.

    The logits in `Losses` are empty. Differentiable once. Raises `PaceError` for wrong shapes, types and options, and on the CPU for
    wrong labels; for those on CUDA see `Losses.check`, whose positions are counted from the first row of a chunk.
    """
    for name in _NOT_HERE:
        if name in options:
            raise PaceError(f"`{name}` is not for `lm_loss`: a cross-entropy of the tokens that have labels")
    for name in options:
        if name not in OPTIONS:
            raise PaceError(f"`{name}` is no option, expected one of {', '.join(OPTIONS)}")
    checked = LossOptions(lambda_, labelled_only=True, **options)
    labels, branches = _check(hidden, weight, labels, bias, check_choice("causal", causal, (True, False)), checked.ignore_index)
    if check_number("logit_scale", logit_scale) == 0:
        raise PaceError("`logit_scale` is 0")
    if soft_cap is not None and check_number("soft_cap", soft_cap, 0) == 0:
        raise PaceError("`soft_cap` is 0, expected more than 0, or None")
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows, 1)
    by_gram = branches == 2 and checked.divergence not in OF_PROBABILITIES and not checked.both_branches and soft_cap is None
    if gram is not None:
        _check_gram(gram, weight)
    head = _Head(checked, branches, by_gram, float(logit_scale), soft_cap, chunk_rows or 0)
    denominator = check_denominator(denominator)
    if denominator is None:
        # Where there are none the sums are 0.
        denominator = (labels != checked.ignore_index).sum().clamp(min=1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    total, classification, consistency, status = _LmHead.apply(flat, weight, bias, labels, gram, denominator, head)
    empty = hidden.new_empty(0, weight.shape[0])
    return Losses(total, classification, consistency, status, weight.shape[0], 0, empty)


@torch.no_grad()
def lm_gram(weight: Tensor) -> Tensor:
    """`G = WᵀW [H, H]` in float32 (float64 beside float64): in 16 bits it would be useless, and even negative."""
    rows = max(_LOGITS // weight.shape[1], 1)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=real(weight.dtype), device=weight.device)
    for part in weight.detach().split(rows):
        part = part.to(gram.dtype)
        gram.addmm_(part.t(), part)
    return gram


class _Head(NamedTuple):
    options: LossOptions
    branches: int
    by_gram: bool
    scale: float
    cap: Optional[float]
    rows: int

    def settings(self, difference: bool = False) -> LossSettings:
        """What the fused loss is told of sums over tokens that have labels."""
        options = self.options
        return LossSettings(
            float(options.lambda_), float(options.label_smoothing), options.ignore_index, DIVERGENCES[options.divergence],
            float(options.temperature), options.detach_target, options.both_branches, True, lib.TARGETS_LABELS, 1.0, difference,
        )


class _Grads(NamedTuple):
    """Of the sums, not yet divided; None where they are not wanted."""

    hidden: Optional[Tensor]
    weight: Optional[Tensor]
    bias: Optional[Tensor]


class _LmHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, gram, denominator, head):
        values, grads, status = _evaluate(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), labels, gram, head,
                                          ctx.needs_input_grad[:3])
        values = values / denominator
        ctx.denominator, ctx.grads = denominator, grads
        outputs = values[0].clone(), values[1].clone(), values[2].clone(), status
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, dtotal, *_):
        # `once_differentiable` says so only of a `dtotal` with a graph; without one the gradients would pass for constants.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise PaceError("`lm_loss` is differentiable once, and `create_graph=True` asks for more")
        factor = dtotal / ctx.denominator
        return *(None if grad is None else (factor * grad).to(grad.dtype) for grad in ctx.grads), None, None, None, None


def _evaluate(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, gram: Optional[Tensor], head: _Head, wanted: tuple[bool, ...]
) -> tuple[Tensor, _Grads, Tensor]:
    """The sums of total, criterion and divergence, `[3]`; their gradients; the status of each chunk."""
    exact = real(hidden.dtype)
    rows = hidden.shape[0] // head.branches
    if takes((hidden, weight, bias, labels)):
        settings = HeadSettings(head.settings(), head.branches, head.scale, float(head.cap or 0), head.rows, wanted)
        values, grads = lm_head(hidden, labels, weight, bias, gram if head.by_gram else None, settings)
        return values, _Grads(*grads), labels.new_empty(0)
    h0, h1 = hidden[:rows], hidden[rows:]
    grads = _Grads(
        torch.zeros_like(hidden) if wanted[0] else None,
        torch.zeros_like(weight, dtype=exact) if wanted[1] else None,
        torch.zeros_like(bias, dtype=exact) if wanted[2] else None,
    )
    values, statuses = torch.zeros(3, dtype=exact, device=hidden.device), []
    step = head.rows or max(_LOGITS // weight.shape[0], 1)
    for first in range(0, rows, step):
        at = slice(first, first + step)
        sums, status = _chunk(h0[at], h1[at], weight, bias, labels[at], head, grads, first, rows)
        values += sums
        statuses.append(status)
    if head.by_gram:
        # Rounded to 16 bits a Gram matrix can have negative distances.
        with torch.autocast(hidden.device.type, enabled=False):
            distance = _distance(h0, h1, weight, labels, gram, head, grads)
        values[2] += distance
        values[0] += head.options.lambda_ * distance
    likes = (hidden, weight, bias)
    grads = _Grads(*(None if grad is None else grad.to(like.dtype) for grad, like in zip(grads, likes)))
    return values, grads, torch.cat(statuses)


def _chunk(h0, h1, weight, bias, labels, head: _Head, grads: _Grads, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """The sums of some rows by their logits, of branch 0 alone if the Gram matrix does the rest; adds to the gradients."""
    scale, cap = head.scale, head.cap
    two = head.branches == 2 and not head.by_gram

    def logits_of(h: Tensor, bias: Optional[Tensor]) -> Tensor:
        logits = F.linear(h, weight, bias)
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    logits = logits_of(h0, bias)
    if two:
        # As what it is where that is linear: a difference of rounded logits has lost its digits.
        other = logits_of(h1, bias) if cap is not None else logits_of((h0.to(real(h0.dtype)) - h1).to(h0.dtype), None)
        logits = torch.cat([logits, other])
    # The operator takes float16 in float32: its gradient would lose small values.
    given = logits.float() if logits.dtype == torch.float16 else logits
    values, gradient, status = loss_and_gradient(given, labels, None, None, None, head.settings(two and cap is None))
    if cap is not None:
        gradient = gradient * (1 - (given / cap) ** 2)
    gradient = (gradient if scale == 1 else gradient * scale).to(logits.dtype)
    for branch, (h, g) in enumerate(zip((h0, h1), gradient.split(len(h0)))):
        if grads.hidden is not None:
            start = branch * rows + first
            grads.hidden[start : start + len(h)] += g @ weight
        if grads.weight is not None:
            grads.weight.add_(g.t() @ h)
        if grads.bias is not None:
            grads.bias.add_(g.sum(0, dtype=grads.bias.dtype))
    return values, status


def _distance(h0, h1, weight, labels, gram, head: _Head, grads: _Grads) -> Tensor:
    """`Σ a²·Δh·G·Δhᵀ` of the rows that have labels, for squared differences; adds λ times its gradients."""
    options, exact = head.options, real(h0.dtype)
    gram, means = lm_gram(weight) if gram is None else gram, None
    if options.divergence == "centered_squared_difference":
        means = weight.mean(0, dtype=exact)
        gram = gram - weight.shape[0] * torch.outer(means, means)
    scale = head.scale**2 / (weight.shape[0] if options.divergence == "mean_squared_difference" else 1)
    total, rows = torch.zeros((), dtype=exact, device=h0.device), len(h0)
    moment = torch.zeros_like(gram) if grads.weight is not None else None
    step = max(_LOGITS // h0.shape[1], 1)
    for first in range(0, rows, step):
        at = slice(first, first + step)
        takes_part = (labels[at] != options.ignore_index).unsqueeze(1)
        delta = torch.where(takes_part, h0[at].to(exact) - h1[at].to(exact), 0)
        product = delta @ gram
        total += scale * (product * delta).sum()
        if grads.hidden is not None:
            pull = (2 * options.lambda_ * scale) * product
            grads.hidden[first : first + len(delta)] += pull
            grads.hidden[rows + first : rows + first + len(delta)] -= pull
        if moment is not None:
            moment.addmm_(delta.t(), delta)
    if moment is not None:
        # (W − 1·w̄ᵀ)·S for centred differences.
        moment *= 2 * options.lambda_ * scale
        grads.weight.add_((weight.to(exact) - (0 if means is None else means)) @ moment)
    return total


def _check(hidden, weight, labels, bias, causal: bool, ignore_index: int) -> tuple[Tensor, int]:
    """The label of each row of a branch, and how many branches there are."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "bias"):
            raise PaceError(f"`{name}` is {type(tensor).__name__}, expected a tensor")
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
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
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


def _check_gram(gram: Any, weight: Tensor) -> None:
    shape, dtype = (weight.shape[1],) * 2, real(weight.dtype)
    if not isinstance(gram, Tensor) or tuple(gram.shape) != shape or gram.dtype != dtype or gram.device != weight.device:
        what = f"{tuple(gram.shape)} of {gram.dtype} on {gram.device}" if isinstance(gram, Tensor) else type(gram).__name__
        raise PaceError(f"`gram` is {what}, expected `lm_gram(weight)`, {shape} of {dtype} on {weight.device}")
    if weight.requires_grad:
        raise PaceError("`gram` is given for a `weight` that is trained, of which it would soon be wrong")
