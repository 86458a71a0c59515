"""What is served now: the deployment files, read again when one changes."""

from __future__ import annotations

import logging
from pathlib import Path

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, UnknownModel

log = logging.getLogger(__name__)


class Deployments:
    """The deployments of a folder. A version that was replaced is still found, for rows already on their way.

    Args:
        folder: holds one `<model>.json` per model.

    Raises:
        ConfigError: a file there is not a deployment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[tuple[str, int], Deployment] = {}
        self._stamp = self._stamps()
        self._take(Deployment.read_all(folder))

    @property
    def current(self) -> dict[str, Deployment]:
        """By model."""
        return self._current

    def served(self, model: str, version: str | None = None) -> Deployment:
        """The deployment that answers for a model.

        Raises:
            UnknownModel: there is none, or not in that version.
        """
        found = self._current.get(model)
        if found is None:
            raise UnknownModel(f"no model of that name is served; there are {sorted(self._current)}")
        if version is not None and version != str(found.version):
            raise UnknownModel(f"model {model!r} is served in version {found.version} only")
        return found

    def find(self, model: str, version: int) -> Deployment | None:
        """A deployment that is or was served since this process started."""
        return self._seen.get((model, version))

    def refresh(self) -> None:
        """Reads the folder again if a file changed; one that cannot be read leaves all as it was."""
        try:
            stamp = self._stamps()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._take(Deployment.read_all(self._folder))
        except (ConfigError, OSError) as error:
            log.error("deployments stay as they were: %s", error)

    def _take(self, current: dict[str, Deployment]) -> None:
        self._current = current
        self._seen |= {(d.model, d.version): d for d in current.values()}
        log.info("serving %s", {d.model: d.version for d in current.values()})

    def _stamps(self) -> set[tuple[str, int, int]]:
        files = [(file.name, file.stat()) for file in self._folder.glob("*.json")]
        return {(name, stat.st_mtime_ns, stat.st_ino) for name, stat in files}
