"""Layers of every kind: what an adapter may be around, what it leaves alone, and what is an error."""

import pace_torch
import pytest
import torch
from conftest import close, perturb
from models import SETTINGS, Pixels, Scaled, Tokens, batch, explicit, injected, linear, names_of
from pace_torch import NoisyLinear, PaceError
from torch import nn
from torch.nn.utils import prune


def test_layers_without_samples_get_no_noise():
    # Four positions, two samples: the rows of the table could be samples of four.
    for samples in (1, 2, 3):
        x, mask, labels = batch(samples)
        model = injected()
        with pytest.warns(UserWarning, match="1 layers work on rows.*position"):
            logits = model(x, mask)
        close(logits, explicit(model, x, mask), 1e-12)
        assert "rows are no samples" in pace_torch.describe(model)
        model.pace.training_step(model, (x, mask), labels).total.backward()
        assert model.position.adapter.delta_W_down.grad is not None


def test_a_later_batch_with_as_many_rows_as_a_sample_had():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = linear(6, 8), linear(8, 5)

        def forward(self, x):
            return self.head(self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))

    model = injected(Flat())
    for samples, tokens in ((2, 16), (2, 4)):
        x = torch.randn(samples, tokens, 6, dtype=torch.float64)
        logits = model(x)
        assert not torch.equal(logits[:samples], logits[samples:])
        assert not model.body.fixed_rows | model.head.fixed_rows


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_layers_that_are_not_called():
    model = Tokens()
    model.spare = linear(8, 8)
    x, mask, _ = batch()
    with pytest.warns(UserWarning, match="1 layers have an adapter, but the model does not call them: spare"):
        injected(model)(x, mask)


@pytest.mark.parametrize("adapter", ["LoRAmul_VPTadd", "LoRAadd", "VPTadd"])
@pytest.mark.parametrize("variant", ["pace", "baseline"])
@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_layers_with_a_forward_of_their_own(adapter, variant):
    def make():
        model = Tokens()
        model.body[1], model.classifier = Scaled(8, 8, dtype=torch.float64), Scaled(8, 5, dtype=torch.float64)
        return model

    x, mask, labels = batch()
    before = make()
    torch.manual_seed(1)
    want = before(x, mask)
    model = pace_torch.inject(before, adapter, scale=1.5, variant=variant, **SETTINGS)
    close(model.eval()(x, mask), want, 1e-12)
    perturb(model).train()
    seen = {}
    for layer in (model.body[1], model.classifier):
        layer.register_forward_hook(lambda layer, args, y: seen.update({layer: (args[0], y)}))
    model.pace.training_step(model, (x, mask), labels).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for layer, (x1, y) in seen.items():
        lora = layer.adapter if variant == "pace" else layer
        base, z = lora.base_module, torch.ones(len(y), *(1,) * (y.dim() - 2), y.shape[-1], dtype=y.dtype)
        if variant == "pace":
            noise = model.pace.noise(layer.layer, layer.sigma, len(y))
            z = pace_torch.noise(noise, 3, y.shape[-1]).double().view_as(z)
        if layer is model.classifier:
            close(y, z * base(x1), 1e-12)
            continue
        weight, added = base.weight, 0
        if adapter != "VPTadd":
            delta = 1.5 * lora.delta_W_down @ lora.delta_W_up
            added = x1 @ (delta * weight if "mul" in adapter else delta).T
            added = added + lora.delta_b * (base.bias if "mul" in adapter else 1)
        if "VPT" in adapter:
            added = added + weight @ (lora.delta_prompt_down @ lora.delta_prompt_up).squeeze(1)
        assert added.abs().max() > 1e-2
        close(y, base(x1) + z * added, 1e-12)
    want = model.eval()(x, mask)
    close(torch.jit.trace(model, (x, mask))(x, mask), want, 1e-12)
    with pytest.raises(PaceError, match=r"body\.1.*Scaled.*computes by itself"):
        pace_torch.merge(model)
    close(model(x, mask), want, 1e-15)


class Quantised(nn.Linear):
    """A weight in int8, as bitsandbytes and others have it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, dtype=torch.float64)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_quantised_layers():
    x, mask, labels = batch()
    model = Tokens()
    model.body[1] = Quantised(model.body[1])
    before = model(x, mask)
    with pytest.raises(PaceError, match=r"body\.1.*Quantised.*LoRAadd"):
        pace_torch.inject(model, **SETTINGS)
    model = pace_torch.inject(model, "LoRAadd", **SETTINGS)
    close(model.eval()(x, mask), before, 1e-6)
    losses = model.double().train().pace.training_step(model, (x, mask), labels)
    losses.total.backward()
    assert model.body[1].adapter.delta_W_down.grad.abs().max() > 0 and model.body[1].adapter.base_module.weight.dtype == torch.int8

    class Sums(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum(1)

    model = Tokens()
    model.body[1] = Sums(8, 8, dtype=torch.float64)
    with pytest.raises(PaceError, match=r"Sums, does not map \[..., 8\] to \[..., 8\]"):
        pace_torch.inject(model, "LoRAadd", exclude_modules=["position"], **SETTINGS).eval()(x, mask)


@pytest.mark.parametrize("adapter", ["LoRAmul_VPTadd", "LoRAadd", "VPTadd"])
def test_pointwise_convolutions(adapter):
    x, labels = Pixels.batch(), torch.arange(2)
    settings = dict(target_modules=r"narrow\.\d", **SETTINGS)
    model, same = pace_torch.inject(Pixels(), adapter, **settings), Pixels(convolutions=False)
    same.load_state_dict({name: value.flatten(1) if value.dim() > 1 and "stem" not in name else value for name, value in Pixels().state_dict().items()})
    same = pace_torch.inject(same, adapter, **settings)
    close(model.eval()(x), Pixels()(x), 1e-12)
    assert model.narrow[0].in_channels == 6 and model.narrow[0].in_features == 6 and model.narrow[1].kernel_size == (1, 1)
    same.load_state_dict(perturb(model).state_dict())
    losses = [one.train().pace.training_step(one, x, labels) for one in (model, same)]
    assert losses[0].consistency > 0
    for one in losses:
        one.total.backward()
    close(losses[0].total, losses[1].total, 1e-12)
    for (name, a), b in zip(model.named_parameters(), same.parameters()):
        if a.requires_grad and a.grad is not None:
            close(a.grad, b.grad, 1e-10)
    want = model.eval()(x)
    close(torch.jit.trace(model, x)(x), want, 1e-12)
    fresh = pace_torch.inject(Pixels(), adapter, **settings)
    fresh.load_state_dict(Pixels().state_dict(), strict=False)
    pace_torch.load_trainable_state_dict(fresh, pace_torch.trainable_state_dict(model))
    close(fresh.eval()(x), want, 1e-12)
    merged = pace_torch.merge(model)
    close(merged(x), want, 1e-12)
    assert isinstance(merged.narrow[0], nn.Conv2d) and merged.narrow[0].weight.shape == (8, 6, 1, 1)
    again = Pixels()
    again.load_state_dict(merged.state_dict())
    close(again(x), want, 1e-12)
    # Others are found by name only, and are no linear layers.
    assert names_of(pace_torch.inject(Pixels(), adapter, **SETTINGS)) == {"head"}
    with pytest.raises(PaceError, match=r"`stem`.*Conv2d of \(6, 3, 3, 3\)"):
        pace_torch.inject(Pixels(), adapter, target_modules=["stem", "0"])


class ReadsWeights(nn.Module):
    """Multiplies by the weights of its layers itself."""

    def __init__(self, use="own"):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.first, self.second = linear(6, 8), linear(8, 8, bias=False)
        self.shift = nn.Parameter(torch.randn(8, dtype=torch.float64))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        self.head = linear(8, 5)

    def forward(self, x):
        if self.use == "sum":
            return (self.first.weight + 1).sum()
        if self.use == "bias":
            return nn.functional.linear(x, self.shift.diag(), self.first.bias)
        x = torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias))
        assert self.first.weight.shape == (8, 6) and self.first.weight.dtype == torch.float64
        x = torch.tanh(nn.functional.linear(x, weight=self.second.weight, bias=self.shift))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class CallsLayers(ReadsWeights):
    """The same, with calls; attention written out."""

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x) + self.shift)
        q, k, v = nn.functional.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention.out_proj(mixed)
        return self.head(x.mean(1))


def test_models_that_read_weights():
    x, _, labels = batch()
    reads, calls = injected(ReadsWeights()), injected(CallsLayers())
    assert names_of(reads) == {"first", "second", "attention.out_proj", "head"}
    for model in (reads, calls):
        model.losses = model.pace.training_step(model, x, labels)
        model.losses.total.backward()
    close(reads.losses.total.detach(), calls.losses.total.detach(), 1e-12)
    for (name, a), (_, b) in zip(reads.named_parameters(), calls.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            close(a.grad, b.grad, 1e-10)
    close(reads.eval()(x), calls.eval()(x), 1e-12)
    for use, message in (("sum", "weight of `first`"), ("bias", "bias of `first`")):
        with pytest.raises(PaceError, match=message):
            injected(ReadsWeights(use))(x)


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, shared = linear(6, 8), linear(8, 8)
        self.layers = nn.ModuleList([shared, shared])
        self.embedding, self.tied = nn.Embedding(5, 8, dtype=torch.float64), linear(8, 5, bias=False)
        self.tied.weight = self.embedding.weight
        self.head = linear(8, 5)

    def forward(self, x):
        x = self.body(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x.mean(1)) + self.tied(x.mean(1))


def test_shared_layers():
    x, _, labels = batch()
    model = injected(Shares())
    assert model.layers[0] is model.layers[1] and isinstance(model.layers[0], NoisyLinear)
    # A layer that is an embedding too would change it.
    assert type(model.tied) is nn.Linear
    model.pace.training_step(model, x, labels).total.backward()
    y = model.eval()(x)
    merged = pace_torch.merge(model)
    assert merged.layers[0] is merged.layers[1] and type(merged.layers[0]) is nn.Linear
    close(merged(x), y, 1e-12)


def test_hooks_and_sizes_survive():
    model, calls = Tokens(), []
    handle = model.body[1].register_forward_hook(lambda *_: calls.append("hook"))
    model.body[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    pace_torch.inject(model, **SETTINGS).eval()
    x, mask, _ = batch()
    model(x, mask)
    assert calls == ["pre", "hook"] and (model.body[0].in_features, model.body[0].out_features) == (6, 8)
    pace_torch.merge(model)
    model(x, mask)
    assert calls == ["pre", "hook"] * 2
    handle.remove()
    model(x, mask)
    assert calls == ["pre", "hook"] * 2 + ["pre"]


class Mixed(nn.Module):
    """One layer for samples and for a table; and rows with tokens first."""

    def __init__(self, tokens_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.late, self.head = linear(8, 8), linear(8, 8), linear(8, 5)
        self.register_buffer("table", torch.randn(4, 8, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.tokens_first = tokens_first

    def forward(self, x):
        self.count += 1
        x = torch.tanh(self.both(x)) + torch.tanh(self.both(self.table))[: x.shape[1]]
        if self.tokens_first:
            rows = x.transpose(0, 1)
            x = self.late(rows.reshape(-1, 8)).view(rows.shape).transpose(0, 1)
        else:
            x = self.late(x)
        return self.head(torch.tanh(x).mean(1))


def test_layers_with_several_kinds_of_rows():
    for samples, variant in ((3, "pace"), (1, "pace"), (1, "noise"), (3, "noise")):
        x = torch.randn(1, 4, 8, dtype=torch.float64).expand(samples, 4, 8)
        model = injected(Mixed(), variant=variant)
        for layer in (model.late, model.head):
            layer.sigma = 0.0
        steps = [model(x).detach() for _ in range(2)]
        # Noise of the samples in each step, and of nothing else: without it the table is what it was.
        assert not torch.equal(*steps) and model.count == 2
        assert model.both.sample_rows == 1 and model.both.fixed_rows == {4}
        model.both.sigma = 0.0
        close(model(x), model.eval()(x).repeat(len(steps[0]) // samples, 1), 1e-12)
    model = Mixed(tokens_first=True)
    with pytest.warns(UserWarning, match="1 layers work on rows.*late"):
        injected(model)(torch.randn(3, 4, 8, dtype=torch.float64))


def test_layers_that_no_adapter_suits():
    def with_layers(**layers):
        model = Tokens()
        for name, layer in layers.items():
            setattr(model, name, layer)
        return model

    tied = linear(8, 5)
    tied.weight = (model := Tokens()).classifier.weight
    model.aux = tied
    for model, message in (
        (model, "one weight"),
        (with_layers(normed=nn.utils.parametrizations.weight_norm(linear(8, 8))), "normed"),
        (with_layers(pruned=prune.l1_unstructured(linear(8, 8), "weight", 2)), "pruned"),
        (with_layers(lazy=nn.LazyLinear(3)), "lazy"),
        (linear(8, 8), "itself"),
    ):
        with pytest.raises(PaceError, match=message):
            pace_torch.inject(model)
    with pytest.warns(UserWarning, match="no classifier"):
        pace_torch.inject(nn.Sequential(linear(8, 8), nn.Tanh(), linear(8, 3)))
    x, _, _ = batch()
    with pytest.raises(PaceError, match="bias of its own.*new_biases"):
        injected(ReadsWeights(), new_biases=True)(x)
    for use in (lambda layer: torch.cat([layer.bias, layer.bias]), lambda layer: layer.weight @ layer.weight.T):
        with pytest.raises(PaceError, match="of `first` and uses it otherwise"):
            use(injected(ReadsWeights()).first)
    layer = injected(ReadsWeights()).first
    assert layer.weight.stride() == (6, 1) and layer.weight.new_zeros(2).shape == (2,) and x.to(layer.weight) is x


class Experts(nn.Module):
    """Each expert works on the tokens that are sent to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.router, self.head = nn.ModuleList(linear(8, 8) for _ in range(2)), linear(8, 2), linear(8, 3)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen, y = self.router(tokens).argmax(-1), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(tokens[rows]))
        return self.head(y.view_as(x).mean(1))


def test_layers_whose_rows_depend_on_what_they_are():
    for seed in range(4):
        torch.manual_seed(seed)
        model = injected(Experts(), adapter="LoRAadd", exclude_modules=["router"], first_noisy=0)
        with pytest.warns(UserWarning, match="2 layers work on rows.*experts.0, experts.1"):
            losses = model.pace.training_step(model, torch.randn(4, 8, 8, dtype=torch.float64), torch.arange(4) % 3)
        assert losses.consistency > 0  # of the head


def test_more_arguments_than_the_input():
    class Shifted(nn.Linear):
        def forward(self, x, scale, *, shift=0.0):
            return scale * super().forward(x) + shift

    class Calls(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.body, self.head = layer(8, 8).double(), linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x, 2.0, shift=1.0))

    x = torch.randn(2, 8, dtype=torch.float64)
    for variant in ("pace", "baseline"):
        model = Calls(Shifted)
        before = model(x)
        close(pace_torch.inject(model, "LoRAadd", variant=variant, **SETTINGS).eval()(x), before, 1e-12)
    with pytest.raises(PaceError, match="`body` is called with more than its input"):
        pace_torch.inject(Calls(nn.Linear), **SETTINGS).eval()(x)
    # The name that nn.Linear gives to its input.
    model = pace_torch.inject(Tokens(), **SETTINGS).eval()
    assert torch.equal(model.body[0](input=batch()[0]), model.body[0](batch()[0]))


def test_a_convolution_that_pads_nothing_whatever_it_says():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, padding="same"), nn.Flatten(), nn.Linear(128, 5))
    assert names_of(pace_torch.inject(model, "LoRAadd", 2, target_modules=["1"], head=["3"])) == {"1", "3"}
