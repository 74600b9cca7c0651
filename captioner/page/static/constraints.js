/**
 * What a caption may contain, in token ids: captioner/search/rules.py in JavaScript.
 *
 * The constraints are in page.json, where words are token ids already.
 */

export const PAD = 0,
  BOS = 1,
  EOS = 2,
  UNK = 3;

/** Return the tokens that can't follow these: words, and EOS where it can't. */
export function excluded(tokens, constraints) {
  const { min_length: least, max_length: most, forbidden_endings: endings } = constraints;
  const found = excludedWords(tokens, constraints);
  if (tokens.length < least) found.add(EOS);
  if (tokens.length === most - 1) endings.forEach((word) => found.add(word)); // only EOS can follow
  if (endings.includes(tokens.at(-1))) found.add(EOS);
  return found;
}

function excludedWords(tokens, constraints) {
  const { forbidden, no_repeat_word: noRepeat, no_repeat_ngram: order } = constraints;
  const found = new Set([PAD, BOS, UNK]);
  for (const phrase of forbidden) {
    if (endsWith(tokens, phrase.slice(0, -1))) found.add(phrase.at(-1));
  }
  if (noRepeat && tokens.length) found.add(tokens.at(-1));
  for (let end = order; order && end <= tokens.length; end++) {
    const ngram = tokens.slice(end - order, end);
    if (endsWith(tokens, ngram.slice(0, -1))) found.add(ngram.at(-1));
  }
  return found;
}

function endsWith(tokens, phrase) {
  const start = tokens.length - phrase.length;
  return start >= 0 && phrase.every((word, place) => word === tokens[start + place]);
}
