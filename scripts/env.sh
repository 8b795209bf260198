# Sourced by the other scripts: makes and updates the virtual environment, and says where it is.
#
# How it works: a stamp file per extra holds a hash of everything that decides what is installed
# (pyproject.toml, constraints.txt, this file, the Python and torch asked for). While the stamp fits, pip is not
# started at all. Everything that writes happens under a lock on .venv/.lock, so two scripts may start at once.
#
# MIDFLIGHT_VENV    use this environment as it is; nothing is created or installed
# MIDFLIGHT_PYTHON  the Python to build .venv from (default: the first of python3, python3.14 ... that will do)
# MIDFLIGHT_TORCH   cpu | cuda | system | a version such as 2.11.0+cu129 (default: chosen as docs/operations.md says)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${MIDFLIGHT_VENV:-$ROOT/.venv}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf 'midflight: %s\n' "$*" >&2; }
die() { printf 'midflight: error: %s\n' "$*" >&2; exit 1; }

# ensure_env [EXTRA ...]: afterwards $VENV/bin/python runs the project with these extras installed.
ensure_env() {
    if [ -n "${MIDFLIGHT_VENV:-}" ]; then
        [ -x "$VENV/bin/python" ] || die "MIDFLIGHT_VENV=$VENV has no bin/python"
        export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
        return
    fi
    local want python extra
    want=$(_fingerprint)
    if _fits "$want" base "$@"; then return; fi
    python=$(_find_python) || exit 1
    mkdir -p "$VENV" || die "cannot create $VENV"
    exec 9>"$VENV/.lock"
    # The lock belongs to the open file, not to the process that takes it: it is ours until descriptor 9 is closed.
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || die "cannot lock $VENV/.lock"
    if ! _fits "$want" base "$@"; then
        _make_venv "$python"
        _install "$(IFS=,; printf '%s' "$*")"
        for extra in base "$@"; do printf '%s\n' "$want" >"$VENV/.stamp-$extra"; done
    fi
    exec 9>&-
}

# _fits FINGERPRINT EXTRA ...
_fits() {
    local want=$1 extra
    [ -x "$VENV/bin/python" ] || return 1
    shift
    for extra in "$@"; do
        [ -f "$VENV/.stamp-$extra" ] && [ "$(cat "$VENV/.stamp-$extra")" = "$want" ] || return 1
    done
}

_fingerprint() {
    { cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" "$ROOT/scripts/env.sh"
      printf '%s|%s|%s' "$ROOT" "${MIDFLIGHT_TORCH:-}" "${MIDFLIGHT_PYTHON:-}"; } | cksum
}

_find_python() {
    local candidate version found=""
    for candidate in ${MIDFLIGHT_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found="$found $candidate is $version,"
        elif ! "$candidate" -c 'import ensurepip, venv, fcntl' 2>/dev/null; then
            found="$found $candidate is $version but lacks venv (Debian: apt install python$version-venv),"
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    found=${found%,}
    die "needs Python 3.11 or newer with venv; found:${found:- none}. Install one" \
        "(apt install python3.11-venv, brew install python, or python.org), or name it in MIDFLIGHT_PYTHON"
}

_make_venv() {
    local python=$1 flags=() kind
    # One that works is kept, whoever made it; it only lacks pip when it was made by other tools.
    if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
            "$VENV/bin/python" -m ensurepip >"$VENV/install.log" 2>&1 || _failed "installing pip"
        return
    fi
    case ${MIDFLIGHT_TORCH:-auto} in
        system) flags=(--system-site-packages) ;;
        auto) if _is_base "$python" && [ -n "$(_torch_of "$python")" ]; then flags=(--system-site-packages); fi ;;
    esac
    kind=${flags[0]:+, on top of the packages that it has}
    say "creating $VENV with $("$python" -c 'import sys; print("Python", sys.version.split()[0])')$kind"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    "$python" -m venv ${flags[0]+"${flags[@]}"} "$VENV" >"$VENV/install.log" 2>&1 || _failed "python -m venv"
}

# Whether an environment made from this interpreter can see its packages; one made from a venv cannot.
_is_base() { "$1" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' 2>/dev/null; }

# The version of a torch that this interpreter has and that is new enough, or nothing.
_torch_of() {
    "$1" - 2>/dev/null <<'PY'
from importlib.metadata import version
found = version("torch")
print(found if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) >= (2, 11) else "", end="")
PY
}

_install() {
    local extras=$1 torch
    say "installing${extras:+ with [$extras]} (a first time takes a few minutes; log in $VENV/install.log)"
    _pip "setuptools" || _failed "installing setuptools"
    _install_torch
    torch=$(_torch_of "$VENV/bin/python") || true
    [ -n "$torch" ] || die "the torch in $VENV is older than 2.11 or broken; remove $VENV and try again"
    { grep -v -E '^torch==' "$ROOT/scripts/constraints.txt"; printf 'torch==%s\n' "$torch"; } >"$VENV/constraints.txt"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-build-isolation -c "$VENV/constraints.txt" \
        -e "$ROOT${extras:+[$extras]}" >>"$VENV/install.log" 2>&1 || _failed "installing the project"
}

_install_torch() {
    local want=${MIDFLIGHT_TORCH:-auto} pinned
    pinned=$(sed -n 's/^torch==//p' "$ROOT/scripts/constraints.txt")
    if [ "$want" = auto ]; then
        if [ -n "$(_torch_of "$VENV/bin/python")" ]; then return; fi
        if [ "$(uname -s)" = Linux ] && ! _has_cuda; then want=cpu; else want=$pinned; fi
    fi
    case $want in
        system) [ -n "$(_torch_of "$VENV/bin/python")" ] ||
            die "MIDFLIGHT_TORCH=system, but the Python beneath has no torch >= 2.11" ;;
        cpu)
            say "installing torch $pinned for the CPU"
            # Where a mirror or a local folder has the CPU build, it is there; else torch's own index has it.
            _pip "torch==$pinned+cpu" ||
                _pip --timeout 20 --retries 1 --extra-index-url "$TORCH_CPU_INDEX" "torch==$pinned+cpu" ||
                { say "no CPU build within reach, taking the general one (large)"; _pip "torch==$pinned"; } ||
                _failed "installing torch $pinned" ;;
        cuda)
            say "installing torch $pinned with CUDA (large)"
            _pip "torch==$pinned" || _failed "installing torch $pinned" ;;
        *)
            say "installing torch $want"
            _pip "torch==$want" || _failed "installing torch $want" ;;
    esac
}

_has_cuda() { [ -e /proc/driver/nvidia/version ] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; }

# Installs with every pin but torch's.
_pip() {
    grep -v -E '^torch==' "$ROOT/scripts/constraints.txt" >"$VENV/constraints.txt"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$VENV/constraints.txt" "$@" \
        >>"$VENV/install.log" 2>&1
}

_failed() {
    tail -n 15 "$VENV/install.log" >&2
    die "$1 failed; the whole log is $VENV/install.log"
}
