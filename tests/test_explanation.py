"""A score taken apart: shares that add up to it, by word and place; regions; rankings; why one pair is above another."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skateboards import CAPTION, VOCABULARY, make_model, make_processor
from test_contributions import ALIGNERS, IDS
from tiny import region_model_and_processor
from transformers import BertConfig, ViTConfig

from granalign_hf import GranAlignConfig, GranAlignModel
from granalign_hf.explanation import Place, compare, explain, explain_ranking

WORDS = ["A", "skateboarder's", "red", "T-shirt", ",", "café", "."]


def picture(seed=0, size=(200, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def total(explanation):
    return math.fsum(contribution.share for contribution in explanation.contributions)


@pytest.mark.parametrize("fields", ALIGNERS, ids=IDS)
def test_an_explanation_adds_up_to_the_score(fields):
    model = make_model(fields["name"], use_prefix_tokens=True, **{k: v for k, v in fields.items() if k != "name"})
    processor = make_processor()
    explanation = explain(model, processor, picture(), CAPTION)
    inputs = processor(images=picture(), text=CAPTION, return_tensors="pt")
    with torch.no_grad():
        score = model(**inputs).logits_per_image.item()
    assert explanation.score == pytest.approx(score, abs=1e-6)
    assert total(explanation) == pytest.approx(score, abs=1e-5)
    assert math.fsum(share for _, share in explanation.word_shares) == pytest.approx(score, abs=1e-5)
    assert explanation.share_maps.shape == (9, 3, 5) and explanation.prefix_shares.shape == (9,)
    assert (explanation.share_map.sum() + explanation.prefix_shares.sum()).item() == pytest.approx(score, abs=1e-5)
    # All that takes part, special tokens as such; pieces of a word are one.
    assert [word.text for word in explanation.tokens] == ["[CLS]", *WORDS, "[SEP]"]
    assert [word.text for word in explanation.tokens if word.is_special] == ["[CLS]", "[SEP]"]
    assert [word.text for word in explanation.words] == WORDS
    for row, (word, share) in enumerate(explanation.word_shares):
        places = explanation.top_places(word)
        assert math.fsum(own for _, own in places) == pytest.approx(share, abs=1e-9)
        on_patches = explanation.share_maps[row].sum() + explanation.prefix_shares[row]
        assert on_patches.item() == pytest.approx(share, abs=1e-6)
    assert {c.place.kind for c in explanation.contributions} <= {"patch", "prefix", "region"}
    assert bool(explanation.regions) == (fields["name"] == "grm")


def test_special_tokens_that_take_no_part_are_not_listed():
    explanation = explain(make_model(use_special_tokens=False), make_processor(), picture(), CAPTION)
    assert [word.text for word in explanation.tokens] == WORDS
    assert total(explanation) == pytest.approx(explanation.score, abs=1e-5)


def test_contributions_are_those_of_the_model_with_pieces_merged():
    model, processor = make_model(use_prefix_tokens=True), make_processor()
    explanation = explain(model, processor, picture(), CAPTION)
    with torch.no_grad():
        outputs = model(**processor(images=picture(), text=CAPTION, return_tensors="pt"))
    expected = {}
    for word, place, kind, level, direction, share in model.explain(outputs, outputs).contributions:
        (number,) = (n for n, one in enumerate(explanation.tokens) if word in one.tokens)
        if kind == "patch":
            kind, place = ("prefix", 0) if place == 0 else ("patch", place - 1)
        key = (number, kind, place, level, direction)
        expected[key] = expected.get(key, 0) + share
    numbers = {word: number for number, word in enumerate(explanation.tokens)}
    found = {
        (numbers[c.word], c.place.kind, c.place.index, c.level, c.direction): c.share for c in explanation.contributions
    }
    assert len(found) == len(explanation.contributions)
    assert found == pytest.approx(expected, abs=1e-6)
    magnitudes = [abs(c.share) for c in explanation.contributions]
    assert magnitudes == sorted(magnitudes, reverse=True)
    assert Place("patch", 7, (80.0, 20.0, 120.0, 40.0)) in {c.place for c in explanation.contributions}  # row 1, column 2


def test_one_word_has_many_places_and_one_place_many_words():
    explanation = explain(make_model(), make_processor(), picture(), CAPTION)
    for word in explanation.tokens:
        for kind in (None, "patch", "region"):
            places = explanation.top_places(word, kind)
            assert [share for _, share in places] == sorted((share for _, share in places), reverse=True)
            assert kind is None or all(place.kind == kind for place, _ in places)
            for place, share in places:
                mine = [c.share for c in explanation.contributions if c.word == word and c.place == place]
                assert share == pytest.approx(math.fsum(mine), abs=1e-12)
                assert (word, pytest.approx(share, abs=1e-12)) in explanation.top_words(place)
    region_words = [explanation.top_words(Place("region", number)) for number in range(5)]
    assert all(len(words) >= 1 for words in region_words)
    assert sum(share for words in region_words for _, share in words) == pytest.approx(
        sum(region.share for region in explanation.regions), abs=1e-9
    )
    assert any(len(explanation.top_places(word, "region")) > 1 for word in explanation.tokens)


# Regions ------------------------------------------------------------------------------------------------------------


def test_regions_are_those_of_the_mixture():
    model, processor = make_model(use_prefix_tokens=True), make_processor()
    explanation = explain(model, processor, picture(), CAPTION)
    with torch.no_grad():
        outputs = model(**processor(images=picture(), text=CAPTION, return_tensors="pt"))
    affinity = outputs.region_affinity[0, 1:].reshape(3, 5, 5)
    owners = torch.zeros(3, 5, dtype=torch.int)
    for region in explanation.regions:
        k = region.index
        assert region.weight == pytest.approx(outputs.region_weights[0, k].item())
        assert region.variance == pytest.approx(outputs.region_log_vars[0, k].exp().mean().item())
        torch.testing.assert_close(region.map, outputs.region_assignment[0, 1:, k].reshape(3, 5))
        assert torch.equal(region.owns, affinity.argmax(-1) == k)
        owners[region.owns] = k
        mean = outputs.region_means[0, k] / outputs.region_means[0, k].norm()
        expected = {
            word.text: torch.stack([outputs.word_embeds[0, token] @ mean for token in word.tokens]).mean().item()
            for word in explanation.content_words
        }
        assert {word.text: cosine for word, cosine in region.words} == pytest.approx(expected, abs=1e-6)
        cosines = [cosine for _, cosine in region.words]
        assert cosines == sorted(cosines, reverse=True)
    assert torch.equal(explanation.region_owners, owners)
    assert sum(region.weight for region in explanation.regions) == pytest.approx(1, abs=1e-6)


def test_aligners_without_regions_or_variances_have_none():
    explanation = explain(make_model("chan"), make_processor(), picture(), "a red dog")
    assert explanation.regions == [] and explanation.region_owners is None and explanation.patch_saliency is None
    explanation = explain(make_model(use_region_uncertainty=False), make_processor(), picture(), "a red dog")
    assert [region.variance for region in explanation.regions] == [None] * 5
    explanation = explain(make_model(), make_processor(), picture(), "of the two")  # no content: all words
    assert [len(region.words) for region in explanation.regions] == [3] * 5


# Where in the picture -----------------------------------------------------------------------------------------------


def make_spot_model():
    """CHAN on a vision encoder that sees each patch alone, so that a moved patch moves its share along."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 16}
    vision = ViTConfig(image_size=(24, 40), patch_size=8, **sizes)
    text = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=24, **sizes)
    config = GranAlignConfig.from_vision_text_configs(vision, text, aligner="vse++", projection_dim=8)
    model = GranAlignModel(config).eval()
    torch.nn.init.zeros_(model.vision_model.embeddings.position_embeddings)
    return model


@pytest.mark.parametrize("axis", [0, 1], ids=["upside down", "left to right"])
def test_shares_and_boxes_move_with_the_picture(axis):
    """40 x 24 pixels in patches of 8. Whole patches change places; the pixels within stay as they are."""
    model, processor = make_spot_model(), make_processor()
    upright = picture(size=(40, 24))
    patches = np.asarray(upright).reshape(3, 8, 5, 8, 3)
    flipped = Image.fromarray(np.flip(patches, axis=2 * axis).reshape(24, 40, 3).copy())
    before, after = (explain(model, processor, image, "a red dog") for image in (upright, flipped))
    assert before.share_map.shape == (3, 5) and len({*before.share_map.flatten().tolist()}) == 15
    torch.testing.assert_close(after.share_map, before.share_map.flip(axis), rtol=0, atol=1e-6)
    for word, moved in zip(before.words, after.words, strict=True):
        torch.testing.assert_close(moved.map, word.map.flip(axis), rtol=0, atol=1e-6)
        (place, share), (to, same) = before.top_places(word)[0], after.top_places(moved)[0]
        row, column = divmod(place.index, 5)
        row, column = (2 - row, column) if axis == 0 else (row, 4 - column)
        assert to == Place("patch", 5 * row + column, (8.0 * column, 8.0 * row, 8.0 * column + 8, 8.0 * row + 8))
        assert same == pytest.approx(share, abs=1e-6)


# Rankings -----------------------------------------------------------------------------------------------------------


def test_a_ranking_is_that_of_the_model():
    model, processor = make_model(), make_processor()
    captions = ["a red dog", "two skateboarders", CAPTION]
    inputs = processor(images=picture(), text=captions, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits_per_image[0]
    ranking = explain_ranking(model, processor, [picture()], captions)
    assert [one.caption for one in ranking] == [captions[i] for i in scores.argsort(descending=True)]
    assert [one.score for one in ranking] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-5)
    assert all(total(one) == pytest.approx(one.score, abs=1e-5) for one in ranking)
    by_image = explain_ranking(model, processor, [picture(seed, (30, 20 + seed)) for seed in range(3)], ["a red dog"])
    assert [one.score for one in by_image] == sorted((one.score for one in by_image), reverse=True)
    assert {one.image.height for one in by_image} == {20, 21, 22}


@pytest.mark.parametrize("arguments", [(picture(), ["a dog"]), ([picture()], "a dog")])
def test_a_ranking_takes_lists(arguments):
    with pytest.raises(ValueError, match="`images` and `captions` must be lists"):
        explain_ranking(make_model(), make_processor(), *arguments)


# Why A above B ------------------------------------------------------------------------------------------------------


def test_two_captions_of_a_picture_differ_by_words():
    model, processor = make_model(use_prefix_tokens=True), make_processor()
    first = explain(model, processor, picture(), "a red dog , a Dog")
    second = explain(model, processor, picture(), "the dog of a skateboarder")
    comparison = compare(first, second)
    assert comparison.score == first.score - second.score
    assert math.fsum(entry.share for entry in comparison.differences) == pytest.approx(comparison.score, abs=1e-5)
    magnitudes = [abs(entry.share) for entry in comparison.differences]
    assert magnitudes == sorted(magnitudes, reverse=True)
    words = {}  # as both have it, by how many of the same come before
    for text, of_first, of_second in comparison.words:
        words.setdefault(text, []).append((of_first, of_second))
    own, other = ({w.tokens[0]: share for w, share in one.word_shares} for one in (first, second))
    assert words["dog"] == [pytest.approx((own[3], other[2]))]  # [CLS] a red dog , a Dog [SEP]; [CLS] the dog of a ...
    assert words["Dog"] == [pytest.approx((own[6], 0.0))]
    assert len(words["a"]) == 2
    assert pytest.approx((own[1], other[4])) in words["a"] and pytest.approx((own[5], 0.0)) in words["a"]
    assert words["skateboarder"] == [pytest.approx((0.0, other[5]))]
    assert math.fsum(a - b for pairs in words.values() for a, b in pairs) == pytest.approx(comparison.score, abs=1e-5)
    # The same word at the same place is one entry with both shares.
    assert any(entry.first and entry.second for entry in comparison.differences)
    keys = [(e.word.text.lower(), e.word.tokens, e.place, e.level, e.direction) for e in comparison.differences]
    assert len(keys) == len(set(keys))


def test_two_pictures_of_a_caption_share_words_but_no_places():
    model, processor = make_model(), make_processor()
    first, second = (explain(model, processor, picture(seed), "a red dog") for seed in (0, 1))
    comparison = compare(first, second)
    assert len(comparison.differences) == len(first.contributions) + len(second.contributions)
    assert all(entry.first == 0 or entry.second == 0 for entry in comparison.differences)
    assert math.fsum(entry.share for entry in comparison.differences) == pytest.approx(comparison.score, abs=1e-5)
    shares = {text: (a, b) for text, a, b in comparison.words}
    for one, side in ((first, 0), (second, 1)):
        assert {text: pair[side] for text, pair in shares.items()} == {w.text: share for w, share in one.word_shares}
    assert compare(first, first).score == 0 and all(entry.share == 0 for entry in compare(first, first).differences)


def test_pairs_without_anything_in_common_are_not_compared():
    model, processor = make_model(), make_processor()
    first, second = (explain(model, processor, picture(n), caption) for n, caption in enumerate(["a dog", "two dog"]))
    with pytest.raises(ValueError, match="must share the picture or the caption, got two pictures and the captions 'a dog'"):
        compare(first, second)


def test_only_its_own_words_and_places_have_shares():
    model, processor = make_model(), make_processor()
    explanation, other = (explain(model, processor, picture(), caption) for caption in ("a dog", "a red dog"))
    for word in (other.words[1], "dog"):
        with pytest.raises(ValueError, match="`word` must be one of the `tokens` of this explanation"):
            explanation.top_places(word)
    with pytest.raises(ValueError, match="`kind` must be one of patch, region, prefix, got 'patches'"):
        explanation.top_places(explanation.words[1], "patches")
    with pytest.raises(ValueError, match=r"`place` must be a Place, .* got 3"):
        explanation.top_words(3)


def test_explanations_refuse_what_alignments_refuse():
    model, processor = make_model(), make_processor()
    with pytest.raises(ValueError, match="`caption` must be a sentence"):
        explain(model, processor, picture(), " ")
    with pytest.raises(ValueError, match="training mode"):
        explain(model.train(), processor, picture(), "a dog")
    region_model, region_processor = region_model_and_processor()
    with pytest.raises(ValueError, match=r"features of regions.*`model\.explain`"):
        explain(region_model, region_processor, np.zeros((4, 6)), "a dog")
