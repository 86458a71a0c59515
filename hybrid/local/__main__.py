"""`python -m hybrid.local install`: downloads what the local stack runs."""

from __future__ import annotations

import sys

from hybrid.errors import HybridError
from hybrid.local import kafka, triton
from hybrid.local.process import default_cache


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if arguments != ["install"]:
        print("usage: python -m hybrid.local install", file=sys.stderr)
        return 2
    try:
        for server in (kafka, triton):
            server.install(default_cache())
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
