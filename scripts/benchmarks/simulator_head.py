"""`midflight serve` that writes down every step: ``simulator_head.py FILE ARGUMENTS...``, for `scripts/bench simulator`.

The scheduler's state is watched from outside: what it sends and what comes back is noted with the host's monotonic clock,
and written as JSON lines when the server ends.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import api.head as head
from api.cli import parse_serve
from runtime.messages import StepResult
from scheduler.events import Effect, Event, FromWorker, SendStep
from scheduler.planning.cost import work_of_rows
from scheduler.state import SchedulerState


class RecordingState(SchedulerState):
    """A state that keeps a line of every step in `lines`."""

    lines: ClassVar[list[dict]] = []

    def step(self, event: Event) -> list[Effect]:
        result = event.message if isinstance(event, FromWorker) and isinstance(event.message, StepResult) else None
        layout = self.layouts.get(result.epoch) if result is not None else None
        back_s = time.monotonic()
        effects = super().step(event)
        step_s = time.monotonic() - back_s
        flights = self.__dict__.setdefault("flights", {})  # `SchedulerState` has slots, a subclass has this too
        if result is not None and layout is not None:
            sent_s, work, is_ahead = flights.pop((result.epoch, result.ordinal))
            self.lines.append({
                "sent_s": sent_s, "back_s": back_s, "step_s": step_s, "work": work, "is_ahead": is_ahead,
                "layers": [[s.layers.start, s.layers.stop] for s in layout.segments],
                "hops": [[t.idle_us, t.queued_us, t.compute_us, t.sample_us] for t in result.timings],
            })  # fmt: skip
        for effect in effects:
            if isinstance(effect, SendStep):
                work = work_of_rows((row.start, len(row.tokens), row.sample) for row in effect.plan.rows)
                fields = [
                    work.decode_rows,
                    work.decode_context,
                    work.prefill_tokens,
                    work.prefill_context,
                    work.samples,
                ]
                flights[effect.plan.epoch, effect.plan.ordinal] = time.monotonic(), fields, effect.plan.is_ahead
        return effects


def main() -> int:
    path, arguments = Path(sys.argv[1]), sys.argv[2:]
    head.SchedulerState = RecordingState
    code = head.run_head(parse_serve(arguments, os.environ))
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in RecordingState.lines)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
