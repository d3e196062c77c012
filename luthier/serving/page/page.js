// Takes images, has ONNX Runtime classify them, and shows the answer. model.json says everything about the model.

import { prepare } from "./resize.js";

const TOP = 5; // classes
const PREVIEW_SIDE = 1000; // pixels
const MAX_RATIO = 500; // of the sides of an image, as in luthier/images/decode.py
const STRIP_ROWS = 256; // rows that are read at a time: browsers limit the size of a canvas
const CACHES = `luthier ${new URL(".", location.href).pathname} `; // other pages of the host may have their own

const find = (id) => document.getElementById(id);

/** Return what went wrong in words: where its memory is exhausted, ONNX Runtime throws a bare number. */
const explain = (error) => error?.message ?? `ONNX Runtime stopped (${error}), perhaps for lack of memory`;

let ready; // the model, as a promise

/** Load the model, and show how far it is and what went wrong. */
function start() {
  find("failure").textContent = "";
  find("again").hidden = true;
  ready = load();
  ready.catch((error) => {
    showStatus("");
    find("failure").textContent = `The model cannot be loaded: ${explain(error).replace(/\.+$/, "")}.`;
    find("again").hidden = false;
  });
}

async function load() {
  showStatus("Loading the model", 0);
  const config = await (await get("model.json", { cache: "no-cache" })).json();
  document.title = find("name").textContent = config.name;
  const parts = [config.runtime.script, config.runtime.wasm, config.model];
  const total = parts.reduce((sum, part) => sum + part.bytes, 0);
  let done = 0;
  const count = (bytes) => {
    done += bytes;
    showStatus(`Loading the model: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`, done / total);
  };
  const cache = await openCache(config.version);
  const stop = new AbortController(); // where one part fails, the others are of no use
  const loading = parts.map((part) => loadPart(part, cache, count, stop.signal));
  const loaded = await Promise.all(loading).finally(() => stop.abort());

  showStatus("Starting the model", 1);
  // A module that is imported by its address could not be checked.
  const address = URL.createObjectURL(new Blob(loaded.slice(0, 1), { type: "text/javascript" }));
  const ort = await import(address).finally(() => URL.revokeObjectURL(address));
  ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
  ort.env.wasm.wasmBinary = loaded[1];
  const session = await ort.InferenceSession.create(loaded[2], { executionProviders: ["wasm"], logSeverityLevel: 3 });
  showStatus("Ready");
  if (cache) {
    const files = new Map(parts.map((part, number) => [part.url, loaded[number]]));
    keep(cache, config, files.set("model.json", JSON.stringify(config)))
      .then(() => showStatus("Ready, also without a network"))
      .catch(() => {}); // an extra: some browsers do not allow it
  }
  return { ...config, ort, session };
}

/** Return the bytes of a part of the model; `count` is told of them as they arrive. */
async function loadPart({ url, bytes, integrity, hash }, cache, count, signal) {
  const stored = await cache?.match(url);
  if (stored) {
    count(bytes);
    return new Uint8Array(await stored.arrayBuffer());
  }
  const response = await get(url, integrity ? { integrity, signal } : { cache: "no-cache", signal });
  const [content, reader] = [new Uint8Array(bytes), response.body.getReader()];
  let length = 0;
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    if (length + chunk.value.length <= bytes) content.set(chunk.value, length);
    length += chunk.value.length;
    count(chunk.value.length);
  }
  if (length !== bytes) throw new Error(`${url} has ${length} bytes, and not ${bytes}`);
  // `integrity` would hold back the progress until the end. Where there is no `subtle`, nothing is kept either.
  if (hash && globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-384", content));
    if (`sha384-${btoa(String.fromCharCode(...digest))}` !== hash) {
      throw new Error(`${url} is not the file that belongs to this page`);
    }
  }
  return content;
}

async function get(url, options) {
  const response = await fetch(url, options).catch(() => null); // what it was is in the console, and nowhere else
  if (response?.ok) return response;
  const changed = options.integrity && !response ? ", or is not the file that belongs to this page" : "";
  throw new Error(`${url} cannot be fetched${response ? ` (${response.status})` : changed}`);
}

/** Show what the model is doing and, where it is loading, which share is done. */
function showStatus(text, share = null) {
  const [bar, words] = find("status").children;
  bar.hidden = share === null;
  bar.value = share ?? 1;
  words.textContent = text;
}

async function openCache(version) {
  try {
    return await caches.open(CACHES + version);
  } catch {
    return null; // there is none without https, nor in some private windows
  }
}

/** Keep all files of this version for use without a network, and no other version. */
async function keep(cache, config, files) {
  for (const url of [...files.keys(), ...config.files]) {
    if (await cache.match(url)) continue;
    const answer = files.has(url) ? null : await get(url, { cache: "no-cache" });
    // From sw.js, which answers without a network, and perhaps with the file of another version.
    if (answer?.type === "default") throw new Error(`${url} is not from the network`);
    // A copy of the content alone: an answer that was redirected could not be given for a page.
    await cache.put(url, new Response(files.get(url) ?? (await answer.blob())));
  }
  for (const name of await caches.keys()) {
    if (name.startsWith(CACHES) && name !== CACHES + config.version) await caches.delete(name);
  }
  await navigator.serviceWorker.register("sw.js");
  await navigator.serviceWorker.ready;
}

/** Decode an image file, upright, and return what `use` makes of the bitmap. */
async function withBitmap(blob, use) {
  const head = new Uint8Array(await blob.slice(0, 26).arrayBuffer());
  if (head[0] === 0x89 && head[1] === 0x50 && head[24] === 16 && head[25] === 0) {
    // Where only 12 of the 16 bits are used, a browser shows it as black, and predict.py makes it visible.
    throw new Error("This is a grey PNG of 16 bits, which is not classified here: save it with 8 bits.");
  }
  // As in training, colour profiles are not applied.
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("This file is no image that this browser can read, or too large a one.");
  });
  try {
    const sides = [bitmap.width, bitmap.height];
    if (Math.max(...sides) > MAX_RATIO * Math.min(...sides)) {
      throw new Error(`One side of this image is more than ${MAX_RATIO} times the other: ${sides.join(" x ")} pixels.`);
    }
    return await use(bitmap);
  } finally {
    bitmap.close();
  }
}

/** Check that pixels are read as they were drawn: against fingerprinting, some browsers give noise or white instead. */
function checkCanvas() {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  for (const level of [30, 90, 150, 210]) {
    context.fillStyle = `rgb(${level}, ${level}, ${level})`;
    context.fillRect(0, 0, 1, 1);
    const { data } = context.getImageData(0, 0, 1, 1);
    // Others change a few bits, which does not matter here.
    if ([0, 1, 2].some((channel) => Math.abs(data[channel] - level) > 8)) {
      throw new Error("This browser hides the pixels of images from pages: allow this page to read canvas data.");
    }
  }
}

/** Return the RGB pixels of a bitmap on white. */
function readPixels(bitmap) {
  const { width, height } = bitmap;
  checkCanvas();
  try {
    const rgb = new Uint8Array(width * height * 3);
    const rows = Math.min(height, STRIP_ROWS);
    const canvas = new OffscreenCanvas(width, rows);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    for (let top = 0, to = 0; top < height; top += rows) {
      context.fillRect(0, 0, width, rows);
      context.drawImage(bitmap, 0, -top);
      const { data } = context.getImageData(0, 0, width, Math.min(rows, height - top));
      if (data[3] !== 255) throw new Error("the browser has drawn nothing");
      for (let from = 0; from < data.length; from += 4) {
        rgb[to++] = data[from];
        rgb[to++] = data[from + 1];
        rgb[to++] = data[from + 2];
      }
    }
    return rgb;
  } catch {
    throw new Error(`This image is too large for this browser: ${width} x ${height} pixels.`);
  }
}

/** Return what the model says of a bitmap. */
async function rate(bitmap) {
  const { ort, session, labels, resize, unsure_below, none_class } = await ready;
  const view = prepare(readPixels(bitmap), bitmap.height, bitmap.width, resize);
  const outputs = await session.run({ pixel_values: new ort.Tensor("uint8", view, [1, ...resize.size, 3]) });
  const probabilities = Array.from(outputs.probabilities.data);
  if (!probabilities.every(Number.isFinite)) {
    throw new Error("The model's answer is not a number: its weights or its export are damaged.");
  }
  const sureness = outputs.sureness.data[0];
  const order = probabilities.map((_, index) => index).sort((a, b) => probabilities[b] - probabilities[a]);
  const none = order[0] === none_class;
  const unsure = unsure_below !== null && !(sureness >= unsure_below);
  return { probabilities, sureness, answer: none || unsure ? null : labels[order[0]], none, order };
}

/** For tests, and for pages that embed this one. */
window.luthier = {
  /** Return {probabilities of the classes, sureness, answer: a class, or null if there is none} of an image file. */
  async classify(blob) {
    const { probabilities, sureness, answer } = await withBitmap(blob, rate);
    return { probabilities, sureness, answer };
  },
  /** Return the pixels that the model takes of an image file, Uint8Array [H, W, 3]. */
  async pixels(blob) {
    const { resize } = await ready;
    return withBitmap(blob, (bitmap) => prepare(readPixels(bitmap), bitmap.height, bitmap.width, resize));
  },
};

let chosen = null; // the newest image

async function show(file) {
  chosen = file;
  const old = () => chosen !== file;
  find("trouble").textContent = "";
  find("classes").replaceChildren();
  find("answer").textContent = "One moment";
  find("answer").className = "waiting";
  try {
    await withBitmap(file, async (bitmap) => {
      if (old()) return;
      drawPreview(bitmap);
      const model = await ready.catch(() => null);
      await new Promise((done) => setTimeout(done)); // to paint, before the model keeps the browser busy
      if (old()) return;
      if (model) showAnswer(await rate(bitmap), model.labels, old);
      else find("answer").textContent = "";
    });
  } catch (error) {
    if (old()) return;
    find("answer").textContent = "";
    find("preview").hidden = true;
    find("trouble").textContent = explain(error);
  }
}

function drawPreview(bitmap) {
  const scale = Math.min(1, PREVIEW_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = find("preview");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.hidden = false;
  find("main").className = "filled";
}

function showAnswer({ probabilities, answer, none, order }, labels, old) {
  if (old()) return;
  const likeliest = `${labels[order[0]]} (${percent(probabilities[order[0]], 0)})`;
  const unsure = answer === null ? `Unsure. Most likely: ${likeliest}` : likeliest;
  find("answer").className = "";
  find("answer").textContent = none ? "None of these" : unsure;
  find("classes").replaceChildren(...order.slice(0, TOP).map((index) => barOf(labels[index], probabilities[index])));
  find("classes").scrollIntoView({ block: "nearest" }); // on a phone it may be below the screen
}

/** Return a share in percent, in which only all are 100%. */
function percent(share, places) {
  const shown = share < 1 ? Math.min(share, 1 - 10 ** -(places + 2)) : share;
  return `${(100 * shown).toFixed(places)}%`;
}

function barOf(label, share) {
  const [row, name, figure, track, bar] = ["li", "span", "span", "div", "div"].map((tag) =>
    document.createElement(tag),
  );
  name.textContent = label;
  figure.textContent = percent(share, 1);
  [figure.className, track.className, bar.className] = ["share", "track", "bar"];
  bar.style.width = `${100 * share}%`;
  track.append(bar);
  row.append(name, figure, track);
  return row;
}

/** Show the first image of a list of files. */
function take(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (file) show(file);
  else find("trouble").textContent = "There is no image file in what you dropped or pasted.";
}

for (const input of document.querySelectorAll("input")) {
  input.addEventListener("change", () => {
    if (input.files.length) take(input.files);
    input.value = ""; // or the same file could not be chosen again
  });
}
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  find("zone").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("zone").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  find("zone").classList.remove("over");
  take(event.dataTransfer.files);
});
find("again").addEventListener("click", () => {
  start();
  if (chosen) show(chosen);
});
find("stuck").hidden = true;
start();
