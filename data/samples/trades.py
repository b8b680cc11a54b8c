"""Texts of several sentences, a line each, about people at work: what belongs to a trade tells the next sentence."""

import random

TRADES = {
    "baker": ("bakery", "oven", ("bread", "rolls", "cakes", "pies"), "flour", "dough"),
    "gardener": ("garden", "spade", ("roses", "tulips", "beans", "herbs"), "soil", "seeds"),
    "fisher": ("harbour", "net", ("herring", "crabs", "cod", "eels"), "sea", "boat"),
    "carpenter": ("workshop", "saw", ("chairs", "tables", "doors", "shelves"), "oak", "wood"),
    "teacher": ("school", "chalk", ("letters", "numbers", "songs", "stories"), "class", "lesson"),
    "doctor": ("clinic", "lamp", ("pills", "bandages", "drops", "vaccines"), "ward", "patients"),
    "painter": ("studio", "brush", ("portraits", "landscapes", "murals", "posters"), "canvas", "colours"),
    "tailor": ("shop", "needle", ("coats", "shirts", "dresses", "trousers"), "cloth", "thread"),
    "smith": ("forge", "hammer", ("nails", "hooks", "knives", "gates"), "iron", "fire"),
    "farmer": ("farm", "tractor", ("wheat", "barley", "potatoes", "maize"), "field", "harvest"),
}
NAMES = ("Ada", "Ben", "Carla", "David", "Elif", "Frank", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
SENTENCES = (
    "{name} is a {trade} and works in the {place}.",
    "On {day} {name} takes the {tool} and begins with the {first}.",
    "The {stuff} must be good, says the {trade}.",
    "A neighbour comes to the {place} and asks for {second}.",
    "Without the {tool} no {trade} could make {first}.",
    "In the evening the {more} is ready for the next day.",
    "{name} sells the {second} on {day}.",
    "Nobody in the {place} knows more about {stuff} and {more}.",
)


def make_texts(seed: int, count: int) -> list[dict]:
    """Records of `text`: four to eight sentences of one trade, in random order, no text twice."""
    draw = random.Random(seed)
    found: dict[str, dict] = {}
    while len(found) < count:
        trade = draw.choice(list(TRADES))
        place, tool, goods, stuff, more = TRADES[trade]
        first, second = draw.sample(goods, 2)
        words = {"trade": trade, "place": place, "tool": tool, "stuff": stuff, "more": more}
        words |= {"first": first, "second": second, "name": draw.choice(NAMES)}
        lines = [line.format(day=draw.choice(DAYS), **words) for line in draw.sample(SENTENCES, draw.randint(4, 8))]
        text = "\n".join(lines)
        found.setdefault(text, {"id": f"trade-{len(found):04d}", "text": text})
    return list(found.values())
