"""Everyday conversations, made from small tables of facts."""

import json

from chooser import Chooser


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# Chats. Each topic gives (system text or None, [(question, answer), ...]).

CAPITALS = [
    ("France", "Paris"),
    ("Japan", "Tokyo (東京)"),
    ("Brazil", "Brasília"),
    ("Colombia", "Bogotá"),
    ("Iceland", "Reykjavík"),
    ("Greece", "Athens (Αθήνα)"),
    ("Kenya", "Nairobi"),
    ("Canada", "Ottawa"),
    ("South Korea", "Seoul (서울)"),
    ("Poland", "Warsaw"),
    ("Peru", "Lima"),
    ("Costa Rica", "San José"),
    ("Egypt", "Cairo"),
    ("Romania", "Bucharest (București)"),
    ("Portugal", "Lisbon"),
]
UNITS = [
    ("metres", "kilometres", 1000),
    ("minutes", "hours", 60),
    ("hours", "days", 24),
    ("grams", "kilograms", 1000),
    ("days", "weeks", 7),
    ("inches", "feet", 12),
    ("millilitres", "litres", 1000),
    ("centimetres", "metres", 100),
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
BOILING = [
    ("potatoes", 20, "until a knife slides in easily 🥔"),
    ("an egg", 9, "for a firm yolk 🥚"),
    ("spaghetti", 10, "in plenty of salted water 🍝"),
    ("rice", 12, "with the lid on 🍚"),
    ("carrots", 8, "in slices 🥕"),
    ("broccoli", 4, "so that it keeps its bite 🥦"),
    ("red lentils", 15, "and stir now and then"),
    ("corn on the cob", 6, "without salt 🌽"),
]
DISHES = [
    ("pancakes", ["flour", "milk", "eggs"]),
    ("crème brûlée", ["cream", "egg yolks", "sugar"]),
    ("guacamole", ["avocados", "lime", "onion", "salt"]),
    ("tomato soup", ["tomatoes", "onion", "stock"]),
    ("味噌汁 (miso soup)", ["dashi", "miso", "tofu"]),
    ("an omelette", ["eggs", "butter", "chives"]),
    ("hummus", ["chickpeas", "tahini", "lemon", "garlic"]),
]
PLACES = [
    ("the town library", 9, 18, "Sunday"),
    ("Café Lumière", 8, 17, "Monday"),
    ("the swimming pool", 7, 21, "Wednesday"),
    ("the toy museum", 10, 16, "Tuesday"),
    ("Anna's bakery", 6, 13, "Sunday"),
    ("the bike workshop", 10, 19, "Saturday"),
]


def capitals(chooser):
    first, *others = chooser.several(CAPITALS, 4)
    turns = [
        (
            chooser.pick(["What is the capital of %s?", "Which city is the capital of %s?"]) % first[0],
            chooser.pick(["The capital of %s is %s.", "%s: %s"]) % first,
        )
    ]
    for country, capital in others:
        turns.append(
            (
                chooser.pick(["And of %s?", "What about %s?", "And the capital of %s?"]) % country,
                chooser.pick(["That is %s.", "%s.", "It is %s."]) % capital,
            )
        )
    return chooser.pick([None, "You are a patient geography teacher."]), turns


def conversions(chooser):
    small, large, factor = chooser.pick(UNITS)
    amounts = chooser.several(range(2, 20), 4)
    turns = [
        (
            "How many %s are there in %d %s?" % (small, amounts[0], large),
            "%d %s = %d %s" % (amounts[0], large, amounts[0] * factor, small),
        )
    ]
    for amount in amounts[1:]:
        turns.append(
            (
                chooser.pick(["And in %d %s?", "What about %d %s?"]) % (amount, large),
                "%d %s%s" % (amount * factor, small, chooser.pick(["", "."])),
            )
        )
    return chooser.pick([None, "Convert units. Answer as briefly as you can."]), turns


def temperatures(chooser):
    first, *others = chooser.several(range(-20, 105, 5), 4)
    turns = [("What is %d °C in degrees Fahrenheit?" % first, "%d °C is %d °F." % (first, first * 9 // 5 + 32))]
    for celsius in others:
        turns.append((chooser.pick(["And %d °C?", "How about %d °C?"]) % celsius, "%d °F" % (celsius * 9 // 5 + 32)))
    return None, turns


def sums(chooser):
    a, b = chooser.between(11, 80), chooser.between(11, 80)
    result = a + b
    turns = [(chooser.pick(["What is %d + %d?", "Please add %d and %d."]) % (a, b), "%d + %d = %d" % (a, b, result))]
    for _ in range(3):
        step = chooser.between(2, 9)
        question, result = chooser.pick(
            [
                ("Now add %d." % step, result + step),
                ("Take away %d from that." % step, result - step),
                ("And that times %d?" % step, result * step),
            ]
        )
        turns.append((question, chooser.pick(["%d", "%d.", "That makes %d."]) % result))
    return chooser.pick([None, "You check homework. Be kind and exact."]), turns


def weekdays(chooser):
    today = chooser.between(0, 6)
    steps = chooser.several(range(1, 14), 4)

    def day_after(step):
        return WEEKDAYS[(today + step) % 7]

    turns = [
        (
            "Today is %s. Which day is it in %s?" % (WEEKDAYS[today], days(steps[0])),
            "In %s it will be %s." % (days(steps[0]), day_after(steps[0])),
        )
    ]
    for step in steps[1:]:
        turns.append(
            (
                chooser.pick(["And in %s?", "What about in %s?"]) % days(step),
                chooser.pick(["%s", "%s.", "That is a %s."]) % day_after(step),
            )
        )
    return None, turns


def days(count):
    return "1 day" if count == 1 else "%d days" % count


def cooking(chooser):
    boiling = [
        (
            chooser.pick(["How long should I boil %s?", "How many minutes does it take to boil %s?"]) % food,
            "%d minutes, %s" % (minutes, hint),
        )
        for food, minutes, hint in chooser.several(BOILING, 2)
    ]
    shopping = [
        (
            chooser.pick(["What do I need for %s?", "Which ingredients go into %s?"]) % dish,
            "\n".join("- " + item for item in items),
        )
        for dish, items in chooser.several(DISHES, 2)
    ]
    return (chooser.pick([None, "You are a cheerful kitchen helper. 🍳"]), chooser.several(boiling + shopping, 4))


def opening_hours(chooser):
    place, opens, closes, closed = chooser.pick(PLACES)
    other = chooser.pick([day for day in WEEKDAYS if day != closed])
    system = "You answer questions about %s. Opening hours: %d:00 to %d:00 every day except %s." % (
        place,
        opens,
        closes,
        closed,
    )
    turns = [
        (
            chooser.pick(["When do you open on %ss?", "From what time are you open on %ss?"]) % other,
            chooser.pick(["%d:00", "We open at %d:00.", "From %d:00 on."]) % opens,
        ),
        (
            chooser.pick(["And when do you close?", "Until when are you open?"]),
            chooser.pick(["%d:00", "We close at %d:00."]) % closes,
        ),
        ("Are you open on %ss?" % closed, "No, we are closed on %ss." % closed),
        (
            chooser.pick(["How many hours a day are you open?", "How long is that each day?"]),
            "%d hours." % (closes - opens),
        ),
    ]
    return system, turns[:2] + chooser.several(turns[2:], 2)


TOPICS = [capitals, conversions, temperatures, sums, weekdays, cooking, opening_hours]
THANKS = ["Thank you!", "Thanks, that helps.", "Great, thanks!"]
WELCOMES = ["You're welcome! 😊", "Happy to help.", "Any time!", "¡De nada! 🙌"]


def make_chat(chooser, topic):
    """A conversation of two to four user turns on one topic."""
    system, turns = topic(chooser)
    turns = turns[: chooser.between(2, 4)]
    if len(turns) < 4 and chooser.between(1, 4) == 1:
        turns.append((chooser.pick(THANKS), chooser.pick(WELCOMES)))
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    return messages


def different_chats(seed, count):
    """`count` conversations, the topics in turn, no two the same."""
    chooser = Chooser(seed)
    chats = []
    while len(chats) < count:
        chat = make_chat(chooser, TOPICS[len(chats) % len(TOPICS)])
        if chat not in chats:
            chats.append(chat)
    return chats


def make_chats(seed, count):
    """Conversations; in some, one answer is left out of training or counts half."""
    rows = []
    for index, messages in enumerate(different_chats(seed, count)):
        answers = [message for message in messages if message["role"] == "assistant"]
        if index % 12 == 3:
            answers[0]["train"] = False
        if index % 12 == 8:
            answers[-1]["weight"] = 0.5
        rows.append({"id": "chat-%03d" % index, "messages": messages})
    return rows


def make_sharegpt(seed, count):
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    return [
        {
            "id": "sharegpt-%03d" % index,
            "conversations": [{"from": speakers[message["role"]], "value": message["content"]} for message in messages],
        }
        for index, messages in enumerate(different_chats(seed, count))
    ]


# Tool use. Each scene gives (question, [(function, arguments, result), ...], answer).


def function(name, description, required, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def text(description, **more):
    return {"type": "string", "description": description, **more}


def whole_number(description):
    return {"type": "integer", "description": description}


FUNCTIONS = {
    "get_weather": function(
        "get_weather",
        "Get the weather in a city right now.",
        ["city"],
        city=text("Name of the city"),
        unit=text("Unit of the temperature", enum=["celsius", "fahrenheit"]),
    ),
    "convert_currency": function(
        "convert_currency",
        "Convert an amount of money.",
        ["amount", "source", "target"],
        amount=whole_number("How much to convert"),
        source=text("Currency code to convert from"),
        target=text("Currency code to convert to"),
    ),
    "add_event": function(
        "add_event",
        "Put an event into the calendar.",
        ["title", "day", "time"],
        title=text("What the event is called"),
        day=text("Day of the week"),
        time=text("Start time, as HH:MM"),
    ),
    "search_recipes": function(
        "search_recipes",
        "Find recipes that use an ingredient.",
        ["ingredient"],
        ingredient=text("The main ingredient"),
        limit=whole_number("How many recipes to return"),
    ),
}
CITIES = ["Lisbon", "Malmö", "Zürich", "Kyoto", "Nairobi", "Bogotá", "Cardiff", "Québec"]
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy"]
RATES = [("EUR", "CZK", 25), ("GBP", "JPY", 190), ("USD", "INR", 83), ("EUR", "JPY", 160), ("CHF", "SEK", 12)]
EVENTS = ["Dentist", "Piano lesson", "Lunch with Zoë", "Team meeting", "Yoga class", "Parents' evening"]
RECIPES = [
    ("pumpkin", ["Pumpkin soup", "Pumpkin risotto", "Roast pumpkin"]),
    ("chickpeas", ["Hummus", "Chickpea curry", "Falafel"]),
    ("mushrooms", ["Mushroom omelette", "Mushroom pie", "Mushroom pâté"]),
    ("lentils", ["Lentil salad", "Dal", "Lentil soup"]),
    ("apples", ["Apple crumble", "Apple cake", "Baked apples"]),
    ("spinach", ["Spinach lasagne", "Palak paneer", "Spinach quiche"]),
    ("leftover rice", ["Fried rice", "Rice pudding", "Stuffed peppers"]),
    ("rhubarb", ["Rhubarb compote", "Rhubarb tart", "Rhubarb and custard"]),
    ("aubergines", ["Moussaka", "Baba ghanoush", "Grilled aubergine"]),
]


def weather_scene(chooser):
    city, sky, degrees = chooser.pick(CITIES), chooser.pick(SKIES), chooser.between(-5, 32)
    arguments = {"city": city}
    if chooser.between(0, 1):
        arguments["unit"] = "celsius"
    return (
        chooser.pick(["What is the weather like in %s?", "How warm is it in %s right now?"]) % city,
        [("get_weather", arguments, {"city": city, "sky": sky, "temperature": degrees})],
        "Right now it is %s in %s, at %d °C." % (sky, city, degrees),
    )


def two_cities_scene(chooser):
    cities = chooser.several(CITIES, 2)
    degrees = chooser.several(range(-5, 33), 2)
    warmer = cities[degrees.index(max(degrees))]
    return (
        "Is it warmer in %s or in %s?" % tuple(cities),
        [
            ("get_weather", {"city": city}, {"city": city, "sky": chooser.pick(SKIES), "temperature": value})
            for city, value in zip(cities, degrees)
        ],
        "%s is warmer: %d °C against %d °C." % (warmer, max(degrees), min(degrees)),
    )


def currency_scene(chooser):
    source, target, rate = chooser.pick(RATES)
    amount = chooser.between(3, 60) * 5
    return (
        chooser.pick(["How much is %d %s in %s?", "Please convert %d %s to %s."]) % (amount, source, target),
        [
            (
                "convert_currency",
                {"amount": amount, "source": source, "target": target},
                {"amount": amount * rate, "currency": target},
            )
        ],
        "%d %s is %d %s." % (amount, source, amount * rate, target),
    )


def event_scene(chooser):
    title, day = chooser.pick(EVENTS), chooser.pick(WEEKDAYS)
    time = "%02d:%s" % (chooser.between(8, 19), chooser.pick(["00", "15", "30"]))
    return (
        chooser.pick(['Put "%s" into my calendar for %s at %s.', 'Please add "%s" on %s at %s.']) % (title, day, time),
        [("add_event", {"title": title, "day": day, "time": time}, {"status": "added", "conflicts": []})],
        'Done: "%s" is in your calendar for %s at %s.' % (title, day, time),
    )


def recipe_scene(chooser):
    ingredient, recipes = chooser.pick(RECIPES)
    found = recipes[: chooser.between(2, 3)]
    return (
        chooser.pick(["What can I cook with %s?", "I have a lot of %s. Any ideas?"]) % ingredient,
        [("search_recipes", {"ingredient": ingredient, "limit": len(found)}, {"recipes": found})],
        "Here are some ideas:\n" + "\n".join("- " + recipe for recipe in found),
    )


SCENES = [weather_scene, currency_scene, event_scene, recipe_scene, two_cities_scene]


def make_tool_row(chooser, index, scene):
    question, calls, answer = scene
    used = calls[0][0]
    others = chooser.several([name for name in FUNCTIONS if name != used], chooser.between(0, 2))
    offered = chooser.several([used] + others, len(others) + 1)
    tool_calls, results = [], []
    for number, (name, arguments, result) in enumerate(calls):
        call_id = "call_%03d_%d" % (index, number)
        if index % 2 == 0:
            arguments = json.dumps(arguments, ensure_ascii=False)
        tool_calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        results.append(
            {"role": "tool", "tool_call_id": call_id, "name": name, "content": json.dumps(result, ensure_ascii=False)}
        )
    call = {"role": "assistant", "content": chooser.pick([None, ""]), "tool_calls": tool_calls}
    return {
        "id": "tools-%03d" % index,
        "tools": [FUNCTIONS[name] for name in offered],
        "messages": [user(question), call] + results + [assistant(answer)],
    }


def make_tool_rows(seed, count):
    chooser = Chooser(seed)
    rows, questions = [], set()
    while len(rows) < count:
        scene = SCENES[len(rows) % len(SCENES)](chooser)
        if scene[0] not in questions:
            questions.add(scene[0])
            rows.append(make_tool_row(chooser, len(rows), scene))
    return rows
