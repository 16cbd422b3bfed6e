"""Models as a whole: built from a configuration, and kept in one file that holds it."""

from pathlib import Path
from typing import overload

import torch

from sievit.config import ConfigError
from sievit.hub.fetch import model_file
from sievit.hub.file import FORMAT, read, restored, write
from sievit.models.base import Model, model_class
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.exported import load_exported
from sievit.models.inputs import ModelConfig
from sievit.models.runtimes import SUFFIXES
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import PolicyConfig, PolicyOptions

__all__ = ["FORMAT", "Model", "build", "load", "model_file", "read", "save"]


@overload
def build(config: DetectorConfig) -> Detector: ...
@overload
def build(config: SegmenterConfig) -> Segmenter: ...
@overload
def build(config: ModelConfig) -> Model: ...
def build(config: ModelConfig) -> Model:
    """The model that `config` describes, with random weights."""
    return model_class(config).from_config(config)


def save(model: Model, path: Path | str, *, half: bool = False, int8: bool = False) -> None:
    """Write the model and its configuration as one safetensors file, whole or not at all.

    Args:
        half: store parameters as float16; buffers (running statistics) keep their type.
        int8: store large matrices in 8 bits, with a scale for each row, and the other parameters and the policy's as
            float16: a quarter of the size. They are restored to float32 when the file is read.

    Raises:
        ConfigError: a parameter is too large for float16.
        OSError: the disk is full or the folder cannot be written; a file that was there is still the old one.
    """
    write(model, model.config, Path(path), half=half, int8=int8)


def load(
    path: Path | str,
    *,
    policy: str | PolicyOptions | PolicyConfig | None = None,
    device: str | torch.device = "cpu",
    compile: bool = True,
) -> Model:
    """A trained model, in evaluation mode; one of `sievit tune` answers in the mode and precision that were found best.

    Args:
        path: a file that `save` or `sievit export` wrote; a folder that `save_pretrained` wrote, or of a training run
            (its best model, else its last); the name of a shipped model, such as "nuclei_svit"; or a model on the
            hub, hf:user/name or hf:user/name@revision.
        policy: takes the place of the checkpoint's: a configuration, a name, or a name and fields; of a policy of the
            checkpoint's kind the other fields stay as they are there. Weights of the policy that is replaced are left
            out, and the new one runs in the default mode.
        compile: False to run a model that was tuned to be compiled as it stands.

    Raises:
        ConfigError: no such file, not a sievit model, damaged, weights that do not fit, an unknown policy, or one that
            has to be trained and was not; a policy for an exported file.
    """
    if Path(path).suffix in SUFFIXES:
        if policy is not None and policy != PolicyOptions():
            raise ConfigError(f"{path}: runs with the policy that is in it; export the model with another one")
        return load_exported(Path(path))
    return restored(build, model_file(path), policy=policy, compile=compile).to(device)
