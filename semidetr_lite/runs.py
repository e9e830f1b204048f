"""Finished runs to compare, read from their folders: logs, figures, names, and which is best.

A run folder holds config.json, log.jsonl, pseudo_boxes.jsonl and weights; a weights file alone is a
run without a log. Its figures on the test split stand in the log, or are measured.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import semidetr_lite
from semidetr_lite.data import digits
from semidetr_lite.data.splits import Splits
from semidetr_lite.errors import UserError, as_user_error
from semidetr_lite.files import read_jsonl
from semidetr_lite.training import presets
from semidetr_lite.training.checkpoint import read_config
from semidetr_lite.training.measure import measure
from semidetr_lite.training.settings import METHOD_TITLES

STEPS_OF_SAME_TIME = 2  # supervised steps that take no longer than one semi-supervised step
DIGITS = {"data": "digits", "percent": 10, "fold": 1, "recipe": {}}  # to load the embedded data
DATA_KEYS = ("data", "validation", "categories")  # settings in which compared runs must agree


@dataclass
class Record:
    """What a run folder or a weights file holds, and its figures on the test split.

    Steps and seconds of `log` and `pseudo_lines` count the burn-in.
    """

    path: Path  # the run folder, or the weights file
    config: dict
    log: list[dict]
    pseudo_lines: list[dict]
    weights: list[str]  # of "teacher" and "student", those whose file exists
    burn_in: list[dict] = field(default_factory=list)  # log of the run it went on from, and before
    burn_in_name: str = ""
    data: dict = field(default_factory=dict)  # settings of the data it is tested on
    name: str = ""
    figures: dict = field(default_factory=dict)  # {"student": COCO's twelve, "teacher": ...}
    live: bool = False  # whether the figures were measured here, not recorded

    @property
    def method(self) -> str:
        """The name of its method in the commands, "" where that is not known."""
        return str(self.config.get("method") or "")

    @property
    def main(self) -> dict:
        """The figures of the EMA teacher, or of the student where there is no teacher."""
        return self.figures.get("teacher") or self.figures.get("student") or {}

    @property
    def ap(self) -> float | None:
        """The AP of the main figures in %, None if there is none."""
        value = self.main.get("AP")
        return 100 * value if is_measured(value) else None


# ---- reading ---------------------------------------------------------------------------------


def read_runs(
    paths: Sequence[str | os.PathLike], names: dict[str, str] | None = None
) -> list[Record]:
    """Read run folders and weights files, check that they are on the same data, and name them.

    Args:
        paths: run folders or .safetensors files.
        names: {name of a folder or file: name of its run}.

    Raises:
        UserError: a folder that is no run, a damaged file, a run given twice, or runs on different
            data.
    """
    runs = [read_run(path) for path in paths]
    if not runs:
        raise UserError("no run to report on: give at least one run folder")
    resolved = [run.path.resolve() for run in runs]
    folders = [run for run in runs if run.data]
    for position, run in enumerate(runs):
        if resolved[position] in resolved[:position]:
            raise UserError(f"{run.path}: given twice; give every run once")
        _check_data(run, folders[0] if folders else runs[0])
        if not folders and run.config["categories"] != digits.CATEGORIES:
            fault = "a weights file does not say on which images to measure it"
            advice = "give a run folder trained on the same data with it"
            raise UserError(f"{run.path}: {fault}; {advice}")
    for run in runs:
        run.data = run.data or (folders[0].data if folders else DIGITS)
    _name_runs(runs, names or {})
    return runs


def read_run(path: str | os.PathLike) -> Record:
    """The run in a folder, or a weights file. Raises UserError for none, or for a damaged file."""
    path = Path(path)
    if path.is_file() or path.suffix == ".safetensors":
        return _read_weights(path)
    config = read_config(path)
    with as_user_error(path / "config.json", "its burn-in cannot be followed"):
        burn_in_name, burn_in = _burn_in(path, config)
    log = _lines(path / "log.jsonl", burn_in)
    pseudo_lines = _lines(path / "pseudo_boxes.jsonl", burn_in)
    networks = ("teacher", "student")
    weights = [name for name in networks if (path / f"{name}.safetensors").is_file()]
    return Record(path, config, log, pseudo_lines, weights, burn_in, burn_in_name, data=config)


def _read_weights(path: Path) -> Record:
    """A weights file as a run without a log; its name may say the method."""
    detector = semidetr_lite.load_detector(path, weights="teacher")
    detector_names = {kind: name for name, kind in presets.DETECTORS.items()}
    method = path.stem.lower().replace("_", "-")
    config = {
        "method": method if method in METHOD_TITLES else None,
        "detector": detector_names.get(type(detector)),
        "categories": detector.categories,
    }
    return Record(path, config, [], [], ["teacher"])


def _check_data(run: Record, first: Record) -> None:
    """Raise UserError unless two runs are on the same data."""
    for key in DATA_KEYS if run.data else ("categories",):
        if _data_setting(run.config, key) != _data_setting(first.config, key):
            where = "of config.json" if run.data else "of the weights"
            fault = f'{run.path} and {first.path} differ in "{key}" {where}'
            raise UserError(f"{fault}; compare runs on the same data")


def _data_setting(config: dict, key: str):
    """The value of a key of DATA_KEYS in a config.json, None if it has none."""
    files = config.get("data_files")
    return files.get(key) if key == "validation" and isinstance(files, dict) else config.get(key)


def _burn_in(folder: Path, config: dict) -> tuple[str, list[dict]]:
    """Name and log of the run this one continued, and of those before; empty if not on disk."""
    if not config.get("burn_in"):
        return "", []
    recorded = Path(config["burn_in"])
    for burn_in in (recorded, folder.parent / recorded.name):  # they may have moved together
        if (burn_in / "config.json").is_file():
            burn_in_config = read_config(burn_in)
            _, earlier = _burn_in(burn_in, burn_in_config)
            method = str(burn_in_config.get("method", ""))
            name = f"{METHOD_TITLES.get(method, method)} burn-in"
            return name, earlier + _lines(burn_in / "log.jsonl", earlier)
    return "", []


def _lines(path: Path, earlier: list[dict]) -> list[dict]:
    """The lines of a log, steps and seconds counted from the start of the earlier log."""
    lines = read_jsonl(path, unfinished=True)
    start = {"step": last(earlier, "step") or 0, "seconds": last(earlier, "seconds") or 0.0}
    counted = []
    with as_user_error(path, "not the log of a run"):
        for line in lines:
            logged = [key for key in start if line.get(key) is not None]
            counted.append(line | {key: line[key] + start[key] for key in logged})
    return counted


# ---- names -----------------------------------------------------------------------------------


def _name_runs(runs: list[Record], names: dict) -> None:
    """Names as given, else by method; with the folder's name where two would be equal."""
    for run in runs:
        path = run.path.resolve()
        given = [names[key] for key in (path.name, path.stem) if key in names]
        run.name = str(given[0]) if given else default_name(run, runs)
    taken = [run.name for run in runs]
    all_parts = [run.path.resolve().parts for run in runs]
    shared = -1  # parts of the paths that need not be said: all but the folder's name
    if len({parts[-1] for parts in all_parts}) < len(all_parts):
        shared = len(os.path.commonprefix([parts[:-1] for parts in all_parts]))
    for run, parts in zip(runs, all_parts):
        if taken.count(run.name) > 1:
            run.name += f" ({'/'.join(parts[shared:])})"


def default_name(run: Record, runs: list[Record]) -> str:
    """A run's name among others by its method, or by its folder or file where that is not known."""
    path = run.path.resolve()
    if path.stem in ("teacher", "student") and path.is_file():  # one of a run folder's
        return f"{path.parent.name} {path.stem}"
    name = METHOD_TITLES.get(run.method, run.method or path.stem.replace("_", " "))
    return f"{name}, same time" if same_time(run, runs) else name


def same_time(run: Record, runs: list[Record]) -> bool:
    """Whether a supervised run trains about as long as the others, from the same burn-in on.

    Decided by steps: it has at least STEPS_OF_SAME_TIME times those of every semi-supervised run
    from there.
    """
    start, steps = run.config.get("burn_in"), run.config.get("steps")
    if run.method != "supervised" or not start or not isinstance(steps, int):
        return False
    configs = [other.config for other in runs if other.method not in ("", "supervised")]
    same_start = [config.get("steps") for config in configs if config.get("burn_in") == start]
    lengths = [length for length in same_start if isinstance(length, int)]
    return bool(lengths) and steps >= STEPS_OF_SAME_TIME * max(lengths)


def as_training(run: Record, runs: list[Record]) -> str:
    """A run's name in a sentence: "supervised training" for a run that is called "supervised"."""
    if run.method != "supervised" or run.name != default_name(run, runs):
        return run.name
    return "supervised training" + " of the same time" * same_time(run, runs)


# ---- figures ---------------------------------------------------------------------------------


def splits_of(run: Record) -> Splits:
    """The data a run was trained and tested on."""
    return presets.load_splits(run.data, run.path / "config.json")


def fill_figures(run: Record, splits: Splits | None = None) -> None:
    """Fill in a run's figures on the test split: recorded, else measured, else none."""
    recorded = [line["test"] for line in run.log if line.get("test")]
    if recorded:
        run.figures = recorded[-1]
    elif run.weights:
        test = (splits or splits_of(run)).test
        run.live = len(test) > 0
        for network in run.weights if run.live else ():
            detector = semidetr_lite.load_detector(run.path, weights=network)
            run.figures[network] = measure(detector, test)


def is_measured(value: float | None) -> TypeGuard[float]:
    """Whether a figure exists: COCO marks a class of objects that does not occur by nan or -1."""
    return value is not None and value >= 0


def last(log: list[dict], key: str):
    """The last value a log has for a key, None if it has none."""
    return next((line[key] for line in reversed(log) if line.get(key) is not None), None)


def best_sentence(runs: list[Record]) -> str:
    """Which run has the highest AP on the test split, and its difference to the first run.

    Where the first run is the best, the difference to the best of the others. AP that are equal at
    one decimal are a tie.
    """
    base = runs[0]
    measured = [(run, ap) for run in runs if (ap := run.ap) is not None]
    if not measured:
        return "No AP on the test split yet"
    top = max(ap for _, ap in measured)
    reached, first = f"{top:.1f} AP on the test split", as_training(base, runs)
    best = [run for run, ap in measured if f"{ap:.1f}" == f"{top:.1f}"]
    others = [(run, ap) for run, ap in measured if run is not base]
    if base in best and len(best) > 1:
        equal = listed([as_training(run, runs) for run in best])
        return capital(f"a tie: {equal} reach {reached}")
    if base in best and others:
        rival, rival_ap = max(others, key=lambda other: other[1])
        ahead = f"{top - rival_ap:.1f} AP more than {as_training(rival, runs)}"
        more = ", the best of the others" if len(others) > 1 else ""
        return capital(f"{first} wins: {reached}, {ahead}{more}")
    who = capital(listed([as_training(run, runs) for run in best]))
    if len(runs) == 1:
        return f"{who}: {reached}"
    if base.ap is None:
        return f"{who}: {reached} ({first} has none yet)"
    gain = f"+{top - base.ap:.1f} AP over {first}" if others else "the others have none yet"
    return f"{who}: {reached}, {gain}"


def listed(words: list[str]) -> str:
    """Words in a sentence: "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capital(sentence: str) -> str:
    """A sentence with a capital first letter."""
    return sentence[:1].upper() + sentence[1:]
