"""Boxes on images: pure functions that take images and targets and return a figure.

Boxes are xyxy pixels of the image they are drawn on. The title of a figure is its finding; each
function writes its own unless a title is given, and `title=""` leaves it out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.patches import ConnectionPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from torchvision.ops import box_iou

from semidetr_lite.contracts import Target, TargetLike
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import box_errors
from semidetr_lite.visualize.style import (
    BLUE,
    DPI,
    INK,
    MAX_LABELS,
    STYLE_NAMES,
    STYLES,
    WIDTH,
    Picture,
    class_color,
    count_of,
    hide_frame,
    set_title,
    wrap,
)

MARGIN = 0.1  # inches around images
MAX_CELL = 4.35  # inches: no image is wider unless asked for, and two of them fill the page
LABEL_POINTS, CAPTION_POINTS = 8, 9
BEST_DROPPED = 5  # of the boxes that a teacher drops, those with the highest scores are drawn
SMALL = 256  # pixels of the longer side up to which pixels are drawn as squares

# ---- one image with its boxes --------------------------------------------------------------------


def draw_boxes(
    ax: Axes,
    image: torch.Tensor,
    target: TargetLike | None = None,
    truth: TargetLike | None = None,
    categories: list[dict] | None = None,
    style: str | Sequence[str] = "prediction",
) -> None:
    """Draw an image with the boxes of `target` over those of `truth`.

    A box of `target` is labelled with its class name and its score if there is one; of many boxes
    only the MAX_LABELS with the highest scores are. `truth` is labelled only where it stands alone.

    Args:
        ax: where to draw.
        image: (3, H, W), uint8 or float in [0, 1].
        target: boxes in pixels of the image; one without "boxes" (unlabelled) draws nothing.
        truth: drawn below `target`, in the style "truth".
        categories: [{"name"}] in the order of the labels; without them the labels are numbers.
        style: a key of STYLES, or a list with one key per box of `target`.

    Raises:
        UserError: an image of another shape.
    """
    height, width = _draw_image(ax, image)
    boxes, true_boxes = _box_tuples(target), _box_tuples(truth)
    labels = []
    for box, label, _ in true_boxes:
        text = "" if boxes else label_text(label, categories)
        labels.append(draw_box(ax, box, "truth", label, text))
    styles = [style] * len(boxes) if isinstance(style, str) else style
    with_label = _indices_with_label(boxes, styles)
    for index, (box, label, score) in enumerate(boxes):
        # a box that ends beyond the image would cross the words around it
        box = np.clip(box, -1, [width + 1, height + 1] * 2)
        text = label_text(label, categories, score) if index in with_label else ""
        labels.append(draw_box(ax, box, styles[index], label, text))
    write_labels(ax, labels, (height, width))


def _draw_image(ax: Axes, image: torch.Tensor) -> tuple[int, int]:
    """Draw an image with the edges of its pixels on whole numbers; returns its (H, W)."""
    image = torch.as_tensor(image).detach().cpu()
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"an image to draw must have the shape (3, H, W), got {tuple(image.shape)}")
    pixels = (image.clamp(0, 1) * 255).round().byte() if image.is_floating_point() else image
    height, width = image.shape[1:]
    interpolation = "nearest" if max(height, width) <= SMALL else "antialiased"
    ax.imshow(
        pixels.permute(1, 2, 0).numpy(),
        extent=(0, width, height, 0),
        interpolation=interpolation,
    )
    ax.set(xlim=(0, width), ylim=(height, 0))
    hide_frame(ax)
    return height, width


def _indices_with_label(boxes: list[tuple], styles: Sequence[str]) -> list[int]:
    """The boxes to label: those with the highest scores, without the dropped ones."""

    def score(index: int) -> float:
        return -1.0 if boxes[index][2] is None else boxes[index][2]

    ranked = sorted(range(len(boxes)), key=score, reverse=True)
    return [index for index in ranked if styles[index] != "dropped"][:MAX_LABELS]


def draw_box(
    ax: Axes,
    box: Sequence[float],
    style: str,
    label: int,
    text: str = "",
    linewidth: float | None = None,
) -> tuple:
    """Draw one rectangle; returns (box, colour, text) for `write_labels`."""
    color = STYLES[style][0] or class_color(label)
    patch = Rectangle(
        (box[0], box[1]),
        box[2] - box[0],
        box[3] - box[1],
        gid=style,
        clip_on=False,
        zorder=2 if style in ("truth", "dropped") else 3,
        **_patch_arguments(style, color, linewidth),
    )
    ax.add_patch(patch)
    return box, color, text


def _patch_arguments(style: str, color, linewidth: float | None = None) -> dict:
    """Arguments of a patch in a style, with a dark outline that sets it off from photographs."""
    _, usual_width, dashes, hatch = STYLES[style]
    linewidth = usual_width if linewidth is None else linewidth
    extra, dark = (1.6, "black") if style == "truth" else (1.2, "#00000088")
    return {
        "fill": False,
        "edgecolor": color,
        "linewidth": linewidth,
        "linestyle": dashes,
        "hatch": hatch,
        "path_effects": [withStroke(linewidth=linewidth + extra, foreground=dark)],
    }


def write_labels(ax: Axes, labels: list[tuple], size: tuple[int, int]) -> None:
    """Write the text of each (box, colour, text) where it covers the fewest labels and boxes.

    `size` is the (H, W) of the image.
    """
    ax.apply_aspect()
    (left, _), (right, _) = ax.transData.transform([(0, 0), (1, 0)])
    pixels_per_point = ax.figure.dpi / 72 / (right - left)  # image pixels under a point of text
    font = FontProperties(size=LABEL_POINTS)
    boxes = [box for box, _, _ in labels]
    taken: list[np.ndarray] = []
    for box, color, text in labels:
        if not text:
            continue
        text_width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] + 3
        extent = pixels_per_point * np.array([text_width, LABEL_POINTS + 3])
        label_box = free_place(box, extent, size, boxes, taken)
        taken.append(label_box)
        is_dark = np.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.55
        x, y = (label_box[:2] + label_box[2:]) / 2
        ax.text(
            x,
            y,
            text,
            color="white" if is_dark else "black",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
            fontsize=LABEL_POINTS,
            ha="center",
            va="center",
            parse_math=False,
            zorder=4,
        )


def free_place(
    box: Sequence[float],
    extent: np.ndarray,
    size: tuple[float, float],
    boxes: Sequence | np.ndarray,
    taken: Sequence | np.ndarray,
) -> np.ndarray:
    """Where a label of a box overlaps other labels and boxes least: xyxy, inside the image.

    Args:
        box: (4,) xyxy.
        extent: (width, height) of the label.
        size: (H, W) of the image.
        boxes: (T, 4), all boxes of the image.
        taken: (N, 4), where the labels so far are.
    """
    (x1, y1, x2, y2), (width, height) = box, extent
    columns = (x1, x2 - width, (x1 + x2 - width) / 2)
    rows = (y1, y2 - height, (y1 + y2 - height) / 2)
    corners = [(x, y) for y in (y1 - height, y2) for x in columns]  # above and below the box
    corners += [(x, y) for x in (x2, x1 - width) for y in rows]  # to its right and left
    corners += [(x1, y1), (x2 - width, y1), (x1, y2 - height), (x2 - width, y2 - height)]  # inside
    inside = np.clip(corners, 0, np.maximum((size[1] - width, size[0] - height), 0))
    candidates = np.hstack([inside, inside + extent])
    over_labels = _summed_overlap(candidates, taken)
    over_boxes = _summed_overlap(candidates, boxes)
    return candidates[int((5 * over_labels + over_boxes).argmin())]


def _summed_overlap(candidates: np.ndarray, others: Sequence | np.ndarray) -> torch.Tensor:
    """The IoU of each candidate (N, 4) with all others (T, 4), summed: (N,)."""
    other_boxes = torch.tensor(np.reshape(others, (-1, 4)), dtype=torch.float64)
    return box_iou(torch.tensor(candidates), other_boxes).sum(1)


def _box_tuples(target: TargetLike | None) -> list[tuple]:
    """A target as a list of (box, label, score or None); empty for None and for an unlabelled one.

    A score of nan is taken for none.
    """
    if target is None or "boxes" not in target:
        return []
    boxes, labels = (torch.as_tensor(target[key]).tolist() for key in ("boxes", "labels"))
    scores: list[float | None] = [None] * len(boxes)
    if "scores" in target:
        numbers = torch.as_tensor(target["scores"]).tolist()
        scores = [None if np.isnan(number) else number for number in numbers]
    return list(zip(boxes, labels, scores))


def label_text(label: int, categories: list[dict] | None, score: float | None = None) -> str:
    """The words at a box: "cat .87"."""
    name = str(label) if categories is None else str(categories[label]["name"])
    return _with_score(name, score)


def _with_score(name: str, score: float | None) -> str:
    return name if score is None else f"{name} {f'{score:.2f}'.removeprefix('0')}"


def _select(target: TargetLike, indices) -> Target:
    """The boxes, labels and scores of a target at `indices`."""
    keys = [key for key in ("boxes", "labels", "scores") if key in target]
    return cast(Target, {key: torch.as_tensor(target[key]).cpu()[indices] for key in keys})


# ---- many images in one figure -------------------------------------------------------------------


def show_targets(
    images: Sequence[torch.Tensor],
    targets: Sequence[TargetLike],
    categories: list[dict] | None,
    titles: Sequence[str] | None = None,
    columns: int = 3,
    style: str = "truth",
    title: str | None = None,
    cell: float = MAX_CELL,
) -> Picture:
    """Images side by side with their targets, as truth or in another style ("prediction").

    Args:
        images: B tensors (3, H, W).
        targets: B dicts.
        categories: [{"name"}] in the order of the labels, or None.
        titles: B captions.
        columns: images in a row, at most.
        style: a key of STYLES.
        title: of the figure; None: the number of objects.
        cell: width of a column in inches, at most.
    """
    objects = sum(len(_box_tuples(target)) for target in targets)
    finding = f"{count_of(objects, 'object')} on {count_of(len(images), 'image')}"
    title = finding if title is None else title
    figure, axes = image_grid(images, columns, titles, title, cell=cell)
    for ax, image, target in zip(axes, images, targets):
        draw_boxes(ax, image, target, categories=categories, style=style)
    return figure


def show_views(
    weak_image: torch.Tensor,
    strong_image: torch.Tensor,
    weak_boxes: torch.Tensor,
    strong_boxes: torch.Tensor,
    keep: torch.Tensor | None = None,
    title: str | None = None,
) -> Picture:
    """The weak and the strong view of an image, box i of one joined to box i of the other.

    Args:
        weak_image, strong_image: (3, H, W).
        weak_boxes, strong_boxes: (T, 4) xyxy, each in pixels of its view.
        keep: (T,) bool, False for boxes that are not in the strong view. They are dotted and grey
            in the weak view and not drawn in the strong one.
        title: of the figure; None: how many boxes stay in view.
    """
    weak = torch.as_tensor(weak_boxes).reshape(-1, 4)
    strong = torch.as_tensor(strong_boxes).reshape(-1, 4)
    keep = torch.ones(len(weak)) if keep is None else torch.as_tensor(keep)
    keep = keep.to(torch.bool)
    of_all = f"{int(keep.sum())} of {count_of(len(weak), 'box', 'boxes')}"
    title = f"{of_all} in view after the strong augmentation" if title is None else title
    images = [weak_image, strong_image]
    figure, axes = image_grid(images, 2, ["weak view", "strong view"], title, gap=0.35)
    numbers = [{"name": str(number + 1)} for number in range(len(weak))]
    labels = torch.arange(len(weak))
    styles = ["prediction" if kept else "dropped" for kept in keep.tolist()]
    weak_target = {"boxes": weak, "labels": labels}
    strong_target = {"boxes": strong[keep], "labels": labels[keep]}
    draw_boxes(axes[0], weak_image, weak_target, categories=numbers, style=styles)
    draw_boxes(axes[1], strong_image, strong_target, categories=numbers)
    for index in labels[keep].tolist():
        line = ConnectionPatch(
            _center(weak[index]),
            _center(strong[index]),
            "data",
            "data",
            axesA=axes[0],
            axesB=axes[1],
            color=class_color(index),
            linewidth=1,
            alpha=0.6,
        )
        figure.add_artist(line)
    return figure


def _center(box: torch.Tensor) -> tuple[float, float]:
    """(x, y) of the centre of a box (4,) xyxy."""
    x, y = ((box[:2] + box[2:]) / 2).tolist()
    return x, y


def image_grid(
    images: Sequence[torch.Tensor],
    columns: int,
    titles: Sequence[str] | None = None,
    title: str = "",
    legend: Sequence[str] = (),
    cell: float = MAX_CELL,
    gap: float = MARGIN,
) -> tuple[Picture, list[Axes]]:
    """A figure with one empty axes per image, all images at one scale.

    The images are as large as the page and `cell` allow. The figure leaves room for exactly the
    text there is. A single image without words fills it.

    Args:
        images: tensors (3, H, W), of which only the sizes are used.
        columns: images in a row, at most; 4 images in at most 3 columns become two rows of two.
        titles: a caption for each image.
        title: of the figure.
        legend: keys of STYLES.
        cell: width of a column in inches, at most.
        gap: inches between two columns.
    """
    rows = max(1, math.ceil(len(images) / columns))
    columns = max(1, math.ceil(len(images) / rows))
    has_words = bool(title or legend or any(titles or ()))
    margin = MARGIN if len(images) > 1 or has_words else 0.0
    sizes = np.array([image.shape[-2:] for image in images], dtype=float).reshape(-1, 2)
    widest = [sizes[column::columns, 1].max(initial=1) for column in range(columns)]
    room = WIDTH - 2 * margin - (columns - 1) * gap
    scale = min(room / sum(widest), cell / max(widest))  # inches per pixel
    sizes = sizes * scale
    column_widths = scale * np.array(widest)
    width = round(2 * margin + column_widths.sum() + (columns - 1) * gap, 6)
    captions = [
        wrap(text, column_widths[index % columns], CAPTION_POINTS)
        for index, text in enumerate(titles or [""] * len(images))
    ]

    slices = [slice(start, start + columns) for start in range(0, len(images), columns)]
    lines = [max(text.count("\n") + bool(text) for text in captions[row]) for row in slices]
    caption_heights = [0.16 * count for count in lines]
    row_heights = [high + sizes[row, 0].max() for row, high in zip(slices, caption_heights)]
    header = wrap(title, width, 11)
    legend_columns = 2 if len(legend) * 1.1 > width else max(1, len(legend))
    legend_rows = math.ceil(len(legend) / legend_columns)
    top = margin + (0.19 * (header.count("\n") + 1) + 0.04 if header else 0)
    bottom = margin + 0.2 * legend_rows
    height = top + sum(row_heights) + margin * (len(slices) - 1) + bottom

    figure = Picture(figsize=(width, height), dpi=DPI, facecolor="white")
    set_title(figure, header, x=margin / width, y=1 - margin / height)
    axes = []
    for index, (image_height, image_width) in enumerate(sizes):
        row, column = divmod(index, columns)
        left = margin + column_widths[:column].sum() + column * gap
        above = top + sum(row_heights[:row]) + margin * row + caption_heights[row]
        bottom_left = (left / width, (height - above - image_height) / height)
        size = (image_width / width, image_height / height)
        axes.append(figure.add_axes((*bottom_left, *size)))
        _write_caption(axes[-1], captions[index])
    if legend:
        _add_legend(figure, legend, legend_columns)
    return figure, axes


def _write_caption(ax: Axes, caption: str) -> None:
    ax.set_title(
        caption,
        loc="left",
        fontsize=CAPTION_POINTS,
        pad=2,
        color=INK,
        linespacing=1.1,
        parse_math=False,
    )


def _add_legend(figure: Picture, styles: Sequence[str], columns: int) -> None:
    """A legend of some keys of STYLES below the images."""
    handles = []
    for style in styles:
        color = STYLES[style][0] or BLUE
        label = STYLE_NAMES.get(style, style)
        handles.append(Patch(label=label, **_patch_arguments(style, color)))
    figure.legend(
        handles=handles,
        loc="lower left",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handlelength=1.8,
        borderaxespad=0.3,
    )


# ---- detections against the truth ----------------------------------------------------------------


def show_hits(
    images: Sequence[torch.Tensor],
    detections: Sequence[Target],
    truths: Sequence[Target],
    categories: list[dict] | None,
    score: float = 0.3,
    columns: int = 3,
    title: str | None = None,
) -> Picture:
    """Detections against the truth: hits, false alarms and misses at IoU 0.5.

    Args:
        images: B tensors (3, H, W).
        detections, truths: B targets each.
        categories: [{"name"}] in the order of the labels, or None.
        score: the lowest score of a box that is drawn and counted.
        columns: images in a row, at most.
        title: of the figure; None: the counts; "": no words at all.
    """
    errors = [count_hits(*pair, score) for pair in zip(detections, truths)]
    if title == "":
        figure, axes = image_grid(images, columns)
    else:
        captions = [hit_sentence(counts) for counts in errors]
        title = title or f"{hit_sentence(*errors)} at score {score:g}"
        legend = ("hit", "false_alarm", "missed")
        figure, axes = image_grid(images, columns, captions, title, legend)
    for ax, image, detection, truth, counts in zip(axes, images, detections, truths, errors):
        _draw_hits(ax, image, detection, truth, counts, categories)
    return figure


def show_comparison(
    images: Sequence[torch.Tensor],
    detections: Mapping[str, Sequence[Target]],
    truths: Sequence[Target],
    categories: list[dict] | None,
    score: float = 0.3,
    title: str | None = None,
    cell: float = MAX_CELL,
) -> Picture:
    """One image per row, one detector per column, the truth last; hits and errors at IoU 0.5.

    Args:
        images: B tensors (3, H, W).
        detections: {name of a detector: B detections}, in the order of the columns.
        truths: B targets.
        categories: [{"name"}] in the order of the labels, or None.
        score: the lowest score of a box that is drawn and counted.
        title: of the figure; None: the counts of each detector; "": none.
        cell: width of a column in inches, at most.
    """
    errors = {
        name: [count_hits(*pair, score) for pair in zip(targets, truths)]
        for name, targets in detections.items()
    }
    finding = "; ".join(f"{name}: {hit_sentence(*counts)}" for name, counts in errors.items())
    columns = len(detections) + 1
    captions = []
    for row, truth in enumerate(truths):
        captions += [f"{name}: {_found_sentence(counts[row])}" for name, counts in errors.items()]
        captions.append(f"truth: {count_of(len(truth['boxes']), 'object')}")
    cells = [image for image in images for _ in range(columns)]
    legend = ("hit", "false_alarm", "missed", "truth")
    title = finding if title is None else title
    figure, axes = image_grid(cells, columns, captions, title, legend, cell)
    for row, (image, truth) in enumerate(zip(images, truths)):
        *detector_axes, truth_ax = axes[row * columns : (row + 1) * columns]
        for ax, (name, targets) in zip(detector_axes, detections.items()):
            _draw_hits(ax, image, targets[row], truth, errors[name][row], categories)
        draw_boxes(truth_ax, image, truth, categories=categories, style="truth")
    return figure


def _draw_hits(
    ax: Axes, image: torch.Tensor, detection: Target, truth: Target, errors: dict, categories
) -> None:
    """An image with its hits, false alarms and misses, as `count_hits` gives them."""
    missed = _select(truth, errors["misses"])
    missed["scores"] = torch.full((len(errors["misses"]),), torch.nan)
    parts: dict[str, TargetLike] = {
        "missed": missed,
        "false_alarm": _select(detection, errors["false_alarms"]),
        "hit": _select(detection, errors["hits"]),
    }
    keys = ("boxes", "labels", "scores")
    merged = {key: torch.cat([part[key] for part in parts.values()]) for key in keys}
    styles = [style for style, part in parts.items() for _ in part["labels"]]
    draw_boxes(ax, image, merged, categories=categories, style=styles)


def count_hits(detection: Target, truth: Target, score: float = 0.3) -> dict[str, torch.Tensor]:
    """`box_errors` at IoU 0.5 of the boxes that score at least `score`.

    Returns {"hits", "false_alarms", "misses"}; the first two index the whole detection, the last
    one the truth.
    """
    confident = torch.nonzero(torch.as_tensor(detection["scores"]).cpu() >= score).flatten()
    errors = box_errors(_select(detection, confident), truth, iou=0.5)
    return {
        "hits": confident[errors["hits"]],
        "false_alarms": confident[errors["false_alarms"]],
        "misses": errors["misses"],
    }


def hit_sentence(*errors: dict) -> str:
    """The counts of one or several `count_hits`: "3 hits, 1 false alarm, 0 missed"."""
    keys = ("hits", "false_alarms", "misses")
    hits, alarms, misses = (sum(len(counts[key]) for counts in errors) for key in keys)
    return f"{count_of(hits, 'hit')}, {count_of(alarms, 'false alarm')}, {misses:,} missed"


def _found_sentence(errors: dict) -> str:
    """One `count_hits` in few words: "3 of 4 found, 1 false"."""
    hits, alarms, misses = (len(errors[key]) for key in ("hits", "false_alarms", "misses"))
    return f"{hits} of {hits + misses} found, {alarms} false"


# ---- pseudo-boxes --------------------------------------------------------------------------------


def show_pseudo_boxes(
    image: torch.Tensor,
    line: dict | Sequence[dict],
    truth: Target | None = None,
    categories: list[dict] | None = None,
    title: str | None = None,
) -> Picture:
    """The teacher's boxes of an image against the truth: kept, mined only, dropped.

    A box that is both kept and mined counts as kept. Where the truth is known, blue boxes are right
    and orange ones wrong. Of the dropped boxes the BEST_DROPPED are drawn.

    Args:
        image: (3, H, W).
        line: a line of `pseudo_boxes.jsonl`, or a list of lines for the same image, drawn side by
            side as steps of the training.
        truth: a target of the image, or None.
        categories: [{"name"}] in the order of the labels, or None.
        title: of the figure; "": no words around the images.
    """
    lines = [line] if isinstance(line, dict) else list(line)
    styles = [pseudo_styles(step_line, truth) for step_line in lines]
    images = [image] * len(lines)
    if title == "":
        figure, axes = image_grid(images, len(lines))
    else:
        captions = [
            f"step {step_line['step']:,}: {pseudo_sentence(step_line, truth)}"
            for step_line in lines
        ]
        legend = [
            style
            for style in STYLES
            if style in ("truth", "kept", "mined", "dropped")
            or (style in ("kept_wrong", "mined_wrong") and any(style in row for row in styles))
        ]
        figure, axes = image_grid(images, len(lines), captions, title or "", legend)
    for ax, step_line, row in zip(axes, lines, styles):
        hidden = hidden_dropped(step_line["scores"], row)
        shown = [index for index in range(len(row)) if index not in hidden]
        shown_styles = [row[index] for index in shown]
        draw_boxes(ax, image, _select(step_line, shown), truth, categories, shown_styles)
    return figure


def show_mined(
    images: Sequence[torch.Tensor],
    lines: Sequence[dict],
    truths: Sequence[Target],
    categories: list[dict] | None = None,
    columns: int = 3,
    title: str | None = None,
) -> Picture:
    """What mining adds: the boxes that are mined and not kept, right and wrong, and the truth.

    Args:
        images: B tensors (3, H, W).
        lines: B lines of `pseudo_boxes.jsonl`, of these images.
        truths: B targets.
        categories: [{"name"}] in the order of the labels, or None.
        columns: images in a row, at most.
        title: of the figure; None: how many of these boxes are right.
    """
    captions, chosen = [], []
    for line, truth in zip(lines, truths):
        styles = pseudo_styles(line, truth)
        indices = [index for index, style in enumerate(styles) if style.startswith("mined")]
        chosen.append((_select(line, indices), [styles[index] for index in indices]))
        costs = [f"cost {line['cost'][index]:.2f}" for index in indices]
        words = ["wrong" if styles[index].endswith("wrong") else "right" for index in indices]
        captions.append("; ".join(map(": ".join, zip(costs, words))))
    of_all = [style for _, styles in chosen for style in styles]
    counts = f"{of_all.count('mined')} of {count_of(len(of_all), 'box', 'boxes')}"
    finding = f"Mined and not confident: {counts} right"
    legend = ("truth", "mined", "mined_wrong")
    header = finding if title is None else title
    figure, axes = image_grid(images, columns, captions, header, legend)
    for ax, image, (target, styles), truth in zip(axes, images, chosen, truths):
        draw_boxes(ax, image, target, truth, categories, styles)
    return figure


def hidden_dropped(scores: Sequence[float], styles: Sequence[str]) -> set[int]:
    """The indices of dropped boxes that are not drawn: all but the BEST_DROPPED by score."""
    dropped = [index for index, style in enumerate(styles) if style == "dropped"]
    return set(sorted(dropped, key=lambda index: -scores[index])[BEST_DROPPED:])


def pseudo_sentence(line: dict, truth: Target | None = None) -> str:
    """The counts of a line of `pseudo_boxes.jsonl`: "2 kept (1 right), 1 mined only, 3 dropped".

    How many of the kept boxes are right is said only with a truth.
    """
    styles = pseudo_styles(line)
    kept = [index for index, style in enumerate(styles) if style == "kept"]
    right = ""
    if truth is not None and kept:
        hits = box_errors(_select(line, kept), truth, iou=0.5)["hits"]
        right = f" ({len(hits)} right)"
    mined, dropped = styles.count("mined"), styles.count("dropped")
    return f"{len(kept)} kept{right}, {mined} mined only, {dropped} dropped"


def pseudo_styles(line: dict, truth: Target | None = None) -> list[str]:
    """A key of STYLES for each box of a line of `pseudo_boxes.jsonl`.

    A box is kept, else mined, else dropped. With a truth, kept boxes that are no hit (IoU 0.5) are
    "kept_wrong", and mined ones likewise "mined_wrong".
    """
    pairs = zip(line["kept"], line["mined"])
    styles = ["kept" if kept else "mined" if mined else "dropped" for kept, mined in pairs]
    if truth is None:
        return styles
    for kind in ("kept", "mined"):
        indices = [index for index, style in enumerate(styles) if style == kind]
        if indices:
            wrong = box_errors(_select(line, indices), truth, iou=0.5)["false_alarms"]
            for number in wrong.tolist():
                styles[indices[number]] = f"{kind}_wrong"
    return styles


# ---- matching ------------------------------------------------------------------------------------


def plot_matching(
    image: torch.Tensor,
    truth: Target,
    pred_boxes_pixels: torch.Tensor,
    match_queries: Sequence[int] | torch.Tensor,
    match_targets: Sequence[int] | torch.Tensor,
    quality: Sequence[float] | torch.Tensor | None = None,
    title: str | None = None,
    categories: list[dict] | None = None,
) -> Picture:
    """Which query is matched with which object: the boxes, and lines from objects to queries.

    A colour stands for an object; unmatched queries are thin, grey and dotted.

    Args:
        image: (3, H, W).
        truth: its target.
        pred_boxes_pixels: (Q, 4) xyxy pixels.
        match_queries, match_targets: (N,) the pairs, as a Match holds them.
        quality: (N,) how thick the lines are; None: 1.
        title: of the figure; None: how many queries and objects are matched.
        categories: [{"name"}] in the order of the labels, or None.
    """
    boxes = torch.as_tensor(pred_boxes_pixels).tolist()
    queries = torch.as_tensor(match_queries).tolist()
    targets = torch.as_tensor(match_targets).tolist()
    quality = [1.0] * len(queries) if quality is None else torch.as_tensor(quality).tolist()
    height, width = image.shape[-2:]
    objects = _box_tuples(truth)

    image_inches = MAX_CELL * min(1.5, max(0.6, height / width))
    figure = Picture(figsize=(WIDTH, image_inches + 0.4), dpi=DPI, facecolor="white")
    top = image_inches / (image_inches + 0.4)
    left = figure.add_axes((0.01, 0.01, MAX_CELL / WIDTH, top - 0.02))
    right = figure.add_axes((0.52, 0.01, 0.47, top - 0.02))
    unmatched = [box for query, box in enumerate(boxes) if query not in set(queries)]
    unmatched_target = {"boxes": unmatched, "labels": [0] * len(unmatched)}
    draw_boxes(left, image, unmatched_target, truth, style="dropped")
    for query, target, value in zip(queries, targets, quality):
        draw_box(left, boxes[query], "prediction", target, linewidth=0.6 + 1.6 * value)
    numbers = [(box, class_color(index), str(index)) for index, (box, *_) in enumerate(objects)]
    write_labels(left, numbers, (height, width))
    names = [
        f"object {index}: {label_text(label, categories)}"
        for index, (_, label, _) in enumerate(objects)
    ]
    _draw_pairs(right, names, queries, targets, quality)
    matched = f"{len(set(targets))} of {count_of(len(objects), 'object')}"
    return set_title(figure, title, f"{len(queries)} of {len(boxes)} queries answer for {matched}")


def _draw_pairs(
    ax: Axes, names: list[str], queries: list[int], targets: list[int], quality: list[float]
) -> None:
    """Objects on the left, their queries on the right, joined by lines as thick as the quality."""
    ax.set(xlim=(0, 1), ylim=(1, 0))
    ax.set_axis_off()
    pairs = sorted(zip(targets, queries, quality), key=lambda pair: (pair[0], -pair[2]))
    heights = (np.arange(len(names)) + 0.5) / max(len(names), 1)
    text: dict[str, Any] = {"va": "center", "parse_math": False, "color": INK}
    for target, (name, y) in enumerate(zip(names, heights)):
        ax.text(0.24, y, name, ha="right", fontsize=9, **text)
        color = class_color(target)
        ax.plot(0.28, y, "o", color=color, markersize=9, markeredgecolor=INK, clip_on=False)
    for index, (target, query, value) in enumerate(pairs):
        query_height = (index + 0.5) / len(pairs)
        ax.plot(
            [0.28, 0.7],
            [heights[target], query_height],
            color=class_color(target),
            linewidth=0.5 + 2.5 * value,
            zorder=1,
        )
        if len(pairs) <= 40:
            words = _with_score(f"query {query}", value if value < 1 else None)
            ax.text(0.72, query_height, words, fontsize=9 if len(pairs) <= 22 else 7, **text)
