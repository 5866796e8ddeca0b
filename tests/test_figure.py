"""What the figures show, and that all of it lies on the sheet."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from skateboards import make_alignment, make_model, make_processor

from granalign_hf.explanation import compare, explain
from granalign_hf.figure import (
    _draw_comparison,
    _draw_explanation,
    _draw_figure,
    comparison_figure,
    explanation_figure,
    figure,
)
from granalign_hf.modeling.alignment import align
from granalign_hf.overlays import colour_scale, overlay, region_overlay, saliency_overlay


@pytest.mark.parametrize(
    ("num_words", "image_size"), [(1, (60, 40)), (4, (30, 90)), (6, (400, 20)), (11, (40, 40)), (2, (1, 1))]
)
def test_figure_has_a_panel_for_the_picture_and_each_word(num_words, image_size, tmp_path):
    maps = list(torch.rand(num_words, 3, 5, generator=torch.Generator().manual_seed(1)))
    alignment = make_alignment(maps, image_size, caption="costs $5 and $6, " * num_words)
    picture = figure(alignment, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as written:
        assert written.format == "PNG"
        assert np.array_equal(np.asarray(written), np.asarray(picture))
    canvas = _draw_figure(alignment, alignment.content_words).canvas
    titles = [[text.get_text() for text in axes.texts] for axes in canvas.figure.axes[:-1]]
    assert titles == [["picture", "score 0.25"]] + [[f"word{i}", "saliency 0.50"] for i in range(num_words)]
    # Only the picture itself is blue: its area in pixels is that of one panel, in the picture's proportions.
    blue = (np.asarray(picture) == (0, 0, 255)).all(-1)
    rows, columns = np.nonzero(blue)
    side = 2.1 * 160 / max(image_size)
    assert columns.max() - columns.min() + 1 == pytest.approx(image_size[0] * side, abs=4)
    assert rows.max() - rows.min() + 1 == pytest.approx(image_size[1] * side, abs=4)


def test_all_of_a_figure_lies_on_the_sheet():
    for image_size in [(60, 40), (30, 90), (400, 20)]:
        alignment = make_alignment([torch.rand(2, 2)] * 2, image_size)
        canvas = _draw_figure(alignment, alignment.words).canvas
        canvas.draw()
        width, height = canvas.get_width_height()
        for axes in canvas.figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_panels_show_the_overlays_on_the_scale_of_the_bar():
    maps = [torch.tensor([[0.1, 0.2]]), torch.tensor([[0.8, 0.4]])]
    alignment = dataclasses.replace(make_alignment(maps), area=(15.0, 0.0, 45.0, 40.0))
    panels = _draw_figure(alignment, alignment.words).canvas.figure.axes
    assert panels[-1].get_ylim() == pytest.approx((0.1, 0.8))
    large = alignment.image.resize((336, 224))  # 2.1 inches of 160 pixels: 5.6 times 60 x 40
    area = (84, 0, 252, 224)
    for axes, word in zip(panels[1:-1], alignment.words, strict=True):
        expected = overlay(large, word.map, scale=(float(maps[0].min()), float(maps[1].max())), area=area)
        assert np.array_equal(axes.images[0].get_array(), np.asarray(expected))
        frame = axes.patches[0].get_bbox()
        assert np.array(frame.extents) + 0.5 == pytest.approx(np.array(word.box) * 5.6)


def test_figure_of_chosen_words_and_of_an_aligner_without_saliency():
    alignment = make_alignment([torch.rand(2, 2) for _ in range(3)], saliency=None)
    canvas = _draw_figure(alignment, alignment.words[1:2]).canvas
    assert [text.get_text() for text in canvas.figure.axes[1].texts] == ["word1", ""]
    assert figure(alignment, words=alignment.words[1:2]).width < figure(alignment).width


def test_caption_without_content_words_has_no_figure_of_its_own():
    alignment = align(make_model(), make_processor(), Image.new("RGB", (8, 8)), "of the two")
    assert len(alignment.words) == 3
    with pytest.raises(ValueError, match="'of the two' has no content word"):
        figure(alignment)
    assert figure(alignment, words=alignment.words).width > 0


def test_figure_leaves_pyplot_alone_and_names_the_extra_without_matplotlib(monkeypatch):
    alignment = make_alignment([torch.rand(2, 2)])
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    figure(alignment)
    assert "matplotlib.pyplot" not in sys.modules
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"granalign-hf\[train\]"):
        figure(alignment)


# A score taken apart ------------------------------------------------------------------------------------------------


def noise(size=(90, 60), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def is_on_the_sheet(sheet):
    sheet.canvas.draw()
    width, height = sheet.canvas.get_width_height()
    boxes = [axes.get_tightbbox() for axes in sheet.canvas.figure.axes]
    return all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1 for box in boxes)


def titles(sheet):
    return [axes.texts[0].get_text() for axes in sheet.canvas.figure.axes if axes.images and axes.texts]


GRM_PANELS = ["picture", "all shares", "saliency", "regions"]


@pytest.mark.parametrize(
    ("fields", "overview"),
    [
        ({"aligner": "grm", "use_prefix_tokens": True}, GRM_PANELS),
        ({"aligner": "grm", "num_regions": 30, "use_region_uncertainty": False}, GRM_PANELS),
        ({"aligner": "vse++", "pooling": "max"}, ["picture", "all shares"]),
    ],
)
@pytest.mark.parametrize("image_size", [(90, 60), (40, 120)])
def test_an_explanation_shows_the_parts_of_the_score(fields, overview, image_size, tmp_path):
    explanation = explain(make_model(**fields), make_processor(), noise(image_size), "a skateboarder's red dog , the two")
    words = explanation.content_words
    sheet = _draw_explanation(explanation, words)
    shown = [*overview, "skateboarder's", "red", "dog"]
    drawn = [title.rstrip("…") for title in titles(sheet)]  # a long one is cut
    assert [whole[: len(title)] for whole, title in zip(shown, drawn, strict=True)] == drawn
    assert is_on_the_sheet(sheet)
    panels = dict(zip(shown, (axes for axes in sheet.canvas.figure.axes if axes.images and axes.texts), strict=True))
    large = explanation.image.resize(panels["picture"].images[0].get_array().shape[1::-1], Image.Resampling.BICUBIC)
    maps = [explanation.share_maps[explanation.tokens.index(word)] for word in words]
    expected = {word.text: overlay(large, own, scale=colour_scale(maps)) for word, own in zip(words, maps, strict=True)}
    expected["picture"], expected["all shares"] = large, overlay(large, explanation.share_map)
    if explanation.regions:
        expected["saliency"] = saliency_overlay(large, explanation.patch_saliency)
        expected["regions"] = region_overlay(large, explanation.region_owners)
    for title, picture in expected.items():
        assert np.array_equal(panels[title].images[0].get_array(), np.asarray(picture)), title
    chart = sheet.canvas.figure.axes[-1]
    assert [label.get_text() for label in chart.get_xticklabels()] == [word.text for word in explanation.tokens]
    sums = np.zeros(len(explanation.tokens))
    for bars in chart.containers:
        sums += [bar.get_height() for bar in bars]
    assert sums == pytest.approx([share for _, share in explanation.word_shares], abs=1e-9)
    picture = explanation_figure(explanation, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(picture))


@pytest.mark.parametrize("num_words", [3, 12])
def test_a_comparison_shows_both_and_the_words_that_differ(num_words, tmp_path):
    model, processor = make_model(), make_processor()
    captions = ["the red dog of a skateboarder", "two"]
    comparison = compare(*(explain(model, processor, noise(), caption) for caption in captions))
    sheet = _draw_comparison(comparison, num_words)
    assert titles(sheet) == ["A", "B"] and is_on_the_sheet(sheet)
    assert [text.get_text() for text in sheet.canvas.figure.texts] == captions
    chart = sheet.canvas.figure.axes[-1]
    labels = [label.get_text() for label in chart.get_yticklabels()]
    assert labels[:num_words] == [text for text, *_ in comparison.words[:num_words]]
    assert len(labels) == min(num_words + 1, len(comparison.words))
    widths = [bar.get_width() for bar in chart.containers[0]]
    assert sum(widths) == pytest.approx(comparison.score, abs=1e-6)
    large = noise().resize(sheet.canvas.figure.axes[0].images[0].get_array().shape[1::-1], Image.Resampling.BICUBIC)
    scale = colour_scale([comparison.first.share_map, comparison.second.share_map])
    for axes, one in zip(sheet.canvas.figure.axes, (comparison.first, comparison.second)):
        assert np.array_equal(axes.images[0].get_array(), np.asarray(overlay(large, one.share_map, scale=scale)))
    drawn = comparison_figure(comparison, tmp_path / "figure.png", num_words=num_words)
    with Image.open(tmp_path / "figure.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(drawn))


def test_two_pictures_are_compared_in_their_own_proportions():
    model, processor = make_model(), make_processor()
    first, second = (explain(model, processor, noise(size), "a red dog") for size in ((90, 60), (30, 90)))
    sheet = _draw_comparison(compare(first, second), 4)
    assert is_on_the_sheet(sheet)
    shapes = [axes.images[0].get_array().shape[:2] for axes in sheet.canvas.figure.axes[:2]]
    assert [height / width for height, width in shapes] == pytest.approx([60 / 90, 90 / 30], rel=0.02)
