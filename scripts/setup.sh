# Sourced by the other scripts, from the repository's root: an active .venv with rmtool and its tests' needs in it.
# PYTHON names the interpreter to make it with. Installs again only when the pins or the package's metadata changed.
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "rmtool needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 2; }
    "${PYTHON:-python3}" -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
stamp=$(cat constraints.txt pyproject.toml | cksum)
if [ "$(cat .venv/rmtool-installed 2>/dev/null)" != "$stamp" ]; then
    echo "Installing rmtool into .venv (a few minutes the first time)"
    # torch first and by itself: what follows would otherwise choose a build of its own.
    torch=$(grep '^torch==' constraints.txt)
    python -m pip install --quiet --disable-pip-version-check "$torch"
    python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
    echo "$stamp" > .venv/rmtool-installed
fi
