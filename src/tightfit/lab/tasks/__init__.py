"""What the lab measures. Importing this does not import torch."""

from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, Values

__all__ = ["Metric", "Reference", "Sample", "Task", "Values"]
