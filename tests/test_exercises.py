"""Every exercise can be solved, a plausible mistake is caught, and whatever is no answer is called so."""

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
from semidetr_lite.teach.exercises import EXERCISES, Exercise, check, difference, find_fault


@pytest.fixture(autouse=True)
def not_graded(monkeypatch):
    monkeypatch.delenv("SEMIDETR_GRADING", raising=False)


def iou_by_loops(a, b):
    table = torch.zeros(len(a), len(b))
    for i, j in itertools.product(range(len(a)), range(len(b))):
        sides = torch.minimum(a[i, 2:], b[j, 2:]) - torch.maximum(a[i, :2], b[j, :2])
        common = sides.clamp(min=0).prod()
        table[i, j] = common / ((a[i, 2:] - a[i, :2]).prod() + (b[j, 2:] - b[j, :2]).prod() - common)
    return table


def model_boxes(boxes, size):
    height, width = size
    x1, y1, x2, y2 = boxes.T
    return torch.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1)


def pixel_boxes(boxes, size):
    height, width = size
    x, y, w, h = boxes.T
    return torch.stack([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], 1)


def mapped_boxes(boxes, matrix, size):
    hulls = torch.zeros(len(boxes), 4)
    for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        corners = torch.tensor([[x1, y1, 1], [x2, y1, 1], [x1, y2, 1], [x2, y2, 1]]).T
        x, y, w = matrix @ corners
        x, y = (x / w).clamp(0, size[1]), (y / w).clamp(0, size[0])
        hulls[row] = torch.stack([x.min(), y.min(), x.max(), y.max()])
    return hulls, (hulls[:, 2] > hulls[:, 0]) & (hulls[:, 3] > hulls[:, 1])


def precision_and_recall(hits, objects):
    right = np.cumsum(hits.numpy())
    precision, recall = right / np.arange(1, len(hits) + 1), right / objects
    return torch.tensor(precision).float(), torch.tensor(recall).float()


def ap_at_101_recalls(hits, objects):
    precision, recall = precision_and_recall(hits, objects)
    best = [precision[recall >= step / 100 - 1e-6] for step in range(101)]
    return float(np.mean([float(part.max()) if len(part) else 0.0 for part in best]))


def cost_by_loops(logits, pred_boxes, target):
    wanted, cost = to_model(target["boxes"], target["size"]), torch.zeros(len(logits), len(target["boxes"]))
    for q, t in itertools.product(range(len(logits)), range(len(wanted))):
        s = logits[q, target["labels"][t]].sigmoid()
        price = -0.25 * (1 - s) ** 2 * s.log() + 0.75 * s**2 * (1 - s).log()
        giou = overlaps(to_pixels(pred_boxes[q], target["size"]), target["boxes"][t])[1]
        cost[q, t] = 2 * price + 5 * (pred_boxes[q] - wanted[t]).abs().sum() - 2 * giou
    return cost


def sines_by_loops(coordinates, dim, temperature, turn=2 * math.pi):
    rows = []
    for row in coordinates.tolist():
        angles = [turn * place / temperature ** (2 * i / dim) for place in row for i in range(dim // 2)]
        rows.append([value for angle in angles for value in (math.sin(angle), math.cos(angle))])
    return torch.tensor(rows)


def attention_by_loops(queries, keys, values, heads, scaled=True):
    width = queries.shape[1] // heads
    parts = []
    for start in range(0, queries.shape[1], width):
        q, k, v = (part[:, start : start + width] for part in (queries, keys, values))
        parts.append((q @ k.T / (width**0.5 if scaled else 1)).softmax(1) @ v)
    return torch.cat(parts, 1)


def map_by_loops(height, width, dim, temperature, swapped=False):
    over = (width, height) if swapped else (height, width)
    places = [[[(y + 1) / over[0], (x + 1) / over[1]] for x in range(width)] for y in range(height)]
    codes = sines_by_loops(torch.tensor(places).flatten(0, 1), dim // 2, temperature)
    return codes.view(height, width, dim)


def reads_by_loops(feature_map, places, shares, floor=math.floor):
    height, width, answer = *feature_map.shape[:2], 0
    for (x, y), share in zip(places.tolist(), shares.tolist()):
        column, row = x * width - 0.5, y * height - 0.5
        for c, r in itertools.product((floor(column), floor(column) + 1), (floor(row), floor(row) + 1)):
            if 0 <= c < width and 0 <= r < height:
                answer = answer + share * (1 - abs(column - c)) * (1 - abs(row - r)) * feature_map[r, c]
    return answer


def refined(delta, reference, start=0.0):
    before = torch.full_like(delta, start)
    before[:, : reference.shape[1]] = torch.logit(reference.clamp(1e-5, 1 - 1e-5))
    return torch.sigmoid(before + delta)


def shifted(reference, offsets, shape):
    height, width = shape
    return torch.stack([reference[0] + offsets[:, 0] / width, reference[1] + offsets[:, 1] / height], 1)


def noised(boxes, negative, amount, chance, ordered=True):
    rows = []
    for (x, y, w, h), far, draws in zip(boxes.tolist(), negative.tolist(), chance.tolist()):
        corners = []
        for edge, half, share, way in zip(
            (x - w / 2, y - h / 2, x + w / 2, y + h / 2), (w / 2, h / 2) * 2, draws[:4], draws[4:]
        ):
            edge += (share + far) * amount * half * (-1 if way < 0.5 else 1)
            corners.append(min(max(edge, 0.0), 1.0))
        xs, ys = (sorted(pair) if ordered else pair for pair in (corners[::2], corners[1::2]))
        rows.append([sum(xs) / 2, sum(ys) / 2, xs[1] - xs[0], ys[1] - ys[0]])
    return torch.tensor(rows)


def selected(logits, boxes, count, score=max):
    order = sorted(range(len(boxes)), key=lambda token: -score(logits[token].tolist()))
    return boxes[order[:count]]


def one_to_one_by_permutations(logits, pred_boxes, target):
    cost = matching.matching_cost(logits, pred_boxes, target)
    targets = range(cost.shape[1])
    ways = itertools.permutations(range(len(cost)), len(targets))
    best = min(ways, key=lambda way: sum(float(cost[q, t]) for q, t in zip(way, targets)))
    pairs = torch.tensor(sorted(zip(best, targets)), dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], torch.ones(len(pairs))


def one_to_many_by_loops(logits, pred_boxes, target, alpha, beta, candidates, owner="iou"):
    iou = pairwise_overlaps(to_pixels(pred_boxes, target["size"]), target["boxes"])[0]
    m = logits.sigmoid()[:, target["labels"]] ** alpha * iou**beta
    wanted = {q: [] for q in range(len(logits))}
    for t in range(m.shape[1]):
        for q in m[:, t].argsort(descending=True)[:candidates].tolist():
            wanted[q] += [t] if m[q, t] > 0 else []
    by = iou if owner == "iou" else m
    owners = {q: max(ts, key=lambda t: float(by[q, t])) for q, ts in wanted.items() if ts}
    rows = []
    for q, t in sorted(owners.items()):
        mates = [other for other, owned in owners.items() if owned == t]
        rows.append((q, t, float(m[q, t] / (m[mates, t].max() + 1e-7) * iou[mates, t].max())))
    queries, targets, quality = zip(*rows) if rows else ((), (), ())
    return torch.tensor(queries).long(), torch.tensor(targets).long(), torch.tensor(quality).float()


def greedy(logits, pred_boxes, target):
    cost = matching.matching_cost(logits, pred_boxes, target)
    targets = torch.arange(cost.shape[1])
    return cost.argmin(0), targets, torch.ones(len(targets))


def cost_in_pixels(logits, pred_boxes, target):
    found, unit = to_pixels(pred_boxes, target["size"]), {**target, "size": (1, 1)}
    return cost_by_loops(logits, found, unit)


def averaged_by_name(teacher, student, momentum):
    new = {}
    for name, old in teacher.items():
        new[name] = momentum * old + (1 - momentum) * student[name] if old.is_floating_point() else student[name]
    return new


def average_of_a_run(start, moves, momentum, alias=False):
    student = start.clone()
    teacher = student.detach() if alias else student.detach().clone()
    for move in moves:
        student += move
        teacher.lerp_(student, 1 - momentum)
    return teacher


def to_strong_view(found, matrix, size, score_threshold, drop=True):
    boxes, keep = mapped_boxes(found["boxes"], matrix, size)
    keep = (keep if drop else True) & (found["scores"] >= score_threshold)
    return {"boxes": boxes[keep], "labels": found["labels"][keep]}


def consistency_by_loops(student, teacher, valid, count_all=False):
    total, count = torch.zeros(()), valid.numel() if count_all else max(1, int(valid.sum()))
    for ours, theirs in zip(student, teacher):
        for image, query in valid.nonzero().tolist():
            a, b = ours[image, query], theirs[image, query].detach()
            total = total + (a / a.norm() - b / b.norm()).square().mean() / count
    return total


def cells_of_boxes(features, strides, images, boxes, side, finest=False):
    cells = torch.zeros(len(boxes), features[0].shape[1], side, side)
    for row, box in enumerate(boxes):
        length = float((box[2:] - box[:2]).prod().sqrt())
        level = min(len(features) - 1, max(0, int(np.floor(np.log2(length / (7 * strides[0][0]) + 1e-6)))))
        level = 0 if finest else level
        (y, x), image = strides[level], int(images[row])
        here = torch.cat([torch.zeros(1), box / torch.tensor([x, y, x, y])])[None]
        cells[row] = roi_align(features[level][image : image + 1], here, side, aligned=True)[0]
    return cells


def blocks(sizes, queries, transposed=False):
    owner = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)] + [-1] * queries)
    blocked = (owner != -1)[None] & (owner[:, None] != owner[None])
    return blocked.T if transposed else blocked


def em_by_hand(costs, weights, means, variances, around=None, floor=1e-5):
    with np.errstate(all="ignore"):
        chance = weights * np.exp(-((costs[:, None] - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
        share = chance / chance.sum(1, keepdims=True)
        count = share.sum(0)
        new = (share * costs[:, None]).sum(0) / count
        away = costs[:, None] - (new if around is None else around)
        return count / len(costs), new, (share * away**2).sum(0) / count + floor


def em_steps_by_hand(costs, steps, floor=1e-5):
    state = np.full(2, 0.5), np.array([costs.min(), costs.max()]), np.ones(2)
    for _ in range(steps):
        state = em_by_hand(costs, *state, floor=floor)
    return state


def mined_by_loops(costs, scores, valid, threshold, score_threshold, strict=False):
    confident, mined = np.zeros(costs.shape, bool), np.zeros(costs.shape, bool)
    for place in np.argwhere(valid):
        place = tuple(place)
        confident[place] = scores[place] >= score_threshold
        mined[place] = costs[place] < threshold if strict else costs[place] <= threshold
    return confident, mined, confident | mined


def gap_by_hand(lines, row, percent, average=lambda values: sum(values) / len(values)):
    ends = ("supervised", percent), ("supervised", 100), (row, percent)
    found = [[100 * line["AP"] for line in lines if (line["row"], line["percent"]) == end] for end in ends]
    if not all(found):
        return float("nan")
    low, high, value = map(average, found)
    return 100 * (value - low) / (high - low)


def go_on(state, average="teacher"):
    def part(name):
        return {key.removeprefix(name): value for key, value in state["method"].items() if key.startswith(name)}

    return part("student."), part(f"{average}."), state["step"] + state["offset"]


def drawn(count, percent, seed):
    order = np.random.default_rng(seed).permutation(count)
    return sorted(order[: max(1, round(count * percent / 100))].tolist())


def cut(batch, parts, rest=True):
    found = [{} for _ in range(parts)]
    for name, (images, targets) in batch.items():
        for p in range(parts):
            start, end = len(images) * p // parts, len(images) * (p + 1) // parts
            if not rest:
                start, end = len(images) // parts * p, len(images) // parts * (p + 1)
            found[p][name] = (images[start:end], targets[start:end])
    return found


stages = ("one_to_one", "one_to_many")
# exercise: (a solution, a mistake that a learner might make)
ANSWERS = {
    "boxes.pairwise_iou": (iou_by_loops, lambda a, b: pairwise_overlaps(a, b)[1]),
    "boxes.to_model": (model_boxes, lambda boxes, size: model_boxes(boxes, size[::-1])),
    "boxes.to_pixels": (pixel_boxes, lambda boxes, size: pixel_boxes(boxes, size[::-1])),
    "views.map_boxes": (mapped_boxes, lambda boxes, matrix, size: mapped_boxes(boxes, matrix.T, size)),
    "evaluate.precision_recall": (
        precision_and_recall,
        lambda hits, objects: precision_and_recall(hits, int(hits.sum())),
    ),
    "evaluate.average_precision": (
        ap_at_101_recalls,
        lambda hits, objects: float(precision_and_recall(hits, objects)[0].mean()),
    ),
    "matching.matching_cost": (cost_by_loops, cost_in_pixels),
    "matching.one_to_one": (one_to_one_by_permutations, greedy),
    "detr.sine_positions": (sines_by_loops, functools.partial(sines_by_loops, turn=math.pi)),
    "detr.attention": (attention_by_loops, functools.partial(attention_by_loops, scaled=False)),
    "detr.map_positions": (map_by_loops, functools.partial(map_by_loops, swapped=True)),
    "deformable.attention": (reads_by_loops, functools.partial(reads_by_loops, floor=int)),
    "deformable.refine": (refined, functools.partial(refined, start=-2.0)),
    "deformable.places": (shifted, lambda reference, offsets, shape: shifted(reference, offsets, shape[::-1])),
    "denoising.noise_boxes": (noised, functools.partial(noised, ordered=False)),
    "dino.select": (selected, functools.partial(selected, score=sum)),
    "mean_teacher.ema_update": (averaged_by_name, lambda old, new, m: averaged_by_name(old, new, 1 - m)),
    "mean_teacher.average": (average_of_a_run, functools.partial(average_of_a_run, alias=True)),
    "mean_teacher.to_strong_view": (to_strong_view, functools.partial(to_strong_view, drop=False)),
    "denoising.group_mask": (blocks, functools.partial(blocks, transposed=True)),
    "query_consistency.consistency_loss": (
        consistency_by_loops,
        functools.partial(consistency_by_loops, count_all=True),
    ),
    "query_consistency.box_cells": (cells_of_boxes, functools.partial(cells_of_boxes, finest=True)),
    "cost_mining.em_step": (em_by_hand, lambda costs, w, means, v: em_by_hand(costs, w, means, v, around=means)),
    "cost_mining.em_steps": (em_steps_by_hand, functools.partial(em_steps_by_hand, floor=0.0)),
    "cost_mining.mine": (mined_by_loops, functools.partial(mined_by_loops, strict=True)),
    "matching.one_to_many": (one_to_many_by_loops, functools.partial(one_to_many_by_loops, owner="m")),
    "semi_detr.stage": (
        lambda step, before, steps, share: stages[step - before < round(share * steps)],
        lambda step, before, steps, share: stages[step < round(share * steps)],
    ),
    "ablate.gap_closed": (gap_by_hand, functools.partial(gap_by_hand, average=max)),
    "train.resumed": (go_on, functools.partial(go_on, average="student")),
    "splits.labelled_indices": (
        lambda count, percent, fold: drawn(count, percent, [fold, 2023]),
        lambda count, percent, fold: drawn(count, percent, [fold, int(percent)]),
    ),
    "splits.of_process": (
        lambda ids, percent, fold, process: [ids[i] for i in drawn(len(ids), percent, [fold, 2023])],
        lambda ids, percent, fold, process: [ids[i] for i in drawn(len(ids), percent, [fold + process, 2023])],
    ),
    "engine.micro_batches": (cut, functools.partial(cut, rest=False)),
}


def test_every_exercise_has_a_solution_and_a_mistake_here():
    assert set(ANSWERS) == set(EXERCISES)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes(name, capsys, monkeypatch):
    monkeypatch.setenv("SEMIDETR_GRADING", "1")
    check(name, ANSWERS[name][0])
    assert capsys.readouterr().out == f"{name}: right in every case\n"


@pytest.mark.parametrize("name", EXERCISES)
def test_a_mistake_is_shown_with_inputs_and_both_answers(name, capsys, monkeypatch):
    check(name, ANSWERS[name][1])
    said = capsys.readouterr().out
    assert all(word in said for word in (f"{name}: case ", "inputs  ", "package ", "yours   "))
    monkeypatch.setenv("SEMIDETR_GRADING", "1")
    with pytest.raises(AssertionError, match="differs"):
        check(name, ANSWERS[name][1])


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
HANDED_BACK = [one_to_one, functools.partial(one_to_one), wrapped, lambda *inputs: one_to_one(*inputs)]


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
    with pytest.raises(UserError, match=r"'matching\.one_two_many': did you mean matching\.one_to_many"):
        check("matching.one_two_many", stub)
    with pytest.raises(UserError, match=r"boxes\.pairwise_iou or"):
        check("?", stub)


@pytest.mark.parametrize(
    ("ours", "mine", "word"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "type or shape"),
        (torch.zeros(2), torch.zeros(3), "type or shape"),
        (torch.zeros(2), [0.0, 0.0], "in parts"),
        (torch.zeros(2), "zeros", "type"),
        ({"a": 1.0, "b": torch.zeros(1)}, {"a": 1.0, "b": torch.ones(1)}, "the answer[b][0]: largest difference 1"),
        ((torch.zeros(2), torch.zeros(2)), (torch.zeros(2),), "in parts"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), "[1]"),
        (0.5, 0.6, "largest difference 0.1"),
    ],
)
def test_difference_names_the_first_thing_that_is_wrong(ours, mine, word):
    assert word in difference(ours, mine, 1e-4)


def test_difference_takes_a_plain_tuple_for_a_named_one_and_a_number_for_a_number():
    pairs = (torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    assert difference(matching.Match(*pairs), pairs, 0.0) == ""
    assert "[queries][0]" in difference(matching.Match(*pairs), (pairs[1], *pairs[1:]), 0.0)
    assert difference(0.5, np.float32(0.5), 1e-4) == "" and difference(0.5, torch.tensor(0.5), 1e-4) == ""
    assert difference(torch.tensor(torch.nan), torch.tensor(torch.nan), 0.0) == ""


def test_changing_the_input_is_a_fault_of_its_own():
    double = Exercise(lambda x: 2 * x, lambda rng: {"three": (torch.arange(3.0),)})
    assert find_fault(double, lambda x: x + x) == ""
    assert "the input, now changed[0][1]" in find_fault(double, lambda x: x.mul_(2))


def test_the_cases_are_the_same_each_time():
    for exercise in EXERCISES.values():
        first, again = (exercise.cases(np.random.default_rng(0)) for _ in range(2))
        assert difference(first, again, 0.0) == "" and len(first) >= 1
