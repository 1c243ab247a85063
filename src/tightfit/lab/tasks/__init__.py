"""What the lab measures, one task in a file. Importing this does not import torch."""

from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, Values
from tightfit.lab.tasks.confidence import Confidence
from tightfit.lab.tasks.copy import Copy
from tightfit.lab.tasks.divergence import Divergence
from tightfit.lab.tasks.energy import Energy
from tightfit.lab.tasks.generation import Generation
from tightfit.lab.tasks.latency import Latency
from tightfit.lab.tasks.lookup import Lookup
from tightfit.lab.tasks.memory import Memory
from tightfit.lab.tasks.needle import Needle
from tightfit.lab.tasks.perplexity import Perplexity
from tightfit.lab.tasks.track import Track

__all__ = [
    "Confidence",
    "Copy",
    "Divergence",
    "Energy",
    "Generation",
    "Latency",
    "Lookup",
    "Memory",
    "Metric",
    "Needle",
    "Perplexity",
    "Reference",
    "Sample",
    "Task",
    "Track",
    "Values",
]
