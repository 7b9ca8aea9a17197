// SPDX-License-Identifier: MIT
// The page of view.py: draws the JSON of #data, whose fields that file's docstring explains.
"use strict";

const GROUP = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"];  // Okabe and Ito's
const CIVIDIS = ["00224e", "1a386f", "434e6c", "61656f", "7d7c78", "9b9476", "bcae6c", "dec958", "fee838"];
const now = { token: 0, layer: 0, head: 0, moe: 0, colour: "group", whole: false };
const page = {};  // elements that are drawn again
let data, model, sources, state, text, T;  // data: as in the page, but arrays are functions

// ---- Small tools ----
function el(tag, attributes = {}, ...children) {
  const drawn = ["svg", "path", "text"].includes(tag);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// A canvas as sharp as the screen is, its pen, and where on it an event happens.
function drawing(width, height, label) {
  const sharp = devicePixelRatio || 1, style = `width:${width}px`;
  const canvas = el("canvas", { width: width * sharp, height: height * sharp, role: "img", "aria-label": label, style });
  const pen = canvas.getContext("2d");
  pen.scale(sharp, sharp);
  const at = event => [event.offsetX, event.offsetY].map(offset => offset * width / canvas.clientWidth);
  return { canvas, pen, at };
}

// The data with functions of their indices for arrays; `inflate` stands in the page.
async function unpack(value) {
  if (Array.isArray(value)) return Promise.all(value.map(unpack));
  if (!value || typeof value !== "object") return value;
  const { shape, type, offset, scale, power } = value;
  if (!type) return Object.fromEntries(await Promise.all(Object.entries(value).map(async ([key, of]) => [key, await unpack(of)])));
  const whole = new { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array }[type](await inflate(value.data).arrayBuffer());
  const get = (...where) => {
    let place = 0;
    for (let axis = 0; axis < where.length; axis++) place = place * shape[axis] + where[axis];
    return (offset + scale * whole[place]) ** power;
  };
  return Object.assign(get, { shape });
}

const range = count => [...Array(count).keys()];
const percent = share => `${(100 * share).toFixed(share >= 0.0995 ? 0 : 1)} %`;
const groupOf = expert => Math.floor(expert / (model.experts / model.groups));
const colourOf = expert => GROUP[(model.groups > 1 ? groupOf(expert) : expert) % 8];
const label = s => sources[s].name.replace("-", " ").replace("mtp", "MTP");
const piece = place => data.vocabulary.pieces[place];
const id = place => data.vocabulary.ids(place);
const moeLayers = () => model.moe_layers.map((layer, l) => [l, layer]);
const short = (word, most = 14) => [...word].length > most ? [...word].slice(0, most - 1).join("") + "…" : word;

function cividis(share) {
  const at = Math.min(Math.max(share, 0), 1) * 8, low = Math.min(Math.floor(at), 7);
  return [0, 2, 4].map(i => {
    const [a, b] = [CIVIDIS[low], CIVIDIS[low + 1]].map(hex => parseInt(hex.slice(i, i + 2), 16));
    return Math.round(a + (b - a) * (at - low));
  });
}

// Around 1, twice is as far as half: blue is less, orange more; full colour at a quarter and at four times.
function diverging(ratio) {
  const far = Math.max(-1, Math.min(1, Math.log2(Math.max(ratio, 1e-3)) / 2));
  return [...(far > 0 ? [213, 94, 0] : [0, 114, 178]), Math.abs(far).toFixed(3)];
}

const ramp = () => el("span", { class: "scale", style: `background:linear-gradient(90deg,#${CIVIDIS.join(",#")})` });
const css = rgb => `rgb(${rgb.join(",")})`;
const inkOn = rgb => rgb[0] * 0.3 + rgb[1] * 0.59 + rgb[2] * 0.11 > 125 ? "#000" : "#fff";

function section(id, title, told) {
  const body = el("div"), heading = el("h2", { id: `${id}-title` }, title);
  page.main.append(el("section", { "aria-labelledby": `${id}-title` }, heading, el("p", { class: "soft" }, told), body));
  return body;
}

// A picture of rows x columns cells; pointing at a cell tells about it.
function heat({ rows, columns, size, colour, tell, label, edges = [] }) {
  const { canvas, pen, at } = drawing(columns * size[0], rows * size[1], label), read = el("div", { class: "read" });
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    pen.fillStyle = css(colour(r, c));
    pen.fillRect(c * size[0], r * size[1], size[0] - (size[0] > 5), size[1] - (size[1] > 5));
  }
  pen.fillStyle = page.ink;
  for (const edge of edges) pen.fillRect(edge * size[0] - 1.5, 0, 2, rows * size[1]);
  for (const kind of ["pointermove", "click"]) canvas.addEventListener(kind, event => {
    const [x, y] = at(event).map((offset, axis) => Math.floor(offset / size[axis]));
    if (x >= 0 && y >= 0 && x < columns && y < rows) read.textContent = tell(y, x);
  });
  return el("figure", {}, canvas, read);
}

// Arrow keys in a set of which one is chosen: the one to the side, or in the line above or below.
function arrows(box, nodes, at, go) {
  box.addEventListener("keydown", event => {
    const last = nodes.length - 1, to = { ArrowLeft: at() - 1, ArrowRight: at() + 1, Home: 0, End: last }[event.key];
    const sign = { ArrowUp: -1, ArrowDown: 1 }[event.key], here = nodes[at()].getBoundingClientRect();
    if (to === undefined && !sign) return;
    const far = nodes.map(node => node.getBoundingClientRect()).map(({ top, left }) =>
      sign * (top - here.top) > 5 ? 10 * Math.abs(top - here.top) + Math.abs(left - here.left) : Infinity);
    const next = sign ? far.reduce((best, gap, i) => gap < far[best] ? i : best, at()) : Math.max(0, Math.min(last, to));
    event.preventDefault();
    go(next);
    nodes[next].focus();
  });
}

// Of nodes of which one is chosen, the one at a place; it alone is reached by the tab key.
function mark(nodes, at, attribute) {
  nodes.forEach((node, i) => {
    if (node.getAttribute(attribute) === String(i === at)) return;
    node.setAttribute(attribute, i === at);
    node.tabIndex = i === at ? 0 : -1;
  });
}

function pick(name, options, value, set) {
  const select = el("select", { onchange: event => set(event.target.value) });
  select.append(...options.map(([option, told]) => el("option", { value: option }, told)));
  select.value = value;
  return el("label", {}, `${name}: `, select);
}

// ---- 1. Text ----
function buildText() {
  page.main.append(el("h1", {}, model.name), el("p", { class: "soft" }, model.summary));
  for (const note of data.notes) page.main.append(el("p", { class: "note", role: "note" }, note));
  page.main.append(el("p", { class: "soft" }, "The text as the model reads it. Choose a token by click or arrow keys: every " +
    "panel below is about it. · is a space, ⏎ a line end, ⇥ a tab, ‹e2 82› the bytes of a character that tokens share."));
  page.tokens = text.map((place, i) => el("div", {
    class: "token", role: "option", "data-token": i, "data-id": id(place),
    title: `token ${i}, id ${id(place)}`, onclick: () => choose(i),
  }, piece(place), el("small")));
  page.list = el("div", { id: "tokens", role: "listbox", "aria-label": "tokens of the text" }, ...page.tokens);
  arrows(page.list, page.tokens, () => now.token, choose);
  page.legend = el("span", { class: "soft" });
  page.chosen = el("div", { "aria-live": "polite" });
  const controls = el("div", { class: "controls" }, ...colourControls(), page.legend);
  page.main.append(el("div", { id: "text" }, page.list, controls, page.chosen));
}

function colourControls() {
  const grouped = model.groups > 1 ? "group of the heaviest expert" : "heaviest expert";
  const kinds = [["loss", "loss"], ["entropy", "entropy"], ["attention", "attention of the chosen token"]];
  if (model.moe_layers.length) kinds.unshift(["group", grouped]);
  const controls = [pick("colour", kinds, now.colour, value => { now.colour = value; drawTokens(); })];
  page.moe = pick("MoE layer", moeLayers(), now.moe, value => { now.moe = +value; drawTokens(); });
  if (model.moe_layers.length) controls.push(page.moe);
  if (data.states.length > 1) {
    page.state = el("output");
    const set = event => show(+event.target.value), value = data.states.indexOf(state);
    const slider = el("input", { type: "range", min: 0, max: data.states.length - 1, value, "aria-label": "saved state", oninput: set });
    controls.push(el("label", {}, "state: ", slider, " ", page.state));
  }
  return controls;
}

// What a token is coloured by: an RGB triple, and the number below it.
function tokenColours() {
  const { token, colour } = now;
  if (colour === "group") return text.map((_, i) => [colourOf(state.expert(now.moe, i, 0)), state.expert(now.moe, i, 0)]);
  const [value, told, number] = {
    loss: [i => i ? state.loss(0, i - 1) : null, "nats: how surprising this token was", v => v.toFixed(1)],
    entropy: [i => state.entropy(i), "nats: how unsure the model is of what follows this token", v => v.toFixed(1)],
    attention: [i => i <= token ? attention(token, i) : null, `: read by layer ${now.layer}, head ${now.head}`, percent],
  }[colour];
  const values = range(T).map(value), most = Math.max(...values.map(v => v ?? 0)) || 1;
  page.legend.replaceChildren("0", ramp(), `${number(most)} ${told}`);
  return values.map(v => v === null ? [null, ""] : [cividis(v / most), number(v)]);
}

function drawTokens() {
  const colours = tokenColours(), grouped = now.colour === "group";
  if (grouped) {
    const chips = range(Math.min(model.groups, 8)).map(g => [el("span", { class: "swatch", style: `background:${GROUP[g]}` }), g]);
    page.legend.replaceChildren(...(model.groups > 1 ? ["group", ...chips.flat(), "; "] : []), "the number is the heaviest expert's");
  }
  page.moe.hidden = !grouped;
  page.tokens.forEach((node, i) => {
    const [colour, number] = colours[i];
    node.style.background = colour === null ? "" : grouped ? `color-mix(in srgb, ${colour} 42%, var(--paper))` : css(colour);
    node.style.color = colour === null || grouped ? "" : inkOn(colour);
    node.lastChild.textContent = number;
  });
}

function drawChosen() {
  mark(page.tokens, now.token, "aria-selected");
  const loss = now.token ? `; its loss ${state.loss(0, now.token - 1).toFixed(2)} nats` : "";
  const { offsetTop: top } = page.tokens[now.token], { list } = page;
  if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 40) list.scrollTop = top - 60;
  page.chosen.replaceChildren("Chosen: ", el("code", {}, piece(text[now.token])), `, token ${now.token} of ${T}, ` +
    `id ${id(text[now.token])}${loss}; entropy of what follows ${state.entropy(now.token).toFixed(2)} nats.`);
}

// ---- 2. Routing ----
function buildRouting() {
  const limit = model.groups > 1 ? `, all from its ${model.kept} best groups (the others are hatched)` : "";
  const body = section("routing", "Routing", `A router scores all experts and sends the token to the ${model.chosen} with the ` +
    `highest score + bias${limit}; the gate, made from the score alone, weighs an expert's answer. Left bar: score; pale right bar: ` +
    "score + bias, less the layer's mean bias, which changes no choice; dashed frame: chosen only because of its bias.");
  if (!model.moe_layers.length) return body.append(el("p", { class: "note" }, "This model has no MoE layers: nothing is routed."));
  page.switch = el("button", { onclick: () => drawWhole(!now.whole) }, "whole text: layer by expert");
  page.whole = el("div");
  page.layers = el("div", {}, ...model.moe_layers.map(buildLayer));
  body.append(el("div", { class: "controls" }, page.switch), page.whole, page.layers);
}

function buildLayer(layer) {
  const size = model.experts / model.groups;
  const groups = range(model.groups).map(g => {
    const experts = range(size).map(i => el("div", {
      class: "expert", "data-layer": layer, "data-expert": g * size + i, "data-group": g, style: `--group:${colourOf(g * size + i)}`,
    }, el("i"), el("i"), el("b", {}, g * size + i)));
    return el("div", { class: "group" }, el("span", {}, model.groups > 1 ? `group ${g}` : ""), el("div", { class: "experts" }, ...experts));
  });
  return el("div", { class: "layer" }, el("h3", {}, `layer ${layer}`), el("div", { class: "groups" }, ...groups), el("div"));
}

function drawLayer(l, box) {
  const t = now.token, E = model.experts;
  const chosen = new Map(range(model.chosen).map(k => [state.expert(l, t, k), [state.gate(l, t, k), state.by_bias(l, t, k) > 0.5]]));
  const mean = range(E).reduce((sum, e) => sum + state.bias(l, e), 0) / E;
  const scores = range(E).map(e => state.score(l, t, e)), shifted = scores.map((s, e) => s + state.bias(l, e) - mean);
  const low = Math.min(0, ...shifted), high = Math.max(...scores, ...shifted, low + 1e-6);
  const height = value => (Math.max(0, (value - low) / (high - low))).toFixed(3);
  [...box.querySelectorAll(".expert")].forEach((node, e) => {
    const [gate, bias] = chosen.get(e) ?? ["", false], cut = state.cut(l, t, groupOf(e)) > 0.5;
    const biased = scores[e] + state.bias(l, e);
    const values = { score: scores[e].toFixed(4), biased: biased.toFixed(4), gate: gate === "" ? "" : gate.toFixed(4), cut, "by-bias": bias };
    for (const [name, value] of Object.entries(values)) node.setAttribute(`data-${name}`, value);
    node.children[0].style.setProperty("--v", height(scores[e]));
    node.children[1].style.setProperty("--v", height(shifted[e]));
    const why = gate !== "" ? `gate ${gate.toFixed(2)}${bias ? ", chosen by its bias" : ""}` : cut ? "its group was cut" : "not chosen";
    node.title = `expert ${e}: score ${scores[e].toFixed(2)}, with bias ${biased.toFixed(2)}; ${why}`;
  });
  [...box.querySelectorAll(".group")].forEach((node, g) => node.setAttribute("data-cut", state.cut(l, t, g) > 0.5));
  const most = Math.max(...[...chosen.values()].map(([gate]) => gate)) || 1;
  box.lastChild.replaceChildren(el("span", { class: "soft" }, "gate of the chosen"), ...[...chosen].map(([e, [gate, bias]]) =>
    el("div", { class: "gate", style: `--group:${colourOf(e)}` }, `${bias ? "▲" : " "}e${e}`,
      el("div", {}, el("div", { style: `width:${(100 * gate / most).toFixed(1)}%` })), gate.toFixed(3))));
  const biased = [...chosen.values()].filter(([, bias]) => bias).length;
  if (biased) box.lastChild.append(el("span", { class: "soft" }, `▲ ${biased} chosen by bias`));
}

function drawWhole(whole) {
  now.whole = page.layers.hidden = whole;
  page.whole.hidden = !whole;
  page.switch.setAttribute("aria-pressed", whole);
  const [L, E] = [model.moe_layers.length, model.experts], fair = T * model.chosen / E;
  const visits = range(L).map(() => new Float64Array(E));
  for (let l = 0; l < L; l++) for (let t = 0; t < T; t++) for (let k = 0; k < model.chosen; k++) visits[l][state.expert(l, t, k)]++;
  page.whole.replaceChildren(el("p", { class: "soft" }, `Tokens of this text that visit each expert (columns), by layer (rows): ` +
    `blue less, orange more than the fair share of ${fair.toFixed(1)}; full colour at a quarter and at four times.`),
  loadMap((l, e) => visits[l][e] / fair, (l, e) => `${visits[l][e]} tokens of ${T}, `));
}

function loadMap(ratio, told = () => "") {
  const [L, E] = [model.moe_layers.length, model.experts], size = E / model.groups;
  const wide = Math.max(3, Math.min(26, Math.floor(Math.min(1100, page.main.clientWidth - 40) / E)));
  return heat({
    rows: L, columns: E, size: [wide, L > 24 ? 9 : 20], colour: (l, e) => diverging(ratio(l, e)), label: "load of each layer's experts",
    tell: (l, e) => `layer ${model.moe_layers[l]}, expert ${e}: ${told(l, e)}${ratio(l, e).toFixed(2)} times the fair share`,
    edges: range(model.groups).slice(1).map(g => g * size),
  });
}

// ---- 3. Attention ----
const attention = (query, key) => state.attention(now.layer, now.head, query * (query + 1) / 2 + key);
const headsKept = () => state.attention.shape[1];

function buildAttention() {
  const body = section("attention", "Attention", "A head lets each token (query, rows from top to bottom) read itself and earlier tokens " +
    "(keys, columns); its shares sum to 1. Below each head: the share that falls on the first token (sink), and how many tokens back " +
    "it looks on average. Choose a head by click or arrow keys.");
  page.heads = range(model.layers).flatMap(layer => range(model.heads).map(head => el("button", {
    "data-layer": layer, "data-head": head, onclick: () => open(layer, head),
  })));
  const style = `grid-template-columns:auto repeat(${model.heads}, auto)`;
  const grid = el("div", { style }, el("span"), ...range(model.heads).map(head => el("span", { class: "soft" }, `head ${head}`)));
  range(model.layers).forEach(layer => grid.append(el("span", { class: "soft" }, `layer ${layer} `),
    ...page.heads.slice(layer * model.heads, (layer + 1) * model.heads)));
  arrows(grid, page.heads, () => now.layer * model.heads + now.head, i => open(Math.floor(i / model.heads), i % model.heads));
  page.large = el("div", { id: "large", class: "columns" });
  const heads = el("div", { id: "heads", role: "group", "aria-label": "layers by heads" }, grid);
  body.append(el("div", { class: "columns" }, heads, page.large));
}

function open(layer, head) {
  Object.assign(now, { layer, head });
  mark(page.heads, layer * model.heads + head, "aria-pressed");
  page.opened = picture(layer, head, 1);
  drawLarge();
  if (now.colour === "attention") drawTokens();
}

// A head as a picture: a pixel for each pair of tokens, or for the most of a block of them.
function picture(layer, head, block) {
  const size = Math.ceil(T / block), canvas = el("canvas", { width: size, height: size });
  const most = new Float32Array(size * size).fill(-1), pen = canvas.getContext("2d"), image = pen.createImageData(size, size);
  if (head < headsKept()) for (let q = 0, cell = 0; q < T; q++) for (let k = 0; k <= q; k++, cell++) {
    const at = Math.floor(q / block) * size + Math.floor(k / block), value = state.attention(layer, head, cell);
    if (value > most[at]) most[at] = value;
  }
  const colours = range(256).map(i => [...cividis(i / 255), 255]);
  most.forEach((value, at) => value < 0 || image.data.set(colours[Math.round(255 * Math.sqrt(Math.min(1, value)))], at * 4));
  pen.putImageData(image, 0, 0);
  return canvas;
}

function paintHeads() {
  page.heads.forEach((button, i) => {
    const [layer, head] = [Math.floor(i / model.heads), i % model.heads];
    const told = `sink ${percent(state.sink(layer, head))} back ${state.distance(layer, head).toFixed(1)}`;
    button.setAttribute("aria-label", `layer ${layer}, head ${head}: ${told}`);
    button.replaceChildren(picture(layer, head, Math.ceil(T / 64)), el("span", {}, told));
  });
}

function drawLarge() {
  const { layer, head, token } = now, title = `layer ${layer}, head ${head}`;
  if (head >= headsKept()) return page.large.replaceChildren(`Of a text this long, the page holds heads 0 to ${headsKept() - 1}.`);
  page.large.replaceChildren(el("div", {}, el("h3", {}, title), matrix()),
    el("div", {}, el("h3", {}, "what the chosen token reads there"), lines(token)));
}

function matrix() {
  const named = T <= 64, room = Math.min(484, page.main.clientWidth - 16), margin = named ? 92 : 36;
  const side = (room - margin) / T, label = `attention of layer ${now.layer}, head ${now.head}: queries by keys`;
  const { canvas, pen, at } = drawing(room, room - (named ? 0 : margin - 24), label);
  const read = el("div", { class: "read" }, "Point at a cell to read its share.");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(page.opened, margin, 0, side * T, side * T);
  [pen.strokeStyle, pen.lineWidth] = [page.mark, 1.5];
  pen.strokeRect(margin, now.token * side, (now.token + 1) * side, Math.max(side, 2));
  pen.font = `${named ? Math.min(12, Math.max(9, side)) : 11}px ui-monospace, monospace`;
  const every = named ? Math.ceil(9 / side) : Math.ceil(T / 8);
  for (const i of range(T).filter(i => i === now.token || i % every === 0 && Math.abs(i - now.token) >= every)) {
    const word = named ? short(piece(text[i]), 11) : `${i}`;
    pen.fillStyle = i === now.token ? page.mark : page.ink;
    [pen.textAlign, pen.textBaseline] = ["right", "middle"];
    pen.fillText(word, margin - 4, (i + 0.5) * side);
    pen.save();
    pen.translate(margin + (i + 0.5) * side, T * side + (named ? 4 : 12));
    pen.rotate(named ? -Math.PI / 2 : 0);
    pen.fillText(word, named ? 0 : 10, 0);
    pen.restore();
  }
  const cell = event => at(event).map((offset, axis) => Math.floor((offset - (axis ? 0 : margin)) / side));
  canvas.addEventListener("pointermove", event => {
    const [k, q] = cell(event);
    if (k < 0 || q >= T || k > q) return;
    read.textContent = `${piece(text[q])} (${q}) reads ${percent(attention(q, k))} from ${piece(text[k])} (${k})`;
  });
  canvas.addEventListener("click", event => choose(Math.max(0, Math.min(T - 1, cell(event)[1]))));
  const scale = el("figcaption", {}, "share: 0", ramp(), "1; the middle of the scale is ¼");
  return el("figure", {}, canvas, scale, read);
}

// From the chosen token to the sixteen that it reads most, in the order of the text.
function lines(query) {
  const seen = range(query + 1).filter(key => attention(query, key) >= 0.005);
  const keys = seen.sort((a, b) => attention(query, b) - attention(query, a)).slice(0, 16).sort((a, b) => a - b);
  const step = 20, height = keys.length * step + 6, middle = height / 2;
  const picture = el("svg", { width: 256, height, role: "img", "aria-label": "lines from the chosen token to those that it reads" });
  picture.append(el("text", { x: 82, y: middle + 4, "text-anchor": "end", class: "row" }, short(piece(text[query]), 11)));
  const rest = keys.reduce((left, key) => left - attention(query, key), 1);
  keys.forEach((key, row) => {
    const share = attention(query, key), y = row * step + 13;
    picture.append(el("path", { d: `M88 ${middle}C128 ${middle} 110 ${y} 148 ${y}`, "stroke-width": (0.3 + 9 * share).toFixed(2),
      opacity: (0.15 + 0.85 * Math.sqrt(share)).toFixed(2) }), el("text", { x: 152, y: y + 4 }, short(piece(text[key]), 10)),
    el("text", { x: 254, y: y + 4, "text-anchor": "end" }, percent(share)));
  });
  return el("figure", {}, picture, el("figcaption", {}, `${query + 1 - keys.length} further tokens: ${percent(Math.max(0, rest))}`));
}

// ---- 4. Prediction ----
function buildPrediction() {
  const body = section("prediction", "Prediction", "The five likeliest next tokens after the chosen one; what really came has a frame. " +
    (model.mtp ? "An MTP module looks further ahead and has also read the tokens in between. " : "This model has no MTP modules. ") +
    "A layer's row is the logit lens: its state put through the model's output head, as if no layer followed.");
  page.prediction = el("div", { class: "wide", tabindex: 0 });
  page.losses = el("div");
  body.append(page.prediction, el("h3", {}, "loss of each token, in nats (0: certain)"), page.losses);
}

function drawPrediction() {
  const t = now.token, shown = range(sources.length).filter(s => t + sources[s].ahead <= T);
  const head = el("tr", {}, ...["source", "1st", "2nd", "3rd", "4th", "5th", "what came", "its loss"].map(name => el("th", { scope: "col" }, name)));
  page.prediction.replaceChildren(el("table", {}, head, ...shown.map(s => {
    const { name, ahead } = sources[s], came = text[t + ahead];
    const cells = range(state.best.shape[2]).map(i => {
      const place = state.best(s, t, i), probability = state.probability(s, t, i);
      const known = { class: "candidate token", style: `--v:${probability.toFixed(3)}`, "data-source": name, "data-candidate": id(place),
        "data-probability": probability.toFixed(4), title: `${piece(place)}: ${percent(probability)}` };
      return el("td", place === came ? { ...known, "data-came": "" } : known, el("span", {}, percent(probability)), short(piece(place), 9));
    });
    const told = came === undefined ? ["", ""] : [piece(came), `${state.loss(s, t).toFixed(2)} nats`];
    const where = ahead > 1 ? `, token ${t + ahead}` : "";
    return el("tr", {}, el("th", { scope: "row" }, label(s) + where), ...cells, el("td", { class: "token" }, told[0]), el("td", {}, told[1]));
  })));
}

function drawLosses() {
  const shown = range(sources.length).filter(s => !sources[s].name.startsWith("layer") && sources[s].ahead < T);
  page.losses.replaceChildren(...shown.map(s => {
    const { ahead } = sources[s], values = range(T).map(i => i < ahead ? null : state.loss(s, i - ahead));
    const most = Math.max(...values), mean = values.reduce((sum, v) => sum + v, 0) / (T - ahead);
    const bars = values.map((v, i) => el("i", { style: `--v:${(v ?? 0) / most || 0}`, onclick: () => choose(i),
      title: v === null ? "nothing predicts this token" : `${piece(text[i])}: ${v.toFixed(2)} nats` }));
    const row = el("div", { class: T > 200 ? "losses long" : "losses" }, ...bars);
    return el("figure", {}, row, el("figcaption", {}, `${label(s)}: mean ${mean.toFixed(2)}, most ${most.toFixed(2)} nats per token`));
  }));
}

// ---- 5. Corpus ----
function buildCorpus() {
  const body = section("corpus", "Corpus", "What the experts read in a longer text, beside a model of the same sizes with random " +
    "weights: routing that needs no training shows there too.");
  if (!data.corpus) return body.append(el("p", { class: "soft" }, "Make the page with --corpus FILE to see load, lift and co-activation."));
  const { tokens, ...parts } = data.corpus, last = model.moe_layers.length - 1;
  const loads = Object.entries(parts).map(([kind, part]) => el("div", {}, el("h3", {}, `load, ${kind}`), loadMap(part.load)));
  page.lift = el("div");
  body.append(el("p", {}, `${tokens.toLocaleString("en")} tokens were read. Rows are layers, columns experts: blue less, orange more ` +
    "than the fair share; full colour at a quarter and at four times. Co-activation: how often two experts share a token."),
  el("div", { class: "columns" }, ...loads),
  pick("MoE layer", moeLayers(), last, l => drawCorpus(+l, Object.entries(parts))), page.lift);
  drawCorpus(last, Object.entries(parts));
}

function drawCorpus(l, parts) {
  const E = model.experts, size = Math.max(2, Math.min(16, Math.floor(420 / E)));
  const pairs = parts.map(([kind, part]) => el("div", {}, el("h3", {}, `co-activation, ${kind}`), heat({
    rows: E, columns: E, size: [size, size], label: `co-activation of experts, ${kind}`,
    colour: (a, b) => diverging(a === b ? 1 : part.together(l, a, b)),
    tell: (a, b) => `experts ${a} and ${b} share a token ${part.together(l, a, b).toFixed(2)} times as often as by chance`,
  })));
  const words = (part, e) => range(part.lift.shape[2]).filter(i => part.lift(l, e, i) > 0).flatMap(i =>
    [el("span", {}, `${short(piece(part.words(l, e, i)), 12)} ${part.lift(l, e, i).toFixed(1)}`), " "]);
  const loadCell = ratio => el("td", { style: `background:${css(diverging(ratio))}` }, ratio.toFixed(2));
  const rows = range(E).map(e => el("tr", {}, el("th", { scope: "row" }, `expert ${e}`),
    ...parts.flatMap(([, part]) => [loadCell(part.load(l, e)), el("td", { class: "word" }, ...words(part, e))])));
  const names = parts.flatMap(([kind]) => [`load, ${kind}`, `tokens and their lift (times as often as by chance), ${kind}`]);
  const head = el("tr", {}, el("th"), ...names.map(name => el("th", { scope: "col" }, name)));
  page.lift.replaceChildren(el("div", { class: "columns" }, ...pairs), el("div", { class: "wide", tabindex: 0 }, el("table", {}, head, ...rows)));
}

// ---- All together ----
function choose(token) {
  now.token = token;
  if (now.colour === "attention") drawTokens();
  drawChosen();
  model.moe_layers.forEach((_, l) => drawLayer(l, page.layers.children[l]));
  drawLarge();
  drawPrediction();
  page.losses.querySelectorAll(".losses").forEach(row => [...row.children].forEach((bar, i) => bar.classList.toggle("here", i === token)));
}

function show(number) {
  state = data.states[number];
  if (page.state) page.state.textContent = state.name;
  paintHeads();
  open(now.layer, now.head);
  drawLosses();
  if (model.moe_layers.length) drawWhole(now.whole);
  drawTokens();
  choose(now.token);
}

function build() {
  const colours = getComputedStyle(document.documentElement);
  [page.ink, page.mark] = ["--ink", "--mark"].map(name => colours.getPropertyValue(name));
  page.main.replaceChildren();
  for (const part of [buildText, buildRouting, buildAttention, buildPrediction, buildCorpus]) part();
  show(data.states.indexOf(state));
}

async function main() {
  data = await unpack(JSON.parse(document.getElementById("data").textContent));
  ({ model, sources } = data);
  [T] = data.tokens.shape;
  text = range(T).map(i => data.tokens(i));
  state = data.states.at(-1);
  Object.assign(now, data.open);
  page.main = document.body.appendChild(el("main"));
  build();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);
  document.documentElement.dataset.ready = "true";
}

main();
