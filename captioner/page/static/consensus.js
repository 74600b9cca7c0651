/** Captions ranked by what their image lets expect: captioner/search/consensus.py in JavaScript. */

import { EOS } from "./constraints.js";

const ORDERS = 4;

/** The n-grams in which captions may agree, as ngrams.json holds them. */
export class Ngrams {
  #places;
  #rarity;
  #unseen;

  constructor({ token_ids: ngrams, rarity, unseen }) {
    this.#places = new Map(ngrams.map((ngram, place) => [ngram.join(), place]));
    this.#rarity = rarity;
    this.#unseen = unseen;
  }

  /** Return how much a caption's tokens agree with what is expected, a number for each n-gram. */
  agreement(tokens, expected) {
    let total = 0;
    for (let order = 1; order <= ORDERS; order++) {
      const counts = new Map();
      for (let start = 0; start + order <= tokens.length; start++) {
        const ngram = tokens.slice(start, start + order).join();
        counts.set(ngram, (counts.get(ngram) ?? 0) + 1);
      }
      let product = 0,
        squares = 0;
      for (const [ngram, count] of counts) {
        const place = this.#places.get(ngram);
        const weight = count * (place === undefined ? this.#unseen : this.#rarity[place]);
        squares += weight ** 2;
        if (place !== undefined) product += weight * expected[place];
      }
      if (squares) total += product / Math.sqrt(squares);
    }
    return (10 * total) / ORDERS;
  }
}

/** Return the settings that find all hypotheses that `rerank` chooses from. */
export function withoutConsensus(settings) {
  return { ...settings, consensus: 0, n_best: settings.beam_size };
}

/** Return the `n_best` hypotheses by score and agreement, best first, with their `agreement`. */
export function rerank(hypotheses, expected, ngrams, settings) {
  const agreeing = hypotheses.map((hypothesis) => {
    const words = hypothesis.tokens.filter((token) => token !== EOS);
    return { ...hypothesis, agreement: ngrams.agreement(words, expected) };
  });
  const order = (one, other) =>
    other.ended - one.ended || score(other, settings) - score(one, settings);
  return agreeing.sort(order).slice(0, settings.n_best);
}

/** Return what a hypothesis is ranked by: its log-probability / length ** penalty, and agreement. */
export function score({ tokens, total, agreement = 0 }, { length_penalty, consensus = 0 }) {
  return total / Math.max(1, tokens.length) ** length_penalty + consensus * agreement;
}
