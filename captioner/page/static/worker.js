/** The thread that captions, so that the page stays alive meanwhile. See client.js. */

import { ExportedCaptioner } from "./captioner.js";
import { decode, readable, toPixels } from "./preprocessing.js";

let captioner;

const TASKS = {
  async open({ model, wasm, threads }) {
    captioner = await ExportedCaptioner.open(model, wasm, threads);
  },

  /** Caption an image file; tell how many seconds it took to read and to describe. */
  async caption({ file, changes }) {
    const started = performance.now();
    let bitmap;
    try {
      bitmap = await decode(file);
    } catch {
      throw new Error("this browser can't read it as an image");
    }
    const pixels = toPixels(readable(bitmap), captioner.config.preprocessing);
    bitmap.close();
    const read = performance.now();
    const captions = await captioner.describe(pixels, changes);
    return {
      captions,
      seconds: { reading: (read - started) / 1000, describing: (performance.now() - read) / 1000 },
    };
  },
};

// One at a time: a session of onnxruntime-web runs no two steps at once.
let last = Promise.resolve();
self.onmessage = ({ data: { id, task, ...given } }) => {
  last = last.then(async () => {
    try {
      self.postMessage({ id, result: await TASKS[task](given) });
    } catch (error) {
      self.postMessage({ id, error: error.message });
    }
  });
};
self.postMessage({ started: true });
