import enum
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_experts.plain import canonical_json, plain, recipe_digest

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=10,
)


class Kind(enum.StrEnum):
    LORA = "LORA"


@settings(deadline=None)
@given(PLAIN)
def test_plain_data_stays_as_it_is_and_survives_json(value):
    assert plain(value) == value
    assert json.loads(canonical_json(value)) == value


def test_sets_enums_and_tuples_become_plain():
    value = {"targets": {"v", "q", "k"}, "kind": Kind.LORA, "pair": (1, 2)}
    expected = {"targets": ["k", "q", "v"], "kind": "LORA", "pair": [1, 2]}
    assert plain(value) == expected
    assert type(plain(value)["kind"]) is str


@pytest.mark.parametrize(
    ("value", "error", "path"),
    [
        ({"a": {"b": torch.zeros(1)}}, TypeError, r"recipe\.a\.b is a Tensor"),
        ({"a": [0, float("nan")]}, ValueError, r"recipe\.a\[1\] is nan"),
        ({"a": float("inf")}, ValueError, r"recipe\.a is inf"),
        ({1: "a"}, TypeError, "recipe has a key 1"),
    ],
)
def test_what_json_cannot_hold_is_an_error_that_names_it(value, error, path):
    with pytest.raises(error, match=path):
        plain(value, "recipe")


def test_a_recipe_digest_depends_on_content_alone():
    one = recipe_digest({"kind": "arrow", "top_k": 4, "layers": (1, 2)})
    assert one == recipe_digest({"layers": [1, 2], "top_k": 4, "kind": "arrow"})
    assert one != recipe_digest({"kind": "arrow", "top_k": 5, "layers": (1, 2)})


def test_a_recipe_digest_stays_the_same_from_version_to_version():
    # SHA-256 of {"a":[1,"é"]} in UTF-8; a change here loses every artifact that people keep.
    assert recipe_digest({"a": (1, "é")}) == (
        "5db14a2cddc92d31365806bb5d82ed2bc436bf6960d10cd4654140f7bdadce1c"
    )
