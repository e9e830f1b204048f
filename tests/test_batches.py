"""A batch depends on seed and step alone; a pass shows every image once."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from semidetr_lite import distributed
from semidetr_lite.data.batches import Batches, Sampler
from semidetr_lite.data.splits import Concat, Splits, Subset, WithoutLabels
from semidetr_lite.data.views import ViewSettings
from semidetr_lite.errors import UserError

SQUARE, WIDE, TALL = (16, 16), (16, 24), (24, 16)
VIEWS = ViewSettings(flip=True, shift=0.1, patches=2)


class Noise:
    """Images of random pixels, each with one box; those with the ids `bad` cannot be read."""

    def __init__(self, sizes: list[tuple[int, int]], first: int = 0, bad=()):
        self.sizes, self.first, self.bad, self.reads = sizes, first, bad, Counter()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int):
        self.reads[index] += 1
        if self.first + index in self.bad:
            raise UserError(f"{self.first + index}.jpg: not a readable image")
        size = self.sizes[index]
        generator = torch.Generator().manual_seed(self.first + index)
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        boxes, labels = torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([index % 3])
        return image, {
            "boxes": boxes,
            "labels": labels,
            "size": size,
            "image_id": self.first + index,
        }


def some_splits(labelled: int = 10, unlabelled: int = 40, bad=()) -> Splits:
    shapes = [SQUARE, SQUARE, SQUARE, WIDE, TALL]
    data = Noise([shapes[i % 5] for i in range(labelled)], bad=bad)
    other = Noise([shapes[i % 5] for i in range(unlabelled)], first=1000, bad=bad)
    return Splits(data, WithoutLabels(other, list(range(unlabelled))), data, data, [], flip=True)


def same(a: dict, b: dict) -> bool:
    if a.keys() != b.keys():
        return False
    for key in a:
        for ours, theirs in zip(a[key][0], b[key][0], strict=True):
            if ours.shape != theirs.shape or not torch.equal(ours, theirs):
                return False
        for ours, theirs in zip(a[key][1], b[key][1], strict=True):
            if ours["image_id"] != theirs["image_id"] or not torch.equal(
                ours["matrix"], theirs["matrix"]
            ):
                return False
    return True


# One step


def test_a_batch_is_a_function_of_seed_and_step():
    batches = Batches(some_splits(), 3, 4, VIEWS, seed=1)
    later, first = batches[70], batches[0]
    fresh = Batches(some_splits(), 3, 4, VIEWS, seed=1)
    assert same(fresh[0], first) and same(fresh[70], later) and same(batches[0], first)
    assert not same(first, batches[1])
    assert not same(first, Batches(some_splits(), 3, 4, VIEWS, seed=2)[0])


@pytest.mark.parametrize("workers, start", [(0, None), (1, None), (2, None), (1, "spawn")])
def test_the_same_through_a_loader_with_any_number_of_workers(workers, start):
    batches = Batches(some_splits(bad=(1003, 1010)), 2, 2, VIEWS, seed=5)
    steps = range(3, 8)  # resumed at step 3
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers, multiprocessing_context=start
    )
    for step, batch in zip(steps, loader, strict=True):
        assert same(batch, batches[step])


def test_a_batch_as_the_methods_get_it():
    batch = Batches(some_splits(), 3, 5, VIEWS, seed=0)[11]
    assert {kind: (len(images), len(targets)) for kind, (images, targets) in batch.items()} == {
        "labelled": (3, 3),
        "weak": (5, 5),
        "strong": (5, 5),
    }
    for images, targets in batch.values():
        for image, target in zip(images, targets):
            assert image.dtype == torch.float32 and tuple(image.shape[1:]) == target["size"]
            assert target["matrix"].shape == (3, 3)
    assert all("boxes" in target and "labels" in target for target in batch["labelled"][1])
    for target in batch["weak"][1] + batch["strong"][1]:
        assert set(target) == {"size", "image_id", "matrix", "truth", "position"}
        assert "boxes" in target["truth"]
    assert [target["position"] for target in batch["strong"][1]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_shares_of_all_processes_are_the_batch(processes, monkeypatch):
    whole, parts = Batches(some_splits(), 3, 5, VIEWS, seed=0)[11], []
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(Batches(some_splits(), 3, 5, VIEWS, seed=0)[11])
    for kind, (images, targets) in whole.items():
        assert all(len(part[kind][0]) >= 1 for part in parts)
        together = [image for part in parts for image in part[kind][0]]
        assert all(torch.equal(*pair) for pair in zip(together, images, strict=True))
        positions = [target["position"] for part in parts for target in part[kind][1]]
        assert positions == [target["position"] for target in targets]
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(UserError, match="4 processes .*3 labelled images"):
        Batches(some_splits(), 3, 5, VIEWS, seed=0)


def test_weak_and_strong_are_two_views_of_one_image():
    batch = Batches(some_splits(), 2, 6, VIEWS, seed=0)[4]
    (weak_images, weak), (strong_images, strong) = batch["weak"], batch["strong"]
    assert [target["image_id"] for target in weak] == [target["image_id"] for target in strong]
    assert not any(torch.equal(*pair) for pair in zip(weak_images, strong_images))
    assert (
        len({tuple(target["matrix"].flatten().tolist()) for target in strong}) == 6
    )  # each strong view has its own


def test_methods_see_the_same_labelled_images():
    alone = Batches(some_splits(), 3, 0, VIEWS, seed=0)
    both = Batches(some_splits(), 3, 4, VIEWS, seed=0)
    for step in (0, 13, 140):
        assert list(alone[step]) == ["labelled"]
        assert same(alone[step], {"labelled": both[step]["labelled"]})


def test_views_are_mirrored_only_where_the_data_allow_it():
    for flip in (True, False):
        batches = Batches(replace(some_splits(), flip=flip), 3, 3, ViewSettings(flip=True), seed=0)
        for kind in ("labelled", "weak", "strong"):
            turned = [
                target["matrix"][0, 0] < 0 for step in range(6) for target in batches[step][kind][1]
            ]
            assert any(turned) == flip and not all(turned)


def test_an_unlabelled_image_is_read_once_for_its_two_views():
    splits = some_splits()
    batch = Batches(splits, 2, 4, VIEWS, seed=0)[7]
    reads = splits.unlabelled.dataset.reads
    assert sum(reads.values()) == 4 == len(batch["weak"][0]) == len(batch["strong"][0])


# Images that cannot be read


def ids(batch: dict, kind: str) -> list[int]:
    return [target["image_id"] for target in batch[kind][1]]


def test_an_unreadable_unlabelled_image_is_replaced_and_counted(capsys):
    good = [Batches(some_splits(), 2, 4, VIEWS, seed=0)[step] for step in range(15)]
    bad = {1000, 1007, 1011, 1024, 1033}
    batches = Batches(some_splits(bad=bad), 2, 4, VIEWS, seed=0)
    expected = [batches[step] for step in range(15)]
    replaced = 0
    for before, after in zip(good, expected):
        assert ids(after, "weak") == ids(after, "strong") and not bad & set(ids(after, "weak"))
        assert len({shape_of(image) for image in after["weak"][0]}) == 1
        assert ids(before, "labelled") == ids(after, "labelled")
        for old, new in zip(ids(before, "weak"), ids(after, "weak")):
            assert old == new or old in bad
            replaced += old != new
    assert replaced > 3
    assert all(
        same(batches[step], expected[step]) for step in (14, 3, 12)
    )  # whatever was skipped before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(
        line.startswith("warning: ") and "not a readable image" in line for line in lines
    )
    assert [
        "1 unreadable image " in lines[0],
        "2 unreadable" in lines[1],
        "4 unreadable" in lines[2],
    ] == [True] * 3


def test_each_unreadable_image_of_a_step_has_a_replacement_of_its_own(capsys):
    bad = set(range(1000, 1040, 2))
    good = Batches(some_splits(), 2, 6, VIEWS, seed=0)
    batches = Batches(some_splits(bad=bad), 2, 6, VIEWS, seed=0)
    alike = []
    for step in range(30):
        pairs = zip(ids(good[step], "weak"), ids(batches[step], "weak"))
        replacements = [new for old, new in pairs if old in bad]
        if len(replacements) > 1:
            alike.append(len(set(replacements)) == 1)
    assert len(alike) > 10 and sum(alike) < len(alike) / 2


def test_an_unreadable_labelled_image_ends_the_run_unless_told_otherwise(capsys):
    splits = some_splits(bad={4})
    batches = Batches(splits, 3, 0, VIEWS, seed=0)
    with pytest.raises(UserError, match="4.jpg"):
        [batches[step] for step in range(20)]
    batches = Batches(splits, 3, 0, VIEWS, seed=0, skip_unreadable=True)
    numbers = {number for step in range(20) for number in ids(batches[step], "labelled")}
    assert numbers == set(range(10)) - {4} and "4.jpg" in capsys.readouterr().err


def test_where_nothing_can_be_read_the_run_ends(capsys):
    batches = Batches(some_splits(bad=range(1000, 1040)), 2, 2, VIEWS, seed=0)
    with pytest.raises(UserError, match="not a readable image"):
        batches[0]


def test_images_of_unknown_size_are_not_drawn():
    sampler = Sampler([SQUARE, (0, 0), WIDE, (0, 0), SQUARE], 2, seed=0)
    assert {
        index
        for draw_index in range(9)
        for shape in (0, 1, -1)
        for index in sampler.draw(shape, draw_index)
    } == {0, 2, 4}


def test_no_unlabelled_image_at_all():
    splits = replace(some_splits(), unlabelled=WithoutLabels(Noise([]), []))
    assert list(Batches(splits, 2, 0, VIEWS, seed=0)[0]) == ["labelled"]
    with pytest.raises(UserError, match="unlabelled"):
        Batches(splits, 2, 2, VIEWS, seed=0)


# Shapes


def shape_of(image: torch.Tensor) -> int:
    return int(np.sign(image.shape[2] - image.shape[1]))


def test_a_step_has_one_shape():
    batches = Batches(some_splits(), 2, 3, ViewSettings(patches=0), seed=0)
    steps_of_shape = Counter()
    for step in range(40):
        shapes = {shape_of(image) for images, _ in batches[step].values() for image in images}
        assert len(shapes) == 1
        steps_of_shape[shapes.pop()] += 1
    assert set(steps_of_shape) == {-1, 0, 1}


def test_shapes_come_in_their_proportions():
    batches = Batches(some_splits(), 2, 3, VIEWS, seed=0)
    for cycle in (0, 3):
        steps = range(cycle * batches.cycle, (cycle + 1) * batches.cycle)
        shapes = Counter(batches.shape_and_draw_index(step)[0] for step in steps)
        assert shapes == {0: 60, 1: 20, -1: 20}
    orders = [
        [batches.shape_and_draw_index(100 * cycle + place)[0] for place in range(100)]
        for cycle in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_draws_of_a_shape_count_up_without_a_gap():
    batches = Batches(some_splits(), 2, 3, VIEWS, seed=0)
    draws = {-1: [], 0: [], 1: []}
    for step in range(250):
        shape, draw_index = batches.shape_and_draw_index(step)
        draws[shape].append(draw_index)
    assert all(found == list(range(len(found))) for found in draws.values())


# Passes


@pytest.mark.parametrize("batch", [1, 3, 4, 25])
def test_a_pass_shows_every_image_once(batch):
    sampler = Sampler([SQUARE] * 7 + [WIDE] * 3, batch, seed=4)
    for shape, pool in ((0, set(range(7))), (1, {7, 8, 9})):
        drawn = [index for draw_index in range(30) for index in sampler.draw(shape, draw_index)]
        assert all(len(sampler.draw(shape, draw_index)) == batch for draw_index in range(3))
        passes = [
            drawn[start : start + len(pool)]
            for start in range(0, len(drawn) - len(pool) + 1, len(pool))
        ]
        assert len(passes) > 3 and all(set(once) == pool for once in passes)
        assert len({tuple(once) for once in passes}) > 1  # reshuffled


def test_no_image_falls_behind_over_many_steps():
    splits = some_splits(labelled=20, unlabelled=30)
    batches = Batches(splits, 2, 3, VIEWS, seed=0)
    counts = {"labelled": Counter(), "unlabelled": Counter()}
    for step in range(200):
        shape, draw_index = batches.shape_and_draw_index(step)
        counts["labelled"].update(batches.labelled.draw(shape, draw_index))
        counts["unlabelled"].update(batches.unlabelled.draw(shape, draw_index))
    for kind, expected in (("labelled", 20), ("unlabelled", 20)):
        assert len(counts[kind]) == {"labelled": 20, "unlabelled": 30}[kind]
        assert all(abs(count - expected) <= 1 for count in counts[kind].values())


def test_labelled_and_unlabelled_images_come_in_orders_of_their_own():
    splits = some_splits(labelled=20, unlabelled=20)  # of the same shapes
    batches = Batches(splits, 3, 3, VIEWS, seed=0)
    orders = [
        [index for draw_index in range(4) for index in sampler.draw(0, draw_index)]
        for sampler in (batches.labelled, batches.unlabelled)
    ]
    assert set(orders[0]) == set(orders[1]) and orders[0] != orders[1]


def test_a_shape_that_no_image_has_takes_any():
    splits = some_splits(labelled=3, unlabelled=40)  # the labelled ones are all square
    batches = Batches(splits, 2, 2, VIEWS, seed=0)
    wide = next(step for step in range(100) if batches.shape_and_draw_index(step)[0] == 1)
    batch = batches[wide]
    assert len(batch["labelled"][0]) == 2 and {shape_of(image) for image in batch["weak"][0]} == {1}


# Datasets made of datasets


def test_subset_unlabelled_and_joined():
    data = Noise([SQUARE, WIDE, TALL, SQUARE])
    part = Subset(data, [2, 0])
    assert part.sizes == [TALL, SQUARE] and part[0][1]["image_id"] == 2 and len(part) == 2
    hidden = WithoutLabels(data, [3, 1])[1][1]
    assert hidden["truth"]["labels"].tolist() == [1] and set(hidden) == {
        "size",
        "image_id",
        "truth",
    }
    joined = Concat([part, Subset(data, [1])])
    assert joined.sizes == [TALL, SQUARE, WIDE] and len(joined) == 3
    assert [joined[index][1]["image_id"] for index in (0, 1, 2, -1)] == [2, 0, 1, 1]
    with pytest.raises(IndexError):
        joined[3]
