"""From the name of a model to the file that holds it."""

import os
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sievit.config import ConfigError, nearest
from sievit.hub.file import CONFIG_FILE, MODEL_FILE

HUB = "hf:"
"""How the name of a model on the hub begins where a path could stand: hf:user/name, or hf:user/name@revision."""
REPOSITORY = Path(__file__).parents[3]
"""The root of the repository, where the package runs from a checkout."""


def shipped() -> dict[str, Path]:
    """The files of the models that come with the repository, by name. A wheel holds none.

    They lie in the folder that the environment variable SIEVIT_MODELS names; by default in models/ of the repository,
    or of the working directory.
    """
    given = os.environ.get("SIEVIT_MODELS")
    folders = [Path(given)] if given else [Path("models"), REPOSITORY / "models"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.safetensors"))}


def model_file(path: Path | str) -> Path:
    """The file of a model.

    Args:
        path: the file; a folder that `save_pretrained` wrote; the folder of a training run (its best model, else its
            last); a name in `shipped`; or hf:user/name, which is fetched from the hub unless it is in the cache.

    Raises:
        ConfigError: nothing of that name, a folder without a model, or a model on the hub that cannot be fetched.
    """
    if str(path).startswith(HUB):
        return fetched(str(path))
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        models = shipped()
        if str(path) not in models:
            hint = nearest(str(path), models) if models else ""
            raise ConfigError(f"{path}: no such file or folder, and no model in models/ has that name{hint}")
        return models[str(path)]
    for name in (MODEL_FILE, "best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ConfigError(
        f"{path}: has neither {MODEL_FILE} nor best.safetensors nor last.safetensors; "
        "is it a published model or the folder of a training run?"
    )


class HubOptions(TypedDict, total=False):
    """Arguments of huggingface_hub's `snapshot_download`."""

    revision: str | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    token: str | bool | None


def fetched(repo_id: str, **options: Unpack[HubOptions]) -> Path:
    """The model file of a repository on the hub (user/name, hf:user/name or hf:user/name@revision), in the local cache.

    Raises:
        ConfigError: no such repository or revision, no access, no connection, or no model of sievit in it.
    """
    revision = options.get("revision")
    if repo_id.startswith(HUB):
        repo_id, _, named = repo_id.removeprefix(HUB).partition("@")
        revision = revision or named or None
    name = f"{HUB}{repo_id}" if revision is None else f"{HUB}{repo_id}@{revision}"
    options["revision"] = revision
    try:
        files = [MODEL_FILE, CONFIG_FILE]
        folder = snapshot_download(repo_id, library_name="sievit", allow_patterns=files, **options)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is neither a folder here nor the id of a model on the hub: {error}") from error
    except LocalEntryNotFoundError as error:
        reason = "local_files_only is set" if options.get("local_files_only") else "the hub cannot be reached"
        raise ConfigError(f"{name}: not in the local cache, and {reason} ({error})") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"{name}: cannot be fetched from the hub ({error})") from error
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise ConfigError(f"{name}: has no {MODEL_FILE}; is it a model of sievit?")
    return path
