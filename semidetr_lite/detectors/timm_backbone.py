"""Backbones of the library timm, by name: `--backbone timm:tf_efficientnet_lite0`.

timm is an extra of this package (`pip install 'semidetr-lite[timm]'`). Any of its models that gives
maps at strides 8, 16 and 32 can be taken. BatchNorm is frozen, as in the ResNets: its statistics
are those of the weights, and of no batch.
"""

import logging
import sys
from pathlib import Path

import torch

from semidetr_lite.detectors.backbone import Backbone
from semidetr_lite.detectors.weight_files import is_weights_file, read_tensors
from semidetr_lite.errors import UserError

STRIDES = (8, 16, 32)
MIN_FITTING = 0.95  # of a model's entries must be in a file of its weights


class TimmBackbone(Backbone):
    """A timm model without its classifier.

    Args:
        name: of timm's, such as "tf_efficientnet_lite0" or "convnext_tiny.fb_in1k".
        weights: a file of the model's weights; any other word: timm's own, downloaded once; None:
            random ones.
        with_stride_4: whether the map at stride 4 comes out too.

    Raises:
        UserError: timm is not installed, has no such model or one without these maps; or the
            weights cannot be had or do not fit.
    """

    # each image runs on its own size: many of these models pool over the whole image
    pad_before_backbone = False

    def __init__(self, name: str, weights: str | None = None, with_stride_4: bool = False):
        super().__init__()
        timm = import_timm()
        strides = ((4,) if with_stride_4 else ()) + STRIDES
        indices = _map_indices(timm, name, strides)
        options = {"features_only": True, "out_indices": indices}
        if weights is not None and is_weights_file(weights):
            options |= {
                "pretrained": True,
                "pretrained_cfg_overlay": _from_file(timm, name, weights),
            }
        elif weights is not None:
            options["pretrained"] = True
        builder = logging.getLogger("timm.models._builder")
        level = builder.level
        builder.setLevel(logging.ERROR)  # it warns that the classifier is not taken
        try:
            net = timm.create_model(name, **options)
        except Exception as problem:
            raise UserError(_cannot_get(name, weights, problem)) from None
        finally:
            builder.setLevel(level)
        self.net = timm.layers.freeze_batch_norm_2d(net)
        self.channels = tuple(self.net.feature_info.channels())
        self._check_maps(name, strides)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) -> a map (B, C, H', W') per stride."""
        return [
            level if level.shape[1] == channels else level.permute(0, 3, 1, 2).contiguous()
            for level, channels in zip(self.net(images), self.channels, strict=True)
        ]

    def _check_maps(self, name: str, strides: tuple[int, ...]) -> None:
        """Raise UserError unless the maps of a small image have these strides."""
        try:
            with torch.no_grad():
                maps = self.eval()(torch.zeros(1, 3, 64, 96))
        except Exception as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
            advice = "take another --backbone"
            raise UserError(
                f"timm:{name}: takes images of one size only ({reason}); {advice}"
            ) from None
        self.train()
        sizes = [tuple(level.shape[-2:]) for level in maps]
        if sizes != [(64 // stride, 96 // stride) for stride in strides]:
            raise UserError(f"timm:{name}: its maps have other strides; take another --backbone")


def import_timm():
    """The library. Raises UserError where it is not installed."""
    try:
        import timm
        import timm.layers
    except ImportError:
        advice = "pip install 'semidetr-lite[timm]', or pip install timm"
        raise UserError(f"--backbone timm:... needs the library timm: {advice}") from None
    return timm


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the images that a model's own weights expect."""
    timm = import_timm()
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except Exception:
        config = None
    if config is None:
        raise UserError(_unknown(timm, name))
    return tuple(config.mean), tuple(config.std)


def _unknown(timm, name: str) -> str:
    near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]
    there = f"; it has {', '.join(near)}" if near else "; timm.list_models() names them"
    return f"timm has no model {name!r} (--backbone timm:NAME){there}"


def _map_indices(timm, name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Which of a model's maps have these strides. Raises UserError where one lacks."""
    if not timm.is_model(name):
        raise UserError(_unknown(timm, name))
    try:
        with torch.device("meta"):
            reductions = timm.create_model(name, features_only=True).feature_info.reduction()
    except Exception as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
        raise UserError(f"timm:{name}: gives no maps ({reason}); take another --backbone") from None
    if not set(strides) <= set(reductions):
        there = ", ".join(map(str, reductions))
        wanted = ", ".join(map(str, strides))
        fault = f"has maps at strides {there}, and {wanted} are needed"
        raise UserError(f"timm:{name}: {fault}; take another --backbone")
    return tuple(reductions.index(stride) for stride in strides)


def _from_file(timm, name: str, path: str) -> dict:
    """timm's way to say that the weights come from these tensors. Raises UserError for others'."""
    expected = timm.create_model(name).state_dict()
    tensors = _in_timms_names(read_tensors(Path(path)), expected, path)
    classifier = timm.get_pretrained_cfg(name).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    needed = [
        key
        for key in expected
        if not key.startswith(heads) and not key.endswith("num_batches_tracked")
    ]
    missing = [
        key for key in needed if key not in tensors or tensors[key].shape != expected[key].shape
    ]
    if len(missing) > (1 - MIN_FITTING) * len(needed):
        fits = f"{len(needed) - len(missing)} of the {len(needed)} entries of timm's {name}"
        problem = f"holds {fits}, the first that lacks is {missing[0]}"
        raise UserError(f"{path}: {problem}; give --backbone-weights a file of that network")
    fitting = {key: tensors[key] for key in needed if key not in missing}
    return {"state_dict": {**expected, **fitting}}


def _in_timms_names(tensors: dict, expected: dict, path: str) -> dict:
    """The tensors under the model's names, where a file has other names for all the same shapes.

    Ports of one network into several libraries differ in their names alone. Entries are then taken
    in their order, and one line on stderr says so.
    """
    shapes, ours = ([value.shape for value in entries.values()] for entries in (tensors, expected))
    if set(tensors) & set(expected) or shapes != ours:
        return tensors
    message = f"its {len(ours)} entries have other names, and are taken in their order"
    print(f"{path}: {message}, in which all shapes agree", file=sys.stderr)
    return dict(zip(expected, tensors.values()))


def _cannot_get(name: str, weights: str | None, problem: Exception) -> str:
    reason = (str(problem).splitlines() or [type(problem).__name__])[0][:150]
    if weights is None:
        return f"timm:{name}: cannot be built ({reason}); take another --backbone"
    advice = "give a file of them, or 'none' for random ones (--backbone-weights)"
    return f"cannot get the weights of timm:{name} ({reason}): {advice}"
