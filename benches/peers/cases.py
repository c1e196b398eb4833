"""What `peers.py` compares: shapes, inputs, the operators, and everyone who computes them.

A case is a shape and a dtype. It maps each operator to its peers, by name, as functions that build one; a peer that
cannot take part raises `Unavailable` with the reason. Every peer has

    times()    one iteration with fresh noise: seconds of the forward and of the backward pass
    outputs()  one iteration with the noise of the case: outputs and gradients by name
    noisy      whether noise takes part in its outputs

Outputs and gradients are newly allocated in every iteration, as a training step does.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import tempfile
import time

import numpy as np
import official
import timm
import torch
import torch.nn.functional as F
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[2]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
BRANCHES = 2
RANK = 10
# Block 1 of a 13-block model, the official default: the strongest noise there is in it.
SIGMA = 1.0
LAMBDA = 1.0

EAGER, COMPILED = "official, eager", "official, torch.compile"
OURS, CAPTURED, RUST = "ours, PyTorch", "ours, captured as a graph", "ours, Rust"
PEFT = "PEFT LoRA, no noise"


class Unavailable(Exception):
    """Why a peer cannot take part."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer in a model. `batch` is samples per branch, `cpu_batch` the smaller number that a CPU gets."""

    tokens: int
    in_features: int
    out_features: int
    batch: int = 64
    cpu_batch: int = 4


@dataclasses.dataclass(frozen=True)
class Logits:
    classes: int
    batch: int = 64
    cpu_batch: int = 64


@dataclasses.dataclass(frozen=True)
class Model:
    """A timm model that is trained for one step on images of 224 px.

    With `autocast` the parameters are f32, and 16-bit types are those of autocast.
    """

    name: str
    classes: int = 100
    batch: int = 64
    cpu_batch: int = 4
    autocast: bool = False


SHAPES = {
    "vit_b_proj": Layer(197, 768, 768),
    "vit_b_qkv": Layer(197, 768, 2304),
    "vit_b_fc1": Layer(197, 768, 3072),
    "vit_b_fc2": Layer(197, 3072, 768),
    "swin_b_first": Layer(3136, 128, 512),
    "swin_b_last": Layer(49, 1024, 4096),
    "llm": Layer(1024, 4096, 4096, batch=2, cpu_batch=1),
    "loss_100": Logits(100),
    "loss_1000": Logits(1000),
    "loss_32768": Logits(32768),
    "vit_b_step": Model("vit_base_patch16_224"),
    "vit_b_autocast": Model("vit_base_patch16_224", autocast=True),
    "vit_tiny_step": Model("vit_tiny_patch16_224"),
}


def build(name, dtype, device, batch, threads, worker):
    shape = SHAPES[name]
    batch = batch or (shape.cpu_batch if device == "cpu" else shape.batch)
    kind = {Layer: LayerCase, Logits: LossCase, Model: StepCase}[type(shape)]
    return kind(shape, dtype, device, batch, threads, worker)


def imported(name):
    try:
        return __import__(name, fromlist=["_"])
    except (ImportError, OSError) as error:
        raise Unavailable(f"not installed: {error}") from error


class TorchPeer:
    """A peer in this process. `forward(x)` gives what `backward` takes; `results` names what they made."""

    # A captured graph holds its memory all the time.
    has_peak = True

    def __init__(self, device, forward, backward, results, x=None, noisy=True, set_noise=lambda z: None):
        self.device, self.forward, self.backward, self.results = device, forward, backward, results
        self.x = x or (lambda: None)
        self.noisy, self.set_noise = noisy, set_noise

    def times(self):
        x = self.x()
        marks = [mark(self.device)]
        state = self.forward(x)
        marks.append(mark(self.device))
        kept = self.backward(state)
        marks.append(mark(self.device))
        if self.device == "cpu":
            seconds = marks[1] - marks[0], marks[2] - marks[1]
        else:
            torch.cuda.synchronize()
            seconds = tuple(a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:]))
        del kept
        return seconds

    def outputs(self, z):
        self.set_noise(z if self.noisy else None)
        state = self.forward(self.x())
        results = self.results(state, self.backward(state))
        self.set_noise(None)
        return {name: value.detach() for name, value in results.items()}

    def peak(self):
        """Peak memory of an iteration in bytes, less what was held before it."""
        self.times()
        if self.device == "cpu":
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = process_bytes("VmRSS")
            self.times()
            return max(process_bytes("VmHWM") - before, 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.times()
        return torch.cuda.max_memory_allocated() - before


def mark(device):
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def process_bytes(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


# ------------------------------------------------------------------------------------------------------------- layers

FROZEN, LORA_ADD, LORA_MUL = "frozen", "lora_add", "lora_mul_vpt"
# What is trained, and its official name.
LORA = {"down": "delta_W_down", "up": "delta_W_up", "delta_bias": "delta_b"}
PROMPT = {"prompt_down": "delta_prompt_down", "prompt_up": "delta_prompt_up"}
TRAINED = {FROZEN: {}, LORA_ADD: LORA, LORA_MUL: LORA | PROMPT}

# Bytes that an operator's kernels read and write, as multiples of [M, N], [M, K] and [N, K]: forward, backward. A
# product reads both factors and writes its result once, an element-wise kernel every operand. Tensors of rank r and
# noise of one value per sample and channel are not counted. The row of torch.compile has every element-wise chain in
# one kernel.
TRAFFIC = {
    FROZEN: {"torch": [(1, 1, 1), (1, 1, 1)], RUST: [(1, 1, 1), (1, 1, 1)]},
    LORA_ADD: {
        # base; s; s·Dᵀ; z⊙; +     |     z⊙g; ds, dD, dδb; dx in two parts and their sum, dU
        EAGER: [(7, 2, 1), (6, 6, 1)],
        COMPILED: [(5, 2, 1), (5, 6, 1)],
        # scale instead of z, and no δb
        PEFT: [(7, 2, 1), (5, 6, 1)],
        # one kernel     |     one pass over g for ds, dD, dδb; dx; dU
        OURS: [(1, 1, 1), (2, 2, 1)],
        RUST: [(1, 1, 1), (2, 2, 1)],
    },
    LORA_MUL: {
        # base; D·U; W0⊙; W0·p; product; z⊙; +     |     z⊙g; two products for dx and their sum; dΔW; Q; dD, dU; q
        EAGER: [(7, 2, 7), (6, 6, 9)],
        COMPILED: [(5, 2, 7), (5, 6, 9)],
        # ΔW; W0·p; one product with W0 and ΔW     |     ΔW again; dx; dΔW; dD and dU; q
        OURS: [(1, 1, 5), (2, 2, 8)],
        # ΔW is kept for the backward pass
        RUST: [(1, 1, 5), (2, 2, 6)],
    },
}
# Ours on CUDA with cuBLASLt's GEMMs, the C library's family for most shapes.
CUDA_TRAFFIC = {
    # base; s; s·Dᵀ; epilogue     |     z⊙g; ds, dD, dδb; dx in two parts; dU
    LORA_ADD: [(5, 2, 1), (6, 4, 1)],
    # ΔW; W0·p; two GEMMs; epilogue     |     z⊙g; ΔW again; dx in two parts; dΔW; dδb; dD and dU; q
    LORA_MUL: [(5, 2, 5), (6, 4, 8)],
}


class LayerCase:
    def __init__(self, shape, dtype, device, batch, threads, worker):
        self.shape, self.dtype, self.device, self.batch = shape, dtype, device, batch
        self.threads, self.worker_path = threads, worker
        samples, k, n = BRANCHES * batch, shape.in_features, shape.out_features
        rng = torch.Generator().manual_seed(0)
        normal = lambda scale, *size: torch.randn(size, generator=rng).mul_(scale).to(device, DTYPES[dtype])
        self.inputs = dict(
            x=normal(1, samples, shape.tokens, k),
            dy=normal(1, samples, shape.tokens, n),
            weight=normal(k**-0.5, n, k),
            bias=normal(0.1, n),
            down=normal(0.1, n, RANK),
            up=normal(k**-0.5, RANK, k),
            delta_bias=normal(0.1, n),
            prompt_down=normal(0.1, k, RANK),
            prompt_up=normal(RANK**-0.5, RANK, 1),
        )
        self.z = 1 + normal(SIGMA, samples, n)
        self.title = (
            f"{BRANCHES}x{batch} samples x {shape.tokens} tokens, {k} -> {n}, rank {RANK}, {dtype}"
        )
        self.operators = {
            FROZEN: {"torch": self.frozen, RUST: functools.partial(self.rust, FROZEN)},
            LORA_ADD: {
                EAGER: functools.partial(self.official, LORA_ADD),
                COMPILED: functools.partial(self.official, LORA_ADD, compiled=True),
                PEFT: self.peft,
                OURS: functools.partial(self.ours, LORA_ADD),
                RUST: functools.partial(self.rust, LORA_ADD),
            },
            LORA_MUL: {
                EAGER: functools.partial(self.official, LORA_MUL),
                COMPILED: functools.partial(self.official, LORA_MUL, compiled=True),
                OURS: functools.partial(self.ours, LORA_MUL),
                RUST: functools.partial(self.rust, LORA_MUL),
            },
        }

    def reference(self, op, noisy):
        """The official formulas in f64; without noise, LoRA add as PEFT has it, which has no δb."""
        inputs = {name: value.double() for name, value in self.inputs.items()}
        if op == FROZEN:
            return self.frozen(inputs).outputs(None)
        z = self.z.double()
        if not noisy:
            z = torch.ones_like(z)
            inputs["delta_bias"] = torch.zeros_like(inputs["delta_bias"])
        results = self.official(op, inputs=inputs).outputs(z)
        if not noisy:
            del results["delta_bias"]
        return results

    def bytes_per_output(self, op, peer):
        """Bytes moved per element of y, forward and backward."""
        rows = BRANCHES * self.batch * self.shape.tokens
        k, n = self.shape.in_features, self.shape.out_features
        size = DTYPES[self.dtype].itemsize
        sizes = [1, k / n, k / rows]
        traffic = CUDA_TRAFFIC[op] if peer == OURS and self.device == "cuda" else TRAFFIC[op][peer]
        return [size * sum(c * s for c, s in zip(counts, sizes)) for counts in traffic]

    def peer(self, inputs, function, trained, noisy=True, set_noise=lambda z: None):
        x = inputs["x"].requires_grad_()
        wanted = {"dx": x, **trained}
        return TorchPeer(
            self.device,
            forward=function,
            backward=lambda y: torch.autograd.grad(y, [*wanted.values()], inputs["dy"]),
            results=lambda y, grads: {"y": y, **dict(zip(wanted, grads))},
            x=lambda: x,
            noisy=noisy,
            set_noise=set_noise,
        )

    @staticmethod
    def linear(inputs):
        layer = nn.utils.skip_init(nn.Linear, *inputs["weight"].shape[::-1], device="meta")
        layer.weight = nn.Parameter(inputs["weight"], requires_grad=False)
        layer.bias = nn.Parameter(inputs["bias"], requires_grad=False)
        return layer

    def frozen(self, inputs=None):
        inputs = inputs or self.inputs
        return self.peer(inputs, self.linear(inputs), {}, noisy=False)

    def official(self, op, compiled=False, inputs=None):
        inputs = inputs or self.inputs
        adapter = official.ADAPTERS[op](self.linear(inputs), RANK)
        trained = self.trained(op, adapter, inputs)
        module = official.Noise(adapter, SIGMA)
        set_noise = lambda z: setattr(module, "z", z)
        return self.peer(inputs, compiled_or_why_not(module) if compiled else module, trained, set_noise=set_noise)

    @staticmethod
    def trained(op, adapter, inputs):
        """The parameters of an adapter, set to the inputs."""
        for name, official_name in TRAINED[op].items():
            setattr(adapter, official_name, nn.Parameter(inputs[name]))
        return {name: getattr(adapter, official_name) for name, official_name in TRAINED[op].items()}

    def peft(self):
        peft = imported("peft")
        model = nn.ModuleDict({"layer": self.linear(self.inputs)})
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"]), model)
        layer = model["layer"]
        down, up = (nn.Parameter(self.inputs[name]) for name in ("down", "up"))
        layer.lora_B["default"].weight, layer.lora_A["default"].weight = down, up
        return self.peer(self.inputs, layer, {"down": down, "up": up}, noisy=False)

    def ours(self, op):
        pace = imported("pace_torch")
        adapter = {LORA_ADD: pace.LoraAdd, LORA_MUL: pace.LoraMulVptAdd}[op](self.linear(self.inputs), RANK)
        trained = self.trained(op, adapter, self.inputs)
        given, step = None, 0

        def set_noise(z):
            nonlocal given
            given = z

        def forward(x):
            nonlocal step
            step += 1
            if given is not None:
                return adapter(x, pace.Noise(z=given, branches=BRANCHES))
            return adapter(x, pace.Noise(key=pace.keys(0, step, 1, x.device), sigma=SIGMA, branches=BRANCHES))

        return self.peer(self.inputs, forward, trained, set_noise=set_noise)

    def rust(self, op):
        if self.device != "cpu":
            raise Unavailable("`cargo bench --bench cuda` measures the kernels without PyTorch")
        if self.dtype != "f32":
            raise Unavailable("the crate's CPU operators are f32 and f64")
        if not pathlib.Path(self.worker_path).exists():
            raise Unavailable(f"not built: {self.worker_path}; `cargo build --release --example peer_worker` builds it")
        return RustPeer(self.worker, op, [*TRAINED[op]])

    @functools.cached_property
    def worker(self):
        directory = tempfile.TemporaryDirectory()
        for name, value in {**self.inputs, "z": self.z}.items():
            value.detach().numpy().tofile(f"{directory.name}/{name}.f32")
        s = self.shape
        sizes = [BRANCHES, self.batch, s.tokens, s.in_features, s.out_features, RANK, self.threads]
        return Worker(self.worker_path, directory, sizes)


class Worker:
    """The process of `worker.rs`, which answers one request at a time; it ends when this object is gone."""

    def __init__(self, path, directory, sizes, **environment):
        self.path, self.directory, self.sizes = path, directory, sizes
        self.process = subprocess.Popen(
            [path, directory.name, *map(str, sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, command, op):
        print(command, op, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"{self.path} died on `{command} {op}`")
        return answer

    def fresh(self, **environment):
        return Worker(self.path, self.directory, self.sizes, **environment)

    def __del__(self):
        self.process.stdin.close()
        self.process.wait()


class RustPeer:
    noisy = True

    def __init__(self, worker, op, trained):
        self.worker, self.op, self.names = worker, op, ["y", "dx", *trained]

    def times(self):
        return tuple(map(float, self.worker.ask("run", self.op).split()))

    def outputs(self, z):
        """`z` is among the files that the worker reads."""
        self.worker.ask("check", self.op)
        directory = self.worker.directory.name
        files = {name: f"{directory}/{self.op}.{name}.ours.f32" for name in self.names}
        return {name: torch.from_numpy(np.fromfile(path, np.float32)) for name, path in files.items()}

    def peak(self):
        return int(self.worker.fresh(**RETURN_FREED_BLOCKS).ask("memory", self.op))


# Makes the allocator give freed blocks back at once, so that a peak of the process is a peak of its live memory.
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def no_worker():
    raise Unavailable("the worker runs single layers; `cargo bench --bench loss` and examples/few_shot have the rest")


def compiled_or_why_not(module):
    if torch.cuda.is_available() or imported("torch._inductor.cpp_builder").get_cpp_compiler():
        # A function that was compiled for too many cases is not compiled any more.
        torch.compiler.reset()
        return torch.compile(module, dynamic=False)
    raise Unavailable("torch.compile finds no compiler")


# --------------------------------------------------------------------------------------------------------------- loss

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
    # gradient in the forward pass; scaled by that of the total
    OURS: (4, 4),
}


class LossCase:
    z = None

    def __init__(self, shape, dtype, device, batch, threads, worker):
        self.shape, self.dtype, self.device, self.batch = shape, dtype, device, batch
        rng = torch.Generator().manual_seed(0)
        logits = torch.randn(2 * batch, shape.classes, generator=rng)
        self.logits = logits.to(device, DTYPES[dtype]).requires_grad_()
        self.labels = torch.randint(shape.classes, (batch,), generator=rng).to(device)
        self.title = f"{BRANCHES}x{batch} samples, {shape.classes} classes, {dtype}"
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
        return [DTYPES[self.dtype].itemsize * count / 2 for count in LOSS_TRAFFIC[peer]]

    def ours(self):
        pace = imported("pace_torch")
        return self.peer(lambda logits: pace.pace_loss(logits, self.labels, LAMBDA).total)

    def liger(self):
        if self.device == "cpu":
            raise Unavailable("its kernels are CUDA only")
        liger = imported("liger_kernel.transformers.functional")
        # It writes the gradient over its input, so every iteration gets a copy, made before the clock starts.
        copy = lambda: self.logits.detach().clone().requires_grad_().view_as(self.logits)
        return self.peer(lambda x: liger.liger_cross_entropy(x[: self.batch], self.labels), copy, noisy=False)


# ------------------------------------------------------------------------------------------------------ training step

PEFT_ONE, PEFT_TWO = "PEFT LoRA, one branch, no noise", "PEFT LoRA, as many rows, no noise"


class StepCase:
    """LoRA mul + VPT add in every block, noisy head, two branches; zero_grad, forward, loss | backward, AdamW.

    Weights are random, what starts at zero is not, and DropPath is off, so that every gradient can be compared.
    """

    def __init__(self, shape, dtype, device, batch, threads, worker):
        self.shape, self.dtype, self.device, self.batch = shape, dtype, device, batch
        rng = torch.Generator().manual_seed(0)
        self.autocast = shape.autocast and dtype != "f32"
        self.stored = torch.float32 if self.autocast else DTYPES[dtype]
        self.images = torch.randn(batch, 3, 224, 224, generator=rng).to(device, self.stored)
        self.labels = torch.randint(shape.classes, (batch,), generator=rng).to(device)
        self.title = f"{shape.name}, {BRANCHES}x{batch} images, LoRA mul + VPT add, rank {RANK}, AdamW, {dtype}"
        self.title += " by autocast" if self.autocast else ""
        self.operators = {
            "training step": {
                EAGER: self.official,
                COMPILED: lambda: self.official(compiled=True),
                OURS: self.ours,
                CAPTURED: self.captured,
                PEFT_ONE: lambda: self.peft(1),
                PEFT_TWO: lambda: self.peft(BRANCHES),
                RUST: no_worker,
            }
        }

    def model(self, dtype=None):
        torch.manual_seed(0)
        model = timm.create_model(self.shape.name, num_classes=self.shape.classes)
        return model.to(self.device, dtype or self.stored)

    @functools.cached_property
    def start(self):
        """The state dictionary that all start from, in official names, and each noisy layer's z."""
        model = official.inject(self.model(torch.float32), "lora_mul_vpt", RANK, SIGMA)
        state, z = model.state_dict(), {}
        rng = torch.Generator().manual_seed(1)
        for name, value in state.items():
            if "delta" in name and not value.any():
                value.copy_(0.02 * torch.randn(value.shape, generator=rng))
        for name, module in model.named_modules():
            if isinstance(module, official.Noise) and module.sigma > 0:
                linear = module.adapter.base_module
                z[name] = 1 + module.sigma * torch.randn(BRANCHES * self.batch, linear.out_features, generator=rng)
        return {name: value.clone() for name, value in state.items()}, z

    @property
    def z(self):
        return self.start[1]

    def peer(self, model, loss, set_noise=lambda z: None, noisy=True, backward=torch.Tensor.backward):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=1e-4)

        def forward(_):
            optimizer.zero_grad()
            with torch.autocast(self.device, DTYPES[self.dtype], enabled=self.autocast):
                return loss()

        def step(total):
            backward(total)
            optimizer.step()

        def results(total, _):
            return {"loss": total, "gradient": torch.cat([p.grad.flatten() for p in trained.values()])}

        return TorchPeer(self.device, forward, step, results, noisy=noisy, set_noise=set_noise)

    def official(self, compiled=False, dtype=None):
        model = official.inject(self.model(dtype), "lora_mul_vpt", RANK, SIGMA).train()
        model.load_state_dict(self.start[0])
        layers = {name: m for name, m in model.named_modules() if isinstance(m, official.Noise) and m.sigma > 0}
        images = self.images.to(dtype or self.images.dtype)
        run = compiled_or_why_not(model) if compiled else model

        def set_noise(z):
            for name, layer in layers.items():
                layer.z = None if z is None else z[name].to(images)

        loss = lambda: official.two_branch_loss(run, images, self.labels, LAMBDA).total
        return self.peer(model, loss, set_noise)

    def peft(self, branches):
        peft = imported("peft")
        model = self.model()
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)")
        peft.inject_adapter_in_model(config, model)
        model.to(self.stored).train()
        model.head.requires_grad_()
        images, labels = torch.cat([self.images] * branches), self.labels.repeat(branches)
        loss = lambda: F.cross_entropy(model(images), labels)
        return self.peer(model, loss, noisy=False)

    def reference(self, op, noisy):
        """The official formulas in f64. Plain LoRA is another model; its peer is not compared with anything."""
        return self.official(dtype=torch.float64).outputs(self.z) if noisy else None

    def bytes_per_output(self, op, peer):
        return None

    def our_model(self):
        """The model, and what sets its noise."""
        pace = imported("pace_torch")
        model = pace.inject(self.model(), "LoRAmul_VPTadd", RANK, sigma=SIGMA, lambda_=LAMBDA).train()
        model.load_state_dict(self.start[0])
        layers = {name: m for name, m in model.named_modules() if isinstance(m, pace.NoisyLinear) and m.sigma > 0}

        def set_noise(z):
            for name, layer in layers.items():
                layer.z = None if z is None else z[name].to(self.device)

        return model, set_noise

    def ours(self):
        model, set_noise = self.our_model()
        return self.peer(model, lambda: model.pace.training_step(model, self.images, self.labels).total, set_noise)

    def captured(self):
        """The same as a CUDA graph: its backward pass is in the time of the forward pass, the optimizer in the other."""
        if self.device == "cpu":
            raise Unavailable("a CPU has no graphs")
        model, set_layers = self.our_model()
        step, autocast = None, DTYPES[self.dtype] if self.autocast else None

        def set_noise(z):
            nonlocal step
            set_layers(z)
            step = None

        def loss():
            nonlocal step
            if step is None:
                step = imported("pace_torch").CapturedStep(model, self.images, self.labels, autocast=autocast)
            return step(self.images, self.labels).total

        peer = self.peer(model, loss, set_noise, backward=lambda total: None)
        peer.has_peak = False
        return peer
