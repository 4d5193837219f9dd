import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mttl_adapters import kernels
from mttl_adapters.bank import Bank
from mttl_adapters.bank_files import BankFiles
from mttl_adapters.chosen import Chosen
from mttl_adapters.mapped import DamagedFileError


@pytest.fixture(params=["torch", "cpu"])
def kernel(request):
    if request.param == "cpu" and kernels.missing():
        pytest.skip(kernels.missing())
    with kernels.using(request.param):
        yield request.param


def make_expert(seed: int, rank: int = 4, features: int = 40, modules: str = "qv"):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.0.{module}_proj": (
            torch.randn(rank, features, generator=generator),
            torch.randn(24, rank, generator=generator),
            0.5 + seed,
        )
        for module in modules
    }


def test_a_mapped_bank_is_the_bank_of_the_tensors(kernel, tmp_path):
    experts = [make_expert(0), make_expert(1, rank=7), make_expert(2, modules="q"), make_expert(3)]
    files = BankFiles(tmp_path)
    files.add_all((f"d{number}", expert) for number, expert in enumerate(experts))
    banks = files.banks(["d3", "d0", "d2", "d1"])
    assert list(banks) == ["layers.0.q_proj", "layers.0.v_proj"]
    assert banks["layers.0.v_proj"].ranks == (4, 4, 0, 7)
    x = torch.randn(50, 40)
    for module, bank in banks.items():
        column = [experts[number].get(module) for number in (3, 0, 2, 1)]
        nothing = (torch.zeros(0, 40), torch.zeros(24, 0), 1.0)
        expected = Bank.from_factors([factors or nothing for factors in column])
        torch.testing.assert_close(bank.a, expected.a, rtol=0, atol=0)
        torch.testing.assert_close(bank.b, expected.b, rtol=0, atol=0)
        chosen = Chosen(torch.randint(0, 4, (50, 2)), torch.rand(50, 2))
        torch.testing.assert_close(
            bank.apply(x, chosen), expected.apply(x, chosen), rtol=1e-4, atol=1e-4
        )


def test_adding_an_expert_writes_that_expert_alone_and_twice_writes_once(tmp_path):
    files = BankFiles(tmp_path)
    files.add("one", make_expert(0))
    (path,) = files.folder.iterdir()
    before = path.stat()
    bank = files.banks(["one"])["layers.0.q_proj"]
    files.add("two", make_expert(1))
    files.add("one", make_expert(5))  # the same digest is the same expert
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(item.name for item in files.folder.iterdir()) == [
        "one.safetensors",
        "two.safetensors",
    ]
    assert "two" in files
    assert "three" not in files
    assert len(bank.append(*make_expert(1)["layers.0.q_proj"])) == 2


def test_bfloat16_takes_half_and_stays_within_its_rounding(tmp_path):
    expert = make_expert(0, features=4000)
    wide, narrow = BankFiles(tmp_path), BankFiles(tmp_path, dtype=torch.bfloat16)
    for files in (wide, narrow):
        files.add("one", expert)
    sizes = [next(files.folder.iterdir()).stat().st_size for files in (wide, narrow)]
    assert sizes[1] < 0.55 * sizes[0]
    a, b, _ = expert["layers.0.q_proj"]
    bank = narrow.banks(["one"])["layers.0.q_proj"]
    exact, found = b @ a, bank.b.float() @ bank.a.float()
    assert (found - exact).norm() < 0.004 * exact.norm()


def test_two_writers_of_one_expert_leave_one_whole_file(tmp_path):
    files, expert = BankFiles(tmp_path), make_expert(0)
    threads = [threading.Thread(target=files.add, args=("one", expert)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item.name for item in files.folder.iterdir()] == ["one.safetensors"]
    torch.testing.assert_close(
        files.banks(["one"])["layers.0.q_proj"].a, expert["layers.0.q_proj"][0]
    )


def test_what_is_wrong_is_named(tmp_path):
    files = BankFiles(tmp_path)
    with pytest.raises(ValueError, match="'../x' is no digest"):
        files.add("../x", make_expert(0))
    with pytest.raises(FileNotFoundError):
        files.banks(["nope"])
    files.add("one", make_expert(0))
    files.add("two", make_expert(1, features=41))
    with pytest.raises(ValueError, match=r"disagree on 'layers.0.q_proj'.*\(40, 24\), \(41, 24\)"):
        files.banks(["one", "two"])
    with pytest.raises(TypeError, match="torch.int64"):
        BankFiles(tmp_path, dtype=torch.int64)


def resident(folder) -> int:
    """Bytes of this process's memory that lie in files of a folder."""
    total, inside = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                inside = str(folder) in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_follows_use_and_stays_within_its_bound(kernel, tmp_path):
    files = BankFiles(tmp_path, resident_bytes=8 * 2**20)
    files.add_all((f"d{n}", make_expert(n, rank=16, features=6000)) for n in range(60))
    banks = files.banks([f"d{n}" for n in range(60)])
    used = resident(files.folder)
    assert used < 6 * 2**20  # the headers
    x = torch.randn(6, 6000)
    whole = {
        module: Bank.from_factors([make_expert(n, 16, 6000)[module] for n in range(60)])
        for module in banks
    }
    highest = 0
    for start in range(0, 60, 6):
        chosen = Chosen(torch.arange(start, start + 6).unsqueeze(1), torch.ones(6, 1))
        for module, bank in banks.items():
            torch.testing.assert_close(
                bank.apply(x, chosen),
                whole[module].apply(x, chosen),
                rtol=1e-4,
                atol=0.1,  # of about 10,000
            )
            highest = max(highest, resident(files.folder))
    assert 4 * 2**20 < highest <= used + 8 * 2**20


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def damaged(content: bytes) -> dict[str, bytes]:
    begin = 8 + int.from_bytes(content[:8], "little")
    return {
        "empty": b"",
        "truncated": content[:-1],
        "cut off in the header": content[:50],
        "longer": content + b"\0",
        "of another kind": b"\0" * len(content),
        "of another format": content.replace(b'"format\\": 2', b'"format\\": 1'),
        "of another shape": content.replace(b'"shape":[4,40]', b'"shape":[4,41]'),
        "of another scaling": content.replace(b'_proj\\": 0.5', b'_proj\\": 0.7'),
        "with another seal": flipped(content, len(content) - 1),
        "with another header": flipped(content, content.index(b"q_proj.a")),
        "with another first number": flipped(content, begin),
        "with another number": flipped(content, (begin + len(content)) // 2),
        "with another last number": flipped(content, len(content) - 13),
        "never filled": content[:begin] + b"\0" * (len(content) - begin),
    }


IN_NUMBERS = {"with another first number", "with another number", "with another last number"}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("fault", list(damaged(b"\0" * 100 + b"q_proj.a")))
def test_a_damaged_file_is_noticed_and_written_again(tmp_path, fault, verify):
    files, expert = BankFiles(tmp_path), make_expert(0)
    files.add("one", expert)
    (path,) = files.folder.iterdir()
    whole = path.read_bytes()
    wrong = damaged(whole)[fault]
    assert wrong != whole
    path.write_bytes(wrong)
    again = BankFiles(tmp_path, verify=verify)
    if fault in IN_NUMBERS and not verify:
        assert "one" in again  # what verify=False does not look at
        return
    assert "one" not in again
    with pytest.raises(DamagedFileError, match=r"one\.safetensors' is damaged"):
        again.banks(["one"])
    again.add("one", expert)
    assert path.read_bytes() == whole
    torch.testing.assert_close(
        again.banks(["one"])["layers.0.q_proj"].a, expert["layers.0.q_proj"][0]
    )


def test_a_file_that_changed_after_it_was_verified_is_verified_again(tmp_path):
    files = BankFiles(tmp_path)
    files.add("one", make_expert(0))
    files.banks(["one"])
    (path,) = files.folder.iterdir()
    path.write_bytes(damaged(path.read_bytes())["with another number"])
    with pytest.raises(DamagedFileError, match="checksum"):
        files.banks(["one"])


@pytest.mark.parametrize("verify", [True, False])
def test_the_file_of_another_expert_is_not_taken_for_this_one(tmp_path, verify):
    files = BankFiles(tmp_path, verify=verify)
    files.add("one", make_expert(0))
    (path,) = files.folder.iterdir()
    path.rename(path.with_name("two.safetensors"))
    assert "two" not in files
    with pytest.raises(DamagedFileError, match="written under another name"):
        files.banks(["two"])


KILLED = """
import os, signal, sys, torch
from mttl_adapters import BankFiles, mapped
save = mapped.save_file
def stop_halfway(tensors, path, metadata):
    save(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
mapped.save_file = stop_halfway
BankFiles(sys.argv[1]).add("one", {"m": (torch.ones(4, 4000), torch.ones(24, 4), 1.0)})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode < 0
    files = BankFiles(tmp_path)
    assert len(list(files.folder.iterdir())) == 1  # half a file, under a name of its own
    assert "one" not in files
    a = torch.full((4, 4000), 2.0)
    files.add("one", {"m": (a, torch.ones(24, 4), 1.0)})
    torch.testing.assert_close(files.banks(["one"])["m"].a, a)


WRITE = """
for number in range(40):
    generator = torch.Generator().manual_seed(number)
    a, b = (torch.randn(shape, generator=generator) for shape in ((4, 4000), (24, 4)))
    files.add(f"d{number}", {"m": (a, b, 1.0)})
    assert torch.equal(files.banks([f"d{number}"])["m"].a, a)
"""
OTHER = """
import sys, torch
from mttl_adapters import BankFiles
files = BankFiles(sys.argv[1])
print("ready", flush=True)
"""


def test_two_processes_that_write_to_one_folder_do_not_meet_half_a_file(tmp_path):
    command = [sys.executable, "-c", OTHER + WRITE, str(tmp_path)]
    files = BankFiles(tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        exec(WRITE, {"files": files, "torch": torch})
    assert other.returncode == 0
    assert sorted(f.name for f in files.folder.iterdir()) == sorted(
        f"d{number}.safetensors" for number in range(40)
    )
