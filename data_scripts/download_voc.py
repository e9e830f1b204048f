"""Pascal VOC 2007 trainval and test, 2012 trainval, as the tree that voc_to_coco.py reads.

    TARGET/VOCdevkit/VOC2007/  VOC2012/    each with Annotations/ ImageSets/ JPEGImages/

    python data_scripts/download_voc.py data/voc
        everything, 2.9 GB of downloads
    python data_scripts/download_voc.py data/voc --only 2007-test
        one part
    python data_scripts/download_voc.py data/voc --from-archive disk/VOCtest_06-Nov-2007.tar
        an archive that you have already

A second run of the same command continues where the first was stopped or cut off. Terms: the
photographs are from Flickr and fall under its terms of use; for research and teaching.
"""

import sys

from _download import Archive
from _download import main as download_main

HOST = "https://thor.robots.ox.ac.uk/pascal/VOC"

# Addresses and MD5 as in torchvision.datasets.voc; the sizes are what the servers state. Not
# downloaded for this table.
# Both archives of 2007 fill the same folders: the list of its images tells which one is there.
TRAINVAL_2007 = Archive(
    "VOCtrainval_06-Nov-2007.tar",
    f"{HOST}/voc2007/VOCtrainval_06-Nov-2007.tar",
    size=460_032_000,
    md5="c52e279531787c972589f7e41ab4ae64",
    unpacked=480_000_000,
    folders={"VOCdevkit/VOC2007/JPEGImages": 5_011, "VOCdevkit/VOC2007/Annotations": 5_011},
    witnesses=("VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",),
)
TEST_2007 = Archive(
    "VOCtest_06-Nov-2007.tar",
    f"{HOST}/voc2007/VOCtest_06-Nov-2007.tar",
    size=451_020_800,
    md5="b6e924de25625d8de591ea690078ad9f",
    unpacked=470_000_000,
    folders={"VOCdevkit/VOC2007/JPEGImages": 4_952, "VOCdevkit/VOC2007/Annotations": 4_952},
    witnesses=("VOCdevkit/VOC2007/ImageSets/Main/test.txt",),
)
TRAINVAL_2012 = Archive(
    "VOCtrainval_11-May-2012.tar",
    f"{HOST}/voc2012/VOCtrainval_11-May-2012.tar",
    size=1_999_639_040,
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    unpacked=2_060_000_000,
    folders={"VOCdevkit/VOC2012/JPEGImages": 17_125, "VOCdevkit/VOC2012/Annotations": 17_125},
    witnesses=("VOCdevkit/VOC2012/ImageSets/Main/trainval.txt",),
)

PARTS = {
    "2007-trainval": [TRAINVAL_2007],
    "2007-test": [TEST_2007],
    "2012-trainval": [TRAINVAL_2012],
}
NEXT = "{target}: ready; next: python data_scripts/voc_to_coco.py {target}/VOCdevkit"


def main(argv=None) -> int:
    """Fetch and unpack; the exit status is 0, or 2 after one line about what is wrong."""
    return download_main(argv, __doc__, PARTS, NEXT)


if __name__ == "__main__":
    sys.exit(main())
