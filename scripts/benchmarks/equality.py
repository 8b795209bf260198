"""`scripts/bench equality`: our answers beside those of `transformers`' own `generate`, token for token, in float32.

The reference is `reference.Reference`. Ours come from servers with each number of stages, prompts cut into small chunks,
all questions at once through the chat template, twice: the second time their prompts come out of the prefix cache. Where the tokens
part, the reference's logits of the two candidates decide: closer than a tie, or a failure. Then the log-probabilities of the
reference's prompts and outputs (teacher-forced, read in chunks) and of what was generated (token by token) are compared.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from arms import DEFAULT_MODEL, machine_now, note
from reference import Answer, Reference, read_questions
from servers import ROOT, Server, midflight_arm

TIE = 1e-5
"""Two candidates whose logits in the reference are closer than this have no winner."""
LOGPROB_LIMIT = 1e-4
QUESTIONS = ROOT.parent / "shared" / "data" / "gsm8k_questions.jsonl"
REQUEST_TIMEOUT_S = 1800.0
_FORCED_AT_ONCE = 8


def main() -> int:
    args = _parse()
    home = Path(os.environ.get("MIDFLIGHT_HOME") or "~/.cache/midflight").expanduser()
    folder = Path(args.model) if Path(args.model).is_dir() else home / "models" / args.model
    if not folder.is_dir():
        note(f"--model {args.model}: neither a folder nor a model in {home / 'models'}; `midflight pull` fetches one")
        return 2
    try:
        questions = read_questions(args.data, args.questions)
    except ValueError as error:
        note(str(error))
        return 2
    machine = machine_now()
    reference = Reference(folder, home, args.tokens)
    answers = reference.answers(questions)

    log_folder = Path(tempfile.mkdtemp(prefix="midflight-equality-"))
    note(f"server logs in {log_folder}")
    arms = []
    for implementation in args.implementations:
        for stages in args.stages:
            name = f"{implementation}-{stages}"
            options = ["--stages", str(stages), "--dtype", "float32", "--step-tokens", str(args.step_tokens)]
            options += ["--implementation", implementation, "--threads", "1"]
            with Server(midflight_arm(name, str(folder), options), log_folder / f"{name}.log") as server:
                figures = asyncio.run(_compare(server, questions, answers, args.tokens, reference))
            arms.append({"arm": name, "stages": stages, "implementation": implementation, **figures})
            note(_line(arms[-1]))
    own = _distances([a.logprobs for a in answers], [a.exact for a in answers])
    note(f"transformers in float32 beside float64: max {own['max']:.2e}, p99 {own['p99']:.2e}")

    failed = [arm["arm"] for arm in arms if arm["problems"]]
    document = {
        "benchmark": "equality",
        "machine": machine,
        "command": sys.argv,
        "questions": len(questions),
        "max_tokens": args.tokens,
        "reference_tokens": sum(len(answer.output) for answer in answers),
        "reference_beside_float64": own,
        "arms": arms,
    }
    text = json.dumps(document, indent=2)
    print(text) if args.out is None else args.out.write_text(text + "\n", encoding="utf-8")
    note(f"equality {'FAILED: ' + ', '.join(failed) if failed else 'PASSED'}")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench equality", description="Our answers beside transformers'.")
    parser.add_argument("--questions", type=int, default=40, help="the first N of the file")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens at most")
    parser.add_argument("--stages", type=_numbers, default=[1, 2, 3], metavar="1,2,3")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder, or a name known to `midflight pull`")
    parser.add_argument(
        "--implementations", type=lambda text: text.split(","), default=["auto", "transformers"], metavar="A,B",
        help="of the decoder layers (default: auto,transformers)",
    )  # fmt: skip
    parser.add_argument("--step-tokens", type=int, default=48, help="small, so that every prompt is read in chunks")
    parser.add_argument("--data", type=Path, default=QUESTIONS, help="JSON lines with a 'question' each")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    return parser.parse_args()


async def _compare(
    server: Server, questions: Sequence[str], answers: Sequence[Answer], max_tokens: int, reference: Reference
) -> dict[str, Any]:
    """Both rounds and the teacher-forced reading; ``problems`` is empty when all is as it should be."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    problems: list[str] = []
    rounds, decoded = [], []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for _ in range(2):
            found = await asyncio.gather(*(_ask(session, server, text, max_tokens) for text in questions))
            verdicts = [_judge(a, f, reference) for a, f in zip(answers, found, strict=True)]
            problems += [f"question {i}: {v}" for i, v in enumerate(verdicts) if v not in ("equal", "tie")]
            cached = sum(f["cached_tokens"] for f in found)
            rounds.append({"equal": verdicts.count("equal"), "ties": verdicts.count("tie"), "cached_tokens": cached})
            decoded.append(found)
        gate = asyncio.Semaphore(_FORCED_AT_ONCE)
        forced = await asyncio.gather(*(_read(session, server, answer, gate) for answer in answers))
        async with session.post(f"{server.url}/admin/audit", json={}) as response:
            problems += [f"audit: {problem}" for problem in (await response.json())["problems"]]
    if not rounds[1]["cached_tokens"]:
        problems.append("the second round hit no cached prefix")

    figures: dict[str, Any] = {"rounds": rounds}
    wanted, exact = [a.logprobs for a in answers], [a.exact for a in answers]
    figures["forced"] = _distances(forced, wanted)
    figures["forced_beside_float64"] = _distances(forced, exact)
    for index, found in enumerate(decoded):
        pairs = [(f["logprobs"], _outputs(a)) for a, f in zip(answers, found, strict=True) if f["tokens"] == a.output]
        figures[f"decoded_{index}"] = _distances([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    for name in ("forced", "decoded_0", "decoded_1"):
        if figures[name]["max"] > LOGPROB_LIMIT:
            problems.append(
                f"{name}: a log-probability is {figures[name]['max']:.2e} off, the limit is {LOGPROB_LIMIT}"
            )
    return {**figures, "problems": problems}


async def _ask(session: aiohttp.ClientSession, server: Server, question: str, max_tokens: int) -> dict[str, Any]:
    """One greedy answer through the chat template."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
    }
    answer = await _post(session, f"{server.url}/v1/chat/completions", body)
    choice = answer["choices"][0]
    return {
        "prompt": choice["prompt_token_ids"],
        "tokens": choice["token_ids"],
        "logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
        "cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"],
    }


async def _read(session: aiohttp.ClientSession, server: Server, answer: Answer, gate: asyncio.Semaphore) -> list[float]:
    """Log-probabilities of the reference's prompt and output, from the second token on."""
    body = {"prompt": answer.prompt + answer.output, "max_tokens": 0, "echo": True, "logprobs": 0}
    async with gate:
        view = await _post(session, f"{server.url}/v1/completions", body)
    return view["choices"][0]["logprobs"]["token_logprobs"][1:]


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answers {response.status}: {await response.text()}")
        return await response.json()


def _judge(answer: Answer, found: dict[str, Any], reference: Reference) -> str:
    """ "equal", "tie", or what is wrong."""
    if found["prompt"] != answer.prompt:
        return f"the chat template gives other tokens: {found['prompt']} instead of {answer.prompt}"
    ours, theirs = found["tokens"], answer.output
    if ours == theirs:
        return "equal"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if at == min(len(ours), len(theirs)):
        return f"{len(ours)} tokens instead of {len(theirs)}, alike as far as they go"
    logits = reference.logits_after(answer.prompt + theirs[:at])
    gap = float(logits[theirs[at]] - logits[ours[at]])
    note(
        f"  token {at}: ours {ours[at]} ({logits[ours[at]]:.6f}), the reference's {theirs[at]} ({logits[theirs[at]]:.6f})"
    )
    return (
        "tie"
        if abs(gap) < TIE
        else f"token {at} is {ours[at]} instead of {theirs[at]}, whose logit is {gap:.2e} higher"
    )


def _outputs(answer: Answer) -> list[float]:
    return answer.logprobs[len(answer.prompt) - 1 :]


def _distances(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Absolute differences over all tokens."""
    gaps = sorted(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    if not gaps:
        return {"max": 0.0, "p99": 0.0, "tokens": 0}
    return {"max": gaps[-1], "p99": gaps[int(0.99 * (len(gaps) - 1))], "tokens": len(gaps)}


def _line(arm: dict[str, Any]) -> str:
    rounds = ", ".join(
        f"{r['equal']} equal {r['ties']} ties ({r['cached_tokens']} tokens cached)" for r in arm["rounds"]
    )
    forced, exact = arm["forced"], arm["forced_beside_float64"]
    decoded = max(arm["decoded_0"]["max"], arm["decoded_1"]["max"])
    lines = [
        f"{arm['arm']}: {rounds}; log-probabilities off by max {forced['max']:.2e}, p99 {forced['p99']:.2e} "
        f"over {forced['tokens']:.0f} tokens (decoding: max {decoded:.2e}; beside float64: max {exact['max']:.2e})"
    ]
    return "\n".join([*lines, *(f"  {problem}" for problem in arm["problems"])])


def _numbers(text: str) -> list[int]:
    if not all(part.isascii() and part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of stages; one looks like 1,2,3")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
