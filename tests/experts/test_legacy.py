"""Files of torch.save are read as data: the same values, and never any code."""

import contextlib
import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_experts.legacy import RefusedFileError, read_archive

CANARY = []  # what a hostile file would add to if any of it ran


def canary(*args):
    CANARY.append(args)
    return {}


class Hostile:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.fixture(autouse=True)
def nothing_runs():
    CANARY.clear()
    yield
    assert CANARY == []


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(pickled, entries=(), compression=zipfile.ZIP_STORED, top="archive"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{top}/data.pkl", pickled)
        for name, content in dict(entries).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def refused(data, word):
    with pytest.raises(RefusedFileError, match=word) as caught:
        read_archive(data, "x.meta")
    assert "'x.meta' is refused" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_out_bit_for_bit(dtype):
    values = torch.randint(0, 2 if dtype == torch.bool else 100, (6, 4)).to(dtype)
    given_ = OrderedDict(
        whole=values,
        transposed=values.T,
        part=values[1:3, ::2],
        scalar=values[0, 0],
        empty=values[:0],
    )
    found = read_archive(saved(given_), "x.ckpt")
    assert list(found) == list(given_)
    for name, tensor in given_.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_nan_payloads_and_signed_zeros_stay():
    bits = torch.tensor([0x7FC01234, 0x7F800001, -0x80000000, 1], dtype=torch.int32)
    found = read_archive(saved({"x": bits.view(torch.float32)}), "x.ckpt")
    assert torch.equal(found["x"].view(torch.int32), bits)


def test_a_state_dict_with_metadata_and_plain_data_is_read():
    module = torch.nn.Linear(3, 2)
    found = read_archive(saved(module.state_dict()), "x.ckpt")
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in module.state_dict().items()
    }
    plain = {"a": [1, -2, 1 << 40, 2.5, None, True, "ä"], "t": (1, (2,)), "d": {"e": {}}, 3: False}
    assert read_archive(saved(plain), "x.meta") == plain


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "|b1", "<u2", "<f2"])
def test_arrays_and_numbers_of_numpy_are_read(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    value = {"c": array, "f": np.asfortranarray(array), "one": np.float32(1.5), "n": np.int64(3)}
    found = read_archive(saved(value), "x.bin")
    for name in "cf":
        assert found[name].dtype.isnative
        np.testing.assert_array_equal(found[name], array)
    assert (found["one"], found["n"]) == (1.5, 3)


# Pickles that would run code, in every protocol and by every opcode that can.

HOSTILE = {
    "reduce": Hostile(canary, ("ran",)),
    "inside data": {"a": [Hostile(canary, ())]},
    "state": Hostile(OrderedDict, (), {"_metadata": Hostile(canary, ())}),
    "setstate": Hostile(list, (), None, None, iter([("k", Hostile(canary, ()))])),
    "system": Hostile(__import__("os").system, ("touch /tmp/never",)),
    "eval": Hostile(eval, ("CANARY.append(1)",)),
    "getattr": Hostile(getattr, (canary, "__globals__")),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_that_would_run_code_is_refused(value, protocol):
    refused(zipped(pickle.dumps(value, protocol)), "opcode|name|protocol")


OPCODES = {
    "GLOBAL": (b"\x80\x02c" + __name__.encode() + b"\ncanary\n.", "the name '.*canary'"),
    "builtin": (b"\x80\x02cbuiltins\nexec\n.", "the name 'builtins.exec'"),
    "INST": (b"(ibuiltins\nexec\n.", "the opcode 'INST'"),
    "OBJ": (b"(cbuiltins\nexec\no.", "builtins.exec"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the opcode 'NEWOBJ'"),
    "STACK_GLOBAL": (b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93.", "the opcode 'STACK_GLOBAL'"),
    "EXT1": (b"\x80\x02\x82\x01.", "the opcode 'EXT1'"),
    "PERSID": (b"Pevil\n.", "the opcode 'PERSID'"),
    "BINPERSID": (b"\x80\x02X\x04\0\0\0evilQ.", "the persistent id 'evil'"),
    "BINPERSID of a name": (
        b"\x80\x02(X\x07\0\0\0storagecnumpy\nndarray\nX\x01\x00\x00\x000X\x03\0\0\0cpuK\x01tQ.",
        "the persistent id",
    ),
    "BUILD": (b"\x80\x02]}X\x01\0\0\0aK\x01sb.", "attributes set on a list"),
    "BUILD of a dict": (b"\x80\x02}}X\x01\0\0\0aK\x01sb.", "attributes set on a dict"),
    "REDUCE of data": (b"\x80\x02X\x01\0\0\0a)R.", "a call of 'str'"),
    "REDUCE of a class": (b"\x80\x02cnumpy\nndarray\n)R.", "a call of 'numpy.ndarray'"),
    "REDUCE of a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of 'torch.Float"),
    "a name as value": (b"\x80\x02ccollections\nOrderedDict\n.", "which is no data"),
    "wrong arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "wrong arguments"),
    "OrderedDict of pairs": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "wrong arguments"),
    "dtype of objects": (b"\x80\x02cnumpy\ndtype\nX\x02\0\0\0O8\x85R.", "dtype 'O8'"),
    "no opcode": (b"\x80\x02\xff.", "opcode b'.xff'"),
    "no mark": (b"\x80\x02t.", "no whole pickle"),
    "an empty stack": (b"\x80\x02.", "no whole pickle"),
    "memo": (b"\x80\x02h\x05.", "used before"),
    "cut": (b"\x80\x02X\xff\xff\xff\xff", "ends early"),
    "endless": (b"\x80\x02", "ends early"),
}


@pytest.mark.parametrize(("pickled", "word"), OPCODES.values(), ids=OPCODES)
def test_an_opcode_that_could_run_code_is_refused_by_name(pickled, word):
    refused(zipped(pickled), word)


BOMBS = {
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "laughs": b"\x80\x02]q\0"
    + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 60)) + b".",
    "cycle": b"\x80\x02]q\0h\0a.",
    "memo": b"\x80\x02]r\xff\xff\xff\xff" + b"h\0.",
    "encode": b"\x80\x02c_codecs\nencode\nq\0X\0\0\x10\0" + b"a" * (1 << 20)
    + b"X\x06\0\0\0latin1\x86q\x01](" + b"h\0h\x01R" * 1000 + b"e.",
    "shown": b"\x80\x02)q\0"
    + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b"Q.",
    "steps": b"\x80\x02](" + b"N" * 5_000_000 + b"e.",
    "keys": b"\x80\x02}" + b"\x8a\x09" + (((1 << 61) - 1) << 3).to_bytes(9, "little") + b"Ns.",
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pickled", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_grows_is_refused_soon(pickled):
    refused(zipped(pickled), "has")


def tensor_pickle(size, stride, offset=0, count=4, key="0"):
    """A tensor of such a view, as torch.save would write it, whatever it says."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", count) if value is Storage else None

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    view = Hostile(rebuild, (Storage, offset, size, stride, False, OrderedDict()))
    Pickler(buffer, 2).dump({"x": view})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("view", "stored", "word"),
    [
        ({"size": (5,), "stride": (1,)}, 16, "does not fit"),
        ({"size": (2, 2), "stride": (4, 1)}, 16, "does not fit"),
        ({"size": (4,), "stride": (1,), "offset": 1}, 16, "does not fit"),
        ({"size": (1 << 30,), "stride": (0,)}, 16, "does not fit"),
        ({"size": (4,), "stride": (1,), "offset": -1}, 16, "a tensor at -1"),
        ({"size": (4,), "stride": (-1,)}, 16, "the shape"),
        ({"size": (1 << 62,), "stride": (1,)}, 16, "the shape"),
        ({"size": (2, 2), "stride": (1,)}, 16, "of shape"),
        ({"size": (4,), "stride": (1,)}, 15, "15 bytes where 4"),
        ({"size": (4,), "stride": (1,)}, 20, "20 bytes where 4"),
        ({"size": (4,), "stride": (1,), "count": -1}, 16, "16 bytes where -1"),
        ({"size": (4,), "stride": (1,), "key": "1"}, 16, "missing"),
        ({"size": (4,), "stride": (1,), "key": "../version"}, 16, "missing"),
    ],
)
def test_wrong_sizes_are_refused(view, stored, word):
    refused(zipped(tensor_pickle(**view), {"archive/data/0": bytes(stored)}), word)


def test_many_views_of_one_storage_cannot_fill_the_memory():
    values = torch.zeros(1000)
    refused(saved({str(i): values for i in range(5000)}), "many times larger")


PLAIN = b"\x80\x02}."


def test_compressed_entries_are_refused_before_they_are_opened():
    refused(zipped(PLAIN, compression=zipfile.ZIP_DEFLATED), "compressed")
    bomb = zipped(PLAIN + bytes(1 << 26), compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 17
    refused(bomb, "compressed")


@pytest.mark.parametrize(
    "name",
    ["archive/../data/0", "/archive/data/0", "../archive/data/0", "archive/data/..", "archive/x/0",
     "archive\\data\\0", "other/data/0", "archive/code/x.py", "archive/data/0/",
     "archive/nested.zip", "archive/data/x", "archive/constants.pkl"],
)  # fmt: skip
def test_entries_that_torch_does_not_write_are_refused(name):
    refused(zipped(PLAIN, {name: b"x"}), "entry")


def test_a_nested_archive_is_no_pickle():
    refused(zipped(zipped(PLAIN)), "opcode|whole pickle")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_twice_is_refused():
    buffer = io.BytesIO(zipped(PLAIN))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(HOSTILE["reduce"], 2))
    refused(buffer.getvalue(), "twice")


def test_a_directory_that_lies_about_sizes_is_refused():
    data = zipped(PLAIN)
    place = data.index(b"PK\x01\x02")
    for size in (1 << 31, len(PLAIN) + 1):
        lied = bytearray(data)
        struct.pack_into("<II", lied, place + 20, size, size)
        refused(bytes(lied), "has")
    lied = bytearray(data)
    struct.pack_into("<H", lied, place + 8, 1)
    refused(bytes(lied), "encrypted")
    flipped = data.replace(PLAIN, b"\x80\x02].")
    assert zlib.crc32(PLAIN) != zlib.crc32(b"\x80\x02].")
    refused(flipped, "CRC")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"x" * 100, pickle.dumps({}, 2)])
def test_what_is_no_archive_is_refused(data):
    refused(data, "archive")


def test_a_file_of_before_zip_archives_is_refused():
    refused(saved({}, _use_new_zipfile_serialization=False), "before torch 1.6")


def test_other_byte_orders_are_refused():
    refused(zipped(PLAIN, {"archive/byteorder": b"big"}), "little-endian")


SAMPLE = saved({"a": torch.arange(4.0), "b": np.arange(3), "c": {"d": [1, "x"]}})
(PICKLED,) = (
    zipfile.ZipFile(io.BytesIO(SAMPLE)).read(n)
    for n in zipfile.ZipFile(io.BytesIO(SAMPLE)).namelist()
    if n.endswith("data.pkl")
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_changed_in_a_file_it_is_read_or_refused(data):
    source = data.draw(st.sampled_from([SAMPLE, PICKLED]))
    changed = bytearray(source)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RefusedFileError):
        read_archive(bytes(changed) if source is SAMPLE else zipped(bytes(changed)), "x")
    assert CANARY == []


OPS = [bytes([code]) for code in range(256)]
OPS += [b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"cnumpy\ndtype\n"]
OPS += [b"X\x02\0\0\0f4", b"K\x01", *[b"(", b"R", b"b", b")"] * 8]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(OPS)))
def test_any_sequence_of_opcodes_is_read_or_refused(opcodes):
    with contextlib.suppress(RefusedFileError):
        read_archive(zipped(b"\x80\x02" + b"".join(opcodes) + b"."), "x")
    assert CANARY == []
