"""Plain ViTs of timm: DeiT, AugReg, MAE, CLIP, SigLIP, AIMv2, DINOv2; EVA-02, DINOv3 and what else its EVA code makes.

A model is read by looking at its modules. What this ViT cannot compute exactly is refused by name, and nothing is
guessed: an activation, a norm or a kind of attention that is not known is an error.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.convert.keys import Rules, join, load_strictly, need, rename
from sievit.vit import RopeConfig, ViT, ViTConfig
from sievit.vit.config import Activation
from sievit.vit.model import resized_positions

RULES: Rules = (
    (r"(cls_token|reg_token|pos_embed|(?:patch_embed\.(?:proj|norm)|norm_pre|norm)\..*)", r"\1"),
    (r"dist_token", r"reg_token"),  # DeiT's second class token, which stands where a register would
    (r"(blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj|norm|q_norm|k_norm)|mlp\.(?:fc[12]|norm)|ls[12])\..*)", r"\1"),
    (r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma"),
    (r"(?:head|head_dist|fc_norm|attn_pool)\..*", None),  # the classifier
)

ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
}
NORMS = {"LayerNorm": "layer", "RmsNorm": "rms", "RMSNorm": "rms"}
MODELS = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
BLOCKS = ("Block", "EvaBlock")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
MLPS = ("Mlp", "GluMlp", "SwiGLU")
REASONS = {
    "Beit": "its attention adds a bias per pair of positions",
    "VisionTransformerRelPos": "its attention adds a bias per pair of positions",
    "VisionTransformerSAM": "its blocks attend within windows and add a bias per pair of positions",
    "RotaryEmbeddingMixed": "its rotary frequencies are learned per block",
    "RotaryEmbeddingMRope": "its rotary frequencies are laid out for video",
    "EvaBlockPostNorm": "its norms stand behind the branches",
    "ResPostBlock": "its norms stand behind the branches",
    "ParallelScalingBlock": "its attention and MLP run side by side",
    "DiffParallelScalingBlock": "its attention and MLP run side by side",
    "ParallelThingsBlock": "its blocks hold several attentions side by side",
    "DiffAttention": "its attention is a difference of two",
}


def from_timm(
    source: nn.Module | str, *, pretrained: bool = True, grid: tuple[int, int] | None = None, **options: Any
) -> ViT:
    """Our ViT with the weights of timm's.

    Args:
        source: a model of timm, or the name of one, with a tag or without.
        pretrained: load the weights that timm has for the name; from its own cache, or by its own download.
        grid: (h, w) in tokens that positions are stored for, resized from the model's own by the family's rule; None:
            the model's own. Images of any other grid can be given all the same.
        options: of `timm.create_model`, where a name is given.

    Returns:
        The ViT in evaluation mode, without the classifier.

    Raises:
        ConfigError: a name that timm does not know, weights that cannot be had, or a model that cannot be run exactly.
    """
    model = _created(source, pretrained=pretrained, **options) if isinstance(source, str) else source
    own = timm_config(model)
    vit = ViT(own if grid is None else replace(own, grid=grid))
    name = f"the timm model {type(model).__name__}"
    load_strictly(vit, timm_state(model.state_dict(), vit.config, grid=own.grid, source=name), source=name)
    return vit.eval()


def timm_config(source: nn.Module | str, **options: Any) -> ViTConfig:
    """The configuration of a timm model, or of the architecture that timm has under a name; no weights are made.

    Raises:
        ConfigError: a name that timm does not know, or a model that cannot be run exactly; the message says why not.
    """
    if isinstance(source, str):
        with torch.device("meta"):
            source = _created(source, pretrained=False, **options)
    return _read(source)


def timm_state(
    state: dict[str, Tensor], config: ViTConfig, *, source: str, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A state dict of timm under our names, as a ViT of `config` takes it.

    Positions are resized to `config.grid`; a class token, registers and a last norm that `config` does without are left
    out.

    Args:
        source: what it is taken for, in messages.
        grid: (h, w) in tokens of its positions; None: a square, or that of `config`.

    Raises:
        ConfigError: keys that no plain ViT has, or positions that fill no grid.
    """
    renamed = rename(_joined(state), RULES, source=source)
    stored = sum(renamed[name].shape[1] for name in ("cls_token", "reg_token") if name in renamed)
    if not config.class_token:
        renamed.pop("cls_token", None)
    if not config.num_registers:
        renamed.pop("reg_token", None)
    if not config.final_norm:
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("norm.")}
    if config.pos_embed == "none" or "pos_embed" not in renamed:
        return renamed
    positions = need(renamed, "pos_embed", source=source)
    prefix, own = _layout_of(positions.shape[1], stored, config, grid, source)
    if config.num_prefix not in (0, stored):
        raise ConfigError(f"{source} has {stored} prefix tokens where {config.num_prefix} or none are expected")
    rows = positions[:, prefix:]
    if own != config.grid:
        rows = resized_positions(rows, own, config.grid, antialias=config.pos_antialias).to(rows.dtype)
    if config.num_prefix and config.pos_embed == "all":
        rows = torch.cat([positions[:, :prefix], rows], dim=1)
    renamed["pos_embed"] = rows
    return renamed


def _layout_of(
    count: int, stored: int, config: ViTConfig, grid: tuple[int, int] | None, source: str
) -> tuple[int, tuple[int, int]]:
    """How many of `count` positions belong to the prefix, and the grid that the others fill."""
    known = [config.grid] if grid is None else [grid]
    expected = stored if config.pos_embed == "all" else 0
    for prefix in dict.fromkeys((expected, stored, 0)) if config.num_prefix == 0 else (expected,):
        side = math.isqrt(max(count - prefix, 0))
        for own in known if grid is not None else [*known, (side, side)]:
            if own[0] * own[1] == count - prefix > 0:
                return prefix, own
    raise ConfigError(f"{source}: its {count} positions with {stored} prefix tokens fill no known grid; give grid")


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With queries, keys and values in one layer, and the two halves of a gated MLP in one."""
    joined = dict(state)
    for key in state:
        block, _, rest = key.rpartition(".attn.")
        if rest == "q_bias":
            q, v = joined.pop(key), joined.pop(f"{block}.attn.v_bias")
            joined[f"{block}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        elif rest == "q_proj.weight":
            join(joined, f"{block}.attn.qkv", [f"{block}.attn.{x}_proj" for x in "qkv"])
        elif key.endswith(".mlp.fc1_g.weight"):
            layer = key.removesuffix("_g.weight")
            join(joined, layer, [f"{layer}_g", f"{layer}_x"])
    return joined


def _created(name: str, **options: Any) -> nn.Module:
    """timm's model of that name."""
    import timm

    try:
        return timm.create_model(name, **options)
    except RuntimeError as error:
        if not timm.is_model(name.partition(".")[0]):
            close = timm.list_models(f"*{name.partition('.')[0]}*")[:5]
            hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models('vit_*') lists them"
            raise ConfigError(f"timm knows no model called {name!r}{hint}") from error
        raise ConfigError(f"timm cannot make {name!r}: {error}") from error
    except Exception as error:  # the hub client's many kinds of "no network", and what stands in their way
        if not options.get("pretrained"):
            raise
        raise ConfigError(
            f"timm cannot get the weights of {name!r} ({type(error).__name__}: {error}); "
            "give pretrained=False for random ones, or load a model or state dict that you have"
        ) from error


def _require(fits: bool, thing: object, reason: str | None = None) -> None:
    """Raise a ConfigError that names the thing, and says why, unless it fits."""
    name = thing if isinstance(thing, str) else type(thing).__name__
    if not fits:
        why = reason or REASONS.get(name, "it is none of the known ones")
        raise ConfigError(f"this timm model cannot be run exactly: {name}: {why}")


def _there(module: object) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _read(model: Any) -> ViTConfig:
    """The configuration, after a look at everything that a family could have and ours has not."""
    _require(type(model).__name__ in MODELS and type(model).__module__.startswith("timm."), model)
    blocks = list(model.blocks)
    first = _read_block(blocks[0])
    for i, block in enumerate(blocks):
        _require(_read_block(block) == first, model, f"block {i} is built unlike block 0")
    registers = (getattr(model, name, None) for name in ("reg_token", "dist_token"))  # DeiT's stands among them
    return ViTConfig(
        **_read_patches(model),
        **first,
        **_read_norms(model),
        depth=len(blocks),
        class_token=model.cls_token is not None,
        num_registers=sum(token.shape[1] for token in registers if token is not None),
        pos_embed="none" if model.pos_embed is None else "patches" if model.no_embed_class else "all",
        rope=_read_rope(model),
        norm_pre=_there(model.norm_pre),
        final_norm=_there(model.norm),
    )


def _read_patches(model: Any) -> dict[str, Any]:
    patches = model.patch_embed
    _require(type(patches).__name__ == "PatchEmbed", patches, "its patches are not cut by one convolution")
    proj = patches.proj
    square = proj.kernel_size[0] == proj.kernel_size[1] and proj.stride == proj.kernel_size
    _require(proj.in_channels == 3 and square, patches, "its patches are not squares of three channels side by side")
    height, width = patches.grid_size
    return {
        "grid": (int(height), int(width)),
        "patch_size": proj.kernel_size[0],
        "embed_dim": proj.out_channels,
        "patch_bias": proj.bias is not None,
        "patch_norm": _there(patches.norm),
    }


def _read_block(block: Any) -> dict[str, Any]:
    _require(type(block).__name__ in BLOCKS, block)
    attn, mlp = block.attn, block.mlp
    _require(type(attn).__name__ in ATTENTIONS, attn)
    _require(getattr(attn, "gate", None) is None, attn, "its attention is gated")
    _require(getattr(attn, "num_kv_groups", 1) == 1, attn, "several heads share keys and values")
    width = attn.num_heads * attn.head_dim
    fits = width == attn.proj.in_features == attn.proj.out_features
    _require(fits, attn, "its heads are not as wide as the embedding together")
    _require(type(mlp).__name__ in MLPS and isinstance(mlp.fc2, nn.Linear), mlp)
    _require(not getattr(mlp, "gate_last", False), mlp, "its gate is the second half")
    biased = attn.proj.bias is not None
    _require(biased == (mlp.fc2.bias is not None), block, "of attention and MLP only one has biases")
    scales = [_there(getattr(block, f"ls{i}", None)) or getattr(block, f"gamma_{i}", None) is not None for i in (1, 2)]
    _require(scales != [False, True], block, "only its MLP is scaled")
    _require(_there(attn.q_norm) == _there(attn.k_norm), attn, "of queries and keys only one has a norm")
    has_q_bias = getattr(attn, "q_bias", None) is not None
    return {
        "num_heads": attn.num_heads,
        "qkv_bias": (attn.q_proj if attn.qkv is None else attn.qkv).bias is not None or has_q_bias,
        "proj_bias": biased,
        "mlp_ratio": mlp.fc2.in_features / mlp.fc2.out_features,
        "gated_mlp": type(mlp).__name__ != "Mlp",
        "act": _activation(mlp.act),
        "layer_scale": "both" if all(scales) else "attn" if scales[0] else "none",
        "qk_norm": _there(attn.q_norm),
        "attn_norm": _there(attn.norm),
        "mlp_norm": _there(getattr(mlp, "norm", None)),
    }


def _activation(module: nn.Module) -> Activation:
    name = type(module).__name__
    _require(name in ACTIVATIONS, module, "its activation is none of the known ones")
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else ACTIVATIONS[name]


def _read_norms(model: Any) -> dict[str, Any]:
    """The one kind and epsilon of all norms outside the classifier."""
    outside = ("head", "fc_norm", "attn_pool")
    norms: list[Any] = [m for n, m in model.named_modules() if hasattr(m, "eps") and not n.startswith(outside)]
    found = {(type(norm).__name__, float(norm.eps)) for norm in norms}
    _require(len(found) == 1, model, f"it mixes norms: {sorted(found)}")
    name, eps = found.pop()
    _require(name in NORMS, name, "its norm is none of the known ones")
    return {"norm": NORMS[name], "norm_eps": eps}


def _read_rope(model: Any) -> RopeConfig | None:
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    by_index = type(rope).__name__ == "RotaryEmbeddingCat"
    _require(by_index or type(rope).__name__ == "RotaryEmbeddingDinoV3", rope)
    attn = model.blocks[0].attn
    fits = rope.dim == attn.head_dim and getattr(attn, "rotate_half", False) == rope.rotate_half
    _require(fits, rope, "its tables do not fit its heads")
    known = not getattr(rope, "in_pixels", False) and rope.normalize_coords == "separate"
    known = known and (not by_index or rope.grid_type == "index")
    _require(known, rope, "its coordinates are scaled in a way that is not known")
    by_ends = not by_index and (rope.min_period is not None or rope.max_period is not None)
    _require(not by_ends, rope, "its wave lengths are given by their ends")
    reference = getattr(rope, "ref_feat_shape", None)
    return RopeConfig(
        kind="index" if by_index else "centred",
        temperature=float(rope.temperature),
        reference=None if reference is None else (int(reference[0]), int(reference[1])),
        offset=float(rope.grid_offset),
        xy=rope.grid_indexing == "xy",
        interleaved=not rope.rotate_half,
    )
