"""What is drawn: boxes in the right place, style and number; errors told apart; findings that are
true.
"""

import base64
import re
import struct

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import ConnectionPatch, Rectangle

from semidetr_lite import visualize
from semidetr_lite.errors import UserError
from semidetr_lite.visualize import RED, Picture, class_color, draw_boxes, png

CATEGORIES = [
    {"id": 7 * label, "name": name} for label, name in enumerate(("cat", "dog", r"$\cow$"))
]
HIGH = torch.randint(
    0, 256, (3, 128, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
WIDE = HIGH.transpose(1, 2).float() / 255


def target(*boxes, labels=None, scores=None) -> dict:
    made = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)}
    made["labels"] = torch.tensor(
        labels if labels is not None else [0] * len(boxes), dtype=torch.int64
    )
    if scores is not None:
        made["scores"] = torch.tensor(scores, dtype=torch.float32)
    return made


def numbers(text: str) -> list[float]:
    """The numbers of a sentence, in their order."""
    return [float(number) for number in re.findall(r"\d*\.?\d+", text)]


def drawn(ax) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def styles(ax) -> list[str]:
    return [patch.get_gid() for patch in drawn(ax)]


def words(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def axes():
    return Picture(figsize=(3, 3)).add_axes((0, 0, 1, 1))


TRUTH = target((10, 10, 30, 30), (50, 50, 80, 90), (5, 60, 25, 80), labels=[0, 1, 2])
FOUND = target(
    *((11, 10, 30, 31), (50, 50, 80, 90), (60, 5, 90, 30), (5, 60, 25, 80)),
    labels=[0, 2, 1, 2],
    scores=[0.9, 0.8, 0.7, 0.1],
)


def test_a_box_beyond_the_image_ends_at_its_edge():
    figure = visualize.show_targets(
        [torch.zeros(3, 40, 60)], [{"boxes": [[-30, 5, 90, 99]], "labels": [0]}], None
    )
    (box,) = [patch for patch in figure.axes[0].patches if patch.get_gid() == "truth"]
    assert box.get_bbox().extents.tolist() == [-1, 5, 61, 41]


def test_boxes_lie_on_the_pixels_they_name():
    ax = axes()
    draw_boxes(ax, HIGH, target((0, 8, 96, 128)))
    assert ax.images[0].get_extent() == [0, 96, 128, 0]
    assert ax.images[0].get_array().shape == (128, 96, 3)
    assert drawn(ax)[0].get_bbox().extents.tolist() == [0, 8, 96, 128]


@pytest.mark.parametrize(
    ("style", "color", "line"),
    [
        ("truth", "#ffffff", "-"),
        ("prediction", class_color(1), "-"),
        ("pseudo", class_color(1), "--"),
    ],
)
def test_each_style_has_its_own_line(style, color, line):
    ax = axes()
    draw_boxes(ax, HIGH, target((10, 10, 30, 30), labels=[1]), style=style)
    patch = drawn(ax)[0]
    assert to_hex(patch.get_edgecolor()) == to_hex(color)
    assert patch.get_linestyle() == line


def test_a_prediction_carries_class_and_score_and_silences_the_truth():
    ax = axes()
    draw_boxes(ax, WIDE, target((5, 5, 20, 20), labels=[2], scores=[0.876]), TRUTH, CATEGORIES)
    assert words(ax.figure) == [r"$\cow$ .88"]
    assert styles(ax) == ["truth"] * 3 + ["prediction"]
    png(ax.figure)  # the dollar signs are text, not mathematics


def test_truth_alone_is_named():
    ax = axes()
    draw_boxes(ax, WIDE, None, TRUTH, CATEGORIES)
    assert words(ax.figure) == ["cat", "dog", r"$\cow$"]


@pytest.mark.parametrize("empty", [None, {}, target(), {"boxes": [], "labels": [], "scores": []}])
def test_nothing_to_draw(empty):
    ax = axes()
    draw_boxes(ax, HIGH, empty, empty)
    assert drawn(ax) == [] and words(ax.figure) == []
    png(ax.figure)


def test_of_many_boxes_the_best_are_named():
    ax = axes()
    count = visualize.MAX_LABELS + 5
    draw_boxes(
        ax,
        HIGH,
        target(
            *[(4 * i, 4 * i, 4 * i + 9, 4 * i + 9) for i in range(count)],
            scores=[i / 20 for i in range(count)],
        ),
    )
    assert len(drawn(ax)) == count
    assert sorted(words(ax.figure))[0] == "0 .25" and len(words(ax.figure)) == visualize.MAX_LABELS


def test_labels_do_not_cover_each_other():
    ax = axes()
    draw_boxes(ax, HIGH, target(*[(40, 50, 60, 70)] * 4, labels=[0, 1, 2, 3], scores=[0.5] * 4))
    places = [text.get_window_extent().shrunk(0.9, 0.9) for text in ax.texts]
    assert len(places) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])


def test_labels_stay_inside_the_image():
    ax = axes()
    draw_boxes(ax, HIGH, target((0, 0, 4, 4), (92, 124, 96, 128), scores=[0.5, 0.5]))
    for text in ax.texts:
        x, y = text.get_position()
        assert 0 < x < 96 and 0 < y < 128


def test_an_image_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"\(3, H, W\), got \(128, 96, 3\)"):
        draw_boxes(axes(), HIGH.permute(1, 2, 0))


def test_images_share_one_scale_and_the_page_its_width():
    figure = visualize.show_targets(
        [HIGH, WIDE, HIGH, WIDE, HIGH], [TRUTH, target(), TRUTH, {}, TRUTH], CATEGORIES
    )
    width, height = size(png(figure))
    assert width <= 900
    scales = {round(ax.get_position().width * width / ax.get_xlim()[1], 2) for ax in figure.axes}
    assert len(scales) == 1
    assert numbers(figure.texts[0].get_text()) == [9, 5]  # objects, images
    assert all(ax.get_position().y0 >= 0 and ax.get_position().x1 <= 1 for ax in figure.axes)
    assert height < 2 * 128 / 96 * width


def test_a_lone_image_without_words_fills_its_figure():
    figure = visualize.show_targets([HIGH], [TRUTH], CATEGORIES, title="")
    assert np.allclose(figure.axes[0].get_position().extents, [0, 0, 1, 1])


def test_hits_false_alarms_and_misses_are_told_apart():
    figure = visualize.show_hits([HIGH], [FOUND], [TRUTH], CATEGORIES)
    ax = figure.axes[0]
    # (50, 50, 80, 90) is found with the wrong class; the third object only under the score.
    assert styles(ax) == ["missed", "missed", "false_alarm", "false_alarm", "hit"]
    missed, alarm, hit = drawn(ax)[0], drawn(ax)[2], drawn(ax)[4]
    assert to_hex(missed.get_edgecolor()) == RED.lower() and missed.get_bbox().extents.tolist() == [
        50,
        50,
        80,
        90,
    ]
    assert alarm.get_hatch() and not hit.get_hatch() and not missed.get_hatch()
    assert to_hex(hit.get_edgecolor()) == to_hex(class_color(0))
    assert words(figure) == ["dog", r"$\cow$", r"$\cow$ .80", "dog .70", "cat .90"]
    assert numbers(ax.get_title(loc="left")) == [1, 2, 2]  # hits, false alarms, missed
    assert len(figure.legends[0].get_texts()) == 3


def test_hits_with_nothing_found_and_nothing_true():
    none = {**target(), "scores": torch.zeros(0)}
    figure = visualize.show_hits(
        [HIGH, WIDE], [none, FOUND], [TRUTH, target()], CATEGORIES, score=0.75
    )
    assert styles(figure.axes[0]) == ["missed"] * 3
    assert styles(figure.axes[1]) == ["false_alarm"] * 2
    assert numbers(figure.texts[0].get_text()) == [0, 2, 3, 0.75]


def test_count_hits_points_into_the_whole_detection():
    weak_first = {key: value.flip(0) for key, value in FOUND.items()}
    errors = visualize.count_hits(weak_first, TRUTH, score=0.3)
    assert {key: value.tolist() for key, value in errors.items()} == {
        "hits": [3],
        "false_alarms": [2, 1],
        "misses": [1, 2],
    }


def test_a_score_equal_to_the_threshold_counts():
    one = target((10, 10, 30, 30), scores=[0.5])
    assert len(visualize.count_hits(one, TRUTH, score=0.5)["hits"]) == 1
    assert len(visualize.count_hits(one, TRUTH, score=0.51)["hits"]) == 0


LINE = {
    "step": 400,
    "image_id": 3,
    "boxes": [[10, 10, 30, 30], [50, 50, 80, 90], [1, 1, 9, 9], [2, 2, 20, 20]],
    "scores": [0.9, 0.3, 0.2, 0.8],
    "labels": [0, 1, 2, 2],
    "cost": [-2.0, -1.5, None, 3.0],
    "kept": [True, False, False, True],
    "mined": [True, True, False, False],
}


def test_pseudo_boxes_are_kept_mined_or_dropped():
    figure = visualize.show_pseudo_boxes(HIGH, LINE, TRUTH, CATEGORIES)
    ax = figure.axes[0]
    # the last box has no object of its class under it
    assert styles(ax) == ["truth"] * 3 + ["kept", "mined", "dropped", "kept_wrong"]
    kept, mined, dropped, wrong = drawn(ax)[3:7]
    lines = [patch.get_linestyle() for patch in (kept, wrong, mined, dropped)]
    assert lines == ["-", "-", "--", ":"]
    assert kept.get_linewidth() > mined.get_linewidth() > dropped.get_linewidth()
    assert (
        to_hex(kept.get_edgecolor())
        == to_hex(mined.get_edgecolor())
        != to_hex(wrong.get_edgecolor())
    )
    assert wrong.get_hatch() and not kept.get_hatch()
    assert words(figure) == ["cat .90", "dog .30", r"$\cow$ .80"]
    title = ax.get_title(loc="left").replace("\n", " ")
    assert numbers(title) == [400, 2, 1, 1, 1]  # step; kept, of them right, mined only, dropped
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["truth", "kept", "kept, wrong", "mined only", "dropped"]


def test_a_legend_of_many_rows_stays_below_its_image():
    legend = ["truth", "kept", "kept_wrong", "mined", "mined_wrong", "dropped"]
    figure, (ax,) = visualize.image_grid([HIGH], 1, ["a caption"], legend=legend)
    figure.canvas.draw()
    (entries,) = figure.legends
    assert entries.get_window_extent().y1 <= ax.get_window_extent().y0 + 1


def test_of_the_dropped_boxes_the_best_are_drawn():
    count = visualize.BEST_DROPPED + 3
    boxes = [[10 * place, 1, 10 * place + 8, 9] for place in range(count)]
    line = {"step": 1, "boxes": boxes, "labels": [0] * count, "cost": [None] * count}
    line |= {"scores": [0.1 + 0.01 * place for place in range(count)]}
    line |= {"kept": [False] * count, "mined": [False] * count}
    figure = visualize.show_pseudo_boxes(HIGH, line, None, CATEGORIES)
    assert [patch.get_x() for patch in drawn(figure.axes[0])] == [30, 40, 50, 60, 70]
    assert f"{count} dropped" in figure.axes[0].get_title(loc="left")  # the count is of all


def test_a_mined_box_is_right_by_itself():
    line = {**LINE, "boxes": [[50, 50, 80, 90], [50, 50, 80, 90], [0, 0, 9, 9], [50, 50, 80, 90]]}
    line |= {
        "labels": [1, 1, 1, 1],
        "kept": [True, False, False, True],
        "mined": [False, True, True, True],
    }
    assert visualize.pseudo_styles(line, TRUTH) == ["kept", "mined", "mined_wrong", "kept_wrong"]
    assert visualize.pseudo_styles(line) == ["kept", "mined", "mined", "kept"]
    assert numbers(visualize.pseudo_sentence(line, TRUTH)) == [2, 1, 2, 0]


def test_pseudo_boxes_over_the_steps_without_truth():
    none = {
        "step": 800,
        "boxes": [],
        "scores": [],
        "labels": [],
        "cost": [],
        "kept": [],
        "mined": [],
    }
    figure = visualize.show_pseudo_boxes(WIDE, [LINE, none], None, CATEGORIES)
    assert [len(drawn(ax)) for ax in figure.axes] == [4, 0]
    assert "right" not in figure.axes[0].get_title(loc="left")


def test_views_join_the_boxes_that_arrive():
    boxes = TRUTH["boxes"]
    keep = torch.tensor([True, False, True])
    figure = visualize.show_views(HIGH, WIDE, boxes, boxes + 3, keep)
    weak, strong = figure.axes
    assert (
        styles(weak) == ["prediction", "dropped", "prediction"]
        and styles(strong) == ["prediction"] * 2
    )
    assert [text.get_text() for text in strong.texts] == ["1", "3"]
    assert to_hex(drawn(weak)[2].get_edgecolor()) == to_hex(drawn(strong)[1].get_edgecolor())
    lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    assert [list(line.xy1) for line in lines] == [[20, 20], [15, 70]]
    assert [list(line.xy2) for line in lines] == [[23, 23], [18, 73]]
    assert figure.texts[0].get_text().startswith("2 of 3 boxes")
    png(visualize.show_views(HIGH, WIDE, torch.zeros(0, 4), torch.zeros(0, 4)))


def log(final: float, steps=range(100, 500, 100)) -> list[dict]:
    lines = [
        {"step": step, "seconds": 0.6 * step, "losses": {"class": 2 / step, "consistency": 0.0}}
        for step in steps
    ]
    for line in lines[1::2]:
        share = line["step"] / steps[-1]
        line |= {"AP_student": final * share, "AP_teacher": (final + 0.02) * share}
    return lines


def test_curves_hold_student_and_teacher_of_each_run():
    logs = {"supervised": log(0.30), "semi-detr": log(0.40), "semi-detr again": log(0.38)}
    figure = visualize.plot_curves(logs)
    lines = {
        line.get_gid(): line for line in figure.axes[0].lines if " AP_" in (line.get_gid() or "")
    }
    assert len(lines) == 6
    teacher, student = lines["semi-detr AP_teacher"], lines["semi-detr AP_student"]
    assert np.allclose(teacher.get_xydata(), [[200, 21], [400, 42]])
    assert np.allclose(student.get_ydata(), [20, 40])
    assert teacher.get_linestyle() == "-" and student.get_linestyle() != "-"
    assert (
        teacher.get_color()
        == visualize.METHOD_COLORS["semi-detr"]
        == lines["semi-detr again AP_teacher"].get_color()
    )
    assert teacher.get_marker() != lines["semi-detr again AP_teacher"].get_marker()
    finding = figure.get_suptitle()
    assert finding.startswith("semi-detr") and finding.endswith("supervised")
    assert numbers(finding) == [42.0, 10.0]  # its AP, and how far above the second
    minutes = visualize.plot_curves({"mine": log(0.3)}, x="minutes").axes[0].lines[0]
    assert np.allclose(minutes.get_xdata(), [2, 4])


def test_curves_begin_at_the_end_of_their_burn_in():
    start = log(0.20)
    later = [
        line | {"step": line["step"] + 400, "seconds": line["seconds"] + 240} for line in log(0.30)
    ]
    burn_ins = {
        "supervised": ("supervised burn-in", start),
        "semi-detr": ("supervised burn-in", list(start)),
    }
    figure = visualize.plot_curves(
        {"supervised": later, "semi-detr": later, "other": log(0.1)}, burn_ins=burn_ins
    )
    lines = {line.get_gid(): line for line in figure.axes[0].lines}
    assert np.allclose(lines["burn-in"].get_xdata(), [200, 400])  # once, though two runs have it
    assert to_hex(lines["burn-in"].get_color()) == visualize.BURN_IN_COLOR.lower()
    assert [line.get_gid() for line in figure.axes[0].lines].count("burn-in") == 1
    for name in ("supervised", "semi-detr"):
        assert np.allclose(
            lines[f"{name} AP_teacher"].get_xydata(), [[400, 22], [600, 16], [800, 32]]
        )
    assert np.allclose(lines["other AP_teacher"].get_xdata(), [200, 400])
    named = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert named[-2] == "supervised burn-in" and set(named[:3]) == {
        "supervised",
        "semi-detr",
        "other",
    }
    assert not any(
        character.isdigit() for character in "".join(named)
    )  # numbers stand in the table


def test_a_title_is_text_and_not_mathematics():
    png(visualize.plot_curves({r"$\semi-detr$": log(0.3)}))
    png(visualize.show_targets([HIGH], [TRUTH], CATEGORIES, titles=[r"$\one$"], title=r"$\all$"))


def test_curves_without_an_evaluation():
    lines = [{"step": 1, "seconds": 1.0, "losses": {}, "AP_teacher": float("nan")}]
    for figure in (visualize.plot_curves({"supervised": lines}), visualize.plot_losses([])):
        assert figure.get_suptitle() and numbers(figure.get_suptitle()) == []
    png(visualize.plot_losses([]))


def test_losses_leave_out_zeros_and_name_the_largest_first():
    lines = [
        {"step": 1, "losses": {"b": 1.0, "a": 0.5}},
        {"step": 2, "losses": {"a": 4.0, "b": 0.0}},
        {"step": 3},
    ]
    figure = visualize.plot_losses(lines)
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert np.isnan(ax.lines[1].get_ydata()[1]) and ax.lines[0].get_ydata().tolist() == [0.5, 4.0]
    assert numbers(figure.get_suptitle()) == [1.5, 4.0]  # the first total and the last


def test_pseudo_quality_reads_the_last_known_values():
    lines = [
        {"step": 1, "pseudo_per_image": 1.0, "mined_per_image": 0.5, "cost_threshold": None},
        {"step": 2, "pseudo_precision": 0.8, "pseudo_recall": 0.45, "cost_threshold": -1.5},
        {"step": 3, "cost_threshold": -1.0},
    ]
    figure = visualize.plot_pseudo_quality(lines)
    assert numbers(figure.get_suptitle()) == [80, 45]  # precision and recall
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[2, -1.5], [3, -1.0]]
    assert numbers(visualize.plot_pseudo_quality(lines[:1]).get_suptitle()) == []


def test_cost_mixture_counts_what_the_cut_mines():
    costs = torch.tensor([-2.0, -1.9, -1.8, 0.5, 1.0, 1.5, 2.0, 2.5])
    correct = [True, True, False, False, False, True, False, False]
    settings = {
        "mixture_means": [1.5, -1.9],
        "mixture_vars": [0.5, 0.01],
        "mixture_weights": [0.6, 0.4],
    }
    figure = visualize.plot_cost_mixture(costs, threshold=costs[2], correct=correct, **settings)
    ax, title = figure.axes[0], figure.get_suptitle().replace("\n", " ")
    assert numbers(title) == [3, 8, 67, 38]  # mined, of all; right of these, right of all
    wide = (2.5 - -2.0) / 10  # a bar

    def boxes(outline):
        """The area of a polygon by its corners, in bars."""
        x, y = outline.get_xy().T
        return abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum()) / 2 / wide

    assert [boxes(outline) for outline in ax.patches if outline.get_hatch()] == [pytest.approx(5)]
    assert sum(map(boxes, ax.patches)) == pytest.approx(8)
    reliable, unreliable, cut = ax.lines
    assert abs(reliable.get_xdata()[reliable.get_ydata().argmax()] + 1.9) < 0.05
    assert unreliable.get_linestyle() == "--" and cut.get_xdata()[0] == pytest.approx(-1.8)
    heights, places = reliable.get_ydata(), reliable.get_xdata()
    area = heights.sum() * (places[1] - places[0]) / wide  # in bars, so in boxes
    assert area == pytest.approx(0.4 * 8, rel=0.2)
    png(visualize.plot_cost_mixture([], [0, 1], [1, 1], [0.5, 0.5], 0.0, correct=[]))


def test_matching_draws_pairs_by_quality():
    boxes = torch.cat([TRUTH["boxes"], TRUTH["boxes"] + 2, TRUTH["boxes"][:2] - 2])
    figure = visualize.plot_matching(
        HIGH, TRUTH, boxes, [0, 3, 1], [0, 0, 1], [1.0, 0.4, 0.9], categories=CATEGORIES
    )
    left, right = figure.axes
    assert styles(left) == ["truth"] * 3 + ["dropped"] * 5 + ["prediction"] * 3
    assert drawn(left)[8].get_linewidth() > drawn(left)[9].get_linewidth()
    assert to_hex(drawn(left)[9].get_edgecolor()) == to_hex(class_color(0))
    pairs = [line for line in right.lines if len(line.get_xdata()) == 2]
    assert len(pairs) == 3 and pairs[0].get_linewidth() > pairs[1].get_linewidth()
    texts = [text.get_text() for text in right.texts]
    assert r"object 2: $\cow$" in texts and "query 3 .40" in texts and "query 0" in texts
    assert numbers(figure.texts[0].get_text()) == [3, 8, 2, 3]  # queries, objects
    png(visualize.plot_matching(WIDE, target(), boxes, [], [], torch.zeros(0)))


def test_attention_mask_shows_a_leak():
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[:, 4:] = False
    mask[:2, :2] = mask[2:4, 2:4] = False
    figure = visualize.plot_attention_mask(mask, queries=5)
    assert numbers(figure.get_suptitle()) == [] and "leak" not in figure.get_suptitle()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [
        "group 1",
        "group 2",
        "matching",
    ]
    mask[6, 1] = False
    leaking = visualize.plot_attention_mask(mask, queries=5)
    assert numbers(leaking.get_suptitle()) == [1] and "leak" in leaking.get_suptitle()
    assert len(leaking.axes[0].get_xticklabels()) == 3


def test_colours_of_classes():
    first = [to_hex(class_color(label)) for label in range(30)]
    assert len(set(first)) == 30
    brightness = [sum(to_rgb(color)) for color in first]
    for plain, lighter, darker in zip(brightness[:10], brightness[10:20], brightness[20:]):
        assert darker < plain < lighter or lighter > 2.5  # yellow is light already
    assert to_hex(RED) not in first and to_hex(visualize.ORANGE) not in first


def test_a_figure_shows_itself_and_leaks_nothing():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = visualize.plot_losses(log(0.3))
    data, metadata = figure._repr_mimebundle_()
    assert data["text/plain"] == repr(figure) == "<Picture>"
    alt = "The total goes from 0.02 to 0.01; weighted loss over step"
    assert metadata["image/png"] == {"alt": alt, "width": 900}
    assert size(base64.b64decode(data["image/png"]))[0] == 1800
    assert size(png(figure))[0] == 900 and size(png(figure, dpi=160))[0] == 1440
    assert plt.get_fignums() == before


def test_a_scene_is_enlarged_four_times_in_the_file_and_its_pixels_stay_squares():
    images = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)] * 4
    figure = visualize.show_targets(images, [target()] * 4, CATEGORIES)
    drawn = [ax.get_window_extent().width * visualize.style.SHARPNESS for ax in figure.axes]
    assert min(drawn) >= 4 * 128
    assert {ax.images[0].get_interpolation() for ax in figure.axes} == {"nearest"}


def test_four_images_are_two_rows_of_two():
    figure, axes = visualize.image_grid([HIGH] * 4, columns=3)
    assert len({ax.get_position().x0 for ax in axes}) == 2
    assert figure.get_figwidth() == visualize.WIDTH


def test_several_figures_become_one_described_picture():
    figures = [visualize.plot_losses(log(0.3)), visualize.plot_costs(torch.eye(3), title="costs")]
    data, metadata = visualize.png_bundle(figures)
    heights = [size(png(figure, dpi=200))[1] for figure in figures]
    assert size(base64.b64decode(data["image/png"])) == (1800, sum(heights))
    assert "The total goes" in metadata["image/png"]["alt"]
    assert "costs" in metadata["image/png"]["alt"]


# ---- what mining adds, how alike embeddings are --------------------------------------------------


def test_only_boxes_that_are_mined_and_not_kept_are_shown_as_rescued():
    line = {**LINE, "kept": [True, False, False, False], "mined": [True, True, False, True]}
    line["cost"] = [-2.0, -1.5, 3.0, -1.25]
    figure = visualize.show_mined([HIGH], [line], [TRUTH], CATEGORIES)
    shown = [style for style in styles(figure.axes[0]) if style != "truth"]
    expected = [style for style in visualize.pseudo_styles(line, TRUTH) if "mined" in style]
    assert shown == expected and len(shown) == 2
    caption = figure.axes[0].get_title(loc="left")
    assert "-1.50" in caption and "-1.25" in caption and "-2.00" not in caption
    right = expected.count("mined")
    assert numbers(figure.get_suptitle()) == [right, 2]
    assert caption.count("right") == right and caption.count("wrong") == 2 - right


def test_the_corner_of_mined_and_not_confident_boxes_is_counted():
    scores = np.array([0.9, 0.3, 0.2, 0.1, 0.3])
    costs = np.array([-2.0, -2.0, -1.0, 2.0, -0.5])
    right = np.array([True, True, False, False, True])
    pools = {"early": (scores, costs, right, -1.0)}
    figure = visualize.plot_scores_and_costs(pools, 0.4)
    assert numbers(figure.get_suptitle()) == [1, 2]
    (corner,) = drawn(figure.axes[0])
    assert corner.get_x() + corner.get_width() == 0.4
    assert corner.get_y() + corner.get_height() == pytest.approx(-1.0)
    points = {line.get_label(): len(line.get_xdata()) for line in figure.axes[0].lines}
    assert (points["right"], points["wrong"]) == (3, 2)


def test_similarity_is_summed_up_by_the_pairs_of_different_objects():
    apart = torch.tensor([[1.0, 0.2], [0.4, 0.9]])
    figure = visualize.plot_similarity({"a": apart, "b": torch.ones(2, 2)}, ["a 3", "a 5"])
    assert numbers(figure.get_suptitle()) == [0.30, 1.00]
    assert words(figure)[:4] == ["1.00", "0.20", "0.40", "0.90"]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["a 3", "a 5"]
