"""The account of time: every second is charged once, over restarts too."""

from __future__ import annotations

import pytest

from tst_ray.goodput import PARTS, Account


def test_the_parts_add_up_to_the_wall_time() -> None:
    account = Account(at=100.0)
    account.charge("startup", 110.0)
    account.charge("stepping", 111.0, data_wait=0.25, evaluation=0.1)
    account.charge("stepping", 115.0, checkpoint_stall=1.5)
    again = Account.from_dict(account.to_dict(), now=0.0)
    again.charge("restart", 130.5)
    assert again.wall_s == pytest.approx(30.5)
    assert again.parts["startup"] == 10.0
    assert again.parts["stepping"] == pytest.approx(0.65 + 2.5)
    assert again.parts["data_wait"] == 0.25
    assert again.parts["restart"] == pytest.approx(15.5)
    assert set(again.parts) == set(PARTS)


def test_what_went_on_within_is_never_more_than_the_time_there_was() -> None:
    account = Account(at=0.0)
    account.charge("stepping", 1.0, data_wait=0.8, evaluation=0.8)
    assert account.parts["data_wait"] == 0.8
    assert account.parts["evaluation"] == pytest.approx(0.2)
    assert account.parts["stepping"] == 0.0
    assert account.wall_s == 1.0


def test_repeated_steps_no_longer_count_as_stepping() -> None:
    account = Account(at=0.0)
    account.charge("stepping", 10.0)
    account.repeat(4.0)
    assert (account.parts["stepping"], account.parts["repeated"]) == (6.0, 4.0)
    assert account.goodput == 0.6
    account.repeat(100.0)
    assert account.parts["stepping"] == 0.0
    assert account.wall_s == 10.0


def test_a_clock_that_goes_back_charges_nothing() -> None:
    account = Account(at=10.0)
    account.charge("stepping", 5.0)
    assert account.wall_s == 0.0
    account.charge("stepping", 12.0)
    assert account.wall_s == 2.0


def test_a_new_account_starts_now() -> None:
    account = Account.from_dict(None, now=50.0)
    assert (account.at, account.wall_s, account.goodput) == (50.0, 0.0, 0.0)
