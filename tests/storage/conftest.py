import itertools
import shutil

import pytest

from mttl_storage import Repository, filesystem

_numbers = itertools.count()


@pytest.fixture(params=["local", "virtual"])
def address(request, tmp_path):
    """An address with nothing at it."""
    if request.param == "local":
        yield f"local://{tmp_path / 'library'}"
        return
    uri = f"virtual://test-{next(_numbers)}"
    yield uri
    store = filesystem(uri)
    if store.exists(""):
        for name in store.ls("", detail=False):
            store.rm(name, recursive=True)


@pytest.fixture
def repository(address):
    return Repository.open(address, create=True)


@pytest.fixture
def local(tmp_path):
    return Repository.open(tmp_path / "library", create=True)


@pytest.fixture
def clone(tmp_path):
    """Copies a folder to a fresh place, to damage it there."""
    places = (tmp_path / f"clone{number}" for number in itertools.count())

    def copy_of(folder):
        return shutil.copytree(folder, next(places))

    return copy_of
