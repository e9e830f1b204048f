"""Soft Teacher and Dense Teacher: each formula by hand, and what holds for every method."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxLinearCoder

from semidetr_lite import load_detector
from semidetr_lite.boxes import overlaps
from semidetr_lite.data import digits
from semidetr_lite.data.splits import Splits, Subset, WithoutLabels
from semidetr_lite.data.views import ViewSettings, map_boxes, strong_view, warp, weak_view
from semidetr_lite.detectors.pyramid import FCOSOutputs
from semidetr_lite.methods.dense_teacher import DenseTeacher, dense_losses, select_regions
from semidetr_lite.methods.soft_teacher import SoftTeacher, box_regression_variance, soft_class_loss
from semidetr_lite.training.loop import Run
from semidetr_lite.training.measure import plain_pseudo_boxes, pseudo_box_log, pseudo_quality
from semidetr_lite.training.presets import PRESETS, make_method
from semidetr_lite.training.settings import DetectorKwargs, new_config
from tests.test_pyramid import CLASSES, SMALL, small, some_target

KINDS = {"soft-teacher": (SoftTeacher, "faster-rcnn"), "dense-teacher": (DenseTeacher, "fcos")}
OPEN = {
    "soft-teacher": {
        "score_threshold": 0.28,
        "box_score_threshold": 0.25,
        "variance_threshold": 1.0,
    },
    "dense-teacher": {"ratio": 0.1},
}
SHUT = {
    "soft-teacher": {"score_threshold": 1.1, "box_score_threshold": 1.1},
    "dense-teacher": {"score_threshold": 1.1},
}


def make(kind: str, **changes):
    method, detector = KINDS[kind]
    method = method(small(detector), seed=1, **{**OPEN[kind], **changes})
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return method.train()


def affine(first, second) -> torch.Tensor:
    return torch.tensor([first, second, [0.0, 0, 1]])


def some_batch(
    sizes=((64, 64),) * 2, weak_sizes=((64, 64),) * 2, strong_sizes=None, boxes=True
) -> dict:
    """Labelled images, and unlabelled ones whose strong view is mirrored, moved and resized."""
    torch.manual_seed(2)
    truth = (
        some_target([[8.0, 10, 28, 34], [30, 4, 46, 30]], [2, 0]) if boxes else some_target([], [])
    )
    views = {"weak": ([], []), "strong": ([], [])}
    for size, strong_size in zip(weak_sizes, strong_sizes or weak_sizes):
        scale = strong_size[1] / size[1], strong_size[0] / size[0]
        matrices = {"weak": affine([1.1, 0, -3], [0, 1.1, 2])}
        matrices["strong"] = affine([-scale[0], 0, strong_size[1]], [0.05, scale[1], 2])
        for name, shape in (("weak", size), ("strong", strong_size)):
            views[name][0].append(torch.rand(3, *shape))
            views[name][1].append(
                {"size": shape, "image_id": len(views[name][1]), "matrix": matrices[name]}
            )
    return {"labelled": ([torch.rand(3, *size) for size in sizes], [truth] * len(sizes)), **views}


BATCHES = {
    "square": {},
    "wide": {"sizes": ((48, 80),) * 2, "weak_sizes": ((48, 80),) * 2},
    "mixed": {
        "sizes": ((64, 48), (48, 80)),
        "weak_sizes": ((48, 80), (64, 64)),
        "strong_sizes": ((80, 48), (64, 64)),
    },
    "no object at all": {"boxes": False},
}


# What holds for both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_gradients_reach_the_student_and_not_the_teacher(kind, batch):
    method, batch = make(kind), some_batch(**batch)
    losses = method(batch, 3)
    assert all(loss.isfinite() and not loss.dim() for loss in losses.values())
    assert {name.split("/")[0] for name in losses} == {"labelled", "pseudo"}
    assert method.stats["pseudo_per_image"] > 0
    sum(losses.values()).backward()
    assert [
        key
        for key, p in method.student.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ] == []
    assert all(p.grad is None for p in method.teacher.parameters()) and not method.teacher.training


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_pseudo_box_losses_are_finite(kind):
    method = make(kind, **SHUT[kind])
    losses = method(some_batch(), 3)
    assert (
        all(loss.isfinite() for loss in losses.values()) and method.stats["pseudo_per_image"] == 0
    )
    if kind == "soft-teacher":
        assert (
            float(losses["pseudo/boxes"].detach()) == 0
            and float(losses["pseudo/proposals"].detach()) == 0
        )
    sum(losses.values()).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_depends_on_seed_and_step_alone(kind):
    method, batch = make(kind), some_batch()
    state = torch.get_rng_state()
    first = method(batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = method(batch, 3)
    assert all(torch.equal(first[key], again[key]) for key in first)
    if kind == "soft-teacher":  # Dense Teacher draws nothing
        other = method(batch, 4)
        assert not torch.equal(first["pseudo/class"], other["pseudo/class"])
        assert not torch.equal(first["labelled/class"], other["labelled/class"])
        method.seed = 2
        assert not torch.equal(first["labelled/class"], method(batch, 3)["labelled/class"])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_multiply_their_losses(kind):
    batch = some_batch()
    plain, weighted = (
        make(kind, unlabelled_weight=weight, unlabelled_box_weight=factor)(batch, 3)
        for weight, factor in ((1.0, 1.0), (3.0, 0.5))
    )
    of_class = {"pseudo/class", "pseudo/objectness"}
    for key in plain:
        factor = 1.0 if key.startswith("labelled") else 3.0 if key in of_class else 1.5
        torch.testing.assert_close(weighted[key], factor * plain[key])


@pytest.mark.parametrize("kind", KINDS)
def test_labelled_losses_are_the_detectors_own(kind):
    method, batch = make(kind), some_batch()
    found = method(batch, 3)
    own = method.student.losses(*batch["labelled"], method.step_seed(3, 0))
    assert all(torch.equal(found[f"labelled/{key}"], loss) for key, loss in own.items())


def test_the_defaults_are_the_papers_and_presets_change_them():
    soft, dense = SoftTeacher(small("faster-rcnn")), DenseTeacher(small("fcos"))
    assert (
        soft.score_threshold,
        soft.box_score_threshold,
        soft.variance_threshold,
        soft.num_jitters,
        soft.jitter_scale,
    ) == (
        0.9,
        0.5,
        0.02,
        10,
        0.06,
    )
    assert (soft.class_weight, soft.box_weight) == (4, 4)
    assert (dense.ratio, dense.class_weight, dense.box_weight) == (0.01, 4, 1)
    for preset in ("coco-10pct", "digits"):
        recipe = PRESETS[preset]
        for kind, (_, detector) in KINDS.items():
            method = make_method(kind, small(detector), recipe, 10, 0, 0)
            changed = getattr(recipe, kind.replace("-", "_"))
            assert method.max_pseudo_boxes == min(recipe.pseudo_labels.max_pseudo_boxes, 100)
            assert preset == "digits" or changed == type(changed)()
            for key in vars(changed).keys() - {"unlabelled_weight", "unlabelled_box_weight"}:
                assert getattr(method, key) == getattr(changed, key)


# Soft Teacher


def test_soft_class_loss_by_hand():
    """Foreground boxes count fully, background boxes by the teacher's background score; over the
    sum of all that.
    """
    logits = torch.tensor([[0.0, 1, 2], [1, 0, 0], [2, 1, 0], [0, 0, 0], [3, 0, 1]])
    labels, background = torch.tensor([2, 1, 0, 0, 0]), torch.tensor([0.9, 0.9, 0.9, 0.3, 0.0])
    each = [
        -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        for row, label in zip(logits.tolist(), labels)
    ]
    expected = (each[0] + each[1] + 0.9 * each[2] + 0.3 * each[3]) / (2 + 1.2)
    assert float(soft_class_loss(logits, labels, background)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "background"), [([0, 0], [0.5, 0.5]), ([1, 2], [0.1, 0.2]), ([0, 0], [0.0, 0.0])]
)
def test_soft_class_loss_of_only_one_kind(labels, background):
    loss = soft_class_loss(torch.zeros(2, 3), torch.tensor(labels), torch.tensor(background))
    assert float(loss) == pytest.approx(
        math.log(3) if any(labels) or any(background) else 0.0, rel=1e-5
    )


def test_box_spread_by_hand():
    boxes = torch.tensor([[0.0, 0, 30, 10], [5, 5, 15, 15]])
    refined = boxes.repeat(3, 1, 1)
    refined[:, 0, 2] += torch.tensor(
        [-3.0, 0, 3]
    )  # standard deviation 3 of one of four coordinates
    expected = np.std([-3, 0, 3], ddof=1) / 4 / (0.5 * (30 + 10))
    assert box_regression_variance(refined, boxes).tolist() == pytest.approx([expected, 0.0])
    assert box_regression_variance(torch.zeros(3, 0, 4), torch.zeros(0, 4)).shape == (0,)


def test_jittered_boxes_are_refined_by_the_teacher_one_by_one():
    """Steady boxes and their spreads, rebuilt box by box with torchvision's own head."""
    method, batch = make("soft-teacher", variance_threshold=0.0), some_batch()
    teacher, step = method.teacher, 5
    with torch.no_grad():
        judge = teacher.extract(batch["weak"][0])
        found = teacher.predict(judge, 0.25, method.max_pseudo_boxes, teacher.nms)
        rngs = method.image_generators(step, 1, batch["weak"][1])
        spreads = []
        for image, one in enumerate(found):
            moves = rngs[image].uniform(-0.06, 0.06, (10, *one["boxes"].shape))
            for number, (box, label) in enumerate(zip(one["boxes"], one["labels"])):
                width, height = (box[2:] - box[:2]).tolist()
                moved = (
                    box + torch.tensor(moves[:, number] * [width, height, width, height]).float()
                )
                lists = [moved if image == other else moved[:0] for other in range(2)]
                heads = teacher.net.roi_heads
                codes = heads.box_predictor(
                    heads.box_head(heads.box_roi_pool(judge.maps, lists, judge.image_sizes))
                )[1]
                refined = heads.box_coder.decode(codes, lists)[:, int(label) + 1]
                spreads.append(float(refined.std(0).mean()) / (0.5 * (width + height)))
        assert len(spreads) > 3
        for cut in np.quantile(spreads, [0.0, 0.4, 1.0]) + 1e-4:
            method.variance_threshold = float(cut)
            _, steady = method.predict_pseudo_boxes(judge, step, batch["weak"][1])
            assert sum(len(one["labels"]) for one in steady) == sum(
                spread < cut for spread in spreads
            )


def test_pseudo_boxes_over_the_cut_are_carried_to_the_strong_view():
    method, batch = make("soft-teacher"), some_batch()
    seen = {}
    original = method.pseudo_losses
    method.pseudo_losses = lambda *given: (
        seen.update(zip(("seen", "confident", "steady"), given)) or original(*given)
    )
    method(batch, 3)
    for row, (weak, strong) in enumerate(zip(batch["weak"][1], batch["strong"][1])):
        found = method.teacher.detect(batch["weak"][0][row], score=method.score_threshold)[0]
        boxes, keep = map_boxes(
            found["boxes"], strong["matrix"] @ torch.linalg.inv(weak["matrix"]), strong["size"]
        )
        torch.testing.assert_close(
            seen["confident"][row]["boxes"], boxes[keep], rtol=1e-4, atol=1e-3
        )
        assert torch.equal(seen["confident"][row]["labels"], found["labels"][keep])
    count = sum(len(one["labels"]) for one in seen["confident"])
    assert method.stats["pseudo_per_image"] == count / 2 and count > 0
    assert (
        method.stats["box_reliable_per_image"]
        == sum(len(one["labels"]) for one in seen["steady"]) / 2
    )


def test_the_teacher_judges_the_students_boxes_in_its_own_view(monkeypatch):
    """With equal weights and equal views, r is 1 minus the sum of the student's own class scores of
    the same boxes.
    """
    method, batch = make("soft-teacher"), some_batch()
    method.teacher = copy.deepcopy(method.student).eval()
    images, targets = batch["weak"]
    batch["strong"] = (images, targets)
    given = []
    module = "semidetr_lite.methods.soft_teacher.soft_class_loss"
    monkeypatch.setattr(module, lambda *args: given.append(args) or soft_class_loss(*args))
    method(batch, 3)
    logits, labels, background = given[0]
    torch.testing.assert_close(background, logits.softmax(-1)[:, 0].detach(), rtol=1e-3, atol=1e-4)
    assert (labels == 0).any() and (labels > 0).any() and not background.requires_grad


# Dense Teacher


def test_select_regions_is_a_loop_over_all_cells():
    torch.manual_seed(0)
    scores, inside = torch.rand(2, 50, 3), torch.rand(2, 50) < 0.8
    for ratio in (0.001, 0.05, 0.3):
        cells = [
            (float(scores[b, n].max()), b, n) for b in range(2) for n in range(50) if inside[b, n]
        ]
        best = sorted(cells, reverse=True)[: max(1, int(ratio * len(cells)))]
        expected = torch.zeros(2, 50, dtype=torch.bool)
        for _, b, n in best:
            expected[b, n] = True
        assert torch.equal(select_regions(scores, inside, ratio), expected)


def some_cells(seed: int, sizes=((20, 30), (16, 30))) -> FCOSOutputs:
    torch.manual_seed(seed)
    centres = torch.tensor([[x, y] for y in range(0, 24, 8) for x in range(0, 32, 8)]).float()
    outputs = {"cls_logits": torch.randn(2, 12, 3), "bbox_regression": torch.rand(2, 12, 4) * 3}
    outputs |= {"bbox_ctrness": torch.randn(2, 12, 1)}
    return FCOSOutputs(outputs, torch.cat([centres - 4, centres + 4], 1), [12], list(sizes))


def test_dense_losses_by_hand():
    """Loops over the cells: focal loss over all, the others over the selected; nothing is chosen in
    the padding.
    """
    student, teacher = some_cells(1), some_cells(2)
    scores = teacher.outputs["cls_logits"].sigmoid()
    inside = torch.tensor(
        [[(n // 4) * 8 < height for n in range(12)] for height, _ in teacher.image_sizes]
    )
    chosen = select_regions(scores, inside, 0.2)
    assert chosen.sum() == 4 and inside.sum() == 20
    focal = rich = giou = centerness = 0.0
    coder = BoxLinearCoder()
    boxes = [
        coder.decode(cells.outputs["bbox_regression"], cells.anchors)
        for cells in (student, teacher)
    ]
    for b in range(2):
        for n in range(12):
            for c in range(3):
                s = float(student.outputs["cls_logits"][b, n, c].sigmoid())
                y = float(scores[b, n, c]) if chosen[b, n] else 0.0
                focal -= (y - s) ** 2 * (y * math.log(s) + (1 - y) * math.log(1 - s))
            if chosen[b, n]:
                rich += float(scores[b, n].max())
                giou += 1 - float(overlaps(boxes[0][b, n], boxes[1][b, n])[1])
                s, y = (
                    float(cells.outputs["bbox_ctrness"][b, n].sigmoid())
                    for cells in (student, teacher)
                )
                centerness -= y * math.log(s) + (1 - y) * math.log(1 - s)
    found = {key: float(loss) for key, loss in dense_losses(student, teacher, 0.2).items()}
    assert found == pytest.approx(
        {"class": focal / rich, "giou": giou / 4, "centerness": centerness / 4}, rel=1e-4
    )


def test_a_student_that_says_what_the_teacher_says_pays_least():
    """Where all cells are selected, equal maps cost no class loss and no box loss."""
    same, other, teacher = (some_cells(seed, ((24, 32),) * 2) for seed in (2, 3, 2))
    same, other = (dense_losses(cells, teacher, 1.0) for cells in (same, other))
    assert float(same["class"]) == pytest.approx(0, abs=1e-9) and float(
        same["giou"]
    ) == pytest.approx(0, abs=1e-5)
    assert all(same[key] < other[key] for key in same)


def test_the_teacher_reads_weak_pixels_in_the_strong_geometry():
    """The moved weak view is the strong view without its colours and patches."""
    image = torch.rand(3, 12, 16)
    image = torch.nn.functional.interpolate(image[None], (96, 128), mode="bicubic")[0].clamp(0, 1)
    settings = ViewSettings(
        zoom=(0.9, 1.1), shift=0.05, weak_zoom=(1.0, 1.0), strong_rotation=5.0, patches=0
    )
    target = {"size": (96, 128), "image_id": 0}
    for seed in range(4):
        _, strong = strong_view(image, target, np.random.default_rng(seed), settings)
        weak_image, weak = weak_view(image, target, np.random.default_rng(seed + 50), settings)
        carried = warp(
            weak_image, strong["matrix"] @ torch.linalg.inv(weak["matrix"]), strong["size"]
        )
        torch.testing.assert_close(
            carried, warp(image, strong["matrix"], (96, 128)), atol=0.02, rtol=0
        )


def test_dense_targets_come_from_the_carried_view():
    """A student equal to its teacher, shown the carried weak view as its strong one, has nothing to
    learn.
    """
    method, batch = make("dense-teacher", ratio=1.0), some_batch()
    method.teacher = copy.deepcopy(method.student).eval()
    (weak_images, weak), (_, strong) = batch["weak"], batch["strong"]
    matrices = [s["matrix"] @ torch.linalg.inv(w["matrix"]) for w, s in zip(weak, strong)]
    carried = [warp(image, m, s["size"]) for image, m, s in zip(weak_images, matrices, strong)]
    equal = method({**batch, "strong": (carried, strong)}, 0)
    other = method(batch, 0)
    assert equal["pseudo/class"] < 1e-6 < other["pseudo/class"]
    assert equal["pseudo/giou"] < 0.2 * other["pseudo/giou"]


# Measuring, saving, resuming


@pytest.fixture(scope="module")
def splits() -> Splits:
    train = digits.DigitScenes("train", 12)
    few = Subset(digits.DigitScenes("test", 6), range(3))
    return Splits(
        Subset(train, range(4)),
        WithoutLabels(train, range(4, 12)),
        few,
        few,
        digits.CATEGORIES,
        flip=False,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_measures_read_the_teachers_detections(kind, splits):
    method = make(kind, score_threshold=0.35)
    image, _ = splits.unlabelled[0]
    pseudo, found = (
        plain_pseudo_boxes(method, [image]),
        method.teacher.detect(image, top=method.max_pseudo_boxes)[0],
    )
    assert torch.equal(pseudo.boxes[0][pseudo.valid[0]], found["boxes"]) and len(found["boxes"])
    assert set(pseudo_quality(method, splits.unlabelled, 2)) == {
        "pseudo_precision",
        "pseudo_recall",
    }
    lines = pseudo_box_log(method, splits.unlabelled, 7, 2)
    assert [line["step"] for line in lines] == [7, 7] and json.dumps(lines)
    assert set(lines[0]["cost"]) == {None} and not any(lines[0]["mined"])
    assert lines[0]["kept"] == [score >= 0.35 for score in found["scores"].tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_run(kind, splits, tmp_path):
    detector = KINDS[kind][1]
    settings = {
        "detector_kwargs": DetectorKwargs(**SMALL[detector]), "batch_size": 2, "unlabelled_batch_size": 2,
        "log_every": 1, "evaluate_every": 2, "evaluate_images": 2, "watch_every": 2,
    }  # fmt: skip
    group = kind.replace("-", "_")
    own = dataclasses.replace(getattr(PRESETS["digits"], group), **OPEN[kind], max_pseudo_boxes=8)
    settings[group] = own
    config = new_config(method=kind, detector=detector, steps=2, **settings)

    def run(out, **how):
        return Run(config, tmp_path / out, splits=splits, quiet=True, workers=0, **how)

    run("whole").run()
    first = run("parts")
    first.out.mkdir()
    first.train_step(first._loader().dataset[0])
    first.step = 1
    first.save()
    run("parts", resume=True).run()
    for part in ("student", "teacher"):
        whole, parts = (
            load_detector(tmp_path / out, part).state_dict() for out in ("whole", "parts")
        )
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    assert {"pseudo_per_image", "pseudo_precision", "AP_teacher", "test"} <= set(line)
    assert CLASSES != load_detector(tmp_path / "whole").num_classes == 10
