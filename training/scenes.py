"""The built-in data set: drawn scenes whose captions come with the region of every content word.

A scene holds three to five named objects (coloured shapes, some of them in groups of equals) and 0 to 8 distractors
that no caption ever names; one, unless more are asked for. Every caption names three kinds of objects, is true, and
identifies them: "a red circle" is said only where exactly one red circle is drawn, "two blue squares" only where
exactly two are. So

- several words point at one object: `red` and `circle` of "a red circle" carry the same box;
- one word points at several objects: `blue` and `squares` of "two blue squares" carry both boxes;
- words without a place (`a`, `two`, `with`, `above`, `picture`) carry none.

The boxes of a word are those of the objects that its own phrase names: where "a red circle" is said, `red` does not
point at a red distractor. A distractor may share a colour or a shape with a named object, never both.

Everything is drawn from integers, comparisons and single roundings, without fonts or trigonometry, so a seed gives
the same pixels on every platform with the same release series of NumPy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (217, 45, 50),
    "orange": (245, 135, 28),
    "yellow": (250, 213, 40),
    "green": (46, 158, 80),
    "blue": (40, 104, 216),
    "purple": (122, 58, 172),
    "pink": (243, 132, 186),
    "black": (34, 36, 44),
}
_Mask = Callable[[np.ndarray, np.ndarray], np.ndarray]
_STAR_EDGES = ((0.0, -1.0), (0.9511, -0.3090), (0.5878, 0.8090), (-0.5878, 0.8090), (-0.9511, -0.3090))
# Each shape as a test on points (x to the right, y down) of the unit disc.
SHAPES: dict[str, _Mask] = {
    "circle": lambda x, y: x * x + y * y <= 0.76,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.70,
    "triangle": lambda x, y: (y <= 0.5) & (1.732 * abs(x) - y <= 1.0),
    # Inside a five-pointed star = beyond at most one of the five lines that join its tips.
    "star": lambda x, y: np.sum([x * u + y * v <= 0.309 for u, v in _STAR_EDGES], axis=0) >= 4,
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) <= 0.92) & (np.minimum(abs(x), abs(y)) <= 0.28),
    "ring": lambda x, y: (x * x + y * y <= 0.88) & (x * x + y * y >= 0.26),
}
NUM_CAPTIONS = 5
NUM_NAMED_RANGE = (3, 5)
NUM_DISTRACTORS_RANGE = (0, 8)
_KINDS_PER_CAPTION = 3
# How many equal objects each kind has, by the number of named objects.
_GROUP_SIZES = {3: ((1, 1, 1),), 4: ((2, 1, 1), (1, 1, 1, 1)), 5: ((3, 1, 1), (2, 2, 1), (2, 1, 1, 1))}
_PLURALS = {"cross": "crosses"}
_COUNTS = {2: "two", 3: "three"}
_TEMPLATES = (
    "{}, {} and {}",
    "{} with {} and {}",
    "{} and {} with {}",
    "{} and {}, and also {}",
    "{} together with {} and {}",
    "a picture of {}, {} and {}",
    "a drawing of {} with {} and {}",
    "here we see {}, {} and {}",
    "the picture shows {}, {} and {}",
)
_RELATION_TEMPLATES = {"above": "{} above {}, with {}", "left": "{} to the left of {}, with {}"}
_RELATION_SHARE = 0.3
_COLOUR_LAST_SHARE = 0.15
_RADIUS_RANGE = (0.12, 0.15)  # of the image's side, in pictures that are not crowded
_CROWD = 6  # objects; beyond it all of them shrink, so that together they cover the same area
_GAP = 0.012  # between two objects, of the image's side
_THROWS, _LAYOUTS = 256, 200  # tries for a place, tries for all places
_COLOUR_JITTER = 14
_SUPERSAMPLING = 4
_MIN_IMAGE_SIZE, _MAX_IMAGE_SIZE = 48, 1024

_FEATURES = Features(
    {
        "image": Image(),
        "captions": List(Value("string")),
        "image_id": Value("string"),
        "phrases": List(
            List(
                {
                    "phrase": Value("string"),
                    "char_start": Value("int32"),
                    "char_end": Value("int32"),
                    "boxes": List(List(Value("int32"))),
                }
            )
        ),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: its words, its box [x0, y0, x1, y1] in pixels (end exclusive), whether captions name it."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]
    is_named: bool


@dataclass(frozen=True)
class Scene:
    """A drawn picture with its captions and, for each caption, the boxes of each content word.

    Attributes:
        image: RGB picture.
        captions: `NUM_CAPTIONS` different sentences, in lower case.
        phrases: for each caption one entry per content word in the order of the text: `phrase` (the word itself),
            `char_start` and `char_end` (into the caption, end exclusive) and `boxes` ([[x0, y0, x1, y1], ...] in
            pixels, end exclusive).
        objects: everything that is drawn, the distractors too.
    """

    image: PILImage.Image
    captions: list[str]
    phrases: list[list[dict[str, Any]]]
    objects: list[SceneObject] = field(default_factory=list)


def draw_scene(
    rng: np.random.Generator,
    num_distractors: int = 1,
    image_size: int = 64,
    num_named: int | None = None,
) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of chance.
        num_distractors: objects that no caption names, 0 to 8.
        image_size: side of the square picture in pixels, 48 to 1024. Objects are 0.16 to 0.30 of it wide, smaller where
            there are more than six.
        num_named: objects that captions may name, 3 to 5, in three or four kinds; 3 or 4 by chance when None.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"`rng` must be a numpy.random.Generator, got {rng!r}. Pass np.random.default_rng(seed).")
    _check_scene_arguments(num_distractors, image_size, num_named)
    if num_named is None:
        num_named = int(rng.integers(3, 5))
    kinds, sizes = _choose_kinds(rng, num_named)
    named = [kind for kind, size in zip(kinds, sizes, strict=True) for _ in range(size)]
    distractors = _choose_distractors(rng, kinds, num_distractors)
    image, boxes = _draw_objects(rng, named + distractors, image_size)
    objects = [
        SceneObject(colour, shape, box, position < num_named)
        for position, ((colour, shape), box) in enumerate(zip(named + distractors, boxes, strict=True))
    ]
    boxes_of_kind = [[o.box for o in objects if (o.colour, o.shape) == kind] for kind in kinds]
    captions, phrases = _write_captions(rng, list(zip(kinds, boxes_of_kind, strict=True)))
    return Scene(image, captions, phrases, objects)


def scene_dataset(
    num_scenes: int,
    seed: int,
    num_distractors: int = 1,
    image_size: int = 64,
    num_named: int | None = None,
) -> Dataset:
    """Draw a data set with the columns `image`, `captions`, `image_id` and `phrases` (see `Scene`), in memory.

    Scene i of a seed does not depend on `num_scenes`, so a longer data set begins with the shorter one. Two seeds have
    independent random streams and never share a scene: use one for training and another for the test.

    Args:
        num_scenes: at least 1.
        seed: 0 to 2**32 - 1.
        num_distractors, image_size, num_named: see `draw_scene`.

    Raises:
        ValueError: an argument is outside its range.
    """
    _check_integer("num_scenes", num_scenes, 1, 2**32 - 1)
    _check_integer("seed", seed, 0, 2**32 - 1)  # beyond 32 bits, (seed, index) pairs could collide in SeedSequence
    _check_scene_arguments(num_distractors, image_size, num_named)
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for index in range(num_scenes):
        scene = draw_scene(np.random.default_rng([seed, index]), num_distractors, image_size, num_named)
        columns["image"].append({"bytes": _encode_png(scene.image), "path": None})
        columns["captions"].append(scene.captions)
        columns["image_id"].append(f"{seed}-{index}")
        columns["phrases"].append(scene.phrases)
    return Dataset.from_dict(columns, features=_FEATURES)


def _check_scene_arguments(num_distractors: int, image_size: int, num_named: int | None) -> None:
    _check_integer("num_distractors", num_distractors, *NUM_DISTRACTORS_RANGE)
    if num_named is not None:
        _check_integer("num_named", num_named, *NUM_NAMED_RANGE)
    _check_integer("image_size", image_size, _MIN_IMAGE_SIZE, _MAX_IMAGE_SIZE)


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {value!r}. Choose one in that range.")


def _encode_png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# What is in the picture -----------------------------------------------------------------------------------------


def _choose_kinds(rng: np.random.Generator, num_named: int) -> tuple[list[tuple[str, str]], list[int]]:
    """Kinds (colour, shape) of the named objects, no colour and no shape twice, and how many objects each has."""
    options = _GROUP_SIZES[num_named]
    sizes = [int(size) for size in rng.permutation(options[int(rng.integers(len(options)))])]
    colours, shapes = list(COLOURS), list(SHAPES)
    chosen = zip(rng.permutation(len(colours)), rng.permutation(len(shapes)), strict=False)
    return [(colours[c], shapes[s]) for _, (c, s) in zip(sizes, chosen, strict=False)], sizes


def _choose_distractors(rng: np.random.Generator, kinds: list[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    others = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in kinds]
    return [others[int(i)] for i in rng.permutation(len(others))[:number]]


# The pixels -----------------------------------------------------------------------------------------------------


def _draw_objects(
    rng: np.random.Generator, kinds: list[tuple[str, str]], image_size: int
) -> tuple[PILImage.Image, list[tuple[int, int, int, int]]]:
    canvas = _draw_background(rng, image_size)
    boxes = []
    for (colour, shape), (x, y, radius) in zip(kinds, _place_discs(rng, len(kinds), image_size), strict=True):
        jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, 3, dtype=np.int16)
        rgb = np.array(COLOURS[colour], np.int16) + jitter
        tilt = float(rng.random()) * 0.5 - 0.25
        boxes.append(_draw_shape(canvas, SHAPES[shape], rgb, x, y, radius, tilt))
    canvas += rng.integers(-4, 5, (image_size, image_size, 1), dtype=np.int16)
    return PILImage.fromarray(canvas.clip(0, 255).astype(np.uint8)), boxes


def _draw_background(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """A pale tint with smooth patches, (image_size, image_size, 3) int16. Integers only: the same everywhere."""
    grid = rng.integers(210, 244, 3, dtype=np.int32) + rng.integers(-13, 14, (5, 5, 3), dtype=np.int32)
    position = (np.arange(image_size, dtype=np.int32) * 4 * 256) // (image_size - 1)
    cell = np.minimum(position // 256, 3)
    share = position - 256 * cell
    rows = grid[cell] * (256 - share)[:, None, None] + grid[cell + 1] * share[:, None, None]
    share = share[:, None]
    return ((rows[:, cell] * (256 - share) + rows[:, cell + 1] * share) >> 16).astype(np.int16)


def _place_discs(rng: np.random.Generator, number: int, image_size: int) -> list[tuple[float, float, float]]:
    """Discs (x, y, radius) inside the picture that do not touch: throw the large ones first, start over if stuck."""
    low, high = _RADIUS_RANGE
    radii = (low + (high - low) * rng.random(number)) * image_size * min(_CROWD / number, 1) ** 0.5
    order = np.argsort(-radii, kind="stable")
    while True:
        for _ in range(_LAYOUTS):
            centres = _throw_discs(rng, radii[order], image_size)
            if centres is not None:
                placed = dict(zip(order.tolist(), centres, strict=True))
                return [(*placed[i], float(radii[i])) for i in range(number)]
        radii = radii * 0.97  # hardly ever, and only in the most crowded pictures


def _throw_discs(rng: np.random.Generator, radii: np.ndarray, image_size: int) -> list[tuple[float, float]] | None:
    centres = np.empty((len(radii), 2))
    for i, radius in enumerate(radii):
        margin = radius + _GAP * image_size
        throws = margin + (image_size - 2 * margin) * rng.random((_THROWS, 2))
        offsets = throws[:, None] - centres[:i]
        reach = radii[:i] + radius + _GAP * image_size
        is_free = (offsets[..., 0] ** 2 + offsets[..., 1] ** 2 >= reach**2).all(1)
        if not is_free.any():
            return None
        centres[i] = throws[is_free.argmax()]
    return [(float(x), float(y)) for x, y in centres]


def _draw_shape(
    canvas: np.ndarray, is_inside: _Mask, rgb: np.ndarray, x: float, y: float, radius: float, tilt: float
) -> tuple[int, int, int, int]:
    """Blend a shape into the canvas and return its box: the pixels of which it covers at least half."""
    left, top = int(x - radius), int(y - radius)
    side = int(2 * radius) + 2
    right, bottom = min(left + side, canvas.shape[1]), min(top + side, canvas.shape[0])
    n = _SUPERSAMPLING
    u = ((np.arange((right - left) * n) + 0.5) / n + left - x) / radius
    v = (((np.arange((bottom - top) * n) + 0.5) / n + top - y) / radius)[:, None]
    # A rotation by 2 arctan(tilt / 2), written without sine and cosine: those differ in the last digit by platform.
    half = tilt / 2
    cosine, sine = (1 - half * half) / (1 + half * half), tilt / (1 + half * half)
    samples = is_inside(cosine * u + sine * v, cosine * v - sine * u)
    coverage = samples.reshape(bottom - top, n, right - left, n).sum((1, 3), dtype=np.int16)[..., None]
    window = canvas[top:bottom, left:right]
    window += (rgb - window) * coverage // (n * n)
    rows, columns = np.nonzero(2 * coverage[..., 0] >= n * n)
    return (left + int(columns.min()), top + int(rows.min()), left + int(columns.max()) + 1, top + int(rows.max()) + 1)


# The captions ---------------------------------------------------------------------------------------------------

_Kind = tuple[tuple[str, str], list[tuple[int, int, int, int]]]  # (colour, shape), the boxes of its objects


def _write_captions(rng: np.random.Generator, kinds: list[_Kind]) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """`NUM_CAPTIONS` different captions; with four kinds each leaves one out in turn, so that every kind is named."""
    captions: list[str] = []
    phrases: list[list[dict[str, Any]]] = []
    turn = rng.permutation(len(kinds))
    while len(captions) < NUM_CAPTIONS:
        order = [int(i) for i in rng.permutation(len(kinds))]
        if len(kinds) > _KINDS_PER_CAPTION:
            order.remove(int(turn[len(captions) % len(kinds)]))
        caption, entries = _write_caption(rng, [kinds[i] for i in order])
        if caption not in captions:
            captions.append(caption)
            phrases.append(entries)
    return captions, phrases


def _write_caption(rng: np.random.Generator, kinds: list[_Kind]) -> tuple[str, list[dict[str, Any]]]:
    template = _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
    relations = _true_relations(kinds[0][1], kinds[1][1])
    if relations and rng.random() < _RELATION_SHARE:
        template = _RELATION_TEMPLATES[relations[int(rng.integers(len(relations)))]]
    *literals, ending = template.split("{}")
    caption, entries = "", []
    for literal, kind in zip(literals, kinds, strict=True):
        caption += literal
        for word, is_located in _name(rng, kind):
            start = len(caption) + (caption != "" and not caption.endswith(" "))
            caption = caption.ljust(start) + word
            if is_located:
                boxes = [list(box) for box in kind[1]]
                entries.append({"phrase": word, "char_start": start, "char_end": len(caption), "boxes": boxes})
    return caption + ending, entries


def _name(rng: np.random.Generator, kind: _Kind) -> Iterator[tuple[str, bool]]:
    """The words for a kind, each with whether it can be pointed at: "a red circle", "two squares in blue"."""
    (colour, shape), boxes = kind
    is_colour_last = rng.random() < _COLOUR_LAST_SHARE
    first = shape if is_colour_last else colour
    article = "an" if first[0] in "aeiou" else "a"
    yield _COUNTS.get(len(boxes), article), False
    noun = shape if len(boxes) == 1 else _PLURALS.get(shape, shape + "s")
    yield from [(noun, True), ("in", False), (colour, True)] if is_colour_last else [(colour, True), (noun, True)]


def _true_relations(boxes: list[tuple[int, int, int, int]], others: list[tuple[int, int, int, int]]) -> list[str]:
    """Where one single object stands to another: wholly beside it, and further along that axis than across it."""
    if len(boxes) != 1 or len(others) != 1:
        return []
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = boxes[0], others[0]
    across, down = abs(ax0 + ax1 - bx0 - bx1), abs(ay0 + ay1 - by0 - by1)
    relations = []
    if ay1 <= by0 and down > across:
        relations.append("above")
    if ax1 <= bx0 and across > down:
        relations.append("left")
    return relations
