"""Drawings that explain: the stages of a detector as a strip, and IoU and GIoU of two boxes.

They show no data. A drawing is a figure like the others, with its words as alt text.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from semidetr_lite.visualize.style import (
    DPI,
    INK,
    LINE_COLORS,
    ORANGE,
    WIDTH,
    Picture,
    hide_frame,
    set_title,
)

LIT, UNLIT, LIT_PAPER, PAPER = "#0072B2", "#A8A8A8", "#E3F2FC", "#F7F7F7"
SIDE, STEP = 0.86, 1.12  # of a stage's square, and from one square to the next

# ---- the stages of a detector --------------------------------------------------------------------


def show_stages(lit: str | Collection[str] = ()) -> Picture:
    """The strip "image, backbone, encoder, queries, decoder, matching, losses, AP".

    Args:
        lit: a key of STAGES, or several: the stages that a notebook is about.

    Raises:
        ValueError: a stage that there is not.
    """
    lit = [lit] if isinstance(lit, str) else list(lit)
    unknown = set(lit) - set(STAGES)
    if unknown:
        raise ValueError(f"no stage {unknown}: choose from {', '.join(STAGES)}")
    figure = Picture(figsize=(WIDTH, 1.2), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.08, STEP * len(STAGES) - STEP + SIDE + 0.08), ylim=(0.9, -0.27))
    hide_frame(ax)
    figure.alt = f"The stages {', '.join(STAGES)}; in this notebook: {', '.join(lit) or 'all'}"
    for index, (name, draw) in enumerate(STAGES.items()):
        is_lit, left = name in lit, STEP * index
        color = LIT if is_lit else UNLIT
        frame = FancyBboxPatch(
            (left, 0),
            SIDE,
            SIDE,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=LIT_PAPER if is_lit else PAPER,
            edgecolor=color,
            linewidth=2.2 if is_lit else 1.0,
        )
        ax.add_patch(frame)
        draw(ax, left, color)
        weight = "bold" if is_lit else "normal"
        ink = LIT if is_lit else "#6A6A6A"
        middle = left + SIDE / 2
        ax.text(
            middle, -0.06, name, ha="center", va="bottom", fontsize=11, color=ink, weight=weight
        )
        if index:
            _arrow(ax, (left - STEP + SIDE + 0.04, SIDE / 2), (left - 0.04, SIDE / 2))
    return figure


def _arrow(ax: Axes, start: tuple, end: tuple, color: str = "#808080") -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, color=color
        )
    )


def _square(ax: Axes, left: float, top: float, side: float, color: str, fill=False) -> None:
    ax.add_patch(
        Rectangle((left, top), side, side, edgecolor=color, facecolor=color, fill=fill, lw=1.2)
    )


def _draw_image(ax: Axes, left: float, color: str) -> None:
    """A photograph with two boxes on it."""
    x, y = np.array([0.1, 0.1, 0.34, 0.52, 0.76, 0.76]), [0.76, 0.62, 0.5, 0.64, 0.46, 0.76]
    ax.fill(left + x, y, color=color, alpha=0.25, linewidth=0)
    ax.add_patch(Rectangle((left + 0.1, 0.1), 0.66, 0.66, edgecolor=color, fill=False, lw=1.0))
    for (x, y), digit in (((0.18, 0.18), "3"), ((0.5, 0.28), "7")):
        ax.add_patch(Rectangle((left + x, y), 0.18, 0.26, edgecolor=color, fill=False, lw=1.6))
        ax.text(left + x + 0.09, y + 0.14, digit, ha="center", va="center", fontsize=9, color=color)


def _draw_backbone(ax: Axes, left: float, color: str) -> None:
    """Maps that become smaller."""
    for shift, side in ((0.1, 0.5), (0.3, 0.36), (0.46, 0.24), (0.6, 0.14)):
        ax.add_patch(
            Rectangle(
                (left + shift, 0.43 - side / 2),
                side * 0.45,
                side,
                facecolor=color,
                alpha=0.55,
                lw=0,
            )
        )


def _draw_encoder(ax: Axes, left: float, color: str) -> None:
    """A grid of tokens; one looks at others."""
    places = [(left + 0.16 + 0.18 * x, 0.16 + 0.18 * y) for y in range(4) for x in range(4)]
    for other in (0, 3, 6, 10, 15, 12):
        ax.plot(*zip(places[5], places[other], strict=True), color=color, linewidth=0.9, alpha=0.7)
    for index, place in enumerate(places):
        ax.add_patch(Circle(place, 0.055 if index == 5 else 0.038, color=color, zorder=3))


def _draw_queries(ax: Axes, left: float, color: str) -> None:
    """Empty slots."""
    for row in range(5):
        ax.add_patch(
            FancyBboxPatch(
                (left + 0.16, 0.12 + 0.13 * row),
                0.54,
                0.075,
                boxstyle="round,pad=0,rounding_size=0.03",
                facecolor=color,
                alpha=0.3 + 0.13 * row,
                linewidth=0,
            )
        )


def _draw_decoder(ax: Axes, left: float, color: str) -> None:
    """Slots that read from a grid."""
    for row, column in np.ndindex(4, 3):
        ax.add_patch(Circle((left + 0.5 + 0.11 * column, 0.2 + 0.15 * row), 0.028, color=color))
    reads = ((0.2, (0, 0), (0, 1)), (0.43, (1, 0), (2, 1)), (0.66, (3, 0), (3, 1)))
    for y, *cells in reads:
        _square(ax, left + 0.12, y - 0.06, 0.12, color, fill=True)
        for row, column in cells:
            end = (left + 0.5 + 0.11 * column, 0.2 + 0.15 * row)
            ax.plot([left + 0.24, end[0]], [y, end[1]], color=color, linewidth=0.9)


def _draw_matching(ax: Axes, left: float, color: str) -> None:
    """Answers on one side, objects on the other, and pairs."""
    heights = np.linspace(0.14, 0.72, 5)
    for y in heights:
        _square(ax, left + 0.12, y - 0.045, 0.09, color, fill=True)
    for y, query in ((0.25, 1), (0.62, 3)):
        _square(ax, left + 0.6, y - 0.07, 0.14, color)
        ax.plot([left + 0.21, left + 0.6], [heights[query], y], color=color, linewidth=1.8)


def _draw_losses(ax: Axes, left: float, color: str) -> None:
    """A curve that falls."""
    x = np.linspace(0, 1, 40)
    y = 0.16 + 0.52 * (1 - np.exp(-3.2 * x)) + 0.015 * np.sin(26 * x)
    ax.plot(left + 0.14 + 0.6 * x, y, color=color, linewidth=2)
    ax.plot([left + 0.12, left + 0.12, left + 0.76], [0.1, 0.75, 0.75], color=color, linewidth=1)


def _draw_ap(ax: Axes, left: float, color: str) -> None:
    """The area under a precision-recall curve."""
    x = np.array([0.0, 0.22, 0.22, 0.4, 0.4, 0.54, 0.54, 0.6])
    y = np.array([0.18, 0.18, 0.28, 0.28, 0.42, 0.42, 0.6, 0.6])
    ax.fill_between(left + 0.12 + x, y, 0.75, color=color, alpha=0.25, linewidth=0)
    ax.plot(left + 0.12 + x, y, color=color, linewidth=2)
    ax.plot([left + 0.12, left + 0.12, left + 0.76], [0.1, 0.75, 0.75], color=color, linewidth=1)


STAGES: dict[str, Callable] = {
    "image": _draw_image,
    "backbone": _draw_backbone,
    "encoder": _draw_encoder,
    "queries": _draw_queries,
    "decoder": _draw_decoder,
    "matching": _draw_matching,
    "losses": _draw_losses,
    "AP": _draw_ap,
}

# ---- IoU and GIoU --------------------------------------------------------------------------------


def show_overlaps(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], title="") -> Picture:
    """Pairs of boxes with their intersection, union and enclosing box, and their IoU and GIoU.

    Args:
        pairs: two boxes (4,) xyxy each, drawn side by side at one scale.
        title: of the figure.
    """
    corners = [np.array(pair, dtype=float) for pair in pairs]  # (2, 4) each
    hulls = [np.r_[pair[:, :2].min(0), pair[:, 2:].max(0)] for pair in corners]
    widths = [hull[2] - hull[0] for hull in hulls]
    tallest, gap = max(hull[3] - hull[1] for hull in hulls), 0.12 * max(widths)
    across = sum(widths) + gap * (len(pairs) + 1)
    above, below = (inches * across / WIDTH for inches in (0.5 if title else 0.1, 0.6))
    height = above + tallest + below
    figure = Picture(figsize=(WIDTH, WIDTH * height / across), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, across), ylim=(height, 0), aspect="equal")
    hide_frame(ax)
    left = gap
    for pair, hull, width in zip(corners, hulls, widths, strict=True):
        shift = np.array([left - hull[0], above + tallest - hull[3]] * 2)
        _draw_pair(ax, pair + shift, hull + shift)
        left += width + gap
    return set_title(figure, title)


def _draw_pair(ax: Axes, pair: np.ndarray, hull: np.ndarray) -> None:
    """Two boxes, what they share, the box around both, and the two numbers below."""
    shared = np.r_[pair[:, :2].max(0), pair[:, 2:].min(0)]
    sides = np.clip(shared[2:] - shared[:2], 0, None)
    hull_area = float(np.prod(hull[2:] - hull[:2]))
    union = float(np.prod(pair[:, 2:] - pair[:, :2], axis=1).sum() - sides.prod())
    iou = sides.prod() / union
    giou = iou - (hull_area - union) / hull_area
    _rectangle(ax, hull, facecolor="white", edgecolor="#777777", hatch="////", linestyle="--")
    for box, color in zip(pair, (LINE_COLORS[0], ORANGE), strict=True):
        _rectangle(ax, box, facecolor="white", edgecolor="none")
        _rectangle(ax, box, facecolor=color, edgecolor="none", alpha=0.35)
    if sides.prod() > 0:
        _rectangle(ax, shared, facecolor="#3B7D3B", edgecolor="none")
    for box, color in zip(pair, (LINE_COLORS[0], ORANGE), strict=True):
        _rectangle(ax, box, facecolor="none", edgecolor=color, linewidth=2.4)
    words = f"IoU {iou:.2f}\nGIoU {giou:.2f}".replace("-", "\N{MINUS SIGN}")
    middle = (hull[0] + hull[2]) / 2
    below = {"xytext": (0, -8), "textcoords": "offset points", "ha": "center", "va": "top"}
    ax.annotate(words, (middle, hull[3]), fontsize=11, color=INK, **below)


def _rectangle(ax: Axes, box: np.ndarray, **style) -> None:
    ax.add_patch(Rectangle(tuple(box[:2]), box[2] - box[0], box[3] - box[1], **style))
