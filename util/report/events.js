// 事件的四幅图：可靠性、ROC、经济价值、邻域的技巧；滚动时的漂移。
const UNIT_RANGE = [-0.03, 1.03];

// 一条线与它的点。points: {x, y, sizes}
function curveTrace(name, { x, y, sizes }) {
  const style = styles.get(name);
  return {
    type: "scatter",
    mode: "lines+markers",
    name: escapeMarks(modelText(name)),
    x,
    y,
    line: line(style),
    marker: { size: sizes ?? 5, color: style.color },
    customdata: y.map((v, i) => `${num(x[i], 3)}, <b>${num(v, 3)}</b>`),
    hovertemplate: `${escapeMarks(modelText(name))}  %{customdata}<extra></extra>`,
  };
}

const diagonal = () => ({
  type: "line",
  x0: 0,
  x1: 1,
  y0: 0,
  y1: 1,
  layer: "below",
  line: { color: EDGE, dash: "dash" },
});

function drawCurves(plot, traces, [across, along], { x = UNIT_RANGE, y = UNIT_RANGE, shapes = [], ticks = {} }) {
  const layout = {
    hovermode: "closest",
    xaxis: axis(across, { range: x, ...ticks }),
    yaxis: axis(along, { range: y }),
    shapes,
  };
  draw(plot, traces, layout, narrow() ? 280 : 340);
}

section("events", Object.keys(content.events?.curves ?? {}).length, (body) => {
  const { curves, lead_hours: hours, ratios, sizes } = content.events;
  const first = Object.values(curves)[0];
  const bar = controls(body);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(Object.keys(first)));
  const eventOf = select(bar, "event", "event", (channel) => Object.keys(first[channel]).map((e) => [e, e]));
  const leadOf = select(bar, "lead", "lead", () => leadOptions(hours));
  const names = legend(body);
  const rows = [body.appendChild(el("div", { class: "pair" })), body.appendChild(el("div", { class: "pair" }))];
  const kinds = ["reliability", "roc", "value", ...(sizes.length ? ["fss"] : [])];
  const figures = kinds.map((kind, i) => figure(rows[i >> 1], `${kind}-plot`));
  return () => {
    const channel = channelOf();
    const [event, lead] = [eventOf(channel), leadOf()];
    const i = hours.indexOf(lead);
    const shown = names(modelsIn(curves).filter((m) => curves[m][channel]?.[event]));
    const of = (m) => curves[m][channel][event][i];
    const traces = (points) => shown.map((m) => curveTrace(m, points(of(m))));
    kinds.forEach((kind, k) => {
      figures[k][0].textContent = `${t(`${kind}Title`)} · ${channel} ${event} · ${leadText(lead)}`;
    });
    const plots = figures.map(([, plot]) => plot);
    const said = ({ observed, share }) => ({
      x: observed.map((_, k) => k / (observed.length - 1)),
      y: observed,
      sizes: share.map((s) => 5 + 16 * Math.sqrt(s ?? 0)),
    });
    drawCurves(plots[0], traces(said), [t("saidAxis"), t("seenAxis")], { shapes: [diagonal()] });
    const roc = ({ hit, false: alarm }) => ({ x: alarm, y: hit });
    drawCurves(plots[1], traces(roc), [t("falseAxis"), t("hitAxis")], { shapes: [diagonal()] });
    const value = (one) => ({ x: ratios, y: one.value, sizes: 3 });
    drawCurves(plots[2], traces(value), [t("ratioAxis"), t("valueAxis")], { y: [-0.2, 1.03], shapes: [levelLine(0)] });
    if (plots[3]) {
      const wide = { x: [sizes[0] - 1, sizes.at(-1) + 1], ticks: { tickvals: sizes } };
      drawCurves(plots[3], traces(({ fss }) => ({ x: sizes, y: fss })), [t("cellsAxis"), t("fssAxis")], wide);
    }
  };
});

section("drift", content.drift, (body) => {
  const bar = controls(body);
  const kinds = ["mean", "variance", "energy"].filter((kind) => Object.keys(content.drift[kind].truth).length);
  const words = { mean: "driftMean", variance: "driftVariance", energy: "driftEnergy" };
  const kindOf = select(bar, "quantity", "quantity", () => kinds.map((kind) => [kind, t(words[kind])]));
  const channelOf = select(bar, "channel", "channel", (kind) => channelOptions(Object.keys(content.drift[kind].truth)));
  const names = legend(body);
  const [title, plot] = figure(body, "drift-plot");
  return () => {
    const kind = kindOf();
    const channel = channelOf(kind);
    const table = content.drift[kind];
    const shown = names(modelsIn(table), [[t("truth"), TRUTH]]);
    const own = channelInfo(channel).unit;
    const unit = kind === "energy" ? prettyUnit("m2 s-2") : prettyUnit(own, kind === "variance" ? 2 : 1);
    const lines = [["truth", TRUTH], ...shown.map((m) => [m, styles.get(m)])];
    const traces = lines.map(([name, style]) => {
      const text = escapeMarks(name === "truth" ? t("truth") : modelText(name));
      return {
        type: "scatter",
        mode: "lines",
        x: leads,
        y: table[name][channel],
        line: line(style),
        customdata: table[name][channel].map((v) => withUnit(num(v, 6), unit)),
        hovertemplate: `${text}  <b>%{customdata}</b><extra></extra>`,
      };
    });
    title.textContent = `${t(words[kind])} · ${channelText(channel)}`;
    const range = padded(lines.flatMap(([name]) => table[name][channel]));
    draw(plot, traces, { xaxis: leadAxis(), yaxis: axis(axisTitle(t(words[kind]), unit), { range }) }, narrow() ? 280 : 360);
  };
});
