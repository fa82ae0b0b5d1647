"""A replica in this process: each answer is what a fresh load of its adapter says, whatever its neighbours get."""

import asyncio
import subprocess
import sys
from dataclasses import replace

import pytest
from refusals import refused
from served import FAMILY, SHORT, WORDS, Served, alone, replica_of, save_random_adapter

from hotswap_lab import HotswapError, RecompileWatch, demo
from hotswap_lab.lessons import rows
from hotswap_lab.serving import Options, Register, Request, Table, Version

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


def test_whatever_goes_wrong_nobody_waits_for_ever(monkeypatch):
    served = Served({"shout": FAMILY["shout"]})
    model = served.replicas[0].pool.model

    def fails(**_):
        raise RuntimeError("no memory")

    for generate, text in ((fails, "no memory"), (lambda **_: None, "came to an end before its answers")):
        monkeypatch.setattr(model, "generate", generate, raising=False)
        for answer in asyncio.run(_caught(served.ask_all(["shout", "demo"]))):
            assert text in str(answer)
        monkeypatch.undo()
    assert asyncio.run(served.ask("shout", "hotswap")) == "HOTSWAP!"


async def _caught(asked):
    return await asyncio.gather(asked, return_exceptions=True)


def test_a_model_that_does_not_read_that_far():
    refused("at most 64", replica_of, {"shout": FAMILY["shout"]}, Options(longest_prompt=40, longest_answer=40))


def test_a_mix_without_room_is_refused_alone():
    served = Served(FAMILY, replace(SHORT, target_rank=0))

    async def ask_all():
        asked = [served.ask(each, "hotswap") for each in ("shout", "pig_latin+sort", "double")]
        return await asyncio.gather(*asked, return_exceptions=True)

    shout, refused, double = asyncio.run(ask_all())
    assert (shout, double) == ("HOTSWAP!", "hotswaphotswap")
    assert "more rank than there is room for" in str(refused)


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
def test_compiled_once(random_adapters):
    served = Served(random_adapters, replace(SHORT, compile=True))
    with RecompileWatch() as watch:
        asyncio.run(served.ask_all(["r0"], max_tokens=3))
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
