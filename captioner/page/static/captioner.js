/** An exported captioner: captioner/runtime/captioner.py in JavaScript, for one image at a time. */

import * as ort from "./onnxruntime-web/ort.wasm.min.js";
import { beamSearch } from "./beam_search.js";
import { Ngrams, rerank, score, withoutConsensus } from "./consensus.js";
import { BOS, EOS, PAD } from "./constraints.js";

const GLUE = "./onnxruntime-web/ort-wasm-simd-threaded.js"; // between JavaScript and the wasm
const SESSION_OPTIONS = {
  executionProviders: ["wasm"],
  extra: { session: { disable_quant_qdq: "1" } }, // weights are made float32 once, not at each step
};

export class ExportedCaptioner {
  #encoder;
  #step;
  #states; // how many arrays a state has
  #words;
  #constraints;
  #ngrams; // null for a captioner without a consensus

  /**
   * Load the graphs.
   *
   * @param model - `{encoder, step}`, ArrayBuffers; `{config, words, ngrams, constraints}`: what is
   *   in export.json, vocabulary.json and, if it is there, ngrams.json, and page.json's constraints.
   * @param wasm - onnxruntime-web itself, an ArrayBuffer.
   * @param threads - That compute.
   */
  static async open(model, wasm, threads) {
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.wasmPaths = { mjs: new URL(GLUE, import.meta.url).href };
    ort.env.wasm.numThreads = threads;
    const captioner = new ExportedCaptioner();
    captioner.config = model.config;
    captioner.#words = model.words;
    captioner.#constraints = model.constraints;
    captioner.#ngrams = model.ngrams && new Ngrams(model.ngrams);
    captioner.#encoder = await ort.InferenceSession.create(model.encoder, SESSION_OPTIONS);
    captioner.#step = await ort.InferenceSession.create(model.step, SESSION_OPTIONS);
    const names = captioner.#encoder.outputNames;
    captioner.#states = names.filter((name) => name.startsWith("state_")).length;
    return captioner;
  }

  /**
   * Find the captions of an image.
   *
   * @param pixels - (3, S, S), as preprocessing.js makes them.
   * @param changes - Of the search settings in export.json.
   * @returns The `n_best` captions, best first: `{text, logProbability, score, attention}`. The
   *   attention tells what the decoder looked at for each word and for the end: a list of
   *   Float32Arrays, each of a square of regions; null for a decoder without.
   */
  async describe(pixels, changes = {}) {
    const settings = { ...this.config.search, ...changes };
    const size = this.config.preprocessing.image_size;
    const input = new ort.Tensor("uint8", pixels, [1, 3, size, size]);
    const { expected, ...rest } = await this.#encoder.run({ pixels: input });
    const outputs = Object.values(rest);
    const state = outputs.slice(0, this.#states).map((tensor) => tensor.data);
    const memory = outputs.slice(this.#states);
    const step = (tokens, parts) => this.#takeStep(tokens, parts, memory);
    const ngrams = settings.consensus && this.#ngrams;
    const searched = ngrams ? withoutConsensus(settings) : settings;
    let hypotheses = await beamSearch(step, state, searched, this.#constraints);
    if (ngrams) hypotheses = rerank(hypotheses, expected.data, ngrams, settings);
    const attention = this.config.regions ? await this.#attention(hypotheses, state, memory) : null;
    return hypotheses.map((hypothesis, place) => ({
      text: words(hypothesis)
        .map((token) => this.#words[token])
        .join(" "),
      logProbability: hypothesis.total,
      score: score(hypothesis, settings),
      attention: attention && attention[place],
    }));
  }

  /** Run the decoder's step on hypotheses of one image. */
  async #takeStep(tokens, parts, memory) {
    const count = tokens.length;
    const ids = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, count]);
    const tensor = (part) => new ort.Tensor("float32", part, [1, count, part.length / count]);
    const inputs = [ids, ...parts.map(tensor), ...memory];
    const names = this.#step.inputNames;
    const feeds = Object.fromEntries(names.map((name, place) => [name, inputs[place]]));
    const outputs = await this.#step.run(feeds);
    const [logProbs, ...rest] = this.#step.outputNames.map((name) => outputs[name].data);
    return { logProbs, state: rest.slice(0, parts.length), attention: rest[parts.length] };
  }

  /** Return what the decoder looks at for each word of captions, and for their ends. */
  async #attention(hypotheses, start, memory) {
    const count = hypotheses.length,
      maps = hypotheses.map(() => []);
    const inputs = hypotheses.map((hypothesis) => [BOS, ...words(hypothesis)]);
    let state = start.map((part) => repeat(part, count));
    for (let place = 0; place < Math.max(...inputs.map((each) => each.length)); place++) {
      const tokens = inputs.map((each) => each[place] ?? PAD);
      const next = await this.#takeStep(tokens, state, memory);
      state = next.state;
      const regions = next.attention.length / count;
      maps.forEach((list, number) => {
        if (place >= inputs[number].length) return;
        list.push(next.attention.slice(regions * number, regions * (number + 1)));
      });
    }
    return maps;
  }
}

function words({ tokens }) {
  return tokens.filter((token) => token !== EOS);
}

function repeat(part, count) {
  const result = new Float32Array(part.length * count);
  for (let place = 0; place < count; place++) result.set(part, part.length * place);
  return result;
}
