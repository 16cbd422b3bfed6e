"""A trained model made fast on one device: what pays there is kept, what does not is left out."""

from sievit.tune.options import Goal, Tuning
from sievit.tune.run import table_of, tune
