import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_experts.tensors import LazyTensors, from_safetensors, to_safetensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64, torch.bool]


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_equal_tensors_have_equal_bytes_in_any_order(layout, random):
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    names = list(tensors)
    random.shuffle(names)
    content = to_safetensors(tensors)
    assert to_safetensors({name: tensors[name].clone() for name in names}) == content
    back = from_safetensors(content)
    assert list(back) == sorted(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_strides_views_gradients_and_shared_memory_leave_no_trace():
    whole = torch.arange(12.0).reshape(3, 4)
    plain = {"a": whole[:, 1:3].clone(), "b": whole.T.clone(), "c": whole.clone()}
    odd = {"a": whole[:, 1:3], "b": whole.T, "c": whole.clone().requires_grad_()}
    assert to_safetensors(plain) == to_safetensors(odd)
    shared = {"a": whole, "b": whole.view(3, 4)}
    assert to_safetensors(shared) == to_safetensors({"a": whole.clone(), "b": whole.clone()})


def test_a_mapped_tensor_is_not_a_way_to_change_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    content = to_safetensors({"a": torch.zeros(1000)})
    path.write_bytes(content)
    from_safetensors(path)["a"].add_(1)
    assert path.read_bytes() == content
    assert from_safetensors(path)["a"].sum() == 0


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_cut_file_is_an_error_that_names_it(tmp_path, size):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(to_safetensors({"a": torch.zeros(10)})[:size])
    with pytest.raises(ValueError, match=r"weights\.safetensors.*not a whole safetensors"):
        from_safetensors(path)
    with pytest.raises(ValueError, match="not a whole safetensors"):
        from_safetensors(path.read_bytes())


def test_what_is_not_a_tensor_is_named():
    with pytest.raises(TypeError, match="'a' is a list"):
        to_safetensors({"a": [1.0]})


def test_lazy_tensors_are_fetched_once_and_only_when_asked_for():
    calls = []

    def fetch():
        calls.append(1)
        return {"a": torch.ones(2), "b": torch.zeros(2)}

    lazy = LazyTensors(fetch)
    assert "not read yet" in repr(lazy)
    assert not calls
    assert list(lazy) == ["a", "b"]
    assert len(lazy) == 2
    assert "a" in lazy
    assert "c" not in lazy
    assert torch.equal(pickle.loads(pickle.dumps(lazy))["a"], torch.ones(2))
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int64", "uint8", "bool"])
def test_a_file_is_mapped_as_safetensors_reads_it(tmp_path, dtype):
    tensors = {
        "scalar": torch.tensor(1).to(getattr(torch, dtype)),
        "table": torch.arange(6).view(2, 3).to(getattr(torch, dtype)),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors(tensors))
    found = from_safetensors(path)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    found["table"].zero_()  # the mapping is private
    assert torch.equal(from_safetensors(path)["table"], tensors["table"])
    assert to_safetensors(from_safetensors(path)) == path.read_bytes()


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(0, 3), "b": torch.ones(2)},
        {"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.ones(2)},
        {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2)},
    ],
)
def test_what_cannot_be_mapped_is_read_all_the_same(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors(tensors))
    found = from_safetensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n].float(), tensors[n].float()) for n in tensors)
