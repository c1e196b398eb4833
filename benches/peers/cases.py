"""What `peers.py` compares.

A case is a shape and a dtype. It maps each operator to its peers, by name, as functions that build one (`runners.py`); a
peer that cannot take part raises `Unavailable` with the reason.
"""

from layer_case import Layer, LayerCase
from loss_case import Logits, LossCase
from runners import set_precision
from step_case import Model, StepCase

SHAPES = {
    "vit_b_proj": Layer(197, 768, 768),
    "vit_b_qkv": Layer(197, 768, 2304),
    "vit_b_fc1": Layer(197, 768, 3072),
    "vit_b_fc2": Layer(197, 3072, 768),
    "swin_b_first": Layer(3136, 128, 512),
    "swin_b_last": Layer(49, 1024, 4096),
    "llm": Layer(1024, 4096, 4096, batch=2, cpu_batch=1),
    "loss_10": Logits(10),
    "loss_100": Logits(100),
    "loss_1000": Logits(1000),
    "loss_4096": Logits(4096),
    "loss_32768": Logits(32768),
    "loss_100_kl": Logits(100, divergence="symmetric_kl"),
    "loss_1000_kl": Logits(1000, divergence="symmetric_kl"),
    "loss_32768_kl": Logits(32768, divergence="symmetric_kl"),
    "loss_1000_js": Logits(1000, divergence="jensen_shannon"),
    "loss_32768_js": Logits(32768, divergence="jensen_shannon"),
    "vit_b_step": Model("vit_base_patch16_224"),
    "vit_b_autocast": Model("vit_base_patch16_224", autocast=True),
    "vit_tiny_step": Model("vit_tiny_patch16_224", depth=3),
}


def unfit(name, dtype, device):
    """Why a shape has no case of this type on this device, or None."""
    shape = SHAPES[name]
    if dtype == "tf32" and device == "cpu":
        return "a CPU has no TF32"
    if dtype == "tf32" and isinstance(shape, Logits):
        return "a loss has no GEMM"
    if dtype in ("f32", "tf32") and getattr(shape, "autocast", False):
        return "autocast is for 16-bit types"
    return None


def build(name, dtype, device, batch, threads, worker):
    shape = SHAPES[name]
    set_precision(dtype)
    batch = batch or (shape.cpu_batch if device == "cpu" else shape.batch)
    kind = {Layer: LayerCase, Logits: LossCase, Model: StepCase}[type(shape)]
    return kind(shape, dtype, device, batch, threads, worker)
