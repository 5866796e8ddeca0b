"""Figures on hand-written matrices, against plain loops, and on the real phrase boxes."""

import numpy as np
import pytest
import torch

from granalign_hf import evaluation
from granalign_hf.evaluation import (
    RECALL_NAMES,
    PairedDifference,
    RankAccumulator,
    RetrievalRanks,
    bootstrap_interval,
    fold_metrics,
    fold_ranks,
    paired_bootstrap,
    ranks_to_metrics,
    retrieval_metrics,
    retrieval_ranks,
)

# Image 0 has captions 0 and 3, image 1 has caption 1, image 2 has captions 2, 4 and 5.
HAND_INDEX = [0, 1, 2, 0, 2, 2]
HAND_SCORES = np.array(
    [
        [0.9, 0.8, 0.1, 0.2, 0.3, 0.0],  # best own 0.9 -> rank 1
        [0.5, 0.4, 0.6, 0.1, 0.4, 0.3],  # own 0.4; 0.5, 0.6 and the tied 0.4 come before -> rank 4
        [0.7, 0.1, 0.5, 0.2, 0.5, 0.9],  # best own 0.9 -> rank 1
    ]
)
# Caption 1: 0.8 beats its 0.4. Caption 2: 0.6 beats its 0.5. Caption 3: image 2 ties with its 0.2.
HAND_TEXT_RANKS = [1, 2, 2, 2, 1, 1]


def slow_ranks(scores, index):
    """Sorts each query's candidates, the right one last among equals."""
    scores = [[float(s) for s in row] for row in scores]
    num_images, num_captions = len(scores), len(index)

    def place(candidates, right):
        order = sorted(candidates, key=lambda pair: (-pair[0], pair[1] == right))
        return 1 + [name for _, name in order].index(right)

    image_to_text, text_to_image = [], []
    for i in range(num_images):
        places = []
        for c in range(num_captions):
            if index[c] == i:
                rivals = [(scores[i][x], x) for x in range(num_captions) if index[x] != i or x == c]
                places.append(place(rivals, c))
        image_to_text.append(min(places))
    for c in range(num_captions):
        text_to_image.append(place([(scores[i][c], i) for i in range(num_images)], index[c]))
    return image_to_text, text_to_image


def random_case(seed, num_images=13, levels=6):
    """Scores of few levels (many ties) and 1 to 5 captions an image in a random order."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.repeat(np.arange(num_images), rng.integers(1, 6, size=num_images)))
    return rng.integers(levels, size=(num_images, len(index))) / 4 - 0.5, index


def made_ranks(image_to_text, captions_per_image=1, text_to_image=None):
    index = np.repeat(np.arange(len(image_to_text)), captions_per_image)
    text_to_image = np.asarray(image_to_text)[index] if text_to_image is None else np.asarray(text_to_image)
    return RetrievalRanks(np.asarray(image_to_text), text_to_image, index)


# ----------------------------------------------------------------------------------------------------------- retrieval


def test_ranks_by_hand():
    ranks = retrieval_ranks(HAND_SCORES, HAND_INDEX)
    assert ranks.image_to_text.tolist() == [1, 4, 1]
    assert ranks.text_to_image.tolist() == HAND_TEXT_RANKS
    assert retrieval_metrics(HAND_SCORES, HAND_INDEX) == {
        "image_to_text_r1": pytest.approx(200 / 3),
        "image_to_text_r5": 100.0,
        "image_to_text_r10": 100.0,
        "text_to_image_r1": 50.0,
        "text_to_image_r5": 100.0,
        "text_to_image_r10": 100.0,
        "rsum": pytest.approx(450 + 200 / 3),
        "image_to_text_median_rank": 1.0,
        "text_to_image_median_rank": 1.5,
    }


def test_recall_limits_are_inclusive_and_caption_recall_is_over_captions():
    ranks = made_ranks([1, 2, 5, 6, 10, 11], [1, 1, 1, 1, 1, 5], [1, 5, 6, 10, 11, 1, 2, 3, 4, 5])
    metrics = ranks_to_metrics(ranks)
    assert [metrics[name] for name in RECALL_NAMES] == pytest.approx([100 / 6, 50, 500 / 6, 20, 70, 90])
    assert metrics["rsum"] == pytest.approx(sum(metrics[name] for name in RECALL_NAMES))
    assert (metrics["image_to_text_median_rank"], metrics["text_to_image_median_rank"]) == (5.5, 4.5)


def test_a_constant_score_ranks_last():
    ranks = retrieval_ranks(np.zeros((3, 6)), HAND_INDEX)
    assert ranks.image_to_text.tolist() == [1 + 4, 1 + 5, 1 + 3]  # other images' captions, never the own ones
    assert ranks.text_to_image.tolist() == [3] * 6
    assert retrieval_metrics(np.zeros((20, 20)), np.arange(20))["rsum"] == 0.0


def test_a_perfect_score_has_rsum_600_and_a_single_image_too():
    assert retrieval_metrics(np.eye(30), np.arange(30))["rsum"] == 600.0
    assert retrieval_metrics([[0.0, -1.0]], [0, 0])["rsum"] == 600.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", [None, 1, 2, 5, 13, 100])
def test_ranks_agree_with_sorting(seed, block_size):
    scores, index = random_case(seed)
    ranks = retrieval_ranks(scores, index, block_size)
    assert (ranks.image_to_text.tolist(), ranks.text_to_image.tolist()) == slow_ranks(scores, index)


@pytest.mark.parametrize("to_type", [np.float16, np.float32, torch.bfloat16, torch.float16, torch.float32, list])
def test_any_real_type_gives_the_same_ranks(to_type):
    scores, index = random_case(7)  # multiples of 1/4: exact in every type
    if to_type is list:
        given = scores.tolist(), index.tolist()
    elif isinstance(to_type, torch.dtype):
        given = torch.tensor(scores, dtype=to_type, requires_grad=True), torch.tensor(index, dtype=torch.int32)
    else:
        given = scores.astype(to_type), index.astype(np.uint16)
    assert retrieval_metrics(*given) == retrieval_metrics(scores, index)
    assert retrieval_metrics((4 * scores).astype(np.int8), index) == retrieval_metrics(scores, index)


def test_scores_closer_than_float32_are_told_apart_in_float64():
    close = np.array([[1.0, 1.0 - 1e-12], [1.0 - 1e-12, 1.0]])
    assert retrieval_ranks(close, [0, 1]).image_to_text.tolist() == [1, 1]
    assert retrieval_ranks(close.astype(np.float32), [0, 1]).image_to_text.tolist() == [2, 2]


def test_infinite_scores_rank_at_the_ends():
    scores = np.array([[np.inf, -np.inf, 0.0], [-np.inf, -np.inf, 0.0], [0.0, 0.0, np.inf]])
    ranks = retrieval_ranks(scores, [0, 1, 2])
    assert ranks.image_to_text.tolist() == [1, 3, 1]
    assert ranks.text_to_image.tolist() == [1, 3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_order_of_images_and_captions_and_monotone_scale_do_not_matter(seed):
    scores, index = random_case(seed)
    ranks = retrieval_ranks(scores, index)
    rng = np.random.default_rng(seed)
    images, captions = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    moved = retrieval_ranks(np.exp(3 * scores[images][:, captions]), np.argsort(images)[index[captions]])
    assert moved.image_to_text.tolist() == ranks.image_to_text[images].tolist()
    assert moved.text_to_image.tolist() == ranks.text_to_image[captions].tolist()


def test_a_worse_own_caption_does_not_change_the_rank_of_its_image():
    scores, index = random_case(1)
    image_to_text = retrieval_ranks(scores, index).image_to_text
    more = np.concatenate([scores, np.full((13, 1), -9.0)], axis=1)
    assert retrieval_ranks(more, [*index, 4]).image_to_text[4] == image_to_text[4]


def test_ranks_are_read_from_a_file_block_by_block(tmp_path):
    scores, index = random_case(2)
    np.save(tmp_path / "scores.npy", scores)
    from_file = np.load(tmp_path / "scores.npy", mmap_mode="r")
    assert retrieval_metrics(from_file, index) == retrieval_metrics(scores, index)


@pytest.mark.parametrize("block_size", [1, 4, 13])
def test_accumulator_takes_blocks_in_any_order(block_size):
    scores, index = random_case(3)
    accumulator = RankAccumulator(scores[index, np.arange(len(index))], index, len(scores))
    for start in reversed(range(0, len(scores), block_size)):
        accumulator.add(start, torch.tensor(scores[start : start + block_size]))
    ranks = accumulator.ranks()
    assert (ranks.image_to_text.tolist(), ranks.text_to_image.tolist()) == slow_ranks(scores, index)


def test_accumulator_refuses_missing_repeated_foreign_and_contradicting_blocks():
    own = HAND_SCORES[HAND_INDEX, np.arange(6)]
    accumulator = RankAccumulator(own, HAND_INDEX, 3)
    accumulator.add(1, HAND_SCORES[1:2])
    with pytest.raises(ValueError, match="2 of 3 images have no scores yet, the first is 0"):
        accumulator.ranks()
    with pytest.raises(ValueError, match="Images 0 to 1 were partly added before"):
        accumulator.add(0, HAND_SCORES[:2])
    with pytest.raises(ValueError, match=r"lie within 3 images, got shape \(2, 6\) with `first_image` 2"):
        accumulator.add(2, HAND_SCORES[:2])
    with pytest.raises(ValueError, match=r"shape \(b, 6\)"):
        accumulator.add(0, HAND_SCORES[:1, :5])
    with pytest.raises(ValueError, match=r"`own_scores` of caption 0 is 0\.9, the block says 0\.7"):
        accumulator.add(0, HAND_SCORES[2:])
    with pytest.raises(ValueError, match="for each of the 6 captions"):
        RankAccumulator(own[:5], HAND_INDEX, 3)


def test_ranks_follow_own_scores_of_another_rounding():
    """The right answer is never its own rival, even if the block computed it a rounding step higher."""
    ranks = RankAccumulator(np.array([0.5, 0.5]), [0, 1], 2)
    ranks.add(0, np.array([[0.5 + 1e-7, 0.1], [0.1, 0.5 + 1e-7]]))
    assert ranks.ranks().image_to_text.tolist() == ranks.ranks().text_to_image.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("scores", "index", "message"),
    [
        (np.zeros((3, 4)), [0, 1, 1, 0], "names no caption for 1 of 3 images, the first is image 2"),
        (np.zeros((2, 3)), [0, 1, 2], r"must lie in \[0, 2\), got values from 0 to 2"),
        (np.zeros((2, 3)), [0, 1, -1], "got values from -1 to 1"),
        (np.zeros((2, 3)), [0.0, 1.0, 1.0], "1-D array of integers"),
        (np.zeros((2, 0)), [], "at least one image and one caption"),
        (np.zeros((0, 2)), [0, 0], "for 0 images"),
        (np.zeros((3, 2)), [0, 1, 2], r"for each of the 2 columns of `scores` \(3, 2\), got 3.*transpose"),
        (np.zeros(3), [0, 1, 2], r"shape \(num_images, num_captions\), got \(3,\)"),
        ([[1.0, 2.0], [1.0]], [0, 1], "`scores` must be rectangular"),
        (np.zeros((2, 2), dtype=complex), [0, 1], "real"),
        (np.array([[1.0, 0.0], [np.nan, 1.0]]), [0, 1], r"1 NaN, the first at \(1, 0\)"),
        (np.array([[np.nan, 0.0], [0.0, 1.0]]), [0, 1], "`own_scores` has 1 NaN"),
    ],
)
def test_bad_scores_and_indices_are_refused(scores, index, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, index)


# --------------------------------------------------------------------------------------------------------------- folds


def test_folds_are_consecutive_galleries_of_their_own():
    scores = np.array(
        [
            [0.5, 0.1, 9.0, 9.0, 0.6],
            [0.2, 0.9, 9.0, 9.0, 0.1],
            [9.0, 9.0, 0.3, 0.4, 9.0],
            [9.0, 9.0, 0.1, 0.4, 9.0],
        ]
    )
    index = [0, 1, 2, 3, 1]  # caption 4 belongs to the second image
    first, second = fold_ranks(scores, index, 2)
    assert (first.image_to_text.tolist(), first.text_to_image.tolist()) == ([2, 1], [1, 1, 2])
    assert (second.image_to_text.tolist(), second.text_to_image.tolist()) == ([2, 1], [1, 2])
    metrics = fold_metrics(scores, index, 2)
    assert metrics["image_to_text_r1"] == 50.0
    assert metrics["text_to_image_r1"] == pytest.approx((200 / 3 + 50) / 2)  # mean of folds, not of captions
    assert metrics["rsum"] == pytest.approx(sum(metrics[name] for name in RECALL_NAMES))


def test_one_fold_is_the_whole_gallery_and_uneven_folds_are_refused():
    scores, index = random_case(4)
    assert fold_metrics(scores, index, 1) == retrieval_metrics(scores, index)
    for num_folds in (0, 5):
        with pytest.raises(ValueError, match=f"`num_folds` must divide the number of images, got {num_folds} for 13"):
            fold_metrics(scores, index, num_folds)


# ------------------------------------------------------------------------------------------------------ sampling error


def test_bootstrap_interval_has_the_binomial_width():
    ranks = made_ranks(np.where(np.arange(1000) < 400, 1, 3))
    low, high = bootstrap_interval(ranks, num_samples=4000)["image_to_text_r1"]
    half_width = 1.96 * 100 * np.sqrt(0.4 * 0.6 / 1000)  # 3.04 points
    assert (low, high) == pytest.approx((40 - half_width, 40 + half_width), abs=0.25)
    assert bootstrap_interval(ranks)["image_to_text_r5"] == (100.0, 100.0)
    narrow = bootstrap_interval(ranks, confidence=0.5)["image_to_text_r1"]
    assert low < narrow[0] < 40 < narrow[1] < high


def test_bootstrap_keeps_the_captions_of_an_image_together():
    """Five captions that hit or miss with their image carry no more information than the image."""
    image_to_text = np.random.default_rng(0).integers(1, 20, size=200)
    intervals = bootstrap_interval(made_ranks(image_to_text, 5))
    assert intervals["text_to_image_r1"] == pytest.approx(intervals["image_to_text_r1"])


def test_bootstrap_agrees_with_a_plain_loop_and_with_any_chunk(monkeypatch):
    scores, index = random_case(5)
    ranks = retrieval_ranks(scores, index)
    interval = bootstrap_interval(ranks, num_samples=50, seed=3)
    rng, samples = np.random.default_rng(3), []
    for _ in range(50):
        images = rng.integers(13, size=13)
        captions = np.concatenate([np.flatnonzero(index == image) for image in images])
        hits = [np.mean(ranks.image_to_text[images] <= k) for k in (1, 5, 10)]
        hits += [np.mean(ranks.text_to_image[captions] <= k) for k in (1, 5, 10)]
        samples.append([*hits, sum(hits)])
    expected = 100 * np.quantile(samples, [0.025, 0.975], axis=0)
    assert list(interval) == [*RECALL_NAMES, "rsum"]
    assert np.array(list(interval.values())) == pytest.approx(expected.T)
    monkeypatch.setattr(evaluation, "_BOOTSTRAP_ELEMENTS", 40)
    assert bootstrap_interval(ranks, num_samples=50, seed=3) == interval
    assert bootstrap_interval(ranks, num_samples=50, seed=4) != interval


def test_bootstrap_of_folds_surrounds_their_mean():
    folds = [made_ranks([1] * 50), made_ranks([1, 20] * 25)]
    low, high = bootstrap_interval(folds)["image_to_text_r1"]
    half_width = 1.96 * 100 * np.sqrt(0.5 * 0.5 / 50) / 2  # only the second fold varies, and counts half
    assert (low, high) == pytest.approx((75 - half_width, 75 + half_width), abs=1.0)


def test_paired_bootstrap_of_equal_systems_finds_nothing():
    ranks = made_ranks(np.random.default_rng(0).integers(1, 20, size=100))
    result = paired_bootstrap(ranks, ranks)
    assert list(result) == [*RECALL_NAMES, "rsum"]
    assert set(result.values()) == {PairedDifference(0.0, 0.0, 0.0, 1.0)}


def test_paired_bootstrap_sees_a_small_but_steady_difference():
    better = np.random.default_rng(0).integers(1, 20, size=400)
    worse = np.where(np.arange(400) % 20 == 0, 20, better)  # loses 5 % of the images, changes nothing else
    result = paired_bootstrap(made_ranks(better, 5), made_ranks(worse, 5))["image_to_text_r10"]
    lost = 100 * np.mean((better <= 10) & (worse > 10))
    assert result.difference == pytest.approx(lost)
    assert 0 < result.low < lost < result.high
    assert 2 / 1001 <= result.p_value < 0.01
    low, high = bootstrap_interval(made_ranks(better))["image_to_text_r10"]
    assert result.high - result.low < (high - low) / 2
    swapped = paired_bootstrap(made_ranks(worse, 5), made_ranks(better, 5))["image_to_text_r10"]
    assert swapped == pytest.approx((-result.difference, -result.high, -result.low, result.p_value))


def test_paired_bootstrap_holds_its_level():
    """Two systems without a true difference are told apart in about 5 % of the experiments."""
    rng = np.random.default_rng(0)
    p_values = [
        paired_bootstrap(*(made_ranks(rng.integers(1, 3, size=200)) for _ in range(2)), num_samples=200)[
            "image_to_text_r1"
        ].p_value
        for _ in range(200)
    ]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10


def test_paired_bootstrap_refuses_other_images_and_bootstrap_a_bad_confidence():
    with pytest.raises(ValueError, match="same images and captions"):
        paired_bootstrap(made_ranks([1, 1]), made_ranks([1, 1, 1]))
    with pytest.raises(ValueError, match="same images and captions"):
        paired_bootstrap([made_ranks([1, 1])] * 2, made_ranks([1, 1]))
    with pytest.raises(ValueError, match="`confidence` must lie between 0 and 1, got 95"):
        bootstrap_interval(made_ranks([1, 2]), confidence=95)


# ------------------------------------------------------------------------------------------------------- pointing game
