"""Every family of timm that has linear layers besides its classifier: a step, evaluation, save, load and merge.

CI runs every third; `PACE_ALL_MODELS=1` runs all, and with `PACE_UPDATE_DOCS=1` writes docs/models.md.
"""

import os
import time
import warnings

import pace_torch
import pytest
import timm
import torch
from conftest import ROOT, check_layers
from pace_torch import NoisyLinear, PaceError
from pace_torch._batch import logits_of

# A family is a module of timm.models; of each a small model, made smaller where there is none.
FAMILIES = {
    "beit": ("beit_base_patch16_224", dict(depth=2, embed_dim=48, num_heads=2, img_size=32)),
    "cait": ("cait_xxs24_224", dict(depth=2, depth_token_only=1)),
    "coat": ("coat_lite_tiny", dict()),
    "convit": ("convit_tiny", dict()),
    "convnext": ("test_convnext", dict()),
    "cpubone": ("cpubone_nano", dict()),
    "crossvit": ("crossvit_tiny_240", dict()),
    "csatv2": ("csatv2", dict(image=128)),
    "davit": ("davit_tiny", dict()),
    "deepseek_vit": ("deepseek_vit_412m", dict(depth=2, embed_dim=64, num_heads=2)),
    "deit": ("deit_tiny_distilled_patch16_224", dict()),
    "edgenext": ("edgenext_small", dict()),
    "efficientformer": ("efficientformer_l1", dict()),
    "efficientformer_v2": ("efficientformerv2_s0", dict()),
    "efficientvim": ("efficientvim_m1", dict()),
    "efficientvit_mit": ("efficientvit_b0", dict()),
    "eva": ("eva02_tiny_patch14_224", dict(depth=3)),
    "gcvit": ("gcvit_tiny", dict()),
    "gemma4_vit": ("gemma4_vit_167m", dict(depth=2, embed_dim=64, num_heads=2)),
    "hiera": ("hiera_tiny_224", dict(stages=(1, 1, 2, 1), img_size=64)),
    "hieradet_sam2": ("sam2_hiera_tiny", dict(image=224)),
    "iformer": ("iformer_s", dict()),
    "inception_next": ("inception_next_atto", dict()),
    "levit": ("levit_384_s8", dict()),
    "lowformer": ("lowformer_b0", dict()),
    "mambaout": ("test_mambaout", dict()),
    "metaformer": ("caformer_s18", dict()),
    "mlp_mixer": ("gmlp_s16_224", dict()),
    "mobilevit": ("mobilevit_xxs", dict()),
    "mvitv2": ("mvitv2_tiny", dict()),
    "naflexvit": ("naflexvit_base_patch16_siglip", dict(depth=2, embed_dim=64, num_heads=2)),
    "nest": ("nest_tiny", dict(img_size=64)),
    "nextvit": ("nextvit_small", dict()),
    "pit": ("pit_xs_224", dict()),
    "pvt_v2": ("pvt_v2_b0", dict()),
    "qwen3_vit": ("qwen3_vit_88m", dict(depth=2, embed_dim=64, num_heads=2)),
    "repvit": ("repvit_m0_9", dict()),
    "sequencer": ("sequencer2d_s", dict(layers=(1, 1, 2, 1), img_size=64)),
    "swiftformer": ("swiftformer_xs", dict()),
    "swin_transformer": ("swin_s3_tiny_224", dict()),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", dict(depths=(1, 1, 2, 1), img_size=64)),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", dict()),
    "tiny_vit": ("tiny_vit_5m_224", dict()),
    "tnt": ("tnt_s_legacy_patch16_224", dict(depth=2)),
    "twins": ("twins_pcpvt_small", dict()),
    "vision_transformer": ("test_vit", dict()),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", dict()),
    "vision_transformer_relpos": ("test_vit_relpos", dict()),
    "vision_transformer_sam": ("samvit_base_patch16", dict(depth=2, embed_dim=48, num_heads=2, img_size=64)),
    "vitamin": ("vitamin_small_224", dict(img_size=64)),
    "volo": ("volo_d1_224", dict()),
    "xcit": ("xcit_nano_12_p8_224", dict(depth=2)),
}
# The smallest model has none.
WITHOUT_LINEAR_LAYERS = (
    "byoanet, byobnet, convmixer, cspnet, cspnext, densenet, dla, dpn, efficientnet, efficientvit_msra, fasternet, "
    "fastvit, focalnet, ghostnet, hardcorenas, hgnet, hrnet, inception_resnet_v2, inception_v3, inception_v4, "
    "lcnetv2, maxxvit, mobilenetv3, mobilenetv5, nasnet, nfnet, pnasnet, rdnet, regnet, repghost, res2net, resnest, "
    "resnet, resnetv2, rexnet, selecsls, senet, shvit, sknet, starnet, tresnet, vgg, visformer, vovnet, xception, "
    "xception_aligned "
)
ALL = os.environ.get("PACE_ALL_MODELS") == "1"
TOLERANCE = 1e-3


def check(name, settings):
    """What works, as a row of the table; raises what a user would see."""
    torch.manual_seed(0)
    # The size of its images, where the model does not want to be told.
    image = settings.get("image")
    settings = {key: value for key, value in settings.items() if key != "image"}

    def make():
        return timm.create_model(name, num_classes=5, **settings)

    model = make()
    plain = {**make().state_dict()}
    size = image or settings.get("img_size", model.default_cfg["input_size"][1])
    x, labels = torch.randn(2, 3, size, size), torch.arange(2)
    before = logits_of(model.eval()(x)).detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pace_torch.inject(model, rank=2, sigma=0.5, lambda_=0.1)

        def near(value, other, what):
            distance = (logits_of(value) - logits_of(other)).abs().max() / logits_of(other).abs().max().clamp(min=1e-3)
            assert distance < TOLERANCE, f"{what}: {distance:.2g}"

        near(model.eval()(x), before, "inject changed the model")
        # Some classifiers start at zero.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
        losses = check_layers(model, lambda: model.pace.training_step(model, x, labels), 1e-4)
        losses.total.backward()
    assert losses.total.isfinite() and losses.consistency > 0
    layers = [layer for layer in model.modules() if isinstance(layer, NoisyLinear)]
    without = [path for path, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert all(path.startswith("head_dist") for path in without), f"no gradient: {without[0]}"
    # A step along the gradients, then the three ways to keep what was trained.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad.sign()
    want = logits_of(model.eval()(x)).detach()
    fresh = make()
    fresh.load_state_dict(plain)
    pace_torch.inject(fresh, rank=2, sigma=0.5, lambda_=0.1)
    base = {path: value for path, value in model.state_dict().items() if "base_module" in path}
    fresh.load_state_dict(base, strict=False)
    other = {path: value for path, value in model.state_dict().items() if ".adapter." not in path}
    fresh.load_state_dict(other, strict=False)
    pace_torch.load_trainable_state_dict(fresh, pace_torch.trainable_state_dict(model))
    near(fresh.eval()(x), want, "what was saved")
    merged = pace_torch.merge(model).eval()
    near(merged(x), want, "merge")
    again = make().eval()
    again.load_state_dict(merged.state_dict())
    near(again(x), want, "the merged weights in a fresh model")
    notes = "; ".join(sorted({str(warning.message).split(": ")[0] for warning in caught if "layers" in str(warning.message)}))
    at = "input" if model_doubles(make()) else "first noisy block"
    return f"{len(layers)} layers; branches at the {at}" + (f"; {notes}" if notes else "")


def model_doubles(model):
    return pace_torch.inject(model, rank=2).pace.doubles_input


@pytest.mark.parametrize("family", FAMILIES if ALL else list(FAMILIES)[1::3])
def test_families(family):
    check(*FAMILIES[family])


def test_the_table():
    if not (ALL and os.environ.get("PACE_UPDATE_DOCS") == "1"):
        pytest.skip("PACE_ALL_MODELS=1 PACE_UPDATE_DOCS=1 writes the table of all families")
    rows, works = [], 0
    for family, (name, settings) in FAMILIES.items():
        start = time.time()
        try:
            what = check(name, settings)
            works += 1
        except (PaceError, AssertionError, RuntimeError) as error:
            what = f"**no**: {error}"
        rows.append(f"| {family} | `{name}` | {what} |")
        print(rows[-1], f"{time.time() - start:.0f} s")
    transformers = pytest.importorskip("transformers")
    import test_huggingface

    others = [
        f"| {name} | `{kind}` | {test_huggingface.check(name, 'LoRAmul_VPTadd')} |"
        for name, (kind, *_) in test_huggingface.MODELS.items()
    ]
    text = (
        "# Models\n\n"
        "What `pace_torch.inject` does with the families of timm "
        f"{timm.__version__} and models of transformers {transformers.__version__}, PyTorch {torch.__version__.split('+')[0]}:\n"
        "LoRAmul_VPTadd around every linear layer, random weights, one small model of each. It works if evaluation is what it was, every\n"
        "layer of a step with two branches is `base + z⊙(what its adapter adds)`, every adapter gets a gradient, and what is saved, loaded or\n"
        "merged computes the same.\n\n"
        "Written by `PACE_ALL_MODELS=1 PACE_UPDATE_DOCS=1 pytest python/tests/test_sweep.py`.\n\n"
        "## timm\n\n"
        f"{works} of {len(FAMILIES)} families with linear layers besides the classifier work.\n\n"
        "| family | model | |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Families whose small models have no such layers, so that only the classifier would get an adapter: {' '.join(WITHOUT_LINEAR_LAYERS.split())}.\n\n"
        "## Hugging Face\n\n"
        "From tiny configurations (`python/tests/test_huggingface.py`); language models are in `python/tests/test_language.py`.\n\n"
        "| | model | |\n|---|---|---|\n" + "\n".join(others) + "\n"
    )
    (ROOT / "docs" / "models.md").write_text(text)
