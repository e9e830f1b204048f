"""Boxes over images as inline SVG: sharp at any size, each image once in a page.

The report's pictures, in the visual language of visualize.STYLES. A page needs `css()` in its style
sheet and, before the pictures, `definitions()` with every image; `picture` then draws boxes over
one of them. No script is needed.
"""

import base64
import io
from html import escape

import numpy as np
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image
from torchvision.ops import box_iou

from semidetr_lite.visualize import BLUE, MOST_LABELS, STYLES, free_place

LONGEST = 800  # pixels of an image's longer side in the page
QUALITY, SMALL_QUALITY = 85, 92  # of JPEG, for large and small images
SMALL = 256  # pixels of the longer side up to which pixels are shown as squares
FONT = "DejaVu Sans"  # its letters are as wide as Verdana's; those of most other fonts are narrower
PIXELS_PER_POINT = 4 / 3
DASHES = {"-": "none", "--": "7 4", ":": "1.5 3"}


def css() -> str:
    """The rules that give boxes and labels their look."""
    rules = [
        ".picture { display: block; width: 100%; height: auto; border-radius: 4px; }",
        ".picture path, .swatch path { fill: none; vector-effect: non-scaling-stroke; }",
        f".picture text {{ font-family: '{FONT}', Verdana, sans-serif; }}",
        ".pixels { image-rendering: pixelated; }",
    ]
    for style, (color, points, dashes, hatch) in STYLES.items():
        width, dark = points * PIXELS_PER_POINT, "#000" if style == "truth" else "#0008"
        around = width + PIXELS_PER_POINT * (1.6 if style == "truth" else 1.2)
        line = f"stroke: {color or BLUE}; stroke-width: {width:.1f}px"
        line += f"; stroke-dasharray: {DASHES[dashes]}; fill: {'url(#hatch)' if hatch else 'none'}"
        under = f"stroke: {dark}; stroke-width: {around:.1f}px; fill: none"
        rules += [f".{style} path {{ {line}; }}", f".{style} .under {{ {under}; }}"]
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
    shown, file = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    shown.thumbnail((LONGEST, LONGEST))
    small = max(height, width) <= SMALL
    if small:
        shown.save(file, "JPEG", quality=SMALL_QUALITY, subsampling=0)
    else:
        shown.save(file, "JPEG", quality=QUALITY)
    code = base64.b64encode(file.getvalue()).decode("ascii")
    size = f'width="{width}" height="{height}" preserveAspectRatio="none"'
    look = 'class="pixels" ' if small else ""
    source = f'href="data:image/jpeg;base64,{code}"'
    box = f'viewBox="0 0 {width} {height}"'
    return f'<symbol id="{escape(key)}" {box}><image {look}{size} {source}/></symbol>'


def picture(key: str, size, rows, alt: str, width: int = 400, optional=()) -> str:
    """The image `key` with boxes, described by `alt`.

    `size` is the image's (H, W) and `rows` are (style, box xyxy in its pixels, label text or ""), a
    style being a key of STYLES. The picture is as wide as the page allows; at `width` CSS pixels
    its labels have the usual size. Boxes of the rows at `optional` have the class "more", so that a
    page can hide them. A label that finds no free place is left out; its box stays.
    """
    scale = width / size[1]
    height = round(size[0] * scale, 1)
    boxes = np.array([box for _, box, _ in rows], dtype=float).reshape(-1, 4)
    boxes = np.clip(boxes, 0, [size[1], size[0]] * 2) * scale
    parts = [f'<use href="#{escape(key)}" width="{width}" height="{height:g}"/>']
    groups: dict = {(more, style): [] for more in (True, False) for style in STYLES}  # bottom first
    for place, ((style, _, _), box) in enumerate(zip(rows, boxes)):
        groups[place in optional, style].append(box)
    for (more, style), chosen in groups.items():
        if chosen:
            parts.append(_boxes(f"{style} more" if more else style, chosen))
    parts += _labels(rows, boxes, (height, width))
    head = f'viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(alt)}"'
    return f'<svg class="picture" {head}>{"".join(parts)}</svg>'


def swatch(style: str) -> str:
    """A box in a style, for a legend."""
    drawn = _boxes(style, [(3, 3, 25, 13)])
    return f'<svg class="swatch" width="28" height="16" aria-hidden="true">{drawn}</svg>'


def _boxes(classes: str, boxes) -> str:
    """Boxes of one style as two paths: a dark one, seen on any photograph, under their own."""
    drawn = "".join(f"M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}Z" for x1, y1, x2, y2 in boxes)
    paths = f'<path class="under" d="{drawn}"/><path d="{drawn}"/>'
    return f'<g class="{classes}">{paths}</g>'


def _labels(rows, boxes: np.ndarray, size: tuple[float, float], font_size: float = 12) -> list[str]:
    """The texts of the rows, each beside its box; those that would cover another are left out."""
    font, taken, parts = FontProperties(family=FONT, size=font_size), [], []
    for (style, _, text), box in zip(rows, boxes):
        if not text or len(taken) == MOST_LABELS:
            continue
        wide = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] + 6
        place = free_place(box, np.array([min(wide, size[1]), font_size + 5]), size, boxes, taken)
        others = torch.tensor(np.reshape(taken, (-1, 4)))
        if (box_iou(torch.tensor(place[None]), others) > 0.02).any():
            continue
        taken.append(place)
        parts.append(_label(text, place, STYLES[style][0] or BLUE, font_size))
    return parts


def _label(text: str, place: np.ndarray, color: str, font_size: float) -> str:
    """A text on its colour; a page may enlarge the class "label" on small screens."""
    x, y, right, bottom = place
    ink = "#fff" if color == STYLES["missed"][0] else "#000"
    corner = f'x="{x:.1f}" y="{y:.1f}" rx="2"'
    back = f'<rect {corner} width="{right - x:.1f}" height="{bottom - y:.1f}" fill="{color}"/>'
    middle, base = (x + right) / 2, bottom - 0.28 * (bottom - y)
    style = f'font-size="{font_size:g}" text-anchor="middle" fill="{ink}"'
    words = f'<text x="{middle:.1f}" y="{base:.1f}" {style}>{escape(text)}</text>'
    return f'<g class="label">{back}{words}</g>'
