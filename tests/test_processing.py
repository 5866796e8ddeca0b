"""The processor: images of any kind, captions of any length, and one clear error for what is neither."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEXT, VISION, tiny_inputs, tiny_model, tiny_processor, tiny_tokenizer
from transformers import RobertaTokenizer, ViTImageProcessorPil

from granalign_hf import GranAlignProcessor


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("granalign_hf.modeling")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def picture(size=(16, 16), seed=0):
    """RGB noise of the size to which the processor resizes, so that only its scaling to [-1, 1] is seen."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pixels(images):
    return tiny_processor()(images=images, return_tensors="pt")["pixel_values"]


def expected(image):
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None] / 127.5 - 1


def is_close(one, other):
    return torch.allclose(one, other, atol=1e-6)


# --- images ---


def test_pixels_of_an_rgb_image():
    assert is_close(pixels(picture()), expected(picture()))


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "CMYK", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode):
    image = picture().convert(mode)
    assert pixels(image).shape == (1, 3, 16, 16)
    assert is_close(pixels(image), expected(image))


def test_transparency_is_dropped():
    image = picture()
    image.putalpha(0)
    assert is_close(pixels(image), expected(picture()))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_to_8_bits(dtype, tmp_path):
    """Pillow itself would cut at 255, so that nearly everything is white."""
    grey = np.random.default_rng(0).integers(0, 256, (16, 16))
    if dtype == "<u2":
        Image.fromarray((grey * 256 + 99).astype(dtype)).save(tmp_path / "grey.png")
        images = str(tmp_path / "grey.png")
    else:
        images = Image.frombytes("I;16B", (16, 16), (grey * 256 + 99).astype(dtype).tobytes())
    assert is_close(pixels(images), expected(Image.fromarray(grey.astype(np.uint8))))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}', whose range is not known. Convert it"):
        pixels(picture().convert("L").convert(mode))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 3), (3, 1), (2, 300)], ids=str)
def test_tiny_images(size):
    """The length of a side is not mistaken for the number of channels."""
    image = picture(size)
    resized = image.resize((16, 16), Image.Resampling.BILINEAR)
    for images in (image, np.asarray(image)):
        assert is_close(pixels(images), expected(resized))


def test_a_one_pixel_image_is_scored():
    inputs = tiny_processor()(images=Image.new("RGB", (1, 1), "red"), text="a red dog", return_tensors="pt")
    assert torch.isfinite(tiny_model()(**inputs).logits_per_image).all()


def test_paths_arrays_and_tensors_are_images_too(tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    channels_first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    images = [tmp_path / "image.png", str(tmp_path / "image.png"), array, channels_first, channels_first.numpy()]
    for one in images:
        assert is_close(pixels(one), expected(image))
    assert is_close(pixels(images), expected(image).expand(5, -1, -1, -1))
    assert is_close(pixels(np.stack([array, array[::-1]]))[0], expected(image)[0])
    assert is_close(pixels(channels_first[None]), expected(image))


def test_grey_arrays_become_rgb():
    grey = np.asarray(picture().convert("L"))
    for array in (grey, grey[..., None]):
        assert is_close(pixels(array), expected(Image.fromarray(grey)))


def test_a_path_is_turned_as_its_exif_tag_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    picture().save(tmp_path / "image.png", exif=exif)
    assert is_close(pixels(tmp_path / "image.png"), expected(picture().transpose(Image.Transpose.ROTATE_270)))


def broken_files(folder):
    picture((200, 200)).save(folder / "whole.jpg")
    picture((200, 200)).save(folder / "whole.png")
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "overwritten.png").write_bytes(png[:100] + b"0" * 500 + png[600:])
    (folder / "folder.jpg").mkdir()
    return [folder / f"{name}" for name in ("text.jpg", "empty.jpg", "cut.jpg", "cut.png", "overwritten.png", "folder.jpg")]


def test_unreadable_files_are_refused_by_name(tmp_path):
    for path in [*broken_files(tmp_path), tmp_path / "missing.jpg"]:
        with pytest.raises(ValueError, match=f"Image `.*{path.name}` cannot be read"):
            pixels([picture(), path])


def test_an_opened_image_that_cannot_be_decoded_is_refused_by_name(tmp_path):
    broken_files(tmp_path)
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ValueError, match=r"cut\.jpg` cannot be read"):
        pixels(image)


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture((200, 200)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png` cannot be read.*exceeds limit"):
        pixels(tmp_path / "huge.png")


def test_what_is_no_image_is_refused():
    with pytest.raises((ValueError, TypeError)):
        pixels(3)
    with pytest.raises((ValueError, TypeError)):
        pixels([None])


# --- captions ---


def test_captions_are_padded_to_the_longest():
    features = tiny_processor()(text=["a dog", "a red circle and a blue square"], return_tensors="pt")
    assert features["input_ids"].tolist() == [[2, 5, 10, 3, 0, 0, 0, 0, 0], [2, 5, 7, 13, 15, 5, 8, 12, 3]]
    assert features["attention_mask"].sum(1).tolist() == [4, 9]
    assert "pixel_values" not in features


def test_one_caption_is_taken_alone_or_as_a_list():
    processor = tiny_processor()
    assert processor(text="a dog")["input_ids"] == [2, 5, 10, 3]
    assert processor(text=["a dog"])["input_ids"] == [[2, 5, 10, 3]]
    assert processor(text="a dog", return_tensors="pt")["input_ids"].tolist() == [[2, 5, 10, 3]]


def test_images_and_captions_together():
    features = tiny_processor()(images=[picture(), picture()], text=["a dog"] * 3, return_tensors="pt")
    assert features["pixel_values"].shape == (2, 3, 16, 16)
    assert features["input_ids"].shape == (3, 4)
    assert tiny_model()(**features).logits_per_image.shape == (2, 3)


def test_too_long_captions_are_cut_with_a_warning(log):
    processor = tiny_processor(model_max_length=6)
    features = processor(text=["a dog", "a red circle and a blue square", "a red dog on a cat"], return_tensors="pt")
    assert features["input_ids"].tolist() == [[2, 5, 10, 3, 0, 0], [2, 5, 7, 13, 15, 3], [2, 5, 7, 10, 17, 3]]
    assert "2 of 3 captions were cut to the 6 tokens that the text encoder takes (the longest has 9)" in log.text
    assert processor(text="a red circle and a blue square")["input_ids"] == [2, 5, 7, 13, 15, 3]
    assert "1 of 1 captions were cut" in log.text


def test_captions_that_just_fit_are_not_announced(log):
    processor = tiny_processor(model_max_length=6)
    processor(text=["a red blue dog"])
    processor(text=["a dog"], padding="max_length")
    assert log.text == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Caption 0 is empty: ''"),
        ("  \n", "Caption 0 is empty"),
        (["a dog", ""], "Caption 1 is empty: ''. Every caption needs at least one word."),
        (["a dog", None], "Caption 1 must be a string, got NoneType: None"),
        (["a dog", 3], "Caption 1 must be a string, got int: 3"),
        (3, "`text` must be a caption or a list of at least one caption, got 3"),
        (b"a dog", "`text` must be a caption"),
        ([], r"`text` must be a caption or a list of at least one caption, got \[\]"),
    ],
    ids=str,
)
def test_bad_captions_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(text=text)


def test_neither_images_nor_captions():
    with pytest.raises(ValueError, match="needs `images`, `text`, or both"):
        tiny_processor()()


# --- from encoders, saved and loaded ---


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of a ViT with its image processor, and of a BERT and a RoBERTa with their tokenizers."""
    folder = tmp_path_factory.mktemp("encoders")
    VISION["vit"]().config.save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    TEXT["bert"]().save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    TEXT["roberta"]().save_pretrained(folder / "roberta")
    words = {word: n for n, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "Ġa"])}
    RobertaTokenizer(vocab=words, merges=[]).save_pretrained(folder / "roberta")
    TEXT["bert"]().save_pretrained(folder / "no vocabulary")
    tiny_tokenizer(model_max_length=9).save_pretrained(folder / "tokenizer alone")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_captions_are_cut_to_what_the_text_encoder_takes(encoders, text, log):
    """RoBERTa's 42 positions start behind its padding id 1, so that 40 are left."""
    processor = GranAlignProcessor.from_vision_text_pretrained(encoders["vit"], encoders[text])
    assert processor.tokenizer.model_max_length == 40
    config = TEXT[text]()
    features = processor(text=["a " * 99, "a"], return_tensors="pt")
    assert features["input_ids"].shape == (2, 40)
    assert "1 of 2 captions were cut to the 40 tokens" in log.text
    model = tiny_model(text=config)
    assert torch.isfinite(model(features["input_ids"], tiny_inputs()["pixel_values"]).logits_per_image).all()
    config.max_position_embeddings = 22
    processor = GranAlignProcessor.from_vision_text_pretrained(encoders["vit"], encoders[text], config)
    assert processor.tokenizer.model_max_length == {"bert": 22, "roberta": 20}[text]


def test_a_tokenizer_without_an_encoder_keeps_its_own_length(encoders):
    processor = GranAlignProcessor.from_vision_text_pretrained(encoders["vit"], encoders["tokenizer alone"])
    assert processor.tokenizer.model_max_length == 9


def test_a_text_encoder_without_vocabulary_is_refused(encoders):
    """Transformers would make a tokenizer of five special tokens, to which every word is unknown."""
    with pytest.raises(ValueError, match="no vocabulary` has no vocabulary"):
        GranAlignProcessor.from_vision_text_pretrained(encoders["vit"], encoders["no vocabulary"])


def test_a_saved_processor_is_the_same_when_loaded(tmp_path):
    processor = tiny_processor(model_max_length=6)
    processor.save_pretrained(tmp_path)
    loaded = GranAlignProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    inputs = {"images": picture(), "text": "a red circle and a blue square"}
    one, other = processor(**inputs, return_tensors="pt"), loaded(**inputs, return_tensors="pt")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one.keys())  # noqa: SIM118
