"""Each token to the experts that change it most: SpectR and SeqR, by the norm of s_e B_e A_e x.

SpectR (https://arxiv.org/abs/2504.03454) reads the norm from the spectral form, SeqR
(https://arxiv.org/abs/2509.18093) from the R of a QR of B; both are the same number, and R is what
is kept here. Where experts share one A, as SeqR's do, A x is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen
from mttl_experts import Expert, lora_modules
from mttl_routing.routers.choice import Choice
from mttl_routing.routers.data import Batch, watch
from mttl_routing.routers.protocol import Layer, Rows

RECIPE = {"kind": "norm-factors", "format": 1}
CALIBRATION = {"kind": "norm-calibration", "format": 1}
# Tokens at a time: A x of every expert is (t, R).
_TOKENS = 512

Factors = Mapping[str, Tensor]


def norm_factors(expert: Expert) -> dict[str, Tensor]:
    """R of a QR of s·B, so that ‖R A x‖ is the norm of what the expert adds.

    Returns:
        (min(o, r), r) float32 by module path.
    """
    return {
        path: torch.linalg.qr(f.scaling * f.b.double(), mode="r").R.float()
        for path, f in lora_modules(expert).items()
    }


def calibration(base: object, expert: Expert, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean and standard deviation of an expert's norms on data, module by module.

    Args:
        base: the base model, bare or from ``load_base_model``; the expert is put in meanwhile.
        expert: whose norms are taken.
        batches: data, at least one batch; see :data:`~mttl_routing.routers.data.Batch`.

    Returns:
        (2,) float32 by module path: mean, and standard deviation.
    """
    factors, modules = norm_factors(expert), lora_modules(expert)
    seen: dict[str, list[Tensor]] = {}

    def see(module: str, x: Tensor) -> None:
        hidden = x.float() @ modules[module].a.to(x.device, torch.float32).T
        norms = (hidden @ factors[module].to(x.device).T).norm(dim=1)
        seen.setdefault(module, []).append(norms.double().cpu())

    watch(base, expert, batches, see)
    return {
        module: torch.stack([torch.cat(norms).mean(), torch.cat(norms).std(correction=0)]).float()
        for module, norms in seen.items()
    }


class NormRouter:
    """Scores ‖s_e B_e A_e x‖, less the expert's own mean and over its own deviation if calibrated.

    Experts that leave a layer alone are not chosen in it.

    Args:
        factors: :func:`norm_factors` of each expert, by expert name.
        choice: how scores become gates.
        calibrations: :func:`calibration` of each expert, by expert name; None compares the norms
            as they are.
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        choice: Choice | None = None,
        calibrations: Mapping[str, Factors] | None = None,
    ) -> None:
        """Keep the factors; they are stacked when a layer first asks."""
        self.choice = Choice() if choice is None else choice
        self._factors = dict(factors)
        self._calibrations = None if calibrations is None else dict(calibrations)

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """(t, k) experts, the best first, and their weights."""
        columns = layer.once(
            (self, "columns", x.device), lambda: torch.tensor(layer.present, device=x.device)
        )
        return self.choice.of(self.scores(x, layer), columns.long())

    def scores(self, x: Tensor, layer: Layer) -> Tensor:
        """(t, n), a column for each of ``layer.present``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if not layer.present:
            return wide.new_zeros(len(x), 0)
        norms = torch.cat([self._norms(part, layer) for part in torch.split(wide, _TOKENS)])
        if self._calibrations is None:
            return norms
        mean, deviation = layer.once((self, "calibration", x.device), lambda: self._stats(layer, x))
        return (norms - mean) / deviation

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Take up the factors of new experts, and forget those of others."""
        if added and self._calibrations is not None:
            raise ValueError(
                f"calibrated norms need data of expert {added[0].name!r} before they can route to "
                "it; make the routed model anew, with its batches"
            )
        kept = {name: f for name, f in self._factors.items() if name not in set(removed)}
        self._factors = kept | {expert.name: norm_factors(expert) for expert in added}

    def _norms(self, x: Tensor, layer: Layer) -> Tensor:
        """(t, n) norms of what each present expert adds."""
        norms = x.new_empty(len(x), len(layer.present))
        for places, a, factors in layer.once(
            (self, "groups", x.device), lambda: self._groups(layer, x)
        ):
            hidden = (x @ a.to(x.dtype).T).view(len(x), -1, factors.shape[2])  # (t, n or 1, r)
            if hidden.shape[1] == 1:  # one A for all
                updates = torch.einsum("tr,nkr->tnk", hidden[:, 0], factors.to(x.dtype))
            else:
                updates = torch.einsum("tnr,nkr->tnk", hidden, factors.to(x.dtype))
            norms[:, places] = updates.norm(dim=2)
        return norms

    def _groups(self, layer: Layer, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By rank: which present experts, their A (n·r, i) or the one they share, R (n, k, r)."""
        found = list(layer.bank.factors())
        by_rank: dict[int, list[int]] = {}
        for place, column in enumerate(layer.present):
            by_rank.setdefault(layer.bank.ranks[column], []).append(place)
        groups = []
        for places in by_rank.values():
            columns = [layer.present[place] for place in places]
            a = [found[column][0] for column in columns]
            shared = all(torch.equal(each, a[0]) for each in a[1:])
            factors = [self._factors[layer.experts[column]][layer.module] for column in columns]
            groups.append(
                (
                    torch.tensor(places, device=x.device),
                    (a[0] if shared else torch.cat(a)).to(x.device),
                    torch.stack(factors).to(x.device),
                )
            )
        return groups

    def _stats(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (n,) of each present expert."""
        calibrations = self._calibrations or {}
        names = [layer.experts[column] for column in layer.present]
        stats = torch.stack([calibrations[name][layer.module] for name in names]).to(x.device)
        return stats[:, 0], stats[:, 1].clamp_min(torch.finfo(torch.float32).tiny)
