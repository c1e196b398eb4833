"""One run: a method, a seed, a learning rate, λ and σ."""

import copy
import time
from dataclasses import dataclass

import pace_torch
import peft
import torch
import torch.nn.functional as F
from measures import calibration_error, reliability
from methods import BASELINE, NOISE, PACE_KL, PROBE, STRONGER_KL
from texts import PADDING, Texts
from torch import Tensor, nn

VARIANTS = {BASELINE: "baseline", NOISE: "noise"}
DIVERGENCES = {PACE_KL: "symmetric_kl", STRONGER_KL: "symmetric_kl"}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common. `validation`, `test`, `measured`: texts per class; `measured` are of the validation texts."""

    shots: int = 4
    epochs: int = 15
    batch: int = 5
    tokens: int = 64
    validation: int = 60
    test: int = 120
    measured: int = 20
    rank: int = 8
    alpha: int = 16
    warm_up: float = 0.1
    weight_decay: float = 1e-4


class Classifier(nn.Module):
    """A linear layer on the mean of the encoder's outputs over the tokens. Without an encoder its inputs are these means."""

    def __init__(self, encoder: nn.Module | None, width: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, classes)

    def features(self, ids: Tensor) -> Tensor:
        """`ids [B, T]` to `[B, width]`."""
        if self.encoder is None:
            return ids
        is_token = ids != PADDING
        outputs = self.encoder(input_ids=ids, attention_mask=is_token.long()).last_hidden_state
        weights = is_token[:, :, None].to(outputs.dtype)
        return (outputs * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids [B, T]` to logits `[B, C]`."""
        return self.classifier(self.features(ids))


@torch.no_grad()
def features_of(encoder: nn.Module, ids: Tensor) -> Tensor:
    """The pre-trained model's features of texts, `[n, T]` to `[n, width]`."""
    model = Classifier(encoder, encoder.config.hidden_size, 1)
    return torch.cat([model.features(part) for part in ids.split(100)])


def make(method: str, encoder: nn.Module, classes: int, seed: int, lambda_: float, sigma: float, settings: Settings) -> nn.Module:
    """A model that is to be trained. Methods other than the probe start from the same numbers for the same seed."""
    torch.manual_seed(seed)
    width = encoder.config.hidden_size
    if method == PROBE:
        return Classifier(None, width, classes)
    model = Classifier(copy.deepcopy(encoder), width, classes)
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=["query", "value"], modules_to_save=["classifier"])
    return pace_torch.attach(
        peft.get_peft_model(model, lora), variant=VARIANTS.get(method, "pace"), divergence=DIVERGENCES.get(method, "squared_difference"),
        lambda_=lambda_, sigma=sigma, seed=seed,
    )


def train(model: nn.Module, method: str, ids: Tensor, labels: Tensor, seed: int, rate: float, settings: Settings) -> None:
    """Trains in place: AdamW, a linear warm-up and a cosine. The order of the texts is that of the seed, whatever the method."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(labels) // settings.batch)
    warm_up = max(1, round(settings.warm_up * steps))
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up)),
        ],
        milestones=[warm_up],
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(settings.batch):
            optimizer.zero_grad()
            if method == PROBE:
                loss = F.cross_entropy(model(ids[rows]), labels[rows])
            else:
                loss = model.pace.training_step(model, ids[rows], labels[rows]).total
            loss.backward()
            optimizer.step()
            scheduler.step()


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict:
    """Accuracy, calibration and cross-entropy of a model in evaluation."""
    logits = torch.cat([model(part) for part in inputs.split(100)])
    probabilities = logits.double().softmax(1)
    bins = reliability(probabilities, labels)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {
        "accuracy": accuracy,
        "ece": calibration_error(bins),
        "overconfidence": float(probabilities.max(1).values.mean()) - accuracy,
        "cross_entropy": float(F.cross_entropy(logits.double(), labels)),
        "bins": bins.tolist(),
    }


def norm_and_distance(model: nn.Module, inputs: Tensor, labels: Tensor, pre_trained: Tensor) -> dict:
    """The norm of the gradient of the mean cross-entropy in what is trained, and the FP-distance of the features `pre_trained [n, width]`;
    without noise."""
    model.zero_grad()
    inner = model.base_model.model if hasattr(model, "base_model") else model
    features = []
    for part, part_labels in zip(inputs.split(50), labels.split(50)):
        features.append(inner.features(part))
        (F.cross_entropy(inner.classifier(features[-1]), part_labels, reduction="sum") / len(labels)).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return {
        "grad_norm": float(pace_torch.grad_norm(gradients)),
        "fp_distance": float(pace_torch.fp_distance(torch.cat([part.detach() for part in features]), pre_trained)),
    }


@dataclass(frozen=True)
class Data:
    """The texts by use: numbers of texts, and the pre-trained features of all texts, which are the probe's inputs."""

    texts: Texts
    features: Tensor
    validation: Tensor
    test: Tensor
    measured: Tensor


def run(
    encoder: nn.Module, data: Data, settings: Settings, *, method: str, seed: int, rate: float, lambda_: float, sigma: float, rows: Tensor,
    is_final: bool,
) -> dict:
    """Trains on the texts `rows`, and evaluates: on the test texts if this is a final run, on the validation texts otherwise."""
    inputs, labels = data.features if method == PROBE else data.texts.ids, data.texts.labels
    model = make(method, encoder, len(data.texts.classes), seed, lambda_, sigma, settings)
    start = time.process_time()
    train(model, method, inputs[rows], labels[rows], seed, rate, settings)
    seconds = time.process_time() - start
    model.eval()
    on = data.test if is_final else data.validation
    result = {**evaluate(model, inputs[on], labels[on]), "train_accuracy": evaluate(model, inputs[rows], labels[rows])["accuracy"]}
    if is_final:
        on = data.measured
        result.update(norm_and_distance(model, inputs[on], labels[on], data.features[on]))
    return {**result, "seconds": seconds}
