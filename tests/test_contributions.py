"""The shares of words and patches: they add up to the score, and each is what plain loops find."""

import math
from types import SimpleNamespace

import pytest
import reference
import torch
from test_aligners import build, describe
from tiny import tiny_inputs, tiny_model

from granalign_hf.modeling.contributions import PairShares, one_row, pair_parts

ALIGNERS = [
    {"name": "grm", "level_weights": [0.5, 0.3, 0.2]},
    {"name": "grm", "use_patch_adapter": False, "use_region_uncertainty": False},
    {"name": "grm", "use_region_prompts": False},
    {"name": "max_mean"},
    {"name": "chan", "pooling": "mean"},
    {"name": "chan", "pooling": "logsumexp"},
    {"name": "scan", "attention_direction": "t2i"},
    {"name": "scan", "attention_direction": "i2t"},
    {"name": "scan", "attention_direction": "both"},
    {"name": "laps"},
    {"name": "laps", "patch_keep_share": 1.0},
    {"name": "vse++", "pooling": "mean"},
    {"name": "vse++", "pooling": "max"},
]
IDS = ["-".join(map(str, fields.values())) for fields in ALIGNERS]


def make(*args, **fields):
    return build(*args, **fields).requires_grad_(False)


def explained(aligner, tokens, image_index, caption_index):
    """The shares of one pair, with the score that all pairs together give it."""
    image, text = describe(aligner, tokens)
    levels = aligner.similarities(image, text)
    score = sum(weight * scores for weight, scores in zip(aligner.level_weights, levels, strict=True))
    parts = pair_parts(aligner, one_row(image, "patch", image_index), one_row(text, "word", caption_index))
    return PairShares(score[image_index, caption_index].item(), parts)


def real(tokens, image_index, caption_index):
    """(w, d) words and (v, d) patches of a pair, with the positions of both."""
    words = tokens["word_mask"][caption_index].nonzero()[:, 0].tolist()
    patches = tokens["patch_mask"][image_index].nonzero()[:, 0].tolist()
    return tokens["word_embeds"][caption_index, words], tokens["patch_embeds"][image_index, patches], words, patches


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("fields", ALIGNERS, ids=IDS)
def test_shares_add_up_to_the_score_of_every_pair(draw_tokens, fields, dtype, tolerance):
    aligner, tokens = make(dtype=dtype, **fields), draw_tokens(0, dtype=dtype)
    for image_index in range(3):
        for caption_index in range(4):
            shares = explained(aligner, tokens, image_index, caption_index)
            total = math.fsum(contribution.share for contribution in shares.contributions)
            assert total == pytest.approx(shares.score, abs=tolerance)
            assert shares.patch_shares.sum().item() == pytest.approx(shares.score, abs=tolerance)
            is_real = tokens["word_mask"][caption_index][:, None] & tokens["patch_mask"][image_index]
            assert shares.patch_shares.shape == is_real.shape and not shares.patch_shares[~is_real].any()
            for part in shares.parts:  # by words, a part is the same over places and over patches
                torch.testing.assert_close(part.shares.sum(1), part.patch_shares.sum(1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_grm_matches_each_word_and_each_place_once_a_level(draw_tokens, seed):
    weights = {"original": 0.5, "key": 0.3, "uncertain": 0.2}
    aligner, tokens = make(level_weights=list(weights.values())), draw_tokens(seed)
    image, text = describe(aligner, tokens)
    words, patches, word_positions, patch_positions = real(tokens, 1, 2)
    salient_words = words * text.word_saliency[2, word_positions, None]
    salient_patches = patches * image.patch_saliency[1, patch_positions, None]
    places = {"original": patches, "key": salient_patches, "uncertain": image.region_means[1]}
    expected = {}
    for level, of_level in places.items():
        of_words = words if level == "original" else salient_words
        positions = range(3) if level == "uncertain" else patch_positions
        products = {
            (w, p): float(word @ place)
            for w, word in zip(word_positions, of_words, strict=True)
            for p, place in zip(positions, of_level, strict=True)
        }
        for w in word_positions:
            p = max(positions, key=lambda place: products[w, place])
            expected[w, p, level, "t2i"] = weights[level] * products[w, p] / len(word_positions)
        for p in positions:
            w = max(word_positions, key=lambda word: products[word, p])
            expected[w, p, level, "i2t"] = weights[level] * products[w, p] / len(positions)
    contributions = explained(aligner, tokens, 1, 2).contributions
    found = {(c.word, c.place, c.level, c.direction): c.share for c in contributions}
    assert len(found) == len(contributions) and found == pytest.approx(expected, abs=1e-12)
    assert {c.kind for c in contributions if c.level == "uncertain"} == {"region"}
    assert {c.kind for c in contributions if c.level != "uncertain"} == {"patch"}
    magnitudes = [abs(c.share) for c in contributions]
    assert magnitudes == sorted(magnitudes, reverse=True)


def test_a_region_is_spread_over_the_patches_that_it_is_the_mean_of(draw_tokens):
    aligner, tokens = make(level_weights=[0.0, 0.0, 1.0]), draw_tokens(2)
    image, text = describe(aligner, tokens)
    t2i, _ = (part for part in explained(aligner, tokens, 0, 0).parts if part.level == "uncertain")
    for word in tokens["word_mask"][0].nonzero()[:, 0].tolist():
        region = int(t2i.shares[word].abs().argmax())
        for patch in range(6):
            both = image.patch_saliency[0, patch] * text.word_saliency[0, word] / tokens["word_mask"][0].sum()
            product = tokens["word_embeds"][0, word] @ tokens["patch_embeds"][0, patch] * both
            expected = (image.region_assignment[0, patch, region] * product).item()
            assert t2i.patch_shares[word, patch].item() == pytest.approx(expected, abs=1e-12)


def test_a_level_without_weight_has_no_shares(draw_tokens):
    contributions = explained(make(level_weights=[1.0, 0.0, 0.0]), draw_tokens(0), 0, 0).contributions
    assert {contribution.level for contribution in contributions} == {"original"}


def test_chan_by_logsumexp_gives_each_word_its_mean_and_its_entropy(draw_tokens):
    tokens = draw_tokens(1)
    words, patches, word_positions, patch_positions = real(tokens, 2, 1)
    products = words @ patches.T
    best = products.amax(1)
    share_of = (best / 0.1).softmax(0)
    expected = share_of * best - 0.1 * share_of * share_of.log()
    shares = explained(make("chan", "logsumexp"), tokens, 2, 1)
    found = {(c.word, c.place): c.share for c in shares.contributions}
    places = [patch_positions[p] for p in products.argmax(1)]
    assert found == pytest.approx(dict(zip(zip(word_positions, places), expected.tolist())), abs=1e-12)
    assert shares.score == pytest.approx(reference.chan_score(words, patches, pooling="logsumexp").item(), abs=1e-12)


def test_features_of_max_pooling_belong_to_one_word_and_one_patch():
    """Feature by feature, by hand: the pooled vectors are (3, 4) and (0.6, 0.8), the cosine 1 = 0.36 + 0.64."""
    patches = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    words = torch.tensor([[0.6, 0.1], [0.2, 0.8], [0.1, 0.2]])
    image = SimpleNamespace(patch_embeds=patches)
    (part,) = make("vse++", "max").contributions(image, SimpleNamespace(word_embeds=words))
    torch.testing.assert_close(part.shares, torch.tensor([[0.36, 0.0], [0.0, 0.64], [0.0, 0.0]]))
    assert (part.direction, part.kind, part.level) == ("both", "patch", "original")


def test_scan_shares_are_attention_times_product(draw_tokens):
    """Of a word with each patch, by the loops' own attention; the other direction is the same with exchanged sides."""
    words, patches, *_ = real(draw_tokens(3), 0, 3)
    image, text = SimpleNamespace(patch_embeds=patches), SimpleNamespace(word_embeds=words)
    for direction, queries, contexts, inverse_temperature in (("t2i", words, patches, 9.0), ("i2t", patches, words, 4.0)):
        (part,) = make("scan", attention_direction=direction).contributions(image, text)
        shares = part.shares if direction == "t2i" else part.shares.T
        products = queries @ contexts.T
        raw = torch.where(products > 0, products, 0.1 * products)
        attention = (inverse_temperature * raw / raw.norm(dim=0)).softmax(1)
        for q in range(len(queries)):
            context = attention[q] @ contexts
            expected = attention[q] * products[q] / (queries[q].norm() * context.norm()) / len(queries)
            torch.testing.assert_close(shares[q], expected, rtol=0, atol=1e-12)


def test_laps_gives_the_patches_that_a_caption_leaves_out_a_token_of_their_own(draw_tokens):
    """With one aggregated token and one word, both directions are one product; shares are weights times products."""
    words, patches, *_ = real(draw_tokens(4, captions=1, words=1, patches=6, has_holes=False), 0, 0)
    logits = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    aligner = make("laps", patch_keep_share=0.5)
    image = SimpleNamespace(patch_embeds=patches, patch_logits=logits)
    t2i, i2t = aligner.contributions(image, SimpleNamespace(word_embeds=words))
    kept, dropped, scores = reference.laps_kept(words, patches, keep_share=0.5)
    shares = torch.zeros(2, 6, dtype=torch.float64)  # of the tokens of kept and of dropped patches
    for row, members, weights in ((0, kept, logits[kept, 0]), (1, dropped, torch.stack([scores[p] for p in dropped]))):
        weights = weights.softmax(0)
        token = weights @ patches[members]
        shares[row, members] = weights * (patches[members] @ words[0]) / token.norm()
    torch.testing.assert_close(t2i.shares[0], shares[shares.sum(1).argmax()], rtol=0, atol=1e-12)
    torch.testing.assert_close(i2t.shares[0], shares.sum(0) / 2, rtol=0, atol=1e-12)


def test_of_equal_patches_the_first_counts():
    patches = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    words = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    t2i, i2t = make("max_mean").contributions(SimpleNamespace(patch_embeds=patches), SimpleNamespace(word_embeds=words))
    torch.testing.assert_close(t2i.shares, torch.tensor([[0.5, 0, 0], [0.5, 0, 0]]))
    torch.testing.assert_close(i2t.shares, torch.tensor([[1 / 3, 1 / 3, 0], [0, 0, 0]]))


# The model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", ALIGNERS, ids=IDS)
def test_model_explains_what_it_ranks_by(fields):
    model = tiny_model(**{"aligner" if name == "name" else name: value for name, value in fields.items()})
    inputs = tiny_inputs(num_images=2, num_captions=3)
    inputs["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        outputs = model(**inputs)
        image = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    for i in range(2):
        for t in range(3):
            shares = model.explain(image, text, i, t)
            assert shares.score == pytest.approx(outputs.logits_per_image[i, t].item(), abs=1e-6)
            total = math.fsum(contribution.share for contribution in shares.contributions)
            assert total == pytest.approx(outputs.logits_per_image[i, t].item(), abs=1e-5)
            same = model.explain(outputs, outputs, i - 2, t - 3)  # rows count from the end too
            assert same.contributions == shares.contributions
            assert all(c.word < 4 for c in shares.contributions) or t != 1


def test_prefix_tokens_and_half_precision_are_explained_too():
    model = tiny_model(use_prefix_tokens=True).to(torch.bfloat16)
    inputs = tiny_inputs(1, 1)
    with torch.no_grad():
        outputs = model(**inputs)
    shares = model.explain(outputs, outputs)
    assert shares.patch_shares.shape == (7, 17)
    assert shares.patch_shares.sum().item() == pytest.approx(outputs.logits_per_image.item(), abs=1e-5)


def test_explain_refuses_training_and_rows_that_are_not_there():
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**tiny_inputs(2, 2))
    with pytest.raises(ValueError, match="`image_index` must lie below 2"):
        model.explain(outputs, outputs, 2, 0)
    with pytest.raises(ValueError, match=r"`caption_index` must lie below 2.*got -3"):
        model.explain(outputs, outputs, 0, -3)
    with pytest.raises(
        ValueError, match=r"`image` must be what `get_image_features` returns.*got str.*explanation\.explain"
    ):
        model.explain("dog.jpg", "a dog")
    with pytest.raises(ValueError, match="`text` must be what `get_text_features` returns"):
        model.explain(outputs, "a dog")
    outputs.word_mask[:] = False
    with pytest.raises(ValueError, match="at least one patch and one word"):
        model.explain(outputs, outputs)
    with pytest.raises(ValueError, match="training mode"):
        model.train().explain(outputs, outputs)
