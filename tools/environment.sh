# Sourced by quickstart.sh and test.sh: .venv with the package in it.

install_captioner() { # install_captioner [EXTRAS]
    if [ ! -x .venv/bin/python ]; then
        local python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or later is needed, found $("$python" --version 2>&1);" \
                "set PYTHON to one" >&2
            return 1
        }
        "$python" -m venv .venv || {
            echo "error: $python can't make virtual environments; on Debian and Ubuntu:" \
                "apt install python3-venv" >&2
            rm -rf .venv
            return 1
        }
    fi
    echo "installing into .venv (torch takes a few minutes the first time)" >&2
    .venv/bin/python -m pip install --quiet --editable ".${1:+[$1]}"
}
