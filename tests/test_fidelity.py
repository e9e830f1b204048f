"""The released recipe, stated once more: formulas of Semi-DETR's code on simulated GPUs, in plain
loops, against ours on random cases; first weights, views, copies, rates and strides of the presets.

The statements were written from the facts (docs/paper_vs_code.md names the lines), not copied.
"""

import math

import numpy as np
import pytest
import torch
from test_methods import SWITCH, make, some_batch, student

from semidetr_lite.boxes import to_model, to_pixels
from semidetr_lite.data.view_settings import ViewSettings
from semidetr_lite.data.views import _strong_matrix, labelled_view, map_boxes
from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.denoising import DenoisingTargets
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.transformer import Layers
from semidetr_lite.errors import UserError
from semidetr_lite.losses import denoising_loss, detection_loss, make_target_sets
from semidetr_lite.matching import layer_costs, match_layers, matching_cost, one_to_one, pad_targets
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.methods.supervised import Supervised
from semidetr_lite.training.loop import learning_rate_factor, make_optimizer
from semidetr_lite.training.presets import PRESETS
from semidetr_lite.training.settings import new_config

RECIPE = PRESETS["coco-10pct"]
GPUS = RECIPE.normalizers.normalizer_groups
PARTS = ("class", "l1", "giou")
CLASSES, QUERIES = 5, 20


# Losses of a step on 8 GPUs


def random_step(seed: int, images_per_gpu: int, most: int):
    """Predictions of one layer for 8 GPUs' images, and their targets; some images have none."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    count = GPUS * images_per_gpu
    targets = []
    for _ in range(count):
        size = tuple(int(side) for side in rng.integers(60, 120, 2))
        objects = int(rng.integers(0, most + 1))
        boxes = torch.cat(
            [torch.rand(objects, 2) * 0.5 + 0.25, torch.rand(objects, 2) * 0.3 + 0.1], 1
        )
        labels = torch.randint(0, CLASSES, (objects,))
        targets.append({"boxes": to_pixels(boxes, size), "labels": labels, "size": size})
    logits = torch.randn(count, QUERIES, CLASSES) - 1
    boxes = torch.cat(
        [torch.rand(count, QUERIES, 2) * 0.5 + 0.25, torch.rand(count, QUERIES, 2) * 0.3 + 0.05], -1
    )
    for image, target in enumerate(targets):  # some queries lie near an object
        for query in range(min(QUERIES, 4 * len(target["boxes"]))):
            own = to_model(target["boxes"], target["size"])[query % len(target["boxes"])]
            boxes[image, query] = (own + 0.03 * torch.randn(4)).clamp(0.02, 0.98)
    return logits, boxes, targets


def corners(box) -> list[float]:
    x, y, w, h = box
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def iou_and_giou(first, second) -> tuple[float, float]:
    a, b = corners(first), corners(second)
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inside = width * height
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    union = sum(areas) - inside
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inside / union, inside / union - (hull - union) / hull


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def cross_entropy(probability: float, target: float) -> float:
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def released_one_to_many(logits, boxes, target) -> list[tuple[int, int, float]]:
    """(query, target, soft target) of an image: m = s * IoU^6, the 13 best queries of each target
    with m > 0; of several targets a query takes the one of highest IoU; soft targets are m over
    the best m of the target's queries, times their best IoU.
    """
    truth = to_model(target["boxes"], target["size"]).tolist()
    labels = target["labels"].tolist()
    ious = [[iou_and_giou(box, own)[0] for own in truth] for box in boxes.tolist()]
    metric = [
        [sigmoid(row[label]) * iou**6 for label, iou in zip(labels, own)]
        for row, own in zip(logits.tolist(), ious)
    ]
    wanted: dict[int, list[int]] = {}
    for index in range(len(truth)):
        best = sorted(range(QUERIES), key=lambda query: -metric[query][index])[:13]
        for query in best:
            if metric[query][index] > 0:
                wanted.setdefault(query, []).append(index)
    owner = {query: max(own, key=lambda index: ious[query][index]) for query, own in wanted.items()}
    pairs = []
    for index in range(len(truth)):
        queries = [query for query, own in owner.items() if own == index]
        for query in queries:
            best = max(metric[other][index] for other in queries)
            best_iou = max(ious[other][index] for other in queries)
            soft = metric[query][index] / (best + 1e-7) * best_iou
            pairs.append((query, index, soft))
    return pairs


def released_one_to_one(logits, boxes, target) -> list[tuple[int, int, float]]:
    match = one_to_one(logits, boxes, target)  # against all permutations in test_matching.py
    return [(q, t, 1.0) for q, t in zip(match.queries.tolist(), match.targets.tolist())]


def sums_of_image(logits, boxes, target, pairs, stage: str) -> tuple[float, float, float, float]:
    """Of an image, before weights and divisors: class, L1, GIoU, and the sum of soft targets."""
    soft = {(query, int(target["labels"][index])): value for query, index, value in pairs}
    class_sum = 0.0
    for query, row in enumerate(logits.tolist()):
        for label, logit in enumerate(row):
            y, p = soft.get((query, label), 0.0), sigmoid(logit)
            balance = 1.0 if stage == "one_to_many" else 0.25 if y else 0.75
            class_sum += balance * (y - p) ** 2 * cross_entropy(p, y)
    truth = to_model(target["boxes"], target["size"]).tolist()
    l1 = giou = 0.0
    for query, index, value in pairs:
        box = boxes[query].tolist()
        l1 += value * sum(abs(a - b) for a, b in zip(box, truth[index]))
        giou += value * (1 - iou_and_giou(box, truth[index])[1])
    return class_sum, l1, giou, sum(value for _, _, value in pairs)


def released_losses(sums: np.ndarray, class_per_gpu: bool) -> dict[str, float]:
    """The mean over the GPUs of what each finds, as DistributedDataParallel makes of gradients.

    Args:
        sums: (GPUs, images of each, 4) of `sums_of_image`.
        class_per_gpu: whether the class loss is divided by the GPU's own number (one-to-one and
            denoising) or by the mean over the GPUs (one-to-many), like the box losses.
    """
    per_gpu = sums.sum(1)
    shared = max(per_gpu[:, 3].mean(), 1.0)
    of_class = np.maximum(per_gpu[:, 3], 1.0) if class_per_gpu else shared
    return {
        "class": 2.0 * (per_gpu[:, 0] / of_class).mean(),
        "l1": 10.0 * (per_gpu[:, 1] / shared).mean(),
        "giou": 2.0 * (per_gpu[:, 2] / shared).mean(),
    }


def our_losses(logits, boxes, targets, stage: str, images_per_part: int) -> dict[str, float]:
    """The same with our functions, the step cut into micro-batches."""
    starts = range(0, len(targets), images_per_part)
    padded = [pad_targets(targets[start : start + images_per_part]) for start in starts]
    detector = torch.nn.Module()
    detector.mean, detector.num_queries = torch.zeros(1), QUERIES
    sets = make_target_sets(
        "labelled",
        padded,
        [part.valid.numpy() for part in padded],
        [0] * len(padded),
        detector,
        RECIPE.loss_weights,
        RECIPE.normalizers,
    )
    layers, assignments = [], []
    for start, own in zip(starts, sets, strict=True):
        rows = slice(start, start + images_per_part)
        layer = Layers(logits[None, rows], boxes[None, rows], encoder=False)
        costs = layer_costs(layer, own.targets).numpy()
        rule = (stage, RECIPE.semi_detr.candidates, costs, own.valid)
        layers.append(layer)
        assignments.append(match_layers(layer, own.targets, *rule))
    total = torch.stack([one.quality.float().sum((-2, -1)) for one in assignments]).sum(0)
    found = dict.fromkeys(PARTS, 0.0)
    for layer, own, assignment in zip(layers, sets, assignments, strict=True):
        normalizers = own.normalizers._replace(soft_targets=total)
        how = (assignment, stage, own.loss_weights, normalizers)
        for part, loss in detection_loss(layer, own.targets, *how).items():
            found[part] += loss.item() / len(sets)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("images", "most"), [(1, 3), (4, 1)])  # of a GPU, and their most objects
@pytest.mark.parametrize("stage", ["one_to_many", "one_to_one"])
def test_losses_of_a_step_are_those_of_8_released_gpus(stage, images, most, seed):
    logits, boxes, targets = random_step(seed, images, most)
    rule = released_one_to_many if stage == "one_to_many" else released_one_to_one
    sums = [
        sums_of_image(*case, rule(*case), stage)
        for case in zip(logits, boxes, targets, strict=True)
    ]
    sums = np.array(sums).reshape(GPUS, images, 4)
    expected = released_losses(sums, class_per_gpu=stage == "one_to_one")
    assert expected["class"] > 0.05
    for parts in (1, 2, GPUS):
        found = our_losses(logits, boxes, targets, stage, GPUS * images // parts)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_denoising_of_a_step_is_that_of_8_released_gpus(seed):
    """100 // most boxes copies on each GPU; the class loss per GPU, the box losses over all."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    method = Supervised(student(), loss_weights=RECIPE.loss_weights, normalizers=RECIPE.normalizers)
    method.student.denoising.queries = 100
    counts = rng.integers(0, 7, GPUS).tolist()
    batch = some_batch(counts, sizes=((64, 64),) * GPUS)
    (truths,) = [batch["labelled"][1]]
    (own,) = method.make_labelled_sets([batch])
    (queries,) = method.make_denoising_queries([own], [truths], 0)
    copies = [max(1, 100 // count) if count else 0 for count in counts]
    assert queries.copies == copies
    assert [int((row >= 0).sum()) for row in queries.targets.assigned] == [
        n * count for n, count in zip(copies, counts)
    ]
    shape = queries.targets.valid.shape
    logits, boxes = torch.randn(*shape, 4), torch.rand(*shape, 4) * 0.4 + 0.3
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}
    sums = []
    for image, target in enumerate(truths):
        valid, assigned = queries.targets.valid[image], queries.targets.assigned[image]
        index = assigned[valid].tolist()
        pairs = [(query, own, 1.0) for query, own in enumerate(index) if own >= 0]
        case = (logits[image][valid], boxes[image][valid], target)
        sums.append(sums_of_image(*case, pairs, "one_to_one"))
    expected = released_losses(np.array(sums).reshape(GPUS, 1, 4), class_per_gpu=True)
    how = (queries.targets, queries.boxes, own.loss_weights, own.normalizers, queries.copies)
    found = {name: loss.item() for name, loss in denoising_loss(outputs, *how).items()}
    assert isinstance(queries.targets, DenoisingTargets)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_matching_costs_are_the_released_ones(seed):
    """2 x focal cost + 5 x L1 - 2 x GIoU, whatever the weights of the losses."""
    logits, boxes, targets = (entry[:2] for entry in random_step(seed, 1, 4))
    for row, own, target in zip(logits, boxes, targets):
        cost = matching_cost(row, own, target)
        truth = to_model(target["boxes"], target["size"]).tolist()
        for query in range(QUERIES):
            for index, wanted in enumerate(truth):
                p = sigmoid(row[query, target["labels"][index]].item())
                focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
                box = own[query].tolist()
                l1 = sum(abs(a - b) for a, b in zip(box, wanted))
                expected = 2 * focal + 5 * l1 - 2 * iou_and_giou(box, wanted)[1]
                assert cost[query, index].item() == pytest.approx(expected, abs=1e-5)


# First weights


def std(tensor) -> float:
    return tensor.detach().std().item()


def xavier(weight) -> float:
    return math.sqrt(2 / sum(weight.shape))


def test_a_dino_of_the_papers_size_starts_as_the_released_one():
    """Content queries 0.042, position network 0.051 and 0.063, proposal layer 0.063."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    sizes = {"backbone": Tiny((8, 8, 16, 16, 16)), **layers}
    detector, other = DINO(80, **sizes), DINO(80, **sizes, query_init="torch")
    assert std(detector.content.weight) == pytest.approx(0.042, abs=0.001)
    assert std(detector.query_positions[0].weight) == pytest.approx(0.051, abs=0.001)
    assert std(detector.query_positions[2].weight) == pytest.approx(0.0625, abs=0.001)
    assert std(detector.proposal[0].weight) == pytest.approx(0.0625, abs=0.001)
    assert std(other.content.weight) == pytest.approx(1.0, abs=0.01)
    assert std(other.query_positions[2].weight) == pytest.approx(0.036, abs=0.001)
    for name in ("coco-10pct", "coco-full", "voc"):
        assert new_config(name).detector_kwargs.query_init in (None, "xavier")
    assert new_config("digits").detector_kwargs.query_init == "torch"
    with pytest.raises(UserError, match="no query_init called 'zeros': choose xavier or torch"):
        DINO(80, **sizes, query_init="zeros")


@pytest.mark.parametrize("two_stage", [False, True])
def test_a_deformable_detr_of_the_papers_size_starts_as_the_released_one(two_stage):
    torch.manual_seed(0)
    detector = DeformableDETR(
        80,
        encoder_layers=1,
        decoder_layers=1,
        with_box_refine=True,
        two_stage=two_stage,
        backbone=Tiny((8, 8, 16, 16, 16)),
    )
    if two_stage:
        layers = [detector.box_code[0], detector.proposal[0]]
    else:
        layers = [detector.reference_points]
        assert not detector.reference_points.bias.any()
        assert std(detector.content.weight) == pytest.approx(1.0, abs=0.01)  # as released
    for layer in layers:
        assert std(layer.weight) == pytest.approx(xavier(layer.weight), rel=0.06)


# The encoder of Deformable DETR


def all_token_detector(**changes) -> DeformableDETR:
    torch.manual_seed(3)
    arguments = {"with_box_refine": True, "two_stage": True, "all_token_loss": True} | changes
    backbone = Tiny((8, 8, 16, 16, 16))
    sizes = {"dim": 16, "heads": 2, "dim_feedforward": 16, "encoder_layers": 1}
    sizes |= {"decoder_layers": 2, "levels": 3, "points": 2, "num_queries": 8}
    detector = DeformableDETR(CLASSES, **sizes, backbone=backbone, anchor_size=0.2, **arguments)
    torch.nn.init.normal_(detector.proposal_box.last_layer.weight, std=0.3)
    return detector


def test_deformable_detr_trains_all_tokens_of_its_encoder_as_released():
    """Class-agnostic focal loss of all usable tokens, matched one-to-one, over the boxes."""
    batch = some_batch(sizes=((64, 64), (48, 80)))
    images, truths = batch["labelled"]
    detector = all_token_detector()
    method = Supervised(detector)
    losses = method(batch, 0)
    tokens = detector(images)["encoder"]["tokens"]
    usable = tokens["usable"]
    assert usable.any() and not usable.all()
    logits, boxes = tokens["pred_logits"].detach(), tokens["pred_boxes"].detach()
    sums = np.zeros(4)
    for image, truth in enumerate(truths):
        own = {**truth, "labels": torch.zeros_like(truth["labels"])}
        chosen = logits[image][usable[image]], boxes[image][usable[image]]
        pairs = released_one_to_one(*chosen, own)
        sums += sums_of_image(*chosen, own, pairs, "one_to_one")
    class_sum, l1, giou, count = sums
    expected = {"class": 2 * class_sum / count, "l1": 5 * l1 / count, "giou": 2 * giou / count}
    for name in PARTS:
        assert losses[f"labelled tokens/{name}"].item() == pytest.approx(expected[name], rel=1e-4)


def test_all_tokens_of_two_parts_are_those_of_one():
    batch = some_batch()
    images, truths = batch["labelled"]
    method = Supervised(all_token_detector())
    whole = method(batch, 0)
    middle = len(images) // 2
    parts = [
        {"labelled": (images[rows], truths[rows])}
        for rows in (slice(0, middle), slice(middle, None))
    ]
    prepared = method.prepare(parts, 0)
    of_parts = [method(part, 0, own) for part, own in zip(parts, prepared, strict=True)]
    for name in (f"labelled tokens/{part}" for part in PARTS):
        mean = sum(losses[name].item() for losses in of_parts) / len(parts)
        assert mean == pytest.approx(whole[name].item(), rel=1e-5)


def test_all_tokens_take_the_place_of_the_proposals_only_where_asked():
    assert new_config("coco-10pct", detector="deformable-detr").detector_kwargs.all_token_loss
    assert not new_config("digits", detector="deformable-detr").detector_kwargs.all_token_loss
    batch = some_batch()
    losses = Supervised(all_token_detector(all_token_loss=False))(batch, 0)
    assert not any("tokens" in name for name in losses)
    for step in (0, SWITCH):  # both stages
        losses = SemiDETR(all_token_detector(), SWITCH, score_threshold=0.0)(batch, step)
        assert {f"pseudo tokens/{part}" for part in PARTS} <= set(losses)
    evaluated = all_token_detector().eval()(batch["labelled"][0])
    assert "tokens" not in evaluated["encoder"]
    with pytest.raises(UserError, match="all_token_loss=True needs two_stage=True"):
        all_token_detector(two_stage=False)


# Views


def test_the_strong_shear_is_the_released_one():
    """About the corner: x' = x + tanh(a) y, then y' = y + tanh(b) x', angles within 30 degrees."""
    assert RECIPE.views.released_shear and not PRESETS["digits"].views.released_shear
    limit, found, visible = math.tanh(math.pi / 6), [], {}
    for seed in range(400):
        matrix = _strong_matrix((600, 800), np.random.default_rng(seed), RECIPE.views)
        if matrix[0, 1] == 0 or abs(matrix[0, 0] - 1) > 1e-6 or matrix[0, 1] == -matrix[1, 0]:
            continue  # shifts and rotations
        along_x, along_y = matrix[0, 1].item(), matrix[1, 0].item()
        assert torch.allclose(matrix[:, 2], torch.tensor([0.0, 0, 1]))
        assert matrix[1, 1].item() == pytest.approx(1 + along_x * along_y, abs=1e-6)
        found += [abs(along_x), abs(along_y)]
    assert len(found) > 100 and max(found) < limit and max(found) > 0.95 * limit
    box = torch.tensor([[300.0, 200, 500, 400]])
    for released in (True, False):
        views = ViewSettings(released_shear=released, strong_shift=0.0, strong_rotation=0.0)
        matrices = [
            _strong_matrix((600, 800), np.random.default_rng(seed), views) for seed in range(400)
        ]
        areas = [
            (map_boxes(box, matrix, (600, 800))[0][0, 2:] - map_boxes(box, matrix, (600, 800))[0][0, :2]).prod()
            for matrix in matrices
        ]  # fmt: skip
        visible[released] = sum(areas) / len(areas)
    assert visible[True] != visible[False]


def test_the_supervised_baseline_has_its_own_views_and_schedule():
    """12 epochs of 11,829 images in batches of 16, a tenth of the rate in the last epoch."""
    config = new_config("coco-10pct-supervised")
    assert config.method == "supervised" and config.steps == 12 * math.ceil(11_829 / 16)
    epoch = config.steps // 12
    factors = [learning_rate_factor(step, config.steps, config) for step in
               (0, 11 * epoch - 1, 11 * epoch, config.steps - 1)]  # fmt: skip
    assert factors == pytest.approx([1, 1, 0.1, 0.1])
    image = torch.arange(3 * 300 * 400).reshape(3, 300, 400).remainder(251).to(torch.uint8)
    target = {
        "boxes": torch.tensor([[100.0, 100, 200, 160]]),
        "labels": torch.tensor([0]),
        "size": (300, 400),
    }
    shapes = set()
    for seed in range(40):
        view, own = labelled_view(image, target, np.random.default_rng(seed), config.views)
        assert tuple(view.shape[1:]) == own["size"]
        shapes.add(round(own["size"][1] / own["size"][0], 2))
        assert 480 <= min(own["size"]) <= 800 and max(own["size"]) <= 1333
        if len(own["boxes"]):  # the box still lies where its matrix says
            expected, _ = map_boxes(target["boxes"], own["matrix"], own["size"])
            assert torch.allclose(own["boxes"], expected, atol=1e-3)
    assert 1.33 in shapes and len(shapes) > 10  # whole images, and parts of other shapes
    plain = new_config("coco-10pct").views
    ratios = {labelled_view(image, target, np.random.default_rng(seed), plain)[0].shape[2] /
              labelled_view(image, target, np.random.default_rng(seed), plain)[0].shape[1]
              for seed in range(8)}  # fmt: skip
    assert all(abs(ratio - 4 / 3) < 0.01 for ratio in ratios)


def test_labelled_views_without_a_colour_operation_keep_their_pixels():
    image, target = torch.rand(3, 40, 60), {"size": (40, 60)}
    for color in (False, True):
        views = ViewSettings(flip=False, labelled_color=color)
        same = [
            torch.equal(labelled_view(image, target, np.random.default_rng(seed), views)[0], image)
            for seed in range(6)
        ]
        assert all(same) != color


# Rates


def test_deformable_detr_has_its_own_rates_and_l1_weight():
    for preset in ("coco-10pct", "voc"):
        config = new_config(preset, detector="deformable-detr")
        assert config.loss_weights.l1_weight == 5 and config.optimizer.learning_rate == 2e-4
        assert new_config(preset).loss_weights.l1_weight == 10
    digits = new_config("digits", detector="deformable-detr")
    assert digits.optimizer == new_config("digits").optimizer
    method, _ = make("supervised")
    groups = make_optimizer(method, new_config("coco-10pct", detector="deformable-detr"))
    rates = {}
    for group in groups.param_groups:
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    for name, parameter in method.student.named_parameters():
        slow = ".offsets." in name or name.startswith("backbone.")
        assert rates[id(parameter)] == pytest.approx(2e-5 if slow else 2e-4), name
    plain = make_optimizer(method, new_config("coco-10pct"))
    assert [group["lr"] for group in plain.param_groups] == pytest.approx([1e-4, 1e-5])


# Strides of the consistency queries


class Recorder(torch.nn.Module):
    """In place of the projector's layers: keeps what is read, and hands out some content."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.read = dim, None

    def forward(self, roi_features):
        self.read = roi_features
        return roi_features.new_ones(len(roi_features), self.dim, requires_grad=True)


@pytest.mark.parametrize("sizes", [[(80, 112), (96, 72), (64, 104)], [(96, 128)] * 3])
def test_consistency_queries_read_their_boxes_where_they_are_in_padded_batches(sizes):
    """The teacher's maps hold the place of each of their cells; a box reads its own centre."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "dim": 16, "heads": 2, "levels": 4}
    detector = DINO(4, num_queries=12, backbone="resnet18", anchor_size=0.15, **layers)
    torch.nn.init.normal_(detector.class_head.bias, std=0.3)
    method = SemiDETR(detector, SWITCH, score_threshold=0.0, max_pseudo_boxes=8).train()
    recorder, encode = Recorder(16), method.teacher.encode
    method.projector.layers = recorder
    seen = []

    def with_places(images):
        memory = encode(images)
        maps = []
        for level, stride in zip(memory.features, (8, 16, 32, 64), strict=True):
            batch, _, height, width = level.shape
            places = torch.zeros_like(level)
            places[:, 0] = (torch.arange(width) + 0.5) * stride
            places[:, 1] = ((torch.arange(height) + 0.5) * stride)[:, None]
            maps.append(places)
        seen.append([tuple(level.shape[-2:]) for level in maps])
        return memory._replace(features=maps)

    method.teacher.encode = with_places
    batch = some_batch(counts=(2,), sizes=((64, 64),), weak_sizes=sizes)
    prepared = method.prepare([batch], 0)
    method(batch, 0, prepared[0])
    assert seen[0][0] == (12, 16)  # of the batch, padded to multiples of 32 pixels
    labels = prepared[0].pseudo_labels
    boxes = labels.weak.boxes[torch.from_numpy(prepared[0].confident)]
    centres = recorder.read[:, :2, 3, 3]
    inner = ((boxes[:, 2:] - boxes[:, :2]) > 8).all(1)  # not read beyond the border of the map
    assert inner.sum() > 4
    expected = ((boxes[:, :2] + boxes[:, 2:]) / 2)[inner]
    assert (centres[inner] - expected).abs().max() < 1.0
