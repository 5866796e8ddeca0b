"""The processor: images of any kind, captions of any length, and one clear error for what is neither."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEXT, VISION, tiny_inputs, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoTokenizer, RobertaTokenizer, ViTImageProcessorPil
from transformers.utils import logging as logging_of_transformers

from granalign_hf import GranAlignProcessor
from granalign_hf.explanation import words_of
from granalign_hf.modeling.processing_granalign import read_image


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


def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    picture().save(tmp_path / "image.png", exif=exif)
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    with Image.open(tmp_path / "image.png") as opened:
        for image in (tmp_path / "image.png", opened):
            assert is_close(pixels(image), expected(upright))
            assert np.array_equal(read_image(image), upright)


def test_read_image_takes_what_it_can_show(tmp_path):
    image = picture((5, 3))
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    for one in (image, tmp_path / "image.png", str(tmp_path / "image.png"), array):
        assert read_image(one).mode == "RGB" and np.array_equal(read_image(one), array)
    assert np.array_equal(read_image(array[..., :1]), read_image(array[..., 0]))
    for wrong, kind in ((3, "int"), (None, "NoneType"), (array / 255, r"ndarray of float64 with shape \(3, 5, 3\)")):
        with pytest.raises(ValueError, match=f"`image` must be a PIL image, the path of an image file, .* got {kind}"):
            read_image(wrong)


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


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "`images` must be an image or a list of at least one image, got an empty list"),
        (3, "Image 0 must be a PIL image, a path, or an array or tensor of 3 dimensions, got int"),
        ([picture(), None], "Image 1 must be a PIL image, .* got NoneType"),
        ([picture(), b"bytes"], "Image 1 must be a PIL image, .* got bytes"),
        ([[picture()]], "Image 0 must be a PIL image, .* got list"),
        (np.zeros((4, 4)), r"Image 0 .* 3 dimensions, got ndarray of float64 with shape \(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"Image 0 .* got ndarray of uint8 with shape \(0, 4, 3\)"),
        ([torch.zeros(4, 4)], r"Image 0 .* got Tensor of torch.float32 with shape \(4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused_by_its_position(images, message):
    with pytest.raises(ValueError, match=message):
        pixels(images)


@pytest.mark.parametrize("kind", ["array", "tensor", "batch"])
def test_values_that_are_scaled_already_are_announced(kind, log):
    """As Transformers has it, `do_rescale` says what the values are: they are never guessed."""
    image = torch.from_numpy(np.asarray(picture()) / 255)
    image = {"array": image.numpy(), "tensor": image.permute(2, 0, 1), "batch": image.numpy()[None]}[kind]
    logging_of_transformers.warning_once.cache_clear()
    black = tiny_processor()(images=image, return_tensors="pt")["pixel_values"]
    assert black.max() < -0.99 and "Pass `do_rescale=False`" in log.text
    log.clear()
    logging_of_transformers.warning_once.cache_clear()
    for given in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        values = tiny_processor()(images=image, return_tensors="pt", **given)["pixel_values"]
        assert is_close(values.float(), expected(picture()))
    pixels([np.asarray(picture()), np.asarray(picture()).astype("float32"), np.zeros((16, 16, 3))])
    assert log.text == ""


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


@pytest.fixture
def tokenizer_with_own_truncation(tmp_path):
    """As that of MiniLM: its file cuts at 8 tokens, its encoder takes 12."""
    tokenizer = tiny_tokenizer(model_max_length=12)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_truncation_saved_with_the_tokenizer_does_not_count(tokenizer_with_own_truncation, log, tmp_path):
    processor = GranAlignProcessor(ViTImageProcessorPil(), tokenizer_with_own_truncation)
    processor.save_pretrained(tmp_path / "processor")
    for one in (processor, GranAlignProcessor.from_pretrained(tmp_path / "processor")):
        caption = "a red dog and the blue cat"
        assert len(one(text=caption)["input_ids"]) == 9
        assert len(words_of(caption, one.tokenizer)) == 7
        assert log.text == ""
        assert len(one(text=caption + " on a circle of dog")["input_ids"]) == 12
        assert "1 of 1 captions were cut to the 12 tokens that the text encoder takes (the longest has 14)" in log.text
        log.clear()
        for given in ({"max_length": 5}, {"text_kwargs": {"max_length": 5}}):
            assert len(one(text=caption, **given)["input_ids"]) == 5


def test_captions_of_unknown_words_are_announced(log):
    processor = tiny_processor()
    processor(text=["a zebra", "dog"], return_tensors="pt")
    assert log.text == ""
    for given in ({}, {"return_tensors": "pt"}):
        processor(text=["a dog", "purple zebra", "zebra"], **given)
        message = "2 of 3 captions have no word that the tokenizer knows, so that they match nothing in particular"
        assert f"{message}. The first: 'purple zebra'." in log.text
        log.clear()
    processor(text="zebra")
    assert "1 of 1 captions have no word" in log.text


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
