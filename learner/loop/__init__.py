"""The learner's loop: what it does, and what it leaves to others while it trains."""

from learner.loop.context import LAST_ANSWER_SECONDS, Context
from learner.loop.learner import Learner

__all__ = ["LAST_ANSWER_SECONDS", "Context", "Learner"]
