"""Which way to sum over experts is the cheaper one: each by itself, or all in one dense product."""

from __future__ import annotations

# What the two ways of plain torch cost, in multiply-adds of the dense one. Timed on 2 CPU cores,
# float32, layers of 576 to 1536 features, rank 16, 8 to 256 experts, 8 and 2,048 tokens.
DENSE_TOKENS = 24  # fewer tokens cost as much: the stacks must be read once
PLAIN_PAIR = 6  # a pair of token and expert by rows, in those of a dense product
PLAIN_CALL = 8_000_000  # to sort the pairs and find the rows

# A pair of token and expert in the compiled kernel, in those of a dense product over all experts.
COMPILED_PAIR = 1.6


def compiled_groups(tokens: int, experts: int, chosen: int) -> bool:
    """Whether the compiled kernel is ahead of the dense products, for so many choices in all."""
    return tokens < DENSE_TOKENS or chosen * COMPILED_PAIR < tokens * experts


def plain_groups(tokens: int, experts: int, chosen: int, numbers: int) -> bool:
    """Whether plain torch is ahead of the dense products by taking the chosen alone.

    Args:
        tokens: of the input.
        experts: of the bank.
        chosen: choices among all tokens.
        numbers: of all factors together.
    """
    mean = numbers / max(1, experts)
    return chosen * PLAIN_PAIR * mean + PLAIN_CALL < max(tokens, DENSE_TOKENS) * numbers


# What the ways of a GPU cost, in ranks of a token in the dense products. Not timed: computed for a
# bfloat16 layer of 4096 features from 4.8 TB/s and 600 TFLOP/s, about what an H200 gives.
DEVICE_TOKENS = 125  # fewer cost as much, since the stacks must be read once
DEVICE_PAIR = 224  # to read a token for each pair, and to write and read what the pair adds


def device_groups(tokens: int, chosen: int, ranks: int, experts: int) -> bool:
    """Whether a GPU is ahead of the dense products by taking the chosen alone.

    Args:
        tokens: of the input.
        chosen: choices among all tokens.
        ranks: of all experts together.
        experts: of the bank.
    """
    read = min(chosen, experts) * ranks / max(1, experts) * DEVICE_TOKENS
    moved = chosen * DEVICE_PAIR if tokens > DEVICE_TOKENS else 0
    return read + moved < ranks * max(tokens, DEVICE_TOKENS)
