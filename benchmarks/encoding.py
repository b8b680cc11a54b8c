"""How near `sft tokenize` is to the tokenizers library under it: python benchmarks/encoding.py [DATA] [--columns ...]

Both sides encode the same rendered texts. `bare` is one encode_batch call, with all threads of the library and warm
caches, on texts that are ready in memory; `sft` loads the tokenizer, reads JSONL, renders the template, encodes, maps
segments onto tokens and writes JSONL. They are timed in turn, and what counts is the ratio of medians. Prints a JSON
line per side and one for the ratio.
"""

import sys

sys.path.pop(0)  # this folder: it would hide the standard library's `tokenize` from everything imported below

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import msgspec

from sftcli import console
from sftcli.artifacts import read_objects
from sftcli.recipe import Init, Tokenize
from sftcli.stages.common import codec_for, template_for
from sftcli.stages.init import init
from sftcli.stages.tokenize import tokenize
from sftcli.text.records import read_record, renamed
from sftcli.text.speaker import Speaker


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rendered_texts(options: Tokenize, model: str) -> list[str]:
    """The whole text of every row, as the template writes it."""
    codec = codec_for(model, None)
    template = template_for(codec, model, None, None, {})
    speaker = Speaker(template, codec.ends)
    records = (
        read_record(renamed(fields, options.columns, where), where, number)
        for path in options.data
        for number, (where, _, fields) in enumerate(read_objects(path), 1)
    )
    return [text.text for record in records for text in speaker.documents(record)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", default="data/samples/train.jsonl")
    parser.add_argument("--columns", default="")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    console.QUIET = True
    os.environ.pop("TOKENIZERS_PARALLELISM", None)  # `bare` has all threads of the library
    columns = dict(pair.split("=") for pair in given.columns.split(",") if pair)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model = os.path.join(folder, "base")
        init(Init(data=[given.data], columns=columns, vocab_size=given.vocab_size), model)
        options = Tokenize(data=[given.data], columns=columns)
        texts = rendered_texts(options, model)
        bare = codec_for(model, None).tokenizer
        out = os.path.join(folder, "tokens.jsonl")
        sides: dict[str, Callable[[], object]] = {
            "bare": lambda: bare.encode_batch(texts, add_special_tokens=False),
            "sft": lambda: tokenize(options, model, out),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for run in range(given.runs + 1):
            for name, work in sides.items():
                seconds = timed(work)
                if run:  # the first is a warm-up
                    times[name].append(seconds)
        with open(out, "rb") as file:
            tokens = sum(len(msgspec.json.decode(line)["input_ids"]) for line in file)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        figures = {"side": name, "rows": len(texts), "tokens": tokens, "median_s": round(medians[name], 4)}
        print(json.dumps(figures | {"min_s": round(min(seconds), 4), "max_s": round(max(seconds), 4)}))
    pairs = [b / s for b, s in zip(times["bare"], times["sft"], strict=True)]
    spread = {"min": round(min(pairs), 3), "max": round(max(pairs), 3)}
    print(json.dumps({"speed_of_sft_to_bare": round(medians["bare"] / medians["sft"], 3), **spread}))


main()
