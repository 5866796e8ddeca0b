"""GranAlign processor: an image processor and a tokenizer, with rules for input that neither would explain."""

import os
from typing import Any

from PIL import Image, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .encoders import max_caption_length

logger = logging.get_logger(__name__)


class GranAlignProcessor(ProcessorMixin):
    r"""
    Images to `pixel_values`, captions to `input_ids` and `attention_mask`.

    Rules: images of any mode become RGB (transparency is dropped); a path is read; captions are padded to the longest and
    truncated, with a warning, to what the text encoder takes.

    Args:
        image_processor: any Transformers image processor. tokenizer: any Transformers tokenizer.
    """

    text_kwargs = {"padding": True, "truncation": True}  # noqa: RUF012

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
            self._warn_of_truncation(text, features["input_ids"])
        return features

    def _warn_of_truncation(self, text: Any, input_ids: Any) -> None:
        """Counts captions that lost words: only those that fill the longest row can have."""
        captions = [text] if isinstance(text, str) else text
        if len(input_ids[0]) < self.tokenizer.model_max_length or not isinstance(captions[0], str):
            return
        lengths = [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
        num_cut = sum(length > self.tokenizer.model_max_length for length in lengths)
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(captions)} captions were cut to the {self.tokenizer.model_max_length} tokens that the "
                f"text encoder takes (the longest has {max(lengths)})."
            )

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, text_config=None
    ) -> "GranAlignProcessor":
        r"""
        The processor that belongs to [`GranAlignModel.from_vision_text_pretrained`].

        Args:
            text_config: config of the text encoder; the tokenizer then never returns more tokens than it takes.
        """
        tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path)
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
    """Paths are opened and PIL images become RGB; arrays, tensors and URLs pass through."""
    if isinstance(images, list | tuple):
        return [_read_images(image) for image in images]
    if isinstance(images, str | os.PathLike) and not str(images).startswith(("http://", "https://", "data:")):
        images = _open(images)
    if isinstance(images, Image.Image):
        try:
            return images.convert("RGB")
        except OSError as error:
            raise ValueError(f"Image `{getattr(images, 'filename', images)}` cannot be read: {error}.") from error
    return images


def _open(path: str | os.PathLike) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"Image `{path}` cannot be read: {error}. Pass a PIL image or the path of an image file."
        ) from error


__all__ = ["GranAlignProcessor"]
