"""The torch form of a hybrid model: its encoders, towers and head, and the check of the cut."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from hybrid.errors import ConfigError
from hybrid.features import Bucketize, Features, Log1p, Numeric, Transform, check_learned
from hybrid.spec import HybridModel
from hybrid.version import Version

ROWS = 3  # of the probe batches below: more than one, so that rows that mix are seen


class Transforms(nn.Module):
    """inputs -> slots, all columns at once, in float32; the torch form of `Features.slots`.

    Raises:
        ConfigError: constants are not learned yet.
    """

    mean: Tensor
    std: Tensor
    clip: Tensor
    edges: Tensor
    buckets: Tensor
    is_numeric: Tensor
    is_log: Tensor
    is_bucket: Tensor

    def __init__(self, features: Features) -> None:
        super().__init__()
        check_learned(features.transforms)
        transforms = list(features.transforms.values())
        numeric = [t if isinstance(t, Numeric) else None for t in transforms]
        edges = [list(t.edges) if isinstance(t, Bucketize) else [] for t in transforms]
        depth = max(map(len, edges), default=0)
        self._constant("mean", [t.mean if t else 0.0 for t in numeric])
        self._constant("std", [t.std if t else 1.0 for t in numeric])
        self._constant("clip", [t.clip if t else 0.0 for t in numeric])
        self._constant("is_numeric", [float(t is not None) for t in numeric])
        self._constant("is_log", [float(isinstance(t, Log1p)) for t in transforms])
        self._constant("is_bucket", [float(isinstance(t, Bucketize)) for t in transforms])
        self._constant("buckets", [float(len(e)) for e in edges])
        # Padded with NaN, which no value reaches.
        self._constant("edges", [e + [np.nan] * (depth - len(e)) for e in edges])
        self.logs = any(isinstance(t, Log1p) for t in transforms)
        self.numbers = any(t is not None for t in numeric)

    def _constant(self, name: str, values: list[Any]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, features) -> (n, features)."""
        slots = inputs
        if self.numbers:
            slots = torch.where(self.is_numeric > 0, self._normalised(inputs), slots)
        if self.edges.shape[1]:
            index = (inputs.unsqueeze(-1) >= self.edges).to(torch.float32).sum(-1)
            index = torch.where(inputs != inputs, self.buckets + 1.0, index)
            slots = torch.where(self.is_bucket > 0, index, slots)
        return slots

    def _normalised(self, inputs: Tensor) -> Tensor:
        infinite = inputs.abs() == torch.inf
        scaled = torch.where(infinite, torch.nan, inputs)
        if self.logs:
            scaled = torch.where(self.is_log > 0, torch.log1p(scaled.clamp(min=0.0)), scaled)
        normal = (scaled - self.mean) / self.std
        return torch.minimum(torch.maximum(normal, -self.clip), self.clip)


class Encoder(nn.Module):
    """slots -> encoded columns, in one gather and one comparison; the torch form of `Features.encode`."""

    source: Tensor
    equals: Tensor
    is_value: Tensor
    is_missing: Tensor

    def __init__(self, features: Features) -> None:
        super().__init__()
        columns = [c for place, t in enumerate(features.transforms.values()) for c in _columns(place, t)]
        source, equals, kind = zip(*columns, strict=True) if columns else ((), (), ())
        self.register_buffer("source", torch.tensor(source, dtype=torch.int64), persistent=False)
        self.register_buffer("equals", torch.tensor(equals, dtype=torch.float32), persistent=False)
        self.register_buffer("is_value", torch.tensor([k == "value" for k in kind]).float(), persistent=False)
        self.register_buffer("is_missing", torch.tensor([k == "missing" for k in kind]).float(), persistent=False)

    def forward(self, slots: Tensor) -> Tensor:
        """(n, features) -> (n, width)."""
        gathered = torch.index_select(slots, 1, self.source)
        missing = (gathered != gathered).to(torch.float32)
        value = torch.where(gathered != gathered, torch.zeros_like(gathered), gathered)
        # `equals` is NaN for columns that are no index, so that nothing equals it.
        return (gathered == self.equals).to(torch.float32) + value * self.is_value + missing * self.is_missing


def _columns(place: int, transform: Transform) -> list[tuple[int, float, str]]:
    if transform.cardinality:
        return [(place, float(index), "index") for index in range(transform.cardinality)]
    return [(place, np.nan, "value"), (place, np.nan, "missing")]


class ServerProgram(nn.Module):
    """What Triton runs: (n, server + request features) slots -> (n, a) embedding."""

    def __init__(self, features: Features, tower: nn.Module) -> None:
        super().__init__()
        self.encoder, self.tower = Encoder(features), tower

    def forward(self, slots: Tensor) -> Tensor:
        """Encodes, then embeds."""
        return self.tower(self.encoder(slots))  # type: ignore[no-any-return]


class DeviceProgram(nn.Module):
    """What a device runs: (n, device features) inputs -> (n, b) embedding."""

    def __init__(self, features: Features, tower: nn.Module) -> None:
        super().__init__()
        self.transforms, self.encoder, self.tower = Transforms(features), Encoder(features), tower

    def forward(self, inputs: Tensor) -> Tensor:
        """Transforms, encodes, embeds."""
        return self.tower(self.encoder(self.transforms(inputs)))  # type: ignore[no-any-return]


class Correction(nn.Module):
    """Logits of the head -> probabilities: the one place that says how.

    A head that learned from examples sampled by their label speaks of their odds;
    `shift` takes its logits back to everybody's. It is no trained weight and no part of
    a definition, but travels with a version's weights; 0 where nothing was sampled.
    """

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        """(n,) -> (n,) in [0, 1]."""
        return torch.sigmoid(self.corrected(logits))

    def corrected(self, logits: Tensor) -> Tensor:
        """(n,) logits of the head -> (n,) logits of the probabilities."""
        return logits + self.shift

    def set_shift(self, shift: float) -> None:
        """In nats."""
        self.shift.fill_(shift)


@dataclass(frozen=True)
class Network:
    """The three modules of a hybrid model, built, checked, and their sizes.

    Attributes:
        model: the declaration.
        server_tower: (n, server.width + request.width) encoded -> (n, server_embedding).
        device_tower: (n, device.width) encoded -> (n, device_embedding).
        head: the two embeddings -> (n,) logits.
        missing: "server" and "device": (n, 1) ones -> the embedding that stands for that side where it is missing.
            Zeros until tower dropout trains it.
        correction: the head's logits -> probabilities.
    """

    model: HybridModel
    server_tower: nn.Module
    device_tower: nn.Module
    head: nn.Module
    server_embedding: int
    device_embedding: int
    missing: nn.ModuleDict
    correction: Correction

    @classmethod
    def build(cls, model: HybridModel, *, seed: int = 0) -> Network:
        """Runs the factories under `seed` and checks the cut.

        The check: each tower takes its own side's features alone, computes each
        row by itself, shares no parameter or buffer with another part, gives the
        same whatever the other parts were given, and the head takes the two
        embeddings to one logit a row. With what `description` refuses, nothing
        crosses between the sides but the embeddings and their gradients.

        Raises:
            ConfigError: a factory fails, or the check does; the message names the part.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = {part: _built(part, getattr(model, part)) for part in ("server_tower", "device_tower", "head")}
            server = _embedding("server_tower", parts["server_tower"], model.server_features.width)
            device = _embedding("device_tower", parts["device_tower"], model.device_features.width)
            _check_head(parts["head"], server, device)
            _check_nothing_shared(parts)
            _check_parts_alone(parts, _widths(model, server, device))
            missing = nn.ModuleDict({"server": _zeros(server), "device": _zeros(device)})
        return cls(
            model,
            **parts,
            server_embedding=server,
            device_embedding=device,
            missing=missing,
            correction=Correction(),
        )

    @classmethod
    def of(cls, model: HybridModel, version: Version) -> Network:
        """The network of a trained version: with the constants that it learned, and its weights.

        Args:
            model: the declaration that it was trained from.
            version: of it.

        Raises:
            ConfigError: constants or weights are of another declaration.
        """
        network = cls.build(model.with_learned(version.learned))
        network.load_weights(version.weights)
        return network

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The three modules by name."""
        return {"server_tower": self.server_tower, "device_tower": self.device_tower, "head": self.head}

    def server_program(self) -> ServerProgram:
        """The server tower behind its encoder, in evaluation mode."""
        return ServerProgram(self.model.server_features, self.server_tower).eval()

    def device_program(self) -> DeviceProgram:
        """The device tower behind its transforms and encoder, in evaluation mode."""
        return DeviceProgram(self.model.device_features, self.device_tower).eval()

    def missing_embedding(self, side: str, rows: int) -> Tensor:
        """(rows, size) what the head is given where the "server" or the "device" does not answer."""
        return self.missing[side](torch.ones(rows, 1))  # type: ignore[no-any-return]

    @property
    def _kept(self) -> Mapping[str, nn.Module]:
        """What a version holds, by name."""
        return {**self.parts, "missing": self.missing, "correction": self.correction}

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Every parameter and persistent buffer as "part.name" -> array, missing embeddings and correction included."""
        return {
            f"{part}.{name}": value.detach().cpu().numpy().copy()
            for part, module in self._kept.items()
            for name, value in module.state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Sets what `weights` returned; without a correction, as versions before there was one, it is none.

        Raises:
            ConfigError: a name or shape is not this network's.
        """
        weights = {"correction.shift": np.zeros((), np.float32), **weights}
        for part, module in self._kept.items():
            prefix = f"{part}."
            state = {n.removeprefix(prefix): torch.tensor(v) for n, v in weights.items() if n.startswith(prefix)}
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise ConfigError(f"{part}: the weights are of another network: {error}") from None

    def description(self) -> dict[str, Any]:
        """Sizes, structure and operations as JSON values: part of what a definition's hash covers.

        "graphs" has the SHA-256 of each part's exported operations, so that code
        counts wherever it is written. They are those of the installed torch.
        The first call in a process takes seconds.

        Raises:
            ConfigError: a part is no fixed program of its input, its parameters and its
                persistent buffers: it branches on values, or holds a tensor that no version would.
        """
        widths = _widths(self.model, self.server_embedding, self.device_embedding)
        return {
            "graphs": {part: _graph_sha256(part, module, widths[part]) for part, module in self.parts.items()},
            "server_embedding": self.server_embedding,
            "device_embedding": self.device_embedding,
            "parts": {part: str(module) for part, module in self.parts.items()},
            "parameters": {part: sum(p.numel() for p in module.parameters()) for part, module in self.parts.items()},
        }

    def check_registered(self, description: Mapping[str, Any]) -> None:
        """Refuses to go on with another network than the registered one.

        The model's file can be the same and the network another: a tower may
        come from a module that the file imports, or another torch export other operations.

        Args:
            description: what `description` returned at registration.

        Raises:
            ConfigError: this network is another one.
        """
        if self.description() != description:
            raise ConfigError(
                f"the network of {self.model.name!r} changed since it was registered, in a module that its file "
                "imports or with another release of torch; run `hybrid register` again"
            )


def _widths(model: HybridModel, server_embedding: int, device_embedding: int) -> dict[str, tuple[int, ...]]:
    """Columns of each part's inputs."""
    return {
        "server_tower": (model.server_features.width,),
        "device_tower": (model.device_features.width,),
        "head": (server_embedding, device_embedding),
    }


def _zeros(size: int) -> nn.Linear:
    """One learnable vector, as a layer that one input of 1 turns on."""
    vector = nn.Linear(1, size, bias=False)
    nn.init.zeros_(vector.weight)
    return vector


def _built(part: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        module = factory()
    except Exception as error:
        raise ConfigError(f"{part} must build a torch.nn.Module, got {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{part} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def _embedding(part: str, tower: nn.Module, width: int) -> int:
    """The embedding's size, by running the tower on a probe batch of its own width."""
    probe = torch.rand(ROWS, width)
    output = _run(part, tower, probe, expected=f"({ROWS}, {width}) float32")
    if output.ndim != 2 or len(output) != ROWS or output.dtype != torch.float32:
        raise ConfigError(f"{part} must return (n, size) float32, got {tuple(output.shape)} {output.dtype}")
    _check_rows_apart(part, output, _run(part, tower, probe[:1], expected=f"(1, {width}) float32 too"))
    return int(output.shape[1])


def _check_head(head: nn.Module, server: int, device: int) -> None:
    a, b = torch.rand(ROWS, server), torch.rand(ROWS, device)
    logits = _run("head", head, a, b, expected=f"a ({ROWS}, {server}) server and a ({ROWS}, {device}) device embedding")
    if logits.shape != (ROWS,):
        raise ConfigError(f"head must return (n,) logits, got shape {tuple(logits.shape)} for n = {ROWS}")
    _check_rows_apart("head", logits, _run("head", head, a[:1], b[:1], expected="embeddings of one row too"))


def _run(part: str, module: nn.Module, *inputs: Tensor, expected: str) -> Tensor:
    try:
        with torch.no_grad():
            output = module.eval()(*inputs)
    except Exception as error:
        raise ConfigError(f"{part} must take {expected}, but: {type(error).__name__}: {error}") from None
    if not isinstance(output, Tensor):
        raise ConfigError(f"{part} must return one tensor, got {type(output).__name__}")
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        raise ConfigError(f"{part} must not hold BatchNorm: it mixes people's rows; use LayerNorm or GroupNorm")
    return output


def _check_rows_apart(part: str, together: Tensor, alone: Tensor) -> None:
    if not torch.allclose(together[:1], alone, atol=1e-5):
        raise ConfigError(f"{part} must compute each row by itself, but a row's output changes with the others")


def _check_nothing_shared(parts: Mapping[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for part, module in parts.items():
        for tensor in {*module.parameters(), *module.buffers()}:
            first = owner.setdefault(tensor.data_ptr(), part)
            if first != part and tensor.numel():
                raise ConfigError(f"{part} shares a tensor with {first}: the towers may meet only in the head")


def _check_parts_alone(parts: Mapping[str, nn.Module], widths: Mapping[str, tuple[int, ...]]) -> None:
    """No part keeps anything of what it is given, for itself or for another."""
    with torch.no_grad():
        for part, module in parts.items():
            inputs = _probe(widths[part])
            held = [*inputs, *module.parameters(), *module.buffers()]
            versions = [tensor._version for tensor in held]
            before = module(*inputs).clone()
            if versions != [tensor._version for tensor in held]:
                raise ConfigError(f"{part} must not change its input, a parameter or a buffer while it runs")
            for other, another in parts.items():
                another(*_probe(widths[other]))
            if not torch.equal(before, module(*inputs)):
                raise ConfigError(
                    f"{part} must give the same for the same input, whatever the parts were given before, but it "
                    "does not: nothing may cross between the sides but the embeddings"
                )


def _probe(widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.rand(ROWS, width) for width in widths)


def _graph_sha256(part: str, module: nn.Module, widths: tuple[int, ...]) -> str:
    """Of the text of a part's operations, subgraphs and the shapes of what they read included."""
    exported = _exported(part, module, widths)
    specs = exported.graph_signature.input_specs
    for spec in specs:
        _check_read(part, spec)
    graphs = [graph for graph in exported.graph_module.modules() if isinstance(graph, torch.fx.GraphModule)]
    if any(str(node.target) in {"cond", "while_loop"} for graph in graphs for node in graph.graph.nodes):
        raise ConfigError(f"{part} must compute each row by itself, but it branches on values of a whole batch")
    text = [f"{spec.kind.name} {spec.target}" for spec in specs]
    text += [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in exported.state_dict.items()]
    return hashlib.sha256("\n".join(text + [graph.code for graph in graphs]).encode()).hexdigest()


def _exported(part: str, module: nn.Module, widths: tuple[int, ...]) -> ExportedProgram:
    rows = torch.export.Dim("n")
    inputs = tuple(torch.zeros(ROWS, width) for width in widths)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module.eval(), inputs, dynamic_shapes=tuple({0: rows} for _ in inputs))
    except Exception as error:  # whatever torch raises at what it cannot trace
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{part} must run the same operations on every input, of any number of rows, so that it can be "
            f"exported, but: {type(error).__name__}: {reason}"
        ) from None


def _check_read(part: str, spec: InputSpec) -> None:
    """What a part reads is its input or comes back with a version's weights."""
    if spec.kind not in (InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER) or spec.persistent is False:
        raise ConfigError(
            f"{part} reads the tensor {spec.target!r}, which is neither a parameter nor a persistent buffer of it, "
            "so that no version would hold it: use register_buffer(name, tensor) in its constructor"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells at length what the error says."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
