"""Fuzz: whatever files and words a command is given, it works or says one line with status 2, and
loses nothing.

Hypothesis mutates sound input: entries of JSON (gone, doubled, of another type, out of range),
bytes of any file (cut, flipped, put in, from another file), words of the command line. The examples
are the same in every run; FUZZ=10 tries ten times as many.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from semidetr_lite import cli
from semidetr_lite.data import digits
from semidetr_lite.training import presets
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import change
from tests.test_cli import FEW, SMALL, coco_folder

MORE = int(os.environ.get("FUZZ", "1"))
TEXTS = [
    "", " ", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[31m", "$\\frac{$", "x" * 5000, "\ud800",
    "日本語", "<b>&", "nan", "train", "dino", "mixture", "%s{0}", "-1", "digits", "auto",
]  # fmt: skip
ODD = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    3.5,
    -0.0,
    1e-9,
    1e30,
    1e308,
    float("inf"),
    float("nan"),
    2**31,
    2**63,
    10**30,
]
ODD += [
    *TEXTS,
    [],
    {},
    [None],
    [[]],
    {"a": None},
    [0, 0, 0, 0],
    [1e308] * 4,
    [float("nan")] * 4,
    [-5, -5, 9, 9],
]


def examples(count: int):
    """So many examples, the same in every run."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    how = {"max_examples": MORE * count, "deadline": None, "derandomize": True, "database": None}
    return settings(**how, suppress_health_check=quiet, report_multiple_bugs=False)


def places(document, at=()):
    """The path of every entry of a JSON document."""
    rows = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in rows:
        yield *at, key
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


@st.composite
def mutated_json(draw, text: str) -> bytes:
    """A JSON document with one to three of its entries changed."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(document))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        parent = document
        for step in above:
            parent = parent[step]
        change = draw(st.sampled_from(["set", "set", "set", "delete", "double", "swap", "nest"]))
        if change == "set":
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif change == "delete":
            del parent[key]
        elif change == "double" and isinstance(parent, list):
            parent.append(parent[key])
        elif change == "swap":
            *above, other = draw(st.sampled_from(found))
            parent[key] = json.loads(json.dumps(_at(document, (*above, other))))
        else:
            parent[key] = [parent[key]]
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _at(document, path):
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    return document


@st.composite
def mutated_bytes(draw, content: bytes) -> bytes:
    """A file cut off, emptied, with bytes changed, taken out or put in, or in another encoding."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "put", "take", "double", "empty", "code"]))
    if kind == "empty" or not content:
        return draw(
            st.sampled_from(
                [b"", b"\0" * 64, b"\n", b"null", b"[]", b"{}", b"[" * 50_000, b"\xff\xfe", b"\x80"]
            )
        )
    start = draw(st.integers(0, len(content) - 1))
    stop = min(len(content), start + draw(st.integers(1, 40)))
    if kind == "cut":
        return content[:start]
    if kind == "flip":
        for _ in range(draw(st.integers(1, 8))):
            at = draw(st.integers(0, len(content) - 1))
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        return content
    if kind == "put":
        return content[:start] + draw(st.binary(min_size=1, max_size=12)) + content[start:]
    if kind == "take":
        return content[:start] + content[stop:]
    if kind == "double":
        return content[:stop] + content[start:]
    return content.decode("latin-1").encode(
        draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"]))
    )


def changed(file: Path) -> st.SearchStrategy[bytes]:
    """Mutations of a file: of its entries if it is JSON, and of its bytes."""
    content = file.read_bytes()
    if file.suffix == ".jsonl":
        rows = json.dumps([json.loads(line) for line in content.splitlines()])
        entries = mutated_json(rows).map(
            lambda text: b"\n".join(json.dumps(row).encode() for row in json.loads(text))
        )
        return st.one_of(entries, entries, mutated_bytes(content))
    if file.suffix != ".json":
        return mutated_bytes(content)
    return st.one_of(
        mutated_json(content.decode()), mutated_json(content.decode()), mutated_bytes(content)
    )


def tree(folder: Path) -> dict[str, bytes]:
    """The content of all files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def call(*words) -> tuple[int, str]:
    """Status and stderr of a command, in this process.

    Exceptions that the command lets out are not caught.
    """
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["semidetr", *map(str, words)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            status = cli.main()
    except SystemExit as stop:  # of the parser of command lines
        status = stop.code
        assert status in (0, 2), status
        assert "Traceback" not in out.getvalue() + err.getvalue()
        return status, ""
    finally:
        sys.argv = before
    return status, err.getvalue()


def check(folder: Path, *words, kept: bool = True) -> int:
    """Run a command: it works, or says one line; and the folder keeps what it had."""
    before = tree(folder)
    status, said = call(*words)
    assert status in (0, 2)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == (status == 2) and "Traceback" not in said
    if status:
        assert said.splitlines()[-1] == lines[0] and len(lines[0]) < 2000, said
    after = tree(folder)
    assert not [name for name in after if name.endswith(".part")]
    if status or kept:
        assert {name: after.get(name) for name in before} == before
    return status


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            presets.PRESETS, "digits", change(presets.PRESETS["digits"], **SMALL, steps=2)
        )
        patch.setattr(digits, "COUNTS", FEW)
        yield


@pytest.fixture(scope="module")
def sound(small, tmp_path_factory) -> Path:
    """Sound input of every kind, and a finished run."""
    root = tmp_path_factory.mktemp("sound")
    data = coco_folder(root / "coco", 4)
    rows = [
        {**a, "score": 0.5}
        for a in json.loads((data / "instances_val.json").read_text())["annotations"]
    ]
    (root / "detections.json").write_text(json.dumps(rows))
    for number in range(2):
        pixels = np.full((24, 32, 3), 60 * number, dtype=np.uint8)
        for folder in ("voc/JPEGImages", "yolo/images/train"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number}.jpg")
        box = "<xmin>3</xmin><ymin>4</ymin><xmax>9</xmax><ymax>12</ymax>"
        entry = f"<object><name>box</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
        size = "<size><width>32</width><height>24</height><depth>3</depth></size>"
        (root / "voc/Annotations").mkdir(exist_ok=True)
        (root / f"voc/Annotations/{number}.xml").write_text(
            f"<annotation>{size}{entry}</annotation>"
        )
        (root / "yolo/labels/train").mkdir(parents=True, exist_ok=True)
        (root / f"yolo/labels/train/{number}.txt").write_text(
            "0 0.5 0.5 0.25 0.5\n1 0.2 0.2 0.1 0.1\n"
        )
    (root / "yolo/data.yaml").write_text(
        "path: .\ntrain: images/train\nnames:\n  0: box\n  1: bar\n"
    )
    words = ["--data", data, "--percent", 50, "--out", root / "run", "--workers", 0]
    assert call("train", "--preset", "digits", *words)[0] == 0
    return root


@pytest.fixture
def work(sound, tmp_path) -> Path:
    """A copy of the sound input that a test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "work"))


@contextlib.contextmanager
def spoilt(file: Path, content: bytes):
    """Replace a file for a while."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def fuzz(work: Path, name: str, count: int, *words, kept=True):
    """Mutate the file `name` below `work`, `count` times, and run the command each time."""
    file, seen = work / name, []

    @examples(count)
    @given(content=changed(file))
    def one(content):
        with spoilt(file, content):
            seen.append(check(work, *words, kept=kept))

    one()
    assert 2 in seen


@pytest.mark.parametrize("name", ["instances_train.json", "instances_val.json"])
def test_annotation_json(work, name):
    fuzz(work, f"coco/{name}", 200, "doctor", "--data", work / "coco")


def test_truth_and_detections(work):
    words = [
        "evaluate",
        "--truth",
        work / "coco/instances_val.json",
        "--detections",
        work / "detections.json",
    ]
    fuzz(work, "detections.json", 200, *words)
    fuzz(work, "coco/instances_val.json", 150, *words)


def test_loading_what_the_doctor_lets_pass(work):
    """Training goes through another door; the first batch is drawn from what came through it."""
    words = [
        "train",
        "--preset",
        "digits",
        "--data",
        work / "coco",
        "--percent",
        50,
        "--workers",
        0,
        "--steps",
        1,
        "--out",
    ]
    file = work / "coco/instances_train.json"

    @examples(40)
    @given(content=changed(file))
    def one(content):
        with spoilt(file, content):
            check(work, *words, work.parent / "trained")
        shutil.rmtree(work.parent / "trained", ignore_errors=True)

    one()


def test_voc_xml(work):
    fuzz(work, "voc/Annotations/0.xml", 200, "doctor", "--data", work / "voc")


def test_yolo(work):
    fuzz(work, "yolo/labels/train/0.txt", 150, "doctor", "--data", work / "yolo")
    fuzz(work, "yolo/data.yaml", 150, "doctor", "--data", work / "yolo")


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
def test_images(work, kind):
    folder = work / "pictures"
    folder.mkdir()
    Image.effect_noise((20, 14), 90).convert("RGB").save(folder / f"1.{kind}")
    shutil.copy(work / "voc/JPEGImages/0.jpg", folder / "sound.jpg")
    fuzz(work, f"pictures/1.{kind}", 50, "doctor", "--data", work / "coco", "--unlabelled", folder)


def test_weights(work):
    words = ["predict", work / "run", work / "voc/JPEGImages/0.jpg", "--out", work.parent / "found"]
    fuzz(work, "run/best.safetensors", 120, *words)


def test_weights_with_another_header(work):
    """The header is JSON of its own: its length in 8 bytes, then it, then the numbers."""
    file = work / "run/best.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    about, seen = header["__metadata__"]["semidetr_lite"], []

    @examples(150)
    @given(about=mutated_json(about))
    def one(about):
        header["__metadata__"]["semidetr_lite"] = about.decode("utf-8", "replace")
        text = json.dumps(header).encode()
        with spoilt(file, len(text).to_bytes(8, "little") + text + numbers):
            words = [
                "predict",
                work / "run",
                work / "voc/JPEGImages/0.jpg",
                "--out",
                work.parent / "found",
            ]
            seen.append(check(work, *words))

    one()
    assert 2 in seen


def test_weights_of_others(work):
    tensors = {
        "class_embed.weight": torch.zeros(4, 8),
        "transformer.decoder.layers.0.norm1.weight": torch.zeros(8),
    }
    torch.save({"model": tensors}, work / "others.pth")
    fuzz(work, "others.pth", 100, "doctor", "--weights", work / "others.pth")


@pytest.mark.parametrize(("command", "count"), [("evaluate", 120), ("compare", 25), ("train", 120)])
def test_config_of_a_run(work, command, count, monkeypatch):
    monkeypatch.setattr(Run, "_loader", lambda self: [])
    go = Run.run
    monkeypatch.setattr(Run, "run", lambda self: {"test": {}, **go(self)})
    more = {
        "compare": ["--out", work.parent / "page", "--images", 1],
        "train": ["--resume", "--out", work / "run"],
    }
    words = [command, *([] if command == "train" else [work / "run"]), *more.get(command, [])]
    if command == "train":  # which reads config.json only where there is no checkpoint yet
        (work / "run/last.pt").unlink()
    fuzz(work, "run/config.json", count, *words, kept=command != "train")


@pytest.mark.parametrize("name", ["last.pt", "log.jsonl", "pseudo_boxes.jsonl"])
def test_files_of_a_run(work, name, monkeypatch):
    monkeypatch.setattr(Run, "_loader", lambda self: [])
    words = ["train", "--resume", "--out", work / "run"]
    if name != "last.pt":
        words = ["compare", work / "run", "--out", work.parent / "page", "--images", 1]
    fuzz(work, f"run/{name}", 100 if name == "last.pt" else 25, *words)


def test_record_of_an_ablation(work):
    row = {
        "table": "main",
        "row": "semi-detr",
        "method": "semi-detr",
        "detector": "dino",
        "preset": "digits",
    }
    row |= {
        "data": "digits",
        "percent": 10.0,
        "fold": 1,
        "seed": 0,
        "steps": 4,
        "AP": 0.5,
        "AP50": 0.7,
        "seconds": 2.0,
    }
    rows = [
        {**row, "row": name, "seed": seed}
        for name in ("supervised", "semi-detr")
        for seed in (0, 1)
    ]
    (work / "record.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["ablate", "--show", "--record", work / "record.jsonl", "--out", work.parent / "shown"]
    fuzz(work, "record.jsonl", 80, *words)


WORDS = [
    *cli.COMMANDS, "--out", "--data", "--percent", "--seed", "--steps", "--fold", "--preset", "--method",
    "--detector", "--images", "--unlabelled", "--validation", "--burn-in", "--folds", "--resume", "--workers",
    "--accumulate", "--precision", "--show", "--record", "--rows", "--tables", "--seeds", "--percents", "--score",
    "--batch-size", "--learning-rate", "--queries",
    "--image-size", "--lr-drops", "--zoom", "--weights", "--truth", "--detections", "--voc",
    "--no-flip", "--quick", "0", "-1", "1.5", "1e9", "nan", "inf",
    "", "supervised", "semi-detr", "dino", "digits", "coco-10pct", "main", "--", "-h", "--nope", "\0", "../..", "ü",
    "none.json", "run", "coco", "detections.json", "voc", "yolo", "coco/images", "coco/instances_val.json",
]  # fmt: skip


@pytest.fixture
def nothing_trained(monkeypatch):
    """No step is run and no worker started: what is tried here are words."""
    go = Run.run
    monkeypatch.setattr(Run, "_loader", lambda self: [])
    monkeypatch.setattr(
        Run, "run", lambda self: {"test": {}, "AP_student": 0.0, "seconds": 0.0, **go(self)}
    )


def test_command_lines(work, monkeypatch, nothing_trained):
    monkeypatch.chdir(work)
    monkeypatch.setattr(cli, "demo", None)
    before, statuses = tree(work), []

    @examples(300)
    @given(
        words=st.lists(st.sampled_from(WORDS), max_size=8),
        command=st.sampled_from([*cli.COMMANDS, None]),
    )
    def one(words, command):
        words = [command, *words] if command else words
        if {"demo", "ablate"} & set(words):
            words = [*words, "--help"]  # they train for long
        status, _ = call(*words)
        statuses.append(status)
        after = tree(work)
        assert {name: after.get(name) for name in before} == before
        for path in work.iterdir():
            if path.name not in ("coco", "run", "voc", "yolo", "detections.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    one()
    assert {0, 2} <= set(statuses)
