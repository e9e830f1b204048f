"""Explorers: a changed value soon changes the picture; a saved notebook keeps the first one."""

import base64
import io
import re
import time
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from semidetr_lite import load_detector
from semidetr_lite.data import digits
from semidetr_lite.errors import UserError
from semidetr_lite.files import read_jsonl
from semidetr_lite.teach.widgets import (
    Explorer,
    explore,
    explore_attention,
    explore_consistency,
    explore_denoising,
    explore_detectors,
    explore_matching,
    explore_mixture,
    explore_momentum,
    explore_points,
    explore_recorded,
    explore_run,
    explore_threshold,
    explore_views,
    plot_histograms,
    plot_lines,
    show_dense,
)
from semidetr_lite.training.ablate import TABLES
from semidetr_lite.training.presets import PRESETS
from semidetr_lite.visualize import describe, plot_costs

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
EARLY = NOTEBOOKS / "checkpoints" / "early.safetensors"
DRAWINGS = 8  # of `plain_drawing`; a quiet machine redraws every explorer within 0.1 s
# explorer: {control: a value that it does not begin with}
CHANGES = {
    "matching": {
        "scene": 1,
        "matching": "one-to-one",
        "candidates": 1,
        "alpha": 3.0,
        "beta": 0.0,
        "class_weight": 0.0,
        "l1_weight": 0.0,
        "giou_weight": 0.0,
    },
    "views": {"scene": 1, "strength": 3.0, "seed": 1},
    "threshold": {"score_threshold": 0.9, "truth": False},
    "momentum": {"momentum": 0.99, "ramp": True},
    "consistency": {"scene": 1, "object": 1, "layer": 1},
    "mixture": {"checkpoint": "late", "samples": 3, "em_steps": 1, "truth": False},
    "attention": {"scene": 1, "query": 5, "layer": 3},
    "denoising": {"scene": 1, "box_noise": 1.0, "queries": 40, "seed": 1},
    "run": {"image": 0, "start": 200, "truth": False},
    "detectors": {"detector": "supervised", "score_threshold": 0.9, "truth": False},
    "recorded": {
        "percent": 100.0,
        "quantity": "duplicates",
        "supervised": False,
        "semi-detr": False,
    },
    "points": {"scene": 1, "query": 5, "layer": 3, "head": 2},
}

AP = {"AP_teacher": 0.4, "AP_student": 0.3}
KIND = {"detector": "dino", "preset": "digits", "steps": 1500}
CURVES = [
    {
        "row": row,
        "method": row,
        **KIND,
        "percent": percent,
        "seed": seed,
        "step": step,
        **AP,
        **more,
    }
    for row, percent, more in (
        *(("supervised", 10.0, {}), ("supervised", 100.0, {"AP_teacher": 0.7, "duplicates": 0.2})),
        ("semi-detr", 10.0, {"pseudo_precision": 0.8, "pseudo_recall": 0.6, "duplicates": 2.0}),
    )
    for seed in range(2)
    for step in (500, 1500)
]


def table(rows=3, sure=0.5, kind="plain"):
    values = torch.arange(12.0).reshape(4, 3)[:, :rows] * sure
    return plot_costs(values, title=f"{rows} <{kind}>")


@pytest.fixture(scope="module")
def scenes():
    return [digits.scene(index, "tune") for index in (3, 8)]


@pytest.fixture(scope="module")
def explorers(scenes) -> dict[str, Explorer]:
    detector = load_detector(EARLY)
    trained = {
        "early": detector,
        "supervised": load_detector(EARLY.with_name("supervised.safetensors")),
    }
    return {
        "matching": explore_matching(detector, scenes, digits.CATEGORIES),
        "views": explore_views(scenes, PRESETS["digits"].views),
        "threshold": explore_threshold(detector, scenes, digits.CATEGORIES),
        "momentum": explore_momentum(),
        "consistency": explore_consistency([answer(*scene) for scene in scenes]),
        "mixture": explore_mixture({"early": costs(60, 20, 0), "late": costs(80, 10, 1)}),
        "denoising": explore_denoising(scenes),
        "run": explore_run(NOTEBOOKS / "recorded/demo/seed0/semi-detr"),
        "detectors": explore_detectors(trained, scenes, digits.CATEGORIES),
        "recorded": explore_recorded(CURVES),
        "points": explore_points(detector, scenes),
        "attention": explore_attention(load_detector(EARLY.with_name("detr.safetensors")), scenes),
    }


def costs(cheap, dear, seed) -> tuple:
    """Matching costs, and whether the box is right."""
    rng = np.random.default_rng(seed)
    return np.hstack([rng.normal(-1.5, 0.5, cheap), rng.normal(2, 1, dear)]), np.arange(
        cheap + dear
    ) < cheap


def answer(image, target) -> dict:
    """A scene whose views are equal, and random cosines."""
    count = len(target["labels"])
    boxes, chance = (
        target["boxes"],
        torch.rand(3, count, count, generator=torch.Generator().manual_seed(0)),
    )
    pairings = {
        "same number": (boxes.flip(0), chance),
        "consistency query": (boxes, chance + 2 * torch.eye(count)),
    }
    return {"images": (image, image), "boxes": boxes, "places": boxes, "pairings": pairings}


def test_recorded_curves_are_means_of_runs_of_one_kind():
    """Of another detector, preset or length are curves of their own."""
    lines = read_jsonl(NOTEBOOKS / "recorded/ablation_curves.jsonl")
    explorer = explore_recorded(lines)
    assert {
        name for name, box in explorer.controls.items() if getattr(box, "value", 0) is True
    } == set(TABLES["main"])
    figure = explorer.draw(10.0, "AP_teacher", **dict.fromkeys(list(explorer.controls)[2:], True))
    drawn = {curve.get_label(): curve for curve in figure.axes[0].lines}
    others = {"mean-teacher, 3,000 steps", "mean-teacher, deformable-detr", "supervised, fcos"}
    assert set(TABLES["main"]) | others <= set(drawn) and not any(
        "digits-full" in name for name in drawn
    )
    assert figure.texts[0].get_text().startswith(f"{len(drawn)} rows with 10 %")
    kind = {"row": "mean-teacher", "detector": "dino", "steps": 1500, "percent": 10.0, "step": 1500}
    last = [100 * line["AP_teacher"] for line in lines if kind.items() <= line.items()]
    assert len(last) == 3 and drawn["mean-teacher"].get_ydata()[-1] == pytest.approx(np.mean(last))


def test_a_control_for_every_kind_of_values_begins_at_the_default():
    own = ipywidgets.Text("mine")
    shown = explore(table, rows=(1, 3), sure=(0.0, 2.0), kind=own).controls
    assert (
        isinstance(shown["rows"], ipywidgets.IntSlider)
        and shown["rows"].value == 3
        and shown["rows"].step == 1
    )
    assert isinstance(shown["sure"], ipywidgets.FloatSlider) and shown["sure"].value == 0.5
    assert shown["sure"].step == 0.1 and shown["kind"] is own
    assert explore(table, sure=(0.0, 2.0, 0.25)).controls["sure"].step == 0.25
    first = explore(lambda start: table(start), start=(1, 3)).controls["start"]
    assert first.value == 1  # without a default the lowest value
    assert explore(table, kind=["fancy", "plain"]).controls["kind"].value == "plain"
    assert explore(table, rows={"one": 1, "three": 3}).controls["rows"].label == "three"
    tick = explore(lambda on: table(1 + on), on=True).controls["on"]
    assert isinstance(tick, ipywidgets.Checkbox) and tick.value is True


@pytest.mark.parametrize("spec", [(1,), (3, 1), ("low", "high"), (1, 3, 0), None])
def test_anything_else_is_no_control(spec):
    with pytest.raises(UserError, match="'rows': give"):
        explore(table, rows=spec)


def test_the_picture_has_words_and_follows_the_value():
    explorer = explore(table, rows=(1, 3))
    first = explorer.picture.value
    assert 'alt="3 &lt;plain&gt;"' in first
    explorer.controls["rows"].value = 2
    second = explorer.picture.value
    assert 'alt="2 &lt;plain&gt;"' in second and picture(first) != picture(second)
    explorer.controls["rows"].value = 3
    assert explorer.picture.value == first


def test_several_figures_stand_below_each_other():
    explorer = explore(lambda rows: (table(rows), table(1)), rows=(1, 3))
    assert explorer.picture.value.count("<img ") == 2


def test_a_saved_notebook_keeps_a_described_picture_without_the_widget():
    explorer = explore(table, rows=(1, 3))
    shown, metadata = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert base64.b64decode(shown["image/png"])[1:4] == b"PNG" and "text/html" not in shown
    assert metadata["image/png"]["alt"].startswith("3 <plain>")
    assert shown["text/plain"] == "explore(rows)"


@pytest.mark.parametrize(
    ("name", "control"), [(name, control) for name, row in CHANGES.items() for control in row]
)
def test_each_control_of_an_explorer_changes_its_picture_in_time(explorers, name, control):
    explorer, value = explorers[name], CHANGES[name][control]
    assert list(CHANGES[name]) == list(explorer.controls)
    start, before = explorer.controls[control].value, explorer.picture.value
    explorer.controls[control].value = value
    after = explorer.picture.value
    explorer.controls[control].value = start
    assert picture(after) != picture(before) and explorer.picture.value == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_redraw_is_fast_enough_to_follow_a_hand(explorers, name):
    """Beside what Matplotlib takes for two empty axes, so that a slow machine does not count."""
    took, plain = (
        min(processor_time(draw) for _ in range(3))
        for draw in (explorers[name].redraw, plain_drawing)
    )
    assert took < DRAWINGS * plain


def processor_time(work) -> float:
    """Seconds of the processor."""
    began = time.process_time()
    work()
    return time.process_time() - began


def plain_drawing() -> None:
    """A small figure that shows hardly anything, as PNG."""
    figure = Figure(figsize=(6, 3))
    for axis in figure.subplots(1, 2):
        axis.plot([0, 1], [0, 1])
        axis.set_title("plain")
    figure.savefig(io.BytesIO(), format="png", dpi=100)


def picture(html: str) -> list[str]:
    """The bytes of the pictures, as they stand in the tags."""
    return re.findall(r"base64,([\w+/=]+)", html)


def test_the_boxes_of_the_views_travel_by_the_matrix(scenes):
    explorer = explore_views(scenes, PRESETS["digits"].views)
    explorer.controls["strength"].value = 0.0
    (figure,) = explorer.figures()
    shown = [
        len([patch for patch in ax.patches if patch.get_gid() == "prediction"])
        for ax in figure.axes
    ]
    assert shown == [len(scenes[0][1]["labels"])] * 2


def test_a_higher_cut_keeps_fewer_boxes(explorers):
    explorer = explorers["threshold"]
    counts = []
    for cut in (0.1, 0.5, 0.9):
        explorer.controls["score_threshold"].value = cut
        figure = explorer.figures()[0]
        counts.append(
            sum(
                patch.get_gid() in ("hit", "false_alarm")
                for ax in figure.axes
                for patch in ax.patches
            )
        )
    explorer.controls["score_threshold"].value = 0.4
    assert counts == sorted(counts, reverse=True) and np.ptp(counts) > 0


def test_a_scene_without_an_object_has_no_denoising_queries(scenes):
    image, target = scenes[0]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    (figure,) = explore_denoising([(image, target | none)]).figures()
    assert "no denoising query" in figure.get_suptitle().replace("\n", " ")


def test_a_dense_map_lies_over_each_image(scenes):
    fcos = load_detector(EARLY.with_name("fcos.safetensors"))
    images, truths = zip(*scenes)
    figure = show_dense(images, fcos, truths, "maps")
    assert len(figure.axes) == 2 and all(len(ax.images) == 2 for ax in figure.axes)
    drawn = figure.axes[0].images[1]
    assert drawn.get_array().shape == tuple(-(-side // 8) + 1 for side in images[0].shape[-2:])
    with torch.no_grad():
        cells = fcos.head_outputs(fcos.extract(images[:1]))
    scores = cells.outputs["cls_logits"][0].sigmoid().amax(-1)
    best = int(scores.argmax())
    x, y = cells.anchors[best].view(2, 2).mean(0).tolist()
    left, _, _, top = drawn.get_extent()
    there = drawn.get_array()[
        int((y - top) / 8), int((x - left) / 8)
    ]  # the tile around torchvision's own point
    assert there == pytest.approx(float(scores[best]))


def test_curves_are_told_apart_without_colour():
    figure = plot_lines({"one": ([0, 1], [1, 2]), "two": ([0, 1], [2, 1])}, "x", "y", "found")
    assert len(
        {line.get_linestyle() for line in figure.axes[0].lines}
    ) == 2 and "found" in describe(figure)


def test_the_most_similar_query_is_judged_by_its_place(explorers):
    (figure,) = explorers["consistency"].figures()
    words = [ax.get_title(loc="left").replace("\n", " ") for ax in figure.axes]
    assert words[2] == "consistency query: most like 0, right place" and len(figure.axes) == 3


def test_histograms_name_their_means():
    figure = plot_histograms({"low": torch.zeros(5), "high": torch.ones(7)}, "x", "y", "apart")
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["low: 0.00", "high: 1.00"] and "apart" in describe(figure)


def test_costs_without_truth_say_nothing_of_it(explorers):
    explorer = explorers["mixture"]
    (figure,) = explorer.figures()
    assert "are right" in figure.get_suptitle()
    explorer.controls["truth"].value = False
    (figure,) = explorer.figures()
    explorer.controls["truth"].value = True
    names = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert (
        "right" not in figure.get_suptitle() and not names & {"right", "wrong"} and len(names) == 3
    )
