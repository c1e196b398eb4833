"""Whole models: recorded training runs, the official model side by side, checkpoints, copies, autocast."""

import copy
import pickle
import sys

import official
import pace_torch
import pytest
import torch
from conftest import close, error, golden, perturb, swin, vit
from pace_torch import NoisyLinear, PaceError, SharedDropPath, _library
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

ADAPTERS = {"LoRAmul_VPTadd": "lora_mul_vpt", "LoRAadd": "lora_add", "VPTadd": "vpt_add"}


def batch(n=4, classes=5, image=16, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, image, image, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def noisy_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NoisyLinear)}


def official_name(recorded):
    """`blocks.0.attn.qkv.base_weight` of a recording is `blocks.0.attn.qkv.adapter.base_module.weight`."""
    layer, _, parameter = recorded.rpartition(".")
    if parameter.startswith(("base_", "delta_")):
        return f"{layer}.adapter.{parameter.replace('base_', 'base_module.')}"
    return recorded


@golden("vit_*")
def test_recorded_training(case):
    setting, number = case.settings, lambda name: float(case.settings[name])
    mode, steps = setting["mode"], case["grad_norm"].numel()
    index = torch.cat([case[f"step{step}.index"] for step in range(steps)])
    model = vit()
    model = pace_torch.inject(
        model, setting["adapter"], int(setting["rank"]), sigma=number("sigma"), lambda_=number("lambda_"), variant=mode,
        lazy_interval=int(setting.get("lazy_interval", 2)), samples=int(index.max()) + 1,
    )
    model.load_state_dict({official_name(name): value for name, value in case.under("init.").items()})
    layers = noisy_layers(model)
    blocks = ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.2.attn.qkv", "head"]
    close(torch.tensor([layers[name].sigma for name in blocks], dtype=torch.float64), case["sigmas_by_block"], 1e-15)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = tuple(map(float, setting["betas"].split(",")))
    optimizer = torch.optim.AdamW(
        trained, lr=number("lr"), betas=betas, eps=number("eps"), weight_decay=number("weight_decay")
    )
    model.train()
    for step in range(steps):
        for name, z in case.under(f"step{step}.z.").items():
            layers[name].z = z
        x, labels = model.pace.select(case[f"step{step}.x"], case[f"step{step}.labels"])
        logits = model(x)
        close(logits[: len(labels)], case[f"step{step}.logits"], 1e-8)
        losses = model.pace.loss(logits, labels, case[f"step{step}.index"])
        total, cls, pace = case["losses_total_cls_pace"][step]
        close(losses.total, total, 1e-8)
        close(losses.classification, cls, 1e-8)
        # Without a consistency term the official code reports none.
        assert losses.consistency == 0 if pace.isnan() else error(losses.consistency, pace) <= 1e-8
        optimizer.zero_grad()
        losses.total.backward()
        norm = pace_torch.grad_norm([p.grad for p in trained if p.grad is not None])
        close(norm, case["grad_norm"][step], 1e-8)
        optimizer.step()
    final = {official_name(name): value for name, value in case.under("final.").items()}
    assert final.keys() == pace_torch.trainable_state_dict(model).keys()
    for name, value in final.items():
        close(model.get_parameter(name), value, 1e-8)
    model.eval()
    close(model(case["eval.x"]), case["eval.logits"], 1e-8)
    assert all(layer.z is not None for name, layer in layers.items() if not name.startswith("blocks.0."))


def side_by_side(make, first_noisy, adapter, noise_shape="BC", drop_path_rate=0.0, image=16):
    """One of our models with generated noise, and the official one with that noise and those masks given."""
    ours = make(drop_path_rate=drop_path_rate)
    perturb(
        pace_torch.inject(ours, adapter, 4, sigma=0.8, noise_shape=noise_shape, seed=9, new_biases=True)
    ).train()
    theirs = official.inject(
        make(drop_path_rate=drop_path_rate), ADAPTERS[adapter], 4, 0.8, first_noisy=first_noisy, shape=noise_shape
    )
    theirs.load_state_dict(ours.state_dict())
    theirs.train()
    x, labels = batch(image=image)

    modules = dict(theirs.named_modules())

    def record(module, args):
        name = names[module]
        if isinstance(module, SharedDropPath):
            kept = ours.pace.drop_path(module.layer, module.drop_prob, torch.ones(len(x), 1, dtype=torch.float64)) > 0
            modules[name].mask = kept.flatten().double()
        elif module.sigma > 0:
            rows, tokens = args[0].shape[0], args[0][0].numel() // args[0].shape[-1]
            source = ours.pace.noise(module.layer, module.sigma, rows)
            n = module.adapter.base_module.out_features
            z = pace_torch.noise(source, rows // source.branches, n, tokens).double()
            modules[name].z = z.view(*args[0].shape[:-1], n) if noise_shape == "BTC" else z
            seen.append(name)

    names = {module: name for name, module in ours.named_modules() if isinstance(module, (NoisyLinear, SharedDropPath))}
    seen = []
    handles = [module.register_forward_pre_hook(record) for module in names]
    losses = ours.pace.training_step(ours, x, labels)
    for handle in handles:
        handle.remove()
    losses.total.backward()
    expected = official.two_branch_loss(theirs, x, labels, 1.0)
    expected.total.backward()
    return ours, theirs, losses, expected, seen


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("noise_shape", ["BC", "BTC"])
def test_vit_is_the_official_one(adapter, noise_shape):
    ours, theirs, losses, expected, seen = side_by_side(vit, 1, adapter, noise_shape)
    assert len(seen) == 9
    compare(ours, theirs, losses, expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("noise_shape", ["BC", "BTC"])
def test_swin_is_the_official_one(adapter, noise_shape):
    # Windows, a layer without bias, DropPath, two levels of blocks, a head inside a module.
    ours, theirs, losses, expected, seen = side_by_side(swin, 0, adapter, noise_shape, drop_path_rate=0.5, image=32)
    assert len(seen) == 18 and {"head.fc", "layers.1.downsample.reduction"} <= set(seen)
    compare(ours, theirs, losses, expected)


def compare(ours, theirs, losses, expected):
    close(losses.total, expected.total)
    close(losses.consistency, expected.pace)
    assert losses.consistency > 0
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
        else:
            # An absolute floor: the gradient to the bias of attention's keys is zero up to rounding.
            scale = max(theirs[name].grad.abs().max().item(), 1e-4)
            assert (parameter.grad - theirs[name].grad).abs().max().item() <= 1e-10 * scale, name


def test_sigmas_of_a_swin_start_at_its_first_block():
    model = pace_torch.inject(swin(), rank=2, sigma=1.0)
    layers = noisy_layers(model)
    sigmas = [layers[name].sigma for name in ("layers.0.blocks.0.mlp.fc1", "layers.0.blocks.1.mlp.fc1",
                                             "layers.1.downsample.reduction", "layers.1.blocks.0.mlp.fc1",
                                             "layers.1.blocks.1.mlp.fc1", "head.fc")]
    assert sigmas == pytest.approx([1.0, 0.8, 0.6, 0.6, 0.4, 0.2])


def test_the_trunk_before_the_noise_runs_once():
    model = pace_torch.inject(vit(drop_path_rate=0.2), rank=2).train()
    rows = {}
    for i, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda module, args, out, i=i: rows.setdefault(i, []).append(len(out)))
    assert len(model(batch(3)[0])) == 6
    assert rows == {0: [3], 1: [6], 2: [6]}
    model.eval()
    assert len(model(batch(3)[0])) == 3


@pytest.mark.parametrize(("first_noisy", "doubled"), [(2, "layers.1"), (4, "head.fc")])
def test_doubling_wherever_the_noise_starts(first_noisy, doubled):
    model = pace_torch.inject(swin(), rank=2, first_noisy=first_noisy).train()
    assert len(model.get_submodule(doubled)._forward_pre_hooks) == 1
    assert len(model(batch(3, image=32)[0])) == 6


def test_every_forward_pass_has_its_noise():
    model = perturb(pace_torch.inject(vit(), rank=2, seed=4)).train()
    x, _ = batch()
    first, second = model(x), model(x)
    assert not torch.equal(first, second) and not torch.equal(first[:4], first[4:])
    assert model.pace.step == 2
    model.pace.step = 0
    assert torch.equal(model(x), first)
    model.pace.step, model.pace.seed = 0, 5
    assert not torch.equal(model(x), first)
    # Forward passes may pile up before their backward passes.
    model.pace.step, model.pace.seed = 0, 4
    a, b = model(x), model(x)
    (a.square().sum() + b.square().sum()).backward()
    model.eval()
    assert torch.equal(model(x), model(x)) and model.pace.step == 2


@pytest.mark.parametrize("training", [True, False])
def test_injection_and_merging_keep_the_mode(training):
    model = swin(drop_path_rate=0.5).train(training)
    assert all(module.training == training for module in pace_torch.inject(model, rank=2).modules())
    assert all(module.training == training for module in pace_torch.merge(model).modules())


def test_manual_steps():
    model = perturb(pace_torch.inject(vit(), rank=2, seed=4)).train()
    x, _ = batch()
    automatic = [model(x), model(x)]
    model.pace.manual_steps, model.pace.step, model.pace.drawn = True, 0, False
    with pytest.raises(PaceError, match="advance"):
        model(x)
    keys = model.pace.keys
    for expected in automatic:
        model.pace.advance()
        assert torch.equal(model(x), expected)
    assert model.pace.keys is keys
    # Changing the keys between the passes is noticed.
    y = model(x)
    model.pace.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("variant", ["pace", "lazy", "fast", "noise", "baseline"])
def test_variants_learn(variant):
    model = vit(dtype=torch.float32)
    pace_torch.inject(model, "LoRAadd", 4, sigma=0.3, variant=variant, samples=8, lambda_=0.1).train()
    x, labels = batch(8, dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    history, branches = [], []
    for _ in range(20):
        losses = model.pace.training_step(model, x, labels, torch.arange(8))
        losses.check()
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.classification.item())
        branches.append(model.pace.branches)
    assert history[-1] < 0.8 * history[0]
    expected = {"pace": [2] * 20, "lazy": [2, 1] * 10}.get(variant, [1] * 20)
    assert branches == expected
    assert (model.pace.history is not None) == (variant == "fast")
    model.eval()
    losses = model.pace.loss(model(x), labels)
    assert losses.consistency == 0
    assert not any(isinstance(m, NoisyLinear) for m in model.modules()) or variant != "baseline"


def test_history_follows_the_type_of_the_logits():
    model = pace_torch.inject(vit(dtype=torch.float32), rank=2, variant="fast", samples=6).train()
    x, labels = batch(dtype=torch.float32)
    model.pace.training_step(model, x, labels, torch.arange(4))
    model.bfloat16()
    losses = model.pace.training_step(model, x.bfloat16(), labels, torch.arange(2, 6))
    losses.total.backward()
    assert model.pace.history.dtype == torch.float32 and model.pace.history.abs().sum(1).gt(0).all()


def test_names_are_the_official_ones_and_load_both_ways():
    for noise, variant in ((True, "pace"), (False, "baseline")):
        ours = perturb(pace_torch.inject(vit(), rank=4, variant=variant))
        theirs = official.inject(vit(seed=5), rank=4, noise=noise)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
            n for n, p in theirs.named_parameters() if p.requires_grad
        }
        theirs.load_state_dict(ours.state_dict())
        # What the official script saves is enough to continue from the same pre-trained weights.
        saved = pace_torch.trainable_state_dict(theirs)
        assert saved.keys() == {name for name in theirs.state_dict() if "delta" in name or "head" in name}
        again = pace_torch.inject(vit(), rank=4, variant=variant)
        result = again.load_state_dict(saved, strict=False)
        assert not result.unexpected_keys and not any("delta" in key or "head" in key for key in result.missing_keys)
        again.eval(), ours.eval()
        x, _ = batch()
        assert torch.equal(again(x), ours(x))


def test_checkpoints_with_and_without_noise_and_plain_ones_load():
    x, _ = batch()
    source = perturb(pace_torch.inject(vit(), rank=4)).eval()
    baseline = pace_torch.inject(vit(seed=6), rank=4, variant="baseline").eval()
    baseline.load_state_dict(source.state_dict())
    assert torch.equal(baseline(x), source(x))
    noisy = pace_torch.inject(vit(seed=7), rank=4).eval()
    noisy.load_state_dict(baseline.state_dict())
    assert torch.equal(noisy(x), source(x))

    plain = vit(seed=8).eval()
    for variant in ("pace", "baseline"):
        model = pace_torch.inject(vit(seed=9), rank=4, variant=variant).eval()
        result = model.load_state_dict(plain.state_dict(), strict=False)
        assert not result.unexpected_keys and all("delta" in key for key in result.missing_keys)
        close(model(x), plain(x), 1e-12)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("variant", ["pace", "baseline"])
@pytest.mark.parametrize("new_biases", [True, False])
def test_merging(adapter, variant, new_biases):
    model = pace_torch.inject(swin(drop_path_rate=0.1), adapter, 4, variant=variant, new_biases=new_biases)
    model = perturb(model).eval()
    x, _ = batch(image=32)
    before = model(x)
    linears = sum(isinstance(module, nn.Linear) for module in swin().modules())
    merged = pace_torch.merge(model)
    close(merged(x), before, 1e-12)
    assert sum(type(module) is nn.Linear for module in merged.modules()) == linears
    assert not any("pace_torch" in type(module).__module__ for module in merged.modules())
    merged.train()
    assert len(merged(x)) == 4
    names = set(merged.state_dict()) - set(swin().state_dict())
    # The adapter gives the downsampling layer a bias, if it may.
    assert names == ({"layers.1.downsample.reduction.bias"} if new_biases else set())
    assert new_biases or not swin().load_state_dict(merged.state_dict()).missing_keys


def test_copies():
    model = perturb(pace_torch.inject(vit(drop_path_rate=0.3), rank=4, seed=3)).train()
    x, labels = batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.pace is other.blocks[0].attn.qkv.pace and other.pace is not model.pace
        other.pace.step = model.pace.step
        step = model.pace.step
        expected = model(x)
        assert torch.equal(other(x), expected) and other.pace.step == step + 1
        other.pace.branches = 1
        assert len(other(x)) == 4 and len(model(x)) == 8


def test_gradient_checkpointing():
    plain = perturb(pace_torch.inject(vit(drop_path_rate=0.3), rank=4, seed=3)).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x, labels = batch()
    for model in (plain, saving):
        model.pace.training_step(model, x, labels).total.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    # The second forward pass has moved the model on to other noise.
    a, b = saving(x), saving(x)
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        (a.sum() + b.sum()).backward()
    # So it does when keys are written in place.
    plain.pace.manual_steps = True
    plain.pace.advance()
    logits = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    plain.pace.advance()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        logits.sum().backward()


def test_the_output_of_a_gelu_is_made_again_rather_than_kept(monkeypatch):
    """As on CUDA: the same gradients, and nobody holds the tensor between the passes."""
    x, labels = batch()

    def grads(model):
        outputs = []
        act = model.blocks[1].mlp.act
        watching = act.register_forward_hook(lambda _, __, y: outputs.append(StorageWeakRef(y.untyped_storage())))
        losses = model.pace.training_step(model, x, labels)
        watching.remove()
        assert act is model.blocks[1].mlp.fc2.gelu and act.last is None
        is_kept = not outputs[0].expired()
        losses.total.backward()
        return is_kept, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    models = [perturb(pace_torch.inject(vit(), rank=4, seed=3)).train()]
    models += [copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))]
    # Checkpointing has its own say.
    models[2].set_grad_checkpointing()
    is_kept, expected = grads(models[0])
    assert is_kept
    monkeypatch.setattr(pace_torch.modules, "_recomputes", lambda y: True)
    for model in models[1:]:
        is_kept, got = grads(model)
        assert not is_kept
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)

    # Whoever changes the output in place gets the gradients of what he made of it.
    changed = []
    for recomputes in (True, False):
        monkeypatch.setattr(pace_torch.modules, "_recomputes", lambda y: recomputes)
        model = copy.deepcopy(models[1])
        model.zero_grad()
        model.pace.step = 0
        model.blocks[1].mlp.act.register_forward_hook(lambda _, __, y: (y.mul_(0.5), None)[1])
        changed.append(grads(model)[1])
    assert all(torch.equal(changed[0][name], changed[1][name]) for name in changed[1])
    monkeypatch.setattr(pace_torch.modules, "_recomputes", lambda y: True)

    inputs = []
    models[1].blocks[1].mlp.fc1.register_forward_hook(lambda _, __, h: inputs.append(h.detach()))
    logits = models[1](x)
    inputs[0].add_(1.0)
    with pytest.raises(RuntimeError, match="in place|inplace"):
        logits.sum().backward()
    assert type(pace_torch.merge(models[1]).blocks[1].mlp.act) is nn.GELU


def test_injected_layers_are_exact_on_request(flags):
    for exact in (False, True):
        model = pace_torch.inject(vit(), rank=4, exact=exact).train()
        model.pace.training_step(model, *batch()).total.backward()
        # In both passes, and of the head, which has nothing to fold, never.
        assert sorted(flags) == [0, 0] + [_library.EXACT if exact else 0] * (2 * len(noisy_layers(model)) - 2)
        flags.clear()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_autocast(adapter):
    ours = perturb(pace_torch.inject(vit(dtype=torch.float32), adapter, 4, sigma=0.5), 0.02).train()
    exact = copy.deepcopy(ours).double()
    theirs = official.inject(vit(dtype=torch.float32), ADAPTERS[adapter], 4, 0.5)
    theirs.load_state_dict(ours.state_dict())
    theirs.train()
    x, labels = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(x)
    assert logits.dtype == torch.bfloat16
    expected = exact(x.double())
    for name, layer in noisy_layers(ours).items():
        if layer.sigma > 0:
            n = layer.adapter.base_module.out_features
            z = pace_torch.noise(ours.pace.noise(layer.layer, layer.sigma, 8), 4, n)
            theirs.get_submodule(name).z = z
    with torch.autocast("cpu", torch.bfloat16):
        unfused = theirs(torch.cat([x, x]))
    assert error(logits, expected) <= 2 * error(unfused, expected)
    ours.pace.loss(logits, labels).total.backward()
    for name, parameter in ours.named_parameters():
        assert not parameter.requires_grad or parameter.grad.dtype == torch.float32, name


def test_what_is_kept_for_the_backward_pass():
    """LoRA mul keeps no ΔW, and VPT add, which trains a bias only, not even its input."""
    x = torch.randn(4, 17, 24, requires_grad=True)
    noise = pace_torch.Noise(pace_torch.keys(0, 0, 1), 0.5, branches=2)
    for adapter, expected in (
        (pace_torch.LoraMulVptAdd(nn.Linear(24, 48), 4), {(4, 17, 24)}),
        (pace_torch.LoraAdd(nn.Linear(24, 48), 4), {(4, 17, 24)}),
        (pace_torch.VptAdd(nn.Linear(24, 48), 4), set()),
        (pace_torch.Head(nn.Linear(24, 48)), {(4, 17, 24)}),
    ):
        owned = {parameter.data_ptr() for parameter in adapter.parameters()} | {noise.key.data_ptr(), 0}
        kept = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t.data_ptr() in owned or kept.add(tuple(t.shape)), t)[1], lambda t: t
        ):
            adapter(x, noise)
        assert kept == expected, type(adapter).__name__


@pytest.mark.parametrize(("kind", "forward", "both"), [("LoraMulVptAdd", 100, 240), ("LoraAdd", 90, 210), ("VptAdd", 85, 200)])
def test_a_layer_is_few_calls_away_from_the_library(kind, forward, both):
    """Python's calls from the layer on, into C included, and one call of the library in each pass."""
    model = pace_torch.inject(vit(dtype=torch.float32), rank=4).train()
    adapter = getattr(pace_torch, kind)(nn.Linear(24, 48), 4)
    layer = NoisyLinear(adapter, 0.5, model.pace, 1).train()
    model.pace.batch, model.pace.running = 2, True
    x, dy = torch.randn(4, 17, 24, requires_grad=True), torch.randn(4, 17, 48)
    prepared = pace_torch.ops._arguments._Prepared.__call__.__code__

    def count(run):
        calls = library = 0

        def note(frame, event, _):
            nonlocal calls, library
            calls += event in ("call", "c_call")
            library += event == "call" and frame.f_code is prepared

        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
        return calls, library

    layer(x).backward(dy)
    calls, library = count(lambda: layer.forward(x))
    assert calls <= forward and library == 1
    calls, library = count(lambda: layer.forward(x).backward(dy))
    assert calls <= both and library == 2


def test_what_cannot_be_captured():
    x, labels = batch()
    with pytest.raises(PaceError, match="wraps"):
        pace_torch.CapturedStep(nn.Sequential(pace_torch.inject(vit(), rank=2)).train(), x, labels)
    with pytest.raises(PaceError, match="CUDA"):
        pace_torch.CapturedStep(pace_torch.inject(vit(), rank=2).train(), x, labels)


def test_inference_mode():
    model = perturb(pace_torch.inject(vit(), rank=2)).eval()
    x, _ = batch()
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        model.train()
        assert len(model(x)) == 8


def test_a_shard_draws_its_part_of_the_global_noise():
    whole = perturb(pace_torch.inject(swin(drop_path_rate=0.4), rank=2, seed=6)).train()
    x, _ = batch(4, image=32)
    logits = whole(x)
    for rank in (0, 1):
        part = copy.deepcopy(whole)
        part.pace.step, part.pace.shard = 0, (rank, 2)
        rows = slice(2 * rank, 2 * rank + 2)
        close(part(x[rows]), torch.cat([logits[:4][rows], logits[4:][rows]]), 1e-12)


def test_wrong_use_is_named():
    x, labels = batch()
    for arguments, message in (
        ({"adapter": "LoRA"}, "adapter"),
        ({"variant": "slow"}, "variant"),
        ({"variant": "fast"}, "samples"),
        ({"rank": 0}, "rank"),
        ({"sigma": -1.0}, "sigma"),
        ({"noise_shape": "CB"}, "noise_shape"),
        ({"lazy_interval": 0}, "lazy_interval"),
        ({"first_noisy": 4}, "first_noisy"),
    ):
        with pytest.raises(PaceError, match=message):
            pace_torch.inject(vit(), **arguments)
    with pytest.raises(PaceError, match="linear"):
        pace_torch.inject(nn.Sequential(nn.ReLU()))
    model = pace_torch.inject(vit(), rank=2).train()
    with pytest.raises(PaceError, match="already"):
        pace_torch.inject(model)
    with pytest.raises(PaceError, match="outside"):
        model.blocks[1](torch.ones(4, 17, 24, dtype=torch.float64))
    with pytest.raises(PaceError, match="logits"):
        model.pace.loss(model(x)[:4], labels)
    with pytest.raises(PaceError, match="evaluation"):
        model.eval().pace.training_step(model, x, labels)

    class ReadsWeights(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.linear.weight)

    for variant in ("pace", "baseline"):
        with pytest.raises(PaceError, match="linear.*bias.*exclude_modules"):
            pace_torch.inject(ReadsWeights(), variant=variant)(torch.ones(2, 4))
    for settings in ({}, {"variant": "noise"}, {"packed": True}):
        one = pace_torch.inject(vit(), rank=2, **settings).train()
        none = {"x": x[:0], "position_ids": labels[:0, None]} if one.pace.packed else x[:0]
        with pytest.raises(PaceError, match="the batch is empty"):
            one.pace.training_step(one, none, labels[:0])
        assert one.pace.step == 0
    lazy = pace_torch.inject(vit(), rank=2, variant="lazy").train()
    for few in (0, 1):
        with pytest.raises(PaceError, match=f"{few} samples.*halves"):
            lazy.pace.select(x[:few], labels[:few])
    for wrong, message in ((None, "`labels` is NoneType"), ([0, 1, 2, 3], "`labels` is list"), (labels[:3], "3 rows.*4 samples")):
        with pytest.raises(PaceError, match=message):
            lazy.pace.training_step(lazy, x, wrong)
    assert lazy.pace.iteration == 0
    fast = pace_torch.inject(vit(), rank=2, variant="fast", samples=4).train()
    with pytest.raises(PaceError, match="index"):
        fast.pace.training_step(fast, x, labels)
    with pytest.raises(PaceError, match=r"index\[3\]"):
        fast.pace.training_step(fast, x, labels, torch.arange(1, 5))
