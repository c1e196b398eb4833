"""Records training runs of the official formulas in float64, as the `vit_*.safetensors` of this folder, with other seeds.

    python3 tests/golden/record.py FOLDER --seeds 1 2 3 4
    PACE_GOLDEN_DIR=FOLDER cargo test --test golden

Needs torch, timm and safetensors. The formulas are those of `benches/peers/official.py`.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[2] / "benches" / "peers"))
import official  # noqa: E402

# File, adapter and its name in the record, variant of the loss.
RUNS = [
    ("vit_lora_add_pace", "lora_add", "LoRAadd", "pace"),
    ("vit_lora_mul_vpt_fast", "lora_mul_vpt", "LoRAmul_VPTadd", "fast"),
    ("vit_lora_mul_vpt_pace", "lora_mul_vpt", "LoRAmul_VPTadd", "pace"),
    ("vit_vpt_add_lazy", "vpt_add", "VPTadd", "lazy"),
]
IMAGE, PATCH, WIDTH, DEPTH, HEADS, MLP, CLASSES = 16, 4, 24, 3, 4, 2, 7
RANK, SIGMA, LAMBDA, LAZY_INTERVAL = 4, 1.2, 1.0, 2
STEPS, BATCH, SAMPLES = 5, 4, 8
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4


def record(adapter, adapter_name, mode, seed):
    """The tensors and the settings of one run."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=MLP, num_classes=CLASSES,
    ).double()
    official.inject(model, adapter, RANK, SIGMA)
    names = {parameter: name(path) for path, parameter in model.named_parameters()}
    # Nothing is zero: every parameter and every gradient takes part from the first step on.
    with torch.no_grad():
        for parameter, path in names.items():
            if "norm" not in path or "bias" in path:
                parameter.normal_(std=0.1 if "delta" in path else 0.15)
    tensors = {f"init.{path}": parameter.detach().clone() for parameter, path in names.items()}
    trained = {path: parameter for parameter, path in names.items() if parameter.requires_grad}
    noisy = {
        name(path): module for path, module in model.named_modules() if isinstance(module, official.Noise) and module.sigma
    }
    tensors["sigmas_by_block"] = torch.tensor(
        [0.0, *(SIGMA * (DEPTH + 1 - k) / DEPTH for k in range(1, DEPTH + 1))], dtype=torch.float64
    )
    optimizer = torch.optim.AdamW(trained.values(), LEARNING_RATE, (0.9, 0.999), 1e-8, WEIGHT_DECAY)
    history = torch.zeros(SAMPLES, CLASSES, dtype=torch.float64)
    losses, norms = [], []
    model.train()
    for step in range(STEPS):
        x = torch.randn(BATCH, 3, IMAGE, IMAGE, dtype=torch.float64)
        labels = torch.randint(CLASSES, (BATCH,))
        index = (step * BATCH + torch.arange(BATCH)) % SAMPLES
        consistent = mode != "lazy" or step % LAZY_INTERVAL == 0
        rows = {"pace": 2 * BATCH, "fast": BATCH, "lazy": BATCH}[mode]
        for path, module in noisy.items():
            module.z = 1 + module.sigma * torch.randn(rows, out_features(tensors, path), dtype=torch.float64)
            tensors[f"step{step}.z.{path}"] = module.z
        if mode == "pace":
            out = official.two_branch_loss(model, x, labels, LAMBDA)
        elif mode == "fast":
            out = official.fast_loss(model, x, labels, LAMBDA, history, index)
        else:
            out = official.lazy_half_loss(model, x, labels, LAMBDA, step, LAZY_INTERVAL)
        optimizer.zero_grad()
        out.total.backward()
        norms.append(torch.stack([parameter.grad.norm() for parameter in trained.values()]).norm())
        losses.append([out.total.item(), out.cls.item(), out.pace.item() if consistent else float("nan")])
        optimizer.step()
        values = {"x": x, "labels": labels, "index": index, "logits": out.logits.detach()}
        tensors.update({f"step{step}.{key}": value for key, value in values.items()})
    tensors["losses_total_cls_pace"] = torch.tensor(losses, dtype=torch.float64)
    tensors["grad_norm"] = torch.stack(norms)
    tensors.update({f"final.{path}": parameter.detach() for path, parameter in trained.items()})
    model.eval()
    tensors["eval.x"] = torch.randn(BATCH, 3, IMAGE, IMAGE, dtype=torch.float64)
    tensors["eval.logits"] = model(tensors["eval.x"]).detach()
    settings = dict(
        kind="vit_training", adapter=adapter_name, mode=mode, image=IMAGE, patch=PATCH, embed_dim=WIDTH, depth=DEPTH,
        heads=HEADS, mlp_ratio=MLP, classes=CLASSES, layernorm_eps=1e-6, drop_path=0.0, rank=RANK, sigma=SIGMA,
        lambda_=LAMBDA, lazy_interval=LAZY_INTERVAL, lr=LEARNING_RATE, betas="0.9,0.999", eps=1e-8,
        weight_decay=WEIGHT_DECAY, seed=seed,
    )
    return (
        {key: value.contiguous().clone() for key, value in tensors.items()},
        {key: str(value) for key, value in settings.items()},
    )


def name(path):
    """The name in a record: without the wrappers around a layer."""
    for wrapper in ("adapter", "base_module"):
        path = path.replace(f".{wrapper}.weight", ".base_weight").replace(f".{wrapper}.bias", ".base_bias")
        path = path.replace(f".{wrapper}", "")
    return path


def out_features(tensors, path):
    """Out-features of a layer."""
    return tensors[f"init.{path}.base_weight"].shape[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for file, *run in RUNS:
            tensors, settings = record(*run, seed)
            save_file(tensors, arguments.folder / f"{file}_{seed}.safetensors", settings)


if __name__ == "__main__":
    main()
