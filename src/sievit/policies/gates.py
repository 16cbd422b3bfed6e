"""Small networks that judge tokens, and how a judgement becomes a choice.

Letters: b images, n grid tokens.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sievit.tokens import Tokens


class Gate(nn.Module):
    """LayerNorm, linear, GELU, linear: (b, n, c) to logits (b, n, 2); index 0 means "take part".

    Other numbers of layers, and a depth-wise convolution behind the norm, are for comparison. A gate `with_budget`
    moves its hidden layer by a multiple of a learned vector, which is zero at first.
    """

    def __init__(
        self, *, dim: int, hidden_dim: int, layers: int = 2, kernel: int = 1, with_budget: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel > 1 else None
        self.fc1 = nn.Linear(dim, hidden_dim) if layers > 1 else None
        self.middle = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(layers - 2))
        self.fc2 = nn.Linear(dim if layers == 1 else hidden_dim, 2)
        self.budget = nn.Parameter(torch.zeros(hidden_dim)) if with_budget else None

    def forward(self, tokens: Tokens, budget: Tensor | float = 0.0) -> Float[Tensor, "b n 2"]:
        """`budget`, a number or (b, 1, 1), is where the budget lies in its range, from -1 to 1."""
        x = self.norm(tokens.patches)
        if self.conv is not None:
            x = x if tokens.valid is None else x * tokens.valid[..., None].to(x.dtype)
            x = self.conv(x.mT.unflatten(2, tokens.grid)).flatten(2).mT
        if self.fc1 is None:
            return self.fc2(x)
        x = self.fc1(x)
        if self.budget is not None:
            x = x + (budget * self.budget).to(x.dtype)
        for layer in self.middle:
            x = layer(F.gelu(x))
        return self.fc2(F.gelu(x))


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `like`."""
    return -torch.empty_like(like).exponential_().log()


def gumbel_gate(logits: Float[Tensor, "b n 2"], *, temperature: float, noise: float = 1.0) -> Float[Tensor, "b n"]:
    """(b, n) in {0, 1}: a hard Gumbel-softmax sample of index 0 of (b, n, 2), gradient of the soft one."""
    soft = ((logits.log_softmax(-1) + noise * gumbel_noise(logits)) / temperature).softmax(-1)
    return straight_through(soft[..., 0])


def straight_through(soft: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """1 where a probability is above one half, else 0; with the gradient of the probability."""
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft
