"""Short written exercises: instructions with an input, and word problems."""

from chooser import Chooser

# Instructions. Each exercise gives (instruction, input, output).

OPPOSITES = [
    ("hot", "cold"),
    ("early", "late"),
    ("full", "empty"),
    ("loud", "quiet"),
    ("heavy", "light"),
    ("wide", "narrow"),
    ("rough", "smooth"),
    ("deep", "shallow"),
    ("sharp", "blunt"),
    ("dry", "wet"),
]
FRENCH = [
    ("apple", "pomme"),
    ("school", "école"),
    ("window", "fenêtre"),
    ("forest", "forêt"),
    ("boy", "garçon"),
    ("sugar", "sucre"),
    ("bread", "pain"),
    ("island", "île"),
    ("Christmas", "Noël"),
    ("hotel", "hôtel"),
]
GROUPS = [
    ("fruits", ["apple", "pear", "plum", "cherry", "fig"]),
    ("metals", ["iron", "copper", "zinc", "gold", "tin"]),
    ("planets", ["Mars", "Venus", "Saturn", "Jupiter", "Neptune"]),
    ("birds", ["robin", "owl", "heron", "crow", "swan"]),
    ("tools", ["hammer", "saw", "drill", "file", "wrench"]),
    ("spices", ["pepper", "cumin", "saffron", "cloves", "nutmeg"]),
]
COUNTS = ["two", "three", "four"]
SENTENCES = [
    "The train to the coast leaves at noon.",
    "Our neighbour grows tomatoes on the balcony.",
    "It rained for three days without a break.",
    "She paints small boats and old harbours.",
    "We baked bread before the guests arrived.",
    "A fox crossed the quiet street at dawn.",
    "He keeps every letter in a wooden box.",
    "The café closes early in winter.",
    "They walked home along the frozen river.",
    "My sister repairs clocks.",
]


def opposite(chooser):
    word, answer = chooser.pick(OPPOSITES)
    return "Give the opposite of the word.", word, answer


def translation(chooser):
    word, answer = chooser.pick(FRENCH)
    return "Translate the word into French.", word, answer


def examples(chooser):
    group, members = chooser.pick(GROUPS)
    count = chooser.between(2, 4)
    return "Name %s %s." % (COUNTS[count - 2], group), "", ", ".join(chooser.several(members, count))


def sorting(chooser):
    numbers = chooser.several(range(1, 100), chooser.between(3, 6))
    return (
        "Sort the numbers from smallest to largest.",
        ", ".join(map(str, numbers)),
        ", ".join(map(str, sorted(numbers))),
    )


def word_count(chooser):
    sentence = chooser.pick(SENTENCES)
    return "How many words does the sentence have?", sentence, str(len(sentence.split()))


def multiplication(chooser):
    a, b = chooser.between(3, 12), chooser.between(3, 12)
    return "What is %d times %d?" % (a, b), "", "%d times %d is %d." % (a, b, a * b)


INSTRUCTIONS = [opposite, translation, examples, sorting, word_count, multiplication]


def make_instructions(seed, count):
    chooser = Chooser(seed)
    rows, asked = [], set()
    while len(rows) < count:
        instruction, given, output = INSTRUCTIONS[len(rows) % len(INSTRUCTIONS)](chooser)
        if (instruction, given) not in asked:
            asked.add((instruction, given))
            rows.append({"instruction": instruction, "input": given, "output": output})
    return rows


# Word problems. Each gives (question, [step, ...], final number).

NAMES = ["Mira", "Jonas", "Amina", "Tomás", "Yuki", "Carla", "Ben", "Noor", "Ivo", "Leila"]
GOODS = ["pencils", "apples", "postcards", "candles", "muffins", "notebooks", "lemons", "stickers"]


def shopping(chooser):
    name, goods = chooser.pick(NAMES), chooser.pick(GOODS)
    count, price = chooser.between(3, 9), chooser.between(2, 6)
    cost = count * price
    paid = (cost // 10 + 1) * 10
    return (
        "%s buys %d %s for $%d each and pays with $%d. How many dollars does %s get back?"
        % (name, count, goods, price, paid, name),
        [
            "The %s cost %d * %d = %d dollars." % (goods, count, price, cost),
            "%s gets back %d - %d = %d dollars." % (name, paid, cost, paid - cost),
        ],
        paid - cost,
    )


def boxes(chooser):
    name, goods = chooser.pick(NAMES), chooser.pick(GOODS)
    count, size, given = chooser.between(3, 9), chooser.between(6, 12), chooser.between(2, 15)
    total = count * size
    return (
        "%s has %d boxes with %d %s in each. After giving away %d of the %s, how many are left?"
        % (name, count, size, goods, given, goods),
        [
            "There are %d * %d = %d %s in the boxes." % (count, size, total, goods),
            "%d - %d = %d %s are left." % (total, given, total - given, goods),
        ],
        total - given,
    )


def sharing(chooser):
    name, goods = chooser.pick(NAMES), chooser.pick(GOODS)
    friends, each = chooser.between(3, 8), chooser.between(3, 9)
    total = friends * each
    first = chooser.between(2, total - 2)
    return (
        "%s collects %d %s on Saturday and %d on Sunday, then shares them equally among %d friends. "
        "How many does each friend get?" % (name, first, goods, total - first, friends),
        [
            "%s collects %d + %d = %d %s." % (name, first, total - first, total, goods),
            "Each friend gets %d / %d = %d %s." % (total, friends, each, goods),
        ],
        each,
    )


def saving(chooser):
    name = chooser.pick(NAMES)
    start, weekly, weeks = chooser.between(5, 40), chooser.between(3, 12), chooser.between(4, 10)
    saved = weekly * weeks
    return (
        "%s has $%d and saves $%d every week. How many dollars does %s have after %d weeks?"
        % (name, start, weekly, name, weeks),
        [
            "In %d weeks %s saves %d * %d = %d dollars." % (weeks, name, weeks, weekly, saved),
            "Together that makes %d + %d = %d dollars." % (start, saved, start + saved),
        ],
        start + saved,
    )


def travelling(chooser):
    name = chooser.pick(NAMES)
    speed, hours, rest = chooser.between(12, 25), chooser.between(2, 5), chooser.between(5, 30)
    ridden = speed * hours
    return (
        "%s cycles for %d hours at %d km per hour and still has %d km to go. How long is the whole route in km?"
        % (name, hours, speed, rest),
        [
            "%s has cycled %d * %d = %d km." % (name, hours, speed, ridden),
            "The whole route is %d + %d = %d km." % (ridden, rest, ridden + rest),
        ],
        ridden + rest,
    )


def comparing(chooser):
    first, second = chooser.several(NAMES, 2)
    goods = chooser.pick(GOODS)
    count, times = chooser.between(4, 15), chooser.between(2, 5)
    return (
        "%s has %d %s. %s has %d times as many. How many %s do they have together?"
        % (first, count, goods, second, times, goods),
        [
            "%s has %d * %d = %d %s." % (second, times, count, times * count, goods),
            "Together they have %d + %d = %d %s." % (count, times * count, count + times * count, goods),
        ],
        count + times * count,
    )


PROBLEMS = [shopping, boxes, sharing, saving, travelling, comparing]


def make_word_problems(seed, count):
    chooser = Chooser(seed)
    rows, asked = [], set()
    while len(rows) < count:
        question, steps, result = PROBLEMS[len(rows) % len(PROBLEMS)](chooser)
        if question not in asked:
            asked.add(question)
            rows.append({"question": question, "answer": "\n".join(steps + ["#### %d" % result])})
    return rows
