"""Calibration, and intervals of means."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

BINS = 15


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """`[3, bins]`, float64: how many samples have their highest probability in ((b-1)/bins, b/bins], the sum of these probabilities,
    and how many of the samples are right. `probabilities [n, C]`, `labels [n]`."""
    confidence, predicted = probabilities.double().max(1)
    of_bin = (confidence * bins).ceil().long().clamp(1, bins) - 1
    parts = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).double()])
    return torch.zeros(3, bins, dtype=torch.float64).index_add_(1, of_bin, parts)


def calibration_error(reliability: Tensor) -> float:
    """The expected calibration error: the mean over samples of |accuracy − mean confidence| of their bin."""
    count, confidence, right = reliability
    return float((right - confidence).abs().sum() / count.sum())


def t_probability(t: float, freedom: int) -> float:
    """The probability that |x| is below `t` for Student's distribution, by Simpson's rule."""
    steps = 400
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = [(1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    return 2 * scale * t / steps / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))


@cache
def t_quantile(freedom: int, probability: float = 0.95) -> float:
    """The `t` below which |x| is with this probability."""
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
    return high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN for the width of one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, t_quantile(n - 1) * deviation / math.sqrt(n)
