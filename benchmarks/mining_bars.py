"""What CPM would mine under several bars for its candidates, from the weights of one run.

    python benchmarks/mining_bars.py RUN --images 100

Boxes of the teacher on scenes of the tune split, each as it is, matched to the student's queries;
one mixture over the costs of all of them. A line per bar: boxes that are mined and not confident,
how many are right, and how many of the objects without a confident box they find; "any_class" asks
for the place alone.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from semidetr_lite.boxes import to_model
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.matching import PaddedTargets, layer_costs, matched_costs
from semidetr_lite.methods.cost_mining import above_mean_plus_std, reliable_threshold
from semidetr_lite.methods.mean_teacher import PseudoBoxes
from semidetr_lite.training.loop import Run
from semidetr_lite.training.measure import detection_of, mined_counts, plain_pseudo_boxes

Bar = Callable[[PseudoBoxes], torch.Tensor]


def over_pairs(deviations: float) -> Bar:
    """Candidates reach the mean plus some standard deviations of all query-class pairs."""
    return lambda pseudo: (
        pseudo.valid
        & (
            pseudo.scores
            >= (pseudo.pair_scores.mean(1) + deviations * pseudo.pair_scores.std(1))[:, None]
        )
    )


BARS: dict[str, Bar] = {
    "boxes": lambda pseudo: above_mean_plus_std(pseudo.scores, pseudo.valid),
    "pairs": over_pairs(1),
    "pairs, 2 deviations": over_pairs(2),
    "score 0.1": lambda pseudo: pseudo.above(0.1),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    run = Run(None, options.run, resume=True, workers=0, quiet=True)
    method, scenes = run.method, []
    for index in range(options.images):
        image, target = run.splits.tune[index]
        pseudo = plain_pseudo_boxes(method, [image])
        targets = PaddedTargets(
            to_model(pseudo.boxes, image.shape[-2:]), pseudo.labels, pseudo.valid
        )
        layer = stack_layers(method.student([image])).last_of_decoder()
        scenes.append((pseudo, layer_costs(layer, targets)[0].numpy(), target))
    for name, bar in BARS.items():
        counts, matched = Counter(), []
        for pseudo, costs, _ in scenes:
            valid = pseudo.above(method.score_threshold) | bar(pseudo)
            matched.append(matched_costs(costs, valid.numpy())[0])
        threshold = reliable_threshold(np.concatenate(matched))
        for (pseudo, _, target), costs in zip(scenes, matched, strict=True):
            confident = pseudo.above(method.score_threshold)[0]
            mined = torch.from_numpy(np.isfinite(costs) & (costs <= threshold)) & ~confident
            boxes = (detection_of(pseudo, confident), detection_of(pseudo, mined))
            counts.update(mined_counts(*boxes, target))
        print(name, {"threshold": round(threshold, 3), **counts}, flush=True)


if __name__ == "__main__":
    main()
