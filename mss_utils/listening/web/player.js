// The switching player: several versions of one excerpt under one transport. Needs wavesurfer.js and two of its plugins.
//
// A <figure class="player" data-rate="16000"> holds one <li data-version> a version with its <audio>, a plain player each: that
// is what remains where scripts do not run. Here they become one. All versions are decoded and run together from one start on
// one clock; exactly one is let through. So a switch is a matter of two gains, and the position stays by construction.
"use strict";

const FADE_S = 0.008; // from one version to the next: too short to be heard, long enough not to click
const START_S = 0.01; // a moment ahead, so that all start on the same sample
const STEP_S = 1; // arrow keys
const SHORTEST_LOOP_S = 0.1;
const REGION_COLOUR = "rgba(31, 90, 153, 0.18)";
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const labelled = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

// The samples of an <audio> whose source is a data: URI, at `rate`; no request leaves the page.
async function decode(audio, rate) {
  const bytes = Uint8Array.from(atob(audio.src.split(",")[1]), (letter) => letter.charCodeAt(0));
  return new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes.buffer);
}

const contexts = new Map(); // one a rate, opened at the first sound: browsers want a key or a click before it
function contextOf(rate) {
  if (!contexts.has(rate)) contexts.set(rate, new AudioContext({ sampleRate: rate }));
  return contexts.get(rate);
}

// Mixture minus version, sample by sample.
function difference(mixture, version) {
  const { numberOfChannels, sampleRate } = mixture;
  const made = new AudioBuffer({ numberOfChannels, sampleRate, length: Math.min(mixture.length, version.length) });
  for (let channel = 0; channel < numberOfChannels; channel += 1) {
    const [all, part] = [mixture, version].map((buffer) => buffer.getChannelData(channel));
    made.copyToChannel(Float32Array.from({ length: made.length }, (_, index) => all[index] - part[index]), channel);
  }
  return made;
}

// What wavesurfer takes for its <audio>: all sounds run together and loop together, one of them is heard.
class Transport extends EventTarget {
  constructor(buffers, rate) {
    super();
    this.buffers = buffers; // {name: AudioBuffer}
    this.rate = rate;
    this.heard = Object.keys(buffers)[0];
    this.duration = Math.min(...Object.values(buffers).map((buffer) => buffer.duration));
    this.paused = true;
    this.position = 0; // in seconds, at `startedAt` on the context's clock
    this.startedAt = 0;
    this.region = null; // [from, to] in seconds
    this.sources = [];
    Object.assign(this, { src: "", currentSrc: "", volume: 1, muted: false, playbackRate: 1, ended: false, seeking: false, readyState: 4 });
  }

  get loop() { return this.region ?? [0, this.duration]; }

  get currentTime() {
    if (this.paused) return this.position;
    const [from, to] = this.loop;
    const at = this.position + Math.max(0, contextOf(this.rate).currentTime - this.startedAt);
    return at < to ? at : from + ((at - from) % (to - from));
  }

  set currentTime(seconds) {
    this.restart(clamp(seconds, 0, this.duration));
    for (const event of ["seeking", "seeked", "timeupdate"]) this.emit(event);
  }

  async play() {
    if (!this.paused) return;
    const context = contextOf(this.rate);
    this.start(this.position);
    await context.resume();
  }

  pause() {
    if (this.paused) return;
    this.position = this.currentTime;
    this.stop();
    this.paused = true;
    this.emit("pause");
  }

  start(at) {
    const context = contextOf(this.rate);
    const [from, to] = this.loop;
    this.output ??= this.connectOutput(context);
    this.position = at < to ? at : from;
    this.startedAt = context.currentTime + START_S;
    this.sources = Object.entries(this.buffers).map(([name, buffer]) => {
      const gain = new GainNode(context, { gain: 0 });
      const source = new AudioBufferSourceNode(context, { buffer, loop: true, loopStart: from, loopEnd: to });
      source.connect(gain).connect(this.output);
      source.onended = () => gain.disconnect();
      source.start(this.startedAt, this.position);
      return { name, source, gain: gain.gain };
    });
    this.fade(this.heard, this.startedAt);
    const wasPaused = this.paused;
    this.paused = false;
    if (wasPaused) this.emit("play");
  }

  connectOutput(context) {
    const output = new GainNode(context);
    output.connect(context.destination);
    return output;
  }

  // From now on `name` is let through and nothing else; a step would click.
  fade(name, at = contextOf(this.rate).currentTime) {
    for (const source of this.sources) {
      source.gain.cancelScheduledValues(at);
      source.gain.setValueAtTime(source.gain.value, at);
      source.gain.linearRampToValueAtTime(source.name === name ? 1 : 0, at + FADE_S);
    }
  }

  stop() {
    const now = contextOf(this.rate).currentTime;
    this.fade(null, now);
    for (const { source } of this.sources) source.stop(Math.max(now, this.startedAt) + FADE_S);
    this.sources = [];
  }

  restart(at) {
    if (!this.paused) {
      this.stop();
      this.start(at);
    } else {
      this.position = at;
    }
  }

  select(name) {
    this.heard = name;
    if (!this.paused) this.fade(name);
  }

  setLoop(region) {
    const at = this.currentTime;
    this.region = region;
    const [from, to] = this.loop;
    if (at < from || at >= to) {
      this.restart(from);
    } else if (!this.paused) { // goes on where it is, and turns back at the new end
      [this.position, this.startedAt] = [at, Math.max(this.startedAt, contextOf(this.rate).currentTime)];
      for (const { source } of this.sources) [source.loopStart, source.loopEnd] = [from, to];
    }
    this.emit("timeupdate");
  }

  emit(event) { this.dispatchEvent(new Event(event)); }
  load() {}
  remove() {}
  removeAttribute() {}
  canPlayType() { return "probably"; }
}

// One figure: buttons for the versions, play, residual, loop; waveform and spectrogram of what is heard.
class Player {
  static all = [];
  static active = null; // the one that keys act on

  constructor(figure) {
    this.figure = figure;
    this.rate = Number(figure.dataset.rate);
    this.items = [...figure.querySelectorAll("li[data-version]")];
    this.versions = this.items.map((item) => item.dataset.version);
    this.version = this.versions[0];
    this.residual = false;
    this.channel = new BroadcastChannel("mss-players"); // one sounds at a time, also among several frames of a notebook
    this.channel.onmessage = () => this.transport?.pause();
    this.build();
    Player.all.push(this);
    figure.player = this;
  }

  build() {
    this.playButton = element("button", { type: "button", className: "play", textContent: "▶ Play", onclick: () => this.toggle() });
    this.time = element("span", { className: "time" });
    this.residualBox = element("input", { type: "checkbox", onchange: (event) => this.hear(this.version, event.target.checked) });
    const residual = element("label", {}, this.residualBox, " residual");
    residual.hidden = !this.versions.includes("mixture") || this.blind;
    this.loopButton = element("button", { type: "button", textContent: "loop all", disabled: true, onclick: () => this.loop(null) });
    this.status = labelled(element("span", { className: "unseen" }), { role: "status" });
    const bar = element("div", { className: "bar" }, this.playButton, this.time, this.loopButton, residual, this.status);
    this.list = this.figure.querySelector(".versions");
    labelled(this.list, { role: "radiogroup", "aria-label": "version that is heard" });
    this.items.forEach((item, index) => this.buildVersion(item, index));
    this.wave = element("div", { className: "wave" });
    this.picture = element("div", { className: "spectrogram" });
    labelled(this.picture, { role: "img" });
    this.picture.hidden = this.blind;
    this.list.after(bar, this.wave, this.picture);
    this.figure.addEventListener("pointerdown", () => { Player.active = this; });
    this.figure.addEventListener("focusin", () => { Player.active = this; });
    this.showChoice();
  }

  buildVersion(item, index) {
    item.querySelector("audio").hidden = true;
    labelled(item, { role: "radio", tabindex: "-1" });
    if (index < 10) item.prepend(labelled(element("kbd", { textContent: (index + 1) % 10 }), { "aria-hidden": "true" }));
    item.addEventListener("click", () => this.hear(item.dataset.version));
  }

  // Decoding and drawing wait until the player is near the screen or used.
  ready() { return (this.preparing ??= this.prepare()); }

  async prepare() {
    const buffers = await Promise.all(this.items.map((item) => decode(item.querySelector("audio"), this.rate)));
    const sounds = Object.fromEntries(this.versions.map((version, index) => [version, buffers[index]]));
    for (const version of this.versions) if (this.hasResidual(version)) sounds[`${version} residual`] = difference(sounds.mixture, sounds[version]);
    this.transport = new Transport(sounds, this.rate);
    this.transport.select(this.sound);
    this.regions = WaveSurfer.Regions.create();
    this.waves = WaveSurfer.create({
      container: this.wave, media: this.transport, height: 64, waveColor: "#8a949e", progressColor: "#1f5a99", cursorColor: "#d1553d",
      cursorWidth: 2, peaks: this.peaks(), duration: this.transport.duration, plugins: [this.regions, ...this.spectrogram()],
    });
    this.connect();
    this.figure.dataset.ready = "yes";
  }

  // Far from the screen a silent player gives back what it holds; it begins anew when it comes near.
  release() {
    if (!this.transport?.paused) return;
    this.waves.destroy();
    this.waves = this.transport = this.preparing = undefined;
    this.loopButton.disabled = true;
    delete this.figure.dataset.ready;
  }

  get blind() { return this.figure.dataset.blind !== undefined; }

  // In a blind test pictures would tell the versions apart: the waveform stays that of the first, the reference.
  spectrogram() {
    if (this.blind) return [];
    return [WaveSurfer.Spectrogram.create({
      container: this.picture, height: 150, fftSamples: 1024, noverlap: 768, scale: "mel", labels: true, labelsColor: "#fff",
      labelsHzColor: "#fff", labelsBackground: "rgba(0,0,0,0.35)", gainDB: 26, rangeDB: 70, frequencyMax: this.rate / 2,
    })];
  }

  connect() {
    this.regions.enableDragSelection({ color: REGION_COLOUR });
    this.regions.on("region-created", (region) => {
      this.regions.getRegions().forEach((other) => other !== region && other.remove());
      this.looped(region);
    });
    this.regions.on("region-updated", (region) => this.looped(region));
    this.regions.on("region-double-clicked", () => this.loop(null));
    this.transport.addEventListener("play", () => this.showPlaying());
    this.transport.addEventListener("pause", () => this.showPlaying());
    this.waves.on("timeupdate", () => this.showTime());
    this.showTime();
  }

  get sound() { return this.residual && this.hasResidual(this.version) ? `${this.version} residual` : this.version; }
  hasResidual(version) { return this.versions.includes("mixture") && version !== "mixture" && !this.blind; }

  peaks() {
    const buffer = this.transport.buffers[this.sound];
    return Array.from({ length: buffer.numberOfChannels }, (_, channel) => buffer.getChannelData(channel));
  }

  async toggle() {
    await this.ready();
    Player.active = this;
    if (this.transport.paused) {
      this.channel.postMessage("playing");
      await this.transport.play();
    } else {
      this.transport.pause();
    }
  }

  // Sound first, pictures after: drawing takes longer than the ear waits.
  async hear(version, residual = this.residual) {
    [this.version, this.residual] = [version, residual];
    this.showChoice();
    await this.ready();
    if (this.transport.heard === this.sound) return;
    this.transport.select(this.sound);
    if (!this.blind) await this.waves.load("", this.peaks(), this.transport.duration);
  }

  async loop(region) {
    await this.ready();
    this.regions.clearRegions();
    if (region) this.regions.addRegion({ start: region[0], end: region[1], color: REGION_COLOUR });
    else this.setLoop(null);
  }

  looped(region) { this.setLoop(region.end - region.start < SHORTEST_LOOP_S ? (region.remove(), null) : [region.start, region.end]); }

  setLoop(region) {
    this.transport.setLoop(region);
    this.loopButton.disabled = !region;
    this.say(region ? `loop from ${region[0].toFixed(1)} to ${region[1].toFixed(1)} seconds` : "loop over everything");
  }

  // [ and ] set the two ends of the loop where the cursor is.
  async edge(which) {
    await this.ready();
    const at = this.transport.currentTime;
    const [from, to] = this.transport.loop;
    const region = which === "from" ? [at, at < to - SHORTEST_LOOP_S ? to : this.transport.duration] : [at > from + SHORTEST_LOOP_S ? from : 0, at];
    if (region[1] - region[0] >= SHORTEST_LOOP_S) await this.loop(region);
  }

  async seek(seconds) {
    await this.ready();
    this.transport.currentTime = this.transport.currentTime + seconds;
  }

  close() {
    Player.all = Player.all.filter((player) => player !== this);
    this.channel.close();
    this.transport.pause();
    this.release();
  }

  say(text) { this.status.textContent = text; }

  showChoice() {
    for (const item of this.items) {
      const chosen = item.dataset.version === this.version;
      labelled(item, { "aria-checked": chosen, tabindex: chosen ? 0 : -1 });
    }
    this.residualBox.checked = this.residual;
    const name = this.items[this.versions.indexOf(this.version)].querySelector(".name").textContent;
    const kind = !this.residual ? "" : this.hasResidual(this.version) ? ", residual" : " (has no residual)";
    labelled(this.picture, { "aria-label": `spectrogram of ${name}${kind}` });
    this.say(`${name}${kind}`);
  }

  showPlaying() {
    const playing = !this.transport.paused;
    this.playButton.textContent = playing ? "❚❚ Pause" : "▶ Play";
    this.figure.dataset.playing = playing;
  }

  showTime() { this.time.textContent = `${this.transport.currentTime.toFixed(1)} / ${this.transport.duration.toFixed(1)} s`; }

  onKey(event) {
    const index = "1234567890".indexOf(event.key);
    const onVersion = event.target.closest?.("[role=radio]");
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const acts = {
      " ": () => this.toggle(), r: () => this.hear(this.version, !this.residual), Escape: () => this.loop(null),
      "[": () => this.edge("from"), "]": () => this.edge("to"), ArrowLeft: () => this.seek(-STEP_S), ArrowRight: () => this.seek(STEP_S),
    };
    if (index >= 0 && index < this.versions.length) this.hear(this.versions[index]);
    else if (turn && onVersion) this.turn(turn);
    else if (event.key === "Enter" && onVersion) this.hear(onVersion.dataset.version);
    else if (acts[event.key]) acts[event.key]();
    else return false;
    return true;
  }

  turn(by) {
    const index = (this.versions.indexOf(this.version) + by + this.versions.length) % this.versions.length;
    this.hear(this.versions[index]);
    this.items[index].focus();
  }
}

// Keys act on the player that was used last; what is typed into a field, or a button that space presses, is left alone.
document.addEventListener("keydown", (event) => {
  if (event.target.closest?.("textarea, select, input[type=text]")) return;
  const bracket = event.key === "[" || event.key === "]"; // many keyboards have them behind a modifier
  if ((event.ctrlKey || event.metaKey || event.altKey) && !bracket) return;
  if (event.key.startsWith("Arrow") ? event.target.closest?.("input") : event.repeat) return; // arrows move a slider
  if (event.key === " " && event.target.closest?.("button:not(.play), input[type=checkbox], summary, a")) return;
  const visible = Player.all.filter((player) => player.figure.offsetParent);
  const player = visible.includes(Player.active) ? Player.active : visible[0];
  if (player?.onKey(event)) event.preventDefault();
});

// What does not decode is left as the plain players that it was.
function giveUp(player, error) {
  const { figure } = player;
  for (const node of figure.querySelectorAll(".bar, .wave, .spectrogram")) node.remove();
  for (const audio of figure.querySelectorAll("audio")) audio.hidden = false;
  Player.all = Player.all.filter((other) => other !== player);
  figure.append(element("p", { className: "small", textContent: `This browser cannot play these versions together (${error.message}).` }));
}

function watch(figures, margin, act) {
  const observer = new IntersectionObserver((entries) => entries.forEach(act), { rootMargin: margin });
  figures.forEach((figure) => observer.observe(figure));
}

function startPlayers() {
  const figures = [...document.querySelectorAll("figure.player")];
  for (const figure of figures) new Player(figure);
  watch(figures, "200px", ({ isIntersecting, target: { player } }) => isIntersecting && player.ready().catch((error) => giveUp(player, error)));
  watch(figures, "4000px", ({ isIntersecting, target: { player } }) => isIntersecting || player.release());
  if (window.frameElement) { // in a notebook: as high as what it shows
    const fit = () => { window.frameElement.style.height = `${Math.ceil(document.body.getBoundingClientRect().height)}px`; };
    new ResizeObserver(fit).observe(document.body);
    fit();
  }
}
