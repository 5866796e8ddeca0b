"""The config: strict in types and ranges, whole after a round trip, and frozen in its names."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, PreTrainedConfig, SwinConfig, ViTConfig

from granalign_hf import GranAlignConfig

OWN_FIELDS = {  # name -> default; a change here is a change for every user
    "aligner": "grm",
    "pooling": "mean",
    "projection_dim": 512,
    "projection_type": "linear",
    "num_regions": 5,
    "attention_direction": "t2i",
    "patch_keep_share": 0.5,
    "patch_dropout": 0.0,
    "use_patch_adapter": True,
    "use_word_adapter": True,
    "use_region_prompts": True,
    "use_region_uncertainty": True,
    "region_logit_scale": 30.0,
    "saliency_temperature": 1.0,
    "level_weights": [0.4, 0.4, 0.2],
    "margin": 0.2,
    "reconstruction_weight": 0.01,
    "kl_weight": 0.001,
    "entropy_weight": 0.01,
    "patch_budget": 0.5,
    "budget_weight": 0.0,
    "use_special_tokens": True,
    "use_prefix_tokens": False,
    "special_token_ids": [0],  # of the default BertConfig: padding
    "num_prefix_tokens": 1,  # of the default ViTConfig: the class token
    "patch_pool_size": 1,
    "logit_scale": 1.0,
    "standard_error_factor": 1.0,
    "confidence_measure": "margin",
    "confidence_coefficients": None,
    "conformal_thresholds": None,
}


def test_field_names_and_defaults_are_frozen():
    config, common = GranAlignConfig(), PreTrainedConfig().to_dict()
    own = {name: value for name, value in config.to_dict().items() if name not in common}
    assert isinstance(config.vision_config, ViTConfig) and isinstance(config.text_config, BertConfig)
    assert own.pop("vision_config")["model_type"] == "vit" and own.pop("text_config")["model_type"] == "bert"
    assert own.pop("model_type", "granalign") == "granalign"
    assert own == OWN_FIELDS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"aligner": "scan++"},
            r"`aligner` must be one of \['chan', 'grm', 'laps', 'max_mean', 'scan', 'vse\+\+'\], got 'scan\+\+'",
        ),
        ({"pooling": "max"}, r"`pooling` of the aligner 'grm' must be one of \('mean',\), got 'max'"),
        ({"aligner": "chan", "pooling": "max"}, r"`pooling` of the aligner 'chan' .* got 'max'"),
        ({"aligner": "vse++", "pooling": "logsumexp"}, r"`pooling` of the aligner 'vse\+\+' .* got 'logsumexp'"),
        ({"aligner": "max_mean", "pooling": "max"}, r"`pooling` of the aligner 'max_mean'"),
        ({"projection_type": "cnn"}, "`projection_type` must be one of .* got 'cnn'"),
        ({"attention_direction": "up"}, "`attention_direction` must be one of .* got 'up'"),
        ({"aligner": "laps", "pooling": "max"}, r"`pooling` of the aligner 'laps' must be one of \('mean',\), got 'max'"),
        ({"patch_keep_share": 0}, r"`patch_keep_share` must lie in \(0, 1\], got 0"),
        ({"patch_keep_share": 1.1}, r"`patch_keep_share` must lie in \(0, 1\], got 1.1"),
        ({"patch_keep_share": float("nan")}, r"`patch_keep_share` must lie in \(0, 1\], got nan"),
        ({"patch_dropout": 1.0}, r"`patch_dropout` must lie in \[0, 1\), got 1.0"),
        ({"num_regions": 0}, "`num_regions` must be at least 1, got 0"),
        ({"projection_dim": -4}, "`projection_dim` must be at least 1, got -4"),
        ({"patch_pool_size": 0}, "`patch_pool_size` must be at least 1, got 0"),
        ({"region_logit_scale": 0.0}, "`region_logit_scale` must be greater than 0 and finite, got 0.0"),
        ({"saliency_temperature": 0}, "`saliency_temperature` must be greater than 0 and finite, got 0"),
        ({"margin": -0.2}, "`margin` must be greater than 0 and finite, got -0.2"),
        ({"margin": float("nan")}, "`margin` must be greater than 0 and finite, got nan"),
        ({"kl_weight": float("inf")}, "`kl_weight` must be at least 0 and finite, got inf"),
        ({"reconstruction_weight": -1.0}, "`reconstruction_weight` must be at least 0"),
        ({"entropy_weight": float("nan")}, "`entropy_weight` must be finite, got nan"),
        ({"patch_dropout": 0.2, "use_region_prompts": False}, "`patch_dropout` needs `use_region_prompts`"),
        ({"num_prefix_tokens": -1}, "`num_prefix_tokens` must be at least 0"),
        (
            {"level_weights": [0.5, 0.5]},
            r"`level_weights` must be three values of at least 0 that sum to 1, got \[0.5, 0.5\]",
        ),
        ({"level_weights": [0.5, 0.5, 0.5]}, "`level_weights` must be three values of at least 0 that sum to 1"),
        ({"level_weights": [1.2, -0.4, 0.2]}, "`level_weights` must be three values of at least 0 that sum to 1"),
        ({"level_weights": [0.4, 0.4, float("nan")]}, "`level_weights` must be three values"),
        ({"logit_scale": 0.0}, "`logit_scale` must be greater than 0 and finite, got 0.0"),
        ({"standard_error_factor": -1.0}, "`standard_error_factor` must be greater than 0 and finite, got -1.0"),
        ({"confidence_measure": "length"}, "`confidence_measure` must be one of .* got 'length'"),
        ({"confidence_coefficients": [1.0, 2.0]}, r"`confidence_coefficients` must be 4 finite values, got \[1.0, 2.0\]"),
        ({"confidence_coefficients": [1.0, 2.0, 0.0, float("nan")]}, "`confidence_coefficients` must be 4 finite values"),
        ({"conformal_thresholds": [-0.1, 0.1]}, r"`conformal_thresholds` must be 2 finite values of at least 0, got \[-0.1"),
        ({"conformal_thresholds": [0.1, float("inf")]}, "`conformal_thresholds` must be 2 finite values"),
    ],
)
def test_a_value_out_of_range_is_named(fields, message):
    with pytest.raises(StrictDataclassError, match=message) as caught:
        GranAlignConfig(**fields)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "fields",
    [
        {"aligner": 1},
        {"pooling": None},
        {"num_regions": "5"},
        {"num_regions": 5.0},
        {"num_regions": True},
        {"projection_dim": None},
        {"patch_keep_share": "half"},
        {"margin": "0.2"},
        {"kl_weight": [0.1]},
        {"level_weights": 0.4},
        {"level_weights": ["a", "b", "c"]},
        {"use_special_tokens": 1},
        {"use_prefix_tokens": "no"},
        {"special_token_ids": [0.5]},
        {"num_prefix_tokens": "1"},
        {"vision_config": 3},
    ],
    ids=str,
)
def test_a_wrong_type_is_named(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))) as caught:
        GranAlignConfig(**fields)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_wrong_type_is_refused_later_too():
    config = GranAlignConfig()
    with pytest.raises(StrictDataclassError, match="num_regions"):
        config.num_regions = "5"


def test_every_aligner_with_each_of_its_poolings():
    for aligner, pooling in [("grm", "mean"), ("max_mean", "mean"), ("chan", "mean"), ("chan", "logsumexp")]:
        assert GranAlignConfig(aligner=aligner, pooling=pooling).aligner == aligner
    for pooling in ("mean", "max"):
        assert GranAlignConfig(aligner="vse++", pooling=pooling).pooling == pooling


def test_json_round_trip(tmp_path):
    values = {
        "aligner": "chan",
        "pooling": "logsumexp",
        "patch_keep_share": 0.25,
        "projection_dim": 24,
        "num_regions": 7,
        "level_weights": (1, 0, 0),
        "region_logit_scale": 4,
        "entropy_weight": -0.5,
        "special_token_ids": [3, 9],
        "num_prefix_tokens": 2,
        "use_special_tokens": False,
        "logit_scale": 12.5,
        "confidence_measure": "margin_in_errors",
        "confidence_coefficients": [0.5, -2.0, 0.25, -3.0],
        "conformal_thresholds": [0.125, 0.25],
    }
    vision = SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[1, 2])
    text = BertConfig(hidden_size=12, num_attention_heads=2)
    config = GranAlignConfig.from_vision_text_configs(vision, text, **values)
    from_json = GranAlignConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert from_json.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for copy in (from_json, GranAlignConfig.from_pretrained(tmp_path)):
        for name, value in (values | {"level_weights": [1, 0, 0]}).items():
            assert getattr(copy, name) == value
        assert isinstance(copy.vision_config, SwinConfig) and copy.vision_config.depths == [1, 1]
        assert isinstance(copy.text_config, BertConfig) and copy.text_config.hidden_size == 12


def test_a_dict_names_the_type_of_its_encoder():
    config = GranAlignConfig(vision_config={"model_type": "swin", "embed_dim": 12}, text_config={"hidden_size": 24})
    assert isinstance(config.vision_config, SwinConfig) and config.vision_config.embed_dim == 12
    assert isinstance(config.text_config, BertConfig) and config.text_config.hidden_size == 24
    assert config.num_prefix_tokens == 0


def test_token_rules_come_from_the_encoders_unless_given():
    text = BertConfig(pad_token_id=5, bos_token_id=7, eos_token_id=6)
    config = GranAlignConfig.from_vision_text_configs(ViTConfig(), text)
    assert config.num_prefix_tokens == 1 and config.special_token_ids == [5, 6, 7]
    config = GranAlignConfig.from_vision_text_configs(ViTConfig(), text, num_prefix_tokens=0, special_token_ids=[])
    assert config.num_prefix_tokens == 0 and config.special_token_ids == []


def test_special_tokens_can_be_left_out_only_where_their_ids_are_known():
    """BERT's config declares padding only: [CLS] and [SEP] would be scored as words."""
    message = r"`use_special_tokens=False` needs the ids .* \(bert\) declares none besides padding. Pass `special_token_ids`"
    with pytest.raises(ValueError, match=message):
        GranAlignConfig(use_special_tokens=False)
    assert GranAlignConfig(use_special_tokens=False, special_token_ids=[0]).special_token_ids == [0]
    declared = GranAlignConfig(use_special_tokens=False, text_config={"model_type": "bert", "eos_token_id": 3})
    assert declared.special_token_ids == [0, 3]
