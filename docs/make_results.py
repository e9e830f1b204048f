"""The tables of README.md and docs/*.md, made from the recorded runs: `make results`.

    python docs/make_results.py

A page says by two lines where a table belongs, and what stands between them is rewritten:

    <!-- results: headline -->
    <!-- end results -->

TABLES names the tables. They are read from notebooks/recorded: ablation.jsonl (one line for each
run), ablation_curves.jsonl (what was measured during these runs), demo.jsonl (the same for the main
job), divisor.jsonl and divisor_curves.jsonl (two divisors of the class losses) and bccd.jsonl (runs
on photographs of blood cells). A figure that was not recorded is a dash.
Figures of the paper are cited, here only.
"""

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from semidetr_lite.errors import UserError
from semidetr_lite.training.ablate import Summary, summarise

ROOT = Path(__file__).resolve().parents[1]
RECORDED = "notebooks/recorded"
BOTH = ["ablation.jsonl", "ablation_curves.jsonl"]
DASH = "–"
STEPS, SUPERVISED_STEPS = 1500, 4750  # of a method after its burn-in; of the supervised runs beside
NAMES = {
    "supervised": "supervised",
    "mean-teacher": "mean teacher",
    "+SHM": "+ SHM",
    "+SHM+CQC": "+ SHM + CQC",
    "semi-detr": "**Semi-DETR**",
}
ABLATE = "semidetr ablate --steps 1500 --fold 1"
# AP on COCO val with 10 % of the labels, DINO (Deformable DETR below), as the papers give them
PAPER = {"supervised": 35.0, "mean-teacher": 41.6, "semi-detr": 43.5, "all labels": 48.6}
PAPER_SOFT_TEACHER = 33.8  # its repository
PAPER_DEFORMABLE = {"semi-detr": 38.1}


class Record(NamedTuple):
    """The recorded runs, a dict for each line."""

    runs: list[dict]  # ablation.jsonl: table, row, detector, preset, percent, seed, steps, AP ...
    curves: list[
        dict
    ]  # ablation_curves.jsonl: a run's identity, step, AP_teacher, pseudo_recall ...
    demo: list[dict]  # demo.jsonl: row, seed, steps, AP ...
    cells: Sequence[dict] = ()  # bccd.jsonl: row, fold, start, steps, AP, per_class, minutes ...
    divisors: Sequence[dict] = ()  # divisor.jsonl: as ablation.jsonl
    divisor_curves: Sequence[dict] = ()  # as ablation_curves.jsonl


class Table(NamedTuple):
    """A table before it is text: cells as they are printed, and the small print below."""

    header: list[str]
    rows: list[list[str]]
    sources: list[str]  # files of RECORDED
    command: str  # the command that recorded it
    note: str  # one or two sentences


# ---- from records to figures ---------------------------------------------------------------------


def read_record(folder: Path = ROOT / RECORDED) -> Record:
    """The files of a folder; a UserError names a file that cannot be read."""
    main = ("ablation.jsonl", "ablation_curves.jsonl", "demo.jsonl")
    further = ("bccd.jsonl", "divisor.jsonl", "divisor_curves.jsonl")
    return Record(*(list(_lines(folder / name)) for name in main + further))


def _lines(file: Path) -> Iterator[dict]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as problem:
        raise UserError(f"{file}: cannot be read ({problem.strerror})") from problem
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as problem:
            raise UserError(f"{file}, line {number}: not JSON ({problem.msg})") from problem


def find(
    runs: list[dict],
    row: str,
    percent: float,
    *,
    steps: int = STEPS,
    table: str = "main",
    detector: str = "dino",
    preset: str = "digits",
) -> Summary | None:
    """Mean, standard error and gap closed of one row; None if there is no such run."""
    kind = {"detector": detector, "preset": preset, "data": "digits"}
    wanted = {**kind, "table": table, "row": row, "percent": percent, "steps": steps}
    end = {**kind, "table": "main", "row": "supervised", "steps": SUPERVISED_STEPS}
    ends = [{**end, "percent": labels} for labels in {percent, 100}]
    lines = [line for line in runs if any(one.items() <= line.items() for one in (wanted, *ends))]
    for summary in summarise(lines):
        if (summary.table, summary.row, summary.percent) == (table, row, percent):
            return summary
    return None


def supervised(runs: list[dict], percent: float, detector: str = "dino") -> Summary | None:
    """The supervised run that took as long as a burn-in and a method together."""
    return find(runs, "supervised", percent, steps=SUPERVISED_STEPS, detector=detector)


def curve(
    curves: list[dict], row: str, percent: float, *, detector: str = "dino", seed: int = 0
) -> dict[int, dict]:
    """What one run of STEPS steps measured, {step: line}; empty if there is no such run."""
    run = {"row": row, "percent": percent, "detector": detector, "seed": seed}
    run |= {"steps": STEPS, "preset": "digits"}
    return {line["step"]: line for line in curves if run.items() <= line.items()}


# ---- from figures to words -----------------------------------------------------------------------


def ap(summary: Summary | None) -> str:
    """ "58.9 ± 0.2", without ± for one seed."""
    if summary is None:
        return DASH
    return f"{summary.mean:.1f}" + ("" if math.isnan(summary.error) else f" ± {summary.error:.1f}")


def ap50(summary: Summary | None) -> str:
    """ "81.3"."""
    return DASH if summary is None else f"{summary.ap50:.1f}"


def gap(summary: Summary | None) -> str:
    """ "47 %" of the way from supervised training to supervised training with all labels."""
    return DASH if summary is None or math.isnan(summary.gap) else f"{summary.gap:.0f} %"


def whole(summary: Summary | None) -> str:
    """The gap that supervised training with all labels closes: all of it, by definition."""
    return DASH if summary is None else "100 %"


def seeds(summary: Summary | None) -> str:
    """How many runs a mean is of."""
    return DASH if summary is None else str(len(summary.values))


def number(value: float | None, digits: int = 1) -> str:
    """A figure with a fixed number of digits."""
    return DASH if value is None else f"{value:.{digits}f}"


def percentage(value: float | None, digits: int = 0) -> str:
    """A fraction as a number of per cent, without the sign."""
    return DASH if value is None else f"{100 * value:.{digits}f}"


def spread(summaries: Iterable[Summary | None]) -> str:
    """What ± means in a table, with the number of seeds that there are."""
    counts = sorted({len(one.values) for one in summaries if one and len(one.values) > 1})
    if not counts:
        return "One seed each."
    many = " or ".join(map(str, counts))
    return f"Mean ± standard error of {many} seeds; a figure without ± is one seed."


# ---- the tables ----------------------------------------------------------------------------------


def headline(record: Record) -> Table:
    """The main result for the README: two shares of labels, beside the paper's."""
    main = (
        ("supervised", "supervised, same training time"),
        ("mean-teacher", "mean teacher"),
        ("+SHM", "mean teacher + SHM"),
        ("semi-detr", "**Semi-DETR** (SHM + CQC + CPM)"),
    )
    rows, used = [], []
    for row, name in main:
        steps = SUPERVISED_STEPS if row == "supervised" else STEPS
        few, more = (find(record.runs, row, percent, steps=steps) for percent in (5, 10))
        rows.append([name, ap(few), gap(few), ap(more), gap(more), number(PAPER.get(row))])
        used += [few, more]
    every = supervised(record.runs, 100)
    reference = number(PAPER["all labels"])
    cells = [ap(every), whole(every)]
    rows.append(["supervised, all labels", *cells, *cells, reference])
    cells = []
    for percent in (5, 10):
        soft = find(record.runs, "soft-teacher", percent, detector="faster-rcnn")
        alone = supervised(record.runs, percent, "faster-rcnn")
        cells += [f"{ap(soft)} (supervised: {ap(alone)})", DASH]
    rows.append(["Soft Teacher, on Faster R-CNN", *cells, number(PAPER_SOFT_TEACHER)])
    header = ["", "5 % of the labels: AP", "gap closed", "10 %: AP", "gap closed", "COCO, 10 %: AP"]
    note = (
        f"DINO, {STEPS:,} steps after a burn-in of 1,000, beside {SUPERVISED_STEPS:,} supervised "
        f"steps. AP in % on the 500 test scenes. {spread([*used, every])} Gap closed: 0 % is "
        "supervised training with these labels, 100 % with all labels. COCO: cited from the "
        "papers, 33.8 from Soft Teacher's repository."
    )
    return Table(
        header, rows, ["ablation.jsonl"], f"{ABLATE} --percents 5 10 100 --seeds 0 1 2", note
    )


def comparison(record: Record) -> Table:
    """Every row of DINO's main comparison, longer runs included."""
    main = [("supervised", SUPERVISED_STEPS)]
    main += [(row, STEPS) for row in ("mean-teacher", "+SHM", "+SHM+CQC", "semi-detr")]
    main += [("mean-teacher", 3000), ("semi-detr", 3000)]
    rows, used = [], []
    for row, steps in main:
        few, more = (find(record.runs, row, percent, steps=steps) for percent in (5, 10))
        used += [few, more]
        name = NAMES[row] if steps == STEPS else f"{NAMES[row].strip('*')}, {steps:,} steps"
        cited = PAPER.get(row) if steps in (STEPS, SUPERVISED_STEPS) else None
        cells = [cell(one) for one in (few, more) for cell in (seeds, ap, ap50, gap)]
        rows.append([name, *cells, number(cited)])
    every = supervised(record.runs, 100)
    cells = [seeds(every), ap(every), ap50(every), whole(every)]
    name = f"supervised, all labels, {SUPERVISED_STEPS:,} steps"
    rows.append([name, *cells, *cells, number(PAPER["all labels"])])
    columns = ["AP", "AP50", "gap closed"]
    header = ["", "5 %: seeds", *columns, "10 %: seeds", *columns, "COCO, 10 %: AP"]
    note = (
        f"DINO, {STEPS:,} steps after a burn-in of 1,000 unless a row says otherwise. AP in % on "
        f"the 500 test scenes, EMA weights, last step, no NMS. {spread([*used, every])} The rows "
        "of 3,000 steps took longer than the supervised runs that their gap is computed with, "
        "which flatters them. COCO: cited, 120,000 steps."
    )
    return Table(
        header, rows, ["ablation.jsonl"], f"{ABLATE} --percents 5 10 100 --seeds 0 1 2", note
    )


def pseudo_boxes(record: Record) -> Table:
    """Quality of the pseudo-boxes, and how many of the teacher's boxes are duplicates."""
    main = [(name.strip("*"), row, "dino") for row, name in NAMES.items() if row != "supervised"]
    main += [
        ("Soft Teacher", "soft-teacher", "faster-rcnn"),
        ("Dense Teacher", "dense-teacher", "fcos"),
    ]
    rows = []
    for percent in (5, 10):
        for name, row, detector in main:
            run = curve(record.curves, row, percent, detector=detector)
            cells = [f"{name}, {percent} %"]
            for step in (250, STEPS):
                line = run.get(step, {})
                right, found = (line.get(key) for key in ("pseudo_precision", "pseudo_recall"))
                cells.append(f"{percentage(right)} / {percentage(found)}")
            for step in (500, 750, STEPS):
                line = run.get(step, {})
                without, with_nms = (line.get(key) for key in ("duplicates", "duplicates_nms"))
                cells.append(f"{number(without, 2)} / {number(with_nms, 2)}")
            rows.append(cells)
    first = "precision / recall after 250 steps, %"
    duplicates = "duplicates per object, without / with NMS, after 500 steps"
    header = [
        "method, labels",
        first,
        f"after {STEPS:,}",
        duplicates,
        "after 750",
        f"after {STEPS:,}",
    ]
    note = (
        "Seed 0. On 100 unlabelled scenes: precision, the fraction of the pseudo-boxes (score "
        "0.4 or more, Soft Teacher 0.8) that are right; recall, the fraction of the objects that"
        " have one. On 150 tune scenes: duplicates, boxes (score 0.3 or more) beyond the first "
        "on the same object. The rows with SHM switch to one-to-one matching after step 600."
    )
    return Table(
        header, rows, ["ablation_curves.jsonl"], f"{ABLATE} --percents 5 10 --seeds 0", note
    )


def detectors(record: Record) -> Table:
    """Every method beside supervised training of its own detector."""
    main = (
        ("Faster R-CNN", "Soft Teacher", "faster-rcnn", "soft-teacher", STEPS),
        ("FCOS", "Dense Teacher", "fcos", "dense-teacher", STEPS),
        ("FCOS", "Dense Teacher, 3,200 steps", "fcos", "dense-teacher", 3200),
        ("DINO", "mean teacher", "dino", "mean-teacher", STEPS),
        ("DINO", "Semi-DETR", "dino", "semi-detr", STEPS),
    )
    rows, used = [], []
    for network, method, detector, row, steps in main:
        cells = [f"{network}, {method}"]
        for percent in (5, 10):
            alone = supervised(record.runs, percent, detector)
            with_unlabelled = find(record.runs, row, percent, steps=steps, detector=detector)
            above = None if None in (alone, with_unlabelled) else with_unlabelled.mean - alone.mean
            cells += [ap(alone), ap(with_unlabelled), ap50(with_unlabelled), number(above)]
            used += [alone, with_unlabelled]
        rows.append(cells)
    columns = ["AP", "AP50", "above supervised"]
    header = ["detector, method", "5 %: supervised AP", *columns, "10 %: supervised AP", *columns]
    note = (
        f"{STEPS:,} steps after a burn-in of 1,000, beside {SUPERVISED_STEPS:,} supervised steps "
        "of the same detector on the same labels. AP in % on the 500 test scenes. 3,200 steps of"
        f" Dense Teacher take as long as {STEPS:,} of Semi-DETR. {spread(used)}"
    )
    return Table(header, rows, ["ablation.jsonl"], f"{ABLATE} --percents 5 10 --seeds 0 1 2", note)


# Runs with 10 % of the labels and seed 0 start from one of two supervised runs, A and B: the same
# training on two machines, which does not end alike. The record has no column for it.
MATCHING = (
    ("one-to-many all along", "A", "matching", "one-to-many"),
    ("switch after 20 %", "A", "switch", "switch at 20 %"),
    ("**switch after 40 % (Semi-DETR)**", "A", "main", "semi-detr"),
    ("**switch after 40 % (Semi-DETR)**", "B", "threshold", "semi-detr, burn-in made anew"),
    ("switch after 60 %", "B", "switch", "switch at 60 %"),
    ("switch after 80 %", "B", "switch", "switch at 80 %"),
    ("one-to-one all along", "B", "matching", "one-to-one"),
)
MINING = (
    ("nothing mined, confident boxes queried (+ SHM + CQC)", "A", "main", "+SHM+CQC"),
    ("**mixture over costs, both queried (Semi-DETR)**", "A", "main", "semi-detr"),
    (
        "**mixture over costs, both queried (Semi-DETR)**",
        "B",
        "threshold",
        "semi-detr, burn-in made anew",
    ),
    ("mean + standard deviation of the scores, both queried", "B", "threshold", "mean+std"),
    ("the 4 best boxes of an image (top-k), both queried", "B", "threshold", "top-k"),
    ("mixture over costs, only mined boxes queried", "B", "boxes", "mined"),
    ("mixture over costs, mined boxes are targets as well", "B", "boxes", "mined as targets"),
)
TWO_STARTS = (
    "Seed 0, 10 % of the labels. A and B are two supervised runs to start from, the same "
    "training on two machines: compare rows of one start only."
)


def of_seed(runs: list[dict], seed: int = 0) -> list[dict]:
    """The runs of one seed."""
    return [line for line in runs if line["seed"] == seed]


def matching(record: Record) -> Table:
    """AP over training for one-to-one, one-to-many and every switch between them."""
    steps = range(250, STEPS + 1, 250)
    rows = []
    for name, start, table, row in MATCHING:
        run = curve(record.curves, row, 10)
        values = [run.get(step, {}).get("AP_teacher") for step in steps]
        last = find(of_seed(record.runs), row, 10, table=table)
        rows.append(
            [name, start, *(percentage(value, 1) for value in values), ap(last), ap50(last)]
        )
    header = [
        "matching",
        "start",
        "after 250 steps",
        *(f"{step:,}" for step in steps[1:]),
        "test AP",
        "test AP50",
    ]
    note = (
        f"{TWO_STARTS} After 250 to {STEPS:,} steps: AP of the teacher in % on 150 tune scenes; "
        "one-to-many matching is measured with NMS at IoU 0.6."
    )
    tables = "--tables main matching switch threshold"
    return Table(header, rows, BOTH, f"{ABLATE} --percents 10 --seeds 0 {tables}", note)


def mining(record: Record) -> Table:
    """What is mined, and what the mined boxes are used for."""
    rows = []
    for name, start, table, row in MINING:
        found = find(of_seed(record.runs), row, 10, table=table)
        rows.append([name, start, ap(found), ap50(found)])
    note = f"{TWO_STARTS} Queried: the consistency loss compares both decoders on these boxes."
    command = f"{ABLATE} --percents 10 --seeds 0 --tables main threshold boxes"
    return Table(["", "start", "test AP", "test AP50"], rows, ["ablation.jsonl"], command, note)


def deformable(record: Record) -> Table:
    """The same method on Deformable DETR."""
    kind, rows = "deformable-detr", []
    for row in ("supervised", "mean-teacher", "+SHM", "semi-detr"):
        steps = SUPERVISED_STEPS if row == "supervised" else STEPS
        one = find(record.runs, row, 10, steps=steps, detector=kind)
        run = curve(record.curves, row, 10, detector=kind)
        recalls = [run.get(step, {}).get("pseudo_recall") for step in (250, 500, STEPS)]
        shares = [percentage(recall) for recall in recalls]
        rows.append([NAMES[row], ap(one), ap50(one), *shares, number(PAPER_DEFORMABLE.get(row))])
    recall = "objects with a pseudo-box after 250 steps, %"
    header = ["", "AP", "AP50", recall, "after 500", f"after {STEPS:,}", "COCO, 10 %: AP"]
    note = (
        f"Two-stage Deformable DETR, 10 % of the labels, {STEPS:,} steps after a burn-in of "
        f"1,000, beside {SUPERVISED_STEPS:,} supervised steps. Seed 0. COCO: cited."
    )
    command = f"{ABLATE} --percents 10 --seeds 0 --detector deformable-detr"
    return Table(header, rows, BOTH, command, note)


def full(record: Record) -> Table:
    """All labels, and as many images again without any: the shape of COCO-Full."""
    runs, rows = of_seed(record.runs), []
    alone = supervised(runs, 100)
    rows.append(["supervised on the labelled scenes", ap(alone), ap50(alone)])
    for row in ("mean-teacher", "semi-detr"):
        one = find(runs, row, 100, preset="digits-full")
        rows.append([NAMES[row], ap(one), ap50(one)])
    note = (
        f"2,000 labelled and 2,000 unlabelled scenes, DINO, {STEPS:,} steps after a burn-in of "
        f"1,000, beside {SUPERVISED_STEPS:,} supervised steps. Seed 0."
    )
    command = f"{ABLATE} --percents 100 --seeds 0 --preset digits-full"
    return Table(["", "AP", "AP50"], rows, ["ablation.jsonl"], command, note)


def demo(record: Record) -> Table:
    """The runs of the main job, one column for each seed."""
    arms = (
        ("supervised", "supervised, 10 % of the labels"),
        ("control", "supervised, continued"),
        ("mean-teacher", "mean teacher, from the supervised run"),
        ("semi-detr", "**Semi-DETR**, from the supervised run"),
        ("all-labels", "supervised, all labels"),
    )
    numbers = sorted({line["seed"] for line in record.demo})
    rows = []
    for row, name in arms:
        lines = {line["seed"]: line for line in record.demo if line["row"] == row}
        lengths = sorted({line["steps"] for line in lines.values()})
        steps = " or ".join(f"{length:,}" for length in lengths)
        values = [100 * line["AP"] for line in lines.values()]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        each = [number(100 * lines[seed]["AP"] if seed in lines else None) for seed in numbers]
        mean = number(statistics.mean(values) if values else None)
        rows.append([name, steps or DASH, *each, mean, number(error)])
    header = ["", "steps", *(f"AP, seed {seed}" for seed in numbers), "mean", "standard error"]
    command = "python benchmarks/record_demo.py --seeds 0 1 2"
    note = "AP in % on the 500 test scenes, EMA weights, last step, no NMS."
    return Table(header, rows, ["demo.jsonl"], command, note)


DIVISORS = {  # rows of divisor.jsonl
    "mean-teacher, by pseudo-boxes": "mean teacher, divided by pseudo-boxes",
    "mean-teacher, by expected objects": "mean teacher, divided by expected objects",
    "semi-detr, by expected objects": "**Semi-DETR**, divided by expected objects",
}


def divisor(record: Record) -> Table:
    """Two divisors of the class losses on unlabelled images, a column for each draw of labels."""
    draws = sorted({(line["percent"], line["fold"]) for line in record.divisors})
    rows = []
    for row, name in DIVISORS.items():
        cells = [name]
        for percent, fold in draws:
            run = {"row": row, "percent": percent, "fold": fold}
            lines = [line for line in record.divisors if run.items() <= line.items()]
            cells.append(percentage(lines[0]["AP"] if lines else None, 1))
        for percent in sorted({percent for percent, _ in draws}):
            run = {"row": row, "percent": percent}
            last = [
                line["pseudo_recall"]
                for line in record.divisor_curves
                if run.items() <= line.items() and line["step"] == line["steps"]
            ]
            cells.append(percentage(statistics.mean(last) if last else None))
        rows.append(cells if draws else [name, DASH])
    recalls = [
        f"objects with a correct pseudo-box at the end, {percent:g} % of the labels, %"
        for percent in sorted({percent for percent, _ in draws})
    ]
    names = [f"{percent:g} % of the labels, fold {fold}: AP" for percent, fold in draws]
    steps = " or ".join(
        f"{count:,}" for count in sorted({line["steps"] for line in record.divisors})
    )
    note = (
        f"DINO, {steps} steps after a burn-in of 1,000 that the rows of a column share; one run "
        "each. AP in % on the 500 test scenes, EMA weights, last step. CQC's projector has batch "
        "norm and a twentieth of the learning rate, CPM's bar is over all query-class pairs."
    )
    command = (
        "semidetr ablate --tables divisor --percents 5 10 --seeds 0 1 --steps 750 "
        "--projector-norm batch --projector-lr-factor 0.05 --candidate-scores pairs"
    )
    files = ["divisor.jsonl", "divisor_curves.jsonl"]
    header = ["", *names, *recalls] if draws else ["", "AP"]
    return Table(header, rows, files, command, note)


CELLS = {  # rows of bccd.jsonl
    "supervised": "supervised, the start of the others",
    "supervised, same time": "supervised, continued from it for about as long as Semi-DETR",
    "mean-teacher": "mean teacher, from the supervised run",
    "semi-detr": "**Semi-DETR**, from the supervised run",
    "all labels": "supervised, all labels",
}


def cells(record: Record) -> Table:
    """Photographs of blood cells, 20 of them labelled: mean over folds."""
    classes = sorted({name for line in record.cells for name in line["per_class"]})
    rows = []
    for row, name in CELLS.items():
        lines = [line for line in record.cells if line["row"] == row]
        folds = str(len(lines)) if lines else DASH
        steps = " or ".join(f"{count:,}" for count in sorted({line["steps"] for line in lines}))
        keys = ("AP", "AP50", "AP_nms", "AP50_nms")
        figures = [[line[key] for key in keys] for line in lines]
        of_classes = [[line["per_class"].get(one, 0.0) for one in classes] for line in lines]
        means = [percentage(statistics.mean(values), 1) for values in zip(*figures)]
        class_means = [percentage(statistics.mean(values), 1) for values in zip(*of_classes)]
        minutes = number(statistics.mean(line["minutes"] for line in lines), 0) if lines else DASH
        found = means + class_means if lines else [DASH] * (4 + len(classes))
        rows.append([name, folds, steps or DASH, *found, minutes])
    with_nms = ["AP with NMS", "AP50 with NMS"]
    of_class = [f"AP of {one}" for one in classes]
    header = ["", "folds", "steps", "AP", "AP50", *with_nms, *of_class, "minutes"]
    note = (
        "AP in % on the 72 test photographs, EMA weights, last step; Semi-DETR always with NMS. "
        "Steps and minutes are those of the run alone, without its start. The machine was busy: "
        "compare minutes only with each other."
    )
    command = "python benchmarks/record_bccd.py runs --test data/bccd-test"
    return Table(header, rows, ["bccd.jsonl"], command, note)


TABLES = {
    table.__name__: table
    for table in (
        headline,
        comparison,
        pseudo_boxes,
        detectors,
        matching,
        mining,
        deformable,
        full,
        demo,
        divisor,
        cells,
    )
}


# ---- into the pages ------------------------------------------------------------------------------


def markdown(table: Table, page: Path) -> str:
    """The table and its small print as they stand on `page`; links start at its folder."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    folder = os.path.relpath(ROOT / RECORDED, page.parent).replace(os.sep, "/")
    files = " and ".join(f"[`{name}`]({folder}/{name})" for name in table.sources)
    source = f"Source: {files}, recorded by `{table.command}`; written by `make results`."
    return f"\n{text}\n\n<sub>{table.note} {source}</sub>\n"


START, END = re.compile(r"<!-- results: (.*) -->"), "<!-- end results -->"


def rewritten(text: str, page: Path, record: Record) -> str:
    """The text of a page with its tables made anew; a UserError for a wrong marker."""
    lines: list[str] = []
    opened, fenced = None, False  # (name, line number) of the marker that waits for its end
    for line_number, line in enumerate(text.split("\n"), 1):
        fenced ^= line.startswith("```")
        start = None if fenced else START.fullmatch(line.strip())
        where = f"{page}, line {line_number}"
        if start:
            if opened:
                raise UserError(
                    f"{where}: {line.strip()} before the end of the table of line {opened[1]}"
                )
            if start[1] not in TABLES:
                known = ", ".join(TABLES)
                raise UserError(f"{where}: no table called {start[1]!r}: choose from {known}")
            opened = (start[1], line_number)
            lines += [line, *markdown(TABLES[start[1]](record), page).split("\n")]
        elif line.strip() == END and not fenced:
            if not opened:
                raise UserError(f"{where}: {END} without a <!-- results: NAME --> before it")
            opened = None
            lines.append(line)
        elif not opened:
            lines.append(line)
    if opened:
        raise UserError(f"{page}, line {opened[1]}: results {opened[0]!r} has no {END} after it")
    return "\n".join(lines)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold tables: the README and what lies in docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> int:
    """Rewrite the tables of all pages and say which pages changed."""
    record = read_record()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = rewritten(text, page, record)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables written")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        sys.exit(f"error: {problem}")
