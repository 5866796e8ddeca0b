"""Foils: one thing is wrong in each, nothing else; the model is asked for both captions."""

import itertools
import json

import pytest
import torch
from accelerate import PartialState
from processes import run_processes
from tiny import tiny_model, tiny_processor

from granalign_hf.explanation import explain
from granalign_hf.training.data import load_split
from granalign_hf.training.foils import COLOURS, NUMBERS, make_foils, measure_foils
from granalign_hf.training.phrases import LocatedCaption, Phrase, located_captions

BOXES = ((0, 0, 5, 5),)


def located(image: int, caption: str, **phrases: str) -> LocatedCaption:
    """Phrases of a caption by what they say, each with its type."""
    parts = [
        Phrase(caption.index(words), caption.index(words) + len(words), BOXES, (kind,)) for kind, words in phrases.items()
    ]
    return LocatedCaption(image, caption, tuple(sorted(parts, key=lambda phrase: phrase.start)))


MANY = [located(n, f"a {noun} sits", animals=f"a {noun}") for n, noun in enumerate(["cat", "horse", "dogs", "cats"] * 5, 1)]
SCENE = located(0, "Two men see a red dog .", people="Two men", animals="a red dog")
OTHER = located(0, "a horse and a blue ball", animals="a horse", other="a blue ball")


def test_one_thing_is_wrong():
    foils = {foil.kind: foil for foil in make_foils([SCENE, *MANY]) if foil.image == 0}
    assert {*foils} == {"colour", "number", "noun", "swap"}
    for kind, foil in foils.items():
        assert foil.caption == SCENE.caption
        before, after = foil.caption.split(), foil.wrong.split()
        edited = [foil.wrong[start:end] for start, end in foil.spans]
        there = [foil.caption[start:end] for start, end in foil.before]
        if kind == "swap":
            assert foil.wrong == "A red dog see two men ." and edited == ["A red dog", "two men"]
            assert there == ["Two men", "a red dog"]
        else:
            ((old, new),) = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
            assert edited == [new] and there == [old]
            expected = {"colour": ("red", COLOURS), "number": ("Two", NUMBERS), "noun": ("dog", ("cat", "horse"))}[kind]
            assert old == expected[0] and new.lower() in expected[1] and new.lower() != old.lower()
            assert new[0].isupper() == old[0].isupper()


def test_what_another_caption_of_the_image_says_is_not_wrong():
    foils = make_foils([SCENE, OTHER, *MANY])
    assert {foil.wrong.split()[5] for foil in foils if foil.caption == SCENE.caption and foil.kind == "noun"} == {"cat"}
    wrong = [foil.wrong for foil in foils if foil.image == 0 and foil.kind == "colour"]
    assert len(wrong) == 2 and not any("a blue dog" in text or "a red ball" in text for text in wrong)


def test_a_foil_is_no_true_caption():
    """Neither with a full stop at the word, nor where two things are only told in another order."""
    captions = [
        located(0, "a dog.", animals="a dog."),
        located(0, "a cat and a man", animals="a cat", people="a man"),
        *MANY,
    ]
    foils = [foil for foil in make_foils(captions) if foil.image == 0]
    assert {foil.kind for foil in foils} <= {"noun"}
    assert all("horse" in foil.wrong for foil in foils)


def test_foils_depend_on_the_captions_alone():
    scenes = load_split("scenes", "test", num_scenes=20)
    captions = located_captions(scenes, None, "test")
    assert make_foils(captions) == make_foils(captions)
    assert {foil.kind for foil in make_foils(captions)} == {"colour", "swap"}  # they have no numbers, and one type of thing


def tiny(aligner: str):
    torch.manual_seed(0)
    return tiny_model(aligner=aligner).eval(), tiny_processor()


def measured(aligner: str, batch_size: int = 2) -> dict:
    scenes = load_split("scenes", "test", num_scenes=4)
    return measure_foils(*tiny(aligner), scenes, located_captions(scenes, None, "test"), batch_size)


@pytest.mark.parametrize("aligner", ["grm", "chan", "vse++"])
def test_the_figures_are_those_of_explanations_one_by_one(aligner):
    model, processor = tiny(aligner)
    scenes = load_split("scenes", "test", num_scenes=4)
    preferred, found, was_lowest = [], [], []
    for foil in make_foils(located_captions(scenes, None, "test")):
        right, wrong = (explain(model, processor, scenes.image(foil.image), text) for text in (foil.caption, foil.wrong))
        preferred.append(right.score > wrong.score)

        for shown, spans, answers in ((wrong, foil.spans, found), (right, foil.before, was_lowest)):

            def is_edited(word, spans=spans):
                return any(word.start < end and start < word.end for start, end in spans)

            shares = [(w, s) for w, s in shown.word_shares if w.is_content or (foil.kind == "number" and is_edited(w))]
            answers.append(is_edited(min(shares, key=lambda pair: pair[1])[0]))
    row = measured(aligner)["foils"]["all"]
    assert row["number"] == len(preferred)
    assert row["preferred"] == pytest.approx(100 * sum(preferred) / len(preferred), abs=100.1 / len(preferred))
    assert row["found"] == pytest.approx(100 * sum(found) / len(found), abs=100.1 / len(found))
    assert row["was_lowest"] == pytest.approx(100 * sum(was_lowest) / len(found), abs=100.1 / len(found))
    assert 0 < row["chance"] < 100


def share(rank: int, folder) -> None:
    PartialState(cpu=True)
    (folder / f"{rank}.json").write_text(json.dumps(measured("chan")))


def test_batches_and_processes_change_nothing(tmp_path):
    results = [measured("chan", batch_size) for batch_size in (1, 4)]
    run_processes(share, 2, tmp_path)
    results += [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(first == second for first, second in itertools.pairwise(results))


def test_captions_that_give_no_foil_are_refused():
    model, processor = tiny("max_mean")
    scenes = load_split("scenes", "test", num_scenes=1)
    with pytest.raises(ValueError, match="No foil can be made"):
        measure_foils(model, processor, scenes, [located(0, "it", other="it")], 1)
