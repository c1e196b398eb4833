"""Models of every kind: how they are called, where branches start, which layers get adapters, and what survives."""

import copy
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pace_torch
import pytest
import timm
import torch
from conftest import close, perturb, vit
from models import SETTINGS, Tokens, batch, explicit, injected, linear, names_of
from pace_torch import NoisyLinear, PaceError
from torch import Tensor, nn


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


class InPace(nn.Module):
    """Has something called `pace`, and a layer called `adapter`."""

    def __init__(self, pace=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"adapter": linear(6, 8)})
        self.classifier = linear(8, 5)
        if pace is not None:
            self.pace = pace

    def forward(self, x):
        return self.classifier(torch.tanh(self.body["adapter"](x)).mean(1))


def made_in_inference_mode():
    with torch.inference_mode():
        return InPace()


def quantised_head():
    model = InPace()
    model.classifier.weight = nn.Parameter(torch.ones(5, 8, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(("make", "message"), [
    (lambda: InPace(nn.Linear(3, 3)), "`pace` of its own"),
    (lambda: InPace(nn.Parameter(torch.ones(3))), "`pace` of its own"),
    (lambda: InPace(3.5), "`pace` of its own"),
    (made_in_inference_mode, "inference_mode"),
    (quantised_head, "`classifier` .*int8"),
])
def test_what_cannot_be_injected_is_left_as_it_was(make, message):
    model = make()

    def state():
        return [*model.named_modules(), *vars(model).items(), *((name, p.requires_grad) for name, p in model.named_parameters())]

    before = state()
    for variant in ("pace", "baseline"):
        with pytest.raises(PaceError, match=message):
            pace_torch.inject(model, "LoRAadd", 2, variant=variant)
    assert state() == before


def test_what_ddp_is_told_to_ignore():
    model, ignored = InPace(), "_ddp_params_and_buffers_to_ignore"
    setattr(model, ignored, ["classifier.bias"])
    assert getattr(pace_torch.inject(model), ignored) == ["classifier.bias", "pace.keys"]
    assert getattr(pace_torch.merge(model), ignored) == ["classifier.bias"]
    assert not hasattr(pace_torch.merge(pace_torch.inject(InPace())), ignored)


@pytest.mark.parametrize("variant", ["pace", "baseline"])
def test_a_layer_called_adapter(variant):
    model, x = injected(InPace(), adapter="LoRAadd", variant=variant).eval(), batch()[0]
    want, table = model(x), pace_torch.describe(model)
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == ["body.adapter", "classifier"]
    merged = pace_torch.merge(model)
    assert type(merged.body["adapter"]) is nn.Linear and merged.state_dict().keys() == InPace().state_dict().keys()
    close(merged(x), want, 1e-12)


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
    for excluded in (["position", "bodi"], "bodi"):
        with pytest.warns(UserWarning, match="`exclude_modules` has 'bodi': no linear layer"):
            injected(exclude_modules=excluded)
    with pytest.raises(PaceError, match="merged already"):
        pace_torch.merge(pace_torch.merge(injected()))
    for settings, message in (
        (dict(target_modules=["bodi"]), "target_modules"),
        (dict(head="clas"), "head"),
        (dict(exclude_modules=".*"), "exclude_modules"),
        (dict(sigma=[0.5]), "sigma"),
    ):
        with pytest.raises(PaceError, match=message):
            injected(**settings)


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


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
def test_nothing_is_loaded_unless_all_can_be():
    model = injected()
    saved = {name: tensor + 1 for name, tensor in pace_torch.trainable_state_dict(model).items()}
    before, last = copy.deepcopy(model.state_dict()), list(saved)[-1]
    for of_last, message in (
        (lambda tensor: tensor.to("meta"), f"`{last}` .*meta"),
        (Tensor.to_sparse, f"`{last}` .*sparse"),
        (lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), f"`{last}` .*qint8"),
        (lambda tensor: tensor + 1j, f"`{last}` .*complex128"),
        (lambda tensor: tensor.to(torch.uint8).view(torch.bits8), f"`{last}` .*bits8"),
        (Tensor.tolist, "no mapping of names to tensors"),
    ):
        with pytest.raises(PaceError, match=message):
            pace_torch.load_trainable_state_dict(model, {**saved, last: of_last(saved[last])})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for wrong in ({1: torch.ones(1), "a": torch.ones(1)}, {**saved, 1: torch.ones(1)}, None):
        with pytest.raises(PaceError, match="no mapping of names to tensors"):
            pace_torch.load_trainable_state_dict(model, wrong)


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


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
@pytest.mark.parametrize("dropout", ["independent", "shared"])
def test_the_look_at_the_model_leaves_the_batch_alone(dropout):
    """Models that normalise in place do so once in each step, to what has rows of samples and to what has none."""

    class InPlace(Tokens):
        def forward(self, x, scale):
            return super().forward(x.sub_(10).mul_(scale.mul_(0.5)))

    x, labels = batch()[0], torch.arange(3)
    given, scale, seen = x.clone(), torch.ones((), dtype=torch.float64), []
    model = injected(InPlace(), dropout=dropout)
    model.body[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    model.pace.training_step(model, (given, scale), labels)
    assert torch.equal(given, x) and scale == 0.5 and torch.equal(seen[-1], torch.cat([(x - 10) * 0.5] * 2))


def test_the_look_at_the_model_takes_buffers_of_inference_mode():
    model = injected(exclude_modules=["position"])
    with torch.inference_mode():
        model.table = model.table.clone()
    model.pace.training_step(model, batch()[:2], batch()[2]).total.backward()


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
