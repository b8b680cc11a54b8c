"""Questions about small tables, each with the one SQL query that answers it.

A question is built from a table and a phrasing. The schema line above the
question names the table and some of its columns; the first column listed is the
one that names a row, and it is what "Which books ...?" asks for.
"""

from collections import namedtuple

from chooser import Chooser

# low and high bound the numbers in questions; a column is `additive` when its
# sum means something.
Measure = namedtuple("Measure", "low high highest lowest exceeds falls_below additive")

MEASURES = {
    "price": Measure(2, 400, "highest", "lowest", "cost more than", "cost less than", True),
    "rating": Measure(2, 99, "highest", "lowest", "are rated above", "are rated below", False),
    "score": Measure(5, 250, "highest", "lowest", "score more than", "score less than", True),
    "age": Measure(2, 90, "highest", "lowest", "are older than", "are younger than", False),
    "speed": Measure(5, 300, "highest", "lowest", "are faster than", "are slower than", False),
    "power": Measure(5, 500, "highest", "lowest", "have a power over", "have a power under", True),
    "salary": Measure(20, 200, "highest", "lowest", "earn more than", "earn less than", True),
    "rent": Measure(50, 999, "highest", "lowest", "rent for more than", "rent for less than", True),
    "fee": Measure(2, 150, "highest", "lowest", "have a fee over", "have a fee under", True),
    "weight": Measure(2, 500, "greatest", "smallest", "weigh more than", "weigh less than", True),
    "height": Measure(2, 300, "greatest", "smallest", "are taller than", "are shorter than", False),
    "length": Measure(2, 900, "greatest", "smallest", "are longer than", "have a length under", True),
    "width": Measure(2, 300, "greatest", "smallest", "have a width over", "have a width under", False),
    "depth": Measure(2, 400, "greatest", "smallest", "have a depth over", "have a depth under", False),
    "area": Measure(5, 900, "largest", "smallest", "cover more than", "cover less than", True),
    "capacity": Measure(2, 900, "largest", "smallest", "hold more than", "hold less than", True),
    "stock": Measure(2, 300, "largest", "smallest", "have a stock over", "have a stock under", True),
    "budget": Measure(10, 999, "largest", "smallest", "have a budget over", "have a budget under", True),
    "duration": Measure(5, 240, "longest", "shortest", "last longer than", "last less than", True),
}

VALUES = {
    "genre": ["horror", "comedy", "drama", "fantasy"],
    "language": ["English", "French", "Spanish", "German"],
    "color": ["red", "blue", "green", "black", "white"],
    "size": ["small", "medium", "large"],
    "material": ["wood", "steel", "glass", "leather"],
    "fuel": ["petrol", "diesel", "electric"],
    "country": ["France", "Italy", "Japan", "Peru", "Kenya"],
    "city": ["Paris", "Rome", "Oslo", "Lima", "Cairo"],
    "region": ["north", "south", "east", "west"],
    "season": ["spring", "summer", "autumn", "winter"],
    "style": ["modern", "classic", "rustic"],
    "cuisine": ["Thai", "Greek", "Indian", "Mexican"],
    "flavor": ["sweet", "sour", "salty", "bitter"],
    "shape": ["round", "square", "oval"],
    "subject": ["math", "history", "art", "music"],
    "department": ["sales", "finance", "legal"],
    "sport": ["tennis", "soccer", "golf", "rugby"],
    "brand": ["Nova", "Apex", "Orion"],
}

# A schema line lists one of the `names` columns first, then some of the others.
Table = namedtuple("Table", "name names categories numbers")


def read_table(line):
    name, names, categories, numbers = line.split()
    return Table(name, names.split("/"), categories.split("/"), numbers.split("/"))


TABLES = [
    read_table(line)
    for line in [
        "",
        "books title/code genre/language price/rating/weight",
        "films title/code genre/language duration/budget/rating",
        "songs title/code genre/language duration/rating/price",
        "games title/code genre/language price/rating/stock",
        "concerts title/code genre/city price/capacity/duration",
        "courses title/code subject/language price/duration/rating",
        "cars model/plate color/fuel price/speed/power",
        "bikes model/serial color/material price/weight/speed",
        "boats name/code color/material length/speed/capacity",
        "trains name/code country/fuel speed/capacity/length",
        "planes model/serial country/size speed/capacity/weight",
        "hotels name/code city/style price/rating/capacity",
        "restaurants name/code cuisine/city rating/capacity/area",
        "cakes name/code flavor/shape price/weight/rating",
        "fruits name/code color/flavor price/weight/stock",
        "plants name/code color/season height/price/age",
        "trees name/code region/size height/age/weight",
        "dogs name/chip color/size age/weight/height",
        "cats name/chip color/city age/weight/length",
        "horses name/chip color/country age/speed/weight",
        "birds name/chip color/region speed/weight/length",
        "employees name/email department/city salary/age/score",
        "students name/email subject/language age/score/height",
        "teachers name/email subject/city salary/age/rating",
        "doctors name/email city/language age/salary/fee",
        "players name/email sport/country score/age/height",
        "teams name/code sport/city score/budget/rating",
        "houses address/code city/style rent/area/age",
        "flats address/code city/size rent/area/height",
        "offices address/code region/city rent/area/capacity",
        "shops name/code city/brand rent/area/rating",
        "desks model/serial material/shape width/height/price",
        "chairs model/serial color/material price/weight/height",
        "lamps model/serial color/style power/price/height",
        "shirts name/code color/size price/stock/rating",
        "phones model/serial brand/color price/weight/width",
        "laptops model/serial brand/size price/weight/power",
        "lakes name/code country/region area/depth/length",
        "rivers name/code country/region length/width/depth",
        "museums name/code city/style fee/rating/area",
        "",
    ]
    if line
]

Kind = namedtuple("Kind", "name weight sql phrasings")

KINDS = [
    Kind(
        "all_rows",
        2,
        "SELECT * FROM {table}",
        [
            "Show all {table}.",
            "Give me every column of the {table}.",
            "Display the whole table of {table}.",
        ],
    ),
    Kind(
        "column",
        5,
        "SELECT {column} FROM {table}",
        [
            "List the {column} of all {table}.",
            "Show only the {column} of the {table}.",
            "What is the {column} of each of the {table}?",
            "For all {table}, give the {column}.",
        ],
    ),
    Kind(
        "above",
        8,
        "SELECT {key} FROM {table} WHERE {number} > {n}",
        [
            "Which {table} {exceeds} {n}?",
            "List the {table} with {a_number} above {n}.",
            "Find {table} whose {number} is greater than {n}.",
            "Which {table} have {a_number} of more than {n}?",
            "Name the {table} where the {number} is over {n}.",
        ],
    ),
    Kind(
        "below",
        8,
        "SELECT {key} FROM {table} WHERE {number} < {n}",
        [
            "Which {table} {falls_below} {n}?",
            "List the {table} with {a_number} below {n}.",
            "Find {table} whose {number} is smaller than {n}.",
            "Which {table} have {a_number} of less than {n}?",
            "Name the {table} where the {number} is under {n}.",
        ],
    ),
    Kind(
        "equal",
        9,
        "SELECT {key} FROM {table} WHERE {category} = '{value}'",
        [
            "Which {table} have {value} as their {category}?",
            "List the {table} whose {category} is {value}.",
            "Find {table} where the {category} is {value}.",
            "Name the {table} with the {category} {value}.",
        ],
    ),
    Kind(
        "count",
        2,
        "SELECT COUNT(*) FROM {table}",
        [
            "How many {table} are there?",
            "Count all the {table}.",
            "What is the number of {table}?",
        ],
    ),
    Kind(
        "count_equal",
        8,
        "SELECT COUNT(*) FROM {table} WHERE {category} = '{value}'",
        [
            "How many {table} have {value} as their {category}?",
            "Count the {table} whose {category} is {value}.",
            "What is the number of {table} with the {category} {value}?",
            "For how many {table} is the {category} {value}?",
        ],
    ),
    Kind(
        "average",
        5,
        "SELECT AVG({number}) FROM {table}",
        [
            "What is the average {number} of the {table}?",
            "Find the mean {number} of all {table}.",
            "On average, what {number} do the {table} have?",
            "Work out the average {number} over all {table}.",
        ],
    ),
    Kind(
        "maximum",
        5,
        "SELECT MAX({number}) FROM {table}",
        [
            "What is the {highest} {number} of the {table}?",
            "Find the maximum {number} among the {table}.",
            "Give the {highest} {number} found in the {table}.",
            "Of all {table}, what is the top {number}?",
        ],
    ),
    Kind(
        "minimum",
        5,
        "SELECT MIN({number}) FROM {table}",
        [
            "What is the {lowest} {number} of the {table}?",
            "Find the minimum {number} among the {table}.",
            "Give the {lowest} {number} found in the {table}.",
            "Of all {table}, what is the bottom {number}?",
        ],
    ),
    Kind(
        "total",
        4,
        "SELECT SUM({additive}) FROM {table}",
        [
            "What is the total {additive} of the {table}?",
            "Add up the {additive} of all {table}.",
            "Find the sum of the {additive} over all {table}.",
            "What is the combined {additive} of all {table}?",
        ],
    ),
    Kind(
        "ascending",
        6,
        "SELECT {key} FROM {table} ORDER BY {number}",
        [
            "List the {table} sorted by {number}, {lowest} first.",
            "Sort the {table} by {number} in ascending order.",
            "Order the {table} from {lowest} to {highest} {number}.",
            "Show the {table} by increasing {number}.",
        ],
    ),
    Kind(
        "descending",
        6,
        "SELECT {key} FROM {table} ORDER BY {number} DESC",
        [
            "List the {table} sorted by {number}, {highest} first.",
            "Sort the {table} by {number} in descending order.",
            "Order the {table} from {highest} to {lowest} {number}.",
            "Show the {table} by decreasing {number}.",
        ],
    ),
    Kind(
        "top",
        7,
        "SELECT {key} FROM {table} ORDER BY {number} DESC LIMIT {limit}",
        [
            "Which {limit} {table} have the {highest} {number}?",
            "Show the top {limit} {table} by {number}.",
            "List the {limit} {table} with the {highest} {number}.",
            "Name the first {limit} {table} by {number}, {highest} first.",
        ],
    ),
    Kind(
        "group",
        5,
        "SELECT {category}, COUNT(*) FROM {table} GROUP BY {category}",
        [
            "How many {table} are there for each {category}?",
            "Count the {table} per {category}.",
            "Show the number of {table} by {category}.",
            "For every {category}, count the {table}.",
        ],
    ),
    Kind(
        "distinct",
        4,
        "SELECT DISTINCT {category} FROM {table}",
        [
            "Which different {category} values do the {table} have?",
            "List the distinct {category} values of the {table}.",
            "Show every {category} of the {table} only once.",
            "What are the unique {category} values of all {table}?",
        ],
    ),
    Kind(
        "between",
        7,
        "SELECT {key} FROM {table} WHERE {number} BETWEEN {n} AND {m}",
        [
            "Which {table} have {a_number} between {n} and {m}?",
            "List the {table} with {a_number} from {n} to {m}.",
            "Find {table} whose {number} lies between {n} and {m}.",
            "Name the {table} where the {number} is from {n} to {m}.",
        ],
    ),
    Kind(
        "both",
        8,
        "SELECT {key} FROM {table} WHERE {category} = '{value}' AND {number} {sign} {n}",
        [
            "Which {table} whose {category} is {value} {compares} {n}?",
            "List the {table} with the {category} {value} and {a_number} {beyond} {n}.",
            "Find {table} where the {category} is {value} and the {number} is {beyond} {n}.",
            "Which {table} have {value} as their {category} and {a_number} {beyond} {n}?",
        ],
    ),
]

PHRASINGS = [(kind, number) for kind in KINDS for number in range(len(kind.phrasings))]


def is_held_out(table, kind, number):
    """Whether the pair of this table and this phrasing is kept out of training.

    Every tenth pair is, spread so that each table and each phrasing are
    trained on in nine pairs of ten, and a table never loses a whole kind.
    """
    return (3 * TABLES.index(table) + PHRASINGS.index((kind, number))) % 10 == 0


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def usual_numbers(measure):
    """The numbers asked about: from 100 on only tens."""
    return [n for n in range(measure.low, measure.high + 1) if n < 100 or n % 10 == 0]


def fill_slots(chooser, table):
    """Random contents for everything a phrasing or its query can mention."""
    number = chooser.pick(table.numbers)
    category = chooser.pick(table.categories)
    measure = MEASURES[number]
    n, m = sorted(chooser.several(usual_numbers(measure), 2))
    sign = chooser.pick("<>")
    return {
        "table": table.name,
        "key": chooser.pick(table.names),
        "column": chooser.pick(table.categories + table.numbers),
        "additive": chooser.pick([name for name in table.numbers if MEASURES[name].additive]),
        "number": number,
        "a_number": with_article(number),
        "highest": measure.highest,
        "lowest": measure.lowest,
        "exceeds": measure.exceeds,
        "falls_below": measure.falls_below,
        "category": category,
        "value": chooser.pick(VALUES[category]),
        "n": n,
        "m": m,
        "limit": chooser.between(2, 9),
        "sign": sign,
        "beyond": {">": "above", "<": "below"}[sign],
        "compares": {">": measure.exceeds, "<": measure.falls_below}[sign],
    }


def schema_line(chooser, table, slots, query):
    """The table with a naming column and, in random order, three to five others.

    The columns that the query needs are always among them.
    """
    needed, spare = [], []
    for column in table.categories + table.numbers:
        used = any(
            slots[slot] == column and "{%s}" % slot in query for slot in ("number", "category", "column", "additive")
        )
        (needed if used else spare).append(column)
    extra = chooser.between(3 - len(needed), 5 - len(needed))
    columns = needed + chooser.several(spare, extra)
    listed = [slots["key"]] + chooser.several(columns, len(columns))
    return "table %s(%s)" % (table.name, ", ".join(listed))


def make_question(chooser):
    """One random question as (table, kind, phrasing number, prompt, query)."""
    kind = chooser.weighted(KINDS, [kind.weight for kind in KINDS])
    number = chooser.between(0, len(kind.phrasings) - 1)
    table = chooser.pick(TABLES)
    slots = fill_slots(chooser, table)
    prompt = "%s\n%s" % (schema_line(chooser, table, slots, kind.sql), kind.phrasings[number].format(**slots))
    return table, kind, number, prompt, kind.sql.format(**slots)


def make_splits(seed, train_rows, heldout_rows):
    """Training rows and held-out rows, with no prompt twice."""
    chooser = Chooser(seed)
    splits = {"train": [], "heldout": []}
    wanted = {"train": train_rows, "heldout": heldout_rows}
    queries = {}
    while any(len(splits[name]) < wanted[name] for name in splits):
        table, kind, number, prompt, query = make_question(chooser)
        name = "heldout" if is_held_out(table, kind, number) else "train"
        assert queries.get(prompt, query) == query, prompt
        if prompt in queries or len(splits[name]) == wanted[name]:
            continue
        queries[prompt] = query
        splits[name].append(
            {
                "id": "%s-%05d" % (name, len(splits[name])),
                "schema": table.name,
                "phrasing": "%s-%d" % (kind.name, number + 1),
                "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": query}],
            }
        )
    check_splits(splits["train"], splits["heldout"])
    return splits["train"], splits["heldout"]


def check_splits(train, heldout):
    def pairs(rows):
        return {(row["schema"], row["phrasing"]) for row in rows}

    def prompts(rows):
        return [row["messages"][0]["content"] for row in rows]

    assert not pairs(train) & pairs(heldout)
    assert len(set(prompts(train + heldout))) == len(train) + len(heldout)
    assert {row["schema"] for row in train} == {table.name for table in TABLES}
    assert len({row["phrasing"] for row in train}) == len(PHRASINGS)
