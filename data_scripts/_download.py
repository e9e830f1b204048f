"""Archives from a server or a disk to a folder, over a bad network: download, verify, unpack, and never twice.

A download goes to NAME.part and goes on from there when it is run again, if the server can (HTTP ranges); a cut
connection is tried again after a pause. What arrived is compared with the size and the MD5 that the publisher's file
has. Unpacking goes to a folder beside the data, and only whole files move from there to their place, so that a file
in its place is always a whole one. An archive may hold folders and plain files alone, all below its top: one with
links, devices, absolute names or ".." is refused.
"""

import argparse
import fnmatch
import http.client
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from _script import digest, run
from tqdm import tqdm

from semidetr_lite.errors import UserError

TRIES = 8  # in a row without a single new byte
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, doubled each time
TIMEOUT = 30.0  # seconds of silence after which a connection counts as cut
BLOCK = 1 << 18
GONE = (400, 401, 403, 404, 405, 410, 451)  # answers that trying again does not change


@dataclass(frozen=True)
class Archive:
    """One published file.

    `url` where it lies; `size` in bytes and `md5` as published, None where unknown; `unpacked` bytes on disk, about.
    `folders` {folder: number of files} it puts there at least, `witnesses` further files that are there once all of it
    is, both relative to the target. `wanted` is the pattern of the members to unpack.
    """

    name: str
    url: str
    size: int | None
    md5: str | None
    unpacked: int
    folders: dict[str, int] = field(default_factory=dict)
    witnesses: tuple[str, ...] = ()
    wanted: str = "*"


class BadArchive(UserError):
    """An archive that is not what it should be: damaged, cut off, or unsafe to unpack."""


# The commands


def main(argv, description: str, parts: dict[str, list[Archive]], next_step: str) -> int:
    """The command line of a download script. `parts` {name for --only: its archives}; returns the exit status.

    `next_step` is printed at the end, its {target} replaced by the folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to fill")
    parser.add_argument(
        "--only", action="append", choices=parts, default=[], help="fetch this part; may be repeated (all if not given)"
    )
    parser.add_argument("--mirror", help="http(s) address of a folder with the archives, in place of the publisher's")
    parser.add_argument(
        "--from-archive",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an archive you have already, left as it is; may be repeated; without --only nothing else is fetched",
    )
    parser.add_argument("--repacked", action="store_true", help="accept archives of another size or MD5 than published")
    parser.add_argument("--keep", action="store_true", help="keep the downloaded archives after unpacking")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    options = parser.parse_args(argv)
    return run(_work, options, parts, next_step)


def _work(options, parts: dict[str, list[Archive]], next_step: str) -> None:
    target = options.target
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is not a folder; give the folder to fill")
    if options.mirror and not options.mirror.startswith(("http://", "https://")):
        raise UserError(f"{options.mirror}: not an http(s) address; for a file on a disk use --from-archive FILE")
    known = {archive.name: archive for archives in parts.values() for archive in archives}
    given = _given(options.from_archive, known)
    names = options.only or ([] if given else list(parts))
    wanted = [archive for part in names for archive in parts[part]] + [known[name] for name in given]
    chosen = list({archive.name: archive for archive in wanted}.values())
    todo = [archive for archive in chosen if not installed(archive, target)]
    for archive in chosen:
        print(f"{archive.name}: {_plan(archive, target, given, todo, options.mirror)}")
    check_space(target, todo, given, options.keep)
    if options.dry_run:
        return
    target.mkdir(parents=True, exist_ok=True)
    for archive in todo:
        path = given.get(archive.name, target / archive.name)
        if archive.name not in given:
            download(addresses(archive, options.mirror), path, archive.size if not options.repacked else None)
        try:
            verify(path, archive, options.repacked)
            unpack(path, archive, target)
        except BadArchive:
            if archive.name not in given:  # what is wrong with it stays wrong: the next run must fetch it anew
                path.unlink(missing_ok=True)
            raise
        if archive.name not in given and not options.keep:
            path.unlink()
    print(next_step.format(target=target))


def _given(paths: list[Path], known: dict[str, Archive]) -> dict[str, Path]:
    """{archive name: path} of the files on disk. Raises UserError for a missing file or an unknown name."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such archive")
        if path.name not in known:
            raise UserError(f"{path}: not an archive of this data set, which has {', '.join(known)}")
    return {path.name: path for path in paths}


def _plan(archive: Archive, target: Path, given: dict, todo: list[Archive], mirror: str | None) -> str:
    if archive not in todo:
        return f"is unpacked in {target} already"
    if archive.name in given:
        return f"to unpack from {given[archive.name]}"
    if (target / archive.name).exists():
        return "is downloaded already, to unpack"
    begun = _size(target / f"{archive.name}.part")
    started = f", {gigabytes(begun)} of it are here" if begun else ""
    size = gigabytes(archive.size) if archive.size else "unknown size"
    return f"to download, {size}{started}, from {addresses(archive, mirror)[0]}"


def installed(archive: Archive, target: Path) -> bool:
    """Whether the archive's content lies in `target`: its witnesses exist, its folders hold enough files."""
    if not all((target / name).is_file() for name in archive.witnesses):
        return False
    return all(_count_files(target / folder) >= count for folder, count in archive.folders.items())


def _count_files(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(not entry.name.startswith(".") for entry in entries)


def addresses(archive: Archive, mirror: str | None) -> list[str]:
    """Where to look for the archive, in this order: a mirror has it in the folder named or in the publisher's tree."""
    if not mirror:
        return [archive.url]
    base = mirror.rstrip("/")
    tree = archive.url.split("/", 3)[3]  # without https://host/
    return [f"{base}/{archive.name}", f"{base}/{tree}"]


def check_space(target: Path, todo: list[Archive], given: dict, keep: bool) -> None:
    """Raise UserError unless the disk of `target` has room for everything still to do, archives included."""
    used = peak = 0
    for archive in todo:
        here = archive.name in given or (target / archive.name).exists()
        part = target / f"{archive.name}.part"
        coming = 0 if here else max(0, (archive.size or archive.unpacked) - _size(part))
        peak = max(peak, used + coming + archive.unpacked)
        used += archive.unpacked + (coming if keep else 0)
    existing = next(folder for folder in [target, *target.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if todo:
        print(f"{gigabytes(peak)} of disk needed, {gigabytes(free)} free")
    if peak > free:
        raise UserError(
            f"{target}: {gigabytes(peak)} are needed, archives and unpacked files together, and {gigabytes(free)} are "
            "free; free some space, choose another folder, or take a part of the data with --only"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


# From a server to a file


class Cut(OSError):
    """The connection ended before the file did."""


def download(urls: list[str], path: Path, size: int | None) -> None:
    """The file at the first of `urls` that has it, `size` bytes long (None: as long as the server says), at `path`.

    Goes on from `path`.part. Raises UserError where trying again would not help, or has not helped TRIES times.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    urls, failures, furthest = list(urls), 0, _size(part)
    while True:
        try:
            _fetch(urls[0], part, size)
            break
        except urllib.error.HTTPError as problem:
            if problem.code in (404, 410) and len(urls) > 1:
                urls.pop(0)
                continue
            if problem.code in GONE:
                raise UserError(f"{urls[0]}: the server answers {problem.code} {problem.reason}") from None
            reason = f"{problem.code} {problem.reason}"
        except (OSError, http.client.HTTPException) as problem:
            if isinstance(problem, OSError) and problem.filename:  # a full disk, a forbidden folder
                raise
            reason = str(getattr(problem, "reason", None) or problem) or type(problem).__name__
        failures = 0 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if failures >= TRIES:
            raise UserError(f"{urls[0]}: gave up after {TRIES} tries ({reason}); the same command goes on from here")
        pause = min(LONGEST_PAUSE, PAUSE * 2 ** max(0, failures - 1))
        print(f"{path.name}: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)
    os.replace(part, path)


def _fetch(url: str, part: Path, size: int | None) -> None:
    """One connection: append to `part` what it lacks. Returns when it is whole, raises Cut when it is not yet."""
    have = _size(part)
    if have and have == size:
        return
    if size is not None and have > size:
        part.unlink()
        have = 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "semidetr-lite"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as problem:
        if problem.code == 416 and have:
            whole = re.fullmatch(r"bytes \*/(\d+)", problem.headers.get("Content-Range", ""))
            if whole and int(whole[1]) == have and size is None:
                return
            part.unlink()
            raise Cut("the server does not have what is missing; starting over") from None
        raise
    except ValueError as problem:  # no address at all
        raise UserError(f"{url}: {problem}") from None
    with answer:
        start, total = _where(answer, have, url)
        if size is not None and total is not None and total != size:
            raise UserError(f"{url}: has {total:,} bytes and not {size:,} as published; try another --mirror")
        if start < have:
            print(f"{url}: the server cannot go on from the middle; starting over", file=sys.stderr)
        _append(answer, part, start, total, url.rsplit("/", 1)[-1])
    end, expected = part.stat().st_size, total if total is not None else size
    if expected is not None and end != expected:
        raise Cut(f"cut off after {end:,} of {expected:,} bytes")


def _where(answer, have: int, url: str) -> tuple[int, int | None]:
    """(first byte that an answer brings, bytes of the whole file or None), from its status and headers."""
    length = answer.headers.get("Content-Length")
    length = int(length) if length and length.isdigit() else None
    if answer.status != 206:
        return 0, length
    stated = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if not stated or int(stated[1]) != have:
        raise UserError(f"{url}: the server sends another part than the one asked for; try another --mirror")
    return have, int(stated[2]) if stated[2] != "*" else None


def _append(answer, part: Path, start: int, total: int | None, name: str) -> None:
    with (
        open(part, "r+b" if start else "wb") as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None) as bar,
    ):
        file.seek(start)
        while block := answer.read(BLOCK):
            try:
                file.write(block)
            except OSError as problem:
                raise UserError(f"{part}: cannot be written ({problem.strerror}); free some space and go on") from None
            bar.update(len(block))


def verify(path: Path, archive: Archive, repacked: bool = False) -> None:
    """Raise BadArchive unless the file is the published one by size and MD5, or `repacked` ones are welcome."""
    size = path.stat().st_size
    if repacked:
        return
    advice = "fetch it again, or use --repacked if you trust where it comes from"
    if archive.size is not None and size != archive.size:
        raise BadArchive(f"{path}: has {size:,} bytes and not {archive.size:,} as published; {advice}")
    if archive.md5 is not None:
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"{archive.name} MD5", disable=None) as bar:
            found = digest(path, "md5", bar.update)
        if found != archive.md5:
            raise BadArchive(f"{path}: damaged, its MD5 is {found} and not {archive.md5} as published; {advice}")


# From an archive to a folder


def unpack(path: Path, archive: Archive, target: Path) -> None:
    """Unpack what is wanted into `target`: whole files only, the witnesses last. Raises BadArchive."""
    staging = target / f".{archive.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        try:
            _write_members(path, archive, staging)
        except (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as bad:
            raise BadArchive(f"{path}: not a readable archive ({bad}); fetch it again") from None
        _check_complete(path, archive, staging)
        files = [found.relative_to(staging) for found in staging.rglob("*") if found.is_file()]
        for name in sorted(files, key=lambda name: (name.as_posix() in archive.witnesses, name)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_members(path: Path, archive: Archive, staging: Path) -> None:
    room = shutil.disk_usage(staging).free
    for name, size, content in tqdm(_members(path), unit=" files", desc=f"{archive.name} unpack", disable=None):
        place = staging / safe_name(name, path)
        if not fnmatch.fnmatchcase(name, archive.wanted):
            continue
        room -= size
        if room < 0:
            raise UserError(f"{path}: what it holds does not fit on the disk of {staging.parent}; free some space")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(place, "xb")
        except (FileExistsError, IsADirectoryError):
            raise BadArchive(f"{path}: refused, it holds {name!r} twice") from None
        with file:
            shutil.copyfileobj(content, file, BLOCK)
        if place.stat().st_size != size:
            raise BadArchive(f"{path}: {name} is cut off; fetch the archive again")


def _members(path: Path) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, bytes, content) of each plain file of a zip or tar. Raises BadArchive for a link or a device."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as opened:
            for entry in opened.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if entry.is_dir():
                    continue
                if kind not in (0, stat.S_IFREG):
                    raise BadArchive(f"{path}: refused, {entry.filename!r} in it is a link or a device")
                with opened.open(entry) as content:
                    yield entry.filename, entry.file_size, content
        return
    with tarfile.open(path, "r:") as opened:
        for member in opened:
            if member.isdir():
                continue
            if not member.isreg():
                raise BadArchive(f"{path}: refused, {member.name!r} in it is a link or a device")
            with opened.extractfile(member) as content:
                yield member.name, member.size, content


def safe_name(name: str, path: Path) -> str:
    """`name`, if it stays below the folder it is unpacked in, on every system. Raises BadArchive."""
    pieces = re.split(r"[/\\]", name)
    if not name or pieces[0] == "" or ".." in pieces or ":" in name or "\0" in name:
        raise BadArchive(f"{path}: refused, {name!r} in it would leave the folder it is unpacked in")
    return name


def _check_complete(path: Path, archive: Archive, staging: Path) -> None:
    for folder, count in archive.folders.items():
        found = _count_files(staging / folder)
        if found < count:
            raise BadArchive(f"{path}: incomplete, {found:,} files and not {count:,} for {folder}; fetch it again")
    for name in archive.witnesses:
        if not (staging / name).is_file():
            raise BadArchive(f"{path}: incomplete, {name} is not in it; fetch it again")
