"""The pointing game on hand-made maps and boxes, and its baselines on real ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from granalign_hf.grounding import (
    patch_centers,
    pointing_game,
    points_in_boxes,
    summarize_hits,
)


def test_patch_centers_are_x_y_in_pixels_of_a_rectangular_image():
    centers = patch_centers((2, 4), (100, 80))  # 50 pixels high, 20 wide
    assert centers.shape == (2, 4, 2)
    assert centers[0, 0].tolist() == [10, 25]
    assert centers[0, 3].tolist() == [70, 25]
    assert centers[1, 0].tolist() == [10, 75]
    assert patch_centers((3, 2), (10, 5))[2, 1] == pytest.approx([3.75, 25 / 3])


def test_boxes_begin_inside_and_end_outside():
    box = [[10, 20, 30, 40]]
    assert points_in_boxes([[10, 20], [29.9, 39.9], [30, 20], [10, 40], [9.9, 20]], box).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert points_in_boxes([[35, 25]], [*box, [35, 25, 36, 26]]).tolist() == [True]


def test_pointing_game_by_hand():
    """A grid of 2 x 4 patches on an image 80 wide and 100 high, centres x 10, 30, 50, 70 and y 25, 75."""
    top_right = np.array([[0.0, 0.1, 0.2, 0.9], [0.3, 0.1, 0.0, -1.0]])
    tied = np.array([[0.5, 0.1, 0.2, 0.5], [0.5, 0.1, 0.0, 0.5]])
    boxes = [
        [[60, 0, 80, 50]],  # around the highest patch; 1 of 8 centres
        [[0, 50, 80, 100]],  # the lower half: 4 of 8 centres, and it begins at the image centre (40, 50)
        [[0, 0, 20, 100], [60, 0, 80, 30]],  # three of the four tied corners
        [[39, 49, 41, 51]],  # the image centre alone, no patch centre
    ]
    result = pointing_game([top_right, top_right, tied, torch.tensor(tied)], boxes, (100, 80))
    assert result.hit.tolist() == [1.0, 0.0, 0.75, 0.0]
    assert result.random_patch.tolist() == [1 / 8, 4 / 8, 3 / 8, 0.0]
    assert result.image_center.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_grids_and_image_sizes_may_differ_between_phrases():
    maps = [np.array([[0.0, 1.0]]), np.array([[0.0], [0.0], [1.0]])]
    boxes = [[[50, 0, 100, 20]], [[0, 60, 30, 90]]]
    assert pointing_game(maps, boxes, [(20, 100), (90, 30)]).hit.tolist() == [1.0, 1.0]
    assert pointing_game(maps, boxes, [(100, 20), (30, 90)]).hit.tolist() == [0.0, 0.0]  # sides exchanged


def test_a_constant_map_scores_as_a_random_patch():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, size=(20, 2))
    boxes = [[[x, y, x + 60, y + 90]] for x, y in corners]
    result = pointing_game([np.full((7, 5), 0.3)] * 20, boxes, (160, 120))
    assert result.hit.tolist() == result.random_patch.tolist()


def test_mirrored_map_and_boxes_give_the_same_hits():
    rng = np.random.default_rng(1)
    maps, corners = rng.random((30, 6, 9)), rng.integers(0, 60, size=(30, 2))
    boxes = [[[x, y, x + 31, y + 21]] for x, y in corners]
    mirrored = [[[91 - x1, y0, 91 - x0, y1] for x0, y0, x1, y1 in own] for own in boxes]
    hits = pointing_game(maps, boxes, (81, 91)).hit
    assert 0 < hits.mean() < 1
    assert pointing_game(maps[:, :, ::-1], mirrored, (81, 91)).hit.tolist() == hits.tolist()


@pytest.mark.parametrize(
    ("maps", "boxes", "sizes", "message"),
    [
        ([np.ones((2, 2))], [], (4, 4), "got 1 and 0"),
        ([np.ones(4)], [[[0, 0, 1, 1]]], (4, 4), r"`maps\[0\]` must be 2-D"),
        ([np.ones((0, 4))], [[[0, 0, 1, 1]]], (4, 4), r"`maps\[0\]` must have at least one patch"),
        ([np.full((2, 2), np.nan)], [[[0, 0, 1, 1]]], (4, 4), r"`maps\[0\]` has 4 NaN"),
        ([np.ones((2, 2))], [[]], (4, 4), r"`boxes\[0\]` must have shape \(num_boxes, 4\).*leave out phrases"),
        ([np.ones((2, 2))], [[0, 0, 1, 1]], (4, 4), r"got \(4,\)"),
        ([np.ones((2, 2))], [[[3, 0, 1, 1]]], (4, 4), "x0 < x1 and y0 < y1, got"),
        ([np.ones((2, 2))], [[[0, 0, np.nan, 1]]], (4, 4), "x0 < x1 and y0 < y1, got"),
        ([np.ones((2, 2))], [[[0, 0, 1, 1]]], (4, 0), r"all positive; got shape \(2,\) with minimum 0"),
        ([np.ones((2, 2))], [[[0, 0, 1, 1]]], [(4, 4), (4, 4)], r"or \(1, 2\)"),
    ],
)
def test_bad_maps_and_boxes_are_refused(maps, boxes, sizes, message):
    with pytest.raises(ValueError, match=message):
        pointing_game(maps, boxes, sizes)


def test_summary_by_group():
    hits = [1, 0, 1, 0.5, 1]
    summary = summarize_hits(hits, ["b", "b", "a", "c", "a"], ["dog", "cat", ["dog", "cat", "dog"], "dog", []])
    assert list(summary) == ["all", "cat", "dog"]
    assert {name: (group.accuracy, group.num_phrases) for name, group in summary.items()} == {
        "all": (70.0, 5),
        "cat": (50.0, 2),
        "dog": (pytest.approx(250 / 3), 3),
    }
    assert all(group.low <= group.accuracy <= group.high for group in summary.values())


def test_summary_interval_is_over_images_not_phrases():
    image_hits = np.arange(100) % 2
    once = summarize_hits(image_hits, np.arange(100))["all"]
    ten_phrases = summarize_hits(np.repeat(image_hits, 10), np.repeat(np.arange(100), 10))["all"]
    assert ten_phrases[:3] == pytest.approx(once[:3])
    assert (once.low, once.high) == pytest.approx((50 - 9.8, 50 + 9.8), abs=1.5)


def test_summary_refuses_other_lengths_no_phrases_and_a_group_called_all():
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        summarize_hits([1, 0], [0])
    with pytest.raises(ValueError, match="at least one phrase"):
        summarize_hits(np.zeros(0), [])
    with pytest.raises(ValueError, match="rename that group"):
        summarize_hits([1], [0], ["all"])


def test_baselines_on_the_phrase_boxes_of_flickr8k():
    """The chance levels known for the test split, in percent (random patch on the 14 x 14 grid, image centre)."""
    path = Path(__file__).parents[2] / "shared" / "data" / "flickr8k_phrase_boxes" / "test.parquet"
    if not path.exists():
        pytest.skip("needs the Flickr8k phrase boxes in ../shared/data")
    table = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    phrases = [(row["filename"], phrase) for row in table for phrase in row["phrases"]]
    boxes = [phrase["boxes"] for _, phrase in phrases]
    result = pointing_game([np.zeros((14, 14))] * len(phrases), boxes, (224, 224))
    images, first_types = [name for name, _ in phrases], [phrase["types"][0] for _, phrase in phrases]
    assert len(phrases) == 13061
    assert summarize_hits(result.hit, images)["all"].accuracy == pytest.approx(31.3, abs=0.05)
    center = summarize_hits(result.image_center, images, first_types)
    known = {"all": 54.8, "people": 65.1, "animals": 70.9, "scene": 62.2, "vehicles": 53.1, "bodyparts": 27.3}
    assert {name: center[name].accuracy for name in known} == pytest.approx(known, abs=0.05)
