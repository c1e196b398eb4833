"""Several sequences packed in a row: each has the noise, the consistency and the gradient that it has by itself."""

import copy

import pace_torch
import pytest
import torch
from conftest import close, perturb
from pace_torch import PaceError
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
LENGTHS = (4, 2, 5)
SETTINGS = dict(sigma=0.5, lambda_=0.1)
SIZES = dict(vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2), ["q_proj", "down_proj"]),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", dict(n_layer=2, n_head=2, n_embd=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
              ["c_attn", "c_fc"]),
}


def make(name, way, **settings):
    kind, config, sizes, targets = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(use_cache=False, **SIZES, **sizes))
    if way == "inject":
        return perturb(pace_torch.inject(model.double(), "LoRAadd", 2, target_modules=targets, **SETTINGS, **settings)).train()
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "GPT-2")
    return pace_torch.attach(perturb(peft.get_peft_model(model, config).double()), **SETTINGS, **settings).train()


def sequences():
    ids = torch.randint(3, 30, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return ids, mask


def unpacked(side="right"):
    """A sequence in each row, padded."""
    ids, mask = sequences()
    labels = torch.where(mask, ids, -100)
    labels[:, 0] = -100
    ids = torch.where(mask, ids, 0)
    rows = [ids, mask.long(), labels]
    if side == "left":
        rows = [torch.stack([row.roll(max(LENGTHS) - n) for row, n in zip(tensor, LENGTHS)]) for tensor in rows]
    ids, mask, labels = rows
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}, labels


def packed():
    """All sequences in one row, as transformers' DataCollatorWithFlattening has them; the labels of first tokens are given, and count for
    nothing."""
    ids, mask = sequences()
    position = torch.arange(max(LENGTHS)).expand_as(ids)
    batch = {"input_ids": ids[mask], "position_ids": position[mask]}
    return {name: tensor.view(1, -1) for name, tensor in batch.items()}, ids[mask].view(1, -1).clone()


def gradients(model, losses):
    model.zero_grad()
    losses.total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("way", ["inject", "attach"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_unpacked(name, way):
    apart = make(name, way)
    batch, labels = unpacked()
    want = apart.pace.training_step(apart, batch, labels)
    model = make(name, way, packed=True)
    seen = noise_of(model)
    batch, labels = packed()
    losses = model.pace.training_step(model, batch, labels)
    for term in ("total", "classification", "consistency"):
        close(getattr(losses, term), getattr(want, term), 1e-10)
    assert losses.consistency > 0
    found, wanted = gradients(model, losses), gradients(apart, want)
    for path in wanted:
        close(found[path], wanted[path], 1e-9)
    # Bit for bit the noise of each sequence, in both branches, and that of no neighbour.
    assert seen
    of_sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    for site, noise in seen:
        alone = pace_torch.noise(apart.pace.noise(site.layer, site.sigma, 6), 3, noise.z.shape[1])
        z = noise.z[noise.rows]
        assert torch.equal(z, torch.stack([alone[branch * 3 + of_sequence] for branch in (0, 1)]))
        assert not torch.equal(z[0, 3], z[0, 4])
    # In evaluation nothing is packed for PACE.
    close(model.eval()(**batch).logits[0, : LENGTHS[0]], apart.eval()(batch["input_ids"][:, : LENGTHS[0]]).logits[0], 1e-10)


def noise_of(model):
    """Every layer's noise from here on."""
    seen, ask = [], model.pace.noise
    sites = {site.layer: site for site in model.modules() if hasattr(site, "fixed_rows")}

    def note(layer, *args, **kwargs):
        noise = ask(layer, *args, **kwargs)
        seen.append((sites[layer], noise))
        return noise

    model.pace.__dict__["noise"] = note
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_padding_left_and_right(name):
    found = []
    for side in ("right", "left"):
        model = make(name, "attach")
        batch, labels = unpacked(side)
        leaf = None

        def keep(_, args, output):
            nonlocal leaf
            leaf = output.logits
            leaf.retain_grad()

        model.register_forward_hook(keep)
        losses = model.pace.training_step(model, batch, labels)
        found.append([losses.total, losses.classification, losses.consistency, *gradients(model, losses).values()])
        # What predicts no label gets no gradient.
        predicts = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
        assert leaf.grad[predicts.repeat(2, 1)].abs().sum(1).min() > 0 and not leaf.grad[~predicts.repeat(2, 1)].any()
    for right, left in zip(*found):
        close(left, right, 1e-6)


class Tagger(nn.Module):
    """Linear layers only, on tokens `[B, T, 6]`, one of which may take them as rows `[B·T, K]`."""

    def __init__(self, flattens=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.middle, self.head = (nn.Linear(k, n, dtype=torch.float64) for k, n in ((6, 8), (8, 8), (8, 5)))
        self.flattens = flattens

    def forward(self, x):
        x = torch.tanh(self.body(x))
        x = torch.tanh(self.middle(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.flattens else self.middle(x))
        return self.head(x)


ROWS = torch.tensor([[0, 0, 0, 2, 2], [1, 1, 1, 1, 1]])


def tagger(adapter="LoRAmul_VPTadd", **settings):
    model = perturb(pace_torch.inject(Tagger(), adapter, 2, sigma=0.5, first_noisy=0, **settings)).train()
    assert all(layer.sigma > 0 for layer in model.children() if hasattr(layer, "sigma"))
    model.pace.causal = False
    return model


@pytest.mark.parametrize("adapter", ["LoRAmul_VPTadd", "LoRAadd", "VPTadd"])
@pytest.mark.parametrize("variant", ["pace", "noise"])
def test_sequences_of_ones_own(adapter, variant):
    """Rows and numbers in any order, of a model that knows no positions."""
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(5, (2, 5), generator=torch.Generator().manual_seed(2))
    model = tagger(adapter, variant=variant)
    apart = copy.deepcopy(model)
    with model.pace.sequences(ROWS.int()):
        losses = model.pace.training_step(model, x, labels)
    # Three samples of five tokens, of which some are padding.
    alone, alone_labels = torch.zeros(3, 5, 6, dtype=torch.float64), torch.full((3, 5), -100)
    for sample in range(3):
        tokens = ROWS == sample
        alone[sample, : tokens.sum()], alone_labels[sample, : tokens.sum()] = x[tokens], labels[tokens]
    want = apart.pace.training_step(apart, alone, alone_labels)
    for term in ("total", "classification", "consistency"):
        close(getattr(losses, term), getattr(want, term), 1e-11)
    assert (losses.consistency > 0) == (variant == "pace")
    flat = copy.deepcopy(model)
    flat.flattens, flat.pace.step = True, 0
    with flat.pace.sequences(ROWS):
        close(flat.pace.training_step(flat, x, labels).total, losses.total, 1e-12)
    found, wanted = gradients(model, losses), gradients(apart, want)
    for path in wanted:
        assert (found[path] - wanted[path]).abs().max() < 1e-10, path
    # The next step is one of samples again.
    assert model.pace.given_sequences is None
    close(model.pace.training_step(model, alone, alone_labels).total, apart.pace.training_step(apart, alone, alone_labels).total, 1e-12)


def test_what_a_layer_keeps_of_packed_rows():
    """The table of the sequences, and not what each token is multiplied by; that in a compiled graph and under checkpointing it is the same."""
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 50, 6), (8, 6), (2, 6), (8, 2)))
    a.requires_grad_()
    noise = pace_torch.Noise(z=torch.rand(3, 8), rows=torch.randint(3, (2, 50)), branches=2)

    def layer(x):
        return pace_torch.lora_linear(x, w, None, a, b, None, noise)

    y = layer(x)
    close(y, x @ w.T + noise.z[noise.rows].double() * (x @ a.T @ b.T), 1e-12)
    first, again = (next(t for t in y.grad_fn.saved_tensors if t is not None and t.shape == (2, 50, 8)) for _ in range(2))
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    want = torch.autograd.grad(y.square().sum(), a)[0]
    checkpointed = lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for other in (torch.compile(layer, backend="aot_eager", fullgraph=True), checkpointed):
        close(torch.autograd.grad(other(x).square().sum(), a)[0], want, 1e-12)
    flat = pace_torch.lora_linear(x.flatten(0, 1), w, None, a, b, None, noise._replace(rows=noise.rows.flatten()))
    close(flat.view_as(y), y, 1e-12)
    for changed in (noise.z, noise.rows):
        y = layer(x)
        changed.mul_(0)
        with pytest.raises(RuntimeError, match="changed in place"):
            y.sum().backward()
    with torch.inference_mode():
        assert torch.equal(pace_torch.lora_linear(x, w, None, a, b, None, noise._replace(z=noise.z.clone())), layer(x))


def test_wrong_rows_are_named():
    x, w, z = torch.randn(2, 5, 6), torch.randn(8, 6), torch.rand(3, 8)
    rows = torch.zeros(2, 5, dtype=torch.int64)
    outside, negative = rows.clone(), rows.clone()
    outside[1, 2], negative[1, 2] = 3, -1
    for wrong, message in (
        (rows.int(), "int32"), (rows[0, 0], r"\(\)"), (rows[:, :4], r"\(2, 4\)"), (rows[:1], r"\(1, 5\)"),
        (rows.tolist(), "list"), (rows.to("meta"), "meta"), (outside, "from 0 to 2"), (negative, "from 0 to 2"),
    ):
        with pytest.raises(PaceError, match=f"`rows` .*{message}"):
            pace_torch.noisy_linear(x, w, None, w, None, pace_torch.Noise(z=z, rows=wrong))
        with pytest.raises(PaceError, match=f"`rows` .*{message}"):
            pace_torch.noisy_epilogue(x, x, pace_torch.Noise(z=z[:, :6], rows=wrong))
    with pytest.raises(PaceError, match="`rows`"):
        pace_torch.noisy_linear(x[:1], w, None, w, None, pace_torch.Noise(z=z, rows=rows[:1], branches=2), shared_input=True)
    for table in (None, z.tolist(), z[0]):
        with pytest.raises(PaceError, match="`z`"):
            pace_torch.noisy_epilogue(x, x, pace_torch.Noise(z=table, rows=rows))
    shared = pace_torch.noisy_linear(x[:1], w, None, w, None, pace_torch.Noise(z=z, rows=rows, branches=2), shared_input=True)
    assert shared.shape == (2, 5, 8)


def test_checkpointed_and_compiled_models():
    batch, labels = packed()
    want = make("Llama", "attach", packed=True)
    total = want.pace.training_step(want, batch, labels)
    for change in (lambda model: model.gradient_checkpointing_enable(), lambda model: model.compile(backend="aot_eager")):
        model = make("Llama", "attach", packed=True)
        change(model)
        losses = model.pace.training_step(model, batch, labels)
        close(losses.total, total.total, 1e-10)
        found, wanted = gradients(model, losses), gradients(want, want.pace.training_step(want, batch, labels))
        want.pace.step -= 1
        assert found.keys() == wanted.keys()


def test_bounds_for_attention_are_those_of_both_branches():
    from pace_torch._batch import twice_packed

    bounds = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
    doubled = twice_packed({"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5})
    assert doubled.keys() == {"cu_seq_lens_q", "cu_seq_lens_k"} and doubled["cu_seq_lens_q"].dtype == torch.int32
    assert doubled["cu_seq_lens_k"].tolist() == [0, 4, 6, 11, 15, 17, 22]
    seen = []
    model = tagger(packed=True)
    model.forward = lambda x, position_ids, cu_seq_lens_q=None: seen.append(cu_seq_lens_q) or Tagger.forward(model, x)
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    positions = packed()[0]["position_ids"]
    model(x, position_ids=positions, cu_seq_lens_q=bounds)
    # The look at the model leaves them to the positions.
    assert seen[-1].tolist() == [0, 4, 6, 11, 15, 17, 22] and len(seen) > 1 and all(bound is None for bound in seen[:-1])


def test_several_processes_share_no_noise():
    batch, _ = packed()
    tables = []
    for rank in (0, 1):
        model = make("Llama", "attach", packed=True)
        model.pace.shard = (rank, 2)
        seen = noise_of(model)
        model(**batch)
        tables.append(seen[-1][1].z)
    assert not (tables[0] == tables[1]).any(dim=1).any()


@pytest.mark.filterwarnings("ignore:.*use_cache")
def test_what_is_wrong_with_packed_rows_is_named():
    batch, labels = packed()
    model = make("Llama", "attach", packed=True)
    for positions in (None, torch.zeros(3, 1, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)):
        with pytest.raises(PaceError, match="`position_ids` is .*`packed` is True"):
            model.pace.training_step(model, {"input_ids": batch["input_ids"], "position_ids": positions}, labels)
    for given in (torch.zeros(11, dtype=torch.long), torch.zeros(1, 11), -torch.ones(1, 11, dtype=torch.long), None):
        with pytest.raises(PaceError, match="`sample_of_token`"), model.pace.sequences(given):
            pass
    with pytest.raises(PaceError, match="`sample_of_token` has 2 rows, expected 1"), model.pace.sequences(torch.zeros(2, 11, dtype=torch.long)):
        model(**batch)
    with pytest.raises(PaceError, match=r"q_proj` is \(2, 11, 16\).*expected \[2, 9, K\]"), model.pace.sequences(torch.zeros(1, 9, dtype=torch.long)):
        model(**batch)
    with pytest.raises(PaceError, match="BTC"), tagger(noise_shape="BTC").pace.sequences(ROWS):
        pass
    with pytest.raises(PaceError, match="`packed` is True.*replayed"):
        pace_torch.CapturedStep(model, batch["input_ids"], labels)
    # Neighbours that would share their noise.
    model = make("Llama", "attach")
    with pytest.warns(UserWarning, match="begin anew within a row.*`packed=True`"):
        model(**batch)
    with pytest.raises(PaceError, match="`cu_seq_lens_q`.*`packed=True`"):
        model(**batch, cu_seq_lens_q=torch.tensor([0, 11]))
    model = make("Llama", "attach", packed=True)
    with pytest.warns(UserWarning, match="`use_cache` is on"):
        model(**batch, use_cache=True)


def test_trainer_packs(tmp_path):
    """transformers' own collator: a step of Trainer is that of unpacked rows."""
    pytest.importorskip("accelerate")
    ids, mask = sequences()
    rows = [{"input_ids": row[kept].tolist(), "labels": row[kept].tolist()} for row, kept in zip(ids, mask)]
    model, other = make("Llama", "attach", packed=True), make("Llama", "attach")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, learning_rate=0.1, report_to=[], use_cpu=True, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, compute_loss_func=model.pace.compute_loss,
        data_collator=transformers.DataCollatorWithFlattening(),
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    batch, labels = unpacked()
    for name, gradient in gradients(other, other.pace.training_step(other, batch, labels)).items():
        close(before[name] - dict(model.named_parameters())[name].detach(), 0.1 * gradient, 1e-6)


@pytest.mark.parametrize("variant", ["pace", "baseline"])
def test_labels_are_packed_in_evaluation_and_without_noise(variant):
    """The first token of a text is no label of the text before it."""
    model, apart = make("Llama", "attach", packed=True, variant=variant), make("Llama", "attach", variant=variant)
    for evaluates in (False, True):
        totals = []
        for one, (batch, labels) in ((model, packed()), (apart, unpacked())):
            one.train(not evaluates)
            totals.append(one.pace.loss(one(**batch), labels).classification)
        close(*totals, 1e-10)
    batch, labels = unpacked()
    close(model.pace.loss(model(**batch), labels).total, totals[1], 1e-10)
    batch, labels = packed()
    rows = batch["position_ids"].diff(prepend=torch.full((1, 1), -1)).ne(1).cumsum(1)
    with apart.pace.sequences(rows):
        close(apart.pace.loss(apart(**batch), labels).total, totals[1], 1e-10)
    # And generation goes on.
    assert model.generate(batch["input_ids"], attention_mask=torch.ones_like(labels), max_new_tokens=2, do_sample=False).shape[1] == 13
