"""Any batch, drawn by hypothesis: what a score may depend on, and that input either works or is refused in words."""

from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_modeling import ALIGNERS
from tiny import LONGEST_CAPTION, TEXT, VISION, VOCABULARY, tiny_model, tiny_processor

from granalign_hf.modeling import pairwise

# The same examples each time; how long one takes is the machine's affair.
common = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
ENCODERS = [("vit", "bert"), ("convnext", "gru"), ("swin", "modernbert"), ("resnet", "clip_text"), ("dinov2", "distilbert")]
SIZES = {"vit": 16, "swin": 16, "dinov2": 16, "convnext": 32, "resnet": 24}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MASK_DTYPES = [torch.int64, torch.int32, torch.bool, torch.float32]


@cache
def model_of(encoders: tuple[str, str], aligner: str):
    vision, text = encoders
    return tiny_model(VISION[vision]().config, TEXT[text](), **ALIGNERS[aligner])


@st.composite
def batches(draw) -> dict:
    """A model, images with repetitions, captions of 1 to 40 tokens, and their padding."""
    encoders = draw(st.sampled_from(ENCODERS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lengths = draw(st.lists(st.integers(1, LONGEST_CAPTION), min_size=1, max_size=5))
    which = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))  # of three images
    pool = torch.randn(3, 3, SIZES[encoders[0]], SIZES[encoders[0]], generator=generator)
    return {
        "model": model_of(encoders, draw(st.sampled_from(sorted(ALIGNERS)))),
        "which": which,
        "pixel_values": pool[which].to(draw(st.sampled_from(DTYPES))),
        "captions": [torch.randint(5, 99, (length,), generator=generator) for length in lengths],
        "mask_dtype": draw(st.sampled_from(MASK_DTYPES)),
        "generator": generator,
    }


def padded(captions: list[torch.Tensor], mask_dtype: torch.dtype, extra: int, junk: torch.Generator) -> dict:
    """Captions side by side; in the padding stands anything."""
    longest = max(len(caption) for caption in captions) + extra
    ids = torch.randint(5, 99, (len(captions), longest), generator=junk)
    for row, caption in enumerate(captions):
        ids[row, : len(caption)] = caption
    lengths = torch.tensor([len(caption) for caption in captions])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).to(mask_dtype)}


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@settings(max_examples=40, **common)
@given(batch=batches(), data=st.data())
@torch.no_grad()
def test_a_pair_scores_as_it_does_alone(batch, data):
    """Whatever its neighbours, their order, the padding and the budget of memory."""
    model, pixels, captions = batch["model"], batch["pixel_values"], batch["captions"]
    extra = data.draw(st.integers(0, LONGEST_CAPTION - max(len(caption) for caption in captions)))
    text = padded(captions, batch["mask_dtype"], extra, batch["generator"])
    with patch.object(pairwise, "CPU_BUDGET", data.draw(st.sampled_from([1, 200, 3000, 1 << 24]))):
        together = model(pixel_values=pixels, **text)
    scores = together.logits_per_image
    assert scores.shape == (len(pixels), len(captions)) and scores.isfinite().all() and scores.dtype == torch.float32
    image = data.draw(st.integers(0, len(pixels) - 1))
    caption = data.draw(st.integers(0, len(captions) - 1))
    alone = model(pixel_values=pixels[image][None], input_ids=captions[caption][None])
    close(scores[image, caption], alone.logits_per_image[0, 0])
    close(together.patch_embeds[image], alone.patch_embeds[0])
    close(together.word_embeds[caption][: len(captions[caption])], alone.word_embeds[0])
    images = data.draw(st.permutations(range(len(pixels))))
    order = data.draw(st.permutations(range(len(captions))))
    moved = model(pixel_values=pixels[images], **{name: value[order] for name, value in text.items()})
    close(moved.logits_per_image, scores[images][:, order])
    for one, name in enumerate(batch["which"]):  # the same image twice: the same scores
        close(scores[one], scores[batch["which"].index(name)])


@settings(max_examples=15, **common)
@given(batch=batches(), data=st.data())
def test_loss_and_gradients_are_those_of_any_order_and_budget(batch, data):
    """One caption an image at least; images may repeat, and captions of one image are no negatives of each other."""
    model, pixels, captions = batch["model"], batch["pixel_values"], batch["captions"]
    image_ids = torch.tensor(batch["which"])
    owners = torch.tensor([batch["which"][number % len(pixels)] for number in range(len(captions))])
    use_hard_negatives = data.draw(st.booleans())

    def loss_and_gradients(images: list[int], order: list[int], budget: int):
        text = padded([captions[number] for number in order], batch["mask_dtype"], 0, batch["generator"])
        ids = {"image_ids": image_ids[images], "caption_image_ids": owners[order], "use_hard_negatives": use_hard_negatives}
        model.zero_grad()
        with patch.object(pairwise, "CPU_BUDGET", budget):
            loss = model(pixel_values=pixels[images], **text, **ids, return_loss=True).loss
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}

    same = list(range(len(pixels))), list(range(len(captions)))
    loss, gradients = loss_and_gradients(*same, budget=1 << 24)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    moved = data.draw(st.permutations(same[0])), data.draw(st.permutations(same[1]))
    other, others = loss_and_gradients(*moved, budget=data.draw(st.sampled_from([1, 500, 1 << 24])))
    close(loss, other)
    scale = max(1.0, *(float(gradient.abs().max()) for gradient in gradients.values()))
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


# ------------------------------------------------------------------------------------------------------------ processor


@st.composite
def pictures(draw):
    """A picture of any size and mode, as PIL image, array or tensor."""
    width, height = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    colours = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kind = draw(
        st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "grey", "hwc", "rgba", "chw", "float"])
    )
    if kind in ("grey", "hwc", "rgba"):
        channels = {"grey": 0, "hwc": 3, "rgba": 4}[kind]
        return np.resize(colours, (height, width, channels) if channels else (height, width))
    if kind in ("chw", "float"):
        tensor = torch.from_numpy(colours).permute(2, 0, 1).contiguous()
        return tensor if kind == "chw" else tensor.to(draw(st.sampled_from(DTYPES)))
    if kind == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), dtype=np.uint16))
    return Image.fromarray(colours).convert(kind)


@settings(max_examples=40, **common)
@given(images=st.lists(pictures(), min_size=1, max_size=4), data=st.data())
def test_a_picture_of_any_size_and_kind_has_the_pixels_that_it_has_alone(images, data):
    processor = tiny_processor()
    together = processor(images=images, return_tensors="pt")["pixel_values"]
    assert together.shape == (len(images), 3, 16, 16) and together.isfinite().all() and together.abs().max() <= 1
    number = data.draw(st.integers(0, len(images) - 1))
    assert torch.equal(processor(images=images[number], return_tensors="pt")["pixel_values"][0], together[number])


words = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=60).map(" ".join)


@settings(max_examples=60, **common)
@given(captions=st.lists(st.one_of(words, st.text(min_size=1, max_size=80)), min_size=1, max_size=5), data=st.data())
def test_any_text_is_tokens_or_refused_by_its_place(captions, data):
    processor = tiny_processor(model_max_length=LONGEST_CAPTION)
    blank = [place for place, caption in enumerate(captions) if not caption.strip()]
    if blank:
        with pytest.raises(ValueError, match=f"Caption {blank[0]} is empty"):
            processor(text=captions)
        return
    together = processor(text=captions, return_tensors="pt")
    ids, mask = together["input_ids"], together["attention_mask"].bool()
    assert ids.shape == mask.shape and ids.shape[1] <= LONGEST_CAPTION and mask.any(1).all()
    number = data.draw(st.integers(0, len(captions) - 1))
    assert processor(text=captions[number])["input_ids"] == ids[number][mask[number]].tolist()
    assert tiny_model()(pixel_values=torch.zeros(1, 3, 16, 16), **together).logits_per_image.isfinite().all()


# ------------------------------------------------------------------------------- what these properties brought to light


@pytest.mark.parametrize("caption", ["half a \ud83d", "\udc00"])
def test_half_a_character_is_refused_by_its_place(caption):
    with pytest.raises(ValueError, match="Caption 1 holds half a character"):
        tiny_processor()(text=["a dog", caption])


@pytest.mark.parametrize("caption", ["\x00", "\u200b", "\u0301"])
def test_captions_that_become_no_token_at_all_are_announced(caption, caplog):
    tiny_processor()(text=["a dog", caption])
    assert "1 of 2 captions have no word that the tokenizer knows" in caplog.text


@pytest.mark.parametrize("shape", [(8, 9, 2), (1, 8, 9), (4, 8, 9)])
@pytest.mark.parametrize("kind", [torch.ones, np.ones], ids=["tensor", "array"])
def test_arrays_without_three_channels_are_refused_by_their_place(shape, kind):
    with pytest.raises(ValueError, match="Image 0 must have three channels, first or last, got"):
        tiny_processor()(images=kind(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"pixel_values": i["pixel_values"][:0]}, r"`pixel_values` must be a tensor .* got \(0, 3, 16, 16\)"),
        (lambda i: {"input_ids": i["input_ids"][:0]}, r"`input_ids` must be a tensor .* got \(0, 4\)"),
        (lambda i: {"input_ids": i["input_ids"][:, :0]}, r"`input_ids` must be a tensor .* got \(2, 0\)"),
        (
            lambda i: {"input_ids": i["input_ids"].float()},
            "`input_ids` must hold integers of 64 or 32 bits, got torch.float32",
        ),
        (lambda i: {"input_ids": i["input_ids"].byte()}, "`input_ids` must hold integers of 64 or 32 bits, got torch.uint8"),
    ],
)
def test_empty_and_other_tensors_are_refused_by_name(change, message):
    inputs = {"pixel_values": torch.zeros(1, 3, 16, 16), "input_ids": torch.full((2, 4), 7)}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(inputs | change(inputs)))
