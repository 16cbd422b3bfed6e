"""Parity with the released SViT backbone, from recorded data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sievit.convert import adapter_backbone
from sievit.convert.keys import rename
from sievit.convert.svit import ADAPTER_RULES, SPARSE_RULES, _number_extra_extractors
from sievit.necks.adapter import ViTAdapter
from sievit.policies import svit
from sievit.vit import Execution
from sievit.vit.execution import Mode

HEADS: dict[str, Any] = {"num_heads": 4, "deform_num_heads": 4}


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> Path:
    return golden_root / "svit"


@pytest.fixture(scope="module")
def weights(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "backbone_small.weights.safetensors")


@pytest.fixture(scope="module")
def backbone(weights: dict[str, Tensor]) -> ViTAdapter:
    return adapter_backbone(weights, **HEADS)


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(golden / "backbone_small_eval.safetensors").items():
        case, name = key.split("/", 1)
        found.setdefault(case, {})[name] = value
    return found


def check(backbone: ViTAdapter, images: Tensor, case: dict[str, Tensor], mode: Mode) -> None:
    with torch.inference_mode():
        features, trace = backbone(images, execution=Execution(mode=mode))
    chosen = torch.stack(trace.keep, 1).unflatten(2, trace.grid)
    assert torch.equal(chosen, case["selectors"].bool())
    for i in range(4):
        torch.testing.assert_close(features[str(i)], case[f"feat{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["packed", "padded", "masked"])
@pytest.mark.parametrize("name", ["a", "b", "c", "c_nested"])
def test_evaluation_equals_the_release(backbone, cases, name, mode) -> None:
    case = cases[name]
    images = case["input"] if "input" in case else cases["c"]["input"]
    check(backbone, images, case, mode)
    if mode == "packed" and "gate_logits_0" in case:
        with torch.inference_mode():
            logits = [aux["logits"] for aux in backbone(images)[1].aux if "logits" in aux]
        for k, own in enumerate(logits):
            torch.testing.assert_close(own, case[f"gate_logits_{k}"], atol=1e-4, rtol=1e-4)


def test_batch_equals_image_by_image(backbone, cases) -> None:
    images = cases["c"]["input"]
    with torch.inference_mode():
        together, trace = backbone(images)
        for i in range(len(images)):
            alone, own_trace = backbone(images[i : i + 1])
            assert torch.equal(torch.stack(trace.keep)[:, i], torch.stack(own_trace.keep)[:, 0])
            for name, feature in alone.items():
                torch.testing.assert_close(together[name][i], feature[0], atol=1e-4, rtol=0)


def test_sampled_gates_equal_the_release(weights, cases, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = adapter_backbone(weights, **HEADS)
    assert isinstance(sampling.policy, svit.SViT)
    sampling.policy.config = dataclasses.replace(sampling.policy.config, sample=True)
    noise = iter([cases["d"][f"noise_{k}"] for k in range(9)])
    monkeypatch.setattr(svit, "gumbel_noise", lambda like: next(noise))
    check(sampling, cases["a"]["input"], cases["d"], "packed")


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        ("e_all_keep", dict.fromkeys(range(9), 1e4)),
        ("e_gate4_empty", {4: -1e4}),
        ("e_all_gates_empty", dict.fromkeys(range(9), -1e4)),
        ("e_gate4_tie", {4: None}),
        ("e_all_keep_batch2", dict.fromkeys(range(9), 1e4)),
        ("e_gate4_empty_batch2", {4: -1e4}),
    ],
)
def test_edge_cases_equal_the_release(weights, cases, name: str, shifts: dict[int, float | None]) -> None:
    edited = {key: value.clone() for key, value in weights.items()}
    for gate, shift in shifts.items():
        prefix = f"selective_modules.{gate}.mlp.fc2"
        if shift is None:
            edited[f"{prefix}.weight"].zero_()
            edited[f"{prefix}.bias"].zero_()
        else:
            edited[f"{prefix}.bias"][0] += shift
    images = cases["c" if name.endswith("batch2") else "a"]["input"]
    check(adapter_backbone(edited, **HEADS), images, cases[name], "packed")


def test_training_equals_the_release(weights, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_file(golden / "backbone_small_train.safetensors")
    backbone = adapter_backbone(weights, **HEADS).train()
    noise = iter([data[f"noise_{k}"] for k in range(9)])
    monkeypatch.setattr(svit, "gumbel_noise", lambda like: next(noise))
    images = data["input"].clone().requires_grad_()

    features, trace = backbone(images)
    ratio = backbone.policy.loss(trace)["ratio"]
    loss = ratio + sum((features[str(k)] * data[f"loss_weight{k}"]).sum() for k in range(4))
    loss.backward()

    assert torch.equal(torch.stack(trace.keep[3:]), data["selectors"].bool())
    for k in range(4):
        torch.testing.assert_close(features[str(k)], data[f"feat{k}"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ratio, 4 * data["ratio_loss"].reshape(()), atol=0, rtol=1e-3)
    torch.testing.assert_close(loss.detach(), data["loss"].reshape(()), atol=0, rtol=1e-3)
    assert_same_tensor("input", images.grad, data["grad_input"])
    names = released_names(weights)
    checked = 0
    for key, expected in data.items():
        if not key.startswith("grad/"):
            continue
        name = key.removeprefix("grad/")
        parameter = dict(backbone.named_parameters())[names[name]]
        if name == "pos_embed":
            assert not expected[:, 0].any()
            expected = expected[:, 1:]
        assert_same_tensor(name, parameter.grad, expected)
        checked += 1
    assert checked > 300
    buffers = dict(backbone.named_buffers())
    for key, expected in data.items():
        if key.startswith("buffer_after/"):
            torch.testing.assert_close(
                buffers[names[key.removeprefix("buffer_after/")]], expected, atol=1e-5, rtol=1e-4
            )


ZERO_GRADIENTS = {"up.bias", "spm.fc1.bias"}  # a constant before a batch norm: round-off alone


def assert_same_tensor(name: str, own: Tensor | None, expected: Tensor) -> None:
    """Equal within 1e-3 of the largest entry."""
    assert own is not None, name
    scale = 1.0 if name in ZERO_GRADIENTS else expected.abs().max().item()
    assert (own - expected).abs().max().item() <= 1e-3 * scale, name


def released_names(weights: dict[str, Tensor]) -> dict[str, str]:
    """Released name to ours, by converting a state dict whose values say which key they came from."""
    marked = {key: torch.tensor(i) for i, key in enumerate(weights)}
    renamed = rename(_number_extra_extractors(marked), (*SPARSE_RULES, *ADAPTER_RULES), source="released")
    keys = list(weights)
    return {keys[int(value)]: name for name, value in renamed.items()}


def test_prefix_and_manifests(weights, golden: Path) -> None:
    prefixed = {f"backbone.{key}": value for key, value in weights.items()}
    prefixed["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    adapter_backbone(prefixed, **HEADS)
    for size, heads in (("t", 3), ("s", 6)):
        manifest = json.loads((golden / f"manifest_svit_adapter_{size}.json").read_text())
        with torch.device("meta"):
            state = {
                key: torch.empty(entry["shape"] if isinstance(entry, dict) else entry[0])
                for key, entry in manifest["state_dict"].items()
            }
            backbone = adapter_backbone(state, num_heads=heads, deform_num_heads=6)
        unused = backbone.vit.config.embed_dim  # the class token's position
        assert sum(p.numel() for p in backbone.parameters()) + unused == manifest["n_params_backbone"]


def test_a_wrong_state_dict_is_named(weights) -> None:
    with pytest.raises(ValueError, match="blob"):
        adapter_backbone({**weights, "blob": torch.zeros(1)}, **HEADS)
    with pytest.raises(ValueError, match=r"vit\.blocks\.3\.norm1\.weight"):
        adapter_backbone(
            {k: v for k, v in weights.items() if "blocks.3.TransformerEncoderLayer.norm1.weight" not in k}, **HEADS
        )
    wrong = {**weights, "up.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"up\.bias \(3,\) instead of \(64,\)"):
        adapter_backbone(wrong, **HEADS)
