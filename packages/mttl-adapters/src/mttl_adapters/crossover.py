"""Which way to sum over experts is the cheaper one: each by itself, or all in one dense product."""

from __future__ import annotations

# What the two ways of plain torch cost, in multiply-adds of the dense one. Fitted to timings on 2
# CPU cores, float32, layers of 576 to 2048 features, rank 16, 8 to 128 experts, 8 to 1024 tokens:
# dense is then ahead up to 8 to 16 experts in prefill, up to 32 to 64 when 8 rows decode.
DENSE_TOKENS = 24  # fewer tokens cost as much: the stacks must be read once
GATHER_RANKS = 48  # fetching a chosen token and adding its result costs as much as these ranks
GROUP_COST = 2_500_000  # what one expert's pair of small products costs beside its arithmetic

# A pair of token and expert in the compiled kernel, in those of a dense product over all experts.
COMPILED_PAIR = 1.6


def compiled_groups(tokens: int, experts: int, chosen: int) -> bool:
    """Whether the compiled kernel is ahead of the dense products, for so many choices in all."""
    return tokens < DENSE_TOKENS or chosen * COMPILED_PAIR < tokens * experts


def plain_groups(tokens: int, experts: int, chosen: int, ranks: int, features: int) -> bool:
    """Whether sort-and-group in plain torch is ahead of the dense products.

    Args:
        tokens: of the input.
        experts: of the bank.
        chosen: choices among all tokens.
        ranks: of all experts together.
        features: of input and output together.
    """
    dense = max(tokens, DENSE_TOKENS) * ranks * features
    arithmetic = chosen * (ranks / max(1, experts) + GATHER_RANKS) * features
    return arithmetic + min(chosen, experts) * GROUP_COST < dense
