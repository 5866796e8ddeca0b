"""Fits against synthetic truth, figures against matrices and curves worked out by hand."""

import itertools

import numpy as np
import pytest

from granalign_hf import calibration
from granalign_hf.calibration import (
    answer_sets,
    auroc,
    conformal_threshold,
    expected_calibration_error,
    first_answers,
    fit_logistic,
    fit_logit_scale,
    is_right,
    log_loss,
    logistic,
    one_caption_galleries,
    recall_by_level,
    resampled_queries,
    risk_coverage,
)


def noisy_gallery(size: int, signal: float, seed: int) -> np.ndarray:
    """Standard normal scores, those of right answers higher by `signal`: the softmax of `signal` times them is the truth.

    The likelihood ratio of N(signal, 1) to N(0, 1) at s is exp(signal * s - signal^2 / 2).
    """
    return np.random.default_rng(seed).normal(size=(size, size)) + signal * np.eye(size)


def test_galleries_have_one_caption_an_image():
    galleries = one_caption_galleries([1, 0, 2, 1, 0, 2, 1])
    assert galleries.tolist() == [[1, 0, 2], [4, 3, 5]]
    assert one_caption_galleries(np.repeat(np.arange(4), 5)).tolist() == [[g, 5 + g, 10 + g, 15 + g] for g in range(5)]


# ------------------------------------------------------------------------------------------------------- first answers


def test_first_answers_by_hand():
    scores = np.array([[0.5, 0.1, 0.3], [0.2, 0.2, 0.4], [0.0, 0.0, 0.0]])
    errors = np.array([[3.0, 1.0, 4.0], [5.0, 5.0, 12.0], [0.0, 0.0, 0.0]])
    found = first_answers(scores, 10.0, errors)
    assert found.first.tolist() == [0, 2, 0] and found.top.tolist() == [0.5, 0.4, 0.0]
    np.testing.assert_allclose(found.uncertainties["margin"], [-0.2, -0.2, 0.0], atol=1e-12)
    weights = np.exp(10 * scores)
    softmax = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(found.probability, softmax.max(1), atol=1e-12)
    np.testing.assert_allclose(found.uncertainties["entropy"], -(softmax * np.log(softmax)).sum(1), atol=1e-12)
    assert found.uncertainties["standard_error"].tolist() == [3.0, 12.0, 0.0]
    np.testing.assert_allclose(found.uncertainties["margin_in_errors"], [-0.2 / 5, -0.2 / 13, 0.0], atol=1e-12)
    assert "standard_error" not in first_answers(scores, 10.0).uncertainties


def test_more_uncertainty_is_less_sure():
    """Of two queries the surer one has the smaller value of each measure."""
    scores, errors = np.array([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0]]), np.array([[0.1] * 3, [0.2] * 3])
    for name, values in first_answers(scores, 5.0, errors).uncertainties.items():
        assert values[0] < values[1], name


def test_first_answers_do_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    scores, errors = rng.normal(size=(7, 5)).astype(np.float32), rng.random((7, 5)).astype(np.float32)
    kept, whole = scores.copy(), first_answers(scores, 3.0, errors)
    monkeypatch.setattr(calibration, "_BLOCK_ELEMENTS", 10)
    parts = first_answers(scores, 3.0, errors)
    assert parts.first.tolist() == whole.first.tolist() and np.array_equal(scores, kept)
    for name, values in whole.uncertainties.items():
        np.testing.assert_array_equal(parts.uncertainties[name], values)


def test_large_margins_stay_finite():
    found = first_answers([[1.0, 0.0, -1.0], [1.0, 1.0, -1.0]], 1e4)
    assert found.uncertainties["probability"].tolist() == [-1e4, 0.0]
    assert found.probability.tolist() == [1.0, 0.5]
    np.testing.assert_allclose(found.uncertainties["entropy"], [0.0, np.log(2)])


@pytest.mark.parametrize(
    ("scores", "errors", "message"),
    [
        ([[1.0], [2.0]], None, r"`scores` must have at least two candidates, got shape \(2, 1\)"),
        ([[1.0, np.nan]], None, "`scores` has 1 NaN"),
        ([1.0, 2.0], None, "`scores` must be 2-D"),
        ([[1.0, 2.0]], [[1.0]], r"`standard_errors` must have shape \(1, 2\), got \(1, 1\)"),
    ],
)
def test_what_has_no_answer_is_refused(scores, errors, message):
    with pytest.raises(ValueError, match=message):
        first_answers(scores, 1.0, errors)


def test_a_tie_is_wrong():
    assert is_right([[1.0, 0.5], [0.5, 0.5]]).tolist() == [True, False]
    assert is_right(np.zeros((3, 3))).tolist() == [False] * 3


# ------------------------------------------------------------------------------------------------------------- fitting


def test_logit_scale_is_that_of_the_largest_likelihood():
    galleries = [noisy_gallery(30, 2.0, seed) for seed in range(3)]

    def likelihood(scale: float) -> float:
        both = [way for gallery in galleries for way in (gallery, gallery.T)]
        return sum(np.diag(way * scale - np.log(np.exp(way * scale).sum(1, keepdims=True))).sum() for way in both)

    found = fit_logit_scale(galleries)
    assert all(likelihood(found) > likelihood(found * factor) for factor in (0.99, 1.01))
    assert fit_logit_scale([gallery / 7 for gallery in galleries]) == pytest.approx(7 * found, rel=1e-5)


def test_logit_scale_calibrates_the_softmax():
    """About 1,500 queries each way with R@1 near 50 %: chance alone leaves a calibration error of some 0.03."""
    galleries = [noisy_gallery(300, 3.0, seed) for seed in range(5)]
    fitted = fit_logit_scale(galleries)
    assert fitted == pytest.approx(3.0, rel=0.05)
    for turn in (np.asarray, np.transpose):
        right = np.concatenate([is_right(turn(gallery)) for gallery in galleries])
        before, after = (
            np.concatenate([first_answers(turn(gallery), scale).probability for gallery in galleries])
            for scale in (1.0, fitted)
        )
        assert expected_calibration_error(before, right) > 0.2
        assert expected_calibration_error(after, right) < 0.05


def test_logit_scale_stays_within_its_range():
    low, high = calibration.LOGIT_SCALES
    assert fit_logit_scale([np.eye(4)]) == pytest.approx(high, rel=1e-3)
    assert fit_logit_scale([-np.eye(4)]) == pytest.approx(low, rel=1e-3)


def test_logistic_curve_is_found():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 0.01, 20000)
    outcomes = rng.random(20000) < logistic(values, (-300.5, 100.0))
    intercept, slope = fit_logistic(values, outcomes)
    assert slope == pytest.approx(100.0, rel=0.1)
    assert expected_calibration_error(logistic(values, (intercept, slope)), outcomes) < 0.02
    assert logistic(values, (intercept, slope)).mean() == pytest.approx(outcomes.mean(), abs=1e-3)


@pytest.mark.parametrize("outcomes", [[False, False, True, True], [True] * 4, [False] * 4])
def test_logistic_curve_is_finite_without_overlap(outcomes):
    intercept, slope = fit_logistic([1.0, 2.0, 3.0, 4.0], outcomes)
    assert np.isfinite([intercept, slope]).all()
    probability = logistic([1.0, 2.0, 3.0, 4.0], (intercept, slope))
    assert ((probability > 0.5) == outcomes).all()


def test_logistic_curve_of_a_constant_is_the_rate():
    values = np.zeros(10)
    probability = logistic(values, fit_logistic(values, [True] * 3 + [False] * 7))
    np.testing.assert_allclose(probability, 0.3 * 4 / 5 + 0.7 / 9, rtol=1e-6)  # of Platt's softened outcomes


def test_conformal_threshold_by_hand():
    values = [0.4, 0.1, 0.3, 0.2, 0.9, 0.5, 0.8, 0.6, 0.7]
    assert conformal_threshold(values, 0.9) == 0.9  # ceil(10 x 0.9) = 9th
    assert conformal_threshold(values, 0.5) == 0.5
    assert conformal_threshold(values[:8], 0.9) == np.inf  # ceil(8.1) = 9th of 8
    assert conformal_threshold(np.arange(1, 100), 0.9) == 90


def test_answer_sets_cover_new_queries():
    """200 draws of 99 values to fit and 100 to test: the mean coverage is 0.9 to within 0.01."""
    rng = np.random.default_rng(0)
    covered = [(rng.exponential(size=100) <= conformal_threshold(rng.exponential(size=99))).mean() for _ in range(200)]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.01)


def test_answer_sets_hold_the_first_and_what_is_near():
    scores = np.array([[0.5, 0.4, 0.1], [0.2, 0.2, 0.0]], np.float32)
    assert answer_sets(scores, 0.0).tolist() == [[True, False, False], [True, True, False]]
    assert answer_sets(scores, 0.25).tolist() == [[True, True, False], [True, True, True]]
    gap = float(scores[0, 0]) - float(scores[0, 2])
    assert answer_sets(scores, gap)[0].all()  # the value itself is within, whatever the rounding of float32


# ----------------------------------------------------------------------------------------------------------- measuring


def test_calibration_error_by_hand():
    probability, outcomes = [0.95, 0.95, 0.2, 0.2, 1.0], [True, False, False, True, True]
    # Ten bins: 0.2, 0.2 with rate 1/2; 0.95, 0.95 and 1.0 with rate 2/3.
    expected = (abs(0.4 - 1) + abs(2.9 - 2)) / 5
    assert expected_calibration_error(probability, outcomes, 10) == pytest.approx(expected)
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0


def test_log_loss_by_hand():
    assert log_loss([0.8, 0.4], [True, False]) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert np.isfinite(log_loss([1.0], [False]))


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    values, wrong = rng.integers(5, size=40), rng.random(40) < 0.4
    pairs = list(itertools.product(values[wrong], values[~wrong]))
    assert auroc(values, wrong) == pytest.approx(np.mean([(w > r) + (w == r) / 2 for w, r in pairs]))
    assert auroc([1, 2, 3], [False, False, True]) == 1 and auroc([1, 1], [False, True]) == 0.5
    assert np.isnan(auroc([1, 2], [True, True]))


def test_risk_coverage_by_hand():
    assert risk_coverage([1, 2, 3, 4], [False, False, True, True]).tolist() == [0, 0, 1 / 3, 1 / 2]
    mean = np.mean([risk_coverage([1, *order, 3], [False, *wrong, True]) for order, wrong in [
        ([2.0, 2.1], [True, False]), ([2.0, 2.1], [False, True])
    ]], axis=0)  # fmt: skip
    np.testing.assert_allclose(risk_coverage([1, 2, 2, 3], [False, True, False, True]), mean)


def test_recall_by_level_by_hand():
    uncertainty = np.arange(40)
    wrong = np.concatenate([[False] * 10, [False] * 5 + [True] * 5, [True] * 20])
    recalls, score = recall_by_level(uncertainty[::-1], wrong[::-1], 4)
    assert recalls.tolist() == [100, 50, 0, 0]
    line = np.corrcoef([0, 1, 2, 3], [100, 50, 0, 0])[0, 1]
    spearman = np.corrcoef([1, 2, 3, 4], [4, 3, 1.5, 1.5])[0, 1]
    assert score == pytest.approx(-spearman * line**2) and score > 0.8
    assert recall_by_level(-uncertainty, wrong, 4)[1] == pytest.approx(-score)
    assert recall_by_level(uncertainty, [True] * 40, 4)[1] == 0
    straight = np.repeat([True, False, True, False], [0, 30, 10, 0])
    assert recall_by_level(np.arange(40), straight, 2)[1] == pytest.approx(1)


def test_resampling_takes_whole_images():
    image = np.array([2, 0, 2, 1, 0])
    draws = list(resampled_queries(image, 200))
    for chosen in draws:
        counts = np.bincount(chosen, minlength=5)
        assert counts[0] == counts[2] and counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3
    assert np.bincount(np.concatenate(draws)).tolist() == pytest.approx([200] * 5, rel=0.2)
    assert np.array_equal(draws[0], next(resampled_queries(image)))
