"""Comparing a learner's function with the package's, case by case, and saying what may be wrong."""

import copy
import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

PASSED = "right in every case"


@dataclass(frozen=True)
class Exercise:
    """The right function, the cases it is compared on, and known wrong functions.

    Attributes:
        solution: the package's function.
        cases: makes {what is special about the case: arguments} from a seeded generator.
        mistakes: {rule: a function that breaks it}. A learner's wrong answer that agrees with one
            of these functions is explained by its rule.
        tolerance: absolute and relative.
    """

    solution: Callable
    cases: Callable[[np.random.Generator], dict[str, tuple]]
    mistakes: Mapping[str, Callable] = field(default_factory=dict)
    tolerance: float = 1e-4


def find_fault(exercise: Exercise, answer: Callable) -> str:
    """What is wrong with the function `answer`, in words; "" if nothing is."""
    if _calls_solution(exercise.solution, answer):
        return "this is the package's own function; write yours, then compare"
    cases = exercise.cases(np.random.default_rng(0))
    for number, (note, inputs) in enumerate(cases.items(), 1):
        case = f"case {number} ({note})"
        expected = exercise.solution(*copy.deepcopy(inputs))
        given = copy.deepcopy(inputs)
        try:
            result = answer(*given)
        except NotImplementedError:
            return "not written yet"
        except Exception as error:
            return f"{case}: your function raised {_raised(error)}"
        if result is None or result is ...:
            return "not written yet (it returns nothing)"
        wrong = difference(expected, result, exercise.tolerance)
        if wrong:
            cause = likely_cause(exercise, answer, cases, note)
            cause = cause or _cause_of_values(expected, result, exercise.tolerance)
            cause = cause or _cause_of_case(number, note)
        else:
            wrong = difference(inputs, given, 0.0, "the input, now changed")
            cause = "the function changes its input in place; make new tensors"
        if wrong:
            names = inspect.signature(exercise.solution).parameters
            listed = ", ".join(f"{name} {_short(value)}" for name, value in zip(names, inputs))
            return f"{case} differs\n  inputs  {listed}\n  {wrong}\n  likely cause: {cause}"
    return ""


def likely_cause(exercise: Exercise, answer: Callable, cases: dict[str, tuple], note: str) -> str:
    """The rule broken by the known mistake that gives the results of `answer`; "" if none does.

    A mistake that agrees in every case goes before one that agrees only in the case `note`.
    """
    for compared in (cases, {note: cases[note]}):
        for rule, mistake in exercise.mistakes.items():
            pairs = ((_result(mistake, case), _result(answer, case)) for case in compared.values())
            if all(_agree(*pair, exercise.tolerance) for pair in pairs):
                return f"this rule is not kept: {rule}"
    return ""


def _result(function: Callable, inputs: tuple):
    """The result of a function; of one that raises, the name of the error."""
    try:
        with np.errstate(all="ignore"):
            return function(*copy.deepcopy(inputs))
    except Exception as error:
        return type(error).__name__


def _agree(first, second, tolerance: float) -> bool:
    return not difference(first, second, tolerance)


def _raised(error: Exception) -> str:
    """An exception in one line, with the line of the learner's function that raised it."""
    rows = traceback.extract_tb(error.__traceback__)[1:2]
    return " ".join(repr(error).split()) + "".join(f" at line {r.lineno}: {r.line}" for r in rows)


def _calls_solution(solution: Callable, answer: Callable) -> bool:
    """Whether `answer` is the solution itself, wrapped, or calls it by a global name."""
    names = getattr(_code(answer), "co_names", ())
    called = [getattr(answer, "__globals__", {}).get(name) for name in names]
    return _code(solution) in map(_code, (answer, *called))


def _code(function):
    """The code of a function without functools.wraps and functools.partial around it."""
    while inner := getattr(function, "__wrapped__", None) or getattr(function, "func", None):
        function = inner
    return getattr(function, "__code__", None)


# ---- differences ---------------------------------------------------------------------------------


def difference(expected, result, tolerance: float, name: str = "the answer") -> str:
    """Where `result` first differs from `expected`, in words; "" if nowhere.

    A plain tuple may stand for a named one, and one kind of number for another.
    """
    if isinstance(expected, str):
        same = isinstance(result, str) and expected == result
        return "" if same else f"{name}: differs{_both(expected, result)}"
    if isinstance(expected, torch.Tensor | np.ndarray):
        return _difference_of_arrays(expected, result, tolerance, name)
    if isinstance(expected, dict):
        if not isinstance(result, dict):
            return f"{name}: return a dict, not {_kind(result)}{_both(expected, result)}"
        if expected.keys() != result.keys():
            return f"{name}: return the keys {sorted(expected)}, not {sorted(map(str, result))}"
        pairs = [(key, expected[key], result[key]) for key in sorted(expected)]
    elif isinstance(expected, tuple | list):
        kind = "list" if isinstance(expected, list) else "tuple"
        if not isinstance(result, tuple | list):
            return f"{name}: return a {kind}, not {_kind(result)}{_both(expected, result)}"
        if len(expected) != len(result):
            counts = f"return {len(expected)} parts, not {len(result)}"
            return f"{name}: {counts}{_both(expected, result)}"
        fields = getattr(expected, "_fields", range(len(expected)))
        pairs = list(zip(fields, expected, result))
    else:
        return _difference_of_numbers(expected, result, tolerance, name)
    parts = (difference(x, y, tolerance, f"{name}[{key}]") for key, x, y in pairs)
    return next(filter(None, parts), "")


def _difference_of_arrays(expected, result, tolerance: float, name: str) -> str:
    """`difference` of a tensor or NumPy array."""
    accepted = torch.Tensor if isinstance(expected, torch.Tensor) else torch.Tensor | np.ndarray
    if not isinstance(result, accepted):
        wanted = "torch.Tensor" if accepted is torch.Tensor else "NumPy array"
        return f"{name}: return a {wanted}, not {_kind(result)}{_both(expected, result)}"
    x, y = torch.as_tensor(expected).detach().cpu(), torch.as_tensor(result).detach().cpu()
    if x.shape != y.shape:
        shapes = f"return the shape {tuple(x.shape)}, not {tuple(y.shape)}"
        return f"{name}: {shapes}{_both(expected, result)}"
    if isinstance(expected, torch.Tensor) and x.dtype != y.dtype:
        return f"{name}: return the type {x.dtype}, not {y.dtype}{_both(expected, result)}"
    return _difference_of_values(x, y, tolerance, name)


def _difference_of_numbers(expected, result, tolerance: float, name: str) -> str:
    """`difference` of a single number, which may come as a tensor without dimensions."""
    try:
        x, y = (torch.as_tensor(value).detach().cpu() for value in (expected, result))
    except (TypeError, ValueError, RuntimeError):
        return f"{name}: return a number, not {_kind(result)}{_both(expected, result)}"
    if y.ndim:
        return f"{name}: return a single number{_both(expected, result)}"
    return _difference_of_values(x, y, tolerance, name)


def _difference_of_values(x: torch.Tensor, y: torch.Tensor, tolerance: float, name: str) -> str:
    """`difference` of two tensors of one shape."""
    x, y = x.double(), y.double()
    wrong = ~torch.isclose(y, x, tolerance, tolerance, equal_nan=True)
    if not wrong.any():
        return ""
    first = wrong.nonzero()[0].tolist()
    largest = (x - y).abs().max()
    both = f"\n  package {x[tuple(first)]:.4g}\n  yours   {y[tuple(first)]:.4g}"
    counts = f"largest difference {largest:.3g}, {wrong.sum()} of {wrong.numel()} wrong"
    return f"{name}{first or ''}: {counts}{both}"


def _cause_of_values(expected, result, tolerance: float) -> str:
    """What can be seen from the values alone: another order, a factor, an axis; "" if nothing."""
    if isinstance(expected, tuple | list) and isinstance(result, tuple | list):
        parts = zip(expected, result)
        return next(filter(None, (_cause_of_values(x, y, tolerance) for x, y in parts)), "")
    if isinstance(expected, str | dict) or difference(expected, result, tolerance) == "":
        return ""
    if isinstance(expected, torch.Tensor) and not isinstance(result, torch.Tensor):
        return "the answer must be a tensor: wrap it in torch.tensor(...) or torch.stack(...)"
    try:
        x, y = (torch.as_tensor(value).detach().cpu().double() for value in (expected, result))
    except (TypeError, ValueError, RuntimeError):
        return ""
    close = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance)
    if x.ndim == 2 and x.shape[::-1] == y.shape and close(x.T, y):
        return "rows and columns are exchanged"
    if x.shape != y.shape:
        return "the number of rows or columns differs: check which entries belong in the answer"
    if close(x, y):
        return "the numbers are right and their type is not"
    if x.numel() > 1 and x.ndim and close(x.flatten().sort()[0], y.flatten().sort()[0]):
        return "the values are right and their order is not"
    largest = x.abs().argmax() if x.numel() else None
    factor = float(y.flatten()[largest] / x.flatten()[largest]) if largest is not None else 0.0
    telling = x.numel() > 1 or round(factor, 3) in (-1, 0.01, 0.5, 2, 100)
    if telling and factor and np.isfinite(factor) and close(x * factor, y):
        return f"every value is {factor:.4g} times what it should be"
    return ""


def _cause_of_case(number: int, note: str) -> str:
    if number == 1:
        return "none of the known mistakes; work through this case by hand"
    return f"what is special about this case ({note}), for the cases before it are right"


def _both(expected, result) -> str:
    return f"\n  package {_short(expected)}\n  yours   {_short(result)}"


def _kind(value) -> str:
    name = type(value).__name__
    return "a torch.Tensor" if isinstance(value, torch.Tensor) else f"a {name}"


def _short(value) -> str:
    """A value in a line: a small tensor with its numbers, a larger one as its shape."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        numbers = np.round(value.double().numpy(), 3) if value.is_floating_point() else value
        numbers = f" = {numbers.tolist()}" if value.numel() <= 12 else ""
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{numbers}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(part)}" for key, part in value.items()) + "}"
    return f"{type(value).__name__} {' '.join(repr(value).split())}"[:90]
