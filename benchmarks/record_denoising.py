"""Record what denoising does to a new transformer, as notebook 06 draws it.

    python benchmarks/record_denoising.py --seeds 0 1 2 [--steps 250]

For each seed two DINO detectors begin with the same weights and see the same labelled images, one
with and one without denoising queries. Encoder, decoder and heads begin at random. The backbone
comes from an FCOS detector trained on the same labels (notebooks/checkpoints/fcos.safetensors),
which has neither queries nor a matching, as DINO's begins from ImageNet. On the way two things are
measured on scenes of the tune split: AP, and for how many objects the matched query comes from
another encoder token than before. One line per run goes to notebooks/recorded/denoising.jsonl; runs
that are there are not repeated.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from semidetr_lite import load_detector
from semidetr_lite.data.batches import Batches
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.files import append_jsonl, read_jsonl
from semidetr_lite.matching import one_to_one
from semidetr_lite.training.loop import Run
from semidetr_lite.training.measure import measure
from semidetr_lite.training.settings import new_config

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BACKBONE = NOTEBOOKS / "checkpoints" / "fcos.safetensors"
RECORDED = NOTEBOOKS / "recorded" / "denoising.jsonl"
BATCH_SIZE, MEASURE_EVERY = 8, 25  # labelled images, steps
SCENES = 60  # of the tune split


def train(arm: str, seed: int, steps: int, folder: str) -> dict:
    """One line of the file: the run's settings and what was measured on the way."""
    config = new_config(
        "digits", "supervised", percent=10, seed=seed, steps=steps, batch_size=BATCH_SIZE
    )
    run = Run(config, folder, workers=0, quiet=True)
    student = run.method.student
    student.backbone.load_state_dict(load_detector(BACKBONE).backbone.state_dict())
    if arm == "without denoising":
        student.denoising = run.method.teacher.denoising = None
    scenes = [run.splits.tune[index] for index in range(SCENES)]
    batches = Batches(run.splits, BATCH_SIZE, 0, config.views, seed)
    before = matched_tokens(student, scenes)
    measured, matching_losses, seconds = [], [], 0.0
    for step in range(steps):
        batch = batches[step]
        began = time.process_time()
        losses = run.train_step(batch)
        seconds += time.process_time() - began
        run.step += 1
        matching_losses.append(
            sum(value for name, value in losses.items() if "denoising" not in name)
        )
        if run.step % MEASURE_EVERY == 0:
            now = matched_tokens(student, scenes)
            measured.append({
                "step": run.step,
                "AP": round(measure(student, run.splits.tune, SCENES)["AP"], 4),
                "changed": round(float((now != before).float().mean()), 4),
                "matching_loss": round(statistics.mean(matching_losses), 3),  # since the last line
            })  # fmt: skip
            print(arm, seed, measured[-1], flush=True)
            before, matching_losses = now, []
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "percent": config.percent,
        "measured": measured,
        "cpu_seconds_per_step": round(seconds / steps, 3),
        "commit": config.commit,
        "machine": config.machine,
        "command": config.command,
    }


@torch.no_grad()
def matched_tokens(detector: DINO, scenes: list[tuple]) -> torch.Tensor:
    """For every object the encoder token whose query is matched to it: (objects,) int64."""
    all_tokens, chosen = [], []
    hook = detector.proposal.register_forward_hook(
        lambda module, inputs, output: all_tokens.append(output[0])
    )
    for image, truth in scenes:
        outputs = detector([image])
        match = one_to_one(outputs["pred_logits"][0], outputs["pred_boxes"][0], truth)
        token_of_query = torch.cdist(outputs["encoder"]["queries"][0], all_tokens.pop()).argmin(1)
        chosen.append(token_of_query[match.queries[match.targets.argsort()]])
    hook.remove()
    return torch.cat(chosen)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=RECORDED)
    options = parser.parse_args()
    done = {(line["arm"], line["seed"], line["steps"]) for line in read_jsonl(options.out)}
    for seed in options.seeds:
        for arm in ("with denoising", "without denoising"):
            if (arm, seed, options.steps) not in done:
                with tempfile.TemporaryDirectory() as folder:
                    line = train(arm, seed, options.steps, folder)
                append_jsonl(options.out, [line])


if __name__ == "__main__":
    main()
