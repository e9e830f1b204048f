"""Cost-based pseudo-label mining (CPM, paper section 3.4): the price the student would pay for a pseudo-box says
whether to believe it.

Reliable pseudo-boxes are cheap to match, unreliable ones dear, and where "cheap" ends moves with training. So the
costs of all current pseudo-boxes are modelled by two Gaussians, and the threshold is read off the cheaper one. What
is mined here feeds the query consistency only; class and box losses keep the score cut (paper, ablation; released
code: dino_detr_ssod.py:332-353).

Differences from the released code: costs of one step on one machine are few, so a short memory of past costs can join
them.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from semidetr_lite.device import to_device
from semidetr_lite.matching import hungarian


def fit_mixture(costs: np.ndarray) -> GaussianMixture:
    """Two Gaussians over N >= 2 costs, started at the cheapest and dearest (released: dino_detr_ssod.py:832-872)."""
    start = {"weights_init": np.array([0.5, 0.5]), "means_init": np.array([[costs.min()], [costs.max()]])}
    start["precisions_init"] = np.ones((2, 1))
    mixture = GaussianMixture(2, covariance_type="diag", reg_covar=1e-5, **start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(costs[:, None])


def reliable_threshold(costs) -> float:
    """The cost up to which pseudo-boxes count as reliable: that of the most likely sample of the cheaper Gaussian.

    costs: (N,) tensor or array, lower is better; entries that are not finite are ignored. The only cost if N is 1, and
        0 if N is 0 (paper section 3.4; released code: dino_detr_ssod.py:874-890).
    """
    costs = np.asarray(costs.detach().cpu() if isinstance(costs, torch.Tensor) else costs, dtype=np.float64).reshape(-1)
    costs = costs[np.isfinite(costs)]
    if len(costs) < 2:
        return float(costs[0]) if len(costs) else 0.0
    mixture = fit_mixture(costs)
    cheap = mixture.predict(costs[:, None]) == 0
    if not cheap.any():
        cheap = ~cheap
    likelihood = mixture.score_samples(costs[:, None])
    return float(costs[np.where(cheap, likelihood, -np.inf).argmax()])


def matched_costs(costs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """What each pseudo-box costs its Hungarian partner, nan without one: costs (B, Q, T), valid (B, T) -> (B, T)."""
    matched = np.full(valid.shape, np.nan)
    for image in range(len(costs)):
        columns = np.flatnonzero(valid[image])
        if len(columns):
            queries, targets = hungarian(costs[image][:, columns])
            matched[image, columns[targets]] = costs[image][queries, columns[targets]]
    return matched


def remember(past: torch.Tensor, costs: np.ndarray) -> torch.Tensor:
    """The memory (K,) of past costs, nan where empty, with new ones pushed in at its end."""
    fresh = torch.as_tensor(costs[np.isfinite(costs)], dtype=past.dtype)
    return torch.cat([past, to_device(fresh, past.device)])[len(fresh) :]
