"""What is special to the Hugging Face Hub: one commit for all, what it shows, ranges, refusals."""

import os
import re
import subprocess
import sys
import time
import warnings

import pytest

from mttl_storage import (
    Denied,
    NotFound,
    Repository,
    StorageError,
    StorageFull,
    Throttled,
    cache,
    retrying,
)

pytest.importorskip("huggingface_hub")
pytest.importorskip("starlette")
from huggingface_hub import HfApi, get_session, hf_hub_download, set_client_factory
from huggingface_hub.utils import _http

from mttl_storage.store import hub_client
from mttl_storage.testing.hub import Cut, LoopbackHub, Stall, Status

FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"0123456789" * 500}


@pytest.fixture
def name(new_address):
    return new_address("hf").removeprefix("hf://")


@pytest.fixture
def repository(name):
    return Repository.open(f"hf://{name}", create=True)


@pytest.fixture(autouse=True)
def no_faults(hub):
    yield
    hub.faults.clear()


def shown(hub, name, kind="model"):
    """The files that people see, by path."""
    files = hub.files(name, kind=kind)
    return {path: data for path, data in files.items() if not path.startswith(".")}


def count(hub, method, part):
    return sum(m == method and re.search(part, path) is not None for m, path in hub.requests)


# Credentials.


def test_a_token_comes_from_the_argument_then_the_environment_then_the_login(
    hub, repository, monkeypatch, tmp_path
):
    token = os.environ["HF_TOKEN"]
    assert hub_client.connect(None)[0].token == token
    assert hub_client.connect("hf_of-the-argument")[0].token == "hf_of-the-argument"
    assert hub_client.connect(False)[0].token is False
    monkeypatch.delenv("HF_TOKEN")
    login = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(login))
    assert hub_client.connect(None)[0].token is False
    login.write_text("hf_of-the-login")
    assert hub_client.connect(None)[0].token == "hf_of-the-login"
    Repository.open(repository.uri, token=token).add("experts/a", FILES)
    monkeypatch.setenv("HF_TOKEN", token)
    Repository.open(repository.uri).add("experts/b", FILES)


def test_false_is_no_token(repository):
    repository.add("experts/a", FILES)
    visitor = Repository.open(repository.uri, token=False)
    assert visitor.read("experts/a", "adapter_config.json") == b'{"r": 4}'
    with pytest.raises(Denied, match="the credential of no token"):
        visitor.add("experts/b", FILES)


# Commits of the hub.


def test_a_batch_of_a_hundred_items_is_one_commit_of_the_hub(hub, name, repository):
    before = len(hub.commits(name))
    hub.requests.clear()
    with repository.batch("a hundred") as batch:
        for number in range(100):
            batch.add(f"experts/e{number}", {"adapter_config.json": b"%d" % number})
    commits = hub.commits(name)
    assert len(commits) == before + 1
    assert commits[-1].title == "a hundred"
    assert count(hub, "POST", "/commit/") == 1
    assert len(hub.requests) < 20
    assert len(shown(hub, name)) == 100
    assert repository.verify() == []


def test_the_snapshot_of_generation_100_is_in_the_commit_of_its_entry(hub, name, repository):
    for number in range(99):
        repository.update_info("a", {"n": number}) if number else repository.add("a", {})
    before = len(hub.commits(name))
    repository.update_info("a", {"n": 99})
    old, new = hub.commits(name)[-2:]
    assert len(hub.commits(name)) == before + 1
    files = {each: hub.files(name, revision=each.oid) for each in (old, new)}
    added = files[new].keys() - files[old].keys()
    assert added == {".mttl/log/00000000/0000000100.json", ".mttl/snapshots/0000000100.json"}
    changed = {path for path in files[old] if files[new][path] != files[old][path]}
    assert changed == {".mttl/head.json"}
    assert Repository.open(repository.uri).item("a").info == {"n": 99}


def test_gc_is_one_commit_and_says_what_git_keeps(hub, name, repository):
    for number in range(5):
        repository.add(f"experts/e{number}", {"adapter_model.safetensors": b"%d" % number})
    for number in range(4):
        repository.remove(f"experts/e{number}")
    before = len(hub.commits(name))
    collected = repository.gc(0)
    assert (collected.items, collected.files) == (4, 4)
    assert "super_squash_history" in collected.note
    titles = [commit.title for commit in hub.commits(name)[before:]]
    assert titles == ["gc", "gc: delete 4 files"]  # the items are forgotten, then files deleted
    assert [path for path in hub.files(name) if path.startswith(".mttl/items/")] == [
        f".mttl/items/experts/e4/{repository.item('experts/e4').digest}/adapter_model.safetensors"
    ]
    assert repository.verify() == []


def test_opening_250_generations_takes_few_requests_and_several_at_once(hub, repository):
    for number in range(250):
        repository.update_info("a", {"n": number}) if number else repository.add("a", {})
    hub.requests.clear()
    hub.faults.add(Stall(0.1), method="GET", path="/log/")
    began = time.monotonic()
    again = Repository.open(repository.uri)
    seconds = time.monotonic() - began
    assert again.item("a").info == {"n": 249}
    # The 50 entries since the last snapshot, some that are not there yet, and a few besides.
    assert 50 < len(hub.requests) < 130
    assert seconds < 0.1 * len(hub.requests) / 2
    hub.requests.clear()
    again.refresh()
    assert len(hub.requests) < 5


# What the hub shows.


def test_what_the_hub_shows_follows_every_change(hub, name, repository):
    def expected(**items):
        return {f"{item}/{f}": data for item, files in items.items() for f, data in files.items()}

    repository.add("experts/a", FILES)
    assert shown(hub, name) == expected(a=FILES)
    repository.add("artifacts/plan", {"plan.json": b"{}"})  # which is not shown
    assert shown(hub, name) == expected(a=FILES)
    other = {"adapter_config.json": b"{}", "deep/er.bin": b"1"}
    repository.replace("experts/a", other)
    assert shown(hub, name) == expected(a=other)
    repository.rename("experts/a", "experts/b")
    assert shown(hub, name) == expected(b=other)
    repository.remove("experts/b")
    assert shown(hub, name) == {}
    repository.restore("experts/b")
    assert shown(hub, name) == expected(b=other)
    with repository.batch() as batch:
        batch.add("experts/a", FILES)
        batch.rename("experts/b", "experts/c")
        batch.add("experts/b", FILES)
    assert shown(hub, name) == expected(a=FILES, b=FILES, c=other)
    with repository.batch() as batch:
        batch.remove("experts/a")
        batch.remove("experts/b")
        batch.rename("experts/c", "experts/a")
    assert shown(hub, name) == expected(a=other)
    repository.rename("experts/a", "artifacts/a")
    assert shown(hub, name) == {}
    assert repository.verify() == []


def test_the_client_of_the_hub_reads_an_item_by_its_name(hub, name, repository, tmp_path):
    repository.add("experts/arithmetic", FILES)
    for file, data in FILES.items():
        path = hf_hub_download(
            name, file, subfolder="arithmetic", cache_dir=tmp_path, endpoint=hub.endpoint
        )
        with open(path, "rb") as found:  # noqa: PTH123
            assert found.read() == data


def test_a_dataset_repository_shows_datasets(hub, new_address):
    name = new_address("hf").removeprefix("hf://")
    repository = Repository.open(f"hf://datasets/{name}", create=True)
    assert repository.uri == f"hf://datasets/{name}"
    repository.add("datasets/rows", {"train.jsonl": b"{}\n"})
    repository.add("experts/a", FILES)
    assert shown(hub, name, "dataset") == {"rows/train.jsonl": b"{}\n"}
    with pytest.raises(LookupError):
        hub.files(name)
    with pytest.raises(NotFound, match=f"hf://{name}"):
        Repository.open(f"hf://{name}")
    assert Repository.open(repository.uri).verify() == []


def test_a_gitignore_loses_nothing(hub, name, repository):
    api = HfApi(endpoint=hub.endpoint, token=os.environ["HF_TOKEN"])
    api.upload_file(
        path_or_fileobj=b"*\n.mttl/\n*.json\n*.safetensors\n",
        path_in_repo=".gitignore",
        repo_id=name,
    )
    repository.add("experts/a", FILES)
    repository.add("experts/large", {"adapter_model.safetensors": bytes(3 << 20)})
    assert set(shown(hub, name)) == {
        "a/adapter_config.json", "a/adapter_model.safetensors", "large/adapter_model.safetensors"
    }  # fmt: skip
    assert Repository.open(repository.uri).verify() == []


def test_files_of_others_stay_and_their_changes_to_ours_are_found(hub, name, repository):
    api = HfApi(endpoint=hub.endpoint, token=os.environ["HF_TOKEN"])
    repository.add("experts/a", FILES)
    api.upload_file(path_or_fileobj=b"# Hello", path_in_repo="README.md", repo_id=name)
    assert repository.verify() == []
    for change in (
        lambda: api.upload_file(
            path_or_fileobj=b"{}", path_in_repo="a/adapter_config.json", repo_id=name
        ),
        lambda: api.delete_file("a/adapter_model.safetensors", repo_id=name),
    ):
        change()
        [problem] = repository.verify()
        assert problem.where.startswith(f"hf://{name}/a/adapter_")
        assert "remove and restore" in problem.what
        assert repository.read("experts/a", "adapter_config.json") == b'{"r": 4}'
        repository.remove("experts/a")
        repository.restore("experts/a")
        assert repository.verify() == []
    assert shown(hub, name) == {
        "README.md": b"# Hello",
        **{f"a/{file}": data for file, data in FILES.items()},
    }


# Downloads.


def test_a_download_that_was_cut_short_goes_on_where_it_stopped(hub, repository, monkeypatch):
    data = os.urandom(3_000_000)
    item = repository.add("experts/a", {"large.safetensors": data})
    entry = item.files["large.safetensors"]
    where = f"/lfs/{entry.sha256}"
    monkeypatch.setattr(retrying, "PATIENCE", 0.2)
    hub.faults.add(Cut(keep=0.4), method="GET", path=where, nth=1)
    hub.faults.add(Status(403, "no more"), method="GET", path=where)
    with pytest.raises(Denied):
        repository.path("experts/a", "large.safetensors")
    partial = cache.cached_folder(repository.store, item) / f".{entry.sha256}.part"
    there = partial.stat().st_size
    assert 1 << 20 <= there <= len(data) * 0.4
    hub.faults.clear()
    ranges = []
    monkeypatch.setattr(type(repository.store), "_request", noting(ranges, repository.store))
    assert repository.path("experts/a", "large.safetensors").read_bytes() == data
    assert ranges == [f"bytes={there}-"]


def noting(ranges, store):
    original = type(store)._request

    def request(self, method, key, **headers):
        if method == "GET" and "large" in key:
            ranges.append(headers.get("Range"))
        return original(self, method, key, **headers)

    return request


def test_a_request_that_was_given_up_for_its_silence_is_given_more_time(
    hub, repository, monkeypatch
):
    for name, seconds in (("SILENT_SECONDS", 0.25), ("LONGEST_SILENT_SECONDS", 3.0)):
        monkeypatch.setattr(hub_client, name, seconds)
    repository.store.pipe_file("slow", b"1")
    hub.requests.clear()
    hub.faults.add(Stall(0.8), path="slow")
    assert repository.store.cat_file("slow") == b"1"
    assert 3 <= len(hub.requests) <= 4  # after 0.25, 0.5, 1 and 2 s of silence
    hub.faults.clear()


def test_what_was_uploaded_before_a_commit_is_not_asked_for_again(hub, repository):
    hub.requests.clear()
    repository.add("experts/new", {"adapter_model.safetensors": b"x" * 3000, "config.json": b"{}"})
    assert sum(path.endswith("/objects/batch") for _, path in hub.requests) == 1
    assert len(hub.requests) == 7
    assert repository.verify() == []


def test_two_processes_that_want_a_file_download_it_once(hub, repository, tmp_path):
    item = repository.add("experts/a", {"large.safetensors": os.urandom(2_000_000)})
    sha256 = item.files["large.safetensors"].sha256
    code = (
        "import sys; from mttl_storage import Repository;"
        "print(Repository.open(sys.argv[1]).path('experts/a', 'large.safetensors'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, repository.uri]
    hub.requests.clear()
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [error for _, error in outputs] == ["", ""]
    assert len({path for path, _ in outputs}) == 1
    assert count(hub, "GET", f"/lfs/{sha256}") == 1


# Being a good guest.


def test_nothing_is_printed(hub, repository, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    large = tmp_path / "large.safetensors"
    large.write_bytes(os.urandom(12_000_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", module="httpx2")
        repository.add("experts/a", {**FILES, "large.safetensors": large})
        again = Repository.open(repository.uri)
        again.path("experts/a")
        again.verify()
        again.remove("experts/a")
        again.gc(0)
    assert capfd.readouterr() == ("", "")


def test_the_client_factory_and_the_time_outs_of_others_stay(hub, repository):
    import httpx2

    made, before = [], _http._GLOBAL_CLIENT_FACTORY

    def factory():
        made.append(httpx2.Client(headers={"X-Mine": "yes"}, timeout=77.0))
        return made[-1]

    try:
        set_client_factory(factory)
        again = Repository.open(repository.uri)
        again.add("experts/a", FILES)
        assert made
        assert get_session() is made[-1]
        assert get_session().headers["X-Mine"] == "yes"
        assert get_session().timeout == httpx2.Timeout(77.0)
        Repository.open(repository.uri)
        assert _http._GLOBAL_CLIENT_FACTORY.factory is factory
    finally:
        set_client_factory(before)


# Refusals: a clear error, nothing lost, and all well again afterwards.


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Status(403, "You have exceeded your storage limit"), StorageFull, "no room left"),
        (Status(413, "Payload too large"), StorageFull, "no room left"),
        (Status(507, "Insufficient storage"), StorageFull, "no room left"),
        (Status(403, "You don't have the rights"), Denied, "check its rights"),
        (Status(401, "Invalid credentials"), Denied, "check its rights"),
        (Status(400, "Bad request"), StorageError, "Bad request"),
        (Status(429, "Too many requests"), Throttled, "try again"),
        (Status(503, "Unavailable"), Throttled, "try again"),
    ],
    ids=lambda value: f"{value.code} {value.message[-13:]}" if isinstance(value, Status) else "",
)
@pytest.mark.parametrize("where", ["/commit/", "/preupload/"])
def test_a_refusal_is_told_in_one_line_and_harms_nothing(
    hub, repository, monkeypatch, fault, error, says, where
):
    monkeypatch.setattr(retrying, "PATIENCE", 0.3)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    repository.add("experts/a", FILES)
    hub.faults.add(fault, method="POST", path=where)
    with pytest.raises(error) as caught:
        repository.add("experts/b", FILES)
    message = str(caught.value)
    assert type(caught.value) is error
    assert says in message
    assert repository.uri in message
    assert "\n" not in message
    hub.faults.clear()
    assert list(Repository.open(repository.uri)) == ["experts/a"]
    assert Repository.open(repository.uri).verify() == []
    repository.add("experts/b", FILES)
    assert Repository.open(repository.uri).verify() == []


def test_a_token_that_may_only_read_is_denied_when_it_writes(monkeypatch):
    with LoopbackHub(tokens={"hf_writer-of-tests": "write", "hf_reader-of-tests": "read"}) as two:
        monkeypatch.setenv("HF_ENDPOINT", two.endpoint)
        Repository.open("hf://user/lib", token="hf_writer-of-tests", create=True).add(
            "experts/a", FILES
        )
        reader = Repository.open("hf://user/lib", token="hf_reader-of-tests")
        assert reader.verify() == []
        for change in (
            lambda: reader.add("experts/b", FILES),
            lambda: reader.remove("experts/a"),
            lambda: Repository.open("hf://user/new", token="hf_reader-of-tests", create=True),
        ):
            with pytest.raises(Denied, match="the credential of token=") as caught:
                change()
            assert "\n" not in str(caught.value)
        with pytest.raises((Denied, NotFound), match="hf://user/lib"):
            Repository.open("hf://user/lib", token="hf_of-nobody")
        assert len(Repository.open("hf://user/lib", token="hf_writer-of-tests")) == 1
