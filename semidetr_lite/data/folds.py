"""Folds on disk: which images are labelled, in the files that data_scripts/make_splits.py writes.

A folder of folds holds NAME.{fold}@{percent}.json (labelled), NAME.{fold}@{percent}-unlabeled.json
(no boxes) and manifest.json. The manifest has the SHA-256 of each file and of the json they were
drawn from: processes that check the same manifest train on the same images.
"""

from pathlib import Path

from semidetr_lite.errors import UserError
from semidetr_lite.files import file_digest, read_json


def check_manifest(path, percent: float | None = None, fold: int | None = None) -> dict:
    """The manifest of a folder of folds, after its files proved to be those it lists.

    Args:
        path: a manifest.json or its folder.
        percent, fold: check the files of this percentage and fold only; None checks all of them.
            The json they were drawn from is checked where it is there.

    Returns:
        The manifest; its "files" {name: {"sha256", "percent", "fold", "labelled", "images",
        "boxes"}} are those checked.

    Raises UserError for a file that is missing or has other content, and for a fold that is not
    there.
    """
    path = Path(path) / "manifest.json" if Path(path).is_dir() else Path(path)
    manifest = read_json(path)
    try:
        folds = {name: (row["percent"], row["fold"]) for name, row in manifest["files"].items()}
        files = {
            name: manifest["files"][name]
            for name, (file_percent, file_fold) in folds.items()
            if percent in (None, file_percent) and fold in (None, file_fold)
        }
        digests = {path.parent / name: row["sha256"] for name, row in files.items()}
        source = path.parent / manifest["source"]["file"]
        if source.exists():
            digests[source] = manifest["source"]["sha256"]
    except (TypeError, KeyError, AttributeError):
        advice = "make one with data_scripts/make_splits.py"
        raise UserError(f"{path}: not a manifest of folds; {advice}") from None
    if not files:
        listed = ", ".join(f"{p:g} % fold {f}" for p, f in sorted(set(folds.values())))
        raise UserError(f"{path}: has no fold {fold} of {percent} %, only {listed}")
    advice = f"delete {path} and run data_scripts/make_splits.py again"
    for file, digest in digests.items():
        if not file.is_file():
            raise UserError(f"{file}: is missing, though {path} lists it; {advice}")
        if file_digest(file) != digest:
            raise UserError(f"{file}: is not the file that {path} was made for; {advice}")
    return {**manifest, "files": files}


def labelled_in_manifest(path, image_ids: list[int], percent: float, fold: int) -> list[int]:
    """The sorted indices into `image_ids` of the labelled images of a fold.

    It returns what `labelled_indices` returns for a draw. Raises UserError as `check_manifest`
    does, and where the fold has an image that is not in `image_ids`.
    """
    files = check_manifest(path, percent, fold)["files"]
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / next(name for name, row in files.items() if row["labelled"])
    index_of = {image_id: index for index, image_id in enumerate(image_ids)}
    labelled_ids = [image["id"] for image in read_json(file)["images"]]
    unknown = [image_id for image_id in labelled_ids if image_id not in index_of]
    if unknown:
        problem = f"{len(unknown)} of its images are not in the data, the first has id {unknown[0]}"
        raise UserError(f"{file}: {problem}")
    return sorted(index_of[image_id] for image_id in labelled_ids)
