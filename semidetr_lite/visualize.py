"""Every picture of the kit: pure functions that take dicts and tensors and return a figure.

One visual language throughout, so that a reader learns it once:

    truth          white line with a black outline
    prediction     solid line in the colour of its class, labelled with class name and score
    pseudo-label   dashed line in the colour of its class
    hit            as a prediction; a false alarm is orange and hatched, a missed object is red
    pseudo-boxes   kept: thick and solid; mined only: dashed; dropped: thin, grey, dotted

Colours are Okabe and Ito's, extended to any number of classes; orange and red stay reserved for errors, and no meaning
hangs on colour alone. Boxes are xyxy pixels of the image they are drawn on. A title is the finding; each function
writes its own unless one is given, and `title=""` leaves it out. The figures are at most 9 inches wide at 80 dpi, and
pyplot does not know them: nothing to close.
"""

import io
import re
import textwrap

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

from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import box_errors

RED, ORANGE, GREY, INK = "#E3001B", "#E69F00", "#C8C8C8", "#222222"
CLASS_COLORS = (
    *("#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2"),  # Okabe and Ito's, less the black, the orange and the red
    *("#999933", "#7B5FC7", "#7FE0C8", "#8B5A2B", "#C9B8FF"),
)
METHOD_COLORS = {
    "supervised": "#5A5A5A",
    "mean-teacher": "#0072B2",
    "semi-detr": "#D55E00",
    "soft-teacher": "#009E73",
    "dense-teacher": "#CC79A7",
}
OTHER_COLORS = ("#56B4E9", "#8C6D1F", "#7B5FC7", "#000000")
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#56B4E9", "#5A5A5A")
# style: (colour, None for the colour of the class; line width in points; line style; hatch)
STYLES = {
    "truth": ("#FFFFFF", 1.2, "-", None),
    "prediction": (None, 1.6, "-", None),
    "pseudo": (None, 1.6, "--", None),
    "hit": (None, 1.6, "-", None),
    "false_alarm": (ORANGE, 1.6, "-", "//"),
    "missed": (RED, 2.2, "-", None),
    "kept": (None, 2.4, "-", None),
    "mined": (None, 1.6, "--", None),
    "dropped": (GREY, 0.9, ":", None),
}
LABEL_POINTS, MOST_LABELS = 7, 12
WIDTH, EDGE, DPI = 9.0, 0.1, 80  # inches, inches, pixels an inch


class Picture(Figure):
    """A figure that shows itself when it is the last line of a notebook cell, with or without pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, dpi: int | None = None) -> bytes:
    """The figure as the bytes of a PNG file, at its own resolution unless `dpi` is given."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi or figure.dpi)
    return buffer.getvalue()


def class_color(label: int) -> str | tuple[float, float, float]:
    """The colour of a class: ten distinct ones, then the same ten lighter, then darker."""
    color, turn = CLASS_COLORS[label % len(CLASS_COLORS)], label // len(CLASS_COLORS) % 3
    if turn == 0:
        return color
    return tuple(0.55 * part + (0.45 if turn == 1 else 0) for part in to_rgb(color))


def method_color(name: str, position: int = 0) -> str:
    """The fixed colour of the method that `name` mentions; a name that mentions none takes a colour by its position."""
    plain = name.lower().replace("_", "-").replace(" ", "-")
    for method, color in METHOD_COLORS.items():
        if method in plain:
            return color
    return OTHER_COLORS[position % len(OTHER_COLORS)]


# ---- one image with its boxes ----------------------------------------------------------------------------------------


def draw_boxes(ax, image, target=None, truth=None, categories=None, style="prediction") -> None:
    """Draw an image (3, H, W) on `ax` with the boxes of `target` over those of `truth`, in pixels of the image.

    `style` is a key of STYLES, or a list with one key per box of `target`. A box of `target` carries its class name
    (from `categories`, else the number of its label) and its score if there is one; of many boxes only the
    MOST_LABELS with the highest scores do. `truth` is named only where it stands alone. A target without boxes (an
    unlabelled one) draws nothing.
    """
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    # With this extent the edges of the pixels lie on whole numbers, as the boxes have them.
    smooth = "nearest" if max(height, width) <= 256 else "antialiased"
    ax.imshow(pixels, extent=(0, width, height, 0), interpolation=smooth)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    alone = target is None or len(_boxes(target)) == 0
    labels = []
    for box, label, _ in _rows(truth):
        labels.append(_draw_box(ax, box, "truth", label, _name(label, categories) if alone else ""))
    rows = _rows(target)
    styles = [style] * len(rows) if isinstance(style, str) else style
    ranked = sorted((-1 if score != score else -score, place) for place, (_, _, score) in enumerate(rows))
    named = {place for _, place in [pair for pair in ranked if styles[pair[1]] != "dropped"][:MOST_LABELS]}
    for place, ((box, label, score), key) in enumerate(zip(rows, styles)):
        text = f"{_name(label, categories)} {_decimals(score)}".strip() if place in named else ""
        labels.append(_draw_box(ax, box, key, label, text))
    _write_labels(ax, labels, (height, width))


def _draw_box(ax, box, style: str, label: int, text: str = "", width: float | None = None):
    """One rectangle in its style; returns (box, colour, text) for the label to be placed once all boxes are known."""
    color, line, dashes, hatch = STYLES[style]
    color, line = class_color(label) if color is None else color, line if width is None else width
    around, dark = (1.6, "black") if style == "truth" else (1.2, "#00000088")
    patch = Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, gid=style)
    patch.set(edgecolor=color, linewidth=line, linestyle=dashes, hatch=hatch)
    patch.set(path_effects=[withStroke(linewidth=line + around, foreground=dark)], clip_on=False)
    patch.set_zorder(2 if style in ("truth", "dropped") else 3)
    ax.add_patch(patch)
    return box, color, text


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
        x, y, width, height = _free_place(box, extent * per_point, (LABEL_POINTS + 3) * per_point, size, boxes, taken)
        taken.append((x, y, x + width, y + height))
        ink = "white" if np.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.55 else "black"
        around = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
        style = {"fontsize": LABEL_POINTS, "ha": "center", "va": "center", "parse_math": False, "zorder": 4}
        ax.text(x + width / 2, y + height / 2, text, color=ink, bbox=around, **style)


def _free_place(box, width: float, height: float, size: tuple[int, int], boxes, taken):
    """The place (x, y, width, height) around `box`, inside the image, that overlaps labels and boxes least."""
    x1, y1, x2, y2 = box
    over, under, right, left = y1 - height, y2, x2 - width, x1 - width
    corners = [(x1, over), (x1, under), (right, over), (right, under), (x2, y1), (left, y1), (x1, y1)]
    best, least = None, float("inf")
    for order, (x, y) in enumerate(corners):
        x, y = max(0, min(x, size[1] - width)), max(0, min(y, size[0] - height))
        place = (x, y, x + width, y + height)
        covered = 5 * sum(_shared(place, other) for other in taken) + sum(_shared(place, other) for other in boxes)
        covered += 0.02 * order * width * height
        if covered < least:
            best, least = (x, y, width, height), covered
    return best


def _shared(a, b) -> float:
    """The area that two xyxy boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _pixels(image) -> np.ndarray:
    """(3, H, W) uint8 or float in [0, 1] -> (H, W, 3) uint8."""
    image = torch.as_tensor(image).detach().cpu()
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"an image to draw must have the shape (3, H, W), got {tuple(image.shape)}")
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().byte()
    return image.permute(1, 2, 0).numpy()


def _boxes(target) -> list:
    """The boxes of a target as lists of four numbers; none for None and for an unlabelled target."""
    return [] if target is None or "boxes" not in target else torch.as_tensor(target["boxes"]).tolist()


def _rows(target) -> list:
    """A target as a list of (box, label, score), the score nan where there is none."""
    boxes = _boxes(target)
    labels = torch.as_tensor(target["labels"]).tolist() if boxes else []
    scores = torch.as_tensor(target["scores"]).tolist() if boxes and "scores" in target else [float("nan")] * len(boxes)
    return list(zip(boxes, labels, scores))


def _name(label: int, categories) -> str:
    return str(label) if categories is None else str(categories[label]["name"])


def _decimals(score: float) -> str:
    return "" if score != score else f"{score:.2f}".removeprefix("0")


def _chosen(target: dict, indices) -> dict:
    """The boxes of a target at `indices`."""
    return {key: torch.as_tensor(target[key]).cpu()[indices] for key in ("boxes", "labels", "scores") if key in target}


# ---- many images on one page -----------------------------------------------------------------------------------------


def show_targets(images, targets, categories, titles=None, columns=4, style="truth", title=None) -> Picture:
    """Images side by side with their targets, as truth or in another style (`"prediction"`, `"pseudo"`)."""
    count = sum(len(_boxes(target)) for target in targets)
    finding = f"{count} {_plural('object', count)} on {len(images)} {_plural('image', len(images))}"
    figure, axes = _page([_size(image) for image in images], columns, titles, finding if title is None else title)
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
    finding = f"{int(keep.sum())} of {len(weak)} {_plural('box', len(weak))} in view after the strong augmentation"
    sizes, titles = [_size(weak_image), _size(strong_image)], ["weak view", "strong view"]
    figure, axes = _page(sizes, 2, titles, finding if title is None else title, cell=3.2, gap=0.35)
    numbers, labels = [{"name": str(number + 1)} for number in range(len(weak))], torch.arange(len(weak))
    styles = ["prediction" if kept else "dropped" for kept in keep.tolist()]
    draw_boxes(axes[0], weak_image, {"boxes": weak, "labels": labels}, categories=numbers, style=styles)
    draw_boxes(axes[1], strong_image, {"boxes": strong[keep], "labels": labels[keep]}, categories=numbers)
    for index in labels[keep].tolist():
        ends = [((boxes[index, :2] + boxes[index, 2:]) / 2).tolist() for boxes in (weak, strong)]
        line = ConnectionPatch(*ends, "data", "data", axesA=axes[0], axesB=axes[1], alpha=0.6)
        line.set(color=class_color(index), linewidth=1)
        figure.add_artist(line)
    return figure


def show_hits(
    images, detections, truths, categories, score=0.3, titles=None, columns=4, title=None, legend=True
) -> Picture:
    """Detections that score at least `score` against the truth at IoU 0.5: hits, false alarms and misses told apart."""
    errors = [count_hits(detection, truth, score) for detection, truth in zip(detections, truths)]
    titles = [hit_sentence(error) for error in errors] if titles is None else titles
    title = hit_sentence(*errors) + f" at score {score:g}" if title is None else title
    keys = ("hit", "false_alarm", "missed") if legend else ()
    figure, axes = _page([_size(image) for image in images], columns, titles, title, legend=keys)
    for ax, image, detection, truth, error in zip(axes, images, detections, truths, errors):
        missed = {**_chosen(truth, error["misses"]), "scores": torch.full((len(error["misses"]),), torch.nan)}
        parts = [missed, _chosen(detection, error["false_alarms"]), _chosen(detection, error["hits"])]
        merged = {key: torch.cat([part[key] for part in parts]) for key in ("boxes", "labels", "scores")}
        styles = [style for part, style in zip(parts, ("missed", "false_alarm", "hit")) for _ in part["labels"]]
        draw_boxes(ax, image, merged, categories=categories, style=styles)
    return figure


def count_hits(detection: dict, truth: dict, score=0.3) -> dict:
    """`box_errors` at IoU 0.5 of the boxes scoring at least `score`; its indices point into the whole detection."""
    strong = torch.nonzero(torch.as_tensor(detection["scores"]).cpu() >= score).flatten()
    errors = box_errors(_chosen(detection, strong), truth, iou=0.5)
    return {"hits": strong[errors["hits"]], "false_alarms": strong[errors["false_alarms"]], "misses": errors["misses"]}


def hit_sentence(*errors: dict) -> str:
    """The counts of one or several `count_hits` in words: "3 hits · 1 false alarm · 0 missed"."""
    hits, alarms, misses = (sum(len(error[key]) for error in errors) for key in ("hits", "false_alarms", "misses"))
    return f"{hits:,} {_plural('hit', hits)} · {alarms:,} {_plural('false alarm', alarms)} · {misses:,} missed"


def show_pseudo_boxes(image, line, truth=None, categories=None, title=None, legend=True) -> Picture:
    """The teacher's boxes for one image at one step against the truth: kept, mined only, dropped.

    `line` is a line of `pseudo_boxes.jsonl`, or a list of such lines for the same image, drawn as a row over the steps.
    `truth` is a target of the image or None. A box both kept and mined counts as kept.
    """
    lines = [line] if isinstance(line, dict) else list(line)
    titles = [f"step {one['step']:,}: {pseudo_sentence(one, truth)}" for one in lines] if title is None else None
    keys = ("truth", "kept", "mined", "dropped") if legend else ()
    figure, axes = _page([_size(image)] * len(lines), len(lines), titles, title or "", legend=keys)
    for ax, one in zip(axes, lines):
        target = {"boxes": one["boxes"], "labels": one["labels"], "scores": one["scores"]}
        draw_boxes(ax, image, target, truth, categories, style=_pseudo_styles(one))
    return figure


def pseudo_sentence(line: dict, truth: dict | None = None) -> str:
    """The counts of a line of `pseudo_boxes.jsonl` in words; how many kept boxes are right, if there is a truth."""
    styles = _pseudo_styles(line)
    kept = [index for index, style in enumerate(styles) if style == "kept"]
    right = ""
    if truth is not None and kept:
        target = {key: torch.as_tensor(line[key])[kept] for key in ("boxes", "labels", "scores")}
        right = f" ({len(box_errors(target, truth, iou=0.5)['hits'])} right)"
    return f"{len(kept)} kept{right} · {styles.count('mined')} mined · {styles.count('dropped')} dropped"


def _pseudo_styles(line: dict) -> list[str]:
    return ["kept" if kept else "mined" if mined else "dropped" for kept, mined in zip(line["kept"], line["mined"])]


def _plural(word: str, count: int) -> str:
    endings = {"x": "xes", "y": "ies"}
    return word if count == 1 else word[:-1] + endings.get(word[-1], word[-1] + "s")


def _size(image) -> tuple[int, int]:
    return tuple(image.shape[-2:])


def _page(sizes, columns, titles=None, title="", legend=(), cell=2.2, gap=0.1) -> tuple[Picture, list]:
    """A figure with one axes per image, all images at one scale, and room for exactly the text there is.

    Sizes [(H, W)] in pixels; `cell` is the usual width of an image and `gap` the space between two, in inches.
    """
    columns = max(1, min(columns, len(sizes)))
    around = EDGE if len(sizes) > 1 or title or legend or any(titles or ()) else 0.0  # a lone image fills its figure
    rows = [range(start, min(start + columns, len(sizes))) for start in range(0, len(sizes), columns)]
    width = min(WIDTH, 2 * around + columns * cell + (columns - 1) * gap)
    widest = max((sum(sizes[i][1] for i in row) for row in rows), default=1)
    scale = (width - 2 * around - (columns - 1) * gap) / widest  # inches per pixel
    header = _wrap(title, width, 10)
    captions = [_wrap(text, size[1] * scale, 8) for text, size in zip(titles or [""] * len(sizes), sizes)]
    above = [max(0.14 * (captions[i].count("\n") + bool(captions[i])) for i in row) for row in rows]
    top = around + (0.17 * (header.count("\n") + 1) + 0.04 if header else 0)
    wraps = len(legend) * 1.1 > width
    bottom = around + (0.2 * (1 + wraps) if legend else 0)
    inside = sum(max(sizes[i][0] for i in row) * scale for row in rows) + sum(above) + around * (len(rows) - 1)
    height = top + inside + bottom
    figure, axes = Picture(figsize=(width, height), dpi=DPI, facecolor="white"), []
    if header:
        style = {"fontsize": 10, "weight": "bold", "color": INK, "va": "top", "parse_math": False}
        figure.text(around / width, 1 - around / height, header, **style)
    edge = height - top
    for row, room in zip(rows, above):
        left, edge = around, edge - room
        for i in row:
            high, wide = sizes[i][0] * scale, sizes[i][1] * scale
            axes.append(figure.add_axes((left / width, (edge - high) / height, wide / width, high / height)))
            axes[-1].set_title(captions[i], fontsize=8, loc="left", pad=2, color=INK, linespacing=1.1, parse_math=False)
            left += wide + gap
        edge -= max(sizes[i][0] for i in row) * scale + around
    if legend:
        _draw_legend(figure, legend, columns=2 if wraps else len(legend))
    return figure, axes


def _wrap(text: str | None, inches: float, points: int) -> str:
    """Break a line so that it fits a width; a letter is about 0.6 times as wide as its size."""
    return textwrap.fill(unbroken(text or ""), max(12, int(inches / (0.0082 * points))))


def unbroken(text: str) -> str:
    """The text with spaces that do not break between a number and what it counts, and before a separating dot."""
    return re.sub(r"(?<=\d) | (?=·)", "\u00a0", text)


def _draw_legend(figure, keys, columns: int) -> None:
    """The meaning of the line styles in one or two lines at the foot of a page."""
    names = {"false_alarm": "false alarm", "mined": "mined only"}
    handles = []
    for key in keys:
        color, line, dashes, hatch = STYLES[key]
        color = "#56B4E9" if color is None else color
        outline = withStroke(linewidth=line + 1.6, foreground="black" if key == "truth" else "#00000055")
        style = {"edgecolor": color, "linewidth": line, "linestyle": dashes, "hatch": hatch, "path_effects": [outline]}
        handles.append(Patch(fill=False, label=names.get(key, key), **style))
    style = {"fontsize": 8, "frameon": False, "handlelength": 1.8, "borderaxespad": 0.3}
    figure.legend(handles=handles, loc="lower left", ncols=columns, **style)


# ---- curves and diagrams ---------------------------------------------------------------------------------------------


def plot_curves(logs: dict[str, list[dict]], x="step", title=None) -> Picture:
    """AP on the tune split over steps, or over minutes (x="minutes"), student and teacher of every run.

    `logs` maps the name of a run to the lines of its log.jsonl; lines without an AP are skipped. A method has its fixed
    colour, so the name should mention it; a second run of a method gets another marker.
    """
    figure, ax = _plot(7.5, 3.4)
    ends = []
    for position, (name, log) in enumerate(logs.items()):
        color = method_color(name, position)
        earlier = [method_color(other, place) for place, other in enumerate(list(logs)[:position])].count(color)
        for key, dashes, size in (("AP_student", (0, (3, 1.5)), 1.1), ("AP_teacher", "-", 2.0)):
            rows = [line for line in log if _known(line.get(key))]
            places = [line["step"] if x == "step" else line["seconds"] / 60 for line in rows]
            values = [100 * line[key] for line in rows]
            marker = "os^Dv"[earlier % 5] if key == "AP_teacher" else None
            style = {"color": color, "linestyle": dashes, "linewidth": size, "marker": marker, "markersize": 4}
            ax.plot(places, values, gid=f"{name} {key}", **style)
            if rows and key == "AP_teacher":
                ends.append((places[-1], values[-1], name, color))
    lines = (("teacher", 2, "-"), ("student", 1.1, "--"))
    handles = [Line2D([], [], color=INK, linewidth=size, linestyle=dashes, label=name) for name, size, dashes in lines]
    ax.legend(handles=handles, loc="lower right", fontsize=8, frameon=False, ncols=2)
    ax.set(xlabel="step" if x == "step" else "minutes of training", ylabel="AP on the tune split, %", ylim=(0, None))
    _label_ends(ax, [(place, value, f"{name} {value:.1f}", color) for place, value, name, color in ends])
    _headline(ax, _curve_finding(ends) if title is None else title)
    return figure


def _curve_finding(ends) -> str:
    """The sentence over the curves: who ends highest, and by how much over the first run."""
    if not ends:
        return "No evaluation yet"
    best = max(ends, key=lambda end: end[1])
    text = f"{best[2]}: the teacher ends at {best[1]:.1f} AP"
    others = [end for end in ends if end is not best]
    return text + (f", {best[1] - others[0][1]:.1f} above {others[0][2]}" if others else "")


def plot_losses(log: list[dict], title=None) -> Picture:
    """Every loss of a run over its steps on a logarithmic axis, without the zeros; the largest is named first."""
    figure, ax = _plot(7.5, 3.4)
    log = [line for line in log if line.get("losses")]
    names = sorted({name for line in log for name in line["losses"]}, key=lambda name: -log[-1]["losses"].get(name, 0))
    steps = [line["step"] for line in log]
    for position, name in enumerate(names):
        values = np.array([line["losses"].get(name, np.nan) for line in log], dtype=float)
        values[~(values > 0)] = np.nan
        color, dashes = LINE_COLORS[position % len(LINE_COLORS)], ("-", "--", ":")[position // len(LINE_COLORS) % 3]
        ax.plot(steps, values, color=color, linestyle=dashes, linewidth=1.4, label=name)
    totals = [sum(line["losses"].values()) for line in log]
    ax.set(xlabel="step", ylabel="weighted loss", yscale="log")
    for which in ("major", "minor"):
        ax.tick_params(axis="y", which=which, labelsize=8, colors="#555555", length=2)
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    if names:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8, frameon=False, labelspacing=0.3)
    finding = f"The total goes from {totals[0]:.2f} to {totals[-1]:.2f}" if log else "No loss logged yet"
    _headline(ax, finding if title is None else title)
    return figure


def plot_pseudo_quality(log: list[dict], title=None) -> Picture:
    """Precision and recall of the pseudo-boxes, their number per image and the cost threshold over the steps."""
    figure = Picture(figsize=(WIDTH, 2.7), dpi=DPI, layout="constrained", facecolor="white")
    panels = (
        ("right or found, %", (("pseudo_precision", "precision", 100), ("pseudo_recall", "recall", 100))),
        ("boxes an image", (("pseudo_per_image", "kept", 1), ("mined_per_image", "mined", 1))),
        ("matching cost", (("cost_threshold", "threshold", 1),)),
    )
    last = {}
    for ax, (name, series) in zip(figure.subplots(1, 3), panels):
        _plain(ax)
        ends = []
        for position, (key, label, factor) in enumerate(series):
            rows = [line for line in log if _known(line.get(key))]
            color, values = ("#0072B2", "#D55E00")[position], [factor * line[key] for line in rows]
            ax.plot([line["step"] for line in rows], values, color=color, linewidth=1.6)
            if rows:
                last[label] = values[-1]
                ends.append((rows[-1]["step"], values[-1], label, color))
        ax.set(xlabel="step", **({"ylim": (0, 102)} if "%" in name else {}))
        _label_ends(ax, ends)
        ax.set_title(name, fontsize=9, loc="left", color=INK)
    said = "No pseudo-box was measured against the truth"
    if "precision" in last and "recall" in last:
        said = f"At the end {last['precision']:.0f} % of the pseudo-boxes are right; "
        said += f"they find {last['recall']:.0f} % of the objects"
    style = {"fontsize": 10, "weight": "bold", "color": INK, "ha": "left", "parse_math": False}
    figure.suptitle(said if title is None else title, x=0.01, **style)
    return figure


def plot_cost_mixture(
    costs, mixture_means, mixture_vars, mixture_weights, threshold, correct=None, title=None
) -> Picture:
    """Matching costs (N,) as a histogram, the two Gaussians of their mixture, and the cut: boxes up to it are mined.

    The three mixture arguments hold one number per component; `correct` (N,) bool colours the bars.
    """
    arrays = (costs, mixture_means, mixture_vars, mixture_weights)
    costs, *mixture = (np.asarray(values, dtype=float).reshape(-1) for values in arrays)
    figure, ax = _plot(7.5, 3.2)
    edges = np.histogram_bin_edges(costs, bins=max(10, min(40, len(costs) // 4)))
    if correct is None:
        ax.hist(costs, edges, color="#B8B8B8", label="pseudo-boxes")
    else:
        correct = np.asarray(correct, dtype=bool).reshape(-1)
        groups = {"color": ["#56B4E9", ORANGE], "label": ["right", "wrong"]}
        _, _, bars = ax.hist([costs[correct], costs[~correct]], edges, stacked=True, **groups)
        for bar in bars[1] if len(costs) else ():
            bar.set(hatch="///", edgecolor="white", linewidth=0)
    grid = np.linspace(edges[0], edges[-1], 200)
    for order, (mean, variance, weight) in enumerate(sorted(zip(*mixture))):
        density = weight * np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        name, dashes = ("reliable component", "-") if order == 0 else ("unreliable component", "--")
        expected = density * len(costs) * (edges[1] - edges[0])  # boxes per bar
        ax.plot(grid, expected, color=INK, linestyle=dashes, linewidth=1.5, label=name)
    ax.axvline(float(threshold), color=RED, linewidth=2, label=f"cut at {float(threshold):.2f}")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8, frameon=False)
    ax.set(xlabel="matching cost of a pseudo-box with the student's answer", ylabel="pseudo-boxes")
    mined = costs <= float(threshold)
    said = f"The cut mines {mined.sum()} of {len(costs)} boxes"
    if correct is not None and mined.any():
        said += f"; {100 * correct[mined].mean():.0f} % of these are right, against {100 * correct.mean():.0f} % of all"
    _headline(ax, said if title is None else title)
    return figure


def plot_matching(
    image, truth, pred_boxes_pixels, match_queries, match_targets, quality=None, title=None, categories=None
) -> Picture:
    """Who answers for which object: left the boxes, right a line from object to query, as thick as the quality.

    `pred_boxes_pixels` (Q, 4) xyxy pixels; `match_queries`, `match_targets`, `quality` (N,) as a Match holds them
    (quality 1 if None). A colour stands for an object; unmatched queries are thin, grey and dotted.
    """
    boxes = _boxes({"boxes": pred_boxes_pixels})
    queries, targets = (torch.as_tensor(values).tolist() for values in (match_queries, match_targets))
    quality = [1.0] * len(queries) if quality is None else torch.as_tensor(quality).tolist()
    height, width = _size(image)
    tall = 3.4 * min(1.5, max(0.6, height / width))
    figure = Picture(figsize=(7.0, tall + 0.4), dpi=DPI, facecolor="white")
    top = tall / (tall + 0.4)
    left, right = figure.add_axes((0.01, 0.01, 3.4 / 7, top - 0.02)), figure.add_axes((0.52, 0.01, 0.47, top - 0.02))
    rest = [box for index, box in enumerate(boxes) if index not in set(queries)]
    draw_boxes(left, image, {"boxes": rest, "labels": [0] * len(rest)}, truth, style="dropped")
    for query, target, value in zip(queries, targets, quality):
        _draw_box(left, boxes[query], "prediction", target, width=0.6 + 1.6 * value)
    numbers = [(box, class_color(place), str(place)) for place, box in enumerate(_boxes(truth))]
    _write_labels(left, numbers, (height, width))
    _draw_pairs(right, truth, queries, targets, quality, categories)
    answered = len(set(targets))
    said = f"{len(queries)} of {len(boxes)} queries answer for {answered} of {len(_boxes(truth))} objects"
    said = said if title is None else title
    figure.text(0.01, 0.99, said, fontsize=10, weight="bold", va="top", color=INK, parse_math=False)
    return figure


def _draw_pairs(ax, truth, queries, targets, quality, categories) -> None:
    """Objects on the left, their queries on the right, joined by lines as thick as the quality."""
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    rows = _rows(truth)
    order = sorted(range(len(queries)), key=lambda pair: (targets[pair], -quality[pair]))
    spots = {pair: (place + 0.5) / max(len(order), 1) for place, pair in enumerate(order)}
    for target, (_, label, _) in enumerate(rows):
        y = (target + 0.5) / len(rows)
        text = {"fontsize": 8, "va": "center", "parse_math": False, "color": INK}
        ax.text(0.24, y, f"object {target}: {_name(label, categories)}", ha="right", **text)
        ax.plot(0.28, y, "o", color=class_color(target), markersize=9, markeredgecolor=INK, clip_on=False)
        for pair in (pair for pair in order if targets[pair] == target):
            style = {"color": class_color(target), "linewidth": 0.5 + 2.5 * quality[pair], "zorder": 1}
            ax.plot([0.28, 0.7], [y, spots[pair]], **style)
            if len(order) <= 40:
                said = f"query {queries[pair]}" + (f"  {_decimals(quality[pair])}" if quality[pair] < 1 else "")
                ax.text(0.72, spots[pair], said, ha="left", **{**text, "fontsize": 8 if len(order) <= 22 else 6})


def plot_attention_mask(mask, queries=None, names=None, title=None) -> Picture:
    """A group mask (N, N), True = blocked, as blocks: row q shows what query q may see.

    `queries` is the number of matching queries, which come last; None takes the last run of equal rows for them. The
    queries before them are cut into blocks of equal rows; `names` holds a name per block, the matching one included.
    """
    mask = torch.as_tensor(mask, dtype=torch.bool).cpu()
    changes = [index for index in range(1, len(mask)) if not torch.equal(mask[index], mask[index - 1])]
    first = len(mask) - queries if queries is not None else changes[-1] if changes else 0  # the first matching query
    edges = sorted({0, *(index for index in changes if index < first), first, len(mask)})
    centres = [(start + end - 1) / 2 for start, end in zip(edges, edges[1:])]
    names = [f"group {place + 1}" for place in range(len(centres) - 1)] + ["matching"] if names is None else names
    figure, ax = _plot(5.4, 4.4)
    ax.imshow(mask.numpy(), cmap=ListedColormap(["#56B4E9", "#EDEDED"]), vmin=0, vmax=1, interpolation="nearest")
    for edge in edges[1:-1]:
        ax.axhline(edge - 0.5, color="white", linewidth=1.5)
        ax.axvline(edge - 0.5, color="white", linewidth=1.5)
    ax.set_xticks(centres, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(centres, names, fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="may be seen", ylabel="sees")
    handles = [Patch(color="#56B4E9", label="sees"), Patch(color="#EDEDED", label="blocked")]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    leaks = int((~mask[first:, :first]).any(0).sum())
    said = "No matching query sees a group"
    if leaks:
        said = f"The matching queries see {leaks} group {_plural('query', leaks)}: a leak"
    _headline(ax, said if title is None else title)
    return figure


def show_data_summary(summary: dict[str, dict], title=None) -> Picture:
    """Histograms of `doctor_data`'s summary: boxes of each class, sides of boxes, sides of images; a colour a part."""
    figure = Picture(figsize=(WIDTH, 3.2), dpi=DPI, layout="constrained", facecolor="white")
    classes, boxes, images = figure.subplots(1, 3)
    colors = dict(zip(summary, LINE_COLORS))
    for ax, key, label in (
        (boxes, "box_sides", "square root of the area, px"),
        (images, "image_sides", "longer side, px"),
    ):
        _plain(ax).set(xlabel=label, ylabel=key.removesuffix("_sides") + ("es" if ax is boxes else "s"))
        known = {name: part[key] for name, part in summary.items() if key in part}
        edges = next((one["edges"] for one in known.values()), [0])
        for order, (name, one) in enumerate(known.items()):
            width = 0.85 / len(known)
            places = np.arange(len(edges)) + (order - (len(known) - 1) / 2) * width
            ax.bar(places, one["counts"], width, color=colors[name])
        ax.set_xticks(np.arange(len(edges)) - 0.5, edges, rotation=60)
    labelled = {name: part["classes"] for name, part in summary.items() if "classes" in part}
    for name, counts in labelled.items():
        ranked = sorted(counts.values(), reverse=True)
        _plain(classes).plot(range(1, len(ranked) + 1), ranked, color=colors[name], marker=".", linewidth=1.2)
    classes.set(xlabel="class, the most frequent first", ylabel="boxes", yscale="symlog", ylim=(0, None))
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    counts = next(iter(labelled.values()), {})
    said = f"{sum(part['images'] for part in summary.values()):,} images"
    if counts:
        rare = min(counts, key=counts.get)
        said += f"; of {len(counts)} classes the rarest, {rare}, has {counts[rare]:,} {_plural('box', counts[rare])}"
    style = {"fontsize": 10, "weight": "bold", "color": INK, "ha": "left", "parse_math": False}
    figure.suptitle(said if title is None else title, x=0.01, **style)
    return figure


def _plot(width: float, height: float):
    """A figure with one bare plot."""
    figure = Picture(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    return figure, _plain(figure.subplots())


def _plain(ax):
    """Only what carries information: two axes, a faint grid behind, small text."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#888888")
    ax.grid(color="#E8E8E8", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, colors="#555555", length=2)
    ax.xaxis.label.set(fontsize=8, color="#555555")
    ax.yaxis.label.set(fontsize=8, color="#555555")
    return ax


def _headline(ax, text: str) -> None:
    """The finding, over the plot."""
    text = _wrap(text, ax.figure.get_figwidth(), 10)
    ax.set_title(text, fontsize=10, weight="bold", loc="left", color=INK, parse_math=False)


def _label_ends(ax, ends) -> None:
    """Name each curve at its last point (x, y, text, colour), pushed apart where two would overlap."""
    low, high = ax.get_ylim()
    step, previous = 0.065 * (high - low), -float("inf")
    for place, value, text, color in sorted(ends, key=lambda end: end[1]):
        previous = max(value, previous + step)
        style = {"fontsize": 8, "color": color, "va": "center", "parse_math": False, "annotation_clip": False}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        ax.annotate(text, (place, previous), (6, 0), textcoords="offset points", **style)


def _known(value) -> bool:
    """Whether a log line holds this number: neither missing nor nan."""
    return value is not None and value == value
