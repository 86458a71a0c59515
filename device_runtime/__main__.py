"""`python -m device_runtime`: devices in a process of their own."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import HybridError
from hybrid.tracing import from_environment

if TYPE_CHECKING:
    from device_runtime.program import Engine

API_KEY_VARIABLE = "HYBRID_API_KEY"


def main() -> None:
    """Runs one command; an error of ours is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m device_runtime", description="Runs devices' side of a model.")
    commands = parser.add_subparsers(required=True)
    infer = commands.add_parser(
        "infer",
        help="ask the gateway for a prediction of every stored row",
        description="Verifies the bundle, asks the gateway about each stored row, writes one result per row and prints "
        "a summary as JSON. Where the server merges, the row's embedding is sent as the model declares that a device "
        "releases it; where the device merges, nothing of the device is sent, and the prediction is made here. "
        "Where the gateway asks who is asking, it is shown the API key (or token) in --api-key-file, or else in the "
        "environment variable HYBRID_API_KEY. Exit status 1 if a request was not answered.",
    )
    infer.add_argument("--bundle", type=Path, required=True, help="the version's device bundle")
    infer.add_argument("--trust", type=Path, required=True, help="the host app's public key (PEM)")
    infer.add_argument("--store", type=Path, required=True, help="SQLite file with the devices' rows")
    infer.add_argument("--gateway", required=True, help="for example http://127.0.0.1:8080")
    infer.add_argument("--out", type=Path, required=True, help="Parquet file for the results; replaced")
    infer.add_argument("--devices", type=_range, default=None, metavar="A:B", help="only devices A to B - 1")
    infer.add_argument("--concurrency", type=int, default=32, help="requests in flight at once (default 32)")
    infer.add_argument(
        "--engine",
        choices=["executorch", "onnx"],
        default=None,
        help="what runs the bundle's programs (default ExecuTorch where it is installed with torch, else ONNX Runtime)",
    )
    infer.add_argument("--timeout", type=float, default=10.0, help="seconds for one attempt (default 10)")
    infer.add_argument(
        "--trace",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the requests that carry a trace context, random and new for each (default 0); "
        "their spans are exported where OTEL_EXPORTER_OTLP_ENDPOINT is set",
    )
    infer.add_argument(
        "--contribution",
        action="store_true",
        help="keep with each result the server's embedding; the model must declare serving.contribution. Where the "
        "device merges it is kept anyway",
    )
    infer.add_argument(
        "--api-key-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="holds the API key that the gateway asks for, on one line, readable by its owner alone (chmod 600)",
    )
    infer.set_defaults(run=_infer)
    arguments = vars(parser.parse_args())
    os.umask(0o077)  # results are the person's
    run = arguments.pop("run")
    try:
        summary = asyncio.run(run(**arguments))
        print(json.dumps(summary))
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if summary["answered"] < summary["requests"]:
        raise SystemExit(1)


async def _infer(
    *,
    bundle: Path,
    trust: Path,
    store: Path,
    gateway: str,
    out: Path,
    devices: range | None,
    concurrency: int,
    engine: Engine | None,
    timeout: float,
    trace: float,
    contribution: bool,
    api_key_file: Path | None,
) -> dict[str, Any]:
    from device_runtime.access import read_api_key
    from device_runtime.answers import Results
    from device_runtime.client import InferenceClient
    from device_runtime.program import open_bundle, program_of
    from device_runtime.store import read_rows

    # Never an argument: everyone on the machine reads those.
    api_key = read_api_key(api_key_file) if api_key_file else os.environ.get(API_KEY_VARIABLE) or None
    verified = open_bundle(bundle, trust)
    rows = read_rows(store, verified.manifest, devices=devices)
    program = program_of(verified, engine)
    with from_environment("hybrid-device") or nullcontext() as tracer:
        async with InferenceClient(
            verified.manifest,
            program,
            gateway,
            timeout_s=timeout,
            trace_share=trace,
            tracer=tracer,
            contribution=contribution,
            api_key=api_key,
        ) as client:
            with Results(out) as results:
                await client.run(rows, results.add, concurrency=concurrency)
    return results.summary()


def _range(text: str) -> range:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"must be A:B with 0 <= A < B, got {text!r}")
    return range(int(first), int(end))


if __name__ == "__main__":
    main()
