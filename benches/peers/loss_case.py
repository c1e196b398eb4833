"""The loss of two branches of logits, and its gradient."""

import dataclasses
import math

import official
import torch
import torch.nn.functional as F
from runners import (
    BRANCHES, COMPILED, DTYPES, EAGER, LAMBDA, OURS, RUST, TorchPeer, Unavailable, compiled_or_why_not, imported,
    no_worker,
)


@dataclasses.dataclass(frozen=True)
class Logits:
    classes: int
    batch: int = 64
    cpu_batch: int = 64
    divergence: str = "squared_difference"


def plain(divergence, first, second):
    """A divergence by PyTorch's own operators, a mean over samples."""
    p, q = F.log_softmax(first, -1), F.log_softmax(second, -1)
    if divergence == "symmetric_kl":
        terms = 0.5 * (p.exp() - q.exp()) * (p - q)
    else:
        middle = torch.logaddexp(p, q) - math.log(2)
        terms = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle))
    return terms.sum(-1).mean()


CROSS_ENTROPY = "cross-entropy, torch"
LIGER = "cross-entropy, Liger"
# As multiples of [B, C]: forward, backward; the logits are [2B, C].
LOSS_TRAFFIC = {
    # log-softmax     |     zeros and scatter, backward of log-softmax, zeros of branch 1 and their concatenation
    CROSS_ENTROPY: (2, 8),
    # log-softmax; difference; square; sum     |     that of cross-entropy; square; negation; sum in branch 0
    EAGER: (8, 15),
    COMPILED: (4, 4),
    # gradient in the forward pass, in place
    LIGER: (3, 4),
    # gradient in the forward pass; on CUDA scaled by that of the total, which begins with 1
    OURS: (4, 4),
}
# Above so many classes our CUDA kernels read the logits twice.
MOST_CLASSES_IN_ONE_LAUNCH = 4096


class LossCase:
    z = None

    def __init__(self, shape, dtype, device, batch, threads, worker):
        self.shape, self.dtype, self.device, self.batch = shape, dtype, device, batch
        rng = torch.Generator().manual_seed(0)
        logits = torch.randn(2 * batch, shape.classes, generator=rng)
        self.logits = logits.to(device, DTYPES[dtype]).requires_grad_()
        self.labels = torch.randint(shape.classes, (batch,), generator=rng).to(device)
        self.title = f"{BRANCHES}x{batch} samples, {shape.classes} classes, {shape.divergence}, {dtype}"
        self.operators = {
            "loss": {
                EAGER: lambda: self.peer(self.official),
                COMPILED: lambda: self.peer(compiled_or_why_not(self.official)),
                OURS: self.ours,
                CROSS_ENTROPY: lambda: self.peer(self.cross_entropy, noisy=False),
                LIGER: self.liger,
                RUST: no_worker,
            }
        }

    def official(self, logits):
        first, second = logits.chunk(2)
        if self.shape.divergence != "squared_difference":
            return F.cross_entropy(first, self.labels) + LAMBDA * plain(self.shape.divergence, first, second)
        return official.losses(first, self.labels, second, LAMBDA).total

    def cross_entropy(self, logits):
        return F.cross_entropy(logits[: self.batch], self.labels)

    def peer(self, function, x=None, noisy=True, logits=None):
        """`noisy` is whether the consistency term is in the loss."""
        logits = self.logits if logits is None else logits
        x = x or (lambda: logits)

        def forward(logits):
            return logits, function(logits)

        return TorchPeer(
            self.device,
            forward=forward,
            backward=lambda state: torch.autograd.grad(state[1], state[0]),
            results=lambda state, grads: {"loss": state[1], "dlogits": grads[0]},
            x=x,
            noisy=noisy,
        )

    def reference(self, op, noisy):
        logits = self.logits.detach().double().requires_grad_()
        return self.peer(self.official if noisy else self.cross_entropy, noisy=noisy, logits=logits).outputs(None)

    def bytes_per_output(self, op, peer):
        if self.shape.divergence != "squared_difference":
            return None
        forward, backward = LOSS_TRAFFIC[peer]
        if peer == OURS:
            if self.device == "cpu" and self.dtype != "f32":
                return None  # 16-bit types go through f32 there, which is not counted.
            if self.device == "cpu":
                backward = 0
            if self.device == "cuda" and self.shape.classes > MOST_CLASSES_IN_ONE_LAUNCH:
                forward += 2
        return [DTYPES[self.dtype].itemsize * count / 2 for count in (forward, backward)]

    def ours(self):
        pace = imported("pace_torch")
        return self.peer(lambda logits: pace.pace_loss(logits, self.labels, LAMBDA, divergence=self.shape.divergence).total)

    def liger(self):
        if self.device == "cpu":
            raise Unavailable("its kernels are CUDA only")
        liger = imported("liger_kernel.transformers.functional")
        # It writes the gradient over its input, so every iteration gets a copy, made before the clock starts.
        copy = lambda: self.logits.detach().clone().requires_grad_().view_as(self.logits)
        return self.peer(lambda x: liger.liger_cross_entropy(x[: self.batch], self.labels), copy, noisy=False)
