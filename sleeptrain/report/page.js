"use strict";
// Shows the nearest point of a panel's curves at the pointer, or the one chosen by the arrow keys.
const SVG = "http://www.w3.org/2000/svg";

function text(value, unit) {
  if (unit === "%") return value.toFixed(1) + " %";
  return Math.abs(value) >= 1e9 ? value.toExponential(3) : Number(value.toPrecision(5)).toLocaleString("en", {maximumSignificantDigits: 7});
}

function placed([name, xs, ys, unit, [left, top, right, bottom, x0, x1, y0, y1]]) {
  const points = xs.map((x, i) => ({x, y: ys[i], left: left + (x - x0) / (x1 - x0) * (right - left),
    top: bottom - (ys[i] - y0) / (y1 - y0) * (bottom - top)}));
  const inside = points.filter(p => p.left >= left - 1 && p.left <= right + 1 && p.top >= top - 1 && p.top <= bottom + 1);
  return {name, unit, points: inside};
}

function attach(panel) {
  const data = JSON.parse(panel.querySelector("script").textContent);
  const curves = data.curves.map(placed).filter(curve => curve.points.length);
  const svg = panel.querySelector("svg"), tip = panel.querySelector(".tip"), mark = document.createElementNS(SVG, "circle");
  if (!curves.length) { panel.removeAttribute("tabindex"); return; }
  mark.setAttribute("class", "mark");
  mark.setAttribute("r", 5);
  let chosen = 0, index = curves[0].points.length - 1;

  function show() {
    const curve = curves[chosen], point = curve.points[index], name = document.createElement("b");
    const at = data.names[point.x] === undefined ? text(point.x, "") : data.names[point.x];
    name.textContent = curve.name;
    tip.replaceChildren(name, `${data.x} ${at}: ${text(point.y, curve.unit)}`);
    mark.setAttribute("cx", point.left);
    mark.setAttribute("cy", point.top);
    svg.append(mark);
    const view = svg.viewBox.baseVal, scale = svg.clientWidth / view.width;
    const left = (point.left - view.x) * scale, top = svg.offsetTop + (point.top - view.y) * scale;
    tip.style.left = "0px";  // at its full width, to be measured
    tip.style.left = Math.max(0, Math.min(left + 10, panel.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = (top > tip.offsetHeight + 12 ? top - tip.offsetHeight - 10 : top + 12) + "px";
  }

  function hide() {
    tip.replaceChildren();
    mark.remove();
  }

  function nearest(event) {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal, scale = view.width / box.width;
    const left = view.x + (event.clientX - box.left) * scale, top = view.y + (event.clientY - box.top) * scale;
    let least = Infinity;
    curves.forEach((curve, c) => curve.points.forEach((point, p) => {
      const distance = Math.hypot(point.left - left, point.top - top);
      if (distance < least) [least, chosen, index] = [distance, c, p];
    }));
    show();
  }

  const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

  function choose(event) {
    if (event.key === "Escape") hide();
    if (!moves[event.key]) return;
    event.preventDefault();
    const [along, across] = moves[event.key], x = curves[chosen].points[index].left;
    chosen = (chosen + across + curves.length) % curves.length;
    const points = curves[chosen].points;
    if (across) index = points.reduce((best, p, i) => Math.abs(p.left - x) < Math.abs(points[best].left - x) ? i : best, 0);
    index = Math.max(0, Math.min(points.length - 1, index + along));
    show();
  }

  panel.addEventListener("pointermove", nearest);
  panel.addEventListener("pointerdown", nearest);
  panel.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  panel.addEventListener("focus", () => { if (panel.matches(":focus-visible")) show(); });
  panel.addEventListener("blur", hide);
  panel.addEventListener("keydown", choose);
}

document.querySelectorAll(".panel").forEach(attach);
