"""What all detectors do alike: take images as they come, batch them, and turn outputs into detections.

A detector has `encode(images) -> Memory` and `decode(memory, groups) -> outputs`; `detect` is
`decode(encode(images))` read as boxes in pixels of the images given.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.ops import nms as suppress

from semidetr_lite.boxes import to_pixels
from semidetr_lite.data.images import read_image
from semidetr_lite.data.views import resized
from semidetr_lite.detectors.transformer import Memory
from semidetr_lite.device import to_device
from semidetr_lite.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """Base of the detectors: normalisation, batching, `detect`.

    Args:
        mean, std: of the images in [0, 1], per channel.
        test_size: (short side, longest long side) that `detect` resizes to, or None to take images as they are.
    """

    used_maps = slice(None)  # of the backbone's
    takes_groups = False  # whether `decode` takes further queries, each a content and a box

    def __init__(self, mean=IMAGENET_MEAN, std=IMAGENET_STD, test_size: tuple[int, int] | None = None):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.test_size = test_size
        self.denoising: nn.Module | None = None
        self.nms: float | None = None  # IoU over which boxes of one class suppress each other; the stage sets it

    def encode(self, images) -> Memory:
        raise NotImplementedError

    def decode(self, memory: Memory, groups: Sequence = ()) -> dict:
        raise NotImplementedError

    def forward(self, images, groups: Sequence = ()) -> dict:
        """images: a list of (3, H, W) or a tensor (B, 3, H, W), uint8 or float in [0, 1] -> outputs."""
        return self.decode(self.encode(images), groups)

    def normalised(self, images) -> list[torch.Tensor]:
        """Images as a list of normalised float tensors on the detector's device."""
        ready = []
        for image in images:
            if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
                raise UserError(f"an image must be a tensor (3, height, width) with pixels, got {tuple(image.shape)}")
            image = to_device(image, self.mean.device)
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            ready.append((image - self.mean) / self.std)
        return ready

    def pyramid(self, images: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
        """L projected maps (B, D, H, W), their masks (B, H, W), True = padding, and whether anything is padding."""
        if len({tuple(image.shape[-2:]) for image in images}) == 1:
            maps = self._project(torch.stack(images))
            masks = [level.new_zeros(level.shape[0], *level.shape[-2:], dtype=torch.bool) for level in maps]
            return maps, masks, False
        if self.backbone.sees_padding:
            return *self._project_padded(images), True
        return *self._project_apart(images), True

    def _project(self, stacked: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> L maps; beyond the backbone's, strided convolutions of its last map, then of each other."""
        maps = self.backbone(stacked)[self.used_maps]
        projected = [projection(level) for projection, level in zip(self.projections, maps, strict=False)]
        source = maps[-1]
        for projection in self.projections[len(maps) :]:
            source = projection(source)
            projected.append(source)
        return projected

    def _project_padded(self, images):
        """Images filled up with zeros to a common height and width; the backbone sees the filled border."""
        sizes = [image.shape[-2:] for image in images]
        height, width = map(padded_side, map(max, zip(*sizes)))
        stacked = images[0].new_zeros(len(images), 3, height, width)
        for row, image in enumerate(images):
            stacked[row, :, : image.shape[-2], : image.shape[-1]] = image
        maps, mask = self._project(stacked), padding(sizes, (height, width), stacked.device)
        return maps, [F.interpolate(mask[:, None].float(), level.shape[-2:])[:, 0] > 0.5 for level in maps]

    def _project_apart(self, images):
        """Images of each size run together; only the finished maps are filled up, so no image feels its neighbours."""
        chunks = same_size_chunks(images, len(images))
        parts = [self._project(torch.stack([images[index] for index in chunk])) for chunk in chunks]
        order = to_device(torch.tensor([index for chunk in chunks for index in chunk]).argsort(), images[0].device)
        maps, masks = [], []
        for level in zip(*parts, strict=True):
            sizes = [part.shape[-2:] for chunk, part in zip(chunks, level, strict=True) for _ in chunk]
            height, width = map(max, zip(*sizes))
            mask = padding(sizes, (height, width), order.device)
            filled = [F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2])) for part in level]
            maps.append(torch.cat(filled)[order])
            masks.append(mask[order])
        return maps, masks

    @torch.no_grad()
    def detect(
        self, images, score: float = 0.0, top: int = 100, nms: float | None = None, at_once: int = 50
    ) -> list[dict]:
        """Find objects. Raises UserError for a path that is no readable image.

        Args:
            images: one image or a list of them; each a tensor (3, H, W), a PIL image or a path.
            score: the least score of a detection.
            top: at most so many detections an image.
            nms: IoU over which the lower scored of two boxes of one class is dropped; None: what the training stage
                of the weights needs.
            at_once: images run together.

        Returns:
            One target dict an image with "boxes" (T, 4) in pixels of the image given, "labels", "scores" (falling)
            and "size".
        """
        alone = isinstance(images, (str, Path, Image.Image)) or (isinstance(images, torch.Tensor) and images.dim() == 3)
        originals = [as_tensor(image) for image in ([images] if alone else images)]
        inputs = [self._at_test_size(image) for image in originals]
        found: list[dict] = [{}] * len(inputs)
        for chunk in same_size_chunks(inputs, at_once):
            sizes = torch.tensor([originals[index].shape[-2:] for index in chunk])
            overlap = self.nms if nms is None else nms
            boxes, scores, labels, valid = self.best([inputs[index] for index in chunk], sizes, top, score, overlap)
            for row, index in enumerate(chunk):
                parts = {"boxes": boxes, "labels": labels, "scores": scores}
                found[index] = {key: part[row][valid[row]].cpu() for key, part in parts.items()}
                found[index]["size"] = tuple(originals[index].shape[-2:])
        return found

    def best(self, images, sizes: torch.Tensor, top: int, score: float, nms: float | None):
        """best_boxes of images of one size; an entry an image, in pixels of `sizes` (B, 2)."""
        return best_boxes(self(images), sizes, top, score, nms)

    def _at_test_size(self, image: torch.Tensor) -> torch.Tensor:
        if self.test_size is None:
            return image
        size = resized(tuple(image.shape[-2:]), *self.test_size)
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def padded_side(side: int) -> int:
    """The next multiple of 32 pixels, so that few shapes of batches come again and again: cuDNN prepares every
    convolution anew for each new one (benchmarks/batch_shapes.py).
    """
    return -(-side // 32) * 32


def padding(sizes: list[tuple[int, int]], shape: tuple[int, int], device) -> torch.Tensor:
    """(B, *shape) bool, True = padding, where images of these (height, width) are filled up to a common shape."""
    rows, columns = (torch.arange(side, device=device) for side in shape)
    heights, widths = to_device(torch.tensor(sizes), device).T[..., None, None]  # (B, 1, 1) each
    return (rows[:, None] >= heights) | (columns >= widths)


def valid_ratio(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W) padding -> (B, 2): the share of width and height that is image."""
    return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)


def as_tensor(image) -> torch.Tensor:
    """A tensor, PIL image or path as (3, H, W); paths and PIL images come out as uint8 RGB."""
    if isinstance(image, torch.Tensor):
        return image
    if not isinstance(image, Image.Image):
        return read_image(image, upright=True)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def same_size_chunks(images: Sequence[torch.Tensor], at_most: int) -> list[list[int]]:
    """Indices of the images in chunks of one size."""
    by_size: dict[tuple, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape[-2:]), []).append(index)
    return [group[start : start + at_most] for group in by_size.values() for start in range(0, len(group), at_most)]


def class_scores(outputs: dict) -> torch.Tensor:
    """(B, Q, C): sigmoids, or softmax without its last entry, "no object"; there only a query's best class counts."""
    logits = outputs["pred_logits"].float()
    if not outputs.get("no_object"):
        return logits.sigmoid()
    scores = logits.softmax(-1)[..., :-1]
    return torch.where(scores == scores.amax(-1, keepdim=True), scores, -1.0)


def best_boxes(outputs: dict, sizes: torch.Tensor, top: int, score: float = 0.0, nms: float | None = None):
    """The best (query, class) pairs of each image, as tensors of one length; nothing leaves the device.

    Args:
        outputs: with "pred_logits" (B, Q, C) and "pred_boxes" (B, Q, 4).
        sizes: (B, 2) the (H, W) whose pixels the boxes are wanted in.
        top: how many pairs are looked at, K = min(top, Q * C).
        score: the least score.
        nms: class-wise suppression at this IoU, or None.

    Returns:
        boxes (B, K, 4) xyxy pixels inside the image, scores (B, K) falling, labels (B, K), valid (B, K) bool.
    """
    scores = class_scores(outputs)
    classes = scores.shape[-1]
    scores, order = scores.flatten(1).topk(min(top, scores.shape[1] * classes), dim=1)
    labels = order % classes
    sizes = to_device(sizes, scores.device).to(scores)
    pixels = to_pixels(outputs["pred_boxes"].float(), sizes).clamp(min=0)
    pixels = torch.minimum(pixels, torch.cat([sizes, sizes], -1).flip(-1).unsqueeze(-2))  # nothing is seen outside
    boxes = pixels.gather(1, (order // classes)[..., None].expand(-1, -1, 4))
    valid = scores >= score
    if nms is not None:
        # one call for all images and classes: each (image, class) is moved to a place of its own
        places = labels + classes * torch.arange(len(scores), device=scores.device)[:, None]
        apart = boxes.double() + places[..., None] * (sizes.max() + 1.0)
        kept = suppress(apart.flatten(0, 1), torch.where(valid, scores, -1.0).flatten().double(), nms)
        valid = valid & torch.zeros_like(valid).flatten().index_fill_(0, kept, True).view_as(valid)
    return boxes, scores, labels, valid
