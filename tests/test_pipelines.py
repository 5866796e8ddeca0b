"""The pipelines of the project, against the functions that they stand on."""

import pytest
import torch
from PIL import Image
from tiny import region_model_and_processor, tiny_model, tiny_processor
from transformers import pipeline

from granalign_hf import GranAlignModel
from granalign_hf.modeling.alignment import align
from granalign_hf.modeling.standard_errors import standard_errors

CAPTIONS = ["a red dog", "a blue circle and the green square on a cat", "dogs", "the cat"]


def noise(seed: int, width: int, height: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


IMAGES = [noise(0, 40, 30), noise(1, 20, 50), noise(2, 16, 16)]


@pytest.fixture(scope="module")
def parts():
    return {"model": tiny_model(), "processor": tiny_processor()}


@pytest.fixture(scope="module")
def aligner(parts):
    return pipeline("image-text-alignment", **parts)


@pytest.fixture(scope="module")
def retriever(parts):
    return pipeline("image-text-retrieval", **parts)


def test_words_are_those_of_align(parts, aligner):
    answer, expected = aligner(IMAGES[1], text=CAPTIONS[1]), align(*parts.values(), IMAGES[1], CAPTIONS[1])
    assert answer["score"] == expected.score
    assert len(answer["words"]) == len(expected.words) == 10
    for word, own in zip(answer["words"], expected.words):
        assert (word["word"], word["start"], word["end"]) == (own.text, own.start, own.end)
        assert tuple(word["box"].values()) == tuple(round(side) for side in own.box)
        assert (word["score"], word["saliency"]) == (own.map.max().item(), own.saliency)
        assert torch.equal(word["map"], own.map)


def test_the_standard_error_is_that_of_the_pair(parts, aligner):
    inputs = parts["processor"](images=IMAGES[0], text=CAPTIONS[0], return_tensors="pt")
    with torch.no_grad():
        image = parts["model"].get_image_features(inputs.pop("pixel_values"))
        text = parts["model"].get_text_features(**inputs)
    expected = standard_errors(parts["model"], image, text).item()
    assert expected > 0
    assert aligner(IMAGES[0], text=CAPTIONS[0])["standard_error"] == expected


@pytest.mark.parametrize("aligner_name", ["grm", "chan", "laps", "vse++"])
def test_batches_and_streams_change_nothing(aligner_name):
    pipe = pipeline("image-text-alignment", model=tiny_model(aligner=aligner_name), processor=tiny_processor())
    pairs = [{"image": IMAGES[n % 3], "text": CAPTIONS[n % 4]} for n in range(5)]
    one_by_one = [pipe(**pair) for pair in pairs]
    for answers in (pipe(pairs, batch_size=2), list(pipe((pair for pair in pairs), batch_size=3))):
        assert [answer["score"] for answer in answers] == pytest.approx([a["score"] for a in one_by_one], abs=1e-5)
        for answer, alone in zip(answers, one_by_one):
            assert (answer["standard_error"] is None) == (aligner_name != "grm")
            assert [w["word"] for w in answer["words"]] == [w["word"] for w in alone["words"]]
            for word, own in zip(answer["words"], alone["words"]):
                torch.testing.assert_close(word["map"], own["map"], atol=1e-5, rtol=0)


def scores(parts, images, captions) -> torch.Tensor:
    with torch.no_grad():
        return parts["model"](**parts["processor"](images=images, text=captions, return_tensors="pt")).logits_per_image


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_retrieval_ranks_by_the_score(parts, retriever, batch_size):
    expected = scores(parts, IMAGES[0], CAPTIONS)[0].double()
    answer = retriever(image=IMAGES[0], candidates=CAPTIONS, batch_size=batch_size)
    assert [one["index"] for one in answer] == expected.argsort(descending=True).tolist()
    assert [one["score"] for one in answer] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    assert [one["probability"] for one in answer] == pytest.approx(
        expected.softmax(0).sort(descending=True).values.tolist(), abs=1e-5
    )
    images = retriever(text=CAPTIONS[0], candidates=IMAGES, batch_size=batch_size, top_k=2)
    assert [one["index"] for one in images] == scores(parts, IMAGES, CAPTIONS[:1])[:, 0].argsort(descending=True)[
        :2
    ].tolist()


def test_several_queries(retriever):
    queries = [{"text": CAPTIONS[1], "candidates": IMAGES}, {"image": IMAGES[2], "candidates": CAPTIONS}]
    assert retriever(queries) == [retriever(**query) for query in queries]


def test_what_is_given_once_holds_for_every_call(parts):
    retriever = pipeline("image-text-retrieval", **parts, top_k=2)
    query = {"text": CAPTIONS[0], "candidates": IMAGES}
    assert len(retriever(**query)) == 2 and len(retriever(**query, top_k=1)) == 1 and len(retriever(**query)) == 2


def test_a_calibrated_model_names_the_answer_set(parts):
    model = tiny_model(logit_scale=20.0, confidence_coefficients=[0.0, 1.0, 0.0, 1.0], conformal_thresholds=[0.02, 0.0])
    retriever = pipeline("image-text-retrieval", model=model, processor=parts["processor"])
    answer = retriever(image=IMAGES[0], candidates=CAPTIONS)
    best = answer[0]["score"]
    assert [one["is_in_answer_set"] for one in answer] == [one["score"] >= best - 0.02 for one in answer]
    expected = (20 * scores(parts, IMAGES[0], CAPTIONS)[0].double()).softmax(0)
    assert [one["probability"] for one in answer] == pytest.approx(expected[[o["index"] for o in answer]].tolist(), abs=1e-4)
    assert [one["is_in_answer_set"] for one in retriever(text="a dog", candidates=IMAGES)] == [True, False, False]
    (only,) = retriever(text="a dog", candidates=IMAGES[:1])
    assert (only["probability"], only["is_in_answer_set"]) == (None, None)  # it has no rival


def test_a_saved_model_names_them_and_a_loaded_one_needs_no_trust(tmp_path, parts):
    for part in parts.values():
        part.save_pretrained(tmp_path)
    assert '"custom_pipelines"' in (tmp_path / "config.json").read_text()
    assert not hasattr(parts["model"].config, "custom_pipelines")
    assert not hasattr(GranAlignModel.from_pretrained(tmp_path).config, "custom_pipelines")
    assert pipeline("image-text-retrieval", model=str(tmp_path))(text="dogs", candidates=IMAGES, top_k=1)


def test_bad_inputs(aligner, retriever):
    with pytest.raises(ValueError, match="`image` and `text`, got Image"):
        aligner(IMAGES[0])
    with pytest.raises(ValueError, match=r"`image` and `text`, got keys \['image'\]"):
        aligner({"image": IMAGES[0]})
    with pytest.raises(ValueError, match="nowhere"):
        aligner("nowhere.png", text="a dog")
    with pytest.raises(ValueError, match="either `image` or `text` as the query, got neither"):
        retriever(candidates=CAPTIONS)
    with pytest.raises(ValueError, match=r"got \['image', 'text'\]"):
        retriever(image=IMAGES[0], text="dogs", candidates=CAPTIONS)
    with pytest.raises(ValueError, match=r"`candidates` must be a list that is not empty, got \[\]"):
        retriever(image=IMAGES[0], candidates=[])
    with pytest.raises(ValueError, match=r"A query must be a dict with `image` or `text` and `candidates`, got 'a\.png'"):
        retriever("a.png", candidates=CAPTIONS)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got -1"):
        retriever(image=IMAGES[0], candidates=CAPTIONS, top_k=-1)
    with pytest.raises(ValueError, match="`candidates` must be a list that is not empty, got 'a dog'"):
        retriever(image=IMAGES[0], candidates="a dog")


def test_region_features_have_no_picture():
    model, processor = region_model_and_processor()
    pipe = pipeline("image-text-alignment", model=model, processor=processor)
    with pytest.raises(ValueError, match="features of regions, which cannot be shown"):
        pipe(IMAGES[0], text="a dog")
