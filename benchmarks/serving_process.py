"""One process of the serving benchmark: `python -m benchmarks.serving_process KIND`, for its parent.

Contestants that a person would write, and light load generators, each a process
of its own so that it takes nothing from what it measures but cores.

record-at-a-time  consumes the worker's topic, one row after another; prints one JSON object
http-at-a-time    the same as an HTTP service
echo              the second hop of a bare Kafka round trip
load              asks over a transport, open or closed loop; prints one JSON object
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

PARTITION_WAIT_S = 60.0


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"record-at-a-time": record_at_a_time, "http-at-a-time": http_at_a_time, "echo": echo, "load": load}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--store", default="feast", help="folder of the feature store, below FOLDER")
    parser.add_argument("--kafka")
    parser.add_argument("--triton")
    parser.add_argument("--topic")
    parser.add_argument("--port", type=int)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--transport", choices=TRANSPORTS, help="of load")
    parser.add_argument("--target", help="of load: HOST:PORT")
    parser.add_argument("--model", default="benchmark", help="of load")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s, open loop; 0: closed loop")
    parser.add_argument("--clients", type=int, default=32, help="of the closed loop")
    arguments = parser.parse_args()
    kinds[arguments.kind](arguments)


# What a person would write -----------------------------------------------------------------------


class AtATime:
    """Feature service, tower and head for one row, by the public clients of each."""

    def __init__(self, folder: Path, store: str, triton: str) -> None:
        import tritonclient.grpc as client

        from benchmarks import world
        from feature_store.definitions import open_store

        self._client, self._deployment = client, world.World(folder, "", "", contextlib.ExitStack()).deployment
        self._store = open_store(folder / store)
        self._service = self._store.get_feature_service(world.SERVICE)  # hoisted: per call it costs 20 times the read
        self._triton = client.InferenceServerClient(triton)
        self._lock = threading.Lock()  # one connection

    def predict(self, entity: str, request: Any, embedding: Any) -> float:
        """(r,) request slots, (d,) device embedding -> a probability."""
        from benchmarks.world import JOIN_KEY

        served = self._deployment
        with self._lock:
            found = self._store.get_online_features(self._service, [{JOIN_KEY: entity}]).to_dict()
        slots = served.server.slots(served.server.inputs({name: found[name] for name in served.server.names}))
        slots = np.concatenate([slots, request[None]], axis=1)
        server = self._infer(served.server_tower, {"slots": slots}, "embedding")
        return float(self._infer(served.head, {"server": server, "device": embedding[None]}, "prediction")[0, 0])

    def _infer(self, name: str, inputs: dict[str, Any], output: str) -> Any:
        tensors = []
        for key, values in inputs.items():
            tensors.append(self._client.InferInput(key, list(values.shape), "FP32"))
            tensors[-1].set_data_from_numpy(values)
        return self._triton.infer(name, tensors).as_numpy(output)


def record_at_a_time(arguments: argparse.Namespace) -> None:
    """Rows/s of the plain pipeline over the same topic."""
    import kafka

    from hybrid.messages import DeviceEmbeddings

    model = AtATime(arguments.folder, arguments.store, arguments.triton)
    consumer = kafka.KafkaConsumer(
        arguments.topic,
        bootstrap_servers=arguments.kafka,
        group_id=f"at-a-time-{time.time_ns()}",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    producer = kafka.KafkaProducer(bootstrap_servers=arguments.kafka)
    rows, begun = 0, 0.0
    for record in consumer:
        message = DeviceEmbeddings.from_bytes(record.value)
        for row in range(len(message)):
            prediction = model.predict(message.entity[row], message.request[row], message.embedding[row])
            answer = {"request_id": message.request_id[row].tobytes().hex(), "prediction": prediction}
            producer.send("at-a-time", json.dumps(answer).encode())
            begun = begun or time.perf_counter()  # after the first, which starts everything
            rows += 1
            if time.perf_counter() - begun > arguments.seconds:
                break
        else:
            consumer.commit()
            continue
        break
    producer.flush()
    print(json.dumps({"rows_per_s": (rows - 1) / (time.perf_counter() - begun)}))


def http_at_a_time(arguments: argparse.Namespace) -> None:
    """The plain pipeline behind HTTP, in a pool of threads."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    model = AtATime(arguments.folder, arguments.store, arguments.triton)
    names = model._deployment.request

    def answer(body: bytes) -> float:
        columns = {tensor["name"]: tensor["data"] for tensor in json.loads(body)["inputs"]}
        request = names.slots(names.inputs({"time": columns["time"]}))[0]
        return model.predict(columns["entity"][0], request, np.array(columns["device_embedding"], np.float32))

    async def infer(request: Request) -> JSONResponse:
        prediction = await run_in_threadpool(answer, await request.body())
        output = {"name": "prediction", "datatype": "FP32", "shape": [1], "data": [prediction]}
        return JSONResponse({"outputs": [output]})

    async def started() -> None:
        print("ready", flush=True)

    path = f"/v2/models/{model._deployment.model}/infer"

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        await started()
        yield

    app = Starlette(routes=[Route(path, infer, methods=["POST"])], lifespan=lifespan)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, access_log=False, log_level="warning")


def echo(arguments: argparse.Namespace) -> None:
    """Each record of TOPIC goes to TOPIC-reply as it is."""
    import kafka

    consumer = kafka.KafkaConsumer(bootstrap_servers=arguments.kafka, enable_auto_commit=False)
    place = kafka.TopicPartition(arguments.topic, 0)
    consumer.assign([place])
    consumer.seek_to_end(place)
    consumer.position(place)
    producer = kafka.KafkaProducer(bootstrap_servers=arguments.kafka, acks="all")
    producer.partitions_for(f"{arguments.topic}-reply")
    print("ready", flush=True)
    for record in consumer:
        producer.send(f"{arguments.topic}-reply", record.value, partition=0)


# Load --------------------------------------------------------------------------------------------

Ask = Callable[[int], Awaitable[bool]]  # the number of the request -> whether it was answered well


class _Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time; what a client library does beside that would cost more."""

    def __init__(self) -> None:
        self.open, self._got, self._left = False, b"", -1
        self._answer: asyncio.Future[bool] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport, self.open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._left < 0:
            head, found, rest = self._got.partition(b"\r\n\r\n")
            if not found:
                return
            self._left = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]) + len(self._got) - len(rest)
        if len(self._got) >= self._left and self._answer is not None and not self._answer.done():
            self._answer.set_result(self._got.startswith(b"HTTP/1.1 200"))

    def ask(self, request: bytes) -> asyncio.Future[bool]:
        """Whether it was answered well; to be awaited before the next."""
        self._got, self._left, self._answer = b"", -1, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self._transport.close()


@contextlib.asynccontextmanager
async def over_http(arguments: argparse.Namespace) -> Any:
    """Kept-alive connections."""
    from benchmarks.world import body

    rng = np.random.default_rng(1)
    loop = asyncio.get_running_loop()
    host, port = arguments.target.split(":")
    start = f"POST /v2/models/{arguments.model}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    requests = [f"{start}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in (body(rng) for _ in range(1000))]
    free: list[_Connection] = []

    async def ask(number: int) -> bool:
        connection = None
        while free and (connection is None or not connection.open):  # the server ends those that are idle for 5 s
            connection = free.pop()
        if connection is None or not connection.open:
            _, connection = await loop.create_connection(_Connection, host, int(port))
        good = await connection.ask(requests[number % len(requests)])
        free.append(connection)
        return good

    yield ask
    for connection in free:
        connection.close()


@contextlib.asynccontextmanager
async def over_grpc(arguments: argparse.Namespace) -> Any:
    """One channel, as Triton's own client has it, and requests that are built beforehand."""
    import grpc.aio
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    from benchmarks.world import EMBEDDING, body

    def request(document: Any) -> Any:
        built = pb.ModelInferRequest(model_name=arguments.model)
        for tensor in json.loads(document)["inputs"]:
            given = built.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
            if tensor["datatype"] == "BYTES":
                given.contents.bytes_contents.extend(text.encode() for text in tensor["data"])
            else:
                given.contents.fp32_contents.extend(tensor["data"])
        assert built.inputs[-1].shape == [1, EMBEDDING]
        return built

    rng = np.random.default_rng(1)
    requests = [request(body(rng)) for _ in range(1000)]
    async with grpc.aio.insecure_channel(arguments.target) as channel:
        gateway = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def ask(number: int) -> bool:
            try:
                answer = await gateway.ModelInfer(requests[number % len(requests)])
            except grpc.aio.AioRpcError:
                return False
            return len(answer.outputs) > 0

        yield ask


@contextlib.asynccontextmanager
async def over_triton(arguments: argparse.Namespace) -> Any:
    """Tower, then head, one row, straight to Triton: what no transport can beat."""
    import tritonclient.grpc.aio as client

    from benchmarks.world import EMBEDDING, World

    served = World(arguments.folder, "", "", contextlib.ExitStack()).deployment
    slots = np.zeros((1, len(served.server) + len(served.request)), np.float32)
    device = np.zeros((1, EMBEDDING), np.float32)

    def tensor(name: str, values: Any) -> Any:
        found = client.InferInput(name, list(values.shape), "FP32")
        found.set_data_from_numpy(values)
        return found

    async with client.InferenceServerClient(arguments.target) as triton:

        async def ask(_: int) -> bool:
            server = (await triton.infer(served.server_tower, [tensor("slots", slots)])).as_numpy("embedding")
            both = [tensor("server", server), tensor("device", device)]
            return (await triton.infer(served.head, both)).as_numpy("prediction").shape == (1, 1)

        yield ask


@contextlib.asynccontextmanager
async def over_kafka(arguments: argparse.Namespace) -> Any:
    """A bare round trip of two hops, through `echo`, with records as large as a request of one row."""
    import kafka

    from benchmarks.world import records

    loop, waiting, stopping = asyncio.get_running_loop(), {}, threading.Event()  # type: ignore[var-annotated]
    payload = records(1, 1, 0, 0)[0]
    consumer = kafka.KafkaConsumer(bootstrap_servers=arguments.kafka, enable_auto_commit=False)
    place = kafka.TopicPartition(f"{arguments.topic}-reply", 0)
    consumer.assign([place])
    consumer.seek_to_end(place)
    consumer.position(place)
    producer = kafka.KafkaProducer(bootstrap_servers=arguments.kafka, acks="all")
    producer.partitions_for(arguments.topic)

    def arrived(key: bytes) -> None:
        if key in waiting:
            waiting.pop(key).set_result(True)

    def read() -> None:
        while not stopping.is_set():
            for found in consumer.poll(timeout_ms=200).values():
                for record in found:
                    loop.call_soon_threadsafe(arrived, record.value[:8])

    async def ask(number: int) -> bool:
        key = number.to_bytes(8, "big")
        waiting[key] = loop.create_future()
        producer.send(arguments.topic, key + payload, partition=0)
        return bool(await waiting[key])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield ask
    stopping.set()
    thread.join()
    consumer.close()
    producer.close()


# A gateway's other fronts are added here, and to `benchmarks.serving.FRONTS`.
TRANSPORTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "http": over_http,
    "grpc": over_grpc,
    "triton": over_triton,
    "kafka": over_kafka,
}


def load(arguments: argparse.Namespace) -> None:
    """Asks for some seconds, after a tenth of that uncounted."""
    import gc

    import uvloop  # as uvicorn has it

    gc.disable()
    print(json.dumps(uvloop.run(_load(arguments))))


async def _load(arguments: argparse.Namespace) -> dict[str, Any]:
    async with TRANSPORTS[arguments.transport](arguments) as ask:
        run = _open_loop if arguments.rate else _closed_loop
        warm = argparse.Namespace(**vars(arguments) | {"seconds": max(2.0, arguments.seconds / 10)})
        await run(ask, warm)
        return await run(ask, arguments)


async def _well(ask: Ask, number: int) -> bool:
    """Whether it was answered, and well; a broken connection or ten seconds of silence are not."""
    try:
        async with asyncio.timeout(10):
            return await ask(number)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


async def _open_loop(ask: Ask, arguments: argparse.Namespace) -> dict[str, Any]:
    """Latency from when a request was due, however late the one before it was: no coordinated omission."""
    count = max(1, int(arguments.rate * arguments.seconds))
    begun = time.perf_counter() + 0.01
    taken, errors = np.full(count, np.nan), 0

    async def one(number: int, due: float) -> None:
        nonlocal errors
        errors += not await _well(ask, number)
        taken[number] = time.perf_counter() - due

    tasks = []
    for number in range(count):
        due = begun + number / arguments.rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(number, due)))
    await asyncio.gather(*tasks)
    p50, p99 = 1e3 * np.percentile(taken, [50, 99])
    return {"requests": count, "errors": errors, "p50_ms": float(p50), "p99_ms": float(p99)}


async def _closed_loop(ask: Ask, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each client asks again as soon as it is answered."""
    end, answered, errors = time.perf_counter() + arguments.seconds, 0, 0

    async def client(number: int) -> None:
        nonlocal answered, errors
        while time.perf_counter() < end:
            good = await _well(ask, number + arguments.clients * answered)
            answered, errors = answered + good, errors + (not good)

    begun = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(arguments.clients)))
    return {"requests_per_s": answered / (time.perf_counter() - begun), "requests": answered, "errors": errors}


if __name__ == "__main__":
    main()
