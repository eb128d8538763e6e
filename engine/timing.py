"""Where a run's time goes: seconds by part, each second in one part.

    times = Times("start")              the clock runs, for "start"
    with times("saving"): ...           what this takes is "saving", and not what it stands in
    print(times)                        2m00s: start 12s (10%), steps 1m40s (83%), saving 8s (7%)

A stage's first step compiles kernels and records graphs: `first_step` moves what it took beyond an
ordinary one to "start". Curves are drawn with states: "saving".

Limits.  Wall clock of the first process, from its first import (exits.BEGAN) to the printed line;
a resumed run counts from its resumption.
"""

import contextlib
import statistics
import time

from engine.cost import clock


class Times:
    """Seconds by part, in the order in which parts first began."""

    def __init__(self, part: str, since: float | None = None):
        """since: when the clock began, of time.perf_counter() (None: now)."""
        self.part, self.since = part, since or time.perf_counter()
        self.seconds: dict[str, float] = {part: 0.0}

    def _turn(self, part: str) -> str:
        """From now on it is `part`; returns what it was."""
        now, before = time.perf_counter(), self.part
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.seconds.setdefault(part, 0.0)
        self.part, self.since = part, now
        return before

    @contextlib.contextmanager
    def __call__(self, part: str):
        before = self._turn(part)
        try:
            yield
        finally:
            self._turn(before)

    def first_step(self, steps: list[float]) -> None:
        """steps: the seconds of a stage's steps, the first of which also compiled."""
        if len(steps) > 1:
            compiled = max(0.0, steps[0] - statistics.median(steps[1:]))
            self.seconds["steps"] -= compiled
            self.seconds["start"] += compiled

    def rows(self) -> dict[str, float]:
        """{part: seconds so far, "all": their sum}."""
        self._turn(self.part)
        return {**self.seconds, "all": sum(self.seconds.values())}

    def __str__(self) -> str:
        rows = self.rows()
        whole = rows.pop("all")
        parts = (f"{k} {clock(v)} ({v / max(whole, 1e-9):.0%})" for k, v in rows.items())
        return f"{clock(whole)}: {', '.join(parts)}"
