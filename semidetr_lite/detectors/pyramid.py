"""Faster R-CNN (Ren et al., NeurIPS 2015) and FCOS (Tian et al., ICCV 2019) on a feature pyramid (Lin et al., CVPR
2017): the detectors under Soft Teacher and Dense Teacher.

    images -> backbone -> pyramid -> FCOS: a class, a box and a centerness in every cell
                                  -> Faster R-CNN: proposals -> class and box of each proposal

Heads, matching, losses and the reading of boxes are torchvision's; backbone, normalisation and `detect` are this
package's. Labels are 0..C-1 (torchvision's Faster R-CNN counts from 1), and strides are exact for images of any size
(torchvision divides sizes). There are no queries, hence no `encode`, `decode` and groups; `losses` matches and prices
by itself, and suppression (`nms`) is always needed.

Differences from torchvision: GroupNorm or frozen BatchNorm only; Faster R-CNN draws its samples by a given seed.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.detector import Detector

LEAST_SCORE = 0.01  # of a box that is looked at


@contextlib.contextmanager
def drawn(seed: int, device: torch.device):
    """Inside, torch draws from `seed`; outside, its stream goes on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Seen(NamedTuple):
    """Images as a pyramid detector sees them."""

    maps: dict  # level "0", "1" ... -> (B, D, H, W), filled up with zeros to the largest image
    image_sizes: list[tuple[int, int]]  # (H, W)


class Anchors(AnchorGenerator):
    """torchvision's anchors, about the centres of cells at known strides."""

    def __init__(self, sizes: tuple[float, ...], ratios: tuple[float, ...], strides: list[int]):
        super().__init__(tuple((size,) for size in sizes), (ratios,) * len(sizes))
        self.strides = strides

    def forward(self, seen: Seen, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """(N, 4) xyxy pixels, one and the same tensor for each image."""
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        anchors = self.grid_anchors([level.shape[-2:] for level in maps], [(stride, stride) for stride in self.strides])
        return [torch.cat(anchors)] * len(seen.image_sizes)


class Pyramid(Detector):
    """What the two detectors share.

    `losses(images, targets, seed)` -> {name: scalar} of a supervised step, a pure function of the weights and of its
    arguments: a list of (3, H, W), as many dicts with "boxes" (T, 4) xyxy pixels and "labels" (T,), an int.
    `found(seen, score, top, nms)` -> a dict an image with at most `top` "boxes", "labels" and "scores" (falling, over
    `score`) after suppression at IoU `nms`, in pixels of the images seen.

    Args:
        num_classes: C.
        dim: channels of the pyramid.
        anchor_sizes: pixels, one a level. One level more than the backbone has maps is its last map subsampled, two
            more are convolutions of it.
        fine: whether the first level has stride 4, not 8.
        backbone, backbone_weights: see `make_backbone`.
        options: mean, std and test_size, see Detector.
    """

    first_label = 0  # torchvision's name for label 0

    def __init__(
        self,
        num_classes: int,
        dim: int,
        anchor_sizes: tuple[float, ...],
        fine: bool = False,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        **options,
    ):
        super().__init__(**options)
        self.num_classes = num_classes
        self.backbone = make_backbone(backbone, backbone_weights, fine)
        channels = list(self.backbone.channels)
        further = (lambda: None, LastLevelMaxPool, lambda: LastLevelP6P7(dim, dim))[len(anchor_sizes) - len(channels)]
        self.fpn = FeaturePyramidNetwork(channels, dim, further())
        self.strides = [(4 if fine else 8) * 2**level for level in range(len(anchor_sizes))]

    def _project(self, stacked: torch.Tensor) -> list[torch.Tensor]:
        return list(self.fpn({str(level): x for level, x in enumerate(self.backbone(stacked))}).values())

    def see(self, images) -> Seen:
        """images: list of (3, H, W), uint8 or float in [0, 1]."""
        ready = self.normalised(images)
        maps = {str(level): x for level, x in enumerate(self.pyramid(ready)[0])}
        return Seen(maps, [tuple(image.shape[-2:]) for image in ready])

    def ready(self, targets: list[dict]) -> list[dict]:
        """Targets on the device, in torchvision's labels, without crowd regions."""
        found = []
        for target in targets:
            keep = ~target["crowd"] if "crowd" in target else slice(None)
            boxes, labels = (target[key][keep].to(self.mean.device) for key in ("boxes", "labels"))
            found.append({"boxes": boxes.float(), "labels": labels + self.first_label})
        return found

    def best(self, images, sizes, top, score, nms):
        """See Detector.best; images differ in their number of boxes."""
        seen = self.see(images)
        found = self.found(seen, max(score, LEAST_SCORE), top, nms)
        scales = sizes.flip(-1) / torch.tensor(seen.image_sizes).flip(-1)  # (B, 2) x, y
        boxes = [one["boxes"] * scale.repeat(2).to(one["boxes"]) for one, scale in zip(found, scales, strict=True)]
        valid = [torch.ones_like(one["labels"], dtype=torch.bool) for one in found]
        return boxes, [one["scores"] for one in found], [one["labels"] for one in found], valid


def _carrier(dim: int) -> nn.Module:
    """Stands where torchvision wants a backbone; it only has a number of channels."""
    empty = nn.Identity()
    empty.out_channels = dim
    return empty


class Cells(NamedTuple):
    """What FCOS says in each of N cells, level after level."""

    outputs: dict  # "cls_logits" (B, N, C), "bbox_regression" (B, N, 4), "bbox_ctrness" (B, N, 1)
    anchors: torch.Tensor  # (N, 4) xyxy pixels, centred on the cells
    counts: list[int]  # cells of each level
    image_sizes: list[tuple[int, int]]  # (H, W)


class FCOS(Pyramid):
    """One class, box and centerness in every cell; focal loss, GIoU and cross-entropy, each with weight 1.

    An object is learned by the cells near its centre, on the level where its farthest side is 4 to 8 anchor sizes away.

    Args:
        num_classes, dim, anchor_sizes, options: see Pyramid.
        convs: layers of each head.
        radius: of what is near, in anchor sizes.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        anchor_sizes: tuple[float, ...] = (8, 16, 32, 64, 128),
        convs: int = 4,
        radius: float = 1.5,
        **options,
    ):
        super().__init__(num_classes, dim, anchor_sizes, **options)
        self.net = detection.FCOS(
            _carrier(dim),
            num_classes=num_classes,
            anchor_generator=Anchors(anchor_sizes, (1.0,), self.strides),
            head=FCOSHead(dim, 1, num_classes, convs),
            center_sampling_radius=radius,
        )
        self.nms = 0.6

    def cells(self, seen: Seen) -> Cells:
        """The heads on every level."""
        maps = list(seen.maps.values())
        anchors = self.net.anchor_generator(seen, maps)[0]
        return Cells(self.net.head(maps), anchors, [level.shape[-2:].numel() for level in maps], seen.image_sizes)

    def losses(self, images, targets, seed: int = 0):
        """See Pyramid; nothing here is drawn."""
        cells = self.cells(self.see(images))
        anchors = [cells.anchors] * len(images)
        found = self.net.compute_loss(self.ready(targets), cells.outputs, anchors, cells.counts)
        return dict(zip(("class", "giou", "centerness"), found.values(), strict=True))

    def found(self, seen, score, top, nms):
        """See Pyramid; a score is sqrt(class score * centerness)."""
        cells, net = self.cells(seen), self.net
        net.score_thresh, net.nms_thresh, net.detections_per_img = score, nms, None  # all of them
        outputs = {name: x.split(cells.counts, 1) for name, x in cells.outputs.items()}
        anchors = [cells.anchors.split(cells.counts)] * len(seen.image_sizes)
        found = net.postprocess_detections(outputs, anchors, seen.image_sizes)
        areas = [(one["boxes"][:, 2:] - one["boxes"][:, :2]).prod(1) for one in found]
        return [{key: x[area > 0][:top] for key, x in one.items()} for one, area in zip(found, areas, strict=True)]


class FasterRCNN(Pyramid):
    """Proposals from anchors of three shapes, then a class (or background) and a box for each of them.

    Args:
        num_classes, dim, anchor_sizes, fine, options: see Pyramid.
        hidden: units of the two layers over a proposal's 7 x 7 features.
        object_size: pixels; a proposal of this size is read from stride 16, half of it from stride 8, and so on.
        proposals: of an image, in training and in detection.
        sampled: anchors and proposals an image that are trained on.
    """

    first_label = 1

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
        hidden: int = 1024,
        object_size: float = 224,
        proposals: tuple[int, int] = (2000, 1000),
        sampled: tuple[int, int] = (256, 512),
        fine: bool = True,
        **options,
    ):
        super().__init__(num_classes, dim, anchor_sizes, fine, **options)
        strides = self.strides[: len(self.backbone.channels)]  # proposals are not read from the further levels
        pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], 7, 2)
        pool.scales = [1 / stride for stride in strides]
        pool.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])), object_size)
        self.net = detection.FasterRCNN(
            _carrier(dim),
            rpn_anchor_generator=Anchors(anchor_sizes, (0.5, 1.0, 2.0), self.strides),
            rpn_pre_nms_top_n_train=proposals[0],
            rpn_post_nms_top_n_train=proposals[0],
            rpn_pre_nms_top_n_test=proposals[1],
            rpn_post_nms_top_n_test=proposals[1],
            rpn_batch_size_per_image=sampled[0],
            box_batch_size_per_image=sampled[1],
            box_roi_pool=pool,
            box_head=TwoMLPHead(dim * 49, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        )
        self.nms = 0.5

    def propose(self, seen: Seen, targets: list[dict] | None = None) -> tuple[list[torch.Tensor], dict]:
        """Proposals, (N, 4) xyxy pixels of each image; with targets (made `ready`) also their two losses."""
        rpn = self.net.rpn.train(targets is not None)
        proposals, losses = rpn(seen, seen.maps, targets)
        return proposals, dict(zip(("objectness", "proposals"), losses.values(), strict=False))

    def classify(self, seen: Seen, boxes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, 1 + C), background first, and box codes (N, 4 (1 + C)) for the N boxes of all images."""
        heads = self.net.roi_heads
        return heads.box_predictor(heads.box_head(heads.box_roi_pool(seen.maps, boxes, seen.image_sizes)))

    def sample(self, proposals: list[torch.Tensor], targets: list[dict]):
        """The boxes to train on, targets among them; their labels and box codes; all as a list over the images."""
        boxes, _, labels, codes = self.net.roi_heads.select_training_samples(proposals, targets)
        return boxes, labels, codes

    def losses(self, images, targets, seed: int = 0):
        """See Pyramid; `seed` draws the anchors and proposals that are trained on."""
        seen, targets = self.see(images), self.ready(targets)
        with drawn(seed, self.mean.device):
            proposals, losses = self.propose(seen, targets)
            boxes, *wanted = self.sample(proposals, targets)
        losses["class"], losses["boxes"] = fastrcnn_loss(*self.classify(seen, boxes), *wanted)
        return losses

    def found(self, seen, score, top, nms):
        """See Pyramid; a score is the softmax over the classes and background."""
        heads = self.net.roi_heads
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = score, nms, top
        proposals, _ = self.propose(seen)
        lists = heads.postprocess_detections(*self.classify(seen, proposals), proposals, seen.image_sizes)
        return [{"boxes": b, "scores": s, "labels": c - self.first_label} for b, s, c in zip(*lists, strict=True)]
