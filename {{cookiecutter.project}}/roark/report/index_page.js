// The list of calls; inlined by index_page.py. All text of a call is put in as text, never as HTML.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const { calls, watched, searched } = JSON.parse(byId("calls").textContent);

  const PAGE_ROWS = 100;
  const RELOAD_MS = 30_000;
  const BAD = ["error", "process-died"];
  const GOOD = ["agent-ended", "client-disconnected", "transferred"];
  const FIELDS = ["search", "ending", "agent", "slow", "failed", "errors", "undelivered"];

  // Figures

  const sorted = (numbers) => [...numbers].sort((a, b) => a - b);
  /** The value below which that share of sorted numbers lies, interpolated; undefined of none. */
  function quantile(numbers, share) {
    const at = (numbers.length - 1) * share;
    const below = Math.floor(at);
    const step = (numbers[below + 1] ?? numbers[below]) - numbers[below];
    return numbers.length ? numbers[below] + step * (at - below) : undefined;
  }
  const two = (n) => String(n).padStart(2, "0");
  const clock = (ms) => {
    const s = Math.floor(ms / 1000);
    const minutes = Math.floor(s / 60) % 60;
    return s >= 3600
      ? `${Math.floor(s / 3600)}:${two(minutes)}:${two(s % 60)}`
      : `${minutes}:${two(s % 60)}`;
  };
  const seconds = (ms) => ms === undefined ? ""
    : ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${Math.round(ms)} ms`;
  const percent = (part, whole) => `${(100 * part / whole).toFixed(part && part < whole / 10 ? 1 : 0)} %`;
  const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  const isBad = (call) => BAD.includes(call.ending);

  const utc = (options) => new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", ...options });
  const dayName = utc({ weekday: "long", day: "numeric", month: "long", year: "numeric" });
  const shortDay = utc({ day: "numeric", month: "short", year: "numeric" });
  const hour = utc({ hour: "2-digit", minute: "2-digit" });

  for (const call of calls) {
    call.words ??= "";
    const waits = sorted(call.waits);
    call.response = quantile(waits, 0.5);
    call.slowest = waits.at(-1);
    const iso = call.started === null ? "" : new Date(call.started).toISOString();
    call.day = iso.slice(0, 10);
    call.facts = [call.agent, call.number, call.number.replace(/\D/g, ""), call.id, call.folder,
      call.ending, iso].join("\n").toLowerCase();
    call.said = call.words.toLowerCase();
  }
  const severalAgents = new Set(calls.map((call) => call.agent)).size > 1;

  // name, label, class, value to sort by, whether the largest comes first
  const COLUMNS = [
    ["started", "Time", "when", (c) => c.started ?? 0, true],
    ["number", "Caller", "caller", (c) => c.number],
    ...severalAgents ? [["agent", "Agent", "agent", (c) => c.agent]] : [],
    ["", "Conversation", "picture"],
    ["length", "Length", "number duration", (c) => c.length_ms, true],
    ["turns", "Turns", "number turns", (c) => c.turns, true],
    ["response", "Response", "number response", (c) => c.response ?? -1, true],
    ["slowest", "Slowest", "number slowest", (c) => c.slowest ?? -1, true],
    ["trouble", "Trouble", "trouble", (c) => c.failed + c.errors, true],
    ["ending", "Ending", "end", (c) => c.ending],
    ["roark", "Delivery", "delivery", (c) => c.roark],
  ];

  // The state is in the address, so that a reload or a way back finds it again.

  const state = { sort: "started", reverse: false, page: 0 };

  function readAddress() {
    const kept = new URLSearchParams(location.hash.slice(1));
    for (const name of FIELDS) {
      const field = byId(name);
      if (field.type === "checkbox") field.checked = kept.has(name);
      else field.value = kept.get(name) ?? "";
      if (field.selectedIndex < 0) field.value = "";
    }
    const [sort, reverse] = (kept.get("sort") ?? "started").split(" ");
    state.sort = COLUMNS.some(([name]) => name && name === sort) ? sort : "started";
    state.reverse = reverse === "reverse";
    state.page = Math.max(Number(kept.get("page")) - 1 || 0, 0);
  }

  function writeAddress() {
    const kept = new URLSearchParams();
    for (const name of FIELDS) {
      const field = byId(name);
      const value = field.type === "checkbox" ? field.checked && "1" : field.value;
      if (value) kept.set(name, value);
    }
    byId("clear").disabled = !kept.size;
    const order = state.sort + (state.reverse ? " reverse" : "");
    if (order !== "started") kept.set("sort", order);
    if (state.page) kept.set("page", state.page + 1);
    history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname);
    // The page of a call leads back to this view, where the browser lets files share anything.
    try {
      sessionStorage.setItem("calls", location.hash);
    } catch { /* Then it leads to the whole list. */ }
  }

  // Which calls

  function chosen() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const slow = Number(byId("slow").value);
    const found = calls.filter((call) =>
      (!byId("ending").value || call.ending === byId("ending").value) &&
      (!byId("agent").value || call.agent === byId("agent").value) &&
      (!slow || call.slowest > slow) &&
      (!byId("failed").checked || call.failed) &&
      (!byId("errors").checked || call.errors || isBad(call)) &&
      (!byId("undelivered").checked || call.roark === "undelivered") &&
      words.every((word) => call.facts.includes(word) || call.said.includes(word)));
    const [, , , value, largestFirst] = COLUMNS.find(([name]) => name === state.sort);
    const direction = (largestFirst ? -1 : 1) * (state.reverse ? -1 : 1);
    const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b);
    // Stable, and newest first from the start.
    return found.sort((a, b) => direction * order(value(a), value(b)));
  }

  // The page

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function strip(call) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 150 22");
    svg.setAttribute("aria-hidden", "true");
    call.strip.forEach((stretches, side) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      let shape = "";
      for (let i = 0; i < stretches.length; i += 2) {
        shape += `M${stretches[i]} ${side ? 12 : 2}h${stretches[i + 1]}v8h-${stretches[i + 1]}z`;
      }
      path.setAttribute("d", shape);
      path.setAttribute("class", side ? "strip-bot" : "strip-caller");
      svg.append(path);
    });
    return svg;
  }

  /** Where a searched word was said, with some of what stands around it. */
  function excerpt(call) {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const word = words.find((one) => !call.facts.includes(one));
    const at = word ? call.said.indexOf(word) : -1;
    if (at < 0) return [];
    const [from, to] = [Math.max(at - 60, 0), at + word.length + 90];
    return [make("td", { class: "muted", dir: "auto", colspan: COLUMNS.length },
      `${from ? "\u2026" : ""}${call.words.slice(from, at)}`,
      make("mark", {}, call.words.slice(at, at + word.length)),
      `${call.words.slice(at + word.length, to)}${to < call.words.length ? "\u2026" : ""}`)];
  }

  function cell(name, call) {
    const tone = isBad(call) ? "bad" : GOOD.includes(call.ending) ? "good" : "";
    switch (name) {
      case "started": {
        const at = new Date(call.started ?? 0);
        const time = call.started === null ? call.folder
          : state.sort === "started" ? hour.format(at)
          : `${shortDay.format(at)}, ${hour.format(at)}`;
        const link = make("a", { href: `${encodeURIComponent(call.folder)}/report.html` }, time);
        return [link];
      }
      case "number": return [make("bdi", {}, call.number || "\u2013")];
      case "agent": return [make("bdi", {}, call.agent)];
      case "": return [strip(call)];
      case "length": return [clock(call.length_ms)];
      case "turns": return [String(call.turns)];
      case "response": return [seconds(call.response)];
      case "slowest": return call.slowest > 2000
        ? [make("span", { class: "slow" }, seconds(call.slowest))] : [seconds(call.slowest)];
      case "trouble": return [
        call.failed && count(call.failed, "failed tool"),
        call.errors && count(call.errors, "error"),
      ].filter(Boolean).map((said) => make("span", { class: "wrong" }, said));
      case "ending":
        return [make("span", { class: `badge ${tone}`, title: call.sentence }, call.ending)];
      default: return [make("span", {
        class: call.roark === "delivered" || call.roark === "kept here" ? "muted" : "wrong",
      }, call.roark)];
    }
  }

  function figures(some) {
    const waits = sorted(some.flatMap((call) => call.waits));
    return {
      bad: some.filter(isBad).length,
      median: seconds(quantile(waits, 0.5)),
      p95: seconds(quantile(waits, 0.95)),
      length: some.reduce((sum, call) => sum + call.length_ms, 0),
    };
  }

  function showTotals(found) {
    const { bad, median, p95, length } = figures(found);
    const failed = found.filter((call) => call.failed).length;
    const facts = [
      ["Calls", found.length.toLocaleString("en"), found.length < calls.length ? `of ${calls.length.toLocaleString("en")}` : ""],
      ["Error rate", found.length ? percent(bad, found.length) : "\u2013", bad ? count(bad, "call") : ""],
      ["Median response", median || "\u2013", ""],
      ["p95 response", p95 || "\u2013", ""],
      ["With a failed tool", String(failed), ""],
      ["Length of all", clock(length), ""],
    ];
    byId("totals").replaceChildren(...facts.map(([name, value, more]) => make("div", {},
      make("dt", {}, name), make("dd", {}, `${value} `, make("small", {}, more)))));
  }

  function dayRow(day, some) {
    const { bad, median, p95 } = figures(some);
    const title = day ? dayName.format(new Date(`${day}T00:00:00Z`)) : "No time known";
    const about = [count(some.length, "call"), bad && `${percent(bad, some.length)} errors`,
      median && `median ${median}`, p95 && `p95 ${p95}`].filter(Boolean).join(" \u00b7 ");
    return make("tr", { class: "day" }, make("th", { scope: "rowgroup", colspan: COLUMNS.length },
      title, make("span", { class: "muted" }, about)));
  }

  function showHead() {
    byId("table").tHead.rows[0].replaceChildren(...COLUMNS.map(([name, label, look, value]) => {
      const head = make("th", { scope: "col", class: look });
      if (!value) {
        head.append(label);
        return head;
      }
      const largestFirst = COLUMNS.find(([one]) => one === name)[4] ?? false;
      const here = state.sort === name;
      const down = here && largestFirst !== state.reverse;
      if (here) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const button = make("button", { type: "button" }, label,
        make("span", { "aria-hidden": "true" }, here ? (down ? " \u2193" : " \u2191") : ""));
      button.addEventListener("click", () => sortBy(name, here && !state.reverse));
      head.append(button);
      return head;
    }));
  }

  function sortBy(name, reverse) {
    Object.assign(state, { sort: name, reverse, page: 0 });
    byId("sort").value = name;
    show();
    byId("table").tHead.querySelector("[aria-sort] button")?.focus({ preventScroll: true });
  }

  function show() {
    const found = chosen();
    const pages = Math.max(Math.ceil(found.length / PAGE_ROWS), 1);
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * PAGE_ROWS;
    const here = found.slice(first, first + PAGE_ROWS);
    const table = byId("table");
    const byDay = state.sort === "started";
    const ofDay = new Map();
    for (const call of byDay ? found : []) {
      if (!ofDay.has(call.day)) ofDay.set(call.day, []);
      ofDay.get(call.day).push(call);
    }
    const bodies = [];
    let day = null;
    for (const call of here) {
      if (!bodies.length || (byDay && call.day !== day)) {
        bodies.push(make("tbody"));
        day = call.day;
        if (byDay) bodies.at(-1).append(dayRow(day, ofDay.get(day)));
      }
      bodies.at(-1).append(make("tr", {}, ...COLUMNS.map(([name, , look]) =>
        make("td", { class: look }, ...cell(name, call)))));
      const said = excerpt(call);
      if (said.length) bodies.at(-1).append(make("tr", { class: "more" }, ...said));
    }
    [...table.tBodies].forEach((body) => body.remove());
    table.append(...bodies);
    table.classList.toggle("by-day", byDay);
    showHead();
    showTotals(found);
    byId("empty").textContent = [
      !calls.length ? "No calls yet." : !found.length && "No call is like that.",
      byId("search").value && searched < calls.length &&
        `What was said is searched in the newest ${count(searched, "call")} only.`,
    ].filter(Boolean).join(" ");
    byId("empty").hidden = !byId("empty").textContent;
    byId("pages").hidden = pages < 2;
    byId("previous").disabled = !state.page;
    byId("next").disabled = state.page === pages - 1;
    byId("range").textContent =
      `${first + 1}\u2013${first + here.length} of ${found.length.toLocaleString("en")}`;
    writeAddress();
  }

  function choices(id, all, values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    const options = [...counts].sort((a, b) => b[1] - a[1]);
    byId(id).replaceChildren(make("option", { value: "" }, all),
      ...options.map(([value, n]) => make("option", { value }, `${value} (${n})`)));
  }

  // Hands

  choices("ending", "any", calls.map((call) => call.ending));
  choices("agent", "any", calls.map((call) => call.agent));
  byId("agents").hidden = !severalAgents;
  byId("sort").replaceChildren(...COLUMNS.filter(([, , , value]) => value)
    .map(([name, label]) => make("option", { value: name }, label)));
  const looked = new Date(document.lastModified);
  byId("looked").textContent = `As of ${shortDay.format(looked)}, ${hour.format(looked)} UTC`;

  let typed;
  byId("filters").addEventListener("input", (event) => {
    if (event.target.id === "sort") {
      sortBy(event.target.value, false);
      return;
    }
    state.page = 0;
    clearTimeout(typed);
    if (event.target.id === "search") typed = setTimeout(show, 120);
    else show();
  });
  byId("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typed);
    show();
    document.querySelector("td a")?.focus();
  });
  byId("filters").addEventListener("reset", (event) => {
    event.preventDefault();
    for (const name of FIELDS) {
      byId(name).value = "";
      byId(name).checked = false;
    }
    state.page = 0;
    show();
  });
  const turn = (step) => () => {
    state.page += step;
    show();
    byId("table").scrollIntoView();
  };
  byId("previous").addEventListener("click", turn(-1));
  byId("next").addEventListener("click", turn(1));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const search = byId("search");
    if (event.key === "Escape" && event.target === search) {
      search.value = "";
      search.blur();
      state.page = 0;
      show();
    } else if (event.target.matches("input, select")) {
      if (event.key !== "ArrowDown" || event.target !== search) return;
      document.querySelector("td a")?.focus();
    } else if (event.key === "/") {
      search.focus();
      search.select();
    } else if (event.key === "j" || event.key === "k") {
      const links = [...document.querySelectorAll("td a")];
      const at = links.indexOf(document.activeElement);
      const next = links[Math.max(at + (event.key === "j" ? 1 : -1), 0)];
      next?.focus();
      next?.scrollIntoView({ block: "nearest" });
    } else return;
    event.preventDefault();
  });
  addEventListener("hashchange", () => { readAddress(); show(); });

  readAddress();
  byId("sort").value = state.sort;
  show();

  // Somebody keeps the file up to date: look again whenever nobody is busy with this page.
  if (watched) {
    let busyAt = performance.now();
    for (const sign of ["keydown", "pointermove", "wheel", "touchmove"]) {
      addEventListener(sign, () => { busyAt = performance.now(); }, { passive: true });
    }
    setInterval(() => {
      const idle = performance.now() - busyAt > RELOAD_MS / 2 && !String(getSelection());
      if (document.visibilityState === "visible" && idle) location.reload();
    }, RELOAD_MS);
  }
})();
