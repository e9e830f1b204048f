"""Faster R-CNN and FCOS against torchvision's own forward and brute force."""

import copy
import dataclasses

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from semidetr_lite import load_detector
from semidetr_lite.detectors.backbone import Tiny, make_backbone
from semidetr_lite.detectors.pyramid import FCOS, FasterRCNN, FeatureMaps, seeded
from semidetr_lite.errors import UserError
from semidetr_lite.methods.supervised import Supervised
from semidetr_lite.training.checkpoint import save_weights
from semidetr_lite.training.presets import make_detector, preset_settings
from semidetr_lite.training.settings import new_config

SMALL = {
    "fcos": {"dim": 32, "anchor_sizes": (4, 8, 16), "convs": 1, "backbone": "tiny"},
    "faster-rcnn": {
        "dim": 16, "anchor_sizes": (16, 32, 64), "representation_size": 16, "object_size": 32,
        "proposals": (40, 20),
        "sampled": (16, 16), "with_stride_4": False, "backbone": "tiny",
    },
}  # fmt: skip
NAMES = list(SMALL)
CLASSES = 3


def small(name: str, **changes):
    """Off the zeros of the start, so that there is something to see."""
    torch.manual_seed(3)
    detector = make_detector(name, CLASSES, {**SMALL[name], **changes})
    with torch.no_grad():
        for key, parameter in detector.named_parameters():
            parameter += 0.03 * torch.randn_like(parameter)
            if key.endswith(("cls_logits.bias", "bbox_reg.bias")):
                parameter.fill_(0.3)
    return detector


def some_images(*sizes) -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [torch.rand(3, *size) for size in sizes]


def some_target(boxes, labels, **further) -> dict:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **further,
    }


CLOSE = {"rtol": 1e-4, "atol": 1e-3}
TARGET = some_target([[8.0, 10, 28, 34], [40, 4, 62, 30]], [2, 0])
EMPTY = some_target([], [])


def torchvisions(detector) -> torch.nn.Module:
    """torchvision's whole model, its transform and forward, on our pyramid as its backbone."""
    net = copy.deepcopy(detector.net).train(detector.training)
    net.backbone.forward = lambda stacked: (
        detector.extract(list(stacked * detector.std + detector.mean)).maps
    )
    net.transform.resize = lambda image, target=None: (image, target)
    return net


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_detections_are_those_of_torchvisions_forward(name, size):
    detector, images = small(name).eval(), some_images(size, size)
    detections = detector.detect(images, score=0.05, top=30)
    net = torchvisions(detector)
    heads = net.roi_heads if name == "faster-rcnn" else net
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.05, detector.nms, 30
    with torch.no_grad():
        expected = net(images)
    assert any(len(one["boxes"]) for one in detections)
    for ours, theirs in zip(detections, expected):
        has_area = (theirs["boxes"][:, 2:] > theirs["boxes"][:, :2]).all(
            1
        )  # of torchvision's FCOS some have no area
        theirs = {key: entry[has_area] for key, entry in theirs.items()}
        ours |= {key: ours[key][: len(theirs["labels"])] for key in theirs}
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], **CLOSE)
        torch.testing.assert_close(ours["scores"], theirs["scores"], **CLOSE)
        assert torch.equal(ours["labels"], theirs["labels"] - detector.label_offset)
        assert ours["labels"].dtype == torch.int64 and ours["size"] == size


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_torchvisions_forward(name):
    detector, images, targets = (
        small(name).train(),
        some_images((64, 64), (64, 64)),
        [TARGET, EMPTY],
    )
    ours = detector.losses(images, targets, seed=5)
    net = torchvisions(detector)
    theirs = [
        {"boxes": one["boxes"], "labels": one["labels"] + detector.label_offset} for one in targets
    ]
    with seeded(5, torch.device("cpu")):
        expected = net(images, theirs)
    same = {
        "objectness": "loss_objectness",
        "proposals": "loss_rpn_box_reg",
        "boxes": "loss_box_reg",
    }
    same |= {"giou": "bbox_regression", "centerness": "bbox_ctrness"}
    same["class"] = "loss_classifier" if name == "faster-rcnn" else "classification"
    assert len(ours) == len(expected)
    for key, loss in ours.items():
        torch.testing.assert_close(loss, expected[same[key]])


@pytest.mark.parametrize("name", NAMES)
def test_anchors_stand_on_the_cells_of_images_of_any_size(name):
    detector = small(name)
    features = detector.extract(some_images((70, 93)))
    maps = list(features.maps.values())
    generator = (
        detector.net.anchor_generator if name == "fcos" else detector.net.rpn.anchor_generator
    )
    anchors = generator(features, maps)[0]
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).tolist()
    shapes = 1 if name == "fcos" else 3
    expected = [
        [x * stride, y * stride]
        for stride, level in zip(detector.strides, maps)
        for y in range(level.shape[-2])
        for x in range(level.shape[-1])
        for _ in range(shapes)
    ]
    assert centres == expected
    assert [level.shape[-1] for level in maps] == [-(-93 // stride) for stride in detector.strides]


def test_a_proposal_is_read_from_the_level_of_its_size():
    detector = small("faster-rcnn", with_stride_4=True, anchor_sizes=(8, 16, 32, 64))
    maps = {
        str(level): torch.full((1, 16, 64 // 2**level, 64 // 2**level), float(level))
        for level in range(4)
    }
    boxes = torch.tensor([[0.0, 0, 7, 7], [0, 0, 17, 17], [0, 0, 33, 33], [4, 4, 200, 200]])
    read = detector.net.roi_heads.box_roi_pool(maps, [boxes], [(70, 93)])
    assert read[:, 0, 3, 3].tolist() == [0, 1, 2, 3]
    assert detector.net.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("name", NAMES)
def test_detections_of_an_image_do_not_depend_on_its_neighbours_or_on_the_mode(name):
    detector, images = small(name), some_images((64, 64), (50, 81), (64, 64))
    together = detector.train().detect(images, score=0.1)
    assert detector.training and sum(len(one["scores"]) for one in together)
    for image, detection in zip(images, together):
        alone = detector.eval().detect(image, score=0.1)[0]
        height, width = image.shape[-2:]
        assert detection["size"] == (height, width)
        torch.testing.assert_close(alone["boxes"], detection["boxes"], **CLOSE)
        assert (detection["scores"] >= 0.1).all() and (detection["scores"].diff() <= 0).all()
        assert ((detection["labels"] >= 0) & (detection["labels"] < CLASSES)).all()
        assert (detection["boxes"] >= 0).all() and (
            detection["boxes"] <= torch.tensor([width, height] * 2)
        ).all()


@pytest.mark.parametrize("name", NAMES)
def test_detect_keeps_the_contract(name):
    detector, images = small(name), some_images((64, 64))
    assert detector.detect([]) == []
    few = detector.detect(images, top=3)[0]
    assert len(few["scores"]) == 3
    bytes_given = detector.detect([(images[0] * 255).round().byte()])[0]
    torch.testing.assert_close(
        detector.detect([(images[0] * 255).round() / 255])[0]["boxes"], bytes_given["boxes"]
    )
    strict, loose = (detector.detect(images, nms=nms, top=1000)[0] for nms in (0.1, 0.9))
    for nms, detection in ((0.1, strict), (0.9, loose)):
        overlap = box_iou(detection["boxes"], detection["boxes"]) * (
            detection["labels"][:, None] == detection["labels"]
        )
        assert overlap.fill_diagonal_(0).max() <= nms + 1e-5
    assert len(strict["scores"]) < len(loose["scores"])


@pytest.mark.parametrize("name", NAMES)
def test_a_test_size_only_changes_what_the_detector_looks_at(name):
    detector, image = small(name), some_images((40, 60))[0]
    detector.test_size = (80, 200)
    detection = detector.detect([image], score=0.1)[0]
    large = torch.nn.functional.interpolate(
        image[None], (80, 120), mode="bilinear", antialias=True
    )[0]
    detector.test_size = None
    torch.testing.assert_close(
        detection["boxes"] * 2, detector.detect([large], score=0.1)[0]["boxes"]
    )
    assert detection["size"] == (40, 60)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sizes", "targets"),
    [
        (((64, 64), (48, 80)), [TARGET, EMPTY]),
        (((64, 64), (64, 64)), [EMPTY, EMPTY]),
        (((70, 45),), [some_target([[2.0, 3, 20, 50]], [1])]),
    ],
    ids=["mixed sizes", "no object at all", "odd"],
)
def test_losses_are_finite_and_reach_every_trainable_parameter(name, sizes, targets):
    detector = small(name, **({"sampled": (400, 16)} if name == "faster-rcnn" else {})).train()
    losses = detector.losses(some_images(*sizes), targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    if len(targets[0]["labels"]):
        still = [
            key for key, p in detector.named_parameters() if p.requires_grad and not p.grad.any()
        ]
        assert still == []


@pytest.mark.parametrize("name", NAMES)
def test_an_image_trains_alike_beside_images_of_another_size(name):
    """The tiny backbone never sees padding: the first image has the same features in both."""
    detector, images = small(name), some_images((64, 64), (48, 80))
    together, alone = detector.extract(images), detector.extract(images[:1])
    for key, level in alone.maps.items():
        height, width = level.shape[-2:]
        torch.testing.assert_close(together.maps[key][:1, :, :height, :width], level)
        assert not together.maps[key][0, :, :, width:].any()


@pytest.mark.parametrize("name", NAMES)
def test_crowd_regions_are_nobodys_target(name):
    detector, images = small(name).train(), some_images((64, 64))
    crowd = {key: torch.cat([TARGET[key], TARGET[key][:1] + 1]) for key in ("boxes", "labels")}
    crowd["crowd"] = torch.tensor([False, False, True])
    with_crowd, without = (detector.losses(images, [target], seed=1) for target in (crowd, TARGET))
    assert all(torch.equal(with_crowd[key], without[key]) for key in without)


def test_faster_rcnn_draws_by_its_seed_alone():
    detector, images = small("faster-rcnn").train(), some_images((64, 64))
    state = torch.get_rng_state()
    first = detector.losses(images, [TARGET], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = (detector.losses(images, [TARGET], seed=seed) for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_detections_are_the_same(name, tmp_path):
    detector, images = small(name).eval(), some_images((64, 80))
    detector.nms = 0.44
    categories = [{"id": 10 * label, "name": f"c{label}"} for label in range(CLASSES)]
    save_weights(tmp_path / "w.safetensors", detector, name, SMALL[name], categories)
    loaded = load_detector(tmp_path / "w.safetensors")
    assert loaded.categories == categories and loaded.nms == 0.44 and not loaded.training
    for ours, theirs in zip(detector.detect(images), loaded.detect(images)):
        assert len(ours["scores"])
        assert all(torch.equal(ours[key], theirs[key]) for key in ("boxes", "labels", "scores"))


@pytest.mark.parametrize("name", NAMES)
def test_no_norm_has_live_statistics_and_the_stem_is_frozen_on_a_resnet(name):
    sizes = {"fcos": (8, 16, 32, 64, 128), "faster-rcnn": (32, 64, 128, 256, 512)}[name]
    detector = make_detector(name, 2, {"dim": 32, "anchor_sizes": sizes, "backbone": "resnet18"})
    assert not [
        part
        for part in detector.modules()
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    ]
    assert not any(p.requires_grad for p in detector.backbone.stem.parameters())
    assert detector.strides == [(8 if name == "fcos" else 4) * 2**level for level in range(5)]
    features = detector.extract(some_images((100, 130)))
    assert [tuple(level.shape[-2:]) for level in features.maps.values()] == [
        (-(-100 // stride), -(-130 // stride)) for stride in detector.strides
    ]
    assert len(
        detector.train().losses(some_images((100, 130)), [some_target([[8.0, 10, 28, 34]], [1])])
    ) in (3, 4)


def test_a_fine_backbone_has_one_map_more():
    for coarse, fine in (
        (Tiny(), Tiny(with_stride_4=True)),
        (make_backbone("resnet18"), make_backbone("resnet18", with_stride_4=True)),
    ):
        assert len(fine.channels) == 4 and fine.channels[1:] == tuple(coarse.channels)
        assert list(fine.state_dict()) == list(coarse.state_dict())
        assert [level.shape[1] for level in fine(torch.rand(1, 3, 64, 64))] == list(fine.channels)


@pytest.mark.parametrize("name", NAMES)
def test_supervised_trains_it(name):
    batch = {"labelled": (some_images((64, 64), (64, 64)), [TARGET, EMPTY])}
    losses = Supervised(small(name), seed=1).train()(batch, 3)
    again = Supervised(small(name), seed=1).train()(batch, 3)
    assert all(key.startswith("labelled/") for key in losses)
    assert all(torch.equal(losses[key], again[key]) for key in losses)


def test_fcos_reads_a_planted_object():
    """One cell says class 1 and 6, 5, 10, 11 pixels to the sides: that is the one box found."""
    detector = FCOS(CLASSES, **SMALL["fcos"])
    features = FeatureMaps(
        {str(n): torch.zeros(1, 32, 8 // 2**n, 8 // 2**n) for n in range(3)}, [(64, 64)]
    )
    outputs = {"cls_logits": torch.full((1, 84, 3), -9.0), "bbox_regression": torch.zeros(1, 84, 4)}
    outputs |= {"bbox_ctrness": torch.full((1, 84, 1), 2.0)}
    outputs["cls_logits"][0, 2 * 8 + 3, 1] = 3.0
    outputs["bbox_regression"][0, 2 * 8 + 3] = torch.tensor([6.0, 5, 10, 11]) / 4
    detector.net.head.forward = lambda maps: outputs
    detection = detector.predict(features, 0.1, 10, 0.5)[0]
    assert detection["boxes"].tolist() == [[24 - 6, 16 - 5, 24 + 10, 16 + 11]] and detection[
        "labels"
    ].tolist() == [1]
    scores = torch.tensor([3.0, 2.0]).sigmoid()
    torch.testing.assert_close(detection["scores"], scores.prod().sqrt()[None])


@pytest.mark.parametrize("name", NAMES)
def test_one_image_can_be_learned(name):
    torch.manual_seed(0)
    wide = {"representation_size": 64} if name == "faster-rcnn" else {}
    detector = make_detector(name, CLASSES, {**SMALL[name], **wide}).train()
    image = torch.zeros(3, 64, 64)
    image[0, 10:34, 8:28], image[1, 4:30, 40:62] = 1.0, 1.0
    optimizer = torch.optim.Adam(detector.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        sum(detector.losses([image], [TARGET], step).values()).backward()
        optimizer.step()
    detection = detector.detect([image], score=0.3)[0]
    best = {
        int(label): box
        for box, label in reversed(list(zip(detection["boxes"], detection["labels"])))
    }
    for box, label in zip(TARGET["boxes"], TARGET["labels"].tolist()):
        assert box_iou(best[label][None], box[None]) > 0.5


@pytest.mark.parametrize(
    ("method", "detector", "choose"),
    [
        ("semi-detr", "faster-rcnn", "dino or deformable-detr or detr"),
        ("mean-teacher", "fcos", "dino or deformable-detr or detr"),
        ("soft-teacher", "dino", "--detector faster-rcnn"),
        ("dense-teacher", "faster-rcnn", "--detector fcos"),
    ],
)
def test_a_wrong_pair_names_what_to_choose(method, detector, choose):
    with pytest.raises(UserError, match=choose):
        new_config(method=method, detector=detector)


@pytest.mark.parametrize("preset", ["digits", "coco-10pct"])
@pytest.mark.parametrize("name", NAMES)
def test_presets_have_arguments_for_them(preset, name):
    method = "soft-teacher" if name == "faster-rcnn" else "dense-teacher"
    kwargs = preset_settings(preset, method, name).detector_kwargs
    kwargs = dataclasses.replace(kwargs, backbone_weights=None)
    assert make_detector(name, 10, kwargs).num_classes == 10


def test_image_sizes_are_all_torchvision_reads_of_an_image_list():
    """`FeatureMaps` stands for an ImageList; if torchvision read more of it, this would fail."""
    detector, images = small("faster-rcnn").eval(), some_images((64, 64))
    features = detector.extract(images)
    theirs = ImageList(torch.zeros(1, 3, 64, 64), features.image_sizes)
    for ours, expected in zip(
        detector.net.rpn(features, features.maps)[0], detector.net.rpn(theirs, features.maps)[0]
    ):
        assert torch.equal(ours, expected)


def test_classes_of_the_two_detectors():
    assert isinstance(small("fcos"), FCOS) and isinstance(small("faster-rcnn"), FasterRCNN)
