"""The twelve figures against a case worked by hand and COCO's published ones; box errors against a
double loop.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from semidetr_lite import evaluate as evaluation
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import FIGURES, box_errors, evaluate, evaluate_classes, to_coco_json

EVALUATORS = [
    name for name in ("pycocotools", "hotcoco") if importlib.util.find_spec(name) is not None
]
needs_hotcoco = pytest.mark.skipif("hotcoco" not in EVALUATORS, reason="hotcoco is not installed")
REFERENCE = Path(__file__).parents[2] / "shared" / "data" / "coco-eval-ref"


def truth(*boxes, labels=None, **others) -> dict:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "size": (100, 100), **others}


def found(*boxes, scores=(), labels=None) -> dict:
    return truth(*boxes, labels=labels, scores=torch.tensor(scores, dtype=torch.float32))


def shift(box: list, right: float) -> list:
    return [box[0] + right, box[1], box[2] + right, box[3]]


def same(figures: dict, others: dict) -> None:
    assert figures.keys() == others.keys()
    for name, value in figures.items():
        assert value == pytest.approx(others[name], nan_ok=True), name


BOX = [10, 10, 50, 50]  # 40 x 40: medium
THREE_TRUTHS = [truth(BOX), truth(BOX), truth(BOX)]
# By falling score: right at every threshold; wrong; IoU 32 / 48 = 0.667, so right at 0.50 ... 0.65.
THREE_FOUND = [
    found(BOX, scores=[0.9]),
    found([60, 60, 90, 90], scores=[0.8]),
    found(shift(BOX, 8), scores=[0.7]),
]


def test_three_images_by_hand():
    figures = evaluate(THREE_FOUND, THREE_TRUTHS)
    # Precision is 1 at the 34 recall steps up to 1/3 and, at the four low thresholds, 2/3 at the 33
    # steps up to 2/3.
    low, high = (34 + 33 * 2 / 3) / 101, 34 / 101
    ap, ar = (4 * low + 6 * high) / 10, (4 * 2 / 3 + 6 * 1 / 3) / 10
    nan = math.nan
    precision = {
        "AP": ap,
        "AP50": low,
        "AP75": high,
        "AP_small": nan,
        "AP_medium": None,
        "AP_large": nan,
    }
    recall = {"AR1": ar, "AR10": ar, "AR100": ar, "AR_small": nan, "AR_medium": ar, "AR_large": nan}
    # Among the medium boxes the wrong one, 30 x 30 and matched with nothing, does not count: 67
    # steps at precision 1.
    precision["AP_medium"] = (4 * 67 / 101 + 6 * 34 / 101) / 10
    same(figures, {**precision, **recall})
    assert tuple(figures) == FIGURES


def test_one_thing_at_a_time():
    # a detection of another class is not right, and the AP is the mean over the two classes that
    # have truth
    two = [truth(BOX, [60, 60, 90, 90], labels=[0, 4])]
    assert evaluate([found(BOX, [60, 60, 90, 90], scores=[0.9, 0.8], labels=[0, 3])], two)[
        "AP"
    ] == pytest.approx(0.5)
    # the better score takes the box, the other one is a false alarm that comes after it
    twice = evaluate([found(BOX, BOX, scores=[0.3, 0.6])], [truth(BOX)])
    assert twice["AP"] == pytest.approx(1) and twice["AR1"] == pytest.approx(1)
    # "area" says small where the box is medium
    assert evaluate([found(BOX, scores=[1.0])], [truth(BOX, area=torch.tensor([50.0]))])[
        "AP_small"
    ] == pytest.approx(1)


def test_crowd_takes_detections_out_of_the_count():
    crowd = truth(BOX, [0, 0, 100, 100], crowd=torch.tensor([False, True]))
    inside = found([60, 60, 80, 80], [70, 70, 90, 90], BOX, scores=[0.9, 0.8, 0.7])
    assert evaluate([inside], [crowd])["AP"] == pytest.approx(1)
    plain = {**crowd, "crowd": torch.tensor([False, False])}
    assert evaluate([inside], [plain])["AP"] < 0.5


def test_at_most_100_detections_of_an_image_the_best_ones():
    noise = [[60, 60, 61 + i / 10, 61 + i / 10] for i in range(120)]
    others = [1] * 120
    first = found(BOX, *noise, scores=[0.9, *[0.5] * 120], labels=[0, *others])
    last = found(BOX, *noise, scores=[0.1, *[0.5] * 120], labels=[0, *others])
    assert evaluate([first], [truth(BOX)])["AP"] == pytest.approx(1)
    assert evaluate([last], [truth(BOX)])["AP"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_no_detection(bad):
    assert evaluate([found([bad, 10, 50, 50], scores=[0.9])], [truth(BOX)])["AP"] == 0
    assert evaluate([found(BOX, scores=[bad])], [truth(BOX)])["AP"] == 0


def test_nothing_found_and_nothing_to_find():
    nothing = found()
    missed = evaluate([nothing, nothing], [truth(BOX), truth()])
    assert missed["AP"] == 0 and missed["AR_medium"] == 0 and math.isnan(missed["AP_large"])
    for detections, targets in (
        ([], []),
        ([nothing], [truth()]),
        ([found(BOX, scores=[0.5])], [truth()]),
    ):
        assert all(math.isnan(value) for value in evaluate(detections, targets).values())
    only_crowd = truth(BOX, crowd=torch.tensor([True]))
    assert math.isnan(evaluate([found(BOX, scores=[0.5])], [only_crowd])["AP"])


def test_silent_and_its_input_untouched(capsys):
    before = [detection["boxes"].clone() for detection in THREE_FOUND]
    evaluate(THREE_FOUND, THREE_TRUTHS)
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(box, detection["boxes"]) for box, detection in zip(before, THREE_FOUND))
    assert set(THREE_TRUTHS[0]) == {"boxes", "labels", "size"}


def test_lists_of_unequal_length():
    with pytest.raises(ValueError, match="2 detections for 3 targets"):
        evaluate(THREE_FOUND[:2], THREE_TRUTHS)


CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]


def coco_truth(targets: list[dict]) -> dict:
    """Targets as a COCO json; ids of images are 10, 20 ... and of annotations 0, 1 ... (pycocotools
    trips over 0).
    """
    rows = []
    for image, target in enumerate(targets, 1):
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
            box = {
                "image_id": 10 * image,
                "category_id": CATEGORIES[label]["id"],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            rows.append({"id": len(rows), **box})
    images = [{"id": 10 * image} for image in range(1, len(targets) + 1)]
    return {"images": images, "annotations": rows, "categories": CATEGORIES}


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def random_scenes(count: int = 20) -> tuple[list[dict], list[dict]]:
    """Random truth and detections near it, with duplicates, misses, wrong classes and boxes out of
    nowhere.
    """
    detections, targets = [], []
    for _ in range(count):
        corner, side = torch.rand(6, 2) * 80, torch.rand(6, 2) * 60 + 4
        boxes, labels = torch.cat([corner, corner + side], dim=1), torch.randint(2, (6,))
        moved = torch.cat(
            [boxes + torch.randn(6, 4), boxes[:3] + torch.randn(3, 4), boxes.flip(0) + 15]
        )
        names = torch.cat([labels, labels[:3], labels.flip(0)])
        known = int(torch.randint(6, (1,)))
        targets.append({"boxes": boxes[:known], "labels": labels[:known], "size": (150, 150)})
        detections.append(
            {"boxes": moved, "labels": names, "scores": torch.rand(15), "size": (150, 150)}
        )
    return detections, targets


def test_json_files_and_dicts_agree(tmp_path):
    detections, targets = random_scenes()
    ids = [10 * image for image in range(1, len(targets) + 1)]
    rows = to_coco_json(detections, ids, CATEGORIES)
    elsewhere = {
        "image_id": 5,
        "category_id": 7,
        "bbox": [0, 0, 9, 9],
        "score": 1.0,
    }  # of an image without truth
    results = write(tmp_path / "results.json", [elsewhere, *rows])
    figures = evaluate(results, str(write(tmp_path / "truth.json", coco_truth(targets))))
    others = evaluate(detections, targets)
    assert 0.1 < figures["AP"] < 0.9
    for name in FIGURES:
        assert figures[name] == pytest.approx(others[name], abs=1e-3, nan_ok=True)


@needs_hotcoco
@pytest.mark.parametrize("seed", range(20))
def test_hotcoco_gives_the_bits_of_pycocotools(seed):
    """Scenes with crowd regions, given areas, equal scores and images without truth."""
    torch.manual_seed(seed)
    detections, targets = random_scenes(count=1 + 3 * seed)
    for detection, target in zip(detections, targets, strict=True):
        count = len(target["boxes"])
        target |= {"crowd": torch.rand(count) < 0.2, "area": torch.rand(count) * 12_000}
        if seed % 2:
            detection["scores"] = (detection["scores"] * 4).round() / 4
    reference = evaluate(detections, targets, "pycocotools")
    fast = evaluate(detections, targets, "hotcoco")
    assert any(0 < value < 1 for value in reference.values())
    for name, value in reference.items():
        assert fast[name] == value or math.isnan(fast[name]) and math.isnan(value), name


@pytest.mark.parametrize("installed", [True, False])
def test_hotcoco_is_taken_where_it_is_installed(monkeypatch, installed):
    asked = []
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(evaluation, "_library", lambda name: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(THREE_FOUND, THREE_TRUTHS)
    assert asked == ["hotcoco" if installed else "pycocotools"]


def test_coco_json_rows():
    two = found([1, 2, 4, 6], [0, 0, 10, 10], scores=[0.25, 0.5], labels=[1, 0])
    rows = to_coco_json([two, found()], [30, 40], CATEGORIES)
    assert rows == [
        {"image_id": 30, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.25},
        {"image_id": 30, "category_id": 7, "bbox": [0, 0, 10, 10], "score": 0.5},
    ]


ROW = {"image_id": 10, "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    "content, words",
    [
        ({"images": []}, "list of detections"),
        ([ROW, 3], "detection number 2"),
        ([{**ROW, "bbox": [0, 0, 5]}], "bbox"),
        ([{**ROW, "score": None}], "score"),
        ([{**ROW, "category_id": 8}], "category_id unknown to the truth, 8"),
    ],
)
def test_bad_results_name_their_file(tmp_path, content, words):
    results = write(tmp_path / "results.json", content)
    with pytest.raises(UserError, match=words) as error:
        evaluate(results, write(tmp_path / "truth.json", coco_truth([truth(BOX)])))
    assert str(results) in str(error.value) and "\n" not in str(error.value)


def test_empty_results_file_is_ap_0(tmp_path):
    figures = evaluate(
        write(tmp_path / "no.json", []), write(tmp_path / "truth.json", coco_truth([truth(BOX)]))
    )
    assert figures["AP"] == 0 and figures["AR100"] == 0


def plain_box_errors(detection: dict, target: dict, iou: float = 0.5) -> tuple[set, set, set]:
    """A second opinion: the rule in plain numbers."""

    def overlap(a, b):
        return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))

    def area(a):
        return (a[2] - a[0]) * (a[3] - a[1])

    boxes, labels = detection["boxes"].tolist(), detection["labels"].tolist()
    true_boxes, true_labels, crowd = (target[key].tolist() for key in ("boxes", "labels", "crowd"))
    taken, hits, alarms = {}, set(), set()
    for i in sorted(range(len(boxes)), key=lambda i: -detection["scores"][i].item()):
        best, best_iou, excused = None, iou, False
        for j in range(len(true_boxes)):
            if true_labels[j] != labels[i]:
                continue
            common = overlap(boxes[i], true_boxes[j])
            if crowd[j]:
                excused |= common / area(boxes[i]) >= iou
            elif (
                j not in taken.values()
                and common / (area(boxes[i]) + area(true_boxes[j]) - common) >= best_iou
            ):
                best, best_iou = j, common / (area(boxes[i]) + area(true_boxes[j]) - common)
        if best is not None:
            taken[i] = best
            hits.add(i)
        elif not excused:
            alarms.add(i)
    return hits, alarms, {j for j in range(len(true_boxes)) if not crowd[j]} - set(taken.values())


def test_box_errors_against_a_double_loop():
    excused = 0
    for detection, target in zip(*random_scenes(60)):
        target["crowd"] = torch.rand(len(target["boxes"])) < 0.3
        errors = box_errors(detection, target)
        hits, alarms, misses = (
            set(errors[name].tolist()) for name in ("hits", "false_alarms", "misses")
        )
        assert (hits, alarms, misses) == plain_box_errors(detection, target)
        excused += len(detection["boxes"]) - len(hits) - len(alarms)
    assert excused > 0


def test_box_errors_agree_with_the_recall_of_pycocotools():
    detections, targets = random_scenes(10)
    for target in targets:
        target["labels"] = target["labels"] * 0  # one class, so that its recall is a plain count
    for detection in detections:
        detection["labels"] = detection["labels"] * 0
    found_all = sum(len(box_errors(d, t, iou=0.75)["hits"]) for d, t in zip(detections, targets))
    missed = sum(len(box_errors(d, t, iou=0.75)["misses"]) for d, t in zip(detections, targets))
    recalls = [
        sum(len(box_errors(d, t, iou=x / 100)["hits"]) for d, t in zip(detections, targets))
        for x in range(50, 100, 5)
    ]
    total = sum(len(target["boxes"]) for target in targets)
    assert found_all + missed == total
    assert evaluate(detections, targets)["AR100"] == pytest.approx(sum(recalls) / 10 / total)


def test_box_errors_one_by_one():
    target = truth(BOX, [60, 60, 90, 90], labels=[0, 1])
    detection = found(
        BOX,
        shift(BOX, 2),
        [60, 60, 90, 90],
        [0, 80, 9, 89],
        scores=[0.5, 0.7, 0.6, 0.9],
        labels=[0, 0, 0, 1],
    )
    errors = box_errors(detection, target)
    assert errors["hits"].tolist() == [1]  # the better score, though the other overlaps more
    assert errors["false_alarms"].tolist() == [
        3,
        2,
        0,
    ]  # by falling score: out of nowhere, another label, a second one
    assert errors["misses"].tolist() == [1]


def test_an_overlap_of_exactly_the_threshold_is_a_hit():
    half = found([0, 0, 10, 5], scores=[0.9])
    assert box_errors(half, truth([0, 0, 10, 10]), iou=0.5)["hits"].tolist() == [0]
    assert box_errors(half, truth([0, 0, 10, 10]), iou=0.51)["false_alarms"].tolist() == [0]
    assert evaluate([half], [truth([0, 0, 10, 10])])["AP50"] == pytest.approx(1)  # as pycocotools


def test_box_errors_without_boxes():
    one = found(BOX, scores=[0.5])
    assert not any(len(rows) for rows in box_errors(found(), truth()).values())
    assert box_errors(found(), truth(BOX))["misses"].tolist() == [0]
    assert box_errors(one, truth())["false_alarms"].tolist() == [0]
    flat = found(
        [10, 10, 10, 50], BOX, scores=[0.9, 0.5]
    )  # a box without area is a false alarm like any other
    assert box_errors(flat, truth([10, 10, 10, 50], BOX))["hits"].tolist() == [1]


@pytest.mark.skipif(
    not REFERENCE.exists(), reason="COCO's reference detections are not beside this checkout"
)
class TestReference:
    @pytest.mark.parametrize("evaluator", EVALUATORS)
    def test_exact_from_the_json_files(self, evaluator):
        expected = json.loads((REFERENCE / "expected.json").read_text())
        figures = evaluate(REFERENCE / expected["dt"], REFERENCE / expected["gt"], evaluator)
        for value, published in zip(figures.values(), expected["expected_bbox"].values()):
            assert value == pytest.approx(published, abs=1e-12)

    def test_close_through_float32_dicts(self):
        expected = json.loads((REFERENCE / "expected.json").read_text())
        content, rows = (
            json.loads((REFERENCE / expected[name]).read_text()) for name in ("gt", "dt")
        )
        label = {
            number: place
            for place, number in enumerate(sorted(row["id"] for row in content["categories"]))
        }
        detections, targets = [], []
        for image in content["images"]:
            mine, true = (
                [row for row in part if row["image_id"] == image["id"]]
                for part in (rows, content["annotations"])
            )
            corners = [
                [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in part)]
                for part in (mine, true)
            ]
            labels = [[label[row["category_id"]] for row in part] for part in (mine, true)]
            extra = {"area": torch.tensor([float(row["area"]) for row in true])}
            extra["crowd"] = torch.tensor([bool(row["iscrowd"]) for row in true], dtype=torch.bool)
            detections.append(
                found(*corners[0], scores=[row["score"] for row in mine], labels=labels[0])
            )
            targets.append(truth(*corners[1], labels=labels[1], **extra))
        figures = evaluate(detections, targets)
        for value, published in zip(figures.values(), expected["expected_bbox"].values()):
            assert value == pytest.approx(published, abs=1e-3)


def test_the_ap_of_each_class_is_that_of_its_boxes_alone():
    detections, targets = random_scenes()
    figures, classes = evaluate_classes(detections, targets)
    same(figures, evaluate(detections, targets))
    assert figures["AP"] == pytest.approx(np.mean([row["AP"] for row in classes.values()]))
    for label in (0, 1):
        parts = []
        for every in (detections, targets):
            keep = [one["labels"] == label for one in every]
            fields = ("boxes", "labels", "scores")
            parts.append(
                [
                    {key: one[key][mask] for key in fields if key in one}
                    for one, mask in zip(every, keep)
                ]
            )
        alone = evaluate(*parts)
        assert classes[label]["AP"] == pytest.approx(alone["AP"])
        assert classes[label]["AP50"] == pytest.approx(alone["AP50"])
        assert classes[label]["boxes"] == sum(len(one["boxes"]) for one in parts[1])


def test_a_class_of_crowd_regions_alone_has_no_ap():
    crowd = truth(BOX, crowd=torch.tensor([True]))
    assert evaluate_classes([found(BOX, scores=[0.5])], [crowd])[1] == {}
    assert evaluate_classes([found()], [truth()])[1] == {}
