"""What Prometheus reads at /metrics."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .runner import Runner

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class EngineState:
    """A collector that asks the engine when it is read."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def collect(self) -> Iterator[Metric]:
        engine = self.runner.engine
        gauges = {
            "redepth_requests_waiting": (engine.waiting, "Requests that wait for a row."),
            "redepth_rows_running": (engine.rows, "Requests whose tokens are in the loop."),
            "redepth_rows_limit": (engine.max_rows, "Rows that the engine has."),
            "redepth_pool_tokens": (engine.pool_tokens, "Room in use in the pool of keys and values, in tokens."),
            "redepth_pool_limit_tokens": (engine.max_tokens, "Room in the pool, in tokens."),
        }
        for name, (value, says) in gauges.items():
            yield GaugeMetricFamily(name, says, value=value)
        counters = {
            "redepth_steps": (
                engine.steps_done,
                "Steps of the core, each token's counted; its rate is steps a second.",
            ),
            "redepth_tokens": (engine.tokens_done, "New tokens; its rate is tokens a second."),
            "redepth_faults": (self.runner.faults, "Ticks that failed."),
        }
        for name, (value, says) in counters.items():
            yield CounterMetricFamily(name, says, value=value)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, runner: Runner) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineState(runner))
        kept: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("redepth_answers", "Requests by what became of them.", ["route", "outcome"], **kept)
        self.steps_per_token = Histogram(
            "redepth_steps_per_token", "Steps that a new token took.", buckets=STEPS, **kept
        )
        self.first_token = Histogram(
            "redepth_first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS, **kept
        )
        self.between_tokens = Histogram(
            "redepth_between_tokens_seconds", "Between the tokens of one answer.", buckets=SECONDS, **kept
        )

    def page(self) -> bytes:
        return generate_latest(self.registry)


class Watch:
    """The times of one request's tokens, by answer."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.arrived = time.perf_counter()
        self.last: dict[int, float] = {}

    def see(self, number: int, tokens: Any) -> None:
        """Tokens of an answer that came together; they share the time since the one before them."""
        if not tokens:
            return
        now = time.perf_counter()
        before = self.last.get(number)
        if before is None:
            self.metrics.first_token.observe(now - self.arrived)
        else:
            for _ in tokens:
                self.metrics.between_tokens.observe((now - before) / len(tokens))
        self.last[number] = now
        for token in tokens:
            self.metrics.steps_per_token.observe(token.steps)
