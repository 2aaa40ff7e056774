#!/bin/sh
# Prints a Python that megatron-core runs on (3.12 or later): python3 as .python-version makes it, else
# python3.13 or python3.12 on PATH.
set -u
for candidate in python3 python3.12 python3.13; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null &&
        { "$candidate" -c 'import sys; print(sys.executable)'; exit 0; }
done
seen=$(python3 --version 2>&1 || echo none)
echo "error: no Python 3.12 or 3.13 found (python3 is: $seen); megatron-core 0.19 needs one. Install it" >&2
echo "(for example 'apt-get install python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12')" >&2
echo "so that python3.12 is on PATH, and run make again." >&2
exit 2
