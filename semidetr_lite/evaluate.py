"""How good detections are: COCO's twelve figures, and box by box what is a hit, a false alarm or a miss.

The figures are pycocotools' own, so that a number from here may stand beside a published one. A detection is right at
an IoU threshold t when it overlaps a truth box of its class, not yet taken by a higher score, by IoU >= t. AP is the
area under the precision-recall curve, averaged over the classes and over t = 0.50, 0.55 ... 0.95; AR is the recall
reached with at most 1, 10 or 100 detections of a class in an image, averaged the same way. Small boxes have an area
under 32 x 32 pixels, medium ones under 96 x 96.

A crowd region ("crowd") is truth nobody has to find: detections inside it are neither right nor wrong.
"""

import io
import os
from contextlib import redirect_stdout

import numpy as np
import torch
from torchvision.ops import box_area, box_iou

from semidetr_lite.data.coco import is_numbers, read_coco
from semidetr_lite.errors import UserError
from semidetr_lite.files import read_json

FIGURES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
TOP = 100  # detections per image that are looked at


def evaluate(detections, targets) -> dict[str, float]:
    """COCO's twelve figures, each in 0..1, nan where there is no truth to measure it on.

    `detections` and `targets` are lists of dicts in the same order, one per image, boxes in pixels of the same image.
    The `TOP` highest scores of an image are looked at; a detection that is not finite is none. A truth box without
    "area" has its own. Or they are the paths of two json files, COCO results and COCO ground truth, whose contents
    reach pycocotools as they are; detections on images that the ground truth does not list are passed over.
    Raises UserError for a file that cannot be used, ValueError for lists of unequal length.
    """
    if isinstance(detections, str | os.PathLike) and isinstance(targets, str | os.PathLike):
        truth = read_coco(targets)
        found = _detections_of_file(detections, truth)
    else:
        if len(detections) != len(targets):
            raise ValueError(f"{len(detections)} detections for {len(targets)} targets: one dict per image in each")
        truth, found = _truth_of_dicts(targets), _detections_of_dicts(detections)
    return _figures(truth, found)


def evaluate_voc(detections: list[dict], targets: list[dict]) -> dict:
    """Pascal VOC's AP at an IoU of 0.5: {"AP50_11point", "AP50_allpoint", "per_class" {label: the two and "boxes"}}.

    `AP50_11point` averages the best precision at recall >= 0, 0.1 ... 1 (VOC 2007), `AP50_allpoint` is the area under
    the precision made monotone (VOC 2010 on). A detection goes to the truth box of its class that it overlaps most,
    taken or not: the first one there is right, a later one wrong. On a box marked "difficult" or "crowd" it is neither,
    and nobody has to find such a box. All detections count, by score over all images. Values in 0..1, averaged over the
    classes with a box to find ("boxes" of them), nan without any. Boxes in pixels, width x2 - x1: what voc_to_coco.py
    makes of inclusive corners, so that IoUs are the official ones. Source: the VOC development kit, VOCevaldet.m.
    """
    if len(detections) != len(targets):
        raise ValueError(f"{len(detections)} detections for {len(targets)} targets: one dict per image in each")
    ignored = [_marked(target, "difficult") | _marked(target, "crowd") for target in targets]
    verdicts = [_voc_verdicts(*image) for image in zip(detections, targets, ignored)]
    labels, scores, right = np.concatenate([np.zeros((3, 0)), *verdicts], axis=1)
    wanted = [target["labels"].cpu()[~ignore] for target, ignore in zip(targets, ignored)]
    per_class = {}
    for label, boxes in zip(*np.unique(np.concatenate([np.zeros(0, dtype=int), *wanted]), return_counts=True)):
        order = np.argsort(-scores[labels == label], kind="stable")
        hits = right[labels == label][order].cumsum()
        recall, precision = hits / boxes, hits / np.arange(1, len(hits) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
        eleven = float(np.mean([best[recall >= step / 10].max(initial=0) for step in range(11)]))
        area = float((np.diff(recall, prepend=0) * best).sum())
        per_class[int(label)] = {"AP50_11point": eleven, "AP50_allpoint": area, "boxes": int(boxes)}
    rows = [[found["AP50_11point"], found["AP50_allpoint"]] for found in per_class.values()] or [[np.nan, np.nan]]
    eleven, area = np.mean(rows, axis=0).tolist()
    return {"AP50_11point": eleven, "AP50_allpoint": area, "per_class": per_class}


def _voc_verdicts(detection: dict, target: dict, ignored: torch.Tensor) -> np.ndarray:
    """(3, N): label, score and whether it is right, of the detections of one image that count, by falling score."""
    boxes, labels, scores = (detection[key].double().cpu() for key in ("boxes", "labels", "scores"))
    order = scores.argsort(descending=True, stable=True)
    order = order[(boxes.isfinite().all(1) & scores.isfinite())[order]]
    boxes, labels, scores = boxes[order], labels[order], scores[order]
    same = labels[:, None] == target["labels"].cpu()
    overlap = (box_iou(boxes, target["boxes"].double().cpu()) * same).numpy()
    overlap = np.pad(overlap, ((0, 0), (0, 1)))  # (N, T + 1): a box that nothing overlaps, for images without truth
    best = overlap.argmax(1)
    hit = overlap.max(1) >= 0.5
    first = np.zeros(len(best), dtype=bool)
    first[hit.nonzero()[0][np.unique(best[hit], return_index=True)[1]]] = True
    counted = ~(hit & np.append(ignored, False)[best])
    return np.stack([labels.numpy(), scores.numpy(), first])[:, counted]


def _marked(target: dict, name: str) -> torch.Tensor:
    """The marks `name` of a target's boxes, (T,) bool; none where the target has no such field."""
    return target[name].cpu().bool() if name in target else torch.zeros(len(target["boxes"]), dtype=torch.bool)


def to_coco_json(detections: list[dict], image_ids: list[int], categories: list[dict]) -> list[dict]:
    """Detections as a COCO results file has them: [{"image_id", "category_id", "bbox" [x, y, width, height], "score"}].

    One detection dict per image id; `categories` [{"id", "name"}] in the order of the labels. Boxes are in pixels,
    rounded to a thousandth.
    """
    rows = []
    for image_id, found in zip(image_ids, detections, strict=True):
        for row in _rows(image_id, found["labels"], found["boxes"].double(), score=found["scores"].double()):
            row["category_id"] = categories[row["category_id"]]["id"]
            box, score = [round(value, 3) for value in row["bbox"]], round(row["score"], 6)
            rows.append({**row, "bbox": box, "score": score})
    return rows


def _rows(image_id, labels: torch.Tensor, boxes: torch.Tensor, **fields: torch.Tensor) -> list[dict]:
    """Boxes (N, 4) xyxy of one image, their labels and further fields (N,), as the rows of a COCO file."""
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    columns = {"category_id": labels, "bbox": xywh, **fields}
    values = zip(*(column.tolist() for column in columns.values()))
    return [{"image_id": image_id, **dict(zip(columns, row))} for row in values]


def box_errors(detection: dict, truth: dict, iou: float = 0.5) -> dict[str, torch.Tensor]:
    """Which boxes of one image are right: "hits" and "false_alarms" index `detection`, "misses" index `truth`.

    From the highest score down, a detection takes the free truth box of its label that it overlaps best, if by at
    least `iou`. One that finds none but lies in a crowd region of its label (the share `iou` of its own area at least)
    is left out of both lists, and a crowd region is never missed. Hits and false alarms come by falling score, misses
    in the order of the truth; all are int64 on the CPU.
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
    lists = {"hits": hits, "false_alarms": false_alarms, "misses": misses}
    return {name: torch.tensor(indices, dtype=torch.int64) for name, indices in lists.items()}


def _covered(boxes: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """The share of each box (N, 4) that lies inside each region (T, 4): (N, T)."""
    corner = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (opposite - corner).clamp(min=0).prod(-1)
    return inside / box_area(boxes)[:, None].clamp(min=1e-9)


def _truth_of_dicts(targets: list[dict]) -> dict:
    """Our targets as one COCO ground truth; images are numbered by their place, labels are the category ids."""
    rows = []
    for image_id, target in enumerate(targets):
        boxes = target["boxes"].double().cpu()
        area = target["area"].double() if "area" in target else box_area(boxes)
        rows += _rows(image_id, target["labels"], boxes, iscrowd=_marked(target, "crowd").int(), area=area)
    return {"images": [{"id": image_id} for image_id in range(len(targets))], "annotations": rows}


def _detections_of_dicts(detections: list[dict]) -> list[dict]:
    """The `TOP` highest scores of each image, as rows of a COCO results file."""
    rows = []
    for image_id, detection in enumerate(detections):
        scores, boxes = detection["scores"].double().cpu(), detection["boxes"].double().cpu()
        finite = (boxes.isfinite().all(1) & scores.isfinite()).nonzero()[:, 0]
        chosen = finite[scores[finite].argsort(descending=True, stable=True)[:TOP]]
        rows += _rows(image_id, detection["labels"].cpu()[chosen], boxes[chosen], score=scores[chosen])
    return rows


def _detections_of_file(path, truth: dict) -> list[dict]:
    """The rows of a COCO results file. Those on images without truth may stay: pycocotools never asks for them."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a COCO results file: it holds no list of detections")
    keys = ("bbox", "image_id", "category_id", "score")
    known = {category["id"] for category in truth["categories"]}
    for place, row in enumerate(rows, 1):
        box, *others = [row.get(key) if isinstance(row, dict) else None for key in keys]
        if not is_numbers(box, 4) or not is_numbers(others, 3):
            raise UserError(f'{path}: detection number {place} needs a "bbox" of 4 numbers and numbers as {keys[1:]}')
        if row["category_id"] not in known:
            raise UserError(f"{path}: detection number {place} has a category_id unknown to the truth, {others[1]}")
    listed = {image["id"] for image in truth["images"]}
    if rows and not any(row["image_id"] in listed for row in rows):
        raise UserError(f"{path}: none of its {len(rows):,} detections is on an image of the truth; another data set?")
    return [{key: row[key] for key in keys} for row in rows]


def _figures(truth: dict, found: list[dict]) -> dict[str, float]:
    """Ask pycocotools, in silence. It is imported here, so that machines without it can still train and detect."""
    from pycocotools.cocoeval import COCOeval

    # A class without truth has no AP and would only cost time.
    measured = sorted({row["category_id"] for row in truth["annotations"]})
    if not measured:
        return dict.fromkeys(FIGURES, float("nan"))
    with redirect_stdout(io.StringIO()):
        indexed = [_index(truth["images"], measured, rows) for rows in (truth["annotations"], found)]
        judge = COCOeval(*indexed, iouType="bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = [float(value) if value >= 0 else float("nan") for value in judge.stats]
    return dict(zip(FIGURES, values))


def _index(images: list[dict], categories: list, rows: list[dict]):
    """pycocotools' view of some rows, which are completed in place where they say nothing of crowd and area."""
    from pycocotools.coco import COCO

    for number, row in enumerate(rows, 1):
        row["id"] = number  # from 1: pycocotools takes a match with the id 0 for no match
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    coco = COCO()
    coco.dataset = {"images": images, "categories": [{"id": category} for category in categories], "annotations": rows}
    coco.createIndex()
    return coco
