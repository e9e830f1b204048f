"""The notebooks' weights: trained again, written in half precision, and what each finds.

    python benchmarks/record_checkpoints.py --out runs/checkpoints [--only detr fcos]

trains what has no finished run yet (seed 0; about an hour and three quarters on 2 CPU cores) and
writes the averaged weights to notebooks/checkpoints/NAME.safetensors and the AP of each on the
first 100 tune scenes to recorded.json.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from semidetr_lite import load_detector
from semidetr_lite.boxes import pairwise_overlaps
from semidetr_lite.data import digits
from semidetr_lite.data.batches import Batches
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.evaluate import evaluate
from semidetr_lite.loss_weights import LossWeights
from semidetr_lite.losses import detection_loss
from semidetr_lite.matching import layer_costs, match_layers, pad_targets
from semidetr_lite.training.checkpoint import save_weights
from semidetr_lite.training.loop import train_or_resume
from semidetr_lite.training.presets import PRESETS, make_detector
from semidetr_lite.training.settings import Config, change, config_json, new_config

CHECKPOINTS = Path(__file__).parents[1] / "notebooks" / "checkpoints"
SCENES = 100  # of the tune split
PLACE_STEPS, KEPT_BATCHES = 6000, 600  # of the DETR, see train_detr
# steps that are run, steps of the schedule that they are the beginning of, learning rate
CLASS_PHASES = ((1250, 1500, 5e-4), (800, 2500, 8e-4), (700, 700, 8e-4))


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
            "steps": PLACE_STEPS + sum(steps for steps, _, _ in CLASS_PHASES),
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
    found = find_ap(file) | (count_right_classes(file) if name == "detr" else {})
    return {**found, **keep, "MB": round(file.stat().st_size / 1e6, 2)}


def train_detr(config: Config, start: Path, out: Path) -> None:
    """A DETR on all labels, its backbone that of `start` (as the real one begins on ImageNet's).

    It learns places first, with all weights at the same rate. The backbone forgets the classes on
    the way. So it gets its first weights back and keeps them, and the transformer learns on.
    """
    kwargs = config.detector_kwargs
    torch.manual_seed(0)
    detector = make_detector("detr", 10, kwargs).train()
    backbone = load_detector(start).backbone
    detector.backbone.load_state_dict(backbone.state_dict())
    splits = digits.load(100, 1)
    batches = Batches(splits, 16, 0, PRESETS["digits"].views, seed=0)
    loaded = (batches[step]["labelled"] for step in tqdm(range(PLACE_STEPS), "places"))
    fit_detr(detector, loaded, PLACE_STEPS, 5e-4)
    restore_backbone(detector, backbone, [splits.labelled[index][0] for index in range(300)])
    kept = KeptMaps(detector, [batches[step]["labelled"] for step in range(KEPT_BATCHES)])
    for steps, schedule, rate in CLASS_PHASES:
        kept.fit(steps, schedule, rate)
    out.mkdir(parents=True, exist_ok=True)
    config = change(config, categories=digits.CATEGORIES)
    (out / "config.json").write_text(config_json(config))
    weights = out / "teacher.safetensors"
    save_weights(weights, detector, "detr", kwargs.given(), digits.CATEGORIES)


def fit_detr(
    detector: DETR, batches: Iterable, schedule: int, rate: float, class_weight: float = 2.0
) -> None:
    """Train on batches of (images, targets), with one-to-one matching and a fresh AdamW.

    `rate` rises over 100 steps and falls to zero over the last third of `schedule` steps.
    """
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate)
    weights = LossWeights(class_weight=class_weight)
    for step, (images, targets) in enumerate(batches):
        padded, layers = pad_targets(targets), stack_layers(detector(images))
        costs = layer_costs(layers, padded).numpy()
        assignment = match_layers(
            layers, padded, "one_to_one", costs=costs, valid=padded.valid.numpy()
        )
        losses = detection_loss(layers, padded, assignment, "one_to_one", weights)
        factor = min(1, (step + 1) / 100, 3 * (schedule - step) / schedule)
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()


@torch.no_grad()
def restore_backbone(detector: DETR, backbone: nn.Module, images: list[torch.Tensor]) -> None:
    """Give a DETR a backbone, and the projection after which its tokens change least.

    The projection is the least squares fit, over all cells of the images, of the tokens that the
    detector has now.
    """
    projection = detector.projections[0]
    before, after = [], []
    for image in images:
        normalized = torch.stack(detector.normalize([image]))
        tokens = projection(detector.backbone(normalized)[0])
        before.append(tokens.flatten(2)[0].T)
        after.append(backbone(normalized)[0].flatten(2)[0].T)
    maps = torch.cat(after)
    maps = torch.cat([maps, torch.ones(len(maps), 1)], 1)
    solution = torch.linalg.lstsq(maps, torch.cat(before)).solution  # (channels + 1, D)
    projection[0].weight.copy_(solution[:-1].T[..., None, None])
    projection[0].bias.copy_(solution[-1])
    detector.backbone.load_state_dict(backbone.state_dict())


class KeptMaps(nn.Module):
    """The backbone's maps of some batches, kept, so that the rest of a DETR trains without it."""

    pad_before_backbone = False

    @torch.no_grad()
    def __init__(self, detector: DETR, batches: list[tuple]):
        super().__init__()
        self.detector, self.batches = [detector], batches  # a list: not a module of this one
        self.maps = [
            detector.backbone(torch.stack(detector.normalize(images)))[0].half()
            for images, _ in tqdm(batches, "maps")
        ]
        self.current = 0

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.maps[self.current].float()]

    def fit(self, steps: int, schedule: int, rate: float) -> None:
        """`fit_detr` for some steps on the batches in turn, as often as needed."""
        (detector,) = self.detector
        backbone, detector.backbone = detector.backbone, self
        fit_detr(detector, self._in_turn(steps), schedule, rate, class_weight=4.0)
        detector.backbone = backbone

    def _in_turn(self, steps: int) -> Iterator[tuple]:
        for step in tqdm(range(steps), "classes"):
            self.current = step % len(self.batches)
            yield self.batches[self.current]


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


def count_right_classes(file: Path) -> dict:
    """Of a file of weights, on the first scenes of the tune split: how many objects have a box of
    IoU 0.5 or more, and for how many of these, in %, the highest-scoring such box has the class.
    """
    tune = digits.load(percent=10, fold=1).tune
    images, truths = zip(*(tune[index] for index in range(SCENES)))
    with_box = right = 0
    for detection, truth in zip(load_detector(file).detect(images), truths):
        fits = pairwise_overlaps(truth["boxes"], detection["boxes"])[0] >= 0.5  # (T, N)
        best = detection["labels"][(fits * detection["scores"]).argmax(1)]
        with_box += int(fits.any(1).sum())
        right += int((best == truth["labels"])[fits.any(1)].sum())
    return {"objects_with_box": with_box, "class_right": round(100 * right / max(with_box, 1), 2)}


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
