"""Files are whole or absent, and what cannot be read is one line that names the file."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from semidetr_lite.errors import UserError, as_user_error
from semidetr_lite.files import (
    append_jsonl,
    file_digest,
    read_json,
    read_jsonl,
    write_atomic,
    write_json,
)


def one_line(error: UserError, path: Path) -> str:
    message = str(error)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(
    "content", ["grün\n", "grün\n".encode(), lambda path: path.write_bytes("grün\n".encode())]
)
def test_text_bytes_and_writers_make_the_same_file(tmp_path, content):
    path = tmp_path / "new" / "folder" / "a.txt"
    for _ in range(2):  # into nothing, and over a file
        write_atomic(path, content)
        assert path.read_bytes() == "grün\n".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("problem", [OSError(28, "No space left"), RuntimeError("torch: a\nb")])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, problem):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise problem

    with pytest.raises(UserError) as error:
        write_atomic(path, half)
    one_line(error.value, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def stopped(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.txt", stopped)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "a.txt").symlink_to(tmp_path / "theirs")
    write_atomic(tmp_path / "a.txt", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "a.txt").is_symlink() and (tmp_path / "a.txt").read_text() == "ours"


@pytest.mark.parametrize("content", [{"name": "日本語", "numbers": [1, 2.5, None]}, ["\ud800"], 3])
def test_json_comes_back(tmp_path, content):
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    (tmp_path / "a.json").write_text("\ufeff" + text, encoding="utf-8")  # as some editors save it
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_is_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    for path in (tmp_path / "a.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError) as error:
            read_json(path)
        one_line(error.value, path)


def test_json_lines_are_added_and_read(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, [{"step": 1}, {"step": 2}])
    append_jsonl(path, [])
    append_jsonl(path, [{"step": 3}])
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("last", ['{"step"', '{"step": 3', "[1]"])
def test_a_last_line_that_was_cut_off(tmp_path, last):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{last}')
    assert read_jsonl(path, unfinished=True) == [{"step": 1}, {"step": 2}]
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert "line 3" in one_line(error.value, path)
    path.write_text(f'{{"step": 1}}\n{last}\n{{"step": 2}}\n')
    with pytest.raises(UserError) as error:  # in the middle it is damage
        read_jsonl(path, unfinished=True)
    assert "line 2" in one_line(error.value, path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(UserError) as error:
        append_jsonl(path, [{"step": 1}])
    one_line(error.value, path)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_half_a_line_is_taken_back(tmp_path):
    import resource
    import signal

    path = tmp_path / "log.jsonl"
    append_jsonl(path, [{"step": 1}])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            append_jsonl(path, [{"step": 2, "boxes": [0.5] * 1000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    one_line(error.value, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_digests_are_those_of_hashlib(tmp_path, algorithm):
    content = bytes(range(256)) * 10_000  # over several blocks
    (tmp_path / "a").write_bytes(content)
    reported = []
    digest = file_digest(tmp_path / "a", algorithm, reported.append)
    assert digest == hashlib.new(algorithm, content).hexdigest()
    assert sum(reported) == len(content) and len(reported) > 1
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_any_exception_becomes_one_line_with_the_file():
    with pytest.raises(UserError) as error, as_user_error("run/log.jsonl", "not a log"):
        json.loads("{\n\n")
    message = str(error.value)
    assert message.startswith("run/log.jsonl: not a log") and "\n" not in message
    assert "JSONDecodeError" in message
    with pytest.raises(UserError, match="^mine$"), as_user_error("file", "problem"):
        raise UserError("mine")
    with pytest.raises(KeyboardInterrupt), as_user_error("file", "problem"):
        raise KeyboardInterrupt
