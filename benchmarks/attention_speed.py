"""Deformable attention on a GPU: the Triton kernel beside the formula in deformable.py, and their
errors.

    python benchmarks/attention_speed.py --out benchmarks/results/attention_speed.jsonl

5 images of 800 x 1216 pixels, 8 heads of 32 channels, 4 levels, 4 points; queries are all 20,197
tokens (encoder) or 1,100 (decoder with denoising). Medians of milliseconds; errors are |x - y| /
|y| against float64, forward and for the gradients of values, locations and weights.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from semidetr_lite.detectors import deformable, kernels
from semidetr_lite.detectors.kernels.operators import attention_operator

SHAPES = [(100, 152), (50, 76), (25, 38), (13, 19)]
SMALL = [(20, 31), (10, 16), (5, 8), (3, 4)]


def inputs(shapes, queries: int | None, images: int, dtype=torch.float32) -> tuple:
    """value, locations, weights, gradient; without `queries` the tokens sample around their own
    positions.
    """
    tokens, levels = sum(height * width for height, width in shapes), len(shapes)
    if queries is None:
        centres = deformable._token_references(shapes, torch.ones(images, levels, 2, device="cuda"))
        layout, centres = (images, tokens, 8, levels, 4), centres[:, :, None, :, None]
        places = centres + 0.02 * torch.randn(*layout, 2, device="cuda")
    else:
        layout = (images, queries, 8, levels, 4)
        places = 1.1 * torch.rand(*layout, 2, device="cuda") - 0.05
    value = torch.randn(images, tokens, 8, 32, device="cuda").to(dtype)
    upstream = torch.randn(*layout[:2], 256, device="cuda").to(dtype)
    weights = torch.rand(layout, device="cuda")
    return value.requires_grad_(), places.requires_grad_(), weights.requires_grad_(), upstream


def results(read, shapes, value, places, weights, upstream) -> list[torch.Tensor]:
    """The sums and the three gradients."""
    sums = read(value, shapes, places, weights)
    return [sums, *torch.autograd.grad(sums, (value, places, weights), upstream)]


def milliseconds(read, shapes, *given) -> list[float]:
    """Medians of forward and backward."""
    times = []
    for _ in range(9):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        sums = read(given[0], shapes, *given[1:3])
        marks[1].record()
        torch.autograd.grad(sums, given[:3], given[3])
        marks[2].record()
        torch.cuda.synchronize()
        times.append(
            [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]
        )
    return [round(statistics.median(each), 3) for each in zip(*times[2:], strict=True)]


def main(argv=None) -> int:
    """Measure and print; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a JSON-lines file to append to")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("attention_speed: needs a GPU", file=sys.stderr)
        return 2
    kernels.can_compile = lambda device: False  # so that the formula stays the formula
    ways = {"grid_sample": deformable.deformable_attention, "triton": attention_operator}
    torch.manual_seed(0)
    given = inputs(SMALL, 333, 2)
    exact = results(
        ways["grid_sample"], SMALL, *(each.detach().double().requires_grad_() for each in given)
    )
    lines = []
    for name, read in ways.items():
        pairs = zip(results(read, SMALL, *given), exact, strict=True)
        errors = [float((found.double() - true).norm() / true.norm()) for found, true in pairs]
        lines.append({"way": name, "relative_errors": errors})
    for queries in (None, 1100):
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs(SHAPES, queries, 5, dtype)
            for name, read in ways.items():
                forward, backward = milliseconds(read, SHAPES, *given)
                lines.append(
                    {
                        "way": name,
                        "queries": queries or "tokens",
                        "values": str(dtype).removeprefix("torch."),
                    }
                )
                lines[-1] |= {"forward_ms": forward, "backward_ms": backward}
    for line in lines:
        line |= {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(json.dumps(line))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with open(options.out, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
