"""Pixels and boxes move by the same matrix; views are reproducible and keep to their limits."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from semidetr_lite.data import views
from semidetr_lite.data.views import (
    FILL,
    ViewSettings,
    color_augment,
    labelled_view,
    map_boxes,
    map_target,
    random_erase,
    resized,
    strong_view,
    warp,
    weak_view,
)
from semidetr_lite.training.presets import PRESETS

STILL = ViewSettings(flip=False, strong_shift=0.0, strong_rotation=0.0, strong_shear=0.0, patches=0)


def matrix(*rows) -> torch.Tensor:
    return torch.tensor([*rows, [0.0, 0.0, 1.0]])


def about(size, linear) -> torch.Tensor:
    """A linear map (2, 2) with the centre of the image kept in place."""
    (a, b), (c, d) = linear
    x, y = size[1] / 2, size[0] / 2
    return matrix([a, b, x - a * x - b * y], [c, d, y - c * x - d * y])


def rotation(size, degrees) -> torch.Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return about(size, [[cos, -sin], [sin, cos]])


def shear(size, x: float, y: float) -> torch.Tensor:
    return about(size, [[1, x], [y, 1]])


def mapped_by_loop(boxes, m, size) -> tuple[list, list]:
    """Four corners, one after the other, then the hull, then the border of the image."""
    hulls, keep = [], []
    for x1, y1, x2, y2 in boxes.tolist():
        xs, ys = [], []
        for x, y in ((x1, y1), (x2, y1), (x1, y2), (x2, y2)):
            xs.append(float(m[0, 0] * x + m[0, 1] * y + m[0, 2]))
            ys.append(float(m[1, 0] * x + m[1, 1] * y + m[1, 2]))
        hull = [min(xs), min(ys), max(xs), max(ys)]
        limits = [size[1], size[0], size[1], size[0]]
        hull = [min(max(value, 0.0), limit) for value, limit in zip(hull, limits)]
        hulls.append(hull)
        keep.append(hull[2] > hull[0] and hull[3] > hull[1])
    return hulls, keep


def some_boxes(count: int, size) -> torch.Tensor:
    corners = torch.rand(count, 2, 2) * torch.tensor([size[1], size[0]])
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


def still_target(boxes, size, **others) -> dict:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "size": size, **others}


# map_boxes


@pytest.mark.parametrize("name", ["flip", "rotate", "shear", "anything"])
def test_map_boxes_equals_a_loop_over_corners(name):
    size = (60, 90)
    matrices = {
        "flip": matrix([-1.0, 0, 90], [0, 1, 0]),
        "rotate": rotation(size, 25),
        "shear": shear(size, 0.4, -0.2),
        "anything": matrix([0.7, -0.5, 40], [0.6, 1.1, -30]),
    }
    boxes = some_boxes(50, size)
    found, keep = map_boxes(boxes, matrices[name], size)
    hulls, kept = mapped_by_loop(boxes, matrices[name], size)
    assert torch.allclose(found, torch.tensor(hulls), atol=1e-3)
    assert keep.tolist() == kept


def test_map_boxes_exactly():
    box = torch.tensor([[10.0, 20, 30, 50]])
    size = (100, 80)
    assert torch.equal(map_boxes(box, torch.eye(3), size)[0], box)
    assert map_boxes(box, matrix([-1.0, 0, 80], [0, 1, 0]), size)[0].tolist() == [[50, 20, 70, 50]]
    assert map_boxes(box, matrix([2.0, 0, 0], [0, 0.5, 0]), (50, 160))[0].tolist() == [
        [20, 10, 60, 25]
    ]
    assert map_boxes(box, matrix([1.0, 0, -15], [0, 1, 60]), size)[0].tolist() == [
        [0, 80, 15, 100]
    ]  # clamped


def test_boxes_out_of_view_are_not_kept():
    boxes = torch.tensor([[10.0, 20, 30, 50], [60, 20, 75, 50], [79, 20, 80, 21]])
    found, keep = map_boxes(boxes, matrix([1.0, 0, 30], [0, 1, 0]), (100, 80))
    assert keep.tolist() == [True, False, False] and found.shape == (3, 4)
    assert (found[1, 2] - found[1, 0]) == 0
    assert map_boxes(torch.tensor([[5.0, 5, 5, 9]]), torch.eye(3), (100, 80))[1].tolist() == [False]
    none, keep = map_boxes(torch.zeros(0, 4), torch.eye(3), (100, 80))
    assert none.shape == (0, 4) and keep.shape == (0,)


def test_map_boxes_of_a_batch_equals_one_by_one():
    sizes = torch.tensor([[60, 90], [90, 60], [70, 70]])
    matrices = torch.stack(
        [rotation((60, 90), 20), shear((90, 60), 0.3, 0.1), matrix([-1.0, 0, 70], [0, 1, 9])]
    )
    boxes = torch.stack([some_boxes(6, tuple(size.tolist())) for size in sizes])
    found, keep = map_boxes(boxes, matrices, sizes)
    for image in range(3):
        alone = map_boxes(boxes[image], matrices[image], tuple(sizes[image].tolist()))
        assert torch.allclose(found[image], alone[0], atol=1e-4) and torch.equal(
            keep[image], alone[1]
        )


# Pixels


def white_hull(image: torch.Tensor) -> list[float]:
    rows, columns = np.nonzero(image[0].numpy() > 0.7)  # over the grey outside
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def rectangle(size, box) -> torch.Tensor:
    image = torch.zeros(3, *size)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 1.0
    return image


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
@pytest.mark.parametrize("name", ["flip", "scale", "rotate", "shear", "all"])
def test_warped_pixels_lie_where_the_mapped_box_says(name, size):
    height, width = size
    flip, scale = matrix([-1.0, 0, width], [0, 1, 0]), matrix([1.3, 0, -7], [0, 0.8, 3])
    turn, slant = rotation(size, 20), shear(size, 0.35, -0.15)
    moves = {
        "flip": flip,
        "scale": scale,
        "rotate": turn,
        "shear": slant,
        "all": flip @ slant @ turn @ scale,
    }
    box = [20, 24, 44, 36]
    moved = warp(rectangle(size, box), moves[name], size)
    expected, keep = map_boxes(torch.tensor([box], dtype=torch.float32), moves[name], size)
    assert keep.all()
    assert white_hull(moved) == pytest.approx(
        expected[0].tolist(), abs=1e-6 if name == "flip" else 1.6
    )


def test_warp_changes_the_canvas_and_is_grey_outside():
    image = torch.rand(3, 20, 30)
    moved = warp(image, matrix([1.0, 0, 5], [0, 1, 2]), (40, 50))
    assert moved.shape == (3, 40, 50)
    assert torch.allclose(moved[:, 2:22, 5:35], image, atol=1e-5)
    outside = torch.ones(40, 50, dtype=torch.bool)
    outside[2:22, 5:35] = False
    assert torch.allclose(moved[:, outside], torch.tensor(FILL), atol=1e-5)


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
@pytest.mark.parametrize("name", ["rotate", "shear x", "shear y", "shift"])
def test_warp_equals_torchvision(name, size):
    image = torch.rand(3, *size)
    angle, translate, slant, ours = {
        "rotate": (25.0, [0, 0], [0.0, 0.0], rotation(size, 25)),
        "shear x": (0.0, [0, 0], [20.0, 0.0], shear(size, -math.tan(math.radians(20)), 0)),
        "shear y": (0.0, [0, 0], [0.0, 15.0], shear(size, 0, -math.tan(math.radians(15)))),
        "shift": (0.0, [6, -4], [0.0, 0.0], matrix([1.0, 0, 6], [0, 1, -4])),
    }[name]
    theirs = F.affine(
        image,
        angle,
        translate,
        1.0,
        slant,
        interpolation=InterpolationMode.BILINEAR,
        fill=[FILL] * 3,
    )
    inside = (
        warp(torch.ones(3, *size), ours, size) > 1 - 1e-4
    )  # at the border the two blend with grey differently
    assert inside.float().mean() > 0.5
    assert torch.allclose(warp(image, ours, size)[inside], theirs[inside], atol=2e-3)


# Targets


def test_everything_that_belongs_to_a_box_follows_it():
    target = still_target(
        [[5, 5, 25, 25], [70, 5, 80, 25], [30, 40, 50, 60]],
        (80, 80),
        scores=torch.tensor([0.1, 0.2, 0.3]),
        crowd=torch.tensor([False, True, True]),
        difficult=torch.tensor([True, False, False]),
        area=torch.tensor([400.0, 200.0, 300.0]),
        image_id=17,
    )
    moved = map_target(target, matrix([2.0, 0, -20], [0, 1, 0]), (80, 120))
    assert moved["boxes"].tolist() == [[0, 5, 30, 25], [40, 40, 80, 60]]
    assert moved["labels"].tolist() == [0, 2]
    assert moved["scores"].tolist() == pytest.approx([0.1, 0.3])
    assert moved["crowd"].tolist() == [False, True] and moved["difficult"].tolist() == [True, False]
    assert moved["area"].tolist() == pytest.approx([800, 600])
    assert (moved["image_id"], moved["size"]) == (17, (80, 120))
    assert len(target["boxes"]) == 3  # the target given stays as it is


def test_a_box_is_dropped_when_less_than_a_share_of_it_is_left():
    target = still_target([[0, 0, 20, 10]], (40, 40))
    left = matrix([1.0, 0, -14], [0, 1, 0])  # 30 % stays
    assert len(map_target(target, left, (40, 40), visible=0.29)["boxes"]) == 1
    assert len(map_target(target, left, (40, 40), visible=0.31)["boxes"]) == 0


def test_matrices_chain_and_the_truth_moves_along():
    truth = still_target([[10, 10, 30, 20]], (40, 60), image_id=3)
    target = {"size": (40, 60), "image_id": 3, "truth": truth}
    first, second = rotation((40, 60), 10), matrix([-1.0, 0, 60], [0, 1, 0])
    moved = map_target(map_target(target, first, (40, 60)), second, (40, 60))
    assert "boxes" not in moved and "labels" not in moved
    assert torch.allclose(moved["matrix"], second @ first)
    once, _ = map_boxes(map_boxes(truth["boxes"], first, (40, 60))[0], second, (40, 60))
    assert torch.allclose(moved["truth"]["boxes"], once)
    assert torch.allclose(moved["truth"]["matrix"], moved["matrix"])


# Views


@pytest.fixture
def colourless(monkeypatch):
    monkeypatch.setattr(views, "color_augment", lambda image, rng: image)


MOVES = {
    "flip": {"flip": True},
    "zoom and shift": {"zoom": (0.8, 1.3), "shift": 0.1, "weak_zoom": (0.8, 1.0)},
    "resize": {"short_sides": (50, 80), "flip": True},
    "strong shift": {"strong_shift": 0.15},
    "rotate": {"strong_rotation": 25.0},
    "shear": {"strong_shear": 20.0},
    "all": {
        "flip": True,
        "zoom": (0.9, 1.1),
        "short_sides": (56, 72),
        "strong_rotation": 20.0,
        "strong_shear": 15.0,
    },
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("view", [weak_view, strong_view])
def test_every_view_shows_the_object_where_its_target_says(name, view, colourless):
    settings = ViewSettings(**{**STILL.__dict__, **MOVES[name]})
    box, moved = [30, 26, 56, 40], 0
    for size in ((64, 96), (96, 64)):
        for seed in range(8):
            target = still_target([box], size)
            image, seen = view(rectangle(size, box), target, np.random.default_rng(seed), settings)
            assert tuple(image.shape[1:]) == seen["size"]
            if len(seen["boxes"]):
                assert white_hull(image) == pytest.approx(seen["boxes"][0].tolist(), abs=1.6)
                again, _ = map_boxes(target["boxes"], seen["matrix"], seen["size"])
                assert torch.allclose(seen["boxes"], again, atol=1e-3)
                moved += not torch.equal(seen["boxes"], target["boxes"])
    assert moved > 3 or (
        view is weak_view and name in ("strong shift", "rotate", "shear") and moved == 0
    )


def test_views_without_any_freedom_leave_image_and_boxes_alone(colourless):
    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    target = still_target([[3, 4, 20, 25]], (30, 40))
    for view in (weak_view, strong_view, labelled_view):
        seen, moved = view(image, target, np.random.default_rng(0), STILL)
        assert torch.allclose(seen, image.float() / 255, atol=1e-5)
        assert torch.allclose(moved["boxes"], target["boxes"], atol=1e-4)
        assert torch.allclose(moved["matrix"], torch.eye(3), atol=1e-6)


def test_the_teacher_sees_the_whole_image_however_far_the_students_views_go(colourless):
    settings = ViewSettings(**{**STILL.__dict__, "zoom": (0.5, 2.0), "shift": 0.3})
    target = still_target([[3, 4, 20, 25]], (30, 40))
    moved = {
        view: [
            view(torch.rand(3, 30, 40), target, np.random.default_rng(seed), settings)[1]
            for seed in range(4)
        ]
        for view in (weak_view, labelled_view, strong_view)
    }
    assert all(torch.allclose(seen["matrix"], torch.eye(3), atol=1e-6) for seen in moved[weak_view])
    for view in (labelled_view, strong_view):
        assert not any(
            torch.allclose(seen["matrix"], torch.eye(3), atol=1e-2) for seen in moved[view]
        )


def test_the_strong_view_has_a_zoom_of_its_own(colourless):
    target = still_target([[10, 10, 20, 20]], (30, 40))
    settings = ViewSettings(**{**STILL.__dict__, "zoom": (0.5, 0.5), "strong_zoom": (2.0, 2.0)})
    scales = {}
    for view in (weak_view, labelled_view, strong_view):
        moved = view(torch.rand(3, 30, 40), target, np.random.default_rng(0), settings)[1]
        scales[view] = float(moved["matrix"][0, 0])
    assert scales == {weak_view: 1.0, labelled_view: 0.5, strong_view: 2.0}
    zoomed = ViewSettings(**{**STILL.__dict__, "weak_zoom": (0.5, 0.5)})
    moved = weak_view(torch.rand(3, 30, 40), target, np.random.default_rng(0), zoomed)[1]
    assert moved["boxes"].tolist() == [[15, 12.5, 20, 17.5]]


def test_a_mirrored_view_is_the_mirror_image():
    image, target = torch.rand(3, 30, 41), still_target([[3, 4, 20, 25]], (30, 41))
    settings, mirrored = ViewSettings(**{**STILL.__dict__, "flip": True}), 0
    for seed in range(8):
        seen, moved = weak_view(image, target, np.random.default_rng(seed), settings)
        if not torch.equal(moved["boxes"], target["boxes"]):
            assert torch.allclose(seen, image.flip(-1), atol=1e-4)
            assert moved["boxes"].tolist() == [[21, 4, 38, 25]]
            mirrored += 1
    assert 0 < mirrored < 8


def test_a_box_travels_from_the_weak_to_the_strong_view_by_their_matrices(colourless):
    """Flips, shifts and sizes keep boxes boxes, so that both ways agree exactly."""
    settings = ViewSettings(
        **{**STILL.__dict__, "flip": True, "short_sides": (64, 80), "strong_shift": 0.1}
    )
    truth = still_target([[30, 26, 56, 40], [40, 40, 50, 44]], (64, 96))
    target = {"size": (64, 96), "truth": truth}
    for seed in range(10):
        rngs = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
        _, weak = weak_view(torch.rand(3, 64, 96), target, rngs[0], settings)
        _, strong = strong_view(torch.rand(3, 64, 96), target, rngs[1], settings)
        transfer = strong["matrix"] @ torch.linalg.inv(weak["matrix"])
        carried, keep = map_boxes(weak["truth"]["boxes"], transfer, strong["size"])
        assert keep.all() and torch.allclose(carried, strong["truth"]["boxes"], atol=1e-3)


def test_strong_views_of_the_digits_preset_have_a_zoom_of_their_own():
    """Rotation and shear change no area by more than 2 %, so the matrix tells the zoom."""
    settings, size = PRESETS["digits"].views, (96, 96)
    zooms = {}
    for view in (strong_view, labelled_view, weak_view):
        matrices = []
        for seed in range(150):
            generator = np.random.default_rng(seed)
            target = {"size": size, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
            matrices.append(view(torch.zeros(3, *size), target, generator, settings)[1]["matrix"])
        zooms[view] = torch.stack([torch.det(matrix[:2, :2]).abs().sqrt() for matrix in matrices])
    assert 0.64 < zooms[strong_view].min() < 0.7 and 1.4 < zooms[strong_view].max() < 1.53
    assert 0.849 < zooms[labelled_view].min() and zooms[labelled_view].max() < 1.181
    assert 0.949 < zooms[weak_view].min() and zooms[weak_view].max() < 1.001


def test_strong_geometry_keeps_to_its_limits():
    size, kinds, turns, slants = (60, 90), set(), [], []
    settings = ViewSettings(
        flip=False, strong_shift=0.1, strong_rotation=30.0, strong_shear=40.0, patches=0
    )
    for seed in range(200):
        target = {"size": size}
        m = strong_view(torch.zeros(3, *size), target, np.random.default_rng(seed), settings)[1][
            "matrix"
        ]
        linear, centre = m[:2, :2], m @ torch.tensor([45.0, 30, 1])
        if torch.allclose(linear, torch.eye(2)):
            kinds.add("x" if m[0, 2] else "y")
            assert abs(m[0, 2]) <= 9.001 and abs(m[1, 2]) <= 6.001 and 0 in (m[0, 2], m[1, 2])
            continue
        assert torch.allclose(centre[:2], torch.tensor([45.0, 30]), atol=1e-3)
        assert torch.det(linear) == pytest.approx(1, abs=1e-4)
        if torch.allclose(linear @ linear.T, torch.eye(2), atol=1e-5):
            kinds.add("rotate")
            turns.append(abs(math.degrees(math.atan2(linear[1, 0], linear[0, 0]))))
        else:
            kinds.add("shear")
            assert linear[0, 0] == 1
            slants += [abs(linear[0, 1].item()), abs(linear[1, 0].item())]
    assert kinds == {"x", "y", "rotate", "shear"}
    assert 27 < max(turns) <= 30.001
    assert math.tan(math.radians(36)) < max(slants) <= math.tan(math.radians(40)) + 1e-5


def test_views_are_functions_of_their_generator():
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    before = image.clone()
    target = still_target([[10, 10, 30, 30]], (48, 64))
    settings = ViewSettings(zoom=(0.9, 1.1), shift=0.1, weak_zoom=(0.8, 0.95))
    for view in (labelled_view, weak_view, strong_view):
        seen = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(seen))  # no global generator takes part
            seen.append(view(image, target, np.random.default_rng(seed), settings))
        assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(
            seen[0][1]["boxes"], seen[1][1]["boxes"]
        )
        assert not torch.equal(seen[0][0], seen[2][0])
        assert seen[0][0].dtype == torch.float32 and 0 <= seen[0][0].min() and seen[0][0].max() <= 1
    assert torch.equal(image, before)


@pytest.mark.parametrize("view", [labelled_view, weak_view, strong_view])
def test_bytes_that_are_resized_stay_bytes_and_show_what_floats_show(view):
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(60, 200, (3, 12, 16), dtype=np.uint8))
    image = F.resize(
        coarse, [48, 64]
    )  # smooth, so that rounding before equalize and the like moves little
    target = still_target([[10, 10, 30, 30]], (48, 64))
    settings, far = ViewSettings(short_sides=(72, 96), patches=2), []
    for seed in range(25):
        seen, moved = view(image, target, np.random.default_rng(seed), settings)
        wanted, expected = view(image.float() / 255, target, np.random.default_rng(seed), settings)
        assert seen.dtype == torch.uint8 and wanted.dtype == torch.float32
        assert tuple(seen.shape[1:]) == moved["size"] and torch.equal(
            moved["matrix"], expected["matrix"]
        )
        far.append(float((seen.float() / 255 - wanted).abs().mean()))
    assert np.median(far) < 0.004 and max(far) < 0.03
    assert np.sum(np.array(far) > 0.01) <= 3  # the hard steps of solarize, equalize and posterize


@pytest.mark.parametrize(
    "image", [torch.rand(3, 30, 41), torch.randint(0, 256, (3, 30, 41), dtype=torch.uint8)]
)
def test_a_mirror_is_exact_and_no_move_is_none(image):
    assert torch.equal(warp(image, matrix([-1.0, 0, 41], [0, 1, 0]), (30, 41)), image.flip(-1))
    assert torch.equal(warp(image, torch.eye(3), (30, 41)), image)
    assert warp(image, torch.eye(3), (20, 50)).shape == (3, 20, 50)


def test_bytes_and_floats_are_warped_alike():
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    for move in (
        rotation((60, 90), 20),
        shear((60, 90), 0.3, -0.2),
        matrix([1.3, 0, -7.5], [0, 0.8, 3]),
    ):
        ours, floats = warp(image, move, (70, 80)), warp(image.float() / 255, move, (70, 80))
        assert ours.dtype == torch.uint8 and (ours.float() - 255 * floats).abs().max() <= 0.52


def test_an_image_without_boxes_goes_through_every_view():
    for view in (labelled_view, weak_view, strong_view):
        target = view(
            torch.rand(3, 40, 60),
            still_target([], (40, 60)),
            np.random.default_rng(0),
            ViewSettings(),
        )[1]
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_resized_keeps_the_ratio_and_bounds_the_long_side():
    assert resized((480, 640), 800, 1333) == (800, 1067)
    assert resized((640, 480), 800, 1333) == (1067, 800)
    assert resized((400, 1600), 800, 1333) == (333, 1333)
    assert resized((1, 5000), 800, 1333) == (1, 1333)


# Patches


def test_erased_patches_keep_to_their_limits():
    height, width = 50, 80
    image = torch.rand(3, height, width) * 0.2
    settings = ViewSettings(patches=1, patch_side=0.3)
    sides = set()
    for seed in range(100):
        erased = random_erase(image, np.random.default_rng(seed), settings)
        rows, columns = np.nonzero((erased != image).any(0).numpy())
        if not len(rows):
            continue
        h, w = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert len(rows) == h * w  # one whole rectangle
        assert h <= 0.3 * height and w <= 0.3 * width and abs(h / height - w / width) < 0.03
        assert torch.allclose(erased[:, rows, columns], torch.tensor(FILL))
        sides.add(int(h))
    assert len(sides) > 8 and max(sides) >= 13


def test_the_number_of_erased_patches():
    image, settings = torch.zeros(3, 1000, 1000), ViewSettings(patches=4, patch_side=0.2)
    shares = [
        float(random_erase(image, np.random.default_rng(seed), settings).bool().float().mean())
        for seed in range(40)
    ]
    assert 0.04 < max(shares) <= 4 * 0.04  # more than one patch, at most four
    assert random_erase(image, np.random.default_rng(0), ViewSettings(patches=0)) is image


# Colour


class Scripted:
    """A generator that answers what it is told."""

    def __init__(self, *answers: int):
        self.answers = list(answers)

    def integers(self, *limits: int) -> int:
        answer = self.answers.pop(0)
        low, high = limits if len(limits) == 2 else (0, limits[0])
        assert low <= answer < high
        return answer


OPERATIONS = range(9)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_colour_operations_run_on_constant_images(operation):
    for value in (0.0, 125 / 255, 1.0):
        for magnitude in (1, 5, 9):
            image = torch.full((3, 12, 17), value)
            seen = color_augment(image, Scripted(magnitude, operation))
            assert seen.shape == image.shape and seen.dtype == torch.float32
            assert seen.isfinite().all() and 0 <= seen.min() and seen.max() <= 1
            assert (image == value).all()


def by_pillow(picture: Image.Image, operation: int, magnitude: int) -> Image.Image:
    factor = 0.18 * magnitude + 0.1
    return (
        lambda: picture,
        lambda: ImageOps.autocontrast(picture),
        lambda: ImageOps.equalize(picture),
        lambda: ImageOps.solarize(picture, int(25.6 * magnitude)),
        lambda: ImageEnhance.Color(picture).enhance(factor),
        lambda: ImageEnhance.Contrast(picture).enhance(factor),
        lambda: ImageEnhance.Brightness(picture).enhance(factor),
        lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        lambda: ImageOps.posterize(picture, 4 - int(0.4 * magnitude)),
    )[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("magnitude", [3, 6, 8])
def test_colour_operations_equal_pillow(operation, magnitude):
    rng = np.random.default_rng(operation)
    array = np.clip(rng.normal(120, 40, (24, 31, 3)), 20, 230).astype(np.uint8)
    array[array == int(25.6 * magnitude)] += 1  # solarising starts within this value
    theirs = np.asarray(by_pillow(Image.fromarray(array), operation, magnitude)).astype(float)
    image = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    ours = color_augment(image, Scripted(magnitude, operation)).permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - theirs).max() <= 2.0  # Pillow rounds in between
    if operation:
        assert np.abs(theirs - array).max() > 2.0
    bytes_ = color_augment(torch.from_numpy(array).permute(2, 0, 1), Scripted(magnitude, operation))
    assert np.abs(bytes_.permute(1, 2, 0).numpy() - theirs).max() <= 1.0


def test_a_smaller_view_averages_the_pixels_it_drops():
    """Without antialiasing a fine checkerboard would stay black and white."""
    settings = ViewSettings(**{**STILL.__dict__, "short_sides": (16,)})
    rows = torch.arange(48)
    board = ((rows[:, None] + rows) % 2 * 255).to(torch.uint8).expand(3, 48, 48).contiguous()
    for image in (board, board.float() / 255):
        view, _ = weak_view(image, {"size": (48, 48)}, np.random.default_rng(0), settings)
        grey = view.float() / (255 if view.dtype == torch.uint8 else 1)
        assert view.shape == (3, 16, 16) and (grey - 0.5).abs().max() < 0.05
