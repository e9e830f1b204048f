"""Mixed strong views: pixels, boxes and truths of all their images; where partners come from; and a
step that learns from them.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_batches import some_splits
from test_methods import make
from test_train import small

from semidetr_lite import distributed
from semidetr_lite.data import batches as batches_module
from semidetr_lite.data import mixing
from semidetr_lite.data.batches import Batches
from semidetr_lite.data.digits import DigitScenes
from semidetr_lite.data.mixing import check_blocks, map_to_mixed_views, mixup, mosaic, sources_of
from semidetr_lite.data.view_settings import ViewSettings
from semidetr_lite.data.views import map_boxes, strong_view, weak_view
from semidetr_lite.errors import UserError
from semidetr_lite.methods.mean_teacher import of_sources, select_pseudo_boxes
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.settings import Runtime, check, new_config

VIEWS = ViewSettings(flip=False, zoom=(0.8, 1.2), shift=0.05)
KINDS = ("mixup", "mosaic", "both")
SIZES = [(40, 60), (60, 40), (50, 50), (32, 64)]


def marked(number: int, size: tuple[int, int], dtype=torch.float32) -> tuple[torch.Tensor, dict]:
    """A plain view of one colour, with two boxes of its own label."""
    value = (number + 1) * (50 if dtype == torch.uint8 else 0.2)
    image = torch.full((3, *size), value, dtype=dtype)
    boxes = torch.tensor([[2.0, 3, 12, 13], [15, 15, 31, 29]])
    truth = {"boxes": boxes, "labels": torch.full((2,), number), "size": size}
    matrix = torch.tensor([[2.0, 0, number], [0, 2, 1], [0, 0, 1]])  # from the original pixels
    return image, {"size": size, "matrix": matrix, "image_id": number, "position": number,
                   "truth": truth}  # fmt: skip


def four(dtype=torch.float32, sizes=SIZES) -> list:
    return [marked(number, size, dtype) for number, size in enumerate(sizes)]


# ---- two views -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_mixup_has_half_of_both_and_the_boxes_of_both(dtype):
    views = four(dtype, [(40, 60)] * 4)
    image, target = mixup(views, 0, 2)
    middle = (views[0][0].float() + views[2][0].float()) / 2
    assert image.dtype == dtype and torch.allclose(image.float(), middle)
    assert target["truth"]["labels"].tolist() == [0, 0, 2, 2]
    assert torch.equal(target["truth"]["boxes"][:2], target["truth"]["boxes"][2:])
    assert target["image_id"] == 0 and torch.equal(target["matrix"], views[0][1]["matrix"])
    assert [source["offset"] for source in target["sources"]] == [0, 2]
    assert torch.equal(target["sources"][1]["matrix"], views[2][1]["matrix"])
    assert torch.equal(views[0][0], four(dtype, [(40, 60)] * 4)[0][0])  # nothing is painted over


def test_mixup_of_other_sizes_makes_the_partner_fit():
    views = four()
    image, target = mixup(views, 0, 1)  # 60 x 40 into 40 x 60: two thirds as large
    assert image.shape[1:] == (40, 60) == target["size"]
    assert torch.allclose(image[:, 5:35, 2:25], torch.tensor(0.3), atol=1e-3)  # both
    assert torch.allclose(image[:, :, 30:], torch.tensor(0.2))  # the first alone
    expected = views[1][1]["truth"]["boxes"] * 2 / 3
    assert torch.allclose(target["truth"]["boxes"][2:], expected, atol=1e-4)


# ---- four views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("seed", range(4))
def test_a_mosaic_shows_each_view_in_a_cell_of_its_own(seed, dtype):
    views = four(dtype)
    image, target = mosaic(views, [2, 0, 3, 1], np.random.default_rng(seed), 0.25)
    assert image.shape == views[2][0].shape and image.dtype == dtype
    area = 0
    for source in target["sources"]:
        left, top, right, bottom = source["region"]
        colour = views[2 + source["offset"]][0][0, 0, 0]
        inner = image[:, top + 1 : bottom - 1, left + 1 : right - 1].float()
        assert torch.allclose(inner, colour.float(), atol=1e-3)  # so no grey is seen either
        area += (right - left) * (bottom - top)
    assert area == image[0].numel() and target["image_id"] == 2


def test_boxes_of_a_mosaic_are_cut_to_their_cell_and_kept_or_dropped_by_what_is_left():
    kept = dropped = cut = 0
    for seed in range(30):
        _, target = mosaic(four(), [0, 1, 2, 3], np.random.default_rng(seed), 0.25)
        labels, boxes = target["truth"]["labels"], target["truth"]["boxes"]
        for number, source in enumerate(target["sources"]):
            left, top, right, bottom = source["region"]
            own = boxes[labels == number]
            to_mixed = source["matrix"] @ torch.linalg.inv(four()[number][1]["matrix"])
            scale = to_mixed[0, 0]
            assert torch.allclose(to_mixed[1, 1], scale) and to_mixed[0, 1].abs() < 1e-5
            limits = torch.tensor([left, top, right, bottom]).float()
            whole = four()[number][1]["truth"]["boxes"] * scale + to_mixed[:2, 2].repeat(2)
            inside = torch.cat(
                [whole[:, :2].maximum(limits[:2]), whole[:, 2:].minimum(limits[2:])], 1
            )
            sides = (inside[:, 2:] - inside[:, :2]).clamp(min=0)
            left_over = sides.prod(1) / (whole[:, 2:] - whole[:, :2]).prod(1)
            keep = left_over >= 0.25
            assert torch.allclose(own, inside[keep], atol=1e-3)
            kept, dropped = kept + int(keep.sum()), dropped + int((~keep).sum())
            cut += int((left_over[keep] < 0.999).sum())
    assert kept > 100 and dropped > 10 and cut > 10


# ---- pseudo-boxes --------------------------------------------------------------------------------


def some_views(size=(64, 64), count: int = 4) -> tuple[list, list]:
    """Weak and strong views of digit scenes."""
    scenes, weak, strong = DigitScenes("train", 60), [], []
    rows = [row for row in range(60) if tuple(scenes.sizes[row]) == size][:count]
    for number, row in enumerate(rows):
        image, target = scenes[row]
        target = {"size": target["size"], "image_id": row, "truth": target}
        for views, view in ((weak, weak_view), (strong, strong_view)):
            rng = np.random.default_rng([number, len(views)])
            made = view(image, copy.deepcopy(target), rng, VIEWS)
            made[1]["position"] = number
            views.append(made)
    return weak, strong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(96, 96), (96, 128)])
def test_boxes_that_the_teacher_finds_land_on_the_mixed_truth(kind, size):
    """The truth of each weak view, mapped as pseudo-boxes are, is that of the mixed view."""
    weak, strong = some_views(size)
    settings = ViewSettings(mixing=kind, mixing_share=0.75)
    mixed = mixing.mix_views(strong, range(4), seed=3, step=5, settings=settings)
    weak_targets, targets = [one[1] for one in weak], [one[1] for one in mixed]
    sources = sources_of(targets)
    assert any("sources" in target for target in targets)
    most = max(len(target["truth"]["labels"]) for target in weak_targets)
    boxes, labels = torch.zeros(4, most, 4), torch.full((4, most), -1)
    for row, target in enumerate(weak_targets):
        count = len(target["truth"]["labels"])
        boxes[row, :count], labels[row, :count] = (
            target["truth"]["boxes"],
            target["truth"]["labels"],
        )
    mapped, keep = map_to_mixed_views(boxes[torch.from_numpy(sources.rows)], sources, weak_targets)
    labels = of_sources(labels, sources)
    keep = keep.flatten(1) & (labels >= 0)
    for row, target in enumerate(targets):
        found, truth = mapped[row].flatten(0, 1)[keep[row]], target["truth"]
        for box, label in zip(truth["boxes"], truth["labels"], strict=True):
            same = found[labels[row][keep[row]] == label]
            # a rotation between the views makes the hull of a hull a little larger
            assert len(same) and (same - box).abs().amax(1).min() < 9


def test_a_plain_view_among_mixed_ones_is_mapped_as_ever():
    weak, strong = some_views((96, 96))
    mixed = [mixup(strong, 0, 1), *strong[1:]]
    weak_targets, targets = [one[1] for one in weak], [one[1] for one in mixed]
    boxes = torch.tensor([[[10.0, 10, 40, 40], [60, 60, 95, 95]]]).expand(4, 2, 4)
    sources = sources_of(targets)
    mapped, keep = map_to_mixed_views(boxes[torch.from_numpy(sources.rows)], sources, weak_targets)
    assert sources.rows.tolist() == [[0, 1], [1, 1], [2, 2], [3, 3]]
    for row in (1, 2, 3):
        matrix = targets[row]["matrix"] @ torch.linalg.inv(weak_targets[row]["matrix"])
        expected, inside = map_boxes(boxes[row], matrix, targets[row]["size"])
        assert torch.equal(mapped[row, 0], expected) and torch.equal(keep[row, 0], inside)
        assert not keep[row, 1].any()  # it has no second image
    assert sources_of([view[1] for view in strong]) is None


# ---- which images --------------------------------------------------------------------------------


def batch_of(kind: str, step: int = 3, share: float = 0.5, unlabelled: int = 8) -> dict:
    views = replace(VIEWS, mixing=kind, mixing_share=share)
    return Batches(some_splits(), 2, unlabelled, views, seed=0)[step]


def same_views(ours: tuple, theirs: tuple) -> bool:
    pairs = zip(ours[0], theirs[0], strict=True)
    targets = zip(ours[1], theirs[1], strict=True)
    return all(torch.equal(*pair) for pair in pairs) and all(
        a.keys() == b.keys() and torch.equal(a["matrix"], b["matrix"]) for a, b in targets
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weak_and_labelled_views_stay_as_they_are_and_a_share_of_strong_ones_is_mixed(kind):
    plain, count = batch_of("none"), 0
    assert not any("sources" in target for target in plain["strong"][1])
    for share in (0.0, 0.5, 1.0):
        mixed = batch_of(kind, share=share)
        for name in ("labelled", "weak"):
            assert same_views(mixed[name], plain[name])
        count = sum("sources" in target for target in mixed["strong"][1])
        assert count == 8 * share or (share == 0.5 and 0 < count < 8)
        if share == 0.0:
            assert same_views(mixed["strong"], plain["strong"])


def test_both_makes_both():
    counts = {
        len(target["sources"])
        for step in range(4)
        for target in batch_of("both", step, share=1.0)["strong"][1]
    }
    assert counts == {2, 4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2])
def test_processes_together_have_the_views_of_one(kind, processes, monkeypatch):
    whole = batch_of(kind)["strong"]
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(batch_of(kind)["strong"])
        monkeypatch.undo()
    together = tuple([one for part in parts for one in part[entry]] for entry in (0, 1))
    assert same_views(together, whole)
    for row, target in enumerate(whole[1]):
        for source in target.get("sources", []):
            assert (row + source["offset"]) // 4 == row // 4  # of its own block


def test_views_depend_on_seed_and_step_alone_and_partners_change():
    assert same_views(batch_of("both")["strong"], batch_of("both")["strong"])
    offsets = [
        tuple(source["offset"] for source in target["sources"])
        for step in range(3)
        for target in batch_of("mixup", step, share=1.0)["strong"][1][::4]
    ]
    assert len(set(offsets)) > 1


def test_a_block_that_would_be_divided_is_refused():
    check_blocks("none", 6, 4)
    check_blocks("mixup", 16, 4)
    with pytest.raises(UserError, match="--unlabelled-batch-size must be a multiple of 8, got 12"):
        check_blocks("mosaic", 12, 2)
    with pytest.raises(UserError, match="mixes blocks of 4 unlabelled images"):
        batch_of("mixup", unlabelled=6)
    for method, detector in (("soft-teacher", "faster-rcnn"), ("dense-teacher", "fcos")):
        config = new_config("digits", method, detector)
        with pytest.raises(UserError, match=f"{method} cannot learn from mixed views"):
            check(replace(config, views=replace(config.views, mixing="mixup")))


def test_the_setting_reaches_the_batches():
    config = small(mixing="mosaic", mixing_share=0.25)
    assert (config.views.mixing, config.views.mixing_share) == ("mosaic", 0.25)
    assert batches_module.mix_views is mixing.mix_views


# ---- a step --------------------------------------------------------------------------------------


def mixed_batch(kind: str, size=(64, 64), count: int = 4) -> dict:
    torch.manual_seed(4)
    scenes = []
    for number in range(count):
        truth = {"boxes": torch.tensor([[5.0, 5, 30, 30]]), "labels": torch.tensor([number % 4])}
        target = {"size": size, "image_id": number, "truth": {**truth, "size": size}}
        scenes.append((torch.rand(3, *size), target))
    views = {}
    for name, view in (("weak", weak_view), ("strong", strong_view)):
        made = []
        for number, (image, target) in enumerate(scenes):
            made.append(view(image, target, np.random.default_rng([number, 5]), VIEWS))
            made[-1][1]["position"] = number
        if name == "strong":
            settings = ViewSettings(mixing=kind, mixing_share=1.0)
            made = mixing.mix_views(made, range(count), 0, 1, settings)
        views[name] = ([image for image, _ in made], [target for _, target in made])
    labelled = [
        {**target["truth"], "position": number} for number, (_, target) in enumerate(scenes)
    ]
    return {"labelled": ([image for image, _ in scenes], labelled), **views}


METHODS = ["mean teacher", "stage one", "stage two"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("threshold", [0.55, 1.1])
def test_a_step_learns_from_mixed_views(name, kind, threshold):
    method, step = make(name, score_threshold=threshold)
    batch = mixed_batch(kind)
    losses = method(batch, step)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    if threshold < 1:
        plain = [{k: v for k, v in t.items() if k != "sources"} for t in batch["strong"][1]]
        method(batch | {"strong": (batch["strong"][0], plain)}, step)
        alone = method.stats["pseudo_per_image"]
        method(batch, step)
        assert method.stats["pseudo_per_image"] > alone  # boxes of partners are targets too
    else:
        assert method.stats["pseudo_per_image"] == 0


def test_targets_of_a_mixup_are_the_boxes_of_both_weak_views():
    method, step = make("mean teacher")
    batch = mixed_batch("mixup")
    labels = method.prepare([batch], step)[0].pseudo_labels
    rows = sources_of(batch["strong"][1]).rows
    with torch.no_grad():
        sizes = torch.tensor([(64, 64)] * 4)
        weak = select_pseudo_boxes(
            method.teacher(batch["weak"][0]), sizes, method.max_pseudo_boxes, method.nms
        )
    columns = weak.boxes.shape[1]
    for view in range(4):
        for source in range(2):
            part = slice(source * columns, (source + 1) * columns)
            row = rows[view, source]
            assert torch.equal(labels.weak.labels[view, part], weak.labels[row])
            assert torch.equal(labels.weak.boxes[view, part], weak.boxes[row])
            assert (labels.weak_rows[view, part] == row).all()


@pytest.mark.parametrize("name", METHODS)
def test_scrambled_truth_of_unlabelled_images_changes_no_bit(name):
    found = []
    for scrambled in (False, True):
        method, step = make(name)
        batch = mixed_batch("both")
        if scrambled:
            for kind in ("weak", "strong"):
                for target in batch[kind][1]:
                    target["truth"] = {"boxes": torch.rand(3, 4), "labels": torch.tensor([1, 2, 3])}
        losses = method(batch, step)
        sum(losses.values()).backward()
        found.append((losses, [p.grad for p in method.parameters()]))
    for name, loss in found[0][0].items():
        assert torch.equal(loss, found[1][0][name])
    for ours, theirs in zip(*(gradients for _, gradients in found), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mean teacher", "stage two"])
def test_micro_batches_of_whole_blocks_have_the_losses_of_the_step(name):
    """Exact for one-to-one matching and denoising, as without mixing."""
    found = []
    for parts in (1, 2):
        method, step = make(name)
        batch = mixed_batch("both", count=8)
        values: dict[str, float] = {}
        for losses, means in Engine(method, Runtime(accumulate=parts), 8).losses(batch, step):
            for key, value in zip(losses, means.tolist(), strict=True):
                values[key] = values.get(key, 0) + value
        found.append(values)
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_consistency_compares_each_box_with_the_weak_view_that_it_is_from(monkeypatch):
    """Each consistency query is decoded in the weak view of its own image, at its own box there."""
    method, step = make("stage one", consistency_boxes="confident", mining="none")
    batch, seen = mixed_batch("mixup"), {}
    for name, detector in (("student", method.student), ("teacher", method.teacher)):
        real = detector.decode_groups

        def spy(memory, outputs, groups, name=name, real=real):
            seen[name] = groups[0]
            return real(memory, outputs, groups)

        monkeypatch.setattr(detector, "decode_groups", spy)
    labels = method.prepare([batch], step)[0].pseudo_labels
    method(batch, step)
    mask = labels.confident.numpy()
    assert seen["student"].valid.sum() == seen["teacher"].valid.sum() == mask.sum() > 4
    per_weak = np.bincount(labels.weak_rows[mask], minlength=4)
    assert seen["teacher"].valid.sum(1).tolist() == per_weak.tolist()
    assert seen["student"].valid.sum(1).tolist() == mask.sum(1).tolist()
    contents = [
        {tuple(row.tolist()) for row in group.content[group.valid].detach()}
        for group in (seen["student"], seen["teacher"])
    ]
    assert contents[0] == contents[1]
