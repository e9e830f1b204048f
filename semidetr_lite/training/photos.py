"""The preset for photographs: what it leaves open is chosen from the data and the machine.

Left open are the settings whose value in the preset is 0 or None: image size, queries, images of a
step, steps, and the backbone. They are chosen once, when a run begins, and stored in its
config.json. What was given as an option is kept. A run that starts from another one has its image
size, queries and backbone.

| chosen | from |
|---|---|
| image size | the machine, the images (never enlarged), small objects |
| queries | most objects per image, `QUERIES_PER_OBJECT` for each, 100 to 300 |
| images of a step | the machine |
| steps | `EPOCHS` passes over the labelled images, within the limits of the machine |
| backbone | ResNet-18 if its ImageNet weights are there or can be downloaded, else `tiny` |

A ResNet has frozen batch norms and a frozen stem: without ImageNet weights it cannot learn to see.
The backbone `tiny` can, so that is what a machine without a network trains.
"""

import contextlib
import dataclasses
import io
import math
import socket
import sys
from typing import NamedTuple

import numpy as np
import torch
import torchvision

from semidetr_lite.data.splits import Splits, sample_targets
from semidetr_lite.data.views import resized
from semidetr_lite.training.run_folder import load_burn_in
from semidetr_lite.training.settings import WITH_QUERIES, Config, Settings, change, check

MAX_LOOKED_AT = 20_000  # images whose boxes are looked at
QUERIES_PER_OBJECT = 4  # as many as one-to-many matching takes for each object
QUERIES = (100, 300)  # fewest and most
EPOCHS = 50
MIN_STEPS = 600
SMALL_OBJECT = 8  # pixels: a cell of the finest feature map
DETECTIONS = 100  # boxes of an image that are returned, and that COCO counts
PRETRAINED = "IMAGENET1K_V1"
WAIT = 20  # seconds for a server to answer


class Machine(NamedTuple):
    """What a run can expect of a machine."""

    name: str
    image_size: int  # short side in pixels
    batch_size: int  # labelled images of a step, and as many unlabelled ones
    max_steps: int


CPU = Machine("a CPU", 240, 4, 3000)
SMALL_GPU = Machine("a GPU of less than 16 GB", 480, 8, 20_000)
LARGE_GPU = Machine("a GPU of 16 GB or more", 640, 16, 20_000)


class DataFacts(NamedTuple):
    """What the choices are made from."""

    labelled: int  # images
    unlabelled: int
    size: tuple[int, int]  # (H, W) of the labelled image whose short side is the median
    objects: np.ndarray  # per labelled image
    side: float  # of the smaller objects (a quarter is smaller still), a fraction of the short side
    classes: list[str]
    unseen: list[str]  # classes without a labelled box


def machine_of(device: torch.device) -> Machine:
    """The kind of machine that a device is."""
    if device.type != "cuda":
        return CPU
    memory = torch.cuda.get_device_properties(device).total_memory
    return LARGE_GPU if memory >= 15.5e9 else SMALL_GPU


# ---- the data ------------------------------------------------------------------------------------


def facts_of(splits: Splits) -> DataFacts:
    """Facts about the labelled images of a run, of a sample of them where there are many."""
    targets = sample_targets(splits.labelled, MAX_LOOKED_AT)
    sizes = sorted((size for size in splits.labelled.sizes if min(size) > 0), key=min) or [(1, 1)]
    sides = [
        ((target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1).sqrt() / min(target["size"]))
        for target in targets
    ]
    all_sides = torch.cat([*sides, torch.zeros(0)])
    labels = torch.cat([target["labels"] for target in targets] or [torch.zeros(0)])
    names = [str(row["name"]) for row in splits.categories]
    seen = set(labels.tolist())
    return DataFacts(
        labelled=len(splits.labelled),
        unlabelled=len(splits.unlabelled),
        size=sizes[len(sizes) // 2],
        objects=np.array([len(target["labels"]) for target in targets]),
        side=float(all_sides.quantile(0.25)) if len(all_sides) else 1.0,
        classes=names,
        unseen=[name for label, name in enumerate(names) if label not in seen],
    )


# ---- choices -------------------------------------------------------------------------------------


def choose(config: Config, facts: DataFacts, machine: Machine) -> tuple[Config, list[str]]:
    """Fill in what the preset leaves open.

    Returns:
        The settings, nothing left open; a line about each choice.
    """
    config, lines = _as_in_burn_in(config)
    if config.image_size is None:
        size, why = image_size(facts, machine)
        config = check(change(config, image_size=size))
        lines.append(f"--image-size {size}: {why}")
    if config.detector_kwargs.num_queries is None and config.detector in WITH_QUERIES:
        most = int(facts.objects.max(initial=0))
        queries = -(-QUERIES_PER_OBJECT * most // 50) * 50
        queries = min(max(queries, QUERIES[0]), QUERIES[1])
        config = change(config, num_queries=queries)
        lines.append(f"--queries {queries}: up to {most} objects per image")
    optimizer = config.optimizer
    batch, unlabelled_batch = optimizer.batch_size, optimizer.unlabelled_batch_size
    if 0 in (batch, unlabelled_batch):
        batch, unlabelled_batch = (
            batch or machine.batch_size,
            unlabelled_batch or machine.batch_size,
        )
        config = change(config, batch_size=batch, unlabelled_batch_size=unlabelled_batch)
        words = f"--batch-size {batch}"
        if config.method != "supervised":
            words += f" --unlabelled-batch-size {unlabelled_batch}"
        lines.append(f"{words}: for {machine.name}")
    if config.steps == 0:
        steps = math.ceil(EPOCHS * facts.labelled / batch)
        steps = min(max(steps, MIN_STEPS), machine.max_steps)
        config = change(config, steps=steps)
        epochs = steps * batch / facts.labelled
        lines.append(
            f"--steps {steps}: {epochs:.0f} epochs of the {facts.labelled} labelled images"
        )
    if config.detector_kwargs.backbone is None:
        config, line = _with_backbone(config)
        lines.append(line)
    return config, lines


def _as_in_burn_in(config: Config) -> tuple[Config, list[str]]:
    """Image size, queries and backbone of the run that this one starts from, where left open."""
    if not config.burn_in:
        return config, []
    stored = load_burn_in(config.burn_in)[1]
    kwargs = stored.get("detector_kwargs") or {}
    taken = {}
    if config.image_size is None and stored.get("image_size"):
        taken["image_size"] = stored["image_size"]
    for name in ("num_queries", "backbone"):
        if getattr(config.detector_kwargs, name) is None and kwargs.get(name):
            taken[name] = kwargs[name]
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in taken.items())
    lines = [f"{words}: as in {config.burn_in}"] if taken else []
    return check(change(config, **taken)), lines


def image_size(facts: DataFacts, machine: Machine) -> tuple[int, str]:
    """The short side that images are resized to, and why."""
    size, why = machine.image_size, f"for {machine.name}"
    if facts.side * size < SMALL_OBJECT:
        wanted = SMALL_OBJECT / max(facts.side, 1e-6)
        size = math.ceil(min(wanted, 1.5 * machine.image_size) / 16) * 16
        pixels = f"{facts.side * size:.0f} pixels or less"
        why = f"{why}, larger for small objects (a quarter then has sides of {pixels})"
    if min(facts.size) < size:
        size, why = min(facts.size), "the short side of the images, which are not enlarged"
    height, width = resized(facts.size, size, round(size * 1333 / 800))
    return size, f"{why}; {facts.size[1]} x {facts.size[0]} pixels become {width} x {height}"


def _with_backbone(config: Config) -> tuple[Config, str]:
    """ResNet-18 with ImageNet weights, or `tiny` where there are none; and a line about it."""
    weights = config.detector_kwargs.backbone_weights
    if weights == PRETRAINED and not _can_get(PRETRAINED):
        advice = "give --backbone resnet18 --backbone-weights FILE, if you have one"
        reason = (
            "the ImageNet weights of ResNet-18 are neither on this machine nor to be downloaded"
        )
        print(f"warning: {reason}: starting from random weights; {advice}", file=sys.stderr)
        weights = None
    if weights is None:
        config = change(config, backbone="tiny", backbone_weights=None)
        return config, "--backbone tiny: it learns from random weights"
    config = change(config, backbone="resnet18", backbone_weights=weights)
    return config, f"--backbone resnet18: with the weights {weights}"


def _can_get(weights: str) -> bool:
    """Whether torchvision's weights of ResNet-18 are here now; they are downloaded if need be."""
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(WAIT)
        silent = io.StringIO()
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            torchvision.models.ResNet18_Weights[weights].get_state_dict(progress=False)
    except Exception:  # no network, no disk, a damaged file: there are no weights
        return False
    finally:
        socket.setdefaulttimeout(before)
    return True


# ---- what a user should know before hours of training --------------------------------------------


def warnings_of(config: Config, facts: DataFacts) -> list[str]:
    """What is likely to go wrong with these data and settings, a line each."""
    lines = []
    queries, most = config.detector_kwargs.num_queries, int(facts.objects.max(initial=0))
    if queries and most > queries:
        fault = f"an image has {most} objects, but only {queries} can be found"
        lines.append(f"{fault}: give --queries {-(-most // 50) * 50}")
    elif queries and config.method == "semi-detr":
        candidates = config.semi_detr.candidates
        full = int((facts.objects * candidates > queries).sum())
        if full > 0.05 * len(facts.objects):
            share = f"{full} of {len(facts.objects)} images have too many objects for {queries}"
            wanted = f"one-to-many matching takes {candidates} for each: give more --queries"
            lines.append(f"{share} queries: {wanted}, or fewer --candidates")
    if most > DETECTIONS:
        reason = f"an image has {most} objects, and detections are the {DETECTIONS} best of each"
        lines.append(f"{reason}: cut such images into parts to have all found and counted")
    if facts.unseen and facts.labelled <= MAX_LOOKED_AT:
        names = ", ".join(map(repr, facts.unseen[:5])) + ", ..." * (len(facts.unseen) > 5)
        count = f"{len(facts.unseen)} of {len(facts.classes)} classes have no labelled box"
        lines.append(f"{count} and will not be found: {names}; label some, or raise --percent")
    if facts.objects.sum() == 0:
        lines.append("no labelled image has a box: there is nothing to learn")
    if config.preset == "photos" and config.method != "supervised" and not config.burn_in:
        reason = "an untrained teacher finds no pseudo-boxes"
        lines.append(f"{reason}: train with --method supervised first, and give it as --burn-in")
    return lines


def heading(config: Config, facts: DataFacts, machine: Machine) -> str:
    """What the choices are for."""
    images = f"{facts.labelled} labelled and {facts.unlabelled} unlabelled images"
    objects = f"{facts.objects.mean() if len(facts.objects) else 0:.1f} objects per image"
    return f"preset photos, {images}, {len(facts.classes)} classes, {objects}, on {machine.name}:"


def further_lines(config: Config, splits: Splits) -> list[str]:
    """Choices that were made for everybody, where another one may fit better."""
    lines = []
    if config.views.flip and splits.flip:
        lines.append("views are mirrored: give --no-flip for letters, digits and signs")
    if config.method == "semi-detr" and config.semi_detr.one_to_many_share == 1:
        reason = "one-to-many matching to the end, with NMS at detection"
        lines.append(f"--one-to-many-share 1: {reason}; a run of days may gain by 0.5")
    if config.percent == 100:
        lines.append("--percent 100: all labels are used")
    return lines


def plan(config: Config, splits: Splits, device: torch.device) -> tuple[Config, list[str]]:
    """The settings with nothing left open, and the lines to print before the run.

    Other presets leave nothing open, and get the warnings alone; the embedded data need none.
    """
    chooses = config.preset == "photos" and is_open(config)
    if config.data == "digits" and not chooses:
        return config, []
    facts, machine = facts_of(splits), machine_of(device)
    lines = []
    if chooses:
        config, chosen = choose(config, facts, machine)
        config = check(dataclasses.replace(config, categories=splits.categories))
        lines = [heading(config, facts, machine)]
        lines += [f"  {line}" for line in chosen + further_lines(config, splits)]
    return config, lines + [f"warning: {line}" for line in warnings_of(config, facts)]


def is_open(config: Config) -> bool:
    """Whether something is left to be chosen."""
    kwargs, optimizer = config.detector_kwargs, config.optimizer
    numbers = (config.steps, optimizer.batch_size, optimizer.unlabelled_batch_size)
    needs_queries = config.detector in WITH_QUERIES and kwargs.num_queries is None
    return 0 in numbers or config.image_size is None or kwargs.backbone is None or needs_queries


def reopened(stored: Config, given: Settings) -> Config:
    """A stored run with what `given` leaves open left open again, to compare the two."""
    kwargs = dataclasses.asdict(given.detector_kwargs)
    names = [name for name in ("num_queries", "backbone") if kwargs[name] is None]
    stored = change(stored, **dict.fromkeys(names))
    if "backbone" in names:
        stored = change(stored, backbone_weights=given.detector_kwargs.backbone_weights)
    sizes = (given.optimizer.batch_size, given.optimizer.unlabelled_batch_size)
    of_sizes = ("batch_size", "unlabelled_batch_size")
    stored = change(stored, **{name: 0 for name, size in zip(of_sizes, sizes) if size == 0})
    if given.steps == 0:
        stored = change(stored, steps=0)
    if given.image_size is None:
        views, test_size = given.views, given.detector_kwargs.test_size
        sides = {"short_sides": views.short_sides, "long_side": views.long_side}
        stored = change(stored, image_size=None, test_size=test_size, **sides)
    return stored
