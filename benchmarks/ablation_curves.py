"""AP and pseudo-boxes over the recorded runs of the comparison, with 5 and 10 % of the labels.

    python benchmarks/ablation_curves.py --out benchmarks/results/ablation_curves.png

Reads notebooks/recorded/ablation_curves.jsonl: what `semidetr ablate` measured while it trained. Seed 0.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from semidetr_lite.training.checkpoint import read_lines

RECORD = Path(__file__).parents[1] / "notebooks/recorded/ablation_curves.jsonl"
LOOKS = {"mean-teacher": ("#E69F00", "mean teacher"), "semi-detr": ("#0072B2", "Semi-DETR")}
QUANTITIES = {
    "AP_teacher": "AP of the teacher, tune scenes",
    "pseudo_precision": "pseudo-boxes that are right, %",
    "pseudo_recall": "objects that have one, %",
}


def main() -> None:
    """Draw a row of panels for each share of labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation_curves.png"))
    out, lines = parser.parse_args().out, read_lines(RECORD)
    figure = Figure(figsize=(10.5, 5.6), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(QUANTITIES), sharex=True, sharey="col")
    for row, percent in zip(axes, (5, 10)):
        for ax, (quantity, title) in zip(row, QUANTITIES.items()):
            for arm, (colour, name) in LOOKS.items():
                for steps, dashes in ((1500, "-"), (3000, "--")):
                    same = {"row": arm, "percent": percent, "seed": 0, "steps": steps, "detector": "dino"}
                    found = [line for line in lines if same.items() <= line.items() and quantity in line]
                    values = [100 * line[quantity] for line in found]
                    label = f"{name}, {steps:,} steps"
                    ax.plot([line["step"] for line in found], values, dashes, color=colour, label=label)
            ax.set_title(f"{percent} % of the labels: {title}", fontsize=8.5)
            ax.grid(alpha=0.3)
        row[0].set_ylim(0, 70)
        row[2].set_ylim(0, 90)
    for ax in axes[-1]:
        ax.set_xlabel("step after the 1,000-step supervised run")
    axes[0][0].legend(fontsize=7.5)
    figure.suptitle("With 5 % of the labels the mean teacher loses its objects; with 10 % both end alike (seed 0)")
    figure.savefig(out)


if __name__ == "__main__":
    main()
