"""What is measured during training.

AP, and the teacher's pseudo-boxes against the truth that training never sees.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from semidetr_lite import distributed
from semidetr_lite.boxes import to_model
from semidetr_lite.data.splits import Dataset
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.pyramid import TorchvisionDetector
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import box_errors, evaluate, evaluate_voc
from semidetr_lite.matching import PaddedTargets, layer_costs, matched_costs
from semidetr_lite.methods.cost_mining import select_mined
from semidetr_lite.methods.mean_teacher import PseudoBoxes, TeacherStudent, select_pseudo_boxes


def measure(
    detector: Detector, dataset: Dataset, images: int | None = None, voc: bool = False
) -> dict:
    """The twelve COCO figures of a detector on the first `images` images of a dataset.

    With `voc` also VOC's two. Each process takes its shard of the images; the figures are of all.
    """
    indices, own = distributed.shard(min(len(dataset), images or len(dataset))), []
    for start in range(0, len(indices), 200):
        pairs = [dataset[index] for index in indices[start : start + 200]]
        found = detector.detect([image for image, _ in pairs])
        own += [(detection, target) for detection, (_, target) in zip(found, pairs, strict=True)]
    detections, targets = zip(
        *(pair for part in distributed.all_gather(own) for pair in part), strict=True
    )
    further = evaluate_voc(detections, targets) if voc else {}
    return evaluate(detections, targets) | {
        key: value for key, value in further.items() if key != "per_class"
    }


@torch.no_grad()
def plain_pseudo_boxes(method: TeacherStudent, images: list) -> PseudoBoxes:
    """The teacher's boxes on images as they are, all of one size."""
    if isinstance(method.teacher, TorchvisionDetector):
        found = method.teacher.detect(images, top=method.max_pseudo_boxes)
        boxes, scores, labels = (
            pad_sequence([one[key] for one in found], True) for key in ("boxes", "scores", "labels")
        )
        return PseudoBoxes(boxes, scores, labels, scores > 0)
    sizes = torch.tensor([image.shape[-2:] for image in images])
    return select_pseudo_boxes(method.teacher(images), sizes, method.max_pseudo_boxes, method.nms)


def iter_readable(dataset: Dataset, images: int) -> Iterator[tuple[torch.Tensor, dict]]:
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

    {} where no truth is known.
    """
    hits = boxes = objects = 0
    mined: Counter = Counter()  # of boxes that are mined and not confident
    for image, target in iter_readable(dataset, images):
        if "truth" not in target:
            return {}
        truth, pseudo = target["truth"], plain_pseudo_boxes(method, [image])
        confident = pseudo.above(method.score_threshold)[0].cpu()
        found = detection_of(pseudo, confident)
        hits += len(box_errors(found, truth)["hits"])
        boxes, objects = boxes + int(confident.sum()), objects + len(truth["labels"])
        if mines(method):
            mined_only = mined_of_image(method, image, pseudo) & ~confident
            mined.update(mined_counts(found, detection_of(pseudo, mined_only), truth))
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


def mined_counts(confident: dict, mined: dict, truth: dict) -> dict[str, int]:
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


def detection_of(pseudo: PseudoBoxes, keep: torch.Tensor) -> dict:
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
        valid, kept = (
            pseudo.valid[0].cpu().numpy(),
            pseudo.above(method.score_threshold)[0].cpu().numpy(),
        )
        matched, mined = (one[0, valid] for one in matched_costs_of_image(method, image, pseudo))
        scores, boxes = (tensor[0].cpu().numpy()[valid] for tensor in (pseudo.scores, pseudo.boxes))
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
    if isinstance(method.student, TorchvisionDetector):  # nothing is matched to queries there
        return np.full(pseudo.valid.shape, np.nan), np.zeros(pseudo.valid.shape, dtype=bool)
    candidates = method.mining_candidates(pseudo)
    boxes = to_model(pseudo.boxes, image.shape[-2:])
    valid = pseudo.above(method.score_threshold) | candidates
    targets = PaddedTargets(boxes, pseudo.labels, valid)
    last_layer = stack_layers(method.student([image])).last_of_decoder()
    costs = layer_costs(last_layer, targets)[0].cpu().numpy()
    matched = matched_costs(costs, valid.cpu().numpy())
    threshold = method.stats.get(
        "cost_threshold", -np.inf
    )  # nothing is mined before the first step
    return matched, select_mined(matched, candidates.cpu().numpy(), threshold, method.mining)


def duplicates(
    detector: Detector, dataset: Dataset, images: int = 150, score: float = 0.3, nms: float = 0.6
) -> dict:
    """Extra boxes of the right class on an object that has one already, per object found.

    A box is on an object at IoU 0.5. "duplicates" counts all boxes that score at least `score`,
    "duplicates_nms" those that NMS at `nms` leaves.
    """
    pairs, found = [dataset[index] for index in range(min(len(dataset), images))], {}
    for name, overlap in (
        ("duplicates", 1.0),
        ("duplicates_nms", nms),
    ):  # no two boxes overlap by more than 1
        boxes = objects = 0
        detections = detector.detect([image for image, _ in pairs], score, nms=overlap)
        for detection, (_, target) in zip(detections, pairs, strict=True):
            same = detection["labels"][:, None] == target["labels"]
            hit = same & (box_iou(detection["boxes"], target["boxes"]) >= 0.5)
            boxes, objects = boxes + int(hit.any(1).sum()), objects + int(hit.any(0).sum())
        found[name] = round((boxes - objects) / max(objects, 1), 4)
    return found
