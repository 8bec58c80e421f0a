"""The learner's loop, with its checkpoints, evaluations and reports."""

from learner.loop.context import LAST_ANSWER_SECONDS, Context
from learner.loop.learner import Learner

__all__ = ["LAST_ANSWER_SECONDS", "Context", "Learner"]
