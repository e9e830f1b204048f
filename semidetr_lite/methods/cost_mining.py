"""Cost-based pseudo-label mining (CPM, paper section 3.4).

A pseudo-box is reliable where it matches what the student already predicts. Matching a reliable
pseudo-box to the student's queries costs little, an unreliable one much, and the border between the
two moves with training. So the matching costs of all current pseudo-boxes are modelled by a mixture
of two Gaussians (GMM), and the threshold is read off the Gaussian of lower cost. What is mined here
feeds the query consistency only; class and box losses keep the score threshold (paper, ablation;
released code: dino_detr_ssod.py:332-353).

Differences from the released code: the costs of one step on one machine are few, so a short queue
of past costs can join them. The other rules of MINING are those of the paper's ablation.

A box is a candidate if its score reaches the mean plus one standard deviation of its image's
scores. On COCO these are the scores of up to 300 boxes, nearly all of them low, so the bar is low.
A small detector has about ten boxes in an image, most of them on objects, and the same bar lets
hardly any but confident boxes pass. There the scores of all query-class pairs are what the boxes
are on COCO: CANDIDATE_SCORES names the choice.

Shapes: B images, K pseudo-boxes per image, Q queries, C classes.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from semidetr_lite import distributed
from semidetr_lite.device import to_device

MINING = ("gmm", "mean_std", "top_k", "none")  # rules
CANDIDATE_SCORES = ("boxes", "pairs")  # whose mean and deviation are the candidates' bar


class Mined(NamedTuple):
    """What mining decides in one micro-batch."""

    mask: np.ndarray  # (B, K) bool, the mined boxes
    threshold: float  # the matching cost up to which a box counts as reliable
    costs: np.ndarray  # (N,) the matching costs in all processes, nan for boxes without a partner


def mining_candidates(
    scores: torch.Tensor,
    valid: torch.Tensor,
    rule: str,
    top_k: int,
    pair_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """The boxes that mining chooses from: (B, K) bool.

    Args:
        scores, valid: (B, K) teacher's scores in falling order, (B, K) bool.
        rule: "gmm" and "mean_std" take all boxes that reach their image's mean score plus one
            standard deviation; "top_k" the `top_k` best of each image; "none" no box.
        top_k: see rule.
        pair_scores: (B, Q * C) the scores whose mean and deviation count, those of all query-class
            pairs; None: the scores of the boxes.
    """
    if rule == "none":
        return torch.zeros_like(valid)
    if rule == "top_k":
        return valid & (torch.arange(valid.shape[1], device=valid.device) < top_k)
    if pair_scores is None:
        return above_mean_plus_std(scores, valid)
    std, mean = torch.std_mean(pair_scores, dim=1, keepdim=True)
    return valid & (scores >= mean + std)


def above_mean_plus_std(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Scores of at least their image's mean plus one standard deviation: (B, K) bool.

    scores, valid: (B, K), (B, K) bool. One score alone has no standard deviation and is not taken
    (released code: dino_detr_ssod.py:918-939).
    """
    count = valid.sum(1, keepdim=True)
    valid_scores = torch.where(valid, scores, 0.0)
    mean = valid_scores.sum(1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, valid_scores - mean, 0.0).square().sum(1, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return valid & (scores >= mean + std) & (count > 1)


def mine(matched: np.ndarray, candidates: np.ndarray, past_costs: np.ndarray, rule: str) -> Mined:
    """Mine the reliable boxes of a micro-batch, with a threshold over all processes.

    Args:
        matched: (B, K) matching cost of each pseudo-box, nan without a partner.
        candidates: (B, K) bool, from mining_candidates.
        past_costs: (M,) costs that join the mixture, nan where there is none.
        rule: see MINING.
    """
    costs = np.concatenate(distributed.all_gather(matched.ravel()))
    threshold = reliable_threshold(np.concatenate([past_costs, costs]))
    return Mined(select_mined(matched, candidates, threshold, rule), threshold, costs)


def select_mined(
    matched: np.ndarray, candidates: np.ndarray, threshold: float, rule: str
) -> np.ndarray:
    """The mined boxes: (B, K) bool.

    "gmm": those whose cost is at most the threshold, confident ones among them; every other rule:
    the candidates.
    """
    if rule == "gmm":
        return np.isfinite(matched) & (matched <= threshold)
    return candidates


def fit_gmm(costs: np.ndarray) -> GaussianMixture:
    """Two Gaussians over N >= 2 costs, started at the lowest and the highest cost.

    Released code: dino_detr_ssod.py:832-872.
    """
    mixture = GaussianMixture(
        n_components=2,
        covariance_type="diag",
        reg_covar=1e-5,
        weights_init=np.array([0.5, 0.5]),
        means_init=np.array([[costs.min()], [costs.max()]]),
        precisions_init=np.ones((2, 1)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(costs[:, None])


def reliable_threshold(costs: torch.Tensor | np.ndarray) -> float:
    """The matching cost up to which pseudo-boxes count as reliable.

    It is the cost of the sample of highest likelihood among those that belong to the Gaussian of
    lower cost (paper, section 3.4; released code: dino_detr_ssod.py:874-890).

    Args:
        costs: (N,), lower is better; entries that are not finite are ignored.

    Returns:
        The threshold; the only cost if N is 1, and 0 if N is 0.
    """
    if isinstance(costs, torch.Tensor):
        costs = costs.detach().cpu()
    costs = np.asarray(costs, dtype=np.float64).reshape(-1)
    costs = costs[np.isfinite(costs)]
    if len(costs) < 2:
        return float(costs[0]) if len(costs) else 0.0
    mixture = fit_gmm(costs)
    reliable = mixture.predict(costs[:, None]) == 0
    if not reliable.any():
        reliable = ~reliable
    likelihood = mixture.score_samples(costs[:, None])
    return float(costs[np.where(reliable, likelihood, -np.inf).argmax()])


def push_costs(queue: torch.Tensor, costs: np.ndarray) -> torch.Tensor:
    """The queue of past costs after new ones have joined it at the end.

    Args:
        queue: (M,), nan where empty.
        costs: (N,) new ones; those that are not finite are left out.

    Returns:
        (M,), the newest costs.
    """
    new = torch.as_tensor(costs[np.isfinite(costs)], dtype=queue.dtype)
    return torch.cat([queue, to_device(new, queue.device)])[len(new) :]
