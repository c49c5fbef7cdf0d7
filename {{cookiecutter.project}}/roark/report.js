// The player of a call page; inlined by report.py. Everything that was said is already in the page
// as text: this draws the sound, plays it, and ties the two together.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const call = JSON.parse(byId("call").textContent);
  const audio = byId("recording");
  const timeline = byId("timeline");
  const canvas = timeline.querySelector("canvas");
  const cursor = byId("cursor");
  const tip = byId("tip");
  const note = byId("note");
  const turnItems = [...document.querySelectorAll(".turn")];

  const AXIS = 20;
  const STRIP = 26;
  const SHORTEST_VIEW_MS = 4000;
  const SKIP_MS = 5000;
  const SPEEDS = [1, 1.25, 1.5, 2, 0.75];

  const waves = call.waves.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  let view = { start: 0, span: call.length_ms };
  let position = 0;
  let playable = false;
  let scrolledAt = -Infinity;

  const clock = (ms) => {
    const seconds = Math.floor(ms / 1000);
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
    const two = (n) => String(n).padStart(2, "0");
    return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
  };
  const x = (ms) => ((ms - view.start) / view.span) * timeline.clientWidth;
  const laneHeight = () => (timeline.clientHeight - AXIS - STRIP) / 2;
  const laneTop = (side) => (side ? laneHeight() + STRIP : 0);

  // The picture

  function draw() {
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [timeline.clientWidth, timeline.clientHeight];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(`--${name}`).trim();
    drawAxis(pen, ink, width, height);
    for (const side of [0, 1]) drawLane(pen, ink, side, width);
    drawStrip(pen, ink);
    place();
  }

  function drawAxis(pen, ink, width, height) {
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600].map((s) => s * 1000);
    const step = steps.find((ms) => (ms / view.span) * width >= 64) || 7200000;
    pen.font = "11.5px system-ui, sans-serif";
    pen.textBaseline = "bottom";
    for (let ms = Math.ceil(view.start / step) * step; ms <= view.start + view.span; ms += step) {
      pen.fillStyle = ink("line");
      pen.fillRect(x(ms), 0, 1, height - AXIS + 4);
      const label = clock(ms);
      const left = x(ms) - (ms ? pen.measureText(label).width / 2 : 0);
      if (left + pen.measureText(label).width > width) continue;
      pen.fillStyle = ink("muted");
      pen.fillText(label, left, height);
    }
  }

  /** How loud a side is over a stretch of the call, 0 to 1: half its average, half its peak. */
  function levelOf(wave, fromMs, untilMs) {
    const first = Math.floor(fromMs / call.bucket_ms);
    const heard = wave.subarray(first, Math.max(Math.ceil(untilMs / call.bucket_ms), first + 1));
    if (!heard.length) return 0;
    const average = heard.reduce((sum, peak) => sum + peak, 0) / heard.length;
    return (average + Math.max(...heard)) / 2 / 255;
  }

  function drawLane(pen, ink, side, width) {
    const turns = call.turns.filter((turn) => turn.side === side);
    const [top, height] = [laneTop(side), laneHeight()];
    const name = side ? "bot" : "caller";
    // Without a sound to draw on them the turns are the picture.
    const band = waves.length ? height - 2 : height / 2;
    pen.fillStyle = ink(waves.length ? `${name}-tint` : name);
    for (const turn of turns) {
      pen.beginPath();
      const left = x(turn.start_ms);
      pen.roundRect(left, top + (height - band) / 2, Math.max(x(turn.end_ms) - left, 3), band, 7);
      pen.fill();
    }
    const wave = waves[side] || waves[0];
    for (let px = 0; wave && px < width; px += 3) {
      const at = view.start + (px / width) * view.span;
      const until = at + (3 / width) * view.span;
      const level = levelOf(wave, at, until);
      const spoken = turns.some((turn) => turn.start_ms < until && turn.end_ms > at);
      const size = Math.max(level * (height - 14), 1);
      pen.fillStyle = ink(spoken || level > 0.1 ? name : "rest");
      pen.beginPath();
      pen.roundRect(px, top + (height - size) / 2, 2, size, 1);
      pen.fill();
    }
    pen.fillStyle = ink("bad");
    for (const turn of turns) {
      if (turn.interrupted_ms === null) continue;
      const at = x(turn.interrupted_ms);
      pen.fillRect(at - 1, top - STRIP / 2, 2, height + STRIP / 2);
      pen.beginPath();
      pen.arc(at, top + height - 4, 4, 0, 7);
      pen.fill();
    }
  }

  // Between the lanes, to scale: what the caller waited for, tools, errors.
  function drawStrip(pen, ink) {
    const middle = laneHeight() + STRIP / 2;
    for (const wait of call.waits) {
      let at = wait.from_ms;
      for (const [part, ms] of wait.parts) {
        pen.fillStyle = ink(part);
        pen.fillRect(x(at), middle - 4, x(at + ms) - x(at), 8);
        at += ms;
      }
    }
    for (const mark of call.marks) {
      pen.fillStyle = ink(mark.bad ? "bad" : "ink");
      pen.beginPath();
      const at = x(mark.at_ms);
      for (const [dx, dy] of [[0, -7], [6, 0], [0, 7], [-6, 0]]) pen.lineTo(at + dx, middle + dy);
      pen.fill();
      pen.lineWidth = 1.5;
      pen.strokeStyle = ink("card");
      pen.stroke();
    }
  }

  // The position

  function place() {
    const at = x(position);
    cursor.hidden = at < 0 || at > timeline.clientWidth;
    cursor.style.transform = `translateX(${at}px)`;
    const text = `${clock(position)} of ${clock(call.length_ms)}`;
    if (byId("time").textContent !== text) {
      byId("time").textContent = text;
      timeline.setAttribute("aria-valuenow", Math.round(position / 1000));
      timeline.setAttribute("aria-valuetext", text);
    }
  }

  function moveTo(ms) {
    position = Math.min(Math.max(ms, 0), call.length_ms);
    const inside = position >= view.start && position <= view.start + view.span;
    if (!inside) show(position - view.span * 0.1, view.span);
    const now = call.turns.findLastIndex((t) => t.start_ms <= position && position < t.end_ms);
    turnItems.forEach((item, index) => {
      if (item.classList.toggle("now", index === now) && !audio.paused) follow(item);
    });
    place();
  }

  let followed = null;
  function follow(item) {
    if (item === followed || performance.now() - scrolledAt < 4000) return;
    followed = item;
    item.scrollIntoView({ block: "nearest" });
  }

  function seek(ms, thenPlay) {
    moveTo(ms);
    if (!playable) return;
    audio.currentTime = position / 1000;
    if (thenPlay) audio.play();
  }

  function togglePlaying() {
    if (!playable) return;
    if (!audio.paused) audio.pause();
    else audio.play();
  }

  function show(start, span) {
    span = Math.min(Math.max(span, Math.min(SHORTEST_VIEW_MS, call.length_ms)), call.length_ms);
    view = { start: Math.min(Math.max(start, 0), call.length_ms - span), span };
    byId("wider").disabled = span >= call.length_ms;
    draw();
  }

  function zoom(factor) {
    const share = (position - view.start) / view.span;
    const kept = share >= 0 && share <= 1 ? share : 0.5;
    const anchor = view.start + kept * view.span;
    show(anchor - kept * view.span * factor, view.span * factor);
  }

  function step(direction) {
    const starts = call.turns.map((turn) => turn.start_ms);
    const next = direction > 0
      ? starts.find((ms) => ms > position + 10)
      : starts.findLast((ms) => ms < position - 500);
    seek(next ?? (direction > 0 ? call.length_ms : 0));
  }

  function eachFrame() {
    if (audio.paused) return;
    moveTo(audio.currentTime * 1000);
    requestAnimationFrame(eachFrame);
  }

  // The sound

  /** Undo what report.py did to the recording: 8 bits, companded, side after side, deflated. */
  async function unpack({ rate, sides }) {
    const packed = Uint8Array.from(atob(byId("sound").textContent), (c) => c.charCodeAt(0));
    const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(inflated).arrayBuffer());
    const length = bytes.length / sides;
    const level = Array.from({ length: 256 }, (_, byte) => {
      const y = (byte - 128) / 127;
      return Math.round((Math.sign(y) * 32767 * (256 ** Math.abs(y) - 1)) / 255);
    });
    const wav = new DataView(new ArrayBuffer(44 + 2 * bytes.length));
    const name = (at, text) => [...text].forEach((c, i) => wav.setUint8(at + i, c.charCodeAt(0)));
    name(0, "RIFF");
    wav.setUint32(4, 36 + 2 * bytes.length, true);
    name(8, "WAVEfmt ");
    wav.setUint32(16, 16, true);
    wav.setUint16(20, 1, true);
    wav.setUint16(22, sides, true);
    wav.setUint32(24, rate, true);
    wav.setUint32(28, rate * sides * 2, true);
    wav.setUint16(32, sides * 2, true);
    wav.setUint16(34, 16, true);
    name(36, "data");
    wav.setUint32(40, 2 * bytes.length, true);
    for (let side = 0; side < sides; side++) {
      for (let i = 0; i < length; i++) {
        wav.setInt16(44 + 2 * (i * sides + side), level[bytes[side * length + i]], true);
      }
    }
    return URL.createObjectURL(new Blob([wav], { type: "audio/wav" }));
  }

  async function prepareSound() {
    if (!call.sound) return;
    audio.addEventListener("error", () => {
      playable = false;
      byId("play").disabled = true;
      note.textContent = call.sound.file
        ? `${call.sound.file} is not beside this page, so there is nothing to play.`
        : "This browser cannot play the recording.";
    });
    audio.addEventListener("loadedmetadata", () => {
      playable = true;
      byId("play").disabled = byId("speed").disabled = false;
      audio.currentTime = position / 1000;
    });
    audio.addEventListener("play", () => {
      document.body.classList.add("playing");
      byId("play").setAttribute("aria-label", "Pause");
      eachFrame();
    });
    audio.addEventListener("pause", () => {
      document.body.classList.remove("playing");
      byId("play").setAttribute("aria-label", "Play");
    });
    try {
      audio.src = call.sound.file || (await unpack(call.sound));
    } catch {
      note.textContent = "This browser is too old to play the recording.";
    }
  }

  // Hands

  const msAt = (event) => {
    const box = timeline.getBoundingClientRect();
    return view.start + ((event.clientX - box.left) / box.width) * view.span;
  };

  function whatIsAt(ms, y) {
    if (Math.abs(y - laneHeight() - STRIP / 2) < STRIP / 2) {
      const near = call.marks.find((mark) => Math.abs(x(mark.at_ms) - x(ms)) < 8);
      return near ? near.name.slice(0, 80) : "";
    }
    const side = y > laneHeight() ? 1 : 0;
    const over = call.turns.findIndex(
      (turn) => turn.side === side && turn.start_ms <= ms && ms <= turn.end_ms,
    );
    return over < 0 ? "" : turnItems[over].querySelector("p").textContent.slice(0, 80);
  }

  timeline.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    timeline.setPointerCapture(event.pointerId);
    seek(msAt(event));
  });
  timeline.addEventListener("pointermove", (event) => {
    const ms = msAt(event);
    if (timeline.hasPointerCapture(event.pointerId)) seek(ms);
    const box = timeline.getBoundingClientRect();
    tip.textContent = `${clock(Math.max(ms, 0))} ${whatIsAt(ms, event.clientY - box.top)}`;
    tip.hidden = event.pointerType === "touch";
    const left = event.clientX - box.left + 10;
    tip.style.left = `${Math.max(Math.min(left, timeline.clientWidth - tip.offsetWidth), 0)}px`;
  });
  timeline.addEventListener("pointerleave", () => { tip.hidden = true; });
  timeline.addEventListener("wheel", (event) => {
    if (view.span >= call.length_ms || Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    event.preventDefault();
    show(view.start + (event.deltaX / timeline.clientWidth) * view.span, view.span);
  }, { passive: false });

  byId("play").addEventListener("click", togglePlaying);
  byId("closer").addEventListener("click", () => zoom(0.5));
  byId("wider").addEventListener("click", () => zoom(2));
  byId("speed").addEventListener("click", () => {
    audio.playbackRate = SPEEDS[(SPEEDS.indexOf(audio.playbackRate) + 1) % SPEEDS.length];
    byId("speed").textContent = `${audio.playbackRate}\u00d7`;
  });

  document.addEventListener("click", (event) => {
    const place = event.target.closest("[data-ms]");
    if (place && !String(getSelection())) seek(Number(place.dataset.ms), true);
  });

  const isTyping = (event) => event.target.closest("summary, a, pre, .small");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " ") {
      if (isTyping(event)) return;
      togglePlaying();
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const direction = event.key === "ArrowLeft" ? -1 : 1;
      if (event.shiftKey) step(direction);
      else seek(position + direction * SKIP_MS);
    } else if (event.key === "Home" && event.target === timeline) seek(0);
    else if (event.key === "End" && event.target === timeline) seek(call.length_ms);
    else return;
    event.preventDefault();
  });
  // Firefox presses the focused button when the space bar comes up again.
  document.addEventListener("keyup", (event) => {
    if (event.key === " " && !isTyping(event)) event.preventDefault();
  });
  for (const movement of ["wheel", "touchmove"]) {
    addEventListener(movement, () => { scrolledAt = performance.now(); }, { passive: true });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(timeline);
  show(0, call.length_ms);
  prepareSound();
})();
