"""The room for workers: what is asked of the cluster again, and what is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray.exceptions import RpcError

from tst_ray.errors import RunError
from tst_ray.room import steadily


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no length, and few."""
    monkeypatch.setattr("tst_ray.storage.pauses", lambda patience_s: iter([0.0] * 3))


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("passing", [RpcError("unavailable"), RuntimeError("no answer"), OSError()])
def test_a_cluster_that_does_not_answer_is_asked_again(passing: Exception) -> None:
    answers: Iterator[Exception | int] = iter([passing, passing, 7])

    def look() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert steadily(look) == 7


@pytest.mark.usefixtures("pauses")
def test_what_is_for_the_user_is_told_at_once() -> None:
    """A RunError is a RuntimeError, as are some of Ray's that pass."""
    asked = []

    def look() -> None:
        asked.append(1)
        raise RunError("run.storage: a user's line")

    with pytest.raises(RunError, match=r"^run\.storage: a user's line$"):
        steadily(look)
    assert len(asked) == 1
