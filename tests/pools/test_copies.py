"""A batch of more rows than are assigned: each row has its own adapter where the order is known, else it is refused."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from lengths import long
from models import KINDS, Kind, save_random_adapter
from peft import PeftModel
from refusals import refused
from torch import nn
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hotswap_lab import AdapterPool, HotswapError, compat
from hotswap_lab.pools.copies import ONCE, Copies

SIZE = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]
T5 = Kind(
    lambda: T5ForConditionalGeneration(T5Config(vocab_size=40, **SIZE, decoder_start_token_id=0, eos_token_id=39)),
    lambda: None,
    ("q", "v", "o", "wi"),
)
ROWS = ["a", None, "b"]
LORA = {"a": dict(r=4, lora_alpha=6), "b": dict(r=6, lora_alpha=5, use_rslora=True)}
TILE, INTERLEAVE = dict(copies=2, order="tile"), dict(copies=2, order="interleave")


def family(kind, folder):
    return {name: save_random_adapter(kind, folder / name, seed=n, **LORA[name]) for n, name in enumerate(LORA)}


def loaded(kind, folders, name):
    """A fresh load in float64, whose base is made in float64 before."""
    base = kind.base().double()
    return base.eval() if name is None else PeftModel.from_pretrained(base, folders[name]).eval()


def pool_for(kind, folders, rows=3):
    return AdapterPool(loaded(kind, folders, "a"), adapters=folders, rows=rows, progress=False)


@pytest.fixture(scope="module", params=[LLAMA, T5], ids=["llama", "t5"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(kind, tmp_path_factory):
    return family(kind, tmp_path_factory.mktemp("family"))


def ids(rows, tokens=5):
    return torch.randint(3, 30, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def inputs_of(kind, rows):
    return dict(input_ids=rows) | (dict(decoder_input_ids=rows.flip(1)) if kind is T5 else {})


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


# ---- a batch that the caller has made


@pytest.mark.parametrize("compiled", [False, long(True)], ids=["eager", "compiled"])
def test_chosen_and_rejected_answers(kind, folders, compiled, fresh_compiler):
    """In each order, by its name; and one row at a time, as fresh loads compute it."""
    pool, rows = pool_for(kind, folders), ids(6)
    model = torch.compile(pool.model, backend="eager") if compiled else pool.model
    expected = {name: logits(loaded(kind, folders, name), inputs_of(kind, rows)) for name in {*ROWS}}
    for options, order in ((TILE, ROWS * 2), (INTERLEAVE, ["a", "a", None, None, "b", "b"])):
        pool.assign(ROWS, **options)
        found = logits(model, inputs_of(kind, rows))
        for number, name in enumerate(order):
            assert_same(found[number], expected[name][number])
            others = [expected[other][number] for other in expected if other != name]
            assert all((found[number] - other).abs().max() > 1e-3 for other in others)
        with pool.assigned(ROWS[:2]):
            assert pool._room.batch.copies == ONCE
        assert pool._room.batch.copies == (Copies(2) if options is TILE else Copies(repeats=2))


@pytest.mark.parametrize(
    "repeat", [lambda x: torch.cat([x, x]), lambda x: x.repeat(2, 1), lambda x: x.repeat_interleave(2, 0)]
)
def test_an_order_that_is_not_known_is_refused(kind, folders, repeat):
    """Also where the copies are equal, and where a proof for such inputs is there."""
    pool, rows = pool_for(kind, folders), ids(3)
    pool.assign(ROWS)
    alone = logits(pool.model, inputs_of(kind, rows))
    for _ in range(2):
        refused(
            r'a batch of 6, which is 2 times 3(.|\n)*order="tile"', logits, pool.model, inputs_of(kind, repeat(rows))
        )
    assert torch.equal(logits(pool.model, inputs_of(kind, rows)), alone)
    pool.assign(ROWS, **TILE)  # another number is another order
    refused("a batch of 9, which is 3 times 3", logits, pool.model, inputs_of(kind, rows.repeat(3, 1)))
    assert torch.equal(logits(pool.model, inputs_of(kind, rows)), alone)
    pool.assign(["a"] * 3)  # equal rows have no order
    expected = logits(loaded(kind, folders, "a"), inputs_of(kind, repeat(rows)))
    assert_same(logits(pool.model, inputs_of(kind, repeat(rows))), expected)


@pytest.mark.parametrize("order", ["tile", "interleave"])
def test_a_layer_by_itself_gets_copies_in_the_order_that_is_assigned(tmp_path, order):
    """Outside of a call of the model, there is nothing else that tells it."""
    folders = family(LINEAR, tmp_path)
    pool, x = pool_for(LINEAR, folders), torch.randn(6, 12, dtype=torch.float64)
    pool.assign(ROWS)
    pool.model(x[:3])
    refused("2 times 3", pool.model.base_model.model.first, x)
    pool.assign(ROWS, copies=2, order=order)
    pool.model(x)
    found = pool.model.base_model.model.first(x)
    names = ROWS * 2 if order == "tile" else [name for name in ROWS for _ in range(2)]
    for number, name in enumerate(names):
        layer = loaded(LINEAR, folders, name).get_submodule("first" if name is None else "base_model.model.first")
        assert_same(found[number], layer(x)[number])


class Doubling(nn.Module):
    """A model that computes its batch twice, as one with a guidance of its own."""

    def __init__(self, repeat):
        super().__init__()
        self.first, self.last, self.repeat = nn.Linear(6, 8), nn.Linear(8, 6), repeat

    def forward(self, x):
        once = torch.tanh(self.first(x))
        twice = self.last(self.repeat(once))
        return twice[: len(x)] + twice[len(x) :] if self.repeat(torch.arange(2))[1] else twice[::2] - 2 * twice[1::2]


@pytest.mark.parametrize("tiles", [False, True])
def test_a_layer_that_gets_twice_the_batch(tmp_path, tiles):
    """A proof shows what is read right: copies of each row, one after the other. The others are refused."""
    repeat = (lambda x: torch.cat([x, x])) if tiles else (lambda x: x.repeat_interleave(2, 0))
    kind = Kind(lambda: Doubling(repeat), lambda: None, ("first", "last"))
    folders = family(kind, tmp_path)
    pool, x = pool_for(kind, folders), torch.randn(6, 6, dtype=torch.float64)
    pool.assign(ROWS)
    if tiles:
        refused("last(.|\n)*one another's adapter", pool.model, x[:3])
        return
    for options, names in ((dict(), ROWS), (TILE, ROWS * 2)):
        pool.assign(ROWS, **options)
        found = pool.model(x[: len(names)])
        for number, name in enumerate(names):
            assert_same(found[number], loaded(kind, folders, name)(x[: len(names)])[number])


class Pairs(nn.Module):
    """A model that looks at pairs of neighbors, such as a chosen and a rejected answer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x - 0.5 * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))


def test_a_proof_for_pairs_is_none_for_each_of_a_pair(tmp_path):
    kind = Kind(Pairs, lambda: None, ("first", "last"))
    pool, x = pool_for(kind, family(kind, tmp_path), rows=4), torch.randn(4, 6, dtype=torch.float64)
    pool.assign(["a", "b"], **INTERLEAVE)
    pool.model(x)
    pool.assign(["a", "b", "b", None])
    refused("one another's adapter", pool.model, x)
    pool.assign(["a", "b"], **TILE)
    refused("one another's adapter", pool.model, x)


# ---- a batch that `generate` has made

WAYS = {
    "beams": (1, dict(num_beams=3)),
    "several beams": (2, dict(num_beams=4, num_return_sequences=2)),
    "several": (3, dict(num_return_sequences=3, do_sample=True, top_k=1)),
    "guidance": (1, dict(guidance_scale=2.5)),
    "guidance and beams": (1, dict(guidance_scale=2.5, num_beams=2)),
    "once": (1, {}),
}


def generated(model, rows, **options):
    options |= dict(max_new_tokens=6, min_new_tokens=6, pad_token_id=0, output_logits=True)
    return model.generate(input_ids=rows, return_dict_in_generate=True, **options).sequences


@pytest.mark.parametrize("way", WAYS)
def test_generate_tells_the_order(kind, folders, way):
    """Also against an order that was assigned for other calls."""
    if kind is T5 and "guidance" in way:
        pytest.skip("its prompt is not the decoder's")
    copies, options = WAYS[way]
    pool, rows = pool_for(kind, folders), ids(3)
    for assigned in ({}, TILE):
        pool.assign(ROWS, **assigned)
        found = generated(pool.model, rows, **options)
        for number, name in enumerate(ROWS):
            expected = generated(loaded(kind, folders, name), rows, **options)
            own = slice(number * copies, (number + 1) * copies)
            assert torch.equal(found[own], expected[own])
        refused("2 times 3", logits, pool.model, inputs_of(kind, ids(6))) if not assigned else None


def test_a_negative_prompt_has_the_adapter_of_its_row(tmp_path):
    folders, rows, other = family(LLAMA, tmp_path), ids(3), ids(3).flip(0)
    pool = pool_for(LLAMA, folders)
    pool.assign(ROWS)
    found = generated(pool.model, rows, guidance_scale=2.5, negative_prompt_ids=other)
    for number, name in enumerate(ROWS):
        expected = generated(loaded(LLAMA, folders, name), rows, guidance_scale=2.5, negative_prompt_ids=other)
        assert torch.equal(found[number], expected[number])


def test_rows_are_not_for_the_beams_of_one_prompt(tmp_path):
    """Beams take over one another's memory. Drawn answers don't, so each may have its own adapter."""
    folders, prompt = family(LLAMA, tmp_path), ids(1)
    pool = pool_for(LLAMA, folders)
    pool.assign(ROWS)
    refused("beams of one prompt(.|\n)*3 rows for 1 prompts", generated, pool.model, prompt, num_beams=3)
    found = generated(pool.model, prompt, num_return_sequences=3, do_sample=True, top_k=1)
    for number, name in enumerate(ROWS):
        assert torch.equal(found[number], generated(loaded(LLAMA, folders, name), prompt)[0])


@pytest.mark.long
def test_generate_of_a_compiled_model(tmp_path, fresh_compiler):
    """What was compiled has one order. What `generate` says is compared with it."""
    folders, rows = family(LLAMA, tmp_path), ids(3)
    pool = pool_for(LLAMA, folders)
    base = pool.model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager")
    pool.assign(ROWS, **INTERLEAVE)
    found = generated(pool.model, rows, num_beams=2)
    for number, name in enumerate(ROWS):
        assert torch.equal(found[number], generated(loaded(LLAMA, folders, name), rows, num_beams=2)[number])
    pool.assign(ROWS, **TILE)
    refused("in order 'interleave'(.|\n)*in order 'tile'", generated, pool.model, rows, num_beams=2)
    pool.assign(ROWS)
    refused("a batch of 6", generated, pool.model, rows, num_beams=2)


def musicgen():
    audio = dict(hidden_size=16, num_filters=8, codebook_size=64, codebook_dim=16, upsampling_ratios=[4, 4])
    audio |= dict(num_residual_layers=1, target_bandwidths=[48.0], num_lstm_layers=1, sampling_rate=16000)
    decoder = dict(vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    config = MusicgenConfig(
        text_encoder=T5Config(vocab_size=40, **SIZE).to_dict(),
        audio_encoder=EncodecConfig(audio_channels=1, chunk_in_sec=None, **audio).to_dict(),
        decoder=MusicgenDecoderConfig(**decoder, num_codebooks=4, pad_token_id=64, bos_token_id=64).to_dict(),
    )
    model = MusicgenForConditionalGeneration(config).requires_grad_(False)
    for each in ("decoder_start_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.generation_config, each, 64)
    model.generation_config.guidance_scale = 3.0  # as it is published
    return model


MUSICGEN = Kind(musicgen, lambda: None, ("q", "v", "q_proj", "v_proj", "fc1", "enc_to_dec_proj"))


def music(model, rows, **options):
    """The logits of all tokens, ``[rows, tokens, codebooks, 64]``."""
    options |= dict(do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    found = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)
    return torch.stack(found.logits, 1).unflatten(0, (-1, 4)).transpose(1, 2)


def first_logits(model, rows, **options):
    """Those of the guidance's two halves before the first token, ``[2 * rows, codebooks, 64]``."""
    seen = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with base.register_forward_hook(lambda *given: seen.append(given[-1].logits[:, -1])):
        generate = dict(attention_mask=torch.ones_like(rows), **options)
        base.generate(input_ids=rows, **generate)
    return seen[-1].unflatten(0, (-1, 4))


@pytest.mark.parametrize("names", [["a", "b"], ROWS])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_music_with_guidance(tmp_path, names, scale):
    """Its decoder gets the batch twice, as ABAB, and each of four codebooks as a row. Its text encoder gets it once."""
    folders, rows = family(MUSICGEN, tmp_path), ids(3)[: len(names)]
    pool, options = pool_for(MUSICGEN, folders), dict() if scale is None else dict(guidance_scale=scale)
    pool.assign(names)
    found = music(pool.model, rows, **options)
    assert len(found) == len(names) * (2 if scale is None else 1)
    for number, name in enumerate(names):
        own = slice(number, None, len(names))
        assert_same(found[own], music(loaded(MUSICGEN, folders, name), rows, **options)[own])
        other = music(loaded(MUSICGEN, folders, "a" if name == "b" else "b"), rows, **options)[own]
        assert (found[own] - other).abs().max() > 1e-3


def test_several_pieces_with_guidance(tmp_path):
    """Each row twice, and all of them twice."""
    folders, rows = family(MUSICGEN, tmp_path), ids(2)
    pool, options = pool_for(MUSICGEN, folders, rows=4), dict(num_return_sequences=2, do_sample=True, max_new_tokens=1)
    pool.assign(["a", "b"])
    found = first_logits(pool.model, rows, **options)
    for number, name in enumerate("aabb" * 2):
        assert_same(found[number], first_logits(loaded(MUSICGEN, folders, name), rows, **options)[number])
    pool.assign(["a", "b", None, "a"])  # one for each piece, of which the text encoder knows nothing
    refused("a batch of 2(.|\n)*4 rows", first_logits, pool.model, rows, **options)


def test_music_in_a_call_of_the_decoder(tmp_path):
    """Each codebook is a row of what the decoder gets, which is a multiple like any other."""
    folders, rows = family(MUSICGEN, tmp_path), ids(8, 3)
    pool = pool_for(MUSICGEN, folders)
    pool.assign(["a", "b"])
    refused("8, which is 4 times 2", pool.model.decoder, rows)
    pool.assign(["a", "b"], copies=4, order="interleave")
    found = pool.model.decoder(rows).logits
    for number, name in enumerate("ab"):
        own = slice(4 * number, 4 * number + 4)
        assert_same(found[own], loaded(MUSICGEN, folders, name).decoder(rows).logits[own])


@pytest.mark.parametrize("is_encoded", [False, True])
def test_music_in_a_call_with_both_kinds_of_tokens(tmp_path, is_encoded):
    """The batch is that of the text; the logits have four entries for each row, and only they show the last layer."""
    folders, rows, codes = family(MUSICGEN, tmp_path), ids(3), ids(12, 3)

    def computed(model):
        given = dict(input_ids=rows, decoder_input_ids=codes)
        with torch.no_grad():
            if is_encoded:
                encoder = (model.get_base_model() if isinstance(model, PeftModel) else model).text_encoder
                given["encoder_outputs"] = encoder(input_ids=rows)
            return model(**given).logits.unflatten(0, (-1, 4))

    pool = pool_for(MUSICGEN, folders)
    pool.assign(ROWS)
    found = computed(pool.model)
    for number, name in enumerate(ROWS):
        assert_same(found[number], computed(loaded(MUSICGEN, folders, name))[number])
    last = pool.model.get_base_model().decoder.model.decoder.layers[-1]
    last.activation_fn.register_forward_hook(lambda module, arguments, output: output.roll(1, 0))
    pool._room.batch.proven.clear()
    with pytest.raises(HotswapError, match="one another's adapter"):
        computed(pool.model)


# ---- what is known of `generate`


def test_what_is_looked_at_in_generate_is_there():
    """The modules, the functions, and the names of their local variables, in the installed transformers."""
    for module in compat.GENERATES:
        classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
        found = [inspect.unwrap(each.generate).__code__ for _, each in classes if "generate" in vars(each)]
        names = {*compat.EXPANDED, "model_kwargs", "generation_config", "self"}
        assert any(names <= {*each.co_varnames} and each.co_name == "generate" for each in found), module
