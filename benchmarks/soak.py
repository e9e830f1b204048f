"""Train for an hour on small images and watch whether memory, open files or the cost of a step
creep up (Linux).

    python benchmarks/soak.py --minutes 60 --record benchmarks/results/soak.jsonl

A Semi-DETR run (small detector, digits, one worker that loads data, a checkpoint every 50 steps,
measured every 200) in a process of its own; this one looks at it twice a minute: resident memory
and open files of it and its worker together, and the CPU time that its steps took since the last
look, which other programs disturb less than seconds. At the end it is sent SIGTERM. Drift is the
straight line through the figures after the first tenth, over the time it covers.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from kill_test import CHANGES, step_of

OFTEN = {"log_every": 50, "watch_every": 100, "evaluate_every": 200}


def main() -> int:
    """Run it, print and record the figures; 1 if the run did not end by the signal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=30, help="seconds between two looks")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/soak"), help="folder of the run; emptied first"
    )
    parser.add_argument(
        "--record", type=Path, help="JSON-lines file that the result is appended to"
    )
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # what the child process does
    given = parser.parse_args()
    if given.train:
        return train(given.train)
    shutil.rmtree(given.out, ignore_errors=True)
    process = subprocess.Popen([sys.executable, __file__, "--train", given.out])
    while not step_of(given.out) and process.poll() is None:
        time.sleep(0.2)
    looks, end = [], time.time() + 60 * given.minutes
    while time.time() < end and process.poll() is None:
        looks.append(look(process.pid, given.out))
        time.sleep(given.every)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    line = {"minutes": given.minutes, "steps": step_of(given.out), "status": status, **drift(looks)}
    print(json.dumps(line, indent=1))
    if given.record:
        with open(given.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(status != 143)


def train(folder: Path) -> int:
    """A run that does not end by itself; the status of one that was stopped by a signal."""
    import torch

    from semidetr_lite.errors import Stopped
    from semidetr_lite.training.loop import Run
    from semidetr_lite.training.settings import new_config

    torch.set_num_threads(1)
    config = new_config("digits", "semi-detr", steps=10**6, percent=10, **{**CHANGES, **OFTEN})
    try:
        Run(config, folder, workers=1, quiet=True).run()
    except Stopped as stopped:
        print(stopped.args[0], file=sys.stderr)
        return stopped.args[1]
    return 0


def look(pid: int, folder: Path) -> dict[str, float]:
    """What a process and its children hold now."""
    found = {"time": time.time(), "step": step_of(folder), "MB": 0.0, "files": 0, "cpu": 0.0}
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in (str(pid), *children):
        place = Path("/proc") / each
        found["MB"] += (
            int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )
        found["files"] += len(list((place / "fd").iterdir()))
        found["cpu"] += sum(
            map(int, (place / "stat").read_text().rpartition(")")[2].split()[11:13])
        )
    found["cpu"] /= os.sysconf("SC_CLK_TCK")
    return found


def drift(looks: list[dict]) -> dict:
    """Figures at the beginning (the first tenth left out) and the end, and what changed by a
    straight line.
    """
    looks = looks[max(1, len(looks) // 10) :]
    if len(looks) < 4:
        return {"looks": len(looks)}
    times = np.array([one["time"] - looks[0]["time"] for one in looks])
    found = {"looks": len(looks)}
    for name in ("MB", "files"):
        values = [one[name] for one in looks]
        changed = float(np.polyfit(times, values, 1)[0] * times[-1])
        found[name] = {
            "first": round(values[0], 1),
            "last": round(values[-1], 1),
            "drift": round(changed, 1),
        }
    steps, cpu = (np.array([one[name] for one in looks]) for name in ("step", "cpu"))
    halves = [
        (cpu[b] - cpu[a]) / max(steps[b] - steps[a], 1)
        for a, b in ((0, len(cpu) // 2), (len(cpu) // 2, -1))
    ]
    found["CPU ms a step"] = {
        "first half": round(1000 * float(halves[0]), 1),
        "second half": round(1000 * float(halves[1]), 1),
    }
    return found


if __name__ == "__main__":
    sys.exit(main())
