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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from semidetr_lite import boxes, matching
from semidetr_lite.data import views
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import evaluate
from semidetr_lite.methods import mean_teacher


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


def carried(found: dict, matrix: torch.Tensor, size: tuple, score_cut: float) -> dict:
    """A teacher's boxes as targets of the strong view: over the cut, moved by the matrix, in view."""
    sure = {key: value[found["scores"] >= score_cut] for key, value in found.items()}
    moved = views.map_target(sure, matrix, size)
    return {key: moved[key] for key in ("boxes", "labels")}


def _pseudo(rng) -> dict:
    scores = torch.tensor([0.9, 0.7, 0.4, 0.39, 0.2])
    return {"boxes": _boxes(rng, 5), "labels": torch.arange(5), "scores": scores}


def _weights(rng) -> dict:
    return {"w": torch.tensor(rng.normal(0, 1, (2, 3)), dtype=torch.float32), "steps": torch.tensor(rng.integers(9))}


def _boxes(rng, count: int) -> torch.Tensor:
    corners = rng.uniform(0, 70, (count, 2))
    return torch.tensor(np.hstack([corners, corners + rng.uniform(5, 25, (count, 2))]), dtype=torch.float32)


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


HITS, WIDE = torch.tensor([True, True, False, True, False, False, True]), (96, 128)
AWAY = torch.tensor([[1.0, 0.0, 60.0], [0.0, 1.0, 60.0], [0.0, 0.0, 1.0]])
TURN = torch.tensor([[1.1, 0.3, -30.0], [-0.3, 1.1, 9.0], [0.0, 0.0, 1.0]])
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
    "mean_teacher.carried": Exercise(
        carried,
        lambda rng: {
            "in view": (_pseudo(rng), TURN, WIDE, 0.4),
            "partly out of view": (_pseudo(rng), AWAY, WIDE, 0.3),
            "nothing sure": (_pseudo(rng), TURN, WIDE, 0.95),
        },
    ),
    "matching.one_to_many": Exercise(matching.one_to_many, lambda rng: _scenes(rng, 1.0, 2.0, 3)),
}
