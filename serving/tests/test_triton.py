import math
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from hybrid.errors import Unavailable
from serving.connection import TritonAddress
from serving.triton import Triton


class Doubling(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Triton's gRPC service over loopback: fails with the statuses it is given, then doubles its input."""

    def __init__(self):
        self.failures, self.calls, self.delay_s = [], 0, 0.0

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelInfer(self, request, context):
        self.calls += 1
        time.sleep(self.delay_s)
        if self.failures:
            context.abort(self.failures.pop(0), "told to fail")
        values = 2 * np.frombuffer(request.raw_input_contents[0], np.float32)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=request.model_version)
        answer.outputs.add(name="y", datatype="FP32", shape=request.inputs[0].shape)
        answer.raw_output_contents.append(values.tobytes())
        return answer


@pytest.fixture
def server():
    service, server = Doubling(), grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None).wait()


def double(triton, until_s=math.inf):
    return triton.infer("m", 3, {"x": np.array([[1, 2]], np.float32)}, "y", until_s).tolist()


def test_a_call_gives_the_output_and_retries_only_what_is_unavailable(server):
    """UNAVAILABLE twice, then an answer: three calls."""
    server.failures = [grpc.StatusCode.UNAVAILABLE] * 2
    with Triton(TritonAddress(server.address)) as triton:
        assert triton.ready
        assert double(triton) == [[2.0, 4.0]]
    assert server.calls == 3


def test_any_other_failure_is_not_tried_again(server):
    """INVALID_ARGUMENT would fail again."""
    server.failures = [grpc.StatusCode.INVALID_ARGUMENT] * 2
    with Triton(TritonAddress(server.address)) as triton, pytest.raises(Unavailable, match="INVALID_ARGUMENT"):
        double(triton)
    assert server.calls == 1


def test_all_retries_together_stay_within_the_time_limit(server):
    """A server that is always unavailable is given up after 0.2 s."""
    server.failures = [grpc.StatusCode.UNAVAILABLE] * 1000
    started = time.monotonic()
    with Triton(TritonAddress(server.address), timeout_s=0.2) as triton, pytest.raises(Unavailable):
        double(triton)
    assert time.monotonic() - started < 2


def test_a_server_that_does_not_answer_is_given_up(server):
    """Half a second is longer than 0.1 s."""
    server.delay_s = 0.5
    with (
        Triton(TritonAddress(server.address), timeout_s=0.1) as triton,
        pytest.raises(Unavailable, match="DEADLINE_EXCEEDED"),
    ):
        double(triton)


def test_a_call_ends_when_nobody_waits_for_it_any_more(server):
    """0.1 s are left of 30: a server that takes half a second is given up, one that is unavailable not tried on."""
    with Triton(TritonAddress(server.address), timeout_s=30) as triton:
        assert double(triton, time.monotonic() + 30) == [[2.0, 4.0]]
        server.delay_s, started = 0.5, time.monotonic()
        with pytest.raises(Unavailable, match="DEADLINE_EXCEEDED"):
            double(triton, time.monotonic() + 0.1)
        server.delay_s, server.failures = 0.0, [grpc.StatusCode.UNAVAILABLE] * 1000
        with pytest.raises(Unavailable):
            double(triton, time.monotonic() + 0.1)
        assert time.monotonic() - started < 10


def test_a_call_for_which_no_time_is_left_is_not_made(server):
    """The server is not asked at all."""
    with Triton(TritonAddress(server.address)) as triton, pytest.raises(Unavailable, match="no time is left"):
        double(triton, time.monotonic())
    assert server.calls == 0


def test_a_server_that_is_not_there_is_not_ready():
    """Port 1 of the loopback listens to nobody."""
    with Triton(TritonAddress("127.0.0.1:1"), timeout_s=0.5) as triton:
        assert not triton.ready
        with pytest.raises(Unavailable):
            double(triton)
