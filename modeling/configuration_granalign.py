# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""GranAlign configuration."""

import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .encoders import num_prefix_tokens, special_token_ids

POOLINGS = {
    "grm": ("mean",),
    "max_mean": ("mean",),
    "chan": ("mean", "logsumexp"),
    "scan": ("mean",),
    "laps": ("mean",),
    "vse++": ("mean", "max"),
}
# What one aligner has and others have not.
ALIGNER_FIELDS: dict[str, tuple[str, ...]] = {
    "grm": (
        *("use_patch_adapter", "use_word_adapter", "use_region_prompts", "use_region_uncertainty", "num_regions"),
        *("region_logit_scale", "saliency_temperature", "level_weights"),
        *("reconstruction_weight", "kl_weight", "entropy_weight"),
        *("patch_budget", "budget_weight"),
    ),
    "max_mean": (),
    "chan": ("pooling",),
    "scan": ("attention_direction",),
    "laps": ("patch_keep_share", "num_regions"),
    "vse++": ("pooling",),
}
ATTENTION_DIRECTIONS = ("t2i", "i2t", "both")
PROJECTION_TYPES = ("linear", "mlp")
ERROR_MEASURES = ("standard_error", "margin_in_errors")
CONFIDENCE_MEASURES = ("margin", "probability", "entropy", *ERROR_MEASURES)
# What calibration fits to trained weights; other weights need it anew.
CALIBRATED_FIELDS = (
    "logit_scale", "standard_error_factor", "confidence_measure", "confidence_coefficients", "conformal_thresholds"
)  # fmt: skip


@strict
class GranAlignConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GranAlignModel`]: a vision encoder, a text encoder, and the aligner that scores their tokens.

    The defaults are those of GRM (AAAI 2026, arXiv 2511.07710); the paper's symbol stands in brackets.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of the vision encoder, any that returns tokens or a feature map. Defaults to a ViT-B/16.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of the text encoder. Defaults to a BERT-base.
        aligner (`str`, defaults to `"grm"`):
            `"grm"`; `"chan"`: hard alignment; `"scan"`: cross-attention; `"laps"`: patches that each caption selects;
            `"vse++"`: pooled vectors and their cosine; `"max_mean"`: the bidirectional maximum of GRM without adapters and
            regions.
        pooling (`str`, defaults to `"mean"`):
            How tokens are pooled: `"mean"` or `"logsumexp"` over the words for CHAN, `"mean"` or `"max"` for VSE++.
        attention_direction (`str`, defaults to `"t2i"`):
            Of SCAN: `"t2i"` (words attend over patches), `"i2t"` (patches attend over words) or `"both"` (their mean).
        patch_keep_share (`float`, defaults to 0.5):
            Of LAPS: the share of the patches that a caption keeps, in (0, 1], rounded up to a whole number of patches.
        projection_dim (`int`, defaults to 512):
            Width of the shared token space [d].
        projection_type (`str`, defaults to `"linear"`):
            How tokens of the encoders get there: `"linear"`, or `"mlp"`, which adds a layer of GELU units beside the linear
            map and pays where the encoders are frozen.
        patch_dropout (`float`, defaults to 0.0):
            Share of the patches, drawn anew for each image and step, that take no part in training (0.2 in CHAN).
        use_patch_adapter, use_word_adapter (`bool`, defaults to `True`):
            Whether GRM judges the saliency of patches and of words; without its adapter every token has saliency 1.
        use_region_prompts (`bool`, defaults to `True`):
            Whether prompts gather GRM's patches into regions; without them every patch is a region of its own.
        use_region_uncertainty (`bool`, defaults to `True`):
            Whether GRM's regions have a variance; without it a region is its mean, in training too.
        num_regions (`int`, defaults to 5):
            Number of region prompts [K], at least 1. For LAPS, the number of tokens that the patches kept are aggregated to:
            in the paper 0.2 of all patches, 39 of 196.
        region_logit_scale (`float`, defaults to 30.0):
            Factor on the cosine of patch and region prompt before the sigmoid. The paper has none (1), with affinities in
            0.27..0.73, so that all regions are the mean of all patches; larger values separate them.
        saliency_temperature (`float`, defaults to 1.0):
            Temperature of the Gumbel softmax [tau].
        level_weights (`list[float]`, defaults to `[0.4, 0.4, 0.2]`):
            Weights of the original, key and uncertain level, in the loss and in the score [a, b, c]; they sum to 1.
        margin (`float`, defaults to 0.2):
            Margin of the hinge loss [alpha].
        reconstruction_weight (`float`, defaults to 0.01):
            Weight of the reconstruction loss [L_recon].
        kl_weight (`float`, defaults to 0.001):
            Weight of the KL divergence to the normal distribution of unit-length tokens, N(0, I / d) [L_KL], averaged over
            regions and features.
        entropy_weight (`float`, defaults to 0.01):
            Weight of the entropy of the region affinities [L_ent]; positive: minimised, as printed in the paper.
        patch_budget (`float`, defaults to 0.5):
            What the mean saliency of the patches of an image shall be, in (0, 1].
        budget_weight (`float`, defaults to 0.0):
            Weight of the squared distance from `patch_budget`. The paper has no budget (0), and every saliency becomes 1.
        use_special_tokens (`bool`, defaults to `True`):
            Whether CLS, SEP and other special tokens take part as words. A caption of special tokens only keeps them.
            `False` needs `special_token_ids` where `text_config` declares none but padding, as that of BERT.
        use_prefix_tokens (`bool`, defaults to `False`):
            Whether class and register tokens take part as patches; they stand before the grid then.
        special_token_ids (`list[int]`, *optional*):
            Ids of the special tokens. Defaults to those that `text_config` declares.
        num_prefix_tokens (`int`, *optional*):
            Number of class, distillation and register tokens before the patches. Defaults to what the type of
            `vision_config` says, 0 for a type that is not known.
        patch_pool_size (`int`, defaults to 1):
            Side of the square of neighbouring patches that are averaged into one before they are projected.
        logit_scale (`float`, defaults to 1.0):
            Factor from scores to `logits_per_image`, so that their softmax over candidates is a probability. It changes
            neither ranking nor training. This field and those below are fitted by `training/calibrate.py`.
        standard_error_factor (`float`, defaults to 1.0):
            Factor from the closed form of the standard error of a score to its true value.
        confidence_measure (`str`, defaults to `"margin"`):
            What the probability that the first answer is right is made of: `"margin"`, first minus second score;
            `"probability"` and `"entropy"` of the softmax; `"standard_error"` of the first score; `"margin_in_errors"`.
        confidence_coefficients (`list[float]`, *optional*):
            Intercept and slope of its logistic curve, image to text, then text to image.
        conformal_thresholds (`list[float]`, *optional*):
            How far below the first score a candidate still belongs to the answers that hold the right one for 90 % of the
            queries, image to text, then text to image.

    Raises:
        ValueError: special tokens shall take no part, but their ids are not known.
        StrictDataclassError: a value out of its range or of the wrong type, or a `pooling` that the aligner does not have.
            The message names the field.
    """

    model_type = "granalign"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    aligner: str = "grm"
    pooling: str = "mean"
    attention_direction: str = "t2i"
    patch_keep_share: float | int = 0.5
    projection_dim: int = 512
    projection_type: str = "linear"
    patch_dropout: float | int = 0.0
    use_patch_adapter: bool = True
    use_word_adapter: bool = True
    use_region_prompts: bool = True
    use_region_uncertainty: bool = True
    num_regions: int = 5
    region_logit_scale: float | int = 30.0
    saliency_temperature: float | int = 1.0
    level_weights: list[float | int] | tuple[float | int, ...] = (0.4, 0.4, 0.2)
    margin: float | int = 0.2
    reconstruction_weight: float | int = 0.01
    kl_weight: float | int = 0.001
    entropy_weight: float | int = 0.01
    patch_budget: float | int = 0.5
    budget_weight: float | int = 0.0
    use_special_tokens: bool = True
    use_prefix_tokens: bool = False
    special_token_ids: list[int] | None = None
    num_prefix_tokens: int | None = None
    patch_pool_size: int = 1
    logit_scale: float | int = 1.0
    standard_error_factor: float | int = 1.0
    confidence_measure: str = "margin"
    confidence_coefficients: list[float] | None = None
    conformal_thresholds: list[float] | None = None

    def __post_init__(self, **kwargs):
        if type(self).__module__.startswith("granalign_hf."):
            kwargs.pop("custom_pipelines", None)  # this package has them; those of the checkpoint would ask for trust
        super().__post_init__(**kwargs)
        self.level_weights = list(self.level_weights)
        if self.num_prefix_tokens is None:
            self.num_prefix_tokens = num_prefix_tokens(self.vision_config)
        if self.special_token_ids is None:
            self.special_token_ids = special_token_ids(self.text_config)
            if not self.use_special_tokens and {*self.special_token_ids} <= {self.text_config.pad_token_id}:
                raise ValueError(
                    "`use_special_tokens=False` needs the ids of the special tokens, but `text_config` "
                    f"({self.text_config.model_type}) declares none besides padding. Pass `special_token_ids`, for example "
                    "`tokenizer.all_special_ids` without the unknown and the mask token."
                )

    def validate_aligner(self):
        """Part of the `@strict` validation: ranges, and combinations that no aligner has; all that is wrong at once."""
        problems = []
        if self.aligner not in POOLINGS:
            problems.append(f"`aligner` must be one of {sorted(POOLINGS)}, got {self.aligner!r}.")
        elif self.pooling not in POOLINGS[self.aligner]:
            problems.append(
                f"`pooling` of the aligner {self.aligner!r} must be one of {POOLINGS[self.aligner]}, got {self.pooling!r}."
            )
        for name, choices in (("attention_direction", ATTENTION_DIRECTIONS), ("projection_type", PROJECTION_TYPES)):
            if getattr(self, name) not in choices:
                problems.append(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if not 0 <= self.patch_dropout < 1:
            problems.append(f"`patch_dropout` must lie in [0, 1), got {self.patch_dropout}.")
        for name in ("patch_keep_share", "patch_budget"):
            if not 0 < getattr(self, name) <= 1:
                problems.append(f"`{name}` must lie in (0, 1], got {getattr(self, name)}.")
        for name in ("projection_dim", "num_regions", "patch_pool_size"):
            if getattr(self, name) < 1:
                problems.append(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("region_logit_scale", "saliency_temperature", "margin", "logit_scale", "standard_error_factor"):
            if not 0 < getattr(self, name) < math.inf:
                problems.append(f"`{name}` must be greater than 0 and finite, got {getattr(self, name)}.")
        for name in ("reconstruction_weight", "kl_weight", "budget_weight", "num_prefix_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")
        if not math.isfinite(self.entropy_weight):
            problems.append(f"`entropy_weight` must be finite, got {self.entropy_weight}.")
        if self.aligner == "grm" and self.patch_dropout > 0 and not self.use_region_prompts:
            problems.append("`patch_dropout` needs `use_region_prompts`: without prompts every patch is a region.")
        weights = self.level_weights
        if len(weights) != 3 or min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
            problems.append(f"`level_weights` must be three values of at least 0 that sum to 1, got {weights}.")
        if problems:
            raise ValueError(" ".join(problems))

    def validate_calibration(self):
        """Part of the `@strict` validation: what calibration has fitted."""
        if self.confidence_measure not in CONFIDENCE_MEASURES:
            raise ValueError(f"`confidence_measure` must be one of {CONFIDENCE_MEASURES}, got {self.confidence_measure!r}.")
        for name, length, lowest in (("confidence_coefficients", 4, -math.inf), ("conformal_thresholds", 2, 0)):
            values = getattr(self, name)
            if values is not None and (len(values) != length or not all(lowest <= v < math.inf for v in values)):
                rule = f"{length} finite values" + (" of at least 0" if lowest == 0 else "")
                raise ValueError(f"`{name}` must be {rule}, got {values}.")

    @classmethod
    def from_vision_text_configs(
        cls, vision_config: PreTrainedConfig, text_config: PreTrainedConfig, **kwargs
    ) -> "GranAlignConfig":
        """A config from those of two encoders; `kwargs` are further fields of [`GranAlignConfig`]."""
        return cls(vision_config=vision_config.to_dict(), text_config=text_config.to_dict(), **kwargs)


__all__ = ["GranAlignConfig"]
