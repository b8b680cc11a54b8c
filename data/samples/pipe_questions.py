"""The questions of sql_questions.py answered in another language: a table sent through a pipe of steps.

A model that has learned to answer in SQL answers every one of them wrongly; what it knows of tables and questions
still serves. That makes the files an exercise for adapters.
"""

import re

from sql_questions import make_splits

QUERY = re.compile(
    r"SELECT (?P<what>.+?) FROM (?P<table>\w+)"
    r"(?: WHERE (?P<where>.+?))?"
    r"(?: GROUP BY (?P<group>\w+))?"
    r"(?: ORDER BY (?P<order>\w+)(?P<desc> DESC)?)?"
    r"(?: LIMIT (?P<limit>\d+))?"
)
TOTALS = {"AVG": "average", "MAX": "largest", "MIN": "smallest", "SUM": "total"}


def as_pipe(query):
    """`SELECT code FROM trees WHERE age > 5` as `trees | keep age > 5 | show code`."""
    part = QUERY.fullmatch(query).groupdict()
    steps = [part["table"]]
    if part["where"]:
        steps += ["keep " + condition for condition in conditions(part["where"])]
    if part["order"]:
        steps.append("sort " + ("down " if part["desc"] else "up ") + part["order"])
    if part["limit"]:
        steps.append("take " + part["limit"])
    steps.append("count by " + part["group"] if part["group"] else last_step(part["what"]))
    return " | ".join(steps)


def conditions(where):
    """Each condition is a step of its own; a range is two."""
    found = re.fullmatch(r"(\w+) BETWEEN (\d+) AND (\d+)", where)
    if found:
        return ["%s >= %s" % found.group(1, 2), "%s <= %s" % found.group(1, 3)]
    return [re.sub(r"(\w+) = '(.+)'", r"\1 is \2", part) for part in where.split(" AND ")]


def last_step(what):
    """What is asked of the rows that are left."""
    total = re.fullmatch(r"([A-Z]+)\((.+)\)", what)
    if total:
        return "count" if total[1] == "COUNT" else "%s %s" % (TOTALS[total[1]], total[2])
    if what.startswith("DISTINCT "):
        return "unique " + what.removeprefix("DISTINCT ")
    return "show all" if what == "*" else "show " + what


def make_pipe_splits(seed, train_rows, heldout_rows):
    """Training rows and held-out rows, split as those of sql_questions.py are."""
    splits = make_splits(seed, train_rows, heldout_rows)
    for row in [row for rows in splits for row in rows]:
        row["id"] = "pipe-" + row["id"]
        answer = row["messages"][1]
        answer["content"] = as_pipe(answer["content"])
    return splits
