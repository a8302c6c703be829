#!/usr/bin/env bash
# pyright over the checkout under its import name: in a temporary folder, `threedr1` is a link to the checkout.
# From inside the checkout pyright would take our `datasets` folder for Hugging Face's library.
#
#   bash script/typecheck.sh [FILES]     files relative to the checkout; default: everything except tests/
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
ln -s "$ROOT" "$folder/threedr1"
"$PY" - "$folder" "$PY" "$@" <<'PYTHON_CODE'
import json, pathlib, subprocess, sys

folder, python, *files = sys.argv[1:]
version = subprocess.check_output(
    [python, "-c", "import sys; print('.'.join(map(str, sys.version_info[:2])))"], text=True
).strip()
settings = {
    "include": [f"threedr1/{name}" for name in files] or ["threedr1"],
    "exclude": ["**/.*", *(f"threedr1/{name}" for name in ("tests", "runs", "data", "build", "dist"))],
    "pythonVersion": version,
    "typeCheckingMode": "basic",
    "reportMissingImports": "error",
    "reportMissingModuleSource": "none",
}
pathlib.Path(folder, "pyrightconfig.json").write_text(json.dumps(settings))
PYTHON_CODE
cd "$folder"
"$PY" -m pyright --pythonpath "$PY" --level error | sed "s|$folder/threedr1/||g"
