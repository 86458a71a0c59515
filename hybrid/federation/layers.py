"""Linear layers that hold a weight of their own for each user of a chunk.

The rows of all users run through a module as one batch, so that whatever else
is in it (activations, concatenations, sums) needs no batched form. Only where
a parameter enters do users differ: in `UserLinear`, which takes the place of
`torch.nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Scratch:
    """Memory that is used again and again: fresh pages from the system would cost more than the arithmetic in them."""

    def __init__(self) -> None:
        self._held: dict[Any, Tensor] = {}

    def take(self, name: Any, shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised; valid until the same name is taken again.

        Args:
            name: of the piece.
            shape: of the tensor.
            like: on whose device it lies.
            dtype: of its numbers.
        """
        size = prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=dtype, device=like.device)
        return self._held[name][:size].view(*shape)


@dataclass
class Chunk:
    """What the layers share while one chunk of users trains.

    Attributes:
        flat: (p,) the weights that every user starts from.
        moved: (users, p) what each user's weights became, minus `flat`, once every layer has finished.
        steps: local steps of the chunk; all layers take them together.
        rows: of each user in a step.
        step: the one in progress, from 0.
        pull: (users,) how far a proximal term draws the weights back to `flat` in this step; None without one.
    """

    flat: Tensor
    moved: Tensor
    steps: int
    rows: int
    step: int = 0
    pull: Tensor | None = None

    @property
    def users(self) -> int:
        """How many train."""
        return len(self.moved)


@dataclass
class Factors:
    """A layer's update while it stays factored: the sum over past rows of (gradient row) x (input row).

    With s steps of m rows an update has rank s x m at most. While that is small,
    two thin matrices are less to read and write than the layer's weights.

    Attributes:
        inputs: (users, steps x rows, in), filled step by step.
        changes: (users, steps x rows, out), each -lr times the loss's gradient at that row's output.
        bias: (users, out) sum of the changes.
        used: rows filled so far, of each user.
    """

    inputs: Tensor
    changes: Tensor
    bias: Tensor
    used: int = 0


class UserLinear(nn.Module):
    """A `torch.nn.Linear` with a weight for each user of a chunk, which takes a gradient step in its backward pass.

    The first step needs no weights of users, since all start from the same ones.
    After it a layer either keeps whole weights, or, where that is less memory,
    `Factors`.

    Args:
        linear: whose shape it has.
        weight, bias: where its parameters begin in the flat vector; None for a layer without bias.
        scratch: shared with the other layers.
    """

    def __init__(self, linear: nn.Linear, weight: int, bias: int | None, scratch: Scratch) -> None:
        super().__init__()
        self.width_in, self.width_out = linear.in_features, linear.out_features
        self.place, self.bias_place, self._scratch = weight, bias, scratch

    def begin(self, chunk: Chunk) -> None:
        """Starts from the chunk's weights."""
        size = self.width_in * self.width_out
        shape = (self.width_out, self.width_in)
        self.chunk = chunk
        self.first = chunk.flat[self.place : self.place + size].view(*shape)
        self.weight = chunk.moved[:, self.place : self.place + size].view(chunk.users, *shape)
        self.first_bias = self.bias = None
        if self.bias_place is not None:
            here = slice(self.bias_place, self.bias_place + self.width_out)
            self.first_bias, self.bias = chunk.flat[here], chunk.moved[:, here]
        self.factors: Factors | None = None
        rank = chunk.steps * chunk.rows
        if chunk.steps > 1 and rank * (self.width_in + self.width_out) < size:
            take = self._scratch.take
            self.factors = Factors(
                take((self, "inputs"), (chunk.users, rank, self.width_in), chunk.flat),
                take((self, "changes"), (chunk.users, rank, self.width_out), chunk.flat),
                take((self, "bias"), (chunk.users, self.width_out), chunk.flat).zero_(),
            )

    def forward(self, rows: Tensor) -> Tensor:
        """(users x r, in) -> (users x r, out), each user's rows by that user's weights."""
        result: Tensor = _Step.apply(rows, _anchor(rows), self)
        return result

    def outputs(self, rows: Tensor) -> Tensor:
        """What `forward` computes."""
        self._input = rows.reshape(self.chunk.users, -1, self.width_in)
        flat_rows = rows.reshape(-1, self.width_in)
        if self.chunk.step == 0 or self.factors:
            if self.first_bias is None:
                out = flat_rows @ self.first.T
            else:
                out = torch.addmm(self.first_bias, flat_rows, self.first.T)
            if self.factors and self.chunk.step:
                self._add_moved(self.factors, out.view(self.chunk.users, -1, self.width_out))
        elif self.bias is None:
            out = torch.bmm(self._input, self.weight.mT)
        else:
            out = torch.baddbmm(self.bias.unsqueeze(1), self._input, self.weight.mT)
        return out.view(*rows.shape[:-1], self.width_out)

    def _add_moved(self, factors: Factors, out: Tensor) -> None:
        past = slice(0, factors.used)
        out.baddbmm_(torch.bmm(self._input, factors.inputs[:, past].mT), factors.changes[:, past])
        if self.first_bias is not None:
            out.add_(factors.bias.unsqueeze(1))

    def backward(self, change: Tensor, needs_input: bool) -> Tensor | None:
        """Takes the step.

        Args:
            change: (users x r, out) -lr times the loss's gradient.
            needs_input: whether anything before this layer is trained.

        Returns:
            (users x r, in) -lr times the loss's gradient at the input, where needed.
        """
        changes = change.reshape(self.chunk.users, -1, self.width_out)
        before = self._input_change(changes, change.shape) if needs_input else None
        if self.factors:
            self._keep(self.factors, changes)
        else:
            self._move(changes)
        return before

    def _input_change(self, changes: Tensor, shape: torch.Size) -> Tensor:
        if self.chunk.step == 0 or self.factors:
            before = (changes.view(-1, self.width_out) @ self.first).view(self.chunk.users, -1, self.width_in)
            if self.factors and self.chunk.step:
                past = slice(0, self.factors.used)
                before.baddbmm_(torch.bmm(changes, self.factors.changes[:, past].mT), self.factors.inputs[:, past])
        else:
            before = torch.bmm(changes, self.weight)
        return before.view(*shape[:-1], self.width_in)

    def _keep(self, factors: Factors, changes: Tensor) -> None:
        here = slice(factors.used, factors.used + changes.shape[1])
        if self.chunk.pull is not None and self.chunk.step:
            left = 1 - self.chunk.pull
            factors.changes[:, : factors.used] *= left[:, None, None]
            factors.bias *= left[:, None]
        factors.inputs[:, here], factors.changes[:, here] = self._input, changes
        factors.bias += changes.sum(1)
        factors.used = here.stop

    def _move(self, changes: Tensor) -> None:
        """In the first step of several `moved` becomes whole weights; `finish` takes the start away again."""
        if self.chunk.steps == 1:
            torch.bmm(changes.mT, self._input, out=self.weight)
        elif self.chunk.step == 0:
            torch.baddbmm(self.first, changes.mT, self._input, out=self.weight)
        else:
            if self.chunk.pull is not None:
                self.weight.lerp_(self.first, self.chunk.pull[:, None, None])
            self.weight.baddbmm_(changes.mT, self._input)
        if self.bias is None or self.first_bias is None:
            return
        if self.chunk.step == 0:
            torch.sum(changes, 1, out=self.bias)
            if self.chunk.steps > 1:
                self.bias += self.first_bias
        else:
            if self.chunk.pull is not None:
                self.bias.lerp_(self.first_bias, self.chunk.pull[:, None])
            self.bias += changes.sum(1)

    def finish(self) -> None:
        """Writes what moved into the chunk."""
        if self.factors:
            past = slice(0, self.factors.used)
            torch.bmm(self.factors.changes[:, past].mT, self.factors.inputs[:, past], out=self.weight)
            if self.bias is not None:
                self.bias.copy_(self.factors.bias)
        elif self.chunk.steps > 1:
            self.weight -= self.first
            if self.bias is not None and self.first_bias is not None:
                self.bias -= self.first_bias
        del self._input


class _Step(Function):
    """The seam to autograd: its backward pass is where a layer learns how its output should change."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, layer: UserLinear) -> Tensor:
        ctx.layer = layer
        return layer.outputs(rows)

    @staticmethod
    def backward(ctx: Any, *changes: Any) -> Any:
        return ctx.layer.backward(changes[0], ctx.needs_input_grad[0]), None, None


def _anchor(like: Tensor) -> Tensor:
    """What autograd is asked the gradient of, so that it visits every layer; it has none."""
    return _ANCHORS.setdefault(like.device, torch.zeros((), device=like.device, requires_grad=True))


_ANCHORS: dict[torch.device, Tensor] = {}


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
            layer = UserLinear(linear, begins[f"{name}.weight"], begins.get(f"{name}.bias"), scratch)
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
        chunk = Chunk(flat, torch.empty(1, len(flat), device=flat.device), steps=1, rows=len(inputs[0]))
        calls: list[UserLinear] = []
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

    def descend(self, loss: Tensor, lr: float) -> None:
        """One gradient step of every layer.

        Args:
            loss: () sum over users.
            lr: learning rate.
        """
        scale = torch.full((), -lr, device=loss.device)
        torch.autograd.grad(loss, _anchor(loss), scale, allow_unused=True)
