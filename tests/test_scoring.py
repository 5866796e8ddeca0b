"""Scores of a split block by block: the same for any batch size and number of processes, resumable, and small."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from processes import run_processes
from tiny import tiny_model, tiny_processor

from granalign_hf.evaluation import retrieval_ranks
from granalign_hf.training import scoring
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.scoring import Captions, Encoder, image_moments, measured_split, scored_split
from granalign_hf.uncertainty import entropy_bounds, standard_errors

NUM_IMAGES, WORDS = 23, "the red blue green dog cat square circle".split()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_BLOCK", 5)
    monkeypatch.setattr(scoring, "CAPTIONS_PER_BLOCK", 7)


def photographs() -> CaptionedImages:
    """Noise with one to three captions of one to eight words, some of which several images share."""
    rng = np.random.default_rng(0)
    pictures = [PILImage.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(NUM_IMAGES)]
    captions = [[" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(rng.integers(1, 4))] for _ in pictures]
    captions[3][0] = captions[20][0] = captions[7][-1]
    features = Features({"image": Image(), "captions": List(Value("string"))})
    table = Dataset.from_dict({"image": pictures, "captions": captions}, features=features)
    return CaptionedImages(table, "image", [*range(NUM_IMAGES)], [str(n) for n in range(NUM_IMAGES)], captions)


def measured(folder: Path, batch_size: int, model=None):
    data = photographs()
    with scored_split(model or tiny_model(), tiny_processor(), data, batch_size, folder) as (scores, diagnostics):
        assert (folder / "scores.npy").is_file()
        return np.array(scores), retrieval_ranks(scores, data.caption_image_index), diagnostics


def check_same(first, second):
    np.testing.assert_array_equal(first[1].image_to_text, second[1].image_to_text)
    np.testing.assert_array_equal(first[1].text_to_image, second[1].text_to_image)
    assert first[2] == pytest.approx(second[2], rel=1e-5)


@pytest.fixture
def whole_split():
    """Image and caption tokens of everything at once, without this file's blocks."""
    data, model, processor = photographs(), tiny_model(), tiny_processor()
    with torch.no_grad():
        images = [data.image(n) for n in range(len(data))]
        inputs = processor(images=images, text=data.all_captions, return_tensors="pt")
        return model, model.get_image_features(inputs.pop("pixel_values")), model.get_text_features(**inputs)


def test_scores_are_those_of_all_at_once(tmp_path, whole_split):
    model, image, text = whole_split
    with torch.no_grad():
        expected = model.score(image, text).numpy()
    np.testing.assert_allclose(measured(tmp_path / "scores", 4)[0], expected, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_standard_errors_and_entropies_are_those_of_all_at_once(tmp_path, whole_split):
    model, image, text = whole_split
    with measured_split(model, tiny_processor(), photographs(), 4, tmp_path / "measured") as split:
        with torch.no_grad():
            np.testing.assert_allclose(split.scores, model.score(image, text).numpy(), atol=1e-5)
            np.testing.assert_allclose(split.standard_errors, standard_errors(model, image, text).numpy(), rtol=1e-3)
            entropies = torch.stack(entropy_bounds(image)).mean(0).numpy()
        np.testing.assert_allclose(split.image_entropies, entropies, rtol=1e-4)
        assert split.diagnostics == pytest.approx(measured(tmp_path / "scores", 4)[2], rel=1e-5)


@pytest.mark.parametrize("fields", [{"aligner": "vse++"}, {"level_weights": [0.5, 0.5, 0.0]}], ids=str)
def test_without_variance_only_scores_are_measured(tmp_path, fields):
    model = tiny_model(**fields)
    with measured_split(model, tiny_processor(), photographs(), 4, tmp_path / "measured") as split:
        assert split.standard_errors is None and split.image_entropies is None
        np.testing.assert_array_equal(split.scores, measured(tmp_path / "scores", 4, model)[0])


def test_any_batch_size_gives_the_same(tmp_path):
    expected = measured(tmp_path / "scores", 5)
    for batch_size in (1, 3, 64):
        check_same(measured(tmp_path / "scores", batch_size), expected)


@pytest.mark.parametrize(
    "fields", [{}, {"use_region_prompts": False}, {"aligner": "chan"}, {"aligner": "laps"}, {"aligner": "vse++"}]
)
def test_any_blocks_give_the_same(tmp_path, monkeypatch, fields):
    expected = measured(tmp_path / "scores", 5, tiny_model(**fields))
    monkeypatch.setattr(scoring, "IMAGES_PER_BLOCK", 100)
    monkeypatch.setattr(scoring, "CAPTIONS_PER_BLOCK", 100)
    check_same(measured(tmp_path / "scores", 5, tiny_model(**fields)), expected)


def test_images_with_one_caption_in_common_tie(tmp_path):
    scores, data = measured(tmp_path / "scores", 3)[0], photographs()
    same = [n for n, caption in enumerate(data.all_captions) if caption == data.captions[3][0]]
    assert len(same) >= 3
    for other in same[1:]:
        np.testing.assert_array_equal(scores[:, same[0]], scores[:, other])


def one_of_two_processes(rank: int, folder: Path) -> None:
    scoring.IMAGES_PER_BLOCK, scoring.CAPTIONS_PER_BLOCK = 5, 7
    accelerator = Accelerator()
    encoded, original = [], Encoder.images
    Encoder.images = lambda self, numbers: encoded.append(numbers.start) or original(self, numbers)
    scores, _, diagnostics = measured(folder / "scores", 4)
    assert accelerator.num_processes == 2
    np.save(folder / f"scores-{rank}.npy", scores)
    (folder / f"rest-{rank}.json").write_text(json.dumps([encoded, diagnostics]))


def test_two_processes_share_the_work_and_measure_the_same(tmp_path):
    expected = measured(tmp_path / "scores", 4)
    run_processes(one_of_two_processes, 2, tmp_path)
    shares = []
    for rank in range(2):
        scores = np.load(tmp_path / f"scores-{rank}.npy")
        encoded, diagnostics = json.loads((tmp_path / f"rest-{rank}.json").read_text())
        check_same((scores, retrieval_ranks(scores, photographs().caption_image_index), diagnostics), expected)
        shares.append(encoded)
    assert shares == [[0, 10, 20], [5, 15]]
    assert not (tmp_path / "scores").exists()


def test_finished_blocks_are_kept_for_the_same_model(tmp_path, monkeypatch):
    expected, original, encoded = measured(tmp_path / "scores", 5), Encoder.images, []

    def interrupt(self, numbers):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(numbers.start)
        return original(self, numbers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, "images", interrupt)
        measured(tmp_path / "scores", 5)
    monkeypatch.setattr(Encoder, "images", lambda self, n: encoded.append(n.start) or original(self, n))
    check_same(measured(tmp_path / "scores", 5), expected)
    assert encoded == [0, 5, 10, 15, 20]


def test_another_model_starts_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "_diagnostics", _interrupt)
        measured(tmp_path / "scores", 5)  # every block is finished
    check_same(measured(tmp_path / "scores", 5, tiny_model(seed=1)), measured(tmp_path / "new", 5, tiny_model(seed=1)))


def _interrupt(*args):
    raise KeyboardInterrupt


def test_one_block_of_patches_is_kept_at_a_time(tmp_path, monkeypatch):
    alive, sizes = [], []
    encode, score = Encoder.images, type(tiny_model()).score

    def images(self, numbers):
        assert not [ref for ref in alive if ref() is not None]
        block = encode(self, numbers)
        alive.append(weakref.ref(block.patch_embeds))
        return block

    def counted_score(self, image, text):
        sizes.append((len(image.patch_embeds), *text.word_embeds.shape[:2]))
        return score(self, image, text)

    monkeypatch.setattr(Encoder, "images", images)
    monkeypatch.setattr("granalign_hf.modeling.modeling_granalign.GranAlignModel.score", counted_score)
    measured(tmp_path / "scores", 2)
    assert len(alive) == 5 and max(num_images for num_images, _, _ in sizes) == 5
    assert max(num_captions for _, num_captions, _ in sizes) == 7
    lengths = [num_words for _, _, num_words in sizes[: len(sizes) // 5]]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3  # captions of a block are of nearly one length


def test_captions_of_a_split_are_found_in_their_blocks():
    data = photographs()
    captions = Captions.of(data, tiny_processor().tokenizer)
    assert len(set(captions.texts)) == len(captions.texts) < len(data.all_captions)
    assert [data.all_captions[n] for n in captions.numbers] == captions.texts
    found = [[] for _ in range(4)]
    for block, (places, owners) in zip(captions.blocks, captions.own(range(6, 10)), strict=True):
        for place, owner in zip(places, owners, strict=True):
            found[owner].append(captions.texts[block[place]])
    assert [sorted(texts) for texts in found] == [sorted(data.captions[n]) for n in range(6, 10)]


def test_diagnostics_are_means_over_the_split(tmp_path, whole_split):
    _, image, text = whole_split
    diagnostics = measured(tmp_path / "scores", 5)[2]
    for name, saliency, mask in (
        ("patch_saliency", image.patch_saliency, image.patch_mask),
        ("word_saliency", text.word_saliency, text.word_mask),
    ):
        assert diagnostics[f"{name}_mean"] == pytest.approx(saliency[mask].mean().item(), rel=1e-5)
        assert diagnostics[f"{name}_std"] == pytest.approx(saliency[mask].std().item(), rel=1e-3)
    effective = (1 / image.region_assignment.square().sum(1)).mean().item()
    assert diagnostics["effective_patches"] == pytest.approx(effective, rel=1e-5)
    owners = photographs().caption_image_index
    assert diagnostics["distinct_regions"] == pytest.approx(np.mean([
        len({
            (image.region_embeds[n] @ text.word_embeds[c, w]).argmax().item()
            for c in np.flatnonzero(owners == n)
            for w in text.word_mask[c].nonzero()[:, 0]
        }) / 3
        for n in range(NUM_IMAGES)
    ]))  # fmt: skip


def test_diagnostics_of_regions():
    # Two images of two patches and two regions; the words of image 0 prefer one region, those of image 1 take both.
    regions = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    assignment = torch.tensor([[[1.0, 0.5], [0.0, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    image = SimpleNamespace(
        patch_saliency=None, patch_mask=None, region_embeds=regions, region_means=regions, region_assignment=assignment
    )
    words = torch.tensor([[[0.9, 0.1], [0.8, 0.2]], [[0.1, 0.9], [0.9, 0.1]], [[0.7, 0.1], [0.1, 0.9]]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    text = SimpleNamespace(word_saliency=None, word_mask=mask, word_embeds=words)
    moments = image_moments(image, [(text, np.array([0, 1, 2]), np.array([0, 1, 0]))])
    means = {name: total / count for name, (count, total, _) in moments.items()}
    assert means["distinct_regions"] == (1 / 2 + 2 / 2) / 2
    assert means["effective_patches"] == (1 + 2 + 2 + 2) / 4
    assert means["region_mean_cosine"] == 0
