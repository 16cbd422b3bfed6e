"""Plain ViTs of Hugging Face's transformers: ViT, DeiT, DINOv2 with and without registers, DINOv3.

A model is read from its class, its configuration and its weights. A class that is not in the table here is refused by
name, as is anything that its configuration asks for and this ViT cannot compute exactly.
"""

from typing import Any

from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.convert.keys import Rules, join, load_strictly, need, rename
from sievit.vit import RopeConfig, ViT, ViTConfig
from sievit.vit.config import Activation

LAYER = r"(?:encoder\.layers?|model\.layer|layers?)\.(\d+)"
RULES: Rules = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.(?:register_tokens|distillation_token)", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.mask_token", None),
    (rf"{LAYER}\.(?:norm1|layernorm_before)\.(.*)", r"blocks.\1.norm1.\2"),
    (rf"{LAYER}\.(?:norm2|layernorm_after)\.(.*)", r"blocks.\1.norm2.\2"),
    (rf"{LAYER}\.attention\.([qkv])_proj\.(.*)", r"blocks.\1.attn.\2.\3"),
    (rf"{LAYER}\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.(.*)", r"blocks.\1.attn.\2.\3"),
    (rf"{LAYER}\.attention\.(?:o_proj|output\.dense)\.(.*)", r"blocks.\1.attn.proj.\2"),
    (rf"{LAYER}\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (rf"{LAYER}\.mlp\.gate_proj\.(.*)", r"blocks.\1.mlp.gate.\2"),
    (rf"{LAYER}\.(?:mlp\.(?:fc1|up_proj|weights_in)|intermediate\.dense)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{LAYER}\.(?:mlp\.(?:fc2|down_proj|weights_out)|output\.dense)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:layernorm|norm)\.(weight|bias)", r"norm.\1"),
    (r"pooler\..*", None),
)
"""Names of transformers 4 and 5."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
"""By `hidden_act`."""


KNOWN = {
    "ViTModel": False,
    "DeiTModel": False,
    "Dinov2Model": False,
    "Dinov2Backbone": False,
    "Dinov2WithRegistersModel": True,
    "Dinov2WithRegistersBackbone": True,
    "DINOv3ViTModel": False,
    "DINOv3ViTBackbone": False,
}
"""The classes that are read, and whether their code resizes positions with an anti-aliased filter."""


def from_transformers(source: nn.Module | str, **options: Any) -> ViT:
    """Our ViT with the weights of a ViT, DeiT, DINOv2 or DINOv3 of transformers.

    Args:
        source: a model of one of these classes, its backbone class, or a classifier or the like around it; or what
            `from_pretrained` takes, a name on Hugging Face's hub or a folder, which needs transformers to be installed.
        options: of `AutoModel.from_pretrained`, where a name is given.

    Returns:
        The ViT in evaluation mode, in float32, without pooler and classifier. It resizes positions to other grids than
        their own as transformers does.

    Raises:
        ConfigError: transformers is not installed, a name that it cannot load, or a model that cannot be run exactly.
    """
    model = _loaded(source, **options) if isinstance(source, str) else source
    base = _base(model)
    name = f"a {type(base).__name__} of transformers"
    state = {k: v.detach().float() for k, v in rename(base.state_dict(), RULES, source=name).items()}
    config = _read(base, state, name)
    vit = ViT(config)
    load_strictly(vit, _joined(state, config), source=name)
    return vit.eval()


def _loaded(name: str, **options: Any) -> nn.Module:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ConfigError(
            f"{name!r}: loading by name needs transformers, which is not installed: pip install transformers"
        ) from error
    try:
        return AutoModel.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {name!r}: {error}") from error


def _base(model: nn.Module) -> Any:
    """The part of the model that is the ViT."""
    for part in (model, *model.children()):
        if type(part).__name__ in KNOWN and type(part).__module__.startswith("transformers."):
            return part
    known = ", ".join(name for name in KNOWN if name.endswith("Model"))
    name = type(model).__name__
    raise ConfigError(f"{name} is no plain ViT of transformers that is known here; {known} are, and what holds them")


def _read(model: Any, state: dict[str, Tensor], name: str) -> ViTConfig:
    """The configuration, after a look at everything that ours has not."""
    theirs = model.config
    act = "silu" if getattr(theirs, "use_swiglu_ffn", False) else theirs.hidden_act  # DINOv2's, whatever that says
    if act not in ACTIVATIONS:
        raise ConfigError(f"{name} cannot be run exactly: its activation {act!r} is none of the known ones")
    size = theirs.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patches = need(state, "patch_embed.proj.weight", source=name)
    if patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
        raise ConfigError(f"{name} cannot be run exactly: its patches are not squares of three channels")
    embed_dim, patch = patches.shape[0], patches.shape[2]
    query = need(state, "blocks.0.attn.q.weight", source=name)
    if query.shape[0] != embed_dim:
        raise ConfigError(f"{name} cannot be run exactly: its heads are not as wide as the embedding together")
    down = need(state, "blocks.0.mlp.fc2.weight", source=name)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    positions = "none"
    if "pos_embed" in state:
        positions = "patches" if registers and "register" in type(model).__name__.lower() else "all"
    return ViTConfig(
        grid=(height // patch, width // patch),
        patch_size=patch,
        embed_dim=embed_dim,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_heads=theirs.num_attention_heads,
        mlp_ratio=down.shape[1] / embed_dim,
        qkv_bias=any(f"blocks.0.attn.{x}.bias" in state for x in "qkv"),
        proj_bias="blocks.0.attn.proj.bias" in state or "blocks.0.mlp.fc2.bias" in state,
        class_token=True,
        num_registers=registers,
        pos_embed=positions,
        pos_antialias=KNOWN[type(model).__name__],
        rope=RopeConfig(kind="centred", temperature=theirs.rope_theta) if positions == "none" else None,
        layer_scale="both" if "blocks.0.ls1.gamma" in state else "none",
        act=ACTIVATIONS[act],
        gated_mlp=getattr(theirs, "use_swiglu_ffn", False) or "blocks.0.mlp.gate.weight" in state,
        norm_eps=theirs.layer_norm_eps,
        final_norm=True,
    )


def _joined(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """With queries, keys and values in one layer, the halves of a gated MLP in another, and zeros for what of several
    biases is not there; a class token takes its position along where the registers have none."""
    state = dict(state)
    if config.num_registers == 0:
        state.pop("reg_token", None)
    if config.pos_embed == "patches":
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    for i in range(config.depth):
        for layer, parts, biased in (
            ("attn.qkv", ("attn.q", "attn.k", "attn.v"), config.qkv_bias),
            ("mlp.fc1", ("mlp.gate", "mlp.fc1"), config.proj_bias),
            ("attn.proj", ("attn.proj",), config.proj_bias),
            ("mlp.fc2", ("mlp.fc2",), config.proj_bias),
        ):
            names = [f"blocks.{i}.{part}" for part in parts if f"blocks.{i}.{part}.weight" in state]
            if names:
                join(state, f"blocks.{i}.{layer}", names, biased=biased)
    return state
