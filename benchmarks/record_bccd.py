"""Record runs on real photographs (blood cells, BCCD): what docs/your_images.md quotes.

    python benchmarks/record_bccd.py runs/bccd --test data/bccd-test

The commands that train these runs are in docs/your_images.md. A run folder is called ROW-FOLD, as
in `semi-detr-1`. For each finished run the teacher's weights of the last step are measured on all
test photographs: one line of notebooks/recorded/bccd.jsonl. What the run measured on the way goes
to bccd_curves.jsonl. Lines of runs that are not in the folder stay.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from semidetr_lite import load_detector
from semidetr_lite.files import read_jsonl
from semidetr_lite.training.measure import measure_classes, open_other

RECORDED = Path(__file__).parents[1] / "notebooks" / "recorded"
ROWS = {  # names of folders: rows of the table
    "supervised": "supervised",
    "same-time": "supervised, same time",
    "mean-teacher": "mean-teacher",
    "semi-detr": "semi-detr",
    "all-labels": "all labels",
}
NMS = 0.6  # IoU, as weights of one-to-many matching have it
CURVES = ("AP_teacher", "AP_student", "pseudo_per_image", "pseudo_precision", "pseudo_recall")


def main() -> None:
    """Measure the finished runs of a folder and write their lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="a folder of run folders")
    parser.add_argument("--test", required=True, help="a VOC folder of the test photographs")
    options = parser.parse_args()
    for run in finished_runs(options.runs):
        add("bccd.jsonl", [line_of(run, options.test)])
        add("bccd_curves.jsonl", curve_of(run))


def finished_runs(runs: Path) -> Iterator[Path]:
    """The run folders that are named as above and have reached their last step."""
    for log in sorted(runs.glob("*/log.jsonl")):
        if row_and_fold(log.parent) and "test" in read_jsonl(log)[-1]:
            yield log.parent


def row_and_fold(run: Path) -> tuple[str, int] | None:
    """Row and fold by the folder's name; None for another folder."""
    name, _, fold = run.name.rpartition("-")
    return (ROWS[name], int(fold)) if name in ROWS and fold.isdigit() else None


def identity(run: Path) -> dict:
    """What tells a run from the others: {"row", "fold", "start"}."""
    row, fold = row_and_fold(run) or ("", 0)
    config = json.loads((run / "config.json").read_text())
    start = "imagenet" if config["detector_kwargs"]["backbone_weights"] else "scratch"
    return {"row": row, "fold": fold, "start": start}


def line_of(run: Path, test: str) -> dict:
    """The line of bccd.jsonl: AP, AP50 and the AP of each class are fractions, on `test`."""
    config = json.loads((run / "config.json").read_text())
    last = read_jsonl(run / "log.jsonl")[-1]
    dataset = open_other(test, None, config["categories"])
    detector = load_detector(run, "teacher")
    figures, classes = measure_classes(detector, dataset, config["categories"])
    detector.nms = NMS
    with_nms = measure_classes(detector, dataset, config["categories"])[0]
    return {
        **identity(run),
        "steps": config["steps"],
        "AP": round(figures["AP"], 4),
        "AP50": round(figures["AP50"], 4),
        "per_class": {name: round(found["AP"], 4) for name, found in classes.items()},
        "AP_nms": round(with_nms["AP"], 4),
        "AP50_nms": round(with_nms["AP50"], 4),
        "AP_validation": round(last["test"]["teacher"]["AP"], 4),
        "minutes": round(last["seconds"] / 60, 1),
        **{key: config[key] for key in ("commit", "machine", "command")},
    }


def curve_of(run: Path) -> list[dict]:
    """The lines of bccd_curves.jsonl: pseudo-boxes, and what was measured on the way."""
    lines = []
    for line in read_jsonl(run / "log.jsonl"):
        figures = {key: line[key] for key in CURVES if key in line}
        if figures:
            lines.append({**identity(run), "step": line["step"], **figures})
    return lines


def add(name: str, lines: list[dict]) -> None:
    """Put the lines of a run in place of those that the file has of it, and print them."""
    file = RECORDED / name
    keys = ("row", "fold", "start")
    new = {tuple(line[key] for key in keys) for line in lines}
    kept = [line for line in read_jsonl(file) if tuple(line[key] for key in keys) not in new]
    order = list(ROWS.values())
    every = sorted(kept + lines, key=lambda line: (line["fold"], order.index(line["row"])))
    file.write_text("".join(json.dumps(line) + "\n" for line in every))
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
