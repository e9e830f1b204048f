"""Folds on disk: which images are labelled, read from the files of data_scripts/make_splits.py and checked on the way.

A folder of folds holds NAME.{fold}@{percent}.json (labelled), NAME.{fold}@{percent}-unlabeled.json (no boxes) and
manifest.json, the SHA-256 of each and of their source: processes that check the same one train on the same images.
"""

import hashlib
from pathlib import Path

from semidetr_lite.data.coco import read_json
from semidetr_lite.errors import UserError


def check_manifest(path, percent: float | None = None, fold: int | None = None) -> dict:
    """The manifest, once its files (all of them, or those of one percentage and fold) proved to be what it says.

    `path` is a manifest.json or its folder. The source is checked where it is found. "files" {name: {"sha256",
    "percent", "fold", "labelled", "images", "boxes"}} of the result are those checked. Raises UserError for a file that
    is missing or another one, and for a fold that is not there.
    """
    path = Path(path) / "manifest.json" if Path(path).is_dir() else Path(path)
    manifest = read_json(path)
    try:
        there = {name: (row["percent"], row["fold"]) for name, row in manifest["files"].items()}
        wanted = [name for name, (p, f) in there.items() if percent in (None, p) and fold in (None, f)]
        files = {name: manifest["files"][name] for name in wanted}
        expected = {path.parent / name: row["sha256"] for name, row in files.items()}
        source = path.parent / manifest["source"]["file"]
        expected |= {source: manifest["source"]["sha256"]} if source.exists() else {}
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a manifest of folds; make one with data_scripts/make_splits.py") from None
    if not files:
        listed = ", ".join(f"{one:g} % fold {other}" for one, other in sorted(set(there.values())))
        raise UserError(f"{path}: has no fold {fold} of {percent} %, only {listed}")
    advice = f"delete {path} and run data_scripts/make_splits.py again"
    for file, digest in expected.items():
        if not file.is_file():
            raise UserError(f"{file}: is missing, though {path} lists it; {advice}")
        if sha256(file) != digest:
            raise UserError(f"{file}: is not the file that {path} was made for; {advice}")
    return {**manifest, "files": files}


def labelled_in_manifest(path, image_ids: list[int], percent: float, fold: int) -> list[int]:
    """The sorted places in `image_ids` of the labelled images of a fold, as `labelled_indices` gives them for a draw.

    Raises UserError as `check_manifest` does, and where the fold has an image that `image_ids` does not have.
    """
    files = check_manifest(path, percent, fold)["files"]
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / next(name for name, row in files.items() if row["labelled"])
    place = {image_id: index for index, image_id in enumerate(image_ids)}
    chosen = [image["id"] for image in read_json(file)["images"]]
    unknown = [image_id for image_id in chosen if image_id not in place]
    if unknown:
        raise UserError(f"{file}: {len(unknown)} of its images are not among the data's, the first has id {unknown[0]}")
    return sorted(place[image_id] for image_id in chosen)


def sha256(path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
