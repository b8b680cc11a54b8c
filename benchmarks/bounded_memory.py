"""Peak memory of `sft tokenize | sft mask` over JSONL of any size, which is made on the way and never on disk.

    python benchmarks/bounded_memory.py -m MODEL --gigabytes 2

Lines have 200 bytes to 256 KiB. Prints a JSON line: bytes and rows read, seconds, peak resident bytes of each process.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

LONGEST = 256 << 10  # bytes of a line
TEXT = "the river of two answers 12 3.5 where Oslo («ça») is not what it's 中文 said, though\nI think so: yes!"
WORDS = TEXT.split(" ")


def lines(size: int, seed: int = 0) -> Iterator[bytes]:
    """Records of one exchange, `size` bytes in all; a few of them are the longest there may be."""
    chance = random.Random(seed)
    text = " ".join(chance.choices(WORDS, k=1 << 18))
    while size > 0:
        wanted = LONGEST if chance.random() < 0.01 else int(200 * 500 ** chance.random() ** 3)
        at = chance.randrange(len(text) - LONGEST)
        row = {"prompt": text[at : at + 100], "completion": text[at + 100 : at + max(wanted - 400, 101)]}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if len(line) <= LONGEST:
            size -= len(line)
            yield line


def peak_of(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the end of a process; the most bytes that it had in memory at once."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(model: str, size: int) -> dict[str, float]:
    """Run the pipe over `size` bytes of lines."""
    sft = [sys.executable, "-m", "sftcli", "-q"]
    begin = time.monotonic()
    first = subprocess.Popen([*sft, "tokenize", "-", "-m", model], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    second = subprocess.Popen([*sft, "mask"], stdin=first.stdout, stdout=subprocess.DEVNULL)
    assert first.stdin and first.stdout
    first.stdout.close()
    rows = 0
    for line in lines(size):
        first.stdin.write(line)
        rows += 1
    first.stdin.close()
    peaks = {"tokenize_peak_bytes": peak_of(first), "mask_peak_bytes": peak_of(second)}
    return {"bytes": size, "rows": rows, "seconds": round(time.monotonic() - begin, 1), **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="a model folder; only its tokenizer and template are read")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, int(options.gigabytes * 1e9))))


if __name__ == "__main__":
    main()
