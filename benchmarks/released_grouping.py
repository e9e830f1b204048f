"""How close the gradient of a step comes to that of the released code's grouping.

    python benchmarks/released_grouping.py

16 + 16 digits scenes are the images of 8 released GPUs, from the weights of
notebooks/checkpoints/supervised.safetensors, mean over ten steps. The released gradient is that of
one batch with 8 normalizer groups and a bound of 8. Beside it, on one GPU in 8 micro-batches:

    apart     one-to-many divided by the soft targets of each micro-batch, the others as one group
    running   one-to-many divided by the running mean of the last 8 micro-batches, in 8 groups
    ahead     what the package does: the student runs ahead without gradient to sum the soft targets

Printed are the cosine of each gradient with the released one, and the CPU seconds of a step.
"""

import time
from pathlib import Path

import torch

from semidetr_lite.losses import TargetSet
from semidetr_lite.methods.mean_teacher import MeanTeacher, Prepared
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.normalizers import Normalizers
from semidetr_lite.training.checkpoint import load_detector
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import new_config

WEIGHTS = Path(__file__).parents[1] / "notebooks/checkpoints/supervised.safetensors"
STEPS = range(10)
GROUPS = {"normalizer_groups": 8, "normalizer_bound": 8.0}
ROWS = {
    "released": {"accumulate": 1, **GROUPS},
    "apart": {"accumulate": 8},
    "running": {"accumulate": 8, **GROUPS},
    "ahead": {"accumulate": 8, **GROUPS},
}


def main() -> None:
    """Print a line for each stage and row."""
    for stage, share in (("one-to-many", 1.0), ("one-to-one", 0.0)):
        released: list[torch.Tensor] = []
        for name, settings in ROWS.items():
            if stage == "one-to-one" and name == "running":
                continue
            # consistency is divided alike in all rows, so it is left out
            kwargs = {"one_to_many_share": share, "consistency_boxes": "none", **settings}
            run = Run(new_config(steps=100, **kwargs), "never-written", workers=0, quiet=True)
            for detector in (run.method.student, run.method.teacher):
                detector.load_state_dict(load_detector(WEIGHTS).state_dict())
            if name in ("apart", "running") and stage == "one-to-many":
                run.method.prepare = Approximate(run.method, name).prepare
            gradients, began = [], time.process_time()
            batches = [batch for _, batch in zip(STEPS, run._loader(), strict=False)]
            began = time.process_time()
            for step, batch in zip(STEPS, batches, strict=True):
                gradients.append(gradient_of(run.engine, batch, step))
            seconds = (time.process_time() - began) / len(STEPS)
            released = released or gradients
            cosines = [
                torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
                for ours, theirs in zip(gradients, released, strict=True)
            ]
            figures = f"cosine {sum(cosines) / len(cosines):.6f}, lowest {min(cosines):.6f}"
            print(f"{stage:<12} {name:<9} {figures}, {seconds:.2f} CPU s a step", flush=True)


class Approximate:
    """What a method may do instead of running ahead in stage one.

    Args:
        method: whose preparation is replaced.
        name: "apart" or "running", see above.
    """

    def __init__(self, method: SemiDETR, name: str):
        self.method, self.name = method, name
        self.past: dict[str, list[torch.Tensor]] = {"labelled": [], "pseudo": []}

    def prepare(self, micro_batches: list[dict], step: int) -> list[Prepared]:
        """The preparation of MeanTeacher, with normalizers that sum what they can know."""
        prepared = MeanTeacher.prepare(self.method, micro_batches, step)
        return [
            known._replace(
                labelled=self.guessing(known.labelled), pseudo=self.guessing(known.pseudo)
            )
            for known in prepared
        ]

    def guessing(self, target_set: TargetSet) -> TargetSet:
        """The target set, with normalizers that guess the soft targets of the step."""
        own = target_set.normalizers
        return target_set._replace(normalizers=Guess(own, self.past[target_set.name], self.name))


class Guess:
    """Normalizers that know the soft targets of this micro-batch and of those before it."""

    def __init__(self, exact: Normalizers, past: list[torch.Tensor], name: str):
        self.exact, self.past, self.name = exact, past, name

    def __getattr__(self, name: str):
        return getattr(self.exact, name)

    def soft(self, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of class and box losses, see Normalizers.soft."""
        if self.name == "apart":
            alone = totals.clamp(min=1.0)
            return alone, alone
        self.past.append(totals)
        del self.past[:-8]
        step = torch.stack(self.past).mean(0) * self.exact.num_shards
        return self.exact._replace(soft_targets=step).soft(totals)


def gradient_of(engine: Engine, batch: dict, step: int) -> torch.Tensor:
    """The gradient of a step."""
    engine.method.zero_grad(set_to_none=True)
    for losses, _ in engine.losses(batch, step):
        sum(losses.values()).backward()
    named = engine.method.named_parameters()
    return torch.cat([p.grad.flatten().double() for _, p in named if p.grad is not None])


if __name__ == "__main__":
    main()
