"""Sliders on pure functions: change a value, see the picture of it.

    explore(draw, alpha=(0.0, 2.0), candidates=(1, 13))

shows a control for each argument of `draw`, a function that returns a figure, and draws again on
every change. A saved notebook keeps the first picture, for readers without a kernel. The explorers
below compute what is slow (a detector's outputs) once and give `explore` a function that only
matches, filters and draws; a new explorer is such a function.
"""

import base64
import dataclasses
import inspect
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ipywidgets
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from semidetr_lite.boxes import overlaps, to_pixels
from semidetr_lite.contracts import Target
from semidetr_lite.data.views import ViewSettings, map_boxes, strong_view, weak_view
from semidetr_lite.detectors import deformable
from semidetr_lite.detectors.denoising import Denoising, group_mask
from semidetr_lite.errors import UserError
from semidetr_lite.files import read_jsonl
from semidetr_lite.matching import hungarian, matching_cost, one_to_many, pad_targets
from semidetr_lite.teach.exercises import em_steps as fit_em_steps
from semidetr_lite.training.ablate import ROWS, STEP_RATIO, TABLES
from semidetr_lite.training.checkpoint import read_config
from semidetr_lite.training.measure import iter_readable
from semidetr_lite.training.presets import PRESETS, load_splits
from semidetr_lite.visualize import (
    FRACTIONS,
    GREY,
    LEGEND_OUTSIDE,
    LINE_COLORS,
    WIDTH,
    Picture,
    draw_boxes,
    image_grid,
    new_plot,
    plot_attention_mask,
    plot_cost_mixture,
    plot_costs,
    plot_matching,
    png_bundle,
    set_title,
    show_hits,
    show_pseudo_boxes,
    show_targets,
    show_views,
)

CONTROL_WIDTH, LABEL_WIDTH = "330px", "90px"


class Explorer(ipywidgets.VBox):
    """Controls over pictures, redrawn in place.

    `controls` is {name: widget}; `picture` is an HTML widget with the figures of `draw` at the
    present values.
    """

    def __init__(self, draw: Callable, controls: dict[str, ipywidgets.Widget]):
        self.draw = draw
        self.controls = controls
        self.picture = ipywidgets.HTML()
        for control in controls.values():
            control.observe(lambda change: self.redraw(), "value")
        row = ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([row, self.picture])
        self.redraw()

    def figures(self) -> list:
        """The figures that `draw` returns now, one or several."""
        values = {name: control.value for name, control in self.controls.items()}
        figures = self.draw(**values)
        return list(figures) if isinstance(figures, tuple) else [figures]

    def redraw(self) -> None:
        """Draw at the controls' values, without the slow packing of saved pictures."""
        self.picture.value = "<br>".join(map(_quick_tag, self.figures()))

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """The widget, and for where there can be none its first picture as a PNG file."""
        picture, metadata = png_bundle(self.figures())
        return picture | super()._repr_mimebundle_(**kwargs), metadata

    def __repr__(self) -> str:
        return f"explore({', '.join(self.controls)})"


def explore(draw: Callable, **controls) -> Explorer:
    """A picture and a control for each argument of `draw` named here.

    Args:
        draw: returns a Picture, or a tuple of them.
        controls: what ipywidgets.interactive takes: (low, high) or (low, high, step) for a slider,
            of whole numbers if these are; a list, or a dict {label: value}, for a choice; True or
            False for a tick box; or a widget. A slider or choice begins at `draw`'s default,
            without one at its lowest or first value.

    Raises:
        UserError: a control that is none of these.
    """
    parameters = inspect.signature(draw).parameters
    return Explorer(
        draw,
        {
            name: make_control(name, spec, parameters[name].default)
            for name, spec in controls.items()
        },
    )


def make_control(name: str, spec, default=inspect.Parameter.empty) -> ipywidgets.Widget:
    """The widget of one control of `explore`; raises what it raises."""
    if isinstance(spec, ipywidgets.Widget):
        return spec
    if default is inspect.Parameter.empty and isinstance(spec, tuple) and spec:
        default = spec[0]
    try:
        control = ipywidgets.interactive.widget_from_abbrev(spec, default)
    except ValueError:  # such as a low end above the high one
        control = None
    if control is None:
        shapes = "(low, high) or (low, high, step), a list, a dict or a bool"
        raise UserError(f"{name!r}: give {shapes}, not {spec!r}")
    control.description = name.replace("_", " ")
    control.layout.width = CONTROL_WIDTH
    control.style.description_width = LABEL_WIDTH
    return control


def _quick_tag(figure: Picture) -> str:
    """A figure as an image tag in a fifth of the time of `png`, for a kernel nearby."""
    canvas, packed = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(packed, "PNG", compress_level=1)
    code = base64.b64encode(packed.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{code}" alt="{escape(figure.get_suptitle())}">'


# ---- the explorers: one short function each ------------------------------------------------------


@torch.no_grad()
def explore_matching(detector, scenes: Sequence[tuple], categories=None) -> Explorer:
    """Which query is matched with which object, under any weights of the cost.

    `scenes` are pairs (image, target), of which the detector's outputs are computed once.
    """
    outputs = [detector([image]) for image, _ in scenes]

    def draw(
        scene,
        matching,
        candidates=4,
        alpha=1.0,
        beta=6.0,
        class_weight=2.0,
        l1_weight=5.0,
        giou_weight=2.0,
    ):
        image, target = scenes[scene]
        logits, boxes = outputs[scene]["pred_logits"][0], outputs[scene]["pred_boxes"][0]
        cost = matching_cost(logits, boxes, target, "focal", class_weight, l1_weight, giou_weight)
        quality: torch.Tensor | None = None
        if matching == "one-to-one":
            queries, targets = (torch.from_numpy(part) for part in hungarian(cost.numpy()))
        else:
            queries, targets, quality = one_to_many(logits, boxes, target, alpha, beta, candidates)
        pixels = to_pixels(boxes, target["size"])
        pairs = plot_matching(
            image, target, pixels, queries, targets, quality, categories=categories
        )
        return pairs, plot_costs(
            cost, queries, targets, title="The cost of every query for every object"
        )

    many = {"candidates": (1, 13), "alpha": (0.0, 3.0, 0.25), "beta": (0.0, 10.0, 0.5)}
    costs = dict.fromkeys(("class_weight", "l1_weight", "giou_weight"), (0.0, 10.0, 0.5))
    return explore(
        draw, scene=(0, len(scenes) - 1), matching=["one-to-many", "one-to-one"], **many, **costs
    )


def explore_views(scenes: Sequence[tuple], settings: ViewSettings) -> Explorer:
    """The weak and the strong view of a scene, its boxes mapped by the two matrices.

    `settings` are those of strength 1; at 0 only mirror and colour are left.
    """
    names = ("shift", "strong_shift", "strong_rotation", "strong_shear", "patch_side")

    def draw(scene, strength=1.0, seed=0):
        scaled = {name: strength * getattr(settings, name) for name in names}
        zoom = tuple(edge**strength for edge in settings.strong_zoom or settings.zoom)
        stronger = dataclasses.replace(settings, strong_zoom=zoom, **scaled)
        image, target = scenes[scene]
        generators = [np.random.default_rng([seed, stream]) for stream in (0, 1)]
        weak_image, weak = weak_view(image, target, generators[0], settings)
        strong_image, strong = strong_view(image, target, generators[1], stronger)
        journey = strong["matrix"] @ torch.linalg.inv(weak["matrix"])
        return show_views(
            weak_image,
            strong_image,
            weak["boxes"],
            *map_boxes(weak["boxes"], journey, strong["size"]),
        )

    return explore(draw, scene=(0, len(scenes) - 1), strength=(0.0, 3.0, 0.25), seed=(0, 30))


def _show_above(
    score_threshold: float,
    detections: list[Target],
    scenes: Sequence[tuple],
    categories: list[dict],
    truth: bool,
    style: str,
) -> Picture:
    """The detections in scenes that score at least the threshold, against the truth or alone."""
    images, truths = zip(*scenes)
    if truth:
        return show_hits(images, detections, truths, categories, score_threshold)
    targets = []
    for detection in detections:
        keep = detection["scores"] >= score_threshold
        targets.append({key: detection[key][keep] for key in ("boxes", "labels", "scores")})
    return show_targets(images, targets, categories, style=style)


def explore_threshold(detector, scenes: Sequence[tuple], categories, nms: float = 0.6) -> Explorer:
    """Which of a teacher's boxes a score threshold keeps, alone or against the truth.

    The student sees the boxes alone; it never sees the truth.
    """
    detections = detector.detect([image for image, _ in scenes], nms=nms)

    def draw(score_threshold=0.4, truth=True):
        return _show_above(score_threshold, detections, scenes, categories, truth, "pseudo")

    return explore(draw, score_threshold=(0.05, 0.95, 0.05), truth=True)


def plot_lines(lines: dict[str, tuple], x: str, y: str, title: str = "") -> Picture:
    """Curves {name: (xs, ys)}, each with its own colour and dashes."""
    figure, ax = new_plot(WIDTH, 3.5)
    for (name, (xs, ys)), color, dashes in zip(
        lines.items(), LINE_COLORS * 4, ("-", "--", "-.", ":") * 7
    ):
        ax.plot(
            xs,
            ys,
            color=color,
            linestyle=dashes,
            linewidth=1.8,
            label=name if len(xs) else None,
        )
    ax.set(xlabel=x, ylabel=y, ylim=(0, None))
    ax.legend(**LEGEND_OUTSIDE)
    return set_title(figure, title)


def explore_momentum(steps: int = 120) -> Explorer:
    """The weight of each past student in an EMA teacher, and how it follows a noisy student."""
    time = np.arange(steps + 1)
    student = 1 - np.exp(-time / 25) + np.random.default_rng(0).normal(0, 0.08, steps + 1)

    def draw(momentum=0.9, ramp=False):
        keep = np.minimum(momentum, 1 - 1 / (time + 1)) if ramp else np.full(steps + 1, momentum)
        parts, teacher = (
            np.eye(1, steps + 1)[0],
            [student[0]],
        )  # the weight of each step's student; the start is step 0
        for step in time[1:]:
            parts = keep[step] * parts
            parts[step] += 1 - keep[step]
            teacher.append(parts @ student)
        figure, (left, right) = new_plot(WIDTH, 2.9, 2)
        left.bar(steps - time, parts, width=1.0, color=LINE_COLORS[0])
        left.set(xlabel="age of the student, steps", ylabel="its weight in the teacher")
        right.plot(time, student, ".", color=LINE_COLORS[1], markersize=4, label="student")
        right.plot(time, teacher, color=LINE_COLORS[0], linewidth=2, label="teacher")
        right.set(xlabel="step", ylabel="one weight", ylim=(-0.25, 1.25))
        right.legend(fontsize=8, frameon=False, loc="lower right")
        half = 1 + int(parts[::-1].cumsum().searchsorted(0.5 - 1e-9))
        plural = "s" if half > 1 else ""
        finding = f"half of the teacher is younger than {half} step{plural}"
        finding += f", {100 * parts[0]:.0f} % is the start"
        return set_title(figure, f"Momentum {momentum:g}: {finding}")

    values = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0]
    slider = ipywidgets.SelectionSlider(
        options=values,
        value=0.9,
        description="momentum",
        layout={"width": CONTROL_WIDTH},
        style={"description_width": LABEL_WIDTH},
    )
    return explore(draw, momentum=slider, ramp=False)


@torch.no_grad()
def show_dense(images, detector, truths=None, title="") -> Picture:
    """The highest class score of FCOS around each cell, on any level; brighter is higher.

    A cell predicts for the point `index * stride`, as in torchvision, not for the middle of a tile.
    """
    figure, axes = image_grid(images, 3, title=title)
    fine = detector.strides[0]
    for ax, image, truth in zip(axes, images, truths or [None] * len(images)):
        cells = detector.head_outputs(detector.extract([image]))
        scores, best = (
            cells.outputs["cls_logits"][0].sigmoid().amax(-1).split(cells.cells_per_level),
            torch.zeros(1),
        )
        for level, stride in zip(scores, detector.strides):
            height, width = (-(-side // stride) for side in image.shape[-2:])
            near = [
                (torch.arange(-(-side // fine) + 1) * fine / stride).round().long()
                for side in image.shape[-2:]
            ]
            rows, columns = near[0].clamp(max=height - 1), near[1].clamp(max=width - 1)
            best = torch.maximum(best, level.view(height, width)[rows][:, columns])
        draw_boxes(ax, image, None, truth)
        edges = (
            -fine / 2,
            best.shape[1] * fine - fine / 2,
            best.shape[0] * fine - fine / 2,
            -fine / 2,
        )
        ax.imshow(best.numpy(), cmap="cividis", vmin=0, vmax=1, alpha=0.75, extent=edges)
        ax.set(xlim=(0, image.shape[-1]), ylim=(image.shape[-2], 0))
    return figure


@torch.no_grad()
def cross_attention(detector, image) -> tuple[torch.Tensor, dict]:
    """Where each query of a DETR attends, and the outputs for the image.

    The maps are (layers, Q, H, W), the mean over the heads.
    """
    memory = detector.encode([image])
    keys = memory.tokens + memory.positions
    positions = detector.positions.weight[None]
    content = torch.zeros_like(positions)
    maps = []
    for layer in detector.decoder:
        queries = layer.self_attention(content, positions) + positions
        maps.append(layer.attention(queries, keys, memory.tokens)[1][0])  # (Q, S)
        content = layer(content, positions, memory)
    return torch.stack(maps).unflatten(-1, memory.shapes[0]), detector.decode(memory)


def show_heat(images, maps, targets=None, titles=None, title="", columns=3) -> Picture:
    """Maps (H, W) over images, each with its own scale, brighter is higher; and boxes over them."""
    figure, axes = image_grid(images, columns, titles, title)
    for ax, image, values, target in zip(axes, images, maps, targets or [None] * len(images)):
        draw_boxes(ax, image, target, categories=target and [{"name": ""}] * 99)
        values, edges = (values / values.max()).numpy(), (0, image.shape[-1], image.shape[-2], 0)
        ax.imshow(values, cmap="cividis", alpha=np.minimum(1.2 * values + 0.2, 0.85), extent=edges)
        ax.set(xlim=edges[:2], ylim=edges[2:])
    return figure


def explore_attention(detector, scenes: Sequence[tuple]) -> Explorer:
    """Where one query of a DETR reads in each layer of the decoder, and the box it then gives."""
    attention = [cross_attention(detector, image) for image, _ in scenes]

    def draw(scene, query, layer):
        (image, target), (maps, outputs) = scenes[scene], attention[scene]
        box = {
            "boxes": to_pixels(outputs["pred_boxes"][0, query], target["size"])[None],
            "labels": torch.tensor([0]),
        }
        return show_heat(
            [image],
            [maps[layer - 1, query]],
            [box],
            title=f"Where query {query} reads in layer {layer}",
        )

    return explore(
        draw,
        scene=(0, len(scenes) - 1),
        query=(0, detector.num_queries - 1),
        layer=(1, len(attention[0][0])),
    )


def plot_places(boxes: torch.Tensor, title: str = "") -> Picture:
    """Where each query puts its box: the centres in a small map per query.

    `boxes` are (N images, Q, 4) cxcywh in [0, 1].
    """
    names = [f"query {query}" for query in range(boxes.shape[1])]
    figure, axes = image_grid([torch.ones(3, 100, 100)] * len(names), 4, names, title)
    for query, ax in enumerate(axes):
        draw_boxes(ax, torch.full((3, 100, 100), 0.93))
        x, y = (100 * boxes[:, query, :2]).T
        # hard edges make the file smaller
        ax.scatter(x, y, s=5, color=LINE_COLORS[0], antialiased=False, linewidths=0)
    return figure


def plot_histograms(
    values: dict[str, torch.Tensor], x: str, y: str, title: str = "", bins: int = 25
) -> Picture:
    """Histograms {name: (N,)} in one plot, each with its own colour, hatch and mean (a line)."""
    figure, ax = new_plot(WIDTH, 3.3)
    together = torch.cat([numbers.flatten() for numbers in values.values()])
    edges = np.linspace(float(together.min()), float(together.max()), bins + 1)
    hatches = ("", "///", "...", "xxx")
    for (name, numbers), color, hatch in zip(values.items(), LINE_COLORS, hatches):
        ax.hist(
            numbers.flatten().numpy(),
            edges,
            histtype="stepfilled",
            linewidth=1.5,
            facecolor=color + "55",
            edgecolor=color,
            hatch=hatch,
            label=f"{name}: {numbers.mean():.2f}",
        )
        ax.axvline(float(numbers.mean()), color=color, linewidth=2)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(title="mean (the line)", title_fontsize=8, **LEGEND_OUTSIDE)
    return set_title(figure, title)


def explore_consistency(answers: Sequence[dict]) -> Explorer:
    """How similar the strong view's objects are to an object of the weak view.

    The white box is where that object is, the thick one belongs to the most similar query.

    Args:
        answers: one dict per scene: "images" (weak, strong); "boxes" and "places" (T, 4), the
            objects in the two views; "pairings" {way to pair queries: (boxes (T, 4) in the strong
            view, cosines (L, T, T) of weak and strong objects at each decoder layer)}.
    """
    last = max(len(answer["boxes"]) for answer in answers) - 1
    layers = len(next(iter(answers[0]["pairings"].values()))[1])

    def draw(scene, object=0, layer=layers):
        answer = answers[scene]
        weak, strong = answer["images"]
        boxes, places, pairings = (answer[key] for key in ("boxes", "places", "pairings"))
        index = min(object, len(boxes) - 1)
        labels = torch.arange(len(boxes))
        captions = [f"object {index} in the weak view"]
        targets = []
        for name, (strong_boxes, cosines) in pairings.items():
            row = cosines[layer - 1, index]
            best = int(row.argmax())
            styles = ["kept" if label == best else "prediction" for label in labels.tolist()]
            hit = overlaps(strong_boxes[best], places[index])[0] >= 0.5
            captions.append(f"{name}: most like {best}, {'right' if hit else 'wrong'} place")
            target = {"boxes": strong_boxes, "labels": labels, "scores": row}
            targets.append((target, styles))
        title = f"Who is most like object {index} at layer {layer}?"
        images = [weak, *[strong] * len(targets)]
        figure, axes = image_grid(images, 3, captions, title)
        weak_target = {"boxes": boxes[[index]], "labels": labels[[index]]}
        draw_boxes(axes[0], weak, weak_target, style="kept")
        for ax, (target, styles) in zip(axes[1:], targets):
            truth = {"boxes": places[[index]], "labels": labels[[index]]}
            draw_boxes(ax, strong, target, truth, style=styles)
        return figure

    return explore(draw, scene=(0, len(answers) - 1), object=(0, last), layer=(1, layers))


@torch.no_grad()
def sampling_points(detector, image) -> tuple[list, dict]:
    """Where the deformable attention of each decoder layer reads, and the outputs for the image.

    A list of (locations (Q, M, L, P, 2), weights (Q, M, L, P)), one per layer.
    """
    calls = []  # of every encoder and decoder layer: locations and weights
    deformable_attention = deformable.deformable_attention

    def record(value, shapes, locations, weights):
        calls.append((locations[0], weights[0]))
        return deformable_attention(value, shapes, locations, weights)

    with patch.object(deformable, "deformable_attention", record):
        outputs = detector([image])
    return calls[-len(detector.decoder) :], outputs


def show_points(image, target, locations, weights, title="") -> Picture:
    """Sampling locations (L, P, 2) in [0, 1] on an image, a colour and a mark for each level.

    A location is the larger, the higher its weight (L, P) is.
    """
    figure, (ax,) = image_grid([image], 1, ["levels"], title)
    _draw_points(ax, image, target, locations, weights)
    return figure


def show_layers(detector, scene: tuple, query: int, layers: Sequence[int]) -> Picture:
    """The points that one query reads on a scene in some decoder layers, which count from 1."""
    image, target = scene
    calls = sampling_points(detector, image)
    titles = [f"layer {layer}; levels" for layer in layers]
    title = f"What query {query} reads, and the box around which it reads"
    figure, axes = image_grid([image] * len(layers), len(layers), titles, title)
    for ax, layer in zip(axes, layers):
        box, locations, weights = _reads(calls, target["size"], query, layer)
        _draw_points(ax, image, box, locations, weights, indent=0.28)
    return figure


def _reads(calls: tuple, size, query: int, layer: int, head: int | str = "all") -> tuple:
    """Of a query in a layer: its box as a target, locations (L, P, 2) and weights (L, P).

    `calls` is what `sampling_points` returns; the points of all heads are joined.
    """
    layers, outputs = calls
    boxes = [*outputs["aux_outputs"], outputs][layer - 1]["pred_boxes"][0, query]
    box = {"boxes": to_pixels(boxes, size)[None], "labels": torch.tensor([0])}
    heads = list(range(layers[0][0].shape[1])) if head == "all" else [head]
    locations, weights = (
        part[query, heads].transpose(0, 1).flatten(1, 2) for part in layers[layer - 1]
    )
    return box, locations, weights


def _draw_points(ax, image, target, locations, weights, indent: float = 0.12) -> None:
    """`show_points` on one axes; its legend begins at `indent` of its width."""
    draw_boxes(ax, image, target, categories=[{"name": ""}] * 99)
    height, width = image.shape[-2:]
    for level, (xy, weight) in enumerate(zip(locations, weights)):
        style: dict[str, Any] = {
            "marker": "os^D"[level % 4],
            "color": LINE_COLORS[level],
            "edgecolor": "white",
            "linewidth": 0.7,
        }
        x, y = xy[:, 0] * width, xy[:, 1] * height
        ax.scatter(x, y, 10 + 400 * weight, clip_on=False, **style)
        ax.scatter([], [], 30, label=f"{level}", **style)
    ax.legend(
        fontsize=8,
        frameon=False,
        ncols=len(locations),
        handletextpad=0.1,
        columnspacing=1.0,
        loc="lower left",
        bbox_to_anchor=(indent, 1.005),
        borderpad=0.0,
        borderaxespad=0.0,
    )


def explore_points(detector, scenes: Sequence[tuple]) -> Explorer:
    """Which points one query reads, by decoder layer and head; all heads at once under "all"."""
    samples = [sampling_points(detector, image) for image, _ in scenes]
    heads = samples[0][0][0][0].shape[1]

    def draw(scene, query, layer, head="all"):
        image, target = scenes[scene]
        reads = _reads(samples[scene], target["size"], query, layer, head)
        box, locations, weights = reads
        points = locations.shape[0] * locations.shape[1]
        title = f"Query {query}, layer {layer}: {points} points read"
        return show_points(image, box, locations, weights, title)

    controls = {
        "scene": (0, len(scenes) - 1),
        "query": (0, detector.num_queries - 1),
        "layer": (1, len(samples[0][0])),
    }
    return explore(draw, **controls, head=["all", *range(heads)])


def explore_denoising(scenes: Sequence[tuple]) -> Explorer:
    """One denoising group on a scene, its positives and negatives, and the mask of all groups."""

    def draw(scene, box_noise=0.4, queries=20, seed=0):
        image, target = scenes[scene]
        padded = pad_targets([target])
        make_queries = Denoising(10, 1, queries, box_noise=box_noise)
        queries_and_targets = make_queries(*padded, [np.random.default_rng(seed)])
        if queries_and_targets is None:
            title = "No object: no denoising query"
            return show_targets([image], [target], None, title=title)
        group = queries_and_targets[0]
        boxes, copies = group.boxes, group.copies
        count = len(target["labels"])
        labels = padded.labels[0].repeat(2)
        noised = {"boxes": to_pixels(boxes[0, : 2 * count], target["size"]), "labels": labels}
        title = f"{count} positives, {count} negatives"
        figure, (ax,) = image_grid([image], 1, title=title)
        styles = ["prediction"] * count + ["dropped"] * count
        draw_boxes(ax, image, noised, target, [{"name": ""}] * 99, styles)
        return figure, plot_attention_mask(group_mask([2 * count] * copies, 8), 8)

    return explore(
        draw, scene=(0, len(scenes) - 1), box_noise=(0.0, 2.0, 0.1), queries=(1, 60), seed=(0, 30)
    )


def explore_run(folder, frames: int = 4) -> Explorer:
    """The teacher's boxes on the watched images of a run folder, `frames` steps side by side."""
    folder = Path(folder)
    lines = read_jsonl(folder / "pseudo_boxes.jsonl")
    splits = load_splits(read_config(folder), folder / "config.json")
    images = {
        target["image_id"]: (image, target.get("truth"))
        for image, target in iter_readable(splits.unlabelled, 8)
    }
    steps = sorted({line["step"] for line in lines})
    watched = list(dict.fromkeys(line["image_id"] for line in lines))
    kept = dict.fromkeys(watched, 0)
    for line in lines:
        kept[line["image_id"]] += sum(line["kept"])
    fullest = watched.index(max(watched, key=lambda image_id: kept[image_id]))

    def draw(image=fullest, start=steps[0], truth=True):
        image_id = watched[image]
        pixels, objects = images[image_id]
        of_image = [line for line in lines if line["image_id"] == image_id]
        shown = [line for line in of_image if line["step"] >= start][:frames]
        title = f"{folder.name}: what the teacher says about unlabelled image {image_id}"
        truth_target = objects if truth else None
        return show_pseudo_boxes(pixels, shown, truth_target, splits.categories, title)

    starts = {f"step {step:,}": step for step in steps[: max(1, len(steps) - frames + 1)]}
    return explore(draw, image=(0, len(watched) - 1), start=starts, truth=True)


def explore_detectors(detectors: dict, scenes: Sequence[tuple], categories) -> Explorer:
    """The detections of several detectors {name: detector} above a score threshold.

    They are shown against the truth or alone.
    """
    answers = {
        name: detector.detect([image for image, _ in scenes])
        for name, detector in detectors.items()
    }

    def draw(detector, score_threshold=0.3, truth=True):
        return _show_above(
            score_threshold, answers[detector], scenes, categories, truth, "prediction"
        )

    return explore(draw, detector=list(answers), score_threshold=(0.05, 0.95, 0.05), truth=True)


QUANTITIES = {"AP_teacher": "AP of the teacher, %", "AP_student": "AP of the student, %"}
QUANTITIES |= {
    "pseudo_precision": "pseudo-boxes that are right, %",
    "pseudo_recall": "objects that they find, %",
}
QUANTITIES |= {"duplicates": "boxes too many for an object found, without NMS"}


def explore_recorded(lines: Sequence[dict]) -> Explorer:
    """Curves of an ablation: for each row that is ticked the mean over its seeds.

    The x axis is the time spent after the burn-in, in supervised steps; a semi-supervised step
    takes longer. Runs of another detector, preset or length are rows of their own. At first the
    rows of the main table are ticked. `lines` are those of ablation_curves.jsonl.
    """
    rows: dict[str, dict] = {}
    lengths: dict[tuple, int] = {}
    for line in lines:
        kind = (line["row"], line["detector"], line["preset"])
        lengths[kind] = min(line["steps"], lengths.get(kind, line["steps"]))
    for line in lines:
        time, before = line["step"], PRESETS[line["preset"]].schedule.burn_in_steps
        if line["method"] != "supervised":
            time = before + STEP_RATIO * time
        if time >= before:
            seeds_of = rows.setdefault(_row_name(line, lengths), {})
            seeds_of.setdefault((line["percent"], time), []).append(line)

    def draw(percent, quantity, **ticked):
        factor = 100 if quantity in FRACTIONS else 1
        curves = {}
        for row, seeds_of in rows.items():
            means = {}
            for fraction, time in sorted(seeds_of):
                seeds = seeds_of[fraction, time] if fraction == percent and ticked[row] else []
                values = [line[quantity] for line in seeds if quantity in line]
                if values:
                    means[time] = factor * np.mean(values)
            if means:
                curves[row] = (list(means), list(means.values()))
        count = f"{len(curves)} {'row' if len(curves) == 1 else 'rows'}"
        title = f"{count} with {percent:g} % of the labels"
        figure = plot_lines(curves, "time, in supervised steps", QUANTITIES[quantity], title)
        figure.axes[0].autoscale(axis="y")
        return figure

    percents = sorted({percent for seeds_of in rows.values() for percent, _ in seeds_of})
    names = {name: key for key, name in QUANTITIES.items()}
    controls = {
        "percent": make_control("percent", percents),
        "quantity": make_control("quantity", names, "AP_teacher"),
    }
    for row in rows:
        controls[row] = ipywidgets.Checkbox(
            row in TABLES["main"], description=row, indent=False, layout={"width": "240px"}
        )
    return Explorer(draw, controls)


def _row_name(line: dict, lengths: dict[tuple, int]) -> str:
    """The row of a line, with what sets it apart: detector, preset, and steps if not the fewest."""
    row, detector, preset, steps = (line[key] for key in ("row", "detector", "preset", "steps"))
    usual = ROWS[row].detector if row in ROWS else None
    named = [row] + [detector] * (detector != (usual or "dino")) + [preset] * (preset != "digits")
    return ", ".join(named + [f"{steps:,} steps"] * (steps > lengths[row, detector, preset]))


def explore_mixture(pools: dict[str, tuple]) -> Explorer:
    """Costs of some boxes, two Gaussians after some steps of EM, and the threshold.

    `pools` is {name: (costs (N,), correct (N,) bool)}.
    """
    smallest = min(len(costs) for costs, _ in pools.values())

    def draw(checkpoint, samples=smallest, em_steps=30, truth=True):
        costs, correct = pools[checkpoint]
        sample = np.random.default_rng(0).permutation(len(costs))[:samples]
        costs, correct = costs[sample], correct[sample]
        weights, means, variances = fit_em_steps(costs, em_steps)
        exponent = -((costs[:, None] - means) ** 2) / (2 * variances)
        density = weights * np.exp(exponent) / np.sqrt(variances)  # (N, 2)
        is_reliable = density[:, 0] >= density[:, 1]
        threshold = costs[np.where(is_reliable, density.sum(1), -1).argmax()]
        if truth:
            return plot_cost_mixture(costs, means, variances, weights, threshold, correct)
        title = f"The threshold mines {(costs <= threshold).sum()} of {len(costs)} boxes"
        unknown = np.ones(len(costs), dtype=bool)
        figure = plot_cost_mixture(costs, means, variances, weights, threshold, unknown, title)
        (ax,) = figure.axes
        for bar in ax.patches:
            bar.set(facecolor=GREY)
        entries = [
            (handle, label)
            for handle, label in zip(*ax.get_legend_handles_labels())
            if label not in ("right", "wrong")
        ]
        ax.legend(*zip(*entries), **LEGEND_OUTSIDE)
        return figure

    return explore(
        draw, checkpoint=list(pools), samples=(2, smallest), em_steps=(1, 60), truth=True
    )
