"""The mixture against scikit-learn's own and against the rule in words; costs and their queue
against loops.
"""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from semidetr_lite.matching import matched_costs
from semidetr_lite.methods import cost_mining
from semidetr_lite.methods.cost_mining import fit_gmm, push_costs, reliable_threshold


def some_costs(seed: int, low: int = 60, high: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(-1.5, 0.4, low), rng.normal(2.5, 0.8, high)])


def threshold_in_words(costs: np.ndarray) -> float:
    """Two Gaussians from the extremes; among those of the first, the cost of the likeliest."""
    column = costs.reshape(-1, 1)
    mixture = GaussianMixture(
        2, covariance_type="diag", reg_covar=1e-5, weights_init=[0.5, 0.5],
        means_init=[[costs.min()], [costs.max()]], precisions_init=[[1.0], [1.0]],
    ).fit(column)  # fmt: skip
    component, likelihood = mixture.predict(column), mixture.score_samples(column)
    wanted = 0 if (component == 0).any() else 1
    best, threshold = -math.inf, None
    for cost, own, value in zip(costs, component, likelihood):
        if own == wanted and value > best:
            best, threshold = value, cost
    return float(threshold)


@pytest.mark.parametrize("seed", range(6))
def test_threshold_equals_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    for costs in (some_costs(seed), some_costs(seed, 5, 3), rng.normal(size=30), rng.random(2)):
        assert reliable_threshold(costs) == pytest.approx(threshold_in_words(costs), abs=1e-12)


def test_threshold_lies_in_the_middle_of_the_low_costs():
    costs = some_costs(0, 600, 400)
    threshold = reliable_threshold(costs)
    assert threshold == pytest.approx(-1.5, abs=0.15) and threshold in costs
    assert 0.2 < (costs <= threshold).mean() < 0.4  # about half of the low costs


def test_mixture_starts_at_the_extremes():
    mixture = fit_gmm(np.array([-1.0, -0.9, 5.0, 5.2]))
    assert mixture.means_.ravel() == pytest.approx([-0.95, 5.1], abs=1e-3)
    assert mixture.weights_ == pytest.approx([0.5, 0.5], abs=1e-3)


def test_few_costs():
    assert reliable_threshold([]) == 0.0
    assert reliable_threshold(torch.zeros(0)) == 0.0
    assert reliable_threshold(np.array([0.7])) == 0.7
    assert reliable_threshold(np.array([2.0, -1.0])) == -1.0
    assert isinstance(reliable_threshold(np.array([2.0, -1.0])), float)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_identical_costs(count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reliable_threshold(np.full(count, 1.25)) == 1.25


def test_costs_that_are_not_finite_are_ignored():
    costs = some_costs(3)
    holes = np.insert(costs, [0, 7, 50], [np.nan, np.inf, -np.inf])
    assert reliable_threshold(holes) == reliable_threshold(costs)
    assert reliable_threshold(np.array([np.nan, 0.3])) == 0.3
    assert reliable_threshold(np.full(4, np.nan)) == 0.0


def test_tensors_arrays_and_shapes_are_the_same():
    costs = some_costs(1).astype(np.float32)
    assert reliable_threshold(torch.from_numpy(costs).requires_grad_()) == reliable_threshold(costs)
    assert reliable_threshold(costs.reshape(10, 10)) == reliable_threshold(costs)


def test_when_nothing_belongs_to_the_gaussian_of_lower_cost_the_other_decides(monkeypatch):
    class Other:
        def predict(self, costs):
            return np.ones(len(costs), dtype=int)

        def score_samples(self, costs):
            return -np.abs(costs[:, 0] - 2.0)

    monkeypatch.setattr(cost_mining, "fit_gmm", lambda costs: Other())
    assert reliable_threshold(np.array([0.0, 1.9, 5.0])) == 1.9


def test_matched_costs_equal_the_best_permutation():
    costs = np.random.default_rng(0).normal(size=(3, 5, 4))
    valid = np.array([[True, True, False, True], [False] * 4, [True] * 4])
    matched = matched_costs(costs, valid)
    assert matched.shape == (3, 4) and (np.isnan(matched) == ~valid).all()
    for image in range(3):
        columns = np.flatnonzero(valid[image])
        best = min(
            itertools.permutations(range(5), len(columns)),
            key=lambda rows, i=image, c=columns: costs[i][rows, c].sum(),
        )
        assert matched[image, columns] == pytest.approx(costs[image][best, columns])


def test_more_boxes_than_queries_leave_some_without_a_partner():
    costs = np.arange(6.0).reshape(1, 2, 3) ** 2
    matched = matched_costs(costs, np.ones((1, 3), dtype=bool))
    assert np.isnan(matched).sum() == 1


def test_the_queue_keeps_the_newest_costs():
    past = torch.full((5,), torch.nan)
    past = push_costs(past, np.array([1.0, np.nan, 2.0]))
    assert past[3:].tolist() == [1, 2] and past[:3].isnan().all()
    past = push_costs(past, np.array([3.0, 4.0, 5.0, 6.0]))
    assert past.tolist() == [2, 3, 4, 5, 6]
    assert push_costs(past, np.arange(9.0)).tolist() == [4, 5, 6, 7, 8]
    assert push_costs(past, np.array([np.nan])).tolist() == past.tolist()
    assert push_costs(torch.zeros(0), np.array([1.0])).shape == (0,)
