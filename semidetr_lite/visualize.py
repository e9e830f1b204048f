"""Every picture of the kit: pure functions that take dicts and tensors and return a figure.

One visual language throughout, so that a reader learns it once: the table STYLES. Colours are Okabe and Ito's, extended
to any number of classes; orange and red stay reserved for errors, and no meaning hangs on colour alone. Boxes are xyxy
pixels of the image they are drawn on. A title is the finding; each function writes its own unless one is given, and
`title=""` leaves it out. The figures are at most 9 inches wide at 80 dpi, and pyplot does not know them: nothing to
close.
"""

import base64
import io
import re
import textwrap
from html import escape

import numpy as np
import torch
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator
from PIL import Image
from torchvision.ops import box_iou

from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import box_errors

RED, ORANGE, BLUE, GREY, INK = "#E3001B", "#E69F00", "#56B4E9", "#C8C8C8", "#222222"
CLASS_COLORS = (
    *("#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2"),  # Okabe and Ito's, less the black, the orange and the red
    *("#999933", "#7B5FC7", "#7FE0C8", "#8B5A2B", "#C9B8FF"),
)
METHOD_COLORS = {
    "control": "#8C6D1F",  # before the method it is a control for
    "same-time": "#8C6D1F",  # "supervised, same time": the same
    "supervised": "#5A5A5A",
    "mean-teacher": "#0072B2",
    "semi-detr": "#D55E00",
    "soft-teacher": "#009E73",
    "dense-teacher": "#CC79A7",
    "+shm+cqc": "#7B5FC7",
    "+shm": "#56B4E9",
}
BURN_IN_COLOR = "#A6A6A6"
OTHER_COLORS = ("#56B4E9", "#7B5FC7", "#000000")
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#56B4E9", "#5A5A5A")
# style: (colour, None for the colour of the class; line width in points; line style; hatch)
STYLES = {
    "truth": ("#FFFFFF", 1.2, "-", None),  # with a black outline
    "prediction": (None, 1.6, "-", None),  # labelled with class name and score, as all below
    "pseudo": (None, 1.6, "--", None),
    "hit": (BLUE, 1.6, "-", None),
    "false_alarm": (ORANGE, 1.6, "-", "//"),
    "missed": (RED, 2.2, "-", None),
    "kept": (BLUE, 2.4, "-", None),  # of the teacher's boxes, as are the next four
    "kept_wrong": (ORANGE, 2.4, "-", "//"),  # where the truth is known
    "mined": (BLUE, 1.6, "--", None),
    "mined_wrong": (ORANGE, 1.6, "--", None),
    "dropped": (GREY, 0.9, ":", None),
}
SHARES = ("AP_student", "AP_teacher", "pseudo_precision", "pseudo_recall")  # of a log, drawn in %
NAMES = {  # of styles in a legend, where they differ
    "false_alarm": "false alarm",
    "kept_wrong": "kept, wrong",
    "mined": "mined only",
    "mined_wrong": "mined only, wrong",
}
BEST_DROPPED = 5  # boxes: of those that the teacher drops the best are drawn
LABEL_POINTS, MOST_LABELS = 7, 12
WIDTH, EDGE, DPI = 9.0, 0.1, 80  # inches, inches, pixels an inch
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "fontsize": 8, "frameon": False}  # a legend


class Picture(Figure):
    """A figure that shows itself when it is the last line of a notebook cell, with or without pyplot."""

    def _repr_html_(self) -> str:
        return image_tag(self)


def image_tag(figure: Figure, text: str = "", dpi: int | None = None) -> str:
    """The figure inside an HTML tag, described by `text`, else by its own words, for those who do not see it."""
    code = base64.b64encode(png(figure, dpi)).decode("ascii")
    return f'<img src="data:image/png;base64,{code}" alt="{escape(text or _words(figure))}">'


def _words(figure: Figure) -> str:
    """What a figure says: its title, then the title, the axes and the labels of each plot or image."""
    said = [text.get_text() for text in figure.texts]
    for ax in figure.axes:
        said += [ax.get_title(loc="left"), " over ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
        said.append(", ".join(text.get_text() for text in ax.texts))
    return re.sub(r"\s+", " ", "; ".join(filter(None, said)))


def png(figure: Figure, dpi: int | None = None) -> bytes:
    """The figure as the bytes of a PNG file, at its own resolution unless `dpi` is given.

    128 colours of its own, spread so that the rare ones (of boxes) stay true: a quarter of the size.
    """
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi or figure.dpi)
    few = Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    few.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def class_color(label: int) -> str | tuple[float, float, float]:
    """The colour of a class: ten distinct ones, then the same ten lighter, then darker."""
    color, turn = CLASS_COLORS[label % len(CLASS_COLORS)], label // len(CLASS_COLORS) % 3
    return tuple(0.55 * part + (0.45 if turn == 1 else 0) for part in to_rgb(color)) if turn else color


def method_color(name: str, position: int = 0) -> str:
    """The fixed colour of the method that `name` mentions; a name that mentions none takes a colour by its position."""
    plain = name.lower().replace("_", "-").replace(" ", "-")
    known = [color for method, color in METHOD_COLORS.items() if method in plain]
    return known[0] if known else OTHER_COLORS[position % len(OTHER_COLORS)]


# ---- one image with its boxes ----------------------------------------------------------------------------------------


def draw_boxes(ax, image, target=None, truth=None, categories=None, style="prediction") -> None:
    """Draw an image (3, H, W) on `ax` with the boxes of `target` over those of `truth`, in pixels of the image.

    `style` is a key of STYLES, or a list with one key per box of `target`. A box of `target` carries its class name
    (from `categories`, else the number of its label) and its score if there is one; of many boxes only the
    MOST_LABELS with the highest scores do. `truth` is named only where it stands alone. A target without boxes (an
    unlabelled one) draws nothing.
    """
    image = torch.as_tensor(image).detach().cpu()
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"an image to draw must have the shape (3, H, W), got {tuple(image.shape)}")
    pixels = (image.clamp(0, 1) * 255).round().byte() if image.is_floating_point() else image
    height, width = image.shape[1:]
    # With this extent the edges of the pixels lie on whole numbers, as the boxes have them.
    smooth = "nearest" if max(height, width) <= 256 else "antialiased"
    ax.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), interpolation=smooth)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    rows = _rows(target)
    labels = []
    for box, label, _ in _rows(truth):
        labels.append(_draw_box(ax, box, "truth", label, "" if rows else label_text(label, categories)))
    styles = [style] * len(rows) if isinstance(style, str) else style
    ranked = sorted(range(len(rows)), key=lambda place: -1 if rows[place][2] is None else -rows[place][2])
    named = [place for place in ranked if styles[place] != "dropped"][:MOST_LABELS]
    for place, (box, label, score) in enumerate(rows):
        box = np.clip(box, -1, [width + 1, height + 1] * 2)  # what lies beyond would cross the words around the image
        text = label_text(label, categories, score) if place in named else ""
        labels.append(_draw_box(ax, box, styles[place], label, text))
    _write_labels(ax, labels, (height, width))


def _draw_box(ax, box, style: str, label: int, text: str = "", width: float | None = None):
    """One rectangle in its style; returns (box, colour, text) for the label to be placed once all boxes are known."""
    color = STYLES[style][0] or class_color(label)
    patch = Rectangle(box[:2], box[2] - box[0], box[3] - box[1], gid=style, clip_on=False, **_line(style, color, width))
    patch.set_zorder(2 if style in ("truth", "dropped") else 3)
    ax.add_patch(patch)
    return box, color, text


def _line(style: str, color, width: float | None = None) -> dict:
    """Arguments of a patch in a style; an outline sets it off from any photograph."""
    _, line, dashes, hatch = STYLES[style]
    line = line if width is None else width
    around, dark = (1.6, "black") if style == "truth" else (1.2, "#00000088")
    outline = [withStroke(linewidth=line + around, foreground=dark)]
    look = {"edgecolor": color, "linewidth": line, "linestyle": dashes, "hatch": hatch}
    return {"fill": False, "path_effects": outline, **look}


def _write_labels(ax, labels, size: tuple[int, int]) -> None:
    """Write each box's text beside it, where it covers the fewest other labels and boxes."""
    ax.apply_aspect()
    (left, _), (right, _) = ax.transData.transform([(0, 0), (1, 0)])
    per_point = ax.figure.dpi / 72 / (right - left)  # image pixels that one point of text covers
    font = FontProperties(size=LABEL_POINTS)
    boxes, taken = [box for box, _, _ in labels], []
    for box, color, text in labels:
        if not text:
            continue
        extent = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] + 3
        place = free_place(box, per_point * np.array([extent, LABEL_POINTS + 3]), size, boxes, taken)
        taken.append(place)
        ink = "white" if np.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.55 else "black"
        around = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
        style = {"fontsize": LABEL_POINTS, "ha": "center", "va": "center", "parse_math": False, "zorder": 4}
        ax.text(*(place[:2] + place[2:]) / 2, text, color=ink, bbox=around, **style)


def free_place(box, extent: np.ndarray, size: tuple[int, int], boxes, taken) -> np.ndarray:
    """Where a text beside `box` overlaps other texts and boxes least: xyxy, inside the image.

    `extent` is the text's (width, height), `size` the image's (H, W), `boxes` are all boxes and
    `taken` the places of the texts so far, all in one unit.
    """
    (x1, y1, x2, y2), (width, height) = box, extent
    across, down = (x1, x2 - width, (x1 + x2 - width) / 2), (y1, y2 - height, (y1 + y2 - height) / 2)
    corners = [(x, y) for y in (y1 - height, y2) for x in across]  # over and under the box
    corners += [(x, y) for x in (x2, x1 - width) for y in down]  # to its right and left
    corners += [(x1, y1), (x2 - width, y1), (x1, y2 - height), (x2 - width, y2 - height)]  # inside
    corners = np.clip(corners, 0, np.maximum((size[1] - width, size[0] - height), 0))
    places = np.hstack([corners, corners + extent])
    others = (torch.tensor(np.reshape(part, (-1, 4)), dtype=torch.float64) for part in (taken, boxes))
    texts, drawn = (box_iou(torch.tensor(places), other).sum(1) for other in others)
    return places[int((5 * texts + drawn).argmin())]


def _rows(target) -> list:
    """A target as a list of (box, label, score or None); empty for None and for an unlabelled target."""
    if target is None or "boxes" not in target:
        return []
    boxes, labels = (torch.as_tensor(target[key]).tolist() for key in ("boxes", "labels"))
    scores = torch.as_tensor(target["scores"]).tolist() if "scores" in target else [None] * len(boxes)
    return [(box, label, None if score != score else score) for box, label, score in zip(boxes, labels, scores)]


def label_text(label: int, categories, score: float | None = None) -> str:
    """The words at a box: "cat .87"."""
    name = str(label) if categories is None else str(categories[label]["name"])
    return name if score is None else f"{name} {f'{score:.2f}'.removeprefix('0')}"


def _chosen(target: dict, indices) -> dict:
    """The boxes of a target at `indices`."""
    return {key: torch.as_tensor(target[key]).cpu()[indices] for key in ("boxes", "labels", "scores") if key in target}


# ---- many images on one page -----------------------------------------------------------------------------------------


def show_targets(images, targets, categories, titles=None, columns=4, style="truth", title=None, cell=2.2) -> Picture:
    """Images side by side, `cell` inches wide, with their targets, as truth or in another style (`"prediction"`)."""
    finding = f"{_count(sum(len(_rows(target)) for target in targets), 'object')} on {_count(len(images), 'image')}"
    figure, axes = _page(images, columns, titles, finding if title is None else title, cell=cell)
    for ax, image, target in zip(axes, images, targets):
        draw_boxes(ax, image, target, categories=categories, style=style)
    return figure


def show_views(weak_image, strong_image, weak_boxes, strong_boxes, keep=None, title=None) -> Picture:
    """The weak and the strong view of one image, box i of one joined to box i of the other by number and colour.

    `weak_boxes` and `strong_boxes` are (T, 4), each in pixels of its view; `keep` (T,) is False for boxes that the
    strong view lost: those stay dotted and grey in the weak view and are not drawn in the strong one.
    """
    weak, strong = torch.as_tensor(weak_boxes).reshape(-1, 4), torch.as_tensor(strong_boxes).reshape(-1, 4)
    keep = torch.ones(len(weak), dtype=torch.bool) if keep is None else torch.as_tensor(keep, dtype=torch.bool)
    finding = f"{int(keep.sum())} of {_count(len(weak), 'box', 'boxes')} in view after the strong augmentation"
    images, titles = [weak_image, strong_image], ["weak view", "strong view"]
    figure, axes = _page(images, 2, titles, finding if title is None else title, cell=3.2, gap=0.35)
    numbers, labels = [{"name": str(number + 1)} for number in range(len(weak))], torch.arange(len(weak))
    styles = ["prediction" if kept else "dropped" for kept in keep.tolist()]
    draw_boxes(axes[0], weak_image, {"boxes": weak, "labels": labels}, categories=numbers, style=styles)
    draw_boxes(axes[1], strong_image, {"boxes": strong[keep], "labels": labels[keep]}, categories=numbers)
    for index in labels[keep].tolist():
        ends = [((boxes[index, :2] + boxes[index, 2:]) / 2).tolist() for boxes in (weak, strong)]
        look = {"color": class_color(index), "linewidth": 1, "alpha": 0.6}
        figure.add_artist(ConnectionPatch(*ends, "data", "data", axesA=axes[0], axesB=axes[1], **look))
    return figure


def show_hits(images, detections, truths, categories, score=0.3, columns=4, title=None) -> Picture:
    """Detections of at least `score` against the truth: hits, false alarms, misses at IoU 0.5; `title=""`: no words."""
    errors = [count_hits(detection, truth, score) for detection, truth in zip(detections, truths)]
    captions, said = [hit_sentence(error) for error in errors], f"{hit_sentence(*errors)} at score {score:g}"
    words = (captions, title or said, ("hit", "false_alarm", "missed")) if title != "" else ()
    figure, axes = _page(images, columns, *words)
    for ax, image, detection, truth, error in zip(axes, images, detections, truths, errors):
        _draw_hits(ax, image, detection, truth, error, categories)
    return figure


def show_comparison(images, detections, truths, categories, score=0.3, title=None, cell=2.4) -> Picture:
    """One image a row, one detector a column, the truth last: hits, false alarms and misses at IoU 0.5.

    Args:
        images: B tensors (3, H, W).
        detections: {name of a detector: B detections}, in the order of the columns.
        truths: B targets.
        categories: of the labels.
        score: the least score of a box that is drawn and counted.
        title: "" leaves it out; None: the counts of each detector.
        cell: width of a column in inches.
    """
    errors = {
        name: [count_hits(*pair, score) for pair in zip(found, truths)] for name, found in detections.items()
    }
    finding = "; ".join(f"{name}: {hit_sentence(*counts)}" for name, counts in errors.items())
    columns, captions, pictures = len(detections) + 1, [], []
    for row in range(len(images)):
        captions += [f"{name}: {_found_sentence(counts[row])}" for name, counts in errors.items()]
        captions.append(f"truth: {_count(len(truths[row]['boxes']), 'object')}")
        pictures += [images[row]] * columns
    legend = ("hit", "false_alarm", "missed", "truth")
    figure, axes = _page(pictures, columns, captions, finding if title is None else title, legend, cell)
    for row, (image, truth) in enumerate(zip(images, truths)):
        *of_detectors, last = axes[row * columns : (row + 1) * columns]
        for ax, (name, found) in zip(of_detectors, detections.items()):
            _draw_hits(ax, image, found[row], truth, errors[name][row], categories)
        draw_boxes(last, image, truth, categories=categories, style="truth")
    return figure


def _draw_hits(ax, image, detection: dict, truth: dict, errors: dict, categories) -> None:
    """An image with its hits, false alarms and misses, as `count_hits` gives them."""
    missed = _chosen(truth, errors["misses"])
    missed["scores"] = torch.full((len(errors["misses"]),), torch.nan)
    parts = {
        "missed": missed,
        "false_alarm": _chosen(detection, errors["false_alarms"]),
        "hit": _chosen(detection, errors["hits"]),
    }
    merged = {key: torch.cat([part[key] for part in parts.values()]) for key in ("boxes", "labels", "scores")}
    styles = [style for style, part in parts.items() for _ in part["labels"]]
    draw_boxes(ax, image, merged, categories=categories, style=styles)


def count_hits(detection: dict, truth: dict, score=0.3) -> dict:
    """`box_errors` at IoU 0.5 of the boxes scoring at least `score`; its indices point into the whole detection."""
    strong = torch.nonzero(torch.as_tensor(detection["scores"]).cpu() >= score).flatten()
    errors = box_errors(_chosen(detection, strong), truth, iou=0.5)
    return {"hits": strong[errors["hits"]], "false_alarms": strong[errors["false_alarms"]], "misses": errors["misses"]}


def hit_sentence(*errors: dict) -> str:
    """The counts of one or several `count_hits` in words: "3 hits, 1 false alarm, 0 missed"."""
    hits, alarms, misses = (sum(len(error[key]) for error in errors) for key in ("hits", "false_alarms", "misses"))
    return f"{_count(hits, 'hit')}, {_count(alarms, 'false alarm')}, {misses:,} missed"


def _found_sentence(error: dict) -> str:
    """One `count_hits` in few words: "3 of 4 found, 1 false"."""
    hits, alarms, misses = (len(error[key]) for key in ("hits", "false_alarms", "misses"))
    return f"{hits} of {hits + misses} found, {alarms} false"


def show_pseudo_boxes(image, line, truth=None, categories=None, title=None) -> Picture:
    """The teacher's boxes for one image at one step against the truth: kept, mined only, dropped.

    `line` is a line of `pseudo_boxes.jsonl`, or a list of such lines for the same image, drawn as a
    row over the steps. `truth` is a target of the image or None. A box both kept and mined counts
    as kept. Blue boxes are right and orange ones wrong, where the truth is known. Of the dropped
    ones the BEST_DROPPED are drawn. `title=""` leaves out every word around the images.
    """
    lines = [line] if isinstance(line, dict) else list(line)
    captions = [f"step {one['step']:,}: {pseudo_sentence(one, truth)}" for one in lines]
    styles = [pseudo_styles(one, truth) for one in lines]
    wrong = [key for key in ("kept_wrong", "mined_wrong") if any(key in row for row in styles)]
    legend = [key for key in STYLES if key in ("truth", "kept", "mined", "dropped", *wrong)]
    words = (captions, title or "", legend) if title != "" else ()
    figure, axes = _page([image] * len(lines), len(lines), *words)
    for ax, one, row in zip(axes, lines, styles):
        hidden = drop_most(one["scores"], row)
        shown = [place for place in range(len(row)) if place not in hidden]
        boxes, row = _chosen(one, shown), [row[place] for place in shown]
        draw_boxes(ax, image, boxes, truth, categories, style=row)
    return figure


def drop_most(scores, styles: list[str]) -> set[int]:
    """The places of the dropped boxes that are not drawn: all but the BEST_DROPPED by score."""
    dropped = [place for place, style in enumerate(styles) if style == "dropped"]
    return set(sorted(dropped, key=lambda place: -scores[place])[BEST_DROPPED:])


def pseudo_sentence(line: dict, truth: dict | None = None) -> str:
    """The counts of a line of `pseudo_boxes.jsonl` in words; how many kept boxes are right, if there is a truth."""
    styles = pseudo_styles(line)
    kept = [place for place, style in enumerate(styles) if style == "kept"]
    right = ""
    if truth is not None and kept:
        right = f" ({len(box_errors(_chosen(line, kept), truth, iou=0.5)['hits'])} right)"
    return f"{len(kept)} kept{right}, {styles.count('mined')} mined only, {styles.count('dropped')} dropped"


def pseudo_styles(line: dict, truth: dict | None = None) -> list[str]:
    """A key of STYLES for each box of a line of `pseudo_boxes.jsonl`.

    A box is kept, else mined, else dropped. With a truth, kept boxes that are no hit (IoU 0.5) are
    "kept_wrong", and mined ones likewise "mined_wrong".
    """
    pairs = zip(line["kept"], line["mined"])
    styles = ["kept" if kept else "mined" if mined else "dropped" for kept, mined in pairs]
    for style in ("kept", "mined") if truth is not None else ():
        places = [place for place, one in enumerate(styles) if one == style]
        if places:
            for wrong in box_errors(_chosen(line, places), truth, iou=0.5)["false_alarms"]:
                styles[places[int(wrong)]] += "_wrong"
    return styles


def _count(count: int, word: str, many: str = "") -> str:
    """A number with what it counts: "1 box", "2 boxes"."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"


def _page(images, columns, titles=None, title="", legend=(), cell=2.2, gap=EDGE) -> tuple[Picture, list]:
    """A figure with one axes per image, all images at one scale, and room for exactly the text there is.

    `cell` is the usual width of a column and `gap` the space between two, in inches; `legend` holds keys of STYLES.
    """
    sizes = np.array([image.shape[-2:] for image in images]).reshape(-1, 2)
    columns = max(1, min(columns, len(images)))
    around = EDGE if len(images) > 1 or title or legend or any(titles or ()) else 0.0  # a lone image fills its figure
    width = min(WIDTH, 2 * around + columns * cell + (columns - 1) * gap)
    column = (width - 2 * around - (columns - 1) * gap) / columns
    sizes = sizes * column / sizes[:, 1].max(initial=1)  # in inches
    captions = [_wrap(text, column, 8) for text in titles or [""] * len(images)]
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    above = [0.14 * max(caption.count("\n") + bool(caption) for caption in captions[row]) for row in rows]
    high = [room + sizes[row, 0].max() for row, room in zip(rows, above)]
    header, wraps = _wrap(title, width, 10), len(legend) * 1.1 > width
    top = around + (0.17 * (header.count("\n") + 1) + 0.04 if header else 0)
    bottom = around + (0.2 * (1 + wraps) if legend else 0)
    height = top + sum(high) + around * (len(rows) - 1) + bottom
    figure, axes = Picture(figsize=(width, height), dpi=DPI, facecolor="white"), []
    _headline(figure, header, x=around / width, y=1 - around / height)
    for place, (tall, wide) in enumerate(sizes):
        row, left = place // columns, around + (place % columns) * (column + gap)
        edge = height - top - sum(high[:row]) - around * row - above[row]
        axes.append(figure.add_axes((left / width, (edge - tall) / height, wide / width, tall / height)))
        style = {"fontsize": 8, "pad": 2, "color": INK, "linespacing": 1.1, "parse_math": False}
        axes[-1].set_title(captions[place], loc="left", **style)
    if legend:
        handles = [Patch(label=NAMES.get(key, key), **_line(key, STYLES[key][0] or "#56B4E9")) for key in legend]
        style = {"fontsize": 8, "frameon": False, "handlelength": 1.8, "borderaxespad": 0.3}
        figure.legend(handles=handles, loc="lower left", ncols=2 if wraps else len(legend), **style)
    return figure, axes


def _wrap(text: str, inches: float, points: int) -> str:
    """Break a line to fit a width, not after a number; a letter is about 0.6 times as wide as its size."""
    together = re.sub(r"(?<=\d) ", "\u00a0", text)
    return textwrap.fill(together, max(12, int(inches / (0.0082 * points)))).replace("\u00a0", " ")


# ---- curves and diagrams ---------------------------------------------------------------------------------------------


def plot_curves(logs: dict[str, list[dict]], x="step", title=None, burn_ins=None) -> Picture:
    """AP on the tune split over steps, or over minutes (x="minutes"), student and teacher of every run.

    `logs` maps the name of a run to the lines of its log.jsonl; lines without an AP are skipped. A
    method has its fixed colour, so the name should mention it; a second run of a method gets
    another marker. `burn_ins` maps the name of a run to (what to call it, log) of the run it went
    on from: a grey curve, drawn once, and the run's own curve begins at its end.
    """
    figure, ax = _plot(6.4, 3.6)
    ends, used, starts = [], [], {}
    for name in logs:
        called, burn_in = (burn_ins or {}).get(name, ("", []))
        starts[name] = [line for line in burn_in if line.get("AP_teacher") is not None][-1:]
        if starts[name] and burn_in not in (*used, *logs.values()):
            style = {"color": BURN_IN_COLOR, "linewidth": 2.0, "marker": "o", "markersize": 4}
            ax.plot(*_series(burn_in, "AP_teacher", x), label=called, gid="burn-in", **style)
            used.append(burn_in)
    handles, used = list(ax.lines), []
    for position, (name, log) in enumerate(logs.items()):
        color = method_color(name, position)
        lines = starts[name] + log
        students, teachers = (_series(lines, key, x) for key in ("AP_student", "AP_teacher"))
        ax.plot(*students, gid=f"{name} AP_student", color=color, linestyle=(0, (3, 1.5)), linewidth=1.1)
        style = {"color": color, "linewidth": 2.0, "marker": "os^Dv"[used.count(color) % 5], "markersize": 4}
        (drawn,) = ax.plot(*teachers, gid=f"{name} AP_teacher", label=name, **style)
        ends += [(end, name, drawn) for end in teachers[1][-1:]]
        used.append(color)
    ranked = sorted(ends, key=lambda end: -end[0])
    handles = [drawn for _, _, drawn in ranked] + handles
    dashed = {"linestyle": "--", "label": "dashed: student (solid: EMA teacher)"}
    handles.append(Line2D([], [], color=INK, linewidth=1.1, **dashed))
    legend = ax.legend(handles=handles, loc="lower right", fontsize=8.5, framealpha=0.8, edgecolor="none")
    for text in legend.get_texts():
        text.set_parse_math(False)
    ax.set(xlabel="step" if x == "step" else "minutes of training", ylabel="AP on the tune split, %", ylim=(0, None))
    said = f"{ranked[0][1]}: the teacher ends at {ranked[0][0]:.1f} AP" if ends else "No evaluation yet"
    for value, name, _ in [end for end in ends if end is not ranked[0]][:1]:
        said += f", {ranked[0][0] - value:.1f} above {name}"
    return _headline(figure, title, said)


def plot_losses(log: list[dict], title=None) -> Picture:
    """Every loss of a run over its steps on a logarithmic axis, without the zeros; the largest is named first."""
    figure, ax = _plot(7.5, 3.4)
    log = [line for line in log if line.get("losses")]
    names = sorted({name for line in log for name in line["losses"]}, key=lambda name: -log[-1]["losses"].get(name, 0))
    for position, name in enumerate(names):
        values = np.array([line["losses"].get(name, np.nan) for line in log], dtype=float)
        color, dashes = LINE_COLORS[position % len(LINE_COLORS)], ("-", "--", ":")[position // len(LINE_COLORS) % 3]
        style = {"color": color, "linestyle": dashes, "linewidth": 1.4}
        ax.plot([line["step"] for line in log], np.where(values > 0, values, np.nan), label=name, **style)
    ax.set(xlabel="step", ylabel="weighted loss", yscale="log")
    ax.tick_params(axis="y", which="both", labelsize=8, colors="#555555", length=2)
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    if names:
        ax.legend(labelspacing=0.3, **BESIDE)
    totals = [sum(line["losses"].values()) for line in log]
    said = f"The total goes from {totals[0]:.2f} to {totals[-1]:.2f}" if log else "No loss logged yet"
    return _headline(figure, title, said)


def plot_pseudo_quality(log: list[dict], title=None) -> Picture:
    """Precision and recall of the pseudo-boxes, their number per image and the cost threshold over the steps."""
    panels = {
        "right or found, %": {"precision": "pseudo_precision", "recall": "pseudo_recall"},
        "boxes per image": {"kept": "pseudo_per_image", "mined only": "mined_per_image"},
        "matching cost": {"threshold": "cost_threshold"},
    }
    known = {label: _series(log, key) for keys in panels.values() for label, key in keys.items()}
    panels = {name: keys for name, keys in panels.items() if any(known[label][0] for label in keys)}
    figure, axes = _plot(WIDTH, 2.7, max(1, len(panels)))
    for ax, (name, keys) in zip(np.atleast_1d(axes), panels.items()):
        for color, label in zip(LINE_COLORS, keys):
            if known[label][0]:
                ax.plot(*known[label], color=color, linewidth=1.6, label=label)
        ax.set(xlabel="step", **({"ylim": (0, 102)} if "%" in name else {}))
        ax.set_title(name, fontsize=9, loc="left", color=INK)
        ax.legend(fontsize=8, framealpha=0.7, edgecolor="none")
    said = "No pseudo-box was measured against the truth"
    (_, precision), (_, recall) = known["precision"], known["recall"]
    if precision and recall:
        said = f"At the end {precision[-1]:.0f} % of the pseudo-boxes are right; "
        said += f"they find {recall[-1]:.0f} % of the objects"
    return _headline(figure, title, said)


def _series(log: list[dict], key: str, x: str = "step") -> tuple[list, list]:
    """The steps (or minutes) and the values of the log lines that hold a number under `key`; shares in %."""
    known = [line for line in log if line.get(key) is not None and line[key] == line[key]]  # neither missing nor nan
    places = [line["step"] if x == "step" else line["seconds"] / 60 for line in known]
    return places, [line[key] * (100 if key in SHARES else 1) for line in known]


def plot_cost_mixture(costs, mixture_means, mixture_vars, mixture_weights, threshold, correct, title=None) -> Picture:
    """Matching costs (N,) as a histogram, the two Gaussians of their mixture, and the cut: boxes up to it are mined.

    The three mixture arguments hold one number per component; `correct` (N,) bool colours the bars.
    """
    arrays = (costs, mixture_means, mixture_vars, mixture_weights)
    costs, *mixture = (np.asarray(values, dtype=float).reshape(-1) for values in arrays)
    correct, threshold = np.asarray(correct, dtype=bool), float(threshold)
    figure, ax = _plot(7.5, 3.2)
    edges = np.histogram_bin_edges(costs, bins=max(10, min(40, len(costs) // 4)))
    groups = {"color": ["#56B4E9", ORANGE], "label": ["right", "wrong"]}
    groups |= {"stacked": True, "histtype": "stepfilled"}  # an outline each, which is drawn faster than bars
    _, _, bars = ax.hist([costs[correct], costs[~correct]], edges, **groups)
    for bar in bars[1] if len(costs) else ():
        bar.set(hatch="///", edgecolor="white", linewidth=0)
    grid = np.linspace(edges[0], edges[-1], 200)
    names = (("reliable component", "-"), ("unreliable component", "--"))
    for (name, dashes), (mean, variance, weight) in zip(names, sorted(zip(*mixture))):
        density = weight * np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        expected = density * len(costs) * (edges[1] - edges[0])  # boxes per bar
        ax.plot(grid, expected, color=INK, linestyle=dashes, linewidth=1.5, label=name)
    ax.axvline(threshold, color=RED, linewidth=2, label=f"cut at {threshold:.2f}")
    ax.legend(**BESIDE)
    ax.set(xlabel="matching cost of a pseudo-box with the student's answer", ylabel="pseudo-boxes")
    mined = correct[costs <= threshold]
    said = f"The cut mines {len(mined)} of {len(costs)} boxes"
    if len(mined):
        said += f"; {100 * mined.mean():.0f} % of these are right, against {100 * correct.mean():.0f} % of all"
    return _headline(figure, title, said)


def plot_matching(
    image, truth, pred_boxes_pixels, match_queries, match_targets, quality=None, title=None, categories=None
) -> Picture:
    """Who answers for which object: left the boxes, right a line from object to query, as thick as the quality.

    `pred_boxes_pixels` (Q, 4) xyxy pixels; `match_queries`, `match_targets`, `quality` (N,) as a Match holds them
    (quality 1 if None). A colour stands for an object; unmatched queries are thin, grey and dotted.
    """
    boxes = torch.as_tensor(pred_boxes_pixels).tolist()
    queries, targets = (torch.as_tensor(values).tolist() for values in (match_queries, match_targets))
    quality = [1.0] * len(queries) if quality is None else torch.as_tensor(quality).tolist()
    size, objects = tuple(image.shape[-2:]), _rows(truth)
    tall = 3.4 * min(1.5, max(0.6, size[0] / size[1]))
    figure = Picture(figsize=(7.0, tall + 0.4), dpi=DPI, facecolor="white")
    top = tall / (tall + 0.4)
    left, right = figure.add_axes((0.01, 0.01, 3.4 / 7, top - 0.02)), figure.add_axes((0.52, 0.01, 0.47, top - 0.02))
    rest = [box for index, box in enumerate(boxes) if index not in set(queries)]
    draw_boxes(left, image, {"boxes": rest, "labels": [0] * len(rest)}, truth, style="dropped")
    for query, target, value in zip(queries, targets, quality):
        _draw_box(left, boxes[query], "prediction", target, width=0.6 + 1.6 * value)
    _write_labels(left, [(box, class_color(place), str(place)) for place, (box, _, _) in enumerate(objects)], size)
    names = [f"object {place}: {label_text(label, categories)}" for place, (_, label, _) in enumerate(objects)]
    _draw_pairs(right, names, queries, targets, quality)
    answered = f"{len(set(targets))} of {_count(len(objects), 'object')}"
    return _headline(figure, title, f"{len(queries)} of {len(boxes)} queries answer for {answered}")


def _draw_pairs(ax, names, queries, targets, quality) -> None:
    """Objects on the left, their queries on the right, joined by lines as thick as the quality."""
    ax.set(xlim=(0, 1), ylim=(1, 0))
    ax.set_axis_off()
    pairs = sorted(zip(targets, queries, quality), key=lambda pair: (pair[0], -pair[2]))
    heights = (np.arange(len(names)) + 0.5) / max(len(names), 1)
    text = {"fontsize": 8, "va": "center", "parse_math": False, "color": INK}
    for target, (name, y) in enumerate(zip(names, heights)):
        ax.text(0.24, y, name, ha="right", **text)
        ax.plot(0.28, y, "o", color=class_color(target), markersize=9, markeredgecolor=INK, clip_on=False)
    text["fontsize"] = 8 if len(pairs) <= 22 else 6
    for place, (target, query, value) in enumerate(pairs):
        spot = (place + 0.5) / len(pairs)
        style = {"color": class_color(target), "linewidth": 0.5 + 2.5 * value, "zorder": 1}
        ax.plot([0.28, 0.7], [heights[target], spot], **style)
        if len(pairs) <= 40:
            ax.text(0.72, spot, label_text(f"query {query}", None, value if value < 1 else None), **text)


def plot_attention_mask(mask, queries: int, names=None, title=None) -> Picture:
    """A group mask (N, N), True = blocked, as blocks: row q shows what query q may see.

    `queries` is the number of matching queries, which come last. The queries before them are cut into blocks of equal
    rows; `names` holds a name per block, the matching one included.
    """
    mask = torch.as_tensor(mask, dtype=torch.bool).cpu()
    first = len(mask) - queries  # the first matching query
    changes = [index for index in range(1, first) if not torch.equal(mask[index], mask[index - 1])]
    edges = sorted({0, *changes, first, len(mask)})
    centres = [(start + end - 1) / 2 for start, end in zip(edges, edges[1:])]
    names = [f"group {place + 1}" for place in range(len(centres) - 1)] + ["matching"] if names is None else names
    figure, ax = _plot(5.4, 4.4)
    ax.imshow(mask.numpy(), cmap=ListedColormap(["#56B4E9", "#EDEDED"]), vmin=0, vmax=1, interpolation="nearest")
    ax.hlines(np.array(edges[1:-1]) - 0.5, -0.5, len(mask) - 0.5, color="white", linewidth=1.5)
    ax.vlines(np.array(edges[1:-1]) - 0.5, -0.5, len(mask) - 0.5, color="white", linewidth=1.5)
    ax.set_xticks(centres, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(centres, names, fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="may be seen", ylabel="sees")
    ax.legend(handles=[Patch(color="#56B4E9", label="sees"), Patch(color="#EDEDED", label="blocked")], **BESIDE)
    leaks = int((~mask[first:, :first]).any(0).sum())
    said = f"The matching queries see {_count(leaks, 'group query', 'group queries')}: a leak"
    return _headline(figure, title, said if leaks else "No matching query sees a group")


def show_data_summary(summary: dict[str, dict], title=None) -> Picture:
    """Histograms of `doctor_data`'s summary: boxes of each class, sides of boxes, sides of images; a colour a part."""
    figure, (classes, boxes, images) = _plot(WIDTH, 3.2, 3)
    colors = dict(zip(summary, LINE_COLORS))
    for ax, key in ((boxes, "box_sides"), (images, "image_sides")):
        known = {name: part[key] for name, part in summary.items() if key in part}
        width = 0.85 / max(len(known), 1)
        for order, (name, one) in enumerate(known.items()):
            places = np.arange(len(one["edges"])) + (order - (len(known) - 1) / 2) * width
            ax.bar(places, one["counts"], width, color=colors[name])
            ax.set_xticks(np.arange(len(one["edges"])) - 0.5, one["edges"], rotation=60)
    labelled = {name: part["classes"] for name, part in summary.items() if "classes" in part}
    for name, counts in labelled.items():
        ranked = sorted(counts.values(), reverse=True)
        classes.plot(range(1, len(ranked) + 1), ranked, color=colors[name], marker=".", linewidth=1.2)
    boxes.set(xlabel="square root of the area, px", ylabel="boxes")
    images.set(xlabel="longer side, px", ylabel="images")
    classes.set(xlabel="class, the most frequent first", ylabel="boxes", yscale="symlog", ylim=(0, None))
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    counts = next(iter(labelled.values()), {})
    said = f"{sum(part['images'] for part in summary.values()):,} images"
    if counts:
        rare = min(counts, key=counts.get)
        said += f"; of {len(counts)} classes the rarest, {rare}, has {_count(counts[rare], 'box', 'boxes')}"
    return _headline(figure, title, said)


def _plot(width: float, height: float, columns: int = 1, height_ratios=(1,)):
    """A figure with one plot, or several side by side or below each other (one for each of `height_ratios`)."""
    figure = Picture(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(len(height_ratios), columns, height_ratios=height_ratios)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#888888")
        ax.grid(color="#E8E8E8", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8, colors="#555555", length=2)
        for axis in (ax.xaxis, ax.yaxis):
            axis.label.set(fontsize=8, color="#555555")
    return figure, axes


def _headline(figure, title: str | None, finding: str = "", x: float = 0.01, y: float | None = None) -> Picture:
    """Over the figure: the title, or where it is None the finding. Returns the figure."""
    text = _wrap(finding if title is None else title, figure.get_figwidth(), 10)
    if text:
        style = {"ha": "left", "va": "top", "fontsize": 10, "weight": "bold", "color": INK, "parse_math": False}
        figure.suptitle(text, x=x, y=y, **style)
    return figure


def plot_ablation(rows, title=None) -> Picture:
    """Tables of an ablation as dots: one for each seed, a bar from the mean by one standard error to either side.

    `rows` are as from `semidetr_lite.training.ablate.summarise`; a panel for each table, detector and percent, all on
    one axis. The finding leaves out runs longer than the first of their row.
    """
    panels: dict[tuple, list] = {}
    for row in rows:
        panels.setdefault((row.table, row.preset, row.detector, row.percent), []).append(row)
    heights = [len(members) + 1.5 for members in panels.values()]
    figure, axes = _plot(7.5, 0.26 * sum(heights) + 0.3, 1, height_ratios=heights)
    seen = [value for row in rows for value in (*row.values, row.mean - row.error, row.mean + row.error)]
    for ax, ((table, preset, detector, percent), members) in zip(np.atleast_1d(axes), panels.items()):
        for place, row in enumerate(members):
            color = method_color(row.row, 2)  # black where a row names no method
            ax.plot(row.values, [place] * len(row.values), "o", color=color, markersize=4, alpha=0.5, linewidth=0)
            spread = 0 if row.error != row.error else row.error
            ax.errorbar(row.mean, place, xerr=spread, fmt="D", color=color, markersize=5, capsize=4, linewidth=1.6)
            above = {"xytext": (0, 5), "textcoords": "offset points", "fontsize": 7, "ha": "center"}
            ax.annotate(f"{row.mean:.1f}", (row.mean, place), **above)
        ax.set_yticks(range(len(members)), [row.row for row in members])
        ax.set(ylim=(len(members) - 0.4, -0.8), xlim=(np.nanmin(seen) - 2, np.nanmax(seen) + 2))
        ax.tick_params(labelbottom=False)
        ax.set_title(f"{table}: {detector}, {percent:g} % of the labels ({preset})", fontsize=9, loc="left", color=INK)
    ax.set(xlabel="AP on the test split, %")
    ax.tick_params(labelbottom=True)
    main = [row for row in rows if row.table == "main" and row.percent < 100 and "," not in row.row]
    best = max((row for row in main if row.gap == row.gap), key=lambda row: row.gap, default=None)
    said = ""
    if best:
        kind = (best.preset, best.detector, best.percent)
        alike = [row for row in main if (row.preset, row.detector, row.percent) == kind and row.gap >= best.gap - 2]
        *others, last = [row.row for row in alike]  # which nothing tells apart
        to = f"{last} closes"
        if others:
            to = f"{', '.join(others)} and {last} close {min(row.gap for row in alike):.0f} to"
        said = f"{to} {best.gap:.0f} % of the gap at {best.percent:g} % of the labels"
    return _headline(figure, title, said or "The ablation")


def plot_costs(costs, queries=(), targets=(), title=None) -> Picture:
    """Costs or scores (Q, T) as a heat map, an object a row and a query a column; a frame marks each pair.

    `queries` and `targets` (N,) are a Match's. Up to 60 values are written out.
    """
    table = torch.as_tensor(costs).detach().cpu().numpy().T  # (T, Q)
    tall = 0.28 * max(1, len(table))
    figure = Picture(figsize=(7.0, tall + 0.75), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0.1, 0.45 / (tall + 0.75), 0.89, tall / (tall + 0.75)))
    ax.imshow(table, cmap="cividis", aspect="auto")
    low, high = table.min(initial=np.inf), table.max(initial=-np.inf)
    for (row, column), value in np.ndenumerate(table) if table.size <= 60 else ():
        color = "black" if value > (low + high) / 2 else "white"
        ax.text(column, row, f"{value:.2f}", color=color, fontsize=8, ha="center", va="center")
    for query, target in zip(torch.as_tensor(queries).tolist(), torch.as_tensor(targets).tolist()):
        ax.add_patch(
            Rectangle((query - 0.5, target - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2.5, clip_on=False)
        )
    ax.set_xticks(range(0, table.shape[1], 1 if table.shape[1] <= 12 else 5))
    ax.set_yticks(range(len(table)), [f"object {place}" for place in range(len(table))])
    ax.tick_params(labelsize=8, length=2)
    ax.set_xlabel("query", fontsize=8, labelpad=1)
    return _headline(figure, title, f"{_count(len(queries), 'pair')} of {table.size} possible ones")
