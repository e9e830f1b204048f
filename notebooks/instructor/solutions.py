"""Worked solutions of the exercises that `check` compares: SOLUTIONS, {exercise: function}.

For instructors. To withhold them, leave this folder out of what a class is given: nothing else
reads it but the test that every solution here is right.

Each is one way to write it. Where an exercise is a bug to find, the comment names the line.
"""

import itertools
import math

import numpy as np
import torch
from torchvision.ops import roi_align

from semidetr_lite.boxes import inverse_sigmoid, overlaps, pairwise_overlaps
from semidetr_lite.data import splits
from semidetr_lite.data.views import map_boxes
from semidetr_lite.detectors.transformer import sine_positions
from semidetr_lite.matching import matching_cost

# ---- 01: boxes and views -------------------------------------------------------------------------


def pairwise_iou(a, b):
    """The IoU (N, M) of every pair: intersection over union, without a loop."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])  # (N, M, 2)
    bottom_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)  # disjoint boxes: 0
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    return intersection / (area_a[:, None] + area_b[None] - intersection)


def mapped_boxes(boxes, matrix, size):
    """Boxes in another view: map four corners, take their hull, clamp it to the image."""
    x1, y1, x2, y2 = boxes.unbind(1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1).reshape(-1, 4, 2)
    mapped = corners @ matrix[:2, :2].T + matrix[:2, 2]
    hull = torch.cat([mapped.amin(1), mapped.amax(1)], 1)
    height, width = size
    hull[:, 0::2] = hull[:, 0::2].clamp(0, width)  # x comes first in a box, height in a size
    hull[:, 1::2] = hull[:, 1::2].clamp(0, height)
    keep = ((hull[:, 2:] - hull[:, :2]) > 0.001).all(1)
    return hull, keep


def to_model(boxes, size):
    """Debug: the last line divided by the size a second time."""
    height, width = size
    scale = boxes.new_tensor([width, height, width, height])
    corners = boxes / scale
    center, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.cat([center, sides], 1)


def to_pixels(boxes, size):
    """Center and sides in fractions of the image -> corners in pixels."""
    height, width = size
    center, sides = boxes[:, :2], boxes[:, 2:]
    corners = torch.cat([center - sides / 2, center + sides / 2], 1)
    return corners * boxes.new_tensor([width, height, width, height])


# ---- 02: evaluation ------------------------------------------------------------------------------


def precision_recall(hits, objects):
    """Precision and recall after each detection: running counts of hits."""
    found = hits.float().cumsum(0)
    return found / torch.arange(1, len(hits) + 1), found / objects


def average_precision(hits, objects):
    """The mean over 101 recalls of the best precision from that recall on."""
    if len(hits) == 0:
        return 0.0
    found = hits.double().cumsum(0)
    precision = found / torch.arange(1, len(hits) + 1)
    best_ahead = precision.flip(0).cummax(0).values.flip(0)
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    first = torch.searchsorted(found / objects, levels)  # the detection that reaches a level
    reached = first < len(hits)  # no precision at a recall that is never reached
    return float(best_ahead[first[reached]].sum() / 101)


def average_precision_of_ties(hits, objects):
    """Debug: sorting pairs puts hits before false alarms of the same score; sort by score alone."""
    scores = [0.5] * len(hits)
    ranking = sorted(zip(scores, hits.tolist()), key=lambda pair: -pair[0])  # stable
    return average_precision(torch.tensor([hit for _, hit in ranking], dtype=torch.bool), objects)


# ---- 03: DETR ------------------------------------------------------------------------------------


def my_sine_positions(coordinates, dim, temperature):
    """Sine and cosine side by side at dim / 2 speeds, one coordinate after the other."""
    speeds = temperature ** (-2 * torch.arange(dim // 2) / dim)
    angles = 2 * math.pi * coordinates[..., None] * speeds  # (N, K, dim / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def attention(queries, keys, values, heads):
    """Each part of the channels does its own attention."""
    outputs = []
    for q, k, v in zip(*(part.chunk(heads, -1) for part in (queries, keys, values))):
        weights = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)  # divide by the part's own width
        outputs.append(weights @ v)
    return torch.cat(outputs, -1)


def map_positions(height, width, dim, temperature):
    """Debug: y was divided by the width and x by the height."""
    y = torch.arange(1, height + 1)[:, None].expand(height, width) / height
    x = torch.arange(1, width + 1)[None, :].expand(height, width) / width
    return sine_positions(torch.stack([y, x], -1), dim // 2, temperature)


# ---- 04: matching --------------------------------------------------------------------------------


def one_to_one(logits, pred_boxes, target):
    """The cheapest of all ways to give each object a query of its own."""
    cost = matching_cost(logits, pred_boxes, target)  # (Q, T)
    num_queries, num_targets = cost.shape
    objects = torch.arange(num_targets)
    ways = itertools.permutations(range(num_queries), num_targets)
    best = min(ways, key=lambda way: float(cost[list(way), objects].double().sum()))
    queries, order = torch.tensor(best, dtype=torch.int64).sort()
    return queries, objects[order], torch.ones(num_targets)


def one_to_many(logits, pred_boxes, target, alpha=1.0, beta=6.0, candidates=13):
    """Candidates of each object, one owner for each query, and a soft quality."""
    boxes, labels = target["boxes"], target["labels"]
    height, width = target["size"]
    center, sides = pred_boxes[:, :2], pred_boxes[:, 2:]
    corners = torch.cat([center - sides / 2, center + sides / 2], 1)
    predicted = corners * corners.new_tensor([width, height, width, height])
    iou = pairwise_overlaps(predicted, boxes)[0]  # (Q, T)
    metric = logits.sigmoid()[:, labels] ** alpha * iou**beta
    is_candidate = torch.zeros_like(metric, dtype=torch.bool)
    for t in range(len(labels)):
        best = metric[:, t].topk(min(candidates, len(metric))).indices
        is_candidate[best, t] = metric[best, t] > 0
    owner = torch.full((len(metric),), -1)
    for q in range(len(metric)):
        wanted_by = is_candidate[q].nonzero()[:, 0].tolist()
        if wanted_by:  # the highest IoU among those that want it; max takes the first of ties
            owner[q] = max(wanted_by, key=lambda t: float(iou[q, t]))
    quality = torch.zeros(len(metric))
    for t in range(len(labels)):
        got = (owner == t).nonzero()[:, 0]
        if len(got):
            values = metric[got, t]
            quality[got] = values / (values.max() + 1e-7) * iou[got, t].max()
    queries = (owner >= 0).nonzero()[:, 0]
    return queries, owner[queries], quality[queries]


def one_to_many_losses(logits, pred_boxes, target, queries, targets, quality):
    """Quality focal loss of all queries and classes; L1 and 1 - GIoU of the pairs, by quality."""
    wanted = torch.zeros_like(logits)
    wanted[queries, target["labels"][targets]] = quality
    score = logits.sigmoid()
    cross_entropy = -(wanted * score.log() + (1 - wanted) * (1 - score).log())
    focal = ((wanted - score).abs() ** 2 * cross_entropy).sum()
    boxes = to_model(target["boxes"], target["size"])[targets]
    l1 = (pred_boxes[queries] - boxes).abs().sum(-1)
    giou = overlaps(corners_of(pred_boxes[queries]), corners_of(boxes))[1]
    divisor = quality.sum().clamp(min=1)
    return {
        "class": 2 * focal / divisor,
        "l1": 5 * (quality * l1).sum() / divisor,
        "giou": 2 * (quality * (1 - giou)).sum() / divisor,
    }


def corners_of(boxes):
    """cxcywh -> xyxy."""
    center, sides = boxes[:, :2], boxes[:, 2:]
    return torch.cat([center - sides / 2, center + sides / 2], 1)


def cost_in_model_coordinates(logits, pred_boxes, target):
    """Debug: L1 was taken in pixels, so it grew with the resolution."""
    s = logits.sigmoid()[:, target["labels"]]
    negative = -0.75 * s**2 * (1 - s + 1e-8).log()
    positive = -0.25 * (1 - s) ** 2 * (s + 1e-8).log()
    wanted = to_model(target["boxes"], target["size"])
    l1 = (pred_boxes[:, None] - wanted[None]).abs().sum(-1)
    height, width = target["size"]
    center, sides = pred_boxes[:, :2], pred_boxes[:, 2:]
    corners = torch.cat([center - sides / 2, center + sides / 2], 1)
    predicted = corners * corners.new_tensor([width, height, width, height])
    giou = pairwise_overlaps(predicted, target["boxes"])[1]
    return 2 * (positive - negative) + 5 * l1 - 2 * giou


# ---- 05: Deformable DETR -------------------------------------------------------------------------


def deformable_attention(feature_map, places, shares):
    """Read each point between its four neighbours, and sum by the shares."""
    height, width, channels = feature_map.shape
    total = torch.zeros(channels)
    for (x, y), share in zip(places.tolist(), shares):
        column, row = x * width - 0.5, y * height - 0.5
        left, top = math.floor(column), math.floor(row)
        for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= i < height and 0 <= j < width:  # outside is 0
                weight = (1 - abs(column - j)) * (1 - abs(row - i))
                total = total + share * weight * feature_map[i, j]
    return total


def refine(delta, reference):
    """Add in logit space; of a point, width and height start from the logit 0."""
    start = torch.zeros_like(delta)
    start[:, : reference.shape[1]] = inverse_sigmoid(reference)
    return (start + delta).sigmoid()


def sampling_places(reference, offsets, shape):
    """Debug: offsets are (x, y), a shape is (height, width)."""
    height, width = shape
    return reference + offsets / torch.tensor([width, height])


# ---- 06: DINO ------------------------------------------------------------------------------------


def group_mask(sizes, queries):
    """A group sees itself and the matching queries; these see no group."""
    total = sum(sizes)
    blocked = torch.ones(total + queries, total + queries, dtype=torch.bool)
    start = 0
    for size in sizes:
        blocked[start : start + size, start : start + size] = False
        start += size
    blocked[:, total:] = False  # everybody sees the matching queries
    return blocked


def noise_boxes(boxes, negative, amount, noise):
    """Move each corner by up to half a side, of negatives by one half to a whole."""
    center, sides = boxes[:, :2], boxes[:, 2:]
    corners = torch.cat([center - sides / 2, center + sides / 2], 1)
    distance = noise[:, :4] + negative[:, None]  # 0 to 1, of negatives 1 to 2
    sign = torch.where(noise[:, 4:] < 0.5, -1.0, 1.0)
    half_sides = torch.cat([sides, sides], 1) / 2
    corners = (corners + sign * distance * half_sides * amount).clamp(0, 1)
    first = torch.minimum(corners[:, :2], corners[:, 2:])  # edges that noise has swapped
    second = torch.maximum(corners[:, :2], corners[:, 2:])
    return torch.cat([(first + second) / 2, second - first], 1)


def select_proposals(logits, boxes, count):
    """Debug: a token's score is its best class score, and the order is that of the scores."""
    best = logits.amax(-1).topk(count).indices
    return boxes[best]


# ---- 07: mean teacher ----------------------------------------------------------------------------


def ema_update(teacher, student, momentum):
    """momentum * teacher + (1 - momentum) * student; whole numbers are the student's."""
    updated = {}
    for name, new in student.items():
        if new.is_floating_point():
            updated[name] = momentum * teacher[name] + (1 - momentum) * new
        else:
            updated[name] = new.clone()
    return updated


def to_strong_view(found, matrix, size, score_threshold):
    """Keep confident boxes, map them, and drop those that leave the image."""
    confident = found["scores"] >= score_threshold
    boxes, keep = map_boxes(found["boxes"][confident], matrix, size)
    return {"boxes": boxes[keep], "labels": found["labels"][confident][keep]}


def average(start, moves, momentum):
    """Debug: `detach` shares the student's memory, so both moved together; copy it."""
    student = start.clone()
    teacher = student.detach().clone()
    for move in moves:
        student += move
        teacher.lerp_(student, 1 - momentum)
    return teacher


# ---- 08: query consistency -----------------------------------------------------------------------


def consistency_loss(student, teacher, valid):
    """The mean squared difference of unit vectors of the valid queries, summed over layers."""
    total = torch.zeros(())
    for ours, theirs in zip(student, teacher):
        if valid.any():
            a = torch.nn.functional.normalize(ours[valid], dim=-1)
            b = torch.nn.functional.normalize(theirs[valid], dim=-1)
            total = total + ((a - b) ** 2).mean()
    return total


def box_cells(features, strides, images, boxes, side):
    """For each box the right map and image; the box in that map's cells."""
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
    ratio = areas.sqrt() / (7 * strides[0][0])
    levels = (ratio + 1e-6).log2().floor().clamp(0, len(features) - 1)
    cells = torch.zeros(len(boxes), features[0].shape[1], side, side)
    for level, (feature_map, (stride_y, stride_x)) in enumerate(zip(features, strides)):
        rows = (levels == level).nonzero()[:, 0]
        scale = boxes.new_tensor([stride_x, stride_y, stride_x, stride_y])
        rois = torch.cat([images[rows, None].float(), boxes[rows] / scale], 1)
        cells[rows] = roi_align(feature_map, rois, side, aligned=True)
    return cells


# ---- 09: cost mining -----------------------------------------------------------------------------


def em_step(costs, weights, means, variances):
    """E: each Gaussian's share of each cost. M: weights, means and variances of the shares."""
    density = np.exp(-((costs[:, None] - means) ** 2) / (2 * variances)) / np.sqrt(variances)
    joint = weights * density
    shares = joint / joint.sum(1, keepdims=True)
    count = shares.sum(0)
    new_means = (shares * costs[:, None]).sum(0) / count
    new_variances = (shares * (costs[:, None] - new_means) ** 2).sum(0) / count + 1e-5
    return count / len(costs), new_means, new_variances


def mine(costs, scores, valid, threshold, score_threshold):
    """Confident by score, mined by cost, and either of both; nan compares as False."""
    confident = valid & (scores >= score_threshold)
    mined = valid & (costs <= threshold)
    return confident, mined, confident | mined


@np.errstate(all="ignore")
def em_steps(costs, steps):
    """Debug: a Gaussian that owns one cost has no width; 1e-5 on the variances keeps it alive."""
    weights, means, variances = np.full(2, 0.5), np.array([costs.min(), costs.max()]), np.ones(2)
    for _ in range(steps):
        weights, means, variances = em_step(costs, weights, means, variances)
    return weights, means, variances


# ---- 10: Semi-DETR -------------------------------------------------------------------------------


def stage(step, before, steps, share):
    """One-to-many for a share of the run's own steps, counted from its beginning."""
    return "one_to_many" if step < before + round(share * steps) else "one_to_one"


def gap_closed(lines, row, percent):
    """(method - supervised) / (supervised with all labels - supervised), in %."""

    def mean_ap(name, labels):
        values = [line["AP"] for line in lines if (line["row"], line["percent"]) == (name, labels)]
        return sum(values) / len(values) if values else float("nan")

    low, high = mean_ap("supervised", percent), mean_ap("supervised", 100)
    return 100 * (mean_ap(row, percent) - low) / (high - low)


def resumed(state):
    """Debug: the teacher was made of the student's tensors; it has its own in the file."""
    parts = {"student": {}, "teacher": {}}
    for name, tensor in state["method"].items():
        part, _, key = name.partition(".")
        if part in parts:
            parts[part][key] = tensor
    return parts["student"], parts["teacher"], state["offset"] + state["step"]


# ---- 11: COCO ------------------------------------------------------------------------------------


def labelled_indices(count, percent, fold):
    """The first `percent` % of one shuffled order: a larger percent contains a smaller one."""
    order = np.random.default_rng([fold, 2023]).permutation(count)
    kept = max(1, round(count * percent / 100))
    return sorted(order[:kept].tolist())


def micro_batches(batch, parts):
    """Every list cut at the same fractions."""
    cut = [{} for _ in range(parts)]
    for name, (images, targets) in batch.items():
        edges = [len(images) * number // parts for number in range(parts + 1)]
        for part, start, end in zip(cut, edges, edges[1:]):
            part[name] = (images[start:end], targets[start:end])
    return cut


def labelled_of_process(image_ids, percent, fold, process):
    """Debug: `fold + process` drew another fold in each process; all must draw the same."""
    chosen = splits.labelled_indices(len(image_ids), percent, fold)
    return [image_ids[index] for index in chosen]


# ---- 12: your photographs ------------------------------------------------------------------------


def coco_box(corners):
    """Debug: VOC counts pixels from 1, and its last pixel belongs to the box."""
    x1, y1, x2, y2 = corners
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]


def validation_groups(groups, fraction):
    """Whole groups by name, until they hold enough images."""
    taken, images = set(), 0
    for group in sorted(set(groups)):
        if images >= fraction * len(groups):
            break
        taken.add(group)
        images += groups.count(group)
    return [index for index, group in enumerate(groups) if group in taken]


SOLUTIONS = {
    "boxes.pairwise_iou": pairwise_iou,
    "views.map_boxes": mapped_boxes,
    "boxes.to_model": to_model,
    "boxes.to_pixels": to_pixels,
    "evaluate.precision_recall": precision_recall,
    "evaluate.average_precision": average_precision,
    "detr.sine_positions": my_sine_positions,
    "detr.attention": attention,
    "detr.map_positions": map_positions,
    "matching.one_to_one": one_to_one,
    "matching.one_to_many": one_to_many,
    "losses.one_to_many": one_to_many_losses,
    "matching.matching_cost": cost_in_model_coordinates,
    "deformable.attention": deformable_attention,
    "deformable.refine": refine,
    "deformable.places": sampling_places,
    "denoising.group_mask": group_mask,
    "denoising.noise_boxes": noise_boxes,
    "dino.select": select_proposals,
    "mean_teacher.ema_update": ema_update,
    "mean_teacher.to_strong_view": to_strong_view,
    "mean_teacher.average": average,
    "query_consistency.consistency_loss": consistency_loss,
    "query_consistency.box_cells": box_cells,
    "cost_mining.em_step": em_step,
    "cost_mining.mine": mine,
    "cost_mining.em_steps": em_steps,
    "semi_detr.stage": stage,
    "ablate.gap_closed": gap_closed,
    "train.resumed": resumed,
    "splits.labelled_indices": labelled_indices,
    "engine.micro_batches": micro_batches,
    "splits.of_process": labelled_of_process,
    "layouts.coco_box": coco_box,
    "splits.validation_groups": validation_groups,
}
