"""TorchRec as an oracle: its row-wise sharding and row-wise Adagrad over two processes, against a table over ranks.

`make test-tools` puts TorchRec into a folder of its own, `.torchrec`, because it would bring another build of torch.
"""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_processes


SCRIPT = Path(__file__).parent / "run_torchrec.py"
FOLDER = Path(__file__).resolve().parents[2] / ".torchrec"
ROWS, WIDTH, STEPS = 101, 8, 5


def test_a_table_over_ranks_trains_as_torchrec_does(tmp_path, monkeypatch):
    if not FOLDER.exists():
        pytest.skip("needs TorchRec in .torchrec; make test-tools installs it and runs this test")
    monkeypatch.syspath_prepend(str(FOLDER))
    ran = run_processes([sys.executable, "-c", "import torchrec"])
    if ran.returncode:
        pytest.skip(f"TorchRec does not load with torch {torch.__version__}: {ran.stderr.splitlines()[-1]}")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator)
    steps = [
        # Each process has another number of tokens, some of them alike.
        [
            (torch.randint(0, ROWS, (n,), generator=generator), torch.randn(n, WIDTH, generator=generator))
            for n in (7 + step, 31)
        ]
        for step in range(STEPS)
    ]
    torch.save({"rows": rows, "steps": steps}, tmp_path / "data.pt")
    found = {}
    for way in ("torchrec", "engram"):
        ran = run_processes([sys.executable, SCRIPT, tmp_path, way])
        assert ran.returncode == 0, ran.stderr[-3000:]
        first, second = (torch.load(tmp_path / f"{way}{rank}.pt") for rank in range(2))
        assert torch.equal(first, second)
        found[way] = first
    torch.testing.assert_close(found["engram"], found["torchrec"], rtol=0, atol=1e-6)
    # A step moves a row by up to the learning rate; the same rows have moved.
    moved = [(each != rows).any(1) for each in found.values()]
    assert torch.equal(*moved) and 50 < int(moved[0].sum()) < ROWS
    assert float((found["engram"] - rows).abs().max()) > 0.3
