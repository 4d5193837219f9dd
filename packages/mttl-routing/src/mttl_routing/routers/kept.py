"""What routers are fitted to, kept in the experts' library where there is one.

Kept by the digests of the experts and a recipe that names the data and the base, so that nothing
kept is ever out of date, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mttl_experts import Expert
from mttl_storage import Conflict, Denied, ReadOnly, StorageFull

if TYPE_CHECKING:
    from mttl_experts import ExpertLibrary

Tensors = Mapping[str, Tensor]


def kept(
    library: ExpertLibrary | None,
    experts: Sequence[Expert],
    recipe: Any,
    make: Callable[[], Tensors],
) -> Tensors:
    """What ``make`` gives for all these experts together, made where the library has it not."""
    if library is None:
        return make()
    value: Tensors = library.artifacts.get_or_make(experts, recipe, make)
    return value


def kept_each(
    library: ExpertLibrary | None,
    keys: Sequence[tuple[Sequence[Expert], Any]],
    make: Callable[[int], Tensors],
    *,
    together: bool = True,
) -> list[Tensors]:
    """What ``make`` gives for each key, experts and a recipe, made where the library has it not.

    Where the library cannot be written, the values are still given.

    Args:
        library: None computes everything.
        keys: of the values.
        make: gives the value of a key by its place.
        together: whether all that were missing are kept by one commit; else each by its own as soon
            as it is made, for values that take minutes, so that they outlast an interruption.
    """
    if library is None:
        return [make(index) for index in range(len(keys))]
    found = [library.artifacts.get(experts, recipe) for experts, recipe in keys]
    missing = [index for index, value in enumerate(found) if value is None]
    values = {index: value for index, value in enumerate(found) if value is not None}
    for some in [missing] if together else [[index] for index in missing]:
        values |= {index: make(index) for index in some}
        # The values are what was asked for; keeping them is a courtesy.
        with suppress(Conflict, Denied, ReadOnly, StorageFull), library.batch("keep router data"):
            for index in some:
                library.artifacts.put(*keys[index], values[index])
    return [values[index] for index in range(len(keys))]
