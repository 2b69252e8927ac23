"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const rows = report.modules.filter((row) => row.matrix);
const root = document.documentElement;
const $ = (selector) => document.querySelector(selector);
const INKS = {
  light: ["#2457d6", "#d9822b", "#1f8a55", "#b03a8c", "#6b57d2", "#0e8a9c", "#a8741a", "#c8322b", "#5b6b86", "#7a9a01"],
  dark: ["#82a9ff", "#ffb066", "#62d19b", "#f08ccb", "#b3a5ff", "#5fd0e0", "#e0b25a", "#ff8f85", "#a9b6cc", "#c0dc55"],
};
const RAMPS = {  // from nothing to much, in equal steps of lightness
  light: ["#f2f5fa", "#d3dff6", "#a9c2f0", "#7aa0e6", "#4a7bd8", "#2457c4", "#173d94"],
  dark: ["#1c2430", "#233657", "#2a4a82", "#3463b0", "#4a80d6", "#74a5ee", "#b3d0ff"],
};

// -- small tools --------------------------------------------------------------------------------------------------
const svg = (name, attributes = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const html = (name, text = "", className = "") => {
  const node = document.createElement(name);
  node.textContent = text;
  if (className) node.className = className;
  return node;
};
const short = (x) => {
  if (x === null || x === undefined) return "–";
  if (typeof x === "boolean") return x ? "yes" : "no";
  if (typeof x !== "number") return Array.isArray(x) ? x.join(", ") : String(x);
  if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x);
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
};
const words = (figure) => figure.replaceAll("_", " ");
const theme = () => root.dataset.theme;
const mixed = (a, b, t) => "#" + [1, 3, 5].map((i) => {
  const [from, to] = [a, b].map((colour) => parseInt(colour.slice(i, i + 2), 16));
  return Math.round(from + (to - from) * t).toString(16).padStart(2, "0");
}).join("");
const ramp = (t) => {
  const stops = RAMPS[theme()], place = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
  return mixed(stops[i], stops[i + 1], place - i);
};
const natural = new Intl.Collator("en", { numeric: true }).compare;
const commonPrefix = (names) => {
  if (names.length < 2) return "";
  const parts = names.map((name) => name.split("."));
  let n = 0;
  while (n < Math.min(...parts.map((p) => p.length)) - 1 && parts.every((p) => p[n] === parts[0][n])) n++;
  return n ? parts[0].slice(0, n).join(".") + "." : "";
};
const prefix = commonPrefix(rows.map((row) => row.name));
const named = (row) => row.name.slice(prefix.length).replace(/\.weight$/, "");
const layers = [...new Set(rows.map((row) => row.layer))].sort(natural);
const layerPrefix = commonPrefix(layers.filter((layer) => layer));
const projections = [...new Set(rows.map((row) => row.projection))].sort(natural);
const ink = (projection) => INKS[theme()][Math.max(0, projections.indexOf(projection)) % INKS.light.length];
const faint = Math.min(0.6, 0.25 + 6 / rows.length);  // many lines, thin lines

const tip = $("#tip");
const telling = (node, text) => {
  node.addEventListener("mousemove", (event) => {
    tip.textContent = text;
    tip.style.opacity = 1;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  node.addEventListener("mouseleave", () => { tip.style.opacity = 0; });
  return node;
};

// -- charts -------------------------------------------------------------------------------------------------------
const ticks = (low, high, count = 5) => {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-9; x += step) found.push(Number(x.toPrecision(12)));
  return found;
};
const decades = (low, high) => {
  const found = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.log10(high) + 1e-9; e++) found.push(10 ** e);
  return found.length > 1 ? found.filter((_, i) => i % Math.ceil(found.length / 7) === 0) : ticks(low, high, 4).filter((x) => x > 0);
};

/** Lines {points: [[x, y]], colour, label, width, dash} on axes; logarithmic y if asked. */
const chart = (lines, { x = "", y = "", log = false, from = null, to = null, xTicks = null, xNames = null, whole = false, span = null, size = [560, 270] } = {}) => {
  const [W, H, L, R, T, B] = [...size, 52, 14, 10, 38];
  const all = lines.flatMap((line) => line.points).filter(([, v]) => v !== null && (!log || v > 0));
  if (!all.length) return html("p", "Nothing to draw.", "quiet");
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const [x0, x1] = span ?? [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [from ?? Math.min(...ys), to ?? Math.max(...ys)];
  if (log) { y0 = Math.max(y0, y1 * 1e-8); if (y0 === y1) { y0 /= 2; y1 *= 2; } } else if (y0 === y1) { y1 = y0 + 1; }
  const px = (v) => L + (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5) * (W - L - R);
  const scaled = (v) => log ? Math.log(Math.max(v, y0) / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0);
  const py = (v) => H - B - scaled(v) * (H - T - B);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${y} against ${x}` });
  for (const v of log ? decades(y0, y1) : ticks(y0, y1)) {
    picture.append(svg("line", { class: "rule", x1: L, x2: W - R, y1: py(v), y2: py(v) }),
      svg("text", { x: L - 8, y: py(v) + 4, "text-anchor": "end" }, short(v)));
  }
  for (const v of xTicks ?? ticks(x0, x1, 7).filter((t) => !whole || Number.isInteger(t)))
    picture.append(svg("text", { x: px(v), y: H - B + 18, "text-anchor": "middle" }, xNames ? xNames[v] : short(v)));
  picture.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }),
    svg("text", { x: (L + W - R) / 2, y: H - 3, "text-anchor": "middle" }, x));
  for (const line of lines) {
    const points = line.points.filter(([, v]) => v !== null && (!log || v > 0)).map(([a, b]) => [px(a), py(b)]);
    if (!points.length) continue;
    const style = { fill: "none", stroke: line.colour, "stroke-width": line.width ?? 1.2, "stroke-opacity": line.opacity ?? faint, "stroke-linejoin": "round", "stroke-dasharray": line.dash ?? "none" };
    const shape = points.length > 1 ? svg("polyline", { points: points.map((p) => p.map((c) => c.toFixed(1)).join(",")).join(" "), ...style })
      : svg("circle", { cx: points[0][0], cy: points[0][1], r: 3, fill: line.colour, "fill-opacity": 0.7 });
    picture.append(shape);
    const catcher = shape.cloneNode();
    catcher.setAttribute("stroke-width", 9);
    catcher.setAttribute("stroke-opacity", 0);
    catcher.addEventListener("mouseenter", () => { shape.setAttribute("stroke-width", 3); shape.setAttribute("stroke-opacity", 1); });
    catcher.addEventListener("mouseleave", () => { shape.setAttribute("stroke-width", style["stroke-width"]); shape.setAttribute("stroke-opacity", style["stroke-opacity"]); });
    picture.append(telling(catcher, line.label));
    if (line.dots) for (const [a, b] of points) picture.append(svg("circle", { cx: a, cy: b, r: 3.5, fill: line.colour }));
  }
  return picture;
};

const legend = (entries) => {
  const box = html("p", "", "quiet");
  for (const [name, colour] of entries) {
    const mark = html("span", "● ");
    mark.style.color = colour;
    box.append(mark, `${name}   `);
  }
  return box;
};

/** A table of coloured cells: value(row, column) -> {t in 0..1, text, label, alarm} or null. */
const heat = (down, across, value, { names = (x) => x, heads = (x) => x, cell = 26, fill = ramp, numbers = true } = {}) => {
  const L = 12 + Math.max(...down.map((d) => names(d).length), 4) * 6.6;
  const head = Math.max(...across.map((a) => String(heads(a)).length)) > 4 ? 96 : 22;
  const width = across.length * 62 + L > 1180 || head === 22 ? Math.max(26, Math.min(62, (1180 - L) / across.length)) : Math.min(120, (1180 - L) / across.length);
  const W = L + across.length * width + 8, H = head + down.length * cell + 6;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  picture.style.maxWidth = `${W * 1.05}px`;
  across.forEach((column, i) => {
    const [x, y] = [L + (i + 0.5) * width, head - 8];
    const turned = head > 30;
    picture.append(svg("text", { x, y, "text-anchor": turned ? "start" : "middle", transform: turned ? `rotate(-38 ${x} ${y})` : "" }, String(heads(column))));
  });
  down.forEach((row, j) => {
    picture.append(svg("text", { x: L - 8, y: head + (j + 0.5) * cell + 4, "text-anchor": "end" }, names(row)));
    across.forEach((column, i) => {
      const found = value(row, column);
      if (!found) return;
      const box = svg("rect", { x: L + i * width + 1, y: head + j * cell + 1, width: width - 2, height: cell - 2, rx: 4, fill: found.fill ?? fill(found.t) });
      picture.append(box);
      if (numbers && width > 34) {
        const pale = theme() === "light" ? found.t < 0.55 : found.t > 0.75;
        picture.append(svg("text", { x: L + (i + 0.5) * width, y: head + (j + 0.5) * cell + 4, "text-anchor": "middle", "pointer-events": "none", style: `fill:${found.ink ?? (pale ? "#1b2330" : "#ffffff")}` }, found.text));
      }
      telling(box, found.label);
    });
  });
  const box = html("div", "", "scrolling");
  box.append(picture);
  return box;
};

// -- sections -----------------------------------------------------------------------------------------------------
const verdict = () => {
  $("#title").textContent = report.title;
  document.title = report.title;
  const base = report.request.base ? `against ${report.request.base}` : "without a base";
  $("#source").textContent = `${report.inputs.map((i) => i.path).filter(Boolean).join(", ")} ${base}`;
  $("#verdict ul").append(...report.summary.map((line) => html("li", line)));
  const total = report.total;
  const shown = [
    [total.modules, "updated matrices"], [total.relative_norm, "of the base's norm", (x) => short(100 * x) + "%"],
    [total.frobenius_norm, "Frobenius norm"], [total.effective_rank, "effective rank, mean"], [total.stable_rank, "stable rank, mean"],
    [total.intruders, "intruder dimensions"], [total.attention_ratio, "attention bound, at most", (x) => "×" + short(x)],
    [total.nonfinite, "values not finite"], [(total.dead_components ?? 0) + (total.duplicate_components ?? 0), "dead or duplicated channels"],
  ];
  for (const [value, label, text = short] of shown) {
    if (value === undefined || value === null) continue;
    const card = html("div", "", "card");
    card.append(html("b", text(value)), html("span", label));
    $("#cards").append(card);
  }
  if (report.checks.length) {
    $("#checks").hidden = false;
    $("#checks ul").append(...report.checks.map((c) => html("li", `${c.ok ? "holds" : "fails"}: ${c.expr} (value ${short(c.value)}${c.module ? " in " + c.module : ""})`, c.ok ? "ok" : "bad")));
  }
  const warnings = report.warnings.length ? ` Warnings: ${report.warnings.join("; ")}.` : "";
  $("#foot").textContent = `loratools ${report.loratools}, ${report.schema}.${warnings}`;
};

const MAPPED = ["share", "relative_norm", "frobenius_norm", "spectral_norm", "effective_rank", "stable_rank", "numerical_rank", "intruders", "overlap_left", "overlap_right", "relative_spectral_norm", "attention_ratio", "balance", "condition_b", "condition_a", "dead_components", "duplicate_components", "nonfinite", "moved", "aurac_log2"];
const map = () => {
  const box = $("#map"), select = box.querySelector("select");
  const present = MAPPED.filter((f) => rows.some((row) => typeof row[f] === "number"));
  if (!select.options.length) {
    for (const figure of present) select.append(new Option(words(figure), figure));
    select.addEventListener("change", map);
  }
  const figure = select.value, values = rows.map((row) => row[figure]).filter((v) => v !== null && v !== undefined);
  const most = Math.max(...values), least = Math.min(0, ...values);
  const at = new Map(rows.map((row) => [row.layer + "\n" + row.projection, row]));
  box.querySelector(".meaning").textContent = report.units[figure] ?? "";
  const value = (layer, projection) => {
    const row = at.get(layer + "\n" + projection), v = row?.[figure];
    return v === null || v === undefined ? null : { t: most > least ? (v - least) / (most - least) : 0, text: figure === "share" ? short(100 * v) + "%" : short(v), label: `${row.name}\n${words(figure)}: ${short(v)}` };
  };
  box.querySelector(".draw").replaceChildren(heat(layers, projections, value, { names: (l) => l.slice(layerPrefix.length) || "–", cell: layers.length > 24 ? 20 : 26 }));
};

const spectra = () => {
  const lines = rows.filter((r) => r.singular_values?.length).map((row) => ({ points: row.singular_values.map((s, i) => [i + 1, s]), colour: ink(row.projection), label: named(row) }));
  $("#spectra .draw").replaceChildren(chart(lines, { x: "index", y: "singular value", log: true, whole: true }), legend(projections.map((p) => [p, ink(p)])));
  const curves = rows.filter((r) => r.energy?.length && r.frobenius_norm > 0);
  const longest = Math.max(0, ...curves.map((r) => r.energy.length));
  const mean = Array.from({ length: longest }, (_, i) => [i + 1, curves.reduce((sum, r) => sum + (r.energy[i] ?? 1), 0) / curves.length]);
  const all = curves.map((row) => ({ points: row.energy.map((e, i) => [i + 1, e]), colour: ink(row.projection), label: named(row) }));
  if (mean.length) all.push({ points: mean, colour: getComputedStyle(root).getPropertyValue("--ink"), width: 2.6, opacity: 1, label: "mean over modules" });
  for (const e of [0.9, 0.99]) if (longest > 1) all.push({ points: [[1, e], [longest, e]], colour: getComputedStyle(root).getPropertyValue("--quiet"), dash: "3 4", opacity: 0.9, label: `${100 * e}% of the energy` });
  $("#energy .draw").replaceChildren(chart(all, { x: "rank", y: "energy", whole: true, from: Math.min(0.5, ...curves.map((r) => r.energy[0])), to: 1 }));
};

const intruders = () => {
  const judged = rows.filter((row) => row.max_cosine_upper).sort((a, b) => natural(a.name, b.name));
  if (!judged.length) return;
  for (const id of ["#intruders", "#curve"]) $(id).hidden = false;
  const { eps, k } = report.request, positions = Array.from({ length: k }, (_, i) => i);
  $("#intruders p").textContent = `The ${k} leading left singular vectors of base plus update, by size. Colour: the largest cosine with any left singular vector of the base (upper bound); red: below ${eps}, an intruder.`;
  const alarm = theme() === "light" ? ["#f7c9c4", "#c8322b"] : ["#a8453d", "#ff8f85"];
  const calm = theme() === "light" ? ["#7aa0e6", "#eef2f9"] : ["#3f68ad", "#1f2836"];
  const value = (row, j) => {
    const upper = row.max_cosine_upper[j];
    if (upper === undefined) return null;
    const hit = row.intruder_index.includes(j + 1), lower = row.max_cosine_lower[j];
    const fill = hit ? mixed(alarm[0], alarm[1], Math.min(1, (eps - Math.min(upper, eps)) / eps)) : mixed(calm[0], calm[1], Math.min(1, Math.max(0, (upper - eps) / (1 - eps))));
    const dark = theme() === "dark" ? !hit : hit && upper < eps / 2;
    return { t: upper, fill, ink: dark ? "#ffffff" : "#1b2330", text: upper.toFixed(2), label: `${row.name}\ndirection ${j + 1}, singular value ${short(row.tuned_singular_values?.[j])}\nlargest cosine between ${lower.toFixed(3)} and ${upper.toFixed(3)}${hit ? "\nintruder" : ""}${row.certain ? "" : "\nnot proven"}` };
  };
  $("#intruders .draw").replaceChildren(heat(judged, positions, value, { names: named, heads: (j) => j + 1, cell: judged.length > 40 ? 16 : 22, numbers: judged.length <= 40 }));
  const grid = judged[0].intruder_curve.map((p) => p.eps);
  const sums = (key) => grid.map((e, i) => [e, judged.reduce((sum, row) => sum + row.intruder_curve[i][key], 0)]);
  const tone = getComputedStyle(root).getPropertyValue("--alarm");
  $("#curve .draw").replaceChildren(chart([
    { points: sums("at_most"), colour: tone, dash: "4 4", width: 1.6, opacity: 0.9, label: "at most" },
    { points: sums("at_least"), colour: tone, width: 2.4, opacity: 1, label: "proven", dots: true },
  ], { x: "threshold ε", y: "intruders", from: 0, xTicks: grid }));
};

const attention = () => {
  if (!report.attention?.length) return;
  $("#attention").hidden = false;
  const sites = [...report.attention].sort((a, b) => natural(a.layer, b.layer));
  const lead = commonPrefix(sites.map((s) => s.layer)), heads = Math.max(...sites.map((s) => s.ratios.length));
  const far = Math.max(1.05, ...sites.flatMap((s) => s.ratios));
  const value = (site, h) => site.ratios[h] === undefined ? null : { t: Math.max(0, (site.ratios[h] - 1) / (far - 1)), text: short(site.ratios[h]), label: `${site.layer}, head ${h}\nbound ${short(site.before[h])} → ${short(site.after[h])}\nratio ${short(site.ratios[h])}` };
  $("#attention .draw").replaceChildren(heat(sites, Array.from({ length: heads }, (_, h) => h), value, { names: (s) => s.layer.slice(lead.length), cell: 22 }));
};

const ranks = () => {
  const curved = rows.filter((row) => row.prefix_error);
  if (!curved.length) return;
  $("#ranks").hidden = false;
  const mean = (key) => Array.from({ length: Math.max(...curved.map((r) => r[key].length)) }, (_, i) => [i + 1, curved.reduce((sum, r) => sum + (r[key][i] ?? 0), 0) / curved.length]);
  const tone = getComputedStyle(root).getPropertyValue("--accent");
  $("#ranks .draw").replaceChildren(chart([
    { points: mean("prefix_error"), colour: tone, width: 2.2, opacity: 1, label: "leading channels" },
    { points: mean("optimal_error"), colour: tone, width: 2, opacity: 0.8, dash: "5 4", label: "best possible" },
  ], { x: "rank", y: "relative error", from: 0, whole: true }));
};

const history = () => {
  if (!report.history) return;
  $("#history").hidden = false;
  const steps = report.history, ticked = steps.map((_, i) => i);
  const places = steps.map((s, i) => {
    const parts = (s.path ?? String(i + 1)).split("/").filter((p) => !/^adapter_model|^model\./.test(p));
    return (parts[parts.length - 1] ?? String(i + 1)).match(/\d+(?=\D*$)/)?.[0] ?? parts[parts.length - 1];
  });
  $("#history p").textContent = `${steps.length} checkpoints, in the order given: one line per module; bold: the whole adapter, where one number can stand for it.`;
  const box = $("#history .draw");
  box.replaceChildren();
  for (const figure of ["frobenius_norm", "spectral_norm", "effective_rank", "stable_rank", "relative_norm", "intruders", "moved"]) {
    if (!steps.some((s) => s.modules.some((m) => typeof m[figure] === "number"))) continue;
    const lines = steps[0].modules.map((m, j) => ({ points: steps.map((s, i) => [i, s.modules[j][figure] ?? null]), colour: ink(rows.find((r) => r.name === m.name)?.projection), label: m.name.slice(prefix.length) }));
    if (steps.some((s) => typeof s.total[figure] === "number") && ["effective_rank", "stable_rank", "relative_norm"].includes(figure))
      lines.push({ points: steps.map((s, i) => [i, s.total[figure] ?? null]), colour: getComputedStyle(root).getPropertyValue("--ink"), width: 2.6, opacity: 1, label: "total" });
    const panel = html("div");
    panel.append(html("p", words(figure)), chart(lines, { x: "checkpoint", y: figure, xTicks: ticked, xNames: places, from: figure === "intruders" || figure === "moved" ? 0 : null, span: [0, steps.length - 1], size: [380, 230] }));
    box.append(panel);
  }
};

const COLUMNS = ["rank", "share", "relative_norm", "frobenius_norm", "spectral_norm", "effective_rank", "stable_rank", "balance", "intruders", "intruder_index", "overlap_left", "overlap_right", "attention_ratio", "nonfinite"];
let order = ["name", 1];
const table = () => {
  const columns = ["name", ...COLUMNS.filter((c) => rows.some((row) => row[c] !== null && row[c] !== undefined))];
  const [by, sign] = order;
  const sorted = [...rows].sort((a, b) => sign * (typeof a[by] === "number" || typeof b[by] === "number" ? (a[by] ?? -1) - (b[by] ?? -1) : natural(String(a[by]), String(b[by]))));
  const body = html("table"), head = html("tr");
  for (const column of columns) {
    const cell = html("th", (column === "name" ? (prefix ? prefix + "…" : "module") : words(column)) + (by === column ? (sign > 0 ? " ↑" : " ↓") : ""));
    cell.title = report.units[column] ?? "";
    cell.addEventListener("click", () => { order = [column, by === column ? -sign : column === "name" ? 1 : -1]; table(); });
    head.append(cell);
  }
  body.append(head);
  for (const row of sorted) {
    const line = html("tr");
    for (const column of columns) {
      const hit = (column === "intruders" && row.intruders > 0) || (column === "nonfinite" && row.nonfinite > 0);
      line.append(html("td", column === "name" ? named(row) : column === "share" ? short(100 * row.share) + "%" : short(row[column]), hit ? "hit" : ""));
    }
    body.append(line);
  }
  $("#table .scroll").replaceChildren(body);
};

const draw = () => { if (rows.length) { map(); spectra(); intruders(); attention(); ranks(); history(); table(); } else for (const id of ["#map", "#spectra", "#energy", "#table"]) $(id).hidden = true; };
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
$("#theme").addEventListener("click", () => { root.dataset.theme = theme() === "dark" ? "light" : "dark"; draw(); });
verdict();
draw();
