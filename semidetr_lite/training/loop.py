"""The training loop, one for every method.

A method is `losses = method(batch, step)` and `method.after_step(step)`.

    Run(config, out).run()    config: see settings.new_config; files in `out`: see run_folder.py

A run may start from another one (`burn_in`): it takes over the weights of student and teacher, and
its step count goes on; the optimizer starts anew.

A run can be killed at any moment and goes on with --resume to the same end, bit for bit. It
is saved before it is measured, and one that is killed while it measures does so again.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from semidetr_lite import distributed
from semidetr_lite.contracts import Batch
from semidetr_lite.data.batches import Batches
from semidetr_lite.data.mixing import check_blocks
from semidetr_lite.data.splits import Splits
from semidetr_lite.data.views import resized
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.start_weights import reorder_classes, start_from
from semidetr_lite.detectors.weight_files import is_weights_file
from semidetr_lite.device import to_host
from semidetr_lite.errors import Stopped, UserError, as_user_error
from semidetr_lite.methods.mean_teacher import TeacherStudent
from semidetr_lite.training import photos, presets
from semidetr_lite.training.checkpoint import load_state, load_state_strict
from semidetr_lite.training.engine import Engine, check_micro_batches, choose_precision
from semidetr_lite.training.measure import (
    class_warning,
    duplicates,
    measure,
    measure_classes,
    objects_per_class,
    pseudo_box_log,
    pseudo_quality,
)
from semidetr_lite.training.memory import (
    MAX_BOXES,
    choose_micro_batches,
    gpu_memory_of,
    largest_size,
    memory_dry_run,
    peak_memory,
    possible_micro_batches,
    raise_if_out_of_memory,
    time_of_step,
)
from semidetr_lite.training.run_folder import RunFolder, load_burn_in
from semidetr_lite.training.settings import Config, Runtime, Settings, check, differences
from semidetr_lite.training.signals import SignalHandler, ignore_signals

LONG_RUN = 24 * 3600  # seconds
PATIENCE = 3  # steps in a row without a finite loss and gradient after which a run gives up


def train_or_resume(config: Config, folder: Path, workers: int = 1, quiet: bool = False) -> Path:
    """Train a run to its end from wherever it stands; returns its folder.

    `workers` and `quiet`: see Run.
    Raises UserError where the folder holds a run with other settings than these.
    """
    run_folder = RunFolder(folder)
    if (folder / "config.json").exists():
        stored = _as_given(run_folder.open_stored()[0], config)
        for path in differences(stored, config):
            fault = f"{folder}: holds a run with another {'.'.join(path)}"
            raise UserError(f"{fault}; choose another --out")
    resume = run_folder.last.exists()
    run = Run(config, folder, resume=resume, workers=workers, quiet=quiet)
    if not run.finished:
        if not quiet:
            labelled = len(run.splits.labelled)
            steps = f"{config.method}, {config.steps} steps"
            print(f"{folder}: {steps}, {labelled} labelled images", flush=True)
        run.run()
    return folder


def _as_given(stored: Config, given: Settings) -> Config:
    """A stored run, less what may differ from it on resume.

    Threads, precision and micro-batches are chosen, a burn-in moves, and a run that has begun
    needs no first weights.
    """
    runtime = dataclasses.replace(
        stored.runtime, threads=given.runtime.threads, precision=given.runtime.precision
    )
    if given.runtime.accumulate == "auto":
        runtime = dataclasses.replace(runtime, accumulate="auto")
    kwargs = stored.detector_kwargs
    if kwargs.query_init is None:  # of a run that began before there was a choice
        kwargs = dataclasses.replace(kwargs, query_init=given.detector_kwargs.query_init)
    stored = dataclasses.replace(
        stored, runtime=runtime, burn_in=given.burn_in, detector_kwargs=kwargs
    )
    if given.preset == "photos":  # what was left open is chosen in the stored one
        return photos.reopened(stored, given)
    return stored


class Run:
    """A run folder in the making.

    Args:
        config: from new_config; with `resume` that of the folder counts, and this may be None.
        out: the run folder.
        resume: go on from `last.pt` in it, or begin again if it has none yet.
        splits: the data, if already loaded.
        workers: processes that load data; 0 loads in this one.
        quiet: no progress bar, no lines.
        runtime: speed and memory options that a resumed run goes on with, whatever it had before;
            its threads do not count.
        skip_unreadable: whether a resumed run goes on without files that cannot be read, whatever
            it did before.

    Raises UserError for settings that cannot be, and for a folder that does not fit.
    """

    def __init__(
        self,
        config: Config | None,
        out: str | Path,
        resume: bool = False,
        splits: Splits | None = None,
        workers: int = 1,
        quiet: bool = False,
        runtime: Runtime | None = None,
        skip_unreadable: bool | None = None,
    ):
        self.folder, self.workers = RunFolder(out), workers
        self.out = self.folder.path
        self.quiet = quiet or distributed.rank() > 0
        if workers < 0:
            raise UserError(f"--workers must be at least 0, got {workers}")
        state, origin = None, "the options"
        if resume:
            config, state = self.folder.open_stored()
            origin = str(self.folder.path / "config.json")
        else:
            self.folder.open_new()
        if config is None:
            raise ValueError("a new run needs a config; only resume=True goes without")
        if skip_unreadable is not None:
            data_files = dataclasses.replace(config.data_files, skip_unreadable=skip_unreadable)
            config = dataclasses.replace(config, data_files=data_files)
        if runtime:
            runtime = dataclasses.replace(runtime, threads=config.runtime.threads)
            config = dataclasses.replace(config, runtime=runtime)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = _resolve_runtime(check(config, origin), self.device)
        self.splits = splits or presets.load_splits(config, origin)
        config, self.notes = photos.plan(config, self.splits, self.device)
        self.chooses_micro_batches = config.runtime.accumulate == "auto"
        if self.chooses_micro_batches:
            config = self._with_micro_batches(config, self._possible_micro_batches(config)[0])
        self.config = dataclasses.replace(config, categories=self.splits.categories)
        optimizer, accumulate = config.optimizer, cast(int, config.runtime.accumulate)
        self.unlabelled = 0  # images of a step
        check_micro_batches("labelled", optimizer.batch_size, accumulate)
        if config.method != "supervised":
            self.unlabelled = optimizer.unlabelled_batch_size
            check_micro_batches("unlabelled", self.unlabelled, accumulate)
        self.step, self.seconds, self.offset, self.skipped = 0, 0.0, 0, 0
        # the best AP so far {"AP", "weights", "step"}, and the measurements since then
        self.best: dict | None = None
        self.measured_since_best = 0
        self.stopped_early = False
        self.better_with_nms: dict[str, float] = {}  # {"student" or "teacher": IoU}, see try_nms
        # the log line of a step that is saved and not measured yet, and the method's figures then
        self.unmeasured: dict | None = None
        self.logged_step, self.clock = 0, time.perf_counter()
        settings = dataclasses.replace(self.config, commit=None, machine=None, command=None)
        given = (state and state["step"], settings, fingerprint(self.splits))
        distributed.assert_same_on_all_ranks("images, labels or settings", *given)
        with as_user_error(self.folder.last if state else self.folder.path, "cannot be built"):
            self._build(state)
        if state:
            self.folder.note_saved(self.step)

    def _build(self, state: dict | None) -> None:
        """Student, method and optimizer; from a checkpoint, from a burn-in run, or new."""
        config, burn_in = self.config, None
        if state:
            self.step, self.seconds = state["step"], state["seconds"]
            self.offset, self.skipped = state["offset"], state.get("skipped", 0)
            self.best, self.unmeasured = state.get("best"), state.get("unmeasured")
            self.measured_since_best = state.get("measured_since_best", 0)
            self.stopped_early = state.get("stopped_early", False)
            self.better_with_nms = state.get("better_with_nms", {})
        elif config.burn_in:
            burn_in = self._load_burn_in(config.burn_in)
            self.offset = burn_in["offset"] + burn_in["step"]
        torch.manual_seed(config.seed)
        kwargs = config.detector_kwargs
        own_file = is_weights_file(kwargs.backbone_weights or "")
        if state or burn_in or config.weights and not own_file:  # weights replace the backbone's
            kwargs = dataclasses.replace(kwargs, backbone_weights=None)
        student = presets.make_detector(config.detector, len(self.splits.categories), kwargs)
        if config.weights and not state:
            report = start_from(student, config.weights, self.splits.categories)
            if distributed.rank() == 0:
                print("\n".join(report.lines()), file=sys.stderr)
        student.train_sides = _longer_sides(self.splits) if student.test_size is None else None
        self.method: TeacherStudent = presets.make_method(
            config.method, student, config, config.steps, self.offset, config.seed
        )
        self.method.to(self.device).train()
        self.optimizer = make_optimizer(self.method, config)
        self.engine = Engine(self.method, config.runtime, config.optimizer.batch_size)
        parts = self.engine.num_micro_batches * distributed.world_size()
        check_blocks(config.views.mixing, self.unlabelled, parts)
        if state:
            load_state_strict(self.method, state["method"], self.folder.last)
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.student.nms = self.method.teacher.nms = state["nms"]
        elif config.burn_in and burn_in:
            for name in ("student", "teacher"):
                tensors = {
                    key.removeprefix(f"{name}."): value
                    for key, value in burn_in["method"].items()
                    if key.startswith(f"{name}.")
                }
                file = Path(config.burn_in) / "last.pt"
                tensors = self._with_our_classes(tensors, burn_in, file)
                load_state_strict(getattr(self.method, name), tensors, file)

    def _with_our_classes(self, tensors: dict, burn_in: dict, file: Path) -> dict:
        """The weights of a burn-in run with the class rows in the order of this run's classes.

        Raises UserError for other classes.
        """
        stored = json.loads(burn_in["config"]).get("categories")
        if not stored:
            return tensors
        ours = [str(row["name"]) for row in self.splits.categories]
        return reorder_classes(tensors, [str(row["name"]) for row in stored], ours, file)

    @staticmethod
    def _possible_micro_batches(config: Config) -> list[int]:
        """The numbers of micro-batches that a step can be run in, the highest first."""
        unlabelled = 0 if config.method == "supervised" else config.optimizer.unlabelled_batch_size
        return possible_micro_batches(config.optimizer.batch_size, unlabelled)

    @staticmethod
    def _with_micro_batches(config: Config, count: int) -> Config:
        runtime = dataclasses.replace(config.runtime, accumulate=count)
        return dataclasses.replace(config, runtime=runtime)

    def choose_micro_batches(self) -> None:
        """With `--accumulate auto`: try on this GPU how few micro-batches fit, and store it."""
        if not self.chooses_micro_batches:
            return

        def largest_step(count: int) -> tuple[int, int]:
            self.engine.set_micro_batches(count)
            return gpu_memory_of(self.memory_dry_run)

        count = choose_micro_batches(self._possible_micro_batches(self.config), largest_step)
        self.engine.set_micro_batches(count)
        self.config = self._with_micro_batches(self.config, count)
        self.chooses_micro_batches = False
        if not self.quiet:
            print(f"{self.out}: {count} micro-batches (--accumulate auto)", flush=True)

    def _load_burn_in(self, folder: str) -> dict:
        """The checkpoint to start from.

        A warning if it may have seen other labels than this run has.
        """
        state, stored = load_burn_in(folder)
        keys = ("data", "percent", "fold")
        other = [
            f"{key} {stored.get(key)}"
            for key in keys
            if stored.get(key) != getattr(self.config, key)
        ]
        if other and distributed.rank() == 0:
            fault = f"warning: {folder} was trained with {', '.join(other)}"
            meaning = "what it learned may come from labels that this run does not have"
            print(f"{fault}: {meaning}", file=sys.stderr)
        return state

    def run(self) -> dict:
        """Train to the end; returns the last log line, with the AP on the test split under "test".

        Raises Stopped after Ctrl-C or SIGTERM, UserError where it cannot go on.
        """
        self.choose_micro_batches()
        if distributed.rank() == 0:  # a step that is still to be measured has no lines yet
            self.folder.begin(self.config, self.step - bool(self.unmeasured))
        self.logged_step, self.clock = self.step, time.perf_counter()
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.config.method,
            mininterval=2,
            dynamic_ncols=True,
            disable=self.quiet,
        )
        # The bar is closed also when something goes wrong: the error gets a line of its own.
        with SignalHandler() as signals, bar:
            try:
                return self._run_steps(signals, bar)
            except KeyboardInterrupt:
                last_good = self.folder.last_good
                raise Stopped(
                    f"stopped; the last checkpoint is {last_good}", signals.status
                ) from None
            except (RuntimeError, ConnectionError, EOFError) as problem:
                raise_if_out_of_memory(problem, self.config.runtime, self.engine.precision)
                self._raise_if_worker_died(problem)
                raise

    def _run_steps(self, signals: SignalHandler, bar: tqdm) -> dict:
        """The steps that are left, with the log and checkpoints between them.

        Returns the last log line.
        """
        line: dict = {}
        if self.device.type == "cuda":
            self.memory_dry_run()
        if self.config.preset == "photos" and self.step == 0 and not self.quiet:
            tqdm.write(self.cost_of_a_step())
        if self.unmeasured:
            line = self._measure_and_log(self.unmeasured, signals)
        for batch in self._batches() if not self.finished else ():
            losses = self.train_step(batch)
            self.step += 1
            bar.update()
            if self._due(self.config.measuring.log_every):
                unmeasured = {"line": self._line(losses), "stats": dict(self.method.stats)}
                line = self._measure_and_log(unmeasured, signals)
            requested = any(distributed.all_gather(signals.requested))
            if requested and not self.finished:
                self.save()
                distributed.all_gather("saved")  # the first that ends takes the others with it
                signals.interrupt()
            if self.finished:
                break
        return line

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train or to measure."""
        at_the_end = self.step >= self.config.steps or self.stopped_early
        return at_the_end and self.unmeasured is None

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step.

        The losses as floats. It changes nothing where a loss or the gradient is not finite.
        """
        step, config = self.offset + self.step, self.config
        factor = learning_rate_factor(self.step, config.steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        means_of_parts: list[torch.Tensor] = []
        for losses, means in self.engine.losses(batch, step):
            cast(torch.Tensor, sum(losses.values())).backward()
            names += losses
            means_of_parts.append(means)
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_grad_norm)
        # one copy to the CPU, after the last micro-batch
        *numbers, norm = to_host(torch.cat([*means_of_parts, norm[None]])).tolist()
        values = dict.fromkeys(names, 0.0)
        for name, number in zip(names, numbers, strict=True):
            values[name] += number
        faults = [
            f"loss {name!r} is {value}"
            for name, value in values.items()
            if not math.isfinite(value)
        ]
        if not math.isfinite(norm):
            faults.append(f"the gradient's norm is {norm}")
        if faults:
            self._skip(batch, step, faults[0])
            return values
        self.optimizer.step()
        self.method.after_step(step)
        self.skipped = 0
        return values

    def _skip(self, batch: Batch, step: int, fault: str) -> None:
        """Count a step that changed no weights and keep the first of a row.

        UserError after PATIENCE of them.
        """
        self.skipped += 1
        file = self.folder.path / "bad_step.pt"
        if self.skipped == 1 and distributed.rank() == 0:
            file = self.folder.save_bad_step(batch, step, self.method)
        fault = f"step {self.step}: {fault}"
        if self.skipped >= PATIENCE:
            advice = f"to look into the first: replay({str(file)!r})"
            fault += f"; the {PATIENCE}th such step in a row ({advice})"
            raise UserError(f"{fault}; the last good checkpoint is {self.folder.last_good}")
        print(f"warning: {fault}, so it is skipped; its batch is in {file}", file=sys.stderr)

    def _raise_if_worker_died(self, problem: Exception) -> None:
        """Raises UserError if the problem is that a process that loads data is gone."""
        cut_off = isinstance(problem, ConnectionError | EOFError) and self.workers
        if not cut_off and "DataLoader worker" not in str(problem):
            return
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        fault = f"a process that loads data died ({reason}), perhaps for lack of memory"
        advice = f"use fewer --workers and --resume from {self.folder.last_good}"
        raise UserError(f"{fault}: {advice}") from None

    def memory_dry_run(self) -> None:
        """Run the largest steps once, so that a lack of memory shows now; changes nothing."""
        size = largest_size(self.config, self.splits, self.method.student)
        max_boxes = min(self.config.pseudo_labels.max_pseudo_boxes, MAX_BOXES)
        batch_size = self.config.optimizer.batch_size
        memory_dry_run(self.engine, size, batch_size, self.unlabelled, max_boxes)

    def cost_of_a_step(self) -> str:
        """Seconds and memory of a step, measured now, and the length of the run; for people."""
        config = self.config
        sizes = sorted(self.splits.labelled.sizes, key=lambda size: size[0] * size[1])
        size = sizes[len(sizes) // 2]
        if config.views.short_sides:
            size = resized(size, max(config.views.short_sides), config.views.long_side)
        batch_size = config.optimizer.batch_size
        seconds = time_of_step(self.engine, size, batch_size, self.unlabelled)
        memory = peak_memory(self.device)
        cost = f"a step takes {seconds:.1f} s" + (f" and {memory:.1f} GB" if memory else "")
        length = duration(seconds * config.steps)
        line = f"{cost}, measured; {config.steps} steps take {length} and the time to measure AP"
        if seconds * config.steps > LONG_RUN:
            line += "\nwarning: that is long; lower --image-size"
            line += f" (now {config.image_size}), --batch-size (now {batch_size}) or --steps"
        return line

    def _loader(self) -> torch.utils.data.DataLoader:
        """The batches of the steps that are left."""
        config = self.config
        batches = Batches(
            self.splits,
            config.optimizer.batch_size,
            self.unlabelled,
            config.views,
            config.seed,
            config.data_files.skip_unreadable,
        )
        return torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=range(self.offset + self.step, self.offset + config.steps),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=ignore_signals,
            pin_memory=self.device.type == "cuda",  # see to_device
        )

    def _batches(self) -> Iterator[Batch]:
        """What the loader gives.

        If it fails nothing keeps the loader: its processes would outlive the program.
        """
        try:
            yield from self._loader()
        except BaseException as problem:
            traceback.clear_frames(problem.__traceback__)
            raise

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _advance_clock(self) -> float:
        """The seconds since this was last called, added to those of the run."""
        now = time.perf_counter()
        spent, self.clock = now - self.clock, now
        self.seconds += spent
        return spent

    def _line(self, losses: dict[str, float]) -> dict:
        """A line for the log, before anything is measured."""
        per_step = self.config.optimizer.batch_size + self.unlabelled
        images = (self.step - self.logged_step) * per_step
        line = {
            "step": self.step,
            "losses": {
                key: round(value, 5) for key, value in losses.items() if math.isfinite(value)
            },
            **mean_stats(self.method.stats),
            "images_per_second": round(images / max(self._advance_clock(), 1e-9), 2),
            "seconds": round(self.seconds, 1),
        }
        warning = self._teacher_warning() if self.unlabelled else None
        if warning:
            line["alarm"] = warning
        return line

    def _teacher_warning(self) -> str | None:
        """A sentence if the teacher has collapsed, or if it has lost a class."""
        collapsed = self.method.collapse_warning()
        if collapsed:
            return collapsed
        names = [str(row["name"]) for row in self.splits.categories]
        counts = self.method.pseudo_boxes_per_class.tolist()
        return class_warning(counts, self.labelled_per_class, names)

    @cached_property
    def labelled_per_class(self) -> list[float]:
        """Objects of each class per labelled image."""
        return objects_per_class(self.splits.labelled, len(self.splits.categories))

    def _measure_and_log(self, unmeasured: dict, signals: SignalHandler) -> dict:
        """Measure the run where that is due, after it is saved; log and save; returns the line."""
        line, self.method.stats = dict(unmeasured["line"]), unmeasured["stats"]
        if self._due(self.config.measuring.evaluate_every):
            self.unmeasured = unmeasured
            self.save()
            with signals.interruptible():  # it may take minutes
                line |= self._measure()
            self.unmeasured = None
        self._log(line)
        return line

    def _measure(self) -> dict:
        """AP on the tune split, quality of pseudo-boxes, and at the end AP on the test split."""
        line, images = {}, self.config.measuring.evaluate_images
        student, teacher = self.method.student, self.method.teacher
        aps = {}
        for name, detector in (("student", student), ("teacher", teacher)):
            figures = self._measure_on_tune(name, detector)
            aps[name] = figures["AP"]
            line[f"AP_{name}"] = round(figures["AP"], 4)
            line[f"AP50_{name}"] = round(figures["AP50"], 4)
        if self.better_with_nms:
            line["better_with_nms"] = dict(self.better_with_nms)
        self._keep_best(aps)
        if self.unlabelled:
            names = [str(row["name"]) for row in self.splits.categories]
            counts = self.method.pseudo_boxes_per_class.tolist()
            line["pseudo_per_class"] = {
                name: round(count, 3) for name, count in zip(names, counts, strict=True)
            }
            line |= pseudo_quality(self.method, self.splits.unlabelled)
            line |= duplicates(teacher, self.splits.tune, images)
        if self.step == self.config.steps or self.stopped_early:
            line |= {"test": {}, "per_class": {}, "best": self.best}
            for name, detector in (("student", student), ("teacher", teacher)):
                with suppressing(detector, self.better_with_nms.get(name)):
                    found = measure_classes(detector, self.splits.test, self.splits.categories)
                line["test"][name], line["per_class"][name] = found
        return line

    def _measure_on_tune(self, name: str, detector: Detector) -> dict:
        """Figures on the tune split, with suppression if it is to be tried and the AP is higher."""
        images, nms = self.config.measuring.evaluate_images, self.config.measuring.try_nms
        figures = measure(detector, self.splits.tune, images)
        self.better_with_nms.pop(name, None)
        if nms is None or detector.nms is not None:
            return figures
        with suppressing(detector, nms):
            with_nms = measure(detector, self.splits.tune, images)
        if not with_nms["AP"] > figures["AP"]:
            return figures
        self.better_with_nms[name] = nms
        return with_nms

    def _keep_best(self, aps: dict[str, float]) -> None:
        """Keep the weights if they are the best so far; decide whether the run ends early.

        Args:
            aps: AP on the tune split of "student" and "teacher"; nan where there is no truth.
        """
        self.measured_since_best += 1
        for name in ("teacher", "student"):  # of equal ones the teacher
            if aps[name] > (self.best["AP"] if self.best else -1):
                self.best = {"AP": round(aps[name], 6), "weights": name, "step": self.step}
                if name in self.better_with_nms:
                    self.best["nms"] = self.better_with_nms[name]
                self.measured_since_best = 0
        if self.best and self.measured_since_best == 0 and distributed.rank() == 0:
            detector = getattr(self.method, self.best["weights"])
            self.folder.save_best(self.config, detector, self.best)
        patience = self.config.measuring.patience
        self.stopped_early = bool(patience and self.measured_since_best >= patience)

    def _log(self, line: dict) -> None:
        """Write a line to the log, save."""
        self.logged_step = self.step
        if distributed.rank() == 0:
            if self.unlabelled and self._due(self.config.measuring.watch_every):
                watched = pseudo_box_log(self.method, self.splits.unlabelled, self.step)
                self.folder.append_watched(watched)
            self.folder.append_log(line)
            if not self.quiet:
                tqdm.write(f"{summary(self.config.method, line)} | {self._progress()}")
        self.save()
        self.clock = time.perf_counter()

    def _progress(self) -> str:
        """Epoch, the time left and the peak of memory, for people."""
        images = self.step * self.config.optimizer.batch_size
        epoch = images / max(len(self.splits.labelled), 1)
        left = (self.config.steps - self.step) * self.seconds / max(self.step, 1)
        parts = [f"epoch {epoch:.1f}", f"{duration(left)} left"]
        memory = peak_memory(self.device)
        return ", ".join(parts + ([f"{memory:.1f} GB at most"] if memory else []))

    def save(self) -> None:
        """Write weights and everything a resume needs; the first process writes."""
        if distributed.rank():
            self.folder.note_saved(self.step)
            return
        self._advance_clock()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "offset": self.offset,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
            "measured_since_best": self.measured_since_best,
            "stopped_early": self.stopped_early,
            "unmeasured": self.unmeasured,
            "better_with_nms": self.better_with_nms,
        }
        self.folder.save(self.config, self.method, state, self.better_with_nms)


@contextlib.contextmanager
def suppressing(detector: Detector, nms: float | None) -> Iterator[None]:
    """Let a detector use non-maximum suppression at this IoU for a while; None changes nothing."""
    before = detector.nms
    detector.nms = before if nms is None else nms
    try:
        yield
    finally:
        detector.nms = before


def _longer_sides(splits: Splits) -> tuple[int, int]:
    """The longer sides of the smallest and the largest image that is trained on, in pixels."""
    sizes = [*splits.labelled.sizes, *splits.unlabelled.sizes]
    sides = [max(size) for size in sizes if max(size) > 0]  # 0 is of one that cannot be read
    return min(sides, default=0), max(sides, default=0)


def _resolve_runtime(config: Config, device: torch.device) -> Config:
    """Precision and threads, chosen here and stored; on a CPU, one micro-batch for "auto".

    Another number of threads adds numbers in another order.
    """
    threads = config.runtime.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    precision = choose_precision(config.runtime.precision, device)
    runtime = dataclasses.replace(config.runtime, threads=threads, precision=precision)
    if runtime.accumulate == "auto" and device.type != "cuda":
        runtime = dataclasses.replace(runtime, accumulate=1)
    return dataclasses.replace(config, runtime=runtime)


def replay(file: str | Path) -> dict[str, torch.Tensor]:
    """The losses of a step that was skipped, from the `bad_step.pt` it left in a run folder.

    Nothing is trained.
    Raises UserError for a file that is no such step.
    """
    file = Path(file)
    dump = load_state(file)
    run = Run(None, file.parent, resume=True, workers=0, quiet=True)
    with as_user_error(file, "not a step that was skipped"):
        load_state_strict(run.method, dump["method"], file)
        return run.method(dump["batch"], dump["step"])


def mean_stats(stats: dict[str, float | torch.Tensor]) -> dict[str, float]:
    """Each figure's mean over the processes that have one; nan where none has."""
    every = distributed.all_gather({name: float(value) for name, value in stats.items()})
    means = {}
    for name in stats:
        values = [own[name] for own in every if not math.isnan(own[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def fingerprint(splits: Splits) -> list:
    """What tells splits apart: sizes of all images and, where there are such, indices and ids."""
    parts = (splits.labelled, splits.unlabelled, splits.tune, splits.test)
    return [
        (
            part.sizes,
            getattr(part, "indices", None),
            getattr(getattr(part, "dataset", part), "image_ids", None),
        )
        for part in parts
    ]


def make_optimizer(method: TeacherStudent, recipe: Settings) -> torch.optim.Optimizer:
    """AdamW; backbone, projector and what samples the maps have rates of their own."""
    backbone: list[torch.nn.Parameter] = []
    sampling: list[torch.nn.Parameter] = []
    projector: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    sampling_factor = recipe.optimizer.sampling_lr_factor
    projector_factor = recipe.semi_detr.projector_lr_factor
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        samples = ".offsets." in name or ".reference_points." in name
        if ".backbone." in name:
            backbone.append(parameter)
        elif samples and sampling_factor != 1:
            sampling.append(parameter)
        elif name.startswith("projector.") and projector_factor != 1:
            projector.append(parameter)
        else:
            others.append(parameter)
    rate = recipe.optimizer.learning_rate
    groups = [
        {"params": others, "lr": rate},
        {"params": backbone, "lr": rate * recipe.optimizer.backbone_lr_factor},
    ]
    if sampling:
        groups.append({"params": sampling, "lr": rate * sampling_factor})
    if projector:
        groups.append({"params": projector, "lr": rate * projector_factor})
    weight_decay = recipe.optimizer.weight_decay
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(step: int, steps: int, recipe: Settings) -> float:
    """What the learning rate is multiplied by at a step of a run of `steps`.

    It rises linearly in the warm-up, falls to a tenth after each of `lr_drops`, and falls linearly
    to zero over the last `lr_decay_fraction` of the steps.
    """
    schedule = recipe.schedule
    factor = min(1.0, (step + 1) / (schedule.warmup_steps + 1))
    factor *= 0.1 ** sum(step >= drop * steps for drop in schedule.lr_drops)
    if schedule.lr_decay_fraction:
        factor *= min(1.0, (steps - step) / (schedule.lr_decay_fraction * steps))
    return factor


def duration(seconds: float) -> str:
    """A time for people: "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summary(method: str, line: dict) -> str:
    """A log line for people."""
    parts = [f"{method} step {line['step']}", f"loss {sum(line['losses'].values()):.2f}"]
    if "pseudo_per_image" in line:
        parts.append(f"{line['pseudo_per_image']:.1f} pseudo-boxes per image")
    if "AP_teacher" in line:
        better = line.get("better_with_nms", {})
        student, teacher = (
            f"{name} {100 * line[f'AP_{name}']:.1f}" + " (with NMS)" * (name in better)
            for name in ("student", "teacher")
        )
        parts.append(f"AP {student}, {teacher}")
    parts.append(f"{line['images_per_second']:.0f} images/s")
    if "alarm" in line:
        parts.append(f"ALARM: {line['alarm']}")
    return " | ".join(parts)
