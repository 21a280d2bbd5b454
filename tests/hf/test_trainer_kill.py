"""kill -9 at ten random steps, some of them inside the writing of a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_bit_for_bit_as_one_left_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "kill_run.py"), str(tmp_path), "11"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("killed at step") == 10
    assert done.stdout.count("inside write") == 4
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("out/adapter.safetensors", "checkpoint-20/optimizer.pt", "metrics.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    logged, evaluated = [*range(3, 21, 3)], [*range(4, 21, 4)]
    assert [json.loads(line)["step"] for line in lines] == sorted(logged + evaluated)
    history = [
        [
            {k: v for k, v in e.items() if not k.endswith(("_runtime", "_per_second"))}
            for e in json.loads((f / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
        ]
        for f in (whole, killed)
    ]
    assert history[0] == history[1]
