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

ACTIVATIONS: dict[str, Activation] = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
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


def _refuse(thing: object, reason: str | None = None) -> ConfigError:
    name = thing if isinstance(thing, str) else type(thing).__name__
    why = reason or (REASONS.get(name, "it is none of the known ones"))
    return ConfigError(f"this timm model cannot be run exactly: {name}: {why}")


def _there(module: object) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _read(model: Any) -> ViTConfig:
    """The configuration, after a look at everything that a family could have and ours has not."""
    if type(model).__name__ not in MODELS or not type(model).__module__.startswith("timm."):
        raise _refuse(model)
    blocks = list(model.blocks)
    first = _read_block(blocks[0])
    for i, block in enumerate(blocks):
        if _read_block(block) != first:
            raise _refuse(type(model).__name__, f"block {i} is built unlike block 0")
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
    if type(patches).__name__ != "PatchEmbed":
        raise _refuse(patches, "its patches are not cut by one convolution")
    proj = patches.proj
    if proj.in_channels != 3 or proj.kernel_size[0] != proj.kernel_size[1] or proj.stride != proj.kernel_size:
        raise _refuse(patches, "its patches are not squares of three channels side by side")
    height, width = patches.grid_size
    return {
        "grid": (int(height), int(width)),
        "patch_size": proj.kernel_size[0],
        "embed_dim": proj.out_channels,
        "patch_bias": proj.bias is not None,
        "patch_norm": _there(patches.norm),
    }


def _read_block(block: Any) -> dict[str, Any]:
    if type(block).__name__ not in BLOCKS:
        raise _refuse(block)
    attn, mlp = block.attn, block.mlp
    if type(attn).__name__ not in ATTENTIONS:
        raise _refuse(attn)
    if getattr(attn, "gate", None) is not None:
        raise _refuse(attn, "its attention is gated")
    if getattr(attn, "num_kv_groups", 1) != 1:
        raise _refuse(attn, "several heads share keys and values")
    if attn.proj.in_features != attn.proj.out_features or attn.num_heads * attn.head_dim != attn.proj.in_features:
        raise _refuse(attn, "its heads are not as wide as the embedding together")
    if type(mlp).__name__ not in MLPS or not isinstance(mlp.fc2, nn.Linear):
        raise _refuse(mlp)
    if getattr(mlp, "gate_last", False):
        raise _refuse(mlp, "its gate is the second half")
    if (attn.proj.bias is None) != (mlp.fc2.bias is None):
        raise _refuse(block, "of attention and MLP only one has biases")
    scales = [_there(getattr(block, f"ls{i}", None)) or getattr(block, f"gamma_{i}", None) is not None for i in (1, 2)]
    if scales == [False, True]:
        raise _refuse(block, "only its MLP is scaled")
    if _there(attn.q_norm) != _there(attn.k_norm):
        raise _refuse(attn, "of queries and keys only one has a norm")
    has_q_bias = getattr(attn, "q_bias", None) is not None
    gated = type(mlp).__name__ != "Mlp"
    return {
        "num_heads": attn.num_heads,
        "qkv_bias": (attn.q_proj if attn.qkv is None else attn.qkv).bias is not None or has_q_bias,
        "proj_bias": attn.proj.bias is not None,
        "mlp_ratio": mlp.fc2.in_features / mlp.fc2.out_features,
        "gated_mlp": gated,
        "act": _activation(mlp.act),
        "layer_scale": "both" if all(scales) else "attn" if scales[0] else "none",
        "qk_norm": _there(attn.q_norm),
        "attn_norm": _there(attn.norm),
        "mlp_norm": _there(getattr(mlp, "norm", None)),
    }


def _activation(module: nn.Module) -> Activation:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    name = type(module).__name__
    if name == "GELU":  # timm's own, which is exact
        return "gelu"
    if name not in ACTIVATIONS:
        raise _refuse(module, "its activation is none of the known ones")
    return ACTIVATIONS[name]


def _read_norms(model: Any) -> dict[str, Any]:
    """The one kind and epsilon of all norms outside the classifier."""
    outside = ("head", "fc_norm", "attn_pool")
    norms: list[Any] = [m for n, m in model.named_modules() if hasattr(m, "eps") and not n.startswith(outside)]
    found = {(type(norm).__name__, float(norm.eps)) for norm in norms}
    if len(found) != 1:
        raise _refuse(type(model).__name__, f"it mixes norms: {sorted(found)}")
    name, eps = found.pop()
    if name not in NORMS:
        raise _refuse(name, "its norm is none of the known ones")
    return {"norm": NORMS[name], "norm_eps": eps}


def _read_rope(model: Any) -> RopeConfig | None:
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    kind = type(rope).__name__
    if kind not in ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3"):
        raise _refuse(rope)
    attn = model.blocks[0].attn
    if rope.dim != attn.head_dim or getattr(attn, "rotate_half", False) != rope.rotate_half:
        raise _refuse(rope, "its tables do not fit its heads")
    if getattr(rope, "in_pixels", False) or rope.normalize_coords != "separate":
        raise _refuse(rope, "its coordinates are scaled in a way that is not known")
    if kind == "RotaryEmbeddingDinoV3" and (rope.min_period is not None or rope.max_period is not None):
        raise _refuse(rope, "its wave lengths are given by their ends")
    if kind == "RotaryEmbeddingCat" and rope.grid_type != "index":
        raise _refuse(rope, "its coordinates are scaled in a way that is not known")
    reference = getattr(rope, "ref_feat_shape", None)
    return RopeConfig(
        kind="index" if kind == "RotaryEmbeddingCat" else "centred",
        temperature=float(rope.temperature),
        reference=None if reference is None else (int(reference[0]), int(reference[1])),
        offset=float(rope.grid_offset),
        xy=rope.grid_indexing == "xy",
        interleaved=not rope.rotate_half,
    )
