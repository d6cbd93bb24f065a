"use strict";
// Small parts: elements, numbers as text, ticks, scales.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function trimmed(text) {
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text;
}

// 1234567 -> 1.23M; used for counts and axes.
function amount(value, digits = 3) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= limit) return trimmed((value / limit).toPrecision(Math.max(digits, 3))) + letter;
  }
  if (size !== 0 && size < 1e-3) return value.toExponential(Math.max(digits - 1, 1)).replace(/\.?0+e/, "e");
  return trimmed(value.toPrecision(digits));
}

function exact(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return trimmed((100 * value).toPrecision(4)) + " %";
  const text = Number.isInteger(value) && Math.abs(value) < 1e15 ? value.toLocaleString("en-US") : trimmed(value.toPrecision(6));
  return unit ? text + " " + unit : text;
}

function duration(hours) {
  if (hours === null || hours === undefined) return "–";
  const minutes = Math.round(hours * 60);
  if (minutes < 1) return Math.round(hours * 3600) + " s";
  if (minutes < 120) return minutes + " min";
  return hours < 72 ? trimmed(hours.toFixed(1)) + " h" : trimmed((hours / 24).toFixed(1)) + " d";
}

// Round numbers that divide an interval into about `count` parts.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of high / low > 1000 ? [1] : high / low > 30 ? [1, 3] : [1, 2, 5]) found.push(m * 10 ** e);
  }
  const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
  return inside.length >= 2 ? inside : ticks(low, high, 4).filter((v) => v > 0);
}

function scale(domain, range, log) {
  const f = log ? Math.log : (v) => v;
  const [a, b] = domain.map(f);
  const factor = b > a ? (range[1] - range[0]) / (b - a) : 0;
  const middle = b > a ? 0 : (range[1] - range[0]) / 2;
  const forward = (v) => range[0] + middle + (f(v) - a) * factor;
  forward.back = (p) => (factor ? (log ? Math.exp : (v) => v)(a + (p - range[0]) / factor) : domain[0]);
  return forward;
}

// The place in a rising list that is nearest to a value.
function nearest(list, value) {
  let low = 0;
  let high = list.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - list[low - 1] < list[low] - value ? low - 1 : low;
}

// Put a tip beside a point of a figure, inside the window.
function placeTip(tip, figure, x, y) {
  tip.style.visibility = "visible";
  const right = x + 14 + tip.offsetWidth < figure.clientWidth;
  tip.style.left = Math.max(0, right ? x + 14 : x - 14 - tip.offsetWidth) + "px";
  tip.style.top = Math.max(0, y - tip.offsetHeight / 2) + "px";
}
