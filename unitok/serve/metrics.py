"""Figures for Prometheus: one registry per application."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unitok.serve.jobs import Job


class Metrics:
    """Counters of requests, and what the model's thread does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one = {"registry": self.registry, "namespace": "unitok"}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **one)
        self.seconds = Histogram("request_seconds", "From a request's head to the end of its answer.", ["path"], **one)
        self.refused = Counter("refused", "Requests refused because the queue was full.", **one)
        self.timeouts = Counter("timeouts", "Requests that were not answered in time.", **one)
        self.cancelled = Counter("cancelled", "Requests left before their end: by the client or by a time-out.", **one)
        self.tokens = Counter("tokens", "Ids of text read and written, and positions of pictures.", ["kind"], **one)
        self.images = Counter("images", "Pictures drawn.", **one)
        self.waiting = Gauge("waiting", "Requests in the queue.", **one)
        self.running = Gauge("running", "Requests in the model.", **one)
        self.batch_size = Histogram(
            "batch_size", "Requests that went through the model together.", buckets=(1, 2, 4, 8, 16, 32, 64), **one
        )
        self.batch_seconds = Histogram("batch_seconds", "Time of one batch in the model.", ["kind"], **one)
        self._per_request = 1.0  # seconds, smoothed

    @contextmanager
    def batch(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Measures one batch."""
        start = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - start
            self.batch_size.observe(len(jobs))
            self.batch_seconds.labels(type(jobs[0]).__name__.removesuffix("Job").lower()).observe(took)
            self._per_request += 0.2 * (took / len(jobs) - self._per_request)

    def retry_after(self, waiting: int) -> int:
        """Seconds after which a refused client should come again: about half the queue is then done."""
        return min(60, max(1, math.ceil(self._per_request * waiting / 2)))

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)
