"""The one loop: a policy decides, the executor computes, the trace remembers.

Every pruning method is a policy (`sievit.policies.base`), and every pass of every model goes through this loop. A block
has two halves, attention and MLP; a policy may decide before each of them. Between two decisions the chosen tokens stay
packed. The tokens that are left out stay on the canvas with the value that they have.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from sievit.policies.base import Policy
from sievit.tokens import Tokens, Trace
from sievit.vit.block import Block
from sievit.vit.execution import Execution
from sievit.vit.executor import Half, Run, execute_run
from sievit.vit.projections import Projections


def run_blocks(
    blocks: Sequence[Block],
    tokens: Tokens,
    policy: Policy,
    trace: Trace,
    *,
    start: int = 0,
    stop: int | None = None,
    execution: Execution = Execution(),
    class_token: bool = False,
    inplace: bool = False,
) -> tuple[Tokens, Trace]:
    """Blocks `start` to `stop` (0-based, without `stop`; None: to the last) on the tokens that the policy chooses.

    Args:
        blocks: all of the backbone's.
        class_token: the first prefix token is one, whose attention a policy may ask for.
        inplace: write results into the canvas that came in, where no gradient is needed; for a caller that owns it.

    Returns:
        The canvas, whole, and the trace of this and of earlier pieces of the loop.
    """
    stop, given, half = len(blocks) if stop is None else stop, None if inplace else tokens.x, None
    step, end = 2 * start, 2 * stop  # halves of blocks: 2i is the attention of block i, 2i + 1 its MLP
    while step < end:
        tokens, notes = _decide(policy, blocks, step, tokens, trace, half, class_token)
        until = next((i for i in range(step + 1, end) if _is_decided(policy, i)), end)
        run = Run(blocks[step // 2 : (until + 1) // 2], from_mlp=bool(step % 2), to_attention=bool(until % 2))
        owned = tokens.x is not given and not torch.is_grad_enabled()
        tokens, half = execute_run(run, tokens, execution, inplace=owned)
        trace = trace.record(tokens, notes, [bool(i % 2) for i in range(step, until)])
        step = until
    tokens = policy.after_piece(tokens, trace)
    if stop == len(blocks):
        tokens, notes = policy.after_blocks(tokens, trace)
        trace = trace.finish(tokens if policy.training else None, notes)
    return replace(tokens, gate=None), trace


def _is_decided(policy: Policy, step: int) -> bool:
    """Whether the policy decides before this half of a block."""
    return policy.decides_inside(step // 2) if step % 2 else policy.decides_at(step // 2)


def _decide(
    policy: Policy,
    blocks: Sequence[Block],
    step: int,
    tokens: Tokens,
    trace: Trace,
    half: Half | None,
    class_token: bool,
) -> tuple[Tokens, dict[str, torch.Tensor]]:
    index = step // 2
    if step % 2 == 0:
        return policy.before_block(index, tokens, trace)
    assert half is not None, "a decision inside a block needs a token"
    projections = Projections.inside(
        blocks[index], tokens, half.heads, half.computed, half.visible, class_token=class_token
    )
    return policy.inside_block(index, replace(tokens, context=None), trace, projections)
