"""The one loop: a policy decides, the executor computes, the trace remembers.

Every pruning method is a policy (`sievit.policies.base`), and every pass of every model goes through this loop. A block
has two halves, attention and MLP; a policy may decide before each of them. Between two decisions the chosen tokens stay
packed. The tokens that are left out stay on the canvas with the value that they have, or follow a similar one.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from sievit.policies.base import Policy
from sievit.tokens import Tokens, Trace
from sievit.vit.block import Block
from sievit.vit.config import ViTConfig
from sievit.vit.execution import Execution
from sievit.vit.executor import Run, execute_run
from sievit.vit.projections import Projections
from sievit.vit.propagation import propagated, with_source


class Backbone(Protocol):
    """What has blocks: a `ViT`."""

    config: ViTConfig
    blocks: nn.ModuleList


def run_blocks(
    vit: Backbone,
    tokens: Tokens,
    policy: Policy,
    trace: Trace,
    *,
    start: int = 0,
    stop: int | None = None,
    execution: Execution = Execution(),
    inplace: bool = False,
) -> tuple[Tokens, Trace]:
    """Blocks `start` to `stop` (0-based, without `stop`; None: to the last) on the tokens that the policy chooses.

    Args:
        inplace: results may be written into the canvas that comes in; for a caller that needs neither it nor gradients.

    Returns:
        The canvas, whole, and the trace of this and of earlier pieces of the loop.
    """
    blocks = [block for block in vit.blocks if isinstance(block, Block)]
    stop, given, half = len(blocks) if stop is None else stop, tokens.x, None
    step, end = 2 * start, 2 * stop  # halves of blocks: 2i is the attention of block i, 2i + 1 its MLP
    while step < end:
        index, inside = divmod(step, 2)
        if inside:
            assert half is not None, "a decision inside a block needs a token"
            seen = Projections.inside(blocks[index], tokens, half, class_token=vit.config.class_token)
            tokens, notes = policy.inside_block(index, replace(tokens, context=None), trace, seen)
        else:
            tokens, notes = policy.before_block(index, tokens, trace)
            if policy.rejoins_at(index):
                tokens = policy.after_piece(tokens, trace).with_extra(None).select(None)
        if policy.propagates and tokens.source is None:
            tokens, notes = with_source(tokens, notes)
        until = next((i for i in range(step + 1, end) if _is_decided(policy, i)), end)
        run = Run(blocks[index : (until + 1) // 2], from_mlp=bool(inside), to_attention=bool(until % 2))
        whole, before = tokens, tokens.averaged()
        owned = (inplace or whole.x is not given) and whole.source is None and not torch.is_grad_enabled()
        tokens, half = execute_run(run, before, execution, inplace=owned)
        if whole.source is not None:
            tokens = propagated(whole, before, tokens, selected=execution.mode == "selected")
        trace = trace.record(tokens, notes, [bool(i % 2) for i in range(step, until)])
        step = until
    tokens = policy.after_piece(tokens, trace)
    trace = trace.noted(policy.piece_notes(tokens))
    if stop == len(blocks):
        tokens, notes = policy.after_blocks(tokens, trace)
        trace = trace.finish(tokens if policy.training else None, notes)
    return replace(tokens, gate=None), trace


def _is_decided(policy: Policy, step: int) -> bool:
    """Whether the policy decides before this half of a block."""
    index, inside = divmod(step, 2)
    if policy.rejoins_at(index):
        return not inside
    return policy.decides_inside(index) if inside else policy.decides_at(index)
