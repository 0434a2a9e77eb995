"use strict";
// The choice lives in the address (#sort=rate&order=asc&min=1%&max=0.2&q=war), so that it can be kept and shared.
const form = document.querySelector("form.tools");
const body = document.querySelector("table.atoms tbody");
const heads = [...document.querySelectorAll("th[data-key]")];
const keys = heads.map((head) => head.dataset.key);
const rows = [...body.rows].map((row) => ({
  row,
  text: row.textContent.replaceAll("·", " ").toLowerCase(),
  value: Object.fromEntries(keys.map((key) => [key, row.dataset[key] ? Number(row.dataset[key]) : null])),
}));
const defaults = { sort: "atom", order: "asc", min: "", max: "", q: "" };

function limit(written, otherwise) {
  const found = /^\s*([-−+]?[0-9]*[.,]?[0-9]+(?:e[-+]?[0-9]+)?)\s*(%?)\s*$/i.exec(written);
  if (!found) return otherwise;
  return Number(found[1].replace("−", "-").replace(",", ".")) / (found[2] ? 100 : 1);
}

function chosen() {
  const hash = new URLSearchParams(location.hash.slice(1).replace(/%(?![0-9a-f]{2})/gi, "%25"));
  const state = { ...defaults };
  for (const name of Object.keys(state)) if (hash.has(name)) state[name] = hash.get(name);
  if (!keys.includes(state.sort)) state.sort = defaults.sort;
  if (!hash.has("order") || !["asc", "desc"].includes(state.order)) state.order = state.sort === "atom" ? "asc" : "desc";
  return state;
}

function show() {
  const state = chosen();
  for (const name of Object.keys(state)) if (form.elements[name].value !== state[name]) form.elements[name].value = state[name];
  const low = limit(state.min, -Infinity), high = limit(state.max, Infinity);
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const bounded = low > -Infinity || high < Infinity;
  let count = 0;
  for (const each of rows) {
    const value = each.value[state.sort];
    const inside = value === null ? !bounded : low <= value && value <= high;
    each.row.hidden = !(inside && words.every((word) => each.text.includes(word)));
    count += !each.row.hidden;
  }
  const sign = state.order === "asc" ? 1 : -1;
  const sorted = [...rows].sort((a, b) => {
    const x = a.value[state.sort], y = b.value[state.sort];
    if (x === null || y === null) return (x === null) - (y === null); // unknown comes last, either way
    return sign * (x - y) || a.value.atom - b.value.atom;
  });
  body.append(...sorted.map((each) => each.row));
  for (const head of heads) {
    if (head.dataset.key === state.sort) head.setAttribute("aria-sort", state.order === "asc" ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  const total = rows.length;
  document.getElementById("count").textContent = count === total ? `${total} atoms` : `${count} of ${total} atoms`;
}

function choose(change) {
  const state = { ...chosen(), ...change };
  const kept = Object.entries(state).filter(([name, value]) => value !== "" && !(name === "sort" && value === "atom"));
  const plain = state.sort === "atom" && state.order === "asc";
  const hash = new URLSearchParams(kept.filter(([name]) => !(plain && name === "order"))).toString();
  history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  show();
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  const { name, value } = event.target;
  choose(name === "sort" ? { sort: value, order: value === "atom" ? "asc" : "desc", min: "", max: "" } : { [name]: value });
});
form.addEventListener("reset", (event) => {
  event.preventDefault();
  choose(defaults);
});
for (const head of heads) {
  head.querySelector("button").addEventListener("click", () => {
    const state = chosen(), key = head.dataset.key;
    if (state.sort === key) choose({ order: state.order === "asc" ? "desc" : "asc" });
    else choose({ sort: key, order: key === "atom" ? "asc" : "desc", min: "", max: "" });
  });
}
addEventListener("hashchange", show);
show();
