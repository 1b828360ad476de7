"""Where the wall time of a run went: an account in which every second is charged once.

The account holds a sum of seconds for each `PARTS` and the moment up to which all time is charged.
Whoever is at work charges what has passed since then: rank 0 while it trains, the driver before and
after. It is kept in run.json, so it goes on over restarts, and its parts add up to the wall time by
construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PARTS = (
    "stepping",  # forward, backward, update: what a run is for
    "data_wait",  # rank 0 waited for a batch
    "evaluation",
    "checkpoint_stall",  # the loop waited for a save to be staged, or for the one before
    "repeated",  # steps that were trained again after a failure
    "restart",  # from an attempt's last step to the first step of the next one
    "waiting_for_nodes",
    "startup",  # preparing the corpus, starting Ray and the first group
    "closing",  # writing the model
    "down",  # no driver was running
)


@dataclass
class Account:
    """Seconds by what they were spent on.

    Attributes:
        at: Unix time up to which all time is charged.
        parts: seconds of each of `PARTS`.
    """

    at: float
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def charge(self, part: str, now: float, **within: float) -> None:
        """Charge the time since `at` to a part, less what went `within` it on others (seconds).

        A clock that went back charges nothing.
        """
        rest = max(now - self.at, 0.0)
        for other, seconds in within.items():
            share = min(max(seconds, 0.0), rest)
            self.parts[other] += share
            rest -= share
        self.parts[part] += rest
        self.at = max(now, self.at)

    def repeat(self, seconds: float) -> None:
        """Steps that took so long will be trained again: they no longer count as stepping."""
        moved = min(seconds, self.parts["stepping"])
        self.parts["stepping"] -= moved
        self.parts["repeated"] += moved

    @property
    def wall_s(self) -> float:
        """All seconds charged so far."""
        return sum(self.parts.values())

    @property
    def goodput(self) -> float:
        """The share of the wall time that went into steps which count."""
        return self.parts["stepping"] / self.wall_s if self.wall_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        parts = {name: round(seconds, 6) for name, seconds in self.parts.items()}
        return {"at": round(self.at, 6), "parts": parts}

    @classmethod
    def from_dict(cls, facts: dict[str, Any] | None, now: float) -> Account:
        """The account in run.json; a new one, from `now`, where there is none."""
        if not facts:
            return cls(now)
        known = {name: float(facts["parts"].get(name, 0.0)) for name in PARTS}
        return cls(float(facts["at"]), known)
