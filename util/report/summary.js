// 概要：一句话、与基线之比的排名、各通道的 RMSE；评分卡。
const score = (model, channel, metric, lead) =>
  state.cell.scores?.[model]?.[channel]?.[metric]?.[leads.indexOf(lead)] ?? null;
const scoredChannels = channels.map((c) => c.name).filter((c) => models.some((m) => content.scores?.[m.name]?.[c]));

// 各通道「模型 RMSE / 基线 RMSE」的平均；只用两者都有的通道
function meanRatio(model, baseline, lead) {
  const ratios = scoredChannels.map((c) => score(model, c, "rmse", lead) / (score(baseline, c, "rmse", lead) || NaN));
  return finite(ratios).length ? mean(finite(ratios)) : null;
}

function headline(lead) {
  const best = contenders
    .filter((m) => known(meanRatio(m, baselines[0], lead)))
    .sort((a, b) => meanRatio(a, baselines[0], lead) - meanRatio(b, baselines[0], lead))[0];
  if (!best) return "";
  const parts = baselines
    .filter((b) => known(meanRatio(best, b, lead)))
    .map((b) => t("ofBaseline", ratioText(meanRatio(best, b, lead)), modelText(b)));
  const joined = inChinese() ? parts.join(t("and")) : parts.join(", ").replace(/, ([^,]*)$/, `${t("and")}$1`);
  const over = scoredChannels.length > 1 ? t("averaged", scoredChannels.length) : t("oneChannel", scoredChannels[0]);
  return t(contenders.length > 1 ? "headlineBest" : "headline", leadText(lead), best, over, joined, contenders.length);
}

// 横条：各模型与第一个基线之比
function rankingRows(lead) {
  const own = models.map((m) => m.name).filter((m) => !published.includes(m));
  const rows = own.map((m) => [m, meanRatio(m, baselines[0], lead)]).filter(([, r]) => known(r));
  rows.sort((a, b) => a[1] - b[1]);
  const most = Math.max(1, ...rows.map(([, r]) => r));
  return rows.map(([name, ratio]) => {
    const bar = el("span", { class: "fill" });
    bar.style.width = `${(ratio / most) * 100}%`;
    bar.style.background = styles.get(name).color;
    const mark = el("span", { class: "mark" });
    mark.style.left = `${100 / most}%`;
    const span = (css, ...inside) => el("span", { class: css }, ...inside);
    const parts = [
      span("name", ...breakable(modelText(name))),
      span("track", bar, mark),
      span("value", ratioText(ratio)),
    ];
    return el("div", { class: "rank" }, ...parts);
  });
}

// 一个通道一行：各模型的 RMSE，自己的里最好的加粗
function summaryRow(channel, names, lead) {
  const values = names.map((m) => score(m, channel, "rmse", lead));
  const best = Math.min(...finite(values.filter((_, i) => !published.includes(names[i]))));
  const exponent = exponentOf(values);
  const cells = values.map((v) => td(num(known(v) ? v / 10 ** exponent : v), v === best ? "number best" : "number"));
  const unit = scaledUnit(metricUnit("rmse", channel), exponent);
  return tr(th(channel, { scope: "row", title: channelText(channel) }), td(unit, "unit"), ...cells);
}

section("summary", scoredChannels.length && metricOptions(...scoredChannels).some(([m]) => m === "rmse"), (body) => {
  const sentence = body.insertBefore(el("p", { class: "headline" }), body.querySelector(".caption"));
  const bar = controls(body);
  const cellOf = cellSelects(bar);
  const leadOf = select(bar, "lead", "lead", () => leadOptions(leads));
  const names = modelsIn(content.scores);
  const table = el("div", { class: "scroll tall heads" });
  const ranking = el("div", { class: "ranking" });
  body.append(el("div", { class: names.length > 5 ? "columns stacked" : "columns" }, table, ranking));
  const { pairs, notes = [] } = content.comparison ?? {};
  if (pairs) body.append(say(el("p", { class: "note" }), () => t("pairs", integer(pairs))));
  for (const note of notes) body.append(say(el("p", { class: "note" }), () => phrase(note)));
  return () => {
    const where = cellOf();
    const lead = leadOf();
    sentence.textContent = ((baselines.length && headline(lead)) || `${t("lead")} ${leadText(lead)}`) + where;
    const heads = names.map((m) => th(breakable(modelText(m)), { class: "number" }));
    const rows = scoredChannels.map((channel) => summaryRow(channel, names, lead));
    fillTable(table, t("summaryCaption"), tr(th(t("channel")), th(t("unit")), ...heads), rows);
    const ranked = baselines.length ? rankingRows(lead) : [];
    ranking.hidden = ranked.length < 2;
    if (ranking.hidden) return;
    const first = modelText(baselines[0]);
    const caption = el("p", { class: "note" }, t("rankingCaption", first));
    ranking.replaceChildren(el("h3", {}, t("ranking", first)), el("div", { class: "rankrows" }, ...ranked), caption);
  };
});

// 评分卡：误差相对参考预报的变化；多个时效时列为时效，一个时效时列为模型
const cardMetrics = () =>
  metricOptions(...scoredChannels).filter(([m]) => metricInfo(m).best === "lower" && m !== "log_spectral_distance");

function cardColor(change) {
  // −100 % 深蓝 … 0 白 … +100 % 深红；±50 % 已近饱和
  const strength = Math.min(1, Math.abs(change) / 60) ** 0.8;
  const [r, g, b] = change < 0 ? [33, 102, 172] : [178, 24, 43];
  const background = toHex([r, g, b].map((c) => Math.round(255 + (c - 255) * strength * 0.85)));
  const ink = ["#1f2933", "#ffffff", "#000000"].find((one) => contrast(one, background) >= 4.5);
  return { background, color: ink };
}

function cardCell(model, reference, channel, metric, lead) {
  const [value, base] = [score(model, channel, metric, lead), score(reference, channel, metric, lead)];
  if (!known(value) || !known(base) || base === 0) return td("–", "card");
  const change = (value / base - 1) * 100;
  const unit = metricUnit(metric, channel);
  const text = (m, v) => `${modelText(m)} ${withUnit(num(v), unit)}`;
  const about = `${text(model, value)}, ${text(reference, base)}`;
  const cell = el("td", { class: "card", title: `${channel} ${leadText(lead)}: ${about}` }, `${percent(change)}%`);
  Object.assign(cell.style, cardColor(change));
  return cell;
}

section("scorecard", scoredChannels.length && cardMetrics().length && modelsIn(content.scores).length > 1, (body) => {
  const bar = controls(body);
  const cellOf = cellSelects(bar);
  const names = modelsIn(content.scores);
  const options = (list) => list.map((m) => [m, modelText(m)]);
  const metricOf = select(bar, "cardMetric", "metric", cardMetrics);
  const modelOf = oneLead
    ? () => null
    : select(bar, "model", "model", () => options(names.filter((m) => contenders.includes(m))));
  const referenceOf = select(bar, "cardReference", "reference", () => {
    const others = names.filter((m) => m !== modelOf());
    return options([baselines, contenders, published].flatMap((some) => others.filter((m) => some.includes(m))));
  });
  const title = body.appendChild(el("p", { class: "tabletitle" }));
  const table = body.appendChild(el("div", { class: "scroll tall" }));
  return () => {
    const where = cellOf();
    const [metric, model, reference] = [metricOf(), modelOf(), referenceOf()];
    const change = t("cardTitle", metricInfo(metric).name, modelText(reference));
    title.textContent = `${change} · ${oneLead ? leadText(leads[0]) : modelText(model)}${where}`;
    const rivals = names.filter((m) => m !== reference).map((m) => [m, leads[0], modelText(m)]);
    const columns = oneLead ? rivals : leads.map((lead) => [model, lead, leadText(lead)]);
    const having = scoredChannels.filter((channel) => metricOptions(channel).some(([m]) => m === metric));
    const rows = having.map((channel) => {
      const cells = columns.map(([m, lead]) => cardCell(m, reference, channel, metric, lead));
      return tr(th(channel, { scope: "row", title: channelText(channel) }), ...cells);
    });
    const heads = columns.map(([, , text]) => th(text, { class: "card" }));
    fillTable(table, title.textContent, tr(th(t("channel")), ...heads), rows, "cards");
  };
});
