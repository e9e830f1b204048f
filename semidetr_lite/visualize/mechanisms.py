"""How the parts of a detection transformer work: drawings of a few boxes, cells and arrows.

Pure functions that return a figure as wide as a page. Each one draws the numbers it is given, so
that the example of a text and its drawing agree.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from semidetr_lite.visualize.style import (
    BLUE,
    DPI,
    INK,
    LINE_COLORS,
    ORANGE,
    RED,
    WIDTH,
    Picture,
    set_title,
)

PALE, FAINT, DARK_BLUE, GREEN = "#F1F1F1", "#9A9A9A", "#0072B2", "#009E73"
WORDS = 10  # points


def _panels(height: float, count: int = 1, ratios: Sequence[float] | None = None):
    """A figure of the page's width and its axes, without frames, with equal units."""
    figure = Picture(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = np.atleast_1d(figure.subplots(1, count, width_ratios=ratios))
    for ax in axes:
        ax.set_aspect("equal")
        ax.axis("off")
    return figure, axes


def _say(ax: Axes, x: float, y: float, text: str, color: str = INK, size: float = WORDS, **more):
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": color}
    ax.text(x, y, text, parse_math=False, **(style | more))


def _arrow(
    ax: Axes,
    start: tuple,
    end: tuple,
    color: str = INK,
    dashed: bool = False,
    bend: float = 0.0,
    width: float = 1.6,
    shrink: float = 0.0,
) -> None:
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=13,
        color=color,
        linewidth=width,
        linestyle="--" if dashed else "-",
        connectionstyle=f"arc3,rad={bend}",
        shrinkA=shrink,
        shrinkB=shrink,
        zorder=4,
    )
    ax.add_patch(patch)


def _outline(ax: Axes, box: Sequence[float], color: str, style: str = "-", width: float = 2.0):
    """A box xyxy without filling."""
    x1, y1, x2, y2 = box
    patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, zorder=3)
    patch.set(linewidth=width, linestyle=style)
    ax.add_patch(patch)


# ---- matching ------------------------------------------------------------------------------------


def draw_assignments(
    costs: torch.Tensor, pairs: dict[str, Sequence[tuple[int, int]]], title: str | None = None
) -> Picture:
    """Matchings of one cost table side by side: queries as rows, objects as columns.

    Args:
        costs: (Q, T).
        pairs: {name of a matching: its (query, object) pairs}, which are framed.
        title: of the figure; None: which total is the smallest.
    """
    table = torch.as_tensor(costs).tolist()
    rows, columns = len(table), len(table[0])
    figure, axes = _panels(0.6 * rows + 1.1, len(pairs))
    totals = {name: sum(table[q][t] for q, t in chosen) for name, chosen in pairs.items()}
    for ax, (name, chosen) in zip(axes, pairs.items()):
        used = {query for query, _ in chosen}
        for query, row in enumerate(table):
            color = INK if query in used else FAINT
            _say(ax, -0.15, query + 0.5, f"query {query}", color, ha="right")
            for column, value in enumerate(row):
                is_pair = (query, column) in chosen
                face = BLUE if is_pair else PALE
                cell = Rectangle((2 * column + 0.05, query + 0.05), 1.9, 0.9, facecolor=face)
                cell.set(edgecolor=RED if is_pair else "none", linewidth=2.4)
                ax.add_patch(cell)
                weight = "bold" if is_pair else "normal"
                _say(ax, 2 * column + 1, query + 0.5, f"{value:.2f}", size=11, weight=weight)
        for column in range(columns):
            _say(ax, 2 * column + 1, -0.25, f"object {column}")
        _say(ax, columns, rows + 0.4, f"{name}: total cost {totals[name]:.2f}", size=11)
        ax.set(xlim=(-1.4, 2 * columns + 0.1), ylim=(rows + 0.7, -0.5))
    best = min(totals, key=lambda name: totals[name])
    return set_title(figure, title, f"{best} has the smallest total")


# ---- reading a map -------------------------------------------------------------------------------


def draw_bilinear(values: torch.Tensor, x: float, y: float, title: str | None = None) -> Picture:
    """A map with a point (x, y) in [0, 1] between four cell centres, and the four weights.

    The right panel shows the weights as areas: each rectangle belongs to the centre diagonally
    opposite to it.
    """
    values = torch.as_tensor(values)
    height, width = values.shape
    px, py = x * width, y * height
    column, row = int(np.floor(px - 0.5)), int(np.floor(py - 0.5))
    right, below = px - 0.5 - column, py - 0.5 - row
    figure, (whole, near) = _panels(3.4, 2, (1.6, 1))
    neighbours = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
    for r in range(height):
        for c in range(width):
            face = "#CFE8F7" if (r, c) in neighbours else PALE
            whole.add_patch(Rectangle((c, r), 1, 1, facecolor=face, edgecolor="white", linewidth=3))
            whole.plot(c + 0.5, r + 0.5, "o", color=FAINT, markersize=4)
            away = 0.28 * np.sign([c + 0.5 - px, r + 0.5 - py])  # from the lines to the point
            x, y = np.array([c + 0.5, r + 0.5]) + away
            _say(whole, x, y, f"{float(values[r, c]):g}", size=11)
    for r, c in neighbours:
        whole.plot([c + 0.5, px], [r + 0.5, py], color=DARK_BLUE, linewidth=1.2, zorder=2)
    for ax in (whole, near):
        ax.plot(px, py, "o", color=RED, markersize=9, zorder=5)
    _say(whole, px - 0.1, py, f"({x:g}, {y:g})", RED, ha="right")
    whole.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.05, -0.05))

    shares = [(1 - below) * (1 - right), (1 - below) * right, below * (1 - right), below * right]
    for (r, c), share, color in zip(neighbours, shares, LINE_COLORS):
        near.plot(c + 0.5, r + 0.5, "o", color=color, markersize=11, zorder=5)
        far_x, far_y = 2 * column + 1 - c + 0.5, 2 * row + 1 - r + 0.5
        corner = (min(px, far_x), min(py, far_y))
        area = Rectangle(corner, abs(far_x - px), abs(far_y - py), facecolor=color, alpha=0.35)
        near.add_patch(area)
        up = -0.14 if r == row else 0.14
        words = f"{float(values[r, c]):g}, weight {share:.3g}"
        _say(near, c + 0.5, r + 0.5 + up, words, color, weight="bold")
    near.set(xlim=(column + 0.15, column + 1.85), ylim=(row + 1.8, row + 0.2))
    total = sum(share * float(values[r, c]) for (r, c), share in zip(neighbours, shares))
    return set_title(figure, title, f"Between four centres the map has the value {total:g}")


def draw_sampling_star(
    directions: torch.Tensor, box: Sequence[float], title: str | None = None
) -> Picture:
    """Where an untrained layer samples: around a reference point, and around a reference box.

    Args:
        directions: (M, P, 2), the first offsets of M heads and P points, (x, y).
        box: (width, height) of the reference box, in cells.
        title: of the figure.
    """
    of_heads = torch.as_tensor(directions).tolist()
    points = len(of_heads[0])
    width, height = box
    reach = max(points, width / 2, height / 2) + 1.0
    figure, axes = _panels(4.8, 2)
    scales = ((1.0, 1.0), (width / 2 / points, height / 2 / points))
    captions = ("from a point: offsets in cells", f"from a box: the last of {points} on its edge")
    for ax, scale, caption in zip(axes, scales, captions):
        lines = np.arange(0.5 - np.floor(reach), reach)  # between the cells
        ax.hlines(lines, -reach, reach, color="#E3E3E3", linewidth=1)
        ax.vlines(lines, -reach, reach, color="#E3E3E3", linewidth=1)
        for head, (offsets, color) in enumerate(zip(of_heads, LINE_COLORS)):
            places = np.array(offsets) * scale
            ax.plot(*np.vstack([[0, 0], places]).T, color=color, linewidth=1.2, zorder=3)
            ax.plot(*places.T, "o", color=color, markersize=8, zorder=4)
            x, y = places[-1]
            upright = abs(y) > abs(x)
            label_y = y + 0.45 * np.sign(y) if upright else y - 0.4
            _say(ax, x, label_y, f"head {head}", color, weight="bold")
        ax.plot(0, 0, "+", color=RED, markersize=16, markeredgewidth=3, zorder=5)
        ax.set(xlim=(-reach, reach), ylim=(reach, -reach - 0.8))
        _say(ax, 0, -reach - 0.4, caption, size=11)
    _outline(axes[1], (-width / 2, -height / 2, width / 2, height / 2), INK)
    finding = "Before training each head looks in a direction of its own"
    return set_title(figure, title, finding)


# ---- denoising -----------------------------------------------------------------------------------


def draw_noised_boxes(
    true_box: Sequence[float],
    positive: Sequence[float],
    negative: Sequence[float],
    amount: float,
    title: str | None = None,
) -> Picture:
    """How far the edges of a positive and of a negative denoising box may move.

    Args:
        true_box, positive, negative: xyxy.
        amount: the limit of a positive in half sides of the true box; that of a negative is twice
            as far.
        title: of the figure.
    """
    figure, axes = _panels(3.3, 2)
    x1, y1, x2, y2 = true_box
    half = np.array([x2 - x1, y2 - y1]) / 2
    rows = (
        (positive, 0.0, amount, GREEN, "positive: target is the true box"),
        (negative, amount, 2 * amount, ORANGE, "negative: target is “no object”"),
    )
    for ax, (box, least, most, color, caption) in zip(axes, rows):
        for x, y in ((x1, y1), (x2, y2)):
            _draw_reach(ax, (x, y), least * half, most * half, color)
        _outline(ax, true_box, INK, ":", 2.2)
        _outline(ax, box, color, "-", 2.6)
        reach = 2 * amount * half + 2
        _say(ax, (x1 + x2) / 2, y1 - reach[1] - 2, caption, size=11)
        ax.set(xlim=(x1 - reach[0], x2 + reach[0]), ylim=(y2 + reach[1], y1 - reach[1] - 4))
    finding = "Dotted: the true box. Coloured: where its two corners may go"
    return set_title(figure, title, finding)


def _draw_reach(ax: Axes, corner: tuple, least: np.ndarray, most: np.ndarray, color: str) -> None:
    """The places that a corner may move to: each coordinate by `least` to `most`."""
    (x, y), (low_x, low_y), (high_x, high_y) = corner, least, most
    for x_sign in (-1, 1):
        for y_sign in (-1, 1):
            start = (x + x_sign * low_x, y + y_sign * low_y)
            size = (x_sign * (high_x - low_x), y_sign * (high_y - low_y))
            ax.add_patch(Rectangle(start, *size, facecolor=color, alpha=0.22, zorder=1))
    ax.plot(x, y, "o", color=INK, markersize=5, zorder=4)


def draw_group_mask(
    sizes: Sequence[int], queries: int, mask: torch.Tensor, title: str | None = None
) -> Picture:
    """Who sees whom: the groups and the matching queries as blocks, and the mask as a table.

    Args:
        sizes: queries of each group; the first half of a group is positive.
        queries: number of matching queries.
        mask: (N, N) bool, True = blocked.
        title: of the figure.
    """
    blocked = torch.as_tensor(mask).tolist()
    colors, names, kinds = [], [], []
    for number, size in enumerate(sizes):
        colors += [LINE_COLORS[2 + number]] * size
        kinds += ["+"] * (size // 2) + ["−"] * (size - size // 2)
        names.append(f"group {number + 1}")
    colors += [DARK_BLUE] * queries
    kinds += ["q"] * queries
    names.append("matching queries")
    figure, (flow, table) = _panels(4.6, 2, (1.1, 1))
    _draw_blocks(flow, [*sizes, queries], names, colors, kinds)
    for row, line in enumerate(blocked):
        for x, y in ((-0.6, row + 0.5), (row + 0.5, -0.6)):
            table.add_patch(Circle((x, y), 0.34, color=colors[row]))
            _say(table, x, y, kinds[row], "white", weight="bold")
        for column, is_blocked in enumerate(line):
            face = PALE if is_blocked else colors[row]
            cell = Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, facecolor=face)
            cell.set_alpha(1.0 if is_blocked else 0.55)
            table.add_patch(cell)
            if is_blocked:
                _say(table, column + 0.5, row + 0.5, "1", FAINT)
    count = len(blocked)
    _say(table, -1.5, count / 2, "sees", rotation=90)
    _say(table, count / 2, -1.5, "may be seen")
    table.set(xlim=(-2.0, count + 0.1), ylim=(count + 0.1, -2.0))
    finding = "The groups see the matching queries; no group is seen from outside (1 = blocked)"
    return set_title(figure, title, finding)


def _draw_blocks(ax: Axes, sizes: list[int], names: list[str], colors: list, kinds: list) -> None:
    """The blocks of queries below each other, with arrows to those who may see them."""
    start, middles = 0, []
    for number, (size, name) in enumerate(zip(sizes, names)):
        y = 1.7 * number
        frame = FancyBboxPatch((0, y), 4.2, 1.0, "round,pad=0.08", facecolor="white")
        frame.set(edgecolor=colors[start], linewidth=2.2)
        ax.add_patch(frame)
        for place in range(size):
            center = (0.55 + place * 3.1 / max(size - 1, 1), y + 0.5)
            ax.add_patch(Circle(center, 0.3, color=colors[start + place]))
            _say(ax, *center, kinds[start + place], "white", weight="bold", size=11)
        _say(ax, 2.1, y - 0.28, name, colors[start], weight="bold")
        middles.append(y + 0.5)
        start += size
    for number, y in enumerate(middles[:-1]):
        bend = 0.35 + 0.1 * (len(middles) - number)
        _arrow(ax, (4.35, middles[-1] - 0.1), (4.35, y), colors[-1], bend=bend)
    _say(ax, 6.1, float(np.mean(middles)), "see the\nmatching\nqueries", colors[-1], ha="left")
    for first, second in pairwise(middles[:-1]):
        _say(ax, -0.5, (first + second) / 2, "×", RED, size=18, weight="bold")
    _say(ax, -0.5, (middles[-2] + middles[-1]) / 2, "×", RED, size=18, weight="bold")
    ax.set(xlim=(-1.0, 8.0), ylim=(middles[-1] + 0.8, -0.6))


# ---- look forward twice --------------------------------------------------------------------------


def draw_look_forward_twice(title: str | None = None) -> Picture:
    """Two decoder layers and their boxes: what the loss of the second layer trains."""
    figure, axes = _panels(3.2, 2)
    captions = ("look forward once (Deformable DETR)", "look forward twice (DINO)")
    left, right = 1.4, 7.0
    for ax, caption, twice in zip(axes, captions, (False, True)):
        for x, number in ((left, 1), (right, 2)):
            frame = FancyBboxPatch((x - 1.2, 0), 2.4, 1.0, "round,pad=0.1", facecolor=PALE)
            frame.set(edgecolor=INK, linewidth=1.4)
            ax.add_patch(frame)
            _say(ax, x, 0.5, f"decoder layer {number}")
            _arrow(ax, (x, 1.15), (x, 2.2))
            _arrow(ax, (x - 0.5, 2.2), (x - 0.5, 1.15), RED, dashed=True)
            _say(ax, x, 2.55, f"box {number} = box {number - 1} + Δ{number}", weight="bold")
            _arrow(ax, (x, 3.95), (x, 2.9), RED, dashed=True)
            _say(ax, x, 4.2, f"loss {number}", RED, size=11, weight="bold")
        _arrow(ax, (left + 0.8, 2.25), (right - 1.3, 0.6), bend=0.1)
        _say(ax, 4.2, 0.35, "where layer 2\nlooks (detached)", size=9)
        _arrow(ax, (left + 1.6, 2.55), (right - 1.6, 2.55))
        if twice:
            _arrow(ax, (right - 1.6, 2.85), (left + 1.6, 2.85), RED, dashed=True)
            _say(ax, 4.2, 3.3, "loss 2 trains Δ1 too", RED)
        else:
            ax.plot([4.2, 4.2], [2.25, 2.85], color=RED, linewidth=3, zorder=5)
            _say(ax, 4.2, 3.3, "detached: no gradient", RED)
        _say(ax, 4.2, -0.6, caption, size=11)
        ax.set(xlim=(-0.4, 8.8), ylim=(4.5, -0.9))
    finding = "Solid: the forward pass. Dashed red: where the losses' gradients go"
    return set_title(figure, title, finding)
