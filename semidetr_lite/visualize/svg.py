"""Boxes over images as inline SVG: sharp at any size, each image once in a page.

The report's pictures, in the common STYLES. A page needs `css()` in its style sheet and, before the
pictures, `definitions()` with every image; `picture` then draws boxes over one of them. No script
is needed.
"""

import base64
import io
from collections.abc import Collection, Sequence
from html import escape

import numpy as np
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image
from torchvision.ops import box_iou

from semidetr_lite.visualize.boxes import SMALL, free_place
from semidetr_lite.visualize.style import BLUE, MAX_LABELS, STYLES

MAX_SIDE = 800  # pixels of an image's longer side in the page
QUALITY, SMALL_QUALITY = 85, 92  # of JPEG, for large and small images
FONT = "DejaVu Sans"  # its letters are as wide as Verdana's; those of most other fonts are narrower
PIXELS_PER_POINT = 4 / 3
DASHES = {"-": "none", "--": "7 4", ":": "1.5 3"}


def css() -> str:
    """The rules of a style sheet for boxes and labels."""
    rules = [
        ".picture { display: block; width: 100%; height: auto; border-radius: 4px; }",
        ".picture path, .swatch path { fill: none; vector-effect: non-scaling-stroke; }",
        f".picture text {{ font-family: '{FONT}', Verdana, sans-serif; }}",
        ".pixels { image-rendering: pixelated; }",
    ]
    for style, (color, points, dashes, hatch) in STYLES.items():
        width = points * PIXELS_PER_POINT
        outline = width + PIXELS_PER_POINT * (1.6 if style == "truth" else 1.2)
        dark = "#000" if style == "truth" else "#0008"
        line = f"stroke: {color or BLUE}; stroke-width: {width:.1f}px"
        line += f"; stroke-dasharray: {DASHES[dashes]}; fill: {'url(#hatch)' if hatch else 'none'}"
        rules.append(f".{style} path {{ {line}; }}")
        line = f"stroke: {dark}; stroke-width: {outline:.1f}px; fill: none"
        rules.append(f".{style} .under {{ {line}; }}")
    return "\n".join(rules)


def definitions(images: dict[str, torch.Tensor]) -> str:
    """The hidden part of a page: its `images` {key: (3, H, W)}, and the hatching of errors."""
    color = STYLES["false_alarm"][0]
    units = 'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"'
    line = f'<line x1="0" y1="0" x2="0" y2="10" stroke="{color}" stroke-width="2" opacity=".55"/>'
    hatch = f'<pattern id="hatch" width="10" height="10" {units}>{line}</pattern>'
    symbols = "\n".join(_symbol(key, image) for key, image in images.items())
    hidden = 'width="0" height="0" style="position:absolute" aria-hidden="true"'
    return f"<svg {hidden}><defs>{hatch}\n{symbols}</defs></svg>"


def _symbol(key: str, image: torch.Tensor) -> str:
    """An image under a name, as a JPEG inside the page."""
    image = torch.as_tensor(image).detach().cpu()
    pixels = (image.clamp(0, 1) * 255).round().byte() if image.is_floating_point() else image
    height, width = pixels.shape[1:]
    photograph = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    photograph.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    is_small = max(height, width) <= SMALL
    if is_small:
        photograph.save(file, "JPEG", quality=SMALL_QUALITY, subsampling=0)
    else:
        photograph.save(file, "JPEG", quality=QUALITY)
    code = base64.b64encode(file.getvalue()).decode("ascii")
    size = f'width="{width}" height="{height}" preserveAspectRatio="none"'
    classes = 'class="pixels" ' if is_small else ""
    source = f'href="data:image/jpeg;base64,{code}"'
    view = f'viewBox="0 0 {width} {height}"'
    return f'<symbol id="{escape(key)}" {view}><image {classes}{size} {source}/></symbol>'


def picture(
    key: str,
    size: Sequence[int],
    rows: Sequence[tuple],
    alt: str,
    width: int = 400,
    optional: Collection[int] = (),
) -> str:
    """An image of the page with boxes.

    The picture is as wide as the page allows. A label that finds no free place is left out; its
    box stays.

    Args:
        key: of the image in `definitions`.
        size: (H, W) of the image.
        rows: (key of STYLES, box xyxy in pixels of the image, label text or "").
        alt: describes the picture for those who do not see it.
        width: CSS pixels at which the labels have the usual size.
        optional: indices of rows whose boxes have the class "more", so that a page can hide them.
    """
    scale = width / size[1]
    height = round(size[0] * scale, 1)
    boxes = np.array([box for _, box, _ in rows], dtype=float).reshape(-1, 4)
    boxes = np.clip(boxes, 0, [size[1], size[0]] * 2) * scale
    parts = [f'<use href="#{escape(key)}" width="{width}" height="{height:g}"/>']
    # bottom first
    groups: dict = {(more, style): [] for more in (True, False) for style in STYLES}
    for index, ((style, _, _), box) in enumerate(zip(rows, boxes)):
        groups[index in optional, style].append(box)
    for (more, style), group in groups.items():
        if group:
            parts.append(_boxes(f"{style} more" if more else style, group))
    parts += _labels(rows, boxes, (height, width))
    head = f'viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(alt)}"'
    return f'<svg class="picture" {head}>{"".join(parts)}</svg>'


def swatch(style: str) -> str:
    """A box in a style, for a legend."""
    box = _boxes(style, [(3, 3, 25, 13)])
    return f'<svg class="swatch" width="28" height="16" aria-hidden="true">{box}</svg>'


def _boxes(classes: str, boxes: Sequence) -> str:
    """Boxes of one style as two paths: a dark one, seen on any photograph, under their own."""
    outline = "".join(f"M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}Z" for x1, y1, x2, y2 in boxes)
    return f'<g class="{classes}"><path class="under" d="{outline}"/><path d="{outline}"/></g>'


def _labels(
    rows: Sequence[tuple], boxes: np.ndarray, size: tuple[float, float], font_size: float = 12
) -> list[str]:
    """The texts of the rows, each beside its box; those that would cover another are left out."""
    font = FontProperties(family=FONT, size=font_size)
    taken: list[np.ndarray] = []
    parts = []
    for (style, _, text), box in zip(rows, boxes):
        if not text or len(taken) == MAX_LABELS:
            continue
        text_width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] + 6
        extent = np.array([min(text_width, size[1]), font_size + 5])
        label_box = free_place(box, extent, size, boxes, taken)
        others = torch.tensor(np.reshape(taken, (-1, 4)))
        if (box_iou(torch.tensor(label_box[None]), others) > 0.02).any():
            continue
        taken.append(label_box)
        parts.append(_label(text, label_box, STYLES[style][0] or BLUE, font_size))
    return parts


def _label(text: str, label_box: np.ndarray, color: str, font_size: float) -> str:
    """A text on its colour; a page may enlarge the class "label" on small screens."""
    x, y, right, bottom = label_box
    ink = "#fff" if color == STYLES["missed"][0] else "#000"
    corner = f'x="{x:.1f}" y="{y:.1f}" rx="2"'
    back = f'<rect {corner} width="{right - x:.1f}" height="{bottom - y:.1f}" fill="{color}"/>'
    middle = (x + right) / 2
    baseline = bottom - 0.28 * (bottom - y)
    style = f'font-size="{font_size:g}" text-anchor="middle" fill="{ink}"'
    words = f'<text x="{middle:.1f}" y="{baseline:.1f}" {style}>{escape(text)}</text>'
    return f'<g class="label">{back}{words}</g>'
