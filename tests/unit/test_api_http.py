"""Completions and chat over real HTTP: what a client sees, streamed and not, and what the engine is asked."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from api.sse import EventStream
from api.text import Text
from scheduler.request import TokenOutput
from tests.tiny_models import build_tokenizer
from tests.unit.api_harness import LIMITS, MODEL, Api, serve

ANSWER = " the answer — ünï 😀 done"
EOS = 2
CHAT = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(build_tokenizer())


@pytest.fixture
async def api(text: Text) -> AsyncIterator[Api]:
    async with serve(text, [*text.encode(ANSWER), EOS]) as running:
        yield running


# -- whole responses -----------------------------------------------------------------------------------------


async def test_a_completion(api: Api, text: Text) -> None:
    status, body = await api.post(COMPLETIONS, {"model": MODEL, "prompt": "hi there", "max_tokens": 100})
    assert status == 200
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (ANSWER, "stop", EOS)
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    num_prompt, num_output = len(text.encode("hi there")), len(text.encode(ANSWER)) + 1
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_a_chat_uses_the_template(api: Api, text: Text) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        *CHAT,
    ]
    status, body = await api.post(CHATS, {"messages": messages})
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    wanted = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert api.engine.requests[0].prompt == text.encode(wanted, add_special_tokens=False)
    assert api.engine.requests[0].max_tokens == LIMITS.max_context - len(api.engine.requests[0].prompt)


@pytest.mark.parametrize("stop", [None, "zzz"])
async def test_max_tokens_may_cut_a_character(api: Api, text: Text, stop: str | None) -> None:
    tokens = text.encode(ANSWER)
    num_tokens = len(text.encode(ANSWER[: ANSWER.index("😀")])) + 2
    cut = text.decode(tokens[:num_tokens])
    assert cut.endswith(" �")
    body = {"prompt": "x", "max_tokens": num_tokens, "stop": stop}
    _, whole = await api.post(COMPLETIONS, body)
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (cut, "length")
    assert "".join(event["choices"][0]["text"] for event in await api.stream(COMPLETIONS, body)) == cut


async def test_several_prompts_and_choices_come_in_order(api: Api) -> None:
    _, body = await api.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "seed": 7, "max_tokens": 3})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [request.sampling.seed for request in api.engine.requests] == [7, 8, 7, 8]
    assert [request.prompt for request in api.engine.requests[::2]] != [api.engine.requests[0].prompt] * 2
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 12


async def test_unseeded_choices_differ_in_their_seed(api: Api) -> None:
    for _ in range(3):
        await api.post(COMPLETIONS, {"prompt": "a", "n": 2, "max_tokens": 1})
    assert len({request.sampling.seed for request in api.engine.requests}) == 6


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8]]])
async def test_prompts_as_token_ids(api: Api, prompt: list[Any]) -> None:
    status, _ = await api.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert status == 200
    assert [request.prompt for request in api.engine.requests] == ([prompt] if prompt[0] == 5 else prompt)


async def test_token_ids_can_be_returned(api: Api, text: Text) -> None:
    body = {"prompt": "hi", "max_tokens": 4, "return_token_ids": True}
    _, whole = await api.post(COMPLETIONS, body)
    assert whole["choices"][0]["token_ids"] == text.encode(ANSWER)[:4]
    assert whole["choices"][0]["prompt_token_ids"] == text.encode("hi")
    events = await api.stream(COMPLETIONS, body)
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == text.encode(ANSWER)[:4]


async def test_a_prompt_can_be_read_without_generating(api: Api) -> None:
    body = {"prompt": "hi there", "max_tokens": 0, "echo": True, "logprobs": 1}
    status, answer = await api.post(COMPLETIONS, body)
    assert status == 200
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hi there", "length")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert answer["usage"]["completion_tokens"] == 0


# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stop": "never there"}, {"logprobs": 1}, {"return_token_ids": True}])
async def test_a_streamed_completion_equals_the_whole_one(api: Api, options: dict[str, Any]) -> None:
    body = {"prompt": "hi", "max_tokens": 100, **options}
    _, whole = await api.post(COMPLETIONS, body)
    events = await api.stream(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    *chunks, last = events
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"] == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) == whole["usage"]["completion_tokens"], "a chunk per token"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({(chunk["id"], chunk["model"], chunk["object"]) for chunk in events}) == 1


async def test_a_streamed_chat_begins_with_the_role(api: Api) -> None:
    events = await api.stream(CHATS, {"messages": CHAT})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in events[-1]


async def test_choices_share_a_stream(api: Api) -> None:
    events = await api.stream(CHATS, {"messages": CHAT, "n": 3})
    for index in range(3):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == ANSWER


async def test_an_echo_is_streamed_first(api: Api) -> None:
    events = await api.stream(COMPLETIONS, {"prompt": "hi there", "echo": True, "max_tokens": 2, "logprobs": 0})
    assert events[0]["choices"][0]["text"] == "hi there"
    offsets = [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets)


async def test_http_1_0_streams_without_chunks(api: Api) -> None:
    body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 100}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b"chunked" not in head.lower()
    events = [json.loads(event[6:]) for event in rest.decode().split("\n\n")[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == ANSWER


async def test_a_connection_is_kept_after_a_stream(api: Api) -> None:
    for _ in range(3):
        await api.stream(COMPLETIONS, {"prompt": "hi", "max_tokens": 3})
    await api.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 3})
    assert len(api.client.connector._conns) == 1  # type: ignore[union-attr]


# -- stopping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "kept"), [("wer —", " the ans"), (["zzz", "ï 😀"], " the answer — ün"), ([" the"], "")]
)
async def test_a_stop_string_ends_the_sequence(api: Api, stream: bool, stop: Any, kept: str) -> None:
    body = {"prompt": "hi", "max_tokens": 100, "stop": stop}
    if stream:
        events = await api.stream(COMPLETIONS, body)
        shown = "".join(event["choices"][0]["text"] for event in events)
        reason = events[-1]["choices"][0]
    else:
        _, answer = await api.post(COMPLETIONS, body)
        reason = answer["choices"][0]
        shown = reason["text"]
    assert shown == kept
    assert (reason["finish_reason"], reason["stop_reason"]) == ("stop", stop if isinstance(stop, str) else stop[-1])
    assert api.engine.finished == [0]


async def test_the_stop_string_can_be_kept(api: Api) -> None:
    body = {"prompt": "hi", "max_tokens": 100, "stop": "answer", "include_stop_str_in_output": True}
    _, answer = await api.post(COMPLETIONS, body)
    assert answer["choices"][0]["text"] == " the answer"


async def test_no_stop_before_min_tokens(api: Api, text: Text) -> None:
    num = len(text.encode(" the answer"))
    body = {"prompt": "hi", "max_tokens": num + 2, "min_tokens": num, "stop": " the answer"}
    _, answer = await api.post(COMPLETIONS, body)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert api.engine.requests[0].sampling.banned_until_min_tokens == (EOS,)


async def test_text_held_for_a_stop_string_comes_at_the_end(api: Api) -> None:
    _, answer = await api.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 100, "stop": "done and dusted"})
    assert answer["choices"][0]["text"] == ANSWER


async def test_a_stop_token_is_not_shown(api: Api, text: Text) -> None:
    tokens = text.encode(ANSWER)
    dash = tokens.index(text.encode("—")[0])
    _, answer = await api.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 100, "stop_token_ids": [tokens[dash]]})
    assert answer["choices"][0]["text"] == text.decode(tokens[:dash]) == " the answer "
    assert answer["choices"][0]["stop_reason"] == tokens[dash]


# -- log-probabilities ---------------------------------------------------------------------------------------


async def test_completion_logprobs_align_with_the_text(api: Api, text: Text) -> None:
    _, answer = await api.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 100, "logprobs": 2})
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:") and token != "<|im_end|>":
            assert choice["text"][offset : offset + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    assert logprobs["top_logprobs"][0][text.token_text(10)] == -2.0


async def test_chat_logprobs_carry_bytes(api: Api) -> None:
    body = {"messages": CHAT, "logprobs": True, "top_logprobs": 3}
    _, answer = await api.post(CHATS, body)
    content = answer["choices"][0]["logprobs"]["content"]
    joined = bytes(byte for entry in content[:-1] for byte in entry["bytes"])
    assert joined.decode() == ANSWER
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * len(content)
    assert content[0]["top_logprobs"][2]["logprob"] == -9999.0, "JSON has no minus infinity"
    events = await api.stream(CHATS, body)
    streamed = [
        entry
        for event in events
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


async def test_prompt_logprobs(api: Api) -> None:
    _, answer = await api.post(COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 1})
    views = answer["choices"][0]["prompt_logprobs"]
    assert views[0] is None
    assert [list(view) for view in views[1:]] == [["6"], ["7"]]
    assert views[1]["6"]["rank"] == 1


# -- the client goes away, or doesn't read -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_aborts_its_sequences(api: Api, stream: bool) -> None:
    api.engine.held = True
    body = {"prompt": "hi", "n": 2, "stream": stream}
    task = asyncio.ensure_future(api.client.post(api.url + COMPLETIONS, json=body))
    await api.until(lambda: len(api.engine.sinks) == 2)
    if stream:
        (await task).close()
    else:
        task.cancel()
    await api.until(lambda: not api.engine.sinks)
    assert api.engine.aborted == [0, 1]
    await api.until(lambda: api.metrics.client_disconnects == 1)


async def test_a_client_that_goes_away_at_the_very_end_is_no_error(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    event = EventStream._event

    def leave(stream: EventStream, payload: bytes) -> None:
        if payload == b"[DONE]":
            assert stream._transport is not None
            stream._transport.abort()
        event(stream, payload)

    monkeypatch.setattr(EventStream, "_event", leave)
    with pytest.raises(aiohttp.ClientError):
        async with api.client.post(api.url + COMPLETIONS, json={"prompt": "hi", "stream": True}) as response:
            await response.read()
    await api.until(lambda: api.metrics.client_disconnects == 1)
    await asyncio.sleep(0.1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_reader_that_never_reads_is_dropped(text: Text) -> None:
    async with serve(text, text.encode("x"), max_send_buffer_bytes=1 << 16) as api:
        api.engine.held = True
        body = json.dumps({"prompt": "hi", "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 10)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"\r\n\r\n")
        token = text.encode("x")

        async def flood() -> None:
            while api.engine.sinks:
                for _ in range(200):
                    for sink in list(api.engine.sinks.values()):
                        sink(TokenOutput(token))
                await asyncio.sleep(0)

        async with asyncio.timeout(60):
            await flood()
        assert api.engine.aborted == [0]
        assert api.metrics.slow_readers == 1
        writer.close()


async def test_the_end_of_a_stream_does_not_wait_for_ever(text: Text) -> None:
    async with serve(text, text.encode("x"), send_timeout_s=0.2, max_send_buffer_bytes=1 << 26) as api:
        api.engine.held = True
        body = json.dumps({"prompt": "hi", "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 10)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(60_000):
            api.engine.sinks[0](TokenOutput(text.encode("x")))
        api.engine.send(0, TokenOutput([], finish_reason="length"))
        await api.until(lambda: api.metrics.slow_readers == 1)
        writer.close()


# -- the engine says no --------------------------------------------------------------------------------------


async def test_a_full_queue_is_429_with_a_time_to_come_back(api: Api) -> None:
    api.engine.room = 1
    async with api.client.post(api.url + COMPLETIONS, json={"prompt": "hi", "n": 2}) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "3"
        assert (await response.json())["error"]["code"] == "queue_full"
    assert api.engine.aborted == [0], "all or none"


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
async def test_an_engine_that_gives_up_is_an_error_for_the_client(api: Api, reason: Any, status: int) -> None:
    api.engine.failure = TokenOutput([], finish_reason=reason, error="the logits were not finite")
    got, body = await api.post(COMPLETIONS, {"prompt": "hi", "n": 2})
    assert (got, body["error"]["message"]) == (status, "the logits were not finite")
    events = await api.stream(COMPLETIONS, {"prompt": "hi"})
    assert events[-1]["error"]["message"] == "the logits were not finite"


@pytest.mark.parametrize(("num_workers", "expected"), [(0, 503), (1, 503), (2, 200)])
async def test_health_while_a_lost_worker_is_made_up_for(api: Api, num_workers: int, expected: int) -> None:
    """Requests are taken, and wait. Whoever looks is told when there is nobody to serve them."""
    api.engine.status, api.engine.num_workers = "recovering", num_workers
    status, body = await api.get("/health")
    assert (status, json.loads(body)["workers_joined"]) == (expected, num_workers)


async def test_before_the_model_is_up(api: Api) -> None:
    api.engine.status = "loading"
    status, body = await api.get("/health")
    assert status == 503
    view = json.loads(body)
    assert (view["status"], view["units_loaded"], view["units_total"]) == ("loading", 3, 8)
    for path, request in (
        (COMPLETIONS, {"prompt": "hi"}),
        (CHATS, {"messages": CHAT}),
        ("/tokenize", {"prompt": "hi"}),
    ):
        status, answer = await api.post(path, request)
        assert (status, answer["error"]["code"]) == (503, "not_ready")
    assert (await api.get("/v1/models"))[0] == 200


# -- the rest of the house -----------------------------------------------------------------------------------


async def test_a_folder_without_a_tokenizer_serves_token_ids() -> None:
    async with serve(Text(None), [5, 6, EOS]) as api:
        _, answer = await api.post(COMPLETIONS, {"prompt": [9], "max_tokens": 9})
        assert answer["choices"][0]["text"] == ""
        assert answer["choices"][0]["token_ids"] == [5, 6, EOS]
        events = await api.stream(COMPLETIONS, {"prompt": [9], "max_tokens": 9})
        assert [token for event in events for token in event["choices"][0]["token_ids"]] == [5, 6, EOS]
        for path, body in (
            (COMPLETIONS, {"prompt": "hi"}),
            (CHATS, {"messages": CHAT}),
            (COMPLETIONS, {"prompt": [9], "stop": "x"}),
        ):
            status, answer = await api.post(path, body)
            assert status == 400
            assert "no tokenizer" in answer["error"]["message"]


async def test_models(api: Api) -> None:
    _, body = await api.get("/v1/models")
    listed = json.loads(body)["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [(MODEL, 256), ("alias", 256)]
    assert json.loads((await api.get("/v1/models/alias"))[1])["id"] == "alias"
    assert (await api.get("/v1/models/other"))[0] == 404


async def test_tokenize_and_detokenize(api: Api, text: Text) -> None:
    _, body = await api.post("/tokenize", {"prompt": "hi é", "return_token_strs": True})
    assert body["tokens"] == text.encode("hi é")
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert (await api.post("/detokenize", {"tokens": body["tokens"]}))[1] == {"prompt": "hi é"}
    _, chat = await api.post("/tokenize", {"messages": CHAT})
    assert chat["tokens"] == text.encode(text.render_chat(CHAT))


async def test_request_ids_are_kept_or_given(api: Api) -> None:
    async with api.client.get(api.url + "/health", headers={"x-request-id": "abc-1"}) as response:
        assert response.headers["x-request-id"] == "abc-1"
    async with api.client.get(api.url + "/health", headers={"x-request-id": "a b;c"}) as response:
        assert len(response.headers["x-request-id"]) == 32
    async with api.client.post(
        api.url + COMPLETIONS, json={"prompt": "x", "stream": True}, headers={"x-request-id": "s1"}
    ) as response:
        assert response.headers["x-request-id"] == "s1"
        await response.read()
    assert api.engine.requests[0].request_id == "s1-0"


async def test_the_status_page_asks_nobody_else(api: Api) -> None:
    status, page = await api.get("/")
    assert status == 200
    assert "http://" not in page
    assert "https://" not in page
    for path in ("/admin/layout", "/admin/workers", "/admin/stats"):
        assert path in page
        assert (await api.get(path))[0] == 200


async def test_metrics_after_a_request(api: Api, text: Text) -> None:
    await api.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 100})
    _, scrape = await api.get("/metrics")
    values = dict(line.rsplit(" ", 1) for line in scrape.splitlines() if not line.startswith("#"))
    num_tokens = len(text.encode(ANSWER)) + 1
    assert float(values["midflight_time_to_first_token_seconds_count"]) == 1
    assert float(values["midflight_inter_token_seconds_count"]) == num_tokens - 1
    assert float(values["midflight_request_seconds_count"]) == 1
    assert float(values['midflight_http_responses_total{route="/v1/completions",status="200"}']) == 1
    assert float(values['midflight_stage_seconds_total{activity="compute",hop="0",worker="w0"}']) == 2.0
    assert float(values['midflight_kv_blocks{state="used"}']) == 5
    assert float(values["midflight_generated_tokens_total"]) == 42
    assert float(values["midflight_serving"]) == 1
