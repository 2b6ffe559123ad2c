"""What Prometheus reads of a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)


class Metrics:
    """Counters of one server.

    Args:
        queue_length: Questions that wait for an expert now.
        accuracy: Share of reviewed answers that are right: of all of them, and of those that were drawn at random.
    """

    def __init__(self, queue_length: Callable[[], float], accuracy: Mapping[str, Callable[[], float]]) -> None:
        self._registry = registry = CollectorRegistry()
        self.questions = Counter("agile_questions", "Questions asked of the agent.", registry=registry)
        self.failed = Counter("agile_questions_failed", "Questions that came to no answer.", registry=registry)
        self.seconds = Histogram(
            "agile_answer_seconds", "From a question to its answer.", buckets=_SECONDS, registry=registry
        )
        self.asked = Counter("agile_advice_asked", "Times the agent asked for advice.", registry=registry)
        self.advised = Counter(
            "agile_advice", "Requests for advice that were settled, by how.", ["status"], registry=registry
        )
        self.waited = Histogram(
            "agile_advice_seconds", "From asking an expert to the answer.", buckets=_SECONDS, registry=registry
        )
        self.tokens = Counter("agile_tokens", "Tokens of finished sessions, read and written.", registry=registry)
        waiting = Gauge("agile_queue_length", "Questions that wait for an expert now.", registry=registry)
        waiting.set_function(queue_length)
        self.webhooks = Counter(
            "agile_webhooks", "Tries to tell an answer, by what the webhook is then.", ["state"], registry=registry
        )
        self.reviews = Counter(
            "agile_reviews", "Reviews of the agent's own answers, by verdict.", ["verdict"], registry=registry
        )
        right = Gauge(
            "agile_review_accuracy",
            "Share of the agent's own answers that reviews call right, of all reviewed and of a random sample.",
            ["answers"],
            registry=registry,
        )
        for answers, share in accuracy.items():
            right.labels(answers).set_function(share)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
