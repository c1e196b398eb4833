"""A training step of a whole model."""

import dataclasses
import functools

import official
import timm
import torch
import torch.nn.functional as F
from runners import (
    BRANCHES, CAPTURED, COMPILED, DTYPES, EAGER, LAMBDA, OURS, RANK, RUST, SIGMA, TorchPeer, Unavailable,
    compiled_or_why_not, imported, no_worker,
)


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
