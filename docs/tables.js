// Tables inside <div class="sorted">: a box that filters rows, and headings that sort by their column.
document.querySelectorAll("div.sorted").forEach((box) => {
  const body = box.querySelector("tbody"), rows = [...body.rows];
  const filter = document.createElement("input"), count = document.createElement("span");
  filter.type = "search";
  filter.placeholder = "filter: embedded holds";
  filter.setAttribute("aria-label", "rows that contain all of these words");
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    const seen = rows.filter((row) => {
      const text = row.textContent.toLowerCase();
      return !(row.hidden = !words.every((word) => text.includes(word)));
    });
    count.textContent = `${seen.length} of ${rows.length} rows`;
  };
  const bar = document.createElement("p");
  bar.append(filter, " ", count);
  box.before(bar);
  filter.addEventListener("input", show);
  show();

  // The first number of a cell, else its text.
  const value = (row, n) => {
    const text = row.cells[n].textContent.trim(), number = text.match(/-?\d+(\.\d+)?/);
    return number && /^\D{0,12}-?\d/.test(text) ? parseFloat(number[0]) : text;
  };
  box.querySelectorAll("th").forEach((th, n) => {
    const button = document.createElement("button");
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      const down = th.getAttribute("aria-sort") === "ascending";
      box.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => {
        const [x, y] = [value(a, n), value(b, n)];
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // numbers stand before words
        return (typeof x === "number" ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
      };
      body.append(...[...rows].sort(order));
    });
  });
});
