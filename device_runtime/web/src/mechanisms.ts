// Clipping and noise on the device, as `hybrid.privacy.mechanisms` has them: what release "noised" does.

/** size -> that many draws of a Gaussian with standard deviation `sd`. */
export type Noise = (size: number, sd: number) => Float64Array;

/**
 * Noise from the browser's cryptographic generator.
 *
 * Each value is the sum of four Box-Muller draws, halved: which floating-point numbers a single draw can take would
 * tell apart neighbouring sums.
 *
 * Source: Holohan and Braghin, ESORICS 2021, section 5.1. https://arxiv.org/abs/2107.10138
 */
export const systemNoise: Noise = (size, sd) =>
  Float64Array.from({ length: size }, () => {
    const bits = crypto.getRandomValues(new BigUint64Array(4));
    const uniform = Array.from(bits, (word) => (Number(word >> 11n) + 1) * 2 ** -53); // in (0, 1]: its logarithm is finite
    let sum = 0;
    for (const [radial, turn] of [
      [uniform[0]!, uniform[1]!],
      [uniform[2]!, uniform[3]!],
    ] as const) {
      const [radius, angle] = [Math.sqrt(-2 * Math.log(radial)), 2 * Math.PI * turn];
      sum += radius * (Math.cos(angle) + Math.sin(angle));
    }
    return (sum * sd) / 2;
  });

/**
 * Releases one embedding as `Noised(clip, sigma)` declares.
 *
 * @param clip largest L2 norm before noise.
 * @param sigma standard deviation of the noise, in units of `clip`.
 */
export function clipAndNoise(embedding: Float32Array, clip: number, sigma: number, noise: Noise): Float32Array {
  const norm = Math.sqrt(embedding.reduce((sum, value) => sum + value * value, 0));
  const scale = norm > clip ? clip / norm : 1;
  const drawn = noise(embedding.length, sigma * clip);
  return Float32Array.from(embedding, (value, place) => value * scale + drawn[place]!);
}
