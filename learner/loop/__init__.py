"""The learner's loop: what it does, and what it leaves to others while it trains."""

from learner.loop.answers import LAST_ANSWER_SECONDS
from learner.loop.learner import Learner
from learner.loop.parts import Parts

__all__ = ["LAST_ANSWER_SECONDS", "Learner", "Parts"]
