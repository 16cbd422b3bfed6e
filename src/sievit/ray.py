"""A model on Ray Data: jobs that outgrow a machine.

Nothing here imports Ray: `Predictor` is what `map_batches` wants of a class, and runs without it too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sievit.config import ConfigError, Count, check_range
from sievit.data.images import read_image
from sievit.devices import pick_device
from sievit.models.build import load
from sievit.models.inputs import as_tensor
from sievit.policies import PolicyConfig, PolicyOptions
from sievit.report.job import answers, similar
from sievit.tasks import task_of

COLUMNS = ("image", "bytes", "path")
"""Where images are, in the order of preference, as `ray.data.read_images` and `read_binary_files` call them."""


class Predictor:
    """Rows with images in, rows with what was found in them out; for `map_batches` with an `ActorPoolStrategy`.

    The columns of pixels are left out, others stay. New ones are `height` and `width` of the image, `error`, which says
    what is wrong with an image that cannot be used and is empty else, and those of the model's task: of a detector
    `boxes` (d, 4) xyxy pixels, `labels` (d,) from 1, `scores` (d,), and `masks`, a JSON list of COCO's compressed RLE;
    of a segmenter `label_map`, a PNG whose values are classes.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        policy: str | PolicyOptions | PolicyConfig | None = None,
        column: str | None = None,
        batch_size: Count = 1,
        device: str = "auto",
    ) -> None:
        """
        Args:
            model: as in `sievit.load`; a file has to be there on every machine.
            policy: another policy, as in `sievit.load`.
            column: of the images: arrays (h, w, 3) or (h, w) of uint8, the bytes of image files, or paths; by default
                the first of `image`, `bytes` and `path` that there is.
            batch_size: images of similar size, of those that Ray hands over together, that go through the network
                together.
            device: cpu, cuda or auto; Ray shows each actor the GPUs that are its own.

        Raises:
            ConfigError: no such model, policy or device.
        """
        check_range(Count, batch_size, "batch_size")
        self.model = load(model, policy=policy, device=pick_device(device))
        self.column, self.batch_size, self.task = column, batch_size, task_of(self.model.config)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """
        Raises:
            ConfigError: the batch has no images.
        """
        column = self.column or next((name for name in COLUMNS if name in batch), COLUMNS[0])
        if column not in batch:
            raise ConfigError(f"column {column!r}: there are {', '.join(batch)}; name that of the images, column=NAME")
        values, names = batch[column], batch.get("path")
        images, errors = dict[int, Tensor](), dict[int, str]()
        for index in range(len(values)):
            name = f"image {index} of the batch" if names is None else str(names[index])
            try:
                images[index] = _tensor(values[index], name)
            except ConfigError as error:
                errors[index] = str(error)
        results = dict[int, Any]()
        sizes = {index: (image.shape[1], image.shape[2]) for index, image in images.items()}
        for indices in similar(sizes, self.batch_size, self.model.config.input):
            for index, found in zip(indices, answers(self.model, [images[index] for index in indices]), strict=True):
                if isinstance(found, ConfigError):
                    errors[index] = str(found)
                else:
                    results[index] = found[0].results[found[1]]
        rows = []
        for index in range(len(values)):
            height, width = sizes.get(index, (0, 0))
            row = {"height": height, "width": width, "error": errors.get(index, "")}
            rows.append({**row, **self.task.columns(results.get(index))})
        kept = {name: values for name, values in batch.items() if name == "path" or name not in {column, *COLUMNS}}
        return {**kept, **{name: _column([row[name] for row in rows]) for name in (rows[0] if rows else ())}}


def _tensor(value: Any, name: str) -> Tensor:
    """An image, (3, h, w)."""
    try:
        if isinstance(value, bytes):
            return as_tensor(read_image(Path(name), data=value))
        return as_tensor(value.copy() if isinstance(value, np.ndarray) else value)  # Ray's may not be written to
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error


def _column(values: Sequence[Any]) -> np.ndarray:
    """(rows,): numbers, or objects of any length each."""
    if all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64)
    column = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column
