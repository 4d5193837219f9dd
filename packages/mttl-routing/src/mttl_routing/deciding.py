"""What holds for the rows of a batch: found where an earlier step left it, or made from the prompt.

A router that decides for a whole row is asked once, at the prompt; ``decided.py`` carries what it
said from there on.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mttl_routing.call import Scope, scope_of, scoped
from mttl_routing.decided import Decided, cache_among, in_cache, on_states
from mttl_routing.roster import Roster
from mttl_routing.routers import Prompt


class Decisions:
    """Those of one router for the rows that one base model is given.

    Args:
        owner: whose scopes hold here (``call.py``).
        model: the base.
        router: what decides.
        tokenizer: for routers that read the prompt's text.
    """

    def __init__(self, owner: object, model: Any, router: Any, tokenizer: Any) -> None:
        """Nothing is decided yet."""
        self._owner = owner
        self._model = model
        self._router = router
        self._tokenizer = tokenizer
        self._by_row = callable(getattr(router, "decide", None))
        coder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._reader = model.get_encoder() if coder else model

    def of(self, scope: Scope, roster: Roster, inputs: Mapping[str, Any]) -> Decided | None:
        """What was decided for the rows of this batch before, or else what is decided now."""
        generation, states = scope.generation, _states(inputs)
        found = in_cache(cache_among(inputs)) or on_states(states)
        if found is None and scope.tasks is None and not self._by_row:
            return None
        before = None if generation is None else generation.decided
        tasks = scope.tasks if before is None else None  # later steps have them from the first
        found = found or before
        rows = first(*map(inputs.get, ("input_ids", "inputs_embeds", "decoder_input_ids")), states)
        count = None if rows is None else rows.shape[0]
        if found is not None and (tasks is not None and found.tasks not in (None, tasks)):
            found = None
        if found is None or (self._by_row and found.gates is None):
            found = self._anew(scope, roster, inputs, tasks if found is None else found.tasks)
        if tasks is not None:
            found = replace(found, tasks=tasks)
        if generation is not None and generation.decided is None:
            generation.decided = found
        return _for_rows(found.in_columns(roster.names), count, generation is not None)

    def _anew(self, scope: Scope, roster: Roster, inputs: Mapping[str, Any], tasks: Any) -> Decided:
        if not self._by_row:
            return Decided(roster.names, None, tasks)
        ids = inputs.get("input_ids")
        if ids is None:
            what = "encoder_outputs alone" if _states(inputs) is not None else "embeddings alone"
            raise ValueError(
                f"this router decides by the prompt's input_ids, and the call gives {what}; give "
                "input_ids, or let the routed model's own generate do the whole"
            )
        mask = token_mask(inputs.get("attention_mask"), ids)
        generation = scope.generation
        if generation is not None and generation.ids is not None:
            whole = generation.ids
            if ids.shape[1] < whole.shape[1]:  # the first chunk of a long prompt
                ids, mask = whole, token_mask(generation.mask, whole)
            else:  # expanded for beams and several sequences, followed by an assistant's tokens
                times = max(1, ids.shape[0] // whole.shape[0])
                ids, mask = (given[::times, : whole.shape[1]] for given in (ids, mask))
        prompt = Prompt(
            ids, mask, tasks, roster.names, roster.columns, self._tokenizer,
            partial(self._observe, ids, mask),
        )  # fmt: skip
        gates = self._router.decide(prompt)
        wanted = (ids.shape[0], len(roster.names))
        if gates.shape != wanted:
            raise ValueError(
                f"the router decided gates {tuple(gates.shape)}; this model wants {wanted}, one "
                "line a row of the prompt and one column an expert"
            )
        if roster.columns:
            gates = gates.clone()
            gates[:, sorted(roster.columns)] = 0.0
        return Decided(roster.names, gates, tasks)

    @torch.no_grad()
    def _observe(self, ids: Tensor, mask: Tensor, modules: Sequence[str]) -> dict[str, Tensor]:
        """Inputs (b, s, i) of some modules as the base alone sees a prompt, by one forward."""
        seen: dict[str, Tensor] = {}
        thread = scope_of(self._owner)
        inner = replace(thread, bare=True)

        def see(path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if scope_of(self._owner) is inner:  # not a forward of another thread
                seen[path] = args[0] if args else next(iter(kwargs.values()))

        handles = [
            self._model.get_submodule(path).register_forward_pre_hook(
                partial(see, path), with_kwargs=True
            )
            for path in modules
        ]
        try:
            with scoped(self._owner, inner):
                self._run_prompt(ids, mask)
        finally:
            for handle in handles:
                handle.remove()
        unseen = [path for path in modules if path not in seen]
        if unseen:
            raise ValueError(f"module {unseen[0]!r} is not reached by the prompt in the base model")
        return seen

    def _run_prompt(self, ids: Tensor, mask: Tensor) -> None:
        known = inspect.signature(self._reader.forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in known:  # so that padding on the left changes nothing
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in known:
            inputs["use_cache"] = False
        self._reader(**inputs)


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _states(inputs: Mapping[str, Any]) -> Tensor | None:
    """An encoder's output among a model's inputs."""
    outputs = inputs.get("encoder_outputs")
    states: Tensor | None = None if outputs is None else outputs[0]
    return states


def token_mask(mask: Any, ids: Tensor) -> Tensor:
    """(b, s), 1 where a token counts, whatever form the model was given its mask in."""
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = next(iter(mask.values()))
    if mask is None:
        return torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            "this router reads the prompt, so it needs attention_mask as (b, s) or (b, 1, s, s), "
            f"and got a {type(mask).__name__}"
        )
    if mask.dim() == 4:  # the last token sees all that are no padding
        row = mask[:, 0, -1, : ids.shape[1]]
        return (row if row.dtype == torch.bool else row == 0).long()
    return mask[:, -ids.shape[1] :]


def _for_rows(decided: Decided, count: int | None, expand: bool) -> Decided:
    """For the rows of a batch, which in ``generate`` may be several for each of the prompt."""
    own = decided.count
    if own is None or count is None or own == count:
        return decided
    if expand and own and count % own == 0:
        return decided.repeated(count // own)
    what = "tasks are named" if isinstance(decided.tasks, tuple) else "experts were chosen"
    raise ValueError(f"{what} for {own} rows, the batch has {count}")
