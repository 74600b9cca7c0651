/** The captioner as the page sees it: fetched, kept for offline use, run in a thread of its own. */

const LARGE_FILES = [
  "model/encoder.onnx",
  "model/step.onnx",
  "onnxruntime-web/ort-wasm-simd-threaded.wasm",
];
const MOST_THREADS = 4;
const LONGEST_WAIT = 10_000; // milliseconds for the service worker; without it the page works too

/** Keep the page for offline use, where the browser can: over https, and on the machine itself. */
async function keepOffline() {
  if (!navigator.serviceWorker) return;
  let registration;
  try {
    registration = await navigator.serviceWorker.register("service_worker.js");
  } catch (error) {
    console.warn("not kept for offline use:", error.message);
    return;
  }
  if (navigator.serviceWorker.controller || registration.active) return; // active: a forced reload
  // What is fetched from now on goes through the service worker, which keeps it.
  await new Promise((resolve) => {
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
    setTimeout(resolve, LONGEST_WAIT);
  });
}

/** Fetch one of the page's files; tell of each piece how many bytes it has. */
async function fetchFile(name, received) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  const counted = new TransformStream({
    transform(piece, controller) {
      received(piece.byteLength);
      controller.enqueue(piece);
    },
  });
  return new Response(response.body.pipeThrough(counted));
}

/**
 * Fetch the captioner and start it.
 *
 * @param progress - Told how many bytes have been fetched, and how many there are.
 * @param threads - That compute; more than one needs a page that is cross-origin isolated.
 */
export async function openCaptioner(progress = () => {}, threads = possibleThreads()) {
  await keepOffline();
  const page = await (await fetch("page.json")).json();
  const total = LARGE_FILES.reduce((sum, name) => sum + page.files[name], 0);
  let done = 0;
  const get = (name) => fetchFile(name, (bytes) => progress((done += bytes), total));
  const buffers = LARGE_FILES.map(async (name) => (await get(name)).arrayBuffer());
  const read = async (name) => (name in page.files ? (await fetch(name)).json() : null);
  const [config, words, ngrams, encoder, step, wasm] = await Promise.all([
    read("model/export.json"),
    read("model/vocabulary.json"),
    read("model/ngrams.json"),
    ...buffers,
  ]);
  progress(total, total);
  const client = new Client(await startWorker());
  const model = { encoder, step, config, words, ngrams, constraints: page.constraints };
  await client.ask("open", { model, wasm, threads }, [encoder, step, wasm]);
  client.config = config;
  client.threads = threads;
  return client;
}

function possibleThreads() {
  const half = Math.floor(navigator.hardwareConcurrency / 2); // the others have work too
  return self.crossOriginIsolated ? Math.max(1, Math.min(MOST_THREADS, half)) : 1;
}

/** Start worker.js by a blob: the page's Content-Security-Policy binds a blob, but not a file. */
function startWorker() {
  const address = new URL("worker.js", import.meta.url).href;
  const blob = new Blob([`import ${JSON.stringify(address)};`], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(blob), { type: "module" });
  return new Promise((resolve, reject) => {
    worker.onmessage = () => resolve(worker);
    worker.onerror = (event) => reject(new Error(event.message || "its thread didn't start"));
  });
}

class Client {
  #worker;
  #waiting = new Map(); // by id, what an answer is for
  #count = 0;

  constructor(worker) {
    this.#worker = worker;
    worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error === undefined) resolve(result);
      else reject(new Error(error));
    };
  }

  /** Let the worker do a task; the buffers in `given` go to it. */
  ask(task, given, buffers = []) {
    const id = this.#count++;
    this.#worker.postMessage({ id, task, ...given }, buffers);
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }

  /**
   * Caption an image file.
   *
   * @param file - A File or Blob.
   * @param changes - Of the search settings.
   * @returns `{captions, seconds}`, see captioner.js and worker.js.
   * @throws Error - The browser can't read the file, or the model gives no caption.
   */
  caption(file, changes) {
    return this.ask("caption", { file, changes });
  }
}
