// Shows the data of /api/events, once a second. Text from clients is set as text, never as markup.
import { chart, spark } from "./chart.js";

const KEPT = 300, SHOWN = 100, MOVES = 40, BAND_COLOURS = 6, FLOWS = 60, AGAIN_MS = 5000;
const $ = id => document.getElementById(id);
let history = [], decisions = [], latest = null, isPaused = false;

// Small things

const percent = part => `${Math.round(part * 100)}%`;
const clock = seconds => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== "") element.textContent = text;
  return element;
}

function put(id, text) { if ($(id).textContent !== String(text)) $(id).textContent = text; }

function pill(element, text, kind) {
  element.className = `pill ${kind}`;
  if (element.textContent !== text) element.textContent = text;
  return element;
}

// A bar of the current value, with a tick at its target or maximum.
function meter(holder, part, { tick = null, kind = "", label = "" } = {}) {
  holder.className = `meter ${kind}`;
  if (!holder.firstChild) holder.append(make("b"), make("i"));
  holder.firstChild.style.width = `${Math.min(1, Math.max(0, part)) * 100}%`;
  holder.lastChild.hidden = tick === null;
  if (tick !== null) holder.lastChild.style.left = `${Math.min(1, tick) * 100}%`;
  holder.setAttribute("role", "img");
  holder.setAttribute("aria-label", label);
  return holder;
}

// Rows are kept by key, so that focus and selection survive an update. Two items that look alike,
// such as a tenant with a control character and one with its escape, are two rows.
function rows(body, items, keyOf, create, update) {
  const old = new Map([...body.children].map(row => [row.dataset.key, row]));
  const taken = new Set();
  items.forEach((item, index) => {
    let key = String(keyOf(item));
    while (taken.has(key)) key += "'";
    taken.add(key);
    let row = old.get(key);
    old.delete(key);
    if (!row) { row = create(item); row.dataset.key = key; }
    update(row, item);
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
  });
  for (const row of old.values()) row.remove();
}

function cells(row, ...classes) {
  for (const each of classes) row.append(make("td", each));
  return row;
}

function set(cell, text) { if (cell.textContent !== String(text)) cell.textContent = text; }

function metered(cell) {
  const holder = make("div", "cell");
  holder.append(make("div", "meter"), make("span"));
  cell.append(holder);
  return cell;
}

function bandColour(priority) {
  const index = latest.bands.findIndex(band => band.priority === priority);
  return `var(--band-${Math.max(0, index) % BAND_COLOURS})`;
}

// Parts of the page

function room(view, isFull) {
  if (view.standby) return "Another replica decides.";
  if (view.endpoints.length === 0) return "The pool is empty: all requests wait.";
  if (isFull) return "Full: a waiting request is dispatched when another ends.";
  const gated = view.bands.filter(band => view.saturation >= band.ceiling).map(band => band.priority);
  return gated.length === 0 ? "There is room for every band." : `There is room, but not for ${gated.length === 1 ? "band" : "bands"} ${gated.join(", ")}.`;
}

function showTiles(view) {
  const isFull = view.saturation >= 1;
  put("saturation", percent(view.saturation));
  meter($("saturation-meter"), view.saturation, { kind: isFull ? "bad" : view.saturation > .8 ? "warn" : "", label: `saturation ${percent(view.saturation)}` });
  put("saturation-note", room(view, isFull));
  put("waiting", view.waiting);
  const oldest = Math.max(0, ...view.bands.map(band => band.oldest_wait ?? 0));
  put("waiting-note", view.waiting ? `The oldest has waited ${duration(oldest)}.` : "No request waits.");
  put("in-flight", view.in_flight);
  put("in-flight-note", view.limit === null ? "No detector limits their number." : `At ${view.limit} the pool is full.`);
  const refused = view.bands.reduce((sum, band) => sum + band.minute.refused + band.minute.evicted, 0);
  const decided = refused + view.bands.reduce((sum, band) => sum + band.minute.dispatched, 0);
  put("refused", refused);
  const left = view.bands.reduce((sum, band) => sum + band.minute.cancelled, 0);
  put("refused-note", decided || left ? `${percent(refused / Math.max(1, decided))} of ${decided} decided${left ? `; ${left} cancelled or moved` : ""}.` : "No decisions.");
}

function showCharts() {
  const last = history.slice(-120);
  spark($("waiting-spark"), last.map(each => each.waiting), "var(--accent)");
  spark($("in-flight-spark"), last.map(each => each.in_flight), "var(--accent)");
  spark($("refused-spark"), last.map(each => each.refused), "var(--bad)");
  const times = history.map(each => each.time);
  const isCounted = history.some(each => each.limit !== null);
  put("limit-title", isCounted ? "In flight under the limit" : "Saturation, in percent");
  const [what, limit] = isCounted ? [each => each.in_flight, each => each.limit] : [each => 100 * each.saturation, () => 100];
  chart($("limit-chart"), times, [
    { values: history.map(what), colour: "var(--band-0)", isArea: true },
    { values: history.map(limit), colour: "var(--warn)", isDashed: true, isStepped: true },
  ]);
  legend($("limit-legend"), [[isCounted ? "in flight" : "saturation", "var(--band-0)"], [isCounted ? "limit" : "full", "var(--warn)"]]);
  const priorities = [...new Set([...latest.bands.map(band => band.priority), ...history.flatMap(each => Object.keys(each.bands).map(Number))])].sort((a, b) => a - b);
  chart($("waiting-chart"), times, priorities.map(priority => ({ values: history.map(each => each.bands[priority] ?? 0), colour: bandColour(priority), isArea: true })));
  legend($("waiting-legend"), priorities.toReversed().map(priority => [`band ${priority}`, bandColour(priority)]));
}

function legend(list, entries) {
  rows(list, entries, ([name]) => name, () => { const item = make("li"); item.append(make("i"), make("span")); return item; }, (item, [name, colour]) => {
    item.firstChild.style.background = colour;
    set(item.lastChild, name);
  });
}

function showBands(view) {
  rows($("band-rows"), view.bands, band => band.priority, () => {
    const row = cells(make("tr"), "", "", "", "number", "number", "number", "number", "number", "number", "number", "number");
    row.children[0].append(make("i", "key"), make("strong"), make("span", "names"));
    metered(row.children[1]);
    metered(row.children[2]).firstChild.append(make("span", "pill"));
    return row;
  }, (row, band) => {
    const [name, waiting, gate, ...numbers] = row.children;
    name.children[0].style.background = bandColour(band.priority);
    set(name.children[1], band.priority);
    const objectives = view.objectives.filter(each => each.priority === band.priority).map(each => each.name);
    set(name.children[2], ` ${[...objectives, ...(band.declared ? [] : ["drains"])].join(", ")}`);
    const room = band.limits.requests ?? view.limits.requests ?? Math.max(1, view.waiting);
    meter(waiting.firstChild.firstChild, band.waiting / Math.max(1, room), { kind: band.waiting >= room ? "bad" : "", label: `${band.waiting} waiting, room for ${room}` });
    set(waiting.firstChild.children[1], band.waiting);
    const isGated = view.saturation >= band.ceiling;
    meter(gate.firstChild.firstChild, view.saturation, { tick: band.ceiling, kind: isGated ? "bad" : "", label: `ceiling ${percent(band.ceiling)}, saturation ${percent(view.saturation)}` });
    set(gate.firstChild.children[1], percent(band.ceiling));
    pill(gate.firstChild.children[2], isGated ? "gated" : "open", isGated ? (band.waiting ? "bad" : "warn") : "good");
    const minute = band.minute;
    const figures = [duration(band.oldest_wait), expected(band), duration(minute.wait_p50), duration(minute.wait_p95), band.in_flight, minute.dispatched, minute.refused, minute.evicted];
    figures.forEach((text, index) => set(numbers[index], text));
  });
}

// The wait of a request that arrives now: half of them, and nine of ten, wait no longer.
function expected(band) {
  const late = band.expected_wait_p90;
  return late && late > band.expected_wait ? `${duration(band.expected_wait)} to ${duration(late)}` : duration(band.expected_wait);
}

function showFlows(view) {
  const busy = view.bands.filter(band => band.flows.length > 0);
  const most = Math.ceil(FLOWS / Math.max(1, busy.length));  // of each band, so that no band hides another
  const flows = busy.flatMap(band => band.flows.slice(0, most).map(flow => ({ ...flow, priority: band.priority })));
  rows($("flow-rows"), flows, flow => `${flow.priority}/${flow.flow_id}`, () => {
    const row = cells(make("tr"), "name", "number", "", "number", "number", "number");
    metered(row.children[2]);
    return row;
  }, (row, flow) => {
    const [name, band, share, ...numbers] = row.children;
    set(name, flow.flow_id);
    name.title = flow.flow_id;
    set(band, flow.priority);
    const isOwed = flow.waiting > 0 && flow.share < .8 * flow.fair_share;
    meter(share.firstChild.firstChild, flow.share, { tick: flow.fair_share, kind: isOwed ? "warn" : "", label: `share ${percent(flow.share)}, fair share ${percent(flow.fair_share)}` });
    set(share.firstChild.lastChild, percent(flow.share));
    [flow.waiting, flow.in_flight, duration(flow.oldest_wait)].forEach((text, index) => set(numbers[index], text));
  });
  const all = view.bands.reduce((sum, band) => sum + band.flow_count, 0);
  put("flow-note", all === 0 ? "No tenant has requests here." : `${all} tenants with requests${flows.length < all ? `, shown are ${flows.length}, those with most waiting in each band` : ""}. Share is the part of their band's recent service, the tick is the fair share by weight; amber: waiting with less than 80% of it.`);
}

// Current problems, since when, and version and configuration.
function showProblems(view) {
  $("problems").hidden = view.problems.length === 0;
  put("problem-count", view.problems.length);
  rows($("problem-rows"), view.problems, each => `${each.kind} ${each.about} ${each.text}`, each => {
    const item = make("li");
    item.append(make("strong", "", `${each.kind}: ${each.about}`), make("span", "", each.text), make("time"));
    return item;
  }, (item, each) => set(item.lastChild, `for ${duration(Math.max(0, view.time - each.since))}`));
  const { version, configuration_hash, configuration_changed, configuration_changes } = view.about;
  put("about", `flowcontrol ${version}, configuration ${configuration_hash} since ${new Date(configuration_changed * 1000).toLocaleString()}${configuration_changes.length ? `: ${configuration_changes.join("; ")}` : ""}`);
}

// The detectors behind the limit, and its latest changes.
function showLimit(view) {
  const isStaged = new Set(view.detectors.map(each => each.stage)).size > 1;
  put("limit-note", view.detectors.map(each => [
    ...(isStaged ? [each.stage] : []), each.kind, ...(each.requests_limit === null ? [] : [`up to ${each.requests_limit} in flight`]),
    ...(view.detectors.length > 1 ? [percent(each.saturation)] : []),
  ].join(", ")).join(" · "));
  $("moves").hidden = !view.detectors.some(each => ["adaptive", "auto"].includes(each.kind));
  const moves = view.detectors.flatMap(({ stage, moves }) => moves.map(move => ({ ...move, stage, time: view.time - move.ago })))
    .sort((a, b) => a.ago - b.ago).slice(0, MOVES);
  rows($("move-rows"), moves, each => `${each.stage} ${each.address} ${each.before} ${each.after} ${Math.round(each.time)}`, each => {
    const row = cells(make("tr"), "time", "name", "number", "");
    const figures = [each.before, each.after].map(limit => limit.toFixed(1)).join(" → ");
    const where = [...(isStaged ? [each.stage] : []), each.address || "whole pool"].join(", ");
    [clock(each.time), where, figures, each.reason].forEach((text, index) => set(row.children[index], text));
    row.children[2].classList.add(each.after < each.before ? "down" : "up");
    return row;
  }, () => {});
  put("move-note", moves.length === 0 ? "The limit has not moved yet." : "The limit rises while few of the requests in flight wait inside the model servers, and falls when many do.");
}

function showEndpoints(view) {
  const down = view.problems.filter(each => each.kind === "endpoint-down").map(each => ({ address: each.about, saturation: 0, in_flight: null, problem: each }));
  rows($("endpoint-rows"), [...view.endpoints, ...down], each => `${each.address} ${each.problem ? "down" : ""}`, each => {
    const row = cells(make("tr", each.problem ? "out" : ""), "name", each.problem ? "why" : "", "number");
    if (!each.problem) metered(row.children[1]);
    return row;
  }, (row, each) => {
    set(row.children[0], each.address);
    if (each.problem) {
      set(row.children[1], `down for ${duration(view.time - each.problem.since)}: ${each.problem.text}`);
      set(row.children[2], "–");
      return;
    }
    const kind = each.saturation >= 1 ? "bad" : each.saturation > .8 ? "warn" : "";
    meter(row.children[1].firstChild.firstChild, each.saturation, { kind, label: `load ${percent(each.saturation)}` });
    set(row.children[1].firstChild.lastChild, percent(each.saturation));
    set(row.children[2], each.in_flight ?? "–");
  });
  const { received, lost, awaited } = view.settlements;
  put("endpoint-note", [
    ...(view.endpoints.some(each => each.in_flight === null) ? ["Envoy balances: in flight is known for the pool only."] : []),
    received ? `The access log settled ${received} requests${awaited ? `; awaited: ${awaited}` : ""}${lost ? `; lost: ${lost}` : ""}.` : "No access log yet: costs are estimates.",
  ].join(" "));
}

// Includes the time, because a restarted service numbers requests from the start.
const keyOfDecision = each => `${each.request_id} ${each.outcome} ${each.time}`;
const kindOf = outcome => outcome === "dispatched" ? "good" : ["evicted-cancelled", "evicted-moved"].includes(outcome) ? "" : outcome.startsWith("evicted") ? "warn" : "bad";

function showDecisions() {
  if (isPaused) return;
  const which = document.querySelector("input[name=which]:checked").value;
  const wanted = $("filter").value.toLowerCase();
  const fitting = decisions.filter(each => (which === "all" || each.outcome !== "dispatched") && (!wanted || `${each.request_id} ${each.client_request_id} ${each.flow_id} ${each.outcome} ${each.reason}`.toLowerCase().includes(wanted)));
  rows($("decision-rows"), fitting.slice(0, SHOWN), keyOfDecision, each => {
    const row = cells(make("tr"), "time", "", "number", "name", "", "number", "");
    const link = make("button", "link", each.request_id);
    link.title = each.client_request_id;
    link.addEventListener("click", () => explain(String(each.request_id)));
    row.children[1].append(link);
    row.children[4].append(pill(make("span"), each.outcome, kindOf(each.outcome)));
    [[0, clock(each.time)], [2, each.priority], [3, each.flow_id], [5, duration(each.waited)], [6, each.reason]].forEach(([index, text]) => set(row.children[index], text));
    row.children[3].title = each.flow_id;
    return row;
  }, () => {});
  put("decision-note", decisions.length === 0 ? "No decisions yet." : fitting.length === 0 ? "No decision matches the filter." : "The newest of each kind. Click a request for its explanation.");
}

function takeDecisions(newest) {
  const known = new Set(decisions.map(keyOfDecision));
  decisions = [...newest.filter(each => !known.has(keyOfDecision(each))), ...decisions].sort((a, b) => b.time - a.time || b.request_id - a.request_id).slice(0, KEPT);
}

function show(view) {
  latest = view;
  document.title = `${view.waiting} waiting · flowcontrol`;
  put("pool", view.pool);
  put("clock", clock(view.time));
  const state = view.draining ? "draining" : view.standby ? "standby" : "serving";
  pill($("state"), state, state === "serving" ? "good" : "warn");
  takeDecisions(view.decisions);
  for (const part of [showProblems, showTiles, showCharts, showLimit, showBands, showFlows, showEndpoints, showDecisions]) part(view);
}

// Explain

async function ask(id) {
  try {
    const answer = await fetch(`/api/explain?request=${encodeURIComponent(id)}`);
    return await answer.json();
  } catch {
    return { sentences: ["The service does not answer."] };
  }
}

async function explain(id) {
  const answer = await ask(id);
  put("explained-title", `Request ${answer.request_id ?? id}`);
  const state = answer.state ?? "unknown";
  pill($("explained-state"), state, { waiting: "warn", "in flight": "good" }[state] ?? "");
  $("explained-sentences").replaceChildren(...answer.sentences.map(each => make("li", "", each)));
  const facts = Object.entries(answer.facts ?? {}).filter(([, value]) => value !== null && value !== "");
  $("explained-facts").replaceChildren(...facts.map(([name, value]) => { const pair = make("div"); pair.append(make("dt", "", name), make("dd", "", value)); return pair; }));
  $("explained-queue").replaceChildren(...queue(answer));
  if (!$("explained").open) $("explained").showModal();
}

function queue(answer) {
  if (!answer.ahead?.length) return [];
  const line = make("div", "queue");
  for (const { who, count } of answer.ahead.toReversed()) {
    const part = make("span", "", `${count} ${who}`);
    part.style.flex = String(Math.max(1, count));
    part.title = part.textContent;
    line.prepend(part);
  }
  line.append(make("span", "me", "this request"));
  return [make("h3", "", "Ahead of it, in order of dispatch"), line];
}

// Wiring

function wireTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const choices = ["Auto", "Light", "Dark"];
  let choice = localStorage.getItem("theme") ?? "Auto";
  const apply = () => {
    document.documentElement.dataset.theme = choice === "Dark" || (choice === "Auto" && dark.matches) ? "dark" : "light";
    put("theme", `◐ ${choice}`);
    $("theme").setAttribute("aria-label", `Colours: ${choice === "Auto" ? "as the system" : choice.toLowerCase()}`);
  };
  $("theme").addEventListener("click", () => {
    choice = choices[(choices.indexOf(choice) + 1) % choices.length];
    localStorage.setItem("theme", choice);
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

function wire() {
  wireTheme();
  $("ask").addEventListener("submit", event => { event.preventDefault(); const id = $("ask-id").value.trim(); if (id) explain(id); });
  $("close").addEventListener("click", () => $("explained").close());
  $("filter").addEventListener("input", showDecisions);
  document.querySelectorAll("input[name=which]").forEach(each => each.addEventListener("change", showDecisions));
  $("pause").addEventListener("click", () => {
    isPaused = !isPaused;
    $("pause").setAttribute("aria-pressed", String(isPaused));
    put("pause", isPaused ? "Resume" : "Pause");
    showDecisions();
  });
  follow();
}

function follow() {
  const events = new EventSource("/api/events");
  events.addEventListener("history", event => { history = JSON.parse(event.data); decisions = []; });
  events.addEventListener("view", event => {
    const { sample, ...view } = JSON.parse(event.data);
    if (sample && history.at(-1)?.time !== sample.time) history = [...history, sample].slice(-900);
    document.body.classList.remove("lost");
    show(view);
  });
  events.addEventListener("error", () => {
    document.body.classList.add("lost");
    pill($("state"), "disconnected", "bad");
    // A browser reconnects by itself only if there was no answer, and not after an error status.
    if (events.readyState === EventSource.CLOSED) setTimeout(follow, AGAIN_MS);
  });
}

wire();
