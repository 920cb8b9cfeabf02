#!/bin/sh
# Create a virtual environment and install the project into it. Usage: setup.sh DIRECTORY EXTRA
# Works on a fresh Debian: a missing venv module is installed as root, else an error names its package.
set -eu
venv=$1
extra=$2
python=${PYTHON:-python3}

command -v "$python" >/dev/null || { echo "setup: $python not found: install Python 3.11 or newer" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) is too old, 3.11 or newer is needed; select one with PYTHON=python3.x" >&2; exit 1; }

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing python3-venv"
        apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    else
        echo "setup: Python's venv module is missing: run 'sudo apt-get install python3-venv', then run make again" >&2; exit 1
    fi
fi

# Also where pip is missing: this was interrupted while it made the environment, or Python is another one since.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
echo "setup: installing into $venv (about a minute, once)"
# In the environment, constraints also apply to build requirements; newer versions of pip use another variable for those.
PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
export PIP_CONSTRAINT PIP_BUILD_CONSTRAINT
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >"$venv/setup.log" 2>&1 || failed; }
failed() {
    {
        echo "setup: pip could not install the project with $("$venv/bin/python" --version):"
        grep -nE '^ *(ERROR|error):|^The conflict is caused by' "$venv/setup.log" | head -1 | cut -d: -f1 |
            { read -r first || first=1; tail -n "+$first" "$venv/setup.log"; } | grep -v '^ERROR: Ignored' | cut -c 1-300 | head -20
        echo "setup: the whole output of pip is in $venv/setup.log."
        echo "setup: if a package has no version for this Python, select another with PYTHON=python3.x after 'make clean', or report it;"
        echo "setup: if the package index could not be reached, see PIP_INDEX_URL, PIP_PROXY and PIP_CERT; then run make again."
    } >&2
    exit 1
}
pip install --use-pep517 -e ".[$extra]"
