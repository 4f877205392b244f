"""COCO's average precision of boxes and masks, by pycocotools, against the annotations as they are given.

AP is the mean over ten thresholds of IoU (.5 to .95), categories, and 101 levels of recall (Lin et al. 2014,
arXiv:1405.0312; cocodataset.org). Everything is in percent and not rounded. At most 100 detections an image count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssl_bench.errors import UserError
from ssl_bench.protocols.openmm.quiet import quiet

KINDS: dict[Literal["bbox", "segm"], str] = {"bbox": "box", "segm": "mask"}
_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first ones of COCOeval.stats
_LEAST_SCORED = -1  # pycocotools' word for "there was no object"


class CocoAP:
    """A metric of the Runner. `names` are the file names of the val images by their index, as in the file."""

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.file, self.names = file, names
        self._known: COCO | None = None

    def read(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Boxes in pixels of the image as it is stored, and masks as run lengths."""
        found = sample["pred_instances"]
        kept = found["masks"].cpu().numpy().astype(np.uint8)
        return {
            "index": int(sample["index"]),
            "boxes": found["bboxes"].detach().double().cpu().tolist(),
            "scores": found["scores"].detach().double().cpu().tolist(),
            "labels": found["labels"].cpu().tolist(),
            "masks": [masks.encode(np.asfortranarray(mask)) for mask in kept],
        }

    def scores(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """AP of both kinds over the images of `results`; sizes of objects that there are none of are left out."""
        with quiet():
            known = self._annotations()
            number = {entry["file_name"]: entry["id"] for entry in known.dataset["images"]}
            evaluated = [number[self.names[result["index"]]] for result in results]
            outcome: dict[str, Any] = {}
            for kind, name in KINDS.items():
                outcome |= _scored(known, _found(known, self.detections(results), kind), evaluated, kind, name)
        if "box_ap" not in outcome:
            raise UserError(
                f"{self.file} has no object in the {len(results):,} val images that were scored, so nothing can be "
                "found. Take more images (--limit)."
            )
        return {"main": outcome["box_ap"], **outcome}

    def detections(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As in COCO's files of results, with boxes and masks in each entry."""
        known = self._annotations()
        number = {entry["file_name"]: entry["id"] for entry in known.dataset["images"]}
        categories = sorted(known.cats)
        return [
            {
                "image_id": number[self.names[result["index"]]],
                "category_id": categories[label],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": mask,
            }
            for result in results
            for (left, top, right, bottom), score, label, mask in zip(
                *(result[key] for key in ("boxes", "scores", "labels", "masks")), strict=True
            )
        ]

    def _annotations(self) -> COCO:
        if self._known is None:
            self._known = COCO(str(self.file))
            for entry in self._known.anns.values():
                entry["iscrowd"] = int(bool(entry.get("iscrowd")))  # which need not be said, but pycocotools asks for
        return self._known


def _found(known: COCO, detections: Sequence[Mapping[str, Any]], kind: str) -> COCO:
    """What pycocotools makes of a file of results. It takes masks as such only where there is no box."""
    if detections:
        other = "segmentation" if kind == "bbox" else "bbox"
        return known.loadRes([{key: each[key] for key in each if key != other} for each in detections])
    nothing = COCO()  # loadRes looks at the first entry
    nothing.dataset = {**known.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


def _scored(known: COCO, found: COCO, evaluated: Sequence[int], kind: str, name: str) -> dict[str, Any]:
    evaluation = COCOeval(known, found, kind)
    evaluation.params.imgIds = list(evaluated)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = dict(zip(_STATS, evaluation.stats, strict=False))
    outcome: dict[str, Any] = {
        f"{name}_{what}": 100 * float(value) for what, value in values.items() if value > _LEAST_SCORED
    }
    precision = evaluation.eval["precision"]  # (IoU, recall, category, size, detections), -1 without objects
    by_class = {}
    for place, category in enumerate(evaluation.params.catIds):
        values_of_class = precision[:, :, place, 0, -1]
        if (values_of_class > _LEAST_SCORED).any():
            by_class[known.cats[category]["name"]] = 100 * float(values_of_class.mean())
    outcome[f"{name}_ap_by_class"] = by_class
    return outcome
