// The page of page.py, once it is there: filters its responses, and opens the one that a link names.
"use strict";

const choices = [...document.querySelectorAll("select")];
const search = document.getElementById("text");
const count = document.getElementById("count");
const groups = [...document.querySelectorAll(".group")];
const responses = [...document.querySelectorAll(".response")];

// Whether a response passes a filter: data-* of it or of its group says what it is.
function passes(response, { id, value }) {
  const about = response.dataset[id] ?? response.parentElement.dataset[id];
  return value === "" || about === value || about.split("|").includes(value);
}

// What the text filter looks through: the question, its id, its reference answer, the response.
function searched(response) {
  const parts = response.parentElement.querySelectorAll(".asked");
  return [...parts, response.querySelector(".text")].map((part) => part.textContent).join("\n").toLowerCase();
}

function filter() {
  const wanted = search.value.toLowerCase();
  for (const response of responses) {
    const shown = choices.every((choice) => passes(response, choice));
    response.hidden = !shown || !searched(response).includes(wanted);
  }
  for (const group of groups) group.hidden = !group.querySelector(".response:not([hidden])");
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
  for (const control of [...choices, search]) control.addEventListener("input", filter);
  document.getElementById("clear").addEventListener("click", clear);
  window.addEventListener("hashchange", follow);
  filter();
  follow();
}
