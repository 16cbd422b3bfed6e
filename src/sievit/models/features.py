"""Dense features of a ViT whose tokens a policy chooses: any backbone, without training."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.convert import from_timm, from_transformers
from sievit.policies import Policy, PolicyConfig, policy_config
from sievit.tokens import Trace
from sievit.vit import Execution, Sizes, ViT


@dataclass(frozen=True)
class Features:
    """The features of a batch of images.

    Attributes:
        map: (b, c, h, w), one vector per token; those of tokens that took no part are what the last block left.
        prefix: (b, p, c): class token and registers.
        trace: which tokens took part in which block.
    """

    map: Tensor
    prefix: Tensor
    trace: Trace


class SievedViT(nn.Module):
    """A backbone and the policy that chooses its tokens."""

    def __init__(self, vit: ViT, policy: Policy) -> None:
        super().__init__()
        self.vit = vit
        self.policy = policy

    def forward(
        self,
        images: Tensor,
        sizes: Sizes | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
    ) -> Features:
        """Features of normalised images (b, 3, H, W), H and W multiples of the patch size, of any shape.

        Args:
            sizes: (height, width) of each image inside a padded batch; None: they fill it.
            policy: takes the place of the module's own, e.g. `keep_all` for dense.
        """
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(learning):
            tokens, trace = self.vit(images, self.policy if policy is None else policy, sizes, execution=execution)
        return Features(map=tokens.map(), prefix=tokens.x[:, : tokens.num_prefix], trace=trace)


def sieve(
    vit: ViT | nn.Module | str, policy: str | PolicyConfig = "spread", *, freeze: bool = True, **options: Any
) -> SievedViT:
    """A backbone that computes only the tokens that a policy chooses.

    >>> vit = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=True)
    >>> features = sievit.sieve(vit, "spread", shares=(0.7, 0.5, 0.35))(images)

    Args:
        vit: of ours, of timm, of transformers, or the name of one of timm's, with its weights. It is copied.
        policy: a name or a configuration. `spread` (best), `attention`, `top_norm` and `random` need no training.
        freeze: the weights take no gradients.
        options: fields of the policy's configuration.

    Raises:
        ConfigError: a model that cannot be run exactly, an unknown policy or option, a policy that needs heads.
    """
    config = policy_config(policy) if isinstance(policy, str) else policy
    try:
        config = replace(config, **options)
    except TypeError as error:
        raise ConfigError(f"the policy {policy!r} has no such option: {error}") from error
    backbone = as_vit(vit)
    chooser = backbone.build_policy(config)
    sieved = SievedViT(backbone, chooser).eval()
    return sieved.requires_grad_(False) if freeze else sieved


def as_vit(source: ViT | nn.Module | str) -> ViT:
    """Our ViT with the weights of a model of timm or transformers, or of the timm model of that name.

    Raises:
        ConfigError: a model that cannot be run exactly, or that is of neither.
    """
    if isinstance(source, ViT):
        copy = ViT(source.config)
        copy.load_state_dict(source.state_dict())
        return copy
    if isinstance(source, str):
        return from_timm(source)
    library = type(source).__module__.partition(".")[0]
    if library == "timm":
        return from_timm(source)
    if library == "transformers":
        return from_transformers(source)
    raise ConfigError(
        f"a {type(source).__name__} of {library!r} is no ViT that is known here; give one of timm or transformers"
    )
