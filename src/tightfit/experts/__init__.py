"""Experts of a mixture that stay on the disk, but for those that a cache holds. Importing this does not import torch.

Techniques are policies, which say what stays, and predictors, which say what will be wanted.
"""

from tightfit.experts.gate import Gate
from tightfit.experts.lfu import Lfu
from tightfit.experts.lru import Lru
from tightfit.experts.policy import Policy, Predictor, Ranking, Scheme, scheme
from tightfit.experts.score import Score
from tightfit.experts.static import Static

__all__ = ["Gate", "Lfu", "Lru", "Policy", "Predictor", "Ranking", "Scheme", "Score", "Static", "scheme"]
