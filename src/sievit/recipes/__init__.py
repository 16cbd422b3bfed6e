"""Recipes: functions that return everything a run depends on, by name."""

from collections.abc import Callable
from pathlib import Path

from sievit.config import ConfigError, load_json, nearest
from sievit.engine.recipe import Recipe
from sievit.recipes import ade20k, coco, coco_stuff10k, dino, folders, nuclei, pascal_context, scenes

_RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        coco.coco_vit_adapter_t,
        coco.coco_vit_adapter_s,
        coco.coco_svit_adapter_t,
        coco.coco_svit_adapter_s,
        nuclei.nuclei_vit,
        nuclei.nuclei_svit,
        nuclei.nuclei_segvit,
        nuclei.nuclei_segvit_dtop,
        nuclei.nuclei_segvit_dtop_retrain,
        scenes.scenes_vit,
        scenes.scenes_svit,
        scenes.scenes_segvit,
        scenes.scenes_segvit_dtop,
        ade20k.ade20k_segvit_b,
        ade20k.ade20k_segvit_b_dtop,
        ade20k.ade20k_segvit_l,
        ade20k.ade20k_segvit_l_dtop,
        ade20k.ade20k_setr_b,
        ade20k.ade20k_setr_b_dtop,
        pascal_context.pascal_context_segvit_l,
        pascal_context.pascal_context_segvit_l_dtop,
        coco_stuff10k.coco_stuff10k_segvit_l,
        coco_stuff10k.coco_stuff10k_segvit_l_dtop,
        folders.folders_segvit_s,
        folders.folders_segvit_s_dtop,
        dino.coco_dinov2_s,
        dino.coco_dinov2_s_svit,
        dino.coco_dinov2_b,
        dino.coco_dinov2_b_svit,
        dino.coco_dinov3_s,
        dino.coco_dinov3_s_svit,
        dino.coco_dinov3_b,
        dino.coco_dinov3_b_svit,
        dino.boxes_dinov2_s,
        dino.boxes_dinov2_s_svit,
        dino.ade20k_dinov2_b,
        dino.ade20k_dinov2_b_dtop,
        dino.ade20k_dinov3_b,
        dino.ade20k_dinov3_b_dtop,
        dino.folders_dinov2_s,
        dino.folders_dinov2_s_dtop,
    )
}


def recipes() -> dict[str, Callable[[], Recipe]]:
    """Every recipe by name."""
    return dict(_RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe called `name`, or that of a .json file as `sievit recipes NAME` prints it.

    Raises:
        ConfigError: an unknown name; the nearest is given. A file that cannot be read or is no recipe.
    """
    if name.endswith(".json"):
        return load_json(Recipe, Path(name))
    if name not in _RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, _RECIPES)}")
    return _RECIPES[name]()
