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
from semidetr_lite import report, visualize
from semidetr_lite.data.splits import Splits, WithoutLabels
from semidetr_lite.errors import UserError
from semidetr_lite.report import write_report

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "<b>&dog"}]
VOID = {"meta", "img", "input", "br"}
NAN = float("nan")


class Scenes:
    """Noise images of two shapes; image i holds i % 3 objects, so the first one none."""

    def __init__(self, count: int):
        self.sizes = [(24, 32) if index % 2 else (32, 24) for index in range(count)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int):
        image = torch.randint(
            0, 256, (3, *self.sizes[index]), dtype=torch.uint8, generator=torch.Generator().manual_seed(index)
        )
        boxes = torch.tensor([[2, 2, 12, 12], [12, 10, 22, 22]], dtype=torch.float32)[: index % 3]
        target = {"boxes": boxes, "labels": torch.arange(index % 3), "size": self.sizes[index], "image_id": 100 + index}
        return image, target


TEST = Scenes(5)


class Perfect:
    """Finds every object of a test image; one that is `blind` finds none, and sees something where nothing is."""

    def __init__(self, blind: bool):
        self.blind = blind

    def detect(self, images, score=0.0):
        return [self.look(image) for image in images]

    def look(self, image):
        truth = next(target for known, target in map(TEST.__getitem__, range(len(TEST))) if torch.equal(known, image))
        found = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.full((len(truth["labels"]),), 0.9)}
        if self.blind:
            found = {
                "boxes": torch.tensor([[0.0, 0, 5, 5]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.8]),
            }
        return {**found, "size": truth["size"]}


PNG = visualize.png
REAL_LOAD_SPLITS = report.presets.load_splits
DOT = PNG(visualize.Picture(figsize=(0.1, 0.1)))


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """Data and detectors of this file, and no time spent on pictures except where a test wants them."""
    monkeypatch.setattr(visualize, "png", lambda figure, dpi=None: DOT)
    splits = Splits(Scenes(2), WithoutLabels(Scenes(4), range(4)), Scenes(2), TEST, CATEGORIES, flip=False)
    monkeypatch.setattr(report.presets, "load_splits", lambda config, file: splits)
    monkeypatch.setattr(semidetr_lite, "load_detector", lambda path, weights: Perfect(blind="supervised" in str(path)))


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
    return {"AP": ap, "AP50": ap + 0.2, "AP75": ap, "AP_small": None, "AP_medium": NAN, "AP_large": -1.0}


def make_run(folder, method: str, ap: float | None = None, weights=("student", "teacher"), **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(method, **changes)))
    lines = [{"step": step, "seconds": 0.5 * step, "losses": {"class": 1.0}} for step in (200, 400)]
    lines[1] |= {"AP_student": 0.3, "AP_teacher": 0.32}
    if ap is not None:
        lines[1]["test"] = {"student": figures(ap), "teacher": figures(ap + 0.01)}
    if method != "supervised":
        lines[1] |= {"pseudo_per_image": 1.5, "mined_per_image": 0.5, "cost_threshold": -1.0}
        boxes = {"boxes": [[2, 2, 12, 12], [1, 1, 9, 9]], "scores": [0.9, 0.2], "labels": [0, 1], "cost": [-2.0, None]}
        kept = {"kept": [True, False], "mined": [False, False]}
        pseudo = [{"step": step, "image_id": 101, **boxes, **kept} for step in range(0, 401, 40)]
        (folder / "pseudo_boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pseudo))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for which in weights:
        (folder / f"{which}.safetensors").write_bytes(b"")
    return folder


class Page(HTMLParser):
    """A parsed page: its visible text, its tags with attributes; it fails on tags that do not close in order."""

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.tags, self.text = path.read_text(encoding="utf-8"), [], [], ""
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)  # also turns no-break spaces into plain ones

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "

    def all(self, tag: str, **wanted) -> list[dict]:
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


def test_two_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "supervised", "supervised", 0.40), make_run(tmp_path / "semi-detr", "semi-detr", 0.52)]
    path = write_report(runs, tmp_path / "deep" / "out", images=2)
    assert path == tmp_path / "deep" / "out" / "report.html"
    page = Page(path)
    assert "semi-detr reaches 53.0 AP on the test split, 12.0 more than supervised" in page.text
    assert "supervised teacher 41.0 61.0 41.0 – – – 10 % 400 3.3 min" in page.text
    assert "semi-detr student 52.0 +12.0 72.0 +12.0 52.0 +12.0 – – – 10 % 400 3.3 min" in page.text
    # Images 1 and 2 hold an object; the blind run misses them all, and raises five false alarms on five images.
    assert (
        "On the first 5 test images: supervised 0 hits · 5 false alarms · 4 missed; semi-detr 4 hits · 0 false"
        in page.text
    )
    assert (
        "truth 1 object supervised 0 hits · 1 false alarm · 1 missed semi-detr 1 hit · 0 false alarms · 0" in page.text
    )
    assert "Of 5 images, supervised alone errs least on 0, semi-detr alone errs least on 5; 0 are ties." in page.text
    headings = re.findall(r"<h3>test image (\d)</h3>", page.source)
    assert headings == [
        "1",
        "2",
        "2",
        "1",
    ]  # first images with an object; then by difference: 3, 2, 2, 1, 1 errors apart
    assert "command semidetr train <x> ; seed 4; machine a <fast> one; test figures recorded in that log" in page.text


def test_the_page_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "png", PNG)
    page = Page(write_report([make_run(tmp_path / "semi-detr", "semi-detr", 0.5)], tmp_path / "out", images=1))
    assert not re.search(r"(?:src|href|url|@import|action)\s*[=(:]?\s*[\"'(]?\s*(?:https?:)?//", page.source)
    assert "http://" not in page.source and "https://" not in page.source
    assert page.all("link") == [] and all("src" not in script for script in page.all("script"))
    images = page.all("img")
    assert len(images) == 2 + 1 + 1 + 6 + 2  # curves, losses, quality, frames, gallery
    for image in images:
        kind, code = image["src"].split(",")
        assert kind == "data:image/png;base64" and image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(code, validate=True))) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
    assert len(page.source) < 1_000_000
    assert "prefers-color-scheme: dark" in page.source and page.all("meta", name="viewport")


def test_the_timeline_shows_six_steps_even_without_scripts(tmp_path):
    page = Page(write_report([make_run(tmp_path / "semi-detr", "semi-detr", 0.5)], tmp_path / "out", images=1))
    frames = (
        page.all("figure", **{"data-frame": "1"}),
        [found for found in page.all("figure") if found["data-frame"] != "0"],
    )
    assert [len(found) for found in frames] == [1, 6] and not any("hidden" in found for found in frames[1])
    assert page.all("input") == []  # only the script adds the slider
    names = page.all("div", **{"class": "timeline"})[0]["data-names"]
    assert names == "step 0|step 80|step 160|step 240|step 320|step 400"
    assert page.text.count("1 kept (1 right) · 0 mined only · 1 dropped") == 6
    for word in ("truth", "kept", "mined only", "dropped", "hit", "false alarm", "missed"):
        assert f"{word} " in page.text


def test_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "<script>alert(1)</script>&$x$".replace("/", "_"), "semi-detr", 0.5, data='"><i>data')
    source = write_report([run], tmp_path / "out", images=1).read_text(encoding="utf-8")
    assert "<script>alert" not in source and "<i>data" not in source and "<fast>" not in source
    assert source.count("<script>") == 1


def test_missing_figures_are_measured(tmp_path):
    runs = [make_run(tmp_path / "semi-detr", "semi-detr"), make_run(tmp_path / "supervised", "supervised")]
    page = Page(write_report(runs, tmp_path / "out", images=1))
    assert "semi-detr teacher 100.0 100.0 100.0 100.0 – – 10 %" in page.text
    assert "supervised teacher 0.0 -100.0" in page.text
    assert page.text.count("test figures live, measured while this page was written") == 2


def test_what_a_run_lacks_is_left_out_with_a_sentence(tmp_path):
    run = make_run(tmp_path / "young", "semi-detr", weights=())
    (run / "log.jsonl").unlink()
    (run / "pseudo_boxes.jsonl").unlink()
    page = Page(write_report([run], tmp_path / "out"))
    for sentence in (
        "No accuracy on the test split yet",
        "young (semi-detr): neither a recorded test figure nor weights",
        "young (semi-detr): no log.jsonl, so no curve.",
        "young (semi-detr): no pseudo-box was recorded, so no timeline.",
        "young (semi-detr): no weights, so no detections.",
        "no log; command",
    ):
        assert sentence in page.text
    assert page.all("img") == [] and page.all("table") == []


def test_student_weights_serve_where_there_is_no_teacher(tmp_path):
    page = Page(
        write_report([make_run(tmp_path / "semi-detr", "semi-detr", weights=("student",))], tmp_path / "out", images=1)
    )
    assert "semi-detr student 100.0" in page.text and "semi-detr teacher" not in page.text
    assert "1 hit · 0 false alarms · 0 missed" in page.text


def test_steps_and_time_count_the_burn_in(tmp_path):
    make_run(tmp_path / "burn", "supervised", 0.4)
    run = make_run(
        tmp_path / "semi-detr", "semi-detr", 0.5, burn_in="elsewhere/burn"
    )  # moved together with its burn-in
    assert [line["step"] for line in report.read_run(run).log] == [600, 800]
    assert [line["seconds"] for line in report.read_run(run).log] == [300.0, 400.0]
    page = Page(write_report([run], tmp_path / "out", images=1))
    assert "400 steps after 400 steps of burn-in (elsewhere/burn)" in page.text
    assert "– 10 % 800 6.7 min" in page.text and "step 800" in page.text


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = make_run(tmp_path / "supervised", "supervised", 0.4)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 600, "los')
    assert [line["step"] for line in report.read_run(run).log] == [200, 400]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "semi: no config.json, so this is no run folder"),
        (lambda run: (run / "config.json").write_text("[1"), "config.json: not a JSON object"),
        (lambda run: (run / "config.json").write_text("[1]"), "config.json: not a JSON object"),
        (
            lambda run: (run / "log.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n'),
            "log.jsonl: line 2 is not a JSON object",
        ),
        (
            lambda run: (run / "config.json").write_text(json.dumps(config("semi-detr", data="coco"))),
            'differ in "data"',
        ),
    ],
)
def test_damaged_runs_are_one_clear_line(tmp_path, spoil, message):
    runs = [make_run(tmp_path / "supervised", "supervised", 0.4), make_run(tmp_path / "semi", "semi-detr", 0.5)]
    spoil(runs[1])
    with pytest.raises(UserError) as caught:
        write_report(runs, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_config_without_a_setting_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report.presets, "load_splits", REAL_LOAD_SPLITS)
    with pytest.raises(UserError, match=r"semi/config\.json: .*KeyError: 'recipe'"):
        write_report([make_run(tmp_path / "semi", "semi-detr", 0.5)], tmp_path / "out")


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(UserError, match="report.html: cannot be written"):
        write_report([make_run(tmp_path / "supervised", "supervised", 0.4)], tmp_path / "out", images=1)
    with pytest.raises(UserError, match="no run to report on"):
        write_report([], tmp_path / "out")


def test_an_empty_test_split(tmp_path, monkeypatch):
    splits = Splits(Scenes(2), WithoutLabels(Scenes(4), range(4)), Scenes(2), Scenes(0), CATEGORIES, flip=False)
    monkeypatch.setattr(report.presets, "load_splits", lambda config, file: splits)
    page = Page(write_report([make_run(tmp_path / "supervised", "supervised", 0.4)], tmp_path / "out"))
    assert "The test split holds no image." in page.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / seed / "semi-detr", "semi-detr", ap) for seed, ap in (("seed-0", 0.4), ("seed-1", 0.5))]
    page = Page(write_report(runs, tmp_path / "out", images=1))
    assert "seed-1/semi-detr reaches 51.0 AP on the test split, 10.0 more than seed-0/semi-detr" in page.text
    runs.append(make_run(tmp_path / "seed-0" / "mean-teacher", "mean-teacher", 0.3))
    page = Page(write_report(runs[1:], tmp_path / "out", images=1))
    assert " semi-detr reaches 51.0 AP" in page.text
    with pytest.raises(UserError, match="given twice"):
        write_report([runs[0], runs[1], runs[0] / "." / ""], tmp_path / "out")
