"""LORAUTER (https://arxiv.org/abs/2601.21795): each row to the experts of the tasks most like it.

A task is the mean embedding of a small set of its prompts, a validation set, so what the experts
were trained on is not needed. The paper embeds by a sentence encoder trained for this; the base's
own embeddings are the default here, and an encoder of the user's own takes their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mttl_experts import Expert
from mttl_routing.routers.embedding import Embedding, Encoder, Example, embedding_of, taken
from mttl_routing.routers.nearest import (
    Nearest,
    centroids_of,
    check_temperature,
    check_top_k,
    named,
    shares,
)
from mttl_routing.routers.protocol import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel
    from mttl_experts import ExpertLibrary


class Lorauter:
    """The ``top_k`` tasks of highest cosine, weighted by softmax(cosine / T) over those.

    A task's weight goes to its expert, and in equal parts to several. Tasks none of whose experts
    can be chosen are passed over.

    Args:
        nearest: centroids of the tasks, by their names.
        experts: names of each task's experts.
        top_k: tasks that a row draws on.
        temperature: T.
    """

    def __init__(
        self,
        nearest: Nearest,
        experts: Mapping[str, Sequence[str]],
        *,
        top_k: int = 3,
        temperature: float = 0.2,
    ) -> None:
        """Keep what each task is known by, and whose it is."""
        alone = [task for task in nearest.names if not experts.get(task)]
        if alone:
            raise ValueError(
                f"tasks {alone[:5]!r} have no expert; leave them out, or name one in `pairs`"
            )
        self.nearest = nearest
        self.top_k = check_top_k(top_k)
        self.temperature = check_temperature(temperature)
        self._experts = {task: tuple(experts[task]) for task in nearest.names}

    @classmethod
    def fit(
        cls,
        experts: Iterable[Expert],
        examples: Mapping[str, Iterable[Example]],
        *,
        pairs: Mapping[str, Sequence[str]] | None = None,
        features: str | Embedding | Encoder = "hidden",
        base_model: BaseModel | PreTrainedModel | None = None,
        library: ExpertLibrary | None = None,
        most: int | None = 200,
        top_k: int = 3,
        temperature: float = 0.2,
    ) -> Lorauter:
        """The router of some experts, from a few prompts of each task.

        Args:
            experts: to choose among.
            examples: prompts of each task, by its name: texts, or batches of token ids.
            pairs: names of the experts that serve a task, for tasks that none was trained on; of
                the others it is those that say they were trained on it. (The paper finds them by
                successive halving over the pool, which is the caller's business.)
            features: ``hidden`` or ``input`` (the base's own embeddings), or an encoder from texts
                to (n, d), such as the paper's.
            base_model: makes the embeddings.
            library: keeps the tasks' centroids, beside the experts.
            most: of a task's examples, how many count, in their order; None is all.
            top_k: tasks that a row draws on.
            temperature: of the softmax over their cosines.
        """
        chosen = taken(examples, most)
        by_name = {expert.name: expert for expert in experts}
        of_task: dict[str, list[str]] = {task: [] for task in chosen}
        for name in sorted(by_name):
            for task in by_name[name].expert_info.tasks:
                if task in of_task:
                    of_task[task].append(name)
        of_task |= {task: list(names) for task, names in (pairs or {}).items() if task in chosen}
        owners = {
            task: list(named(by_name.values(), names).values()) for task, names in of_task.items()
        }
        embedding = embedding_of(features, base_model)
        nearest = Nearest(centroids_of(chosen, embedding, owners, library), embedding)
        return cls(nearest, of_task, top_k=top_k, temperature=temperature)

    def decide(self, prompt: Prompt) -> Tensor:
        """(b, e), the same for all tokens of a row and in every layer."""
        columns = {prompt.experts[column]: column for column in prompt.enabled}
        experts = self._experts  # one state, should another thread change the experts meanwhile
        able = [[columns[e] for e in experts[t] if e in columns] for t in self.nearest.names]
        usable = [index for index, some in enumerate(able) if some]
        scores = self.nearest.scores(prompt)[:, usable]
        weights = shares(
            scores, range(len(usable)), len(usable), self.top_k, self.temperature
        )  # (b, tasks)
        gates = weights.new_zeros(len(weights), len(prompt.experts))
        for place, index in enumerate(usable):
            gates[:, able[index]] += weights[:, place : place + 1] / len(able[index])
        return gates

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Take up new experts of tasks that are known here, and forget those that went.

        Raises:
            ValueError: a new expert has no task that is known here.
        """
        gone = set(removed)
        owners = {
            task: tuple(name for name in names if name not in gone)
            for task, names in self._experts.items()
        }
        for expert in added:
            tasks = [task for task in expert.expert_info.tasks if task in owners]
            if not tasks:
                raise ValueError(
                    f"expert {expert.name!r} was trained on {expert.expert_info.tasks!r}, and this "
                    "Lorauter has examples of none of these; make the routed model anew, with some"
                )
            owners |= {task: (*owners[task], expert.name) for task in tasks}
        self._experts = owners
