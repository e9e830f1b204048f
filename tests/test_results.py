"""The tables of README.md and docs/*.md: written by docs/make_results.py from the recorded runs."""

import importlib.util
import math
import re
from pathlib import Path

import pytest

from semidetr_lite.errors import UserError

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
make_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_results)
PAGES = make_results.pages(ROOT)


@pytest.fixture(scope="module")
def record() -> make_results.Record:
    return make_results.read_record()


def run(row: str, seed: int, value: float, *, percent=10, steps=1500, **other) -> dict:
    """A made-up line of ablation.jsonl."""
    line = {"table": "main", "row": row, "detector": "dino", "preset": "digits", "data": "digits"}
    line |= {"percent": percent, "seed": seed, "steps": steps, "AP": value, "AP50": value + 0.2}
    return line | {"seconds": 60.0} | other


SMALL = [
    run("supervised", 0, 0.40, steps=4750),
    run("supervised", 1, 0.44, steps=4750),
    run("supervised", 0, 0.72, steps=4750, percent=100),
    run("semi-detr", 0, 0.50),
    run("semi-detr", 1, 0.54),
    run("semi-detr", 2, 0.55),
    run("semi-detr", 0, 0.60, steps=3000),
    run("semi-detr", 0, 0.90, preset="digits-full"),
    run("semi-detr", 0, 0.91, detector="deformable-detr"),
]


# The pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_that_make_results_writes(page, record):
    text = page.read_text(encoding="utf-8")
    stale = f"the tables of {page.name} are not those of the record: run make results"
    assert make_results.rewritten(text, page, record) == text, stale


def test_the_readme_has_the_headline():
    markers = re.findall(r"^<!-- results: (.*) -->$", PAGES[0].read_text("utf-8"), re.MULTILINE)
    assert "headline" in markers


@pytest.mark.parametrize("name", make_results.TABLES)
def test_every_table_fits_together_and_links_to_its_source(name, record):
    page = ROOT / "docs" / "results.md"
    table = make_results.TABLES[name](record)
    assert table.rows and all(len(row) == len(table.header) for row in table.rows)
    text = make_results.markdown(table, page)
    small_print = text.splitlines()[-1]
    links = re.findall(r"\]\((.*?)\)", small_print)
    assert links and all((page.parent / link).is_file() for link in links)
    assert small_print.startswith("<sub>") and "recorded by `" in small_print


def test_only_what_stands_between_markers_changes_and_twice_is_as_once(record):
    text = "before\n<!-- results: full -->\nstale words\n<!-- end results -->\nbetween\n\n"
    text += "```\n<!-- results: full -->\n```\n  <!-- results: demo -->\n<!-- end results -->\n"
    once = make_results.rewritten(text, ROOT / "README.md", record)
    assert once.startswith("before\n<!-- results: full -->\n\n| ") and "stale words" not in once
    assert "```\n<!-- results: full -->\n```" in once  # an example of a marker stays one
    assert once.count("<sub>") == 2 and once.endswith("</sub>\n\n<!-- end results -->\n")
    assert make_results.rewritten(once, ROOT / "README.md", record) == once


@pytest.mark.parametrize(
    "text, line, said",
    [
        ("a\n<!-- results: full -->\nb", 2, "no <!-- end results -->"),
        ("<!-- end results -->", 1, "without"),
        ("<!-- results: heading -->\n<!-- end results -->", 1, "headline"),
        ("<!-- results: full -->\n<!-- results: demo -->\n<!-- end results -->", 2, "line 1"),
    ],
)
def test_a_wrong_marker_is_one_line_that_names_the_page_and_the_line(text, line, said, record):
    with pytest.raises(UserError) as caught:
        make_results.rewritten(text, Path("docs/page.md"), record)
    message = str(caught.value)
    assert message.startswith(f"docs/page.md, line {line}: ") and said in message
    assert "\n" not in message


# The figures


def test_mean_standard_error_and_gap_closed_are_those_computed_by_hand():
    ours = make_results.find(SMALL, "semi-detr", 10)
    assert ours.mean == pytest.approx(53.0)  # of 50, 54 and 55
    assert ours.error == pytest.approx(math.sqrt((9 + 1 + 4) / 2 / 3))
    assert ours.gap == pytest.approx(100 * (53 - 42) / (72 - 42))  # supervised: 40 and 44, all: 72
    assert make_results.ap(ours) == "53.0 ± 1.5" and make_results.gap(ours) == "37 %"
    assert make_results.ap50(ours) == "73.0" and make_results.seeds(ours) == "3"


def test_runs_of_other_lengths_presets_and_detectors_are_rows_of_their_own():
    longer = make_results.find(SMALL, "semi-detr", 10, steps=3000)
    assert make_results.ap(longer) == "60.0" and longer.gap == pytest.approx(60.0)
    full = make_results.find(SMALL, "semi-detr", 10, preset="digits-full")
    other = make_results.find(SMALL, "semi-detr", 10, detector="deformable-detr")
    assert (make_results.ap(full), make_results.ap(other)) == ("90.0", "91.0")
    assert make_results.gap(other) == "–"  # no supervised run of this detector


def test_a_missing_row_is_a_dash():
    record = make_results.Record(SMALL, [], [])
    rows = {row[0]: row[1:] for row in make_results.headline(record).rows}
    assert rows["mean teacher"] == ["–", "–", "–", "–", "41.6"]
    assert rows["**Semi-DETR** (SHM + CQC + CPM)"] == ["–", "–", "53.0 ± 1.5", "37 %", "43.5"]
    assert rows["supervised, all labels"] == ["72.0", "100 %", "72.0", "100 %", "48.6"]
    for name, table in make_results.TABLES.items():
        text = make_results.markdown(table(make_results.Record([], [], [])), ROOT / "README.md")
        assert "–" in text and "nan" not in text, name


def test_the_matching_table_takes_the_teacher_at_every_look_of_seed_0():
    line = {"row": "one-to-one", "percent": 10, "detector": "dino", "preset": "digits"}
    line |= {"steps": 1500, "seed": 0, "step": 500, "AP_teacher": 0.5316}
    lines = [line, line | {"seed": 1, "AP_teacher": 0.1}, line | {"steps": 3000, "AP_teacher": 0.2}]
    runs = [run("one-to-one", seed, 0.5 + seed, table="matching") for seed in (0, 1)]
    *_, last = make_results.matching(make_results.Record(runs, lines, [])).rows
    assert last == ["one-to-one all along", "B", "–", "53.2", "–", "–", "–", "–", "50.0", "70.0"]


def test_a_broken_record_is_one_line_that_names_file_and_line(tmp_path):
    for name in ("ablation.jsonl", "ablation_curves.jsonl"):
        (tmp_path / name).write_text('{"row": "a"}\n')
    with pytest.raises(UserError, match=r"demo\.jsonl: cannot be read"):
        make_results.read_record(tmp_path)
    (tmp_path / "demo.jsonl").write_text('{"row": "a"}\n{"row": \n')
    with pytest.raises(UserError, match=r"demo\.jsonl, line 2: not JSON"):
        make_results.read_record(tmp_path)
