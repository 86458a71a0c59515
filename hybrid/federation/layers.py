"""Linear layers that hold a weight of their own for each user of a chunk.

The rows of all users run through a module as one batch, so that whatever else
is in it (activations, concatenations, sums) needs no batched form. Only where
a parameter enters do users differ: in `UserLinear`, which takes the place of
`torch.nn.Linear`. The same people may train from several starts at once, as
the configurations of a sweep do: a chunk's users are then those of the first
start, followed by those of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


class Scratch:
    """Memory that is used again and again: fresh pages from the system would cost more than the arithmetic in them."""

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}
        self._taken: dict[Any, Tensor] = {}

    def take(self, name: Any, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised; valid until the same name is taken again.

        Args:
            name: of the piece.
            shape: of the tensor.
            device: where it lies.
            dtype: of its numbers.
        """
        taken = self._taken.get(name)
        if taken is not None and taken.shape == shape:  # as a rule: a chunk is often like the one before
            return taken
        size = prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=dtype, device=device)
        self._taken[name] = self._held[name][:size].view(*shape)
        return self._taken[name]

    def clear(self) -> None:
        """Gives all of it back."""
        self._held.clear()
        self._taken.clear()


@dataclass(slots=True)
class Chunk:
    """What the layers share while one chunk of users trains.

    Attributes:
        flats: (starts, p) the weights to start from: the first users / starts of the users from the first, and so on.
        users: how many train, all starts together.
        steps: local steps of the chunk; all layers take them together.
        rows: of each user in a step.
        step: the one in progress, from 0.
        pull: (users,) how far a proximal term draws the weights back to their start in this step; None without one.
    """

    flats: Tensor
    users: int
    steps: int
    rows: int
    step: int = 0
    pull: Tensor | None = None


Moves = Iterable[tuple[int, Sequence[Tensor]]]
"""What users moved by, in parts: where each begins in the flat vector, and its (users, ...) float32, side by side."""


class Shared:
    """A layer's weights while users of one start have the same: in the first step, and the only one of a chunk of one.

    Args:
        chunk: what trains.
        first: (starts, out, in) the weights to start from.
        bias: (starts, out) and the bias; None for a layer without one.
        take: (name, shape) -> memory of this layer.
    """

    def __init__(
        self, chunk: Chunk, first: Tensor, bias: Tensor | None, take: Callable[[str, Sequence[int]], Tensor]
    ) -> None:
        self.chunk, self.users, self.first, self.first_bias = chunk, chunk.users, first, bias
        self.starts, *self.shape = first.shape
        # Contiguous, since torch multiplies into anything else one user at a time.
        self.weight = take("weight", (self.users, *self.shape))
        self.bias = take("bias", (self.users, self.shape[0]))
        self._first_t = first.mT
        self._only, self._only_bias = first[0], None if bias is None else bias[0]

    def outputs(self, rows: Tensor) -> Tensor:
        """(users, r, in) -> (users, r, out)."""
        if self.starts == 1:  # what every training but a sweep's does; backward, a view costs nothing and [0] a copy
            out = nn.functional.linear(rows.view(-1, self.shape[1]), self._only, self._only_bias)
        elif self.first_bias is None:
            out = torch.bmm(rows.view(self.starts, -1, self.shape[1]), self._first_t)
        else:
            together = rows.view(self.starts, -1, self.shape[1])
            out = torch.baddbmm(self.first_bias.unsqueeze(1), together, self._first_t)
        return out.view(self.users, -1, self.shape[0])

    def move(self, rows: Tensor, changes: Tensor) -> None:
        """Takes a step.

        Args:
            rows: (users, r, in) what the layer was given.
            changes: (users, r, out) -lr times the loss's gradient at what it gave.
        """
        self._step = rows, changes

    def finish(self) -> None:
        """Leaves in `weight` and `bias` what moved."""
        rows, changes = self._step
        torch.bmm(changes.mT, rows, out=self.weight)
        if self.first_bias is not None:
            torch.sum(changes, 1, out=self.bias)


class Whole(Shared):
    """Weights of each user, whole, from the second step on."""

    def outputs(self, rows: Tensor) -> Tensor:
        """See `Shared`."""
        if self.chunk.step == 0:
            return super().outputs(rows)
        if self.shape[0] == 1:  # backward, torch's product of a column and a row takes ten times as long as this one's
            out = (rows * self.weight).sum(2, keepdim=True)
            return out if self.first_bias is None else out + self.bias.unsqueeze(1)
        if self.first_bias is None:
            return torch.bmm(rows, self.weight.mT)
        return torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.mT)

    def move(self, rows: Tensor, changes: Tensor) -> None:
        """See `Shared`."""
        weight, bias = self._by_start()
        if self.chunk.step == 0:
            weight.copy_(self.first.unsqueeze(1))
            if self.first_bias is not None:
                bias.copy_(self.first_bias.unsqueeze(1))
        elif self.chunk.pull is not None:
            pull = self.chunk.pull.view(self.starts, -1, 1)
            weight.lerp_(self.first.unsqueeze(1), pull.unsqueeze(3))
            if self.first_bias is not None:
                bias.lerp_(self.first_bias.unsqueeze(1), pull)
        if self.shape[0] == 1:
            self.weight.add_((changes * rows).sum(1, keepdim=True))
        else:
            self.weight.baddbmm_(changes.mT, rows)
        if self.first_bias is not None:
            self.bias.add_(changes.sum(1))

    def finish(self) -> None:
        """See `Shared`."""
        weight, bias = self._by_start()
        weight -= self.first.unsqueeze(1)
        if self.first_bias is not None:
            bias -= self.first_bias.unsqueeze(1)

    def _by_start(self) -> tuple[Tensor, Tensor]:
        """Views of `weight` and `bias` as (starts, users of each, ...)."""
        return self.weight.view(self.starts, -1, *self.shape), self.bias.view(self.starts, -1, self.shape[0])


class Factored(Shared):
    """What moved as a sum over past rows of (change) x (input), never multiplied out before the end.

    With s steps of m rows it has rank s x m at most. While that is small, two
    thin matrices are less to read and write than a user's weights.
    """

    def __init__(
        self, chunk: Chunk, first: Tensor, bias: Tensor | None, take: Callable[[str, Sequence[int]], Tensor]
    ) -> None:
        super().__init__(chunk, first, bias, take)
        rank = chunk.steps * chunk.rows
        self._rows = take("rows", (self.users, rank, self.shape[1]))
        self._changes = take("changes", (self.users, rank, self.shape[0]))
        self._used = 0

    def outputs(self, rows: Tensor) -> Tensor:
        """See `Shared`."""
        out = super().outputs(rows)
        if self._used:
            past_rows, past_changes = self._past()
            out = torch.baddbmm(out, torch.bmm(rows, past_rows.mT), past_changes)
            if self.first_bias is not None:
                out = out + self.bias.unsqueeze(1)
        return out

    def move(self, rows: Tensor, changes: Tensor) -> None:
        """See `Shared`."""
        if self.chunk.pull is not None and self._used:
            left = 1 - self.chunk.pull
            self._changes[:, : self._used] *= left[:, None, None]
            self.bias *= left[:, None]
        here = slice(self._used, self._used + rows.shape[1])
        self._rows[:, here], self._changes[:, here] = rows, changes
        if self._used:
            self.bias.add_(changes.sum(1))
        else:
            torch.sum(changes, 1, out=self.bias)
        self._used = here.stop

    def finish(self) -> None:
        """See `Shared`."""
        past_rows, past_changes = self._past()
        torch.bmm(past_changes.mT, past_rows, out=self.weight)

    def _past(self) -> tuple[Tensor, Tensor]:
        return self._rows[:, : self._used], self._changes[:, : self._used]


class UserLinear(nn.Module):
    """A `torch.nn.Linear` with a weight for each user of a chunk, which steps by itself when told how to change.

    Args:
        linear: whose shape it has.
        begin: where its parameters begin in the flat vector, the weight before the bias.
        scratch: shared with the other layers.
    """

    def __init__(self, linear: nn.Linear, begin: int, scratch: Scratch) -> None:
        super().__init__()
        self._shape = (linear.out_features, linear.in_features)
        self._weight = slice(begin, begin + linear.weight.numel())
        self._bias = None if linear.bias is None else slice(self._weight.stop, self._weight.stop + linear.out_features)
        self._scratch = scratch
        # Each holds one thing while a chunk trains: lists, since attributes of a module are slow to set.
        self._now: list[Shared] = []
        self._given: list[Tensor] = []
        self._gave: list[Tensor] = []

    def begin(self, chunk: Chunk) -> None:
        """Starts from the chunk's weights."""
        first = chunk.flats[:, self._weight].view(-1, *self._shape)
        bias = None if self._bias is None else chunk.flats[:, self._bias]
        rank = chunk.steps * chunk.rows
        kind = Whole if rank * sum(self._shape) >= prod(self._shape) else Factored
        self._now[:] = [
            (Shared if chunk.steps == 1 else kind)(
                chunk, first, bias, lambda name, shape: self._scratch.take((self, name), shape, chunk.flats.device)
            )
        ]

    def forward(self, rows: Tensor) -> Tensor:
        """(users x r, ..., in) -> (users x r, ..., out), each user's rows by that user's weights."""
        now = self._now[0]
        by_user = rows.reshape(now.users, -1, rows.shape[-1])
        self._given[:] = [by_user.detach()]
        out = now.outputs(by_user)
        if not out.requires_grad:
            out.requires_grad_()  # nothing before this layer is trained
        self._gave[:] = [out]
        return out.view(*rows.shape[:-1], -1)

    @property
    def gave(self) -> Tensor:
        """What `forward` returned last, (users, r, out)."""
        return self._gave[0]

    def move(self, changes: Tensor) -> None:
        """Takes a step.

        Args:
            changes: (users, r, out) -lr times the loss's gradient at `gave`.
        """
        self._now[0].move(self._given.pop(), changes)
        self._gave.clear()

    def finish(self) -> Moves:
        """What moved; valid until the next chunk begins."""
        now = self._now.pop()
        now.finish()
        return [
            (self._weight.start, [now.weight.flatten(1)] if self._bias is None else [now.weight.flatten(1), now.bias])
        ]


@dataclass(frozen=True)
class UserModule:
    """A module whose every parameter belongs to a `UserLinear`.

    Attributes:
        module: what to call with the rows of all users.
        layers: its layers.
    """

    module: nn.Module
    layers: tuple[UserLinear, ...] = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module, scratch: Scratch) -> UserModule | None:
        """Puts `UserLinear` in the place of each `Linear` of a copy; None where other parameters would be left.

        The order of the flat vector is that of `module.parameters()`.
        """
        begins, place = {}, 0
        for name, parameter in module.named_parameters():
            begins[name] = place
            place += parameter.numel()
        linears = {name: part for name, part in module.named_modules() if type(part) is nn.Linear}
        owned = {f"{name}.{p}" for name, part in linears.items() for p, _ in part.named_parameters()}
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in linears.values())
        if owned != set(begins) or hooked:
            return None
        copy, layers = deepcopy(module), []
        for name, linear in linears.items():
            layer = UserLinear(linear, begins[f"{name}.weight"], scratch)
            holder, _, attribute = name.rpartition(".")
            setattr(copy.get_submodule(holder), attribute, layer)
            layers.append(layer)
        if next(copy.parameters(), None) is not None:  # one Linear under two names
            return None
        return cls(copy, tuple(layers))

    def does_what(self, module: nn.Module, *inputs: Tensor) -> bool:
        """Whether it gives the same as `module`, running each layer once: else a layer would step twice, or not.

        Args:
            module: what it was made of.
            inputs: of a few rows.
        """
        flat = nn.utils.parameters_to_vector(module.parameters()).detach()
        chunk = Chunk(flat[None], users=1, steps=1, rows=len(inputs[0]))
        calls: list[nn.Module] = []
        hooks = [layer.register_forward_pre_hook(lambda layer, _: calls.append(layer)) for layer in self.layers]
        try:
            for layer in self.layers:
                layer.begin(chunk)
            alike = torch.allclose(self.module(*inputs), module(*inputs), atol=1e-5)
        except AttributeError:  # reads a weight without calling its layer
            return False
        finally:
            for hook in hooks:
                hook.remove()
        return alike and sorted(map(id, calls)) == sorted(map(id, self.layers))

    def descend(self, loss: Tensor) -> None:
        """One gradient step of every layer.

        Args:
            loss: () sum over users, each one's times its learning rate.
        """
        # Not by grad_outputs: for those, torch first imports what it compiles with, a quarter of a second.
        changes = torch.autograd.grad(-loss, [layer.gave for layer in self.layers])
        with torch.no_grad():
            for layer, change in zip(self.layers, changes, strict=True):
                layer.move(change)
