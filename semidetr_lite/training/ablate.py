"""The comparison: rows x label percents x seeds, one run after another, one line of a JSON-lines file for each.

A semi-supervised row starts from a supervised run of the recipe's `burn_in` steps on the same labels, shared by all
rows of a seed. The row "supervised" takes as long as burn-in and method together; with all labels it is the upper end
of the gap. Killed, it goes on where it was; what has its line already is not run again, on whatever machine it ran.

Rows and tables follow the paper's ablation (section 4.3), with the seed's mistake, mined boxes as targets, added.
"""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from semidetr_lite.errors import UserError
from semidetr_lite.files import append_jsonl, read_jsonl
from semidetr_lite.training.checkpoint import read_config
from semidetr_lite.training.presets import PRESETS
from semidetr_lite.training.train import KEYS, finish, new_config

STEP_RATIO = 2.5  # supervised steps that take as long as one of Semi-DETR (benchmarks/README.md, step cost)


class Row(NamedTuple):
    """What is run: a method, fields of the recipe that differ, and the detector where the method asks for its own."""

    method: str
    changes: dict = {}
    detector: str | None = None


ROWS = {
    "supervised": Row("supervised"),
    "mean-teacher": Row("mean-teacher"),
    "+SHM": Row("semi-detr", {"consistency_boxes": "none", "mining": "none"}),
    "+SHM+CQC": Row("semi-detr", {"consistency_boxes": "confident", "mining": "none"}),
    "semi-detr": Row("semi-detr"),
    "soft-teacher": Row("soft-teacher", detector="faster-rcnn"),
    "dense-teacher": Row("dense-teacher", detector="fcos"),
    "one-to-one": Row("semi-detr", {"one_to_many_share": 0.0, "consistency_in_both_stages": True}),
    "one-to-many": Row("semi-detr", {"one_to_many_share": 1.0}),
    "mean+std": Row("semi-detr", {"mining": "mean_std"}),
    "top-k": Row("semi-detr", {"mining": "top_k"}),
    "mined": Row("semi-detr", {"consistency_boxes": "mined"}),
    "mined as targets": Row("semi-detr", {"mined_targets": True}),
    **{f"switch at {share} %": Row("semi-detr", {"one_to_many_share": share / 100}) for share in (20, 60, 80)},
}
# table: {its row: the entry of ROWS, where it has another name there}
TABLES = {
    "main": {name: name for name in list(ROWS)[:7]},
    "matching": {"one-to-one": "one-to-one", "one-to-many": "one-to-many", "stage-wise": "semi-detr"},
    "threshold": {"fixed": "+SHM+CQC", "mean+std": "mean+std", "top-k": "top-k", "mixture": "semi-detr"},
    "boxes": {"confident": "+SHM+CQC", "mined": "mined", "union": "semi-detr", "mined as targets": "mined as targets"},
    "switch": {"as in the preset": "semi-detr", **{name: name for name in list(ROWS)[-3:]}},
}


class Ablation:
    """Runs and their lines.

    Args:
        out: folder of the runs: DETECTOR/PERCENTpct/seedSEED/ROW below it.
        record: the JSON-lines file that finished runs are appended to.
        steps: of a semi-supervised run; the preset's if None.
        burn_in_steps: of the supervised run before it; the preset's if None.
        settings: of new_config: preset, detector, data, fields of the recipe and so on.
        quiet: no progress bars.
    """

    def __init__(self, out: Path, record: Path, steps=None, burn_in_steps=None, quiet=False, **settings):
        self.out, self.record, self.quiet = Path(out), Path(record), quiet
        self.settings = {"preset": "digits", "detector": "dino", **settings}
        if self.settings["preset"] not in PRESETS:
            raise UserError(f"no preset called {self.settings['preset']!r}: choose from {', '.join(PRESETS)}")
        self.recipe = PRESETS[self.settings["preset"]]
        self.steps = self.recipe.steps if steps is None else steps
        self.burn_in_steps = self.recipe.burn_in_steps if burn_in_steps is None else burn_in_steps
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")

    def go(self, tables: list[str], rows: list[str], percents: list[float], seeds: list[int]) -> None:
        """Run what has no line yet. `rows` picks some of the tables' rows, all of them if it is empty."""
        chosen = [(table, row, name) for table in tables for row, name in TABLES[table].items()]
        unknown = set(rows) - {row for _, row, _ in chosen}
        if unknown:
            known = ", ".join(dict.fromkeys(row for _, row, _ in chosen))
            raise UserError(f"no row called {sorted(unknown)[0]!r} in {', '.join(tables)}: choose from {known}")
        jobs = []
        for percent in percents:
            for seed in seeds:
                for table, row, name in chosen:
                    whole = percent == 100 and not self.recipe.extra_unlabelled and name != "supervised"
                    if (not rows or row in rows) and not whole:  # with all labels nothing is left to be labelled
                        jobs.append((table, row, name, percent, seed))
                        self.config(name, percent, seed)  # what cannot be run is said before the first run
        if not jobs:
            raise UserError("nothing to run: give tables, rows, percents and seeds; with all labels, supervised alone")
        for job in jobs:
            self.line(*job)

    def line(self, table: str, row: str, name: str, percent: float, seed: int) -> dict:
        """The line of one row, from the record or from a run made now."""
        config, folder = self.config(name, percent, seed)
        identity = {"table": table, "row": row, **{key: config[key] for key in KEYS}}
        known = [line for line in read_jsonl(self.record) if all(line.get(key) == config[key] for key in KEYS)]
        for line in known:
            if (line["table"], line["row"]) == (table, row):
                return line
        for line in known:
            if TABLES.get(line["table"], {}).get(line["row"]) == name:  # the same run, in another table
                append_jsonl(self.record, [line | identity])
                return line | identity
        if not (folder / "config.json").exists() and config["burn_in"]:
            finish(*self.config(name, percent, seed, burn_in=True), quiet=self.quiet)
        finish(config, folder, quiet=self.quiet)
        last, made = read_jsonl(folder / "log.jsonl")[-1], read_config(folder)
        teacher, student = last["test"]["teacher"], last["test"]["student"]
        found = {"AP": teacher["AP"], "AP50": teacher["AP50"], "AP_student": student["AP"]}
        line = identity | {key: round(value, 4) for key, value in found.items()} | {"seconds": last["seconds"]}
        line |= {key: made[key] for key in ("commit", "machine")}
        append_jsonl(self.record, [line])
        self.curve(folder, {"row": name, **{key: config[key] for key in KEYS}})
        return line

    def curve(self, folder: Path, identity: dict) -> None:
        """Append what a run measured while it was trained to RECORD_curves.jsonl, unless it is there."""
        file = self.record.with_name(f"{self.record.stem}_curves.jsonl")
        if not any(identity.items() <= line.items() for line in read_jsonl(file)):
            log = read_jsonl(folder / "log.jsonl")
            lines = [{key: line[key] for key in CURVE if key in line} for line in log if "AP_teacher" in line]
            append_jsonl(file, [identity | line for line in lines])

    def config(self, name: str, percent: float, seed: int, burn_in: bool = False) -> tuple[dict, Path]:
        """Settings and folder of a row's run, or of the supervised run it starts from."""
        row = ROWS[name]
        detector = row.detector or self.settings["detector"]
        place = self.out / detector / f"{percent:g}pct" / f"seed{seed}"
        settings = {**self.settings, "detector": detector, "percent": percent, "seed": seed}
        if burn_in:
            return new_config(method="supervised", steps=self.burn_in_steps, **settings), place / "burn-in"
        steps, start = self.steps, None
        if name == "supervised":
            steps = self.burn_in_steps + round(STEP_RATIO * steps)
        elif self.burn_in_steps:
            start = str(place / "burn-in")
        settings |= {**row.changes, "method": row.method, "steps": steps, "burn_in": start}
        return new_config(**settings), place / name.replace(" ", "_")


CURVE = (
    *("step", "seconds", "AP_student", "AP_teacher", "pseudo_precision", "pseudo_recall"),
    *("pseudo_per_image", "mined_per_image", "duplicates", "duplicates_nms"),
)


class Summary(NamedTuple):
    """One row of a table."""

    table: str
    preset: str  # and the data, if not digits
    detector: str
    percent: float
    row: str
    values: list[float]  # AP of each seed, in %
    mean: float
    error: float  # standard error of the mean, nan for one seed
    ap50: float
    minutes: float
    gap: float  # share of the gap closed, in %, nan where an end of it is missing


def summarise(lines: list[dict]) -> list[Summary]:
    """Mean, standard error over seeds and gap closed (design: supervised with equal time to supervised with all).

    Runs of several lengths are rows of their own. An end of the gap is the shortest supervised run of at least the
    time of the row, or else the longest there is.
    """
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        data = line.get("data", "digits")
        line = {**line, "preset": line["preset"] if data == "digits" else f"preset {line['preset']} on {data}"}
        key = tuple(line[name] for name in ("table", "preset", "detector", "percent", "row"))
        groups.setdefault((*key, line.get("steps", 0)), []).append(line)
    means, found = {key: statistics.mean(100 * line["AP"] for line in groups[key]) for key in groups}, []
    lengths: dict[tuple, list[int]] = {}
    for *key, steps in sorted(groups, key=lambda one: one[-1]):
        lengths.setdefault(tuple(key), []).append(steps)

    def end(time: float, *key) -> float:
        known = lengths.get(key, [])
        return means.get((*key, next((steps for steps in known if steps >= time), known[-1] if known else 0)), math.nan)

    for key in sorted(groups, key=_place):
        table, preset, detector, percent, row, steps = key
        members = groups[key]
        values = [100 * line["AP"] for line in members]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        time = steps if row == "supervised" else STEP_RATIO * steps
        low, high = (end(time, "main", preset, detector, share, "supervised") for share in (percent, 100))
        gap = 100 * (means[key] - low) / (high - low) if high != low else math.nan
        ap50 = statistics.mean(100 * line["AP50"] for line in members)
        minutes = statistics.mean(line["seconds"] for line in members) / 60
        name = row if steps == lengths[key[:-1]][0] else f"{row}, {steps:,} steps"
        found.append(Summary(table, preset, detector, percent, name, values, means[key], error, ap50, minutes, gap))
    return found


def _place(key: tuple) -> tuple:
    """By which groups are sorted: as in TABLES, by percent, shorter runs first."""
    table, *between, row, steps = key
    tables, rows = list(TABLES), list(TABLES.get(table, ()))
    return tables.index(table) if rows else len(tables), *between, rows.index(row) if row in rows else len(rows), steps


def markdown(rows: list[Summary]) -> Iterator[str]:
    """The lines of the tables, for a terminal or a README."""
    for title in dict.fromkeys((row.table, row.preset, row.detector, row.percent) for row in rows):
        table, preset, detector, percent = title
        yield f"\n{table}: {detector}, {percent:g} % of the labels ({preset})\n"
        yield "| row | seeds | AP | AP50 | gap closed | minutes |"
        yield "|---|---|---|---|---|---|"
        for row in rows:
            if title == (row.table, row.preset, row.detector, row.percent):
                error = "" if row.error != row.error else f" ± {row.error:.1f}"
                gap = "" if row.gap != row.gap else f"{row.gap:.0f} %"
                figures = f"{row.mean:.1f}{error} | {row.ap50:.1f} | {gap} | {row.minutes:.0f}"
                yield f"| {row.row} | {len(row.values)} | {figures} |"
