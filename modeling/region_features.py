"""Features of detected regions in the place of an image: 36 boxes of 2048 numbers from a detector, as in SCAN and CHAN."""

import os
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, to_numpy


@strict
class RegionFeaturesConfig(PreTrainedConfig):
    r"""
    Configuration of a [`RegionFeaturesModel`].

    Args:
        hidden_size (`int`, defaults to 2048): numbers a box.
        num_boxes (`int`, defaults to 36): boxes an image.

    Raises:
        StrictDataclassError: a value below 1; the message names the field.
    """

    model_type = "region_features"

    hidden_size: int = 2048
    num_boxes: int = 36

    def validate_sizes(self):
        """Part of the `@strict` validation."""
        for name in ("hidden_size", "num_boxes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class RegionFeaturesModel(PreTrainedModel):
    """The vision encoder that is no more to be run: passes the features on as a feature map, one row a box."""

    config: RegionFeaturesConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # it has no attention: any will do

    def __init__(self, config: RegionFeaturesConfig):
        super().__init__(config)
        # It has no weights to tell its dtype by, and the layers behind it need theirs.
        self.register_buffer("empty", torch.empty(0), persistent=False)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        return self.empty.dtype

    @property
    def device(self) -> torch.device:
        return self.empty.device

    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Args:
            pixel_values: (B, hidden_size, num_boxes, 1), as [`RegionFeaturesProcessor`] returns it.

        Raises:
            ValueError: another shape.
        """
        expected = (self.config.hidden_size, self.config.num_boxes, 1)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must hold region features of shape (B, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}. Pass what the processor of this model returns."
            )
        return BaseModelOutput(last_hidden_state=pixel_values)


class RegionFeaturesProcessor(BaseImageProcessor):
    r"""
    Features of the regions of images to `pixel_values`, the way an image processor does it for pictures.

    Args:
        hidden_size, num_boxes: as in [`RegionFeaturesConfig`].
    """

    model_input_names = ["pixel_values"]
    reads_pictures = False  # for GranAlignProcessor

    def __init__(self, hidden_size: int = 2048, num_boxes: int = 36, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_boxes = hidden_size, num_boxes

    def fetch_images(self, images: Any) -> Any:
        """Nothing to fetch: features have no address."""
        return images

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        r"""
        Args:
            images: features (num_boxes, hidden_size) of one image, or of several (B, num_boxes, hidden_size), as an array or
                tensor; or a list with an array, tensor or nested list for each image.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            [`BatchFeature`] with `pixel_values` (B, hidden_size, num_boxes, 1) in float32.

        Raises:
            ValueError: a picture, another shape, or a value that is not finite; the message names the image.
        """
        if not isinstance(images, list | tuple) and getattr(images, "ndim", 2) == 2:
            images = [images]
        if len(images) == 0:
            raise ValueError("`images` must hold the region features of at least one image, got none.")
        features = torch.stack([self._read_one(image, position) for position, image in enumerate(images)])
        return BatchFeature({"pixel_values": features.transpose(1, 2)[..., None]}, tensor_type=return_tensors)

    def _read_one(self, image: Any, position: int) -> Tensor:
        try:
            features = read_features(image)
        except ValueError as error:
            raise ValueError(f"Image {position}: {error}") from error
        if features.shape != (self.num_boxes, self.hidden_size):
            raise ValueError(
                f"Image {position}: the model takes region features of shape ({self.num_boxes}, {self.hidden_size}), got "
                f"{tuple(features.shape)}. Set `num_boxes` and `hidden_size` in `vision_config`."
            )
        return features


def read_features(features: Any) -> Tensor:
    r"""
    The features of an image's regions: (boxes, features) float32.

    Args:
        features: an array, tensor or nested list.

    Raises:
        ValueError: a picture, no numbers, another number of dimensions, boxes of different length, or a value that is not
            finite.
    """
    expected = "region features must be numbers in the shape (boxes, features)"
    if isinstance(features, Image.Image | str | os.PathLike):
        raise ValueError(f"{expected}, got a picture ({type(features).__name__}).")
    features = features.float() if isinstance(features, Tensor) else features  # numpy knows no bfloat16
    try:
        array = to_numpy(features).astype("float32")
    except (TypeError, ValueError, AttributeError) as error:  # no numbers at all, or lists of different length
        raise ValueError(f"{expected}, all boxes of one length, got {type(features).__name__}.") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{expected}, got {array.shape}.")
    tensor = torch.from_numpy(array)
    if not tensor.isfinite().all():
        box = int(tensor.isfinite().all(1).logical_not().nonzero()[0])
        raise ValueError(f"region features must be finite, but box {box} has a value that is not.")
    return tensor


# Here and not in the package, so that a checkpoint that brings this file finds them where the package is not installed.
AutoConfig.register(RegionFeaturesConfig.model_type, RegionFeaturesConfig, exist_ok=True)
AutoModel.register(RegionFeaturesConfig, RegionFeaturesModel, exist_ok=True)
AutoImageProcessor.register(RegionFeaturesConfig, image_processor_classes={"pil": RegionFeaturesProcessor}, exist_ok=True)

__all__ = ["RegionFeaturesConfig", "RegionFeaturesModel", "RegionFeaturesProcessor", "read_features"]
