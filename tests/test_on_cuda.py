"""What can be known of CUDA without it: with fake tensors, which have a device and no values, whole passes run.

A tensor that is made on the host inside a pass makes it wait, and cannot be in a CUDA graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sievit.heads import ATMConfig, build_head
from sievit.models.backbone import build_backbone
from sievit.models.segmenter import build_net
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig, SViTConfig
from sievit.tokens import Tokens
from sievit.vit import ViTConfig
from sievit.vit.packed import Packed, Packing


class OnHost(TorchDispatchMode):
    """Notes the operations that read or make a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), func._schema.name
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        if name == "aten::lift_fresh" or any(each.device.type == "cpu" for each in tensors):
            self.seen.append(name)
        return out


@pytest.fixture(autouse=True)
def nobody_looks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention does to choose its kernel, autocast to see that it can be had."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))


@torch.no_grad()
def on_cuda(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[str]]:
    """The tensors that a pass returns, and what it did on the host; float32 stands for autocast to bfloat16."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with FakeTensorMode():
        weights = {
            name: torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device="cuda")
            for name, x in state.items()
        }
        images = torch.empty(shape, dtype=dtype, device="cuda")
        with OnHost() as host, torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            out = functional_call(module.eval(), weights, (images,))[0]
    return tree_leaves(out), host.seen


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@DTYPES
@pytest.mark.parametrize("policy", [KeepAllConfig(), SViTConfig(static_shares=(0.7, 0.5, 0.3), multiple=8)])
def test_a_backbone_with_static_counts_stays_on_the_device(policy: PolicyConfig, dtype: torch.dtype) -> None:
    vit = ViTConfig(grid=(4, 4), embed_dim=64, depth=6, num_heads=2)
    neck = AdapterConfig(conv_inplane=16, deform_num_heads=4, num_interactions=2)
    maps, host = on_cuda(build_backbone(neck, vit, policy), (2, 3, 128, 96), dtype)
    assert not host
    assert [tuple(x.shape[2:]) for x in maps] == [(32, 24), (16, 12), (8, 6), (4, 3)]
    assert all(x.is_cuda for x in maps)


@DTYPES
@pytest.mark.parametrize(
    "policy",
    [
        KeepAllConfig(),
        DToPConfig(static_left=(0.35, 0.6), multiple=4, keep_per_class=1),
        DToPConfig(static_left=(0.35, 0.6), grade="entropy", rejoin=True),
    ],
)
def test_a_segmenter_with_static_exits_stays_on_the_device(policy: PolicyConfig, dtype: torch.dtype) -> None:
    vit = ViTConfig(grid=(6, 8), patch_size=4, embed_dim=32, num_heads=2, depth=6)
    net = build_net(vit, policy, ATMConfig(channels=16, num_heads=2, num_layers=2), (1, 3, 5), 4)
    (scores,), host = on_cuda(net, (2, 3, 24, 32), dtype)
    assert not host
    assert scores.is_cuda and scores.shape == (2, 4, 24, 32)


@pytest.mark.parametrize("made", [lambda x: torch.tensor([1.0, 2.0], device=x.device), lambda x: x.new_tensor((1, 2))])
def test_what_is_made_on_the_host_is_seen(made: Callable[[Tensor], Tensor]) -> None:
    class Moved(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * made(x),)

    assert on_cuda(Moved(), (3, 2), torch.bfloat16)[1]


def test_numbers_of_tokens_that_change_are_not_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's attention, which newer versions of torch prefer, is planned anew for every number of tokens."""
    enabled = []

    def asked(q: Tensor, *_: Any, **__: Any) -> Tensor:
        enabled.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return torch.empty_like(q)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", asked)
    q, k, v = torch.randn(5, 3, 2, 8).unbind(1)
    Packed(Packing(torch.arange(5), (3, 2)), "varlen").attend(q, k, v)
    assert enabled == [(True, False)]

    monkeypatch.setattr(F, "scaled_dot_product_attention", asked)
    head = build_head(ATMConfig(channels=16, num_heads=2, num_layers=1), embed_dim=8, num_classes=4)
    tokens = Tokens(x=torch.randn(1, 6, 8), grid=(2, 3))
    head(tokens, torch.arange(6)[None] < 4)
    assert enabled[1:] == [(True, True), (True, False)], "among the queries, and over the tokens"
    assert torch.backends.cuda.cudnn_sdp_enabled()
