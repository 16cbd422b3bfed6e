"""Models as a whole: built from a configuration, and kept in one file that holds it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from sievit.config import ConfigError, from_json, kind_of, to_json
from sievit.detector import Detector, DetectorConfig, build_detector
from sievit.files import write_atomically
from sievit.inputs import ModelConfig
from sievit.policies import PolicyConfig, policy_config
from sievit.segmenter import Segmenter, SegmenterConfig, build_segmenter

Model = Detector | Segmenter

FORMAT = "sievit"
POLICY_PREFIXES = ("backbone.policy.", "net.policy.")
"""How the names of a policy's own parameters begin."""


@overload
def build(config: DetectorConfig) -> Detector: ...
@overload
def build(config: SegmenterConfig) -> Segmenter: ...
@overload
def build(config: ModelConfig) -> Model: ...
def build(config: ModelConfig) -> Model:
    """The model that `config` describes, with random weights."""
    if isinstance(config, SegmenterConfig):
        return build_segmenter(config)
    if isinstance(config, DetectorConfig):
        return build_detector(config)
    raise ConfigError(f"no model is known for {type(config).__name__}")


def save(model: Model, path: Path | str, *, half: bool = False) -> None:
    """Write the model and its configuration as one safetensors file, whole or not at all.

    Args:
        half: store parameters as float16; buffers (running statistics) keep their type.

    Raises:
        ConfigError: a parameter is too large for float16.
        OSError: the disk is full or the folder cannot be written; a file that was there is still the old one.
    """
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if half and name in parameters:
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise ConfigError(f"{name} does not fit float16; save the model with half=False")
        tensors[name] = tensor
    metadata = {"format": FORMAT, "config": json.dumps(to_json(model.config))}
    write_atomically(Path(path), to_bytes(tensors, metadata))


def load(path: Path | str, *, policy: str | PolicyConfig | None = None, device: str | torch.device = "cpu") -> Model:
    """A trained model, in evaluation mode.

    Args:
        path: a file that `save` wrote, or the folder of a training run (its best model, else its last).
        policy: takes the place of the checkpoint's: a configuration, or a name for the default one of that name (the
            checkpoint's own where it has that name). Weights of the policy that is replaced are left out.

    Raises:
        ConfigError: no such file, not a sievit model, damaged, weights that do not fit, an unknown policy, or one that
            has to be trained and was not.
    """
    path = model_file(Path(path))
    config, tensors = read(path)
    if policy is not None:
        wanted = policy_config(policy) if isinstance(policy, str) else policy
        if not (isinstance(policy, str) and kind_of(config.policy) == policy):
            config = replace(config, policy=wanted)
    model = build(config)
    expected = model.state_dict()
    if policy is not None:
        dropped = {name for name in tensors if name.startswith(POLICY_PREFIXES) and name not in expected}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
        untrained = [n for n in expected if n.startswith(POLICY_PREFIXES) and n not in tensors]
        if untrained:
            raise ConfigError(
                f"{path}: has no weights for the policy {kind_of(config.policy)!r} (such as {untrained[0]}); "
                "train it first, starting from this checkpoint"
            )
    _check_fit(path, expected, tensors)
    model.load_state_dict(tensors)
    return model.eval().to(device)


def read(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the tensors, as stored, of a file that `save` wrote.

    Raises:
        ConfigError: no such file, not a sievit model, or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a .safetensors file or the folder of a training run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged, cut short, or not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ConfigError(f"{path}: a safetensors file, but not one that sievit wrote: it holds no model configuration")
    try:
        data = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: its model configuration is not JSON ({error})") from error
    if isinstance(data, dict):
        data = {"kind": "detector", **data}  # the first version knew only these, and did not say so
    return from_json(ModelConfig, data, where=f"{path}: model configuration"), tensors


def model_file(path: Path) -> Path:
    """The file that holds the model: itself, or the best or last one of a training run's folder."""
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"{path}: has neither best.safetensors nor last.safetensors; is it the folder of a training run?")


def _check_fit(path: Path, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise unless names and shapes are the same."""
    problems = [f"lacks {name}" for name in expected if name not in tensors]
    problems += [f"has {name}, which the model lacks" for name in tensors if name not in expected]
    problems += [
        f"has {name} of shape {tuple(tensors[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(f"{path}: the weights are of another model: it {'; it '.join(problems[:3])}{more}")
