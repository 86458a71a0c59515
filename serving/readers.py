"""The feature stores of all served versions, each opened once and ahead of its first request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, HybridError
from serving.merge import Reader, forward, probe
from serving.triton import Models

log = logging.getLogger(__name__)


class Readers:
    """By deployment; threads may share it.

    Args:
        open_reader: opens the feature store for a deployment; called once for each.
    """

    def __init__(self, open_reader: Callable[[Deployment], Reader]) -> None:
        self._open = open_reader
        self._opened: dict[tuple[str, int], Reader] = {}
        self._said: dict[tuple[str, int], str | None] = {}
        self._opening = threading.Lock()

    def of(self, deployment: Deployment) -> Reader:
        """The reader of a deployment.

        Raises:
            ConfigError: its view was not applied.
        """
        key = deployment.model, deployment.version
        with self._opening:
            if key not in self._opened:
                self._opened[key] = self._open(deployment)
            return self._opened[key]

    def open_all(self, deployments: Iterable[Deployment]) -> None:
        """Ahead of their first requests, which would wait for seconds; what cannot be opened is logged, once."""
        for deployment in deployments:
            said = None
            try:
                self.of(deployment)
            except Exception as error:
                said = f"cannot be predicted yet: {error if isinstance(error, ConfigError) else type(error).__name__}"
            key = deployment.model, deployment.version
            if said and said != self._said.get(key):
                log.error("model %s version %d %s", *key, said)
            self._said[key] = said

    def warm_up(self, deployments: Iterable[Deployment], models: Models, now_ms: int) -> None:
        """Opens them, and runs each stage once for each, for which a first request would wait."""
        deployments = list(deployments)
        self.open_all(deployments)
        for deployment in deployments:
            try:
                self.of(deployment).read([""], now_ms)
                forward(*probe(deployment), models)
            except Exception as error:
                # Of ours the text too: a store's can quote an entity.
                why = error if isinstance(error, HybridError) else type(error).__name__
                log.warning("model %s version %d could not be tried: %s", deployment.model, deployment.version, why)
