"""tools/bench_checkpoint.py runs, on one rank and on several. Its figures mean something on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_row_of_the_table_has_its_time(ranks, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    flags = [f"--model.{key}={value}" for key, value in TINY.items()]
    flags += ["--train.device=cpu", "--data.tokens_per_row=64", "--data.max_seqlen=32", f"--folder={tmp_path}"]
    out = subprocess.run(
        [sys.executable, *launch, ROOT / "tools" / "bench_checkpoint.py", *flags],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    assert f"CPU x {ranks}, torch" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == [
        "memory",
        "dd write",
        "save 1",
        "save 2",
        "dd read",
        "verify",
        "verify, load",
    ]
    assert all(float(row[1]) >= 0 for row in rows[2:])
    assert [row[3].endswith("%") for row in rows[2:]] == [False, False, True, True, False, True, True]
    assert [row[4] != "-" for row in rows[2:]] == [False, False, True, True, False, False, False]
    assert not list(tmp_path.iterdir())
