"""`digits-v1` is frozen; its splits share no digit and no photograph region."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from semidetr_lite.data import digits
from semidetr_lite.data.splits import labelled_indices
from semidetr_lite.errors import UserError

TEN_SCENES = [
    ("train", 0),
    ("train", 1),
    ("train", 2),
    ("train", 1999),
    ("tune", 0),
    ("tune", 1),
    ("tune", 299),
]
TEN_SCENES += [("test", 0), ("test", 1), ("test", 499)]
# Made in other processes than the one that compares.
FROZEN = "9b68f80e703d7a30c7bfe9234a7fe6595cb9dd910187fcba43075d1fff67c32a"
LABELLED_10_PERCENT = "fb2143de0f937f30a52bafdcb16fdf04eb2468019b79aa335b8f6ce7a8e198ed"


def scene_hash(scenes) -> str:
    digest = hashlib.sha256()
    for split, index in scenes:
        image, target = digits.scene(index, split)
        for entry in (image, target["boxes"], target["labels"]):
            digest.update(entry.numpy().tobytes())
    return digest.hexdigest()


def split_hash(indices) -> str:
    return hashlib.sha256(np.array(indices, dtype="<i8").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def scenes() -> list:
    return [digits.scene(index) for index in range(300)]


# Frozen and deterministic


def test_ten_scenes_are_frozen():
    assert scene_hash(TEN_SCENES) == FROZEN, "digits-v1 changed: a change gets a new name"


def test_a_scene_is_a_function_of_split_seed_and_index():
    image, target = digits.scene(5, "tune")
    np.random.seed(7)  # noqa: NPY002  no global generator takes part
    again, _ = digits.scene(5, "tune")
    assert torch.equal(image, again)
    others = [digits.scene(6, "tune"), digits.scene(5, "test"), digits.scene(5, "tune", seed=1)]
    assert all(other.shape != image.shape or not torch.equal(other, image) for other, _ in others)
    assert image.dtype == torch.uint8 and image.shape == (3, *target["size"])
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    assert target["image_id"] == 5


def test_a_dataset_hands_out_scenes_with_their_sizes_known_before():
    dataset = digits.DigitScenes("tune", count=20)
    assert len(dataset) == 20
    for index in (0, 7, 19):
        image, target = dataset[index]
        assert dataset.sizes[index] == target["size"] == tuple(image.shape[1:])
        assert torch.equal(image, digits.scene(index, "tune")[0])
    dataset[7][1]["boxes"] = None  # what a caller does to a target stays with the caller
    assert dataset[7][1]["boxes"] is not None


# Disjoint splits


def used_by(split: str, monkeypatch, count: int = 60) -> tuple[set, set]:
    """(digit samples, photograph columns) that `count` scenes of a split use."""
    masks, labels, photos = digits._sources()
    coded = masks.copy()
    coded[:, 0, 0] = coded[:, -1, 0] = np.arange(len(masks)) * 1e-6  # in a corner, far below ink
    photo = np.full_like(photos[0], 1000.0)
    photo[..., 0] = np.arange(photo.shape[1])  # the column, as a ratio that dimming leaves alone
    samples, seen = set(), set()
    shape, background = digits._shape, digits._background

    def spy_shape(rng, mask, height):
        samples.update(int(round(corner * 1e6)) for corner in (mask[0, 0], mask[-1, 0]))
        return shape(rng, mask, height)

    def spy_background(*arguments):
        crop = background(*arguments)
        seen.update(np.rint(np.unique(crop[..., 0] / crop[..., 1] * 1000)).astype(int).tolist())
        return crop

    monkeypatch.setattr(digits, "_sources", lambda: (coded, labels, [photo, photo]))
    monkeypatch.setattr(digits, "_shape", spy_shape)
    monkeypatch.setattr(digits, "_background", spy_background)
    for index in range(count):
        digits.scene(index, split)
    monkeypatch.undo()
    return samples, seen


def test_splits_share_no_digit_and_no_photograph_column(monkeypatch):
    used = {split: used_by(split, monkeypatch) for split in digits.COUNTS}
    for kind in (0, 1):
        for a, b in (("train", "tune"), ("train", "test"), ("tune", "test")):
            assert not used[a][kind] & used[b][kind], f"{a} and {b} overlap"
    assert all(len(samples) > 60 and len(columns) > 100 for samples, columns in used.values())


# The frame


def pair_covers(boxes: np.ndarray) -> list[float]:
    """For each pair of boxes, the share of the smaller one that they have in common."""
    covers = []
    for i in range(len(boxes)):
        for j in range(i):
            (ax, ay, bx, by), (cx, cy, dx, dy) = boxes[i], boxes[j]
            common = max(0.0, min(bx, dx) - max(ax, cx)) * max(0.0, min(by, dy) - max(ay, cy))
            covers.append(common / min((bx - ax) * (by - ay), (dx - cx) * (dy - cy)))
    return covers


def test_sizes_of_scenes(scenes):
    counts = Counter(target["size"] for _, target in scenes)
    assert set(counts) == {(96, 96), (96, 128), (128, 96)}
    assert counts[96, 96] / len(scenes) == pytest.approx(0.6, abs=0.08)
    assert counts[96, 128] / len(scenes) == pytest.approx(0.2, abs=0.07)


def test_counts_of_digits(scenes):
    counts = Counter(len(target["boxes"]) for _, target in scenes)
    assert set(counts) == set(range(7))
    assert 0.02 <= counts[0] / len(scenes) <= 0.09
    for number in range(1, 7):  # 0.95 / 6 each, less what found no place
        assert 0.08 <= counts[number] / len(scenes) <= 0.25
    labels = Counter(torch.cat([target["labels"] for _, target in scenes]).tolist())
    assert set(labels) == set(range(10)) and min(labels.values()) > 0.5 * max(labels.values())


def test_sizes_of_digits(scenes):
    heights, widths = [], []
    for _, target in scenes:
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        heights += ((y2 - y1) / min(target["size"])).tolist()
        widths += ((x2 - x1) / min(target["size"])).tolist()
    # strokes are a little shorter than their cells, rotation adds a little
    assert 0.11 * 0.8 <= min(heights) and max(heights) <= 0.38 * 1.1
    assert max(widths) <= 0.38 * 1.2
    assert np.median(heights) == pytest.approx((0.11 * 0.38) ** 0.5, rel=0.15)  # log-uniform
    spread = np.percentile(heights, 95) / np.percentile(heights, 5)
    assert spread == pytest.approx((0.38 / 0.11) ** 0.9, rel=0.15)


def test_boxes_lie_inside_the_scene(scenes):
    for _, target in scenes:
        (height, width), boxes = target["size"], target["boxes"]
        assert (
            (boxes[:, :2] >= 0).all()
            and (boxes[:, 2] <= width).all()
            and (boxes[:, 3] <= height).all()
        )
        assert (boxes == boxes.round()).all()


def test_digits_cover_at_most_a_quarter_of_a_neighbour_or_one_pair_half(scenes):
    for _, target in scenes:
        covers = pair_covers(target["boxes"].numpy())
        assert sum(cover > 0.25 + 1e-6 for cover in covers) <= 1
        assert max(covers, default=0) <= 0.5 + 1e-6


def test_some_scenes_hold_a_crowded_pair(scenes):
    crowded = sum(
        max(pair_covers(target["boxes"].numpy()), default=0) > 0.25 for _, target in scenes
    )
    assert 0.03 <= crowded / len(scenes) <= 0.13  # 8 %: a tenth of those with two digits or more


def test_boxes_are_the_tight_hull_of_the_ink(monkeypatch):
    """Paste every digit also on black and on white: the difference is its opacity."""
    paste, hulls = digits._paste, []

    def spy(rng, scene, shape, box, opacity):
        state, pasted = rng.bit_generator.state, []
        for shade in (0.0, 255.0):
            rng.bit_generator.state = state
            canvas = np.full_like(scene, shade)
            paste(rng, canvas, shape, box, opacity)
            pasted.append(canvas[..., 0])
        ink = (1 - (pasted[1] - pasted[0]) / 255) / opacity > digits.INK
        rows, columns = np.nonzero(ink)
        hulls.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        rng.bit_generator.state = state
        paste(rng, scene, shape, box, opacity)

    monkeypatch.setattr(digits, "_paste", spy)
    monkeypatch.setattr(
        digits, "CONTRAST", -1000.0
    )  # the first colour is taken, whatever lies under it
    monkeypatch.setattr(digits, "LOOK_ALIKES", 0.0)
    found = [digits.scene(index)[1]["boxes"] for index in range(40)]
    assert torch.cat(found).tolist() == hulls and len(hulls) > 80


def test_look_alikes_and_faint_digits_appear(monkeypatch):
    counts, paste = Counter(), digits._paste

    def spy(rng, scene, shape, box, opacity):
        counts["pasted"] += 1
        counts["faint"] += opacity < 0.5
        paste(rng, scene, shape, box, opacity)

    monkeypatch.setattr(digits, "_paste", spy)
    with_look_alikes = labelled = 0
    for index in range(250):
        before = counts["pasted"]
        boxes = digits.scene(index)[1]["boxes"]
        labelled += len(boxes)
        extra = counts["pasted"] - before - len(boxes)
        assert 0 <= extra <= 2
        with_look_alikes += extra > 0
    assert with_look_alikes / 250 == pytest.approx(0.15, abs=0.06)
    assert counts["faint"] / labelled == pytest.approx(0.10, abs=0.035)


# Labelled and unlabelled


@pytest.mark.parametrize(("percent", "count"), [(1, 20), (10, 200), (100, 2000), (0.01, 1)])
def test_the_labelled_part_has_its_percentage(percent, count):
    chosen = labelled_indices(2000, percent, 1)
    assert len(chosen) == len(set(chosen)) == count and chosen == sorted(chosen)
    assert 0 <= chosen[0] and chosen[-1] < 2000


def test_the_labelled_part_is_frozen():
    assert split_hash(labelled_indices(2000, 10, 1)) == LABELLED_10_PERCENT


def test_folds_differ_and_more_percent_keep_what_fewer_had():
    folds = [set(labelled_indices(2000, 10, fold)) for fold in (1, 2, 3, 4, 5)]
    for a in range(5):
        for b in range(a):
            assert len(folds[a] & folds[b]) < 60  # by chance about 20 of 200
    assert set(labelled_indices(2000, 1, 1)) < folds[0]


@pytest.mark.parametrize("percent", [0, -1, 101, float("nan")])
def test_a_percentage_that_is_none(percent):
    with pytest.raises(UserError, match="percent"):
        labelled_indices(2000, percent, 1)


def test_load_divides_the_training_scenes():
    splits = digits.load(percent=10, fold=2)
    labelled, unlabelled = splits.labelled.indices, splits.unlabelled.indices
    assert not set(labelled) & set(unlabelled)
    assert sorted(labelled + unlabelled) == list(range(2000))
    assert labelled == labelled_indices(2000, 10, 2)
    assert (len(splits.tune), len(splits.test)) == (300, 500)
    assert [category["id"] for category in splits.categories] == list(range(10)) and not splits.flip
    assert (
        splits.labelled.sizes
        == [splits.labelled[i][1]["size"] for i in range(3)] + splits.labelled.sizes[3:]
    )


def test_extra_unlabelled_scenes_follow_the_training_scenes():
    splits = digits.load(percent=10, fold=1, extra_unlabelled=5)
    assert len(splits.labelled) == 200 and len(splits.unlabelled) == 1800 + 5
    image, target = splits.unlabelled[len(splits.unlabelled) - 1]
    assert target["image_id"] == 2004 and torch.equal(image, digits.scene(2004)[0])
    assert splits.labelled.indices == digits.load(percent=10, fold=1).labelled.indices


def test_unlabelled_scenes_hide_their_truth():
    splits = digits.load(percent=10, fold=1)
    image, target = splits.unlabelled[3]
    index = splits.unlabelled.indices[3]
    assert set(target) == {"size", "image_id", "truth"} and target["image_id"] == index
    shown, truth = digits.scene(index)
    assert torch.equal(image, shown) and torch.equal(target["truth"]["boxes"], truth["boxes"])
    assert set(splits.labelled[3][1]) == {"boxes", "labels", "size", "image_id"}
