"""Hybrid Towers: models that join what a server knows with what only a device knows.

Importing this package loads no heavy library.
"""

from hybrid.features import Bucketize, Categorical, Hash, Log1p, Numeric
from hybrid.spec import (
    Clear,
    Drift,
    Entity,
    Funnel,
    HybridModel,
    Label,
    Noised,
    OnDevice,
    Privacy,
    Server,
    Serving,
    Training,
    View,
)

__all__ = [
    "Bucketize",
    "Categorical",
    "Clear",
    "Drift",
    "Entity",
    "Funnel",
    "Hash",
    "HybridModel",
    "Label",
    "Log1p",
    "Noised",
    "Numeric",
    "OnDevice",
    "Privacy",
    "Server",
    "Serving",
    "Training",
    "View",
]
