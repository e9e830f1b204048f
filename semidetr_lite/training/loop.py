"""The training loop: one for every method, since a method is `losses = method(batch, step)` and
`method.after_step(step)`.

    Run(config, out).run()    config: see settings.new_config; files in `out`: see run_folder.py

A run may start from another one (`burn_in`): it takes over the weights of student and teacher, and
its step count goes on; the optimizer starts anew.

A run can be killed at any moment and goes on with --resume to the same end, bit for bit.
"""

import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from semidetr_lite import distributed
from semidetr_lite.data.batches import Batches
from semidetr_lite.data.splits import Splits
from semidetr_lite.device import to_host
from semidetr_lite.errors import Stopped, UserError, as_user_error
from semidetr_lite.methods.mean_teacher import TeacherStudent
from semidetr_lite.training import presets
from semidetr_lite.training.checkpoint import load_state, load_state_strict
from semidetr_lite.training.engine import Engine, check_micro_batches, choose_precision
from semidetr_lite.training.measure import duplicates, measure, pseudo_box_log, pseudo_quality
from semidetr_lite.training.memory import (
    MAX_BOXES,
    choose_micro_batches,
    gpu_memory_of,
    largest_size,
    memory_dry_run,
    possible_micro_batches,
    raise_if_out_of_memory,
)
from semidetr_lite.training.run_folder import RunFolder, load_burn_in
from semidetr_lite.training.settings import Config, Runtime, Settings, check, differences
from semidetr_lite.training.signals import SignalHandler, ignore_signals

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
    if run.step < config.steps:
        if not quiet:
            labelled = len(run.splits.labelled)
            steps = f"{config.method}, {config.steps} steps"
            print(f"{folder}: {steps}, {labelled} labelled images", flush=True)
        run.run()
    return folder


def _as_given(stored: Config, given: Settings) -> Config:
    """A stored run, less what may differ.

    Threads, precision and micro-batches are chosen, a burn-in moves.
    """
    runtime = dataclasses.replace(
        stored.runtime, threads=given.runtime.threads, precision=given.runtime.precision
    )
    if given.runtime.accumulate == "auto":
        runtime = dataclasses.replace(runtime, accumulate="auto")
    return dataclasses.replace(stored, runtime=runtime, burn_in=given.burn_in)


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
        if runtime:
            runtime = dataclasses.replace(runtime, threads=config.runtime.threads)
            config = dataclasses.replace(config, runtime=runtime)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = _resolve_runtime(check(config, origin), self.device)
        self.chooses_micro_batches = config.runtime.accumulate == "auto"
        if self.chooses_micro_batches:
            config = self._with_micro_batches(config, self._possible_micro_batches(config)[0])
        self.splits = splits or presets.load_splits(config, origin)
        self.config = dataclasses.replace(config, categories=self.splits.categories)
        optimizer, accumulate = config.optimizer, config.runtime.accumulate
        self.unlabelled = 0  # images of a step
        check_micro_batches("labelled", optimizer.batch_size, accumulate)
        if config.method != "supervised":
            self.unlabelled = optimizer.unlabelled_batch_size
            check_micro_batches("unlabelled", self.unlabelled, accumulate)
        self.step, self.seconds, self.offset, self.skipped = 0, 0.0, 0, 0
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
        elif config.burn_in:
            burn_in = self._load_burn_in(config.burn_in)
            self.offset = burn_in["offset"] + burn_in["step"]
        torch.manual_seed(config.seed)
        kwargs = config.detector_kwargs
        if state or burn_in:  # whose weights replace the backbone's
            kwargs = dataclasses.replace(kwargs, backbone_weights=None)
        student = presets.make_detector(config.detector, len(self.splits.categories), kwargs)
        self.method: TeacherStudent = presets.make_method(
            config.method, student, config, config.steps, self.offset, config.seed
        )
        self.method.to(self.device).train()
        self.optimizer = make_optimizer(self.method, config)
        self.engine = Engine(self.method, config.runtime, config.optimizer.batch_size)
        if state:
            load_state_strict(self.method, state["method"], self.folder.last)
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.student.nms = self.method.teacher.nms = state["nms"]
        elif burn_in:
            for name in ("student", "teacher"):
                tensors = {
                    key.removeprefix(f"{name}."): value
                    for key, value in burn_in["method"].items()
                    if key.startswith(f"{name}.")
                }
                load_state_strict(
                    getattr(self.method, name), tensors, Path(config.burn_in) / "last.pt"
                )

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
        if distributed.rank() == 0:
            self.folder.begin(self.config, self.step)
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
        for batch in self._batches():
            losses = self.train_step(batch)
            self.step += 1
            bar.update()
            if self._due(self.config.measuring.log_every):
                # Measuring may take minutes; what is not saved by then is a few steps.
                with signals.interruptible():
                    line = self._measured_line(losses)
                self._log(line)
            requested = any(distributed.all_gather(signals.requested))
            if requested and self.step < self.config.steps:
                self.save()
                distributed.all_gather("saved")  # the first that ends takes the others with it
                signals.interrupt()
        return line

    def train_step(self, batch: dict) -> dict[str, float]:
        """One optimizer step.

        The losses as floats. It changes nothing where a loss or the gradient is not finite.
        """
        step, config = self.offset + self.step, self.config
        factor = learning_rate_factor(self.step, config.steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        names, means_of_parts = [], []
        for losses, means in self.engine.losses(batch, step):
            sum(losses.values()).backward()
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

    def _skip(self, batch: dict, step: int, fault: str) -> None:
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

    def _batches(self) -> Iterator[dict]:
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

    def _measured_line(self, losses: dict[str, float]) -> dict:
        """A line for the log, measured where that is due."""
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
        warning = self.method.collapse_warning() if self.unlabelled else None
        if warning:
            line["alarm"] = warning
        if self._due(self.config.measuring.evaluate_every):
            line |= self._measure()
        return line

    def _measure(self) -> dict:
        """AP on the tune split, quality of pseudo-boxes, and at the end AP on the test split."""
        line, images = {}, self.config.measuring.evaluate_images
        student, teacher = self.method.student, self.method.teacher
        for name, detector in (("student", student), ("teacher", teacher)):
            figures = measure(detector, self.splits.tune, images)
            line[f"AP_{name}"] = round(figures["AP"], 4)
            line[f"AP50_{name}"] = round(figures["AP50"], 4)
        if self.unlabelled:
            line |= pseudo_quality(self.method, self.splits.unlabelled)
            line |= duplicates(teacher, self.splits.tune, images)
        if self.step == self.config.steps:
            test = self.splits.test
            line["test"] = {"student": measure(student, test), "teacher": measure(teacher, test)}
        return line

    def _log(self, line: dict) -> None:
        """Write a line to the log, save."""
        self.logged_step = self.step
        if distributed.rank() == 0:
            if self.unlabelled and self._due(self.config.measuring.watch_every):
                watched = pseudo_box_log(self.method, self.splits.unlabelled, self.step)
                self.folder.append_watched(watched)
            self.folder.append_log(line)
            if not self.quiet:
                tqdm.write(summary(self.config.method, line))
        self.save()
        self.clock = time.perf_counter()

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
        }
        self.folder.save(self.config, self.method, state)


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


def mean_stats(stats: dict[str, float]) -> dict[str, float]:
    """Each figure's mean over the processes."""
    every = distributed.all_gather(stats)
    return {name: sum(own[name] for own in every) / len(every) for name in stats}


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
    """AdamW, the backbone at its own rate."""
    backbone, others = [], []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            (backbone if ".backbone." in name else others).append(parameter)
    rate = recipe.optimizer.learning_rate
    groups = [
        {"params": others, "lr": rate},
        {"params": backbone, "lr": rate * recipe.optimizer.backbone_lr_factor},
    ]
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


def summary(method: str, line: dict) -> str:
    """A log line for people."""
    parts = [f"{method} step {line['step']}", f"loss {sum(line['losses'].values()):.2f}"]
    if "pseudo_per_image" in line:
        parts.append(f"{line['pseudo_per_image']:.1f} pseudo-boxes per image")
    if "AP_teacher" in line:
        student, teacher = 100 * line["AP_student"], 100 * line["AP_teacher"]
        parts.append(f"AP student {student:.1f}, teacher {teacher:.1f}")
    parts.append(f"{line['images_per_second']:.0f} images/s")
    if "alarm" in line:
        parts.append(f"ALARM: {line['alarm']}")
    return " | ".join(parts)
