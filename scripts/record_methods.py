"""Records what released code of the methods that sievit compares gives on small inputs, for tests/policies.

    python scripts/record_methods.py CODE tests/policies/released

CODE is a folder with clones, called as here. Only code under MIT and Apache-2.0 is run, and none of it is kept:

    evit            github.com/youweiliang/evit             5ca95a7
    DynamicViT      github.com/raoyongming/DynamicViT       1322e62
    Evo-ViT         github.com/YifanXu74/Evo-ViT            4c5d9b3
    algm-segmenter  github.com/tue-mps/algm-segmenter       674eaa2
    ATS             github.com/adaptivetokensampling/ATS    9271257
    cropr           github.com/benbergner/cropr             2f8b624
    Expedit-Segmenter  github.com/Expedit-LargeScale-Vision-Transformer/Expedit-Segmenter  63f4066
"""

import ast
import logging
import math
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import DropPath, Mlp, lecun_normal_, to_2tuple, trunc_normal_, trunc_normal_tf_
from torch import Tensor, nn

SMALL: dict[str, Any] = {"img_size": 28, "patch_size": 2, "embed_dim": 8, "depth": 4, "num_heads": 2, "num_classes": 0}
KNOWN: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "math": math,
    "logging": logging,
    "partial": partial,
    "OrderedDict": OrderedDict,
    "Tensor": Tensor,
    "Mlp": Mlp,
    "DropPath": DropPath,
    "to_2tuple": to_2tuple,
    "trunc_normal_": trunc_normal_,
    "lecun_normal_": lecun_normal_,
    "trunc_normal_tf_": trunc_normal_tf_,
}


def parts(path: Path, **more: Any) -> dict[str, Any]:
    """The classes and functions of a file of source, without what it imports and registers."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    for node in found:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    unread = ast.parse("from __future__ import annotations").body  # what is annotated with may not be there
    names = KNOWN | more
    exec(compile(ast.Module([*unread, *found], []), path, "exec"), names)
    return names


def filled(model: Any) -> Any:
    """The model with weights large enough that tokens differ."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def dynamicvit(code: Path) -> dict[str, Tensor]:
    """The class token behind two stages, and the scores of the first."""
    names = parts(code / "DynamicViT/models/dyvit.py", **parts(code / "DynamicViT/utils.py", defaultdict=dict))
    model = filled(names["VisionTransformerDiffPruning"](**SMALL, pruning_loc=[1, 3], token_ratio=[0.5, 0.25]))
    scores: list[Tensor] = []
    model.score_predictor[0].register_forward_hook(lambda module, given, found: scores.append(found))
    images = torch.randn(2, 3, 28, 28)
    answer = model(images)
    return {"images": images, "class_token": answer, "scores": scores[0], **weights(model)}


def evit(code: Path) -> dict[str, Tensor]:
    """The class token behind two stages without fusion; the attention of a stage, and the token that it fuses."""
    helpers = parts(code / "evit/helpers.py")
    names = parts(code / "evit/evit.py", complement_idx=helpers["complement_idx"], named_apply=None)
    model = filled(names["EViT"](**SMALL, keep_rate=(1, 0.5, 1, 0.5)))
    images = torch.randn(2, 3, 28, 28)
    rates = (1, 0.5, 1, 0.5)
    answer, _, chosen = model.forward_features(images, rates, get_idx=True)
    block, seen = model.blocks[1], {}
    block.fuse_token = True
    block.register_forward_pre_hook(lambda module, given: seen.update(tokens=given[0][:, 1:]))
    block.attn.register_forward_hook(
        lambda module, given, found: seen.update(attention=found[3], tokens=seen["tokens"] + found[0][:, 1:])
    )
    block.norm2.register_forward_pre_hook(lambda module, given: seen.update(fused=given[0][:, -1]))
    model.forward_features(images, rates)
    return {"images": images, "class_token": answer, "chosen": chosen[0], **seen, **weights(model)}


def evo_vit(code: Path) -> dict[str, Tensor]:
    """The representative of tokens."""
    names = parts(code / "Evo-ViT/levit/evo_levit.py", utils=None)
    tokens, scores = torch.randn(2, 6, 8), torch.rand(2, 6)
    return {"tokens": tokens, "scores": scores, "representative": names["merge_tokens"](tokens, scores)}


def ats(code: Path) -> dict[str, Tensor]:
    """The significance of tokens, in their own order."""
    names = parts(code / "ATS/libs/models/transformers/transformer_block.py")
    names = parts(code / "ATS/libs/models/transformers/ats_block.py", Attention=names["Attention"])
    attention, values = torch.rand(2, 2, 17, 17).softmax(3), torch.randn(2, 2, 17, 4)
    ordered, places = names["AdaptiveTokenSampler"].score_assignment_step(attention, values)
    scores = torch.empty_like(ordered).scatter_(1, places, ordered)
    return {"attention": attention, "values": values, "scores": scores}


def algm(code: Path) -> dict[str, Tensor]:
    """What windows merge above a threshold, and pairs of the same tokens above the threshold that the code computes."""
    setattr(Tensor, "cuda", lambda self, device: self.to(device))  # noqa: B010  # the code asks for it on any device
    local = parts(code / "algm-segmenter/algm/algm/local_merge.py", rearrange=rearranged)
    tokens = torch.randn(1, 1, 8) + 0.5 * torch.randn(1, 37, 8)  # a class token and a grid of six by six
    merged, sizes = local["merge_wavg"](local["conditional_pooling"](tokens, 0.7, (2, 2)), tokens)
    grid, source = tokens[:, 1:], torch.zeros(1, 36, 36)
    pairs = parts(code / "algm-segmenter/algm/algm/global_merge.py")["turbo_matching"](grid, 4, source)
    fewer, counts = local["merge_wavg"](pairs, grid)
    unit = F.normalize(grid, dim=2)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).amax(2)
    threshold = best[:, 1:].mean() + best[:, 1:].std() / 4
    found = {"windows": merged[:, 1:], "window_sizes": sizes[:, 1:], "pairs": fewer, "pair_sizes": counts}
    return {"tokens": grid, "threshold": threshold, **found}


def rearranged(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The patterns of einops that the code of ALGM has."""
    match pattern.split("->")[0].replace(" ", ""):
        case "b(hw)c":
            return x.unflatten(1, (sizes["h"], -1)).permute(0, 3, 1, 2)
        case "bc(ghps_h)(gwps_w)":
            return x.unflatten(2, (sizes["gh"], -1)).unflatten(4, (sizes["gw"], -1)).permute(0, 2, 4, 1, 3, 5)
        case "bchw":
            return x.flatten(1)
    raise ValueError(pattern)


def cropr(code: Path) -> dict[str, Tensor]:
    """The scores of tokens, and what its queries see."""
    names = parts(code / "cropr/segm/cropr.py")
    scorer = filled(
        names["CrossAttention"](8, pre_attn_norm=True, k_proj=True, qkv_bias=True, mlp=False, num_queries=3)
    )
    tokens = torch.randn(2, 12, 8)
    seen, scores = scorer(tokens)
    return {"tokens": tokens, "scores": scores, "seen": seen, **weights(scorer)}


def expedit(code: Path) -> dict[str, Tensor]:
    """The centres of a grid of six by six after one round."""
    names = parts(code / "Expedit-Segmenter/mmseg/ops/cluster.py")
    cluster = names["TokenClusteringBlock"]((3, 3), n_iters=1, temperture=0.2, window_size=3)
    tokens = torch.randn(1, 36, 8)
    centres, _ = cluster(tokens.mT.unflatten(2, (6, 6)))
    return {"tokens": tokens, "centres": centres}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"weights.{name}": value for name, value in model.state_dict().items()}


if __name__ == "__main__":
    code, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for record in (dynamicvit, evit, evo_vit, ats, algm, cropr, expedit):
        torch.manual_seed(1)
        with torch.no_grad():
            found = {name: value.contiguous() for name, value in record(code).items()}
        save_file(found, out / f"{record.__name__}.safetensors")
        print(record.__name__, {name: tuple(value.shape) for name, value in found.items() if "weights" not in name})
