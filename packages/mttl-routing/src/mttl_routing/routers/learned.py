"""What learned routers share: parameters by module path and expert name, and gates from scores.

Their parameters are drawn from a seed, and come to mean something by :func:`mttl_routing.train`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mttl_adapters.chosen import Chosen
from mttl_experts import Expert, lora_modules
from mttl_routing.routers.choice import Choice
from mttl_routing.routers.protocol import Layer, Rows


def widths_of(experts: Iterable[Expert]) -> dict[str, int]:
    """Size of the input of each module that some expert adapts, by module path, sorted."""
    found = {path: f.a.shape[1] for expert in experts for path, f in lora_modules(expert).items()}
    return dict(sorted(found.items()))


class Parameters(nn.ParameterDict):
    """One parameter for each module path, whose dots torch does not allow in a name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        """Keep the values, by module path."""
        super().__init__({path.replace(".", "/"): value for path, value in values.items()})

    def of(self, path: str) -> Tensor:
        """The parameter of a module."""
        value: Tensor = self[path.replace(".", "/")]
        return value


class Draw:
    """Initial values, the same from the same seed."""

    def __init__(self, seed: int) -> None:
        """Begin."""
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers whose products with a vector are about as large as its numbers."""
        return torch.randn(shape, generator=self._generator) / math.sqrt(max(1, shape[-1]))


def together(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """x and some parameters on its device, all in the widest dtype among them."""
    dtype = x.dtype
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return tuple(value.to(x.device, dtype) for value in (x, *values))


class LearnedRouter(nn.Module):
    """Knows its experts by name, so that their columns may come in any order.

    An expert replaced under its name keeps what was learned for that name; one that is added has
    nothing yet, so it is refused.

    Args:
        names: of the experts.
    """

    per_expert: tuple[str, ...] = ()
    """Attributes whose parameters, one for each module, have a line for each expert."""

    def __init__(self, names: Sequence[str]) -> None:
        """Keep the names."""
        super().__init__()
        self.names = tuple(names)
        self.eval()  # as a loaded base is

    def line(self, name: str) -> int:
        """Which of this router's experts has that name.

        Raises:
            ValueError: none has.
        """
        if name not in self.names:
            raise ValueError(
                f"this {type(self).__name__} router has learned nothing for expert {name!r}; make "
                "the routed model anew with all its experts, and train its router"
            )
        return self.names.index(name)

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Forget experts that are gone, and keep what was learned for those that are replaced.

        Raises:
            ValueError: there is nothing learned for an expert that joins.
        """
        for expert in added:
            self.line(expert.name)
        gone = set(removed) - {expert.name for expert in added}
        kept = [n for n, name in enumerate(self.names) if name not in gone]
        self.names = tuple(self.names[n] for n in kept)
        for attribute in self.per_expert:
            for parameter in getattr(self, attribute).values():
                parameter.data = self.of_experts(parameter.data, kept)

    def of_experts(self, parameter: Tensor, lines: Sequence[int]) -> Tensor:
        """What a parameter has for some of the experts."""
        return parameter[list(lines)]


class ScoringRouter(LearnedRouter, ABC):
    """Makes a :class:`Choice` by the learned scores of the experts that change a layer.

    Args:
        names: of the experts.
        widths: size of the input of each module that they adapt, by module path.
        choice: how scores become gates.
        hidden: size of what is compared, or lies between two maps.
        seed: of the initial values.
    """

    def __init__(
        self,
        names: Sequence[str],
        widths: Mapping[str, int],
        choice: Choice | None = None,
        *,
        hidden: int = 64,
        seed: int = 0,
    ) -> None:
        """Keep the names and the choice, and draw the parameters."""
        super().__init__(names)
        self.choice = Choice() if choice is None else choice
        self.begin(widths, hidden, Draw(seed))

    @abstractmethod
    def begin(self, widths: Mapping[str, int], hidden: int, draw: Draw) -> None:
        """Draw the parameters."""

    @abstractmethod
    def scores(self, x: Tensor, layer: Layer) -> Tensor:
        """(t, n) of the experts ``layer.present``, in float32 at least, the higher the better."""

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """(t, k) experts, the best first, and their weights."""
        return self.choice.of(self._scores(x, layer, rows), self.columns(layer, x.device))

    def probabilities(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(t, e), the softmax over all scores, before any expert is left out."""
        shares = (self._scores(x, layer, rows) / self.choice.temperature).softmax(dim=1)
        spread = shares.new_zeros(len(x), len(layer.experts))
        return spread.index_copy(1, self.columns(layer, x.device), shares)

    def columns(self, layer: Layer, device: torch.device) -> Tensor:
        """(n,) columns of the experts that stand to choice in a layer."""
        return layer.once(
            (self, "columns", device),
            lambda: torch.tensor(layer.present, dtype=torch.int64, device=device),
        )

    def lines(self, layer: Layer, device: torch.device) -> Tensor:
        """(n,) which of this router's experts those are."""
        return layer.once(
            (self, "lines", device),
            lambda: torch.tensor(
                [self.line(layer.experts[column]) for column in layer.present],
                dtype=torch.int64,
                device=device,
            ),
        )

    def _scores(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        return rows.once((self, "scores", layer.module), lambda: self.scores(x, layer))
