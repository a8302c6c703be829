"""Scripts in processes of their own, with the checkout importable as `threedr1`; alone or on two ranks."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PRELUDE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("threedr1", {init!r}, submodule_search_locations=[{root!r}])
sys.modules["threedr1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["threedr1"])
"""


def run_script(path: Path, code: str, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Write a script to `path` and run it, by torchrun where there are several ranks."""
    path.write_text(_PRELUDE.format(init=str(ROOT / "__init__.py"), root=str(ROOT)) + textwrap.dedent(code))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
