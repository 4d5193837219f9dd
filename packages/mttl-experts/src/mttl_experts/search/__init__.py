"""Finding experts in a library: by words, by likeness of ΔW, by loss on examples."""

from mttl_experts.search.embeddings import EmbeddingError
from mttl_experts.search.likeness import Likeness
from mttl_experts.search.search import Match, Search
from mttl_experts.search.sketch import sketch

__all__ = ["EmbeddingError", "Likeness", "Match", "Search", "sketch"]
