#!/usr/bin/env bash
# The documentation as a site, in build/site; a broken link or a missing anchor is an error.
#
#   bash script/docs.sh                  build/site/index.html
#   bash script/docs.sh serve            shows it under http://127.0.0.1:8000/, and again after every change
#
# mkdocs-material is installed on the first run, into .venv; into another interpreter (THREEDR1_PYTHON) nothing is
# installed.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ! "$PY" -c 'import material, mkdocs' 2>/dev/null; then
    pin="$(grep -o 'mkdocs-material==[0-9.]*' setup.py)"
    [[ "$PY" == "$ROOT/.venv/bin/python" ]] || fail "$PY lacks mkdocs-material; install it there: pip install '$pin'."
    echo "docs: installing $pin"
    "$PY" -m pip install --disable-pip-version-check "$pin"
fi

# The repository's shape with nothing in it but what pages are made of, and what they link to.
pages="build/docs"
rm -rf "$pages"
mkdir -p "$pages"/{data,benchmarks,script}
ln -s "$ROOT"/{README.md,CHANGELOG.md,CONTRIBUTING.md,LICENSE,docs} "$pages"
ln -s "$ROOT/data/README.md" "$pages/data/README.md"
ln -s "$ROOT/benchmarks/RESULTS.md" "$pages/benchmarks/RESULTS.md"
ln -s "$ROOT/script/recipes" "$pages/script/recipes"
NO_MKDOCS_2_WARNING=1 "$PY" -m mkdocs "${@:-build}"
