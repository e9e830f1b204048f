"""What losses are divided by: counts, normalizer groups, bounds, and what labelled images expect."""

import math

import numpy as np
import pytest
import torch
from test_methods import make, some_batch

from semidetr_lite.detectors.denoising import Denoising
from semidetr_lite.detectors.transformer import Layers
from semidetr_lite.losses import detection_loss
from semidetr_lite.matching import Assignment, PaddedTargets
from semidetr_lite.methods.mean_teacher import MeanTeacher
from semidetr_lite.normalizer_settings import NormalizerSettings
from semidetr_lite.normalizers import NumBoxes, count_boxes, sum_per_group
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.presets import PRESETS, make_method
from semidetr_lite.training.settings import Runtime, change

COCO = PRESETS["coco-10pct"].normalizers


def masks(*counts: list[int], columns: int = 4) -> list[np.ndarray]:
    """A valid mask per micro-batch, for images with so many boxes."""
    return [np.arange(columns) < np.array(images)[:, None] for images in counts]


# Counts


def test_boxes_are_counted_over_all_micro_batches():
    first = np.array([[True, False, True, False], [False] * 4])
    second = np.array([[True, True, True, False], [True, False, False, False]])
    for counted in count_boxes([first, second], num_queries=2):
        # with 2 queries, the third box of an image finds no partner
        assert counted.step == NumBoxes(images=4, matched=5, boxes=6, max_per_image=3)
        assert counted.groups == [counted.step] and counted.num_shards == 2
        assert counted.of_step(5) == 2.5 and counted.of_step(0.2) == 0.5  # at least 1 in all
    (empty,) = count_boxes([np.zeros((2, 0), dtype=bool)], num_queries=2)
    assert empty.step == NumBoxes(images=2, matched=0, boxes=0, max_per_image=0)


def test_groups_are_images_in_a_row_wherever_micro_batches_end():
    settings = NormalizerSettings(normalizer_groups=3)
    boxes = [3, 1, 0, 2, 4, 1]
    expected = [(2, 4), (2, 2), (2, 5)]  # images and boxes of 3 + 1, 0 + 2, 4 + 1
    for cut in ([boxes], [boxes[:3], boxes[3:]], [[count] for count in boxes]):
        counted = count_boxes(masks(*cut), 9, settings)
        for normalizers in counted:
            found = [(group.images, group.boxes) for group in normalizers.groups]
            assert found == expected
            assert [group.max_per_image for group in normalizers.groups] == [3, 2, 4]
        # every image is in one group, in the order of the images
        numbers = [
            number
            for normalizers in counted
            for number, rows in normalizers.rows.items()
            for _ in range(rows.start, rows.stop)
        ]
        assert numbers == [0, 0, 1, 1, 2, 2]
        sums = sum_per_group(counted, [np.array(images) for images in cut])
        assert sums.tolist() == [4, 2, 5]


def test_a_step_of_fewer_images_than_groups_has_a_group_per_image():
    (counted,) = count_boxes(masks([2, 0, 1]), 9, NormalizerSettings(normalizer_groups=8))
    assert [group.boxes for group in counted.groups] == [2, 0, 1]


def test_bounds():
    settings = NormalizerSettings(normalizer_groups=2, normalizer_bound=3.0)
    (counted,) = count_boxes(masks([1, 0, 0, 4]), 9, settings)
    assert counted.of_step(1.5) == 3 and counted.of_step(5) == 5
    # a group is divided by its own number, at least 1, and the mean is over two groups
    assert [counted.classes_of_group(number) for number in (0, 1)] == [2, 8]
    (expecting,) = count_boxes(masks([1, 0, 0, 4]), 9, settings, expected_per_image=1.5)
    assert [expecting.classes_of_group(number) for number in (0, 1)] == [2 * 3, 2 * 4]
    for normalizers, least in ((counted, 3), (expecting, 6)):
        of_classes, of_boxes = normalizers.soft(torch.tensor([0.5, 7.0]))
        assert of_classes.tolist() == [least, 7] and of_boxes.tolist() == [3, 7]


# A step without any pseudo-box


@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize(("stage", "expected"), [("one_to_many", 0.579), ("one_to_one", 0.434)])
def test_the_class_loss_of_a_step_without_a_pseudo_box_is_the_released_one(
    stage, expected, micro_batches
):
    """32 images, 900 queries, 80 classes, every score 0.01, weight 2, on 8 released GPUs."""
    images = 32 // micro_batches
    counted = count_boxes(masks(*[[0] * images] * micro_batches), 900, COCO)
    logits = torch.full((1, images, 900, 80), math.log(0.01 / 0.99))
    layers = Layers(logits, torch.full((1, images, 900, 4), 0.5), encoder=False)
    targets = PaddedTargets(
        torch.zeros(images, 4, 4), torch.zeros(images, 4).long(), torch.zeros(images, 4).bool()
    )
    nothing = Assignment(torch.full((1, images, 900), -1), torch.zeros(1, images, 900))
    losses = [
        detection_loss(layers, targets, nothing, stage, normalizers=own)["class"] for own in counted
    ]
    assert torch.stack(losses).mean().item() == pytest.approx(expected, abs=5e-4)
    (plain,) = count_boxes(masks([0] * images), 900)
    alone = detection_loss(layers, targets, nothing, stage, normalizers=plain)["class"]
    # one group with bound 1 divides the sum of these images by 1
    assert alone.item() == pytest.approx(expected * 8 / micro_batches, rel=2e-3)


# What labelled images lead one to expect


def expecting(kind: str, **changes):
    method, step = make(kind, **changes)
    method.normalizers = NormalizerSettings(pseudo_normalizer="expected_objects")
    return method, step


@pytest.mark.parametrize("kind", ["mean teacher", "stage one", "stage two"])
def test_without_pseudo_boxes_the_background_is_divided_by_the_expected_objects(kind):
    """4 objects in 2 labelled images, so 6 in 3 unlabelled ones."""
    batch = some_batch(counts=(3, 1))
    (plain, step), (method, _) = (f(kind, score_threshold=1.1) for f in (make, expecting))
    ours, theirs = method(batch, step), plain(batch, step)
    assert ours["pseudo/class"].item() == pytest.approx(theirs["pseudo/class"].item() / 6, rel=1e-5)
    for name in set(ours) - {"pseudo/class"}:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", ["mean teacher", "stage two"])
def test_enough_pseudo_boxes_are_divided_by_their_own_number(kind):
    batch = some_batch(counts=(1, 0))
    (plain, step), (method, _) = (f(kind, score_threshold=0.5) for f in (make, expecting))
    theirs = plain(batch, step)
    assert plain.stats["pseudo_per_image"] > 1
    for name, loss in method(batch, step).items():
        assert torch.equal(loss, theirs[name]), name


def test_the_expected_objects_are_a_running_mean_that_is_saved():
    method, step = expecting("mean teacher")
    method(some_batch(counts=(3, 1)), step)
    assert method.objects_per_image.item() == 2
    method(some_batch(counts=(6, 6)), step + 1)
    assert method.objects_per_image.item() == pytest.approx(2 + 0.02 * (6 - 2))
    other, _ = expecting("mean teacher")
    other.load_state_dict(method.state_dict())
    batch = some_batch(counts=(0, 1))
    ours, theirs = method(batch, step + 2), other(batch, step + 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_settings_reach_every_method_with_queries():
    from test_methods import student

    recipe = change(PRESETS["digits"], normalizer_groups=2, pseudo_normalizer="expected_objects")
    for name in ("supervised", "mean-teacher", "semi-detr"):
        method = make_method(name, student(), recipe, steps=20, offset=0, seed=0)
        assert method.normalizers == recipe.normalizers != PRESETS["digits"].normalizers
    for preset in ("coco-10pct", "coco-full", "voc", "coco-10pct-paper", "coco-10pct-supervised"):
        assert PRESETS[preset].normalizers == NormalizerSettings(8, 8.0)
    assert PRESETS["digits"].normalizers == NormalizerSettings(1, 1.0)


# Denoising


def test_every_group_has_its_own_number_of_copies():
    """12 queries: an image with 1 box beside one with 3 gets 12 copies, not 4."""
    torch.manual_seed(0)
    denoising = Denoising(4, dim=8, queries=12, label_noise=0.0)
    valid = torch.from_numpy(masks([1, 3, 0])[0][:, :3])
    boxes, labels = torch.rand(3, 3, 4), torch.zeros(3, 3).long()

    def generators(images):
        return [np.random.default_rng(image) for image in images]

    parts = [(slice(0, 1), 1), (slice(1, 2), 3), (slice(2, 3), 0)]
    group, targets = denoising.of_parts(boxes, labels, valid, generators(range(3)), parts)
    positive = [(targets.assigned[image] >= 0).sum().item() for image in range(3)]
    assert positive == [12, 4 * 3, 0]  # 12 copies of one box, 4 of each of three
    assert [targets.valid[image].sum().item() for image in range(3)] == [24, 24, 0]
    assert group.block_sizes() == [(2,) * 12, (6,) * 4, (0, 24)]
    for image, (images, most) in enumerate(parts[:2]):
        own = [entry[images, :most] for entry in (boxes, labels, valid)]
        alone, alone_targets = denoising(*own, generators([image]))
        length = alone.valid.shape[1]
        assert torch.equal(group.boxes[image, :length], alone.boxes[0])
        assert torch.equal(group.content[image, :length], alone.content[0])
        assert torch.equal(targets.assigned[image, :length], alone_targets.assigned[0])
        assert not group.valid[image, length:].any()


def test_images_of_other_groups_change_nothing_in_a_decoder():
    """Blocks of different lengths in one batch decode as they do alone."""
    method, _ = make("supervised")
    detector, (images, truths) = method.student, some_batch(counts=(4, 1))["labelled"]
    batches = {"together": [0, 1], "first": [0], "second": [1]}
    found = {}
    for name, rows in batches.items():
        method.normalizers = NormalizerSettings(normalizer_groups=len(rows))
        for row in rows:
            truths[row]["position"] = row
        batch = {"labelled": ([images[row] for row in rows], [truths[row] for row in rows])}
        sets = method.make_labelled_sets([batch])
        (queries,) = method.make_denoising_queries(sets, [batch["labelled"][1]], 3)
        outputs = detector(batch["labelled"][0], [queries.group])
        found[name] = outputs["groups"][0], queries
    for row, name in enumerate(("first", "second")):
        alone, own = found[name]
        length = own.group.valid.shape[1]
        together, _ = found["together"]
        for key in ("pred_logits", "pred_boxes"):
            assert torch.allclose(together[key][row, :length], alone[key][0], atol=1e-5)
    sizes = found["together"][1].group.block_sizes()
    assert sizes[0][0] == 8 and sizes[1][0] == 2  # positive and negative of 4 boxes, of 1


# A step of the released grouping


def losses_of(kind: str, parts: int, settings: NormalizerSettings, **changes) -> dict[str, float]:
    method, step = make(kind, **changes)
    method.normalizers = settings
    batch = some_batch((3, 1, 0, 2), sizes=((64, 64),) * 4, weak_sizes=((64, 64),) * 4)
    for _, targets in batch.values():
        for position, target in enumerate(targets):
            target["position"] = position
    values: dict[str, float] = {}
    for losses, found in Engine(method, Runtime(accumulate=parts)).losses(batch, step):
        pairs = zip(losses, found.tolist(), strict=True)
        values = {name: values.get(name, 0.0) + value for name, value in pairs}
    return values


@pytest.mark.parametrize("kind", ["mean teacher", "stage one", "stage two"])
def test_a_group_divides_as_a_micro_batch_that_knows_no_other(kind):
    """With every image a group, the class losses are the mean of those of each image alone."""
    settings = NormalizerSettings(normalizer_groups=4)
    whole = losses_of(kind, 1, settings)
    method, step = make(kind)
    method.normalizers = NormalizerSettings()
    batch = some_batch((3, 1, 0, 2), sizes=((64, 64),) * 4, weak_sizes=((64, 64),) * 4)
    of_groups = {"labelled denoising/class"}
    if kind != "stage one":
        of_groups |= {"labelled/class", "pseudo/class", "pseudo denoising/class"}
    total = dict.fromkeys(of_groups, 0.0)
    for image in range(4):
        part = {name: ([images[image]], [{**targets[image], "position": image}])
                for name, (images, targets) in batch.items()}  # fmt: skip
        losses = method(part, step)
        for name in of_groups:
            total[name] += losses[name].item() / 4 if name in losses else 0.0
    for name in of_groups:
        assert whole[name] == pytest.approx(total[name], rel=1e-4), name


def test_consistency_is_a_mean_of_the_groups():
    from test_methods import nothing_costs_little

    settings = {"cost_queue_size": 50, "score_threshold": 0.7}
    method, step = make("stage one", **settings)
    batch = some_batch()
    method.normalizers = NormalizerSettings(normalizer_groups=3)
    whole = nothing_costs_little(method)(batch, step)["consistency"].item()
    method.normalizers = NormalizerSettings()
    alone = []
    for image in range(3):
        part = {
            view: ([batch[view][0][image]], [batch[view][1][image]]) for view in ("weak", "strong")
        }
        losses = nothing_costs_little(method)({**batch, **part}, step)
        alone.append(losses["consistency"].item())
    assert whole == pytest.approx(sum(alone) / 3, rel=1e-3)


def test_the_teacher_of_labelled_images_alone_expects_nothing():
    method = MeanTeacher(make("supervised")[0].student)
    assert math.isnan(method.objects_per_image.item())


@pytest.mark.parametrize("kind", ["stage one", "stage two"])
def test_mined_targets_of_micro_batches_are_those_of_the_whole_step(kind):
    """The targets and what they are divided by; denoising keeps to the confident boxes."""
    changes = {"mined_targets": True, "score_threshold": 0.8, "mining": "top_k", "mining_top_k": 6}
    whole = losses_of(kind, 1, NormalizerSettings(), **changes)
    without = losses_of(kind, 1, NormalizerSettings(), **{**changes, "mined_targets": False})
    assert losses_of(kind, 4, NormalizerSettings(), **changes) == pytest.approx(whole, rel=1e-4)
    assert whole["pseudo/l1"] != pytest.approx(without["pseudo/l1"], rel=1e-3)
    for name in whole:
        if "denoising" in name:
            assert whole[name] == without[name]
