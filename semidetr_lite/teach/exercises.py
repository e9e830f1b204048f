"""Exercises with a verdict: the package is the answer key.

`check("matching.one_to_many", mine)` runs the learner's function and the package's on the same inputs and shows where
they differ first. A stub lets the notebook run through; with SEMIDETR_GRADING=1 in the environment whatever is not
right raises AssertionError. An exercise is one entry of EXERCISES.
"""

import copy
import difflib
import inspect
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from semidetr_lite import boxes, matching
from semidetr_lite.data import splits, views
from semidetr_lite.detectors import deformable, transformer
from semidetr_lite.detectors.denoising import group_mask, noise_boxes
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import evaluate
from semidetr_lite.methods import mean_teacher, query_consistency
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.training import ablate
from semidetr_lite.training.checkpoint import load_state_strict
from semidetr_lite.training.engine import micro_batches


class Exercise(NamedTuple):
    """The answer, and the cases {what is special: arguments} it is asked on, made from a seeded generator."""

    ours: Callable
    cases: Callable[[np.random.Generator], dict[str, tuple]]
    tolerance: float = 1e-4  # absolute and relative


def check(name: str, mine: Callable) -> None:
    """Compare the function `mine` with the package's and print the verdict.

    Raises UserError for a name that is no exercise; AssertionError in grading mode for all but a right answer.
    """
    if name not in EXERCISES:
        near = difflib.get_close_matches(name, EXERCISES, cutoff=0.4) or list(EXERCISES)
        raise UserError(f"no exercise called {name!r}: did you mean {' or '.join(near)}?")
    fault = find_fault(EXERCISES[name], mine)
    if fault and os.environ.get("SEMIDETR_GRADING") == "1":
        raise AssertionError(f"{name}: {fault}")
    print(f"{name}: {fault or 'right in every case'}")


def find_fault(exercise: Exercise, mine: Callable) -> str:
    """What is wrong with the function `mine`, in words; "" if nothing is."""
    named = [getattr(mine, "__globals__", {}).get(name) for name in getattr(_code(mine), "co_names", ())]
    if _code(exercise.ours) in map(_code, (mine, *named)):  # itself, wrapped, or called by name
        return "this is the package's own function; write yours, then compare"
    for number, (note, inputs) in enumerate(exercise.cases(np.random.default_rng(0)).items(), 1):
        where, given, ours = f"case {number} ({note})", copy.deepcopy(inputs), exercise.ours(*copy.deepcopy(inputs))
        try:
            answer = mine(*given)
        except NotImplementedError:
            return "not written yet"
        except Exception as problem:
            at = [f" at line {row.lineno}: {row.line}" for row in traceback.extract_tb(problem.__traceback__)[1:2]]
            return f"{where}: your function raised {' '.join(repr(problem).split())}{''.join(at)}"
        if answer is None or answer is ...:
            return "not written yet (it returns nothing)"
        found = difference(ours, answer, exercise.tolerance) or difference(inputs, given, 0.0, "the input, now changed")
        rows = zip(inspect.signature(exercise.ours).parameters, inputs)
        if found:
            return f"{where} differs\n  inputs  {', '.join(f'{key} {_short(one)}' for key, one in rows)}\n  {found}"
    return ""


def _code(function):
    """The code of a function without functools.wraps and functools.partial around it."""
    while inner := getattr(function, "__wrapped__", None) or getattr(function, "func", None):
        function = inner
    return getattr(function, "__code__", None)


def difference(ours, mine, tolerance: float, what: str = "the answer") -> str:
    """Where `mine` first differs from `ours`, in words; "" if nowhere. A plain tuple may stand for a named one."""
    rows, others = list(_leaves(ours, what)), list(_leaves(mine, what))
    if len(rows) != len(others):
        return f"{what}: in parts\n  package {_short(ours)}\n  yours   {_short(mine)}"
    for (place, x), (_, y) in zip(rows, others):
        if isinstance(x, str) and x == y:
            continue
        both = f"\n  package {_short(x)}\n  yours   {_short(y)}"
        try:
            a, b = (torch.as_tensor(value).detach().cpu() for value in (x, y))
        except (TypeError, ValueError, RuntimeError):
            return f"{place}: type{both}"
        if a.shape != b.shape or (isinstance(x, torch.Tensor) and (type(y), b.dtype) != (type(x), a.dtype)):
            return f"{place}: type or shape{both}"
        a, b = a.double(), b.double()
        wrong = ~torch.isclose(b, a, tolerance, tolerance, equal_nan=True)
        if wrong.any():
            first, far = wrong.nonzero()[0].tolist(), (a - b).abs().max()
            both = f"\n  package {a[tuple(first)]:.4g}\n  yours   {b[tuple(first)]:.4g}"
            return f"{place}{first or ''}: largest difference {far:.3g}, {wrong.sum()} of {wrong.numel()} wrong{both}"
    return ""


def _leaves(value, place: str):
    """(place, tensor or number) for each part of nested dicts, tuples and lists."""
    if not isinstance(value, dict | tuple | list):
        return [(place, value)]
    names = getattr(value, "_fields", range(len(value)))
    rows = sorted(value.items()) if isinstance(value, dict) else zip(names, value)
    return [leaf for name, one in rows for leaf in _leaves(one, f"{place}[{name}]")]


def _short(value) -> str:
    """A value in a line: a small tensor with its numbers, a larger one as its shape."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        numbers = np.round(value.double().numpy(), 3) if value.is_floating_point() else value
        numbers = f" = {numbers.tolist()}" if value.numel() <= 12 else ""
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{numbers}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(one)}" for key, one in value.items()) + "}"
    return f"{type(value).__name__} {' '.join(repr(value).split())}"[:90]


# ---- the exercises; where the package does a thing only inside a larger one, an adapter asks that --------------------


def average_precision(hits, objects: int) -> float:
    """pycocotools' AP at one IoU, hits (N,) bool by falling score."""
    places = torch.arange(len(hits) + objects)[:, None] * 20 + torch.tensor([0.0, 0.0, 9.0, 9.0])  # far apart
    found = {"boxes": places[: len(hits)], "labels": torch.zeros(len(hits)).long(), "scores": -torch.arange(len(hits))}
    there = torch.cat([found["boxes"][hits], places[len(hits) :]])[:objects]
    return evaluate([found], [{"boxes": there, "labels": torch.zeros(objects).long()}])["AP50"]


def attention(queries, keys, values, heads: int) -> torch.Tensor:
    """Attention of several heads without projections: queries (Q, D), keys and values (S, D) -> (Q, D)."""
    split = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (queries, keys, values))  # (M, N, D / M)
    return torch.nn.functional.scaled_dot_product_attention(*split).transpose(0, 1).flatten(1)


def map_positions(height: int, width: int, dim: int, temperature: float) -> torch.Tensor:
    """(H, W, dim) of a map without padding."""
    return transformer.map_positions(torch.zeros(1, height, width, dtype=torch.bool), dim, temperature)[0]


def point_attention(feature_map, places, shares) -> torch.Tensor:
    """`deformable_attention` of one query, head and level: map (H, W, D), places (P, 2), shares (P,) -> (D,)."""
    value = feature_map.flatten(0, 1)[None, :, None]  # (1, S, 1, D)
    shapes, layout = [tuple(feature_map.shape[:2])], (1, 1, 1, 1, -1)
    return deformable.deformable_attention(value, shapes, places.view(*layout, 2), shares.view(layout))[0, 0]


def refine(delta, reference) -> torch.Tensor:
    """A layer's correction (N, 4) of boxes, or of points (N, 2), which leave width and height free."""
    before = torch.nn.functional.pad(boxes.inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
    return (delta + before).sigmoid()


def places(reference, offsets, shape: tuple[int, int]) -> torch.Tensor:
    """Sampling points (P, 2) of offsets in cells around a reference (2,)."""
    return reference + offsets / torch.tensor([shape[1], shape[0]])


def select(logits, places, count: int) -> torch.Tensor:
    """Two-stage selection: the boxes (count, 4) of the tokens with the highest best class score."""
    return places[logits.amax(-1).topk(count).indices]


def updated(teacher: dict, student: dict, momentum: float) -> dict:
    """The tensors {name: tensor} of a teacher after `ema_update`."""
    nets = torch.nn.Module(), torch.nn.Module()
    for net, tensors in zip(nets, (teacher, student)):
        for name, tensor in tensors.items():
            net.register_buffer(name, tensor.clone())
    mean_teacher.ema_update(*nets, momentum)
    return dict(nets[0].named_buffers())


def averaged(start: torch.Tensor, moves: list, momentum: float) -> torch.Tensor:
    """The teacher after a student that begins at `start`, as the teacher does, has made these steps."""
    student, teacher = start, start
    for move in moves:
        student = student + move
        teacher = updated({"w": teacher}, {"w": student}, momentum)["w"]
    return teacher


def to_strong_view(found: dict, matrix: torch.Tensor, size: tuple, score_threshold: float) -> dict:
    """A teacher's boxes as targets of the strong view: over the cut, moved by the matrix, in view."""
    sure = {key: value[found["scores"] >= score_threshold] for key, value in found.items()}
    moved = views.map_target(sure, matrix, size)
    return {key: moved[key] for key in ("boxes", "labels")}


def _pseudo(rng) -> dict:
    scores = torch.tensor([0.9, 0.7, 0.4, 0.39, 0.2])
    return {"boxes": _boxes(rng, 5), "labels": torch.arange(5), "scores": scores}


def _weights(rng) -> dict:
    return {"w": torch.tensor(rng.normal(0, 1, (2, 3)), dtype=torch.float32), "steps": torch.tensor(rng.integers(9))}


def box_cells(features: list, strides: list, images: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """What `Projector` reads of each box before its layers: (R, D, side, side)."""
    projector = query_consistency.Projector(features[0].shape[1], 1, side)
    projector.layers = torch.nn.Identity()
    return projector(features, strides, images, boxes)


def em_step(costs, weights, means, variances) -> tuple:
    """scikit-learn's two Gaussians after one step: weights, means and variances, (2,) each."""
    return _mixture(costs, 1, weights, means, variances)


def em_steps(costs, steps: int) -> tuple:
    """The same after several steps from the cheapest and the dearest cost."""
    return _mixture(costs, steps, np.full(2, 0.5), np.array([costs.min(), costs.max()]), np.ones(2))


def _mixture(costs, steps, weights, means, variances) -> tuple:
    start = {"weights_init": weights, "means_init": means[:, None], "precisions_init": 1 / variances[:, None]}
    mixture = GaussianMixture(2, covariance_type="diag", reg_covar=1e-5, tol=0, max_iter=steps, **start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, on purpose
        mixture.fit(costs[:, None])
    return mixture.weights_, mixture.means_[:, 0], mixture.covariances_[:, 0]


def mine(costs, scores, valid, threshold: float, score_threshold: float) -> tuple:
    """Which boxes are confident, which are mined, and whose consistency is asked for: (B, K) bool each."""
    confident = valid & (scores >= score_threshold)
    mined = valid & (np.nan_to_num(costs, nan=np.inf) <= threshold)
    return confident, mined, confident | mined


def stage(step: int, before: int, steps: int, share: float) -> str:
    """The matching of a step in a run of `steps` steps that begins at step `before`."""
    return SemiDETR.stage(SimpleNamespace(one_to_many_steps=before + round(share * steps)), step)


def gap_closed(lines: list[dict], row: str, percent: float) -> float:
    """The share of the gap that a row of an ablation's main table closes, in %, nan where an end of it is missing."""
    found = {(one.row, one.percent): one.gap for one in ablate.summarise(lines) if one.table == "main"}
    return found[row, percent]


def resumed(state: dict) -> tuple[dict, dict, int]:
    """The tensors of student and teacher, and the step, that a run goes on with from its `last.pt`."""
    method = torch.nn.ModuleDict({part: torch.nn.Linear(3, 2) for part in ("student", "teacher")})
    load_state_strict(method, state["method"], Path("last.pt"))
    student, teacher = (dict(part.state_dict()) for part in method.values())
    return student, teacher, state["offset"] + state["step"]


def labelled_of_process(image_ids: list[int], percent: float, fold: int, process: int) -> list[int]:
    """The ids of the labelled images of a fold, the same in every process."""
    return [image_ids[index] for index in splits.labelled_indices(len(image_ids), percent, fold)]


def _recorded(rng, **seeds: int) -> list[dict]:
    """Lines of an ablation: so many seeds of each row, "all" for supervised with all labels."""
    lines = []
    for name, count in seeds.items():
        row, percent = ("supervised", 100.0) if name == "all" else (name, 10.0)
        kind = {"table": "main", "preset": "digits", "detector": "dino", "row": row, "percent": percent}
        lines += [kind | {"seed": i, "AP": rng.uniform(0.4, 0.8), "AP50": 0.9, "seconds": 60.0} for i in range(count)]
    return lines


def _state(rng) -> dict:
    method = {f"{part}.{name}": _normal(rng, *shape) for part in ("student", "teacher") for name, shape in LINEAR}
    return {"method": method, "step": 250, "offset": 1000}


def _batch(labelled: int, unlabelled: int) -> dict:
    counts = {"labelled": labelled, "weak": unlabelled, "strong": unlabelled}
    return {key: ([torch.full((1,), i) for i in range(n)], [{"id": i} for i in range(n)]) for key, n in counts.items()}


def _costs(rng, cheap: int = 9, dear: int = 5) -> np.ndarray:
    return np.hstack([rng.normal(-1.5, 0.4, cheap), rng.normal(2.0, 1.0, dear)])


def _embeddings(rng, queries: int) -> tuple:
    layers = [torch.tensor(rng.normal(0, 2, (4, 2, queries, 6)), dtype=torch.float32) for _ in range(2)]
    valid = torch.tensor(rng.random((2, queries)) < 0.7)
    return list(layers[0]), list(layers[1]), valid


def _normal(rng, *shape: int) -> torch.Tensor:
    return torch.tensor(rng.normal(0, 1, shape), dtype=torch.float32)


def _boxes(rng, count: int) -> torch.Tensor:
    corners = rng.uniform(0, 70, (count, 2))
    return torch.tensor(np.hstack([corners, corners + rng.uniform(5, 25, (count, 2))]), dtype=torch.float32)


def _map(rng, height: int, width: int) -> torch.Tensor:
    return torch.tensor(rng.normal(0, 1, (2, 3, height, width)), dtype=torch.float32)


def _scenes(rng, *more) -> dict[str, tuple]:
    """{note: (logits, pred_boxes, target, *more)}, the predictions around the objects of a wide image."""
    cases = {}
    for note, queries, objects in (("three objects", 6, 3), ("one object", 2, 1), ("no object", 4, 0)):
        truth = _boxes(rng, objects)
        truth[1:2] = truth[:1] + 4  # a crowded pair, if there are two
        near = truth[rng.integers(objects, size=queries)] if objects else _boxes(rng, queries)
        near = near + torch.tensor(rng.uniform(-4, 4, (queries, 4)), dtype=torch.float32)
        logits = torch.tensor(rng.normal(-1, 1.5, (queries, 4)), dtype=torch.float32)
        target = {"boxes": truth, "labels": torch.arange(objects), "size": WIDE}
        cases[note] = (logits, boxes.to_model(near, WIDE), target, *more)
    return cases


def _lonely(rng, *more) -> tuple:
    """(logits, pred_boxes, target, *more): two objects far apart, of which the second is touched by one query alone."""
    truth = torch.tensor([[4.0, 4, 44, 44], [80.0, 50, 120, 90]])
    near = truth[[0, 0, 0, 1]] + torch.tensor(rng.uniform(-4, 4, (4, 4)), dtype=torch.float32)
    logits = torch.tensor(rng.normal(-1, 1.5, (4, 4)), dtype=torch.float32)
    return logits, boxes.to_model(near, WIDE), {"boxes": truth, "labels": torch.arange(2), "size": WIDE}, *more


HITS, WIDE = torch.tensor([True, True, False, True, False, False, True]), (96, 128)
AWAY = torch.tensor([[1.0, 0.0, 60.0], [0.0, 1.0, 60.0], [0.0, 0.0, 1.0]])
TURN = torch.tensor([[1.1, 0.3, -30.0], [-0.3, 1.1, 9.0], [0.0, 0.0, 1.0]])
LINEAR = (("weight", (2, 3)), ("bias", (2,)))
EXERCISES = {
    "boxes.pairwise_iou": Exercise(
        lambda a, b: boxes.pairwise_overlaps(a, b)[0],
        lambda rng: {"a box and itself": (_boxes(rng, 1),) * 2, "9 and 7": (_boxes(rng, 9), _boxes(rng, 7))},
    ),
    "boxes.to_model": Exercise(boxes.to_model, lambda rng: {"wide": (_boxes(rng, 3), WIDE)}),
    "boxes.to_pixels": Exercise(boxes.to_pixels, lambda rng: {"wide": (_boxes(rng, 3) / 99, WIDE)}),
    "views.map_boxes": Exercise(views.map_boxes, lambda rng: {"zoomed and turned": (_boxes(rng, 5), TURN, WIDE)}),
    "evaluate.precision_recall": Exercise(
        lambda hits, objects: (hits.cumsum(0) / torch.arange(1, len(hits) + 1), hits.cumsum(0) / objects),
        lambda rng: {"10 objects": (HITS, 10)},
    ),
    "evaluate.average_precision": Exercise(
        average_precision, lambda rng: {"all found": (HITS[:2], 2), "a third missed": (HITS, 6)}
    ),
    "matching.matching_cost": Exercise(matching.matching_cost, _scenes),
    "matching.one_to_one": Exercise(matching.one_to_one, _scenes),
    "detr.sine_positions": Exercise(
        transformer.sine_positions,
        lambda rng: {
            "one number": (torch.tensor([[0.25]]), 4, 100.0),
            "boxes": (torch.tensor(rng.uniform(0, 1, (3, 4)), dtype=torch.float32), 8, 20.0),
        },
    ),
    "detr.attention": Exercise(
        attention,
        lambda rng: {f"{heads} heads": (*(_normal(rng, n, 8) for n in (3, 5, 5)), heads) for heads in (1, 2, 4)},
    ),
    "detr.map_positions": Exercise(
        map_positions, lambda rng: {"square": (3, 3, 8, 20.0), "wide": (3, 5, 8, 20.0), "tall": (4, 1, 8, 20.0)}
    ),
    "deformable.attention": Exercise(
        point_attention,
        lambda rng: {
            note: (_normal(rng, 3, 5, 2), torch.tensor(rng.uniform(*ends, (9, 2))).float(), _normal(rng, 9).softmax(0))
            for note, ends in (("inside", (0.2, 0.8)), ("partly outside", (-0.2, 0.9)))
        },
    ),
    "deformable.refine": Exercise(
        refine,
        lambda rng: {
            f"references of {size}": (_normal(rng, 3, 4), torch.tensor(rng.uniform(0, 1, (3, size))).float())
            for size in (4, 2)
        },
    ),
    "deformable.places": Exercise(
        places,
        lambda rng: {
            f"{shape[0]} x {shape[1]}": (torch.tensor([0.5, 0.25]), _normal(rng, 3, 2), shape)
            for shape in ((4, 4), (2, 8))
        },
    ),
    "denoising.noise_boxes": Exercise(
        noise_boxes,
        lambda rng: {
            f"noise {amount}": (
                boxes.to_model(_boxes(rng, 4), WIDE),
                torch.tensor([False, True, False, True]),
                amount,
                torch.tensor(rng.uniform(0, 1, (4, 8))).float(),
            )
            for amount in (0.4, 2.0)
        },
    ),
    "dino.select": Exercise(select, lambda rng: {"8 of 10": (_normal(rng, 10, 3), _normal(rng, 10, 4), 8)}),
    "mean_teacher.ema_update": Exercise(
        updated,
        lambda rng: {
            f"momentum {momentum}": (_weights(rng), _weights(rng), momentum) for momentum in (0.0, 0.5, 0.999, 1.0)
        },
    ),
    "mean_teacher.average": Exercise(
        averaged,
        lambda rng: {
            "one step": (torch.zeros(2), [torch.ones(2)], 0.5),
            "five steps": (torch.ones(3), [torch.tensor(rng.normal(0, 1, 3)).float() for _ in range(5)], 0.9),
        },
    ),
    "mean_teacher.to_strong_view": Exercise(
        to_strong_view,
        lambda rng: {
            "in view": (_pseudo(rng), TURN, WIDE, 0.4),
            "partly out of view": (_pseudo(rng), AWAY, WIDE, 0.3),
            "nothing sure": (_pseudo(rng), TURN, WIDE, 0.95),
        },
    ),
    "denoising.group_mask": Exercise(
        group_mask, lambda rng: {"one group": ([3], 4), "three groups": ([2, 2, 3], 5), "no group": ([], 2)}
    ),
    "query_consistency.consistency_loss": Exercise(
        query_consistency.consistency_loss,
        lambda rng: {
            "some filled up": _embeddings(rng, 5),
            "nothing valid": (*_embeddings(rng, 3)[:2], torch.zeros(2, 3).bool()),
        },
    ),
    "query_consistency.box_cells": Exercise(
        box_cells,
        lambda rng: {
            "one map": ([_map(rng, 24, 32)], [(4.0, 4.0)], torch.tensor([0, 1, 1]), _boxes(rng, 3), 2),
            "small and large": (
                [_map(rng, 24, 32), _map(rng, 12, 16)],
                [(4.0, 4.0), (8.0, 8.0)],
                torch.tensor([0, 0, 1, 1]),
                torch.cat([_boxes(rng, 2), torch.tensor([[10.0, 10, 90, 80], [0, 0, 56, 56]])]),
                3,
            ),
        },
    ),
    "cost_mining.em_step": Exercise(
        em_step,
        lambda rng: {
            "the start": (_costs(rng), np.full(2, 0.5), np.array([-2.0, 4.0]), np.ones(2)),
            "on the way": (_costs(rng, 20, 3), np.array([0.8, 0.2]), np.array([-1.0, 1.0]), np.array([0.5, 3.0])),
        },
    ),
    "cost_mining.em_steps": Exercise(
        em_steps,
        lambda rng: {"five steps": (_costs(rng), 5), "two costs": (np.array([-1.0, 3.0]), 30)},
    ),
    "cost_mining.mine": Exercise(
        mine,
        lambda rng: {
            "six boxes": (
                np.array([[-2.0, -1.0, np.nan], [0.5, -1.5, -3.0]]),
                np.array([[0.9, 0.2, 0.4], [0.8, 0.1, 0.3]]),
                np.array([[True, True, True], [True, True, False]]),
                -1.0,
                0.4,
            )
        },
    ),
    "matching.one_to_many": Exercise(
        matching.one_to_many, lambda rng: _scenes(rng, 1.0, 2.0, 3) | {"few overlap": _lonely(rng, 1.0, 6.0, 4)}
    ),
    "semi_detr.stage": Exercise(
        stage,
        lambda rng: {
            "the last step of stage one": (599, 0, 1500, 0.4),
            "the first of stage two": (600, 0, 1500, 0.4),
            "after a burn-in": (1599, 1000, 1500, 0.4),
            "no stage one": (0, 0, 1500, 0.0),
            "no stage two": (1499, 0, 1500, 1.0),
        },
    ),
    "ablate.gap_closed": Exercise(
        gap_closed,
        lambda rng: {
            "one seed": (_recorded(rng, supervised=1, all=1, ours=1), "ours", 10.0),
            "more seeds of some rows": (_recorded(rng, supervised=3, all=1, ours=2), "ours", 10.0),
            "the lower end": (_recorded(rng, supervised=2, all=1, ours=1), "supervised", 10.0),
            "no run with all labels": (_recorded(rng, supervised=1, ours=2), "ours", 10.0),
        },
    ),
    "train.resumed": Exercise(resumed, lambda rng: {"after a burn-in": (_state(rng),)}),
    "splits.labelled_indices": Exercise(
        splits.labelled_indices,
        lambda rng: {
            "10 % of 400": (400, 10.0, 1),
            "another fold": (400, 10.0, 2),
            "5 % of 118, rounded": (118, 5.0, 1),
            "1 % of 30, at least one": (30, 1.0, 1),
        },
    ),
    "splits.of_process": Exercise(
        labelled_of_process,
        lambda rng: {f"process {p}": (list(range(100, 160)), 10.0, 2, p) for p in (0, 3)},
    ),
    "engine.micro_batches": Exercise(
        micro_batches,
        lambda rng: {"equal parts": (_batch(4, 8), 4), "unequal ones": (_batch(3, 7), 2), "one": (_batch(1, 2), 1)},
    ),
}
