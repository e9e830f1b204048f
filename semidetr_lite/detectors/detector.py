"""What all detectors share: they normalise and batch images, and turn outputs into detections.

A detector has `encode(images) -> Memory` and `decode(memory, groups) -> outputs`. `detect` is
`decode(encode(images))` with boxes in pixels of the images given.

Shapes: B images, Q queries, D channels, L levels, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import nms as non_maximum_suppression

from semidetr_lite.boxes import height_and_width, to_pixels
from semidetr_lite.contracts import Outputs, Target
from semidetr_lite.data.views import resized
from semidetr_lite.detectors.backbone import Backbone
from semidetr_lite.detectors.denoising import Denoising
from semidetr_lite.detectors.inputs import is_single_image, load_image
from semidetr_lite.detectors.transformer import Memory
from semidetr_lite.device import to_device
from semidetr_lite.errors import UserError

# What holds an entry per image: a tensor (B, ...), or a list where their lengths differ.
PerImage = torch.Tensor | list[torch.Tensor]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# that `detect` runs together: a ResNet-50 at 800 x 1067 takes half a gigabyte per image
PIXELS_AT_ONCE = 4_000_000


class Detector(nn.Module):
    """Base of all detectors: normalisation, batching, `detect`.

    Args:
        mean, std: of the images in [0, 1], per channel.
        test_size: (shorter side, longer side at most) that `detect` resizes to; None: images keep
            their size.
    """

    used_maps = slice(None)  # which of the backbone's maps are projected
    strides: list[int]  # pixels per cell of the maps that a deformable detector reads
    takes_groups = False  # whether `decode` takes query groups
    num_classes: int  # C
    num_queries: int  # Q, where there are queries
    dim: int  # D
    backbone: Backbone
    projections: nn.ModuleList  # of the backbone's maps to D channels, then of further levels
    categories: list[dict]  # [{"id", "name"}] of the labels, of a trained detector
    mean: torch.Tensor  # (3, 1, 1)
    std: torch.Tensor  # (3, 1, 1)

    def __init__(
        self,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.test_size = test_size
        # longer side of the smallest and the largest image of a training at their own size
        self.train_sides: tuple[int, int] | None = None
        self.denoising: Denoising | None = None
        self.nms: float | None = None  # IoU threshold that `detect` needs; its training sets it
        self.pad_to_multiple_of = 32  # pixels, see `padded_side`

    def encode(self, images: Sequence[torch.Tensor] | torch.Tensor) -> Memory:
        """Backbone and encoder; images as in `forward`."""
        raise NotImplementedError

    def decode(self, memory: Memory, groups: Sequence = ()) -> Outputs:
        """Decoder and heads -> outputs; see DeformableDetector.decode for the groups."""
        raise NotImplementedError

    def decode_groups(self, memory: Memory, outputs: Outputs, groups: Sequence) -> list[Outputs]:
        """An outputs dict per query group; see DeformableDetector.decode_groups."""
        raise NotImplementedError

    def forward(
        self, images: Sequence[torch.Tensor] | torch.Tensor, groups: Sequence = ()
    ) -> Outputs:
        """The outputs dict of a batch.

        Args:
            images: a list of (3, H, W) or a tensor (B, 3, H, W), uint8 or float in [0, 1].
            groups: query groups, see DeformableDetector.decode.

        Raises:
            UserError: something that is not an RGB image.
        """
        return self.decode(self.encode(images), groups)

    def normalize(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
        """Images as a list of normalised float tensors on the detector's device."""
        normalized = []
        for image in images:
            if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
                raise UserError(
                    "an image must be a tensor (3, height, width) with pixels, "
                    f"got {tuple(image.shape)}"
                )
            image = to_device(image, self.mean.device)
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            normalized.append((image - self.mean) / self.std)
        return normalized

    # ---- feature maps ----------------------------------------------------------------------------

    def extract_features(
        self, images: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
        """The projected maps of a batch.

        Args:
            images: normalised (3, H, W), of any sizes.

        Returns:
            L maps (B, D, H, W); their masks (B, H, W) bool, True = padding; whether anything is
            padding.
        """
        same_size = len({tuple(image.shape[-2:]) for image in images}) == 1
        if same_size:
            maps = self._project(torch.stack(images))
            masks = [
                level.new_zeros(level.shape[0], *level.shape[-2:], dtype=torch.bool)
                for level in maps
            ]
            return maps, masks, False
        if self.backbone.pad_before_backbone:
            maps, masks = self._project_padded(images)
        else:
            maps, masks = self._project_by_size(images)
        return maps, masks, True

    def _project(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) -> L projected maps (B, D, H, W).

        Each of the backbone's maps has a projection. More levels are strided convolutions: the
        first of the backbone's last map, the next of the level before.
        """
        maps = self.backbone(images)[self.used_maps]
        projected = [
            projection(level) for projection, level in zip(self.projections, maps, strict=False)
        ]
        last = maps[-1]
        for projection in self.projections[len(maps) :]:
            last = projection(last)
            projected.append(last)
        return projected

    def _project_padded(
        self, images: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Pad the images with zeros to one size, before the backbone -> maps and masks."""
        sizes = [height_and_width(image) for image in images]
        multiple = self.pad_to_multiple_of
        height = padded_side(max(height for height, _ in sizes), multiple)
        width = padded_side(max(width for _, width in sizes), multiple)
        padded = images[0].new_zeros(len(images), 3, height, width)
        for index, image in enumerate(images):
            padded[index, :, : image.shape[-2], : image.shape[-1]] = image
        maps = self._project(padded)
        mask = padding_mask(sizes, (height, width), padded.device)[:, None].float()
        masks = [F.interpolate(mask, level.shape[-2:])[:, 0] > 0.5 for level in maps]
        return maps, masks

    def _project_by_size(
        self, images: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the images of each size on their own and pad the projected maps -> maps and masks.

        So no image depends on the others of its batch.
        """
        chunks = same_size_chunks(images, len(images))
        maps_per_chunk = [
            self._project(torch.stack([images[index] for index in chunk])) for chunk in chunks
        ]
        run_order = torch.tensor([index for chunk in chunks for index in chunk])
        batch_order = to_device(run_order.argsort(), images[0].device)
        maps, masks = [], []
        for level_maps in zip(*maps_per_chunk, strict=True):
            sizes = []
            for chunk, level_map in zip(chunks, level_maps, strict=True):
                sizes += [height_and_width(level_map)] * len(chunk)
            height = max(height for height, _ in sizes)
            width = max(width for _, width in sizes)
            padded = [
                F.pad(level_map, (0, width - level_map.shape[-1], 0, height - level_map.shape[-2]))
                for level_map in level_maps
            ]
            maps.append(torch.cat(padded)[batch_order])
            masks.append(padding_mask(sizes, (height, width), batch_order.device)[batch_order])
        return maps, masks

    # ---- detection -------------------------------------------------------------------------------

    @torch.no_grad()
    def detect(
        self,
        images,
        score: float = 0.0,
        top: int = 100,
        nms: float | None = None,
        batch_size: int = 50,
    ) -> list[Target]:
        """Detect objects in images.

        Args:
            images: one image or a list of them; each a path, PIL image, numpy array (H, W, 3),
                tensor (3, H, W), the bytes of an image file or an open one (see inputs.py).
                Photographs are turned upright as their EXIF data ask.
            score: detections of at least this score are returned.
            top: at most so many detections per image.
            nms: IoU threshold of non-maximum suppression per class; None: what the training stage
                of the weights needs.
            batch_size: images that are run together at most; fewer of large ones, see
                PIXELS_AT_ONCE.

        Returns:
            One target dict per image: "boxes" (T, 4) xyxy in pixels of the upright image, "labels"
            (T,), "scores" (T,) in falling order, "size" (H, W).

        Raises:
            UserError: what is not a readable image, and floats beyond 0..1.
        """
        if is_single_image(images):
            images = [images]
        originals = [load_image(image) for image in images]
        inputs = [self.at_test_size(image) for image in originals]
        nms = self.nms if nms is None else nms
        detections: list[Target] = [{}] * len(inputs)
        for chunk in same_size_chunks(inputs, batch_size, PIXELS_AT_ONCE):
            sizes = torch.tensor([originals[index].shape[-2:] for index in chunk])
            chunk_images = [inputs[index] for index in chunk]
            boxes, scores, labels, valid = self.detect_batch(chunk_images, sizes, top, score, nms)
            for row, index in enumerate(chunk):
                detections[index] = {
                    "boxes": boxes[row][valid[row]].cpu(),
                    "labels": labels[row][valid[row]].cpu(),
                    "scores": scores[row][valid[row]].cpu(),
                    "size": height_and_width(originals[index]),
                }
        return detections

    def detect_batch(
        self,
        images: list[torch.Tensor],
        sizes: torch.Tensor,
        top: int,
        score: float,
        nms: float | None,
    ) -> tuple[PerImage, PerImage, PerImage, PerImage]:
        """Boxes, scores, labels and valid masks of images of one size, an entry per image.

        Args:
            images: (3, H, W) each.
            sizes: (B, 2), the (H, W) whose pixels the boxes are wanted in.
            top, score, nms: see `postprocess`.
        """
        return postprocess(self(images), sizes, top, score, nms)

    def at_test_size(self, image: torch.Tensor) -> torch.Tensor:
        """The image at the detector's test size."""
        if self.test_size is None:
            return image
        size = resized(height_and_width(image), *self.test_size)
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def same_size_chunks(
    images: Sequence[torch.Tensor], max_images: int, max_pixels: float = float("inf")
) -> list[list[int]]:
    """The indices of the images, in chunks of one size.

    A chunk has at most `max_images`, and together `max_pixels` unless it is a single image.
    """
    by_size: dict[tuple, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape[-2:]), []).append(index)
    chunks = []
    for (height, width), indices in by_size.items():
        count = int(max(1, min(max_images, max_pixels // max(height * width, 1))))
        chunks += [indices[start : start + count] for start in range(0, len(indices), count)]
    return chunks


# ---- padding -------------------------------------------------------------------------------------


def padded_side(side: int, multiple: int) -> int:
    """The next multiple of so many pixels.

    cuDNN prepares every convolution anew for each new shape of a batch, so there should be few
    shapes (benchmarks/batch_shapes.py).
    """
    return -(-side // multiple) * multiple


def padding_mask(
    sizes: list[tuple[int, int]], shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """(B, *shape) bool, True = padding, of images (H, W) that are padded to a common shape."""
    rows = torch.arange(shape[0], device=device)
    columns = torch.arange(shape[1], device=device)
    heights, widths = to_device(torch.tensor(sizes), device).T[..., None, None]  # (B, 1, 1) each
    return (rows[:, None] >= heights) | (columns >= widths)


def valid_ratio(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W) bool, True = padding -> (B, 2): the fraction of width and height that is image."""
    width_ratio = (~mask[:, 0]).float().mean(1)
    height_ratio = (~mask[:, :, 0]).float().mean(1)
    return torch.stack([width_ratio, height_ratio], -1)


# ---- from outputs to boxes -----------------------------------------------------------------------


def class_scores(outputs: Outputs) -> torch.Tensor:
    """The scores (B, Q, C) of an outputs dict: sigmoids of the logits.

    With "no_object": the softmax without its last entry, and -1 except for the best class of each
    query.
    """
    logits = outputs["pred_logits"].float()
    if not outputs.get("no_object"):
        return logits.sigmoid()
    scores = logits.softmax(-1)[..., :-1]
    return torch.where(scores == scores.amax(-1, keepdim=True), scores, -1.0)


def postprocess(
    outputs: Outputs,
    sizes: torch.Tensor,
    top: int,
    score: float = 0.0,
    nms: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best (query, class) pairs of each image, as boxes. Does not synchronise with the GPU.

    Args:
        outputs: with "pred_logits" (B, Q, C) and "pred_boxes" (B, Q, 4).
        sizes: (B, 2), the (H, W) whose pixels the boxes are wanted in.
        top: K = min(top, Q * C) pairs per image are kept.
        score: pairs below it are not valid.
        nms: IoU threshold of non-maximum suppression per class, or None.

    Returns:
        boxes (B, K, 4) xyxy in pixels, inside the image; scores (B, K) in falling order; labels
        (B, K); valid (B, K) bool.
    """
    scores = class_scores(outputs)
    num_classes = scores.shape[-1]
    num_pairs = min(top, scores.shape[1] * num_classes)
    scores, pairs = scores.flatten(1).topk(num_pairs, dim=1)
    labels = pairs % num_classes
    queries = pairs // num_classes
    sizes = to_device(sizes, scores.device).to(scores)
    boxes = to_pixels(outputs["pred_boxes"].float(), sizes).clamp(min=0)
    limits = torch.cat([sizes, sizes], -1).flip(-1).unsqueeze(-2)  # (B, 1, 4) W, H, W, H
    boxes = torch.minimum(boxes, limits)
    boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    valid = scores >= score
    if nms is not None:
        # One call for all images and classes: boxes of each (image, class) are moved apart.
        images = torch.arange(len(scores), device=scores.device)[:, None]
        slots = labels + num_classes * images
        moved = boxes.double() + slots[..., None] * (sizes.max() + 1.0)
        nms_scores = torch.where(valid, scores, -1.0).flatten().double()
        kept = non_maximum_suppression(moved.flatten(0, 1), nms_scores, nms)
        not_suppressed = torch.zeros_like(valid).flatten().index_fill_(0, kept, True)
        valid = valid & not_suppressed.view_as(valid)
    return boxes, scores, labels, valid
