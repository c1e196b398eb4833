"""PACE on text: LoRA in a small sentence encoder learns five kinds of news from a few texts of each.

    python examples/text_study/study.py            # everything: downloads, selection of λ and σ, runs, tables, pictures
    python examples/text_study/study.py --quick    # the same in less than a minute, with numbers that mean nothing

It needs torch, transformers, peft, safetensors, matplotlib and pace_torch (pip install ./python). A run is a pure function of its settings and its seed.
Finished runs are kept in a file in the cache folder, and a study that was interrupted goes on after the last of them.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# PyTorch's threads and the operators' take turns on the CPU: the idle ones must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

NEEDED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "matplotlib", "pace_torch")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    sys.exit(f"error: Python has no {', '.join(MISSING)}: pip install {' '.join(MISSING).replace('pace_torch', './python')}")

import report
import texts
import torch
from fine_tuning import Data, Settings, features_of, run
from methods import BASELINE, METHODS, NOISE, PACE, PACE_KL, PROBE, STRONGER, STRONGER_KL

FIRST_SELECTION_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is searched, and how many seeds there are. `rates` are the learning rates of everything with LoRA; `stronger` and `stronger_kl`
    are λ and σ of what is reported beside the chosen ones, of fewer seeds."""

    settings: Settings
    seeds: int = 12
    selection_seeds: int = 2
    probe_rates: tuple = (3e-3, 1e-2, 3e-2)
    rates: tuple = (1e-3, 2e-3, 4e-3, 8e-3)
    sigmas: tuple = (0.5, 1.0, 2.0)
    lambdas: tuple = (0.02, 0.1, 0.5)
    kl_lambdas: tuple = (0.2, 1.0, 5.0)
    stronger_seeds: int = 6
    stronger: tuple = (0.1, 1.0)
    stronger_kl: tuple = (5.0, 1.0)


QUICK = Plan(
    Settings(shots=2, epochs=2, tokens=16, validation=10, test=20, measured=5), seeds=2, selection_seeds=1, probe_rates=(1e-2,),
    rates=(2e-3,), sigmas=(1.0,), lambdas=(0.1, 0.3), kl_lambdas=(1.0,),
)


class Runner:
    """Runs of one plan, each once: those that the file of results has are read from it."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        key = json.dumps([dataclasses.asdict(settings), texts.ENCODER, texts.TEXTS], sort_keys=True)
        self.path = folder / f"results-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
        self.records, self.used = [json.loads(line) for line in self._lines()], []
        self.encoder = self.data = self.pool = None

    def _lines(self) -> list[str]:
        """The whole lines of the file: the last may have been cut off."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole.encode()))  # Written anew, all would be lost if this were cut off too.
        return whole.splitlines()

    def _load(self) -> None:
        encoder = texts.fetch(texts.ENCODER, self.folder)
        corpus = texts.fetch(texts.TEXTS, self.folder)
        self.encoder, tokenizer = texts.read_encoder(encoder)
        settings = self.settings
        read = texts.read_texts(corpus, tokenizer, settings.tokens)
        parts = texts.split(read.labels, settings.validation, settings.test)
        measured = parts.validation.view(len(read.classes), settings.validation)[:, : settings.measured].flatten()
        print(f"{len(read.labels)} texts: {len(parts.validation)} to validate, {len(parts.test)} to test, {len(parts.pool)} to train from",
              flush=True)
        self.pool = parts.pool
        self.data = Data(read, features_of(self.encoder, read.ids), parts.validation, parts.test, measured)

    def __call__(self, phase: str, method: str, seed: int, rate: float, lambda_: float, sigma: float) -> dict:
        """The record of a run, which is in `phase` "select" or "report". It is among `used` then."""
        job = {"phase": phase, "method": method, "seed": seed, "rate": rate, "lambda": lambda_, "sigma": sigma}
        for record in self.records:
            if all(record[name] == value for name, value in job.items()):
                self.used.append(record)
                return record
        if self.encoder is None:
            self._load()
        rows = texts.shots_of(seed, self.pool, self.data.texts.labels, self.settings.shots)
        result = run(self.encoder, self.data, self.settings, method=method, seed=seed, rate=rate, lambda_=lambda_, sigma=sigma, rows=rows,
                     is_final=phase == "report")
        record = {**job, **result}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.used.append(record)
        print(f"{phase} {method}, seed {seed}, rate {rate:g}, λ {lambda_:g}, σ {sigma:g}: accuracy {100 * record['accuracy']:.1f} %, "
              f"ECE {100 * record['ece']:.1f} %, {record['seconds']:.1f} s", flush=True)
        return record


def best(runner: Runner, plan: Plan, method: str, grid: Sequence[tuple]) -> tuple:
    """Of the (learning rate, λ, σ) in `grid` the one with the highest mean accuracy on the validation texts over seeds of which none is
    reported; of equals the one with the lowest cross-entropy."""
    seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + plan.selection_seeds)

    def quality(setting: tuple) -> tuple:
        records = [runner("select", method, seed, *setting) for seed in seeds]
        return sum(round(1e6 * record["accuracy"]) for record in records), -sum(record["cross_entropy"] for record in records)

    return max(grid, key=quality)


def select(runner: Runner, plan: Plan) -> dict[str, tuple]:
    """(learning rate, λ, σ) of each method. The learning rate is the baseline's, but for the probe's own."""
    chosen = {PROBE: best(runner, plan, PROBE, [(rate, 0.0, 0.0) for rate in plan.probe_rates])}
    chosen[BASELINE] = best(runner, plan, BASELINE, [(rate, 0.0, 0.0) for rate in plan.rates])
    rate = chosen[BASELINE][0]
    chosen[NOISE] = best(runner, plan, NOISE, [(rate, 0.0, sigma) for sigma in plan.sigmas])
    for method, lambdas in ((PACE, plan.lambdas), (PACE_KL, plan.kl_lambdas)):
        chosen[method] = best(runner, plan, method, [(rate, lambda_, sigma) for lambda_ in lambdas for sigma in plan.sigmas])
    return {**chosen, STRONGER: (rate, *plan.stronger), STRONGER_KL: (rate, *plan.stronger_kl)}


def write(records: list[dict], folder: Path) -> str:
    """Writes results.csv, tables.md and the pictures; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {method: f"C{number}" for number, method in enumerate(METHODS)}
    adapted = {method: colour for method, colour in colours.items() if method != PROBE}
    report.write_csv(folder / "results.csv", records)
    # What the csv file has, so that the tables can be made of it again.
    rounded = report.read_csv(folder / "results.csv")
    tables = "\n\n".join(report.all_tables(rounded))
    (folder / "tables.md").write_text(tables + "\n", encoding="utf-8")
    report.draw_measures(folder / "measures.svg", records, adapted)
    report.draw_reliability(folder / "reliability.svg", records, colours)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and texts, to see that everything works")
    parser.add_argument("--seeds", type=int, help="seeds that are reported (12)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and the operators (1)")
    parser.add_argument("--out", type=Path, default=Path("results/text_study"), help="folder of tables and pictures")
    parser.add_argument("--cache", type=Path, default=texts.cache_folder(), help="folder of downloads and finished runs")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else Plan(Settings())
    plan = dataclasses.replace(plan, seeds=arguments.seeds or plan.seeds)
    torch.set_num_threads(arguments.threads)
    runner = Runner(plan.settings, arguments.cache)
    chosen = select(runner, plan)
    for seed in range(plan.seeds):
        for method in (*METHODS, STRONGER, STRONGER_KL) if seed < plan.stronger_seeds else METHODS:
            runner("report", method, seed, *chosen[method])
    print(write(runner.used, arguments.out))
    print(f"\nwritten to {arguments.out}; CPU seconds of training: {sum(record['seconds'] for record in runner.used):.0f}")


if __name__ == "__main__":
    try:
        main()
    except texts.StudyError as error:
        sys.exit(f"error: {error}")
