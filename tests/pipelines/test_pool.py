"""A pool of LoRA files for a pipeline: after each swap it is what a fresh pipeline is after ``load_lora_weights``."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from lengths import long
from oracle import untouched
from safetensors.torch import save_file
from test_pipeline import (
    KINDS,
    SD,
    assert_like_fresh,
    assert_same_latents,
    latents,
    lora,
    wrong_files,
)

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    PipelinePool,
    RecompileWatch,
    hotswap_adapter,
    in_use,
    loaded,
    read_pipeline_lora,
    set_strength,
    waiting_at_most,
)
from hotswap_lab.pipelines.lora_files import components_of

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*"),
]


def ten(kind=SD) -> dict[str, dict[str, torch.Tensor]]:
    """Ten files: three formats, several ranks; every third has nothing for the text encoders, and one only that."""
    text = [name for name in kind.components if name.startswith("text")]
    denoiser = {name: ends for name, ends in kind.components.items() if name not in text}
    formats = ["peft", "kohya", "diffusers"] if "unet" in kind.components else ["peft"]
    files = {}
    for number in range(9):
        components = denoiser if number % 3 == 2 else None
        options = dict(rank=1 + number % 5, seed=number, alpha=number + 1.0, components=components)
        files[f"style {number}"] = lora(kind, formats[number % len(formats)], **options)
    files["text"] = lora(kind, seed=9, rank=2, components={text[0]: ("q_proj",)})
    return files


def pool_of(files, kind=SD, **options):
    pipe = kind.loaded(next(iter(files.values())))
    return pipe, PipelinePool(pipe, "style", files, **options)


def test_a_component_that_was_replaced_is_refused():
    """The pool would swap in a module that no answer comes from. One that was freed is in no answer."""
    files = {"a": lora(SD, seed=1), "b": lora(SD, seed=2, rank=6)}
    pipe, pool = pool_of(files)
    pool.swap("a")
    before, pipe.unet = pipe.unet, copy.deepcopy(pipe.unet)
    for action in (lambda: pool.swap("b"), lambda: pool.using("b").__enter__(), pool.off):
        with pytest.raises(HotswapError, match=r"pipeline's unet is not the one"):
            action()
    pipe.unet = before
    pool.swap("b")
    assert_same_latents(pipe, SD.loaded(files["b"]))
    pipe.text_encoder, encoder = None, pipe.text_encoder
    pool.swap("a")
    pipe.text_encoder = encoder
    assert_same_latents(pipe, SD.loaded(files["a"]))


@pytest.mark.parametrize("kind", ["sd", long("sdxl"), long("flux")])
def test_ten_files_in_any_order(tmp_path, caplog, kind):
    kind = KINDS[kind]
    files = ten(kind)
    sources = {**files, "style 1": tmp_path / "1.safetensors", "style 2": read_pipeline_lora(kind(), files["style 2"])}
    save_file(files["style 1"], sources["style 1"])
    files["style 1"] = str(sources["style 1"])  # whose tensors are in another order
    caplog.set_level(logging.INFO)
    pipe = kind.loaded(files["style 0"])
    logging.getLogger("diffusers").addHandler(caplog.handler)
    pool = PipelinePool(pipe, "style", sources)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "No LoRA keys" not in caplog.text
    assert (pool.names, pool.active) == ([*files], "style 0")
    fresh = {name: kind.loaded(each) for name, each in files.items()}
    for name in random.Random(0).sample(pool.names * 2, 20):
        pool.swap(name)
        assert (pool.active, pool.strength) == (name, 1)
        assert_like_fresh(pipe, fresh[name], kind)
    assert {each.member for each in loaded(pool)} == {name}
    assert len(loaded(pool)) == len(kind.components)
    assert str(pool).count("AdapterPool: 10 adapters") == len(kind.components)
    assert name in pool
    assert "nobody" not in pool
    pipe.disable_lora()
    assert pool.active is None
    pipe.enable_lora()
    assert pool.active == name


@pytest.mark.long
def test_ten_files_compiled():
    files = ten()
    pipe, pool = pool_of(files)
    pipe.set_adapters(["style"])  # which makes weights trainable, so that it is done once before compiling
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    pipe.text_encoder.compile(backend="aot_eager")
    latents(pipe)
    with RecompileWatch(allow=0):
        for name in random.Random(1).sample(pool.names * 2, 20):
            pool.swap(name)
            assert_same_latents(pipe, SD.loaded(files[name]))
        pool.strength = 0.5
        fresh = SD.loaded(files[name])
        fresh.set_adapters(["style"], [0.5])
        assert_same_latents(pipe, fresh)
        pool.off()
        assert_same_latents(pipe, SD())


@pytest.mark.long
def test_strength_off_and_a_block():
    files = {name: each for name, each in ten().items() if name in ("style 2", "style 3")}
    pipe = SD.loaded(files["style 3"])
    pool = PipelinePool(pipe, "style", files)
    fresh = SD.loaded(files["style 3"])
    fresh.set_adapters(["style"], [0.5])
    pool.swap("style 3", strength=0.5)
    assert_same_latents(pipe, fresh)
    with pool.using("style 2"):
        assert pool.active == "style 2"
        assert_like_fresh(pipe, SD.loaded(files["style 2"]), SD)
        pool.strength = 0.25  # of the text encoder there is nothing to scale
        assert pool.strength == 0.25
    assert (pool.active, pool.strength) == ("style 3", 0.5)
    assert_same_latents(pipe, fresh)
    pool.off()
    assert (pool.active, pool.strength) == (None, 0)
    assert_same_latents(pipe, SD())
    pool.strength = 1
    assert_like_fresh(pipe, SD.loaded(files["style 3"]), SD)
    set_strength(pipe.unet, 0.5)
    assert pool.strength is None
    for model in components_of(pipe).values():  # of nothing, neither has anything to scale
        hotswap_adapter(model, Adapter(model.peft_config["style"], {}, "nothing"), "style")
    assert pool.strength == 1


def test_a_mix():
    files = {name: each for name, each in ten().items() if name in ("style 2", "style 3")}
    pipe = SD.loaded(files["style 3"])
    pool = PipelinePool(pipe, "style", files, target_rank=12)
    pool.swap({"style 3": 0.5, "style 2": 0.25})
    fresh = SD()
    for name in ("style 3", "style 2"):
        fresh.load_lora_weights(dict(files[name]), adapter_name=name.replace(" ", "_"))
    fresh.set_adapters(["style_3", "style_2"], [0.5, 0.25])
    assert_same_latents(pipe, fresh)


@pytest.mark.long
def test_update():
    files = ten()
    pipe, pool = pool_of(files)
    pool.swap("style 4")
    pool.update("style 3", files["style 8"])
    assert_like_fresh(pipe, SD.loaded(files["style 4"]), SD)
    pool.update("style 4", files["style 5"])  # which has nothing for the text encoder
    assert_like_fresh(pipe, SD.loaded(files["style 5"]), SD)
    pool.swap("style 3")
    assert_like_fresh(pipe, SD.loaded(files["style 8"]), SD)


@pytest.mark.long
def test_add_and_remove():
    files = {name: each for name, each in ten().items() if name in ("style 3", "style 4", "style 5")}
    pipe, pool = pool_of({"style 4": files.pop("style 4")})
    models = components_of(pipe).values()
    with untouched(*models):
        for name, file in files.items():
            pool.add(name, file)
    for name, file in files.items():
        pool.swap(name)
        assert_like_fresh(pipe, SD.loaded(file), SD)
    assert (pool.names, pool.version("style 4")) == (["style 4", "style 3", "style 5"], 1)
    refused = {
        "style 3. already": lambda: pool.add("style 3", files["style 5"]),
        "does not fit": lambda: pool.add("another", {**files["style 3"], next(iter(files["style 3"])): torch.ones(1)}),
        "among its `adapters`": lambda: pool.add("another", lora(SD, components={"unet": ("conv_in",)})),
        "in use": lambda: pool.remove("style 5"),
        "no adapter called": lambda: pool.remove("nobody"),
    }
    for match, action in refused.items():
        with untouched(*models), pytest.raises(HotswapError, match=match):
            action()
        assert pool.names == ["style 4", "style 3", "style 5"]
    pool.swap("style 3")
    pool.remove("style 5")
    pool.add("style 5", files["style 3"])  # a name that is free again
    pool.update("style 5", files["style 5"])
    assert (pool.names, pool.version("style 5")) == (["style 4", "style 3", "style 5"], 2)
    pool.swap("style 5")
    assert_like_fresh(pipe, SD.loaded(files["style 5"]), SD)


def test_an_adapter_in_use_in_one_component_stays_in_all():
    _, pool = pool_of({"a": lora(SD), "b": lora(SD, seed=2)})
    pool._pools["text_encoder"].swap("b")
    for action in (lambda: pool.remove("a"), lambda: pool.remove("b")):
        with pytest.raises(HotswapError, match="in use"):
            action()
    assert [each.names for each in pool._pools.values()] == [["a", "b"]] * 2
    pool._pools["unet"].remove("b")
    with pytest.raises(HotswapError, match="already"):
        pool.add("b", lora(SD, seed=3))  # which only one of them has
    assert [each.names for each in pool._pools.values()] == [["a"], ["a", "b"]]


@pytest.mark.long
def test_four_threads():
    files = ten()
    pipe, pool = pool_of(files)
    names = [*files]
    expected = {name: latents(SD.loaded(files[name])) for name in names}
    begin = Barrier(4)

    def answers(thread: int) -> list[bool]:
        begin.wait(60)
        found = []
        for number in range(5):
            with pool.using(name := names[(3 * thread + 2 * number) % 10]):
                found.append(
                    torch.allclose(latents(pipe), expected[name], rtol=0, atol=1e-9 * expected[name].abs().max())
                )
        return found

    with ThreadPoolExecutor(4) as workers:
        assert all(all(each) for each in workers.map(answers, range(4)))
    assert pool.active == "style 0"


def refused_in(worker: ThreadPoolExecutor, swap: Callable[[], object]) -> None:
    """A swap in another thread would have to wait."""

    def now() -> None:
        with waiting_at_most(0):
            swap()

    with pytest.raises(HotswapError, match="in use"):
        worker.submit(now).result(60)


def test_a_thread_in_one_component_holds_back_swaps_in_all():
    """They share one turn, so no thread sees a pipeline with only some components swapped."""
    pipe, pool = pool_of({name: each for name, each in ten().items() if name in ("style 0", "style 1")})
    adapter = read_pipeline_lora(pipe, lora(SD, seed=3, components={"unet": ("to_q",)}))["unet"]
    with ThreadPoolExecutor(1) as worker:
        for swap in (partial(pool.swap, "style 1"), partial(hotswap_adapter, pipe.unet, adapter, "style")):
            with in_use(pipe.text_encoder):
                refused_in(worker, swap)
            with pool.using("style 1"):
                refused_in(worker, swap)


@pytest.mark.long
def test_an_error_in_the_second_component_leaves_the_first_as_it_was():
    pipe, pool = pool_of({"a": lora(SD), "b": lora(SD, seed=2)})
    models = components_of(pipe)
    assert list(models) == ["unet", "text_encoder"]
    for parameter in pipe.text_encoder.parameters():
        parameter.data = parameter.data.clone()  # other code has moved it out of its room
    block = lambda: pool.using("b").__enter__()  # noqa: E731
    for action in (lambda: pool.swap("b"), lambda: pool.update("a", lora(SD, seed=3)), pool.off, block):
        with untouched(*models.values()), pytest.raises(HotswapError, match="no longer where the pool put it"):
            action()
    assert all(each.version("a") == 1 for each in pool._pools.values())
    assert pool.active is None


@pytest.mark.long
def test_a_damaged_file_among_ten_is_refused_whole(tmp_path, monkeypatch):
    files, pipe = ten(), SD.loaded(lora(SD))
    models, wrong = components_of(pipe).values(), wrong_files(tmp_path)
    for case in ("a shape", "damaged"):
        source, match = wrong[case]
        with untouched(*models), pytest.raises(HotswapError, match=match.removeprefix("text_encoder: ")):
            PipelinePool(pipe, "style", {**files, "tenth": source})
    fill, filled = AdapterPool._fill, []

    def fill_one(self, *arguments):
        if filled:
            raise MemoryError
        filled.append(fill(self, *arguments))

    monkeypatch.setattr(AdapterPool, "_fill", fill_one)
    with untouched(*models), pytest.raises(MemoryError):
        PipelinePool(pipe, "style", {"a": files["style 1"]})
    monkeypatch.undo()
    pool = PipelinePool(pipe, "style", {"a": files["style 1"]})
    with untouched(*models), pytest.raises(HotswapError, match="does not fit"):
        pool.update("a", wrong["a shape"][0])
    pool.swap("a")
    assert_like_fresh(pipe, SD.loaded(files["style 1"]), SD)


def test_a_refusal_is_told_once(caplog):
    files = {"a": lora(SD), "b": lora(SD, seed=2)}
    pipe, pool = pool_of(files)
    damaged = {**files["a"], next(iter(files["a"])): torch.ones(1)}
    with caplog.at_level(logging.INFO):
        pool.update("b", files["b"])  # it is in no model, so there is nothing to tell
    caplog.clear()
    for action in (
        lambda: pool.swap("nobody"),
        lambda: pool.update("a", damaged),
        lambda: PipelinePool(pipe, "style", {"a": damaged}),
    ):
        with pytest.raises(HotswapError):
            action()
    assert [each.event for each in caplog.records if each.name == "hotswap_lab"] == ["refusal"] * 3


@pytest.mark.long
def test_what_is_no_pipeline_with_an_adapter():
    files = ten()
    with pytest.raises(HotswapError, match="PipelinePool"):
        AdapterPool(SD.loaded(files["style 0"]), "style", files)
    with pytest.raises(HotswapError, match="not found"):
        PipelinePool(SD(), "style", files)
    with pytest.raises(HotswapError, match=r"without an adapter[\s\S]*together have tensors"):
        PipelinePool(SD.loaded(files["style 2"]), "style", files)
    with pytest.raises(HotswapError, match="LoRA can't be loaded into this object"):
        PipelinePool(SD().unet, "style", files)
    pipe = SD.loaded(files["style 0"])
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(HotswapError, match="before\\* compiling"):
        PipelinePool(pipe, "style", files)
    _, pool = pool_of(files)
    with untouched(*components_of(pool.pipe).values()), pytest.raises(HotswapError, match="no adapter called"):
        pool.swap("nobody")
