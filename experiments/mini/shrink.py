"""A small copy of the training folders, to carry them to another machine.

    python -m experiments.mini.shrink --photos=photos --coco=coco100 --out=small --side=352 --quality=80

`--photos=small/photos --coco=small/coco` of `experiments.train_mini` then reads what it would have read here, but for
the photographs' second compression.
"""

import json
from pathlib import Path

import cv2
from absl import app, flags

from experiments.coco.masks import encode
from experiments.mini.folders import Folder, find_folders, list_records, read_photographs


def shrink(folder: Folder, images: Path, annotations: Path, side: int, quality: int) -> int:
    """Writes a folder's photographs as WebP of at most `side` pixels, and one annotation file; returns how many."""
    images.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    records = list_records(folder)
    listed, segments = [], []
    for number, (record, photo) in enumerate(zip(records, read_photographs(records, side, 2), strict=True), 1):
        height, width = photo.image.shape[:2]
        name = f"{record.path.stem}.webp"
        cv2.imwrite(str(images / name), photo.image[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])
        listed.append({"id": number, "file_name": name, "width": width, "height": height, "source": record.source})
        for counts in encode(photo.segments):
            segments.append({"image_id": number, "segmentation": {"size": [height, width], "counts": counts}})
    annotations.write_text(json.dumps({"images": listed, "annotations": segments}, separators=(",", ":")))
    return len(records)


FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    out = Path(FLAGS.out)
    for folder in find_folders(FLAGS.photos, FLAGS.coco):
        if folder.source == "photos":
            places = out / "photos" / "images", out / "photos" / "segments.json"
        else:
            places = out / "coco" / "train2017", out / "coco" / "annotations" / "segments_train2017.json"
        print(f"{shrink(folder, *places, FLAGS.side, FLAGS.quality)} photographs in {places[0]}")


if __name__ == "__main__":
    flags.DEFINE_string("photos", "", "Folder with images/ and segments.json.")
    flags.DEFINE_string("coco", "", "Folder with train2017/ and annotations/*train2017.json.")
    flags.DEFINE_string("out", None, "Folder of the copy.", required=True)
    flags.DEFINE_integer("side", 352, "Longest side of the copies, pixels.")
    flags.DEFINE_integer("quality", 80, "Of WebP.")
    app.run(main)
