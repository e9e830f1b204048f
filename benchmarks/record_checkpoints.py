"""The notebooks' weights: trained again, written in half precision, and what each finds.

    python benchmarks/record_checkpoints.py --out runs/checkpoints [--only detr fcos]

trains what has no finished run yet (seed 0; about an hour and a half on 2 CPU cores) and writes the
averaged weights to notebooks/checkpoints/NAME.safetensors and the AP of each on the first 100 tune
scenes to recorded.json.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from semidetr_lite import load_detector
from semidetr_lite.data import digits
from semidetr_lite.data.batches import Batches
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.evaluate import evaluate
from semidetr_lite.losses import detection_loss
from semidetr_lite.matching import layer_costs, match_layers, pad_targets
from semidetr_lite.training.checkpoint import save_weights
from semidetr_lite.training.loop import train_or_resume
from semidetr_lite.training.presets import PRESETS, make_detector
from semidetr_lite.training.settings import Config, change, config_json, new_config

CHECKPOINTS = Path(__file__).parents[1] / "notebooks" / "checkpoints"
SCENES = 100  # of the tune split


class Made(NamedTuple):
    """How one file is made: arguments of new_config, and the entry it begins from."""

    settings: dict
    start: str | None = None


MADE = {
    "early": Made({"method": "supervised", "steps": 400}),
    "supervised": Made({"method": "supervised", "steps": 1000}),
    # supervised for as long as "supervised" and "semi_detr" take together, for pictures beside
    # Semi-DETR
    "supervised_same_time": Made({"method": "supervised", "steps": 4750}),
    "semi_detr": Made({"method": "semi-detr", "steps": 1500}, "supervised"),
    # begins from the backbone alone; 12 queries, of which each is matched often enough to learn
    "detr": Made(
        {
            "method": "supervised",
            "detector": "detr",
            "percent": 100,
            "steps": 6000,
            "num_queries": 12,
        },
        "semi_detr",
    ),
    # a smaller box head: the file must stay under 2 MB
    "faster_rcnn": Made(
        {
            "method": "supervised",
            "detector": "faster-rcnn",
            "steps": 1000,
            "representation_size": 48,
        }
    ),
    "fcos": Made({"method": "supervised", "detector": "fcos", "steps": 1000}),
}


def train(name: str, out: Path) -> Path:
    """The folder of an entry's finished run, made now or before."""
    made, folder = MADE[name], out / name
    start = made.start and str(train(made.start, out))
    whole = name != "detr"
    config = new_config(
        **{"seed": 0, "percent": 10, **made.settings}, burn_in=start if whole else None
    )
    if whole:
        train_or_resume(config, folder)
    elif not (folder / "teacher.safetensors").exists():
        train_detr(config, Path(start), folder)
    return folder


def ship(name: str, run: Path) -> dict:
    """Write an entry's file; its AP, in %, and how its run was made."""
    config = json.loads((run / "config.json").read_text())
    detector, file = load_detector(run), CHECKPOINTS / f"{name}.safetensors"
    arguments = config["detector_kwargs"]
    save_weights(file, detector, config["detector"], arguments, config["categories"], torch.float16)
    keep = {
        key: config[key]
        for key in ("method", "detector", "percent", "seed", "steps", "commit", "machine")
    }
    return {**find_ap(file), **keep, "MB": round(file.stat().st_size / 1e6, 2)}


def train_detr(config: Config, start: Path, out: Path) -> None:
    """A DETR on all labels, its backbone that of `start` (as the real one begins on ImageNet's)."""
    steps, kwargs = config.steps, config.detector_kwargs
    torch.manual_seed(0)
    detector = make_detector("detr", 10, kwargs).train()
    detector.backbone.load_state_dict(load_detector(start).backbone.state_dict())
    batches = Batches(digits.load(100, 1), 16, 0, PRESETS["digits"].views, seed=0)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-4)
    for step in tqdm(range(steps), "detr"):
        images, targets = batches[step]["labelled"]
        padded, layers = pad_targets(targets), stack_layers(detector(images))
        costs = layer_costs(layers, padded).numpy()
        valid = padded.valid.numpy()
        assignment = match_layers(layers, padded, "one_to_one", costs=costs, valid=valid)
        losses = detection_loss(layers, padded, assignment, "one_to_one")
        optimizer.param_groups[0]["lr"] = 5e-4 * min(
            1, (step + 1) / 100, 3 * (steps - step) / steps
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()
    out.mkdir(parents=True, exist_ok=True)
    config = change(config, categories=digits.CATEGORIES)
    (out / "config.json").write_text(config_json(config))
    weights = out / "teacher.safetensors"
    save_weights(weights, detector, "detr", kwargs.given(), digits.CATEGORIES)


def find_ap(file: Path) -> dict:
    """Of a file of weights, in %, on the first scenes of the tune split: AP, and AP50 of boxes
    whatever their class.
    """
    tune = digits.load(percent=10, fold=1).tune
    images, truths = zip(*(tune[index] for index in range(SCENES)))
    found = load_detector(file).detect(images)
    one_class = (
        [{**one, "labels": torch.zeros_like(one["labels"])} for one in part]
        for part in (found, truths)
    )
    values = {"AP": evaluate(found, truths)["AP"], "AP50_any_class": evaluate(*one_class)["AP50"]}
    return {key: round(100 * value, 2) for key, value in values.items()}


def main() -> None:
    """Train what is missing, then ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--only", nargs="*", choices=list(MADE), default=list(MADE))
    options = parser.parse_args()
    record = CHECKPOINTS / "recorded.json"
    for name in options.only:
        line = ship(name, train(name, options.out))
        print(name, line)
        lines = json.loads(record.read_text()) if record.exists() else {}
        lines = {
            key: line if key == name else lines.get(key)
            for key in MADE
            if key == name or key in lines
        }
        record.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
