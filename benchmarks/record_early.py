"""An unripe detector for the notebooks: a DINO after a few hundred steps on the 200 labelled scenes.

    python benchmarks/record_early.py --out runs/early

trains 400 steps (supervised, 10 % of the labels, seed 0; a few minutes on 2 CPU cores) and writes the averaged weights
in half precision to notebooks/checkpoints/early.safetensors. A run that is finished is not run again.
"""

import argparse
from pathlib import Path

import torch

from semidetr_lite import load_detector
from semidetr_lite.training.checkpoint import save_weights
from semidetr_lite.training.train import Run, new_config

CHECKPOINTS = Path(__file__).parents[1] / "notebooks" / "checkpoints"


def main() -> None:
    """Train if needed, then ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/early"))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    config = new_config(method="supervised", percent=10, steps=options.steps, seed=0)
    if not (options.out / "teacher.safetensors").exists():
        Run(config, options.out).go()
    detector, file = load_detector(options.out), CHECKPOINTS / "early.safetensors"
    save_weights(file, detector, "dino", config["recipe"]["arguments"], detector.categories, torch.float16)
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
