"""Language models whose logits are made by the loss, some at a time: the same loss and gradients, and no logits in training."""

import copy

import pace_torch
import pytest
import torch
from conftest import perturb
from pace_torch import PaceError
from test_language import make, texts, transformers, with_pace


def gradients(model, batch, labels):
    model.zero_grad()
    model.pace.step = 3
    losses = model.pace.training_step(model, batch, labels)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(plain, fused, batch, labels):
    """Both have one loss and one gradient, and the fused one's output is as wide as the model."""
    want, want_gradients = gradients(plain, batch, labels)
    seen = []
    handle = fused.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[-1]))
    got, got_gradients = gradients(fused, batch, labels)
    handle.remove()
    assert seen[-1] == 16 and fused(**batch).logits.shape[-1] == 16
    for part in ("total", "classification", "consistency"):
        assert abs(getattr(got, part) - getattr(want, part)) <= 1e-10 * (1 + abs(getattr(want, part)))
    assert want.consistency > 0
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:.*layers drop")
@pytest.mark.parametrize("way", ["inject", "attach"])
@pytest.mark.parametrize("name", ["Llama", "Phi-3", "GPT-2"])
def test_the_same_as_by_all_logits(name, way):
    batch, labels = texts(name)
    for divergence in ("squared_difference", "symmetric_kl"):
        plain, fused = (with_pace(name, way, divergence=divergence, fused_head=fused) for fused in (False, True))
        check_same(plain, fused, batch, labels)
    fused.eval(), plain.eval()
    torch.testing.assert_close(fused(**batch).logits, plain(**batch).logits, rtol=0, atol=0)


def trained_head(**settings):
    model = pace_torch.inject(make("Llama"), "LoRAadd", 2, target_modules=["q_proj"], sigma=0.5, lambda_=0.1, **settings)
    model.lm_head.weight.requires_grad_()
    return perturb(model).train()


@pytest.mark.parametrize("settings", [
    dict(divergence="centered_squared_difference"), dict(divergence="kl", temperature=2.0, detach_target=True),
    dict(divergence="symmetric_kl", both_branches=True, label_smoothing=0.1), dict(divergence="jensen_shannon"),
], ids=lambda settings: settings["divergence"])
def test_a_head_that_is_trained(settings):
    batch, labels = texts()
    plain, fused = trained_head(**settings), trained_head(fused_head=True, **settings)
    check_same(plain, fused, batch, labels)
    check_same(plain, copy.deepcopy(fused), batch, labels)


def test_logits_that_a_model_caps_or_scales():
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                 pad_token_id=0)
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, final_logit_softcapping=0.5))
    del sizes["head_dim"]
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=4.0))
    batch, labels = texts()
    for model in (gemma.double(), granite.double()):
        models = []
        for fused in (False, True):
            torch.manual_seed(1)
            models.append(pace_torch.inject(copy.deepcopy(model), "LoRAadd", 2, target_modules=["q_proj"], lambda_=0.1, fused_head=fused))
        plain, fused = (perturb(model).train() for model in models)
        check_same(plain, fused, batch, labels)


def test_trainer(tmp_path):
    """Accumulated parts of batches are those of one batch, as without `fused_head`."""
    batch, labels = texts()
    data = [{**{key: value[i] for key, value in batch.items()}, "labels": labels[i]} for i in range(3)]
    results = []
    for fused in (False, True):
        model = with_pace("Llama", "attach", divergence="symmetric_kl", fused_head=fused)
        args = transformers.TrainingArguments(
            tmp_path / str(fused), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=3, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, learning_rate=0.1)
        transformers.Trainer(model, args, train_dataset=data, compute_loss_func=model.pace.compute_loss).train()
        results.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_what_cannot_be_fused_is_an_error():
    with pytest.raises(PaceError, match="`criterion` is given beside `fused_head`"):
        with_pace("Llama", "inject", fused_head=True, criterion=torch.nn.functional.cross_entropy)
    with pytest.raises(PaceError, match="`fused_head` is True beside the variant `fast`"):
        with_pace("Llama", "inject", fused_head=True, variant="fast", samples=3)
    with pytest.raises(PaceError, match="no `get_output_embeddings`"):
        pace_torch.inject(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), fused_head=True)
    batch, labels = texts()
    model = with_pace("Llama", "inject", fused_head=True)
    with pytest.raises(PaceError, match="`fused_head` is done to a model"):
        model.pace.fused_head = False
    with pytest.raises(PaceError, match="is for those of tokens"):
        model.pace.loss(model(**batch), labels[:, 0])
    output = model(**batch)
    model.pace.loss(output, labels)
    with pytest.raises(PaceError, match="called twice"):
        model.pace.loss(output, labels)
    with pytest.raises(PaceError, match="`logits` is .* and `labels`"):
        model.pace.loss(model(**batch, logits_to_keep=2), labels)
    # Logits that the model does something unknown with.
    model = with_pace("Llama", "inject", fused_head=True)
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", 2 * output.logits), prepend=True)
    with pytest.raises(PaceError, match="changes the logits behind its head"):
        model.pace.loss(model(**batch), labels)
    model = with_pace("Llama", "inject", fused_head=True)
    with torch.no_grad(), pytest.raises(PaceError, match="in place"):
        model.pace.loss((model(**batch).logits.mul_(2),), labels)


def test_the_head_is_as_it_was_afterwards():
    batch, labels = texts()
    for way in ("inject", "attach"):
        model = with_pace("Llama", way, fused_head=True)
        head = model.get_output_embeddings()
        gradients(model, batch, labels)
        model.eval()
        want = model(**batch).logits
        pace_torch.detach(model) if way == "attach" else pace_torch.merge(model)
        assert "forward" not in vars(head) and "pace_fused" not in vars(head)
        torch.testing.assert_close(model.train()(**batch).logits, want, rtol=1e-9, atol=1e-12)
