"""What running a step in parts changes: losses and gradient of 1, 2, 4 and 8 parts of the same 16 +
16 digits scenes.

    python benchmarks/parts_difference.py

From the weights of notebooks/checkpoints/supervised.safetensors, in both stages, the mean over ten
steps: the largest relative difference of a loss and the cosine between the gradients. One-to-one
matching and denoising are divided by the boxes of the whole step, so that only rounding is left;
one-to-many matching, consistency and the mixture over costs are those of a part.
"""

from pathlib import Path

import torch

from semidetr_lite.training.checkpoint import load_detector
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import new_config

WEIGHTS = Path(__file__).parents[1] / "notebooks/checkpoints/supervised.safetensors"
STEPS = range(10)


def main() -> None:
    """Print a line for each stage and number of parts."""
    for stage, share in (("one-to-many", 1.0), ("one-to-one", 0.0)):
        whole = {}
        for parts in (1, 2, 4, 8):
            config = new_config(one_to_many_share=share, accumulate=parts, steps=100)
            run = Run(config, "never-written", workers=0, quiet=True)
            for detector in (run.method.student, run.method.teacher):
                detector.load_state_dict(load_detector(WEIGHTS).state_dict())
            losses, angles = [], []
            for step, batch in zip(STEPS, run._loader(), strict=False):
                values, gradient = step_of(run.engine, batch, step)
                first = whole.setdefault(step, (values, gradient))
                losses.append(
                    max(abs(values[name] / first[0][name] - 1) for name in values if first[0][name])
                )
                angles.append(
                    torch.nn.functional.cosine_similarity(gradient, first[1], dim=0).item()
                )
            figures = f"{sum(losses) / len(losses):.2e}, cosine {sum(angles) / len(angles):.6f}"
            print(f"{stage:<12} {parts} parts: largest difference of a loss {figures}", flush=True)


def step_of(engine: Engine, batch: dict, step: int) -> tuple[dict[str, float], torch.Tensor]:
    """The losses and the gradient of a step."""
    engine.method.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    for losses, found in engine.losses(batch, step):
        sum(losses.values()).backward()
        values = {
            name: values.get(name, 0.0) + value
            for name, value in zip(losses, found.tolist(), strict=True)
        }
    named = engine.method.named_parameters()
    return values, torch.cat([p.grad.flatten().double() for _, p in named if p.grad is not None])


if __name__ == "__main__":
    main()
