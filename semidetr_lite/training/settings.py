"""The settings of a run, once: presets, config.json and command lines are instances of `Settings`.

The name of a field is its option, its comment the help, its type the check. Nothing here imports
torch, so that help and error messages of the commands come at once.
"""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from semidetr_lite.data.view_settings import ViewSettings
from semidetr_lite.errors import UserError
from semidetr_lite.fields import Count, Fraction, Weight, WholeNumber, option_group, strict_group
from semidetr_lite.loss_weights import LossWeights
from semidetr_lite.normalizer_settings import NormalizerSettings

MethodName = Literal["supervised", "mean-teacher", "semi-detr", "soft-teacher", "dense-teacher"]
DetectorName = Literal["dino", "deformable-detr", "detr", "faster-rcnn", "fcos"]
PresetName = Literal[
    "digits",
    "digits-full",
    "coco-1pct",
    "coco-5pct",
    "coco-10pct",
    "coco-10pct-paper",
    "coco-10pct-supervised",
    "coco-10pct-short",
    "coco-full",
    "voc",
    "photos",
]
Precision = Literal["auto", "float32", "tf32", "bfloat16"]

METHOD_TITLES: dict[str, str] = {  # in tables, legends and sentences
    "supervised": "supervised",
    "mean-teacher": "mean teacher",
    "semi-detr": "Semi-DETR",
    "soft-teacher": "Soft Teacher",
    "dense-teacher": "Dense Teacher",
}
WITH_QUERIES = ("dino", "deformable-detr", "detr")
# The detectors that a method can train; a method that is not named here trains all.
COMPATIBLE_DETECTORS = {
    "mean-teacher": WITH_QUERIES,
    "semi-detr": WITH_QUERIES,
    "soft-teacher": ("faster-rcnn",),
    "dense-teacher": ("fcos",),
}
# A detector of more channels, layers or queries is refused: files of strangers ask for detectors.
MAX_DETECTOR_ARG = 10_000
Size = Annotated[int, Field(ge=1, le=MAX_DETECTOR_ARG)]
# the coarsest stride of a ResNet divides it; beyond the larger side of COCO's recipe it only wastes
PaddingMultiple = Annotated[int, Field(ge=32, le=1024, multiple_of=32)]
OPTIONS = "the options"  # where settings come from that stand in no file
OPTION_NAMES = {"num_queries": "queries"}  # of fields that are options under another name
QUERIES_OPTION = tyro.conf.arg(name=OPTION_NAMES["num_queries"], prefix_name=False)
PREFIXED_GROUPS = (
    "soft_teacher",
    "dense_teacher",
)  # their options are --soft-teacher.score-threshold


class Role(Enum):
    """What a field is for, beside its value; written into its type."""

    IDENTITY = auto()  # tells a run from others
    RUNTIME = auto()  # how a step is run, not what is learned: a resumed run may have another


@dataclass(frozen=True)
@option_group
class DataFiles:
    """More about the data."""

    images: str | None = None  # the folder of the json's images
    # a json or folder to measure on; without one, a fifth of the images is set aside
    validation: str | None = None
    # a folder of folds with its manifest (data_scripts/make_splits.py) to read percent and fold
    # from
    folds: str | None = None
    # go on without images and labels that are missing or cannot be read, in training and validation
    skip_unreadable: Annotated[bool, Role.RUNTIME] = False
    extra_unlabelled: WholeNumber = 0  # of the digits: unlabelled scenes beyond the 2,000
    # what a training image without a label file or annotation is; background: it has no object
    missing_labels: Literal["unlabelled", "background"] = "unlabelled"
    # whether every class gets its fraction of the labelled images, the rare ones first
    stratified: bool = True


@dataclass(frozen=True)
@option_group
class Optimizer:
    """Images of a step, and AdamW."""

    # labelled images of a step, of all processes together; preset photos: 0 is chosen
    batch_size: WholeNumber = 16
    # unlabelled images of a step, of all processes together; preset photos: 0 is chosen
    unlabelled_batch_size: WholeNumber = 16
    learning_rate: Weight = 1e-4  # of the detector but for its backbone
    backbone_lr_factor: Weight = 0.1  # the backbone's learning rate as a fraction of it
    weight_decay: Weight = 1e-4  # of AdamW
    clip_grad_norm: Weight = 0.1  # largest norm of the gradient
    # of the teacher's weights, the largest; it rises to it in the first steps
    ema_decay: Fraction = 0.999
    # the learning rate of sampling offsets and reference points as a fraction of it
    sampling_lr_factor: Weight = 1.0


@dataclass(frozen=True)
@option_group
class Schedule:
    """How the learning rate changes."""

    warmup_steps: WholeNumber = 0  # in which the learning rate rises
    # fractions of the steps after which the learning rate falls to a tenth
    lr_drops: tuple[Fraction, ...] = ()
    # of the steps, at the end, in which the learning rate falls to zero
    lr_decay_fraction: Fraction = 0.0
    burn_in_steps: WholeNumber = 0  # of the supervised run that the runs of an ablation start from


@dataclass(frozen=True)
@option_group
class Runtime:
    """Speed and memory; all but the threads may change on --resume."""

    # micro-batches that a step's images are run in, one after the other; auto: the fewest that fit
    # into the GPU's memory, 1 on a CPU
    accumulate: Annotated[Count | Literal["auto"], Role.RUNTIME] = 1
    # auto: bfloat16 on a GPU that has it, else float32
    precision: Annotated[Precision, Role.RUNTIME] = "auto"
    # less memory for a slower step: layers are run again in the backward pass
    checkpointing: Annotated[bool, Role.RUNTIME] = False
    channels_last: Annotated[bool, Role.RUNTIME] = False  # the memory layout of the backbone
    compile: Annotated[bool, Role.RUNTIME] = False  # torch.compile for backbone and layers
    # sides of a padded batch are multiples of it, in pixels: more gives a GPU fewer shapes
    pad_to_multiple_of: Annotated[PaddingMultiple, Role.RUNTIME] = 32
    # CPU threads of each process; without it torch's choice, which is stored and kept on resume
    threads: Count | None = None


@dataclass(frozen=True)
@option_group
class PseudoLabels:
    """Pseudo-labels of mean-teacher and semi-detr."""

    score_threshold: Weight = 0.4  # least score of a confident pseudo-box
    unlabelled_weight: Weight = 4.0  # of the losses on unlabelled images
    unlabelled_box_weight: Weight = 1.0  # a further factor of their box losses
    max_pseudo_boxes: Count = 100  # per image
    # IoU over which the teacher's boxes of one class suppress each other in stage one
    nms: Fraction = 0.6


@dataclass(frozen=True)
@option_group
class SemiDetr:
    """Hybrid matching, consistency and mining of semi-detr."""

    one_to_many_share: Fraction = 0.5  # of the steps in stage one, with one-to-many matching
    candidates: Count = 13  # queries per target in one-to-many matching
    consistency_weight: Weight = 10.0  # of the consistency loss
    consistency_in_both_stages: bool = False  # not in stage one alone
    # boxes with consistency queries
    consistency_boxes: Literal["none", "confident", "mined", "both"] = "both"
    # how boxes are mined by their matching costs
    mining: Literal["none", "gmm", "mean_std", "top_k"] = "gmm"
    mining_top_k: Count = 9  # boxes per image, if mining is top_k
    mined_targets: bool = False  # mined boxes are targets too
    cost_queue_size: WholeNumber = 0  # costs of past steps that the mixture is fitted to as well
    # whose mean plus deviation a box's score must reach to be mined: those of the image's boxes,
    # or of all its query-class pairs
    candidate_scores: Literal["boxes", "pairs"] = "boxes"
    # of the network that makes the content of consistency queries; batch: as released
    projector_norm: Literal["batch", "group"] = "group"
    projector_lr_factor: Weight = 1.0  # its learning rate as a fraction of the detector's


@dataclass(frozen=True)
@strict_group
class SoftTeacherSettings:
    """Soft Teacher."""

    score_threshold: Weight = 0.9  # least score of a box whose class is learned
    box_score_threshold: Weight = 0.5  # least score of a box whose place is learned
    variance_threshold: Weight = 0.02  # largest variance of jittered boxes of such a box
    num_jitters: Count = 10  # jittered boxes per box
    jitter_scale: Fraction = 0.06  # of the jitters, of the box's side
    unlabelled_weight: Weight = 4.0  # of the losses on unlabelled images
    unlabelled_box_weight: Weight = 1.0  # a further factor of their box losses
    max_pseudo_boxes: Count = 100  # per image


@dataclass(frozen=True)
@strict_group
class DenseTeacherSettings:
    """Dense Teacher."""

    ratio: Fraction = 0.01  # of the cells that are learned from
    unlabelled_weight: Weight = 4.0  # of the losses on unlabelled images
    unlabelled_box_weight: Weight = 0.25  # a further factor of their box losses
    score_threshold: Weight = 0.4  # least score of a box that is counted in the log
    max_pseudo_boxes: Count = 100  # per image, in the log


@dataclass(frozen=True)
@option_group
class DetectorKwargs:
    """Arguments of the detector; None: its own default. Each detector takes some of them."""

    # objects that can be found in an image, at most
    num_queries: Annotated[Size | None, QUERIES_OPTION] = None
    backbone: str | None = None  # tiny, resnet18 ... resnet152, or timm:NAME (an extra)
    # a file, or "none" for random ones, or a name (IMAGENET1K_V1; downloaded once, 0.1 GB)
    backbone_weights: str | None = None
    dim: Size | None = None  # channels
    heads: Size | None = None  # of attention
    dim_feedforward: Size | None = None  # width of the feed-forward networks
    encoder_layers: Size | None = None  # their number
    decoder_layers: Size | None = None  # their number
    levels: Size | None = None  # feature maps, dino and deformable-detr
    points: Size | None = None  # sampling points per level and head, dino and deformable-detr
    # side of the first level's anchors, a fraction of the image, dino and deformable-detr
    anchor_size: Weight | None = None
    denoising_queries: Annotated[int, Field(ge=0, le=MAX_DETECTOR_ARG)] | None = None  # of dino
    label_noise: Fraction | None = None  # of dino's denoising queries
    query_temperature: Weight | None = None  # of dino's position code
    eps: Weight | None = None  # of dino's inverse sigmoid
    with_box_refine: bool | None = None  # of deformable-detr
    two_stage: bool | None = None  # of deformable-detr
    # of deformable-detr: whether all encoder tokens are trained, not the proposals alone
    all_token_loss: bool | None = None
    level: WholeNumber | None = None  # the feature map of detr
    no_object: bool | None = None  # of detr: whether there is a class for it
    anchor_sizes: tuple[Weight, ...] | None = None  # pixels, one per level, faster-rcnn and fcos
    convs: Size | None = None  # layers of fcos' heads
    radius: Weight | None = None  # of fcos' positive cells, in cells
    with_stride_4: bool | None = None  # of faster-rcnn and fcos: whether stride 4 is a level
    # of faster-rcnn: pixels of an object that is read from stride 16
    object_size: Weight | None = None
    representation_size: Size | None = None  # of faster-rcnn: units of its box head
    # of faster-rcnn: per image, in training and in detection
    proposals: tuple[Size, Size] | None = None
    # of faster-rcnn: anchors and proposals per image that are trained on
    sampled: tuple[Size, Size] | None = None
    # short side and longest long side that images to detect in are resized to
    test_size: tuple[Count, Count] | None = None
    # of the images in [0, 1], per channel; ImageNet's if not given
    mean: tuple[float, float, float] | None = None
    # of the images in [0, 1], per channel; ImageNet's if not given
    std: tuple[float, float, float] | None = None
    # first weights of what makes the queries, dino and deformable-detr: xavier as released, or
    # torch's own
    query_init: Literal["xavier", "torch"] | None = None

    def given(self) -> dict[str, Any]:
        """The arguments that are not left to the detector, as keywords."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
@option_group
class Measuring:
    """When and on what is measured."""

    log_every: Count = 50  # steps between lines of the log
    watch_every: Count = 2000  # steps between looks at the teacher's boxes on a few fixed images
    evaluate_every: Count = 1000  # steps between measurements of the AP
    evaluate_images: Count = 5000  # of the tune split that the AP is measured on
    # the run ends after so many measurements in a row without a better AP; 0: never
    patience: WholeNumber = 0
    # IoU of non-maximum suppression to measure with as well; the better AP counts
    try_nms: Fraction | None = None


@dataclass(frozen=True)
@strict_group
class Settings:
    """Everything that a run needs to know. Step counts are optimizer steps of one run."""

    # named settings: the defaults of all that follow
    preset: Annotated[PresetName, Role.IDENTITY] = "digits"
    method: Annotated[MethodName, Role.IDENTITY] = "semi-detr"  # how to learn
    detector: Annotated[DetectorName, Role.IDENTITY] = "dino"  # what to train
    # "digits", a COCO json, or a COCO, VOC or YOLO folder (data_scripts/README.md)
    data: Annotated[str, Role.IDENTITY] = "digits"
    unlabelled: str | None = None  # a folder of more images without labels, or a COCO json of such
    # of the training images whose labels are used
    percent: Annotated[float, Field(gt=0, le=100), Role.IDENTITY] = 10.0
    fold: Annotated[WholeNumber, Role.IDENTITY] = 1  # which draw of them
    # short side in pixels that images are resized to, in training and detection; photos: None is
    # chosen
    image_size: Count | None = None
    steps: Annotated[WholeNumber, Role.IDENTITY] = 1000  # of the optimizer; photos: 0 is chosen
    seed: Annotated[WholeNumber, Role.IDENTITY] = 0  # of weights, views and noise
    burn_in: str | None = None  # the folder of a finished run to start from
    # a published file, a file or a run of ours, of any classes: what fits of it is taken
    weights: str | None = None

    data_files: DataFiles = field(default_factory=DataFiles)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    runtime: Runtime = field(default_factory=Runtime)
    pseudo_labels: PseudoLabels = field(default_factory=PseudoLabels)
    semi_detr: SemiDetr = field(default_factory=SemiDetr)
    soft_teacher: SoftTeacherSettings = field(default_factory=SoftTeacherSettings)
    dense_teacher: DenseTeacherSettings = field(default_factory=DenseTeacherSettings)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    views: ViewSettings = field(default_factory=ViewSettings)
    detector_kwargs: DetectorKwargs = field(default_factory=DetectorKwargs)
    measuring: Measuring = field(default_factory=Measuring)
    normalizers: NormalizerSettings = field(default_factory=NormalizerSettings)


@dataclass(frozen=True)
@strict_group
class Config(Settings):
    """What config.json holds: the settings, and where the numbers of the run come from."""

    commit: str | None = None
    machine: str | None = None
    command: str | None = None
    categories: list[dict] | None = None  # [{"id", "name"}] of the data, known when they are loaded


SettingsType = TypeVar("SettingsType", bound=Settings)


# ---- presets ---------------------------------------------------------------------------------

TINY = DetectorKwargs(
    num_queries=30,
    dim=64,
    heads=4,
    dim_feedforward=256,
    encoder_layers=2,
    decoder_layers=3,
    backbone="tiny",
)
TINY_DEFORMABLE = dataclasses.replace(TINY, levels=3, points=4, anchor_size=0.1, query_init="torch")
RESNET = DetectorKwargs(
    backbone="resnet50", backbone_weights="IMAGENET1K_V1", test_size=(800, 1333)
)
TINY_DETECTORS = {
    "dino": dataclasses.replace(TINY_DEFORMABLE, denoising_queries=20, query_temperature=20.0),
    "deformable-detr": dataclasses.replace(TINY_DEFORMABLE, with_box_refine=True, two_stage=True),
    "detr": dataclasses.replace(TINY, level=0),
    "faster-rcnn": DetectorKwargs(
        dim=64,
        backbone="tiny",
        anchor_sizes=(12, 20, 32, 48),
        object_size=64,
        representation_size=128,
        proposals=(100, 50),
        sampled=(64, 32),
    ),
    "fcos": DetectorKwargs(dim=64, backbone="tiny", anchor_sizes=(4, 8, 16), convs=2),
}
RESNET_DETECTORS = {
    "dino": RESNET,
    "deformable-detr": dataclasses.replace(
        RESNET, with_box_refine=True, two_stage=True, all_token_loss=True
    ),
    "detr": RESNET,
    "faster-rcnn": RESNET,
    "fcos": RESNET,
}

# Scaled to 30 queries, small images and minutes on a laptop.
DIGITS = Settings(
    preset="digits",
    steps=1000,
    optimizer=Optimizer(
        learning_rate=2e-3, backbone_lr_factor=1.0, clip_grad_norm=1.0, ema_decay=0.98
    ),
    schedule=Schedule(warmup_steps=50, lr_decay_fraction=0.25, burn_in_steps=1000),
    runtime=Runtime(precision="float32"),
    pseudo_labels=PseudoLabels(
        score_threshold=0.4,
        unlabelled_weight=2.0,
        unlabelled_box_weight=0.25,
        max_pseudo_boxes=30,
    ),
    semi_detr=SemiDetr(one_to_many_share=0.4, candidates=4, mining_top_k=4, cost_queue_size=500),
    soft_teacher=SoftTeacherSettings(
        score_threshold=0.8,
        unlabelled_weight=2.0,
        unlabelled_box_weight=0.5,
        max_pseudo_boxes=30,
    ),
    dense_teacher=DenseTeacherSettings(
        ratio=0.05, unlabelled_weight=1.0, unlabelled_box_weight=0.5, max_pseudo_boxes=30
    ),
    views=ViewSettings(
        zoom=(0.85, 1.18),
        shift=0.06,
        weak_zoom=(0.95, 1.0),
        strong_zoom=(0.65, 1.5),
        strong_rotation=10.0,
        strong_shear=10.0,
    ),
    detector_kwargs=TINY_DETECTORS["dino"],
    measuring=Measuring(log_every=25, watch_every=100, evaluate_every=250, evaluate_images=150),
)

# One's own photographs, from a few labels in minutes to hours: see photos.py for what is left open.
# Stage one of Semi-DETR lasts to the end. In short runs one-to-many matching is what gains, and the
# switch costs: the teacher's EMA needs about as long to forget the first stage as the run has left.
# NMS at detection, which such weights need, costs nothing worth mentioning.
PHOTO = DetectorKwargs(
    dim=128,
    heads=8,
    dim_feedforward=512,
    encoder_layers=2,
    decoder_layers=3,
    backbone_weights="IMAGENET1K_V1",
)
PHOTO_DEFORMABLE = dataclasses.replace(PHOTO, levels=3, points=4, anchor_size=0.1)
PHOTO_PYRAMID = DetectorKwargs(backbone_weights="IMAGENET1K_V1")
PHOTO_DETECTORS = {
    "dino": dataclasses.replace(PHOTO_DEFORMABLE, denoising_queries=50, query_temperature=20.0),
    "deformable-detr": dataclasses.replace(PHOTO_DEFORMABLE, with_box_refine=True, two_stage=True),
    "detr": PHOTO,
    "faster-rcnn": PHOTO_PYRAMID,
    "fcos": PHOTO_PYRAMID,
}
PHOTOS = Settings(
    preset="photos",
    steps=0,
    percent=100.0,
    optimizer=Optimizer(
        batch_size=0,
        unlabelled_batch_size=0,
        learning_rate=4e-4,
        backbone_lr_factor=0.25,
        ema_decay=0.99,
    ),
    schedule=Schedule(warmup_steps=50, lr_decay_fraction=0.25, burn_in_steps=600),
    pseudo_labels=PseudoLabels(unlabelled_weight=2.0, unlabelled_box_weight=0.25),
    semi_detr=SemiDetr(
        one_to_many_share=1.0,
        candidates=4,
        mining_top_k=4,
        cost_queue_size=500,
        projector_norm="batch",
    ),
    views=ViewSettings(
        zoom=(0.8, 1.25),
        shift=0.06,
        weak_zoom=(0.95, 1.0),
        strong_zoom=(0.65, 1.5),
        strong_rotation=15.0,
        strong_shear=15.0,
    ),
    detector_kwargs=PHOTO_DETECTORS["dino"],
    measuring=Measuring(
        log_every=20, watch_every=200, evaluate_every=200, evaluate_images=200, try_nms=0.6
    ),
)

# The released code's effective values: 43.5 AP at 10 % was obtained with L1 counted twice,
# consistency in stage one alone, a constant rate, and 5 images on each of 8 GPUs; here they are 8
# normalizer groups, and 8 micro-batches, of one step. What still differs: docs/paper_vs_code.md.
COCO = Settings(
    preset="coco-10pct",
    steps=120_000,
    data_files=DataFiles(missing_labels="background", stratified=False),
    optimizer=Optimizer(batch_size=8, unlabelled_batch_size=32),
    runtime=Runtime(accumulate=8),
    pseudo_labels=PseudoLabels(max_pseudo_boxes=300),
    semi_detr=SemiDetr(projector_norm="batch"),
    loss_weights=LossWeights(l1_weight=10.0),
    views=ViewSettings(short_sides=tuple(range(480, 801, 32)), released_shear=True),
    detector_kwargs=RESNET_DETECTORS["dino"],
    measuring=Measuring(evaluate_every=4000),
    normalizers=NormalizerSettings(normalizer_groups=8, normalizer_bound=8.0),
)

# Deformable DETR's own values, which the COCO presets take with it: no L1 that counts twice, twice
# the rate, and a tenth of it where queries look (fundamentalvision/Deformable-DETR, main.py).
COCO_DEFORMABLE = {"l1_weight": 5.0, "learning_rate": 2e-4, "sampling_lr_factor": 0.1}

PRESETS: dict[str, Settings] = {
    "digits": DIGITS,
    "digits-full": dataclasses.replace(
        DIGITS, preset="digits-full", percent=100.0, data_files=DataFiles(extra_unlabelled=2000)
    ),
    "coco-1pct": dataclasses.replace(COCO, preset="coco-1pct", percent=1.0),
    "coco-5pct": dataclasses.replace(COCO, preset="coco-5pct", percent=5.0),
    "coco-10pct": COCO,
    # The paper's words: L1 5, consistency in both stages with weight 1. Its optimizer (Adam, 0.001)
    # is left out.
    "coco-10pct-paper": dataclasses.replace(
        COCO,
        preset="coco-10pct-paper",
        loss_weights=LossWeights(),
        semi_detr=SemiDetr(
            consistency_weight=1.0, consistency_in_both_stages=True, projector_norm="batch"
        ),
    ),
    # The released supervised baseline, 35.0 AP: 12 epochs of the 11,829 labelled images, 2 on each
    # of 8 GPUs, DETR's crops, no colour operation, the rate a tenth in the last epoch.
    "coco-10pct-supervised": dataclasses.replace(
        COCO,
        preset="coco-10pct-supervised",
        method="supervised",
        steps=12 * 740,
        optimizer=Optimizer(batch_size=16, unlabelled_batch_size=32),
        schedule=Schedule(lr_drops=(11 / 12,)),
        views=dataclasses.replace(COCO.views, detr_crops=True, labelled_color=False, visible=0.0),
        measuring=Measuring(evaluate_every=740),
    ),
    # One GPU and one night, not measured: a twelfth of the steps, the rate a tenth at the end.
    "coco-10pct-short": dataclasses.replace(
        COCO,
        preset="coco-10pct-short",
        steps=10_000,
        schedule=Schedule(lr_drops=(0.9,)),
        measuring=Measuring(evaluate_every=2500),
    ),
    # train2017 with all labels and unlabeled2017: 8 GPUs of 8 images, half of them labelled
    "coco-full": dataclasses.replace(
        COCO,
        preset="coco-full",
        percent=100.0,
        steps=240_000,
        optimizer=Optimizer(batch_size=32, unlabelled_batch_size=32),
        schedule=Schedule(lr_drops=(1 / 2, 2 / 3)),
        pseudo_labels=PseudoLabels(max_pseudo_boxes=300, unlabelled_weight=2.0),
    ),
    # VOC07 trainval with all labels and VOC12 trainval without
    "voc": dataclasses.replace(COCO, preset="voc", percent=100.0, steps=80_000),
    "photos": PHOTOS,
}
DETECTORS_OF_PRESET = {
    "digits": TINY_DETECTORS,
    "digits-full": TINY_DETECTORS,
    "photos": PHOTO_DETECTORS,
}  # the others: RESNET_DETECTORS


def preset_settings(
    preset: str = "digits", method: str | None = None, detector: str = "dino"
) -> Settings:
    """The settings of a preset for a method and a detector; without a method, the preset's own.

    Raises UserError for names that there are not.
    """
    _check_choice("preset", preset, PRESETS)
    settings = PRESETS[preset]
    method = method or settings.method
    _check_choice("method", method, get_args(MethodName))
    _check_choice("detector", detector, get_args(DetectorName))
    kwargs = settings.detector_kwargs
    if detector != settings.detector:
        family = DETECTORS_OF_PRESET.get(preset, RESNET_DETECTORS)
        kwargs = family[detector]
        if detector == "deformable-detr" and family is RESNET_DETECTORS:
            settings = change(settings, **COCO_DEFORMABLE)
    return change(settings, method=method, detector=detector, detector_kwargs=kwargs)


def _check_choice(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UserError(f"no {kind} called {name!r}: choose from {', '.join(known)}")


# ---- changes and checks ----------------------------------------------------------------------


def new_config(
    preset: str = "digits", method: str | None = None, detector: str = "dino", **changes
) -> Config:
    """The settings of a run as they go to config.json: a preset with some fields changed.

    Args:
        preset, method, detector: their names, as in the commands; without a method, the preset's.
        changes: fields of Settings or of its groups by name, as in
            `new_config("digits", learning_rate=1e-3, data="my/photos")`; or whole groups.

    Raises UserError for a name or a value that cannot be.
    """
    return as_config(change(preset_settings(preset, method, detector), **changes))


def as_config(settings: Settings) -> Config:
    """Settings, checked, with where the numbers of this run come from."""
    settings = check(settings)
    values = {part.name: getattr(settings, part.name) for part in dataclasses.fields(Settings)}
    command = typed_command(sys.argv)
    return Config(**values, commit=_commit(), machine=_machine(), command=command)


@cache
def _groups_of_fields() -> dict[str, str]:
    """The group of each field that is an option without the name of its group.

    "" for Settings' own.
    """
    groups = {}
    for part in dataclasses.fields(Config):
        groups[part.name] = ""
        if dataclasses.is_dataclass(part.type) and part.name not in PREFIXED_GROUPS:
            groups |= {option.name: part.name for option in dataclasses.fields(part.type)}
    return groups


def change(settings: SettingsType, **changes) -> SettingsType:
    """Settings with some fields replaced.

    A field of a group is named as its option is, without the group.

    Raises UserError for a field that there is not.
    """
    groups = _groups_of_fields()
    by_group: dict[str, dict] = {}
    for name, value in changes.items():
        if name not in groups:
            raise UserError(f"no setting called {name!r}: choose from {', '.join(sorted(groups))}")
        by_group.setdefault(groups[name], {})[name] = value
    settings = dataclasses.replace(settings, **by_group.pop("", {}))
    for name, values in by_group.items():
        group = dataclasses.replace(getattr(settings, name), **values)
        settings = dataclasses.replace(settings, **{name: group})
    return settings


def check(settings: SettingsType, origin: str = OPTIONS) -> SettingsType:
    """Settings whose values fit, alone and together; what `image_size` implies is filled in.

    Raises UserError, which names `origin` (a file, or "the options") and the field.
    """
    settings = checked_json(type(settings), json.dumps(dataclasses.asdict(settings)), origin)
    _check_nothing_open(settings, origin)
    fitting = COMPATIBLE_DETECTORS.get(settings.method, get_args(DetectorName))
    if settings.detector not in fitting:
        choice = " or ".join(fitting)
        fault = f"{settings.method} cannot train {settings.detector}"
        raise UserError(f"{fault}: choose --detector {choice}")
    mixing = settings.views.mixing
    if mixing != "none" and settings.method in ("soft-teacher", "dense-teacher"):
        fault = f"{settings.method} cannot learn from mixed views"
        raise UserError(f"{fault}: leave out --mixing {mixing}")
    files = dataclasses.asdict(settings.data_files) | {"unlabelled": settings.unlabelled}
    for name in ("images", "unlabelled", "validation", "folds"):
        if settings.data == "digits" and files[name]:
            fault = f"--{name} {files[name]} goes with --data"
            raise UserError(f"{fault}; the digits, its default, have their own")
    if settings.weights and settings.burn_in:
        fault = f"--weights {settings.weights} and --burn-in {settings.burn_in}"
        raise UserError(f"{fault}: a run starts from one of them")
    kwargs = settings.detector_kwargs
    # the weights of preset photos are meant for the ResNet that it chooses
    is_left_over = kwargs.backbone == "tiny" and kwargs.backbone_weights == PHOTO.backbone_weights
    if kwargs.backbone_weights == "none" or (settings.preset == "photos" and is_left_over):
        settings = change(settings, backbone_weights=None)
    elif kwargs.backbone_weights and kwargs.backbone == "tiny":
        fault = f"--backbone-weights {kwargs.backbone_weights}"
        raise UserError(f"{fault}: the backbone tiny is no ResNet to give them to")
    if settings.image_size:
        long_side = round(settings.image_size * 1333 / 800)
        settings = change(
            settings,
            short_sides=(settings.image_size,),
            long_side=long_side,
            test_size=(settings.image_size, long_side),
        )
    return settings


def _check_nothing_open(settings: Settings, origin: str) -> None:
    """Raises UserError for a count of 0 that only the preset photos leaves to be chosen."""
    counts = {
        ("steps",): settings.steps,
        ("optimizer", "batch_size"): settings.optimizer.batch_size,
        ("optimizer", "unlabelled_batch_size"): settings.optimizer.unlabelled_batch_size,
    }
    for path, count in counts.items():
        if count == 0 and settings.preset != "photos":
            name = option_name(path) if origin == OPTIONS else f"{origin}: {'.'.join(path)}"
            raise UserError(f"{name}: input should be greater than or equal to 1, got 0")


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def checked_json(kind: type, text: str | bytes, origin: str) -> Any:
    """The dataclass `kind` that is written in a JSON text; no value is converted to fit.

    Raises UserError, which names `origin` and the first field that is wrong.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as problem:
        fault = problem.errors(include_url=False, include_context=False)[0]
        got = f", got {json.dumps(fault['input'])[:100]}" if fault["type"] != "missing" else ""
        reason = f"{fault['msg'][:1].lower()}{fault['msg'][1:]}{got}"
        if fault["type"] == "unexpected_keyword_argument":
            reason = "there is no such setting"
        # pydantic names the kinds of a choice between kinds, which no field is called
        words = [part for part in fault["loc"] if isinstance(part, str)]
        path = [part for part in words if "[" not in part and "-" not in part]
        if origin == OPTIONS:
            raise UserError(f"{option_name(path)}: {reason}") from None
        raise UserError(f"{origin}: {'.'.join(path) or 'the settings'}: {reason}") from None


def read_settings(config: dict, file: str | Path) -> Config:
    """The settings in the JSON object of a config.json.

    Raises UserError, which names `file` and the field.
    """
    return check(checked_json(Config, json.dumps(config), str(file)), str(file))


def config_json(config: Config) -> str:
    """A config.json. Arguments that are left to the detector are not written."""
    values = dataclasses.asdict(config) | {"detector_kwargs": config.detector_kwargs.given()}
    return json.dumps(values, indent=1)


def fields_with(role: Role) -> list[tuple[str, ...]]:
    """The paths of the fields that have a role: ("steps",), ("runtime", "accumulate")."""
    paths: list[tuple[str, ...]] = []
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            kinds = get_type_hints(kind, include_extras=True)
            fields = [field for field, hint in kinds.items() if role in get_args(hint)]
            paths += [(name, field) for field in fields]
        elif role in get_args(kind):
            paths.append((name,))
    return paths


def option_name(path: Sequence[str]) -> str:
    """The option of a field: ("optimizer", "batch_size") is --batch-size."""
    name = OPTION_NAMES.get(path[-1], path[-1])
    prefix = f"{path[0]}." if path[0] in PREFIXED_GROUPS and len(path) > 1 else ""
    return f"--{prefix}{name}".replace("_", "-")


RUN_IDENTITY = tuple(path[0] for path in fields_with(Role.IDENTITY))


def identity(settings: Settings) -> dict[str, Any]:
    """What tells a run from others: method, detector, preset, data, percent, fold, seed, steps."""
    return {name: getattr(settings, name) for name in RUN_IDENTITY}


def differences(one: Settings, other: Settings) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """The fields in which two settings differ: {path: (value of one, value of the other)}."""
    pairs: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for part in dataclasses.fields(Settings):
        value, other_value = getattr(one, part.name), getattr(other, part.name)
        if not dataclasses.is_dataclass(value):
            pairs[(part.name,)] = (value, other_value)
            continue
        for name in [option.name for option in dataclasses.fields(value)]:
            pairs[(part.name, name)] = (getattr(value, name), getattr(other_value, name))
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


# ---- where numbers come from -----------------------------------------------------------------


def _machine() -> str:
    """System, processor, CPU cores and torch of this machine."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "of unknown version"
    cores = f"{os.cpu_count()} CPU cores"
    return f"{platform.system()} {platform.machine()}, {cores}, torch {torch}"


@cache
def _commit() -> str | None:
    """The commit of the code, None outside a clone."""
    words, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def typed_command(arguments: list[str]) -> str:
    """The command as a user types it; `python -m semidetr_lite` is `semidetr`."""
    program = Path(arguments[0])
    is_module = program.parts[-2:] == ("semidetr_lite", "__main__.py")
    return shlex.join(["semidetr" if is_module else program.stem, *arguments[1:]])
