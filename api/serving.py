"""From a checked request to its response: what completions and chat share."""

import uuid
from typing import Protocol

from aiohttp import web

from api.context import CONTEXT, REQUEST_ID
from api.errors import ApiError
from api.generation import Choice, Collector, Delta, Generation, Prompt
from api.protocol import Usage
from api.sse import ChunkFormat, EventStream
from api.validation import Plan
from scheduler.request import Limits


class Format(ChunkFormat, Protocol):
    def whole(self, results: list[Delta], choices: list[Choice], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""
        ...


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


async def serve(
    request: web.Request, plan: Plan, prompts: list[Prompt], limits: Limits, answer: Format
) -> web.StreamResponse:
    """Generate and answer. When the client goes away this task is cancelled, and the sequences are aborted at once.

    Raises:
        ApiError: before anything was sent.
    """
    context = request.app[CONTEXT]
    output = EventStream(request, answer) if plan.stream else Collector()
    generation = Generation(context.engine, context.text, context.metrics, plan, output)
    generation.submit(request[REQUEST_ID], prompts, limits)
    try:
        if isinstance(output, EventStream):
            return await _stream(output, generation)
        await generation.wait()
        body = answer.whole(output.results(), generation.choices, generation.usage())
        return web.Response(body=body, content_type="application/json")
    finally:
        generation.close()


async def _stream(output: EventStream, generation: Generation) -> web.StreamResponse:
    response = await output.open()
    try:
        await generation.wait()
        if generation.plan.include_usage:
            output.usage(generation.usage())
    except ApiError as error:
        generation.close()
        output.error(error)
    await output.close(response)
    return response
