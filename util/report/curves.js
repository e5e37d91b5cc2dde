// 训练与验证的损失。
const LOSS = {
  train: { color: "#0072B2", dash: "solid", width: 2.2 },
  val: { color: "#D55E00", dash: "solid", width: 2.2, symbol: "circle" },
  persistence: { color: "#777777", dash: "dash", width: 1.6 },
  climatology: { color: "#777777", dash: "dot", width: 1.6 },
};

// [[步, 值]] 的居中滑动平均，两端窗口变短
function runningMean(points, width) {
  const sums = [0];
  for (const [, value] of points) sums.push(sums.at(-1) + value);
  return points.map(([step], i) => {
    const [low, high] = width === 1 ? [i, i + 1] : [Math.max(0, i - width), Math.min(points.length, i + width + 1)];
    return [step, (sums[high] - sums[low]) / (high - low)];
  });
}

const lossPoints = (name) => (content.curves?.[name] ?? []).filter(([, value]) => known(value));

function lossTrace(points, style, name, more = {}) {
  return {
    type: "scatter",
    mode: "lines",
    x: points.map((p) => p[0]),
    y: points.map((p) => p[1]),
    line: line(style),
    customdata: points.map((p) => num(p[1])),
    hovertemplate: `${name}  <b>%{customdata}</b><extra></extra>`,
    ...more,
  };
}

// 训练的原值（淡）与滑动平均、验证、最低处的圆环
function lossTraces(train, smooth, val, best) {
  const traces = [];
  const faint = { opacity: 0.28, hoverinfo: "skip", hovertemplate: null };
  if (train.length)
    traces.push(lossTrace(train, { ...LOSS.train, width: 1 }, "", faint), lossTrace(smooth, LOSS.train, t("train")));
  if (!best) return traces;
  const ring = { size: 14, color: "rgba(0,0,0,0)", line: { color: LOSS.val.color, width: 1.6 } };
  const dots = { mode: "lines+markers", marker: { size: 6, color: LOSS.val.color } };
  return [
    ...traces,
    lossTrace(val, LOSS.val, t("validation"), dots),
    { type: "scatter", mode: "markers", x: [best[0]], y: [best[1]], hoverinfo: "skip", marker: ring },
  ];
}

section("curves", lossPoints("train").length + lossPoints("val").length, (body) => {
  const names = legend(body);
  const [title, plot] = figure(body, "curves-plot");
  const train = lossPoints("train");
  const val = lossPoints("val");
  const smooth = runningMean(train, Math.max(1, Math.floor(train.length / 40)));
  const best = val.reduce((low, point) => (low && low[1] <= point[1] ? low : point), null);
  const still = ["persistence", "climatology"].filter((name) => known(content.curves?.[name])); // 基线的验证损失，横线
  const steps = [...train, ...val].map((p) => p[0]);
  const across = (name) => [Math.min(...steps), Math.max(...steps)].map((step) => [step, content.curves[name]]);
  const values = [...train, ...val, ...still.flatMap(across)].map((p) => p[1]);
  const [low, high] = extent(values);
  const room = (Math.log10(high / low) || 1) * 0.06;
  const scale =
    low > 0
      ? { type: "log", range: [Math.log10(low) - room, Math.log10(high) + room], ...logTicks(low, high) }
      : { range: padded(values) };
  return () => {
    const lines = [
      train.length && [t("train"), LOSS.train],
      val.length && [t("validation"), LOSS.val],
      ...still.map((name) => [t(`${name}Loss`), LOSS[name]]),
    ];
    const traces = lossTraces(train, smooth, val, best);
    for (const name of still) traces.push(lossTrace(across(name), LOSS[name], t(`${name}Loss`)));
    names([], lines.filter(Boolean));
    title.textContent = best ? t("bestLoss", num(best[1]), integer(best[0])) : "";
    const xaxis = axis(t("step"), { rangemode: "tozero", unifiedhovertitle: { text: `${t("step")} %{x}` } });
    draw(plot, traces, { xaxis, yaxis: axis(t("loss"), scale) }, narrow() ? 280 : 360);
  };
});
