"""What PEFT makes of adapters: records a folder of its own, and loads one that this crate has written.

    python3 tests/candle/peft/reference.py --record FOLDER [--seed SEED]
    python3 tests/candle/peft/reference.py --load ADAPTER --model MODEL.safetensors --result RESULT.safetensors

`recorded` beside this file is the first with seed 1. Needs torch, timm, peft and safetensors; everything is computed in float64.
A record is `adapter`, which PEFT has saved, and `model.safetensors`: the base model, images `x`, and the `logits` of the model with
the adapter. A result has `logits`, of the same images, and `targets` in its metadata: the modules that have LoRA.
"""

import argparse
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

# Nothing here is on the Hub; peft need not ask.
os.environ["HF_HUB_OFFLINE"] = "1"

import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

IMAGE, PATCH, WIDTH, DEPTH, HEADS, MLP, CLASSES = 8, 4, 12, 2, 3, 2, 5
CONFIG = LoraConfig(
    r=2,
    lora_alpha=3,
    use_rslora=True,
    lora_bias=True,
    # Both match qkv of block 1: the first counts. The second is a pattern, not a name.
    rank_pattern={"blocks.1.attn.qkv": 3, r"blocks\.\d\.attn\.(qkv|proj)": 4},
    alpha_pattern={r"^blocks\.0\.mlp\.fc1": 5, "proj": 7.5},
    # Not fc2, and of the projections that of block 1 alone.
    target_modules=["qkv", "fc1", "blocks.1.attn.proj"],
    modules_to_save=["head"],
)


def base_model():
    """The vision transformer of the tests, in double precision."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=MLP, num_classes=CLASSES,
    ).double().eval()


@torch.no_grad()
def randomize(model):
    """Nothing is zero, and every number is one of float32."""
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and "weight" in name else 0.0
        parameter.copy_((mean + 0.3 * torch.randn_like(parameter)).float())


@torch.no_grad()
def record(folder, seed):
    """Saves an adapter of PEFT, its base model, images and logits."""
    torch.manual_seed(seed)
    model = base_model()
    randomize(model)
    tensors = {name: parameter.float().clone() for name, parameter in model.state_dict().items()}
    model = get_peft_model(model, CONFIG).eval()
    base = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if name in base}
    randomize(model)
    for name, parameter in model.named_parameters():
        if name in base:
            parameter.copy_(frozen[name])
    tensors["x"] = torch.randn(3, 3, IMAGE, IMAGE)
    tensors["logits"] = model(tensors["x"].double())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        # Without the model card.
        (folder / "adapter").mkdir(exist_ok=True)
        for file in ["adapter_config.json", "adapter_model.safetensors"]:
            shutil.copy(Path(saved) / file, folder / "adapter" / file)
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def load(adapter, model_file, result):
    """Loads a folder as users do, and saves what the model then computes."""
    tensors = load_file(model_file)
    x = tensors.pop("x").double()
    tensors.pop("logits", None)
    model = base_model()
    model.load_state_dict(tensors)
    # PEFT warns of tensors that are missing or have no place, and goes on.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(model, adapter, torch_device="cpu").eval()
    targets = sorted(model.targeted_module_names)
    save_file({"logits": model(x).contiguous()}, result, {"targets": json.dumps(targets)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record, arguments.seed)
    if arguments.load:
        load(arguments.load, arguments.model, arguments.result)


if __name__ == "__main__":
    main()
