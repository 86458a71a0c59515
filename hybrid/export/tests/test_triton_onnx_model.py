import os
import select
import signal
import subprocess
import sys

CHILD = """
import sys, threading, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
from hybrid.export.triton_onnx_model import end_with_parent
end_with_parent()
print("ready", flush=True)
threading.Event().wait()
"""
PARENT = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
threading.Event().wait()
"""


def test_a_backend_process_does_not_outlive_a_killed_server():
    """Its parent is killed by SIGKILL; nothing of the backend's own runs here, and it ends within seconds."""
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        child = os.pidfd_open(int(server.stdout.readline()))
        assert server.stdout.readline() == "ready\n"
        assert not select.select([child], [], [], 0)[0]
        server.send_signal(signal.SIGKILL)
    assert select.select([child], [], [], 30)[0], "it is still there"
    os.close(child)
