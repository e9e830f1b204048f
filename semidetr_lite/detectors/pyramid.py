"""Faster R-CNN and FCOS on a feature pyramid: the detectors of Soft Teacher and Dense Teacher.

Faster R-CNN: Ren et al., NeurIPS 2015; FCOS: Tian et al., ICCV 2019; feature pyramid: Lin et al.,
CVPR 2017.

    images -> backbone -> pyramid -> FCOS: a class, a box and a centerness in every cell
                                  -> Faster R-CNN: proposals -> class and box of each proposal

Heads, matching, losses and the decoding of boxes are torchvision's; backbone, normalisation and
`detect` are this package's. Labels are 0..C-1 (torchvision's Faster R-CNN counts from 1). Strides
are exact for images of any size (torchvision divides sizes). There are no queries, so there is no
`encode`, no `decode` and no query group; `losses` includes the matching. Non-maximum suppression is
always needed.

Differences from torchvision: GroupNorm or frozen BatchNorm only; Faster R-CNN samples anchors and
proposals from a given seed.

Shapes: B images, T targets, N cells or boxes, D channels, C classes.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from torchvision.ops.poolers import LevelMapper

from semidetr_lite.boxes import height_and_width
from semidetr_lite.contracts import Target
from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.detector import IMAGENET_MEAN, IMAGENET_STD, Detector, PerImage

MIN_SCORE = 0.01  # boxes below it are never returned


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers inside the block; outside, its generators do not notice."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class FeatureMaps(NamedTuple):
    """The feature pyramid of a batch. torchvision's heads take it for an ImageList."""

    maps: dict[str, torch.Tensor]  # level "0", "1" ... -> (B, D, H, W), padded with zeros
    image_sizes: list[tuple[int, int]]  # (H, W) of each image, unpadded


class Anchors(AnchorGenerator):
    """torchvision's anchors, centred on cells of known strides.

    Args:
        sizes: pixels, one per level.
        ratios: height over width of the anchors in every cell.
        strides: pixels, one per level.
    """

    def __init__(self, sizes: tuple[float, ...], ratios: tuple[float, ...], strides: list[int]):
        super().__init__(tuple((size,) for size in sizes), (ratios,) * len(sizes))
        self.strides = strides

    def forward(self, features: FeatureMaps, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """(N, 4) xyxy pixels, the same tensor for each image."""
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        shapes = [level.shape[-2:] for level in maps]
        strides = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(shapes, strides))
        return [anchors] * len(features.image_sizes)


class TorchvisionDetector(Detector):
    """Base of the detectors whose heads are torchvision's: a backbone and a feature pyramid.

    Args:
        num_classes: C.
        dim: D, channels of the pyramid.
        anchor_sizes: pixels, one per level. If there is one level more than the backbone has maps,
            it is the last map subsampled; two more are convolutions of it.
        with_stride_4: whether the first level has stride 4, not 8.
        backbone, backbone_weights: see `make_backbone`.
        mean, std, test_size: see Detector.
    """

    label_offset = 0  # torchvision's number of label 0
    nms: float  # always needed

    def __init__(
        self,
        num_classes: int,
        dim: int,
        anchor_sizes: tuple[float, ...],
        with_stride_4: bool,
        backbone: str | nn.Module,
        backbone_weights: str | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        test_size: tuple[int, int] | None,
    ):
        super().__init__(mean, std, test_size)
        self.num_classes = num_classes
        self.backbone = make_backbone(backbone, backbone_weights, with_stride_4)
        channels = list(self.backbone.channels)
        num_levels = len(anchor_sizes)
        extra_blocks = _extra_levels(num_levels - len(channels), dim)
        self.fpn = FeaturePyramidNetwork(channels, dim, extra_blocks)
        first_stride = 4 if with_stride_4 else 8
        self.strides = [first_stride * 2**level for level in range(num_levels)]

    def losses(
        self, images: Sequence[torch.Tensor], targets: list[Target], seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """The losses of a supervised step, scalars by name; a function of weights and arguments.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1].
            targets: "boxes" (T, 4) xyxy pixels, "labels" (T,), optionally "crowd" (T,).
            seed: of everything random.
        """
        raise NotImplementedError

    def predict(self, features: FeatureMaps, score: float, top: int, nms: float) -> list[Target]:
        """Detections of each image: "boxes", "labels", "scores", in falling order of the scores.

        Args:
            features: of `extract`. Boxes are in pixels of its images.
            score: boxes that score higher are returned.
            top: at most so many per image.
            nms: IoU threshold of non-maximum suppression per class.
        """
        raise NotImplementedError

    def extract(self, images: Sequence[torch.Tensor]) -> FeatureMaps:
        """The feature pyramid of images (3, H, W), uint8 or float in [0, 1]."""
        normalized = self.normalize(images)
        maps, _, _ = self.extract_features(normalized)
        sizes = [height_and_width(image) for image in normalized]
        return FeatureMaps({str(level): x for level, x in enumerate(maps)}, sizes)

    def _project(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) -> the levels of the pyramid (B, D, H, W)."""
        maps = {str(level): x for level, x in enumerate(self.backbone(images))}
        return list(self.fpn(maps).values())

    def to_torchvision_targets(self, targets: list[Target]) -> list[Target]:
        """Targets on the device, with torchvision's labels, without crowd regions."""
        converted: list[Target] = []
        for target in targets:
            keep = ~target["crowd"] if "crowd" in target else slice(None)
            boxes = target["boxes"][keep].to(self.mean.device)
            labels = target["labels"][keep].to(self.mean.device)
            converted.append({"boxes": boxes.float(), "labels": labels + self.label_offset})
        return converted

    def detect_batch(
        self,
        images: list[torch.Tensor],
        sizes: torch.Tensor,
        top: int,
        score: float,
        nms: float | None,
    ) -> tuple[PerImage, PerImage, PerImage, PerImage]:
        """See Detector.detect_batch; images differ in their number of boxes."""
        features = self.extract(images)
        nms = self.nms if nms is None else nms
        detections = self.predict(features, max(score, MIN_SCORE), top, nms)
        scales = sizes.flip(-1) / torch.tensor(features.image_sizes).flip(-1)  # (B, 2) x, y
        boxes = [
            entry["boxes"] * scale.repeat(2).to(entry["boxes"])
            for entry, scale in zip(detections, scales, strict=True)
        ]
        scores = [entry["scores"] for entry in detections]
        labels = [entry["labels"] for entry in detections]
        valid = [torch.ones_like(of_image, dtype=torch.bool) for of_image in labels]
        return boxes, scores, labels, valid


def _extra_levels(count: int, dim: int) -> ExtraFPNBlock | None:
    """torchvision's block for the levels beyond the backbone's maps."""
    if count == 0:
        return None
    return LastLevelMaxPool() if count == 1 else LastLevelP6P7(dim, dim)


class _DummyBackbone(nn.Identity):
    """In the place of torchvision's backbone, which is only asked for its number of channels."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels


class FCOSOutputs(NamedTuple):
    """What FCOS predicts in each of N cells, level after level."""

    outputs: dict  # "cls_logits" (B, N, C), "bbox_regression" (B, N, 4), "bbox_ctrness" (B, N, 1)
    anchors: torch.Tensor  # (N, 4) xyxy pixels, centred on the cells
    cells_per_level: list[int]
    image_sizes: list[tuple[int, int]]  # (H, W)


class FCOS(TorchvisionDetector):
    """FCOS: one class, box and centerness per cell; focal loss, GIoU, cross-entropy, weighted 1.

    An object is learned by the cells near its centre, on the level where its farthest side is 4 to
    8 anchor sizes away.

    Args:
        num_classes, dim, anchor_sizes: see TorchvisionDetector.
        convs: layers of each head.
        radius: how near is near, in anchor sizes.
        backbone, backbone_weights: see `make_backbone`.
        mean, std, test_size: see Detector.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        anchor_sizes: tuple[float, ...] = (8, 16, 32, 64, 128),
        convs: int = 4,
        radius: float = 1.5,
        with_stride_4: bool = False,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
    ):
        super().__init__(
            num_classes=num_classes,
            dim=dim,
            anchor_sizes=anchor_sizes,
            with_stride_4=with_stride_4,
            backbone=backbone,
            backbone_weights=backbone_weights,
            mean=mean,
            std=std,
            test_size=test_size,
        )
        self.net = detection.FCOS(
            _DummyBackbone(dim),
            num_classes=num_classes,
            anchor_generator=Anchors(anchor_sizes, (1.0,), self.strides),
            head=FCOSHead(dim, 1, num_classes, convs),
            center_sampling_radius=radius,
        )
        self.nms = 0.6

    def head_outputs(self, features: FeatureMaps) -> FCOSOutputs:
        """The heads on every level of the pyramid."""
        maps = list(features.maps.values())
        outputs = self.net.head(maps)
        anchors = self.net.anchor_generator(features, maps)[0]
        cells_per_level = [level.shape[-2:].numel() for level in maps]
        return FCOSOutputs(outputs, anchors, cells_per_level, features.image_sizes)

    def losses(
        self, images: Sequence[torch.Tensor], targets: list[Target], seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Losses "class", "giou" and "centerness"; nothing is random. See TorchvisionDetector."""
        predicted = self.head_outputs(self.extract(images))
        losses = self.net.compute_loss(
            self.to_torchvision_targets(targets),
            predicted.outputs,
            [predicted.anchors] * len(images),
            predicted.cells_per_level,
        )
        return dict(zip(("class", "giou", "centerness"), losses.values(), strict=True))

    def predict(self, features: FeatureMaps, score: float, top: int, nms: float) -> list[Target]:
        """See TorchvisionDetector.predict. A score is sqrt(class score * centerness)."""
        predicted = self.head_outputs(features)
        self.net.score_thresh = score
        self.net.nms_thresh = nms
        self.net.detections_per_img = None  # all: boxes without area are dropped before the cut
        outputs = {
            name: x.split(predicted.cells_per_level, 1) for name, x in predicted.outputs.items()
        }
        anchors = predicted.anchors.split(predicted.cells_per_level)
        detections = self.net.postprocess_detections(
            outputs, [anchors] * len(features.image_sizes), features.image_sizes
        )
        kept: list[Target] = []
        for image_detections in detections:
            boxes = image_detections["boxes"]
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            has_area = {key: x[area > 0][:top] for key, x in image_detections.items()}
            kept.append(cast(Target, has_area))
        return kept


class FasterRCNN(TorchvisionDetector):
    """Faster R-CNN: proposals from anchors of three shapes, then a class and a box for each.

    Args:
        num_classes, dim, anchor_sizes, with_stride_4: see TorchvisionDetector.
        representation_size: units of the two layers on a proposal's 7 x 7 features.
        object_size: pixels; a proposal of this size is pooled from stride 16, one of half the size
            from stride 8, and so on.
        proposals: per image, in training and in detection.
        sampled: anchors and proposals per image that are trained on.
        backbone, backbone_weights: see `make_backbone`.
        mean, std, test_size: see Detector.
    """

    label_offset = 1  # 0 is the background

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
        representation_size: int = 1024,
        object_size: float = 224,
        proposals: tuple[int, int] = (2000, 1000),
        sampled: tuple[int, int] = (256, 512),
        with_stride_4: bool = True,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
    ):
        super().__init__(
            num_classes=num_classes,
            dim=dim,
            anchor_sizes=anchor_sizes,
            with_stride_4=with_stride_4,
            backbone=backbone,
            backbone_weights=backbone_weights,
            mean=mean,
            std=std,
            test_size=test_size,
        )
        train_proposals, test_proposals = proposals
        sampled_anchors, sampled_proposals = sampled
        self.net = detection.FasterRCNN(
            _DummyBackbone(dim),
            rpn_anchor_generator=Anchors(anchor_sizes, (0.5, 1.0, 2.0), self.strides),
            rpn_pre_nms_top_n_train=train_proposals,
            rpn_post_nms_top_n_train=train_proposals,
            rpn_pre_nms_top_n_test=test_proposals,
            rpn_post_nms_top_n_test=test_proposals,
            rpn_batch_size_per_image=sampled_anchors,
            box_batch_size_per_image=sampled_proposals,
            box_roi_pool=self._roi_pool(object_size),
            box_head=TwoMLPHead(dim * 49, representation_size),
            box_predictor=FastRCNNPredictor(representation_size, num_classes + 1),
        )
        self.nms = 0.5

    def _roi_pool(self, object_size: float) -> MultiScaleRoIAlign:
        """torchvision's RoI pooling, with exact strides. Extra levels are not pooled from."""
        strides = self.strides[: len(self.backbone.channels)]
        pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], 7, 2)
        pool.scales = [1 / stride for stride in strides]
        first, last = int(math.log2(strides[0])), int(math.log2(strides[-1]))
        pool.map_levels = LevelMapper(first, last, object_size)
        return pool

    def propose(
        self, features: FeatureMaps, targets: list[Target] | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Region proposals, (N, 4) xyxy pixels per image, and their losses.

        Args:
            features: of `extract`.
            targets: of `to_torchvision_targets`; without them there are no losses.

        Returns:
            the proposals; {"objectness": scalar, "proposals": scalar} or {}.
        """
        rpn = self.net.rpn.train(targets is not None)
        proposals, losses = rpn(features, features.maps, targets)
        return proposals, dict(zip(("objectness", "proposals"), losses.values(), strict=False))

    def classify(
        self, features: FeatureMaps, boxes: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits and box codes of given boxes.

        Args:
            features: of `extract`.
            boxes: (N_i, 4) xyxy pixels per image; N is their sum.

        Returns:
            logits (N, 1 + C), background first; codes (N, 4 (1 + C)).
        """
        heads = self.net.roi_heads
        pooled = heads.box_roi_pool(features.maps, boxes, features.image_sizes)
        return heads.box_predictor(heads.box_head(pooled))

    def sample(
        self, proposals: list[torch.Tensor], targets: list[Target]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """The boxes to train on, targets among them; their labels and box codes; each per image."""
        boxes, _, labels, codes = self.net.roi_heads.select_training_samples(proposals, targets)
        return boxes, labels, codes

    def losses(
        self, images: Sequence[torch.Tensor], targets: list[Target], seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Losses "objectness", "proposals", "class" and "boxes"; see TorchvisionDetector.losses.

        The seed decides which anchors and proposals are trained on.
        """
        features = self.extract(images)
        targets = self.to_torchvision_targets(targets)
        with seeded(seed, self.mean.device):
            proposals, losses = self.propose(features, targets)
            boxes, labels, codes = self.sample(proposals, targets)
        logits, box_codes = self.classify(features, boxes)
        losses["class"], losses["boxes"] = fastrcnn_loss(logits, box_codes, labels, codes)
        return losses

    def predict(self, features: FeatureMaps, score: float, top: int, nms: float) -> list[Target]:
        """See TorchvisionDetector.predict; a score is the softmax over classes and background."""
        heads = self.net.roi_heads
        heads.score_thresh = score
        heads.nms_thresh = nms
        heads.detections_per_img = top
        proposals, _ = self.propose(features)
        logits, box_codes = self.classify(features, proposals)
        boxes, scores, labels = heads.postprocess_detections(
            logits, box_codes, proposals, features.image_sizes
        )
        return [
            {
                "boxes": image_boxes,
                "scores": image_scores,
                "labels": image_labels - self.label_offset,
            }
            for image_boxes, image_scores, image_labels in zip(boxes, scores, labels, strict=True)
        ]
