"""What training frameworks do to a model between `inject` and `merge`: the same numbers, or an error that says so."""

import pace_torch
import pytest
import torch
from conftest import LABELS, X, assert_equal_weights, close, injected, perturb, same, step, vit
from pace_torch import NoisyLinear, PaceError, checkpoint
from torch import nn

# ----------------------------------------------------------------------------------------------------------- offloading


def test_offloading(plain, evaluated, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate comes with peft")
    offloads = (
        accelerate.cpu_offload,
        lambda model, **where: accelerate.cpu_offload(model, offload_buffers=True, **where),
        lambda model, **where: accelerate.disk_offload(model, str(tmp_path), **where),
    )
    for offload in offloads:
        model = injected(variant="fast", samples=4)
        offload(model, execution_device=torch.device("cpu"))
        close(model.eval()(X), evaluated, 1e-12)
        # Gradients would go to copies that are thrown away.
        with pytest.raises(PaceError, match="offloads for evaluation only"):
            model.train()(X)
        with pytest.raises(PaceError, match="remove_hook_from_submodules"):
            pace_torch.merge(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    close(pace_torch.merge(model.eval())(X), evaluated, 1e-12)
    # A device map that offloads nothing is no hindrance, before `inject` or after.
    for model in (injected(accelerate.dispatch_model(vit(drop_path_rate=0.3), {"": "cpu"}, force_hooks=True)),
                  accelerate.dispatch_model(injected(), {"": "cpu"}, force_hooks=True)):
        same(step(model), plain)
        close(pace_torch.merge(model.eval())(X), evaluated, 1e-12)


# -------------------------------------------------------------------------------------------- transformers, Accelerate


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers comes with peft")


def hugging_face(transformers, **settings):
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, num_labels=5, hidden_dropout_prob=0.0)
    return injected(transformers.ViTForImageClassification(config).double(), **settings)


IMAGES = torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
# One label that does not count.
DATA = [{"pixel_values": image, "labels": -100 if i == 1 else i % 5} for i, image in enumerate(IMAGES)]


def trainer_of(transformers, model, folder, trainer=None, **settings):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, train_sampling_strategy="sequential", num_train_epochs=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        seed=0, **settings,
    )
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    how = {} if trainer else {"compute_loss_func": model.pace.compute_loss}
    return (trainer or transformers.Trainer)(model, arguments, train_dataset=DATA, eval_dataset=DATA[2:6], optimizers=(sgd, None), **how)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_trainer(transformers, accumulation, tmp_path):
    model, by_hand = hugging_face(transformers), hugging_face(transformers)
    trainer = trainer_of(transformers, model, tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    sgd = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    batches = [[(row["pixel_values"], row["labels"]) for row in DATA[i : i + 2]] for i in range(0, len(DATA), 2)]
    for i in range(0, len(batches), accumulation):
        large = batches[i : i + accumulation]
        items = sum(label != -100 for rows in large for _, label in rows)
        sgd.zero_grad()
        for rows in large:
            x, labels = torch.stack([x for x, _ in rows]), torch.tensor([label for _, label in rows])
            losses = by_hand.pace.training_step(by_hand, {"pixel_values": x}, labels)
            (losses.total * (labels != -100).sum().item() / items).backward()
        sgd.step()
    assert_equal_weights(model, by_hand)
    assert model.pace.step == 6
    # Evaluation and prediction have one branch, and their loss is cross-entropy.
    with torch.no_grad():
        logits = by_hand.eval()(IMAGES[2:6]).logits
    predicted = trainer.predict(DATA[2:6])
    close(torch.from_numpy(predicted.predictions), logits, 1e-10)
    want = nn.functional.cross_entropy(logits, torch.tensor([2, 3, 4, 0])).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6) == predicted.metrics["test_loss"]


def test_trainer_resumes(transformers, tmp_path):
    from pace_torch.trainer import PaceCallback, last_checkpoint

    def trained(resume=None, callback=PaceCallback, folder=tmp_path, **settings):
        model = hugging_face(transformers)
        trainer = trainer_of(transformers, model, folder, gradient_accumulation_steps=4)
        for name, value in {"save_strategy": "steps", "save_steps": 1, **settings}.items():
            setattr(trainer.args, name, value)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        assert model.pace.step == 6
        return model

    first, other = str(tmp_path / "checkpoint-1"), tmp_path / "other"
    assert last_checkpoint(tmp_path / "nowhere") is None
    whole = trained()
    assert_equal_weights(trained(first), whole, 0)
    # The run ended while the second was written, or its disk is damaged.
    second = tmp_path / "checkpoint-2" / "pace.pt"
    content = second.read_bytes()
    # In the data of a tensor: what fills up between them means nothing.
    trained_before = max(torch.load(second, weights_only=True)["trained"].values(), key=torch.numel)
    at = content.index(trained_before.numpy().tobytes())
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    for damaged, message in ((None, r"no .*pace.pt.*`last_checkpoint\(output_dir\)`"), (content[:at], "whole"), (flipped, "whole")):
        second.unlink() if damaged is None else second.write_bytes(damaged)
        assert last_checkpoint(tmp_path) == first
        with pytest.raises(PaceError, match=message):
            trained(str(second.parent))
        second.touch()
    for other_file in ([], {}, {"controller": {}}, {"controller": {}, "trained": None, "step": 1}):
        checkpoint.save(second, other_file)
        assert last_checkpoint(tmp_path) == first
        with pytest.raises(PaceError, match="not what `PaceCallback` writes"):
            trained(str(second.parent))
    assert_equal_weights(trained(last_checkpoint(tmp_path)), whole, 0)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert_equal_weights(trained(first, PaceCallback(first), other), whole, 0)
    with pytest.raises(PaceError, match="label_smoothing_factor"):
        trained(label_smoothing_factor=0.1)
    with pytest.raises(PaceError, match=r"no .*pace.pt.*`PaceCallback\(folder\)`"):
        trained(first, folder=tmp_path / "another")
    # By this measure the first model is the best one.
    best = trained(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
                   greater_is_better=True)
    saved = [torch.load(tmp_path / f"checkpoint-{i}" / "pace.pt")["trained"] for i in (1, 2)]
    name = "vit.layers.0.attention.q_proj.adapter.delta_W_down"  # one that transformers renames
    assert torch.equal(pace_torch.trainable_state_dict(best)[name], saved[0][name]) and not torch.equal(saved[0][name], saved[1][name])


def test_trainer_without_its_loss(transformers, tmp_path):
    class Lazy(transformers.Trainer):
        """As in docs/pytorch/hugging_face.md."""

        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            pace = self.accelerator.unwrap_model(model).pace
            if model.training:
                return pace.training_step(model, inputs, labels).total
            outputs = model(**inputs)
            loss = pace.loss(outputs, labels).total
            return (loss, outputs) if return_outputs else loss

    for variant in ("pace", "lazy", "fast"):
        model = hugging_face(transformers, variant=variant, samples=12)
        # The model's own loss has no consistency.
        with pytest.raises(PaceError, match="`labels`.*compute_loss_func=model.pace.compute_loss"):
            trainer_of(transformers, model, tmp_path, transformers.Trainer).train()
        if variant != "pace":
            with pytest.raises(PaceError, match=f"`{variant}` needs more.*hugging_face.md"):
                trainer_of(transformers, model, tmp_path).train()
    model, by_hand = (hugging_face(transformers, variant="lazy") for _ in range(2))
    trainer = trainer_of(transformers, model, tmp_path, Lazy, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    sgd = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    for i in range(6):
        x, labels = IMAGES[2 * i : 2 * i + 2], torch.tensor([row["labels"] for row in DATA[2 * i : 2 * i + 2]])
        # Labels among the inputs do no harm here: the model's own loss is not used.
        (by_hand.pace.training_step(by_hand, {"pixel_values": x}, labels).total / 2).backward()
        if i % 2:
            sgd.step()
            sgd.zero_grad()
    assert_equal_weights(model, by_hand)


def test_a_batch_with_labels(transformers):
    model = hugging_face(transformers)
    labels = torch.tensor([0, 1, 2, 0])
    losses = model.pace.training_step(model, {"pixel_values": IMAGES[:4], "labels": labels}, labels)
    model.pace.step = 0
    assert torch.equal(losses.total, model.pace.training_step(model, {"pixel_values": IMAGES[:4]}, labels).total)
    # Without consistency the model's own loss is right.
    model = hugging_face(transformers, variant="noise")
    close(model(pixel_values=IMAGES[:4], labels=labels).loss.double(), nn.functional.cross_entropy(
        (setattr(model.pace, "step", 0), model(pixel_values=IMAGES[:4]).logits)[1], labels), 1e-6)


def test_save_pretrained(transformers, tmp_path):
    model = hugging_face(transformers)
    want = model.eval()(IMAGES).logits
    pace_torch.merge(model).save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(again(IMAGES).logits, want, 1e-10)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_hugging_face(transformers, reentrant):
    plain, saving = hugging_face(transformers), hugging_face(transformers)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    batch = {"pixel_values": IMAGES[:4]}
    same(step(saving, None, batch), step(plain, None, batch))


def by_hand(batches, divide=1):
    """A plain loop of SGD over batches, which accumulates `divide` of them."""
    model = injected()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for i, (x, labels) in enumerate(batches, 1):
        (model.pace.training_step(model, x, labels).total / divide).backward()
        if i % divide == 0:
            sgd.step()
            sgd.zero_grad()
    return model


BATCHES = [(X[:2], LABELS[:2]), (X[2:], LABELS[2:])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate(accumulation, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate comes with peft")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = injected()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = torch.utils.data.DataLoader(list(zip(X, LABELS)), batch_size=2)
    engine, sgd, loader = accelerator.prepare(model, sgd, loader)
    accelerator.register_for_checkpointing(model.pace)
    for x, labels in loader:
        with accelerator.accumulate(engine):
            accelerator.backward(model.pace.training_step(engine, x, labels).total)
            sgd.step()
            sgd.zero_grad()
    assert_equal_weights(model, by_hand(BATCHES, accumulation))
    accelerator.save_state(str(tmp_path))
    saved = {name: tensor.clone() for name, tensor in pace_torch.trainable_state_dict(engine).items()}
    perturb(model)
    model.pace.step = 0
    accelerator.load_state(str(tmp_path))
    assert model.pace.step == 2 and all(torch.equal(t, saved[name]) for name, t in pace_torch.trainable_state_dict(model).items())
    assert pace_torch.merge(accelerator.unwrap_model(engine)) is model
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Module(lightning.LightningModule):
        """As in docs/pytorch/hugging_face.md."""

        def __init__(self):
            super().__init__()
            self.net = injected()

        def training_step(self, batch, _):
            x, labels = batch
            return self.net.pace.training_step(self.net, x, labels).total

        def validation_step(self, batch, _):
            x, labels = batch
            self.log("loss", self.net.pace.loss(self.net(x), labels).total)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["pace"] = self.net.pace.state_dict()

        def on_load_checkpoint(self, checkpoint):
            self.net.pace.load_state_dict(checkpoint["pace"])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def fit(epochs, **how):
        module = Module()
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
                                    enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2)
        loader = torch.utils.data.DataLoader(list(zip(X, LABELS)), batch_size=2)
        trainer.fit(module, loader, loader, **how)
        return module, trainer

    module, trainer = fit(1)
    assert_equal_weights(module.net, by_hand(BATCHES, 2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    assert_equal_weights(resumed.net, by_hand(BATCHES * 2, 2))
    want = resumed.eval().net(X)
    close(pace_torch.merge(resumed).net(X), want, 1e-12)


def test_adapters_of_peft_within():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for name, message in (("qkv", "Target module NoisyLinear"), ("qkv.adapter.base_module", "`blocks.0.attn.qkv` was replaced.*PEFT")):
        with pytest.raises((PaceError, ValueError), match=message):
            peft.get_peft_model(injected(), peft.LoraConfig(target_modules=[name]))(X)


# ------------------------------------------------------------------------------------------------------------ DropPath


class OwnDropPath(nn.Module):
    """As each project has it."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full_like(x[:, :1], 1 - self.rate)) / (1 - self.rate)


class Residual(nn.Module):
    def __init__(self, drop):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(6, 6, dtype=torch.float64), drop, nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, x):
        x = x + self.drop(self.body(x))
        return self.head(x + self.drop(torch.tanh(x)))


def test_other_drop_paths(transformers):
    torchvision = pytest.importorskip("torchvision", reason="torchvision comes with timm")
    swin = transformers.models.swin.modeling_swin
    kinds = [OwnDropPath(0.5), torchvision.ops.StochasticDepth(0.5, "row"), torchvision.ops.StochasticDepth(0.5, "batch"),
             swin.SwinDropPath(0.5)]
    rows = torch.ones(64, 6, dtype=torch.float64)
    for drop in kinds:
        model = injected(Residual(drop), exclude_modules=["body"])
        model.head.sigma = 0.0
        torch.manual_seed(1)
        logits = model(rows)
        # The same samples are dropped in both branches, by what the module draws for one of them, anew at each call.
        assert torch.equal(logits[:64], logits[64:])
        assert len(logits.unique(dim=0)) == (1 if getattr(drop, "mode", "row") == "batch" else 4)
        assert pace_torch.merge(model).drop is drop
        torch.manual_seed(1)
        close(model(rows), logits[:64], 1e-12)


def test_swin_of_hugging_face_drops_paths(transformers):
    torch.manual_seed(0)
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2,
                                     drop_path_rate=0.5, num_labels=5)
    model = injected(transformers.SwinForImageClassification(config).double())
    for layer in model.modules():
        if isinstance(layer, NoisyLinear):
            layer.sigma = 0.0
    for _ in range(4):
        assert model.pace.training_step(model, {"pixel_values": IMAGES[:4]}, LABELS).consistency == 0
