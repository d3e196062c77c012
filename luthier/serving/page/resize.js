// From an image to the pixels that a model takes of it: bit for bit what luthier/images/resizing.py gets of Pillow.

const BITS = 22; // of the fraction of a weight: Pillow computes with 32-bit integers
const HALF = 1 << (BITS - 1);

const [BASE, WAVE] = [Math.fround(0.54), Math.fround(0.46)]; // as Pillow has them: single precision

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Each filter: how far it reaches where an image is not made smaller, and the weight at a distance.
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (BASE + WAVE * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, (x) => cubic(Math.abs(x))],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

function cubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/**
 * Return the pixels that a model takes of an image, Uint8Array [H, W, 3].
 *
 * @param {Uint8Array} rgb - the image [height, width, 3].
 * @param {object} rule - `resize` of model.json: its `fit`, `to`, `size`, `filter`, `fill` and `centre`; `pillow`, the
 *     major version of Pillow that is followed; it may be missing below 13.
 */
export function prepare(rgb, height, width, rule) {
  const [rows, columns] = resizedSize(height, width, rule);
  const [outHeight, outWidth] = rule.size;
  const down = { ...visible(height, rows, outHeight, rule), step: width * 3, outStep: outWidth * 3 };
  const across = { ...visible(width, columns, outWidth, rule), step: 3, outStep: 3 };
  // The order shows, because there are 8 bits in between.
  const vertical =
    height > rows && (rule.pillow >= 13 ? height - rows > 2 * (width - columns) : height > 100 * width);
  const [one, two] = vertical ? [down, across] : [across, down];

  const start = two.first[0]; // the first pass is over the lines that the second one reads, and no others
  const lines = two.first.at(-1) + two.count.at(-1) - start;
  const between = new Uint8Array(lines * one.length * 3);
  resample(rgb.subarray(start * two.step), lines, two.step, one.step, one, between, one.length * 3, 3);
  two.first = two.first.map((line) => line - start);

  const result = new Uint8Array(outHeight * outWidth * 3);
  if (down.length < outHeight || across.length < outWidth) {
    for (let at = 0; at < result.length; at++) result[at] = rule.fill[at % 3];
  }
  const inside = result.subarray(down.before * down.outStep + across.before * across.outStep);
  resample(between, one.length, 3, one.length * 3, two, inside, one.outStep, two.outStep);
  return result;
}

function resizedSize(height, width, { fit, to }) {
  if (fit === "stretch") return to;
  if (fit === "pad") {
    const ratio = Math.max(height / to[0], width / to[1]);
    return [height, width].map((side) => Math.max(1, roundHalfEven(side / ratio)));
  }
  const shorter = Math.min(height, width);
  return [
    height === shorter ? to[0] : Math.trunc((to[0] * height) / width),
    width === shorter ? to[0] : Math.trunc((to[0] * width) / height),
  ];
}

function roundHalfEven(x) {
  const below = Math.floor(x);
  return x - below === 0.5 ? below + (below % 2) : Math.round(x);
}

/** Return of one axis how the resized pixels in the result are made, and how many border pixels are before them. */
function visible(side, resized, want, { filter, centre }) {
  if (resized < want) return { ...weigh(side, resized, 0, resized, filter), before: (want - resized) >> 1 };
  const half = (resized - want) / 2;
  const start = centre === "floor" ? Math.floor(half) : roundHalfEven(half);
  return { ...weigh(side, resized, start, start + want, filter), before: 0 };
}

/** Return of which pixels each resized pixel from `start` to `end` is made on one axis, and their integer weights. */
function weigh(side, resized, start, end, filter) {
  const scale = side / resized;
  const length = end - start;
  const [first, count] = [new Int32Array(length), new Int32Array(length).fill(1)];
  if (side === resized || filter === "nearest") {
    // Pillow adds up the steps, and the errors of rounding with them.
    let centre = scale / 2;
    for (let pixel = 0; pixel < end; pixel++, centre += scale) if (pixel >= start) first[pixel - start] = centre;
    return { length, first, count, weights: new Int32Array(length).fill(1 << BITS), taps: 1 };
  }
  const [support, weight] = FILTERS[filter];
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const taps = Math.ceil(reach) * 2 + 1;
  const weights = new Int32Array(length * taps);
  for (let pixel = 0; pixel < length; pixel++) {
    const centre = (start + pixel + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - reach + 0.5));
    const to = Math.min(side, Math.trunc(centre + reach + 0.5));
    const exact = [];
    let sum = 0;
    for (let at = from; at < to; at++) sum += exact[at - from] = weight((at - centre + 0.5) * (1 / stretch));
    [first[pixel], count[pixel]] = [from, to - from];
    exact.forEach((value, tap) => {
      const share = (sum === 0 ? value : value / sum) * (1 << BITS);
      weights[pixel * taps + tap] = share < 0 ? share - 0.5 : share + 0.5; // the array cuts the fraction off
    });
  }
  return { length, first, count, weights, taps };
}

/** Resample each line of an image along the line. Lines are `lineStep` apart, the pixels of a line `step`. */
function resample(source, lines, lineStep, step, { length, first, count, weights, taps }, out, outLineStep, outStep) {
  for (let line = 0; line < lines; line++) {
    for (let pixel = 0; pixel < length; pixel++) {
      let red = HALF;
      let green = HALF;
      let blue = HALF;
      let from = line * lineStep + first[pixel] * step;
      const end = pixel * taps + count[pixel];
      for (let tap = pixel * taps; tap < end; tap++, from += step) {
        const weight = weights[tap];
        red = (red + Math.imul(weight, source[from])) | 0;
        green = (green + Math.imul(weight, source[from + 1])) | 0;
        blue = (blue + Math.imul(weight, source[from + 2])) | 0;
      }
      const to = line * outLineStep + pixel * outStep;
      out[to] = clip(red >> BITS);
      out[to + 1] = clip(green >> BITS);
      out[to + 2] = clip(blue >> BITS);
    }
  }
}

const clip = (value) => (value < 0 ? 0 : value > 255 ? 255 : value);
