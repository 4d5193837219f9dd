"""The experts that one merge or one routed model is made from: one base, and shapes that agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mttl_experts import (
    Expert,
    ExpertLibrary,
    IncompatibleExpertError,
    LoraFactors,
    check_compatible,
    is_other_base,
    lora_modules,
)

Experts = Iterable[Expert] | Mapping[str, Expert] | ExpertLibrary


def experts_of(source: Experts) -> list[Expert]:
    """The experts of a library, of a mapping by name, or of any iterable, in its own order.

    Raises:
        ValueError: when there are none.
        TypeError: naming what is no expert, such as a name.
    """
    values = source.values() if isinstance(source, (Mapping, ExpertLibrary)) else source
    experts = list(values)
    if not experts:
        raise ValueError("no experts were given; give at least one, or a library that has some")
    for expert in experts:
        if not isinstance(expert, Expert):
            raise TypeError(
                f"got {expert!r} among the experts, a {type(expert).__name__}; give Expert objects "
                "(library.get_expert(name) has them)"
            )
    return experts


def check_one_base(experts: Sequence[Expert], *, strict: bool = False) -> None:
    """Refuse experts of different base models; warn where only the bases' digests differ.

    Args:
        experts: at least one.
        strict: refuse also where it would warn.

    Raises:
        IncompatibleExpertError: naming two experts and their bases.
    """
    first = next((e for e in experts if e.expert_info.expert_model is not None), experts[0])
    known = first.expert_info
    for expert in experts:
        info = expert.expert_info
        if is_other_base(info, known.expert_model, known.model_fingerprint):
            raise IncompatibleExpertError(
                f"experts {first.name!r} and {expert.name!r} were made for different base models, "
                f"{known.expert_model!r} and {info.expert_model!r}; take experts of one base"
            )
        check_compatible(
            info,
            fingerprint=known.model_fingerprint,
            tokenizer_digest=known.tokenizer_digest,
            template_digest=known.template_digest,
            strict=strict,
        )


def factors_by_module(experts: Sequence[Expert]) -> dict[str, list[LoraFactors | None]]:
    """LoRA factors of each module that any expert adapts, by module path, sorted.

    Each list has one entry an expert, in the order given; None stands for a module that the expert
    leaves alone, where its ΔW is zero.

    Raises:
        IncompatibleExpertError: when one module has two shapes, naming it and both.
    """
    with ThreadPoolExecutor() as pool:  # each file is verified when it is first read
        of_expert = list(pool.map(lora_modules, experts))
    paths = sorted(set().union(*of_expert))
    table = {path: [modules.get(path) for modules in of_expert] for path in paths}
    check_features(
        experts,
        [{p: (f.b.shape[0], f.a.shape[1]) for p, f in own.items()} for own in of_expert],
    )
    return table


def check_features(
    experts: Sequence[Expert], features: Sequence[Mapping[str, tuple[int, int]]]
) -> None:
    """Refuse experts of which one has a module in another shape than the one before it.

    Args:
        experts: in any order.
        features: (out, in) of each module of each expert, by path.

    Raises:
        IncompatibleExpertError: naming the module, both experts and both shapes.
    """
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for expert, own in zip(experts, features, strict=True):
        for path, found in own.items():
            one, name = seen.setdefault(path, (found, expert.name))
            if one != found:
                raise IncompatibleExpertError(
                    f"module {path!r} is {one} (out, in) in expert {name!r} and {found} in expert "
                    f"{expert.name!r}; take experts of one base"
                )
