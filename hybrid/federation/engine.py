"""A cohort's local training as one batched tensor program: what each device would do, for many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.layers import Chunk, Moves, Scratch, UserModule
from hybrid.federation.population import Examples
from hybrid.local_training import LocalTraining, Schedule, missing_sides
from hybrid.network import Network
from hybrid.privacy.mechanisms import ClippedSum, clip_and_sum
from hybrid.update import Upload, dequantise, quantise

ROWS_A_PASS = 1 << 16
CACHED_EMBEDDINGS = 1 << 28  # bytes; more of them are computed as they are needed
ROUNDED = (
    1 << 17
)  # weights that are quantised at once: with more, memory comes fresh from the system, three times slower
ROUNDING = 1  # tells the stream that rounds quantised updates from that of rows and tower dropout
GPU_SHARE = 8  # of its memory: a chunk, and the examples, take one part each at most
STACKED = 4  # several starts fill 1 / 4 of a chunk; measured: with more, memory costs what fewer operations save


class DeviceSide(nn.Module):
    """What is trained by federated rounds: the device tower and the head, and the server tower where it is federated.

    Its parameters, in one fixed order, are the flat vector that travels.

    Args:
        network: whose parts it trains.
        server_tower: whether the server tower is among them; else it is frozen, and its embeddings are given.
        missing: whether the embeddings that stand for a missing side are among them.
    """

    def __init__(self, network: Network, *, server_tower: bool = False, missing: bool = False) -> None:
        super().__init__()
        self.server_tower = network.server_tower if server_tower else None
        self.device_tower, self.head = network.device_tower, network.head
        self.missing = network.missing if missing else None

    def forward(self, server: Tensor, device: Tensor, absent: Tensor | None = None) -> Tensor:
        """One logit a row.

        Args:
            server: (n, a) embeddings, or (n, server width) encoded features where the server tower is trained.
            device: (n, device width) encoded features.
            absent: (n, 2) 1 where the server's or the device's embedding is taken to be missing, else 0.

        Returns:
            (n,) logits.
        """
        embeddings = [server if self.server_tower is None else self.server_tower(server), self.device_tower(device)]
        if self.missing is not None and absent is not None:
            for place, side in enumerate(("server", "device")):
                gone = absent[:, place : place + 1]
                embeddings[place] = torch.where(gone > 0, self.missing[side](gone), embeddings[place])
        return self.head(*embeddings)  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        """p, the length of the flat vector."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flat(self) -> Float32:
        """(p,) a copy of the parameters."""
        with torch.no_grad():
            vector: Float32 = torch.cat([parameter.flatten() for parameter in self.parameters()]).cpu().numpy()
        return vector

    def load_flat(self, flat: Float32) -> None:
        """Sets the parameters.

        Raises:
            ConfigError: `flat` is not (p,).
        """
        if flat.shape != (self.size,):
            raise ConfigError(f"flat weights must have shape ({self.size},), got {flat.shape}")
        nn.utils.vector_to_parameters(torch.tensor(flat, dtype=torch.float32), self.parameters())


@dataclass(frozen=True)
class Engine:
    """Computes the updates of any users of one set of examples.

    Dropout is off. A frozen server tower's embeddings are computed once, as a
    device would be given them.

    Attributes:
        side: what is trained; its parameters' values are never read nor changed.
        size: p, how many they are.
        local: what each user does.
        examples: whose rows; memory-mapped ones stay on the disk but for those of a cohort.
        server_tower: frozen, in front of `side`; None where it is trained.
        embeddings: (n, a) of the frozen tower, where they fit in memory.
        columns: the examples as tensors.
        device: where users are trained; the flat weights and the sums are NumPy's, on the CPU, whichever it is.
        trainer: how a chunk is trained.
        tower_dropout: share of rows that train without the server's, and of those that train without the device's side.
        upload: how clipped updates travel; those in int8 are clipped again before they are summed.
        chunk_bytes: of one chunk's updates and rows.
        scratch: memory of the chunks.
    """

    side: DeviceSide
    size: int
    local: LocalTraining
    examples: Examples = field(repr=False)
    server_tower: nn.Module | None = field(repr=False)
    embeddings: Tensor | None = field(repr=False)
    columns: _Columns = field(repr=False)
    device: torch.device
    trainer: Trainer = field(repr=False)
    tower_dropout: float
    upload: Upload
    chunk_bytes: int
    scratch: Scratch = field(repr=False)

    @classmethod
    def build(
        cls,
        network: Network,
        examples: Examples,
        local: LocalTraining,
        *,
        federate_server_tower: bool = False,
        tower_dropout: float = 0.0,
        upload: Upload = "float32",
        chunk_bytes: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Engine:
        """Prepares what every round needs.

        Args:
            network: its values are copied nowhere and not changed.
            examples: of everybody.
            local: what each user does.
            federate_server_tower: whether users train the server tower too.
            tower_dropout: in [0, 0.5).
            upload: how clipped updates travel.
            chunk_bytes: by default what the cache holds, or a share of a GPU's memory: the same on the same machine, so
                that a seed repeats a run.
            device: where users are trained, as torch names it: "cpu", "cuda", "cuda:1".

        Raises:
            ConfigError: tower_dropout is outside its range, or there is no such device.
        """
        if not 0 <= tower_dropout < 0.5:
            raise ConfigError(f"tower_dropout must be in [0, 0.5), got {tower_dropout!r}")
        device = device_named(device)
        side = DeviceSide(network, server_tower=federate_server_tower, missing=tower_dropout > 0).eval()
        frozen = None if federate_server_tower else network.server_tower.eval()
        cached = frozen is not None and 4 * len(examples) * network.server_embedding <= CACHED_EMBEDDINGS
        scratch = Scratch()
        trainer = _trainer(side, examples, frozen, scratch, device)
        if frozen is not None and device.type != "cpu":
            frozen = deepcopy(frozen).to(device)
        return cls(
            side=side,
            size=side.size,
            local=local,
            examples=examples,
            server_tower=frozen,
            embeddings=embed(frozen, examples.server, device) if frozen is not None and cached else None,
            columns=_Columns.of(examples, device),
            device=device,
            trainer=trainer,
            tower_dropout=tower_dropout,
            upload=upload,
            chunk_bytes=chunk_bytes or chunk_size(device),
            scratch=scratch,
        )

    @property
    def users(self) -> int:
        """How many people there are to choose from."""
        return self.examples.users

    def clipped_sum(
        self, flat: Float32, users: NDArray[np.int64], clip: float, *, stream: tuple[int, ...] = (0,)
    ) -> ClippedSum:
        """What `hybrid.privacy.mechanisms.clip_and_sum` makes of the cohort's updates, without their leaving torch.

        With upload="int8" each clipped update is rounded and read again as `hybrid.update` does it; the sum is what
        `clip_and_sum` makes of those, and the counts are of the norms before.

        Args:
            flat: (p,) the weights to start from.
            users: (k,) distinct, each in [0, self.users).
            clip: largest L2 norm of one user's update.
            stream: seeds which rows are kept, their order, the tower dropout and the rounding of this round.
        """
        return self.clipped_sums(flat[None], users, [clip], [self.local.lr], stream=stream)[0]

    def clipped_sums(
        self,
        flats: Float32,
        users: NDArray[np.int64],
        clips: Sequence[float],
        lrs: Sequence[float],
        *,
        stream: tuple[int, ...] = (0,),
    ) -> list[ClippedSum]:
        """The clipped sums of one cohort that trains from several weights: with the same rows in the same steps.

        Args:
            flats: (starts, p) the weights to start from.
            users: (k,) distinct, each in [0, self.users).
            clips: of each start, largest L2 norm of one user's update.
            lrs: of each start, in place of `local.lr`.
            stream: seeds which rows are kept, their order, the tower dropout and the rounding of this round.
        """
        sums = [self._sum(clip, stream) for clip in clips]
        for first, shape, moves in self._moves(flats, users, lrs, stream):
            moved = self._in_float64(shape, moves)
            norms = torch.linalg.vector_norm(moved, dim=2)
            for place, (norm, part) in enumerate(zip(norms, moved, strict=True)):
                sums[first + place].add(norm, part)
        return [ClippedSum(one.total.cpu().numpy(), len(users), one.below, one.above) for one in sums]

    def _sum(self, clip: float, stream: tuple[int, ...]) -> _Sum:
        """An empty one; each has a generator of its own, so that every start rounds as it would alone."""
        rounding = None if self.upload == "float32" else np.random.default_rng((*stream, ROUNDING))
        return _Sum(torch.zeros(self.size, dtype=torch.float64, device=self.device), clip, rounding)

    def _in_float64(self, shape: tuple[int, int], moves: Moves) -> Tensor:
        """(starts, users, p): each part is copied when it is made, and still in the cache."""
        whole = self.scratch.take("float64", (*shape, self.size), self.device, torch.float64)
        rows = whole.view(-1, self.size)
        for begin, columns in moves:
            end = begin
            for column in columns:
                end += column.shape[1]
                rows[:, end - column.shape[1] : end].copy_(column)
        return whole

    def updates(self, flat: Float32, users: NDArray[np.int64], *, stream: tuple[int, ...] = (0,)) -> Iterator[Float32]:
        """Trains each of `users` from the same weights, and shows what each would send.

        Users go by their number of steps and examples, so that little is padded: the order of
        the rows is not that of `users`. Users without examples, whose update is zero, are left out.

        Args: those of `clipped_sum`.

        Yields:
            (c, p) weights after local training minus `flat`, one row a user, not clipped.
        """
        for _, _, moves in self._moves(flat[None], users, [self.local.lr], stream):
            in_order = sorted(moves, key=lambda move: move[0])
            yield torch.cat([column for _, columns in in_order for column in columns], dim=1).cpu().numpy()

    def order(self, users: NDArray[np.int64], *, stream: tuple[int, ...] = (0,)) -> NDArray[np.int64]:
        """Those of `users` who have examples in a round, in the order of `updates`."""
        return self._taken(users, np.random.default_rng(stream)).users

    def _taken(self, users: NDArray[np.int64], rng: np.random.Generator) -> _Taken:
        """The rows that each of `users` trains with in a round, ordered for `_moves`."""
        begin = self.examples.offsets[users]
        counts, rows = self.examples.offsets[users + 1] - begin, None
        if self.local.keep is not None:
            every = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            kept = self.local.kept(self.examples.labels[every], rng)
            owner, rows = np.repeat(np.arange(len(users)), counts)[kept], every[kept]
            counts = np.bincount(owner, minlength=len(users))
            begin = np.cumsum(counts) - counts
        some = np.flatnonzero(counts)
        order = some[np.lexsort((counts[some], self.local.steps_of(counts[some])))]
        return _Taken(users[order], counts[order], begin[order], rows)

    def _moves(
        self, flats: Float32, users: NDArray[np.int64], lrs: Sequence[float], stream: tuple[int, ...]
    ) -> Iterator[tuple[int, tuple[int, int], Moves]]:
        """Yields the first of some starts, how many they and a chunk's users are, and how far those moved from each.

        Chunks, and what is drawn for them, are those of one start alone. Where a
        chunk leaves room, as that of a small cohort does, several starts are trained as one batch.
        """
        rng = np.random.default_rng(stream)
        taken = self._taken(users, rng)
        counts = taken.counts
        weights = torch.tensor(flats, device=self.device)
        rates = torch.tensor(lrs, dtype=torch.float32, device=self.device)
        begin = 0
        while begin < len(counts):
            sizes = self._bytes(counts[begin:])
            end = max(1, int(np.searchsorted(sizes, self.chunk_bytes, side="right")))
            chunk = slice(begin, begin + end)
            batches = self._batches(taken, chunk, self.local.schedule(counts[chunk], rng), rng)
            at_once = max(1, self.chunk_bytes // STACKED // int(sizes[end - 1]))
            for first in range(0, len(flats), at_once):
                here = slice(first, first + at_once)
                moves = self.trainer(weights[here], replace(batches, lrs=rates[here]), self.local.proximal)
                yield first, (len(rates[here]), end), moves
            begin += end

    def _bytes(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """(k,) ascending rows of users -> (k,) what the first 1, 2, ... k take, each padded to the longest of them."""
        row = self.examples.server.shape[1] + self.examples.device.shape[1] + 2
        size: NDArray[np.int64] = (4 * counts * row + 12 * self.size) * np.arange(1, len(counts) + 1)
        return size

    def _batches(self, taken: _Taken, chunk: slice, schedule: Schedule, rng: np.random.Generator) -> Batches:
        rows = torch.from_numpy(taken.places(chunk, schedule.place))
        absent, longest = None, int(schedule.steps.max())
        if self.tower_dropout:
            shape = len(rows), longest, rows.shape[2]
            absent = torch.from_numpy(missing_sides(shape, self.tower_dropout, rng)).to(self.device)
        return Batches(
            self,
            torch.tensor([self.local.lr], device=self.device),
            rows.to(self.device),
            torch.from_numpy(schedule.weight).to(self.device),
            torch.from_numpy(schedule.steps).to(self.device),
            absent,
            longest,
        )

    def server_side(self, rows: Tensor) -> Tensor:
        """(n,) rows -> (n, a) embeddings of the frozen tower, or the encoded features of one that is trained."""
        if self.embeddings is not None:
            return self.embeddings.index_select(0, rows)
        features = self.columns.server(rows)
        if self.server_tower is None:
            return features
        with torch.no_grad():
            return self.server_tower(features)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Taken:
    """Which rows some users train with in a round.

    Attributes:
        users: (k,) those who have some.
        counts: (k,) how many each has.
        begin: (k,) where each one's are in `rows`, or, without, among all examples.
        rows: (n,) of all users that were asked for; None: each takes all of its own.
    """

    users: NDArray[np.int64]
    counts: NDArray[np.int64]
    begin: NDArray[np.int64]
    rows: NDArray[np.int64] | None

    def places(self, chunk: slice, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of a chunk's users, (c, ...) places among each one's own -> among all examples."""
        here = self.begin[chunk][:, None, None] + place
        return here if self.rows is None else self.rows[here]


@dataclass
class _Sum:
    """A clipped sum as it grows: see `ClippedSum`."""

    total: Tensor
    clip: float
    rounding: np.random.Generator | None = None  # of updates that travel in 8 bits
    below: int = 0
    above: int = 0

    def add(self, norm: Tensor, moved: Tensor) -> None:
        """Some users' moves in float64, (users, p), which it may change, and the norm of each."""
        norms = norm.cpu().numpy()  # of few numbers, where numpy's operations start sooner than torch's
        unusable = ~np.isfinite(norms)
        if unusable.any():
            norms[unusable] = 0.0
            moved[torch.from_numpy(unusable).to(moved.device)] = 0.0
        above = int(np.count_nonzero(norms > self.clip))
        self.below += int(np.count_nonzero(norms)) - above
        self.above += above
        scale = torch.from_numpy(self.clip / np.maximum(norms, self.clip)).to(moved.device)
        if self.rounding is None:
            self.total.addmv_(moved.T, scale)
        else:
            self._add_rounded(scale, moved, self.rounding)

    def _add_rounded(self, scale: Tensor, moved: Tensor, rng: np.random.Generator) -> None:
        """What an aggregator makes of clipped updates that were quantised on their devices."""
        at_once = max(1, ROUNDED // len(self.total))
        clipped = np.empty((at_once, len(self.total)), np.float32)
        for begin in range(0, len(scale), at_once):
            here = scale[begin : begin + at_once, None]
            clipped[: len(here)] = moved[begin : begin + at_once].mul_(here).cpu().numpy()
            arrived = dequantise(*quantise(clipped[: len(here)], rng))
            self.total += torch.from_numpy(clip_and_sum([arrived], len(self.total), self.clip).total).to(scale.device)


@dataclass(frozen=True)
class Batch:
    """The rows of one step of a chunk's users, one user's after another's.

    Attributes:
        inputs: of `DeviceSide.forward`, n = users x rows of each.
        labels: (n,).
        weight: (n,) of each row in its user's mean loss, times the user's rate; 0 where it is padding.
        rate: (users,) learning rate of this step; 0 for a user who does not take it.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    weight: Tensor
    rate: Tensor


@dataclass(frozen=True)
class Batches:
    """All steps of a chunk: of some people, from each of several starts, one start's after another's.

    Attributes:
        engine: whose examples.
        lrs: (starts,) learning rate of each.
        rows, weight: (people, s, m) see `Schedule`; rows are counted over all examples.
        steps: (people,) that each takes.
        absent: (people, steps, m, 2) which side's embedding is missing; None without tower dropout.
        longest: most of `steps`.
    """

    engine: Engine
    lrs: Tensor
    rows: Tensor
    weight: Tensor
    steps: Tensor
    absent: Tensor | None
    longest: int

    @property
    def users(self) -> int:
        """How many train: each person once from each start."""
        return len(self.lrs) * len(self.rows)

    @property
    def rows_a_step(self) -> int:
        """Of each user, padding included."""
        return self.rows.shape[2]

    def __len__(self) -> int:
        return self.longest

    def __iter__(self) -> Iterator[Batch]:
        """The steps' batches; what is cut of rows, rates and weights is cut once for all of them."""
        rows = self.rows.transpose(0, 1).flatten(1)
        rates = self.lrs[:, None] * (torch.arange(len(self), device=self.steps.device)[:, None, None] < self.steps)
        weights = (rates[..., None] * self.weight.transpose(0, 1)[:, None]).flatten(1)
        batch = None
        for step, (weight, rate) in enumerate(zip(weights, rates.flatten(1), strict=True)):
            if batch is None or len(rows) > 1 or self.absent is not None:
                batch = self._gather(rows[min(step, len(rows) - 1)], step, weight, rate)
            else:  # the same rows again
                batch = replace(batch, weight=weight, rate=rate)
            yield batch

    def _gather(self, rows: Tensor, step: int, weight: Tensor, rate: Tensor) -> Batch:
        columns = self.engine.columns
        inputs = [self.engine.server_side(rows), columns.device(rows)]
        if self.absent is not None:
            inputs.append(self.absent[:, step].flatten(0, 1))
        return Batch(tuple(map(self._each, inputs)), self._each(columns.labels(rows)), weight, rate)

    def _each(self, part: Tensor) -> Tensor:
        """What is the same for every start, once for each."""
        return part if len(self.lrs) == 1 else part.repeat(len(self.lrs), *[1] * (part.ndim - 1))


class Trainer(Protocol):
    """How a chunk of users is trained."""

    def __call__(self, flats: Tensor, batches: Batches, proximal: float) -> Moves:
        """How far each user moves.

        Args:
            flats: (starts, p) weights to start from.
            batches: of as many starts.
            proximal: see `LocalTraining`.

        Returns:
            Of (users, ...) parts, overwritten by the next chunk.
        """
        ...


@dataclass(frozen=True)
class LayerTrainer:
    """For modules whose parameters are all of `torch.nn.Linear`: rows of all users in one batch. The fast way."""

    module: UserModule

    def __call__(self, flats: Tensor, batches: Batches, proximal: float) -> Moves:
        """See `Trainer`."""
        chunk = Chunk(flats, batches.users, len(batches), batches.rows_a_step)
        for layer in self.module.layers:
            layer.begin(chunk)
        for chunk.step, batch in enumerate(batches):
            if proximal:
                chunk.pull = batch.rate * proximal
            self.module.descend(_loss(self.module.module(*batch.inputs), batch))
        return (move for layer in self.module.layers for move in layer.finish())


@dataclass(frozen=True)
class AnyTrainer:
    """For any module, by `torch.func`, from one start after another: several times slower."""

    module: nn.Module

    def __call__(self, flats: Tensor, batches: Batches, proximal: float) -> Moves:
        """See `Trainer`."""
        starts = zip(flats, batches.lrs, strict=True)
        moved = [self._from(flat, replace(batches, lrs=lr[None]), proximal) for flat, lr in starts]
        return [(0, [torch.cat(moved)])]

    def _from(self, flat: Tensor, batches: Batches, proximal: float) -> Tensor:
        named = dict(self.module.named_parameters())
        parts = torch.split(flat, [parameter.numel() for parameter in named.values()])
        start = {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}
        gradient = vmap(grad(self._loss))
        moved = {name: part.new_zeros(batches.users, *part.shape) for name, part in start.items()}
        for batch in batches:
            split = [
                part.reshape(batches.users, -1, *part.shape[1:]) for part in (*batch.inputs, batch.labels, batch.weight)
            ]
            here = {name: start[name] + value for name, value in moved.items()}
            left = 1 - batch.rate * proximal
            for name, slope in gradient(here, *split).items():
                moved[name] = moved[name] * left.view(-1, *[1] * (slope.ndim - 1)) - slope
        return torch.cat([value.flatten(1) for value in moved.values()], dim=1)

    def _loss(self, parameters: dict[str, Tensor], *batch: Tensor) -> Tensor:
        *inputs, labels, weight = batch
        logits = functional_call(self.module, parameters, tuple(inputs))
        return binary_cross_entropy_with_logits(logits, labels, weight, reduction="sum")


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    """The sum over users of each one's mean loss, times its rate."""
    return binary_cross_entropy_with_logits(logits, batch.labels, batch.weight, reduction="sum")


def _trainer(
    side: DeviceSide, examples: Examples, frozen: nn.Module | None, scratch: Scratch, device: torch.device
) -> Trainer:
    module = UserModule.of(side, scratch)
    server = torch.rand(2, examples.server.shape[1])
    with torch.no_grad():
        probe = [server if frozen is None else frozen(server), torch.rand(2, examples.device.shape[1])]
    if side.missing is not None:
        probe.append(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    if module is None or not module.does_what(side, *probe):
        return AnyTrainer(deepcopy(side).to(device))
    module.module.to(device)
    scratch.clear()  # it was tried on the CPU
    return LayerTrainer(module)


def device_named(name: str | torch.device) -> torch.device:
    """Raises: ConfigError: there is no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # of no such kind; not built for it, no driver, or no such number
        have = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ConfigError(f"device must be one that torch has here, {', '.join(have)}, got {str(name)!r}") from None
    return device


def chunk_size(device: torch.device) -> int:
    """Of a GPU's memory an eighth: the scratch in float64 takes twice a chunk.

    Of the CPU's last cache twice: with less, starting operations takes longest; with more, memory is waited for.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")  # Linux tells; elsewhere a common size
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in caches]
    return 2 * max([*sizes, 16 << 20])


@dataclass(frozen=True)
class _Column:
    """(n, ...) rows; those of a chunk are copied to where it trains, unless all of them are there."""

    values: Tensor
    device: torch.device

    def __call__(self, rows: Tensor) -> Tensor:
        return self.values.index_select(0, rows.to(self.values.device)).to(self.device)


@dataclass(frozen=True)
class _Columns:
    """The examples: on a GPU if they take no more than a share of its memory."""

    server: _Column
    device: _Column
    labels: _Column

    @classmethod
    def of(cls, examples: Examples, device: torch.device) -> _Columns:
        parts = [torch.from_numpy(part) for part in (examples.server, examples.device, examples.labels)]
        fit = device.type != "cuda" or sum(part.nbytes for part in parts) <= chunk_size(device)
        return cls(*(_Column(part.to(device) if fit else part, device) for part in parts))


def embed(tower: nn.Module, rows: Float32, device: torch.device | str = "cpu") -> Tensor:
    """Runs a tower over rows, some at a time, without gradients; it and what it gives are on `device`."""
    with torch.no_grad():
        return torch.cat([tower(part.to(device)) for part in torch.split(torch.from_numpy(rows), ROWS_A_PASS)])


def predict(network: Network, examples: Examples, *, without: Literal["server", "device"] | None = None) -> Float32:
    """(n,) probabilities by the network as it is; without a side, by its embedding for a missing one."""

    def probabilities(server: Tensor, device: Tensor) -> Tensor:
        a = network.missing_embedding("server", len(server)) if without == "server" else network.server_tower(server)
        b = network.missing_embedding("device", len(device)) if without == "device" else network.device_tower(device)
        return network.correction(network.head(a, b))  # type: ignore[no-any-return]

    server, device = (torch.split(torch.from_numpy(side), ROWS_A_PASS) for side in (examples.server, examples.device))
    with torch.no_grad():
        predictions: Float32 = torch.cat([probabilities(*part) for part in zip(server, device, strict=True)]).numpy()
    return predictions
