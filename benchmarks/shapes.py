"""Shapes of the base models that the benchmarks beside this build."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Llama, and how much of it one run takes unless a command says otherwise."""

    hidden: int
    key_value: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    layers: int
    decode_rows: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each of a layer's linears."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.key_value, self.hidden),
            "self_attn.v_proj": (self.key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def groups(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(in, out) of the linears that share an input: q, k and v; o; gate and up; down."""
        h, i = self.hidden, self.intermediate
        attention = ((h, h), (h, self.key_value), (h, self.key_value))
        return attention, ((h, h),), ((h, i), (h, i)), ((i, h),)

    def config(self, layers: int) -> Any:
        """A Llama's config of so many layers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "smollm2-135m": Shapes(576, 192, 1536, 9, 3, 49152, True, 30, 8),
    # Four layers: the experts of all 32 would be 20 GB in bfloat16, and are as many in each.
    "7b": Shapes(4096, 4096, 11008, 32, 32, 32000, False, 4, 32),
    "tiny": Shapes(64, 32, 96, 4, 2, 128, True, 2, 8),
}
SMOLLM2 = SHAPES["smollm2-135m"]
