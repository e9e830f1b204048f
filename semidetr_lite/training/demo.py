"""The demo: a supervised start, then supervised training and Semi-DETR for the same time.

Supervised and semi-supervised training start from the same weights, see the same labelled scenes
and take about the same time, so their difference is what the unlabelled scenes bring. They run side
by side, as two processes of one thread each.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from semidetr_lite.errors import Stopped, UserError
from semidetr_lite.files import read_jsonl
from semidetr_lite.training.loop import summary, train_or_resume
from semidetr_lite.training.settings import METHOD_TITLES, new_config


class DemoRun(NamedTuple):
    """One training of the demo."""

    method: str
    burn_in: str | None  # the run it starts from
    steps: int
    role: str = ""  # in the demo, where the method alone does not say it

    @property
    def title(self) -> str:
        """Its name in what the demo prints."""
        return METHOD_TITLES[self.method] + self.role


# 1,250 supervised steps take as long as 500 of Semi-DETR (benchmarks/step_cost.py).
DEMO_RUNS = {
    "supervised": DemoRun("supervised", None, 1000, " burn-in"),
    "control": DemoRun("supervised", "supervised", 1250, ", same time"),
    "semi-detr": DemoRun("semi-detr", "supervised", 500),
    "mean-teacher": DemoRun("mean-teacher", "supervised", 500),
}
TITLES = {name: run.title for name, run in DEMO_RUNS.items()}
QUICK_INTERVALS = {
    "log_every": 2,
    "evaluate_every": 4,
    "watch_every": 4,
    "evaluate_images": 20,
}  # of a run of 4 steps


def train_demo_run(
    name: str, out: Path, seed: int, folder: str | None = None, quiet: bool = False, **changes
) -> Path:
    """Train one of DEMO_RUNS to its end, from wherever it stands; returns its folder.

    Args:
        name: a key of DEMO_RUNS.
        out: where the folders of all runs are, also that of its burn-in.
        seed: of weights, views and noise.
        folder: name of its folder in `out`; `name` if not given.
        quiet: print nothing.
        changes: arguments of `new_config` that differ.

    Raises UserError where the folder holds a run with other settings.
    """
    run = DEMO_RUNS[name]
    burn_in = str(out / run.burn_in) if run.burn_in else None
    settings = {"steps": run.steps, "burn_in": burn_in, **changes}
    config = new_config("digits", run.method, seed=seed, **settings)
    return train_or_resume(config, out / (folder or name), workers=0, quiet=quiet)


def train_side_by_side(names: list[str], out: Path, seed: int, **changes) -> list[Path]:
    """Train several of DEMO_RUNS at the same time, each in a process; returns their folders.

    Each process has one thread. One progress bar counts the steps of all. Where one fails or the
    user stops the program, each saves and ends.

    Raises UserError with the message of a run that failed, Stopped after Ctrl-C or SIGTERM.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may lock up
    messages = context.SimpleQueue()
    processes = {}
    for name in names:
        arguments = (messages, name, out, seed, changes)
        processes[name] = context.Process(target=_train_in_child, args=arguments, name=name)
    with _SignalsAsExceptions():
        try:
            for process in processes.values():
                process.start()
            _follow(processes, out, changes.get("steps"))
        except KeyboardInterrupt as stop:
            _end(processes)
            status = stop.args[0] if stop.args else 130
            raise Stopped("stopped; what was trained is saved", status) from None
    failed = [name for name, process in processes.items() if process.exitcode]
    if failed:
        fallback = f"{failed[0]} ended with status {processes[failed[0]].exitcode}"
        raise UserError(fallback if messages.empty() else messages.get())
    return [out / name for name in names]


def _train_in_child(messages, name: str, out: Path, seed: int, changes: dict) -> None:
    """What a process of `train_side_by_side` does; its exit status says how it went."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C goes to the program, which passes it on once
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        train_demo_run(name, out, seed, quiet=True, threads=1, **changes)
    except UserError as problem:
        messages.put(str(problem))
        sys.exit(2)
    except KeyboardInterrupt as stop:
        sys.exit(stop.args[1] if isinstance(stop, Stopped) else 130)


def _stop_with_parent() -> None:
    """End this process, after it has saved, when the program that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:  # None only in a program that nobody started as a child
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _follow(processes: dict, out: Path, steps: int | None) -> None:
    """Show what the processes log until all have ended; if one fails the others are ended."""
    total = sum(steps or DEMO_RUNS[name].steps for name in processes)
    logged = {
        name: len(read_jsonl(out / name / "log.jsonl", unfinished=True)) for name in processes
    }
    with tqdm(total=total, unit="step", mininterval=2, dynamic_ncols=True) as bar:
        while any(process.is_alive() for process in processes.values()):
            wait(
                [process.sentinel for process in processes.values() if process.is_alive()],
                timeout=1,
            )
            done = 0
            for name in processes:
                lines = read_jsonl(out / name / "log.jsonl", unfinished=True)
                for line in lines[logged[name] :]:
                    if "AP_teacher" in line:
                        tqdm.write(summary(DEMO_RUNS[name].title, line))
                logged[name] = max(logged[name], len(lines))
                done += lines[-1]["step"] if lines else 0
            bar.update(done - bar.n)
            if any(process.exitcode for process in processes.values()):
                _end(processes)


def _end(processes: dict) -> None:
    """Ask the processes that still run to save and end, and wait for them.

    A second Ctrl-C ends them at once.
    """
    for process in processes.values():
        if process.is_alive():
            process.terminate()
    try:
        for process in processes.values():
            if process.pid:
                process.join()
    except KeyboardInterrupt:
        for process in processes.values():
            process.kill()


class _SignalsAsExceptions:
    """While inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does.

    The argument of the exception is the exit status.
    """

    def __enter__(self) -> None:
        self.before: dict[int, Callable | int | None] = {}
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python takes signals nowhere else
            self.before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, _) -> None:
        raise KeyboardInterrupt(128 + number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
