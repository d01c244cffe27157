// The page of report.py: draws the data of its block #data, and lets one look around in it.
//
// In this order: elements; figures of an evaluation; curves of a run; the viewer (filters, the list, a
// question, a trace, its tokens, the address, the keys); the page. What a model or a user wrote only ever
// becomes a text node or an attribute, never markup. A *group* is a question with its *traces*: the responses
// of all models, or the rollouts of a step.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const isRun = "curves" in data;
const tasks = [...new Set((isRun ? data.groups : data.cells).map((item) => item.task))];

// ---- elements ----------------------------------------------------------------------------------------
// el("p", { class: "note", onclick: f }, "text", [more, elements]). Children and attributes that are null are
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
function placed(kind, style, attributes = {}) {
  const element = el("i", { class: kind, ...attributes });
  Object.assign(element.style, style);
  return element;
}

function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
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
  const cell = (text, i) => (i < naming ? el("th", { scope: "row" }, text) : el("td", {}, text));
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
const sum = (numbers) => numbers.reduce((total, x) => total + x, 0);

function short(x) {
  if (x === null) return "–";
  const plain = x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 1e5);
  return plain ? String(Number(x.toPrecision(3))) : x.toExponential(1);
}

// The first of 1, 2, 5, 10, 20, ... (or 0.5, 0.2, ...) that is not below x.
function roundUp(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  return power * [1, 2, 5, 10].find((step) => step * power >= x * 0.999999);
}

// ---- figures of an evaluation ------------------------------------------------------------------------
const COLOURS = 6;  // of models; the seventh has the first one's again
const cellsOf = (task) => data.cells.filter((cell) => cell.task === task);
const colourOf = (arm) => `arm${arm % COLOURS}`;
const colourOfCell = (cell) => colourOf(data.arms.indexOf(cell.model));

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
  const end = Math.min(1, 4 * roundUp(highest / 4));  // finer than roundUp(highest): 80% is among them
  const picture = (cell) => {
    const [low, high] = cell.interval;
    const range = { left: percent(low / end), width: percent((high - low) / end) };
    return el("div", { class: "track" },
      placed(`range ${colourOfCell(cell)}`, range),
      placed(`dot ${colourOfCell(cell)}`, { left: percent(cell.accuracy / end) }));
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
  const kinds = [["gained", "wrong to right"], ["kept-right", "right to right"],
    ["kept-wrong", "wrong to wrong"], ["lost", "right to wrong"]];
  const picture = (cell) => {
    const pieces = kinds.filter(([, name]) => cell.retries[name]);
    const label = pieces.map(([, name]) => `${name}: ${cell.retries[name]}`).join(", ");
    return el("div", { class: "stacked", role: "img", "aria-label": label, title: label },
      pieces.map(([kind, name]) => placed(kind, { flexGrow: cell.retries[name] })));
  };
  const ofCell = (cell) => {
    const retries = sum(Object.values(cell.retries));
    return retries ? row(cell.model, picture(cell), retries)
      : row(cell.model, el("span", { class: "note" }, "no retry"));
  };
  return section("retries", "Checks and retries",
    el("p", {}, "What became of an answer when the model tried again, and how many such retries there were."),
    legend(kinds),
    panels((task) => cellsOf(task).map(ofCell)),
    table("Retries, counted by what the attempt before was and what they were; first against final answer",
      data.tables.retries, 2),
    table("Verdicts: answers and reflections of a response, F1, and what attempts were called",
      data.tables.verdicts, 2));
}

function lengthsSection() {
  const bar = (bin, from, to, kind) => svg("rect",  // with a gap beside it
    { x: bin + 0.06, width: 0.88, y: 1 - to, height: to - from, class: kind });
  const picture = ({ right, wrong }, label) => {
    const highest = Math.max(...right.map((count, bin) => count + wrong[bin]));
    const bars = right.map((count, bin) => {
      const top = wrong[bin] / highest;
      return [bar(bin, 0, top, "wrong"), bar(bin, top, top + count / highest, "right")];
    });
    return svg("svg", { class: "histogram", viewBox: `0 0 ${right.length} 1`, preserveAspectRatio: "none",
      role: "img", "aria-label": label }, bars);
  };
  const ofModel = (counts) => {
    const { model, median } = counts;
    return row(model, picture(counts, `${model}: median ${median} tokens`), short(median));
  };
  return section("lengths", "Length of responses",
    el("p", {}, "Each row has its own height; the number is its median."),
    legend([["right", "right answer"], ["wrong", "wrong answer"]]),
    panels((task) => [
      data.lengths[task].bars.map(ofModel),
      row("", axis("0", `${data.lengths[task].longest} tokens`))]));
}

function costSection() {
  const points = data.cells.map((cell) =>
    ({ cell, tokens: cell.tokens, accuracy: cell.accuracy, kind: "", name: cell.model }));
  for (const cell of data.cells.filter((one) => "forced" in one)) {
    points.push({ cell, tokens: cell.forced_tokens, accuracy: cell.forced, kind: "forced",
      name: `${cell.model}, forced to go on` });
  }
  const end = roundUp(Math.max(...points.map((point) => point.tokens)));
  const top = Math.min(1, roundUp(Math.max(0.05, ...points.map((point) => point.accuracy))));
  const dot = ({ cell, tokens, accuracy, kind, name }) => {
    const label = `${name}: ${percent(accuracy)} for ${Math.round(tokens)} tokens`;
    return placed(`dot ${colourOfCell(cell)} ${kind}`,
      { left: percent(tokens / end), bottom: percent(accuracy / top) },
      { role: "img", "aria-label": label, title: label });
  };
  const models = [...new Set(data.cells.map((cell) => cell.model))];
  return section("cost", "Accuracy against tokens",
    el("p", {}, "To the right the mean tokens of a response, upwards the accuracy. A ring: forced to go on."),
    legend(models.map((name, i) => [colourOf(i), name])),
    panels((task) => [
      el("div", { class: "plane" }, el("span", { class: "top" }, percent(top)),
        points.filter(({ cell }) => cell.task === task).map(dot)),
      axis("0", `${end} tokens`)]));
}

function figuresSection() {
  return section("figures", "All figures", table("Every figure of the evaluation", data.tables.all, 2));
}

// ---- curves of a run ---------------------------------------------------------------------------------
const WIDTH = 1000;  // of a chart, in units of its own
const HEIGHT = 300;
const MARGIN = 10;

function curvesSection() {
  const { steps, each, charts } = data.curves;
  if (!steps.length) return section("curves", "Curves", el("p", {}, "No step has been logged yet."));
  const last = steps.length - 1;
  const slider = el("input", { type: "range", id: "shown-step", min: 0, max: last,
    oninput: () => show(slider.valueAsNumber),
    onkeydown: ({ key }) => key === "Enter" && openStep(steps[slider.valueAsNumber]) });
  const readout = el("output", { for: slider.id });
  const open = button("", () => openStep(steps[slider.valueAsNumber]));
  const drawn = charts.map((chart) => curve(chart, show));
  function show(place) {
    const nearest = nearestStep(steps[place]);
    slider.value = place;
    slider.setAttribute("aria-valuetext", `step ${steps[place]}`);
    readout.textContent = `step ${steps[place]}`;
    open.hidden = nearest === null;
    open.textContent = `rollouts of step ${nearest}`;
    drawn.forEach((chart) => chart.show(place));
  }
  show(last);
  const averaged = each > 1 ? `A point is the mean of ${each} steps. ` : "";
  const smooth = steps.length < FEW ? "" : "Thin: each step; bold: a running mean. ";
  const leads = traces.length ? "A click on a step shows its rollouts, or the nearest that were kept." : "";
  return section("curves", "Curves",
    el("p", {}, averaged + smooth + leads),
    el("div", { class: "controls" }, el("label", { for: slider.id }, "Shown step"), slider, readout, open),
    el("div", { class: "panels" }, drawn.map((chart) => chart.figure)));
}

// { figure, show(place): moves the cursor there }. `onpoint` is told the place that is pointed at.
function curve({ title, unit, lines }, onpoint) {
  const { steps } = data.curves;
  const names = Object.keys(lines);
  const write = (value) => (unit === "%" && value !== null ? percent(value) : short(value));
  const [low, high] = rangeOf(Object.values(lines).flat());
  const x = (place) => (steps.length > 1 ? (WIDTH * place) / (steps.length - 1) : WIDTH / 2);
  const y = (value) => HEIGHT - MARGIN - ((HEIGHT - 2 * MARGIN) * (value - low)) / (high - low);
  const cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT });
  const label = names.map((name) => `${name}: ${ends(lines[name]).map(write).join(" at first, ")} at last`);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": label.join("; ") }, names.map((name, i) => paths(lines[name], x, y, `line${i}`)), cursor);
  const placeAt = (event) => {
    const box = picture.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    return Math.round(share * (steps.length - 1));
  };
  picture.addEventListener("pointermove", (event) => onpoint(placeAt(event)));
  picture.addEventListener("click", (event) => openStep(steps[placeAt(event)]));
  const values = names.map(() => el("b"));
  const show = (place) => {
    cursor.setAttribute("x1", x(place));
    cursor.setAttribute("x2", x(place));
    names.forEach((name, i) => { values[i].textContent = write(lines[name][place]); });
  };
  const figure = el("figure", { class: "curve" },
    el("figcaption", {}, title, el("small", {}, unit === "%" ? "" : ` ${unit}`)),
    legend(names.map((name, i) => [`line${i}`, `${name} `, values[i]])),
    el("div", { class: "plot" }, el("span", { class: "top" }, write(high)),
      el("span", { class: "bottom" }, write(low)), picture),
    axis(`step ${steps[0]}`, steps[steps.length - 1]));
  return { figure, show };
}

const isThere = (value) => value !== null;
const ends = (values) => [values.find(isThere), values.findLast(isThere)];

// What the axis of these values goes from and to: from 0, unless they are far from it.
function rangeOf(values) {
  const low = Math.min(...values.filter(isThere));
  const high = Math.max(...values.filter(isThere));
  if (high === low) return high < 0 ? [low, 0] : [0, high || 1];
  return low >= 0 && low < high / 2 ? [0, high] : [low, high];
}

// A line through the values that are there and, from FEW on, their running mean over about a fifteenth.
const FEW = 15;

function paths(values, x, y, kind) {
  const points = values.map((value, place) => ({ value, place })).filter(({ value }) => value !== null);
  const path = (through, how) => {
    const corners = through.map(({ value, place }) => `${x(place).toFixed(1)} ${y(value).toFixed(1)}`);
    return svg("path", { d: `M${corners.join("L")}`, class: `line ${how} ${kind}` });
  };
  if (points.length === 1) return [path([points[0], points[0]], "dotted")];
  if (points.length < FEW) return [path(points, "")];
  const half = Math.round(points.length / 30);
  const means = points.map(({ place }, i) => {
    const near = points.slice(Math.max(0, i - half), i + half + 1);
    return { place, value: sum(near.map(({ value }) => value)) / near.length };
  });
  return [path(points, "thin"), path(means, "")];
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
let beside = null;  // the trace beside it, or null
let colouring = "parts";

const keptSteps = isRun ? [...new Set(data.groups.map((group) => group.step))] : [];
const wasCut = (trace) => trace.finish === "length";
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

// The same sample of another model, in this or another group.
function counterpart(arm, index, group) {
  return group.traces.find((trace) => trace.arm === arm && trace.index === index) ?? null;
}

const ofFirstModel = (trace) => counterpart(0, trace.index, trace.group);

const MANY = 4;  // attempts
const ATTEMPTS = ["0", "1", "2", "3", `${MANY} or more`];

function field(label, control) {
  control.id = label.toLowerCase().replace(/\W+/g, "-");
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control);
}

// A choice among [value, text]; `none` stands for no choice, whose value is "".
function choice(values, none, onchange = applyFilters) {
  return el("select", { onchange }, options(values, none));
}

function options(values, none) {
  const first = none === null ? [] : [["", none]];
  return [...first, ...values].map(([value, text]) => el("option", { value }, text));
}

// Of a filter without a value all traces pass.
function filter(label, control, passes) {
  return { control, passes, field: field(label, control) };
}

const asOptions = (texts) => texts.map((text, i) => [i, text]);
const bound = () => el("input", { type: "number", min: 0, step: 1, oninput: applyFilters });
const filters = {
  step: filter("Step", choice(keptSteps.map((step) => [step, `step ${step}`]), "all kept steps"),
    (trace, step) => trace.group.step === Number(step)),
  task: filter("Task", choice(asOptions(tasks), "all tasks"), (trace, i) => trace.group.task === tasks[i]),
  model: filter("Model", choice(asOptions(data.arms), "all models"), (trace, i) => trace.arm === Number(i)),
  outcome: filter("Outcome", choice(Object.keys(OUTCOMES).map((name) => [name, name]), "all outcomes"),
    (trace, name) => OUTCOMES[name](trace)),
  attempts: filter("Attempts", choice(asOptions(ATTEMPTS), "any number"),
    (trace, n) => Math.min(trace.attempts.length, MANY) === Number(n)),
  least: filter("Tokens at least", bound(), (trace, tokens) => trace.length >= Number(tokens)),
  most: filter("Tokens at most", bound(), (trace, tokens) => trace.length <= Number(tokens)),
  text: filter("Text", el("input", { type: "search", oninput: applyFilters, "aria-keyshortcuts": "/" }),
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
  else drawGroup();
}

function resetFilters() {
  for (const { control } of Object.values(filters)) control.value = "";
}

function clearFilters() {
  resetFilters();
  applyFilters();
}

// ---- the viewer: the list ----------------------------------------------------------------------------
const PAGE = 100;  // groups that are listed at once
const list = el("ol", { class: "list", tabindex: -1 });
const count = el("p", { class: "note", role: "status" });
const notice = el("p", { class: "notice", role: "alert", hidden: "" });

function tell(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

// A link to a trace. It can be copied, or opened elsewhere; a plain click keeps the filters.
function link(trace, text, attributes) {
  const open = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.pushState(null, "", addressOf(trace));
    openTrace(trace);
    showDetail();
  };
  return el("a", { href: addressOf(trace), onclick: open, ...attributes }, text);
}

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

function drawList() {
  const groups = [...new Set(matches.map((trace) => trace.group))];
  const matching = new Set(matches);
  count.textContent = `${matches.length} of ${traces.length} responses match.`;
  if (data.groups.length < data.groups_in_all) {
    count.textContent += ` The page has room for ${data.groups.length} of ${data.groups_in_all} questions `
      + "(report.py --megabytes).";
  }
  const listFrom = (from) => {
    list.append(...groups.slice(from, from + PAGE).map((group) => entry(group, matching)));
    const left = groups.length - from - PAGE;
    if (left <= 0) return;
    const more = el("li", {}, button(`${Math.min(left, PAGE)} more of ${left} questions`, () => {
      list.focus();  // the button goes
      more.remove();
      listFrom(from + PAGE);
    }));
    list.append(more);
  };
  list.replaceChildren();
  listFrom(0);
}

// A question, with a mark for each of its traces.
function entry(group, matching) {
  const markOf = (trace) => link(trace, mark(trace), {
    class: `mark ${trace.correct ? "is-right" : "is-wrong"} ${matching.has(trace) ? "" : "out"}`,
    title: describe(trace), "aria-label": describe(trace), "data-at": trace.at });
  const arms = [...new Set(group.traces.map((trace) => trace.arm))];  // rollouts have none: a single row
  const marks = arms.map((arm) => el("div", { class: "marks" },
    isRun ? null : el("span", {}, data.arms[arm]),
    group.traces.filter((trace) => trace.arm === arm).map(markOf)));
  // Where all are of one task, it need not begin each id.
  const shortId = tasks.length === 1 ? group.id.replace(`${group.task}/`, "") : group.id;
  return el("li", {}, el("span", { class: "id" }, isRun ? `step ${group.step}: ${shortId}` : shortId), marks);
}

function showInList() {
  for (const item of list.querySelectorAll("[data-at]")) {
    const chosen = Number(item.dataset.at) === current.at;
    if (chosen) item.setAttribute("aria-current", "true");
    else item.removeAttribute("aria-current");
    if (chosen) scrollWithin(list, item.closest("li"));
  }
}

function scrollWithin(box, item) {
  const frame = box.getBoundingClientRect();
  const { top, bottom } = item.getBoundingClientRect();
  if (top < frame.top || bottom > frame.bottom) box.scrollTop += top - frame.top - 40;
}

// ---- the viewer: a question --------------------------------------------------------------------------
// What is made once stays when another trace is shown, and with it the focus.
const spoken = el("p", { class: "hidden", role: "status" });
const question = el("div");
const besideChoice = choice([], "nothing", () => {
  beside = besideChoice.value === "" ? null : traces[besideChoice.value];
  drawGroup();
});
const colourChoice = choice([], null, () => {
  colouring = colourChoice.value;
  drawGroup();
});
const besideField = field("Beside", besideChoice);
const colourField = field("Colour", colourChoice);
const articles = el("div");
const detail = el("div", { class: "detail", id: "trace", tabindex: -1 },
  question,
  el("div", { class: "controls" },
    button("‹ previous", () => move(-1), { "aria-keyshortcuts": "k" }),
    button("next ›", () => move(1), { "aria-keyshortcuts": "j" }),
    besideField, colourField),
  articles);
const viewer = el("div", { class: "viewer" }, list, detail);

function openTrace(trace) {
  if (beside) {  // it stays the same sample of another model, or another sample of the same one
    const index = beside.arm === trace.arm ? beside.index : trace.index;
    beside = counterpart(beside.arm, index, trace.group);
  }
  current = trace;
  tell("");
  history.replaceState(null, "", addressOf(trace));
  drawGroup();
  spoken.textContent = describe(trace);
}

function drawGroup() {
  const { group } = current;
  const others = group.traces.filter((trace) => trace !== current);
  if (!others.includes(beside)) beside = null;
  besideChoice.replaceChildren(...options(others.map((trace) => [trace.at, nameOf(trace)]), "nothing"));
  besideChoice.value = beside ? beside.at : "";
  colourChoice.replaceChildren(...options(Object.entries(COLOURINGS), null));
  colourChoice.value = colouring;
  colourField.hidden = !group.traces.some((trace) => trace.ids);
  question.replaceChildren(
    el("h3", {}, isRun ? `step ${group.step}: ${group.id}` : group.id),
    el("div", { class: "question" }, group.question),
    el("p", {}, "Reference answer: ", el("code", {}, group.reference || "not known")),
    members(group));
  if (group.prompt) question.append(el("details", {}, el("summary", {}, "Prompt, as the model saw it"),
    el("div", { class: "question" }, group.prompt)));
  articles.className = beside ? "two" : "";
  articles.replaceChildren(article(current), ...(beside ? [article(beside)] : []));
  scrollWithin(question.querySelector(".members"), question.querySelector(".chosen"));
  showInList();
  highlight();
}

// All traces of a group, with what tells them apart.
function members(group) {
  const grade = (trace) => {
    if (trace.answer === null) return "no readable answer";
    return trace.correct ? "right" : "wrong";
  };
  const columns = {
    "response": (trace) => link(trace, `${mark(trace)} ${nameOf(trace)}`,
      { "aria-current": trace === current ? "true" : null }),
    "grade": grade,
    "tokens": (trace) => `${trace.length}${wasCut(trace) ? " (cut off)" : ""}`,
    "attempts": (trace) => trace.attempts.map((right) => (right ? "✓" : "✗")).join(" "),
  };
  if (isRun) {
    columns.reward = (trace) => short(trace.reward);
    columns.advantage = (trace) => signed(trace.advantage);
  }
  const rowOf = (trace) => el("tr", { class: trace === current ? "chosen" : "" },
    Object.values(columns).map((value) => el("td", {}, value(trace))));
  const made = scrolling("All responses to this question", el("table", {},
    el("thead", {}, el("tr", {}, Object.keys(columns).map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, group.traces.map(rowOf))));
  made.classList.add("members");
  return made;
}

// ---- the viewer: a trace -----------------------------------------------------------------------------
const TITLES = {  // of parts
  correct: "an attempt that is right",
  incorrect: "an attempt that is wrong",
  attempt: "an attempt without a grade",
  reflection: "a check",
  agrees: "a verdict that agrees with the grade",
  contradicts: "a verdict that contradicts the grade",
  verdict: "a verdict that does not count",
  answer: "the final answer",
};

function article(trace) {
  const facts = [`${trace.length} tokens`];
  if (wasCut(trace)) facts.push("cut off at the budget");
  if (trace.answer !== null) facts.push(`answer ${trace.answer}`);
  if (isRun) facts.push(`reward ${short(trace.reward)}`, `advantage ${signed(trace.advantage)}`);
  if (trace.contradicted) facts.push(`verdicts against the grade: ${trace.contradicted}`);
  const others = trace.parts.filter(([kind]) => kind === "verdict").length;
  if (others) facts.push(`verdicts that do not count (no check of an attempt): ${others}`);
  return el("article", { class: trace.correct ? "is-right" : "is-wrong", "aria-label": nameOf(trace) },
    el("h4", {}, `${mark(trace)} ${describe(trace)}`),
    el("p", { class: "note" }, facts.join(" · ")),
    colouring === "parts" ? partView(trace) : tokenView(trace));
}

// The parts of a trace; what a <sample> or <reflect> holds is a block.
function partView(trace) {
  const body = el("div", { class: "text" });
  let box = body;  // where the next part goes
  for (const [kind, text] of trace.parts) {
    const [what, content] = kind.split(" ");  // "open correct"
    if (what === "open" || what === "close") box = body;
    box.append(el("span", { class: what, title: TITLES[what] || null }, text));
    if (what === "open") {
      box = el("div", { class: `block ${content}` });
      body.append(box);
    }
  }
  return body;
}

const hits = CSS.highlights ? new Highlight() : null;
if (hits) CSS.highlights.set("hits", hits);

// Mark the searched text, where the browser can (no element changes for it).
function highlight() {
  const wanted = filters.text.control.value.toLowerCase();
  if (hits) hits.clear();
  if (!hits || !wanted) return;
  for (const box of detail.querySelectorAll(".question, .text")) {
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) markHits(walker.currentNode, wanted);
  }
}

function markHits(node, wanted) {
  const text = node.data.toLowerCase();
  if (text.length !== node.data.length) return;  // some capitals have longer small letters
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    const range = new Range();
    range.setStart(node, at);
    range.setEnd(node, at + wanted.length);
    hits.add(range);
  }
}

// ---- the viewer: tokens ------------------------------------------------------------------------------
const COLOURINGS = {
  parts: "by part",
  sampler: "by the sampler's log-probability",
  trainer: "by the trainer's log-probability",
  difference: "by trainer minus sampler",
};

// What the colours of a trace's tokens mean.
function meaning({ sampler, trainer }) {
  if (colouring === "sampler") return "Orange: unlikely to the sampler, in full from -5 on.";
  if (!trainer) return "Not trained on (it had no advantage), so there is nothing to colour by.";
  if (colouring === "trainer") return "Orange: unlikely to the trainer, in full from -5 on.";
  const largest = Math.max(...sampler.map((surprise, i) => Math.abs(surprise - trainer[i]))) / 1000;
  return "Orange: likelier to the trainer than to the sampler, blue: less likely; in full at 0.2, about "
    + `where the clip begins. The largest difference here: ${largest}.`;
}

// Thousandths of a nat that have all the colour.
const FULL = { sampler: 5000, trainer: 5000, difference: 200 };

// How strongly a token is coloured, -1..1.
function strength(trace, i) {
  const { sampler, trainer } = trace;
  let value = 0;
  if (colouring === "sampler") value = sampler[i];
  else if (trainer) value = colouring === "trainer" ? trainer[i] : sampler[i] - trainer[i];
  return Math.max(-1, Math.min(1, value / FULL[colouring]));
}

function tokenView(trace) {
  if (!trace.ids) {
    return [el("p", { class: "note" }, "The tokens of this response are not known here."), partView(trace)];
  }
  const readout = el("p", { class: "readout", role: "status" },
    `${meaning(trace)} Point at a token, or use ← and →.`);
  const tokens = tokenElements(trace);
  let chosen = null;  // its place
  const choose = (place) => {
    if (chosen !== null) tokens[chosen].classList.remove("chosen");
    chosen = Math.min(tokens.length - 1, Math.max(0, place));
    tokens[chosen].classList.add("chosen");
    readout.textContent = `token ${chosen + 1} of ${tokens.length}, `
      + `${JSON.stringify(tokens[chosen].textContent)} (${trace.ids[chosen]}): ${logprobs(trace, chosen)}`;
  };
  const point = (event) => {
    if (event.target.dataset.place) choose(Number(event.target.dataset.place));
  };
  const step = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    choose(chosen === null ? 0 : chosen + by);
    tokens[chosen].scrollIntoView({ block: "nearest" });
  };
  return [readout, el("div", { class: "text tokens", tabindex: 0, role: "group", "aria-label": "tokens",
    onpointerover: point, onclick: point, onkeydown: step }, trace.text.slice(0, trace.opening), tokens)];
}

function tokenElements(trace) {
  let at = trace.opening;
  return trace.ids.map((id, place) => {
    const isEnd = trace.end !== "" && place === trace.ids.length - 1;  // it is no part of the text
    const text = isEnd ? trace.end : trace.text.slice(at, at + trace.widths[place]);
    at += trace.widths[place];
    const how = strength(trace, place);
    const kind = `token ${how < 0 ? "less" : ""} ${isEnd ? "end" : ""}`;
    const token = el("span", { class: kind, "data-place": place }, text);
    token.style.setProperty("--strength", `${Math.round(100 * Math.abs(how))}%`);
    return token;
  });
}

function logprobs({ sampler, trainer }, place) {
  const nats = (thousandths) => (0 - thousandths / 1000).toFixed(3);
  const trained = trainer ? `trainer ${nats(trainer[place])}` : "not trained on";
  return `log-probability ${nats(sampler[place])}, ${trained}`;
}

// ---- the viewer: the address -------------------------------------------------------------------------
// #trace/task/id/model/index, or #trace/step/id/index of a run; each part encoded.
function addressOf({ group, arm, index }) {
  const where = isRun ? [group.step, group.id] : [group.task, group.id, data.arms[arm]];
  return `#${["trace", ...where, index].map(encodeURIComponent).join("/")}`;
}

function decoded(address) {
  try {
    return decodeURIComponent(address);
  } catch {
    return address;
  }
}

function followAddress() {
  const { hash } = location;
  const trace = traces.find((candidate) => addressOf(candidate) === hash)
    ?? traces.find((candidate) => decoded(addressOf(candidate)) === decoded(hash));  // of a decoded link
  if (!trace) {
    const isLink = hash.startsWith("#trace/");
    tell(isLink ? "The response of this link is not on this page (report.py --megabytes)." : "");
    return;
  }
  if (!matches.includes(trace)) clearFilters();
  openTrace(trace);
  goToDetail();
}

function goToDetail() {
  detail.focus();
  detail.scrollIntoView();
}

// Scroll to the response, unless its beginning can be seen.
function showDetail() {
  const { top } = articles.getBoundingClientRect();
  if (top < 0 || top > 0.8 * window.innerHeight) detail.scrollIntoView();
}

// The nearest step with rollouts on the page, null if no step has any.
function nearestStep(step) {
  const nearer = (a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a);
  return keptSteps.length ? keptSteps.reduce(nearer) : null;
}

function openStep(step) {
  const nearest = nearestStep(step);
  if (nearest === null) return;
  resetFilters();
  filters.step.control.value = nearest;
  applyFilters();
  openTrace(matches[0]);
  goToDetail();
  if (nearest !== step) tell(`No rollouts of step ${step} are on this page; these are of step ${nearest}.`);
}

// ---- the viewer: the keys ----------------------------------------------------------------------------
// To the next response that passes the filters (by 1), or to the one before (by -1), if there is one.
function move(by) {
  const next = by > 0 ? matches.find((trace) => trace.at > current.at)
    : matches.findLast((trace) => trace.at < current.at);
  if (next) openTrace(next);
}

// There the same sample of the same model, if it passes the filters.
function moveGroup(by) {
  const own = current.group.traces;
  const next = by > 0 ? matches.find((trace) => trace.at > own.at(-1).at)
    : matches.findLast((trace) => trace.at < own[0].at);
  if (!next) return;
  const same = counterpart(current.arm, current.index, next.group);
  openTrace(matches.includes(same) ? same : matches.find((trace) => trace.group === next.group));
}

// Beside a sample the same of the next model, beside a rollout the next one; after the last, nothing.
function cycleBeside() {
  const others = current.group.traces.filter((trace) =>
    trace !== current && (isRun || trace.index === current.index));
  beside = others[others.indexOf(beside) + 1] || null;
  drawGroup();
}

function cycleColouring() {
  if (colourField.hidden) return;
  const all = Object.keys(COLOURINGS);
  colouring = all[(all.indexOf(colouring) + 1) % all.length];
  drawGroup();
}

const KEYS = {
  j: ["next response", () => move(1)],
  k: ["previous response", () => move(-1)],
  n: ["next question", () => moveGroup(1)],
  p: ["previous question", () => moveGroup(-1)],
  b: ["another response beside it", cycleBeside],
  c: ["another colouring", cycleColouring],
  "/": ["search; Enter or Escape leads back", () => filters.text.control.focus()],
};

function onKey(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (["Enter", "Escape"].includes(key) && target === filters.text.control) goToDetail();
  if (!(key in KEYS) || target.closest("input, select")) return;
  event.preventDefault();
  const [, action] = KEYS[key];
  action();
  if (key !== "/") showDetail();
}

// ---- the page ----------------------------------------------------------------------------------------
function tracesSection() {
  const title = isRun ? "Rollouts" : "Responses";
  const useful = { step: isRun, task: tasks.length > 1, model: data.arms.length > 1 };
  const shown = Object.keys(filters).filter((name) => useful[name] ?? true);
  return section("traces", title,
    legend([["correct", "right attempt"], ["incorrect", "wrong attempt"], ["reflection", "check"],
      ["phrase", "between"], ["contradicts", "verdict against the grade"]]),
    el("div", { class: "controls", role: "search" }, shown.map((name) => filters[name].field),
      button("clear", clearFilters)),
    count,
    el("details", { class: "keys" }, el("summary", {}, "Keys"), el("dl", {}, Object.entries(KEYS).map(
      ([key, [does]]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, does)]))),
    spoken,
    notice,
    viewer);
}

function settings() {
  return el("details", {}, el("summary", {}, "Settings"),
    table("Its flags", [["flag", "value"], ...Object.entries(data.settings)]));
}

function howFar() {
  if (!isRun) return null;
  const done = data.curves.steps.at(-1) ?? 0;
  const planned = "steps" in data.settings ? ` of ${data.settings.steps}` : "";
  return el("p", {}, `Step ${done}${planned}.`);
}

function draw() {
  const figures = [accuracySection, retriesSection, lengthsSection, costSection, figuresSection];
  const shown = [...(isRun ? [curvesSection] : figures), ...(traces.length ? [tracesSection] : [])];
  const sections = shown.map((make) => make());
  const links = sections.map((made) =>
    el("a", { href: `#${made.id}` }, made.querySelector("h2").textContent));
  document.body.append(
    el("header", {}, el("h1", {}, data.title), el("p", {}, el("code", {}, data.command)), howFar(),
      settings(),
      el("nav", { "aria-label": "Sections" }, links)),
    el("main", {}, sections));
  if (!traces.length) return;
  drawList();
  current = traces[0];
  drawGroup();
  followAddress();
  window.addEventListener("hashchange", followAddress);
  document.addEventListener("keydown", onKey);
}

draw();
