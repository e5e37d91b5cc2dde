// 分区评分卡：通道 × 区域 × 时效的三角，大小是误差的相对变化，实心是 95 % 区间不含零。
Object.assign(WORDS, {
  cards: ["By region", "分区"],
  cardsTitle: ["Scorecard by region", "分区评分卡"],
  cardsCaption: [
    "▲ better, ▼ worse than the reference; larger is a larger change, filled is significant (95 % block bootstrap).",
    "▲ 优于、▼ 劣于参考预报；越大变化越大，实心为显著（分块自助法 95% 区间不含零）。",
  ],
  cardsNoInterval: [
    "Hollow: not significant, or too few weeks for an interval.",
    "空心：不显著，或周数太少、没有区间。",
  ],
  cardsTip: ["{0}: {1} %", "{0}：{1}%"],
  cardsRange: ["{0}: {1} % ({2} to {3})", "{0}：{1}%（{2} 至 {3}）"],
});
const FULL_CHANGE = 20; // 变化到这么多（%）三角就不再变大
const GOOD = "#2166ac";
const BAD = "#b2182b";

function triangle(skill, i, place) {
  const value = skill?.value[i];
  if (!known(value)) return td("–", "triangle none");
  const [low, high] = [skill.low?.[i], skill.high?.[i]];
  const sure = known(low) && low * high > 0;
  const glyph = value >= 0 ? (sure ? "▲" : "△") : sure ? "▼" : "▽";
  const [change, from, to] = [-value, -high, -low].map((v) => percent(v * 100));
  const title = known(low) ? t("cardsRange", place, change, from, to) : t("cardsTip", place, change);
  const mark = el("span", { role: "img", "aria-label": title }, glyph);
  mark.style.fontSize = `${Math.round(11 + 11 * Math.sqrt(Math.min(1, (Math.abs(value) * 100) / FULL_CHANGE)))}px`;
  mark.style.color = readable(value >= 0 ? GOOD : BAD);
  return el("td", { class: "triangle", title }, mark);
}

const cardRegions = [...new Set([WHOLE, ...cells.map((c) => c.region)])];
const cardReferences = () => {
  const first = skillReferences.filter((name) => name === content.scorecard);
  return [...new Set([...first, ...skillReferences])].map((name) => [name, modelText(name)]);
};

section("cards", skillReferences.length && (content.scorecard || cells.length), (body) => {
  const bar = controls(body);
  const referenceOf = select(bar, "cardsReference", "reference", cardReferences);
  const modelOf = select(bar, "model", "model", (base) => {
    return skillModels.filter((m) => content.skill[m][base]).map((m) => [m, modelText(m)]);
  });
  const metricOf = select(bar, "skillMetric", "metric", (base) => {
    state.cell = content;
    const all = scoredChannels.flatMap((channel) => skillMetrics(channel, base));
    return all.filter(([m], i) => all.findIndex(([other]) => other === m) === i);
  });
  const periodOf = select(bar, "period", "period", () => {
    return [...new Set([WHOLE, ...cells.map((c) => c.period)])].map((p) => [p, periodText(p)]);
  });
  const title = body.appendChild(el("p", { class: "tabletitle" }));
  const table = body.appendChild(el("div", { class: "scroll tall" }));
  body.append(say(el("p", { class: "note" }), () => t("cardsNoInterval")));
  return () => {
    const base = referenceOf();
    const [model, metric, period] = [modelOf(base), metricOf(base), periodOf()];
    const at = (region) => (region === WHOLE && period === WHOLE ? content : cells.find((c) => c.region === region && c.period === period));
    const shown = cardRegions.filter(at);
    const heading = t("cardTitle", metricInfo(metric).name, modelText(base));
    title.textContent = `${heading} · ${modelText(model)}${period === WHOLE ? "" : ` · ${periodText(period)}`}`;
    const names = shown.map((r) => th(regionText(r), { class: "triangle first", colspan: leads.length, scope: "colgroup" }));
    const hours = shown.flatMap(() => leads.map((h, i) => th(String(h), { class: i ? "triangle" : "triangle first" })));
    const rows = scoredChannels.map((channel) => {
      const marks = shown.flatMap((region) => {
        const skill = at(region).skill[model]?.[base]?.[channel]?.[metric];
        return leads.map((hour, i) => {
          const cell = triangle(skill, i, `${channel}, ${regionText(region)}, ${leadText(hour)}`);
          if (!i) cell.classList.add("first");
          return cell;
        });
      });
      return tr(th(channel, { scope: "row", title: channelText(channel) }), ...marks);
    });
    const heads = [tr(th(t("channel"), { rowspan: 2 }), ...names), tr(...hours)];
    fillTable(table, title.textContent, heads, rows, "triangles");
  };
});
