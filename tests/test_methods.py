"""One step of each method: what it may see, what it may move, what it costs, and its losses rebuilt
by hand.
"""

import copy
import sys
import traceback

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.overrides import TorchFunctionMode

from semidetr_lite.boxes import to_model, to_pixels
from semidetr_lite.data.views import map_boxes
from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.device import copy_to_host, to_device, to_host
from semidetr_lite.errors import UserError
from semidetr_lite.losses import detection_loss, layer_loss, pad_to
from semidetr_lite.matching import layer_costs, match_layers, matching_cost, one_to_one, pad_targets
from semidetr_lite.methods.cost_mining import above_mean_plus_std, reliable_threshold
from semidetr_lite.methods.mean_teacher import (
    MeanTeacher,
    PseudoBoxes,
    TeacherStudent,
    ema_momentum,
    ema_update,
    select_pseudo_boxes,
)
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.methods.supervised import Supervised
from semidetr_lite.training.measure import pseudo_box_log
from semidetr_lite.training.presets import PRESETS, make_method
from semidetr_lite.training.settings import change as change_settings

PARTS = ("class", "l1", "giou")
SWITCH = 10  # the step at which stage two begins
STAGES = {"one_to_many": 3, "one_to_one": 12}  # a step of each
KINDS = ["supervised", "mean teacher", "stage one", "stage two"]


def shaken(module, amount: float = 0.15):
    """Off the zeros and ones of the start, so that everything has an influence."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn_like(parameter)
    return module


def student(queries: int = 8) -> DINO:
    sizes = {
        "num_queries": queries,
        "dim": 16,
        "heads": 2,
        "levels": 3,
        "points": 2,
        "dim_feedforward": 32,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 2, "denoising_queries": 6, "anchor_size": 0.15}
    sizes["query_init"] = "torch"
    detector = shaken(DINO(num_classes=4, **sizes, **layers, backbone=Tiny((8, 8, 16, 16, 16))))
    for head in (detector.class_head, detector.proposal_class):
        torch.nn.init.normal_(head.bias, std=0.3)  # scores about one half
    return detector


def make(kind: str, **changes) -> tuple[TeacherStudent, int]:
    """A method with a teacher of its own, and a step for it."""
    torch.manual_seed(1)
    if kind == "supervised":
        method = Supervised(student())
    elif kind == "mean teacher":
        method = MeanTeacher(
            student(), **{"score_threshold": 0.55, "max_pseudo_boxes": 12, **changes}
        )
    else:
        method = SemiDETR(
            student(),
            one_to_many_steps=SWITCH,
            **{"score_threshold": 0.55, "max_pseudo_boxes": 12, **changes},
        )
    shaken(method.teacher, 0.02)
    return method.train(), STAGES["one_to_one" if kind == "stage two" else "one_to_many"]


def some_target(count: int, size) -> dict:
    boxes = torch.cat([torch.rand(count, 2) * 0.5 + 0.25, torch.rand(count, 2) * 0.3 + 0.1], 1)
    return {"boxes": to_pixels(boxes, size), "labels": torch.randint(0, 4, (count,)), "size": size}


def affine(first, second) -> torch.Tensor:
    return torch.tensor([first, second, [0.0, 0, 1]])


def some_batch(
    counts=(3, 1), sizes=((64, 64),) * 2, weak_sizes=((64, 64),) * 3, strong_sizes=None
) -> dict:
    """Labelled images with `counts` objects; unlabelled ones whose strong view is mirrored, shifted
    and resized.
    """
    torch.manual_seed(2)
    truths = [some_target(count, size) for count, size in zip(counts, sizes)]
    views = {"weak": ([], []), "strong": ([], [])}
    for number, (size, strong_size) in enumerate(zip(weak_sizes, strong_sizes or weak_sizes)):
        weak = affine([1.1, 0, -3], [0, 1.1, 2])
        scale = strong_size[1] / size[1], strong_size[0] / size[0]
        strong = affine([-scale[0], 0, strong_size[1]], [0.05, scale[1], 4])
        for name, matrix, shape in (("weak", weak, size), ("strong", strong, strong_size)):
            truth = {**some_target(2, shape), "matrix": matrix}
            views[name][0].append(torch.rand(3, *shape))
            views[name][1].append(
                {"size": shape, "image_id": number, "matrix": matrix, "truth": truth}
            )
    return {"labelled": ([torch.rand(3, *size) for size in sizes], truths), **views}


BATCHES = {
    "square": {},
    "wide": {"sizes": ((48, 80),) * 2, "weak_sizes": ((48, 80),) * 2},
    "mixed": {
        "sizes": ((64, 48), (48, 80)),
        "weak_sizes": ((48, 80), (64, 64)),
        "strong_sizes": ((80, 48), (64, 64)),
    },
    "an image without object": {"counts": (0, 2)},
    "no object at all": {"counts": (0, 0)},
}


# The average


def test_ema_momentum():
    assert [ema_momentum(step) for step in (0, 1, 2, 3)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
    assert ema_momentum(998) == pytest.approx(1 - 1 / 999) and ema_momentum(999) == pytest.approx(
        0.999
    )
    assert ema_momentum(10**6) == 0.999 and ema_momentum(50, ceiling=0.9) == 0.9


def test_ema_update_equals_its_closed_form_with_buffers():
    teacher, pupil = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)
    )
    first, momentum, values = copy.deepcopy(teacher), 0.9, []
    for _ in range(5):
        shaken(pupil, 1.0)
        pupil(torch.randn(8, 3))  # moves the statistics
        values.append({key: value.clone() for key, value in pupil.state_dict().items()})
        ema_update(teacher, pupil, momentum)
    for key, value in teacher.state_dict().items():
        if value.is_floating_point():
            expected = momentum**5 * first.state_dict()[key]
            expected += sum((1 - momentum) * momentum ** (4 - i) * values[i][key] for i in range(5))
            assert torch.allclose(value, expected, atol=1e-5), key
        else:
            assert value == values[-1][key] == 5, key
    assert all(torch.equal(value, values[-1][key]) for key, value in pupil.state_dict().items())


def test_while_the_momentum_rises_the_teacher_is_the_mean_of_all_students():
    method = Supervised(student(), ema_decay=1.0)
    weight, history = (
        method.student.class_head.weight,
        [method.student.class_head.weight.detach().clone()],
    )
    for step in range(6):
        shaken(method.student.class_head, 1.0)
        history.append(weight.detach().clone())
        method.after_step(step)
        assert torch.allclose(
            method.teacher.class_head.weight, torch.stack(history).mean(0), atol=1e-5
        )


def test_a_new_method_has_an_equal_teacher_that_stays_as_it_is_in_training():
    for method in (
        Supervised(student()),
        MeanTeacher(student()),
        SemiDETR(student(), one_to_many_steps=SWITCH),
    ):
        pairs = zip(
            method.student.state_dict().values(), method.teacher.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
        assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
        for mode in (True, False, True):
            assert method.train(mode) is method
            assert method.student.training == mode
            assert not any(module.training for module in method.teacher.modules())


def test_everything_a_resume_needs_is_in_the_state():
    method, step = make("stage one", cost_queue_size=40)
    method(some_batch(), step)
    other, _ = make("stage one", cost_queue_size=40)
    other.load_state_dict(method.state_dict())
    assert other.cost_queue.isfinite().any()
    ours, theirs = method(some_batch(), step + 1), other(some_batch(), step + 1)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


# Pseudo-boxes


def some_pseudo(batch: int = 3, max_boxes: int = 6, size=(64, 64)) -> PseudoBoxes:
    boxes = to_pixels(
        torch.cat(
            [torch.rand(batch, max_boxes, 2), torch.rand(batch, max_boxes, 2) * 0.3 + 0.05], -1
        ),
        size,
    )
    scores = torch.rand(batch, max_boxes).sort(descending=True).values
    valid = torch.arange(max_boxes) < torch.tensor([max_boxes, max_boxes - 3, 0])[:batch, None]
    return PseudoBoxes(boxes, scores, torch.randint(0, 4, (batch, max_boxes)), valid)


def test_a_box_at_the_score_threshold_is_confident():
    scores = torch.tensor([[0.75, 0.5, 0.25], [0.5, 0.5, 0.0]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    pseudo = PseudoBoxes(torch.zeros(2, 3, 4), scores, torch.zeros(2, 3).long(), valid)
    assert pseudo.above(0.5).tolist() == [[True, True, False], [True, False, False]]
    assert pseudo.above(0.500001).tolist() == [[True, False, False], [False] * 3]


@pytest.mark.parametrize("name", ["square", "mixed"])
def test_boxes_are_mapped_to_the_strong_view_one_by_one(name):
    batch = some_batch(**BATCHES[name])
    weak, strong = batch["weak"][1], batch["strong"][1]
    pseudo = some_pseudo(len(weak))
    pseudo.boxes[0, 1] += 200.0  # out of view
    carried = pseudo.to_strong_view(weak, strong)
    assert torch.equal(carried.labels, pseudo.labels)
    for image, (first, second) in enumerate(zip(weak, strong)):
        transfer = second["matrix"] @ torch.linalg.inv(first["matrix"])
        for place in range(6):
            box, keep = map_boxes(pseudo.boxes[image, place : place + 1], transfer, second["size"])
            assert torch.allclose(
                carried.boxes[image, place], to_model(box, second["size"])[0], atol=1e-5
            )
            assert carried.valid[image, place] == (pseudo.valid[image, place] & keep[0])
    assert not carried.valid[0, 1] and carried.valid[0].any()


def test_pseudo_boxes_are_the_teachers_detections():
    teacher, images = student().eval(), torch.rand(3, 3, 64, 64)
    found = select_pseudo_boxes(teacher(images), torch.full((3, 2), 64), max_boxes=5, nms=0.2)
    assert found.boxes.shape == (3, 5, 4)
    for image, answer in enumerate(teacher.detect(images, score=0.01, top=15, nms=0.2)):
        count = min(5, len(answer["boxes"]))
        assert len(answer["boxes"]) < 15  # some were suppressed
        assert found.valid[image].tolist() == [True] * count + [False] * (5 - count)
        assert torch.allclose(found.boxes[image, :count], answer["boxes"][:count], atol=1e-3)
        assert torch.allclose(found.scores[image, :count], answer["scores"][:count])
        assert torch.equal(found.labels[image, :count], answer["labels"][:count])


def test_a_score_of_a_hundredth_is_the_least():
    outputs = {
        "pred_logits": torch.tensor([[[0.5], [0.011], [0.009]]]).logit(),
        "pred_boxes": torch.rand(1, 3, 4),
    }
    assert select_pseudo_boxes(outputs, torch.tensor([[64, 64]]), 3, 1.0).valid.tolist() == [
        [True, True, False]
    ]


def test_above_mean_plus_std_equals_a_loop():
    pseudo = some_pseudo(3, 9)
    found = above_mean_plus_std(pseudo.scores, pseudo.valid)
    for image in range(3):
        scores = pseudo.scores[image][pseudo.valid[image]]
        cut = scores.mean() + scores.std() if len(scores) else torch.inf
        expected = [
            bool(ok) and score >= cut
            for ok, score in zip(pseudo.valid[image], pseudo.scores[image])
        ]
        assert found[image].tolist() == expected
    assert found.sum(1).tolist()[2] == 0 < found.sum()


def test_one_score_alone_has_no_standard_deviation_and_is_not_kept():
    """As in the released code, where the standard deviation of one score is not a number."""
    pseudo = some_pseudo(1, 4)
    pseudo.valid[0] = torch.tensor([True, False, False, False])
    assert not above_mean_plus_std(pseudo.scores, pseudo.valid).any()


# A step


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_finite_losses_that_reach_the_student_only(kind, name):
    method, step = make(kind)
    losses = method(some_batch(**BATCHES[name]), step)
    expected = {f"labelled/{part}" for part in PARTS}
    if name != "no object at all":
        expected |= {f"labelled denoising/{part}" for part in PARTS}
    if kind != "supervised":
        expected |= {f"pseudo/{part}" for part in PARTS}
        assert method.stats["pseudo_per_image"] > 0
    if kind in ("mean teacher", "stage two"):
        expected |= {f"pseudo denoising/{part}" for part in PARTS}
    if kind == "stage one":
        expected.add("consistency")
    assert set(losses) == expected
    assert all(loss.shape == () and loss.isfinite() and loss >= 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    taught = ["backbone", "encoder", "decoder", "class_head", "proposal_class"]
    taught += (
        ["box_head", "proposal_box"] if name != "no object at all" or kind != "supervised" else []
    )
    for key, parameter in method.student.named_parameters():
        if key.startswith(tuple(taught)):
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key
    if kind == "stage one":
        assert all(parameter.grad.any() for parameter in method.projector.parameters())


def test_weights_multiply_their_part_of_the_losses():
    batch = some_batch()
    for kind in ("mean teacher", "stage one", "stage two"):
        (method, step), (other, _) = (
            make(kind, unlabelled_weight=1.0),
            make(kind, unlabelled_weight=3.0),
        )
        ours, theirs = method(batch, step), other(batch, step)
        for name in ours:
            factor = 1.0 if name.startswith("labelled") else 3.0
            assert theirs[name].item() == pytest.approx(factor * ours[name].item(), rel=1e-4), name
    for kind in ("mean teacher", "stage one", "stage two"):
        (method, step), (other, _) = make(kind), make(kind, unlabelled_box_weight=0.25)
        ours, theirs = method(batch, step), other(batch, step)
        for name in ours:
            factor = 0.25 if name.startswith("pseudo") and name.endswith(("/l1", "/giou")) else 1.0
            assert theirs[name].item() == pytest.approx(factor * ours[name].item(), rel=1e-4), name
    (method, step), (other, _) = (
        make("stage one", consistency_weight=1.0),
        make("stage one", consistency_weight=5.0),
    )
    assert other(batch, step)["consistency"].item() == pytest.approx(
        5 * method(batch, step)["consistency"].item()
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_pseudo_label_at_all(kind):
    method, step = make(kind, score_threshold=1.1)
    losses = method(some_batch(), step)
    assert method.stats["pseudo_per_image"] == 0
    assert losses["pseudo/l1"] == losses["pseudo/giou"] == 0 < losses["pseudo/class"]
    assert "pseudo denoising/class" not in losses
    total = sum(losses.values())
    total.backward()
    assert total.isfinite() and all(
        p.grad is None or p.grad.isfinite().all() for p in method.parameters()
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_teacher_that_sees_nothing(kind):
    method, step = make(kind)
    with torch.no_grad():
        method.teacher.class_head.bias -= 50.0
    losses = method(some_batch(), step)
    assert method.stats["pseudo_per_image"] == 0 == losses["pseudo/l1"]
    if kind != "mean teacher":
        assert method.stats["mined_per_image"] == 0 and method.stats["cost_threshold"] == 0
    if kind == "stage one":
        assert losses["consistency"] == 0
    sum(losses.values()).backward()


def best_score_in_view(method, batch) -> float:
    """The highest score of a pseudo-box that the strong views still hold."""
    (images, weak), (_, strong) = batch["weak"], batch["strong"]
    with torch.no_grad():
        pseudo = select_pseudo_boxes(
            method.teacher(images),
            torch.tensor([t["size"] for t in weak]),
            method.max_pseudo_boxes,
            method.nms,
        )
    return pseudo.scores[pseudo.to_strong_view(weak, strong).valid].max().item()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_pseudo_label(kind):
    method, step = make(kind)
    batch = some_batch()
    method.score_threshold = best_score_in_view(method, batch)
    losses = method(batch, step)
    assert method.stats["pseudo_per_image"] == pytest.approx(1 / 3)
    assert losses["pseudo/l1"] > 0 or kind == "stage one"  # where no query may overlap it
    sum(losses.values()).backward()


def test_more_candidates_and_more_pseudo_boxes_than_queries():
    for kind in KINDS[1:]:
        torch.manual_seed(0)
        changes = {} if kind == "mean teacher" else {"candidates": 13, "one_to_many_steps": SWITCH}
        cls = MeanTeacher if kind == "mean teacher" else SemiDETR
        method = cls(
            student(queries=3), score_threshold=0.0, max_pseudo_boxes=50, nms=1.0, **changes
        )
        losses = method(
            some_batch(counts=(6, 2)),
            STAGES["one_to_one" if kind == "stage two" else "one_to_many"],
        )
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_scrambling_the_truth_of_unlabelled_images_changes_no_bit(kind):
    results = []
    for change in ("as it is", "scrambled", "taken away"):
        method, step = make(kind)
        batch = some_batch()
        for view in ("weak", "strong"):
            for target in batch[view][1]:
                if change == "scrambled":
                    target["truth"]["boxes"] = torch.rand(5, 4) * 60
                    target["truth"]["labels"] = torch.randint(0, 4, (5,))
                elif change == "taken away":
                    del target["truth"]
        losses = method(batch, step)
        results.append((losses, method.stats))
    for losses, stats in results[1:]:
        assert losses.keys() == results[0][0].keys() and stats == results[0][1]
        assert all(torch.equal(losses[name], results[0][0][name]) for name in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_a_function_of_its_weights_batch_and_number(kind):
    results = []
    for step in (0, 0, 1):
        method, first = make(kind)
        torch.manual_seed(len(results))  # no global generator takes part
        results.append(method(some_batch(), first + step))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    changed = {name for name in results[0] if not torch.equal(results[0][name], results[2][name])}
    assert changed and all(
        "denoising" in name for name in changed
    )  # new noise, everything else as before


@pytest.mark.parametrize("kind", ["mean teacher", "stage two"])
def test_the_denoising_of_every_image_has_random_numbers_of_its_own(kind):
    """Of labelled and unlabelled images alike, and in every step."""
    drawn = []
    for step in (12, 13):
        method, _ = make(kind)
        hook = method.student.denoising.register_forward_pre_hook(
            lambda _, given: drawn.extend(copy.deepcopy(rng).random() for rng in given[3])
        )
        method(some_batch(), step)
        hook.remove()
    assert len(drawn) == 2 * (2 + 3) == len(set(drawn))


# Losses rebuilt by hand


def labelled_only(losses: dict) -> dict:
    return {name: loss.item() for name, loss in losses.items() if name.startswith("labelled")}


@pytest.mark.parametrize("name", ["square", "mixed", "an image without object"])
@pytest.mark.parametrize("kind", ["mean teacher", "stage two"])
def test_the_labelled_part_is_that_of_supervised_training(kind, name):
    (supervised, _), (method, step) = make("supervised"), make(kind)
    batch = some_batch(**BATCHES[name])
    expected = labelled_only(supervised(batch, step))
    assert len(expected) == 6 and labelled_only(method(batch, step)) == pytest.approx(
        expected, rel=1e-4
    )


def targets_by_hand(method, batch, threshold: float) -> list[dict]:
    """The teacher's detections of at least this score, mapped to the strong views one by one."""
    targets = []
    for image, weak, strong in zip(batch["weak"][0], batch["weak"][1], batch["strong"][1]):
        answer = method.teacher.detect(
            image, score=0.01, top=3 * method.max_pseudo_boxes, nms=method.nms
        )[0]
        boxes, scores, labels = (
            answer[key][: method.max_pseudo_boxes] for key in ("boxes", "scores", "labels")
        )
        good = scores >= method.score_threshold
        if isinstance(method, SemiDETR) and len(scores) > 1:
            good |= scores >= scores.mean() + scores.std()
        boxes, keep = map_boxes(
            boxes, strong["matrix"] @ torch.linalg.inv(weak["matrix"]), strong["size"]
        )
        good &= keep & (scores >= threshold)
        targets.append({"boxes": boxes[good], "labels": labels[good], "size": strong["size"]})
    return targets


def losses_by_hand(detector, images, targets, stage: str, candidates: int = 13) -> dict:
    """Every layer by itself; the encoder's proposals know one class."""
    outputs = detector(images)
    agnostic = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    total = dict.fromkeys(PARTS, 0.0)
    for layer in (*outputs["aux_outputs"], outputs, outputs["encoder"]):
        wanted = agnostic if layer is outputs["encoder"] else targets
        loss = layer_loss(layer["pred_logits"], layer["pred_boxes"], wanted, stage, candidates)
        total = {part: total[part] + loss[part].item() for part in PARTS}
    return total


@pytest.mark.parametrize("name", ["square", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_targets_made_by_hand(kind, name):
    method, step = make(kind)
    stage = "one_to_many" if kind == "stage one" else "one_to_one"
    batch = some_batch(**BATCHES[name])
    losses = method(batch, step)
    by_hand = losses_by_hand(method.student, *batch["labelled"], stage)
    for part in PARTS:
        assert losses[f"labelled/{part}"].item() == pytest.approx(by_hand[part], rel=1e-3)
    if kind == "supervised":
        return
    targets = targets_by_hand(method, batch, threshold=0.55)
    count = sum(len(target["boxes"]) for target in targets)
    assert count > 1 and method.stats["pseudo_per_image"] == pytest.approx(count / len(targets))
    by_hand = losses_by_hand(method.student, batch["strong"][0], targets, stage)
    for part in PARTS:
        assert losses[f"pseudo/{part}"].item() == pytest.approx(4.0 * by_hand[part], rel=1e-3)


# Semi-DETR


def test_stages_switch_at_their_step():
    method, _ = make("stage one")
    assert [method.stage(step) for step in (0, SWITCH - 1, SWITCH, 99)] == ["one_to_many"] * 2 + [
        "one_to_one"
    ] * 2
    for step, nms in ((SWITCH - 1, 0.6), (SWITCH, None)):
        method.after_step(step)
        assert method.student.nms == method.teacher.nms == nms


def watched_groups(method) -> dict[str, list]:
    """The consistency queries of each step from now on, as both detectors get them: lists of
    groups.
    """
    groups = {"student": [], "teacher": []}
    for name, noted in groups.items():
        detector = getattr(method, name)

        def decode_groups(memory, outputs, given, noted=noted, real=detector.decode_groups):
            noted.extend(given)
            return real(memory, outputs, given)

        detector.decode_groups = decode_groups
    return groups


def queries_per_image(groups: dict[str, list], images: int = 3) -> list[int]:
    """How many consistency queries each image of the last step has; without any, nothing is
    decoded.
    """
    return groups["student"][-1].valid.sum(1).tolist() if groups["student"] else [0] * images


def assert_queries_lie_at(groups: dict[str, list], targets: list[dict]) -> None:
    """The student's consistency queries are the boxes of these targets, in any order."""
    group = groups["student"][-1]
    for boxes, valid, target in zip(group.boxes, group.valid, targets, strict=True):
        found, expected = (
            sorted(rows.tolist())
            for rows in (boxes[valid], to_model(target["boxes"], target["size"]))
        )
        assert len(found) == len(expected)
        assert np.allclose(found, expected, atol=1e-4) or not found


@pytest.mark.parametrize("past", [[], [-9.0, -8.9, -8.8, 0.5]])
def test_mined_are_the_boxes_that_cost_the_last_layer_no_more_than_the_threshold(past):
    method, step = make("stage one", cost_queue_size=50, score_threshold=0.9)
    batch = some_batch()
    if past:
        method.cost_queue[-len(past) :] = torch.tensor(past)
    groups = watched_groups(method)
    method(batch, step)
    outputs, targets = (
        method.student(batch["strong"][0]),
        targets_by_hand(method, batch, threshold=0.0),
    )
    costs = []
    for image, target in enumerate(targets):
        logits, boxes = (
            outputs["pred_logits"][image].detach(),
            outputs["pred_boxes"][image].detach(),
        )
        match = one_to_one(logits, boxes, target)
        cost, own = (
            matching_cost(logits, boxes, target),
            torch.full((len(target["boxes"]),), torch.nan),
        )
        own[match.targets] = cost[match.queries, match.targets]
        costs.append(own)
    threshold = reliable_threshold(np.concatenate([past, *costs]))
    assert method.stats["cost_threshold"] == pytest.approx(threshold, abs=1e-3)
    expected = [int((own <= threshold).sum()) for own in costs]
    assert queries_per_image(groups) == expected
    if not past:
        mined = [
            {**target, "boxes": target["boxes"][own <= threshold]}
            for target, own in zip(targets, costs)
        ]
        assert_queries_lie_at(groups, mined)
    assert method.stats["pseudo_per_image"] == 0 and sum(expected) == pytest.approx(
        3 * method.stats["mined_per_image"]
    )
    assert (sum(expected) == 0) if past else 0 < sum(expected) < sum(map(len, costs))
    kept = method.cost_queue[method.cost_queue.isfinite()]
    assert torch.allclose(
        kept[len(past) :].sort().values, torch.cat(costs).sort().values, atol=1e-3
    )


def test_the_costs_of_confident_boxes_join_the_mixture_too():
    """Also of those whose scores do not stand out in their image, which are no candidates."""
    finite = {}
    for threshold in (0.0, 0.99):  # every box is confident, then none
        method, step = make("stage one", cost_queue_size=50, score_threshold=threshold)
        batch = some_batch()
        method(batch, step)
        targets = targets_by_hand(method, batch, threshold=0.0)
        finite[threshold] = int(method.cost_queue.isfinite().sum())
        partners = [min(len(target["boxes"]), method.student.num_queries) for target in targets]
        assert finite[threshold] == sum(partners)
    assert finite[0.0] > finite[0.99] > 0


def nothing_costs_little(method):
    """Fill the queue of costs so that no box is mined."""
    method.cost_queue.fill_(torch.nan)
    method.cost_queue[-40:] = torch.linspace(-9.0, -8.0, 40)
    return method


def test_confident_boxes_become_consistency_queries_whatever_they_cost():
    method, step = make("stage one", cost_queue_size=50, score_threshold=0.0)
    groups, batch = watched_groups(nothing_costs_little(method)), some_batch()
    method(batch, step)
    assert method.stats["mined_per_image"] == 0 < method.stats["pseudo_per_image"]
    targets = targets_by_hand(method, batch, threshold=0.0)
    assert queries_per_image(groups) == [len(target["boxes"]) for target in targets]
    assert_queries_lie_at(groups, targets)


@pytest.mark.parametrize("boxes", ["both", "confident", "mined", "none"])
def test_consistency_is_trained_on_the_boxes_that_its_argument_names(boxes):
    method, step = make(
        "stage one", cost_queue_size=50, score_threshold=0.8, consistency_boxes=boxes
    )
    both, _ = make("stage one", cost_queue_size=50, score_threshold=0.8)
    groups, everything, batch = watched_groups(method), watched_groups(both), some_batch()
    losses = method(batch, step)
    assert ("consistency" in losses) == (boxes != "none")
    both(batch, step)
    union, stats = sum(queries_per_image(everything)) / 3, both.stats
    assert 0 < stats["mined_per_image"] and 0 < stats["pseudo_per_image"]
    assert stats["mined_per_image"] + stats["pseudo_per_image"] == pytest.approx(
        union
    )  # no box is counted twice
    queries = sum(queries_per_image(groups)) / 3
    if boxes == "mined":  # some of these are confident as well
        assert stats["mined_per_image"] <= queries < union
    else:
        expected = {"both": union, "confident": stats["pseudo_per_image"], "none": 0}
        assert queries == pytest.approx(expected[boxes])


def test_a_box_that_is_mined_and_confident_is_counted_once():
    method, step = make("stage one", score_threshold=0.0, mining="top_k", mining_top_k=2)
    method(some_batch(), step)
    assert method.stats["mined_per_image"] == 0 < method.stats["pseudo_per_image"]


@pytest.mark.parametrize("mining", ["top_k", "mean_std", "none"])
def test_other_rules_of_mining_equal_a_loop(mining):
    method, step = make(
        "stage one", score_threshold=0.99, mining=mining, mining_top_k=2, max_pseudo_boxes=6
    )
    groups, batch = watched_groups(method), some_batch()
    method(batch, step)
    queries = queries_per_image(groups)
    pseudo = select_pseudo_boxes(
        method.teacher(batch["weak"][0]),
        torch.tensor([t["size"] for t in batch["weak"][1]]),
        6,
        0.6,
    )
    _, kept = map_all(pseudo.boxes, batch)
    for image, scores in enumerate(pseudo.scores):
        scores, inside = scores[pseudo.valid[image]], kept[image][pseudo.valid[image]]
        chosen = {
            "top_k": torch.arange(len(scores)) < 2,
            "mean_std": scores >= scores.mean() + scores.std(),
            "none": torch.zeros(len(scores), dtype=torch.bool),
        }[mining]
        assert queries[image] == (chosen & inside).sum()
    assert (method.stats["mined_per_image"] > 0) == (mining != "none")


@pytest.mark.parametrize("mining", ["gmm", "top_k", "mean_std", "none"])
def test_the_watched_boxes_are_those_of_the_step(mining):
    """Images that are their own views: what pseudo_boxes.jsonl says is what the step decided."""
    method, step = make(
        "stage one", mining=mining, cost_queue_size=50, mining_top_k=2, score_threshold=0.8
    )
    images, targets = some_batch()["strong"]
    targets = [
        {**target, "matrix": torch.eye(3), "image_id": place}
        for place, target in enumerate(targets)
    ]
    batch, scenes = (
        {**some_batch(), "weak": (images, targets), "strong": (images, targets)},
        list(zip(images, targets)),
    )
    before = any(any(line["mined"]) for line in pseudo_box_log(method, scenes, 0))
    assert before == (mining in ("top_k", "mean_std"))  # there is no threshold yet
    method(batch, step)
    method.stats["cost_threshold"] += (
        1e-5  # it is the cost of one of the boxes, found in a batch here and alone below
    )
    lines = pseudo_box_log(method, scenes, step)
    kept, mined = (
        np.concatenate([line[name] for line in lines]).astype(bool) for name in ("kept", "mined")
    )
    assert kept.sum() / len(images) == pytest.approx(method.stats["pseudo_per_image"])
    assert (mined & ~kept).sum() / len(images) == pytest.approx(method.stats["mined_per_image"])
    assert any(any(line["mined"]) for line in lines) == (mining != "none")
    for line in lines:  # what is neither kept nor a candidate has no cost
        scores = torch.tensor(line["scores"])
        candidates = scores >= scores.mean() + scores.std()
        if mining == "top_k":
            candidates = torch.arange(len(scores)) < 2
        matched = (scores >= method.score_threshold) | (candidates & (mining != "none"))
        with_cost = torch.tensor([cost is not None for cost in line["cost"]])
        assert (
            with_cost.sum() == min(matched.sum(), method.student.num_queries)
            and not (with_cost & ~matched).any()
        )


@pytest.mark.parametrize("no_object", [True, False])
def test_watched_boxes_cost_what_their_detector_matches_by(no_object):
    torch.manual_seed(0)
    sizes = {
        "num_queries": 6,
        "dim": 16,
        "heads": 2,
        "dim_feedforward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
    }
    method = MeanTeacher(
        shaken(DETR(4, **sizes, backbone="tiny", no_object=no_object)),
        score_threshold=0.0,
        max_pseudo_boxes=4,
        nms=1.0,
    )
    image, size = torch.rand(3, 64, 96), (64, 96)
    (line,) = pseudo_box_log(method, [(image, {"image_id": 7})], 3)
    outputs, boxes = method.student([image]), torch.tensor(line["boxes"])
    target = {"boxes": boxes, "labels": torch.tensor(line["labels"]), "size": size}
    kind = {"class_cost": "softmax", "class_weight": 1.0} if no_object else {}
    costs = matching_cost(
        outputs["pred_logits"][0], outputs["pred_boxes"][0], target, **kind
    ).detach()
    queries, columns = linear_sum_assignment(costs)
    assert len(boxes) > 1 and line["mined"] == [False] * len(boxes)
    assert np.array(line["cost"])[columns] == pytest.approx(
        costs[queries, columns].numpy(), abs=0.02
    )  # rounded boxes


def map_all(boxes, batch):
    """Boxes (B, K, 4) of the weak views in the strong ones."""
    pairs = list(zip(batch["weak"][1], batch["strong"][1]))
    moves = [strong["matrix"] @ torch.linalg.inv(weak["matrix"]) for weak, strong in pairs]
    found = [
        map_boxes(own, move, strong["size"]) for own, move, (_, strong) in zip(boxes, moves, pairs)
    ]
    return [boxes for boxes, _ in found], [keep for _, keep in found]


@pytest.mark.parametrize("kind", ["stage one", "stage two"])
def test_mined_boxes_are_targets_only_with_mined_targets(kind):
    names = {"score_threshold": 0.99, "mining": "top_k", "mining_top_k": 2}  # nothing is confident
    batch, losses = some_batch(), {}
    for mined_targets in (False, True):
        method, step = make(kind, mined_targets=mined_targets, **names)
        losses[mined_targets] = method(batch, step)
        assert method.stats["pseudo_per_image"] == 0 < method.stats["mined_per_image"]
    assert losses[False]["pseudo/l1"] == 0 < losses[True]["pseudo/l1"]


@pytest.mark.parametrize(
    ("preset", "in_stage_two"), [("coco-10pct-paper", True), ("coco-10pct", False)]
)
def test_the_paper_has_consistency_in_both_stages(preset, in_stage_two):
    recipe = change_settings(PRESETS[preset], max_pseudo_boxes=12)
    method = make_method("semi-detr", student(), recipe, steps=20, offset=0, seed=0).train()
    batch = some_batch()
    assert "consistency" in method(batch, 9)
    losses = method(batch, 10)
    assert method.stage(9) == "one_to_many" and method.stage(10) == "one_to_one"
    assert ("consistency" in losses) == in_stage_two
    if in_stage_two:
        losses["consistency"].backward()
        assert all(parameter.grad.any() for parameter in method.projector.parameters())


def test_unknown_sets_and_rules_are_named():
    for key in ("mining", "consistency_boxes"):
        with pytest.raises(UserError, match=f"no {key} called 'best': choose from"):
            SemiDETR(student(), one_to_many_steps=SWITCH, **{key: "best"})


def test_equal_views_and_networks_agree_completely():
    torch.manual_seed(0)
    method, batch = SemiDETR(student(), one_to_many_steps=SWITCH, score_threshold=0.5), some_batch()
    batch["strong"] = batch["weak"]
    assert method(batch, 0)["consistency"].item() < 1e-6
    shaken(method.teacher, 0.05)
    assert method(batch, 0)["consistency"].item() > 1e-3


@pytest.mark.parametrize("name", ["square", "wide", "mixed"])
def test_both_decoders_get_one_content_at_the_box_in_their_own_view(name):
    method, step = make("stage one", score_threshold=0.0)
    groups, batch = watched_groups(method), some_batch(**BATCHES[name])
    method(batch, step)
    student_group, teacher_group = groups["student"][-1], groups["teacher"][-1]
    assert torch.equal(student_group.content, teacher_group.content)
    assert torch.equal(student_group.valid, teacher_group.valid)
    sizes = torch.tensor([target["size"] for target in batch["weak"][1]])
    pseudo = select_pseudo_boxes(method.teacher(batch["weak"][0]), sizes, 12, method.nms)
    strong_boxes, kept = map_all(pseudo.boxes, batch)
    for image in range(len(sizes)):
        keep = pseudo.valid[image] & kept[image]  # every box is confident
        assert keep.any()
        weak = to_model(pseudo.boxes[image][keep], batch["weak"][1][image]["size"])
        strong = to_model(strong_boxes[image][keep], batch["strong"][1][image]["size"])
        assert torch.allclose(
            teacher_group.boxes[image][teacher_group.valid[image]], weak, atol=1e-6
        )
        assert torch.allclose(
            student_group.boxes[image][student_group.valid[image]], strong, atol=1e-6
        )


def test_consistency_is_a_mean_over_queries_whatever_the_padding():
    method, step = make("stage one", cost_queue_size=50, score_threshold=0.7)
    groups, batch = watched_groups(nothing_costs_little(method)), some_batch()
    whole = method(batch, step)["consistency"].item()
    counts = queries_per_image(groups)
    assert len(set(counts)) > 1 and min(counts) > 0  # some slots are padding
    expected = 0.0
    for image, count in enumerate(counts):
        alone = {
            view: ([batch[view][0][image]], [batch[view][1][image]]) for view in ("weak", "strong")
        }
        loss = nothing_costs_little(method)({**batch, **alone}, step)["consistency"].item()
        assert queries_per_image(groups) == [count]
        expected += count * loss / sum(counts)
    assert whole == pytest.approx(expected, rel=1e-3)


# What a step costs


def tensors_in(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return (
        [tensor for part in tree for tensor in tensors_in(part)]
        if isinstance(tree, list | tuple)
        else []
    )


READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "__contains__",
}
READS |= {
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "equal",
    "allclose",
    "bincount",
}


class Accelerator(TorchFunctionMode):
    """Plays a device on the CPU: notes every place where a step would wait for it.

    The method's parameters and buffers lie on the device, and whatever is moved there by
    `.to(device)`, made there by `device=`, or computed from something that lies there. A read is a
    value, a shape that depends on values, or a copy to the host. A send is a copy to the device
    that waits for everything before it: numbers of Python, an index in a list, or a tensor of the
    host without `non_blocking`.
    """

    def __init__(self, method: torch.nn.Module):
        super().__init__()
        self.reads: list[str] = []
        self.sends: list[str] = []
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.on_device = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = tensors_in([args, kwargs])
        there = any(map(on, given))
        masked = name == "__getitem__" and any(t.dtype == torch.bool for t in tensors_in(args[1:]))
        found = name == "where" and len(args) + len(kwargs) == 1
        moved = any(isinstance(entry, torch.device) for entry in (*args, *kwargs.values()))
        if there and (name in READS or masked or found):
            self.note(self.reads, name)
        numbers = (
            name == "new_tensor"
            and there
            or name in ("tensor", "as_tensor")
            and moved
            and not there
        )
        waiting = name == "to" and not on(args[0]) and (moved or any(map(on, given[1:])))
        waiting = waiting and not kwargs.get("non_blocking")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        index = index if isinstance(index, tuple) else (index,)
        listed = there and any(
            isinstance(i, list) or isinstance(i, torch.Tensor) and i.dim() and not on(i)
            for i in index
        )
        if numbers or waiting or listed:
            self.note(self.sends, name)
        result = func(*args, **kwargs)
        if name == "cpu":
            result = result.view_as(result)  # a tensor of its own, on the host
            result.on_device = False
        elif there or moved:
            if (
                moved
                and isinstance(result, torch.Tensor)
                and any(result is tensor for tensor in given)
            ):
                result = result.view_as(result)  # what stays on the host is not the same thing
            for tensor in tensors_in(result):
                tensor.on_device = True
        return result

    @staticmethod
    def note(where: list[str], name: str) -> None:
        """The line of ours that called a function of torch."""
        line = next(
            f
            for f in reversed(traceback.extract_stack()[:-2])
            if "torch" not in f.filename.split("/")
        )
        where.append(f"{line.filename.rsplit('/', 1)[-1]}:{line.lineno} {name}: {line.line}")


def on(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on the played device."""
    return getattr(tensor, "on_device", False)


def test_the_played_accelerator_notes_reads_and_sends():
    layer, host = torch.nn.Linear(2, 2), torch.ones(2)
    device = layer.weight.device
    with Accelerator(layer) as watch:
        host.sum().item(), host.tolist(), host[host > 0], bool(host[0])
        moved = to_device(host, device)
        inside = layer(moved).detach()
        (
            to_device(host, device),
            host.to(torch.float64),
            torch.tensor([1, 0]),
            host[[0]],
            inside[0],
            inside[to_device(torch.tensor([0]), device)],
        )
    assert watch.reads == watch.sends == []
    reads = [
        lambda: inside.sum().item(),
        lambda: inside.cpu().numpy().sum(),
        lambda: int(moved.max()),
        lambda: inside[inside > 0],
        lambda: torch.zeros(3, device=device).tolist(),
        lambda: bool(inside.any()),
        lambda: torch.where(inside > 0),
        lambda: inside.nonzero(),
        lambda: np.asarray(layer.bias.detach()),
        lambda: inside.topk(1).values.tolist(),
    ]
    for number, read in enumerate(reads):
        with Accelerator(layer) as watch:
            read()
        assert len(watch.reads) == 1, number
    with Accelerator(layer) as watch:
        (
            inside[torch.tensor([1, 0])],
            inside.topk(1),
            torch.where(inside > 0, inside, 0.0),
            inside.max(),
            host.tolist(),
        )
    assert watch.reads == []
    sends = [
        lambda: torch.tensor([1, 0], device=device),
        lambda: torch.as_tensor(1.0, device=device),
        lambda: inside.new_tensor([1]),
        lambda: host.to(device),
        lambda: host.to(inside),
        lambda: inside[[1, 0]],
        lambda: inside[..., [1, 0]],
        lambda: inside[torch.tensor([1, 0])],
    ]
    for number, send in enumerate(sends):
        with Accelerator(layer) as watch:
            send()
        assert len(watch.sends) == 1, number


@pytest.mark.parametrize("name", ["square", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_synchronises_where_it_decides_alone(kind, name, monkeypatch):
    """How many boxes the teacher gave, which are denoised beside the matching queries, and then the
    matching.
    """
    method, step = make(kind)
    batch, calls = some_batch(**BATCHES[name]), []

    def counted(values):
        calls.append(tuple(values.shape))
        return to_host(values)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("semidetr_lite") and hasattr(
            module, "to_host"
        ):
            monkeypatch.setattr(module, "to_host", counted)
    with Accelerator(method) as watch:
        method(batch, step)
    waits = 1 if kind == "supervised" else 2
    assert len(calls) == waits
    elsewhere = [read for read in watch.reads if not read.startswith("device.py")]
    assert elsewhere == [] and len(watch.reads) == waits and watch.sends == []


def test_nms_of_a_large_batch_does_not_synchronise():
    """With many boxes torchvision's NMS goes class by class, and synchronises at each."""
    outputs = torch.nn.ParameterDict(
        {"pred_logits": torch.randn(32, 90, 4), "pred_boxes": torch.rand(32, 90, 4)}
    )
    with Accelerator(outputs) as watch, torch.no_grad():
        select_pseudo_boxes(outputs, torch.full((32, 2), 64), 100, 0.6)
    assert watch.reads == []


def test_copy_to_host_gives_every_tensor_back_in_its_shape():
    tensors = [
        torch.randn(2, 3, requires_grad=True),
        torch.tensor([[True], [False]]),
        torch.zeros(0, 4),
    ]
    tensors.append(torch.tensor(5.0))
    pieces = copy_to_host(*tensors)
    for piece, tensor in zip(pieces, tensors, strict=True):
        assert isinstance(piece, np.ndarray) and piece.shape == tuple(tensor.shape)
        assert piece.tolist() == tensor.tolist()
    assert pieces[1].dtype == bool


def test_padded_columns_do_not_matter():
    method, _ = make("mean teacher")
    batch = some_batch(counts=(3, 1))
    images, truths = batch["labelled"]
    layers, padded = stack_layers(method.student(images)), pad_targets(truths)
    wide = pad_to(padded, 7)
    found = []
    for targets in (padded, wide):
        costs, valid = layer_costs(layers, targets).numpy(), targets.valid.numpy()
        assignment = match_layers(layers, targets, "one_to_one", costs=costs, valid=valid)
        found.append(detection_loss(layers, targets, assignment, "one_to_one"))
    for part in PARTS:
        assert found[0][part].item() == pytest.approx(found[1][part].item(), rel=1e-5)
