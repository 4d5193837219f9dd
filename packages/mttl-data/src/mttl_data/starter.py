"""The ``starter`` mixture: short tasks that reasoning-gym generates and scores, from one seed.

Rows hold the question alone. The line that asks for nothing but the answer belongs to the prompt
(``prompts.ANSWER_ONLY``), so that a base model and an expert are asked in the same words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mttl_data.errors import RowsError, unknown_task
from mttl_data.metrics import reasoning_gym, reasoning_gym_score
from mttl_data.progress import Progress
from mttl_data.rows import SPLITS, Row

if TYPE_CHECKING:
    from mttl_data.dataset_library import DatasetLibrary, TaskInfo

TASK_SOURCE = "reasoning-gym"
STARTER_SEED = 42
STARTER_METRIC = "reasoning_gym"
STARTER_SIZES: Mapping[str, int] = MappingProxyType({"train": 400, "validation": 32, "test": 100})
# Drawn in this order, so that what is tested on stays the same when more is trained on.
_DRAWN = ("test", "validation", "train")
# Length told to every generator, so that row i does not depend on how many are asked for.
_STREAM_SIZE = 1_000_000
# A stream with this many rows on end that it had before has no more to give.
_PATIENCE = 2_000


@dataclass(frozen=True)
class StarterTask:
    """How one task of the mixture is generated.

    Attributes:
        generator: The name that reasoning-gym knows it by.
        options: Settings for the generator; they keep a source under 130 tokens of SmolLM2.
        chance: The best score that one fixed answer gets on every row, measured on 100 rows. Where
            it is .4 or more, learning an answer looks like skill: no such task is here.
        answer_tokens: Most tokens that an answer took, measured on 500 rows with SmolLM2's tokens.
        unique_answers: Whether an answer may occur once only. Set where the question holds the
            answer in another order, so that no answer is met in two splits.
    """

    generator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    chance: float = 0.0
    answer_tokens: int = 8
    unique_answers: bool = False


STARTER_TASKS: Mapping[str, StarterTask] = MappingProxyType(
    {
        "calendar_arithmetic": StarterTask("calendar_arithmetic", {}, 0.12, 2),
        "chain_sum": StarterTask("chain_sum", {"max_terms": 3, "max_digits": 2}, 0.10, 4),
        "decimal_chain_sum": StarterTask(
            "decimal_chain_sum",
            {"max_terms": 2, "max_digits": 2, "max_decimal_places": 2},
            0.01,
            6,
        ),
        "family_relationships": StarterTask(
            "family_relationships", {"max_family_size": 5}, 0.20, 5
        ),
        "lcm": StarterTask("lcm", {"max_value": 30}, 0.06, 3),
        "leg_counting": StarterTask(
            "leg_counting", {"max_animals": 3, "max_instances": 5}, 0.07, 3
        ),
        "letter_counting": StarterTask("letter_counting", {"min_words": 8}, 0.26, 2),
        "number_sequence": StarterTask("number_sequence", {"max_terms": 6}, 0.14, 4),
        "products": StarterTask("products", {"max_digits": 2}, 0.06, 4),
        "spell_backward": StarterTask(
            "spell_backward", {"max_word_len": 5}, 0.10, 4, unique_answers=True
        ),
        "word_sequence_reversal": StarterTask(
            "word_sequence_reversal", {"max_words": 5}, 0.0, 16, unique_answers=True
        ),
        "word_sorting": StarterTask(
            "word_sorting", {"max_words": 4, "max_word_length": 6}, 0.01, 13, unique_answers=True
        ),
    }
)


def make_starter(
    library: DatasetLibrary,
    tasks: Sequence[str] | None = None,
    *,
    sizes: Mapping[str, int] = STARTER_SIZES,
    seed: int = STARTER_SEED,
    replace: bool = False,
    progress: Progress | None = None,
) -> list[TaskInfo]:
    """Add tasks of the mixture to a library, each in one commit; those it has are left alone.

    Args:
        library: Where they go.
        tasks: Names in ``STARTER_TASKS``; all of them if left out.
        sizes: Rows wanted in each split.
        seed: Another seed gives other rows.
        replace: Put these rows in place of rows made with other sizes or another seed.
        progress: Told the task that is next, how many are done, and how many there are.
    """
    names = starter_names(tasks)
    made = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(name, done, len(names))
        recipe = _recipe(name, sizes, seed)
        info = library.info(name) if name in library else None
        if info is None or info.recipe != recipe:
            info = library.add_task(
                name,
                starter_rows(name, sizes, seed),
                metric=STARTER_METRIC,
                source=f"{TASK_SOURCE}: {STARTER_TASKS[name].generator}",
                recipe=recipe,
                replace=replace,
            )
        made.append(info)
    if progress is not None:
        progress("", len(names), len(names))
    return made


def made_otherwise(library: DatasetLibrary, tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that a library has with other sizes, seed or settings than by default."""
    parts = ("options", "unique_answers", "sizes", "seed")
    return [
        task
        for task in tasks
        for now in [_recipe(task, STARTER_SIZES, STARTER_SEED)]
        if any(library.info(task).recipe.get(part) != now[part] for part in parts)
    ]


def starter_names(tasks: Sequence[str] | None = None) -> list[str]:
    """The tasks asked for, each once, or all; ``UnknownTaskError`` names near ones."""
    names = sorted(STARTER_TASKS) if tasks is None else list(dict.fromkeys(tasks))
    for name in names:
        if name not in STARTER_TASKS:
            raise unknown_task(name, "the starter mixture", STARTER_TASKS)
    return names


def starter_rows(
    task: str, sizes: Mapping[str, int] = STARTER_SIZES, seed: int = STARTER_SEED
) -> list[Row]:
    """Rows of one task, in the order train, validation, test; the same for the same arguments.

    No source occurs twice, in one split or in two. The test rows depend on nothing but the task,
    the seed and their number; the validation rows also on the number of test rows.

    Args:
        task: A name in ``STARTER_TASKS``.
        sizes: Rows wanted in each of the three splits.
        seed: Another seed gives other rows.
    """
    starter_names([task])
    if set(sizes) - set(SPLITS) or any(size < 0 for size in sizes.values()):
        raise ValueError(f"sizes must be numbers of rows for {', '.join(SPLITS)}, not {sizes!r}")
    wanted = sum(sizes.values())
    stream = _distinct_rows(task, seed)
    drawn = {split: list(islice(stream, sizes.get(split, 0))) for split in _DRAWN}
    found = sum(len(rows) for rows in drawn.values())
    if found < wanted:
        raise RowsError(
            f"task {task!r} has about {found} distinct rows, {wanted} were asked for; "
            "ask for fewer rows"
        )
    return [
        Row(source, target, task, TASK_SOURCE, "generated", split, metadata)
        for split in SPLITS
        for source, target, metadata in drawn[split]
    ]


def _recipe(task: str, sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
    settings = STARTER_TASKS[task]
    return {
        "mixture": "starter",
        "generator": settings.generator,
        "options": dict(settings.options),
        "unique_answers": settings.unique_answers,
        "sizes": {split: sizes.get(split, 0) for split in SPLITS},
        "seed": seed,
        "reasoning_gym": version("reasoning-gym"),
    }


def _distinct_rows(task: str, seed: int) -> Iterator[tuple[str, str, str]]:
    """(source, target, metadata) of the stream's rows whose own answer scores 1, each once."""
    settings = STARTER_TASKS[task]
    # Generators seed row i with seed + i, so near seeds would share rows: spread them by a hash.
    digest = hashlib.sha256(f"{seed}:{task}".encode()).digest()
    generator = reasoning_gym().create_dataset(
        settings.generator,
        seed=int.from_bytes(digest[:4], "big") // 2,
        size=_STREAM_SIZE,
        **settings.options,
    )
    seen: set[tuple[str, str]] = set()
    last_new = 0
    for index in range(_STREAM_SIZE):
        if index - last_new > _PATIENCE:
            return
        entry = generator[index]
        source, target = entry["question"].strip(), entry["answer"].strip()
        keys = {("source", source)}
        if settings.unique_answers:
            keys.add(("target", target.casefold()))
        if keys & seen:
            continue
        seen |= keys
        last_new = index
        content = {"generator": settings.generator, "entry": entry}
        metadata = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
        if reasoning_gym_score(target, Row(source, target, task, metadata=metadata)) == 1.0:
            yield source, target, metadata
