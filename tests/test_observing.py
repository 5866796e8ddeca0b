"""What a run shows: real trackers get every figure and the word maps, and the picture of the run has a panel for each."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import TINY
from tiny import tiny_model, tiny_processor

from granalign_hf.training import observing, plot, train
from granalign_hf.training.data import load_split
from granalign_hf.training.observing import epoch_means, log_step, log_word_maps

TERMS = {
    "loss",
    "contrastive_original",
    "contrastive_key",
    "contrastive_uncertain",
    "reconstruction",
    "kl",
    "entropy",
    "budget",
}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    train.main([*TINY, "--report_to", "tensorboard", "--layer_decay", "0.5", "--output_dir", str(folder)])
    events = EventAccumulator(str(folder / "granalign"), size_guidance={"images": 0})
    events.Reload()
    return folder, events


def test_a_tracker_gets_every_figure(observed):
    folder, events = observed
    names = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in TERMS | {"grad_norm"}} <= names
    assert {f"validation/{name}" for name in ("rsum", "image_to_text_r1")} <= names
    diagnostics = ("patch_saliency_mean", "word_saliency_mean", "region_mean_cosine", "distinct_regions")
    assert {f"diagnostics/{name}" for name in diagnostics} <= names
    rates = {name: events.Scalars(name)[0].value for name in names if name.startswith("lr/")}
    top = rates.pop("lr/new_layers")
    blocks = {"vision": 2, "text": 1}  # of TINY
    assert len(rates) == sum(number + 1 for number in blocks.values())
    for name, rate in rates.items():
        side, _, depth = name.removeprefix("lr/").partition("_")
        assert rate == pytest.approx(top * 0.5 ** (blocks[side] + 1 - int(depth)), rel=1e-5)
    history = json.loads((folder / "metrics.json").read_text())["history"]
    for record, event in zip(history, events.Scalars("validation/rsum"), strict=True):
        assert event.value == pytest.approx(record["validation"]["rsum"], rel=1e-6)
        assert record["grad_norm"] > 0 and {f"lr/{name}" for name in record["learning_rates"]} == {*rates, "lr/new_layers"}


def test_word_maps_of_the_same_captions_at_each_validation(observed):
    _, events = observed
    names = events.Tags()["images"]
    assert names == [f"word_maps/{number}" for number in (0, 3, 7, 11)]
    for name in names:
        first, second = events.Images(name)
        assert (first.width, first.height) == (second.width, second.height) and first.width > 300
        assert first.step < second.step and first.encoded_image_string != second.encoded_image_string


class Recording:
    """A tracker that keeps what Accelerate's own ones would pass on."""

    def __init__(self, name: str):
        self.name, self.seen = name, []

    def log_images(self, values, step, **kwargs):
        self.seen.append((values, step, kwargs))


def test_pictures_have_the_form_that_each_tracker_takes():
    accelerator = Accelerator()
    accelerator.trackers = [Recording(name) for name in ("tensorboard", "wandb", "aim")]
    data = load_split("scenes", "validation").first(1)
    log_word_maps(accelerator, tiny_model(), tiny_processor(), data, step=7)
    board, wandb, aim = (next(iter(tracker.seen[0][0].values())) for tracker in accelerator.trackers)
    assert all(tracker.seen[0][1] == 7 and len(tracker.seen) == 1 for tracker in accelerator.trackers)
    assert accelerator.trackers[0].seen[0][2] == {"dataformats": "NHWC"} and board.shape[0] == 1 and board.shape[-1] == 3
    assert isinstance(wandb, list) and np.array_equal(wandb[0], board[0]) and np.array_equal(aim, board[0])


def test_means_of_an_epoch_are_those_of_its_steps(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0, "name": "new_layers"}])
    accelerator, logged = Accelerator(), []
    monkeypatch.setattr(accelerator, "log", lambda values, step: logged.append((step, values)))
    monkeypatch.setattr(observing, "UPDATES_BETWEEN_LOGS", 2)
    sums, speed = {}, {"pairs_per_second": 5.0}
    for step, norm in enumerate([1.0, float("inf"), 3.0], start=30):
        log_step(accelerator, optimizer, sums, step, step, {"loss": step - 30.0, "kl": 2.0 * (step - 30)}, norm, speed)
        optimizer.param_groups[0]["lr"] /= 2
        sums = json.loads(json.dumps(sums))  # what a saved state does to it
    assert epoch_means(sums) == {"loss": 1.0, "kl": 2.0, "grad_norm": 2.0, "learning_rates": {"new_layers": 1.75 / 3}}
    assert [step for step, _ in logged] == [30, 32]
    assert logged[1][1] == {"train/loss": 2.0, "train/kl": 4.0, "train/grad_norm": 3.0, "lr/new_layers": 0.25} | {
        "speed/pairs_per_second": 5.0
    }


def panels(monkeypatch, history: list[dict], path) -> dict[str, set[str]]:
    """Title -> labels of the curves, of what was drawn."""
    drawn = {}
    draw = plot._draw_panel
    monkeypatch.setattr(
        plot, "_draw_panel", lambda axis, title, curves: (drawn.update({title: {*curves}}), draw(axis, title, curves))
    )
    plot.plot_history(history, path)
    return drawn


def test_the_picture_of_a_run_shows_all_that_its_history_tells(observed, monkeypatch, tmp_path):
    folder, _ = observed
    history = json.loads((folder / "metrics.json").read_text())["history"]
    drawn = panels(monkeypatch, history, tmp_path / "all.png")
    assert set(drawn) == set(plot._PANELS)
    assert drawn["training loss"] == {"total", "original", "key", "uncertain"}
    assert drawn["learning rate"] == {
        "new layers",
        "vision, last layers",
        "vision, first",
        "text, last layers",
        "text, first",
    }
    assert len(plot._LINES) >= max(len(curves) for curves in drawn.values())
    bare = [{"epoch": 1, "loss": 0.3, "contrastive": 0.3}]
    assert panels(monkeypatch, bare, tmp_path / "bare.png") == {"training loss": {"total"}}


def test_plot_as_a_command(observed, capsys, tmp_path):
    folder, _ = observed
    (folder / "learning_curve.png").unlink()
    plot.main([str(folder)])
    with Image.open(folder / "learning_curve.png") as picture:
        assert picture.width > 1000
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path)])
    assert "has no metrics.json" in capsys.readouterr().err
