"""Tasks: what models are for. Importing this package registers them."""

from sievit.tasks import detection, segmentation
from sievit.tasks.base import DataConfig, Metric, Region, Task, Writer, register_task, task_of

__all__ = ["DataConfig", "Metric", "Task", "Writer", "detection", "register_task", "segmentation", "task_of"]
