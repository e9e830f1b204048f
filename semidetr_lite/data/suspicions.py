"""What looks wrong with the boxes of a data set though every row can be read.

Each function returns one line, or None. Training stops at boxes that cannot be what they say, and
prints the others; the doctor lists all.
"""

import numpy as np

NORMALISED_MAX = 2.0  # no coordinate is over it in boxes that are fractions of the image
MANY_OUTSIDE = 0.2  # of the boxes reach out of their image, if they are corners and not sides
FEW_PIXELS = 1.0  # a side of an object that can hardly be learned
MAX_NAMES = 40  # class names in a line


def looks_normalised(xywh: np.ndarray, sizes: np.ndarray) -> str | None:
    """Boxes in 0..1 instead of pixels.

    Args:
        xywh: (A, 4) boxes as they are written.
        sizes: (A, 2), (H, W) of their images.
    """
    finite = xywh[np.isfinite(xywh).all(1)]
    if not len(finite) or np.abs(finite).max() > NORMALISED_MAX or finite.max() <= 0:
        return None
    if sizes.min() < 8 * NORMALISED_MAX:
        return None
    example = [round(value, 4) for value in finite[0].tolist()]
    return (
        f"all {len(xywh)} boxes look like fractions of the image, such as {example}; "
        "COCO's bbox is [x, y, width, height] in pixels: multiply by the sides of the image"
    )


def looks_like_corners(xywh: np.ndarray, sizes: np.ndarray) -> str | None:
    """Boxes written as [x1, y1, x2, y2] instead of [x, y, width, height].

    As corners all lie in their image, in the right order; as sides many reach out of it. Arguments
    as of `looks_normalised`.
    """
    if len(xywh) < 5 or not np.isfinite(xywh).all():
        return None
    x, y, third, fourth = xywh.T
    heights, widths = sizes.T
    as_corners = (third > x) & (fourth > y) & (third <= widths + 1) & (fourth <= heights + 1)
    outside = (x + third > widths + 1) | (y + fourth > heights + 1)
    if not as_corners.all() or outside.mean() < MANY_OUTSIDE:
        return None
    return (
        f"the boxes look like [x1, y1, x2, y2]: {outside.sum()} of {len(xywh)} reach out of their "
        "image as [x, y, width, height], none does as corners; write x2 - x1 and y2 - y1"
    )


def all_crowd(fields: dict[str, np.ndarray]) -> str | None:
    """Boxes that are all crowd regions, which no detector learns from; fields of a CocoDataset."""
    count = len(fields["crowd"])
    if not count or not fields["crowd"].all():
        return None
    advice = 'they are never learned from; write "iscrowd": 0 (masks: export boxes or polygons)'
    return f"all {count} boxes are crowd regions (iscrowd 1, or difficult): {advice}"


def tiny_boxes(fields: dict[str, np.ndarray]) -> str | None:
    """Boxes with a side of a pixel or less."""
    sides = (fields["boxes"][:, 2:] - fields["boxes"][:, :2]).min(1, initial=np.inf)
    count = int((sides <= FEW_PIXELS).sum())
    return f"{count} boxes have a side of a pixel or less" if count else None


def repeated_boxes(fields: dict[str, np.ndarray], image_of: np.ndarray) -> str | None:
    """Boxes that an image has twice with one class.

    Args:
        fields: of a CocoDataset.
        image_of: (A,) the index of the image of each box.
    """
    rows = np.column_stack([image_of, fields["labels"], fields["boxes"]])
    count = len(rows) - len(np.unique(rows, axis=0)) if len(rows) else 0
    return f"{count} boxes are repeated: same image, class and place" if count else None


def more_objects_than(counts: np.ndarray, queries: int) -> str | None:
    """Images with more objects than a detector can find.

    Args:
        counts: (N,) objects of each image.
        queries: of the detector.
    """
    over = int((counts > queries).sum())
    if not over:
        return None
    return (
        f"{over} of {len(counts)} images have more than {queries} objects (at most {counts.max()}),"
        f" and {queries} queries find no more than that: raise --queries"
    )


def named(names: list[str]) -> str:
    """Class names in a line, the first ones if they are many."""
    listed = ", ".join(repr(name) for name in names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    return f"{listed} and {more} more" if more > 0 else listed
