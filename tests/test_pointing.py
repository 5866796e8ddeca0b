"""Grounding: the figures are those of the pictures one by one, and know nothing of batches and processes."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from processes import run_processes
from test_train import TINY
from tiny import tiny_model, tiny_processor

from granalign_hf.explanation import align
from granalign_hf.grounding import patch_centers, points_in_boxes
from granalign_hf.training import evaluate, train
from granalign_hf.training.data import load_split
from granalign_hf.training.phrases import LocatedCaption, Phrase, located_captions
from granalign_hf.training.pointing import grounding_table, measure_grounding


def tiny(aligner: str = "grm"):
    torch.manual_seed(0)
    return tiny_model(aligner=aligner).eval(), tiny_processor()


def measured(aligner: str = "grm", batch_size: int = 3) -> dict:
    scenes = load_split("scenes", "test", num_scenes=5)
    return measure_grounding(*tiny(aligner), scenes, located_captions(scenes, None, "test"), batch_size)


@pytest.mark.parametrize("aligner", ["grm", "vse++", "max_mean"])
def test_a_phrase_points_where_its_map_is_highest(aligner):
    """Against `align`, picture by picture, with boxes by hand."""
    model, processor = tiny(aligner)
    scenes, hits, densest, corners = load_split("scenes", "test", num_scenes=5), [], [], []
    inner, largest, located = [], [], located_captions(scenes, None, "test")
    for caption in located:
        boxes = [box for other in located if other.image == caption.image for p in other.phrases for box in p.boxes]
        x0, y0, x1, y1 = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        alignment = align(model, processor, scenes.image(caption.image), caption.caption)
        for phrase in caption.phrases:
            values = alignment.phrase_map(phrase.start, phrase.end)
            row, column = divmod(int(values.argmax()), values.shape[1])
            centre = patch_centers(tuple(values.shape), alignment.image.size[::-1])[row, column]
            hits.append(float(points_in_boxes(centre, phrase.boxes)))
            densest.append(float(points_in_boxes(alignment.phrase_point(phrase.start, phrase.end), phrase.boxes)))
            corners.append(row in (0, len(values) - 1) and column in (0, values.shape[1] - 1))
            largest.append(float(points_in_boxes(np.array([(x0 + x1) / 2, (y0 + y1) / 2]), phrase.boxes)))
            rest = {
                (y, x): value.item()
                for (y, x), value in np.ndenumerate(values.numpy())
                if not (y in (0, len(values) - 1) and x in (0, values.shape[1] - 1))
            }
            centres = patch_centers(tuple(values.shape), alignment.image.size[::-1])
            inner.append(float(points_in_boxes(centres[max(rest, key=rest.get)], phrase.boxes)))
    found = measured(aligner)
    assert found["pointing"]["all"]["num_phrases"] == len(hits) and found["num_cut"] == 0
    assert found["pointing"]["all"]["accuracy"] == pytest.approx(100 * np.mean(hits))
    assert found["pointing"]["all"]["densest"] == pytest.approx(100 * np.mean(densest)) and densest != hits
    assert found["pointing"]["all"]["largest_box"] == pytest.approx(100 * np.mean(largest)) and 0 < np.mean(largest) < 1
    assert found["pointing"]["all"]["without_corners"] == pytest.approx(100 * np.mean(inner)) and inner != hits
    assert found["corner_share"] == pytest.approx(100 * np.mean(corners)) and any(corners)
    assert ("patch_saliency" in found["auroc"]) == (aligner == "grm")


def share(rank: int, folder) -> None:
    PartialState(cpu=True)
    (folder / f"{rank}.json").write_text(json.dumps(measured()))


def test_batches_and_processes_change_nothing(tmp_path):
    expected = json.loads(json.dumps(measured(batch_size=5)))
    assert json.loads(json.dumps(measured(batch_size=2))) == expected
    run_processes(share, 2, tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [expected] * 2


def test_saliencies_are_ranked_within_an_image_and_a_caption(monkeypatch):
    """A saliency that knows the boxes has an area of 1, its opposite 0, a constant one 1/2."""
    model, processor = tiny()
    scenes = load_split("scenes", "test", num_scenes=1)
    caption = scenes.captions[0][0]
    first = caption.split()[1]
    start = caption.index(first)
    width, height = scenes.image(0).size
    left_half = ((0, 0, width / 2, height),)
    located = [LocatedCaption(0, caption, (Phrase(start, start + len(first), left_half, ("shape", "thing")),))]
    encode = model.get_image_features
    for value, area in ((1.0, 1.0), (0.0, 0.0), (0.5, 0.5)):

        def features(value=value, **inputs):
            image = encode(**inputs)
            rows, columns = image.spatial_shapes[0].tolist()
            grid = torch.full((rows, columns), 0.5)
            grid[:, : columns // 2] = value
            image.patch_saliency[:, -rows * columns :] = grid.flatten()
            return image

        monkeypatch.setattr(model, "get_image_features", features)
        found = measure_grounding(model, processor, scenes, located, 1)
        assert found["auroc"]["patch_saliency"]["mean"] == area
        assert {*found["pointing"]} == {"all", "shape", "thing"}
    assert "AUROC of patch saliency: 0.500" in grounding_table(found)


def test_the_command_writes_the_figures_beside_the_checkpoint(tmp_path, capsys):
    train.main([*TINY, "--epochs", "1", "--output_dir", str(tmp_path)])
    argv = [str(tmp_path), "--dataset", "scenes", "--max_images", "6"]
    result = evaluate.main([*argv, "--task", "grounding"])
    assert json.loads((tmp_path / "grounding-test-first-6.json").read_text()) == result
    assert result["pointing"]["all"]["num_phrases"] > 0 and "image center" in capsys.readouterr().out
    result = evaluate.main([*argv, "--task", "foils"])
    assert json.loads((tmp_path / "foils-test-first-6.json").read_text()) == result
    assert result["foils"]["all"]["number"] > 0 and "edited word lowest" in capsys.readouterr().out
    for words, message in (
        (["--task", "grounding", "--protocol", "coco-5k"], "protocol has no effect: task is grounding"),
        (["--phrase_boxes", "x"], "phrase_boxes has no effect: task is retrieval"),
        (["--task", "pointing"], "task must be one of retrieval, grounding, foils, got pointing"),
        (["--task", "foils", "--phrase_boxes", str(tmp_path / "no")], "is neither a folder nor on the Hub"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path), "--dataset", "scenes", *words])
        assert message in capsys.readouterr().err
