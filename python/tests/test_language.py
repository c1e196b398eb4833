"""Models whose logits are of tokens: the labels that count, the shift, padding, Trainer."""

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


def test_generation_has_no_noise():
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
