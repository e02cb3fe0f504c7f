// The blind test after ITU-R BS.1534 (MUSHRA): per excerpt the open reference, and in random order without names the hidden
// reference, a low anchor and the models, each rated from 0 to 100. Uses the sounds of the players in the page, and player.js.
"use strict";

const MIN_PLAYED_S = 2; // per version; shorter loops do not count
const CLOCK_MS = 100;
const GRADES = ["bad", "poor", "fair", "good", "excellent"];

function shuffle(items) {
  const rest = [...items];
  const result = [];
  while (rest.length) result.push(rest.splice(crypto.getRandomValues(new Uint32Array(1))[0] % rest.length, 1)[0]);
  return result;
}

class BlindTest {
  // `test` is {run, names, letters, pages: [{figure, track, target, versions}]}; `figure` is an element's id.
  constructor(section, test) {
    Object.assign(this, { section, test, pages: shuffle(test.pages), answers: [], number: 0 });
    this.stage = section.querySelector(".stage");
    this.name = section.querySelector("input[type=text]");
    section.querySelector(".start").addEventListener("click", () => this.begin());
    section.blindTest = this;
  }

  begin() {
    this.started = new Date().toISOString();
    this.section.querySelector(".before").hidden = true;
    window.addEventListener("beforeunload", (event) => this.stage.childElementCount && !this.done && event.preventDefault());
    this.show();
  }

  show() {
    this.page = this.pages[this.number];
    this.order = shuffle(this.page.versions);
    this.playedS = Object.fromEntries(["open", ...this.order].map((version) => [version, 0]));
    this.rated = {};
    const title = element("h2", { textContent: `Excerpt ${this.number + 1} of ${this.pages.length}: ${this.page.target}`, tabIndex: -1 });
    this.comment = setAttributes(element("textarea", { rows: 2 }), { placeholder: "Comment (optional)", "aria-label": "comment on this excerpt" });
    this.missing = setAttributes(element("p", { className: "small" }), { role: "status" });
    const last = this.number + 1 === this.pages.length;
    this.next = element("button", { type: "button", className: "main next", textContent: last ? "Finish" : "Next", onclick: () => this.onNext() });
    const scale = element("div", { className: "scale" }, ...GRADES.map((grade) => element("span", { textContent: grade })));
    const question = element("p", { textContent: `How close is each letter to the reference, as a recording of the ${this.page.target} alone?` });
    const sliders = this.order.map((version, index) => this.slider(version, index));
    this.stage.replaceChildren(title, question, this.buildPlayer(), scale, ...sliders, this.comment, this.missing, this.next);
    title.focus();
    clearInterval(this.clock);
    this.clock = setInterval(() => this.tick(), CLOCK_MS);
    this.showMissing();
  }

  buildPlayer() {
    const original = document.getElementById(this.page.figure);
    const soundOf = (version) => original.querySelector(`[data-version="${version}"] audio`).cloneNode();
    const row = (version, name, sound) => {
      const item = element("li", {}, element("span", { className: "name", textContent: name }), sound);
      item.dataset.version = version;
      return item;
    };
    const rows = this.order.map((version, index) => row(version, this.letter(index), soundOf(version)));
    const list = element("ol", { className: "versions" }, row("open", "Reference", soundOf("reference")), ...rows);
    const figure = setAttributes(element("figure", { className: "player" }, list), { "data-rate": original.querySelector("figure").dataset.rate, "data-blind": "" });
    for (const sound of figure.querySelectorAll("audio")) sound.removeAttribute("aria-label"); // the label has the name
    this.player = new Player(figure);
    this.player.ready();
    return figure;
  }

  letter(index) { return this.test.letters[index]; }

  slider(version, index) {
    const value = element("output", { textContent: "–" });
    const input = element("input", { type: "range", min: 0, max: 100, value: 50 });
    setAttributes(input, { "aria-label": `rating of ${this.letter(index)}`, "aria-valuetext": "not rated" });
    const rate = () => {
      this.rated[version] = Number(input.value);
      value.textContent = input.value;
      input.removeAttribute("aria-valuetext");
      this.showMissing();
    };
    input.addEventListener("input", rate);
    input.addEventListener("click", rate); // the initial value is a rating, too
    input.addEventListener("keydown", (event) => event.key === "Enter" && rate());
    input.addEventListener("focus", () => this.player.select(version));
    return element("div", { className: "rating" }, element("span", { textContent: this.letter(index) }), input, value);
  }

  // Add up playing time by the audio clock, which stops without sound.
  tick() {
    const { transport } = this.player;
    if (!transport || transport.paused) {
      this.playedUntil = null;
      return;
    }
    const now = contextOf(transport.rate).currentTime;
    const [from, to] = transport.loop;
    if (this.playedUntil && to - from >= Math.min(MIN_PLAYED_S, transport.duration)) this.playedS[transport.selected] += now - this.playedUntil;
    this.playedUntil = now;
    this.showMissing();
  }

  wasPlayed(version) { return this.playedS[version] >= Math.min(MIN_PLAYED_S, this.player.transport?.duration ?? MIN_PLAYED_S); }

  showMissing() {
    const named = (version) => (version === "open" ? "the reference" : this.letter(this.order.indexOf(version)));
    const unplayed = Object.keys(this.playedS).filter((version) => !this.wasPlayed(version)).map(named);
    const unrated = this.order.filter((version) => !(version in this.rated)).map(named);
    const parts = [unplayed.length ? `Still to play (${MIN_PLAYED_S} s each, no shorter loop): ${unplayed.join(", ")}.` : "", unrated.length ? `Still to rate: ${unrated.join(", ")}.` : ""];
    const text = parts.filter(Boolean).join(" ");
    if (this.missing.textContent !== text) this.missing.textContent = text;
    this.next.disabled = Boolean(text);
  }

  onNext() {
    this.player.close();
    const { track, target } = this.page;
    const heard_s = Object.fromEntries(Object.entries(this.playedS).map(([version, seconds]) => [version, Math.round(seconds * 10) / 10]));
    this.answers.push({ track, target, order: this.order, ratings: this.rated, heard_s, comment: this.comment.value });
    this.number += 1;
    if (this.number < this.pages.length) this.show();
    else this.finish();
  }

  finish() {
    clearInterval(this.clock);
    const listener = this.name.value.trim() || `listener-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
    const { run } = this.test;
    const result = { format: "mss-answers-1", run, listener, started: this.started, finished: new Date().toISOString(), pages: this.answers };
    const file = URL.createObjectURL(new Blob([JSON.stringify(result, null, 1)], { type: "application/json" }));
    const download = `answers-${run}-${listener}.json`.replace(/[^\p{L}\p{N}._-]+/gu, "_");
    const link = element("a", { className: "button download", href: file, download, textContent: "Download your answers", onclick: () => { this.done = true; } });
    const title = element("h2", { textContent: "Thank you", tabIndex: -1 });
    this.stage.replaceChildren(title, element("p", {}, link), this.letterTable());
    title.focus();
  }

  // After the last rating: which version each letter was.
  letterTable() {
    const head = element("tr", {}, ...["excerpt", "letter", "version", "your rating"].map((text) => element("th", { textContent: text })));
    const rows = this.answers.flatMap(({ track, order, ratings }) => order.map((version, index) =>
      element("tr", {}, ...[track, this.letter(index), this.test.names[version], ratings[version]].map((text) => element("td", { textContent: text })))));
    return element("div", { className: "wide" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  }
}

// Two views of one page: named versions are hidden during the test.
function startBlindTest() {
  const views = { listen: document.getElementById("listen"), blind: document.getElementById("blind") };
  const buttons = [...document.querySelectorAll("nav button")];
  const show = (name) => {
    for (const player of Player.all) player.transport?.pause();
    for (const [view, section] of Object.entries(views)) section.hidden = view !== name;
    for (const button of buttons) button.setAttribute("aria-current", button.dataset.view === name);
  };
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.view));
  show("listen");
  new BlindTest(views.blind, JSON.parse(document.getElementById("test").textContent));
}

startBlindTest();
