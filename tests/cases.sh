#!/bin/bash
# Runs every NN-*/run.sh of a folder of cases from the project's root and prints a line for each:
# RIGHT, FAULT, or needs (what it needs is missing here; nothing is installed), its name, and the
# last line that it printed. Exits with 1 if any is at fault.
cd "$(dirname "$0")/.." || exit 2
folder=${1:?the folder of cases}
python=${PY:-.venv/bin/python}
if [ ! -x "$python" ]; then
    echo "cases: $python is missing; run make quickstart or make test first"
    exit 2
fi
if [ ! -d "$folder" ]; then
    echo "cases: skipped, there is no folder $folder (set CASES to the one that holds them)"
    exit 0
fi
right=0 faults=0 skipped=0
for script in "$folder"/[0-9]*-*/run.sh; do
    [ -f "$script" ] || continue
    name=$(basename "$(dirname "$script")")
    printed=$(bash "$script" 2>&1 < /dev/null)
    code=$?
    last=$(printf '%s\n' "$printed" | tail -n 1)
    case "$code $last" in
        "0 RIGHT"*) verdict=RIGHT right=$((right + 1)) ;;
        "2 needs"*) verdict=needs skipped=$((skipped + 1)) ;;
        *) verdict=FAULT faults=$((faults + 1)) ;;
    esac
    printf '%-6s %-42s %s\n' "$verdict" "$name" "${last:0:120}"
done
echo "$right right, $faults at fault, $skipped not run for lack of something"
[ "$faults" -eq 0 ]
