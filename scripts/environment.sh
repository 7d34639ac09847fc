# Sourced by ./demo and ./test: finds a Python, installs what the system lacks, makes a virtual environment.
# shellcheck shell=bash

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# The path of the first interpreter of at least 3.11 that can make a virtual environment. The path printed is the
# interpreter's own: what stands on PATH may be a wrapper that takes longer to start than Python itself.
find_python() {
    local name
    for name in python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.14; do
        command -v "$name" >/dev/null || continue
        "$name" -I - 2>/dev/null <<'PYTHON' && return
import ensurepip, os, sys, venv
if sys.version_info < (3, 11):
    sys.exit(1)
print(os.path.realpath(sys._base_executable))
PYTHON
    done
    return 1
}

# need COMMAND:PACKAGE…: install those Debian packages whose command is missing, in one go; services among them are
# not started.
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} = 0 ] && return
    without_services install_packages "${missing[@]}"
}

# without_services COMMAND…: packages that COMMAND installs ask this program whether they may start (deb-policy-rc.d).
without_services() {
    local policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ] || [ "$(id -u)" != 0 ]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap "rm -f $policy" EXIT
    "$@"
    rm -f "$policy"
    trap - EXIT
}

install_packages() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing: $*; install them first (Debian: apt-get install $*)" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# make_environment FOLDER: an empty virtual environment; sets $python to its interpreter.
make_environment() {
    local base
    if ! base=$(find_python); then
        install_packages python3 python3-venv
        base=$(find_python) || { echo "no Python of at least 3.11 with venv found" >&2; exit 1; }
    fi
    python=$1/bin/python
    [ -x "$python" ] && [ "$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')" = "$base" ] ||
        "$base" -m venv --clear "$1"
}
