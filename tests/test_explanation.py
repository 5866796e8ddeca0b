"""Word maps by hand, words and their offsets, where the patches lie in the picture, heat maps and the figure."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
)

from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignOutput, GranAlignProcessor
from granalign_hf.explanation import (
    AlignedWord,
    Alignment,
    _visible_area,
    align,
    patch_box,
    word_maps,
    words_of,
)
from granalign_hf.figure import _draw_figure, colour_scale, figure, overlay
from granalign_hf.modeling.similarity import level_similarities

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a the dog skate ##board ##er ' s t - shirt red , . of don cafe two"
VOCABULARY = {piece: i for i, piece in enumerate(PIECES.split())}
CAPTION = "A  skateboarder's red T-shirt, café."


def make_tokenizer(**kwargs):
    return BertTokenizer(vocab=VOCABULARY, **kwargs)


def make_processor(**kwargs):
    image_processor = ViTImageProcessorPil(size={"height": 24, "width": 40})
    return GranAlignProcessor(image_processor, make_tokenizer(model_max_length=24, **kwargs))


def make_model(aligner="grm", seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = ViTConfig(image_size=(24, 40), patch_size=8, **sizes)
    text = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=24, **sizes)
    kwargs = {"projection_dim": 8, "special_token_ids": [0, 2, 3]} | kwargs
    return GranAlignModel(GranAlignConfig.from_vision_text_configs(vision, text, aligner=aligner, **kwargs)).eval()


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


def make_alignment(maps, image_size=(60, 40), caption="red dog", saliency=0.5):
    """An alignment with the given maps as its content words."""
    image = Image.new("RGB", image_size, (0, 0, 255))
    words = []
    for index, word_map in enumerate(maps):
        row, column = divmod(int(word_map.argmax()), word_map.shape[1])
        box = patch_box(row, column, tuple(word_map.shape), (0, 0, *image_size), image_size)
        words.append(AlignedWord(f"word{index}", 0, 5, (index,), True, saliency=saliency, map=word_map, box=box))
    return Alignment(image, caption, 0.25, words, None, (0.0, 0.0, *map(float, image_size)))


# Word maps ----------------------------------------------------------------------------------------------------------


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


# Words --------------------------------------------------------------------------------------------------------------


def test_pieces_are_merged_to_words_with_offsets():
    words = words_of(CAPTION, make_tokenizer())
    expected = [  # [CLS] is token 0
        ("A", 0, (1,), False),
        ("skateboarder's", 3, (2, 3, 4, 5, 6), True),
        ("red", 18, (7,), True),
        ("T-shirt", 22, (8, 9, 10), True),
        (",", 29, (11,), False),
        ("café", 31, (12,), True),
        (".", 35, (13,), False),
    ]
    assert [(word.text, word.start, word.tokens, word.is_content) for word in words] == expected
    assert all(CAPTION[word.start : word.end] == word.text for word in words)


def test_combining_accents_belong_to_their_word():
    assert [word.text for word in words_of("cafe\u0301 dog", make_tokenizer())] == ["cafe\u0301", "dog"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_words_of_a_byte_level_tokenizer(trim_offsets):
    inner = ByteLevelBPETokenizer(trim_offsets=trim_offsets)
    inner.train_from_iterator(["the red dog", "a red dog"] * 50, vocab_size=270, min_frequency=1)
    words = words_of("red dog, naïve 🐕", PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer))
    assert [word.text for word in words] == ["red", "dog", ",", "naïve", "🐕"]
    assert [word.is_content for word in words] == [True, True, False, True, False]
    # red| dog|,| |n|a|ï as two bytes|v|e| |🐕 as four bytes
    assert [word.tokens for word in words] == [(0,), (1,), (2,), (4, 5, 6, 7, 8, 9), (11, 12, 13, 14)]


@pytest.mark.parametrize(
    ("caption", "content"),
    [
        ("The dog doesn't bite the man's hand", ["dog", "bite", "man's", "hand"]),
        ("two dogs in front of it and IT'S red", ["dogs", "front", "red"]),
        ("a trash can to the left of them", ["trash", "can", "left"]),
        ("of the, and - don’t !", []),
    ],
)
def test_content_words(caption, content):
    assert [word.text for word in words_of(caption, make_tokenizer()) if word.is_content] == content


def test_truncated_words_are_left_out():
    words = words_of("red dog skateboarder red", make_tokenizer(model_max_length=5))
    assert [(word.text, word.tokens) for word in words] == [("red", (1,)), ("dog", (2,)), ("skateboarder", (3,))]


@pytest.mark.parametrize("caption", ["", "  ", None, ["a dog"]])
def test_bad_captions_are_refused(caption):
    with pytest.raises(ValueError, match="`caption` must be a sentence"):
        words_of(caption, make_tokenizer())
    with pytest.raises(ValueError, match="`caption` must be a sentence"):
        align(make_model(), make_processor(), Image.new("RGB", (4, 4)), caption)


def test_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="fast tokenizers have, got object"):
        words_of("a dog", object())


# Alignment ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aligner", "pooling"),
    [("grm", "mean"), ("max_mean", "mean"), ("chan", "logsumexp"), ("laps", "mean"), ("vse++", "max"), ("vse++", "mean")],
)
def test_align(aligner, pooling):
    level_weights = [0.1, 0.7, 0.2]
    model, processor = make_model(aligner, pooling=pooling, level_weights=level_weights), make_processor()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 200, 3), dtype=np.uint8))
    alignment = align(model, processor, picture, CAPTION)
    inputs = processor(images=picture, text=CAPTION, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    assert alignment.score == outputs.logits_per_image.item()
    assert alignment.image.size == (200, 60) and alignment.caption == CAPTION and alignment.area == (0, 0, 200, 60)
    assert [word.text for word in alignment.content_words] == ["skateboarder's", "red", "T-shirt", "café"]
    maps = word_maps(outputs, level_weights=level_weights)
    for word in alignment.words:
        assert torch.equal(word.map, maps[list(word.tokens)].mean(0))
        row, column = divmod(int(word.map.argmax()), 5)
        assert word.box == (40.0 * column, 20.0 * row, 40.0 * column + 40, 20.0 * row + 20)
    if aligner == "grm":
        assert torch.equal(alignment.patch_saliency, outputs.patch_saliency[0].reshape(3, 5))
        for word in alignment.words:
            assert word.saliency == pytest.approx(outputs.word_saliency[0, list(word.tokens)].mean().item())
    else:
        assert alignment.patch_saliency is None and all(word.saliency is None for word in alignment.words)


def test_align_drops_prefix_tokens_and_keeps_the_patches():
    torch.manual_seed(0)
    picture = Image.new("L", (10, 6), 77)
    plain = align(make_model(), make_processor(), picture, "a red dog")
    prefixed = align(make_model(use_prefix_tokens=True), make_processor(), picture, "a red dog")
    for word, other in zip(plain.words, prefixed.words, strict=True):
        torch.testing.assert_close(word.map, other.map)
    torch.testing.assert_close(plain.patch_saliency, prefixed.patch_saliency)


def test_padding_on_the_left_moves_the_tokens_along():
    model, processor = make_model(), make_processor()
    padded = make_processor(padding_side="left")
    padded.text_kwargs = {"padding": "max_length", "truncation": True}
    picture = Image.new("RGB", (10, 6), (9, 99, 200))
    words, moved = align(model, processor, picture, CAPTION).words, align(model, padded, picture, CAPTION).words
    shift = moved[0].tokens[0] - words[0].tokens[0]
    assert shift > 0
    assert [word.tokens for word in moved] == [tuple(t + shift for t in word.tokens) for word in words]


def test_align_reads_files_and_refuses_what_is_no_picture(tmp_path):
    model, processor = make_model(), make_processor()
    Image.new("RGBA", (10, 6), (9, 99, 200, 128)).save(tmp_path / "picture.png")
    assert align(model, processor, tmp_path / "picture.png", "a dog").image.mode == "RGB"
    assert align(model, processor, Image.new("L", (1, 1)), "a dog").words[1].box[2:] <= (1.0, 1.0)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"Image `.*text\.png` cannot be read"):
        align(model, processor, str(tmp_path / "text.png"), "a dog")
    with pytest.raises(ValueError, match=r"`image` must be a PIL image, the path of an image file, .* got ndarray"):
        align(model, processor, np.zeros((4, 4, 3)), "a dog")
    with pytest.raises(ValueError, match="`model` is in training mode"):
        align(model.train(), processor, Image.new("RGB", (4, 4)), "a dog")


def test_align_reads_a_picture_as_the_processor_does(tmp_path):
    """A JPEG that its EXIF tag turns, and 16-bit grey whose values above 255 would be white if they were cut."""
    model, processor = make_model(), make_processor()
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(noise[..., 0].astype("<u2") * 256).save(tmp_path / "grey.png")
    for name, size in (("turned.jpg", (20, 40)), ("grey.png", (40, 20))):
        inputs = processor(images=tmp_path / name, text="a red dog", return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits_per_image.item()
        with Image.open(tmp_path / name) as opened:
            for image in (tmp_path / name, opened):
                alignment = align(model, processor, image, "a red dog")
                assert alignment.score == expected and alignment.image.size == size
    with pytest.raises(ValueError, match="mode 'F', whose range is not known"):
        align(model, processor, Image.new("F", (4, 4)), "a dog")


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
    x0, y0, x1, y1 = _visible_area(image_processor, image_size, values.shape)
    assert x0 + (x1 - x0) * spot_x / values.shape[1] == pytest.approx(x, abs=0.3)
    assert y0 + (y1 - y0) * spot_y / values.shape[0] == pytest.approx(y, abs=0.3)


def test_patch_boxes_are_cut_to_the_picture():
    assert patch_box(1, 2, (2, 4), (0, 0, 40, 20), (40, 20)) == (20, 10, 30, 20)
    assert patch_box(0, 0, (2, 2), (10, 0, 30, 20), (40, 20)) == (10, 0, 20, 10)
    assert patch_box(0, 1, (1, 2), (-10, -10, 50, 30), (40, 20)) == (20, 0, 40, 20)


# Heat maps ----------------------------------------------------------------------------------------------------------


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


# The figure ---------------------------------------------------------------------------------------------------------


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
    canvas = _draw_figure(alignment, alignment.content_words)
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
        canvas = _draw_figure(alignment, alignment.words)
        canvas.draw()
        width, height = canvas.get_width_height()
        for axes in canvas.figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_panels_show_the_overlays_on_the_scale_of_the_bar():
    maps = [torch.tensor([[0.1, 0.2]]), torch.tensor([[0.8, 0.4]])]
    alignment = dataclasses.replace(make_alignment(maps), area=(15.0, 0.0, 45.0, 40.0))
    panels = _draw_figure(alignment, alignment.words).figure.axes
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
    canvas = _draw_figure(alignment, alignment.words[1:2])
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
