"""Known mistakes in the exercises: {exercise: {rule of the right answer: function that breaks it}}.

Each function has the arguments of the exercise's solution. A learner's wrong answer that gives the
same results as one of them is explained by its rule.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from torchvision.ops import roi_align

from semidetr_lite.boxes import inverse_sigmoid, pairwise_overlaps, to_model, to_pixels
from semidetr_lite.data.views import map_boxes
from semidetr_lite.detectors.denoising import group_mask
from semidetr_lite.detectors.transformer import sine_positions
from semidetr_lite.matching import matching_cost

# ---- 01: boxes and views -------------------------------------------------------------------------


def _iou(a, b, clamp=True, union="both", extra=0.0):
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = sides - torch.maximum(a[:, None, :2], b[None, :, :2]) + extra
    common = (sides.clamp(min=0) if clamp else sides).prod(-1)
    area_a = (a[:, 2:] - a[:, :2] + extra).prod(-1)[:, None]
    area_b = (b[:, 2:] - b[:, :2] + extra).prod(-1)[None]
    unions = {
        "both": area_a + area_b - common,
        "twice": area_a + area_b,
        "first": area_a.expand_as(common),
        "second": area_b.expand_as(common),
        "smaller": torch.minimum(area_a, area_b),
    }
    return common / unions[union]


IOU = {
    "the sides of the overlap are clamped at 0: boxes apart do not overlap": partial(
        _iou, clamp=False
    ),
    "the union counts the common area once": partial(_iou, union="twice"),
    "the denominator is the area of the union, not of `a` alone": partial(_iou, union="first"),
    "the denominator is the area of the union, not of `b` alone": partial(_iou, union="second"),
    "the denominator is the area of the union, not the smaller area": partial(
        _iou, union="smaller"
    ),
    "a side is x2 - x1, without one more pixel": partial(_iou, extra=1.0),
}


def _model(boxes, size, swapped=False, scalings=1, centre=True, half=False):
    height, width = size[::-1] if swapped else size
    scale = boxes.new_tensor([width, height, width, height])
    first, second = boxes[:, :2], boxes[:, 2:]
    sides = (second - first) / (2 if half else 1)
    return torch.cat([(first + second) / 2 if centre else first, sides], 1) / scale**scalings


TO_MODEL = {
    "the boxes are divided by the size of the image once, not twice": partial(_model, scalings=2),
    "the boxes are divided by the size of the image": partial(_model, scalings=0),
    "x goes with the width and y with the height": partial(_model, swapped=True),
    "the first two numbers are the centre, not a corner": partial(_model, centre=False),
    "the last two numbers are whole sides, not half of them": partial(_model, half=True),
}


def _pixels(boxes, size, swapped=False, scaled=True, centre=True, half=True):
    height, width = size[::-1] if swapped else size
    sides = boxes[:, 2:] * (0.5 if half else 1)
    first = boxes[:, :2] - sides if centre else boxes[:, :2]
    second = boxes[:, :2] + (sides if centre else boxes[:, 2:])
    scale = boxes.new_tensor([width, height, width, height])
    return torch.cat([first, second], 1) * (scale if scaled else 1)


TO_PIXELS = {
    "x goes with the width and y with the height": partial(_pixels, swapped=True),
    "the boxes are multiplied by the size of the image": partial(_pixels, scaled=False),
    "the first two numbers are the centre, not a corner": partial(_pixels, centre=False),
    "a corner is half a side away from the centre": partial(_pixels, half=False),
}


def _mapped(boxes, matrix, size, swapped=False, low=True, high=True, shortest=1e-3, two=False):
    corners = boxes[:, [0, 1, 2, 3, 0, 3, 2, 1]].unflatten(1, (4, 2))
    points = torch.cat([corners, torch.ones_like(corners[..., :1])], -1) @ matrix.T
    points = points[..., :2] / points[..., 2:]
    hull = points[:, :2].flatten(1) if two else torch.cat([points.amin(1), points.amax(1)], 1)
    limit = torch.tensor(size if swapped else size[::-1], dtype=hull.dtype).repeat(2)
    hull = hull.clamp(min=0) if low else hull
    hull = torch.minimum(hull, limit) if high else hull
    keep = (hull[:, 2:] - hull[:, :2] > shortest).all(1)
    return hull, keep


def _clamped_corners_kept(boxes, matrix, size):
    """keep computed before the clamp."""
    clamped = _mapped(boxes, matrix, size)[0]
    return clamped, _mapped(boxes, matrix, size, low=False, high=False)[1]


MAP_BOXES = {
    "in the clamp x goes up to the width and y up to the height": partial(_mapped, swapped=True),
    "boxes are clamped from above as well, to the width and the height": partial(
        _mapped, high=False
    ),
    "boxes are clamped at 0 as well": partial(_mapped, low=False),
    "boxes are clamped to the image": partial(_mapped, low=False, high=False),
    "a box is kept if both sides are longer than 0.001, not longer than 0": partial(
        _mapped, shortest=0.0
    ),
    "a box whose side is 0 is not kept": partial(_mapped, shortest=-1e-9),
    "the sides are compared after the clamp, which may empty a box": (_clamped_corners_kept),
    "the hull is of all four mapped corners, not of two": partial(_mapped, two=True),
    "the matrix acts on columns (x, y, 1): it must not be transposed": lambda boxes, matrix, size: (
        _mapped(boxes, matrix.T, size)
    ),
}

# ---- 02: evaluation ------------------------------------------------------------------------------


def _precision_recall(hits, objects, ranks=0, total=False):
    found = hits.cumsum(0)
    precision = found / (torch.arange(1, len(hits) + 1) - ranks).clamp(min=1)
    return (found / len(hits) if total else precision), found / objects


PRECISION_RECALL = {
    "recall is over all objects, not over those that are found": lambda hits, objects: (
        _precision_recall(hits, max(1, int(hits.sum())))
    ),
    "precision is over the detections so far, not over all of them": partial(
        _precision_recall, total=True
    ),
    "the ranks begin at 1": partial(_precision_recall, ranks=1),
    "precision comes first, then recall": (
        lambda hits, objects: _precision_recall(hits, objects)[::-1]
    ),
    "the hits so far are counted, not each detection alone": lambda hits, objects: (
        hits / torch.arange(1, len(hits) + 1),
        hits / objects,
    ),
}


def _average_precision(hits, objects, best="ahead", levels=101, first=True):
    precision, recall = (part.tolist() for part in _precision_recall(hits.bool(), objects))
    if best == "ahead":
        precision = list(itertools.accumulate(precision[::-1], max))[::-1]
    elif best == "behind":
        precision = list(itertools.accumulate(precision, max))
    total = 0.0
    for level in range(levels)[0 if first else 1 :]:
        reached = [p for p, r in zip(precision, recall) if r >= level / (levels - 1) - 1e-6]
        total += reached[0] if reached else 0.0
    return total / (levels if first else levels - 1)


def _hits_first(hits, objects):
    return _average_precision(hits.sort(descending=True, stable=True).values, objects)


def _mean_precision_of_hits(hits, objects):
    precision = _precision_recall(hits, objects)[0]
    return float(precision[hits].sum() / objects)


def _area_under_best(hits, objects):
    precision, recall = _precision_recall(hits, objects)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float((recall.diff(prepend=torch.zeros(1)) * best).sum())


AVERAGE_PRECISION = {
    "the precision at a level is the best from there on, not the one where it is reached": partial(
        _average_precision, best="none"
    ),
    "the best precision is of the detections from there on, not of those before": partial(
        _average_precision, best="behind"
    ),
    "equal scores keep the order they came in: hits do not move ahead": _hits_first,
    "the mean is over the 101 levels of recall, not over the hits": _mean_precision_of_hits,
    "the mean is over the 101 levels of recall, not the exact area": _area_under_best,
    "there are 101 levels of recall, not 11": partial(_average_precision, levels=11),
    "the levels begin at recall 0": partial(_average_precision, first=False),
    "recall is over all objects, not over those that are found": lambda hits, objects: (
        _average_precision(hits, max(1, int(hits.sum())))
    ),
    "levels that are never reached count with precision 0": lambda hits, objects: float(
        _precision_recall(hits, objects)[0].mean()
    ),
}

# ---- 03: DETR ------------------------------------------------------------------------------------


def _sines(coordinates, dim, temperature, turn=2 * math.pi, interleaved=True, step=2):
    frequencies = temperature ** (step * torch.arange(dim // 2) / dim)
    angles = coordinates[..., None] * turn / frequencies
    parts = [angles.sin(), angles.cos()]
    return (torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)).flatten(-2)


SINE_POSITIONS = {
    "the coordinates are turned by 2 pi, not by pi": partial(_sines, turn=math.pi),
    "the coordinates are multiplied by 2 pi": partial(_sines, turn=1.0),
    "sine and cosine of one angle stand side by side": partial(_sines, interleaved=False),
    "the exponent of frequency i is 2 i / dim": partial(_sines, step=1),
    "the coordinates stand one after the other, not mixed": lambda coordinates, dim, temperature: (
        _sines(coordinates, dim, temperature)
        .unflatten(-1, (coordinates.shape[-1], dim))
        .transpose(-1, -2)
        .flatten(-2)
    ),
}


def _attention(queries, keys, values, heads, scale="head", over=-1, strided=False):
    def split(part):
        shape = (-1, heads) if strided else (heads, -1)
        part = part.unflatten(1, shape)
        return part.transpose(1, 2).transpose(0, 1) if strided else part.transpose(0, 1)

    q, k, v = map(split, (queries, keys, values))
    length = {"head": q.shape[-1], "all": queries.shape[1], "none": 1}[scale]
    answers = (q @ k.mT / length**0.5).softmax(over) @ v  # (M, Q, D / M)
    answers = answers.transpose(0, 1)
    return (answers.mT if strided else answers).flatten(1)


ATTENTION = {
    "the dot products are divided by the root of a head's length, not of all channels": partial(
        _attention, scale="all"
    ),
    "the dot products are divided by the root of a head's length": partial(
        _attention, scale="none"
    ),
    "the shares of each query sum to 1: the softmax is over the keys": partial(_attention, over=-2),
    "a head takes neighbouring channels, not every M-th": partial(_attention, strided=True),
    "the channels are cut into heads": lambda queries, keys, values, heads: _attention(
        queries, keys, values, 1
    ),
}


def _map_positions(height, width, dim, temperature, over=None, first=1.0, x_first=False):
    rows, columns = over or (height, width)
    y = (torch.arange(height) + first)[:, None].expand(height, width) / rows
    x = (torch.arange(width) + first)[None].expand(height, width) / columns
    return sine_positions(torch.stack([x, y] if x_first else [y, x], -1), dim // 2, temperature)


MAP_POSITIONS = {
    "rows are divided by the height and columns by the width": lambda h, w, dim, temperature: (
        _map_positions(h, w, dim, temperature, over=(w, h))
    ),
    "rows and columns are divided by their number": lambda h, w, dim, temperature: _map_positions(
        h, w, dim, temperature, over=(1, 1)
    ),
    "cells count from 1, not from 0": partial(_map_positions, first=0.0),
    "cells count from 1, not from their centre": partial(_map_positions, first=0.5),
    "y comes first, then x": partial(_map_positions, x_first=True),
}

# ---- 04: matching --------------------------------------------------------------------------------


def _cost(
    logits, pred_boxes, target, pixels=False, giou=True, sign=-1, negative=True, softmax=False
):
    scores = (logits.softmax(-1) if softmax else logits.sigmoid())[:, target["labels"]]
    cost_of_class = -0.25 * (1 - scores) ** 2 * (scores + 1e-8).log()
    if negative:
        cost_of_class = cost_of_class + 0.75 * scores**2 * (1 - scores + 1e-8).log()
    if softmax:
        cost_of_class = -scores
    here, there = to_pixels(pred_boxes, target["size"]), target["boxes"]
    overlap = pairwise_overlaps(here, there)[1 if giou else 0]
    if not pixels:
        here, there = pred_boxes, to_model(there, target["size"])
    l1 = (here[:, None] - there[None]).abs().sum(-1)
    return 2 * cost_of_class + 5 * l1 + sign * 2 * overlap


MATCHING_COST = {
    "the L1 distance is between boxes in 0..1, not in pixels": partial(_cost, pixels=True),
    "the overlap is GIoU, which also compares boxes apart, not IoU": partial(_cost, giou=False),
    "a higher overlap costs less": partial(_cost, sign=1),
    "the class cost has a second part, with 1 - score": partial(_cost, negative=False),
    "the scores are sigmoids, and the class cost is the focal one": partial(_cost, softmax=True),
    "the overlap counts with weight 2": partial(_cost, sign=0),
}


def _pairs(logits, owners, by_target=False):
    """(queries, targets, ones) of {target: query}."""
    pairs = sorted((query, target) for target, query in owners.items())
    pairs = sorted(pairs, key=lambda pair: pair[1]) if by_target else pairs
    queries, targets = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return queries, targets, logits.new_ones(len(pairs))


def _best_permutation(cost, sign=1):
    """{target: query} of the assignment with the least cost."""
    targets = range(cost.shape[1])
    ways = itertools.permutations(range(len(cost)), len(targets))
    best = min(ways, key=lambda way: sum(sign * float(cost[q, t]) for q, t in zip(way, targets)))
    return dict(zip(targets, best))


def _each_its_cheapest(logits, pred_boxes, target, by_target=True):
    cost = matching_cost(logits, pred_boxes, target)
    return _pairs(logits, dict(enumerate(cost.argmin(0).tolist())), by_target)


def _greedy(logits, pred_boxes, target, by_pair=False, by_target=False):
    """Objects in turn, or pairs by rising cost, take what is free."""
    cost = matching_cost(logits, pred_boxes, target)
    order = cost.flatten().argsort() if by_pair else cost.T.argsort(1)
    owners: dict[int, int] = {}
    if by_pair:
        pairs = [divmod(int(index), cost.shape[1]) for index in order]
    else:
        pairs = [(int(query), row) for row, queries in enumerate(order) for query in queries]
    for query, column in pairs:
        if column not in owners and query not in owners.values():
            owners[column] = query
    return _pairs(logits, owners, by_target)


def _one_to_one(logits, pred_boxes, target, sign=1, by_target=False, quality=False):
    cost = matching_cost(logits, pred_boxes, target)
    queries, targets, ones = _pairs(logits, _best_permutation(cost, sign), by_target)
    iou = pairwise_overlaps(to_pixels(pred_boxes, target["size"]), target["boxes"])[0]
    return queries, targets, iou[queries, targets] if quality else ones


GREEDY = "the sum of all costs is the least; a greedy choice may cost the others more"
ONE_TO_ONE = {
    "each object needs a query of its own": partial(_each_its_cheapest, by_target=False),
    "each object needs a query of its own, and pairs come sorted by query": _each_its_cheapest,
    f"{GREEDY} (here objects choose in turn)": _greedy,
    f"{GREEDY} (here the cheapest pair is first)": partial(_greedy, by_pair=True),
    f"{GREEDY}, and pairs come sorted by query": partial(_greedy, by_target=True),
    "the pairs come sorted by query, not by object": partial(_one_to_one, by_target=True),
    "the cheapest assignment is wanted, not the most expensive": partial(_one_to_one, sign=-1),
    "the quality of a one-to-one pair is 1, not its IoU": partial(_one_to_one, quality=True),
}


def _one_to_many(
    logits, pred_boxes, target, alpha, beta, candidates,
    owner="wanted", positive=True, maxima="owned", ties="low", quality="scaled", by_target=False,
):  # fmt: skip
    iou = pairwise_overlaps(to_pixels(pred_boxes, target["size"]), target["boxes"])[0]
    metric = logits.sigmoid()[:, target["labels"]] ** alpha * iou**beta
    wanted: dict[int, list[int]] = {}
    for t in range(metric.shape[1]):
        for query in metric[:, t].argsort(descending=True, stable=True)[:candidates].tolist():
            if metric[query, t] > 0 or not positive:
                wanted.setdefault(query, []).append(t)
    owners = {}
    for query, objects in wanted.items():
        values = metric[query] if owner == "metric" else iou[query]
        among = range(metric.shape[1]) if owner == "all" else objects
        among = list(among)[::-1] if ties == "high" else among
        owners[query] = objects[0] if owner == "first" else max(among, key=lambda t: values[t])
    rows = []
    for query, t in sorted(owners.items(), key=lambda pair: pair[:: -1 if by_target else 1]):
        mates = [other for other, owned in owners.items() if owned == t]
        if maxima == "wanted":
            mates = [other for other, objects in wanted.items() if t in objects] or [query]
        scaled = metric[query, t] / (metric[mates, t].max() + 1e-7) * iou[mates, t].max()
        values = {"scaled": scaled, "metric": metric[query, t], "iou": iou[query, t]}
        values["unit"] = metric[query, t] / (metric[mates, t].max() + 1e-7)
        rows.append((query, t, float(values[quality])))
    queries, targets, values = zip(*rows) if rows else ((), (), ())
    return (
        torch.tensor(queries, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float32),
    )


ONE_TO_MANY = {
    "a query goes to the object of highest IoU among those that want it, not among all": partial(
        _one_to_many, owner="all"
    ),
    "a query goes to the object of highest IoU, not of highest m": partial(
        _one_to_many, owner="metric"
    ),
    "a query goes to the object of highest IoU, not to the first that wants it": partial(
        _one_to_many, owner="first"
    ),
    "a query with m = 0 is no candidate": partial(_one_to_many, positive=False),
    "both maxima are over the queries that the object got, not over those it wanted": partial(
        _one_to_many, maxima="wanted"
    ),
    "ties go to the object of the lower index": partial(_one_to_many, ties="high"),
    "the quality is m, rescaled so that its maximum is the largest IoU": partial(
        _one_to_many, quality="metric"
    ),
    "the quality is rescaled m, not the IoU": partial(_one_to_many, quality="iou"),
    "the largest IoU is a factor of the quality": partial(_one_to_many, quality="unit"),
    "the pairs come sorted by query, not by object": partial(_one_to_many, by_target=True),
    "alpha is the exponent of the score and beta that of the IoU": (
        lambda logits, pred_boxes, target, alpha, beta, candidates: _one_to_many(
            logits, pred_boxes, target, beta, alpha, candidates
        )
    ),
}


def _losses(
    logits, pred_boxes, target, queries, targets, quality,
    everybody=True, all_classes=True, hard=False, factor="distance", gamma=2, alpha=False,
    class_mean=False, pixels=False, corners=False, overlap=1, one_minus=True, l1_mean=False,
    weighted=True, over="quality", least=1.0, weights=(2, 5, 2),
):  # fmt: skip
    wanted = torch.zeros_like(logits)
    wanted[queries, target["labels"][targets]] = torch.ones_like(quality) if hard else quality
    scores = logits.sigmoid()
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    entropy = binary(logits, wanted, reduction="none")
    factors = {"distance": wanted - scores, "one minus": 1 - scores, "none": 1 + 0 * scores}
    table = factors[factor].abs() ** gamma * entropy
    table = table * torch.where(wanted > 0, 0.25, 0.75) if alpha else table
    table = table if everybody else table[queries]
    table = table if all_classes else table * (wanted > 0)
    boxes = to_model(target["boxes"], target["size"])
    mine = to_pixels(pred_boxes, target["size"])[queries]
    size = torch.tensor(target["size"][::-1] * 2)
    away = pred_boxes[queries] - boxes[targets]
    away = (mine - target["boxes"][targets]) / size if corners else away
    l1 = (away * size if pixels else away).abs()
    l1 = l1.mean(1) if l1_mean else l1.sum(1)
    overlaps = pairwise_overlaps(mine, target["boxes"])[overlap][range(len(queries)), targets]
    giou = 1 - overlaps if one_minus else -overlaps
    share = quality if weighted else torch.ones_like(quality)
    counts = {"quality": float(quality.sum()), "pairs": len(queries), "queries": len(logits)}
    count = max(counts.get(over, len(target["labels"])), least)
    parts = table.mean() if class_mean else table.sum(), (l1 * share).sum(), (giou * share).sum()
    values = (weight * part / count for weight, part in zip(weights, parts))
    return dict(zip(("class", "l1", "giou"), values))


ONE_TO_MANY_LOSSES = {
    "the class loss counts all queries: those without an object have the target 0": partial(
        _losses, everybody=False
    ),
    "the class loss counts all classes: the target of the other classes is 0": partial(
        _losses, all_classes=False
    ),
    "the class target of a pair is its quality, not 1": partial(_losses, hard=True),
    "the factor is the distance |y - p| to the soft target, not 1 - p": partial(
        _losses, factor="one minus"
    ),
    "the cross-entropy has a factor, |y - p| squared": partial(_losses, factor="none"),
    "the factor |y - p| is squared": partial(_losses, gamma=1),
    "the quality focal loss has no weights 0.25 and 0.75; those belong to the focal loss": partial(
        _losses, alpha=True
    ),
    "the class loss is summed over queries and classes, not averaged": partial(
        _losses, class_mean=True
    ),
    "the L1 distance is between boxes in 0..1, not in pixels": partial(_losses, pixels=True),
    "the L1 distance is between boxes in 0..1, and centres and sides, not corners": partial(
        _losses, pixels=True, corners=True
    ),
    "the L1 distance is between centres and sides, not between corners": partial(
        _losses, corners=True
    ),
    "the L1 distance is summed over the four numbers, not averaged": partial(_losses, l1_mean=True),
    "the overlap is GIoU, which also compares boxes apart, not IoU": partial(_losses, overlap=0),
    "the loss is 1 - GIoU, which is 0 for a perfect box": partial(_losses, one_minus=False),
    "the box losses of a pair are weighted by its quality": partial(_losses, weighted=False),
    "the sums are divided by the sum of the qualities, not by the number of pairs": partial(
        _losses, over="pairs"
    ),
    "the sums are divided by the sum of the qualities, not by the number of queries": partial(
        _losses, over="queries"
    ),
    "the sums are divided by the sum of the qualities, not by the number of objects": partial(
        _losses, over="objects"
    ),
    "the sums are divided, by the sum of the qualities": lambda *given: {
        name: value * max(float(given[-1].sum()), 1.0) for name, value in _losses(*given).items()
    },
    "the sums are divided by at least 1": partial(_losses, least=1e-6),
    "class, L1 and GIoU have the weights 2, 5 and 2": partial(_losses, weights=(1, 1, 1)),
}

# ---- 05: Deformable DETR -------------------------------------------------------------------------


def _reads(feature_map, points, shares, floor=math.floor, shift=0.5, swapped=False, edge="zero"):
    height, width = feature_map.shape[:2]
    answer = torch.zeros(feature_map.shape[2])
    for (x, y), share in zip(points.tolist(), shares.tolist()):
        x, y = (y, x) if swapped else (x, y)
        column, row = x * width - shift, y * height - shift
        if shift is None:
            column, row = x * (width - 1), y * (height - 1)
        if edge == "nearest":
            column, row = round(column), round(row)
        for c, r in itertools.product(*((floor(z), floor(z) + 1) for z in (column, row))):
            inside = 0 <= c < width and 0 <= r < height
            weight = (1 - abs(column - c)) * (1 - abs(row - r))
            c, r = min(max(c, 0), width - 1), min(max(r, 0), height - 1)
            if inside or edge == "border":
                answer = answer + share * weight * feature_map[r, c]
    return answer


POINT_ATTENTION = {
    "negative coordinates are rounded down: math.floor, not int": partial(_reads, floor=int),
    "a cell's centre lies half a cell after its edge: 0.5 is subtracted": partial(
        _reads, shift=0.0
    ),
    "x goes with the columns and y with the rows": partial(_reads, swapped=True),
    "outside of the map is 0, not the value at the border": partial(_reads, edge="border"),
    "read between the four neighbours, not the nearest one": partial(_reads, edge="nearest"),
    "0 and 1 are the edges of the map, not the centres of its outer cells": (
        lambda feature_map, points, shares: _reads_at_centres(feature_map, points, shares)
    ),
    "the values are weighed by the shares": lambda feature_map, points, shares: _reads(
        feature_map, points, torch.ones_like(shares)
    ),
}


def _reads_at_centres(feature_map, points, shares):
    size = torch.tensor(feature_map.shape[1::-1])
    return _reads(feature_map, (points * (size - 1) + 0.5) / size, shares)


def _refined(delta, reference, start=0.0, logit=True, add=True):
    before = torch.full_like(delta, start)
    before[:, : reference.shape[1]] = inverse_sigmoid(reference) if logit else reference
    moved = delta + before
    if not add:
        moved[:, reference.shape[1] :] = start
    return moved.sigmoid()


REFINE = {
    "the correction is added to the logit of the reference, not to the reference": partial(
        _refined, logit=False
    ),
    "width and height of a point start from one half, not from 0": partial(
        _refined, start=-11.512925
    ),
    "width and height of a point start from the logit 0": partial(_refined, start=-2.0),
    "the logit of one half is 0, not 0.5": partial(_refined, start=0.5),
    "width and height of a point are corrected as well": partial(_refined, add=False),
    "the sum is a logit, which goes through the sigmoid": lambda delta, reference: torch.logit(
        _refined(delta, reference)
    ),
    "the sigmoid of the sum is wanted, not a sum of sigmoids": lambda delta, reference: (
        torch.nn.functional.pad(reference, (0, 4 - reference.shape[1])) + delta
    ),
}


def _points(reference, offsets, shape, order=(1, 0), sign=1):
    return reference + sign * offsets / torch.tensor([shape[order[0]], shape[order[1]]])


PLACES = {
    "x is divided by the width and y by the height": partial(_points, order=(0, 1)),
    "y is divided by the height": partial(_points, order=(1, 1)),
    "x is divided by the width": partial(_points, order=(0, 0)),
    "the offsets are added": partial(_points, sign=-1),
    "the offsets are in cells: they are divided by the size of the map": (
        lambda reference, offsets, shape: reference + offsets
    ),
}

# ---- 06: DINO ------------------------------------------------------------------------------------


def _mask(sizes, queries, among=True, sees_matching=True, leak=False):
    total = sum(sizes)
    blocked = group_mask(sizes, queries)
    if not among:
        blocked[:total, :total] = False
    if not sees_matching:
        blocked[:total, total:] = True
    if leak:
        blocked[total:, :total] = False
    return blocked


def _matching_first(sizes, queries):
    blocked, total = group_mask(sizes, queries), sum(sizes)
    order = torch.tensor([*range(total, total + queries), *range(total)])
    return blocked[order][:, order]


def _blind_groups(sizes, queries):
    blocked = group_mask(sizes, queries)
    blocked[:, : sum(sizes)] = True
    return blocked


GROUP_MASK = {
    "rows see and columns are seen; the matching queries see no group": (
        lambda sizes, queries: group_mask(sizes, queries).T
    ),
    "the matching queries do not see a group": partial(_mask, leak=True),
    "the groups may see the matching queries": partial(_mask, sees_matching=False),
    "a group does not see another group": partial(_mask, among=False),
    "True means blocked": lambda sizes, queries: ~group_mask(sizes, queries),
    "the groups come first, the matching queries last": _matching_first,
    "a group sees itself": _blind_groups,
}


def _noised(boxes, negative, amount, noise, order=True, clamp=True, ring=1, whole=1, sign=1):
    half = boxes[:, 2:] / 2 * whole
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    direction = torch.where(noise[:, 4:] < 0.5, -1.0, 1.0) * sign
    far = (noise[:, :4] + ring * negative[:, None]) * direction
    corners = corners + far * amount * half.repeat(1, 2)
    corners = corners.clamp(0, 1) if clamp else corners
    first, second = corners[:, :2], corners[:, 2:]
    if order:
        first, second = torch.minimum(first, second), torch.maximum(first, second)
    return torch.cat([(first + second) / 2, second - first], 1)


NOISE_BOXES = {
    "two edges that noise has exchanged are put in order": partial(_noised, order=False),
    "the corners are clamped to 0..1": partial(_noised, clamp=False),
    "a negative moves by 1 to 2 times the amount": partial(_noised, ring=0),
    "the unit of the noise is half a side": partial(_noised, whole=2),
    "numbers below 0.5 go backward": partial(_noised, sign=-1),
}


def _selected(logits, boxes, count, best="amax", order="score", largest=True):
    scores = getattr(logits, best)(-1)
    chosen = scores.topk(count, largest=largest).indices
    return boxes[chosen if order == "score" else chosen.sort().values]


SELECT = {
    "two things: a token's score is its best class score, and the best token comes first": partial(
        _selected, best="sum", order="token"
    ),
    "the best token comes first, not the first token": partial(_selected, order="token"),
    "a token's score is its best class score, not the sum": partial(_selected, best="sum"),
    "a token's score is its best class score, not that of class 0": lambda logits, boxes, count: (
        _selected(logits[:, :1], boxes, count)
    ),
    "the highest scores are wanted, not the lowest": partial(_selected, largest=False),
}

# ---- 07: mean teacher ----------------------------------------------------------------------------


def _average(teacher, student, momentum, counters="student", floats=True):
    new = {}
    for name, old in teacher.items():
        mean = momentum * old + (1 - momentum) * student[name]
        kept = {"student": student[name], "teacher": old, "mean": mean.to(old.dtype)}
        kept["float"] = mean
        new[name] = (
            (mean if floats else student[name]) if old.is_floating_point() else kept[counters]
        )
    return new


EMA_UPDATE = {
    "the momentum belongs to the teacher, not to the student": lambda teacher, student, m: _average(
        teacher, student, 1 - m
    ),
    "whole numbers are the student's, not an average": partial(_average, counters="mean"),
    "whole numbers are the student's, and stay whole": partial(_average, counters="float"),
    "whole numbers are the student's, not the teacher's": partial(_average, counters="teacher"),
    "the teacher is an average, not a copy of the student": partial(_average, floats=False),
}


def _followed(start, moves, momentum, alias=False, late=False):
    student, teacher = start.clone(), start.clone()
    for move in moves:
        before, student = student, student + move
        teacher = momentum * teacher + (1 - momentum) * (before if late else student)
    return student if alias else teacher


MEAN_TEACHER = {
    "teacher and student do not share one memory": partial(_followed, alias=True),
    "the momentum belongs to the teacher": lambda start, moves, momentum: _followed(
        start, moves, 1 - momentum
    ),
    "the teacher averages the student after its step": partial(_followed, late=True),
    "the teacher moves toward the student": lambda start, moves, momentum: start.clone(),
}


def _strong(found, matrix, size, cut, drop=True, strict=False, all_boxes=False, labels=True):
    boxes, keep = map_boxes(found["boxes"], matrix, size)
    sure = found["scores"] > cut if strict else found["scores"] >= cut
    keep = (keep if drop else torch.ones_like(keep)) & (sure | all_boxes)
    return {"boxes": boxes[keep], "labels": found["labels"][keep if labels else sure]}


TO_STRONG_VIEW = {
    "boxes that leave the image are dropped: `map_boxes` says which to keep": partial(
        _strong, drop=False
    ),
    "a score equal to the cut is kept": partial(_strong, strict=True),
    "boxes under the cut are dropped": partial(_strong, all_boxes=True),
    "the labels are dropped together with their boxes": partial(_strong, labels=False),
    "the size is (height, width)": lambda found, matrix, size, cut: _strong(
        found, matrix, size[::-1], cut
    ),
    "the boxes are mapped by the matrix": lambda found, matrix, size, cut: _strong(
        found, torch.eye(3), size, cut
    ),
    "the matrix leads from the weak to the strong view: no inverse": (
        lambda found, matrix, size, cut: _strong(found, torch.linalg.inv(matrix), size, cut)
    ),
}

# ---- 08: query consistency -----------------------------------------------------------------------


def _consistency(student, teacher, valid, over="valid", unit=True, layers="sum", square="mean"):
    total = torch.zeros(())
    count = {"valid": valid.sum().clamp(min=1), "all": valid.numel(), "bare": valid.sum()}[over]
    for ours, theirs in zip(student, teacher):
        ours, theirs = (normalize(x, dim=-1) if unit else x for x in (ours, theirs))
        each = (ours - theirs).square()
        each = each.mean(-1) if square == "mean" else each.sum(-1)
        total = total + (each * valid).sum() / count
    return total / (len(student) if layers == "mean" else 1)


CONSISTENCY_LOSS = {
    "the mean is over the valid queries, not over all": partial(_consistency, over="all"),
    "the embeddings are scaled to length 1": partial(_consistency, unit=False),
    "the layers are summed, not averaged": partial(_consistency, layers="mean"),
    "the squares are averaged over the channels, not summed": partial(_consistency, square="sum"),
    "without a valid query the loss is 0, not 0 / 0": partial(_consistency, over="bare"),
    "the padded queries are left out": lambda student, teacher, valid: _consistency(
        student, teacher, torch.ones_like(valid)
    ),
    "all layers are summed, not only the last": lambda student, teacher, valid: _consistency(
        student[-1:], teacher[-1:], valid
    ),
}


ROUNDINGS: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "round": round,
    "ceil": math.ceil,
}


def _cells(
    features, strides, images, boxes, side,
    level="floor", aligned=True, swapped=False, scaled=True, epsilon=1e-6, one_image=False,
):  # fmt: skip
    cells = torch.zeros(len(boxes), features[0].shape[1], side, side)
    for row, box in enumerate(boxes):
        length = float((box[2:] - box[:2]).prod().sqrt()) / (7 * strides[0][0])
        exact = math.log2(length + epsilon)
        number = 0
        if level in ROUNDINGS:
            number = min(len(features) - 1, max(0, ROUNDINGS[level](exact)))
        y, x = strides[number][::-1] if swapped else strides[number]
        box = box / torch.tensor([x, y, x, y]) if scaled else box
        image = torch.zeros(1) if one_image else images[row : row + 1].float()
        roi = torch.cat([image, box])[None]
        cells[row] = roi_align(features[number], roi, side, aligned=aligned)[0]
    return cells


BOX_CELLS = {
    "large boxes are read from coarser maps": partial(_cells, level="finest"),
    "the level is rounded down, not to the nearest": partial(_cells, level="round"),
    "the level is rounded down, not up": partial(_cells, level="ceil"),
    "a box is divided by the stride of its map, to be in cells": partial(_cells, scaled=False),
    "strides are (y, x): x is divided by the second": partial(_cells, swapped=True),
    "roi_align is called with aligned=True": partial(_cells, aligned=False),
    "each box is read from its own image": partial(_cells, one_image=True),
    "1e-6 is added before the logarithm, since rounding may lower a ratio": partial(
        _cells, epsilon=-1e-6
    ),
}

# ---- 09: cost mining -----------------------------------------------------------------------------


@np.errstate(all="ignore")
def _em(
    costs, weights, means, variances, old_means=False, floor=1e-5, prior=True, hard=False, root=True
):
    density = np.exp(-((costs[:, None] - means) ** 2) / (2 * variances))
    density = density / (np.sqrt(variances) if root else 1.0) * (weights if prior else 1.0)
    share = density / density.sum(1, keepdims=True)
    share = np.eye(2)[share.argmax(1)] if hard else share
    count = share.sum(0)
    new = (share * costs[:, None]).sum(0) / count
    away = (costs[:, None] - (means if old_means else new)) ** 2
    return count / len(costs), new, (share * away).sum(0) / count + floor


EM_STEP = {
    "the variance is around the new means, not the old ones": partial(_em, old_means=True),
    "1e-5 is added to the variances": partial(_em, floor=0.0),
    "the E step weighs a component by its weight": partial(_em, prior=False),
    "a cost belongs to both components, by its shares": partial(_em, hard=True),
    "a density is divided by the root of its variance": partial(_em, root=False),
    "the weights are shares of all costs and sum to 1": lambda costs, *state: (
        _em(costs, *state)[0] * len(costs),
        *_em(costs, *state)[1:],
    ),
    "variances are wanted, not standard deviations": lambda costs, *state: (
        *_em(costs, *state)[:2],
        np.sqrt(_em(costs, *state)[2]),
    ),
}


def _em_steps(costs, steps, floor=1e-5, width=1.0, old_means=False, prior=True):
    state = np.full(2, 0.5), np.array([costs.min(), costs.max()]), np.full(2, width)
    for _ in range(steps):
        state = _em(costs, *state, floor=floor, old_means=old_means, prior=prior)
    return state


def _em_steps_clamped(costs, steps):
    state = np.full(2, 0.5), np.array([costs.min(), costs.max()]), np.ones(2)
    for _ in range(steps):
        weights, means, variances = _em(costs, *state, floor=0.0)
        state = weights, means, np.maximum(variances, 1e-5)
    return state


EM_STEPS = {
    "1e-5 is added to the variances, which else shrink to 0": partial(_em_steps, floor=0.0),
    "1e-5 is added to the variances, not their lower bound": _em_steps_clamped,
    "the variances get 1e-5, not more": partial(_em_steps, floor=1e-3),
    "all steps are made": lambda costs, steps: _em_steps(costs, steps - 1),
    "the variance is around the new means, not the old ones": partial(_em_steps, old_means=True),
    "the E step weighs a component by its weight": partial(_em_steps, prior=False),
}


def _mine(costs, scores, valid, threshold, cut, strict=False, strict_score=False, nan=False):
    cheap = costs < threshold if strict else costs <= threshold
    cheap = ~(costs > threshold) if nan else cheap
    sure = scores > cut if strict_score else scores >= cut
    return valid & sure, valid & cheap, valid & (sure | cheap)


def _with_padding(costs, scores, valid, threshold, cut):
    return _mine(costs, scores, np.ones_like(valid), threshold, cut)


MINE = {
    "a cost equal to the threshold is mined": partial(_mine, strict=True),
    "a score equal to the cut is confident": partial(_mine, strict_score=True),
    "a box without a partner costs nan and is never mined": partial(_mine, nan=True),
    "padding is neither confident nor mined": _with_padding,
    "consistency is asked for if a box is confident or mined, not both": lambda *given: (
        *_mine(*given)[:2],
        _mine(*given)[0] & _mine(*given)[1],
    ),
    "a low cost is mined, not a high one": lambda costs, scores, valid, threshold, cut: _mine(
        -costs, scores, valid, -threshold, cut
    ),
    "a box may be both mined and confident": lambda *given: (
        _mine(*given)[0],
        _mine(*given)[1] & ~_mine(*given)[0],
        _mine(*given)[2],
    ),
}

# ---- 10: Semi-DETR -------------------------------------------------------------------------------

STAGES = ("one_to_one", "one_to_many")


def _stage(step, before, steps, share, rounding=round, late=0, swapped=False):
    length = rounding(share * steps)
    return STAGES[(step - before < length + late) != swapped]


STAGE = {
    "step numbers go on from the burn-in, whose steps are subtracted": (
        lambda step, before, steps, share: _stage(step, 0, steps, share)
    ),
    "the first step of stage two is the one after its last step": partial(_stage, late=1),
    "the number of steps is rounded, not cut off": partial(_stage, rounding=int),
    "one-to-many comes first": partial(_stage, swapped=True),
    "the share is of the run's own steps, without the burn-in": (
        lambda step, before, steps, share: _stage(step, 0, before + steps, share)
    ),
}


def _gap(lines, row, percent, average=np.mean, factor=100.0, over="all", missing=float("nan")):
    ends = ("supervised", percent), ("supervised", 100), (row, percent)
    found = [
        [100 * line["AP"] for line in lines if (line["row"], line["percent"]) == end]
        for end in ends
    ]
    if not all(found):
        return missing
    low, high, value = map(average, found)
    below = {"all": high - low, "low": low, "high": high}[over]
    return factor * (value - low) / below if below else missing


GAP_CLOSED = {
    "average over the seeds, not the best of them": partial(_gap, average=max),
    "average over the seeds, not the first of them": partial(_gap, average=lambda v: v[0]),
    "average over the seeds, not the last of them": partial(_gap, average=lambda v: v[-1]),
    "average over the seeds, not their median": partial(_gap, average=np.median),
    "the answer is in %": partial(_gap, factor=1.0),
    "the gap is from supervised to all labels, not the supervised AP": partial(_gap, over="low"),
    "the gap is from supervised to all labels, not the AP with all labels": partial(
        _gap, over="high"
    ),
    "without a line for an end the answer is nan, not 0": partial(_gap, missing=0.0),
}


def _resumed(state, teacher="teacher", offset=True, step=True, prefix=True):
    def part(name):
        rows = [(key, value) for key, value in state["method"].items() if key.startswith(name)]
        return {key if not prefix else key.removeprefix(f"{name}."): value for key, value in rows}

    return (
        part("student"),
        part(teacher),
        state["offset"] * offset + state["step"] * step,
    )


RESUMED = {
    "the teacher's weights are read from the file as well": partial(_resumed, teacher="student"),
    "the run goes on behind its burn-in: the offset is added": partial(_resumed, offset=False),
    "the run has made steps of its own: they are added": partial(_resumed, step=False),
    "the names are those of the detector, without `student.` and `teacher.`": partial(
        _resumed, prefix=False
    ),
    "the student comes first, then the teacher": lambda state: (
        _resumed(state)[1],
        _resumed(state)[0],
        _resumed(state)[2],
    ),
}

# ---- 11: COCO ------------------------------------------------------------------------------------


def _labelled(
    count, percent, fold, seed=None, rounding=round, ordered=True, least=1, shuffled=True
):
    order = np.random.default_rng(seed or [fold, 2023]).permutation(count)
    order = order if shuffled else np.arange(count)
    chosen = order[: max(least, rounding(count * percent / 100))].tolist()
    return sorted(chosen) if ordered else chosen


LABELLED_INDICES = {
    "the seed does not hold the percent, so that folds are nested": lambda count, percent, fold: (
        _labelled(count, percent, fold, seed=[fold, int(percent)])
    ),
    "the seed holds the fold, so that folds differ": lambda count, percent, fold: _labelled(
        count, percent, fold, seed=[2023]
    ),
    "the seed is [fold, 2023], in this order": lambda count, percent, fold: _labelled(
        count, percent, fold, seed=[2023, fold]
    ),
    "the number of images is rounded, not cut off": partial(_labelled, rounding=int),
    "the number of images is rounded, not rounded up": partial(_labelled, rounding=math.ceil),
    "at least one image is labelled": partial(_labelled, least=0),
    "the indices come sorted": partial(_labelled, ordered=False),
    "the images are the first of the permutation, not of the data": partial(
        _labelled, shuffled=False
    ),
}


def _of_process(ids, percent, fold, process, seed=0, part=False, indices=False):
    chosen = _labelled(len(ids), percent, fold + seed * process)
    chosen = chosen[process::8] if part else chosen
    return chosen if indices else [ids[index] for index in chosen]


OF_PROCESS = {
    "the draw does not depend on the process": partial(_of_process, seed=1),
    "all processes share all labelled images": partial(_of_process, part=True),
    "the ids of the images are wanted, not their indices": partial(_of_process, indices=True),
    "the fold is the argument, not the number of the process": lambda ids, percent, fold, process: (
        _of_process(ids, percent, process, process)
    ),
}


def _cut(batch, parts, edges="exact", strided=False, aligned=True):
    cut: list[dict] = [{} for _ in range(parts)]
    for name, (images, targets) in batch.items():
        count = len(images)
        for p in range(parts):
            ends = {
                "exact": (count * p // parts, count * (p + 1) // parts),
                "lost": (count // parts * p, count // parts * (p + 1)),
                "up": (-(-count // parts) * p, -(-count // parts) * (p + 1)),
            }[edges]
            rows = slice(p, None, parts) if strided else slice(*ends)
            cut[p][name] = (images[rows], targets[rows] if aligned else targets)
    return cut


MICRO_BATCHES = {
    "no image is lost: the parts need not be equal": partial(_cut, edges="lost"),
    "the edges are len * p // parts, rounded down": partial(_cut, edges="up"),
    "a part holds neighbouring images, not every n-th": partial(_cut, strided=True),
    "the targets are cut together with the images": partial(_cut, aligned=False),
    "the parts come in order": lambda batch, parts: _cut(batch, parts)[::-1],
}

# ---- 12: your photographs ------------------------------------------------------------------------


def _coco_box(corners, first=1, last=1, as_corners=False, height_first=False):
    x1, y1, x2, y2 = corners
    sides = [x2 - x1 + last, y2 - y1 + last]
    if as_corners:
        return [x1 - first, y1 - first, x2, y2]
    return [x1 - first, y1 - first, *(sides[::-1] if height_first else sides)]


COCO_BOX = {
    "VOC counts pixels from 1, COCO from 0": partial(_coco_box, first=0),
    "the last pixel belongs to the box: a side is max - min + 1": partial(_coco_box, last=0),
    "both conventions differ: count from 0, and include the last pixel": partial(
        _coco_box, first=0, last=0
    ),
    "COCO has width and height where VOC has a second corner": partial(_coco_box, as_corners=True),
    "the width comes before the height": partial(_coco_box, height_first=True),
}


def _validation_groups(
    groups, fraction, whole=True, enough=True, by_images=True, ordered=sorted, others=False
):
    count = len(groups) if by_images else len(set(groups))
    taken: set[str] = set()
    names = ordered(dict.fromkeys(groups))
    for name in names:
        inside = sum(group in taken for group in groups) if by_images else len(taken)
        added = groups.count(name) if by_images else 1
        if inside >= fraction * count or not enough and inside + added > fraction * count:
            break
        taken.add(name)
    chosen = [index for index, group in enumerate(groups) if (group in taken) != others]
    return chosen if whole else chosen[: math.ceil(fraction * count)]


VALIDATION_GROUPS = {
    "a group is set aside as a whole, even if the images are then more than asked for": partial(
        _validation_groups, whole=False
    ),
    "groups are taken until the images are enough: the last one may go beyond": partial(
        _validation_groups, enough=False
    ),
    "the fraction is one of the images, not of the groups": partial(
        _validation_groups, by_images=False
    ),
    "groups are taken in the order of their names": partial(_validation_groups, ordered=list),
    "the images that are set aside are wanted, not those left for training": partial(
        _validation_groups, others=True
    ),
    "images of one group must not be on both sides": lambda groups, fraction: list(
        range(math.ceil(fraction * len(groups)))
    ),
}

MISTAKES: dict[str, Mapping[str, Any]] = {
    "boxes.pairwise_iou": IOU,
    "boxes.to_model": TO_MODEL,
    "boxes.to_pixels": TO_PIXELS,
    "views.map_boxes": MAP_BOXES,
    "evaluate.precision_recall": PRECISION_RECALL,
    "evaluate.average_precision": AVERAGE_PRECISION,
    "matching.matching_cost": MATCHING_COST,
    "matching.one_to_one": ONE_TO_ONE,
    "matching.one_to_many": ONE_TO_MANY,
    "losses.one_to_many": ONE_TO_MANY_LOSSES,
    "detr.sine_positions": SINE_POSITIONS,
    "detr.attention": ATTENTION,
    "detr.map_positions": MAP_POSITIONS,
    "deformable.attention": POINT_ATTENTION,
    "deformable.refine": REFINE,
    "deformable.places": PLACES,
    "denoising.group_mask": GROUP_MASK,
    "denoising.noise_boxes": NOISE_BOXES,
    "dino.select": SELECT,
    "mean_teacher.ema_update": EMA_UPDATE,
    "mean_teacher.average": MEAN_TEACHER,
    "mean_teacher.to_strong_view": TO_STRONG_VIEW,
    "query_consistency.consistency_loss": CONSISTENCY_LOSS,
    "query_consistency.box_cells": BOX_CELLS,
    "cost_mining.em_step": EM_STEP,
    "cost_mining.em_steps": EM_STEPS,
    "cost_mining.mine": MINE,
    "semi_detr.stage": STAGE,
    "ablate.gap_closed": GAP_CLOSED,
    "train.resumed": RESUMED,
    "splits.labelled_indices": LABELLED_INDICES,
    "splits.of_process": OF_PROCESS,
    "engine.micro_batches": MICRO_BATCHES,
    "layouts.coco_box": COCO_BOX,
    "splits.validation_groups": VALIDATION_GROUPS,
}
