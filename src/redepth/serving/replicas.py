"""The same server several times over, under Ray Serve: on this machine, or on a Ray cluster.

`redepth serve OUT --replicas 2` calls `run`; `serve run redepth.serving.replicas:app checkpoint=OUT` and Serve's
configuration files call `app`.
"""

import logging
import os
import queue
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve

from redepth.checkpoint.load import load_tokenizer, read_config
from redepth.errors import RedepthError
from redepth.runtime import choose_device

from .app import create_app
from .limits import DRAIN_SECONDS, MAX_ROWS, MAX_TOKENS, Limits
from .served import Served, usual_name
from .sockets import address

logger = logging.getLogger(__name__)
APP = "redepth"
LOGS = "/tmp/ray/session_latest/logs/serve"
OWN = "redepth.errors.RedepthError: "
QUIETLY = {"log_level": "WARNING"}


class Replicas(BaseModel, extra="forbid"):
    """What to serve and how often; `redepth.serve` says what each means.

    Attributes:
        checkpoint: found at the same place by every machine of the cluster.
        device: `auto` looks for a GPU where the application is built.
    """

    checkpoint: str
    replicas: int = Field(2, ge=1)
    name: str | None = None
    api_key: str | None = Field(default_factory=lambda: os.environ.get("REDEPTH_API_KEY"))
    max_rows: int = Field(MAX_ROWS, ge=1)
    max_tokens: int = Field(MAX_TOKENS, ge=1)
    drain_seconds: float = DRAIN_SECONDS
    dtype: str = "auto"
    device: str = "auto"
    limits: Limits = Limits()


def app(asked: Replicas) -> serve.Application:
    """The application that Ray Serve runs: `replicas` processes, each with a model, an engine and the server's app.

    Raises:
        RedepthError: for a checkpoint without a tokenizer or without a depth, and a device that is not there.
    """
    folder = Path(asked.checkpoint).expanduser()
    checkpoint = str(folder.resolve()) if folder.is_dir() else asked.checkpoint
    load_tokenizer(checkpoint), read_config(checkpoint)  # a mistake is told here, and not by every replica again
    device = choose_device(asked.device).type
    name = asked.name or usual_name(checkpoint)

    def build() -> FastAPI:
        room = {"max_rows": asked.max_rows, "max_tokens": asked.max_tokens}
        served = Served.load(checkpoint, asked.limits, name=name, **room, dtype=asked.dtype, device=device)
        return create_app(served, asked.api_key)

    @serve.deployment(
        name=APP,
        num_replicas=asked.replicas,
        # Enough for the replica to be the one that refuses what is too much, in the protocol's form.
        max_ongoing_requests=2 * (asked.max_rows + asked.limits.queue),
        ray_actor_options={"num_cpus": cpus_each(asked.replicas), "num_gpus": int(device == "cuda")},
        graceful_shutdown_timeout_s=asked.drain_seconds,
        health_check_period_s=2,
        max_constructor_retry_count=1,
    )
    @serve.ingress(build)
    class Replica:
        app: Any  # what `build` made

        def check_health(self) -> None:
            """Ray Serve starts another in the place of one that raises."""
            if not self.app.state.runner.is_alive:
                raise RuntimeError("the engine has failed")

    deployment: Any = Replica  # which the decorators have made of it
    return deployment.bind()


def cpus_each(replicas: int) -> int:
    """The cores of each replica where all of them are on one machine like this."""
    return max(1, (os.cpu_count() or 1) // replicas)


def run(asked: Replicas, taken: socket.socket, on_start: Callable[[str, str], Any]) -> None:
    """Serve until SIGTERM or Ctrl-C; SIGHUP starts the replicas anew, one after another.

    Ray is started here, or found where the variable `RAY_ADDRESS` says.

    Args:
        taken: where to listen; closed, and its address left to Ray Serve's proxy.
        on_start: called with (model's name, address) when requests are taken.
    """
    (host, port), where = taken.getsockname()[:2], address(taken)
    application = app(asked)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: behind everything else that the machine does
    cluster = os.environ.get("RAY_ADDRESS", "local")
    cores = asked.replicas * cpus_each(asked.replicas)
    own: Any = {"num_cpus": cores, "include_dashboard": False} if cluster == "local" else {}
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    ray.init(cluster, logging_level="warning", log_to_driver=False, **own)
    logging.getLogger("ray.serve").setLevel("WARNING")
    try:
        taken.close()
        serve.start(http_options={"host": host, "port": port}, logging_config=QUIETLY)
        deploy(application)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: told.put(number))
        on_start(asked.name or usual_name(asked.checkpoint), where)
        while told.get() == signal.SIGHUP:
            try:
                deploy(application)
            except RedepthError as error:
                logger.error("%s; those that run go on", error)
        serve.delete(APP)  # waits for the answers under way; others' applications on the cluster stay
    finally:
        ray.shutdown()


def deploy(application: serve.Application) -> None:
    """Have the replicas run, those that ran before replaced one after another.

    Raises:
        RedepthError: where one can't start.
    """
    try:
        serve.run(application, name=APP, logging_config=QUIETLY)
    except RuntimeError:
        said = serve.status().applications[APP].deployments[APP].message.strip().rpartition("\n")[2]
        raise RedepthError(f"the replicas could not start: {said.removeprefix(OWN)}; see {LOGS}") from None
