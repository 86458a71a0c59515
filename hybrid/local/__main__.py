"""`python -m hybrid.local install` downloads what the local stack runs.

`supervise` is the stack's own process; `aggregate` that of one aggregator of a local federation, `superexec` of what
starts Flower's apps there, and in a cluster; `supernode` that of a SuperNode in a cluster.
"""

from __future__ import annotations

import sys

from hybrid.errors import HybridError
from hybrid.local import kafka, triton
from hybrid.local.process import default_cache


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    try:
        match arguments:
            case ["install"]:
                kafka.install(default_cache())
                triton.install(default_cache())
            case ["supervise", settings]:
                from hybrid.local.stack import Settings, supervise

                return supervise(Settings.model_validate_json(settings))
            case ["aggregate", settings]:
                from pathlib import Path

                from hybrid.federation.parts import Part, aggregate

                aggregate(Part.read(Path(settings)))
            case ["superexec", *words]:
                from hybrid.local.superexec import superexec

                superexec(words)
            case ["supernode", *words]:
                from hybrid.local.supernode import supernode

                return supernode(words)
            case _:
                print("usage: python -m hybrid.local install", file=sys.stderr)
                return 2
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
