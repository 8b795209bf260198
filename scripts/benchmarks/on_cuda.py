"""`scripts/bench cuda` (also `scripts/bench --device cuda`): serving and layout changes on one GPU.

For each shape (random weights: Llama-3-8B's and SmolLM2-135M's) it measures, one after the other:

- the memory roofline: how fast this device copies, and so how long reading the weights and the KV of a step must take;
- `transformers`' own ``generate`` on the device, alone, at batch 1 and 32;
- our server with 1, 2 and 4 workers on the device, 1 and 32 requests at a time;
- changes of its layout under 32 requests, 4 layers there and back: D1, what the report calls the engine's pause, less each
  sequence's mean gap.

Decode figures are seconds per step: time per output token of the client's median request, against the roofline's. The table goes to stderr,
JSON to stdout or --out. Without a device it says so and ends with 2. ``--device cpu --shapes tiny`` tries the script
itself on a model of a few layers; its figures say nothing of a GPU and are labelled.

A device may be lent for minutes. So what fails is noted under ``failures`` and the rest goes on, --out is written anew after each figure,
and after --budget seconds no further part begins. Nothing is fetched: without the default model's tokenizer there is none, and
prompts are token ids anyhow.
"""

import argparse
import asyncio
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import DEFAULT_MODEL, machine_now, names_of, note
from loadgen import Workload, run_workload, warm_up
from servers import ROOT, import_path
from shift_fleet import Fleet, LayoutSpec

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50000,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
BATCHES = (1, 32)
PROMPT_TOKENS = 128
MOVED_LAYERS = 4
COPY_BYTES = 1 << 30
START_TIMEOUT_S = 1200.0
"""Billions of random weights are made on the host."""
_Note = Callable[[], None]
"""Called when there is something new in the document."""


@dataclass(frozen=True)
class Roofline:
    """Bytes that one decode step must read, and how long that takes at the bandwidth that was measured."""

    weight_bytes: int
    kv_bytes_per_position: int
    bytes_per_s: float

    def step_s(self, rows: int, context: float) -> float:
        return (self.weight_bytes + rows * context * self.kv_bytes_per_position) / self.bytes_per_s


def main() -> int:
    args = _parser().parse_args()
    if args.reference:
        print(json.dumps(_reference(Path(args.reference), args)))
        return 0
    if args.copy:
        print(json.dumps(_copy_bytes_per_s(args.device, args.copy)))
        return 0
    if args.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            note(f"scripts/bench cuda: no CUDA device here (torch {torch.__version__} sees none); nothing was measured")
            return 2
    machine = {**machine_now(), "device": args.device, "device_name": _device_name(args.device)}
    log_folder = Path(tempfile.mkdtemp(prefix="midflight-cuda-"))
    note(f"server logs in {log_folder}")
    document: dict[str, Any] = {
        "benchmark": "cuda",
        "machine": machine,
        "command": sys.argv,
        "shapes": {},
        "failures": {},
    }
    until_s = time.monotonic() + args.budget
    failed = 0
    try:
        for shape in args.shapes:
            _measure(shape, args, log_folder, document, until_s)
    except KeyboardInterrupt:
        note("interrupted; what was measured until then is kept")
        failed = 130
    note(format_table(document))
    failed = failed or int(
        any(_errors(figures) for figures in document["shapes"].values()) or bool(document["failures"])
    )
    _write(document, args.out)
    if args.out is None:
        print(json.dumps(document, indent=2))
    return failed


def _write(document: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _measure(shape: str, args: argparse.Namespace, log_folder: Path, document: dict[str, Any], until_s: float) -> None:
    """Everything for one shape; fills in the document as far as it gets."""
    figures = document["shapes"][shape] = {}
    folder = make_model(shape, Path(tempfile.mkdtemp(prefix="midflight-shape-")) / shape)

    def attempt(name: str, part: _Note) -> None:
        if time.monotonic() > until_s:
            note(f"{shape}, {name}: left out, the time is used up")
            return
        try:
            part()
        except Exception as error:  # whatever it is, the other parts may still work
            document["failures"][f"{shape}, {name}"] = f"{type(error).__name__}: {error}"
            note(f"{shape}, {name} FAILED: {type(error).__name__}: {error}")
        _write(document, args.out)

    def roofline() -> None:
        found = _roofline(folder, args)
        figures["roofline"] = {
            "bytes_per_s": found.bytes_per_s,
            "weight_bytes": found.weight_bytes,
            "step_s": {str(rows): found.step_s(rows, _context(args)) for rows in BATCHES},
        }
        note(f"{shape}: {found.weight_bytes / 1e9:.2f} GB a step, {found.bytes_per_s / 1e9:.0f} GB/s")

    def serve(num_workers: int) -> None:
        served: dict[str, Any] = {}
        changes: list[dict[str, Any]] = []
        figures.setdefault("served", {})[str(num_workers)] = served
        figures.setdefault("changes", {})[str(num_workers)] = changes
        changed = functools.partial(_write, document, args.out)
        _serve(folder, num_workers, args, log_folder / f"{shape}-{num_workers}", served, changes, changed)

    def reference() -> None:
        figures["transformers"] = _child(["--reference", str(folder)], args)

    try:
        attempt("roofline", roofline)
        for num_workers in args.workers:
            attempt(f"{num_workers} workers", functools.partial(serve, num_workers))
            if num_workers == args.workers[0] and not args.no_reference:
                attempt("transformers", reference)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def make_model(shape: str, folder: Path) -> Path:
    """A folder with the shape's config and the default model's tokenizer, if that is on this machine; weights are made up by who reads it."""
    home = Path(os.environ.get("MIDFLIGHT_HOME") or Path.home() / ".cache" / "midflight")
    source = home / "models" / DEFAULT_MODEL
    folder.mkdir(parents=True)
    for path in source.iterdir() if source.is_dir() else ():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=2), encoding="utf-8")
    return folder


def _roofline(folder: Path, args: argparse.Namespace) -> Roofline:
    from runtime.model.config import inspect_model

    spec = inspect_model(str(folder), dtype=args.dtype, load_format="dummy", max_context=None)
    kv_bytes = spec.kv_bytes_per_token_layer() * spec.num_layers
    bytes_per_s = _child(["--copy", str(args.copy_bytes)], args)
    return Roofline(sum(spec.layer_bytes) + spec.lm_head_bytes, kv_bytes, bytes_per_s)


def _context(args: argparse.Namespace) -> float:
    """Positions that a row attends to on the average of its decode steps."""
    return PROMPT_TOKENS + args.tokens / 2


# -- in processes of their own, so that their memory is free again -------------------------------------------


def _child(extra: Sequence[str], args: argparse.Namespace) -> Any:
    """What this script prints with these arguments, in a process that ends."""
    common = ["--device", args.device, "--dtype", args.dtype, "--tokens", str(args.tokens)]
    env = {**os.environ, "PYTHONPATH": import_path(ROOT)}
    done = subprocess.run([sys.executable, __file__, *common, *extra], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(extra)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _copy_bytes_per_s(device: str, num_bytes: int) -> float:
    """Bytes read and written a second by the fastest of several large copies on the device."""
    import torch

    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(10):
        _wait(device)
        began_s = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * num_bytes / best_s


def _reference(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`transformers`' generate with random weights: seconds per decode step and output tokens/s for each batch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    figures = {}
    for rows in BATCHES:
        prompts = torch.randint(1000, 40000, (rows, PROMPT_TOKENS), device=args.device)

        def run(num_tokens: int, prompts: torch.Tensor = prompts) -> float:
            _wait(args.device)
            began_s = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            _wait(args.device)
            return time.perf_counter() - began_s

        run(4)  # what is made or compiled for the first time
        first_s, whole_s = run(1), run(args.tokens)
        figures[str(rows)] = {
            "step_s": (whole_s - first_s) / (args.tokens - 1),
            "output_tokens_per_s": rows * args.tokens / whole_s,
        }
    return figures


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU (a trial of the script)"


# -- our server ------------------------------------------------------------------------------------------------


def _serve(
    folder: Path,
    num_workers: int,
    args: argparse.Namespace,
    log_folder: Path,
    served: dict[str, Any],
    changes: list[dict[str, Any]],
    changed: _Note,
) -> None:
    """Serving with as many stages, and changes under load; with one stage, to and from a second worker. Adds to what was found."""
    num_layers = SHAPES[folder.name]["num_hidden_layers"]
    layout, other = layouts_for(num_layers, num_workers)
    arguments = ["--load-format", "dummy", "--dtype", args.dtype, "--device", args.device, "--no-prefix-cache"]
    arguments += ["--kv-memory", args.kv_memory, "--max-context", "2048"]
    if args.device == "cpu":
        arguments += ["--threads", "1"]
    num_local = max(num_workers, other.num_workers)
    fleet = Fleet(str(folder), num_local, arguments, log_folder, start_timeout_s=START_TIMEOUT_S)
    fleet.start(layout)
    try:
        asyncio.run(_drive(fleet, layout, other, args, served, changes, changed))
    finally:
        fleet.stop()


def layouts_for(num_layers: int, num_workers: int) -> tuple[LayoutSpec, LayoutSpec]:
    """An even layout, and one that differs by `MOVED_LAYERS` from the first worker to the next."""
    counts = [num_layers // num_workers + (at < num_layers % num_workers) for at in range(num_workers)]
    layout = LayoutSpec(tuple(enumerate(counts)))
    moved = min(MOVED_LAYERS, counts[0] - 1)
    counts = [counts[0] - moved, (counts[1] if num_workers > 1 else 0) + moved, *counts[2:]]
    return layout, LayoutSpec(tuple(enumerate(counts)))


async def _drive(
    fleet: Fleet,
    layout: LayoutSpec,
    other: LayoutSpec,
    args: argparse.Namespace,
    served: dict[str, Any],
    changes: list[dict[str, Any]],
    changed: _Note,
) -> None:
    for rows in BATCHES:
        workload = Workload(f"c{rows}", rows, max(2, 2 * rows), PROMPT_TOKENS, args.tokens)
        await warm_up(fleet.url, fleet.model, workload, seed=1)
        summary, _ = await run_workload(fleet.url, fleet.model, workload, seed=2)
        served[str(rows)] = summary
        changed()
        tpot = summary["tpot_s"]
        note(
            f"  {workload.name}: {tpot['p50'] * 1e3 if tpot else float('nan'):.2f} ms a token, {summary['errors']} errors"
        )
    half = Workload("change", BATCHES[-1] // 2, BATCHES[-1], PROMPT_TOKENS, args.tokens)
    for turn in range(2 * args.changes):
        ended = asyncio.Event()
        loads = [
            asyncio.ensure_future(_keep_loaded(fleet, half, ended, seed=1000 * (2 * turn + at + 1))) for at in range(2)
        ]
        try:
            await asyncio.sleep(args.settle)
            report = await fleet.change(layout if turn % 2 else other, "live", {})
            await asyncio.sleep(args.settle)
        finally:
            ended.set()
            runs = [run for load in await asyncio.gather(*loads) for run in load]
        gaps = [gap for _, records in runs for record in records for gap in record.gaps_s]
        errors = sum(summary["errors"] for summary, _ in runs)
        entry = {
            "layout": str(fleet.layout),
            "report": report,
            "errors": errors,
            "longest_gap_s": max(gaps, default=None),
        }
        changes.append(entry)
        changed()
        pause = report["engine_pause_ms"]
        note(f"  to {fleet.layout}: {report['total_s']:.2f} s, D1 max {pause.get('excess_max', float('nan')):.2f} ms")


async def _keep_loaded(
    fleet: Fleet, workload: Workload, ended: asyncio.Event, seed: int
) -> list[tuple[dict, list[Any]]]:
    """The workload again and again, so that streams decode whenever the change comes, however fast the device is."""
    found = []
    while not ended.is_set():
        found.append(await run_workload(fleet.url, fleet.model, workload, seed=seed + len(found)))
    return found


# -- what was found --------------------------------------------------------------------------------------------


def format_table(document: dict[str, Any]) -> str:
    """A Markdown table of all shapes; times in milliseconds, shares of the roofline in percent."""
    lines = [
        f"device: {document['machine']['device_name']}",
        "| shape | who | batch | ms a decode step | of the roofline | output tokens/s | D1 max ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, figures in document["shapes"].items():
        floor = figures.get("roofline", {}).get("step_s", {})
        for rows, step_s in floor.items():
            lines.append(f"| {shape} | roofline | {rows} | {step_s * 1e3:.3f} | 100 % | {int(rows) / step_s:.0f} | |")
        for rows, found in figures.get("transformers", {}).items():
            cells = _cells(found["step_s"], floor.get(rows), found["output_tokens_per_s"])
            lines.append(f"| {shape} | transformers | {rows} | {cells} | |")
        for workers, served in figures.get("served", {}).items():
            pauses = [
                change["report"]["engine_pause_ms"].get("excess_max") for change in figures["changes"].get(workers, [])
            ]
            d1 = max((pause for pause in pauses if pause is not None), default=None)
            for rows, summary in served.items():
                tpot = summary["tpot_s"]
                cells = _cells(tpot["p50"], floor.get(rows), summary["output_tokens_per_s"]) if tpot else "failed | | "
                shown = f"{d1:.2f}" if d1 is not None and rows == str(BATCHES[-1]) else ""
                lines.append(f"| {shape} | {workers} workers | {rows} | {cells} | {shown} |")
    return "\n".join(lines)


def _cells(step_s: float, floor_s: float | None, tokens_per_s: float) -> str:
    share = f"{100 * floor_s / step_s:.0f} %" if floor_s is not None else ""
    return f"{step_s * 1e3:.3f} | {share} | {tokens_per_s:.0f}"


def _errors(figures: dict[str, Any]) -> int:
    served = sum(s["errors"] for by_rows in figures.get("served", {}).values() for s in by_rows.values())
    return served + sum(c["errors"] for changes in figures.get("changes", {}).values() for c in changes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench cuda", description="Serving and layout changes on one GPU.")
    add = parser.add_argument
    add("--device", default="cuda:0", help="cuda, cuda:N; cpu tries the script itself")
    add("--shapes", type=names_of(SHAPES), default="llama-3-8b,smollm2-135m", help=f"of {', '.join(SHAPES)}")
    add("--workers", type=_counts, default="1,2,4", help="numbers of workers on the device")
    add("--dtype", default="bfloat16")
    add("--tokens", type=int, default=128, help="output tokens of a request")
    add("--changes", type=int, default=3, help="times there and back, for each number of workers")
    add("--settle", type=float, default=1.0, metavar="SECONDS", help="of load before a change begins")
    add("--kv-memory", default="4G", help="of each worker")
    add("--copy-bytes", type=int, default=COPY_BYTES, help="for the bandwidth")
    add("--no-reference", action="store_true", help="leave transformers out")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="after so long no further part begins")
    add("--out", type=Path, help="write the JSON here instead of to stdout")
    add("--reference", help=argparse.SUPPRESS)
    add("--copy", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("at least one worker")
    return counts


if __name__ == "__main__":
    sys.exit(main())
