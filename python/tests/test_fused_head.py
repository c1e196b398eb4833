"""Language models whose logits are made by the loss, some at a time: the same loss and gradients, and no logits in training."""

import copy
import pickle

import pace_torch
import pytest
import torch
from conftest import perturb
from pace_torch import PaceError
from test_language import make, peft, texts, transformers, with_pace


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
    dict(divergence="symmetric_kl", both_branches=True, label_smoothing=0.1), dict(divergence="jensen_shannon", class_weights=torch.arange(30.0)),
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
        assert "forward" not in vars(head)
        torch.testing.assert_close(model.train()(**batch).logits, want, rtol=1e-9, atol=1e-12)


def test_a_model_in_a_file():
    batch, labels = texts()
    plain, fused = (with_pace("Llama", "inject", fused_head=fused) for fused in (False, True))
    gradients(fused, batch, labels)
    fused.zero_grad()
    check_same(plain, pickle.loads(pickle.dumps(fused)), batch, labels)


def test_the_loss_of_an_earlier_forward_pass_is_an_error():
    batch, labels = texts()
    others = {key: value.flip(0) for key, value in batch.items()}
    plain, fused = (with_pace("Llama", "inject", fused_head=fused) for fused in (False, True))
    gradients(plain, batch, labels), gradients(fused, batch, labels)
    for step in (3, 5):
        outputs = []
        for model in (plain, fused):
            model.pace.step = step
            outputs.append((model(**batch), model(**others)))
        with pytest.raises(PaceError, match="not the output of the last forward pass"):
            fused.pace.loss(outputs[1][0], labels)
        want, got = plain.pace.loss(outputs[0][1], labels.flip(0)), fused.pace.loss(outputs[1][1], labels.flip(0))
        assert abs(got.total - want.total) <= 1e-10 * want.total


def test_inference_mode():
    batch, labels = texts()
    totals = []
    for fused in (False, True):
        model = with_pace("Llama", "inject", fused_head=fused)
        with torch.inference_mode():
            totals.append(model.pace.training_step(model, batch, labels).total)
    assert abs(totals[1] - totals[0]) <= 1e-10 * totals[0]


def test_a_head_that_cannot_be_fused_leaves_the_model_alone():
    def check(model, put, match):
        before = dict(model.named_modules())
        trained = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(PaceError, match=match):
            put(model)
        assert dict(model.named_modules()) == before and [parameter.requires_grad for parameter in model.parameters()] == trained

    check(make("Llama"), lambda model: pace_torch.inject(model, "LoRAadd", 2, target_modules=["q_proj", "lm_head"], fused_head=True),
          "`lm_head` would have them")
    for more in (dict(modules_to_save=["lm_head"], target_modules=["q_proj"]), dict(target_modules=["q_proj", "lm_head"])):
        model = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=2, **more))
        check(model, lambda model: pace_torch.attach(model, fused_head=True), "has a peft")
    # And PACE can be put into it without.
    pace_torch.attach(model)


def test_nobody_takes_the_input_of_the_head_for_logits():
    batch, labels = texts()
    for variant in ("pace", "baseline"):
        model = with_pace("Llama", "inject", fused_head=True, variant=variant)
        for step in (lambda: model(**batch, labels=labels), lambda: model.pace.training_step(model, {**batch, "labels": labels}, labels)):
            with pytest.raises(PaceError, match="called with `labels`"):
                step()
        with pytest.raises(PaceError, match="as `generate` does"):
            model.generate(batch["input_ids"], max_new_tokens=2)
        model.eval()
        assert model(**batch, labels=labels).loss > 0 and model.generate(batch["input_ids"], max_new_tokens=2).shape == (3, 9)


SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0, use_cache=False)


def capped(name):
    """Models whose soft cap has another name, or is in the configuration of their text model, with logits that reach it."""
    torch.manual_seed(0)
    if name == "RecurrentGemma":
        model = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(
            **SMALL, intermediate_size=64, lru_width=32, attention_window_size=16, logits_soft_cap=30.0))
        model.tie_weights = lambda *args, **kwargs: None
    else:
        model = make("Llama")
        of_text = copy.deepcopy(model.config)
        of_text.final_logit_softcapping, model.config.get_text_config = 30.0, lambda decoder=None, encoder=None: of_text
        model.register_forward_hook(cap)
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    return model


def cap(module, args, output):
    output["logits"] = 30 * torch.tanh(output["logits"] / 30)


@pytest.mark.parametrize("name", ["RecurrentGemma", "of text"])
def test_soft_caps_by_all_their_names(name):
    batch, labels = texts()
    totals = []
    for fused in (False, True):
        model = pace_torch.inject(capped(name), "LoRAadd", 2, target_modules=["q_proj", "v_proj"], sigma=0.5, lambda_=0.01, fused_head=fused)
        totals += [perturb(model).train().pace.training_step(model, batch, labels).total for _ in range(2)]
    assert model.pace.fused.soft_cap == 30
    for plain, fused in zip(totals[:2], totals[2:]):
        assert abs(fused - plain) <= 1e-5 * plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_unknown_soft_cap_is_an_error(dtype):
    """Also while no logit comes near it."""
    model = make("Llama").to(dtype)
    model.register_forward_hook(cap)
    model = pace_torch.inject(model, "LoRAadd", 2, target_modules=["q_proj"], fused_head=True).train()
    for _ in range(2):
        with pytest.raises(PaceError, match="changes the logits behind its head"):
            model.pace.training_step(model, *texts())


@pytest.mark.parametrize("checked", [False, True])
def test_an_output_whose_loss_is_past_is_an_error(checked):
    batch, labels = texts()
    others = {key: value.flip(0) for key, value in batch.items()}
    model = with_pace("Llama", "inject", fused_head=True)
    if checked:
        gradients(model, batch, labels)
    one = model(**batch)
    if checked:
        model.pace.loss(one, labels)
    two = model(**others)
    for stale in (one, one.logits, one.logits.clone(), one.logits.float()):
        with pytest.raises(PaceError, match="not the output of the last forward pass"):
            model.pace.loss(stale, labels)
    # A copy of the last one, as wrappers make it, is none.
    assert model.pace.loss(two.logits.clone(), labels.flip(0)).total.isfinite()
    # The batch once more, with other noise.
    if checked:
        model(**others)
        with pytest.raises(PaceError, match="not the output of the last forward pass"):
            model.pace.loss(two.logits.clone(), labels.flip(0))


@pytest.mark.parametrize("dropout", ["independent", "off"])
def test_no_step_makes_all_logits(dropout, monkeypatch):
    widths, forward = [], torch.nn.Linear.forward

    def noted(self, x):
        y = forward(self, x)
        widths.append(y.shape[-1])
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    batch, labels = texts()
    model = with_pace("Llama", "inject", fused_head=True, dropout=dropout)
    for _ in range(2):
        model.pace.training_step(model, batch, labels)
    assert widths and max(widths) == 32 > 30 and 30 not in widths
    model.eval()(**batch)
    assert 30 in widths


def test_a_forward_pass_that_is_put_around_the_heads_stays():
    model = with_pace("Llama", "inject", fused_head=True)
    head = model.lm_head
    ours = head.forward
    head.forward = lambda x: ours(x)
    want = model.eval()(**texts()[0]).logits
    plain = pace_torch.merge(model)
    assert "forward" in vars(head)
    torch.testing.assert_close(plain.train()(**texts()[0]).logits, want, rtol=1e-9, atol=1e-12)
