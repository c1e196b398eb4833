"""Tables and pictures of the results."""

import csv
from collections.abc import Sequence
from pathlib import Path

from measures import BINS, mean_interval
from methods import BASELINE, METHODS, PACE, STRONGER, STRONGER_KL
from texts import StudyError

# column, heading, factor, decimals
MEASURES = (
    ("accuracy", "accuracy, %", 100, 1),
    ("ece", "ECE, %", 100, 1),
    ("overconfidence", "confidence − accuracy, %", 100, 1),
    ("cross_entropy", "cross-entropy", 1, 3),
    ("grad_norm", "gradient norm", 1, 2),
    ("fp_distance", "FP-distance", 1, 2),
)
COLUMNS = ("phase", "method", "seed", "rate", "lambda", "sigma", *(name for name, *_ in MEASURES), "train_accuracy", "seconds")


def write_csv(path: Path, records: Sequence[dict]) -> None:
    """A line per run; numbers with six digits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in records:
            cells = [record.get(column, "") for column in COLUMNS]
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])


def read_csv(path: Path) -> list[dict]:
    """The lines of `write_csv`, numbers as numbers."""
    texts = ("phase", "method")
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: cell if name in texts else float(cell) for name, cell in line.items() if cell != ""} for line in csv.DictReader(file)]


def by_method(records: Sequence[dict], methods: Sequence[str]) -> dict[str, list[dict]]:
    """The reported runs of each method, in the order of their seeds, which have to be the same for all."""
    runs = {method: [] for method in methods}
    for record in sorted((record for record in records if record["phase"] == "report"), key=lambda record: record["seed"]):
        if record["method"] in runs:
            runs[record["method"]].append(record)
    seeds = {method: [record["seed"] for record in of] for method, of in runs.items()}
    if len({tuple(of) for of in seeds.values()}) != 1:
        raise StudyError(f"the methods have runs of different seeds, which cannot be paired: {seeds}")
    return runs


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean_table(records: Sequence[dict], methods: Sequence[str]) -> str:
    """Mean ± half a 95 % interval over seeds."""
    runs = by_method(records, methods)
    lines = [_line(["method", "learning rate", "λ", "σ", *(heading for _, heading, *_ in MEASURES), "CPU s"]), _line(["---"] * (len(MEASURES) + 5))]
    for method in methods:
        first = runs[method][0]
        cells = [method, f"{first['rate']:g}", *(f"{first[name]:g}" if first[name] else "–" for name in ("lambda", "sigma"))]
        for name, _, factor, decimals in MEASURES:
            mean, half = mean_interval([factor * run[name] for run in runs[method]])
            cells.append(f"{mean:.{decimals}f} ± {half:.{decimals}f}")
        lines.append(_line([*cells, f"{mean_interval([run['seconds'] for run in runs[method]])[0]:.0f}"]))
    return "\n".join(lines)


def differences(runs: dict[str, list[dict]], method: str, other: str, name: str) -> list[float]:
    """Of each seed: what `method` has more than `other`."""
    return [run[name] - base[name] for run, base in zip(runs[method], runs[other])]


def difference_table(records: Sequence[dict], methods: Sequence[str], other: str) -> str:
    """Mean and 95 % interval of the paired differences to `other`; those that do not hold 0 are bold."""
    runs = by_method(records, methods)
    lines = [_line([f"minus {other}", *(heading for _, heading, *_ in MEASURES)]), _line(["---"] * (len(MEASURES) + 1))]
    for method in methods:
        if method == other:
            continue
        cells = [method]
        for name, _, factor, decimals in MEASURES:
            mean, half = mean_interval([factor * value for value in differences(runs, method, other, name)])
            cell = f"{mean:+.{decimals}f} [{mean - half:+.{decimals}f}, {mean + half:+.{decimals}f}]"
            cells.append(f"**{cell}**" if abs(mean) > half else cell)
        lines.append(_line(cells))
    return "\n".join(lines)


def selection_table(records: Sequence[dict], methods: Sequence[str]) -> str:
    """Of each setting that was tried: means of accuracy and calibration error on the validation texts. What was chosen is bold."""
    chosen = {method: tuple(runs[0][name] for name in ("rate", "lambda", "sigma")) for method, runs in by_method(records, methods).items()}
    tried = {}
    for record in records:
        if record["phase"] == "select":
            tried.setdefault((record["method"], record["rate"], record["lambda"], record["sigma"]), []).append(record)
    lines = [_line(["tried", "learning rate", "λ", "σ", "accuracy, %", "ECE, %"]), _line(["---"] * 6)]
    for method in methods:
        for (_, *setting), runs in ((key, runs) for key, runs in tried.items() if key[0] == method):
            means = [100 * mean_interval([run[name] for run in runs])[0] for name in ("accuracy", "ece")]
            cells = [method, f"{setting[0]:g}", *(f"{value:g}" if value else "–" for value in setting[1:]), *(f"{mean:.1f}" for mean in means)]
            lines.append(_line([f"**{cell}**" for cell in cells] if tuple(setting) == chosen[method] else cells))
    return "\n".join(lines)


def all_tables(records: Sequence[dict]) -> list[str]:
    """The means; the differences to the baseline and to PACE; means and differences to the baseline of stronger noise and consistency,
    for the seeds that it has; and the selection."""
    seeds = {record["seed"] for record in records if record["method"] == STRONGER}
    of_stronger = [record for record in records if record["seed"] in seeds]
    stronger = (BASELINE, STRONGER, STRONGER_KL)
    return [
        mean_table(records, METHODS),
        difference_table(records, METHODS, BASELINE),
        difference_table(records, METHODS, PACE),
        mean_table(of_stronger, stronger),
        difference_table(of_stronger, stronger, BASELINE),
        selection_table(records, METHODS),
    ]


def _axes(rows: int, columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "text_study", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_measures(path: Path, records: Sequence[dict], colours: dict[str, str]) -> None:
    """Above: a point per seed, those of a seed joined by a line, and mean and 95 % interval of each method. Below: the same of the paired
    differences to the first method."""
    methods = list(colours)
    runs = by_method(records, methods)
    figure, axes = _axes(2, 4, 13, 6.5)
    shown = [measure for measure in MEASURES if measure[0] in ("accuracy", "ece", "grad_norm", "fp_distance")]
    for (above, below), (name, heading, factor, _) in zip(axes.T, shown):
        values = [[factor * run[name] for run in runs[method]] for method in methods]
        _points(above, values, range(len(methods)), colours)
        changes = [[factor * value for value in differences(runs, method, methods[0], name)] for method in methods]
        _points(below, changes[1:], range(1, len(methods)), colours)
        below.axhline(0, color="0.5", linewidth=0.8)
        above.set_title(heading)
        below.set_title(f"minus {methods[0]}")
    _save(figure, path)


def _points(axis, values: Sequence[Sequence[float]], places: Sequence[int], colours: dict[str, str]) -> None:
    """`values[i]` are those of the method at `places[i]`, in the order of the seeds."""
    methods = list(colours)
    for seed in zip(*values):
        axis.plot(places, seed, color="0.85", linewidth=0.8, marker=".", markersize=4, markerfacecolor="0.6", markeredgecolor="0.6", zorder=1)
    for place, of in zip(places, values):
        mean, half = mean_interval(of)
        axis.errorbar(place, mean, half, color=colours[methods[place]], marker="o", markersize=6, capsize=4, linewidth=1.8, zorder=2)
    axis.set_xticks(range(len(methods)), methods, rotation=25, ha="right")
    axis.set_xlim(-0.5, len(methods) - 0.5)
    axis.grid(axis="y", color="0.93")


def draw_reliability(path: Path, records: Sequence[dict], colours: dict[str, str]) -> None:
    """Accuracy over confidence by bin, of the texts of all seeds together; the area of a point is its share of the texts."""
    runs = by_method(records, list(colours))
    figure, axes = _axes(1, len(colours), 2.3 * len(colours), 3.0)
    for axis, (method, colour) in zip(axes.flat, colours.items()):
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        bins = [[sum(run["bins"][part][b] for run in runs[method]) for b in range(BINS)] for part in range(3)]
        filled = [(confidence / count, right / count, count / sum(bins[0])) for count, confidence, right in zip(*bins) if count]
        axis.scatter([x for x, _, _ in filled], [y for _, y, _ in filled], s=[4 + 300 * share for _, _, share in filled], color=colour)
        axis.set(title=method, xlabel="confidence", xlim=(0.15, 1.05), ylim=(0.0, 1.05), aspect="equal")
    axes[0, 0].set_ylabel("accuracy")
    _save(figure, path)
