"""Models whose logits are of tokens: the labels that count, the shift, padding, Trainer."""

import copy
import functools

import pace_torch
import pytest
import torch
from conftest import check_layers, close, perturb
from pace_torch import PaceError
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
SIZES = dict(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
             bos_token_id=1, eos_token_id=2)
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", dict(num_key_value_heads=2), ["q_proj", "down_proj"]),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", dict(num_key_value_heads=2), ["qkv_proj", "gate_up_proj"]),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", dict(
        n_layer=2, n_head=2, n_embd=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), ["c_attn"]),
    "BERT, tokens": ("BertForTokenClassification", "BertConfig", dict(
        num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ["query", "dense"]),
    "RoBERTa": ("RobertaForCausalLM", "RobertaConfig", dict(
        is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ["query"]),
    "RoBERTa, masked": ("RobertaForMaskedLM", "RobertaConfig", dict(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ["query"]),
}


def make(name):
    kind, config, settings, _ = MODELS[name]
    sizes = {key: value for key, value in SIZES.items() if name != "GPT-2" or "size" not in key or key == "vocab_size"}
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **settings})).double()


def with_pace(name, way, **settings):
    settings = dict(sigma=0.5, lambda_=0.1, **settings)
    targets = MODELS[name][3]
    if way == "inject":
        return perturb(pace_torch.inject(make(name), "LoRAadd", 2, target_modules=targets, **settings)).train()
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "GPT-2")
    return pace_torch.attach(perturb(peft.get_peft_model(make(name).float(), config).double()), **settings).train()


def texts(name="Llama"):
    """Token ids of different lengths, their mask and labels, of which some are not given."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(7) < torch.tensor([7, 5, 6]).unsqueeze(1)).long()
    ids = torch.randint(3, 30, (3, 7), generator=generator) * mask
    labels = torch.randint(0, 4, (3, 7), generator=generator) if "BERT, t" in name else ids.clone()
    labels[mask == 0] = -100
    labels[1, :2] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


@pytest.mark.filterwarnings("ignore:.*layers drop")
@pytest.mark.parametrize("way", ["inject", "attach"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_tokens(name, way):
    model, (batch, labels) = with_pace(name, way), texts(name)
    losses = check_layers(model, lambda: model.pace.training_step(model, batch, labels))
    losses.total.backward()
    missing = [path for path, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not missing, missing
    assert not any("lm_head" in path for path, parameter in model.named_parameters() if parameter.requires_grad)
    # The same noise once more, and the formula written out.
    model.pace.step -= 1
    one, two = model(**batch).logits.chunk(2)
    causal = "LM" in MODELS[name][0] and "Masked" not in MODELS[name][0]
    classification = consistency = count = 0
    for i in range(3):
        for t in range(7):
            label = labels[i, t].item()
            if label == -100 or causal and t == 0:
                continue
            at = t - 1 if causal else t
            classification = classification - one[i, at].log_softmax(-1)[label]
            consistency = consistency + (one[i, at] - two[i, at]).square().sum()
            count += 1
    close(losses.classification, classification / count, 1e-10)
    close(losses.consistency, consistency / count, 1e-10)
    close(losses.total, (classification + 0.1 * consistency) / count, 1e-10)
    assert torch.equal(losses.logits, one) and losses.consistency > 0
    # Trainer's way: this batch's share of all that are accumulated.
    model.pace.step -= 1
    close(model.pace.compute_loss(model(**batch), labels, 2 * count), losses.total / 2, 1e-10)
    # In evaluation it is the model's own loss.
    model.eval()
    close(model.pace.compute_loss(model(**batch), labels).float(), model(**batch, labels=labels).loss.float(), 1e-5)


def test_tokens_are_a_view_and_one_graph(monkeypatch):
    """Logits are not copied, nor are their rows counted: shapes are fixed."""
    seen, evaluate = [], pace_torch._step_loss.evaluate
    monkeypatch.setattr(pace_torch._step_loss, "evaluate", lambda logits, *args, **kwargs: seen.append(logits) or evaluate(logits, *args, **kwargs))
    pace = with_pace("Llama", "attach", divergence="symmetric_kl").pace
    logits, labels = torch.randn(6, 7, 30, dtype=torch.float64, requires_grad=True), texts()[1]
    plain = pace.loss(logits, labels)
    assert seen[0].data_ptr() == logits.data_ptr() and seen[0].shape == (42, 30)
    assert plain.logits.data_ptr() == logits.data_ptr() and plain.logits.shape == (3, 7, 30)
    monkeypatch.undo()
    compiled = torch.compile(lambda logits, labels: pace.loss(logits, labels).total, backend="aot_eager", fullgraph=True)
    close(*(torch.autograd.grad(total, logits)[0] for total in (compiled(logits, labels), plain.total)), 1e-12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        others = labels.roll(1, 0)
        close(compiled(logits, others), pace.loss(logits, others).total, 1e-12)


def test_padding_changes_nothing():
    totals = {}
    for side in ("none", "right", "left"):
        model, (batch, labels) = with_pace("Llama", "attach"), texts()
        ids, mask, labels = batch["input_ids"][:1], batch["attention_mask"][:1], labels[:1].clone()
        labels[:, 0] = -100  # padding on the left would predict the first token
        if side != "none":
            pads = [torch.zeros_like(ids[:, :3]), torch.zeros_like(ids[:, :3]), torch.full_like(ids[:, :3], -100)]
            order = (lambda a, b: [a, b]) if side == "right" else (lambda a, b: [b, a])
            ids, mask, labels = (torch.cat(order(tensor, pad), 1) for tensor, pad in zip((ids, mask, labels), pads))
        position = (mask.cumsum(1) - 1).clamp(min=0)
        losses = model.pace.training_step(model, {"input_ids": ids, "attention_mask": mask, "position_ids": position}, labels)
        totals[side] = losses.total.item()
    assert totals["right"] == pytest.approx(totals["none"], rel=1e-10) and totals["left"] == pytest.approx(totals["none"], rel=1e-6)


def test_wrong_and_missing_labels():
    batch, labels = texts()
    for variant in ("pace", "noise"):
        model = with_pace("Llama", "attach", variant=variant)
        losses = model.pace.training_step(model, batch, torch.full_like(labels, -100))
        losses.total.backward()
        assert losses.total == 0 and losses.consistency == 0 and losses.logits.shape == (3, 7, 30)
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    model = with_pace("Llama", "attach")
    with pytest.raises(PaceError, match=r"`logits` is \(6, 7, 30\) and `labels` \(3, 6\), expected \[2·B, T, C\] and \[B, T\]"):
        model.pace.training_step(model, batch, labels[:, 1:])
    with pytest.raises(PaceError, match=r"labels\[3\]` is 77, expected 0 to 29"):
        model.pace.training_step(model, batch, labels.clone().index_put_((torch.tensor(0), torch.tensor(4)), torch.tensor(77)))
    with pytest.raises(PaceError, match="computed a loss of its own"):
        model(**batch, labels=labels)
    with torch.no_grad():
        model(**batch, labels=labels)  # as TRL does for its metrics
    model.pace.causal = None
    with pytest.raises(PaceError, match="`model.pace.causal`"):
        model.pace.training_step(model, batch, labels)
    model = with_pace("Llama", "attach", variant="fast", samples=3)
    with pytest.raises(PaceError, match="fast"):
        model.pace.training_step(model, batch, labels, torch.arange(3))


def test_what_maps_to_a_vocabulary_is_left_alone():
    for name in ("Llama", "GPT-2"):
        model = pace_torch.inject(make(name), "LoRAadd", 2)
        assert isinstance(model.lm_head, nn.Linear) and not any("lm_head" in name for name in pace_torch.trainable_state_dict(model))
    model = pace_torch.inject(make("Llama"), "LoRAadd", 2, target_modules=["lm_head"])
    assert isinstance(model.lm_head, pace_torch.NoisyLinear)


def test_tied_and_trained_heads_have_no_noise():
    with pytest.raises(PaceError, match="`target_modules` names `lm_head`.*shares its weight"):
        pace_torch.inject(make("GPT-2"), "LoRAadd", 2, target_modules=["lm_head", "c_attn"])
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    model = pace_torch.attach(peft.get_peft_model(make("GPT-2").float(), config).double(), sigma=0.5)
    assert not any("lm_head" in noise.path for noise in model.modules() if isinstance(noise, pace_torch.AttachedNoise))


CLASSIFIERS = {
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", {}, ["query", "value"]),
    "GPT-2": ("GPT2ForSequenceClassification", "GPT2Config", dict(n_layer=2, n_head=2, n_embd=16), ["c_attn", "c_proj"]),
    "Llama": ("LlamaForSequenceClassification", "LlamaConfig", dict(num_key_value_heads=2), ["q_proj", "v_proj"]),
    "Phi-3": ("Phi3ForSequenceClassification", "Phi3Config", dict(num_key_value_heads=2, attention_dropout=0.2, resid_pdrop=0.1),
              ["qkv_proj", "gate_up_proj"]),
}


def classifier(name, way, dropout=None, **settings):
    """With the dropout of its configuration, unless that is given."""
    kind, config, sizes, targets = CLASSIFIERS[name]
    base = {key: value for key, value in SIZES.items() if name != "GPT-2" or "size" not in key or key == "vocab_size"}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**base, **sizes}, num_labels=3))
    settings = dict(sigma=0.5, lambda_=0.1, **settings, **({} if dropout is None else {"dropout": dropout}))
    if way == "inject":
        return perturb(pace_torch.inject(model.double(), "LoRAadd", 2, target_modules=targets, **settings)).train()
    lora = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "GPT-2", task_type="SEQ_CLS")
    return pace_torch.attach(perturb(peft.get_peft_model(model, lora).double()), **settings).train()


def learns(model, batch, labels, steps=8):
    """That the loss falls, of the same noise and dropout at all steps."""
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    totals = []
    for _ in range(steps):
        model.pace.step = 0
        torch.manual_seed(0)
        losses = model.pace.training_step(model, batch, labels)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < totals[1] < totals[0] and losses.consistency > 0, totals


@pytest.mark.filterwarnings("ignore:.*layers drop")
@pytest.mark.parametrize("way", ["inject", "attach"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_of_sequences(name, way):
    model, labels = classifier(name, way, dropout="off", divergence="symmetric_kl", both_branches=True), torch.tensor([0, 2, 1])
    batch = texts()[0]
    losses = check_layers(model, lambda: model.pace.training_step(model, batch, labels))
    model.pace.step -= 1
    one, two = model(**batch).logits.chunk(2)
    cross = nn.functional.cross_entropy
    close(losses.classification, (cross(one, labels) + cross(two, labels)) / 2, 1e-10)
    assert losses.consistency > 0
    learns(model, batch, labels)
    model.eval()
    close(model.pace.compute_loss(model(**batch), labels).float(), model(**batch, labels=labels).loss.float(), 1e-5)


@pytest.mark.parametrize("way", ["inject", "attach"])
@pytest.mark.parametrize("name", [name for name in MODELS if "," not in name])
def test_causal_models_learn(name, way):
    learns(with_pace(name, way, divergence="jensen_shannon"), *texts())


@pytest.mark.filterwarnings("ignore:.*layers drop")
@pytest.mark.parametrize("way", ["inject", "attach"])
@pytest.mark.parametrize("name", ["RoBERTa", "GPT-2", "Phi-3"])
def test_dropout_of_two_branches(name, way):
    batch, labels = texts()[0], torch.tensor([0, 2, 1])

    def without_noise(model):
        for layer in model.modules():
            if hasattr(layer, "sigma"):
                layer.sigma = 0.0
        return model

    def runs(model):
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(model.pace.training_step(model, batch, labels))
        return found

    first, same, other = runs(without_noise(classifier(name, way)))
    assert first.consistency > 0
    first, same, other = runs(without_noise(classifier(name, way, dropout="off")))
    assert first.consistency < 1e-20 and torch.equal(first.logits, other.logits)
    model = without_noise(classifier(name, way, dropout="shared"))
    first, same, other = runs(model)
    assert first.consistency < 1e-20 and torch.equal(first.logits, same.logits) and not torch.allclose(first.logits, other.logits)
    # What it was; and a copy has its own.
    before = {path: module.p for path, module in classifier(name, way).named_modules() if isinstance(module, nn.Dropout)}
    copied = copy.deepcopy(model)
    close(runs(copied)[2].logits, runs(model)[2].logits, 1e-12)
    plain = pace_torch.merge(model) if way == "inject" else pace_torch.detach(model)
    after = {path: module for path, module in plain.named_modules() if isinstance(module, nn.Dropout)}
    assert {path: module.p for path, module in after.items()} == before and not any("forward" in vars(module) for module in after.values())
    if name == "Phi-3":
        assert all(module.attention_dropout == 0.2 for module in plain.modules() if hasattr(module, "attention_dropout"))
    assert runs(copied)[0].consistency < 1e-20


def test_other_random_layers_are_found():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(nn.functional.dropout(self.body(x), 0.5, self.training))

    model = pace_torch.inject(Random(), rank=2, dropout="off").train()
    with pytest.raises(PaceError, match="`dropout` is 'off', and the branches differ without noise"):
        model(torch.randn(4, 4))


def test_the_head_may_have_no_noise():
    model = classifier("Llama", "inject", noise_head=False)
    assert model.score.sigma == 0 and model.model.layers[1].self_attn.q_proj.sigma == 0.5
    assert classifier("Llama", "inject").score.sigma > 0


def test_generation_has_no_noise():
    for way, message in (("inject", "cache of keys and values.*in training"), ("attach", "outside of its model")):
        ids = texts()[0]["input_ids"][:1]
        with pytest.raises(PaceError, match=f"{message}.*`eval\\(\\)`"):
            with_pace("Llama", way).generate(ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    with pytest.raises(PaceError, match="cache of keys and values.*`past_key_values`.*in training"):
        with_pace("Llama", "attach")(**texts()[0], past_key_values=transformers.DynamicCache())
    for way in ("inject", "attach"):
        model, plain = with_pace("Llama", way).eval(), with_pace("Llama", way, variant="baseline").eval()
        ids = texts()[0]["input_ids"][:1]
        settings = dict(max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_and_accumulation(accumulate, tmp_path):
    """A causal language model with PEFT's LoRA: the step of Trainer is that of a loop over all tokens."""
    pytest.importorskip("accelerate")
    batch, labels = texts()
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": row} for ids, mask, row in zip(*batch.values(), labels)]
    rows = rows[:2]
    model = with_pace("Llama", "attach", variant="noise")
    for layer in model.modules():
        if hasattr(layer, "sigma"):
            layer.sigma = 0.0
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2 // accumulate, gradient_accumulation_steps=accumulate, learning_rate=0.1,
        report_to=[], use_cpu=True, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, data_seed=0, save_strategy="no",
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, compute_loss_func=model.pace.compute_loss)
    trainer.train()
    other = with_pace("Llama", "attach", variant="baseline").eval()
    logits = other(**{name: tensor[:2] for name, tensor in batch.items()}).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels[:2, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.requires_grad}
    for (name, parameter), (_, gradient) in zip(
        [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad], gradients.items()
    ):
        close(before[name] - parameter.detach(), 0.1 * gradient, 1e-6)


class Dropping(nn.Module):
    """A dropout layer whose forward pass is replaced, as accelerate does it."""

    def __init__(self, replaced=True):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 5)
        self.calls = []
        if replaced:
            self.hook()

    def hook(self):
        before = self.drop.forward
        self.drop.forward = functools.update_wrapper(functools.partial(lambda module, x: self.calls.append(1) or before(x), self.drop), before)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dropout", ["shared", "off"])
def test_a_dropout_whose_forward_pass_was_replaced(dropout, when):
    model = Dropping(replaced=when == "before")
    model = pace_torch.inject(model, "LoRAadd", 2, dropout=dropout, branches_at="input", sigma=0.0).train()
    if when == "after":
        model.hook()
    replaced, labels = vars(model.drop).get("forward"), torch.arange(4)
    x = torch.randn(4, 8)
    assert model.pace.training_step(model, x, labels).consistency < 1e-12 and model.calls
    plain = pace_torch.merge(model)
    assert "forward" in vars(plain.drop) and (when == "before" or plain.drop.forward == replaced) and plain.drop.p == 0.5
    model.calls.clear()
    assert not torch.equal(plain(x), plain(x)) and len(model.calls) == 2


def test_branches_that_differ_are_an_error_each_time():
    class Random(Dropping):
        def forward(self, x):
            return self.head(nn.functional.dropout(self.body(x), 0.5, self.training))

    model = pace_torch.inject(Random(), rank=2, dropout="off", branches_at="input").train()
    for _ in range(3):
        with pytest.raises(PaceError, match="`dropout` is 'off', and the branches differ without noise"):
            model.pace.training_step(model, torch.randn(4, 8), torch.arange(4))


def test_attach_leaves_a_replaced_forward_pass_alone():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make("Llama"), config)
    layer = next(module for module in model.modules() if type(module).__name__ == "Linear" and hasattr(module, "lora_A"))
    before, calls = layer.forward, []
    layer.forward = replaced = lambda x, *args, **kwargs: calls.append(1) or before(x, *args, **kwargs)
    model = pace_torch.attach(perturb(model), sigma=0.5).train()
    assert model.pace.training_step(model, *texts()).consistency > 0 and calls
    pace_torch.detach(model)
    assert layer.forward is replaced
