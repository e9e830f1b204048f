"""The pictures of README.md and docs, made from recorded runs and embedded scenes: `make pictures`.

    python docs/make_pictures.py

Writes docs/pictures: method.svg (one step of Semi-DETR), training.png (AP and pseudo-boxes over
training), timeline.png (pseudo-boxes of a few scenes over training), cells.png (AP and pseudo-boxes
over training on photographs of blood cells) and hero.png. Trains nothing.
"""

import json
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from PIL import Image, ImageFilter

from semidetr_lite import gallery
from semidetr_lite.data import digits
from semidetr_lite.data.views import map_boxes, strong_view
from semidetr_lite.evaluate import box_errors
from semidetr_lite.training.presets import PRESETS
from semidetr_lite.visualize import METHOD_COLORS, STYLES, Picture, draw_boxes, png

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "notebooks" / "recorded"
PICTURES = ROOT / "docs" / "pictures"
PSEUDO_BOXES = RECORDED / "demo" / "seed0" / "semi-detr" / "pseudo_boxes.jsonl"
INK, SOFT = "#1F2328", "#57606A"


def read(file: Path) -> list[dict]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- hero.png ------------------------------------------------------------------------------------


def draw_hero() -> Picture:
    """Supervised training, Semi-DETR and the truth on the first three wide test scenes of three or
    more objects.
    """
    found = gallery.detect_scenes()
    wide = [index for index, image in enumerate(found.images) if image.shape[-1] > image.shape[-2]]
    scenes = [index for index in wide if len(found.truths[index]["boxes"]) >= 3][:3]
    return found.picture(scenes, score=0.3, title="")


# ---- training.png --------------------------------------------------------------------------------

STEPS, SUPERVISED_STEPS, BURN_IN, SWITCH = 1500, 4750, 1000, 600
ARMS = {
    "supervised": "supervised, same training time",
    "mean-teacher": "mean teacher",
    "semi-detr": "Semi-DETR",
}
DASHES = {"supervised": (0, (1.5, 1.2)), "mean-teacher": (0, (5, 1.5)), "semi-detr": "-"}
MARKERS = {"supervised": "", "mean-teacher": "s", "semi-detr": "o"}


def training_curves(lines: list[dict], arm: str, quantity: str) -> dict[int, tuple[list, list]]:
    """{seed: (steps after the burn-in, values in %)} of a row with 10 % of the labels.

    Supervised steps are scaled so that the same place on the axis is the same training time.
    """
    steps = SUPERVISED_STEPS if arm == "supervised" else STEPS
    kind = {"row": arm, "percent": 10, "detector": "dino", "preset": "digits", "steps": steps}
    curves: dict[int, tuple[list, list]] = {}
    for line in lines:
        if kind.items() <= line.items() and quantity in line:
            step = line["step"]
            if arm == "supervised":
                step = (step - BURN_IN) / (SUPERVISED_STEPS - BURN_IN) * STEPS
            if step >= 0:
                steps_of_seed, values = curves.setdefault(line["seed"], ([], []))
                steps_of_seed.append(step)
                values.append(100 * line[quantity])
    return curves


def plot_training(lines: list[dict]) -> Picture:
    """AP of the teacher and recall of its pseudo-boxes over training with 10 % of the labels.

    lines: of ablation_curves.jsonl. A thin line for each seed, a thick one for their mean.
    """
    figure = Picture(figsize=(9, 4.5), dpi=100, facecolor="white")
    panels = {
        "AP_teacher": "AP of the teacher, %",
        "pseudo_recall": "objects with a correct pseudo-box, %",
    }
    for place, (quantity, title) in enumerate(panels.items()):
        ax = figure.add_axes((0.048 + 0.5 * place, 0.13, 0.425, 0.61))
        for arm, name in ARMS.items():
            curves = training_curves(lines, arm, quantity)
            if not curves:
                continue
            color = METHOD_COLORS[arm]
            for steps, values in curves.values():
                ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.45)
            mean = np.mean([values for _, values in curves.values()], axis=0)
            look = {"color": color, "linewidth": 2.6, "linestyle": DASHES[arm]}
            ax.plot(steps, mean, marker=MARKERS[arm], markersize=5.5, label=name, **look)
        ax.axvline(SWITCH, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set(xlim=(0, STEPS + 30), xticks=range(0, STEPS + 1, 250))
        ax.set_xlabel("training step after the burn-in", fontsize=10, color=SOFT)
        ax.tick_params(labelsize=10, colors=SOFT, length=3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#8C959F")
        ax.grid(color="#EAEEF2", linewidth=0.8)
        ax.set_axisbelow(True)
    _annotate_training(figure)
    return figure


def _annotate_training(figure: Picture) -> None:
    """The finding, what the lines are, the stages and the dip."""
    left, right = figure.axes
    left.set_ylim(40, 66)
    right.set_ylim(45, 85)
    title = "With 10 % of the labels Semi-DETR leads early, and the mean teacher catches up"
    figure.text(0.012, 0.965, title, fontsize=13.5, weight="bold", color=INK, va="top")
    handles, names = left.get_legend_handles_labels()
    look = {"frameon": False, "fontsize": 10.5, "handlelength": 3.2, "columnspacing": 2.2}
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, 0.91), "ncols": 4}
    thin = Line2D([], [], color=SOFT, linewidth=0.8)
    figure.legend([*handles[::-1], thin], [*names[::-1], "thin: each seed"], **look, **place)
    for ax in (left, right):
        low, high = ax.get_ylim()
        edge = high - 0.015 * (high - low)
        stage = {"fontsize": 10, "color": SOFT, "va": "top", "linespacing": 1.15}
        ax.text(SWITCH - 14, edge, "stage 1:\none-to-many", ha="right", **stage)
        ax.text(SWITCH + 14, edge, "stage 2:\none-to-one, no NMS", **stage)
    dip = {"fontsize": 10, "color": INK, "va": "top", "linespacing": 1.15}
    dip |= {"arrowprops": {"arrowstyle": "->", "color": INK, "shrinkB": 5}}
    note = "the dip: NMS ends, but some\nduplicates of stage 1 remain"
    left.annotate(note, xy=(750, 56.4), xytext=(690, 47.6), **dip)
    right.annotate(note, xy=(750, 68.3), xytext=(690, 60.5), **dip)


# ---- cells.png -----------------------------------------------------------------------------------

CELL_ROWS = {
    "supervised, same time": "supervised",
    "mean-teacher": "",
    "semi-detr": "",
}  # or: style


def cell_curves(lines: list[dict], row: str, quantity: str) -> dict[int, tuple[list, list]]:
    """{fold: (steps after the supervised start, values)} of a row of bccd_curves.jsonl.

    A curve begins with the AP of the supervised run at its end. Steps of the continued supervised
    run are scaled so that the same place on the axis is about the same training time.
    """
    semi = (line["step"] for line in lines if line["row"] == "semi-detr")
    length, curves = max(semi, default=0), {}
    for fold in sorted({line["fold"] for line in lines if line["row"] == row}):
        of_fold = [line for line in lines if line["fold"] == fold and quantity in line]
        starts = [line for line in of_fold if line["row"] == "supervised"]
        start = max(starts, key=lambda line: line["step"], default=None)
        points = [(line["step"], line[quantity]) for line in of_fold if line["row"] == row]
        if row == "supervised, same time" and points:
            scale = length / max(step for step, _ in points)
            points = [(step * scale, value) for step, value in points]
        points = ([(0, start[quantity])] if start else []) + points
        curves[fold] = ([step for step, _ in points], [value for _, value in points])
    return curves


def plot_cells(lines: list[dict]) -> Picture:
    """AP of the teacher, and the number of its pseudo-boxes, a line for each fold."""
    figure = Picture(figsize=(9, 3.7), dpi=100, facecolor="white")
    panels = {
        "AP_teacher": ("AP of the teacher, %; supervised without NMS", 100),
        "pseudo_per_image": ("pseudo-boxes per unlabelled photograph", 1),
    }
    for place, (quantity, (title, scale)) in enumerate(panels.items()):
        ax = figure.add_axes((0.048 + 0.5 * place, 0.15, 0.425, 0.62))
        for row, style in CELL_ROWS.items():
            method = style or row
            name = "supervised, continued as long" if style else ARMS[row]
            for steps, values in cell_curves(lines, row, quantity).values():
                look = {"color": METHOD_COLORS[method], "linestyle": DASHES[method]}
                scaled = [scale * value for value in values]
                ax.plot(steps, scaled, label=name, marker="o", markersize=5, linewidth=2.2, **look)
                name = None  # one entry in the legend, however many folds
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set_xlabel("training step after the start", fontsize=10, color=SOFT)
        ax.set_xlim(left=0)
        ax.tick_params(labelsize=10, colors=SOFT, length=3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#8C959F")
        ax.grid(color="#EAEEF2", linewidth=0.8)
        ax.set_axisbelow(True)
    title = "Blood cells, 20 of 205 labelled: Semi-DETR’s lead is that of its NMS"
    figure.text(0.012, 0.965, title, fontsize=13.5, weight="bold", color=INK, va="top")
    handles, names = figure.axes[0].get_legend_handles_labels()
    look = {"frameon": False, "fontsize": 10.5, "handlelength": 3.2, "columnspacing": 2.2}
    figure.legend(
        handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(0, 0.92), ncols=3, **look
    )
    return figure


# ---- timeline.png --------------------------------------------------------------------------------

TIMELINE_SCENES, TIMELINE_SWITCH = (5, 8, 3), 200  # 0.4 of the 500 steps of the demo
PIXELS, DOTS = 4, 240  # a pixel of a scene is drawn as 4 x 4; dots per inch


def plot_timeline(scenes: list[tuple], lines: list[dict], steps: list[int]) -> Picture:
    """Pseudo-boxes of some scenes (rows) at some steps (columns).

    scenes: (image (3, S, S), truth) of one size. lines: of pseudo_boxes.jsonl.
    """
    side = scenes[0][0].shape[-1] * PIXELS
    gap, top, below, margin, bottom = 16, 134, 56, 20, 64  # as all sizes here: in dots
    width = 2 * margin + len(steps) * (side + gap) - gap
    height = top + len(scenes) * (side + below) + bottom
    figure = Picture(figsize=(width / DOTS, height / DOTS), dpi=DOTS, facecolor="white")

    def write(x: float, y: float, words: str, size: float = 8.5, **look) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size, va="center", **look)

    title = "Pseudo-boxes over training: clear digits keep theirs, doubtful ones come and go"
    write(margin, 40, title, 10.5, weight="bold", color=INK)
    for column, step in enumerate(steps):
        left = margin + column * (side + gap)
        stage = "1" if step <= TIMELINE_SWITCH else "2"
        write(left, 102, f"step {step}, stage {stage}", weight="bold", color=INK)
        for row, (image, truth) in enumerate(scenes):
            end = top + row * (side + below) + side
            spot = (left / width, 1 - end / height, side / width, side / height)
            line = line_of(lines, step, truth["image_id"])
            words = draw_pseudo_boxes(figure.add_axes(spot), image, truth, line)
            write(left, end + 24, words, color=SOFT)
    looks = {"truth": "truth", "kept": "kept: score at least 0.4", "mined": "mined only: low cost"}
    handles = [_legend_patch(style, words) for style, words in looks.items()]
    look = {"fontsize": 8.5, "frameon": False, "handlelength": 2.2, "borderaxespad": 0, "ncols": 3}
    spot = (margin / width, 14 / height)
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=spot, borderpad=0, **look)
    return figure


def line_of(lines: list[dict], step: int, image_id: int) -> dict:
    """The line of pseudo_boxes.jsonl for an image at a step."""
    return next(line for line in lines if (line["step"], line["image_id"]) == (step, image_id))


def draw_pseudo_boxes(ax, image, truth: dict, line: dict) -> str:
    """Draw truth, kept and mined boxes on a scene; returns the counts in words."""
    kept, mined = drawn_boxes(line)
    styles = ["kept"] * len(kept["labels"]) + ["mined"] * len(mined["labels"])
    both = {key: torch.cat([kept[key], mined[key]]) for key in ("boxes", "labels")}
    draw_boxes(ax, image, both, truth, digits.CATEGORIES, styles)
    ranked = {**kept, "scores": torch.ones(len(kept["labels"]))}
    right = len(box_errors(ranked, truth, iou=0.5)["hits"])
    said = f"{len(kept['labels'])} kept, {right} right" if styles.count("kept") else "0 kept"
    return said + (f", {len(mined['labels'])} mined" if styles.count("mined") else "")


def drawn_boxes(line: dict) -> tuple[dict, dict]:
    """The kept boxes of a line of pseudo_boxes.jsonl, and those that are mined only, as targets."""
    kept = torch.tensor(line["kept"], dtype=torch.bool)
    mined = torch.tensor(line["mined"], dtype=torch.bool) & ~kept
    boxes, labels = torch.tensor(line["boxes"]), torch.tensor(line["labels"])
    return tuple({"boxes": boxes[which], "labels": labels[which]} for which in (kept, mined))


def _legend_patch(style: str, words: str) -> Patch:
    """A box of the legend, drawn as on the scenes."""
    color, width, dashes, _ = STYLES[style]
    outline = [withStroke(linewidth=width + 1.4, foreground="black")] if style == "truth" else []
    look = {"edgecolor": color or "#0072B2", "linewidth": width, "linestyle": dashes}
    return Patch(label=words, fill=False, path_effects=outline, **look)


# ---- method.svg ----------------------------------------------------------------------------------

METHOD_SCENE, METHOD_STEP, STRONG_SEED, LABELLED_SCENE = 8, 300, 25, 431
THUMB = 104  # side of a scene in the drawing, whose width is 900
TEACHER, STUDENT, TEACHER_TINT, STUDENT_TINT = "#0072B2", "#C04F00", "#E3F1FA", "#FDEBDD"
BOX, PANEL, LINE = "#F0E442", "#F6F8FA", "#8C959F"  # of pseudo-boxes; of panels and their border
FONT = "Arial, Helvetica, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def write(x: float, y: float, words: str, size=13.5, anchor="start", color=INK, bold=False) -> str:
    """One line of text."""
    weight = ' font-weight="bold"' if bold else ""
    where = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {where}{weight}>{escape(words)}</text>"


def paragraph(x: float, y: float, width: float, words: str, size=13.5, **look) -> str:
    """Text broken into lines that fit the width in DejaVu Sans, the widest of the fonts in FONT."""
    font, lines = FontProperties(size=size), [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_to_path.get_text_width_height_descent(longer, font, ismath=False)[0] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    rows = (write(x, y + 17 * row, line, size, **look) for row, line in enumerate(lines) if line)
    return "".join(rows)


def badge(x: float, y: float, number: int) -> str:
    """The number of a step in a disc."""
    disc = f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="{INK}"/>'
    return disc + write(x, y + 5, str(number), 14, "middle", "#FFFFFF", bold=True)


def rectangle(x, y, width, height, fill="none", edge=LINE, line=1.2, radius=8, dashes="") -> str:
    """A rectangle, by default with round corners."""
    where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<rect {where} fill="{fill}" stroke="{edge}" stroke-width="{line:g}"{dashed}/>'


def path(points: str, color=INK, line=1.6, arrow=True, dashes="", fill="none") -> str:
    """A line along SVG path commands, with an arrowhead at its end."""
    end = ' marker-end="url(#head)"' if arrow else ""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    look = f'fill="{fill}" stroke="{color}" stroke-width="{line:g}"'
    return f'<path d="{points}" {look}{dashed}{end}/>'


def dot(x: float, y: float, color=STUDENT, radius=5.0, fill=None) -> str:
    """A query."""
    look = f'fill="{fill or color}" stroke="{color}" stroke-width="1.5"'
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" {look}/>'


def outlined(x, y, width, height, style: str) -> str:
    """A box on a scene: solid is confident, dashed unsure, white a label."""
    color, dashes = ("#FFFFFF", "") if style == "label" else (BOX, "")
    if style == "unsure":
        dashes = "4 2.5"
    under = rectangle(x, y, width, height, edge="#000000", line=4, radius=0)
    return under + rectangle(x, y, width, height, edge=color, line=2.2, radius=0, dashes=dashes)


def swatch(x: float, y: float, style: str) -> str:
    """A box of a style on a dark ground, for the words beside."""
    return rectangle(x, y, 30, 20, fill="#4A4F57", edge="none", radius=3) + outlined(
        x + 6, y + 5, 18, 10, style
    )


def as_paths(image: torch.Tensor, colors: int = 40) -> str:
    """A scene (3, H, W) as vector pixels, one unit each: a path for each of a few colours.

    Not an embedded PNG, which some browsers do not show in a picture that itself is a file.
    """
    pixels = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    few = picture.filter(ImageFilter.GaussianBlur(0.5)).quantize(colors, kmeans=2)
    palette, indices = few.getpalette(), np.asarray(few)
    runs: dict[int, list[str]] = {}
    for y, row in enumerate(indices):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for start, end in zip(edges, edges[1:]):
            runs.setdefault(int(row[start]), []).append(f"M{start} {y}h{end - start}v1H{start}z")
    paths = []
    for index, marks in runs.items():
        color = "#{:02x}{:02x}{:02x}".format(*palette[3 * index : 3 * index + 3])
        paths.append(f'<path fill="{color}" d="{"".join(marks)}"/>')
    return "".join(paths)


def thumb(x: float, y: float, name: str, boxes=(), styles=()) -> str:
    """The scene `name` of the drawing's definitions, with boxes in pixels of the scene on it."""
    scale = THUMB / 96
    drawn = f'<use href="#{name}" transform="translate({x:g} {y:g}) scale({scale:.5f})"/>'
    for (x1, y1, x2, y2), style in zip(boxes, styles):
        place = (x + scale * x1, y + scale * y1, scale * (x2 - x1), scale * (y2 - y1))
        drawn += outlined(*(round(value, 1) for value in place), style)
    return drawn + rectangle(x, y, THUMB, THUMB, edge=INK, line=1, radius=0)


def draw_method() -> str:
    """method.svg: one step of Semi-DETR, in the order of the paper's section 3."""
    image, _ = digits.scene(METHOD_SCENE)
    labelled, truth = digits.scene(LABELLED_SCENE)
    line = line_of(read(PSEUDO_BOXES), METHOD_STEP, METHOD_SCENE)
    kept, mined = drawn_boxes(line)
    boxes = torch.cat([kept["boxes"], mined["boxes"]])
    styles = ["confident"] * len(kept["boxes"]) + ["unsure"] * len(mined["boxes"])
    views = replace(PRESETS["digits"].views, flip=False)
    random = np.random.default_rng(STRONG_SEED)
    strong, target = strong_view(image, {"size": (96, 96)}, random, views)
    mapped, _ = map_boxes(boxes, target["matrix"], target["size"])
    scenes = {"weak": image, "strong": strong, "labelled": labelled}
    symbols = "".join(
        f'<g id="{name}" shape-rendering="crispEdges">{as_paths(scene)}</g>'
        for name, scene in scenes.items()
    )
    head = '<marker id="head" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" '
    head += 'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="'
    head += f'{INK}"/></marker>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {HEIGHT}" width="900" '
        f'height="{HEIGHT}" font-family="{FONT}" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(METHOD_WORDS)}</title><defs>{head}{symbols}</defs>',
        rectangle(1, 1, 898, HEIGHT - 2, fill="#FFFFFF", edge="#D0D7DE", line=1.5, radius=12),
        draw_networks((boxes, mapped), styles, truth["boxes"]),
        draw_costs(16, 188),
        draw_mining(214, 196),
        draw_matching(420, 220),
        draw_consistency(650, 234),
        path(f"M312 {BOTTOM}V{BOTTOM + 24}H767V{BOTTOM + 4}", dashes="5 3"),
        write(540, BOTTOM + 19, "mined boxes", anchor="middle"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


METHOD_WORDS = (
    "One step of Semi-DETR: the teacher draws pseudo-boxes on a weak view, they are mapped to the "
    "strong view, the student learns from confident ones and labels by stage-wise hybrid matching; "
    "cost-based mining finds further boxes, and both networks' queries are made consistent."
)
TOP, BOTTOM, HEIGHT = 506, 766, 806  # of the four panels below; of the drawing


def draw_networks(pseudo: tuple, styles: list[str], truth: torch.Tensor) -> str:
    """Views, teacher and student, and what the student learns from: steps 1 and 2."""
    a, b, c = 40, 200, 360  # the tops of the three rows
    weak_boxes, strong_boxes = (boxes.tolist() for boxes in pseudo)
    middle = (a + b) / 2
    left, right = 424 - 82, 424 + 82  # the networks
    parts = [
        thumb(24, middle, "weak"),
        write(76, middle + THUMB + 19, "unlabelled", anchor="middle"),
        write(76, middle + THUMB + 35, "image", anchor="middle"),
        path(f"M128 {middle + 30}L176 {a + 62}"),
        path(f"M128 {middle + 74}L176 {b + 42}"),
    ]
    rows = (
        ("weak view", a, "weak"),
        ("strong view", b, "strong"),
        ("labelled image", c, "labelled"),
    )
    for words, y, name in rows:
        parts += [thumb(182, y, name), write(234, y - 8, words, anchor="middle")]
        parts.append(path(f"M288 {y + 52}H{left - 3}"))
    parts += [
        rectangle(left, a, 164, THUMB, fill=TEACHER_TINT, edge=TEACHER, line=2),
        write(424, a + 48, "Teacher", 20, "middle", TEACHER, bold=True),
        write(424, a + 72, "no gradient", anchor="middle"),
        rectangle(left, b, 164, c + THUMB - b, fill=STUDENT_TINT, edge=STUDENT, line=2),
        badge(424, b + 62, 2),
        write(424, b + 102, "Student", 20, "middle", STUDENT, bold=True),
        write(424, b + 128, "one pass over all", anchor="middle"),
        write(424, b + 145, "images; learns from", anchor="middle"),
        write(424, b + 162, "the losses of 5 and 6", anchor="middle"),
        path(f"M424 {b}V{a + THUMB + 5}", color=INK, line=2.4),
        write(411, 167, "EMA: slow average", anchor="end"),
        write(411, 184, "of the student", anchor="end"),
        path(f"M{right} {a + 52}H553"),
        thumb(560, a, "weak", weak_boxes, styles),
        path(f"M612 {a + THUMB}V{b - 5}"),
        write(622, 167, "mapped into"),
        write(622, 184, "the strong view"),
        thumb(560, b, "strong", strong_boxes, styles),
        thumb(560, c, "labelled", truth.tolist(), ["label"] * len(truth)),
        badge(693, a + 12, 1),
        write(711, a + 17, "Pseudo-boxes", 16, bold=True),
        write(884, a + 17, "(3.1)", anchor="end", color=SOFT),
        swatch(682, a + 32, "confident"),
        paragraph(720, a + 40, 165, "confident: score at least the threshold"),
        swatch(682, a + 70, "unsure"),
        paragraph(720, a + 84, 165, "unsure: step 4 decides"),
        paragraph(682, b + 40, 200, "The same boxes on the view that the student sees"),
        swatch(682, c + 30, "label"),
        paragraph(720, c + 38, 165, "labels, drawn by people on a few images"),
    ]
    # The predictions of the student and these boxes go to the panels below.
    parts += [
        path(f"M424 {c + THUMB}V{TOP - 5}"),
        write(416, TOP - 17, "predictions of all queries", anchor="end"),
        path(f"M612 {c + THUMB}V{TOP - 5}"),
        write(622, TOP - 17, "pseudo-boxes and labels"),
    ]
    return "\n".join(parts)


def panel(x: float, width: float, number: int, title: str, section: str, name: str) -> str:
    """An empty panel of the lower row with its head."""
    head = rectangle(x, TOP, width, BOTTOM - TOP, fill=PANEL)
    head += badge(x + 19, TOP + 20, number) + write(x + 37, TOP + 26, title, 16, bold=True)
    if section:
        head += write(x + width - 12, TOP + 25, section, anchor="end", color=SOFT)
    return head + paragraph(x + 12, TOP + 52, width - 20, name, color=SOFT)


def draw_costs(x: float, width: float) -> str:
    """Step 3: pseudo-boxes, their matched queries and what each pair costs."""
    parts = [panel(x, width, 3, "Costs", "", "Does the student agree?")]
    for row, (style, cost) in enumerate(
        (("confident", "−2.2"), ("unsure", "−2.0"), ("unsure", "4.6"))
    ):
        y = TOP + 88 + 30 * row
        parts += [
            swatch(x + 14, y - 10, style),
            path(f"M{x + 46} {y}H{x + 92}", arrow=False, dashes="" if row < 2 else "2 3"),
            dot(x + 98, y),
            write(x + 168, y + 5, cost, 15, "end", bold=True),
        ]
    parts.append(write(x + 14, TOP + 184, "box, query, cost", color=SOFT))
    words = "A low matching cost: a query predicts this class at this place."
    return "\n".join([*parts, paragraph(x + 12, TOP + 208, width - 20, words)])


def draw_mining(x: float, width: float) -> str:
    """Step 4: two Gaussians over the costs and the threshold."""
    parts = [panel(x, width, 4, "CPM", "(3.4)", "cost-based pseudo-label mining")]
    base, left = TOP + 168, x + 16
    grid = np.linspace(0, width - 32, 60)
    low = 64 * np.exp(-(((grid - 46) / 22) ** 2) / 2)
    high = 40 * np.exp(-(((grid - 116) / 28) ** 2) / 2)
    cut = 46.0
    area = [f"{left + g:.1f} {base - value:.1f}" for g, value in zip(grid, low) if g <= cut]
    last = f"{left + cut:.1f}"
    shape = f"M{left} {base}L" + "L".join(area) + f"L{last} {base - 64}V{base}Z"
    parts.append(path(shape, color="none", arrow=False, fill=BOX))
    for curve, color in ((low, TEACHER), (high, STUDENT)):
        points = "L".join(f"{left + g:.1f} {base - value:.1f}" for g, value in zip(grid, curve))
        parts.append(path(f"M{points}", color=color, line=2.2, arrow=False))
    parts += [
        path(f"M{left} {base}H{x + width - 12}"),
        path(f"M{last} {base + 6}V{base - 78}", line=2, dashes="4 3", arrow=False),
        write(left + 58, base - 68, "threshold"),
        write(x + width - 14, base + 17, "cost", anchor="end", color=SOFT),
        write(left, base + 17, "mined", color=INK, bold=True),
    ]
    words = "Two Gaussians over all costs. Unsure boxes that cost little are mined."
    return "\n".join([*parts, paragraph(x + 12, TOP + 208, width - 20, words)])


def draw_matching(x: float, width: float) -> str:
    """Step 5: one-to-many, then one-to-one."""
    parts = [panel(x, width, 5, "SHM", "(3.2)", "stage-wise hybrid matching")]
    for stage, (words, matched) in enumerate((("one-to-many", (0, 1, 2)), ("one-to-one", (1,)))):
        middle = x + width * (0.27 + 0.47 * stage)
        parts += [
            write(middle, TOP + 82, f"stage {stage + 1}", anchor="middle", bold=True),
            write(middle, TOP + 99, words, anchor="middle"),
            swatch(middle - 15, TOP + 108, "confident"),
        ]
        for place in range(4):
            spot, y = middle + 24 * (place - 1.5), TOP + 164
            if place in matched:
                parts.append(path(f"M{middle} {TOP + 130}L{spot} {y - 6}", line=2, arrow=False))
            parts.append(dot(spot, y, fill=STUDENT if place in matched else "#FFFFFF"))
    parts.append(write(x + 12, TOP + 189, "filled: matched queries", color=SOFT))
    words = "Detection losses, from labels and confident boxes only. Stage 1 needs NMS."
    return "\n".join([*parts, paragraph(x + 12, TOP + 212, width - 20, words)])


def draw_consistency(x: float, width: float) -> str:
    """Step 6: one query made of the teacher's features, decoded by both networks."""
    parts = [panel(x, width, 6, "CQC", "(3.3)", "cross-view query consistency")]
    top, bottom, middle = TOP + 72, TOP + 128, TOP + 113
    crop = f'x="{x + 12}" y="{middle - 20}" width="40" height="40" viewBox="66 50 29 29"'
    parts += [
        f'<svg {crop}><use href="#weak"/></svg>',
        outlined(x + 12, middle - 20, 40, 40, "confident"),
        path(f"M{x + 55} {middle}H{x + 66}", arrow=False),
        dot(x + 74, middle, "#7B5FC7", 7),
        write(x + 74, middle - 30, "query", anchor="middle"),
    ]
    names = (("Teacher", TEACHER, TEACHER_TINT, top), ("Student", STUDENT, STUDENT_TINT, bottom))
    for name, color, tint, y in names:
        parts += [
            path(f"M{x + 82} {middle + (y + 15 - middle) * 0.2:g}L{x + 98} {y + 15}"),
            rectangle(x + 101, y, 70, 30, fill=tint, edge=color, line=1.8, radius=6),
            write(x + 136, y + 20, name, 13.5, "middle", color, bold=True),
            path(f"M{x + 171} {y + 15}H{x + 186}"),
        ]
        for cell, shade in enumerate((0.9, 0.3, 0.6)):
            opacity = f' opacity="{shade}"'
            square = rectangle(x + 190 + 11 * cell, y + 9, 11, 12, color, color, 1, 0)
            parts.append(square.replace("/>", f"{opacity}/>"))
    both = f"M{x + 206.5} {top + 25}V{bottom + 5}"
    arrow = path(both, line=2).replace("<path", '<path marker-start="url(#head)"')
    parts += [arrow, write(x + 194, middle + 5, "alike", anchor="end", bold=True)]
    parts.append(write(x + 12, TOP + 184, "confident and mined boxes", color=SOFT))
    words = "A query made of the teacher’s features of a box goes into both decoders."
    return "\n".join([*parts, paragraph(x + 12, TOP + 208, width - 20, words)])


def main() -> None:
    """Draw every picture."""
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "hero.png").write_bytes(png(draw_hero(), dpi=gallery.PNG_DPI))
    (PICTURES / "method.svg").write_text(draw_method(), encoding="utf-8")
    curves = read(RECORDED / "ablation_curves.jsonl")
    (PICTURES / "training.png").write_bytes(png(plot_training(curves), dpi=200))
    cells = read(RECORDED / "bccd_curves.jsonl")
    (PICTURES / "cells.png").write_bytes(png(plot_cells(cells), dpi=200))
    scenes = [digits.scene(index) for index in TIMELINE_SCENES]
    timeline = plot_timeline(scenes, read(PSEUDO_BOXES), [100, 200, 300, 400, 500])
    (PICTURES / "timeline.png").write_bytes(png(timeline))


if __name__ == "__main__":
    main()
