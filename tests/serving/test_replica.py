"""A replica in this process: each answer is what a fresh load of its adapter says, whatever its neighbours get."""

import asyncio
import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from lengths import TIMES, eventually, long
from models import call
from oracle import rounding
from partial import some_of
from peft import PeftModel
from refusals import refused
from row_truth import together
from served import FAMILY, SHORT, WORDS, Served, alone, fresh, little, logged, replica_of, save_random_adapter, text_of
from test_api import TEXT, sent

from hotswap_lab import HotswapError, RecompileWatch, demo, in_use
from hotswap_lab.serving import BusyError, Options, Register, Replica, Request, Table, Version
from hotswap_lab.serving.answers import Answer
from hotswap_lab.serving.api import _error, openai_api


@pytest.fixture(scope="module")
def served():
    return Served(FAMILY)


@pytest.fixture(scope="module")
def random_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return {f"r{n}": save_random_adapter(folder / f"r{n}", n, rank=2 + 2 * n) for n in range(3)}


def watched_reads(served, monkeypatch):
    """How many tokens of each row the model reads, at each call."""
    reader = served.replicas[0]._reader
    widths, read = [], reader.read
    monkeypatch.setattr(reader, "read", lambda parts: widths.append([len(part) for part in parts]) or read(parts))
    return widths


def in_order():
    """One thread prepares the requests, so that they reach the replica in the order of the calls."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


# ---- rows


@pytest.mark.long
def test_more_requests_than_rows_are_several_batches(served):
    before = served.replicas[0].counts["requests"]
    assert len(set(served.assert_right([*FAMILY, "demo"] * 3, WORDS * 4))) > 20
    assert served.replicas[0].counts["requests"] == before + 27


@pytest.mark.long
@pytest.mark.parametrize("count", [8, 1])
def test_adapters_with_random_weights(random_adapters, monkeypatch, count):
    served = Served(random_adapters, replace(SHORT, rows=count))
    widths = watched_reads(served, monkeypatch)
    served.assert_right([*random_adapters, "demo", *random_adapters], most=12)
    assert max(sum(map(bool, each)) for each in widths) <= count
    assert len({alone(path, "hotswap")[:12] for path in [*random_adapters.values(), None]}) == 4


@pytest.mark.parametrize("weights", [long(dict(shout=0.5, reverse=0.5)), dict(pig_latin=1.0, sort=1.0)])
def test_a_mix_is_what_peft_makes_of_both(weights):
    """By default there is room for any two."""
    served = Served(FAMILY, replace(SHORT, target_rank=0))
    expected = demo.ask_all(together(FAMILY, weights), demo.load_tokenizer(), WORDS)
    assert asyncio.run(served.ask_all(["+".join(f"{name}:{each}" for name, each in weights.items())] * 8)) == expected
    assert expected != [alone(FAMILY[next(iter(weights))], word) for word in WORDS]


def test_a_short_answer_does_not_wait_for_a_long_one(served):
    """Two rows' worth of requests: the last one starts while the first ones are still being answered."""
    order = []

    async def ask(name, word, **how):
        await served.ask(name, word, **how)
        order.append(word)

    async def ask_all():
        in_order()
        long = [ask("double", "notebook", max_tokens=17) for _ in range(7)]
        short = [ask("shout", word, max_tokens=2) for word in ("python", "tensor", "voice")]
        await asyncio.gather(*long, *short)

    asyncio.run(ask_all())
    assert order[:3] == ["python", "tensor", "voice"]


@pytest.mark.long
def test_a_long_prompt_is_read_between_the_tokens_of_others(served, monkeypatch):
    monkeypatch.setattr(served.replicas[0]._reader, "chunk", 4)
    widths = watched_reads(served, monkeypatch)
    served.assert_right(["double", "sort"], ["notebook", "hotswapadaptersinali"])
    # one is at its answer, the other one still at its prompt
    assert [1, 4] in [sorted(each)[-2:] for each in widths]


# ---- how an answer is chosen


def test_streamed_pieces_are_the_answer(served):
    whole = asyncio.run(served.pieces("double", "notebook"))
    streamed = asyncio.run(served.pieces("double", "notebook", is_streamed=True))
    assert [piece.text for piece in whole] == ["notebooknotebook"]
    assert [piece.text for piece in streamed] == [*"notebooknotebook", ""]
    assert [piece.finish for piece in streamed] == [None] * 16 + ["stop"]
    assert (whole[-1].prompt_tokens, whole[-1].completion_tokens) == (9, 17)
    (cut,) = asyncio.run(served.pieces("double", "notebook", max_tokens=4))
    assert (cut.text, cut.finish) == ("note", "length")


#: three of them end with the same letter, of which the first in the text is not the first here; one is not in the text
STOPS = [("n",), *some_of(("ook", "book", "k", "kno", "kx"))]


@pytest.mark.long
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_an_answer_ends_before_a_stop(served, is_streamed, stop):
    whole = "notebooknotebook"
    text = whole[: min([whole.find(each) for each in stop if each in whole], default=len(whole))]
    pieces = asyncio.run(served.pieces("double", "notebook", stop=stop, is_streamed=is_streamed))
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish) == (text, "stop")
    assert is_streamed or len(pieces) == 1


HOT = dict(temperature=30.0, max_tokens=12)


def test_the_same_seed_is_the_same_answer_in_any_batch(served):
    """And a row's temperature is its own."""
    hot = dict(temperature=6.0, max_tokens=12)

    async def among_others(seed):
        heats = [dict(temperature=0), hot, dict(temperature=30), hot, hot]
        others = [served.ask(name, "kernel", **heat) for name, heat in zip(FAMILY, heats, strict=False)]
        return await asyncio.gather(served.ask("demo", "hotswap", seed=seed, **hot), *others)

    expected = [asyncio.run(served.ask("demo", "hotswap", seed=seed, **hot)) for seed in range(2)]
    assert len(set(expected)) == 2
    several = [asyncio.run(among_others(seed)) for seed in range(2)]
    assert [each[0] for each in several] == expected
    assert {each[1] for each in several} == {alone(next(iter(FAMILY.values())), "kernel")}
    assert len({each[2] for each in several}) > 1
    assert asyncio.run(served.ask("shout", "hotswap", seed=0, top_p=0.99, **HOT)) != "HOTSWAP!"


@pytest.mark.parametrize(
    ("model", "how", "said"),
    [
        ("shout", dict(temperature=1.0, top_p=0), "HOTSWAP!"),
        ("shout", dict(temperature=1.0, top_p=1e-46), "HOTSWAP!"),  # which is 0 in float32
        ("shout", dict(temperature=1e-40), "HOTSWAP!"),
        ("shout", dict(temperature=1e-40, top_p=1e-46, logprobs=10**6), "HOTSWAP!"),
        *(("shout", dict(HOT, seed=seed, top_p=1e-6), "HOTSWAP!") for seed in range(3)),
        ("shout", dict(logprobs=-1), "range"),
        ("shout", dict(stop=("!", None)), "None"),
        *(("shout", dict(max_tokens=most), "an answer of 1 to 24") for most in (0, -1, 25)),
        ("too strong", {}, "NaN or infinite logits"),
        ("pig_latin+sort+caesar", {}, r"\['pig_latin', 'sort', 'caesar'\] needs more rank(.|\n)*with target_rank="),
        ("shout", dict(prompt=[{"role": "user", "content": "hotswap"}]), "HOTSWAP!"),
        ("shout", dict(prompt=[{"role": "tool", "content": "hotswap"}]), "roles must alternate"),
    ],
)
def test_what_fails_for_a_row_fails_that_row_alone(served, model, how, said):
    async def ask_both():
        odd = Request(**{"prompt": "hotswap>", "shares": shares, **how})
        asked = served.ask("double", "notebook"), text_of(served.answer(odd)), served.ask("sort", "python")
        return await asyncio.gather(*asked, return_exceptions=True)

    strong = model == "too strong"  # stronger than anybody may ask for, so that its logits are NaN
    shares = {served.table.versions["shout"]: 1e30} if strong else served.table.shares(model, "demo")
    first, odd, last = asyncio.run(ask_both())
    assert (first, last) == ("notebooknotebook", "hnopty")
    assert odd == said or (isinstance(odd, Exception) and re.search(said, str(odd)))
    assert isinstance(odd, HotswapError) == (said not in ("HOTSWAP!", "range", "None"))


@pytest.mark.parametrize(("given", "expected"), [(0, [0]), ([7, 0], [7, 0]), (None, None)], ids=str)
def test_the_token_with_the_number_0_may_be_the_last_one(given, expected):
    model, tokenizer = demo.load("shout")
    model.generation_config.eos_token_id = given
    replica = Replica(model, tokenizer, [Version.of("shout", FAMILY["shout"])], SHORT)
    assert replica.ends == (expected or [tokenizer.eos_token_id])


def test_a_stream_is_the_whole_answer_where_a_tokenizer_cleans_up_spaces(served, monkeypatch):
    """The tokenizer of BERT and its like writes "we don't." for "we do n't .": letters that were sent would go."""
    letters = demo.load_tokenizer().get_vocab()
    names = dict(zip("notebk", ["we", "n't", ".", "'", "do", "'s"], strict=True))
    model = tokenizers.models.WordLevel({names.get(each, each): number for each, number in letters.items()}, "?")
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    words.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    written = " ".join(names[each] for each in "notebook")
    assert words.decode(words(written)["input_ids"]) == "wen't.'don'tn't's"
    monkeypatch.setattr(served.replicas[0], "tokenizer", words)
    for is_streamed in (False, True):
        assert asyncio.run(served.ask("double", f"{written} ", is_streamed=is_streamed)) == f"{written} {written}"


def test_log_probabilities_are_those_of_a_fresh_load(served):
    (piece,) = asyncio.run(served.pieces("shout", "hotswap", logprobs=2))
    ids = demo.load_tokenizer()("hotswap>HOTSWAP!", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = fresh(FAMILY["shout"])(input_ids=ids).logits[0].log_softmax(-1)[7:]
    assert [each.name for each in piece.tokens] == [*"HOTSWAP!", ""]
    for each, row, token in zip(piece.tokens, expected, ids[0, 8:].tolist(), strict=False):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert (each.top[0].name, each.top[0].logprob) == (each.name, each.logprob)
        assert each.top[1].logprob == pytest.approx(float(row.topk(2).values[1]), abs=1e-3)
    streamed = asyncio.run(served.pieces("shout", "hotswap", logprobs=0, is_streamed=True))
    assert [token.name for each in streamed for token in each.tokens] == [*"HOTSWAP!", ""]


def test_requests_whose_clients_have_gone_do_not_wait(monkeypatch):
    options = replace(SHORT, rows=1, queue=2)
    monkeypatch.setattr("hotswap_lab.serving.replica.GATHERING", 0.01)
    replica = replica_of(FAMILY, options)
    entered, leave = threading.Event(), threading.Event()

    def compute():  # what has the only row takes as long as the others wait
        with in_use(replica.pool.model):
            entered.set()
            leave.wait(60)

    async def ask():
        return await text_of(replica.answer(Request(prompt="hotswap>", max_tokens=9)))

    async def waiting(count):
        assert await asyncio.to_thread(eventually, lambda: replica.state["waiting"] == count)

    async def come_and_go():
        assert await asyncio.to_thread(entered.wait, 60)
        first = asyncio.create_task(ask())
        assert await asyncio.to_thread(eventually, lambda: replica._worker and not replica._waiting)
        gone = [asyncio.create_task(ask()) for _ in range(2)]
        await waiting(2)
        with pytest.raises(BusyError):
            await ask()
        for each in gone:
            each.cancel()
        await waiting(0)
        more = [asyncio.create_task(ask()) for _ in range(2)]
        await waiting(2)
        leave.set()
        return await asyncio.gather(first, *more)

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    assert asyncio.run(come_and_go()) == ["hotswap"] * 3
    thread.join(60)


# ---- models of one's own


#: other angles for all rows, from that length on
LONG_ROPE = dict(
    rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0, 2.0, 9.0, 6.0])
)


@pytest.mark.parametrize(("prompt", "answer"), [(1, 1), (2, 1)])
def test_the_smallest_limits_are_read_in_rows(prompt, answer):
    with logged() as messages:
        replica = replica_of({"shout": FAMILY["shout"]}, Options(longest_prompt=prompt, longest_answer=answer))
    assert replica._reader is not None
    assert not messages


MODELS = [
    ("Llama", {}, True),
    long("Gemma3Text", dict(head_dim=8, sliding_window=128), True),
    long("Mistral", dict(sliding_window=16), False),
    long("Phi3", LONG_ROPE | dict(original_max_position_embeddings=96), True),
    long("Rwkv", {}, False),  # which would read the padding of a batch
    long("Qwen3", dict(head_dim=8), True),
    long("Mistral", dict(sliding_window=None), True),
    long("Gemma", dict(head_dim=8), True),
    long("Llama4Text", dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=16), False),
    long("GPTNeo", dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16), False),
    long("Phi3", LONG_ROPE | dict(original_max_position_embeddings=32), False),
    long("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)), True),
    long("Mamba", dict(state_size=8), False),
]


@pytest.mark.parametrize(("kind", "more", "in_rows"), MODELS)
def test_models_of_ones_own(tmp_path, kind, more, in_rows):
    with logged() as messages:
        load, versions, replica = little(kind, tmp_path, **more)
    assert (replica._reader is not None) == in_rows
    assert any("it answers one request at a time" in each for each in messages) == (not in_rows)
    assert replica.options.longest_prompt + replica.options.longest_answer == 96
    shares = [{versions[0]: 1.0}, {}, {versions[1]: 1.0}] * 4
    words = ["notebook" * 6, *WORDS]  # some models compute short prompts in another way next to a long one

    async def answer_to(word, share):
        asked = Request(prompt=f"{word}>", shares=share, max_tokens=10, logprobs=0)
        pieces = [piece async for piece in replica.answer(asked)]
        return "".join(piece.text for piece in pieces), [token.logprob for piece in pieces for token in piece.tokens]

    async def ask_all():
        return await asyncio.gather(*map(answer_to, words, shares))

    said = asyncio.run(ask_all())
    for word, share, (text, logprobs) in zip(words, shares, said, strict=False):
        model = load()
        model = PeftModel.from_pretrained(model, next(iter(share)).path) if share else model
        ids, expected = torch.tensor([replica.tokenizer(f"{word}>")["input_ids"]]), []
        off = max(1e-5, 2 * rounding(model, dict(input_ids=ids)) * float(call(model, dict(input_ids=ids)).abs().max()))
        while len(expected) < 10 and int(ids[0, -1]) not in replica.ends:
            with torch.no_grad():
                highest, token = model(input_ids=ids).logits[:, -1:].log_softmax(-1).max(-1)
            ids = torch.cat([ids, token], 1)
            expected.append(float(highest))
        assert text == replica.tokenizer.decode(ids[0, len(word) + 1 :], skip_special_tokens=True)
        assert logprobs == pytest.approx(expected, abs=off)
    assert len({text for text, _ in said}) > 3
    if not in_rows:
        model = PeftModel.from_pretrained(load(), versions[0].path).eval()
        with torch.no_grad():
            before = model(input_ids=ids[:, :5]).logits  # of one row
            with pytest.raises(HotswapError, match="can't be compiled for rows"):
                Replica(model, replica.tokenizer, versions, Options(compile=True))
            assert torch.allclose(model(input_ids=ids[:, :5]).logits, before, atol=1e-5)


def test_a_model_that_does_not_read_that_far():
    refused("at most 64", replica_of, {"shout": FAMILY["shout"]}, Options(longest_prompt=40, longest_answer=40))


# ---- clients that go away, and errors


def test_who_goes_away_stops_the_computing(served):
    counts = served.replicas[0].counts

    async def leave_and_ask():
        pieces = served.answer(
            Request(prompt="notebook>", shares=served.table.shares("double", "demo"), is_streamed=True)
        )
        asking = asyncio.ensure_future(served.ask("double", "notebook"))
        for _ in range(2):
            await anext(pieces)
        await pieces.aclose()
        return await asking

    async def leave_at_once():
        """Before the batch begins, so that this request isn't in it."""
        asking = asyncio.ensure_future(served.ask("double", "notebook"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return await served.ask("shout", "hotswap")

    before = counts["tokens"]
    assert asyncio.run(leave_and_ask()) == "notebooknotebook"
    assert counts["tokens"] - before < 2 * 17
    before = counts["tokens"]
    assert asyncio.run(leave_at_once()) == "HOTSWAP!"
    assert counts["tokens"] - before == 9


def test_an_error_reaches_all_rows_and_the_next_requests_are_answered(monkeypatch):
    served = Served({"shout": FAMILY["shout"]})

    def fails(parts):
        raise RuntimeError("no memory")

    async def ask_both():
        return await asyncio.gather(
            *(served.ask(each, "hotswap") for each in ("shout", "demo")), return_exceptions=True
        )

    monkeypatch.setattr(served.replicas[0]._reader, "read", fails)
    assert [str(error) for error in asyncio.run(ask_both())] == ["no memory"] * 2
    monkeypatch.undo()
    served.assert_right(["shout"])


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
        asking = asyncio.ensure_future(
            text_of(replica.answer(Request(prompt="hotswapadaptersinalive>", shares=shares)))
        )
        await asyncio.gather(asking, return_exceptions=True)
        await replica._worker

    async def ask_short_and_long():
        in_order()  # so that the short one gets the first row
        return await served.ask_all(["shout", "sort"], words)

    asking, words = None, ["py", "hotswapadaptersinali"]
    if has_gone:
        monkeypatch.setattr(replica, "_take", goes)
    asyncio.run(ask_strong())
    monkeypatch.undo()
    assert asking.cancelled() == has_gone
    replica.pool.assign([None] * 8)
    assert asyncio.run(ask_short_and_long()) == [alone(FAMILY["shout"], words[0]), alone(FAMILY["sort"], words[1])]


# ---- versions


def test_new_weights_while_an_answer_runs(served):
    async def swap_in_the_middle():
        pieces = served.answer(
            Request(prompt="notebook>", shares=served.table.shares("double", "demo"), is_streamed=True)
        )
        text = (await anext(pieces)).text
        table = await served.change({"double": FAMILY["caesar"]})
        rest, said = await asyncio.gather(text_of(pieces), served.ask("double", "hotswap"))
        return text + rest, said, table.versions["double"].number

    try:
        assert asyncio.run(swap_in_the_middle()) == ("notebooknotebook", alone(FAMILY["caesar"], "hotswap"), 2)
    finally:
        asyncio.run(served.change({"double": FAMILY["double"]}))
    assert served.table.versions["double"].number == 3
    served.assert_right(["double"])


@pytest.mark.long
def test_what_one_replica_cannot_load_none_has(tmp_path):
    """The second one has less room, as if its machine had another file."""
    paths = {name: FAMILY[name] for name in ("shout", "reverse")}
    served = Served(paths, replicas=2)
    served.replicas[1] = replica_of(paths, replace(SHORT, target_rank=0))

    def said(name):
        return [asyncio.run(served.ask(name, "hotswap", number)) for number in range(2)]

    before = served.table
    for changes in ({"shout": FAMILY["pig_latin"]}, {"reverse": FAMILY["caesar"], "shout": str(tmp_path)}):
        with pytest.raises(HotswapError):
            asyncio.run(served.change(changes))
        assert served.table is before
        assert (said("shout"), said("reverse")) == (["HOTSWAP!"] * 2, ["pawstoh"] * 2)
    # and what failed can be put right under the same name
    asyncio.run(served.change({"shout": FAMILY["reverse"]}))
    assert said("shout") == ["pawstoh"] * 2


def test_advice_is_what_a_server_can_follow(tmp_path):
    folder = shutil.copytree(FAMILY["shout"], tmp_path / "late")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(torch.nan)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    _, told = _error(refused("NaN", Version.of, "late", folder))
    assert "next:     get an undamaged copy" in told["error"]["message"]
    assert "Adapter.load" not in told["error"]["message"]


def test_layers_that_no_adapter_had_at_the_start():
    replica = replica_of({"caesar": FAMILY["caesar"]})
    error = refused("the old one lacks", replica.load, [Version.of("late", FAMILY["pig_latin"])])
    assert error.refusals[0].next_step.startswith("start the server with it, or layers=all-linear")
    many = _error(HotswapError(*error.refusals * 5))[1]["error"]["message"]
    assert many.endswith("... and 4 more")  # a client has nothing else to look into
    assert "@" not in str(error)


@pytest.mark.parametrize("layers", [long("all-linear"), "q_proj,k_proj,v_proj,o_proj", "nowhere"])
def test_layers_that_are_reserved(layers):
    """An adapter on them comes live, and answers as a fresh load does, next to others and to the base."""
    if layers == "nowhere":
        refused("has no layer in this model", Served, {"caesar": FAMILY["caesar"]}, replace(SHORT, layers=layers))
        return
    served = Served({"caesar": FAMILY["caesar"]}, replace(SHORT, layers=layers))
    asyncio.run(served.change({"late": FAMILY["pig_latin"]}))
    assert served.assert_right(["late", "caesar", "demo"]) == ["otswaphay", "dgdswhu", "notebook"]
    # what it costs: the numbers of the rows, and of the one adapter that the other has in memory, too
    pools = [served.replicas[0].pool, replica_of({"caesar": FAMILY["caesar"]}).pool]
    rows, adapters = zip(*[(each._room.bands[0].memory.untyped_storage(), each.nbytes) for each in pools], strict=True)
    shapes = [each.module.base_layer.weight.shape for each in pools[0]._room.slot.layers if "attn" in each.path]
    numbers = 4 * SHORT.target_rank * sum(map(sum, shapes))
    assert rows[0].nbytes() - rows[1].nbytes() == SHORT.rows * numbers
    assert adapters[0] / 2 - adapters[1] == pytest.approx(numbers, rel=0.01)


def test_what_a_file_says_is_escaped_in_the_log(tmp_path):
    path = save_random_adapter(tmp_path / "voice\x1b[31m\n", 1)
    replica, voice = replica_of({"shout": FAMILY["shout"]}), Version.of("voice", path)
    config = Path(path, "adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "other"}))
    with logged() as messages:
        request = Request(prompt="hotswap>", shares={voice: 1.0})
        refused("can't read", lambda: asyncio.run(text_of(replica.answer(request))))
    assert len(messages) == 2  # because it is asked twice
    for message in messages:
        assert r"voice\x1b[31m\n" in message
        assert all(each.isprintable() for each in message.splitlines())


def test_files_that_have_changed_since_they_were_checked(tmp_path):
    path = save_random_adapter(tmp_path / "voice", 1)
    version = Version.of("voice", path)
    save_random_adapter(tmp_path / "voice", 2)
    replica = replica_of({"shout": FAMILY["shout"]})
    refused("voice@1 has other weights", replica.load, [version])
    assert replica.pool.names == [Version.of("shout", FAMILY["shout"]).key]


def test_files_that_are_gone_are_the_servers_trouble(tmp_path):
    paths = {"shout": FAMILY["shout"], "voice": save_random_adapter(tmp_path / "voice", 1)}
    served = Served(paths)
    replica = served.replicas[0]
    replica.pool.remove(served.table.versions["voice"].key)
    del replica._held[served.table.versions["voice"].key]
    (tmp_path / "voice" / "adapter_config.json").unlink()
    with logged() as messages:
        told = sent(openai_api(served, "demo"), TEXT, {"model": "voice", "prompt": "hotswap>"})
    assert told.status_code == 500
    assert "can't read this adapter any more" in told.text
    assert str(tmp_path) not in told.text
    assert str(tmp_path) in "".join(messages)
    assert served.assert_right(["shout"]) == ["HOTSWAP!"]


@pytest.mark.long
def test_a_version_stays_in_memory_while_an_accepted_request_needs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hotswap_lab.serving.replica.GATHERING", 0.5)  # the rows are given after the files are gone
    voice, *others = [save_random_adapter(tmp_path / f"voice{n}", n) for n in range(6)]
    expected = alone(voice, "hotswap")
    served = Served({"voice": voice}, replace(SHORT, rows=2, held=4))

    async def run():
        asking = asyncio.ensure_future(served.ask("voice", "hotswap"))
        assert await asyncio.to_thread(eventually, lambda: served.replicas[0].state["waiting"])
        await served.change({**{f"other{n}": path for n, path in enumerate(others)}, "voice": None})
        shutil.rmtree(voice)
        return await asking

    assert asyncio.run(run()) == expected[:24]
    assert not served.replicas[0]._wanted
    asyncio.run(served.load([*served.table.versions.values()][:1]))
    assert len(served.replicas[0].pool) == 4


@pytest.mark.long
def test_warm_once_and_the_first_answers_need_no_more_calls_than_others(monkeypatch):
    monkeypatch.setattr("hotswap_lab.serving.replica.GATHERING", 0.3)  # till all have come
    replica, calls = replica_of(dict(list(FAMILY.items())[:2])), []
    replica.pool.model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    take = Answer.take
    # the thread that computes goes on late, after its piece has been received
    monkeypatch.setattr(Answer, "take", lambda *given: (take(*given), time.sleep(0.05))[0])

    async def ask(shares):
        return [piece async for piece in replica.answer(Request(prompt="hotswap>", shares=shares, max_tokens=3))]

    async def count():
        before = len(calls)
        versions = [*replica._held.values()]
        await asyncio.gather(ask({versions[0]: 1.0}), ask({versions[1]: 1.0}), ask({}))
        return len(calls) - before

    async def run():
        await replica.warm()
        await asyncio.sleep(0.1)
        assert replica.state["requests"] == replica.state["tokens"] == 0
        return await count(), await count()

    first, second = asyncio.run(run())
    assert (first, second) == (3, 3)
    assert len(calls) > 8, "a proof of the rows"


def test_a_damaged_adapter_keeps_no_server_from_its_start(tmp_path):
    bad = save_random_adapter(tmp_path / "bad", 1)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key: torch.full_like(each, 1e30) for key, each in tensors.items()}, file)
    served = Served({"shout": FAMILY["shout"], "bad": bad})
    asyncio.run(served.replicas[0].warm())
    assert served.assert_right(["shout"]) == ["HOTSWAP!"]
    with pytest.raises(HotswapError, match="NaN or infinite"):
        asyncio.run(served.ask("bad", "hotswap"))


@pytest.mark.long
def test_few_are_held_and_all_are_answered():
    served = Served(dict(list(FAMILY.items())[:2]), replace(SHORT, rows=2, held=4))
    asyncio.run(served.change(FAMILY))
    served.assert_right([*FAMILY, "demo"] * 2, WORDS * 3)
    for _ in range(2):  # both rows have it, then what they had may go
        served.assert_right(["shout"] * 2)
    assert len(served.replicas[0].pool) == 4
    assert served.replicas[0].state["held"][-1] == "shout@1"


def test_a_register_that_starts_anew_is_told_what_it_was_and_no_number_comes_twice():
    async def restart():
        register, anew = Register(), Register()
        await register.change({"other": FAMILY["sort"]})
        for path in (FAMILY["sort"], FAMILY["shout"], FAMILY["shout"]):  # the same files are the same version
            before = await register.change({"sort": path}, is_all=True)
        assert await register.adopt(Table()) == before
        await anew.change({"sort": FAMILY["reverse"]})
        assert await anew.adopt(before) is before
        await anew.change({"sort": None})
        return before, await anew.change({"sort": FAMILY["reverse"]})

    before, after = asyncio.run(restart())
    assert [[*map(str, each.versions.values())] for each in (before, after)] == [["sort@2"], ["sort@3"]]
    assert after.number == before.number + 2


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


@pytest.mark.long
@pytest.mark.parametrize("steps", [4000 * TIMES])
def test_a_policy_that_learns_leaves_memory_as_it_was(steps, tmp_path, monkeypatch):
    """At each step it gets new weights, and one more adapter comes and goes. ``TIMES=10`` makes 40,000 steps."""
    monkeypatch.setattr("hotswap_lab.serving.table.MOST_REMEMBERED", 50)
    path = save_random_adapter(tmp_path / "policy", 1)
    served = Served({"policy": path}, replace(SHORT, rows=2))
    weights = safetensors.torch.load_file(f"{path}/adapter_model.safetensors")
    numbers = array("l")  # which takes no block of its own for each number

    async def run(first, end):
        for step in range(first, end):
            next(iter(weights.values())).view(-1)[0] = step
            safetensors.torch.save_file(weights, f"{path}/adapter_model.safetensors", {"format": "pt"})
            table = await served.change({"policy": path, f"step-{step}": path})
            numbers.append(table.versions[f"step-{step}"].number)
            await served.change({f"step-{step}": None})
        return table.versions["policy"].number

    def used():
        """Python's blocks of memory, tensors, their bytes, and the process' pages, in bytes."""
        gc.collect()
        # of others, such as a compiler's, the memory can't be asked for
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        status = Path("/proc/self/status").read_text() if sys.platform == "linux" else "RssAnon: 0"
        pages = (
            int(re.findall(r"RssAnon:\s*(\d+)", status)[0]) * 1024
        )  # the system takes and gives those of files at will
        return sys.getallocatedblocks(), len(tensors), sum(storages.values()), pages

    asyncio.run(run(0, 60))
    before = used()
    assert asyncio.run(run(60, steps)) == steps + 1
    blocks, tensors, size, pages = (now - then for now, then in zip(used(), before, strict=True))
    assert blocks < 2000
    assert (tensors, size) == (0, 0)
    assert pages < 2e8
    # a name that comes again doesn't have the number that it had, although it is forgotten
    assert len(served.table.highest) <= 52
    for step in (0, 59):
        versions = asyncio.run(served.change({f"step-{step}": path})).versions
        assert versions[f"step-{step}"].number > numbers[step]


# ---- what it is made of


@pytest.mark.long
@pytest.mark.parametrize("how", ["compile", "package"])
def test_compiled_once(random_adapters, tmp_path, how):
    options = replace(SHORT, **{how: str(tmp_path) if how == "package" else True})
    with RecompileWatch() as watch:
        served = Served(random_adapters, options)
        served.assert_right(["r0"], most=3)
    if how == "package":
        served = Served(random_adapters, options)  # from the files that the first one wrote
        assert len(list(tmp_path.iterdir())) == 2
    else:
        assert watch.compiles > 0
    for count in (8, 3, 1):
        with RecompileWatch() as watch:
            served.assert_right([*random_adapters, "demo", *random_adapters, "demo"][:count], most=12)
        assert (watch.compiles, watch.recompiles) == (0, 0)
        assert watch.runs or how == "package"  # a file of compiled code is not torch.compile's


@pytest.mark.long
def test_another_process_has_the_same_digests_and_none_of_the_servers_packages():
    digest = Version.of("shout", FAMILY["shout"]).digest
    code = (
        "import sys, hotswap_lab.serving as serving; print({'ray', 'fastapi'} & set(sys.modules));"
        f"print(serving.Version.of('shout', {FAMILY['shout']!r}).digest);"
        "sys.modules['ray'] = None; serving.app({})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["set()", digest]
    assert 'Replicas need Ray Serve: pip install "hotswap_lab[ray]"' in done.stderr


def test_the_digest_is_of_all_that_an_adapter_is(tmp_path):
    first, same, other = (save_random_adapter(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    digest = Version.of("a", first).digest
    assert (Version.of("b", same).digest == digest, Version.of("c", other).digest == digest) == (True, False)
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert Version.of("b", same).digest != digest
