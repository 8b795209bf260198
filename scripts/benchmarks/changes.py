"""`scripts/bench changes`: random layout changes back to back under load, and proof that no client could tell.

Two servers, one after the other. The first is left alone and says what each job's answer is (`changes_load`), without a prefix
cache. The second has its layout changed as fast as changes commit, while streams repeat the jobs; each answer is compared with the first
server's, token for token and log-probability by log-probability, which through the flips of a stream is the teacher-forced
comparison. Nothing may differ by a bit: the kernels' rounding follows from a request alone, not from its company, so there is
no tolerance. After every change a probe asks for a cached prompt. Every so often the layout goes home, where the memory of
each process is looked at. Nothing may be wrong: one problem fails the run.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import machine_now, note
from changes_load import Job, Ledger, Load, Told, make_jobs
from changes_run import Run, new_session
from servers import Server, midflight_arm

STRATEGIES = ("live", "stop-copy", "drain", "recompute")
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


def main() -> int:
    args = _parse()
    machine = machine_now()
    folder = Path(tempfile.mkdtemp(prefix="midflight-changes-"))
    note(f"server logs in {folder}")
    model, options = args.model, ["--dtype", args.dtype, "--threads", "1", "--stages", "2"]
    options += ["--step-tokens", str(args.step_tokens), "--kv-memory", args.kv_memory]
    if model is None:
        model = str(folder / "tiny")
        Path(model).mkdir()
        (Path(model) / "config.json").write_text(json.dumps(_TINY), encoding="utf-8")
        options += ["--load-format", "dummy"]
    jobs = make_jobs(args.jobs, 500, args.tokens, args.seed)
    ledger = Ledger()
    with Server(midflight_arm("unchanged", model, [*options, "--no-prefix-cache"]), folder / "unchanged.log") as server:
        expected = asyncio.run(_learn(server, jobs, ledger, args.streams))
    options += ["--look-ahead", args.look_ahead]
    arm = midflight_arm("changed", model, [*options, "--local-workers", str(args.workers)])
    with Server(arm, folder / "changed.log") as server:
        figures = asyncio.run(Run(server, args, ledger).run(jobs, expected))
        if killed := server.stop():
            ledger.problem(f"{len(killed)} processes had to be killed at the end")
    for number, line in enumerate((folder / "changed.log").read_text(errors="replace").splitlines()):
        if "Traceback" in line or "never retrieved" in line:
            ledger.problem(f"log line {number + 1}: {line[:200]}")

    document = {"benchmark": "changes", "machine": machine, "command": sys.argv, **figures, "problems": ledger.problems}
    text = json.dumps(document, indent=2)
    print(text) if args.out is None else args.out.write_text(text + "\n", encoding="utf-8")
    note(_summary(figures))
    note(f"changes {f'FAILED with {len(ledger.problems)} problems' if ledger.problems else 'PASSED'}")
    return 1 if ledger.problems else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench changes", description="Layout changes under load, exactly.")
    parser.add_argument("--changes", type=int, default=1000, metavar="N", help="committed changes")
    parser.add_argument("--workers", type=int, default=4, help="2 serve at the start, the others are spares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="a folder or a known name; default: a tiny one of random weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--strategy", choices=STRATEGIES, default="live")
    parser.add_argument("--aborts", type=float, default=0.0, metavar="SHARE", help="of changes, to abort midway")
    parser.add_argument("--streams", type=int, default=12, help="at once")
    parser.add_argument("--jobs", type=int, default=240, help="different requests")
    parser.add_argument("--tokens", type=int, default=200, help="of the longest stream")
    parser.add_argument("--kv-memory", default="24M", help="per worker; 24M is enough for one hop")
    parser.add_argument("--evictions", action="store_true", help="the pool is so small that it preempts anyhow")
    parser.add_argument("--step-tokens", type=int, default=48)
    parser.add_argument("--look-ahead", default="always", help="of the server that changes; as for `midflight serve`")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()
    if args.workers < 2:
        parser.error("--workers: at least 2")
    return args


async def _learn(server: Server, jobs: Sequence[Job], ledger: Ledger, concurrency: int) -> list[Told]:
    async with new_session() as session:
        note(f"the unchanged server is up after {server.started_in_s:.1f} s; {len(jobs)} jobs")
        return await Load(session, server.url, jobs, ledger).learn(concurrency)


def _summary(figures: dict[str, Any]) -> str:
    commit, stall, sums = figures["commit_s"], figures["stalls_s"], figures["sums"]
    if not commit or not stall:
        return "nothing was measured"
    return (
        f"{figures['changes']} changes in {figures['seconds']:.0f} s ({figures['changes_per_s']:.2f}/s): commit p50 "
        f"{commit['p50'] * 1e3:.0f} ms, p99 {commit['p99'] * 1e3:.0f} ms; {figures['streams']} streams, {figures['tokens']} "
        f"tokens, {figures['commits_inside_streams']} commits inside streams, log-probabilities at most "
        f"{figures['max_logprob_gap']:.1e} off; {sums['snapshot_bytes'] / 2**20:.0f} MiB of snapshot, "
        f"{sums['mirror_bytes'] / 2**20:.0f} MiB mirrored, {sums['sequences_flipped']} sequences flipped, "
        f"{sums['recomputed_tokens']} tokens recomputed; longest gap in a stream p50 {stall['p50'] * 1e3:.0f} ms, "
        f"p99 {stall['p99'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
