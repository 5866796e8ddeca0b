"""Small random encoders of every kind, with what is true of them, and the model, tokenizer and images to go with them."""

from dataclasses import dataclass

import torch
import transformers as tf
from transformers import BertTokenizer, PreTrainedConfig, ViTImageProcessorPil

from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignProcessor
from granalign_hf.modeling.gru_encoder import GRUEncoderConfig
from granalign_hf.modeling.region_features import RegionFeaturesConfig, RegionFeaturesProcessor

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
PATCHES = WIDTHS | {"patch_size": 4, "image_size": 16}
STAGES = {"hidden_sizes": [8, 32], "depths": [1, 1]}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
WORDS = {"vocab_size": 99}
LONGEST_CAPTION = 40


@dataclass
class Vision:
    """A vision encoder: tokens before its patches, and pixels of one side of a patch."""

    config: PreTrainedConfig
    num_prefix: int
    stride: int
    needs_interpolation: bool = False
    pads_odd_grids: bool = False


VISION = {
    "vit": lambda: Vision(tf.ViTConfig(**PATCHES), 1, 4, needs_interpolation=True),
    "deit": lambda: Vision(tf.DeiTConfig(**PATCHES), 2, 4, needs_interpolation=True),
    "swin": lambda: Vision(tf.SwinConfig(**WINDOWS), 0, 4, pads_odd_grids=True),
    "swinv2": lambda: Vision(tf.Swinv2Config(**WINDOWS), 0, 4, pads_odd_grids=True),
    "dinov2": lambda: Vision(tf.Dinov2Config(**PATCHES), 1, 4),
    "dinov2_with_registers": lambda: Vision(tf.Dinov2WithRegistersConfig(num_register_tokens=3, **PATCHES), 4, 4),
    "dinov3_vit": lambda: Vision(tf.DINOv3ViTConfig(num_register_tokens=3, **PATCHES), 4, 4),
    "dinov3_convnext": lambda: Vision(tf.DINOv3ConvNextConfig(image_size=32, **STAGES), 1, 8),
    "clip_vision": lambda: Vision(tf.CLIPVisionConfig(**PATCHES), 1, 4, needs_interpolation=True),
    "siglip_vision": lambda: Vision(tf.SiglipVisionConfig(**PATCHES), 0, 4, needs_interpolation=True),
    "convnext": lambda: Vision(tf.ConvNextConfig(image_size=32, num_stages=2, **STAGES), 0, 8),
    "convnextv2": lambda: Vision(tf.ConvNextV2Config(image_size=32, num_stages=2, **STAGES), 0, 8),
    "resnet": lambda: Vision(tf.ResNetConfig(embedding_size=8, layer_type="basic", **STAGES), 0, 8, pads_odd_grids=True),
    "beit": lambda: Vision(tf.BeitConfig(**PATCHES), 1, 4),
}

TEXT = {
    "bert": lambda: tf.BertConfig(max_position_embeddings=40, **WIDTHS, **WORDS),
    "roberta": lambda: tf.RobertaConfig(max_position_embeddings=42, **WIDTHS, **WORDS),
    "distilbert": lambda: tf.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=40, **WORDS
    ),
    "modernbert": lambda: tf.ModernBertConfig(
        max_position_embeddings=40, cls_token_id=2, sep_token_id=3, **SPECIAL, **WIDTHS, **WORDS
    ),
    "clip_text": lambda: tf.CLIPTextConfig(max_position_embeddings=40, **SPECIAL, **WIDTHS, **WORDS),
    "mpnet": lambda: tf.MPNetConfig(max_position_embeddings=42, **WIDTHS, **WORDS),
    "electra": lambda: tf.ElectraConfig(max_position_embeddings=40, embedding_size=16, **WIDTHS, **WORDS),
    "gru": lambda: GRUEncoderConfig(embedding_size=16, hidden_size=32, max_position_embeddings=40, **WORDS),
}

WORD_LIST = "a the red blue green dog cat square circle ##s and of on"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORD_LIST.split()]


def tiny_model(
    vision: PreTrainedConfig | None = None, text: PreTrainedConfig | None = None, seed=0, **fields
) -> GranAlignModel:
    """A model at inference; ViT and BERT by default."""
    torch.manual_seed(seed)
    vision = VISION["vit"]().config if vision is None else vision
    text = TEXT["bert"]() if text is None else text
    fields = {"projection_dim": 16, "num_regions": 3} | fields
    return GranAlignModel(GranAlignConfig.from_vision_text_configs(vision, text, **fields)).eval()


def tiny_inputs(num_images=3, num_captions=3, num_words=7, image_size=(16, 16), seed=0) -> dict[str, torch.Tensor]:
    """Random pixels and words, without special tokens or padding."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(num_images, 3, *image_size, generator=generator),
        "input_ids": torch.randint(5, 99, (num_captions, num_words), generator=generator),
        "attention_mask": torch.ones(num_captions, num_words, dtype=torch.long),
    }


def tiny_tokenizer(**kwargs) -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, **kwargs)


def region_model_and_processor(**fields) -> tuple[GranAlignModel, GranAlignProcessor]:
    """On features of 4 boxes with 6 numbers each."""
    sizes = {"num_boxes": 4, "hidden_size": 6}
    model = tiny_model(RegionFeaturesConfig(**sizes), TEXT["gru"](), **fields)
    return model, GranAlignProcessor(RegionFeaturesProcessor(**sizes), tiny_tokenizer())


def tiny_processor(**kwargs) -> GranAlignProcessor:
    """Resizes to 16 x 16 and scales pixels to [-1, 1]."""
    return GranAlignProcessor(ViTImageProcessorPil(size={"height": 16, "width": 16}), tiny_tokenizer(**kwargs))
