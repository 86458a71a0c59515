"""`python -m device_runtime`: devices in a process of their own."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import BundleError, ConfigError, HybridError
from hybrid.tracing import from_environment

if TYPE_CHECKING:
    from device_runtime.answers import Answer
    from device_runtime.bundles import Installed
    from device_runtime.credentials import Credentials
    from device_runtime.host import Host
    from device_runtime.journal import Journal
    from device_runtime.program import Engine
    from device_runtime.shadow import Shadow
    from device_runtime.store import Store
    from hybrid.bundle import Bundle, Manifest
    from hybrid.trust import Trusted

API_KEY_VARIABLE = "HYBRID_API_KEY"


def main() -> None:
    """Runs one command; an error of ours is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m device_runtime", description="Runs devices' side of a model.")
    commands = parser.add_subparsers(required=True)
    _add_infer(commands)
    _add_train(commands)
    _add_report(commands)
    _add_update(commands)
    _add_forget(commands)
    _add_export(commands)
    arguments = vars(parser.parse_args())
    os.umask(0o077)  # results are the person's
    run = arguments.pop("run")
    try:
        summary = asyncio.run(run(**arguments))
        print(json.dumps(summary))
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    short = summary.get("answered", 0) < summary.get("requests", 0)
    if short or summary.get("outcome") in {"refused", "interrupted"}:
        raise SystemExit(1)


def _add_infer(commands: Any) -> None:
    infer = commands.add_parser(
        "infer",
        help="ask the gateway for a prediction of every stored row",
        description="Verifies the bundle, asks the gateway about each stored row, writes one result per row and prints "
        "a summary as JSON. The store keeps of each answer what the server side contributed, and the prediction. "
        "Where the server merges, the row's embedding is sent as the model declares that a device releases it; where "
        "the device merges, nothing of the device is sent, and the prediction is made here. "
        "Where the gateway asks who is asking, it is shown the API key (or token) in --api-key-file, or else in the "
        "environment variable HYBRID_API_KEY. Exit status 1 if a request was not answered.",
    )
    infer.add_argument("--bundle", type=Path, required=True, help="the version's device bundle")
    infer.add_argument("--trust", type=Path, required=True, help="the host app's public key (PEM)")
    _add_store(infer)
    infer.add_argument("--gateway", required=True, help="for example http://127.0.0.1:8080")
    infer.add_argument("--out", type=Path, required=True, help="Parquet file for the results; replaced")
    infer.add_argument("--devices", type=_range, default=None, metavar="A:B", help="only devices A to B - 1")
    infer.add_argument("--concurrency", type=int, default=32, help="requests in flight at once (default 32)")
    infer.add_argument(
        "--shadow",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="of `update --shadow`: once a row is answered, ask about it a second time with the shadow that lies "
        "there, if one does, and throw the answer away: the server counts it. Where the server merges, a second "
        "embedding of the row is released",
    )
    _add_engine(infer, "what runs the bundle's programs (default ExecuTorch where it is there with torch, else ONNX)")
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
        help="keep with each result, and in the store, what the server contributed: its embedding or, where devices "
        "train the server tower too, its slots; the model must declare serving.contribution. Where the device merges "
        "the embedding is kept anyway",
    )
    _add_api_key_file(infer)
    infer.set_defaults(run=_infer)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="take part in training or answer a query, once, where the device may",
        description="Sends the update that waits in the store; or else asks the aggregator for a plan, and where it is "
        "signed by --trust, for this bundle, and every condition holds, trains on the store's examples, or counts what "
        "a query asks, and sends one clipped vector. Prints how each device's session ended as JSON; not to take part "
        "is no error.",
    )
    which = train.add_mutually_exclusive_group(required=True)
    which.add_argument("--bundle", type=Path, help="the version's device bundle")
    which.add_argument("--folder", type=Path, help="of installed bundles, of which the current one is taken")
    train.add_argument("--model", default=None, help="whose bundles --folder holds")
    train.add_argument("--trust", type=Path, required=True, help="the host app's public key (PEM)")
    _add_store(train)
    _add_session(train)
    train.add_argument(
        "--policy",
        type=Path,
        default=None,
        metavar="FILE",
        help="the app's own conditions, beside the plan's: a JSON object with fields of hybrid.plan.Policy, such as "
        '{"idle": false, "battery": 0.5}; those left out are strict',
    )
    train.set_defaults(run=_train)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="tell how far the device came last week, once, if the person agrees",
        description="Sends the report that waits in the store; or else, at a time of the week that each device draws, "
        "asks the aggregator for a signed query about last week's journals, and sends one vector: how far the device "
        "came with its newest version, and why no further. It needs no bundle, no charger and no idle device; it is no "
        "participation in training. Prints how each device's session ended as JSON.",
    )
    report.add_argument("--trust", type=Path, required=True, help="the host app's public key (PEM)")
    _add_store(report)
    _add_session(report)
    report.add_argument(
        "--policy",
        type=Path,
        default=None,
        metavar="FILE",
        help="the app's own conditions for it, as in train (default: consent alone)",
    )
    report.add_argument(
        "--spread-s",
        type=float,
        default=None,
        metavar="S",
        help="seconds from the beginning of a week, in which devices draw their time (default: six days)",
    )
    report.set_defaults(run=_report)


def _add_session(command: argparse.ArgumentParser) -> None:
    """What a session needs, whatever it is for."""
    command.add_argument("--aggregator", required=True, help="for example https://aggregator.example")
    command.add_argument(
        "--consent",
        type=Path,
        required=True,
        metavar="FILE",
        help="exists as long as the person agrees to take part; looked for before anything is sent, and while training",
    )
    command.add_argument(
        "--issuer",
        default=None,
        metavar="URL",
        help="of the tokens that plans may ask for; it is shown the account's key, the aggregator is not. Without it "
        "the device takes part in no plan that asks for one",
    )
    command.add_argument(
        "--issuer-name", default=None, metavar="NAME", help="as plans have it (default: --issuer's host)"
    )
    _add_api_key_file(command, "issuer")
    command.add_argument(
        "--readings",
        type=Path,
        default=None,
        metavar="FILE",
        help="what to take for the machine's state in place of its own: a JSON list of objects with fields of "
        "device_runtime.eligibility.Readings, one reading after another",
    )
    command.add_argument(
        "--devices", type=_range, default=range(1), metavar="A:B", help="devices A to B - 1 of the store, in turn (0:1)"
    )


def _add_update(commands: Any) -> None:
    update = commands.add_parser(
        "update",
        help="install the bundle that the gateway has",
        description="Asks the gateway for the model's bundle, fetches of it what is not here, verifies it, tries its "
        "programs, and makes it the current one; the one before it is kept. Prints as JSON what became of it "
        "('installed', 'unchanged', 'refused', 'interrupted'), the version that is installed now, the bytes received, "
        "and why. Where it is refused or interrupted the old one goes on, what came is kept for the next attempt, and "
        "the exit status is 1. With --shadow a version that is tried beside it, for nobody, may be fetched too.",
    )
    update.add_argument("--folder", type=Path, required=True, help="of the model's installed bundles; made if absent")
    update.add_argument("--model", required=True, help="whose bundle")
    update.add_argument("--trust", type=Path, required=True, help="the host app's public key (PEM)")
    update.add_argument("--gateway", required=True, help="for example http://127.0.0.1:8080")
    update.add_argument("--timeout", type=float, default=10.0, help="seconds for each wait on the network (default 10)")
    _add_engine(update, "in which a new bundle's programs are tried (default: in each that is installed)")
    update.add_argument("--store", type=Path, default=None, help="encrypted SQLite file that knows of halted versions")
    update.add_argument(
        "--consent",
        type=Path,
        default=None,
        metavar="FILE",
        help="exists as long as the person agrees that the store's journal says what became of it",
    )
    update.add_argument(
        "--shadow",
        action="store_true",
        help="let the gateway try a shadow here: if this device's number is below its share, it is installed below "
        "--folder, for `infer --shadow`. Without it none is, and one that is there is removed",
    )
    _add_key_file(update)
    _add_api_key_file(update)
    update.set_defaults(run=_update)


def _add_forget(commands: Any) -> None:
    forget = commands.add_parser(
        "forget",
        help="delete from the devices' store, for good",
        description="Deletes everything of all devices or of one, or events about one entity, with the updates that "
        "were not sent yet, and prints how many events as JSON. It works where the disk is full, too.",
    )
    _add_store(forget)
    what = forget.add_mutually_exclusive_group(required=True)
    what.add_argument("--everything", action="store_true", help="of --device, or of all")
    what.add_argument("--entity", default=None, help="only events about this one")
    forget.add_argument("--device", type=int, default=None, help="only this device's; all where it is left out")
    forget.set_defaults(run=_forget)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write everything that is kept of a person, readable",
        description="Writes all that the store holds as JSON, one object a line: events with their raw features, what "
        "the server side contributed, predictions and labels; participations in training; updates that wait. The "
        "file is not encrypted.",
    )
    _add_store(export)
    export.add_argument("--out", type=Path, required=True, help="JSON lines, readable by their owner only; replaced")
    export.add_argument("--device", type=int, default=None, help="only this device's; all where it is left out")
    export.set_defaults(run=_export)


def _add_store(command: argparse.ArgumentParser) -> None:
    command.add_argument("--store", type=Path, required=True, help="encrypted SQLite file with the devices' rows")
    _add_key_file(command)


def _add_key_file(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--key-file",
        type=Path,
        default=None,
        metavar="FILE",
        help="holds the store's key, 64 hex digits, readable by its owner alone (chmod 600); else it must be in the "
        "environment variable HYBRID_STORE_KEY",
    )


def _add_api_key_file(command: argparse.ArgumentParser, who: str = "gateway") -> None:
    command.add_argument(
        "--api-key-file",
        type=Path,
        default=None,
        metavar="FILE",
        help=f"holds the API key that the {who} asks for, on one line, readable by its owner alone (chmod 600); else "
        f"it may be in the environment variable {API_KEY_VARIABLE}",
    )


def _add_engine(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--engine", choices=["executorch", "onnx"], default=None, help=what)


async def _infer(
    *,
    bundle: Path,
    trust: Path,
    store: Path,
    key_file: Path | None,
    gateway: str,
    out: Path,
    devices: range | None,
    concurrency: int,
    shadow: Path | None,
    engine: Engine | None,
    timeout: float,
    trace: float,
    contribution: bool,
    api_key_file: Path | None,
) -> dict[str, Any]:
    from device_runtime.answers import Results
    from device_runtime.bundles import Installed
    from device_runtime.client import InferenceClient
    from device_runtime.program import open_bundle, program_of
    from device_runtime.recording import Recording
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store
    from hybrid.bundle import trusted_key

    api_key = _api_key(api_key_file)
    verified = open_bundle(bundle, trust)
    manifest = verified.manifest
    _check_written(store)
    with (
        from_environment("hybrid-device") or nullcontext() as tracer,
        Store.open(store, read_store_key(key_file, os.environ), manifest) as kept,
    ):
        if reason := kept.halted(manifest.version):
            raise BundleError(f"{manifest.model}:{manifest.version} was halted, another bundle must come: {reason}")
        async with InferenceClient(
            manifest,
            program_of(verified, engine),
            gateway,
            timeout_s=timeout,
            trace_share=trace,
            tracer=tracer,
            contribution=contribution,
            api_key=api_key,
        ) as client:
            beside = None
            if shadow is not None:
                installed = Installed(shadow, manifest.model, trusted_key(trust)).shadow
                beside = _shadow(installed, manifest, kept, engine, gateway, timeout_s=timeout, api_key=api_key)
            async with beside or nullcontext():  # it ends last: what it waits for then, results and store do not
                with Results(out) as results, Recording(kept, manifest) as recording:

                    def take(answer: Answer) -> None:
                        results.add(answer)
                        recording.add(answer)

                    then = None if beside is None else beside.offer
                    await client.run(kept.rows(devices), take, concurrency=concurrency, then=then)
    return results.summary()


def _shadow(
    installed: Installed, live: Manifest, kept: Store, engine: Engine | None, gateway: str, **asking: Any
) -> Shadow | None:
    """What asks a shadow; None: there is none, or it cannot be used, which is nothing to those who wait for answers."""
    from device_runtime.client import InferenceClient
    from device_runtime.program import program_of
    from device_runtime.shadow import Shadow

    try:
        bundle = installed.open(halted=_halted(kept))
    except HybridError:
        return None
    if bundle.manifest.version == live.version:  # it became the default meanwhile
        return None
    return Shadow(lambda: InferenceClient(bundle.manifest, program_of(bundle, engine), gateway, **asking))


async def _train(
    *,
    bundle: Path | None,
    folder: Path | None,
    model: str | None,
    trust: Path,
    store: Path,
    key_file: Path | None,
    aggregator: str,
    consent: Path,
    issuer: str | None,
    issuer_name: str | None,
    api_key_file: Path | None,
    policy: Path | None,
    readings: Path | None,
    devices: range,
) -> dict[str, Any]:
    from device_runtime.aggregator import Aggregator
    from device_runtime.participation import Participation, read_policy
    from device_runtime.program import open_bundle
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store
    from device_runtime.trainer import Trainer
    from hybrid.bundle import trusted_key

    asked, own, trusted = Aggregator(aggregator), read_policy(policy), trusted_key(trust)
    credentials = _credentials(issuer, issuer_name, api_key_file)
    key = read_store_key(key_file, os.environ)
    _check_written(store)
    opened = open_bundle(bundle, trust) if bundle else _installed(folder, model, trusted, store, key)
    host = _host(store, consent, readings)
    trainer = None if opened.manifest.train is None else Trainer(opened)
    sessions: list[dict[str, Any]] = []
    with Store.open(store, key, opened.manifest) as kept:
        for device in devices:
            session = Participation(
                bundle=opened,
                trainer=trainer,
                store=kept,
                host=host,
                aggregator=asked,
                trusted=trusted,
                device=device,
                credentials=credentials,
                own=own,
            )
            sessions.append({"device": device, **(await session.session()).summary()})
    return {"model": opened.manifest.model, "version": opened.manifest.version, "sessions": sessions}


async def _report(
    *,
    trust: Path,
    store: Path,
    key_file: Path | None,
    aggregator: str,
    consent: Path,
    issuer: str | None,
    issuer_name: str | None,
    api_key_file: Path | None,
    policy: Path | None,
    readings: Path | None,
    devices: range,
    spread_s: float | None,
) -> dict[str, Any]:
    from device_runtime.aggregator import Aggregator
    from device_runtime.participation import read_policy
    from device_runtime.reporting import SPREAD_S, Report
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store
    from hybrid.bundle import trusted_key

    if spread_s is not None and not 0 <= spread_s <= SPREAD_S:
        raise ConfigError(f"--spread-s must be in [0, {SPREAD_S:g}], got {spread_s:g}")
    asked, trusted = Aggregator(aggregator), trusted_key(trust)
    own = None if policy is None else read_policy(policy)
    credentials = _credentials(issuer, issuer_name, api_key_file)
    _check_written(store)
    sessions: list[dict[str, Any]] = []
    with Store.open(store, read_store_key(key_file, os.environ)) as kept:
        for device in devices:
            session = Report(
                model=kept.model,
                store=kept,
                host=_host(store, consent, readings),
                aggregator=asked,
                trusted=trusted,
                device=device,
                credentials=credentials,
                own=own,
                spread_s=SPREAD_S if spread_s is None else spread_s,
            )
            sessions.append({"device": device, **(await session.session()).summary()})
        return {"model": kept.model, "sessions": sessions}


def _host(store: Path, consent: Path, readings: Path | None) -> Host:
    """The machine, or what is to be taken for it."""
    from device_runtime.host import LinuxHost, ScriptedHost

    agrees = consent.is_file
    return ScriptedHost.open(readings, agrees) if readings else LinuxHost(store.parent, agrees)


def _installed(folder: Path | None, model: str | None, trusted: Trusted, store: Path, key: bytes) -> Bundle:
    """The folder's current bundle; a halted one gives way to the one before it."""
    from device_runtime.bundles import Installed
    from device_runtime.store import Store

    if folder is None or model is None:
        raise ConfigError("--folder needs --model: whose bundles it holds")
    with Store.open(store, key) as kept:
        return Installed(folder, model, trusted).open(halted=_halted(kept))


async def _update(
    *,
    folder: Path,
    model: str,
    trust: Path,
    gateway: str,
    shadow: bool,
    timeout: float,
    engine: Engine | None,
    store: Path | None,
    consent: Path | None,
    key_file: Path | None,
    api_key_file: Path | None,
) -> dict[str, Any]:
    from device_runtime.bundles import Installed, none_halted
    from device_runtime.download import update
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store
    from hybrid.bundle import trusted_key

    api_key = _api_key(api_key_file)
    if consent is not None and store is None:
        raise ConfigError("--consent needs --store: the journal is kept there")
    installed = Installed(folder, model, trusted_key(trust), engine)
    with ExitStack() as stack:
        halted: Callable[[int], bool] = none_halted
        journal: Journal | None = None
        if store is not None:
            if not store.is_file():
                raise ConfigError(f"store {str(store)!r} does not exist: leave --store out where there is none")
            kept = stack.enter_context(Store.open(store, read_store_key(key_file, os.environ)))
            halted, journal = _halted(kept), kept.journal(0)
        done = update(
            installed,
            gateway,
            now_ms=time.time_ns() // 1_000_000,
            halted=halted,
            shadows=shadow,
            api_key=api_key,
            timeout_s=timeout,
        )
        if journal is not None and consent is not None:
            if not consent.is_file():
                journal.forget()
            elif done.noted is not None:
                journal.note(*done.noted, time.time_ns() // 1_000_000)
    return {"model": model, **asdict(done)}


def _api_key(file: Path | None) -> str | None:
    """Never an argument: everyone on the machine reads those."""
    from device_runtime.access import read_api_key

    return read_api_key(file) if file else os.environ.get(API_KEY_VARIABLE) or None


def _credentials(issuer: str | None, name: str | None, api_key_file: Path | None) -> Credentials | None:
    """Of the account, where an issuer is given."""
    from device_runtime.credentials import Credentials

    if issuer is None:
        return None
    api_key = _api_key(api_key_file)
    if api_key is None:
        raise ConfigError(f"--issuer needs the account's key: set {API_KEY_VARIABLE}, or name a file: --api-key-file")
    return Credentials(issuer, api_key, issuer=name)


def _check_written(store: Path) -> None:
    if not store.is_file():
        raise ConfigError(f"store {str(store)!r} does not exist: the app writes its rows first")


def _halted(store: Store) -> Callable[[int], bool]:
    """Whether the kill switch named a version."""
    return lambda version: store.halted(version) is not None


async def _forget(
    *, store: Path, key_file: Path | None, everything: bool, entity: str | None, device: int | None
) -> dict[str, Any]:
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store

    assert everything or entity is not None
    with Store.open(store, read_store_key(key_file, os.environ)) as kept:
        return {"forgotten": kept.forget(device=device, entity=entity)}


async def _export(*, store: Path, key_file: Path | None, out: Path, device: int | None) -> dict[str, Any]:
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store

    written = 0
    draft = out.with_name(f"{out.name}.new")
    with Store.open(store, read_store_key(key_file, os.environ)) as kept:
        try:
            draft.unlink(missing_ok=True)  # one of others' making could be open to them
            with draft.open("x", encoding="utf-8") as handle:
                for found in kept.export(device):
                    handle.write(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")
                    written += 1
            draft.replace(out)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise ConfigError(f"{str(out)!r} cannot be written: {type(error).__name__}") from None
    return {"written": written}


def _range(text: str) -> range:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"must be A:B with 0 <= A < B, got {text!r}")
    return range(int(first), int(end))


if __name__ == "__main__":
    main()
