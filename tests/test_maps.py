"""Word maps by hand, where the patches lie in the picture, and maps at the size of the picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from skateboards import make_model, make_processor
from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil, DeiTImageProcessorPil, ViTImageProcessorPil

from granalign_hf import GranAlignOutput
from granalign_hf.modeling.maps import location_density, patch_box, picture_map, visible_area, word_maps
from granalign_hf.modeling.similarity import level_similarities


def make_outputs(rows=2, columns=3, num_prefix=0, num_padding=0, with_saliency=False, seed=0):
    """Two images and two captions of four tokens with random unit-length tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = num_prefix + rows * columns + num_padding
    patch_embeds = torch.randn(2, num_patches, 5, generator=generator)
    word_embeds = torch.randn(2, 4, 5, generator=generator)
    saliency = {
        "patch_saliency": torch.rand(2, num_patches, generator=generator),
        "word_saliency": torch.rand(2, 4, generator=generator),
    }
    return GranAlignOutput(
        patch_embeds=torch.nn.functional.normalize(patch_embeds, dim=-1),
        word_embeds=torch.nn.functional.normalize(word_embeds, dim=-1),
        patch_mask=(torch.arange(num_patches) < num_patches - num_padding).expand(2, -1),
        word_mask=torch.ones(2, 4, dtype=torch.bool),
        spatial_shapes=torch.tensor([[rows, columns]] * 2),
        **(saliency if with_saliency else {}),
    )


@pytest.mark.parametrize(("num_prefix", "num_padding"), [(0, 0), (2, 0), (0, 3), (1, 2)])
def test_maps_are_products_of_word_and_patch(num_prefix, num_padding):
    outputs = make_outputs(num_prefix=num_prefix, num_padding=num_padding)
    maps = word_maps(outputs, image_index=1, caption_index=0)
    assert maps.shape == (4, 2, 3) and maps.dtype == torch.float32
    for word in range(4):
        for row in range(2):
            for column in range(3):
                patch = outputs.patch_embeds[1, num_prefix + 3 * row + column].tolist()
                product = sum(t * v for t, v in zip(outputs.word_embeds[0, word].tolist(), patch, strict=True))
                assert maps[word, row, column].item() == pytest.approx(product, abs=1e-6)


@pytest.mark.parametrize(("level_weights", "a", "b"), [(None, 0.4, 0.4), ((0.2, 0.6, 0), 0.2, 0.6), ((0, 0, 1), 1, 0)])
def test_saliencies_weigh_the_key_level(level_weights, a, b):
    outputs = make_outputs(num_prefix=1, with_saliency=True)
    maps = word_maps(outputs, 0, 1, level_weights=level_weights)
    for word in range(4):
        for patch in range(6):
            product = float(outputs.word_embeds[1, word] @ outputs.patch_embeds[0, 1 + patch])
            both = float(outputs.word_saliency[1, word] * outputs.patch_saliency[0, 1 + patch])
            expected = (a + b * both) / (a + b) * product
            assert maps[word, patch // 3, patch % 3].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("level_weights", "level"), [((1, 0, 0), 0), ((0, 1, 0), 1)])
def test_maps_of_one_level_give_its_score(level_weights, level):
    outputs = make_outputs(with_saliency=True)
    names = ("patch_embeds", "word_embeds", "word_mask", "patch_mask", "patch_saliency", "word_saliency")
    levels = level_similarities(**{name: outputs[name] for name in names})
    for image in range(2):
        for caption in range(2):
            maps = word_maps(outputs, image, caption, level_weights=level_weights)
            score = maps.amax((1, 2)).mean() + maps.amax(0).mean()
            torch.testing.assert_close(score, levels[level, image, caption])


def test_rows_run_down_and_columns_to_the_right():
    outputs = make_outputs(rows=2, columns=3)
    outputs.patch_embeds = torch.zeros(2, 6, 5)
    outputs.patch_embeds[0, :, 0] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    outputs.word_embeds = torch.eye(5)[:1].expand(2, 4, 5)
    expected = torch.tensor([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]])
    assert torch.equal(word_maps(outputs)[0], expected)
    grid = outputs.patch_embeds.unflatten(1, (2, 3))
    for axis, flipped_axis in ((1, 0), (2, 1)):
        outputs.patch_embeds = grid.flip(axis).flatten(1, 2)
        assert torch.equal(word_maps(outputs)[0], expected.flip(flipped_axis))


def test_maps_of_features_equal_those_of_the_output():
    model, processor = make_model(), make_processor()
    inputs = processor(images=Image.new("RGB", (9, 7), (200, 10, 90)), text="a dog", return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
        image = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(word_maps(outputs), word_maps((image, text)))
    assert word_maps(outputs).shape == (4, 3, 5)  # [CLS] a dog [SEP], 24 x 40 pixels in patches of 8


@pytest.mark.parametrize("name", ["patch_embeds", "word_embeds", "spatial_shapes"])
def test_missing_field_is_named(name):
    outputs = make_outputs()
    setattr(outputs, name, None)
    with pytest.raises(ValueError, match=f"`{name}`.*GranAlignOutput"):
        word_maps(outputs)


def test_wrong_outputs_index_and_grid_are_refused():
    outputs = make_outputs()
    with pytest.raises(ValueError, match="`patch_embeds`, got tuple"):
        word_maps(outputs.to_tuple())
    with pytest.raises(ValueError, match="`caption_index` must lie below 2"):
        word_maps(outputs, 0, 2)
    with pytest.raises(ValueError, match="`image_index` must lie below 2"):
        word_maps(outputs, 5)
    outputs.spatial_shapes = torch.tensor([[4, 4]] * 2)
    with pytest.raises(ValueError, match="`spatial_shapes` stands for 16 patches, but `patch_embeds` has 6"):
        word_maps(outputs)


# Where the patches lie in the picture -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image_processor",
    [
        ViTImageProcessorPil(size={"height": 64, "width": 96}),
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        DeiTImageProcessorPil(size={"height": 80, "width": 80}, crop_size={"height": 64, "width": 48}),
        DeiTImageProcessorPil(do_resize=False, crop_size={"height": 100, "width": 120}),
        DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 65, "width": 71}),
        ConvNextImageProcessorPil(size={"shortest_edge": 96}),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ],
    ids=lambda p: f"{type(p).__name__}-{p.size.shortest_edge or p.size.height}",
)
@pytest.mark.parametrize("image_size", [(300, 200), (131, 240)])
def test_visible_area_agrees_with_the_processor(image_processor, image_size):
    """A bright spot that the processor moved lies where the area says."""
    width, height = image_size
    x, y = width // 2 + 17, height // 2 - 21
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y - 6 : y + 6, x - 6 : x + 6] = 255
    values = image_processor(Image.fromarray(pixels), return_tensors="pt", do_normalize=False)["pixel_values"][0, 0]
    mass = values.clamp(min=0)
    rows, columns = torch.arange(values.shape[0]) + 0.5, torch.arange(values.shape[1]) + 0.5
    spot_x, spot_y = float((mass.sum(0) * columns).sum() / mass.sum()), float((mass.sum(1) * rows).sum() / mass.sum())
    x0, y0, x1, y1 = visible_area(image_processor, image_size, values.shape)
    assert x0 + (x1 - x0) * spot_x / values.shape[1] == pytest.approx(x, abs=0.3)
    assert y0 + (y1 - y0) * spot_y / values.shape[0] == pytest.approx(y, abs=0.3)


def test_patch_boxes_are_cut_to_the_picture():
    assert patch_box(1, 2, (2, 4), (0, 0, 40, 20), (40, 20)) == (20, 10, 30, 20)
    assert patch_box(0, 0, (2, 2), (10, 0, 30, 20), (40, 20)) == (10, 0, 20, 10)
    assert patch_box(0, 1, (1, 2), (-10, -10, 50, 30), (40, 20)) == (20, 0, 40, 20)


# Maps of the picture's size -----------------------------------------------------------------------------------------


def test_a_map_of_the_picture_has_its_height_and_width():
    """Two rows and three columns over 6 x 4 pixels: by hand, in steps of half a patch."""
    word_map = torch.tensor([[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]])
    columns = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0])  # the outer half of an outer patch has its value
    rows = torch.tensor([0.0, 1.0, 3.0, 4.0])
    expected = rows[:, None] + columns
    torch.testing.assert_close(picture_map(word_map, (6, 4)), expected)
    for axis in (0, 1):
        torch.testing.assert_close(picture_map(word_map.flip(axis), (6, 4)), expected.flip(axis))
    by_patch = word_map.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(picture_map(word_map, (6, 4), is_smooth=False), by_patch)


@pytest.mark.parametrize("area", [(2.0, 0.0, 8.0, 4.0), (-2.0, -1.0, 4.0, 3.0)])
def test_what_the_map_does_not_cover_has_no_value(area):
    word_map = torch.tensor([[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]])
    whole = picture_map(word_map, (6, 4))
    found = picture_map(word_map, (10, 4), area)
    left, top = (int(v) for v in area[:2])
    for y in range(4):
        for x in range(10):
            inside = 0 <= x - left < 6 and 0 <= y - top < 4
            value = found[y, x].item()
            assert value == pytest.approx(whole[y - top, x - left].item(), abs=1e-6) if inside else np.isnan(value)


def test_a_density_by_hand():
    """Against loops over all pairs of patches; the picture is wide, and the blur a share of either side."""
    generator = torch.Generator().manual_seed(0)
    words, caption = torch.randn(2, 3, 8, generator=generator).double()
    own = (words - caption / 2).numpy()
    share = np.exp((own - own.mean()) / own.std() / 2)
    share /= share.sum()
    expected = np.zeros((3, 8))
    for row, column, y, x in np.ndindex(3, 8, 3, 8):
        weights = [
            np.exp(-((there - here) ** 2) / (2 * (0.14 * size) ** 2))
            / sum(np.exp(-(step**2) / (2 * (0.14 * size) ** 2)) for step in range(-50, 51))
            for here, there, size in ((row, y, 3), (column, x, 8))
        ]
        expected[row, column] += weights[0] * weights[1] * share[y, x]
    torch.testing.assert_close(location_density(words, caption), torch.from_numpy(expected).float(), atol=1e-6, rtol=1e-4)


def test_neighbours_that_agree_are_denser_than_a_lone_patch():
    words, caption = torch.zeros(7, 7), torch.zeros(7, 7)
    words[1, 5], words[4:6, 1:3] = 1.0, 0.9
    assert divmod(int(words.argmax()), 7) == (1, 5)
    assert 4 <= int(location_density(words, caption).argmax()) // 7 <= 5
    torch.testing.assert_close(location_density(3 * words + 1, caption), location_density(words, caption))


def test_what_says_nothing_is_densest_in_the_middle():
    """Also the word that has half of what the whole caption has everywhere."""
    caption = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    for words in (caption / 2, caption / 2 + 0.3):
        assert int(location_density(words, caption).argmax()) == 3 * 7 + 3
