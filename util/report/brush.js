// 长序列的一段：缩略图上一个窗口，拖着走，拖两边缩放，键盘也行；一开始是末尾三十天。
const DAY = 86400000; // 毫秒
const SPAN_DAYS = 30;
const EDGE_PIXELS = 12; // 离窗口的边这么近算拖边
const instant = (time) => Date.parse(`${time}Z`); // 数据里的时刻都是 UTC，不写 Z
const dayText = (time) => new Date(time).toISOString().slice(0, 10);
const spanText = ([from, to]) => t("span", dayText(from), dayText(to));

// 窗口移进 [first, last]，不短于一天；毫秒
function within([from, to], [first, last]) {
  const width = Math.min(Math.max(to - from, DAY), last - first);
  const start = Math.min(Math.max(from, first), last - width);
  return [start, start + width];
}

// 现在看的一段：没有选过就是末尾三十天；不足三十天的不必选，看全部
function shownSpan([first, last]) {
  if (last - first <= SPAN_DAYS * DAY) return [first, last];
  return within(state.span ?? [last - SPAN_DAYS * DAY, last], [first, last]);
}

// 键 → 新的一段；null 是与这里无关的键
function spanByKey({ key, shiftKey }, [from, to], [first, last]) {
  const width = to - from;
  const step = Math.max(width / 10, DAY / 4);
  const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[key];
  if (way && shiftKey) return [from, to + way * step];
  if (way) return [from + way * step, to + way * step];
  if (key === "+" || key === "=") return [from - step / 2, to + step / 2];
  if (key === "-") return [from + step / 2, to - step / 2];
  if (key === "PageDown" || key === "PageUp") {
    const jump = key === "PageDown" ? width : -width;
    return [from + jump, to + jump];
  }
  if (key === "Home") return [first, first + width];
  return key === "End" ? [last - width, last] : null;
}

// 整条序列的折线，100 × 100 的格子里；缺的地方断开
function overviewPath(times, values, [first, last]) {
  const [low, high] = extent(values);
  let pen = "M";
  const parts = values.map((value, i) => {
    const move = pen;
    pen = known(value) ? "L" : "M";
    if (!known(value)) return "";
    const y = 95 - (90 * (value - low)) / (high - low || 1);
    return `${move}${((100 * (times[i] - first)) / (last - first)).toFixed(2)} ${y.toFixed(1)}`;
  });
  return parts.join("");
}

// 鼠标与手指：按在窗口的边上是缩放，里面是移动，外面是跳到那里；act(新的一段)
function dragSpan(strip, now, act) {
  let grip = null;
  strip.addEventListener("pointerdown", (event) => {
    const [span, whole] = now();
    const box = strip.getBoundingClientRect();
    const at = (x) => whole[0] + ((x - box.left) / box.width) * (whole[1] - whole[0]);
    const near = (edge) => Math.abs(at(event.clientX) - edge) / (whole[1] - whole[0]) < EDGE_PIXELS / box.width;
    const middle = at(event.clientX) - (span[1] - span[0]) / 2;
    const inside = at(event.clientX) > span[0] && at(event.clientX) < span[1];
    const kind = near(span[0]) ? "from" : near(span[1]) ? "to" : "both";
    const start = kind === "both" && !inside ? [middle, middle + span[1] - span[0]] : span;
    grip = { kind, start, whole, at, x: at(event.clientX) };
    strip.setPointerCapture(event.pointerId);
    act(start);
  });
  strip.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const { kind, start, whole, at, x } = grip;
    const moved = at(event.clientX) - x;
    const from = kind === "to" ? start[0] : Math.max(start[0] + moved, kind === "from" ? whole[0] : -Infinity);
    const to = kind === "from" ? start[1] : Math.min(start[1] + moved, kind === "to" ? whole[1] : Infinity);
    act(kind === "from" ? [Math.min(from, to - DAY), to] : [from, Math.max(to, from + DAY)]);
  });
  for (const end of ["pointerup", "pointercancel"]) strip.addEventListener(end, () => (grip = null));
}

// 缩略图与窗口；repaint() 重画这一段。返回的函数按现在的序列摆好它们：times 毫秒
function brush(body, repaint) {
  const path = svg("path", { fill: "none", "vector-effect": "non-scaling-stroke" });
  const picture = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  picture.append(path);
  const pane = el("div", { class: "window", role: "slider", tabindex: 0, id: "series-window" });
  const strip = el("div", { class: "strip" }, picture, pane);
  const hint = say(el("p", { class: "note" }), () => t("spanHint"));
  const holder = body.appendChild(el("div", { class: "brush" }, strip, hint));
  let whole = [0, 0];
  let waiting = false;
  const act = (span) => {
    state.span = within(span, whole);
    if (waiting) return; // 拖得再快，一帧屏幕只画一次
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      repaint();
    });
  };
  dragSpan(strip, () => [shownSpan(whole), whole], act);
  strip.addEventListener("dblclick", () => act(whole));
  pane.addEventListener("keydown", (event) => {
    const wanted = spanByKey(event, shownSpan(whole), whole);
    if (!wanted) return;
    event.preventDefault();
    act(wanted);
  });
  return (times, values) => {
    whole = [times[0], times.at(-1)];
    const [from, to] = shownSpan(whole);
    holder.hidden = whole[1] - whole[0] <= SPAN_DAYS * DAY;
    path.setAttribute("d", overviewPath(times, values, whole));
    const share = (time) => (100 * (time - whole[0])) / (whole[1] - whole[0]);
    Object.assign(pane.style, { left: `${share(from)}%`, width: `${share(to) - share(from)}%` });
    pane.setAttribute("aria-label", t("spanLabel"));
    pane.setAttribute("aria-valuemin", 0);
    pane.setAttribute("aria-valuemax", Math.round((whole[1] - whole[0]) / DAY));
    pane.setAttribute("aria-valuenow", Math.round((from - whole[0]) / DAY));
    pane.setAttribute("aria-valuetext", spanText([from, to]));
  };
}
