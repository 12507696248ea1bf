"""Numbers for Prometheus. Labels are method names and fixed words, so their number is known beforehand."""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        make: dict[str, Any] = {"namespace": "agent_server", "registry": self._registry}
        self.connections = Gauge("connections", "Open network connections.", **make)
        self.sessions = Gauge("sessions", "WebSockets that have initialised.", **make)
        self.conversations = Gauge("conversations", "Conversations in memory.", **make)
        self.turns = Gauge("turns", "Agent turns that run.", **make)
        self.boxes = Gauge("boxes", "Boxes that run.", **make)
        self.calls = cache(Counter("calls", "Answered calls.", ["method", "outcome"], **make).labels)
        self.call_seconds = Histogram(
            "call_seconds", "Time to answer a call.", ["room"], buckets=SECONDS, **make
        )
        self.refused = Counter("refused", "Refused requests and connections.", ["kind"], **make)
        self.slow_readers = Counter("slow_readers", "Connections closed because they did not read.", **make)
        self.tasks = Gauge("tasks", "Tasks of the event loop.", **make)
        self.bugs = Counter("bugs", "Unexpected exceptions.", **make)

    def page(self) -> bytes:
        """Return the text format. Takes milliseconds: call it in a thread."""
        return generate_latest(self._registry)
