"""The official `openai` client against a real server with real workers: what it is used for most, and its errors."""

import asyncio
import time
from typing import Any

import openai
import pytest

from tests.integration.server import Server

CHAT: list[Any] = [{"role": "user", "content": "the user asks the assistant"}]
PROMPT = "the user asks the assistant and"


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


@pytest.fixture(autouse=True)
def _nothing_is_left(server: Server) -> Any:
    yield
    deadline_s = time.monotonic() + 10
    while (report := server.audit())["sequences"] and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert report["sequences"] == 0
    assert report["problems"] == []


def complete(client: openai.OpenAI, server: Server, **options: Any) -> Any:
    return client.completions.create(
        **{"model": server.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **options}
    )


def test_models(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).owned_by == "midflight"


def test_a_streamed_chat_equals_the_whole_one(client: openai.OpenAI, server: Server) -> None:
    options: Any = {"model": server.model, "messages": CHAT, "max_tokens": 24, "temperature": 0}
    whole: Any = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens <= 24
    text, reasons, role = "", [], None
    usage: Any = None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            role = choice.delta.role or role
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert role == "assistant"
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_streamed_completion_equals_the_whole_one(client: openai.OpenAI, server: Server) -> None:
    whole = complete(client, server)
    chunks = list(complete(client, server, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) == whole.usage.completion_tokens


def test_completion_logprobs(client: openai.OpenAI, server: Server) -> None:
    (choice,) = complete(client, server, logprobs=3).choices
    logprobs = choice.logprobs
    num_tokens = len(logprobs.tokens)
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == num_tokens
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert max(top, key=top.__getitem__) == token, "greedy takes the most likely token"
        assert top[token] == pytest.approx(logprob, abs=1e-5)
        assert len(top) == 3


def test_chat_logprobs_spell_the_text_in_bytes(client: openai.OpenAI, server: Server) -> None:
    answer: Any = client.chat.completions.create(
        model=server.model, messages=CHAT, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens
    spelled = bytes(byte for entry in content for byte in entry.bytes).decode("utf-8", "replace")
    assert spelled.removesuffix("<|im_end|>") == choice.message.content
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)


def test_echoed_logprobs_are_those_of_the_generation(client: openai.OpenAI, server: Server) -> None:
    body = {"return_token_ids": True}
    first = complete(client, server, logprobs=0, extra_body=body, max_tokens=12)
    (choice,) = first.choices
    prompt = choice.model_extra["prompt_token_ids"] + choice.model_extra["token_ids"]
    read = complete(client, server, prompt=prompt, logprobs=0, echo=True, max_tokens=0)
    echoed = read.choices[0].logprobs.token_logprobs[-12:]
    assert echoed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


def test_stop_strings_end_before_themselves(client: openai.OpenAI, server: Server) -> None:
    whole = complete(client, server).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    expected = whole[: whole.index(stop)]
    (choice,) = complete(client, server, stop=[stop, "never to be seen"]).choices
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, server, stop=stop, stream=True))
    assert streamed == expected


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI, server: Server) -> None:
    first, again, other = (
        [choice.text for choice in complete(client, server, temperature=1, n=4, seed=seed).choices]
        for seed in (11, 11, 1234)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 4
    alone = complete(client, server, temperature=1, seed=12).choices[0].text
    assert alone == first[1], "choice i has seed + i"


def test_unseeded_requests_differ(client: openai.OpenAI, server: Server) -> None:
    assert len({complete(client, server, temperature=1).choices[0].text for _ in range(3)}) == 3


def test_a_bias_forces_and_bans_tokens(client: openai.OpenAI, server: Server) -> None:
    forced = complete(client, server, logit_bias={"70": 100}, max_tokens=4, extra_body={"return_token_ids": True})
    assert forced.choices[0].model_extra["token_ids"] == [70] * 4
    free = (
        complete(client, server, max_tokens=1, extra_body={"return_token_ids": True})
        .choices[0]
        .model_extra["token_ids"]
    )
    banned = complete(
        client, server, max_tokens=1, logit_bias={str(free[0]): -100}, extra_body={"return_token_ids": True}
    )
    assert banned.choices[0].model_extra["token_ids"] != free


def test_min_tokens_and_ignore_eos(client: openai.OpenAI, server: Server) -> None:
    end = 2  # a bias towards the end of the sequence, which then must wait
    body = {"min_tokens": 6, "return_token_ids": True}
    (choice,) = complete(client, server, logit_bias={str(end): 100}, extra_body=body).choices
    assert choice.model_extra["token_ids"][6:] == [end]
    assert (choice.finish_reason, end in choice.model_extra["token_ids"][:6]) == ("stop", False)
    (choice,) = complete(
        client,
        server,
        logit_bias={str(end): 100},
        max_tokens=5,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices
    assert choice.model_extra["token_ids"] == [end] * 5
    assert (choice.text, choice.finish_reason) == ("", "length")


def test_prompts_in_every_form(client: openai.OpenAI, server: Server) -> None:
    text = complete(client, server, extra_body={"return_token_ids": True})
    tokens = text.choices[0].model_extra["prompt_token_ids"]
    for prompt in (tokens, [tokens], [PROMPT]):
        assert complete(client, server, prompt=prompt).choices[0].text == text.choices[0].text
    several = complete(client, server, prompt=[PROMPT, "the answer", PROMPT])
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == several.choices[2].text == text.choices[0].text


def test_a_repeated_prompt_is_found_in_the_prefix_cache(client: openai.OpenAI, server: Server) -> None:
    prompt = [20 + i % 250 for i in range(100)]
    fresh = complete(client, server, prompt=prompt)
    cached = complete(client, server, prompt=prompt)
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < cached.usage.prompt_tokens_details.cached_tokens < 100
    assert cached.choices[0].text == fresh.choices[0].text


async def test_many_streams_at_once_are_each_as_if_alone(client: openai.OpenAI, server: Server) -> None:
    prompts = [f"the user asks {number} times and the assistant" for number in range(12)]
    alone = [
        complete(client, server, prompt=prompt, seed=number, temperature=1).choices[0].text
        for number, prompt in enumerate(prompts)
    ]

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as many:

        async def one(number: int) -> str:
            options: Any = {"model": server.model, "max_tokens": 24, "temperature": 1, "seed": number, "stream": True}
            stream = await many.completions.create(prompt=prompts[number], **options)
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*map(one, range(12)))
    assert list(together) == alone


def test_a_client_that_leaves_is_forgotten(client: openai.OpenAI, server: Server) -> None:
    stream = complete(client, server, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.05), server, max_tokens=450, n=4, extra_body={"ignore_eos": True})


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"prompt": "word " * 2000}, "prompt"),
        ({"prompt": [5] * 400, "max_tokens": 200}, "max_tokens"),
        ({"prompt": [10**6]}, "prompt"),
        ({"n": 0}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_mistakes_name_their_field(client: openai.OpenAI, server: Server, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, server, **options)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, server, model="gpt-17")
    assert caught.value.code == "model_not_found"


def test_tools_are_refused(client: openai.OpenAI, server: Server) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=server.model, messages=CHAT, tools=[tool])
