"""How near `sft tokenize | sft mask` is to the tokenizers library: python benchmarks/encoding.py [DATA] [-m MODEL]

Both sides encode the same rendered texts. `library` is one encode_batch call, with all its threads, on texts that are
ready in memory and with the tokenizer loaded; `sft` is the two processes from start to end: they load Python and the
tokenizer, read JSONL, render the template, encode, map segments onto tokens, mask, and write rows. They run in turn,
and what counts is the ratio of medians. Prints a JSON line per side and one for the ratio. Without -m the model is
what `sft init` makes of the data; --rows N repeats the data up to N rows (whose words are then no longer new).
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from sftcli import console
from sftcli.reading import read_objects
from sftcli.recipe import Init
from sftcli.stages.common import codec_for, template_for
from sftcli.stages.init import init
from sftcli.text.records import read_record, renamed
from sftcli.text.speaker import Speaker
from sftcli.text.tokenizer import Codec

SFT = [sys.executable, "-m", "sftcli", "--quiet"]


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds). To let go of what was made is not counted."""
    began, used = time.perf_counter(), cpu_seconds()
    made = work()
    result = time.perf_counter() - began, cpu_seconds() - used
    del made
    return result


def rendered_texts(codec: Codec, model: str, data: str, columns: dict[str, str]) -> list[str]:
    """The whole text of every row, as the template writes it."""
    template = template_for(codec, model, None, None, {})
    speaker = Speaker(template, codec.ends)
    records = (
        read_record(renamed(fields, columns, where), where, number)
        for number, (where, _, fields) in enumerate(read_objects(data), 1)
    )
    return [text.text for record in records for text in speaker.documents(record)]


def repeated(data: str, rows: int, folder: str) -> str:
    """A file with the lines of `data` again and again, `rows` of them."""
    with open(data, "rb") as file:
        lines = file.readlines()
    path = os.path.join(folder, "data.jsonl")
    with open(path, "wb") as file:
        file.writelines(itertools.islice(itertools.cycle(lines), rows))
    return path


def pipeline(data: str, model: str, columns: str, rows: str) -> None:
    """sft tokenize DATA -m MODEL | sft mask -o ROWS"""
    named = ["--columns", columns] if columns else []
    first = subprocess.Popen([*SFT, "tokenize", data, "-m", model, *named], stdout=subprocess.PIPE)
    second = subprocess.Popen([*SFT, "mask", "-o", rows], stdin=first.stdout)
    assert first.stdout
    first.stdout.close()
    assert (first.wait(), second.wait()) == (0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", default="data/samples/train.jsonl")
    parser.add_argument("-m", "--model")
    parser.add_argument("--columns", default="")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    console.QUIET = True
    os.environ.pop("TOKENIZERS_PARALLELISM", None)  # the library has all its threads
    columns = dict(pair.split("=") for pair in given.columns.split(",") if pair)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model = given.model or os.path.join(folder, "base")
        if not given.model:
            init(Init(data=[given.data], columns=columns, vocab_size=given.vocab_size), model)
        data = repeated(given.data, given.rows, folder) if given.rows else given.data
        codec = codec_for(model, None)
        texts = rendered_texts(codec, model, data, columns)
        rows = os.path.join(folder, "rows.safetensors")
        sides: dict[str, Callable[[], Any]] = {
            "library": lambda: codec.tokenizer.encode_batch(texts, add_special_tokens=False),
            "sft": lambda: pipeline(data, model, given.columns, rows),
        }
        tokens = sum(map(len, sides["library"]()))
        sides["sft"]()  # a warm-up
        runs = {name: list[tuple[float, float]]() for name in sides}
        for _ in range(given.runs):
            for name, work in sides.items():
                runs[name].append(timed(work))
    seconds = {name: [wall for wall, _ in pairs] for name, pairs in runs.items()}
    medians = {name: statistics.median(walls) for name, walls in seconds.items()}
    for name, walls in seconds.items():
        figures = {"side": name, "rows": len(texts), "tokens": tokens, "median_s": round(medians[name], 3)}
        spread = {"min_s": round(min(walls), 3), "max_s": round(max(walls), 3)}
        print(json.dumps(figures | spread | {"cpu_s": round(statistics.median(cpu for _, cpu in runs[name]), 3)}))
    ratios = [sft / library for library, sft in zip(seconds["library"], seconds["sft"], strict=True)]
    spread = {"min": round(min(ratios), 3), "max": round(max(ratios), 3)}
    print(json.dumps({"times_the_library": round(medians["sft"] / medians["library"], 3), **spread}))


main()
