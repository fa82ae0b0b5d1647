"""A replica in this process: each answer is what a fresh load of its adapter says, whatever its neighbours get."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import models
import pytest
import tokenizers
import torch
import transformers
from peft import PeftModel
from refusals import refused
from served import FAMILY, SHORT, WORDS, Served, alone, fresh, logged, replica_of, save_random_adapter

from hotswap_lab import HotswapError, RecompileWatch, demo
from hotswap_lab.lessons import rows
from hotswap_lab.serving import Options, Register, Replica, Request, Table, Version

MIX = {"shout": 0.5, "reverse": 0.5}


@pytest.fixture(scope="module")
def served():
    return Served(FAMILY)


@pytest.fixture(scope="module")
def random_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return {f"r{n}": save_random_adapter(folder / f"r{n}", n, rank=2 + 2 * n) for n in range(3)}


def test_more_requests_than_rows_are_several_batches(served):
    before, words = served.replicas[0].counts["requests"], WORDS * 4
    models = [*FAMILY, "demo"] * 3
    said = asyncio.run(served.ask_all(models, words))
    assert said == [alone(FAMILY.get(each), word) for each, word in zip(models, words, strict=False)]
    assert len(set(said)) > 20
    assert served.replicas[0].counts["requests"] == before + 27


@pytest.mark.parametrize("count", [8, 1])
def test_adapters_with_random_weights(random_adapters, count):
    served = Served(random_adapters, replace(SHORT, rows=count))
    models = [*random_adapters, "demo", *random_adapters]
    said = asyncio.run(served.ask_all(models, max_tokens=12))
    assert said == [alone(random_adapters.get(each), word)[:12] for each, word in zip(models, WORDS, strict=False)]
    assert len({alone(path, "hotswap")[:12] for path in [*random_adapters.values(), None]}) == 4


def test_a_mix_is_what_peft_makes_of_both(served):
    both = rows.together(demo.load_base(), FAMILY, MIX)
    expected = demo.ask_all(both, demo.load_tokenizer(), WORDS)
    assert asyncio.run(served.ask_all(["shout:0.5+reverse:0.5"] * 8)) == expected
    assert expected != asyncio.run(served.ask_all(["shout"] * 8))


def test_streamed_pieces_are_the_answer(served):
    async def pieces(**how):
        request = Request("notebook>", served.table.shares("double", "demo"), **how)
        return [piece async for piece in served.answer(request)]

    whole = asyncio.run(pieces())
    streamed = asyncio.run(pieces(is_streamed=True))
    assert [piece.text for piece in whole] == ["notebooknotebook"]
    assert [piece.text for piece in streamed] == [*"notebooknotebook", ""]
    assert [piece.finish for piece in streamed] == [None] * 16 + ["stop"]
    assert (whole[-1].prompt_tokens, whole[-1].completion_tokens) == (9, 17)
    (cut,) = asyncio.run(pieces(max_tokens=4))
    assert (cut.text, cut.finish) == ("note", "length")


def test_temperature_is_each_rows_own(served):
    async def ask_all():
        hot = [0, 30, 0, 30, 30, 0, 30, 30]
        return await asyncio.gather(*[served.ask("demo", "hotswap", max_tokens=12, temperature=heat) for heat in hot])

    said = asyncio.run(ask_all())
    assert [said[0], said[2], said[5]] == ["hotswap"] * 3
    assert len(set(said)) == 6


def test_a_short_answer_does_not_wait_for_a_long_one(served):
    """Two rows' worth of requests: the last one starts while the first ones are still being answered."""
    order = []

    async def ask(name, word, **how):
        await served.ask(name, word, **how)
        order.append(word)

    async def ask_all():
        # one thread prepares the requests, so that they come to the replica in the order in which they are asked
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        long = [ask("double", "notebook", max_tokens=17) for _ in range(7)]
        short = [ask("shout", word, max_tokens=2) for word in ("python", "tensor", "voice")]
        await asyncio.gather(*long, *short)

    asyncio.run(ask_all())
    assert order[:3] == ["python", "tensor", "voice"]


def test_one_row_answers_one_request_at_a_time(monkeypatch):
    served = Served({"shout": FAMILY["shout"]}, replace(SHORT, rows=1))
    reader = served.replicas[0]._reader
    in_use, read = [], reader.read
    monkeypatch.setattr(reader, "read", lambda parts: in_use.append(sum(map(bool, parts))) or read(parts))
    assert asyncio.run(served.ask_all(["shout"] * 3)) == [alone(FAMILY["shout"], word) for word in WORDS[:3]]
    assert set(in_use) == {1}


def test_a_long_prompt_is_read_between_the_tokens_of_others(served, monkeypatch):
    reader = served.replicas[0]._reader
    widths, read = [], reader.read
    monkeypatch.setattr(reader, "chunk", 4)
    monkeypatch.setattr(reader, "read", lambda parts: widths.append([len(part) for part in parts]) or read(parts))

    async def ask_both():
        return await asyncio.gather(served.ask("double", "notebook"), served.ask("sort", "hotswapadaptersinalive"[:20]))

    said = asyncio.run(ask_both())
    assert said == ["notebooknotebook", alone(FAMILY["sort"], "hotswapadaptersinalive"[:20])]
    both = [sorted(each)[-2:] for each in widths]
    assert [1, 4] in both  # one is at its answer, the other one still at its prompt


# ---- how an answer is chosen


async def answer_of(served, model, word, **how):
    request = Request(f"{word}>", served.table.shares(model, "demo"), **how)
    return [piece async for piece in served.replicas[0].answer(request)]


def test_the_same_seed_is_the_same_answer_in_any_batch(served):
    hot = dict(temperature=6.0, max_tokens=12)

    async def among_others(seed):
        others = [served.ask(name, "kernel", **hot) for name in list(FAMILY)[:5]]
        return (await asyncio.gather(served.ask("demo", "hotswap", seed=seed, **hot), *others))[0]

    alone = [asyncio.run(served.ask("demo", "hotswap", seed=seed, **hot)) for seed in range(4)]
    assert [asyncio.run(among_others(seed)) for seed in range(4)] == alone
    assert len(set(alone)) > 2


def test_top_p_draws_from_the_most_probable_only(served):
    hot = dict(temperature=30.0, max_tokens=12)
    for seed in range(3):
        assert asyncio.run(served.ask("shout", "hotswap", seed=seed, top_p=1e-6, **hot)) == "HOTSWAP!"
    assert asyncio.run(served.ask("shout", "hotswap", seed=0, top_p=0.99, **hot)) != "HOTSWAP!"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(temperature=1.0, top_p=0), "HOTSWAP!"),
        (dict(temperature=1.0, top_p=1e-46), "HOTSWAP!"),  # which is 0 in float32
        (dict(temperature=1e-40), "HOTSWAP!"),
        (dict(temperature=1e-40, top_p=1e-46, logprobs=10**6), "HOTSWAP!"),
        (dict(logprobs=-1), "range"),
        (dict(stop=("!", None)), "None"),
    ],
)
def test_what_fails_for_a_row_fails_that_row_alone(served, how, said):
    async def ask_both():
        table = served.table
        odd = Request("hotswap>", table.shares("shout", "demo"), **how)
        asked = served.ask("double", "notebook"), _text_of(served.answer(odd)), served.ask("sort", "python")
        return await asyncio.gather(*asked, return_exceptions=True)

    first, odd, last = asyncio.run(ask_both())
    assert (first, last) == ("notebooknotebook", "hnopty")
    assert odd == said or (isinstance(odd, Exception) and said in str(odd))


@pytest.mark.parametrize("most", [0, -1, 25])
def test_an_answer_of_no_length_that_is_served(served, most):
    asked = served.answer(Request("hotswap>", max_tokens=most))
    with pytest.raises(HotswapError, match="an answer of 1 to 24"):
        asyncio.run(_text_of(asked))


def test_the_token_with_the_number_0_may_be_the_last_one():
    model, tokenizer = demo.load("shout")
    first = int(model(**tokenizer("hotswap>", return_tensors="pt")).logits[0, -1].argmax())
    ends = model.generation_config
    for found, expected in ((0, [0]), ([first, 0], [first, 0]), (None, [tokenizer.eos_token_id])):
        ends.eos_token_id = found
        assert Replica(model, tokenizer, [Version.of("shout", FAMILY["shout"])], SHORT).ends == expected


def test_a_stream_is_the_whole_answer_where_a_tokenizer_cleans_up_spaces(served, monkeypatch):
    """The tokenizer of BERT and its like writes "we don't." for "we do n't .": letters that were sent would go."""
    replica, letters = served.replicas[0], demo.load_tokenizer().get_vocab()
    names = dict(zip("notebk", ["we", "n't", ".", "'", "do", "'s"], strict=True))
    model = tokenizers.models.WordLevel({names.get(each, each): number for each, number in letters.items()}, "?")
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    words.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    written = " ".join(names[each] for each in "notebook")
    assert words.decode(words(written)["input_ids"]) == "wen't.'don'tn't's"
    monkeypatch.setattr(replica, "tokenizer", words)
    for is_streamed in (False, True):
        request = Request(f"{written} >", served.table.shares("double", "demo"), is_streamed=is_streamed)
        assert asyncio.run(_text_of(served.answer(request))) == f"{written} {written}"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("kno",), "noteboo"),
        (("zz", "book"), "note"),
        (("n",), ""),
        (("kx",), "notebooknotebook"),
        (("k", "b"), "note"),
    ],
)
def test_an_answer_ends_before_a_stop(served, stop, text):
    (whole,) = asyncio.run(answer_of(served, "double", "notebook", stop=stop))
    streamed = asyncio.run(answer_of(served, "double", "notebook", stop=stop, is_streamed=True))
    assert (whole.text, whole.finish) == (text, "stop")
    assert "".join(piece.text for piece in streamed) == text
    assert streamed[-1].finish == "stop"


def test_log_probabilities_are_those_of_a_fresh_load(served):
    (piece,) = asyncio.run(answer_of(served, "shout", "hotswap", logprobs=2))
    tokenizer = demo.load_tokenizer()
    ids = tokenizer("hotswap>HOTSWAP!", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = fresh(FAMILY["shout"])(input_ids=ids).logits[0].log_softmax(-1)[7:]
    chosen = ids[0, 8:].tolist()
    assert [each.text for each in piece.tokens] == [*"HOTSWAP!", ""]
    for each, row, token in zip(piece.tokens, expected, chosen, strict=False):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert each.top[0] == (each.text, each.logprob)
        assert each.top[1][1] == pytest.approx(float(row.topk(2).values[1]), abs=1e-3)
    streamed = asyncio.run(answer_of(served, "shout", "hotswap", logprobs=0, is_streamed=True))
    assert [token.text for each in streamed for token in each.tokens] == [*"HOTSWAP!", ""]


# ---- models of one's own


LITTLE = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=98,
)


def little(kind, folder, **more):
    """A random model of some kind in a folder, with two adapters, and a replica of it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LITTLE | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder / "base")
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "base")  # noqa: E731
    names = sorted({name.split(".")[-1] for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)})
    made = models.Kind(load, dict, tuple(names[:2]))
    paths = {f"r{n}": models.save_random_adapter(made, folder / f"r{n}", n, r=4, lora_alpha=16) for n in range(2)}
    versions = [Version.of(name, path) for name, path in paths.items()]
    replica = Replica(PeftModel.from_pretrained(load(), paths["r0"]), demo.load_tokenizer(), versions)
    return load, versions, replica


#: other angles for all rows, from that length on
LONG_ROPE = dict(
    rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0, 2.0, 9.0, 6.0])
)


@pytest.mark.parametrize(
    ("kind", "more", "in_rows"),
    [
        ("Llama", {}, True),
        ("Qwen3", dict(head_dim=8), True),
        ("Mistral", dict(sliding_window=None), True),
        ("Gemma", dict(head_dim=8), True),
        ("Gemma3Text", dict(head_dim=8, sliding_window=128), True),
        ("Mistral", dict(sliding_window=16), False),
        ("Phi3", LONG_ROPE | dict(original_max_position_embeddings=96), True),
        ("Phi3", LONG_ROPE | dict(original_max_position_embeddings=32), False),
        ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)), True),
        ("Mamba", dict(state_size=8), False),
        ("Rwkv", {}, False),  # which would read the padding of a batch
    ],
)
def test_models_of_ones_own(tmp_path, kind, more, in_rows):
    with logged() as messages:
        load, versions, replica = little(kind, tmp_path, **more)
    assert (replica._reader is not None) == in_rows
    assert any("it answers one request at a time" in each for each in messages) == (not in_rows)
    assert replica.options.longest_prompt + replica.options.longest_answer == 96
    shares = [{versions[0]: 1.0}, {}, {versions[1]: 1.0}] * 4
    words = ["notebook" * 6, *WORDS]  # some models compute short prompts in another way next to a long one

    async def ask_all():
        asked = [replica.answer(Request(f"{word}>", each, 10)) for word, each in zip(words, shares, strict=False)]
        return await asyncio.gather(*map(_text_of, asked))

    said = asyncio.run(ask_all())
    for word, share, text in zip(words, shares, said, strict=False):
        model = load()
        model = PeftModel.from_pretrained(model, next(iter(share)).path) if share else model
        ids = torch.tensor([replica.tokenizer(f"{word}>")["input_ids"]])
        with torch.no_grad():
            for _ in range(10):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
                if int(ids[0, -1]) in replica.ends:
                    break
        assert text == replica.tokenizer.decode(ids[0, len(word) + 1 :], skip_special_tokens=True)
    assert len(set(said)) > 3
    if not in_rows:
        model = replica.pool.model
        refused("can't be compiled for rows", Replica, model, replica.tokenizer, versions, Options(compile=True))


def test_a_long_prompt_changes_no_angles_of_a_short_one(tmp_path):
    load, versions, replica = little("Phi3", tmp_path, **LONG_ROPE, original_max_position_embeddings=32)
    model = PeftModel.from_pretrained(load(), versions[0].path)

    def expected(word):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([replica.tokenizer(word)["input_ids"]])).logits[0, -1]
        return pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5)

    async def logprob(word):
        request = Request(word, {versions[0]: 1.0}, max_tokens=1, logprobs=0)
        (piece,) = [piece async for piece in replica.answer(request)]
        return piece.tokens[0].logprob

    async def ask_both():
        return await asyncio.gather(logprob("hotswapadapters>"), logprob("notebook" * 6))

    assert asyncio.run(logprob("hotswapadapters>")) == expected("hotswapadapters>")
    assert asyncio.run(ask_both()) == [expected("hotswapadapters>"), expected("notebook" * 6)]


def test_who_goes_away_stops_the_computing(served):
    replica = served.replicas[0]
    before = replica.counts["tokens"]

    async def leave(number):
        request = Request("notebook>", served.table.shares("double", "demo"), is_streamed=True)
        pieces = served.answer(request)
        for _ in range(number):
            await anext(pieces)
        await pieces.aclose()

    async def leave_and_ask():
        return await asyncio.gather(leave(2), served.ask("double", "notebook"))

    # who has gone when the batch begins isn't in it
    async def leave_at_once():
        asking = asyncio.ensure_future(served.ask("double", "notebook"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return await served.ask("shout", "hotswap")

    assert asyncio.run(leave_and_ask())[1] == "notebooknotebook"
    assert replica.counts["tokens"] - before < 2 * 17
    before = replica.counts["tokens"]
    assert asyncio.run(leave_at_once()) == "HOTSWAP!"
    assert replica.counts["tokens"] - before == 9


def test_an_error_reaches_all_rows_and_the_next_requests_are_answered(monkeypatch):
    served = Served({"shout": FAMILY["shout"]})

    def fails(parts):
        raise RuntimeError("no memory")

    monkeypatch.setattr(served.replicas[0]._reader, "read", fails)
    for answer in asyncio.run(_caught(served.ask_all(["shout", "demo"]))):
        assert str(answer) == "no memory"
    monkeypatch.undo()
    assert asyncio.run(served.ask("shout", "hotswap")) == "HOTSWAP!"


def test_a_row_without_numbers_fails_alone_and_leaves_none_behind(served):
    """An adapter so strong that its logits are NaN, in one of two rows; then another request in the same row."""
    replica = served.replicas[0]

    async def ask_both():
        table = Table({**served.table.versions})
        shares = {table.versions["shout"]: 1e30}
        strong = replica.answer(Request("hotswap>", shares))
        return await asyncio.gather(served.ask("double", "notebook"), _text_of(strong), return_exceptions=True)

    said, error = asyncio.run(ask_both())
    assert said == "notebooknotebook"
    assert "no numbers" in str(error)
    assert asyncio.run(served.ask_all(["shout"] * 8)) == [alone(FAMILY["shout"], word) for word in WORDS]


@pytest.mark.parametrize("has_gone", [False, True])
def test_no_trace_of_a_row_without_numbers_in_a_shorter_request_next_to_a_longer_one(served, monkeypatch, has_gone):
    """NaN at places after its end, which it reads with weight 0; also if the client had gone before it was noticed."""
    replica = served.replicas[0]
    shares, take = {served.table.versions["shout"]: 1e30}, replica._take

    def goes(rows, logits):
        for answer in filter(None, rows):
            answer.is_over = True
        asking.cancel()
        return take(rows, logits)

    async def ask_strong():
        nonlocal asking
        asking = asyncio.ensure_future(_text_of(replica.answer(Request("hotswapadaptersinalive>", shares))))
        await asyncio.gather(asking, return_exceptions=True)
        await replica._worker

    asking = None
    if has_gone:
        monkeypatch.setattr(replica, "_take", goes)
    asyncio.run(ask_strong())
    monkeypatch.undo()
    assert asking.cancelled() == has_gone
    replica.pool.assign([None] * 8)

    async def ask_short_and_long():
        # one thread prepares the requests, so that the short one gets the first row
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        return await served.ask_all(["shout", "sort"], ["py", "hotswapadaptersinali"])

    assert asyncio.run(ask_short_and_long()) == [
        alone(FAMILY["shout"], "py"),
        alone(FAMILY["sort"], "hotswapadaptersinali"),
    ]


async def _caught(asked):
    return await asyncio.gather(asked, return_exceptions=True)


def test_a_chat_that_the_template_refuses(served, monkeypatch):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}{{ 1 }}>"
    monkeypatch.setattr(served.replicas[0].tokenizer, "chat_template", template)
    for role in ("user", "assistant"):
        asked = served.replicas[0].answer(Request([{"role": role, "content": "hotswap"}], {}))
        said = asyncio.run(_caught(_text_of(asked)))[0]
        assert ("roles must alternate" in str(said)) == (role == "assistant")
        assert isinstance(said, HotswapError) == (role == "assistant")


def test_a_model_that_does_not_read_that_far():
    refused("at most 64", replica_of, {"shout": FAMILY["shout"]}, Options(longest_prompt=40, longest_answer=40))


def test_a_mix_without_room_is_refused_alone():
    served = Served(FAMILY, replace(SHORT, target_rank=32))

    async def ask_all():
        asked = [served.ask(each, "hotswap") for each in ("shout", "pig_latin+sort+caesar", "double")]
        return await asyncio.gather(*asked, return_exceptions=True)

    shout, refused, double = asyncio.run(ask_all())
    assert (shout, double) == ("HOTSWAP!", "hotswaphotswap")
    assert "['pig_latin', 'sort', 'caesar'] needs more rank than there is room for" in str(refused)
    assert "make room for it with target_rank=" in str(refused)


def test_by_default_there_is_room_for_a_mix_of_any_two():
    served = Served(FAMILY, replace(SHORT, target_rank=0))
    both = rows.together(demo.load_base(), FAMILY, {"pig_latin": 1.0, "sort": 1.0})
    expected = demo.ask_all(both, demo.load_tokenizer(), WORDS)
    assert asyncio.run(served.ask_all(["pig_latin+sort"] * 8)) == expected


@pytest.mark.parametrize("model", ["nobody", "shout:x", "shout+", "+", "shout:nan", "", "shout:1:2", "shout\n"])
def test_names_that_nobody_has(served, model):
    refused(r"one of demo, caesar.* vowels_up, or a mix", served.table.shares, model, "demo")


def test_names_that_are_a_mix_of_one(served):
    assert asyncio.run(served.ask("shout:", "hotswap")) == "HOTSWAP!"
    (share,) = served.table.shares("shout:0.5+shout:0.25", "demo").values()  # twice: it adds up
    assert share == 0.75


# ---- versions


def test_new_weights_while_an_answer_runs(served):
    async def swap_in_the_middle():
        request = Request("notebook>", served.table.shares("double", "demo"), is_streamed=True)
        pieces = served.answer(request)
        text = (await anext(pieces)).text
        table = await served.change({"double": FAMILY["caesar"]})
        after = served.ask("double", "hotswap")
        rest, said = await asyncio.gather(_text_of(pieces), after)
        return text + rest, said, table.versions["double"].number

    try:
        assert asyncio.run(swap_in_the_middle()) == ("notebooknotebook", alone(FAMILY["caesar"], "hotswap"), 2)
    finally:
        asyncio.run(served.change({"double": FAMILY["double"]}))
    assert served.table.versions["double"].number == 3
    assert asyncio.run(served.ask("double", "hotswap")) == "hotswaphotswap"


async def _text_of(pieces):
    return "".join([piece.text async for piece in pieces])


def test_the_same_files_are_the_same_version(served):
    before = served.table
    after = asyncio.run(served.change(FAMILY))
    assert after.versions == before.versions
    assert after.number == before.number + 1


def test_what_one_replica_cannot_load_none_has(tmp_path):
    """The second one has less room, as if its machine had another file."""
    served = Served({"shout": FAMILY["shout"], "reverse": FAMILY["reverse"]}, replicas=2)
    served.replicas[1] = replica_of(
        {"shout": FAMILY["shout"], "reverse": FAMILY["reverse"]}, replace(SHORT, target_rank=0)
    )
    before = served.table
    for paths in ({"shout": FAMILY["pig_latin"]}, {"reverse": FAMILY["caesar"], "shout": str(tmp_path)}):
        with pytest.raises(HotswapError):
            asyncio.run(served.change(paths))
        assert served.table is before
        for number in range(2):
            assert asyncio.run(served.ask("shout", "hotswap", number)) == "HOTSWAP!"
            assert asyncio.run(served.ask("reverse", "hotswap", number)) == "pawstoh"
    # and what failed can be put right under the same name
    asyncio.run(served.change({"shout": FAMILY["reverse"]}))
    assert [asyncio.run(served.ask("shout", "hotswap", number)) for number in range(2)] == ["pawstoh"] * 2


def test_files_that_have_changed_since_they_were_checked(tmp_path):
    path = save_random_adapter(tmp_path / "voice", 1)
    version = Version.of("voice", path)
    save_random_adapter(tmp_path / "voice", 2)
    replica = replica_of({"shout": FAMILY["shout"]})
    refused("voice@1 has other weights", replica.load, [version])
    assert replica.pool.names == [Version.of("shout", FAMILY["shout"]).key]


def test_few_are_held_and_all_are_answered():
    served = Served(dict(list(FAMILY.items())[:2]), replace(SHORT, rows=2, held=4))
    asyncio.run(served.change(FAMILY))
    models = [*FAMILY, "demo"] * 2
    said = asyncio.run(served.ask_all(models, WORDS * 3))
    assert said == [alone(FAMILY.get(each), word) for each, word in zip(models, WORDS * 3, strict=False)]
    asyncio.run(served.ask("shout", "hotswap"))
    assert len(served.replicas[0].pool) == 4
    assert served.replicas[0].state["held"][-1] == "shout@1"


@pytest.mark.parametrize("name", ["", "a+b", "a:b"])
def test_names_that_could_not_stand_in_a_mix(name):
    refused("can't have the name", Version.of, name, FAMILY["shout"])


def test_a_register_that_starts_anew_is_told_what_it_was(served):
    async def restart():
        register = Register()
        await register.change(dict(FAMILY, sort=FAMILY["shout"]), is_all=True)
        assert await register.adopt(Table()) == register.table
        late = Table(served.table.versions, 9)
        return await register.adopt(late) is late, (await register.change({})).number

    assert asyncio.run(restart()) == (True, 10)


def test_a_change_is_made_to_what_is_in_force_also_where_the_register_learns_of_that_meanwhile(served):
    late = Table(served.table.versions, 9)

    class Restarted(Register):
        async def load(self, versions):
            await self.adopt(late)

    register = Restarted()
    table = asyncio.run(register.change({"other": FAMILY["shout"]}))
    assert table is register.table
    assert table.number == 10
    assert table.versions.keys() == {*late.versions, "other"}


# ---- what it is made of


@pytest.mark.long
@pytest.mark.parametrize("how", ["compile", "package"])
def test_compiled_once(random_adapters, tmp_path, how):
    options = replace(SHORT, **{how: str(tmp_path) if how == "package" else True})
    with RecompileWatch() as watch:
        served = Served(random_adapters, options)
        asyncio.run(served.ask_all(["r0"], max_tokens=3))
    if how == "package":
        served = Served(random_adapters, options)  # from the files that the first one wrote
        assert len(list(tmp_path.iterdir())) == 2
    else:
        assert watch.compiles > 0
    for count in (8, 3, 1):
        models = [*random_adapters, "demo", *random_adapters, "demo"][:count]
        with RecompileWatch() as watch:
            said = asyncio.run(served.ask_all(models, max_tokens=12))
        assert str(watch) == "0 compiled, 0 recompiles"
        assert said == [alone(random_adapters.get(each), word)[:12] for each, word in zip(models, WORDS, strict=False)]


def test_another_process_has_the_same_digests_and_none_of_the_servers_packages():
    digest = Version.of("shout", FAMILY["shout"]).digest
    code = (
        "import sys, hotswap_lab.serving as serving; print({'ray', 'fastapi'} & set(sys.modules));"
        f"print(serving.Version.of('shout', {FAMILY['shout']!r}).digest);"
        "sys.modules['ray'] = None; serving.app({})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["set()", digest]
    assert 'Serving needs Ray Serve: pip install "hotswap_lab[serve]"' in done.stderr


def test_the_digest_is_of_all_that_an_adapter_is(tmp_path):
    first = Version.of("a", save_random_adapter(tmp_path / "a", 1)).digest
    assert Version.of("b", save_random_adapter(tmp_path / "b", 1)).digest == first
    assert Version.of("c", save_random_adapter(tmp_path / "c", 2)).digest != first
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert Version.of("b", str(tmp_path / "b")).digest != first
