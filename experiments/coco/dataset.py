"""Images with annotations, from a folder or from memory."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from experiments.coco.documents import file_name, parse_instances
from experiments.coco.masks import run_lengths
from sam_flax.errors import InputError
from sam_flax.files.coco_boxes import Corners, without_area
from sam_flax.files.images import image_to_rgb, read_image
from sam_flax.files.json_values import read_json


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotated object.

    Attributes:
      annotation_id: positive and unique in the dataset; the file's own unless that has zero, missing or
        double ids.
      category_id: the file's category.
      box: `(x0, y0, x1, y1)` in pixels of the image, clipped to it.
      iscrowd: whether the mask covers a crowd instead of one object.
    """

    annotation_id: int
    category_id: int
    box: Corners
    iscrowd: bool

    @property
    def degenerate(self) -> bool:
        """Whether the box has no area and cannot serve as a prompt."""
        return without_area(self.box)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageItem:
    """One image of a dataset: a file (`path`) or an array in memory (`array`, uint8, (H, W, 3) or (H, W))."""

    image_id: int
    name: str
    height: int
    width: int
    path: Path | None
    array: np.ndarray | None
    annotations: tuple[Annotation, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CocoDataset:
    """Images with annotations.

    Attributes:
      items: the images in the order of the file, cut by `limit`.
      coco: pycocotools object that holds exactly these images and their annotations.
      source: what to call the dataset in messages (the annotation file, or "generated scenes").
      listed_ids: ids of all images of the file, also those beyond `limit`.
      clipped_boxes: number of annotated boxes that stuck out of their image and were clipped.
      degenerate_boxes: number of annotated boxes without area, which serve as ground truth but not as
        prompts.
      far_boxes: number of annotated boxes that overlap the box around their own mask by less than half.
    """

    items: tuple[ImageItem, ...]
    coco: COCO
    source: str
    listed_ids: frozenset[int]
    clipped_boxes: int
    degenerate_boxes: int
    far_boxes: int = 0

    @property
    def crowd_count(self) -> int:
        """Number of objects that are marked as crowds."""
        return sum(annotation.iscrowd for item in self.items for annotation in item.annotations)

    @property
    def all_crowds(self) -> bool:
        """Whether there is no object that COCO's AP counts."""
        return all(annotation.iscrowd for item in self.items for annotation in item.annotations)

    @classmethod
    def from_memory(
        cls,
        images: Sequence[np.ndarray],
        coco_dict: Mapping[str, Any],
        *,
        limit: int | None = None,
        source: str = "generated scenes",
    ) -> "CocoDataset":
        """Makes a dataset of arrays.

        Args:
          images: uint8 arrays (H, W, 3), in the order of `coco_dict["images"]`.
          coco_dict: a COCO instances document; `file_name` is optional in it.
          limit: number of images to keep, from the start.
          source: what to call the dataset in messages.

        Raises:
          ValueError: if the document or an array is not as described.
        """
        listed = coco_dict.get("images")
        if isinstance(listed, list) and len(listed) != len(images):
            raise ValueError(
                f"{source} has {len(images)} arrays but lists {len(listed)} images: pass one array "
                "per listed image, in the same order."
            )
        return _build_dataset(coco_dict, source, limit, images=images)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of annotations and images: of pixels in memory, and of the bytes of files, whatever their names."""
        digest = hashlib.sha256()
        for item in self.items:
            # A name in JSON may hold halves of pairs, which have no UTF-8.
            digest.update(f"{item.image_id} {item.name} {item.height} {item.width} ".encode("utf-8", "surrogatepass"))
            if item.array is not None:
                digest.update(np.ascontiguousarray(item.array).tobytes())
            elif item.path is not None and item.path.exists():
                # Sizes do not tell pictures of fixed-size formats apart.
                with open(item.path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        annotations = self.coco.dataset["annotations"]
        digest.update(json.dumps(annotations, sort_keys=True, default=_json_bytes).encode())
        return digest.hexdigest()[:32]

    def read_image(self, item: ImageItem) -> np.ndarray:
        """Reads one image, as `sam_flax.files.images` has it, at its annotated size.

        Returns:
          uint8 RGB array (item.height, item.width, 3).

        Raises:
          FileNotFoundError: if the file is gone.
          ValueError: if it cannot be decoded, or its size is not the annotated one.
        """
        size = (item.height, item.width)
        if item.path is not None:
            return read_image(item.path, size, self.source)
        return image_to_rgb(_from_array(item.array, item.name), f"The array of {item.name}", size, self.source)

    def ground_truth_rle(self, annotation_id: int) -> dict[str, Any]:
        """The annotated mask as a pycocotools run-length encoding at the image's size.

        Raises:
          ValueError: if the annotation has a box alone (`load_coco(..., require_masks=False)`).
        """
        annotation = self.coco.anns[annotation_id]
        if "segmentation" not in annotation:
            raise InputError(f"Annotation {annotation_id} of {self.source} has no mask: evaluate on a file with masks.")
        image = self.coco.imgs[annotation["image_id"]]
        return run_lengths(annotation["segmentation"], image["width"], image["height"])

    def notes(self) -> tuple[str, ...]:
        """Sentences about what was repaired while loading; empty if nothing was."""
        sentences = []
        if self.clipped_boxes:
            sentences.append(f"{self.source}: {self.clipped_boxes} boxes left their image and were clipped to it.")
        if self.far_boxes:
            sentences.append(
                f"{self.source}: {self.far_boxes} boxes overlap the box around their own mask by less than half; "
                "prompts and masks may not belong together."
            )
        if self.all_crowds:
            sentences.append(
                f"{self.source}: all {self.crowd_count} objects are crowds (iscrowd 1), which COCO's AP leaves out; "
                "CVAT marks every mask so: set iscrowd to 0 in the file, or export polygons."
            )
        if self.degenerate_boxes:
            sentences.append(f"{self.source}: {self.degenerate_boxes} boxes have no area and are not used as prompts.")
        return tuple(sentences)


def load_coco(
    images_dir: str | os.PathLike[str],
    annotations_json: str | os.PathLike[str],
    limit: int | None = None,
    *,
    images_flag: str = "--images",
    annotations_flag: str = "--annotations",
    require_masks: bool = True,
) -> CocoDataset:
    """Loads a COCO folder; image files are opened only by `CocoDataset.read_image`.

    Args:
      images_dir: folder that holds the image files.
      annotations_json: instances file.
      limit: number of images to keep, from the start of the file; None keeps all.
      images_flag: name of the command-line flag behind `images_dir`, for messages.
      annotations_flag: name of the flag behind `annotations_json`, for messages.
      require_masks: whether every annotation must have a mask (evaluation) or a box is enough (calibration).

    Raises:
      FileNotFoundError: if the folder, the file or one of the images is absent.
      ValueError: if the file is not a COCO instances document or contradicts itself.
    """
    folder, document_path = Path(images_dir), Path(annotations_json)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"The image folder {folder} {problem}: give an existing folder with {images_flag}.")
    document = read_json(document_path, annotations_flag, "a COCO instances file")
    if not isinstance(document, dict):
        hint = " (a list is a results file, which belongs to --boxes)" if isinstance(document, list) else ""
        raise InputError(
            f"{document_path} is not a COCO instances file: it holds no object with images and "
            f"annotations{hint}; give such a file with {annotations_flag}."
        )
    dataset = _build_dataset(document, str(document_path), limit, folder=folder, require_masks=require_masks)
    absent = [item for item in dataset.items if item.path is not None and not item.path.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(dataset.items)} images listed in {document_path} are not in "
            f"{folder} (the first is {absent[0].name}): give the folder that belongs to the annotations with "
            f"{images_flag}."
        )
    return dataset


def stream_images(
    dataset: CocoDataset, items: Iterable[ImageItem] | None = None, *, ahead: int = 2
) -> Generator[tuple[ImageItem, np.ndarray]]:
    """Yields images in order while a thread decodes the next ones.

    Args:
      dataset: where to read from.
      items: which of its images; all by default.
      ahead: how many images the thread may hold ready.
    """
    queue: deque[tuple[ImageItem, Future[np.ndarray]]] = deque()
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-image")
    try:
        for item in dataset.items if items is None else items:
            queue.append((item, reader.submit(dataset.read_image, item)))
            if len(queue) > ahead:
                ready, image = queue.popleft()
                yield ready, image.result()
        while queue:
            ready, image = queue.popleft()
            yield ready, image.result()
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _from_array(array: np.ndarray | None, name: str) -> Image.Image:
    """An array in memory, uint8 (H, W, 3) or (H, W), as an image."""
    array = None if array is None else np.asarray(array)
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        found = "none" if array is None else f"{array.dtype} {array.shape}"
        raise InputError(f"The array of {name} is {found}: give uint8 of shape (height, width, 3).")
    return Image.fromarray(array)


def quiet_coco(dataset: dict[str, Any]) -> COCO:
    """A pycocotools object over a COCO document, made without its prints."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _build_dataset(
    document: Mapping[str, Any],
    source: str,
    limit: int | None,
    *,
    folder: Path | None = None,
    images: Sequence[np.ndarray] | None = None,
    require_masks: bool = True,
) -> CocoDataset:
    """Checks a COCO document and turns it into a dataset, with images from a folder or from memory."""
    found = parse_instances(document, source, limit, require_masks)
    annotations: dict[int, list[Annotation]] = {record["id"]: [] for record in found.images}
    for record, box in zip(found.annotations, found.boxes, strict=True):
        annotations[record["image_id"]].append(
            Annotation(record["id"], record["category_id"], box, bool(record["iscrowd"]))
        )
    items = tuple(
        ImageItem(
            image_id=record["id"],
            name=file_name(record, source, needed=folder is not None),
            height=record["height"],
            width=record["width"],
            path=None if folder is None else folder / record["file_name"],
            array=None if images is None else images[position],
            annotations=tuple(annotations[record["id"]]),
        )
        for position, record in enumerate(found.images)
    )
    coco = quiet_coco({"images": found.images, "annotations": found.annotations, "categories": found.categories})
    degenerate = sum(a.degenerate for item in items for a in item.annotations)
    return CocoDataset(items, coco, source, found.listed_ids, found.clipped, degenerate, found.far)


def _json_bytes(value: Any) -> Any:
    """Bytes (compressed run lengths) and NumPy numbers as JSON values."""
    return value.decode() if isinstance(value, bytes) else value.item()
