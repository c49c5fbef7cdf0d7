// The player of a call page; inlined by call_page.py. Everything that was said is already in the page
// as text: this draws the sound, plays it, searches, and ties them together.
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

  let waves = [];
  let view = { start: 0, span: call.length_ms };
  let position = 0;
  let playable = false;
  let scrolledAt = -Infinity;

  async function inflate(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(inflated).arrayBuffer());
  }

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
    let [sum, most] = [0, 0];
    for (const peak of heard) {
      sum += peak;
      if (peak > most) most = peak;
    }
    return (sum / heard.length + most) / 2 / 255;
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
    // Each line stands for the same stretch of the call wherever the view begins.
    const perLine = (3 / width) * view.span;
    for (let line = Math.floor(view.start / perLine); wave; line++) {
      const [at, until] = [line * perLine, (line + 1) * perLine];
      const px = x(at);
      if (px >= width) break;
      const level = levelOf(wave, at, until);
      const spoken = turns.some((turn) => turn.start_ms < until && turn.end_ms > at);
      const size = Math.max(level * (height - 14), 1);
      pen.fillStyle = ink(spoken || level > 0.1 ? name : "rest");
      pen.beginPath();
      pen.roundRect(px, top + (height - size) / 2, 2, size, 1);
      pen.fill();
    }
    pen.fillStyle = ink("bad");
    const cuts = turns.filter((turn) => turn.interrupted_ms !== null)
      .map((turn) => x(turn.interrupted_ms)).filter((at) => at > -5 && at < width + 5);
    for (const at of cuts) {
      // Many lines would hide what they cross.
      if (cuts.length * 40 < width) pen.fillRect(at - 1, top - STRIP / 2, 2, height + STRIP / 2);
      pen.beginPath();
      pen.arc(at, top + height - 4, cuts.length * 40 < width ? 4 : 2.5, 0, 7);
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
    pen.font = "600 11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const { at, marks } of groupsOfMarks()) {
      pen.fillStyle = ink(marks.some((mark) => mark.bad) ? "bad" : "ink");
      pen.strokeStyle = ink("card");
      pen.lineWidth = 1.5;
      pen.beginPath();
      if (marks.length === 1) {
        for (const [dx, dy] of [[0, -7], [6, 0], [0, 7], [-6, 0]]) pen.lineTo(at + dx, middle + dy);
        pen.closePath();
      } else {
        const half = 6 + 3 * String(marks.length).length;
        pen.roundRect(at - half, middle - 8, 2 * half, 16, 8);
      }
      pen.fill();
      pen.stroke();
      if (marks.length === 1) continue;
      pen.fillStyle = ink("card");
      pen.fillText(String(marks.length), at, middle + 0.5);
    }
    pen.textAlign = "start";
  }

  const MARKS_APART = 30;
  const marks = [...call.marks].sort((a, b) => a.at_ms - b.at_ms);
  /** Tools and errors in the view; where they would cover each other, one mark with their number. */
  function groupsOfMarks() {
    const groups = [];
    for (const mark of marks) {
      const at = x(mark.at_ms);
      if (at < 0 || at > timeline.clientWidth) continue;
      const group = groups.at(-1);
      if (group && at - group.from < MARKS_APART) group.marks.push(mark);
      else groups.push({ from: at, marks: [mark] });
    }
    for (const group of groups) {
      const middle = (group.from + x(group.marks.at(-1).at_ms)) / 2;
      group.at = Math.min(Math.max(middle, MARKS_APART / 2), timeline.clientWidth - MARKS_APART / 2);
      if (group.marks.length === 1) group.at = group.from;
    }
    // At the edge the last one may have been pushed over the one before.
    if (groups.length > 1 && groups.at(-1).at - groups.at(-2).at < MARKS_APART) {
      groups.at(-2).marks.push(...groups.pop().marks);
    }
    return groups;
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
    const isWhole = span >= call.length_ms;
    byId("wider").disabled = byId("all").disabled = isWhole;
    byId("closer").disabled = span <= Math.min(SHORTEST_VIEW_MS, call.length_ms);
    byId("whole").hidden = isWhole;
    byId("part").style.left = `${(view.start / call.length_ms) * 100}%`;
    byId("part").style.width = `max(${(span / call.length_ms) * 100}%, 6px)`;
    draw();
  }

  /** Keeps the position (or `at`, a share of the view) where it is on the screen. */
  function zoom(factor, at = (position - view.start) / view.span) {
    const kept = at >= 0 && at <= 1 ? at : 0.5;
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

  /** Undo what sound.py did to the recording: 8 bits, companded, side after side, deflated. */
  async function unpack({ rate, sides }) {
    const bytes = await inflate(byId("sound").textContent);
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

  try {
    document.querySelector(".back").hash = sessionStorage.getItem("calls") ?? "";
  } catch { /* This browser keeps the pages apart. */ }

  const msAt = (event) => {
    const box = timeline.getBoundingClientRect();
    return view.start + ((event.clientX - box.left) / box.width) * view.span;
  };

  function whatIsAt(ms, y) {
    if (Math.abs(y - laneHeight() - STRIP / 2) < STRIP / 2) {
      const near = groupsOfMarks().find((group) => Math.abs(group.at - x(ms)) < 12);
      if (!near) return "";
      const counts = new Map();
      for (const { name } of near.marks) counts.set(name, (counts.get(name) ?? 0) + 1);
      return [...counts].map(([name, n]) => (n > 1 ? `${n} \u00d7 ${name}` : name)).join(", ")
        .slice(0, 80);
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
  timeline.addEventListener("pointerup", () => {
    const here = call.turns.findLastIndex((turn) => turn.start_ms <= position);
    turnItems[here]?.scrollIntoView({ block: "nearest" });
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
    if (event.ctrlKey) {
      event.preventDefault();
      zoom(2 ** (event.deltaY / 100), (msAt(event) - view.start) / view.span);
      return;
    }
    if (view.span >= call.length_ms || Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    event.preventDefault();
    show(view.start + (event.deltaX / timeline.clientWidth) * view.span, view.span);
  }, { passive: false });

  // The bar under a part of the call moves it.
  const whole = byId("whole");
  const movePart = (event) => {
    const box = whole.getBoundingClientRect();
    const middle = ((event.clientX - box.left) / box.width) * call.length_ms;
    show(middle - view.span / 2, view.span);
  };
  whole.addEventListener("pointerdown", (event) => {
    whole.setPointerCapture(event.pointerId);
    movePart(event);
  });
  whole.addEventListener("pointermove", (event) => {
    if (whole.hasPointerCapture(event.pointerId)) movePart(event);
  });

  byId("play").addEventListener("click", togglePlaying);
  byId("all").addEventListener("click", () => show(0, call.length_ms));
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

  // The waits, which the page has slowest first

  const waits = byId("waits");
  const bySlowness = waits ? [...waits.children] : [];
  const at = (item) => Number(item.querySelector("[data-ms]").dataset.ms);
  function orderWaits(slowestFirst) {
    waits.append(...slowestFirst ? bySlowness : [...bySlowness].sort((a, b) => at(a) - at(b)));
    waits.scrollTop = 0;
    byId("slowest-first").setAttribute("aria-pressed", slowestFirst);
    byId("as-they-came").setAttribute("aria-pressed", !slowestFirst);
  }
  byId("slowest-first")?.addEventListener("click", () => orderWaits(true));
  byId("as-they-came")?.addEventListener("click", () => orderWaits(false));

  // The transcript: searched, copied, kept as a file

  const items = [...byId("transcript").children];
  let matches = [];
  let match = -1;

  function search() {
    const wanted = byId("search").value.trim().toLowerCase();
    const ranges = [];
    matches = [];
    for (const item of wanted ? items : []) {
      const before = ranges.length;
      const texts = document.createTreeWalker(item, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) {
        // What the page says of a turn was not said in it.
        if (texts.currentNode.parentElement.closest(".about")) continue;
        const text = texts.currentNode.data.toLowerCase();
        for (let i = text.indexOf(wanted); i >= 0; i = text.indexOf(wanted, i + wanted.length)) {
          const range = new Range();
          // Lower case may be longer than what it was made of.
          range.setStart(texts.currentNode, Math.min(i, texts.currentNode.length));
          range.setEnd(texts.currentNode, Math.min(i + wanted.length, texts.currentNode.length));
          ranges.push(range);
        }
      }
      if (ranges.length > before) matches.push(item);
    }
    globalThis.CSS?.highlights?.set("match", new Highlight(...ranges));
    match = -1;
    byId("before").hidden = byId("after").hidden = !matches.length;
    byId("found").textContent = wanted ? `${matches.length || "none"} found` : "";
    goToMatch(0);
  }

  function goToMatch(step) {
    items.forEach((item) => item.classList.remove("match"));
    if (!matches.length) return;
    match = match < 0 ? 0 : (match + step + matches.length) % matches.length;
    const item = matches[match];
    item.classList.add("match");
    const wanted = byId("search").value.trim().toLowerCase();
    for (const details of item.querySelectorAll("details")) {
      const isInside = [...details.children].some((child) =>
        child.tagName !== "SUMMARY" && child.textContent.toLowerCase().includes(wanted));
      if (isInside) details.open = true;
    }
    item.scrollIntoView({ block: "center" });
    byId("found").textContent = `${match + 1} of ${matches.length}`;
  }

  const oneLine = (element) => element.textContent.replace(/\s+/g, " ").trim();
  function transcriptAsText() {
    const lines = [oneLine(document.querySelector(".head h1")),
      ...[...document.querySelectorAll(".about-call > *, .ending")].map(oneLine), ""];
    for (const item of items) {
      if (item.classList.contains("turn")) {
        lines.push(`${oneLine(item.querySelector(".about button"))}`,
          `    ${item.querySelector(".said p").textContent}`);
      } else {
        lines.push(`  [${oneLine(item.querySelector("summary") ?? item)}]`);
      }
    }
    return `${lines.join("\n")}\n`;
  }

  byId("search").addEventListener("input", search);
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") goToMatch(event.shiftKey ? -1 : 1);
    else if (event.key === "Escape") {
      byId("search").value = "";
      search();
      byId("search").blur();
    } else return;
    event.preventDefault();
  });
  byId("after").addEventListener("click", () => goToMatch(1));
  byId("before").addEventListener("click", () => goToMatch(-1));
  byId("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(transcriptAsText());
      byId("copy").textContent = "Copied";
    } catch {
      byId("copy").textContent = "Not allowed here";
    }
    setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
  });
  byId("download").addEventListener("click", () => {
    const file = new Blob([transcriptAsText()], { type: "text/plain;charset=utf-8" });
    byId("download").download = `${call.name}.txt`;
    byId("download").href = URL.createObjectURL(file);
  });

  const isTyping = (event) => event.target.closest("summary, a, pre, input, .small");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
    if (event.key === "/") {
      byId("search").focus();
      byId("search").select();
    } else if (event.key === "+" || event.key === "=") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else if (event.key === " ") {
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
  Promise.all(call.waves.map(inflate)).then((inflated) => {
    waves = inflated;
    draw();
  }, () => { note.textContent = "This browser is too old to draw the sound."; });
  prepareSound();
})();
