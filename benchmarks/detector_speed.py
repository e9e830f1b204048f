"""A training step and an inference of our Deformable DETR and of the one in `transformers`.

Both: ResNet-50 (random weights, frozen BatchNorm, stem and first stage not trained), two-stage with
box refinement, auxiliary losses, 6 + 6 layers, 300 queries, 256 channels, batch 2. A step is
forward, matching, loss and backward; ours is Supervised without denoising.

    python benchmarks/detector_speed.py --rounds 5 --threads 1 2

The two take turns in one process. Seconds are CPU seconds of this process, of all its threads
together, so that other jobs on the machine count little; a line holds medians and their ratios.
With two threads the seconds that pass are about half as many. Memory is the highest of two training
steps in a process of its own. For each size and number of threads one JSON line.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import semidetr_lite  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch

from semidetr_lite.training.settings import new_config

CLASSES, QUERIES = 91, 300


def targets_of(count: int, sizes: list[tuple[int, int]]) -> list[dict]:
    """`count` random boxes an image, the same for both."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for height, width in sizes:
        corner = torch.rand(count, 2, generator=rng) * 0.6
        side = torch.rand(count, 2, generator=rng) * 0.3 + 0.05
        boxes = torch.cat([corner, corner + side], 1) * torch.tensor([width, height, width, height])
        labels = torch.randint(1, CLASSES, (count,), generator=rng)
        found.append({"boxes": boxes, "labels": labels, "size": (height, width)})
    return found


class Ours:
    """semidetr_lite.DeformableDETR under the supervised method."""

    def __init__(self):
        from semidetr_lite.detectors.deformable_detr import DeformableDETR
        from semidetr_lite.methods.supervised import Supervised

        torch.manual_seed(0)
        self.detector = DeformableDETR(CLASSES, QUERIES, with_box_refine=True, two_stage=True)
        self.method = Supervised(self.detector)
        self.parts = {
            "backbone": self.detector.backbone,
            "encoder": self.detector.encoder,
            "decoder": self.detector.decoder,
        }

    def prepare(self, images, targets):
        self.images, self.targets = list(images), targets

    def step(self):
        self.method.train()
        self.detector.zero_grad(set_to_none=True)
        sum(self.method({"labelled": (self.images, self.targets)}, 0).values()).backward()

    @torch.no_grad()
    def infer(self):
        self.detector.eval()
        self.detector(self.images)


class Theirs:
    """transformers' DeformableDetrForObjectDetection."""

    def __init__(self):
        import transformers

        torch.manual_seed(0)
        config = transformers.DeformableDetrConfig(
            use_timm_backbone=True,
            backbone="resnet50",
            use_pretrained_backbone=False,
            backbone_config=None,
            num_labels=CLASSES,
            num_queries=QUERIES,
            two_stage_num_proposals=QUERIES,
            with_box_refine=True,
            two_stage=True,
            auxiliary_loss=True,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
        )
        self.detector = transformers.DeformableDetrForObjectDetection(config)

    def prepare(self, images, targets):
        from semidetr_lite.boxes import to_model

        self.pixels = torch.stack(list(images))
        self.mask = torch.ones(len(images), *images[0].shape[1:], dtype=torch.long)
        self.labels = [
            {"class_labels": target["labels"], "boxes": to_model(target["boxes"], target["size"])}
            for target in targets
        ]

    def step(self):
        self.detector.train()
        self.detector.zero_grad(set_to_none=True)
        self.detector(self.pixels, pixel_mask=self.mask, labels=self.labels).loss.backward()

    @torch.no_grad()
    def infer(self):
        self.detector.eval()
        self.detector(self.pixels, pixel_mask=self.mask)


class Clock:
    """Seconds spent in modules, forward only, by hooks."""

    def __init__(self, **modules):
        self.spent, self.began = dict.fromkeys(modules, 0.0), {}
        for name, module in modules.items():
            for part in module if isinstance(module, torch.nn.ModuleList) else [module]:
                part.register_forward_pre_hook(
                    lambda m, i, name=name: self.began.__setitem__(name, time.process_time())
                )
                part.register_forward_hook(lambda m, i, o, name=name: self._add(name))

    def _add(self, name):
        self.spent[name] += time.process_time() - self.began[name]


def seconds(call) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def paired(size: tuple[int, int], rounds: int) -> dict:
    """Medians of both, taking turns; and where a training step's forward goes."""
    sizes = [size] * 2
    images, targets = torch.rand(2, 3, *size), targets_of(7, sizes)
    both = {"ours": Ours(), "theirs": Theirs()}
    ours, theirs = both["ours"].detector, both["theirs"].detector
    clocks = {
        "ours": Clock(backbone=ours.backbone, encoder=ours.encoder, decoder=ours.decoder),
        "theirs": Clock(
            backbone=theirs.model.backbone,
            encoder=theirs.model.encoder.layers,
            decoder=theirs.model.decoder.layers,
        ),
    }
    for one in both.values():
        one.prepare(images, targets)
        one.step(), one.infer()
    found = {name: {"step": [], "infer": []} for name in both}
    for clock in clocks.values():
        clock.spent = dict.fromkeys(clock.spent, 0.0)
    for _ in range(rounds):
        for name, one in both.items():
            found[name]["step"].append(seconds(one.step))
    split = {
        name: {part: round(spent / rounds, 3) for part, spent in clock.spent.items()}
        for name, clock in clocks.items()
    }
    for _ in range(rounds):
        for name, one in both.items():
            found[name]["infer"].append(seconds(one.infer))
    medians = {
        name: {what: statistics.median(times) for what, times in row.items()}
        for name, row in found.items()
    }
    return {
        "size": f"{size[0]}x{size[1]}",
        **{
            f"{name}_{what}_s": round(value, 3)
            for name, row in medians.items()
            for what, value in row.items()
        },
        "step_ratio": round(medians["theirs"]["step"] / medians["ours"]["step"], 2),
        "infer_ratio": round(medians["theirs"]["infer"] / medians["ours"]["infer"], 2),
        "forward_split_s": split,
    }


def _peak(which: str, size: tuple[int, int], threads: int, queue) -> None:
    torch.set_num_threads(threads)
    one = {"ours": Ours, "theirs": Theirs}[which]()
    one.prepare(torch.rand(2, 3, *size), targets_of(7, [size] * 2))
    one.step(), one.step()
    # of this process alone; getrusage would inherit its parent's
    status = Path("/proc/self/status").read_text()
    queue.put(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def peak(which: str, size: tuple[int, int], threads: int) -> float:
    """Peak resident MB of two training steps in a process of their own."""
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(which, size, threads, queue))
    process.start()
    found = queue.get()
    process.join()
    return round(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="*", default=["320x320", "512x640"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detector_speed.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(exist_ok=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for text in options.sizes:
            size = tuple(int(side) for side in text.split("x"))
            row = paired(size, options.rounds)
            row |= {f"{who}_peak_MB": peak(who, size, threads) for who in ("ours", "theirs")}
            row |= {"seconds": "CPU", "threads": threads, "rounds": options.rounds}
            row |= {"date": str(date.today()), "commit": new_config().commit}
            row |= {"torch": torch.__version__, "transformers": version("transformers")}
            row |= {"machine": f"{platform.machine()}, {platform.system()}"}
            print(json.dumps(row, indent=1), flush=True)
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
