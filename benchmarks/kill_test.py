"""Kill a training run at random moments and resume it each time; the end must be that of a run
nobody touched.

    python benchmarks/kill_test.py --kills 50

Two runs of `semidetr_lite.training.loop.Run` on the digits, small detector, one process with one
worker that loads data, a checkpoint every second step: one whole, the other killed with SIGKILL. Of
the kills a fifth comes within the first seconds after a start, two fifths while a file is being
written (it waits for one to appear), the rest at a random moment of a random step. Then weights,
optimizer, logs (times apart) and AP of both are compared, bit for bit.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

SMALL = {
    "num_queries": 12, "dim": 32, "heads": 2, "levels": 3, "points": 2, "dim_feedforward": 32,
    "encoder_layers": 1, "decoder_layers": 2, "backbone": "tiny", "anchor_size": 0.1,
    "denoising_queries": 6,
}  # fmt: skip
CHANGES = {
    **SMALL, "batch_size": 2, "unlabelled_batch_size": 2, "log_every": 2, "watch_every": 20,
    "evaluate_every": 50, "evaluate_images": 4, "max_pseudo_boxes": 8, "score_threshold": 0.0,
    "cost_queue_size": 20,
}  # fmt: skip


def main() -> int:
    """Run both, print what happened to the killed one; 1 if the two differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of the run; ten for each kill if not given")
    parser.add_argument("--method", default="semi-detr")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/kill_test"),
        help="folder of both runs; emptied first",
    )
    parser.add_argument(
        "--record", type=Path, help="JSON-lines file that the result is appended to"
    )
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # what the child process does
    given = parser.parse_args()
    given.steps = given.steps or 10 * given.kills
    if given.train:
        return train(given.train, given.method, given.steps)
    shutil.rmtree(given.out, ignore_errors=True)
    began = time.time()
    start(given.out / "whole", given).wait()
    killed = given.out / "killed"
    found = kill(killed, given)
    while start(killed, given).wait():
        raise SystemExit("the killed run does not resume; its message stands above")
    wrong = differences(given.out / "whole", killed)
    line = {
        "method": given.method,
        "steps": given.steps,
        "seed": given.seed,
        **found,
        "differences": wrong,
    }
    line["seconds"] = round(time.time() - began)
    print(json.dumps(line, indent=1))
    if given.record:
        with open(given.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(bool(wrong))


def train(folder: Path, method: str, steps: int) -> int:
    """Start the run, or go on with what is there of it."""
    from semidetr_lite.training.loop import Run
    from semidetr_lite.training.settings import new_config

    torch.set_num_threads(1)
    config = new_config("digits", method, steps=steps, percent=1, **CHANGES)
    Run(config, folder, resume=(folder / "config.json").exists(), workers=1, quiet=True).run()
    return 0


def start(folder: Path, given) -> subprocess.Popen:
    """The training process."""
    words = [
        "--train",
        folder,
        "--kills",
        given.kills,
        "--steps",
        given.steps,
        "--method",
        given.method,
    ]
    return subprocess.Popen([sys.executable, __file__, *map(str, words)])


def kill(folder: Path, given) -> dict:
    """Kill the run `given.kills` times, the k-th time in the k-th part of its steps; counts of what
    was hit.
    """
    rng, found = (
        random.Random(given.seed),
        {"kills": 0, "before a new line in the log": 0, "while a file was written": 0},
    )
    began = step_of(folder)
    while found["kills"] < given.kills:
        process, kind = (
            start(folder, given),
            rng.choice(("start", "write", "write", "step", "step")),
        )
        if kind == "start":
            time.sleep(rng.uniform(0, 8))
        else:
            goal = given.steps * (found["kills"] + rng.random()) / given.kills
            while process.poll() is None and step_of(folder) < goal:
                time.sleep(0.01)
            until = time.time() + 2
            if kind == "step":
                time.sleep(rng.uniform(0, 0.5))
            while kind == "write" and time.time() < until and not list(folder.glob(".*.part")):
                pass
        if process.poll() is not None:  # it ended by itself, which must not be before its last step
            if process.returncode or step_of(folder) < given.steps:
                raise SystemExit("the killed run does not resume; its message stands above")
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        found["kills"] += 1
        found["before a new line in the log"] += step_of(folder) == began
        found["while a file was written"] += bool(list(folder.glob(".*.part")))
        began = step_of(folder)
    return found


def step_of(folder: Path) -> int:
    """The last step in the log."""
    try:
        last = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return json.loads(last)["step"]
    except (OSError, IndexError, ValueError):
        return 0


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two run folders: weights and checkpoint bit for bit, logs, names of
    files.
    """
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    wrong = [] if names[0] == names[1] else [f"files: {names[0]} and {names[1]}"]
    states = [flat(torch.load(folder / "last.pt", weights_only=True)) for folder in (one, other)]
    for state in states:
        del state["/seconds"]
        state["/config"] = {**json.loads(state["/config"]), "command": None, "commit": None}
    if states[0].keys() != states[1].keys():
        wrong.append("last.pt: keys")
    wrong += [
        f"last.pt: {key}" for key, value in states[0].items() if not same(value, states[1].get(key))
    ]
    for name in ("student.safetensors", "teacher.safetensors", "best.safetensors"):
        if not (one / name).exists():  # nothing was measured
            continue
        if (one / name).read_bytes() != (other / name).read_bytes():
            wrong.append(name)
    logs = [name for name in ("log.jsonl", "pseudo_boxes.jsonl") if (one / name).exists()]
    return wrong + [name for name in logs if lines(one / name) != lines(other / name)]


def lines(file: Path) -> list[dict]:
    """The lines of a log, times apart."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}
        for row in rows
    ]


def flat(value, name: str = "") -> dict:
    """A nested dict or list as one dict."""
    if isinstance(value, dict | list):
        rows = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            key: leaf for inner, one in rows for key, leaf in flat(one, f"{name}/{inner}").items()
        }
    return {name: value}


def same(one, other) -> bool:
    """Whether two entries of a checkpoint are equal, NaN and NaN too."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    return one == other


if __name__ == "__main__":
    sys.exit(main())
