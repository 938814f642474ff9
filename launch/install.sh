# Sourced by the scripts: makes or updates the virtual environment, installs dsjax with the extras in $1, and puts it
# first in PATH. Quick when nothing has changed. Call it from the repository's root.
#
#   PYTHON       the interpreter to make the environment with (default: python3)
#   DSJAX_VENV   where the environment lies (default: .venv in the repository; else an absolute path)

dsjax_venv=${DSJAX_VENV:-$PWD/.venv}
dsjax_stamp=$dsjax_venv/installed-$1

dsjax_names() { # dsjax_names FILE PLACE: FILE is not there, or holds the path of PLACE, whichever of several
    [ ! -f "$1" ] || [ "$(cat "$1")" -ef "$2" ]
}

# Programs in it name the place where it was made: a copy or a checkout that was moved needs one of its own.
if ! dsjax_names "$dsjax_venv/made-at" "$dsjax_venv"; then
    rm -rf -- "$dsjax_venv"
fi
# Without the system's venv package, Python makes an environment that lacks pip, and fails.
if [ ! -x "$dsjax_venv/bin/python" ] || [ ! -x "$dsjax_venv/bin/pip" ]; then
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
        echo "dsjax: ${PYTHON:-python3} is not Python 3.11, 3.12 or 3.13; name one with PYTHON=..." >&2
        exit 2
    fi
    echo "making a virtual environment in $dsjax_venv"
    "${PYTHON:-python3}" -m venv "$dsjax_venv" || exit 1
    echo "$dsjax_venv" > "$dsjax_venv/made-at" || exit 1
elif [ -n "${PYTHON:-}" ]; then
    echo "using the virtual environment in $dsjax_venv; remove it to make one with $PYTHON"
fi
# Two checkouts may share one, which runs the code of the one that came last.
if ! dsjax_names "$dsjax_venv/installed-from" "$PWD" || ! cat setup.cfg pyproject.toml | cmp -s - "$dsjax_stamp"; then
    echo "installing dsjax[$1], which takes a few minutes the first time"
    "$dsjax_venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".[$1]" || exit 1
    echo "$PWD" > "$dsjax_venv/installed-from" || exit 1
    cat setup.cfg pyproject.toml > "$dsjax_stamp" || exit 1
fi
export PATH="$dsjax_venv/bin:$PATH"
