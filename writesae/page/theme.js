"use strict";
{ // Light or dark: as the system says, until the button says otherwise. A browser may refuse storage to local files.
  const dark = document.getElementById("dark"), button = document.getElementById("theme");
  const paint = (on) => { dark.media = on ? "screen" : "not all"; button.textContent = on ? "Light" : "Dark"; };
  let saved = null;
  try { saved = localStorage.getItem("theme"); } catch { /* not saved */ }
  paint(saved ? saved === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  button.addEventListener("click", () => {
    const on = dark.media !== "screen";
    paint(on);
    try { localStorage.setItem("theme", on ? "dark" : "light"); } catch { /* not saved */ }
  });
}
