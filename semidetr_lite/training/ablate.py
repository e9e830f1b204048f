"""The comparison: rows x label percents x seeds, one run after another, a line of JSON for each.

Each seed has a draw of labelled images of its own, the fold seed + 1, so that a standard error over
the seeds holds for other labelled images too. A semi-supervised row starts from a supervised run of
`burn_in_steps` on the same labels, shared by all rows of a seed. Rows are compared in pairs of the
same seed and fold. The row "supervised" takes as long as burn-in and method together; with all
labels it is the upper end of the gap. A killed ablation goes on where it was. What has its line
already is not run again, on whatever machine it ran.

The tables main to switch follow the paper's ablation (section 4.3). Added are the row "mined as
targets", where mined boxes are targets too, and four tables about choices that the paper leaves
open or that a small data set makes for itself: what class losses on unlabelled images are divided
by, mixed views, the norm of CQC's projector, and the scores that CPM's bar is made from.
"""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from semidetr_lite.errors import UserError
from semidetr_lite.files import append_jsonl, read_jsonl
from semidetr_lite.training.checkpoint import read_config
from semidetr_lite.training.loop import train_or_resume
from semidetr_lite.training.settings import (
    PRESETS,
    RUN_IDENTITY,
    Config,
    Settings,
    as_config,
    change,
    check,
    differences,
    identity,
    preset_settings,
)

STEP_RATIO = (
    2.5  # supervised steps that take as long as one of Semi-DETR (benchmarks/README.md, step cost)
)


class Row(NamedTuple):
    """What is run.

    A method, fields of the recipe that differ, and the detector where the method asks for its
    own.
    """

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
    **{
        f"switch at {share} %": Row("semi-detr", {"one_to_many_share": share / 100})
        for share in (20, 60, 80)
    },
    **{
        f"{method}, by {text}": Row(method, {"pseudo_normalizer": divisor})
        for method in ("mean-teacher", "semi-detr")
        for divisor, text in (
            ("pseudo_boxes", "pseudo-boxes"),
            ("expected_objects", "expected objects"),
        )
    },
    **{
        f"{method} + mixing": Row(method, {"mixing": "both"})
        for method in ("mean-teacher", "semi-detr")
    },
    "group norm": Row("semi-detr", {"projector_norm": "group"}),
    "batch norm": Row("semi-detr", {"projector_norm": "batch"}),
    "best boxes": Row("semi-detr", {"candidate_scores": "boxes"}),
    "all pairs": Row("semi-detr", {"candidate_scores": "pairs"}),
}
# table: {its row: the entry of ROWS, where it has another name there}
TABLES = {
    "main": {name: name for name in list(ROWS)[:7]},
    "matching": {
        "one-to-one": "one-to-one",
        "one-to-many": "one-to-many",
        "stage-wise": "semi-detr",
    },
    "threshold": {
        "fixed": "+SHM+CQC",
        "mean+std": "mean+std",
        "top-k": "top-k",
        "mixture": "semi-detr",
    },
    "boxes": {
        "confident": "+SHM+CQC",
        "mined": "mined",
        "union": "semi-detr",
        "mined as targets": "mined as targets",
    },
    "switch": {
        "as in the preset": "semi-detr",
        **{name: name for name in ROWS if name.startswith("switch at")},
    },
    "divisor": {name: name for name in ROWS if ", by " in name},
    "mixing": {
        "mean-teacher": "mean-teacher",
        "mean-teacher + mixing": "mean-teacher + mixing",
        "semi-detr": "semi-detr",
        "semi-detr + mixing": "semi-detr + mixing",
    },
    "projector": {"group norm": "group norm", "batch norm": "batch norm"},
    "candidates": {"best boxes": "best boxes", "all pairs": "all pairs"},
}


# The row of each table that the others are compared with, in pairs of the same seed and fold.
BASELINES = {
    "main": "mean-teacher",
    "matching": "stage-wise",
    "threshold": "fixed",
    "boxes": "confident",
    "switch": "as in the preset",
    "divisor": "mean-teacher, by pseudo-boxes",
    "mixing": "mean-teacher",
    "projector": "group norm",
    "candidates": "best boxes",
}


class Job(NamedTuple):
    """One run of the comparison."""

    table: str
    row: str
    name: str  # the row's entry in ROWS
    percent: float
    seed: int
    fold: int


class Ablation:
    """Runs and their lines.

    Args:
        out: folder of the runs: DETECTOR/PERCENTpct/foldFOLD_seedSEED/ROW below it.
        record: the JSON-lines file that finished runs are appended to.
        settings: of all runs, but for what a row changes; the preset digits' if None. `steps` are
            those of a semi-supervised run, `burn_in_steps` those of the supervised run before it.
        quiet: no progress bars.

    Raises UserError for settings that cannot be.
    """

    def __init__(
        self,
        out: str | Path,
        record: str | Path,
        settings: Settings | None = None,
        quiet: bool = False,
    ):
        self.out, self.record, self.quiet = Path(out), Path(record), quiet
        self.settings = check(settings or PRESETS["digits"])
        if self.settings.steps == 0:
            raise UserError("ablate: the preset photos leaves the steps open; give --steps")
        self.changes = changed_settings(self.settings)

    def run(
        self,
        tables: list[str],
        rows: list[str],
        percents: list[float],
        seeds: list[int],
        fold: int | None = None,
    ) -> None:
        """Run what has no line yet.

        Args:
            tables: names of TABLES.
            rows: some of the tables' rows; all if it is empty.
            percents: of the images whose labels are used.
            seeds: of weights, views and noise.
            fold: the draw of labelled images of all seeds; seed + 1 if not given.

        Raises UserError for a row that there is not, and where nothing is left to run.
        """
        for table in tables:
            if table not in TABLES:
                raise UserError(f"no table called {table!r}: choose from {', '.join(TABLES)}")
        wanted = [(table, row, name) for table in tables for row, name in TABLES[table].items()]
        unknown = set(rows) - {row for _, row, _ in wanted}
        if unknown:
            known = ", ".join(dict.fromkeys(row for _, row, _ in wanted))
            fault = f"no row called {sorted(unknown)[0]!r} in {', '.join(tables)}"
            raise UserError(f"{fault}: choose from {known}")
        jobs = []
        for percent in percents:
            # with all labels nothing is left to be labelled by a teacher
            all_labelled = percent == 100 and not self.settings.data_files.extra_unlabelled
            for seed in seeds:
                for table, row, name in wanted:
                    if (rows and row not in rows) or (all_labelled and name != "supervised"):
                        continue
                    # with all labels, all draws are the same
                    draw = 1 if percent == 100 else fold or seed + 1
                    jobs.append(Job(table, row, name, percent, seed, draw))
                    self.config(jobs[-1])  # says what cannot be run before the first run
        if not jobs:
            advice = "give tables, rows, percents and seeds; with all labels, supervised alone"
            raise UserError(f"nothing to run: {advice}")
        for job in jobs:
            self.run_row(job)

    def run_row(self, job: Job) -> dict:
        """The line of one row, from the record or from a run made now."""
        config, folder = self.config(job)
        run = identity(config)
        labels = {"table": job.table, "row": job.row, **run}
        if self.changes:
            labels["changes"] = self.changes
        recorded = [
            line
            for line in read_jsonl(self.record)
            if run.items() <= line.items() and line.get("changes", {}) == self.changes
        ]
        for line in recorded:
            if (line["table"], line["row"]) == (job.table, job.row):
                return line
        for line in recorded:
            # the same run, in another table
            if TABLES.get(line["table"], {}).get(line["row"]) == job.name:
                append_jsonl(self.record, [line | labels])
                return line | labels
        if not (folder / "config.json").exists() and config.burn_in:
            train_or_resume(*self.config(job, burn_in=True), quiet=self.quiet)
        train_or_resume(config, folder, quiet=self.quiet)
        last, stored = read_jsonl(folder / "log.jsonl")[-1], read_config(folder)
        teacher, student = last["test"]["teacher"], last["test"]["student"]
        figures = {"AP": teacher["AP"], "AP50": teacher["AP50"], "AP_student": student["AP"]}
        line = {**labels, **{key: round(value, 4) for key, value in figures.items()}}
        line["seconds"] = last["seconds"]
        line |= {key: stored[key] for key in ("commit", "machine")}
        append_jsonl(self.record, [line])
        self.append_curve(folder, {"row": job.name, **run})
        return line

    def append_curve(self, folder: Path, run: dict) -> None:
        """Append what a run measured in training to RECORD_curves.jsonl, unless it is there."""
        file = self.record.with_name(f"{self.record.stem}_curves.jsonl")
        if self.changes:
            run = run | {"changes": self.changes}
        recorded = [line for line in read_jsonl(file) if run.items() <= line.items()]
        if not any(line.get("changes", {}) == self.changes for line in recorded):
            log = read_jsonl(folder / "log.jsonl")
            lines = [
                {key: line[key] for key in CURVE if key in line}
                for line in log
                if "AP_teacher" in line
            ]
            append_jsonl(file, [run | line for line in lines])

    def config(self, job: Job, burn_in: bool = False) -> tuple[Config, Path]:
        """Settings and folder of a row's run, or of the supervised run it starts from."""
        row, settings = ROWS[job.name], self.settings
        burn_in_steps = settings.schedule.burn_in_steps
        detector = row.detector or settings.detector
        if detector != settings.detector:
            own = preset_settings(settings.preset, row.method, detector)
            settings = change(settings, detector=detector, detector_kwargs=own.detector_kwargs)
        drawn = {"percent": float(job.percent), "fold": job.fold, "seed": job.seed}
        settings = change(settings, **drawn, burn_in=None)
        folder = self.out / detector / f"{job.percent:g}pct" / f"fold{job.fold}_seed{job.seed}"
        if burn_in:
            config = as_config(change(settings, method="supervised", steps=burn_in_steps))
            return config, folder / "burn-in"
        settings = change(settings, method=row.method, **row.changes)
        if job.name == "supervised":
            steps = burn_in_steps + round(STEP_RATIO * settings.steps)
            settings = change(settings, steps=steps)
        elif burn_in_steps:
            settings = change(settings, burn_in=str(folder / "burn-in"))
        return as_config(settings), folder / job.name.replace(" ", "_")


def changed_settings(settings: Settings) -> dict[str, object]:
    """What differs from the preset, for all rows alike: {option: value}.

    Without what tells runs from one another, how long they are, and the machine.
    """
    preset = preset_settings(settings.preset, settings.method, settings.detector)
    apart = {*RUN_IDENTITY, "burn_in", "runtime", "measuring"}
    return {
        path[-1]: value
        for path, (value, _) in differences(settings, preset).items()
        if path[0] not in apart and path[-1] != "burn_in_steps"
    }


CURVE = (
    *("step", "seconds", "AP_student", "AP_teacher", "pseudo_precision", "pseudo_recall"),
    *("pseudo_per_image", "mined_per_image", "duplicates", "duplicates_nms"),
    *("mined_boxes", "mined_precision", "mined_recall"),
    *("mined_precision_any_class", "mined_recall_any_class"),
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
    # AP above the table's baseline: mean and standard error over pairs of the same seed and fold,
    # nan where there are none or one
    difference: float = math.nan
    difference_error: float = math.nan
    pairs: int = 0


def summarise(lines: list[dict]) -> list[Summary]:
    """Mean, standard error over seeds, gap closed and paired difference of each row.

    The gap is from supervised training of the same time to that with all labels. Runs of several
    lengths are rows of their own. An end of the gap is the shortest supervised run of at least the
    time of the row, or else the longest there is.
    """
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        data = line.get("data", "digits")
        preset = line["preset"] if data == "digits" else f"preset {line['preset']} on {data}"
        changes = [f"{name} {value}" for name, value in line.get("changes", {}).items()]
        line = {**line, "preset": ", ".join([preset, *changes])}
        key = tuple(line[name] for name in ("table", "preset", "detector", "percent", "row"))
        groups.setdefault((*key, line.get("steps", 0)), []).append(line)
    means = {key: statistics.mean(100 * line["AP"] for line in groups[key]) for key in groups}
    lengths: dict[tuple, list[int]] = {}
    for *row_key, steps in sorted(groups, key=lambda key: key[-1]):
        lengths.setdefault(tuple(row_key), []).append(steps)

    def reference_ap(time: float, *key) -> float:
        known = lengths.get(key, [])
        return means.get(
            (*key, next((steps for steps in known if steps >= time), known[-1] if known else 0)),
            math.nan,
        )

    summaries = []
    for key in sorted(groups, key=_sort_key):
        table, preset, detector, percent, row, steps = key
        members = groups[key]
        values = [100 * line["AP"] for line in members]
        error = standard_error(values)
        time = steps if row == "supervised" else STEP_RATIO * steps
        low, high = (
            reference_ap(time, "main", preset, detector, share, "supervised")
            for share in (percent, 100)
        )
        gap = 100 * (means[key] - low) / (high - low) if high != low else math.nan
        ap50 = statistics.mean(100 * line["AP50"] for line in members)
        minutes = statistics.mean(line["seconds"] for line in members) / 60
        name = row if steps == lengths[key[:-1]][0] else f"{row}, {steps:,} steps"
        baseline = groups.get((*key[:4], BASELINES.get(table), steps), [])
        differences = [] if row == BASELINES.get(table) else paired_differences(members, baseline)
        summaries.append(
            Summary(
                table,
                preset,
                detector,
                percent,
                name,
                values,
                means[key],
                error,
                ap50,
                minutes,
                gap,
                statistics.mean(differences) if differences else math.nan,
                standard_error(differences),
                len(differences),
            )
        )
    return summaries


def paired_differences(lines: list[dict], baseline: list[dict]) -> list[float]:
    """AP above that of the baseline's line of the same seed and fold, in %, where there is one."""
    base = {(line.get("seed"), line.get("fold")): line["AP"] for line in baseline}
    pairs = [(line["AP"], base.get((line.get("seed"), line.get("fold")))) for line in lines]
    return [100 * (ap - other) for ap, other in pairs if other is not None]


def standard_error(values: list[float]) -> float:
    """Of the mean of some values; nan for less than two."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def _sort_key(key: tuple) -> tuple:
    """By which groups are sorted: as in TABLES, by percent, shorter runs first."""
    table, *between, row, steps = key
    tables, rows = list(TABLES), list(TABLES.get(table, ()))
    return (
        tables.index(table) if rows else len(tables),
        *between,
        rows.index(row) if row in rows else len(rows),
        steps,
    )


def markdown(rows: list[Summary]) -> Iterator[str]:
    """The lines of the tables, for a terminal or a README."""
    for title in dict.fromkeys((row.table, row.preset, row.detector, row.percent) for row in rows):
        table, preset, detector, percent = title
        yield f"\n{table}: {detector}, {percent:g} % of the labels ({preset})\n"
        baseline = BASELINES.get(table, "")
        yield f"| row | seeds | AP | AP50 | gap closed | above {baseline} (pairs) | minutes |"
        yield "|---|---|---|---|---|---|---|"
        for row in rows:
            if title == (row.table, row.preset, row.detector, row.percent):
                gap = "" if math.isnan(row.gap) else f"{row.gap:.0f} %"
                above = with_error(row.difference, row.difference_error, "+.1f")
                above = f"{above} ({row.pairs})" if row.pairs else ""
                ap = with_error(row.mean, row.error, ".1f")
                figures = f"{ap} | {row.ap50:.1f} | {gap} | {above} | {row.minutes:.0f}"
                yield f"| {row.row} | {len(row.values)} | {figures} |"


def with_error(value: float, error: float, form: str) -> str:
    """A mean and its standard error as text; without the part that is not known."""
    text = "" if math.isnan(value) else format(value, form)
    return text if math.isnan(error) else f"{text} ± {error:.1f}"
