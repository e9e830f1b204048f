"""`detect` takes images as they come and answers in their pixels; postprocessing against a loop."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import nms as non_maximum_suppression

from semidetr_lite.boxes import to_pixels
from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.detector import load_image, padding_mask, postprocess, same_size_chunks
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.errors import UserError


def small(**changes) -> DINO:
    sizes = {
        "num_queries": 8,
        "dim": 16,
        "heads": 2,
        "levels": 3,
        "points": 2,
        "dim_feedforward": 32,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1, "backbone": Tiny((8, 8, 16, 16, 16))}
    detector = DINO(num_classes=5, **sizes, **layers, **changes)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return detector.eval()


def answering(detector: DINO, logits, boxes) -> DINO:
    """The detector, made to give these outputs for every image; notes the sizes it was given."""
    detector.seen = []

    def forward(images, groups=()):
        detector.seen += [tuple(image.shape[-2:]) for image in images]
        count = len(images)
        return {
            "pred_logits": logits.expand(count, -1, -1),
            "pred_boxes": boxes.expand(count, -1, -1),
        }

    detector.forward = forward
    return detector


def same(a: dict, b: dict, atol: float = 1e-3) -> bool:
    return all(
        torch.allclose(a[key].float(), b[key].float(), atol=atol)
        for key in ("boxes", "labels", "scores")
    )


# Input


def test_one_image_in_every_form(tmp_path):
    detector = small()
    pixels = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "image.png")
    forms = [
        pixels,
        pixels.float() / 255,
        picture,
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
    ]
    answers = [detector.detect(form) for form in forms]
    assert all(isinstance(answer, list) and len(answer) == 1 for answer in answers)
    assert len(answers[0][0]["boxes"]) == 40
    assert all(same(answers[0][0], answer[0]) for answer in answers[1:])
    assert len(detector.detect(torch.stack([pixels] * 3))) == 3
    assert detector.detect([]) == []


def test_a_list_of_images_of_several_sizes_equals_one_by_one():
    detector = small()
    images = [torch.rand(3, *size) for size in [(48, 64), (64, 48), (48, 64), (64, 64), (48, 64)]]
    found = detector.detect(images, batch_size=2)
    for image, answer in zip(images, found, strict=True):
        assert answer["size"] == tuple(image.shape[-2:]) and same(answer, detector.detect(image)[0])


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    for picture in (grey, grey.convert("RGBA"), grey.convert("P")):
        picture.save(tmp_path / "image.png")
        for form in (picture, tmp_path / "image.png"):
            tensor = load_image(form)
            assert tensor.shape == (3, 3, 4) and tensor.dtype == torch.uint8
            assert torch.equal(tensor[1], torch.from_numpy(np.array(grey)))


@pytest.mark.parametrize("content", [None, b"no image", b""])
def test_a_path_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="broken.jpg") as problem:
        small().detect(path)
    assert "\n" not in str(problem.value)


def test_half_an_image_is_named(tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="half.png"):
        load_image(path)


def test_same_size_chunks():
    images = [torch.zeros(3, *size) for size in [(4, 4), (4, 6), (4, 4), (4, 4)]]
    assert same_size_chunks(images, 2) == [[0, 2], [3], [1]]


# Output


def test_detections_are_targets_with_falling_scores():
    answer = small().detect(torch.rand(3, 48, 64), top=17)[0]
    assert answer["boxes"].shape == (17, 4) and answer["labels"].dtype == torch.int64
    assert (
        (answer["scores"].diff() <= 0).all()
        and 0 < answer["scores"].min()
        and answer["scores"].max() < 1
    )
    assert set(answer) == {"boxes", "labels", "scores", "size"} and answer["size"] == (48, 64)
    assert not answer["boxes"].requires_grad
    middle = float(answer["scores"].median())
    above = small().detect(torch.rand(3, 48, 64), score=middle)[0]["scores"]
    assert (above >= middle).all()


def test_boxes_come_in_pixels_of_the_image_given_whatever_the_test_size():
    whole = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2]]])
    detector = answering(small(test_size=(64, 128)), torch.tensor([[[5.0], [4.0]]]), whole)
    answers = detector.detect(
        [torch.rand(3, 40, 60), torch.randint(0, 256, (3, 100, 300), dtype=torch.uint8)]
    )
    assert sorted(detector.seen) == [
        (43, 128),
        (64, 96),
    ]  # the short side, unless the long one gets too long
    assert torch.allclose(answers[0]["boxes"], torch.tensor([[0.0, 0, 60, 40], [0, 16, 30, 24]]))
    assert torch.allclose(answers[1]["boxes"][0], torch.tensor([0.0, 0, 300, 100]))


def test_nms_removes_duplicates_of_a_class_only():
    boxes = torch.tensor(
        [[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.5, 0.51, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]]
    )
    logits = torch.full((1, 4, 2), -20.0)
    logits[0, 0, 0], logits[0, 1, 0], logits[0, 2, 1], logits[0, 3, 0] = 3.0, 2.0, 1.0, 0.0
    detector = answering(small(), logits, boxes)
    image = torch.rand(3, 50, 50)
    assert detector.detect(image, score=0.1)[0]["labels"].tolist() == [0, 0, 1, 0]
    kept = detector.detect(image, score=0.1, nms=0.6)[0]
    assert kept["labels"].tolist() == [0, 1, 0]
    assert kept["scores"].tolist() == pytest.approx(
        torch.tensor([3.0, 1.0, 0.0]).sigmoid().tolist()
    )
    detector.nms = 0.6  # as stage one leaves it
    assert same(detector.detect(image, score=0.1)[0], kept)


@pytest.mark.parametrize("nms", [None, 0.5])
def test_postprocess_equals_a_loop(nms):
    logits, boxes = torch.randn(3, 12, 4), torch.rand(3, 12, 4) * 0.4 + 0.3
    sizes = torch.tensor([[60, 90], [90, 60], [64, 64]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    found, scores, labels, valid = postprocess(outputs, sizes, 20, 0.3, nms)
    assert found.shape == (3, 20, 4) and scores.shape == labels.shape == valid.shape == (3, 20)
    for image in range(3):
        cells = [(float(logits[image, q, c].sigmoid()), q, c) for q in range(12) for c in range(4)]
        best = [cell for cell in sorted(cells, reverse=True)[:20] if cell[0] >= 0.3]
        height, width = sizes[image].tolist()
        limit = torch.tensor([width, height, width, height])
        pixels = to_pixels(boxes[image], (height, width)).clamp(min=0).minimum(limit)
        if nms is not None:
            kept = []
            for label in range(4):
                own = [cell for cell in best if cell[2] == label]
                if own:
                    corners = torch.stack([pixels[q] for _, q, _ in own])
                    kept += [
                        own[i]
                        for i in non_maximum_suppression(
                            corners, torch.tensor([s for s, _, _ in own]), nms
                        ).tolist()
                    ]
            assert len(kept) < len(best)
            best = sorted(kept, reverse=True)
        assert labels[image][valid[image]].tolist() == [c for _, _, c in best]
        assert torch.allclose(
            scores[image][valid[image]], torch.tensor([score for score, _, _ in best])
        )
        assert torch.allclose(
            found[image][valid[image]], torch.stack([pixels[q] for _, q, _ in best])
        )


def test_boxes_end_at_the_border_of_the_image():
    boxes = torch.tensor([[[0.9, 0.5, 0.6, 1.4], [0.1, 0.1, 0.4, 0.4]]])
    detector = answering(small(), torch.tensor([[[5.0], [4.0]]]), boxes)
    detection = detector.detect(torch.rand(3, 40, 60))[0]
    assert torch.allclose(detection["boxes"][0], torch.tensor([36.0, 0, 60, 40]))
    assert torch.allclose(detection["boxes"][1], torch.tensor([0.0, 0, 18, 12]))


def test_with_a_softmax_a_query_is_one_detection():
    """A second class of the same query is none, however high its score."""
    logits = torch.tensor([[[3.0, 2.9, -5.0, 0.0], [-5.0, 0.0, 1.0, 4.0]]])  # the last: no object
    outputs = {"pred_logits": logits, "pred_boxes": torch.rand(1, 2, 4), "no_object": True}
    _, scores, labels, valid = postprocess(outputs, torch.tensor([[50, 50]]), 6)
    assert labels[0][valid[0]].tolist() == [0, 2]
    expected = logits.softmax(-1)[0, [0, 1], [0, 2]]
    assert torch.allclose(scores[0][valid[0]], expected)


def test_postprocess_suppresses_nothing_across_images():
    """So many boxes that torchvision takes another way, and the same box everywhere."""
    count = 40
    logits, boxes = (
        torch.randn(count, 30, 3),
        torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(count, 30, 4),
    )
    sizes = torch.full((count, 2), 50)
    valid = postprocess({"pred_logits": logits, "pred_boxes": boxes}, sizes, 90, 0.0, 0.5)[3]
    assert valid.sum(1).tolist() == [3] * count  # one of each class


def test_padding_mask_is_what_lies_beyond_each_image():
    sizes = [(2, 3), (4, 1), (4, 3)]
    expected = torch.ones(3, 5, 3, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        expected[image, :height, :width] = False
    assert torch.equal(padding_mask(sizes, (5, 3), torch.device("cpu")), expected)
