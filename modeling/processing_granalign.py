"""GranAlign processor: an image processor and a tokenizer, with rules for input that neither would explain."""

import contextlib
import io
import os
import warnings
from typing import Any

from PIL import Image, ImageOps
from transformers import AutoImageProcessor, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import is_numpy_array, is_torch_tensor, logging

from .encoders import load_tokenizer, max_caption_length, side_config

logger = logging.get_logger(__name__)


class GranAlignProcessor(ProcessorMixin):
    r"""
    Images to `pixel_values`, captions to `input_ids` and `attention_mask`.

    Rules for images: a path is read, unless its picture has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels. Of an animation
    the first frame counts. A picture is turned as its EXIF tag says, if that can be read, and any mode becomes RGB: grey is
    repeated, transparency dropped, 16-bit grey scaled to 8 bits, CMYK converted without a colour profile. An array of bytes
    is a grey or colour image with the channels last; other arrays and tensors go to the image processor, which takes their
    values as 0 to 255: pass `do_rescale=False` for values in 0 to 1. A [`RegionFeaturesProcessor`] gets the features of
    regions in the place of images, as they are.

    Rules for captions: they are padded to the longest, and truncated, with a warning, to the `model_max_length` of the
    tokenizer, which is what the text encoder takes. A truncation saved with the tokenizer does not count.

    Args:
        image_processor: any Transformers image processor. tokenizer: any Transformers tokenizer.
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            images: a PIL image, path, array or tensor, or a list of them; for a [`RegionFeaturesProcessor`] the features of
                regions, (boxes, features) an image. text: a caption or a list of captions.
            kwargs: as in any `ProcessorMixin`, such as `return_tensors="pt"`.

        Returns:
            [`BatchFeature`] with `pixel_values` (B, channels, height, width), `input_ids` and `attention_mask` (C, Lt).

        Raises:
            ValueError: what is no image or cannot be read, an empty caption, an empty list, or neither images nor text.
        """
        if images is None and text is None:
            raise ValueError("GranAlignProcessor needs `images`, `text`, or both; got neither.")
        if text is not None:
            _check_captions(text)
            kwargs = self._with_max_length(kwargs)
        if images is not None and getattr(self.image_processor, "reads_pictures", True):
            images = _read_images(images)
            self._warn_of_scaled_pixels(images, kwargs)
        features = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is not None:
            captions = [text] if isinstance(text, str) else text
            self._warn_of_truncation(captions, features["input_ids"])
            self._warn_of_unknown_words(captions, features["input_ids"])
        return features

    def _with_max_length(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Some tokenizer files carry a truncation shorter than the encoder takes, which `ProcessorMixin` would apply."""
        has_own = "max_length" in self.tokenizer.init_kwargs and self.tokenizer.model_max_length < LARGE_INTEGER
        text_kwargs = kwargs.get("text_kwargs", {})
        if not has_own or "max_length" in kwargs or "max_length" in text_kwargs:
            return kwargs
        return kwargs | {"text_kwargs": text_kwargs | {"max_length": self.tokenizer.model_max_length}}

    def _warn_of_scaled_pixels(self, images: Any, kwargs: dict[str, Any]) -> None:
        """Values in 0..1 divided by 255 once more are black to the model."""
        given = kwargs.get("images_kwargs", {}) | kwargs
        if not given.get("do_rescale", getattr(self.image_processor, "do_rescale", False)):
            return
        for image in images if isinstance(images, list | tuple) else [images]:
            if "float" in str(getattr(image, "dtype", "")) and 0 < image.max() <= 1 and image.min() >= 0:
                logger.warning_once(
                    "Images have values in 0 to 1 and are divided by 255 again. Pass `do_rescale=False`, or values in 0 to "
                    "255."
                )

    def _warn_of_truncation(self, captions: list, input_ids: Any) -> None:
        """Only where the longest row is full can there be a caption that lost words."""
        first = input_ids if isinstance(input_ids[0], int) else input_ids[0]
        if len(first) >= self.tokenizer.model_max_length and isinstance(captions[0], str):
            self.warn_of_truncation(captions)

    def warn_of_truncation(self, captions: list[str]) -> None:
        """Says how many of the captions are longer than the text encoder takes, if any: they lose their last words."""
        longest = self.tokenizer.model_max_length
        lengths = [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
        num_cut = sum(length > longest for length in lengths)
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(captions)} captions were cut to the {longest} tokens that the text encoder takes (the "
                f"longest has {max(lengths)})."
            )

    def _warn_of_unknown_words(self, captions: list, input_ids: Any) -> None:
        rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        rows = [rows] if isinstance(rows[0], int) else rows
        unknown = self.tokenizer.unk_token_id
        special = {*self.tokenizer.all_special_ids} - {unknown}
        lost = [caption for caption, row in zip(captions, rows) if {*row} - special <= {unknown}]
        if lost:
            logger.warning(
                f"{len(lost)} of {len(captions)} captions have no word that the tokenizer knows, so that they match nothing "
                f"in particular. The first: {lost[0]!r:.80}."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> list[str]:
        """As in `ProcessorMixin`, which leaves the map to the saved code on the processor: it equals the loaded one."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        self.__dict__.pop("auto_map", None)
        return files

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, text_config: PreTrainedConfig | None = None
    ) -> "GranAlignProcessor":
        r"""
        The processor that belongs to [`GranAlignModel.from_vision_text_pretrained`].

        Args:
            text_config: config of the text encoder, which says how many tokens it takes; the tokenizer then never returns
                more. Default: the one beside the tokenizer, if there is one.

        Raises:
            ValueError: the tokenizer has no vocabulary.
        """
        tokenizer = encoder_tokenizer(text_model_name_or_path, text_config)
        return cls(AutoImageProcessor.from_pretrained(vision_model_name_or_path), tokenizer)


def encoder_tokenizer(name_or_path: str, text_config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a text encoder, which never returns more than that takes; see
    [`GranAlignProcessor.from_vision_text_pretrained`]."""
    tokenizer = load_tokenizer(name_or_path)
    if text_config is None:
        with contextlib.suppress(OSError, ValueError):  # a tokenizer without a model beside it
            text_config = side_config(name_or_path, "text_config")
    longest = None if text_config is None else max_caption_length(text_config)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def _check_captions(text: Any) -> None:
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list | tuple) or len(captions) == 0:
        raise ValueError(f"`text` must be a caption or a list of at least one caption, got {text!r}.")
    for position, caption in enumerate(captions):
        if isinstance(caption, str) and not caption.strip():
            raise ValueError(f"Caption {position} is empty: {caption!r}. Every caption needs at least one word.")
        if not isinstance(caption, str | list | tuple):
            raise ValueError(f"Caption {position} must be a string, got {type(caption).__name__}: {caption!r}.")
        if isinstance(caption, str) and any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError(
                f"Caption {position} holds half a character (a surrogate), no text: {caption!r:.80}. Decode it anew."
            )


def read_image(image: Any) -> Image.Image:
    r"""
    A picture in RGB, by the rules of [`GranAlignProcessor`].

    Args:
        image: a PIL image, the path or the content (`bytes`) of an image file, or a numpy array of bytes, grey or with the
            channels last.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return _open(image, image)
    if isinstance(image, bytes):
        return _open(io.BytesIO(image), f"of {len(image)} bytes")
    if isinstance(image, Image.Image):
        return _to_rgb(image, getattr(image, "filename", "") or image)
    if _is_picture(image):
        return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image).convert("RGB")
    raise ValueError(
        "`image` must be a PIL image, the path of an image file, or an array of bytes with the channels last, got "
        f"{_kind(image)}."
    )


def _read_images(images: Any) -> Any:
    if not isinstance(images, list | tuple):
        return _read_one(images, 0)
    if len(images) == 0:
        raise ValueError("`images` must be an image or a list of at least one image, got an empty list.")
    return [_read_one(image, position) for position, image in enumerate(images)]


def _read_one(image: Any, position: int) -> Any:
    """An RGB image; other arrays, tensors and URLs pass through to the image processor."""
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return image
    if isinstance(image, str | os.PathLike | Image.Image) or _is_picture(image):
        return read_image(image)
    if not (is_numpy_array(image) or is_torch_tensor(image)) or image.ndim not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"Image {position} must be a PIL image, a path, or an array or tensor of 3 dimensions, got {_kind(image)}."
        )
    if is_numpy_array(image) and image.ndim == 4:
        return [_read_one(one, position) for one in image]
    if 3 not in (image.shape[-3], image.shape[-1]):
        raise ValueError(f"Image {position} must have three channels, first or last, got {_kind(image)}.")
    return image.float() if is_torch_tensor(image) and image.is_floating_point() else image  # numpy knows no bfloat16


def _is_picture(image: Any) -> bool:
    """Whether an array of bytes is grey or has its channels last."""
    if not is_numpy_array(image) or image.dtype != "uint8" or 0 in image.shape:
        return False
    return image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 3, 4))


def _kind(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return type(image).__name__ + ("" if shape is None else f" of {image.dtype} with shape {tuple(shape)}")


def _open(file: Any, name: Any) -> Image.Image:
    """A path or a file -> RGB; what is too large is refused by its header, before there is memory for its pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that are broken, in pictures that are not
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _to_rgb(image, name)
    except _Unreadable:
        raise
    except Exception as error:  # the parsers of broken files raise whatever comes
        raise _Unreadable(
            f"Image `{name}` cannot be read: {error}. Pass a PIL image or the path of an image file."
        ) from error


class _Unreadable(ValueError):
    """With a message that names the image."""


def _to_rgb(image: Image.Image, name: Any) -> Image.Image:
    if image.mode in ("I", "F"):
        raise _Unreadable(f"Image `{name}` has mode {image.mode!r}, whose range is not known. Convert it to 8 bits first.")
    if image.format == "EPS":
        raise _Unreadable(f"Image `{name}` is a program (EPS), which is not run. Convert it to PNG or JPEG first.")
    try:
        image.load()
        image = _upright(image)
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        image.info.pop("transparency", None)  # else Pillow warns that it is lost
        return image.convert("RGB")
    except Exception as error:  # Pillow decodes late, and its decoders raise whatever comes
        raise _Unreadable(f"Image `{name}` cannot be read: {error}.") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF tag says; a copy as it is where the tags cannot be read."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(image)
    return image.copy()


__all__ = ["GranAlignProcessor", "read_image"]
