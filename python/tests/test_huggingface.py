"""Hugging Face's models, tiny and random: one step, gradients everywhere, evaluation, save and load, merge."""

import pace_torch
import pytest
import torch
from conftest import check_layers, close, perturb
from pace_torch import NoisyLinear
from torch import nn

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
IMAGE = dict(image_size=16, patch_size=8, **SMALL)
TEXT = dict(vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SMALL)
HEADS = dict(num_key_value_heads=2)


def images(rows=4):
    return {"pixel_values": torch.randn(rows, 3, 16, 16, dtype=torch.float64)}


def texts(rows=4):
    # Of different lengths, padded on the right.
    mask = (torch.arange(6) < torch.arange(rows).unsqueeze(1) % 3 + 4).long()
    return {"input_ids": torch.randint(3, 30, (rows, 6)) * mask, "attention_mask": mask}


class DINOv3ForImageClassification(nn.Module):
    """Hugging Face has the backbone only."""

    def __init__(self, config):
        super().__init__()
        self.backbone = transformers.DINOv3ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values):
        logits = self.classifier(self.backbone(pixel_values).pooler_output)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=logits)


def model_of(kind, config, settings, **more):
    names = dict(SiglipForImageClassification="vision_config")
    settings = {names[kind]: settings} if kind in names else settings
    return (globals().get(kind) or getattr(transformers, kind))(getattr(transformers, config)(**settings, **more))


# Class, configuration and its settings, and what it takes.
MODELS = {
    "ViT": ("ViTForImageClassification", "ViTConfig", IMAGE, images),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", IMAGE, images),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGE, images),
    "DINOv3": ("DINOv3ForImageClassification", "DINOv3ViTConfig", IMAGE, images),
    "CLIP": ("CLIPForImageClassification", "CLIPConfig", dict(vision_config=IMAGE), images),
    "SigLIP": ("SiglipForImageClassification", "SiglipConfig", IMAGE, images),
    "Swin": ("SwinForImageClassification", "SwinConfig",
             dict(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, drop_path_rate=0.0), images),
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT, texts),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, texts),
    "GPT-2": ("GPT2ForSequenceClassification", "GPT2Config",
              dict(n_layer=2, n_head=2, n_embd=16, vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2), texts),
    "Llama": ("LlamaForSequenceClassification", "LlamaConfig", {**TEXT, **HEADS}, texts),
    "Phi-3": ("Phi3ForSequenceClassification", "Phi3Config", {**TEXT, **HEADS}, texts),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapter", ["LoRAmul_VPTadd", "LoRAadd"])
def test_models(name, adapter):
    check(name, adapter)


def check(name, adapter):
    """What works, as a row of docs/models.md."""
    kind, config, sizes, inputs = MODELS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")

    def make():
        torch.manual_seed(0)
        return model_of(kind, config, sizes, num_labels=3).double().eval()

    batch, labels = inputs(), torch.tensor([0, 1, 2, 0])
    plain = make()
    before = plain(**batch).logits
    settings = dict(rank=2, sigma=0.5, lambda_=0.1)
    if name == "SigLIP":
        # A pooling whose result the classifier does not take.
        settings["exclude_modules"] = r"vision_model\.head\..*"
    model = pace_torch.inject(make(), adapter, **settings)
    close(model.eval()(**batch).logits, before, 1e-9)
    layers = {layer: module for layer, module in model.named_modules() if isinstance(module, NoisyLinear)}
    heads = [layer for layer, module in layers.items() if isinstance(module.adapter, pace_torch.Head)]
    assert heads == (["classifier.dense", "classifier.out_proj"] if name == "RoBERTa" else [heads[0]])
    assert heads[0].split(".")[0] in ("classifier", "score")

    # One step reaches everything that is trained, and the branches differ by noise alone.
    perturb(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = check_layers(model, lambda: model.pace.training_step(model, batch, labels))
    losses.total.backward()
    assert losses.consistency > 0
    missing = [path for path, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not missing, missing
    for module in layers.values():
        module.sigma = 0.0
    assert model.pace.training_step(model, batch, labels).consistency == 0

    # Evaluation, a fresh model with what was saved, and the merged one are the same.
    want = model.eval()(**batch).logits
    assert not torch.allclose(want, before)
    fresh = pace_torch.inject(make(), adapter, **settings)
    pace_torch.load_trainable_state_dict(fresh, pace_torch.trainable_state_dict(model))
    close(fresh.eval()(**batch).logits, want, 1e-9)
    merged = pace_torch.merge(model).eval()
    close(merged(**batch).logits, want, 1e-9)
    again = make()
    assert not again.load_state_dict(merged.state_dict()).missing_keys
    close(again(**batch).logits, want, 1e-9)
    return f"{len(layers)} layers" + (f"; without {settings['exclude_modules']}" if "exclude_modules" in settings else "")
