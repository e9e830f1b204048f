"""The commands: demo, gallery, train, evaluate, predict, compare, ablate, doctor.

Each is a plain function. What takes long to import (torch, scikit-learn, matplotlib) is imported
where it is used, so that help and messages about wrong options come at once.
"""

import dataclasses
import functools
import inspect
import json
import re
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
Weights = Literal["student", "teacher"]
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
    wait = (
        "a minute" if quick else "about 10 minutes on two quiet CPU cores, longer beside other jobs"
    )
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
        run = Run(None, out, resume=True, workers=workers, runtime=config.runtime)
        _check_resumed(out, config, run.config)
    else:
        run = Run(config, out, workers=workers)
    splits = run.splits
    counts = f"{len(splits.labelled)} labelled, {len(splits.unlabelled)} unlabelled images"
    print(f"{out}: {counts}, {len(splits.categories)} categories")
    if run.step >= run.config.steps:
        print(f"{out}: finished already, at step {run.step}")
        return
    last = run.run()
    distributed.stop()
    for name, figures in last["test"].items():
        ap, ap50 = 100 * figures["AP"], 100 * figures["AP50"]
        print(f"{name}: AP {ap:.1f}, AP50 {ap50:.1f} on the test split")


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
    weights: Weights = "teacher",
    voc: bool = False,
    truth: Path | None = None,
    detections: Path | None = None,
) -> None:
    """The twelve COCO figures of a run on its test split, or of a json of detections.

    Args:
        run: a run folder.
        weights: the student's, or its average's (the teacher's).
        voc: also the two APs of Pascal VOC at IoU 0.5, of a run.
        truth: a COCO annotation json.
        detections: a COCO results json.
    """
    if run is not None and (truth or detections) or voc and run is None:
        choice = "give a run folder (with --voc if you like), or --truth and --detections"
        raise UserError(f"evaluate: {choice}, not both")
    if truth and detections:
        from semidetr_lite.evaluate import evaluate as evaluate_detections

        figures = evaluate_detections(str(detections), str(truth))
    elif run is not None:
        figures = _measure_run(run, weights, voc)
    else:
        raise UserError("evaluate: give a run folder, or --truth and --detections")
    for name, value in figures.items():
        print(f"{name:<10} {value:.10f}" if truth else f"{name:<10} {100 * value:5.1f}")


def _measure_run(run: Path, weights: Weights, voc: bool) -> dict[str, float]:
    """The figures of a run on its test split, in 0..1."""
    _require(run)

    from semidetr_lite.training.checkpoint import load_detector, read_config
    from semidetr_lite.training.measure import measure
    from semidetr_lite.training.presets import load_splits

    detector = load_detector(run, weights)
    splits = load_splits(read_config(run), run / "config.json")
    return measure(detector, splits.test, voc=voc)


def predict(
    run: Folder, images: Folders, out: Path, score: float = 0.3, weights: Weights = "teacher"
) -> None:
    """Detect objects in images: a picture of each, and detections.json in COCO's results format.

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
    _require(run)

    from tqdm import tqdm

    from semidetr_lite.detectors.detector import load_image
    from semidetr_lite.evaluate import to_coco_json
    from semidetr_lite.files import write_atomic
    from semidetr_lite.training.checkpoint import load_detector

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
        write_atomic(
            out / f"{number:05d}_{file.stem}.png",
            _picture(image, found[number], detector, file.name),
        )
    if found:
        rows = to_coco_json(list(found.values()), list(found), detector.categories)
        listing = {"images": [{"id": number, "file_name": str(files[number])} for number in found]}
        write_atomic(out / "detections.json", json.dumps(rows))
        write_atomic(out / "images.json", json.dumps(listing))
        what = f"{len(found)} pictures, {len(rows)} detections of at least {score:g}"
        print(f"{out}: {what} in detections.json (image ids in images.json)")
    if unread:
        others = (
            f"; {len(unread)} of {len(files)} images are left out, the others are done"
            if len(files) > 1
            else ""
        )
        raise UserError(f"{unread[0]}{others}")


def _picture(image, found: dict, detector, name: str) -> bytes:
    """A PNG of an image with what was found.

    At its own size, but 320 pixels wide at least and 2,000 at most.
    """
    from semidetr_lite.visualize import png, show_targets

    width = image.shape[-1]
    cell = min(max(width / 80, 4.0), 8.8)  # inches
    figure = show_targets(
        [image], [found], detector.categories, [name], columns=1, style="prediction", cell=cell
    )
    return png(figure, dpi=round(min(max(width, 80 * cell), 2000) / cell))


def _image_files(path: Path) -> list[Path]:
    """The path itself, or the images anywhere below a folder."""
    from semidetr_lite.data.coco import IMAGE_SUFFIXES

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
    """Say what is in a data set and what is wrong with it, or what a published weights file is.

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
    for path in (weights, Path(data) if data is not None else None):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file or folder")

    from semidetr_lite.data.doctor import doctor_data
    from semidetr_lite.detectors.public_weights import describe
    from semidetr_lite.files import write_atomic
    from semidetr_lite.visualize import png, show_data_summary

    if weights is not None:
        print("\n".join(describe(weights)))
    if data is not None:
        lines, found, defects = doctor_data(data, images, unlabelled, validation)
        print("\n".join(lines))
        if out is not None:
            write_atomic(out, png(show_data_summary(found)))
        if defects:
            raise UserError(
                f"{data}: {defects} {'defect' if defects == 1 else 'defects'}, listed above"
            )


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
    seed: NoOption = 0
    burn_in: NoOption = None


def ablate(
    out: Path = Path("runs/ablation"),
    tables: tuple[str, ...] = ("main",),
    rows: tuple[str, ...] = (),
    percents: tuple[float, ...] = (10, 100),
    seeds: tuple[int, ...] = (0, 1, 2),
    settings: Annotated[AblationSettings, tyro.conf.arg(name="")] = AblationSettings(),
    record: Path | None = None,
    quick: bool = False,
    show: bool = False,
) -> None:
    """Compare the methods, and Semi-DETR with its parts changed: rows x label percents x seeds.

    One run at a time. Each finished run is a line of a JSON-lines file, and what has its line is
    not run again; an unfinished run goes on where it was. At the end: the tables, with mean and
    standard error over the seeds, and a picture of them. The options of `train` hold for every run;
    --steps are those of a semi-supervised run.

    Args:
        out: folder of the runs, the record and the picture.
        tables: of the ablation: main, matching, threshold, boxes (of the consistency), switch.
        rows: some rows of the tables; all if not given.
        percents: of the images whose labels are used; with 100, the supervised row alone is run.
        seeds: of weights, views and noise.
        settings: of all runs.
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
        ablation.run(list(tables), list(rows), list(percents), list(seeds))
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
    for command in (demo, gallery, train, evaluate, predict, compare, ablate, doctor)
}


def main() -> int:
    """Run a command.

    0 if it worked, 2 with one line if the user has to do something, 130 or 143 if it was
    stopped.
    """
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

    The run in --out with --resume, else the preset.
    """
    out = _value_of(words, "--out")
    if "--resume" in words and out:
        from semidetr_lite.training.run_folder import RunFolder

        settings: Settings = RunFolder(out).open_stored()[0]
    else:
        preset, detector = _value_of(words, "--preset"), _value_of(words, "--detector")
        settings = preset_settings(
            preset if preset in PRESETS else "digits",
            detector=detector if detector in get_args(DetectorName) else "dino",
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
