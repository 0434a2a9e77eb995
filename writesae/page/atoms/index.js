// The choice is saved in the address (#sort=rate&order=desc&min=1%&max=0.2&q=war), so that it can be shared.
const form = document.querySelector("form");
const body = document.querySelector("table.atoms tbody");
const heads = [...document.querySelectorAll("th[data-key]")];
const rows = [...body.rows].map((row) => ({
  row,
  text: row.textContent.replaceAll("·", " ").toLowerCase(),
  value: (key) => (row.dataset[key] ? Number(row.dataset[key]) : null),
}));
const defaults = { sort: "atom", order: "asc", min: "", max: "", q: "" };

function limit(written, otherwise) {
  const number = parseFloat(written.trim().replace("−", "-").replace(",", "."));
  return Number.isNaN(number) ? otherwise : written.includes("%") ? number / 100 : number;
}

function chosen() {
  const hash = new URLSearchParams(location.hash.slice(1).replace(/%(?![0-9a-f]{2})/gi, "%25"));
  const state = Object.fromEntries(Object.entries(defaults).map(([name, value]) => [name, hash.get(name) ?? value]));
  if (!heads.some((head) => head.dataset.key === state.sort)) state.sort = "atom";
  return { ...state, order: state.order === "desc" ? "desc" : "asc" };
}

function show() {
  const state = chosen(), low = limit(state.min, -Infinity), high = limit(state.max, Infinity);
  const words = state.q.toLowerCase().split(/\s+/), bounded = low > -Infinity || high < Infinity;
  for (const [name, value] of Object.entries(state)) if (form.elements[name].value !== value) form.elements[name].value = value;
  for (const { row, text, value } of rows) {
    const x = value(state.sort), inside = x === null ? !bounded : low <= x && x <= high;
    row.hidden = !(inside && words.every((word) => text.includes(word)));
  }
  const sign = state.order === "asc" ? 1 : -1;
  const sorted = [...rows].sort((a, b) => {
    const x = a.value(state.sort), y = b.value(state.sort);
    if (x === null || y === null) return (x === null) - (y === null); // unknown comes last, either way
    return sign * (x - y) || a.value("atom") - b.value("atom");
  });
  body.append(...sorted.map((each) => each.row));
  for (const head of heads) head.ariaSort = head.dataset.key === state.sort ? `${state.order}ending` : null;
  const count = rows.filter((each) => !each.row.hidden).length;
  document.getElementById("count").textContent = count === rows.length ? `${count} atoms` : `${count} of ${rows.length} atoms`;
}

function choose(change) {
  const state = Object.entries({ ...chosen(), ...change });
  const hash = new URLSearchParams(state.filter(([name, value]) => value !== defaults[name])).toString();
  history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  show();
}

const sortBy = (sort) => choose({ sort, order: sort === "atom" ? "asc" : "desc", min: "", max: "" });
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", ({ target: { name, value } }) => (name === "sort" ? sortBy(value) : choose({ [name]: value })));
form.addEventListener("reset", (event) => { event.preventDefault(); choose(defaults); });
for (const head of heads) head.firstElementChild.addEventListener("click", () => {
  const { sort, order } = chosen();
  if (sort === head.dataset.key) choose({ order: order === "asc" ? "desc" : "asc" });
  else sortBy(head.dataset.key);
});
addEventListener("hashchange", show);
show();
