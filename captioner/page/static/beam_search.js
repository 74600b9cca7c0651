/**
 * Greedy and beam search for one image: captioner/runtime/beam_search.py in JavaScript.
 *
 * A hypothesis is `{tokens, total, ended}`: its words, and EOS where it has ended; the sum of their
 * log-probabilities; and whether it has ended. Sums and scores are float32 as there, so that near
 * ties end the same way.
 */

import { BOS, EOS, PAD, excluded } from "./constraints.js";

const { fround } = Math;

/**
 * Find captions, best first.
 *
 * @param step - Takes the last token of each hypothesis and their state; gives, later,
 *   `{logProbs, state}`: the log-probabilities of all words for each, and the new state. A state is
 *   a list of Float32Arrays, each with the numbers of one hypothesis after the other.
 * @param state - Of one hypothesis.
 * @param settings - Of the search, as export.json holds them.
 * @param constraints - As page.json holds them.
 * @returns At most `n_best` hypotheses.
 * @throws Error - The model gives NaN.
 */
export async function beamSearch(step, state, settings, constraints) {
  let beams = [{ tokens: [], total: 0, ended: false }];
  for (let length = 0; ; length++) {
    const next = await step(beams.map(lastToken), state);
    if (next.logProbs.some(Number.isNaN)) throw new Error(NO_PROBABILITIES);
    if (length === settings.max_length) return best(endAll(beams, next.logProbs), settings);
    const chosen = select(next.logProbs, beams, settings.beam_size, constraints);
    const origins = chosen.map((each) => each.origin);
    state = next.state.map((part) => gather(part, beams.length, origins));
    beams = chosen.map((each) => extend(beams[each.origin], each));
    if (isFinished(beams, settings)) return best(beams, settings);
  }
}

const NO_PROBABILITIES = "the model gives NaN instead of probabilities; export it again as float32";

function lastToken({ tokens, ended }) {
  return ended ? PAD : (tokens.at(-1) ?? BOS);
}

/**
 * Return the best ways to go on: each a hypothesis' place, a token, and the sum with it.
 *
 * Those that have ended come first, and stay as they are.
 */
function select(logProbs, beams, size, constraints) {
  const words = logProbs.length / beams.length,
    chosen = [];
  beams.forEach(({ ended }, origin) => {
    if (ended) chosen.push({ origin, token: PAD, value: Infinity });
  });
  beams.forEach(({ tokens, total, ended }, origin) => {
    if (ended) return;
    const never = excluded(tokens, constraints);
    for (let token = 0; token < words; token++) {
      const value = fround(total + logProbs[origin * words + token]);
      const fits = chosen.length < size || value > chosen.at(-1).value;
      if (!fits || value === -Infinity || never.has(token)) continue;
      insert(chosen, { origin, token, value }, size);
    }
  });
  return chosen;
}

/** Put one in its place among the best, behind those that are as good. */
function insert(chosen, one, size) {
  let place = chosen.length;
  while (place > 0 && chosen[place - 1].value < one.value) place--;
  chosen.splice(place, 0, one);
  if (chosen.length > size) chosen.pop();
}

function extend(hypothesis, { token, value }) {
  if (hypothesis.ended) return hypothesis;
  return { tokens: [...hypothesis.tokens, token], total: value, ended: token === EOS };
}

/** Return the numbers of chosen hypotheses, of an array that holds those of `count`. */
function gather(part, count, origins) {
  const width = part.length / count,
    result = new Float32Array(width * origins.length);
  origins.forEach((origin, place) => {
    result.set(part.subarray(width * origin, width * (origin + 1)), width * place);
  });
  return result;
}

/** Let all hypotheses take EOS. */
function endAll(beams, logProbs) {
  const words = logProbs.length / beams.length;
  return beams.map((hypothesis, place) => {
    const value = fround(hypothesis.total + logProbs[place * words + EOS]);
    return value > -Infinity ? extend(hypothesis, { token: EOS, value }) : hypothesis;
  });
}

/** Tell whether no better captions can be found. */
function isFinished(beams, { n_best: wanted, max_length: most, length_penalty: penalty }) {
  const active = beams.filter(({ ended }) => !ended);
  const scores = beams.filter(({ ended }) => ended).map((each) => ranked(each, penalty));
  scores.sort((one, other) => other - one);
  const worstWanted = scores[Math.min(wanted, beams.length) - 1] ?? -Infinity;
  // Log-probabilities only fall, and cost least when divided by the greatest length.
  const divisor = fround((most + 1) ** penalty);
  return active.every(({ total }) => fround(total / divisor) <= worstWanted);
}

/** Return what hypotheses are ranked by, as float32. */
function ranked({ tokens, total }, penalty) {
  return fround(total / fround(Math.max(1, tokens.length) ** fround(penalty)));
}

/** Return the best hypotheses: those that ended before others, then by score. */
function best(beams, { n_best: wanted, length_penalty: penalty }) {
  if (!beams.length) return [{ tokens: [], total: -Infinity, ended: false }];
  const order = (one, other) =>
    other.ended - one.ended || ranked(other, penalty) - ranked(one, penalty);
  return [...beams].sort(order).slice(0, wanted);
}
