// 时间序列：真值与各模型在一点或区域平均。
function timeAxis(title, width) {
  const zh = inChinese();
  return axis(title, {
    type: "date",
    hoverformat: "%Y-%m-%d %H",
    nticks: Math.max(3, Math.floor(width / 90)),
    tickangle: 0,
    tickformatstops: [
      { dtickrange: [null, 43200000], value: zh ? "%H 时\n%Y-%m-%d" : "%H:%M\n%-d %b %Y" },
      { dtickrange: [43200001, "M1"], value: zh ? "%-m月%-d日\n%Y年" : "%-d %b\n%Y" },
      { dtickrange: ["M1", "M12"], value: zh ? "%Y年%-m月" : "%b %Y" },
      { dtickrange: ["M12", null], value: "%Y" },
    ],
    unifiedhovertitle: { text: "%{x} UTC" },
  });
}

function pointText({ name, latitude, longitude }) {
  return known(latitude) ? `${label(name)} (${latitudeText(latitude)}, ${longitudeText(longitude)})` : t("areaMean");
}

// 一条线。style 是线型，点少时画出点
function seriesTrace([name, style, values], times, unit, exponent) {
  return {
    type: "scatter",
    mode: times.length < 60 ? "lines+markers" : "lines",
    x: times,
    y: values.map((v) => (known(v) ? v / 10 ** exponent : null)),
    line: { ...line(style), width: style === TRUTH ? 2.6 : 1.4 },
    marker: { size: 4, color: style.color },
    customdata: values.map((v) => withUnit(num(v), unit)),
    hovertemplate: `${escapeMarks(name)}  <b>%{customdata}</b><extra></extra>`,
  };
}

function buildSeries(body) {
  const series = content.series;
  const hours = series.lead_hours ?? leads; // 序列的时效可以少于成绩的
  const bar = controls(body);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(Object.keys(series.truth)));
  const pointOf = select(bar, "point", "point", () => series.points.map((p, i) => [i, pointText(p)]));
  const leadOf = select(bar, "lead", "lead", () => leadOptions(hours));
  const names = legend(body);
  const [title, plot] = figure(body, "series-plot");
  const showSpan = brush(body, paint);
  function paint() {
    const [channel, point, lead] = [channelOf(), pointOf(), leadOf()];
    const i = hours.indexOf(lead);
    const of = (table) => table[channel]?.[i]?.[point];
    const present = modelsIn(series.models).filter((m) => of(series.models[m]));
    const shown = names(present, [[t("truth"), TRUTH]]);
    const times = series.valid_times[i].map(instant);
    const whole = [times[0], times.at(-1)];
    const span = shownSpan(whole);
    const first = Math.max(0, times.findIndex((time) => time >= span[0]) - 1); // 窗口外各多一个：线画到边
    const after = times.findIndex((time) => time > span[1]);
    const cut = (values) => values.slice(first, after < 0 ? times.length : after + 1);
    const forecasts = shown.map((m) => [modelText(m), styles.get(m), cut(of(series.models[m]))]);
    const lines = [[t("truth"), TRUTH, cut(of(series.truth))], ...forecasts]; // 真值垫在下面，粗一些
    const exponent = exponentOf(of(series.truth)); // 换一段看，单位不变
    const unit = prettyUnit(channelInfo(channel).unit);
    const traces = lines.map((one) => seriesTrace(one, cut(series.valid_times[i]), unit, exponent));
    const when = span[1] - span[0] < whole[1] - whole[0] ? ` · ${spanText(span)}` : "";
    title.textContent = `${channelText(channel)} · ${pointText(series.points[point])} · ${leadText(lead)}${when}`;
    showSpan(times, of(series.truth));
    const xaxis = timeAxis(t("validAxis"), plot.clientWidth);
    if (when) xaxis.range = span.map((time) => new Date(time).toISOString().slice(0, 16));
    const yaxis = axis(axisTitle(channel, scaledUnit(unit, exponent)));
    draw(plot, traces, { margin: { b: 60 }, xaxis, yaxis }, narrow() ? 300 : 380);
  }
  return paint;
}

section("series", content.series?.points.length, buildSeries, {
  caption: TOUCH ? "seriesCaptionTouch" : "seriesCaption",
});
