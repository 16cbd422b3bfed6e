"""The pruning lab: plans of trainings that are compared, run in one harness (`sievit ablate`)."""

from sievit.lab.plan import Plan, Variant, find_plan, known_plans, trained, with_weights
from sievit.lab.run import ablate
