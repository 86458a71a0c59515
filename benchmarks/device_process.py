"""A process of `benchmarks.device`: `python -m benchmarks.device_process CONTESTANT BUNDLE TRUST STARTED`.

Prints, as its last line, seconds from STARTED, Unix time, to the first inference, the CPU's, and the peak of memory.
"""

import json
import sys
import time
from pathlib import Path

from benchmarks.process import peak_mb


def main() -> None:
    """Does what one contestant does, and tells."""
    contestant, bundle, trust, started = sys.argv[1:]
    if contestant == "torch":
        import torch  # noqa: F401
    else:
        first_inference(Path(bundle), Path(trust), contestant)
    taken = {"seconds": time.time() - float(started), "cpu_s": time.process_time(), "peak_mb": peak_mb()}
    print(json.dumps(taken))


def first_inference(bundle: Path, trust: Path, engine: str) -> None:
    """A row of which nothing is known, embedded by a verified bundle's program."""
    from device_runtime.program import EmbedProgram, open_bundle

    opened = open_bundle(bundle, trust)
    program = EmbedProgram(opened, engine)  # type: ignore[arg-type]
    program.embed(program.inputs({name: [None] for name in opened.manifest.features.names}))


if __name__ == "__main__":
    main()
