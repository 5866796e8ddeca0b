"""The other side of each ratio computes the same scores; figures in the committed file come from such a run."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from granalign_hf.modeling.attention import cross_attention
from granalign_hf.modeling.regions import sample_regions
from granalign_hf.modeling.similarity import hard_alignment, level_similarities, token_similarity

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("peers")


@pytest.fixture
def tokens(draw_tokens):
    drawn = draw_tokens(0, captions=6, words=7)
    lengths = torch.tensor([7, 1, 3, 5, 2, 4])
    return drawn | {"word_mask": torch.arange(7) < lengths[:, None], "patch_mask": None}


@pytest.mark.parametrize(
    ("peer", "ours"),
    [
        ("einsum_max_mean", token_similarity),
        ("caption_loop_max_mean", token_similarity),
        ("einsum_hard_alignment", hard_alignment),
        ("caption_loop_cross_attention", cross_attention),
    ],
)
def test_a_published_form_gives_our_scores(peers, tokens, peer, ours):
    plain = [tokens[name] for name in ("patch_embeds", "word_embeds", "word_mask")]
    torch.testing.assert_close(getattr(peers, peer)(*plain), ours(*plain), rtol=0, atol=1e-12)


def test_the_naive_three_levels_are_ours(peers, tokens):
    names = ("patch_embeds", "word_embeds", "word_mask", "patch_saliency", "word_saliency", "region_embeds")
    naive = peers.einsum_three_levels(*(tokens[name] for name in names))
    torch.testing.assert_close(naive, level_similarities(**tokens), rtol=0, atol=1e-12)


def test_noise_for_every_patch_has_our_moments(peers):
    """The exact K x d form: mean within four standard errors, standard deviation within 4 %, feature by feature."""
    torch.manual_seed(0)
    assignment = torch.rand(1, 6, 2).softmax(1).expand(20_000, -1, -1)
    means, log_vars = (torch.randn(1, 2, 3).expand(20_000, -1, -1) for _ in range(2))
    ours, naive = (f(assignment, means, log_vars) for f in (sample_regions, peers.patchwise_region_noise))
    error = 4 * (2 / 20_000) ** 0.5 * naive.std(0)
    assert ((ours.mean(0) - naive.mean(0)).abs() < error).all()
    torch.testing.assert_close(ours.std(0), naive.std(0), rtol=0.04, atol=0)


def test_committed_figures_are_complete_and_dated():
    path = BENCHMARKS / "similarity.json"
    sections = json.loads(path.read_text())
    assert set(sections) == {
        "one_level", "three_levels", "other_aligners", "training", "gallery", "region_noise", "precision"
    }  # fmt: skip
    assert all(section["date"] and section["rows"] for section in sections.values())


ROW = 3  # of (256, 256, 196, 512)
SPEED = [  # the sentence with its figure in brackets, the section, its row, its column, the factor
    (r"width 512: (\d+) % of the time", "one_level", ROW, "share of oneDNN product", 100),
    (r"alone; ([\d.]+) times faster than one caption", "one_level", ROW, "x LAPS form", 1),
    (r"form\), ([\d.]+) times faster than the 4-D", "one_level", ROW, "x ColPali form", 1),
    (r"three levels cost ([\d.]+) times one level", "three_levels", ROW, "in units of one level", 1),
    (r"256 pairs: ([\d.]+) times faster than plain", "training", 2, "x naive autograd", 1),
    (r"autograd, in (\d+) MB", "training", 2, "ours MB", 1),
    (r"MB instead of ([\d,]+);", "training", 2, "naive MB", 1),
    (r"at three levels: ([\d.]+) times the product", "gallery", 0, "in units of the oneDNN product", 1),
    (r"product alone, (\d+) MB above", "gallery", 0, "MB", 1),
]


@pytest.mark.parametrize(("sentence", "section", "row", "column", "factor"), SPEED)
def test_the_readme_tells_what_was_measured(sentence, section, row, column, factor):
    value = factor * json.loads((BENCHMARKS / "similarity.json").read_text())[section]["rows"][row][column]
    (told,) = re.findall(sentence, " ".join((BENCHMARKS.parents[1] / "README.md").read_text().split()))
    assert told == f"{value:,.{len(told.partition('.')[2])}f}"


def test_the_readme_tells_what_the_product_contributes():
    rows = json.loads((BENCHMARKS / "similarity.json").read_text())["one_level"]["rows"]
    gains = [row["share of torch.mm"] / row["share of oneDNN product"] for row in rows]
    readme = " ".join((BENCHMARKS.parents[1] / "README.md").read_text().split())
    assert f"takes {min(gains):.1f} to {max(gains):.1f} times as long as oneDNN's kernel" in readme


def test_the_readme_tells_how_long_a_training_waits_for_pictures():
    readme = " ".join((BENCHMARKS.parents[1] / "README.md").read_text().split())
    figures = json.loads((BENCHMARKS / "data.json").read_text())
    rows = {(row["precision"], row["workers"]): row for row in figures["training"]["rows"]}
    without, with_two = (100 * rows["bf16", workers]["share of time waiting"] for workers in (0, 2))
    told = f"waits for {without:.1f} % of the time without workers and for {with_two:.1f} % with two"
    reading, training = figures["reading"]["rows"][-1]["pictures a second"], rows["bf16", 2]["pairs a second"]
    assert told in readme and f"reads {reading:.0f} pictures a second, the model trains on {training:.0f}" in readme


@pytest.mark.parametrize("name", ["similarity", "data"])
def test_the_page_is_that_of_the_committed_figures(peers, name):
    benchmark, report = import_module(name), import_module("report")
    figures = json.loads((BENCHMARKS / f"{name}.json").read_text())
    assert (BENCHMARKS / f"{name}.md").read_text() == report.page(benchmark.HEAD, benchmark.SECTIONS, figures)


@pytest.mark.parametrize("section", ["reading", "training"])
def test_the_sections_on_data_measure(peers, section, monkeypatch):
    data = import_module("data")
    monkeypatch.setattr(data, "NUM_PICTURES", 4)
    monkeypatch.setattr(data, "BATCH_SIZE", 2)
    monkeypatch.setattr(data, "VISION", {**data.VISION, "num_hidden_layers": 1})
    monkeypatch.setattr(data, "TEXT", {**data.TEXT, "num_hidden_layers": 1})
    monkeypatch.setattr(data, "RUNS", (("bf16", 0), ("no", 1)))
    rows = data.SECTIONS[section](rounds=1)
    assert len(rows) == {"reading": 4, "training": 2}[section]
    for row in rows:
        assert all(value > 0 for value in row.values() if isinstance(value, float))
    if section == "training":
        assert all(0 < row["share of time waiting"] < 1 for row in rows)


@pytest.mark.parametrize("section", ["searching", "memory", "indexing"])
def test_the_sections_on_search_measure(peers, section, monkeypatch):
    retrieval = import_module("retrieval")
    for module in (retrieval, import_module("data")):
        monkeypatch.setattr(module, "NUM_PICTURES", 20)
    for name, value in {"BLOCK": 4, "NUM_QUERIES": 2, "NUM_PHOTOGRAPHS": 3}.items():
        monkeypatch.setattr(retrieval, name, value)
    for name in ("VISION", "TEXT"):
        monkeypatch.setattr(retrieval.data, name, {**getattr(retrieval.data, name), "num_hidden_layers": 1})
    rows = retrieval.SECTIONS[section](rounds=1)
    assert len(rows) == {"searching": 4, "memory": 2, "indexing": 2}[section]
    assert section == "memory" or all(value > 0 for row in rows for value in row.values() if isinstance(value, float))
    if section == "indexing":
        assert all(0 < row["share of storage"] < row["with an encoder 10 x as fast"] < 1 for row in rows)
