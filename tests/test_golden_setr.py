"""Parity with the SETR-like heads of the released DToP and of mmsegmentation, from recorded data."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sievit.convert.dtop import VIT_RULES
from sievit.convert.keys import Rules, load_strictly, rename
from sievit.heads import MLPConfig, SemanticHead, SETRNaive, SETRNaiveConfig, build_head
from sievit.heads.semantic import resize
from sievit.losses import pixel_loss
from sievit.models.segmenter import SegmentationNet
from sievit.policies import KeepAllConfig
from sievit.tokens import Tokens
from sievit.vit import ViT, ViTConfig

MLP_RULES: Rules = (
    (r"(|.*\.)layer\.(layers\..*)", r"\1\2"),
    (r"(|.*\.)conv_seg\..*", None),  # the released head has it and does not use it
)
NAIVE_RULES: Rules = (
    (r"(.*\.norm)\.(weight|bias)", r"\1.\2"),
    (r"(.*)\.up_convs\.0\.0\.conv\.weight", r"\1.fc1.weight"),
    (r"(.*)\.up_convs\.0\.0\.bn\.(.*)", r"\1.bn.\2"),
    (r"(.*)\.conv_seg\.(.*)", r"\1.fc2.\2"),
)
BACKBONE_RULES: Rules = (
    (r"backbone\.(cls_token)", r"vit.\1"),
    (r"backbone\.ln1\.(.*)", r"vit.norm.\1"),
    *VIT_RULES,
)


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> Path:
    return golden_root / "dtop"


def weights(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state."): value for key, value in case.items() if key.startswith("state.")}


def canvas(features: Tensor) -> Tokens:
    """(b, c, h, w) as tokens."""
    return Tokens(features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3]))


def assert_same_gradient(name: str, own: Tensor | None, expected: Tensor) -> None:
    """Equal within 1e-3 of the largest entry; a constant before a batch norm has no gradient but round-off."""
    assert own is not None, name
    assert float((own.view_as(expected) - expected).abs().max()) <= 1e-3 * float(expected.abs().max()) + 1e-7, name


def known(labels: Tensor) -> Tensor:
    """The share of labelled pixels: mmsegmentation divides the sum over them by the number of all pixels."""
    return (labels != 255).float().mean()


def mlp(state: dict[str, Tensor]) -> SemanticHead:
    head = build_head(MLPConfig(hidden_dim=128), embed_dim=64, num_classes=7)
    load_strictly(head, rename(state, MLP_RULES, source="an MLP head"), source="an MLP head")
    return head


def test_mlp_head_equals_the_release(golden: Path) -> None:
    case = load_file(golden / "setr_mlphead.safetensors")
    head, features = mlp(weights(case)), case["feat"].clone().requires_grad_()
    prediction = head(canvas(features))
    torch.testing.assert_close(prediction.maps.detach().unflatten(2, (6, 6)), case["logits"], atol=1e-4, rtol=0)
    (loss,) = head.losses(prediction, (6, 6), case["label"].long(), 255).values()
    loss = loss * known(case["label"])
    torch.testing.assert_close(loss.detach(), case["loss_ce"][0], atol=0, rtol=5e-5)
    loss.backward()
    assert_same_gradient("feat", features.grad, case["grad_feat"])
    for key, parameter in head.named_parameters():
        assert_same_gradient(key, parameter.grad, case[f"grad.layer.{key}"])


def test_mlp_head_on_some_tokens_equals_the_release(golden: Path) -> None:
    """The released head repeats the logits of each given token for the 256 pixels of its patch."""
    case = load_file(golden / "setr_mlphead_cropidx.safetensors")
    head = mlp(weights(load_file(golden / "setr_mlphead.safetensors")))
    places, given = case["crop_idx"].long(), case["tokens"]
    x = torch.full((2, 36, 64), torch.nan)
    x[:, places] = given
    part = torch.zeros(2, 36, dtype=torch.bool)
    part[:, places] = True
    with torch.inference_mode():
        maps = head(Tokens(x, (6, 6)), part).maps
    expected = case["logits"][..., 0].unflatten(2, (4, 256))
    torch.testing.assert_close(maps[:, :, places, None].expand_as(expected), expected, atol=1e-4, rtol=0)
    assert not maps[:, :, ~part[0]].any()


def network(state: dict[str, Tensor], heads: list[SemanticHead], rules: Rules, places: tuple[int, ...]):
    """mmsegmentation's ViT with heads behind its blocks, and the names that the release gives to its parameters."""
    numbered = {}
    for key, value in state.items():
        new = key.replace("auxiliary_head.", "heads.").replace("decode_head.", f"heads.{len(heads) - 1}.")
        numbered[new] = value[:, :, 0, 0] if new.startswith("heads.") and value.shape[2:] == (1, 1) else value
    vit = ViT(ViTConfig(grid=(6, 6), embed_dim=64, depth=6, num_heads=4, class_token=True, final_norm=True))
    net = SegmentationNet(vit=vit, policy=KeepAllConfig(), heads=heads, out_indices=places)
    source = "mmsegmentation's SETR"
    load_strictly(net, rename(numbered, (*BACKBONE_RULES, *rules), source=source), source=source)
    keys = list(state)
    marks = {key: torch.tensor(i) for i, key in enumerate(numbered)}
    names = {ours: keys[int(i)] for ours, i in rename(marks, (*BACKBONE_RULES, *rules), source=source).items()}
    return net, names


def check_network(case: dict[str, Tensor], net: SegmentationNet, names: dict[str, str], grid: tuple[int, int]) -> None:
    """What heads say on `grid`, the answer, losses and gradients."""
    stages = [f"aux_{i}" for i in range(len(net.heads) - 1)] + ["decode"]
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.inference_mode():
        answer, _ = net.eval()(case["input"], head_size=grid)
    torch.testing.assert_close(answer, case["out.encode_decode"], atol=1e-4, rtol=0)

    for i, (stage, head) in enumerate(zip(stages, net.heads, strict=True)):
        with torch.inference_mode():
            maps = head(canvas(case[f"feat.{i}"])).maps.unflatten(2, (6, 6))
        torch.testing.assert_close(resize(maps, grid), case[f"{stage}.logits"], atol=1e-4, rtol=0)
    said, trace = net.train().predictions(case["input"])
    assert list(said) == list(net.out_indices)
    total = torch.zeros(())
    for stage, prediction in zip(stages, said.values(), strict=True):
        logits = resize(prediction.maps.unflatten(2, trace.grid), grid)
        loss = pixel_loss(logits, case["label"].long()) * known(case["label"])
        weight = round(float(case[f"loss.{stage}.loss_ce"] / loss.detach()), 4)
        assert weight in (1.0, 0.4), stage
        torch.testing.assert_close(weight * loss.detach(), case[f"loss.{stage}.loss_ce"][0], atol=0, rtol=5e-5)
        total = total + weight * loss
    torch.testing.assert_close(total.detach(), case["total"][0], atol=0, rtol=5e-5)
    total.backward()
    checked = 0
    for name, parameter in net.named_parameters():
        if f"grad.{names[name]}" in case:
            assert_same_gradient(name, parameter.grad, case[f"grad.{names[name]}"])
            checked += 1
    assert checked == sum(key.startswith("grad.") for key in case)


def test_mlp_heads_on_a_vit_equal_the_release(golden: Path) -> None:
    case = load_file(golden / "setr_vit_mlphead.safetensors")
    heads = [build_head(MLPConfig(hidden_dim=128), embed_dim=64, num_classes=7) for _ in range(3)]
    net, names = network(weights(case), heads, MLP_RULES, (1, 3, 5))
    check_network(case, net, names, (6, 6))


def undo_running_average(head: SemanticHead, features: Tensor) -> None:
    """The weights were stored after the one training step and the logits taken before it."""
    assert isinstance(head, SETRNaive)
    assert head.bn.running_mean is not None and head.bn.running_var is not None
    with torch.no_grad():
        x = head.fc1(head.norm(canvas(features).x)).flatten(0, 1)
        head.bn.running_mean.sub_(0.1 * x.mean(0)).div_(0.9)
        head.bn.running_var.sub_(0.1 * x.var(0)).div_(0.9)


def test_setr_naive_equals_the_release(golden: Path) -> None:
    """The released heads resize to four times the grid; ours say what they say per token."""
    case = load_file(golden / "setr_naive_small.safetensors")
    heads = [build_head(SETRNaiveConfig(channels=32), embed_dim=64, num_classes=7) for _ in range(4)]
    state = {key: value for key, value in weights(case).items() if "num_batches" not in key}
    state |= {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in state if "running_mean" in key
    }
    net, names = network(state, heads, NAIVE_RULES, (1, 2, 4, 5))
    for i, head in enumerate(heads):
        undo_running_average(head, case[f"feat.{i}"])
    check_network(case, net, names, (24, 24))
