"""Residual branches that are dropped: for a sample in both branches of PACE alike."""

from torch import Tensor, nn

from .controller import Pace
from .modules import _is_traced, _refused


class SharedDropPath(nn.Module):
    """DropPath that drops the same samples in both branches, and divides its mask by the mean over the global batch."""

    def __init__(self, drop_prob: float, pace: Pace, layer: int):
        super().__init__()
        self.drop_prob, self.layer = drop_prob, layer
        self.__dict__["pace"] = pace

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.pace.training or self.drop_prob == 0:
            return x
        if _is_traced(x):
            return _refused(x)
        self.pace.check_running()
        return self.pace.drop_path(self.layer, self.drop_prob, x)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:0.3f}, layer={self.layer}"


class SameInBranches(nn.Module):
    """A DropPath of another library (torchvision's `StochasticDepth`, Hugging Face's `SwinDropPath`): what it draws for a sample holds in
    both branches. It draws, and scales, as it always does."""

    def __init__(self, drop_path: nn.Module, pace: Pace):
        super().__init__()
        self.drop_path = drop_path
        self.__dict__["pace"] = pace

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.pace.training or self.pace.branches == 1:
            return self.drop_path(x)
        if _is_traced(x):
            return _refused(x)
        self.pace.check_running()
        return x * self.drop_path(self.pace.ones_of_a_branch(x)).repeat(self.pace.branches, *[1] * (x.dim() - 1))
