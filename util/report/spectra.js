// 功率谱（纬向波数的，--events 时还有总波数的）与秩直方图。
function spectrumTrace(spectra, [name, style, values], unit) {
  return {
    type: "scatter",
    mode: "lines",
    x: spectra.wavenumber,
    y: values.map((v) => (known(v) && v > 0 ? v : null)),
    line: line(style), // 对数轴上没有零
    customdata: values.map((p) => withUnit(num(p), unit)),
    hovertemplate: `${escapeMarks(name)}  <b>%{customdata}</b><extra></extra>`,
  };
}

// 双对数的一幅。lines: [[名字, 线型, 值]]；ratio 时是与真值之比，标出 1
function drawSpectra(spectra, plot, lines, title, unit, ratio) {
  const { wavenumber, label: name } = spectra;
  let [low, high] = extent(lines.flatMap(([, , values]) => values.filter((p) => p > 0)));
  if (low > high) [low, high] = [0.1, 1];
  low = Math.max(low, high * 1e-12); // 再低的是舍入误差
  if (ratio) [low, high] = [Math.min(Math.max(low, 1e-3), 0.5), Math.max(Math.min(high, 1e3), 1.5)];
  const along = WORDS[name] ? t(name) : name;
  const room = Math.log10(high / low) * 0.05;
  const ends = [wavenumber[0], wavenumber.at(-1)];
  const layout = {
    xaxis: axis(along, {
      type: "log",
      ...logTicks(...ends, true),
      range: [Math.log10(ends[0]) - 0.03, Math.log10(ends[1]) + 0.03],
      unifiedhovertitle: { text: `${along} %{x}` },
    }),
    yaxis: axis(title, {
      type: "log",
      ...logTicks(low, high),
      range: [Math.log10(low) - room, Math.log10(high) + room],
    }),
    shapes: ratio ? [levelLine(1)] : [],
  };
  draw(
    plot,
    lines.map((one) => spectrumTrace(spectra, one, unit)),
    layout,
    narrow() ? 290 : 360,
  );
}

const buildSpectra = (id) => (body) => {
  const spectra = content[id];
  const hours = spectra.lead_hours ?? leads; // 谱的时效可以少于成绩的
  const bar = controls(body);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(Object.keys(spectra.truth)));
  const leadOf = select(bar, "lead", "lead", () => leadOptions(hours));
  const names = legend(body);
  const pair = body.appendChild(el("div", { class: "pair" }));
  const [title, plot] = figure(pair, `${id}-plot`);
  const [ratioTitle, ratioPlot] = figure(pair, id === "spectra" ? "ratio-plot" : `${id}-ratio-plot`);
  return () => {
    const channel = channelOf();
    const lead = leadOf();
    const i = hours.indexOf(lead);
    const shown = names(
      modelsIn(spectra.models).filter((m) => spectra.models[m][channel]?.[i]),
      [[t("truth"), TRUTH]],
    );
    const truth = spectra.truth[channel][i];
    const unit = prettyUnit(channelInfo(channel).unit, 2);
    const lines = shown.map((m) => [modelText(m), styles.get(m), spectra.models[m][channel][i]]);
    const ratios = lines.map(([name, style, values]) => [
      name,
      style,
      values.map((v, k) => (known(v) && truth[k] > 0 ? v / truth[k] : null)),
    ]);
    title.textContent = `${t("powerTitle")} · ${channelText(channel)} · ${leadText(lead)}`;
    ratioTitle.textContent = t("ratioTitle");
    drawSpectra(spectra, plot, [[t("truth"), TRUTH, truth], ...lines], axisTitle(t("power"), unit), unit, false);
    drawSpectra(spectra, ratioPlot, ratios, t("ratio"), "", true);
  };
};

for (const id of ["spectra", "sphere"]) section(id, content[id]?.wavenumber.length, buildSpectra(id));

section("ranks", Object.keys(content.ranks ?? {}).length, (body) => {
  const bar = controls(body);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(Object.keys(content.ranks)));
  const leadOf = select(bar, "lead", "lead", () => leadOptions(leads));
  const [title, plot] = figure(body, "ranks-plot");
  const color = styles.get(contenders[0])?.color ?? COLORS[0];
  return () => {
    const channel = channelOf();
    const lead = leadOf();
    const shares = content.ranks[channel][leads.indexOf(lead)];
    const percents = shares.map((s) => (known(s) ? s * 100 : null));
    const even = 100 / shares.length;
    title.textContent = `${channelText(channel)} · ${leadText(lead)}`;
    const trace = {
      type: "bar",
      x: shares.map((_, k) => k),
      y: percents,
      marker: { color },
      width: 0.86,
      customdata: percents.map((p) => `${num(p, 3)} %`),
      hovertemplate: "<b>%{customdata}</b><extra></extra>",
    };
    const ticks = {
      showgrid: false,
      dtick: Math.ceil(shares.length / 24),
      unifiedhovertitle: { text: `${t("rank")} %{x}` },
    };
    const layout = {
      margin: { r: textWidth(t("uniform")) + 16 },
      xaxis: axis(t("rankAxis", shares.length - 1), ticks),
      yaxis: axis(t("share"), { range: [0, Math.max(...finite(percents), even) * 1.12] }),
      shapes: [{ ...levelLine(even, { dash: "dash" }), layer: "above" }],
      annotations: [
        {
          xref: "paper",
          x: 1,
          y: even,
          text: t("uniform"),
          showarrow: false,
          xanchor: "left",
          xshift: 6,
          font: { size: 12, color: INK },
        },
      ],
    };
    draw(plot, [trace], layout, narrow() ? 260 : 320);
  };
});
