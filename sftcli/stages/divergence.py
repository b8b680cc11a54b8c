"""Steps that went wrong: a loss or gradient that is no number, and a loss far above those before it."""

import math
from collections import deque

from sftcli import console
from sftcli.artifacts import METRICS
from sftcli.errors import Exit, SftError
from sftcli.model.training import Report
from sftcli.rows import encode_row
from sftcli.stages.training_job import Job
from sftcli.writing import atomic_file, json_line

REMEMBERED, SIGMAS = 100, 6.0
NAMED = 8  # rows that a message names


def refusal(job: Job, report: Report) -> SftError | None:
    """Keep the rows of a step that is not finite; the error that ends the run, unless the step may be left out."""
    indices, _, _ = next(job.plan.from_step(report.step - 1))
    rows = [job.row(i) for i in indices]
    kept = job.run / f"diverged-step-{report.step}.jsonl"
    with atomic_file(job.engine.world.path(kept)) as file:
        file.writelines(encode_row(row, {}) for row in rows)
    names = ", ".join(row.id for row in rows[:NAMED]) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
    told = f"step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}: not finite; rows {names}"
    allowed, before = job.options.nonfinite_skips, job.engine.world.from_first(lambda: steps_left_out(job))
    if before < allowed:
        console.warn(f"train: {told} ({kept}); left out, {before + 1} of {allowed} that may be")
        return None
    return SftError(
        f"{told}; the weights were not touched",
        Exit.DIVERGED,
        hint=f"look at them with `sft show {kept}`; a lower learning rate, or --set nonfinite_skips={before + 1}",
    )


def steps_left_out(job: Job) -> int:
    """How many steps of this run the log calls not finite, those before it was resumed among them."""
    with open(job.run / METRICS, "rb") as file:
        return sum(json_line({"finite": False})[1:-2] in line for line in file)


class Spikes:
    """Warns of a loss that is more than SIGMAS standard deviations above the mean of the last REMEMBERED; once a spike.

    Nothing is done about it: what is trained stays a function of the recipe.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.high = False

    def watch(self, report: Report) -> None:
        if not math.isfinite(report.loss):
            return
        if len(self.losses) == REMEMBERED:
            mean = math.fsum(self.losses) / REMEMBERED
            sigma = math.dist(self.losses, [mean] * REMEMBERED) / math.sqrt(REMEMBERED)
            high = report.loss - mean > SIGMAS * sigma
            if high and not self.high:
                console.warn(
                    f"train: step {report.step}: loss {report.loss:.4g} is more than {SIGMAS:g} standard deviations "
                    f"({sigma:.2g}) above the mean of the last {REMEMBERED} steps ({mean:.4g})"
                )
            self.high = high
        self.losses.append(report.loss)
