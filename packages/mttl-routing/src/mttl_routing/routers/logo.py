"""LoGo (https://arxiv.org/abs/2511.07129): each row to the experts that its prompt moves most.

Needs no data and no training. At one projection of the base, the queries of its last block, every
expert's update o_e = s_e B_e A_e h is taken of the prompt's last token; its norm, or the inverse of
the entropy of softmax(o_e), is the expert's score, and the best share the row in proportion to it.

h is what the projection reads in the base alone. The paper's own program takes the block's input
before its norm instead, with every adapter attached at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mttl_experts import Expert, LoraFactors, lora_modules
from mttl_routing.routers.nearest import check_top_k
from mttl_routing.routers.protocol import Prompt

SIGNALS = ("norm", "entropy")
# How architectures name the projection to queries, where it is one of its own.
_QUERIES = ("q_proj", "query", "q_lin", "wq", "q")
_LEAST_ENTROPY = 1e-6


class Logo:
    """The ``top_k`` experts of the highest signal, weighted by signal / sum of those.

    An expert that leaves the projection alone gives no signal and is not chosen.

    Args:
        experts: whose factors at the projection are kept.
        signal: ``norm`` or ``entropy``.
        top_k: experts that a row gets; all that give a signal, where there are fewer.
        module: path of the projection; None is that of the last block's queries, an encoder's
            where the model has an encoder.
    """

    def __init__(
        self,
        experts: Iterable[Expert],
        *,
        signal: str = "norm",
        top_k: int = 20,
        module: str | None = None,
    ) -> None:
        """Take each expert's factors at the projection."""
        if signal not in SIGNALS:
            raise ValueError(f"signal is {signal!r}; it takes {' or '.join(map(repr, SIGNALS))}")
        self.signal = signal
        self.top_k = check_top_k(top_k)
        table = {expert.name: lora_modules(expert) for expert in experts}
        paths = sorted(set().union(*table.values()))
        self.module = last_queries(paths) if module is None else module
        self._factors = {
            name: own[self.module] for name, own in table.items() if self.module in own
        }
        if not self._factors:
            raise ValueError(f"no expert adapts {self.module!r}; name a module that some do adapt")

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Take the factors of new experts, and forget those of others."""
        kept = {name: f for name, f in self._factors.items() if name not in set(removed)}
        for expert in added:
            modules = lora_modules(expert)
            if self.module in modules:
                kept[expert.name] = modules[self.module]
        self._factors = kept

    def decide(self, prompt: Prompt) -> Tensor:
        """(b, e), the same for all tokens of a row and in every layer."""
        factors = self._factors  # one state, should another thread change the experts meanwhile
        hidden = _last_tokens(prompt.activations([self.module])[self.module], prompt.attention_mask)
        columns = [c for c in prompt.enabled if prompt.experts[c] in factors]
        gates = hidden.new_zeros(len(hidden), len(prompt.experts), dtype=torch.float32)
        if not columns:
            return gates
        signals = [self._signal(hidden, factors[prompt.experts[column]]) for column in columns]
        top = torch.stack(signals, dim=1).topk(min(self.top_k, len(columns)), dim=1)
        shares = top.values / top.values.sum(1, keepdim=True).clamp_min(torch.finfo().tiny)
        places = torch.tensor(columns, device=gates.device)[top.indices]
        return gates.scatter(1, places, shares)

    def _signal(self, hidden: Tensor, factors: LoraFactors) -> Tensor:
        """(b,) score of one expert."""
        a = factors.a.to(hidden.device, torch.float32)
        b = factors.b.to(hidden.device, torch.float32)
        update = factors.scaling * (hidden @ a.T) @ b.T  # (b, o)
        if self.signal == "norm":
            norm: Tensor = torch.linalg.vector_norm(update, dim=1)
            return norm
        logs = update.log_softmax(dim=1)
        entropy = -(logs.exp() * logs).sum(1)
        return entropy.clamp_min(_LEAST_ENTROPY).reciprocal()


def last_queries(modules: Sequence[str]) -> str:
    """Path of the projection to queries in the last block.

    Raises:
        ValueError: when none of the modules is one.
    """
    queries = [path for path in modules if path.rpartition(".")[2].lower() in _QUERIES]
    # A prompt is read by the encoder, where there is one.
    queries = [path for path in queries if "encoder" in path.split(".")] or queries
    if not queries:
        raise ValueError(
            "the experts adapt no projection to queries alone, whose updates LoGo reads; name "
            f"another module of theirs, such as module={modules[-1]!r}"
        )
    return max(queries, key=lambda path: [int(number) for number in re.findall(r"\d+", path)])


def _last_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """(b, i) float32 of each row's last token that counts, of (b, s, i)."""
    places = torch.arange(mask.shape[1], device=states.device)
    last = (mask.to(states.device) > 0).long().mul(places).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last].float()
