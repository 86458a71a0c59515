// Bundles the library (index.js) and the page (app.js) into `dist`, beside the runtime's WebAssembly.
import { build } from "esbuild";
import { copyFileSync, rmSync } from "node:fs";

rmSync("dist", { recursive: true, force: true });
await build({
  entryPoints: { index: "src/index.ts", app: "page/main.ts" },
  outdir: "dist",
  bundle: true,
  splitting: true,
  format: "esm",
  target: "es2022",
  minify: true,
  legalComments: "none",
  conditions: ["browser", "import"],
});
for (const file of ["index.html", "style.css", "icon.svg"]) copyFileSync(`page/${file}`, `dist/${file}`);
copyFileSync("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", "dist/ort-wasm-simd-threaded.wasm");
