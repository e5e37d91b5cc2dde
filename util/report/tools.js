// 小工具：建元素、数字与单位、时间与经纬度、颜色。
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children); // 文字一律成为文本节点，数据里的 HTML 不起作用
  return node;
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// 表格的零件；th 的文字可以是几个节点
const th = (text, look = {}) => el("th", { scope: "col", ...look }, ...[text].flat());
const td = (text, css = "") => el("td", { class: css }, text);
const tr = (...cells) => el("tr", {}, ...cells);

// caption 只给读屏的人：看得见的标题在表的上面。heads 是一行或几行；表比框大时，框可以用键盘滚
function fillTable(holder, caption, heads, rows, css = "") {
  const name = el("caption", { class: "unseen" }, caption);
  const head = el("thead", {}, ...[heads].flat());
  holder.replaceChildren(el("table", { class: css }, name, head, el("tbody", {}, ...rows)));
  const larger = holder.scrollWidth > holder.clientWidth + 1 || holder.scrollHeight > holder.clientHeight + 1;
  const look = { role: "region", "aria-label": caption, tabindex: "0" };
  for (const [key, value] of Object.entries(look)) {
    if (larger) holder.setAttribute(key, value);
    else holder.removeAttribute(key);
  }
}

const breakable = (text) =>
  String(text)
    .split(/(?<=[/_,])/)
    .flatMap((piece) => [piece, el("wbr")]); // 长名字、长路径在这些符号后可折行

// plotly 把 <b>、<a> 一类当作标记，数据里的名字先转义
const escapeMarks = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const finite = (values) => values.filter(known);
// [最小, 最大]，不计缺的；一个也没有时是 [Infinity, -Infinity]
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!known(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// 一组场数：都相同写一个，否则写范围
function countSpan(values) {
  const [low, high] = extent(values);
  return low === high ? integer(low) : `${integer(low)}–${integer(high)}`;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const superscript = (number) => String(number).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

// 四位有效数字；太大太小的写成 2.670×10⁻⁵
function num(value, digits = 4) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const rounded = Number(value.toPrecision(digits));
  const size = Math.abs(rounded);
  if (size < 1e-3 || size >= 1e7) {
    const [mantissa, exponent] = rounded.toExponential(digits - 1).split("e");
    return `${mantissa.replace("-", "−")}×10${superscript(Number(exponent))}`;
  }
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size) + 1e-12));
  const [whole, fraction] = size.toFixed(decimals).split(".");
  const grouped = whole.length > 4 ? whole.replace(/\B(?=(\d{3})+$)/g, ",") : whole;
  return (rounded < 0 ? "−" : "") + grouped + (fraction ? `.${fraction}` : "");
}

const ratioText = (value) => (known(value) ? value.toFixed(2) : "–");
const integer = (value) => (known(value) ? String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ",") : "–");

const valueText = (value) =>
  typeof value !== "number" ? String(value ?? "–") : Number.isInteger(value) ? integer(value) : num(value);

function percent(value) {
  const size = Math.abs(value).toFixed(Math.abs(value) < 10 ? 1 : 0);
  return Number(size) === 0 ? "0" : `${value > 0 ? "+" : "−"}${size}`;
}

function prefixed(value, base, names) {
  if (!known(value)) return "–";
  let level = 0;
  for (; value >= base && level < names.length - 1; level++) value /= base;
  return `${level ? num(value, 3) : integer(value)} ${names[level]}`.trim();
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 60) return `${num(seconds, 3)} s`;
  const [days, hours] = [Math.floor(seconds / 86400), Math.floor((seconds % 86400) / 3600)];
  const minutes = Math.floor((seconds % 3600) / 60);
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${Math.round(seconds % 60)} s`;
}

// "m2 s-2" → m² s⁻²；power 为 2 时各指数加倍
function prettyUnit(unit, power = 1) {
  if (!unit || unit === "1") return "";
  return unit
    .split(" ")
    .map((part) => {
      const [, name, exponent] = /^(.*?)(-?\d+)?$/.exec(part);
      const total = Number(exponent ?? 1) * power;
      return total === 1 || !name ? part : name + superscript(total);
    })
    .join(" ");
}

// 以米计的降水之类提出 10 的幂，刻度上才是短数字；与 matplotlib 的图同一规则
function exponentOf(values) {
  const [low, high] = extent(values);
  const largest = low > high ? 0 : Math.max(-low, high);
  return largest === 0 || (largest >= 0.01 && largest < 1e5) ? 0 : 3 * Math.floor(Math.log10(largest) / 3);
}

const scaledUnit = (unit, exponent) => (exponent ? `10${superscript(exponent)} ${unit}`.trim() : unit);
const withUnit = (text, unit) => (unit ? (unit === "%" ? `${text} %` : `${text} ${unit}`) : text);
const axisTitle = (text, unit) => (unit ? `${text} (${unit})` : text);

// ISO 时刻 → 1981-07-01 00 UTC；分钟不为零才写
function clock(time, hours = 0) {
  const [, year, month, day, hour, minute] = /^(\d+)-(\d+)-(\d+)(?:[T ](\d+))?(?::(\d+))?/.exec(time);
  const date = new Date(Date.UTC(+year, +month - 1, +day, Number(hour ?? 0) + hours, Number(minute ?? 0)));
  const [dayText, timeText] = date.toISOString().split("T");
  return `${dayText} ${timeText.slice(0, timeText.slice(3, 5) === "00" ? 2 : 5)} UTC`;
}

const leadText = (hours) => `+${hours} h`;

function longitudeText(value) {
  const east = ((((value + 180) % 360) + 360) % 360) - 180;
  if (east === 0 || east === -180) return `${Math.abs(east)}°`;
  return `${+Math.abs(east).toFixed(2)}°${east > 0 ? "E" : "W"}`;
}

const latitudeText = (value) => (value === 0 ? "0°" : `${+Math.abs(value).toFixed(2)}°${value > 0 ? "N" : "S"}`);

// 整度数的刻度，不超过 most 个
function degreeTicks(low, high, most) {
  const step = [1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 180].find((s) => (high - low) / s < most) ?? 180;
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-6) * step; v <= high + 1e-6; v += step) ticks.push(v);
  return ticks;
}

// 对数轴的刻度：跨得宽时只写 10 的幂，窄时写 1、2、5，不到三倍时按等差；whole 时只要整数
function logTicks(low, high, whole = false) {
  const decades = Math.log10(high / low);
  const values = decades < 0.5 ? evenTicks(low, high) : decadeTicks(low, high, decades > 3 ? [1] : [1, 2, 5]);
  const shown = values.filter((v) => v >= low * 0.999 && v <= high * 1.001 && (!whole || Number.isInteger(v)));
  return { tickvals: shown, ticktext: shown.map(tickText) };
}

function decadeTicks(low, high, steps) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = Math.ceil((last - first) / 9);
  const values = [];
  for (let e = first; e <= last; e++) {
    if (e % every === 0) values.push(...steps.map((s) => Number(`${s}e${e}`)));
  }
  return values;
}

function evenTicks(low, high) {
  const rough = (high - low) / 4 || low / 4;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((s) => s * unit >= rough) * unit;
  const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
  return Array.from({ length: count }, (_, i) => Number(((Math.ceil(low / step) + i) * step).toPrecision(6)));
}

function tickText(value) {
  if (value >= 0.001 && value < 1e4) return String(value);
  const [mantissa, exponent] = value.toExponential().split("e");
  return `${mantissa === "1" ? "" : `${mantissa}×`}10${superscript(Number(exponent))}`;
}

function rgba(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}
