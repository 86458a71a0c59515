"""Where a project keeps what it made: one folder, `.hybrid` beside the team's code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The folders of one project. Nothing is created until something is written.

    Attributes:
        root: `$HYBRID_HOME`, or `.hybrid` in the current folder.
    """

    root: Path

    @classmethod
    def current(cls) -> Workspace:
        """The workspace that commands use unless told otherwise."""
        return cls(Path(os.environ.get("HYBRID_HOME", ".hybrid")).resolve())

    @property
    def definitions(self) -> Path:
        """One folder per registered model: its definition.json."""
        return self.root / "definitions"

    @property
    def mlflow(self) -> Path:
        """MLflow's database and artifacts."""
        return self.root / "mlflow"

    @property
    def feast(self) -> Path:
        """Feast's registry, online and offline stores."""
        return self.root / "feast"

    @property
    def populations(self) -> Path:
        """One folder per imported population."""
        return self.root / "populations"

    @property
    def examples(self) -> Path:
        """Encoded rows too many for memory, one folder per population."""
        return self.root / "examples"

    @property
    def runs(self) -> Path:
        """One folder per training run, each with one ledger."""
        return self.root.parent / "runs"

    @property
    def triton(self) -> Path:
        """Triton's model repository."""
        return self.root / "triton"

    @property
    def bundles(self) -> Path:
        """Device bundles, `<model>-<version>.bundle`."""
        return self.root / "bundles"

    @property
    def deployments(self) -> Path:
        """What is served: `<model>.json`, one `Deployment` each."""
        return self.root / "deployments"

    @property
    def keys(self) -> Path:
        """The control plane's signing key (0600) and its public half."""
        return self.root / "keys"

    @property
    def request_log(self) -> Path:
        """Sampled requests of the local stack."""
        return self.root / "request-log"

    @property
    def stack(self) -> Path:
        """State and logs of the local stack."""
        return self.root / "stack"
