"""The page about runs: complete, self-contained, escaped, and honest about what is missing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

import semidetr_lite
from semidetr_lite import report, runs, visualize
from semidetr_lite.data import digits
from semidetr_lite.data.images import ImageFolder
from semidetr_lite.data.splits import Concat, Splits, Subset, WithoutLabels
from semidetr_lite.errors import UserError
from semidetr_lite.report import headline, write_report

HITS = r"(\d+) hits?, (\d+) false alarms?, (\d+) missed"
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "<b>&dog"}]
VOID = {"meta", "img", "input", "br"}
NAN = float("nan")


def numbers(text: str) -> list[float]:
    """The numbers of a sentence, in their order."""
    return [float(number) for number in re.findall(r"\d*\.?\d+", text)]


class Scenes:
    """Noise images of two shapes; image i holds i % 3 objects, so the first one none."""

    def __init__(self, count: int):
        self.sizes = [(24, 32) if index % 2 else (32, 24) for index in range(count)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int):
        image = torch.randint(
            0,
            256,
            (3, *self.sizes[index]),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(index),
        )
        boxes = torch.tensor([[2, 2, 12, 12], [12, 10, 22, 22]], dtype=torch.float32)[: index % 3]
        target = {
            "boxes": boxes,
            "labels": torch.arange(index % 3),
            "size": self.sizes[index],
            "image_id": 100 + index,
        }
        return image, target


TEST = Scenes(5)


class Perfect:
    """Finds every object of a test image; one that is `blind` finds none, and sees something where
    nothing is.
    """

    categories = CATEGORIES

    def __init__(self, blind: bool):
        self.blind = blind

    def detect(self, images, score=0.0):
        return [self.look(image) for image in images]

    def look(self, image):
        truth = next(
            target
            for known, target in map(TEST.__getitem__, range(len(TEST)))
            if torch.equal(known, image)
        )
        found = {
            "boxes": truth["boxes"],
            "labels": truth["labels"],
            "scores": torch.full((len(truth["labels"]),), 0.9),
        }
        if self.blind:
            found = {
                "boxes": torch.tensor([[0.0, 0, 5, 5]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.8]),
            }
        return {**found, "size": truth["size"]}


PNG = visualize.png
REAL_LOAD_SPLITS = runs.presets.load_splits
REAL_LOAD_DETECTOR = semidetr_lite.load_detector
DOT = PNG(visualize.Picture(figsize=(0.1, 0.1)))


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """Data and detectors of this file, and no time spent on pictures except where a test wants
    them.
    """
    monkeypatch.setattr(visualize.style, "png", lambda figure, dpi=None: DOT)
    splits = Splits(
        Scenes(2), WithoutLabels(Scenes(4), range(4)), Scenes(2), TEST, CATEGORIES, flip=False
    )
    monkeypatch.setattr(runs.presets, "load_splits", lambda config, file: splits)
    monkeypatch.setattr(
        semidetr_lite,
        "load_detector",
        lambda path, weights: Perfect(blind="supervised" in str(path)),
    )


def config(method: str, **changes) -> dict:
    made = {
        "preset": "digits",
        "method": method,
        "detector": "dino",
        "data": "digits",
        "percent": 10,
        "fold": 1,
        "seed": 4,
    }
    return {
        **made,
        "steps": 400,
        "categories": CATEGORIES,
        "machine": "a <fast> one",
        "command": "semidetr train <x>",
        **changes,
    }


def figures(ap: float) -> dict:
    return {
        "AP": ap,
        "AP50": ap + 0.2,
        "AP75": ap,
        "AP_small": None,
        "AP_medium": NAN,
        "AP_large": -1.0,
    }


def make_run(
    folder, method: str, ap: float | None = None, weights=("student", "teacher"), **changes
):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(method, **changes)))
    lines = [{"step": step, "seconds": 0.5 * step, "losses": {"class": 1.0}} for step in (200, 400)]
    lines[1] |= {"AP_student": 0.3, "AP_teacher": 0.32}
    if ap is not None:
        lines[1]["test"] = {"student": figures(ap), "teacher": figures(ap + 0.01)}
    if method != "supervised":
        lines[1] |= {"pseudo_per_image": 1.5, "mined_per_image": 0.5, "cost_threshold": -1.0}
        boxes = {
            "boxes": [[2, 2, 12, 12], [1, 1, 9, 9]],
            "scores": [0.9, 0.2],
            "labels": [0, 1],
            "cost": [-2.0, None],
        }
        kept = {"kept": [True, False], "mined": [False, False]}
        pseudo = [{"step": step, "image_id": 101, **boxes, **kept} for step in range(0, 401, 40)]
        (folder / "pseudo_boxes.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in pseudo)
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for which in weights:
        (folder / f"{which}.safetensors").write_bytes(b"")
    return folder


class Page(HTMLParser):
    """A parsed page: its visible text, the labels in its pictures, its tags with attributes.

    It fails on tags that do not close in order.
    """

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.tags, self.text = path.read_text(encoding="utf-8"), [], [], ""
        self.labels: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)  # also turns no-break spaces into plain ones

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # as in SVG
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "svg" in self.open:
            self.labels += [data] if self.open[-1] == "text" else []
        elif not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "

    def all(self, tag: str, **wanted) -> list[dict]:
        return [
            found for name, found in self.tags if name == tag and wanted.items() <= found.items()
        ]

    def rows(self) -> dict[str, list[str]]:
        """{first cell: the other cells} of the table's rows."""
        lines = re.findall(r"<tr.*?</tr>", self.source, re.DOTALL)
        cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, re.DOTALL) for line in lines]
        cells = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in cells]
        return {row[0]: row[1:] for row in cells}

    def pictures(self) -> list[dict]:
        return self.all("svg", role="img")

    @property
    def h1(self) -> str:
        return re.search(r"<h1>(.*?)</h1>", self.source)[1].replace("\u00a0", " ")


def headings(page: Page) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.source)


def pair(tmp_path, **changes) -> list:
    """A supervised run, which is blind, and a better one of Semi-DETR."""
    return [
        make_run(tmp_path / "supervised", "supervised", 0.40, **changes),
        make_run(tmp_path / "semi-detr", "semi-detr", 0.52, **changes),
    ]


def test_two_runs_side_by_side(tmp_path):
    path = write_report(pair(tmp_path), tmp_path / "deep" / "out", images=2)
    assert path == tmp_path / "deep" / "out" / "report.html"
    page = Page(path)
    assert page.h1.startswith("Semi-DETR") and numbers(page.h1) == [53.0, 12.0]
    # Sizes of objects that the data do not have are no columns, nor are the labels, which all runs
    # share.
    assert page.rows() == {
        "": ["AP", "AP50", "AP75", "steps", "time"],
        "supervised": ["41.0", "61.0", "41.0", "400", "3.3 min"],
        "supervised, student": ["40.0", "60.0", "40.0", "400", "3.3 min"],
        "Semi-DETR": ["53.0 +12.0", "73.0 +12.0", "53.0 +12.0", "400", "3.3 min"],
        "Semi-DETR, student": ["52.0 +12.0", "72.0 +12.0", "52.0 +12.0", "400", "3.3 min"],
    }
    # Images 1 and 2 hold an object; the blind run misses them all, and raises five false alarms on
    # five images.
    hits = re.findall(HITS, page.text)
    assert hits[:2] == [("0", "1", "1"), ("1", "0", "0")]  # of the first image: supervised, ours
    totals = (("0", "5", "4"), ("4", "0", "0"))  # of all images, in this order
    assert tuple(counts for counts in hits if counts in totals) == totals
    (better,) = re.findall(r"(\d+) images: .*?(\d+); .*?(\d+); .*?(\d+)\.", page.text)
    assert better == ("5", "0", "5", "0")  # images; on how many each is alone best, and equal
    # first images with an object; then by difference: 3, 2, 2, 1, 1 errors apart
    assert re.findall(r"<h3>test scene (\d)</h3>", page.source) == ["1", "2", "2", "1"]
    assert (
        "command semidetr train <x> ;" in page.text and "seed 4; machine a <fast> one;" in page.text
    )
    assert page.text.count("AP recorded in that log") == 2


def test_the_first_screen_says_what_was_compared(tmp_path):
    page = Page(write_report(pair(tmp_path), tmp_path / "out", images=1))
    first = page.text[: page.text.index("What they detect")]
    for fact in (
        "supervised training and Semi-DETR",
        "DINO",
        "handwritten digits",
        "10 % of the labels (2 images",
    ):
        assert fact in first
    assert "4 without labels" in first  # which Semi-DETR also sees
    assert "Semi-DETR trains a detection transformer" in first
    alone = Page(write_report(pair(tmp_path / "more")[:1], tmp_path / "out", images=1))
    assert "Semi-DETR" not in alone.text


def test_columns_that_differ_are_shown_and_those_of_several_sizes(tmp_path):
    few, many = pair(tmp_path)
    (few / "config.json").write_text(json.dumps(config("supervised", percent=1, detector="detr")))
    page = Page(write_report([few, many], tmp_path / "out", images=1))
    assert page.rows()[""] == ["AP", "AP50", "AP75", "detector", "labels", "steps", "time"]
    assert page.rows()["supervised"][3:5] == ["DETR", "1 %"] and page.rows()["Semi-DETR"][3:5] == [
        "DINO",
        "10 %",
    ]
    lines = [json.loads(line) for line in (many / "log.jsonl").read_text().splitlines()]
    lines[-1]["test"]["teacher"] |= {"AP_small": 0.1, "AP_large": 0.7}
    (many / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report([many], tmp_path / "out", images=1))
    assert page.rows()[""][3:5] == ["small", "large"]
    assert (
        page.rows()["Semi-DETR"][3:5] == ["10.0", "70.0"]
        and page.rows()["Semi-DETR, student"][3] == "–"
    )


def test_the_page_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize.style, "png", PNG)
    page = Page(
        write_report(
            [make_run(tmp_path / "semi-detr", "semi-detr", 0.5)], tmp_path / "out", images=1
        )
    )
    assert not re.search(
        r"(?:src|href|url|@import|action)\s*[=(:]?\s*[\"'(]?\s*(?:https?:)?//", page.source
    )
    assert "http://" not in page.source and "https://" not in page.source
    assert page.all("link") == [] and all("src" not in script for script in page.all("script"))
    images = page.all("img")
    assert len(images) == 2 + 1 + 1  # curves, losses, quality
    for image in images:
        kind, code = image["src"].split(",")
        assert kind == "data:image/png;base64" and image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(code, validate=True))) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
    assert len(page.pictures()) == 6 + 2  # frames, gallery
    assert all(picture["aria-label"] for picture in page.pictures())
    photographs = page.all("image")
    assert len(photographs) == 2  # the watched image and the test image, once each
    for image, size in zip(photographs, ((32, 24), (32, 24))):
        kind, code = image["href"].split(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(code, validate=True))) as picture:
            assert picture.size == size
    ids = {found["id"] for _, found in page.tags if "id" in found}
    assert {use["href"] for use in page.all("use")} <= {f"#{name}" for name in ids}
    assert len(page.source) < 1_000_000
    assert "prefers-color-scheme: dark" in page.source and page.all("meta", name="viewport")


def test_the_timeline_shows_six_steps_even_without_scripts(tmp_path):
    page = Page(
        write_report(
            [make_run(tmp_path / "semi-detr", "semi-detr", 0.5)], tmp_path / "out", images=1
        )
    )
    first = page.all("figure", **{"data-frame": "1"})
    frames = [found for found in page.all("figure") if found["data-frame"] != "0"]
    assert [len(first), len(frames)] == [1, 6] and not any("hidden" in found for found in frames)
    assert page.all("input", type="range") == []  # only the script adds the slider
    names = page.all("div", **{"class": "timeline"})[0]["data-names"]
    assert names == "step 0|step 80|step 160|step 240|step 320|step 400"
    assert page.text.count("1 kept (1 right), 0 mined only, 1 dropped") == 6
    assert "unlabelled scene 101, step 80" in page.text
    legend = page.source[page.source.index("<h3>The teacher of") :]
    legend = re.findall(r"</svg> ([a-z, ]+)</span>", legend)
    assert legend == ["truth", "kept", "dropped"]  # what occurs, and no more


def many_dropped(run, count: int = 9):
    """Every recorded line gets one kept box and `count` dropped ones."""
    lines = [json.loads(line) for line in (run / "pseudo_boxes.jsonl").read_text().splitlines()]
    for line in lines:
        line["boxes"] = [[2, 2, 12, 12]] + [[place, 1, place + 9, 9] for place in range(count)]
        line["scores"] = [0.9] + [0.01 * place for place in range(count)]
        line["labels"], line["cost"] = [0] * (count + 1), [None] * (count + 1)
        line["kept"], line["mined"] = [True] + [False] * count, [False] * (count + 1)
    (run / "pseudo_boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_all_dropped_boxes_are_shown_only_when_asked_for(tmp_path):
    run = many_dropped(make_run(tmp_path / "semi-detr", "semi-detr", 0.5))
    page = Page(write_report([run], tmp_path / "out", images=1))
    shown = re.findall(r'<g class="dropped"><path class="under" d="(.*?)"', page.source)
    hidden = re.findall(r'<g class="dropped more"><path class="under" d="(.*?)"', page.source)
    shown = shown[1:]  # the first is the legend's
    assert [len(shown), len(hidden)] == [6, 6]  # of six steps
    assert all(path.count("M") == visualize.BEST_DROPPED for path in shown)
    assert all(path.count("M") == 9 - visualize.BEST_DROPPED for path in hidden)
    scale = report.TIMELINE_WIDTH / 32
    assert shown[0].startswith(f"M{4 * scale:.1f} ")  # the best five begin with the fifth
    # A box to tick, before the timeline and inside the same part, is all that the style sheet
    # needs.
    assert [found["id"] for found in page.all("input", type="checkbox")] == [
        "students",
        "dropped-1",
    ]
    assert page.all("label", **{"for": "dropped-1"})
    assert ".on:checked ~ .timeline .more { display: inline; }" in page.source
    few = Page(
        write_report([make_run(tmp_path / "few", "semi-detr", 0.5)], tmp_path / "out", images=1)
    )
    assert [found["id"] for found in few.all("input")] == ["students"]  # nothing is hidden


def test_few_images_are_not_shown_twice(tmp_path):
    page = Page(write_report(pair(tmp_path), tmp_path / "out", images=len(TEST)))
    assert re.findall(r"<h3>test scene (\d)</h3>", page.source) == ["1", "2", "4"]
    assert "Where they differ most" not in headings(page)


def test_text_is_escaped(tmp_path):
    run = make_run(
        tmp_path / "<script>alert(1)</script>&$x$".replace("/", "_"),
        "<script>",
        0.5,
        data='"><i>data',
    )
    again = make_run(tmp_path / "again", "semi-detr", 0.5, data='"><i>data')
    names = {"again": '"><script>alert(2)'}
    page = Page(write_report([run, again], tmp_path / "out", images=2, names=names))
    assert (
        "<script>alert" not in page.source
        and "<i>data" not in page.source
        and "<fast>" not in page.source
    )
    assert page.source.count("<script>") == 1
    assert '"><script>alert(2)' in page.text and "<b>&dog" in page.labels


def test_missing_figures_are_measured(tmp_path):
    runs = [
        make_run(tmp_path / "semi-detr", "semi-detr"),
        make_run(tmp_path / "supervised", "supervised"),
    ]
    page = Page(write_report(runs, tmp_path / "out", images=1))
    assert page.rows()["Semi-DETR"][:3] == ["100.0", "100.0", "100.0"]
    assert page.rows()["supervised"][0] == "0.0 -100.0"
    assert page.text.count("AP live, measured while this page was written") == 2
    assert headline(runs) == page.h1
    assert page.h1.startswith("Semi-DETR wins") and numbers(page.h1) == [100.0, 100.0]


def test_what_a_run_lacks_is_left_out_with_its_heading(tmp_path):
    run = make_run(tmp_path / "young", "semi-detr", weights=())
    (run / "log.jsonl").unlink()
    (run / "pseudo_boxes.jsonl").unlink()
    page = Page(write_report([run], tmp_path / "out"))
    assert page.h1 and numbers(page.h1) == []
    assert headings(page) == ["Where the numbers come from"]
    for word in ("no AP to show", "no log, so no curve", "no weights, so no detections"):
        assert word in page.text
    assert page.all("img") == page.pictures() == page.all("table") == page.all("input") == []


def test_a_run_without_a_teacher_has_no_empty_sections(tmp_path):
    page = Page(
        write_report(
            [make_run(tmp_path / "supervised", "supervised", 0.4)], tmp_path / "out", images=1
        )
    )
    assert headings(page) == [
        "What they detect",
        "How they got there",
        "Where the numbers come from",
    ]
    assert "pseudo-box was" not in page.text
    both = Page(write_report(pair(tmp_path / "both"), tmp_path / "out", images=1))
    assert headings(both)[1] == "Where they differ most" and "unlabelled" in headings(both)[3]
    assert both.text.count("The teacher of") == 1


def test_student_weights_serve_where_there_is_no_teacher(tmp_path):
    run = make_run(tmp_path / "semi-detr", "semi-detr", weights=("student",))
    page = Page(write_report([run], tmp_path / "out", images=1))
    assert page.rows()["Semi-DETR"][0] == "100.0" and len(page.rows()) == 2
    assert "1 hit, 0 false alarms, 0 missed" in page.text


# ---- who wins --------------------------------------------------------------------------------


def demo(tmp_path, control=0.45, steps=1250, **aps) -> list:
    """The demo's runs: a control and methods that go on from the same burn-in for 500 steps."""
    make_run(tmp_path / "supervised", "supervised", 0.40, steps=400)
    start = {"burn_in": str(tmp_path / "supervised")}
    made = [make_run(tmp_path / "control", "supervised", control, steps=steps, **start)]
    for method, ap in (aps or {"semi_detr": 0.5}).items():
        method = method.replace("_", "-")
        made.append(make_run(tmp_path / method, method, ap, steps=500, **start))
    return made


def test_the_headline_names_one_winner_and_the_first_run(tmp_path):
    made = demo(tmp_path, semi_detr=0.50, mean_teacher=0.48)
    sentence = headline(made)
    assert sentence.startswith("Semi-DETR") and sentence.endswith("of the same time")
    assert numbers(sentence) == [51.0, 5.0]  # its AP, and how far above the first run
    page = Page(write_report(made, tmp_path / "out", images=1))
    assert page.h1 == sentence and list(page.rows())[1] == "supervised, same time"
    second = headline([*made[:1], made[2]])
    assert second.startswith("Mean teacher") and numbers(second)[0] == 49.0
    # another first run, another difference
    other = headline([made[2], made[1]])
    assert other.startswith("Semi-DETR") and other.endswith("mean teacher")
    assert numbers(other) == [51.0, 2.0]


def test_the_headline_says_plainly_that_the_first_run_wins(tmp_path):
    made = demo(tmp_path, control=0.55, semi_detr=0.50, mean_teacher=0.52)
    sentence = headline(made)
    assert sentence.startswith("Supervised training of the same time wins")
    assert numbers(sentence) == [56.0, 3.0] and "mean teacher" in sentence
    assert "Semi-DETR" not in sentence  # it is not the best of the others


def test_a_difference_that_no_decimal_shows_is_a_tie(tmp_path):
    made = demo(tmp_path, control=0.5001, semi_detr=0.5002)
    sentence = headline(made)
    assert "tie" in sentence and numbers(sentence) == [51.0]
    assert "supervised training of the same time" in sentence and "Semi-DETR" in sentence
    page = Page(write_report(made, tmp_path / "out", images=1))
    assert len(page.all("tr", **{"class": "best"})) == 2
    made = demo(tmp_path / "more", control=0.4, semi_detr=0.5002, mean_teacher=0.5001)
    sentence = headline(made)
    assert sentence.startswith("Semi-DETR and mean teacher") and numbers(sentence) == [51.0, 10.0]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"steps": 1000}, True),
        ({"steps": 999}, False),
        ({"burn_in": "elsewhere"}, False),
        ({"burn_in": None}, False),
        ({"method": "mean-teacher"}, False),
    ],
)
def test_same_time_is_the_same_start_and_twice_the_steps(tmp_path, changes, same):
    control, other = demo(tmp_path)
    settings = json.loads((control / "config.json").read_text())
    (control / "config.json").write_text(json.dumps(settings | changes))
    assert ("of the same time" in headline([control, other])) == same


def test_same_time_is_as_long_as_the_longest_of_the_others(tmp_path):
    control, *others = demo(tmp_path, steps=1000, semi_detr=0.5, mean_teacher=0.48)
    assert "of the same time" in headline([control, *others])
    longer = json.loads((others[1] / "config.json").read_text()) | {"steps": 501}
    (others[1] / "config.json").write_text(json.dumps(longer))
    assert "of the same time" not in headline([control, *others])


def test_names_are_those_given(tmp_path):
    made = demo(tmp_path)
    names = {"control": "labels only", "semi-detr": "ours"}
    sentence = headline(made, names)
    assert sentence.startswith("Ours") and sentence.endswith("labels only")
    assert numbers(sentence) == [51.0, 5.0]
    page = Page(write_report(made, tmp_path / "out", images=1, names=names))
    assert {"labels only", "ours"} < set(page.rows())


def test_a_headline_without_figures(tmp_path):
    base, other = demo(tmp_path)
    (base / "log.jsonl").unlink()
    for file in base.glob("*.safetensors"):
        file.unlink()
    assert "51.0 AP" in headline([base, other]) and "none yet" in headline([base, other])
    assert "51.0 AP" in headline([other, base]) and "wins" not in headline([other, base])


# ---- curves ----------------------------------------------------------------------------------


def curves_of(tmp_path, monkeypatch, made) -> list:
    drawn = []
    plot = visualize.plot_curves
    monkeypatch.setattr(
        visualize, "plot_curves", lambda *given: drawn.append(plot(*given)) or drawn[-1]
    )
    write_report(made, tmp_path / "out", images=1)
    return [
        {line.get_gid(): line.get_xydata().tolist() for line in figure.axes[0].lines}
        for figure in drawn
    ]


def test_curves_join_the_end_of_the_burn_in(tmp_path, monkeypatch):
    by_step, by_minute = curves_of(
        tmp_path, monkeypatch, demo(tmp_path, semi_detr=0.5, mean_teacher=0.48)
    )
    end = [400, pytest.approx(32)]
    assert by_step["burn-in"] == [end]
    names = ("supervised, same time", "Semi-DETR", "mean teacher")
    for name in names:
        assert by_step[f"{name} AP_teacher"] == [end, [800, pytest.approx(32)]]
        assert by_step[f"{name} AP_student"] == [[400, pytest.approx(30)], [800, pytest.approx(30)]]
        assert [x for x, _ in by_minute[f"{name} AP_teacher"]] == pytest.approx(
            [200 / 60, 400 / 60]
        )
    assert set(by_step) == {
        "burn-in",
        *(f"{name} AP_{part}" for name in names for part in ("student", "teacher")),
    }


def test_a_burn_in_that_is_compared_itself_is_drawn_once(tmp_path, monkeypatch):
    _, semi = demo(tmp_path)
    by_step, _ = curves_of(tmp_path, monkeypatch, [tmp_path / "supervised", semi])
    assert "burn-in" not in by_step
    assert by_step["Semi-DETR AP_teacher"][0] == by_step["supervised AP_teacher"][-1]


# ---- weights files ---------------------------------------------------------------------------


def weights_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_a_weights_file_stands_where_a_run_does(tmp_path):
    run = make_run(tmp_path / "semi-detr", "semi-detr", 0.52)
    page = Page(
        write_report(
            [weights_file(tmp_path / "supervised.safetensors"), run], tmp_path / "out", images=1
        )
    )
    assert page.h1.startswith("Semi-DETR") and numbers(page.h1) == [53.0, 53.0]
    assert page.rows()["supervised"] == ["0.0", "0.0", "0.0", "–", "–"]
    assert (
        "weights" in page.text
        and page.text.count("AP live, measured while this page was written") == 1
    )
    assert re.findall(HITS, page.text).count(("0", "5", "4")) == 1  # of all images


def test_weights_files_of_the_digits_need_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Perfect, "categories", digits.CATEGORIES)
    loaded, load_splits = [], runs.presets.load_splits

    def record(config, file):
        loaded.append(config["data"])
        return load_splits(config, file)

    monkeypatch.setattr(runs.presets, "load_splits", record)
    names = ("supervised", "semi_detr", "x_1")
    files = [weights_file(tmp_path / f"{name}.safetensors") for name in names]
    page = Page(write_report(files, tmp_path / "out", images=1))
    assert set(loaded) == {"digits"}
    assert list(page.rows())[1:] == ["supervised", "Semi-DETR", "x 1"]
    assert page.h1.startswith("Semi-DETR and x 1") and numbers(page.h1)[-2:] == [100.0, 100.0]
    assert page.text.count("test scene") > 0 and headings(page)[-1] == "Where the numbers come from"
    assert "How they got there" not in headings(page)


def test_weights_files_of_unknown_data_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="one.safetensors: .*which images.*; give a run folder"):
        write_report([weights_file(tmp_path / "one.safetensors")], tmp_path / "out")
    run = make_run(tmp_path / "semi-detr", "semi-detr", 0.5, categories=CATEGORIES[:1])
    with pytest.raises(UserError, match='differ in "categories" of the weights'):
        write_report([run, tmp_path / "one.safetensors"], tmp_path / "out")


def test_a_missing_weights_file(tmp_path, monkeypatch):
    monkeypatch.setattr(semidetr_lite, "load_detector", REAL_LOAD_DETECTOR)
    with pytest.raises(UserError, match="none.safetensors: no such weights"):
        headline([tmp_path / "none.safetensors"])


# ---- names of images -------------------------------------------------------------------------


class Files(Scenes):
    """Scenes that have file names, as CocoDataset has."""

    def __init__(self, count: int):
        super().__init__(count)
        self.names = [f"train/street_{index}.jpg" for index in range(count)]


def test_images_are_called_by_their_files(tmp_path, monkeypatch):
    splits = Splits(
        Scenes(2), WithoutLabels(Files(4), range(4)), Scenes(2), TEST, CATEGORIES, flip=False
    )
    monkeypatch.setattr(
        TEST, "names", [f"street_<{index}>.jpg" for index in range(5)], raising=False
    )
    monkeypatch.setattr(runs.presets, "load_splits", lambda config, file: splits)
    page = Page(
        write_report(
            [make_run(tmp_path / "semi-detr", "semi-detr", 0.5)], tmp_path / "out", images=1
        )
    )
    assert "street_<1>.jpg" in page.text and not re.search(r"test (image|scene) \d", page.text)
    assert "street_1.jpg, step 80" in page.text
    assert any(
        picture["aria-label"].startswith("truth of street_<1>.jpg") for picture in page.pictures()
    )


def test_an_image_keeps_its_name_in_every_kind_of_set(tmp_path):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    folder, files = ImageFolder(tmp_path), Files(3)
    assert report.image_name(Subset(files, [2, 0]), 0) == "street_2.jpg"
    joined = Concat([WithoutLabels(files, [1]), folder])
    assert [report.image_name(joined, index) for index in range(3)] == [
        "street_1.jpg",
        "a.png",
        "b.png",
    ]
    assert report.image_name(Subset(Scenes(2), [1]), 0) is None


# ---- damaged and odd runs --------------------------------------------------------------------


def test_steps_and_time_count_the_burn_in(tmp_path):
    make_run(tmp_path / "burn", "supervised", 0.4)
    run = make_run(
        tmp_path / "semi-detr", "semi-detr", 0.5, burn_in="elsewhere/burn"
    )  # moved together with its burn-in
    assert [line["step"] for line in runs.read_run(run).log] == [600, 800]
    assert [line["seconds"] for line in runs.read_run(run).log] == [300.0, 400.0]
    page = Page(write_report([run], tmp_path / "out", images=1))
    assert "after 400 steps of supervised burn-in" in page.text and "elsewhere/burn" in page.text
    assert page.rows()["Semi-DETR"][-2:] == ["800", "6.7 min"] and "step 800" in page.text


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = make_run(tmp_path / "supervised", "supervised", 0.4)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 600, "los')
    assert [line["step"] for line in runs.read_run(run).log] == [200, 400]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: (run / "config.json").unlink(),
            "semi: no config.json, so this is no run folder",
        ),
        (lambda run: (run / "config.json").write_text("[1"), "config.json: not a JSON object"),
        (lambda run: (run / "config.json").write_text("[1]"), "config.json: not a JSON object"),
        (
            lambda run: (run / "log.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n'),
            "log.jsonl: line 2 is not a JSON object",
        ),
        (
            lambda run: (run / "config.json").write_text(
                json.dumps(config("semi-detr", data="coco"))
            ),
            'differ in "data"',
        ),
    ],
)
def test_damaged_runs_are_one_clear_line(tmp_path, spoil, message):
    runs = [
        make_run(tmp_path / "supervised", "supervised", 0.4),
        make_run(tmp_path / "semi", "semi-detr", 0.5),
    ]
    spoil(runs[1])
    with pytest.raises(UserError) as caught:
        write_report(runs, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_config_with_an_unknown_setting_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.presets, "load_splits", REAL_LOAD_SPLITS)
    run = make_run(tmp_path / "semi", "semi-detr", 0.5)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "recipe": {}}))
    with pytest.raises(UserError, match=r"semi/config\.json: recipe: there is no such setting"):
        write_report([run], tmp_path / "out")


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="report.html: cannot be written"):
        write_report(
            [make_run(tmp_path / "supervised", "supervised", 0.4)], tmp_path / "out", images=1
        )
    with pytest.raises(UserError, match="no run to report on"):
        write_report([], tmp_path / "out")


def test_an_empty_test_split(tmp_path, monkeypatch):
    splits = Splits(
        Scenes(2), WithoutLabels(Scenes(4), range(4)), Scenes(2), Scenes(0), CATEGORIES, flip=False
    )
    monkeypatch.setattr(runs.presets, "load_splits", lambda config, file: splits)
    page = Page(
        write_report([make_run(tmp_path / "supervised", "supervised", 0.4)], tmp_path / "out")
    )
    assert "What they detect" not in headings(page) and "0 test images" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    made = [
        make_run(tmp_path / seed / "semi-detr", "semi-detr", ap)
        for seed, ap in (("seed-0", 0.4), ("seed-1", 0.5))
    ]
    page = Page(write_report(made, tmp_path / "out", images=1))
    one, two = "Semi-DETR (seed-0/semi-detr)", "Semi-DETR (seed-1/semi-detr)"
    assert page.h1 == f"{two}: 51.0 AP on the test split, +10.0 AP over {one}"
    made.append(make_run(tmp_path / "seed-0" / "mean-teacher", "mean-teacher", 0.3))
    page = Page(write_report(made[1:], tmp_path / "out", images=1))
    assert page.h1.startswith("Semi-DETR wins: 51.0 AP")
    with pytest.raises(UserError, match="given twice"):
        write_report([made[0], made[1], made[0] / "." / ""], tmp_path / "out")


def test_a_page_of_the_demo_stays_small(tmp_path, monkeypatch):
    """Eight scenes of the digits in each gallery and eight watched ones over six steps with 30
    boxes each.
    """
    monkeypatch.setattr(visualize.style, "png", PNG)
    scenes = digits.DigitScenes("train", 16)
    splits = Splits(
        scenes, WithoutLabels(scenes, range(8)), scenes, scenes, digits.CATEGORIES, flip=False
    )
    monkeypatch.setattr(runs.presets, "load_splits", lambda config, file: splits)
    boxes = {**scenes[3][1], "scores": torch.full((len(scenes[3][1]["labels"]),), 0.6)}
    nothing = {key: boxes[key][:0] for key in ("boxes", "labels", "scores")}
    monkeypatch.setattr(Perfect, "look", lambda self, image: nothing if self.blind else boxes)
    loaded = lambda path, weights: Perfect(blind="control" in str(path))  # noqa: E731
    monkeypatch.setattr(semidetr_lite, "load_detector", loaded)
    made = demo(tmp_path, semi_detr=0.5, mean_teacher=0.48)
    for run in made[1:]:
        lines = [
            json.loads(line)
            for line in (many_dropped(run, 29) / "pseudo_boxes.jsonl").read_text().splitlines()
        ]
        lines = [{**line, "image_id": image_id} for line in lines for image_id in range(8)]
        (run / "pseudo_boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(made, tmp_path / "out"))
    assert len(page.pictures()) == 2 * 8 * 6 + 2 * 8 * 4
    assert len(page.source) < 1_500_000
