"""Downloads from a local server that cuts, lies and refuses; archives that try to leave."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import shutil
import stat
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import _download as download
import download_coco
import download_voc
from _download import Archive

from semidetr_lite.data.coco import load
from semidetr_lite.errors import UserError

NOISE = bytes(index * 7 % 251 for index in range(20_000))


class Server:
    """A web server on this machine: its `files`, how it misbehaves, and what it was asked."""

    def __init__(self):
        self.files, self.asked, self.statuses = {}, [], []
        self.cut = None  # bytes of a body after which the connection is closed
        self.ranges, self.stated, self.silent = True, True, 0.0
        self.length = (
            0  # what is added to the true Content-Length; `stated`: whether there is one at all
        )
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: (
            None
        )  # a client that hangs up is no news, and stderr is what is tested
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append((handler.path, asked))
        time.sleep(self.silent)
        body = self.files.get(handler.path)
        if self.statuses or body is None:
            return handler.send_error(self.statuses.pop(0) if self.statuses else 404)
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if first >= len(body) > 0:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body) + self.length}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        total = len(body) + self.length
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if self.stated:
            handler.send_header("Content-Length", str(total - first))
        handler.end_headers()
        handler.wfile.write(body[first:] if self.cut is None else body[first : first + self.cut])


@pytest.fixture(scope="module")
def running():
    server = Server()
    yield server
    server.server.shutdown()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    running.files, running.asked, running.statuses = {"/a.zip": NOISE}, [], []
    running.cut, running.ranges, running.length, running.silent = None, True, 0, 0.0
    running.stated = True
    return running


def published(content: bytes, url: str, **others) -> Archive:
    """The description of an archive with this content."""
    md5 = hashlib.md5(content).hexdigest()
    name = url.rsplit("/", 1)[1]
    return Archive(name, url, len(content), md5, unpacked=len(content), **others)


def fetch(server, path: Path) -> bytes:
    download.download(published(NOISE, f"{server.url}/a.zip"), path)
    assert not path.with_name("a.zip.part").exists()
    return path.read_bytes()


def refused(server, path: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        fetch(server, path)
    message = str(error.value)
    assert "\n" not in message and server.url in message
    for word in words:
        assert word in message
    assert not path.exists()


class TestDownload:
    def test_in_one_go_and_not_again(self, server, tmp_path):
        for _ in range(2):
            assert fetch(server, tmp_path / "a.zip") == NOISE
        assert server.asked == [("/a.zip", None)]

    @pytest.mark.parametrize("stated", [True, False])
    def test_a_cut_connection_goes_on_where_it_was(self, server, tmp_path, stated, capsys):
        server.cut = 6000
        server.stated = stated
        assert fetch(server, tmp_path / "a.zip") == NOISE
        assert [asked for _, asked in server.asked] == [
            None,
            "bytes=6000-",
            "bytes=12000-",
            "bytes=18000-",
        ]
        assert "cut off after 6,000 of 20,000 bytes" in capsys.readouterr().err

    def test_a_later_run_goes_on_too(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(NOISE[:7777])
        assert fetch(server, tmp_path / "a.zip") == NOISE
        assert server.asked == [("/a.zip", "bytes=7777-")]

    def test_a_whole_part_needs_no_server(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(NOISE)
        assert fetch(server, tmp_path / "a.zip") == NOISE and server.asked == []

    def test_a_server_without_ranges_starts_over(self, server, tmp_path, capsys):
        server.ranges = False
        (tmp_path / "a.zip.part").write_bytes(b"x" * 7777)
        assert fetch(server, tmp_path / "a.zip") == NOISE
        assert "starting over" in capsys.readouterr().err

    def test_without_ranges_and_always_cut_it_gives_up(self, server, tmp_path):
        server.ranges, server.cut = False, 6000
        (tmp_path / "a.zip.part").write_bytes(b"x" * 7777)
        refused(server, tmp_path / "a.zip", "gave up after 8 tries", "6,000 of 20,000")
        assert len(server.asked) == 8 and (tmp_path / "a.zip.part").read_bytes() == NOISE[:6000]

    def test_a_part_longer_than_the_file(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(b"x" * 30_000)
        assert fetch(server, tmp_path / "a.zip") == NOISE

    @pytest.mark.parametrize("lie", [500, -500])
    def test_another_length_than_published(self, server, tmp_path, lie):
        server.length = lie
        refused(server, tmp_path / "a.zip", f"{20_000 + lie:,} bytes", "20,000 as published")
        assert len(server.asked) == 1

    @pytest.mark.parametrize("arrived", [0, 7777])
    def test_a_shorter_file_than_published(self, server, tmp_path, arrived):
        server.files["/a.zip"] = NOISE[:5000]
        server.stated = False
        (tmp_path / "a.zip.part").write_bytes(NOISE[:arrived])
        refused(server, tmp_path / "a.zip")
        assert len(server.asked) < 20

    def test_a_longer_file_than_published(self, server, tmp_path):
        server.files["/a.zip"] = NOISE + b"more"
        server.stated = False
        refused(server, tmp_path / "a.zip", "gave up")

    def test_refusals_are_final_and_overload_is_not(self, server, tmp_path):
        server.statuses = [503, 429, 500]
        assert fetch(server, tmp_path / "a.zip") == NOISE and len(server.asked) == 4
        for status in (403, 404):
            server.asked, server.statuses = [], [status]
            refused(server, tmp_path / "b" / "a.zip", str(status))
            assert len(server.asked) == 1

    def test_silence_is_not_waited_for(self, server, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "TIMEOUT", 0.05)
        monkeypatch.setattr(download, "MAX_FAILURES", 2)
        server.silent = 0.3
        start = time.monotonic()
        refused(server, tmp_path / "a.zip", "gave up after 2 tries", "timed out")
        assert time.monotonic() - start < 1

    def test_nobody_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "PAUSE", 0)
        with pytest.raises(UserError, match="127.0.0.1:9/a.zip.* 8 .*refused"):
            download.download(published(NOISE, "http://127.0.0.1:9/a.zip"), tmp_path / "a.zip")

    def test_pauses_grow(self, server, tmp_path, monkeypatch):
        pauses = []
        monkeypatch.setattr(download, "PAUSE", 1.0)
        monkeypatch.setattr(download.time, "sleep", pauses.append)
        monkeypatch.setattr(server, "answer", lambda handler: handler.send_error(503))
        refused(server, tmp_path / "a.zip", "503")
        assert pauses == [1, 2, 4, 8, 16, 32, 60]

    def test_a_full_disk_is_told_and_not_tried_again(self, server, tmp_path):
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        (tmp_path / "a.zip.part").symlink_to("/dev/full")
        with pytest.raises(UserError, match="a.zip.part.*No space"):
            fetch(server, tmp_path / "a.zip")
        assert len(server.asked) == 1


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in others:
            archive.addfile(entry)
    return buffer.getvalue()


IMAGES = zipped(
    {f"train/{index}.jpg": bytes([index]) * 500 for index in range(4)} | {"train/": b""}
)
BOXES = zipped({"annotations/instances_a.json": b"{}", "annotations/captions_a.json": b"[]"})
LIST = tarred({"kit/ImageSets/list.txt": b"1\n2\n", "kit/JPEGImages/1.jpg": b"one"})
CONTENTS = {"boxes.zip": BOXES, "train.zip": IMAGES, "list.tar": LIST}


def parts_at(url: str) -> dict[str, list[Archive]]:
    """The parts of a data set in miniature that is published at this address."""
    boxes = {"witnesses": ("annotations/instances_a.json",), "wanted": "annotations/instances_*"}
    lists = {"witnesses": ("kit/ImageSets/list.txt",), "folders": {"kit/JPEGImages": 1}}
    return {
        "train": [
            published(BOXES, f"{url}/boxes.zip", **boxes),
            published(IMAGES, f"{url}/train.zip", folders={"train": 4}),
        ],
        "list": [published(LIST, f"{url}/list.tar", **lists)],
    }


NOWHERE = parts_at("http://127.0.0.1:9")


@pytest.fixture
def site(server):
    """The server with the data set on it; `.parts` describe it."""
    server.files = {f"/{name}": content for name, content in CONTENTS.items()}
    server.parts = parts_at(server.url)
    return server


def call(target: Path, *options, parts=NOWHERE) -> int:
    return download.main([str(target), *map(str, options)], "about", parts, "next: {target}")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: (bytes, time of the last change)} of everything below a folder."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in found
    }


WHOLE = {
    *("annotations/instances_a.json", "kit/ImageSets/list.txt", "kit/JPEGImages/1.jpg"),
    *(f"train/{index}.jpg" for index in range(4)),
}


class TestCommand:
    def test_everything_and_nothing_twice(self, site, tmp_path, capsys):
        target = tmp_path / "data"
        assert call(target, parts=site.parts) == 0
        before = tree(target)
        assert set(before) == WHOLE and len(site.asked) == 3
        assert (target / "train/3.jpg").read_bytes() == b"\3" * 500
        assert f"next: {target}" in capsys.readouterr().out
        assert call(target, parts=site.parts) == 0
        assert tree(target) == before and len(site.asked) == 3
        out, err = capsys.readouterr()
        assert out.count("already") == 3 and err == ""

    def test_what_was_lost_comes_back_and_the_rest_stays(self, site, tmp_path):
        call(tmp_path, parts=site.parts)
        (tmp_path / "train" / "2.jpg").unlink()
        site.asked.clear()
        assert call(tmp_path, parts=site.parts) == 0
        assert [path for path, _ in site.asked] == ["/train.zip"]
        assert set(tree(tmp_path)) == WHOLE

    def test_only(self, site, tmp_path):
        assert call(tmp_path, "--only", "list", "--keep", parts=site.parts) == 0
        expected = {"kit/ImageSets/list.txt", "kit/JPEGImages/1.jpg", "list.tar"}
        assert set(tree(tmp_path)) == expected
        with pytest.raises(SystemExit) as stopped:
            call(tmp_path, "--only", "nothing")
        assert stopped.value.code == 2

    def test_a_kept_archive_is_not_downloaded_again(self, site, tmp_path):
        assert call(tmp_path, "--only", "list", "--keep", parts=site.parts) == 0
        shutil.rmtree(tmp_path / "kit")
        site.asked.clear()
        assert call(tmp_path, "--only", "list", "--keep", parts=site.parts) == 0
        assert (tmp_path / "kit" / "JPEGImages" / "1.jpg").exists() and not site.asked

    def test_dry_run_touches_nothing(self, site, tmp_path, capsys):
        target = tmp_path / "data"
        assert call(target, "--dry-run", parts=site.parts) == 0
        out = capsys.readouterr().out
        assert not target.exists() and not site.asked
        assert all(f"{name}: to download" in out for name in CONTENTS) and "GB free" in out

    def test_from_archive(self, site, tmp_path):
        archive = tmp_path / "disk" / "list.tar"
        archive.parent.mkdir()
        archive.write_bytes(LIST)
        target = tmp_path / "data"
        assert call(target, "--from-archive", archive, parts=site.parts) == 0
        assert set(tree(target)) == {"kit/ImageSets/list.txt", "kit/JPEGImages/1.jpg"}
        assert archive.read_bytes() == LIST and not site.asked
        assert call(target, "--only", "train", "--from-archive", archive, parts=site.parts) == 0
        assert set(tree(target)) == WHOLE

    @pytest.mark.parametrize(
        ("name", "content", "word"),
        [
            ("list.tar", LIST[:-1], "as published"),
            ("train.zip", IMAGES[:-1] + b"?", "MD5"),
            ("other.zip", IMAGES, "boxes.zip, train.zip, list.tar"),
            ("none.zip", None, "no such"),
        ],
    )
    def test_bad_archives_on_a_disk(self, tmp_path, capsys, name, content, word):
        file = tmp_path / "disk" / name
        file.parent.mkdir()
        if content is not None:
            file.write_bytes(content)
        assert call(tmp_path / "data", "--from-archive", file) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith("error: ") and err.count("\n") == 1 and str(file) in err and word in err
        )
        assert tree(tmp_path / "data") == {} and file.exists() == (content is not None)

    def test_a_corrupt_archive_is_fetched_anew_the_next_time(self, site, tmp_path, capsys):
        site.files["/train.zip"] = IMAGES[:700] + b"?" + IMAGES[701:]
        assert call(tmp_path, "--only", "train", parts=site.parts) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "damaged" in err and "train.zip" in err
        assert set(tree(tmp_path)) == {"annotations/instances_a.json"}
        site.files["/train.zip"] = IMAGES
        assert call(tmp_path, "--only", "train", parts=site.parts) == 0
        assert (tmp_path / "train" / "0.jpg").exists()

    def test_no_room(self, site, tmp_path, monkeypatch, capsys):
        usage = shutil.disk_usage(tmp_path)._replace(free=5000)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
        large = dataclasses.replace(site.parts["train"][1], size=3 * 10**9, unpacked=4 * 10**9)
        for options in ((), ("--dry-run",)):
            assert call(tmp_path / "data", *options, parts={"train": [large]}) == 2
            err = capsys.readouterr().err
            assert (
                err.count("\n") == 1 and "7.00 GB are needed" in err and "0.00 GB are free" in err
            )
        assert not site.asked and not (tmp_path / "data").exists()

    def test_room_counts_what_is_there(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
        one = Archive("a.zip", "http://h/a.zip", 6000, "", unpacked=6000)
        two = Archive("b.zip", "http://h/b.zip", 1000, "", unpacked=1000)
        with pytest.raises(UserError):
            download.check_space(tmp_path, [one], {})
        download.check_space(tmp_path, [one], {"a.zip": Path("disk/a.zip")})
        (tmp_path / "a.zip.part").write_bytes(b"x" * 3000)
        download.check_space(tmp_path, [one, two], {})
        with pytest.raises(UserError):
            download.check_space(tmp_path, [one, two], {}, keep=True)

    def test_a_file_in_place_of_the_folder(self, tmp_path, capsys):
        (tmp_path / "file").write_text("x")
        assert call(tmp_path / "file") == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
        assert (tmp_path / "file").read_text() == "x"

    def test_ctrl_c(self, site, tmp_path, monkeypatch, capsys):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(download, "verify", stop)
        assert call(tmp_path, parts=site.parts) == 130
        assert capsys.readouterr().err.count("\n") == 1
        monkeypatch.undo()
        site.asked.clear()
        assert call(tmp_path, parts=site.parts) == 0
        assert not any("boxes" in path for path, _ in site.asked)


def link(name: str, kind: bytes, to: str = "../../outside") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def zip_link(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "../../outside")
    return buffer.getvalue()


LEAVING = ["../outside", "a/../../outside", "/outside", "../../outside", "a/../.."]
UNSAFE = [
    *(("a.zip", zipped({"fine": b"x", name: b"bad"})) for name in LEAVING),
    *(("a.tar", tarred({"fine": b"x", name: b"bad"})) for name in LEAVING),
    ("a.zip", zip_link("a")),
    ("a.tar", tarred({}, link("a", tarfile.SYMTYPE))),
    ("a.tar", tarred({}, link("a", tarfile.SYMTYPE, "/etc/passwd"))),
    ("a.tar", tarred({}, link("a", tarfile.LNKTYPE))),
    ("a.tar", tarred({}, link("a", tarfile.FIFOTYPE))),
    ("a.tar", tarred({}, link("a", tarfile.CHRTYPE))),
]
BROKEN = [
    ("a.zip", b"no archive", "a.zip"),
    ("a.tar", b"no archive" * 100, "a.tar"),
    ("a.zip", zipped({"train/0": b"x" * 900}).replace(b"x" * 900, b"y" * 900), "train/0"),
    ("a.zip", zipped({"train/0": b"x", "list.txt": b"x"}), "1 files and not 2 for train"),
    ("a.tar", tarred({"train/0": b"x", "train/1": b"x"})[:1024], "list.txt"),
    ("a.tar", tarred({"list.txt": b"x", "train/0": b"x", "train/1": b"x" * 9000})[:3000], "a.tar"),
    ("a.tar", tarred({"train/0": b"x", "train/1": b"x"}), "list.txt"),
]


class TestUnpack:
    @pytest.mark.parametrize(("name", "content"), UNSAFE)
    def test_nothing_is_written_elsewhere(self, tmp_path, name, content):
        target = tmp_path / "in" / "target"
        target.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
        (tmp_path / "outside").write_text("mine")
        archive = published(content, f"http://h/{name}")
        with contextlib.suppress(download.BadArchive):  # refused, or unpacked below the target
            download.unpack(tmp_path / name, archive, target)
        outside = {file for file in tree(tmp_path) if not file.startswith("in/target/")}
        assert outside == {name, "outside"} and (tmp_path / "outside").read_text() == "mine"
        assert all(path.is_file() or path.is_dir() for path in target.rglob("*"))
        assert not [path for path in target.rglob("*") if path.is_symlink()]

    @pytest.mark.parametrize(("name", "content", "word"), BROKEN)
    def test_refused_and_nothing_written(self, tmp_path, name, content, word):
        target = tmp_path / "in" / "target"
        target.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
        archive = published(
            content, f"http://h/{name}", folders={"train": 2}, witnesses=("list.txt",)
        )
        with pytest.raises(download.BadArchive) as error:
            download.unpack(tmp_path / name, archive, target)
        message = str(error.value)
        assert str(tmp_path / name) in message and word in message and "\n" not in message
        assert set(tree(tmp_path)) == {name} and list(target.iterdir()) == []

    def test_an_old_python_without_the_filter_refuses_a_tar(self, tmp_path, monkeypatch):
        (tmp_path / "list.tar").write_bytes(LIST)
        monkeypatch.delattr(tarfile, "data_filter")
        with pytest.raises(UserError, match="list.tar: .*Python") as error:
            download.unpack(tmp_path / "list.tar", NOWHERE["list"][0], tmp_path / "data")
        assert not isinstance(error.value, download.BadArchive)  # the archive is good and stays
        assert tree(tmp_path / "data") == {}

    def test_an_interrupted_unpacking_leaves_whole_files_and_is_done_again(
        self, tmp_path, monkeypatch
    ):
        (tmp_path / "list.tar").write_bytes(LIST)
        archive, target, moved = NOWHERE["list"][0], tmp_path / "data", []
        replace = download.os.replace

        def stop_at_the_second(source, place):
            if moved:
                raise KeyboardInterrupt
            moved.append(replace(source, place))

        monkeypatch.setattr(download.os, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            download.unpack(tmp_path / "list.tar", archive, target)
        monkeypatch.undo()
        assert set(tree(target)) == {"kit/JPEGImages/1.jpg"} and not download.installed(
            archive, target
        )
        (target / ".list.tar.unpacking").mkdir()
        (target / ".list.tar.unpacking" / "rubbish").write_text("of a killed run")
        download.unpack(tmp_path / "list.tar", archive, target)
        assert set(tree(target)) == {
            "kit/JPEGImages/1.jpg",
            "kit/ImageSets/list.txt",
        } and download.installed(archive, target)


# The tables


def test_voc_table_agrees_with_torchvision():
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    ours = {
        (archive.url, archive.md5)
        for archives in download_voc.PARTS.values()
        for archive in archives
    }
    assert ours == {
        (DATASET_YEAR_DICT[key]["url"], DATASET_YEAR_DICT[key]["md5"])
        for key in ("2007", "2007-test", "2012")
    }


@pytest.mark.parametrize("script", [download_coco, download_voc])
def test_tables_are_complete(script):
    for archives in script.PARTS.values():
        for archive in archives:
            assert (
                archive.url.endswith("/" + archive.name) and len(bytes.fromhex(archive.md5)) == 16
            )
            assert (
                archive.size > 1e6
                and archive.unpacked > archive.size
                and (archive.folders or archive.witnesses)
            )


def test_the_layout_is_one_that_the_package_reads(tmp_path, monkeypatch, capsys):
    """COCO in miniature through the real table, with sizes and counts of ours."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 6)).save(picture, "jpeg")
    first_numbers = {"train2017": 0, "val2017": 100, "unlabeled2017": 200}
    names = {
        part: [f"{part}/{number:012d}.jpg" for number in range(first, first + 10)]
        for part, first in first_numbers.items()
    }

    def document(part: str) -> bytes:
        rows = [
            {"id": int(Path(name).stem), "file_name": Path(name).name, "height": 6, "width": 8}
            for name in names[part]
        ]
        box = {
            "id": 1,
            "image_id": rows[0]["id"],
            "category_id": 1,
            "bbox": [1, 1, 3, 3],
            "area": 9,
            "iscrowd": 0,
        }
        return json.dumps(
            {"images": rows, "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
        ).encode()

    jsons = {
        f"annotations/instances_{part}.json": document(part) for part in ("train2017", "val2017")
    }
    contents = {
        f"{part}.zip": zipped(dict.fromkeys(files, picture.getvalue()))
        for part, files in names.items()
    }
    contents["annotations_trainval2017.zip"] = zipped(
        {**jsons, "annotations/captions_train2017.json": b"{}"}
    )
    info = {"annotations/image_info_unlabeled2017.json": document("unlabeled2017")}
    contents["image_info_unlabeled2017.zip"] = zipped(info)

    def small(archive: Archive) -> Archive:
        (tmp_path / archive.name).write_bytes(contents[archive.name])
        folders = dict.fromkeys(archive.folders, 10)
        ours = published(contents[archive.name], archive.url)
        return dataclasses.replace(
            archive, size=ours.size, md5=ours.md5, unpacked=ours.unpacked, folders=folders
        )

    parts = {
        name: [small(archive) for archive in archives]
        for name, archives in download_coco.PARTS.items()
    }
    monkeypatch.setattr(download_coco, "PARTS", parts)
    given = [f"--from-archive={tmp_path / name}" for name in contents]
    target = tmp_path / "coco"
    assert download_coco.main([str(target), *given]) == 0
    splits = load(target, unlabelled=target / "unlabeled2017", percent=10)
    assert (len(splits.labelled), len(splits.unlabelled), len(splits.test)) == (1, 9 + 10, 10)
    assert not (target / "annotations" / "captions_train2017.json").exists()
    assert str(target) in capsys.readouterr().out
