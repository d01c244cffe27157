// The page of report.py: draws the data of its block #data, and lets one look around in it.
//
// In this order: elements; figures of an evaluation; curves of a run; the viewer (which traces, their list, a
// question, a trace, its tokens, the address, the keys). What a model or a user wrote only ever becomes a text
// node or an attribute, never markup. A *group* is a question with its *traces*: of all models, or all rollouts.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

// ---- elements ----------------------------------------------------------------------------------------
// el("p", { class: "note", onclick: f }, "text", [more, elements]); null children are left out.
function el(name, attributes = {}, ...children) {
  return build(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null));
  return element;
}

function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), children);
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;
const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);

function short(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 1e5)) return String(Number(x.toPrecision(3)));
  return x.toExponential(1);
}

// The first of 1, 2, 5, 10, 20, ... (or 0.5, 0.2, ...) that is not below x.
function roundUp(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  return power * [1, 2, 5, 10].find((step) => step * power >= x * 0.999999);
}

// rows[0] are the headings; `wide` columns at the beginning name their row.
function table(caption, rows, wide = 1) {
  const cells = (row, tag, scope) => row.map((text, i) => (i < wide || tag === "th"
    ? el("th", { scope: tag === "th" ? "col" : scope }, text) : el("td", {}, text)));
  return el("div", { class: "scrolls", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, cells(rows[0], "th"))),
      el("tbody", {}, rows.slice(1).map((row) => el("tr", {}, cells(row, "td", "row"))))));
}

function legend(...entries) {
  return el("p", { class: "legend" }, entries.map(([kind, text]) =>
    el("span", {}, el("i", { class: `swatch ${kind}` }), text)));
}

const armName = (i) => el("span", { class: "arm" }, el("i", { class: `swatch arm${i % 6}` }), data.arms[i]);
const tasks = [...new Set((data.cells || data.groups).map((of) => of.task))];
const cellsOf = (task) => data.cells.filter((cell) => cell.task === task);
const armOf = (cell) => data.arms.indexOf(cell.model);

// Panels of a figure, one for each task.
function panels(draw) {
  return el("div", { class: "panels" }, tasks.map((task, i) =>
    el("figure", {}, el("figcaption", {}, task), draw(task, i))));
}

// A bar of counts side by side: stacked([["right", 7], ["wrong", 3]], "7 right, 3 wrong").
function stacked(counts, label) {
  const bar = el("div", { class: "stacked", role: "img", "aria-label": label, title: label });
  for (const [kind, count] of counts) {
    const piece = el("i", { class: kind });
    piece.style.flexGrow = count;
    if (count) bar.append(piece);
  }
  return bar;
}

// ---- an evaluation -----------------------------------------------------------------------------------
function accuracySection() {
  const highest = Math.max(0.05, ...data.cells.map((cell) => cell.interval[1]));
  const top = Math.min(1, roundUp(highest / 4) * 4);
  const panel = (task) => [
    cellsOf(task).map((cell) => {
      const [low, high] = cell.interval;
      const range = el("i", { class: `range arm${armOf(cell) % 6}` });
      range.style.left = percent(low / top);
      range.style.width = percent((high - low) / top);
      const dot = el("i", { class: `dot arm${armOf(cell) % 6}` });
      dot.style.left = percent(cell.accuracy / top);
      return el("div", { class: "row" }, el("span", {}, cell.model),
        el("div", { class: "track" }, range, dot), el("b", {}, percent(cell.accuracy)));
    }),
    axis("0", percent(top)),
  ];
  const first = data.cells[0];
  return section("accuracy", "Accuracy",
    el("p", {}, `${first.questions} questions × ${first.samples} samples a task (the last table has each). `
      + "Dot: share of right answers; bar: 95% interval."),
    panels(panel),
    table("Accuracy in % [95%], and the paired difference to the first model", data.tables.accuracy));
}

function axis(from, to) {
  return el("div", { class: "row" }, el("span"), el("div", { class: "axis" }, el("span", {}, from),
    el("span", {}, to)), el("b"));
}

function skillsSection() {
  const order = [["gained", "wrong to right"], ["kept-right", "right to right"], ["kept-wrong", "wrong to wrong"],
    ["lost", "right to wrong"]];
  const panel = (task) => cellsOf(task).map((cell) => {
    const counts = order.map(([kind, name]) => [kind, cell.retries[name]]);
    const retries = counts.reduce((sum, [, count]) => sum + count, 0);
    const label = order.map(([, name]) => `${name}: ${cell.retries[name]}`).join(", ");
    return el("div", { class: "row" }, el("span", {}, cell.model),
      retries ? stacked(counts, label) : el("span", { class: "note" }, "no retry"),
      el("b", {}, retries ? `${retries}` : ""));
  });
  return section("skills", "Checks and retries",
    el("p", {}, "What became of an answer when the model tried again, and how many such retries there were."),
    legend(["gained", "wrong to right"], ["kept-right", "right stays right"], ["kept-wrong", "wrong stays wrong"],
      ["lost", "right to wrong"]),
    panels(panel),
    table("Retries: first answer against final answer, in %", data.tables.retries, 2),
    table("Verdicts: answers and reflections of a response, F1, and what attempts were called",
      data.tables.verdicts, 2));
}

function lengthsSection() {
  const panel = (task, i) => {
    const { most, bars } = data.lengths[i];
    return [bars.map(({ arm, right, wrong, median }) => {
      const highest = Math.max(...right.map((count, bin) => count + wrong[bin]));
      const shapes = right.flatMap((count, bin) => [
        bar(bin, wrong[bin] / highest, 0, "wrong"), bar(bin, count / highest, wrong[bin] / highest, "right")]);
      const label = `${data.arms[arm]}: median ${median} tokens`;
      return el("div", { class: "row" }, el("span", {}, data.arms[arm]),
        svg("svg", { class: "histogram", viewBox: `0 0 ${right.length} 1`, preserveAspectRatio: "none",
          role: "img", "aria-label": label }, shapes), el("b", {}, short(median)));
    }), axis("0", `${most} tokens`)];
  };
  const bar = (bin, height, above, kind) => (height
    ? svg("rect", { x: bin + 0.06, y: 1 - above - height, width: 0.88, height, class: kind }) : null);
  return section("lengths", "Length of responses",
    el("p", {}, "Each row has its own height; the number is its median."),
    legend(["right", "right answer"], ["wrong", "wrong answer"]), panels(panel));
}

function costSection() {
  const rightmost = roundUp(Math.max(...data.cells.flatMap((cell) => [cell.tokens, cell.forced_tokens || 0])));
  const top = Math.min(1, roundUp(Math.max(0.05, ...data.cells.map((cell) => Math.max(cell.accuracy,
    cell.forced || 0)))));
  const panel = (task) => {
    const points = cellsOf(task).flatMap((cell) => [
      point(cell.tokens, cell.accuracy, armOf(cell), cell.model),
      cell.forced === undefined ? null
        : point(cell.forced_tokens, cell.forced, armOf(cell), `${cell.model}, forced to go on`, "forced")]);
    return [el("div", { class: "plane" }, el("span", { class: "top" }, percent(top)), points),
      el("div", { class: "axis" }, el("span", {}, "0"), el("span", {}, `${rightmost} tokens`))];
  };
  const point = (tokens, accuracy, arm, name, kind = "") => {
    const text = `${name}: ${percent(accuracy)} for ${Math.round(tokens)} tokens`;
    const dot = el("i", { class: `dot arm${arm % 6} ${kind}`, role: "img", "aria-label": text, title: text });
    dot.style.left = percent(tokens / rightmost);
    dot.style.bottom = percent(accuracy / top);
    return dot;
  };
  const models = [...new Set(data.cells.map(armOf))];
  return section("cost", "Accuracy against tokens",
    el("p", {}, "Mean tokens of a response, to the right, and accuracy, upwards. A ring: forced to go on."),
    el("p", { class: "legend" }, models.map(armName)), panels(panel));
}

function detailsSection() {
  return section("figures", "All figures", table("Every figure of the evaluation", data.tables.all, 2));
}

// ---- curves of a run ---------------------------------------------------------------------------------
const shownSteps = new Set();  // functions (place among the steps) that show one in each chart

function curvesSection() {
  const { steps, each, charts } = data.curves;
  if (!steps.length) return section("curves", "Curves", el("p", {}, "No step has been logged yet."));
  const slider = el("input", { type: "range", id: "shown-step", min: 0, max: steps.length - 1, value: steps.length - 1,
    oninput: () => show(Number(slider.value)) });
  const readout = el("output", { for: "shown-step" });
  const open = el("button", { type: "button", onclick: () => openStep(steps[Number(slider.value)]) });
  const show = (place) => {
    slider.value = place;
    slider.setAttribute("aria-valuetext", `step ${steps[place]}`);
    readout.textContent = `step ${steps[place]}`;
    const nearest = nearestStep(steps[place]);
    open.hidden = nearest === null;
    open.textContent = `rollouts of step ${nearest}`;
    shownSteps.forEach((showIn) => showIn(place));
  };
  const averaged = each > 1 ? ` A point is the mean of ${each} steps.` : "";
  const made = section("curves", "Curves",
    el("p", {}, `Thin: each step; bold: a running mean.${averaged} Click on a step to see its rollouts.`),
    el("div", { class: "controls" }, el("label", { for: "shown-step" }, "Shown step"), slider, readout, open),
    el("div", { class: "panels" }, charts.map((chart) => curve(chart, steps, show))));
  show(steps.length - 1);
  return made;
}

function curve({ title, unit, lines }, steps, show) {
  const values = Object.values(lines).flat().filter((value) => value !== null);
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (high === low || (low >= 0 && low < high / 2)) low = Math.min(0, low);
  if (high === low) high = low < 0 ? 0 : 1;
  const write = (x) => (unit === "%" ? percent(x) : short(x));
  const x = (place) => (steps.length > 1 ? (1000 * place) / (steps.length - 1) : 500);
  const y = (value) => 290 - (280 * (value - low)) / (high - low);
  const cursor = svg("line", { class: "cursor", y1: 0, y2: 300 });
  const shown = Object.keys(lines).map(() => el("b"));
  const names = Object.keys(lines);
  const label = names.map((name) => `${name}: ${ends(lines[name], write)}`).join("; ");
  const picture = svg("svg", { viewBox: "0 0 1000 300", preserveAspectRatio: "none", role: "img",
    "aria-label": label }, names.flatMap((name, i) => linesOf(lines[name], x, y, i)), cursor);
  const placeAt = (event) => {
    const box = picture.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    return Math.round(share * (steps.length - 1));
  };
  picture.addEventListener("pointermove", (event) => show(placeAt(event)));
  picture.addEventListener("click", (event) => {
    show(placeAt(event));
    openStep(steps[placeAt(event)]);
  });
  shownSteps.add((place) => {
    cursor.setAttribute("x1", x(place));
    cursor.setAttribute("x2", x(place));
    names.forEach((name, i) => { shown[i].textContent = write(lines[name][place]); });
  });
  return el("figure", { class: "curve" },
    el("figcaption", {}, title, el("small", {}, unit === "%" ? "" : ` ${unit}`)),
    el("p", { class: "legend" }, names.map((name, i) =>
      el("span", {}, el("i", { class: `swatch arm${i}` }), `${name} `, shown[i]))),
    el("div", { class: "plot" }, el("span", { class: "top" }, write(high)),
      el("span", { class: "bottom" }, write(low)), picture),
    el("div", { class: "axis" }, el("span", {}, `step ${steps[0]}`), el("span", {}, steps[steps.length - 1])));
}

const ends = (values, write) => {
  const there = values.filter((value) => value !== null);
  return `${write(there[0])} at first, ${write(there[there.length - 1])} at last`;
};

// A line and its running mean over a twentieth of the steps; dots where few steps have a value.
function linesOf(values, x, y, i) {
  const points = values.map((value, place) => ({ value, place })).filter(({ value }) => value !== null);
  const path = (of) => `M${of.map(({ value, place }) => `${x(place).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`;
  const line = (of, kind) => svg("path", { d: path(of), class: `line ${kind} arm${i}` });
  if (points.length < 2) return points.map((point) => line([point, point], "dotted"));
  const half = Math.floor(points.length / 40);
  if (half === 0) return [line(points, "")];
  const smooth = points.map(({ place }, at) => {
    const near = points.slice(Math.max(0, at - half), at + half + 1);
    return { place, value: near.reduce((sum, point) => sum + point.value, 0) / near.length };
  });
  return [line(points, "thin"), line(smooth, "")];
}

// ---- the viewer: which traces ------------------------------------------------------------------------
const isRun = Boolean(data.curves);
const traces = [];
data.groups.forEach((group) => {
  group.traces.forEach((trace) => {
    trace.group = group;
    trace.at = traces.push(trace) - 1;
    trace.text = trace.parts.map(([, text]) => text).join("");
  });
});

const wasCut = (trace) => trace.finish === "length";
const OUTCOMES = {
  "right": (t) => t.correct,
  "wrong": (t) => !t.correct,
  "no readable answer": (t) => t.answer === null,
  "cut off": wasCut,
  "first attempt wrong, answer right": (t) => t.attempts[0] === false && t.correct,
  "first attempt right, answer wrong": (t) => t.attempts[0] === true && !t.correct,
  "a verdict contradicts the grade": (t) => t.contradicted > 0,
};
const ATTEMPTS = { "0 or 1": [0, 1], "2": [2, 2], "3": [3, 3], "4 or more": [4, Infinity] };

// Each of these is [the control, the control with its label].
function labelled(label, control) {
  control.id = label.toLowerCase().replace(/\W+/g, "-");
  return [control, el("div", { class: "field" }, el("label", { for: control.id }, label), control)];
}

function select(label, options, none, onchange = applyFilters) {
  return labelled(label, el("select", { onchange }, none === null ? null : el("option", { value: "" }, none),
    options.map(([value, text]) => el("option", { value }, text))));
}

function numeric(label) {
  return labelled(label, el("input", { type: "number", min: 0, step: 1, oninput: applyFilters }));
}

const keptSteps = isRun ? [...new Set(data.groups.map((group) => group.step))] : [];
const [byStep, stepLabel] = select("Step", keptSteps.map((step) => [step, `step ${step}`]), "all kept steps");
const [byTask, taskLabel] = select("Task", tasks.map((task, i) => [i, task]), "all tasks");
const [byArm, armLabel] = select("Model", data.arms.map((arm, i) => [i, arm]), "all models");
const [byOutcome, outcomeLabel] = select("Outcome", Object.keys(OUTCOMES).map((name) => [name, name]), "all outcomes");
const [byAttempts, attemptsLabel] = select("Attempts", Object.keys(ATTEMPTS).map((name) => [name, name]), "any number");
const [atLeast, leastLabel] = numeric("Tokens at least");
const [atMost, mostLabel] = numeric("Tokens at most");
const [search, searchLabel] = labelled("Text",
  el("input", { type: "search", oninput: soon(applyFilters), "aria-keyshortcuts": "/" }));

function soon(action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, 150);
  };
}

let matches = traces;  // the traces that pass the filters

function passes() {
  const wanted = search.value.toLowerCase();
  const [fewest, most] = ATTEMPTS[byAttempts.value] || [0, Infinity];
  const shortest = Number(atLeast.value);
  const longest = atMost.value === "" ? Infinity : Number(atMost.value);
  const inGroup = ({ question, id, reference }) => `${question}\n${id}\n${reference}`.toLowerCase().includes(wanted);
  const found = new Map();  // what the search says of a group's own text
  return (trace) => {
    const { group } = trace;
    if (byStep.value !== "" && group.step !== Number(byStep.value)) return false;
    if (byTask.value !== "" && group.task !== tasks[byTask.value]) return false;
    if (byArm.value !== "" && trace.arm !== Number(byArm.value)) return false;
    if (byOutcome.value !== "" && !OUTCOMES[byOutcome.value](trace)) return false;
    if (trace.attempts.length < fewest || trace.attempts.length > most) return false;
    if (trace.length < shortest || trace.length > longest) return false;
    if (!wanted) return true;
    if (!found.has(group)) found.set(group, inGroup(group));
    return found.get(group) || trace.text.toLowerCase().includes(wanted);
  };
}

function applyFilters() {
  matches = traces.filter(passes());
  drawList();
  if (matches.length && !matches.includes(current)) openTrace(matches[0]);
  else if (current) drawGroup();
}

function clearFilters() {
  [byStep, byTask, byArm, byOutcome, byAttempts, atLeast, atMost, search].forEach((input) => { input.value = ""; });
  applyFilters();
}

// ---- the viewer: the list ----------------------------------------------------------------------------
const PAGE = 100;  // groups that are listed at once
const list = el("ol", { class: "list" });
const count = el("p", { class: "note", role: "status" });

function mark(trace) {
  if (trace.correct) return "✓";
  return wasCut(trace) ? "…" : trace.answer === null ? "○" : "✗";
}

function nameOf(trace) {
  const arm = trace.arm === undefined ? "" : `${data.arms[trace.arm]}, `;
  return `${arm}${isRun ? "rollout" : "sample"} ${trace.index}`;
}

function gradeOf(trace) {
  return trace.correct ? "right" : `wrong${trace.reason ? `: ${trace.reason}` : ""}`;
}

function drawList() {
  const shown = new Set(matches);
  const groups = [...new Set(matches.map((trace) => trace.group))];
  const kept = data.groups.length < data.groups_in_all
    ? ` ${data.groups.length} of ${data.groups_in_all} questions are on this page: report.py --megabytes.` : "";
  count.textContent = `${matches.length} of ${traces.length} responses match.${kept}`;
  list.replaceChildren();
  const more = (from) => {
    list.append(...groups.slice(from, from + PAGE).map((group) => entry(group, shown)));
    const left = groups.length - from - PAGE;
    if (left > 0) {
      const button = el("button", { type: "button", onclick: () => { button.parentNode.remove(); more(from + PAGE); } },
        `${Math.min(left, PAGE)} more of ${left} questions`);
      list.append(el("li", {}, button));
    }
  };
  more(0);
}

function entry(group, shown) {
  const arms = [...new Set(group.traces.map((trace) => trace.arm))];
  const buttons = (arm) => group.traces.filter((trace) => trace.arm === arm).map((trace) =>
    el("button", { type: "button", class: `mark ${trace.correct ? "is-right" : "is-wrong"} ${shown.has(trace) ? "" : "out"}`,
      "data-at": trace.at, "aria-current": trace === current ? "true" : null, title: `${nameOf(trace)}: ${gradeOf(trace)}`,
      "aria-label": `${nameOf(trace)}: ${gradeOf(trace)}`, onclick: () => openTrace(trace) }, mark(trace)));
  return el("li", {}, el("span", { class: "id" }, isRun ? `step ${group.step}: ` : "", shortId(group)),
    arms.map((arm) => el("div", { class: "marks" }, arm === undefined ? null : el("span", {}, data.arms[arm]),
      buttons(arm))));
}

// An id without the task that it begins with, where all are of one task.
function shortId({ task, id }) {
  return tasks.length === 1 && id.startsWith(`${task}/`) ? id.slice(task.length + 1) : id;
}

// ---- the viewer: a question --------------------------------------------------------------------------
const detail = el("div", { class: "detail", id: "trace", tabindex: -1 });
const spoken = el("p", { class: "hidden", role: "status" });
let current = null;  // the trace that is shown
let beside = null;  // the trace beside it, or null
let colouring = "parts";

function openTrace(trace, address = true) {
  if (current && current.group !== trace.group) beside = counterpart(trace);
  current = trace;
  if (address) history.replaceState(null, "", addressOf(trace));
  drawGroup();
  for (const button of list.querySelectorAll("[data-at]")) {
    if (Number(button.dataset.at) === trace.at) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  const marked = list.querySelector("[aria-current]");
  if (marked) scrollWithin(list, marked.closest("li"));
  spoken.textContent = `${nameOf(trace)}: ${gradeOf(trace)}`;
}

// Of another question the trace that stands where the one beside stood.
function counterpart(trace) {
  if (!beside) return null;
  return trace.group.traces.find((other) => other !== trace && other.arm === beside.arm && other.index === beside.index) || null;
}

function scrollWithin(box, item) {
  const above = item.offsetTop - box.offsetTop;
  if (above < box.scrollTop || above + item.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = above - 40;
}

function drawGroup() {
  const { group } = current;
  const others = group.traces.filter((trace) => trace !== current);
  if (!others.includes(beside)) beside = null;
  const [besideChoice, besideLabel] = select("Beside", others.map((trace) => [trace.at, nameOf(trace)]), "nothing",
    () => {
      beside = besideChoice.value === "" ? null : traces[besideChoice.value];
      drawGroup();
    });
  besideChoice.value = beside ? beside.at : "";
  const [colour, colourLabel] = select("Colour", Object.entries(COLOURINGS), null, () => {
    colouring = colour.value;
    drawGroup();
  });
  colour.value = colouring;
  const step = (text, key, by) => el("button", { type: "button", "aria-keyshortcuts": key, onclick: () => move(by) }, text);
  const tokenwise = group.traces.some((trace) => trace.ids);
  detail.replaceChildren(
    el("h3", {}, isRun ? `step ${group.step}: ` : "", group.id),
    el("div", { class: "question" }, group.question),
    group.reference ? el("p", {}, "Reference answer: ", el("code", {}, group.reference)) : "",
    members(group),
    el("div", { class: "controls" }, step("‹ previous", "k", -1), step("next ›", "j", 1), besideLabel,
      tokenwise ? colourLabel : null),
    el("div", { class: beside ? "two" : "one" }, article(current), beside ? article(beside) : null));
  const chosen = detail.querySelector(".chosen");
  scrollWithin(detail.querySelector(".members"), chosen);
  highlight();
}

// All traces of a group, with what tells them apart.
function members(group) {
  const columns = [["", (t) => el("button", { type: "button", "aria-current": t === current ? "true" : null,
    onclick: () => openTrace(t) }, `${mark(t)} ${nameOf(t)}`)],
  ["grade", (t) => (t.correct ? "right" : t.answer === null ? "no readable answer" : "wrong")],
  ["tokens", (t) => `${t.length}${wasCut(t) ? " (cut off)" : ""}`],
  ["attempts", (t) => t.attempts.map((right) => (right ? "✓" : "✗")).join(" ")]];
  if (isRun) columns.push(["reward", (t) => short(t.reward)], ["advantage", (t) => signed(t.advantage)]);
  return el("div", { class: "members scrolls", tabindex: 0, role: "region", "aria-label": "all responses to this question" },
    el("table", {}, el("thead", {}, el("tr", {}, columns.map(([name]) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, group.traces.map((trace) => el("tr", { class: trace === current ? "chosen" : "" },
        columns.map(([, of]) => el("td", {}, of(trace))))))));
}

// ---- the viewer: a trace -----------------------------------------------------------------------------
const PARTS = {
  correct: "an attempt that is right", incorrect: "an attempt that is wrong", attempt: "an attempt without a grade",
  reflection: "a check", agrees: "a verdict that agrees with the grade",
  contradicts: "a verdict that contradicts the grade", verdict: "a verdict on no graded attempt",
  answer: "the final answer",
};

function article(trace) {
  const facts = [`${trace.length} tokens`];
  if (wasCut(trace)) facts.push("cut off at the budget");
  if (trace.answer !== null) facts.push(`answer ${trace.answer}`);
  if (isRun) facts.push(`reward ${short(trace.reward)}`, `advantage ${signed(trace.advantage)}`);
  if (trace.contradicted) facts.push(`verdicts against the grade: ${trace.contradicted}`);
  const body = colouring === "parts" ? partView(trace) : tokenView(trace);
  return el("article", { class: trace.correct ? "is-right" : "is-wrong", "aria-label": nameOf(trace) },
    el("h4", {}, `${mark(trace)} ${nameOf(trace)}: ${gradeOf(trace)}`), el("p", { class: "note" }, facts.join(" · ")), body);
}

// The parts of a trace; what a <sample> or <reflect> holds is a block.
function partView(trace) {
  const body = el("div", { class: "text" });
  let box = body;  // where the next part goes
  for (const [kind, text] of trace.parts) {
    const [what, content] = kind.split(" ");  // "open correct"
    if (what === "open" || what === "close") box = body;
    box.append(el("span", { class: what, title: PARTS[what] || null }, text));
    if (what === "open") {
      box = el("div", { class: `block ${content}` });
      body.append(box);
    }
  }
  return body;
}

const hits = CSS.highlights ? new Highlight() : null;
if (hits) CSS.highlights.set("hits", hits);

// Marks the searched text in the question and the traces.
function highlight() {
  const wanted = search.value.toLowerCase();
  if (!hits) return;
  hits.clear();
  if (!wanted) return;
  for (const box of detail.querySelectorAll(".question, .text")) {
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const text = walker.currentNode.data.toLowerCase();
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, Math.min(at + wanted.length, walker.currentNode.data.length));
        hits.add(range);
      }
    }
  }
}

// ---- the viewer: tokens ------------------------------------------------------------------------------
const COLOURINGS = {
  parts: "by part", sampler: "by the sampler's log-probability", trainer: "by the trainer's log-probability",
  difference: "by trainer minus sampler",
};

const nats = (thousandths) => (-thousandths / 1000).toFixed(3);

// What a token is coloured by, 0..1, with its sign; null where there is nothing to say.
function strength(trace, i) {
  if (colouring === "sampler") return Math.min(1, trace.sampler[i] / 5000);
  if (!trace.trainer) return null;
  if (colouring === "trainer") return Math.min(1, trace.trainer[i] / 5000);
  const difference = (trace.sampler[i] - trace.trainer[i]) / 500;  // half a nat is all of the colour
  return Math.max(-1, Math.min(1, difference));
}

function tokenView(trace) {
  if (!trace.ids) return el("p", { class: "note" }, "The tokens of this response cannot be told apart.");
  const readout = el("p", { class: "readout", role: "status" }, "Point at a token, or use ← and →.");
  const spans = [];
  let at = trace.opening;
  trace.ids.forEach((id, i) => {
    const isEnd = i === trace.ids.length - 1 && trace.end !== "";
    const text = isEnd ? trace.end : trace.text.slice(at, at + trace.widths[i]);
    at += trace.widths[i];
    const how = strength(trace, i);
    const span = el("span", { class: `token ${how < 0 ? "less" : "more"}${isEnd ? " end" : ""}`, "data-i": i }, text);
    span.style.setProperty("--strength", `${Math.round(100 * Math.abs(how || 0))}%`);
    spans.push(span);
  });
  let chosen = -1;
  const choose = (i) => {
    if (spans[chosen]) spans[chosen].classList.remove("chosen");
    chosen = i;
    spans[i].classList.add("chosen");
    const trainer = trace.trainer ? `trainer ${nats(trace.trainer[i])}` : "not trained on (no advantage)";
    readout.textContent = `token ${i + 1} of ${spans.length}, ${JSON.stringify(spans[i].textContent)} (${trace.ids[i]}): `
      + `log-probability ${nats(trace.sampler[i])}, ${trainer}`;
  };
  const follow = (event) => {
    if (event.target.dataset.i) choose(Number(event.target.dataset.i));
  };
  const body = el("div", { class: "text tokens", tabindex: 0, onpointerover: follow, onclick: follow,
    onkeydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      choose(Math.min(spans.length - 1, Math.max(0, chosen + by)));
      spans[chosen].scrollIntoView({ block: "nearest" });
    } }, trace.text.slice(0, trace.opening), spans);
  return [readout, body];
}

// ---- the viewer: the address and the keys ------------------------------------------------------------
// #trace/task/id/model/index, or #trace/step/id/index of a run; each part encoded.
function addressOf(trace) {
  const where = isRun ? [trace.group.step, trace.group.id] : [trace.group.task, trace.group.id, data.arms[trace.arm]];
  return `#${["trace", ...where, trace.index].map(encodeURIComponent).join("/")}`;
}

// Compared decoded: what passes a link on may decode it.
function decoded(address) {
  try {
    return decodeURIComponent(address);
  } catch {
    return address;
  }
}

function followAddress() {
  const wanted = decoded(location.hash);
  const trace = traces.find((candidate) => decoded(addressOf(candidate)) === wanted);
  if (!trace) return false;
  if (!matches.includes(trace)) clearFilters();
  openTrace(trace);
  toTraces();
  return true;
}

function toTraces() {
  detail.focus();
  detail.scrollIntoView();
}

function nearestStep(step) {
  if (!keptSteps.length) return null;
  return keptSteps.reduce((best, kept) => (Math.abs(kept - step) < Math.abs(best - step) ? kept : best));
}

function openStep(step) {
  const nearest = nearestStep(step);
  if (nearest === null) return;
  clearFilters();
  byStep.value = nearest;
  applyFilters();
  openTrace(matches[0]);
  toTraces();
}

// To the next trace that passes the filters, or the one before.
function move(by) {
  if (!matches.length) return;
  const at = matches.indexOf(current);
  openTrace(matches[Math.min(matches.length - 1, Math.max(0, at + by))]);
}

function moveGroup(by) {
  const groups = [...new Set(matches.map((trace) => trace.group))];
  if (!groups.length) return;
  const at = Math.min(groups.length - 1, Math.max(0, groups.indexOf(current.group) + by));
  openTrace(matches.find((trace) => trace.group === groups[at]));
}

function cycleBeside() {
  const others = current.group.traces.filter((trace) => trace.arm === undefined || trace.index === current.index)
    .filter((trace) => trace !== current);
  beside = others[others.indexOf(beside) + 1] || null;
  drawGroup();
}

function cycleColouring() {
  if (!current.group.traces.some((trace) => trace.ids)) return;
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
  "/": ["search", () => search.focus()],
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === search) toTraces();
  if (event.target.closest("input, select, textarea")) return;
  const [, action] = KEYS[event.key] || [];
  if (!action || !current) return;
  event.preventDefault();
  action();
});

function tracesSection() {
  if (!traces.length) {
    return section("traces", "Responses", el("p", {}, isRun ? "This run has kept no rollouts." : "There are none."));
  }
  const filters = [isRun ? stepLabel : null, tasks.length > 1 ? taskLabel : null, data.arms.length > 1 ? armLabel : null,
    outcomeLabel, attemptsLabel, leastLabel, mostLabel, searchLabel,
    el("button", { type: "button", onclick: clearFilters }, "clear")];
  return section("traces", isRun ? "Rollouts" : "Responses",
    legend(["correct", "right attempt"], ["incorrect", "wrong attempt"], ["reflection", "check"], ["phrase", "between"],
      ["contradicts", "verdict against the grade"]),
    el("div", { class: "controls", role: "search" }, filters),
    count,
    el("details", { class: "keys" }, el("summary", {}, "Keys"), el("dl", {}, Object.entries(KEYS).map(([key, [does]]) =>
      [el("dt", {}, el("kbd", {}, key)), el("dd", {}, does)]))),
    spoken,
    el("div", { class: "viewer" }, list, detail));
}

// ---- the page ----------------------------------------------------------------------------------------
function settings() {
  const rows = Object.entries(data.settings).map(([name, value]) => [name, JSON.stringify(value)]);
  return rows.length ? el("details", {}, el("summary", {}, "Settings"), table("Flags of this run", [["flag", "value"], ...rows])) : null;
}

function draw() {
  const sections = isRun ? [curvesSection(), tracesSection()]
    : [accuracySection(), skillsSection(), lengthsSection(), costSection(), detailsSection(), tracesSection()];
  const links = sections.map((of) => el("a", { href: `#${of.id}` }, of.querySelector("h2").textContent));
  document.body.append(
    el("header", {}, el("h1", {}, data.title), el("p", {}, el("code", {}, data.command)), settings(),
      el("nav", { "aria-label": "Sections" }, links)),
    el("main", {}, sections));
  if (!traces.length) return;
  drawList();
  if (!followAddress()) openTrace(traces[0], false);
  window.addEventListener("hashchange", followAddress);
}

draw();
