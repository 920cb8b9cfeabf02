// Lines and areas over the last minutes, drawn as SVG. No text from clients is used here.
const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function canvas(width, height) {
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
}

// A line breaks where a value is unknown; a stepped line changes only at its samples.
function path(values, width, y, isStepped = false) {
  const step = width / Math.max(1, values.length - 1);
  let drawn = "", isDown = false;
  values.forEach((value, index) => {
    if (value === null) { isDown = false; return; }
    const x = (index * step).toFixed(1);
    if (isDown && isStepped) drawn += `H${x}`;
    drawn += `${isDown ? "L" : "M"}${x} ${y(value).toFixed(1)}`;
    isDown = true;
  });
  return drawn;
}

function round(most) {
  if (most <= 4) return 4;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 3, 4, 5, 6, 8, 10].map(each => each * power).find(each => each >= most);
}

export function spark(holder, values, colour) {
  const width = 200, height = 30, most = Math.max(1, ...values);
  const y = value => height - 2 - (value / most) * (height - 5);
  const svg = canvas(width, height);
  const line = path(values, width, y);
  if (line) {
    svg.append(shape("path", { d: `${line}L${width} ${height}L0 ${height}Z`, fill: colour, opacity: .14 }));
    svg.append(shape("path", { d: line, fill: "none", stroke: colour, "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" }));
  }
  holder.replaceChildren(svg);
}

// series: [{values, colour, isArea, isDashed, isStepped}], areas stacked; times: seconds since 1970.
export function chart(holder, times, series) {
  const width = 600, height = 150;
  const sums = times.map((_, index) => series.filter(each => each.isArea).reduce((sum, each) => sum + (each.values[index] ?? 0), 0));
  const lines = series.filter(each => !each.isArea).flatMap(each => each.values).filter(value => value !== null);
  const most = round(Math.max(1, ...sums, ...lines));
  const y = value => height - (value / most) * height;
  const svg = canvas(width, height);
  for (const part of [0, .5, 1]) svg.append(shape("path", { d: `M0 ${y(part * most)}H${width}`, stroke: "var(--line)", "vector-effect": "non-scaling-stroke" }));
  const floor = times.map(() => 0);
  for (const each of series.filter(each => each.isArea)) {
    const bottom = [...floor];
    each.values.forEach((value, index) => { floor[index] += value ?? 0; });
    const back = path([...bottom].reverse(), width, y).replaceAll(/[ML]([\d.]+) /g, (_, x) => `L${(width - Number(x)).toFixed(1)} `);
    const top = path(floor, width, y);
    if (!top) continue;
    svg.append(shape("path", { d: `${top}${back}Z`, fill: each.colour, opacity: .3 }));
    svg.append(shape("path", { d: top, fill: "none", stroke: each.colour, "stroke-width": 1.6, "vector-effect": "non-scaling-stroke" }));
  }
  for (const each of series.filter(each => !each.isArea)) {
    svg.append(shape("path", { d: path(each.values, width, y, each.isStepped), fill: "none", stroke: each.colour, "stroke-width": 2, "vector-effect": "non-scaling-stroke", ...(each.isDashed ? { "stroke-dasharray": "6 4" } : {}) }));
  }
  const labels = [0, .5, 1].map(part => label("y", String(part * most), "top", `calc((100% - 18px) * ${1 - part})`));
  const spots = times.length > 1 ? [0, .5, 1] : [];
  for (const part of spots) {
    const at = new Date(times[Math.round(part * (times.length - 1))] * 1000);
    labels.push(label("x", at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false }), "left", `calc(36px + (100% - 36px) * ${part})`));
  }
  holder.replaceChildren(svg, ...labels);
}

function label(kind, text, side, place) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = text;
  element.style[side] = place;
  return element;
}
