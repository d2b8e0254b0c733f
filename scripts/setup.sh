# Create .venv with rmtool and its development dependencies, and activate it. Other scripts source this file from the
# root of the repository. PYTHON is the interpreter to use. It reinstalls only when constraints.txt or pyproject.toml
# changed.
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "rmtool needs Python 3.11 or newer; set PYTHON to its path" >&2; exit 2; }
    "${PYTHON:-python3}" -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
stamp=$(cat constraints.txt pyproject.toml | cksum)
if [ "$(cat .venv/rmtool-installed 2>/dev/null)" != "$stamp" ]; then
    echo "Installing rmtool into .venv (a few minutes the first time)"
    # torch first: pip would otherwise choose a different build to satisfy the other packages.
    torch=$(grep '^torch==' constraints.txt)
    python -m pip install --quiet --disable-pip-version-check "$torch"
    python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
    echo "$stamp" > .venv/rmtool-installed
fi
