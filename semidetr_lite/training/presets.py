"""From names and settings to what is trained.

Data, detector, method. The presets are those of settings.py.
"""

import inspect
import json
from pathlib import Path
from typing import Any, cast

from semidetr_lite.data import coco, digits
from semidetr_lite.data.splits import Splits
from semidetr_lite.detectors.backbone import TIMM
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.pyramid import FCOS, FasterRCNN
from semidetr_lite.detectors.timm_backbone import normalisation
from semidetr_lite.errors import UserError, as_user_error
from semidetr_lite.methods.dense_teacher import DenseTeacher
from semidetr_lite.methods.mean_teacher import MeanTeacher, TeacherStudent
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.methods.soft_teacher import SoftTeacher
from semidetr_lite.methods.supervised import Supervised
from semidetr_lite.training.settings import (
    PRESETS,
    Config,
    DetectorKwargs,
    Settings,
    checked_json,
    option_name,
    preset_settings,
    read_settings,
)

__all__ = [
    "DETECTORS",
    "METHODS",
    "PRESETS",
    "load_splits",
    "make_detector",
    "make_method",
    "preset_settings",
]

METHODS = {
    "supervised": Supervised,
    "mean-teacher": MeanTeacher,
    "semi-detr": SemiDETR,
    "soft-teacher": SoftTeacher,
    "dense-teacher": DenseTeacher,
}
DETECTORS = {
    "dino": DINO,
    "deformable-detr": DeformableDETR,
    "detr": DETR,
    "faster-rcnn": FasterRCNN,
    "fcos": FCOS,
}


def load_splits(config: Config | dict, file: str | Path = "config.json") -> Splits:
    """The data of a run, from its settings or from the JSON object in its config.json.

    Raises UserError, which names `file`, for settings of data that cannot be used.
    """
    if isinstance(config, dict):
        config = read_settings(config, file)
    files = config.data_files
    with as_user_error(file, "settings of data that cannot be used"):
        if config.data == "digits":
            return digits.load(config.percent, config.fold, files.extra_unlabelled)
        return coco.load(
            config.data,
            files.images,
            config.unlabelled,
            config.percent,
            config.fold,
            files.validation,
            files.folds,
            config.views.flip,
            files.missing_labels,
            files.stratified,
            files.skip_unreadable,
        )


def make_detector(name: str, num_classes: int, kwargs: DetectorKwargs | dict) -> Detector:
    """A detector by its name in the commands, with these arguments of its class.

    Raises UserError for a name, an argument or a value that there is not.
    """
    if name not in DETECTORS:
        raise UserError(f"no detector called {name!r}: choose from {', '.join(DETECTORS)}")
    if isinstance(kwargs, DetectorKwargs):
        given = kwargs.given()
    else:
        text = json.dumps(kwargs)
        given = checked_json(DetectorKwargs, text, f"arguments of {name}").given()
    known = inspect.signature(DETECTORS[name]).parameters
    for key in given:
        if key not in known:
            option = option_name(("detector_kwargs", key))
            raise UserError(f"{name} has no {key}: leave out {option}")
    if given.get("backbone", "").startswith(TIMM) and not given.keys() & {"mean", "std"}:
        # what the timm backbone expects
        given["mean"], given["std"] = normalisation(given["backbone"].removeprefix(TIMM))
    return DETECTORS[name](num_classes=num_classes, **given)


def make_method(
    name: str, student: Detector, recipe: Settings, steps: int, offset: int, seed: int
) -> TeacherStudent:
    """A method by its name in the commands.

    Args:
        name: a key of METHODS.
        student: the detector to train.
        recipe: the settings of the method, a preset for instance; its own name, steps and seed do
            not count.
        steps: of the run; stage one lasts its share of them.
        offset: the step that the run begins at, those of a burn-in before it.
        seed: of the noise.
    """
    shared: dict[str, Any] = {
        "ema_decay": recipe.optimizer.ema_decay,
        "seed": seed,
        "loss_weights": recipe.loss_weights,
    }
    if name == "soft-teacher":
        return SoftTeacher(cast(FasterRCNN, student), **vars(recipe.soft_teacher), **shared)
    if name == "dense-teacher":
        return DenseTeacher(cast(FCOS, student), **vars(recipe.dense_teacher), **shared)
    shared["normalizers"] = recipe.normalizers
    if name == "supervised":
        return Supervised(student, **shared)
    if name == "mean-teacher":
        return MeanTeacher(student, **vars(recipe.pseudo_labels), **shared)
    if name == "semi-detr":
        fields = dict(vars(recipe.semi_detr))
        one_to_many_steps = offset + round(fields.pop("one_to_many_share") * steps)
        del fields["projector_lr_factor"]  # the optimizer's, see training/loop.py
        return SemiDETR(
            student, one_to_many_steps, **fields, **vars(recipe.pseudo_labels), **shared
        )
    raise UserError(f"no method called {name!r}: choose from {', '.join(METHODS)}")
