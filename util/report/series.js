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
  return known(latitude) ? `${name} (${latitudeText(latitude)}, ${longitudeText(longitude)})` : t("areaMean");
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
  return () => {
    const [channel, point, lead] = [channelOf(), pointOf(), leadOf()];
    const i = hours.indexOf(lead);
    const of = (table) => table[channel]?.[i]?.[point];
    const present = modelsIn(series.models).filter((m) => of(series.models[m]));
    const shown = names(present, [[t("truth"), TRUTH]]);
    const forecasts = shown.map((m) => [modelText(m), styles.get(m), of(series.models[m])]);
    const lines = [[t("truth"), TRUTH, of(series.truth)], ...forecasts]; // 真值垫在下面，粗一些
    const exponent = exponentOf(lines.flatMap(([, , values]) => values));
    const unit = prettyUnit(channelInfo(channel).unit);
    const traces = lines.map((one) => seriesTrace(one, series.valid_times[i], unit, exponent));
    title.textContent = `${channelText(channel)} · ${pointText(series.points[point])} · ${leadText(lead)}`;
    const xaxis = timeAxis(t("validAxis"), plot.clientWidth);
    const yaxis = axis(axisTitle(channel, scaledUnit(unit, exponent)));
    draw(plot, traces, { margin: { b: 60 }, xaxis, yaxis }, narrow() ? 300 : 380);
  };
}

section("series", content.series?.points.length, buildSeries, {
  caption: TOUCH ? "seriesCaptionTouch" : "seriesCaption",
});
