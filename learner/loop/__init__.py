"""The learner's loop: what it does, and what it leaves to others while it trains."""

from learner.loop.context import Parts
from learner.loop.learner import Learner
from learner.loop.stop_deadline import LAST_ANSWER_SECONDS

__all__ = ["LAST_ANSWER_SECONDS", "Learner", "Parts"]
