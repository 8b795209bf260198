"""What a request may say: every field with its range, OpenAI's error shape, and nothing that ends in a 5xx."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.errors import ApiError, shown
from api.protocol import ChatRequest, CompletionRequest, decode
from api.text import Text
from api.validation import Plan, plan_chat, plan_completion
from tests.tiny_models import build_tokenizer
from tests.unit.api_harness import LIMITS, Api, serve

TEXT = Text(build_tokenizer())
EOS = 2
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def completion(**fields: Any) -> Plan:
    body = decode(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())
    return plan_completion(body, LIMITS, TEXT, (EOS,))


def chat(**fields: Any) -> Plan:
    return plan_chat(decode(ChatRequest, json.dumps({**CHAT, **fields}).encode()), LIMITS, TEXT, (EOS,))


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with serve(TEXT, [*TEXT.encode("ok"), EOS], max_body_bytes=1 << 16) as running:
        yield running


# -- what is taken -------------------------------------------------------------------------------------------


def test_defaults() -> None:
    plan = completion()
    sampling = plan.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (sampling.logprobs, plan.prompt_logprobs, plan.max_tokens, plan.num_choices) == (-1, -1, 16, 1)
    assert plan.stop_token_ids == {EOS}
    assert plan.stops is None
    assert chat().max_tokens is None


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "n", "stop", "max_tokens", "logit_bias", "stream", "stream_options", "logprobs"]
)
def test_null_is_left_out(name: str) -> None:
    for plan in (completion, chat):
        assert plan(**{"seed": 1, name: None}) == plan(seed=1)


def test_every_sampling_parameter_arrives() -> None:
    sampling = completion(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=42, frequency_penalty=-2, presence_penalty=2,
        repetition_penalty=1.5, logit_bias={"7": -100, "3": 5.5}, min_tokens=3, logprobs=4, stop_token_ids=[9],
    ).sampling  # fmt: skip
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (
        0.5,
        0.9,
        7,
        0.1,
        42,
    )
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (-2.0, 2.0, 1.5)
    assert sampling.logit_bias == ((3, 5.5), (7, -100.0))
    assert (sampling.min_tokens, sampling.banned_until_min_tokens, sampling.logprobs) == (3, (EOS, 9), 4)


def test_ignoring_the_end_leaves_other_stop_tokens() -> None:
    plan = completion(ignore_eos=True, stop_token_ids=[9], min_tokens=2)
    assert plan.stop_token_ids == {9}
    assert plan.sampling.banned_until_min_tokens == (9,)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_any_64_bit_seed_is_taken_and_fits_the_wire(seed: int) -> None:
    assert 0 <= completion(seed=seed).request("r", [5], 3, LIMITS).sampling.seed < 2**63


def test_chat_takes_either_name_of_max_tokens() -> None:
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_completion_tokens=7).max_tokens == 7
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_chat_logprobs() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling.logprobs == 20
    assert chat(logprobs=False).sampling.logprobs == -1


def test_echoed_logprobs_ask_for_the_prompts() -> None:
    assert completion(echo=True, logprobs=3).request("r", [5], 0, LIMITS).prompt_logprobs == 3
    assert completion(echo=True).request("r", [5], 0, LIMITS).prompt_logprobs == -1
    assert completion(logprobs=3).request("r", [5], 0, LIMITS).prompt_logprobs == -1
    assert completion(prompt_logprobs=2).request("r", [5], 0, LIMITS).prompt_logprobs == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "something_new": [1]},
        {"best_of": 1}, {"suffix": ""}, {"suffix": None}, {"n": 2, "best_of": 2}, {"response_format": {"type": "text"}},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_tolerated(fields: dict[str, Any]) -> None:
    completion(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"modalities": ["text"]}, {"parallel_tool_calls": True}],
)
def test_what_asks_a_chat_for_nothing_is_tolerated(fields: dict[str, Any]) -> None:
    chat(**fields)


# -- what is refused -----------------------------------------------------------------------------------------

REFUSED_EVERYWHERE: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "0 to 2"),
    ("temperature", 2.1, "0 to 2"),
    ("temperature", "hot", "float"),
    ("top_p", 0, "above 0, up to 1"),
    ("top_p", 1.1, "up to 1"),
    ("top_k", -2, "0 to 320"),
    ("top_k", 321, "0 to 320"),
    ("top_k", 1.5, "int"),
    ("min_p", -0.1, "0 to 1"),
    ("min_p", 1.1, "0 to 1"),
    ("frequency_penalty", 2.1, "-2 to 2"),
    ("presence_penalty", -2.1, "-2 to 2"),
    ("repetition_penalty", 0, "above 0"),
    ("repetition_penalty", -1, "above 0"),
    ("logit_bias", {"320": 1}, "0 to 319"),
    ("logit_bias", {"-1": 1}, "0 to 319"),
    ("logit_bias", {"5": 101}, "-100 to 100"),
    ("logit_bias", {"a": 1}, "int"),
    ("logit_bias", {"5": "b"}, "float"),
    ("logit_bias", [1], "object"),
    ("seed", 2**64, "64 bits"),
    ("seed", -(2**63) - 1, "64 bits"),
    ("seed", 10**4000, "64 bits"),
    ("seed", 1.5, "int"),
    ("n", 0, "1 to 128"),
    ("n", 129, "1 to 128"),
    ("n", True, "int"),
    ("n", -(10**30), "1 to 128"),
    ("max_tokens", -1, "256"),
    ("max_tokens", 257, "256"),
    ("min_tokens", -1, "0 to 256"),
    ("min_tokens", 257, "0 to 256"),
    ("stop", [""], "between 1 and 1024"),
    ("stop", "", "between 1 and 1024"),
    ("stop", ["x" * 1025], "between 1 and 1024"),
    ("stop", ["x"] * 17, "at most 16"),
    ("stop", [1], "str"),
    ("stop", 7, "str"),
    ("stop_token_ids", [320], "0 to 319"),
    ("stop_token_ids", [-1], "0 to 319"),
    ("stop_token_ids", [5] * 257, "at most 256"),
    ("stop_token_ids", ["a"], "int"),
    ("prompt_logprobs", 21, "0 to 20"),
    ("prompt_logprobs", -1, "0 to 20"),
    ("stream", "yes", "bool"),
    ("stream_options", {"include_usage": True}, "stream to be true"),
    ("response_format", {"type": "json_object"}, "not supported"),
    ("logits_processors", ["x"], "not supported"),
    ("use_beam_search", True, "not supported"),
    ("guided_json", {}, "not supported"),
    ("ignore_eos", 1, "bool"),
]


@pytest.mark.parametrize("plan", [completion, chat])
@pytest.mark.parametrize(("name", "value", "said"), REFUSED_EVERYWHERE, ids=lambda v: shown(v, 20))
def test_refusals_name_the_field_and_the_limit(plan: Any, name: str, value: Any, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        plan(**{name: value})
    error = caught.value
    assert (error.status, error.param) == (400, name)
    assert error.message.startswith(name)
    assert said in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("plan", "name", "fields"),
    [
        (completion, "logprobs", {"logprobs": 21}),
        (completion, "logprobs", {"logprobs": -1}),
        (completion, "logprobs", {"logprobs": True}),
        (completion, "best_of", {"best_of": 2}),
        (completion, "best_of", {"n": 2, "best_of": 3}),
        (completion, "suffix", {"suffix": "x"}),
        (completion, "echo", {"echo": "x"}),
        (completion, "prompt", {"prompt": 7}),
        (completion, "prompt", {"prompt": None}),
        (completion, "prompt", {"prompt": {}}),
        (completion, "prompt", {"prompt": [1.5]}),
        (completion, "prompt", {"prompt": [[["a"]]]}),
        (completion, "min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        (completion, "prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
        (chat, "logprobs", {"logprobs": 5}),
        (chat, "top_logprobs", {"top_logprobs": 5}),
        (chat, "top_logprobs", {"top_logprobs": 21, "logprobs": True}),
        (chat, "max_tokens", {"max_tokens": 0}),
        (chat, "max_completion_tokens", {"max_completion_tokens": 0}),
        (chat, "tools", {"tools": [{"type": "function"}]}),
        (chat, "functions", {"functions": [{}]}),
        (chat, "tool_choice", {"tool_choice": "required"}),
        (chat, "audio", {"audio": {}}),
        (chat, "modalities", {"modalities": ["audio"]}),
        (chat, "chat_template", {"chat_template": "{{ 1 }}"}),
        (chat, "messages", {"messages": "hi"}),
        (chat, "messages", {"messages": [{"content": "no role"}]}),
        (chat, "messages", {"messages": [{"role": "user", "content": 7}]}),
    ],
)
def test_refusals_of_one_door(plan: Any, name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        plan(**fields)
    assert (caught.value.status, caught.value.param) == (400, name)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ApiError, match="prompt: this field is required") as caught:
        decode(CompletionRequest, b"{}")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("body", "path", "param"),
    [
        ({"messages": []}, "/v1/chat/completions", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "/v1/chat/completions", "messages"),
        ({"messages": [{"role": "user"}]}, "/v1/chat/completions", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "/v1/chat/completions", "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "/v1/chat/completions", "messages"),
        ({**CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "/v1/chat/completions", "chat_template_kwargs"),
        ({**CHAT, "add_generation_prompt": True, "continue_final_message": True}, "/v1/chat/completions", "continue_final_message"),
        ({"prompt": []}, "/v1/completions", "prompt"),
        ({"prompt": ""}, "/v1/completions", "prompt"),
        ({"prompt": [[]]}, "/v1/completions", "prompt"),
        ({"prompt": [5, "x"]}, "/v1/completions", "prompt"),
        ({"prompt": ["x", [5]]}, "/v1/completions", "prompt"),
        ({"prompt": [320]}, "/v1/completions", "prompt"),
        ({"prompt": [[5], [-1]]}, "/v1/completions", "prompt"),
        ({"prompt": [10**40]}, "/v1/completions", "prompt"),
        ({"prompt": [5] * 256}, "/v1/completions", "prompt"),
        ({"prompt": [5] * 250, "max_tokens": 7}, "/v1/completions", "max_tokens"),
        ({"prompt": "word " * 12_000}, "/v1/completions", "prompt"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "/v1/chat/completions", "prompt"),
        ({"prompt": ["x"] * 9}, "/v1/completions", "prompt"),
        ({"prompt": "x", "n": 9}, "/v1/completions", "n"),
        ({"tokens": [320]}, "/detokenize", "tokens"),
        ({}, "/tokenize", "prompt"),
        ({"prompt": "x", **CHAT}, "/tokenize", "prompt"),
    ],
)  # fmt: skip
async def test_refusals_over_http(api: Api, body: dict[str, Any], path: str, param: str) -> None:
    status, answer = await api.post(path, body)
    assert status == 400
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert not api.engine.requests


async def test_a_context_exactly_filled_is_taken(api: Api) -> None:
    status, _ = await api.post("/v1/completions", {"prompt": [5] * 250, "max_tokens": 6})
    assert status == 200
    assert (await api.post("/v1/completions", {"prompt": [5] * 256, "max_tokens": 0}))[0] == 200


async def test_an_unknown_model(api: Api) -> None:
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
        status, answer = await api.post(path, {**body, "model": "gpt-17"})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
        assert "tiny" in answer["error"]["message"]
        assert (await api.post(path, {**body, "model": "alias"}))[0] == 200


RAW = [
    b"", b"null", b"[]", b"7", b'"x"', b"{", b"{'a': 1}", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "\\ud800 and more"}', b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": ' + b"[" * 30_000, b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"prompt": "x", "ignored": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}", b'{"prompt": "x"} trailing', b'{"prompt": "x\n"}',
    b'\xef\xbb\xbf{"prompt": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: shown(raw, 40))
async def test_bodies_that_are_no_request(api: Api, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        status, answer = await api.post(path, raw=raw)
        assert status == 400
        assert answer["error"]["message"]
    assert not api.engine.requests


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "1e999"), ("temperature", "9" * 30_000), ("n", "1e2"), ("max_tokens", "9" * 30_000)],
)
async def test_numbers_beyond_all_bounds(api: Api, name: str, value: str) -> None:
    for path, base in (("/v1/completions", '"prompt": "x"'), ("/v1/chat/completions", '"messages": []')):
        status, answer = await api.post(path, raw=f'{{{base}, "{name}": {value}}}'.encode())
        assert (status, answer["error"]["param"]) == (400, name)
        assert len(answer["error"]["message"]) < 300


async def test_a_nul_or_emoji_prompt_is_just_text(api: Api) -> None:
    for prompt in ("a\x00b", "😀", "\\ud83d\\ude00"):
        assert (await api.post("/v1/completions", {"prompt": prompt}))[0] == 200


async def test_huge_bodies(api: Api) -> None:
    body = b'{"prompt": "' + b"x" * (1 << 17) + b'"}'
    status, answer = await api.post("/v1/completions", raw=body)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 4096

    async with api.client.post(api.url + "/v1/completions", data=chunks()) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"


async def test_a_garbled_compressed_body(api: Api) -> None:
    status, answer = await api.post("/v1/completions", raw=b"not gzip at all", headers={"Content-Encoding": "gzip"})
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


async def test_a_body_that_never_comes() -> None:
    import asyncio

    async with serve(TEXT, [EOS], body_timeout_s=0.1) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()


async def test_paths_and_methods_in_the_same_shape(api: Api) -> None:
    status, answer = await api.post("/v1/nothing", {})
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    async with api.client.get(api.url + "/v1/completions") as response:
        assert response.status == 405
        assert "POST" in response.headers["Allow"]
        assert "POST" in (await response.json())["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [name for name in ChatRequest.__struct_fields__ + CompletionRequest.__struct_fields__ if name != "stream"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), use_chat=st.booleans())
async def test_no_json_makes_the_server_fail(fields: dict[str, Any], use_chat: bool) -> None:
    path, base = ("/v1/chat/completions", CHAT) if use_chat else ("/v1/completions", {"prompt": "x"})
    async with serve(TEXT, [*TEXT.encode("ok"), EOS]) as api:
        status, answer = await api.post(path, {**base, **fields})
        assert status in (200, 400, 404)
        assert ("error" in answer) == (status != 200)


# -- keys ----------------------------------------------------------------------------------------------------


async def test_keys() -> None:
    async with serve(TEXT, [EOS], api_key="user-key", admin_key="admin-key") as api:
        bearer = {"Authorization": "Bearer user-key"}
        admin = {"Authorization": "Bearer admin-key"}
        status, answer = await api.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (
            401,
            "invalid_api_key",
            "authentication_error",
        )
        for wrong in ("Bearer admin-key", "Bearer user-keyx", "Bearer ", "Basic user-key", "user-key", "Bearer ü"):
            assert (await api.post("/v1/completions", {"prompt": "x"}, headers={"Authorization": wrong}))[0] == 401
        assert (await api.post("/v1/completions", {"prompt": "x"}, headers=bearer))[0] == 200
        assert (await api.post("/tokenize", {"prompt": "x"}))[0] == 401
        assert (await api.get("/v1/models"))[0] == 401
        for path in ("/", "/admin/layout", "/admin/workers", "/admin/stats"):
            assert (await api.get(path))[0] == 401
            assert (await api.get(path, **bearer))[0] == 401
            assert (await api.get(path, **admin))[0] == 200
        assert (await api.get("/admin/layout", Authorization="Basic bWU6YWRtaW4ta2V5"))[0] == 200
        assert (await api.get("/admin/layout", Authorization="Basic !!"))[0] == 401
        assert (await api.get("/health"))[0] == 200
        assert (await api.get("/metrics"))[0] == 200


async def test_an_api_key_alone_closes_the_administration() -> None:
    async with serve(TEXT, [EOS], api_key="user-key") as api:
        status, body = await api.get("/admin/layout", Authorization="Bearer user-key")
        assert status == 403
        assert "--admin-key" in body
