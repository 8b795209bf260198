"""The layer of the image that installs the dependencies: it is made before the code is there, and must satisfy setuptools all the same.

Without Docker: the copies and the command of that layer are done in a temporary folder, and setuptools builds its editable wheel there.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL = "&& bash -c '. scripts/env.sh && ensure_env'"
BUILD = "import setuptools.build_meta as backend; print(backend.build_editable('wheels'))"


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, without comments, each on one line as Docker reads it."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def skeleton(folder: Path) -> None:
    """What is there when the dependencies are installed."""
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target)
                else:
                    shutil.copy(ROOT / source, folder / target)
        if name == "RUN" and rest.endswith(INSTALL):
            command = rest.removesuffix(INSTALL).replace("python3 ", f"{sys.executable} ")
            subprocess.run(["sh", "-c", command], cwd=folder, check=True, timeout=60)
            return
    raise AssertionError("no RUN of the Dockerfile ends by installing the dependencies")


def test_dependencies_can_be_installed_before_the_code_is_there(tmp_path: Path) -> None:
    skeleton(tmp_path)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        assert (tmp_path / package.replace(".", "/") / "__init__.py").is_file(), package
    (tmp_path / "wheels").mkdir()
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert list((tmp_path / "wheels").glob("midflight-*.whl"))


def test_every_package_is_named() -> None:
    """A folder of modules that pyproject.toml does not name is missing where the project is installed."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {package.partition(".")[0] for package in packages}
    found = {path.parent.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")}
    assert {".".join(folder.parts) for folder in found} == set(packages)
