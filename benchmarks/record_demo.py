"""Record the demo: all four arms over several seeds, as the README and the notebook quote them.

    python benchmarks/record_demo.py --seeds 0 1 2 --out runs/recorded [--plateau 4000]

For each seed: supervised (the burn-in), then from it Semi-DETR, the plain mean teacher and the
control (supervised for the same wall time). Runs that are finished are not run again. `--plateau`
also trains with all labels, for the upper end of the gap. Logs go to notebooks/recorded/demo, and
one line a run to notebooks/recorded/demo.jsonl. `--only` picks arms, so that two processes can
share the work.
"""

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path

import torch

from semidetr_lite.training.demo import DEMO_RUNS, train_demo_run

RECORDED = Path(__file__).parents[1] / "notebooks" / "recorded"
ORDER = ["all-labels", "supervised", "control", "mean-teacher", "semi-detr"]


def line_of(run: Path, arm: str) -> dict:
    """One line of demo.jsonl."""
    config = json.loads((run / "config.json").read_text())
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    test = last["test"]["teacher"]
    keep = {
        key: config[key]
        for key in ("method", "detector", "data", "percent", "fold", "seed", "steps")
    }
    figures = {
        "AP": round(test["AP"], 4),
        "AP50": round(test["AP50"], 4),
        "AP_student": round(last["test"]["student"]["AP"], 4),
    }
    return {
        "row": arm,
        **keep,
        **figures,
        "seconds": last["seconds"],
        "commit": config["commit"],
        "machine": config["machine"],
    }


def collect(out: Path) -> None:
    """Copy the logs of finished runs and print mean, standard error and gap closed."""
    lines = []
    for folder in sorted(path.parent for path in out.glob("*/*/log.jsonl")):
        if "test" not in json.loads((folder / "log.jsonl").read_text().splitlines()[-1]):
            continue
        kept = RECORDED / "demo" / folder.parent.name / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "log.jsonl", "pseudo_boxes.jsonl"):
            if (folder / name).exists():
                shutil.copy(folder / name, kept / name)
        lines.append(line_of(folder, folder.name))
    (RECORDED / "demo.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    means = {arm: [line["AP"] for line in lines if line["row"] == arm] for arm in ORDER}
    for arm, values in means.items():
        if values:
            error = (
                statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            )
            minutes = statistics.mean(line["seconds"] for line in lines if line["row"] == arm) / 60
            mean = 100 * statistics.mean(values)
            text = f"{arm:<14} AP {mean:5.1f} +- {100 * error:.1f}   {minutes:.1f} min"
            if means["all-labels"] and means["control"] and arm in ("mean-teacher", "semi-detr"):
                low, high = statistics.mean(means["control"]), statistics.mean(means["all-labels"])
                text += (
                    f"   gap closed {100 * (statistics.mean(values) - low) / (high - low):.0f} %"
                )
            print(text)


def main() -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/recorded"))
    parser.add_argument("--only", nargs="*", default=list(DEMO_RUNS))
    parser.add_argument("--plateau", type=int, default=0, help="steps of a run with all labels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for arm in options.only:
            train_demo_run(arm, options.out / f"seed{seed}", seed)
    if options.plateau:
        train_demo_run(
            "supervised",
            options.out / "all",
            0,
            folder="all-labels",
            percent=100,
            steps=options.plateau,
        )
    collect(options.out)


if __name__ == "__main__":
    main()
