#!/usr/bin/env bash
# Tries every family of models that transformers has, and runs every notebook at smoke scale, by its Colab cell, in throw-away
# environments: tests/compat.sh families colab lowest
#   families  in the environment that `make test` uses; writes book/families.inc
#   colab   what Colab's CPU image has (August 2026), and nothing besides but what the cell installs
#   lowest  the lowest versions that pyproject.toml allows, with what else notebooks need
# Needs Python 3.13 (colab) and 3.11 (lowest), a registry, and some GB: there, torch comes with CUDA. Not run by `make test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

requirements() {
    case $1 in
    colab) cat <<'PINS'
torch==2.11.0
transformers==5.15.0
huggingface_hub==1.27.0
numpy==2.1.3
pandas==2.2.3
pyarrow==18.1.0
scikit-learn==1.6.1
scipy
matplotlib
seaborn
statsmodels
pydantic
tqdm
filelock
psutil
joblib
safetensors
datasets
accelerate
wordcloud
plotly
ipykernel==6.17.1
ipywidgets==7.7.1
PINS
        ;;
    lowest) "$2" - <<'PY'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = [*project["dependencies"], *project["optional-dependencies"]["data"], *project["optional-dependencies"]["explore"],
         *project["optional-dependencies"]["people"]]
for line in lines:
    print(re.sub(r">=([\w.]+).*", r"==\1", line))
PY
        ;;
    *) echo "there is no environment $1: families, colab or lowest" >&2; exit 2 ;;
    esac
}

for kind in "$@"; do
    if [ "$kind" = families ]; then
        OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -p no:cacheprovider tests/every_family.py
        continue
    fi
    python=${PYTHON:-}
    [ "$kind" = colab ] && python=${PYTHON_COLAB:-python3.13}
    [ "$kind" = lowest ] && python=${PYTHON_LOWEST:-python3.11}
    venv=$root/.venv-$kind
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "[compat] $kind: installing into $(basename "$venv") …"
    requirements "$kind" "$venv/bin/python" > "$venv/requirements.txt"
    "$venv/bin/pip" install -q -r "$venv/requirements.txt" papermill
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    # what a Colab user has beside the notebook: the core and the paper's numbers
    cp clvq_core.py book/published_results.csv "$scratch"
    [ "$kind" = colab ] && export COLAB_RELEASE_TAG=compat
    "$venv/bin/python" -m ipykernel install --prefix "$scratch/kernels" --name python3 >/dev/null
    for notebook in notebooks/*.ipynb; do
        [ "$(basename "$notebook")" = 09_paper_scale.ipynb ] && continue
        start=$(date +%s)
        cp "$notebook" "$scratch"
        (cd "$scratch" && JUPYTER_PATH=$scratch/kernels/share/jupyter CLVQ_CACHE=$scratch/cache CLVQ_SCALE=smoke \
            "$venv/bin/papermill" --no-progress-bar -k python3 "$(basename "$notebook")" out.ipynb >log 2>&1) ||
            { echo "[compat] $kind: $notebook FAILED"; tail -n 40 "$scratch/log"; exit 1; }
        echo "[compat] $kind: $notebook done in $(($(date +%s) - start)) s"
    done
    unset COLAB_RELEASE_TAG
done
