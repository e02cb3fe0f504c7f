// The switching player: several versions of an excerpt under one transport. Needs wavesurfer.js and two plugins.
//
// A <figure class="player" data-rate="16000"> has one <li data-version> per version, each with an <audio>; without scripts
// these are plain players. All versions are decoded and started at the same sample of one clock, and only one has a gain
// above zero. So a switch changes two gains and cannot change the position.
"use strict";

const FADE_S = 0.008; // cross-fade between versions: inaudible, but long enough to avoid clicks
const START_S = 0.01; // start in the near future, so that all versions start at the same sample
const STEP_S = 1; // arrow keys
const MIN_LOOP_S = 0.1;
const REGION_COLOUR = "rgba(31, 90, 153, 0.18)";
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const setAttributes = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

// Decode an <audio> with a data: URI at `rate`, without a request.
async function decode(audio, rate) {
  const bytes = Uint8Array.from(atob(audio.src.split(",")[1]), (letter) => letter.charCodeAt(0));
  return new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes.buffer);
}

const contexts = new Map(); // one per rate, created at the first sound: browsers require a key press or click before
function contextOf(rate) {
  if (!contexts.has(rate)) contexts.set(rate, new AudioContext({ sampleRate: rate }));
  return contexts.get(rate);
}

// Mixture minus version.
function difference(mixture, version) {
  const { numberOfChannels, sampleRate } = mixture;
  const made = new AudioBuffer({ numberOfChannels, sampleRate, length: Math.min(mixture.length, version.length) });
  for (let channel = 0; channel < numberOfChannels; channel += 1) {
    const [all, part] = [mixture, version].map((buffer) => buffer.getChannelData(channel));
    made.copyToChannel(Float32Array.from({ length: made.length }, (_, index) => all[index] - part[index]), channel);
  }
  return made;
}

// Media element for wavesurfer: all sounds play and loop in step, and one is audible.
class Transport extends EventTarget {
  constructor(buffers, rate) {
    super();
    this.buffers = buffers; // {name: AudioBuffer}
    this.rate = rate;
    this.selected = Object.keys(buffers)[0];
    this.duration = Math.min(...Object.values(buffers).map((buffer) => buffer.duration));
    this.paused = true;
    this.position = 0; // seconds, at time `startedAt` of the context's clock
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
    this.fade(this.selected, this.startedAt);
    const wasPaused = this.paused;
    this.paused = false;
    if (wasPaused) this.emit("play");
  }

  connectOutput(context) {
    const output = new GainNode(context);
    output.connect(context.destination);
    return output;
  }

  // Fade in `name` and fade out all others.
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
    this.selected = name;
    if (!this.paused) this.fade(name);
  }

  setLoop(region) {
    const at = this.currentTime;
    this.region = region;
    const [from, to] = this.loop;
    if (at < from || at >= to) {
      this.restart(from);
    } else if (!this.paused) { // continue at the same position, with new loop ends
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

// One figure: version list, play, residual and loop controls; waveform and spectrogram of the selected sound.
class Player {
  static all = [];
  static active = null; // receives the keys

  constructor(figure) {
    this.figure = figure;
    this.rate = Number(figure.dataset.rate);
    this.items = [...figure.querySelectorAll("li[data-version]")];
    this.versions = this.items.map((item) => item.dataset.version);
    this.version = this.versions[0];
    this.residual = false;
    this.channel = new BroadcastChannel("mss-players"); // only one player plays at a time, also across the iframes of a notebook
    this.channel.onmessage = () => this.transport?.pause();
    this.build();
    Player.all.push(this);
    figure.player = this;
  }

  build() {
    this.playButton = element("button", { type: "button", className: "play", textContent: "▶ Play", onclick: () => this.toggle() });
    this.time = element("span", { className: "time" });
    this.residualBox = element("input", { type: "checkbox", onchange: (event) => this.select(this.version, event.target.checked) });
    const residual = element("label", {}, this.residualBox, " residual");
    residual.hidden = !this.versions.includes("mixture") || this.blind;
    this.loopButton = element("button", { type: "button", textContent: "loop all", disabled: true, onclick: () => this.loop(null) });
    this.status = setAttributes(element("span", { className: "visually-hidden" }), { role: "status" });
    const bar = element("div", { className: "bar" }, this.playButton, this.time, this.loopButton, residual, this.status);
    this.list = this.figure.querySelector(".versions");
    setAttributes(this.list, { role: "radiogroup", "aria-label": "version" });
    this.items.forEach((item, index) => this.buildVersion(item, index));
    this.wave = element("div", { className: "wave" });
    this.picture = element("div", { className: "spectrogram" });
    setAttributes(this.picture, { role: "img" });
    this.picture.hidden = this.blind;
    this.list.after(bar, this.wave, this.picture);
    this.figure.addEventListener("pointerdown", () => { Player.active = this; });
    this.figure.addEventListener("focusin", () => { Player.active = this; });
    this.showChoice();
  }

  buildVersion(item, index) {
    item.querySelector("audio").hidden = true;
    setAttributes(item, { role: "radio", tabindex: "-1" });
    if (index < 10) item.prepend(setAttributes(element("kbd", { textContent: (index + 1) % 10 }), { "aria-hidden": "true" }));
    item.addEventListener("click", () => this.select(item.dataset.version));
  }

  // Decode and draw when the player is near the screen or used.
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

  // Far from the screen a paused player frees its memory; it is prepared again when it comes near.
  release() {
    if (!this.transport?.paused) return;
    this.waves.destroy();
    this.waves = this.transport = this.preparing = undefined;
    this.loopButton.disabled = true;
    delete this.figure.dataset.ready;
  }

  get blind() { return this.figure.dataset.blind !== undefined; }

  // A blind test has no spectrogram, and its waveform is always that of the reference: pictures identify versions.
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
      this.onRegion(region);
    });
    this.regions.on("region-updated", (region) => this.onRegion(region));
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

  // Switch the sound first, because drawing is slow.
  async select(version, residual = this.residual) {
    [this.version, this.residual] = [version, residual];
    this.showChoice();
    await this.ready();
    if (this.transport.selected === this.sound) return;
    this.transport.select(this.sound);
    if (!this.blind) await this.waves.load("", this.peaks(), this.transport.duration);
  }

  async loop(region) {
    await this.ready();
    this.regions.clearRegions();
    if (region) this.regions.addRegion({ start: region[0], end: region[1], color: REGION_COLOUR });
    else this.setLoop(null);
  }

  onRegion(region) { this.setLoop(region.end - region.start < MIN_LOOP_S ? (region.remove(), null) : [region.start, region.end]); }

  setLoop(region) {
    this.transport.setLoop(region);
    this.loopButton.disabled = !region;
    this.announce(region ? `loop from ${region[0].toFixed(1)} to ${region[1].toFixed(1)} seconds` : "loop over everything");
  }

  // Keys [ and ]: set one end of the loop to the current position.
  async moveLoopEdge(which) {
    await this.ready();
    const at = this.transport.currentTime;
    const [from, to] = this.transport.loop;
    const region = which === "from" ? [at, at < to - MIN_LOOP_S ? to : this.transport.duration] : [at > from + MIN_LOOP_S ? from : 0, at];
    if (region[1] - region[0] >= MIN_LOOP_S) await this.loop(region);
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

  announce(text) { this.status.textContent = text; }

  showChoice() {
    for (const item of this.items) {
      const chosen = item.dataset.version === this.version;
      setAttributes(item, { "aria-checked": chosen, tabindex: chosen ? 0 : -1 });
    }
    this.residualBox.checked = this.residual;
    const name = this.items[this.versions.indexOf(this.version)].querySelector(".name").textContent;
    const kind = !this.residual ? "" : this.hasResidual(this.version) ? ", residual" : " (has no residual)";
    setAttributes(this.picture, { "aria-label": `spectrogram of ${name}${kind}` });
    this.announce(`${name}${kind}`);
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
      " ": () => this.toggle(), r: () => this.select(this.version, !this.residual), Escape: () => this.loop(null),
      "[": () => this.moveLoopEdge("from"), "]": () => this.moveLoopEdge("to"), ArrowLeft: () => this.seek(-STEP_S), ArrowRight: () => this.seek(STEP_S),
    };
    if (index >= 0 && index < this.versions.length) this.select(this.versions[index]);
    else if (turn && onVersion) this.moveSelection(turn);
    else if (event.key === "Enter" && onVersion) this.select(onVersion.dataset.version);
    else if (acts[event.key]) acts[event.key]();
    else return false;
    return true;
  }

  moveSelection(by) {
    const index = (this.versions.indexOf(this.version) + by + this.versions.length) % this.versions.length;
    this.select(this.versions[index]);
    this.items[index].focus();
  }
}

// Keys act on the player used last, except in text fields and where a focused control uses the key itself.
document.addEventListener("keydown", (event) => {
  if (event.target.closest?.("textarea, select, input[type=text]")) return;
  const bracket = event.key === "[" || event.key === "]"; // many keyboards need a modifier for these
  if ((event.ctrlKey || event.metaKey || event.altKey) && !bracket) return;
  if (event.key.startsWith("Arrow") ? event.target.closest?.("input") : event.repeat) return; // arrow keys move a slider
  if (event.key === " " && event.target.closest?.("button:not(.play), input[type=checkbox], summary, a")) return;
  const visible = Player.all.filter((player) => player.figure.offsetParent);
  const player = visible.includes(Player.active) ? Player.active : visible[0];
  if (player?.onKey(event)) event.preventDefault();
});

// Restore the plain players where decoding fails.
function restorePlainPlayers(player, error) {
  const { figure } = player;
  for (const node of figure.querySelectorAll(".bar, .wave, .spectrogram")) node.remove();
  for (const audio of figure.querySelectorAll("audio")) audio.hidden = false;
  Player.all = Player.all.filter((other) => other !== player);
  figure.append(element("p", { className: "small", textContent: `This browser cannot play these versions together (${error.message}).` }));
}

function observe(figures, margin, act) {
  const observer = new IntersectionObserver((entries) => entries.forEach(act), { rootMargin: margin });
  figures.forEach((figure) => observer.observe(figure));
}

function startPlayers() {
  const figures = [...document.querySelectorAll("figure.player")];
  for (const figure of figures) new Player(figure);
  observe(figures, "200px", ({ isIntersecting, target: { player } }) => isIntersecting && player.ready().catch((error) => restorePlainPlayers(player, error)));
  observe(figures, "4000px", ({ isIntersecting, target: { player } }) => isIntersecting || player.release());
  if (window.frameElement) { // in an iframe: fit its height to the content
    const fit = () => { window.frameElement.style.height = `${Math.ceil(document.body.getBoundingClientRect().height)}px`; };
    new ResizeObserver(fit).observe(document.body);
    fit();
  }
}

startPlayers();
