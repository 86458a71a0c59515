"""Feast, imported without what its import drags in: a third of the processor time, a quarter of the memory.

Feast 0.67 imports torch, where that is installed, for a way to read features as
tensors that nothing here takes; and has typeguard rewrite its classes, so that
they check the types of their arguments, which mypy and the contract tests of
this package do before anything runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

TORCH = "feast.torch_wrapper"


def import_feast() -> None:
    """Imports Feast, once; before anything else of this process does."""
    if "feast" in sys.modules:
        return
    import typeguard

    wrapper = ModuleType(TORCH)
    vars(wrapper)["get_torch"] = lambda: importlib.import_module("torch")
    sys.modules[TORCH] = wrapper
    checked = typeguard.typechecked
    typeguard.typechecked = _as_it_is
    try:
        importlib.import_module("feast")
    finally:
        typeguard.typechecked = checked


def _as_it_is(target: Any = None, **_: object) -> Any:
    """As `typeguard.typechecked`, with arguments or without, but changes nothing."""
    same: Callable[[Any], Any] = lambda given: given  # noqa: E731
    return same if target is None else target
