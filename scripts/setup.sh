#!/bin/sh
# Make .venv from uv.lock. Needs python3 >= 3.11 and a package index; no pip, no venv module, no root.
#   UV       a uv to use; else one on PATH; else one is fetched into .uv
#   PYTHON3  the interpreter to build on (default: python3)
set -eu
cd "$(dirname "$0")/.."
python3=${PYTHON3:-python3}

"$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $python3 is $("$python3" -V 2>&1 || echo missing); sievit needs Python 3.11 or newer (make PYTHON3=/path/to/python3.11 ...)" >&2
    exit 1
}

fetch_uv() { # into .uv, for this checkout alone: by pip where there is one, else by the standard library
    "$python3" -m pip --version >/dev/null 2>&1 &&
        "$python3" -m pip install --quiet --disable-pip-version-check --no-input --target .uv --upgrade uv >&2 &&
        return
    "$python3" scripts/get_uv.py .uv >&2
}

if [ -z "${UV:-}" ]; then
    UV=$(command -v uv || true)
    # a shim (pyenv) can be on PATH with no uv behind it
    if [ -z "$UV" ] || ! "$UV" --version >/dev/null 2>&1; then
        UV=.uv/bin/uv
        [ -x "$UV" ] || fetch_uv
    fi
fi

# uv's cache lies in the home directory; some accounts have none that can be written
[ -n "${UV_CACHE_DIR:-}" ] || { mkdir -p "${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/uv" 2>/dev/null &&
    [ -w "${XDG_CACHE_HOME:-$HOME/.cache}/uv" ]; } || export UV_CACHE_DIR=.uv/cache

# uv brings its own certificates; the machine's also know a company's proxy
system_certs=/etc/ssl/certs/ca-certificates.crt
[ -n "${SSL_CERT_FILE:-}" ] || [ ! -f "$system_certs" ] || export SSL_CERT_FILE="$system_certs"

export UV_PROJECT_ENVIRONMENT=.venv
exec "$UV" sync --frozen --python "$python3"
