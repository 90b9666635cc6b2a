#!/usr/bin/env bash
# Prints the path of a Python interpreter that really runs: scripts/find_python.sh [VERSION...]
# Without versions: the first supported one. Prints nothing and fails if there is none.
set -euo pipefail

# pyenv puts shims on PATH for versions that are not selected: such a shim exists but does not run.
runs_as() { # INTERPRETER VERSION
    [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$2" ]
}

candidates() { # VERSION
    echo "python$1"
    if command -v pyenv >/dev/null; then
        local root version
        root=$(pyenv root)
        for version in $(pyenv versions --bare | grep "^$1\." | sort -rV); do
            echo "$root/versions/$version/bin/python"
        done
    fi
    echo python3
}

[ $# -gt 0 ] || set -- 3.11 3.12 3.10 3.13
for version in "$@"; do
    for candidate in $(candidates "$version"); do
        if runs_as "$candidate" "$version"; then
            # The interpreter itself, so that it stays the same in a folder where pyenv chooses another.
            "$candidate" -c 'import sys; print(sys.executable)'
            exit 0
        fi
    done
done
exit 1
