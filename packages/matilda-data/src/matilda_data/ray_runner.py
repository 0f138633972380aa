"""Units on a Ray cluster: the same parts, encoded wherever there is a free core.

Every node must see the inputs and the output directory at the same paths (a shared file system).
A unit whose node dies is run again elsewhere; its half-written part was never named.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Generator, Sequence
from typing import Any

from matilda_data.errors import DataError
from matilda_data.inputs import Unit
from matilda_data.parts import PartRecord
from matilda_data.worker import EncodeSettings, record_of, reply_to

__all__ = ["run_units_on_ray"]

# Times that a unit is retried when its worker or node dies.
RETRIES = 10


def encode_remotely(settings: str, key: str, unit: str) -> dict[str, Any]:
    """One unit in a Ray worker; errors come back as data, not as exceptions."""
    decoded = Unit.from_json(json.loads(unit))
    return reply_to(decoded, key, EncodeSettings.from_json(settings))


def run_units_on_ray(
    work: Sequence[tuple[str, Unit]], settings: EncodeSettings, workers: int
) -> Generator[PartRecord, None, None]:
    """As `worker.run_units`, on the cluster that Ray finds (`RAY_ADDRESS`), or a local one.

    `workers` is not used: each unit takes one CPU of the cluster.

    Raises:
        DataError: Ray is not installed, or an input cannot be used.
        OSError: a full disk and the like.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise DataError(
            "runner 'ray' needs Ray; install it with: pip install 'matilda-data[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(encode_remotely)
    packed = settings.to_json()
    in_flight = max(2 * int(ray.cluster_resources().get("CPU", 1)), 2)
    waiting = iter(work)
    running: list[Any] = []
    try:
        while True:
            while len(running) < in_flight and (item := next(waiting, None)) is not None:
                key, unit = item
                running.append(remote.remote(packed, key, json.dumps(unit.to_json())))
            if not running:
                return
            done, running = ray.wait(running, num_returns=1)
            yield record_of(ray.get(done[0]))
    finally:
        for task in running:
            ray.cancel(task, force=True)
