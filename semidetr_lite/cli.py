"""The commands: demo, gallery, train, evaluate, predict, export, compare, ablate, doctor.

Each is a plain function. What takes long to import (torch, scikit-learn, matplotlib) is imported
where it is used, so that help and messages about wrong options come at once.
"""

import dataclasses
import functools
import inspect
import io
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from semidetr_lite.errors import Stopped, UserError, as_user_error
from semidetr_lite.fields import strict_group
from semidetr_lite.training.settings import (
    PRESETS,
    DetectorName,
    Role,
    Settings,
    as_config,
    change,
    check,
    differences,
    fields_with,
    option_name,
    preset_settings,
)

Folder = Annotated[Path, tyro.conf.Positional]
Folders = Annotated[tuple[Path, ...], tyro.conf.Positional]
Weights = Literal["best", "student", "teacher"]
PredictionFormat = Literal["coco", "voc", "yolo", "csv"]
NoOption = tyro.conf.Suppress[tyro.conf.Fixed[Any]]

RESUME_HINT = "the same command with --resume (demo, ablate: without) goes on"


def demo(
    out: Path = Path("runs/demo"),
    detector: Literal["dino", "deformable-detr"] = "dino",
    seed: int = 0,
    control: bool = True,
    mean_teacher: bool = False,
    quick: bool = False,
) -> None:
    """Semi-DETR against supervised training of the same time, with 10 % of the labels.

    Nothing is downloaded: the data are handwritten digits in photographs. A detector is trained on
    the 200 labelled scenes; from there Semi-DETR goes on with 1,800 unlabelled scenes as well, and
    beside it supervised training for the same time. Prints the AP of each on the test scenes and
    writes a page with pictures. Called again, it goes on where it was stopped.

    Args:
        out: folder of the runs and the page.
        detector: what to train.
        seed: of weights, views and noise.
        control: also train supervised for the time of Semi-DETR, the fair comparison;
            --no-control leaves it out.
        mean_teacher: also train the plain mean teacher.
        quick: a few steps of everything, to see that it works (accuracy means nothing).
    """
    from semidetr_lite.report import headline, write_report
    from semidetr_lite.training import demo as demo_runs

    names = ["control"] * control + ["semi-detr"] + ["mean-teacher"] * mean_teacher
    changes: dict[str, Any] = {"detector": detector}
    if quick:
        changes |= {"steps": 4, **demo_runs.QUICK_INTERVALS}
    start = time.perf_counter()
    print(_plan(names, quick))
    burn_in = demo_runs.train_demo_run("supervised", out, seed, **changes)
    runs = demo_runs.train_side_by_side(names, out, seed, **changes)
    compared = (
        runs if control else [burn_in, *runs]
    )  # the first is what the others are compared with
    page = write_report(compared, out)
    print(f"\n{_table([burn_in, *runs])}")
    print(f"\n{headline(compared)}.")
    print(f"It took {(time.perf_counter() - start) / 60:.1f} minutes. Page with pictures: {page}")


def _plan(names: list[str], quick: bool) -> str:
    """What the demo will do and how long it takes."""
    from semidetr_lite.training.demo import DEMO_RUNS

    length = {name: 4 if quick else run.steps for name, run in DEMO_RUNS.items()}
    together = {
        "control": f"supervised training for the same time, {length['control']:,} steps",
        "semi-detr": "Semi-DETR, which adds 1,800 unlabelled scenes, "
        f"{length['semi-detr']:,} steps",
        "mean-teacher": f"the plain mean teacher, {length['mean-teacher']:,} steps",
    }
    lines = [f"1. supervised training on 200 labelled scenes, {length['supervised']:,} steps"]
    lines += ["2. from there, side by side with one thread each:"]
    lines += [f"   - {together[name]}" for name in names]
    lines += ["3. a page with pictures and curves"]
    wait = "a minute" if quick else "10 to 20 minutes on two CPU cores without other jobs"
    lines += [f"This takes {wait}. Ctrl-C stops it; the same command goes on where it was."]
    return "\n".join(lines)


def _table(runs: list[Path]) -> str:
    """AP of finished demo runs on the test split: EMA weights, NMS where the stage needs it."""
    from semidetr_lite.files import read_jsonl
    from semidetr_lite.training.demo import TITLES

    lines = [f"{'run':<24}{'steps':>7}{'minutes':>9}{'AP':>7}{'AP50':>7}{'AP75':>7}"]
    for run in runs:
        last = read_jsonl(run / "log.jsonl")[-1]
        test = last["test"]["teacher"]
        figures = "".join(f"{100 * test[key]:>7.1f}" for key in ("AP", "AP50", "AP75"))
        lines.append(
            f"{TITLES[run.name]:<24}{last['step']:>7}{last['seconds'] / 60:>9.1f}{figures}"
        )
    return "\n".join(lines)


def train(
    out: Path,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = PRESETS["digits"],
    resume: bool = False,
    workers: int = 1,
    dry_run: bool = False,
) -> None:
    """Train a detector.

    Args:
        out: the run folder to write.
        settings: of the run.
        resume: go on with the run in --out, with its settings; only the options of speed and memory
            may change.
        workers: processes that load data, of each process that trains.
        dry_run: run a few steps, say what a step and the whole run would cost here, write nothing.
    """
    config = as_config(settings)
    if dry_run and resume:
        raise UserError("--dry-run is for a new run: leave out --resume")

    from semidetr_lite import distributed
    from semidetr_lite.training.loop import Run

    distributed.start()
    if dry_run:
        from semidetr_lite.training.dry_run import describe_cost

        print("\n".join(describe_cost(config, workers)))
        distributed.stop()
        return
    if resume:
        skip_unreadable = config.data_files.skip_unreadable
        run = Run(
            None,
            out,
            resume=True,
            workers=workers,
            runtime=config.runtime,
            skip_unreadable=skip_unreadable,
        )
        _check_resumed(out, config, run.config)
    else:
        run = Run(config, out, workers=workers)
    splits = run.splits
    counts = f"{len(splits.labelled)} labelled, {len(splits.unlabelled)} unlabelled images"
    print(f"{out}: {counts}, {len(splits.categories)} categories")
    if distributed.rank() == 0:
        print("\n".join(run.notes), end="\n" * bool(run.notes), flush=True)
    if run.finished:
        print(f"{out}: finished already, at step {run.step}")
        return
    last = run.run()
    distributed.stop()
    print("\n".join(_result_lines(last, run.config.steps)))


def _result_lines(last: dict, steps: int) -> list[str]:
    """What `train` prints at the end, from the last line of the log."""
    lines = []
    for name, figures in last["test"].items():
        ap, ap50 = 100 * figures["AP"], 100 * figures["AP50"]
        known = f"AP {ap:.1f}, AP50 {ap50:.1f} on the test split"
        lines.append(f"{name}: {known if ap == ap else 'no AP, the test split has no boxes'}")
    best = last.get("best")
    if last.get("step", steps) < steps:
        lines.append(f"ended early, at step {last['step']} of {steps}: --patience")
    if best is not None:
        classes = last["per_class"][best["weights"]]
        lines += [f"classes, {best['weights']} of the last step:", *_class_lines(classes)]
        whose = f"the {best['weights']} of step {best['step']}"
        ap = f"AP {100 * best['AP']:.1f} on the tune split"
        if "nms" in best:
            ap += f" with non-maximum suppression (--nms {best['nms']:g})"
        lines.append(f"best: {whose}, {ap}: best.safetensors, which evaluate and predict use")
    return lines


def _check_resumed(out: Path, given: Settings, stored: Settings) -> None:
    """Raises UserError for a setting that a resumed run was asked for and does not have."""
    may_change = fields_with(Role.RUNTIME)
    for path, (value, there) in differences(given, stored).items():
        if path not in may_change:
            fault = f"{option_name(path)} {value} does not go with --resume"
            advice = "leave it out, or take another --out"
            raise UserError(f"{out}: {fault}: the run there has {there}; {advice}")


def _require(*paths: Path) -> None:
    """Raises UserError for a run that is not there."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such run folder or weights file")


def evaluate(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    weights: Weights = "best",
    data: str | None = None,
    images: str | None = None,
    validation: str | None = None,
    nms: float | None = None,
    voc: bool = False,
    truth: Path | None = None,
    detections: Path | None = None,
) -> None:
    """The twelve COCO figures of a run, of a weights file, or of detections.

    Args:
        run: a run folder, measured on its test split; or with --data a file of weights: ours, or
            one that others published (DETR, Deformable DETR, DINO, Semi-DETR).
        weights: the student's, its average's (the teacher's), or the best by the run's own
            measurements.
        data: measure on these images: a COCO json, or a COCO, VOC or YOLO folder (its validation
            images, or all of them where it has none).
        images: the folder of the images of a json in --data.
        validation: with --data, a json or folder to measure on.
        nms: IoU of non-maximum suppression, which published Semi-DETR weights of stage one need.
        voc: also the two APs of Pascal VOC at IoU 0.5, of a run or a file.
        truth: a COCO annotation json.
        detections: a COCO results json, such as `predict` writes.
    """
    if run is not None and (truth or detections) or run is None and (voc or data):
        choice = "give a run folder (with --voc if you like), or --truth and --detections"
        raise UserError(f"evaluate: {choice}, not both")
    if truth and detections:
        from semidetr_lite.evaluate import evaluate as evaluate_detections

        figures = evaluate_detections(str(detections), str(truth))
    elif run is not None and (data or not run.is_file()):
        figures = _measure_run(run, weights, voc, (data, images, validation), nms)
    elif run is not None:
        raise UserError(f"evaluate: {run} is a file; say with --data what to measure it on")
    else:
        raise UserError("evaluate: give a run folder, or --truth and --detections")
    for name, value in figures.items():
        print(f"{name:<10} {value:.10f}" if truth else f"{name:<10} {100 * value:5.1f}")


def _measure_run(
    run: Path,
    weights: Weights,
    voc: bool,
    data: tuple[str | None, str | None, str | None],
    nms: float | None,
) -> dict[str, float]:
    """The figures of a run or a weights file, in 0..1; prints those of classes.

    `data`: a data set, the folder of its images, and what of it to measure on; all None for the
    test split of a run.
    """
    _require(run)
    import torch

    from semidetr_lite.evaluate import evaluate_classes, evaluate_voc
    from semidetr_lite.training.checkpoint import load_detector, read_config
    from semidetr_lite.training.measure import detect_dataset, open_other
    from semidetr_lite.training.presets import load_splits

    if run.is_dir():
        detector = load_detector(run, weights)
        if data[0] is None:
            splits = load_splits(read_config(run), run / "config.json")
            test = splits.test
            if len(splits.categories) != len(detector.categories):
                counts = (len(splits.categories), len(detector.categories))
                fault = "the data in config.json have {} classes, its weights {}"
                raise UserError(f"{run}: {fault.format(*counts)}")
        else:
            test = open_other(data[0], data[1], detector.categories, data[2])
    else:
        detector, test = _weights_and_images(run, weights, data)
    detector.nms = detector.nms if nms is None else nms
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    detections, targets = detect_dataset(detector, test)
    figures, classes = evaluate_classes(detections, targets)
    if voc:
        pascal = evaluate_voc(detections, targets)
        figures |= {key: value for key, value in pascal.items() if key != "per_class"}
    named = {detector.categories[label]["name"]: row for label, row in classes.items()}
    print("\n".join(_class_lines(named)))
    return figures


def _weights_and_images(file: Path, weights: Weights, data: tuple[str | None, ...]):
    """The detector of a weights file, ours or a published one, and the images to measure it on."""
    from semidetr_lite.data import coco
    from semidetr_lite.detectors.public_weights import build_public_detector
    from semidetr_lite.training.checkpoint import is_own_file, load_detector
    from semidetr_lite.training.measure import open_other

    name, images, validation = data
    assert name is not None  # `evaluate` has asked for it
    if is_own_file(file):
        detector = load_detector(file)
        return detector, open_other(name, images, detector.categories, validation)
    splits = coco.load(name, images, percent=100.0, validation=validation)
    network = "student" if weights == "student" else "teacher"
    detector = build_public_detector(file, len(splits.categories), network)
    detector.categories = splits.categories
    return detector, splits.test


def _class_lines(classes: dict[str, dict]) -> list[str]:
    """A table of the AP of each class."""
    width = max([len(name) for name in classes], default=0)
    return [
        f"{name:<{width}}  AP {100 * row['AP']:5.1f}  AP50 {100 * row['AP50']:5.1f}"
        f"  of {row['boxes']} boxes"
        for name, row in classes.items()
    ]


def predict(
    run: Folder,
    images: Folders,
    out: Path,
    format: PredictionFormat = "coco",
    score: float | None = None,
    nms: float | None = None,
    truth: Path | None = None,
    pictures: bool = True,
    weights: Weights = "best",
) -> None:
    """Detect objects in images: a picture of each, and the boxes in a format for other tools.

    Args:
        run: a run folder or a .safetensors file.
        images: image files, or folders of them.
        out: folder for what is written.
        format: coco (annotations.json, and detections.json for `evaluate`), voc (XML files), yolo
            (text files) or csv (a table).
        score: the least score of a box that is drawn or written. Without it 0.3, but
            detections.json holds boxes of every score, since an AP counts them all.
        nms: IoU over which boxes of one class suppress each other; without it what the weights
            need.
        truth: a COCO json, whose ids of images and classes are taken over.
        pictures: --no-pictures writes the boxes alone.
        weights: the student's, its average's (the teacher's), or the best by the run's own
            measurements.
    """
    if not images:
        raise UserError("predict: give images or folders of them")
    if score is not None:
        _check_score(score)
    if nms is not None and not 0 <= nms <= 1:
        raise UserError(f"--nms {nms:g}: not in 0..1")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out must be a folder")
    _require(run)

    from semidetr_lite import prediction
    from semidetr_lite.training.checkpoint import load_detector

    detector = load_detector(run, weights)
    files = prediction.find_images(images, out)
    known = prediction.read_truth(truth, detector.categories) if truth else None
    shown = prediction.DEFAULT_SCORE if score is None else score
    predictor = prediction.Predictor(detector, out if pictures else None, shown, nms)
    found = predictor.predict(files)
    categories = detector.categories
    if known is not None:
        found, unknown, missing = prediction.with_truth(found, known)
        categories = [{**row, "id": known.category_ids[row["name"]]} for row in categories]
        if unknown:
            print(f"{truth}: {unknown} of {len(files)} images are not in it and are left out")
        if missing:
            print(f"{truth}: {missing} of its images are not given; evaluate counts them as missed")
    if found:
        written = prediction.write_predictions(found, categories, out, format, shown, score or 0.0)
        print(f"{out}: {len(found)} images{', each with a picture' * pictures}; {written}")
    if predictor.far:
        first = f"{len(predictor.far)} of {len(files)} images (first: {predictor.far[0]})"
        print(f"note: {first} are far from the size of training; expect less of them")
    _raise_for_unread(predictor.unread, len(files))


def _raise_for_unread(problems: list[UserError], count: int) -> None:
    """Raises UserError for the first image that could not be read, and says what of the others."""
    if problems:
        left_out = f"{len(problems)} of {count} images are left out, the others are done"
        raise UserError(f"{problems[0]}{f'; {left_out}' if count > 1 else ''}")


def export(
    run: Folder,
    out: Path | None = None,
    format: Literal["onnx"] = "onnx",
    weights: Weights = "best",
) -> None:
    """Write a detector as an ONNX file, which runs without this package, and check it.

    Args:
        run: a run folder or a .safetensors file.
        out: the .onnx file; without it detector.onnx in the run folder.
        format: of the file.
        weights: the student's, its average's (the teacher's), or the best by the run's own
            measurements.
    """
    _require(run)
    out = out or (run if run.is_dir() else run.parent) / "detector.onnx"
    if out.suffix.lower() != ".onnx":
        raise UserError(f"{out}: the file is an .onnx file; give --out such a name")

    from semidetr_lite.export import export_onnx, outside_lines
    from semidetr_lite.training.checkpoint import load_detector

    detector = load_detector(run, weights)
    difference = export_onnx(detector, out)
    checked = "not checked: onnxruntime is not installed"
    if difference is not None:
        checked = (
            f"onnxruntime's results on images of four sizes differ by {difference:.1g} at most"
        )
    print(f"{out}: {checked}")
    print("\n".join(f"  {line}" for line in outside_lines(detector)))


def doctor(
    data: str | None = None, images: Path | None = None, unlabelled: Path | None = None,
    validation: Path | None = None, percent: float | None = None, queries: int | None = None,
    weights: Path | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Say what is in a data set and what is wrong with it, or what a published weights file is.

    Args:
        data: as in `train`: a COCO json, or a folder that a labelling tool wrote.
        images: the folder of the json's images.
        unlabelled: a folder of further images without labels, or a COCO json of such.
        validation: a json or folder to measure on.
        percent: of the labelled images whose labels you will use: labels per class are counted, of
            10 % if you do not say.
        queries: of the detector you will train, to compare with the objects per image.
        weights: a file of weights that others published.
        out: a .png file for pictures with their boxes; beside it a picture of the sizes and
            classes (NAME-sizes.png) and a list of all defects (NAME-defects.txt).
    """
    if weights is None and data is None:
        raise UserError("doctor: give --data or --weights")
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"{out}: the picture is a .png file; give --out such a name")
    if percent is not None and not 0 < percent <= 100:
        raise UserError(f"--percent must be over 0 and at most 100, got {percent:g}")
    for path in (weights, Path(data) if data is not None else None):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file or folder")

    from semidetr_lite.data.doctor import diagnose
    from semidetr_lite.detectors.public_weights import describe

    if weights is not None:
        print("\n".join(describe(weights)))
    if data is None:
        return
    counted = 10.0 if percent is None else percent
    found = diagnose(data, images, unlabelled, validation, counted, queries)
    print("\n".join(found.lines()))
    if out is not None:
        _write_diagnosis(found, out)
    if found.problems:
        count = f"{len(found.problems)} {'defect' if len(found.problems) == 1 else 'defects'}"
        more = "" if out else "; --out NAME.png writes all of them, and pictures with their boxes"
        raise UserError(f"{data}: {count}, listed above{more}")
    print(f"next: {_next_command(found, data, images, unlabelled, validation, percent)}")


def _write_diagnosis(found, out: Path) -> None:
    """The pictures of a data set, and the list of its defects."""
    from semidetr_lite.files import write_atomic
    from semidetr_lite.visualize import png, show_data_summary, show_targets

    images, targets, names = found.sample()
    if images:
        categories = found.datasets["train"].categories
        sheet = show_targets(images, targets, categories, names, columns=4)
        write_atomic(out, png(sheet, dpi=150))
    sizes = out.with_name(f"{out.stem}-sizes.png")
    write_atomic(sizes, png(show_data_summary(found.summary)))
    defects = out.with_name(f"{out.stem}-defects.txt")
    write_atomic(defects, found.all_problems())
    print(f"pictures: {out if images else 'none to show'}, {sizes}; all defects: {defects}")


def _next_command(found, data, images, unlabelled, validation, percent) -> str:
    """The command that trains on what the doctor saw, with all labels or the percentage given."""
    words = ["semidetr", "train", "--data", str(data)]
    for option, value in (("--images", images), ("--validation", validation)):
        words += [option, str(value)] if value is not None else []
    used = f"{100 if percent is None else percent:g}"
    unlabelled_ones = found.summary.get("train", {}).get("unlabelled", 0)
    semi = unlabelled is not None or unlabelled_ones > 0 or used != "100"
    supervised = [*words, "--method", "supervised", "--percent", used]
    name = Path(data).resolve().stem
    line = shlex.join([*supervised, "--out", f"runs/{name}-supervised"])
    if not semi:
        return line
    words += ["--unlabelled", str(unlabelled)] if unlabelled is not None else []
    words += ["--percent", used, "--burn-in", f"runs/{name}-supervised"]
    return f"{line}\nthen: {shlex.join([*words, '--out', f'runs/{name}-semi'])}"


def gallery(out: Path = Path("runs/gallery"), scenes: int = 6, score: float = 0.3) -> None:
    """A look without training: supervised, Semi-DETR and truth, from weights in the repository.

    Args:
        out: folder for gallery.png.
        scenes: rows of the picture, each a test scene.
        score: the least score of a box that is drawn or counted.
    """
    if scenes < 1:
        raise UserError(f"--scenes must be at least 1, got {scenes}")
    _check_score(score)

    from semidetr_lite.gallery import write_gallery

    picture, found = write_gallery(out, scenes, score)
    objects = sum(len(truth["boxes"]) for truth in found.truths)
    scenes_with_objects = f"{len(found.truths)} test scenes with {objects} objects"
    print(f"{scenes_with_objects}; boxes that score at least {score:g}:\n")
    print(f"{'':<14}{'hits':>8}{'false alarms':>16}{'missed':>10}")
    for name, (hits, false_alarms, misses) in found.counts(score).items():
        print(f"{name:<14}{hits:>8}{false_alarms:>16}{misses:>10}")
    print(f"\nBoth had the same 200 labelled scenes and the same training time. Picture: {picture}")


def _check_score(score: float) -> None:
    """Raises UserError for a score that is none."""
    if not 0 <= score <= 1:
        raise UserError(f"--score {score:g}: not in 0..1")


def compare(runs: Folders, out: Path, images: int = 8, score: float = 0.3) -> None:
    """Write one page about several runs: AP table, curves, pseudo-boxes, pictures side by side.

    Args:
        runs: run folders or .safetensors files; the first is what the others are compared with.
        out: folder for report.html.
        images: pictures in the gallery.
        score: the least score of a box that is drawn.
    """
    _require(*runs)

    from semidetr_lite.report import write_report

    print(f"page with pictures: {write_report(list(runs), out, images, score)}")


@dataclass(frozen=True)
@strict_group
class AblationSettings(Settings):
    """Settings of all runs of an ablation; what tells them apart are no options here."""

    method: NoOption = "semi-detr"
    percent: NoOption = 10.0
    fold: NoOption = 1
    seed: NoOption = 0
    burn_in: NoOption = None


def ablate(
    out: Path = Path("runs/ablation"),
    tables: tuple[str, ...] = ("main",),
    rows: tuple[str, ...] = (),
    percents: tuple[float, ...] = (10, 100),
    seeds: tuple[int, ...] = (0, 1, 2),
    settings: Annotated[AblationSettings, tyro.conf.arg(name="")] = AblationSettings(),
    fold: int | None = None,
    record: Path | None = None,
    quick: bool = False,
    show: bool = False,
) -> None:
    """Compare the methods, and Semi-DETR with its parts changed: rows x label percents x seeds.

    One run at a time. Each finished run is a line of a JSON-lines file, and what has its line is
    not run again; an unfinished run goes on where it was. At the end: the tables, with mean and
    standard error over the seeds and the difference in pairs of the same seed, and a picture of
    them. The options of `train` hold for every run; --steps are those of a semi-supervised run.

    Args:
        out: folder of the runs, the record and the picture.
        tables: of the ablation: main, matching, threshold, boxes (of the consistency), switch.
        rows: some rows of the tables; all if not given.
        percents: of the images whose labels are used; with 100, the supervised row alone is run.
        seeds: of weights, views and noise.
        settings: of all runs.
        fold: the draw of labelled images of all seeds; seed + 1 if not given.
        record: the JSON-lines file, ablation.jsonl in --out if not given.
        quick: a few steps of everything, to see that it works (accuracy means nothing).
        show: run nothing, only print and draw all tables of the record, whatever the other options
            say.
    """
    record = record or out / "ablation.jsonl"
    if not show:
        settings = check(settings)

    from semidetr_lite.files import read_jsonl, write_atomic
    from semidetr_lite.training.ablate import Ablation, markdown, summarise
    from semidetr_lite.training.demo import QUICK_INTERVALS
    from semidetr_lite.visualize import plot_ablation, png

    if not show:
        if quick:
            settings = change(settings, steps=4, burn_in_steps=4, **QUICK_INTERVALS)
        ablation = Ablation(out, record, settings)
        ablation.run(list(tables), list(rows), list(percents), list(seeds), fold)
    lines = read_jsonl(record)
    if not lines:
        fault = f"{record}: no finished run to show"
        raise UserError(f"{fault}; run `semidetr ablate` without --show first")
    with as_user_error(record, "not the record of an ablation"):
        summaries = summarise(lines)
        print("\n".join(markdown(summaries)))
        picture = png(plot_ablation(summaries))
    write_atomic(out / "ablation.png", picture)
    print(f"\npicture: {out / 'ablation.png'}")


COMMANDS = {
    command.__name__: command
    for command in (demo, gallery, train, evaluate, predict, export, compare, ablate, doctor)
}


def main() -> int:
    """Run a command.

    0 if it worked, 2 with one line if the user has to do something, 130 or 143 if it was
    stopped.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that a terminal cannot show is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        run_command(sys.argv[1:], COMMANDS)
    except (UserError, OSError) as problem:
        print(f"error: {_one_line(problem)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as problem:
        words, status = problem.args if isinstance(problem, Stopped) else ("stopped", 130)
        print(f"\n{words}; {RESUME_HINT}", file=sys.stderr)
        return status
    except RuntimeError as problem:
        from semidetr_lite import distributed

        if not distributed.is_peer_failure(problem):
            raise
        print(
            f"error: process {distributed.rank()} lost the others; {RESUME_HINT}", file=sys.stderr
        )
        return 1
    return 0


def run_command(words: list[str], commands: dict[str, Callable]) -> None:
    """Read a command line and call the command that it names.

    Raises SystemExit for one that cannot be read.
    """
    name = words[0] if words else ""
    if name not in commands:  # help, or a mistake: the options of the commands need not be known
        names = {name: _without_options(command) for name, command in commands.items()}
        about = sys.modules["semidetr_lite"].__doc__
        tyro.extras.subcommand_cli_from_dict(names, prog="semidetr", description=about, args=words)
        return
    command = commands[name]
    if name == "train":
        command = functools.partial(command, settings=_starting_settings(words, Settings))
    elif name == "ablate":
        command = functools.partial(command, settings=_starting_settings(words, AblationSettings))
    tyro.cli(
        command, prog=f"semidetr {name}", description=command_help(commands[name]), args=words[1:]
    )


def command_help(command: Callable) -> str:
    """What a command's docstring says before its arguments."""
    return (inspect.getdoc(command) or "").partition("Args:")[0].strip()


def _without_options(command: Callable) -> Callable:
    """A command by name and first line, for the list of commands."""

    def listed() -> None:
        pass

    listed.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return listed


def _starting_settings(words: list[str], kind: type[Settings]) -> Settings:
    """What the options of a command line start from.

    The run in --out with --resume, else the preset; for training on data of one's own that is
    photos if none is named.
    """
    out = _value_of(words, "--out")
    if "--resume" in words and out:
        from semidetr_lite.training.run_folder import RunFolder

        settings: Settings = RunFolder(out).open_stored()[0]
    else:
        preset, detector = _value_of(words, "--preset"), _value_of(words, "--detector")
        own_data = kind is Settings and _value_of(words, "--data") not in (None, "digits")
        settings = preset_settings(
            preset if preset in PRESETS else "photos" if own_data else "digits",
            detector=detector if detector and detector in get_args(DetectorName) else "dino",
        )
    return kind(
        **{part.name: getattr(settings, part.name) for part in dataclasses.fields(Settings)}
    )


def _value_of(words: list[str], option: str) -> str | None:
    """The value that an option has in a command line, None if it is not there."""
    value = None
    for position, word in enumerate(words):
        if word == option and position + 1 < len(words):
            value = words[position + 1]
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _one_line(problem: Exception) -> str:
    """The message of an error as one line of printable characters, not too long."""
    line = str(problem)
    if isinstance(problem, OSError) and problem.filename:
        line = f"{problem.filename}: {problem.strerror}"
    # from a process that loads data it comes in a traceback
    line = line.rpartition("semidetr_lite.errors.UserError: ")[2].rstrip()
    line = re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match[0])[1:-1], line)
    return line if len(line) < 1500 else f"{line[:1000]} ... {line[-400:]}"
