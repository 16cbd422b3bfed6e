"""Packing loses nothing and mixes nothing; every back-end of attention gives the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sievit.vit.execution import AttentionName
from sievit.vit.packed import Masked, Packed, Packing, pack, pad, padding_mask, positions, unpack

masks = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b)
    )
)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_pack_and_unpack_are_inverse(rows: list[list[bool]]) -> None:
    part = torch.tensor(rows)
    canvas = torch.randn(*part.shape, 3)
    packing = Packing.of(part)
    assert torch.equal(packing.index, positions(part.flatten(), int(part.sum())))
    packed = pack(canvas, packing)
    torch.testing.assert_close(packed, canvas[part], atol=0, rtol=0)
    assert packing.lengths == tuple(part.sum(1).tolist())
    assert packing.cu_seqlens.tolist() == [0, *part.sum(1).cumsum(0).tolist()]
    for inplace in (False, True):
        written = unpack(canvas.clone(), -packed, packing, inplace=inplace)
        apart = canvas.clone().transpose(1, 2).contiguous().transpose(1, 2)  # rows that do not lie one after the other
        torch.testing.assert_close(unpack(apart, -packed, packing, inplace=inplace), written, atol=0, rtol=0)
        torch.testing.assert_close(written, torch.where(part[..., None], -canvas, canvas), atol=0, rtol=0)
    if part.any():
        padded, real = pad(packed, packing), padding_mask(packing)
        torch.testing.assert_close(padded[real], packed, atol=0, rtol=0)
        assert not padded[~real].any()


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Softmax attention written out, image by image, in double precision."""
    out, start = [], 0
    for length in lengths:
        one = slice(start, start + length)
        scores = torch.einsum("qhd,khd->hqk", q[one].double(), k[one].double()) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[one].double()))
        start += length
    return torch.cat(out).to(q.dtype)


@pytest.mark.parametrize("attention", ["auto", "per_image", "batched"])
@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (3, 0, 7, 1), (0, 2)])
def test_attention_stays_within_images(attention: AttentionName, lengths: tuple[int, ...]) -> None:
    total, longest = sum(lengths), max(lengths)
    part = torch.arange(longest) < torch.tensor(lengths)[:, None]
    q, k, v = (torch.randn(total, 3, 8) for _ in range(3))
    out = Packed(Packing.of(part), attention).attend(q, k, v)
    torch.testing.assert_close(out, by_hand(q, k, v, lengths), atol=1e-5, rtol=1e-5)


def test_masked_keys_are_invisible_and_an_empty_image_is_finite() -> None:
    part = torch.tensor([[True, False, True, True], [False] * 4])
    q, k, v = (torch.randn(2, 4, 2, 8, requires_grad=True) for _ in range(3))
    out = Masked(part).attend(q, k, v)
    expected = by_hand(q[0, part[0]], k[0, part[0]], v[0, part[0]], (3,))
    torch.testing.assert_close(out[0, part[0]], expected, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
