"""GranAlign processor: an image processor and a tokenizer, with rules for input that neither would explain."""

import contextlib
import os
from typing import Any

from PIL import Image, ImageOps
from transformers import AutoImageProcessor, BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_numpy_array, logging

from .encoders import load_tokenizer, max_caption_length, side_config

logger = logging.get_logger(__name__)


class GranAlignProcessor(ProcessorMixin):
    r"""
    Images to `pixel_values`, captions to `input_ids` and `attention_mask`.

    Rules for images: a path is read, and turned as its EXIF tag says. Any mode becomes RGB: grey is repeated, transparency
    dropped, 16-bit grey scaled to 8 bits. An array of bytes is a grey or colour image with the channels last; other arrays
    and tensors go to the image processor as they are.

    Rules for captions: they are padded to the longest, and truncated, with a warning, to what the text encoder takes.

    Args:
        image_processor: any Transformers image processor. tokenizer: any Transformers tokenizer.
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            images: a PIL image, array, tensor or path, or a list of them. text: a caption or a list of captions.
            kwargs: as in any `ProcessorMixin`, such as `return_tensors="pt"`.

        Returns:
            [`BatchFeature`] with `pixel_values` (B, channels, height, width), `input_ids` and `attention_mask` (C, Lt).

        Raises:
            ValueError: an image that cannot be read, an empty caption, or neither images nor text.
        """
        if images is None and text is None:
            raise ValueError("GranAlignProcessor needs `images`, `text`, or both; got neither.")
        if text is not None:
            _check_captions(text)
        if images is not None:
            images = _read_images(images)
        features = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is not None:
            self._warn_of_truncation([text] if isinstance(text, str) else text, features["input_ids"])
        return features

    def _warn_of_truncation(self, captions: list, input_ids: Any) -> None:
        """Counts captions that lost words: only where the longest row is full can there be one."""
        first = input_ids if isinstance(input_ids[0], int) else input_ids[0]
        longest = self.tokenizer.model_max_length
        if len(first) < longest or not isinstance(captions[0], str):
            return
        lengths = [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
        num_cut = sum(length > longest for length in lengths)
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(captions)} captions were cut to the {longest} tokens that the text encoder takes (the "
                f"longest has {max(lengths)})."
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
        tokenizer = load_tokenizer(text_model_name_or_path)
        if text_config is None:
            with contextlib.suppress(OSError, ValueError):  # a tokenizer without a model beside it
                text_config = side_config(text_model_name_or_path, "text_config")
        longest = None if text_config is None else max_caption_length(text_config)
        if longest is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        return cls(AutoImageProcessor.from_pretrained(vision_model_name_or_path), tokenizer)


def _check_captions(text: Any) -> None:
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list | tuple) or len(captions) == 0:
        raise ValueError(f"`text` must be a caption or a list of at least one caption, got {text!r}.")
    for position, caption in enumerate(captions):
        if isinstance(caption, str) and not caption.strip():
            raise ValueError(f"Caption {position} is empty: {caption!r}. Every caption needs at least one word.")
        if not isinstance(caption, str | list | tuple):
            raise ValueError(f"Caption {position} must be a string, got {type(caption).__name__}: {caption!r}.")


def _read_images(images: Any) -> Any:
    """Paths, PIL images and arrays of bytes become RGB images; other arrays, tensors and URLs pass through."""
    if isinstance(images, list | tuple):
        return [_read_images(image) for image in images]
    if isinstance(images, str | os.PathLike) and not str(images).startswith(("http://", "https://", "data:")):
        return _open(images)
    if isinstance(images, Image.Image):
        return _to_rgb(images, getattr(images, "filename", "") or images)
    if is_numpy_array(images) and images.dtype == "uint8" and (images.ndim == 2 or images.shape[-1] in (1, 3, 4)):
        return _array_to_rgb(images)
    return images


def _open(path: str | os.PathLike) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Image `{path}` cannot be read: {error}. Pass a PIL image or the path of an image file."
        ) from error


def _to_rgb(image: Image.Image, name: Any) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"Image `{name}` has mode {image.mode!r}, whose range is not known. Convert it to 8 bits first.")
    try:
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes late, and a broken PNG is a SyntaxError
        raise ValueError(f"Image `{name}` cannot be read: {error}.") from error


def _array_to_rgb(array: Any) -> Any:
    if array.ndim == 4:
        return [_array_to_rgb(image) for image in array]
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array).convert("RGB")


__all__ = ["GranAlignProcessor"]
