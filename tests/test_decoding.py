"""Batched decoding: the tables written by hand, the cache under rows that come and go, and equal outputs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import PRESETS, VOCABULARY, make_model, model_folder, model_of, random_ids, row_logits

from sftcli.model import cache
from sftcli.model.attention import Sight, attend
from sftcli.model.cache import Table, padded, positions_of, prefill
from sftcli.model.decoding import Completion, Prompt, generate, in_order
from sftcli.model.sampling import filtered, gumbel_noise, repetition_penalised, stream
from sftcli.recipe import Generate

SIDES = ("left", "right")
TIE = 1e-3  # two best scores closer than this may swap: float32 sums depend on how many rows a product has


@pytest.fixture(params=PRESETS)
def preset(request):
    return request.param


@pytest.fixture
def model(preset, tmp_path):
    return make_model(tmp_path / preset, preset)


def prompts_of(*lengths, seed=0):
    return [Prompt(random_ids(length, 100 * seed + i), f"row {i}") for i, length in enumerate(lengths)]


def complete(model, prompts, stops=(), text_stops=None, **options):
    return list(in_order(generate(model, prompts, Generate(**options), stops, text_stops)))


# ---- "equal outputs"


def perturbed_scores(model, prompt, made, options):
    """What the decoder compares after `made`: penalised, filtered scores plus this row's noise at this step."""
    logits = row_logits(model, prompt.ids + made)[-1:]
    if options.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, prompt.ids + made] = True
        logits = repetition_penalised(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        return logits[0]
    noise = stream(options.seed, prompt.key, prompt.sample)
    for _ in range(len(made) + 1):
        step = gumbel_noise([noise], logits.shape[1])
    return (filtered(logits, options) + step)[0]


def assert_equal_outputs(model, prompts, options, one, other):
    """Equal tokens and reasons; a difference counts as equal where its first token is a near tie. Returns the ties."""
    ties = 0
    for prompt, a, b in zip(prompts, one, other, strict=True):
        if (a.ids, a.finish_reason) == (b.ids, b.finish_reason):
            continue
        same = next(
            (t for t, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), min(len(a.ids), len(b.ids))
        )
        best, second = perturbed_scores(model, prompt, a.ids[:same], options).topk(2).values.tolist()
        assert best - second < TIE, f"{prompt.key}: {a} and {b} differ at token {same} by {best - second:.2g}"
        ties += 1
    return ties


# ---- tables written by hand


def test_training_rows_padded_on_the_right_are_bg_1():
    ids, mask = padded([[1, 3, 2, 6, 2], [1, 3, 6, 2, 5, 4, 2]], "right")
    assert ids.tolist() == [[1, 3, 2, 6, 2, 0, 0], [1, 3, 6, 2, 5, 4, 2]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert (positions_of(mask) * mask).tolist() == [[0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 5, 6]]


def test_left_padded_contexts_are_bg_2():
    ids, mask = padded([[1, 3, 2], [1, 3, 6, 2]], "left")
    assert ids.tolist() == [[0, 1, 3, 2], [1, 3, 6, 2]]
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert positions_of(mask).tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    ids, mask = padded([[1, 3, 2], [1, 3, 6, 2, 5]], "left")
    assert ids.tolist() == [[0, 0, 1, 3, 2], [1, 3, 6, 2, 5]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_right_padded_contexts_are_bg_3():
    ids, mask = padded([[1, 3, 2], [1, 3, 6, 2]], "right")
    assert ids.tolist() == [[1, 3, 2, 0], [1, 3, 6, 2]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert positions_of(mask).tolist() == [[0, 1, 2, 2], [0, 1, 2, 3]]


def table_for(side, layers=1, heads=1, size=1):
    config = SimpleNamespace(layers=layers, kv_heads=heads, head_dim=size)
    return Table(SimpleNamespace(config=config, device=torch.device("cpu"), prefix=None), side)


@pytest.mark.parametrize(
    ("side", "before", "after", "positions"),
    [
        ("left", [[0, 1, 1, 1], [1, 1, 1, 1]], [[0, 1, 1, 1, 1], [1] * 5], [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]),
        ("right", [[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 0, 1], [1] * 5], [[0, 1, 2, 2, 3], [0, 1, 2, 3, 4]]),
    ],
)
def test_table_lays_out_and_grows_as_bg_2_and_bg_3(side, before, after, positions):
    table = table_for(side)
    flat = [torch.zeros(7, 1, 1)]
    table.add([3, 4], flat, flat)
    assert table.mask[:, : table.width].int().tolist() == before
    assert table.open_column().tolist() == [row[-1] for row in positions]
    mask = table.mask[:, : table.width]
    assert mask.int().tolist() == after
    assert positions_of(mask).tolist() == positions


# ---- the table under rows that come and go


moves = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
        st.tuples(st.just("step"), st.integers(1, 70)),
        st.tuples(st.just("keep"), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SIDES), moves)
def test_every_row_keeps_its_own_keys_in_order_while_others_come_and_go(side, script):
    table, rows, counter = table_for(side, layers=2), [], 0.0
    for move, argument in script:
        if move == "add":
            flat = []
            for length in argument:
                rows.append([counter + 1 + t for t in range(length)])
                counter += length
                flat += rows[-1]
            keys = [torch.tensor(flat)[:, None, None] * scale for scale in (1, 10)]
            table.add(argument, keys, [-k for k in keys])
        elif move == "keep":
            slots = [i for i in range(len(rows)) if argument >> (i % 8) & 1]
            table.keep(slots)
            rows = [rows[i] for i in slots]
            assert bool(table.mask[:, : table.width].any(0).all())  # no column is empty for all
        elif rows:
            for _ in range(argument):
                assert table.open_column().tolist() == [len(row) for row in rows]
                for row in rows:
                    counter += 1
                    row.append(counter)
                new = torch.tensor([row[-1] for row in rows])[:, None, None]
                for layer, scale in enumerate((1, 10)):
                    table(Sight(layer, 1.0), torch.zeros(len(rows), 1, 1), new * scale, -new * scale)
        assert len(table) == len(rows)
        if rows and (side == "left" or move == "add"):  # left: every row ends at the last column
            assert bool(table.mask[-1, 0] if side == "right" else table.mask[:, table.width - 1].all())
        for i, row in enumerate(rows):
            real = table.mask[i, : table.width]
            for layer, scale in enumerate((1.0, 10.0)):
                expected = torch.tensor(row) * scale
                assert torch.equal(table.keys[layer][i, 0, : table.width, 0][real], expected)
                assert torch.equal(table.values[layer][i, 0, : table.width, 0][real], -expected)


@pytest.mark.parametrize("side", SIDES)
def test_table_does_not_grow_with_the_number_of_rows_that_passed_through(side):
    table = table_for(side)
    for _ in range(60):
        flat = [torch.zeros(5, 1, 1)]
        table.add([5], flat, flat)
        for _ in range(4):
            table.open_column()
        if len(table) == 3:
            table.keep([1, 2])
    assert table.width <= 5 + 3 * 4 + 4


# ---- equal to one by one, to a forward without padding, to transformers


@pytest.mark.parametrize("side", SIDES)
def test_logits_of_every_step_equal_a_forward_without_padding(model, side):
    prompts = [random_ids(length, length) for length in (3, 11, 6)]
    table = Table(model.eval(), side)
    with torch.no_grad():
        logits = prefill(model, table, prompts)
        for step in range(6):
            for prompt, found in zip(prompts, logits, strict=True):
                # logits of 7; some processors are 1.4e-5 apart here
                torch.testing.assert_close(found, row_logits(model, prompt)[-1], atol=2e-5, rtol=1e-5)
            if step == 2:  # the longest leaves, another enters
                del prompts[1]
                table.keep([0, 2])
                prompts.append(random_ids(20, 5))
                prefill(model, table, prompts[2:])
            new = random_ids(3, 50 + step)
            prompts = [[*prompt, token] for prompt, token in zip(prompts, new, strict=True)]
            logits = model.logits(model.hidden(torch.tensor(new), table.open_column(), table))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", SIDES)
def test_products_for_several_rows_equal_the_attention_kernel(model, side, window, monkeypatch):
    for block in model.blocks:
        block.attention.sight = replace(block.attention.sight, window=window)
    found = []
    for several in (cache.SEVERAL, 99):
        monkeypatch.setattr(cache, "SEVERAL", several)
        table = Table(model.eval(), side)
        with torch.no_grad():
            prefill(model, table, [random_ids(length, length) for length in (3, 11, 6, 1, 9)])
            steps = [model.hidden(torch.tensor(random_ids(5, t)), table.open_column(), table) for t in range(3)]
        found.append(torch.stack(steps))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert not torch.equal(*found)  # they are two ways


def naive_generate(model, prompts, side, see_pads=False, raw_positions=False, last_column=False, steps=8):
    """Greedy decoding of a padded batch without a cache; the flags are the three usual mistakes."""
    ids, mask = padded(prompts, side)
    made = []
    for step in range(steps):
        width = ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        seen = causal & (mask[:, None, :] > 0) | torch.eye(width, dtype=torch.bool)  # a pad sees itself: no NaN
        seen = causal.expand_as(seen) if see_pads else seen
        positions = torch.arange(width).expand_as(ids) if raw_positions else positions_of(mask)

        def attention(sight, q, k, v, seen=seen):
            return attend(*(t.transpose(1, 2) for t in (q, k, v)), seen[:, None], sight).transpose(1, 2)

        with torch.no_grad():
            logits = model.eval().logits(model.hidden(ids, positions, attention))
        first_on_the_right = side == "right" and step == 0 and not last_column
        columns = [len(p) - 1 if first_on_the_right else width - 1 for p in prompts]
        chosen = logits[range(len(prompts)), columns].argmax(-1)
        made.append(chosen)
        ids = torch.cat([ids, chosen[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(chosen)[:, None]], 1)
    return torch.stack(made, 1).tolist()


def test_left_equals_right_equals_one_by_one_equals_a_naive_batch(model):  # BG-4
    prompts, options = prompts_of(3, 4, 6), Generate(max_new_tokens=8)
    apart = [complete(model, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert len({tuple(done.ids) for done in apart}) == 3
    for side in SIDES:
        together = complete(model, prompts, max_new_tokens=8, pad_side=side)
        assert assert_equal_outputs(model, prompts, options, together, apart) == 0
        assert naive_generate(model, [prompt.ids for prompt in prompts], side) == [done.ids for done in apart]


def test_the_usual_mistakes_give_other_tokens(model, preset):  # BG-4, wrong on purpose
    prompts = [prompt.ids for prompt in prompts_of(3, 4, 6)]
    right = naive_generate(model, prompts, "left")
    assert naive_generate(model, prompts, "left", see_pads=True) != right
    assert naive_generate(model, prompts, "right", see_pads=True) != right
    assert naive_generate(model, prompts, "right", last_column=True) != right
    assert naive_generate(model, prompts, "right", raw_positions=True) != right
    # left padding with column numbers as positions: RoPE only knows distances, so only learned positions can tell
    assert (naive_generate(model, prompts, "left", raw_positions=True) == right) == (preset == "llama")


def test_batch_equals_generate_of_transformers(preset, tmp_path):  # BG-4
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here: pip install '.[test]'")
    folder = model_folder(tmp_path / "m", preset)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = prompts_of(3, 4, 6)
    ids, mask = padded([prompt.ids for prompt in prompts], "left")
    theirs.generation_config.eos_token_id = None
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ours = complete(model_of(folder), prompts, max_new_tokens=8)
    assert [done.ids for done in ours] == found[:, 6:].tolist()


STYLES = {
    "greedy": {},
    "temperature": {"temperature": 1.0, "seed": 3},
    "filters": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "penalty": {"repetition_penalty": 1.3},
    "sampled penalty": {"repetition_penalty": 1.2, "temperature": 0.8, "seed": 1},
}


@pytest.mark.parametrize("style", STYLES)
def test_batches_of_one_three_and_thirty_two_give_equal_tokens_on_both_sides(model, style):
    prompts = prompts_of(9, 1, 30, 4, 17, 2, 2, 40, 5)
    given = STYLES[style] | {"max_new_tokens": 14}
    options, stops = Generate(**given), range(40)  # about every eighth token stops a row
    apart = complete(model, prompts, stops, **given, batch_size=1)
    assert len({len(done.ids) for done in apart}) > 2
    ties = 0
    for size in (3, 32):
        for side in SIDES:
            together = complete(model, prompts, stops, **given, batch_size=size, pad_side=side)
            ties += assert_equal_outputs(model, prompts, options, together, apart)
    assert ties <= 2


def test_rows_that_finish_leave_and_waiting_rows_take_their_places(model, monkeypatch):
    sizes = []
    hidden = model.hidden

    def counting(ids, positions, attention, blocks=None):
        if isinstance(attention, Table):
            sizes.append(len(ids))
        return hidden(ids, positions, attention)

    monkeypatch.setattr(model, "hidden", counting)
    prompts = prompts_of(*(3 + 7 * i % 23 for i in range(12)))
    done = list(generate(model, prompts, Generate(max_new_tokens=20, batch_size=4), range(30, 70)))
    assert sorted(completion.number for completion in done) == list(range(12))
    assert [completion.number for completion in done] != list(range(12))  # short ones overtook
    assert max(sizes) == 4
    assert len(sizes) < sum(len(completion.ids) for completion in done) / 2
    assert sizes.count(4) > len(sizes) / 2  # the batch is kept full while prompts wait


def test_prompts_are_read_only_as_places_become_free(model):
    taken = []

    def arriving():
        for i, prompt in enumerate(prompts_of(*[5] * 20)):
            taken.append(i)
            yield prompt

    completions = generate(model, arriving(), Generate(max_new_tokens=3, batch_size=4), [])
    next(completions)
    assert len(taken) == 4


# ---- streams


def test_shuffled_input_gives_the_same_texts_shuffled(model):
    prompts = prompts_of(9, 1, 30, 4, 17, 2, 6)
    given = {"temperature": 1.0, "max_new_tokens": 10, "batch_size": 3}
    straight = complete(model, prompts, range(30), **given)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = complete(model, [prompts[i] for i in order], range(30), **given)
    found = [shuffled[order.index(i)] for i in range(7)]
    assert_equal_outputs(model, prompts, Generate(**given), straight, found)


def test_stream_depends_on_seed_key_and_sample_and_on_nothing_else(model):
    ids = random_ids(6, 1)

    def texts(prompts, **options):
        return [tuple(d.ids) for d in complete(model, prompts, temperature=1.0, max_new_tokens=8, **options)]

    same = texts([Prompt(ids, "a"), Prompt(ids, "a"), Prompt(ids, "b"), Prompt(ids, "a", 1)])
    assert same[0] == same[1]
    assert len(set(same)) == 3
    assert texts([Prompt(ids, "a")], seed=7) != texts([Prompt(ids, "a")])


def test_greedy_ignores_the_seed(model):
    prompts = prompts_of(5, 8)
    runs = [complete(model, prompts, max_new_tokens=6, seed=seed) for seed in (0, 1)]
    assert runs[0] == runs[1]


def test_repetition_penalty_lowers_what_the_row_holds_already(model):
    prompt = random_ids(6, 2)
    (done,) = complete(model, [Prompt(prompt, "a")], max_new_tokens=40, repetition_penalty=5.0)
    ids = list(prompt)
    for token in done.ids:
        scores = row_logits(model, ids)[-1]
        for held in set(ids):
            scores[held] = scores[held] / 5 if scores[held] > 0 else scores[held] * 5
        assert int(scores.argmax()) == token
        ids.append(token)
    assert complete(model, [Prompt(prompt, "a")], max_new_tokens=40)[0].ids != done.ids


# ---- how rows end


def test_stop_id_ends_a_row_and_is_not_part_of_it(model):
    prompt = prompts_of(5)
    (free,) = complete(model, prompt, max_new_tokens=12)
    for at, token in enumerate(free.ids):
        if token in free.ids[:at]:
            break
        (done,) = complete(model, prompt, [299, token], max_new_tokens=12)
        assert done == Completion(0, free.ids[:at], "stop")
    assert at > 2


def test_text_stop_ends_a_row_with_the_token_that_completed_it(model):
    prompts = prompts_of(5, 9)
    free = complete(model, prompts, max_new_tokens=12)
    found = complete(model, prompts, text_stops=lambda ids: len(ids) == 3, max_new_tokens=12)
    assert [done.ids for done in found] == [done.ids[:3] for done in free]
    assert {done.finish_reason for done in found} == {"stop"}


def test_row_that_outgrows_the_context_is_finished_with_length(model):
    context = model.config.context
    prompts = prompts_of(context - 2, 5, context, context + 9, context - 1)
    found = complete(model, prompts, max_new_tokens=8, batch_size=2)
    assert [len(done.ids) for done in found] == [2, 8, 0, 0, 1]
    assert {done.finish_reason for done in found} == {"length"}
    assert [done.context_full for done in found] == [True, False, True, True, True]


def test_no_prompts_give_no_completions(model):
    assert complete(model, []) == []


@pytest.mark.parametrize("side", SIDES)
def test_deterministic_gives_identical_tokens_at_every_batch_size(model, side):
    prompts = prompts_of(9, 1, 30, 4)
    given = {"temperature": 1.0, "max_new_tokens": 10, "deterministic": True, "pad_side": side}
    runs = [complete(model, prompts, range(20), batch_size=size, **given) for size in (1, 3, 32)]
    assert runs[0] == runs[1] == runs[2]


def test_deterministic_logits_have_the_same_bits_at_every_batch_size(tmp_path, monkeypatch):
    model = make_model(
        tmp_path / "m", "llama", layers=2, width=96, heads=6, mlp_width=256
    )  # wide enough for bits to differ
    projected = model.logits
    rows = []
    monkeypatch.setattr(model, "logits", lambda hidden: rows.extend(projected(hidden)) or projected(hidden))

    def bits(size, **options):
        rows.clear()
        complete(model, prompts_of(9, 1, 30, 4, 7), max_new_tokens=10, batch_size=size, **options)
        return sorted(row.numpy().tobytes() for row in rows)

    assert bits(1, deterministic=True) == bits(3, deterministic=True) == bits(32, deterministic=True)
    assert bits(1) != bits(32)


def test_decoding_under_bfloat16_stays_near_float32(model):
    prompts = prompts_of(9, 1, 30, 4, 12)
    exact = torch.stack([row_logits(model, prompt.ids)[-1] for prompt in prompts])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        first = prefill(model, Table(model, "left"), [prompt.ids for prompt in prompts])
        found = complete(model, prompts, max_new_tokens=6, batch_size=2)
    assert first.dtype == torch.float32
    assert float((first - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert all(len(done.ids) == 6 and max(done.ids) < VOCABULARY for done in found)


def test_completions_come_in_order_as_soon_as_they_can():
    log = []

    def finishing():
        for number in (1, 0, 3, 4, 2):
            log.append(f"done {number}")
            yield Completion(number, [], "stop")

    for completion in in_order(finishing()):
        log.append(f"out {completion.number}")
    assert log == ["done 1", "done 0", "out 0", "out 1", "done 3", "done 4", "done 2", "out 2", "out 3", "out 4"]
