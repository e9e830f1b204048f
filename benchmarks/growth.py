"""Time and memory of a forward pass against image side and number of queries, for the three
detectors at paper size.

    python benchmarks/growth.py     some 5 minutes; writes growth.jsonl and growth.png to
                                    benchmarks/results

Each point is a process of its own with one thread: one pass to warm up, the best of five (--passes)
in seconds of CPU time, and the peak resident memory less what the built detector takes.
"""

import argparse
import json
import platform
import time
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from semidetr_lite.training.settings import new_config

SIDES, QUERIES = (256, 384, 512, 768, 1024), (100, 300, 900, 1800)
SIDE, RESULTS = 512, Path(__file__).parent / "results"


def make(name: str, queries: int):
    """A detector at paper size with random weights."""
    from semidetr_lite.detectors.deformable_detr import DeformableDETR
    from semidetr_lite.detectors.detr import DETR
    from semidetr_lite.detectors.dino import DINO

    if name == "DETR":
        return DETR(91, queries)
    return (
        DINO(91, queries)
        if name == "DINO"
        else DeformableDETR(91, queries, with_box_refine=True, two_stage=True)
    )


def memory() -> float:
    """Peak resident MB of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


@torch.no_grad()
def measure(name: str, side: int, queries: int, passes: int, queue) -> None:
    torch.set_num_threads(1)
    detector = make(name, queries).eval()
    built, image, times = memory(), [torch.rand(3, side, side)], []
    for _ in range(1 + passes):
        began = time.process_time()
        detector(image)
        times.append(time.process_time() - began)
    queue.put((min(times[1:]), memory() - built))


def points() -> list[tuple[str, int, int]]:
    """(detector, side, queries): growth in sides at the paper's queries, growth in queries at one
    side.
    """
    own = {"DETR": 100, "Deformable DETR": 300, "DINO": 900}
    found = [(name, side, queries) for name, queries in own.items() for side in SIDES]
    return found + [
        (name, SIDE, queries) for name in own for queries in QUERIES if queries != own[name]
    ]


def picture(rows: list[dict], file: Path) -> None:
    """Seconds and MB against pixels (left) and queries (right)."""
    import matplotlib.pyplot as plt

    own = {"DETR": 100, "Deformable DETR": 300, "DINO": 900}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for color, (name, queries) in zip(("#0072B2", "#E69F00", "#009E73"), own.items(), strict=True):
        by_side = sorted(
            (r["side"], r) for r in rows if r["detector"] == name and r["queries"] == queries
        )
        by_queries = sorted(
            (r["queries"], r) for r in rows if r["detector"] == name and r["side"] == SIDE
        )
        for row, key in enumerate(("seconds", "MB")):
            axes[row, 0].plot(
                [s * s / 1e6 for s, _ in by_side],
                [r[key] for _, r in by_side],
                "o-",
                color=color,
                label=name,
            )
            axes[row, 1].plot(
                [q for q, _ in by_queries],
                [r[key] for _, r in by_queries],
                "o-",
                color=color,
                label=name,
            )
            axes[row, 0].set_ylabel({"seconds": "seconds of one CPU"}.get(key, key))
    (
        axes[0, 0].set_title("A forward pass against pixels"),
        axes[0, 1].set_title(f"against queries, {SIDE} x {SIDE}"),
    )
    axes[1, 0].set_xlabel("million pixels"), axes[1, 1].set_xlabel("queries"), axes[0, 0].legend()
    for axis in axes.flat:
        axis.set_ylim(bottom=0), axis.grid(alpha=0.3)
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    context, rows = get_context("spawn"), []
    where = {
        "date": str(date.today()),
        "commit": new_config().commit,
        "threads": 1,
        "passes": options.passes,
        "torch": torch.__version__,
    }
    where["machine"] = f"{platform.machine()}, {platform.system()}"
    for name, side, queries in points():
        queue = context.Queue()
        process = context.Process(target=measure, args=(name, side, queries, options.passes, queue))
        process.start()
        seconds, megabytes = queue.get()
        process.join()
        row = {
            "detector": name,
            "side": side,
            "queries": queries,
            "seconds": round(seconds, 3),
            "MB": round(megabytes),
        }
        rows.append(row | where)
        print(
            f"{name:<16} {side:>5} px {queries:>5} queries {seconds:8.3f} s {megabytes:7.0f} MB",
            flush=True,
        )
    (RESULTS / "growth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture(rows, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
