/** The page: takes photographs in, and shows a card for each, with its captions. */

import { openCaptioner } from "./client.js";
import { Card } from "./card.js";

const get = (id) => document.getElementById(id);
const beams = get("beams"),
  drop = get("drop");
const cards = []; // oldest first
let captioner; // a promise

function tell(text, isError = false) {
  get("state").textContent = text;
  get("state").classList.toggle("error", isError);
}

/** Say to a screen reader alone: what others see on a card. */
function say(text) {
  get("spoken").textContent = text;
}

function showProgress(done, total) {
  const progress = get("progress"),
    megabytes = (bytes) => Math.round(bytes / 1e6);
  progress.hidden = false;
  progress.max = total;
  progress.value = done;
  tell(done < total ? `fetching: ${megabytes(done)} of ${megabytes(total)} MB` : "starting …");
}

async function start() {
  captioner = openCaptioner(showProgress);
  try {
    const { config, threads } = await captioner;
    showBeams(config.search.beam_size);
    tell(`ready${threads > 1 ? `, ${threads} threads` : ""}`);
    say("ready");
    get("offline").hidden = !navigator.serviceWorker?.controller;
  } catch (error) {
    tell(`The captioner can't be started: ${error.message}`, true);
  }
  get("progress").hidden = true;
}

/** Offer the beam size that was exported, and choose it. */
function showBeams(size) {
  const values = [...beams.options].map((option) => Number(option.text));
  if (!values.includes(size)) {
    const next = [...beams.options].find((option) => Number(option.text) > size);
    beams.add(new Option(size), next ?? null);
  }
  beams.value = size;
}

function add(files) {
  for (const file of files) {
    const card = new Card(file);
    cards.push(card);
    get("cards").prepend(card.element);
    caption(card);
  }
}

/** Caption a card's photograph, after those before it. */
async function caption(card) {
  const turn = (card.turn ?? 0) + 1; // a later one has another number of captions
  card.turn = turn;
  card.wait();
  try {
    const client = await captioner,
      size = Number(beams.value);
    const { captions, seconds } = await client.caption(card.file, {
      beam_size: size,
      n_best: size,
    });
    if (card.turn !== turn) return;
    card.show(captions, seconds, client.config);
    say(`${card.file.name}: ${captions[0].text}`);
  } catch (error) {
    card.fail(error.message);
    say(`${card.file.name}: ${error.message}`);
  }
}

// --- ways in ---------------------------------------------------------------------------------

for (const [button, input] of [
  ["choose", "chosen"],
  ["take", "taken"],
]) {
  get(button).onclick = () => get(input).click();
  get(input).onchange = () => {
    add(get(input).files);
    get(input).value = ""; // so that the same one can be chosen again
  };
}
addEventListener("paste", (event) => add(event.clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
beams.onchange = () => cards.forEach(caption);

start();
