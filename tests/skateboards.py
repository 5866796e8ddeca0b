"""A tokenizer that cuts words to pieces, a processor of rectangular pictures, and models to go with them."""

import torch
from PIL import Image
from transformers import BertConfig, BertTokenizer, ViTConfig, ViTImageProcessorPil

from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignProcessor
from granalign_hf.modeling.alignment import AlignedWord, Alignment
from granalign_hf.modeling.maps import patch_box

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a the dog skate ##board ##er ' s t - shirt red , . of don cafe two"
VOCABULARY = {piece: i for i, piece in enumerate(PIECES.split())}
CAPTION = "A  skateboarder's red T-shirt, café."


def make_tokenizer(**kwargs):
    return BertTokenizer(vocab=VOCABULARY, **kwargs)


def make_processor(**kwargs):
    image_processor = ViTImageProcessorPil(size={"height": 24, "width": 40})
    return GranAlignProcessor(image_processor, make_tokenizer(model_max_length=24, **kwargs))


def make_model(aligner="grm", seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = ViTConfig(image_size=(24, 40), patch_size=8, **sizes)
    text = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=24, **sizes)
    kwargs = {"projection_dim": 8, "special_token_ids": [0, 2, 3]} | kwargs
    return GranAlignModel(GranAlignConfig.from_vision_text_configs(vision, text, aligner=aligner, **kwargs)).eval()


def make_alignment(maps, image_size=(60, 40), caption="red dog", saliency=0.5):
    """An alignment with the given maps as its content words."""
    image = Image.new("RGB", image_size, (0, 0, 255))
    words = []
    for index, word_map in enumerate(maps):
        row, column = divmod(int(word_map.argmax()), word_map.shape[1])
        box = patch_box(row, column, tuple(word_map.shape), (0, 0, *image_size), image_size)
        words.append(AlignedWord(f"word{index}", 0, 5, (index,), True, saliency=saliency, map=word_map, box=box))
    return Alignment(image, caption, 0.25, words, None, (0.0, 0.0, *map(float, image_size)))
