"""Named recipes: everything a run needs to know beyond its data, its method and its seed.

`digits` is scaled to 30 queries, small images and minutes on a laptop. The paper's constants belong to the COCO
presets.
"""

import dataclasses
from dataclasses import dataclass, field

from semidetr_lite.data import coco, digits
from semidetr_lite.data.splits import Splits
from semidetr_lite.data.views import ViewSettings
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.errors import UserError
from semidetr_lite.losses import LossWeights
from semidetr_lite.methods.mean_teacher import Averaged, MeanTeacher
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.methods.supervised import Supervised

METHODS = {"supervised": Supervised, "mean-teacher": MeanTeacher, "semi-detr": SemiDETR}
DETECTORS = {"dino": DINO, "deformable-detr": DeformableDETR, "detr": DETR}


@dataclass(frozen=True)
class Recipe:
    """A preset. Step counts are optimizer steps of one run."""

    arguments: dict  # keyword arguments of the detector; in PRESETS of each detector by its name
    views: ViewSettings
    steps: int
    labelled: int = 16  # images a step
    unlabelled: int = 16
    learning_rate: float = 1e-4
    backbone_factor: float = 0.1  # of the learning rate
    weight_decay: float = 1e-4
    clip: float = 0.1  # norm of the gradient
    warm_up: int = 0  # steps of rising learning rate
    decay: float = 0.0  # share of the steps, at the end, in which the learning rate falls to zero
    ema_ceiling: float = 0.999
    one_to_many_share: float = 0.5  # share of a Semi-DETR run's steps in stage one
    score_cut: float = 0.4
    unlabelled_weight: float = 4.0
    unlabelled_box_weight: float = 1.0
    candidates: int = 13
    consistency_weight: float = 10.0
    cost_memory: int = 0
    most: int = 100  # pseudo-boxes looked at in an image
    nms: float = 0.6
    weights: LossWeights = field(default_factory=LossWeights)
    log_every: int = 50
    watch_every: int = 2000  # steps between two looks at the teacher's boxes on a few fixed images
    evaluate_every: int = 1000
    evaluate_images: int = 5000  # of the tune split, at intervals


TINY = {
    "num_queries": 30,
    "dim": 64,
    "heads": 4,
    "hidden": 256,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "backbone": "tiny",
}
TINY_DEFORMABLE = {"levels": 3, "points": 4, "anchor_size": 0.1}
RESNET = {"backbone": "resnet50", "backbone_weights": "IMAGENET1K_V1", "test_size": (800, 1333)}

PRESETS = {
    "digits": Recipe(
        arguments={
            "dino": {**TINY, **TINY_DEFORMABLE, "denoising_queries": 20, "query_temperature": 20.0},
            "deformable-detr": {**TINY, **TINY_DEFORMABLE, "with_box_refine": True, "two_stage": True},
            "detr": {**TINY, "level": 0},
        },
        views=ViewSettings(zoom=(0.85, 1.18), shift=0.06, weak_zoom=(0.95, 1.0), strong_rotation=3.0, strong_shear=3.0),
        steps=1000,
        one_to_many_share=0.4,
        learning_rate=2e-3,
        backbone_factor=1.0,
        clip=1.0,
        warm_up=50,
        decay=0.25,
        ema_ceiling=0.98,
        score_cut=0.4,
        unlabelled_weight=2.0,
        unlabelled_box_weight=0.25,
        candidates=4,
        cost_memory=500,
        most=30,
        log_every=25,
        watch_every=100,
        evaluate_every=250,
        evaluate_images=150,
    ),
    "coco-10pct": Recipe(
        arguments={
            "dino": RESNET,
            "deformable-detr": {**RESNET, "with_box_refine": True, "two_stage": True},
            "detr": RESNET,
        },
        views=ViewSettings(short_sides=tuple(range(480, 801, 32))),
        steps=120_000,
        labelled=8,
        unlabelled=32,
        weights=LossWeights(l1_weight=10.0),
        evaluate_every=4000,
    ),
}


def load_splits(config: dict) -> Splits:
    """The data of a run, from its config.json."""
    if config["data"] == "digits":
        return digits.load(config["percent"], config["fold"])
    return coco.load(
        config["data"],
        config["images"],
        config["unlabelled"],
        config["percent"],
        config["fold"],
        config["validation"],
        config.get("folds"),
        config.get("flip", True),
    )


def make_recipe(config: dict) -> Recipe:
    """The recipe written in a config.json."""
    entries = dict(config["recipe"])
    entries["views"] = ViewSettings(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in entries["views"].items()}
    )
    entries["weights"] = LossWeights(*entries["weights"])
    return Recipe(**entries)


def recipe_as_dict(recipe: Recipe) -> dict:
    """For config.json."""
    return dataclasses.asdict(recipe)


def make_detector(name: str, num_classes: int, arguments: dict) -> Detector:
    """A detector by its name in the commands."""
    if name not in DETECTORS:
        raise UserError(f"no detector called {name!r}: choose from {', '.join(DETECTORS)}")
    return DETECTORS[name](num_classes=num_classes, **arguments)


def make_method(name: str, student: Detector, recipe: Recipe, steps: int, offset: int, seed: int) -> Averaged:
    """A method by its name in the commands; its stage one begins at step `offset` and lasts its share of `steps`."""
    shared = {"ema_ceiling": recipe.ema_ceiling, "seed": seed, "weights": recipe.weights}
    if name == "supervised":
        return Supervised(student, **shared)
    shared |= {
        key: getattr(recipe, key) for key in ("score_cut", "unlabelled_weight", "unlabelled_box_weight", "most", "nms")
    }
    if name == "mean-teacher":
        return MeanTeacher(student, **shared)
    if name == "semi-detr":
        stage_one = offset + round(recipe.one_to_many_share * steps)
        further = {key: getattr(recipe, key) for key in ("candidates", "consistency_weight", "cost_memory")}
        return SemiDETR(student, one_to_many_steps=stage_one, **further, **shared)
    raise UserError(f"no method called {name!r}: choose from {', '.join(METHODS)}")
