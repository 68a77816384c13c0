"""What the commands share, on a program that has nothing to do with this project."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

from common.cli import Cli
from common.errors import DataError


@click.group(cls=Cli, program="toy", packages=["toybox"])
def toy() -> None:
    """Play."""


@toy.command()
@click.option("--speak", is_flag=True)
def fail(speak: bool) -> None:
    """Break."""
    logging.getLogger("toybox").info("playing")
    logging.getLogger("elsewhere").info("chatter")
    raise DataError("the toy\nis broken")


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    yield
    logging.getLogger("toybox").setLevel(logging.NOTSET)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(toy, arguments)


def test_an_error_for_people_is_one_line_and_its_exit_code() -> None:
    result = run("fail")
    assert (result.exit_code, result.output) == (3, "error: the toy is broken\n")


@pytest.mark.parametrize("arguments", [("--debug", "fail"), ("fail", "--debug"), ("fail", "--debug", "--speak")])
def test_debug_anywhere_lets_an_error_keep_its_traceback(arguments: tuple[str, ...]) -> None:
    assert isinstance(run(*arguments).exception, DataError)


def test_a_wrong_option_is_a_usage_error_under_the_programs_name() -> None:
    result = run("fail", "--spaek")
    assert result.exit_code == 2 and "Usage: toy fail" in result.output


@pytest.mark.parametrize(("rank", "heard"), [("0", ["playing"]), ("1", [])])
def test_only_the_first_process_tells_of_progress_and_only_of_its_own_packages(
    rank: str, heard: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    run("fail")
    assert [record.message for record in caplog.records] == heard
