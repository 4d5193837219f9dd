import itertools
import shutil

import pytest

from mttl_storage import Repository


@pytest.fixture
def address(scheme, new_address):
    """An address with nothing at it, of each backend."""
    return new_address(scheme)


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
