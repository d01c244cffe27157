// The page of report.py: draws the data of its block #data, and lets one look around in it.
//
// In this order: elements; figures of an evaluation; curves of a run; the viewer. What a model or a user
// wrote only ever becomes a text node or an attribute, never markup. A *group* is a question with its
// *traces*: the responses of all models, or the rollouts of a step.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const isRun = "curves" in data;
const tasks = [...new Set((isRun ? data.groups : data.cells).map((item) => item.task))];

// ---- elements ----------------------------------------------------------------------------------------
// el("p", { class: "note", onclick: f }, "text", [more, elements]). Attributes and children that are null are
// left out.
function el(name, attributes = {}, ...children) {
  return build(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat(3).filter((child) => child !== null));
  return element;
}

// The page's policy allows no style attributes; what a script sets is no attribute.
function placed(kind, style) {
  const element = el("i", { class: kind });
  Object.assign(element.style, style);
  return element;
}

function section(id, title, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  return el("section", { id, "aria-labelledby": heading.id }, heading, children);
}

// What may be wider than the screen. It can be scrolled by the keyboard too.
function scrolling(label, ...children) {
  return el("div", { class: "scrolls", tabindex: 0, role: "region", "aria-label": label }, children);
}

// The first of `rows` holds the headings; so many columns at the beginning name their row.
function table(caption, [headings, ...rows], naming = 1) {
  const cell = (content, i) => (i < naming ? el("th", { scope: "row" }, content) : el("td", {}, content));
  return [el("p", { class: "note" }, caption), scrolling(caption, el("table", {},
    el("thead", {}, el("tr", {}, headings.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell))))))];
}

// legend([["right", "right answer"]])
function legend(entries) {
  return el("p", { class: "legend" }, entries.map(([kind, ...text]) =>
    el("span", {}, el("i", { class: `swatch ${kind}` }), text)));
}

// Of a tie the even digit, as in the tables: toFixed would make 18.25 18.3, and Python has made it 18.2.
function percent(share) {
  const x = 100 * share;
  return `${(Math.abs(x) % 1 === 0.25 ? x - Math.sign(x) * 0.05 : x).toFixed(1)}%`;
}

const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);

function short(x) {
  if (x === null) return "–";
  const plain = x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 1e5);
  return plain ? String(Number(x.toPrecision(3))) : x.toExponential(1);
}

// ---- figures of an evaluation ------------------------------------------------------------------------
const cellsOf = (task) => data.cells.filter((cell) => cell.task === task);

// A figure for each task.
function panels(draw) {
  return el("div", { class: "panels" }, tasks.map((task) =>
    el("figure", {}, el("figcaption", {}, task), draw(task))));
}

// A row of a figure: what it is of, the picture, a number.
function row(name, picture, number = "") {
  return el("div", { class: "row" }, el("span", {}, name), picture, el("b", {}, number));
}

function axis(from, to) {
  return el("div", { class: "axis" }, el("span", {}, from), el("span", {}, to));
}

function accuracySection() {
  const highest = Math.max(...data.cells.map((cell) => cell.interval[1]));
  const end = Math.min(1, Math.ceil(highest * 10) / 10);
  const picture = (cell) => {
    const [low, high] = cell.interval;
    const range = { left: percent(low / end), width: percent((high - low) / end) };
    return el("div", { class: "track" },
      placed("range", range),
      placed("dot", { left: percent(cell.accuracy / end) }));
  };
  return section("accuracy", "Accuracy",
    el("p", {}, "Dot: share of right answers; bar: its 95% interval."),
    panels((task) => [
      cellsOf(task).map((cell) => row(cell.model, picture(cell), percent(cell.accuracy))),
      row("", axis("0", percent(end)))]),
    table("In % [95%]: accuracy, paired difference to the first model, responses without a readable answer",
      data.tables.accuracy));
}

function retriesSection() {
  return section("retries", "Checks and retries",
    table("Retries, counted by what the attempt before was and what they were; first against final answer",
      data.tables.retries, 2),
    table("Verdicts: answers and reflections of a response, F1, and what attempts were called",
      data.tables.verdicts, 2));
}

function lengthsSection() {
  return section("lengths", "Length of responses",
    table("Tokens: so many in a hundred responses are no longer than this", data.tables.lengths, 2));
}

function figuresSection() {
  return section("figures", "All figures", table("Every figure of the evaluation", data.tables.all, 2));
}

// ---- curves of a run ---------------------------------------------------------------------------------
const WIDTH = 1000;  // of a chart, in units of its own
const HEIGHT = 300;
const MARGIN = 10;

function curvesSection() {
  if (!data.curves.length) return section("curves", "Curves", el("p", {}, "No step has been logged yet."));
  const leads = traces.length ? "A click on a step shows its rollouts, or the nearest that were kept." : "";
  return section("curves", "Curves", el("p", {}, leads),
    el("div", { class: "panels" }, data.curves.map(curve)));
}

// The curve of a metric, [[step, value]].
function curve({ name, points }) {
  const steps = points.map(([step]) => step);
  const values = points.map(([, value]) => value);
  const [first, last] = [steps[0], steps.at(-1)];
  const [low, high] = rangeOf(values);
  const x = (step) => (last > first ? (WIDTH * (step - first)) / (last - first) : WIDTH / 2);
  const y = (value) => HEIGHT - MARGIN - ((HEIGHT - 2 * MARGIN) * (value - low)) / (high - low);
  const corners = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
  if (corners.length === 1) corners.push(corners[0]);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${name}: ${short(values[0])} at first, ${short(values.at(-1))} at last` },
  svg("path", { d: `M${corners.join("L")}`, class: `line ${points.length === 1 ? "dotted" : ""}` }));
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    openStep(first + ((last - first) * (event.clientX - box.left)) / box.width);
  });
  return el("figure", { class: "curve" },
    el("figcaption", {}, name, el("small", {}, ` ${short(values.at(-1))} at last`)),
    el("div", { class: "plot" }, el("span", { class: "top" }, short(high)),
      el("span", { class: "bottom" }, short(low)), picture),
    axis(`step ${first}`, last));
}

// What the axis of these values goes from and to: from 0, unless they are far from it.
function rangeOf(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (high === low) return high < 0 ? [low, 0] : [0, high || 1];
  return low >= 0 && low < high / 2 ? [0, high] : [low, high];
}

// ---- the viewer: filters -----------------------------------------------------------------------------
const traces = [];
for (const group of data.groups) {
  for (const trace of group.traces) {
    trace.group = group;
    trace.text = trace.parts.map(([, text]) => text).join("");
    trace.at = traces.push(trace) - 1;
  }
}

let matches = traces;  // those that pass the filters
let current = null;  // the trace that is shown

const keptSteps = isRun ? [...new Set(data.groups.map((group) => group.step))] : [];
const wasCut = (trace) => trace.finish === "length";
const ofFirstModel = ({ group, index }) =>
  group.traces.find((trace) => trace.arm === 0 && trace.index === index);
const OUTCOMES = {
  "right": (trace) => trace.correct,
  "wrong": (trace) => !trace.correct,
  "no readable answer": (trace) => trace.answer === null,
  "cut off": wasCut,
  "first attempt wrong, answer right": (trace) => trace.attempts[0] === false && trace.correct,
  "first attempt right, answer wrong": (trace) => trace.attempts[0] === true && !trace.correct,
  "a verdict contradicts the grade": (trace) => trace.contradicted > 0,
};
if (data.arms.length > 1) {
  const first = data.arms[0];
  OUTCOMES[`right, unlike ${first}`] = (trace) => trace.correct && ofFirstModel(trace)?.correct === false;
  OUTCOMES[`wrong, unlike ${first}`] = (trace) => !trace.correct && ofFirstModel(trace)?.correct === true;
}

// A filter: its control, under a label, and which traces pass for a value. Without a value all do.
function filter(label, control, passes) {
  control.id = label.toLowerCase();
  const field = el("div", { class: "field" }, el("label", { for: control.id }, label), control);
  return { control, passes, field };
}

function choice(all, texts) {
  return el("select", { onchange: applyFilters }, [all, ...texts].map((text, i) =>
    el("option", { value: i ? i - 1 : "" }, text)));
}

const filters = {
  step: filter("Step", choice("all kept steps", keptSteps.map((step) => `step ${step}`)),
    (trace, i) => trace.group.step === keptSteps[i]),
  task: filter("Task", choice("all tasks", tasks), (trace, i) => trace.group.task === tasks[i]),
  model: filter("Model", choice("all models", data.arms), (trace, i) => trace.arm === Number(i)),
  outcome: filter("Outcome", choice("all outcomes", Object.keys(OUTCOMES)),
    (trace, i) => Object.values(OUTCOMES)[i](trace)),
  text: filter("Text", el("input", { type: "search", oninput: applyFilters }),
    (trace, text) => searched(trace).includes(text.toLowerCase())),
};

function searched(trace) {
  const { id, question, reference } = trace.group;
  trace.searched ??= [id, question, reference, trace.text].join("\n").toLowerCase();
  return trace.searched;
}

function applyFilters() {
  const active = Object.values(filters).filter(({ control }) => control.value !== "");
  matches = traces.filter((trace) => active.every(({ control, passes }) => passes(trace, control.value)));
  drawList();
  viewer.classList.toggle("empty", !matches.length);
  if (matches.length && !matches.includes(current)) openTrace(matches[0]);
}

function clearFilters() {
  for (const { control } of Object.values(filters)) control.value = "";
  applyFilters();
}

// ---- the viewer: the list ----------------------------------------------------------------------------
const list = el("ol", { class: "list" });
const count = el("p", { class: "note", role: "status" });
const detail = el("div", { class: "detail", id: "trace", tabindex: -1 });
const viewer = el("div", { class: "viewer" }, list, detail);

function mark(trace) {
  if (trace.correct) return "✓";
  if (wasCut(trace)) return "…";
  return trace.answer === null ? "○" : "✗";
}

function nameOf(trace) {
  return isRun ? `rollout ${trace.index}` : `${data.arms[trace.arm]}, sample ${trace.index}`;
}

function describe(trace) {
  const why = trace.reason ? `: ${trace.reason}` : "";
  return `${nameOf(trace)}: ${trace.correct ? "right" : `wrong${why}`}`;
}

const titleOf = (group) => (isRun ? `step ${group.step}: ${group.id}` : group.id);

function drawList() {
  const groups = [...new Set(matches.map((trace) => trace.group))];
  const matching = new Set(matches);
  count.textContent = `${matches.length} of ${traces.length} responses match.`;
  if (data.groups.length < data.groups_in_all) {
    count.textContent += ` The page has room for ${data.groups.length} of ${data.groups_in_all} questions.`;
  }
  list.replaceChildren(...groups.map((group) => entry(group, matching)));
}

// A question, with a mark for each of its traces.
function entry(group, matching) {
  const markOf = (trace) => {
    const kind = `mark ${trace.correct ? "is-right" : "is-wrong"} ${matching.has(trace) ? "" : "out"}`;
    return el("a", { href: addressOf(trace), title: describe(trace), "aria-label": describe(trace),
      class: kind }, mark(trace));
  };
  const arms = [...new Set(group.traces.map((trace) => trace.arm))];  // rollouts have none: a single row
  const marks = arms.map((arm) => el("div", { class: "marks" },
    isRun ? null : el("span", {}, data.arms[arm]),
    group.traces.filter((trace) => trace.arm === arm).map(markOf)));
  return el("li", {}, el("span", { class: "id" }, titleOf(group)), marks);
}

// ---- the viewer: a question and a trace ----------------------------------------------------------------
function openTrace(trace) {
  current = trace;
  const { group } = trace;
  detail.replaceChildren(
    el("h3", {}, titleOf(group)),
    el("div", { class: "question" }, group.question),
    el("p", {}, "Reference answer: ", el("code", {}, group.reference || "not known")),
    members(group), article(trace));
}

// All traces of a group, with what tells them apart.
function members(group) {
  const columns = {
    "response": (trace) => el("a", { href: addressOf(trace),
      "aria-current": trace === current ? "true" : null }, `${mark(trace)} ${nameOf(trace)}`),
    "grade": (trace) => (trace.answer === null ? "no readable answer" : trace.correct ? "right" : "wrong"),
    "tokens": (trace) => `${trace.length}${wasCut(trace) ? " (cut off)" : ""}`,
    "attempts": (trace) => trace.attempts.map((right) => (right ? "✓" : "✗")).join(" "),
  };
  if (isRun) {
    columns.reward = (trace) => short(trace.reward);
    columns.advantage = (trace) => signed(trace.advantage);
  }
  const rows = group.traces.map((trace) => Object.values(columns).map((value) => value(trace)));
  return el("div", { class: "members" },
    table("All responses to this question", [Object.keys(columns), ...rows], 0));
}

function article(trace) {
  const facts = [`${trace.length} tokens`];
  if (wasCut(trace)) facts.push("cut off at the budget");
  if (trace.answer !== null) facts.push(`answer ${trace.answer}`);
  if (isRun) facts.push(`reward ${short(trace.reward)}`, `advantage ${signed(trace.advantage)}`);
  if (trace.contradicted) facts.push(`verdicts against the grade: ${trace.contradicted}`);
  return el("article", { class: trace.correct ? "is-right" : "is-wrong", "aria-label": nameOf(trace) },
    el("h4", {}, `${mark(trace)} ${describe(trace)}`),
    el("p", { class: "note" }, facts.join(" · ")),
    partView(trace));
}

// The parts of a trace; what a <sample> or <reflect> holds is a block.
function partView(trace) {
  const body = el("div", { class: "text" });
  let box = body;  // where the next part goes
  for (const [kind, text] of trace.parts) {
    const [what, content] = kind.split(" ");  // "open correct"
    if (what === "open" || what === "close") box = body;
    box.append(el("span", { class: what }, text));
    if (what === "open") {
      box = el("div", { class: `block ${content}` });
      body.append(box);
    }
  }
  return body;
}

// ---- the viewer: the address -------------------------------------------------------------------------
// #trace/task/id/model/index, or #trace/step/id/index of a run; each part encoded.
function addressOf({ group, arm, index }) {
  const where = isRun ? [group.step, group.id] : [group.task, group.id, data.arms[arm]];
  return `#${["trace", ...where, index].map(encodeURIComponent).join("/")}`;
}

function followAddress() {
  if (!location.hash.startsWith("#trace/")) return;
  const trace = traces.find((candidate) => addressOf(candidate) === location.hash);
  if (!trace) {
    count.textContent = "The response of this link is not on this page.";
    return;
  }
  if (!matches.includes(trace)) clearFilters();
  openTrace(trace);
  detail.focus();
  detail.scrollIntoView();
}

function openStep(step) {
  if (!keptSteps.length) return;
  const nearest = keptSteps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
  filters.step.control.value = keptSteps.indexOf(nearest);
  applyFilters();
  if (matches.length) location.hash = addressOf(matches[0]);
}

// ---- the page ----------------------------------------------------------------------------------------
function tracesSection() {
  const useful = { step: isRun, task: tasks.length > 1, model: data.arms.length > 1 };
  const shown = Object.keys(filters).filter((name) => useful[name] ?? true);
  return section("traces", isRun ? "Rollouts" : "Responses",
    legend([["correct", "right attempt"], ["incorrect", "wrong attempt"], ["reflection", "check"],
      ["phrase", "between"], ["contradicts", "verdict against the grade"]]),
    el("div", { class: "controls", role: "search" }, shown.map((name) => filters[name].field),
      el("button", { type: "button", onclick: clearFilters }, "clear")),
    count,
    viewer);
}

const figures = [accuracySection, retriesSection, lengthsSection, figuresSection];
const shown = [...(isRun ? [curvesSection] : figures), ...(traces.length ? [tracesSection] : [])];
const sections = shown.map((make) => make());
document.body.append(
  el("header", {}, el("h1", {}, data.title), el("p", {}, el("code", {}, data.command)),
    el("nav", { "aria-label": "Sections" }, sections.map((made) =>
      el("a", { href: `#${made.id}` }, made.querySelector("h2").textContent)))),
  el("main", {}, sections));
if (traces.length) {
  drawList();
  openTrace(traces[0]);
  followAddress();
  window.addEventListener("hashchange", followAddress);
}
