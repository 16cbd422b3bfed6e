"""Small, clean annotation files to be changed; without torch, as child processes need them."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

SIZE = (12, 16)
"""Height and width of the images."""


def rle(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return {"size": list(SIZE), "counts": coco_mask.encode(mask)["counts"].decode()}


def content() -> dict[str, Any]:
    """Small, clean, with every form of mask and a crowd."""
    runs = [24, 6, 6, 6, 150]
    boxes = [(2, 1, 8, 6), (6, 4, 5, 5), (1, 1, 4, 9), (2, 0, 2, 6), (3, 3, 9, 8)]
    masks = [[[2, 1, 10, 1, 10, 7, 2, 7]], rle(6, 4, 5, 5), rle(1, 1, 4, 9), {"size": list(SIZE), "counts": runs}]
    masks.append([[3, 3, 12, 3, 12, 11], [3, 3, 12, 11, 3, 11]])
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE[1], "height": SIZE[0]} for i in (1, 2, 3)],
        "categories": [{"id": i, "name": f"class {i}"} for i in (1, 2)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": (1, 1, 2, 2, 3)[i],
                "category_id": 1 + i % 2,
                "bbox": list(boxes[i]),
                "area": boxes[i][2] * boxes[i][3],
                "iscrowd": int(i == 2),
                "segmentation": masks[i],
            }
            for i in range(5)
        ],
    }


def panoptic() -> dict[str, Any]:
    segments = [{"id": 70000, "category_id": 1, "iscrowd": 0}, {"id": 513, "category_id": 2}]
    return {
        "images": [{"id": 5, "file_name": "x.png", "height": 2, "width": 4}],
        "annotations": [{"image_id": 5, "file_name": "x.png", "segments_info": segments}],
        "categories": [{"id": i, "name": str(i), "color": [i, i, i]} for i in (1, 2)],
    }
