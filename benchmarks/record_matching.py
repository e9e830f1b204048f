"""Record what each part of one-to-many matching changes, beside notebook 04.

    python benchmarks/record_matching.py --seeds 0 1 2 [--steps 240]

All runs go on from notebooks/checkpoints/early.safetensors and see 8 labelled images per step; the
seed draws the images. Four arms, each one change away from the one before:

    one-to-one       the Hungarian pairs, hard class targets
    + several        up to four queries per object, all with hard class targets
    + soft targets   their class targets are the soft ones, with the quality focal loss
    + soft boxes     their box losses are weighted by the soft targets as well: one-to-many

AP with and without NMS and the number of duplicates are measured on tune scenes on the way. One
line per run goes to notebooks/recorded/matching.jsonl; runs that are there are not repeated.
"""

import argparse
from pathlib import Path

import torch

from semidetr_lite import load_detector
from semidetr_lite.data import digits
from semidetr_lite.data.batches import Batches
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Layers, stack_layers
from semidetr_lite.evaluate import evaluate
from semidetr_lite.files import append_jsonl, read_jsonl
from semidetr_lite.losses import detection_loss
from semidetr_lite.matching import PaddedTargets, layer_costs, match_layers, pad_targets
from semidetr_lite.training.measure import duplicates
from semidetr_lite.training.settings import new_config

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
START = NOTEBOOKS / "checkpoints" / "early.safetensors"
RECORDED = NOTEBOOKS / "recorded" / "matching.jsonl"
ARMS = ["one-to-one", "+ several", "+ soft targets", "+ soft boxes"]
BATCH_SIZE, CANDIDATES, LEARNING_RATE = 8, 4, 1e-3
MEASURE_EVERY, SCENES = 80, 100  # steps, and scenes of the tune split


def arm_losses(layers: Layers, targets: PaddedTargets, arm: str) -> dict[str, torch.Tensor]:
    """The class, L1 and GIoU losses of one arm."""
    if arm == "one-to-one":
        costs, valid = layer_costs(layers, targets).numpy(), targets.valid.numpy()
        pairs = match_layers(layers, targets, "one_to_one", costs=costs, valid=valid)
        return detection_loss(layers, targets, pairs, "one_to_one")
    soft = match_layers(layers, targets, "one_to_many", CANDIDATES)
    hard = soft._replace(quality=(soft.targets >= 0).float())
    if arm == "+ several":
        return detection_loss(layers, targets, hard, "one_to_one")
    losses = detection_loss(layers, targets, soft, "one_to_many")
    if arm == "+ soft targets":
        boxes = detection_loss(layers, targets, hard, "one_to_one")
        losses = {"class": losses["class"], "l1": boxes["l1"], "giou": boxes["giou"]}
    return losses


def train(arm: str, seed: int, steps: int) -> dict:
    """One line of the file: the run's settings and what was measured on the way."""
    config = new_config("digits", "supervised", "dino", percent=10, seed=seed, steps=steps)
    splits = digits.load(config.percent, config.fold)
    batches = Batches(splits, BATCH_SIZE, 0, config.views, seed)
    detector = load_detector(START).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LEARNING_RATE)
    measured = []
    for step in range(steps):
        images, targets = batches[step]["labelled"]
        losses = arm_losses(stack_layers(detector(images)), pad_targets(targets), arm)
        factor = min(1, (step + 1) / 20, 4 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % MEASURE_EVERY == 0:
            measured.append({"step": step + 1, **measure(detector, splits.tune)})
            print(f"{arm}, seed {seed}: {measured[-1]}", flush=True)
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "percent": config.percent,
        "measured": measured,
        "commit": config.commit,
        "machine": config.machine,
        "command": config.command,
    }


def measure(detector: Detector, tune) -> dict:
    """AP without and with NMS at 0.6, and the duplicates per object found."""
    detector.eval()
    images, truths = zip(*(tune[index] for index in range(SCENES)))
    figures = duplicates(detector, tune, SCENES)
    for name, nms in (("AP", 1.0), ("AP_nms", 0.6)):
        figures[name] = round(evaluate(detector.detect(images, nms=nms), truths)["AP"], 4)
    detector.train()
    return figures


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, default=RECORDED)
    options = parser.parse_args()
    done = {(line["arm"], line["seed"], line["steps"]) for line in read_jsonl(options.out)}
    for seed in options.seeds:
        for arm in ARMS:
            if (arm, seed, options.steps) not in done:
                append_jsonl(options.out, [train(arm, seed, options.steps)])


if __name__ == "__main__":
    main()
