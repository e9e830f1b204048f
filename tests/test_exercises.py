"""Every exercise can be solved; each mistake is rejected with its cause; no answer is called so."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from semidetr_lite import matching
from semidetr_lite.boxes import overlaps, pairwise_overlaps, to_model, to_pixels
from semidetr_lite.errors import UserError
from semidetr_lite.teach.exercises import EXERCISES, check
from semidetr_lite.teach.grading import PASSED, Exercise, difference, find_fault


@pytest.fixture(autouse=True)
def not_graded(monkeypatch):
    monkeypatch.delenv("SEMIDETR_GRADING", raising=False)


def iou_by_loops(a, b, least=0.0, counted=1):
    table = torch.zeros(len(a), len(b))
    for i, j in itertools.product(range(len(a)), range(len(b))):
        sides = torch.minimum(a[i, 2:], b[j, 2:]) - torch.maximum(a[i, :2], b[j, :2])
        common = sides.clamp(min=least).prod()
        areas = (a[i, 2:] - a[i, :2]).prod() + (b[j, 2:] - b[j, :2]).prod()
        table[i, j] = common / (areas - counted * common)
    return table


def model_boxes(boxes, size):
    height, width = size
    x1, y1, x2, y2 = boxes.T
    return torch.stack(
        [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1
    )


def pixel_boxes(boxes, size):
    height, width = size
    x, y, w, h = boxes.T
    return torch.stack(
        [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], 1
    )


def mapped_boxes(boxes, matrix, size, limits=None, low=0.0, shortest=1e-3, corner_count=4):
    hulls = torch.zeros(len(boxes), 4)
    right, bottom = limits or size[::-1]
    for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        corners = [[x1, y1, 1], [x2, y2, 1], [x1, y2, 1], [x2, y1, 1]]
        x, y, w = matrix @ torch.tensor(corners[:corner_count]).T
        x, y = (x / w).clamp(low, right), (y / w).clamp(low, bottom)
        hulls[row] = torch.stack([x.min(), y.min(), x.max(), y.max()])
        if corner_count == 2:
            hulls[row] = torch.stack([x[0], y[0], x[1], y[1]])
    sides = hulls[:, 2:] - hulls[:, :2]
    return hulls, (sides[:, 0] > shortest) & (sides[:, 1] > shortest)


def precision_and_recall(hits, objects):
    right = np.cumsum(hits.numpy())
    precision, recall = right / np.arange(1, len(hits) + 1), right / objects
    return torch.tensor(precision).float(), torch.tensor(recall).float()


def ap_at_101_recalls(hits, objects, pick=max, steps=100):
    precision, recall = precision_and_recall(hits, objects)
    ahead = [precision[recall >= step / steps - 1e-6].tolist() for step in range(steps + 1)]
    return float(np.mean([pick(values) if values else 0.0 for values in ahead]))


def ap_with_torch(hits, objects):
    """As the notebook's help suggests."""
    precision, recall = precision_and_recall(hits, objects)
    best = torch.cat([precision.flip(0).cummax(0).values.flip(0), torch.zeros(1)])
    return best[torch.searchsorted(recall, torch.linspace(0, 1, 101) - 1e-6)].mean()


def ap_with_hits_first(hits, objects):
    """What the ranking of the debug exercise does with equal scores."""
    pairs = sorted(zip([0.5] * len(hits), hits.tolist()), reverse=True)
    return ap_at_101_recalls(torch.tensor([hit for _, hit in pairs]), objects)


def cost_by_loops(logits, pred_boxes, target, overlap=1, sign=-2):
    wanted, cost = (
        to_model(target["boxes"], target["size"]),
        torch.zeros(len(logits), len(target["boxes"])),
    )
    for q, t in itertools.product(range(len(logits)), range(len(wanted))):
        s = logits[q, target["labels"][t]].sigmoid()
        price = -0.25 * (1 - s) ** 2 * s.log() + 0.75 * s**2 * (1 - s).log()
        giou = overlaps(to_pixels(pred_boxes[q], target["size"]), target["boxes"][t])[overlap]
        cost[q, t] = 2 * price + 5 * (pred_boxes[q] - wanted[t]).abs().sum() + sign * giou
    return cost


def sines_by_loops(coordinates, dim, temperature, turn=2 * math.pi):
    rows = []
    for row in coordinates.flatten(0, -2).tolist():
        angles = [
            turn * place / temperature ** (2 * i / dim) for place in row for i in range(dim // 2)
        ]
        rows.append([value for angle in angles for value in (math.sin(angle), math.cos(angle))])
    return torch.tensor(rows).view(*coordinates.shape[:-1], -1)


def attention_by_loops(queries, keys, values, heads, scaled=True, dim=1):
    width = queries.shape[1] // heads
    parts = []
    for start in range(0, queries.shape[1], width):
        q, k, v = (part[:, start : start + width] for part in (queries, keys, values))
        parts.append((q @ k.T / (width**0.5 if scaled else 1)).softmax(dim) @ v)
    return torch.cat(parts, 1)


def map_by_loops(height, width, dim, temperature, swapped=False, first=1):
    over = (width, height) if swapped else (height, width)
    places = [
        [[(y + first) / over[0], (x + first) / over[1]] for x in range(width)]
        for y in range(height)
    ]
    codes = sines_by_loops(torch.tensor(places).flatten(0, 1), dim // 2, temperature)
    return codes.view(height, width, dim)


def reads_by_loops(feature_map, places, shares, floor=math.floor, edge=0.5, clamp=False):
    height, width, answer = *feature_map.shape[:2], 0
    for (x, y), share in zip(places.tolist(), shares.tolist()):
        column, row = x * width - edge, y * height - edge
        if clamp:
            column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
        for c, r in itertools.product(
            (floor(column), floor(column) + 1), (floor(row), floor(row) + 1)
        ):
            if 0 <= c < width and 0 <= r < height:
                answer = (
                    answer + share * (1 - abs(column - c)) * (1 - abs(row - r)) * feature_map[r, c]
                )
    return answer


def refined(delta, reference, start=0.0):
    before = torch.full_like(delta, start)
    before[:, : reference.shape[1]] = torch.logit(reference.clamp(1e-5, 1 - 1e-5))
    return torch.sigmoid(before + delta)


def shifted(reference, offsets, shape):
    height, width = shape
    return torch.stack(
        [reference[0] + offsets[:, 0] / width, reference[1] + offsets[:, 1] / height], 1
    )


def noised(boxes, negative, amount, chance, ordered=True, least=0.0, unit=2):
    rows = []
    for (x, y, w, h), far, draws in zip(boxes.tolist(), negative.tolist(), chance.tolist()):
        corners = []
        for edge, half, share, way in zip(
            (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
            (w / unit, h / unit) * 2,
            draws[:4],
            draws[4:],
        ):
            edge += (share + far) * amount * half * (-1 if way < 0.5 else 1)
            corners.append(min(max(edge, least), 1.0 - least))
        xs, ys = (sorted(pair) if ordered else pair for pair in (corners[::2], corners[1::2]))
        rows.append([sum(xs) / 2, sum(ys) / 2, xs[1] - xs[0], ys[1] - ys[0]])
    return torch.tensor(rows)


def selected(logits, boxes, count, score=max):
    order = sorted(range(len(boxes)), key=lambda token: -score(logits[token].tolist()))
    return boxes[order[:count]]


def one_to_one_by_permutations(logits, pred_boxes, target, choose=min):
    cost = matching.matching_cost(logits, pred_boxes, target)
    targets = range(cost.shape[1])
    ways = itertools.permutations(range(len(cost)), len(targets))
    best = choose(ways, key=lambda way: sum(float(cost[q, t]) for q, t in zip(way, targets)))
    pairs = torch.tensor(sorted(zip(best, targets)), dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], torch.ones(len(pairs))


def one_to_many_by_loops(
    logits, pred_boxes, target, alpha, beta, candidates, owner="iou", least=0.0, maxima="owned"
):
    iou = pairwise_overlaps(to_pixels(pred_boxes, target["size"]), target["boxes"])[0]
    m = logits.sigmoid()[:, target["labels"]] ** alpha * iou**beta
    wanted = {q: [] for q in range(len(logits))}
    for t in range(m.shape[1]):
        for q in m[:, t].argsort(descending=True, stable=True)[:candidates].tolist():
            wanted[q] += [t] if m[q, t] > least else []
    owners = {}
    for q, ts in wanted.items():
        if ts and owner == "all":
            owners[q] = int(iou[q].argmax())
        elif ts:
            by = iou if owner == "iou" else m
            owners[q] = max(ts, key=lambda t: float(by[q, t]))
    rows = []
    for q, t in sorted(owners.items()):
        mates = [other for other, owned in owners.items() if owned == t]
        if maxima == "wanted":
            mates = [other for other, ts in wanted.items() if t in ts]
        rows.append((q, t, float(m[q, t] / (m[mates, t].max() + 1e-7) * iou[mates, t].max())))
    queries, targets, quality = zip(*rows) if rows else ((), (), ())
    pairs = torch.tensor(queries).long(), torch.tensor(targets).long()
    return *pairs, torch.tensor(quality).float()


def losses_by_loops(
    logits, pred_boxes, target, queries, targets, quality, absent=0.0, share=None, over="quality",
    overlap=1, start=1.0, power=2, scale=None, weights=(2, 5, 2), hard=False,
):  # fmt: skip
    """One number after the other; `absent` None leaves out the queries without an object."""
    pair_of = {int(q): number for number, q in enumerate(queries)}
    boxes = model_boxes(target["boxes"], target["size"])
    class_sum = l1_sum = giou_sum = 0.0
    for q, row in enumerate(logits.tolist()):
        pair = pair_of.get(q)
        for c, logit in enumerate(row):
            if pair is None and absent is None:
                continue
            is_label = pair is not None and c == int(target["labels"][targets[pair]])
            y = (1.0 if hard else float(quality[pair])) if is_label else 0.0
            p = 1 / (1 + math.exp(-logit))
            entropy = -y * math.log(p) - (1 - y) * math.log(1 - p)
            class_sum += abs(y - p) ** power * entropy
        if pair is not None:
            t = int(targets[pair])
            weight = float(quality[pair]) if share is None else share
            scaled = torch.ones(4) if scale is None else torch.tensor(target["size"][::-1] * 2)
            l1_sum += weight * float(((pred_boxes[q] - boxes[t]) * scaled).abs().sum())
            mine = pixel_boxes(pred_boxes[q : q + 1], target["size"])
            values = pairwise_overlaps(mine, target["boxes"][t : t + 1])
            giou_sum += weight * (start - float(values[overlap]))
    count = {"quality": float(quality.sum()), "pairs": len(queries)}[over]
    sums = zip(("class", "l1", "giou"), weights, (class_sum, l1_sum, giou_sum))
    return {name: torch.tensor(weight * value / max(count, 1)) for name, weight, value in sums}


def greedy(logits, pred_boxes, target):
    """One query may answer for several objects."""
    cost = matching.matching_cost(logits, pred_boxes, target)
    targets = torch.arange(cost.shape[1])
    return cost.argmin(0), targets, torch.ones(len(targets))


def greedy_in_turn(logits, pred_boxes, target, by_pair=False):
    """Each object in turn, or always the cheapest pair, takes a free query."""
    cost = matching.matching_cost(logits, pred_boxes, target).numpy().copy()
    pairs = []
    for t in range(cost.shape[1]):
        q, t = np.unravel_index(cost.argmin(), cost.shape) if by_pair else (cost[:, t].argmin(), t)
        pairs.append((int(q), int(t)))
        cost[q], cost[:, t] = np.inf, np.inf
    queries, targets = torch.tensor(sorted(pairs)).long().reshape(-1, 2).T
    return queries, targets, torch.ones(len(pairs))


def sorted_by_object(logits, pred_boxes, target):
    queries, targets, quality = one_to_one_by_permutations(logits, pred_boxes, target)
    order = targets.argsort()
    return queries[order], targets[order], quality


def cost_in_pixels(logits, pred_boxes, target):
    """The function of the notebook."""
    s = logits.sigmoid()[:, target["labels"]]
    prices = 0.25 * (1 - s) ** 2 * -(s + 1e-8).log() - 0.75 * s**2 * -(1 - s + 1e-8).log()
    found, wanted = to_pixels(pred_boxes, target["size"]), target["boxes"]
    l1 = (found[:, None] - wanted[None]).abs().sum(-1)
    return 2 * prices + 5 * l1 - 2 * pairwise_overlaps(found, wanted)[1]


def averaged_by_name(teacher, student, momentum, whole=lambda old, new, momentum: new):
    result = {}
    for name, old in teacher.items():
        if old.is_floating_point():
            result[name] = momentum * old + (1 - momentum) * student[name]
        else:
            result[name] = whole(old, student[name], momentum)
    return result


def average_of_a_run(start, moves, momentum, alias=False, late=False):
    student = start.clone()
    teacher = student.detach() if alias else student.detach().clone()
    for move in moves:
        if late:
            teacher.lerp_(student, 1 - momentum)
        student += move
        if not late:
            teacher.lerp_(student, 1 - momentum)
    return teacher


def to_strong_view(found, matrix, size, score_threshold, drop=True, strict=False, moved=True):
    boxes, keep = mapped_boxes(found["boxes"], matrix if moved else torch.eye(3), size)
    scores = found["scores"]
    sure = scores > score_threshold if strict else scores >= score_threshold
    keep = (keep if drop else True) & sure
    return {"boxes": boxes[keep], "labels": found["labels"][keep]}


def consistency_by_loops(student, teacher, valid, count_all=False, unit=True, reduce="mean"):
    total, count = torch.zeros(()), valid.numel() if count_all else max(1, int(valid.sum()))
    for ours, theirs in zip(student, teacher):
        for image, query in valid.nonzero().tolist():
            a, b = ours[image, query], theirs[image, query].detach()
            if unit:
                a, b = a / a.norm(), b / b.norm()
            total = total + getattr((a - b).square(), reduce)() / count
    return total


def cells_of_boxes(
    features, strides, images, boxes, side, finest=False, aligned=True, way=1, rounding=np.floor
):
    cells = torch.zeros(len(boxes), features[0].shape[1], side, side)
    for row, box in enumerate(boxes):
        length = float((box[2:] - box[:2]).prod().sqrt())
        level = min(
            len(features) - 1, max(0, int(rounding(np.log2(length / (7 * strides[0][0]) + 1e-6))))
        )
        level = 0 if finest else level
        (y, x), image = strides[level][::way], int(images[row])
        here = torch.cat([torch.zeros(1), box / torch.tensor([x, y, x, y])])[None]
        cells[row] = roi_align(features[level][image : image + 1], here, side, aligned=aligned)[0]
    return cells


def blocks(sizes, queries, transposed=False, among=True, apart=False):
    rows = [group for group, size in enumerate(sizes) for _ in range(size)] + [-1] * queries
    owner = torch.tensor(rows)
    blocked = (owner != -1)[None] & (owner[:, None] != owner[None])
    if not among:
        blocked[: sum(sizes)] = False
    if apart:
        blocked[: sum(sizes), sum(sizes) :] = True
    return blocked.T if transposed else blocked


def em_by_hand(costs, weights, means, variances, around=None, floor=1e-5, prior=True):
    with np.errstate(all="ignore"):
        chance = (
            weights
            * np.exp(-((costs[:, None] - means) ** 2) / (2 * variances))
            / np.sqrt(2 * np.pi * variances)
        )
        chance = chance if prior else chance / weights
        share = chance / chance.sum(1, keepdims=True)
        count = share.sum(0)
        new = (share * costs[:, None]).sum(0) / count
        away = costs[:, None] - (new if around is None else around)
        return count / len(costs), new, (share * away**2).sum(0) / count + floor


def em_steps_by_hand(costs, steps, floor=1e-5, least=0.0, old_means=False):
    state = np.full(2, 0.5), np.array([costs.min(), costs.max()]), np.ones(2)
    for _ in range(steps):
        around = state[1] if old_means else None
        weights, means, variances = em_by_hand(costs, *state, around=around, floor=floor)
        state = weights, means, np.maximum(variances, least)
    return state


def mined_by_loops(costs, scores, valid, threshold, score_threshold, strict=False, nan=False):
    confident, mined = np.zeros(costs.shape, bool), np.zeros(costs.shape, bool)
    for place in np.argwhere(valid):
        place = tuple(place)
        confident[place] = scores[place] >= score_threshold
        mined[place] = costs[place] < threshold if strict else costs[place] <= threshold
        mined[place] |= nan and np.isnan(costs[place])
    return confident, mined, confident | mined


def gap_by_hand(lines, row, percent, average=lambda values: sum(values) / len(values)):
    ends = ("supervised", percent), ("supervised", 100), (row, percent)
    found = [
        [100 * line["AP"] for line in lines if (line["row"], line["percent"]) == end]
        for end in ends
    ]
    if not all(found):
        return float("nan")
    low, high, value = map(average, found)
    return 100 * (value - low) / (high - low)


def go_on(state, average="teacher"):
    def part(name):
        return {
            key.removeprefix(name): value
            for key, value in state["method"].items()
            if key.startswith(name)
        }

    return part("student."), part(f"{average}."), state["step"] + state["offset"]


def drawn(count, percent, seed, rounding=round, least=1, order=sorted):
    permutation = np.random.default_rng(seed).permutation(count)
    return order(permutation[: max(least, rounding(count * percent / 100))].tolist())


def stage_by_hand(step, before, steps, share, late=0, rounding=round):
    own = step - before
    return "one_to_many" if own < rounding(share * steps) + late else "one_to_one"


def selected_by_two_bugs(logits, boxes, count):
    """The function of the notebook."""
    return boxes[logits.sum(-1).topk(count).indices.sort().values]


def model_boxes_of_the_notebook(boxes, size):
    height, width = size
    scale = boxes.new_tensor([width, height, width, height])
    corners = boxes / scale
    center, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.cat([center, sides], 1) / scale


def mask_of_the_notebook(sizes, queries):
    total, start = sum(sizes), 0
    blocked = torch.zeros(total + queries, total + queries, dtype=torch.bool)
    blocked[:total] = True
    for size in sizes:
        blocked[start : start + size, start : start + size] = False
        start += size
    return blocked


def cut(batch, parts, rest=True, targets_too=True):
    found = [{} for _ in range(parts)]
    for name, (images, targets) in batch.items():
        for p in range(parts):
            start, end = len(images) * p // parts, len(images) * (p + 1) // parts
            if not rest:
                start, end = len(images) // parts * p, len(images) // parts * (p + 1)
            found[p][name] = (images[start:end], targets[start:end] if targets_too else targets)
    return found


def covered_pixels(corners, first=1, last=1):
    """The box of VOC's pixels, by listing them."""
    x1, y1, x2, y2 = corners
    columns = [x - first for x in range(x1, x2 + last)]
    rows = [y - first for y in range(y1, y2 + last)]
    return [float(x1 - first), float(y1 - first), float(len(columns)), float(len(rows))]


def groups_aside(groups, fraction, extra=0, count=len):
    """The fewest first groups by name that hold enough images."""
    names = sorted(set(groups))
    for number in range(len(names) + 1):
        chosen = [i for i, group in enumerate(groups) if group in names[:number]]
        if len(chosen) >= fraction * count(groups):
            break
    aside = names[: number + extra]
    return [i for i, group in enumerate(groups) if group in aside]


SOLUTIONS = {
    "boxes.pairwise_iou": iou_by_loops,
    "boxes.to_model": model_boxes,
    "boxes.to_pixels": pixel_boxes,
    "views.map_boxes": mapped_boxes,
    "evaluate.precision_recall": precision_and_recall,
    "evaluate.average_precision": ap_at_101_recalls,
    "matching.matching_cost": cost_by_loops,
    "matching.one_to_one": one_to_one_by_permutations,
    "detr.sine_positions": sines_by_loops,
    "detr.attention": attention_by_loops,
    "detr.map_positions": map_by_loops,
    "deformable.attention": reads_by_loops,
    "deformable.refine": refined,
    "deformable.places": shifted,
    "denoising.noise_boxes": noised,
    "dino.select": selected,
    "mean_teacher.ema_update": averaged_by_name,
    "mean_teacher.average": average_of_a_run,
    "mean_teacher.to_strong_view": to_strong_view,
    "denoising.group_mask": blocks,
    "query_consistency.consistency_loss": consistency_by_loops,
    "query_consistency.box_cells": cells_of_boxes,
    "cost_mining.em_step": em_by_hand,
    "cost_mining.em_steps": em_steps_by_hand,
    "cost_mining.mine": mined_by_loops,
    "matching.one_to_many": one_to_many_by_loops,
    "losses.one_to_many": losses_by_loops,
    "semi_detr.stage": stage_by_hand,
    "ablate.gap_closed": gap_by_hand,
    "train.resumed": go_on,
    "splits.labelled_indices": lambda count, percent, fold: drawn(count, percent, [fold, 2023]),
    "splits.of_process": lambda ids, percent, fold, process: [
        ids[i] for i in drawn(len(ids), percent, [fold, 2023])
    ],
    "engine.micro_batches": cut,
    "layouts.coco_box": covered_pixels,
    "splits.validation_groups": groups_aside,
}
with_flag = functools.partial
# exercise: {what the verdict's cause says: a wrong answer}
WRONG = {
    "boxes.pairwise_iou": {
        "boxes apart": with_flag(iou_by_loops, least=-1e9),
        "common area once": with_flag(iou_by_loops, counted=0),
        "rows and columns": lambda a, b: iou_by_loops(a, b).T,
    },
    "boxes.to_model": {
        "not twice": model_boxes_of_the_notebook,
        "x goes with the width": lambda boxes, size: model_boxes(boxes, size[::-1]),
        "are divided by the size": lambda boxes, size: model_boxes(boxes, (1, 1)),
        "not a corner": lambda boxes, size: torch.cat(
            [boxes[:, :2] / torch.tensor(size[::-1]), model_boxes(boxes, size)[:, 2:]], 1
        ),
    },
    "boxes.to_pixels": {
        "x goes with the width": lambda boxes, size: pixel_boxes(boxes, size[::-1]),
        "are multiplied by the size": lambda boxes, size: pixel_boxes(boxes, (1, 1)),
        "half a side": lambda boxes, size: pixel_boxes(boxes * torch.tensor([1, 1, 2, 2]), size),
    },
    "views.map_boxes": {
        "up to the width": lambda boxes, matrix, size: mapped_boxes(boxes, matrix, size, size),
        "clamped from above": with_flag(mapped_boxes, limits=(1e9, 1e9)),
        "clamped at 0": with_flag(mapped_boxes, low=-1e9),
        "not longer than 0": with_flag(mapped_boxes, shortest=0.0),
        "all four mapped corners": with_flag(mapped_boxes, corner_count=2),
        "not be transposed": lambda boxes, matrix, size: mapped_boxes(boxes, matrix.T, size),
    },
    "evaluate.precision_recall": {
        "over all objects": lambda hits, objects: precision_and_recall(
            hits, max(1, int(hits.sum()))
        ),
        "precision comes first": lambda hits, objects: precision_and_recall(hits, objects)[::-1],
        "detections so far": lambda hits, objects: (
            hits.cumsum(0) / len(hits),
            precision_and_recall(hits, objects)[1],
        ),
    },
    "evaluate.average_precision": {
        "best from there on": with_flag(ap_at_101_recalls, pick=lambda values: values[0]),
        "hits do not move ahead": ap_with_hits_first,
        "count with precision 0": lambda hits, objects: float(
            precision_and_recall(hits, objects)[0].mean()
        ),
        "not 11": with_flag(ap_at_101_recalls, steps=10),
    },
    "matching.matching_cost": {
        "not in pixels": cost_in_pixels,
        "GIoU": with_flag(cost_by_loops, overlap=0),
        "overlap costs less": with_flag(cost_by_loops, sign=2),
    },
    "matching.one_to_one": {
        "query of its own": greedy,
        "objects choose in turn": greedy_in_turn,
        "cheapest pair is first": with_flag(greedy_in_turn, by_pair=True),
        "sorted by query": sorted_by_object,
        "most expensive": with_flag(one_to_one_by_permutations, choose=max),
    },
    "matching.one_to_many": {
        "not of highest m": with_flag(one_to_many_by_loops, owner="m"),
        "among those that want it": with_flag(one_to_many_by_loops, owner="all"),
        "m = 0": with_flag(one_to_many_by_loops, least=-1.0),
        "not over those it wanted": with_flag(one_to_many_by_loops, maxima="wanted"),
        "alpha is the exponent": lambda logits, boxes, target, alpha, beta, candidates: (
            one_to_many_by_loops(logits, boxes, target, beta, alpha, candidates)
        ),
    },
    "losses.one_to_many": {
        "have the target 0": with_flag(losses_by_loops, absent=None),
        "not 1": with_flag(losses_by_loops, hard=True),
        "factor, |y - p| squared": with_flag(losses_by_loops, power=0),
        "|y - p| is squared": with_flag(losses_by_loops, power=1),
        "not in pixels": with_flag(losses_by_loops, scale="pixels"),
        "not IoU": with_flag(losses_by_loops, overlap=0),
        "1 - GIoU": with_flag(losses_by_loops, start=0.0),
        "weighted by its quality": with_flag(losses_by_loops, share=1.0),
        "number of pairs": with_flag(losses_by_loops, over="pairs"),
        "2, 5 and 2": with_flag(losses_by_loops, weights=(1, 1, 1)),
    },
    "detr.sine_positions": {
        "not by pi": with_flag(sines_by_loops, turn=math.pi),
        "multiplied by 2 pi": with_flag(sines_by_loops, turn=1.0),
        "stand side by side": lambda coordinates, dim, temperature: (
            sines_by_loops(coordinates, dim, temperature)
            .unflatten(-1, (-1, dim // 2, 2))
            .transpose(-1, -2)
            .flatten(-3)
        ),
    },
    "detr.attention": {
        "root of a head's length": with_flag(attention_by_loops, scaled=False),
        "softmax is over the keys": with_flag(attention_by_loops, dim=0),
        "cut into heads": lambda queries, keys, values, heads: attention_by_loops(
            queries, keys, values, 1
        ),
    },
    "detr.map_positions": {
        "rows are divided by the height": with_flag(map_by_loops, swapped=True),
        "not from 0": with_flag(map_by_loops, first=0),
        "y comes first": lambda height, width, dim, temperature: map_by_loops(
            width, height, dim, temperature
        ).transpose(0, 1),
    },
    "deformable.attention": {
        "math.floor": with_flag(reads_by_loops, floor=int),
        "0.5 is subtracted": with_flag(reads_by_loops, edge=0.0),
        "not the value at the border": with_flag(reads_by_loops, clamp=True),
        "x goes with the columns": lambda feature_map, places, shares: reads_by_loops(
            feature_map, places.flip(1), shares
        ),
    },
    "deformable.refine": {
        "start from the logit 0": with_flag(refined, start=-2.0),
        "not 0.5": with_flag(refined, start=0.5),
        "sigmoid of the sum": lambda delta, reference: (
            delta + torch.nn.functional.pad(reference, (0, 4 - reference.shape[1]))
        ),
        "goes through the sigmoid": lambda delta, reference: torch.logit(refined(delta, reference)),
    },
    "deformable.places": {
        "x is divided by the width and y": lambda reference, offsets, shape: shifted(
            reference, offsets, shape[::-1]
        ),
        "are divided by the size of the map": lambda reference, offsets, shape: shifted(
            reference, offsets, (1, 1)
        ),
        "offsets are added": lambda reference, offsets, shape: shifted(reference, -offsets, shape),
    },
    "denoising.noise_boxes": {
        "in order": with_flag(noised, ordered=False),
        "clamped to 0..1": with_flag(noised, least=-1e9),
        "half a side": with_flag(noised, unit=1),
        "1 to 2 times": lambda boxes, negative, amount, noise: noised(
            boxes, torch.zeros_like(negative), amount, noise
        ),
    },
    "dino.select": {
        "two things": selected_by_two_bugs,
        "not the sum": with_flag(selected, score=sum),
        "not the lowest": with_flag(selected, score=lambda row: -max(row)),
    },
    "mean_teacher.ema_update": {
        "belongs to the teacher": lambda old, new, m: averaged_by_name(old, new, 1 - m),
        "not the teacher's": with_flag(averaged_by_name, whole=lambda old, new, m: old),
        "stay whole": with_flag(
            averaged_by_name, whole=lambda old, new, m: m * old + (1 - m) * new
        ),
        "not a copy": lambda old, new, m: dict(new),
    },
    "mean_teacher.average": {
        "do not share one memory": with_flag(average_of_a_run, alias=True),
        "after its step": with_flag(average_of_a_run, late=True),
        "belongs to the teacher": lambda start, moves, m: average_of_a_run(start, moves, 1 - m),
    },
    "mean_teacher.to_strong_view": {
        "which to keep": with_flag(to_strong_view, drop=False),
        "equal to the cut": with_flag(to_strong_view, strict=True),
        "mapped by the matrix": with_flag(to_strong_view, moved=False),
        "the size is": lambda found, matrix, size, cut: to_strong_view(
            found, matrix, size[::-1], cut
        ),
    },
    "denoising.group_mask": {
        "see no group": mask_of_the_notebook,
        "rows see": with_flag(blocks, transposed=True),
        "another group": with_flag(blocks, among=False),
        "may see the matching queries": with_flag(blocks, apart=True),
        "True means blocked": lambda sizes, queries: ~blocks(sizes, queries),
    },
    "query_consistency.consistency_loss": {
        "not over all": with_flag(consistency_by_loops, count_all=True),
        "length 1": with_flag(consistency_by_loops, unit=False),
        "not summed": with_flag(consistency_by_loops, reduce="sum"),
        "not only the last": lambda student, teacher, valid: consistency_by_loops(
            student[-1:], teacher[-1:], valid
        ),
    },
    "query_consistency.box_cells": {
        "coarser maps": with_flag(cells_of_boxes, finest=True),
        "aligned=True": with_flag(cells_of_boxes, aligned=False),
        "strides are (y, x)": with_flag(cells_of_boxes, way=-1),
        "not to the nearest": with_flag(cells_of_boxes, rounding=np.round),
        "its own image": lambda features, strides, images, boxes, side: cells_of_boxes(
            features, strides, images * 0, boxes, side
        ),
    },
    "cost_mining.em_step": {
        "around the new means": lambda costs, weights, means, variances: em_by_hand(
            costs, weights, means, variances, around=means
        ),
        "1e-5 is added": with_flag(em_by_hand, floor=0.0),
        "weighs a component": with_flag(em_by_hand, prior=False),
    },
    "cost_mining.em_steps": {
        "else shrink to 0": with_flag(em_steps_by_hand, floor=0.0),
        "not their lower bound": with_flag(em_steps_by_hand, floor=0.0, least=1e-5),
        "all steps are made": lambda costs, steps: em_steps_by_hand(costs, steps - 1),
        "not the old ones": with_flag(em_steps_by_hand, old_means=True),
    },
    "cost_mining.mine": {
        "equal to the threshold": with_flag(mined_by_loops, strict=True),
        "costs nan": with_flag(mined_by_loops, nan=True),
        "padding": lambda costs, scores, valid, threshold, cut: mined_by_loops(
            costs, scores, valid | True, threshold, cut
        ),
        "equal to the cut": lambda costs, scores, valid, threshold, cut: mined_by_loops(
            costs, scores, valid, threshold, cut + 1e-9
        ),
    },
    "semi_detr.stage": {
        "whose steps are subtracted": lambda step, before, steps, share: stage_by_hand(
            step, 0, steps, share
        ),
        "the one after its last step": with_flag(stage_by_hand, late=1),
        "not cut off": with_flag(stage_by_hand, rounding=int),
    },
    "ablate.gap_closed": {
        "not the best": with_flag(gap_by_hand, average=max),
        "not the first": with_flag(gap_by_hand, average=lambda values: values[0]),
        "in %": lambda lines, row, percent: gap_by_hand(lines, row, percent) / 100,
        "nan, not 0": lambda lines, row, percent: (
            0.0 if math.isnan(gap := gap_by_hand(lines, row, percent)) else gap
        ),
    },
    "train.resumed": {
        "the teacher's weights": with_flag(go_on, average="student"),
        "the offset is added": lambda state: (*go_on(state)[:2], state["step"]),
        "steps of its own": lambda state: (*go_on(state)[:2], state["offset"]),
    },
    "splits.labelled_indices": {
        "folds are nested": lambda count, percent, fold: drawn(
            count, percent, [fold, int(percent)]
        ),
        "at least one": lambda count, percent, fold: drawn(count, percent, [fold, 2023], least=0),
        "come sorted": lambda count, percent, fold: drawn(count, percent, [fold, 2023], order=list),
        "not cut off": lambda count, percent, fold: drawn(
            count, percent, [fold, 2023], rounding=int
        ),
    },
    "splits.of_process": {
        "does not depend on the process": lambda ids, percent, fold, process: [
            ids[i] for i in drawn(len(ids), percent, [fold + process, 2023])
        ],
        "not their indices": lambda ids, percent, fold, process: drawn(
            len(ids), percent, [fold, 2023]
        ),
        "share all labelled images": lambda ids, percent, fold, process: [
            ids[i] for i in drawn(len(ids), percent, [fold, 2023])[process::8]
        ],
    },
    "engine.micro_batches": {
        "no image is lost": with_flag(cut, rest=False),
        "cut together": with_flag(cut, targets_too=False),
        "come in order": lambda batch, parts: cut(batch, parts)[::-1],
    },
    "layouts.coco_box": {
        "counts pixels from 1": with_flag(covered_pixels, first=0),
        "the last pixel belongs to the box": with_flag(covered_pixels, last=0),
        "both conventions differ": with_flag(covered_pixels, first=0, last=0),
        "a second corner": lambda corners: [corners[0] - 1, corners[1] - 1, *corners[2:]],
    },
    "splits.validation_groups": {
        "the last one may go beyond": with_flag(groups_aside, extra=-1),
        "not of the groups": lambda groups, fraction: [
            i
            for i, group in enumerate(groups)
            if group in sorted(set(groups))[: math.ceil(fraction * len(set(groups)))]
        ],
        "must not be on both sides": lambda groups, fraction: list(
            range(math.ceil(fraction * len(groups)))
        ),
        "not those left for training": lambda groups, fraction: [
            i for i in range(len(groups)) if i not in groups_aside(groups, fraction)
        ],
    },
}


def test_every_exercise_has_a_solution_and_three_mistakes_here():
    assert set(SOLUTIONS) == set(WRONG) == set(EXERCISES)
    assert all(len(mistakes) >= 3 for mistakes in WRONG.values())


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes(name, capsys, monkeypatch):
    monkeypatch.setenv("SEMIDETR_GRADING", "1")
    check(name, SOLUTIONS[name])
    assert capsys.readouterr().out == f"{name}: {PASSED}\n"


def test_the_solution_that_the_help_describes_passes():
    assert find_fault(EXERCISES["evaluate.average_precision"], ap_with_torch) == ""


@pytest.mark.parametrize(
    ("name", "cause"), [(name, cause) for name, mistakes in WRONG.items() for cause in mistakes]
)
def test_a_mistake_is_shown_with_inputs_both_answers_and_its_cause(
    name, cause, capsys, monkeypatch
):
    check(name, WRONG[name][cause])
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: case ") and "inputs  " in said and PASSED not in said
    (line,) = [line for line in said.splitlines() if line.startswith("  likely cause: ")]
    assert cause in line
    monkeypatch.setenv("SEMIDETR_GRADING", "1")
    with pytest.raises(AssertionError, match="likely cause"):
        check(name, WRONG[name][cause])


@pytest.mark.parametrize("name", EXERCISES)
def test_each_known_mistake_is_told_by_its_own_rule(name):
    exercise = EXERCISES[name]
    for rule, mistake in exercise.mistakes.items():
        fault = find_fault(exercise, lambda *inputs, mistake=mistake: mistake(*inputs))
        assert fault.endswith(f"likely cause: this rule is not kept: {rule}")


TENSORS = [
    name
    for name, exercise in EXERCISES.items()
    if isinstance(
        exercise.solution(*next(iter(exercise.cases(np.random.default_rng(0)).values()))),
        torch.Tensor,
    )
]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_a_list_or_an_array_is_told_to_be_a_tensor(name, convert):
    fault = find_fault(EXERCISES[name], lambda *inputs: convert(SOLUTIONS[name](*inputs)))
    assert "return a torch.Tensor, not a" in fault and "likely cause: " in fault


def test_a_part_that_is_a_list_is_told_to_be_a_tensor():
    exercise = EXERCISES["matching.one_to_one"]
    pairs = lambda *inputs: [part.tolist() for part in SOLUTIONS["matching.one_to_one"](*inputs)]  # noqa: E731
    fault = find_fault(exercise, pairs)
    assert "[queries]: return a torch.Tensor, not a list" in fault


def test_other_keys_of_a_dict_are_wrong():
    renamed = lambda *inputs: dict(zip(("box", "labels"), to_strong_view(*inputs).values()))  # noqa: E731
    fault = find_fault(EXERCISES["mean_teacher.to_strong_view"], renamed)
    assert "return the keys ['boxes', 'labels'], not ['box', 'labels']" in fault


@pytest.mark.parametrize("answer", [lambda *inputs: PASSED, lambda *inputs: torch.zeros(2)[PASSED]])
def test_no_answer_can_say_that_it_is_right(answer, capsys):
    check("semi_detr.stage", answer)
    check("boxes.pairwise_iou", answer)
    assert PASSED not in capsys.readouterr().out


def stub(*inputs):
    raise NotImplementedError


@pytest.mark.parametrize("unwritten", [stub, lambda *inputs: None, lambda *inputs: ...])
def test_a_stub_runs_through_unless_it_is_graded(unwritten, capsys, monkeypatch):
    check("matching.one_to_one", unwritten)
    assert "matching.one_to_one: not written yet" in capsys.readouterr().out
    monkeypatch.setenv("SEMIDETR_GRADING", "1")
    with pytest.raises(AssertionError, match="not written yet"):
        check("matching.one_to_one", unwritten)


@functools.wraps(matching.one_to_one)
def wrapped(*inputs):
    return matching.one_to_one(*inputs)


one_to_one = matching.one_to_one
HANDED_BACK = [
    one_to_one,
    functools.partial(one_to_one),
    wrapped,
    lambda *inputs: one_to_one(*inputs),
]


@pytest.mark.parametrize("mine", HANDED_BACK)
def test_the_package_s_own_function_is_refused(mine, monkeypatch):
    assert "the package's own" in find_fault(EXERCISES["matching.one_to_one"], mine)
    monkeypatch.setenv("SEMIDETR_GRADING", "1")
    with pytest.raises(AssertionError, match="the package's own"):
        check("matching.one_to_one", mine)


def test_an_exception_of_the_learner_is_one_line_with_its_place(capsys):
    def mine(a, b):
        return torch.zeros(2)[len(a) + 5]

    check("boxes.pairwise_iou", mine)
    (said,) = capsys.readouterr().out.splitlines()
    assert "IndexError" in said and "return torch.zeros(2)[len(a) + 5]" in said
    assert "TypeError" in find_fault(EXERCISES["boxes.pairwise_iou"], lambda a: a)
    assert "not callable" in find_fault(EXERCISES["boxes.pairwise_iou"], 3)


def test_an_unknown_name_names_its_neighbours():
    with pytest.raises(
        UserError, match=r"'matching\.one_two_many': did you mean matching\.one_to_many"
    ):
        check("matching.one_two_many", stub)
    with pytest.raises(UserError, match=r"boxes\.pairwise_iou or"):
        check("?", stub)


@pytest.mark.parametrize(
    ("expected", "result", "words"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "the type torch.float32"),
        (torch.zeros(2), torch.zeros(3), "return the shape (2,), not (3,)"),
        (torch.zeros(2), [0.0, 0.0], "return a torch.Tensor, not a list"),
        (torch.zeros(2), "zeros", "return a torch.Tensor, not a str"),
        (np.zeros(2), [0.0, 0.0], "return a NumPy array, not a list"),
        (0.5, "half", "return a number"),
        (0.5, torch.zeros(1), "a single number"),
        ([1, 2], torch.tensor([1, 2]), "return a list, not a torch.Tensor"),
        ({"a": 1.0}, [1.0], "return a dict"),
        ("one_to_one", 1.0, "differs"),
        (
            {"a": 1.0, "b": torch.zeros(1)},
            {"a": 1.0, "b": torch.ones(1)},
            "the answer[b][0]: largest difference 1",
        ),
        ((torch.zeros(2), torch.zeros(2)), (torch.zeros(2),), "return 2 parts, not 1"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), "[1]"),
        (0.5, 0.6, "largest difference 0.1"),
    ],
)
def test_difference_names_the_first_thing_that_is_wrong(expected, result, words):
    assert words in difference(expected, result, 1e-4)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.flip(0), "right and their order is not"),
        (lambda x: 3 * x, "3 times what it should be"),
        (lambda x: x[:2], "number of rows"),
        (lambda x: x.double(), "their type is not"),
        (lambda x: x**3 + x, "none of the known mistakes"),
    ],
)
def test_an_unknown_mistake_is_described_by_its_values(answer, words):
    same = Exercise(lambda x: x.clone(), lambda rng: {"four": (torch.arange(4.0) + 1,)})
    assert words in find_fault(same, answer).splitlines()[-1]


def test_difference_takes_a_plain_tuple_for_a_named_one_and_a_number_for_a_number():
    pairs = (torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    assert difference(matching.Match(*pairs), pairs, 0.0) == ""
    assert "[queries][0]" in difference(matching.Match(*pairs), (pairs[1], *pairs[1:]), 0.0)
    assert (
        difference(0.5, np.float32(0.5), 1e-4) == ""
        and difference(0.5, torch.tensor(0.5), 1e-4) == ""
    )
    assert difference(torch.tensor(torch.nan), torch.tensor(torch.nan), 0.0) == ""


def test_a_case_that_alone_is_wrong_is_the_likely_cause():
    cases = {"positive": (torch.tensor(2.0),), "negative": (torch.tensor(-3.0),)}
    square = Exercise(lambda x: x * x, lambda rng: cases)
    fault = find_fault(square, lambda x: x * x if x > 0 else x + 20)
    assert fault.startswith("case 2") and "this case (negative)" in fault.splitlines()[-1]


def test_changing_the_input_is_a_fault_of_its_own():
    double = Exercise(lambda x: 2 * x, lambda rng: {"three": (torch.arange(3.0),)})
    assert find_fault(double, lambda x: x + x) == ""
    fault = find_fault(double, lambda x: x.mul_(2))
    assert "the input, now changed[0][1]" in fault and "in place" in fault


def test_the_cases_are_the_same_each_time():
    for exercise in EXERCISES.values():
        first, again = (exercise.cases(np.random.default_rng(0)) for _ in range(2))
        assert difference(first, again, 0.0) == "" and len(first) >= 1
