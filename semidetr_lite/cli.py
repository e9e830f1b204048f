"""The commands: demo, gallery, train, evaluate, predict, compare, ablate, doctor. Each is a plain function."""

import inspect
import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from semidetr_lite import distributed
from semidetr_lite.data.coco import IMAGE_SUFFIXES
from semidetr_lite.data.doctor import doctor_data
from semidetr_lite.detectors.detector import load_image
from semidetr_lite.detectors.public_weights import describe
from semidetr_lite.errors import Stopped, UserError, reading
from semidetr_lite.evaluate import evaluate as evaluate_detections
from semidetr_lite.evaluate import to_coco_json
from semidetr_lite.gallery import write_gallery
from semidetr_lite.report import headline, write_report
from semidetr_lite.training.ablate import TABLES, Ablation, markdown, summarise
from semidetr_lite.training.checkpoint import load_detector, read_config, read_lines, write_whole
from semidetr_lite.training.demo import DEMO_RUNS, QUICK_INTERVALS, TITLES, train_demo_run, train_side_by_side
from semidetr_lite.training.engine import HOW, PRECISIONS
from semidetr_lite.training.measure import measure
from semidetr_lite.training.presets import DETECTORS, METHODS, PRESETS, load_splits
from semidetr_lite.training.train import Run, new_config
from semidetr_lite.visualize import plot_ablation, png, show_data_summary, show_targets

Folder = Annotated[Path, tyro.conf.Positional]
Folders = Annotated[tuple[Path, ...], tyro.conf.Positional]
Weights = Literal["student", "teacher"]

RESUME_HINT = "the same command with --resume (demo, ablate: without) goes on"


def demo(
    out: Path = Path("runs/demo"), detector: Literal["dino", "deformable-detr"] = "dino", seed: int = 0,
    control: bool = True, mean_teacher: bool = False, quick: bool = False,
) -> None:  # fmt: skip
    """Semi-DETR against supervised training of the same time, with 10 % of the labels; nothing to download.

    The data are handwritten digits in photographs. A detector is trained on the 200 labelled scenes; from there
    Semi-DETR goes on with 1,800 unlabelled scenes as well, and beside it supervised training for the same time. Prints
    the AP of each on the test scenes and writes a page with pictures. Called again, it goes on where it was stopped.

    Args:
        out: folder of the runs and the page.
        detector: what to train.
        seed: of weights, views and noise.
        control: also train supervised for the time of Semi-DETR, the fair comparison; --no-control leaves it out.
        mean_teacher: also train the plain mean teacher.
        quick: a few steps of everything, to see that it works (accuracy means nothing).
    """
    names = ["control"] * control + ["semi-detr"] + ["mean-teacher"] * mean_teacher
    changes = {"detector": detector, **({"steps": 4, **QUICK_INTERVALS} if quick else {})}
    start = time.perf_counter()
    print(_plan(names, quick))
    burn_in = train_demo_run("supervised", out, seed, **changes)
    runs = train_side_by_side(names, out, seed, **changes)
    compared = runs if control else [burn_in, *runs]  # the first is what the others are compared with
    page = write_report(compared, out)
    print(f"\n{_table([burn_in, *runs])}")
    print(f"\n{headline(compared)}.")
    print(f"It took {(time.perf_counter() - start) / 60:.1f} minutes. Page with pictures: {page}")


def _plan(names: list[str], quick: bool) -> str:
    """What the demo will do and how long it takes."""
    length = {name: 4 if quick else run.steps for name, run in DEMO_RUNS.items()}
    together = {
        "control": f"supervised training for the same time, {length['control']:,} steps",
        "semi-detr": f"Semi-DETR, which adds 1,800 unlabelled scenes, {length['semi-detr']:,} steps",
        "mean-teacher": f"the plain mean teacher, {length['mean-teacher']:,} steps",
    }
    lines = [f"1. supervised training on 200 labelled scenes, {length['supervised']:,} steps"]
    lines += ["2. from there, side by side with one thread each:"]
    lines += [f"   - {together[name]}" for name in names]
    lines += ["3. a page with pictures and curves"]
    wait = "a minute" if quick else "about 10 minutes on two quiet CPU cores, longer beside other jobs"
    lines += [f"This takes {wait}. Ctrl-C stops it; the same command goes on where it was."]
    return "\n".join(lines)


def _table(runs: list[Path]) -> str:
    """AP of finished demo runs on the test split, EMA weights, without NMS unless the stage needs it."""
    lines = [f"{'run':<24}{'steps':>7}{'minutes':>9}{'AP':>7}{'AP50':>7}{'AP75':>7}"]
    for run in runs:
        last = read_lines(run / "log.jsonl")[-1]
        test = last["test"]["teacher"]
        figures = "".join(f"{100 * test[key]:>7.1f}" for key in ("AP", "AP50", "AP75"))
        lines.append(f"{TITLES[run.name]:<24}{last['step']:>7}{last['seconds'] / 60:>9.1f}{figures}")
    return "\n".join(lines)


def train(
    out: Path, preset: Literal[tuple(PRESETS)] = "digits", method: Literal[tuple(METHODS)] = "semi-detr",
    detector: Literal[tuple(DETECTORS)] = "dino", data: str = "digits", images: Path | None = None,
    unlabelled: Path | None = None, validation: Path | None = None, percent: float | None = None, fold: int = 1,
    seed: int = 0, steps: int | None = None, burn_in: Path | None = None, folds: Path | None = None,
    flip: bool = True, skip_unreadable: bool = False, resume: bool = False, workers: int = 1,
    accumulate: int | None = None, precision: Literal[PRECISIONS] | None = None, checkpointing: bool = False,
    channels_last: bool = False, compile: bool = False, backbone_weights: str | None = None,
    threads: int | None = None,
) -> None:  # fmt: skip
    """Train a detector.

    Args:
        out: the run folder to write.
        preset: named settings (sizes, views, weights, schedule).
        method: how to learn.
        detector: what to train.
        data: "digits", a COCO json, or a COCO, VOC or YOLO folder (data_scripts/README.md).
        images: the folder of the json's images.
        unlabelled: a folder of further images without labels, or a COCO json of such.
        validation: a json or folder to measure on; without one, a fifth of the images is set aside.
        percent: share of the images whose labels are used; the preset's if not given.
        fold: which draw of them.
        seed: of weights, views and noise.
        steps: optimizer steps; the preset's if not given.
        burn_in: a finished run to start from.
        folds: a folder of folds with its manifest (data_scripts/make_splits.py) to read percent and fold from.
        flip: whether views may be mirrored; say --no-flip for letters and digits.
        skip_unreadable: go on when a labelled image cannot be read.
        resume: go on with the run in --out, with its settings; the options from --accumulate on may change.
        workers: processes that load data, of each process that trains.
        accumulate: parts that a step's images are run in one after the other; the preset's if not given.
        precision: bfloat16 where the GPU has it ("auto", the COCO presets), or one of the others everywhere.
        checkpointing: less memory for a slower step: layers are run again in the backward pass.
        channels_last: the memory layout of the backbone.
        compile: torch.compile for backbone and layers.
        backbone_weights: of a ResNet: a .pth file of torchvision's, or "none" for random ones; without it torchvision's
            ImageNet weights are downloaded, once (0.1 GB).
        threads: CPU threads of each process; without it torch's choice, which is stored and kept on resume.
    """
    settings = _settings(locals(), "out", "resume", "workers")
    config = new_config(**settings)
    distributed.start()
    run = Run(config, out, resume, workers=workers, how={name: settings[name] for name in HOW if settings[name]})
    if resume:
        _check_resumed(out, settings, run.config)
    counts = f"{len(run.splits.labelled)} labelled, {len(run.splits.unlabelled)} unlabelled images"
    print(f"{out}: {counts}, {len(run.splits.categories)} categories")
    if run.step >= run.config["steps"]:
        print(f"{out}: finished already, at step {run.step}")
        return
    last = run.go()
    distributed.stop()
    for part, found in last["test"].items():
        print(f"{part}: AP {100 * found['AP']:.1f}, AP50 {100 * found['AP50']:.1f} on the test split")


def _check_resumed(out: Path, given: dict, made: dict) -> None:
    """Raises UserError for an option of `train` that a resumed run was asked for and does not have."""
    for name, option in inspect.signature(train).parameters.items():
        value = given.get(name, option.default)
        if name not in HOW and value != option.default and value != made.get(name):
            fault = f"--{name.replace('_', '-')} {value} does not go with --resume"
            raise UserError(f"{out}: {fault}: the run there has {made.get(name)}; leave it out, or take another --out")


def _settings(arguments: dict, *without: str) -> dict:
    """Arguments of a command as new_config takes them: paths as words."""
    kept = {name: value for name, value in arguments.items() if name not in without}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def evaluate(
    run: Annotated[Path | None, tyro.conf.Positional] = None, weights: Weights = "teacher", voc: bool = False,
    truth: Path | None = None, detections: Path | None = None,
) -> None:  # fmt: skip
    """Measure a run on its test split, or a detections json against a truth json: the twelve COCO figures.

    Args:
        run: a run folder.
        weights: the student's, or its average's (the teacher's).
        voc: also the two APs of Pascal VOC at IoU 0.5, of a run.
        truth: a COCO annotation json.
        detections: a COCO results json.
    """
    if run is not None and (truth or detections) or voc and run is None:
        raise UserError("evaluate: give a run folder (with --voc if you like), or --truth and --detections, not both")
    if truth and detections:
        found = evaluate_detections(str(detections), str(truth))
    elif run is not None:
        detector = load_detector(run, weights)
        found = measure(detector, load_splits(read_config(run), run / "config.json").test, voc=voc)
    else:
        raise UserError("evaluate: give a run folder, or --truth and --detections")
    for name, value in found.items():
        print(f"{name:<10} {value:.10f}" if truth else f"{name:<10} {100 * value:5.1f}")


def predict(run: Folder, images: Folders, out: Path, score: float = 0.3, weights: Weights = "teacher") -> None:
    """Detect objects in images: writes a picture of each and detections.json in COCO's results format.

    Args:
        run: a run folder or a .safetensors file.
        images: image files, or folders of them.
        out: folder for the pictures and detections.json.
        score: the least score of a box that is drawn or written.
        weights: the student's, or its average's (the teacher's).
    """
    if not images:
        raise UserError("predict: give images or folders of them")
    _check_score(score)
    detector = load_detector(run, weights)
    files = [file for path in images for file in _image_files(path)]
    found, unread = {}, []
    for number, file in enumerate(tqdm(files, desc="predict", disable=len(files) < 20)):
        try:
            image = load_image(file)
        except UserError as problem:
            unread.append(problem)
            continue
        found[number] = detector.detect([image], score)[0]
        write_whole(out / f"{number:05d}_{file.stem}.png", _picture(image, found[number], detector, file.name))
    if found:
        rows = to_coco_json(list(found.values()), list(found), detector.categories)
        listing = {"images": [{"id": number, "file_name": str(files[number])} for number in found]}
        write_whole(out / "detections.json", json.dumps(rows))
        write_whole(out / "images.json", json.dumps(listing))
        what = f"{len(found)} pictures, {len(rows)} detections of at least {score:g}"
        print(f"{out}: {what} in detections.json (image ids in images.json)")
    if unread:
        others = f"; {len(unread)} of {len(files)} images are left out, the others are done" if len(files) > 1 else ""
        raise UserError(f"{unread[0]}{others}")


def _picture(image, found: dict, detector, name: str) -> bytes:
    """A PNG of an image with what was found: at its own size, but 320 pixels wide at least and 2,000 at most."""
    width = image.shape[-1]
    cell = min(max(width / 80, 4.0), 8.8)  # inches
    figure = show_targets([image], [found], detector.categories, [name], columns=1, style="prediction", cell=cell)
    return png(figure, dpi=round(min(max(width, 80 * cell), 2000) / cell))


def _image_files(path: Path) -> list[Path]:
    """The path itself, or the images anywhere below a folder."""
    if not path.exists():
        raise UserError(f"{path}: no such image or folder")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return files


def doctor(
    data: str | None = None, images: Path | None = None, unlabelled: Path | None = None,
    validation: Path | None = None, weights: Path | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Say what is in a data set, and everything that is wrong with it; or what a published weights file is.

    Args:
        data: as in `train`: a COCO json, or a COCO, VOC or YOLO folder.
        images: the folder of the json's images.
        unlabelled: a folder of further images without labels.
        validation: a json or folder to measure on.
        weights: a file of weights that others published.
        out: a .png file for a picture of the sizes and classes.
    """
    if weights is None and data is None:
        raise UserError("doctor: give --data or --weights")
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"{out}: the picture is a .png file; give --out such a name")
    if weights is not None:
        print("\n".join(describe(weights)))
    if data is not None:
        lines, found, defects = doctor_data(data, images, unlabelled, validation)
        print("\n".join(lines))
        if out is not None:
            write_whole(out, png(show_data_summary(found)))
        if defects:
            raise UserError(f"{data}: {defects} {'defect' if defects == 1 else 'defects'}, listed above")


def gallery(out: Path = Path("runs/gallery"), scenes: int = 6, score: float = 0.3) -> None:
    """A look without training: supervised, Semi-DETR and truth side by side, from weights in the repository.

    Args:
        out: folder for gallery.png.
        scenes: rows of the picture, each a test scene.
        score: the least score of a box that is drawn or counted.
    """
    if scenes < 1:
        raise UserError(f"--scenes must be at least 1, got {scenes}")
    _check_score(score)
    picture, found = write_gallery(out, scenes, score)
    objects = sum(len(truth["boxes"]) for truth in found.truths)
    print(f"{len(found.truths)} test scenes with {objects} objects; boxes that score at least {score:g}:\n")
    print(f"{'':<14}{'hits':>8}{'false alarms':>16}{'missed':>10}")
    for name, (hits, false_alarms, misses) in found.counts(score).items():
        print(f"{name:<14}{hits:>8}{false_alarms:>16}{misses:>10}")
    print(f"\nBoth had the same 200 labelled scenes and the same training time. Picture: {picture}")


def _check_score(score: float) -> None:
    """Raises UserError for a score that is none."""
    if not 0 <= score <= 1:
        raise UserError(f"--score {score:g}: not in 0..1")


def compare(runs: Folders, out: Path, images: int = 8, score: float = 0.3) -> None:
    """Write one page about several runs: AP table, curves, pseudo-boxes over training, pictures side by side.

    Args:
        runs: run folders or .safetensors files; the first is what the others are compared with.
        out: folder for report.html.
        images: pictures in the gallery.
        score: the least score of a box that is drawn.
    """
    print(f"page with pictures: {write_report(list(runs), out, images, score)}")


def ablate(
    out: Path = Path("runs/ablation"), tables: tuple[Literal[tuple(TABLES)], ...] = ("main",),
    rows: tuple[str, ...] = (), percents: tuple[float, ...] = (10, 100), seeds: tuple[int, ...] = (0, 1, 2),
    preset: Literal[tuple(PRESETS)] = "digits", detector: str = "dino", steps: int | None = None, fold: int = 1,
    data: str = "digits", images: Path | None = None, unlabelled: Path | None = None, validation: Path | None = None,
    folds: Path | None = None, flip: bool = True, backbone_weights: str | None = None,
    record: Path | None = None, quick: bool = False, show: bool = False,
) -> None:  # fmt: skip
    """Compare the methods, and Semi-DETR with its parts changed: rows x label percents x seeds, one run at a time.

    Each finished run is a line of a JSON-lines file, and what has its line is not run again; an unfinished run goes on
    where it was. At the end: the tables, with mean and standard error over the seeds, and a picture of them.

    Args:
        out: folder of the runs, the record and the picture.
        tables: of the ablation: main, matching, threshold, boxes (of the consistency), switch.
        rows: some rows of the tables; all if not given.
        percents: of the images whose labels are used; with 100, the supervised row alone is run.
        seeds: of weights, views and noise.
        preset: named settings.
        detector: what to train; Soft Teacher and Dense Teacher have their own.
        steps: of a semi-supervised run; the preset's if not given.
        fold: which draw of labelled images.
        data: as in `train`.
        images: as in `train`.
        unlabelled: as in `train`.
        validation: as in `train`.
        folds: as in `train`.
        flip: as in `train`.
        backbone_weights: as in `train`.
        record: the JSON-lines file, ablation.jsonl in --out if not given.
        quick: a few steps of everything, to see that it works (accuracy means nothing).
        show: run nothing, only print and draw all tables of the record, whatever the options before say.
    """
    settings = _settings(locals(), "out", "tables", "rows", "percents", "seeds", "record", "quick", "show")
    record = record or out / "ablation.jsonl"
    if not show:
        few = {"steps": 4, "burn_in_steps": 4, **QUICK_INTERVALS} if quick else {}
        Ablation(out, record, **settings | few).go(list(tables), list(rows), list(percents), list(seeds))
    lines = read_lines(record)
    if not lines:
        raise UserError(f"{record}: no finished run to show; run `semidetr ablate` without --show first")
    with reading(record, "not the record of an ablation"):
        found = summarise(lines)
        print("\n".join(markdown(found)))
        picture = png(plot_ablation(found))
    write_whole(out / "ablation.png", picture)
    print(f"\npicture: {out / 'ablation.png'}")


COMMANDS = {command.__name__: command for command in (demo, gallery, train, evaluate, predict, compare, ablate, doctor)}


def main() -> int:
    """Run a command; 0 if it worked, 2 with one line if the user has to do something, 130 or 143 if it was stopped."""
    try:
        about = sys.modules["semidetr_lite"].__doc__
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="semidetr", description=about)
    except (UserError, OSError) as problem:
        line = str(problem)
        if isinstance(problem, OSError) and problem.filename:
            line = f"{problem.filename}: {problem.strerror}"
        line = line.rpartition("semidetr_lite.errors.UserError: ")[2]  # from a data worker it comes in a traceback
        line = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], line.rstrip())
        print(f"error: {line if len(line) < 1500 else line[:1000] + ' ... ' + line[-400:]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as problem:
        said, status = problem.args if isinstance(problem, Stopped) else ("stopped", 130)
        print(f"\n{said}; {RESUME_HINT}", file=sys.stderr)
        return status
    except RuntimeError as problem:
        if not distributed.is_peer_failure(problem):
            raise
        print(f"error: process {distributed.rank()} lost the others; {RESUME_HINT}", file=sys.stderr)
        return 1
    return 0
