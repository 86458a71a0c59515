"""What is served now: the deployment files, read again when one changes."""

from __future__ import annotations

import logging
from pathlib import Path

from hybrid.deployment import Deployment, Window
from hybrid.errors import ConfigError, UnknownModel, UpdateRequired

log = logging.getLogger(__name__)


class Deployments:
    """The windows of a folder. A version that left its window is still found, for rows already on their way.

    Args:
        folder: holds one `<model>.json` per model.

    Raises:
        ConfigError: a file there is not a deployment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[tuple[str, int], Deployment] = {}
        self._stamp = self._stamps()
        self.take(Window.read_all(folder))
        if not self._windows:
            there = "holds no deployment" if folder.is_dir() else "does not exist"
            log.warning(
                "nothing is served: the deployments folder %r %s; `hybrid promote` writes it", str(folder), there
            )

    @property
    def current(self) -> list[Deployment]:
        """Every version that is served; of one model, the default first."""
        return [version for window in self._windows.values() for version in window.versions]

    def served(self, model: str, version: str | None = None) -> Deployment:
        """The deployment that answers for a model, by default that of its latest promotion.

        Raises:
            UnknownModel: there is none of that name, or never was in that version.
            UpdateRequired: the version is older than those that are served, or was halted.
        """
        window = self.window(model)
        if version is None:
            return window.default
        for deployment in window.versions:
            if version == str(deployment.version):
                return deployment
        served = self.versions(model)
        for halted in window.halted:
            if version == str(halted.version):
                raise UpdateRequired(f"version {version} of model {model!r} was taken back; update: fetch the bundle")
        if version.isascii() and version.isdecimal() and len(version) < 10 and 0 < int(version) < max(served):
            raise UpdateRequired(f"model {model!r} is served in versions {served}; fetch the bundle of {served[0]}")
        raise UnknownModel(f"model {model!r} is served in versions {served}, and has no version of that name")

    def window(self, model: str) -> Window:
        """What is served of a model, and what devices are to fetch of it.

        Raises:
            UnknownModel: there is none of that name.
        """
        window = self._windows.get(model)
        if window is None:
            raise UnknownModel(f"no model of that name is served; there are {sorted(self._windows)}")
        return window

    def versions(self, model: str) -> list[int]:
        """Of a model that is served, the default first."""
        return [deployment.version for deployment in self._windows[model].versions]

    def shadow(self, deployment: Deployment) -> tuple[Deployment, float] | None:
        """What runs beside this version, and on which share of its batches; None: nothing, or it is not the default."""
        window = self._windows.get(deployment.model)
        if window is None or window.shadow is None or deployment != window.default:
            return None
        found = next(one for one in window.versions if one.version == window.shadow.version)
        # What was promoted since may read other features: they would mean something else to the shadow.
        same = (found.server, found.request) == (deployment.server, deployment.request)
        return (found, window.shadow.share) if same else None

    def find(self, model: str, version: int) -> Deployment | None:
        """A deployment that is or was served since this process started."""
        return self._seen.get((model, version))

    def refresh(self) -> None:
        """Takes into service what changed in the folder."""
        if (windows := self.changed()) is not None:
            self.take(windows)

    def changed(self) -> dict[str, Window] | None:
        """The folder's windows, where a file changed since they were last read; None where none did, or one is bad."""
        try:
            stamp = self._stamps()
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            return Window.read_all(self._folder)
        except (ConfigError, OSError) as error:
            log.error("deployments stay as they were: %s", error)
            return None

    def take(self, windows: dict[str, Window]) -> None:
        """Serves these from now on."""
        self._windows = windows
        self._seen |= {(d.model, d.version): d for d in self.current}
        log.info("serving %s", {name: [d.version for d in window.versions] for name, window in windows.items()})

    def _stamps(self) -> set[tuple[str, int, int]]:
        files = [(file.name, file.stat()) for file in self._folder.glob("*.json")]
        return {(name, stat.st_mtime_ns, stat.st_ino) for name, stat in files}
