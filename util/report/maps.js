// 地图：真值、预报、误差三幅，滑块走过各起报时间（maps）或一次预报的各时效（roll）；下面是每一张的误差。
const MAP_PANELS = ["truth", "forecast", "error"];
const FRAME_MS = 400; // 播放每秒两三幅
const MAP_HEIGHT = 460; // 像素，一幅地图最高这么多
const emptyMap = ({ latitudes, longitudes }) => latitudes.map(() => longitudes.map(() => null));
const present = (map) => Boolean(map) && known(map.low); // 真值有缺的时刻没有图

// 一字节一格 → 每行一段 Float32Array；只在要画时解码。divisor 是提出的 10 的幂
function decode(map, width, divisor) {
  const bytes = atob(map.data);
  const step = (map.high - map.low) / 255;
  const values = new Float32Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) values[i] = (map.low + bytes.charCodeAt(i) * step) / divisor;
  return Array.from({ length: bytes.length / width }, (_, row) => values.subarray(row * width, (row + 1) * width));
}

// 图的四边（外推半格）与纵横比：区域图按中心纬度的余弦拉伸，全球图为 1；与 matplotlib 的图同一规则
function mapFrame(latitudes, longitudes) {
  const half = (values) => Math.abs(values.at(-1) - values[0]) / Math.max(values.length - 1, 1) / 2 || 0.5;
  const [south, north] = extent(latitudes);
  const [west, east] = [longitudes[0] - half(longitudes), longitudes.at(-1) + half(longitudes)];
  const stretch = 1 / Math.max(Math.cos(((south + north) / 2) * (Math.PI / 180)), 0.5);
  const [bottom, top] = [Math.max(south - half(latitudes), -90), Math.min(north + half(latitudes), 90)];
  return { x: [west, east], y: [bottom, top], stretch, ratio: ((top - bottom) * stretch) / (east - west) };
}

// 海岸线做成一张贴在经纬度上的 SVG：换一幅地图时不必重画几千个点，存 PNG 时也在。浅边衬深线，深浅底色上都看得见
function coastImages({ x, y }) {
  if (!content.coast?.length) return [];
  const path = content.coast
    .map((part) => `M${part.map(([lon, lat]) => `${lon} ${(y[1] - lat).toFixed(3)}`).join("L")}`)
    .join("");
  const stroke = (color, opacity, width) =>
    `<path d="${path}" fill="none" stroke="${color}" ` +
    `stroke-opacity="${opacity}" stroke-width="${width}" vector-effect="non-scaling-stroke" stroke-linejoin="round"/>`;
  const box = `viewBox="${x[0]} 0 ${x[1] - x[0]} ${y[1] - y[0]}" preserveAspectRatio="none"`;
  const picture =
    `<svg xmlns="http://www.w3.org/2000/svg" ${box}>${stroke("white", 0.45, 1.8)}` +
    `${stroke("#1e2226", 0.85, 0.7)}</svg>`;
  const source = `data:image/svg+xml,${encodeURIComponent(picture)}`;
  const place = { xref: "x", yref: "y", x: x[0], y: y[1], sizex: x[1] - x[0], sizey: y[1] - y[0] };
  return [{ source, ...place, sizing: "stretch", layer: "above" }];
}

// 横在图下的色标；单位写在最后一个刻度上。width、height 是地图本身的像素
function colorBar(unit, width, height) {
  return {
    orientation: "h",
    thickness: 9,
    thicknessmode: "pixels",
    len: 1,
    x: 0.5,
    xanchor: "center",
    xpad: 0,
    y: -26 / height,
    yanchor: "top",
    ypad: 0,
    outlinewidth: 0,
    ticks: "outside",
    ticklen: 3,
    tickcolor: EDGE,
    tickfont: { size: 11, color: QUIET },
    nticks: Math.max(4, Math.floor(width / 70)),
    exponentformat: "power",
    title: { text: "" },
    ticksuffix: unit ? ` ${escapeMarks(unit)}` : "",
    showticksuffix: "last",
  };
}

function mapAxes(frame, width, height) {
  const look = { ticklen: 3, tickfont: { size: 11, color: QUIET }, showgrid: false, mirror: true, constrain: "domain" };
  const [east, north] = [
    degreeTicks(...frame.x, Math.max(3, width / 62)),
    degreeTicks(...frame.y, Math.max(3, height / 34)),
  ];
  return {
    xaxis: axis("", { ...look, range: frame.x, tickvals: east, ticktext: east.map(longitudeText) }),
    yaxis: axis("", {
      ...look,
      range: frame.y,
      tickvals: north,
      ticktext: north.map(latitudeText),
      scaleanchor: "x",
      scaleratio: frame.stretch,
    }),
  };
}

// 画一幅，返回它的高；rows 为 null 时只有坐标轴和海岸线。look: {colors, unit, exponent, name}
function drawMap(plot, { maps, frame, places, coast }, rows, { colors, unit, exponent, name }) {
  const margin = { l: 44, r: 8, t: 10, b: 66 };
  const room = plot.clientWidth - margin.l - margin.r;
  const height = Math.min(room * frame.ratio, MAP_HEIGHT); // 窄高的区域限高，靠左放
  const width = height / frame.ratio;
  margin.r += room - width;
  const value = withUnit("%{z:.4~r}", escapeMarks(unit));
  const heat = {
    type: "heatmap",
    x: maps.longitudes,
    y: maps.latitudes,
    z: rows ?? emptyMap(maps),
    text: places,
    zsmooth: false,
    colorscale: colors.scale,
    zmin: colors.low / 10 ** exponent,
    zmax: colors.high / 10 ** exponent,
    colorbar: colorBar(unit, width, height),
    hovertemplate: `%{text}<br>${escapeMarks(name)} <b>${value}</b><extra></extra>`,
  };
  const layout = {
    margin,
    hovermode: "closest",
    uirevision: `${plot.clientWidth}`,
    images: coast,
    ...mapAxes(frame, width, height),
  };
  if (!rows) {
    const font = { size: 13, color: QUIET };
    layout.annotations = [{ text: t("noTruth"), xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font }];
  }
  draw(plot, [heat], layout, height + margin.t + margin.b);
  return height + margin.t + margin.b;
}

// 一幅上指着哪里，另外两幅同一处的值也显示
function linkHover(plots) {
  let passing = false;
  for (const plot of plots) {
    plot.on("plotly_hover", ({ points }) => {
      if (passing || !points.length) return;
      passing = true;
      for (const other of plots.filter((p) => p !== plot))
        Plotly.Fx.hover(other, { xval: points[0].x, yval: points[0].y });
      passing = false;
    });
    plot.on("plotly_unhover", () => {
      if (passing) return;
      passing = true;
      for (const other of plots.filter((p) => p !== plot)) Plotly.Fx.unhover(other);
      passing = false;
    });
  }
}

// 播放条：按钮、滑块、起报与有效时间。frames 是 {count, at() 现在第几张, word 滑块是什么}；返回按现在的状态更新它的函数
function player(body, id, frames, go) {
  const button = el("button", { type: "button", class: "play", id: `${id}-play` });
  const slider = el("input", { type: "range", min: 0, max: frames.count - 1, step: 1, id: `${id}-time` });
  const clockText = el("output", { class: "clock", for: `${id}-time` });
  body.append(el("div", { class: frames.count > 1 ? "player" : "player single" }, button, slider, clockText));
  let timer = null;
  let waiting = false;
  const face = () => {
    button.textContent = timer ? "❚❚" : "▶";
    button.setAttribute("aria-label", t(timer ? "pause" : "play"));
    button.title = t(timer ? "pause" : "play");
    slider.setAttribute("aria-label", t(frames.word));
  };
  const toggle = () => {
    if (timer) clearInterval(timer);
    timer = timer ? null : setInterval(() => go((frames.at() + 1) % frames.count), FRAME_MS);
    face();
  };
  button.addEventListener("click", toggle);
  document.addEventListener("keydown", (event) => {
    if (event.key !== " " || !timer || event.target === button) return; // 放着的时候，哪里按空格都停
    event.preventDefault();
    toggle();
  });
  slider.addEventListener("input", () => {
    // 拖得再快，一帧屏幕只画一次
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      go(Number(slider.value));
    });
  });
  return (time, lead) => {
    face();
    slider.value = frames.at();
    const parts = [["initial", clock(time)], ["valid", clock(time, lead)]];
    slider.setAttribute("aria-valuetext", parts.map(([word, text]) => `${t(word)} ${text}`).join(", "));
    clockText.replaceChildren(...parts.map(([word, text]) => el("span", {}, `${t(word)} `, el("b", {}, text))));
  };
}

// 每张地图一点：这一通道的误差；点一下就到那一张。x: 各张的位置，here 是现在第几张
function errorStrip(plot, x, values, here, { axisOf, hover, unit, height }) {
  const color = styles.get(contenders[0])?.color ?? COLORS[0];
  const current = {
    type: "scatter",
    mode: "markers",
    x: [x[here]],
    y: [values[here]],
    hoverinfo: "skip",
    marker: { size: 13, color: "rgba(0,0,0,0)", line: { color: INK, width: 1.8 } },
  };
  const trace = {
    type: "scatter",
    mode: "lines+markers",
    x,
    y: values,
    line: { color, width: 1.6 },
    marker: { size: 6, color },
    customdata: x.map((_, i) => `${hover(i)}<br>RMSE <b>${withUnit(num(values[i]), unit)}</b>`),
    hovertemplate: "%{customdata}<extra></extra>",
  };
  const layout = {
    hovermode: "closest",
    dragmode: false,
    margin: { b: 56 },
    xaxis: axisOf(plot.clientWidth),
    yaxis: axis(axisTitle("RMSE", unit), { range: padded(values, true), fixedrange: true, nticks: 5 }),
  };
  draw(plot, [trace, current], layout, height);
}

// 三幅地图与误差曲线的位置；返回各自的 [标题, 画板]
function mapFigures(body, prefix, maps, frame, count) {
  const holder = body.appendChild(el("div", { class: frame.ratio > 0.62 ? "maps tall" : "maps" }));
  const panels = MAP_PANELS.map((panel) => figure(holder, `${prefix}-${panel}`));
  const strip = holder.appendChild(el("div", { class: "errors" }));
  const errors = figure(strip, `${prefix}-errors`);
  strip.hidden = count < 2;
  const notes = [maps.note ?? []].flat();
  const joined = () => notes.map(phrase).join(inChinese() ? "；" : "; ");
  if (notes.length) body.append(say(el("p", { class: "note" }), joined));
  return { holder, panels, errors };
}

// 播放的是什么：maps 走过各起报时间，时效在下拉框里；roll 走过各时效，起报时间只有一个
const REELS = {
  maps: (maps) => ({
    count: maps.times.length,
    key: "time",
    word: "initial",
    x: maps.times,
    hover: (i) => clock(maps.times[i]),
    axisOf: (width) => timeAxis(t("initial"), width),
    place: (lead) => ({ time: state.time, lead }),
    scores: (rows, lead) => rows[lead],
  }),
  roll: (maps) => ({
    count: maps.lead_hours.length,
    key: "roll",
    word: "lead",
    x: maps.lead_hours,
    hover: (i) => leadText(maps.lead_hours[i]),
    axisOf: () => axis(t("leadAxis")),
    place: () => ({ time: 0, lead: state.roll }),
    scores: (rows) => rows.map(([one]) => one),
  }),
};

const buildReel = (id) => (body) => {
  const maps = content[id];
  const reel = REELS[id](maps);
  const prefix = id === "maps" ? "map" : id;
  const bar = controls(body);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(maps.channels));
  const leadOf = id === "roll" ? () => null : select(bar, "lead", "lead", () => leadOptions(maps.lead_hours));
  const go = (step) => {
    state[reel.key] = step;
    paint();
  };
  const showTime = player(body, id, { ...reel, at: () => state[reel.key] }, go);
  const heading = body.appendChild(el("p", { class: "tabletitle" }));
  const frame = mapFrame(maps.latitudes, maps.longitudes);
  const figures = mapFigures(body, prefix, maps, frame, reel.count);
  const [north, east] = [maps.latitudes.map(latitudeText), maps.longitudes.map(longitudeText)];
  const places = north.map((lat) => east.map((lon) => `${lat} ${lon}`));
  const ground = { maps, frame, places, coast: coastImages(frame) };
  let linked = false;

  // 画三幅中的一幅，返回它的高
  function paintPanel(panel, [title, plot], map, colors, unit, score) {
    const exponent = exponentOf([colors.low, colors.high]);
    const shown = scaledUnit(unit, exponent);
    const [rmse, bias] = [score?.rmse, score?.bias].map((v) => withUnit(num(v, 3), unit));
    const aside = panel === "error" && known(score?.rmse) ? t("thisMap", rmse, bias) : "";
    const name = el("span", {}, el("b", {}, t(panel)), ` ${axisTitle("", shown).trim()}`);
    title.replaceChildren(name, el("span", { class: "aside" }, aside));
    const rows = present(map) ? decode(map, maps.longitudes.length, 10 ** exponent) : null;
    return drawMap(plot, ground, rows, { colors, unit: shown, exponent, name: t(panel) });
  }

  // 误差曲线：标题与图；heightBeside 是误差图的高，并排时一样高
  function paintStrip(scores, unit, heightBeside) {
    const [title, plot] = figures.errors;
    const values = scores.map((one) => one?.rmse ?? null);
    const exponent = exponentOf(values);
    const scaled = values.map((v) => (known(v) ? v / 10 ** exponent : null));
    const beside = getComputedStyle(figures.holder).gridTemplateColumns.split(" ").length === 2;
    title.replaceChildren(el("span", {}, el("b", {}, t("mapErrors")), ` · ${t("mapErrorsCaption")}`));
    const height = beside ? Math.max(200, heightBeside) : 210;
    errorStrip(plot, reel.x, scaled, state[reel.key], { ...reel, unit: scaledUnit(unit, exponent), height });
  }

  function paint() {
    const channel = channelOf();
    const wanted = leadOf();
    const { time, lead } = reel.place(maps.lead_hours.indexOf(wanted));
    const hours = maps.lead_hours[lead];
    const { field, error } = maps.colors[channel];
    const unit = prettyUnit(channelInfo(channel).unit);
    showTime(maps.times[time], hours);
    heading.textContent = `${channelText(channel)} · ${leadText(hours)}`;
    const now = maps.fields[channel][lead][time];
    const score = maps.scores[channel][lead][time];
    const heights = MAP_PANELS.map((panel, place) =>
      paintPanel(panel, figures.panels[place], now[panel], panel === "error" ? error : field, unit, score),
    );
    if (reel.count > 1) paintStrip(reel.scores(maps.scores[channel], lead), unit, heights[2]);
    if (linked) return;
    linked = true; // 画板要先画过一次才有 on
    linkHover(figures.panels.map(([, plot]) => plot));
    if (reel.count > 1) figures.errors[1].on("plotly_click", ({ points }) => go(points[0].pointIndex));
  }
  return paint;
};

for (const id of ["maps", "roll"]) section(id, content[id], buildReel(id));
