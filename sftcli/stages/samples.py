"""Answers of a model that is being trained, to a few of its rows: samples.jsonl of a run."""

from itertools import islice

from sftcli.artifacts import SAMPLES
from sftcli.model.decoding import Completion, decode
from sftcli.model.growth import Prompt, blanks_of_row
from sftcli.model.processes import together
from sftcli.model.scoring import Totals
from sftcli.recipe import Generate, Train
from sftcli.rows import IGNORE, Row
from sftcli.stages.training_job import Job
from sftcli.text.folder import stop_ids
from sftcli.writing import append_lines


def samples_due(options: Train, step: int, evaluation: Totals | None, last: bool) -> bool:
    if not options.sample_rows:
        return False
    return step % options.sample_every == 0 or last if options.sample_every else evaluation is not None


def answer_samples(job: Job, step: int) -> None:
    """Answer the first turn of a few held-out rows (training rows where there are none) into samples.jsonl."""
    rows = job.eval_rows or (job.rows[i] for i in job.train_rows)
    asked = list(islice(filter(None, map(_first_turn, rows)), job.options.sample_rows))
    answers = _answers(job, [prompt for prompt, _ in asked])
    for (prompt, reference), answer in zip(asked, answers, strict=True):
        sample = {
            "step": step,
            "id": prompt.key,
            "prompt": job.codec.decode(prompt.ids, keep_special=True),
            "completion": job.codec.decode(answer.ids),
            "reference": job.codec.decode(reference),
            "finish_reason": answer.finish_reason,
        }
        append_lines(job.engine.world.path(job.run / SAMPLES), sample)


def _answers(job: Job, prompts: list[Prompt]) -> list[Completion]:
    options = Generate(max_new_tokens=job.options.sample_tokens)
    found = []
    with job.engine.autocast(), together(job.model):
        for event in decode(job.model, prompts, options, job.stops or stop_ids(job.folder.path)):
            job.engine.poll()
            found += [event] if isinstance(event, Completion) else []
    return sorted(found, key=lambda answer: answer.number)


def _first_turn(row: Row) -> tuple[Prompt, list[int]] | None:
    """(what comes before the first trained tokens, these tokens); a prompt has at least one token."""
    start = next((t for t in range(1, len(row.labels)) if row.labels[t] != IGNORE), None)
    if row.block_position_ids is not None and row.order is not None:
        return blanks_of_row(row)
    if start is None or row.order is not None:
        return None
    end = next((t for t in range(start, len(row.labels)) if row.labels[t] == IGNORE), len(row.labels))
    return Prompt(row.input_ids[:start], row.id), row.input_ids[start:end]
