"""Published archives to a folder: download, verify, unpack.

A download goes to NAME.part and continues from there when it is run again. Size and MD5 are
compared with those that the publisher's file has. Unpacking goes to a folder beside the data, and
only whole files move from there to their place. Python's own guards keep every file below that
folder: tarfile's `data` filter, and zipfile's cleaning of names.
"""

import argparse
import fnmatch
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from _script import run
from tqdm import tqdm

from semidetr_lite.errors import UserError
from semidetr_lite.files import file_digest

MAX_FAILURES = 8  # tries in a row that bring no new byte
PAUSE = 1.0  # seconds before the next try, doubled with each failure
LONGEST_PAUSE = 60.0
TIMEOUT = 30.0  # seconds of silence after which a connection counts as cut
BLOCK = 1 << 18  # bytes read at a time
FINAL = (400, 401, 403, 404, 405, 410, 416, 451)  # HTTP statuses that trying again does not change


@dataclass(frozen=True)
class Archive:
    """One published file."""

    name: str
    url: str
    size: int  # bytes, as published
    md5: str
    unpacked: int  # bytes on disk, about
    folders: dict[str, int] = field(default_factory=dict)  # {folder: files it holds at least}
    witnesses: tuple[str, ...] = ()  # files that are there once all of the archive is unpacked
    wanted: str = "*"  # pattern of the members to unpack


class BadArchive(UserError):
    """An archive that is damaged, incomplete or unsafe to unpack."""


def main(argv, description: str, parts: dict[str, list[Archive]], next_step: str) -> int:
    """The command line of a download script; returns the exit status.

    Args:
        argv: the words of the command line, None for those of the process.
        description: the help text.
        parts: {name for --only: its archives}.
        next_step: printed at the end, {target} in it replaced by the folder.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="folder to fill")
    parser.add_argument(
        "--only",
        action="append",
        choices=parts,
        default=[],
        help="fetch this part; may be repeated (default: all)",
    )
    parser.add_argument(
        "--from-archive",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an archive on a disk, to unpack and leave there; repeat it for several; "
        "without --only nothing is downloaded",
    )
    parser.add_argument("--keep", action="store_true", help="keep archives after unpacking")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )
    options = parser.parse_args(argv)
    return run(_work, options, parts, next_step)


def _work(options: argparse.Namespace, parts: dict[str, list[Archive]], next_step: str) -> None:
    target = options.target
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is not a folder; give the folder to fill")
    by_name = {archive.name: archive for archives in parts.values() for archive in archives}
    given = _given(options.from_archive, by_name)
    names = options.only or ([] if given else list(parts))
    wanted = {archive.name: archive for part in names for archive in parts[part]}
    wanted |= {name: by_name[name] for name in given}
    todo = [archive for archive in wanted.values() if not installed(archive, target)]
    for archive in wanted.values():
        plan = (
            _plan(archive, target, given) if archive in todo else f"is unpacked in {target} already"
        )
        print(f"{archive.name}: {plan}")
    check_space(target, todo, given, options.keep)
    if options.dry_run:
        return
    target.mkdir(parents=True, exist_ok=True)
    for archive in todo:
        path = given.get(archive.name, target / archive.name)
        ours = archive.name not in given
        if ours:
            download(archive, path)
        try:
            verify(path, archive)
            unpack(path, archive, target)
        except BadArchive:
            if ours:  # so that the next run downloads it again
                path.unlink(missing_ok=True)
            raise
        if ours and not options.keep:
            path.unlink()
    print(next_step.format(target=target))


def _given(paths: list[Path], by_name: dict[str, Archive]) -> dict[str, Path]:
    """{archive name: path} of the files on disk. Raises UserError for a missing or unknown one."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such archive")
        if path.name not in by_name:
            raise UserError(
                f"{path}: not an archive of this data set, which has {', '.join(by_name)}"
            )
    return {path.name: path for path in paths}


def _plan(archive: Archive, target: Path, given: dict[str, Path]) -> str:
    if archive.name in given:
        return f"to unpack from {given[archive.name]}"
    if (target / archive.name).exists():
        return "is downloaded already, to unpack"
    arrived = _size(target / f"{archive.name}.part")
    begun = f", {gigabytes(arrived)} of it are here" if arrived else ""
    return f"to download, {gigabytes(archive.size)}{begun}, from {archive.url}"


def installed(archive: Archive, target: Path) -> bool:
    """Whether the archive is unpacked in `target`."""
    return _missing(archive, target) is None


def _missing(archive: Archive, folder: Path) -> str | None:
    """What of an unpacked archive `folder` lacks, in words, or None."""
    for name in archive.witnesses:
        if not (folder / name).is_file():
            return f"{name} is not in it"
    for name, count in archive.folders.items():
        there = _count_files(folder / name)
        if there < count:
            return f"{there:,} files and not {count:,} for {name}"
    return None


def _count_files(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(not entry.name.startswith(".") for entry in entries)


def check_space(
    target: Path, todo: list[Archive], given: dict[str, Path], keep: bool = False
) -> None:
    """Raise UserError unless the disk of `target` has room for archives and unpacked files."""
    used = 0  # after the archives so far
    peak = 0
    for archive in todo:
        is_here = archive.name in given or (target / archive.name).exists()
        arrived = _size(target / f"{archive.name}.part")
        to_download = 0 if is_here else max(0, archive.size - arrived)
        peak = max(peak, used + to_download + archive.unpacked)
        used += archive.unpacked + (to_download if keep else 0)
    existing = next(folder for folder in [target, *target.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if todo:
        print(f"{gigabytes(peak)} of disk needed, {gigabytes(free)} free")
    if peak > free:
        needed = f"{gigabytes(peak)} are needed, archives and unpacked files together"
        advice = "free some space, choose another folder, or take a part of the data with --only"
        raise UserError(f"{target}: {needed}, and {gigabytes(free)} are free; {advice}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


# From a server to a file


def download(archive: Archive, path: Path) -> None:
    """Fetch an archive to `path`, continuing `path`.part if it is there.

    A connection that is cut is tried again after a pause. Raises UserError where trying again would
    not help, or has not helped MAX_FAILURES times in a row.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    furthest = _size(part)
    failures = 0
    while _size(part) != archive.size:
        try:
            _append(archive, part)
            reason = f"cut off after {_size(part):,} of {archive.size:,} bytes"
        except urllib.error.HTTPError as problem:
            reason = f"{problem.code} {problem.reason}"
            if problem.code in FINAL:
                raise UserError(f"{archive.url}: the server answers {reason}") from None
        except (OSError, http.client.HTTPException) as problem:
            if isinstance(problem, OSError) and problem.filename:  # a forbidden folder
                raise
            reason = str(getattr(problem, "reason", None) or problem) or type(problem).__name__
        if _size(part) == archive.size:
            break
        failures = 0 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if failures >= MAX_FAILURES:
            problem = f"gave up after {failures} tries ({reason})"
            raise UserError(f"{archive.url}: {problem}; the same command continues from here")
        pause = min(LONGEST_PAUSE, PAUSE * 2 ** max(0, failures - 1))
        print(f"{archive.name}: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)
    os.replace(part, path)


def _append(archive: Archive, part: Path) -> None:
    """One connection: append what it brings to `part`; start over if the server has no ranges."""
    arrived = _size(part)
    if arrived > archive.size:
        part.unlink()
        arrived = 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "semidetr-lite"}
    if arrived:
        headers["Range"] = f"bytes={arrived}-"
    request = urllib.request.Request(archive.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        start = arrived if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        if length is not None and start + int(length) != archive.size:
            total = start + int(length)
            problem = f"has {total:,} bytes and not {archive.size:,} as published"
            raise UserError(f"{archive.url}: {problem}")
        if start < arrived:
            message = "the server cannot continue in the middle; starting over"
            print(f"{archive.name}: {message}", file=sys.stderr)
        bar = tqdm(
            total=archive.size,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=archive.name,
            disable=None,
        )
        with bar, open(part, "ab" if start else "wb") as file:
            while block := answer.read(BLOCK):
                _write(file, block, part)
                bar.update(len(block))


def _write(file, block: bytes, part: Path) -> None:
    """Write a block and flush it, so that a full disk shows here and not as a broken connection."""
    try:
        file.write(block)
        file.flush()
    except OSError as problem:
        reason = f"cannot be written ({problem.strerror})"
        raise UserError(f"{part}: {reason}; free some space and run the command again") from None


def verify(path: Path, archive: Archive) -> None:
    """Raise BadArchive unless the file is the published one by size and MD5."""
    size = path.stat().st_size
    if size != archive.size:
        problem = f"has {size:,} bytes and not {archive.size:,} as published"
        raise BadArchive(f"{path}: {problem}; fetch it again")
    title = f"{archive.name} MD5"
    with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as bar:
        md5 = file_digest(path, "md5", bar.update)
    if md5 != archive.md5:
        problem = f"damaged, its MD5 is {md5} and not {archive.md5} as published"
        raise BadArchive(f"{path}: {problem}; fetch it again")


# From an archive to a folder


def unpack(path: Path, archive: Archive, target: Path) -> None:
    """Unpack the wanted members into `target`: whole files only, the witnesses last.

    Raises BadArchive for an archive that cannot be read, is incomplete, or wants to write
    elsewhere.
    """
    staging = target / f".{archive.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    unreadable = (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError)
    try:
        try:
            _extract(path, archive, staging)
        except (*unreadable, NotImplementedError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())
            raise BadArchive(f"{path}: cannot be unpacked ({reason}); fetch it again") from None
        missing = _missing(archive, staging)
        if missing is not None:
            raise BadArchive(f"{path}: incomplete, {missing}; fetch it again")
        names = [entry.relative_to(staging) for entry in staging.rglob("*") if entry.is_file()]
        for name in sorted(names, key=lambda name: name.as_posix() in archive.witnesses):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(path: Path, archive: Archive, folder: Path) -> None:
    """The wanted members of a zip or tar into `folder`."""
    progress = {"unit": " files", "desc": f"{archive.name} unpack", "disable": None}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as opened:
            names = fnmatch.filter(opened.namelist(), archive.wanted)
            for name in tqdm(names, **progress):
                opened.extract(name, folder)
        return
    if not hasattr(tarfile, "data_filter"):
        advice = "update Python to 3.10.12, 3.11.4, 3.12 or later"
        raise UserError(f"{path}: this Python cannot unpack a tar safely; {advice}")
    with tarfile.open(path, "r:") as opened:
        wanted = (m for m in opened if fnmatch.fnmatchcase(m.name, archive.wanted))
        opened.extractall(folder, members=tqdm(wanted, **progress), filter="data")
