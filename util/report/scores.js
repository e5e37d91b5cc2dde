// 各时效的评分、技巧评分、评分表。
const BEST_AT = { zero: 0, one: 1 };

function countText(channel) {
  const counts = state.cell.fields?.[channel];
  if (!counts) return "";
  const [scored, leftOut] = [countSpan(counts.scored), countSpan(counts.left_out)];
  return leftOut === "0" ? t("counted", scored) : t("countedOut", scored, leftOut);
}

// 一个评分、一个通道：每个模型一条线
function scoreLines(plot, names, metric, channel) {
  const of = (name) => state.cell.scores[name][channel][metric];
  const exponent = exponentOf(names.flatMap(of));
  const unit = metricUnit(metric, channel);
  const { short, best } = metricInfo(metric);
  const lines = names.map((name) => ({
    name,
    values: of(name).map((v) => (known(v) ? v / 10 ** exponent : null)),
    hover: of(name).map((v) => `<b>${withUnit(num(v), unit)}</b>`),
  }));
  const ideal = best in BEST_AT ? [BEST_AT[best]] : [];
  const range = padded([...lines.flatMap((one) => one.values), ...ideal], best === "lower" || best === "neutral");
  const levels = ideal.map((value) => levelLine(value, { color: QUIET, width: 1, dash: "dot" }));
  leadLines(plot, lines, {
    title: axisTitle(short, scaledUnit(unit, exponent)),
    range,
    levels,
    height: narrow() ? 300 : 380,
  });
}

function scoreBars(plot, names, metric, channel) {
  const values = names.map((m) => state.cell.scores[m][channel][metric][0]);
  const exponent = exponentOf(values);
  const unit = metricUnit(metric, channel);
  const rows = names.map((name, i) => {
    const value = known(values[i]) ? values[i] / 10 ** exponent : null;
    const hover = `${escapeMarks(modelText(name))}  <b>${withUnit(num(values[i]), unit)}</b>`;
    return { name, value, text: num(value), hover };
  });
  bars(plot, rows, axisTitle(metricInfo(metric).short, scaledUnit(unit, exponent)));
}

function buildScores(body) {
  const bar = controls(body);
  const cellOf = cellSelects(bar);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(scoredChannels));
  const metricOf = select(bar, "metric", "metric", metricOptions);
  const names = legend(body);
  const [title, plot] = figure(body, "scores-plot");
  const note = body.appendChild(el("p", { class: "note" }));
  return () => {
    const where = cellOf();
    const channel = channelOf();
    const metric = metricOf(channel);
    const { name, best } = metricInfo(metric);
    const present = modelsIn(content.scores).filter((m) => state.cell.scores[m][channel]?.[metric]?.some(known));
    title.textContent = `${name} · ${channelText(channel)}${oneLead ? ` · ${leadText(leads[0])}` : ""}${where}`;
    note.textContent = [t(best), countText(channel)].filter(Boolean).join(inChinese() ? "" : " ");
    (oneLead ? scoreBars : scoreLines)(plot, names(present), metric, channel);
  };
}

const scoresWords = oneLead ? { title: "scores", caption: "scoresCaptionOne" } : {};
section("scores", scoredChannels.length, buildScores, scoresWords);

const skillText = ({ value, low, high }, i) =>
  `<b>${num(value[i], 3)}</b>${known(low?.[i]) ? `  (${num(low[i], 3)} … ${num(high[i], 3)})` : ""}`;

// 技巧评分：1 − 模型 / 参考，附自助法区间；日期太少时没有区间。of(name): {value, low, high}
function skillLines(plot, names, of, title) {
  const range = padded([...names.flatMap((m) => [...of(m).value, ...(of(m).low ?? []), ...(of(m).high ?? [])]), 0]);
  const bands = names.map((name) => {
    const inside = leads.map((h, i) => [h, of(name).low?.[i], of(name).high?.[i]]).filter((p) => p.every(known));
    const hours = inside.map(([hour]) => hour);
    return {
      type: "scatter",
      mode: "lines",
      x: [...hours, ...[...hours].reverse()],
      fill: "toself",
      line: { width: 0 },
      hoverinfo: "skip",
      y: [...inside.map(([, low]) => low), ...inside.map(([, , high]) => high).reverse()],
      fillcolor: rgba(styles.get(name).color, 0.16),
    };
  });
  const lines = names.map((name) => ({
    name,
    values: of(name).value,
    hover: leads.map((_, i) => skillText(of(name), i)),
  }));
  leadLines(plot, lines, {
    title,
    range,
    levels: [levelLine(0, { color: QUIET })],
    under: bands,
    height: narrow() ? 280 : 340,
  });
}

const skillModels = modelsIn(content.skill);
const skillReferences = [...new Set(skillModels.flatMap((m) => Object.keys(content.skill[m])))];

// 这一通道、这一参考有技巧评分的评分
function skillMetrics(channel, reference) {
  const has = (m, metric) => state.cell.skill[m]?.[reference]?.[channel]?.[metric]?.value.some(known);
  return metricOptions(channel).filter(([metric]) => skillModels.some((m) => has(m, metric)));
}

function buildSkill(body) {
  const bar = controls(body);
  const cellOf = cellSelects(bar);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(scoredChannels));
  const referenceOf = select(bar, "reference", "reference", () => skillReferences.map((b) => [b, modelText(b)]));
  const metricOf = select(bar, "skillMetric", "metric", skillMetrics);
  const names = legend(body);
  const [title, plot] = figure(body, "skill-plot");
  return () => {
    const where = cellOf();
    const channel = channelOf();
    const reference = referenceOf();
    const metric = metricOf(channel, reference);
    const of = (m) => state.cell.skill[m]?.[reference]?.[channel]?.[metric];
    const shown = names(skillModels.filter((m) => of(m)));
    const formula = metric ? t("skillFormula", metricInfo(metric).short, modelText(reference)) : t("skillTitle");
    title.textContent = `${formula} · ${channelText(channel)}${where}`;
    if (!oneLead) return skillLines(plot, shown, of, t("skillAxis"));
    const row = (name) => {
      const [value, low, high] = ["value", "low", "high"].map((key) => of(name)[key]?.[0]);
      return {
        name,
        value,
        low,
        high,
        text: num(value, 3),
        hover: `${escapeMarks(modelText(name))}  ${skillText(of(name), 0)}`,
      };
    };
    return bars(plot, shown.map(row), t("skillAxis"), true);
  };
}

section("skill", skillReferences.length, buildSkill, { caption: oneLead ? "skillCaptionOne" : "skillCaption" });

// 可点列名排序的表。columns: 列名，rows: [{name, values, texts}]；badnessOf(列, 值) 越小越好，最好的加粗
function sortedTable(holder, caption, first, columns, rows, badnessOf) {
  const order = { column: null, up: true };
  const own = rows.filter((r) => !published.includes(r.name)); // 发表的做法不同，不与自己的争最好
  const best = columns.map((_, c) => Math.min(...own.map((r) => badnessOf(c, r.values[c]))));
  const sortBy = (c) => {
    order.up = order.column === c ? !order.up : true;
    order.column = c;
    paint();
  };
  const heading = (text, c) => {
    const mark = order.column === c ? (order.up ? "ascending" : "descending") : "none";
    const button = el("button", { type: "button", onclick: () => sortBy(c) }, text);
    return th(button, { class: c < 0 ? "" : "number", "aria-sort": mark });
  };
  const bodyRow = ({ name, values, texts }) => {
    const winner = (c) => own.length > 1 && !published.includes(name) && badnessOf(c, values[c]) === best[c] && best[c] < Infinity;
    const mark = styles.has(name) ? [swatch(styles.get(name))] : [];
    return tr(
      th([...mark, modelText(name)], { scope: "row" }),
      ...texts.map((s, c) => td(s, winner(c) ? "number best" : "number")),
    );
  };
  function paint() {
    const sorted = [...rows];
    if (order.column === -1) sorted.sort((a, b) => modelText(a.name).localeCompare(modelText(b.name)));
    else if (order.column !== null) sorted.sort((a, b) => compareKnown(a.values[order.column], b.values[order.column]));
    if (!order.up) sorted.reverse();
    fillTable(holder, caption, tr(heading(first, -1), ...columns.map(heading)), sorted.map(bodyRow), "sortable");
  }
  paint();
}

function compareKnown(a, b) {
  // 没有的排在最后
  if (typeof a === "string" || typeof b === "string") return String(a ?? "").localeCompare(String(b ?? ""));
  return (known(a) ? a : Infinity) - (known(b) ? b : Infinity) || 0;
}

section("table", scoredChannels.length, (body) => {
  const caption = body.querySelector(".caption");
  const bar = controls(body);
  const cellOf = cellSelects(bar);
  const channelOf = select(bar, "channel", "channel", () => channelOptions(scoredChannels));
  const metricOf = oneLead ? null : select(bar, "metric", "metric", metricOptions);
  const title = body.appendChild(el("p", { class: "tabletitle" }));
  const table = body.appendChild(el("div", { class: "scroll heads" }));
  return () => {
    const where = cellOf();
    const channel = channelOf();
    const names = modelsIn(content.scores).filter((m) => state.cell.scores[m][channel]);
    const metric = metricOf?.(channel);
    const columns = oneLead ? metricOptions(channel).map(([m]) => [m, leads[0]]) : leads.map((lead) => [metric, lead]);
    const used = columns.filter(([m, lead]) => names.some((name) => known(score(name, channel, m, lead))));
    const units = used.map(([m, lead]) => {
      const peers = oneLead ? [lead] : leads; // 同一个评分各时效用同一个 10 的幂
      const exponent = exponentOf(names.flatMap((name) => peers.map((h) => score(name, channel, m, h))));
      return [exponent, scaledUnit(metricUnit(m, channel), exponent)];
    });
    const rows = names.map((name) => {
      const values = used.map(([m, lead]) => score(name, channel, m, lead));
      return { name, values, texts: values.map((v, i) => num(known(v) ? v / 10 ** units[i][0] : v)) };
    });
    caption.textContent = oneLead ? t("tableCaptionOne", leadText(leads[0])) : t("tableCaption");
    const what = oneLead
      ? channelText(channel)
      : `${axisTitle(metricInfo(metric).name, units[0]?.[1])} · ${channelText(channel)}`;
    title.textContent = what + where;
    const heads = used.map(([m, lead], i) => (oneLead ? axisTitle(metricInfo(m).short, units[i][1]) : leadText(lead)));
    sortedTable(table, title.textContent, t("model"), heads, rows, (c, v) => badness(used[c][0], v));
  };
});
