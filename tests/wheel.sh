#!/bin/bash
# Builds the wheel and tries it as a user would: in a fresh environment outside the checkout, with
# the torch that pip chooses (on Linux a build for CUDA, whether or not there is a GPU).
set -euo pipefail
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
say() { printf '\n== %s\n' "$*"; }

say "wheel"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$work/dist" "$root"
"$work/venv/bin/pip" install --quiet "$work"/dist/tokenratio-*.whl
cd "$work"
export PATH="$work/venv/bin:$PATH" HF_HUB_OFFLINE=1
python - <<'PY'
import torch, transformers, tokenratio
assert "/venv/" in tokenratio.__file__, tokenratio.__file__
print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, "
      f"accelerator usable: {torch.accelerator.is_available()}; "
      f"transformers {transformers.__version__}")
PY

say "--help of every command, in milliseconds"
tokenratio --help > /dev/null  # bytecode is written once
for command in "" $(tokenratio --help | sed -n 's/^  \([a-z][a-z-]*\) .*/\1/p'); do
    started=$(date +%s%N)
    # shellcheck disable=SC2086 - the first one is no command
    tokenratio $command --help > help.txt
    grep -q '^usage: tokenratio' help.txt
    printf '%-14s%6d\n' "${command:-tokenratio}" $((($(date +%s%N) - started) / 1000000))
done
python -m tokenratio --version
if tokenratio train none.yaml 2> error.txt; then
    echo "a recipe that does not exist was trained"
    exit 1
fi
cat error.txt
test "$(wc -l < error.txt)" = 1

say "a recipe"
python - <<'PY'
import json
words = "ash bay cow dew elm fig gum hay ivy jam kin log".split()
with open("pairs.jsonl", "w") as file:
    for i in range(24):
        said = [words[(i * k + k) % 12] for k in range(1, 6)]
        row = {"prompt": " ".join(said[:2]), "chosen": " ".join(said), "rejected": said[-1]}
        print(json.dumps(row), file=file)
PY
cat > recipe.yaml <<'YAML'
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
  num_attention_heads: 2}
tokenizer: {byte_level_bpe: 300}
train_dataset: pairs.jsonl
eval_dataset: pairs.jsonl
sft: {num_train_epochs: 1}
max_length: 64
learning_rate: 1.0e-3
output_dir: runs/recipe
YAML
tokenratio train recipe.yaml --dry-run > /dev/null
tokenratio train recipe.yaml
tokenratio generate runs/recipe --prompts pairs.jsonl --max_new_tokens 8

say "quickstart"
tokenratio quickstart

say "report, with the templates and scripts of the wheel"
tokenratio report runs/quickstart/tbpo_a --format md
if tokenratio report runs/quickstart/tbpo_a 2> error.txt; then
    echo "a report without plotly was written"
    exit 1
fi
cat error.txt
"$work/venv/bin/pip" install --quiet plotly
tokenratio report runs/quickstart/tbpo_a
test "$(wc -c < report.html)" -gt 4000000
say "the wheel works"
