"""A new model and processor from run settings: on pretrained encoders, or on small ones to train from scratch."""

from __future__ import annotations

import json
import re

from transformers import AutoConfig, BertTokenizer, ViTImageProcessor

from granalign_hf.modeling.configuration_granalign import GranAlignConfig
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
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
        return GranAlignModel.from_pretrained(run.checkpoint, **fields), GranAlignProcessor.from_pretrained(run.checkpoint)
    if run.vision_encoder and run.text_encoder:
        vision, text = resolve(run.vision_encoder), resolve(run.text_encoder)
        model = GranAlignModel.from_vision_text_pretrained(vision, text, **fields)
        return model, GranAlignProcessor.from_vision_text_pretrained(vision, text, model.config.text_config)
    tokenizer = word_tokenizer(captions)
    vision_config = AutoConfig.for_model(**json.loads(run.vision_config))
    text_config = AutoConfig.for_model(**json.loads(run.text_config), vocab_size=len(tokenizer))
    tokenizer.model_max_length = text_config.max_position_embeddings
    config = GranAlignConfig.from_vision_text_configs(
        vision_config, text_config, special_token_ids=sorted(set(tokenizer.all_special_ids)), **fields
    )
    size = vision_config.image_size
    image_processor = ViTImageProcessor(size={"height": size, "width": size})
    return GranAlignModel(config), GranAlignProcessor(image_processor, tokenizer)


def word_tokenizer(captions: list[str]) -> BertTokenizer:
    """A BERT tokenizer whose vocabulary is the words of the captions."""
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower())})
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(specials + words)})
