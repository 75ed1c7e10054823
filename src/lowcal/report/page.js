"use strict";
// Sorts the table, hides methods, and shows the value under the mouse. Without it the page shows everything.
const table = document.querySelector("tbody"), rows = [...table.rows], hidden = new Set();
const nameOf = series => rows.find(row => row.dataset.series === series).cells[0].textContent;
const make = (tag, parent, properties) => parent.appendChild(Object.assign(document.createElement(tag), properties));

make("span", document.querySelector(".filter"), { textContent: "A click on a heading sorts." });
const heads = [...document.querySelectorAll("thead th")];
heads.forEach((head, column) => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
  head.replaceChildren(button);
  button.onclick = () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const value = row => row.cells[column].dataset.value;
    const isUnknown = row => value(row) === "";
    rows.sort((a, b) => isUnknown(a) - isUnknown(b) || sign * (value(a) - value(b)));
    table.append(...rows);
  };
});

if (rows.length > 1) {
  const filter = document.querySelector(".filter");
  for (const row of rows) {
    const label = make("label", filter, {}), series = row.dataset.series;
    const box = make("input", label, { type: "checkbox", checked: true });
    label.append(" " + nameOf(series));
    box.onchange = () => {
      hidden[box.checked ? "delete" : "add"](series);
      row.hidden = !box.checked;
      for (const line of document.querySelectorAll(`svg [id*="-series-${series}-"]`)) {
        line.style.display = box.checked ? "" : "none";
      }
    };
  }
}

for (const figure of document.querySelectorAll("figure")) {
  const plot = JSON.parse(figure.dataset.plot), svg = figure.querySelector("svg");
  const tip = make("div", figure, { className: "tip", hidden: true });
  const [left, top, right, bottom] = plot.box, scale = plot.log ? Math.log : Number;
  const across = x => left + (right - left) * (x - plot.x[0]) / (plot.x[1] - plot.x[0]);
  const [low, high] = plot.y.map(scale);
  const down = y => bottom - (bottom - top) * (scale(y) - low) / (high - low);
  svg.onpointerleave = () => { tip.hidden = true; };
  svg.onpointermove = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = { distance: 40 };
    for (const [series, points] of Object.entries(plot.series)) {
      if (hidden.has(series)) continue;
      points.forEach(([x, y], epoch) => {
        const distance = y === null ? Infinity : Math.hypot(across(x) - at.x, down(y) - at.y);
        if (distance < best.distance) best = { distance, series, x, y, epoch };
      });
    }
    tip.hidden = !best.series;
    if (tip.hidden) return;
    const [unit, measure] = plot.units, time = unit ? `, ${best.x} ${unit}` : "";
    tip.textContent = `${nameOf(best.series)}, epoch ${best.epoch + 1}${time}: ${best.y} ${measure}`;
    const { width, height } = svg.viewBox.baseVal, size = svg.getBoundingClientRect();
    const place = across(best.x) / width * size.width;
    tip.style.left = `${Math.max(0, Math.min(place, size.width - tip.offsetWidth))}px`;
    tip.style.top = `${down(best.y) / height * size.height - tip.offsetHeight - 8}px`;
  };
}
