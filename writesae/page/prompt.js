// Text of the page is set as text (textContent, title), never as markup.
const form = document.querySelector("form");
const part = (id) => document.getElementById(id);
let reading = null, at = 0;

function element(tag, text, title, shade, low) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (title) made.title = title;
  if (shade > 0) made.style.background = `color-mix(in srgb, var(${low ? "--rival" : "--atom"}) ${Math.min(100, Math.round(70 * shade))}%, transparent)`;
  return made;
}

function meter(list, rows) {
  const most = Math.max(1e-12, ...rows.map((row) => Math.abs(row.value)));
  list.replaceChildren(...rows.map(({ name, value, shown, go, chosen }) => {
    const item = document.createElement("li"), label = element(go ? "button" : "span", name);
    item.style.setProperty("--size", `${Math.round((100 * Math.abs(value)) / most)}%`);
    item.classList.toggle("low", value < 0);
    label.className = "tok";
    if (go) label.addEventListener("click", go);
    if (chosen) label.setAttribute("aria-current", "true");
    item.append(label, element("span", shown));
    return item;
  }));
}

function fillHeads() {
  const n = Number(form.elements.layer.selectedOptions[0].dataset.heads), first = Math.min(Number(form.elements.head.dataset.first), n - 1);
  form.elements.head.replaceChildren(...Array.from({ length: n }, (_, head) => new Option(head, head, head === first, head === first)));
}

function choose(token) {
  at = token;
  const { tokens, shares, held, atoms, facts, writes } = reading, row = (form.elements.shade.value === "held" ? held : shares)[at];
  const most = Math.max(1e-12, ...row.map(Math.abs)), percent = (x) => `${(100 * x).toFixed(1)}%`;
  part("text").replaceChildren(...tokens.map((piece, s) => {
    const share = s < row.length ? row[s] : 0;
    const shown = element("button", piece, `${s}: ${s < row.length ? percent(share) : "later"}`, Math.abs(share) / most, share < 0);
    if (s === at) shown.setAttribute("aria-current", "true");
    shown.addEventListener("click", () => choose(s));
    return shown;
  }));
  for (const [list, values] of [["sources", shares[at]], ["holdings", held[at]]]) {
    const order = values.map((value, s) => ({ name: `${s} ${tokens[s]}`, value, shown: percent(value), go: () => choose(s) }));
    meter(part(list), order.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 10));
  }
  part("reads").textContent = `The largest shares of what the head reads at token ${at}, ${tokens[at]}.`;
  part("holds").textContent = `The largest shares of the state after token ${at}, ${tokens[at]}.`;
  const known = facts ? facts[at] : [], before = new Set(facts && at ? facts[at - 1].map(([name]) => name) : []), now = new Set(known.map(([name]) => name));
  part("known").textContent = !facts ? "No dictionary of pairs of this head's states is loaded." : known.length ? `Pairs of a key and a value in the state after token ${at}, as shares of its norm.` : "No pair stands out here.";
  meter(part("facts"), known.map(([name, value]) => ({ name, value, shown: String(value) })));
  const came = [...now].filter((name) => !before.has(name)), left = [...before].filter((name) => !now.has(name));
  part("changed").textContent = [came.length ? `New here: ${came.join(", ")}.` : "", left.length ? `No longer here: ${left.join(", ")}.` : ""].join(" ").trim();
  const here = atoms ? atoms[at] : [];
  part("none").textContent = atoms ? (here.length ? "" : "No atom fires here.") : "No dictionary of this head is loaded.";
  meter(part("atoms"), here.slice(0, 20).map(([atom, value]) => ({ name: `atom ${atom}`, value, shown: String(value) })));
  const head = Number(form.elements.head.value);
  [...part("grid").rows].forEach((row, h) => [...row.cells].forEach((cell, t) => cell.toggleAttribute("aria-current", h === head && t === at + 1)));
  meter(part("heads"), writes.map((sizes, h) => ({ name: `head ${h}`, value: sizes[at], shown: String(sizes[at]), go: () => goTo(h, at), chosen: h === head })));
}

function goTo(head, token) {
  if (head === Number(form.elements.head.value)) return choose(token);
  form.elements.head.value = head;
  read(token);
}

function grid() {
  part("grid").replaceChildren(...reading.writes.map((sizes, head) => {
    const row = document.createElement("tr"), most = Math.max(1e-12, ...sizes);
    row.append(element("th", head), ...sizes.map((size, t) => {
      const cell = element("td", "", `head ${head}, token ${t} ${reading.tokens[t]}: ${size}`, size / most);
      cell.addEventListener("click", () => goTo(head, t));
      return cell;
    }));
    return row;
  }));
}

async function post(path, asked) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
  const given = await answer.json();
  if (!answer.ok) throw new Error(given.error);
  return given;
}

async function explain() {
  const { target, against } = part("ask").elements, box = part("picture");
  part("answer").textContent = "deleting writes, one run each";
  part("made").hidden = true;
  try {
    const width = Math.min(960, part("result").clientWidth - 36);
    const { svg, said, target: title } = await post("/explain", { text: form.elements.text.value, target: target.value, against: against.value, width });
    const drawn = document.importNode(new DOMParser().parseFromString(svg, "image/svg+xml").documentElement, true);
    box.replaceChildren(drawn);
    box.hidden = false;
    part("answer").textContent = `${title}. ${said}`;
    for (const node of drawn.querySelectorAll(".node")) {
      node.addEventListener("click", () => made(node.dataset.node));
      node.addEventListener("keydown", (event) => { if (event.key === "Enter") made(node.dataset.node); });
    }
  } catch (error) {
    box.hidden = true;
    part("answer").textContent = error.message;
  }
}

async function made(name) {
  const write = /^L(\d+)H(\d+)@(\d+)$/.exec(name);
  part("made").hidden = !write;
  if (!write) { part("answer").textContent = `${name} is no write: circles named by a layer and a head are, and have a key, a value, a query and a gate.`; return; }
  const [layer, head, position] = write.slice(1).map(Number);
  try {
    const ports = await post("/write", { layer, head, position });
    part("answer").textContent = `What made ${name}: effects on the logit of each source; those with ~ are predicted, the others measured.`;
    for (const port of ["value", "key", "query", "gate"]) {
      meter(part(port), (ports[port] ?? []).map(([source, value, measured]) => ({ name: source, value, shown: (measured ? "" : "~") + value })));
    }
  } catch (error) {
    part("made").hidden = true;
    part("answer").textContent = error.message;
  }
}

async function read(token) {
  const { text, layer, head } = form.elements;
  part("said").textContent = "reading";
  try {
    reading = await post("/read", { text: text.value, layer: Number(layer.value), head: Number(head.value) });
    part("said").textContent = `${reading.tokens.length} tokens`;
    part("result").hidden = false;
    grid();
    choose(Math.min(token ?? Infinity, reading.tokens.length - 1));
  } catch (error) {
    part("result").hidden = true;
    part("said").textContent = error.message;
  }
}

const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
part("grid").addEventListener("keydown", (event) => {
  const [down, right] = moves[event.key] ?? [0, 0], head = Number(form.elements.head.value) + down, token = at + right;
  if (!(event.key in moves) || !reading.writes[head] || !reading.tokens[token]) return;
  event.preventDefault();
  goTo(head, token);
});
form.addEventListener("submit", (event) => { event.preventDefault(); read(); });
part("ask").addEventListener("submit", (event) => { event.preventDefault(); explain(); });
form.elements.layer.addEventListener("change", () => { fillHeads(); read(at); });
form.elements.head.addEventListener("change", () => read(at));
form.elements.shade.addEventListener("change", () => { if (reading) choose(at); });
fillHeads();
read();
