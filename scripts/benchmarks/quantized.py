"""`scripts/bench quantized`: what rounding the weights costs, beside the answers of `transformers` in float32.

Each arm is a server. It reads the reference's prompts and answers (`reference.Reference`) and tells, for each token of the
answers, its log-probability and whether it would have chosen it: teacher-forced, so that one early difference does not count
many times. Then it answers the same questions itself, greedily.
"""

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from arms import DEFAULT_MODEL, machine_now, note
from equality import QUESTIONS, REQUEST_TIMEOUT_S
from reference import Answer, Reference, read_questions
from servers import Server, midflight_arm

ARMS = {
    "float32": "--dtype float32",
    "bfloat16": "--dtype bfloat16",
    "int8": "--dtype bfloat16 --quantize int8",
    "float32-int8": "--dtype float32 --quantize int8",
}
_AT_ONCE = 8


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench quantized", description="What rounding the weights costs.")
    parser.add_argument("--questions", type=int, default=40, help="the first N of the file")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens at most")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder, or a name known to `midflight pull`")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help=",".join(ARMS))
    parser.add_argument("--data", type=Path, default=QUESTIONS, help="JSON lines with a 'question' each")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()
    if unknown := [name for name in args.arms if name not in ARMS]:
        parser.error(f"--arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    home = Path(os.environ.get("MIDFLIGHT_HOME") or "~/.cache/midflight").expanduser()
    folder = Path(args.model) if Path(args.model).is_dir() else home / "models" / args.model
    machine = machine_now()
    answers = Reference(folder, home, args.tokens).answers(read_questions(args.data, args.questions))
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-quantized-"))
    note(f"server logs in {log_folder}")
    arms = {}
    for name in args.arms:
        options = ["--stages", "2", "--threads", "1", *shlex.split(ARMS[name])]
        with Server(midflight_arm(name, str(folder), options), log_folder / f"{name}.log") as server:
            arms[name] = asyncio.run(_judge(server.url, answers, args.tokens))
        note(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in arms[name].items()))
    text = json.dumps({"benchmark": "quantized", "machine": machine, "command": sys.argv, "arms": arms}, indent=2)
    print(text) if args.out is None else args.out.write_text(text + "\n", encoding="utf-8")
    return 0


async def _judge(url: str, answers: Sequence[Answer], num_tokens: int) -> dict[str, float]:
    """Figures over all tokens of the answers."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    gate = asyncio.Semaphore(_AT_ONCE)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def ask(body: dict[str, Any]) -> dict[str, Any]:
            async with gate, session.post(f"{url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise RuntimeError(f"{url} answers {response.status}: {await response.text()}")
                return (await response.json())["choices"][0]

        read = {"max_tokens": 1, "prompt_logprobs": 1}
        forced = await asyncio.gather(*(ask({"prompt": a.prompt + a.output, **read}) for a in answers))
        free = {"max_tokens": num_tokens, "temperature": 0, "return_token_ids": True}
        told = await asyncio.gather(*(ask({"prompt": a.prompt, **free}) for a in answers))
    off, chosen, losses = [], [], []
    for answer, choice in zip(answers, forced, strict=True):
        begin = len(answer.prompt)
        views = choice["prompt_logprobs"][begin:]
        for token, wanted, view in zip(answer.output, answer.logprobs[begin - 1 :], views, strict=True):
            off.append(abs(view[str(token)]["logprob"] - wanted))
            chosen.append(view[str(token)]["rank"] == 1)
            losses.append(wanted - view[str(token)]["logprob"])
    same = [_common(a.output, choice["token_ids"]) for a, choice in zip(answers, told, strict=True)]
    return {
        "tokens": len(off),
        "mean_logprob_off": statistics.fmean(off),
        "p99_logprob_off": sorted(off)[int(0.99 * (len(off) - 1))],
        "mean_logprob_lost": statistics.fmean(losses),
        "greedy_equal_share": statistics.fmean(chosen),
        "answers_equal": sum(n == len(a.output) for n, a in zip(same, answers, strict=True)),
        "mean_equal_prefix": statistics.fmean(same),
    }


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same from the beginning."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


if __name__ == "__main__":
    sys.exit(main())
