"""GranAlign model: encoders -> projected tokens -> aligner -> scores and loss. Wiring only."""

import math
import os

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .aligners import ALIGNERS, LAPS
from .checks import check_captions, check_encoder, check_fields, check_tensor, positive_pairs
from .configuration_granalign import GranAlignConfig
from .contributions import PairShares, one_row, pair_parts
from .encoders import (
    accepts_argument,
    build_encoder,
    check_image_size,
    feature_size,
    load_encoder,
    mask_of_words,
    patch_tokens,
    reduce_to_tokens,
    tokenizer_special_ids,
)
from .losses import contrastive_hinge
from .outputs import GranAlignImageOutput, GranAlignOutput, GranAlignTextOutput, encoder_output
from .projection import make_projection, unit_length
from .regions import RegionMixture

logger = logging.get_logger(__name__)


class GranAlignPreTrainedModel(PreTrainedModel):
    config: GranAlignConfig
    base_model_prefix = "granalign"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SaliencyAdapter", "RegionMixture"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Own layers only: the encoders initialise themselves."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RegionMixture):
            if module.region_prompts is not None:
                init.normal_(module.region_prompts)
            if module.log_var is not None:
                # Variances start at 1/d, so that the noise of a region is as long as a token, not sqrt(d) times longer.
                init.zeros_(module.log_var.weight)
                init.constant_(module.log_var.bias, -math.log(module.log_var.out_features))
        elif isinstance(module, LAPS):
            init.ones_(module.logit_scale)
        else:
            super()._init_weights(module)


class GranAlignModel(GranAlignPreTrainedModel):
    r"""
    Scores images against captions patch by patch and word by word.

    Args:
        config ([`GranAlignConfig`], *optional*): needed unless both encoders are given.
        vision_model, text_model (`PreTrainedModel`, *optional*): encoders to use instead of random ones. They lose their
            pooling layers, and their configs become those of this model.

    Raises:
        ValueError: neither a config nor both encoders, or an encoder that takes the input of the other side.

    Example:

    ```python
    >>> import torch
    >>> from PIL import Image
    >>> from transformers import AutoModel, AutoProcessor
    >>> import granalign_hf

    >>> model = AutoModel.from_pretrained("org/granalign")
    >>> processor = AutoProcessor.from_pretrained("org/granalign")
    >>> inputs = processor(images=Image.open("dog.jpg"), text=["a dog", "two cats"], return_tensors="pt")
    >>> with torch.no_grad():
    ...     outputs = model(**inputs)
    >>> outputs.logits_per_image.shape
    torch.Size([1, 2])
    ```
    """

    def __init__(
        self,
        config: GranAlignConfig | None = None,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        if config is None:
            if vision_model is None or text_model is None:
                raise ValueError("GranAlignModel needs a `config`, or both a `vision_model` and a `text_model`.")
            config = GranAlignConfig.from_vision_text_configs(vision_model.config, text_model.config)
        super().__init__(config)
        self.vision_model = build_encoder(config.vision_config) if vision_model is None else vision_model
        self.text_model = build_encoder(config.text_config) if text_model is None else text_model
        check_encoder(self.vision_model, "vision", "pixel_values")
        check_encoder(self.text_model, "text", "input_ids")
        # One config object a side: what is set on the model's config reaches every layer of the encoder.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        reduce_to_tokens(self.vision_model)
        reduce_to_tokens(self.text_model)
        width, kind = config.projection_dim, config.projection_type
        self.patch_projection = make_projection(feature_size(config.vision_config), width, kind)
        self.word_projection = make_projection(feature_size(config.text_config), width, kind)
        self.aligner = ALIGNERS[config.aligner](config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        vision_model_output: BaseModelOutput | None = None,
        image_size: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranAlignImageOutput:
        r"""
        Tokens of images, ready to be scored.

        Args:
            pixel_values: (B, channels, height, width), cast to the dtype of the encoder.
            interpolate_pos_encoding: passed to encoders that have this argument, for sizes they were not trained on.
            vision_model_output: the encoder's output, where it is at hand (frozen encoders).
            image_size: (height, width) in pixels of the images behind `vision_model_output`, where `pixel_values` does not
                tell. Default: the `image_size` of `vision_config`.

        Raises:
            ValueError: neither input is given, `pixel_values` is no tensor of four dimensions, the images have another size
                than the encoder's positions, or its tokens do not fill the grid that its config promises.
        """
        if vision_model_output is None:
            if pixel_values is None:
                raise ValueError("Images are missing: pass `pixel_values` as returned by GranAlignProcessor.")
            check_tensor("pixel_values", pixel_values, "(B, channels, height, width)")
            if pixel_values.is_floating_point():  # processors return float32, whatever the model's dtype
                pixel_values = pixel_values.to(self.vision_model.dtype)
            if interpolate_pos_encoding and accepts_argument(self.vision_model, "interpolate_pos_encoding"):
                kwargs["interpolate_pos_encoding"] = True
            elif not interpolate_pos_encoding:
                check_image_size(self.config.vision_config, pixel_values)
            vision_model_output = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        if pixel_values is not None:
            image_size = (pixel_values.shape[2], pixel_values.shape[3])
        hidden, spatial_shape = patch_tokens(vision_model_output.last_hidden_state, self.config, image_size)
        patch_embeds = unit_length(self.patch_projection(hidden))
        patch_mask = torch.ones(patch_embeds.shape[:2], dtype=torch.bool, device=patch_embeds.device)
        if self.training and self.config.patch_dropout > 0:
            patch_mask = torch.rand(patch_mask.shape, device=patch_mask.device) >= self.config.patch_dropout
        return GranAlignImageOutput(
            last_hidden_state=vision_model_output.last_hidden_state,
            pooler_output=patch_embeds.mean(1),
            hidden_states=getattr(vision_model_output, "hidden_states", None),
            attentions=getattr(vision_model_output, "attentions", None),
            patch_embeds=patch_embeds,
            patch_mask=patch_mask,
            spatial_shapes=torch.tensor([spatial_shape], device=patch_embeds.device).expand(patch_embeds.shape[0], 2),
            **self.aligner.describe_image(patch_embeds, patch_mask),
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        text_model_output: BaseModelOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranAlignTextOutput:
        r"""
        Tokens of captions, ready to be scored.

        Args:
            input_ids: (C, Lt). Needed with `text_model_output` too: it tells special tokens from words.
            attention_mask: (C, Lt), 1 = token, 0 = padding. Default: all tokens.
            text_model_output: the encoder's output, where it is at hand (frozen encoders).

        Raises:
            ValueError: `input_ids` is missing, no tensor of two dimensions, or longer than the encoder takes, or
                `attention_mask` is no tensor of the same shape.
        """
        if input_ids is None:
            raise ValueError("Captions are missing: pass `input_ids` as returned by GranAlignProcessor.")
        check_captions(self.config.text_config, input_ids, attention_mask)
        if text_model_output is None:
            optional = {"position_ids": position_ids, "token_type_ids": token_type_ids}
            kwargs.update({name: value for name, value in optional.items() if value is not None})
            text_model_output = self.text_model(
                input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
            )
        word_embeds = unit_length(self.word_projection(text_model_output.last_hidden_state))
        word_mask = mask_of_words(self.config, input_ids, attention_mask)
        num_words = word_mask.sum(1, keepdim=True).clamp(min=1)
        return GranAlignTextOutput(
            last_hidden_state=text_model_output.last_hidden_state,
            pooler_output=(word_embeds * word_mask[..., None]).sum(1) / num_words,
            hidden_states=getattr(text_model_output, "hidden_states", None),
            attentions=getattr(text_model_output, "attentions", None),
            word_embeds=word_embeds,
            word_mask=word_mask,
            **self.aligner.describe_text(word_embeds, word_mask),
        )

    def similarities(self, image: GranAlignImageOutput, text: GranAlignTextOutput) -> Tensor:
        """Scores of every image with every caption at each level of the aligner, (levels, B, C), float32."""
        return self.aligner.similarities(image, text)

    def score(self, image: GranAlignImageOutput, text: GranAlignTextOutput) -> Tensor:
        """The score that ranks, (B, C): the levels of [`~GranAlignModel.similarities`] by the aligner's weights."""
        return self._weigh_levels(self.similarities(image, text))

    def _weigh_levels(self, levels: Tensor) -> Tensor:
        # No matrix product: autocast would round the scores to half precision.
        return sum(weight * scores for weight, scores in zip(self.aligner.level_weights, levels, strict=True))

    @torch.no_grad()
    def explain(
        self,
        image: GranAlignImageOutput | GranAlignOutput,
        text: GranAlignTextOutput | GranAlignOutput,
        image_index: int = 0,
        caption_index: int = 0,
    ) -> PairShares:
        """The score of one image and one caption as shares of words and patches that add up to it.

        Args: features of images and of captions, or an output of the model as both, and the rows of the two.

        Raises:
            ValueError: the model is in training mode, these are no features, or an index is out of range.
        """
        if self.training:
            raise ValueError("The model is in training mode, where scores are drawn at random. Call `model.eval()` first.")
        pair = one_row(image, "patch", image_index), one_row(text, "word", caption_index)
        return PairShares(self.score(*pair).item(), pair_parts(self.aligner, *pair))

    def compute_loss(
        self, image: GranAlignImageOutput, levels: Tensor, positives: Tensor, use_hard_negatives: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms before weighting (GRM eq. 8-13).

        Args:
            image: features of the images. levels: (levels, B, C). positives: (B, C) bool.
            use_hard_negatives: `False` averages over all negatives, for a warm-up.
        """
        weighted = self.contrastive_terms(levels, positives, use_hard_negatives) | self.aligner.regularisers(image)
        loss = torch.stack([weight * value for weight, value in weighted.values()]).sum()
        return loss, {name: value for name, (_, value) in weighted.items()}

    def contrastive_terms(
        self, levels: Tensor, positives: Tensor, use_hard_negatives: bool = True
    ) -> dict[str, tuple[float, Tensor]]:
        """Of each level its name -> (weight, hinge loss). Arguments as in [`~GranAlignModel.compute_loss`]."""
        return {
            name: (weight, contrastive_hinge(scores, positives, self.config.margin, use_hard_negatives))
            for name, weight, scores in zip(self.aligner.level_names, self.aligner.level_weights, levels, strict=True)
        }

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_loss: bool | None = None,
        image_ids: Tensor | None = None,
        caption_image_ids: Tensor | None = None,
        use_hard_negatives: bool = True,
        interpolate_pos_encoding: bool = False,
        vision_model_output: BaseModelOutput | None = None,
        text_model_output: BaseModelOutput | None = None,
        image_size: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranAlignOutput:
        r"""
        Args:
            input_ids: (C, Lt). pixel_values: (B, channels, height, width).
            attention_mask, position_ids, token_type_ids: (C, Lt), *optional*.
            return_loss: whether to compute the training loss.
            image_ids: (B,) integers that name the images. Default: 0, 1, 2, ...
            caption_image_ids: (C,) the image of each caption; captions of one image are never negatives of each other.
                Default: `image_ids`, for one caption an image.
            use_hard_negatives: `False` averages the loss over all negatives, for a warm-up.
            interpolate_pos_encoding, vision_model_output, image_size: see [`~GranAlignModel.get_image_features`].
            text_model_output: see [`~GranAlignModel.get_text_features`].

        Raises:
            ValueError: an input is missing or does not fit; the message names it.
        """
        image = self.get_image_features(
            pixel_values, interpolate_pos_encoding, vision_model_output, image_size, return_dict=True, **kwargs
        )
        text = self.get_text_features(
            input_ids, attention_mask, position_ids, token_type_ids, text_model_output, return_dict=True, **kwargs
        )
        levels = self.similarities(image, text)
        logits_per_image = self.config.logit_scale * self._weigh_levels(levels)
        loss = loss_terms = None
        if return_loss:
            positives = positive_pairs(logits_per_image, image_ids, caption_image_ids)
            loss, loss_terms = self.compute_loss(image, levels, positives, use_hard_negatives)
        own = GranAlignOutput.__dataclass_fields__
        tokens = {name: value for side in (image, text) for name, value in side.items() if name in own}
        return GranAlignOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            loss_terms=loss_terms,
            vision_model_output=encoder_output(image),
            text_model_output=encoder_output(text),
            **tokens,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As in `PreTrainedModel`; where the code is saved too, pipelines find it without this package."""
        if not self.is_remote_code():
            return super().save_pretrained(save_directory, *args, **kwargs)
        from .pipelines import custom_pipelines  # here, since a model needs none; their file travels by this line

        code = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        auto_map = dict.fromkeys(("AutoModel", "AutoModelForZeroShotImageClassification"), code)
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        self.config.custom_pipelines = custom_pipelines()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.config.custom_pipelines  # a pipeline of this model would ask for trust in code that is here already

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, **kwargs
    ) -> "GranAlignModel":
        r"""
        A model on two pretrained encoders, with new projections and a new aligner.

        Args:
            vision_model_name_or_path: a Hub name or folder. Of a model with a vision side (CLIP, SigLIP) that is taken.
            text_model_name_or_path: likewise.
            kwargs: `vision_*` and `text_*` go to the `from_pretrained` of the encoder, `dtype` (default float32) and
                `attn_implementation` to both, all others are fields of [`GranAlignConfig`]. The ids of special tokens
                come from the tokenizer beside the text encoder, where there is one.

        Raises:
            ValueError: there are no weights of such an encoder at a path, an encoder takes the input of the other side, or
                an argument is no field of [`GranAlignConfig`].
        """
        shared = {"dtype": kwargs.pop("dtype", torch.float32)}
        if "attn_implementation" in kwargs:
            shared["attn_implementation"] = kwargs.pop("attn_implementation")
        own = {
            side: {k.removeprefix(side): kwargs.pop(k) for k in list(kwargs) if k.startswith(side)}
            for side in ("vision_", "text_")
        }
        check_fields(kwargs)
        vision_model = load_encoder(vision_model_name_or_path, "vision_config", **(shared | own["vision_"]))
        text_model = load_encoder(text_model_name_or_path, "text_config", **(shared | own["text_"]))
        if kwargs.get("special_token_ids") is None:
            kwargs["special_token_ids"] = tokenizer_special_ids(text_model_name_or_path)
        config = GranAlignConfig.from_vision_text_configs(vision_model.config, text_model.config, **kwargs)
        model = cls(config, vision_model, text_model)
        model.patch_projection.to(vision_model.dtype)
        model.word_projection.to(text_model.dtype)
        model.aligner.to(vision_model.dtype)
        logger.warning(
            "The projections and the aligner are newly initialised. Train the model before you use it, for example with "
            "`accelerate launch training/train.py`."
        )
        return model


__all__ = [
    "GranAlignImageOutput",
    "GranAlignModel",
    "GranAlignOutput",
    "GranAlignPreTrainedModel",
    "GranAlignTextOutput",
]
