import contextlib
import io
import re

import pytest
import torch
from conftest import ROOT


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


PROGRAMS = programs("python/README.md")


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_run_as_they_are(number, tmp_path, monkeypatch):
    if number > 0:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        # What a later one needs was imported by the first.
        exec("import torch\nimport pace_torch\n" + PROGRAMS[number], scope)
    assert scope["losses"].total.isfinite() and scope["losses"].consistency > 0
    if number == 0:
        saved = torch.load(tmp_path / "adapters.pt")
        assert saved and all("delta" in name or "head" in name for name in saved)
        assert not hasattr(scope["plain"], "pace")
    else:
        assert "bert.encoder.layer.1.attention.self.value" in printed.getvalue()


def test_the_page_on_training_is_one_program():
    torch.manual_seed(0)
    scope, totals = {}, []
    for program in programs("docs/pytorch/training.md"):
        exec(program, scope)
        totals.append(scope["losses"].total.item())
    assert totals[1] < totals[0] and 0 < scope["accuracy"] < 1
    # The optimizer had what is trained, and the second rate is the head's.
    groups = scope["optimizer"].param_groups
    assert [len(group["params"]) for group in groups] == [8 * 5, 2]
    assert not hasattr(scope["plain"], "pace")
