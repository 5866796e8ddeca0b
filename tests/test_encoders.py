"""Every vision encoder with every text encoder: which tokens are patches, where they lie, which are words."""

import json
import logging

import pytest
import torch
import transformers as tf
from tiny import LONGEST_CAPTION, PATCHES, TEXT, VISION, tiny_inputs, tiny_model, tiny_tokenizer
from torch import nn

from granalign_hf import GranAlignConfig, GranAlignModel
from granalign_hf.modeling.encoders import feature_size, max_caption_length, patch_grid, special_token_ids

every_vision = pytest.mark.parametrize("vision", [make() for make in VISION.values()], ids=list(VISION))
every_text = pytest.mark.parametrize("text", [make() for make in TEXT.values()], ids=list(TEXT))


@pytest.fixture
def log(caplog):
    """What Transformers and the model code log; their loggers do not reach the root by themselves."""
    loggers = [logging.getLogger(name) for name in ("transformers", "granalign_hf.modeling")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def options(vision):
    return {"interpolate_pos_encoding": True} if vision.needs_interpolation else {}


def own_patches(vision, hidden):
    """The encoder's patches from its own output: the feature map row by row, or the tokens after the prefix."""
    return hidden.permute(0, 2, 3, 1).flatten(1, 2) if hidden.ndim == 4 else hidden[:, vision.num_prefix :]


def is_equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


# --- every pair ---


@every_text
@every_vision
def test_every_pair_scores_and_trains(vision, text):
    model = tiny_model(vision.config, text).train()
    outputs = model(**tiny_inputs(image_size=(4 * vision.stride, 4 * vision.stride)), return_loss=True)
    assert outputs.patch_embeds.shape == (3, 16, 16)
    assert outputs.word_embeds.shape == (3, 7, 16)
    assert outputs.logits_per_image.shape == (3, 3)
    assert torch.isfinite(outputs.logits_per_image).all()
    outputs.loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert idle == []
    assert model.patch_projection.weight.grad.abs().max() > 0
    assert model.word_projection.weight.grad.abs().max() > 0


# --- patches ---


@every_vision
def test_patches_are_the_encoders_own_without_its_prefix(vision):
    model = tiny_model(vision.config)
    assert model.config.num_prefix_tokens == vision.num_prefix
    pixels = tiny_inputs(image_size=(4 * vision.stride, 4 * vision.stride))["pixel_values"]
    image = model.get_image_features(pixels)
    hidden = model.vision_model(pixels).last_hidden_state
    assert torch.equal(image.last_hidden_state, hidden)
    expected = nn.functional.normalize(model.patch_projection(own_patches(vision, hidden)), dim=-1)
    assert torch.equal(image.patch_embeds, expected)
    assert image.patch_mask.all()
    assert image.spatial_shapes.tolist() == [[4, 4]] * 3


@every_vision
def test_prefix_tokens_stand_before_the_grid_if_asked_for(vision):
    model = tiny_model(vision.config, use_prefix_tokens=True)
    pixels = tiny_inputs(image_size=(4 * vision.stride, 4 * vision.stride))["pixel_values"]
    image = model.get_image_features(pixels)
    hidden = image.last_hidden_state
    tokens = own_patches(vision, hidden) if hidden.ndim == 4 else hidden
    assert torch.equal(image.patch_embeds, nn.functional.normalize(model.patch_projection(tokens), dim=-1))
    assert image.patch_mask.shape == (3, vision.num_prefix + 16)
    assert image.spatial_shapes.tolist() == [[4, 4]] * 3


def test_size_of_the_images_behind_an_encoder_output():
    model = tiny_model(tf.Dinov2Config(**PATCHES | {"image_size": 32}))
    inputs = tiny_inputs(image_size=(12, 20))
    expected = model(**inputs)
    pixels = inputs.pop("pixel_values")
    outputs = model(**inputs, vision_model_output=model.vision_model(pixels), image_size=(12, 20))
    assert outputs.spatial_shapes.tolist() == [[3, 5]] * 3
    assert torch.equal(outputs.logits_per_image, expected.logits_per_image)
    with pytest.raises(ValueError, match=r"An image of \(32, 32\) pixels gives 16 tokens"):
        model(**inputs, vision_model_output=model.vision_model(pixels))


@pytest.mark.parametrize(
    ("rows", "columns", "extra"), [(3, 5, 0), (6, 2, 0), (3, 5, 1)], ids=["wide", "tall", "not a multiple"]
)
@every_vision
def test_grid_of_any_image_size(vision, rows, columns, extra):
    model = tiny_model(vision.config)
    size = (rows * vision.stride + extra, columns * vision.stride + extra)
    outputs = model(**tiny_inputs(image_size=size), **options(vision))
    if extra and vision.pads_odd_grids:
        rows, columns = rows + 1, columns + 1
    assert outputs.spatial_shapes.tolist() == [[rows, columns]] * 3
    assert outputs.patch_embeds.shape == (3, rows * columns, 16)
    hidden = outputs.vision_model_output.last_hidden_state
    if hidden.ndim == 4:
        assert hidden.shape[2:] == (rows, columns)
    else:
        assert hidden.shape[1] == vision.num_prefix + rows * columns


@every_vision
def test_patches_lie_row_by_row(vision):
    """Noise in one cell of a 3 x 5 grid changes the patch of that cell most."""
    model = tiny_model(vision.config)
    stride, generator = vision.stride, torch.Generator().manual_seed(0)
    pixels = tiny_inputs(1, image_size=(3 * stride, 5 * stride))["pixel_values"]
    if model.get_image_features(pixels, **options(vision)).last_hidden_state.ndim == 4:
        return  # told by the feature map itself, in the tests above; untrained convolutions blur
    cells = [(row, column) for row in range(3) for column in range(5)]
    found = []
    with torch.no_grad():
        before = own_patches(vision, model.get_image_features(pixels, **options(vision)).last_hidden_state)
        for row, column in cells:
            noisy = pixels.repeat(8, 1, 1, 1)
            cell = noisy[:, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
            cell += 3 * torch.randn(cell.shape, generator=generator)
            after = own_patches(vision, model.get_image_features(noisy, **options(vision)).last_hidden_state)
            found.append(int((after - before).norm(dim=-1).mean(0).argmax()))
    assert found == [5 * row + column for row, column in cells]


@every_vision
def test_other_image_sizes_need_interpolation_where_positions_are_a_table(vision):
    """8 x 32 has as many patches as 16 x 16: SigLIP itself would give them the wrong positions without a word."""
    model = tiny_model(vision.config)
    inputs = tiny_inputs(image_size=(2 * vision.stride, 8 * vision.stride))
    if not vision.needs_interpolation:
        assert model(**inputs).spatial_shapes.tolist() == [[2, 8]] * 3
        return
    with pytest.raises(
        ValueError, match=r"images of \(8, 32\) pixels.*positions for \(16, 16\).*`interpolate_pos_encoding=True`"
    ):
        model(**inputs)
    assert model(**inputs, interpolate_pos_encoding=True).spatial_shapes.tolist() == [[2, 8]] * 3


def test_patches_are_pooled_over_the_grid_before_projection():
    """3 x 5 patches pooled by 2 x 2 give 2 x 3; a square at the edge averages the patches that it has."""
    model = tiny_model(patch_pool_size=2, use_prefix_tokens=True)
    pixels = tiny_inputs(image_size=(12, 20))["pixel_values"]
    image = model.get_image_features(pixels, interpolate_pos_encoding=True)
    grid = image.last_hidden_state[:, 1:].unflatten(1, (3, 5))
    squares = [grid[:, r : r + 2, c : c + 2].flatten(1, 2).mean(1) for r in (0, 2) for c in (0, 2, 4)]
    tokens = torch.stack([image.last_hidden_state[:, 0], *squares], dim=1)
    expected = nn.functional.normalize(model.patch_projection(tokens), dim=-1)
    torch.testing.assert_close(image.patch_embeds, expected)
    assert image.spatial_shapes.tolist() == [[2, 3]] * 3


def test_a_prefix_that_the_encoder_does_not_have_is_refused():
    model = tiny_model(num_prefix_tokens=2)
    with pytest.raises(ValueError, match=r"17 tokens.*4 x 4 patches after 2 prefix tokens.*`num_prefix_tokens`"):
        model(**tiny_inputs())


def test_grids_and_widths_of_published_configs():
    assert patch_grid(tf.ViTConfig(), (224, 384)) == (14, 24)
    assert patch_grid(tf.SwinConfig(), (224, 384)) == (7, 12)
    assert patch_grid(tf.Dinov2Config(patch_size=14), (518, 224)) == (37, 16)
    assert patch_grid(tf.DINOv3ConvNextConfig(), (224, 256)) == (7, 8)
    assert feature_size(tf.SwinConfig()) == 768
    assert feature_size(tf.ConvNextConfig()) == 768
    assert feature_size(tf.ResNetConfig()) == 2048
    assert feature_size(tf.DistilBertConfig()) == 768
    with pytest.raises(ValueError, match="`patch_size`"):
        patch_grid(tf.BertConfig(), (224, 224))
    with pytest.raises(ValueError, match="`hidden_size`"):
        feature_size(tf.PreTrainedConfig())


# --- words ---


@every_text
def test_padding_changes_nothing(text):
    """Seven more columns of padding, whatever stands in them; a second caption is shorter than the others."""
    model = tiny_model(text=text)
    inputs = tiny_inputs()
    inputs["attention_mask"][1, 4:] = 0
    expected = model(**inputs)
    junk = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(1))
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], junk], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros_like(junk)], dim=1),
    }
    outputs = model(**longer)
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=0)
    assert outputs.word_mask.sum(1).tolist() == [7, 4, 7]
    alone = model(inputs["input_ids"][1:2, :4], inputs["pixel_values"])
    torch.testing.assert_close(alone.logits_per_image, expected.logits_per_image[:, 1:2], atol=1e-5, rtol=0)


@every_text
def test_words_are_the_encoders_own(text):
    model = tiny_model(text=text)
    inputs = tiny_inputs()
    features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    hidden = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(features.last_hidden_state, hidden)
    assert torch.equal(features.word_embeds, nn.functional.normalize(model.word_projection(hidden), dim=-1))


@every_text
def test_longest_caption(text):
    assert max_caption_length(text) == LONGEST_CAPTION
    model = tiny_model(text=text)
    inputs = tiny_inputs(num_words=LONGEST_CAPTION)
    assert torch.isfinite(model(**inputs).logits_per_image).all()
    with pytest.raises(ValueError, match=r"`input_ids` has 41 tokens a caption.*at most 40"):
        model(**tiny_inputs(num_words=LONGEST_CAPTION + 1))


@pytest.mark.parametrize("use_special_tokens", [True, False])
def test_special_tokens_take_part_if_the_config_says_so(use_special_tokens):
    """[CLS] a dog [SEP] and [CLS] [SEP] alone; 0 is padding, 2 and 3 are [CLS] and [SEP], 1 and 4 stand for words."""
    fields = {"special_token_ids": [0, 2, 3], "use_special_tokens": use_special_tokens}
    model = tiny_model(**fields)
    ids = torch.tensor([[2, 5, 10, 1, 4, 3], [2, 3, 0, 0, 0, 0], [2, 7, 3, 0, 0, 0]])
    inputs = tiny_inputs() | {"input_ids": ids, "attention_mask": (ids != 0).long()}
    expected = [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    if not use_special_tokens:
        expected = [[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]  # nothing else in the second: all stay
    outputs = model(**inputs)
    assert outputs.word_mask.tolist() == torch.tensor(expected).bool().tolist()
    assert torch.isfinite(outputs.logits_per_image).all()


def test_special_tokens_that_do_not_take_part_do_not_score():
    """Other encoder outputs at [CLS] and [SEP] leave the score as it is; other outputs at a word do not."""
    model = tiny_model(special_token_ids=[0, 2, 3], use_special_tokens=False)
    ids = torch.tensor([[2, 5, 10, 3]])
    inputs = {"pixel_values": tiny_inputs(2)["pixel_values"], "input_ids": ids}
    features = model.text_model(ids)
    expected = model(**inputs).logits_per_image
    for position, is_word in enumerate([False, True, True, False]):
        features.last_hidden_state = model.text_model(ids).last_hidden_state.clone()
        features.last_hidden_state[:, position] = -features.last_hidden_state[:, position]
        outputs = model(**inputs, text_model_output=features)
        assert torch.equal(outputs.logits_per_image, expected) is not is_word


def test_special_ids_that_configs_and_tokenizers_declare():
    assert special_token_ids(tf.BertConfig(**{"pad_token_id": 0})) == [0]
    assert special_token_ids(TEXT["roberta"]()) == [0, 1, 2]
    assert special_token_ids(TEXT["modernbert"]()) == [0, 2, 3]
    assert special_token_ids(tiny_tokenizer()) == [0, 2, 3]  # neither [UNK] nor [MASK]
    assert special_token_ids(tf.CLIPTextConfig(pad_token_id=1, bos_token_id=2, eos_token_id=[3, 4])) == [1, 2, 3, 4]


# --- saved and loaded ---


def saved_and_loaded(model, folder, **kwargs):
    model.save_pretrained(folder)
    loaded, report = GranAlignModel.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(report.values()), report
    return loaded


@every_vision
def test_vision_encoders_are_saved_and_loaded(vision, tmp_path):
    model = tiny_model(vision.config)
    inputs = tiny_inputs(image_size=(4 * vision.stride, 4 * vision.stride))
    loaded = saved_and_loaded(model, tmp_path)
    assert is_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    half = GranAlignModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    outputs = half(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs.logits_per_image, model(**inputs).logits_per_image, atol=0.05, rtol=0)


@every_text
def test_text_encoders_are_saved_and_loaded(text, tmp_path):
    model = tiny_model(text=text)
    loaded = saved_and_loaded(model, tmp_path)
    assert is_equal(loaded.state_dict(), model.state_dict())
    scores = [m(**tiny_inputs()).logits_per_image for m in (loaded, model)]
    torch.testing.assert_close(*scores, atol=1e-6, rtol=0)  # a GRU rounds by where its weights lie in memory


def test_encoders_have_the_dtype_of_the_model_and_not_of_their_own_weights():
    """A config from a checkpoint in float16 builds a model in float32."""
    vision = VISION["vit"]().config
    vision.dtype = torch.float16
    model = tiny_model(vision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model(**tiny_inputs())


# --- from pretrained encoders ---


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Checkpoints of encoders with random weights, by name: folder and model."""
    torch.manual_seed(1)
    text = {"text_config": TEXT["clip_text"]().to_dict()}
    models = {
        "vit": tf.ViTModel(VISION["vit"]().config),
        "vit classifier": tf.ViTForImageClassification(VISION["vit"]().config),
        "bert": tf.BertModel(TEXT["bert"]()),
        "masked bert": tf.BertForMaskedLM(TEXT["bert"]()),
        "clip": tf.CLIPModel(tf.CLIPConfig(**text, vision_config=VISION["clip_vision"]().config.to_dict())),
        "siglip": tf.SiglipModel(
            tf.SiglipConfig(
                text_config=text["text_config"] | {"model_type": "siglip_text_model"},
                vision_config=VISION["siglip_vision"]().config.to_dict(),
            )
        ),
    }
    folder = tmp_path_factory.mktemp("encoders")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / "bert")
    return {name: (str(folder / name), model) for name, model in models.items()}


@pytest.mark.parametrize(
    ("vision", "text"),
    [("vit", "bert"), ("vit classifier", "masked bert"), ("clip", "clip"), ("siglip", "bert")],
)
def test_pretrained_encoders_keep_their_weights(encoders, vision, text):
    (vision_folder, vision_source), (text_folder, text_source) = encoders[vision], encoders[text]
    model = GranAlignModel.from_vision_text_pretrained(vision_folder, text_folder, projection_dim=16, num_regions=7)
    vision_source = getattr(vision_source, "vision_model", getattr(vision_source, "vit", vision_source))
    text_source = getattr(text_source, "text_model", getattr(text_source, "bert", text_source))
    for encoder, source in ((model.vision_model, vision_source), (model.text_model, text_source)):
        weights = {k: v for k, v in source.state_dict().items() if not k.startswith("pooler.")}
        assert encoder.state_dict().keys() == weights.keys()
        assert is_equal(encoder.state_dict(), weights)
    assert (model.config.projection_dim, model.config.num_regions) == (16, 7)
    assert torch.isfinite(model.eval()(**tiny_inputs()).logits_per_image).all()


def test_new_parts_are_announced(encoders, log):
    GranAlignModel.from_vision_text_pretrained(encoders["vit"][0], encoders["bert"][0])
    assert "projections and the aligner are newly initialised" in log.text
    assert "No tokenizer" not in log.text


def test_special_ids_come_from_the_tokenizer_beside_the_text_encoder(encoders, log):
    model = GranAlignModel.from_vision_text_pretrained(encoders["vit"][0], encoders["bert"][0])
    assert model.config.special_token_ids == [0, 2, 3]
    log.clear()
    model = GranAlignModel.from_vision_text_pretrained(encoders["vit"][0], encoders["masked bert"][0])
    assert f"No tokenizer at {encoders['masked bert'][0]}" in log.text
    assert model.config.special_token_ids == [0]
    model = GranAlignModel.from_vision_text_pretrained(
        encoders["vit"][0], encoders["bert"][0], special_token_ids=[0, 2, 3, 4]
    )
    assert model.config.special_token_ids == [0, 2, 3, 4]


def test_settings_reach_the_encoders(encoders):
    folders = encoders["vit"][0], encoders["bert"][0]
    model = GranAlignModel.from_vision_text_pretrained(
        *folders, attn_implementation="eager", vision_hidden_dropout_prob=0.5, text_num_hidden_layers=1
    )
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config.hidden_dropout_prob == 0.5
    assert len(model.text_model.encoder.layer) == 1
    model = GranAlignModel.from_vision_text_pretrained(*folders, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = tiny_inputs()
    model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})


def test_config_of_the_model_is_the_config_of_every_layer(encoders):
    """Else a change of the attention would not reach pretrained encoders, and their attentions would come back empty."""
    model = GranAlignModel.from_vision_text_pretrained(encoders["vit"][0], encoders["bert"][0]).eval()
    assert model.vision_model.config is model.config.vision_config
    assert model.text_model.config is model.config.text_config
    model.set_attn_implementation("eager")
    outputs = model(**tiny_inputs(), output_attentions=True)
    assert [tuple(a.shape) for a in outputs.vision_model_output.attentions] == [(3, 4, 17, 17)] * 2
    assert [tuple(a.shape) for a in outputs.text_model_output.attentions] == [(3, 4, 7, 7)] * 2


def test_no_path_of_this_machine_is_saved(encoders, tmp_path):
    GranAlignModel.from_vision_text_pretrained(encoders["vit"][0], encoders["bert"][0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["_name_or_path"] == "vit"
    assert config["text_config"]["_name_or_path"] == "bert"


def test_checkpoint_without_the_encoders_weights_is_refused(tmp_path, encoders):
    """The weights of an aligned model have other names: both encoders would silently be random."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights of a 'vit' encoder"):
        GranAlignModel.from_vision_text_pretrained(str(tmp_path), encoders["bert"][0])


def test_encoders_given_as_models_lose_what_tokens_do_not_need(tmp_path):
    """Pooling layers would stay without gradient; the loaded model has the same weights as the saved one."""
    torch.manual_seed(0)
    vision, text = tf.ViTModel(VISION["vit"]().config), tf.BertModel(TEXT["bert"]())
    model = GranAlignModel(vision_model=vision, text_model=text).eval()
    assert vision.pooler is None
    assert text.pooler is None
    loaded = saved_and_loaded(model, tmp_path)
    assert torch.equal(loaded(**tiny_inputs()).logits_per_image, model(**tiny_inputs()).logits_per_image)
    with pytest.raises(ValueError, match="`config`, or both a `vision_model` and a `text_model`"):
        GranAlignModel(vision_model=vision)


def test_default_config_is_vit_and_bert():
    config = GranAlignConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vit", "bert")
    assert (config.num_prefix_tokens, config.special_token_ids) == (1, [0])
