import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, typeguard
from pathlib import Path
checked = typeguard.typechecked
from feature_store.definitions import open_store
open_store(Path(sys.argv[1]))
print("torch" in sys.modules, typeguard.typechecked is checked)
from feast.torch_wrapper import get_torch
print(get_torch().__name__)
"""


def test_a_process_that_reads_features_carries_no_torch(tmp_path: Path):
    """Though torch is installed here; who asks Feast for tensors would still get it, and typeguard is as it was."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["False True", "torch"]
