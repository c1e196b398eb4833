"""The errors of the CPU operators and of PyTorch's own, on the same data against float64: the tables of `docs/numerics.md`.

    PYTHONPATH=python/src python benches/peers/numerics.py             # writes them; a minute on one thread
    PYTHONPATH=python/src python benches/peers/numerics.py --print     # only prints them

PyTorch's row is the formula by its own operators, in the tensors' type, without compilation; in float64 that is the reference as well.
"""

import argparse
import math
import pathlib

import official
import torch
import torch.nn.functional as F
from layer_case import LORA_ADD, LORA_MUL, Layer, LayerCase
from runners import BRANCHES, DTYPES, EAGER, OURS, imported

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs/numerics.md"
TYPES = ("f32", "bf16")
# Digits of the significand, and the exponent of the smallest normal number.
UNITS = {"f32": (24, -126), "bf16": (8, -126)}
# How much worse than PyTorch is marked: so many times, and more than a rounding.
MARKED = 2
LAMBDA = 0.3


def errors(dtype, got, exact):
    """Largest and mean error in units in the last place. An element counts as large as at least the root mean square of all."""
    digits, smallest = UNITS[dtype]
    exact = exact.double()
    typical = exact.square().mean().sqrt()
    # `frexp` has significands from 1/2 to 1.
    exponent = torch.frexp(torch.maximum(exact.abs(), typical)).exponent - 1
    unit = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=smallest) + 1 - digits)
    error = (got.double().reshape(exact.shape) - exact).abs() / unit
    assert error.isfinite().all()
    return error.max().item(), error.mean().item()


def digits(value):
    if value == 0:
        return "0"
    return f"{value:.0e}" if value < 0.001 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def row(result, dtype, size, unfused, ours):
    ratio = ours[0] / unfused[0] if ours[0] else 0
    mark = " ⚠" if ratio > MARKED and ours[0] > 1 else ""
    cell = lambda errors: " / ".join(map(digits, errors))
    return f"| {result} | {dtype} | {size} | {cell(unfused)} | {cell(ours)} | {digits(ratio)}{mark} |"


def rows_of(dtype, size, exact, unfused, ours, prefix=""):
    for name in exact:
        unit = "f32" if name == "total" else dtype
        note = f" of {dtype}" if unit != dtype else ""
        yield row(prefix + name + note, unit, size, errors(unit, unfused[name], exact[name]), errors(unit, ours[name], exact[name]))


def random(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return lambda scale, *shape: torch.randn(shape, generator=generator).mul_(scale).to(DTYPES[dtype])


def evaluate(function, inputs, trained, dy, output):
    """A function's output and its gradients to the trained inputs."""
    inputs = {name: value.detach().clone().requires_grad_(name in trained) for name, value in inputs.items()}
    y = function(**inputs)
    grads = torch.autograd.grad(y, [inputs[name] for name in trained], dy)
    return {output: y.detach(), **{f"d{name}": grad for name, grad in zip(trained, grads)}}


def compare(dtype, size, unfused, ours, inputs, trained, dy=None, output="y", prefix=""):
    """Rows of a function by PyTorch's operators and of ours. A `total` is f32 whatever the tensors are."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = evaluate(unfused, wide, trained, None if dy is None else dy.double(), output)
    of = lambda function: evaluate(function, inputs, trained, dy, output)
    return rows_of(dtype, size, exact, of(unfused), of(ours), prefix)


LAYERS = [(64, 64), (768, 768), (4096, 256)]
TOKENS = 197


def noisy_linear():
    pace = imported("pace_torch")

    def formula(x, W0, b0, ΔW, Δb, z):
        return F.linear(x, W0, b0) + z.unsqueeze(1) * F.linear(x, ΔW, Δb)

    for k, n in LAYERS:
        for dtype in TYPES:
            normal = random(0, dtype)
            inputs = dict(x=normal(1, BRANCHES, TOKENS, k), W0=normal(k**-0.5, n, k), b0=normal(0.1, n), ΔW=normal(0.1 * k**-0.5, n, k),
                          Δb=normal(0.1, n), z=1 + normal(1, BRANCHES, n))
            dy = normal(1, BRANCHES, TOKENS, n)
            for exact, name in ((True, ""), (False, " (folded)")):
                def ours(x, W0, b0, ΔW, Δb, z):
                    return pace.ops.noisy_linear(x, W0, b0, ΔW, Δb, pace.Noise(z=z, branches=BRANCHES), exact=exact)
                # A given z is f32.
                for line in compare(dtype, f"{k} × {n}", formula, ours, inputs, ("x", "ΔW", "Δb"), dy):
                    result = line.split(" | ")[0]
                    # Weights' gradients do not depend on it.
                    if exact or result in ("| y", "| dx"):
                        yield line.replace(result, result + name, 1)


def layers(operator):
    for k, n in LAYERS:
        for dtype in TYPES:
            case = LayerCase(Layer(TOKENS, k, n), dtype, "cpu", 1, 1, None)
            outputs = [case.operators[operator][peer]().outputs(case.z) for peer in (EAGER, OURS)]
            yield from rows_of(dtype, f"{k} × {n}", case.reference(operator, True), *outputs)


def weights():
    ops = imported("pace_torch").ops
    for n, k, r in [(64, 64, 10), (768, 768, 10), (768, 768, 64), (256, 4096, 10)]:
        for dtype in TYPES:
            normal, size = random(0, dtype), f"{k} × {n}, {r}"
            weight = dict(A=normal(k**-0.5, r, k), B=normal(0.1, n, r), W0=normal(k**-0.5, n, k))
            bias = dict(W0=weight["W0"], b0=normal(0.1, n), Pd=normal(0.1, k, r), Pu=normal(r**-0.5, r, 1), δb=normal(0.1, n))
            yield from compare(dtype, size, lambda A, B, W0: W0 * (B @ A), lambda A, B, W0: ops.low_rank_weight(A, B, W0), weight, ("A", "B"),
                               normal(1, n, k), prefix="ΔW: ")
            yield from compare(dtype, size, lambda W0, b0, Pd, Pu, δb: (W0 @ (Pd @ Pu)).squeeze(-1) + b0 * δb, ops_prompt(ops), bias,
                               ("Pd", "Pu", "δb"), normal(1, n), prefix="Δb: ")


def ops_prompt(ops):
    return lambda W0, b0, Pd, Pu, δb: ops.prompt_bias(W0, b0, Pd, Pu, δb)


def noisy_epilogue():
    pace = imported("pace_torch")
    for tokens, channels in [(4, 768), (197, 768), (197, 4096)]:
        for dtype in TYPES:
            normal = random(0, dtype)
            inputs = dict(y=normal(1, BRANCHES, tokens, channels), a=normal(0.1, BRANCHES, tokens, channels), z=1 + normal(1, BRANCHES, channels))
            ours = lambda y, a, z: pace.ops.noisy_epilogue(y, a, pace.Noise(z=z, branches=BRANCHES))
            yield from compare(dtype, f"{tokens} × {channels}", lambda y, a, z: y + z.unsqueeze(1) * a, ours, inputs, ("a",),
                               normal(1, BRANCHES, tokens, channels))


def drop_path():
    ops = imported("pace_torch").ops
    for batch, features in [(10, 768), (64, 4096)]:
        for dtype in TYPES:
            normal = random(0, dtype)
            mask = (torch.arange(batch) % 3 > 0).float()
            module = official.SharedDropPath(1 / 3).train()
            module.branches, module.mask = BRANCHES, mask
            ours = lambda x: ops.drop_path(x, None, 1 / 3, mask=mask.to(torch.float64 if x.dtype == torch.float64 else torch.float32), branches=BRANCHES)
            yield from compare(dtype, f"{batch} × {features}", module, ours, dict(x=normal(1, BRANCHES * batch, features)), ("x",),
                               normal(1, BRANCHES * batch, features))


def divergence(kind, first, second, temperature=1.0):
    """By PyTorch's own operators, of each sample."""
    far = first - second
    if kind == "squared_difference":
        return far.square().sum(-1)
    if kind == "mean_squared_difference":
        return far.square().mean(-1)
    if kind == "centered_squared_difference":
        return (far - far.mean(-1, keepdim=True)).square().sum(-1)
    p, q = F.log_softmax(first / temperature, -1), F.log_softmax(second / temperature, -1)
    kl = lambda to, of: F.kl_div(of, to, reduction="none", log_target=True).sum(-1)
    if kind == "kl":
        return temperature**2 * kl(q, p)
    if kind == "symmetric_kl":
        return 0.5 * (kl(p, q) + kl(q, p))
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (kl(p, middle) + kl(q, middle))


def losses():
    """Each divergence with labels, and the paper's with every other criterion and with a history."""
    pace = imported("pace_torch")
    labels_of = lambda classes, batch: torch.arange(batch) * 7919 % classes
    for classes in (10, 1000, 32768):
        for dtype in TYPES:
            batch, normal = 16, random(0, dtype)
            logits, labels = normal(1, BRANCHES * batch, classes), labels_of(classes, batch)
            class_weights = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.25
            soft = random(2, "f32")(2, batch, classes).softmax(-1)
            history = random(3, "f32")(1, batch, classes)
            paper = "squared_difference"
            cases = [(kind, labels, dict(divergence=kind), F.cross_entropy) for kind in pace.settings.DIVERGENCES]
            cases += [
                ("kl, T = 2", labels, dict(divergence="kl", temperature=2.0), F.cross_entropy),
                ("class weights", labels, dict(class_weights=class_weights), lambda l, t: F.cross_entropy(l, t, class_weights.to(l))),
                ("smoothing 0.1", labels, dict(label_smoothing=0.1), lambda l, t: F.cross_entropy(l, t, label_smoothing=0.1)),
                ("probabilities", soft, {}, lambda l, t: F.cross_entropy(l, t.to(l))),
                ("squared error", soft, dict(criterion="mean_squared_error"), lambda l, t: F.mse_loss(l, t.to(l))),
                ("history", labels, dict(history=history), F.cross_entropy),
            ]
            for name, targets, options, criterion in cases:
                kind, temperature = options.get("divergence", paper), options.get("temperature", 1.0)
                given = logits[:batch] if "history" in options else logits

                def formula(logits):
                    first = logits[:batch]
                    second = history.to(first) if "history" in options else logits[batch:]
                    return criterion(first, targets) + LAMBDA * divergence(kind, first, second, temperature).mean()

                def ours(logits):
                    more = {"index": torch.arange(batch), **options, "history": history.clone()} if "history" in options else options
                    return pace.pace_loss(logits, targets, LAMBDA, **more).total

                yield from compare(dtype, str(classes), formula, ours, dict(logits=given), ("logits",), output="total", prefix=f"{name}: ")


def lm_head():
    pace = imported("pace_torch")
    for hidden_size, classes in [(64, 1000), (512, 8192)]:
        for dtype in TYPES:
            tokens, normal = 32, random(0, dtype)
            hidden = normal(1, tokens, hidden_size)
            inputs = dict(h=torch.cat([hidden, hidden + 0.05 * normal(1, tokens, hidden_size)]), W=normal(hidden_size**-0.5, classes, hidden_size))
            labels = torch.arange(tokens) * 7919 % classes
            for kind in ("squared_difference", "symmetric_kl", "jensen_shannon"):
                def formula(h, W):
                    logits = F.linear(h, W)
                    # As models do it.
                    logits = logits if logits.dtype == torch.float64 else logits.float()
                    return F.cross_entropy(logits[:tokens], labels) + LAMBDA * divergence(kind, logits[:tokens], logits[tokens:]).mean()

                def ours(h, W):
                    return pace.lm_loss(h, W, labels, LAMBDA, divergence=kind).total

                yield from compare(dtype, f"{hidden_size} × {classes}", formula, ours, inputs, ("h", "W"), output="total", prefix=f"{kind}: ")


def norms():
    """They are f64 whatever the tensors are, and count in units of the tensors' type."""
    ops = imported("pace_torch").ops
    for samples, features in [(4, 1000), (64, 4096)]:
        for dtype in TYPES:
            normal = random(0, dtype)
            a, b = normal(1, samples, features), normal(1, samples, features)
            # Squares of both types, and of their differences but for one rounding of float64, are exact there.
            exact = lambda values: math.fsum(values.double().square().flatten().tolist())
            unfused = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)]))
            distance = (a - b).square().sum(-1).mean()
            wide = [math.sqrt(exact(a) + exact(b)), exact(a.double() - b.double()) / samples]
            ours = ops.grad_norm([a, b]), ops.fp_distance(a, b)
            for name, want, theirs, got in zip(("gradient norm", "FP-distance"), wide, (unfused, distance), ours):
                want = torch.tensor(want, dtype=torch.float64)
                yield row(name, dtype, f"{samples} × {features}", errors(dtype, theirs, want), errors(dtype, got, want))


TABLES = {
    "noisy_linear": ("K × N", noisy_linear),
    "low_rank_linear": ("K × N", lambda: layers(LORA_ADD)),
    "lora_mul_linear": ("K × N", lambda: layers(LORA_MUL)),
    "weights": ("K × N, rank", weights),
    "noisy_epilogue": ("tokens × channels", noisy_epilogue),
    "drop_path": ("samples × features", drop_path),
    "loss": ("classes", losses),
    "lm_head": ("hidden size × classes", lm_head),
    "norms": ("samples × features", norms),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("tables", nargs="*", help=f"some of {', '.join(TABLES)}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.tables or TABLES:
        size, lines = TABLES[name]
        text = "\n".join([f"| result | type | {size} | PyTorch | ours | ratio |", "|---|---|---|---|---|---|", *lines()]) + "\n"
        if args.print:
            print(f"{name}\n\n{text}")
            continue
        document = DOCS.read_text()
        begin = f"<!-- CPU {name}: python benches/peers/numerics.py -->\n"
        start = document.index(begin) + len(begin)
        DOCS.write_text(document[:start] + text + document[document.index("<!--", start):])


if __name__ == "__main__":
    main()
