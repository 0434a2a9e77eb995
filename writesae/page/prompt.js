// Text of the page is set as text (textContent, title), never as markup.
const part = (id) => document.getElementById(id), form = part("prompt");
let memory = null, read = null, why = null, changes = [], at = 0, marked = null, hasReader = false, back = null, reading = null;

function element(tag, text, title) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (title) made.title = title;
  return made;
}

function button(text, act, name) {
  const made = element("button", text);
  made.type = "button";
  if (name) made.setAttribute("aria-label", name);
  made.addEventListener("click", act);
  return made;
}

function meter(list, rows) {
  const most = Math.max(1e-12, ...rows.map((row) => Math.abs(row.value)));
  list.replaceChildren(...rows.map(({ name, value, shown, go }) => {
    const item = document.createElement("li"), label = go ? button(name, go) : element("span", name);
    item.style.setProperty("--size", `${Math.round((100 * Math.abs(value)) / most)}%`);
    item.classList.toggle("low", value < 0);
    label.classList.add("tok");
    label.title = name;
    item.append(label, element("span", shown));
    return item;
  }));
}

const percent = (x) => `${(100 * x).toFixed(1)}%`, signed = (x) => (x > 0 ? "+" : "") + x;
const typed = () => ({ text: form.elements.text.value, question: form.elements.question.value }); // `read` is what was read of it
const changed = () => ({
  spans: changes.filter((each) => each.now !== undefined).map(({ start, stop, now }) => [start, stop, now]),
});

async function post(path, asked) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
  const given = await answer.json();
  if (!answer.ok) throw new Error(given.error);
  return given;
}

let last = Promise.resolve(); // one thing at a time, in the order of clicks

function during(place, words, work) { // what runs is said, and so is an error
  const run = async () => {
    part(place).textContent = words;
    part("result").setAttribute("aria-busy", "true");
    try {
      part(place).textContent = (await work()) ?? "";
      return true;
    } catch (error) {
      part(place).textContent = error.message;
      return false;
    } finally {
      part("result").removeAttribute("aria-busy");
    }
  };
  return (last = last.then(run));
}

// ---- the memory

async function readText(spans) { // those of an address; else, of the same text, the changes stay
  const asked = typed(), { text, question } = asked, isSame = read?.text === text;
  const done = await during("said", "reading", async () => {
    const kept = spans ? spans.map(([start, stop, now]) => ({ start, stop, now })) : isSame ? changes : [], gone = spans || isSame ? 0 : changed().spans.length;
    const found = await post("/memory", { ...asked, spans: spans ?? (isSame ? changed().spans : []) });
    [memory, read] = [found, asked];
    changes = rowsOf(found.sentences, kept);
    [marked, back, reading, at] = [null, null, null, memory.tokens.length - 1];
    for (const id of ["picture", "chosen", "back"]) part(id).hidden = true;
    for (const id of ["answer", "reader-said", "checked"]) part(id).textContent = "";
    show();
    showTyped();
    const n = changed().spans.length, changesSaid = n ? `; ${n} of your changes stay` : gone ? `; the text is another one, so ${gone} of your changes are gone` : "";
    return `${memory.stop} tokens of text, ${memory.tokens.length - memory.stop} of the question${changesSaid}`;
  });
  part("result").hidden = !done;
  if (done && part("atoms")) readAtoms();
}

function rowsOf(sentences, kept) { // and phrases that were taken besides
  const rows = sentences.map(sentence);
  for (const { start, stop, now } of [...kept].reverse()) {
    const row = rows.find((each) => each.start === start && each.stop === stop);
    if (row) row.now = now;
    else rows.unshift({ start, stop, now, text: phrase(start, stop) });
  }
  return rows;
}

function showTyped() { // whether the fields have another text than what is below
  const { text, question } = typed();
  part("typed").hidden = !read || (read.text === text && read.question === question);
}

function fromAddress() { // where a text that was read, and its changes, outlive a reload
  try {
    const { text, question, spans } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    [form.elements.text.value, form.elements.question.value] = [text, question];
    return spans;
  } catch {
    return undefined;
  }
}

function phrase(start, stop) { // tokens of whole words have no spaces
  const { tokens } = memory, between = tokens.some((piece) => piece.startsWith("·")) ? "" : " ";
  return tokens.slice(start, stop).join(between).replaceAll("·", " ").trim();
}

function sentence([start, stop, answer, probability, did]) {
  const said = `Without it the model says “${answer}” (${percent(probability)})`;
  return { start, stop, text: phrase(start, stop), flagged: did, said: did ? `${said}: this sentence ${did} another answer.` : `${said}.` };
}

async function change(item, now) {
  const before = item.now, other = changes.find((each) => each !== item && each.now !== undefined && item.start < each.stop && each.start < item.stop);
  if (other && now !== undefined) { part("said").textContent = `“${item.text}” shares tokens with “${other.text}”, which is changed: restore that first.`; return; }
  await during("said", "changing the memory", async () => {
    if (item.text && !changes.includes(item)) return "Another text was read meanwhile: nothing was changed.";
    item.now = now;
    try {
      memory = { ...memory, ...(await post("/memory", { ...read, ...changed() })) };
    } catch (error) {
      item.now = before;
      throw error;
    }
    part("back").hidden = true; // of the memory before
    show();
    item.row?.querySelector("button").focus();
    const [was, is] = memory.answers.map(({ said }) => `“${said}”`);
    return was === is ? `The model still says ${is}.` : `The model now says ${is}; it said ${was}.`;
  });
  if (hasReader) await askReader(false);
}

function show() {
  const isChanged = changes.some((each) => each.now !== undefined);
  ["before", "after"].forEach((name, n) => {
    const { said, likeliest } = memory.answers[n];
    part(name).textContent = said;
    meter(part(`${name}-tokens`), likeliest.map(([text, value]) => ({ name: text, value, shown: percent(value) })));
  });
  part("kl").replaceChildren(...(isChanged ? ["KL divergence of the next sentence: ", element("b", memory.kl.toFixed(3)), " nats."] : ["Nothing is changed yet."]));
  part("restore").hidden = part("as-read").hidden = !isChanged;
  history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify({ ...read, ...changed() }))}`);
  part("acts").replaceChildren(...changes.map(row));
  showText();
}

function row(item) {
  const made = document.createElement("li"), field = document.createElement("input"), { now, text, scores } = item;
  const words = now ? `${text} ⟶ ${now}` : text;
  field.value = text;
  field.setAttribute("aria-label", `What replaces ${text}`);
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") change(item, field.value.trim() || null); });
  item.row = made;
  made.className = now === null ? "cut" : item.flagged ? "flagged" : "";
  made.append(element("span", words), now === undefined ? button("Cut", () => change(item, null), `Cut ${text}`) : button("Restore", () => change(item, undefined), `Restore ${text}`));
  made.firstChild.className = "what";
  if (now === undefined) made.append(field, button("Replace", () => change(item, field.value.trim() || null), `Replace ${text}`));
  const score = scores ? ` Reader: read ${scores[0].toFixed(2)}, now ${scores[1].toFixed(2)}, never read ${scores[2].toFixed(2)}.` : "";
  made.append(element("small", `${item.said ?? ""}${score}`));
  return made;
}

function showText() {
  const { tokens, stop, first } = memory;
  part("text").replaceChildren(...tokens.map((piece, s) => {
    const shown = button(piece, () => chooseToken(s));
    shown.title = String(s);
    if (s === at) shown.setAttribute("aria-current", "true");
    if (s >= stop || s < first) shown.classList.add("asked");
    if (marked && s >= marked[0] && s < marked[1]) shown.classList.add("marked");
    const item = changes.find((each) => each.now !== undefined && s >= each.start && s < each.stop);
    if (item) shown.classList.add(item.now === null ? "cut" : "told");
    return shown;
  }));
  part("take").hidden = !marked;
}

function chooseToken(s) {
  at = s;
  const { stop, first } = memory, open = marked && marked[1] - marked[0] === 1 && marked[0] !== s;
  if (s >= first && s < stop) marked = open ? [Math.min(marked[0], s), Math.max(marked[0], s) + 1] : [s, s + 1];
  showText();
  showAtoms();
}

function take([start, stop]) {
  if (!changes.some((each) => each.start === start && each.stop === stop)) changes.unshift({ start, stop, text: phrase(start, stop) });
  marked = null;
  show();
}

async function askReader(isBack) {
  await during("reader-said", hasReader ? "reading the memory" : "fitting a reader to text that ships with the package, some seconds", async () => {
    const asked = { ...read, phrases: changes.map(({ start, stop }) => [start, stop]), back: isBack };
    if (isBack && !back) back = [(await post("/reader", { ...asked, spans: [] })).back];
    const isChanged = changes.some((each) => each.now !== undefined), found = await post("/reader", { ...asked, ...changed(), back: isBack && isChanged });
    hasReader = true;
    found.scores.forEach((scores, n) => { changes[n].scores = scores; });
    show();
    if (!isBack) return `Of long phrases the last ${found.longest} tokens are scored.`;
    back[1] = found.back ?? back[0];
    part("back").hidden = false;
    back.forEach((list, n) => meter(part(`back-${n ? "after" : "before"}`), list.map(({ text, score, span }) => ({ name: text, value: score, shown: score.toFixed(2), go: span && (() => take(span)) }))));
    return "Choose a phrase that is in the text to take it into the list above.";
  });
}

// ---- the circuit

function inWords(node) { // "L4H0@13" is "write of L4H0 at “·war” (13)"
  const [place, kind] = node.split(/ (.*)/), [name, token] = place.split("@");
  if (!token) return name;
  const what = { E: "embedding", s: "all sources" }[name[0]] ?? (/^L\d+A/.test(name) ? `softmax head ${name}` : name[0] === "M" ? name : `write of ${name}`);
  return `${kind ? (kind === "state" ? `state of ${name}` : `${kind} of ${name}`) : what} at “${memory.tokens[token]}” (${token})`;
}

async function explain() {
  const { target, against } = part("ask").elements, box = part("picture");
  await during("answer", "deleting nodes, one run each", async () => {
    const width = Math.min(960, part("result").clientWidth - 36);
    box.hidden = true;
    const asked = { ...read, target: target.value, against: against.value }, found = await post("/explain", { ...asked, width });
    why = asked;
    const drawn = document.importNode(new DOMParser().parseFromString(found.svg, "image/svg+xml").documentElement, true);
    part("chosen").hidden = true;
    box.replaceChildren(drawn);
    box.hidden = false;
    part("checked").textContent = found.said;
    for (const node of drawn.querySelectorAll(".node")) {
      node.setAttribute("role", "button");
      node.addEventListener("click", () => choose(node.dataset.node));
      node.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(node.dataset.node); });
    }
    return `${found.target}${changed().spans.length ? ", of the text as it was read, before your changes" : ""}.`;
  });
}

async function choose(name) {
  await during("answer", "running the model without each source", async () => {
    const ports = await post("/node", { ...why, node: name }), cards = Object.entries(ports).map(([port, rows]) => {
      const card = element("section", ""), list = element("ul", "");
      [card.className, list.className, list.id] = ["card", "meter", `port-${port}`];
      meter(list, rows.map(([source, value, measured]) => ({ name: inWords(source), value, shown: (measured ? "" : "~") + signed(value) })));
      card.append(element("h3", port[0].toUpperCase() + port.slice(1)), list);
      return card;
    });
    part("chosen").hidden = false;
    part("node").textContent = inWords(name);
    part("made").replaceChildren(...cards);
    return cards.length ? `What made the ${inWords(name)}: the effect of each source on the answer. Those with ~ are predicted, the others measured.` : `Nothing is known of what made the ${inWords(name)}: it is an input, or not among the largest nodes.`;
  });
}

// ---- dictionaries

const readAtoms = () => during("at", "reading", async () => {
  reading = await post("/atoms", read);
  return showAtoms();
});

function showAtoms() {
  if (!reading) return "";
  part("atoms").replaceChildren(...Object.entries(reading).map(([cell, tokens]) => {
    const card = element("section", ""), list = element("ul", ""), here = tokens[at];
    [card.className, list.className, list.id] = ["card", "meter", `atoms-${cell}`];
    meter(list, here.slice(0, 20).map(([name, value]) => ({ name, value, shown: String(value) })));
    card.append(element("h3", cell), here.length ? list : element("p", "No atom fires here."));
    return card;
  }));
  return (part("at").textContent = `${at}, ${memory.tokens[at]}`);
}

form.addEventListener("submit", (event) => { event.preventDefault(); readText(); });
form.addEventListener("input", showTyped);
addEventListener("hashchange", () => readText(fromAddress()));
part("ask").addEventListener("submit", (event) => { event.preventDefault(); explain(); });
part("take").addEventListener("click", () => take(marked));
part("restore").addEventListener("click", () => { for (const each of changes) each.now = undefined; change({}, undefined); });
part("ask-reader").addEventListener("click", () => askReader(false));
part("ask-back").addEventListener("click", () => askReader(true));
readText(fromAddress());
