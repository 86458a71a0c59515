"""How long an inference takes in a browser: the bundle's ONNX programs in this machine's Chromium."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.local import web
from hybrid.local.page import PageServer
from hybrid.local.process import default_cache

_MEASURE = """
async ({ bundle, trust, blocks }) => {
    const begun = performance.now();
    const hybrid = await import("/index.js");
    hybrid.useRuntime("/ort-wasm-simd-threaded.wasm");
    const bytes = Uint8Array.from(atob(bundle), (letter) => letter.charCodeAt(0));
    const { manifest, programs } = await hybrid.readBundle(bytes, await hybrid.trustedKey(trust));
    const inputs = manifest.features.inputs(new Map(manifest.features.names.map((name) => [name, null])));
    const server = new Float32Array(manifest.server_embedding);
    const embed = await hybrid.EmbedProgram.load({ manifest, programs });
    await embed.embed(inputs);
    const first_ms = performance.now() - begun;
    const predict = await hybrid.PredictProgram.load({ manifest, programs });
    return {
        first_ms,
        embed_us: await hybrid.measure(() => embed.embed(inputs), blocks),
        predict_us: await hybrid.measure(() => predict.predict(inputs, server), blocks),
    };
}
"""


def browser_inference(bundle: bytes, trust: str, *, blocks: int = 50, cache: Path | None = None) -> dict[str, Any]:
    """Measures one row through "embed.onnx" and "predict.onnx" in a tab.

    Args:
        bundle: that holds both.
        trust: PEM of the key that signed it.
        blocks: of a hundred runs each that are timed, after as many that are not.
        cache: where the browser device is built; None: the default.

    Returns:
        "browser", "version"; "first_ms" from the import of the library to the first embedding, the WebAssembly fetched
        from this machine; "embed_us" and "predict_us", each with "p50" and "p99" of the blocks' means, and "runs";
        "javascript_bytes" and "wasm_bytes" of what a page loads.

    Raises:
        ConfigError: the machine has no Chromium.
    """
    from playwright.sync_api import sync_playwright

    executable = web.chromium()
    if executable is None:
        raise ConfigError(f"one of {', '.join(web.CHROMIUMS)} must be on the PATH; on Debian: apt-get install chromium")
    dist = web.install(cache or default_cache(), print) / "dist"
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox is not for root
    given = {"bundle": base64.b64encode(bundle).decode(), "trust": trust, "blocks": blocks}
    with sync_playwright() as playwright, _served(dist) as url:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        try:
            page = browser.new_page()
            page.goto(f"{url}config.json")
            measured: dict[str, Any] = page.evaluate(_MEASURE, given)
            version = browser.version
        finally:
            browser.close()
    sizes = {
        f"{kind}_bytes": sum(file.stat().st_size for file in dist.glob(pattern))
        for kind, pattern in (("javascript", "*.js"), ("wasm", "*.wasm"))
    }
    return {"browser": "Chromium", "version": version, **measured, **sizes}


@contextmanager
def _served(dist: Path) -> Iterator[str]:
    with PageServer(0, dist, {}, lambda: None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()
