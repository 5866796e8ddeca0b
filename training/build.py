"""A new model and processor from run settings: each side on a pretrained encoder, or on one to train from scratch."""

from __future__ import annotations

import json
import re

import torch
from transformers import AutoConfig, AutoImageProcessor, BertTokenizer, PreTrainedConfig, ViTImageProcessor

from granalign_hf.modeling.configuration_granalign import CALIBRATED_FIELDS, GranAlignConfig
from granalign_hf.modeling.encoders import load_encoder, special_token_ids
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor, encoder_tokenizer
from granalign_hf.modeling.region_features import RegionFeaturesConfig, RegionFeaturesProcessor
from granalign_hf.training.arguments import RunArguments, resolve


def build(run: RunArguments, fields: dict, captions: list[str]) -> tuple[GranAlignModel, GranAlignProcessor]:
    """The model and processor of a run.

    Args:
        fields: fields of [`GranAlignConfig`]. captions: of the training split; a text encoder from scratch gets their words
            as its vocabulary.

    Raises:
        RuntimeError: a field changes the shape of a layer of the checkpoint.
    """
    if run.checkpoint:
        fields = {name: getattr(GranAlignConfig, name) for name in CALIBRATED_FIELDS} | fields  # fitted to those weights
        return GranAlignModel.from_pretrained(run.checkpoint, **fields), GranAlignProcessor.from_pretrained(run.checkpoint)
    vision_model = text_model = None
    if run.vision_encoder:
        name = resolve(run.vision_encoder)
        vision_model = load_encoder(name, "vision_config", dtype=torch.float32)
        vision_config, image_processor = vision_model.config, AutoImageProcessor.from_pretrained(name)
    else:
        vision_config = AutoConfig.for_model(**json.loads(run.vision_config))
        image_processor = new_image_processor(vision_config)
    if run.text_encoder:
        name = resolve(run.text_encoder)
        text_model = load_encoder(name, "text_config", dtype=torch.float32)
        text_config, tokenizer = text_model.config, encoder_tokenizer(name, text_model.config)
        special = special_token_ids(tokenizer)
    else:
        tokenizer = word_tokenizer(captions)
        text_config = AutoConfig.for_model(**json.loads(run.text_config), vocab_size=len(tokenizer))
        tokenizer.model_max_length = text_config.max_position_embeddings
        special = sorted(set(tokenizer.all_special_ids))
    fields = {"special_token_ids": special} | fields
    config = GranAlignConfig.from_vision_text_configs(vision_config, text_config, **fields)
    return GranAlignModel(config, vision_model, text_model), GranAlignProcessor(image_processor, tokenizer)


def new_image_processor(vision_config: PreTrainedConfig) -> ViTImageProcessor | RegionFeaturesProcessor:
    """What belongs to a vision encoder from scratch."""
    if vision_config.model_type == RegionFeaturesConfig.model_type:
        return RegionFeaturesProcessor(vision_config.hidden_size, vision_config.num_boxes)
    size = vision_config.image_size
    return ViTImageProcessor(size={"height": size, "width": size})


def word_tokenizer(captions: list[str]) -> BertTokenizer:
    """A BERT tokenizer whose vocabulary is the words of the captions."""
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower())})
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(specials + words)})
