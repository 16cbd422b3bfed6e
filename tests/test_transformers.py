"""ViTs of Hugging Face's transformers: features of every block, positions, skipped tokens, and what is refused."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.convert import from_transformers
from sievit.vit import ViT
from tiny import each_block, refused

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
PATCHES = {"patch_size": 14}
WIDE = {"intermediate_size": 48}


@dataclass(frozen=True)
class Case:
    """A class of transformers, its configuration's class, and what is told that."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    """The attribute of the ViT inside, where hidden states are asked for."""

    def make(self, **options: Any) -> Any:
        """With random weights in every place."""
        if not hasattr(transformers, self.model):
            pytest.skip(f"transformers {transformers.__version__} has no {self.model}")
        torch.manual_seed(3)
        config = getattr(transformers, self.config)(**{**SIZES, **PATCHES, **self.options, **options})
        model = getattr(transformers, self.model)(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model


CASES = {
    "vit": Case("ViTModel", "ViTConfig", WIDE),
    "vit, quick gelu, no biases": Case(
        "ViTModel", "ViTConfig", {**WIDE, "hidden_act": "quick_gelu", "qkv_bias": False}
    ),
    "vit, tanh": Case("ViTModel", "ViTConfig", {**WIDE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}),
    "vit classifier": Case("ViTForImageClassification", "ViTConfig", WIDE, "vit"),
    "deit": Case("DeiTModel", "DeiTConfig", WIDE),
    "deit classifier": Case("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE, "deit"),
    "dinov2": Case("Dinov2Model", "Dinov2Config"),
    "dinov2, gated": Case("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov2 classifier": Case("Dinov2ForImageClassification", "Dinov2Config", {}, "dinov2"),
    "dinov2 backbone": Case("Dinov2Backbone", "Dinov2Config"),
    "dinov2 with registers": Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "dinov2 with registers, gated": Case(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"use_swiglu_ffn": True, "num_register_tokens": 3}
    ),
    "dinov2 with registers, backbone": Case("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig"),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", {**WIDE, "num_register_tokens": 4}),
    "dinov3, gated": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**WIDE, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 30.0},
    ),
    "dinov3, other biases": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**WIDE, "query_bias": False, "key_bias": True, "value_bias": False, "mlp_bias": False, "patch_size": 16},
    ),
    "dinov3 backbone": Case("DINOv3ViTBackbone", "DINOv3ViTConfig", {**WIDE, "num_register_tokens": 4}),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Case, Any, ViT]:
    """A model of transformers and ours."""
    case = CASES[request.param]
    model = case.make()
    return case, model, from_transformers(model)


def hidden_states(case: Case, model: Any, images: Tensor) -> tuple[Tensor, ...]:
    """Theirs: the embedding, and what every block returns, without the last norm; then with it."""
    model = getattr(model, case.base) if case.base else model
    resize = {"interpolate_pos_encoding": True} if "ViT" in case.config[:3] or "DeiT" in case.config else {}
    found: list[Tensor] = []
    layers = [m for n, m in model.named_modules() if type(m).__name__.endswith("Layer") and n[-1].isdigit()]
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda *args: found.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
        for layer in layers
    ]
    with torch.no_grad():
        output = model(images, **resize)
    for hook in hooks:
        hook.remove()
    last = getattr(output, "last_hidden_state", None)
    return (*found, last) if last is not None else tuple(found)


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 7), (2, 8)])
@torch.no_grad()
def test_features_of_every_block_are_theirs(pair: tuple[Case, Any, ViT], grid: tuple[int, int]):
    """At their own grid, a larger one, and rectangular ones, of which 2 x 8 has as many positions as 4 x 4."""
    case, model, vit = pair
    patch = vit.config.patch_size
    images = torch.randn(2, 3, grid[0] * patch, grid[1] * patch)
    theirs, ours = hidden_states(case, model, images), list(each_block(vit, images))
    assert len(theirs) >= vit.config.depth + 1
    for i, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(a.abs().max())), f"after {i} blocks"


def test_what_is_loaded_is_ours_alone():
    """Changing one does not change the other, and half precision becomes float32."""
    model = CASES["dinov2"].make().half()
    vit = from_transformers(model)
    assert {p.dtype for p in vit.parameters()} == {torch.float32}
    assert not vit.training
    with torch.no_grad():
        vit.patch_embed.proj.weight.zero_()
    assert model.embeddings.patch_embeddings.projection.weight.count_nonzero() > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear is no plain ViT of transformers.* ViTModel, DeiTModel, Dinov2Model"),
        (lambda: transformers.BeitModel(transformers.BeitConfig(**SIZES, **WIDE)), "BeitModel is no plain ViT"),
        (lambda: CASES["vit"].make(hidden_act="relu"), "a ViTModel of transformers .* activation 'relu'"),
        (lambda: CASES["vit"].make(num_channels=1), "not squares of three channels"),
        (lambda: CASES["dinov3"].make(hidden_act="relu6"), "a DINOv3ViTModel of transformers .* activation 'relu6'"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(make: Callable[[], nn.Module], words: str):
    refused(words, from_transformers, make())


@torch.no_grad()
def test_a_folder_is_loaded_by_its_name(tmp_path: Path):
    model = CASES["dinov2 with registers"].make()
    model.save_pretrained(tmp_path / "mine")
    images = torch.randn(1, 3, 56, 56)
    loaded, made = (each_block(from_transformers(which), images) for which in (str(tmp_path / "mine"), model))
    for found, expected in zip(loaded, made, strict=True):
        assert torch.equal(found, expected)


def test_names_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    refused(r"transformers cannot load .*empty", from_transformers, str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"transformers cannot load 'facebook/dinov2-small'"):
        from_transformers("facebook/dinov2-small", local_files_only=True, cache_dir=tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers, which is not installed: pip install transformers"):
        from_transformers("facebook/dinov2-small")
