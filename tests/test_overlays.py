"""Heat maps over a picture, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image
from skateboards import make_alignment

from granalign_hf.overlays import colour_scale, overlay, region_colour, region_overlay, saliency_overlay, write_overlays


def hottest_pixels(heat_map):
    """(x, y) of the pixels furthest from white."""
    distance = (255 - np.asarray(heat_map).astype(int)).sum(-1)
    return {(int(x), int(y)) for y, x in zip(*np.nonzero(distance == distance.max()), strict=True)}


@pytest.mark.parametrize("hottest", [(0, 0), (1, 2), (3, 1), (3, 4)])
def test_hottest_place_of_the_overlay_is_the_best_patch(hottest):
    word_map = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) * 0.5
    word_map[hottest] = 0.9
    heat_map = overlay(Image.new("RGB", (105, 60), "white"), word_map)
    assert heat_map.size == (105, 60) and heat_map.mode == "RGB"
    row, column = hottest
    pixels = hottest_pixels(heat_map)
    assert all(21 * column <= x < 21 * column + 21 and 15 * row <= y < 15 * row + 15 for x, y in pixels)
    assert (21 * column + 10, 15 * row + 7) in pixels


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (37, 211)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_overlay_has_the_size_of_the_picture(size, mode):
    assert overlay(Image.new(mode, size), torch.rand(14, 14)).size == size


def test_overlays_share_a_scale():
    picture = Image.new("RGB", (30, 30), "white")
    maps = [torch.tensor([[0.1, 0.2]]), torch.tensor([[0.2, 0.8]]), torch.tensor([[-0.5, 0.3]])]
    assert colour_scale(maps) == pytest.approx((0.0, 0.8))
    assert colour_scale(maps[:2]) == pytest.approx((0.1, 0.8))
    assert colour_scale([torch.tensor([[-0.5, -0.25]])]) == (-0.5, -0.25)
    first, second, third = (overlay(picture, word_map, scale=colour_scale(maps)) for word_map in maps)
    assert first.getpixel((29, 0)) == second.getpixel((0, 0))  # both 0.2
    assert second.getpixel((29, 0)) == (128, 10, 62)  # the top of the scale
    assert third.getpixel((0, 0)) == (255, 255, 255)  # below 0


def test_what_the_model_did_not_see_stays_cold():
    heat_map = overlay(Image.new("RGB", (40, 20), "white"), torch.ones(2, 2), scale=(0, 1), area=(10, 0, 30, 20))
    is_cold = (np.asarray(heat_map) == 255).all(-1)
    assert is_cold[:, :10].all() and is_cold[:, 30:].all() and not is_cold[:, 10:30].any()


def test_a_flat_map_is_cold_and_shows_the_picture():
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((3, 0), (0, 0, 0))
    heat_map = np.asarray(overlay(picture, torch.full((2, 2), 0.3)))
    assert heat_map[0, 3, 0] < 255 and (heat_map[0, 3] == heat_map[0, 3, 0]).all()
    assert (heat_map[1] == 255).all()


@pytest.mark.parametrize(
    ("word_map", "kwargs", "message"),
    [
        (torch.zeros(4), {}, "`word_map` must be finite"),
        (torch.tensor([[0.0, torch.nan]]), {}, "`word_map` must be finite"),
        (torch.zeros(0, 3), {}, "`word_map` must be finite"),
        (torch.zeros(2, 2), {"scale": (1, 0)}, "must be ascending"),
        (torch.zeros(2, 2), {"area": (5, 0, 5, 9)}, "must be ascending"),
    ],
)
def test_bad_maps_and_scales_are_refused(word_map, kwargs, message):
    with pytest.raises(ValueError, match=message):
        overlay(Image.new("RGB", (8, 8)), word_map, **kwargs)


def test_files_of_overlays_share_a_scale(tmp_path):
    maps = [torch.tensor([[0.1, 0.2]]), torch.tensor([[0.2, 0.8]])]
    alignment = make_alignment(maps)
    files = write_overlays(alignment, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["01-word0.png", "02-word1.png"]
    for file, word_map in zip(files, maps, strict=True):
        expected = overlay(alignment.image, word_map, scale=colour_scale(maps), area=alignment.area)
        with Image.open(file) as written:
            assert written.size == alignment.image.size and np.array_equal(np.asarray(written), np.asarray(expected))
    assert [file.name for file in write_overlays(alignment, tmp_path, words=alignment.words[1:])] == ["01-word1.png"]


def test_regions_have_their_colours_patch_by_patch():
    owners = torch.tensor([[0, 3, 0], [12, 0, 3]])
    heat_map = np.asarray(region_overlay(Image.new("RGB", (12, 6), "white"), owners, area=(3, 0, 12, 6)))
    assert (heat_map[:, :3] == 255).all()
    for row in range(2):
        for column in range(3):
            patch = heat_map[3 * row : 3 * row + 3, 3 + 3 * column : 6 + 3 * column]
            assert (patch == region_colour(int(owners[row, column]))).all()
    assert region_colour(2) == region_colour(12) and len({region_colour(number) for number in range(10)}) == 10


def test_what_is_not_salient_fades():
    picture = Image.new("RGB", (4, 1), (55, 155, 255))
    faded = saliency_overlay(picture, torch.tensor([[0.0, 1.0]]), area=(0, 0, 2, 1))
    assert [faded.getpixel((x, 0)) for x in range(4)] == [(255, 255, 255), (55, 155, 255), (255, 255, 255), (255, 255, 255)]
