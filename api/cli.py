"""The command line: `midflight serve | layout | workers | plan | bench | simulate | pull | chat`.

Only parsing happens here, and nothing heavy is imported before a command is known, so that `--help` is instant. This is
the entry point: the one place that reads the environment (`MIDFLIGHT_HOME`, `MIDFLIGHT_API_KEY`, `MIDFLIGHT_ADMIN_KEY`,
`MIDFLIGHT_URL`, and `MIDFLIGHT_COMMAND`, by which a script says how this command line is reached). A mistake on the command line is one line and exit code 2; a failure later is exit code 1.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from api.config import (
    AUTOPILOT_MODES,
    DTYPES,
    IMPLEMENTATIONS,
    LOAD_FORMATS,
    LOG_LEVELS,
    LOOK_AHEAD,
    OBJECTIVES,
    QUANTIZE,
    SIMULATED_POLICIES,
    STRATEGIES,
    ServeConfig,
)

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DEFAULT_URL = "http://127.0.0.1:8000"
_ROOT = Path(__file__).parents[1]
"""Of the checkout, where the project is installed from one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    line = sys.argv[1:] if arguments is None else list(arguments)
    if line[:1] == ["bench"]:
        return _bench(line[1:], os.environ)  # all that follows is the script's, its --help as well
    parser = build_parser()
    options = parser.parse_args(line)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return _COMMANDS[options.command](options, os.environ)
    except KeyboardInterrupt:
        return 130


def parse_serve(arguments: Sequence[str], environment: Mapping[str, str]) -> ServeConfig:
    """The configuration for ``serve ARGUMENTS``. Raises `SystemExit` (2) for a mistake in them."""
    return _serve_config(build_parser().parse_args(["serve", *arguments]), environment)


# -- commands ------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    config = replace(_serve_config(options, environment), command=_command(environment))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or TensorPipe warns of every worker that leaves
    os.environ.setdefault("NUMBA_CACHE_DIR", str(config.home / "numba"))  # the planner's loops, as a worker's kernels
    from api.head import run_head

    code = run_head(config)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is closed; to take torch apart module by module would need seconds


def _pull(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from api.pull import DEFAULT_MODEL, KNOWN_MODELS, PullError, pull

    name = options.name or DEFAULT_MODEL
    if name not in KNOWN_MODELS:
        _fail(f"unknown model {name!r}; known by name: {', '.join(sorted(KNOWN_MODELS))}", code=2)
    try:
        folder = pull(name, _home(environment), lambda line: print(line, file=sys.stderr, flush=True))
    except PullError as error:
        _fail(str(error))
    print(folder)
    return 0


def _layout(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from api.layouts import change_layout, show_layout

    url, key = _url(options, environment), environment.get("MIDFLIGHT_ADMIN_KEY", "")
    if options.wish is not None:
        return change_layout(url, key, {**options.wish, **_change_options(options)}, not options.no_wait, options.json)
    if _change_options(options) or options.no_wait:
        _fail("layout: say which layout is wanted, as 11,19, or leave the options of a change out", code=2)
    return show_layout(url, key, options.json)


def _workers(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from api.layouts import drain_worker, resume_worker, show_workers

    url, key = _url(options, environment), environment.get("MIDFLIGHT_ADMIN_KEY", "")
    if options.action == "drain":
        return drain_worker(url, key, options.name, _change_options(options), not options.no_wait, options.json)
    if options.action == "resume":
        return resume_worker(url, key, options.name, options.json)
    return show_workers(url, key, options.json)


def _change_options(options: argparse.Namespace) -> dict[str, object]:
    """What was said about how to change; the server knows the defaults."""
    names = ("strategy", "queue", "deadline_s", "bytes_per_s")
    said = {name: getattr(options, name) for name in names}
    return {name: value for name, value in said.items() if value is not None and value is not False}


def _chat(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from api.client import chat

    parameters = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
    return chat(_url(options, environment), environment.get("MIDFLIGHT_API_KEY", ""), options.system, parameters)


def _plan(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from api.plan_text import set_autopilot, show_plan

    url, key = _url(options, environment), environment.get("MIDFLIGHT_ADMIN_KEY", "")
    if options.autopilot is not None:
        return set_autopilot(url, key, options.autopilot, options.json)
    return show_plan(url, key, options.json)


def _simulate(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from api.simulate import simulate

    os.environ.setdefault("NUMBA_CACHE_DIR", str(_home(environment) / "numba"))
    return simulate(options)


def _bench(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Become ``scripts/bench ARGUMENTS``, in the environment that this runs in."""
    script = _ROOT / "scripts" / "bench"
    if not script.is_file():
        _fail(
            "the benchmarks are not installed with midflight: they are scripts/bench of a checkout of its sources. Run that, "
            "or install from there, pip install -e CHECKOUT, for `midflight bench` to find it"
        )
    variables = dict(environment)
    if sys.prefix != sys.base_prefix:
        variables.setdefault("MIDFLIGHT_VENV", sys.prefix)
    os.execve(script, [str(script), *arguments], variables)


_COMMANDS = {
    "simulate": _simulate,
    "serve": _serve,
    "pull": _pull,
    "layout": _layout,
    "workers": _workers,
    "plan": _plan,
    "chat": _chat,
}


# -- parsing -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="midflight", description="Serve a large language model over a pipeline of workers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _add_serve(commands.add_parser("serve", help="start the head and its workers", formatter_class=_Help))
    pull = commands.add_parser("pull", help="fetch a model that needs no hub")
    pull.add_argument("name", nargs="?", metavar="NAME", help="a known model; the default model when left out")
    layout = commands.add_parser("layout", help="show which worker serves which layers, or change it")
    layout.add_argument(
        "wish",
        nargs="?",
        type=_wish,
        metavar="LAYOUT",
        help="the layout wanted: layers per stage, as 11,19, or worker and layers, as w1:0-12,w0:12-30",
    )
    _add_url(layout)
    _add_change(layout)
    workers = commands.add_parser("workers", help="show the workers, drain one, or take it back")
    _add_url(workers)
    actions = workers.add_subparsers(dest="action", metavar="drain|resume", parser_class=_Parser)
    drain = actions.add_parser("drain", help="move everything off a worker, and leave it idle")
    drain.add_argument("name", metavar="NAME")
    _add_url(drain, is_inner=True)
    _add_change(drain)
    resume = actions.add_parser("resume", help="let a drained worker have layers again")
    resume.add_argument("name", metavar="NAME")
    _add_url(resume, is_inner=True)
    plan = commands.add_parser("plan", help="show which layout the planner would choose and why, or set the autopilot")
    _add_url(plan)
    plan.add_argument(
        "--autopilot", choices=AUTOPILOT_MODES, default=None, help="switch it: off, advise (say), on (act)"
    )
    commands.add_parser("bench", help="run a benchmark of the checkout, with its arguments; alone: which there are")
    _add_simulate(commands.add_parser("simulate", help="a trace on devices that are not there", formatter_class=_Help))
    chat = commands.add_parser("chat", help="talk to a running server")
    _add_url(chat, json=False)
    chat.add_argument("--system", default="", metavar="TEXT", help="a system message to begin with")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--max-tokens", type=_positive, default=None, help="of an answer; default: what fits the context")
    chat.add_argument("--seed", type=int, default=None)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, "", 0, False, (), argparse.SUPPRESS)
        return action.help if plain else super()._get_help_string(action)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder in Hugging Face form, or a name known to `midflight pull`")
    add("--served-model-name", default="", metavar="NAME", help="the name that clients use; default: the folder's")
    add("--load-format", choices=LOAD_FORMATS, default="safetensors", help="dummy: random weights from a config alone")
    add("--dtype", choices=DTYPES, default="auto")
    add("--device", default="auto", help="auto, cpu or cuda")
    add(
        "--device-tensors",
        action="store_true",
        help="let local workers on CUDA hand large hidden states from device to device, not by way of the host",
    )
    add("--implementation", choices=IMPLEMENTATIONS, default="auto", help="of the decoder layers")
    add(
        "--quantize",
        choices=QUANTIZE,
        default="",
        help="hold weights in 8 bits: faster for few requests at once, less memory; Llama-like models on the CPU",
    )

    group = parser.add_argument_group("pipeline")
    add = group.add_argument
    add("--stages", type=_positive, default=None, metavar="N", help="stages of the pipeline; default: 2")
    add("--layers", type=_layers, default=(), metavar="19,11", help="layers per stage; default: balanced by cost")
    add(
        "--local-workers",
        type=_natural,
        default=None,
        metavar="N",
        help="workers to start here; default: one per stage",
    )
    add("--no-local-workers", action="store_true", help="start none here: all of them join from elsewhere")
    add(
        "--threads",
        type=_natural,
        default=0,
        metavar="N",
        help="compute threads per local worker; default: cores / workers",
    )
    add(
        "--pace",
        action="append",
        default=[],
        metavar="DEVICES",
        help="emulate slower devices: one per local worker, as a100,l40s (none: as it is); or prefill=1.0,decode=2.4"
        " (factors) or read=0.005,token=0.0001,name=a100 (seconds a layer), the option once for each worker",
    )
    add("--rpc-host", default="127.0.0.1", metavar="HOST", help="where workers meet the head")
    add("--rpc-port", type=_port, default=0, metavar="PORT", help="default: a free one")
    add(
        "--allow-public-rpc",
        action="store_true",
        help="let --rpc-host be public: RPC neither authenticates nor encrypts",
    )

    group = parser.add_argument_group("scheduling and memory")
    add = group.add_argument
    add(
        "--kv-memory",
        type=_size,
        default=0,
        metavar="SIZE",
        help="KV pages per worker, as 512M or 2GiB; default: a share of what is free",
    )
    add(
        "--memory-fraction",
        type=_share,
        default=0.5,
        metavar="X",
        help="that share, over all workers of a host; the rest is for weights that arrive and workers that join",
    )
    add("--block-size", type=_natural, default=0, metavar="TOKENS", help="of KV; default: 16, on CUDA 256")
    add(
        "--max-context",
        type=_natural,
        default=0,
        metavar="TOKENS",
        help="prompt and output together; default: the model's",
    )
    add("--max-running", type=_positive, default=256, metavar="N", help="sequences computed at once")
    add("--max-queue", type=_positive, default=1024, metavar="N", help="sequences that may wait; more get 429")
    add("--step-tokens", type=_positive, default=512, metavar="N", help="tokens in one step of a microbatch, at most")
    add(
        "--microbatches",
        type=_natural,
        default=0,
        metavar="N",
        help="in flight; default: enough to keep every stage busy",
    )
    add(
        "--tpot-goal",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="between two tokens of a stream: prompts are read in chunks that small; default: no goal",
    )
    add(
        "--look-ahead",
        choices=LOOK_AHEAD,
        default="auto",
        help="send a step before the tokens that it reads are back: never; idle: when the stages would have nothing to do "
        "otherwise; always. Default: always on accelerators, idle beside local workers on CPUs",
    )
    add("--no-prefix-cache", action="store_true", help="compute every prompt in full")

    group = parser.add_argument_group("planning")
    add = group.add_argument
    add(
        "--autopilot",
        choices=AUTOPILOT_MODES,
        default="off",
        help="advise: say which layout would be better; on: change to it",
    )
    add("--objective", choices=OBJECTIVES, default="throughput", help="what a better layout is better at")
    add("--slo-ttft", type=_seconds, default=2.0, metavar="SECONDS", help="to the first token, for the goodput")
    add("--slo-tpot", type=_seconds, default=0.1, metavar="SECONDS", help="per further token, for the goodput")
    add("--elastic", action="store_true", help="let the autopilot use no more workers than the load needs")
    add(
        "--scale-command",
        default="",
        metavar="COMMAND",
        help="run by the shell when another number of workers is wanted, with MIDFLIGHT_WORKERS_WANTED set",
    )

    group = parser.add_argument_group("HTTP")
    add = group.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=_port, default=8000, help="0: a free one")
    add(
        "--api-key",
        default=None,
        metavar="KEY",
        help="wanted under /v1; better in MIDFLIGHT_API_KEY, where ps cannot see it",
    )
    add("--admin-key", default=None, metavar="KEY", help="wanted under /admin and on /; better in MIDFLIGHT_ADMIN_KEY")
    add("--max-body", type=_size, default=8 << 20, metavar="BYTES", help="the largest request body, as 8M")
    add("--drain-timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for running requests, after SIGTERM")
    add("--log-level", choices=LOG_LEVELS, default="info")


def _serve_config(options: argparse.Namespace, environment: Mapping[str, str]) -> ServeConfig:
    if options.layers and options.stages not in (None, len(options.layers)):
        _fail(f"--layers gives {len(options.layers)} stages, --stages {options.stages}; leave one out", code=2)
    num_stages = len(options.layers) or options.stages or 2
    if options.no_local_workers and options.local_workers:
        _fail(f"--no-local-workers contradicts --local-workers {options.local_workers}; leave one out", code=2)
    if options.quantize and options.implementation == "transformers":
        _fail("--quantize is for the lean layers, not for --implementation transformers; leave one out", code=2)
    if options.quantize and options.device.startswith("cuda"):
        _fail(f"--quantize is for the CPU, not for --device {options.device}; leave one out", code=2)
    num_local = 0 if options.no_local_workers else options.local_workers
    paces = _paces(options.pace, num_stages if num_local is None else num_local)
    return ServeConfig(
        model=options.model,
        home=_home(environment),
        served_model_name=options.served_model_name,
        num_stages=num_stages,
        layers=options.layers,
        num_local_workers=num_stages if num_local is None else num_local,
        num_threads=options.threads,
        paces=paces,
        host=options.host,
        port=options.port,
        rpc_host=options.rpc_host,
        rpc_port=options.rpc_port,
        allow_public_rpc=options.allow_public_rpc,
        dtype=options.dtype,
        device=options.device,
        device_tensors=options.device_tensors,
        load_format=options.load_format,
        implementation=options.implementation,
        quantize=options.quantize,
        kv_memory=options.kv_memory,
        memory_fraction=options.memory_fraction,
        block_size=options.block_size,
        max_context=options.max_context,
        max_running=options.max_running,
        max_queue=options.max_queue,
        step_tokens=options.step_tokens,
        num_microbatches=options.microbatches,
        look_ahead=options.look_ahead,
        prefix_cache=not options.no_prefix_cache,
        tpot_goal_s=options.tpot_goal,
        autopilot=options.autopilot,
        objective=options.objective,
        slo_ttft_s=options.slo_ttft,
        slo_tpot_s=options.slo_tpot,
        elastic=options.elastic,
        scale_command=options.scale_command,
        api_key=options.api_key if options.api_key is not None else environment.get("MIDFLIGHT_API_KEY", ""),
        admin_key=options.admin_key if options.admin_key is not None else environment.get("MIDFLIGHT_ADMIN_KEY", ""),
        max_body_bytes=options.max_body,
        drain_timeout_s=options.drain_timeout,
        log_level=options.log_level,
    )


def _paces(texts: Sequence[str], num_workers: int) -> tuple[str, ...]:
    """What every local worker emulates."""
    if not texts:
        return ()
    from runtime.pace import parse_paces

    try:
        paces = parse_paces(texts)
    except ValueError as error:
        _fail(f"--{error}", code=2)
    if len(paces) != num_workers:
        _fail(f"--pace is for {len(paces)} workers, {num_workers} are started here; give one for each, or none", code=2)
    return paces


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", required=True, metavar="a100:2,l40s:4", help="the devices, by their names in the device table")
    add("--model", required=True, metavar="NAME", help="a shipped shape such as llama-3-70b, or a folder with a config")
    add(
        "--trace",
        required=True,
        metavar="FILE",
        help="CSV (Azure's columns, or arrival_s,prompt_tokens,output_tokens), or made up, as"
        " poisson:rate=2,prompt=512,output=128,duration=300 (phases joined by +; cv=1 for lognormal lengths)",
    )
    add("--policy", choices=SIMULATED_POLICIES, default="static", help="who decides on the layout")
    add("--elastic", action="store_true", help="the autopilot uses no more devices than the load needs")
    add("--layout", default="", metavar="a100:30,l40s:50", help="the first; default: the planner's for the mean load")
    add("--objective", choices=("throughput", "latency", "goodput"), default="throughput", help="of the planner")
    add("--slo-ttft", type=_seconds, default=2.0, metavar="SECONDS", help="to the first token")
    add("--slo-tpot", type=_seconds, default=0.1, metavar="SECONDS", help="per further token, in mean")
    add(
        "--window", type=_span, default=300.0, metavar="SECONDS", help="how often the oracle plans; rows of windows.csv"
    )
    add("--paid-changes", action="store_true", help="the oracle's changes cost what others' do; default: nothing")
    add("--json", action="store_true", help="print JSON")
    add("--out", type=Path, default=None, metavar="FOLDER", help="write JSON, CSV and plots there")

    group = parser.add_argument_group("load")
    add = group.add_argument
    add("--requests", type=_natural, default=0, metavar="N", help="only the first N of the trace")
    add("--duration", type=_seconds, default=0.0, metavar="SECONDS", help="only the trace's beginning")
    add("--rate-scale", type=_span, default=1.0, metavar="X", help="let requests come X times as fast")
    add("--concurrency", type=_natural, default=0, metavar="N", help="N clients, instead of the trace's arrival times")
    add("--limits", action="store_true", help="clients set max_tokens to what they get, and the autopilot sees it")
    add("--seed", type=_natural, default=0, metavar="N", help="of a trace that is made up, and of noise")

    group = parser.add_argument_group("server and hosts")
    add = group.add_argument
    add("--step-tokens", type=_positive, default=512, metavar="N", help="tokens in one step, at most")
    add("--max-running", type=_positive, default=256, metavar="N", help="sequences computed at once")
    add("--max-queue", type=_positive, default=1024, metavar="N", help="sequences that may wait")
    add("--block-size", type=_positive, default=16, metavar="TOKENS")
    add("--microbatches", type=_natural, default=0, metavar="N", help="in flight; default: stages of the first layout")
    add(
        "--kv-memory",
        type=_size,
        default=0,
        metavar="SIZE",
        help="KV pages per worker; default: a share of what is free",
    )
    add(
        "--memory-fraction",
        type=_share,
        default=0.9,
        metavar="X",
        help="that share; layers that arrive take it from the pages",
    )
    add(
        "--load-rate", type=_size, default=2 << 30, metavar="SIZE", help="bytes of weights that a host reads per second"
    )
    add(
        "--noise", type=_seconds, default=0.0, metavar="X", help="spread of stage times (standard deviation of the log)"
    )


def _add_url(parser: argparse.ArgumentParser, *, json: bool = True, is_inner: bool = False) -> None:
    """`is_inner`: the command around it has the same options, and a default here would undo what was said there."""
    what = f"the server; default: MIDFLIGHT_URL or {_DEFAULT_URL}"
    parser.add_argument("--url", default=argparse.SUPPRESS if is_inner else None, help=what)
    if json:
        no = argparse.SUPPRESS if is_inner else False
        parser.add_argument("--json", action="store_true", default=no, help="print the server's JSON")


def _add_change(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("changing")
    add = group.add_argument
    add("--strategy", choices=STRATEGIES, default=None, help="default: live; the others are for comparison")
    add("--queue", action="store_true", help="behind a change that is under way, instead of being refused")
    add(
        "--deadline",
        dest="deadline_s",
        type=_seconds,
        default=None,
        metavar="SECONDS",
        help="abort when nothing has flipped by then",
    )
    add(
        "--rate",
        dest="bytes_per_s",
        type=_size,
        default=None,
        metavar="SIZE",
        help="of the KV snapshot per second, over all workers; default: as their load allows",
    )
    add("--no-wait", action="store_true", help="print the id and leave")


def _url(options: argparse.Namespace, environment: Mapping[str, str]) -> str:
    url = (options.url or environment.get("MIDFLIGHT_URL") or _DEFAULT_URL).rstrip("/")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        _fail(f"--url: {url!r} is no address; one looks like {_DEFAULT_URL}", code=2)
    return url


def _command(environment: Mapping[str, str]) -> str:
    """How a user reaches this command line: as a script says, by its name, by its path, or as a module."""
    program = environment.get("MIDFLIGHT_COMMAND") or sys.argv[0]
    if Path(program).name != "midflight":
        return f"{shlex.quote(sys.executable)} -m api.cli"
    return "midflight" if shutil.which("midflight") == program else shlex.quote(program)


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("MIDFLIGHT_HOME") or "~/.cache/midflight").expanduser()


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"midflight: {message}", file=sys.stderr)
    raise SystemExit(code)


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return int(text)


def _positive(text: str) -> int:
    if (value := _natural(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def _port(text: str) -> int:
    if (value := _natural(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port; they end at 65535")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no sensible number of seconds")
    return value


def _span(text: str) -> float:
    if not (value := _seconds(text)):
        raise argparse.ArgumentTypeError("it must be more than 0")
    return value


def _share(text: str) -> float:
    if not 0.0 < (value := _seconds(text)) < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share; it is between 0 and 1")
    return value


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or (size := int(float(match["number"]) * _UNITS[match["unit"].lower()])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one looks like 512M or 2GiB")
    return size


def _layers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer counts; one looks like 19,11")
    counts = tuple(map(int, parts))
    if any(count == 0 for count in counts[1:-1]):
        raise argparse.ArgumentTypeError(
            f"{text!r} has a stage without a layer; only the first and the last may be empty"
        )
    return counts


def _wish(text: str) -> dict[str, object]:
    """``11,19`` or ``w1:0-12,w0:12-30`` as the body of a request; the server checks that it fits."""
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdigit() for part in parts):
        return {"layers": [int(part) for part in parts]}
    stages = []
    for part in parts:
        match = re.fullmatch(r"(\S+):(\d{1,9})-(\d{1,9})", part, re.ASCII)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no stage; a layout looks like 11,19 or w1:0-12,w0:12-30 (the end is not included)"
            )
        stages.append({"worker": match[1], "layers": [int(match[2]), int(match[3])]})
    return {"stages": stages}


if __name__ == "__main__":
    raise SystemExit(main())
