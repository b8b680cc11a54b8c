"""sft evaluate: how likely rows are to a model, or how right completions are."""

import math
import re
import string
from collections import Counter
from typing import Any

from sftcli import console, reading
from sftcli.errors import DataError
from sftcli.lines import name_of
from sftcli.reading import read_objects
from sftcli.recipe import Evaluate
from sftcli.writing import json_line, open_output

MICRO_BATCH_TOKENS = 8192


# ---- rows against a model


def evaluate_rows(source: str, model: str, per_row: str | None) -> dict[str, Any]:
    """Loss (per unit of weight), perplexity, token accuracy and bits per byte of rows; `per_row`: a JSONL of nll."""
    from sftcli.model.adapters.peft import applied, open_model
    from sftcli.model.adapters.prefix import shortened
    from sftcli.model.checkpoint import load_trained
    from sftcli.model.dataset import fitting_rows
    from sftcli.model.scoring import Totals, score_rows
    from sftcli.model.training import choose_engine
    from sftcli.text.folder import load_codec

    folder, adapter = open_model(model)
    codec = load_codec(folder.path)
    engine = choose_engine("auto", "auto")
    config = shortened(folder.config, adapter.options if adapter else None)
    rows = fitting_rows(source, config, codec.hash)
    network = load_trained(folder).to(engine.device)
    totals = Totals()
    text_bytes, text_nll = 0, 0.0
    with applied(network, adapter), open_output(per_row, [source]) if per_row else console.live() as out:
        for score in score_rows(network, rows, MICRO_BATCH_TOKENS, engine):
            totals.add(score)
            labels = score.row.labels[1:] if score.row.align == "next" else score.row.labels
            labels = [label for label in labels if label >= 0]
            words = [(t, n) for t, n in zip(labels, score.nll, strict=True) if t not in codec.special_ids]
            text_bytes += len(codec.decode([t for t, _ in words]).encode())
            text_nll += sum(n for _, n in words)
            if per_row:
                line = {"id": score.row.id, "labels": labels, "nll": score.nll, "weight": score.weights}
                out.write(json_line(line | {"correct": score.correct}))  # type: ignore[union-attr]
    if not totals.weight:
        raise DataError("no row has a trained token: nothing to evaluate", name_of(source))
    return {
        "rows": totals.rows,
        "tokens": totals.tokens,
        "loss": totals.loss,
        **totals.of_pairs,
        "perplexity": math.exp(min(totals.token_loss, 700)),
        "token_accuracy": totals.accuracy,
        "bits_per_byte": text_nll / math.log(2) / text_bytes if text_bytes else None,
    }


# ---- completions against references


def evaluate_completions(options: Evaluate, source: str) -> dict[str, Any]:
    """Mean of each metric over the completions that have a reference."""
    pattern = re.compile(options.regex) if options.regex else None
    sums: dict[str, float] = dict.fromkeys(options.metrics, 0.0)
    count = without = 0
    for where, _, fields in read_objects(source):
        if "completion" not in fields:
            raise DataError("no completion", where, hint="completions come from `sft generate`")
        if "reference" not in fields:
            without += 1
            continue
        given = reading.decode_json(bytes(fields["completion"]), where, str)
        wanted = reading.decode_json(bytes(fields["reference"]), where, str)
        count += 1
        for metric in options.metrics:
            sums[metric] += _score(metric, given, wanted, pattern)
    if without:
        console.warn(f"evaluate: {without:,} completions have no reference and were left out")
    if not count:
        raise DataError("no completion with a reference", name_of(source))
    return {"completions": count, **{metric: sums[metric] / count for metric in options.metrics}}


def _score(metric: str, given: str, wanted: str, pattern: re.Pattern[str] | None) -> float:
    if metric == "exact_match":
        return float(given.strip() == wanted.strip())
    if metric == "token_f1":
        return token_f1(given, wanted)
    assert pattern
    found, expected = last_match(pattern, given), last_match(pattern, wanted)
    return float(found is not None and found == expected)


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group (or all) of the last match: answers stand at the end."""
    matches = list(pattern.finditer(text))
    return None if not matches else matches[-1].group(1 if pattern.groups else 0)


def token_f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over words, case and punctuation aside (as SQuAD's, articles kept)."""
    a, b = _words(given), _words(wanted)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def _words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()
