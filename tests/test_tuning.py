"""Layer-wise rates in encoders of every kind; LoRA: what trains, what is saved, what is resumed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT, VISION, tiny_inputs, tiny_model
from transformers import AutoModel, AutoProcessor

from granalign_hf.training import arguments, train
from granalign_hf.training.arguments import parse_arguments
from granalign_hf.training.build import build
from granalign_hf.training.data import load_split
from granalign_hf.training.scoring import scored_split
from granalign_hf.training.tuning import adapted_layers, add_adapters, layer_depths, merged_state, parameter_groups

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SMALL = [
    *("--num_scenes", "24", "--max_eval_images", "12", "--batch_size", "8", "--epochs", "2", "--eval_interval", "2"),
    *("--projection_dim", "16", "--report_to", "none", "--lr_scheduler", "constant"),
    *("--vision_config", json.dumps({"model_type": "vit", "image_size": 32, "patch_size": 8, **ENCODER})),
    *("--text_config", json.dumps({"model_type": "bert", "max_position_embeddings": 48, **ENCODER})),
]
ENCODERS = [("vision", name) for name in VISION] + [("text", name) for name in TEXT]
WITHOUT_LINEAR = ("resnet", "gru")


def model_on(side: str, name: str):
    return tiny_model(vision=VISION[name]().config) if side == "vision" else tiny_model(text=TEXT[name]())


def rates(model, *words: str) -> dict[str, float]:
    """Parameter -> its learning rate."""
    groups = parameter_groups(model, parse_arguments([*SMALL, *words])[0])
    of_tensor = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: of_tensor[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weight_decay_is_for_matrices(weight_decay):
    run, _, _ = parse_arguments([*SMALL, "--weight_decay", str(weight_decay)])
    model = tiny_model()
    groups = parameter_groups(model, run)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (weight_decay if parameter.ndim > 1 else 0)


def test_rates_by_layer_are_exact():
    model = tiny_model()  # ViT and BERT of two blocks
    rate = rates(model, "--learning_rate", "0.1", "--encoder_lr_factor", "0.5", "--layer_decay", "0.5")
    expected = {
        "patch_projection": 0.1,
        "word_projection": 0.1,
        "aligner": 0.1,
        "vision_model.layernorm": 0.05,
        "vision_model.layers.1": 0.025,
        "vision_model.layers.0": 0.0125,
        "vision_model.embeddings": 0.00625,
        "text_model.encoder.layer.1": 0.025,
        "text_model.encoder.layer.0": 0.0125,
        "text_model.embeddings": 0.00625,
    }
    for name, value in rate.items():
        (prefix,) = [prefix for prefix in expected if name.startswith(f"{prefix}.")]
        assert value == pytest.approx(expected[prefix], rel=1e-12), name
    flat = rates(model, "--learning_rate", "0.1", "--encoder_lr_factor", "0.5")
    assert set(flat.values()) == {0.1, 0.05}


@pytest.mark.parametrize(("side", "name"), ENCODERS)
def test_depths_follow_the_order_in_which_an_encoder_computes(side, name):
    model = model_on(side, name)
    encoder = getattr(model, f"{side}_model")
    depths, num_blocks = layer_depths(encoder)
    assert depths.keys() == {name for name, _ in encoder.named_parameters()}
    assert num_blocks == (1 if name == "gru" else 2) and {*range(num_blocks + 1)} <= {*depths.values()}
    seen = []
    for path, module in encoder.named_modules():
        own = [depths[f"{path}.{leaf}"] for leaf, _ in module.named_parameters(recurse=False)] if path else []
        if own and not isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda *_, depth=own[0]: seen.append(depth))
        elif own and isinstance(module, torch.nn.Embedding):
            assert own == [0]
    size = encoder.config.image_size if side == "vision" and name != "resnet" else 16
    model(**tiny_inputs(1, 1, image_size=(size, size)))
    assert seen == sorted(seen) and len(seen) >= num_blocks


@pytest.mark.parametrize(("side", "name"), [encoder for encoder in ENCODERS if encoder[1] not in WITHOUT_LINEAR])
def test_merged_adapters_score_as_the_adapted_model(side, name):
    model, plain = model_on(side, name), model_on(side, name)
    for parameter in (*model.parameters(), *plain.parameters()):
        if 0 < parameter.abs().max() < 1e-5:  # ConvNeXt starts its layers at a scale of 1e-6
            torch.nn.init.ones_(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_adapters(model, parse_arguments([*SMALL, "--lora_rank", "2", "--lora_alpha", "6", "--lora_encoders", side])[0])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in before if not name.startswith(("vision_model.", "text_model."))}
    adapters = trainable - heads
    assert heads < trainable and all(name.startswith(f"{side}_model.") and ".lora_" in name for name in adapters)
    for adapter in adapters:
        torch.nn.init.normal_(model.get_parameter(adapter), std=0.3)
    state = merged_state(model)
    assert state.keys() == plain.state_dict().keys()
    size = plain.config.vision_config.image_size
    inputs = tiny_inputs(image_size=(size, size))
    unadapted = plain(**inputs).logits_per_image
    plain.load_state_dict(state)
    scores, adapted = plain(**inputs).logits_per_image, model(**inputs).logits_per_image
    assert (unadapted - adapted).abs().max() > 1e-3
    torch.testing.assert_close(scores, adapted, atol=1e-5, rtol=0)
    after = dict(model.named_parameters())
    for name, value in before.items():  # merging has left the model as it was
        assert torch.equal(value, after[name] if name in after else after[_inner(name)]), name


def _inner(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}"


def test_adapters_are_for_attention_where_there_is_any():
    kinds = {
        ("vision", "vit"): {"q_proj", "k_proj", "v_proj", "o_proj"},
        ("vision", "siglip_vision"): {"q_proj", "k_proj", "v_proj", "out_proj"},
        ("vision", "swinv2"): {"query", "key", "value", "dense"},
        ("vision", "convnext"): {"pwconv1", "pwconv2"},
        ("text", "bert"): {"query", "key", "value", "dense"},
        ("text", "modernbert"): {"Wqkv", "Wo"},
    }
    for (side, name), layers in kinds.items():
        targets = adapted_layers(getattr(model_on(side, name), f"{side}_model"))
        assert {target.rpartition(".")[2] for target in targets} == layers, name
        assert not any("mlp" in target or "intermediate" in target for target in targets)


@pytest.mark.parametrize(("side", "name"), [encoder for encoder in ENCODERS if encoder[1] in WITHOUT_LINEAR])
def test_an_encoder_without_linear_layers_is_refused_by_name(side, name):
    run = parse_arguments([*SMALL, "--lora_rank", "2", "--lora_encoders", side])[0]
    with pytest.raises(ValueError, match=rf"the {side} encoder \({name}.*\) has none. Set `lora_encoders`"):
        add_adapters(model_on(side, name), run)


def test_without_peft_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse_arguments([*SMALL, "--lora_rank", "2"])
    assert 'lora_rank needs the Python package peft: pip install "granalign-hf[peft]"' in capsys.readouterr().err


LORA = [*SMALL, "--lora_rank", "2", "--encoder_lr_factor", "1"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    return folder, train.main([*LORA, "--output_dir", str(folder)])


def resume_state(folder) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("state/*/model.safetensors")
    return {name.removeprefix("model."): weight for name, weight in load_file(file).items()}


def test_training_touches_adapters_and_heads_only(adapted):
    folder, _ = adapted
    run, fields, _ = parse_arguments([*LORA, "--output_dir", str(folder)])
    torch.manual_seed(run.seed)
    fresh, _ = build(run, fields, load_split("scenes", "train", num_scenes=24).all_captions)
    add_adapters(fresh, run)
    after = resume_state(folder)
    for name, parameter in fresh.named_parameters():
        is_head = not name.startswith(("vision_model.", "text_model."))
        assert parameter.requires_grad == (is_head or ".lora_" in name), name
        assert torch.equal(parameter, after[name]) != parameter.requires_grad, name


def test_the_checkpoint_is_a_plain_model_that_scores_as_measured(adapted, tmp_path, monkeypatch):
    folder, state = adapted
    run, fields, _ = parse_arguments(LORA)
    trained, _ = build(run, fields, load_split("scenes", "train", num_scenes=24).all_captions)
    add_adapters(trained, run)
    assert state["best_epoch"] == state["epoch"] == 2  # the saved state is that of the checkpoint
    trained.load_state_dict(resume_state(folder))
    monkeypatch.setitem(sys.modules, "peft", None)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    names = {*load_file(folder / "model.safetensors")}
    assert not any("lora" in name or "base_layer" in name for name in names) and not list(folder.glob("adapter*"))
    data = load_split("scenes", "validation").first(12)
    with scored_split(model, processor, data, 64, tmp_path / "merged") as (scores, _):
        merged = torch.from_numpy(scores.copy())
    with scored_split(trained, processor, data, 64, tmp_path / "adapted") as (scores, _):
        torch.testing.assert_close(merged, torch.from_numpy(scores.copy()), atol=1e-5, rtol=0)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["lora"] == {"rank": 2, "alpha": 16, "encoders": "both"}
    assert "| LoRA | rank 2, alpha 16, in both encoders |" in (folder / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_adapters(adapted, tmp_path):
    folder, _ = adapted
    train.main([*LORA, "--output_dir", str(tmp_path), "--epochs", "1"])
    train.main([*LORA, "--output_dir", str(tmp_path), "--resume"])
    expected, got = resume_state(folder), resume_state(tmp_path)
    assert expected.keys() == got.keys() and any(".lora_A." in name for name in got)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_frozen_side_keeps_its_statistics(tmp_path):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
              "image_size": 32, "num_channels": 3}  # fmt: skip
    words = [*LORA, "--lora_encoders", "text", "--vision_config", json.dumps(resnet), "--epochs", "1"]
    train.main([*words, "--output_dir", str(tmp_path)])
    fresh, _ = build(*parse_arguments(words)[:2], load_split("scenes", "train", num_scenes=24).all_captions)
    after = resume_state(tmp_path)
    means = [name for name, _ in fresh.named_buffers() if name.endswith("running_mean")]
    assert means and all(not after[name].any() for name in means)
