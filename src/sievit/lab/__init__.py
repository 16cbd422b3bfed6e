"""The pruning lab: plans of trainings that are compared, run in one harness (`sievit ablate`)."""

from sievit.lab.plan import Plan, Variant, trained, with_weights
from sievit.lab.plans import PLANS, find_plan
from sievit.lab.run import ablate
