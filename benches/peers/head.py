"""The head of a language model with its loss: time, peak memory and error beside what people write by hand, and beside Liger's.

    python benches/peers/head.py                                              # hidden size 512, vocabulary 32768, 1024 tokens a branch
    python benches/peers/head.py --device cuda --hidden 4096 --vocabulary 128256 --tokens 8192 --dtype bf16

All rows are forward and backward, to the hidden states and, if the head is trained, its weight. Times are medians of rounds in which all
take turns; ratios are medians of the ratios of a round to the cross-entropy of one branch. The error is that of the gradient to the hidden
states against float64 (relative to its largest element), of the first tokens where that would not fit.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from loss_case import plain
from runners import DTYPES, TorchPeer, Unavailable, imported
from torch.utils.checkpoint import checkpoint

LAMBDA = 0.1
KINDS = ("squared_difference", "symmetric_kl", "jensen_shannon")
ONE = "cross-entropy of one branch, chunks"


def divergence_of(kind, first, second):
    return (first - second).square().sum(-1).mean() if kind == "squared_difference" else plain(kind, first, second)


def in_memory(kind):
    """All logits of both branches."""
    def loss(hidden, weight, labels):
        first, second = F.linear(hidden, weight).float().chunk(2)
        return F.cross_entropy(first, labels) + LAMBDA * divergence_of(kind, first, second)
    return loss


def in_chunks(kind, rows):
    """Some rows at a time, computed again in the backward pass; without a kind, the cross-entropy of branch 0."""
    def part(h0, h1, weight, labels):
        first = F.linear(h0, weight).float()
        loss = F.cross_entropy(first, labels)
        return loss if kind is None else loss + LAMBDA * divergence_of(kind, first, F.linear(h1, weight).float())

    def loss(hidden, weight, labels):
        h0, h1 = hidden.chunk(2)
        parts = zip(h0.split(rows), h1.split(rows), labels.split(rows))
        return sum(checkpoint(part, a, b, weight, c, use_reentrant=False) * (len(c) / len(labels)) for a, b, c in parts)
    return loss


def ours(kind, gram):
    pace = imported("pace_torch")
    def loss(hidden, weight, labels):
        if kind is None:
            return pace.lm_loss(hidden[: len(labels)], weight, labels).total
        return pace.lm_loss(hidden, weight, labels, LAMBDA, divergence=kind, gram=gram).total
    return loss


def liger(device):
    if device == "cpu":
        raise Unavailable("its kernels are CUDA only")
    function = imported("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    def loss(hidden, weight, labels):
        result = function(hidden[: len(labels)], weight, labels)
        return result[0] if isinstance(result, tuple) else result
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--chunk", type=int, default=128, help="rows of a chunk of what is written by hand")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, device = DTYPES[args.dtype], args.device
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    hidden = random(args.tokens, args.hidden)
    hidden = torch.cat([hidden, hidden + 0.05 * random(args.tokens, args.hidden)]).requires_grad_()
    weight = random(args.vocabulary, args.hidden) / args.hidden**0.5
    labels = torch.randint(args.vocabulary, (args.tokens,), generator=generator).to(device)
    pace = imported("pace_torch")
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {args.threads} threads, torch {torch.__version__}: hidden size {args.hidden}, "
          f"vocabulary {args.vocabulary}, {args.tokens} tokens in each branch, {args.dtype}")
    for trained in (False, True):
        head = weight.detach().clone().requires_grad_(trained)
        inputs = [hidden, head] if trained else [hidden]
        gram = None if trained else pace.lm_gram(head)
        makers = {(ONE, None): lambda: in_chunks(None, args.chunk), ("cross-entropy of one branch, ours", None): lambda: ours(None, None),
                  ("cross-entropy of one branch, Liger", None): lambda: liger(device)}
        for kind in KINDS:
            makers[f"{kind}, all logits", kind] = lambda kind=kind: in_memory(kind)
            makers[f"{kind}, chunks", kind] = lambda kind=kind: in_chunks(kind, args.chunk)
            makers[f"{kind}, ours", kind] = lambda kind=kind: ours(kind, gram if kind == "squared_difference" else None)
        peers = {}
        for (name, kind), make in makers.items():
            try:
                function = make()
            except Unavailable as why:
                print(f"{name}: {why}")
                continue
            peers[name] = kind, TorchPeer(
                device,
                forward=lambda x, function=function: function(hidden, head, labels),
                backward=lambda loss: torch.autograd.grad(loss, inputs),
                results=lambda loss, grads: {"dh": grads[0]},
            )
        errors = {name: error(kind, peer, hidden, head, labels) for name, (kind, peer) in peers.items()}
        times = {name: [] for name in peers}
        for _ in range(args.rounds):
            for name, (_, peer) in peers.items():
                times[name].append(sum(peer.times()))
        print(f"\n| {'trained' if trained else 'frozen'} head | ms | ratio | peak, MB | error |\n| --- | --- | --- | --- | --- |")
        for name, (_, peer) in peers.items():
            ratio = statistics.median(a / b for a, b in zip(times[name], times["cross-entropy of one branch, ours"]))
            print(f"| {name} | {1e3 * statistics.median(times[name]):.0f} | {ratio:.2f} | {peer.peak() / 1e6:.0f} | {errors[name]:.1e} |")


def error(kind, peer, hidden, head, labels):
    """Of the gradient to the hidden states; the reference is computed a chunk at a time."""
    exact, weight = hidden.detach().double().requires_grad_(), head.detach().double()
    want = torch.autograd.grad(in_exact_chunks(kind, exact, weight, labels), exact)[0]
    got = peer.outputs(None)["dh"].double()
    return ((got - want).abs().max() / want.abs().max()).item()


def in_exact_chunks(kind, hidden, weight, labels, rows=64):
    def part(h0, h1, labels):
        first = F.linear(h0, weight)
        loss = F.cross_entropy(first, labels, reduction="sum")
        return loss if kind is None else loss + LAMBDA * len(labels) * divergence_of(kind, first, F.linear(h1, weight))
    h0, h1 = hidden.chunk(2)
    parts = zip(h0.split(rows), h1.split(rows), labels.split(rows))
    return sum(checkpoint(part, *part_, use_reentrant=False) for part_ in parts) / len(labels)


if __name__ == "__main__":
    main()
