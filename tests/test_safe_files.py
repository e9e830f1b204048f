"""Files of strangers: nothing in them is run, and nothing is written outside the folder that was
asked for.

Archives are tried in test_download.py.
"""

import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from semidetr_lite import load_detector
from semidetr_lite.data.images import read_image
from semidetr_lite.detectors.public_weights import load_public_weights
from semidetr_lite.errors import UserError
from semidetr_lite.training.loop import Run, replay
from semidetr_lite.training.settings import DetectorKwargs, new_config
from tests.test_bad_input import call, small, sound, tree, work  # noqa: F401  (fixtures)
from tests.test_train import DETECTOR


class Bomb:
    """What unpickles into a call of os.system."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


KINDS = {
    "torch.save": lambda content, file: torch.save(content, file),
    "torch.save of old": lambda content, file: torch.save(
        content, file, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda content, file: file.write_bytes(pickle.dumps(content)),
}


@pytest.fixture(params=KINDS)
def bomb(request, tmp_path):
    """Writes a file that runs something when it is unpickled; the canary tells whether it ran."""
    canary = tmp_path / "canary"

    def write(file: Path, around=lambda content: content):
        KINDS[request.param](around(Bomb(canary)), file)
        return file

    proof = write(tmp_path / "proof")
    assert not canary.exists()
    if request.param == "pickle":  # it is a real bomb
        pickle.loads(proof.read_bytes())
    else:
        torch.load(proof, weights_only=False)
    assert canary.exists()
    canary.unlink()
    return write, canary


DOORS = [
    "--resume",
    "--burn-in",
    "predict",
    "evaluate",
    "compare",
    "doctor --weights",
    "public",
    "backbone",
    "replay",
]


@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_that_runs_something_is_refused(door, bomb, work, tmp_path):
    write, canary = bomb
    run, picture, out = work / "run", work / "voc/JPEGImages/0.jpg", tmp_path / "out"
    if door in ("predict", "evaluate", "compare"):
        for name in ("teacher", "best"):
            write(run / f"{name}.safetensors")
    if door in ("--resume", "--burn-in"):
        write(run / "last.pt", lambda content: {"config": "{}", "step": 2, "method": content})
    other = tmp_path / "theirs.pth"
    words = {
        "--resume": ["train", "--resume", "--out", run],
        "--burn-in": ["train", "--burn-in", run, "--data", work / "coco", "--out", out],
        "predict": ["predict", run, picture, "--out", out],
        "evaluate": ["evaluate", run],
        "compare": ["compare", run, "--out", out],
        "doctor --weights": ["doctor", "--weights", other],
    }
    if door == "doctor --weights":
        write(other, lambda content: {"model": content})
    if door in words:
        status, said = call(*words[door])
        assert status == 2 and said.count("error: ") == 1
    elif door == "public":
        with pytest.raises(UserError, match="theirs.pth"):
            load_public_weights(load_detector(run), write(other))
    elif door == "backbone":
        with pytest.raises(UserError, match="theirs.pth"):
            arguments = {**DETECTOR, "backbone": "resnet50", "backbone_weights": str(write(other))}
            kwargs = DetectorKwargs(**arguments)
            config = new_config(detector_kwargs=kwargs, data=str(work / "coco"), steps=1)
            Run(config, out, quiet=True)
    else:
        with pytest.raises(UserError, match="theirs.pth"):
            replay(write(other))
    assert not canary.exists()


def test_names_in_a_json_stay_in_the_folder_of_images(work):
    file = work / "coco/instances_train.json"
    document = json.loads(file.read_text())
    Image.new("RGB", (64, 48)).save(work / "secret.png")
    opened, open_image = set(), Image.open

    def watched(path, *others, **more):
        opened.add(Path(os.path.realpath(path)))
        return open_image(path, *others, **more)

    for name in (
        "../../secret.png",
        str(work / "secret.png"),
        "a/../../../secret.png",
        "./../../secret.png",
    ):
        document["images"][1]["file_name"] = name
        file.write_text(json.dumps(document))
        status, said = call("train", "--data", work / "coco", "--out", work / "out", "--workers", 0)
        assert status == 2 and "secret.png" in said and not (work / "out").exists()
        # nor is it read where unreadable images are left out
        words = ["--skip-unreadable", "--data", work / "coco", "--out", work / "skipped"]
        with patch.object(Image, "open", watched):
            call("train", *words, "--steps", 1, "--workers", 0)
        shutil.rmtree(work / "skipped", ignore_errors=True)
    assert opened and work / "secret.png" not in opened


def test_a_run_folder_with_links_is_no_way_to_write_elsewhere(work, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    before = {}
    for name in (
        "config.json",
        "log.jsonl",
        "pseudo_boxes.jsonl",
        "last.pt",
        "student.safetensors",
        "bad_step.pt",
    ):
        inside = work / "run" / name
        target = outside / name
        shutil.copy(inside, target) if inside.exists() else target.write_text("mine\n")
        inside.unlink(missing_ok=True)
        inside.symlink_to(target)
        before[name] = target.read_bytes()
    (outside / "part").write_text("mine")
    (work / "run/.x.1.2.part").symlink_to(outside / "part")
    config = json.loads((outside / "config.json").read_text())
    state = torch.load(outside / "last.pt", weights_only=True)
    state["config"] = json.dumps({**config, "steps": 4})  # there is something left to do
    torch.save(state, outside / "last.pt")
    before["last.pt"] = (outside / "last.pt").read_bytes()
    status, said = call("train", "--resume", "--out", work / "run", "--workers", 0)
    assert status == 0, said
    assert {**before, "part": b"mine"} == tree(outside)
    assert not [
        path
        for path in (work / "run").iterdir()
        if path.is_symlink() and path.name != "bad_step.pt"
    ]


def test_pictures_are_written_beside_links_not_through_them(work, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside.txt"
    out.mkdir()
    outside.write_text("mine")
    for name in ("00000_0.png", "detections.json", "annotations.json", "report.html"):
        (out / name).symlink_to(outside)
    assert call("predict", work / "run", work / "voc/JPEGImages/0.jpg", "--out", out)[0] == 0
    assert call("compare", work / "run", "--out", out, "--images", 1)[0] == 0
    assert outside.read_text() == "mine" and not [
        path for path in out.iterdir() if path.is_symlink()
    ]


def test_folders_of_images_may_link_in_a_circle(work):
    (work / "coco/images/again").symlink_to(work / "coco/images")
    assert call("doctor", "--data", work / "coco", "--unlabelled", work / "coco/images")[0] in (
        0,
        2,
    )


def test_xml_reads_no_other_file_and_does_not_swell(work):
    file = work / "voc/Annotations/0.xml"
    text = file.read_text()
    (work / "secret").write_text("secret words")
    reading = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{work / "secret"}">]>' + text.replace(
        "box<", "&x;<"
    )
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    swelling = f'<!DOCTYPE a [<!ENTITY l0 "{"ha" * 20}">{laughs}]>' + text.replace("box<", "&l9;<")
    for spoilt in (reading, swelling):
        file.write_text(spoilt)
        status, said = call("doctor", "--data", work / "voc")
        assert status == 2 and "secret words" not in said


def test_yaml_makes_no_objects(work, tmp_path):
    names = f"names: !!python/object/apply:os.system ['touch {tmp_path}/canary']\n"
    (work / "yolo/data.yaml").write_text(names)
    assert call("doctor", "--data", work / "yolo")[0] == 2
    assert not (tmp_path / "canary").exists()


def test_an_image_starts_no_other_program(tmp_path, monkeypatch):
    """Pillow asks Ghostscript about EPS, whatever the file is called."""
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/canary'\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    file = tmp_path / "picture.jpg"
    file.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(file) as opened:
        assert opened.format == "EPS"  # so it would be, if it were not for read_image
    with pytest.raises(UserError, match="picture.jpg: not a readable image"):
        read_image(file)
    assert not (tmp_path / "canary").exists()


def test_a_bomb_of_pixels_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(UserError, match="bomb.png.*89 million"):
        read_image(tmp_path / "bomb.png")


def test_the_page_shows_names_and_runs_none(work):
    """Script in a category, a command or a folder's name stays text."""
    script = "<script>alert(1)</script>"
    config = json.loads((work / "run/config.json").read_text())
    config |= {"command": script, "machine": f'"><img src=x onerror="{script}">', "commit": script}
    (work / "run/config.json").write_text(json.dumps(config))
    os.rename(work / "run", work / "<script>alert(2)<")
    assert (
        call("compare", work / "<script>alert(2)<", "--out", work / "page", "--images", 1)[0] == 0
    )
    page = (work / "page/report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "&lt;script&gt;alert(2)" in page
    assert "<script>alert" not in page and "<img src=x" not in page


def test_a_detector_of_any_size_is_not_built(work):
    file = work / "run/teacher.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["semidetr_lite"])
    about["arguments"]["encoder_layers"] = 10**9
    header["__metadata__"]["semidetr_lite"] = json.dumps(about)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UserError, match="encoder_layers.* 1000000000"):
        load_detector(file)
