"""What the scripts of this folder share: one clear line for an error, and files written whole or not at all."""

import hashlib
import json
import os
import sys
from pathlib import Path

from semidetr_lite.errors import UserError


def run(work, *arguments) -> int:
    """Call `work(*arguments)` and return the exit status: 0, 2 after a UserError or a full disk, 130 after Ctrl-C."""
    try:
        work(*arguments)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        place = f"{problem.filename}: " if problem.filename else ""
        print(f"error: {place}{problem.strerror or problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def write_json(path: Path, content) -> None:
    """Write `content` beside `path`, then put it in its place at once. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path, name: str, report=lambda count: None) -> str:
    """The hexadecimal digest of a file by hashlib's algorithm `name`; `report(bytes)` is called as it is read."""
    found = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
            report(len(block))
    return found.hexdigest()
