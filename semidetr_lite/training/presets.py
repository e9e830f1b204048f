"""Named recipes: everything a run needs to know beyond its data, its method and its seed.

`digits` is scaled to 30 queries, small images and minutes on a laptop. The paper's constants belong to the COCO
presets.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import get_args, get_origin, get_type_hints

from semidetr_lite.data import coco, digits
from semidetr_lite.data.splits import Splits
from semidetr_lite.data.views import ViewSettings
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.pyramid import FCOS, FasterRCNN
from semidetr_lite.errors import UserError, reading
from semidetr_lite.losses import LossWeights
from semidetr_lite.methods.dense_teacher import DenseTeacher
from semidetr_lite.methods.mean_teacher import MeanTeacher, TeacherStudent
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.methods.soft_teacher import SoftTeacher
from semidetr_lite.methods.supervised import Supervised

METHODS = {"supervised": Supervised, "mean-teacher": MeanTeacher, "semi-detr": SemiDETR}
METHODS |= {"soft-teacher": SoftTeacher, "dense-teacher": DenseTeacher}
DETECTORS = {"dino": DINO, "deformable-detr": DeformableDETR, "detr": DETR, "faster-rcnn": FasterRCNN, "fcos": FCOS}
QUERIES = ("dino", "deformable-detr", "detr")
TRAINS = {"mean-teacher": QUERIES, "semi-detr": QUERIES, "soft-teacher": ("faster-rcnn",), "dense-teacher": ("fcos",)}
MOST = 10_000  # queries, channels, layers: files of strangers ask for detectors


@dataclass(frozen=True)
class Recipe:
    """A preset. Step counts are optimizer steps of one run."""

    arguments: dict  # keyword arguments of the detector; in PRESETS of each detector by its name
    views: ViewSettings
    steps: int
    burn_in_steps: int = 0  # of the supervised run that an ablation's semi-supervised runs start from
    percent: float = 10  # of the training images whose labels are used
    further: int = 0  # digits: unlabelled scenes beyond the 2,000
    labelled_images: int = 16  # a step
    unlabelled_images: int = 16
    accumulate: int = 1  # parts that a step's images are run in, each with its share of both kinds
    # how a step is run, see engine.py
    precision: str = "auto"  # float32, tf32 or bfloat16; auto is bfloat16 on a GPU that has it, else float32
    checkpointing: bool = False  # layers and backbone stages run again in the backward pass: less memory, slower
    channels_last: bool = False  # the backbone's memory layout
    compile: bool = False  # torch.compile of layers and backbone
    learning_rate: float = 1e-4
    backbone_factor: float = 0.1  # of the learning rate
    weight_decay: float = 1e-4
    clip: float = 0.1  # norm of the gradient
    warm_up: int = 0  # steps of rising learning rate
    decay: float = 0.0  # share of the steps, at the end, in which the learning rate falls to zero
    drops: tuple[float, ...] = ()  # shares of the steps after which the learning rate falls to a tenth
    ema_decay: float = 0.999
    one_to_many_share: float = 0.5  # share of a Semi-DETR run's steps in stage one
    score_threshold: float = 0.4
    unlabelled_weight: float = 4.0
    unlabelled_box_weight: float = 1.0
    candidates: int = 13
    consistency_weight: float = 10.0
    consistency_in_both_stages: bool = False
    consistency_boxes: str = "both"
    mining: str = "gmm"
    mining_top_k: int = 9
    mined_targets: bool = False
    cost_queue_size: int = 0
    max_pseudo_boxes: int = 100  # per image; mining takes mean and standard deviation of the scores over these
    nms: float = 0.6
    soft_teacher: dict = field(default_factory=dict)  # arguments of the method that are not its defaults
    dense_teacher: dict = field(default_factory=dict)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    log_every: int = 50
    watch_every: int = 2000  # steps between two looks at the teacher's boxes on a few fixed images
    evaluate_every: int = 1000
    evaluate_images: int = 5000  # of the tune split, at intervals


TINY = {"num_queries": 30, "dim": 64, "heads": 4, "dim_feedforward": 256, "backbone": "tiny"}
TINY |= {"encoder_layers": 2, "decoder_layers": 3}
TINY_DEFORMABLE = {"levels": 3, "points": 4, "anchor_size": 0.1}
TINY_PYRAMID = {"dim": 64, "backbone": "tiny"}
TINY_PROPOSALS = {"object_size": 64, "representation_size": 128, "proposals": (100, 50), "sampled": (64, 32)}
RESNET = {"backbone": "resnet50", "backbone_weights": "IMAGENET1K_V1", "test_size": (800, 1333)}

DIGITS = Recipe(
    arguments={
        "dino": {**TINY, **TINY_DEFORMABLE, "denoising_queries": 20, "query_temperature": 20.0},
        "deformable-detr": {**TINY, **TINY_DEFORMABLE, "with_box_refine": True, "two_stage": True},
        "detr": {**TINY, "level": 0},
        "faster-rcnn": {**TINY_PYRAMID, "anchor_sizes": (12, 20, 32, 48), **TINY_PROPOSALS},
        "fcos": {**TINY_PYRAMID, "anchor_sizes": (4, 8, 16), "convs": 2},
    },
    views=ViewSettings(
        zoom=(0.85, 1.18), shift=0.06, weak_zoom=(0.95, 1.0),
        strong_zoom=(0.65, 1.5), strong_rotation=10.0, strong_shear=10.0,
    ),
    steps=1000, burn_in_steps=1000, precision="float32", one_to_many_share=0.4,
    learning_rate=2e-3, backbone_factor=1.0, clip=1.0, warm_up=50, decay=0.25,
    ema_decay=0.98, score_threshold=0.4, unlabelled_weight=2.0, unlabelled_box_weight=0.25, candidates=4,
    mining_top_k=4,
    soft_teacher={"score_threshold": 0.8, "unlabelled_weight": 2.0, "unlabelled_box_weight": 0.5},
    dense_teacher={"ratio": 0.05, "unlabelled_weight": 1.0, "unlabelled_box_weight": 0.5},
    cost_queue_size=500, max_pseudo_boxes=30, log_every=25, watch_every=100, evaluate_every=250, evaluate_images=150,
)  # fmt: skip

# The released code's effective values: 43.5 AP at 10 % was obtained with L1 counted twice, consistency in stage one
# alone, a constant rate, and 5 images on each of 8 GPUs; here they are 8 parts of one step. Its labelled share is drawn
# at random, 1.33 of 5 on average; here it is always 1 of 5.
COCO = Recipe(
    arguments={
        "dino": RESNET,
        "deformable-detr": {**RESNET, "with_box_refine": True, "two_stage": True},
        "detr": RESNET,
        "faster-rcnn": RESNET,
        "fcos": RESNET,
    },
    views=ViewSettings(short_sides=tuple(range(480, 801, 32))),
    steps=120_000, labelled_images=8, unlabelled_images=32, accumulate=8,
    max_pseudo_boxes=300, soft_teacher={"max_pseudo_boxes": 100}, dense_teacher={"max_pseudo_boxes": 100},
    loss_weights=LossWeights(l1_weight=10.0), evaluate_every=4000,
)  # fmt: skip

PRESETS = {
    "digits": DIGITS,
    "digits-full": dataclasses.replace(DIGITS, percent=100, further=2000),
    "coco-1pct": dataclasses.replace(COCO, percent=1),
    "coco-5pct": dataclasses.replace(COCO, percent=5),
    "coco-10pct": COCO,
    # The paper's words: L1 5, consistency in both stages with weight 1. Its optimizer (Adam, 0.001) is left out.
    "coco-10pct-paper": dataclasses.replace(
        COCO, loss_weights=LossWeights(), consistency_weight=1.0, consistency_in_both_stages=True
    ),
    # train2017 with all labels and unlabeled2017: 8 GPUs of 8 images, half of them labelled
    "coco-full": dataclasses.replace(
        COCO,
        percent=100,
        steps=240_000,
        labelled_images=32,  # and 32 unlabelled ones
        unlabelled_weight=2.0,
        drops=(1 / 2, 2 / 3),
    ),
    # VOC07 trainval with all labels and VOC12 trainval without
    "voc": dataclasses.replace(COCO, percent=100, steps=80_000),
}


def load_splits(config: dict, file="config.json") -> Splits:
    """The data of a run, from its config.json; a UserError names `file`."""
    with reading(file, "settings of data that cannot be used"):
        if config["data"] == "digits":
            return digits.load(config["percent"], config["fold"], config["recipe"].get("further", 0))
        places = (config[key] for key in ("data", "images", "unlabelled", "percent", "fold", "validation"))
        return coco.load(*places, config.get("folds"), config.get("flip", True))


def make_recipe(config: dict, file="config.json") -> Recipe:
    """The recipe written in a config.json; a UserError names `file`."""
    with reading(file, "not a recipe"):
        entries = dict(config["recipe"])
        views = {key: tuple(v) if isinstance(v, list) else v for key, v in entries["views"].items()}
        entries |= {"views": ViewSettings(**views), "loss_weights": LossWeights(*entries["loss_weights"])}
        recipe = Recipe(**{**entries, "drops": tuple(entries.get("drops", ()))})
        wanted = [(name, config.get(name), kind) for name, kind in SETTINGS.items()]
        for part in (recipe, recipe.views, recipe.loss_weights):
            wanted += [(name, getattr(part, name), kind) for name, kind in get_type_hints(type(part)).items()]
        for name, value, kind in wanted:
            if not _fits(value, kind) or name in COUNTS and value < 1:
                raise ValueError(f"{name} cannot be {value!r}")
        return recipe


SETTINGS = {"method": str, "detector": str, "data": str, "steps": int, "seed": int, "fold": int, "percent": float}
SETTINGS |= {"burn_in": str | None, "threads": int | None}
COUNTS = ("steps", "labelled_images", "accumulate", "candidates", "max_pseudo_boxes")
COUNTS += ("log_every", "watch_every", "evaluate_every")


def _fits(value, kind) -> bool:
    """Whether a value from JSON is of an annotated type; numbers are finite and not negative."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        sized = ... in parts or isinstance(value, tuple) and len(value) == len(parts)
        return isinstance(value, tuple) and sized and all(_fits(one, parts[0]) for one in value)
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < math.inf
    return isinstance(value, kind)


def make_detector(name: str, num_classes: int, arguments: dict) -> Detector:
    """A detector by its name in the commands."""
    if name not in DETECTORS:
        raise UserError(f"no detector called {name!r}: choose from {', '.join(DETECTORS)}")
    kinds = {key: kind for one in DETECTORS[name].__mro__ for key, kind in get_type_hints(one.__init__).items()}
    for key, value in arguments.items():
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, kinds.get(key, object)) or isinstance(value, int) and value > MOST:
            raise UserError(f"a detector with {key} {value!r} cannot be built (numbers: {MOST} at most)")
    return DETECTORS[name](num_classes=num_classes, **arguments)


def check_pair(method: str, detector: str) -> None:
    """Whether a method can train a detector, both by their names in the commands."""
    fitting = TRAINS.get(method, DETECTORS)
    if detector not in fitting:
        raise UserError(f"{method} cannot train {detector}: choose --detector {' or '.join(fitting)}")


def make_method(name: str, student: Detector, recipe: Recipe, steps: int, offset: int, seed: int) -> TeacherStudent:
    """A method by its name in the commands; its stage one begins at step `offset` and lasts its share of `steps`."""
    if name == "supervised":
        return Supervised(student, recipe.ema_decay, seed, recipe.loss_weights)
    ema = {"ema_decay": recipe.ema_decay, "seed": seed, "loss_weights": recipe.loss_weights}
    if name == "soft-teacher":
        changes = {"max_pseudo_boxes": recipe.max_pseudo_boxes, **recipe.soft_teacher}
        return SoftTeacher(student, **changes, **ema)
    if name == "dense-teacher":
        changes = {"max_pseudo_boxes": recipe.max_pseudo_boxes, **recipe.dense_teacher}
        return DenseTeacher(student, **changes, **ema)
    pseudo_labels = {
        "score_threshold": recipe.score_threshold,
        "unlabelled_weight": recipe.unlabelled_weight,
        "unlabelled_box_weight": recipe.unlabelled_box_weight,
        "max_pseudo_boxes": recipe.max_pseudo_boxes,
        "nms": recipe.nms,
    }
    if name == "mean-teacher":
        return MeanTeacher(student, **pseudo_labels, **ema)
    if name == "semi-detr":
        return SemiDETR(
            student,
            one_to_many_steps=offset + round(recipe.one_to_many_share * steps),
            candidates=recipe.candidates,
            consistency_weight=recipe.consistency_weight,
            consistency_in_both_stages=recipe.consistency_in_both_stages,
            consistency_boxes=recipe.consistency_boxes,
            mining=recipe.mining,
            mining_top_k=recipe.mining_top_k,
            mined_targets=recipe.mined_targets,
            cost_queue_size=recipe.cost_queue_size,
            **pseudo_labels,
            **ema,
        )
    raise UserError(f"no method called {name!r}: choose from {', '.join(METHODS)}")
