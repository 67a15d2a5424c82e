# Make the virtual environment in .venv and install onebase with the extra named in $1. Sourced by the other scripts.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "onebase needs Python 3.11 or newer; install it, or set PYTHON to its path" >&2
  exit 1
fi

if [ ! -x .venv/bin/python ]; then
  echo "making a virtual environment in .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
. .venv/bin/activate
# torch comes first and with a version: an open range may pull a build with gigabytes of GPU libraries.
# Set ONEBASE_TORCH to choose another build, e.g. one for your GPU.
python -c 'import torch' 2>/dev/null || python -m pip install -q "${ONEBASE_TORCH:-torch==2.13.0}"
python -m pip install -q -e ".[$1]"
