"""The laws that every eviction policy keeps, for policies of anybody: check_policy, and what it is made of.

It needs the extra `testing` (hypothesis, pytest). docs/policies.md shows it at work.
"""

from importlib.util import find_spec

if find_spec("hypothesis") is None:
    raise ModuleNotFoundError("restkv.testing needs hypothesis; pip install 'restkv[testing]'", name="hypothesis")

from restkv.testing.cases import Look, caches, fitted, observations, schedules
from restkv.testing.check import LAWS, LawBroken, Report, check_policy, replay
from restkv.testing.models import exact, small_ids, small_lm, small_model, tiny_lm
from restkv.testing.observed import observation, prepared
from restkv.testing.sessions import Job
from restkv.testing.watch import Watch, watched

__all__ = [
    "LAWS",
    "Job",
    "LawBroken",
    "Look",
    "Report",
    "Watch",
    "caches",
    "check_policy",
    "exact",
    "fitted",
    "observation",
    "observations",
    "prepared",
    "replay",
    "schedules",
    "small_ids",
    "small_lm",
    "small_model",
    "tiny_lm",
    "watched",
]
