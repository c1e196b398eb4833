"""Models of every kind: how they are called, where branches start, which layers get adapters, and what survives."""

import copy
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pace_torch
import pytest
import timm
import torch
from conftest import close, perturb, vit
from pace_torch import NoisyLinear, PaceError
from torch import nn
from torch.nn.utils import prune

SETTINGS = dict(rank=2, sigma=0.5, lambda_=0.1)


def linear(k, n, **settings):
    return nn.Linear(k, n, dtype=torch.float64, **settings)


class Tokens(nn.Module):
    """A model of one's own: tokens `[B, T, 6]`, a mask of them `[B, T]`, and a table of positions that is no sample."""

    def __init__(self, returns=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.position, self.body = linear(2, 8), nn.ModuleList([linear(6, 8), linear(8, 8)])
        self.classifier = linear(8, 5)
        self.register_buffer("table", torch.randn(4, 2, dtype=torch.float64))
        self.returns = returns

    def forward(self, x, mask=None):
        x = torch.tanh(self.body[0](x)) + self.position(self.table)[: x.shape[1]]
        x = torch.tanh(self.body[1](x))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return self.returns(self.classifier(x.mean(1)))


def batch(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 6, dtype=torch.float64, generator=generator)
    mask = (torch.rand(n, 4, generator=generator) > 0.3).double()
    return x, mask, torch.arange(n) % 5


def injected(model=None, **settings):
    return perturb(pace_torch.inject(model or Tokens(), **{**SETTINGS, **settings})).train()


def explicit(model, x, mask, step=0):
    """Both branches by the formulas, with the noise written out."""
    copied = copy.deepcopy(model)
    copied.pace.step = step
    copied.pace.advance()
    copied.pace.batch, copied.pace.first_sample = len(x), 0

    def layer(noisy, x):
        weight, bias = noisy.adapter.merged()
        base = noisy.adapter.base_module
        trained = isinstance(noisy.adapter, pace_torch.Head)
        weight0, bias0 = (0 * base.weight, 0 * base.bias) if trained else (base.weight, base.bias)
        z = torch.ones(len(x), base.out_features, dtype=torch.float64)
        if noisy.sigma and len(x) == 2 * copied.pace.batch:
            z = pace_torch.noise(copied.pace.noise(noisy.layer, noisy.sigma, len(x)), copied.pace.batch, base.out_features)
        z = z.double().view(-1, *(1,) * (x.dim() - 2), base.out_features)
        return x @ weight0.T + bias0 + z * (x @ (weight - weight0).T + (bias - bias0))

    with torch.no_grad():
        x, mask = torch.cat([x, x]), torch.cat([mask, mask])
        position = copied.position.adapter.traced(copied.table) if isinstance(copied.position, NoisyLinear) else (
            copied.position(copied.table))
        x = torch.tanh(layer(copied.body[0], x)) + position[: x.shape[1]]
        x = torch.tanh(layer(copied.body[1], x)) * mask.unsqueeze(-1)
        return layer(copied.classifier, x.mean(1))


CALLS = {
    "positional": lambda model, x, mask: model(x, mask),
    "keywords": lambda model, x, mask: model(x=x, mask=mask),
    "mixed": lambda model, x, mask: model(x, mask=mask),
    "mask first": lambda model, x, mask: model(mask=mask, x=x),
}


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
@pytest.mark.parametrize("called", CALLS)
def test_calls(called):
    x, mask, _ = batch()
    model = injected()
    want = explicit(model, x, mask)
    close(CALLS[called](model, x, mask), want, 1e-12)
    assert not torch.equal(want[:3], want[3:])


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_batches_and_outputs():
    x, mask, labels = batch()
    pair = namedtuple("pair", "x mask")
    outputs = {
        "tensor": lambda logits: logits,
        "object": lambda logits: SimpleNamespace(logits=logits),
        "mapping": lambda logits: OrderedDict(loss=None, logits=logits),
        "tuple": lambda logits: (logits.sum(), logits),
    }
    want = None
    for returns in outputs.values():
        for batch_ in ({"x": x, "mask": mask}, (x, mask), [x, mask], pair(x, mask)):
            model = injected(Tokens(returns))
            losses = model.pace.training_step(model, batch_, labels)
            want = want or losses
            assert torch.equal(losses.total, want.total) and losses.consistency > 0
    # The lazy variant halves every tensor of the batch.
    model = injected(variant="lazy", lazy_interval=1)
    halved, rest = model.pace.select({"x": x, "mask": mask, "name": "b"}, labels)
    assert [len(halved["x"]), len(halved["mask"]), halved["name"], len(rest)] == [1, 1, "b", 1]


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_outputs_without_logits_are_the_callers():
    x, mask, labels = batch()
    model = injected(Tokens(lambda logits: {"boxes": logits}))
    want = explicit(injected(), x, mask)
    close(model(x, mask)["boxes"], want, 1e-12)
    with pytest.raises(PaceError, match="no logits"):
        model.pace.training_step(model, (x, mask), labels)


class Nested(nn.Module):
    """Takes a dict as its only argument."""

    def __init__(self):
        super().__init__()
        self.net = Tokens()

    def forward(self, batch, scale=None):
        return self.net(batch["in"][0], batch["in"][1])


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_nested_arguments_and_the_batch():
    x, mask, _ = batch()
    model = injected(Nested())
    close(model({"in": (x, mask)}), explicit(_inner(model), x, mask), 1e-12)
    with pytest.raises(PaceError, match="batch size cannot be told"):
        model({"in": ("a", 3)})
    # A first tensor whose rows are not the batch.
    model = injected(Nested(), batch_of="batch")
    assert len(model(scale=torch.ones(7), batch={"in": (x, mask)})) == 6
    with pytest.raises(PaceError, match="`batch`"):
        model({"in": (x, mask)})


def _inner(model):
    """The inner model with the outer one's controller."""
    inner = model.net
    inner.pace = model.pace
    return inner


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


def test_where_branches_start():
    x, mask, _ = batch()
    with pytest.raises(PaceError, match="branches_at"):
        injected(branches_at="middle")
    # Only the classifier has noise: what comes before is there once.
    model = injected(branches_at="first noisy block", first_noisy=1)
    rows = []
    model.body[1].register_forward_hook(lambda module, args, y: rows.append(len(y)))
    close(model(x, mask), explicit(model, x, mask), 1e-12)
    assert rows == [3]
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    early = injected(vit(), branches_at="input")
    late = copy.deepcopy(injected(vit()))
    assert early.pace.doubles_input and not late.pace.doubles_input
    close(early(images), late(images), 1e-12)

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = linear(4, 4), linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x).mean(0, keepdim=True))

    with pytest.raises(PaceError, match="head|rows"):
        injected(Mixes())(torch.ones(3, 4, dtype=torch.float64))


def names_of(model):
    return {name for name, module in model.named_modules() if isinstance(module, NoisyLinear)}


def test_which_layers():
    assert names_of(injected()) == {"position", "body.0", "body.1", "classifier"}
    assert isinstance(injected().classifier.adapter, pace_torch.Head)
    for settings, names in (
        (dict(target_modules=["body.1"]), {"body.1", "classifier"}),
        (dict(target_modules=r"body\.\d"), {"body.0", "body.1", "classifier"}),
        (dict(exclude_modules=["position"]), {"body.0", "body.1", "classifier"}),
        (dict(target_modules=["0", "1"], exclude_modules=["body.0", "classifier"]), {"body.1"}),
    ):
        model = injected(**settings)
        assert names_of(model) == names
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert all("base_module" in name or name.split(".")[0] in ("position", "body", "classifier") for name in frozen)
    model = injected(head=["body.1"])
    assert isinstance(model.body[1].adapter, pace_torch.Head) and not isinstance(model.classifier.adapter, pace_torch.Head)
    for settings, message in (
        (dict(target_modules=["bodi"]), "target_modules"),
        (dict(head="clas"), "head"),
        (dict(exclude_modules=".*"), "exclude_modules"),
        (dict(sigma=[0.5]), "sigma"),
    ):
        with pytest.raises(PaceError, match=message):
            injected(**settings)


class Scaled(nn.Linear):
    """A forward pass of its own; stands for a quantised layer too."""

    def forward(self, x):
        return 0.5 * super().forward(x)


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
    with pytest.raises(PaceError, match=r"Sums does not map \[..., 8\] to \[..., 8\]"):
        pace_torch.inject(model, "LoRAadd", exclude_modules=["position"], **SETTINGS).eval()(x, mask)


class Pixels(nn.Module):
    """Pointwise convolutions between others, the classifier among them."""

    def __init__(self, convolutions=True):
        super().__init__()
        torch.manual_seed(0)
        make = (lambda k, n: nn.Conv2d(k, n, 1, dtype=torch.float64)) if convolutions else linear
        self.stem = nn.Conv2d(3, 6, 3, dtype=torch.float64)
        self.narrow = nn.ModuleList([make(6, 8), make(8, 8)])
        self.head = make(8, 5)
        self.convolutions = convolutions

    def forward(self, x):
        x = self.stem(x)
        x = x if self.convolutions else x.movedim(1, -1)
        for layer in self.narrow:
            x = torch.tanh(layer(x))
        pooled = x.mean((2, 3) if self.convolutions else (1, 2), keepdim=True)
        return self.head(pooled).flatten(1)


@pytest.mark.parametrize("adapter", ["LoRAmul_VPTadd", "LoRAadd", "VPTadd"])
def test_pointwise_convolutions(adapter):
    x, labels = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.arange(2)
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


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224",
                                  "swinv2_tiny_window8_256", "convit_tiny", "deit_tiny_distilled_patch16_224"])
@pytest.mark.filterwarnings("ignore:.*layers work on rows")
def test_timm_models(name):
    """Families that read weights, have tables of positions, or two classifiers."""
    size = dict(img_size=64 if "v2" in name else 32, num_classes=5)
    size["embed_dim"] = 24
    size.update(depths=(1, 1), num_heads=(2, 2), window_size=4) if "v2" in name else size.update(depth=2, num_heads=2)
    if "convit" in name:
        size.update(local_up_to_layer=1)

    def make():
        torch.manual_seed(0)
        return timm.create_model(name, **size).double()

    x, labels = torch.randn(2, 3, size["img_size"], size["img_size"], dtype=torch.float64), torch.arange(2)
    before = make().eval()(x)
    model = pace_torch.inject(make(), **SETTINGS)
    close(model.eval()(x), before, 1e-9)
    perturb(model).train()
    losses = model.pace.training_step(model, x, labels)
    losses.total.backward()
    assert losses.consistency > 0
    missing = [path for path, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    # The second classifier of a distilled model has no part in the loss of the first.
    assert all(path.startswith("head_dist") for path in missing), missing
    for layer in model.modules():
        if isinstance(layer, NoisyLinear):
            layer.sigma = 0.0
    assert model.pace.training_step(model, x, labels).consistency == 0
    want = model.eval()(x)
    merged = pace_torch.merge(model).eval()
    close(merged(x), want, 1e-9)
    again = make().eval()
    again.load_state_dict(merged.state_dict())
    close(again(x), want, 1e-9)


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


class Wrapper(nn.Module):
    """As DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_wrappers_are_seen_through():
    x, mask, labels = batch()
    for wrap in (Wrapper, lambda model: torch.compile(model, backend="eager"), lambda m: Wrapper(Wrapper(m))):
        model = injected()
        wrapped = wrap(model)
        assert pace_torch.trainable_state_dict(wrapped).keys() == pace_torch.trainable_state_dict(model).keys()
        model.pace.training_step(wrapped, (x, mask), labels).total.backward()
        y = model.eval()(x, mask)
        merged = pace_torch.merge(wrapped)
        assert merged is model and not hasattr(model, "pace") and type(model.body[0]) is nn.Linear
        close(model.train()(x, mask), y, 1e-12)


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_what_is_saved():
    x, mask, labels = batch()

    def make(**settings):
        model = Tokens()
        model.norm, model.extra = nn.BatchNorm1d(5, dtype=torch.float64), nn.Parameter(torch.ones(1, dtype=torch.float64))
        model.returns = lambda logits: model.norm(logits) * model.extra
        model = pace_torch.inject(model, **{**SETTINGS, **settings}).train()
        model.extra.requires_grad_(True)
        return model

    model = make(variant="fast", samples=3)
    model.pace.training_step(model, (x, mask), labels, torch.arange(3)).total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    saved, where = copy.deepcopy(pace_torch.trainable_state_dict(model)), copy.deepcopy(model.pace.state_dict())
    assert {"extra", "norm.running_mean", "classifier.adapter.base_module.weight"} <= saved.keys()
    assert not any(name.startswith("pace") for name in model.state_dict())
    fresh = make(variant="fast", samples=3)
    pace_torch.load_trainable_state_dict(fresh, saved)
    fresh.pace.load_state_dict(where)
    close(fresh.eval()(x, mask), model.eval()(x, mask), 0)
    again = [m.train().pace.training_step(m, (x, mask), labels, torch.arange(3)) for m in (model, fresh)]
    assert torch.equal(again[0].total, again[1].total) and again[0].consistency > 0
    for other, message in ((make(adapter="LoRAadd"), "other adapters"), (make(rank=3), "expected"),
                           (make(target_modules=["body.0"]), "other adapters")):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(PaceError, match=message):
            pace_torch.load_trainable_state_dict(other, saved)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(PaceError, match="iteration"):
        fresh.pace.load_state_dict({"step": 1})
    table = pace_torch.describe(model)
    assert "body.0" in table and "LoraMulVptAdd" in table and "Head" in table and "0.5" in table


def test_soft_labels():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(3)
    hard = pace_torch.pace_loss(logits, labels, 0.3, label_smoothing=0.1)
    soft = pace_torch.pace_loss(logits, nn.functional.one_hot(labels, 5).double(), 0.3, label_smoothing=0.1)
    for name in ("total", "classification", "consistency"):
        close(getattr(soft, name).detach(), getattr(hard, name).detach(), 1e-12)
    gradients = [torch.autograd.grad(losses.total, logits)[0] for losses in (hard, soft)]
    close(gradients[1], gradients[0], 1e-12)
    for wrong in (torch.ones(3, 4), torch.ones(2, 5), torch.ones(3, 5), -torch.eye(3, 5)):
        with pytest.raises(PaceError, match="labels"):
            pace_torch.pace_loss(logits, wrong)
    for labels in ([0, 1, 2], None):
        with pytest.raises(PaceError, match="labels"):
            pace_torch.pace_loss(logits, labels)


@pytest.mark.filterwarnings("ignore")
def test_tracing():
    x, mask, _ = batch()
    for adapter in pace_torch.inject.__globals__["ADAPTERS"]:
        for variant in ("pace", "baseline"):
            model = injected(adapter=adapter, variant=variant).eval()
            want = model(x, mask)
            close(torch.jit.trace(model, (x, mask))(x, mask), want, 1e-12)


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


def test_the_look_at_the_model_leaves_no_trace():
    class Splits(nn.Module):
        """Does something when it is told that training ends."""

        told = 0

        def train(self, mode=True):
            self.told += 1
            return super().train(mode)

        def forward(self, x):
            return x

    model = Tokens()
    model.returns = Splits()
    injected(model)
    told = model.returns.told
    x, mask, _ = batch()
    with pytest.warns(UserWarning):
        model(x, mask)
    assert model.returns.told == told and model.training

    class OneOnly(Tokens):
        def forward(self, x, mask=None):
            if len(x) == 2:
                raise ValueError("not two")
            return super().forward(x, mask)

    model = injected(OneOnly(), exclude_modules=["position"])
    with pytest.warns(UserWarning, match="not two.*taken for granted"):
        close(model(x, mask), explicit(model, x, mask), 1e-12)


@pytest.mark.filterwarnings("ignore")
def test_rows_by_chance():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = linear(6, 8), linear(8, 8)

        def forward(self, x, prototypes):
            return self.head(torch.tanh(self.body(x))) @ prototypes.T

    x, prototypes = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(PaceError, match="6 logits of a sample, and 2.*batch_of"):
        injected(Prototypes())(x=x, prototypes=prototypes)
    assert injected(Prototypes(), batch_of=["x"])(x=x, prototypes=prototypes).shape == (6, 3)
    lazy = injected(Prototypes(), batch_of=["x"], variant="lazy", lazy_interval=1)
    halved, labels = lazy.pace.select({"prototypes": prototypes, "x": x[:2]}, torch.arange(2))
    assert [len(halved["x"]), len(halved["prototypes"]), len(labels)] == [1, 3, 1]


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
