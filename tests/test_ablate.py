"""The comparison: what is run, what is not run again, and the arithmetic of its tables."""

import json
import math
import sys

import pytest

from semidetr_lite import cli
from semidetr_lite.data import digits
from semidetr_lite.errors import UserError
from semidetr_lite.training import presets
from semidetr_lite.training.ablate import (
    ROWS,
    TABLES,
    Ablation,
    Job,
    markdown,
    paired_differences,
    read_jsonl,
    summarise,
)
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import change, differences
from semidetr_lite.visualize import plot_ablation, png
from tests.test_cli import FEW, SMALL, coco_folder

FIELDS = (
    "table row method detector data percent fold seed steps AP AP50 seconds commit machine".split()
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    recipe = change(presets.PRESETS["digits"], **SMALL, steps=2, burn_in_steps=1)
    monkeypatch.setitem(presets.PRESETS, "digits", recipe)
    monkeypatch.setattr(digits, "COUNTS", FEW)


def preset(**changes):
    return change(presets.PRESETS["digits"], **changes)


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["semidetr", "ablate", *map(str, words)])
    return cli.main()


def test_rows_percents_and_seeds_are_run_once_and_only_what_is_missing_later(
    monkeypatch, tmp_path, capsys
):
    words = ["--out", tmp_path, "--percents", 50, 100, "--rows", "supervised", "+SHM", "--steps", 1]
    assert command(monkeypatch, *words, "--seeds", 3) == 0
    lines = read_jsonl(tmp_path / "ablation.jsonl")
    assert [(line["row"], line["percent"], line["steps"]) for line in lines] == [
        ("supervised", 50, 3),
        ("+SHM", 50, 1),
        ("supervised", 100, 3),
    ]
    assert all(
        set(FIELDS) <= set(line) and line["table"] == "main" and line["seed"] == 3 for line in lines
    )
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "dino/50pct/fold4_seed3/+SHM/config.json").read_text())[
        "burn_in"
    ].endswith("burn-in")
    runs = []
    monkeypatch.setattr(Run, "run", lambda run: runs.append(run.out.name))
    assert command(monkeypatch, *words, "--seeds", 3) == 0 and not runs
    capsys.readouterr()
    assert command(monkeypatch, "--out", tmp_path, "--show") == 0
    assert "| +SHM | 1 |" in capsys.readouterr().out


def test_a_run_counts_in_every_table_that_names_it(tmp_path):
    ablation = Ablation(tmp_path / "runs", tmp_path / "record.jsonl", quiet=True)
    ablation.run(["main", "matching"], ["semi-detr", "stage-wise"], [50], [0])
    lines = read_jsonl(tmp_path / "record.jsonl")
    assert [(line["table"], line["row"]) for line in lines] == [
        ("main", "semi-detr"),
        ("matching", "stage-wise"),
    ]
    assert {key: lines[0][key] for key in ("AP", "seconds")} == {
        key: lines[1][key] for key in ("AP", "seconds")
    }
    assert sorted(path.name for path in (tmp_path / "runs/dino/50pct/fold1_seed0").iterdir()) == [
        "burn-in",
        "semi-detr",
    ]


def test_a_run_of_another_table_is_not_made_again(tmp_path):
    """On whatever machine it was made: its folder need not be here."""
    record = tmp_path / "record.jsonl"
    Ablation(tmp_path / "there", record, quiet=True).run(["main"], ["semi-detr"], [50], [0])
    Ablation(tmp_path / "here", record, quiet=True).run(
        ["matching", "boxes"], ["stage-wise", "union"], [50], [0]
    )
    first, *others = read_jsonl(record)
    assert [(line["table"], line["row"]) for line in others] == [
        ("matching", "stage-wise"),
        ("boxes", "union"),
    ]
    assert all({**line, "table": "main", "row": "semi-detr"} == first for line in others)
    assert not (tmp_path / "here").exists()


def test_a_run_of_other_settings_is_another_run(tmp_path):
    record = tmp_path / "record.jsonl"
    plain = Ablation(tmp_path / "plain", record, quiet=True)
    batch = Ablation(tmp_path / "batch", record, preset(projector_norm="batch"), quiet=True)
    for ablation in (plain, batch, plain, batch):
        ablation.run(["main"], ["semi-detr"], [50], [0])
    lines = read_jsonl(record)
    assert [line.get("changes") for line in lines] == [None, {"projector_norm": "batch"}]
    curves = read_jsonl(tmp_path / "record_curves.jsonl")
    assert {str(line.get("changes")) for line in curves} == {
        "None",
        "{'projector_norm': 'batch'}",
    }
    summaries = summarise(lines)
    assert [row.preset for row in summaries] == ["digits", "digits, projector_norm batch"]


def test_an_unfinished_run_goes_on(monkeypatch, tmp_path):
    ablation = Ablation(
        tmp_path, tmp_path / "record.jsonl", preset(steps=2, log_every=1), quiet=True
    )
    step = Run.train_step

    def stopped(run, batch):
        if run.config.method == "mean-teacher" and run.step == 1:
            raise KeyboardInterrupt
        return step(run, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", stopped)
        ablation.run(["main"], ["mean-teacher"], [50], [0])
    steps = []
    monkeypatch.setattr(
        Run, "train_step", lambda run, batch: steps.append(run.step) or step(run, batch)
    )
    ablation.run(["main"], ["mean-teacher"], [50], [0])
    assert steps == [1] and len(read_jsonl(tmp_path / "record.jsonl")) == 1


def test_every_row_runs_on_coco_data(tmp_path):
    data, names = coco_folder(tmp_path / "data"), [name for name in ROWS if not ROWS[name].detector]
    settings = preset(steps=1, data=str(data), unlabelled_batch_size=4)  # mixing takes four at once
    ablation = Ablation(tmp_path, tmp_path / "record.jsonl", settings, quiet=True)
    ablation.run(
        list(TABLES),
        [row for table in TABLES.values() for row, name in table.items() if name in names],
        [50],
        [0],
    )
    lines = read_jsonl(tmp_path / "record.jsonl")
    assert len(lines) == sum(name in names for table in TABLES.values() for name in table.values())
    assert all(math.isfinite(line["AP"]) for line in lines)


def test_rows_differ_in_what_their_names_say():
    def settings(name):
        return Ablation("x", "x").config(Job("main", name, name, 10, 0, 1))[0]

    paper = settings("semi-detr")
    allowed = {"method", "steps", "burn_in"}
    for name, row in ROWS.items():
        if not row.detector:
            changed = differences(settings(name), paper)
            assert {path[-1] for path in changed} - allowed <= set(row.changes), name
            assert change(settings(name), **row.changes) == settings(name), name
    boxes = [settings(name).semi_detr.consistency_boxes for name in ("+SHM", "+SHM+CQC")]
    assert boxes == ["none", "confident"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--rows", "best"], "no row called 'best' in main: choose from supervised"),
        (["--show"], "no finished run to show"),
        (["--seeds"], "nothing to run: give tables, rows, percents and seeds"),
        (["--percents", "100", "--rows", "semi-detr"], "nothing to run: "),
        (["--steps", "0"], "--steps: input should be greater than or equal to 1, got 0"),
        (["--folds", "x"], "--folds x goes with --data"),
    ],
)
def test_bad_input_gets_one_line(monkeypatch, tmp_path, capsys, words, said):
    assert command(monkeypatch, "--out", tmp_path / "none", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_of_other_runs_is_refused(tmp_path):
    Ablation(tmp_path, tmp_path / "a.jsonl", quiet=True).run(["main"], ["supervised"], [50], [0])
    with pytest.raises(UserError, match="holds a run with another steps; choose another --out"):
        Ablation(tmp_path, tmp_path / "a.jsonl", preset(steps=3)).run(
            ["main"], ["supervised"], [50], [0]
        )
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSON lines"):
        read_jsonl(tmp_path / "a.jsonl")


def made(row: str, percent: float, values, table="main") -> list[dict]:
    same = {
        "table": table,
        "row": row,
        "preset": "digits",
        "detector": "dino",
        "percent": percent,
        "seconds": 60,
    }
    return [
        {**same, "AP": value / 100, "AP50": value / 50, "seed": seed, "fold": seed + 1}
        for seed, value in enumerate(values)
    ]


def test_mean_error_and_gap_are_the_closed_forms():
    lines = (
        made("supervised", 10, [40, 42])
        + made("supervised", 100, [71])
        + made("semi-detr", 10, [55, 57, 62])
    )
    rows = {(row.row, row.percent): row for row in summarise(lines)}
    best = rows["semi-detr", 10]
    assert best.mean == pytest.approx(58) and best.ap50 == pytest.approx(116) and best.minutes == 1
    assert best.error == pytest.approx(math.sqrt((9 + 1 + 16) / 2 / 3))
    assert best.gap == pytest.approx(100 * (58 - 41) / (71 - 41))
    assert (
        rows["supervised", 10].gap == 0
        and rows["supervised", 100].error != rows["supervised", 100].error
    )
    text = "\n".join(markdown(list(rows.values())))
    assert "| semi-detr | 3 | 58.0 ± 2.1 | 116.0 | 57 % |  | 1 |" in text
    lonely = summarise(made("semi-detr", 5, [50]))
    assert lonely[0].gap != lonely[0].gap and "nan" not in "\n".join(markdown(lonely))


def test_each_seed_has_a_fold_of_its_own_unless_one_is_given(monkeypatch, tmp_path):
    words = ["--rows", "supervised", "--steps", 1, "--percents", 50, 100]
    assert command(monkeypatch, "--out", tmp_path, *words, "--seeds", 0, 2) == 0
    lines = read_jsonl(tmp_path / "ablation.jsonl")
    drawn = [(line["percent"], line["seed"], line["fold"]) for line in lines]
    # with all labels every draw is the same
    assert drawn == [(50, 0, 1), (50, 2, 3), (100, 0, 1), (100, 2, 1)]
    other = tmp_path / "other"
    assert command(monkeypatch, "--out", other, *words[:4], "--percents", 50, "--fold", 5) == 0
    assert {line["fold"] for line in read_jsonl(other / "ablation.jsonl")} == {5}


def test_the_difference_is_of_pairs_of_one_seed_and_fold():
    base, ours = made("mean-teacher", 10, [50, 60, 40]), made("semi-detr", 10, [52, 63, 44, 90])
    assert paired_differences(ours, base) == pytest.approx([2, 3, 4])
    rows = {row.row: row for row in summarise(base + ours)}
    best = rows["semi-detr"]
    # the values scatter by tens of AP, the differences by one
    assert (best.difference, best.difference_error) == pytest.approx((3, 1 / math.sqrt(3)))
    assert best.pairs == 3 and best.error > 9 and math.isnan(rows["mean-teacher"].difference)
    assert "| +3.0 ± 0.6 (3) |" in "\n".join(markdown(list(rows.values())))
    elsewhere = [line | {"fold": 7} for line in base]
    assert math.isnan({row.row: row for row in summarise(elsewhere + ours)}["semi-detr"].difference)


def test_runs_of_several_lengths_are_rows_of_their_own():
    lines = [
        *(
            {**line, "steps": 4750}
            for line in made("supervised", 10, [40]) + made("supervised", 100, [70])
        ),
        *({**line, "steps": 8500} for line in made("supervised", 10, [45])),
        *({**line, "steps": 1500} for line in made("semi-detr", 10, [55, 57])),
        *({**line, "steps": 3000} for line in made("semi-detr", 10, [60])),
    ]
    rows = {(row.row, row.percent): row for row in summarise(lines)}
    assert rows["semi-detr", 10].mean == pytest.approx(56)
    assert rows["semi-detr", 10].gap == pytest.approx(
        100 * 16 / 30
    )  # 3,750 supervised steps: the run of 4,750
    assert rows["semi-detr, 3,000 steps", 10].gap == pytest.approx(
        100 * 15 / 25
    )  # 7,500: that of 8,500
    assert rows["supervised, 8,500 steps", 10].gap == 0


def test_the_picture_says_the_finding():
    lines = (
        made("supervised", 10, [40, 42])
        + made("supervised", 100, [71])
        + made("semi-detr", 10, [55, 57, 62])
    )
    figure = plot_ablation(summarise(lines + made("mined", 10, [50], "boxes")))
    assert figure.get_suptitle() == "semi-detr closes 57 % of the gap at 10 % of the labels"
    assert [len(ax.get_yticks()) for ax in figure.axes] == [2, 1, 1] and png(figure)
    assert {ax.get_xlim() for ax in figure.axes} == {
        (38, 73)
    }  # one axis: two panels can be compared
    longer = [line | {"steps": 3000} for line in made("semi-detr", 10, [65])]
    assert (
        "closes 57 %" in plot_ablation(summarise(lines + longer)).get_suptitle()
    )  # its supervised run is shorter
    assert png(plot_ablation(summarise(made("mined", 10, [50], "boxes"))))


def test_other_data_has_tables_of_its_own():
    ours, theirs = (
        made("semi-detr", 10, [50]),
        [line | {"data": "x.json"} for line in made("semi-detr", 10, [60])],
    )
    assert [(row.preset, row.values) for row in summarise(ours + theirs)] == [
        ("digits", [50]),
        ("preset digits on x.json", [60]),
    ]


def test_rows_that_nothing_tells_apart_are_named_together():
    lines = (
        made("supervised", 10, [40])
        + made("supervised", 100, [70])
        + made("mean-teacher", 10, [50])
    )
    figure = plot_ablation(
        summarise([*lines, *made("+SHM", 10, [49.7]), *made("semi-detr", 10, [45])])
    )
    assert (
        figure.get_suptitle()
        == "mean-teacher and +SHM close 32 to 33 % of the gap at 10 % of the labels"
    )


def test_options_of_the_data_reach_every_run(tmp_path):
    ablation = Ablation(
        tmp_path, tmp_path / "record.jsonl", preset(data="x.json", folds="f", flip=False)
    )
    job = Job("main", "semi-detr", "semi-detr", 10, 0, 1)
    for config in (ablation.config(job)[0], ablation.config(job, burn_in=True)[0]):
        assert (config.data_files.folds, config.views.flip) == ("f", False)


def test_what_was_measured_during_training_is_kept_once(tmp_path):
    ablation = Ablation(
        tmp_path,
        tmp_path / "record.jsonl",
        preset(steps=2, log_every=1, evaluate_every=1),
        quiet=True,
    )
    ablation.run(["main", "matching"], ["semi-detr", "stage-wise"], [50], [0])
    lines = read_jsonl(tmp_path / "record_curves.jsonl")
    assert [(line["row"], line["step"]) for line in lines] == [("semi-detr", 1), ("semi-detr", 2)]
    assert {
        "AP_teacher",
        "pseudo_precision",
        "pseudo_recall",
        "duplicates",
        "duplicates_nms",
    } <= set(lines[0])
