"""The inputs that exercises are compared on: {what is special about the case: arguments}.

Each function makes the cases of one exercise from a seeded generator. Beside random cases there are
adversarial ones, in which each known mistake gives another result than the right answer.
"""

import numpy as np
import torch

from semidetr_lite.boxes import to_model

Cases = dict[str, tuple]

WIDE, TALL = (96, 128), (200, 50)  # (H, W)
SHIFT = torch.tensor([[1.0, 0.0, 60.0], [0.0, 1.0, 60.0], [0.0, 0.0, 1.0]])
TURN = torch.tensor([[1.1, 0.3, -30.0], [-0.3, 1.1, 9.0], [0.0, 0.0, 1.0]])
SCENE = torch.tensor([[20.0, 20, 50, 50], [28.0, 22, 58, 52], [24.0, 34, 54, 64]])


def _normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.tensor(rng.normal(0, 1, shape), dtype=torch.float32)


def _uniform(rng: np.random.Generator, low: float, high: float, shape) -> torch.Tensor:
    return torch.tensor(rng.uniform(low, high, shape), dtype=torch.float32)


def _boxes(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 4) xyxy within 95 pixels."""
    corners = rng.uniform(0, 70, (count, 2))
    boxes = np.hstack([corners, corners + rng.uniform(5, 25, (count, 2))])
    return torch.tensor(boxes, dtype=torch.float32)


# ---- 01 and 02: boxes, views, evaluation ---------------------------------------------------------


def pairwise_iou(rng: np.random.Generator) -> Cases:
    cases: Cases = {"a box and itself": (_boxes(rng, 1),) * 2}
    cases["9 and 7"] = (_boxes(rng, 9), _boxes(rng, 7))
    one = torch.tensor([[10.0, 10, 30, 20]])
    others = [
        [40.0, 40, 60, 50],
        [30, 10, 50, 20],
        [15, 12, 20, 18],
        [0, 0, 90, 60],
        [0, 30, 9, 90],
    ]
    cases["apart, touching, inside, around"] = (one, torch.tensor(others))
    cases["no box"] = (torch.zeros(0, 4), _boxes(rng, 2))
    return cases


def to_model_boxes(rng: np.random.Generator) -> Cases:
    cases: Cases = {"wide": (_boxes(rng, 3), WIDE), "tall": (_boxes(rng, 3), TALL)}
    return cases | {"no box": (torch.zeros(0, 4), WIDE)}


def to_pixel_boxes(rng: np.random.Generator) -> Cases:
    cases: Cases = {"wide": (_boxes(rng, 3) / 99, WIDE), "tall": (_boxes(rng, 3) / 99, TALL)}
    return cases | {"no box": (torch.zeros(0, 4), WIDE)}


def map_boxes(rng: np.random.Generator) -> Cases:
    still = torch.eye(3)
    over_edges = [[-20.0, 30, 20, 50], [110, 30, 150, 50], [40, -15, 60, 20], [40, 80, 60, 120]]
    outside = [[-40.0, 10, -5, 30], [140, 10, 160, 30], [10, -40, 30, -9], [10, 99, 30, 140]]
    thin = torch.tensor([[5.0, 5, 5.0005, 20], [5, 5, 20, 5.0005], [5, 5, 5.01, 20], [9, 9, 9, 20]])
    return {
        "zoomed and turned": (_boxes(rng, 5), TURN, WIDE),
        "over all four edges of a wide image": (torch.tensor(over_edges), still, WIDE),
        "over the edges of a tall image": (torch.tensor(over_edges), still, TALL),
        "outside": (torch.tensor(outside), still, WIDE),
        "sides about 0.001 pixel long": (thin, still, WIDE),
        "no box": (torch.zeros(0, 4), TURN, WIDE),
    }


def _hits(text: str) -> torch.Tensor:
    """Hits by falling score: "1" is a hit, "0" a false alarm."""
    return torch.tensor([letter == "1" for letter in text])


def precision_recall(rng: np.random.Generator) -> Cases:
    return {
        "10 objects": (_hits("1101001"), 10),
        "the first is wrong": (_hits("01011"), 3),
        "no hit": (_hits("000"), 2),
    }


def average_precision(rng: np.random.Generator) -> Cases:
    return {
        "all found": (_hits("11"), 2),
        "a third missed": (_hits("1101001"), 6),
        "precision rises again": (_hits("0111"), 3),
        "falls and rises": (_hits("1000111101"), 7),
        "no hit": (_hits("000"), 3),
        "one of many objects": (_hits("01"), 7),
    }


# ---- 03: DETR ------------------------------------------------------------------------------------


def sine_positions(rng: np.random.Generator) -> Cases:
    return {
        "one number": (torch.tensor([[0.25]]), 4, 100.0),
        "boxes": (_uniform(rng, 0, 1, (3, 4)), 8, 20.0),
        "more leading dimensions": (_uniform(rng, 0, 1, (2, 3, 2)), 6, 20.0),
    }


def attention(rng: np.random.Generator) -> Cases:
    cases: Cases = {}
    for heads in (1, 2, 4):
        cases[f"{heads} heads"] = (*(_normal(rng, count, 8) for count in (3, 5, 5)), heads)
    return cases


def map_positions(rng: np.random.Generator) -> Cases:
    sizes = {"square": (3, 3), "wide": (3, 5), "tall": (4, 1)}
    return {note: (*size, 8, 20.0) for note, size in sizes.items()}


# ---- 04: matching --------------------------------------------------------------------------------


def _scenes(rng: np.random.Generator, *more) -> Cases:
    """{note: (logits, pred_boxes, target, *more)}, predictions around the objects of an image."""
    cases: Cases = {}
    scenes = (("three objects", 6, 3), ("one object", 2, 1), ("no object", 4, 0))
    for note, queries, objects in scenes:
        truth = _boxes(rng, objects)
        truth[1:2] = truth[:1] + 4  # a crowded pair, if there are two
        near = truth[rng.integers(objects, size=queries)] if objects else _boxes(rng, queries)
        near = near + _uniform(rng, -4, 4, (queries, 4))
        logits = torch.tensor(rng.normal(-1, 1.5, (queries, 4)), dtype=torch.float32)
        cases[note] = (logits, to_model(near, WIDE), _target(truth), *more)
    return cases


def _target(boxes: torch.Tensor, size: tuple[int, int] = WIDE) -> dict:
    """Boxes (T, 4) as a target in which every box has a class of its own."""
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "size": size}


def _lonely(rng: np.random.Generator, *more) -> tuple:
    """(logits, pred_boxes, target, *more): of two objects one is touched by one query alone."""
    truth = torch.tensor([[4.0, 4, 44, 44], [80.0, 50, 120, 90]])
    near = truth[[0, 0, 0, 1]] + _uniform(rng, -4, 4, (4, 4))
    logits = torch.tensor(rng.normal(-1, 1.5, (4, 4)), dtype=torch.float32)
    return logits, to_model(near, WIDE), _target(truth), *more


def matching_cost(rng: np.random.Generator) -> Cases:
    cases = _scenes(rng)
    apart, size = _boxes(rng, 2) / 3, (300, 100)
    far = torch.tensor([[70.0, 200, 90, 290], [5.0, 150, 25, 180], [60.0, 10, 99, 40]])
    cases["boxes apart, in a tall image"] = (
        _normal(rng, 3, 4),
        to_model(far, size),
        _target(apart, size),
    )
    return cases


def one_to_one(rng: np.random.Generator) -> Cases:
    cases = _scenes(rng)
    near = [
        [26.0, 25, 56, 51],
        [36, 17, 60, 51],
        [31, 26, 55, 55],
        [31, 21, 52, 54],
        [16, 41, 60, 70],
    ]
    logits = [[-2.0, 1.5, 1.5], [0, 1, 1], [1, -1.5, -2], [-1, -1.5, 0], [1, 0.5, -0.5]]
    # each greedy choice costs more than the Hungarian one, and two objects like one query best
    pred_boxes = to_model(torch.tensor(near), WIDE)
    cases["objects that want the same query"] = (torch.tensor(logits), pred_boxes, _target(SCENE))
    cases["as many queries as objects"] = (
        torch.tensor(logits)[:3],
        pred_boxes[:3],
        _target(SCENE),
    )
    return cases


def one_to_many(rng: np.random.Generator) -> Cases:
    cases = _scenes(rng, 1.0, 2.0, 3) | {"few overlap": _lonely(rng, 1.0, 6.0, 4)}
    truth = torch.tensor([[20.0, 20, 50, 50], [28, 22, 58, 52], [80, 60, 110, 90]])
    near_boxes = [
        *([21.0, 30, 66, 55], [21.0, 21, 52, 54], [21.0, 25, 50, 48], [22.0, 27, 55, 55]),
        *([32.0, 25, 65, 55], [27.0, 24, 58, 50], [2.0, 70, 14, 90]),
    ]
    logits = [
        *([0.5, 1, 0.5], [-1.5, 0.5, 0], [-1.5, 0.5, 0.5], [1.0, 1, 1]),
        *([-2.0, -2, 1.5], [1.0, -1.5, -1], [-0.5, 1, 0]),
    ]
    # Every other choice of step 2 and of the maxima gives other pairs or qualities; the third
    # object overlaps no query, and the last query no object.
    inputs = torch.tensor(logits), to_model(torch.tensor(near_boxes), WIDE), _target(truth)
    cases["objects that want the same queries"] = (*inputs, 1.0, 2.0, 3)
    cases["more candidates than queries"] = (*inputs, 1.0, 2.0, 13)
    same = torch.tensor([[20.0, 20, 50, 50]] * 2)
    near = torch.tensor([[22.0, 20, 50, 50], [20.0, 24, 50, 50]])
    cases["two objects in one place"] = (
        torch.zeros(2, 2),
        to_model(near, WIDE),
        {"boxes": same, "labels": torch.zeros(2, dtype=torch.int64), "size": WIDE},
        1.0,
        6.0,
        2,
    )
    return cases


def one_to_many_losses(rng: np.random.Generator) -> Cases:
    truth = torch.tensor([[20.0, 20, 50, 60], [70.0, 10, 110, 30]])
    near = [[22.0, 20, 52, 64], [24.0, 26, 48, 56], [66.0, 10, 110, 32], [60.0, 70, 90, 90]]
    logits = [[1.0, -1, -2], [0.5, -2, 0], [-1.5, 2, -1], [-2.0, -1, 1]]
    matched = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([0.7, 0.4, 0.8])
    inputs = torch.tensor(logits), to_model(torch.tensor(near), WIDE)
    few = torch.tensor([1]), torch.tensor([0]), torch.tensor([0.3])
    none = torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0)
    apart = [[4.0, 100, 24, 140], [30.0, 20, 45, 40]]
    far = [[8.0, 20, 20, 60], [28.0, 120, 46, 170], [5.0, 96, 25, 140]]
    each = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0]), torch.tensor([0.9, 0.6, 0.5])
    return {
        "three pairs of four queries": (*inputs, _target(truth), *matched),
        "qualities that sum to less than 1": (*inputs, _target(truth), *few),
        "no object": (*inputs, _target(truth[:0]), *none),
        "boxes apart, in a tall image": (
            _normal(rng, 3, 4),
            to_model(torch.tensor(far), TALL),
            _target(torch.tensor(apart), TALL),
            *each,
        ),
    }


# ---- 05 and 06: Deformable DETR and DINO ---------------------------------------------------------


def point_attention(rng: np.random.Generator) -> Cases:
    cases: Cases = {}
    ends = {"inside": (0.2, 0.8), "partly outside": (-0.2, 0.9), "over all edges": (-0.2, 1.2)}
    for note, (low, high) in ends.items():
        feature_map, points = _normal(rng, 3, 5, 2), _uniform(rng, low, high, (9, 2))
        cases[note] = (feature_map, points, _normal(rng, 9).softmax(0))
    return cases


def refine(rng: np.random.Generator) -> Cases:
    return {
        f"references of {size}": (_normal(rng, 3, 4), _uniform(rng, 0, 1, (3, size)))
        for size in (4, 2)
    }


def places(rng: np.random.Generator) -> Cases:
    return {
        f"{height} x {width}": (torch.tensor([0.5, 0.25]), _normal(rng, 3, 2), (height, width))
        for height, width in ((4, 4), (2, 8))
    }


def group_mask(rng: np.random.Generator) -> Cases:
    return {"one group": ([3], 4), "three groups": ([2, 2, 3], 5), "no group": ([], 2)}


def noise_boxes(rng: np.random.Generator) -> Cases:
    negative = torch.tensor([False, True, False, True])
    cases: Cases = {}
    for amount in (0.4, 2.0):
        boxes = to_model(_boxes(rng, 4), WIDE)
        cases[f"noise {amount}"] = (boxes, negative, amount, _uniform(rng, 0, 1, (4, 8)))
    return cases


def select(rng: np.random.Generator) -> Cases:
    sure_of_one = torch.tensor([[4.0, -9.0], [1.0, 1.0], [2.0, -9.0], [-9.0, 3.0]])
    return {
        "8 of 10": (_normal(rng, 10, 3), _normal(rng, 10, 4), 8),
        "sure of one class": (sure_of_one, _normal(rng, 4, 4), 2),
    }


# ---- 07 and 08: mean teacher and query consistency -----------------------------------------------


def _weights(rng: np.random.Generator) -> dict:
    return {"w": _normal(rng, 2, 3), "steps": torch.tensor(rng.integers(9))}


def ema_update(rng: np.random.Generator) -> Cases:
    return {
        f"momentum {momentum}": (_weights(rng), _weights(rng), momentum)
        for momentum in (0.0, 0.5, 0.999, 1.0)
    }


def average(rng: np.random.Generator) -> Cases:
    moves = [_normal(rng, 3) for _ in range(5)]
    return {
        "one step": (torch.zeros(2), [torch.ones(2)], 0.5),
        "five steps": (torch.ones(3), moves, 0.9),
    }


def _pseudo(rng: np.random.Generator) -> dict:
    scores = torch.tensor([0.9, 0.7, 0.4, 0.39, 0.2])
    return {"boxes": _boxes(rng, 5), "labels": torch.arange(5), "scores": scores}


def to_strong_view(rng: np.random.Generator) -> Cases:
    return {
        "in view": (_pseudo(rng), TURN, WIDE, 0.4),
        "partly out of view": (_pseudo(rng), SHIFT, WIDE, 0.3),
        "nothing sure": (_pseudo(rng), TURN, WIDE, 0.95),
    }


def _embeddings(rng: np.random.Generator, queries: int) -> tuple:
    """Student and teacher as two layers of (2, queries, 6) each, and which queries are valid."""
    student, teacher = (
        torch.tensor(rng.normal(0, 2, (4, 2, queries, 6)), dtype=torch.float32) for _ in range(2)
    )
    return list(student), list(teacher), torch.tensor(rng.random((2, queries)) < 0.7)


def consistency_loss(rng: np.random.Generator) -> Cases:
    return {
        "some padded": _embeddings(rng, 5),
        "nothing valid": (*_embeddings(rng, 3)[:2], torch.zeros(2, 3).bool()),
    }


def _map(rng: np.random.Generator, height: int, width: int) -> torch.Tensor:
    return torch.tensor(rng.normal(0, 1, (2, 3, height, width)), dtype=torch.float32)


def box_cells(rng: np.random.Generator) -> Cases:
    one_map = [_map(rng, 24, 32)]
    cases: Cases = {"one map": (one_map, [(4.0, 4.0)], torch.tensor([0, 1, 1]), _boxes(rng, 3), 2)}
    pyramid = [_map(rng, 24, 32), _map(rng, 12, 16)]
    large = torch.tensor([[10.0, 10, 90, 80], [0, 0, 56, 56]])
    images = torch.tensor([0, 0, 1, 1])
    boxes = torch.cat([_boxes(rng, 2), large])
    cases["small and large"] = (pyramid, [(4.0, 4.0), (8.0, 8.0)], images, boxes, 3)
    middle = torch.tensor([[3.0, 5, 48, 50], [20.0, 20, 80, 88], [9, 9, 43, 43]])  # between levels
    strides = [(4.0, 3.0), (8.0, 6.0)]
    cases["strides that differ"] = (pyramid, strides, torch.tensor([1, 0, 1]), middle, 2)
    return cases


# ---- 09 to 11: mining, Semi-DETR, COCO -----------------------------------------------------------


def _costs(rng: np.random.Generator, low: int = 9, high: int = 5) -> np.ndarray:
    return np.hstack([rng.normal(-1.5, 0.4, low), rng.normal(2.0, 1.0, high)])


def em_step(rng: np.random.Generator) -> Cases:
    start = np.full(2, 0.5), np.array([-2.0, 4.0]), np.ones(2)
    later = np.array([0.8, 0.2]), np.array([-1.0, 1.0]), np.array([0.5, 3.0])
    narrow = np.array([0.5, 0.5]), np.array([-1.0, 3.0]), np.array([1e-5, 1e-5])
    return {
        "the start": (_costs(rng), *start),
        "on the way": (_costs(rng, 20, 3), *later),
        "no spread": (np.array([-1.0, -1.0, 3.0]), *narrow),
    }


def em_steps(rng: np.random.Generator) -> Cases:
    return {"five steps": (_costs(rng), 5), "two costs": (np.array([-1.0, 3.0]), 30)}


def mine(rng: np.random.Generator) -> Cases:
    costs = np.array([[-2.0, -1.0, np.nan], [0.5, -1.5, -3.0]])
    scores = np.array([[0.9, 0.2, 0.4], [0.8, 0.1, 0.3]])
    valid = np.array([[True, True, True], [True, True, False]])
    unsure = np.array([[0.1, 0.2, 0.3], [0.8, 0.1, 0.9]])
    padded = np.array([[True, True, True], [False, True, False]])
    return {
        "six boxes": (costs, scores, valid, -1.0, 0.4),
        "unsure or padded": (costs, unsure, padded, -1.0, 0.4),
    }


def stage(rng: np.random.Generator) -> Cases:
    return {
        "the last step of stage one": (599, 0, 1500, 0.4),
        "the first of stage two": (600, 0, 1500, 0.4),
        "after a burn-in": (1599, 1000, 1500, 0.4),
        "early after a burn-in": (700, 500, 1500, 0.4),
        "stage two after a burn-in": (1600, 1000, 1500, 0.4),
        "no stage one": (0, 0, 1500, 0.0),
        "no stage two": (1499, 0, 1500, 1.0),
        "2.8 steps": (2, 0, 7, 0.4),
    }


def _recorded(rng: np.random.Generator, **seeds: int) -> list[dict]:
    """Lines of an ablation: so many seeds of each row, "all" for supervised with all labels."""
    lines = []
    for name, count in seeds.items():
        row, percent = ("supervised", 100.0) if name == "all" else (name, 10.0)
        line = {
            "table": "main",
            "preset": "digits",
            "detector": "dino",
            "row": row,
            "percent": percent,
            "AP50": 0.9,
            "seconds": 60.0,
        }
        lines += [line | {"seed": seed, "AP": rng.uniform(0.4, 0.8)} for seed in range(count)]
    return lines


def gap_closed(rng: np.random.Generator) -> Cases:
    return {
        "one seed": (_recorded(rng, supervised=1, all=1, ours=1), "ours", 10.0),
        "more seeds of some rows": (_recorded(rng, supervised=3, all=1, ours=2), "ours", 10.0),
        "the lower end": (_recorded(rng, supervised=2, all=1, ours=1), "supervised", 10.0),
        "no run with all labels": (_recorded(rng, supervised=1, ours=2), "ours", 10.0),
        "no run of the row": (_recorded(rng, supervised=2, all=1), "ours", 10.0),
    }


def resumed(rng: np.random.Generator) -> Cases:
    shapes = {"weight": (2, 3), "bias": (2,)}
    parts = ("student", "teacher")
    method = {f"{part}.{name}": _normal(rng, *shapes[name]) for part in parts for name in shapes}
    return {"after a burn-in": ({"method": method, "step": 250, "offset": 1000},)}


def labelled_indices(rng: np.random.Generator) -> Cases:
    return {
        "10 % of 400": (400, 10.0, 1),
        "another fold": (400, 10.0, 2),
        "5 % of 118, rounded": (118, 5.0, 1),
        "1 % of 30, at least one": (30, 1.0, 1),
        "10 % of 43, rounded down": (43, 10.0, 3),
    }


def of_process(rng: np.random.Generator) -> Cases:
    return {
        f"process {process}": (list(range(100, 160)), 10.0, 2, process) for process in (0, 3, 2)
    }


def _batch(labelled: int, unlabelled: int) -> dict:
    batch = {}
    counts = {"labelled": labelled, "weak": unlabelled, "strong": unlabelled}
    for name, count in counts.items():
        images = [torch.full((1,), number) for number in range(count)]
        batch[name] = (images, [{"id": number} for number in range(count)])
    return batch


def micro_batches(rng: np.random.Generator) -> Cases:
    return {
        "equal parts": (_batch(4, 8), 4),
        "unequal ones": (_batch(3, 7), 2),
        "one": (_batch(1, 2), 1),
        "unequal thirds": (_batch(4, 8), 3),
    }


def coco_box(rng: np.random.Generator) -> Cases:
    return {
        "a box in the middle": ((11, 21, 40, 60),),
        "the first pixel of the image": ((1, 1, 1, 1),),
        "one row of pixels": ((5, 7, 9, 7),),
        "wide and flat": ((3, 90, 200, 96),),
    }


def validation_groups(rng: np.random.Generator) -> Cases:
    films = ["a", "a", "a", "b", "b", "c", "d", "e", "e", "e"]
    mixed = [f"film {rng.integers(6)}" for _ in range(30)]
    return {
        "in the order of the films": (films, 0.2),
        "films that alternate": (["b", "a", "c", "b", "a", "c", "b", "a", "d", "e"], 0.3),
        "mixed": (mixed, 0.2),
        "exactly enough": (["b", "a", "c", "d"], 0.25),
        "one long film": (["a"] * 7 + ["b", "c", "d"], 0.5),
        "many short ones after a long one": (["d"] * 6 + ["a", "b", "c", "e"], 0.35),
    }
