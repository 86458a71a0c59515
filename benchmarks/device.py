"""What a device pays: `python -m benchmarks.device [--json FILE] [--only PART]`.

The bundle of examples/coupon with the weights it was built with, on one thread:

inference   a row through the programs in ExecuTorch and in ONNX Runtime, against eager torch
training    a step of 16 rows through the training program, against eager torch
start       seconds and memory from a process's start to its first inference, against `import torch` alone
bytes       the bundle's, and what goes up and down: bodies, without HTTP's heads
browser     a row in this machine's Chromium, where it has one
quantised   what updates in 8 bits cost in AUC on OULAD (oracle: measured on pooled data), of three seeds

Contestants take turns, and a ratio is of the same turn. Takes about five minutes, four of them the last part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import measure
from device_runtime.client import request_body
from device_runtime.program import EmbedProgram, Engine, PredictProgram, load_program, open_bundle
from hybrid.bundle import Bundle
from hybrid.deployment import Deployment
from hybrid.export.programs import device_parts
from hybrid.export.promote import export_version
from hybrid.export.training import DeviceLoss
from hybrid.network import Network
from hybrid.plan import CheckIn, Local, TrainPlan, sign
from hybrid.spec import definition_hash, load_model
from hybrid.update import length
from hybrid.version import TrainingRecord, Version
from hybrid.workspace import Workspace

MODEL = Path(__file__).parents[1] / "examples" / "coupon" / "model.py"
ENGINES: tuple[Engine, ...] = ("executorch", "onnx")
CALLS = 100  # of a turn: a single one is too short for a clock
TURNS = 7  # of processes
Rows = list[dict[str, Any]]
Figures = dict[str, float]
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Device:
    """A promoted coupon model, and what a host app would have.

    Attributes:
        network: of the bundle.
        file, trust: the bundle's file, and the key that it is trusted by.
        bundle: verified.
        deployment: the server's half.
        workspace: with the control plane's key.
    """

    network: Network
    file: Path
    trust: Path
    bundle: Bundle
    deployment: Deployment
    workspace: Workspace

    @classmethod
    def promoted(cls, folder: Path) -> Device:
        """Exports the model as `hybrid promote` does, untrained: times and sizes do not depend on the weights."""
        model = load_model(MODEL)
        network = Network.build(model)
        definition = {"declaration": model.definition(), "network": network.description()}
        record = TrainingRecord(
            kind="federated", run="benchmark", population="none", users=1, examples=1, settings=model.training
        )
        digest = definition_hash(definition)
        version = Version(model.name, 1, digest, definition, record, network.weights())
        workspace = Workspace(folder)
        exported = export_version(version, model, workspace)
        trust = workspace.keys / "bundle-signing.pub"
        bundle = open_bundle(exported.bundle, trust)
        return cls(network, exported.bundle, trust, bundle, exported.deployment, workspace)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part (may be repeated)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: Rows = []
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        console.print("promoting coupon ...")
        device = Device.promoted(Path(folder) / "workspace")
        for name in arguments.only or PARTS:
            console.print(f"{name} ...")
            PARTS[name](device, rows, figures)
    measure.show("Device", rows, figures)
    measure.write(arguments.json, rows, figures)


def inference(device: Device, rows: Rows, figures: Figures) -> None:
    """NumPy in, NumPy out, in each: as the runtime calls them."""
    server = np.zeros((1, device.network.server_embedding), np.float32)
    names = device.bundle.manifest.features.names
    inputs = device.bundle.manifest.features.inputs({name: np.array([None], dtype=object) for name in names})
    for name, part in device_parts(device.network).items():
        given = (inputs,) if name == "embed" else (inputs, server)
        contestants = {"eager torch": repeated(eager(part.program, given))}
        for engine in ENGINES:
            contestants[engine] = repeated(called(device.bundle, name, engine, inputs, server))
        turns = measure.take_turns(contestants, seconds=5)
        times = {who: 1e3 * ms / CALLS for who, ms in turns.medians().items()}
        rows.append({"part": f"{name}, us a row"} | times)
        kind = "" if name == "embed" else "_predict"
        figures |= {f"{engine}{kind}_speedup": turns.ratio("eager torch", engine) for engine in ENGINES}


def called(bundle: Bundle, name: str, engine: Engine, inputs: Any, server: Any) -> Callable[[], object]:
    """One inference as the runtime does it."""
    if name == "embed":
        embed = EmbedProgram(bundle, engine)
        return lambda: embed.embed(inputs)
    predict = PredictProgram(bundle, engine)
    return lambda: predict.predict(inputs, server)


def eager(program: torch.nn.Module, given: tuple[Any, ...]) -> Callable[[], object]:
    """The same in eager torch."""

    def run() -> object:
        with torch.inference_mode():
            return program(*(torch.from_numpy(array) for array in given)).numpy()

    return run


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """`CALLS` times."""

    def turn() -> None:
        for _ in range(CALLS):
            run()

    return turn


def training(device: Device, rows: Rows, figures: Figures) -> None:
    """Loss and gradient of one static chunk of rows; the descent itself is a subtraction in either."""
    train = device.bundle.manifest.train
    assert train is not None
    random = np.random.default_rng(0)
    features = device.bundle.manifest.features
    batch = (
        random.normal(size=(train.rows, train.server)).astype(np.float32),
        np.zeros((train.rows, len(features)), np.float32),
        random.integers(0, 2, train.rows).astype(np.float32),
        np.full(train.rows, 1 / train.rows, np.float32),
    )
    if train.missing:
        batch = (*batch, np.zeros((train.rows, 2), np.float32))  # type: ignore[assignment]
    federated = train.server != device.network.server_embedding
    loss = DeviceLoss(device.network, server_tower=federated, missing=train.missing).train()
    weights, program = loss.flat(), load_program(device.bundle, "train.pte")
    parameters = list(loss.parameters())

    def in_torch() -> object:
        return torch.autograd.grad(loss(*(torch.from_numpy(array) for array in batch)), parameters)

    contestants = {"eager torch": repeated(in_torch), "executorch": repeated(lambda: program(weights, *batch))}
    turns = measure.take_turns(contestants, seconds=5)
    times = {who: 1e3 * ms / CALLS for who, ms in turns.medians().items()}
    rows.append({"part": f"training, us a step of {train.rows} rows"} | times)
    figures["executorch_training_speedup"] = turns.ratio("eager torch", "executorch")


def start(device: Device, rows: Rows, figures: Figures) -> None:
    """Processes in turn: the first of each fills the disk's cache and does not count."""
    taken: dict[str, list[dict[str, float]]] = {"torch": [], **{engine: [] for engine in ENGINES}}
    for turn in range(TURNS + 1):
        for contestant, found in taken.items():
            one = process(contestant, device)
            if turn:
                found.append(one)
    for contestant, found in taken.items():
        medians = {name: float(np.median([one[name] for one in found])) for name in ("seconds", "cpu_s", "peak_mb")}
        what = "import torch, alone" if contestant == "torch" else f"first inference, {contestant}"
        rows.append({"part": what} | medians)
    for engine in ENGINES:
        pairs = zip(taken[engine], taken["torch"], strict=True)
        ratio = float(np.median([ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]))
        figures["first_inference_ratio" if engine == "executorch" else f"first_inference_ratio_{engine}"] = ratio


def process(contestant: str, device: Device) -> dict[str, float]:
    """One process, from its start."""
    words = [sys.executable, "-m", "benchmarks.device_process", contestant, str(device.file), str(device.trust)]
    begun = time.time()
    said = subprocess.run([*words, str(begun)], check=True, capture_output=True, text=True, timeout=120)
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def sizes(device: Device, rows: Rows, figures: Figures) -> None:
    """Of files and bodies."""
    from hybrid.bundle import signing_key
    from serving import oip

    manifest, programs = device.bundle.manifest, device.bundle.programs
    whole = device.file.stat().st_size
    rows.append({"part": "bundle, bytes", "whole": whole} | {name: len(data) for name, data in programs.items()})
    request = {name: "x" * 8 if kind == "text" else 1.5 for name, kind in manifest.request.items()}
    released = np.ones((1, manifest.device_embedding), np.float32) if manifest.merge == "server" else None
    asked, header = request_body("offer-1", request, manifest.request, released)
    answers = oip.Answers(np.array([0.7301], np.float32), np.array([86_400_000]), ["ok"], ["none"])
    told, _ = oip.encode(oip.decode(asked, str(header), device.deployment), answers, device.deployment)
    assert manifest.train is not None
    size = manifest.train.size
    plan = TrainPlan(
        id="0" * 32,
        model=manifest.model,
        version=manifest.version,
        definition_hash=manifest.definition_hash,
        expires_ms=1 << 41,
        local=Local(steps=1, lr=0.1),
        clip=1.0,
        parameters=size,
    )
    signed = sign(plan, signing_key(device.workspace.keys), np.zeros(size, np.float32))
    check_in = CheckIn(model=manifest.model, version=manifest.version, runtime=1).model_dump_json()
    rows.append({"part": "inference, bytes", "up": len(asked), "down": len(told)})
    for upload in ("float32", "int8"):
        up = len(check_in) + length(size, upload)
        rows.append({"part": f"round, {upload}, {size} weights, bytes", "up": up, "down": len(signed)})
    figures["bundle_kb"] = whole / 1000
    figures["upload_bytes_per_weight"] = length(size, "float32") / size
    figures["quantised_upload_bytes_per_weight"] = length(size, "int8") / size


def browser(device: Device, rows: Rows, figures: Figures) -> None:
    """Where there is one."""
    from benchmarks.browser import browser_inference
    from hybrid.local import web

    if web.chromium() is None:
        console.print("  no Chromium on the PATH: left out")
        return
    found = browser_inference(device.file.read_bytes(), device.trust.read_text())
    times = {name: found[f"{name}_us"]["p50"] for name in ("embed", "predict")}
    rows.append({"part": f"{found['browser']} {found['version']}, us a row"} | times)
    loaded = {name: found[name] for name in ("first_ms", "javascript_bytes", "wasm_bytes")}
    rows.append({"part": "browser, what a page loads"} | loaded)
    figures |= {f"browser_{name}_us": value for name, value in times.items()}


def quantised(_: Device, rows: Rows, figures: Figures) -> None:
    """The longest part."""
    from benchmarks.quantised import quantised_auc_loss

    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        trained, found = quantised_auc_loss(3, Path(folder))
    rows += trained
    figures |= found


PARTS: dict[str, Callable[[Device, Rows, Figures], None]] = {
    "inference": inference,
    "training": training,
    "start": start,
    "bytes": sizes,
    "browser": browser,
    "quantised": quantised,
}

if __name__ == "__main__":
    main()
