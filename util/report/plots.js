// 图的共同样子：颜色、字体、坐标轴、图例、末端的名字。
let [INK, QUIET, GRID, EDGE, GROUND] = []; // page.css 里的，浅色、深色、纸上各一套
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe–Ito，白底上看得清的六色
const BASELINE = "#808080"; // 基线都是灰的，靠虚线与记号区分
const DASHES = ["dash", "dot", "dashdot", "longdash"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
const FONT = getComputedStyle(document.documentElement).getPropertyValue("--sans").trim().replace(/\s+/g, " "); // 与正文同一套字体
const TOUCH = matchMedia("(pointer: coarse)").matches || !matchMedia("(any-hover: hover)").matches; // 手指：拖动留给翻页
const TRUTH = {
  get color() {
    return INK;
  },
  dash: "solid",
  width: 2.2,
};

function readColors() {
  const look = getComputedStyle(document.documentElement);
  [INK, QUIET, GRID, EDGE, GROUND] = ["ink", "quiet", "grid", "edge", "ground"].map((name) =>
    look.getPropertyValue(`--${name}`).trim(),
  );
}
readColors();

const channelsOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const toHex = (parts) => `#${parts.map((c) => c.toString(16).padStart(2, "0")).join("")}`;

// WCAG 2.2 的相对亮度与对比度
function luminance(hex) {
  const [r, g, b] = channelsOf(hex).map((c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

// 线的颜色用作文字时：往墨色调，到对比度有 4.5
function readable(color) {
  for (let share = 0; share <= 1; share += 0.1) {
    const mixed = channelsOf(color).map((c, i) => Math.round(c + (channelsOf(INK)[i] - c) * share));
    if (contrast(toHex(mixed), GROUND) >= 4.5) return toHex(mixed);
  }
  return INK;
}

const models = content.models ?? Object.keys(content.scores ?? {}).map((name) => ({ name, role: "model" }));
const baselines = models.filter((m) => m.role === "baseline").map((m) => m.name);
const contenders = models.filter((m) => m.role === "model").map((m) => m.name);
const published = models.filter((m) => m.role === "published").map((m) => m.name); // 别人发表的，做法不尽相同

// 一个模型在一切图里同一种颜色与线型，由它在 models 里的次序定
const styles = new Map(
  models.map(({ name, role }) => {
    const place = { baseline: baselines, model: contenders, published }[role].indexOf(name);
    if (role === "baseline") {
      return [
        name,
        {
          color: BASELINE,
          dash: DASHES[place % DASHES.length],
          width: 1.8,
          symbol: SYMBOLS[(place + 1) % SYMBOLS.length],
        },
      ];
    }
    const lap = Math.floor(place / COLORS.length); // 超过六个模型时颜色重来，线型与记号不同
    const color = COLORS[place % COLORS.length];
    if (role === "published") {
      return [name, { color, dash: "dot", width: 1.2, symbol: `${SYMBOLS[(lap + 1) % SYMBOLS.length]}-open` }];
    }
    return [
      name,
      {
        color,
        dash: ["solid", "longdashdot", "longdash"][lap % 3],
        width: 2.4,
        symbol: SYMBOLS[lap % SYMBOLS.length],
      },
    ];
  }),
);
const line = (style) => ({ color: style.color, dash: style.dash, width: style.width });
const modelsIn = (table) => models.map((m) => m.name).filter((name) => table?.[name]);

function modelText(name) {
  return baselines.includes(name) ? label(name.replaceAll("_", " ")) : name;
}

Plotly.register({
  moduleType: "locale",
  name: "zh",
  dictionary: {
    "Download plot as a PNG": "存为 PNG 图片",
    "Reset axes": "还原坐标轴",
    "Taking snapshot - this may take a few seconds": "正在生成图片",
    "Snapshot succeeded": "图片已生成",
    "Double-click to zoom back out": "双击还原",
  },
  format: {},
});

const narrow = () => document.documentElement.clientWidth < 640;

function axis(title, more = {}) {
  return {
    title: { text: title, font: { size: 12.5, color: QUIET }, standoff: 10 },
    gridcolor: GRID,
    linecolor: EDGE,
    tickcolor: EDGE,
    showline: true,
    zeroline: false,
    ticks: "outside",
    ticklen: 4,
    tickfont: { size: 12, color: QUIET },
    automargin: false,
    exponentformat: "power",
    separatethousands: true,
    ...more,
  };
}

function draw(node, traces, layout, height) {
  const margin = narrow() ? { l: 54, r: 12, t: 10, b: 46 } : { l: 66, r: 18, t: 10, b: 48 };
  const look = {
    font: { family: FONT, size: 12, color: QUIET },
    paper_bgcolor: GROUND,
    plot_bgcolor: GROUND,
    showlegend: false,
    hovermode: "x unified",
    hoverdistance: layout.hovermode ? 20 : -1,
    dragmode: TOUCH ? false : "zoom",
    hoverlabel: { bgcolor: GROUND, bordercolor: EDGE, align: "left", font: { family: FONT, size: 12.5, color: INK } },
    width: node.clientWidth,
    height,
    ...layout,
    margin: { ...margin, ...layout.margin },
  };
  const config = {
    displaylogo: false,
    responsive: false,
    locale: inChinese() ? "zh" : "en",
    modeBarButtons: [["resetScale2d", "toImage"]],
    toImageButtonOptions: { format: "png", scale: 2, filename: `ar_pred-${node.id}` },
    displayModeBar: TOUCH ? false : "hover",
  };
  Plotly.react(node, traces, look, config);
  const scratch = document.getElementById("js-plotly-tester"); // plotly 量字宽用的
  for (const silent of [node.firstElementChild, scratch]) silent?.setAttribute("aria-hidden", "true"); // 读屏只念 node 的名字
}

// 一幅图：标题（HTML，可换行、可换语言）与画板；返回 [标题, 画板]
function figure(body, id) {
  const title = el("figcaption", { id: `${id}-title` });
  const names = `${body.closest("section").id}-heading ${id}-title`; // 读屏：哪一节、标题
  const plot = el("div", { class: "plot", id, role: "img", "aria-labelledby": names });
  body.append(el("figure", {}, title, plot));
  return [title, plot];
}

// 图例：点名字隐去或显示，一切图联动；fixed 是不可隐去的，如真值
function legend(body) {
  const row = body.appendChild(el("div", { class: "legend", role: "group" }));
  spoken.push(() => row.setAttribute("aria-label", t("legend")));
  return (names, fixed = []) => {
    const entries = [
      ...fixed.map(([text, style]) => el("span", { class: "entry" }, swatch(style), text)),
      ...names.map((name) =>
        el(
          "button",
          {
            class: "entry",
            type: "button",
            "aria-pressed": String(!state.hidden.has(name)),
            onclick: () => {
              const hidden = new Set(state.hidden);
              if (!hidden.delete(name)) hidden.add(name);
              change({ hidden });
            },
          },
          swatch(styles.get(name)),
          modelText(name),
        ),
      ),
    ];
    row.replaceChildren(...(entries.length > 1 ? entries : [])); // 只有一条线时不用图例
    return names.filter((name) => !state.hidden.has(name));
  };
}

function swatch({ color, dash, width = 2.4, symbol }) {
  const node = svg("svg", { width: 28, height: 12, "aria-hidden": "true" });
  const gaps =
    { dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4", longdashdot: "10 3 2 3" }[dash] ?? "none";
  node.append(
    svg("line", { x1: 1, x2: 27, y1: 6, y2: 6, stroke: color, "stroke-width": width, "stroke-dasharray": gaps }),
  );
  if (symbol && dash === "solid") node.append(svg("circle", { cx: 14, cy: 6, r: 3.2, fill: color }));
  return node;
}

// 纵轴范围：留 6 % 的边；fromZero 时从零起
function padded(values, fromZero = false) {
  let [low, high] = extent(values);
  if (low > high) return [0, 1];
  if (fromZero) [low, high] = [Math.min(0, low), Math.max(0, high)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [fromZero && low === 0 ? 0 : low - room, high + room];
}

// 线末端写名字（宽屏）：按纵向位置排开，互不压住
function endLabels(lines, x, range, height) {
  const gap = 16;
  const place = (y) => ((range[1] - y) / (range[1] - range[0])) * height;
  const items = lines
    .filter((l) => known(l.y))
    .map((l) => ({ ...l, at: place(l.y) }))
    .sort((a, b) => a.at - b.at);
  items.forEach((item, i) => {
    item.put = i ? Math.max(item.at, items[i - 1].put + gap) : item.at;
  });
  for (let i = items.length - 1, bottom = height; i >= 0; i--, bottom -= gap)
    items[i].put = Math.min(items[i].put, bottom);
  return items.map(({ y, text, color, at, put }) => ({
    x,
    y,
    xref: "x",
    yref: "y",
    text: escapeMarks(text),
    showarrow: false,
    xanchor: "left",
    xshift: 10,
    yshift: at - put,
    font: { size: 12, color: readable(color) },
    captureevents: false,
  }));
}

const textWidth = (text) => [...text].reduce((sum, c) => sum + (c > "\u2e80" ? 12.5 : 6.8), 0);

function leadAxis() {
  const long = leads.length > 14;
  const ticks = long ? leads.filter((h) => h % 24 === 0) : leads;
  const pad = (leads.at(-1) - leads[0]) * 0.02;
  return axis(t("leadAxis"), {
    tickvals: ticks.length > 1 ? ticks : leads,
    range: [leads[0] - pad, leads.at(-1) + pad],
    unifiedhovertitle: { text: `${t("lead")} +%{x} h` },
  });
}

// 横贯全图的一条水平线，如零线、理想值
function levelLine(y, look) {
  return {
    type: "line",
    xref: "paper",
    x0: 0,
    x1: 1,
    y0: y,
    y1: y,
    layer: "below",
    line: { color: INK, width: 1.2, ...look },
  };
}

// 随时效变化的一幅：每个模型一条线，末端写名字。lines: [{name, values, hover}]，values、hover 各时效一个
function leadLines(plot, lines, { title, range, levels = [], under = [], height }) {
  const traces = lines.map(({ name, values, hover }) => ({
    type: "scatter",
    mode: "lines+markers",
    name: escapeMarks(name),
    x: leads,
    y: values,
    connectgaps: published.includes(name), // 只有几个时效的
    line: line(styles.get(name)),
    marker: { size: 6, color: styles.get(name).color, symbol: styles.get(name).symbol },
    customdata: hover,
    hovertemplate: `${escapeMarks(modelText(name))}  %{customdata}<extra></extra>`,
  }));
  const labelled = lines.filter(({ name }) => !published.includes(name)); // 发表的太多，名字在图例里
  const ends = labelled.map(({ name, values }) => ({
    y: values.at(-1),
    text: modelText(name),
    color: styles.get(name).color,
  }));
  const wide = !narrow();
  const layout = {
    margin: { r: wide ? Math.max(...ends.map((e) => textWidth(e.text)), 40) + 22 : 14 },
    shapes: levels,
    xaxis: leadAxis(),
    yaxis: axis(title, { range }),
    annotations: wide ? endLabels(ends, leads.at(-1), range, height - 58) : [],
  };
  draw(plot, [...under, ...traces], layout, height);
}

function barTrace(rows, y) {
  const colors = rows.map((r) => styles.get(r.name).color);
  return {
    type: "bar",
    orientation: "h",
    y,
    x: rows.map((r) => r.value),
    marker: { color: colors },
    width: 0.62,
    cliponaxis: false,
    text: rows.map((r) => `\u2002${r.text}`),
    textposition: "outside",
    textfont: { size: 12.5, color: INK },
    customdata: rows.map((r) => r.hover),
    hovertemplate: "%{customdata}<extra></extra>",
  };
}

// 一点与它的区间；low、high 没有就只有点
function dotTrace(row, y) {
  const { color } = styles.get(row.name);
  const whiskers = {
    type: "data",
    symmetric: false,
    array: [row.high - row.value],
    arrayminus: [row.value - row.low],
    color,
    thickness: 2,
    width: 6,
  };
  return {
    type: "scatter",
    mode: "markers",
    y: [y],
    x: [row.value],
    marker: { size: 11, color },
    cliponaxis: false,
    error_x: known(row.low) ? whiskers : { visible: false },
    customdata: [row.hover],
    hovertemplate: "%{customdata}<extra></extra>",
  };
}

// 只有一个时效时：每个模型一根横柱，旁边写值；dots 时画成点与区间。rows: [{name, value, low, high, text, hover}]
function bars(node, rows, title, dots = false) {
  const shown = [...rows].reverse(); // plotly 的类别轴从下往上
  const names = shown.map((r) => modelText(r.name));
  const marked = names.map(escapeMarks);
  const range = padded(
    shown.flatMap((r) => [r.value, r.low, r.high]),
    true,
  );
  const room = (range[1] - range[0]) * (dots ? 0.02 : 0.16); // 柱外写值的地方
  const wide = [range[0] - (range[0] < 0 ? room : 0), range[1] + (range[1] > 0 ? room : 0)];
  const left = Math.min(Math.max(...names.map(textWidth)) + 30, node.clientWidth * 0.4);
  const layout = {
    hovermode: "closest",
    bargap: 0.3,
    margin: { l: left, t: 6, b: 46 },
    xaxis: axis(title, { range: wide, zeroline: true, zerolinecolor: EDGE, zerolinewidth: 1.2 }),
    yaxis: {
      showgrid: false,
      ticks: "outside",
      ticklen: 8,
      tickcolor: GROUND,
      tickfont: { size: 12.5, color: INK },
      fixedrange: true,
    },
  };
  draw(
    node,
    dots ? shown.map((r, i) => dotTrace(r, marked[i])) : [barTrace(shown, marked)],
    layout,
    70 + 44 * shown.length,
  );
}
