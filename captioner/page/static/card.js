/** One photograph on the page, with its captions and what the captioner looked at for each word. */

const PAUSE = 180; // milliseconds from word to word
const END = "·"; // stands for the caption's end

export class Card {
  #part; // by class or name, the elements of the card
  #cut = 0; // side of the square that the captioner saw, of the shorter side; 0: it saw all
  #captions = [];
  #buttons = []; // of the words
  #isUsed = false; // whether somebody has pressed a word of these captions

  constructor(file) {
    this.file = file;
    this.element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    this.#part = (name) => this.element.querySelector(name);
    const picture = this.#part("img");
    picture.src = URL.createObjectURL(file);
    picture.onload = () => this.#place();
    picture.onerror = () => {
      picture.hidden = true;
    };
    this.#part(".about").textContent = file.name;
  }

  /** Show that a caption is on its way. */
  wait() {
    this.element.setAttribute("aria-busy", "true");
    if (!this.#captions.length) this.#part(".text").textContent = "…";
  }

  /**
   * Show captions, best first.
   *
   * @param captions, seconds - As `Client.caption` gives them.
   * @param config - The captioner's.
   */
  show(captions, seconds, { preprocessing }) {
    const { resize, image_size: size, resize_size: resized } = preprocessing;
    this.#cut = resize === "crop" ? size / resized : 0;
    this.#place();
    this.#captions = captions;
    this.#isUsed = false;
    this.element.setAttribute("aria-busy", "false");
    this.element.classList.remove("failed");
    const total = seconds.reading + seconds.describing;
    this.#part(".about").textContent = `${this.file.name}, ${total.toFixed(2)} s`;
    this.#listOthers();
    this.#choose(0, !matchMedia("(prefers-reduced-motion: reduce)").matches);
  }

  /** Show why there is no caption. */
  fail(reason) {
    this.element.setAttribute("aria-busy", "false");
    this.element.classList.add("failed");
    this.#part(".text").textContent = reason;
  }

  #listOthers() {
    const buttons = this.#captions.map(({ text, score }, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(make("span", text || "(empty)"), make("small", score.toFixed(2)));
      button.onclick = () => this.#choose(place, false);
      const line = document.createElement("li");
      line.append(button);
      return line;
    });
    this.#part(".others").hidden = buttons.length < 2;
    this.#part(".others").replaceChildren(...buttons);
  }

  /** Show one of the captions, word by word if it is new. */
  async #choose(place, slowly) {
    const caption = this.#captions[place];
    this.#part("img").alt = caption.text;
    [...this.element.querySelectorAll(".others button")].forEach((button, number) => {
      button.setAttribute("aria-pressed", number === place);
    });
    const words = [...caption.text.split(" ").filter(Boolean), END];
    const buttons = caption.attention ? words.map((word, n) => this.#word(word, n, caption)) : [];
    this.#buttons = buttons;
    this.#part(".text").textContent = caption.attention ? "" : caption.text || "(empty)";
    this.#part(".words").hidden = !buttons.length;
    this.#part(".words").replaceChildren();
    this.#look(null, caption);
    for (const [number, button] of buttons.entries()) {
      this.#part(".words").append(button);
      if (!slowly) continue;
      this.#look(number, caption);
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
      if (this.#buttons !== buttons) return; // another caption is shown by now
      if (this.#isUsed) slowly = false;
    }
    if (slowly) this.#look(null, caption);
  }

  #word(word, number, caption) {
    const button = make("button", word);
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    if (word === END) button.setAttribute("aria-label", "end");
    button.onclick = () => {
      const isShown = this.#isUsed && button.getAttribute("aria-pressed") === "true";
      this.#isUsed = true;
      this.#look(isShown ? null : number, caption);
    };
    return button;
  }

  /** Darken what the captioner did not look at for a word; null: nothing. */
  #look(number, { attention }) {
    this.#buttons.forEach((button, place) => button.setAttribute("aria-pressed", place === number));
    const canvas = this.#part("canvas");
    canvas.hidden = number === null || !attention;
    if (canvas.hidden) return;
    const map = attention[number],
      side = Math.sqrt(map.length);
    const least = Math.min(...map),
      range = Math.max(...map) - least || 1;
    canvas.width = canvas.height = side;
    const pixels = new ImageData(side, side);
    map.forEach((weight, place) => {
      pixels.data[4 * place + 3] = 255 * (1 - (weight - least) / range); // how dark
    });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  /** Lay the canvas over what the captioner saw: all of the picture, or a square in its middle. */
  #place() {
    const { naturalWidth: width, naturalHeight: height } = this.#part("img");
    if (!this.#cut || !width) return;
    const side = this.#cut * Math.min(width, height),
      { style } = this.#part("canvas");
    style.width = `${(100 * side) / width}%`;
    style.height = `${(100 * side) / height}%`;
  }
}

function make(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}
