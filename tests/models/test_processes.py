"""Processes that share work: who does what, and what the first one says."""

import pytest

from tokenratio.errors import TokenRatioError
from tokenratio.models import processes
from tokenratio.models.processes import Group, current
from tokenratio.models.token_rows import run_by_length


@pytest.fixture
def broadcast(monkeypatch):
    """What the first process sends to the others, which are not there."""
    sent = []
    monkeypatch.setattr(
        "accelerate.utils.broadcast_object_list", lambda objects: sent.extend(objects) or objects
    )
    return sent


@pytest.mark.parametrize("error", [OSError("no space"), TokenRatioError("no")], ids=repr)
def test_an_error_of_the_first_process_reaches_the_others(error, broadcast):
    """They wait for what it says."""

    def fails():
        raise error

    with pytest.raises(type(error)):
        Group(0, 2).on_first(fails)
    assert broadcast == [error]


def test_the_first_process_works_alone(broadcast, monkeypatch):
    """What it calls does not wait for the others."""
    monkeypatch.setattr(processes, "_current", Group(0, 2))
    assert current().on_first(current) == Group(0, 1) == broadcast[0]
    assert current() == Group(0, 2)


def test_a_refusal_of_one_process_is_raised_by_all(monkeypatch):
    """Else a process that goes on after it would be out of step with those that wait."""
    found = iter([[({0: "a"}, None), ({}, TokenRatioError("row 1 is not finite"))]])
    monkeypatch.setattr(Group, "gather", lambda self, own: next(found))
    monkeypatch.setattr(processes, "_current", Group(0, 2))
    with pytest.raises(TokenRatioError, match="row 1 is not finite"):
        run_by_length([1, 2], lambda indices: ["a"] * len(indices), batch_size=1)


def test_every_batch_has_one_process():
    shares = [Group(index, 3).share(range(7)) for index in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
