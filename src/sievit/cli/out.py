"""Files that commands write."""

from pathlib import Path

from sievit.config import ConfigError


def require_free(out: Path, *, force: bool) -> None:
    """Raise if a command would write over the file `out` without being told to.

    Raises:
        ConfigError: it is there, or is a folder.
    """
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; --out is the .safetensors file to write")
    if out.exists() and not force:
        raise ConfigError(f"{out}: is there already; give another --out, or --force True to write over it")
