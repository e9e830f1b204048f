"""Exercises with a verdict: the package is the answer key.

`check("matching.one_to_many", answer)` runs the learner's function and the package's on the same
inputs and shows where they differ first, with a likely cause. A stub lets the notebook run through;
with SEMIDETR_GRADING=1 in the environment whatever is not right raises AssertionError. An exercise
is one entry of EXERCISES: its solution, its cases, and the mistakes of mistakes.py.
"""

import difflib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from xml.etree import ElementTree

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from semidetr_lite import losses, matching
from semidetr_lite.boxes import inverse_sigmoid, pairwise_overlaps, to_model, to_pixels
from semidetr_lite.contracts import Target
from semidetr_lite.data import formats, splits, views
from semidetr_lite.detectors import deformable, transformer
from semidetr_lite.detectors.denoising import group_mask, noise_boxes
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import evaluate
from semidetr_lite.methods import mean_teacher, query_consistency
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.teach import cases
from semidetr_lite.teach.grading import PASSED, Exercise, find_fault
from semidetr_lite.teach.mistakes import MISTAKES
from semidetr_lite.training import ablate
from semidetr_lite.training.checkpoint import load_state_strict
from semidetr_lite.training.engine import micro_batches


def check(name: str, mine: Callable) -> None:
    """Compare the function `mine` with the package's and print the verdict.

    Raises UserError for a name that is no exercise; AssertionError in grading mode for all but a
    right answer.
    """
    if name not in EXERCISES:
        near = difflib.get_close_matches(name, EXERCISES, cutoff=0.4) or list(EXERCISES)
        raise UserError(f"no exercise called {name!r}: did you mean {' or '.join(near)}?")
    fault = find_fault(EXERCISES[name], mine).replace(PASSED, "...")  # whatever the answer says
    if fault and os.environ.get("SEMIDETR_GRADING") == "1":
        raise AssertionError(f"{name}: {fault}")
    print(f"{name}: {fault or PASSED}")


# ---- solutions; where the package does a thing only inside a larger one, an adapter asks for it --


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU of every pair of boxes (N, 4) and (M, 4), xyxy: (N, M)."""
    return pairwise_overlaps(a, b)[0]


def precision_recall(hits: torch.Tensor, objects: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Precision and recall (N,) after each detection, of hits (N,) bool by falling score."""
    found = hits.cumsum(0)
    return found / torch.arange(1, len(hits) + 1), found / objects


def average_precision(hits: torch.Tensor, objects: int) -> float:
    """pycocotools' AP at one IoU, hits (N,) bool by falling score."""
    far_apart = torch.arange(len(hits) + objects)[:, None] * 20
    boxes = far_apart + torch.tensor([0.0, 0.0, 9.0, 9.0])
    detection: Target = {
        "boxes": boxes[: len(hits)],
        "labels": torch.zeros(len(hits)).long(),
        "scores": -torch.arange(len(hits)),
    }
    true_boxes = torch.cat([detection["boxes"][hits], boxes[len(hits) :]])[:objects]
    target: Target = {"boxes": true_boxes, "labels": torch.zeros(objects).long()}
    return evaluate([detection], [target])["AP50"]


def one_to_many_losses(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    target: Target,
    queries: torch.Tensor,
    targets: torch.Tensor,
    quality: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """{"class", "l1", "giou"}, weighted, of the pairs of one-to-many matching in one image.

    Args:
        logits, pred_boxes: (Q, C) and (Q, 4) cxcywh in [0, 1].
        target: "boxes" (T, 4) xyxy pixels, "labels" (T,), "size" (H, W).
        queries, targets, quality: (N,) each, a Match.
    """
    assigned = torch.full((1, len(logits)), -1).index_put((torch.tensor(0), queries), targets)
    soft = torch.zeros(1, len(logits)).index_put((torch.tensor(0), queries), quality)
    return losses.loss_from_assignment(
        logits[None],
        pred_boxes[None],
        matching.pad_targets([target]),
        matching.Assignment(assigned, soft),
        "one_to_many",
    )


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int
) -> torch.Tensor:
    """Multi-head attention without projections: queries (Q, D), keys, values (S, D) -> (Q, D)."""
    per_head = (
        part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (queries, keys, values)
    )  # (M, N, D / M)
    return scaled_dot_product_attention(*per_head).transpose(0, 1).flatten(1)


def map_positions(height: int, width: int, dim: int, temperature: float) -> torch.Tensor:
    """(H, W, dim) of a map without padding."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    return transformer.map_positions(mask, dim, temperature)[0]


def point_attention(
    feature_map: torch.Tensor, places: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """`deformable_attention` of one query, head and level: (D,).

    Args:
        feature_map: (H, W, D).
        places: (P, 2) as (x, y) in [0, 1].
        shares: (P,).
    """
    value = feature_map.flatten(0, 1)[None, :, None]  # (1, S, 1, D)
    height, width, _ = feature_map.shape
    shapes, layout = [(height, width)], (1, 1, 1, 1, -1)
    locations, weights = places.view(*layout, 2), shares.view(layout)
    return deformable.deformable_attention(value, shapes, locations, weights)[0, 0]


def refine(delta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4) corrected by a layer; a reference (N, 2) leaves width and height free."""
    reference_logits = pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
    return (delta + reference_logits).sigmoid()


def places(reference: torch.Tensor, offsets: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Sampling points (P, 2) of offsets in cells around a reference (2,)."""
    return reference + offsets / torch.tensor([shape[1], shape[0]])


def select(logits: torch.Tensor, boxes: torch.Tensor, count: int) -> torch.Tensor:
    """Two-stage selection: the boxes (count, 4) of the tokens with the highest best class score."""
    return boxes[logits.amax(-1).topk(count).indices]


def ema_update(teacher: dict, student: dict, momentum: float) -> dict:
    """The tensors {name: tensor} of a teacher after `mean_teacher.ema_update`."""
    modules = torch.nn.Module(), torch.nn.Module()
    for module, tensors in zip(modules, (teacher, student)):
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor.clone())
    mean_teacher.ema_update(*modules, momentum)
    return dict(modules[0].named_buffers())


def average(start: torch.Tensor, moves: list[torch.Tensor], momentum: float) -> torch.Tensor:
    """The teacher after a student that begins at `start`, as the teacher does, has made moves."""
    student, teacher = start, start
    for move in moves:
        student = student + move
        teacher = ema_update({"w": teacher}, {"w": student}, momentum)["w"]
    return teacher


def to_strong_view(
    found: dict, matrix: torch.Tensor, size: tuple[int, int], score_threshold: float
) -> dict:
    """A teacher's boxes as targets of the strong view: over the threshold, mapped, in view."""
    confident = found["scores"] >= score_threshold
    above = {key: values[confident] for key, values in found.items()}
    mapped = views.map_target(cast(Target, above), matrix, size)
    return {"boxes": mapped["boxes"], "labels": mapped["labels"]}


def box_cells(
    features: list[torch.Tensor],
    strides: list[tuple[float, float]],
    images: torch.Tensor,
    boxes: torch.Tensor,
    side: int,
) -> torch.Tensor:
    """What `Projector` reads of each box before its layers: (R, D, side, side)."""
    projector = query_consistency.Projector(features[0].shape[1], 1, side)
    projector.layers = torch.nn.Sequential()  # no layers: the features themselves
    return projector(features, strides, images, boxes)


def em_step(
    costs: np.ndarray, weights: np.ndarray, means: np.ndarray, variances: np.ndarray
) -> tuple:
    """scikit-learn's two Gaussians after one step: weights, means and variances, (2,) each."""
    return _fit_gaussians(costs, 1, weights, means, variances)


def em_steps(costs: np.ndarray, steps: int) -> tuple:
    """The same after several steps from the lowest and the highest cost."""
    means = np.array([costs.min(), costs.max()])
    return _fit_gaussians(costs, steps, np.full(2, 0.5), means, np.ones(2))


def _fit_gaussians(costs, steps: int, weights, means, variances) -> tuple:
    from sklearn.mixture import GaussianMixture  # slow to import, and only this needs it

    mixture = GaussianMixture(
        2,
        covariance_type="diag",
        reg_covar=1e-5,
        tol=0,
        max_iter=steps,
        weights_init=weights,
        means_init=means[:, None],
        precisions_init=1 / variances[:, None],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, on purpose
        mixture.fit(costs[:, None])
    return mixture.weights_, mixture.means_[:, 0], mixture.covariances_[:, 0]


def mine(
    costs: np.ndarray,
    scores: np.ndarray,
    valid: np.ndarray,
    threshold: float,
    score_threshold: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which boxes are confident, which are mined, and which are either: (B, K) bool each."""
    confident = valid & (scores >= score_threshold)
    mined = valid & (np.nan_to_num(costs, nan=np.inf) <= threshold)
    return confident, mined, confident | mined


def stage(step: int, before: int, steps: int, share: float) -> str:
    """The matching of a step in a run of `steps` steps that begins at step `before`."""
    run = SimpleNamespace(one_to_many_steps=before + round(share * steps))
    return SemiDETR.stage(cast(SemiDETR, run), step)


def gap_closed(lines: list[dict], row: str, percent: float) -> float:
    """The share of the gap in % that a row of an ablation's main table closes.

    It is nan where an end of the gap, or the row itself, is missing.
    """
    summaries = [summary for summary in ablate.summarise(lines) if summary.table == "main"]
    gaps = {(summary.row, summary.percent): summary.gap for summary in summaries}
    return gaps.get((row, percent), float("nan"))


def resumed(state: dict) -> tuple[dict, dict, int]:
    """The tensors of student and teacher, and the step, that a run goes on with from `last.pt`."""
    parts = {part: torch.nn.Linear(3, 2) for part in ("student", "teacher")}
    method = torch.nn.ModuleDict(parts)
    load_state_strict(method, state["method"], Path("last.pt"))
    student, teacher = (dict(part.state_dict()) for part in method.values())
    return student, teacher, state["offset"] + state["step"]


def labelled_of_process(image_ids: list[int], percent: float, fold: int, process: int) -> list[int]:
    """The ids of the labelled images of a fold, the same in every process."""
    indices = splits.labelled_indices(len(image_ids), percent, fold)
    return [image_ids[index] for index in indices]


def coco_box(corners: tuple[int, int, int, int]) -> list[float]:
    """[x, y, width, height] of a box of VOC: xmin, ymin, xmax, ymax, as `read_voc` reads them."""
    root = ElementTree.Element("annotation")
    size, entry = ElementTree.SubElement(root, "size"), ElementTree.SubElement(root, "object")
    for side in ("height", "width"):
        ElementTree.SubElement(size, side).text = "1000"
    ElementTree.SubElement(entry, "name").text = "any"
    box = ElementTree.SubElement(entry, "bndbox")
    for end, corner in zip(("xmin", "ymin", "xmax", "ymax"), corners):
        ElementTree.SubElement(box, end).text = str(corner)
    return formats._voc_content(root, None)[1][0].bbox


def validation_groups(groups: list[str], fraction: float) -> list[int]:
    """The images that are set aside for validation: whole groups, at least `fraction` of all.

    Groups are taken in the order of their names until the images are enough.

    Args:
        groups: of each image, such as its day, its slide or its film.
        fraction: of the images, in 0..1.
    """
    taken: set[str] = set()
    for group in sorted(set(groups)):
        if sum(one in taken for one in groups) >= fraction * len(groups):
            break
        taken.add(group)
    return [index for index, group in enumerate(groups) if group in taken]


SOLUTIONS: dict[str, tuple[Callable, Callable]] = {
    "boxes.pairwise_iou": (pairwise_iou, cases.pairwise_iou),
    "boxes.to_model": (to_model, cases.to_model_boxes),
    "boxes.to_pixels": (to_pixels, cases.to_pixel_boxes),
    "views.map_boxes": (views.map_boxes, cases.map_boxes),
    "evaluate.precision_recall": (precision_recall, cases.precision_recall),
    "evaluate.average_precision": (average_precision, cases.average_precision),
    "matching.matching_cost": (matching.matching_cost, cases.matching_cost),
    "matching.one_to_one": (matching.one_to_one, cases.one_to_one),
    "matching.one_to_many": (matching.one_to_many, cases.one_to_many),
    "losses.one_to_many": (one_to_many_losses, cases.one_to_many_losses),
    "detr.sine_positions": (transformer.sine_positions, cases.sine_positions),
    "detr.attention": (attention, cases.attention),
    "detr.map_positions": (map_positions, cases.map_positions),
    "deformable.attention": (point_attention, cases.point_attention),
    "deformable.refine": (refine, cases.refine),
    "deformable.places": (places, cases.places),
    "denoising.group_mask": (group_mask, cases.group_mask),
    "denoising.noise_boxes": (noise_boxes, cases.noise_boxes),
    "dino.select": (select, cases.select),
    "mean_teacher.ema_update": (ema_update, cases.ema_update),
    "mean_teacher.average": (average, cases.average),
    "mean_teacher.to_strong_view": (to_strong_view, cases.to_strong_view),
    "query_consistency.consistency_loss": (
        query_consistency.consistency_loss,
        cases.consistency_loss,
    ),
    "query_consistency.box_cells": (box_cells, cases.box_cells),
    "cost_mining.em_step": (em_step, cases.em_step),
    "cost_mining.em_steps": (em_steps, cases.em_steps),
    "cost_mining.mine": (mine, cases.mine),
    "semi_detr.stage": (stage, cases.stage),
    "ablate.gap_closed": (gap_closed, cases.gap_closed),
    "train.resumed": (resumed, cases.resumed),
    "splits.labelled_indices": (splits.labelled_indices, cases.labelled_indices),
    "splits.of_process": (labelled_of_process, cases.of_process),
    "engine.micro_batches": (micro_batches, cases.micro_batches),
    "layouts.coco_box": (coco_box, cases.coco_box),
    "splits.validation_groups": (validation_groups, cases.validation_groups),
}
TOLERANCES = {"cost_mining.em_step": 1e-6, "cost_mining.em_steps": 1e-6}  # 1e-5 must be seen
EXERCISES = {
    name: Exercise(solution, make_cases, MISTAKES[name], TOLERANCES.get(name, 1e-4))
    for name, (solution, make_cases) in SOLUTIONS.items()
}
