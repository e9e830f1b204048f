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

MethodName = Literal["supervised", "mean-teacher", "semi-detr", "soft-teacher", "dense-teacher"]
DetectorName = Literal["dino", "deformable-detr", "detr", "faster-rcnn", "fcos"]
PresetName = Literal[
    "digits",
    "digits-full",
    "coco-1pct",
    "coco-5pct",
    "coco-10pct",
    "coco-10pct-paper",
    "coco-full",
    "voc",
]
Precision = Literal["auto", "float32", "tf32", "bfloat16"]

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
    skip_unreadable: bool = False  # go on when a labelled image cannot be read
    extra_unlabelled: WholeNumber = 0  # of the digits: unlabelled scenes beyond the 2,000


@dataclass(frozen=True)
@option_group
class Optimizer:
    """Images of a step, and AdamW."""

    batch_size: Count = 16  # labelled images of a step, of all processes together
    unlabelled_batch_size: Count = 16  # unlabelled images of a step, of all processes together
    learning_rate: Weight = 1e-4  # of the detector but for its backbone
    backbone_lr_factor: Weight = 0.1  # the backbone's learning rate as a fraction of it
    weight_decay: Weight = 1e-4  # of AdamW
    clip_grad_norm: Weight = 0.1  # largest norm of the gradient
    # of the teacher's weights, the largest; it rises to it in the first steps
    ema_decay: Fraction = 0.999


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
    # CPU threads of each process; without it torch's choice, which is stored and kept on resume
    threads: Count | None = None


@dataclass(frozen=True)
@option_group
class PseudoLabels:
    """Pseudo-labels of mean-teacher and semi-detr."""

    score_threshold: Weight = 0.4  # least score of a confident pseudo-box
    unlabelled_weight: Weight = 4.0  # of the losses on unlabelled images
    unlabelled_box_weight: Weight = 1.0  # a further factor of their box losses
    # per image; mining takes mean and standard deviation of the scores over these
    max_pseudo_boxes: Count = 100
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
    backbone: str | None = None  # tiny, resnet18 ... resnet152
    # of a ResNet: a name or a .pth file of torchvision's, or "none" for random ones;
    # IMAGENET1K_V1 is downloaded, once (0.1 GB)
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
    # short side in pixels that images are resized to, in training and detection
    image_size: Count | None = None
    steps: Annotated[Count, Role.IDENTITY] = 1000  # optimizer steps
    seed: Annotated[WholeNumber, Role.IDENTITY] = 0  # of weights, views and noise
    burn_in: str | None = None  # the folder of a finished run to start from

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
TINY_DEFORMABLE = dataclasses.replace(TINY, levels=3, points=4, anchor_size=0.1)
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
    "deformable-detr": dataclasses.replace(RESNET, with_box_refine=True, two_stage=True),
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

# The released code's effective values: 43.5 AP at 10 % was obtained with L1 counted twice,
# consistency in stage one alone, a constant rate, and 5 images on each of 8 GPUs; here they are 8
# micro-batches of one step. Its labelled fraction is drawn at random, 1.33 of 5 on average; here it
# is always 1 of 5.
COCO = Settings(
    preset="coco-10pct",
    steps=120_000,
    optimizer=Optimizer(batch_size=8, unlabelled_batch_size=32),
    runtime=Runtime(accumulate=8),
    pseudo_labels=PseudoLabels(max_pseudo_boxes=300),
    loss_weights=LossWeights(l1_weight=10.0),
    views=ViewSettings(short_sides=tuple(range(480, 801, 32))),
    detector_kwargs=RESNET_DETECTORS["dino"],
    measuring=Measuring(evaluate_every=4000),
)

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
        semi_detr=SemiDetr(consistency_weight=1.0, consistency_in_both_stages=True),
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
}


def preset_settings(
    preset: str = "digits", method: str = "semi-detr", detector: str = "dino"
) -> Settings:
    """The settings of a preset for a method and a detector.

    Raises UserError for names that there are not.
    """
    _check_choice("preset", preset, PRESETS)
    _check_choice("method", method, get_args(MethodName))
    _check_choice("detector", detector, get_args(DetectorName))
    settings = PRESETS[preset]
    kwargs = settings.detector_kwargs
    if detector != settings.detector:
        family = TINY_DETECTORS if kwargs.backbone == "tiny" else RESNET_DETECTORS
        kwargs = family[detector]
    return dataclasses.replace(settings, method=method, detector=detector, detector_kwargs=kwargs)


def _check_choice(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UserError(f"no {kind} called {name!r}: choose from {', '.join(known)}")


# ---- changes and checks ----------------------------------------------------------------------


def new_config(
    preset: str = "digits", method: str = "semi-detr", detector: str = "dino", **changes
) -> Config:
    """The settings of a run as they go to config.json: a preset with some fields changed.

    Args:
        preset, method, detector: their names, as in the commands.
        changes: fields of Settings or of its groups by name, as in
            `new_config("digits", learning_rate=1e-3, data="my/photos")`; or whole groups.

    Raises UserError for a name or a value that cannot be.
    """
    return as_config(change(preset_settings(preset, method, detector), **changes))


def as_config(settings: Settings) -> Config:
    """Settings, checked, with where the numbers of this run come from."""
    settings = check(settings)
    values = {part.name: getattr(settings, part.name) for part in dataclasses.fields(Settings)}
    return Config(**values, **_origin())


@cache
def _groups_of_fields() -> dict[str, str]:
    """The group of each field that is an option without the name of its group.

    "" for Settings' own.
    """
    groups = {}
    for part in dataclasses.fields(Config):
        groups[part.name] = ""
        if dataclasses.is_dataclass(part.type) and part.name not in PREFIXED_GROUPS:
            groups |= {one.name: part.name for one in dataclasses.fields(part.type)}
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
    fitting = COMPATIBLE_DETECTORS.get(settings.method, get_args(DetectorName))
    if settings.detector not in fitting:
        choice = " or ".join(fitting)
        fault = f"{settings.method} cannot train {settings.detector}"
        raise UserError(f"{fault}: choose --detector {choice}")
    files = dataclasses.asdict(settings.data_files) | {"unlabelled": settings.unlabelled}
    for name in ("images", "unlabelled", "validation", "folds"):
        if settings.data == "digits" and files[name]:
            fault = f"--{name} {files[name]} goes with --data"
            raise UserError(f"{fault}; the digits, its default, have their own")
    kwargs = settings.detector_kwargs
    if kwargs.backbone_weights == "none":
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
        place = [part for part in fault["loc"] if isinstance(part, str)]
        values = fault["input"]
        got = f", got {json.dumps(values)[:100]}" if fault["type"] != "missing" else ""
        what = {"unexpected_keyword_argument": "there is no such setting"}
        said = what.get(fault["type"], f"{fault['msg'][:1].lower()}{fault['msg'][1:]}{got}")
        # pydantic names the kinds of a choice between kinds, which no field is called
        path = [part for part in place if "[" not in part and "-" not in part]
        if origin == OPTIONS:
            raise UserError(f"{option_name(path)}: {said}") from None
        raise UserError(f"{origin}: {'.'.join(path) or 'the settings'}: {said}") from None


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
    paths = []
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            kinds = get_type_hints(kind, include_extras=True)
            paths += [(name, one) for one, own in kinds.items() if role in get_args(own)]
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
    found = {}
    for part in dataclasses.fields(Settings):
        ours, theirs = getattr(one, part.name), getattr(other, part.name)
        if not dataclasses.is_dataclass(ours):
            found[(part.name,)] = (ours, theirs)
            continue
        for own in dataclasses.fields(ours):
            found[(part.name, own.name)] = (getattr(ours, own.name), getattr(theirs, own.name))
    return {path: pair for path, pair in found.items() if pair[0] != pair[1]}


# ---- where numbers come from -----------------------------------------------------------------


def _origin() -> dict[str, str | None]:
    """Commit, machine and command of this run."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "of unknown version"
    cores = f"{os.cpu_count()} CPU cores"
    machine = f"{platform.system()} {platform.machine()}, {cores}, torch {torch}"
    return {"commit": _commit(), "machine": machine, "command": typed_command(sys.argv)}


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
