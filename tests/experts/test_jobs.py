"""What jobs need around them: options by key, one line for what users cause."""

import warnings

import click
import pytest

from mttl_experts import (
    ExpertError,
    ExpertNotFoundError,
    IncompatibleExpertError,
    IncompatibleExpertWarning,
)
from mttl_experts.jobs import known_errors
from mttl_storage import Conflict


class OfAnotherPackageError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ExpertNotFoundError("no\nexpert"),
        IncompatibleExpertError("no\nexpert"),
        Conflict("no\nexpert"),
        OSError("no\nexpert"),
        OfAnotherPackageError("no\nexpert"),
    ],
)
def test_what_users_cause_is_one_line(error):
    with pytest.raises(click.ClickException) as caught, known_errors(OfAnotherPackageError):
        raise error
    assert caught.value.format_message() == "no expert"


def test_a_bare_value_error_is_a_bug_and_keeps_its_traceback():
    with pytest.raises(ValueError, match="bug"), known_errors():
        raise ValueError("bug")


def test_every_error_of_the_package_derives_from_one():
    import mttl_experts.errors

    found = {
        value
        for value in vars(mttl_experts.errors).values()
        if isinstance(value, type) and value.__module__ == "mttl_experts.errors"
    }
    assert all(issubclass(kind, (ExpertError, Warning)) for kind in found)


def test_a_warning_of_ours_is_one_line_and_others_go_where_they_went(capsys):
    message = "expert 'e'\nwas made with other weights"
    elsewhere = pytest.warns(UserWarning, match="of another library")
    with elsewhere, known_errors():
        for _ in range(2):
            warnings.warn(message, IncompatibleExpertWarning, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)
    assert capsys.readouterr().out == "warning: expert 'e' was made with other weights\n"
