"""The training loop: one for every method, since a method is `losses = method(batch, step)` and
`method.after_step(step)`.

    Run(config, out).go()    config: see new_config; writes config.json, log.jsonl, pseudo_boxes.jsonl, last.pt,
    student.safetensors, teacher.safetensors

A run may start from another one (`burn_in`): it takes over weights and average, and its step count goes on;
the optimizer starts anew.

A run can be killed at any moment and goes on with --resume to the same end, bit for bit: what a step does follows from
its number and from `last.pt`, and what was logged after `last.pt` is logged again.
"""

import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from semidetr_lite import distributed
from semidetr_lite.data.batches import Batches
from semidetr_lite.data.splits import Splits
from semidetr_lite.detectors.detector import padded_side
from semidetr_lite.device import to_host
from semidetr_lite.errors import Stopped, UserError, reading
from semidetr_lite.methods.mean_teacher import TeacherStudent
from semidetr_lite.training import presets
from semidetr_lite.training.checkpoint import (
    append_lines,
    fill,
    load_state,
    read_config,
    read_lines,
    save_weights,
    write_whole,
)  # fmt: skip
from semidetr_lite.training.engine import Engine, check_parts, choose_precision
from semidetr_lite.training.measure import duplicates, measure, pseudo_quality, watched_boxes
from semidetr_lite.training.presets import Recipe, make_recipe

KEYS = ("method", "detector", "preset", "data", "percent", "fold", "seed", "steps")  # of a run among others
PATIENCE = 3  # steps in a row without a finite loss and gradient after which a run gives up


def new_config(
    preset: str = "digits", method: str = "semi-detr", detector: str = "dino", data: str = "digits",
    images: str | None = None, unlabelled: str | None = None, validation: str | None = None,
    percent: float | None = None, fold: int = 1, seed: int = 0, steps: int | None = None, burn_in: str | None = None,
    folds: str | None = None, flip: bool = True, skip_unreadable: bool = False,
    backbone_weights: str | None = None, threads: int | None = None, **changes,
) -> dict:  # fmt: skip
    """The settings of a run, complete, as they go to config.json. `changes` replace fields of the preset's
    Recipe, where they are not None. `threads` None: as many as torch takes by itself where the run begins."""
    settings = {name: value for name, value in locals().items() if name != "changes"}
    for kind, known in {"preset": presets.PRESETS, "method": presets.METHODS, "detector": presets.DETECTORS}.items():
        if settings[kind] not in known:
            raise UserError(f"no {kind} called {settings[kind]!r}: choose from {', '.join(known)}")
    presets.check_pair(method, detector)
    for name in ("images", "unlabelled", "validation", "folds"):
        if data == "digits" and settings[name]:
            raise UserError(f"--{name} {settings[name]} goes with --data; the digits, its default, have their own")
    recipe = dataclasses.asdict(presets.PRESETS[preset])
    recipe["arguments"] = recipe["arguments"][detector]
    if backbone_weights:
        if recipe["arguments"]["backbone"] == "tiny":
            raise UserError(f"--backbone-weights {backbone_weights}: the preset {preset} has no ResNet to give them to")
        recipe["arguments"] |= {"backbone_weights": None if backbone_weights == "none" else backbone_weights}
    unknown = sorted(set(changes) - set(recipe))
    if unknown:
        raise UserError(f"no field {unknown[0]!r} in a preset: choose from {', '.join(recipe)}")
    recipe |= {name: value for name, value in changes.items() if value is not None}
    settings |= {name: recipe[name] for name in ("steps", "percent") if settings[name] is None}
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    if settings["steps"] < 1:
        raise UserError(f"steps must be at least 1, got {settings['steps']}")
    return {**settings, "recipe": json.loads(json.dumps(recipe)), **_origin()}


def finish(config: dict, folder: Path, workers: int = 1, quiet: bool = False) -> Path:
    """Train a run to its end from wherever it stands; returns its folder. `workers` and `quiet`: see Run.

    Raises UserError where the folder holds a run with other settings than these.
    """
    made = read_config(folder) if (folder / "config.json").exists() else config
    for key in (*KEYS, "recipe"):
        if made.get(key) != config[key]:
            raise UserError(f"{folder}: holds a run with another {key}; choose another --out")
    run = Run(config, folder, resume=(folder / "last.pt").exists(), workers=workers, quiet=quiet)
    if run.step < config["steps"]:
        labelled = len(run.splits.labelled)
        if not quiet:
            print(f"{folder}: {config['method']}, {config['steps']} steps, {labelled} labelled images", flush=True)
        run.go()
    return folder


def _origin() -> dict:
    """Where the numbers of this run come from."""
    asked, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        commit = subprocess.run(asked, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}"
    return {"commit": commit, "machine": machine, "command": _command(sys.argv)}


def _command(arguments: list[str]) -> str:
    """The command as a user types it; `python -m semidetr_lite` is `semidetr`."""
    program = Path(arguments[0])
    name = "semidetr" if program.parts[-2:] == ("semidetr_lite", "__main__.py") else program.stem
    return shlex.join([name, *arguments[1:]])


class Run:
    """A run folder in the making.

    Args:
        config: from new_config.
        out: the run folder.
        resume: go on from `last.pt` in it, or begin again if it has none yet, in both cases with the settings in it.
        splits: the data, if already loaded.
        workers: processes that load data; 0 loads in this one.
        quiet: no progress bar, no lines.
        how: fields of the recipe (engine.HOW) that a resumed run goes on with, whatever it had before.
    """

    def __init__(self, config: dict, out, resume=False, splits: Splits | None = None, workers=1, quiet=False, how=None):
        self.out, self.workers, self.quiet = Path(out), workers, quiet or distributed.rank() > 0
        if workers < 0:
            raise UserError(f"--workers must be at least 0, got {workers}")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file; --out must be a folder")
        unsaved = (self.out / "config.json").exists() and not (self.out / "last.pt").exists()
        state = load_state(self.out / "last.pt") if resume and not unsaved else None
        if state:
            with reading(self.out / "last.pt", "not a checkpoint of a run"):
                config = dict(json.loads(state["config"]))
        elif resume:
            config = read_config(self.out)
        elif (self.out / "last.pt").exists():
            raise UserError(f"{self.out}: holds a run already; choose another --out, or go on with --resume")
        file = self.out / "config.json" if resume else "the options"
        with reading(file, "not a recipe"):
            config = {**config, "recipe": {**config["recipe"], **(how or {})}}
        recipe = make_recipe(config, file)
        # What is chosen here is stored, and kept on resume: another number of threads adds numbers in another order.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = choose_precision(recipe.precision, self.device)
        threads = config.get("threads") or torch.get_num_threads()
        torch.set_num_threads(threads)
        self.recipe: Recipe = dataclasses.replace(recipe, precision=precision)
        config = {**config, "threads": threads, "recipe": {**config["recipe"], "precision": precision}}
        self.splits = splits or presets.load_splits(config, file)
        self.config = {**config, "categories": self.splits.categories}
        self.unlabelled = 0 if config["method"] == "supervised" else self.recipe.unlabelled_images  # a step
        check_parts("labelled", self.recipe.labelled_images, self.recipe.accumulate)
        if self.unlabelled:
            check_parts("unlabelled", self.unlabelled, self.recipe.accumulate)
        self.step, self.seconds, self.offset, self.skipped = 0, 0.0, 0, 0
        self.logged, self.began = 0, time.perf_counter()
        settings = {key: value for key, value in self.config.items() if key not in ("commit", "machine", "command")}
        given = (state and state["step"], settings, fingerprint(self.splits))
        distributed.assert_same_on_all_ranks("images, labels or settings", *given)
        with reading(self.out / "last.pt" if state else self.out, "cannot be built"):
            self._build(state)
        self.last_good = f"{self.out / 'last.pt'} (step {self.step})" if state else "none yet"

    def _build(self, state: dict | None) -> None:
        """Student, method and optimizer; from a checkpoint, from a burn-in run, or new."""
        config, start = self.config, None
        burn_in = Path(config["burn_in"] or "") / "last.pt"
        if state:
            self.step, self.seconds, self.offset = state["step"], state["seconds"], state["offset"]
            self.skipped = state.get("skipped", 0)
        elif config["burn_in"]:
            start = self._burnt_in(burn_in)
            self.offset = start["offset"] + start["step"]
        self.arguments = dict(self.recipe.arguments)
        torch.manual_seed(config["seed"])
        arguments = {**self.arguments, "backbone_weights": None} if state or start else self.arguments
        student = presets.make_detector(config["detector"], len(self.splits.categories), arguments)
        how = (self.recipe, config["steps"], self.offset, config["seed"])
        self.method: TeacherStudent = presets.make_method(config["method"], student, *how).to(self.device).train()
        self.optimizer = make_optimizer(self.method, self.recipe)
        self.engine = Engine(self.method, self.recipe)
        if state:
            fill(self.method, state["method"], self.out / "last.pt")
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.student.nms = self.method.teacher.nms = state["nms"]
        elif start:
            for part in ("student", "teacher"):
                named = [(key.partition("."), value) for key, value in start["method"].items()]
                own = {key: value for (owner, _, key), value in named if owner == part}
                fill(getattr(self.method, part), own, burn_in)

    def _burnt_in(self, file: Path) -> dict:
        """The checkpoint to start from; a warning if it may have seen other labels than this run has."""
        if not file.is_file():
            raise UserError(f"{file.parent}: no run to start from, it has no last.pt; give --burn-in a finished run")
        start = load_state(file)
        with reading(file, "not a checkpoint of a run"):
            begun = dict(json.loads(start["config"]))
        other = [f"{key} {begun.get(key)}" for key in ("data", "percent", "fold") if begun.get(key) != self.config[key]]
        if other and distributed.rank() == 0:
            said = "what it learned may come from labels that this run does not have"
            print(f"warning: {file.parent} was trained with {', '.join(other)}: {said}", file=sys.stderr)
        return start

    def go(self) -> dict:
        """Train to the end; returns the last log line, with the AP on the test split under "test".

        Raises Stopped after Ctrl-C or SIGTERM, UserError where it cannot go on.
        """
        if distributed.rank() == 0:
            for left in self.out.glob(".*.part"):  # by a run that was killed while it wrote
                left.unlink(missing_ok=True)
            self._drop_later_lines()
            write_whole(self.out / "config.json", json.dumps(self.config, indent=1))
        look = {"desc": self.config["method"], "mininterval": 2, "dynamic_ncols": True, "disable": self.quiet}
        self.logged, self.began, line = self.step, time.perf_counter(), {}
        # the bar is closed also when something goes wrong, so that the error gets a line of its own
        with Stop() as stop, tqdm(total=self.config["steps"], initial=self.step, **look) as bar:
            try:
                if self.device.type == "cuda":
                    self.rehearse()
                for batch in self._batches():
                    losses = self.train_step(batch)
                    self.step += 1
                    bar.update()
                    if self._due(self.recipe.log_every):
                        with stop.at_once():  # measuring may take minutes; what is unsaved then is a few steps
                            line = self._line(losses)
                        self._log(line)
                    if any(distributed.all_gather(stop.asked)) and self.step < self.config["steps"]:
                        self.save()
                        distributed.all_gather("saved")  # the first that ends takes the others with it
                        stop.now()
            except KeyboardInterrupt:
                raise Stopped(f"stopped; the last checkpoint is {self.last_good}", stop.status) from None
            except (RuntimeError, ConnectionError, EOFError) as problem:
                self.engine.explain(problem)
                lost = isinstance(problem, ConnectionError | EOFError) and self.workers  # it died in mid-sentence
                if not lost and "DataLoader worker" not in str(problem):
                    raise
                said = (str(problem) or type(problem).__name__).splitlines()[0]
                fault = f"a process that loads data died ({said}), perhaps for lack of memory"
                raise UserError(f"{fault}: use fewer --workers and --resume from {self.last_good}") from None
        return line

    def train_step(self, batch: dict) -> dict[str, float]:
        """One optimizer step; the losses as floats. It changes nothing where a loss or the gradient is not finite."""
        step = self.offset + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(self.step, self.config["steps"], self.recipe)
        self.optimizer.zero_grad(set_to_none=True)
        names, found = [], []
        for losses, means in self.engine.losses(batch, step):
            sum(losses.values()).backward()
            names, found = [*names, *losses], [*found, means]
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip)
        *numbers, norm = to_host(torch.cat([*found, norm[None]])).tolist()  # only now, all parts being done
        values = dict.fromkeys(names, 0.0)
        for name, number in zip(names, numbers, strict=True):
            values[name] += number
        faults = [f"loss {name!r} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if faults or not math.isfinite(norm):
            return self._skip(batch, step, values, [*faults, f"the gradient's norm is {norm}"][0])
        self.optimizer.step()
        self.method.after_step(step)
        self.skipped = 0
        return values

    def _skip(self, batch: dict, step: int, losses: dict, fault: str) -> dict[str, float]:
        """Count a step that changed no weights and keep the first of a row for `replay`; UserError after PATIENCE."""
        self.skipped += 1
        file = self.out / "bad_step.pt"
        if self.skipped == 1 and distributed.rank() == 0:
            dump = {"batch": batch, "step": step, "method": self.method.state_dict()}
            write_whole(file, lambda where: torch.save(dump, where))
        said = f"step {self.step}: {fault}"
        if self.skipped >= PATIENCE:
            said += f"; the {PATIENCE}th such step in a row (to look into the first: replay({str(file)!r}))"
            raise UserError(f"{said}; the last good checkpoint is {self.last_good}")
        print(f"warning: {said}, so it is skipped; its batch is in {file}", file=sys.stderr)
        return losses

    def rehearse(self) -> None:
        """Run the largest steps once, so that a want of memory shows now; changes nothing."""
        views = self.recipe.views
        sizes = [size for part in (self.splits.labelled, self.splits.unlabelled) for size in part.sizes]
        size = max(sizes, key=lambda size: size[0] * size[1])
        if views.short_sides:
            size = (max(views.short_sides), views.long_side)
        if getattr(self.method.student.backbone, "pad_before_backbone", False):
            size = tuple(map(padded_side, size))  # as among images of other sizes
        most = min(self.recipe.max_pseudo_boxes, 100)  # more confident boxes in one image do not happen in practice
        self.engine.rehearse(size, self.recipe.labelled_images, self.unlabelled, most)

    def _loader(self):
        """The batches of the steps that are left."""
        how = (self.recipe.views, self.config["seed"], self.config.get("skip_unreadable", False))
        batches = Batches(self.splits, self.recipe.labelled_images, self.unlabelled, *how)
        steps = range(self.offset + self.step, self.offset + self.config["steps"])
        workers = {"num_workers": self.workers, "prefetch_factor": 4 if self.workers else None}
        workers |= {"worker_init_fn": ignore_signals, "pin_memory": self.device.type == "cuda"}  # see to_device
        return torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, **workers)

    def _batches(self):
        """What the loader gives. If it fails nothing keeps the loader: its processes would outlive the program."""
        try:
            yield from self._loader()
        except BaseException as problem:
            traceback.clear_frames(problem.__traceback__)
            raise

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config["steps"]

    def _clock(self) -> float:
        """The seconds since this was last asked, added to those of the run."""
        spent, self.began = time.perf_counter() - self.began, time.perf_counter()
        self.seconds += spent
        return spent

    def _line(self, losses: dict) -> dict:
        """A line for the log, measured where that is due."""
        images = (self.step - self.logged) * (self.recipe.labelled_images + self.unlabelled)
        line = {
            "step": self.step,
            "losses": {name: round(value, 5) for name, value in losses.items() if math.isfinite(value)},
            **mean_stats(self.method.stats),
            "images_per_second": round(images / max(self._clock(), 1e-9), 2),
            "seconds": round(self.seconds, 1),
        }
        alarm = self.method.collapse_warning() if self.unlabelled else None
        line |= {"alarm": alarm} if alarm else {}
        return line | (self._measure() if self._due(self.recipe.evaluate_every) else {})

    def _log(self, line: dict) -> None:
        """Write a line to the log, save."""
        self.logged = self.step
        if distributed.rank():
            return self.save()
        if self._due(self.recipe.watch_every) and self.unlabelled:
            watched = watched_boxes(self.method, self.splits.unlabelled, self.step)
            append_lines(self.out / "pseudo_boxes.jsonl", watched)
        append_lines(self.out / "log.jsonl", [_plain(line)])
        if not self.quiet:
            tqdm.write(summary(self.config["method"], line))
        self.save()
        self.began = time.perf_counter()

    def _measure(self) -> dict:
        """AP on the tune split, quality of the pseudo-boxes on watched images, and at the end AP on the test split."""
        line = {}
        for part in ("student", "teacher"):
            found = measure(getattr(self.method, part), self.splits.tune, self.recipe.evaluate_images)
            line |= {f"AP_{part}": round(found["AP"], 4), f"AP50_{part}": round(found["AP50"], 4)}
        if self.unlabelled:
            line |= pseudo_quality(self.method, self.splits.unlabelled)
            line |= duplicates(self.method.teacher, self.splits.tune, self.recipe.evaluate_images)
        if self.step == self.config["steps"]:
            parts = {"student": self.method.student, "teacher": self.method.teacher}
            line["test"] = {part: measure(detector, self.splits.test) for part, detector in parts.items()}
        return line

    def save(self) -> None:
        """Weights and everything a resume needs, each file whole or not at all."""
        if distributed.rank():  # the first process writes
            self.last_good = f"{self.out / 'last.pt'} (step {self.step})"
            return
        kind = (self.config["detector"], self.arguments, self.splits.categories)
        for part in ("student", "teacher"):
            save_weights(self.out / f"{part}.safetensors", getattr(self.method, part), *kind)
        self._clock()
        state = {
            "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
            "nms": self.method.student.nms, "step": self.step, "offset": self.offset, "seconds": self.seconds,
            "skipped": self.skipped,
            "config": json.dumps(self.config),
        }  # fmt: skip
        write_whole(self.out / "last.pt", lambda where: torch.save(state, where))
        self.last_good = f"{self.out / 'last.pt'} (step {self.step})"

    def _drop_later_lines(self) -> None:
        """Lines of steps after the checkpoint (or of a run that never saved) are written again; drop them."""
        for name in ("log.jsonl", "pseudo_boxes.jsonl"):
            if os.path.lexists(self.out / name):  # a link is replaced, never followed to write
                lines = read_lines(self.out / name, unfinished=True)
                with reading(self.out / name, "not the log of a run"):
                    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= self.step]
                write_whole(self.out / name, "".join(kept))


class Stop:
    """While inside, Ctrl-C and SIGTERM are noted in `asked`, and a second one is obeyed; `at_once` obeys the first."""

    def __init__(self):
        self.asked, self.waits, self.status, self.first = False, True, 130, 0.0
        self.before: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self.before = {one: signal.signal(one, self._note) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        again = self.asked and time.monotonic() > self.first + 5 * (distributed.world_size() > 1)  # torchrun doubles it
        self.first = self.first if self.asked else time.monotonic()
        self.asked, self.status = True, 128 + number
        if again or not self.waits:
            self.now()

    def now(self) -> None:
        """Stop."""
        raise KeyboardInterrupt

    @contextmanager
    def at_once(self):
        """What is done inside may be broken off."""
        self.waits = False
        try:
            if self.asked:
                self.now()
            yield
        finally:
            self.waits = True


def ignore_signals(worker: int) -> None:
    """In a process that loads data: Ctrl-C and SIGTERM, which may reach a whole group of processes, are the run's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def replay(file) -> dict[str, torch.Tensor]:
    """The losses of a step that was skipped, from the `bad_step.pt` it left in a run folder; nothing is trained.

    Raises UserError for a file that is no such step.
    """
    file = Path(file)
    dump, run = load_state(file), Run({}, file.parent, resume=True, workers=0, quiet=True)
    with reading(file, "not a step that was skipped"):
        fill(run.method, dump["method"], file)
        return run.method(dump["batch"], dump["step"])


def _plain(line):
    """Numbers as json has them: no nan."""
    if isinstance(line, dict):
        return {key: _plain(value) for key, value in line.items()}
    return None if isinstance(line, float) and not math.isfinite(line) else line


def mean_stats(stats: dict[str, float]) -> dict[str, float]:
    """Each figure's mean over the processes."""
    found = distributed.all_gather(stats)
    return {name: sum(one[name] for one in found) / len(found) for name in stats}


def fingerprint(splits: Splits) -> list:
    """What tells one choice of images from another: their sizes and, where there are such, indices and ids."""
    parts = (splits.labelled, splits.unlabelled, splits.tune, splits.test)
    ids = [getattr(getattr(part, "dataset", part), "image_ids", None) for part in parts]
    return [(part.sizes, getattr(part, "indices", None), own) for part, own in zip(parts, ids, strict=True)]


def make_optimizer(method: TeacherStudent, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, the backbone at its own rate."""
    backbone, rest = [], []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            (backbone if ".backbone." in name else rest).append(parameter)
    groups = [
        {"params": rest, "lr": recipe.learning_rate},
        {"params": backbone, "lr": recipe.learning_rate * recipe.backbone_factor},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, a tenth after each of `drops`, linear fall to zero over the last `decay` of steps."""
    rising = min(1.0, (step + 1) / (recipe.warm_up + 1)) * 0.1 ** sum(step >= drop * steps for drop in recipe.drops)
    falling = min(1.0, (steps - step) / (recipe.decay * steps)) if recipe.decay else 1.0
    return rising * falling


def summary(method: str, line: dict) -> str:
    """A log line for people."""
    parts = [f"{method} step {line['step']}", f"loss {sum(line['losses'].values()):.2f}"]
    if "pseudo_per_image" in line:
        parts.append(f"{line['pseudo_per_image']:.1f} pseudo-boxes per image")
    if "AP_teacher" in line:
        parts.append(f"AP student {100 * line['AP_student']:.1f}, teacher {100 * line['AP_teacher']:.1f}")
    parts += [f"{line['images_per_second']:.0f} images/s", *([f"ALARM: {line['alarm']}"] if "alarm" in line else [])]
    return " | ".join(parts)
