// The page of report.py, once it is there: filters its responses, and opens the one that a link names.
"use strict";

const choices = [...document.querySelectorAll("select")];
const search = document.getElementById("text");
const count = document.getElementById("count");
const groups = [...document.querySelectorAll(".group")];
const responses = [...document.querySelectorAll(".response")];

// Whether a response passes a filter: data-* of it or of its group says what it is.
function passes(response, { id, value }) {
  const about = response.dataset[id] ?? response.parentElement.dataset[id];
  return value === "" || about.split("|").includes(value);
}

function filter() {
  const wanted = search.value.toLowerCase();
  for (const group of groups) {
    const asked = [...group.children].filter((child) => !child.matches(".response"));
    const question = asked.map((child) => child.textContent).join("\n");
    for (const response of group.querySelectorAll(".response")) {
      const text = `${question}\n${response.textContent}`.toLowerCase();
      response.hidden = !(choices.every((choice) => passes(response, choice)) && text.includes(wanted));
    }
    group.hidden = !group.querySelector(".response:not([hidden])");
  }
  const shown = responses.filter((response) => !response.hidden).length;
  count.textContent = `${shown} of ${responses.length} responses match.`;
}

function clear() {
  for (const control of [...choices, search]) control.value = "";
  filter();
}

function follow() {
  const response = document.getElementById(location.hash.slice(1));
  if (!response?.matches(".response")) {
    if (location.hash) count.textContent = "The response of this link is not on this page.";
    return;
  }
  if (response.hidden) clear();
  response.open = response.parentElement.open = true;
  response.scrollIntoView();
}

if (search) {
  for (const control of [...choices, search]) control.addEventListener("change", filter);
  document.getElementById("clear").addEventListener("click", clear);
  window.addEventListener("hashchange", follow);
  filter();
  follow();
}
