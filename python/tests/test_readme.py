"""The programs of the README and of docs/pytorch run as they are, each page as one."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pace_torch
import pytest
import torch
from conftest import ROOT

PAGES = ["python/README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "pytorch").glob("*.md"))]
# Pages whose program needs these, which not everybody has.
NEEDS = {"hugging_face": ["transformers", "accelerate"], "peft": ["transformers", "accelerate", "peft"]}


def program(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S))


def run(page, folder, monkeypatch):
    """What the program of a page leaves, and what it printed."""
    for module in NEEDS.get(page.split("/")[-1].removesuffix(".md"), []):
        pytest.importorskip(module)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program(page), page, "exec"), scope)
    return scope, printed.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if program(page) and "distributed" not in page])
def test_pages(page, tmp_path, monkeypatch):
    scope, printed = run(page, tmp_path, monkeypatch)
    losses = scope["losses"]
    assert losses.total.isfinite() and losses.consistency > 0
    name = page.split("/")[-1].removesuffix(".md")
    if name == "README":
        saved = torch.load(tmp_path / "adapters.pt")
        assert saved and all("delta" in name or "head" in name for name in saved)
        assert not hasattr(scope["plain"], "pace")
    elif name == "training":
        assert 0 < scope["accuracy"] < 1 and not hasattr(scope["plain"], "pace")
        # The optimizer had what is trained, and the second rate is the head's.
        assert [len(group["params"]) for group in scope["optimizer"].param_groups] == [8 * 5, 2]
    elif name == "timm":
        assert "blocks.3.mlp.fc2" in printed and (tmp_path / "adapters.pt").exists()
    elif name == "hugging_face":
        assert (tmp_path / "plain" / "config.json").exists() and scope["trainer"].state.global_step == 3
        assert (tmp_path / "out" / "checkpoint-2" / "pace.pt").exists()
    elif name == "peft":
        for folder in ("adapter", "lora"):
            assert (tmp_path / folder / "adapter_model.safetensors").exists()
        assert scope["trainer"].state.global_step == 3 and scope["loaded"].peft_config


def test_the_program_of_several_processes(tmp_path):
    (tmp_path / "program.py").write_text(program("docs/pytorch/distributed.md"))
    here = os.path.dirname(os.path.dirname(pace_torch.__file__))
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert re.search(r"consistency \d+\.\d+, logits \(4, 5\)", launched.stdout)


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert link.startswith("http") or ((ROOT / page).parent / link).exists(), f"{page}: {link}"
