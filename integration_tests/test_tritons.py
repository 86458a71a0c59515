"""Real Tritons of one name, as the pods of a headless Service are: calls go to all of them, and round one that ends."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import numpy as np
import pytest

from hybrid.export.triton import export
from hybrid.network import Network
from hybrid.spec import load_model
from integration_tests.conftest import TritonServer
from integration_tests.documents import ROOT
from serving.connection import TritonAddress
from serving.triton import Triton

NETWORK = Network.build(load_model(ROOT / "examples" / "coupon" / "model.py"), seed=1)


class Together(TritonAddress):
    """Both of them: a test has no DNS to give two addresses to a name, but gRPC takes a list of them as well."""

    place = ("127.0.0.1", 0)


class Calls:
    """Calls of the head, one after another, until it is left; each must be answered."""

    def __init__(self, *tritons: TritonServer) -> None:
        self.count = 0
        self._client = Triton(Together("ipv4:" + ",".join(each.grpc for each in tritons)))
        self._inputs = {
            "server": np.ones((1, NETWORK.server_embedding), np.float32),
            "device": np.ones((1, NETWORK.device_embedding), np.float32),
        }
        self._went_on, self._ended = threading.Event(), threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(30)
        self._client.__exit__()
        if self._failed is not None:
            raise self._failed

    def more(self, count: int) -> None:
        """Until so many more were answered, or one was not."""
        wanted = self.count + count
        while self.count < wanted and self._thread.is_alive():
            self._went_on.clear()
            self._went_on.wait(10)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._client.infer("coupon_head", 1, self._inputs, "prediction")
            except Exception as error:
                self._failed = error
                return
            finally:
                self._went_on.set()
            self.count += 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the version that `NETWORK` is."""
    folder = tmp_path_factory.mktemp("tritons")
    export(NETWORK, 1, folder)
    return folder


@pytest.fixture(scope="module")
def one(triton: Callable[[Path], TritonServer], models: Path) -> TritonServer:
    return triton(models)


def answered(triton: TritonServer) -> int:
    """Calls of the head that it says it answered."""
    said = httpx.get(f"http://{triton.http}/v2/models/coupon_head/stats").json()
    return said["model_stats"][0]["inference_stats"]["success"]["count"]


def test_calls_go_in_turn_to_all_tritons_of_a_name(
    one: TritonServer, triton: Callable[[Path], TritonServer], models: Path
):
    """Of 200 each answers 100, but for those that went to the one that was connected first."""
    other, before = triton(models), answered(one)
    with Calls(one, other) as calls:
        calls.more(200)
    shares = answered(one) - before, answered(other)
    assert sum(shares) == calls.count
    assert min(shares) >= 0.4 * calls.count


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=["told", "killed"])
def test_no_call_is_lost_while_one_of_two_tritons_ends(
    one: TritonServer, triton: Callable[[Path], TritonServer], models: Path, ending: signal.Signals
):
    """What went to it is asked of the other one, which answers half of the first hundred and nearly all of the rest."""
    other, before = triton(models), answered(one)
    with Calls(one, other) as calls:
        calls.more(100)
        os.kill(other.pid, ending)
        calls.more(300)
    assert answered(one) - before >= 0.75 * calls.count
