"""NVIDIA Triton on this machine: the server binary of the nvidia-pytriton wheel, in an environment of its own.

That binary's Python backend silently corrupts tensors under NumPy 2, which the
rest of the product needs; so it runs with NumPy 1.26 and ONNX Runtime from a
virtual environment that holds nothing else.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from hybrid.errors import StackError
from hybrid.local.process import Service, http_ok

VERSION = "2.51.0"  # of the server in nvidia-pytriton 0.7.0; `/v2` says the same

_REQUIREMENTS = Path(__file__).with_name("triton-requirements.txt")
# Byte code written beside a `model.py` would look like a changed model, and load it a second time.
_SITECUSTOMIZE = "import sys\n\nsys.dont_write_bytecode = True\n"
_NEWEST_PYTHON = (3, 12)  # for which NumPy 1.26 has wheels
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def install(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Makes the server's environment in `<cache>/triton-<VERSION>`, unless it is there.

    The Python backend needs a shared `libpython`. Where the running Python has
    none, or is too new for NumPy 1.26, uv brings a Python of its own into `cache`.

    Returns:
        The folder of the environment.

    Raises:
        StackError: it cannot be made; says what uv said.
    """
    folder, marker = _environment(cache), _environment(cache) / "installed"
    wanted = hashlib.sha256(_REQUIREMENTS.read_bytes() + _SITECUSTOMIZE.encode()).hexdigest()
    if marker.is_file() and marker.read_text() == wanted:
        return folder
    say(f"Installing NVIDIA Triton {VERSION} into {folder} (120 MB to download, 290 MB on disk) ...")
    cache.mkdir(parents=True, exist_ok=True)
    version = sys.version_info[:2]
    _uv(cache, "venv", "--quiet", "--clear", *_python(version, shared=_has_shared_library(version)), str(folder))
    _uv(cache, "pip", "install", "--quiet", "--no-deps", "--python", str(folder), "-r", str(_REQUIREMENTS))
    site = _site_packages(folder)
    server, python = site / "pytriton/tritonserver", site.parent.name.removeprefix("python")
    shutil.copy2(
        server / f"python_backend_stubs/{python}/triton_python_backend_stub",
        server / "backends/python/triton_python_backend_stub",
    )
    (site / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    marker.write_text(wanted)
    return folder


def service(
    cache: Path,
    repository: Path,
    *,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    shared_memory: str,
    options: Sequence[str] = (),
) -> Service:
    """The server over one model repository, on 127.0.0.1 only, in plaintext, for anybody.

    It looks at the repository every second, so a version promoted later is
    served without a restart. It is ready when every model is.

    Args:
        cache: where `install` made the environment.
        repository: of models; may be empty.
        http_port: of the Open Inference Protocol over HTTP.
        grpc_port: of the same over gRPC.
        metrics_port: of metrics in Prometheus's format.
        shared_memory: prefix of its files in /dev/shm, for this server alone: they
            are removed before it starts and after its end, since a killed one leaves them.
        options: more of Triton's: TLS, say.

    Raises:
        StackError: Triton is not installed there.
    """
    folder = _environment(cache)
    if not (folder / "installed").is_file():
        raise StackError(f"NVIDIA Triton {VERSION} is not in {cache}: run `python -m hybrid.local install`")
    site = _site_packages(folder)
    server = site / "pytriton/tritonserver"

    def forget() -> None:
        remove_shared_memory(shared_memory)

    return Service(
        name="triton",
        command=[
            str(server / "bin/tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={server / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={shared_memory}",
            "--disable-auto-complete-config",
            "--model-control-mode=poll",
            "--repository-poll-secs=1",
            "--http-address=127.0.0.1",
            f"--http-port={http_port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={grpc_port}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={metrics_port}",
            "--exit-timeout-secs=3",
            "--log-format=ISO8601",
            *options,
        ],
        ready=http_ok(f"http://127.0.0.1:{http_port}/v2/health/ready"),
        ports={"triton-http": http_port, "triton-grpc": grpc_port, "triton-metrics": metrics_port},
        environment=_variables(folder),
        prepare=forget,
        cleanup=forget,
    )


def remove_shared_memory(prefix: str) -> None:
    """Removes the files in /dev/shm that a killed server left."""
    for file in _SHARED_MEMORY.glob(f"{prefix}*"):
        file.unlink(missing_ok=True)


def _environment(cache: Path) -> Path:
    return cache / f"triton-{VERSION}"


def _site_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python3.*/site-packages"))


def _variables(folder: Path) -> dict[str, str]:
    """What makes the backend's Python processes, which ignore Python's own variables, use the environment."""
    libraries = (folder / "bin/python").resolve().parents[1] / "lib"
    found = [str(libraries)] if any(libraries.glob("libpython3.*.so*")) else []
    return {
        "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join([*found, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
    }


def _python(version: tuple[int, int], *, shared: bool) -> list[str]:
    """Arguments for uv that choose a Python with a shared library, for which NumPy 1.26 has wheels."""
    if shared and version <= _NEWEST_PYTHON:
        return ["--python", sys.executable]
    return ["--managed-python", "--python", ".".join(map(str, _NEWEST_PYTHON))]


def _has_shared_library(version: tuple[int, int]) -> bool:
    """Whether the loader finds `libpython` of this version, or the running Python has it beside itself."""
    name = "python{}.{}".format(*version)
    beside = Path(str(sysconfig.get_config_var("LIBDIR")), f"lib{name}.so.1.0")
    return beside.is_file() or ctypes.util.find_library(name) is not None


def _uv(cache: Path, *arguments: str) -> None:
    import uv

    places = {"UV_PYTHON_INSTALL_DIR": str(cache / "python")}
    done = subprocess.run(
        [uv.find_uv_bin(), *arguments], capture_output=True, text=True, check=False, env={**os.environ, **places}
    )
    if done.returncode:
        raise StackError(
            f"NVIDIA Triton's environment could not be made with `uv {' '.join(arguments)}`: {done.stderr.strip()}\n"
            "It needs Python 3.11 or 3.12 with its shared library (on Debian and Ubuntu the package libpython3.11 or "
            "libpython3.12); where the running Python is not that, uv must be able to download one"
        )
