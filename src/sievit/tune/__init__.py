"""A trained model made fast on one device: what pays there is kept, what does not is left out."""

from sievit.tune.options import Goal, Tuning
from sievit.tune.report import table_of
from sievit.tune.run import tune

__all__ = ["Goal", "Tuning", "table_of", "tune"]
