"""Reading and writing files: JSON, JSON lines, digests, and files that are whole or absent.

A file is written to a temporary name beside it and then renamed, so that a crash or a full disk
leaves the old file as it was. Every function names the file in its UserError.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from semidetr_lite.errors import UserError

ADVICE = "free some space or choose another folder (after `semidetr train`: --resume goes on)"
BLOCK = 1 << 20  # bytes read at a time


def write_atomic(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file whole, or leave what was there.

    Args:
        path: the file; its folder is made.
        content: text (written as UTF-8), bytes, or a function that writes to the temporary path it
            is given.

    Raises UserError where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{random.randrange(10**6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch.save raises RuntimeError on a full disk
        reason = str(problem).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); {ADVICE}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content, indent: int | None = None) -> None:
    """Write `content` as one JSON document, whole or not at all.

    Raises UserError as `write_atomic` does.
    """
    write_atomic(path, json.dumps(content, indent=indent))


def read_json(path):
    """The content of a JSON file.

    Raises UserError naming the file and where it stops being JSON.
    """
    with json_problems(path):
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))


@contextmanager
def json_problems(path) -> Iterator[None]:
    """While a JSON file is read: what cannot be opened or parsed is a UserError naming it."""
    try:
        yield
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not valid json: {problem}") from problem


def read_jsonl(path, unfinished: bool = False) -> list[dict]:
    """The objects of a JSON-lines file, one per line; an empty list if there is no file.

    With `unfinished` a last line that was cut off is left out: the file is still being written, or
    its writer was killed. Raises UserError for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(dict(json.loads(line).items()))
        except (ValueError, AttributeError, RecursionError):
            if unfinished and number == len(lines):
                break
            problem = f"line {number} is not a JSON object, so these are not JSON lines"
            raise UserError(f"{path}: {problem}; mend or delete that line to go on") from None
    return objects


def append_jsonl(path: Path, objects: list[dict]) -> None:
    """Add one line per object to a JSON-lines file.

    The lines are on the disk when it returns. A full disk is a UserError, and the file is as long
    as before.
    """
    path = Path(path)
    text = memoryview("".join(json.dumps(entry) + "\n" for entry in objects).encode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            length = file.tell()
            try:
                while text:  # a nearly full disk takes only some of the bytes
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(length)
                raise
    except OSError as problem:
        raise UserError(f"{path}: cannot be written ({problem.strerror}); {ADVICE}") from None


def file_digest(
    path, algorithm: str = "sha256", progress: Callable[[int], object] | None = None
) -> str:
    """The hexadecimal digest of a file by one of hashlib's algorithms.

    `progress` is called with the number of bytes read since the last call.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()
