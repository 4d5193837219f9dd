"""What jobs need around them: options by key, one line for what users cause."""

import warnings

import click
import pytest
from click.testing import CliRunner

from mttl_experts import (
    ExpertError,
    ExpertNotFoundError,
    IncompatibleExpertError,
    IncompatibleExpertWarning,
)
from mttl_experts.jobs import JobCommand, known_errors
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


@pytest.fixture
def command():
    @click.command(
        cls=JobCommand, aliases={"lora_rank": "rank", "tasks": "task"}, others=["top_k", "rank"]
    )
    @click.option("--task", multiple=True, help=".")
    @click.option("--all", "all_tasks", is_flag=True, help=".")
    @click.option("--benchmarks", help=".")
    @click.option("--learning-rate", type=float, help=".")
    @click.option("--rank", type=int, help=".")
    def main(**options):
        click.echo(repr(options))

    def run(*args):
        outcome = CliRunner().invoke(main, args)
        assert "Traceback" not in outcome.output
        assert not outcome.exception or isinstance(outcome.exception, SystemExit), outcome.exception
        return outcome.output

    return run


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("tasks=['a','b']", "'task': ('a', 'b')"),
        ("task=a,b", "'task': ('a,b',)"),
        ("benchmarks=['arc-easy','piqa']", "'benchmarks': 'arc-easy,piqa'"),
        ("benchmarks=('arc-easy',)", "'benchmarks': 'arc-easy'"),
        ("all=True", "'all_tasks': True"),
        ("all_tasks=True", "'all_tasks': True"),
        ("learning_rate=1e-3", "'learning_rate': 0.001"),
        ("benchmarks={[]:1}", "'benchmarks': '{[]:1}'"),
        ("benchmarks={'a':1}", "it takes one value, or a list"),
        ("rank=[1,2]", "'1,2' is not a valid integer"),
        ("lora_rnk=1", "unknown key 'lora_rnk' in -k; did you mean 'lora_rank'"),
    ],
)
def test_a_pair_sets_what_the_flag_would(command, pair, says):
    assert says in command("-k", pair)


def test_a_key_of_another_app_has_no_effect_and_it_says_so(command, tmp_path):
    (tmp_path / "a.json").write_text('{"top_k": 2, "rank": 3}')
    said = command("-c", str(tmp_path / "a.json"))
    assert "keys of another app, without effect here: top_k\n" in said
    assert "'rank': 3" in said
