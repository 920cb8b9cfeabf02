#!/bin/sh
# Make a virtual environment and install the project into it. Usage: setup.sh DIRECTORY
# Works on a fresh Debian: where the venv module is missing, it is installed (root) or asked for.
set -eu
venv=$1
python=${PYTHON:-python3}

command -v "$python" >/dev/null || { echo "setup: $python not found: install Python 3.11 or newer" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) is too old, 3.11 or newer is needed; name one with PYTHON=python3.x" >&2; exit 1; }

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing python3-venv"
        apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    else
        echo "setup: Python's venv module is missing: run 'sudo apt-get install python3-venv', then make again" >&2; exit 1
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "setup: installing into $venv (about a minute, once)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[dev]'
# xds-protos carries files of the same names, of an older OTLP; whoever is installed last wins.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps -c constraints.txt opentelemetry-proto
