"""A linear layer: frozen, with LoRA add, and with LoRA mul + VPT add."""

import dataclasses
import functools
import pathlib
import tempfile

import official
import torch
from runners import (
    BRANCHES, COMPILED, DTYPES, EAGER, OURS, PEFT, RANK, RUST, SIGMA, RustPeer, TorchPeer, Unavailable, Worker,
    compiled_or_why_not, imported,
)
from torch import nn


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer in a model. `batch` is samples per branch, `cpu_batch` the smaller number that a CPU gets."""

    tokens: int
    in_features: int
    out_features: int
    batch: int = 64
    cpu_batch: int = 4


FROZEN, LORA_ADD, LORA_MUL = "frozen", "lora_add", "lora_mul_vpt"
# What is trained, and its official name.
LORA = {"lora_b": "delta_W_down", "lora_a": "delta_W_up", "delta_bias": "delta_b"}
PROMPT = {"prompt_down": "delta_prompt_down", "prompt_up": "delta_prompt_up"}
TRAINED = {FROZEN: {}, LORA_ADD: LORA, LORA_MUL: LORA | PROMPT}

# Bytes that an operator's kernels read and write, as multiples of [M, N], [M, K] and [N, K]: forward, backward. A GEMM
# reads both factors and writes its result once, bias included; one that adds to its result reads that too. An
# element-wise kernel reads and writes every operand. Tensors of rank r and noise of one value per sample and channel are
# not counted, nor what a CPU reads again from its caches. The row of torch.compile has every element-wise chain in one
# kernel.
TRAFFIC = {
    FROZEN: {"torch": [(1, 1, 1), (1, 1, 1)], RUST: [(1, 1, 1), (1, 1, 1)]},
    LORA_ADD: {
        # base; s; s·Bᵀ; z⊙; +     |     z⊙g; ds, dB, dδb; dx in two parts and their sum, dA
        EAGER: [(7, 2, 1), (6, 6, 1)],
        COMPILED: [(5, 2, 1), (5, 6, 1)],
        # scale instead of z, and no δb
        PEFT: [(7, 2, 1), (5, 6, 1)],
        # s; y     |     g·W0 to dx; one pass over g and x for ds, dB, dA, which adds to dx; dδb
        OURS: [(1, 2, 1), (3, 4, 1)],
        RUST: [(1, 2, 1), (3, 4, 1)],
    },
    LORA_MUL: {
        # base; B·A; W0⊙; W0·p; x·ΔWᵀ; z⊙; +     |     z⊙g; two GEMMs for dx and their sum; dΔW; Q; dB, dA; q
        EAGER: [(7, 2, 7), (6, 6, 9)],
        COMPILED: [(5, 2, 7), (5, 6, 9)],
        # ΔW; W0·p; one GEMM with W0 + z⊙ΔW     |     ΔW again; dx; dΔW; dΔb; dB and dA; q
        OURS: [(1, 1, 5), (3, 2, 8)],
        # ΔW is kept for the backward pass
        RUST: [(1, 1, 5), (3, 2, 6)],
    },
}
# Ours on CUDA by the family of cuBLASLt, step by step of its plans. That of `sm80` has other bytes.
CUDA_TRAFFIC = {
    #     forward                        backward
    # N   base 1, s·Bᵀ 1, epilogue 3     z⊙g with dδb 2, ds 1, g·W0 1, dB 1
    # K   base 1, s 1                    dx 1, dx += ds·A 2, dA 1
    # NK  base 1                         g·W0 1
    LORA_ADD: [(5, 2, 1), (5, 4, 1)],
    # N   base 1, x·ΔWᵀ 1, epilogue 3    z⊙g with dΔb 2, g·W0 1, e·ΔW 1, dΔW 1
    # K   base 1, x·ΔWᵀ 1                dx 1, dx += e·ΔW 2, dΔW 1
    # NK  ΔW 2, W0·p 1, the GEMMs 2      ΔW 2, the GEMMs 2, dΔW 1, dB and dA 2, q 1
    LORA_MUL: [(5, 2, 5), (5, 4, 8)],
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
            lora_b=normal(0.1, n, RANK),
            lora_a=normal(k**-0.5, RANK, k),
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
        if peer == OURS and self.device == "cpu" and self.dtype != "f32":
            return None  # 16-bit types go through f32 there, which is not counted.
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
        trained = {name: nn.Parameter(self.inputs[name]) for name in ("lora_b", "lora_a")}
        layer.lora_B["default"].weight, layer.lora_A["default"].weight = trained.values()
        return self.peer(self.inputs, layer, trained, noisy=False)

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
