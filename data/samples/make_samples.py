"""Write the sample data next to this file: python data/samples/make_samples.py"""

import json
import os

from conversations import make_chats, make_sharegpt, make_tool_rows
from exercises import make_instructions, make_word_problems
from pipe_questions import make_pipe_splits
from sql_questions import make_splits
from trades import make_texts

HERE = os.path.dirname(os.path.abspath(__file__))
TRAIN_ROWS = 4000
HELDOUT_ROWS = 400
PROMPT_ROWS = 20


def make_all():
    """Every file's rows, by file name."""
    train, heldout = make_splits(20, TRAIN_ROWS, HELDOUT_ROWS + PROMPT_ROWS)
    pipes, pipes_heldout = make_pipe_splits(26, 1000, 200)
    prompts = [{"prompt": row["messages"][0]["content"]} for row in heldout[HELDOUT_ROWS:]]
    return {
        "train.jsonl": train,
        "heldout.jsonl": heldout[:HELDOUT_ROWS],
        "prompts.jsonl": prompts,
        "pipes.jsonl": pipes,
        "pipes_heldout.jsonl": pipes_heldout,
        "chats.jsonl": make_chats(21, 120),
        "tools.jsonl": make_tool_rows(22, 60),
        "alpaca.jsonl": make_instructions(23, 60),
        "sharegpt.jsonl": make_sharegpt(24, 40),
        "qa.jsonl": make_word_problems(25, 200),
        "texts.jsonl": make_texts(26, 2400),
    }


def write_rows(name, rows):
    with open(os.path.join(HERE, name), "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main():
    for name, rows in make_all().items():
        write_rows(name, rows)
        print("%-15s %5d rows" % (name, len(rows)))


if __name__ == "__main__":
    main()
