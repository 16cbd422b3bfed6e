"""Counting multiply-adds: blocks by formula from the tokens that took part, any other module on shapes alone.

One GFLOP is 1e9 multiply-adds, as in the papers. Additions, norms, activations and softmax are left out, as there.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sievit.tokens import Trace
from sievit.vit import ViTConfig


def block_macs(
    config: ViTConfig,
    tokens: Tensor,
    seen: Tensor | None = None,
    mlp: Tensor | None = None,
    projected: Tensor | None = None,
) -> Tensor:
    """Multiply-adds of one block.

    Its attention computes `tokens` tokens of an image from `seen` visible ones, of which it projects `projected` (None:
    all of them), its MLP `mlp` tokens (None: the same).

    2 t c^2 + 2 p c^2 for queries, keys, values and the projection, 2 t s c for the attention, 2 m c (mlp c), or of a
    gated MLP 3 m c (mlp c). Without tokens the block is not computed.
    """
    t, c = tokens.double(), config.embed_dim
    s = t if seen is None else seen.double() * (t > 0)
    p = s if projected is None else projected.double() * (t > 0)
    m = t if mlp is None else mlp.double()
    return 2 * t * c**2 + 2 * p * c**2 + 2 * t * s * c + (3 if config.gated_mlp else 2) * m * c * config.hidden_dim


def traced_macs(config: ViTConfig, trace: Trace) -> Tensor:
    """(b,) multiply-adds of all blocks of a trace."""
    return block_macs(config, trace.counts(), trace.seen(), trace.mlp_counts(), trace.projected()).sum(0)


_COUNTED: WeakKeyDictionary[nn.Module, dict[tuple, float]] = WeakKeyDictionary()


def count_macs(module: nn.Module, *inputs: object, **options: object) -> float:
    """Multiply-adds of `module(*inputs, **options)` in evaluation, by torch's counter and without touching the module.

    Args:
        inputs: tensors on the meta device, or lists or dicts of them. A module is counted once for given shapes.
    """
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    known = _COUNTED.setdefault(module, {})
    if shapes not in known:
        state = {
            name: value.to("meta", torch.float32 if value.is_floating_point() else value.dtype)
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                functional_call(module, state, inputs, options)
        finally:
            module.train(training)
        known[shapes] = counter.get_total_flops() / 2
    return known[shapes]
