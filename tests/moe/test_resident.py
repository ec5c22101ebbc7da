"""Opening and running a model whose experts are larger than what is allowed takes no more memory than was said."""

import json
import subprocess
import sys
from pathlib import Path

from undercroft.bench.peers_model import PeerShape, write_checkpoint
from undercroft.units import MIB

SHAPE = PeerShape(layers=2, experts=64, used=2, hidden=512, intermediate=1536, vocabulary=256)
BUDGET = 32 * MIB
SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import Qwen3MoeForCausalLM
from undercroft.moe.load import load_moe

def bytes_of(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

before = bytes_of("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_moe(sys.argv[1], budget=int(sys.argv[2]))
with torch.no_grad():
    for token in range(4):
        model(torch.arange(token, token + 16)[None])
dense = sum(each.nbytes for each in model.parameters() if each.device.type != "meta")
print(json.dumps({"taken": bytes_of("VmHWM") - before, "dense": dense}))
"""


def test_memory_is_the_dense_weights_the_budget_and_little_more(tmp_path: Path) -> None:
    write_checkpoint(SHAPE, tmp_path / "model", lambda layer: None)
    experts = 2 * SHAPE.elements
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(BUDGET)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    allowed = found["dense"] + BUDGET + 300 * MIB
    assert experts > 1.5 * allowed  # or it would show nothing
    assert found["taken"] <= allowed
