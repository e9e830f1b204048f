"""COCO 2017: images and annotations, in the layout that `semidetr train --data` reads.

    TARGET/annotations/instances_train2017.json  instances_val2017.json
                       image_info_unlabeled2017.json
    TARGET/train2017/  val2017/  unlabeled2017/

    python data_scripts/download_coco.py data/coco
        everything, 40 GB of downloads
    python data_scripts/download_coco.py data/coco --only train --only val
        what 1 to 10 % labels need, 20 GB
    python data_scripts/download_coco.py data/coco --from-archive disk/val2017.zip
        an archive that you have already

A second run of the same command continues where the first was stopped or cut off. Of the
annotations only the boxes (instances_*) are unpacked. Terms: the annotations are CC BY 4.0, each
photograph has the licence its row in the json names.
"""

import sys

from _download import Archive
from _download import main as download_main

HOST = "http://images.cocodataset.org"

# Sizes and MD5 are those of the files on images.cocodataset.org, as several public download scripts
# that check them
# agree on; `unpacked` is rounded up. They were not downloaded to be measured for this table.
TRAIN = Archive(
    "train2017.zip",
    f"{HOST}/zips/train2017.zip",
    size=19_336_861_798,
    md5="cced6f7f71b7629ddf16f17bbcfab6b2",
    unpacked=19_700_000_000,
    folders={"train2017": 118_287},
)
VAL = Archive(
    "val2017.zip",
    f"{HOST}/zips/val2017.zip",
    size=815_585_330,
    md5="442b8da7639aecaf257c1dceb8ba8c80",
    unpacked=840_000_000,
    folders={"val2017": 5_000},
)
UNLABELED = Archive(
    "unlabeled2017.zip",
    f"{HOST}/zips/unlabeled2017.zip",
    size=20_126_613_414,
    md5="7ebc562819fdb32847aab79530457326",
    unpacked=20_500_000_000,
    folders={"unlabeled2017": 123_403},
)
BOXES = Archive(
    "annotations_trainval2017.zip",
    f"{HOST}/annotations/annotations_trainval2017.zip",
    size=252_907_541,
    md5="f4bbac642086de4f52a3fdda2de5fa2c",
    unpacked=500_000_000,
    witnesses=("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
    wanted="annotations/instances_*",
)
UNLABELED_LIST = Archive(
    "image_info_unlabeled2017.zip",
    f"{HOST}/annotations/image_info_unlabeled2017.zip",
    size=4_902_013,
    md5="ede38355d5c3e5251bb7f8b68e2c068f",
    unpacked=40_000_000,
    witnesses=("annotations/image_info_unlabeled2017.json",),
)

PARTS = {
    "annotations": [BOXES],
    "val": [BOXES, VAL],
    "train": [BOXES, TRAIN],
    "unlabeled": [UNLABELED_LIST, UNLABELED],
}
NEXT = (
    "{target}: ready; next: "
    "python data_scripts/make_splits.py {target}/annotations/instances_train2017.json, "
    "or semidetr train --preset coco-10pct --data {target} --out RUN"
)


def main(argv=None) -> int:
    """Fetch and unpack; the exit status is 0, or 2 after one line about what is wrong."""
    return download_main(argv, __doc__, PARTS, NEXT)


if __name__ == "__main__":
    sys.exit(main())
