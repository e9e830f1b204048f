"""What is measured during training.

AP, and the teacher's pseudo-boxes against the truth that training never sees.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from semidetr_lite import distributed
from semidetr_lite.boxes import to_model
from semidetr_lite.contracts import Target, View
from semidetr_lite.data import digits
from semidetr_lite.data.coco import CocoDataset, find_annotations
from semidetr_lite.data.splits import Dataset, Subset, sample_targets
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import box_errors, evaluate, evaluate_classes, evaluate_voc
from semidetr_lite.matching import PaddedTargets, layer_costs, matched_costs
from semidetr_lite.methods.cost_mining import select_mined
from semidetr_lite.methods.mean_teacher import (
    MeanTeacher,
    PseudoBoxes,
    TeacherStudent,
    select_pseudo_boxes,
)

# that are read before they are detected in
IMAGES_AT_ONCE = 200
PIXELS_READ_AT_ONCE = 50_000_000
# pseudo-boxes of a class for each object that labelled images have of it: fewer or more are
# named in a warning
FEW, MANY = 0.05, 4.0


def measure(
    detector: Detector, dataset: Dataset, images: int | None = None, voc: bool = False
) -> dict:
    """The twelve COCO figures of a detector on the first `images` images of a dataset.

    With `voc` also VOC's two. Each process takes its shard of the images; the figures are of all.
    """
    detections, targets = detect_dataset(detector, dataset, images)
    further = evaluate_voc(detections, targets) if voc else {}
    return evaluate(detections, targets) | {
        key: value for key, value in further.items() if key != "per_class"
    }


def measure_classes(
    detector: Detector, dataset: Dataset, categories: list[dict]
) -> tuple[dict, dict[str, dict]]:
    """The twelve COCO figures, and {class name: {"AP", "AP50", "boxes"}}, on all images.

    Args:
        categories: [{"name"}] in the order of the labels.
    """
    figures, classes = evaluate_classes(*detect_dataset(detector, dataset))
    return figures, {str(categories[label]["name"]): found for label, found in classes.items()}


def detect_dataset(
    detector: Detector, dataset: Dataset, images: int | None = None
) -> tuple[list[Target], list[Target]]:
    """What a detector finds in the first `images` images of a dataset, and their targets.

    Each process takes its shard of the images; what it returns is of all.
    """
    own = []
    for pairs in chunks_of(dataset, distributed.shard(min(len(dataset), images or len(dataset)))):
        found = detector.detect([image for image, _ in pairs])
        own += [(detection, target) for detection, (_, target) in zip(found, pairs, strict=True)]
    every = [pair for part in distributed.all_gather(own) for pair in part]
    return [detection for detection, _ in every], [target for _, target in every]


def chunks_of(dataset: Dataset, indices: Iterable[int]) -> Iterator[list[View]]:
    """The images of a dataset and their targets, in lists that fit into memory."""
    pairs, pixels = [], 0
    for index in indices:
        image, target = dataset[index]
        pairs.append((image, target))
        pixels += image.shape[-1] * image.shape[-2]
        if len(pairs) == IMAGES_AT_ONCE or pixels > PIXELS_READ_AT_ONCE:
            yield pairs
            pairs, pixels = [], 0
    if pairs:
        yield pairs


class Renamed:
    """A dataset whose labels are those of a detector, by the names of the classes.

    Objects of classes that the detector does not know are left out.

    Args:
        dataset: the images.
        names: of its classes, in the order of its labels.
        categories: [{"name"}] of the detector, in the order of its labels.

    Attributes:
        unknown: names of classes that the detector does not know.

    Raises UserError where it knows none of them.
    """

    def __init__(self, dataset: Dataset, names: list[str], categories: list[dict]):
        self.dataset, self.sizes = dataset, dataset.sizes
        labels = {row["name"]: label for label, row in enumerate(categories)}
        self.unknown = [name for name in names if name not in labels]
        self.labels = torch.tensor([labels.get(name, -1) for name in names], dtype=torch.int64)
        if len(self.unknown) == len(names):
            ours, theirs = (", ".join(map(repr, [*each][:3])) for each in (labels, names))
            raise UserError(f"the detector knows {ours}, but the data have {theirs}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> View:
        image, target = self.dataset[index]
        labels = self.labels[target["labels"]]
        known = labels >= 0
        per_box = {
            key: cast(dict, target)[key][known]
            for key in ("boxes", "crowd", "difficult", "area")
            if key in target
        }
        return image, cast(Target, {**target, **per_box, "labels": labels[known]})


def open_other(
    data: str, images: str | None, categories: list[dict], validation: str | None = None
) -> Dataset:
    """Data to measure a detector on that it was not trained on, with its labels.

    Args:
        data, images: as `find_annotations` takes them; validation images count, or all images
            where there are none. Or "digits", whose test split it is.
        categories: [{"name"}] of the detector, in the order of its labels.
        validation: what of the data to measure on, a json or a folder.

    Raises UserError for data that cannot be used, and for other classes than the detector's.
    """
    if data == "digits":
        splits = digits.load()
        renamed = Renamed(splits.test, _names(splits.categories), categories)
    else:
        train, held_out = find_annotations(data, images, validation)
        dataset = CocoDataset(held_out or train)
        without_labels = set(dataset.without_labels if dataset.labelled_ids is not None else ())
        labelled = [index for index in range(len(dataset)) if index not in without_labels]
        renamed = Renamed(Subset(dataset, labelled), _names(dataset.categories), categories)
    if renamed.unknown:
        names = ", ".join(map(repr, renamed.unknown[:3]))
        message = f"{len(renamed.unknown)} classes that the detector does not know are left out"
        print(f"{data}: {message}: {names}", file=sys.stderr)
    return renamed


def _names(categories: list[dict]) -> list[str]:
    return [row["name"] for row in categories]


@torch.no_grad()
def plain_pseudo_boxes(method: TeacherStudent, images: list) -> PseudoBoxes:
    """The teacher's boxes in images of one size, which it sees at the size of training."""
    if not isinstance(method, MeanTeacher):  # Soft Teacher and Dense Teacher
        detections = method.teacher.detect(images, top=method.max_pseudo_boxes)
        boxes, scores, labels = (
            pad_sequence([detection[key] for detection in detections], True)
            for key in ("boxes", "scores", "labels")
        )
        return PseudoBoxes(boxes, scores, labels, scores > 0)
    sizes = torch.tensor([image.shape[-2:] for image in images])
    outputs = method.teacher([method.teacher.at_test_size(image) for image in images])
    return select_pseudo_boxes(outputs, sizes, method.max_pseudo_boxes, method.nms)


def iter_readable(dataset: Dataset, images: int) -> Iterator[View]:
    """The first `images` images of a dataset, less those that cannot be read."""
    for index in range(min(images, len(dataset))):
        try:
            yield dataset[index]
        except UserError:  # training has counted it
            continue


def pseudo_quality(method: TeacherStudent, dataset: Dataset, images: int = 100) -> dict:
    """Precision and recall (IoU 0.5, right class) of the confident boxes.

    Where boxes are mined, also the figures of those that are mined and not confident: their number
    "mined_boxes" on these images; "mined_precision"; and "mined_recall", the fraction that they
    find of the objects that no confident box finds. The same two with "_any_class" ask for the
    place alone: consistency queries are made from a box, not from its class.

    Images without a known truth are passed over; {} where there is no other.
    """
    hits = boxes = objects = measured = 0
    mined: Counter = Counter()  # of boxes that are mined and not confident
    for image, target in iter_readable(dataset, images):
        if "truth" not in target:
            continue
        measured += 1
        truth, pseudo = target["truth"], plain_pseudo_boxes(method, [image])
        confident = pseudo.above(method.score_threshold)[0].cpu()
        found = detection_of(pseudo, confident)
        hits += len(box_errors(found, truth)["hits"])
        boxes, objects = boxes + int(confident.sum()), objects + len(truth["labels"])
        if mines(method):
            mined_only = mined_of_image(method, image, pseudo) & ~confident
            mined.update(mined_counts(found, detection_of(pseudo, mined_only), truth))
    if not measured:
        return {}
    figures = {
        "pseudo_precision": round(hits / max(boxes, 1), 4),
        "pseudo_recall": round(hits / max(objects, 1), 4),
    }
    if mines(method):
        figures["mined_boxes"] = mined["boxes"]
        for name in ("", "_any_class"):
            precision = mined[f"right{name}"] / max(mined["boxes"], 1)
            recall = mined[f"rescued{name}"] / max(mined[f"missed{name}"], 1)
            figures[f"mined_precision{name}"] = round(precision, 4)
            figures[f"mined_recall{name}"] = round(recall, 4)
    return figures


def mined_counts(confident: Target, mined: Target, truth: Target) -> dict[str, int]:
    """What mining adds in one image: boxes, right ones, objects missed before, those now found.

    Args:
        confident, mined: detections; no box is in both.
        truth: the objects.
    """
    errors = [box_errors(boxes, truth) for boxes in (confident, mined)]
    missed, still_missed = (set(one["misses"].tolist()) for one in errors)
    on_object = [box_iou(one["boxes"], truth["boxes"]) >= 0.5 for one in (confident, mined)]
    without_box = ~on_object[0].any(0)
    return {
        "boxes": len(mined["labels"]),
        "right": len(errors[1]["hits"]),
        "missed": len(missed),
        "rescued": len(missed - still_missed),
        "right_any_class": int(on_object[1].any(1).sum()),
        "missed_any_class": int(without_box.sum()),
        "rescued_any_class": int((without_box & on_object[1].any(0)).sum()),
    }


def mines(method: TeacherStudent) -> bool:
    """Whether a method mines boxes by their matching costs."""
    return getattr(method, "mining", "none") != "none"


def objects_per_class(dataset: Dataset, num_classes: int, images: int = 500) -> list[float]:
    """Objects of each class per image, without crowd regions, over an even sample of `images`."""
    targets = sample_targets(dataset, images)
    counts = torch.zeros(num_classes)
    for target in targets:
        crowd = target.get("crowd", torch.zeros(len(target["labels"]), dtype=torch.bool))
        counts += torch.bincount(target["labels"][~crowd], minlength=num_classes)
    return (counts / max(len(targets), 1)).tolist()


def class_warning(pseudo: list[float], objects: list[float], names: list[str]) -> str | None:
    """A sentence if the teacher finds hardly any objects of a class, or far too many.

    Args:
        pseudo: confident pseudo-boxes of each class per unlabelled image, over many steps.
        objects: objects of each class per labelled image; a class without any is passed over.
        names: of the classes.
    """
    known = [row for row in zip(names, pseudo, objects, strict=True) if row[2] > 0]
    faults = {
        "hardly any": [row for row in known if row[1] < FEW * row[2]],
        "too many": [row for row in known if row[1] > MANY * row[2] + 0.1],
    }
    parts = []
    for words, rows in faults.items():
        classes = [
            f"{name!r} ({found:.2g} an image, labels {there:.2g})" for name, found, there in rows
        ]
        if classes:
            more = ", ..." if len(classes) > 3 else ""
            parts.append(f"{words} pseudo-boxes of {', '.join(classes[:3])}{more}")
    return "; ".join(parts) or None


def detection_of(pseudo: PseudoBoxes, keep: torch.Tensor) -> Target:
    """Some pseudo-boxes of one image, those of `keep` (K,) bool, as a detection on the CPU."""
    return {
        "boxes": pseudo.boxes[0].cpu()[keep],
        "labels": pseudo.labels[0].cpu()[keep],
        "scores": pseudo.scores[0].cpu()[keep],
    }


@torch.no_grad()
def mined_of_image(
    method: TeacherStudent, image: torch.Tensor, pseudo: PseudoBoxes
) -> torch.Tensor:
    """Which pseudo-boxes of one image are mined: (K,) bool on the CPU."""
    return torch.from_numpy(matched_costs_of_image(method, image, pseudo)[1][0])


@torch.no_grad()
def pseudo_box_log(
    method: TeacherStudent, dataset: Dataset, step: int, images: int = 8
) -> list[dict]:
    """Lines of pseudo_boxes.jsonl.

    The teacher's boxes on a few fixed images, the matching cost of each, and what becomes of them.
    """
    lines = []
    for image, target in iter_readable(dataset, images):
        pseudo = plain_pseudo_boxes(method, [image])
        valid = pseudo.valid[0].cpu().numpy()
        kept = pseudo.above(method.score_threshold)[0].cpu().numpy()
        costs, mined_mask = matched_costs_of_image(method, image, pseudo)
        matched, mined = costs[0, valid], mined_mask[0, valid]
        scores = pseudo.scores[0].cpu().numpy()[valid]
        boxes = pseudo.boxes[0].cpu().numpy()[valid]
        lines.append({
            "step": step,
            "image_id": target["image_id"],
            "boxes": [[round(float(x), 2) for x in box] for box in boxes],
            "scores": [round(float(score), 4) for score in scores],
            "labels": pseudo.labels[0].cpu().numpy()[valid].tolist(),
            "cost": [None if cost != cost else round(float(cost), 4) for cost in matched],
            "kept": kept[valid].tolist(),
            "mined": mined.tolist(),
        })  # fmt: skip
    return lines


def matched_costs_of_image(
    method: TeacherStudent, image: torch.Tensor, pseudo: PseudoBoxes
) -> tuple[np.ndarray, np.ndarray]:
    """The matching costs of one image's pseudo-boxes, and which boxes are mined: (1, K) each.

    As in training, the confident boxes and the mining candidates are matched, with the costs of the
    last decoder layer; the cost of all others is nan.
    """
    if not isinstance(method, MeanTeacher):  # nothing is matched to queries there
        return np.full(pseudo.valid.shape, np.nan), np.zeros(pseudo.valid.shape, dtype=bool)
    candidates = method.mining_candidates(pseudo)
    boxes = to_model(pseudo.boxes, image.shape[-2:])
    valid = pseudo.above(method.score_threshold) | candidates
    targets = PaddedTargets(boxes, pseudo.labels, valid)
    outputs = method.student([method.student.at_test_size(image)])
    last_layer = stack_layers(outputs).last_of_decoder()
    costs = layer_costs(last_layer, targets)[0].cpu().numpy()
    matched = matched_costs(costs, valid.cpu().numpy())
    # nothing is mined before the first step
    threshold = float(method.stats.get("cost_threshold", -np.inf))
    return matched, select_mined(matched, candidates.cpu().numpy(), threshold, method.mining)


def duplicates(
    detector: Detector, dataset: Dataset, images: int = 150, score: float = 0.3, nms: float = 0.6
) -> dict:
    """Extra boxes of the right class on an object that has one already, per object found.

    A box is on an object at IoU 0.5. "duplicates" counts all boxes that score at least `score`,
    "duplicates_nms" those that NMS at `nms` leaves.
    """
    overlaps = {"duplicates": 1.0, "duplicates_nms": nms}  # no two overlap by more than 1
    boxes, objects = dict.fromkeys(overlaps, 0), dict.fromkeys(overlaps, 0)
    for pairs in chunks_of(dataset, range(min(len(dataset), images))):
        for name, overlap in overlaps.items():
            detections = detector.detect([image for image, _ in pairs], score, nms=overlap)
            for detection, (_, target) in zip(detections, pairs, strict=True):
                same = detection["labels"][:, None] == target["labels"]
                hit = same & (box_iou(detection["boxes"], target["boxes"]) >= 0.5)
                boxes[name] += int(hit.any(1).sum())
                objects[name] += int(hit.any(0).sum())
    return {
        name: round((boxes[name] - objects[name]) / max(objects[name], 1), 4) for name in overlaps
    }
