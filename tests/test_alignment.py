"""A picture and a caption, word by word, with any aligner and any file."""

import numpy as np
import pytest
import torch
from PIL import Image
from skateboards import CAPTION, make_model, make_processor

from granalign_hf.modeling.alignment import align
from granalign_hf.modeling.maps import word_maps


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


def test_a_phrase_has_the_mean_map_of_its_content_words():
    model, processor = make_model(), make_processor()
    alignment = align(model, processor, Image.new("RGB", (10, 6), (9, 99, 200)), "the red dog and a skateboarder of two")
    maps = {word.text: word.map for word in alignment.words}
    text = alignment.caption
    start = text.index("the red dog")
    torch.testing.assert_close(alignment.phrase_map(start, start + 11), (maps["red"] + maps["dog"]) / 2)
    torch.testing.assert_close(
        alignment.phrase_map(text.index("ed d"), text.index("ed d") + 4), (maps["red"] + maps["dog"]) / 2
    )
    torch.testing.assert_close(alignment.phrase_map(text.index("of two"), len(text)), (maps["of"] + maps["two"]) / 2)
    content = [word.map for word in alignment.content_words]
    torch.testing.assert_close(alignment.caption_map, sum(content) / len(content))
    for span in ((3, 4), (5, 5), (99, 120)):
        with pytest.raises(ValueError, match="`start` and `end` must span"):
            alignment.phrase_map(*span)
