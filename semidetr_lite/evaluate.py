"""How good detections are: COCO's twelve figures, Pascal VOC's AP, and the errors box by box.

COCO's figures come from pycocotools, so that a number from here may stand beside a published one.
Where hotcoco is installed (`pip install 'semidetr-lite[fast]'`) it computes the same bits in a
hundredth of the time. A detection is right at an IoU threshold t if it overlaps a truth box of its
class by IoU >= t and no detection with a higher score has taken this box. AP is the area under the
precision-recall curve, averaged over the classes and over t = 0.50, 0.55 ... 0.95. AR is the recall
of at most 1, 10 or 100 detections per class and image, averaged the same way. Small boxes have an
area under 32 x 32 pixels, medium ones under 96 x 96.

A crowd region ("crowd") is truth that need not be found: detections inside it are neither right nor
wrong.
"""

import importlib.util
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torchvision.ops import box_area, box_iou

from semidetr_lite.contracts import Target
from semidetr_lite.data.coco import read_coco
from semidetr_lite.detection_files import detection_rows
from semidetr_lite.files import read_json

FIGURES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
TOP = 100  # detections per image that count, those with the highest scores
Evaluator = Literal["auto", "pycocotools", "hotcoco"]


def evaluate(
    detections: Sequence[Target] | str | os.PathLike,
    targets: Sequence[Target] | str | os.PathLike,
    evaluator: Evaluator = "auto",
) -> dict[str, float]:
    """COCO's twelve figures, each in 0..1, nan where there is no truth to measure it on.

    Args:
        detections: one dict per image, of which the `TOP` highest scores count; or the path of a
            COCO results file. Detections that are not finite are ignored, and so are those on
            images that the ground truth does not list.
        targets: one dict per image, in the same order and in pixels of the same image; or the path
            of a COCO ground truth file. A box without "area" has the area of its sides.
        evaluator: the library that computes the figures; auto: hotcoco where it is installed, else
            pycocotools, the reference. Both give the same bits.

    Raises:
        UserError: a file that cannot be used.
        ValueError: lists of unequal length, or a list and a path.
    """
    if isinstance(detections, str | os.PathLike) and isinstance(targets, str | os.PathLike):
        truth = read_coco(targets)
        return _figures(truth, detection_rows(detections, read_json(detections), truth), evaluator)
    if isinstance(detections, str | os.PathLike) or isinstance(targets, str | os.PathLike):
        raise ValueError("evaluate takes two lists of dicts or two paths, not one of each")
    _check_lengths(detections, targets)
    return _figures(_truth_of_dicts(targets), _detections_of_dicts(detections), evaluator)


def _check_lengths(detections: Sequence[Target], targets: Sequence[Target]) -> None:
    if len(detections) != len(targets):
        counts = f"{len(detections)} detections for {len(targets)} targets"
        raise ValueError(f"{counts}: one dict per image in each")


def evaluate_voc(detections: Sequence[Target], targets: Sequence[Target]) -> dict:
    """Pascal VOC's AP at an IoU of 0.5, all detections counted, by score over all images.

    A detection goes to the truth box of its class that it overlaps most, whether taken or not: the
    first one there is right, a later one wrong. On a box marked "difficult" or "crowd" it is
    neither, and such a box need not be found.

    Args:
        detections, targets: one dict per image in each. Boxes are in pixels, width x2 - x1: what
            voc_to_coco.py makes of inclusive corners, so that IoUs are the official ones.

    Returns:
        {"AP50_11point", "AP50_allpoint", "per_class" {label: the two and "boxes"}}. The first
        averages the best precision at recall >= 0, 0.1 ... 1 (VOC 2007), the second is the area
        under the precision made monotone (VOC 2010 on). Values are in 0..1, averaged over the
        classes that have "boxes" to find, nan without any.

    Raises:
        ValueError: lists of unequal length.

    Source: the VOC development kit, VOCevaldet.m.
    """
    _check_lengths(detections, targets)
    ignored = [_marked(target, "difficult") | _marked(target, "crowd") for target in targets]
    verdicts = [_voc_verdicts(*image) for image in zip(detections, targets, ignored)]
    labels, scores, right = np.concatenate([np.zeros((3, 0)), *verdicts], axis=1)
    per_image = [target["labels"].cpu()[~ignore] for target, ignore in zip(targets, ignored)]
    to_find = np.concatenate([np.zeros(0, dtype=int), *per_image])
    per_class = {}
    for label, boxes in zip(*np.unique(to_find, return_counts=True)):
        order = np.argsort(-scores[labels == label], kind="stable")
        eleven_point, all_point = _voc_average_precision(right[labels == label][order], boxes)
        per_class[int(label)] = {
            "AP50_11point": eleven_point,
            "AP50_allpoint": all_point,
            "boxes": int(boxes),
        }
    means = {
        name: float(np.mean([row[name] for row in per_class.values()])) if per_class else np.nan
        for name in ("AP50_11point", "AP50_allpoint")
    }
    return {**means, "per_class": per_class}


def _voc_average_precision(right: np.ndarray, boxes: int) -> tuple[float, float]:
    """The 11-point and the all-point AP of a class.

    `right` (N,) says whether each detection is right, by falling score; `boxes` are to be found.
    """
    hits = right.cumsum()
    recall, precision = hits / boxes, hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    at_levels = [best[recall >= level / 10].max(initial=0) for level in range(11)]
    area = (np.diff(recall, prepend=0) * best).sum()
    return float(np.mean(at_levels)), float(area)


def _voc_verdicts(detection: Target, target: Target, ignored: torch.Tensor) -> np.ndarray:
    """Label, score and whether it is right (3, N), of the detections of one image that count.

    They come by falling score; those on `ignored` (T,) boxes do not count.
    """
    boxes, labels, scores = (detection[key].double().cpu() for key in ("boxes", "labels", "scores"))
    order = scores.argsort(descending=True, stable=True)
    order = order[(boxes.isfinite().all(1) & scores.isfinite())[order]]
    boxes, labels, scores = boxes[order], labels[order], scores[order]
    same = labels[:, None] == target["labels"].cpu()
    overlap = (box_iou(boxes, target["boxes"].double().cpu()) * same).numpy()
    # (N, T + 1): one more box that nothing overlaps, for images without truth
    overlap = np.pad(overlap, ((0, 0), (0, 1)))
    best = overlap.argmax(1)
    hit = overlap.max(1) >= 0.5
    first = np.zeros(len(best), dtype=bool)
    first[hit.nonzero()[0][np.unique(best[hit], return_index=True)[1]]] = True
    counted = ~(hit & np.append(ignored, False)[best])
    return np.stack([labels.numpy(), scores.numpy(), first])[:, counted]


def _marked(target: Target, name: Literal["crowd", "difficult"]) -> torch.Tensor:
    """The marks `name` of a target's boxes, (T,) bool; none where the target has no such field."""
    if name in target:
        return target[name].cpu().bool()
    return torch.zeros(len(target["boxes"]), dtype=torch.bool)


def to_coco_json(
    detections: list[Target], image_ids: list[int], categories: list[dict]
) -> list[dict]:
    """Detections as the rows of a COCO results file.

    Args:
        detections: one dict per image id.
        image_ids: in the same order.
        categories: [{"id", "name"}] in the order of the labels.

    Returns:
        [{"image_id", "category_id", "bbox" [x, y, width, height], "score"}], boxes in pixels,
        rounded to a thousandth.
    """
    rows = []
    for image_id, detection in zip(image_ids, detections, strict=True):
        boxes, scores = detection["boxes"].double(), detection["scores"].double()
        for row in _rows(image_id, detection["labels"], boxes, score=scores):
            row["category_id"] = categories[row["category_id"]]["id"]
            row["bbox"] = [round(value, 3) for value in row["bbox"]]
            row["score"] = round(row["score"], 6)
            rows.append(row)
    return rows


def _rows(
    image_id: int, labels: torch.Tensor, boxes: torch.Tensor, **fields: torch.Tensor
) -> list[dict]:
    """Boxes (N, 4) xyxy of an image, their labels and more fields (N,), as rows of a COCO file."""
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    columns = {"category_id": labels, "bbox": xywh, **fields}
    values = zip(*(column.tolist() for column in columns.values()))
    return [{"image_id": image_id, **dict(zip(columns, row))} for row in values]


def box_errors(detection: Target, truth: Target, iou: float = 0.5) -> dict[str, torch.Tensor]:
    """Which boxes of an image are hits, false alarms and misses.

    From the highest score down, a detection takes the free truth box of its label that it overlaps
    best, if by at least `iou`. One that finds none but lies in a crowd region of its label, with at
    least the fraction `iou` of its own area, is left out. A crowd region is never missed.

    Returns:
        {"hits", "false_alarms"}: indices of `detection`, by falling score; "misses": indices of
        `truth`, in its order. All are int64 on the CPU.
    """
    boxes, labels = detection["boxes"].double().cpu(), detection["labels"].cpu()
    true_boxes, true_labels = truth["boxes"].double().cpu(), truth["labels"].cpu()
    crowd = _marked(truth, "crowd")
    same = labels[:, None] == true_labels[None]
    overlap = (box_iou(boxes, true_boxes) * (same & ~crowd)).numpy()  # (N, T)
    in_crowd = ((_covered(boxes, true_boxes) >= iou) & same & crowd).any(1).tolist()

    free = np.ones(len(true_boxes), dtype=bool)
    hits, false_alarms = [], []
    for index in detection["scores"].argsort(descending=True, stable=True).tolist():
        candidates = np.where(free, overlap[index], 0)
        best = int(candidates.argmax()) if len(candidates) else -1
        if best >= 0 and candidates[best] >= iou:
            free[best] = False
            hits.append(index)
        elif not in_crowd[index]:
            false_alarms.append(index)
    misses = np.flatnonzero(free & ~crowd.numpy()).tolist()
    return {
        "hits": torch.tensor(hits, dtype=torch.int64),
        "false_alarms": torch.tensor(false_alarms, dtype=torch.int64),
        "misses": torch.tensor(misses, dtype=torch.int64),
    }


def _covered(boxes: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """The fraction of each box (N, 4) that lies inside each region (T, 4): (N, T)."""
    corner = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (opposite - corner).clamp(min=0).prod(-1)
    return inside / box_area(boxes)[:, None].clamp(min=1e-9)


def _truth_of_dicts(targets: Sequence[Target]) -> dict:
    """Targets as one COCO ground truth; an image id is an index, a category id is a label."""
    rows = []
    for image_id, target in enumerate(targets):
        boxes = target["boxes"].double().cpu()
        area = target["area"].double() if "area" in target else box_area(boxes)
        crowd = _marked(target, "crowd").int()
        rows += _rows(image_id, target["labels"], boxes, iscrowd=crowd, area=area)
    images = [{"id": image_id} for image_id in range(len(targets))]
    return {"images": images, "annotations": rows}


def _detections_of_dicts(detections: Sequence[Target]) -> list[dict]:
    """The `TOP` highest scores of each image, as rows of a COCO results file."""
    rows = []
    for image_id, detection in enumerate(detections):
        scores, boxes = detection["scores"].double().cpu(), detection["boxes"].double().cpu()
        finite = (boxes.isfinite().all(1) & scores.isfinite()).nonzero()[:, 0]
        top = finite[scores[finite].argsort(descending=True, stable=True)[:TOP]]
        labels = detection["labels"].cpu()[top]
        rows += _rows(image_id, labels, boxes[top], score=scores[top])
    return rows


def evaluate_classes(
    detections: Sequence[Target], targets: Sequence[Target]
) -> tuple[dict, dict[int, dict]]:
    """COCO's figures, of all classes together and of each.

    Args:
        detections, targets: one dict per image in each, as in `evaluate`.

    Returns:
        The figures of `evaluate`; {label: {"AP", "AP50", "boxes"}} of each class that has boxes in
        the truth, crowd regions not counted among them.

    Raises ValueError for lists of unequal length.
    """
    _check_lengths(detections, targets)
    truth = _truth_of_dicts(targets)
    evaluation = _accumulated(truth, _detections_of_dicts(detections))
    if evaluation is None:
        return dict.fromkeys(FIGURES, float("nan")), {}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    classes = {}
    for position, label in enumerate(evaluation.params.catIds):
        rows = [row for row in truth["annotations"] if row["category_id"] == label]
        boxes = sum(not row["iscrowd"] for row in rows)
        if boxes:
            of_class = precision[:, :, position]
            figures = {"AP": float(of_class.mean()), "AP50": float(of_class[0].mean())}
            classes[int(label)] = {**figures, "boxes": boxes}
    return _summary(evaluation), classes


def _figures(
    truth: dict, detections: list[dict], evaluator: Evaluator = "auto"
) -> dict[str, float]:
    """The twelve figures, nan where there is no truth."""
    evaluation = _accumulated(truth, detections, evaluator)
    return dict.fromkeys(FIGURES, float("nan")) if evaluation is None else _summary(evaluation)


def _summary(evaluation) -> dict[str, float]:
    with redirect_stdout(io.StringIO()):
        evaluation.summarize()
    values = [float(value) if value >= 0 else float("nan") for value in evaluation.stats]
    return dict(zip(FIGURES, values))


def _accumulated(truth: dict, detections: list[dict], evaluator: Evaluator = "auto"):
    """An evaluation by pycocotools or hotcoco without what it prints; None without truth."""
    # A class without truth has no AP and would only cost time.
    category_ids = sorted({row["category_id"] for row in truth["annotations"]})
    if not category_ids:
        return None
    if evaluator == "auto":
        evaluator = "hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools"
    library = _library(evaluator)
    with redirect_stdout(io.StringIO()):
        truth_index = _index(library, truth["images"], category_ids, truth["annotations"])
        detection_index = _index(library, truth["images"], category_ids, detections)
        evaluation = library.COCOeval(truth_index, detection_index, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _library(evaluator: str):
    """What holds the classes COCO and COCOeval of an evaluator.

    It is imported here, so that machines without it can still train and detect.
    """
    if evaluator == "hotcoco":
        import hotcoco

        return hotcoco
    from pycocotools import coco, cocoeval

    return SimpleNamespace(COCO=coco.COCO, COCOeval=cocoeval.COCOeval)


def _index(library, images: list[dict], category_ids: list, rows: list[dict]):
    """The index of some rows, which get an id, and crowd and area where they lack them."""
    for number, row in enumerate(rows, 1):
        row["id"] = number  # from 1: pycocotools takes a match with the id 0 for no match
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    coco = library.COCO()
    categories = [{"id": number, "name": str(number)} for number in category_ids]
    # names and sizes, as a json has them, do not matter to boxes
    images = [{"id": image["id"], "file_name": "", "height": 1, "width": 1} for image in images]
    coco.dataset = {"images": images, "categories": categories, "annotations": rows}
    coco.createIndex()
    return coco
