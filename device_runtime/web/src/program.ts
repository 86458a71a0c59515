// A verified bundle's programs in ONNX Runtime's WebAssembly, on one thread of this tab.

import * as ort from "onnxruntime-web/wasm";

import type { Bundle } from "./bundle.ts";
import { BundleError } from "./errors.ts";

// A row of a small tower is done before a second thread would hear of it; threads need cross-origin isolation besides.
ort.env.wasm.numThreads = 1;

/**
 * Where the host app serves `ort-wasm-simd-threaded.wasm`, and no other: the runtime would else look for it beside
 * its own script. To be called before the first program is loaded.
 */
export function useRuntime(url: string | URL): void {
  ort.env.wasm.wasmPaths = { wasm: url };
}

/** One program: float32 matrices in, one float32 array out, any number of rows. */
class Program {
  private readonly name: string;
  private readonly session: ort.InferenceSession;

  constructor(name: string, session: ort.InferenceSession) {
    this.name = name;
    this.session = session;
  }

  static async load(bundle: Bundle, name: string): Promise<Program> {
    const data = bundle.programs.get(name);
    if (!data) {
      const held = [...bundle.programs.keys()].join(", ");
      throw new BundleError(`the bundle must hold a program '${name}', got ${held}`);
    }
    try {
      return new Program(name, await ort.InferenceSession.create(data, { executionProviders: ["wasm"] }));
    } catch (error) {
      const reason = String(error instanceof Error ? error.message : error).slice(0, 200); // nothing was run yet
      throw new BundleError(`program '${name}' does not load in ONNX Runtime: ${reason}`);
    }
  }

  /** @param matrices row-major, of `rows` rows each, in the order of the program's inputs. */
  async run(rows: number, ...matrices: readonly Float32Array[]): Promise<Float32Array> {
    const { inputNames, outputNames } = this.session;
    if (inputNames.length !== matrices.length) {
      throw new BundleError(`program '${this.name}' must take ${matrices.length} inputs, got ${inputNames.length}`);
    }
    const feeds = Object.fromEntries(
      matrices.map((data, place) => [inputNames[place]!, new ort.Tensor("float32", data, [rows, data.length / rows])]),
    );
    try {
      return (await this.session.run(feeds))[outputNames[0]!]!.data as Float32Array;
    } catch {
      // Of what ONNX Runtime says nothing: an index that a table lacks is in it, and that is a feature.
      throw new BundleError(`program '${this.name}' does not run on inputs of its manifest's sizes`);
    }
  }

  release(): Promise<void> {
    return this.session.release();
  }
}

/** The device tower: "embed.onnx". */
export class EmbedProgram {
  private readonly program: Program;
  private readonly size: number;

  private constructor(program: Program, size: number) {
    this.program = program;
    this.size = size;
  }

  /** @throws BundleError the program is absent, or ONNX Runtime does not load it. */
  static async load(bundle: Bundle): Promise<EmbedProgram> {
    return new EmbedProgram(await Program.load(bundle, "embed.onnx"), bundle.manifest.device_embedding);
  }

  /**
   * (rows, features) inputs -> (rows, device_embedding), before any release.
   *
   * @throws BundleError the program gives another shape than its manifest says, or no finite numbers.
   */
  async embed(inputs: Float32Array, rows = 1): Promise<Float32Array> {
    const embedding = await this.program.run(rows, inputs);
    if (embedding.length !== rows * this.size || !embedding.every(Number.isFinite)) {
      throw new BundleError(`program 'embed.onnx' must return ${rows} x ${this.size} finite numbers`);
    }
    return embedding;
  }

  release(): Promise<void> {
    return this.program.release();
  }
}

/** The merge on the device, device tower and then head over the server's embedding: "predict.onnx". */
export class PredictProgram {
  private readonly program: Program;

  private constructor(program: Program) {
    this.program = program;
  }

  /** @throws BundleError the program is absent, or ONNX Runtime does not load it. */
  static async load(bundle: Bundle): Promise<PredictProgram> {
    return new PredictProgram(await Program.load(bundle, "predict.onnx"));
  }

  /**
   * (rows, features) inputs and (rows, server_embedding) finite -> (rows,) probabilities; NaN where the head overflows.
   *
   * @throws BundleError the program gives no such numbers.
   */
  async predict(inputs: Float32Array, server: Float32Array, rows = 1): Promise<Float32Array> {
    const predictions = await this.program.run(rows, inputs, server);
    const held = predictions.every((value) => Number.isNaN(value) || (value >= 0 && value <= 1));
    if (predictions.length !== rows || !held) throw new BundleError("program 'predict.onnx' must return probabilities");
    return predictions;
  }

  release(): Promise<void> {
    return this.program.release();
  }
}

/** The program that an inference runs: the tower alone where the server merges, else the merge. */
export function programOf(bundle: Bundle): Promise<EmbedProgram | PredictProgram> {
  return bundle.manifest.merge === "server" ? EmbedProgram.load(bundle) : PredictProgram.load(bundle);
}

/** Microseconds of one inference: quantiles over blocks of `BLOCK` runs, each block's mean. */
export interface Speed {
  readonly p50: number;
  readonly p99: number;
  readonly runs: number;
}

const BLOCK = 100; // a browser's clock steps by 100 microseconds: a block's mean by one

/**
 * How long one row takes in this browser, inputs ready and answer awaited: what `benchmarks` reports.
 *
 * @param run one inference.
 * @param blocks how many are timed, after as many again that are not.
 */
export async function measure(run: () => Promise<unknown>, blocks = 50): Promise<Speed> {
  const times: number[] = [];
  for (let block = -blocks; block < blocks; block++) {
    const started = performance.now();
    for (let each = 0; each < BLOCK; each++) await run();
    if (block >= 0) times.push(((performance.now() - started) * 1000) / BLOCK);
  }
  times.sort((a, b) => a - b);
  const quantile = (q: number) => times[Math.min(times.length - 1, Math.floor(q * times.length))]!;
  return { p50: quantile(0.5), p99: quantile(0.99), runs: blocks * BLOCK };
}
