"""A training step of a whole model."""

import dataclasses
import functools

import official
import timm
import torch
import torch.nn.functional as F
from runners import (
    BRANCHES, CAPTURED, COMPILED, COMPILED_GRAPH, DTYPES, EAGER, LAMBDA, OURS, OURS_COMPILED, OURS_COMPILED_GRAPH, RANK,
    REDUCED, RUST, SIGMA, TorchPeer, Unavailable, compiled_or_why_not, imported, needs_compiler,
    no_worker,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A timm model that is trained for one step on images of 224 px.

    With `autocast` the parameters are f32, and 16-bit types are those of autocast. `depth` is the number of blocks, if not
    the model's own.
    """

    name: str
    classes: int = 100
    batch: int = 64
    cpu_batch: int = 4
    autocast: bool = False
    depth: int | None = None


PEFT_ONE, PEFT_TWO = "PEFT LoRA, one branch, no noise", "PEFT LoRA, as many rows, no noise"
# The adapter in every block by its official name and by that of the PyTorch package.
STEP_MUL, STEP_ADD = "step_lora_mul_vpt", "step_lora_add"
ADAPTERS = {STEP_MUL: ("lora_mul_vpt", "LoRAmul_VPTadd"), STEP_ADD: ("lora_add", "LoRAadd")}


def noisy_layers(model, kind):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind) and module.sigma > 0}


class Graph:
    """Forward and backward pass of the official formulas as one CUDA graph, as `pace_torch.CapturedStep` has it for ours.

    PyTorch's default generator takes part in the capture, and each replay moves it on, so that `torch.randn` draws fresh
    noise in every step, in eager and in compiled code.
    """

    def __init__(self, loss, parameters):
        self.parameters = parameters

        def run():
            for parameter in parameters:
                parameter.grad = None
            total = loss()
            total.backward()
            return total.detach()

        # What is compiled lazily, chosen or allocated once has to be there before the capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.total = run()
        self.grads = [parameter.grad for parameter in parameters]

    def __call__(self):
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads):
            parameter.grad = grad
        return self.total


class StepCase:
    """Adapters in every block, noisy head, two branches; zero_grad, forward, loss | backward, AdamW.

    Weights are random, what starts at zero is not, and DropPath is off, so that every gradient can be compared.

    Of what runs as a CUDA graph captured by hand, the backward pass is in the time of the forward pass and the optimizer in the
    other, and the peak is not taken: a graph holds its memory all the time.
    """

    def __init__(self, shape, dtype, device, batch, threads, worker):
        self.shape, self.dtype, self.device, self.batch = shape, dtype, device, batch
        rng = torch.Generator().manual_seed(0)
        self.autocast = shape.autocast and DTYPES[dtype] != torch.float32
        self.stored = torch.float32 if self.autocast else DTYPES[dtype]
        self.images = torch.randn(batch, 3, 224, 224, generator=rng).to(device, self.stored)
        self.labels = torch.randint(shape.classes, (batch,), generator=rng).to(device)
        blocks = f" of {shape.depth} blocks" if shape.depth else ""
        self.title = f"{shape.name}{blocks}, {BRANCHES}x{batch} images, rank {RANK}, AdamW, {dtype}"
        self.title += " by autocast" if self.autocast else ""
        self.starts = {}
        self.operators = {op: self.peers(op) for op in ADAPTERS}

    def peers(self, op):
        # What is asked first comes first, because the time may be limited, and a compilation takes most of it.
        return {
            EAGER: lambda: self.official(op),
            COMPILED: lambda: self.official(op, compiled=True),
            OURS: lambda: self.ours(op),
            CAPTURED: lambda: self.ours_captured(op),
            PEFT_ONE: lambda: self.peft(1),
            PEFT_TWO: lambda: self.peft(BRANCHES),
            OURS_COMPILED_GRAPH: lambda: self.ours_captured(op, compiled=True),
            OURS_COMPILED: lambda: self.ours(op, compiled=True),
            COMPILED_GRAPH: lambda: self.official_captured(op),
            REDUCED: lambda: self.official_reduced(op),
            RUST: no_worker,
        }

    def model(self, dtype=None):
        torch.manual_seed(0)
        depth = {"depth": self.shape.depth} if self.shape.depth else {}
        model = timm.create_model(self.shape.name, num_classes=self.shape.classes, **depth)
        return model.to(self.device, dtype or self.stored)

    def start(self, op):
        """The state dictionary that all start from, in official names."""
        if op not in self.starts:
            state = official.inject(self.model(torch.float32), ADAPTERS[op][0], RANK, SIGMA).state_dict()
            rng = torch.Generator().manual_seed(1)
            for name, value in state.items():
                if "delta" in name and not value.any():
                    value.copy_(0.02 * torch.randn(value.shape, generator=rng))
            self.starts[op] = {name: value.clone() for name, value in state.items()}
        return self.starts[op]

    @functools.cached_property
    def z(self):
        """Each noisy layer's z. Neither layers nor their sigma depend on the adapter."""
        rng = torch.Generator().manual_seed(2)
        layers = noisy_layers(official.inject(self.model(torch.float32), rank=1, sigma=SIGMA), official.Noise)
        sizes = {name: (BRANCHES * self.batch, layer.adapter.base_module.out_features) for name, layer in layers.items()}
        return {name: 1 + layers[name].sigma * torch.randn(size, generator=rng) for name, size in sizes.items()}

    def autocasting(self, **settings):
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.autocast, **settings)

    def peer(self, model, loss, set_noise=lambda z: None, noisy=True, backward=torch.Tensor.backward):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=1e-4)

        def forward(_):
            optimizer.zero_grad()
            with self.autocasting():
                return loss()

        def step(total):
            backward(total)
            optimizer.step()

        def results(total, _):
            return {"loss": total, "gradient": torch.cat([p.grad.flatten() for p in trained.values()])}

        return TorchPeer(self.device, forward, step, results, noisy=noisy, set_noise=set_noise)

    def captured_peer(self, model, capture, set_noise):
        """A peer whose `capture()` gives a graph of forward and backward pass. Another z is another graph."""
        graph = None

        def set_and_forget(z):
            nonlocal graph
            set_noise(z)
            graph = None

        def loss():
            nonlocal graph
            graph = graph or capture()
            return graph()

        peer = self.peer(model, loss, set_and_forget, backward=lambda total: None)
        peer.has_peak = False
        return peer

    def official_model(self, op, dtype=None):
        """The model, and what sets its noise."""
        model = official.inject(self.model(dtype), ADAPTERS[op][0], RANK, SIGMA).train()
        model.load_state_dict(self.start(op))
        layers = noisy_layers(model, official.Noise)

        def set_noise(z):
            for name, layer in layers.items():
                layer.z = None if z is None else z[name].to(self.device, dtype or self.images.dtype)

        return model, set_noise

    def official(self, op, compiled=False, dtype=None):
        model, set_noise = self.official_model(op, dtype)
        images = self.images.to(dtype or self.images.dtype)
        run = compiled_or_why_not(model) if compiled else model
        loss = lambda: official.two_branch_loss(run, images, self.labels, LAMBDA).total
        return self.peer(model, loss, set_noise)

    def official_reduced(self, op):
        """PyTorch's own graphs: one for the forward, one for the backward pass of the model; the loss is outside."""
        self.needs_graphs()
        model, set_noise = self.official_model(op)
        run = compiled_or_why_not(model, mode="reduce-overhead")

        def loss():
            # The gradients of the last step, which its graph owns, are of no use any more.
            torch.compiler.cudagraph_mark_step_begin()
            return official.two_branch_loss(run, self.images, self.labels, LAMBDA).total

        peer = self.peer(model, loss, set_noise)
        peer.has_peak = False
        return peer

    def official_captured(self, op):
        """The compiled model in a graph of the whole step but the optimizer, with the same copies of a batch as ours."""
        self.needs_graphs()
        model, set_noise = self.official_model(op)
        run = compiled_or_why_not(model)
        images, labels = self.images.clone(), self.labels.clone()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def loss():
            # Casts of one step are of no use to the next, whose weights are others.
            with self.autocasting(cache_enabled=False):
                return official.two_branch_loss(run, images, labels, LAMBDA).total

        def capture():
            graph = Graph(loss, trained)

            def call():
                images.copy_(self.images)
                labels.copy_(self.labels)
                return graph()

            return call

        return self.captured_peer(model, capture, set_noise)

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
        return self.official(op, dtype=torch.float64).outputs(self.z) if noisy else None

    def bytes_per_output(self, op, peer):
        return None

    def needs_graphs(self):
        if self.device == "cpu":
            raise Unavailable("a CPU has no graphs")

    def our_model(self, op, compiled=False):
        """The model, and what sets its noise. Compiled in place, because a graph is captured of the model itself."""
        pace = imported("pace_torch")
        if compiled:
            needs_compiler()
        model = pace.inject(self.model(), ADAPTERS[op][1], RANK, sigma=SIGMA, lambda_=LAMBDA).train()
        model.load_state_dict(self.start(op))
        layers = noisy_layers(model, pace.NoisyLinear)

        def set_noise(z):
            for name, layer in layers.items():
                layer.z = None if z is None else z[name].to(self.device)

        if compiled:
            model.compile(dynamic=False)
        return model, set_noise

    def ours(self, op, compiled=False):
        model, set_noise = self.our_model(op, compiled)
        # Whoever draws the keys of a step inside of a compiled model breaks its graph there.
        model.pace.manual_steps = compiled

        def loss():
            if compiled:
                model.pace.advance()
            return model.pace.training_step(model, self.images, self.labels).total

        return self.peer(model, loss, set_noise)

    def ours_captured(self, op, compiled=False):
        self.needs_graphs()
        model, set_noise = self.our_model(op, compiled)
        autocast = DTYPES[self.dtype] if self.autocast else None

        def capture():
            step = imported("pace_torch").CapturedStep(model, self.images, self.labels, autocast=autocast)
            return lambda: step(self.images, self.labels).total

        return self.captured_peer(model, capture, set_noise)
