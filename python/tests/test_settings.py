"""Settings out of range, and models that adapters do not suit, are found by `inject`."""

from math import inf, nan

import pace_torch
import pytest
import timm
import torch
from conftest import vit
from pace_torch import PaceError
from torch import nn

AT_LEAST_0, AT_LEAST_1 = "expected a finite number of at least 0", "expected an integer of at least 1"
NAMES = "expected a regular expression or a list of names"
WRONG = {
    "lambda_": ((-1, nan, inf, "1", True, None, torch.tensor(1.0)), AT_LEAST_0),
    "label_smoothing": ((-0.1, 1.1, nan, "0", True), "expected a finite number from 0 to 1"),
    "sigma": ((nan, inf, "1", True, None, [0.5]), "expected a finite number"),
    "rank": ((0, 2.5, "3", True, None), AT_LEAST_1),
    "lazy_interval": ((0, 1.5, "2", True), AT_LEAST_1),
    "samples": ((0, -3, 2.5, "9", True), AT_LEAST_1),
    "seed": ((1.5, "a", 2**64, -(2**63) - 1, True, None), "expected an integer from -9223372036854775808 to 18446744073709551615"),
    "scale": ((nan, inf, "1", True), "expected a finite number"),
    "first_noisy": ((-1, 4, 1.5, "1", True), "expected an integer from 0 to 3"),
    "head": ((3, [3], b"fc"), NAMES),
    "target_modules": ((3, [3], [["qkv"]]), NAMES),
    "exclude_modules": ((3, [None]), NAMES),
    "adapter": (("LoRA", ["LoRAadd"], None), "expected one of LoRAmul_VPTadd, LoRAadd, VPTadd"),
    "variant": (("slow", None), "expected one of pace, lazy, fast, noise, baseline"),
    "dropout": (("none", None), "expected one of independent, shared, off"),
    "noise_head": (("no", None), "expected one of True, False"),
    "noise_shape": (("CB", None), "expected one of BC, BTC"),
    "divergence": (("mse", None), "expected one of squared_difference, mean_squared_difference"),
    "temperature": ((-1, nan, "1", True), AT_LEAST_0),
    "detach_target": (("no", None), "expected one of True, False"),
    "both_branches": (("no", None), "expected one of True, False"),
    "labelled_only": (("no", None), "expected one of True, False"),
    "packed": (("no", None), "expected one of True, False"),
    "class_weights": (([1.0], torch.ones(2, 2), torch.ones(2, dtype=torch.int64)), r"expected a floating tensor \[C\]"),
    "ignore_index": ((1.5, None), "expected an integer"),
    "criterion": ((3,), "expected a function of logits and labels, \"mean_squared_error\", or None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(name):
    values, message = WRONG[name]
    model = vit()
    for value in values:
        with pytest.raises(PaceError, match=f"`{name}` is .*{message}"):
            pace_torch.inject(model, **{name: value})
    # Nothing was done to the model.
    pace_torch.inject(model, rank=2)


ATTRIBUTES = {
    "step": ((-1, 2**64, 7.5, "7", True, None, torch.tensor(3)), "expected an integer from 0 to 18446744073709551615"),
    "iteration": ((-1, 7.5, "7", None), "expected an integer of at least 0"),
    "branches": ((0, 3, "2", None, 1.0), "expected an integer from 1 to 2"),
    "manual_steps": (("no", None), "expected one of True, False"),
    "causal": (("no", 3), "expected one of None, True, False"),
    "shard": ((2, (-1, 2), (2, 2), (0, 0), (0, "2"), (True, 2), (0, 1, 2)), r"expected None or \(rank, number\) of processes"),
    "history": (([1], 1.0, torch.ones(3), torch.ones(3, 2).long(), torch.ones(3, 2).to_sparse(), torch.ones(3, 2, device="meta")),
                r"expected None or a floating tensor \[samples, classes\]"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_wrong_attributes_are_named(name):
    """Those of the controller, set one by one or as the state of a run, none of which is taken then."""
    values, message = ATTRIBUTES[name]
    pace = pace_torch.inject(vit(), rank=2, variant="fast", samples=3).pace
    good = {"step": 5, "iteration": 6, "history": torch.ones(3, 7)}
    pace.load_state_dict(good)
    before = getattr(pace, name)
    for value in values:
        with pytest.raises(PaceError, match=f"`{name}` is .*{message}"):
            setattr(pace, name, value)
        if name in good:
            with pytest.raises(PaceError, match=f"`{name}` is .*{message}"):
                pace.load_state_dict({"step": 1, "iteration": 1, "history": None, name: value})
    assert getattr(pace, name) is before and pace.step == 5 and pace.iteration == 6 and torch.equal(pace.history, good["history"])


def test_wrong_states_are_named():
    pace = pace_torch.inject(vit(), rank=2).pace
    for state in (None, [("step", 1)], {}, {"step": 1}, {"step": 1, "iteration": 1, "history": None, 1: 2}):
        with pytest.raises(PaceError, match="expected step, iteration and history"):
            pace.load_state_dict(state)
    assert pace.step == 0


def test_more_settings():
    for settings, message in (
        ({"sigma": -0.5}, "`sigma` is -0.5, expected finite and not negative"),
        ({"scale": 0}, "`scale` is 0"),
        ({"target_modules": "*.qkv"}, "`target_modules` is '[*].qkv', which is no regular expression.*give a list"),
        ({"variant": "fast"}, "`samples`, the number of training samples, is required"),
        ({"label_smoothing": 0.1, "criterion": nn.MSELoss()}, "`label_smoothing` is 0.1 beside a `criterion`"),
    ):
        with pytest.raises(PaceError, match=message):
            pace_torch.inject(vit(), **settings)
    with pytest.raises(PaceError, match="`model` is int, expected a torch.nn.Module"):
        pace_torch.inject(3)
    # At the ends of the ranges.
    for settings in ({"lambda_": 0, "sigma": 0}, {"label_smoothing": 1}, {"seed": -1}, {"seed": 2**64 - 1}, {"scale": -1}):
        model = pace_torch.inject(vit(), rank=1, **settings).train()
        model.pace.training_step(model, torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.arange(2)).total.backward()


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.rnn, self.head = nn.Linear(6, 8), kind(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.rnn(self.body(x))[0][:, -1])


def test_models_that_adapters_hardly_reach():
    """Convolutions and recurrent layers get no adapter: what has little else is named as such."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        with pytest.warns(UserWarning, match=rf"\d+% of the weights of Recurrent before its classifier: the others, in {kind.__name__}, "):
            pace_torch.inject(Recurrent(kind))
    with pytest.warns(UserWarning, match="0% of the weights of ResNet before its classifier: the others, in Conv2d, stay frozen"):
        pace_torch.inject(timm.create_model("resnet10t"))
    with pytest.raises(PaceError, match="`model`, Sequential, has no linear layers.*in Conv2d"):
        pace_torch.inject(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


@pytest.mark.filterwarnings("error")
def test_models_that_adapters_reach():
    pace_torch.inject(vit())
    # Embeddings and what is tied to them are left as they are, as a matter of course.
    embedding, head = nn.Embedding(1000, 8), nn.Linear(8, 1000, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "body": nn.Linear(8, 8), "tied": head, "head": nn.Linear(8, 2)})
    pace_torch.inject(model)
