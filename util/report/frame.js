// 页面的骨架：数据、状态、分段登记、换语言、只画看得见的段。
const content = JSON.parse(document.getElementById("content").textContent);
const LANGUAGES = { en: { tag: "en", name: "EN" }, zh: { tag: "zh-CN", name: "中文" } };
const STORE = "ar_pred report language";
const state = {
  language: firstLanguage(),
  channel: null,
  lead: null,
  metric: "rmse",
  skillMetric: null,
  reference: null,
  model: null,
  point: 0,
  time: 0,
  roll: 0,
  span: null, // 序列看哪一段，毫秒；null 是末尾三十天
  hidden: new Set(),
  region: null,
  period: null,
  cell: content, // 正在画的一段里选中的区域与时段的成绩
};
const sections = []; // {id, node, draw, dirty, visible}
const spoken = []; // 换语言时要重写的文字

function firstLanguage() {
  try {
    const saved = localStorage.getItem(STORE);
    if (Object.hasOwn(LANGUAGES, saved)) return saved;
  } catch {
    /* 从磁盘打开时有的浏览器不给存储；那就每次按系统语言 */
  }
  return (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
}

function rememberLanguage(language) {
  try {
    localStorage.setItem(STORE, language);
  } catch {
    /* 记不住而已 */
  }
}

function setLanguage(language) {
  state.language = language;
  document.documentElement.lang = LANGUAGES[language].tag;
  spoken.forEach((write) => write());
  redraw();
}

const inChinese = () => state.language === "zh";

function t(key, ...values) {
  return WORDS[key][inChinese() ? 1 : 0].replace(/\{(\d)\}/g, (_, i) => values[i]);
}

// 引擎写来的一句：两种语言的 {en, zh} 取一种，字符串与数照原样
const phrase = (said) => (said?.zh ? said[inChinese() ? "zh" : "en"] : valueText(said));

// 引擎写来的标签与名字：认得的译成中文，其余照原样
function label(text) {
  const own = phrase(text);
  return (inChinese() && LABELS[own.toLowerCase().replaceAll("_", " ")]) || own;
}

// node 的文字由 make() 给出，换语言时重写
function say(node, make) {
  const write = () => {
    node.textContent = make();
  };
  spoken.push(write);
  write();
  return node;
}

// 登记一段；needed 缺就没有标题也没有菜单项。build(body) 建好控件，返回「按现在的状态重画」的函数
function section(id, needed, build, { title = `${id}Title`, caption = `${id}Caption` } = {}) {
  if (!needed) return;
  const node = el("section", { id, "aria-labelledby": `${id}-heading` });
  node.append(say(el("h2", { id: `${id}-heading` }), () => t(WORDS[title] ? title : id)));
  if (WORDS[caption]) node.append(say(el("p", { class: "caption" }), () => t(caption)));
  document.getElementById("page").append(node);
  sections.push({ id, node, draw: build(node), dirty: true, visible: false });
}

function drawDirty(wanted = (part) => part.visible) {
  for (const part of sections) {
    if (part.dirty && wanted(part)) {
      part.dirty = false;
      part.draw();
    }
  }
}

// 跳到一段之前把它和上面的都画好：画出来会变高，不先画，落点就不准
function drawUpTo(id) {
  const last = sections.findIndex((part) => part.id === id);
  drawDirty((part) => sections.indexOf(part) <= last);
}

function redraw() {
  readColors();
  for (const part of sections) part.dirty = true;
  drawDirty();
}

function change(values) {
  Object.assign(state, values);
  redraw();
}

const controls = (body) => body.appendChild(el("div", { class: "controls" }));

// 一个下拉框；options(…) 给出 [[值, 文字], …]。返回的函数按现在的状态摆好选项（它的参数交给 options），并给出选中的值：
// 同名的选择各段联动，某段没有这个值时用它自己的第一个；只有一个选项时不显示
function select(bar, key, word, options) {
  let list = [];
  const box = el("select", { "data-key": key, onchange: () => change({ [key]: list[box.selectedIndex][0] }) });
  const name = say(el("span"), () => t(word));
  const holder = bar.appendChild(el("label", { class: "control" }, name, box));
  return (...given) => {
    const wanted = options(...given);
    if (JSON.stringify(wanted) !== JSON.stringify(list)) {
      list = wanted;
      box.replaceChildren(...list.map(([, text]) => el("option", {}, text)));
    }
    const place = list.findIndex(([value]) => value === state[key]);
    box.selectedIndex = Math.max(0, place);
    holder.hidden = list.length < 2;
    return list[box.selectedIndex]?.[0];
  };
}

// 通道与评分
const channels = content.channels ?? [];
const leads = content.lead_hours ?? [];
const oneLead = leads.length === 1;

function channelInfo(name) {
  return channels.find((c) => c.name === name) ?? { name, long_name: "", unit: "", kind: "other" };
}

function channelText(name) {
  const { long_name: longName } = channelInfo(name);
  return longName && longName !== name ? `${name} — ${label(longName)}` : name;
}

const channelOptions = (names) => names.map((name) => [name, channelText(name)]);
const leadOptions = (hours) => hours.map((h) => [h, leadText(h)]);

function metricInfo(metric) {
  const found = METRICS.find(([key]) => key === metric);
  if (found) {
    const name = found[inChinese() ? 2 : 1];
    const [acronym] = /[A-Z]{3,}$/.exec(name) ?? [name]; // 坐标轴与表头上用短的：均方根误差 RMSE → RMSE
    return { name, short: acronym, unit: found[3], best: found[4] };
  }
  const [, threshold] = /^brier>(.*)$/.exec(metric) ?? [];
  const name =
    threshold === undefined ? metric : inChinese() ? `Brier 评分（> ${threshold}）` : `Brier score, > ${threshold}`;
  return { name, short: name, unit: "", best: threshold === undefined ? "neutral" : "lower" };
}

function metricUnit(metric, channel) {
  const { unit } = metricInfo(metric);
  const own = channelInfo(channel).unit;
  return unit === "unit" ? prettyUnit(own) : unit === "unit2" ? prettyUnit(own, 2) : unit;
}

// 这些通道里有数的评分；RMSE 总在最前，别的通道才有的评分被选着时就退回到它
function metricOptions(...names) {
  const present = new Set();
  for (const byChannel of Object.values(state.cell.scores ?? {})) {
    for (const byMetric of names.map((name) => byChannel[name] ?? {}))
      for (const [metric, values] of Object.entries(byMetric)) if (values.some(known)) present.add(metric);
  }
  const order = METRICS.map(([key]) => key);
  const place = (metric) => (order.includes(metric) ? order.indexOf(metric) : order.length);
  return [...present].sort((a, b) => place(a) - place(b)).map((m) => [m, metricInfo(m).name]);
}

// 区域与时段：各段的成绩取自 state.cell，默认是整个网格的全部时间
const WHOLE = "all";
const cells = (content.cells ?? []).map((cell) => (content.cell_leads ? spreadOut(cell) : cell));

// 一格的数只有几个时效：摊到页面的全部时效上，别的空着
function spreadOut(part) {
  if (Array.isArray(part)) return leads.map((_, i) => part[content.cell_leads.indexOf(i)] ?? null);
  if (part === null || typeof part !== "object") return part;
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, spreadOut(value)]));
}

const cellAt = (region, period) => cells.find((c) => c.region === region && c.period === period) ?? content;
const regionText = (name) => (name === WHOLE ? t("wholeGrid") : label(name));
const periodText = (name) => (name === WHOLE ? t("allTimes") : label(name));
const regionOptions = () => [...new Set([WHOLE, ...cells.map((c) => c.region)])].map((r) => [r, regionText(r)]);

function periodOptions(region) {
  const own = cells.filter((c) => c.region === region).map((c) => c.period);
  return [...new Set([WHOLE, ...own])].map((p) => [p, periodText(p)]);
}

// 两个下拉框；返回的函数定下 state.cell，给出标题里接着写的区域与时段（默认的不写）
function cellSelects(bar) {
  if (!cells.length) return () => "";
  const regionOf = select(bar, "region", "region", regionOptions);
  const periodOf = select(bar, "period", "period", periodOptions);
  return () => {
    const region = regionOf();
    const period = periodOf(region);
    state.cell = cellAt(region, period);
    const words = [region !== WHOLE && regionText(region), period !== WHOLE && periodText(period)];
    return words.filter(Boolean).map((word) => ` · ${word}`).join("");
  };
}

// 越小越好的次序：不论评分的方向
function badness(metric, value) {
  if (!known(value)) return Infinity;
  const { best } = metricInfo(metric);
  if (best === "lower") return value;
  if (best === "higher") return -value;
  if (best === "zero") return Math.abs(value);
  return best === "one" ? Math.abs(Math.log(Math.max(value, 1e-12))) : Infinity; // 两倍与一半一样远
}
