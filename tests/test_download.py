"""Downloads against a local server that cuts, lies, refuses and serves rubbish; archives that try to leave."""

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
    """A web server on this machine: `files` {path: bytes}, how it misbehaves, and what it was asked."""

    def __init__(self):
        self.files, self.asked, self.statuses = {}, [], []
        self.cut = None  # bytes of a body after which the connection is closed
        self.ranges, self.length, self.silent = True, 0, 0.0  # length: what is added to the true Content-Length
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that hangs up is no news, and stderr is what is tested
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
    return running


def fetch(server, path: Path, size: int | None = len(NOISE)) -> bytes:
    download.download([f"{server.url}/a.zip"], path, size)
    assert not path.with_name("a.zip.part").exists()
    return path.read_bytes()


def refused(server, path: Path, *words: str, size: int | None = len(NOISE)) -> None:
    with pytest.raises(UserError) as error:
        fetch(server, path, size)
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

    @pytest.mark.parametrize("size", [len(NOISE), None])
    def test_a_cut_connection_goes_on_where_it_was(self, server, tmp_path, size, capsys):
        server.cut = 6000
        assert fetch(server, tmp_path / "a.zip", size) == NOISE
        assert [asked for _, asked in server.asked] == [None, "bytes=6000-", "bytes=12000-", "bytes=18000-"]
        assert "cut off after 6,000 of 20,000 bytes" in capsys.readouterr().err

    def test_a_later_run_goes_on_too(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(NOISE[:7777])
        assert fetch(server, tmp_path / "a.zip") == NOISE
        assert server.asked == [("/a.zip", "bytes=7777-")]

    def test_a_whole_part_needs_no_server(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(NOISE)
        assert fetch(server, tmp_path / "a.zip") == NOISE and server.asked == []
        (tmp_path / "b" / "a.zip.part").parent.mkdir()
        (tmp_path / "b" / "a.zip.part").write_bytes(NOISE)
        assert fetch(server, tmp_path / "b" / "a.zip", size=None) == NOISE  # the server's 416 says that nothing lacks

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

    @pytest.mark.parametrize("size", [len(NOISE), None])
    def test_a_part_longer_than_the_file(self, server, tmp_path, size):
        (tmp_path / "a.zip.part").write_bytes(b"x" * 30_000)
        assert fetch(server, tmp_path / "a.zip", size) == NOISE

    @pytest.mark.parametrize("lie", [500, -500])
    def test_another_length_than_published(self, server, tmp_path, lie):
        server.length = lie
        refused(server, tmp_path / "a.zip", f"{20_000 + lie:,} bytes", "20,000 as published")
        assert len(server.asked) == 1

    def test_a_length_never_reached(self, server, tmp_path):
        server.length = 500
        refused(server, tmp_path / "a.zip", "gave up", size=None)
        assert len(server.asked) < 20

    def test_refusals_are_final_and_overload_is_not(self, server, tmp_path):
        server.statuses = [503, 429, 500]
        assert fetch(server, tmp_path / "a.zip") == NOISE and len(server.asked) == 4
        for status in (403, 404):
            server.asked, server.statuses = [], [status]
            refused(server, tmp_path / "b" / "a.zip", str(status))
            assert len(server.asked) == 1

    def test_silence_is_not_waited_for(self, server, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "TIMEOUT", 0.05)
        monkeypatch.setattr(download, "TRIES", 2)
        server.silent = 0.3
        start = time.monotonic()
        refused(server, tmp_path / "a.zip", "gave up after 2 tries", "timed out")
        assert time.monotonic() - start < 1

    def test_nobody_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "PAUSE", 0)
        with pytest.raises(UserError, match="gave up after 8 tries .*refused"):
            download.download(["http://127.0.0.1:9/a.zip"], tmp_path / "a.zip", 10)

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
        with pytest.raises(UserError, match="cannot be written .*No space"):
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


def described(name: str, content: bytes, **others) -> Archive:
    md5 = hashlib.md5(content).hexdigest()
    return Archive(name, f"http://127.0.0.1:9/zips/{name}", len(content), md5, unpacked=len(content), **others)


IMAGES = zipped({f"train/{index}.jpg": bytes([index]) * 500 for index in range(4)} | {"train/": b""})
BOXES = zipped({"annotations/instances_a.json": b"{}", "annotations/captions_a.json": b"[]"})
LIST = tarred({"kit/ImageSets/list.txt": b"1\n2\n", "kit/JPEGImages/1.jpg": b"one"})
PARTS = {
    "train": [
        described("boxes.zip", BOXES, witnesses=("annotations/instances_a.json",), wanted="annotations/instances_*"),
        described("train.zip", IMAGES, folders={"train": 4}),
    ],
    "list": [described("list.tar", LIST, witnesses=("kit/ImageSets/list.txt",), folders={"kit/JPEGImages": 1})],
}


@pytest.fixture
def mirror(server):
    server.files = {"/boxes.zip": BOXES, "/zips/train.zip": IMAGES, "/zips/list.tar": LIST}  # flat, and as published
    return server


def call(target: Path, *options, parts=PARTS) -> int:
    return download.main([str(target), *map(str, options)], "about", parts, "next: {target}")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: (bytes, time of the last change)} of everything below a folder, hidden files included."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


WHOLE = {
    *("annotations/instances_a.json", "kit/ImageSets/list.txt", "kit/JPEGImages/1.jpg"),
    *(f"train/{index}.jpg" for index in range(4)),
}


class TestCommand:
    def test_everything_and_nothing_twice(self, mirror, tmp_path, capsys):
        target = tmp_path / "data"
        assert call(target, "--mirror", mirror.url + "/") == 0
        before, asked = tree(target), len(mirror.asked)
        assert set(before) == WHOLE and asked == 5  # two of the three lie where the publisher has them
        assert (target / "train/3.jpg").read_bytes() == b"\3" * 500
        assert f"next: {target}" in capsys.readouterr().out
        assert call(target, "--mirror", mirror.url) == 0
        assert tree(target) == before and len(mirror.asked) == asked
        out, err = capsys.readouterr()
        assert out.count("already") == 3 and err == ""

    def test_what_was_lost_comes_back_and_the_rest_stays(self, mirror, tmp_path):
        call(tmp_path, "--mirror", mirror.url)
        (tmp_path / "train" / "2.jpg").unlink()
        mirror.asked.clear()
        assert call(tmp_path, "--mirror", mirror.url) == 0
        assert [path for path, _ in mirror.asked] == ["/train.zip", "/zips/train.zip"]
        assert set(tree(tmp_path)) == WHOLE

    def test_only(self, mirror, tmp_path):
        assert call(tmp_path, "--only", "list", "--mirror", mirror.url, "--keep") == 0
        assert set(tree(tmp_path)) == {"kit/ImageSets/list.txt", "kit/JPEGImages/1.jpg", "list.tar"}
        with pytest.raises(SystemExit) as stopped:
            call(tmp_path, "--only", "nothing")
        assert stopped.value.code == 2

    def test_dry_run_touches_nothing(self, mirror, tmp_path, capsys):
        target = tmp_path / "data"
        assert call(target, "--dry-run", "--mirror", mirror.url) == 0
        out = capsys.readouterr().out
        assert not target.exists() and not mirror.asked
        assert (
            all(f"{name}: to download" in out for name in ("boxes.zip", "train.zip", "list.tar")) and "GB free" in out
        )

    def test_from_archive(self, mirror, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "list.tar").write_bytes(LIST)
        target = tmp_path / "data"
        assert call(target, "--from-archive", tmp_path / "disk" / "list.tar") == 0
        assert set(tree(target)) == {"kit/ImageSets/list.txt", "kit/JPEGImages/1.jpg"} and not mirror.asked
        assert (tmp_path / "disk" / "list.tar").read_bytes() == LIST
        options = ("--only", "train", "--from-archive", tmp_path / "disk" / "list.tar", "--mirror", mirror.url)
        assert call(target, *options) == 0 and set(tree(target)) == WHOLE

    def test_bad_archives_on_a_disk(self, tmp_path, capsys):
        disk = tmp_path / "disk"
        disk.mkdir()
        (disk / "list.tar").write_bytes(LIST[:-1])
        (disk / "train.zip").write_bytes(IMAGES[:-1] + b"?")
        (disk / "other.zip").write_bytes(IMAGES)
        words = {
            "list.tar": "as published",
            "train.zip": "MD5",
            "other.zip": "not an archive of",
            "none.zip": "no such",
        }
        for name, word in words.items():
            assert call(tmp_path / "data", "--from-archive", disk / name) == 2
            err = capsys.readouterr().err
            assert err.startswith("error: ") and err.count("\n") == 1 and str(disk / name) in err and word in err
        assert tree(tmp_path / "data") == {} and len(tree(disk)) == 3

    def test_a_repacked_archive(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for index in range(4):
                archive.writestr(f"train/{index}.jpg", bytes([index]) * 500)
        assert call(tmp_path / "data", "--from-archive", tmp_path / "train.zip") == 2
        assert call(tmp_path / "data", "--from-archive", tmp_path / "train.zip", "--repacked") == 0
        assert len(tree(tmp_path / "data")) == 4

    def test_a_corrupt_archive_is_fetched_anew_the_next_time(self, mirror, tmp_path, capsys):
        mirror.files["/zips/train.zip"] = IMAGES[:700] + b"?" + IMAGES[701:]
        options = ("--only", "train", "--mirror", mirror.url)
        assert call(tmp_path, *options) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "damaged" in err and "train.zip" in err
        assert set(tree(tmp_path)) == {"annotations/instances_a.json"}
        mirror.files["/zips/train.zip"] = IMAGES
        assert call(tmp_path, *options) == 0 and (tmp_path / "train" / "0.jpg").exists()

    def test_no_room(self, mirror, tmp_path, monkeypatch, capsys):
        usage = shutil.disk_usage(tmp_path)._replace(free=5000)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
        large = {"train": [dataclasses.replace(PARTS["train"][1], size=3 * 10**9, unpacked=4 * 10**9)]}
        for options in ((), ("--dry-run",)):
            assert call(tmp_path / "data", "--mirror", mirror.url, *options, parts=large) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and "7.00 GB are needed" in err and "0.00 GB are free" in err
        assert not mirror.asked and not (tmp_path / "data").exists()

    def test_room_counts_what_is_there(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
        one = Archive("a.zip", "http://h/a.zip", 6000, None, unpacked=6000)
        two = Archive("b.zip", "http://h/b.zip", 1000, None, unpacked=1000)
        with pytest.raises(UserError):
            download.check_space(tmp_path, [one], {}, keep=False)
        download.check_space(tmp_path, [one], {"a.zip": Path("disk/a.zip")}, keep=False)
        (tmp_path / "a.zip.part").write_bytes(b"x" * 3000)
        download.check_space(tmp_path, [one, two], {}, keep=False)
        with pytest.raises(UserError):
            download.check_space(tmp_path, [one, two], {}, keep=True)

    def test_bad_arguments(self, tmp_path, capsys):
        (tmp_path / "file").write_text("x")
        for arguments, word in [((tmp_path / "file",), "not a folder"), ((tmp_path, "--mirror", "disk"), "http")]:
            assert call(*arguments) == 2
            assert word in capsys.readouterr().err

    def test_ctrl_c(self, mirror, tmp_path, monkeypatch, capsys):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(download, "verify", stop)
        assert call(tmp_path, "--mirror", mirror.url) == 130
        assert "goes on from here" in capsys.readouterr().err
        monkeypatch.undo()
        mirror.asked.clear()
        assert call(tmp_path, "--mirror", mirror.url) == 0
        assert not any("boxes" in path for path, _ in mirror.asked)


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


LEAVING = ["../outside", "a/../../outside", "/outside", "a\\..\\..\\outside", "C:outside", "\\outside", ".."]
UNSAFE = [
    *(("a.zip", zipped({"fine": b"x", name: b"bad"}), "would leave") for name in LEAVING),
    *(("a.tar", tarred({"fine": b"x", name: b"bad"}), "would leave") for name in LEAVING),
    ("a.zip", zip_link("a"), "link"),
    ("a.tar", tarred({}, link("a", tarfile.SYMTYPE)), "link"),
    ("a.tar", tarred({"fine": b"x"}, link("a", tarfile.LNKTYPE, "fine")), "link"),
    ("a.tar", tarred({}, link("a", tarfile.FIFOTYPE)), "link or a device"),
    ("a.tar", tarred({}, link("a", tarfile.CHRTYPE)), "link or a device"),
]
BROKEN = [
    ("a.zip", b"no archive", "not a readable archive"),
    ("a.tar", b"no archive" * 100, "not a readable archive"),
    ("a.zip", zipped({"train/0": b"x" * 900}).replace(b"x" * 900, b"y" * 900), "not a readable archive"),
    ("a.zip", zipped({"train/0": b"x"}), "incomplete, 1 files and not 2 for train"),
    ("a.tar", tarred({"train/0": b"x", "train/1": b"x"})[:1024], "incomplete"),
    ("a.tar", tarred({"train/0": b"x", "train/1": b"x" * 9000})[:2000], "a.tar"),
    ("a.tar", tarred({"train/0": b"x", "train/1": b"x"}), "list.txt is not in it"),
    ("a.tar", tarred({"train/0": b"x"}, link("train/0", tarfile.REGTYPE)), "twice"),
]


class TestUnpack:
    @pytest.mark.parametrize(("name", "content", "word"), UNSAFE + BROKEN)
    def test_refused_and_nothing_written(self, tmp_path, name, content, word):
        target = tmp_path / "in" / "target"
        target.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
        archive = described(name, content, folders={"train": 2}, witnesses=("list.txt",))
        with pytest.raises(download.BadArchive) as error:
            download.unpack(tmp_path / name, archive, target)
        message = str(error.value)
        assert str(tmp_path / name) in message and word in message and "\n" not in message
        assert set(tree(tmp_path)) == {name} and list(target.iterdir()) == []

    def test_an_interrupted_unpacking_leaves_whole_files_and_is_done_again(self, tmp_path, monkeypatch):
        (tmp_path / "list.tar").write_bytes(LIST)
        archive, target, moved = PARTS["list"][0], tmp_path / "data", []
        replace = download.os.replace

        def stop_at_the_second(source, place):
            if moved:
                raise KeyboardInterrupt
            moved.append(replace(source, place))

        monkeypatch.setattr(download.os, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            download.unpack(tmp_path / "list.tar", archive, target)
        monkeypatch.undo()
        assert set(tree(target)) == {"kit/JPEGImages/1.jpg"} and not download.installed(archive, target)
        (target / ".list.tar.unpacking").mkdir()
        (target / ".list.tar.unpacking" / "rubbish").write_text("of a killed run")
        download.unpack(tmp_path / "list.tar", archive, target)
        assert set(tree(target)) == {"kit/JPEGImages/1.jpg", "kit/ImageSets/list.txt"} and download.installed(
            archive, target
        )

    def test_what_does_not_fit(self, tmp_path, monkeypatch):
        (tmp_path / "train.zip").write_bytes(IMAGES)
        usage = shutil.disk_usage(tmp_path)._replace(free=900)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="does not fit") as error:
            download.unpack(tmp_path / "train.zip", PARTS["train"][1], tmp_path / "data")
        assert not isinstance(error.value, download.BadArchive)  # the archive is good and stays
        assert tree(tmp_path / "data") == {}


# The tables


def test_voc_table_agrees_with_torchvision():
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    ours = {(archive.url, archive.md5) for archives in download_voc.PARTS.values() for archive in archives}
    assert ours == {
        (DATASET_YEAR_DICT[key]["url"], DATASET_YEAR_DICT[key]["md5"]) for key in ("2007", "2007-test", "2012")
    }


@pytest.mark.parametrize("script", [download_coco, download_voc])
def test_tables_are_complete(script):
    for archives in script.PARTS.values():
        for archive in archives:
            assert archive.url.endswith("/" + archive.name) and len(bytes.fromhex(archive.md5)) == 16
            assert archive.size > 1e6 and archive.unpacked > archive.size and (archive.folders or archive.witnesses)


def test_the_layout_is_one_that_the_package_reads(tmp_path, monkeypatch, capsys):
    """COCO in miniature through the real table: its names, patterns and folders, with sizes and counts of ours."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 6)).save(picture, "jpeg")
    names = {part: [f"{part}/{index:012d}.jpg" for index in range(first, first + 10)]
             for part, first in (("train2017", 0), ("val2017", 100), ("unlabeled2017", 200))}  # fmt: skip

    def document(part: str) -> bytes:
        rows = [
            {"id": int(Path(name).stem), "file_name": Path(name).name, "height": 6, "width": 8} for name in names[part]
        ]
        box = {"id": 1, "image_id": rows[0]["id"], "category_id": 1, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}
        return json.dumps({"images": rows, "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}).encode()

    jsons = {f"annotations/instances_{part}.json": document(part) for part in ("train2017", "val2017")}
    contents = {f"{part}.zip": zipped(dict.fromkeys(files, picture.getvalue())) for part, files in names.items()}
    contents["annotations_trainval2017.zip"] = zipped({**jsons, "annotations/captions_train2017.json": b"{}"})
    info = {"annotations/image_info_unlabeled2017.json": document("unlabeled2017")}
    contents["image_info_unlabeled2017.zip"] = zipped(info)

    def small(archive: Archive) -> Archive:
        (tmp_path / archive.name).write_bytes(contents[archive.name])
        folders = dict.fromkeys(archive.folders, 10)
        ours = described(archive.name, contents[archive.name])
        return dataclasses.replace(archive, size=ours.size, md5=ours.md5, unpacked=ours.unpacked, folders=folders)

    parts = {name: [small(archive) for archive in archives] for name, archives in download_coco.PARTS.items()}
    monkeypatch.setattr(download_coco, "PARTS", parts)
    given = [f"--from-archive={tmp_path / name}" for name in contents]
    target = tmp_path / "coco"
    assert download_coco.main([str(target), *given]) == 0
    splits = load(target, unlabelled=target / "unlabeled2017", percent=10)
    assert (len(splits.labelled), len(splits.unlabelled), len(splits.test)) == (1, 9 + 10, 10)
    assert not (target / "annotations" / "captions_train2017.json").exists()
    assert str(target) in capsys.readouterr().out
