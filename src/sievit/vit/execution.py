"""How a pass is run; `sievit tune` finds what is best on a device, and a checkpoint stores it."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sievit.config import Config, ConfigError

MANY_SHAPES: dict[str, Any] = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
"""Of torch.compile: in the bucketed mode every block is compiled for every bucket it is given."""


Mode = Literal["auto", "packed", "padded", "bucketed", "masked", "selected"]
AttentionName = Literal["auto", "per_image", "batched", "varlen"]


@dataclass(frozen=True)
class Execution(Config):
    """How a pass is run: the one vocabulary of executor, models, checkpoints, benches and tuning.

    Attributes:
        mode: how the tokens that take part are arranged.
            `auto` is `masked` where the canvas carries a gate and `packed` elsewhere.
            `packed` computes exactly the chosen tokens, or where the policy gives positions for equally many in every
            image (`Tokens.order`) those, so that no shape depends on the choice;
            `padded` pads each image's chosen tokens to the longest image;
            `bucketed` pads further, to one of eight counts per canvas: few shapes, few graphs;
            `masked` computes everything and hides the others, which is what straight-through gates need;
            `selected` computes the chosen tokens alone and gives gates their gradient from those.
        attention: of packed tokens: `per_image` calls fused attention once per image (once for all when they have
            equally many tokens), `batched` once on padded queries and keys with a mask, `varlen` is torch's
            variable-length flash attention (CUDA, 16 bits). `auto` takes `varlen` where it runs, else `per_image`.
        compiled: the network, from a batch to its maps or scores, runs under torch.compile, on CUDA with CUDA graphs.
            It is compiled at the first batch of each size, up to torch's limit of recompilations; further sizes run
            uncompiled.
        precision: bfloat16 runs under autocast, with weights of 32 bits.
    """

    mode: Mode = "auto"
    attention: AttentionName = "auto"
    compiled: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The JSON of versions that called `attention` backend, and `batched` padded."""
        data = dict(data)
        backend = data.pop("backend", None)
        return data if backend is None else {**data, "attention": "batched" if backend == "padded" else backend}

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a pass; with float32 an outer autocast stays in force."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def run(self, network: nn.Module, images: Tensor, *args: Any, **options: Any) -> Any:
        """`network(images, ..., execution=self)`, compiled or not.

        Raises:
            ConfigError: the compiler fails, or there is none.
        """
        options["execution"] = self
        if not self.compiled:
            return network(images, *args, **options)
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        graphs = images.is_cuda
        try:
            with config.patch(MANY_SHAPES) if self.mode == "bucketed" else nullcontext():
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                answer = _compiled(graphs, self.mode)(network, images, *args, **options)
        except TorchDynamoException as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise ConfigError(
                f"the network cannot be compiled here ({reason}); leave out --compile, load it with compile=False, or "
                "set TORCH_COMPILE_DISABLE=1"
            ) from error
        return copied(answer) if graphs else answer


def copied(value: Any) -> Any:
    """Tensors in dicts, tuples and dataclasses, copied: what a CUDA graph returns lies where the next pass writes."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(copied(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: copied(getattr(value, field.name)) for field in fields(value)})
    return value


@cache
def _compiled(graphs: bool, mode: str) -> Callable[..., Any]:
    """Calls a network, compiled; torch keeps what it compiled for each network and size."""
    logging.getLogger("sievit").warning(
        "the network is compiled at the first batch of each size, which may take minutes; "
        "load it with compile=False, or set TORCH_COMPILE_DISABLE=1, to run it as it stands"
    )
    if mode == "bucketed":
        torch._logging.set_logs(dynamo=logging.ERROR)  # breaks are what this mode is made of
    return torch.compile(_call, dynamic=False, mode="reduce-overhead" if graphs else None)


def _call(network: nn.Module, *args: Any, **options: Any) -> Any:
    return network(*args, **options)
