"""Curves, tables and diagrams: pure functions that take logs and tensors and return a figure.

The title of a figure is its finding; each function writes its own unless a title is given, and
`title=""` leaves it out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from semidetr_lite.visualize.style import (
    BLUE,
    BURN_IN_COLOR,
    DPI,
    INK,
    LEGEND_OUTSIDE,
    LINE_COLORS,
    ORANGE,
    RED,
    WIDTH,
    Picture,
    count_of,
    method_color,
    new_plot,
    set_title,
)

# quantities of a log that are fractions, drawn in %
FRACTIONS = ("AP_student", "AP_teacher", "pseudo_precision", "pseudo_recall")

# ---- a training over its steps -------------------------------------------------------------------


def plot_curves(
    logs: dict[str, list[dict]],
    x: str = "step",
    title: str | None = None,
    burn_ins: dict[str, tuple[str, list[dict]]] | None = None,
) -> Picture:
    """AP on the tune split of every run, student and teacher, over steps or minutes.

    Args:
        logs: {name of a run: lines of its log.jsonl}; lines without an AP are skipped. A method has
            its fixed colour, so the name should mention it; a second run of a method gets another
            marker.
        x: "step" or "minutes".
        title: of the figure; None: who ends highest, and how far above the next.
        burn_ins: {name of a run: (what to call it, log)} of the run it continued. That one is a
            grey curve, drawn once, and the run's own curve begins at its end.
    """
    figure, ax = new_plot(WIDTH, 4.2)
    burn_ins = burn_ins or {}
    burn_in_handles = _draw_burn_ins(ax, logs, burn_ins, x)
    ends: list[tuple[float, str, Line2D]] = []
    colors: list[str] = []
    for position, (name, log) in enumerate(logs.items()):
        color = method_color(name, position)
        start = [line for line in burn_ins.get(name, ("", []))[1] if _has_value(line, "AP_teacher")]
        lines = start[-1:] + log
        ax.plot(
            *_series(lines, "AP_student", x),
            gid=f"{name} AP_student",
            color=color,
            linestyle=(0, (3, 1.5)),
            linewidth=1.1,
        )
        steps, values = _series(lines, "AP_teacher", x)
        (curve,) = ax.plot(
            steps,
            values,
            gid=f"{name} AP_teacher",
            label=name,
            color=color,
            linewidth=2.0,
            marker="os^Dv"[colors.count(color) % 5],
            markersize=4,
        )
        colors.append(color)
        if values:
            ends.append((values[-1], name, curve))
    ranked = sorted(ends, key=lambda end: -end[0])
    _add_curve_legend(ax, [curve for _, _, curve in ranked] + burn_in_handles)
    x_label = "step" if x == "step" else "minutes of training"
    ax.set(xlabel=x_label, ylabel="AP on the tune split, %", ylim=(0, None))
    return set_title(figure, title, _curve_finding(ends, ranked))


def _draw_burn_ins(ax: Axes, logs: dict, burn_ins: dict, x: str) -> list[Line2D]:
    """A grey curve for each burn-in that is not itself among the logs, drawn once."""
    drawn: list[list[dict]] = []
    handles = []
    for name in logs:
        label, log = burn_ins.get(name, ("", []))
        steps, values = _series(log, "AP_teacher", x)
        if not values or log in (*drawn, *logs.values()):
            continue
        handles += ax.plot(
            steps,
            values,
            label=label,
            gid="burn-in",
            color=BURN_IN_COLOR,
            linewidth=2.0,
            marker="o",
            markersize=4,
        )
        drawn.append(log)
    return handles


def _add_curve_legend(ax: Axes, handles: list[Line2D]) -> None:
    student = "dashed: student (solid: EMA teacher)"
    dashed = Line2D([], [], color=INK, linewidth=1.1, linestyle="--", label=student)
    legend = ax.legend(
        handles=[*handles, dashed],
        loc="lower right",
        fontsize=8.5,
        framealpha=0.8,
        edgecolor="none",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _curve_finding(ends: list[tuple], ranked: list[tuple]) -> str:
    """Who ends highest, and how far above the first of the others."""
    if not ends:
        return "No evaluation yet"
    best, name, _ = ranked[0]
    finding = f"{name}: the teacher ends at {best:.1f} AP"
    others = [end for end in ends if end is not ranked[0]]
    if others:
        value, other, _ = others[0]
        finding += f", {best - value:.1f} above {other}"
    return finding


def plot_losses(log: list[dict], title: str | None = None) -> Picture:
    """Every loss of a run over its steps on a logarithmic axis, the largest named first.

    Zeros are left out. `title` None: how the total changes.
    """
    figure, ax = new_plot(WIDTH, 3.8)
    log = [line for line in log if line.get("losses")]
    logged = {name for line in log for name in line["losses"]}
    names = sorted(sorted(logged), key=lambda name: -log[-1]["losses"].get(name, 0))
    for position, name in enumerate(names):
        values = np.array([line["losses"].get(name, np.nan) for line in log], dtype=float)
        ax.plot(
            [line["step"] for line in log],
            np.where(values > 0, values, np.nan),
            label=name,
            color=LINE_COLORS[position % len(LINE_COLORS)],
            linestyle=("-", "--", ":")[position // len(LINE_COLORS) % 3],
            linewidth=1.4,
        )
    ax.set(xlabel="step", ylabel="weighted loss", yscale="log")
    ax.tick_params(axis="y", which="both", labelsize=8, colors="#555555", length=2)
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    if names:
        ax.legend(labelspacing=0.3, **LEGEND_OUTSIDE)
    finding = "No loss logged yet"
    if log:
        first, last = (sum(line["losses"].values()) for line in (log[0], log[-1]))
        finding = f"The total goes from {first:.2f} to {last:.2f}"
    return set_title(figure, title, finding)


def plot_pseudo_quality(log: list[dict], title: str | None = None) -> Picture:
    """Precision, recall and number of the pseudo-boxes, and the cost threshold, over the steps.

    A panel without values is left out. `title` None: the last precision and recall.
    """
    panels = {
        "right or found, %": {"precision": "pseudo_precision", "recall": "pseudo_recall"},
        "boxes per image": {"kept": "pseudo_per_image", "mined only": "mined_per_image"},
        "matching cost": {"threshold": "cost_threshold"},
    }
    series = {label: _series(log, key) for keys in panels.values() for label, key in keys.items()}
    filled = {
        panel: [label for label in keys if series[label][0]] for panel, keys in panels.items()
    }
    filled = {panel: labels for panel, labels in filled.items() if labels}
    figure, axes = new_plot(WIDTH, 2.9, max(1, len(filled)))
    for ax, (panel, labels) in zip(np.atleast_1d(axes), filled.items()):
        colors = dict(zip(panels[panel], LINE_COLORS))
        for label in labels:
            ax.plot(*series[label], color=colors[label], linewidth=1.6, label=label)
        ax.set(xlabel="step")
        if panel.endswith("%"):
            ax.set(ylim=(0, 102))
        ax.set_title(panel, fontsize=9, loc="left", color=INK)
        ax.legend(fontsize=8, framealpha=0.7, edgecolor="none")
    finding = "No pseudo-box was measured against the truth"
    (_, precision), (_, recall) = series["precision"], series["recall"]
    if precision and recall:
        finding = f"At the end {precision[-1]:.0f} % of the pseudo-boxes are right; "
        finding += f"they find {recall[-1]:.0f} % of the objects"
    return set_title(figure, title, finding)


def _has_value(line: dict, key: str) -> bool:
    """Whether a line of a log holds a number under `key`: neither missing nor nan."""
    return line.get(key) is not None and not np.isnan(line[key])


def _series(log: list[dict], key: str, x: str = "step") -> tuple[list, list]:
    """The steps (or minutes) and the values of the lines with a number; FRACTIONS in %."""
    lines = [line for line in log if _has_value(line, key)]
    steps = [line["step"] if x == "step" else line["seconds"] / 60 for line in lines]
    factor = 100 if key in FRACTIONS else 1
    return steps, [factor * line[key] for line in lines]


# ---- mining, matching, masks ---------------------------------------------------------------------


def plot_cost_mixture(
    costs: ArrayLike,
    mixture_means: ArrayLike,
    mixture_vars: ArrayLike,
    mixture_weights: ArrayLike,
    threshold: float,
    correct: ArrayLike,
    title: str | None = None,
) -> Picture:
    """Matching costs as a histogram, the two Gaussians of their mixture, and the threshold.

    Args:
        costs: (N,) of pseudo-boxes; those up to the threshold are mined.
        mixture_means, mixture_vars, mixture_weights: one number per component.
        threshold: the highest cost that is mined.
        correct: (N,) bool, the colour of the bars.
        title: of the figure; None: how many are mined, and how many of these are right.
    """
    arrays = (costs, mixture_means, mixture_vars, mixture_weights)
    values, *mixture = (np.asarray(array, dtype=float).reshape(-1) for array in arrays)
    right, threshold = np.asarray(correct, dtype=bool), float(threshold)
    figure, ax = new_plot(WIDTH, 3.6)
    edges = np.histogram_bin_edges(values, bins=max(10, min(40, len(values) // 4)))
    _, _, outlines = ax.hist(
        [values[right], values[~right]],
        edges,
        color=[BLUE, ORANGE],
        label=["right", "wrong"],
        stacked=True,
        histtype="stepfilled",  # an outline each, which is drawn faster than bars
    )
    for outline in outlines[1] if len(values) else ():
        outline.set(hatch="///", edgecolor="white", linewidth=0)
    grid = np.linspace(edges[0], edges[-1], 200)
    names = (("reliable component", "-"), ("unreliable component", "--"))
    for (name, dashes), (mean, variance, weight) in zip(names, sorted(zip(*mixture))):
        exponent = -((grid - mean) ** 2) / (2 * variance)
        density = weight * np.exp(exponent) / np.sqrt(2 * np.pi * variance)
        boxes_per_bar = density * len(values) * (edges[1] - edges[0])
        ax.plot(grid, boxes_per_bar, color=INK, linestyle=dashes, linewidth=1.5, label=name)
    ax.axvline(threshold, color=RED, linewidth=2, label=f"threshold {threshold:.2f}")
    ax.legend(**LEGEND_OUTSIDE)
    ax.set(xlabel="matching cost of a pseudo-box with the student's query", ylabel="pseudo-boxes")
    mined = right[values <= threshold]
    finding = f"The threshold mines {len(mined)} of {len(values)} boxes"
    if len(mined):
        of_mined, of_all = 100 * mined.mean(), 100 * right.mean()
        finding += f"; {of_mined:.0f} % of these are right, against {of_all:.0f} % of all"
    return set_title(figure, title, finding)


def plot_scores_and_costs(
    pools: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]],
    score_threshold: float,
    title: str | None = None,
) -> Picture:
    """Pseudo-boxes by score and cost, right and wrong, and which of them two thresholds take.

    The shaded corner holds the boxes that are mined and not confident.

    Args:
        pools: {name: (scores (N,), costs (N,), right (N,) bool, cost threshold)}, a panel each.
        score_threshold: from which a box is confident.
        title: of the figure; None: the count of each shaded corner.
    """
    figure, axes = new_plot(WIDTH, 3.6, len(pools))
    findings = []
    highest = max(costs.max() for _, costs, _, _ in pools.values())
    lowest = min(costs.min() for _, costs, _, _ in pools.values())
    for ax, (name, (scores, costs, right, threshold)) in zip(np.atleast_1d(axes), pools.items()):
        bottom = lowest - 0.3
        corner = Rectangle((0, bottom), score_threshold, threshold - bottom, color="#FFF3C4")
        ax.add_patch(corner)
        ax.axhline(threshold, color=RED, linewidth=1.6)
        ax.axvline(score_threshold, color="#555555", linestyle=":")
        for chosen, mark, color, label in (
            (right, "o", BLUE, "right"),
            (~right, "x", ORANGE, "wrong"),
        ):
            ax.plot(scores[chosen], costs[chosen], mark, color=color, markersize=5, label=label)
        rescued = (scores < score_threshold) & (costs <= threshold)
        ax.set(xlim=(0, 1), ylim=(bottom, highest + 0.3), xlabel="score of the teacher")
        ax.set_title(name, fontsize=10, loc="left", color=INK)
        findings.append(f"{name} {int((rescued & right).sum())} of {int(rescued.sum())} right")
    np.atleast_1d(axes)[0].set_ylabel("matching cost with the student")
    ax.legend(loc="upper right", fontsize=9)
    return set_title(figure, title, f"Mined and not confident: {', '.join(findings)}")


def plot_costs(
    costs: torch.Tensor,
    queries: Sequence[int] | torch.Tensor = (),
    targets: Sequence[int] | torch.Tensor = (),
    title: str | None = None,
) -> Picture:
    """Costs or scores as a heat map, one object per row and one query per column.

    Args:
        costs: (Q, T); up to 60 values are written out.
        queries, targets: (N,) the pairs of a Match, each marked by a frame.
        title: of the figure; None: the number of pairs.
    """
    table = torch.as_tensor(costs).detach().cpu().numpy().T  # (T, Q)
    table_inches = 0.28 * max(1, len(table))
    inches = table_inches + 0.75
    figure = Picture(figsize=(WIDTH, inches), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0.1, 0.45 / inches, 0.89, table_inches / inches))
    ax.imshow(table, cmap="cividis", aspect="auto")
    middle = (table.min(initial=np.inf) + table.max(initial=-np.inf)) / 2
    for (row, column), value in np.ndenumerate(table) if table.size <= 60 else ():
        color = "black" if value > middle else "white"
        ax.text(column, row, f"{value:.2f}", color=color, fontsize=8, ha="center", va="center")
    pairs = zip(torch.as_tensor(queries).tolist(), torch.as_tensor(targets).tolist())
    for query, target in pairs:
        corner = (query - 0.5, target - 0.5)
        frame = Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=2.5, clip_on=False)
        ax.add_patch(frame)
    ax.set_xticks(range(0, table.shape[1], 1 if table.shape[1] <= 12 else 5))
    ax.set_yticks(range(len(table)), [f"object {row}" for row in range(len(table))])
    ax.tick_params(labelsize=8, length=2)
    ax.set_xlabel("query", fontsize=8, labelpad=1)
    return set_title(
        figure, title, f"{count_of(len(queries), 'pair')} of {table.size} possible ones"
    )


def plot_similarity(
    tables: dict[str, torch.Tensor], names: Sequence[str], title: str | None = None
) -> Picture:
    """Cosines between the objects of one view (rows) and of the other (columns), side by side.

    Args:
        tables: {name: (T, T)}; entry (i, i) compares an object with itself.
        names: of the T objects.
        title: of the figure; None: how similar different objects are in the mean, in each table.
    """
    figure, axes = new_plot(WIDTH, 3.3, len(tables))
    means = []
    for ax, (name, table) in zip(np.atleast_1d(axes), tables.items()):
        values = table.detach().cpu().numpy()
        ax.imshow(values, cmap="cividis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(values):
            color = "black" if value > 0.5 else "white"
            ax.text(column, row, f"{value:.2f}", color=color, fontsize=9, ha="center", va="center")
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.set_title(name, fontsize=10, loc="left", color=INK)
        ax.grid(False)
        means.append(f"{values[~np.eye(len(values), dtype=bool)].mean():.2f}")
    return set_title(figure, title, f"Different objects agree by {', '.join(means)} in the mean")


def plot_attention_mask(
    mask: torch.Tensor,
    queries: int,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Picture:
    """A group mask as blocks: row q shows what query q may see.

    Args:
        mask: (N, N) bool, True = blocked.
        queries: number of matching queries, which come last. The queries before them are cut into
            blocks of equal rows.
        names: of the blocks, the matching one included.
        title: of the figure; None: whether a matching query sees a group.
    """
    mask = torch.as_tensor(mask, dtype=torch.bool).cpu()
    first_matching = len(mask) - queries
    changes = [row for row in range(1, first_matching) if not torch.equal(mask[row], mask[row - 1])]
    edges = sorted({0, *changes, first_matching, len(mask)})
    centers = [(start + end - 1) / 2 for start, end in zip(edges, edges[1:])]
    if names is None:
        names = [f"group {number}" for number in range(1, len(centers))] + ["matching"]
    sees, blocked = BLUE, "#EDEDED"
    figure, ax = new_plot(WIDTH, 5.0)
    colormap = ListedColormap([sees, blocked])
    ax.imshow(mask.numpy(), cmap=colormap, vmin=0, vmax=1, interpolation="nearest")
    inner = np.array(edges[1:-1]) - 0.5
    ax.hlines(inner, -0.5, len(mask) - 0.5, color="white", linewidth=1.5)
    ax.vlines(inner, -0.5, len(mask) - 0.5, color="white", linewidth=1.5)
    ax.set_xticks(centers, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(centers, names, fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="may be seen", ylabel="sees")
    handles = [Patch(color=sees, label="sees"), Patch(color=blocked, label="blocked")]
    ax.legend(handles=handles, **LEGEND_OUTSIDE)
    leaks = int((~mask[first_matching:, :first_matching]).any(0).sum())
    finding = "No matching query sees a group"
    if leaks:
        group_queries = count_of(leaks, "group query", "group queries")
        finding = f"The matching queries see {group_queries}: a leak"
    return set_title(figure, title, finding)


# ---- summaries -----------------------------------------------------------------------------------


NAMED_CLASSES = 25  # more than these have no room for their names below an axis


def show_data_summary(summary: dict[str, dict], title: str | None = None) -> Picture:
    """Histograms of `doctor_data`'s summary: boxes per class, sides of boxes, sides of images.

    `summary` is {name of a part: its counts}; a colour stands for a part. `title` None: the number
    of images and the rarest class.
    """
    figure, (classes, boxes, images) = new_plot(WIDTH, 3.2, 3)
    colors = dict(zip(summary, LINE_COLORS))
    for ax, key in ((boxes, "box_sides"), (images, "image_sides")):
        histograms = {name: part[key] for name, part in summary.items() if key in part}
        _draw_histograms(ax, histograms, colors)
    labelled = {name: part["classes"] for name, part in summary.items() if "classes" in part}
    of_first: dict[str, int] = next(iter(labelled.values()), {})
    names = sorted(of_first, key=lambda name: -of_first[name])  # one order for all parts
    for part_name, counts_of_part in labelled.items():
        values = [counts_of_part.get(name, 0) for name in names]
        ranks = range(1, len(names) + 1)
        classes.plot(ranks, values, color=colors[part_name], marker=".", linewidth=1.2)
    if 0 < len(names) <= NAMED_CLASSES:
        classes.set_xticks(range(1, len(names) + 1), [name[:12] for name in names], rotation=60)
    boxes.set(xlabel="square root of the area, px", ylabel="boxes")
    images.set(xlabel="longer side, px", ylabel="images")
    classes.set(
        xlabel="class, the most frequent first", ylabel="boxes", yscale="symlog", ylim=(0, None)
    )
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    finding = f"{sum(part['images'] for part in summary.values()):,} images"
    counts: dict[str, int] = next(iter(labelled.values()), {})
    if counts:
        rarest = min(counts, key=lambda name: counts[name])
        has = f"has {count_of(counts[rarest], 'box', 'boxes')}"
        finding += f"; of {len(counts)} classes the rarest, {rarest}, {has}"
    return set_title(figure, title, finding)


def _draw_histograms(ax: Axes, histograms: dict[str, dict], colors: dict[str, str]) -> None:
    """Histograms {name: {"edges", "counts"}} as bars side by side."""
    width = 0.85 / max(len(histograms), 1)
    for order, (name, histogram) in enumerate(histograms.items()):
        bins = np.arange(len(histogram["edges"]))
        offset = (order - (len(histograms) - 1) / 2) * width
        ax.bar(bins + offset, histogram["counts"], width, color=colors[name])
        ax.set_xticks(bins - 0.5, histogram["edges"], rotation=60)


def plot_ablation(rows: Sequence, title: str | None = None) -> Picture:
    """Tables of an ablation as dots: one per seed, and a bar of one standard error to either side.

    Args:
        rows: as from `semidetr_lite.training.ablate.summarise`. Each table, detector and percent
            has a panel; all panels share one axis.
        title: of the figure; None: who closes most of the gap. This finding leaves out runs that
            are longer than the first of their row.
    """
    panels: dict[tuple, list] = {}
    for row in rows:
        panels.setdefault((row.table, row.preset, row.detector, row.percent), []).append(row)
    heights = [len(members) + 1.5 for members in panels.values()]
    figure, axes = new_plot(WIDTH, 0.28 * sum(heights) + 0.3, 1, height_ratios=heights)
    values = [value for row in rows for value in row.values]
    values += [row.mean + sign * row.error for row in rows for sign in (-1, 1)]
    limits = (np.nanmin(values) - 2, np.nanmax(values) + 2)
    for ax, ((table, preset, detector, percent), members) in zip(
        np.atleast_1d(axes), panels.items()
    ):
        _draw_ablation_rows(ax, members)
        ax.set(ylim=(len(members) - 0.4, -0.8), xlim=limits)
        ax.tick_params(labelbottom=False)
        panel_title = f"{table}: {detector}, {percent:g} % of the labels ({preset})"
        ax.set_title(panel_title, fontsize=9, loc="left", color=INK)
    ax.set(xlabel="AP on the test split, %")
    ax.tick_params(labelbottom=True)
    return set_title(figure, title, _ablation_finding(rows))


def _draw_ablation_rows(ax: Axes, rows: list) -> None:
    for y, row in enumerate(rows):
        color = method_color(row.row, 2)  # black where a row names no method
        heights = [y] * len(row.values)
        ax.plot(row.values, heights, "o", color=color, markersize=4, alpha=0.5, linewidth=0)
        ax.errorbar(
            row.mean,
            y,
            xerr=0 if np.isnan(row.error) else row.error,
            fmt="D",
            color=color,
            markersize=5,
            capsize=4,
            linewidth=1.6,
        )
        ax.annotate(
            f"{row.mean:.1f}",
            (row.mean, y),
            xytext=(0, 5),
            textcoords="offset points",
            fontsize=7,
            ha="center",
        )
    ax.set_yticks(range(len(rows)), [row.row for row in rows])


def _ablation_finding(rows: Sequence) -> str:
    """Which rows close most of the gap; those within 2 % of the best are not told apart."""
    main = [row for row in rows if row.table == "main" and row.percent < 100 and "," not in row.row]
    with_gap = [row for row in main if not np.isnan(row.gap)]
    if not with_gap:
        return "The ablation"
    best = max(with_gap, key=lambda row: row.gap)
    setting = (best.preset, best.detector, best.percent)
    alike = [
        row
        for row in with_gap
        if (row.preset, row.detector, row.percent) == setting and row.gap >= best.gap - 2
    ]
    *others, last = [row.row for row in alike]
    if others:
        lowest = min(row.gap for row in alike)
        closes = f"{', '.join(others)} and {last} close {lowest:.0f} to"
    else:
        closes = f"{last} closes"
    return f"{closes} {best.gap:.0f} % of the gap at {best.percent:g} % of the labels"
