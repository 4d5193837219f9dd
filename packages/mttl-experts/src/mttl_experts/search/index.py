"""Sketches of every expert of a library, kept among its artifacts, and the nearest by them.

They are kept in segments: one artifact for up to 256 experts, with a row for each in the order of
their digests. As an artifact is keyed by the content it came from, a row can only ever speak for
the weights it was made of. An expert that comes in makes a small segment, and many small ones are
put together. Rows of experts that are gone are never looked at, and their segment is written again
without them, before it is collected with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.search.sketch import WIDTH, sketch
from mttl_experts.spectral import inner_product, lora_modules
from mttl_storage import Conflict, Corrupt, Denied, NotFound, ReadOnly, StorageFull, in_parallel

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter

Progress = Callable[[str, int, int | None], object]

RECIPE = {"kind": "sketches", "version": 1, "width": WIDTH}
# The log names the experts of each segment; and one that is removed for good takes its segment
# along, so that as many sketches are made again.
SEGMENT_ROWS = 256
# Segments that are less than half full and are let be.
SMALL_SEGMENTS = 8
# Between two commits while indexing: what an interruption can cost.
COMMIT_SECONDS = 60.0


@dataclass(frozen=True, eq=False)
class Segment:
    """Sketches of some experts.

    Attributes:
        digests: of the experts, sorted; a row for each.
        rows: (n, width) float32, memory-mapped where the library is on disk.
        norms: (n,) float64, the exact ‖ΔW‖.
        lengths: (n,) float32, of the rows.
    """

    digests: tuple[str, ...]
    rows: Tensor
    norms: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, digests: tuple[str, ...], values: Mapping[str, Tensor]) -> Segment:
        """A segment from what an artifact holds."""
        rows, norms = values["sketch"], values["norm"]
        if rows.shape != (len(digests), WIDTH) or norms.shape != (len(digests),):
            raise Corrupt(f"a segment of {len(digests)} sketches has shape {tuple(rows.shape)}")
        return cls(digests, rows, norms, rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny))


class SketchIndex:
    """Which experts of one library are nearest to a ΔW, nearly."""

    def __init__(self, library: LibraryWriter) -> None:
        """Index nothing yet."""
        self._library = library
        self._kept: dict[str, Segment] = {}  # by artifact
        self._own: list[Segment] = []  # what could not be kept
        self._live: list[tuple[Segment, Tensor]] = []  # with the row numbers to look at
        self._places: dict[str, tuple[Segment, int]] = {}
        self._refused: dict[str, str] = {}

    def update(self, experts: Mapping[str, Expert], progress: Progress | None = None) -> None:
        """Make the sketches that are missing, and look at those of these experts alone.

        Args:
            experts: by digest.
            progress: told how many are made, of how many.
        """
        self._load()
        known = {digest for segment in self._segments() for digest in segment.digests}
        missing = [d for d in experts if d not in known and d not in self._refused]
        made: dict[str, tuple[Tensor, float]] = {}
        last = time.monotonic()
        try:
            for number, digest in enumerate(missing):
                if progress is not None:
                    progress("", number, len(missing))
                try:
                    made[digest] = sketched(experts[digest])
                except (UnsupportedAdapterError, Corrupt, NotFound, ValueError) as error:
                    self._refused[digest] = str(error)
                if len(made) == SEGMENT_ROWS or time.monotonic() - last > COMMIT_SECONDS:
                    self._keep(made)
                    made, last = {}, time.monotonic()
        finally:
            self._keep(made)
        self._tidy()
        self._look_at(experts)

    def refusals(self, digests: Collection[str]) -> dict[str, str]:
        """Why some of these experts have no sketch, by digest."""
        return {digest: self._refused[digest] for digest in digests if digest in self._refused}

    def row(self, digest: str) -> tuple[Tensor, float] | None:
        """Sketch and exact ‖ΔW‖ of one of the experts, if it has one."""
        found = self._places.get(digest)
        if found is None:
            return None
        segment, row = found
        return segment.rows[row], float(segment.norms[row])

    def nearest(self, query: Tensor, limit: int) -> list[tuple[str, float]]:
        """Digest and exact ‖ΔW‖ of the experts whose cosine with a sketch is farthest from 0."""
        found: list[tuple[float, str, float]] = []
        for segment, rows in self._live:
            cosines = (segment.rows @ query / segment.lengths)[rows].abs()
            best = cosines.topk(min(limit, len(rows)))
            for cosine, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                row = int(rows[place])
                found.append((-cosine, segment.digests[row], float(segment.norms[row])))
        return [(digest, norm) for _, digest, norm in sorted(found)[:limit]]

    def _segments(self) -> list[Segment]:
        return [*self._kept.values(), *self._own]

    def _load(self) -> None:
        """Take in the segments that the library has now, and forget those that it has not."""
        artifacts = self._library.artifacts
        there = {entry.item: entry for entry in artifacts.entries() if entry.recipe == RECIPE}
        self._kept = {item: self._kept[item] for item in self._kept.keys() & there.keys()}

        def load(item: str) -> None:
            digests = there[item].experts
            # What is damaged is made again; verify says what it was.
            with suppress(Corrupt, ValueError, KeyError):
                self._kept[item] = Segment.of(digests, artifacts.get(digests, RECIPE))

        in_parallel(load, sorted(there.keys() - self._kept.keys()))
        kept = {digest for segment in self._kept.values() for digest in segment.digests}
        self._own = [segment for segment in self._own if not kept.issuperset(segment.digests)]

    def _keep(self, made: Mapping[str, tuple[Tensor, float]]) -> None:
        """Keep new rows in the library; where it cannot be written, in this object alone."""
        if not made:
            return
        digests = tuple(sorted(made))
        values = {
            "sketch": torch.stack([made[digest][0] for digest in digests]),
            "norm": torch.tensor([made[digest][1] for digest in digests], dtype=torch.float64),
        }
        self._own.append(Segment.of(digests, values))
        try:
            self._library.artifacts.put(digests, RECIPE, values)
        except (Conflict, Denied, ReadOnly, StorageFull):
            return
        self._load()

    def _tidy(self) -> None:
        """Write anew the segments with rows of what is gone, and many small ones together."""
        there = {item.digest for item in self._library.repository.items("experts/").values()}
        left = {k: len(there.intersection(segment.digests)) for k, segment in self._kept.items()}
        stale = {k for k, segment in self._kept.items() if left[k] < len(segment.digests)}
        parted = {k for k in self._kept if left[k] < SEGMENT_ROWS // 2}
        chosen = stale | (parted if len(parted) > SMALL_SEGMENTS else set())
        small = {k: self._kept[k] for k in sorted(chosen)}
        if not small or self._library.writer() is not self._library.repository:
            return
        rows = {
            digest: (segment.rows[row], segment.norms[row])
            for segment in small.values()
            for row, digest in enumerate(segment.digests)
            if digest in there
        }
        digests = sorted(rows)
        starts = range(0, len(digests), SEGMENT_ROWS)
        parts = {tuple(digests[start : start + SEGMENT_ROWS]) for start in starts}
        old = {segment.digests for segment in small.values()}
        try:
            with self._library.batch("put sketches together"):
                for item, segment in small.items():
                    if segment.digests not in parts:
                        self._library.writer().remove(item)
                for part in sorted(parts - old):
                    values = {
                        "sketch": torch.stack([rows[digest][0] for digest in part]),
                        "norm": torch.stack([rows[digest][1] for digest in part]),
                    }
                    self._library.artifacts.put(part, RECIPE, values)
        except (Conflict, Denied, ReadOnly, StorageFull):
            return
        self._load()

    def _look_at(self, experts: Mapping[str, Expert]) -> None:
        self._live, self._places = [], {}
        for segment in self._segments():
            rows = [
                row
                for row, digest in enumerate(segment.digests)
                if digest in experts and digest not in self._places
            ]
            if rows:
                self._places |= {segment.digests[row]: (segment, row) for row in rows}
                self._live.append((segment, torch.tensor(rows)))


def sketched(expert: Expert) -> tuple[Tensor, float]:
    """Sketch and exact ‖ΔW‖ of an expert.

    Raises:
        UnsupportedAdapterError: it has no weights, or is no plain LoRA.
        ValueError: it holds NaN or infinity.
    """
    modules = lora_modules(expert)
    norm = max(inner_product(modules, modules), 0.0) ** 0.5
    row = sketch(modules)
    if not (row.isfinite().all() and norm < float("inf")):
        raise ValueError(f"expert {expert.name!r} has a weight that is NaN or infinite")
    return row, norm
