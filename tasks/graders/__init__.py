"""Graders of reinforcement fine-tuning files, and functions of your own, as rewards: docs/graders.md."""

from agile.tasks.graders.grading import Function, Grading, make_sample
from agile.tasks.graders.models import Grader, load_grader, parse_grader
from agile.tasks.graders.result import Grade, GraderErrors
from agile.tasks.graders.sandbox import Limits

__all__ = [
    "Function",
    "Grade",
    "Grader",
    "GraderErrors",
    "Grading",
    "Limits",
    "load_grader",
    "make_sample",
    "parse_grader",
]
