"""Detokenisation token by token, and stop strings, against the decoding of the whole."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.errors import ApiError
from api.stop import StopMatcher, StopStrings
from api.text import Text, load_text
from tests.tiny_models import SPECIAL_TOKENS, build_tokenizer

SMOLLM2 = Path("~/.cache/midflight/models/smollm2-135m-instruct").expanduser()


@pytest.fixture(scope="module")
def tiny() -> Text:
    return Text(build_tokenizer())


@pytest.fixture(scope="module")
def smollm2() -> Text:
    if not (SMOLLM2 / "tokenizer.json").is_file():
        pytest.skip("the default model has not been pulled here")
    return load_text(SMOLLM2)


def stepwise(text: Text, tokens: list[int], skip_special_tokens: bool = True) -> str:
    detokenizer = text.detokenizer(skip_special_tokens=skip_special_tokens)
    return "".join([*map(detokenizer.step, tokens), detokenizer.flush()])


def sentencepiece_like(byte_fallback: bool = True) -> Any:
    """A tokenizer in the manner of Llama 2: spaces as U+2581, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "▁ab", "bc"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b"), ("b", "c")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    )
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# -- detokenisation ------------------------------------------------------------------------------------------


@given(text=st.text(max_size=60), skip=st.booleans())
def test_the_pieces_of_any_text_are_the_text(tiny: Text, text: str, skip: bool) -> None:
    tokens = tiny.encode(text)
    assert stepwise(tiny, tokens, skip) == tiny.decode(tokens, skip_special_tokens=skip)
    if not any(special in text for special in SPECIAL_TOKENS):
        assert stepwise(tiny, tokens, skip) == text


@given(tokens=st.lists(st.integers(0, 340), max_size=40), skip=st.booleans())
def test_any_tokens_even_invalid_utf8_decode_as_the_whole_does(tiny: Text, tokens: list[int], skip: bool) -> None:
    assert stepwise(tiny, tokens, skip) == tiny.decode(tokens, skip_special_tokens=skip)


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(0, 49_151), max_size=40), skip=st.booleans())
def test_any_tokens_of_the_default_model(smollm2: Text, tokens: list[int], skip: bool) -> None:
    assert stepwise(smollm2, tokens, skip) == smollm2.decode(tokens, skip_special_tokens=skip)


@given(text=st.text(max_size=60))
def test_any_text_of_the_default_model(smollm2: Text, text: str) -> None:
    tokens = smollm2.encode(text)  # its vocabulary lacks some control characters, so this need not be the text itself
    assert stepwise(smollm2, tokens, False) == smollm2.decode(tokens, skip_special_tokens=False)


def test_every_token_of_the_default_model_alone(smollm2: Text) -> None:
    for token in range(49_152):
        assert stepwise(smollm2, [token], False) == smollm2.decode([token], skip_special_tokens=False)
        assert smollm2.token_text(token) == smollm2.decode([token], skip_special_tokens=False)


def test_a_character_appears_with_the_token_that_completes_it(tiny: Text) -> None:
    tokens = tiny.encode("a😀b")
    detokenizer = tiny.detokenizer()
    assert [detokenizer.step(token) for token in tokens] == ["a", "", "", "", "😀", "b"]
    assert detokenizer.flush() == ""


def test_an_incomplete_character_at_the_end_is_one_replacement(tiny: Text) -> None:
    tokens = tiny.encode("a😀")[:-1]
    assert stepwise(tiny, tokens) == "a�" == tiny.decode(tokens)


def test_special_tokens_are_left_out_or_spelled(tiny: Text) -> None:
    tokens = tiny.encode("hi<|im_end|>")
    assert stepwise(tiny, tokens) == "hi"
    assert stepwise(tiny, tokens, skip_special_tokens=False) == "hi<|im_end|>"
    assert tiny.token_text(tokens[-1]) == "<|im_end|>"


def test_a_special_token_within_a_character_does_not_break_it(tiny: Text) -> None:
    *start, end = tiny.encode("é")
    tokens = [*start, tiny.encode("<|im_end|>")[0], end]
    assert stepwise(tiny, tokens) == "é" == tiny.decode(tokens)


def test_added_tokens_with_characters_outside_the_byte_table() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["日本 語", "<think>"])
    text = Text(tokenizer)
    tokens = text.encode("a 日本 語<think>é")
    assert stepwise(text, tokens) == text.decode(tokens) == "a 日本 語<think>é"


@given(text=st.text(alphabet="abcdefg é日😀", max_size=30))
def test_a_sentencepiece_tokenizer_goes_through_the_window(text: str) -> None:
    wrapped = _SENTENCEPIECE
    tokens = wrapped.encode(text, add_special_tokens=False)
    assert stepwise(wrapped, tokens) == wrapped.decode(tokens)


_SENTENCEPIECE = Text(sentencepiece_like())


def test_a_window_is_never_held_for_ever() -> None:
    detokenizer = _SENTENCEPIECE.detokenizer()
    broken = 3 + 0xF0  # the byte that begins a character of four bytes
    pieces = [detokenizer.step(broken) for _ in range(100)]
    assert any("�" in piece for piece in pieces[:40])


def test_token_bytes_of_a_sentencepiece_tokenizer() -> None:
    assert _SENTENCEPIECE.token_bytes(3 + 0xE2) == b"\xe2"
    (space_a,) = _SENTENCEPIECE.encode("a", add_special_tokens=False)
    assert _SENTENCEPIECE.token_bytes(space_a) == b" a"


# -- stop strings --------------------------------------------------------------------------------------------


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the text before the first stop string to be complete (the longest of several)."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text(alphabet="abc", max_size=6), max_size=12)


@settings(max_examples=500)
@given(stops=STOPS, pieces=PIECES)
@example(stops=["aab"], pieces=["aa", "ab"])
@example(stops=["abac", "bad"], pieces=["aba", "ba", "cd"])
@example(stops=["aabaaa"], pieces=["aabaab", "aaa"])
def test_stop_strings_are_found_however_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    text, found = reference("".join(pieces), stops)
    matcher = StopMatcher(StopStrings(stops))
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        assert text.startswith(out), "what was passed on comes before the stop string"
        if matcher.matched is not None:
            break
    else:
        out += matcher.flush()
    assert (out, matcher.matched) == (text, found)


@given(stops=STOPS, pieces=PIECES)
def test_no_more_is_held_back_than_could_become_a_stop_string(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    seen = passed = ""
    for piece in pieces:
        seen += piece
        passed += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = seen[len(passed) :]
        assert held == max((stop[:k] for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), key=len)


def test_the_stop_string_may_be_kept() -> None:
    matcher = StopMatcher(StopStrings(["END"]), include_stop=True)
    assert matcher.push("x E") + matcher.push("NDless") == "x END"
    assert matcher.matched == "END"


# -- prompts -------------------------------------------------------------------------------------------------


def test_a_chat_goes_through_the_template(tiny: Text) -> None:
    rendered = tiny.render_chat([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=False).endswith("<|im_end|>\n")


def test_what_the_template_refuses_is_the_clients_mistake() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        Text(tokenizer).render_chat([{"role": "user", "content": "hi"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "conversation", "tools", "padding"])
def test_a_request_cannot_reach_the_templates_machinery(tiny: Text, name: str) -> None:
    with pytest.raises(ApiError, match=name):
        tiny.render_chat([{"role": "user", "content": "hi"}], template_arguments={name: "x"})


def test_template_arguments_reach_the_template() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ mood }}"
    assert Text(tokenizer).render_chat([{"role": "user", "content": ""}], template_arguments={"mood": "calm"}) == "calm"


async def test_long_texts_are_encoded_beside_the_loop_and_come_out_equal(tiny: Text) -> None:
    text = "the user asks " * 2000
    assert await tiny.encode_off_loop(text, max_tokens=100_000, param="prompt") == tiny.encode(text)


async def test_a_hopelessly_long_text_is_refused_unread(tiny: Text) -> None:
    with pytest.raises(ApiError, match="cannot fit the context of 16 tokens") as caught:
        await tiny.encode_off_loop("x" * 100_000, max_tokens=16, param="prompt")
    assert caught.value.code == "context_length_exceeded"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    text = load_text(tmp_path)
    assert not text.has_tokenizer
    assert stepwise(text, [1, 2, 3]) == text.decode([1, 2, 3]) == ""
    assert text.token_text(7) == "token_id:7"
    for refused in (lambda: text.encode("hi"), lambda: text.render_chat([{"role": "user", "content": "hi"}])):
        with pytest.raises(ApiError, match="token ids") as caught:
            refused()
        assert caught.value.status == 400


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        load_text(tmp_path)


def test_a_tokenizer_survives_being_saved_and_loaded(tmp_path: Path, tiny: Text) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    loaded = load_text(tmp_path)
    assert loaded.has_chat_template
    assert loaded.encode("the assistant é") == tiny.encode("the assistant é")
